"""秘密不进记录：环境变量里像钥匙的值、读者标出的值、样子像钥匙的字，一律写成 〔已隐去〕。

    hider = Hider.from_environment(marked=["我的口令"])
    hider.text("key=sk-abc…")  →  "key=〔已隐去〕"

工具的结果先过一遍它，再交给模型：模型没有见过的，说不出来，也带不到服务器上。
认得的是值的原样，和它在 JSON、网址、base64、十六进制里的写法；拆开写、倒着写的认不出来。
"""

from __future__ import annotations

import base64
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus

from nlp_common.base.errors import UserError

HIDDEN = "〔已隐去〕"
SHORTEST = 6  # 再短的不算秘密：值是 1、true 的，隐去了什么也读不懂
NAMES = re.compile(
    r"key|token|secret|passw|pwd|credential|cookie|bearer|(^|_)(pat|auth|dsn|sas)($|_)|connection_?string",
    re.IGNORECASE,
)
# 名字像钥匙，值却不是：文件的位置、开关
NOT_NAMES = re.compile(
    r"(_PATH|_FILE|_DIR|_ENV|PARALLELISM|KEYBOARD.*|.*KEYMAP|SSH_AUTH_SOCK)$", re.IGNORECASE
)
PATTERNS = [
    re.compile(r"\b(?:sk|pk|rk)-[A-Za-z0-9_-]{16,}"),  # OpenAI 与许多家
    re.compile(r"\bgh[pousr]_[A-Za-z0-9]{20,}|\bgithub_pat_\w{20,}|\bglpat-[\w-]{16,}"),
    re.compile(r"\bhf_[A-Za-z0-9]{20,}"),
    re.compile(r"\b(?:AKIA|ASIA|LTAI)[A-Za-z0-9]{12,}"),  # AWS、阿里云
    re.compile(r"\bxox[abprs]-[A-Za-z0-9-]{10,}"),
    re.compile(r"\bAIza[\w-]{30,}"),
    re.compile(r"\beyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]{8,}"),  # JWT
    re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL),
    re.compile(r"(?<=://)[^\s/:@]+:[^\s/@]+(?=@)"),  # 网址里的用户名与口令
    re.compile(r"(?<=Bearer )[A-Za-z0-9._~+/-]{8,}=*", re.IGNORECASE),
    re.compile(  # password = …、"api_key": "…"
        r"(?i)(?<![a-z])(?:(?:api|access|secret)[_-]?key|passw(?:or)?d|secret|token)\\?[\"']?\s*[:=]\s*\\?[\"']?"
        r"(?P<value>[^\s\"',;}\\]{6,})"
    ),
]


class Hider:
    """知道哪些是秘密；text、value 把它们隐去。"""

    def __init__(self, secrets: Iterable[str] = ()):
        forms = {form for secret in secrets if len(secret) >= SHORTEST for form in written_forms(secret)}
        ordered = sorted(forms, key=len, reverse=True)  # 长的先认：短的可能是它的一段
        self.known = re.compile("|".join(map(re.escape, ordered))) if ordered else None

    @classmethod
    def from_environment(
        cls, marked: Iterable[str] = (), environment: Mapping[str, str] | None = None
    ) -> Hider:
        environment = os.environ if environment is None else environment
        found = [value for name, value in environment.items() if looks_secret(name)]
        return cls([*found, *marked])

    def text(self, text: str) -> str:
        if self.known is not None:
            text = self.known.sub(HIDDEN, text)
        for pattern in PATTERNS:
            text = pattern.sub(_hide_value, text)
        return text

    def value(self, value: Any) -> Any:
        """字典、列表里的每一段文字，键也算。"""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, dict):
            return {self.value(key): self.value(each) for key, each in value.items()}
        if isinstance(value, list | tuple):
            return [self.value(each) for each in value]
        return value


def _hide_value(found: re.Match) -> str:
    """有 value 这一组的，只隐去它，前面的名字留着。"""
    if "value" not in found.re.groupindex:
        return HIDDEN
    return found[0][: found.start("value") - found.start()] + HIDDEN


def looks_secret(name: str) -> bool:
    """环境变量的名字像不像钥匙：OPENAI_API_KEY、DB_PASSWORD、GITHUB_TOKEN。"""
    return bool(NAMES.search(name)) and not NOT_NAMES.search(name)


def written_forms(secret: str) -> set[str]:
    """一个秘密的几种写法：原样、JSON 里、网址里、base64、十六进制。"""
    raw = secret.encode("utf-8", "surrogateescape")
    forms = {secret, secret.strip()}
    for plainly in (True, False):
        forms.add(json.dumps(secret, ensure_ascii=plainly)[1:-1])
        forms.add(json.dumps(json.dumps(secret, ensure_ascii=plainly)[1:-1], ensure_ascii=plainly)[1:-1])
    forms |= {quote(raw, safe=""), quote_plus(raw), quote(raw)}
    forms |= {raw.hex(), raw.hex().upper()}
    for shift in range(3):  # 夹在别的字中间编的 base64：头尾几个字随邻居变，中间一样
        coded = base64.b64encode(b"\0" * shift + raw).decode()
        coded = coded[(0, 2, 3)[shift] :].rstrip("=")
        coded = coded if (len(raw) + shift) % 3 == 0 else coded[:-1]
        forms |= {coded, coded.replace("+", "-").replace("/", "_")}
    return {form for form in forms if len(form) >= SHORTEST}


def marked_secrets(path: str | None, names: Iterable[str] | None) -> list[str]:
    """读者标出的：--secrets 文件（一行一个），--secret_env 的环境变量。"""
    marked = []
    if path is not None:
        try:
            lines = Path(path).expanduser().read_text("utf-8-sig").splitlines()
        except OSError as error:
            raise UserError(f"读不了 --secrets {path}：{error.strerror}。") from error
        except UnicodeDecodeError as error:
            raise UserError(f"--secrets {path} 要是 UTF-8 的文字文件，一行一个秘密。") from error
        marked += [line.strip() for line in lines if line.strip()]
        if short := [i for i, line in enumerate(lines, 1) if 0 < len(line.strip()) < SHORTEST]:
            raise UserError(
                f"--secrets {path}:{short[0]} 太短：不到 {SHORTEST} 个字的，隐去了别的话也读不懂。"
            )
    for name in names or []:
        if name not in os.environ:
            raise UserError(f"--secret_env {name}：没有这个环境变量。")
        marked.append(os.environ[name])
    return marked
