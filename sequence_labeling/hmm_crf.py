"""HMM 与线性链 CRF，手写：数一数就能用的隐马尔可夫模型，和同样的动态规划上训练出来的条件随机场。

学到什么：前向算法怎样在一条链上把指数多条路加起来；边缘概率；Viterbi；CRF 的梯度为什么就是"期望次数 − 观察次数"，
不用 autograd 也写得出来；有了几个字的组合作特征，这个老办法在这么多数据上与神经网络差多少。

运行：
    python hmm_crf.py                                        # 自带的《人民日报》
    python hmm_crf.py --dataset ../../shared/data/resume_ner # 自己的数据：BIO/BIOES/BMES 文件或 CLUENER 式 JSON
    python hmm_crf.py --predict "江泽民主席昨天在上海会见了桥本龙太郎"

预期输出（实测见本文件夹的 README.md）：同样的字，HMM 的实体 F1 低于 CRF；学习曲线上两个都随句数上升。

参考：Rabiner 1989（HMM）；Lafferty et al. 2001（CRF）；Sha & Pereira 2003（特征与梯度）；Duchi et al. 2011（AdaGrad）。
"""

from nlp_common.base.cli import run_main

import json
import math
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from labeling import (
    LabelSettings,
    all_tags,
    in_batches,
    predict_text,
    show_prediction,
    show_report,
    span_report,
)
from long_sentences import MAX_CHARS, short_sentences
from nlp_common.base.arguments import COUNT, NOT_NEGATIVE, POSITIVE, option
from nlp_common.base.runs import write_json
from nlp_common.draw.plots import line_chart
from nlp_common.train.lesson import result_folder, run_lesson
from nlp_common.train.settings import parse_settings
from nlp_common.train.stage import Stage
from span_metrics import character_accuracy, draw_confusion, f1_standard_error, span_scores, spans_of
from tagged_files import Sentence, Span, load_splits, tags_of

HOME = Path(__file__).resolve().parent
NEVER = -math.inf  # 不许走的转移的分数
EDGE = "\0"  # 句首之前、句尾之后的"字"
CRF_PARTS = ("weights", "start", "steps", "end")
CURVE_SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1)  # 学习曲线：用训练数据的几分之几

PRESETS = {
    "tiny": {"dataset": "people_daily", "max_train_samples": 6000, "num_train_epochs": 4},
    "full": {"dataset": "people_daily", "num_train_epochs": 10},
}


@dataclass
class HmmCrfSettings(LabelSettings):
    num_train_epochs: int | None = option("CRF 训练几遍", limits=COUNT)
    batch_size: int = option("CRF 每步几句", 32)
    learning_rate: float = option("AdaGrad 的学习率", 0.3, limits=POSITIVE)
    l2: float = option("特征权重的 L2 正则", 0.002, limits=NOT_NEGATIVE)
    smoothing: float = option("HMM 数数时每样先加几次，免得没见过的概率是 0", 0.3, limits=POSITIVE)


# ---------------------------------------------------------------- 1. 链上的动态规划（B 句，T 个字，K 个标签）
# 一条标签链 y 的分数：起始[y_1] + Σ_t 发射[t, y_t] + Σ_t 转移[y_{t−1}, y_t] + 结尾[y_T]。
# emissions (B, T, K)，lengths (B,) 是真字数，start (K,)、steps (K, K)、end (K,)；都在对数里，HMM 的分数是 log 概率。


def sequence_score(emissions, tags, lengths, start, steps, end) -> torch.Tensor:
    """给定标签 tags (B, T) 的分数，(B,)。"""
    mask = torch.arange(tags.shape[1], device=tags.device) < lengths[:, None]  # (B, T)：真字 True
    picked = emissions.gather(2, tags[:, :, None])[:, :, 0]  # (B, T)：每个位置上那个标签的发射分
    moved = steps[tags[:, :-1], tags[:, 1:]]  # (B, T−1)
    last = tags.gather(1, lengths[:, None] - 1)[:, 0]  # (B,)：最后一个真字的标签
    within = picked.masked_fill(~mask, 0).sum(1) + moved.masked_fill(~mask[:, 1:], 0).sum(1)
    return start[tags[:, 0]] + within + end[last]


