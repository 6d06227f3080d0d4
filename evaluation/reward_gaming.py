"""拿检查器当奖励来训练：模型学会的是让检查器满意，不是按要求答题。

两种奖励，别的都一样：
    form   合格的要求占几成
    both   上面的 × 答对没有（小世界里程序知道对错）
训练是 GRPO 最简单的一种（Shao et al. 2024）：一题写 G 个回答，奖励减去同组的平均、除以标准差，就是优势 A；
每批只更新一遍，概率比总是 1，裁剪用不上，损失就是 −A·log π。完整的 GRPO 在 qwen_chinese_finetune/grpo_alignment.py。
"""

from __future__ import annotations

import re
from html import escape
from pathlib import Path

import torch

from answering import load_answerer, replies
from instructions_zh import follows_strict
from nlp_common.draw.figures import BROWSER_FONTS
from nlp_common.draw.plots import line_chart
from nlp_common.lm.replies import MAX_REPLY, reply_of
from nlp_common.lm.rollout import group_logps, roll_out, with_prompts
from nlp_common.tiny.judge import judge
from nlp_common.train.progress import progress_bar
from nlp_common.train.stage import Stage

REWARDS = {"form": "只看形式", "both": "形式 × 对错"}
GROUP, QUESTIONS = 8, 16  # 一题几个回答，一步几道题
EPSILON = 1e-4  # 除以标准差时加上它


def train_on_reward(
    part: Stage, kind: str, model: str, source: str, rows: list[dict], heldout: list[dict]
) -> dict:
    """从 model 开始，用 kind 这种奖励训练 settings.steps 步；返回各步的分，和留出题的贪心回答。"""
    settings = part.settings
    answerer = load_answerer(model, source)
    policy, tokenizer = answerer.model.requires_grad_(True), answerer.tokenizer
    rows = with_prompts(tokenizer, rows)  # "prompt" 变成 token
    optimizer = torch.optim.AdamW(policy.parameters(), settings.learning_rate, weight_decay=0.0)
    history: list[dict] = []
    bar = progress_bar(REWARDS[kind], settings.steps)
    for step in range(settings.steps):
        for each in optimizer.param_groups:
            each["lr"] = settings.learning_rate * min(1, (step + 1) / 5) * (1 - step / settings.steps)
        asked = [rows[(step * QUESTIONS + i) % len(rows)] for i in range(QUESTIONS)]
        generator = torch.Generator(policy.device).manual_seed(settings.seed * 1_000_003 + step)

        # 1. 一题写 G 个回答，打分
        rollout = roll_out(
            policy, [row["prompt"] for row in asked], tokenizer, MAX_REPLY, 1.0, generator, group=GROUP
        )
        lengths = rollout.mask.sum(1).tolist()
        said = [
            reply_of(tokenizer, ids[:n]) for ids, n in zip(rollout.responses.tolist(), lengths, strict=True)
        ]
        asked = [row for row in asked for _ in range(GROUP)]
        form = [form_reward(row, reply) for row, reply in zip(asked, said, strict=True)]
        right = [is_right(row, reply) for row, reply in zip(asked, said, strict=True)]
        rewards = torch.tensor(form) * (torch.tensor(right) if kind == "both" else 1.0)  # (N,)

        # 2. 比同组的平均好多少；3. 好的多说，差的少说
        advantages = group_advantages(rewards.to(policy.device))  # (N,)
        loss = policy_loss(group_logps(policy, rollout, GROUP), advantages, rollout.mask)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

        history.append({"step": step + 1, "form": sum(form) / len(form), "right": sum(right) / len(right)})
        bar.update(1)
        if (step + 1) % 20 == 0:
            now = history[-1]
            bar.write(
                f"  {step + 1:>3} 步  形式 {now['form']:.2f}  答对 {now['right']:.2f}  例：{said[0]['text']}"
            )
    bar.close()
    policy.eval().requires_grad_(False)
    answers = replies(answerer, heldout, MAX_REPLY)
    return {
        "history": history,
        "answers": [{"text": reply["text"], "ended": reply["ended"]} for reply in answers],
    }


