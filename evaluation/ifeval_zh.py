"""按不按要求答：程序就能检查的要求（字数、段数、禁用词、JSON、以…结尾 …），中文版的 IFEval。

你会学到
  1. 四个分：一道题的要求全合格（题），各条要求合格的比例（要求），各有严格与宽松两种（去掉首行、末行、* 号也算）。
  2. 一条看题没看题的线：把回答换到别的题上，也有不少合格的。高出这条线的，才是读了要求的功劳。
  3. 要求全合格，不等于答对：程序写的套话，满分，什么也没说。
  4. 拿这个检查器当奖励训练模型，它就学会让检查器满意：分数升了，答对的却没了。奖励再乘上对错，才两样都要。

怎么运行
  python ifeval_zh.py                                       # 小世界的题：SFT、DPO、PPO，再训练两个钻空子与补好的
  python ifeval_zh.py --models smollm2 --dataset general --n 90        # 45 种要求的中文题，给真模型
  python ifeval_zh.py --dataset 题.jsonl --answers 甲.jsonl 乙.jsonl     # IFEval 格式的题，现成的回答
  python ifeval_zh.py --dataset general --answers_url http://127.0.0.1:8000/v1 --answers_model 名字

应当看到（tiny，实测见本文件夹的 README.md）：三个模型的分都不比"换到别的题上"高：它们没有读要求。只拿形式当奖励，
分数升了许多，答对的从几乎全部掉到几乎没有；乘上对错，分数升得差不多，答对的还在。可是换题的线也跟着升：两个都没有学会读要求。

参考：Zhou et al. 2023（arXiv 2311.07911，IFEval）；Skalse et al. 2022（奖励的空子）；Shao et al. 2024（GRPO）。
"""

from nlp_common.base.cli import run_main

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from answering import SPEAKING, find_answerer, load_answerer, replies, split_names
from contamination import check_questions
from ifeval_report import draw_scores, pick_examples, print_examples, print_instructions, print_scores
from instruction_files import read_answer_file, read_instruction_file
from instruction_prompts import general_prompts, tiny_prompts
from instructions_zh import follows_loose, follows_strict
from nlp_common.base.arguments import COUNT, NOT_NEGATIVE, POSITIVE, option
from nlp_common.base.errors import UserError
from nlp_common.base.intervals import (
    Interval,
    mean_interval,
    paired_difference,
    proportion_interval,
    statistic_interval,
)
from nlp_common.data.rows import data_sha256
from nlp_common.hub.chat_server import ChatServer
from nlp_common.lm.replies import MAX_REPLY
from nlp_common.train.lesson import run_part
from nlp_common.train.settings import LessonSettings, parse_settings
from nlp_common.train.stage import Stage
from results import file_name, item, run_evaluation, write_result
from reward_gaming import REWARDS, draw_gaming, is_right, train_on_reward

HOME = Path(__file__).resolve().parent
PRESETS = {
    "tiny": {
        "dataset": "tiny_world",
        "models": "sft,dpo,ppo",
        "max_new_tokens": MAX_REPLY,
        "learning_rate": 5e-4,
    },
    "full": {
        "dataset": "general",
        "models": "Qwen/Qwen1.5-0.5B-Chat",
        "max_new_tokens": 512,
        "learning_rate": 5e-4,
    },
}
BUILT_IN = {"tiny_world": 300, "general": 450}  # 自带的题，默认出几道
STEPS = 80  # 链上的模型，拿检查器当奖励训练几步
SHIFTS = 10  # 每个回答换到几道别的题上


