"""模型写的调用能不能用：校验，修一修，或者一开始就只让它写得出合法的。

学到什么：JSON schema 怎样逐层核对；差一点就对的 JSON 哪些修得、哪些不该修；约束解码：工具变成文法，文法变成自动机，
自动机的每个状态是词表上的一张掩码，没训练过的模型也只写得出合法的调用。合法不等于对：该不该调用、参数填什么，还是模型的事。

运行：
    python tool_schema.py                                   # 没训练过的小模型：合法的调用 0 → 100%
    python tool_schema.py --model smollm2                    # 真的小模型
    python tool_schema.py --tools 我的工具.json               # 自己的工具（OpenAI 的写法），看它的文法
    python tool_schema.py --call "{'name': …}" [--tools …]   # 修一修、核对一个调用

预期输出（实测见本文件夹的 README.md）：写坏的 JSON 九成多修得好；合法的调用 0 → 1.000。

参考：JSON Schema 2020-12；Willard & Louf 2023；Dong et al. 2024（xgrammar）。
"""

from nlp_common.base.cli import run_main

import json
import random
import time
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import numpy as np

from call_grammar import CallGrammar, generate_call
from call_repair import repair_json
from json_faults import FAULTS
from nlp_common.base.arguments import COUNT, option
from nlp_common.base.console import print_table
from nlp_common.base.errors import UserError
from nlp_common.base.runs import file_sha256
from nlp_common.draw.figures import render
from nlp_common.draw.plots import COLORS
from nlp_common.hub.models import require_model
from nlp_common.lm.chatml import prompt_ids, whole_pieces
from nlp_common.lm.loading import load_causal_lm
from nlp_common.lm.reply_parser import BrokenCall, Call, parse_reply
from nlp_common.lm.tool_text import with_tools
from nlp_common.train.lesson import run_lesson
from nlp_common.train.settings import LessonSettings, parse_settings
from nlp_common.train.stage import Stage
from schema_check import check_call
from schema_check import check_value as check_value  # 给别的脚本用
from tool_examples import QUESTIONS, TOOLS, random_call

HOME = Path(__file__).resolve().parent
PRESETS: dict[str, dict] = {
    "tiny": {"n_calls": 60, "n_faults": 100},
    "full": {"n_calls": 12, "n_faults": 100},
}


@dataclass
class SchemaSettings(LessonSettings):
    model: str | None = option("用哪个模型：hub 名、本地文件夹或 smollm2；默认是没训练过的小模型")
    source: Literal["hf", "modelscope"] = option("hub 名从哪里下载", "hf")
    tools: str | None = option("工具的 JSON 文件：OpenAI 写法的列表")
    call: str | None = option("一个调用的 JSON：修一修，再核对")
    n_calls: int | None = option("让模型写几个调用", None, COUNT)
    n_faults: int | None = option("每种写坏的样子试几个", None, COUNT)
    max_new_tokens: int = option("一个调用最多写几个 token：到了就收尾，照样合法", 150)


# ---------------------------------------------------------------- 1. 修补（call_repair.py）修得好多少


def mend_all(n: int, seed: int) -> dict[str, dict[str, float]]:
    """每种写坏的样子 n 个 → 修好的、没有修的、修错的，各占多少；修错了又通过校验的最危险，另数。装了 json-repair 也比。"""
    repairers = {"": lambda text: repair_json(text)[0]}
    if find_spec("json_repair"):
        import json_repair

        repairers["_json_repair"] = json_repair.loads
    found: dict[str, dict[str, float]] = {}
    for name, spoil in FAULTS.items():
        rng, counts, tried = random.Random(f"{seed}-{name}"), {}, 0
        for key in repairers:
            counts |= {f"right{key}": 0, f"refused{key}": 0, f"wrong{key}": 0, f"dangerous{key}": 0}
        while tried < n:
            call = random_call(rng)
            broken = spoil(json.dumps(call, ensure_ascii=False), rng)
            if broken is None:
                continue
            tried += 1
            for key, repair in repairers.items():
                value = repair(broken)
                is_call = isinstance(value, dict) and {"name", "arguments"} <= value.keys()
                verdict = "right" if value == call else "wrong" if isinstance(value, dict) else "refused"
                counts[verdict + key] += 1
                counts["dangerous" + key] += verdict == "wrong" and is_call and not check_call(value, TOOLS)
        found[name] = {key: value / n for key, value in counts.items()}
    return found


# ---------------------------------------------------------------- 2. 约束解码（call_grammar.py）


def is_valid(text: str, tools: list[dict]) -> bool:
    """一段文字正好是一个合法的调用。读与核对都不经过文法：是另一条路。"""
    reply = parse_reply(text)
    return len(reply.calls) == 1 and not reply.content and not check_call(reply.calls[0], tools)


