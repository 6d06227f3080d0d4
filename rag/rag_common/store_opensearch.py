"""OpenSearch 2.9 以上：网址 opensearch://用户:密码@主机:9200/索引（https 写 opensearch+https://…）。

它是从 Elasticsearch 7 分出来的，话大半相同，所以只写不同的：向量的栏叫 knn_vector，要装着 k-NN 插件（官方的安装包都带着）；
meta 的栏叫 flat_object；查法与分数的算法不一样。默认精确地找（knn_score 脚本），?index=hnsw 用近似的 knn。
"""

from __future__ import annotations

from typing import Any

from rag_common.store import Where
from rag_common.store_elasticsearch import ElasticsearchStore, condition


class OpenSearchStore(ElasticsearchStore):
    NAME = "OpenSearch"

    def _definition(self) -> dict:
        definition = super()._definition()
        definition["mappings"]["properties"]["meta"] = {"type": "flat_object"}
        return {"settings": {"index.knn": self.kind == "hnsw"}, **definition}

    def _vector_field(self) -> dict[str, Any]:
        field: dict[str, Any] = {"type": "knn_vector", "dimension": self.dim}
        if self.kind == "hnsw":  # faiss 的 hnsw 一边找一边看条件，不是找完再去掉
            field["method"] = {"name": "hnsw", "engine": "faiss", "space_type": "innerproduct"}
        return field

    def _nearest(self, vector: list[float], k: int, where: Where | None) -> dict:
        if self.kind == "hnsw":
            knn = {"vector": vector, "k": k, "filter": condition(where)}
            return {"query": {"knn": {"vector": knn}}, "size": k}
        wanted = {"field": "vector", "query_value": vector, "space_type": "innerproduct"}
        script = {"lang": "knn", "source": "knn_score", "params": wanted}
        return {"query": {"script_score": {"query": condition(where), "script": script}}, "size": k}

    def _product(self, score: float) -> float:
        """它给的分总是正的：内积 p ≥ 0 时是 1 + p，p < 0 时是 1 / (1 − p)。换回 p。"""
        return score - 1 if score >= 1 else 1 - 1 / score
