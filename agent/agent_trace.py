"""一次运行的记录：trace.jsonl（一步一行）与 trace.html（自己一页，不联网、没有脚本）。写之前，秘密先隐去。"""

from __future__ import annotations

import dataclasses
import html
import json
import unicodedata
from pathlib import Path
from typing import Any

from agent_secrets import Hider
from nlp_common.base.runs import write_text

STYLE = """
:root { color-scheme: light dark; --line: #d5d9e0; --soft: #667085; --card: #fff; --page: #f5f6f8; --ink: #1f2430;
  --model: #2563a8; --tool: #2f8f5b; --bad: #b3382c; --code: #f3f4f7; }
@media (prefers-color-scheme: dark) { :root { --line: #3a404c; --soft: #9aa3b2; --card: #1d212a; --page: #14171d;
  --ink: #e4e7ee; --model: #7fb2ea; --tool: #74c79b; --bad: #f0897e; --code: #262b36; } }
body { margin: 0 auto; max-width: 900px; padding: 24px 16px 64px; background: var(--page); color: var(--ink);
  font: 15px/1.65 system-ui, "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC", sans-serif; }
h1 { font-size: 21px; margin: 0 0 4px; } h2 { font-size: 16px; margin: 0 0 8px; }
.soft { color: var(--soft); font-size: 13px; } .bad { color: var(--bad); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 14px 18px; margin: 14px 0; }
.bar { display: flex; height: 14px; border-radius: 4px; overflow: hidden; background: var(--code); margin: 8px 0 4px; }
.bar i { display: block; min-width: 2px; border-right: 1px solid var(--card); box-sizing: border-box; }
.model { background: var(--model); } .tool { background: var(--tool); } .key { display: inline-block; width: 10px; height: 10px; border-radius: 2px; margin: 0 4px 0 12px; }
pre { background: var(--code); border-radius: 6px; padding: 8px 12px; margin: 6px 0; white-space: pre-wrap; overflow-wrap: anywhere;
  font: 13px/1.55 ui-monospace, "SFMono-Regular", Consolas, "Noto Sans Mono CJK SC", monospace; max-height: 420px; overflow: auto; }
summary { cursor: pointer; color: var(--soft); font-size: 13px; } details { margin: 6px 0; }
.call { border-left: 3px solid var(--tool); padding-left: 12px; margin: 10px 0; } .call.wrong { border-color: var(--bad); }
.say { border-left: 3px solid var(--model); padding-left: 12px; margin: 10px 0; white-space: pre-wrap; overflow-wrap: anywhere; }
.end { font-weight: 600; }
"""
KINDS = {
    "ok": "成了",
    "cut": "成了，太长，截短了",
    "broken": "读不出是什么调用",
    "unknown": "没有这个工具",
    "bad_arguments": "参数不合",
    "failed": "工具出错",
    "timeout": "超时",
    "refused": "没有得到许可",
    "skipped": "没有做",
    "stopped": "被打断了",
}


def trace_rows(run: Any, hider: Hider) -> list[dict]:
    """一步一行，最后一行说为什么停、一共用了多少；秘密已经隐去。"""
    rows = [{"kind": "step", **dataclasses.asdict(step)} for step in run.steps]
    rows.append(
        {
            "kind": "end",
            "model": run.model,
            "question": run.question,
            "answer": run.answer,
            "why": run.why,
            "steps": len(run.steps),
            "calls": sum(len(step.calls) for step in run.steps),
            "tokens": run.tokens,
            "seconds": round(run.seconds, 3),
        }
    )
    return hider.value(rows)


def write_trace(folder: Path, run: Any, why: str, hider: Hider) -> tuple[Path, Path]:
    """→ (trace.jsonl, trace.html)。why 是停下的原因，写给人看的一句。"""
    folder.mkdir(parents=True, exist_ok=True)
    rows = trace_rows(run, hider)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    data, page = folder / "trace.jsonl", folder / "trace.html"
    write_text(data, sound(lines))
    write_text(page, sound(trace_page(rows, hider.text(why))))
    return data, page


def sound(text: str) -> str:
    """半个代理对写不成 UTF-8，换成 �。"""
    return text.encode("utf-8", "replace").decode("utf-8")