def write_calls(model, tokenizer, tools: list[dict], settings) -> dict:
    """同样的问题，不加约束、加约束各写一遍 → 合法的比例，写出了几种工具。

    一半贪心、一半按温度 1 抽：抽出来的五花八门，更容易碰到文法的角落。
    """
    started = time.perf_counter()
    masks = CallGrammar(tools).masks(tokenizer, model.config.vocab_size)
    compile_ms = 1000 * (time.perf_counter() - started)
    has_room = model.config.max_position_embeddings > 1500  # 小模型读不懂，也装不下工具的说明
    valid, names, first = {"before": 0, "after": 0}, set(), {}
    for number in range(settings.n_calls):
        system = [{"role": "system", "content": with_tools("", tools)}] if has_room else []
        question = {"role": "user", "content": QUESTIONS[number % len(QUESTIONS)]}
        prompt = prompt_ids(tokenizer, [*system, question])
        temperature = 0.0 if number < settings.n_calls // 2 else 1.0
        for label, used in (("before", None), ("after", masks)):
            text = generate_call(model, tokenizer, prompt, used, settings.max_new_tokens, temperature, number)
            valid[label] += is_valid(text, tools)
            first.setdefault(label, text)
            if label == "after":
                names |= {call.name for call in parse_reply(text).calls if isinstance(call, Call)}
    print(f"  不加约束：{first['before'][:150]!r}\n  加约束：　{first['after'][:150]!r}")
    n = settings.n_calls
    return {
        "valid_before": valid["before"] / n,
        "valid": valid["after"] / n,
        "tools_used": len(names),
        "grammar_ms": compile_ms,
        "states": len(masks.matcher.states),
    }


def example_walk(tokenizer, size: int) -> list[tuple[str, int, list[str]]]:
    """一个调用从左到右：每个 token，这里许可几个，其中的几个是什么。"""
    masks = CallGrammar(TOOLS).masks(tokenizer, size)
    arguments = {"text": "去花园", "when": "8:30", "again": True}
    text = json.dumps({"name": "remind", "arguments": arguments}, ensure_ascii=False) + "\n"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    state, steps = masks.matcher.start, []
    for token, piece in zip(ids, whole_pieces(tokenizer, ids), strict=True):
        allowed = np.flatnonzero(masks.allowed(state))
        steps.append((piece, len(allowed), [tokenizer.decode([each]) for each in allowed[:5]]))
        state = masks.next(state, token)
    return steps


def show_walk(steps: list[tuple[str, int, list[str]]]) -> None:
    """只许可一个的，模型没有选择：连着的印在一起。"""
    forced = ""
    for piece, count, some in [*steps, ("", 0, [])]:
        if count == 1:
            forced += piece
            continue
        if forced:
            print(f"  {forced!r}  没有选择")
            forced = ""
        if count:
            more = " …" if count > len(some) else ""
            print(f"  {as_seen(piece)}  许可 {count:,} 个：{'、'.join(map(as_seen, some))}{more}")


def as_seen(piece: str) -> str:
    return repr(piece) if piece and "\ufffd" not in piece else "半个字"


def draw_walk(path: Path, steps: list[tuple[str, int, list[str]]], size: int) -> None:
    def bars(axes, text) -> None:
        axes.bar(range(len(steps)), [count for _, count, _ in steps], color=COLORS[0])
        axes.set_yscale("log")
        axes.set_ylim(0.7, size * 1.5)
        ticks = [10**i for i in range(len(str(size)))]
        axes.set_yticks(ticks, [f"{tick:,}" for tick in ticks])
        axes.minorticks_off()
        labels = [
            piece.replace(" ", "␣").replace("\n", "⏎").replace("|", "/") or "…" for piece, _, _ in steps
        ]
        axes.set_xticks(range(len(steps)), [text(label) for label in labels], fontsize=8, rotation=90)
        axes.axhline(size, color="#999999", linewidth=1, linestyle="--")

    title = f"写一个调用，每一步许可几个 token（虚线是全部 {size:,} 个）|Tokens allowed at each step of a call ({size:,} in all)"
    render(path, bars, [], (title, "写出的 token|token", "许可几个|allowed"), min_width=1.1 * len(steps))


# ---------------------------------------------------------------- 3. 全课


