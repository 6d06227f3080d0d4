"""build_vector_store.py 印出来的表与图。"""

from __future__ import annotations

from pathlib import Path

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
    print("               recall@10　看了几成数据　一条几字节　一次查询（毫秒）")
    for name, row in rows.items():
        share = "—" if row["scanned"] is None else f"{row['scanned']:.1%}"
        print(f"  {name:<12}{row['recall']:>9.3f}{share:>14}{row['bytes']:>12}{row['ms']:>14.3f}")


def print_adding(rows: dict[str, dict], n: int, n_new: int) -> None:
    print(f"  已有 {n} 段，添 {n_new} 段；只添要算 {n_new} 段的向量，重建要算 {n + n_new} 段")
    print("        只添（毫秒）　重建（毫秒）　recall@10：只添　重建")
    for name, row in rows.items():
        print(
            f"  {name:<6}{row['add_ms']:>9.1f}{row['rebuild_ms']:>14.1f}{row['add_recall']:>17.3f}{row['rebuild_recall']:>8.3f}"
        )


def print_ids(rows: dict[str, dict]) -> None:
    names = {
        "flat": "Flat",
        "flat_idmap2": "IDMap2(Flat)",
        "ivf": "IVF",
        "ivf_idmap2": "IDMap2(IVF)",
        "ivf_own_ids": "IVF.add_with_ids",
    }
    for name, row in rows.items():
        print(
            f"  {names[name]:<18}{row['asked']} 条里编号错的 {row['wrong']:>4}　两条共用的编号 {row['repeated']:>3}"
        )


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
