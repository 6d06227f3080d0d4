"""联网之前要知道的：连哪个服务器、几秒内连不连得上、读来的东西缓存在哪里。"""

from __future__ import annotations

import functools
import http.client
import os
import threading
import urllib.error
import urllib.parse
import urllib.request
from importlib.util import find_spec
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
    socks = _socks_proxy(url)
    if socks and _cannot_use(socks):
        return False

    def ask() -> None:
        request = urllib.request.Request(url, method="HEAD")
        try:
            if socks:  # urllib 不会用 SOCKS 代理，httpx 会
                answered.append(_ask_through_httpx(url, timeout))
                return
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


def _socks_proxy(url: str) -> str | None:
    """这个网址要走的 SOCKS 代理（环境变量 HTTPS_PROXY、ALL_PROXY 等）；不走是 None。"""
    parts = urllib.parse.urlsplit(url)
    proxies = urllib.request.getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all") or ""
    if not proxy.lower().startswith("socks") or urllib.request.proxy_bypass(parts.hostname or ""):
        return None
    return proxy


def _cannot_use(socks: str) -> str | None:
    """不能用这个 SOCKS 代理的原因与改法；能用是 None。"""
    if not socks.lower().startswith(("socks5://", "socks5h://")):
        right = "socks5://" + socks.split("://", 1)[-1]
        return f"代理 {socks} 的写法认不出，改成：export ALL_PROXY={right}"
    if not find_spec("socksio"):
        return f'要走的是 SOCKS 代理 {socks}，而没有安装它要的包，先运行：pip install "httpx[socks]"'
    return None


def _ask_through_httpx(url: str, timeout: float) -> bool:
    import httpx

    try:
        code = httpx.head(url, timeout=timeout).status_code
    except (httpx.HTTPError, ImportError, ValueError):
        return False
    return code < 500 and code != 407


def why_unreachable(source: str = "hf") -> str:
    """连不上 hub 的原因，一句话。"""
    server = endpoint(source)
    if source == "hf" and offline():
        return "HF_HUB_OFFLINE=1 要求不联网"
    socks = _socks_proxy(server)
    reason = _cannot_use(socks) if socks else None
    return f"连不上 {server}（{reason}）" if reason else f"{TIMEOUT:g} 秒内连不上 {server}"


def cache_root() -> Path:
    """环境变量 NLP_LEARNING_CACHE；没有就是 XDG_CACHE_HOME（默认 ~/.cache）里的 nlp_learning。"""
    if base := os.environ.get("NLP_LEARNING_CACHE"):
        return Path(base).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "nlp_learning"
