"""联网之前要知道的三件事：环境变量、连哪个服务器、几秒内连不连得上。

本文件在导入时不导入任何 Hugging Face 的库：``HF_ENDPOINT`` 等环境变量是它们**导入时**读的，
所以脚本要先 ``prepare_environment()``，再 ``import transformers``。
"""

from __future__ import annotations

import functools
import http.client
import os
import threading
import urllib.error
import urllib.request

from .cli import UserError
from .memory import keep_freed_memory

TIMEOUT = 5.0  # 秒；多久连不上就算连不上
MIRROR = "https://hf-mirror.com"


def prepare_environment() -> None:
    """设好环境变量（用户自己设过的不动）和 malloc。要在导入任何 Hugging Face 库之前调用。"""
    defaults = {
        "HF_HUB_DISABLE_TELEMETRY": "1",  # TRL 一导入就会联网报告，离线时白等
        "TOKENIZERS_PARALLELISM": "false",  # DataLoader 分叉进程之后，并行分词会报警甚至死锁
        "TRL_EXPERIMENTAL_SILENCE": "1",
        "HF_HUB_ETAG_TIMEOUT": "5",
        "HF_HUB_DOWNLOAD_TIMEOUT": "10",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    keep_freed_memory()


def endpoint(source: str = "hf") -> str:
    """要连的服务器，例如 ``https://huggingface.co``；HF_ENDPOINT 写得不像网址是 UserError。"""
    if source == "modelscope":
        domain = os.environ.get("MODELSCOPE_DOMAIN") or "www.modelscope.cn"
        return os.environ.get("MODELSCOPE_ENDPOINT") or "https://" + domain.removeprefix("https://")
    url = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    if not url.startswith(("http://", "https://")):
        raise UserError(f"HF_ENDPOINT={url} 不是网址：要以 https:// 开头，例如 {MIRROR}。")
    return url


def offline() -> bool:
    """用户是否要求了离线（HF_HUB_OFFLINE 或 TRANSFORMERS_OFFLINE）。"""
    value = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return value.upper() in {"1", "ON", "YES", "TRUE"}


def hub_reachable(timeout: float = TIMEOUT, source: str = "hf") -> bool:
    """总共 timeout 秒之内连不连得上 hub；要求了离线时不试就是 False。同一地址每个进程只试一次。"""
    if source == "hf" and offline():
        return False
    return _answers(endpoint(source), timeout)


@functools.cache
def _answers(url: str, timeout: float) -> bool:
    answered = []

    def ask() -> None:
        request = urllib.request.Request(url, method="HEAD")
        try:
            with urllib.request.urlopen(request, timeout=timeout):  # 会用 HTTPS_PROXY 等代理设置
                answered.append(True)
        except urllib.error.HTTPError as error:
            # 4xx 也说明服务器在；5xx 多半是中间的网关在替它道歉，407 是代理要密码。
            answered.append(error.code < 500 and error.code != 407)
        except (OSError, ValueError, http.client.HTTPException):
            answered.append(False)

    # urlopen 的 timeout 管不到 DNS，也不管一点一点挤出来的回答；放进线程里等，总时间才有上限。
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(timeout)
    return bool(answered and answered[0])
