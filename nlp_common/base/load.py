"""压力测试各处共用的：打谁（没有明写的，只许是本机），和百分位数。"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Sequence
from urllib.parse import urlsplit

import numpy as np

from nlp_common.base.errors import UserError


def check_target(url: str, explicit: bool) -> tuple[str, int]:
    """→ (主机, 端口)。没有明写 --url 的，只许是这台机器自己。"""
    parts = urlsplit(url)
    try:
        port = parts.port or 80
    except ValueError:
        raise UserError(f"{url} 的端口不对。") from None
    if parts.scheme != "http" or not parts.hostname:
        raise UserError(f"{url} 不是网址：要写成 http://127.0.0.1:8900。")
    try:
        addresses = {str(row[4][0]) for row in socket.getaddrinfo(parts.hostname, port)}
    except OSError as error:
        raise UserError(f"找不到主机 {parts.hostname}（{error.strerror or error}）。") from error
    if not explicit and not all(ipaddress.ip_address(each.split("%")[0]).is_loopback for each in addresses):
        raise UserError(f"{url} 不是这台机器：压力只打本机。真要打自己的服务器，用 --url 明写。")
    return parts.hostname, port


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """p50、p95、p99：有多少个不超过它（真的出现过的一个值，不在两个之间取中）。"""
    if not len(values):
        return {"p50": 0.0, "p95": 0.0, "p99": 0.0}
    found = np.percentile(values, [50, 95, 99], method="inverted_cdf")
    return {name: float(value) for name, value in zip(("p50", "p95", "p99"), found, strict=True)}
