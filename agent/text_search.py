"""在读者自己的文件里找：切成段，照 BM25 排。tools.py 的 search。

词：汉字每两个相邻的算一个（"花园里" → 花园、园里），也算单个的；字母数字连着的算一个。不用分词器。
rag 的结果（outputs/…/ 里的 .jsonl，每行有 text）也是这样一个文件夹。
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from file_tools import read_text, text_files
from nlp_common.base.errors import UserError
from tool_calls import ToolError

ENDINGS = (".txt", ".md", ".markdown", ".jsonl")
MOST_FILES, MOST_PASSAGES = 2000, 50_000
PASSAGE_CHARS = 300  # 一段最长几个字
K1, B = 1.5, 0.75


@dataclass
class Passage:
    where: str  # 文件:第几行
    text: str


class Index:
    """一个文件夹的段落，和每个词在哪些段里。"""

    def __init__(self, passages: list[Passage]):
        self.passages = passages
        self.counts = [Counter(words_of(passage.text)) for passage in passages]
        self.lengths = [sum(counts.values()) for counts in self.counts]
        self.mean = sum(self.lengths) / max(1, len(passages))
        self.holders: dict[str, list[int]] = {}
        for number, counts in enumerate(self.counts):
            for word in counts:
                self.holders.setdefault(word, []).append(number)

    def search(self, query: str, n: int) -> list[tuple[float, Passage]]:
        """分数最高的 n 段：Σ idf · tf·(k1+1) / (tf + k1·(1 − b + b·长度/平均长度))。同分的，前面的先。"""
        scores: Counter[int] = Counter()
        for word in set(words_of(query)):
            holders = self.holders.get(word, [])
            idf = math.log(1 + (len(self.passages) - len(holders) + 0.5) / (len(holders) + 0.5))
            for number in holders:
                times = self.counts[number][word]
                long = K1 * (1 - B + B * self.lengths[number] / self.mean)
                scores[number] += idf * times * (K1 + 1) / (times + long)
        best = sorted(scores.items(), key=lambda each: (-each[1], each[0]))[:n]
        return [(score, self.passages[number]) for number, score in best]


def words_of(text: str) -> list[str]:
    words = []
    for run in re.findall(r"[\u3400-\u9fff]+|[^\W_\u3400-\u9fff]+", text.lower()):
        if "\u3400" <= run[0] <= "\u9fff":
            words += [*run, *(run[i : i + 2] for i in range(len(run) - 1))]
        else:
            words.append(run)
    return words


def index_folder(root: Path) -> Index:
    """root 里的文字文件 → Index；读不了的（太大、不是文字）跳过。一段也没有是 UserError。"""
    passages: list[Passage] = []
    for path in text_files(root, ENDINGS, MOST_FILES):
        try:
            text = read_text(root, path)
        except ToolError:
            continue
        passages += rows_of(path, text) if path.lower().endswith(".jsonl") else passages_of(path, text)
        if len(passages) > MOST_PASSAGES:
            raise UserError(f"--folder 里的文字太多（{MOST_PASSAGES} 段以上）：换一个小一点的文件夹。")
    return Index(passages)


def passages_of(path: str, text: str) -> list[Passage]:
    """空行隔开的段；太长的一段，按行再分。"""
    passages: list[Passage] = []
    start, kept = 1, ""
    for number, line in enumerate([*text.splitlines(), ""], 1):
        if kept and (not line.strip() or len(kept) + len(line) > PASSAGE_CHARS):
            passages.append(Passage(f"{path}:{start}", kept))
            kept = ""
        while len(line) > PASSAGE_CHARS:
            passages.append(Passage(f"{path}:{number}", line[:PASSAGE_CHARS]))
            line = line[PASSAGE_CHARS:]
        if line.strip():
            start, kept = (start, f"{kept}\n{line}") if kept else (number, line)
    return passages


def rows_of(path: str, text: str) -> list[Passage]:
    """jsonl：每行的 text（或 content）一栏；没有的、坏的行不算。"""
    passages = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        said = (row.get("text") or row.get("content")) if isinstance(row, dict) else None
        if isinstance(said, str) and said.strip():
            passages.append(Passage(f"{path}:{number}", said[: 4 * PASSAGE_CHARS]))
    return passages
