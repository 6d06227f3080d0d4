"""文档进知识库之前：怎样读、怎样切、怎样算向量、怎样检查。每一样都量，不凭感觉。

你会学到
  1. 切法看的是"答案有没有被切断"：别的库默认的分隔符（空行、换行、空格）在中文里退化成逐字切；
     加上"。！？；，"，同样大小的块，完整的答案多得多。重叠也能补，代价是多存几成。
  2. 块越小，找对文档越容易？不一定。可是块里有没有完整的答案，一定越来越少：交给模型的是块，不是文档。
  3. 问题是繁体、文档是简体，字对不上；检索之前转换一下就补回来。
  4. 句向量是怎样从 BERT 算出来的（Sentence-BERT 的算法）：一步写错（平均时把填充也算进去、只取 [CLS]）差多少。
  5. 质量检查：空的、重复的、乱码的、套话、太长的，一批与从前的比变了没有；故意做坏一些，量它找回几成、冤枉几成。

怎么运行
  python data_preprocess.py                              # 内置的《人民日报》
  python data_preprocess.py --dataset cmrc2018.jsonl     # 每行 context、question、answers
  python data_preprocess.py --dataset 我的文件夹           # 自己的文档（txt md html pdf docx csv）
  python data_preprocess.py --embedder BAAI/bge-small-zh-v1.5

应当看到（tiny，实测见本文件夹的 README.md）：128 个字一块，中文分隔符切断的出处比默认的少得多；块缩到 32 个字，
第一块里有完整出处的只剩一小部分；做坏的文档大半找得出来，改得最多的重复和只有一半乱码的最难。

参考：Reimers & Gurevych 2019（Sentence-BERT）；Broder 1997（用片找相近的网页）；Lin 1991（Jensen-Shannon 散度）。
"""

from nlp_common.base.cli import run_main

import random
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nlp_common.base.arguments import COUNT, SHARE, option
from nlp_common.base.console import print_table
from nlp_common.base.errors import UserError
from nlp_common.base.runs import write_json
from nlp_common.data.people_daily import people_daily
from nlp_common.draw.plots import bar_chart, line_chart
from nlp_common.train.lesson import run_lesson
from nlp_common.train.settings import LessonSettings, parse_settings
from nlp_common.train.stage import Stage
from planted_faults import DRIFTS, KINDS, drifted, plant, read_back
from rag_common.bm25 import BM25
from rag_common.chunking import (
    CHINESE_SEPARATORS,
    DEFAULT_SEPARATORS,
    Chunk,
    fixed,
    make_chunks,
    recursive,
    sentences,
    structure,
)
from rag_common.corpus import Corpus, Question, data_of, load_corpus, tiny_world_corpus
from rag_common.documents import Document, read_folder
from rag_common.embed import TransformerEmbedder, choose_embedder, load_embedder
from rag_common.metrics import paired_bootstrap
from rag_common.noise import to_simplified, to_traditional
from sentence_bert import POOLINGS, encode, with_sentence_transformers
from text_quality import FAULTS, DriftGauge, find_faults

HOME = Path(__file__).resolve().parent
PRESETS = {
    "tiny": {"documents": 600, "questions": 300, "vectors": 60},
    "full": {"documents": 5000, "questions": 2000, "vectors": 500},
}
SIZES = (512, 256, 128, 64, 32)
CUTS = {
    "fixed": "每 N 字一刀",
    "default": "默认分隔符",
    "chinese": "中文分隔符",
    "sentences": "整句",
    "structure": "标题与整句",
}
BATCH, NULL_BATCHES = 50, 100  # 一批几篇；没有变的批试几次


@dataclass
class PreprocessSettings(LessonSettings):
    dataset: str = option("people_daily、文件夹，或 cmrc2018 那样的 json/jsonl 文件", "people_daily")
    documents: int | None = option("最多用多少段文档", limits=COUNT)
    questions: int | None = option("最多问多少题", limits=COUNT)
    size: int = option("比切法时一块几个字", 128, limits=COUNT)
    embedder: str = option(
        "句向量用哪个模型：auto（有 e5 就用）、e5、hub 名、本地文件夹；hashed 不做", "auto"
    )
    vectors: int | None = option("句向量一节用几题", limits=COUNT)
    spoiled: float = option("每种坏法做坏几成的文档", 0.01, limits=SHARE)

    def check(self) -> None:
        if self.size < 8:
            raise UserError(f"--size 至少 8 个字，给的是 {self.size}。")