@dataclass
class IfevalSettings(LessonSettings):
    models: str | None = option(
        "评哪几个：链的阶段（sft、dpo …）、本地文件夹、hub 名或 smollm2，逗号隔开；第一个是基准"
    )
    source: str = option("hub 名从哪里下载", "hf", choices=("hf", "modelscope"))
    dataset: str | None = option("题目：tiny_world、general（45 种要求的中文题），或 IFEval 格式的文件")
    skip_unknown: bool = option("题目文件里不认识的要求：跳过那道题，不停下来", False)
    n: int | None = option("几道题；默认小世界 300 道，general 450 道，题目文件全部", limits=COUNT)
    answers: list[str] | None = option(  # noqa: RUF009
        "不用模型，评这些文件里的回答：一个模型一个文件，一行一个 prompt（或 key）与 response"
    )
    answers_url: str | None = option("回答的是一个 OpenAI 接口的服务器，写到 /v1 为止")
    answers_model: str | None = option("服务器上的哪个模型")
    api_key_env: str = option("钥匙在哪个环境变量里", "OPENAI_API_KEY")
    timeout: float = option("服务器几秒不回答就算没有回答", 60.0, POSITIVE)
    check_contamination: str | None = option("训练数据的文件或文件夹：查每道题的 n 元组在不在里面")
    max_new_tokens: int | None = option("一个回答最多多少个 token")
    temperature: float = option("采样的温度；0 是贪心", 0.0)
    steps: int | None = option(
        "拿检查器当奖励训练第一个模型几步（小世界的题才有）；默认链上的模型 80 步，别的不训练",
        limits=NOT_NEGATIVE,
    )
    learning_rate: float | None = option("训练的学习率")

    def check(self) -> None:
        if self.answers and self.answers_url:
            raise UserError("--answers 与 --answers_url 只给一个：评现成的回答，还是问服务器。")
        if self.answers_url and not self.answers_model:
            raise UserError("给了 --answers_url，还要 --answers_model：服务器上的哪个模型。")
        if self.answers and len({Path(path).stem for path in self.answers}) < len(self.answers):
            raise UserError("--answers 的几个文件同名：模型的名字取自文件名，请改成不同的。")
        trainable = self.dataset == "tiny_world" and not self.answers and not self.answers_url
        first = split_names(self.models)[0]
        if self.steps and not trainable:
            raise UserError("--steps 拿检查器当奖励训练，只能在小世界的题上、训练 --models 里的第一个模型。")
        if self.steps is None:
            self.steps = STEPS if trainable and first in SPEAKING else 0


# ---------------------------------------------------------------- 全貌


def main(argv: list[str] | None = None) -> dict:
    settings = parse_settings(IfevalSettings, PRESETS, argv)
    rows = load_prompts(settings)  # 题目、回答写错了，先说
    given = {Path(path).stem: (path, read_answer_file(path, rows)) for path in settings.answers or []}
    if given:
        more: dict = {"answers_sha256": [data_sha256(path) for path in settings.answers]}
    elif settings.answers_url:
        more = {}
        server_of(settings).check()
    else:
        more = {
            "ids": {name: find_answerer(name, settings.source)["id"] for name in split_names(settings.models)}
        }
    if settings.check_contamination:
        more["check_contamination_sha256"] = data_sha256(settings.check_contamination)
    return run_evaluation("ifeval_zh", HOME, settings, partial(evaluate, rows=rows, given=given), **more)


def evaluate(stage: Stage, rows: list[dict], given: dict) -> dict:
    """各模型答题 → 四个分、换题的线、各种要求的表；再拿检查器当奖励训练；写结果文件、画图。"""
    settings = stage.settings
    leaked = {}
    if settings.check_contamination:
        prompts = {f"q{row['key']}": row["prompt"] for row in rows}
        leaked = check_questions(prompts, settings.check_contamination)
    answers = given or collect_answers(stage, rows)
    histories: dict[str, list[dict]] = {}
    if settings.steps:
        first = split_names(settings.models)[0]
        practice = [as_question(row) for row in tiny_prompts(2000, settings.seed, heldout=False)]
        for kind in REWARDS:
            train = partial(train_on_reward, kind=kind, model=first, source=settings.source)
            found = run_part(stage, f"reward-{kind}", partial(train, rows=practice, heldout=rows))
            histories[kind] = found["history"]
            answers[f"{first}+{kind}"] = (f"trained on {kind}", found["answers"])

    scored = {name: score_all(rows, said) for name, (_, said) in answers.items()}
    metrics = {
        "n": len(rows),
        "models": {name: summarise(each, settings.seed) for name, each in scored.items()},
    }
    if leaked:
        metrics["contaminated"] = sum(each.found for each in leaked.values())
    metrics["gap"] = {name: compare(scored, name, settings.seed) for name in list(scored)[1:]}
    metrics["kinds"] = by_instruction(rows, scored)
    if "example" in rows[0]:
        written = score_all(rows, [{"text": row["example"], "ended": True} for row in rows])
        metrics["program_strict"] = sum(each["prompt_strict"] for each in written) / len(written)
    print_scores(metrics)
    print_instructions(metrics["kinds"])
    print_examples(rows, answers, scored)

    def write(folder: Path) -> None:
        with open(folder / "prompts.jsonl", "w", encoding="utf-8") as file:
            for row in rows:
                kept = {name: row[name] for name in ("key", "prompt", "instruction_id_list", "kwargs")}
                file.write(json.dumps(kept, ensure_ascii=False) + "\n")
        for name, (model_id, said) in answers.items():
            write_answers(folder, name, model_id, rows, said, scored[name], settings, leaked)
        draw_scores(folder / "scores.svg", metrics["models"])
        if histories:
            draw_gaming(folder / "gaming.svg", histories, pick_examples(rows, answers, scored))

    return stage.save(metrics, {"name": settings.dataset, "rows": len(rows)}, write)


