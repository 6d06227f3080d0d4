"""读者自己的题目与回答：IFEval 格式的题目文件，和"一行一个 prompt 与 response"的回答文件；错在哪一行就说哪一行。"""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

from instructions_zh import RULES, kwargs_fault
from nlp_common.base.errors import UserError
from question_files import place_of, places_of, read_questions

ANSWER_NAMES = ("response", "answer", "output")


def read_instruction_file(path: str, limit: int | None = None, skip: bool = False) -> list[dict]:
    """题目文件 → ``{"key", "prompt", "instruction_id_list", "kwargs"}``；值是 null 的参数当作没有（IFEval 的习惯）。

    不认识的要求、缺参数是 UserError，说出第几行；skip：跳过这样的题，并说出是哪几行。
    """
    rows, skipped, keys = [], [], {}
    for place, row in enumerate(read_questions(path, ("prompt", "instruction_id_list"), limit), 1):
        found = {
            "key": row.get("key", place),
            "prompt": str(row["prompt"]),
            "instruction_id_list": as_list(row["instruction_id_list"]),
        }
        ids = found["instruction_id_list"]
        given = as_list(row.get("kwargs")) or [{}] * len(ids)
        fault = row_fault(ids, given)
        if fault and skip:
            skipped.append((place, fault))
            continue
        if fault:
            raise UserError(
                f"{path} {place_of(path, place)}（key={found['key']}）：{fault}。要跳过这样的题，加 --skip_unknown。"
            )
        found["kwargs"] = [without_null(each) for each in given]
        if found["key"] in keys:
            here, there = place_of(path, place), place_of(path, keys[found["key"]])
            raise UserError(f"{path} {here}的 key {found['key']} 与{there}的重复。")
        keys[found["key"]] = place
        rows.append(found)
    if skipped:
        shown = "；".join(f"{place_of(path, place)}（{fault}）" for place, fault in skipped[:10])
        print(f"{path} 跳过 {len(skipped)} 道题：{shown}{' 等' if len(skipped) > 10 else ''}")
    if not rows:
        raise UserError(f"{path} 里没有一道能检查的题。")
    return rows


def as_list(value: Any) -> list:
    """列表；csv 里的是 JSON 的文字，parquet 里的是数组。不成样子的给出空的。"""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            return [value]
    if hasattr(value, "tolist"):
        value = value.tolist()
    return value if isinstance(value, list) else []


def without_null(kwargs: dict) -> dict:
    return {name: as_list(v) if hasattr(v, "tolist") else v for name, v in kwargs.items() if v is not None}


def row_fault(ids: list, given: list) -> str | None:
    """一道题的毛病；没有是 None。"""
    if not ids:
        return "instruction_id_list 是空的，没有要求可以检查"
    if len(given) != len(ids):
        return f"有 {len(ids)} 条要求，kwargs 却有 {len(given)} 项，要一样多"
    for id, kwargs in zip(ids, given, strict=True):
        if id not in RULES:
            close = difflib.get_close_matches(str(id), RULES, n=1)
            return f"不认识的要求 {id}{f'，是不是 {close[0]}' if close else ''}"
        if not isinstance(kwargs, dict):
            return f"{id} 的 kwargs 要是一个对象，给的是 {kwargs!r}"
        if fault := kwargs_fault(id, without_null(kwargs)):
            return f"{id} {fault}"
    return None


def read_answer_file(path: str, rows: list[dict]) -> list[dict]:
    """回答文件 → 各题的回答 ``{"text", "ended"}``，次序同 rows；由 prompt 或 key 对上。

    缺栏、重复、没有答到哪道题，是 UserError；空的回答照收（什么要求也不合），并说出是哪几行。
    """
    by_prompt = {row["prompt"].strip(): row["key"] for row in rows}
    keys = {str(row["key"]): row["key"] for row in rows}
    found: dict[Any, tuple[int, str]] = {}
    empty, extra = [], []
    for place, row in enumerate(read_questions(path), 1):
        name = next((name for name in ANSWER_NAMES if name in row), None)
        if name is None:
            raise UserError(
                f"{path} {place_of(path, place)}没有 response；这一行有的是：{'、'.join(map(str, row))}。"
            )
        if row.get("prompt") is not None:
            key = by_prompt.get(str(row["prompt"]).strip())
        elif row.get("key") is not None:
            key = keys.get(str(row["key"]))
        else:
            raise UserError(f"{path} {place_of(path, place)}没有 prompt，也没有 key：不知道它答的是哪道题。")
        if key is None:
            extra.append(place)
            continue
        if key in found:
            here, there = place_of(path, place), place_of(path, found[key][0])
            raise UserError(f"{path} {here}与{there}答的是同一道题（key={key}），请删去一行。")
        text = "" if row[name] is None else str(row[name])
        found[key] = (place, text)
        if not text.strip():
            empty.append(place)
    missing = [(place, row["key"]) for place, row in enumerate(rows, 1) if row["key"] not in found]
    if missing:
        shown = "、".join(f"第 {place} 道（key={key}）" for place, key in missing[:10])
        raise UserError(f"{path} 没有答到 {len(missing)} 道题：{shown}{' 等' if len(missing) > 10 else ''}。")
    name = Path(path).name
    if extra:
        print(f"{name} {places_of(path, extra)}的题不在题目里，不用。")
    if empty:
        print(f"{name} {places_of(path, empty)}的回答是空的（共 {len(empty)} 行）：什么要求也不合。")
    return [{"text": found[row["key"]][1], "ended": True} for row in rows]
