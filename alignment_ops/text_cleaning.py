"""读出来的文字 → 干净的文字：不是正文的去掉，被排版拆开的接回来。每去掉一行都记下为什么。

先一份一份地（字符、标记、页码），再放在一起看：许多份文档里都有的同一行，是页眉、菜单、版权，不是正文。
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field

from nlp_common.data.documents import Document

HAN = "\u4e00-\u9fff"
PUNCTUATION = "，。！？；：、（）《》“”"
ENDS = tuple("。！？；：…”）")  # 一行以这些结尾，就是说完了
BOILERPLATE_SHARE, BOILERPLATE_LEAST = 0.3, 3  # 同一种文件里，三成以上、至少三份都有的行
PAIR_SHARE, PAIR_LEAST = 0.9, 5  # "名称：内容"的行本来就会重样：几乎份份都有才算
PAIR = re.compile(  # 名称：内容
    r"^\s*(?:[-*·•]\s*)?(?P<name>[^：:|，。？！]{1,12})\s*[：:]\s*(?P<answer>[^：:|。？！]{1,40})$"
)
TWO_CELLS = re.compile(r"^([^：:|，。？！]{1,12}) \| ([^：:|。？！]{1,40})$")  # 表格里的一行，两格
INVISIBLE = re.compile(r"[\u200b-\u200f\u2060\ufeff\u00ad\x00-\x08\x0b\x0c\x0e-\x1f]")
FULL_WIDTH = {
    code: code - 0xFEE0 for code in [*range(0xFF10, 0xFF1A), *range(0xFF21, 0xFF3B), *range(0xFF41, 0xFF5B)]
}
PAGE_NUMBER = re.compile(
    r"^\s*(?:第\s*\d+\s*页.*|[-–—]?\s*\d+\s*[-–—/]\s*\d*\s*[-–—]?|Page\s+\d+.*)$", re.IGNORECASE
)


@dataclass
class Cleaned:
    """一份清洗过的文档；removed 是去掉的行与原因。"""

    id: str
    text: str
    removed: list[tuple[str, str]] = field(default_factory=list)


def clean_documents(documents: list[Document]) -> list[Cleaned]:
    """逐份清洗，再去掉各份都有的行，最后把拆开的行接起来（接之前去，不然页眉已经接进正文了）。"""
    cleaned = [clean_one(document) for document in documents]
    drop_boilerplate(cleaned)
    for each in cleaned:
        each.text = "\n".join(TWO_CELLS.sub(r"\1：\2", line) for line in each.text.split("\n"))
        each.text = join_lines(each.text)
    return cleaned


def clean_one(document: Document) -> Cleaned:
    """字符、标记、页码；标题（# …）与"名称：内容"的行留着，出题要用。"""
    cleaned = Cleaned(document.id, "", [(line, "菜单") for line in document.menu])
    text = tidy_characters(document.text)
    if document.id.lower().endswith(".md"):
        text = without_markdown(text, cleaned.removed)
    lines = []
    for line in text.split("\n"):
        line = line.rstrip()
        if PAGE_NUMBER.match(line):
            cleaned.removed.append((line.strip(), "页码"))
        elif line.strip() and not re.search(rf"[\w{PUNCTUATION}]", line):
            cleaned.removed.append((line.strip(), "分隔线"))
        else:
            lines.append(line)
    cleaned.text = "\n".join(lines)
    return cleaned


def tidy_characters(text: str) -> str:
    """看不见的字符去掉，全角的字母数字换成半角，汉字之间的空格去掉。换行不动。"""
    text = INVISIBLE.sub("", text).translate(FULL_WIDTH).replace("\u3000", " ").replace("\xa0", " ")
    text = re.sub(rf"(?<=[{HAN}{PUNCTUATION}])[ \t]+(?=[{HAN}{PUNCTUATION}])", "", text)
    return re.sub(r"[ \t]{2,}", " ", text)


NOT_PROSE = [  # Markdown 里不是正文的
    re.compile(r"\A\s*---\n.*?\n---\s*\n", re.DOTALL),  # front matter
    re.compile(r"<!--.*?-->", re.DOTALL),  # 注释
    re.compile(r"!\[[^\]]*\]\([^)]*\)"),  # 图片
    re.compile(r"(?m)^\s*\[[^\]]*\]\([^)]*\)\s*$"),  # 只有一个链接的行
]


def without_markdown(text: str, removed: list[tuple[str, str]]) -> str:
    """去掉不是正文的，记进 removed；加粗、链接、行内代码只留文字。"""
    for pattern in NOT_PROSE:
        removed += [(" ".join(found[0].split()), "标记") for found in pattern.finditer(text)]
        text = pattern.sub("", text)
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    return re.sub(r"(\*\*|__|`)(.+?)\1", r"\2", text)


def drop_boilerplate(cleaned: list[Cleaned]) -> None:
    """同一行（数字不计）在许多份里都有，就不是哪一份的正文。

    一种文件一种文件地数：菜单只在网页里，页眉只在 PDF 里，放在一起数就显得少了。
    """
    holders: Counter[tuple[str, str]] = Counter()
    files: Counter[str] = Counter(_suffix(each) for each in cleaned)
    for each in cleaned:
        shapes = {_shape(line) for line in each.text.split("\n") if line.strip()}
        holders.update((_suffix(each), shape) for shape in shapes)
    for each in cleaned:
        n = files[_suffix(each)]
        lines = []
        for line in each.text.split("\n"):
            least = max(BOILERPLATE_LEAST, BOILERPLATE_SHARE * n)
            if PAIR.match(line) or TWO_CELLS.match(line):
                least = max(PAIR_LEAST, PAIR_SHARE * n)
            repeated = holders[_suffix(each), _shape(line)] >= least
            # 只有标点的不算：那是排版把句号挤到了下一行
            if repeated and re.search(r"\w", line) and not line.startswith("#"):
                each.removed.append((line.strip(), "各份都有"))
            else:
                lines.append(line)
        each.text = "\n".join(lines)


def _suffix(cleaned: Cleaned) -> str:
    return cleaned.id.lower().rpartition(".")[2]


def _shape(line: str) -> str:
    return re.sub(r"\d+", "0", line.strip())


def join_lines(text: str) -> str:
    """PDF 里一段排成一行一行：没有说完、又排满了的行，与下一行接起来。

    排满：长度是全文最长一行的九成以上。标题、短行（一栏一栏的）、空行之后，都另起一行。
    """
    lines = [line.strip() for line in text.split("\n")]
    full = 0.9 * max((len(line) for line in lines), default=0)
    joined: list[str] = []
    open_line = False  # 上一行没有说完，这一行接着它
    for line in lines:
        if open_line and line and not line.startswith(("#", "-")) and not PAIR.match(line):
            joined[-1] += line
        else:
            joined.append(line)
        open_line = bool(line) and len(line) >= full and not line.endswith(ENDS) and line[0] not in "#-"
    return re.sub(r"\n{3,}", "\n\n", "\n".join(joined)).strip()
