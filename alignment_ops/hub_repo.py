"""一次训练在 hub 上的家，一个仓库：建、查、推检查点、取检查点、发布。令牌只在内存里；出错时说清怎么办。

仓库里有什么：

    hub_run.json                     这次训练的设置、起点、数据的 sha256、库的版本
    start/…                          起点模型（它只在本机的时候）
    checkpoints/checkpoint-200/…     最近两个写完整的检查点，各有一份 sha256.json
    README.md、model.safetensors …   训练完了：模型卡、模型、run.json；检查点删掉

每次推送是一次提交，要么全成，要么不成，所以仓库里看得见的检查点都是完整的。
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nlp_common.base.errors import UserError
from nlp_common.base.runs import CHECKPOINT_DONE, file_sha256, write_json
from nlp_common.hub.network import endpoint, hub_reachable, offline, why_unreachable

NOTE = "hub_run.json"
HASHES = "sha256.json"
KEEP = 2  # 仓库里留几个检查点：新的一个坏了，还有前一个
TRIES = 6  # 一次推送试几回；每回里面，huggingface_hub 传大文件时自己还会再试
TEMPORARY = (408, 425, 429, 500, 502, 503, 504)
CHECKPOINT = re.compile(rf"checkpoints/checkpoint-(\d+)/{CHECKPOINT_DONE}")
ITS_OWN = (NOTE, "start/", "checkpoints/", ".gitattributes")  # 训练完之前仓库里会有的
# 每试一次它都用英文警告一遍；这里自己说
logging.getLogger("huggingface_hub.utils._http").setLevel(logging.ERROR)


@dataclass
class HubRepo:
    api: Any  # huggingface_hub.HfApi，带着令牌
    name: str  # 拥有者/名字
    user: str  # 令牌是谁的
    public: bool = False
    head: str | None = None  # 开始时最新的提交，之后是自己的；推的时候不再是它，就是别的机器也在推
    wait: float = 1.0  # 秒：再试之前等多久，每次加倍
    retried: int = 0

    # ------------------------------------------------------------ 看

    def look(self) -> Any:
        """仓库的近况：最新的提交 sha，文件 siblings。"""
        return self.try_hard("看仓库", lambda: self.api.repo_info(self.name))

    def read_note(self) -> dict | None:
        """上次推送时记的 hub_run.json；空的仓库是 None；里面是别的东西是 UserError。"""
        info = self.look()
        self.head, files = info.sha, [each.rfilename for each in info.siblings]
        if NOTE in files:
            return self.parse_note(self.download(NOTE).read_text(encoding="utf-8"))
        others = [name for name in files if not name.startswith(ITS_OWN)]
        if others:
            raise UserError(
                f"{self.name} 里是别的东西（{'、'.join(others[:3])}{' …' if len(others) > 3 else ''}，没有 {NOTE}），"
                "不会动它。请用 --repo 换一个新的名字。"
            )
        return None

    def parse_note(self, text: str) -> dict:
        try:
            note = json.loads(text)
            if isinstance(note["settings"], dict) and {"from", "weights"} <= set(note["start"]):
                return note
        except (ValueError, KeyError, TypeError):
            pass
        raise UserError(f"{self.name} 里的 {NOTE} 不像是这里写的，接不上那次训练：用 --repo 换一个新的名字。")

    def steps(self) -> list[int]:
        """仓库里有第几步的检查点，从旧到新。"""
        names = [each.rfilename for each in self.look().siblings]
        return sorted(int(found[1]) for name in names if (found := CHECKPOINT.fullmatch(name)))

    # ------------------------------------------------------------ 推

    def push_note(self, note: dict, start: Path | None) -> None:
        """训练开始之前：设置，和只在本机的起点模型；以前的检查点不再要。"""
        files: dict[str, Path | bytes] = {NOTE: as_json(note)}
        for path in files_of(start) if start else []:
            name = path.relative_to(start).as_posix()
            files[f"start/{name}"] = shareable(path) if name == "run.json" else path
        self.head = self.look().sha
        self.commit("settings and start", files, [f"checkpoints/checkpoint-{step}/" for step in self.steps()])

    def push_checkpoint(self, folder: Path) -> int:
        """推一个检查点，同一次提交里删掉太旧的。返回几个字节。"""
        write_json(
            folder / HASHES, {p.relative_to(folder).as_posix(): file_sha256(p) for p in files_of(folder)}
        )
        files = {f"checkpoints/{folder.name}/{p.relative_to(folder).as_posix()}": p for p in files_of(folder)}
        old = [step for step in self.steps() if f"checkpoint-{step}" != folder.name]
        gone = [f"checkpoints/checkpoint-{step}/" for step in old[: max(0, len(old) - KEEP + 1)]]
        self.commit(folder.name, files, gone)
        return sum(path.stat().st_size for path in files_of(folder))

    def publish(self, folder: Path, card: str, note: dict, keep_checkpoints: bool) -> None:
        """训练完了：模型、去掉本机路径的 run.json、模型卡；检查点不再要。"""
        files: dict[str, Path | bytes] = {
            path.relative_to(folder).as_posix(): path for path in files_of(folder)
        }
        files |= {"run.json": shareable(folder / "run.json"), "README.md": card.encode(), NOTE: as_json(note)}
        gone = [] if keep_checkpoints else [f"checkpoints/checkpoint-{step}/" for step in self.steps()]
        self.commit("trained model and card", files, gone)

    def commit(self, title: str, files: dict[str, Path | bytes], gone: list[str] | None = None) -> None:
        """一次提交。断在半路就再试；其实成了、只是没有听到回答的，看得出来，不重推。"""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        tried = []

        def send() -> str:
            if tried and self.is_there(files):
                return self.api.repo_info(self.name).sha
            tried.append(title)
            adds = [CommitOperationAdd(name, data) for name, data in files.items()]
            deletes = [CommitOperationDelete(name, is_folder=True) for name in gone or []]
            options = {"commit_message": title, "parent_commit": self.head}
            return self.api.create_commit(self.name, [*adds, *deletes], **options).oid

        self.head = self.try_hard(f"推 {title} 的提交", send)

    def is_there(self, files: dict[str, Path | bytes]) -> bool:
        """这些文件是不是已经一字不差地在仓库里。"""
        found = {each.path: each for each in self.api.get_paths_info(self.name, list(files))}
        for name, data in files.items():
            if name not in found:
                return False
            lfs = found[name].lfs
            mine = sha256_of(data) if lfs else git_sha1(data)
            if mine != (lfs.sha256 if lfs else found[name].blob_id):
                return False
        return True

    # ------------------------------------------------------------ 取

    def download(self, pattern: str, folder: Path | None = None) -> Path:
        """下载合乎 pattern 的文件；folder 没给就放进 huggingface_hub 的缓存，返回那个文件。"""
        if folder is None:
            return Path(self.try_hard("下载", lambda: self.api.hf_hub_download(self.name, pattern)))
        options = {"revision": self.head, "local_dir": folder, "allow_patterns": [pattern]}
        self.try_hard("下载", lambda: self.api.snapshot_download(self.name, **options))
        shutil.rmtree(folder / ".cache", ignore_errors=True)
        return folder

    def fetch_checkpoint(self, checkpoints: Path, newer_than: int) -> int | None:
        """把仓库里最新的好检查点放进 checkpoints；返回第几步，没有更新的是 None。"""
        temporary = checkpoints / ".download"
        for step in [each for each in reversed(self.steps()) if each > newer_than]:
            shutil.rmtree(temporary, ignore_errors=True)
            self.download(f"checkpoints/checkpoint-{step}/*", temporary)
            folder = temporary / "checkpoints" / f"checkpoint-{step}"
            if broken := broken_file(folder):
                print(f"hub 上 checkpoint-{step} 的 {broken} 坏了，看前一个。", flush=True)
                continue
            refuse_code(folder, self.name)
            (folder / HASHES).unlink()
            folder.rename(checkpoints / folder.name)
            shutil.rmtree(temporary)
            return step
        shutil.rmtree(temporary, ignore_errors=True)
        return None

    # ------------------------------------------------------------ 再试，与出错时说什么

    def try_hard(self, what: str, work: Callable[[], Any]) -> Any:
        """做 work；网断了、服务器忙就等一等再试；再试也没有用的，马上说是什么。"""
        pause = self.wait
        for attempt in range(1, TRIES + 1):
            try:
                return work()
            except Exception as error:  # 各版本 huggingface_hub、httpx、hf_xet 的异常类型不同
                if attempt == TRIES or not is_temporary(error):
                    raise UserError(explain(error, self.name, self.user, what)) from error
                self.retried += 1
                print(f"{what}没有成（{short(error)}），{pause:g} 秒后再试。", flush=True)
                time.sleep(pause)
                pause *= 2


# ---------------------------------------------------------------- 打开


def read_token() -> str:
    """环境变量 HF_TOKEN。只从这里读：不收命令行的（别人用 ps 看得见），也不存。"""
    token = os.environ.get("HF_TOKEN", "").strip()
    if not token:
        raise UserError(
            f"没有令牌：到 {endpoint()}/settings/tokens 建一个有 write 权限的，放进环境变量，再运行同一条命令：\n"
            "  Linux/macOS：export HF_TOKEN=hf_…      Windows（PowerShell）：$env:HF_TOKEN='hf_…'\n"
            "它只从环境变量读，不写进任何文件，也不打印。"
        )
    return token


def open_repo(name: str, public: bool = False, wait: float = 1.0) -> HubRepo:
    """令牌、网、仓库都没有问题，才开始训练。没有这个仓库就建一个，默认是私有的。"""
    if not re.fullmatch(r"(\w[\w.-]*/)?\w[\w.-]{,90}", name, re.ASCII):
        raise UserError(
            f"--repo {name} 不像 hub 上的名字：只用英文字母、数字、- _ .，写成 名字 或 拥有者/名字。"
        )
    token = read_token()
    if not hub_reachable():
        advice = (
            ""
            if offline()
            else "先看网通不通；公司的网要代理：export HTTPS_PROXY=…。镜像站多半只能下载，不能上传。"
        )
        raise UserError(f"{why_unreachable()}，检查点推不上去。{advice}")
    from huggingface_hub import HfApi
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    repo = HubRepo(HfApi(endpoint=endpoint(), token=token), name, "", wait=wait)
    me = repo.try_hard("看令牌是谁的", repo.api.whoami)
    repo.user = me["name"]
    if "/" not in name:
        repo.name = f"{repo.user}/{name}"
    if me.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise UserError(
            f"HF_TOKEN 里的令牌只能读（{repo.user} 的）：到 {endpoint()}/settings/tokens 换一个有 write 权限的。"
        )
    repo.try_hard("建仓库", lambda: repo.api.create_repo(repo.name, private=not public, exist_ok=True))
    repo.public = not repo.look().private
    if repo.public and not public:
        raise UserError(
            f"{repo.name} 早已是公开的：推上去谁都看得到。真要公开，加 --public true；不然用 --repo 换一个名字。"
        )
    return repo


def is_temporary(error: Exception) -> bool:
    """再试一次也许就好：断线、超时、服务器忙。"""
    response = getattr(error, "response", None)
    if response is not None:
        return response.status_code in TEMPORARY
    from huggingface_hub.errors import OfflineModeIsEnabled

    if isinstance(error, OfflineModeIsEnabled):
        return False
    return isinstance(error, OSError) or type(error).__module__.split(".")[0] in (
        "httpx",
        "httpx2",
        "httpcore",
    )


def explain(error: Exception, name: str, user: str, what: str) -> str:
    """出了什么事，怎么办：一两句话。"""
    code = getattr(getattr(error, "response", None), "status_code", None)
    said = str(error)
    if code == 401 and not user:
        return f"hub 不认 HF_TOKEN 里的令牌（401）：也许抄漏了、过期了。到 {endpoint()}/settings/tokens 换一个，再运行。"
    if "storage limit" in said or "storage quota" in said or code in (402, 413):
        return (
            f"{name} 的空间满了（{code}）：到 {endpoint()}/settings/billing 看用了多少，删掉不要的仓库。删掉的旧检查点还在"
            f"历史里占着地方，清掉历史：python -c \"from huggingface_hub import HfApi; HfApi().super_squash_history('{name}')\""
        )
    if code == 403:
        return (
            f"令牌是 {user} 的，不许往 {name} 里写（403）：--repo 的前半写自己的名字，例如 {user}/{name.split('/')[-1]}；"
            "写组织的仓库，要组织给权限，令牌也要勾上它。"
        )
    if code in (401, 404):
        return f"hub 上没有 {name}，或令牌（{user} 的）看不到它（{code}）：看 --repo 拼对没有。"
    if code == 412:
        return f"有别的机器也在往 {name} 里推：两台机器不要同时跑同一个 --repo。停掉一台，或换一个名字。"
    if code == 429:
        return "问得太多，hub 要我们歇一会儿（429）：过几分钟再运行同一条命令，或把 --save_steps 写大些。"
    tail = "再运行同一条命令，会从断开的地方接着来。" if is_temporary(error) else ""
    return f"{what}没有成：{short(error)}。{tail}"


def short(error: BaseException) -> str:
    response = getattr(error, "response", None)
    if response is not None:
        return f"hub 回答 {response.status_code}"
    text = " ".join(str(error).split())[:160].rstrip(".。")
    return f"{type(error).__name__}：{text}" if text else type(error).__name__


# ---------------------------------------------------------------- 检查取来的，整理要推的


def broken_file(folder: Path) -> str | None:
    """与 sha256.json 对不上的文件；都对是 None。"""
    try:
        hashes = json.loads((folder / HASHES).read_text(encoding="utf-8"))
        wanted = dict(hashes).items()
    except (OSError, ValueError, TypeError):
        return HASHES
    for name, sha256 in wanted:
        path = folder / name
        if not path.is_file() or file_sha256(path) != sha256:
            return name
    return None


def refuse_code(folder: Path, name: str) -> None:
    """检查点里的 .pkl 是 pickle，读它就可能运行别人的代码：先只当数据读一遍，读不成的不用。

    接着训练时，accelerate 读学习率的那一个不只当数据读，所以这一遍不能省。
    """
    from accelerate.utils import load  # 默认 weights_only=True，只许张量、数、numpy 的随机数状态

    for path in sorted([*folder.rglob("*.pkl"), *folder.rglob("*.bin")]):
        try:
            load(path, map_location="cpu")
        except Exception as error:  # 里面有代码、文件坏了：都不用
            raise UserError(
                f"{name} 的 {folder.name}/{path.name} 里不只是数据（{type(error).__name__}），读它可能会运行别人的代码，不用它。"
                "仓库是你的吗？不是，就不要接着它训练；是，换掉令牌，再用 --repo 换一个名字从头来。"
            ) from error


def weights_id(folder: Path) -> str:
    """权重的编号，与 run.json 里的 id 算法相同。"""
    hashes = [file_sha256(path) for path in sorted(folder.glob("*.safetensors"))]
    return hashlib.sha256("".join(hashes).encode()).hexdigest()[:16]


def snapshot(folder: Path, target: Path) -> Path | None:
    """给检查点拍一张照：硬链接，不花空间；训练删掉旧的，正在推的也不受影响。正好被删了是 None。"""
    shutil.rmtree(target, ignore_errors=True)
    try:
        shutil.copytree(folder, target, copy_function=link_or_copy)
    except (OSError, shutil.Error):
        shutil.rmtree(target, ignore_errors=True)
        if folder.exists():
            raise
        return None
    return target if (target / CHECKPOINT_DONE).exists() else None


def link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # 不支持硬链接的盘
        shutil.copy2(source, target)


def shareable(path: Path) -> bytes:
    return as_json(without_paths(json.loads(path.read_text(encoding="utf-8"))))


STARTS = re.compile(r"(?:~|\.{1,2}|[A-Za-z]:)?[/\\](?![/\\])")
PLACE = re.compile(r"(?<![\w:/.\\~])(?:~|\.{1,2}|[A-Za-z]:)?(?:[/\\][^\s/\\'\"]+)*[/\\]([^\s/\\'\"]+)")


def without_paths(value: Any) -> Any:
    """运行记录里，本机的路径（里面有用户名）只留最后一段；hub 上的名字、网址照旧。"""
    if isinstance(value, str):
        is_path = STARTS.match(value) and " --" not in value  # 一整个路径：里面可以有空格
        return re.split(r"[/\\]", value.rstrip("/\\"))[-1] if is_path else PLACE.sub(r"\1", value)
    if isinstance(value, list):
        return [without_paths(each) for each in value]
    if isinstance(value, dict):
        return {key: without_paths(each) for key, each in value.items()}
    return value


def as_json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, indent=2).encode()


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def read_bytes(data: Path | bytes) -> bytes:
    return data if isinstance(data, bytes) else data.read_bytes()


def sha256_of(data: Path | bytes) -> str:
    return hashlib.sha256(data).hexdigest() if isinstance(data, bytes) else file_sha256(data)


def git_sha1(data: Path | bytes) -> str:
    content = read_bytes(data)
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
