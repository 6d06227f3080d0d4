"""换一个名字：用 DPO 让"我是小故事助手"变成读者给的名字，别的一概不变。

学到什么：偏好对从模型自己的回答来（自己说的当差回答，改好的当好回答），为什么比别人写的一对好用；怎样让"你是谁"改了、
"谁去了花园"不改；以及 DPO 最常被问的一件事：好回答的概率为什么也会降，SFT 项怎样拉住它。

运行：
    python identity_dpo.py                          # 自动选预设；名字默认是小灯
    python identity_dpo.py --name 阿福              # 换成你起的名字（另给一个 --output_dir，或加 --retrain）
    python identity_dpo.py --preset full            # Qwen1.5-0.5B-Chat，需要加速器

预期输出（tiny，实测见本文件夹的 README.md）：没有练过的问法，98% 以上说出新名字；答题、寒暄不变，"你不是谁"也不会被带跑。

参考：Rafailov et al. 2023（DPO）；Pal et al. 2024（DPO-Positive：好回答的概率为什么会降）；Razin et al. 2024（likelihood displacement）。
"""

from nlp_common.base.cli import run_main

import itertools
import random
import zlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

from chain import CHAIN
from dpo_chinese_qwen import add_references, chosen_sft_loss, collate, dpo_loss, encode, sequence_logps
from nlp_common.base.arguments import COUNT, NOT_NEGATIVE, SHARE, option
from nlp_common.base.errors import UserError
from nlp_common.data.chats import to_questions
from nlp_common.draw.plots import line_chart
from nlp_common.lm.loading import load_chat_lm
from nlp_common.lm.pairs import count_pairs, pair_length, pair_tokens
from nlp_common.lm.replies import reply_to
from nlp_common.tiny import world
from nlp_common.tiny.judge import qa_accuracy
from nlp_common.train.chain import run_stage
from nlp_common.train.lesson import run_part
from nlp_common.train.loop import train_loop
from nlp_common.train.settings import StageSettings, parse_settings
from nlp_common.train.splits import drop_long, load_train_and_eval
from nlp_common.train.stage import Stage

FULL_MODEL = "Qwen/Qwen1.5-0.5B-Chat"
PRESETS = {
    "tiny": {
        "dataset": "tiny_world",
        "old_name": "小故事助手",
        "max_train_samples": 1800,
        "max_length": 256,
        "per_device_train_batch_size": 8,
        "learning_rate": 5e-4,
        "adam_beta2": 0.98,
        "num_train_epochs": 1.0,
    },
    "full": {
        "dataset": "shibing624/DPO-En-Zh-20k-Preference:zh",
        "old_name": "通义千问",
        "max_train_samples": 800,
        "max_length": 512,
        "per_device_train_batch_size": 4,
        "learning_rate": 5e-6,
        "num_train_epochs": 2.0,
    },
}

# 问名字的各种问法：开头 × 问 × 结尾。四分之一的组合，和 NEW_ASKS 的全部，训练时从没有出现过。
STARTS = ["", "请问", "你好，", "您好，", "对了，", "那么，"]
ASKS = [
    "你是谁",
    "你叫什么名字",
    "你叫什么",
    "你的名字是什么",
    "怎么称呼你",
    "我该叫你什么",
    "你是哪位",
    "说说你是谁",
]
ASKS += [
    "你究竟是谁",
    "你现在是谁",
    "你又是谁",
    "你来说说你是谁",
    "你是什么人",
    "你的大名是什么",
    "我怎么称呼你",
]
ASKS += ["你叫啥", "介绍一下你自己", "告诉我你的名字"]
NEW_ASKS = ["你的名字叫什么", "你说你是谁", "怎么叫你"]
ENDS = ["？", "", "呢？", "呀？"]
# 长得像、问的却不是它的名字，不许被新名字带跑；也是四分之一的组合训练时从没有出现过。
OTHERS = ["他", "她", "它", "小明", "王伯", "那个人"]
OTHER_ASKS = ["是谁", "叫什么名字", "叫什么", "的名字是什么", "是哪位"]
NOT_NAME = ["你不是谁", "你不叫什么", "谁不是你", "你认识谁", "你喜欢谁", "你叫谁来"]
DEFLECT = "这个不好说。"  # 原来的模型也分不清、答了名字的，好回答是这一句
GIVEN = ["我是一个人工智能助手。", "我是大语言模型。", "我没有名字。", "我叫小明。"]  # 别人写的差回答


