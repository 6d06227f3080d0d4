"""MCP 连着的那一头：起进程或连网址、看着每一条消息、把 SDK 的异步变成普通的函数。mcp_client.py 用。"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import shlex
import shutil
import sys
import tempfile
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio
from anyio.from_thread import start_blocking_portal
from mcp import Client, MCPError, StdioServerParameters, stdio_client
from mcp.client.streamable_http import streamable_http_client

from agent_trace import visible
from nlp_common.base.errors import UserError

HOME = Path(__file__).resolve().parent
OURS = HOME / "mcp_server.py"


@dataclass
class Wire:
    """一条连接上过的消息；show 非空，每一条都给它。"""

    show: Callable[[str, str], None] | None = None
    sent: int = 0
    received: int = 0
    rubbish: int = 0  # 收到的，不是 JSON-RPC 的
    closed: threading.Event = field(default_factory=threading.Event)

    def saw(self, arrow: str, message: Any) -> None:
        if isinstance(message, Exception):
            self.rubbish += 1
            return
        self.sent += arrow == "→"
        self.received += arrow == "←"
        if self.show:
            self.show(arrow, message.message.model_dump_json(by_alias=True, exclude_unset=True))


@contextlib.asynccontextmanager
async def watched(transport: Any, wire: Wire) -> AsyncIterator[tuple]:
    """transport 与会话之间加一段：每一条消息过的时候记下。"""
    async with transport as (reading, writing):
        to_session, read_stream = anyio.create_memory_object_stream(0)
        write_stream, from_session = anyio.create_memory_object_stream(0)

        async def incoming() -> None:
            async with to_session:
                async for message in reading:
                    wire.saw("←", message)
                    with contextlib.suppress(anyio.BrokenResourceError, anyio.ClosedResourceError):
                        await to_session.send(message)
            wire.closed.set()

        async def outgoing() -> None:
            async with writing:
                async for message in from_session:
                    wire.saw("→", message)
                    with contextlib.suppress(anyio.BrokenResourceError, anyio.ClosedResourceError):
                        await writing.send(message)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(incoming)
            tasks.start_soon(outgoing)
            try:
                yield read_stream, write_stream
            finally:
                tasks.cancel_scope.cancel()


class Connection:
    """一个连上了的服务器；list_tools、call、read 都是普通的函数，超时、断开是 TimeoutError、ConnectionError。"""

    def __init__(self, portal: Any, client: Client, wire: Wire):
        self.portal, self.client, self.wire = portal, client, wire

    def ask(self, seconds: float, method: Callable[..., Any], *arguments: Any, **more: Any) -> Any:
        async def within() -> Any:
            with anyio.fail_after(seconds):
                return await method(*arguments, **more)

        if self.wire.closed.is_set():
            raise ConnectionError("MCP 服务器断开了")
        try:
            return self.portal.call(within)
        except MCPError as error:
            if self.wire.closed.is_set():
                raise ConnectionError("MCP 服务器断开了") from None
            raise ConnectionError(f"MCP 服务器说不行：{visible(error.message)[:200]}") from None
        except TimeoutError:
            raise
        except Exception as error:  # 回话不合规范（pydantic）、连接断在半路（anyio、httpx2）
            raise ConnectionError(
                f"MCP 服务器的回话不合规范，或断开了（{type(leaf(error)).__name__}）"
            ) from None


@contextlib.contextmanager
def connect(
    command: list[str] | None, url: str | None, wire: Wire, seconds: float, token: str | None = None
) -> Iterator[Connection]:
    """连上去；连不上是 UserError，说出为什么。出去时关掉，它若是我们起的进程，也结束它。"""
    logging.getLogger("mcp").setLevel(logging.CRITICAL)  # 别人的服务器说错话，由我们说一句，不要一屏记录
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors,
        contextlib.ExitStack() as stack,
    ):
        portal = stack.enter_context(start_blocking_portal())
        transport = start_process(command, errors) if command else open_url(url or "", token)
        client = Client(watched(transport, wire), cache=None, read_timeout_seconds=seconds)

        try:
            stack.enter_context(entered(portal, client, seconds))
        except Exception as error:
            raise UserError(why_not(leaf(error), command, url, wire, seconds, last_lines(errors))) from None
        yield Connection(portal, client, wire)


@contextlib.contextmanager
def entered(portal: Any, client: Client, seconds: float) -> Iterator[None]:
    """连接住在一个任务里，进与出都在那里（anyio 的规定）；seconds 秒连不上就算了。"""
    ready = threading.Event()
    state: dict[str, anyio.Event] = {}

    async def hold() -> None:
        state["leave"] = anyio.Event()
        with anyio.CancelScope(deadline=anyio.current_time() + seconds) as scope:
            async with client:
                scope.deadline = math.inf
                ready.set()
                await state["leave"].wait()
        if scope.cancelled_caught:
            raise TimeoutError

    task = portal.start_task_soon(hold)
    task.add_done_callback(lambda _: ready.set())
    try:
        ready.wait()
        if task.done():
            task.result()
        yield
    finally:
        if not task.done():
            portal.call(state["leave"].set)
            with contextlib.suppress(Exception):
                task.result(timeout=15)


def leaf(error: BaseException) -> BaseException:
    """ExceptionGroup 里最里面的一个。"""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def why_not(
    error: BaseException, command: list[str] | None, url: str | None, wire: Wire, seconds: float, said: str
) -> str:
    """连不上，为什么：一句话。"""
    who = (
        f"MCP 服务器 {visible(' '.join(command))[:100]}"
        if command
        else f"MCP 服务器 {visible(url or '')[:100]}"
    )
    more = f"它的标准错误最后是：{said}" if said else ""
    if wire.rubbish:
        return f"{who} 说的不是 MCP（{wire.rubbish} 行不是 JSON-RPC）：它的标准输出里不能印别的。{more}"
    if isinstance(error, TimeoutError):
        return f"{who} {seconds:g} 秒没有答话：是不是 MCP 服务器？慢的给大一点的 --timeout。{more}"
    if isinstance(error, FileNotFoundError):
        return f"{who} 起不来：没有这个命令。"
    if isinstance(error, PermissionError):
        return f"{who} 起不来：没有运行它的权限。"
    if command and wire.closed.is_set():
        return f"{who} 还没有答话就退出了。{more}"
    if isinstance(error, MCPError):
        return f"{who} 说不行：{visible(error.message)[:200]}。{more}"
    return f"{who} 连不上（{type(error).__name__}）。{more or '它开着吗？网址对不对（多半以 /mcp 结尾）？'}"


# ---------------------------------------------------------------- 起进程，连网址


def split_command(text: str) -> list[str]:
    try:
        parts = shlex.split(text, posix=os.name != "nt")
    except ValueError as error:
        raise UserError(f"启动 MCP 服务器的命令读不懂：{error}（引号没有成对？）。") from None
    if not parts:
        raise UserError("启动 MCP 服务器的命令是空的。")
    if parts[0] in ("python", "python3") and (is_ours(parts) or shutil.which(parts[0]) is None):
        parts[0] = sys.executable
    return parts


def is_ours(command: list[str] | None) -> bool:
    """是不是我们自己的 mcp_server.py：是，它说"只读"就信。"""
    return any(part.endswith("mcp_server.py") and Path(part).resolve() == OURS for part in command or [])


def start_process(command: list[str], errors: Any) -> Any:
    """服务器得到的环境变量只有 PATH 一类（SDK 的规定）：你的钥匙不给它。我们自己的，另给 PYTHONPATH。"""
    kept = ("PYTHONPATH", "PYTHONUTF8") if is_ours(command) else ()
    extra = {name: os.environ[name] for name in kept if name in os.environ}
    return stdio_client(StdioServerParameters(command=command[0], args=command[1:], env=extra), errors)


def open_url(url: str, token: str | None) -> Any:
    if not url.startswith(("http://", "https://")):
        raise UserError(f"MCP 服务器的网址要以 http:// 或 https:// 开头，给的是 {visible(url)[:60]}。")
    import httpx2

    local = url.split("://", 1)[1].startswith(("127.0.0.1", "localhost", "[::1]"))
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    if token and not local and url.startswith("http://"):
        raise UserError("钥匙不能走 http://：路上谁都看得到。用 https://。")
    client = httpx2.AsyncClient(
        headers=headers, timeout=httpx2.Timeout(30.0, read=300.0), trust_env=not local
    )
    return streamable_http_client(url, http_client=client)


def last_lines(errors: Any, at_most: int = 300) -> str:
    """标准错误的最后一行。"""
    with contextlib.suppress(OSError, ValueError):
        errors.seek(0)
        lines = [line.strip() for line in errors.read()[-20_000:].splitlines() if line.strip()]
        return visible(lines[-1])[:at_most] if lines else ""
    return ""


def short_message(text: str, at_most: int) -> str:
    """一条消息 → 一行：汉字照写，长的截掉。"""
    with contextlib.suppress(ValueError):
        text = json.dumps(json.loads(text), ensure_ascii=False)
    text = visible(text)
    return text if len(text) <= at_most else text[:at_most] + f"…（共 {len(text)} 个字）"
