"""阶段、模型、指标在终端和网页里叫什么，以及 tiny 预设里各阶段应当达到的数。"""

from __future__ import annotations

# 指标 → (名字, 几位小数)
METRICS = {
    "qa_accuracy": ("答对（贪心）", 3),
    "preferred_rate": ("又对又完整又有礼（采样）", 3),
    "judge_score": ("程序评分（采样，0～1）", 3),
    "ended_rate": ("自己说完", 3),
    "small_talk": ("寒暄回得对（13 句）", 3),
    "reward_mean": ("奖励模型的平均分", 2),
    "mean_chars": ("平均字数", 1),
    "distinct_2": ("distinct-2（用词多样）", 3),
    "kl_to_sft": ("对 SFT 的 KL（nats/token）", 3),
    "n": ("题数", 0),
}

# 各阶段看什么：(阶段, 指标, 名字, 方向, 目标)。目标是数、由各阶段的指标算出的数，或者没有。
HIGHLIGHTS = [
    ("pretrain", "heldout_loss", "留出损失（nats/token）", "", None),
    ("pretrain", "loss_over_floor", "留出损失 ÷ 语法的熵", "≤", 1.03),
    ("pretrain", "recap_accuracy", "回顾题接对", "≥", 0.98),
    ("pretrain", "qa_accuracy", "问答答对（还不会对话）", "≤", 0.05),
    ("sft", "heldout_loss", "留出损失（nats/token）", "", None),
    ("sft", "qa_accuracy", "答对（贪心）", "≥", 0.97),
    ("sft", "ended_rate", "自己说完", "≥", 0.99),
    ("sft", "preferred_rate", "又对又完整又有礼（采样）", "≤", 0.50),
    ("reward", "pair_accuracy", "留出偏好对判对", "≥", 0.97),
    ("dpo", "preference_accuracy", "留出偏好对判对（隐式奖励）", "", None),
    ("dpo", "preferred_rate", "又对又完整又有礼（采样）", "≥", 0.95),
    ("dpo", "qa_accuracy", "答对（贪心）", "≥", lambda s: s["sft"]["qa_accuracy"] - 0.02),
    (
        "ppo",
        "reward_mean",
        "奖励模型的平均分",
        "≥",
        lambda s: s["ppo"]["reward_mean_before"] + s["ppo"]["reward_std_before"],
    ),
    ("ppo", "judge_score", "程序评分（奖励模型没见过）", "＞", lambda s: s["ppo"]["judge_score_before"]),
    ("ppo", "preferred_rate", "又对又完整又有礼（采样）", "≥", 0.90),
    ("ppo", "qa_accuracy", "答对（贪心）", "≥", lambda s: s["sft"]["qa_accuracy"] - 0.03),
    ("ppo", "small_talk", "寒暄回得对（13 句）", "≥", 12 / 13),
    ("ppo", "kl_to_sft", "对 SFT 的 KL（nats/token）", "＜", 0.6),
    ("grpo", "judge_score", "程序评分（采样）", "≥", 0.96),
    ("grpo", "preferred_rate", "又对又完整又有礼（采样）", "≥", 0.95),
    ("grpo", "qa_accuracy", "答对（贪心）", "≥", lambda s: s["sft"]["qa_accuracy"] - 0.03),
    ("grpo", "small_talk", "寒暄回得对（13 句）", "≥", 12 / 13),
]
_REACHED = {
    "≤": lambda value, target: value <= target,
    "≥": lambda value, target: value >= target,
    "＜": lambda value, target: value < target,
    "＞": lambda value, target: value > target,
}


def highlights(stages: dict[str, dict], with_targets: bool) -> list[dict]:
    """→ ``[{"stage", "label", "before", "value", "target", "reached"}]``；没有的项是 None，没量的指标不列。"""
    rows = []
    for stage, key, label, sign, target in HIGHLIGHTS:
        metrics = stages.get(stage, {})
        if key not in metrics:
            continue
        row = {"stage": stage, "label": label, "before": metrics.get(f"{key}_before"), "value": metrics[key]}
        row |= {"target": None, "reached": None}
        if with_targets and target is not None:
            try:
                bound = target(stages) if callable(target) else target
            except KeyError:  # 要比的那个阶段没有量
                pass
            else:
                row["target"] = f"{sign} {bound:.3g}"
                row["reached"] = _REACHED[sign](metrics[key], bound)
        rows.append(row)
    return rows