def log_forward(emissions, lengths, start, steps, end) -> tuple[torch.Tensor, torch.Tensor]:
    """前向算法：α_t(j) = log Σ_i exp(α_{t−1}(i) + 转移_ij) + 发射_t(j)。→ (log Z (B,), α (B, T, K))。

    K^T 条链的分数的 logsumexp，只用 T 步、每步 K² 次加法就算完：走到 (t, j) 的所有链，后面怎么走与前面无关。
    """
    alphas = [start + emissions[:, 0]]
    for t in range(1, emissions.shape[1]):
        paths = alphas[-1][:, :, None] + steps  # (B, 从, 到)
        alphas.append(paths.logsumexp(1) + emissions[:, t])
    alpha = torch.stack(alphas, 1)  # (B, T, K)
    last = alpha[torch.arange(len(lengths)), lengths - 1]  # (B, K)：各句最后一个真字
    return (last + end).logsumexp(1), alpha


def log_backward(emissions, lengths, steps, end) -> torch.Tensor:
    """后向算法：β_t(i) = log Σ_j exp(转移_ij + 发射_{t+1}(j) + β_{t+1}(j))，句尾是结尾分。→ (B, T, K)。"""
    betas = [end.expand(len(lengths), -1)]
    for t in range(emissions.shape[1] - 2, -1, -1):
        onward = (steps + (emissions[:, t + 1] + betas[-1])[:, None, :]).logsumexp(2)  # (B, K)
        betas.append(torch.where((t < lengths - 1)[:, None], onward, end))  # 短句从自己的句尾开始
    return torch.stack(betas[::-1], 1)


def log_marginals(emissions, lengths, start, steps, end):
    """→ (log Z (B,)，p(y_t = k) (B, T, K)，每句里每种转移的期望次数 Σ_t p(y_t = i, y_{t+1} = j) (B, K, K))。"""
    log_z, alpha = log_forward(emissions, lengths, start, steps, end)
    beta = log_backward(emissions, lengths, steps, end)
    mask = torch.arange(emissions.shape[1], device=lengths.device) < lengths[:, None]  # (B, T)
    node = (alpha + beta - log_z[:, None, None]).masked_fill(~mask[:, :, None], NEVER).exp()
    edge = emissions.new_zeros(len(lengths), *steps.shape)
    for t in range(emissions.shape[1] - 1):
        right = emissions[:, t + 1] + beta[:, t + 1] - log_z[:, None]  # (B, K)
        pair = alpha[:, t, :, None] + steps + right[:, None, :]  # (B, K, K)
        edge += pair.masked_fill(~mask[:, t + 1, None, None], NEVER).exp()
    return log_z, node, edge


def viterbi(emissions, lengths, start, steps, end) -> list[list[int]]:
    """分数最高的一条链：前向算法里的 logsumexp 换成 max，记下是从哪里来的，再倒着走回去。"""
    score, came_from = start + emissions[:, 0], []  # (B, K)
    for t in range(1, emissions.shape[1]):
        best, where = (score[:, :, None] + steps).max(1)  # (B, K)：走到 j 最好的分数，与从哪个 i 来
        score = torch.where((t < lengths)[:, None], best + emissions[:, t], score)  # 短句停在自己的句尾
        came_from.append(where)
    last = (score + end).argmax(1).tolist()
    chains = []
    for row, length in enumerate(lengths.tolist()):
        chain = [last[row]]
        for t in range(length - 2, -1, -1):
            chain.append(int(came_from[t][row, chain[-1]]))
        chains.append(chain[::-1])
    return chains


# ---------------------------------------------------------------- 2. HMM：数出来的概率


