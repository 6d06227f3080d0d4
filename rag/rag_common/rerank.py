"""重排：把检索的前几名，连同问题，一对一对地再看一遍，重新排过。

CrossEncoder    e5 的前几层：问题与段落接在一起读，每个字看得见另一边的每个字。
TokenAligner    没有 e5 时用：每个字、字对一个学来的向量，不看上下文。
打分的办法相同：问题的每个字，在段落里最像的那个字有多像，按学来的轻重平均。还没有训练时轻重相同，就是数一样的字。

两个都是平常的 nn.Module：model(问题们, 段落们) → (N,) 分；rank(model, 问题, 段落们) → 分高的在前的位置。
RandomHead(model)   同样的编码，最后一层是随机的：装上就用、没有训练过的分类头就是这样。
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nlp_common.base.device import pick_device
from nlp_common.hub.models import require_model
from nlp_common.lm.checks import load_weights
from rag_common.tokenizers import characters_and_bigrams

MAX_LENGTH = 256  # 问题与段落合起来最多几个 token，多的从段落末尾截掉
SCALE = 20.0  # 余弦之间差得很小，放大了 softmax 才分得开


def load_reranker(name: str, layers: int, seed: int) -> CrossEncoder | TokenAligner:
    """aligner，或 e5、hub 名、文件夹（BERT 一类的编码器，取前 layers 层）；都还没有训练。"""
    return TokenAligner(seed=seed) if name == "aligner" else CrossEncoder(name, layers)


class Reranker(nn.Module):
    """分数 = SCALE · Σ_t 轻重_t · max_s cos(问题的字 t, 段落的字 s)。子类给出各字的向量与轻重。"""

    name = ""

    def forward(self, questions: Sequence[str], passages: Sequence[str]) -> Tensor:
        return SCALE * best_match(*self.tokens(questions, passages))

    def tokens(
        self, questions: Sequence[str], passages: Sequence[str]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """→ 长度为 1 的向量 (N, T, D)，轻重 (N, T)，哪些位置是问题的 (N, T)，哪些是段落的 (N, T)。"""
        raise NotImplementedError

    def learned(self) -> nn.Module:
        """训练会改的那一部分：存盘只存它。"""
        return self


class CrossEncoder(Reranker):
    """编码器的前 layers 层。词表的向量不训练：它占了参数的八成多，几百步里也学不动。"""

    def __init__(self, name: str = "e5", layers: int = 4):
        super().__init__()
        from transformers import AutoTokenizer, BertModel
        from transformers.utils import logging

        logging.disable_progress_bar()
        path = require_model(name)
        self.name = f"{name}，{layers} 层"
        self.tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        self.bert, _ = load_weights(BertModel, path, new=("pooler.",))
        self.bert.pooler = None
        self.bert.encoder.layer = self.bert.encoder.layer[:layers]
        self.bert.embeddings.requires_grad_(False)
        self.weigh = nn.Linear(self.bert.config.hidden_size, 1)  # 一个字有多要紧
        nn.init.zeros_(self.weigh.weight)
        nn.init.zeros_(self.weigh.bias)
        self.to(pick_device())

    def tokens(self, questions, passages):
        batch = self.tokenizer(
            list(questions), list(passages), truncation="only_second", max_length=MAX_LENGTH, padding=True,
            return_tensors="pt",
        )  # fmt: skip
        ids = batch["input_ids"].to(self.weigh.weight.device)  # (N, T)
        mask = batch["attention_mask"].to(ids.device)
        sides = [batch.sequence_ids(row) for row in range(len(ids))]  # 0 问题，1 段落，None 别的
        asked = torch.tensor([[side == 0 for side in row] for row in sides], device=ids.device)
        told = torch.tensor([[side == 1 for side in row] for row in sides], device=ids.device)
        hidden = self.bert(input_ids=ids, attention_mask=mask).last_hidden_state  # (N, T, D)
        return F.normalize(hidden, dim=-1), self.weigh(hidden).squeeze(-1), asked, told

    def learned(self) -> nn.Module:
        return nn.ModuleDict({"layers": self.bert.encoder, "weigh": self.weigh})


class TokenAligner(Reranker):
    """每个字、字对散列到一个向量，开头是随机的：同样的字余弦是 1，别的近 0。训练把同义的拉近。"""

    def __init__(self, buckets: int = 8192, dim: int = 64, seed: int = 0):
        super().__init__()
        self.name, self.buckets = "字对字", buckets
        generator = torch.Generator().manual_seed(seed)
        self.vectors = nn.Parameter(torch.randn(buckets, dim, generator=generator))
        self.weights = nn.Parameter(torch.zeros(buckets))

    def tokens(self, questions, passages):
        pairs = [(self._ids(q), self._ids(p)) for q, p in zip(questions, passages, strict=True)]
        width = max(len(q) + len(p) for q, p in pairs)
        ids = torch.tensor([q + p + [0] * (width - len(q) - len(p)) for q, p in pairs])  # (N, T)
        place = torch.arange(width)
        asked = place < torch.tensor([len(q) for q, _ in pairs])[:, None]
        told = ~asked & (place < torch.tensor([len(q) + len(p) for q, p in pairs])[:, None])
        return F.normalize(self.vectors[ids], dim=-1), self.weights[ids], asked, told

    def _ids(self, text: str) -> list[int]:
        words = list(dict.fromkeys(characters_and_bigrams(text))) or [""]
        return [zlib.crc32(word.encode()) % self.buckets for word in words]


class RandomHead(nn.Module):
    """各字的向量取平均，乘一个随机的方向：编码器再好，没有训练过的头打的分也与内容无关。"""

    def __init__(self, model: Reranker, seed: int = 0):
        super().__init__()
        self.model, self.generator_seed = model, seed

    def forward(self, questions: Sequence[str], passages: Sequence[str]) -> Tensor:
        vectors, _, asked, told = self.model.tokens(questions, passages)
        real = (asked | told).unsqueeze(-1)  # (N, T, 1)
        mean = (vectors * real).sum(1) / real.sum(1)  # (N, D)
        generator = torch.Generator().manual_seed(self.generator_seed)
        return mean @ torch.randn(mean.shape[-1], generator=generator).to(mean.device)


def best_match(vectors: Tensor, weights: Tensor, asked: Tensor, told: Tensor) -> Tensor:
    """问题的每个字在段落里最像的那个字有多像，按轻重平均 → (N,)。

    vectors (N, T, D) 长度为 1，weights (N, T)，asked、told (N, T) 是哪些位置属于问题、段落。
    """
    cosines = vectors @ vectors.transpose(1, 2)  # (N, T, T)
    closest = cosines.masked_fill(~told[:, None, :], -1.0).amax(-1)  # (N, T)
    shares = weights.masked_fill(~asked, float("-inf")).softmax(-1)  # (N, T)，各行和为 1
    return (shares * closest).sum(-1)


@torch.inference_mode()
def rank(model: nn.Module, question: str, passages: Sequence[str]) -> list[int]:
    """段落的位置，分高的在前；分一样的照原来的次序。"""
    if not passages:
        return []
    model.eval()
    scores = model([question] * len(passages), list(passages)).cpu().numpy()
    return [int(place) for place in np.argsort(-scores, kind="stable")]
