"""两次训练差在哪里：设置、数据、上一次、代码、版本、机器，和它们带来的差别：指标、曲线。"""

from __future__ import annotations

from collections import Counter
from json import dumps
from pathlib import Path

from nlp_common.base.errors import UserError
from nlp_common.base.measurements import numbers_in
from nlp_common.data.rows import read_rows
from run_records import DATA_FIELDS, Run, check_data, data_places

MEASURED = ("seconds", "_per_s", "memory_mb", "_s")  # 每次都不同的指标：快慢与内存


def compare(a: Run, b: Run) -> dict[str, list[tuple[str, object, object]]]:
    """→ ``{"设置": [(名字, a 的, b 的)], …}``，只有不同的；都是空的，就是同样做出来的两次。"""
    left, right = a.record, b.record
    places = [{f"{name}_sha256" for name in DATA_FIELDS} | set(DATA_FIELDS)]
    settings = [
        _without(each["fingerprint"], places[0] | set(each.get("parent", {}))) for each in (left, right)
    ]
    data = [_data(each) for each in (left, right)]
    parents = [
        {k: f"{v['stage']}:{v['id']}" for k, v in each.get("parent", {}).items()} for each in (left, right)
    ]
    code = [{k: each.get(k) for k in ("script", "commit")} for each in (left, right)]
    machine = [{k: each.get(k) for k in ("device", "threads")} for each in (left, right)]
    metrics = [_steady(numbers_in(each.get("metrics", {}))) for each in (left, right)]
    return {
        "设置": _different(*settings),
        "数据": _different(*data),
        "上一次": _different(*parents),
        "代码": _different(*code),
        "版本": _different(left.get("versions", {}), right.get("versions", {})),
        "机器": _different(*machine),
        "指标": _different(*metrics),
    }


def same_weights(a: Run, b: Run) -> bool:
    return a.id == b.id


def first_parting(a: dict, b: dict) -> int | None:
    """两条训练曲线从第几步起不同；一直相同是 None。"""
    for one, other in zip(a.get("history", []), b.get("history", []), strict=False):
        if one != other:
            return one.get("step")
    return None


def changed_rows(a: Run, b: Run) -> dict[str, tuple[int, int]]:
    """两边的数据文件都还在、没改过：``{名字: (只有 a 有的几行, 只有 b 有的几行)}``。"""
    found = {}
    left, right = data_places(a.record), data_places(b.record)
    for name in left.keys() & right.keys():
        if left[name][1] == right[name][1] or check_data(*left[name]) or check_data(*right[name]):
            continue
        counts = [_count(each[name][0]) for each in (left, right)]
        found[name] = ((counts[0] - counts[1]).total(), (counts[1] - counts[0]).total())
    return found


def _count(path: Path) -> Counter:
    try:
        rows = read_rows(str(path)).rows
    except UserError:
        return Counter()
    return Counter(dumps(row, sort_keys=True, ensure_ascii=False, default=str) for row in rows)


def _data(record: dict) -> dict[str, str]:
    """每份数据由内容认，不由路径认。"""
    found = {}
    for name, source in record.get("data", {}).items():
        if isinstance(source, dict):
            found[name] = f"{source.get('rows', 0):,} 行 {(source.get('sha256') or '')[:8]}".rstrip()
    return found


def _without(values: dict, names: set[str]) -> dict:
    return {name: value for name, value in values.items() if name not in names}


def _steady(metrics: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if not name.endswith(MEASURED)}


def _different(a: dict, b: dict) -> list[tuple[str, object, object]]:
    names = list(a) + [name for name in b if name not in a]
    return [(name, a.get(name), b.get(name)) for name in names if a.get(name) != b.get(name)]


def show_difference(a: Run, b: Run) -> None:
    """一屏：左边 a，右边 b，只说不同的。"""
    print(f"{a.title} 与 {b.title}")
    found = compare(a, b)
    for group, rows in found.items():
        if not rows:
            continue
        print(f"  {group}")
        for name, left, right in rows:
            gain = f"（{right - left:+.4g}）" if _number(left) and _number(right) else ""
            print(f"    {name}：{_shown(left)} → {_shown(right)}{gain}")
        if group == "数据":
            for name, (only_a, only_b) in changed_rows(a, b).items():
                print(f"    {name}：只有左边有的 {only_a:,} 行，只有右边有的 {only_b:,} 行")
    parting = first_parting(a.record, b.record)
    if same_weights(a, b):
        print("  权重逐位相同")
    elif parting is not None:
        print(f"  训练曲线从第 {parting} 步起不同")
    else:
        print("  权重不同，记下的训练曲线相同")


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _shown(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "没有" if value is None else str(value)