def train_hmm(sentences: list[Sentence], tags: list[str], smoothing: float) -> dict:
    """p(标签 | 前一个标签) 与 p(字 | 标签)：数次数，每样先加 smoothing 次（加法平滑），再归一。"""
    number = {tag: i for i, tag in enumerate(tags)}
    starts, ends = torch.full((2, len(tags)), smoothing, dtype=torch.double)
    steps = torch.full((len(tags), len(tags)), smoothing, dtype=torch.double)
    seen = Counter()
    for sentence in sentences:
        path = [number[tag] for tag in tags_of(sentence)]
        starts[path[0]] += 1
        ends[path[-1]] += 1
        for before, after in pairwise(path):
            steps[before, after] += 1
        seen.update(zip(sentence.chars, path, strict=True))
    chars = sorted({char for char, _ in seen})
    emit = torch.full((len(chars) + 1, len(tags)), smoothing, dtype=torch.double)  # 最后一行：没见过的字
    row = {char: i for i, char in enumerate(chars)}
    for (char, tag), count in seen.items():
        emit[row[char], tag] += count
    leave = steps.sum(1, keepdim=True) + ends[:, None]  # 从一个标签出发：去别的标签，或者句子结束
    return {
        "row": row,
        "emit": (emit / emit.sum(0)).log(),  # (V+1, K)
        "start": (starts / starts.sum()).log(),
        "steps": (steps / leave).log(),
        "end": (ends / leave[:, 0]).log(),
    }


def decode_hmm(hmm: dict, sentences: list[Sentence], tags: list[str]) -> list[list[str]]:
    """HMM 也是一条链：发射分 = log p(字 | 标签)，转移分 = log p(标签 | 前一个)，用同一个 Viterbi。"""
    unseen = len(hmm["row"])
    found: list[list[str]] = [[] for _ in sentences]
    for picked in in_batches(sentences, 64):
        lengths = torch.tensor([len(sentences[i].chars) for i in picked])
        rows = torch.full((len(picked), int(lengths.max())), unseen)
        for at, i in enumerate(picked):
            rows[at, : lengths[at]] = torch.tensor(
                [hmm["row"].get(char, unseen) for char in sentences[i].chars]
            )
        paths = viterbi(hmm["emit"][rows], lengths, hmm["start"], hmm["steps"], hmm["end"])
        for i, path in zip(picked, paths, strict=True):
            found[i] = [tags[k] for k in path]
    return found


# ---------------------------------------------------------------- 3. CRF：特征的权重，用梯度训练


def features(chars: list[str]) -> list[list[str]]:
    """每个字的特征：它与前后两个字，以及相邻两个字的组合；C0 是字本身，P1 是后一个字，N1 是前一个。"""
    padded = [EDGE, EDGE, *chars, EDGE, EDGE]
    found = []
    for at in range(2, len(chars) + 2):
        a, b, c, d, e = padded[at - 2 : at + 3]
        one = [f"N2={a}", f"N1={b}", f"C0={c}", f"P1={d}", f"P2={e}"]
        two = [f"N2N1={a}{b}", f"N1C0={b}{c}", f"C0P1={c}{d}", f"P1P2={d}{e}", f"N1P1={b}{d}"]
        found.append([*one, *two, f"SHAPE={shape(b)}{shape(c)}{shape(d)}"])
    return found


def shape(char: str) -> str:
    """字的样子：数字 0、英文 a、空白或边界 _、汉字 中、其余 。"""
    if char.isdigit():
        return "0"
    if char == EDGE or char.isspace():
        return "_"
    if "\u4e00" <= char <= "\u9fff":
        return "中"
    return "a" if char.isalpha() else "。"


class FeatureCRF:
    """发射分 = 这个字的各个特征的权重之和，(F, K) 的一张表；加上转移、起始、结尾。"""

    def __init__(self, numbers: dict[str, int], tags: list[str]):
        self.numbers, self.tags = numbers, tags
        self.weights = torch.zeros(len(numbers) + 1, len(tags))  # 最后一行给没见过的特征，一直是 0
        self.start, self.end = torch.zeros(2, len(tags))
        self.steps = torch.zeros(len(tags), len(tags))

    def encode(self, sentences: list[Sentence]) -> tuple[torch.Tensor, torch.Tensor]:
        """→ (特征的编号 (B, T, 11)，长度 (B,))；补齐的位置都是没见过的特征。"""
        lengths = torch.tensor([len(sentence.chars) for sentence in sentences])
        unknown = len(self.numbers)
        ids = torch.full((len(sentences), int(lengths.max()), 11), unknown)
        for row, sentence in enumerate(sentences):
            found = [[self.numbers.get(f, unknown) for f in at] for at in features(sentence.chars)]
            ids[row, : len(found)] = torch.tensor(found)
        return ids, lengths

    def emissions(self, ids: torch.Tensor) -> torch.Tensor:
        """(B, T, 11) → (B, T, K)。"""
        flat = torch.nn.functional.embedding_bag(ids.flatten(0, 1), self.weights, mode="sum")
        return flat.view(*ids.shape[:2], -1)

    def decode(self, sentences: list[Sentence]) -> list[list[str]]:
        found: list[list[str]] = [[] for _ in sentences]
        for picked in in_batches(sentences, 64):
            ids, lengths = self.encode([sentences[i] for i in picked])
            paths = viterbi(self.emissions(ids), lengths, self.start, self.steps, self.end)
            for i, path in zip(picked, paths, strict=True):
                found[i] = [self.tags[k] for k in path]
        return found


