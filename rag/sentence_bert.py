"""句向量的算法（Sentence-BERT）：编码器给每个 token 一个向量，平均起来，除以长度。常见的几种写错也在这里。"""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import torch

from rag_common.embed import TransformerEmbedder

POOLINGS = {
    "mean": "平均（不算填充）",
    "padded": "平均，填充也算进去",
    "first": "只取 [CLS]",
    "max": "逐维取最大",
}


@torch.inference_mode()
def encode(embedder: TransformerEmbedder, texts: list[str], pooling: str, size: int = 8) -> np.ndarray:
    """文字 → 长度为 1 的向量 (N, D)。Sentence-BERT 是 mean；别的几种是常见的写法，有的是错的。"""
    rows = []
    for start in range(0, len(texts), size):
        batch = embedder.tokenizer(
            texts[start : start + size],
            padding=True,
            truncation=True,
            max_length=embedder.max_length,
            return_tensors="pt",
        ).to(embedder.device)
        hidden = embedder.model(**batch).last_hidden_state.float()  # (B, T, D)
        mask = batch["attention_mask"].unsqueeze(-1)  # (B, T, 1)，有字的是 1，填充是 0
        if pooling == "mean":
            pooled = (hidden * mask).sum(1) / mask.sum(1)  # (B, D)
        elif pooling == "padded":
            pooled = hidden.mean(1)
        elif pooling == "first":
            pooled = hidden[:, 0]
        else:
            pooled = hidden.masked_fill(mask == 0, float("-inf")).amax(1)
        rows.append((pooled / pooled.norm(dim=-1, keepdim=True)).cpu().numpy())
    return np.concatenate(rows)


def with_sentence_transformers(embedder: TransformerEmbedder, texts: list[str]) -> np.ndarray | None:
    """同一个模型交给 sentence-transformers 算；没有装这个包就不比。"""
    if find_spec("sentence_transformers") is None:
        return None
    from sentence_transformers import SentenceTransformer, models

    path = str(embedder.model.config._name_or_path)
    transformer = models.Transformer(path, max_seq_length=embedder.max_length)
    pooling = models.Pooling(embedder.dim, "mean")
    # 文件里存的是 float16；要在 float32 里比
    peer = SentenceTransformer(modules=[transformer, pooling, models.Normalize()], device="cpu").float()
    return peer.encode(texts, show_progress_bar=False)
