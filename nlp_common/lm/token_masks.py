"""自动机（automaton.py）的一个状态 → 许可哪些 token。

词表里每个 token 的字节排成一张表，从这个状态出发一列一列地走，走得通的就许可。同一个状态的掩码只算一次，以后查表。
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np

from nlp_common.lm.automaton import DEAD, Matcher
from nlp_common.lm.gbnf import parse_grammar
from nlp_common.lm.generation import stop_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def byte_table() -> dict[str, int]:
    """字节级 BPE（GPT-2 起）用来代表 256 个字节的字符：看得见的代表自己，其余的挪到 256 之后。"""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(b): b for b in visible} | {chr(256 + i): b for i, b in enumerate(hidden)}


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> list[bytes]:
    """词表里每个 token 是哪几个字节；特殊符号是空的：它们不是文字。"""
    table = byte_table()
    special = set(tokenizer.all_special_ids) | {
        i for i, token in tokenizer.added_tokens_decoder.items() if token.special
    }
    decoder = tokenizer.backend_tokenizer.decoder
    is_byte_level = "ByteLevel" in repr(decoder)
    found = []
    for i, token in enumerate(tokenizer.convert_ids_to_tokens(range(len(tokenizer)))):
        if i in special or token is None:
            found.append(b"")
        elif is_byte_level:
            found.append(
                bytes(table[char] for char in token) if all(c in table for c in token) else token.encode()
            )
        elif re.fullmatch(r"<0x[0-9A-F]{2}>", token):  # SentencePiece 的字节
            found.append(bytes([int(token[3:5], 16)]))
        else:
            found.append(token.replace("▁", " ").encode())
    return found


def distinct(states: np.ndarray, size: int) -> np.ndarray:
    """出现了哪些状态，从小到大；比 np.unique 快：不用排序。"""
    used = np.zeros(size, dtype=bool)
    used[states] = True
    return np.flatnonzero(used)


class TokenMasks:
    """状态 → 许可的 token。一个状态只算一次；words 是每个 token 的字节，空的永远不许可，stop_ids 在写完整时许可。"""

    def __init__(self, matcher: Matcher, words: list[bytes], stop_ids: list[int]):
        self.matcher, self.words, self.stop_ids, self.size = matcher, words, stop_ids, len(words)
        self.lengths = np.array([len(word) for word in words])
        self.bytes = np.zeros((len(words), max(map(len, words))), dtype=np.uint8)  # (V, 最长)
        for i, word in enumerate(words):
            self.bytes[i, : len(word)] = np.frombuffer(word, dtype=np.uint8)
        # 按第一个字节分好：一个状态往往只许可几种字节，别的 token 不必看
        first = self.bytes[:, 0]
        self.starting = [np.flatnonzero((self.lengths > 0) & (first == byte)) for byte in range(256)]
        self._after: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._masks: dict[int, np.ndarray] = {}
        self._needs: dict[int, np.ndarray] = {}

    def after(self, state: int) -> tuple[np.ndarray, np.ndarray]:
        """→ (走得通的 token, 写了它之后的状态)，按 token 排好。全部 token 一起走，一列一列，每列一个字节。"""
        if state not in self._after:
            row = self.matcher.row(state)
            groups = [self.starting[byte] for byte in np.flatnonzero(row)]
            alive = np.concatenate([*groups, np.zeros(0, dtype=np.int64)]).astype(np.int64)
            now = row[self.bytes[alive, 0]]
            found, reached, column = [], [], 1
            while len(alive):
                ended = self.lengths[alive] == column
                found.append(alive[ended])
                reached.append(now[ended])
                alive, now = alive[~ended], now[~ended]
                following = self._step_all(now, self.bytes[alive, min(column, self.bytes.shape[1] - 1)])
                alive, now, column = alive[following != DEAD], following[following != DEAD], column + 1
            tokens = np.concatenate([*found, np.zeros(0, dtype=np.int64)])
            order = tokens.argsort()
            states = np.concatenate([*reached, np.zeros(0, dtype=np.int32)])[order]
            self._after[state] = tokens[order], states
        return self._after[state]

    def _step_all(self, states: np.ndarray, data: np.ndarray) -> np.ndarray:
        """n 个状态各读一个字节，(n,) 与 (n,) → (n,)。"""
        different = distinct(states, len(self.matcher.states))  # 通常只有一两个
        rows = [self.matcher.row(int(each)) for each in different]
        if not rows:
            return states
        place = np.zeros(len(self.matcher.states), dtype=np.int64)
        place[different] = np.arange(len(different))
        return np.stack(rows)[place[states], data]

    def allowed(self, state: int, budget: int | None = None) -> np.ndarray:
        """许可的 token，(V,) 的真假。budget：这个 token 之后最多还能写几个；要写不完的走法就不许可了。"""
        if state not in self._masks:
            tokens, states = self.after(state)
            mask = np.zeros(self.size, dtype=bool)
            mask[tokens] = True
            if self.matcher.can_end(state):
                mask[self.stop_ids] = True
            needs = np.zeros(len(self.matcher.states), dtype=np.int64)
            for each in distinct(states, len(needs)):
                needs[each] = self.matcher.need(int(each))
            self._masks[state], self._needs[state] = mask, needs[states]
        mask, needs = self._masks[state], self._needs[state]
        if budget is None or needs.max(initial=0) <= budget:
            return mask
        close = mask.copy()  # 一个 token 至少一个字节，所以最多再要 need 个
        close[self.after(state)[0][needs > budget]] = False
        return close

    def next(self, state: int, token: int) -> int:
        """写了 token 之后的状态；不许可的是 DEAD。"""
        tokens, states = self.after(state)
        place = int(np.searchsorted(tokens, token))
        return int(states[place]) if place < len(tokens) and tokens[place] == token else DEAD


def make_masks(grammar: str, tokenizer: PreTrainedTokenizerBase, size: int) -> TokenMasks:
    """文法的文字 → 掩码；size 是模型输出层的大小，比分词器多出来的都不许可。"""
    words = token_bytes(tokenizer)
    words += [b""] * (size - len(words))
    return TokenMasks(Matcher(parse_grammar(grammar)), words, stop_tokens(tokenizer))