class AdaGrad:
    """每个权重自己的步长：η ÷ √(它的梯度平方的累计)。少见的特征步子大，常见的步子小：稀疏的特征正要这样。"""

    def __init__(self, values: torch.Tensor, learning_rate: float):
        self.values, self.learning_rate = values, learning_rate
        self.squares = torch.full_like(values, 1e-8)

    def step(self, gradient: torch.Tensor, rows: torch.Tensor | slice = slice(None)) -> None:
        """只更新 rows 这几行，gradient 与它们同形。"""
        squares = self.squares[rows] + gradient**2
        self.squares[rows] = squares
        self.values[rows] -= self.learning_rate * gradient / squares.sqrt()


def train_crf(
    sentences: list[Sentence], tags: list[str], settings: HmmCrfSettings, show: bool = True
) -> FeatureCRF:
    """最小化 −log p(标签 | 句子) = log Z − 分数。对任何一个分数的梯度 = 期望次数 − 观察次数。"""
    counts = Counter(f for sentence in sentences for at in features(sentence.chars) for f in at)
    kept = [f for f, count in counts.items() if count >= 2 or f.startswith(("C0=", "N1=", "P1="))]
    crf = FeatureCRF({f: i for i, f in enumerate(kept)}, tags)
    number = {tag: i for i, tag in enumerate(tags)}
    optimizers = [AdaGrad(v, settings.learning_rate) for v in (crf.weights, crf.start, crf.steps, crf.end)]
    generator = torch.Generator().manual_seed(settings.seed)
    encoded = []  # 特征只算一遍：按长度排好，每批长短相近
    for picked in in_batches(sentences, settings.batch_size):
        rows = [sentences[i] for i in picked]
        ids, lengths = crf.encode(rows)
        gold = torch.zeros(ids.shape[:2], dtype=torch.long)
        for row, sentence in enumerate(rows):
            gold[row, : len(sentence.chars)] = torch.tensor([number[tag] for tag in tags_of(sentence)])
        encoded.append((ids, lengths, gold))
    for epoch in range(1, settings.num_train_epochs + 1):
        total = 0.0
        for index in torch.randperm(len(encoded), generator=generator).tolist():
            total += crf_step(crf, optimizers, *encoded[index], settings.l2)
        if show:
            print(f"  第 {epoch} 遍  每句损失 {total / len(sentences):.3f}", flush=True)
    return crf


def crf_step(crf: FeatureCRF, optimizers: list[AdaGrad], ids, lengths, gold, l2: float) -> float:
    """一步：边缘概率 → 梯度 → 更新。返回这一批的损失之和。"""
    emissions = crf.emissions(ids)  # (B, T, K)
    log_z, node, edge = log_marginals(emissions, lengths, crf.start, crf.steps, crf.end)
    score = sequence_score(emissions, gold, lengths, crf.start, crf.steps, crf.end)
    mask = torch.arange(ids.shape[1]) < lengths[:, None]
    observed = torch.nn.functional.one_hot(gold, len(crf.tags)) * mask[:, :, None]
    difference = node - observed  # (B, T, K)：期望 − 观察，就是对发射分的梯度

    rows, inverse = ids.flatten().unique(return_inverse=True)  # 这一批里出现的特征
    gradient = torch.zeros(len(rows), len(crf.tags))
    gradient.index_add_(0, inverse, difference.flatten(0, 1).repeat_interleave(ids.shape[2], 0))
    gradient[rows == len(crf.numbers)] = 0  # 没见过的特征没有权重
    pairs = torch.zeros_like(crf.steps)
    valid = mask[:, 1:]
    pairs.index_put_((gold[:, :-1][valid], gold[:, 1:][valid]), torch.ones(int(valid.sum())), accumulate=True)
    last = difference.gather(1, (lengths - 1)[:, None, None].expand(-1, 1, len(crf.tags)))[:, 0]

    optimizers[0].step(gradient + l2 * crf.weights[rows], rows)
    optimizers[1].step(difference[:, 0].sum(0))
    optimizers[2].step(edge.sum(0) - pairs)
    optimizers[3].step(last.sum(0))
    return float((log_z - score).sum())


