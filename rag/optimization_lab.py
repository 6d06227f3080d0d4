"""调优实验室：一次改一项，一项一行账，比不过目前最好的就不留下。

你会学到
  1. 指标照定义手写：找得到吗（R@1/5/10、MRR、nDCG）、给读者的几块好不好（context precision、context recall）、
     答得对吗（EM、F1）、有没有说材料里没有的话（faithfulness）。
  2. 一次改一项。同一批题上与目前最好的配对自助法（bootstrap）：95% 区间不含 0 才算更好，不然是运气。
  3. 许多"优化"没有用，有的有害：没有训练过的重排、切得太小、给得太多。账本里好的坏的都在。
  4. 试得多了，总有一个碰巧好：所以题分两半，一半用来挑，挑完了在另一半上量一次。

怎么运行
  python optimization_lab.py                                       # 内置的《人民日报》，十几个实验
  python optimization_lab.py --try "chunk=96 fusion=rrf"           # 在目前最好的上面改这几项，记一行
  python optimization_lab.py --dataset cmrc2018.jsonl              # 自己的题（每行 context、question、answers）
  python optimization_lab.py --generator smollm2 --try "reader=model prompt=terse"

应当看到（tiny，实测见本文件夹的 README.md）：R@1 几乎全是换掉按空白切词的那一行涨的；检索后面的改动多半说不上好坏，有的有害。

参考：Es et al. 2023（RAGAS 的几个指标，这里不用大模型当裁判，照字算）；Efron & Tibshirani 1993（bootstrap）。
"""

from nlp_common.base.cli import run_main

import dataclasses
import json
import os
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from filelock import FileLock
from tqdm import tqdm

from lab_picture import VERDICTS, draw_ledger
from lab_pipeline import Config, Lab, Outcome, changed, difference
from nlp_common.base.arguments import COUNT, option
from nlp_common.base.console import padded
from nlp_common.base.errors import UserError
from nlp_common.train.lesson import result_folder, run_lesson
from nlp_common.train.settings import LessonSettings, parse_settings
from nlp_common.train.stage import Stage
from rag_common.corpus import Corpus, Question, data_of, load_corpus
from rag_common.embed import choose_embedder
from rag_common.generate import load_generator
from rag_common.metrics import exact_match, f1, paired_bootstrap, retrieval_row, simplify
from rag_common.noise import to_traditional, typos

HOME = Path(__file__).resolve().parent
PRESETS = {"tiny": {"documents": 200, "questions": 240}, "full": {"documents": 5000, "questions": 1000}}
LEDGER = "ledger.jsonl"
COLUMNS = ("name", "config", "metrics", "verdict", "scores", "generator")  # 账本的一行至少有这几栏
# 名字、在目前最好的上面改什么。名字用在账本、README 的表里。
EXPERIMENTS = (
    ("word_pattern", "tokenizer=word_pattern"),
    ("characters", "tokenizer=characters_and_bigrams"),
    ("sentences", "splitter=sentences"),
    ("chunk_32", "chunk=32"),
    ("chunk_64", "chunk=64"),
    ("simplified", "rewrite=simplified"),
    ("dense", "fusion=dense"),
    ("rrf", "fusion=rrf"),
    ("weighted", "fusion=weighted"),
    ("rerank_random", "rerank=random"),
    ("rerank_aligner", "rerank=aligner"),
    ("k_1", "k=1"),
    ("k_10", "k=10"),
    ("clause", "reader=clause"),
    ("blank", "reader=blank"),
    ("chunk_128_again", "chunk=128"),  # 换了读者，前面的选择还对吗
)
SHOWN = {
    "recall_at_1": "R@1",
    "recall_at_5": "R@5",
    "mrr": "MRR",
    "context_precision": "块精确",
    "context_recall": "块召回",
    "exact_match": "EM",
    "f1": "F1",
    "faithfulness": "忠实",
}


