"""教一个小模型用工具：查故事、找故事、算算式，一步的、两步的，还有不必用的。

你会学到
  1. 工具的说明、调用、结果，在训练数据里都只是文字；损失算在调用与回答上，工具的结果不是模型说的，不算。
  2. 参数是"抄"出来的。预训练里没有见过数字，数字就抄不对：同样的微调，算式的参数没有几个对的。
  3. 没有工具，同样的题答不出来：故事不在题里，三位数的乘法它也不会。
  4. 不该调用的时候要忍得住：故事就在题里的、寒暄的、要用的工具没有列出来的。
  5. 工具会出错。训练数据里有"头一次没有成，再来一次"的对话，写坏的那一次不学（weight 是 0）。

怎么运行
  python sft_tool_call.py                        # 小世界，CPU，约三分钟
  python sft_tool_call.py --max_train_samples 4000
  python sft_tool_call.py --preset full          # Qwen3-0.6B，同样的题，需要加速器
  自己的工具对话（OpenAI、ShareGPT 的写法都行）用 ../qwen_chinese_finetune/sft_chinese_qwen.py --dataset 文件 训练。

应当看到（tiny，实测见本文件夹的 README.md）：选工具、抄参数、最后的回答几乎全对；没有学过数字的，算式的参数几乎全错；
没有工具的，只有故事就在题里的还答得对。

参考：Schick et al. 2023（Toolformer）；Qwen3 的对话模板；Patil et al. 2024（BFCL）。
"""

from nlp_common.base.cli import run_main

import copy
import random
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

from episodes import Episode, measure, play
from nlp_common.base.arguments import COUNT, option
from nlp_common.base.console import print_table, printable
from nlp_common.base.errors import UserError
from nlp_common.draw.plots import bar_chart
from nlp_common.hub.models import require_model
from nlp_common.lm.chat_rows import answer_loss
from nlp_common.lm.loading import end_chat_turns, load_chat_lm, make_fast
from nlp_common.lm.packing import collate_blocks, pack_documents
from nlp_common.train.lesson import run_lesson, run_part
from nlp_common.train.loop import train_loop
from nlp_common.train.settings import LoopSettings, parse_settings
from nlp_common.train.sft import train_on_chats
from nlp_common.train.stage import Stage
from tiny_agent import build_base, build_tokenizer
from tool_world import KINDS, chats, documents, tasks

HOME = Path(__file__).resolve().parent
FULL_MODEL = "Qwen/Qwen3-0.6B"
PRESETS = {
    "tiny": {"max_train_samples": 10500, "per_device_train_batch_size": 8, "learning_rate": 1.5e-3,
             "adam_beta2": 0.98, "max_length": 1024, "save_steps": 250, "n_questions": 400},
    "full": {"max_train_samples": 2000, "per_device_train_batch_size": 8, "learning_rate": 1e-5,
             "max_length": 2048, "n_questions": 200},
}  # fmt: skip
BLOCK = 256  # 预训练一块几个 token：正好装得下两篇文档
EVAL_SEED = 1000  # 留出的题，与训练的种子无关
TITLES = {
    "look_up": "查一次|look up",
    "search": "找一次|search",
    "calculate": "算一次|calculate",
    "two_step": "两步|two steps",
    "parallel": "一轮两个|parallel",
    "direct": "题里就有|direct",
    "small_talk": "寒暄|small talk",
    "missing": "没有那个工具|missing tool",
}
MODELS = {
    "sft": "学了数字、用工具|with tools",
    "no_digits": "没学过数字|no digits in pretraining",
    "no_tools": "没有工具|without tools",
    "before": "训练之前|before",
}


@dataclass
class ToolSettings(LoopSettings):
    model: str | None = option("full 预设从哪个模型开始；tiny 从头训练自己的")
    source: Literal["hf", "modelscope"] = option("hub 名从哪里下载", "hf")
    base_documents: int = option("tiny：先读几篇没有数字的文档", 5000, COUNT)
    digit_documents: int = option("tiny：再读几篇有数字的文档", 7000, COUNT)
    uneven: bool = option("示范有好有坏：有的不查就猜，有的不必查也查；grpo_tool_use.py 从它开始", False)
    compare: bool = option("tiny：旁边也练没学过数字的、没有工具的两个", True)
    n_questions: int | None = option("留出几道题", limits=COUNT)

    def check(self) -> None:
        if self.preset == "tiny" and self.model:
            raise UserError("tiny 从头训练自己的模型，--model 用不上：去掉它，或改用 --preset full。")


# ---------------------------------------------------------------- 1. 从头到尾


def learn(stage: Stage) -> dict:
    settings = stage.settings
    questions = tasks(settings.n_questions, EVAL_SEED, heldout=True, kinds=dict.fromkeys(KINDS, 1.0))
    metrics: dict = {}
    if settings.preset == "full":
        tokenizer, model = load_chat_lm(require_model(settings.model, settings.source), stage.device)
        metrics["before"] = measure(play(model, tokenizer, questions))
    else:
        tokenizer = build_tokenizer()
        model = compare_small(stage, tokenizer, questions, metrics)
    trained = {}
    work = partial(fine_tune, label="sft", model=model, tokenizer=tokenizer, history=trained)
    run_part(stage, "sft", work, model)
    model.eval()
    episodes = play(model, tokenizer, questions)
    metrics["sft"] = measure(episodes)
    show_episode(next((e for e in episodes if e.task["kind"] == "two_step"), episodes[0]))
    end_chat_turns(model, tokenizer)
    metrics |= {name: value for name, value in metrics["sft"].items() if name != "by_kind"}
    return stage.finish(
        model, tokenizer, metrics, {"train": "tool_world"}, trained.get("sft", []), draw=partial(draw, metrics=metrics)
    )  # fmt: skip


