"""注意力滚动与注意力流：几层注意力叠起来，最后那个位置到底取了谁的内容。

你会学到
  1. 单看一层、一个头会看错：到第二层时，"某个位置"里装的早已不只是那个 token，而是它在第一层取来的东西。
  2. 滚动（rollout）：每层的注意力加上残差（自己留给自己），各层的矩阵乘起来，就是一路走下来的份额。
  3. 流（flow）：把每条注意力当作水管的粗细，问从某个 token 最多能有多少水流到最后（最大流）。
  4. 谁说得准可以量：小世界的语法知道答案抄自哪里，五百道题上数一数各种看法指对了几次。

怎么运行
  python rollout_and_flow.py                     # Qwen 链 tiny 的 SFT 模型（没有就当场训练）
  python rollout_and_flow.py --hand              # 这里手写的编码器
  python rollout_and_flow.py --model smollm2     # 真模型（英文事实题）

应当看到（tiny，实测见本文件夹的 README.md）：单个的头最好的也指不对一半，两层滚动起来指对四分之三以上。

参考：Abnar & Zuidema 2020（Quantifying Attention Flow in Transformers）；Kobayashi et al. 2020（看权重还要看值的大小）。
"""

from nlp_common.base.cli import run_main

from collections import deque
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch

from hand_transformer import hand_example
from nlp_common.base.arguments import COUNT, option
from nlp_common.draw.plots import bar_chart
from nlp_common.train.lesson import run_lesson
from nlp_common.train.settings import parse_settings
from nlp_common.train.stage import Stage
from questions import chance, describe, hits, make_questions
from readers import (
    HOME,
    ReaderSettings,
    attention_maps,
    find_reader,
    lesson_name,
    load_reader,
    need_language_model,
)
from strips import Strip, write_strips

PRESETS = {
    "tiny": {"questions": 504, "flow_questions": 64},
    "full": {"questions": 40, "flow_questions": 4},
}
SMALL = 1e-12  # 比它还细的水管当作没有


@dataclass
class RolloutSettings(ReaderSettings):
    questions: int | None = option("多少道知道答案在哪里的题", limits=COUNT)
    flow_questions: int | None = option("其中多少道也算最大流（它慢得多）", limits=COUNT)
    hand: bool = option("不看语言模型，看这里手写的编码器（hand_transformer.py）", False)
    residual: float = option("每层里，残差（自己留给自己）占多大份额", 0.5)

    def check(self) -> None:
        from nlp_common.base.errors import UserError

        if not 0 <= self.residual < 1:
            raise UserError(f"--residual 要在 0 到 1 之间（不含 1），给的是 {self.residual:g}。")


# ---------------------------------------------------------------- 1. 滚动


def with_residual(weights: torch.Tensor, residual: float) -> torch.Tensor:
    """一层的注意力 (H, T, T) → (T, T)：各头平均，再加上残差。一层的输出是 x + 注意力(x)，x 自己也传了下去。"""
    mean = weights.mean(0)  # (T, T)
    mixed = (1 - residual) * mean + residual * torch.eye(len(mean))
    return mixed / mixed.sum(-1, keepdim=True)


def rollout(maps: list[torch.Tensor], residual: float = 0.5) -> list[torch.Tensor]:
    """各层的注意力 (H, T, T) → 到每一层为止的份额，各 (T, T)（Abnar & Zuidema 2020 式 1）。

    R_1 = A_1，R_l = A_l · R_{l−1}：位置 i 在第 l 层取了位置 k 多少，k 里又装着 token j 多少，相乘，对 k 求和。
    """
    shares = []
    for weights in maps:
        layer = with_residual(weights, residual)  # (T, T)
        shares.append(layer if not shares else layer @ shares[-1])
    return shares


# ---------------------------------------------------------------- 2. 流


