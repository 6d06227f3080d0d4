"""全貌那一课的题：小世界的三批（考试、训练重排、量"会读"的本领），真的段落的两批，每题带着检索到的前几名。"""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass

from nlp_common.base.errors import UserError
from nlp_common.tiny.world import QUESTION, WORLD
from rag_common.bm25 import BM25
from rag_common.corpus import Corpus, Question, load_corpus, tiny_world_corpus
from rag_common.embed import load_embedder

ANCHORS, SYNONYMS = 5, 3  # 小世界的一题提到五样东西，三样换了说法：BM25 只剩两样可以对
TRAIN_DOCUMENTS = 2  # 训练重排用的真的段落是考试的几倍，与考试的不重


@dataclass
class Bench:
    """一批题：语料，每题检索到的前几名（文档 id），各文档的文字。"""

    corpus: Corpus
    found: list[list[str]]

    def __post_init__(self) -> None:
        self.texts = {document.id: document.text for document in self.corpus.documents}

    def pairs(self) -> list[tuple[Question, list[str]]]:
        return list(zip(self.corpus.questions, self.found, strict=True))


def make_world(settings) -> tuple[Bench, Bench, Bench]:
    """测试的、训练重排的、量"会读"的本领的三批，故事各不相同。"""
    n, seed = settings.stories, settings.seed
    benches = []
    for offset, stories, questions in (
        (0, n, 2 * settings.questions),
        (1000, 2 * n, 5 * n),
        (2000, n, 2 * n),
    ):
        corpus = tiny_world_corpus(stories, questions, ANCHORS, seed + offset, SYNONYMS)
        corpus.questions = [with_reading(corpus, each) for each in corpus.questions if can_ask(each)]
        benches.append(search_bm25(corpus, settings.depth))
    benches[0].corpus.questions = benches[0].corpus.questions[: settings.questions]
    benches[0].found = benches[0].found[: settings.questions]
    return benches[0], benches[1], benches[2]


def needs(template: str) -> list[str]:
    return [slot for slot in WORLD if "{" + slot + "}" in template]


def can_ask(question: Question) -> bool:
    """小模型只会答 QUESTION 里的问法："小刚去了哪里？"要知道是小刚。题里没有提到的，不能替它补上。"""
    return any(set(needs(each)) <= set(question.meta["anchors"]) for each in QUESTION[question.meta["slot"]])


def with_reading(corpus: Corpus, question: Question) -> Question:
    """检索用原来的话；给模型读的是改写过的短问题（人常说的"查询改写"的另一半）。"""
    facts = next(each.meta for each in corpus.documents if each.id in question.gold)
    asks = QUESTION[question.meta["slot"]]
    ask = next(each for each in asks if set(needs(each)) <= set(question.meta["anchors"]))
    return dataclasses.replace(question, meta={**question.meta, "read": ask.format(**facts)})


def make_news(settings) -> tuple[Bench, Bench]:
    """真的段落：前 documents 段考试，后面的训练重排；文档不够，就三分之一考试。"""
    corpus = load_corpus(settings.dataset, (1 + TRAIN_DOCUMENTS) * settings.documents, 10**9, settings.seed)
    for note in corpus.notes:
        print(f"（{note}）")
    n = max(1, min(settings.documents, len(corpus.documents) // (1 + TRAIN_DOCUMENTS)))
    parts = []
    for documents in (corpus.documents[:n], corpus.documents[n:]):
        names = {document.id for document in documents}
        questions = [each for each in corpus.questions if each.gold <= names]
        parts.append(Corpus(corpus.name, documents, questions))
    if not all(part.questions for part in parts):
        raise UserError(
            f"--dataset {settings.dataset}：{len(corpus.documents)} 段里 {n} 段考试、其余的训练重排，有一边一道题也没有；"
            "多放几段有题的文档。"
        )
    rng = random.Random(f"news-{settings.seed}")
    rng.shuffle(parts[0].questions)
    parts[0].questions = parts[0].questions[: settings.asked]
    return search_bm25(parts[0], settings.depth), search_bm25(parts[1], settings.depth)


def search_bm25(corpus: Corpus, depth: int) -> Bench:
    index = BM25()
    index.add([each.id for each in corpus.documents], [each.text for each in corpus.documents])
    found = [[name for name, _ in index.search(each.text, depth)] for each in corpus.questions]
    return Bench(corpus, found)


def search_dense(corpus: Corpus, settings) -> list[list[str]]:
    """向量检索：与问题的余弦最大的几段。"""
    embedder = load_embedder(settings.embedder, settings.threads)
    print(
        f"{corpus.name} {len(corpus.documents)} 段，{len(corpus.questions)} 题；算向量（{embedder.name}）…",
        flush=True,
    )
    passages = embedder.passages([each.text for each in corpus.documents])
    cosines = embedder.queries([each.text for each in corpus.questions]) @ passages.T  # (问题数, 段数)
    best = (-cosines).argsort(axis=1, kind="stable")[:, : settings.depth]
    return [[corpus.documents[place].id for place in row] for row in best]
