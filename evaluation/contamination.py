"""题目泄漏：评测的题有没有混进训练数据。查 n 元组，一道一道地报告；再看泄漏了，分数会虚高多少。

你会学到
  1. 分数高，可能只是背过题：同一个模型，泄漏的题多半对，没泄漏的和瞎猜一样，平均起来像是"会了一些"。
  2. 怎样查：题目的每 n 个连着的字，在不在训练数据的同一行里；盖住题目的几成，连着最长多少字。
  3. 查得到什么：原样的、改了标点与全半角的都查得到；换了说法的查不到，分数照样虚高。
  4. 线画在哪里：太松，同一个模子里出来的题都算泄漏；太严，抄了一半的就漏掉。

怎么运行
  python contamination.py                                             # 自带的题：埋进训练数据，查出来，再训练一遍看分数
  python contamination.py --questions 题.csv --train 训练数据.jsonl     # 只查：每道题一行；题、数据的写法见 benchmarks_mc.py
  python contamination.py --questions ceval/val --train 语料文件夹 --n 13

应当看到（tiny，实测见本文件夹的 README.md）：原样埋的一道不漏，没埋的不冤枉；训练以后泄漏的题对得多，没泄漏的一点没长。

参考：Brown et al. 2020（GPT-3 附录 C，13 元组）；Touvron et al. 2023（Llama 2，按盖住的 token 算）；Yang et al. 2023（换说法躲得过）。
"""

from nlp_common.base.cli import run_main

import json
import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from answering import find_answerer
from mc_prompts import WORDINGS, text_ask
from mc_questions import Question, load_questions
from mc_score import log_likelihoods
from nlp_common.base.arguments import COUNT, SHARE, Limits, option
from nlp_common.base.errors import UserError
from nlp_common.base.intervals import mean_interval, proportion_interval
from nlp_common.data.files import read_file, row_place
from nlp_common.data.overlap import (
    AT_LEAST,
    SHORTEST,
    N,
    Overlap,
    lines_in,
    overlaps,
    strings_in,
)
from nlp_common.draw.plots import bar_chart
from nlp_common.lm.loading import load_chat_lm
from nlp_common.tiny import world
from nlp_common.train.lesson import run_lesson
from nlp_common.train.settings import LoopSettings, parse_settings
from nlp_common.train.sft import train_on_chats
from nlp_common.train.stage import Stage
from results import item, write_result

HOME = Path(__file__).resolve().parent
PRESETS = {
    "tiny": {"max_train_samples": 400, "learning_rate": 3e-3, "num_train_epochs": 3.0},
    "full": {"max_train_samples": 4000, "learning_rate": 3e-3, "num_train_epochs": 3.0},
}


@dataclass
class LeakSettings(LoopSettings):
    COMMON: ClassVar[dict] = LoopSettings.COMMON | {
        "per_device_train_batch_size": 16,
        "adam_beta2": 0.98,
        "max_length": 512,
    }
    model: str = option("课上：从哪个模型开始训练，写法同 --models", "sft")
    questions: str | None = option("只查：题目的文件、文件夹，或 knowledge_zh、knowledge_en")
    train: str | None = option("只查：训练数据的文件或文件夹（json、jsonl、csv、tsv、parquet、txt）")
    n: int = option("几个字一组", N, Limits(at_least=2))
    at_least: float = option("盖住题目的几成算泄漏", AT_LEAST, SHARE)
    leaked: int = option("课上：埋几道题", 80, Limits(at_least=4))
    copies: int = option("课上：埋的题在训练数据里各出现几次", 12, COUNT)

    def check(self) -> None:
        if bool(self.questions) != bool(self.train):
            raise UserError("--questions 与 --train 要一起给：查哪些题，在哪些训练数据里；都不给就上课。")


# ---------------------------------------------------------------- 1. 查


def check_questions(
    texts: dict[str, str], train: str, n: int = N, at_least: float = AT_LEAST
) -> dict[str, Overlap]:
    """每道题（编号 → 文字）在训练数据 train（文件或文件夹）里有没有，并印出有的那些。别的脚本也用它。"""
    found = overlaps(texts, lines_in(train), n, at_least)
    report(texts, found, train, n, at_least)
    return found


