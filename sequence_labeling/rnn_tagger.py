"""RNN、LSTM、GRU 各写一遍：门怎样让它记得住，只从左往右读缺了什么。

学到什么：三种循环单元的每一行公式（与 nn.RNN、nn.LSTM、nn.GRU 相同）；普通 RNN 的梯度隔几十个字就没了，
门怎样留住它；给字贴标签时，为什么还要从右往左再读一遍；LSTM 读一句话时三个门各在什么时候开关。

运行：
    python rnn_tagger.py
    python rnn_tagger.py --predict "江泽民主席昨天在上海会见了桥本龙太郎"   # 画出门怎样读这一句

预期输出（实测见本文件夹的 README.md）：隔 20 个符号，门先开着的 LSTM、GRU 学得会，RNN 和门半开的 LSTM 学不会；
参数个数差不多，双向的实体 F1 高出许多。

参考：Elman 1990（RNN）；Hochreiter & Schmidhuber 1997、Gers et al. 2000（LSTM 与遗忘门）；Cho et al. 2014（GRU）；
Bengio et al. 1994（梯度为什么消失）；Jozefowicz et al. 2015、Tallec & Ollivier 2018（门的偏置）。
"""

from nlp_common.base.cli import run_main

import json
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from safetensors.torch import load_model, save_model
from torch import nn

from bilstm_crf import count_sentences
from labeling import LabelSettings, all_tags, show_prediction
from long_sentences import MAX_CHARS, short_sentences
from nlp_common.base.arguments import COUNT, Limits, option
from nlp_common.base.errors import UserError
from nlp_common.base.runs import write_json
from nlp_common.draw.figures import render
from nlp_common.draw.plots import bar_chart, line_chart
from nlp_common.train.lesson import result_folder, run_lesson, run_part
from nlp_common.train.loop import train_loop
from nlp_common.train.settings import LoopSettings, parse_settings
from nlp_common.train.stage import Stage
from span_metrics import span_scores, spans_of
from tagged_files import Sentence, Span, load_splits, tags_of
from vocabulary import Vocabulary, collate

HOME = Path(__file__).resolve().parent
KINDS = ("rnn", "lstm", "gru")
GATES = {"rnn": 1, "lstm": 4, "gru": 3}  # 一步要算几组 H 个数
BUILT_IN = {"rnn": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}
KEYS, FILLERS = 8, 8  # 记忆题：记住 8 种里的哪一种；中间是 8 种没有用的
DISTANCES = (1, 2, 5, 10, 20, 40)
MEMORY = {  # 名字 → (哪一种单元，门的偏置)：偏置 3，门一开始就开着，σ(3) ≈ 0.95；RNN 没有门
    "rnn": ("rnn", 0.0),
    "lstm_half_open": ("lstm", 0.0),
    "lstm": ("lstm", 3.0),
    "gru": ("gru", 3.0),
}
EXAMPLE = "江泽民主席昨天在上海会见了桥本龙太郎。"

PRESETS = {
    "tiny": {"max_train_samples": 3000, "num_train_epochs": 4.0, "hidden_size": 64, "memory_steps": 250},
    "full": {"max_train_samples": 20000, "num_train_epochs": 4.0, "hidden_size": 128, "memory_steps": 1000},
}
TRAINING = {
    "max_length": MAX_CHARS,
    "dataset": "people_daily",
    "per_device_train_batch_size": 16,
    "learning_rate": 4e-3,
    "max_grad_norm": 5.0,
    "warmup_steps": 0.03,
}


@dataclass
class RnnSettings(LoopSettings, LabelSettings):
    COMMON: ClassVar[dict] = LoopSettings.COMMON | TRAINING
    NOT_IN_FINGERPRINT: ClassVar[set[str]] = (
        LoopSettings.NOT_IN_FINGERPRINT | LabelSettings.NOT_IN_FINGERPRINT
    )

    max_length: int | None = option("一段最多多少字；更长的在标点处切开", limits=COUNT)
    hidden_size: int | None = option(
        "单向的多宽；双向的每个方向窄些，参数个数差不多", limits=Limits(at_least=2)
    )
    memory_steps: int | None = option("记忆题每个距离训练几步", limits=COUNT)

    def check(self) -> None:
        super().check()
        if self.predict is not None and len(self.predict) > 60:
            raise UserError(f"--predict 有 {len(self.predict)} 个字：门的图一句最多画 60 个字。")


