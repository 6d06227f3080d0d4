"""R1-Zero 的一刻：只说对不对，不教怎样想，模型自己学会先想再答。半分钟，从瞎猜到九成半。

学到什么：模型在教材里见过写全步骤的解，可是聊天的数据里几乎都是一口说出答案，于是它也一口说出，十次对一次。GRPO 只给 0 分或 1 分；
先想的才常常对，于是先想的越来越多，正确率和长度一起涨。强化学习放大模型已经会的，不发明它不会的：从没见过步骤的，什么也学不到。

题是几个数字加起来，只要个位：

    3 1 4 1 5 9 =             短：  3<|im_end|>                            一口说出，十次对一次
                              长：  <think>348943</think>3<|im_end|>       一个一个加，几乎总是对

运行：
    python r1_zero.py                        # 教材、聊天、GRPO、同样秒数的监督训练，连同图
    python r1_zero.py --sweep true           # 再扫：聊天里先想的占几成，一组几个回答

预期输出（实测见 README.md）：正确率从一成到九成半以上，先想的从百分之几到几乎全部；同样秒数的监督训练仍是一成。

参考：DeepSeek-AI 2025（R1-Zero）；arXiv 2510.11495（短的长的混着预训练，强化学习为什么让长的多起来）；Yue et al. 2025（放大而不发明）。
"""

from nlp_common.base.cli import run_main

import math
import random
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch
from accelerate import Accelerator
from transformers import Qwen2Config, Qwen2ForCausalLM

from grpo_alignment import GRPOSettings, grpo_step
from grpo_rewards import sample
from nlp_common.base.arguments import COUNT, POSITIVE, SHARE, Limits, option
from nlp_common.base.errors import UserError
from nlp_common.draw.plots import line_chart
from nlp_common.lm.loading import make_fast
from nlp_common.lm.losses import IGNORE, token_logps
from nlp_common.train.lesson import run_lesson, run_part
from nlp_common.train.loop import train_loop
from nlp_common.train.progress import progress_bar
from nlp_common.train.settings import LoopSettings, parse_settings
from nlp_common.train.stage import Stage

HOME = Path(__file__).resolve().parent
END, PAD, EQUALS, THINK, THOUGHT = "<|im_end|>", "<pad>", "=", "<think>", "</think>"
SHARES, GROUPS = (0.0, 0.02, 0.1, 0.5), (2, 4, 8, 16)
PRESETS: dict[str, dict] = {
    "tiny": {"n_digits": 8, "dim": 64, "max_train_samples": 24_000, "chat_rows": 12_000, "rl_steps": 60},
    "full": {"n_digits": 16, "dim": 128, "max_train_samples": 100_000, "chat_rows": 30_000, "rl_steps": 150},
}


@dataclass
class R1Settings(LoopSettings):
    COMMON: ClassVar[dict] = LoopSettings.COMMON | {
        "per_device_train_batch_size": 64,
        "learning_rate": 3e-3,
        "adam_beta2": 0.98,
        "logging_steps": 20,
    }
    n_digits: int | None = option("一道题几个数字", None, Limits(at_least=2, at_most=100))
    modulus: int = option("数字从 0 到几减一，加起来除以几的余数", 10, Limits(at_least=2, at_most=10))
    textbook_share: float = option("教材（--max_train_samples 道）里，写出步骤的占几成", 1.0, SHARE)
    chat_rows: int | None = option("聊天的数据有几道", None, COUNT)
    chat_learning_rate: float = option("在聊天的数据上的学习率", 1e-3, POSITIVE)
    long_share: float = option("聊天的数据里，写出步骤的占几成", 0.02, SHARE)
    dim: int | None = option("模型的宽度", None, COUNT)
    rl_steps: int | None = option("GRPO 走几步", None, COUNT)
    rl_learning_rate: float = option("GRPO 的学习率，线性降到 0", 1e-3, POSITIVE)
    num_generations: int = option("G：一道题写几个回答", 8)
    rl_prompts: int = option("GRPO 一步几道题", 32, COUNT)
    max_eval_samples: int = option("量正确率用几道没练过的题", 1000, COUNT)
    sweep: bool = option("再扫一遍：聊天里先想的占几成，一组几个回答", False)

    def check(self) -> None:
        if self.num_generations == 1:
            raise UserError("--num_generations 至少 2：一组只有一个回答，减去组平均永远是 0，什么也学不到。")
        if self.dim % 8:
            raise UserError(f"--dim 要是 8 的倍数（4 个头，每个头的宽度是偶数），给的是 {self.dim}。")