def attention_flow(maps: list[torch.Tensor], target: int, residual: float = 0.5) -> torch.Tensor:
    """从每个输入 token 到最后一层 target 位置的最大流，(T,)（Abnar & Zuidema 2020 第 3 节）。

    图有 L+1 层、每层 T 个点；第 l 层的点 i 与下面一层的点 j 之间，是一根粗细为 A_l[i, j] 的水管。
    与滚动不同：滚动把一路的份额相乘，流看的是一路上最细的地方。
    """
    size = len(maps[0][0])
    pipes: list[dict[int, float]] = [{} for _ in range((len(maps) + 1) * size)]
    for number, weights in enumerate(maps):
        layer = with_residual(weights, residual)
        for i in range(size):
            for j in range(size):
                if layer[i, j] > SMALL:
                    above, below = (number + 1) * size + i, number * size + j
                    pipes[below][above] = float(layer[i, j])
    sink = len(maps) * size + target
    return torch.tensor([max_flow(pipes, source, sink) for source in range(size)])


def max_flow(pipes: list[dict[int, float]], source: int, sink: int) -> float:
    """最大流（Edmonds & Karp 1972）：反复找一条还走得通的最短的路，灌满它，直到没有路。

    pipes[u][v] 是从 u 到 v 的水管有多粗；灌了多少，就在反方向添上多少，以后的路可以退回来。
    """
    left = [dict(each) for each in pipes]
    total = 0.0
    while True:
        came_from = {source: source}
        waiting = deque([source])
        while waiting and sink not in came_from:
            here = waiting.popleft()
            for there, room in left[here].items():
                if room > SMALL and there not in came_from:
                    came_from[there] = here
                    waiting.append(there)
        if sink not in came_from:
            return total
        path = [sink]
        while path[-1] != source:
            path.append(came_from[path[-1]])
        path.reverse()
        narrowest = min(left[u][v] for u, v in pairwise(path))
        for u, v in pairwise(path):
            left[u][v] -= narrowest
            left[v][u] = left[v].get(u, 0.0) + narrowest
        total += narrowest


# ---------------------------------------------------------------- 3. 谁指得准


def learn(stage: Stage, found: dict) -> dict:
    settings = stage.settings
    reader = load_reader(found)
    need_language_model(reader)
    kind = "tiny_world" if reader.trained_on == "tiny_world" else "facts"
    questions = make_questions(reader.tokenizer, kind, settings.questions, settings.seed)
    print(f"{len(questions)} 道题（{kind}），例如：{''.join(questions[0].pieces)!r}")
    print(
        f"答案是 {questions[0].word!r}，抄自第 {questions[0].source} 个 token；随手一指，指中的机会 {chance(questions):.3f}\n"
    )

    ways: dict[str, list] = {}  # 看法 → 每题一个 (T,) 的分
    for number, question in enumerate(questions):
        maps = attention_maps(reader.model, question.ids)  # 每层 (H, T, T)
        for name, score in views(maps, settings.residual).items():
            ways.setdefault(name, []).append(score)
        if number < settings.flow_questions:
            last = len(question.ids) - 1
            ways.setdefault("flow", []).append(attention_flow(maps, last, settings.residual))

    metrics = {"chance": chance(questions)}
    for name, scores in ways.items():
        metrics[f"hits_{name}"] = hits(scores, questions[: len(scores)])
    few = questions[: len(ways["flow"])]
    metrics["hits_rollout_same_questions"] = hits(ways["rollout"][: len(few)], few)
    heads = {name: value for name, value in metrics.items() if ".head" in name}
    metrics["hits_best_head"] = max(heads.values())
    print_table(metrics, reader.layers, reader.heads)

    def write(folder: Path) -> None:
        draw(folder, metrics, questions[0], ways, reader.layers)

    return stage.save(metrics, describe(questions, kind), write)


def views(maps: list[torch.Tensor], residual: float) -> dict[str, torch.Tensor]:
    """一道题的各种看法：从最后一个位置看，每个 token 得几分，(T,)。"""
    scores = {}
    for layer, weights in enumerate(maps):
        for head in range(len(weights)):
            scores[f"layer{layer}.head{head}"] = weights[head, -1]
        scores[f"layer{layer}"] = weights.mean(0)[-1]
    scores["rollout"] = rollout(maps, residual)[-1][-1]
    scores["rollout_without_residual"] = rollout(maps, 0.0)[-1][-1]
    return scores


