"""比内存还大的数据：看文字的几步，一块一块地做。步骤就是 curation_rows.py 的那几步，只有去重换成 big_files.py 的。

第一遍  读一块 → 盖住个人信息 → 垃圾、语言、评测的题 → 留下的写进 passed.jsonl，丢掉的写进 dropped.jsonl
第二遍  passed.jsonl 里找重复（内存只用 memory_mb）→ 留下的写进 chats.jsonl 或 pairs.jsonl

与一次读完的差别只有一处：评测的题在去重之前就丢了，所以一行与丢掉的那一行近重复、自己盖住的又不到八成，会留下来。
找标错的（要训练）、审计页、数据卡要整份数据，这里没有：先这样洗小，再读进内存做。
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from big_files import data_files, find_in_files
from curation_rows import (
    SHORT,
    Table,
    drop_contaminated,
    drop_garbage,
    drop_other_languages,
    mask_personal,
    mixed_note,
    table_of,
    text_of,
)
from minhash import Duplicate
from nlp_common.base.errors import UserError
from nlp_common.data.files import read_file
from nlp_common.train.stage import Stage

BLOCK = 5000  # 一块几行
STEPS = ("unusable", "personal", "garbage", "language", "contaminated", "duplicate", "near_duplicate")


def curate_file(stage: Stage, asked: dict[str, str]) -> dict:
    """settings.dataset（文件或文件夹）一块一块地洗；asked 是评测的题。返回 run.json 的内容。"""
    settings, work = stage.settings, stage.folder.work
    work.mkdir(parents=True, exist_ok=True)
    counts: dict[str, Counter] = {step: Counter() for step in STEPS}
    with (work / "dropped.jsonl").open("w", encoding="utf-8") as dropped:
        name, rows, masked = first_pass(settings, asked, work / "passed.jsonl", dropped, counts)
        kept = second_pass(settings, work, name, dropped, counts)
    (work / "passed.jsonl").unlink()
    if not kept:
        raise UserError(f"{settings.dataset} 一行也没有留下：{work / 'dropped.jsonl'} 里有每一行的原因。")
    steps = {
        step: {"dropped": sum(each.values()), "reasons": each.most_common()} for step, each in counts.items()
    }
    metrics = {name: {"rows": rows, "kept": kept, "masked": masked, "steps": steps, "coverage": []}}

    def write(folder: Path) -> None:
        for file in (f"{name}.jsonl", "dropped.jsonl"):
            shutil.move(work / file, folder / file)

    return stage.save(metrics, {name: {"name": settings.dataset, "rows": rows}}, write)


def first_pass(settings, asked: dict[str, str], passed: Path, dropped, counts) -> tuple[str, int, int]:
    """→ (chats 或 pairs, 一共几行, 盖住了几行)。"""
    name, rows, masked, mixed = "", 0, 0, 0
    with passed.open("w", encoding="utf-8") as file:
        for block in blocks_of(settings.dataset):
            table = table_of(block, settings.dataset, {}, before=rows)
            if name not in ("", table.name):
                raise UserError(
                    f"{settings.dataset} 里前面是{name}，第 {rows + 1} 条起是 {table.name}：分开来洗。"
                )
            name, rows = table.name, rows + len(block)
            mixed += clean_block(table, asked, settings)
            masked += len(table.masked)
            for step in table.steps:
                counts[step["step"]].update(step["reasons"])
            write_lines(file, ({"place": table.places[i], "row": table.rows[i]} for i in table.alive))
            write_lines(dropped, table.dropped)
    if mixed:
        print(mixed_note(mixed))
    return name, rows, masked


def clean_block(table: Table, asked: dict[str, str], settings) -> int:
    """返回留下的行里，几行夹着一两句别的语言。"""
    mask_personal(table)
    drop_garbage(table)
    mixed = drop_other_languages(table, tuple(settings.languages.split(",")))
    if asked:
        drop_contaminated(table, asked, n=13, at_least=settings.overlap)
    return mixed


def second_pass(settings, work: Path, name: str, dropped, counts) -> int:
    """passed.jsonl 去重，留下的写进 <name>.jsonl；返回留下几行。短的行一样的留 short_copies 份。"""
    passed = work / "passed.jsonl"
    found = find_in_files(
        [passed], settings.threshold, work, settings.memory_mb, lambda line: text_of(line["row"])
    )
    copies: Counter[int] = Counter()  # 短的行：留下的第几行 → 与它一样的已有几份
    following, kept = next(found, None), 0
    with (work / f"{name}.jsonl").open("w", encoding="utf-8") as file:
        for number, line in enumerate(read_file(passed)):
            duplicate = None
            if following and following.dropped == number:
                duplicate, following = following, next(found, None)
            if duplicate and is_repeated(duplicate, text_of(line["row"]), copies, settings.short_copies):
                step = "duplicate" if duplicate.similarity == 1 else "near_duplicate"
                counts[step]["一样" if step == "duplicate" else "近重复"] += 1
                said = {
                    "table": name,
                    "place": line["place"],
                    "step": step,
                    "similarity": duplicate.similarity,
                }
                write_lines(dropped, [said | line["row"]])
            else:
                write_lines(file, [line["row"]])
                kept += 1
    return kept


def is_repeated(duplicate: Duplicate, text: str, copies: Counter, short_copies: int) -> bool:
    """这一行该不该丢：长的都丢；短的（寒暄）不算近重复，一样的到了 short_copies 份才丢。"""
    if len(text) >= SHORT:
        return True
    if duplicate.similarity < 1:
        return False
    copies[duplicate.kept] += 1
    return copies[duplicate.kept] >= short_copies


def blocks_of(dataset: str) -> Iterator[list[dict]]:
    """几个文件（或文件夹）里的行，BLOCK 行一块。"""
    block: list[dict] = []
    for file in data_files([dataset]):
        for row in read_file(file):
            block.append(row)
            if len(block) == BLOCK:
                yield block
                block = []
    if block:
        yield block


def write_lines(file, rows) -> None:
    for row in rows:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")