# ---------------------------------------------------------------- 1. 题、短的与长的解


class Characters:
    """一个字一个 token 的分词器；只有 GRPO 采样时用到的几样。"""

    vocab: ClassVar[list[str]] = [*"0123456789", EQUALS, THINK, THOUGHT, END, PAD]
    ids: ClassVar[dict[str, int]] = {token: i for i, token in enumerate(vocab)}
    eos_token_id, pad_token_id = ids[END], ids[PAD]

    def convert_tokens_to_ids(self, token: str) -> int:
        return self.ids[token]

    def decode(self, ids: list[int]) -> str:
        return "".join(self.vocab[i] for i in ids)


def question(rng: random.Random, settings) -> dict:
    digits = [rng.randrange(settings.modulus) for _ in range(settings.n_digits)]
    prompt = [*digits, Characters.ids[EQUALS]]  # 数字的编号就是它自己
    return {"prompt": prompt, "digits": digits, "answer": str(sum(digits) % settings.modulus)}


def solution(digits: list[int], modulus: int, long: bool) -> list[int]:
    """短的只有答案；长的先把加到每一位的余数写出来。"""
    ids, sums = Characters.ids, []
    for digit in digits:
        sums.append((digit + (sums[-1] if sums else 0)) % modulus)
    steps = [ids[THINK], *sums, ids[THOUGHT]] if long else []
    return [*steps, sums[-1], ids[END]]


def training_rows(settings, long_share: float, n: int, seed: str) -> list[dict]:
    """n 行 ``{"ids", "labels"}``：只在解上算损失，题目是随机数字，没有什么可学的。"""
    rng, rows = random.Random(seed), []
    for _ in range(n):
        asked = question(rng, settings)
        said = solution(asked["digits"], settings.modulus, rng.random() < long_share)
        rows.append({"ids": asked["prompt"] + said, "labels": [IGNORE] * len(asked["prompt"]) + said})
    return rows


def collate(rows: list[dict]) -> dict:
    width = max(len(row["ids"]) for row in rows)
    ids = [row["ids"] + [Characters.pad_token_id] * (width - len(row["ids"])) for row in rows]
    labels = [row["labels"] + [IGNORE] * (width - len(row["labels"])) for row in rows]
    return {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels)}


def solution_loss(model, batch: dict):
    return -token_logps(model, batch["input_ids"], batch["labels"]).sum(), {}


def verify(asked: dict, reply: str, ended: bool) -> float:
    """0 或 1：说完了，而且最后的答案对。中间想得对不对，一概不看。"""
    return float(ended and reply.rpartition(THOUGHT)[2] == asked["answer"])


def score(questions: list[dict], replies: list[dict], rollout) -> torch.Tensor:
    rewards = [verify(q, r["text"], r["ended"]) for q, r in zip(questions, replies, strict=True)]
    return torch.tensor(rewards, device=rollout.ids.device)


# ---------------------------------------------------------------- 2. 教材、聊天，量一量


def build_model(settings) -> Qwen2ForCausalLM:
    """两层的 Qwen2；种子由 stage 定好了。"""
    config = Qwen2Config(
        vocab_size=len(Characters.vocab),
        hidden_size=settings.dim,
        intermediate_size=4 * settings.dim,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.08,
        rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
        pad_token_id=Characters.pad_token_id,
        eos_token_id=Characters.eos_token_id,
    )
    return make_fast(Qwen2ForCausalLM(config))


def supervise(part: Stage, model, rows: list[dict], learning_rate: float, max_steps: int = 0) -> dict:
    """在写好的解上学续写 → 用了几秒。"""
    steps = max_steps or part.settings.max_steps
    part.settings = replace(part.settings, learning_rate=learning_rate, max_steps=steps)
    started = time.perf_counter()
    train_loop(part, "监督训练", model, rows, collate, solution_loss, [len(row["ids"]) for row in rows])
    return {"seconds": time.perf_counter() - started}


