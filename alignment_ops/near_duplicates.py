"""近重复怎样找：MinHash 估得准不准、LSH 漏多少、中文里找得到什么，都量出来。

学到什么：两段文字像不像，变成两个集合的 Jaccard；不用两两比，也能在几万行里找出像的；误差与漏掉的比例都有公式，
量到的与公式一样。打散的办法写错一点（a 太小），128 个数就只值一个数。

运行：
    python near_duplicates.py                                        # 上课，约二十秒
    python near_duplicates.py --dataset 我的数据.jsonl --output_dir outputs/mine    # 自己的数据：kept.jsonl、dropped.jsonl
    python near_duplicates.py --dataset 很大.jsonl --memory_mb 512 --output_dir outputs/big    # 放不进内存的也行
    python near_duplicates.py --dataset 文件夹 --engine ray --output_dir outputs/ray   # 几个进程、几台机器

预期输出（实测见本文件夹的 README.md）：估计的标准差与 √(J(1−J)/K) 相差不到一成；改了标点、改了几个字的都找到。

参考：见 minhash.py；放不进内存的在 big_files.py，Ray 在 ray_duplicates.py。
"""

from nlp_common.base.cli import run_main

import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from big_files import data_files, find_in_files, row_text
from hash_families import FAMILIES, sets_with, try_family
from minhash import (
    NGRAM,
    Duplicate,
    Scheme,
    band_keys,
    find_duplicates,
    find_exact,
    jaccard,
    make_scheme,
    normalize,
    seen_probability,
    shingles,
    signatures,
    smallest,
)
from nlp_common.base.arguments import COUNT, Limits, option
from nlp_common.base.intervals import proportion_interval
from nlp_common.data.files import read_file
from nlp_common.data.reviews import raw_reviews
from nlp_common.draw.figures import render
from nlp_common.draw.plots import COLORS
from nlp_common.train.lesson import run_lesson
from nlp_common.train.settings import LessonSettings, parse_settings
from nlp_common.train.stage import Stage
from planted_duplicates import CHANGES, SIMILAR, Planted, plant
from ray_duplicates import find_with_ray

HOME = Path(__file__).resolve().parent
PRESETS: dict[str, dict] = {
    "tiny": {"n_texts": 3000, "n_pairs": 400},
    "full": {"n_texts": 6000, "n_pairs": 2000},
}
SET_SIZE = 300  # 量误差时，两个集合的并集有多少个元素
GRID = (0.2, 0.35, 0.5, 0.65, 0.8, 0.95)
CURVES = ((18, 7), (9, 13), (42, 3))  # 图里画的 (b, r)：阈值 0.8 我们的、datasketch 的，与阈值 0.5 我们的


@dataclass
class NearSettings(LessonSettings):
    dataset: str | None = option(
        "自己的数据：文件或文件夹（json、jsonl、csv、tsv、parquet、txt）；没给就上课"
    )
    threshold: float = option("Jaccard 不小于它的算重复", 0.8, Limits(above=0, at_most=1))
    engine: Literal["stream", "ray"] = option(
        "自己的数据怎么做：stream 是一台机器，内存不随文件变大；ray 是几个进程或几台机器", "stream"
    )
    memory_mb: int = option("stream：排序最多用多少 MB 内存", 256, Limits(at_least=16))
    n_texts: int | None = option("课上：从报上取几段", limits=COUNT)
    n_pairs: int | None = option("课上：每种相似度量几对", limits=COUNT)


