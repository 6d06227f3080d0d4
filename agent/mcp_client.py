"""MCP 客户端：连上一个 MCP 服务器，列出它的工具，叫它们，交给 react_agent.py 用；每一条 JSON-RPC 消息都看得见。

你会学到
  1. 一次连接：先说好版本，再 tools/list，再一次次 tools/call；消息就是一行行 JSON。
  2. 同步的智能体怎样用异步的 SDK：连接住在另一个线程的事件循环里，每次调用有自己的时限。
  3. 服务器是陌生人：不答话、说乱码、说到一半倒下，都只是一句话；它的说明里藏的话、看不见的字符、同名的工具，先洗过。
  4. 它说自己"只读"不算数：陌生服务器的每一件工具都当作会改东西的，每次问人；自己写的才信。

怎么运行
  python mcp_client.py                                     # 连自己的 mcp_server.py：列、叫，再试几个坏服务器
  python mcp_client.py --show_messages                     # 每一条消息
  python mcp_client.py --command "npx -y 某个服务器" --list_tools   # 别人的：只列
  python mcp_client.py --url http://127.0.0.1:8765/mcp --call calculator '{"expression": "1+1"}'

应当看到（实测见本文件夹的 README.md）：两种走法给的工具与结果一样；坏服务器个个说得出坏在哪里，没有一个让客户端卡住或倒下。

参考：modelcontextprotocol.io 的规范；Invariant Labs 2025（tool poisoning：藏在工具说明里的话）。
"""

from nlp_common.base.cli import run_main

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from agent_trace import visible
from nlp_common.base.arguments import Limits, option, parse_arguments
from nlp_common.base.errors import UserError
from nlp_common.lm.reply_parser import Call
from nlp_common.train.lesson import run_lesson
from nlp_common.train.settings import LessonSettings, parse_settings
from nlp_common.train.stage import Stage
from tools import Tool, run_call

try:
    from mcp_tools import list_tools
    from mcp_wire import Wire, connect, is_ours, short_message, split_command
except ImportError:  # 没有装 mcp：直接运行的，main 说怎样装；被导入的，由导入的人说
    if __name__ != "__main__":
        raise
    connect = None

HOME = Path(__file__).resolve().parent
PRESETS: dict[str, dict] = {"tiny": {"n_calls": 50}, "full": {"n_calls": 200}}
SECONDS = 30.0
OUR_SERVER = [sys.executable, str(HOME / "mcp_server.py")]


@dataclass
class ClientSettings(LessonSettings):
    NOT_IN_FINGERPRINT: ClassVar[set[str]] = LessonSettings.NOT_IN_FINGERPRINT | {
        "command", "url", "token_env", "list_tools", "call", "show_messages", "timeout",
    }  # fmt: skip

    command: str | None = option('启动服务器的命令（stdio），如 "python mcp_server.py"')
    url: str | None = option("服务器的网址（HTTP），如 http://127.0.0.1:8765/mcp")
    token_env: str | None = option("服务器要的钥匙在哪个环境变量里")
    call: list[str] | None = option("只叫一次：工具名，和参数的 JSON", nargs="+")  # noqa: RUF009
    show_messages: bool = option("印出来往的每一条消息", False)
    timeout: float = option("几秒不答话就算没有答", SECONDS, Limits(above=0))
    n_calls: int | None = option("量快慢时叫几次", limits=Limits(at_least=1))
    list_tools: bool = option("只列出工具", False)


# ---------------------------------------------------------------- 1. 一个服务器 → 一箱工具


@contextlib.contextmanager
def mcp_tools(
    command: list[str] | None = None,
    url: str | None = None,
    *,
    trusted: bool | None = None,
    wire: Any = None,
    timeout: float = SECONDS,
    token: str | None = None,
) -> Iterator[dict[str, Tool]]:
    """连上去，给出 {名字: Tool}；出去时断开。连不上是 UserError。

    trusted：信不信它说的"只读"。没有说，就只信我们自己的 mcp_server.py。
    """
    with opened(command, url, wire, timeout, token) as connection:
        tools, notes = list_from(connection, is_ours(command) if trusted is None else trusted, timeout)
        for note in notes:
            print(f"（MCP：{note.replace(chr(10), '⏎')}）")
        yield tools


