"""模型从哪里来：本地文件夹、本地缓存、Hugging Face hub、ModelScope、内置名字；以及 auto 预设怎么选。

本文件在导入时不导入任何 Hugging Face 的库：``HF_ENDPOINT`` 等环境变量是它们**导入时**读的，
所以脚本要先 ``prepare_environment()``，再 ``import transformers``。
"""

from __future__ import annotations

import functools
import http.client
import json
import os
import re
import threading
import urllib.error
import urllib.request
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from .cli import UserError

PRESETS = ("auto", "tiny", "full")
BUILT_IN = "smollm2"  # 内置名字；同名的本地文件夹写成 ./smollm2
TIMEOUT = 5.0  # 秒；多久连不上就算连不上
MIRROR = "https://hf-mirror.com"
TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "tokenizer.model", "spiece.model")


def prepare_environment() -> None:
    """设好环境变量（用户自己设过的不动）。要在导入任何 Hugging Face 库之前调用。"""
    defaults = {
        "HF_HUB_DISABLE_TELEMETRY": "1",  # TRL 一导入就会联网报告，离线时白等
        "TOKENIZERS_PARALLELISM": "false",  # DataLoader 分叉进程之后，并行分词会报警甚至死锁
        "TRL_EXPERIMENTAL_SILENCE": "1",
        "HF_HUB_ETAG_TIMEOUT": "5",
        "HF_HUB_DOWNLOAD_TIMEOUT": "10",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def endpoint(source: str = "hf") -> str:
    """要连的服务器，例如 ``https://huggingface.co``；HF_ENDPOINT 写得不像网址是 UserError。"""
    if source == "modelscope":
        return "https://" + os.environ.get("MODELSCOPE_DOMAIN", "www.modelscope.cn")
    url = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    if not url.startswith(("http://", "https://")):
        raise UserError(f"HF_ENDPOINT={url} 不是网址：要以 https:// 开头，例如 {MIRROR}。")
    return url


def offline() -> bool:
    """用户是否要求了离线（HF_HUB_OFFLINE 或 TRANSFORMERS_OFFLINE）。"""
    value = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return value.upper() in {"1", "ON", "YES", "TRUE"}


def hub_reachable(timeout: float = TIMEOUT) -> bool:
    """总共 timeout 秒之内连不连得上 hub；要求了离线时不试就是 False。同一地址每个进程只试一次。"""
    return not offline() and _answers(endpoint(), timeout)


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


def missing_file(folder: Path) -> str | None:
    """模型文件夹里缺（或没写完）的第一个文件名；齐全返回 None。只认 safetensors，不读 pickle。"""
    if not (folder / "config.json").is_file():
        return "config.json"
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if not (folder / names[0]).is_file() and index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError):
            return index.name
    return next((name for name in names if not _whole(folder / name)), None)


def _whole(path: Path) -> bool:
    """safetensors 的文件头写明了总长度，截断的文件一打开就能发现，不必读完。"""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np"):
            return True
    except (OSError, SafetensorError):
        return False


def find_model(name: str, source: str = "hf") -> str | None:
    """找模型，不下载：本地文件夹或缓存给出路径，只在连得上的服务器上有就原样给出名字，都没有给 None。

    写了一半的文件夹、不存在的路径、不合法的名字、写错的 source 是 UserError。
    要拿去 ``from_pretrained`` 的，用 require_model。
    """
    if source not in ("hf", "modelscope"):
        raise UserError(f"--source {source} 不认识：可以是 hf 或 modelscope。")
    if name == BUILT_IN:
        return _built_in()
    folder = Path(name).expanduser()
    if folder.is_dir():
        if missing := missing_file(folder):
            hint = (
                "（里面的 pytorch_model.bin 是 pickle 格式，出于安全不读，请换成 safetensors）"
                if (folder / "pytorch_model.bin").exists()
                else "。如果是复制或下载到一半，请重新来一遍，或用 --model 指向完整的文件夹"
            )
            raise UserError(f"模型文件夹 {folder} 不完整：{missing} 缺失或没写完{hint}。")
        return str(folder)
    if _is_path(name):
        raise UserError(f"没有这个文件夹：{name}（当前目录是 {Path.cwd()}）。请检查 --model 的写法。")
    if cached := _cached(name, source):
        return cached
    if folder.parent != Path(".") and folder.parent.is_dir():  # outputs/tini：目录在，多半是路径打错了
        raise UserError(f"{folder.parent} 里没有 {folder.name}，模型缓存里也没有 {name}。请检查 --model。")
    reachable = hub_reachable() if source == "hf" else _answers(endpoint(source), TIMEOUT)
    return name if reachable else None


def _is_path(name: str) -> bool:
    return bool(re.match(r"[./~]|[A-Za-z]:", name)) or "\\" in name or name.count("/") > 1