# ---------------------------------------------------------------- 1. 从头到尾


def learn(stage: Stage) -> dict:
    settings = stage.settings
    embedder = None if settings.embedder == "hashed" else load_embedder(settings.embedder)
    corpus = whole_documents(settings)
    lengths = [len(document.text) for document in corpus.documents]
    print(
        f"\n{corpus.name}：{len(corpus.documents)} 篇，平均 {np.mean(lengths):.0f} 字；{len(corpus.questions)} 题"
    )
    metrics: dict = {"formats": read_back(stage.folder.work / "formats", corpus.documents[0].text[:600])}
    print("六种文件读回来：" + "，".join(f"{n} {row['kept']:.0%}" for n, row in metrics["formats"].items()))
    metrics["cuts"], metrics["gain"] = compare_cuts(corpus, settings.size, settings.seed)
    metrics["overlap"] = compare_overlaps(corpus, settings.size)
    metrics["shrink"] = shrink(corpus)
    metrics["script"] = traditional_questions(corpus)
    metrics["recipe"] = sentence_vectors(corpus, embedder, settings.vectors)
    metrics["monitor"], examples = monitor(corpus, settings)
    metrics["drift"] = drift(corpus, settings.seed)

    def write(folder: Path) -> None:
        write_json(folder / "not_planted.json", examples)
        draw(folder, metrics)

    return stage.save(metrics, {"dataset": {**corpus.describe(), **data_of(settings.dataset)}}, write)


def whole_documents(settings: PreprocessSettings) -> Corpus:
    """切之前的长文档：《人民日报》一篇几百字（语料里是切好的段，合回去），文件夹里一个文件是一篇。"""
    corpus = load_corpus(settings.dataset, settings.documents, settings.questions, settings.seed)
    for note in corpus.notes:
        print(f"（{note}）")
    if settings.dataset == "people_daily":
        names = list(dict.fromkeys(document.id.split("#")[0] for document in corpus.documents))
        rows = people_daily("train", settings.documents)
        documents = [Document(name, rows[int(name[1:])]["text"]) for name in names]
        owner = {document.id: document.id.split("#")[0] for document in corpus.documents}
    elif Path(settings.dataset).expanduser().is_dir():
        documents, _ = read_folder(settings.dataset)
        owner = {document.id: document.meta["file"] for document in corpus.documents}
    else:
        documents, owner = corpus.documents, {document.id: document.id for document in corpus.documents}
    questions = [
        Question(q.text, q.answer, frozenset(owner[name] for name in q.gold), q.kind, q.meta)
        for q in corpus.questions
        if evidence(q)
    ]
    if not questions:
        raise UserError(f"{settings.dataset} 的问题都没有答案：量不了答案有没有被切断，给每题写上 answer。")
    if len(questions) < len(corpus.questions):
        print(f"（{len(corpus.questions) - len(questions)} 题没有答案，不用。）")
    return Corpus(corpus.name, documents, questions)


def evidence(question: Question) -> str:
    """答题要看到的原话（出处）：程序造的题是出题的那个分句，别的题是标准答案。"""
    return squeezed(question.meta.get("clause") or question.answer)


def squeezed(text: str) -> str:
    return re.sub(r"\s+", "", text)


# ---------------------------------------------------------------- 2. 切


