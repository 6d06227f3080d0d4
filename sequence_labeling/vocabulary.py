"""字与相邻两个字的组合 → 编号；几句拼成一批。bilstm_crf.py、word_segmentation.py、rnn_tagger.py 共用。"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import torch
from torch import nn

from nlp_common.base.runs import write_json
from tagged_files import Sentence

PAD, UNKNOWN = 0, 1


class Vocabulary:
    """训练数据里的字，与出现 least 次以上的二字组合；没见过的是 UNKNOWN。"""

    def __init__(self, chars: list[str], pairs: list[str], counts: list[int]):
        self.chars, self.pairs, self.counts = chars, pairs, counts
        self.char_number = {char: i for i, char in enumerate(chars, 2)}  # 0 补齐，1 没见过
        self.pair_number = {pair: i for i, pair in enumerate(pairs, 2)}

    @classmethod
    def of(cls, sentences: list[Sentence], least: int = 2) -> Vocabulary:
        chars = Counter(char for sentence in sentences for char in sentence.chars)
        pairs = Counter(pair for sentence in sentences for pair in neighbours(sentence.chars))
        return cls(list(chars), [pair for pair, n in pairs.items() if n >= least], list(chars.values()))

    def encode(self, chars: list[str]) -> dict[str, list[int]]:
        """字、与左邻的组合、与右邻的组合，各 T 个编号。"""
        pairs = [self.pair_number.get(pair, UNKNOWN) for pair in neighbours(chars)]
        numbers = [self.char_number.get(char, UNKNOWN) for char in chars]
        return {"chars": numbers, "left": pairs[:-1], "right": pairs[1:]}

    def save(self, path: Path) -> None:
        write_json(path, {"chars": self.chars, "pairs": self.pairs, "counts": self.counts})

    @classmethod
    def load(cls, path: Path) -> Vocabulary:
        return cls(**json.loads(path.read_text(encoding="utf-8")))


def neighbours(chars: list[str]) -> list[str]:
    """相邻两个字的组合，句首句尾各补一个：T 个字有 T+1 个。"""
    return [a + b for a, b in zip(["\0", *chars], [*chars, "\0"], strict=True)]


def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
    """几句 → 各 (B, T)，右边补 0；lengths (B,)。"""
    batch = {"lengths": torch.tensor([len(row["chars"]) for row in rows])}
    for name in rows[0]:
        values = [torch.tensor(row[name]) for row in rows]
        batch[name] = nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=PAD)
    return batch