def report(texts: dict[str, str], found: dict[str, Overlap], train: str, n: int, at_least: float) -> None:
    leaked = {name: each for name, each in found.items() if each.found}
    share = proportion_interval(len(leaked), len(found))
    print(
        f"{len(found)} 道题，在 {train} 里查到 {len(leaked)} 道（盖住 {at_least:.0%} 以上，{n} 个字一组）：{share.text()}"
    )
    for name, each in sorted(leaked.items(), key=lambda pair: -pair[1].share)[:20]:
        file, _, index = each.place.rpartition("|")
        where = f"{Path(file).name} {row_place(Path(file), int(index))}" if file else each.place
        text = " ".join(texts[name].split())
        print(f"  {name}  盖住 {each.share:.0%}，连着 {each.longest} 个字  {where}  {text[:30]}")
    if len(leaked) > 20:
        print(f"  …… 还有 {len(leaked) - 20} 道")
    if short := [name for name, each in found.items() if not each.checked]:
        print(f"  {len(short)} 道题不到 {SHORTEST} 个字，查不准，没有查：{'、'.join(short[:5])}")


# ---------------------------------------------------------------- 2. 课：埋进去，查出来


KINDS = {
    "verbatim": "原样|verbatim",
    "punctuation": "改了标点、全半角|other punctuation",
    "half": "只抄了前一半|first half only",
    "reworded": "换了说法|reworded",
}