@dataclass
class LabSettings(LessonSettings):
    NOT_IN_FINGERPRINT = LessonSettings.NOT_IN_FINGERPRINT | {"extra", "threads", "generator"}

    dataset: str = option("people_daily、文件夹，或 cmrc2018 那样的 json/jsonl 文件", "people_daily")
    documents: int | None = option("最多用多少段文档", limits=COUNT)
    questions: int | None = option("最多问多少题；一半用来挑，一半最后才用", limits=COUNT)
    noise: Literal["mixed", "none"] = option(
        "mixed：问题三分之一照原文、三分之一打错字、三分之一繁体", "mixed"
    )
    decide: Literal["f1", "exact_match", "recall_at_1", "mrr"] = option("按哪个指标决定留不留下", "f1")
    embedder: str = option("向量模型：auto（有 e5 就用 e5）、e5、hashed，或 hub 名、本地文件夹", "auto")
    generator: str | None = option('reader=model 用的模型：smollm2、hub 名、文件夹，或 "网址 模型名"')
    extra: str | None = option('结果已经有了，再试一种：例如 "chunk=96 fusion=rrf"', aliases=["--try"])
    threads: int = option("算向量用几个线程", 1, limits=COUNT)

    def check(self) -> None:
        if self.questions < 4:
            raise UserError(f"--questions 至少 4 题，一半用来挑，给的是 {self.questions}。")
        if self.extra is not None:
            wanted = changed(Config(), self.extra)  # 写错了马上就说
            if wanted.reader == "model" and not self.generator:
                raise UserError(
                    '--try 里的 reader=model 要说是哪个模型：加上 --generator smollm2、文件夹，或 "网址 模型名"。'
                )


# ---------------------------------------------------------------- 1. 从头到尾


def learn(stage: Stage) -> dict:
    lab, choosing, last = prepare(stage.settings)
    lab.embedder()  # 名字写错了，现在就说
    stage.folder.work.mkdir(parents=True, exist_ok=True)
    ledger = Ledger(stage.folder.work / LEDGER)
    if ledger.rows:
        print(f"接着上次的账本：已有 {len(ledger.rows)} 行")
    print_head(len(choosing))
    experiment(lab, ledger, "start", Config(), choosing, stage.settings)
    for name, change in tqdm(EXPERIMENTS, desc="实验", leave=False, disable=None):
        experiment(lab, ledger, name, changed(ledger.best_config(), change), choosing, stage.settings)
    held_out = last_check(lab, ledger, last, stage.settings)
    rows = {row["name"]: row for row in ledger.rows}
    metrics = {
        "experiments": {
            name: row["metrics"] | {"gain": row["gain"], "low": row["low"], "high": row["high"]}
            for name, row in rows.items()
        },
        "kept": len([row for row in ledger.rows if row["verdict"] == "better"]),
        "tried": len(ledger.rows) - 1,
        "held_out": held_out,
        "best": difference(ledger.best_config(), Config()) or "start",
    }

    def write(folder: Path) -> None:
        (folder / LEDGER).write_bytes(ledger.path.read_bytes())
        draw_ledger(folder / "progress.svg", ledger.rows, stage.settings.decide)

    return stage.save(
        metrics, {"dataset": {**lab.corpus.describe(), **data_of(stage.settings.dataset)}}, write
    )


def prepare(settings: LabSettings) -> tuple[Lab, list[Question], list[Question]]:
    """→ (实验室, 用来挑的一半题, 最后才用的一半)。"""
    corpus = load_corpus(settings.dataset, settings.documents, settings.questions, settings.seed)
    for note in corpus.notes:
        print(f"（{note}）")
    if settings.noise == "mixed":
        corpus = with_noise(corpus, settings.seed)
    questions = [question for question in corpus.questions if question.answer]
    if len(questions) < 4:
        raise UserError(f"{settings.dataset} 里有答案的题只有 {len(questions)} 道，至少要 4 道。")
    random.Random(f"halves-{settings.seed}").shuffle(questions)
    half = len(questions) // 2
    generator = load_generator(settings.generator) if settings.generator else None
    return Lab(corpus, settings.embedder, settings.threads, generator), questions[:half], questions[half:]


def with_noise(corpus: Corpus, seed: int) -> Corpus:
    """真的问题不会与文档一字不差：轮流照原文、打错字、写繁体。"""
    rng = random.Random(f"typos-{seed}")
    questions = []
    for number, question in enumerate(corpus.questions):
        text = (question.text, typos(question.text, rng), to_traditional(question.text))[number % 3]
        questions.append(dataclasses.replace(question, text=text))
    return Corpus(corpus.name, corpus.documents, questions, corpus.notes)


