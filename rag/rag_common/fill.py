"""把几段文字放进知识库：只做缺的，一批一批地做，断了接着来。"""

from __future__ import annotations

from collections.abc import Sequence

from tqdm import tqdm

from rag_common.chunking import Chunk
from rag_common.embed import Embedder
from rag_common.store import Store, Where


def fill(
    store: Store, embedder: Embedder, chunks: Sequence[Chunk], where: Where | None = None, batch: int = 64
) -> int:
    """让库里合 where 的正好是 chunks：多出来的删掉，缺的算出向量、写进去。返回写了几段。

    进度不另记：写进去的就在库里，中断了再来，它们不算缺的，最多白算一批。
    """
    present = set(store.ids(where))
    store.delete(present - {chunk.id for chunk in chunks})
    missing = [chunk for chunk in chunks if chunk.id not in present]
    if 0 < len(missing) < len(chunks):
        print(f"库里已经有 {len(chunks) - len(missing)} 段，接着写缺的 {len(missing)} 段。", flush=True)
    bar = tqdm(total=len(missing), desc="算向量，写进知识库", unit="段", leave=False, disable=None)
    for start in range(0, len(missing), batch):
        part = missing[start : start + batch]
        store.upsert(part, embedder.passages([chunk.text for chunk in part]))
        bar.update(len(part))
    bar.close()
    return len(missing)