# ---------------------------------------------------------------- 题与回答


def load_prompts(settings: IfevalSettings) -> list[dict]:
    """题目，每道带 "messages"；内置的还带 "example"（合格的回答），小世界的再带 "question"（判对错用）。"""
    n = settings.n or BUILT_IN.get(settings.dataset)
    if settings.dataset == "tiny_world":
        rows = tiny_prompts(n, settings.seed)
    elif settings.dataset == "general":
        rows = general_prompts(n, settings.seed)
    else:
        rows = read_instruction_file(settings.dataset, n, settings.skip_unknown)
    return [as_question(row) for row in rows]


def as_question(row: dict) -> dict:
    return row | {"messages": [{"role": "user", "content": row["prompt"]}]}


def collect_answers(stage: Stage, rows: list[dict]) -> dict[str, tuple[str, list[dict]]]:
    """→ {模型: (哪一份权重, 各题的回答 {"text", "ended"})}；做完一个存一个，中断了不重做。"""
    settings = stage.settings
    names = [settings.answers_model] if settings.answers_url else split_names(settings.models)
    answers = {}
    for name in names:
        ask = ask_server if settings.answers_url else ask_model
        found = run_part(stage, file_name(name), partial(ask, name=name, rows=rows))
        answers[name] = (found["id"], found["answers"])
        cut = sum(not each["ended"] for each in found["answers"])
        if cut:
            print(
                f"{name}：{cut} 个回答没说完（到 --max_new_tokens 为止，或服务器没有回答），照已有的字检查。"
            )
    return answers


def ask_model(part: Stage, name: str, rows: list[dict]) -> dict:
    settings = part.settings
    answerer = load_answerer(name, settings.source)
    said = replies(answerer, rows, settings.max_new_tokens, settings.temperature, seed=settings.seed)
    return {"id": answerer.id, "answers": [{"text": each["text"], "ended": each["ended"]} for each in said]}


def ask_server(part: Stage, name: str, rows: list[dict]) -> dict:
    """一道一道地问；没有回答的当作空的，什么要求也不合。"""
    settings, server = part.settings, server_of(part.settings)
    sampling = {"max_tokens": settings.max_new_tokens, "temperature": settings.temperature}
    said = [server.chat(row["messages"], **sampling) for row in rows]
    return {"id": name, "answers": [{"text": text or "", "ended": text is not None} for text in said]}


def server_of(settings: IfevalSettings) -> ChatServer:
    return ChatServer(
        settings.answers_url, settings.answers_model, settings.api_key_env, timeout=settings.timeout
    )


# ---------------------------------------------------------------- 打分


def score_all(rows: list[dict], said: list[dict]) -> list[dict]:
    """各题的分。unread：同一道题，换成别的题的回答，合格的比例。"""
    found = []
    n = len(rows)
    for place, (row, answer) in enumerate(zip(rows, said, strict=True)):
        strict, loose = check(row, answer["text"], follows_strict), check(row, answer["text"], follows_loose)
        others = [said[(place + shift) % n]["text"] for shift in range(1, min(SHIFTS, n - 1) + 1)]
        scores = {
            "prompt_strict": float(all(strict)),
            "prompt_loose": float(all(loose)),
            "unread": sum(all(check(row, text, follows_strict)) for text in others) / max(1, len(others)),
        }
        if "question" in row:
            scores["right"] = is_right(row, answer)
            scores["both"] = scores["prompt_strict"] * scores["right"]
        found.append(scores | {"strict": strict, "loose": loose})
    return found