def measure(model, settings, group: int = 1, seed: int = 0) -> dict:
    """没练过的题上，温度 1 采样：正确率、先想的占几成、平均几个 token、逼它先想时对不对。"""
    rng = random.Random("heldout")  # 题有 modulus 的 n_digits 次方道，另抽的几乎不会是练过的
    rows = [question(rng, settings) for _ in range(settings.max_eval_samples)]
    answers = ask(model, rows, settings, group, seed)
    is_long = torch.tensor([reply["text"].startswith(THINK) for reply in answers.replies])
    forced = [row | {"prompt": row["prompt"] + [Characters.ids[THINK]]} for row in rows]
    grouped = answers.rewards.view(-1, group)
    return {
        "accuracy": answers.rewards.mean().item(),
        "long_share": is_long.float().mean().item(),
        "tokens": answers.rollout.mask.sum(1).float().mean().item(),
        "accuracy_when_long": ask(model, forced, settings, 1, seed).rewards.mean().item(),
        "zero_groups": (grouped == grouped[:, :1]).all(1).float().mean().item(),
        "example": answers.replies[0]["text"],
    }


@torch.no_grad()
def ask(model, rows: list[dict], settings, group: int, seed: int):
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    given = (score, Characters(), grpo_settings(settings, group), Accelerator(cpu=device.type == "cpu"))
    return sample(model, rows, *given, generator)


# ---------------------------------------------------------------- 3. GRPO：一步就是 grpo_alignment.py 的 grpo_step


def grpo_settings(settings, group: int) -> GRPOSettings:
    return GRPOSettings(
        num_generations=group,
        max_new_tokens=settings.n_digits + 4,  # 长的解正好写得下
        micro_batch_size=settings.rl_prompts * group,
        max_grad_norm=1.0,
    )


def reinforce(part: Stage, model, group: int) -> dict:
    settings = part.settings
    accelerator = Accelerator(cpu=part.device.type == "cpu")
    optimizer = torch.optim.AdamW(model.parameters(), settings.rl_learning_rate, weight_decay=0.0)
    chosen, history, started = grpo_settings(settings, group), [], time.perf_counter()
    bar = progress_bar("GRPO", settings.rl_steps, 0)
    for step in range(settings.rl_steps):
        for each in optimizer.param_groups:
            each["lr"] = settings.rl_learning_rate * (1 - step / settings.rl_steps)
        rng = random.Random(f"rl-{settings.seed}-{step}")
        rows = [question(rng, settings) for _ in range(settings.rl_prompts)]
        generator = torch.Generator(part.device).manual_seed(settings.seed * 1_000_003 + step)
        draw = partial(same_rows, rows)
        stats = grpo_step(model, None, optimizer, draw, score, Characters(), chosen, accelerator, generator)
        replies = stats.pop("answers").replies
        stats["long_share"] = sum(reply["text"].startswith(THINK) for reply in replies) / len(replies)
        history.append({"step": step + 1, **stats})
        part.report(history[-1])
        bar.update(1)
        if (step + 1) % settings.logging_steps == 0:
            bar.write(
                f"  {step + 1:>4} 步  对的 {stats['score']:.2f}  先想的 {stats['long_share']:.2f}"
                f"  没信号的组 {stats['zero_groups']:.0%}  例：{replies[0]['text']}"
            )
    bar.close()
    return {"seconds": time.perf_counter() - started, "history": history}


def same_rows(rows: list[dict], number: int) -> list[dict]:
    return rows


# ---------------------------------------------------------------- 4. 全课


def learn(stage: Stage) -> dict:
    settings = stage.settings
    base, chat_seconds = pretrain(stage, settings.textbook_share, settings.long_share)
    before = measure(base, settings)
    print(
        f"GRPO 之前：对 {before['accuracy']:.3f}，先想的 {before['long_share']:.3f}；"
        f"逼它先想，对 {before['accuracy_when_long']:.3f}。例：{before['example']}"
    )
    learned, after = reinforce_from(stage, base, "grpo", settings.num_generations)
    print(f"GRPO 之后：对 {after['accuracy']:.3f}，先想的 {after['long_share']:.3f}。例：{after['example']}")

    # 同样的秒数，接着在聊天的数据上监督训练
    whole = math.ceil(settings.chat_rows / settings.per_device_train_batch_size) * settings.num_train_epochs
    chat_steps = settings.max_steps if settings.max_steps > 0 else whole
    steps = max(1, round(learned["seconds"] / (chat_seconds / chat_steps)))
    rows = training_rows(settings, settings.long_share, settings.chat_rows, f"more-{settings.seed}")
    longer, rate = copy_of(base, settings), settings.chat_learning_rate
    given = {"model": longer, "rows": rows, "learning_rate": rate, "max_steps": steps}
    run_part(stage, "supervised", partial(supervise, **given), longer)
    supervised = measure(longer, settings)
    print(f"同样秒数的监督训练（{steps} 步）：对 {supervised['accuracy']:.3f}")

    names = ("accuracy", "long_share", "tokens", "accuracy_when_long")
    metrics = {f"{name}_before": before[name] for name in names} | {name: after[name] for name in names}
    metrics |= {
        "accuracy_sft_same_seconds": supervised["accuracy"],
        "long_share_sft_same_seconds": supervised["long_share"],
        "rl_seconds": learned["seconds"],
        "examples": [before["example"], after["example"]],
    }
    if settings.sweep:
        metrics |= sweep(stage, base, before)
    return stage.save(metrics, {}, partial(draw, learned["history"]), learned["history"])