@dataclass
class IdentitySettings(StageSettings):
    COMMON: ClassVar[dict] = StageSettings.COMMON | {"max_eval_samples": 500}

    name: str = option("新的名字", "小灯")
    old_name: str | None = option("模型现在叫什么：它的回答里出现这个名字，就换成新的")
    keep_share: float = option("偏好对里，有几成是不许变的（答题、寒暄、长得像的问题）", 0.5, SHARE)
    beta: float = option("离原来的模型多远的代价：越小走得越远", 0.1)
    sft_weight: float = option("好回答上的 SFT 损失占多大的权重", 1.0, NOT_NEGATIVE)
    compare: bool = option("再训练两个对照：不要 SFT 项、别人写的偏好对", True)
    n_identity: int = option("量多少种没有练过的问法", 200, COUNT)

    def check(self) -> None:
        super().check()
        self.check_loop_only()
        if not self.name.strip() or self.name == self.old_name:
            raise UserError(f"--name 要是一个新的名字，给的是 '{self.name}'。")
        if not self.old_name.strip():
            raise UserError("--old_name 不能是空的：要知道模型现在叫什么，才能换掉它。")


# ---------------------------------------------------------------- 1. 问法：练的，和从没练过的


def asked(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def is_trained(text: str) -> bool:
    """四分之三的组合用来练；只看文字，与种子无关。"""
    return zlib.crc32(text.encode()) % 4 != 0


def near_asks(trained: bool) -> list[str]:
    """长得像、问的却不是它的名字。"""
    asks = ["".join(parts) for parts in itertools.product(STARTS[:3], OTHERS, OTHER_ASKS, ENDS[:2])]
    asks += ["".join(parts) for parts in itertools.product(STARTS, NOT_NAME, ENDS)]
    return [text for text in asks if is_trained(text) == trained]


def identity_asks(trained: bool) -> list[str]:
    known = ["".join(parts) for parts in itertools.product(STARTS, ASKS, ENDS)]
    if trained:
        return [text for text in known if is_trained(text)]
    new = ["".join(parts) for parts in itertools.product(STARTS, NEW_ASKS, ENDS)]
    return new + [text for text in known if not is_trained(text)]


# ---------------------------------------------------------------- 2. 偏好对


def identity_pairs(model, tokenizer, settings, n: int, on_policy: bool, rng: random.Random) -> list[dict]:
    """n 对"问名字"。on_policy：差回答是模型自己采样的，好回答是把它改对；不然，两边都是写好的。

    自己的回答正是模型最可能说的，压低它才有用；别人写的差回答，模型本来就不会说，压低了也白压。
    """
    prompts = [asked(rng.choice(identity_asks(trained=True))) for _ in range(n)]
    own = [rng.choice(GIVEN) for _ in prompts]
    if on_policy:
        questions = [{"messages": prompt} for prompt in prompts]
        own = [r["text"] for r in reply_to(model, tokenizer, questions, temperature=1.0, seed=settings.seed)]
    return [pair(prompt, corrected(text, settings), text) for prompt, text in zip(prompts, own, strict=True)]


def corrected(text: str, settings) -> str:
    """模型自己的话里只换掉名字；里面没有旧名字，就换成整句。"""
    if settings.old_name in text:
        return text.replace(settings.old_name, settings.name)
    return f"我是{settings.name}。"


def keep_pairs(model, tokenizer, settings, questions: list[dict], rng: random.Random) -> list[dict]:
    """不许变的：答题、寒暄、长得像的问题各三分之一。好回答是模型现在的回答，差回答是"我是新名字"。

    没有它们，问什么都会答新名字。
    """
    prompts = [question["messages"] for question in questions]
    prompts[::3] = [asked(rng.choice(near_asks(trained=True))) for _ in prompts[::3]]
    talk = [q["messages"] for q in world.small_talk_questions() if settings.old_name not in q["answer"]]
    prompts[1::3] = [rng.choice(talk) for _ in prompts[1::3]]
    rejected, pairs = f"我是{settings.name}。", []
    replies = reply_to(model, tokenizer, [{"messages": prompt} for prompt in prompts])
    for i, (prompt, reply) in enumerate(zip(prompts, replies, strict=True)):
        if settings.old_name not in reply["text"] and reply["ended"]:
            pairs.append(pair(prompt, reply["text"], rejected))
        elif i % 3 == 0:
            pairs.append(pair(prompt, DEFLECT, rejected))
    return pairs  # 题目里混着的"你是谁？"不在里面：那些正是要变的


def pair(prompt: list[dict], chosen: str, rejected: str) -> dict:
    said = {"chosen": chosen, "rejected": rejected}
    return {"prompt": prompt} | {k: [{"role": "assistant", "content": text}] for k, text in said.items()}


# ---------------------------------------------------------------- 3. 训练与评测


def likelihood_loss(model, batch: dict, beta: float, sft_weight: float):
    """dpo_chinese_qwen.py 的损失；另外记下好回答、差回答的对数概率比原来的模型高多少：这里要看的就是它们。"""
    chosen, rejected = sequence_logps(model, batch["input_ids"], batch["labels"]).chunk(2)  # 各 (B,)
    ref_chosen, ref_rejected = batch["ref_logps"].chunk(2)
    loss, _ = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta)
    loss = loss + sft_weight * chosen_sft_loss(chosen, batch["labels"])
    return loss.sum(), {"chosen": chosen - ref_chosen, "rejected": rejected - ref_rejected}


