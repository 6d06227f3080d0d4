"""客服机器人的八周：客户的赞和踩怎样变成下一周的模型，点错的、捣乱的怎样防。

你会学到
  1. 一周一圈：回答 → 客户点赞点踩 → 挑出信得过的 → KTO（或 DPO）→ 和现在的比过，没有变差才换上。
  2. 客户会点错。同一个回答让几个人看，按每个人平时准不准给票加权（Dawid–Skene），错标签少了一大半。
  3. 有人捣乱：一个人点一千次，推一个错答案。照单全收，模型就学坏；每人有上限、要有第二个人看过、换上之前先比，一道挡不住的还有下一道。
  4. 训练之外：换一句提示能到哪里，拿不准就转人工能到哪里。先试便宜的。

怎么运行
  python customer_alignment.py                        # 小世界，CPU，约五分钟
  python customer_alignment.py --noises 0.2 --weeks 4 # 只看一种客户，四周
  python customer_alignment.py --dataset 反馈.jsonl   # 自己的反馈（user、prompt、completion、label）：谁可疑，哪些行能用
  python customer_alignment.py --preset full          # Qwen1.5-0.5B-Chat，需要加速器

应当看到（tiny，实测见本文件夹的 README.md）：解决的从五成多到九成以上，点错三成的也到八成多；只换提示多不了几个百分点。
结果文件夹里的 weeks.html 是八周的一页。

参考：Dawid & Skene 1979（标注者各有各的准头）；Ethayarajh et al. 2024（KTO）；Rafailov et al. 2023（DPO）。
"""

from nlp_common.base.cli import run_main

import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from customer_service import enough, score, serve, train_together
from customers import Reply, Vote, old_records
from feedback import agreement, dpo_rows, kto_rows, trusted_labels
from feedback_file import audit
from handover import TARGET, compare_bots
from nlp_common.base.arguments import COUNT, NOT_NEGATIVE, Limits, option
from nlp_common.base.console import print_table
from nlp_common.base.errors import UserError
from nlp_common.base.intervals import paired_difference
from nlp_common.tiny import world
from nlp_common.train.chain import chain_model
from nlp_common.train.lesson import run_lesson, run_part
from nlp_common.train.settings import LessonSettings, parse_settings
from nlp_common.train.stage import Stage
from poisoned_week import attack, show_poison
from stages import run_stage, write_rows
from weeks_page import note, weeks_chart, write_page

HOME = Path(__file__).resolve().parent
FULL_MODEL = "Qwen/Qwen1.5-0.5B-Chat"
PRESETS = {
    "tiny": {"first_learning_rate": 1e-3, "learning_rate": 3e-4},
    "full": {"first_learning_rate": 2e-5, "learning_rate": 5e-6},
}
POISON_WEEK = 5  # 第几周有人捣乱
GOLDEN_SEED = 7  # 客服主管的题，训练里从来没有
TALK = 0.9  # 13 句寒暄，至多忘一句
MARGIN = 0.05  # 新模型在主管的题上，拿得准没有差过这么多，才换上


@dataclass
class CustomerSettings(LessonSettings):
    model: str | None = option("第一个机器人从哪个模型学起；tiny 默认是 Qwen 链的 sft")
    source: str = option("hub 名从哪里下载", "hf", choices=("hf", "modelscope"))
    dataset: str | None = option("自己的反馈文件：只查谁可疑、挑出信得过的行，不模拟")
    weeks: int = option("模拟几周", 8, Limits(at_least=1, at_most=52))
    noises: str = option("几种客户，各点错多少，逗号隔开", "0,0.1,0.3")
    n_records: int = option("教第一个机器人的旧记录几条", 1500, Limits(at_least=20))
    n_questions: int = option("每周来几个问题", 150, Limits(at_least=10))
    n_customers: int = option("几个客户", 80, Limits(at_least=8))
    n_golden: int = option("主管的题几道，换不换看它", 300, Limits(at_least=20))
    cap: int = option("一个客户一周最多算几次点击", 20, COUNT)
    poison_votes: int = option("捣乱的那个人点几次；0 是没有这个人", 1000, NOT_NEGATIVE)
    first_learning_rate: float | None = option("第一个机器人的学习率", limits=Limits(above=0))
    learning_rate: float | None = option("每周 KTO、DPO 的学习率")

    def check(self) -> None:
        arms_of(self)


@dataclass(frozen=True)
class Arm:
    """一种客户和一种训练：一条线，八周。"""

    name: str
    stage: str
    noise: float

    @property
    def title(self) -> str:
        return f"{self.stage.upper()}，点错 {self.noise:.0%}|{self.stage.upper()}, {self.noise:.0%} noise"