def _built_in() -> str | None:
    from . import smollm2

    folder = smollm2.cache_folder()
    if missing_file(folder) and not smollm2.packages_installed():
        return None
    return str(smollm2.export_smollm2(folder))


def _cached(name: str, source: str) -> str | None:
    """缓存里齐全的快照（配置、权重、分词器都在）的路径。下载到一半的不算。"""
    if source == "modelscope":
        if not find_spec("modelscope"):
            raise UserError("--source modelscope 需要 modelscope：pip install modelscope")
        from modelscope import snapshot_download

        try:
            found = Path(snapshot_download(name, local_files_only=True))
        except Exception:  # 各版本在缓存里没有时抛的异常类型不同
            return None
    else:
        prepare_environment()
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

        try:
            found = Path(snapshot_download(name, local_files_only=True))
        except LocalEntryNotFoundError:
            return None
        except HFValidationError as error:
            raise UserError(f"{name} 既不是本地文件夹，也不是合法的模型名：{error}") from error
    has_tokenizer = any((found / file).is_file() for file in TOKENIZER_FILES)
    return str(found) if has_tokenizer and missing_file(found) is None else None


def require_model(name: str, source: str = "hf") -> str:
    """可以交给 ``from_pretrained`` 的路径或 hub 名字；得不到是 UserError，写明几种办法。

    ``source="modelscope"`` 会在这里下载。内置名字 ``smollm2`` 第一次用时导出到缓存文件夹。
    """
    found = find_model(name, source)
    if found is None:
        raise UserError(how_to_get(name, source))
    if found != name or source != "modelscope" or Path(found).is_dir():
        return found
    from modelscope import snapshot_download

    try:
        return str(snapshot_download(name))
    except Exception as error:  # 网络、名字、磁盘，各版本的异常类型不同；原话照转
        raise UserError(f"从 ModelScope 下载 {name} 失败：{error}\n请检查 --model 的名字与网络。") from error


def how_to_get(name: str, source: str = "hf") -> str:
    """得不到模型时给读者看的话：为什么，以及几种办法。"""
    if name == BUILT_IN:
        from . import smollm2

        return smollm2.INSTALL_HINT
    return f"""得不到模型 {name}：{_why_not(source)}。任选一种办法，再运行同一条命令：
  1. 换镜像    Linux/macOS：export HF_ENDPOINT={MIRROR}
               Windows：set HF_ENDPOINT={MIRROR}（PowerShell：$env:HF_ENDPOINT="{MIRROR}"）
  2. ModelScope  pip install modelscope，并加 --source modelscope
  3. 已有的模型  --model 文件夹路径（里面要有 config.json、model.safetensors 和分词器）
  4. 不用大模型  --preset tiny"""


def _why_not(source: str) -> str:
    if source == "hf" and offline():
        return "本地缓存里没有，而 HF_HUB_OFFLINE=1 要求不联网"
    return f"本地缓存里没有，{TIMEOUT:g} 秒内也连不上 {endpoint(source)}"


@dataclass(frozen=True)
class Choice:
    """选定的预设（``tiny`` 或 ``full``）与原因。"""

    preset: str
    reason: str


def choose_preset(
    requested: str, model: str | None, *, full_model: str, needs_accelerator: bool, source: str = "hf"
) -> Choice:
    """定下预设。requested 是 --preset，model 是 --model（没给是 None），full_model 是 full 的默认模型。

    不认识的预设名是 UserError。auto 先看加速器再看 hub：没有 GPU 的笔记本不必等网络。
    """
    if requested not in PRESETS:
        raise UserError(f"--preset {requested} 不认识：可以是 {'、'.join(PRESETS)}。")
    if requested != "auto":
        return Choice(requested, f"你给了 --preset {requested}")
    if model is not None:
        return Choice("full", f"你给了 --model {model}")
    if needs_accelerator:
        from .device import accelerator_available

        if not accelerator_available():
            return Choice("tiny", "没有找到 GPU（CUDA 或 Apple MPS）")
    found = find_model(full_model, source)
    if found is None:
        return Choice("tiny", f"得不到 {full_model}：{_why_not(source)}")
    where = f"可以从 {endpoint(source)} 下载" if found == full_model else "已在本地"
    return Choice("full", f"{'有加速器，' if needs_accelerator else ''}{full_model} {where}")


def announce(choice: Choice) -> str:
    """脚本打印的第一行：用了哪个预设、为什么、换另一个用哪个参数。"""
    if choice.preset == "tiny":
        return f"预设 tiny（内置小模型，离线，CPU 即可）：{choice.reason}。要用真实大模型，加 --preset full。"
    return f"预设 full（真实模型）：{choice.reason}。要在 CPU 上离线快速跑通，加 --preset tiny。"
