"""两种检索：认字面的 BM25，认意思的向量；合起来什么时候更好，什么时候白费功夫，都量出来。

你会学到
  1. BM25 手写，中文用"单个的字加相邻两个字"就很好；许多库默认的分词器在中文上一个词也切不出来，几乎什么都找不到。
  2. 向量检索（e5）换个说法也找得到，可是照着原文问的，它反而不如 BM25。
  3. 两列结果怎样合成一列：RRF 只看名次，加权的先把分拉到 0 到 1。
  4. 老实的一行：问题照着原文说的，混合不比 BM25 好。打错字、写繁体、换同义词，各切一片来看，哪片有用一目了然。
  5. 改写问题（繁体转简体、去掉疑问词），和 HyDE（先让模型编一段答案，拿编的去找）。

怎么运行
  python hybrid_retrieval.py                                    # 人民日报 200 段，小世界 120 篇
  python hybrid_retrieval.py --dataset 我的文件夹                # 自己的文档（txt md html pdf docx csv），问题由程序造
  python hybrid_retrieval.py --dataset cmrc2018.jsonl           # 每行 context、question、answers
  python hybrid_retrieval.py --embedder BAAI/bge-small-zh-v1.5  # 换一个向量模型
  python hybrid_retrieval.py --store qdrant://某个文件夹          # 换一种知识库

应当看到（tiny，实测见本文件夹的 README.md）：照原文问的，BM25 最好；换了同义词的，混合比两个单独的都好得多。

参考：Robertson & Zaragoza 2009（BM25）；Cormack et al. 2009（RRF）；Wang et al. 2022（e5）；Gao et al. 2022（HyDE）。
"""

from nlp_common.base.cli import run_main

import random
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from nlp_common.base.arguments import COUNT, SHARE, option
from nlp_common.base.console import padded, print_table
from nlp_common.base.errors import UserError
from nlp_common.draw.plots import bar_chart, line_chart
from nlp_common.lm.loading import load_causal_lm
from nlp_common.lm.replies import reply_to
from nlp_common.train.chain import chain_model
from nlp_common.train.lesson import run_lesson, run_part
from nlp_common.train.settings import LessonSettings, parse_settings
from nlp_common.train.stage import Stage
from rag_common.bm25 import BM25
from rag_common.chunking import Chunk, make_chunks
from rag_common.corpus import Corpus, best_recall, data_of, load_corpus, tiny_world_corpus
from rag_common.embed import Embedder, choose_embedder, load_embedder
from rag_common.fill import fill
from rag_common.fuse import reciprocal_rank, weighted
from rag_common.metrics import paired_bootstrap, recall_at, retrieval_row
from rag_common.noise import to_simplified, to_traditional, typos
from rag_common.store import Store, open_store
from rag_common.tokenizers import TOKENIZERS

HOME = Path(__file__).resolve().parent
PRESETS = {
    "tiny": {"documents": 200, "questions": 200, "stories": 120},
    "full": {"documents": 5000, "questions": 1000, "stories": 1000},
}
DEPTH = 50  # 每种检索取前多少名去融合
WEIGHTS = [n / 10 for n in range(11)]  # 画一条线：BM25 占 0 到 1
ANCHORS, SYNONYMS = 3, (5, 3)  # 小世界的题提到几样；换同义词的提到五样，其中三样换了
QUESTION_WORDS = ("请问", "什么时候", "哪个单位", "哪里", "多少", "什么", "是谁", "谁", "吗", "呢")
SLICES = {
    "plain": "照原文问",
    "typos": "打错的字",
    "traditional": "繁体",
    "tiny_world": "小世界",
    "synonyms": "同义词",
}
TOKENIZER_LABELS = {
    "characters_and_bigrams": "字+相邻两字",
    "characters": "单个的字",
    "bigrams": "相邻两字",
    "jieba": "jieba",
    "whitespace": "按空白",
    "word_pattern": "\\w\\w+",
}
METHODS = {
    "bm25": "BM25",
    "dense": "向量",
    "rrf": "RRF",
    "weighted": "加权",
    "rewrite": "改写+加权",
    "hyde": "HyDE+加权",
}


