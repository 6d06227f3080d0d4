"""数据清洗：SFT 的对话与偏好对，一步一步地查，每一步查准、查全几成；清洗了，训练出来的模型好多少。

你会学到
  1. 次序：先盖住个人信息（后面的文件里都不再有），再丢垃圾、别的语言、重复、评测的题，最后才用模型找标错的。
  2. 看文字查得出的查得又准又便宜；答错的、好坏标反的，文字上看不出，要让没见过这一行的模型来看（交叉验证）。
  3. 清洗也会伤数据：寒暄本来就都一样，去重把它删光，模型就不会寒暄了。所以清洗前后，各种题要各数一遍。
  4. 同样多的行，干净的比随便留下的好；数据少了两成，模型反而更好。

怎么运行
  python dataset_curation.py                               # 埋了两成毛病的小世界，约三分钟
  python dataset_curation.py --dataset 我的数据.jsonl --output_dir outputs/mine     # 自己的对话或偏好对，只清洗
  python dataset_curation.py --dataset 我的数据.jsonl --eval_files 评测.jsonl,ceval文件夹 --model 模型 --output_dir outputs/mine
  python dataset_curation.py --dataset 很大.jsonl --stream true --output_dir outputs/big   # 比内存还大：一块一块地读

应当看到（tiny，实测见本文件夹的 README.md）：看文字的几步几乎全查出来、不冤枉；答错的、标反的查出大半；
清洗过的 preferred_rate 最高，随便丢同样多的没有用。结果文件夹里有审计页 audit.html、数据卡 dataset_card.md、
清洗好的 chats.jsonl、pairs.jsonl，丢掉的每一行与原因 dropped.jsonl。

参考：Lee et al. 2022（去重）；Northcutt et al. 2021（Confident Learning）；Zhou et al. 2023（LIMA，少而好）。
"""

from nlp_common.base.cli import run_main

import random
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np

from audit_page import card, draw, page
from curation_report import compare_arms, count_curation, precision_recall, show
from curation_rows import (
    STEPS,
    Table,
    drop_contaminated,
    drop_duplicates,
    drop_garbage,
    drop_other_languages,
    evaluation_texts,
    mask_personal,
    mixed_note,
    read_table,
)
from curation_stream import curate_file
from data_bias import biased_annotators, coverage, length_bias, position_bias
from label_errors import Doubt, answer_doubts, flipped_pairs, fold_of, pair_margins
from nlp_common.base.arguments import COUNT, SHARE, Limits, option
from nlp_common.base.errors import UserError
from nlp_common.base.runs import write_text
from nlp_common.data.rows import check_path, data_sha256
from nlp_common.lm.loading import end_chat_turns, load_causal_lm, load_chat_lm, make_fast
from nlp_common.tiny import world
from nlp_common.tiny.judge import judge, measure_chat
from nlp_common.train.chain import chain_model
from nlp_common.train.lesson import run_lesson, run_part
from nlp_common.train.settings import LoopSettings, parse_settings
from nlp_common.train.sft import train_on_chats
from nlp_common.train.splits import EVAL_SEED
from nlp_common.train.stage import Stage
from planted_data import planted_chats, planted_pairs
from stages import run_stage, write_rows

HOME = Path(__file__).resolve().parent
LEAKED_SEED = 9  # 混进数据里的评测题；量模型用的是另一些题（EVAL_SEED）
MOST_WRONG = 0.3  # 疑心的行超过这么多，是模型判不了
ARMS = {"raw": "原样|raw", "curated": "清洗过|curated", "random": "随便丢同样多|random"}
PRESETS = {
    "tiny": {"max_length": 256, "per_device_train_batch_size": 8, "learning_rate": 2e-3, "adam_beta2": 0.98,
             "n_chats": 6000, "n_pairs": 3000, "folds": 3, "beta": 0.3, "max_eval_samples": 500},
    "full": {"max_length": 1024, "per_device_train_batch_size": 4, "learning_rate": 1e-5,
             "n_chats": 6000, "n_pairs": 3000, "folds": 4, "beta": 0.1, "max_eval_samples": 500},
}  # fmt: skip


