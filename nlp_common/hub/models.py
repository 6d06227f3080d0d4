"""模型从哪里来：本地文件夹、本地缓存、Hugging Face hub、ModelScope、内置名字。"""

from __future__ import annotations

import importlib
import os
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from nlp_common.base.errors import UserError
from nlp_common.hub.download import download_model
from nlp_common.hub.model_folder import check_model_folder, has_tokenizer, missing_file, what_file
from nlp_common.hub.network import MIRROR, endpoint, hub_reachable, offline, why_unreachable
from nlp_common.hub.verify import verify_model

# 内置名字，也是它的模块（缓存文件夹、装没装、怎么装、怎么导出），用到才导入；同名的本地文件夹写成 ./smollm2
BUILT_INS = ("smollm2", "e5")
BUILT_IN = "smollm2"  # 会说话的那一个


def find_model(name: str, source: str = "hf") -> str | None:
    """找模型，不下载：本地文件夹或缓存给出路径，只在连得上的服务器上有就原样给出名字，都没有给 None。

    写了一半的文件夹、不存在的路径、不合法的名字、写错的 source 是 UserError。
    要拿去 ``from_pretrained`` 的，用 require_model。
    """
    if source not in ("hf", "modelscope"):
        raise UserError(f"--source {source} 不认识：可以是 hf 或 modelscope。")
    if name in BUILT_INS:
        return _built_in(name)
    folder = Path(os.path.expanduser(name))
    if folder.is_dir():
        check_model_folder(folder)
        return str(folder)
    if folder.is_file():
        raise UserError(what_file(folder))
    if _is_path(name):
        raise UserError(f"没有这个文件夹：{name}（当前目录是 {Path.cwd()}）。请检查路径的写法。")
    if cached := _cached(name, source):
        return cached
    if folder.parent != Path(".") and folder.parent.is_dir():  # outputs/tini：目录在，多半是路径打错了
        raise UserError(
            f"{folder.parent} 里没有 {folder.name}，模型缓存里也没有 {name}。请检查名字的写法；"
            f"如果 {name} 是 hub 上的名字，换个没有 {folder.parent} 文件夹的目录运行。"
        )
    return name if hub_reachable(source=source) else None


def _is_path(name: str) -> bool:
    return bool(re.match(r"[./~]|[A-Za-z]:", name)) or "\\" in name or name.count("/") > 1


def _built_in_module(name: str) -> Any:
    return importlib.import_module(f"nlp_common.hub.{name}")


def _built_in(name: str) -> str | None:
    module = _built_in_module(name)
    folder = module.cache_folder()
    if missing_file(folder) and not module.packages_installed():
        return None
    return str(module.export(folder))


def _cached(name: str, source: str) -> str | None:
    """缓存里齐全的快照（配置、权重、分词器都在）的路径。下载到一半的不算。"""
    found = _snapshot(name, source)
    return str(found) if found and has_tokenizer(found) and missing_file(found) is None else None


def _snapshot(name: str, source: str) -> Path | None:
    """缓存里的快照文件夹，齐不齐全不管。"""
    if source == "modelscope":
        if not find_spec("modelscope"):
            raise UserError("--source modelscope 需要 modelscope：pip install modelscope")
        from modelscope import snapshot_download

        try:
            return Path(snapshot_download(name, local_files_only=True))
        except Exception:  # 各版本在缓存里没有时抛的异常类型不同
            return None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        # 不用 snapshot_download(local_files_only=True)：仓库里有一个文件没下载（README、别的框架的权重），它就说没有
        config = try_to_load_from_cache(name, "config.json")
    except HFValidationError as error:
        raise UserError(f"{name} 既不是本地文件夹，也不是合法的模型名：{error}") from error
    return Path(config).parent if isinstance(config, str) else None


def _broken_copy(name: str, source: str) -> str | None:
    """缓存里有这个模型、只是坏了一个文件，而现在又连不上网时，说出是哪个文件。"""
    found = None if name in BUILT_INS else _snapshot(name, source)
    broken = missing_file(found) if found else None
    if not found or not broken or not (found / broken).exists():
        return None
    return (
        f"缓存里有模型 {name}，但其中的 {found / broken} 没写完或坏了，现在又连不上 {endpoint(source)}。"
        "连上网之后再运行同一条命令，会重新下载它。"
    )


def require_model(name: str, source: str = "hf", verify: bool = False) -> str:
    """可以交给 ``from_pretrained`` 的路径；本地没有就下载。得不到是 UserError，写明几种办法。

    仓库里没有 safetensors 时给出的是 hub 名字本身。内置名字（``smollm2``、``e5``）第一次用时导出到缓存文件夹。
    verify：把下载来的文件与服务器上的大小、哈希核对一遍。
    """
    found = find_model(name, source)
    if found is None:
        raise UserError(_broken_copy(name, source) or how_to_get(name, source))
    if found == name and not Path(found).is_dir():
        found = download_model(name, source)
    if verify and Path(found).is_dir() and name not in BUILT_INS:
        print(verify_model(name if str(Path(name).expanduser()) != found else found, Path(found), source))
    return found


def how_to_get(name: str, source: str = "hf") -> str:
    """得不到模型时给读者看的话：为什么，以及几种办法。"""
    if name in BUILT_INS:
        return _built_in_module(name).INSTALL_HINT
    return f"""得不到模型 {name}：{why_not(source)}。任选一种办法，再运行同一条命令：
  1. 换镜像      Linux/macOS：export HF_ENDPOINT={MIRROR}
                 Windows：set HF_ENDPOINT={MIRROR}（PowerShell：$env:HF_ENDPOINT="{MIRROR}"）
  2. ModelScope  pip install modelscope，并加 --source modelscope
  3. 已有的模型  --model 文件夹路径（里面要有 config.json、model.safetensors 和分词器）
  4. 不用大模型  --preset tiny"""


def why_not(source: str) -> str:
    if source == "hf" and offline():
        return "本地缓存里没有，而 HF_HUB_OFFLINE=1 要求不联网"
    return f"本地缓存里没有，{why_unreachable(source).replace('秒内连不上', '秒内也连不上')}"
