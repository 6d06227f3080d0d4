"""小 BERT：从文字数出字表，搭一个与 bert-base-chinese 同样结构的小模型。"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from nlp_common.lm.classifier import attention

if TYPE_CHECKING:
    from transformers import BertConfig, BertTokenizer

MAX_POSITIONS = 512  # bert-base-chinese 的位置个数，小 BERT 也一样
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def character_tokenizer(texts: Sequence[str], min_count: int = 2) -> BertTokenizer:
    """从文字里数出字表，搭一个 BERT 分词器：一个汉字一个 token，英文和数字也逐个字符切开。

    bert-base-chinese 的字表也几乎都是单字；这里的小得多，因为小模型的大半参数都在字表上。
    """
    from transformers import BertTokenizer

    counts = Counter(char for text in texts for char in text.lower() if not char.isspace())
    chars = sorted((char for char, n in counts.items() if n >= min_count), key=lambda c: (-counts[c], c))
    vocab = {token: i for i, token in enumerate([*SPECIAL, *chars])}
    # 汉字本来就一个个切开；英文、数字是一串，按"开头 + ##后面的字符"切，不然没见过的单词整个变成 [UNK]
    for char in chars:
        if char.isalnum() and not "\u4e00" <= char <= "\u9fff":
            vocab[f"##{char}"] = len(vocab)
    return BertTokenizer(vocab=vocab, do_lower_case=True)


def small_config(vocab_size: int, hidden_size: int, num_layers: int, **more: Any) -> BertConfig:
    """小 BERT 的尺寸：宽度之外都照 BERT 的比例，64 宽一个头，中间层是 4 倍宽。"""
    from transformers import BertConfig

    return BertConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=max(1, hidden_size // 64),
        intermediate_size=4 * hidden_size,
        max_position_embeddings=MAX_POSITIONS,
        attn_implementation=attention(),
        **more,
    )