@dataclass
class CurationSettings(LoopSettings):
    COMMON: ClassVar[dict] = LoopSettings.COMMON | {"save_steps": 10_000}

    dataset: str | None = option("自己的数据：对话或偏好对，写法同 SFT、DPO；没给就是埋了毛病的小世界")
    model: str | None = option("找标错的用哪个模型；自己的数据没给它，就不找标错的")
    source: Literal["hf", "modelscope"] = option("hub 名从哪里下载", "hf")
    eval_files: str | None = option("评测的文件，逗号隔开：它们的题不许混在数据里")
    languages: str = option("留下哪些语言，逗号隔开：zh、zh-hant、en、ja、ko、ru", "zh")
    threshold: float = option("近重复：5 个字一组的 Jaccard 不小于它", 0.7, Limits(above=0, at_most=1))
    short_copies: int = option("短的行（不到 40 个字，多是寒暄）一样的留几份", 100, COUNT)
    overlap: float = option("评测的题：一行盖住一道题的几成算混进来", 0.8, SHARE)
    doubt: float = option("答错的：模型对别的词比对写着的多几成把握才算", 0.75, SHARE)
    folds: int | None = option("交叉验证分几份", limits=Limits(at_least=2))
    beta: float | None = option("交叉验证里 DPO 的 β")
    n_chats: int | None = option("小世界：几段对话", limits=Limits(at_least=100))
    n_pairs: int | None = option("小世界：几个偏好对", limits=Limits(at_least=100))
    max_eval_samples: int | None = option("小世界：量模型用几道题", limits=COUNT)
    stream: bool = option("自己的数据放不进内存：一块一块地读，只做看文字的几步", False)
    memory_mb: int = option("--stream 去重时最多用多少 MB 内存", 256, Limits(at_least=16))
    compare: bool = option("小世界：用原样的、清洗过的、随便丢同样多的各训练一遍", True)

    def check(self) -> None:
        known = {"zh", "zh-hant", "en", "ja", "ko", "ru"}
        if unknown := [each for each in self.languages.split(",") if each not in known]:
            raise UserError(
                f"--languages 不认识 {unknown[0] or '空的一项'}，可以是 zh、zh-hant、en、ja、ko、ru，逗号隔开。"
            )
        if self.stream and (not self.dataset or self.model):
            raise UserError("--stream 要给 --dataset，不给 --model：一块一块地读，只做看文字的几步。")
        for file in (self.eval_files or "").split(",") if self.eval_files else ():
            check_path(file, "--eval_files")


# ---------------------------------------------------------------- 1. 从头到尾


def curate(stage: Stage, start: str | None) -> dict:
    settings = stage.settings
    if settings.stream:
        return curate_file(stage, asked_in(settings))
    tables, asked = load(settings)
    for table in tables.values():
        clean_text(table, asked, settings)
    models: dict = {}
    arms = settings.compare and not settings.dataset
    if "chats" in tables:
        if start:
            drop_wrong_answers(stage, tables["chats"], start)
        if arms:
            models["sft"] = train_arms(stage, "sft", tables["chats"], dict.fromkeys(ARMS, start))
    if "pairs" in tables:
        if start:
            drop_flipped(stage, tables["pairs"], chat_model(stage, start, arms))
        if arms:
            starts = {arm: arm_folder(stage, "sft", arm) for arm in ARMS}
            models["dpo"] = train_arms(stage, "dpo", tables["pairs"], starts)
    metrics = summarize(tables, models, settings)

    def write(folder: Path) -> None:
        for name, table in tables.items():
            write_rows(folder / f"{name}.jsonl", table.curated())
        write_rows(folder / "dropped.jsonl", [row for table in tables.values() for row in table.dropped])
        draw(folder, tables, metrics)
        write_text(folder / "audit.html", page(tables, metrics))
        write_text(folder / "dataset_card.md", card(tables, metrics, settings))

    return stage.save(metrics, {name: table.source for name, table in tables.items()}, write)


def chat_model(stage: Stage, start: str, arms: bool) -> str:
    """DPO 从哪个模型开始：刚在清洗过的对话上练好的；没有练，就是 --model 给的，小世界里是链上的 SFT 模型。"""
    if arms:
        return arm_folder(stage, "sft", "curated")
    return start if stage.settings.model else chain_model("sft")["path"]


def load(settings: CurationSettings) -> tuple[dict[str, Table], dict[str, str]]:
    """→ ({"chats"、"pairs": 数据}, {评测的题: 文字})。"""
    if settings.dataset:
        table = read_table(settings.dataset, settings.max_train_samples, settings.source)
        return {table.name: table}, asked_in(settings)
    questions = world.heldout_questions(200, LEAKED_SEED)
    tables = {}
    for name, plant, n in (
        ("chats", planted_chats, settings.n_chats),
        ("pairs", planted_pairs, settings.n_pairs),
    ):
        planted = plant(n, settings.seed, questions)
        tables[name] = Table(
            name, planted.rows, {"name": "tiny_world + 埋的毛病", "kind": "builtin", "rows": n}, planted
        )
    texts = {f"第 {number + 1} 题": asked_text(each) for number, each in enumerate(questions)}
    return tables, texts


def asked_in(settings: CurationSettings) -> dict[str, str]:
    return evaluation_texts(settings.eval_files.split(",")) if settings.eval_files else {}


def asked_text(question: dict) -> str:
    return "\n".join(turn["content"] for turn in question["messages"] if turn["role"] == "user")