# ---------------------------------------------------------------- 1. 一步：x_t (B, E) 与 h_{t−1} (B, H) → h_t


class HandWrittenRNN(nn.Module):
    """一层、一个方向的 RNN、LSTM 或 GRU；参数的名字、形状、次序与 nn.RNN 等相同，可以原样抄过来。"""

    def __init__(self, kind: str, input_size: int, hidden_size: int):
        super().__init__()
        self.kind, self.hidden_size = kind, hidden_size
        rows, bound = GATES[kind] * hidden_size, 1 / math.sqrt(hidden_size)
        self.weight_ih_l0 = nn.Parameter(torch.empty(rows, input_size).uniform_(-bound, bound))
        self.weight_hh_l0 = nn.Parameter(torch.empty(rows, hidden_size).uniform_(-bound, bound))
        self.bias_ih_l0 = nn.Parameter(torch.empty(rows).uniform_(-bound, bound))
        self.bias_hh_l0 = nn.Parameter(torch.empty(rows).uniform_(-bound, bound))

    def rnn_step(self, from_x, h) -> torch.Tensor:
        """h_t = tanh(W x_t + U h_{t−1} + b)：旧的状态整个被改写。"""
        return torch.tanh(from_x + F.linear(h, self.weight_hh_l0, self.bias_hh_l0))

    def lstm_step(self, from_x, h, c):
        """c_t = f ∘ c_{t−1} + i ∘ g，h_t = o ∘ tanh(c_t)：f 接近 1、i 接近 0 时，c 原样传下去。"""
        gates = from_x + F.linear(h, self.weight_hh_l0, self.bias_hh_l0)  # (B, 4H)
        i, f, g, o = gates.chunk(4, 1)
        i, f, o = i.sigmoid(), f.sigmoid(), o.sigmoid()  # 输入门、遗忘门、输出门，都在 0 与 1 之间
        c = f * c + i * g.tanh()
        return o * c.tanh(), c, (i, f, o)

    def gru_step(self, from_x, h) -> torch.Tensor:
        """h_t = (1 − z) ∘ n + z ∘ h_{t−1}：z 接近 1 就留着旧的。重置门 r 决定算 n 时看多少旧的。"""
        x_r, x_z, x_n = from_x.chunk(3, 1)
        h_r, h_z, h_n = F.linear(h, self.weight_hh_l0, self.bias_hh_l0).chunk(3, 1)
        r, z = (x_r + h_r).sigmoid(), (x_z + h_z).sigmoid()
        n = torch.tanh(x_n + r * h_n)
        return (1 - z) * n + z * h

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, list]:
        """(B, T, E) → (每一步的 h (B, T, H), LSTM 每一步的三个门)。"""
        from_x = F.linear(x, self.weight_ih_l0, self.bias_ih_l0)  # (B, T, 组数·H)：与时间无关，一次算完
        h = c = x.new_zeros(len(x), self.hidden_size)
        outputs, gates = [], []
        for t in range(x.shape[1]):
            if self.kind == "rnn":
                h = self.rnn_step(from_x[:, t], h)
            elif self.kind == "gru":
                h = self.gru_step(from_x[:, t], h)
            else:
                h, c, opened = self.lstm_step(from_x[:, t], h, c)
                gates.append(opened)
            outputs.append(h)
        return torch.stack(outputs, 1), gates


# ---------------------------------------------------------------- 2. 记忆题：第一个符号是什么，隔多远还记得


class MemoryModel(nn.Module):
    """读一串符号，读完后说出第一个是什么。"""

    def __init__(self, kind: str, gate_bias: float, hidden_size: int = 32):
        super().__init__()
        self.embedding = nn.Embedding(KEYS + FILLERS, 16)
        self.rnn = HandWrittenRNN(kind, 16, hidden_size)
        self.output = nn.Linear(hidden_size, KEYS)
        if kind != "rnn":  # 第二组 H 个：LSTM 的遗忘门 f，GRU 的更新门 z，都是"旧的留多少"
            nn.init.constant_(self.rnn.bias_hh_l0[hidden_size : 2 * hidden_size], gate_bias)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        states, _ = self.rnn(self.embedding(ids))
        return self.output(states[:, -1])  # (B, 8)


