"""读者自己的回答：一个模型一个文件，一行一个 prompt 与 answer；几个文件答的是同样的题。"""

from __future__ import annotations

from pathlib import Path

from nlp_common.base.errors import UserError
from question_files import place_of, places_of, read_questions

ALIASES = {"instruction": "prompt", "output": "answer"}  # AlpacaEval 的 model_outputs.json


def read_answers(paths: list[str]) -> tuple[list[dict], dict[str, list[list[dict]]]]:
    """→ (题 ``{"id", "turns": [{"ask", "right"}]}``，``{模型: 各题的回答}``)，写法同 two_turns.py，只有一轮。

    模型的名字是文件名。题的次序照第一个文件；少了、多了、重复了哪道题，是 UserError，说出文件与行号。
    空的回答照收（算输），并说出是哪几行。
    """
    if len(paths) < 2:
        raise UserError("--answers 要给两个以上的文件，一个模型一个：--answers a.jsonl b.jsonl。")
    files = {Path(path).stem: _by_prompt(path) for path in paths}
    if len(files) < len(paths):
        raise UserError("--answers 的几个文件同名：模型的名字取自文件名，请改成不同的。")
    first = next(iter(files.values()))
    for path, rows in zip(paths, files.values(), strict=True):
        for here, there, there_path in ((first, rows, path), (rows, first, paths[0])):
            for prompt, (place, _) in here.items():
                if prompt not in there:
                    where = paths[0] if here is first else path
                    raise UserError(
                        f"{where} {place_of(where, place)}的题，{there_path} 里没有：{prompt[:30]}…。两个模型要答同样的题。"
                    )
    questions = [
        {
            "id": f"q{number:04d}",
            "turns": [{"ask": prompt, "right": str(row.get("right") or "").strip(), "row": place}],
        }
        for number, (prompt, (place, row)) in enumerate(first.items(), 1)
    ]
    answers = {
        name: [[{"text": rows[prompt][1]["answer"], "ended": True}] for prompt in first]
        for name, rows in files.items()
    }
    return questions, answers


def _by_prompt(path: str) -> dict[str, tuple[int, dict]]:
    """{题: (第几条, 那一条)}"""
    rows = [{ALIASES.get(k, k): v for k, v in row.items()} for row in read_questions(path)]
    found: dict[str, tuple[int, dict]] = {}
    empty = []
    for place, row in enumerate(rows, 1):
        for name in ("prompt", "answer"):
            if name not in row:
                raise UserError(
                    f"{path} {place_of(path, place)}没有 {name}；这一行有的是：{'、'.join(map(str, row))}。"
                )
        prompt = str(row["prompt"] or "").strip()
        if not prompt:
            raise UserError(f"{path} {place_of(path, place)}的 prompt 是空的。")
        if prompt in found:
            here, there = place_of(path, place), place_of(path, found[prompt][0])
            raise UserError(f"{path} {here}与{there}是同一道题，请删去一行。")
        row["answer"] = "" if row["answer"] is None else str(row["answer"])
        if not row["answer"].strip():
            empty.append(place)
        found[prompt] = (place, row)
    if empty:
        shown = places_of(path, empty)
        print(f"{path} {shown}的回答是空的（共 {len(empty)} 行）：不送去评，算输；两边都空算平。")
    return found
