"""把我们的几块包成 LangChain 1.x 的组件：里面一行算法也没有，只换了接口。要先装 langchain-core。

    OurEmbeddings(embedder)            Embeddings：embed_documents、embed_query
    OurVectorStore(store, embedder)    VectorStore：add_documents、delete、similarity_search……
    BM25Retriever(index=…, store=…)    BaseRetriever：invoke(问题) → [Document]
    OurChatModel(generator=…)          BaseChatModel：invoke(消息) → AIMessage

LangChain 0.x 的教程里 ``from langchain.retrievers import …``、``from langchain.vectorstores import …`` 在 1.x 都没有了，
要的接口在 langchain_core 里。
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_core.outputs import ChatGeneration, ChatResult
from langchain_core.retrievers import BaseRetriever
from langchain_core.vectorstores import VectorStore
from pydantic import ConfigDict

from rag_common.bm25 import BM25
from rag_common.chunking import Chunk, text_hash
from rag_common.embed import Embedder
from rag_common.generate import Generator, chat_messages
from rag_common.store import Store


def to_document(chunk: Chunk, **more: Any) -> Document:
    """知识库里的一条 → LangChain 的 Document。start、end 不放进 metadata：为什么，看 index_traps。"""
    metadata = {**chunk.meta, "document": chunk.document, **more}
    return Document(page_content=chunk.text, id=chunk.id, metadata=metadata)


def to_chunk(document: Document, name: str | None = None) -> Chunk:
    meta = {key: value for key, value in document.metadata.items() if key != "document"}
    source = str(document.metadata.get("document", ""))
    name = name or document.id or f"{source}:{text_hash(document.page_content)}"
    return Chunk(name, document.page_content, source, meta=meta)


class OurEmbeddings(Embeddings):
    """rows 数一共编码了几段文档：index() 的陷阱要用它看。"""

    def __init__(self, embedder: Embedder):
        self.embedder, self.rows = embedder, 0

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        self.rows += len(texts)
        return self.embedder.passages(texts).tolist()

    def embed_query(self, text: str) -> list[float]:
        return self.embedder.queries([text])[0].tolist()


class OurVectorStore(VectorStore):
    """fewest：写写删删之间，库里最少剩几条（没有写过是 None）。"""

    def __init__(self, store: Store, embeddings: OurEmbeddings):
        self.store, self._embeddings, self.fewest = store, embeddings, None

    @property
    def embeddings(self) -> OurEmbeddings:
        return self._embeddings

    def add_documents(self, documents: list[Document], **kwargs: Any) -> list[str]:
        ids = kwargs.get("ids") or [None] * len(documents)
        chunks = [to_chunk(document, name) for document, name in zip(documents, ids, strict=True)]
        vectors = self.embeddings.embed_documents([chunk.text for chunk in chunks])
        self.store.upsert(chunks, np.array(vectors, dtype=np.float32))
        self._look()
        return [chunk.id for chunk in chunks]

    def add_texts(
        self, texts: Iterable[str], metadatas: list[dict] | None = None, *, ids: Any = None, **kwargs: Any
    ) -> list[str]:
        texts = list(texts)
        metadatas = metadatas or [{}] * len(texts)
        documents = [Document(page_content=t, metadata=m) for t, m in zip(texts, metadatas, strict=True)]
        return self.add_documents(documents, ids=ids)

    def delete(self, ids: list[str] | None = None, **kwargs: Any) -> bool:
        self.store.delete(self.store.ids() if ids is None else ids)
        self._look()
        return True

    def get_by_ids(self, ids: Sequence[str], /) -> list[Document]:
        return [to_document(chunk) for chunk in self.store.get(ids)]

    def similarity_search(self, query: str, k: int = 4, **kwargs: Any) -> list[Document]:
        return self.similarity_search_by_vector(self.embeddings.embed_query(query), k, **kwargs)

    def similarity_search_by_vector(
        self, embedding: list[float], k: int = 4, **kwargs: Any
    ) -> list[Document]:
        [hits] = self.store.search(np.array([embedding], dtype=np.float32), k, kwargs.get("filter"))
        return [
            Document(page_content=h.text, id=h.id, metadata={**h.meta, "document": h.document}) for h in hits
        ]

    @classmethod
    def from_texts(cls, texts: list[str], embedding: Embeddings, metadatas: Any = None, **kwargs: Any):
        made = cls(kwargs["store"], embedding)
        made.add_texts(texts, metadatas)
        return made

    def _look(self) -> None:
        count = self.store.count()
        self.fewest = count if self.fewest is None else min(self.fewest, count)


class BM25Retriever(BaseRetriever):
    index: BM25
    store: Any
    k: int = 10

    model_config = ConfigDict(arbitrary_types_allowed=True)

    def _get_relevant_documents(self, query: str, *, run_manager: Any) -> list[Document]:
        names = [name for name, _ in self.index.search(query, self.k)]
        return [to_document(chunk) for chunk in self.store.get(names)]


def prompt_messages(question: str, documents: Sequence[Document]) -> list[SystemMessage | HumanMessage]:
    """问题与查到的几段 → 消息。抄句子的生成器不读提示，要原来的问题与各段，所以它们也随着消息走。"""
    passages = [document.page_content for document in documents]
    system, user = chat_messages(question, passages)
    asked = {"question": question, "passages": passages}
    return [
        SystemMessage(system["content"]),
        HumanMessage(user["content"], additional_kwargs=asked),
    ]


class OurChatModel(BaseChatModel):
    generator: Any  # rag_common.generate.Generator

    @property
    def _llm_type(self) -> str:
        return f"rag-{self.generator.name}"

    def _generate(self, messages: list, stop: Any = None, run_manager: Any = None, **kwargs: Any):
        asked = messages[-1].additional_kwargs
        generator: Generator = self.generator
        [answer] = generator.answer([asked["question"]], [asked["passages"]])
        message = AIMessage(answer.text, response_metadata={"cited": answer.cited})
        return ChatResult(generations=[ChatGeneration(message=message)])
