"""工具调用的格式：Python 函数 → JSON schema → 提示里的文字 → 模型写的调用，每一个 token 都看得见。

学到什么：工具是写在 system 里的一段 JSON；调用是助手说的一段有标记的话，结果是塞在 user 里的一段；哪些 token 要学；
一边生成一边显示时，怎样一个字也不把调用和思考露给用户。

运行：
    python tool_format.py                              # 工具、对话、每个 token
    python tool_format.py --model Qwen/Qwen3-0.6B      # 换成 Qwen3 的分词器（只下载分词器）
    python tool_format.py --functions 我的.py           # 自己的函数变成怎样的工具
    python tool_format.py --reply '<tool_call>…'       # 模型的这段话读成什么

预期输出（实测见本文件夹的 README.md）：每种回复随便怎么切成片，显示的话与调用都和整段读的一样；不解析的显示会露出调用。

参考：Qwen3 的聊天模板；Hermes 的函数调用格式；transformers.utils.get_json_schema。
"""

from nlp_common.base.cli import run_main

import dataclasses
import inspect
import json
import random
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from function_schema import function_schema, functions_in
from nlp_common.base.arguments import COUNT, option
from nlp_common.draw.tokens import token_boxes
from nlp_common.hub.models import find_model, require_model
from nlp_common.lm.chatml import encode_chat, whole_pieces
from nlp_common.lm.loading import load_tokenizer
from nlp_common.lm.reply_parser import HIDDEN, BrokenCall, Call, Reply, StreamParser, parse_reply
from nlp_common.lm.tool_text import call_text, with_tools
from nlp_common.train.lesson import run_lesson
from nlp_common.train.settings import LessonSettings, parse_settings
from nlp_common.train.stage import Stage
from tool_examples import TOOLS, look_up

HOME = Path(__file__).resolve().parent
FULL_MODEL = "Qwen/Qwen3-0.6B"
PRESETS: dict[str, dict] = {"tiny": {"n_splits": 200}, "full": {"n_splits": 200}}

ROLE_NAMES = {"system": "系统", "user": "用户", "assistant": "话"}
INNER = [  # (在谁的话里, 怎样认出, 是哪一部分, 记数时的名字)
    ("system", r"# Tools\n\nYou may call.*", "工具", "tools"),
    ("assistant", r"<think>\n.*?</think>", "思考", "think"),
    ("assistant", r"<tool_call>\n.*?</tool_call>", "调用", "call"),
    ("user", r"<tool_response>\n.*?</tool_response>", "结果", "response"),
]


@dataclass
class FormatSettings(LessonSettings):
    model: str | None = option("用谁的分词器：hub 名或本地文件夹；默认是会用工具的小模型的")
    source: Literal["hf", "modelscope"] = option("hub 名从哪里下载", "hf")
    functions: str | None = option("自己的 Python 文件：里面的函数变成怎样的工具")
    reply: str | None = option("模型的一段话：读成什么")
    n_splits: int | None = option("每种回复随便切多少次", None, COUNT)


# ---------------------------------------------------------------- 1. 工具与对话 → 文字（第零步，函数 → 工具，在 function_schema.py）


def chat_text(messages: list[dict], thinking: bool = True) -> str:
    """对话 → 交给模型的文字，与 Qwen3 的模板一字不差；最后请助手接着说。

    messages 是 {"role", "content"}：工具已经写进 system（with_tools），调用已经写进助手的话（call_text）。
    thinking=False：替模型写上一段空的思考，它就不再想了。
    """
    questions = [place for place, message in enumerate(messages) if message["role"] == "user"]
    last_question = questions[-1] if questions else -1
    text = ""
    for place, message in enumerate(messages):
        role, content = message["role"], message["content"]
        following = messages[place + 1]["role"] if place + 1 < len(messages) else None
        if role == "tool":  # 结果由 user 说：连着的几个在同一轮里
            first = place == 0 or messages[place - 1]["role"] != "tool"
            text += "<|im_start|>user" if first else ""
            text += f"\n<tool_response>\n{content}\n</tool_response>"
            text += "" if following == "tool" else "<|im_end|>\n"
            continue
        if role == "assistant":
            thought, content = split_thinking(content)
            # 以前各轮的思考不留：只留最后一个问题之后的（一边想一边调用工具，要接着想）
            if place > last_question and (thought or following is None):
                content = f"<think>\n{thought}\n</think>\n\n{content}"
        text += f"<|im_start|>{role}\n{content}<|im_end|>\n"
    return text + "<|im_start|>assistant\n" + ("" if thinking else "<think>\n\n</think>\n\n")


def split_thinking(content: str) -> tuple[str, str]:
    """助手的一轮 → (思考, 其余)。"""
    if "</think>" not in content:
        return "", content
    thought = content.partition("</think>")[0].rpartition("<think>")[2].strip("\n")
    return thought, content.rpartition("</think>")[2].lstrip("\n")