def pretrain(stage: Stage, textbook_share: float, long_share: float) -> tuple[Qwen2ForCausalLM, float]:
    """先教材，再聊天 → (模型, 聊天那一段用了几秒)。"""
    settings = stage.settings
    base = build_model(settings).to(stage.device)
    rows = training_rows(settings, textbook_share, settings.max_train_samples, f"textbook-{settings.seed}")
    textbook = partial(supervise, model=base, rows=rows, learning_rate=settings.learning_rate)
    run_part(stage, f"textbook-{textbook_share:g}", textbook, base)
    rows = training_rows(settings, long_share, settings.chat_rows, f"chat-{settings.seed}")
    chats = partial(supervise, model=base, rows=rows, learning_rate=settings.chat_learning_rate)
    return base, run_part(stage, f"chat-{textbook_share:g}-{long_share:g}", chats, base)["seconds"]


def reinforce_from(stage: Stage, base, name: str, group: int) -> tuple[dict, dict]:
    """从 base 的副本开始做 GRPO → (历史与秒数, 量到的)"""
    policy = copy_of(base, stage.settings)
    return run_part(stage, name, partial(reinforce, model=policy, group=group), policy), measure(
        policy, stage.settings
    )


def copy_of(model, settings):
    other = build_model(settings).to(next(model.parameters()).device)
    other.load_state_dict(model.state_dict())
    return other


def sweep(stage: Stage, base, before: dict) -> dict:
    """聊天里先想的占几成、一组几个回答，各走同样的步数；没有信号的组，算的（每个回答对的概率是 p）与量的并排。"""
    settings, found = stage.settings, {}
    kinds = {"never": (0.0, 0.0)} | {f"share_{share:g}": (settings.textbook_share, share) for share in SHARES}
    for name, shares in kinds.items():
        model, _ = pretrain(stage, *shares)
        start = measure(model, settings)
        found[name] = sides(start, reinforce_from(stage, model, name, settings.num_generations)[1])
        print(f"  {name}：{start['accuracy']:.3f} → {found[name]['accuracy']:.3f}")
    p = before["accuracy"]
    for group in GROUPS:
        zero = {"zero_groups_formula": p**group + (1 - p) ** group}
        zero["zero_groups"] = measure(base, settings, group)["zero_groups"]
        found[f"group_{group}"] = (
            sides(before, reinforce_from(stage, base, f"group-{group}", group)[1]) | zero
        )
        print(
            f"  G = {group}：→ {found[f'group_{group}']['accuracy']:.3f}，没有信号的组"
            f"算的 {zero['zero_groups_formula']:.3f}，量的 {zero['zero_groups']:.3f}"
        )
    return found


def sides(before: dict, after: dict) -> dict:
    names = ("accuracy", "long_share")
    both = {f"{name}_before": before[name] for name in names} | {name: after[name] for name in names}
    return both | {"accuracy_when_long_before": before["accuracy_when_long"]}


def draw(history: list[dict], folder: Path) -> None:
    steps = [row["step"] for row in history]
    line_chart(
        folder / "r1_zero.svg",
        {
            "答对的|right": (steps, [row["score"] for row in history]),
            "先想再答的|thinks first": (steps, [row["long_share"] for row in history]),
        },
        "只说对不对，先想的自己多起来|Reward alone grows the thinking",
        "GRPO 的步数|GRPO step",
        "占几成|share",
    )


def main(argv: list[str] | None = None) -> dict:
    settings = parse_settings(R1Settings, PRESETS, argv)
    return run_lesson("r1_zero", HOME, settings, learn)


if __name__ == "__main__":
    run_main(main)