@dataclass
class HybridSettings(LessonSettings):
    NOT_IN_FINGERPRINT = LessonSettings.NOT_IN_FINGERPRINT | {"store", "threads"}  # 结果与它们无关

    dataset: str = option("people_daily、文件夹，或 cmrc2018 那样的 json/jsonl 文件", "people_daily")
    documents: int | None = option("最多用多少段文档", limits=COUNT)
    questions: int | None = option("最多问多少题", limits=COUNT)
    stories: int | None = option("小世界里多少篇故事，也就是多少题", limits=COUNT)
    embedder: str = option("向量模型：auto（有 e5 就用 e5）、e5、hashed，或 hub 名、本地文件夹", "auto")
    generator: str | None = option(
        "写 HyDE 的模型；默认是 Qwen 链 tiny 的 SFT 模型，只答小世界的题；none 不做"
    )
    store: str | None = option("知识库的网址，例如 qdrant://文件夹；默认 faiss://，用完就删")
    weight: float = option("加权融合里 BM25 占多少，其余归向量", 0.5, limits=SHARE)
    threads: int = option("算向量用几个线程", 1, limits=COUNT)

    def check(self) -> None:
        if (self.generator or "").startswith(("http://", "https://")):
            raise UserError(
                f"--generator {self.generator}：HyDE 的模型在本机运行，这里要 hub 名、本地文件夹或 none，不能是网址。"
            )


# ---------------------------------------------------------------- 1. 从头到尾


def learn(stage: Stage, generator: dict | None) -> dict:
    settings = stage.settings
    corpus = load_corpus(settings.dataset, settings.documents, settings.questions, settings.seed)
    for note in corpus.notes:
        print(f"（{note}）")
    embedder = load_embedder(settings.embedder, settings.threads)
    print(f"{corpus.name}：{len(corpus.documents)} 段，{len(corpus.questions)} 题；向量模型 {embedder.name}")

    store = open_store(
        settings.store or f"faiss://{stage.folder.work / 'store'}", embedder.fingerprint, embedder.dim
    )
    tokenizer_rows = compare_tokenizers(corpus)
    print_rows("BM25，各种分词器", tokenizer_rows)

    slices, bounds, gains, weights = {}, {}, {}, {}
    for name, part in make_slices(corpus, settings).items():
        ours = name in ("tiny_world", "synonyms")  # 链上的小模型只读过小世界
        writer = generator if generator and (ours or settings.generator) else None
        work = partial(measure, corpus=part, embedder=embedder, store=store, generator=writer)
        found = run_part(stage, name, work)
        slices[name], gains[name], weights[name] = found["rows"], found["gain"], found["weights"]
        if ours:
            bounds[name] = {known: best_recall(part.questions, 1, known) for known in ("matches", "literal")}
        print_slice(name, slices[name], bounds.get(name))
    store.close()
    metrics = {
        "methods": slices["plain"],
        "tokenizers": tokenizer_rows,
        "slices": slices,
        "bounds": bounds,
        "gains": gains,
        "weights": weights,
        "embedder": embedder.name,
    }
    print_gains(gains)
    data = {"dataset": {**corpus.describe(), **data_of(settings.dataset)}}
    return stage.save(metrics, data, lambda folder: draw(folder, metrics))


def make_slices(corpus: Corpus, settings: HybridSettings) -> dict[str, Corpus]:
    """同一批文档，问题照原样、打错字、写成繁体；再加小世界的两种题。"""
    rng = random.Random(f"typos-{settings.seed}")
    n, seed = settings.stories, settings.seed
    return {
        "plain": corpus,
        "typos": corpus.with_questions(lambda text: typos(text, rng)),
        "traditional": corpus.with_questions(to_traditional),
        "tiny_world": tiny_world_corpus(n, n, ANCHORS, seed),
        "synonyms": tiny_world_corpus(n, n, SYNONYMS[0], seed, synonyms=SYNONYMS[1]),
    }


# ---------------------------------------------------------------- 2. 一片上的各种检索