# ---------------------------------------------------------------- 2. 文字 → token，每一个是哪一部分、要不要学


def token_table(tokenizer, messages: list[dict]) -> list[tuple[int, str, str, bool]]:
    """→ 每个 token 一行：(编号, 文字, 哪一部分, 学不学)。"""
    ids, is_answer = encode_chat(tokenizer, messages)
    pieces = whole_pieces(tokenizer, ids)
    parts = parts_of("".join(pieces))
    rows, at = [], 0
    for number, piece, learned in zip(ids, pieces, is_answer, strict=True):
        rows.append((number, piece, parts[min(at, len(parts) - 1)], bool(learned)))
        at += len(piece)
    return rows


def parts_of(text: str) -> list[str]:
    """每个字是哪一部分：标记（角色、结束符），各角色的话，里面的工具、思考、调用、结果。"""
    parts = ["标记"] * len(text)
    for turn in re.finditer(r"<\|im_start\|>(\w+)\n(.*?)<\|im_end\|>", text, re.DOTALL):
        role, start = turn[1], turn.start(2)
        spans = [(0, len(turn[2]), ROLE_NAMES.get(role, role))]
        for inside, pattern, name, _ in INNER:
            if inside == role:
                spans += [(*found.span(), name) for found in re.finditer(pattern, turn[2], re.DOTALL)]
        for low, high, name in spans:
            parts[start + low : start + high] = [name] * (high - low)
    return parts


# ---------------------------------------------------------------- 3. 模型的话 → 调用（reply_parser.py），一边收一边显示

REPLIES = {
    "一个调用": '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>',
    "先想，再说，再调用": "<think>\n要先查时间。\n</think>\n\n我看一下。\n"
    '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>',
    "两个调用": '<tool_call>\n{"name": "weather", "arguments": {"city": "北京"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "weather", "arguments": {"city": "上海"}}\n</tool_call>',
    "没有调用": "1 < 2，而 <b>粗体</b> 不是调用。",
    "参数里写着标记": '<tool_call>\n{"name": "remind", "arguments": {"text": "</tool_call>", "when": "8:00"}}\n</tool_call>',
    "思考里写着调用": '<think>\n<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>\n</think>\n\n不用查。',
    "没有关上": '好的。\n<tool_call>\n{"name": "now", "arg',
    "两个 JSON 在一个调用里": '<tool_call>\n{"name": "now", "arguments": {}}\n{"name": "now"}\n</tool_call>',
    "参数是字符串": '<tool_call>\n{"name": "weather", "arguments": "{\\"city\\": \\"北京\\"}"}\n</tool_call>',
    "自己编了结果": '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>\n'
    "<tool_response>\n十二点\n</tool_response>\n现在十二点。",
}


def naive_view(text: str) -> str:
    """常见的写法：收到多少算多少，把已经成对的去掉，剩下的显示。"""
    for opening, closing in HIDDEN.items():
        text = re.sub(f"{opening}.*?{closing}", "", text, flags=re.DOTALL)
    return text.strip()


def try_splits(text: str, n: int, rng: random.Random) -> dict[str, int]:
    """随便切 n 次 → 与整段读的不一样几次；显示过不该显示的几次：我们的，与常见写法的。"""
    whole = parse_reply(text)
    counts = {"different": 0, "leaked": 0, "leaked_naive": 0}
    for _ in range(n):
        cuts = sorted(rng.choices(range(len(text) + 1), k=rng.randint(0, 12)))
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        parser, views, received, naive = StreamParser(), [""], "", []
        for piece in pieces:
            views.append(views[-1] + parser.feed(piece))
            received += piece
            naive.append(naive_view(received))
        views.append(views[-1] + parser.finish())
        counts["different"] += Reply(views[-1], parser.thinking, parser.calls) != whole
        counts["leaked"] += any(not whole.content.startswith(view) for view in views)
        counts["leaked_naive"] += any(not whole.content.startswith(view) for view in naive)
    return counts


# ---------------------------------------------------------------- 4. 全课


def example_chat(tools: list[dict]) -> list[dict]:
    """一段对话：一轮里两个调用，两个结果，再回答。"""
    asked = [{"person": "小刚", "time": "傍晚"}, {"person": "小杰", "time": "清晨"}]
    calls = call_text([{"name": "look_up", "arguments": arguments} for arguments in asked])
    return [
        {"role": "system", "content": with_tools("你会用工具。", tools)},
        {"role": "user", "content": "小刚傍晚和小杰清晨各去了哪里？"},
        {"role": "assistant", "content": "<think>\n两个人，各查一次。\n</think>\n\n" + calls},
        {"role": "tool", "content": "傍晚，小刚去了花园。"},
        {"role": "tool", "content": "清晨，小杰去了河边。"},
        {"role": "assistant", "content": "小刚去了花园，小杰去了河边。"},
    ]


