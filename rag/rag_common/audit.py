"""按散列串起来的日志：每一行带着前一行的散列，所以改过、删过、调过次序的一行，从那里往后都对不上。

    {"n": 3, "time": "2026-01-05T08:00:00", "event": {…}, "previous": "前一行的 hash", "hash": "…"}
    hash = sha256(去掉 hash 的这一行)

它防的是悄悄改：谁能改整个文件，就能把后面的散列全部重算一遍。所以每隔一阵把 head()（最后一行的散列）记到别处，
例如打印、发邮件；截掉末尾几行，也只有对着它才看得出来。
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path

from filelock import FileLock

from nlp_common.base.errors import UserError

START = "0" * 64  # 第一行的"前一行的散列"


class AuditLog:
    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.lock = FileLock(f"{self.path}.lock")

    def append(self, event: dict) -> dict:
        """记下一件事，返回写下的一行；返回时已在盘上。几个进程可以一起写。"""
        with self.lock:
            last = self._last()
            row = {
                "n": last["n"] + 1 if last else 1,
                "time": time.strftime("%Y-%m-%dT%H:%M:%S"),
                "event": event,
                "previous": last["hash"] if last else START,
            }
            row["hash"] = hash_of(row)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                file.flush()
                os.fsync(file.fileno())
        return row

    def rows(self) -> list[dict]:
        """核对之后的全部各行。"""
        return self._checked()

    def head(self) -> str:
        """最后一行的散列：记到别处去，将来用 verify(head=…) 核对。"""
        with self.lock:
            last = self._last()
        return last["hash"] if last else START

    def verify(self, head: str | None = None) -> int:
        """从头核对到尾，返回有几行。对不上是 UserError，说出是第几行、怎样不对。head：以前记下的某一行的散列。"""
        rows = self._checked()
        if head not in (None, START) and head not in {row["hash"] for row in rows}:
            raise UserError(
                f"{self.path}：记在别处的散列 {head[:12]}… 不在日志里，末尾被截掉了几行，或整个换过了。"
            )
        return len(rows)

    def _checked(self) -> list[dict]:
        rows: list[dict] = []
        previous = START
        for number, line in enumerate(self._lines(), 1):
            try:
                row = json.loads(line)
                fault = _fault(row, number, previous)
            except (ValueError, TypeError, KeyError):
                fault = "不是完整的一行 JSON"
            if fault:
                raise UserError(f"{self.path} 第 {number} 行：{fault}。它与后面的各行都不能当作证据。")
            rows.append(row)
            previous = row["hash"]
        return rows

    def _lines(self) -> list[str]:
        if not self.path.exists():
            return []
        lines = self.path.read_text(encoding="utf-8", errors="replace").split("\n")
        return lines[:-1] if lines[-1] == "" else lines

    def _last(self) -> dict | None:
        """最后一行；上次写到一半断了的半行（没有换行）去掉：那件事的 append 还没有返回。"""
        if not self.path.exists():
            return None
        with self.path.open("r+b") as file:
            size = file.seek(0, os.SEEK_END)
            tail, start = b"", size
            while start > 0 and tail.count(b"\n") < 2:  # 从末尾往前读，够一整行为止
                start = max(0, start - (1 << 16))
                file.seek(start)
                tail = file.read(size - start)
            if tail and not tail.endswith(b"\n"):
                whole = tail.rfind(b"\n") + 1
                file.truncate(start + whole)
                tail = tail[:whole]
        if not tail:
            return None
        try:
            row = json.loads(tail.split(b"\n")[-2])
            return {"n": int(row["n"]), "hash": str(row["hash"])}
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"{self.path} 的最后一行坏了，不能接着写：先用 verify() 看是从哪一行起不对。"
            ) from None


def hash_of(row: dict) -> str:
    """一行（去掉 hash）的 sha256；键排好次序，与写的次序无关。"""
    kept = {name: value for name, value in row.items() if name != "hash"}
    text = json.dumps(kept, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _fault(row: dict, number: int, previous: str) -> str | None:
    if row["n"] != number:
        return f"编号应当是 {number}，写的是 {row['n']}（前面少了或多了行）"
    if row["previous"] != previous:
        return "接不上前一行（前一行被改过，或中间少了行）"
    if row["hash"] != hash_of(row):
        return "内容与散列不符（这一行被改过）"
    return None
