"""--verify：下载来的模型文件，大小与哈希是不是和服务器上的一样。

磁盘坏块、没写完就断电、被别的程序改过，载入时未必报错，训练结果却说不清了。
"""

from __future__ import annotations

import hashlib
import json
import re
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from nlp_common.base.errors import UserError
from nlp_common.hub.network import TIMEOUT, endpoint, hub_reachable


@dataclass(frozen=True)
class Expected:
    """一个文件应有的样子；hash 是 sha256（64 位）或 git 的 blob sha1（40 位），没有就是 None。"""

    size: int | None
    hash: str | None


def verify_model(name: str, folder: Path, source: str = "hf") -> str:
    """核对 folder 里从 name 下载的每个文件，返回一句结果；有一个不对就是 UserError，写明怎么补救。"""
    if name == str(folder):
        return f"--verify：{folder} 是本地文件夹，不是从网上下载的，没有可以对照的。"
    expected, basis = expected_files(name, folder, source)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    checked = [path for path in files if path.relative_to(folder).as_posix() in expected]
    for path in checked:
        relative = path.relative_to(folder).as_posix()
        if fault := difference(path, expected[relative]):
            raise UserError(_mend(name, relative, path, fault, source))
    if not checked:
        raise UserError(f"--verify：{basis}没有 {folder} 里任何一个文件的记录，没法核对。")
    return f"--verify：{len(checked)} 个文件与{basis}的大小和哈希一致。"


def expected_files(name: str, folder: Path, source: str) -> tuple[dict[str, Expected], str]:
    """→ (文件名 → 应有的样子, 依据是什么)。问得到服务器就问，问不到就用缓存自己的记录。"""
    if source == "modelscope":
        return _from_modelscope(name), "魔搭社区上"
    if not hub_reachable():
        # huggingface_hub 的缓存里，快照中的文件是链接，指向以哈希命名的文件
        blobs = {path: path.resolve().name for path in folder.rglob("*") if path.is_symlink()}
        known = {
            path.relative_to(folder).as_posix(): Expected(None, blob)
            for path, blob in blobs.items()
            if re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", blob)
        }
        return known, f"（连不上 {endpoint()}）缓存里下载时的记录"
    from huggingface_hub import HfApi

    try:
        tree = list(HfApi(endpoint=endpoint()).list_repo_tree(name, revision=folder.name, recursive=True))
    except Exception as error:  # 类型随 huggingface_hub 的版本变
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"--verify：问不到 {endpoint()} 上 {name} 的文件清单（{reason}）。过一会儿再试，或去掉 --verify。"
        ) from error
    files = [each for each in tree if hasattr(each, "blob_id")]
    return {
        each.path: Expected(each.size, each.lfs.sha256 if each.lfs else each.blob_id) for each in files
    }, f" {endpoint()} 上"


def _from_modelscope(name: str) -> dict[str, Expected]:
    """直接问服务器：modelscope 包的 get_model_files 在新版本里不再给出 sha256。"""
    url = f"{endpoint('modelscope')}/api/v1/models/{name}/repo/files?Revision=master&Recursive=True"
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as answer:
            files = json.load(answer)["Data"]["Files"]
        return {
            each["Path"]: Expected(each.get("Size"), each.get("Sha256") or None)
            for each in files
            if each["Type"] != "tree"
        }
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(
            f"--verify：问不到魔搭社区上 {name} 的文件清单（{error}）。过一会儿再试，或去掉 --verify。"
        ) from error


def difference(path: Path, expected: Expected) -> str | None:
    """文件与应有的样子哪里不同；相同是 None。先比大小：截断的大文件不必读完。"""
    size = path.stat().st_size
    if expected.size is not None and size != expected.size:
        return f"应有 {expected.size:,} 字节，实有 {size:,} 字节"
    if expected.hash:
        git = len(expected.hash) == 40
        actual = _hash(path, hashlib.sha1(b"blob %d\0" % size) if git else hashlib.sha256())
        if actual != expected.hash.lower():
            return f"{'git sha1' if git else 'sha256'} 应是 {expected.hash}，实际是 {actual}"
    return None


def _hash(path: Path, digest: hashlib._Hash) -> str:
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _mend(name: str, relative: str, path: Path, fault: str, source: str) -> str:
    command = (
        f"hf download {name} {relative} --force-download"
        if source == "hf"
        else f"删掉 {path}，再运行同一条命令，会重新下载它"
    )
    return f"{name} 的 {relative} 坏了：{fault}。\n  文件：{path}\n  重新下载：{command}"
