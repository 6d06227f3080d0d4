"""知识库选哪一种：同样的数据、同样的问题，建、查、改、删、筛选，都做一遍，删了的还会不会出来，也查一遍。

你会学到
  1. 几千、几万条以内，一条一条全比（Flat）就很快，而且精确：先问多大，再问要不要索引。
  2. FAISS 只管向量：文字、编号、落盘、筛选都要自己写；HNSW 连删都不会，只能查的时候去掉。
  3. 各种数据库在这之上给了什么，代价是多少：写得慢些、查得慢些，换来断电不丢、能筛选、能几个进程一起用。
  4. 最要紧的一条不是快：删了的绝不再出来，重新打开以后也不。每一种都验一遍。

怎么运行
  python knowledge_base_selection.py                           # 1000 与 5000 条；没装的跳过，说出怎样装
  python knowledge_base_selection.py --sizes 1000,10000,100000 --output_dir outputs/big
  python knowledge_base_selection.py --only sqlite,qdrant,chroma
  python knowledge_base_selection.py --pgvector pgvector://用户:密码@主机/库 --elasticsearch elasticsearch://主机:9200/试
  python knowledge_base_selection.py --milvus_server milvus+http://127.0.0.1:19530/rag   # 服务器怎样起，见 README.md

应当看到（tiny，实测见本文件夹的 README.md）：删了的在每一种里都不再出来；几千条时 Flat 一次查询不到一毫秒，
比绕一圈数据库快得多；索引要几千条以上才比全比快。

参考：Aumüller et al. 2020（ann-benchmarks）；Malkov & Yashunin 2018（HNSW）；各库的文档。
"""

from nlp_common.base.cli import run_main

import shutil
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from hand_index import best_first
from index_lab import HNSW, IVF, Flat, milliseconds, recall, topics, use_one_thread
from knowledge_bases import BASES, SERVERS, Place, available, inside, memory_mb, postgres
from nlp_common.base.arguments import COUNT, POSITIVE, option
from nlp_common.base.console import padded, print_table
from nlp_common.base.errors import UserError
from nlp_common.draw.plots import bar_chart, line_chart
from nlp_common.train.lesson import run_lesson, run_part
from nlp_common.train.settings import LessonSettings, parse_settings
from nlp_common.train.stage import Stage
from rag_common.chunking import Chunk

HOME = Path(__file__).resolve().parent
PRESETS = {
    "tiny": {"sizes": "1000,5000", "crossing": "250,500,1000,2000,4000,8000"},
    "full": {
        "sizes": "1000,10000,100000",
        "crossing": "250,500,1000,2000,4000,8000,16000,32000,64000,128000",
    },
}
K = 10
TENANTS = "甲乙丙丁戊己庚辛壬癸"  # 筛选：只要其中一家的，占一成
CHANGED = 100  # 改几条、删几条
AT_ONCE = 500  # 一批写几条
GOOD = 0.95  # recall 到这么多才算数


@dataclass
class SelectionSettings(LessonSettings):
    NOT_IN_FINGERPRINT = LessonSettings.NOT_IN_FINGERPRINT | {"pgvector", *SERVERS}

    sizes: str | None = option("各比多少条，逗号隔开，例如 1000,10000,100000")
    crossing: str | None = option("看索引从多大起比全比快：各是多少条，逗号隔开")
    only: str = option(f"只比哪几种，逗号隔开：{'、'.join(BASES)}", ",".join(BASES))
    dim: int = option("向量几维", 128, limits=COUNT)
    questions: int = option("问几次", 100, limits=COUNT)
    patience: float = option("照小的那次的速度，大的建起来要超过这么多秒，就不建", 60.0, limits=POSITIVE)
    pgvector: str | None = option("已有的 PostgreSQL：pgvector://用户:密码@主机:端口/库；不给就在本机起一个")
    milvus_server: str | None = option("已有的 Milvus 服务器：milvus+http://主机:19530/集合（里面的会清空）")
    elasticsearch: str | None = option("已有的 Elasticsearch：elasticsearch://主机:9200/索引（里面的会清空）")
    opensearch: str | None = option("已有的 OpenSearch：opensearch://主机:9200/索引（里面的会清空）")

    def check(self) -> None:
        if min(numbers(self.sizes, "sizes")) < 5 * CHANGED:
            raise UserError(f"--sizes 里最小的也要有 {5 * CHANGED} 条，给的是 {self.sizes}。")
        numbers(self.crossing, "crossing")
        unknown = [name or "空的" for name in self.only.split(",") if name not in BASES]
        if unknown:
            raise UserError(f"--only 里不认识 {'、'.join(unknown)}，可以是 {'、'.join(BASES)}。")
        if self.dim % 8:
            raise UserError(f"--dim 要是 8 的倍数（PQ 一段几维要分得匀），给的是 {self.dim}。")