def group_advantages(rewards: torch.Tensor) -> torch.Tensor:
    """(N,) 的奖励，相邻 GROUP 个是同一道题的 → 优势 (N,)：减去组平均，除以组的标准差。"""
    grouped = rewards.view(-1, GROUP)  # (B, G)
    centred = grouped - grouped.mean(1, keepdim=True)
    return (centred / (grouped.std(1, keepdim=True) + EPSILON)).flatten()


def policy_loss(logps: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """−A·log π，每个回答 token 一样重。logps、mask：(N, R)。"""
    return -(advantages[:, None] * logps * mask).sum() / mask.sum()


def form_reward(row: dict, reply: dict) -> float:
    """合格的要求占几成；没说完的是 0。"""
    if not reply["ended"]:
        return 0.0
    checks = zip(row["instruction_id_list"], row["kwargs"], strict=True)
    followed = [follows_strict(id, kwargs, reply["text"]) for id, kwargs in checks]
    return sum(followed) / len(followed)


def is_right(row: dict, reply: dict) -> float:
    """小世界的评判：含标准答案，不含同类的别的词，自己说完。"""
    return float(judge(row["question"], reply["text"], reply["ended"]).right)


# ---------------------------------------------------------------- 图


def draw_gaming(path: Path, histories: dict[str, list[dict]], examples: list[dict]) -> None:
    """上面是各步的形式分与答对的比例，下面是几道题训练前后的回答。

    examples：``{"asks": 要求, "right": 标准答案, "answers": {谁: 回答}}``。
    """
    curves = {}
    for kind, history in histories.items():
        steps = [row["step"] for row in history]
        for name, title, english in (("form", "形式分", "form"), ("right", "答对", "right")):
            label = f"奖励={REWARDS[kind]}：{title}|reward {kind}: {english}"
            curves[label] = (steps, smooth([row[name] for row in history]))
    title = "拿检查器当奖励：形式分升，答对的降|Reward = checker"
    chart = line_chart(None, curves, title, "训练步数|step", "采样的回答，5 步平均|sampled answers")
    size = re.search(r'width="([\d.]+)pt" height="([\d.]+)pt"', chart)
    width, height = float(size[1]), float(size[2])
    # 嵌在另一张图里：尺寸不带单位，与外面的坐标一样
    chart = chart.replace(size[0], f'width="{width:g}" height="{height:g}"', 1)
    chart = re.sub(r' style="max-width[^"]*"', "", chart, count=1)
    lines = []
    for example in examples:
        lines.append((f"要求：{example['asks']}（标准答案：{example['right']}）", "#1f2a44", True))
        lines += [(f"{who}　{answer}", "#37474f", False) for who, answer in example["answers"].items()]
        lines.append(("", "", False))
    shapes, y = [], height + 22
    for text, color, bold in lines:
        if text:
            weight = ' font-weight="600"' if bold else ""
            shapes.append(f'<text x="14" y="{y:.0f}" fill="{color}"{weight}>{escape(text)}</text>')
        y += 17 if text else 8
    path.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {y:.0f}" width="{width:.0f}" '
        f'height="{y:.0f}" font-family="{escape(BROWSER_FONTS)}" font-size="11.5">'
        f'<rect width="100%" height="100%" fill="#fff"/>{chart}{"".join(shapes)}</svg>\n',
        encoding="utf-8",
    )


def smooth(values: list[float], width: int = 5) -> list[float]:
    """最近 width 个的平均：一步只有十几道题，起伏大。"""
    starts = [max(0, place - width + 1) for place in range(len(values))]
    return [sum(values[a : b + 1]) / (b + 1 - a) for b, a in enumerate(starts)]
