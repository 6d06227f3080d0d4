"""MCP 服务器：tools.py 的工具，经 Model Context Protocol 给任何一个懂 MCP 的客户端用（Claude Desktop、IDE、我们自己的 mcp_client.py）。

你会学到
  1. MCP 说的是 JSON-RPC：tools/list 问有什么，tools/call 请它做；走标准输入输出（stdio），或走 HTTP。
  2. 参数不合、工具出错，是一个 isError 的结果，说给模型听；不是协议的错误，更不是服务器倒下。
  3. 开放哪些，是启动的人定的：会改东西的、读文件的、运行代码的，不写明就没有。
  4. HTTP 只听 127.0.0.1，还要看 Host 与 Origin：不看，浏览器里的任何一个网页都能借 DNS 重绑定叫你的工具。
  5. 除了工具（模型要用），还有资源（应用要读的数据，这里给了单位表）与提示（用户挑的模板，这里没有）。

怎么运行
  python mcp_server.py                                   # stdio：由客户端启动，自己运行就是等着
  python mcp_server.py --http --port 8765                # http://127.0.0.1:8765/mcp
  python mcp_server.py --folder 我的笔记 --allow_writing   # 加上读文件的、会改东西的
  python mcp_server.py --list_tools                          # 只看会开放哪些

应当看到（实测见本文件夹的 README.md）：mcp_client.py 连上来，列得出、叫得动；换了 Host 或 Origin 的 HTTP 请求被拒绝。

参考：modelcontextprotocol.io 的规范（2026-07-28）；官方 Python SDK 2.x 的 MCPServer。
"""

from __future__ import annotations

from nlp_common.base.cli import run_main

import json
import logging
import socket
from dataclasses import dataclass

from nlp_common.base.arguments import Limits, option, parse_arguments
from nlp_common.base.errors import UserError
from nlp_common.lm.reply_parser import Call
from tool_calls import Tool, run_call
from tool_parts import toolbox
from unit_table import UNITS

try:
    import anyio
    from mcp import types
    from mcp.server import MCPServer
    from mcp.server.transport_security import TransportSecuritySettings
except ImportError:  # 没有装：直接运行的，main 说怎样装
    if __name__ != "__main__":
        raise
    MCPServer = object

PORT = Limits(at_least=0, at_most=65535)
UNITS_ADDRESS = "units://all"


@dataclass
class ServerSettings:
    http: bool = option("走 HTTP（不给就是 stdio）", False)
    port: int = option("HTTP 听哪个端口；0 是随便一个空着的", 8765, PORT)
    only: list[str] | None = option("只开放这几件工具", nargs="+")  # noqa: RUF009
    folder: str | None = option("许可读这个文件夹里的文件（只读）")
    table: str | None = option("look_up 查的表：csv 或 jsonl；默认是自带的小世界")
    notes: str | None = option("write_note 写到哪个文件；默认 outputs/notes.md")
    allow_writing: bool = option("也开放会改东西的：每次问不问人，由连上来的客户端管", False)
    allow_python: bool = option("也开放 run_python（还要 --allow_writing）", False)
    tool_seconds: float = option("一个工具最多几秒", 10.0, Limits(above=0))
    list_tools: bool = option("只列出会开放哪些，不启动", False)


# ---------------------------------------------------------------- 1. 开放哪些


def opened_tools(settings: ServerSettings) -> dict[str, Tool]:
    """没有 --allow_writing，会改东西的一件也不开放：服务器这边没有人可问。"""
    if settings.allow_python and not settings.allow_writing:
        raise UserError("--allow_python 要和 --allow_writing 一起给：运行代码也算会改东西的。")
    tools = {
        name: tool for name, tool in toolbox(settings).items() if settings.allow_writing or not tool.writes
    }
    if unknown := [name for name in settings.only or [] if name not in tools]:
        raise UserError(f"--only {unknown[0]}：没有开放这件工具；能开放的是：{'、'.join(tools)}。")
    return {name: tool for name, tool in tools.items() if settings.only is None or name in settings.only}