def clean_text(table: Table, asked: dict[str, str], settings: CurationSettings) -> None:
    """看文字的几步；个人信息最先盖住。"""
    mask_personal(table)
    drop_garbage(table)
    if mixed := drop_other_languages(table, tuple(settings.languages.split(","))):
        table.notes.append(mixed_note(mixed))
        print(table.notes[-1])
    drop_duplicates(table, settings.threshold, settings.short_copies)
    if asked:
        drop_contaminated(table, asked, n=13, at_least=settings.overlap)
    if not table.alive:
        counts = "、".join(
            f"{reason} {n} 行" for step in table.steps for reason, n in step["reasons"].items()
        )
        raise UserError(
            f"清洗以后一行也没有留下（{counts}）：要别的语言用 --languages，别的请看看数据是不是给错了。"
        )


# ---------------------------------------------------------------- 2. 用没见过这一行的模型找标错的


def drop_wrong_answers(stage: Stage, table: Table, start: str) -> None:
    """交叉验证：轮流拿出一份，在其余的上面训练 start，看拿出来的各行里有没有模型拿得准不该这样写的词。"""
    settings, rows = stage.settings, table.curated()
    if len(rows) < 2 * settings.folds:
        raise UserError(
            f"只剩 {len(rows)} 行，分成 {settings.folds} 份太少，找不了标错的：去掉 --model，只做看文字的几步。"
        )
    which = fold_of(len(rows), settings.folds, settings.seed)
    doubts: dict[int, Doubt] = {}
    for fold in range(settings.folds):
        work = partial(doubts_of_fold, rows=rows, which=which, fold=fold, start=start)
        found = run_part(stage, f"chats_fold_{fold}", work)["doubts"]
        doubts |= {int(place): Doubt(*each) for place, each in found.items()}
    reasons = {}
    for place, number in enumerate(table.alive):
        doubt = doubts[place]
        if doubt.margin < -settings.doubt and number not in table.masked:  # 盖过的行，记号总是出人意料的
            reasons[number] = (
                f"答错：写着“{doubt.said}”，模型想写“{doubt.would_say}”（余地 {doubt.margin:.2f}）"
            )
    for place, number in enumerate(table.alive):
        table.margins[number], table.log_ratios[number] = doubts[place].margin, doubts[place].log_ratio
    drop_if_sane(table, "wrong_answer", reasons)


def doubts_of_fold(part: Stage, rows: list[dict], which: np.ndarray, fold: int, start: str) -> dict:
    tokenizer, model = load_causal_lm(start)
    end_chat_turns(model, tokenizer)
    model = make_fast(model.to(part.device))
    train_on_chats(
        part, f"交叉验证 {fold + 1}", model, tokenizer, [rows[i] for i in np.flatnonzero(which != fold)]
    )
    held = np.flatnonzero(which == fold)
    doubts = answer_doubts(model, tokenizer, [rows[i] for i in held])
    return {"doubts": {int(i): list(doubt) for i, doubt in zip(held, doubts, strict=True)}}


def drop_flipped(stage: Stage, table: Table, start: str) -> None:
    """交叉验证：DPO 在别的份上训练，看它同不同意这一份标的次序。"""
    settings, rows = stage.settings, table.curated()
    if len(rows) < 2 * settings.folds:
        raise UserError(
            f"只剩 {len(rows)} 行，分成 {settings.folds} 份太少，找不了标错的：去掉 --model，只做看文字的几步。"
        )
    which = fold_of(len(rows), settings.folds, settings.seed)
    margins = np.zeros(len(rows))
    for fold in range(settings.folds):
        work = partial(margins_of_fold, rows=rows, which=which, fold=fold, start=start)
        margins[which == fold] = run_part(stage, f"pairs_fold_{fold}", work)["margins"]
    # 没有记下先看的是哪一个，就随便排：confident learning 要两类都有
    shown = [
        row.get("shown_first") or random.Random(place).choice(["chosen", "rejected"])
        for place, row in enumerate(rows)
    ]
    flipped = flipped_pairs(margins, np.array([each == "chosen" for each in shown]))
    table.margins = dict(zip(table.alive, margins.tolist(), strict=True))
    reasons = {
        number: f"标反：模型更喜欢标为差的（margin {margins[place]:.2f}）"
        for place, number in enumerate(table.alive)
        if flipped[place]
    }
    drop_if_sane(table, "flipped", reasons)


def drop_if_sane(table: Table, step: str, reasons: dict[int, str]) -> None:
    """查出太多，多半不是数据坏，是模型不认得这样的数据：它判不了，一行也不丢，说出来。"""
    if len(reasons) > MOST_WRONG * len(table.alive):
        table.notes.append(
            f"{STEPS[step][0]}：{len(table.alive)} 行里模型疑心 {len(reasons)} 行，太多了，多半是它还不会这样的题；一行也没有丢。"
            "换一个学过这类数据的 --model，或多给些行。"
        )
        print(table.notes[-1])
        reasons = {}
    table.drop(step, reasons)


