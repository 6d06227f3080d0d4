"""实验室里的一条流水线：一个 Config 说清每一步怎样做，Lab 照着它检索、回答。换一项，别的都不动。

config = changed(Config(), "chunk=96 fusion=rrf")
outcomes = Lab(corpus, "auto").run(config, questions)     每题一个 Outcome：文档的次序、给读者的几块、回答
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from nlp_common.base.errors import UserError
from rag_common.bm25 import BM25
from rag_common.chunking import DEFAULT_SEPARATORS, Chunk, fixed, make_chunks, recursive, sentences, structure
from rag_common.corpus import Corpus, Question
from rag_common.embed import Embedder, load_embedder
from rag_common.fuse import reciprocal_rank, weighted
from rag_common.generate import MARK, NOT_FOUND, Extractive, Generator
from rag_common.noise import to_simplified
from rag_common.rerank import RandomHead, load_reranker, rank
from rag_common.tokenizers import TOKENIZERS, tokenizer_named

DEPTH, RERANKED = 50, 10  # 每种检索取前多少名；重排其中前几名
ASKING = ("什么时候", "哪个单位", "哪里", "多少", "什么", "谁")


@dataclass(frozen=True)
class Config:
    """默认是许多教程的默认：按空白切词，默认分隔符，只有 BM25，抄最像的一句。"""

    chunk: int = 128  # 一块几个字
    overlap: int = 0
    splitter: str = "default"
    tokenizer: str = "whitespace"
    rewrite: str = "none"  # 检索之前怎样改写问题
    fusion: str = "bm25"
    weight: float = 0.7  # 加权融合里 BM25 占多少
    rerank: str = "none"
    k: int = 3  # 给读者几块
    reader: str = "sentence"
    prompt: str = "plain"  # 只有 reader=model 用得着


CHOICES = {
    "splitter": ("default", "fixed", "chinese", "sentences", "structure"),
    "tokenizer": tuple(TOKENIZERS),
    "rewrite": ("none", "simplified"),
    "fusion": ("bm25", "dense", "rrf", "weighted"),
    "rerank": ("none", "random", "aligner", "e5"),
    "reader": ("sentence", "clause", "blank", "model"),
    "prompt": ("plain", "terse"),
}
PROMPTS = {"plain": "{}", "terse": "{}只写答案，不要整句。"}
LIMITS = {"chunk": (8, 4000), "overlap": (0, 2000), "k": (1, 20), "weight": (0, 1)}


def changed(base: Config, text: str) -> Config:
    """ "chunk=96 fusion=rrf" → base 改了这几项。写错了说出是哪一项、可以写什么。"""
    values: dict = {}
    known = {each.name: type(each.default) for each in dataclasses.fields(Config)}
    for word in text.split():
        name, equals, value = word.partition("=")
        if name not in known or not equals or not value:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"（是不是 {near[0]}）" if near and near[0] != name else ""
            raise UserError(f"--try 里的 {word} 看不懂{hint}：写成 名字=值，名字可以是 {'、'.join(known)}。")
        if name in CHOICES and value not in CHOICES[name]:
            raise UserError(f"--try 里的 {name} 没有 {value}，可以是 {'、'.join(CHOICES[name])}。")
        try:
            values[name] = known[name](value)
        except ValueError:
            raise UserError(
                f"--try 里的 {word}：{name} 要是{'整数' if known[name] is int else '数'}。"
            ) from None
        low, high = LIMITS.get(name, (0, 0))
        if name in LIMITS and not low <= values[name] <= high:
            raise UserError(f"--try 里的 {word}：{name} 要在 {low} 到 {high} 之间。")
    if not values:
        raise UserError('--try 是空的：写成 "chunk=96 fusion=rrf" 这样。')
    config = dataclasses.replace(base, **values)
    if config.overlap >= config.chunk:
        raise UserError(f"--try：overlap（{config.overlap}）要比 chunk（{config.chunk}）小。")
    return config


def difference(config: Config, base: Config) -> str:
    """与 base 不同的几项，写成 --try 的样子。"""
    mine, theirs = dataclasses.asdict(config), dataclasses.asdict(base)
    return " ".join(f"{name}={mine[name]}" for name in mine if mine[name] != theirs[name])


# ---------------------------------------------------------------- 一题的结果


@dataclass
class Outcome:
    documents: list[str]  # 找到的文档，分高的在前，一篇只出现一次
    contexts: list[Chunk]  # 交给读者的几块
    answer: str  # 没有找到是空的


class Lab:
    """一批文档，与照任何 Config 做的检索和回答。切好的块、BM25、向量都留着：只换后面一步的，不必重算。"""

    def __init__(self, corpus: Corpus, embedder: str, threads: int = 1, generator: Generator | None = None):
        self.corpus, self.embedder_name, self.threads, self.generator = corpus, embedder, threads, generator
        self.kept: dict = {}

    def run(self, config: Config, questions: Sequence[Question]) -> list[Outcome]:
        chunks = self._chunks(config)
        texts = [q.text if config.rewrite == "none" else to_simplified(q.text) for q in questions]
        ranked = self._retrieve(config, texts)
        ranked = [self._rerank(config, t, names, chunks) for t, names in zip(texts, ranked, strict=True)]
        contexts = [[chunks[name] for name in names[: config.k]] for names in ranked]
        answers = self._answer(config, texts, contexts)
        outcomes = []
        for names, given, answer in zip(ranked, contexts, answers, strict=True):
            documents = list(dict.fromkeys(chunks[name].document for name in names))
            outcomes.append(Outcome(documents, given, answer))
        return outcomes

    def embedder(self) -> Embedder:
        return self._keep(("embedder",), lambda: load_embedder(self.embedder_name, self.threads))

    # ---------------------------------------- 各步

    def _keep(self, key: tuple, make: Callable[[], object]):
        if key not in self.kept:
            self.kept[key] = make()
        return self.kept[key]

    def _chunks(self, config: Config) -> dict[str, Chunk]:
        return self._keep(self._cut_key(config), lambda: cut(self.corpus, config))

    def _cut_key(self, config: Config) -> tuple:
        return "chunks", config.splitter, config.chunk, config.overlap

    def _retrieve(self, config: Config, texts: list[str]) -> list[list[str]]:
        sparse: list = [[] for _ in texts]
        dense: list = [[] for _ in texts]
        if config.fusion != "dense":
            index = self._keep((*self._cut_key(config), config.tokenizer), lambda: self._index(config))
            sparse = [index.search(text, DEPTH) for text in texts]
        if config.fusion != "bm25":
            dense = self._dense(config, texts)
        if config.fusion in ("bm25", "dense"):
            return [[name for name, _ in (a or b)] for a, b in zip(sparse, dense, strict=True)]
        found = []
        for a, b in zip(sparse, dense, strict=True):
            if config.fusion == "rrf":
                fused = reciprocal_rank([[name for name, _ in each] for each in (a, b)])
            else:
                fused = weighted([a, b], [config.weight, 1 - config.weight])
            found.append([name for name, _ in fused])
        return found

    def _index(self, config: Config) -> BM25:
        index, chunks = BM25(tokenizer_named(config.tokenizer)), self._chunks(config)
        index.add(list(chunks), [chunk.text for chunk in chunks.values()])
        return index

    def _dense(self, config: Config, texts: list[str]) -> list[list[tuple[str, float]]]:
        chunks = self._chunks(config)
        embedder = self.embedder()
        vectors = self._keep(
            ("vectors", *self._cut_key(config)),
            lambda: embedder.passages([chunk.text for chunk in chunks.values()]),
        )
        asked = self._keep(("asked", tuple(texts)), lambda: embedder.queries(texts))
        names, found = list(chunks), []
        for scores in asked @ vectors.T:  # 一题 (N,)
            best = np.argsort(-scores, kind="stable")[:DEPTH]
            found.append([(names[place], float(scores[place])) for place in best])
        return found

    def _rerank(self, config: Config, text: str, names: list[str], chunks: dict[str, Chunk]) -> list[str]:
        """前几名重新排过，后面的不动。"""
        if config.rerank == "none" or not names:
            return names
        model = self._keep(("reranker", config.rerank), lambda: make_reranker(config.rerank))
        head = names[:RERANKED]
        order = rank(model, text, [chunks[name].text for name in head])
        return [head[place] for place in order] + names[RERANKED:]

    def _answer(self, config: Config, texts: list[str], contexts: list[list[Chunk]]) -> list[str]:
        passages = [[chunk.text for chunk in given] for given in contexts]
        if config.reader == "model":
            if self.generator is None:
                raise UserError(
                    'reader=model 要一个模型：加 --generator smollm2，或 hub 名、文件夹、"网址 模型名"。'
                )
            texts = [PROMPTS[config.prompt].format(text) for text in texts]
            said = self.generator.answer(texts, passages)
        else:
            if config.reader != "sentence":
                passages = [clauses(given) for given in passages]
            said = Extractive().answer(texts, passages)
        answers = ["" if NOT_FOUND in each.text else MARK.sub("", each.text).strip() for each in said]
        if config.reader == "blank":
            answers = [fill_in(text, answer) for text, answer in zip(texts, answers, strict=True)]
        return answers


def cut(corpus: Corpus, config: Config) -> dict[str, Chunk]:
    """各文档的各块：id → 块。"""
    chunks = {}
    for document in corpus.documents:
        text = document.text
        if config.splitter == "default":
            spans = recursive(text, config.chunk, config.overlap, DEFAULT_SEPARATORS)
        else:
            split = {"fixed": fixed, "chinese": recursive, "sentences": sentences, "structure": structure}
            spans = split[config.splitter](text, config.chunk, config.overlap)
        for chunk in make_chunks(document.id, text, spans):
            chunks[chunk.id] = chunk
    return chunks


def make_reranker(name: str):
    """random：编码器是好的，最后一层没有训练过；aligner、e5：同样的字数一数，没有训练过。"""
    if name == "random":
        return RandomHead(load_reranker("aligner", 0, 0))
    return load_reranker(name, 4, 0)


# ---------------------------------------------------------------- 不用模型的读者


def clauses(passages: Sequence[str]) -> list[str]:
    """各块拆成分句。"""
    found = []
    for text in passages:
        found += [part for part in re.split(r"[，。！？；：\n]+", text) if part.strip()]
    return found


def fill_in(question: str, clause: str) -> str:
    """填空：问题里疑问词前后的字，在分句里各找最长的一段，中间就是答案；找不到就是整个分句。

    "一次借几本" 这样字面对不上的填不了：它只会填"谁、哪里、什么时候、多少、什么"。
    """
    word = next((each for each in ASKING if each in question), None)
    if not word or not clause:
        return clause
    left, _, right = question.rstrip("？?").partition(word)
    start, end = 0, len(clause)
    for size in range(len(left), 1, -1):  # 疑问词前面的字，尽量长，至少两个
        place = clause.find(left[-size:])
        if place >= 0:
            start = place + size
            break
    for size in range(len(right), 1, -1):
        place = clause.find(right[:size], start)
        if place >= 0:
            end = place
            break
    return clause[start:end] or clause
