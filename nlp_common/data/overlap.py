"""n 元组：一些题（评测的）有没有混进一批文字（训练的）里。盖住一道题的几成，连着最长多少字，在哪一行。

evaluation/contamination.py 讲它、量它查得到什么；清洗训练数据也用它。
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nlp_common.base.errors import UserError
from nlp_common.data.files import READERS, read_file

N, AT_LEAST = 8, 0.7  # 默认：8 个字一组，盖住七成就算泄漏
TOKEN = re.compile(r"[\u3400-\u9fff]|[a-z0-9]+")  # 一个汉字、一个英文词、一个数
SHORTEST = 5  # 题目不到这么多字，碰巧也会一样，不查


@dataclass
class Overlap:
    """一道题与训练数据里最像的那一行：share 是盖住题目的几成，longest 是连着最长几个字，place 是哪一行。"""

    share: float
    longest: int
    place: str
    found: bool
    checked: bool = True


def tokens_of(text: str) -> list[str]:
    """全角变半角、大写变小写，去掉标点与空白：改了这些，还是同一道题。"""
    return TOKEN.findall(unicodedata.normalize("NFKC", text).lower())


def overlaps(
    texts: dict[str, str], lines: Iterator[tuple[str, str]], n: int = N, at_least: float = AT_LEAST
) -> dict[str, Overlap]:
    """每道题（编号 → 文字）→ 与它最像的那一行。lines：(在哪里, 文字)。

    一行一行地算，不把各行的加起来：一万行各碰巧盖住两三个字，不是泄漏。
    """
    asked = {name: tokens_of(text) for name, text in texts.items()}
    best = {name: Overlap(0.0, 0, "", False, len(tokens) >= SHORTEST) for name, tokens in asked.items()}
    for place, name, places in shared_places(asked, lines, n):
        share = len(places) / len(asked[name])
        if share > best[name].share:
            best[name] = Overlap(share, longest_run(places), place, share >= at_least)
    return best


def leaking_lines(
    texts: dict[str, str], lines: Iterator[tuple[str, str]], n: int = N, at_least: float = AT_LEAST
) -> dict[str, tuple[str, float]]:
    """反过来看，哪些行里有题：在哪里 → (盖住得最多的是哪道题, 盖住几成)。"""
    asked = {name: tokens_of(text) for name, text in texts.items()}
    leaking: dict[str, tuple[str, float]] = {}
    for place, name, places in shared_places(asked, lines, n):
        share = len(places) / len(asked[name])
        if share >= at_least and share > leaking.get(place, ("", 0.0))[1]:
            leaking[place] = (name, share)
    return leaking


def shared_places(
    asked: dict[str, list[str]], lines: Iterator[tuple[str, str]], n: int
) -> Iterator[tuple[str, str, set[int]]]:
    """(在哪一行, 哪道题, 那道题的第几个字也在这一行里)；有一组相同才给出。

    题的 n 元组放进一张表，训练数据一行行地读过去对：数据再大，也只占一张题的表那么多内存。
    """
    tables: dict[int, dict[tuple, list[tuple[str, int]]]] = {}  # 几个一组 → 组 → [(题, 从第几个字起)]
    for name, tokens in asked.items():
        size = min(n, len(tokens))  # 比 n 还短的题，整道题是一组
        if len(tokens) < SHORTEST:
            continue
        for start in range(len(tokens) - size + 1):
            group = tuple(tokens[start : start + size])
            tables.setdefault(size, {}).setdefault(group, []).append((name, start))
    for place, line in lines:
        written = tokens_of(line)
        covered: dict[str, set[int]] = {}
        for size, table in tables.items():
            for start in range(len(written) - size + 1):
                for name, at in table.get(tuple(written[start : start + size]), ()):
                    covered.setdefault(name, set()).update(range(at, at + size))
        for name, places in covered.items():
            yield place, name, places


def longest_run(places: set[int]) -> int:
    longest = run = 0
    for place in sorted(places):
        run = run + 1 if place - 1 in places else 1
        longest = max(longest, run)
    return longest


def lines_in(train: str) -> Iterator[tuple[str, str]]:
    """训练数据的每一行：(在哪里, 里面全部的文字)。"""
    path = Path(train).expanduser()
    if not path.exists():
        raise UserError(f"没有训练数据 {train}。")
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.suffix.lower() in READERS)
    if not files:
        raise UserError(f"文件夹 {train} 里没有能读的数据（{'、'.join(READERS)}）。")
    for file in files:
        for index, row in enumerate(read_file(file)):
            yield f"{file}|{index}", "\n".join(strings_in(row))


def strings_in(value: object) -> list[str]:
    """一行里全部的文字，嵌在列表、字典里的（对话的 messages）也算。"""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [text for each in value for text in strings_in(each)] if isinstance(value, list) else []
