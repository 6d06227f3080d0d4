"""大批文字 → 向量：同一个函数 embed_batch，在这个进程里、几个进程里、Ray Data 上跑，次序与结果都一样。

一批一批按原来的次序交出来，写进知识库就是记下了做到哪里：断了，再来时库里没有的就是没做的，不另记进度。
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from nlp_common.base.errors import UserError
from rag_common.embed import Embedder, LSAEmbedder, fit_lsa, load_embedder

ENGINES = ("serial", "processes", "ray")


def embed_batch(job: dict) -> dict:
    """一批：{"embedder": 名字, "texts": 文字们} → {"vectors": (N, D)}。只靠参数，在哪个进程里都能跑。"""
    return {"vectors": embedder_named(job["embedder"]).passages(list(job["texts"]))}


@functools.lru_cache(maxsize=2)
def embedder_named(name: str) -> Embedder:
    """一个进程里只载入一次。``lsa:文件`` 是自己学的 LSA。"""
    return read_lsa(Path(name.removeprefix("lsa:"))) if name.startswith("lsa:") else load_embedder(name)


def embed_in_order(
    batches: Sequence[Sequence[str]], embedder: str, engine: str = "serial", workers: int = 1
) -> Iterator[np.ndarray]:
    """各批的向量，次序与 batches 相同。"""
    jobs = [{"embedder": embedder, "texts": list(texts)} for texts in batches]
    if engine == "processes":
        with multiprocessing.get_context("spawn").Pool(workers) as pool:  # fork 与线程一起用会卡死
            for done in pool.imap(embed_batch, jobs):  # imap 按次序交；imap_unordered 不按
                yield done["vectors"]
    elif engine == "ray":
        yield from _on_ray(jobs, workers)
    else:
        for job in jobs:
            yield embed_batch(job)["vectors"]


def _on_ray(jobs: list[dict], workers: int) -> Iterator[np.ndarray]:
    """Ray Data：一批是数据集的一行，map 在各台机器上跑 embed_batch，按次序取回来。

    已有集群就设好环境变量 RAY_ADDRESS（各台机器上同样的路径要有这个仓库）；没有就在本机开一个。
    """
    import ray

    paths = os.pathsep.join(path for path in sys.path if path)  # 工作的进程要找得到这个文件
    ray.init(
        num_cpus=None if os.environ.get("RAY_ADDRESS") else workers,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": paths}},
    )
    ray.data.DataContext.get_current().execution_options.preserve_order = True
    ray.data.DataContext.get_current().enable_progress_bars = False
    numbered = [{**job, "number": number} for number, job in enumerate(jobs)]
    try:
        for row in ray.data.from_items(numbered, override_num_blocks=len(jobs)).map(embed_batch).iter_rows():
            yield np.ascontiguousarray(row["vectors"], dtype=np.float32)
    finally:
        ray.shutdown()


def check_engine(engine: str, workers: int) -> None:
    if engine == "ray" and find_spec("ray") is None:
        raise UserError(
            "--engine ray 要先安装：pip install 'ray[data]'；不装就用 --engine processes，结果相同。"
        )
    if engine == "serial" and workers > 1:
        raise UserError(
            f"--engine serial 只有一个进程，--workers {workers} 用不上：换成 --engine processes。"
        )


# ---------------------------------------------------------------- LSA 存成文件，各进程读同一份


def lsa_file(path: Path, texts: Sequence[str], dim: int) -> str:
    """在 texts 上学 LSA 存成 path（已有就不再学），返回 embed_batch 认得的名字。"""
    if not path.is_file():
        learned = fit_lsa(texts, dim, max_words=8000)
        path.parent.mkdir(parents=True, exist_ok=True)
        half = path.with_suffix(".half.npz")
        np.savez(half, words=np.array(list(learned.words)), idf=learned.idf, basis=learned.basis)
        half.replace(path)  # 写到一半断了，不会留下半个文件
    return f"lsa:{path}"


def read_lsa(path: Path) -> LSAEmbedder:
    with np.load(path, allow_pickle=False) as saved:
        return LSAEmbedder([str(word) for word in saved["words"]], saved["idf"], saved["basis"])
