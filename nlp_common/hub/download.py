"""把一个模型下载到本地缓存，返回文件夹；连不上、没有、断了、坏了，都变成读者看得懂的话。"""

from __future__ import annotations

from pathlib import Path

from nlp_common.base.errors import UserError
from nlp_common.hub.model_folder import missing_file
from nlp_common.hub.network import TIMEOUT, endpoint

# 配置、分词器、权重；不要 pickle（.bin）、别的框架的权重，也不要子文件夹（onnx/ 等）。
WANTED = ["*.json", "*.txt", "*.jinja", "*.model", "model*.safetensors"]
AGAIN = "再运行同一条命令，会从断开的地方接着下载。"


def download_model(name: str, source: str = "hf") -> str:
    """hub 名 → 下载好的文件夹。仓库里没有 safetensors 时返回 name 本身，让 from_pretrained 自己想办法。"""
    folder = _from_modelscope(name) if source == "modelscope" else _from_hub(name)
    broken = missing_file(Path(folder))
    if broken and not (Path(folder) / broken).exists():
        return name
    if broken:
        raise UserError(f"{folder} 里的 {broken} 是坏的。请删掉它，再运行同一条命令重新下载。")
    return folder


def _from_hub(name: str) -> str:
    from huggingface_hub import errors, hf_hub_download, snapshot_download

    server = endpoint()
    options = {"endpoint": server, "etag_timeout": TIMEOUT}
    try:
        folder = Path(snapshot_download(name, allow_patterns=WANTED, ignore_patterns=["*/*"], **options))
        broken = missing_file(folder)
        if broken and (folder / broken).exists():  # 已在缓存里的文件，snapshot_download 不会再看一眼
            print(f"缓存里 {name} 的 {broken} 没写完或坏了，重新下载。", flush=True)
            hf_hub_download(name, broken, force_download=True, **options)
        return str(folder)
    except errors.GatedRepoError as error:
        raise UserError(
            f"模型 {name} 要先在 {server}/{name} 申请访问，批准后运行 hf auth login 登录。"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(f"{server} 上没有模型 {name}（或它是私有的）。请检查 --model 的拼写。") from error
    except Exception as error:  # 断线、超时、5xx、磁盘：类型随 huggingface_hub 与 httpx 的版本变
        raise UserError(f"从 {server} 下载 {name} 没有完成：{_reason(error)}\n{AGAIN}") from error


def _from_modelscope(name: str) -> str:
    from modelscope import snapshot_download

    try:
        return str(snapshot_download(name, allow_patterns=WANTED, ignore_patterns=["*/*"]))
    except Exception as error:  # 网络、名字、磁盘，各版本的异常类型不同；原话照转
        raise UserError(
            f"从 ModelScope 下载 {name} 失败：{_reason(error)}\n请检查 --model 的名字与网络。{AGAIN}"
        ) from error


def _reason(error: BaseException) -> str:
    """一行话的原因。huggingface_hub 有时只说"找不到"，真正的原因在它的 __cause__ 里。"""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())[:300] or type(error).__name__