def check(row: dict, text: str, follows) -> list[bool]:
    """一道题的各条要求，合不合。"""
    return [
        follows(id, kwargs, text)
        for id, kwargs in zip(row["instruction_id_list"], row["kwargs"], strict=True)
    ]


def instruction_rate(scored: list[dict], kind: str, seed: int) -> Interval:
    """全部要求里合格的比例。同一道题的几条不是独立的，所以重抽的是题，不是要求。"""
    items = [(sum(each[kind]), len(each[kind])) for each in scored]
    return statistic_interval(items, lambda drawn: sum(a for a, _ in drawn) / sum(b for _, b in drawn), seed)


def summarise(scored: list[dict], seed: int) -> dict:
    """一个模型的各个分，各带区间；read_gap 是比换题高出多少（同样的题，成对）。"""
    strict = [each["prompt_strict"] for each in scored]
    unread = [each["unread"] for each in scored]
    found = {
        "prompt_strict": proportion_interval(int(sum(strict)), len(strict)),
        "prompt_loose": proportion_interval(int(sum(each["prompt_loose"] for each in scored)), len(scored)),
        "instruction_strict": instruction_rate(scored, "strict", seed),
        "instruction_loose": instruction_rate(scored, "loose", seed),
        "unread": mean_interval(unread, seed),
        "read_gap": paired_difference(strict, unread, seed),
    }
    for name in ("right", "both"):
        if name in scored[0]:
            found[name] = proportion_interval(int(sum(each[name] for each in scored)), len(scored))
    return {name: as_dict(each) for name, each in found.items()}


def as_dict(interval: Interval) -> dict:
    return {name: round(getattr(interval, name), 4) for name in ("value", "low", "high", "n")}


def compare(scored: dict[str, list[dict]], name: str, seed: int) -> dict:
    """这个模型减第一个，同样的题成对：题（严格），小世界的题还有答对。"""
    first = next(iter(scored))
    return {
        score: as_dict(
            paired_difference(
                [each[score] for each in scored[name]], [each[score] for each in scored[first]], seed
            )
        )
        for score in ("prompt_strict", "right")
        if score in scored[first][0]
    }


def by_instruction(rows: list[dict], scored: dict[str, list[dict]]) -> dict:
    """{要求: {"n": 几条, 模型: 合格的比例}}；名字里的 : 换成 .（记数的名字里不能有）。"""
    found: dict[str, dict] = {}
    for name, each in scored.items():
        marks: dict[str, list[bool]] = {}
        for row, scores in zip(rows, each, strict=True):
            for id, followed in zip(row["instruction_id_list"], scores["strict"], strict=True):
                marks.setdefault(id, []).append(followed)
        for id, marked in marks.items():
            interval = as_dict(proportion_interval(sum(marked), len(marked)))
            found.setdefault(id.replace(":", "."), {"n": interval.pop("n")})[name] = interval
    return {id: found[id] for id in sorted(found)}


# ---------------------------------------------------------------- 结果文件


def write_answers(folder, name, model_id, rows, said, scored, settings, leaked) -> None:
    kept = ("prompt_strict", "prompt_loose", "unread", "right", "both")
    items = [
        item(
            f"q{row['key']}",
            {score: each[score] for score in kept if score in each},
            prompt=row["prompt"],
            answer=answer["text"],
            right=row.get("example", ""),
            group=row["instruction_id_list"][0],
        )
        for row, answer, each in zip(rows, said, scored, strict=True)
    ]
    whole = {
        f"instruction_{kind}": instruction_rate(scored, kind, settings.seed) for kind in ("strict", "loose")
    }
    write_result(
        folder, "ifeval_zh", name, items, model_id=model_id, seed=settings.seed, scores=whole, leaked=leaked,
        settings={"dataset": settings.dataset, "temperature": settings.temperature, "max_new_tokens": settings.max_new_tokens},
    )  # fmt: skip


if __name__ == "__main__":
    run_main(main)
