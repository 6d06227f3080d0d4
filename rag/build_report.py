"""build_vector_store.py 印出来的表与图。"""

from __future__ import annotations

from pathlib import Path

from nlp_common.base.console import print_table
from nlp_common.draw.plots import bar_chart, line_chart

KINDS = {
    "later": "后来的新闻|later news",
    "stories": "小世界的故事|stories",
    "topics": "没见过的主题|new topics",
}


def print_writing(metrics: dict) -> None:
    resume, speeds = metrics["resume"], metrics["batches"]
    print(
        f"  断在 {resume['stops']} 处，接着写完：{resume['same']} 次与一口气写完的逐字节相同，最多白算 {resume['embedded_twice']} 段"
    )
    print("  一批写几条　" + "　".join(f"{batch} 条：{speed:,.0f} 条/秒" for batch, speed in speeds.items()))


def print_kinds(rows: dict[str, dict]) -> None:
    table = [["", "recall@10", "看了几成数据", "一条几字节", "一次查询（毫秒）"]]
    for name, row in rows.items():
        share = "—" if row["scanned"] is None else f"{row['scanned']:.1%}"
        table.append([name, f"{row['recall']:.3f}", share, row["bytes"], f"{row['ms']:.3f}"])
    print_table(table)


def print_adding(rows: dict[str, dict], n: int, n_new: int) -> None:
    print(f"已有 {n} 段，添 {n_new} 段；只添要算 {n_new} 段的向量，重建要算 {n + n_new} 段")
    table = [["", "只添（毫秒）", "重建（毫秒）", "只添：recall@10", "重建：recall@10"]]
    for name, row in rows.items():
        times = [f"{row['add_ms']:.1f}", f"{row['rebuild_ms']:.1f}"]
        table.append([name, *times, f"{row['add_recall']:.3f}", f"{row['rebuild_recall']:.3f}"])
    print_table(table)


def print_drift(rows: dict[str, dict]) -> None:
    table = [["新来的", "recall@10：只有旧的", "添了新的", "重新训练", "看几成数据：添了新的", "重新训练"]]
    for name, row in rows.items():
        recalls = [f"{row[key]:.3f}" for key in ("old", "added", "retrained")]
        shares = [f"{row[key]:.1%}" for key in ("added_scanned", "retrained_scanned")]
        table.append([KINDS[name].split("|")[0], *recalls, *shares])
    print_table(table)


def print_ids(rows: dict[str, dict]) -> None:
    names = {
        "flat": "Flat",
        "flat_idmap2": "IDMap2(Flat)",
        "ivf": "IVF",
        "ivf_idmap2": "IDMap2(IVF)",
        "ivf_own_ids": "IVF.add_with_ids",
    }
    table = [["", "问了几条", "编号不是自己的", "两条共用的编号"]]
    for name, row in rows.items():
        table.append([names[name], row["asked"], row["wrong"], row["repeated"]])
    print_table(table)


def draw(folder: Path, metrics: dict) -> None:
    bars = {}
    for key, label in {
        "old": "只有旧的|before",
        "added": "添了新的|added",
        "retrained": "重新训练|retrained",
    }.items():
        bars[label] = {KINDS[name]: row[key] for name, row in metrics["drift"].items()}
    bar_chart(
        folder / "drift.svg", bars, "数据变了，IVF 的 recall@10|IVF recall after drift", "", "recall@10"
    )
    lines = {}
    for name, label in {"ivf": "IVF", "flat": "Flat"}.items():
        rows = [row for row in metrics["kinds"].values() if row["kind"] == name]
        lines[label] = ([row["scanned"] for row in rows], [row["recall"] for row in rows])
    line_chart(
        folder / "probes.svg",
        lines,
        "看得多，找得全|Recall against data scanned",
        "看了几成数据|share scanned",
        "recall@10",
    )