# ---------------------------------------------------------------- 2. 服务器


class ToolServer(MCPServer):
    """SDK 的服务器，工具换成我们的：检查参数、限时间、限长短、出错不露底，都由 run_call 做，与智能体自己用的一样。"""

    def __init__(self, tools: dict[str, Tool], seconds: float):
        super().__init__("nlp-learning-tools", version="1", log_level="WARNING")
        self.tools, self.seconds = tools, seconds
        self.resource(
            UNITS_ADDRESS, name="units", description="convert 认得的单位", mime_type="application/json"
        )(units)

    async def list_tools(self) -> list[types.Tool]:
        return [describe(tool) for tool in self.tools.values()]

    async def call_tool(self, name: str, arguments: dict, context: object = None) -> types.CallToolResult:
        """在另一个线程里做：等它的时候，别的请求照样有人答。"""
        result = await anyio.to_thread.run_sync(
            run_call, self.tools, Call(name, arguments), started_by_owner, self.seconds, 20_000
        )
        return types.CallToolResult(
            content=[types.TextContent(type="text", text=result.text)], is_error=not result.ok
        )


def describe(tool: Tool) -> types.Tool:
    """OpenAI 的写法 → MCP 的写法。read_only_hint 只是提示：客户端信不信，看它信不信这个服务器。"""
    function = tool.schema["function"]
    hints = types.ToolAnnotations(
        read_only_hint=not tool.writes, destructive_hint=tool.writes, open_world_hint=False
    )
    return types.Tool(
        name=tool.name,
        description=function["description"],
        input_schema=function["parameters"],
        annotations=hints,
    )


def started_by_owner(call: Call) -> bool:
    """会改东西的工具，启动时写明 --allow_writing 才在这里；每一次许不许，由客户端问它的人。"""
    return True


def units() -> str:
    """资源：应用可以读来给用户看，不由模型叫。"""
    return json.dumps({name: kind for name, (kind, _, _) in UNITS.items()}, ensure_ascii=False)


# ---------------------------------------------------------------- 3. 两种走法


def http_app(server: ToolServer):
    """只认 Host 是本机的请求；有 Origin（浏览器发的）的，也要是本机的网页。"""
    names = ("127.0.0.1", "localhost")
    security = TransportSecuritySettings(
        allowed_hosts=[f"{name}:*" for name in names], allowed_origins=[f"http://{name}:*" for name in names]
    )
    return server.streamable_http_app(transport_security=security, max_request_body_size=1 << 20)


def serve_http(server: ToolServer, port: int) -> None:
    import uvicorn

    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(("127.0.0.1", port))  # 不是 0.0.0.0：同一个网里的别的机器连不上
    except OSError as error:
        raise UserError(
            f"端口 {port} 用不了：{error.strerror}。换一个 --port，或 --port 0 随便挑一个。"
        ) from error
    listener.listen(64)  # 印出网址之前：读到它就连得上
    print(f"http://127.0.0.1:{listener.getsockname()[1]}/mcp（Ctrl-C 停下）", flush=True)
    config = uvicorn.Config(http_app(server), log_level="warning", timeout_graceful_shutdown=2)
    uvicorn.Server(config).run(sockets=[listener])


def main(argv: list[str] | None = None) -> dict:
    settings = parse_arguments(ServerSettings, argv)
    if MCPServer is object:
        raise UserError('这一课要用到 MCP 的官方库：pip install "mcp>=2,<3"。')
    tools = opened_tools(settings)
    if settings.list_tools:
        for tool in tools.values():
            print(
                f"{tool.name}：{tool.schema['function']['description']}{'（会改东西）' if tool.writes else ''}"
            )
        return {"tools": list(tools)}
    logging.getLogger("mcp").setLevel(logging.ERROR)
    server = ToolServer(tools, settings.tool_seconds)
    if settings.http:
        serve_http(server, settings.port)
    else:  # 标准输出只许有 JSON-RPC：一句 print 就会弄坏它
        server.run("stdio")
    return {"tools": list(tools)}


if __name__ == "__main__":
    run_main(main)