def arms_of(settings: CustomerSettings) -> list[Arm]:
    """各种客户都用 KTO；中间的那一种再用一遍 DPO。"""
    try:
        noises = [float(each) for each in settings.noises.split(",")]
    except ValueError:
        noises = []
    if not noises or not all(0 <= noise < 0.5 for noise in noises):
        raise UserError(
            f"--noises 要是 0 到 0.5 之间（不到 0.5）的数，逗号隔开，给的是 {settings.noises!r}。"
        )
    arms = [Arm(f"kto_{noise * 100:g}", "kto", noise) for noise in dict.fromkeys(noises)]
    middle = arms[len(arms) // 2]
    return [*arms, Arm(middle.name.replace("kto", "dpo"), "dpo", middle.noise)]


# ---------------------------------------------------------------- 1. 八周


def learn(stage: Stage, start: str) -> dict:
    settings, arms = stage.settings, arms_of(stage.settings)
    golden = world.heldout_questions(settings.n_golden, GOLDEN_SEED)
    first = run_part(stage, "first", partial(first_bot, lesson=stage, start=start, golden=golden))
    weeks = [{arm.name: first for arm in arms}]
    for week in range(1, settings.weeks + 1):
        work = partial(one_week, lesson=stage, week=week, arms=arms, before=weeks[-1], golden=golden)
        weeks.append(run_part(stage, f"week{week}", work))
        solved = "，".join(f"{arm.name} {weeks[-1][arm.name]['solved']:.3f}" for arm in arms)
        print(f"第 {week} 周之后，主管的题解决了：{solved}", flush=True)
    middle = next(arm for arm in arms if arm.noise == arms[-1].noise)  # 点错得不多不少的那种客户，KTO 的
    last = weeks[-1][middle.name]["bot"]
    metrics = {
        "solved_first": first["solved"],
        "solved": {arm.name: weeks[-1][arm.name]["solved"] for arm in arms},
        "weeks": {
            str(number): {name: without_lists(its) for name, its in week.items()}
            for number, week in enumerate(weeks)
        },
    }
    bots = {"first": first["bot"], "last": last}
    metrics["handover"] = run_part(stage, "handover", partial(compare_bots, bots=bots, golden=golden))
    if settings.poison_votes:
        work = partial(poisoned, lesson=stage, arm=middle, weeks=weeks, golden=golden)
        metrics["poison"] = run_part(stage, "poison", work)

    titles = {arm.name: arm.title for arm in arms}

    def write(folder: Path) -> None:
        shutil.copytree(last, folder / "bot")
        weeks_chart(folder / "customer_weeks.svg", metrics, titles)
        write_page(folder / "weeks.html", metrics, titles, golden, middle.name)

    source = {"name": "customers", "kind": "builtin", "rows": settings.n_questions * settings.weeks}
    return stage.save(metrics, {"train": source}, write)


def first_bot(part: Stage, lesson: Stage, start: str, golden: list[dict]) -> dict:
    """第一个机器人：照旧的客服记录微调，连它们的毛病一起学。"""
    settings, folder = part.settings, lesson.folder.work / "bots"
    records = write_rows(folder / "records.jsonl", old_records(settings.n_records, settings.seed))
    run_stage(
        "sft", folder / "first", start, records, settings.preset,
        seed=settings.seed, learning_rate=settings.first_learning_rate,
    )  # fmt: skip
    return score(folder / "first", golden) | {"counts": {}, "replaced": True}


def one_week(
    part: Stage, lesson: Stage, week: int, arms: list[Arm], before: dict, golden: list[dict]
) -> dict:
    """各条线各过一周：before 是各条线上周末的样子，返回这周末的。"""
    settings, folder = part.settings, lesson.folder.work / "bots"
    ends, jobs = {}, {}
    for arm in arms:
        champion = before[arm.name]
        replies, votes = serve(champion["bot"], arm, week, settings)
        found = agreement(votes, champion["counts"])
        labels = [(replies[number], up) for number, up in trusted_labels(found).items()]
        rows = kto_rows(labels) if arm.stage == "kto" else dpo_rows(labels)
        ends[arm.name] = week_numbers(replies, votes, labels, len(rows))
        ends[arm.name]["counts"] = champion["counts"] | found.counts
        if enough(arm.stage, rows):
            jobs[arm.name] = (arm.stage, folder / arm.name / f"week{week}", champion["bot"], rows)
    train_together(list(jobs.values()), settings)
    for arm in arms:
        if arm.name in jobs:
            candidate = score(jobs[arm.name][1], golden)
            ends[arm.name] |= replace_or_keep(before[arm.name], candidate)
        else:
            ends[arm.name] |= keep(before[arm.name])
    return ends


def week_numbers(
    replies: list[Reply], votes: list[Vote], labels: list[tuple[Reply, bool]], n_rows: int
) -> dict:
    """这一周量到的；真的解决了没有只有模拟才知道，所以标签准不准量得出来。"""
    return {
        "served_solved": sum(reply.solved for reply in replies) / len(replies),
        "n_votes": len(votes),
        "vote_accuracy": sum(replies[vote.reply].solved == vote.up for vote in votes) / max(1, len(votes)),
        "n_labels": len(labels),
        "label_accuracy": sum(reply.solved == up for reply, up in labels) / max(1, len(labels)),
        "n_rows": n_rows,
    }


# ---------------------------------------------------------------- 2. 换上之前先比


def replace_or_keep(champion: dict, candidate: dict) -> dict:
    """同样的题上成对地比：拿得准没有差过 MARGIN，寒暄没有忘，才换上；不换，下一周还用现在的。"""
    gap = paired_difference(candidate["each"], champion["each"])
    replaced = gap.low > -MARGIN and candidate["small_talk"] >= min(TALK, champion["small_talk"])
    tried = {
        "candidate_solved": candidate["solved"],
        "gap": gap.value,
        "gap_low": gap.low,
        "gap_high": gap.high,
    }
    return (candidate if replaced else keep(champion)) | tried | {"replaced": replaced}


def keep(champion: dict) -> dict:
    same = ("bot", "solved", "solved_brushed", "small_talk", "each", "watched")
    return {name: champion[name] for name in same} | {"replaced": False}


def poisoned(part: Stage, lesson: Stage, arm: Arm, weeks: list[dict], golden: list[dict]) -> dict:
    """第 POISON_WEEK 周有人捣乱：各种防法学出来的，换上之前也照样先比。"""
    settings = part.settings
    week = min(POISON_WEEK, settings.weeks)
    before = weeks[week - 1][arm.name]
    found = attack(settings, arm, week, before, lesson.folder.work / "bots" / "poison", golden)
    for its in found.values():
        if "each" in its:  # 别的是可疑的人的表
            its["replaced"] = replace_or_keep(before, its)["replaced"]
            del its["each"], its["bot"], its["watched"]
    return found | {"week": week}


# ---------------------------------------------------------------- 3. 给人看


def without_lists(week: dict) -> dict:
    """记进 run.json 的：一题一题的对错、各用户的次数不记。"""
    return {name: value for name, value in week.items() if name not in ("each", "counts", "bot")}


def show(metrics: dict, arms: list[Arm]) -> None:
    rows = [["第几周之后", *(arm.title.split("|")[0] for arm in arms)]]
    for number, week in metrics["weeks"].items():
        cells = []
        for arm in arms:
            its = week[arm.name]
            cells.append(f"{its['solved']:.3f}" + (f"（{note(its)}）" if note(its) else ""))
        rows.append([number, *cells])
    print_table(rows)
    print("  主管的题里解决了几成；「没换」是新的没有比过现在的，「没训练」是踩（或赞）太少\n")
    last = metrics["weeks"][str(len(metrics["weeks"]) - 1)]
    for arm in arms if len(metrics["weeks"]) > 1 else ():
        its = last[arm.name]
        print(
            f"  {arm.name}：点击对 {its['vote_accuracy']:.3f}，按信用挑出的标签对 {its['label_accuracy']:.3f}"
        )
    prompts = metrics["handover"]
    rows = [["", "不加提示", "加学过的提示", "加没见过的", f"转几成，解决到 {TARGET:.0%}"]]
    for name, title in (("first", "第一个机器人"), ("last", f"{len(metrics['weeks']) - 1} 周之后")):
        its = prompts[name]
        cells = [f"{its['prompts'][prompt]:.3f}" for prompt in ("none", "known", "unknown")]
        rows.append([title, *cells, f"{its['handover_none']['handed']:.1%}"])
    print_table(rows)
    if "poison" in metrics:
        show_poison(metrics["poison"])


def main(argv: list[str] | None = None) -> dict:
    settings = parse_settings(CustomerSettings, PRESETS, argv, FULL_MODEL)
    if settings.dataset:
        return run_lesson("feedback", HOME, settings, audit)
    if settings.preset == "full" and settings.model is None:
        settings.model = FULL_MODEL
    start = chain_model("sft", settings.model, settings.source)
    work = partial(learn, start=start["path"])
    record = run_lesson("customer_alignment", HOME, settings, work, start=f"{start['stage']}:{start['id']}")
    show(record["metrics"], arms_of(settings))
    return record


if __name__ == "__main__":
    run_main(main)