def learn(stage: Stage, path: str | None) -> dict:
    settings = stage.settings
    tools = read_tools(settings.tools)
    print("1. 校验")
    for call in (
        {"name": "wether", "arguments": {}},
        {"name": "weather", "arguments": {"cty": "北京", "days": "三"}},
        {"name": "order", "arguments": {"items": [{"name": "苹果", "count": 1.5}], "pay": "赊账"}},
    ):
        print(f"  {json.dumps(call, ensure_ascii=False)}")
        print("".join(f"    {fault}\n" for fault in check_call(call, TOOLS)), end="")
    print("\n2. 修补：每种写坏的样子，修好、没有修、修错各占多少")
    mended = mend_all(settings.n_faults, settings.seed)
    print_table([("写坏的样子", "修好", "没有修", "修错"), *rates(mended)])
    print("\n3. 约束：工具的文法（前几条）")
    for line in CallGrammar(tools).text.splitlines()[: 3 + len(tools)]:
        print(f"  {line[:150]}")
    tokenizer, model = load_causal_lm(path) if path else untrained(settings.seed)
    model = model.to(stage.device).eval()
    metrics: dict = write_calls(model, tokenizer, tools, settings)
    print(f"  合法的调用 {metrics['valid_before']:.3f} → {metrics['valid']:.3f}")
    steps = example_walk(tokenizer, model.config.vocab_size)
    show_walk(steps)
    metrics["forced_share"] = sum(count == 1 for _, count, _ in steps) / len(steps)
    metrics["vocabulary"] = model.config.vocab_size
    for key in next(iter(mended.values())):
        metrics[key] = float(np.mean([row[key] for name, row in mended.items() if name != "写到一半"]))
        metrics[f"cut_{key}"] = mended["写到一半"][key]

    def draw(folder: Path) -> None:
        draw_walk(folder / "allowed.svg", steps, model.config.vocab_size)
        (folder / "repair.json").write_text(
            json.dumps(mended, ensure_ascii=False, indent=1), encoding="utf-8"
        )

    return stage.save(
        metrics,
        {
            "tools": {
                "name": Path(settings.tools).name if settings.tools else "tool_examples",
                "kind": "local" if settings.tools else "builtin",
            }
        },
        draw,
    )


def rates(mended: dict[str, dict[str, float]]) -> list[tuple[str, ...]]:
    return [
        (name, *(f"{row[key]:.2f}" for key in ("right", "refused", "wrong"))) for name, row in mended.items()
    ]


def untrained(seed: int):
    """没训练过的小模型，与它的分词器（会用工具的小模型就是从它开始的）。"""
    from tiny_agent import build_base, build_tokenizer  # 它要用到 tool_world，那里要用到这里：用到才导入

    tokenizer = build_tokenizer()
    return tokenizer, build_base(tokenizer, seed)


def read_tools(path: str | None) -> list[dict]:
    """工具的 JSON 文件；没给就是 tool_examples.py 里的几件。写错了是 UserError，说出是哪一件。"""
    if path is None:
        return TOOLS
    file = Path(path).expanduser()
    try:
        tools = json.loads(file.read_text(encoding="utf-8-sig"))
    except OSError as error:
        why = "它是一个文件夹" if file.is_dir() else "没有这个文件" if not file.exists() else error.strerror
        raise UserError(f"读不了 {file}：{why}。") from None
    except UnicodeDecodeError:
        raise UserError(f"{file} 不是 UTF-8 的文字。请另存为 UTF-8 再试。") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{file} 的第 {error.lineno} 行不是合法的 JSON（{error.msg}）。") from None
    except RecursionError:
        raise UserError(f"{file} 套得太深，读不了。") from None
    for number, tool in enumerate(tools if isinstance(tools, list) else [None], 1):
        if not isinstance(tool, dict) or not isinstance((tool.get("function") or {}).get("name"), str):
            shape = '[{"type": "function", "function": {"name": …, "description": …, "parameters": {…}}}]'
            raise UserError(f"{file} 的第 {number} 件工具写得不对：要写成 {shape}。")
    return tools


def look_at(text: str, tools: list[dict]) -> dict:
    """读者自己的一个调用：修一修，再核对。"""
    value, mended = repair_json(text)
    if value is None:
        print("读不懂，也拿不准怎样修：请模型重写。")
        return {"value": None}
    print(
        f"读成 {json.dumps(value, ensure_ascii=False)}" + (f"\n修了：{'；'.join(mended)}" if mended else "")
    )
    is_call = isinstance(value, dict) and isinstance(value.get("name"), str)
    call = (
        Call(value["name"], value.get("arguments", {}))
        if is_call
        else BrokenCall(text, "调用要有 name 与 arguments")
    )
    faults = check_call(call, tools)
    print("合法" if not faults else "\n".join(faults))
    return {"value": value, "mended": mended, "faults": faults}


def main(argv: list[str] | None = None) -> dict:
    settings = parse_settings(SchemaSettings, PRESETS, argv)
    if settings.call is not None:
        return look_at(settings.call, read_tools(settings.tools))
    CallGrammar(read_tools(settings.tools))  # 工具写错了，现在就说
    path = require_model(settings.model, settings.source) if settings.model else None
    of_tools = {"tools_sha256": file_sha256(Path(settings.tools).expanduser())} if settings.tools else {}
    name = "tool_schema" + ("_smollm2" if settings.model == "smollm2" else "")
    model_id = settings.model or "untrained"
    return run_lesson(name, HOME, settings, partial(learn, path=path), model_id=model_id, **of_tools)


if __name__ == "__main__":
    run_main(main)