def memory_batch(distance: int, size: int, generator: torch.Generator) -> torch.Tensor:
    """(B, distance + 1)：第一个是要记的，后面都是没用的。"""
    keys = torch.randint(KEYS, (size, 1), generator=generator)
    noise = torch.randint(KEYS, KEYS + FILLERS, (size, distance), generator=generator)
    return torch.cat([keys, noise], 1)


def learn_memory(name: str, settings: RnnSettings) -> dict[str, dict[str, float]]:
    """每个距离从头训练一个：→ 学会之后的正确率；以及训练之前，最后的状态还有多少随第一个符号变。"""
    kind, gate_bias = MEMORY[name]
    accuracy, gradient = {}, {}
    for distance in DISTANCES:
        torch.manual_seed(settings.seed)
        model = MemoryModel(kind, gate_bias)
        generator = torch.Generator().manual_seed(settings.seed)
        gradient[str(distance)] = first_gradient(model, distance, generator)
        optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
        for _ in range(settings.memory_steps):
            ids = memory_batch(distance, 32, generator)
            loss = F.cross_entropy(model(ids), ids[:, 0])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        with torch.no_grad():
            ids = memory_batch(distance, 500, generator)
            accuracy[str(distance)] = (model(ids).argmax(1) == ids[:, 0]).float().mean().item()
    return {"accuracy": accuracy, "gradient": gradient}


def first_gradient(model: MemoryModel, distance: int, generator: torch.Generator) -> float:
    """‖∂h_T / ∂x_1‖：最后的状态还有多少随第一个符号变。取 h_T 的一个随机方向来量，32 串平均。"""
    ids = memory_batch(distance, 32, generator)
    x = model.embedding(ids).detach().requires_grad_()
    states, _ = model.rnn(x)
    direction = torch.randn(states.shape[-1], generator=generator)
    (states[:, -1] @ direction).sum().backward()
    return x.grad[:, 0].norm(dim=1).mean().item()


# ---------------------------------------------------------------- 3. 标注：只从左往右，还是两边都读