def learn(stage: Stage) -> dict:
    settings: NearSettings = stage.settings
    scheme = make_scheme(settings.threshold, seed=settings.seed)
    print(
        f"{len(scheme.offsets)} 个最小数，阈值 {settings.threshold}：切成 {scheme.bands} 段，每段 {scheme.rows} 个"
    )
    families = compare_families(settings)
    errors = compare_errors(scheme, settings)
    curve = measure_curve(settings)
    planted = find_planted(settings, scheme)
    reviews = clean_reviews(settings)
    metrics = {
        "bands": scheme.bands,
        "rows": scheme.rows,
        "seen_at_threshold": seen_probability(settings.threshold, scheme.bands, scheme.rows),
        "largest_bias": max(abs(each["bias"]) for each in errors.values()),
        "largest_times_theory": max(each["times_theory"] for each in errors.values()),
        **planted,
        **reviews,
        "families": families,
        "errors": errors,
        "curve": curve,
    }
    return stage.save(metrics, {}, lambda folder: draw(folder / "s_curve.svg", curve))


# ---------------------------------------------------------------- 1. 打散的办法


def compare_families(settings: NearSettings) -> dict:
    """同样的集合，几种打散的办法；对的办法，标准差是公式的 1 倍上下。"""
    print("\n打散的办法（Jaccard 0.5，128 个数）      标准差是公式的几倍   128 个办法选中几个不同的元素")
    found = {}
    for number, (name, (title, scatter)) in enumerate(FAMILIES.items()):
        found[name] = try_family(scatter, 0.5, SET_SIZE, settings.n_pairs, 128, settings.seed + number)
        times, picked = found[name]["times_theory"], found[name]["elements_picked"]
        print(f"  {title:<30}{times:>12.2f}{picked:>20.1f}")
    return found


# ---------------------------------------------------------------- 2. 误差


def compare_errors(scheme: Scheme, settings: NearSettings) -> dict:
    """minhash.py 的估计：均值对不对，标准差是不是 √(J(1−J)/K)。"""
    print("\nJaccard    估计的均值    标准差    公式的标准差")
    found = {}
    for similarity in GRID:
        values = signatures_of_pairs(similarity, settings.n_pairs, scheme, settings.seed)
        estimates = (values[0::2] == values[1::2]).mean(axis=1)  # (对,)
        exact = round(similarity * SET_SIZE) / SET_SIZE
        theory = (exact * (1 - exact) / len(scheme.offsets)) ** 0.5
        found[f"{similarity:.2f}"] = {
            "bias": float(estimates.mean() - exact),
            "deviation": float(estimates.std()),
            "theory": theory,
            "times_theory": float(estimates.std() / theory),
        }
        print(f"  {exact:.2f}      {estimates.mean():.4f}      {estimates.std():.4f}    {theory:.4f}")
    return found


def signatures_of_pairs(similarity: float, n_pairs: int, scheme: Scheme, seed: int) -> np.ndarray:
    """n_pairs 对集合的最小数 (2·对, K)，一对的两个挨着。"""
    rng = np.random.default_rng([seed, round(1000 * similarity)])
    sets = [each for _ in range(n_pairs) for each in sets_with(similarity, SET_SIZE, rng)]
    starts = np.cumsum([0, *map(len, sets)])[:-1]
    return smallest(np.concatenate(sets), starts, scheme)


# ---------------------------------------------------------------- 3. S 形曲线


def measure_curve(settings: NearSettings) -> dict:
    """几种切法，各种相似度的对被比到几成：公式与量到的。"""
    found: dict = {}
    for bands, rows in CURVES:
        shares = {}
        for similarity in np.linspace(0.05, 0.95, 19).round(2).tolist():
            scheme = make_scheme(settings.threshold, seed=settings.seed + 1)
            values = signatures_of_pairs(similarity, settings.n_pairs, scheme, settings.seed + 1)
            keys = band_keys(values, bands, rows)
            seen = (keys[0::2] == keys[1::2]).any(axis=1)
            shares[f"{similarity:.2f}"] = float(seen.mean())
        found[f"b{bands}_r{rows}"] = shares
    return found