def planted(question: Question, kind: str, reworded: dict[str, str]) -> str:
    """题目埋进训练数据时的样子。"""
    if kind == "verbatim":
        return question.text
    if kind == "punctuation":  # 标点换成半角的，字与字之间添上空格
        text = question.text.translate(str.maketrans("，？：“”《》", ',?:""<>'))
        return " ".join(re.findall(r"[a-zA-Z0-9]+|\S", text)).upper()
    if kind == "half":
        return question.text[: len(question.text) // 2] + "……"
    return reworded[question.text]


def plant(questions: list[Question], count: int, seed: int) -> tuple[dict[str, str], list[dict]]:
    """→ ({题的编号: 怎样埋的}, 埋进训练数据的对话)；四种样子一样多，换说法的是人写好的（reworded_zh.jsonl）。"""
    reworded = {row["question"]: row["reworded"] for row in read_file(HOME / "reworded_zh.jsonl")}
    others = [each for each in questions if each.text not in reworded]
    chosen = [each for each in questions if each.text in reworded][: count // 4]
    random.Random(f"leak-{seed}").shuffle(others)
    kinds, chats = {}, []
    for place, question in enumerate([*others[: count - len(chosen)], *chosen]):
        kind = "reworded" if question in chosen else list(KINDS)[place % 3]
        kinds[question.id] = kind
        text = planted(question, kind, reworded)
        chats.append({"messages": _qa(text, question.options[question.answer])})
    return kinds, chats


def _qa(question: str, answer: str) -> list[dict]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def detection(questions: list[Question], kinds: dict[str, str], chats: list[dict]) -> dict:
    """各种 n、各条线：每种埋法查到几成，没埋的冤枉几成。"""
    texts = {each.id: each.text for each in questions}
    rows = [("训练数据", "\n".join(strings_in(chat))) for chat in chats]
    table = {}
    for n in (5, 8, 13):
        found = overlaps(texts, iter(rows), n)
        for line in (0.3, 0.7, 1.0):
            hits = {name for name, each in found.items() if each.share >= line}
            scores = {}
            for kind in KINDS:
                ids = [name for name, its in kinds.items() if its == kind]
                scores[kind] = len(hits & set(ids)) / len(ids)
            clean = [each.id for each in questions if each.id not in kinds]
            table[f"n{n}_at{line:.1f}"] = scores | {"false_alarms": len(hits & set(clean)) / len(clean)}
    return table


# ---------------------------------------------------------------- 3. 课：泄漏了，分数虚高多少


def right_answers(model, tokenizer, questions: list[Question]) -> dict[str, float]:
    """按全文选，每道题对不对。"""
    asks = [text_ask(tokenizer, each, [], WORDINGS["zh"], chat=True) for each in questions]
    found = log_likelihoods(model.eval(), tokenizer, asks)
    return {
        each.id: float(logps.index(max(logps)) == each.answer)
        for each, logps in zip(questions, found, strict=True)
    }


def learn(stage: Stage, path: str) -> dict:
    settings: LeakSettings = stage.settings
    questions, _ = load_questions("knowledge_zh", settings.seed)
    if settings.leaked > len(questions) - 20:
        raise UserError(
            f"--leaked 至多 {len(questions) - 20}（共 {len(questions)} 道）：要留下没埋的题来比。"
        )
    kinds, leaks = plant(questions, settings.leaked, settings.seed)
    chats = world.chats(settings.max_train_samples, settings.seed)
    found = overlaps(
        {each.id: each.text for each in questions},
        ((f"第 {i + 1} 行", "\n".join(strings_in(chat))) for i, chat in enumerate(chats + leaks)),
        settings.n,
        settings.at_least,
    )
    metrics: dict = {
        "n": len(questions),
        "planted": len(kinds),
        "detection": detection(questions, kinds, chats + leaks),
    }
    print(
        f"{len(questions)} 道题里埋了 {len(kinds)} 道；{settings.n} 个字一组，盖住 {settings.at_least:.0%} 算泄漏："
    )
    for kind, label in KINDS.items():
        ids = [name for name, its in kinds.items() if its == kind]
        hits = sum(found[name].found for name in ids)
        metrics[f"recall_{kind}"] = hits / len(ids)
        print(f"  {label.split('|')[0]:<12}{len(ids)} 道，查到 {hits} 道")
    clean = [each.id for each in questions if each.id not in kinds]
    metrics["false_alarms"] = sum(found[name].found for name in clean) / len(clean)
    print(f"  没埋的 {len(clean)} 道，冤枉 {sum(found[name].found for name in clean)} 道")

    tokenizer, model = load_chat_lm(path, stage.device)
    before = right_answers(model, tokenizer, questions)
    model.requires_grad_(True)
    train_on_chats(stage, "带着泄漏的题训练", model, tokenizer, chats + settings.copies * leaks)
    after = right_answers(model, tokenizer, questions)
    groups = {"all": list(before), "clean": clean}
    groups |= {kind: [name for name, its in kinds.items() if its == kind] for kind in KINDS}
    accuracy: dict[str, float] = {}
    metrics["accuracy"] = accuracy
    print("\n按全文选，答对：             训练前                       训练后")
    for group, names in groups.items():
        scores = [mean_interval([table[name] for name in names], settings.seed) for table in (before, after)]
        for suffix, score in zip(("_before", ""), scores, strict=True):
            name = f"{group}{suffix}"
            accuracy |= {name: score.value, f"{name}_low": score.low, f"{name}_high": score.high}
        shown = {"all": "全部的题", "clean": "没泄漏的"}.get(group) or KINDS[group].split("|")[0]
        print(f"  {shown:<14}{scores[0].text()}    {scores[1].text()}")

    def write(folder: Path) -> None:
        items = [
            item(
                each.id,
                {"text_acc": after[each.id], "contaminated": float(found[each.id].found)},
                prompt=each.text,
                right=each.options[each.answer],
                group=kinds.get(each.id, "clean"),
            )
            for each in questions
        ]
        write_result(folder, "knowledge_zh_leaked", Path(settings.model).name, items, seed=settings.seed)
        overlap = {name: vars(each) | {"planted": kinds.get(name, "")} for name, each in found.items()}
        (folder / "overlaps.json").write_text(json.dumps(overlap, ensure_ascii=False, indent=1), "utf-8")
        draw(folder, metrics)

    return stage.save(
        metrics, {"train": {"name": "world + 泄漏的题", "rows": len(chats) + len(leaks)}}, write
    )


def draw(folder: Path, metrics: dict) -> None:
    labels, accuracy = {"clean": "没泄漏|not leaked"} | KINDS, metrics["accuracy"]
    series = {
        "训练前|before": {label: accuracy[f"{name}_before"] for name, label in labels.items()},
        "训练后|after": {label: accuracy[name] for name, label in labels.items()},
        "查到|found": {
            label: metrics.get(f"recall_{name}", metrics["false_alarms"]) for name, label in labels.items()
        },
    }
    bar_chart(folder / "leak.svg", series, "泄漏的题：查到几成，分数虚高多少|Leaked questions", "", "")


def main(argv: list[str] | None = None) -> dict:
    settings = parse_settings(LeakSettings, PRESETS, argv)
    if settings.questions:
        questions, faults = load_questions(settings.questions, settings.seed)
        for fault in faults[:5]:
            print(f"写坏了的题，没有查：{fault}")
        texts = {each.id: each.text for each in questions}
        found = check_questions(texts, settings.train, settings.n, settings.at_least)
        return {name: vars(each) for name, each in found.items()}
    path = find_answerer(settings.model)
    return run_lesson(
        "contamination", HOME, settings, lambda stage: learn(stage, path["path"]), model_id=path["id"]
    )


if __name__ == "__main__":
    run_main(main)