def print_table(metrics: dict, layers: int, heads: int) -> None:
    print("指对了的题占多少（从最后一个位置看，故事里得分最高的 token 就在答案里）")
    for layer in range(layers):
        cells = "  ".join(f"头{head} {metrics[f'hits_layer{layer}.head{head}']:.3f}" for head in range(heads))
        print(f"  第 {layer} 层  平均 {metrics[f'hits_layer{layer}']:.3f}   {cells}")
    print(f"  滚动 {metrics['hits_rollout']:.3f}，不加残差 {metrics['hits_rollout_without_residual']:.3f}")
    print(f"  流 {metrics['hits_flow']:.3f}（同样几题上滚动 {metrics['hits_rollout_same_questions']:.3f}）\n")


def draw(folder: Path, metrics: dict, question, ways: dict, layers: int) -> None:
    shown = {f"第 {n} 层平均|layer {n}": metrics[f"hits_layer{n}"] for n in range(min(layers, 8))}
    shown |= {
        "最好的头|best head": metrics["hits_best_head"],
        "滚动|rollout": metrics["hits_rollout"],
        "流|flow": metrics["hits_flow"],
    }
    title = "最后的位置看的是不是答案|Does it point at the answer"
    bar_chart(folder / "hits.svg", {"指对的题|hits": shown}, title, "", "")
    story, marks = question.story, [place in question.source for place in question.story]
    pieces = [question.pieces[place] for place in story]
    rows = []
    for name, label in (
        *((f"layer{n}", f"第 {n} 层平均") for n in range(min(layers, 6))),
        ("rollout", "滚动"),
        ("flow", "流"),
    ):
        rows.append(Strip(label, pieces, [float(ways[name][0][place]) for place in story], marks))
    write_strips(
        folder / "rollout",
        rows,
        "各种看法把分给了故事里的谁",
        f"问：{question.slot}，答案“{question.word}”（方框）",
    )


# ---------------------------------------------------------------- 4. 手写的编码器


def learn_hand(stage: Stage) -> dict:
    """--hand：手写的两层编码器，看 [CLS] 那个位置。没有语法可比，画出来看。"""
    example = hand_example(stage.settings.seed)
    shares = rollout(example.maps, stage.settings.residual)
    flow = attention_flow(example.maps, 0, stage.settings.residual)
    rows = [
        Strip(f"第 {n} 层平均", example.pieces, maps.mean(0)[0].tolist())
        for n, maps in enumerate(example.maps)
    ]
    rows.append(Strip("滚动", example.pieces, shares[-1][0].tolist()))
    rows.append(Strip("流", example.pieces, flow.tolist()))
    print(f"{''.join(example.pieces)} → {example.answer}")
    for row in rows:
        print(
            f"  {row.label}  "
            + "  ".join(f"{p} {s:.2f}" for p, s in zip(row.pieces, row.scores, strict=True))
        )

    def write(folder: Path) -> None:
        write_strips(folder / "rollout", rows, "手写的编码器：[CLS] 看谁", example.answer)

    metrics = {
        "accuracy": example.accuracy,
        "hand_rollout_feeling": float(shares[-1][0][example.feeling].sum()),
    }
    return stage.save(metrics, example.data, write)


def main(argv: list[str] | None = None) -> dict:
    settings = parse_settings(RolloutSettings, PRESETS, argv, None)
    if settings.hand:
        return run_lesson(lesson_name("rollout_and_flow", settings), HOME, settings, learn_hand)
    found = find_reader(settings)
    name = lesson_name("rollout_and_flow", settings)
    return run_lesson(name, HOME, settings, partial(learn, found=found), model_id=found["id"])


if __name__ == "__main__":
    run_main(main)
