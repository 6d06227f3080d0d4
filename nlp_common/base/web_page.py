"""用 Gradio 画的网页怎样开：只听本机，不联网，不往外报告；没有装就说怎样装。"""

from __future__ import annotations

import os
import sys
import threading
from typing import Any

from nlp_common.base.errors import UserError

HOST = "127.0.0.1"  # 只听本机：页面没有密码，不该让别的机器连进来
INSTALL = 'pip install "gradio>=6"'


def import_gradio() -> Any:
    """用到才导入：没有装 gradio 的人照样用命令行。"""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # 默认会向它的网站报告用了哪些功能
    for name in ("no_proxy", "NO_PROXY"):  # 设了代理的电脑，打开本机的网页也会绕去代理
        os.environ[name] = ",".join(filter(None, [os.environ.get(name), HOST, "localhost"]))
    try:
        import gradio
    except ImportError as error:
        raise UserError(f"网页要用到 gradio。请运行：{INSTALL}（{error}）") from error
    if int(gradio.__version__.split(".")[0]) < 6:
        raise UserError(f"网页要 gradio 6 以上，现在装的是 {gradio.__version__}。请运行：{INSTALL}")
    return gradio


def launch(page: Any, port: int | None, **more: Any) -> str:
    """开始服务，返回网址；端口被占用是 UserError。"""
    try:
        _, url, _ = page.launch(
            server_name=HOST,
            server_port=port,
            share=False,
            prevent_thread_lock=True,
            quiet=True,
            ssr_mode=False,
            run_history=False,
            footer_links=[],
            enable_monitoring=False,
            **more,
        )
    except OSError as error:
        raise UserError(f"端口 {port or '7860～7959'} 都被占用了；用 --port 换一个。（{error}）") from error
    return url


def serve(page: Any, port: int | None, **more: Any) -> None:
    """开网页，直到 Ctrl-C。"""
    # 没有桌面的服务器上不去找浏览器：找到的会是 lynx，把终端占住
    desktop = sys.platform in ("darwin", "win32") or os.environ.get("DISPLAY")
    url = launch(page, port, inbrowser=bool(desktop), **more)
    number = url.rstrip("/").rpartition(":")[2]
    print(f"网页开好了：{url} （只有这台机器打得开）。按 Ctrl-C 关掉。")
    print(
        f"程序在远处的服务器上？在自己的电脑上运行 ssh -L {number}:{HOST}:{number} 服务器，再打开同一个网址。"
    )
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        print("\n网页关掉了。")