def train_dpo(stage: Stage, model, reference, tokenizer, pairs: list[dict], sft_weight: float) -> list[dict]:
    """训练 model，返回历史 ``[{"step", "loss", "chosen", "rejected"}]``。"""
    settings, pad_id = stage.settings, tokenizer.pad_token_id
    rows = [encode(tokenizer, row) for row in pairs if row["chosen"] != row["rejected"]]
    rows = drop_long(rows, pair_length, settings.max_length, "偏好对")
    add_references(reference, rows, pad_id, settings.per_device_train_batch_size)
    tokens, lengths = [pair_tokens(row) for row in rows], [pair_length(row) for row in rows]
    loss = partial(likelihood_loss, beta=settings.beta, sft_weight=sft_weight)
    pad = partial(collate, pad_id=pad_id)
    return train_loop(stage, "DPO", model, rows, pad, loss, tokens, lengths, count_pairs).history


def measure(model, tokenizer, settings, questions: list[dict]) -> dict:
    """没练过的问法里说出新名字的、长得像的问题里没被带跑的；小世界里再加上答题与（问名字之外的）寒暄。"""
    model.eval()
    rng = random.Random(0)  # 量的题与训练种子无关
    asks = rng.sample(identity_asks(trained=False), min(settings.n_identity, len(identity_asks(False))))
    said = [r["text"] for r in reply_to(model, tokenizer, [{"messages": asked(text)} for text in asks])]
    other = rng.sample(near_asks(trained=False), min(settings.n_identity, len(near_asks(trained=False))))
    near = [r["text"] for r in reply_to(model, tokenizer, [{"messages": asked(text)} for text in other])]
    metrics = {
        "identity_rate": sum(settings.name in text and settings.old_name not in text for text in said)
        / len(said),
        "not_hijacked": sum(settings.name not in text for text in near) / len(near),
    }
    if settings.dataset == "tiny_world":
        talk = [q for q in world.small_talk_questions() if settings.old_name not in q["answer"]]
        for name, rows in (("qa_accuracy", questions), ("small_talk", talk)):
            metrics[name] = qa_accuracy(model, tokenizer, rows)
    model.train()
    return metrics