def opened(
    command: list[str] | None,
    url: str | None,
    wire: Any = None,
    timeout: float = SECONDS,
    token: str | None = None,
):
    return connect(command, url, wire or Wire(), timeout, token)


def list_from(connection: Any, trusted: bool, timeout: float) -> tuple[dict[str, Tool], list[str]]:
    try:
        return list_tools(connection, trusted, timeout)
    except TimeoutError:
        raise UserError(f"MCP 服务器 {timeout:g} 秒没有列出工具。") from None
    except ConnectionError as error:
        raise UserError(f"列不出工具：{error}。") from None


def open_tools(address: str):
    """react_agent.py --mcp 给的：网址，或启动服务器的命令。"""
    if address.startswith(("http://", "https://")):
        return mcp_tools(url=address)
    return mcp_tools(split_command(address))


# ---------------------------------------------------------------- 2. 两种走法，对的与错的

CALLS = [
    Call("calculator", {"expression": "(23+48)×2"}),
    Call("convert", {"value": 3, "from_unit": "亩", "to_unit": "平方米"}),
    Call("days_between", {"start": "2024-02-28", "end": "2024-03-01"}),
    Call("look_up", {"column": "人", "value": "小强"}),
    Call("calculator", {"expression": "__import__('os')"}),
    Call("calculator", {"expr": "1+1"}),
    Call("calculator", {"expression": 12}),
    Call("convert", {"value": "三", "from_unit": "亩", "to_unit": "平方米"}),
    Call("delete", {"path": "/"}),
]


def learn(stage: Stage, show_messages: bool) -> dict:
    said, speed, opening, counts, tools = {}, {}, {}, {}, {}
    for way in ("stdio", "http"):
        wire = Wire(print_message if show_messages else None)
        with our_server(way) as (command, url):
            started = time.monotonic()
            with opened(command, url, wire) as connection:
                opening[way] = time.monotonic() - started
                tools[way], _ = list_from(connection, True, SECONDS)
                said[way] = [straight(connection, call) for call in CALLS]
                wire.show = None
                speed[way] = milliseconds(tools[way], stage.settings.n_calls)
                counts[way] = wire.sent + wire.received
                units = json.loads(
                    connection.ask(SECONDS, connection.client.read_resource, "units://all").contents[0].text
                )
    print("\n1. 工具：" + "、".join(tools["stdio"]) + f"；资源 units://all 里有 {len(units)} 个单位")
    print("\n2. 调用（错的也直接送到服务器，由它来查）")
    for call, (is_error, text) in zip(CALLS, said["stdio"], strict=True):
        print(f"  {call.name} {json.dumps(call.arguments, ensure_ascii=False)}")
        print(f"      {'isError' if is_error else 'ok'}  {visible(text)[:100]}")
    print("\n3. 坏服务器")
    rogues = try_rogues()
    for way, (clear, seconds, text) in rogues.items():
        print(f"  {'✓' if clear else '✗'} {ROGUES[way]}（{seconds:.1f} 秒）\n      {text}")
    metrics = {
        "tools": len(tools["stdio"]),
        "same_on_both": float(said["stdio"] == said["http"]),
        "errors_as_results": sum(is_error for is_error, _ in said["stdio"]),
        "calls": len(CALLS),
        "milliseconds": speed,
        "opening_seconds": opening,
        "messages": counts,
        "rogues": len(rogues),
        "rogues_told": sum(clear for clear, _, _ in rogues.values()),
        "rogue_seconds": max(seconds for _, seconds, _ in rogues.values()),
    }
    return stage.save(metrics, {"calls": {"name": "mcp_client.CALLS", "kind": "builtin"}})


def straight(connection: Any, call: Call) -> tuple[bool, str]:
    """不经过我们这边的检查，直接叫：看服务器怎样答。"""
    result = connection.ask(SECONDS, connection.client.call_tool, call.name, call.arguments)
    return bool(result.is_error), result.content[0].text


def milliseconds(tools: dict[str, Tool], n: int) -> float:
    started = time.monotonic()
    for i in range(n):
        result = run_call(tools, Call("calculator", {"expression": f"{i}+1"}))
        assert result.text == str(i + 1), result
    return 1000 * (time.monotonic() - started) / n