class RNNTagger(nn.Module):
    """字向量 → RNN/LSTM/GRU → 每个字各猜各的标签。用 nn 里的（与上面手写的相同，快些）。"""

    def __init__(self, kind: str, n_chars: int, n_tags: int, hidden_size: int, both_ways: bool):
        super().__init__()
        width = hidden_size * 5 // 8 if both_ways else hidden_size  # 双向的窄些，参数个数差不多
        self.embedding = nn.Embedding(n_chars + 2, 64, padding_idx=0)
        self.rnn = BUILT_IN[kind](64, width, batch_first=True, bidirectional=both_ways)
        self.output = nn.Linear(width * (2 if both_ways else 1), n_tags)

    def emissions(self, chars: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        x = F.dropout(self.embedding(chars), 0.2, self.training)  # (B, T, 64)
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
        states, _ = nn.utils.rnn.pad_packed_sequence(self.rnn(packed)[0], batch_first=True)
        return self.output(states)  # (B, T, K)

    def forward(self, chars, lengths, tags, **_) -> torch.Tensor:
        losses = F.cross_entropy(self.emissions(chars, lengths).transpose(1, 2), tags, reduction="none")
        return (losses * (torch.arange(tags.shape[1], device=tags.device) < lengths[:, None])).sum(1)  # (B,)


def batch_loss(model: RNNTagger, batch: dict) -> tuple[torch.Tensor, dict]:
    return model(**batch).sum(), {}


def train_one(
    part: Stage, label: str, model: RNNTagger, rows: list[dict], test: list[Sentence], vocabulary, tags
):
    lengths = [len(row["chars"]) for row in rows]
    train_loop(part, label, model, rows, collate, batch_loss, lengths, lengths, count_sentences)
    model.cpu()
    found = [spans_of(each) for each in tag_sentences(model, vocabulary, test, tags)]
    f1 = span_scores([s.spans for s in test], found)["f1"]
    return {"entity_f1": f1, "parameters": sum(p.numel() for p in model.rnn.parameters())}


@torch.no_grad()
def tag_sentences(model: RNNTagger, vocabulary: Vocabulary, sentences: list[Sentence], tags: list[str]):
    model.eval()
    found = []
    for start in range(0, len(sentences), 64):
        rows = sentences[start : start + 64]
        batch = collate([{"chars": vocabulary.encode(s.chars)["chars"]} for s in rows])
        paths = model.emissions(**batch).argmax(2).tolist()
        found += [[tags[k] for k in path[: len(s.chars)]] for path, s in zip(paths, rows, strict=True)]
    return found


# ---------------------------------------------------------------- 4. 门：用手写的看见 nn.LSTM 里面


@torch.no_grad()
def gates_of(model: RNNTagger, vocabulary: Vocabulary, chars: list[str]) -> dict[str, torch.Tensor]:
    """训练好的单向 nn.LSTM 的权重抄进手写的，读一句：→ 三个门，各 (T, H)。nn.LSTM 自己不给看门。"""
    hand = HandWrittenRNN("lstm", 64, model.rnn.hidden_size)
    hand.load_state_dict(model.rnn.state_dict())
    x = model.embedding(torch.tensor([vocabulary.encode(chars)["chars"]]))
    _, gates = hand(x)
    return {
        name: torch.cat([step[i] for step in gates]) for i, name in enumerate(("input", "forget", "output"))
    }


def draw_gates(path: Path, chars: list[str], gates: dict[str, torch.Tensor]) -> None:
    """上面三行是三个门的平均；下面是遗忘门里随字变化最大的 8 个单元。颜色越深，门开得越大。"""
    forget = gates["forget"]
    liveliest = forget.std(0).topk(min(8, forget.shape[1])).indices.sort().values
    rows = {f"{name}|{name}": gates[key].mean(1) for name, key in GATE_NAMES}
    rows |= {f"遗忘门 #{unit}|forget #{unit}": forget[:, unit] for unit in liveliest.tolist()}
    table = torch.stack(list(rows.values())).tolist()

    def draw(axes, text) -> None:
        axes.pcolormesh(table, cmap="Blues", vmin=0, vmax=1, edgecolors="white", linewidth=0.5)
        axes.set_xticks([i + 0.5 for i in range(len(chars))], [text(f"{c}|{i}") for i, c in enumerate(chars)])
        axes.set_yticks([i + 0.5 for i in range(len(rows))], [text(name) for name in rows])
        axes.invert_yaxis()

    labels = ("LSTM 读一句话：门开得多大|Gates of an LSTM on one sentence", "", "")
    render(path, draw, [], labels, min_width=2.2 * len(chars))


NAMES = {
    "rnn": "RNN",
    "lstm_half_open": "LSTM，门半开|LSTM, gates half open",
    "lstm": "LSTM，门先开着|LSTM, gates open",
    "gru": "GRU，门先开着|GRU, gates open",
}
GATE_NAMES = (("输入门", "input"), ("遗忘门", "forget"), ("输出门", "output"))


# ---------------------------------------------------------------- 5. 从头到尾


def learn(stage: Stage) -> dict:
    settings = stage.settings
    # 第 2 步的数据先读：文件写错了，不必等第 1 步做完才知道
    splits, data = load_splits(settings.dataset, settings.max_train_samples, settings.scheme)
    print(f"1. 记忆题：第一个符号是 {KEYS} 种里的哪一种，隔 n 个没用的符号学不学得会（瞎猜 {1 / KEYS:.3f}）")
    memory = {}
    for name in MEMORY:
        memory[name] = run_part(stage, f"memory_{name}", lambda part, name=name: learn_memory(name, settings))
        shown = "  ".join(f"{d}：{a:.2f}" for d, a in memory[name]["accuracy"].items())
        print(f"  {name:<16}{shown}", flush=True)

    train, test = short_sentences(splits["train"], settings.max_length), splits["test"]
    tags, vocabulary = all_tags(train), Vocabulary.of(train)
    number = {tag: i for i, tag in enumerate(tags)}
    rows = []
    for sentence in train:
        chars = vocabulary.encode(sentence.chars)["chars"]
        rows.append({"chars": chars, "tags": [number[tag] for tag in tags_of(sentence)]})
    print(f"2. 标注：训练 {len(train):,} 句，测试 {len(test):,} 句，每个字各猜各的")
    scores, models = {}, {}
    for kind in KINDS:
        for way in ("one_way", "both_ways"):
            name = f"{kind}_{way}"
            model = RNNTagger(
                kind, len(vocabulary.chars), len(tags), settings.hidden_size, way == "both_ways"
            )
            work = partial(
                train_one, label=name, model=model, rows=rows, test=test, vocabulary=vocabulary, tags=tags
            )
            scores[name], models[name] = run_part(stage, name, work, model), model
            print(
                f"  {name:<16}{scores[name]['parameters']:>8,} 个参数  实体 F1 {scores[name]['entity_f1']:.4f}",
                flush=True,
            )

    metrics = {"entity_f1": {name: row["entity_f1"] for name, row in scores.items()}}
    metrics |= {"memory_accuracy": {k: v["accuracy"] for k, v in memory.items()}}
    metrics |= {"gradient": {k: v["gradient"] for k, v in memory.items()}}

    def write(folder: Path) -> None:
        save_model(models["lstm_one_way"], str(folder / "model.safetensors"))
        vocabulary.save(folder / "vocabulary.json")
        write_json(folder / "tags.json", tags)
        draw_gates(
            folder / "gates.svg", list(EXAMPLE), gates_of(models["lstm_one_way"], vocabulary, list(EXAMPLE))
        )
        far = list(DISTANCES)
        forgetting = {NAMES[n]: (far, list(v["accuracy"].values())) for n, v in memory.items()}
        titles = ("隔多远学得会|Learning over distance", "隔几个符号|distance", "正确率|accuracy")
        line_chart(folder / "forgetting.svg", forgetting, *titles, hlines={"瞎猜|chance": 1 / KEYS})
        fading = {
            NAMES[n]: (far, [math.log10(max(g, 1e-30)) for g in v["gradient"].values()])
            for n, v in memory.items()
        }
        titles = (
            "训练之前，梯度传得多远|Gradient before training",
            "隔几个符号|distance",
            "log10 梯度|log10 gradient",
        )
        line_chart(folder / "gradient.svg", fading, *titles)
        bars = {"单向|one way": {}, "双向|both ways": {}}
        for kind in KINDS:
            bars["单向|one way"][kind.upper()] = scores[f"{kind}_one_way"]["entity_f1"]
            bars["双向|both ways"][kind.upper()] = scores[f"{kind}_both_ways"]["entity_f1"]
        bar_chart(folder / "both_ways.svg", bars, "单向与双向|One way and both", "", "实体 F1|entity F1")

    return stage.save(metrics, data, write)


def predict(settings: RnnSettings) -> list[Span]:
    """用训练好的单向 LSTM 标一句话，并画出它的门。"""
    folder = result_folder("rnn_tagger", HOME, settings)
    tags = json.loads((folder / "tags.json").read_text(encoding="utf-8"))
    vocabulary = Vocabulary.load(folder / "vocabulary.json")
    model = RNNTagger("lstm", len(vocabulary.chars), len(tags), settings.hidden_size, both_ways=False)
    load_model(model, str(folder / "model.safetensors"))
    chars = list(settings.predict)
    spans = spans_of(tag_sentences(model, vocabulary, [Sentence(chars)], tags)[0])
    show_prediction(settings.predict, spans, tags)
    draw_gates(folder / "gates_predict.svg", chars, gates_of(model, vocabulary, chars))
    print(f"门怎样读这一句：{folder / 'gates_predict.svg'}")
    return spans


def main(argv: list[str] | None = None) -> dict:
    settings = parse_settings(RnnSettings, PRESETS, argv)
    record = run_lesson("rnn_tagger", HOME, settings, learn)
    if settings.predict is not None:
        predict(settings)
    return record


if __name__ == "__main__":
    run_main(main)
