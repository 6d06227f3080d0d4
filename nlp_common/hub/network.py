"""联网之前要知道的：连哪个服务器、几秒内连不连得上、读来的东西缓存在哪里。"""

from __future__ import annotations

import functools
import http.client
import os
import threading
import urllib.error
import urllib.request
from pathlib import Path

from nlp_common.base.errors import UserError

TIMEOUT = 5.0  # 秒；多久连不上就算连不上
MIRROR = "https://hf-mirror.com"


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


def cache_root() -> Path:
    """环境变量 NLP_LEARNING_CACHE；没有就是 XDG_CACHE_HOME（默认 ~/.cache）里的 nlp_learning。"""
    if base := os.environ.get("NLP_LEARNING_CACHE"):
        return Path(base).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "nlp_learning"
