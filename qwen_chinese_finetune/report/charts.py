"""报告里的图：每个函数从运行记录里取数，返回几张图（SVG 文字）；没有数可画的就少画一张。"""

from __future__ import annotations

from pathlib import Path

from chain import MODELS
from nlp_common.draw.plots import bar_chart, histogram, line_chart
from report.metrics import METRICS

KINDS = {
    "courteous": "有礼的整句",
    "plain": "整句",
    "terse": "一个词",
    "wrong": "答错",
    "unhelpful": "敷衍",
    "small_talk": "寒暄",
}
ACCURACY = ("qa_accuracy", "preferred_rate", "judge_score")  # 都在 0 到 1 之间，可以画在一起


def _curve(history: list[dict], key: str) -> tuple[list[float], list[float]]:
    points = [(row["step"], row[key]) for row in history if key in row]
    return [step for step, _ in points], [value for _, value in points]


def _lines(records: dict, title: str, ylabel: str, wanted: list[tuple[str, str, str]], **hlines) -> list[str]:
    """wanted：(阶段, 历史里的列, 图例)。"""
    series = {
        label: _curve(records[stage]["history"], key) for stage, key, label in wanted if stage in records
    }
    series = {label: curve for label, curve in series.items() if curve[0]}
    return [line_chart(None, series, title, "步", ylabel, **hlines)] if series else []


def save_pictures(folder: Path, records: dict) -> None:
    """README 里的几张：各阶段的损失、奖励模型给各类回答的分、DPO 的 margin；没有的阶段就不画。"""
    lines = [
        ("pretrain", "loss", "预训练的损失", "nats/token", "pretrain-loss"),
        ("sft", "loss", "SFT 的损失（只算助手的 token）", "nats/token", "sft-loss"),
        ("dpo", "rewards/margins", "DPO：好、差回答的隐式奖励之差", "β·nats", "dpo-margin"),
        ("ppo", "score", "PPO：奖励模型给采样回答的平均分", "分", "ppo-score"),
        ("grpo", "score", "GRPO：采样回答的平均分", "分", "grpo-score"),
    ]
    for stage, key, title, ylabel, name in lines:
        if stage not in records:
            continue
        metrics = records[stage]["metrics"]
        floor = {"语法的熵（下限）": metrics["entropy_floor"]} if "entropy_floor" in metrics else None
        series = {"训练": _curve(records[stage]["history"], key)}
        line_chart(folder / f"{name}.svg", series, title, "步", ylabel, hlines=floor)
    kinds = records.get("reward", {}).get("metrics", {}).get("mean_score")
    if kinds:
        bars = {"平均分": {KINDS.get(kind, kind): score for kind, score in kinds.items()}}
        bar_chart(folder / "reward-kinds.svg", bars, "奖励模型给各类回答的平均分", "", "分")


def loss_charts(records: dict) -> list[str]:
    """预训练（画出语法的熵：任何模型都低不过它）、SFT、奖励模型、DPO 的损失，与偏好对的正确率。"""
    floor = records.get("pretrain", {}).get("metrics", {}).get("entropy_floor")
    hlines = {"语法的熵（下限）": floor} if floor else None
    pair_accuracy = [
        ("reward", "accuracy", "奖励模型"),
        ("dpo", "rewards/accuracies", "DPO 的隐式奖励"),
    ]
    return [
        *_lines(records, "预训练的损失", "nats/token", [("pretrain", "loss", "训练损失")], hlines=hlines),
        *_lines(records, "SFT 的损失（只算助手的 token）", "nats/token", [("sft", "loss", "训练损失")]),
        *_lines(
            records,
            "成对的损失 −log σ(好 − 差)",
            "nats/对",
            [("reward", "loss", "奖励模型"), ("dpo", "loss", "DPO")],
        ),
        *_lines(records, "训练中的偏好对判对多少", "比例", pair_accuracy),
        *_lines(records, "DPO：好、差回答的隐式奖励之差", "β·nats", [("dpo", "rewards/margins", "margin")]),
    ]


def ppo_charts(records: dict) -> list[str]:
    charts = [
        ("奖励模型给采样回答的平均分", "分", [("ppo", "score", "奖励")]),
        ("程序给采样回答的评分（奖励模型没见过）", "0～1", [("ppo", "judge_score", "程序评分")]),
        ("对 SFT 的 KL（采样估计）", "nats/token", [("ppo", "kl", "KL")]),
        ("回答的长度", "token", [("ppo", "length", "长度")]),
        ("被裁剪的 token 占比", "比例", [("ppo", "clip_fraction", "裁剪")]),
        ("价值损失", "损失", [("ppo", "value_loss", "价值损失")]),
    ]
    return [svg for title, ylabel, wanted in charts for svg in _lines(records, title, ylabel, wanted)]


def grpo_charts(records: dict) -> list[str]:
    """损失不画：按策略自己采的一批，它总是 0。"""
    charts = [
        ("采样回答的平均分（奖励）", "分", [("grpo", "score", "奖励")]),
        (
            "优势的大小 |A| 与没有信号的组",
            "",
            [("grpo", "advantage", "|A|"), ("grpo", "zero_groups", "没有信号的组")],
        ),
        ("回答的长度", "token", [("grpo", "length", "长度")]),
    ]
    return [svg for title, ylabel, wanted in charts for svg in _lines(records, title, ylabel, wanted)]


def accuracy_chart(models: dict[str, dict]) -> list[str]:
    """各模型的正确率并排；没有标准答案的题没有这张图。"""
    series = {
        METRICS[key][0].split("（")[0]: {MODELS[name]: each[key] for name, each in models.items()}
        for key in ACCURACY
        if models and all(key in each for each in models.values())
    }
    return [bar_chart(None, series, "各阶段的模型，同样的题", "", "比例")] if series else []


def length_chart(answers: list[dict]) -> list[str]:
    """各模型的回答有多长。预训练模型不会停，几乎都写满上限，画上它别的就看不清了。"""
    names = [name for name in answers[0]["replies"] if name != "base"] if answers else []
    if not names:
        return []
    lengths = {MODELS[name]: [len(row["replies"][name]["text"]) for row in answers] for name in names}
    longest = max(max(values) for values in lengths.values())
    bins = longest if 2 <= longest <= 40 else 30  # 短回答一字一格，免得格子的宽窄造出假的起伏
    return [
        histogram(None, lengths, "回答长度的分布（预训练模型不会停，没有画）", "字数", "回答数", bins=bins)
    ]