# ---------------------------------------------------------------- 4. 从头到尾


def learn(stage: Stage) -> dict:
    settings = stage.settings
    splits, data = load_splits(settings.dataset, settings.max_train_samples, settings.scheme)
    train, test = short_sentences(splits["train"]), splits["test"]
    tags = all_tags(train)
    gold, gold_tags = [s.spans for s in test], [tags_of(s) for s in test]
    print(f"训练 {len(train):,} 句，测试 {len(test):,} 句，{len(tags)} 个标签")

    curve: dict[int, dict[str, float]] = {}
    for share in CURVE_SHARES:  # 句数由少到多；最后一次就是全部
        some = train[: max(1, round(len(train) * share))]
        hmm = train_hmm(some, tags, settings.smoothing)
        hmm_tags = decode_hmm(hmm, test, tags)
        print(f"{len(some):,} 句，训练 CRF" if share == 1 else f"{len(some):,} 句", flush=True)
        crf = train_crf(some, tags, settings, show=share == 1)
        crf_tags = crf.decode(test)
        found = {"HMM": hmm_tags, "CRF": crf_tags}
        curve[len(some)] = {n: span_scores(gold, list(map(spans_of, t)))["f1"] for n, t in found.items()}
        print(
            "  " + "，".join(f"{name} 实体 F1 {f1:.4f}" for name, f1 in curve[len(some)].items()), flush=True
        )

    predicted = [spans_of(each) for each in crf_tags]
    metrics = {
        "entity_f1": curve[len(train)]["CRF"],
        "entity_f1_error": f1_standard_error(gold, predicted),
        "character_accuracy": character_accuracy(gold_tags, crf_tags),
        "hmm_entity_f1": curve[len(train)]["HMM"],
        "hmm_character_accuracy": character_accuracy(gold_tags, hmm_tags),
        "features": len(crf.numbers),
        "learning_curve": {name: {str(n): row[name] for n, row in curve.items()} for name in ("HMM", "CRF")},
    }
    report = span_report(test, predicted)
    show_report("CRF", report)

    def write(folder: Path) -> None:
        save_file({n: getattr(crf, n).contiguous() for n in CRF_PARTS}, str(folder / "crf.safetensors"))
        write_json(folder / "features.json", {"tags": tags, "features": list(crf.numbers)})
        draw_confusion(folder / "confusion.svg", report["confusion"])
        points = sorted(curve)
        series = {name: (points, [curve[n][name] for n in points]) for name in ("HMM", "CRF")}
        line_chart(
            folder / "learning_curve.svg",
            series,
            "学习曲线|Learning curve",
            "训练句数|sentences",
            "实体 F1|entity F1",
        )

    return stage.save(metrics, data, write, **report)


def predict(settings: HmmCrfSettings) -> list[Span]:
    """读回训练好的 CRF，标一句话，打印出来。"""
    folder = result_folder("hmm_crf", HOME, settings)
    saved = json.loads((folder / "features.json").read_text(encoding="utf-8"))
    crf = FeatureCRF({f: i for i, f in enumerate(saved["features"])}, saved["tags"])
    for name, value in load_file(str(folder / "crf.safetensors")).items():
        setattr(crf, name, value)

    def tag(sentences: list[Sentence]) -> list[list[Span]]:
        return [spans_of(each) for each in crf.decode(sentences)]

    spans = predict_text(settings.predict, tag, MAX_CHARS)
    show_prediction(settings.predict, spans, saved["tags"])
    return spans


def main(argv: list[str] | None = None) -> dict:
    settings = parse_settings(HmmCrfSettings, PRESETS, argv)
    record = run_lesson("hmm_crf", HOME, settings, learn)
    if settings.predict is not None:
        predict(settings)
    return record


if __name__ == "__main__":
    run_main(main)