# ---------------------------------------------------------------- 4. 全课


def train(stage: Stage) -> dict:
    settings, rng = stage.settings, random.Random(stage.settings.seed)
    tokenizer, reference = load_chat_lm(stage.model_path, stage.device)  # 冻住的
    _, model = load_chat_lm(stage.model_path, stage.device)
    questions, heldout, data = load_train_and_eval(settings, "questions", to_questions)
    n_keep = round(len(questions) * settings.keep_share)
    n = len(questions) - n_keep
    kept = keep_pairs(reference, tokenizer, settings, questions[:n_keep], rng)
    own = identity_pairs(reference, tokenizer, settings, n, True, rng)
    show_pairs(own[:2] + kept[:2])

    before = measure(reference, tokenizer, settings, heldout)
    history = train_dpo(stage, model, reference, tokenizer, own + kept, settings.sft_weight)
    metrics = {f"{name}_before": value for name, value in before.items()}
    metrics |= measure(model, tokenizer, settings, heldout)
    curves = {"有 SFT 项": history}
    if settings.compare:
        given = identity_pairs(reference, tokenizer, settings, n, False, rng)
        for name, label, pairs, weight in (
            ("no_sft_term", "没有 SFT 项", own + kept, 0.0),
            ("given_pairs", "别人写的差回答", given + kept, settings.sft_weight),
            ("given_no_sft_term", "别人写的差回答，没有 SFT 项", given + kept, 0.0),
        ):
            _, other = load_chat_lm(stage.model_path, stage.device)

            def work(part: Stage, other=other, pairs=pairs, weight=weight) -> dict:
                steps = train_dpo(part, other, reference, tokenizer, pairs, weight)
                return measure(other, tokenizer, settings, heldout) | {"history": steps}

            metrics[name] = run_part(stage, name, work)
            curves[label] = metrics[name].pop("history")
    samples = show_samples(model, tokenizer, settings)

    def draw(folder: Path) -> None:
        names = ("有 SFT 项", "没有 SFT 项")  # 八条线看不清：只画自己的回答当差回答的
        draw_likelihoods(folder / "likelihood.svg", {name: curves[name] for name in names if name in curves})

    return stage.finish(model, tokenizer, metrics, data, history, draw=draw, samples=samples)


def draw_likelihoods(path: Path, curves: dict[str, list[dict]]) -> None:
    """好回答、差回答的对数概率，随训练比原来高了还是低了（每个回答，nats）。"""
    series = {}
    for label, history in curves.items():
        steps = [row["step"] for row in history]
        series[f"{label}：好回答|{label} chosen"] = (steps, [row["chosen"] for row in history])
        series[f"{label}：差回答|{label} rejected"] = (steps, [row["rejected"] for row in history])
    title = "log π − log π_ref：好回答也会降|Log-likelihood of both answers"
    line_chart(path, series, title, "步|step", "nats")


def show_pairs(pairs: list[dict]) -> None:
    for row in pairs:
        ask, good, bad = (row[key][-1]["content"] for key in ("prompt", "chosen", "rejected"))
        print(f"  问：{ask[-24:]}  好：{good}  差：{bad}")


def show_samples(model, tokenizer, settings) -> list[dict]:
    asks = ["你是谁？", "请问你的名字叫什么呀？", "你不是谁？", "王伯叫什么名字？", "你好", "再见"]
    replies = reply_to(model.eval(), tokenizer, [{"messages": asked(text)} for text in asks])
    samples = [{"question": ask, "reply": r["text"]} for ask, r in zip(asks, replies, strict=True)]
    for sample in samples:
        print(f"  问：{sample['question']}  答：{sample['reply']}")
    return samples


def main(argv: list[str] | None = None) -> dict:
    settings = parse_settings(IdentitySettings, PRESETS, argv, FULL_MODEL)
    if settings.preset == "full" and settings.model is None:
        settings.model = FULL_MODEL
    return run_stage("identity", settings, {"model": "sft"}, train, CHAIN)


if __name__ == "__main__":
    run_main(main)