def draw(path: Path, curve: dict) -> None:
    names = {f"b{b}_r{r}": f"b={b}，r={r}|b={b}, r={r}" for b, r in CURVES}

    def paint(axes, text: Callable[[str], str]) -> None:
        xs = np.linspace(0, 1, 101)
        for color, (b, r) in zip(COLORS, CURVES, strict=False):
            name, points = f"b{b}_r{r}", curve[f"b{b}_r{r}"]
            axes.plot(xs, seen_probability(xs, b, r), color=color, label=text(names[name]), linewidth=1.6)
            axes.plot([float(x) for x in points], list(points.values()), "o", color=color, markersize=3)

    title = "被比到的概率：线是公式，点是量到的|Chance to be compared: formula (lines), measured (dots)"
    render(path, paint, list(names.values()), (title, "Jaccard", ""))


# ---------------------------------------------------------------- 4. 埋在报上的段落里


def find_planted(settings: NearSettings, scheme: Scheme) -> dict:
    planted = plant(settings.n_texts, settings.n_texts // 30, settings.seed)
    dropped = {each.dropped: each for each in find_duplicates(planted.texts, settings.threshold)}
    print(
        f"\n报上的段落，改过的与没改过的 {len(planted.texts)} 段；与别的段落重复（改过的或原来的丢掉一个）："
    )
    metrics: dict = {}
    for kind, title in [(name, title) for name, (title, _) in CHANGES.items()] + list(SIMILAR.items()):
        places = [place for place, each in planted.kinds.items() if each == kind]
        hits = sum(place in dropped or planted.sources[place] in dropped for place in places)
        mean = float(np.mean([true_similarity(planted, place) for place in places]))
        name = f"dropped_{kind}" if kind in SIMILAR else f"found_{kind}"
        metrics |= {name: hits / len(places), f"jaccard_{kind}": mean}
        print(f"  {title:<16}Jaccard 平均 {mean:.2f}，找到 {proportion_interval(hits, len(places)).text(2)}")
    others = set(range(len(planted.texts))) - set(planted.kinds) - set(planted.sources.values())
    metrics["dropped_untouched"] = len(others & set(dropped)) / len(others)
    print(f"  没有动过的 {len(others)} 段，丢掉 {len(others & set(dropped))} 段")
    by_spaces = [
        spaces_similarity(planted, place) for place, kind in planted.kinds.items() if kind == "typos"
    ]
    metrics["jaccard_typos_by_spaces"] = float(np.mean(by_spaces))
    print(f"  按空格分词的工具看来，错两个字的与原来的 Jaccard 平均 {np.mean(by_spaces):.2f}")
    return metrics | compare_all(planted, scheme)


def true_similarity(planted: Planted, place: int) -> float:
    texts = (planted.texts[place], planted.texts[planted.sources[place]])
    left, right = (shingles(normalize(text)) for text in texts)
    return jaccard(left, right)


def spaces_similarity(planted: Planted, place: int) -> float:
    left, right = (set(planted.texts[each].split()) for each in (place, planted.sources[place]))
    return len(left & right) / len(left | right)


def compare_all(planted: Planted, scheme: Scheme) -> dict:
    """全部两两比过，够像的对里，LSH 比到了几成；公式说该有几成。"""
    clean = [normalize(text) for text in planted.texts]
    keys = band_keys(signatures(clean, scheme), scheme.bands, scheme.rows)
    pairs = list(every_pair(clean, scheme.threshold))
    seen = sum(bool((keys[left] == keys[right]).any()) for left, right, _ in pairs)
    expected = float(np.mean([seen_probability(each[2], scheme.bands, scheme.rows) for each in pairs]))
    print(
        f"  两两比过，够像的有 {len(pairs)} 对；LSH 比到 {seen} 对（{seen / len(pairs):.1%}），公式 {expected:.1%}"
    )
    return {"pairs": len(pairs), "pairs_seen": seen / len(pairs), "pairs_seen_theory": expected}


def every_pair(clean: list[str], threshold: float) -> Iterator[tuple[int, int, float]]:
    """两两的 Jaccard，不小于 threshold 的：交集的大小是一个稀疏矩阵乘自己的转置。"""
    from scipy.sparse import csr_array

    sets = [shingles(text, NGRAM) for text in clean]
    sizes = np.array([len(each) for each in sets])
    columns = np.unique(np.concatenate(sets), return_inverse=True)[1]
    starts = np.concatenate([[0], sizes.cumsum()])
    matrix = csr_array((np.ones(len(columns), np.int32), columns, starts))  # (段, 元素)
    shared = (matrix @ matrix.T).tocoo()  # (段, 段)
    for left, right, size in zip(*shared.coords, shared.data, strict=True):
        similarity = size / (sizes[left] + sizes[right] - size)
        if left < right and similarity >= threshold:
            yield int(left), int(right), float(similarity)


# ---------------------------------------------------------------- 5. 真的数据


def clean_reviews(settings: NearSettings) -> dict:
    texts = [row["text"] for row in raw_reviews()]
    started = time.perf_counter()
    duplicates = find_duplicates(texts, settings.threshold)
    seconds = time.perf_counter() - started
    exact = len(find_exact(texts))
    print(
        f"\nsnownlp 带的 {len(texts)} 条评论：只差标点的 {exact} 条，再加上近重复的共 {len(duplicates)} 条；几条近重复："
    )
    show([each for each in duplicates if each.similarity < 0.95][:3], texts)
    return {
        "reviews": len(texts),
        "reviews_exact": exact / len(texts),
        "reviews_dropped": len(duplicates) / len(texts),
        "reviews_rows_per_s": len(texts) / seconds,
    }


def show(duplicates: list[Duplicate], texts: list[str], width: int = 46) -> None:
    for each in duplicates:
        print(
            f"  {each.similarity:.2f}  丢 {texts[each.dropped][:width]}\n        留 {texts[each.kept][:width]}"
        )


# ---------------------------------------------------------------- 自己的数据


def clean_own(stage: Stage) -> dict:
    """kept.jsonl：留下的行，原样；dropped.jsonl：丢掉的行，连同它与第几行重复、多像。"""
    settings, work = stage.settings, stage.folder.work
    work.mkdir(parents=True, exist_ok=True)
    if settings.engine == "ray":
        duplicates = iter(find_with_ray([settings.dataset], settings.threshold))
    else:
        duplicates = find_in_files([settings.dataset], settings.threshold, work, settings.memory_mb)
    rows = exact = dropped = 0
    following = next(duplicates, None)
    with (
        (work / "kept.jsonl").open("w", encoding="utf-8") as kept_file,
        (work / "dropped.jsonl").open("w", encoding="utf-8") as dropped_file,
    ):
        for row in (row for file in data_files([settings.dataset]) for row in read_file(file)):
            if following and following.dropped == rows:
                dropped, exact = dropped + 1, exact + (following.similarity == 1)
                if following.similarity < 1 and dropped - exact <= 3:
                    print(
                        f"  {following.similarity:.2f}  第 {rows + 1} 条像第 {following.kept + 1} 条：{row_text(row)[:40]!r}"
                    )
                note = {
                    "row": rows + 1,
                    "kept_row": following.kept + 1,
                    "similarity": round(following.similarity, 4),
                }
                dropped_file.write(json.dumps(note | {"dropped": row}, ensure_ascii=False) + "\n")
                following = next(duplicates, None)
            else:
                kept_file.write(json.dumps(row, ensure_ascii=False) + "\n")
            rows += 1

    def write(folder: Path) -> None:
        for name in ("kept.jsonl", "dropped.jsonl"):
            shutil.move(work / name, folder / name)

    print(f"{rows} 行：一样的 {exact} 行，近重复 {dropped - exact} 行，留下 {rows - dropped} 行")
    metrics = {"rows": rows, "exact": exact, "near": dropped - exact, "kept": rows - dropped}
    return stage.save(metrics, {"dataset": {"name": settings.dataset, "rows": rows}}, write)


def main(argv: list[str] | None = None) -> dict:
    settings = parse_settings(NearSettings, PRESETS, argv)
    return run_lesson("near_duplicates", HOME, settings, clean_own if settings.dataset else learn)


if __name__ == "__main__":
    run_main(main)
