"""只训练 BERT 上面的几层：下面的层不变，它们的输出就不变，每行只要算一遍，存起来。

与“照样算整个网络，只是不更新下面的层”完全一样（tests/nlp_common/train/test_upper.py），只是快：每一遍只剩上面几层的
前向与反向。下面的层没有 dropout：它们不在训练。
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from nlp_common.base.errors import UserError
from nlp_common.lm.generation import batches_by_length
from nlp_common.lm.mean_pooled import mean_pool

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from nlp_common.train.bert import BertSettings


class AsGiven(nn.Module):
    """占着嵌入层的位置：输入已经是下面各层的输出，原样交给上面的层。"""

    def forward(self, inputs_embeds: torch.Tensor, **_: Any) -> torch.Tensor:
        return inputs_embeds


def with_vectors(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: dict[str, list[dict]],
    train_layers: int,
    bf16: bool,
) -> dict[str, list[dict]]:
    """rows 的每一行加上 "vectors"：下面各层的输出，float16。一层也不训练时只留句子的向量，一行一个。"""
    depth = len(model.bert.encoder.layer)
    if train_layers > depth:
        raise UserError(f"--train_layers 最多 {depth}（这个模型的层数），给的是 {train_layers}。")
    started, size = time.time(), 0
    found: dict[str, list[dict]] = {}
    for name, part in rows.items():
        print(f"  {name} {len(part):,} 行过一遍不训练的嵌入和下面 {depth - train_layers} 层…", flush=True)
        vectors = lower_outputs(model, tokenizer, part, train_layers, bf16)
        size += sum(each.nbytes for each in vectors)
        found[name] = [row | {"vectors": each} for row, each in zip(part, vectors, strict=True)]
    print(f"  算好了：{time.time() - started:.0f} 秒，存在内存里，{size / 2**30:.2f} GB")
    return found


@torch.inference_mode()
def lower_outputs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[dict],
    train_layers: int,
    bf16: bool = False,
    dtype: torch.dtype = torch.float16,
    batch_size: int = 32,
) -> list[torch.Tensor]:
    """rows 各行在下面各层（除去上面 train_layers 层）之后的向量，每行 (T, H)，没有填充。

    存成 float16：舍入误差千分之一以下，内存省一半。
    """
    layers = model.bert.encoder.layer
    model.bert.encoder.layer = layers[: len(layers) - train_layers]
    model.eval()
    outputs: list[torch.Tensor] = [torch.empty(0)] * len(rows)
    try:
        for chosen in batches_by_length([len(row["input_ids"]) for row in rows], batch_size):
            batch = tokenizer.pad({"input_ids": [rows[i]["input_ids"] for i in chosen]}, return_tensors="pt")
            with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
                hidden = model.bert(**batch.to(model.device)).last_hidden_state  # (B, T, H)
            if train_layers == 0:  # 平均的，留平均；用 [CLS] 的，留第一个
                mean = model.bert.pooler is None
                sentence = mean_pool(hidden, batch["attention_mask"]) if mean else hidden[:, 0]  # (B, H)
                for i, vector in zip(chosen, sentence, strict=True):
                    outputs[i] = vector[None].to(dtype).cpu()  # (1, H)
                continue
            for i, vectors, mask in zip(chosen, hidden, batch["attention_mask"], strict=True):
                outputs[i] = vectors[mask.bool()].to(dtype).cpu()
    finally:
        model.bert.encoder.layer = layers
    return outputs


@contextlib.contextmanager
def only_upper(model: PreTrainedModel, train_layers: int | None) -> Iterator[None]:
    """在这里面，model 只剩上面 train_layers 层和分类层，输入是 inputs_embeds；出来又是完整的模型。None：一直完整。"""
    if train_layers is None:
        yield
        return
    embeddings, layers = model.bert.embeddings, model.bert.encoder.layer
    model.bert.embeddings, model.bert.encoder.layer = AsGiven(), layers[len(layers) - train_layers :]
    try:
        yield
    finally:
        model.bert.embeddings, model.bert.encoder.layer = embeddings, layers


class PadVectors:
    """collate：``{"vectors": (T, H), "labels"}`` 的几行 → 补齐的一批。"""

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        vectors = nn.utils.rnn.pad_sequence([row["vectors"] for row in rows], batch_first=True)
        if vectors.dtype == torch.float16:
            vectors = vectors.float()
        lengths = torch.tensor([len(row["vectors"]) for row in rows])
        mask = (torch.arange(vectors.shape[1]) < lengths[:, None]).long()  # (B, T)
        labels = torch.tensor([row["labels"] for row in rows])
        return {"inputs_embeds": vectors, "attention_mask": mask, "labels": labels}


def layered_optimizer(model: PreTrainedModel, settings: BertSettings) -> torch.optim.AdamW | None:
    """AdamW：越靠下的层学习率越小，往下一层乘 layer_decay（Howard & Ruder 2018，ULMFiT）；分类层是 learning_rate。

    偏置与 LayerNorm 不做权重衰减，与 transformers 的 Trainer 一样。layer_decay 是 1 就是 None：用 Trainer 自己的。
    """
    decay = settings.layer_decay
    if decay == 1:
        return None
    assert settings.learning_rate is not None and decay is not None  # 预设补上了
    depth = len(model.bert.encoder.layer)
    groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        level = 0
        if name.startswith("bert.encoder.layer."):
            level = depth - int(name.split(".")[3])  # 最上面一层是 1
        elif name.startswith("bert.embeddings."):
            level = depth + 1
        groups.setdefault((level, parameter.dim() > 1), []).append(parameter)
    return torch.optim.AdamW(
        [
            {
                "params": parameters,
                "lr": settings.learning_rate * decay**level,
                "weight_decay": settings.weight_decay if matrix else 0.0,
            }
            for (level, matrix), parameters in groups.items()
        ],
        fused=True,  # 一次算完各个张量，快
    )


def fit_last_layer(model: PreTrainedModel, train: list[dict], validation: list[dict]) -> dict[str, float]:
    """一层也不训练，只有分类层：逻辑回归，凸的，直接求到最优，不用梯度下降慢慢走。返回验证集上的正确率。

    正则化的强度在验证集上选。句子的向量先标准化再拟合，标准化折进 W、b 里。
    """
    from sklearn.linear_model import LogisticRegression

    features, heldout = _features(model, train), _features(model, validation)  # (N, H)
    labels = np.array([row["labels"] for row in train])
    mean, scale = features.mean(0), features.std(0) + 1e-6
    best_accuracy, best = -1.0, None
    for strength in (0.001, 0.01, 0.1, 1.0):
        fitted = LogisticRegression(C=strength, max_iter=1000).fit((features - mean) / scale, labels)
        guesses = fitted.predict((heldout - mean) / scale)
        accuracy = float((guesses == [row["labels"] for row in validation]).mean())
        if accuracy > best_accuracy:
            best_accuracy, best = accuracy, fitted
    assert best is not None
    weight, bias = best.coef_, best.intercept_  # (C, H)；两类时只有一行，是第二类减第一类
    if len(best.classes_) == 2:
        weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    weight = weight / scale
    bias = bias - weight @ mean
    with torch.no_grad():
        model.classifier.weight.zero_()
        model.classifier.bias.fill_(-1e4)  # 训练数据里一行也没有的类，从不猜它
        chosen = torch.tensor(best.classes_, device=model.device)
        model.classifier.weight[chosen] = torch.from_numpy(weight).to(model.classifier.weight)
        model.classifier.bias[chosen] = torch.from_numpy(bias).to(model.classifier.bias)
    return {"validation_accuracy": best_accuracy}


@torch.inference_mode()
def _features(model: PreTrainedModel, rows: list[dict]) -> np.ndarray:
    """(N, H)：分类层的输入。"""
    vectors = torch.stack([row["vectors"][0] for row in rows]).float().to(model.device)  # (N, H)
    pooler = model.bert.pooler
    return (vectors if pooler is None else pooler(vectors[:, None])).cpu().numpy()