def compare_cuts(corpus: Corpus, size: int, seed: int) -> tuple[dict[str, dict], dict]:
    """同样的 size，五种切法：出处完整地留在某一块里的题有几成。"""
    rows, kept = {}, {}
    for name in CUTS:
        chunks = cut(corpus, name, size)
        kept[name] = kept_whole(corpus, chunks)
        rows[name] = describe_chunks(chunks, corpus) | {"kept": float(np.mean(kept[name]))}
    table = [[f"{size} 个字一块", "几块", "平均几字", "出处完整"]]
    for name, row in rows.items():
        table.append([CUTS[name], row["chunks"], f"{row['mean_chars']:.0f}", f"{row['kept']:.3f}"])
    print_table(table)
    gain, low, high = paired_bootstrap(kept["chinese"], kept["default"], seed=seed)
    print(f"  中文分隔符比默认的多 {gain:+.3f}（95% 区间 {low:+.3f} 到 {high:+.3f}）")
    return rows, {"gain": gain, "low": low, "high": high}


def cut(corpus: Corpus, how: str, size: int, overlap: int = 0) -> list[Chunk]:
    chunks = []
    for document in corpus.documents:
        text = document.text
        if how == "default":
            spans = recursive(text, size, overlap, DEFAULT_SEPARATORS)
        elif how == "chinese":
            spans = recursive(text, size, overlap, CHINESE_SEPARATORS)
        else:
            spans = {"fixed": fixed, "sentences": sentences, "structure": structure}[how](text, size, overlap)
        chunks += make_chunks(document.id, text, spans)
    return chunks


def kept_whole(corpus: Corpus, chunks: list[Chunk]) -> list[float]:
    """一题一个数：有答案的文档里，有没有一块含着完整的出处。"""
    of_document: dict[str, list[str]] = {}
    for chunk in chunks:
        of_document.setdefault(chunk.document, []).append(squeezed(chunk.text))
    kept = []
    for question in corpus.questions:
        texts = [text for name in question.gold for text in of_document.get(name, ())]
        kept.append(float(any(evidence(question) in text for text in texts)))
    return kept


def describe_chunks(chunks: list[Chunk], corpus: Corpus) -> dict:
    stored = sum(len(chunk.text) for chunk in chunks)
    whole = sum(len(document.text) for document in corpus.documents)
    return {"chunks": len(chunks), "mean_chars": stored / len(chunks), "stored_ratio": stored / whole}