def measure(
    part: Stage, corpus: Corpus, embedder: Embedder, store: Store, generator: dict | None
) -> dict[str, dict]:
    """一片：每种检索一行指标，加权比单独的好多少，各种权重的 R@1。"""
    ranked, weights = retrieve(corpus, embedder, store, part.settings.weight, generator)
    gold = [question.gold for question in corpus.questions]
    rows = {method: retrieval_row(lists, gold) for method, lists in ranked.items()}
    return {"rows": rows, "gain": gain_over_best_single(ranked, gold, part.settings.seed), "weights": weights}


def retrieve(
    corpus: Corpus, embedder: Embedder, store: Store, weight: float, generator: dict | None
) -> tuple[dict[str, list[list[str]]], dict[str, float]]:
    """→ (每种检索在每道题上找到的文档 id，分高的在前；各种权重的加权融合的 R@1)。"""
    texts = [question.text for question in corpus.questions]
    index = BM25()
    index.add(
        [document.id for document in corpus.documents], [document.text for document in corpus.documents]
    )
    fill(store, embedder, chunks_of(corpus), {"corpus": corpus.name})

    sparse = [index.search(text, DEPTH) for text in texts]  # 每题 [(id, 分), …]
    dense = search_dense(store, corpus.name, embedder.queries(texts))
    found = {
        "bm25": [names(ranked) for ranked in sparse],
        "dense": [names(ranked) for ranked in dense],
        "rrf": [names(reciprocal_rank([names(a), names(b)])) for a, b in zip(sparse, dense, strict=True)],
        "weighted": fuse(sparse, dense, weight),
    }
    short = [rewrite(text) for text in texts]
    sparse_short = [index.search(text, DEPTH) for text in short]
    found["rewrite"] = fuse(sparse_short, search_dense(store, corpus.name, embedder.queries(short)), weight)
    if generator:
        imagined = imagine(texts, generator)
        as_passages = embedder.passages(
            [f"{text}{answer}" for text, answer in zip(texts, imagined, strict=True)]
        )
        found["hyde"] = fuse(sparse, search_dense(store, corpus.name, as_passages), weight)
    gold = [question.gold for question in corpus.questions]
    sweep = {str(w): retrieval_row(fuse(sparse, dense, w), gold)["recall_at_1"] for w in WEIGHTS}
    return found, sweep


def chunks_of(corpus: Corpus) -> list[Chunk]:
    """一篇一块，整篇在里面。"""
    chunks = []
    for document in corpus.documents:
        chunks += make_chunks(document.id, document.text, [(0, len(document.text))], corpus=corpus.name)
    return chunks


def search_dense(store: Store, corpus: str, vectors) -> list[list[tuple[str, float]]]:
    """与每个问题的向量内积最大的各段 [(文档 id, 余弦), …]。"""
    found = store.search(vectors, DEPTH, {"corpus": corpus})
    return [[(hit.document, hit.score) for hit in hits] for hits in found]


def fuse(sparse: list, dense: list, weight: float) -> list[list[str]]:
    return [names(weighted([a, b], [weight, 1 - weight])) for a, b in zip(sparse, dense, strict=True)]


def names(ranked: list[tuple[str, float]]) -> list[str]:
    return [name for name, _ in ranked]


def rewrite(text: str) -> str:
    """改写问题：繁体转简体；疑问词去掉，文档里没有"哪里"，有的是地名。"""
    text = to_simplified(text)
    for word in QUESTION_WORDS:
        text = text.replace(word, "")
    return text


def imagine(texts: list[str], generator: dict) -> list[str]:
    """HyDE：让模型不看文档就答，答得对不对不要紧，像文档里的话就好找。"""
    tokenizer, model = load_causal_lm(generator["path"])
    ask = "{}" if generator["stage"] != "model" else "请写一段话回答下面的问题，不超过一百字：\n{}"
    messages = [{"messages": [{"role": "user", "content": ask.format(text)}]} for text in texts]
    size = 32 if generator["stage"] != "model" else 128
    return [reply["text"] for reply in reply_to(model.eval(), tokenizer, messages, size)]


# ---------------------------------------------------------------- 3. 分词器，与差别是不是真的