def learn(stage: Stage, tokenizer) -> dict:
    tools = TOOLS[:1]
    print(
        "1. 函数 → 工具\n" + inspect.getsource(look_up) + json.dumps(tools[0], ensure_ascii=False, indent=1)
    )
    messages = example_chat(tools)
    rows = token_table(tokenizer, messages)
    print(f"\n2. 对话 → {len(rows)} 个 token，学的是标着 ← 的 {sum(row[3] for row in rows)} 个")
    show_table(rows)
    prompt = chat_text(messages[:2])
    print(f"  请模型接着说，末尾是 {prompt[-22:]!r}；不让它想，是 {chat_text(messages[:2], False)[-41:]!r}")
    print("\n3. 模型的话 → 调用；每种随便切成片，一片一片地读")
    rng, counts = random.Random(stage.settings.seed), {}
    for name, text in REPLIES.items():
        counts[name] = try_splits(text, stage.settings.n_splits, rng)
        reply = parse_reply(text)
        print(f"  {name}：{text!r}\n    显示 {reply.content!r}，{said(reply)}")
    n = len(REPLIES) * stage.settings.n_splits
    totals = {
        key: sum(each[key] for each in counts.values()) for key in ("different", "leaked", "leaked_naive")
    }
    metrics = {f"{key}_rate": value / n for key, value in totals.items()}
    for _, _, part, name in INNER:
        metrics[f"{name}_tokens"] = sum(row[2] == part for row in rows)
    metrics |= {"tokens": len(rows), "learned": sum(row[3] for row in rows), "splits": n}

    def draw(folder: Path) -> None:
        draw_tokens(folder / "tokens.svg", rows)

    return stage.save(metrics, {"replies": {"name": "tool_format.REPLIES", "kind": "builtin"}}, draw)


def said(reply: Reply) -> str:
    """调用，一句话。"""
    told = []
    for each in reply.calls:
        if isinstance(each, Call):
            told.append(f"{each.name}({json.dumps(each.arguments, ensure_ascii=False)})")
        elif isinstance(each, BrokenCall):
            told.append(f"坏的（{each.error}）")
    return "调用 " + "；".join(told) if told else "没有调用"


def show_table(rows: list[tuple[int, str, str, bool]]) -> None:
    """一行一个 token；工具的说明长，连着印，| 隔开。"""
    print("    编号  部分  学  文字")
    place = 0
    while place < len(rows):
        number, piece, part, learned = rows[place]
        if part != "工具":
            shown = repr(piece) if piece else "（半个字）"
            print(f"  {number:>6}  {part}  {'←' if learned else '  '}  {shown}")
            place += 1
            continue
        pieces = []
        while place < len(rows) and rows[place][2] == "工具":
            pieces.append(rows[place][1])
            place += 1
        print(f"  工具的说明，{len(pieces)} 个 token：{'|'.join(pieces)!r}")


def draw_tokens(path: Path, rows: list[tuple[int, str, str, bool]]) -> None:
    """对话的各部分，一部分一段；绿的是学的。"""
    groups: list[tuple[list[str], list[bool]]] = []
    for place, (_, piece, part, learned) in enumerate(rows):
        if place == 0 or rows[place - 1][2] != part:
            groups.append(([], []))
        groups[-1][0].append(piece)
        groups[-1][1].append(learned)
    token_boxes(path, groups)


def main(argv: list[str] | None = None) -> dict:
    settings = parse_settings(FormatSettings, PRESETS, argv, FULL_MODEL)
    if settings.functions:
        tools = [function_schema(function) for function in functions_in(settings.functions)]
        print(json.dumps(tools, ensure_ascii=False, indent=2))
        return {"tools": tools}
    if settings.reply is not None:
        reply = parse_reply(settings.reply)
        print(f"显示：{reply.content}\n思考：{reply.thinking}\n{said(reply)}")
        return {"reply": dataclasses.asdict(reply)}
    tokenizer = find_tokenizer(settings)
    return run_lesson(
        "tool_format", HOME, settings, partial(learn, tokenizer=tokenizer), tokenizer=len(tokenizer)
    )


def find_tokenizer(settings: FormatSettings):
    """--model 的分词器（不下载权重）；没给，tiny 用会用工具的小模型的，full 用 Qwen3 的。"""
    if settings.model is None and settings.preset == "tiny":
        from tiny_agent import build_tokenizer  # 它要用到 tool_schema，而那里要用到这里：用到才导入

        return build_tokenizer()
    name = settings.model or FULL_MODEL
    if Path(name).expanduser().is_dir():  # 只有分词器的文件夹也行
        return load_tokenizer(str(Path(name).expanduser()))
    found = find_model(name, settings.source) if settings.source == "hf" else None
    return load_tokenizer(found or require_model(name, settings.source))


if __name__ == "__main__":
    run_main(main)
