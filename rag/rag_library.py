"""网页背后的一个书架：文档进来（切块、编码、建索引），问题进来（查、答、标出出处）。不认得网页，命令行也用它。"""

from __future__ import annotations

import html
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nlp_common.base.errors import UserError
from rag_common.bm25 import BM25
from rag_common.chunking import Chunk, make_chunks, structure
from rag_common.documents import read_document
from rag_common.embed import Embedder
from rag_common.fuse import reciprocal_rank
from rag_common.generate import Answer, Generator
from rag_common.store import Store
from rag_common.tokenizers import characters_and_bigrams

AT_ONCE = 16  # 一次编码几块：每编好一批，进度动一下
WAYS = ("混合", "字面", "向量")
DEPTH = 20  # 融合前各取几名


@dataclass
class Found:
    """一次提问的结果。"""

    answer: Answer
    sources: list[Chunk]


class Library:
    """一个书架：store 里是块与向量（落了盘），bm25 由它算出来。几个人同时用，写的排队。"""

    def __init__(self, store: Store, embedder: Embedder, generator: Generator):
        self.store, self.embedder, self.generator = store, embedder, generator
        self.lock = threading.RLock()
        self.bm25 = BM25()
        chunks = store.get(store.ids())
        self.bm25.add([chunk.id for chunk in chunks], [chunk.text for chunk in chunks])

    # ------------------------------------------------------------ 文档

    def documents(self) -> dict[str, int]:
        """文档名 → 几块，按名字排好。"""
        counts: dict[str, int] = {}
        for chunk in self.store.get(self.store.ids()):
            counts[chunk.document] = counts.get(chunk.document, 0) + 1
        return dict(sorted(counts.items()))

    def add(self, paths: list[Path], size: int) -> Iterator[str]:
        """一个个文件放进来，每动一下给一句进度；读不了的说出为什么，接着读下一个。同名的换成新的，没变的块不重新编码。"""
        for path in paths:
            try:
                text = read_document(path)
            except UserError as error:
                yield f"✗ {str(error).replace(str(path), path.name)}"  # 网页把文件放在自己的临时文件夹里，不给人看
                continue
            yield from self._put(path.name, text, size)

    def _put(self, name: str, text: str, size: int) -> Iterator[str]:
        wanted = {chunk.id: chunk for chunk in make_chunks(name, text, structure(text, size))}
        with self.lock:
            have = set(self.store.ids({"document": name}))
            new = [chunk for id, chunk in wanted.items() if id not in have]
            for start in range(0, len(new), AT_ONCE):
                part = new[start : start + AT_ONCE]
                self.store.upsert(part, self.embedder.passages([chunk.text for chunk in part]))
                self.bm25.add([chunk.id for chunk in part], [chunk.text for chunk in part])
                yield f"… {name}：{min(start + AT_ONCE, len(new))} / {len(new)} 块"
            old = have - wanted.keys()
            self.store.delete(old)
            self.bm25.delete(old)
        same = len(wanted) - len(new)
        yield f"✓ {name}：{len(wanted)} 块" + (f"（{same} 块没变，不用重新编码）" if same else "")

    def remove(self, name: str) -> str:
        with self.lock:
            ids = self.store.ids({"document": name})
            self.store.delete(ids)
            self.bm25.delete(ids)
        return f"✓ 拿走了 {name}（{len(ids)} 块）" if ids else f"书架上没有 {name}"

    # ------------------------------------------------------------ 提问

    def ask(self, question: str, k: int = 3, way: str = "混合") -> Found:
        """查 k 块，照着答。书架是空的、问题是空的是 UserError。"""
        if not question.strip():
            raise UserError("还没有写问题。")
        if not self.store.count():
            raise UserError("书架是空的：先放几个文档进来。")
        ids = self.retrieve(question, k, way)
        sources = self.store.get(ids)
        [answer] = self.generator.answer([question], [[chunk.text for chunk in sources]])
        return Found(answer, sources)

    def retrieve(self, question: str, k: int, way: str) -> list[str]:
        """字面是 BM25，向量是余弦，混合是两列的名次合起来（RRF）。"""
        with self.lock:
            lexical = [id for id, _ in self.bm25.search(question, DEPTH)] if way != "向量" else []
        dense = []
        if way != "字面":
            [hits] = self.store.search(self.embedder.queries([question]), DEPTH)
            dense = [hit.id for hit in hits]
        return [id for id, _ in reciprocal_rank([lexical, dense])][:k]


# ---------------------------------------------------------------- 标出出处


def marked(question: str, answer: str, text: str) -> str:
    """一块的文字 → HTML：与问题、回答相同的两个字以上标黄；文字里的 < 只是字。"""
    wanted = {word for word in characters_and_bigrams(question + "\n" + answer) if len(word) > 1}
    lower = "".join(char.lower() if len(char.lower()) == 1 else char for char in text)  # "İ" 的小写是两个字符
    yellow = [False] * len(text)
    for word in wanted:
        start = lower.find(word)
        while start >= 0:
            yellow[start : start + len(word)] = [True] * len(word)
            start = lower.find(word, start + 1)
    parts, inside = [], False
    for char, on in zip(text, yellow, strict=True):
        if on != inside:
            parts.append("<mark>" if on else "</mark>")
            inside = on
        parts.append(html.escape(char))
    return "".join(parts) + ("</mark>" if inside else "")


def sources_html(question: str, found: Found) -> str:
    """查到的各块：编号、出自哪里、原文，回答引用了的排在前面说明。"""
    if not found.sources:
        return "<p>什么也没有查到。</p>"
    blocks = []
    for number, chunk in enumerate(found.sources):
        cited = "　<b>回答引用了它</b>" if number in found.answer.cited else ""
        where = f"{html.escape(chunk.document)}　第 {chunk.start + 1}–{chunk.end} 字"
        body = marked(question, found.answer.text, chunk.text).replace("\n", "<br>")
        blocks.append(
            f'<div class="source"><p class="where">[{number + 1}] {where}{cited}</p><p>{body}</p></div>'
        )
    return "".join(blocks)