def numbers(text: str, name: str) -> list[int]:
    if not all(part.strip().isdigit() and int(part) > 0 for part in text.split(",")):
        raise UserError(f"--{name} 要是逗号隔开的正整数，例如 1000,5000，给的是 {text}。")
    return [int(part) for part in text.split(",")]


# ---------------------------------------------------------------- 全貌


def learn(stage: Stage) -> dict:
    settings = stage.settings
    names = available(servers(settings), settings.only.split(","))
    use_one_thread()
    rows: dict[str, dict[str, dict]] = {}
    wanted = any(name.startswith("pgvector") for name in names)
    with postgres(settings.pgvector, wanted) as address:
        for size in numbers(settings.sizes, "sizes"):
            data = make_data(size, settings.dim, settings.questions, settings.seed)
            print(f"\n{size} 条，{settings.dim} 维")
            print_title()
            for name in names:
                if seconds := too_slow(rows.get(name), size, settings.patience):
                    said = f"照前一次的速度，建起来要 {seconds:.0f} 秒，--patience {seconds + 1:.0f} 就等它"
                    print_row(BASES[name][0], {"fault": said})
                    continue
                work = partial(try_base, name=name, data=data, servers=servers(settings, address))
                try:
                    row = run_part(stage, f"{name}-{size}", work)
                except UserError as error:  # 服务器没启动等：说出来，比别的；不算做完，起好了再来还要比
                    row = {"fault": str(error)}
                rows.setdefault(name, {})[f"n{size}"] = row
                print_row(BASES[name][0], row)
    faults = {name: row["fault"] for name, each in rows.items() for row in each.values() if "fault" in row}
    if set(faults) == set(rows):
        raise UserError("一种也没有比成：\n  " + "\n  ".join(dict.fromkeys(faults.values())))
    crossing = run_part(stage, "crossing", find_crossing)
    print_crossing(crossing)

    contract = [row for each in rows.values() for row in each.values() if "fault" not in row]
    lost = sum(not (row["counted"] and row["kept"]) for row in contract)
    metrics = {
        "bases": len(rows),
        "lost_rows": lost,
        "came_back": sum(row["came_back"] + row["came_back_reopened"] for row in contract),
        "rows": rows,
        "crossing": crossing,
    }
    print(
        f"\n删了的又查出来：{metrics['came_back']} 次（{len(contract)} 次试验，重新打开前后各查一遍）；条数对不上 {lost} 次"
    )
    data = {"name": "topics", "rows": max(numbers(settings.sizes, "sizes"))}
    return stage.save(metrics, data, partial(draw, metrics=metrics))


def servers(settings: SelectionSettings, pgvector: str | None = None) -> dict[str, str | None]:
    """服务器的网址；没有给的是 None。pgvector 是在本机起的那个。"""
    given = {name: getattr(settings, name) for name in ("pgvector", *SERVERS)}
    return given | ({"pgvector": pgvector} if pgvector else {})


def too_slow(smaller: dict[str, dict] | None, size: int, patience: float) -> float:
    """照前一次（条数少些）的速度，这次建起来要几秒；不超过 patience 是 0。"""
    if not smaller:
        return 0.0
    n, row = list(smaller.items())[-1]
    seconds = row.get("build_seconds", 0.0) * size / int(n[1:])
    return seconds if seconds > patience else 0.0


@dataclass
class Data:
    chunks: list[Chunk]
    vectors: np.ndarray  # (N, D)
    queries: np.ndarray  # (Q, D)