def compare_small(stage: Stage, tokenizer, questions: list[dict], metrics: dict):
    """小模型的起点：先读没有数字的文档，再读有数字的。旁边的两个各少一样：没读过数字，没有工具。"""
    plain = make_fast(build_base(tokenizer, stage.settings.seed).to(stage.device))
    run_part(stage, "words", partial(read_documents, model=plain, tokenizer=tokenizer, digits=False), plain)
    base = copy.deepcopy(plain)
    run_part(stage, "digits", partial(read_documents, model=base, tokenizer=tokenizer, digits=True), base)
    for name, start in (("no_digits", plain), ("no_tools", base)) if stage.settings.compare else ():
        model = copy.deepcopy(start)
        metrics[name] = run_part(
            stage,
            name,
            partial(tune_and_measure, label=name, model=model, tokenizer=tokenizer, questions=questions),
        )
    return base


# ---------------------------------------------------------------- 2. 预训练：数字也要读过


def read_documents(part: Stage, model, tokenizer, digits: bool) -> dict:
    """在文档上学下一个 token；每块装两三篇，互不相看。"""
    settings = part.settings
    n = settings.digit_documents if digits else settings.base_documents
    texts = documents(n, settings.seed, digits)
    rows = [[*ids, tokenizer.eos_token_id] for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    blocks = pack_documents(rows, BLOCK)
    random.Random(settings.seed).shuffle(blocks)
    rate = 3e-3 if digits else 2e-3
    part.settings = replace(settings, per_device_train_batch_size=4, learning_rate=rate, num_train_epochs=1.0)
    collate = partial(collate_blocks, block_size=BLOCK, pad_id=tokenizer.pad_token_id)
    tokens = [sum(map(len, block)) for block in blocks]
    trained = train_loop(part, "读数字" if digits else "读故事", model, blocks, collate, answer_loss, tokens)
    return trained.metrics


# ---------------------------------------------------------------- 3. 微调：调用与回答算损失，工具的结果不算


def fine_tune(part: Stage, label: str, model, tokenizer, history: dict | None = None) -> dict:
    """在对话上微调；哪些 token 算损失，见 nlp_common/lm/chatml.py 的 encode_chat：助手说的才算。"""
    settings = part.settings
    rows = chats(settings.max_train_samples, settings.seed, label != "no_tools", settings.uneven)
    trained = train_on_chats(part, label, model, tokenizer, rows)
    if history is not None:
        history[label] = trained.history
    return trained.metrics


def tune_and_measure(part: Stage, label: str, model, tokenizer, questions: list[dict]) -> dict:
    fine_tune(part, label, model, tokenizer)
    if label == "no_tools":  # 题里也没有列工具
        questions = [task | {"messages": task["messages"][1:]} for task in questions]
    return measure(play(model.eval(), tokenizer, questions))


# ---------------------------------------------------------------- 4. 给人看

SAID = {"user": "问", "assistant": "说", "tool": "工具"}


def show_episode(episode: Episode) -> None:
    print("\n一道两步的题（system 里列着工具，不印了）")
    for message in episode.messages[1:]:
        text = printable(message["content"]).replace("\n", "\n      ")
        print(f"{SAID[message['role']]:>3}  {text}")
    print()


def show(metrics: dict) -> None:
    rows = [["", *(name.split("|")[0] for key, name in MODELS.items() if key in metrics)]]
    models = [key for key in MODELS if key in metrics]
    for kind in KINDS:
        cells = [metrics[model]["by_kind"].get(kind) for model in models]
        rows.append([TITLES[kind].split("|")[0], *("—" if c is None else f"{c:.3f}" for c in cells)])
    for name, title in (
        ("final_accuracy", "全部"),
        ("tool_choice", "选对工具"),
        ("argument_exact", "参数全对"),
        ("no_call_when_unneeded", "不必用就不用"),
    ):
        rows.append([title, *(f"{metrics[model][name]:.3f}" for model in models)])
    print_table(rows)
    print(f"  留出的 {metrics['n']} 道题；上半是各种题最后答对的比例")


def draw(folder: Path, metrics: dict) -> None:
    series = {
        name: {
            TITLES[kind]: metrics[key]["by_kind"][kind] for kind in KINDS if kind in metrics[key]["by_kind"]
        }
        for key, name in MODELS.items()
        if key in metrics
    }
    bar_chart(
        folder / "tool_kinds.svg",
        series,
        "各种题的正确率|Accuracy by kind of task",
        "题|task",
        "正确率|accuracy",
    )


def main(argv: list[str] | None = None) -> dict:
    settings = parse_settings(ToolSettings, PRESETS, argv, FULL_MODEL)
    if settings.preset == "full" and settings.model is None:
        settings.model = FULL_MODEL
    record = run_lesson("sft_tool_call", HOME, settings, learn)
    show(record["metrics"])
    return record


if __name__ == "__main__":
    run_main(main)