def trace_page(rows: list[dict], why: str) -> str:
    """trace_rows 的行 → 一页 HTML。模型与工具写的都只是文字：全部转义，页面里没有脚本，也不许有。"""
    steps, end = rows[:-1], rows[-1]
    body = [
        f"<h1>{_text(end['question'])}</h1>",
        f'<p class="soft">{_text(end["model"])}　{len(steps)} 步，{end["calls"]} 个调用，'
        f"{end['tokens']} 个 token，{end['seconds']:.2f} 秒</p>",
        f'<div class="card">{_time_bar(steps)}<p class="end">停下：{_text(why)}</p>'
        f'<div class="say">{_text(end["answer"]) or "（没有回答）"}</div></div>',
        *map(_step, steps),
    ]
    return (
        '<!doctype html>\n<html lang="zh"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>智能体的记录</title><style>{STYLE}</style></head><body>\n"
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def _time_bar(steps: list[dict]) -> str:
    """时间都用在哪里：蓝的是模型在想，绿的是工具在做，按先后。"""
    parts = []
    for step in steps:
        parts.append(("model", step["seconds"], f"第 {step['number']} 步，模型 {step['seconds']:.2f} 秒"))
        for call in step["calls"]:
            parts.append(("tool", call["seconds"], f"{call['name']} {call['seconds']:.2f} 秒"))
    total = sum(seconds for _, seconds, _ in parts) or 1.0
    bars = "".join(
        f'<i class="{kind}" style="width:{100 * seconds / total:.2f}%" title="{_text(title)}"></i>'
        for kind, seconds, title in parts
    )
    key = '<span class="key model" style="margin-left:0"></span>模型<span class="key tool"></span>工具'
    return f'<div class="bar">{bars}</div><span class="soft">{key}</span>'


def _step(step: dict) -> str:
    head = f"第 {step['number']} 步"
    cost = f"读 {step['prompt_tokens']} 个 token，写 {step['tokens']} 个，{step['seconds']:.2f} 秒"
    parts = [f'<h2>{head} <span class="soft">{cost}</span></h2>']
    if step["shortened"]:
        parts.append(f'<p class="soft">提示太长：{_text(step["shortened"])}</p>')
    if step["mended"]:
        parts.append(f'<p class="soft">调用的 JSON 修过：{_text("；".join(step["mended"]))}</p>')
    parts.append(_folded("它看到的提示", step["prompt"]))
    if step["thinking"]:
        parts.append(_folded("思考", step["thinking"], opened=True))
    if step["content"]:
        parts.append(f'<div class="say">{_text(step["content"])}</div>')
    parts += map(_call, step["calls"])
    parts.append(_folded("它写的，原样", step["text"]))
    return f'<div class="card">{"".join(parts)}</div>'


def _call(call: dict) -> str:
    good = call["kind"] in ("ok", "cut")
    notes = [KINDS.get(call["kind"], call["kind"]), f"{call['seconds']:.2f} 秒"]
    if call["attempts"] > 1:
        notes.append(f"试了 {call['attempts']} 次")
    arguments = json.dumps(call["arguments"], ensure_ascii=False) if call["name"] else call["written"]
    kind = "soft" if good else "soft bad"
    return (
        f'<div class="call{"" if good else " wrong"}"><b>{_text(call["name"] or "（坏了的调用）")}</b>'
        f' <span class="{kind}">{_text("，".join(notes))}</span>'
        f"<pre>{_text(arguments)}</pre>{_folded('结果', call['result'], opened=True)}</div>"
    )


def _folded(title: str, text: str, opened: bool = False) -> str:
    size = f"（{len(text):,} 个字）" if len(text) > 400 else ""
    return f"<details{' open' if opened else ''}><summary>{title}{size}</summary><pre>{_text(text)}</pre></details>"


def _text(text: str) -> str:
    """文字 → HTML；看不见的、会把后面的字倒过来排的控制字符，换成 �。"""
    return html.escape(visible(str(text)))


def visible(text: str) -> str:
    """控制字符、双向排版符、零宽字符 → �：不能借它们把一句话排成另一句。"""
    return "".join("�" if _unseen(char) else char for char in text)


def _unseen(char: str) -> bool:
    return char not in "\n\t\u200d" and unicodedata.category(char) in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")