# ---------------------------------------------------------------- 2. 指标：一题一个数


def score(question: Question, outcome: Outcome) -> dict[str, float]:
    """一题的各项指标。"""
    golds = question.meta.get("answers") or [question.answer]
    ranks = retrieval_row([outcome.documents], [question.gold])
    ranks.pop("n")
    proof = question.meta.get("clause") or question.answer  # 答题要看到的原话
    useful = [c.document in question.gold and simplify(proof) in simplify(c.text) for c in outcome.contexts]
    texts = [chunk.text for chunk in outcome.contexts]
    return ranks | {
        "context_precision": context_precision(useful),
        "context_recall": share_found(proof, texts),
        "exact_match": exact_match(outcome.answer, golds),
        "f1": f1(outcome.answer, golds),
        "faithfulness": share_found(outcome.answer, texts),
    }


def context_precision(useful: list[bool]) -> float:
    """有用的块排得靠不靠前：在每个有用的块处算"到它为止有用的占几成"，平均。一块也没有用是 0。

    CP = Σ_i v_i · (v_1 + … + v_i)/i  ÷  Σ_i v_i，v_i 是第 i 块有没有完整的出处。
    """
    seen, total = 0, 0.0
    for place, each in enumerate(useful, 1):
        if each:
            seen += 1
            total += seen / place
    return total / seen if seen else 0.0


def share_found(text: str, contexts: list[str]) -> float:
    """text 的相邻两个字有几成在材料里：text 是出处就是 context recall，是回答就是 faithfulness。

    没有说话（空的回答）就没有说没根据的话，是 1。它只看字：材料里是"没有去过北京"，回答"去过北京"，它给满分。
    """
    wanted, given = pairs(text), set()
    for each in contexts:
        given |= pairs(each)
    return len(wanted & given) / len(wanted) if wanted else 1.0


def pairs(text: str) -> set[str]:
    """相邻两个字；只有一个字的就是它。标点空白不算。"""
    text = simplify(text)
    return {text[i : i + 2] for i in range(len(text) - 1)} or {text} - {""}


# ---------------------------------------------------------------- 3. 账本


class Ledger:
    """一行一个实验的 jsonl，只往后添；断在半路的最后一行不算，重做那一个。"""

    def __init__(self, path: Path):
        self.path, self.rows = path, []
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
        for number, line in enumerate(lines, 1):
            if number == len(lines) and not line.endswith("\n"):
                path.write_text("".join(lines[:-1]), encoding="utf-8")
                break
            try:
                row = json.loads(line)
                whole = isinstance(row, dict) and row.keys() >= set(COLUMNS)
            except ValueError:
                whole = False
            if not whole:
                raise UserError(f"{path} 第 {number} 行不是这里记的一行账：改回去，或用 --retrain 重做。")
            self.rows.append(row)

    def append(self, row: dict) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.rows.append(row)

    def best(self) -> dict | None:
        """目前最好的一行：开始的一行，或后来判为更好的最后一行。"""
        kept = [row for row in self.rows if row["verdict"] in ("start", "better")]
        return kept[-1] if kept else None

    def best_config(self) -> Config:
        best = self.best()
        return Config(**best["config"]) if best else Config()

    def find(self, config: Config, generator: str | None) -> dict | None:
        """做过的一样的实验；用模型答的，还要是同一个模型。"""
        for row in self.rows:
            same_model = config.reader != "model" or row["generator"] == generator
            if row["config"] == dataclasses.asdict(config) and same_model:
                return row
        return None


def experiment(
    lab: Lab, ledger: Ledger, name: str, config: Config, questions: list[Question], settings: LabSettings
) -> dict:
    """做一个实验，记一行；账本里已有名字相同的（上次做完的）就不再做。"""
    done = next((row for row in ledger.rows if row["name"] == name), None)
    if done is None:
        started, best = time.perf_counter(), ledger.best()
        scores = [score(q, o) for q, o in zip(questions, lab.run(config, questions), strict=True)]
        mine = [each[settings.decide] for each in scores]
        theirs = best["scores"] if best else mine
        gain, low, high = paired_bootstrap(mine, theirs, seed=settings.seed)
        done = {
            "name": name,
            "change": difference(config, Config(**best["config"])) if best else "",
            "against": best["name"] if best else "",
            "config": dataclasses.asdict(config),
            "generator": settings.generator if config.reader == "model" else None,
            "metrics": average(scores),
            "gain": gain,
            "low": low,
            "high": high,
            "verdict": verdict(low, high) if best else "start",
            "seconds": round(time.perf_counter() - started, 2),
            "scores": [round(value, 6) for value in mine],  # 以后的实验要一题一题地比
        }
        ledger.append(done)
    print_row(done)
    return done


