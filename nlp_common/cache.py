"""本项目自己的缓存：放在哪里，以及从网上读来的数据行怎样存下、断网时怎样再用。

网上的数据集是一边下载一边读的（firefly 有一百多万行，只要前一万行就不必下载其余的），Hugging Face 的缓存里
没有它；所以读过的行存在这里：第二次运行不再下载，断网也能训练。
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path


def cache_root() -> Path:
    """环境变量 NLP_LEARNING_CACHE；没有就是 XDG_CACHE_HOME（默认 ~/.cache）里的 nlp_learning。"""
    if base := os.environ.get("NLP_LEARNING_CACHE"):
        return Path(base).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "nlp_learning"


def rows_folder(repo: str, config: str, split: str) -> Path:
    return cache_root() / "rows" / repo.replace("/", "--") / (config or "default") / split


def newest_revision(folder: Path) -> str | None:
    """最近存下的是哪个版本（hub 上的提交号）；没有存过是 None。"""
    newest = max(folder.glob("*.jsonl"), key=lambda path: path.stat().st_mtime, default=None)
    return newest.stem if newest else None


def read_through(path: Path, read_on: Callable[[int], Iterable[dict]]) -> Iterator[dict]:
    """先给出 path 里存着的行，不够时用 read_on(已有几行) 接着读；读到哪里就存到哪里。"""
    rows, whole = load_rows(path)
    kept = len(rows)
    yield from rows
    if whole:
        return
    try:
        for row in read_on(kept):
            rows.append(row)
            yield row
        whole = True
    finally:  # 读够了（生成器被关上）、断线、Ctrl-C：读到的都留着
        if whole or len(rows) > kept:
            save_rows(path, rows, whole)


def load_rows(path: Path) -> tuple[list[dict], bool]:
    """→ (各行, 是不是数据集的全部)；没有、或者坏了（会说明）是 ([], False)。"""
    try:
        with path.open(encoding="utf-8") as file:
            head = json.loads(next(file))
            rows = [json.loads(line) for line in file]
        if len(rows) != head["rows"]:
            raise ValueError(f"应有 {head['rows']} 行，实有 {len(rows)} 行")
        return rows, head["whole"]
    except FileNotFoundError:
        return [], False
    except (OSError, ValueError, KeyError, TypeError, StopIteration) as error:
        print(f"缓存文件 {path} 坏了（{error}），不用它，重新读。")
        return [], False


def save_rows(path: Path, rows: list[dict], whole: bool) -> None:
    """第一行是行数，其余一行一条。先写临时文件再改名；存不了不是大事，说一声就行。"""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("w", encoding="utf-8") as file:
            for each in ({"rows": len(rows), "whole": whole}, *rows):
                file.write(json.dumps(each, ensure_ascii=False) + "\n")
        temporary.replace(path)
    except (OSError, TypeError, ValueError) as error:  # 磁盘满、没有权限；图片、日期等 JSON 存不了的
        with contextlib.suppress(OSError):
            temporary.unlink()
        print(f"（读来的数据没有存进缓存 {path}：{error}。下次要重新下载。）")