def compare_overlaps(corpus: Corpus, size: int) -> dict[str, dict]:
    """重叠：切断了的，前后两块各有一份；多存多少是它的代价。"""
    rows: dict[str, dict] = {}
    table = [["重叠（出处完整／存的是原文的几倍）", "不重叠", "四分之一", "一半"]]
    for name in ("fixed", "chinese", "sentences"):
        rows[name] = {}
        for label, overlap in (("none", 0), ("quarter", size // 4), ("half", size // 2)):
            chunks = cut(corpus, name, size, overlap)
            kept = float(np.mean(kept_whole(corpus, chunks)))
            rows[name][label] = describe_chunks(chunks, corpus) | {"kept": kept}
        shown = [f"{row['kept']:.3f}／{row['stored_ratio']:.2f}" for row in rows[name].values()]
        table.append([CUTS[name], *shown])
    print_table(table)
    return rows


def shrink(corpus: Corpus) -> dict[str, dict]:
    """块从大到小：第一块的文档对不对，第一块里有没有完整的出处，前五块里有没有。"""
    rows, table = {}, [["整句切，BM25 检索", "文档对", "第一块有出处", "前五块有出处", "有一块完整"]]
    for size in SIZES:
        chunks = cut(corpus, "sentences", size)
        found = search(chunks, [question.text for question in corpus.questions])
        right, top, five = [], [], []
        for question, hits in zip(corpus.questions, found, strict=True):
            right.append(bool(hits) and hits[0].document in question.gold)
            held = [
                hit.document in question.gold and evidence(question) in squeezed(hit.text) for hit in hits
            ]
            top.append(any(held[:1]))
            five.append(any(held))
        shares = {"document_at_1": right, "evidence_at_1": top, "evidence_at_5": five}
        shares["kept"] = kept_whole(corpus, chunks)
        rows[str(size)] = {key: float(np.mean(each)) for key, each in shares.items()}
        table.append([f"{size} 字", *(f"{value:.3f}" for value in rows[str(size)].values())])
    print_table(table)
    return rows


def search(chunks: list[Chunk], texts: list[str], k: int = 5) -> list[list[Chunk]]:
    index, by_id = BM25(), {chunk.id: chunk for chunk in chunks}
    index.add([chunk.id for chunk in chunks], [chunk.text for chunk in chunks])
    return [[by_id[name] for name, _ in index.search(text, k)] for text in texts]


def traditional_questions(corpus: Corpus) -> dict[str, dict]:
    """问题写成繁体：照样找，和先转成简体再找。"""
    chunks = cut(corpus, "sentences", 128)
    texts = [question.text for question in corpus.questions]
    traditional = [to_traditional(text) for text in texts]
    converted = [to_simplified(text) for text in traditional]
    rows = {}
    for name, asked in (("plain", texts), ("traditional", traditional), ("converted", converted)):
        hits = search(chunks, asked, 1)
        right = [bool(h) and h[0].document in q.gold for h, q in zip(hits, corpus.questions, strict=True)]
        rows[name] = {"recall_at_1": float(np.mean(right))}
    rows["converted"]["same_text"] = float(np.mean([a == b for a, b in zip(texts, converted, strict=True)]))
    print(
        f"\n第一名对：简体的问题 {rows['plain']['recall_at_1']:.3f}，繁体 {rows['traditional']['recall_at_1']:.3f}，"
        f"转成简体再找 {rows['converted']['recall_at_1']:.3f}"
    )
    return rows


# ---------------------------------------------------------------- 3. 句向量


def sentence_vectors(corpus: Corpus, embedder: TransformerEmbedder | None, n: int) -> dict:
    """照 Sentence-BERT 的算法一步一步算，与 rag_common/embed.py、sentence-transformers 比；再把一步换错，看 R@1。"""
    if embedder is None:
        print("\n（句向量一节要一个模型，hashed 没有：跳过）")
        return {}
    chunks: dict[str, str] = {}  # 问题 → 有出处的那一块
    for chunk in cut(corpus, "sentences", 128):
        for question in corpus.questions[:n]:
            if chunk.document in question.gold and evidence(question) in squeezed(chunk.text):
                chunks.setdefault(question.text, chunk.text)
    if not chunks:
        print("\n（没有一题的出处完整地留在一块里，句向量一节跳过）")
        return {}
    questions, passages = list(chunks), list(chunks.values())
    different = list(dict.fromkeys(passages))
    gold = [different.index(text) for text in passages]
    asked = [embedder.query_prefix + text for text in questions]
    told = [embedder.passage_prefix + text for text in different]
    rows: dict = {"texts": len(different)}
    for name in POOLINGS:
        queries, documents = encode(embedder, asked, name), encode(embedder, told, name)
        first = (queries @ documents.T).argmax(1)
        rows[name] = {"recall_at_1": float(np.mean(first == np.array(gold)))}
        if name == "mean":
            rows["embedder_difference"] = float(np.abs(documents - embedder.passages(different)).max())
            peer = with_sentence_transformers(embedder, told)
            if peer is not None:
                rows["peer_difference"] = float(np.abs(documents - peer).max())
    table = [[f"句向量（{embedder.name}，{len(questions)} 题、{len(different)} 段里找）", "第一名对"]]
    print_table(table + [[label, f"{rows[name]['recall_at_1']:.3f}"] for name, label in POOLINGS.items()])
    peer = f"，与 sentence-transformers {rows['peer_difference']:.1e}" if "peer_difference" in rows else ""
    print(f"  照公式算的与 rag_common/embed.py 最多差 {rows['embedder_difference']:.1e}{peer}")
    return rows


# ---------------------------------------------------------------- 4. 质量检查


def monitor(corpus: Corpus, settings: PreprocessSettings) -> tuple[dict, dict]:
    """故意做坏一些，查一遍：每种毛病找回几成（召回），报的里面几成是做坏的（精确）。"""
    texts = {document.id: document.text for document in corpus.documents}
    spoiled, planted = plant(texts, settings.spoiled, settings.seed)
    found, before = find_faults(spoiled), find_faults(texts)
    rows: dict = {"kinds": {}}
    table = [
        [f"质量检查：{len(spoiled)} 篇，做坏了 {len(planted)} 篇", "精确", "召回", "冤枉几篇", "原来就有几篇"]
    ]
    for fault, label in FAULTS.items():
        bad = {name for name, kind in planted.items() if kind.startswith(fault)}
        caught = len(found[fault] & bad)
        # 没有做坏、原来也不报的，才是冤枉；做成乱码的没有句号，顺带报它太长，不算
        wrong = found[fault] - planted.keys() - before[fault]
        rows[fault] = {
            "planted": len(bad),
            "precision": caught / max(caught + len(wrong), 1),
            "recall": caught / max(len(bad), 1),
            "wrong": len(wrong),
            "already_there": len(before[fault]),
        }
        row = [f"{rows[fault][key]:.3f}" if bad else "—" for key in ("precision", "recall")]
        table.append([label, *row, len(wrong), len(before[fault])])
    print_table(table)
    shown = []
    for kind in dict.fromkeys(planted.values()):
        names = [name for name, each in planted.items() if each == kind]
        share = float(np.mean([name in found[kind.split(".")[0]] for name in names]))
        rows["kinds"][kind.replace(".", "_")] = share
        shown.append(f"{KINDS[kind]} {share:.2f}")
    print("  各种坏法的召回：" + "，".join(shown) + "\n  原来就有的，看 not_planted.json 里是不是真的有毛病")
    examples = {fault: {name: texts[name][:200] for name in sorted(before[fault])[:5]} for fault in FAULTS}
    return rows, examples


def drift(corpus: Corpus, seed: int) -> dict:
    """从前的是一半文档，新的一批从另一半里抽：没变的会不会误报，变了的报不报。"""
    rng = random.Random(f"batches-{seed}")
    texts = [document.text for document in corpus.documents]
    if len(texts) < 20:
        print(f"\n（只有 {len(texts)} 篇，分不出从前与新来的：不量漂移）\n")
        return {}
    rng.shuffle(texts)
    past, fresh = texts[: len(texts) // 2], texts[len(texts) // 2 :]
    size = min(BATCH, len(fresh))
    gauge = DriftGauge(past, size, seed)
    strangers = [document.text for document in tiny_world_corpus(size, 1, seed=seed).documents]
    rows = {}
    for name in ("same", *DRIFTS):
        alarms = 0
        for _ in range(NULL_BATCHES):
            batch = rng.sample(fresh, size)
            batch = batch if name == "same" else drifted(name, batch, strangers, rng)
            alarms += bool(gauge.alarms(batch))
        rows[name] = {"alarm_rate": alarms / NULL_BATCHES}
    print(f"\n一批 {size} 篇，报了警的批：没有变的 {rows['same']['alarm_rate']:.0%}；", end="")
    print("，".join(f"{DRIFTS[name]} {rows[name]['alarm_rate']:.0%}" for name in DRIFTS) + "\n")
    return rows


# ---------------------------------------------------------------- 5. 图


def draw(folder: Path, metrics: dict) -> None:
    english = {"fixed": "fixed", "default": "default", "chinese": "Chinese", "sentences": "sentences"}
    bars = {f"{CUTS[n]}|{english.get(n, n)}": row["kept"] for n, row in metrics["cuts"].items()}
    bar_chart(folder / "cuts.svg", {"出处完整|kept whole": bars}, "切法|How to cut", "", "", digits=3)
    sizes = [int(size) for size in metrics["shrink"]]
    lines = {}
    for key, label in (
        ("document_at_1", "第一块的文档对|right document"),
        ("evidence_at_1", "第一块里有完整的出处|evidence in the first chunk"),
        ("evidence_at_5", "前五块里有|evidence in the first five"),
    ):
        lines[label] = (sizes, [row[key] for row in metrics["shrink"].values()])
    line_chart(folder / "shrink.svg", lines, "块越小|Smaller chunks", "一块几个字|characters", "")


def main(argv: list[str] | None = None) -> dict:
    settings = parse_settings(PreprocessSettings, PRESETS, argv)
    settings.embedder = choose_embedder(settings.embedder)
    return run_lesson("data_preprocess", HOME, settings, learn)


if __name__ == "__main__":
    run_main(main)