def margins_of_fold(part: Stage, rows: list[dict], which: np.ndarray, fold: int, start: str) -> dict:
    settings = part.settings
    folder = part.folder.work / "pairs"
    write_rows(folder / f"{fold}.jsonl", [rows[i] for i in np.flatnonzero(which != fold)])
    run_stage("dpo", folder / f"dpo_{fold}", start, folder / f"{fold}.jsonl", stage_preset(settings),
              seed=settings.seed, beta=settings.beta, max_length=settings.max_length, max_eval_samples=20)  # fmt: skip
    tokenizer, model = load_chat_lm(str(folder / f"dpo_{fold}"), part.device)
    _, reference = load_chat_lm(start, part.device)
    held = [rows[i] for i in np.flatnonzero(which == fold)]
    return {"margins": pair_margins(model, reference, tokenizer, held, settings.beta).tolist()}


# ---------------------------------------------------------------- 3. 清洗值多少：三份数据各训练一遍


def train_arms(stage: Stage, kind: str, table: Table, starts: dict[str, str]) -> dict[str, dict]:
    """原样的、清洗过的、从原样里随便留同样多的：同样的起点、同样的设置 → {哪一份: 指标}。"""
    curated = table.curated()
    chosen = sorted(random.Random(f"arm-{stage.settings.seed}").sample(range(len(table.raw)), len(curated)))
    rows = {"raw": table.raw, "curated": curated, "random": [table.raw[i] for i in chosen]}
    found = {}
    for arm, title in ARMS.items():
        print(f"{kind.upper()}：{title.split('|')[0]}，{len(rows[arm])} 行 …", flush=True)
        work = partial(
            train_arm, kind=kind, rows=rows[arm], start=starts[arm], out=Path(arm_folder(stage, kind, arm))
        )
        found[arm] = run_part(stage, f"{kind}_{arm}", work)
    return found


def train_arm(part: Stage, kind: str, rows: list[dict], start: str, out: Path) -> dict:
    """训练一个，在没有混进数据的题上量；scores 是每道题采样的回答好不好。"""
    settings = part.settings
    write_rows(out.with_suffix(".jsonl"), rows)
    run_stage(
        kind,
        out,
        start,
        out.with_suffix(".jsonl"),
        stage_preset(settings),
        seed=settings.seed,
        max_eval_samples=20,
    )
    tokenizer, model = load_chat_lm(str(out), part.device)
    questions = world.heldout_questions(settings.max_eval_samples, EVAL_SEED)
    metrics, _, sampled = measure_chat(model, tokenizer, questions)
    scores = [
        float(judge(q, r["text"], r["ended"]).preferred) for q, r in zip(questions, sampled, strict=True)
    ]
    return metrics | {"scores": scores, "rows": len(rows)}


def stage_preset(settings: CurationSettings) -> str:
    """链上的小模型总用 tiny 的学习率；自己给的模型用这次的预设。"""
    return settings.preset if settings.model else "tiny"


def arm_folder(stage: Stage, kind: str, arm: str) -> str:
    return str(stage.folder.work / "arms" / f"{kind}_{arm}")


# ---------------------------------------------------------------- 4. 数一数


def summarize(tables: dict[str, Table], models: dict, settings: CurationSettings) -> dict:
    metrics: dict = {}
    if not settings.dataset:
        metrics |= precision_recall(tables)
    if models:
        metrics |= compare_arms(models, settings.seed)
    for name, table in tables.items():
        metrics[name] = count_curation(table) | {"coverage": coverage(table.raw, table.curated())}
    if "pairs" in tables:
        raw, curated = tables["pairs"].raw, tables["pairs"].curated()
        metrics["bias"] = {
            when: {
                "length": length_bias(rows),
                "position": position_bias(rows),
                "annotators": biased_annotators(rows),
            }
            for when, rows in (("raw", raw), ("curated", curated))
        }
    return metrics


def main(argv: list[str] | None = None) -> dict:
    settings = parse_settings(CurationSettings, PRESETS, argv)
    found = None
    if settings.model or not settings.dataset:
        found = chain_model("pretrain", settings.model, settings.source)
    elif settings.dataset:
        print("没有给 --model：只做看文字的几步，不找标错的。")
    work = partial(curate, start=found["path"] if found else None)
    files = (settings.eval_files or "").split(",")
    more = {"eval_sha256": [data_sha256(file) for file in files if file]}
    record = run_lesson(
        "dataset_curation", HOME, settings, work, start=found["id"] if found else None, **more
    )
    show(record["metrics"])
    return record


if __name__ == "__main__":
    run_main(main)