def verdict(low: float, high: float) -> str:
    """区间全在 0 上面是更好；全在下面是更差；含着 0，说不上。说不上的不留下：简单的那个好。"""
    return "better" if low > 0 else "worse" if high < 0 else "unsure"


def average(scores: list[dict[str, float]]) -> dict[str, float]:
    return {name: sum(each[name] for each in scores) / len(scores) for name in scores[0]}


def last_check(lab: Lab, ledger: Ledger, questions: list[Question], settings: LabSettings) -> dict:
    """在没用过的一半题上，最好的比开始的好多少：挑的时候沾的光，这里没有。"""
    both = []
    for config in (Config(), ledger.best_config()):
        both.append([score(q, o) for q, o in zip(questions, lab.run(config, questions), strict=True)])
    start, best = ([each[settings.decide] for each in scores] for scores in both)
    gain, low, high = paired_bootstrap(best, start, seed=settings.seed)
    chosen = ledger.best()["metrics"][settings.decide]
    print(
        f"\n没用过的 {len(questions)} 题：{settings.decide} 开始 {sum(start) / len(start):.3f}，最好的 {sum(best) / len(best):.3f}"
        f"（多 {gain:+.3f}，95% 区间 {low:+.3f} 到 {high:+.3f}）；挑的时候看到的是 {chosen:.3f}\n"
    )
    return {"start": average(both[0]), "best": average(both[1]), "gain": gain, "low": low, "high": high}


# ---------------------------------------------------------------- 4. 自己的实验


def try_one(folder: Path, settings: LabSettings) -> dict:
    """在目前最好的上面改 --try 的几项，记进已有结果的账本。"""
    with FileLock(folder.with_name(f".{folder.name}.ledger.lock")):
        ledger = Ledger(folder / LEDGER)
        config = changed(ledger.best_config(), settings.extra)
        same = ledger.find(config, settings.generator)
        if same:
            print(f"\n账本里已有一样的（{same['name']}），不再做：")
            print_head(len(same["scores"]))
            print_row(same)
            return same
        lab, choosing, _ = prepare(settings)
        print_head(len(choosing))
        print_row(ledger.best())
        name = f"try_{sum(row['name'].startswith('try_') for row in ledger.rows) + 1}"
        row = experiment(lab, ledger, name, config, choosing, settings)
        draw_ledger(folder / "progress.svg", ledger.rows, settings.decide)
        print(f"\n记进 {folder / LEDGER}，图是 progress.svg")
        return row


# ---------------------------------------------------------------- 5. 看


def print_head(n: int) -> None:
    names = "".join(padded(name, 8, right=True) for name in SHOWN.values())
    print("\n" + padded(f"{n} 题", 42) + names + "　比目前最好的（95% 区间）")


def print_row(row: dict) -> None:
    shown = "开始" if row["verdict"] == "start" else "（与目前最好的相同）"
    numbers = "".join(f"{row['metrics'][name]:>8.3f}" for name in SHOWN)
    compared = (
        "" if row["verdict"] == "start" else f"{row['gain']:+.3f}（{row['low']:+.3f} 到 {row['high']:+.3f}）"
    )
    label = padded(f"  {row['change'] or shown}", 42)
    tqdm.write(f"{label}{numbers}　{compared}{VERDICTS[row['verdict']]}")


def main(argv: list[str] | None = None) -> dict:
    settings = parse_settings(LabSettings, PRESETS, argv)
    settings.embedder = choose_embedder(settings.embedder)
    record = run_lesson("optimization_lab", HOME, settings, learn)
    if settings.extra is not None:
        return try_one(result_folder("optimization_lab", HOME, settings), settings)
    return record


if __name__ == "__main__":
    run_main(main)