def compare_tokenizers(corpus: Corpus) -> dict[str, dict]:
    """同样的 BM25，只换分词器。"""
    rows = {}
    for name, tokenizer in TOKENIZERS.items():
        if name == "jieba" and find_spec("jieba") is None:
            print("（没有装 jieba，跳过这一行：pip install jieba）")
            continue
        index = BM25(tokenizer)
        index.add(
            [document.id for document in corpus.documents], [document.text for document in corpus.documents]
        )
        ranked = [names(index.search(question.text, DEPTH)) for question in corpus.questions]
        rows[name] = retrieval_row(ranked, [question.gold for question in corpus.questions])
    return rows


def gain_over_best_single(ranked: dict, gold: list, seed: int) -> dict:
    """加权融合的第一名，比 BM25 与向量里较好的那个多对几成的题；95% 区间含 0 就说不上更好。"""
    first = {}
    for method in ("bm25", "dense", "weighted"):
        first[method] = [
            recall_at(each, answer, 1) for each, answer in zip(ranked[method], gold, strict=True)
        ]
    best = max(("bm25", "dense"), key=lambda method: sum(first[method]))
    gain, low, high = paired_bootstrap(first["weighted"], first[best], seed=seed)
    return {"over": best, "gain": gain, "low": low, "high": high}


# ---------------------------------------------------------------- 4. 看


def print_rows(title: str, rows: dict[str, dict]) -> None:
    table = [[title, "R@1", "R@5", "MRR"]]
    for name, row in rows.items():
        table.append([name, *(f"{row[metric]:.3f}" for metric in ("recall_at_1", "recall_at_5", "mrr"))])
    print_table(table)


def print_slice(name: str, rows: dict[str, dict], bound: dict | None) -> None:
    most = f"，最多能对 {bound['matches']:.3f}，只认字面最多 {bound['literal']:.3f}" if bound else ""
    print_rows(
        f"{SLICES[name]}（{rows['bm25']['n']} 题{most}）", {METHODS[m]: row for m, row in rows.items()}
    )


def print_gains(gains: dict[str, dict]) -> None:
    print("\n加权融合的 R@1 比单独一种里较好的多多少（95% 区间）")
    for name, gain in gains.items():
        sure = "更好" if gain["low"] > 0 else "更差" if gain["high"] < 0 else "说不上好坏"
        print(
            f"  {padded(SLICES[name], 14)}比 {METHODS[gain['over']]} {gain['gain']:+.3f}（{gain['low']:+.3f} 到 {gain['high']:+.3f}）：{sure}"
        )
    print()


def draw(folder: Path, metrics: dict) -> None:
    slices, tokenizers = metrics["slices"], metrics["tokenizers"]
    english = {
        "plain": "verbatim",
        "typos": "typos",
        "traditional": "traditional",
        "tiny_world": "tiny world",
        "synonyms": "synonyms",
    }
    series = {}
    for method in ("bm25", "dense", "rrf", "weighted"):
        label = f"{METHODS[method]}|{method}"
        series[label] = {
            f"{SLICES[s]}|{english[s]}": rows[method]["recall_at_1"] for s, rows in slices.items()
        }
    bar_chart(folder / "slices.svg", series, "第一名就是对的题|Recall at 1 by slice", "", "R@1")
    bars = {f"{TOKENIZER_LABELS[name]}|{name}": row["recall_at_1"] for name, row in tokenizers.items()}
    bar_chart(folder / "tokenizers.svg", {"R@1": bars}, "BM25 换分词器|BM25 by tokenizer", "", "R@1")
    lines = {}
    for name, row in metrics["weights"].items():
        lines[f"{SLICES[name]}|{english[name]}"] = ([float(weight) for weight in row], list(row.values()))
    title, across = "BM25 占多少|Weight of BM25", "BM25 的权重（0 只有向量，1 只有 BM25）|weight of BM25"
    line_chart(folder / "weights.svg", lines, title, across, "R@1")


def main(argv: list[str] | None = None) -> dict:
    settings = parse_settings(HybridSettings, PRESETS, argv)
    settings.embedder = choose_embedder(settings.embedder)
    generator = None if settings.generator == "none" else chain_model("sft", settings.generator)
    work = partial(learn, generator=generator)
    return run_lesson(
        "hybrid_retrieval", HOME, settings, work, generator_id=generator["id"] if generator else "none"
    )


if __name__ == "__main__":
    run_main(main)