@contextlib.contextmanager
def our_server(way: str) -> Iterator[tuple[list[str] | None, str | None]]:
    """→ (命令, 网址)，只有一个不空。HTTP 的由我们起，端口随便；stdio 的，连的时候才起。"""
    if way == "stdio":
        yield OUR_SERVER, None
        return
    command = [*OUR_SERVER, "--http", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, encoding="utf-8") as process:
        try:
            yield None, process.stdout.readline().split("（")[0].strip()
        finally:
            process.kill()


# ---------------------------------------------------------------- 3. 坏服务器

ROGUES = {
    "missing": "没有这个命令",
    "quit": "一起来就退出",
    "hang": "起来了，不答话",
    "rubbish": "标准输出里印了别的",
    "closed": "网址上没有人",
    "die": "叫到一半倒下",
    "sleep": "叫了不答",
    "wrong": "回话不合规范",
    "flood": "给一百万字",
    "many": "有五百件工具",
    "evil": "说明里藏着话、看不见的字符、同名、算不完的正则式",
}
SHORT = 2.0


def try_rogues() -> dict[str, tuple[bool, float, str]]:
    """→ {哪一种: (说清楚了没有, 几秒, 说了什么)}。"""
    told = {}
    for way in ROGUES:
        started = time.monotonic()
        told[way] = try_rogue(way)
        told[way] = (told[way][0], time.monotonic() - started, told[way][1])
    return told


def try_rogue(way: str) -> tuple[bool, str]:
    command = [sys.executable, str(HOME / "rogue_server.py"), way]
    url = "http://127.0.0.1:9/mcp" if way == "closed" else None
    if way == "missing":
        command = ["no-such-mcp-server"]
    try:
        with opened(None if url else command, url, timeout=SHORT if way == "hang" else 10) as connection:
            tools, notes = list_from(connection, False, SECONDS)
            if way in ("many", "evil"):
                return len(tools) <= 64 and bool(notes), "；".join(note[:60] for note in notes)
            result = run_call(tools, Call("echo", {"text": "好"}), say_yes, SHORT)
            return result.kind == (
                "cut" if way == "flood" else "timeout" if way == "sleep" else "failed"
            ), result.text[-60:]
    except UserError as error:
        return way in ("missing", "quit", "hang", "rubbish", "closed"), str(error).replace(str(HOME), "…")


def say_yes(call: Call) -> bool:
    return True


# ---------------------------------------------------------------- 4. 只列、只叫一次


def print_message(arrow: str, text: str) -> None:
    print(f"  {arrow} {short_message(text, 300)}")


def talk_once(settings: ClientSettings) -> dict:
    import os

    if settings.token_env and settings.token_env not in os.environ:
        raise UserError(f"--token_env {settings.token_env}：没有这个环境变量。")
    token = os.environ[settings.token_env] if settings.token_env else None
    command = split_command(settings.command) if settings.command else None if settings.url else OUR_SERVER
    wire = Wire(print_message if settings.show_messages else None)
    with mcp_tools(command, settings.url, wire=wire, timeout=settings.timeout, token=token) as tools:
        if not settings.call:
            for tool in tools.values():
                function = tool.schema["function"]
                print(
                    f"{tool.name}：{function['description'][:200]}{'  ← 每次要许可' if tool.writes else ''}"
                )
                print(f"    {json.dumps(function['parameters'], ensure_ascii=False)[:300]}")
            return {"tools": list(tools)}
        from tools import confirm_here, read_call

        result = run_call(tools, read_call(settings.call), confirm_here, settings.timeout)
    print(result.text)
    if not result.ok:
        sys.exit(1)
    return {"kind": result.kind, "text": result.text}


def main(argv: list[str] | None = None) -> dict:
    settings = parse_arguments(ClientSettings, argv)
    if connect is None:
        raise UserError('这一课要用到 MCP 的官方库：pip install "mcp>=2,<3"。')
    if settings.command and settings.url:
        raise UserError("--command 和 --url 只能给一个。")
    if settings.list_tools or settings.call or settings.command or settings.url:
        return talk_once(settings)
    if settings.token_env:
        raise UserError("--token_env 与 --url 一起用：钥匙是给那个服务器的。")
    settings = parse_settings(ClientSettings, PRESETS, argv)
    return run_lesson("mcp_client", HOME, settings, partial(learn, show_messages=settings.show_messages))


if __name__ == "__main__":
    run_main(main)