def make_data(n: int, dim: int, n_queries: int, seed: int) -> Data:
    """造的向量，五十条左右一个主题；问题也围着这些主题。十分之一属于同一家（tenant）。"""
    both = topics(n + n_queries, dim, max(n // 50, 4), seed)
    chunks = []
    for number in range(n):
        text = f"第 {number} 条：" + "知识库里的一段话。" * 10
        chunks.append(
            Chunk(f"c{number}", text, f"文档{number // 20}", 0, len(text), {"tenant": TENANTS[number % 10]})
        )
    return Data(chunks, both[:n], both[n:])


# ---------------------------------------------------------------- 一种库，从建到重新打开


def try_base(part: Stage, name: str, data: Data, servers: dict[str, str | None]) -> dict:
    """建、查、筛选、改、删、重新打开。"""
    settings = part.settings
    folder = part.folder.work / "bases"
    shutil.rmtree(folder, ignore_errors=True)
    place = Place(folder, settings.dim, data.vectors, servers)
    try:
        return measure(place, name, data)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def measure(place: Place, name: str, data: Data) -> dict:
    place.at("warm").open(name).close()  # 先导入它要的包：不算在时间与内存里
    before = memory_mb()
    store = place.open(name)
    if hasattr(store, "ids"):
        store.delete(store.ids())  # 服务器上的库里可能有上次留下的
    started = time.perf_counter()
    for start in range(0, len(data.chunks), AT_ONCE):
        store.upsert(data.chunks[start : start + AT_ONCE], data.vectors[start : start + AT_ONCE])
    row: dict[str, Any] = {"build_seconds": time.perf_counter() - started}

    row |= ask(store, data, "", None)
    row |= ask(store, data, "filter_", {"tenant": TENANTS[0]})
    after = memory_mb()
    row["memory_mb"] = max(after - before, 0.0) if before and after and inside(name) else None

    row["upsert_ms"], row["changed_found"] = change(store, data)
    gone = [chunk.id for chunk in data.chunks[CHANGED : 2 * CHANGED]]
    started = time.perf_counter()
    removed = store.delete(gone)
    row["delete_ms"] = 1000 * (time.perf_counter() - started) / CHANGED
    row["came_back"] = came_back(store, data, gone)
    row["counted"] = store.count() == len(data.chunks) - removed and removed == CHANGED
    disk = place.disk(name, store) if name.startswith("pgvector") else None
    store.close()

    store = place.open(name)  # 换一个进程也是这样：只剩盘上的
    row["came_back_reopened"] = came_back(store, data, gone)
    row["kept"] = store.count() == len(data.chunks) - CHANGED
    store.close()
    row["disk_mb"] = (disk or place.disk(name, store) or 0) / 2**20
    return row


def ask(store: Any, data: Data, prefix: str, where: dict | None) -> dict:
    """一次一个问题：p50、p95 几毫秒；真正最近的十个（在筛选之内的）找到几成。"""
    allowed = np.array([not where or chunk.meta["tenant"] == where["tenant"] for chunk in data.chunks])
    scores = np.where(allowed, data.queries @ data.vectors.T, -np.inf)  # (Q, N)
    truth = best_first(scores, K)
    taken, found = [], 0
    for row, query in enumerate(data.queries):
        started = time.perf_counter()
        [hits] = store.search(query[None], K, where)
        taken.append(1000 * (time.perf_counter() - started))
        found += len({hit.id for hit in hits} & {f"c{number}" for number in truth[row]})
    return {
        f"{prefix}p50_ms": float(np.percentile(taken, 50)),
        f"{prefix}p95_ms": float(np.percentile(taken, 95)),
        f"{prefix}recall": found / K / len(data.queries),
    }


def change(store: Any, data: Data) -> tuple[float, float]:
    """头 CHANGED 条换成别的向量与文字：一条几毫秒；拿新的向量去问，第一名是新的文字的有几成。"""
    fresh = topics(CHANGED, data.vectors.shape[1], CHANGED, seed=99, spread=0.1)
    new = [
        Chunk(chunk.id, "改过的 " + chunk.text, chunk.document, 0, 1, chunk.meta)
        for chunk in data.chunks[:CHANGED]
    ]
    started = time.perf_counter()
    store.upsert(new, fresh)
    taken = 1000 * (time.perf_counter() - started) / CHANGED
    right = [hits[0].text == row.text for row, hits in zip(new, store.search(fresh, 1), strict=True) if hits]
    return taken, sum(right) / CHANGED


def came_back(store: Any, data: Data, gone: list[str]) -> int:
    """删了的各条，拿它自己的向量去问，它还出来的有几次。"""
    asked = data.vectors[CHANGED : 2 * CHANGED]
    return sum(hit.id in gone for hits in store.search(asked, K) for hit in hits)


# ---------------------------------------------------------------- 索引从多大起比全比快


def find_crossing(part: Stage) -> dict:
    """各种大小，全比、HNSW、IVF 一次查询几毫秒。IVF 查的桶数取 recall 到 GOOD 的最少的。"""
    settings = part.settings
    rows: dict[str, Any] = {}
    for size in numbers(settings.crossing, "crossing"):
        data = make_data(size, settings.dim, settings.questions, settings.seed)
        lists = max(4, int(np.sqrt(size)))
        made = {"flat": Flat(settings.dim), "hnsw": HNSW(settings.dim), "ivf": IVF(data.vectors, lists, 1)}
        for index in made.values():
            index.add(data.vectors)
        while recall(made["ivf"], data.vectors, data.queries) < GOOD and made["ivf"].nprobe < lists:
            made["ivf"].nprobe += 1
        row = {name: milliseconds(index, data.queries) for name, index in made.items()}
        row |= {"probe": made["ivf"].nprobe, "ivf_recall": recall(made["ivf"], data.vectors, data.queries)}
        row["hnsw_recall"] = recall(made["hnsw"], data.vectors, data.queries)
        rows[f"n{size}"] = row
    first = {}
    for name in ("hnsw", "ivf"):
        faster = [
            size for size, row in rows.items() if row[name] < row["flat"] and row[f"{name}_recall"] >= GOOD
        ]
        first[f"{name}_from"] = int(faster[0][1:]) if faster else None
    return {"sizes": rows} | first


# ---------------------------------------------------------------- 看

# 栏名 → (占几格, 怎样写)；量完一行印一行
COLUMNS = {
    "建（秒）": (9, lambda row: f"{row['build_seconds']:.2f}"),
    "p50": (8, lambda row: f"{row['p50_ms']:.2f}"),
    "p95（毫秒）": (13, lambda row: f"{row['p95_ms']:.2f}"),
    "recall": (8, lambda row: f"{row['recall']:.3f}"),
    "筛选 p50": (10, lambda row: f"{row['filter_p50_ms']:.2f}"),
    "筛选 recall": (13, lambda row: f"{row['filter_recall']:.3f}"),
    "改一条": (8, lambda row: f"{row['upsert_ms']:.2f}"),
    "删一条": (8, lambda row: f"{row['delete_ms']:.2f}"),
    "盘（MB）": (9, lambda row: f"{row['disk_mb']:.1f}"),
    "内存（MB）": (11, lambda row: "—" if row["memory_mb"] is None else f"{row['memory_mb']:.0f}"),
    "删了又出来": (12, lambda row: str(row["came_back"] + row["came_back_reopened"])),
}


def print_title() -> None:
    print(padded("", 24) + "".join(padded(name, cells, right=True) for name, (cells, _) in COLUMNS.items()))


def print_row(label: str, row: dict) -> None:
    if "fault" in row:
        print(padded(label, 24) + f"跳过：{row['fault']}")
        return
    print(
        padded(label, 24)
        + "".join(padded(write(row), cells, right=True) for cells, write in COLUMNS.values())
    )


def print_crossing(found: dict) -> None:
    print("\n一次查询几毫秒")
    table = [["多少条", "全比", "HNSW", "IVF", "IVF 查几个桶", "IVF 的 recall"]]
    for size, row in found["sizes"].items():
        times = [f"{row[name]:.3f}" for name in ("flat", "hnsw", "ivf")]
        table.append([size[1:], *times, row["probe"], f"{row['ivf_recall']:.3f}"])
    print_table(table)
    for name in ("hnsw", "ivf"):
        first = found[f"{name}_from"]
        print(f"{name.upper()} " + (f"从 {first} 条起比全比快" if first else "在这些大小里都不比全比快"))


def draw(folder: Path, metrics: dict) -> None:
    rows, lines = metrics["crossing"]["sizes"], {}
    for name, label in {"flat": "全比|Flat", "hnsw": "HNSW", "ivf": "IVF"}.items():
        lines[label] = ([int(size[1:]) for size in rows], [row[name] for row in rows.values()])
    title, across = "索引从多大起才快|When an index beats brute force", "多少条|vectors"
    line_chart(folder / "crossing.svg", lines, title, across, "毫秒|ms")
    bars: dict[str, dict[str, float]] = {"不筛选|no filter": {}, "只要一成|filtered": {}}
    for name, each in metrics["rows"].items():
        row = next(iter(each.values()))  # 最小的那次
        exact = row.get("recall") == row.get("filter_recall") == 1.0
        shown = "一条不少的各种|the exact ones" if exact else BASES[name][0]  # 十几种都画，字就小得看不清
        if "fault" not in row:
            for label, key in zip(bars, ("recall", "filter_recall"), strict=True):
                bars[label][shown] = row[key]
    bar_chart(folder / "filter.svg", bars, "加上筛选，还找得全吗|Recall with a filter", "", "recall@10")


def main(argv: list[str] | None = None) -> dict:
    settings = parse_settings(SelectionSettings, PRESETS, argv)
    return run_lesson("knowledge_base_selection", HOME, settings, learn)


if __name__ == "__main__":
    run_main(main)
