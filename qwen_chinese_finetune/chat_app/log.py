"""chat.py 的 save：把对话存成给人看的文本，或训练脚本读得懂的 jsonl。"""

from __future__ import annotations

import json
from pathlib import Path

from nlp_common.base.errors import UserError


def save_talks(name: str, talks: list[list], system: str | None) -> Path:
    """把几段对话写进文件，返回它的绝对路径；没写文件名、没有对话、文件已存在、写不了是 UserError。

    一段对话是几个有 question、answer、name 的轮次。后缀是 .jsonl 时一段一行，其余是文本。
    """
    if not name:
        raise UserError("要写上文件名，例如 save 对话.txt，或 save 对话.jsonl")
    if not talks:
        raise UserError("还没有说过话，没有什么可存的。")
    path = Path(name).expanduser().absolute()
    as_lines = jsonl_lines if path.suffix.lower() == ".jsonl" else text_lines
    try:
        with path.open("x", encoding="utf-8") as file:  # x：已有的文件不覆盖
            file.writelines(as_lines(talks, system))
    except FileExistsError:
        raise UserError(f"已经有 {path} 了，没有动它；换一个名字。") from None
    except OSError as error:
        raise UserError(f"写不了 {path}：{error.strerror}。换一个位置再试。") from error
    return path


def jsonl_lines(talks: list[list], system: str | None) -> list[str]:
    """``{"messages", "answered_by"}``：可以直接给 sft_chinese_qwen.py --dataset。"""
    lines = []
    for talk in talks:
        messages = [{"role": "system", "content": system}] if system else []
        for turn in talk:
            messages.append({"role": "user", "content": turn.question})
            messages.append({"role": "assistant", "content": turn.answer})
        row = {"messages": messages, "answered_by": [turn.name for turn in talk]}
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    return lines


def text_lines(talks: list[list], system: str | None) -> list[str]:
    lines = [f"系统提示：{system}\n"] if system else []
    for number, talk in enumerate(talks, 1):
        lines.append(f"—— 第 {number} 段 ——\n")
        lines += [f"你：{turn.question}\n{turn.name}：{turn.answer}\n" for turn in talk]
    return lines
