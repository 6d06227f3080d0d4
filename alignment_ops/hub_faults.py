"""往 hub 上推的时候会出的十种错，各说什么：一件一件真的弄出来，对着本机的 hub。

怎么运行
  python hub_faults.py                    # 几秒钟，不联网，不要账号
  python hub_faults.py --out faults.json  # 另存一份

应当看到：十句话，每句说清出了什么事、怎么办；没有一句是英文的 traceback，也没有一句带着令牌。
"""

from nlp_common.base.cli import run_main

import os
import pickle
import secrets
import tempfile
from dataclasses import dataclass
from pathlib import Path

from hub_repo import open_repo, refuse_code
from nlp_common.base.arguments import option, parse_arguments
from nlp_common.base.errors import UserError
from nlp_common.base.runs import CHECKPOINT_DONE, write_json
from nlp_common.hub.local_hub import LocalHub

# 每次现造，不写进任何文件
TOKEN, READ_ONLY = f"hf_{secrets.token_hex(16)}", f"hf_{secrets.token_hex(16)}"


@dataclass
class FaultSettings:
    out: str | None = option("把十句话存成 json")


# ---------------------------------------------------------------- 十种错：hub 是刚开的本机的 hub，work 是空的文件夹


def no_token(hub: LocalHub, work: Path) -> None:
    del os.environ["HF_TOKEN"]
    open_repo("learner/dpo")


def wrong_token(hub: LocalHub, work: Path) -> None:
    os.environ["HF_TOKEN"] = TOKEN[:-1]
    open_repo("learner/dpo")


def read_only_token(hub: LocalHub, work: Path) -> None:
    os.environ["HF_TOKEN"] = READ_ONLY
    open_repo("learner/dpo")


def somebody_elses(hub: LocalHub, work: Path) -> None:
    open_repo("somebody/dpo")


def no_network(hub: LocalHub, work: Path) -> None:
    os.environ["HF_ENDPOINT"] = "http://127.0.0.1:9"  # 没有人听的端口
    open_repo("learner/dpo")


def no_space(hub: LocalHub, work: Path) -> None:
    hub.quota = 100
    open_repo("learner/dpo").push_checkpoint(a_checkpoint(work, 1))


def other_contents(hub: LocalHub, work: Path) -> None:
    hub.repos["models/learner/mine"] = {"model.safetensors": b"", "README.md": b""}
    hub.private.add("models/learner/mine")
    open_repo("learner/mine").read_note()


def already_public(hub: LocalHub, work: Path) -> None:
    hub.repos["models/learner/open"] = {}
    open_repo("learner/open")


def two_machines(hub: LocalHub, work: Path) -> None:
    one, two = open_repo("learner/dpo"), open_repo("learner/dpo")
    one.read_note()
    two.read_note()
    one.push_checkpoint(a_checkpoint(work, 1))
    two.push_checkpoint(a_checkpoint(work, 2))


def code_inside(hub: LocalHub, work: Path) -> None:
    folder, trace = a_checkpoint(work, 1), work / "the code has run"
    (folder / "custom_checkpoint_0.pkl").write_bytes(pickle.dumps(Evil(trace), 2))
    try:
        refuse_code(folder, "learner/dpo")
    finally:
        assert not trace.exists(), "检查点里的代码运行了"


class Evil:
    """一读就会运行代码的 pickle：这里只是写一个文件。"""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self) -> tuple:
        return Path.touch, (self.trace,)


def a_checkpoint(work: Path, step: int) -> Path:
    folder = work / f"checkpoint-{step}"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"%d" % step * 1000)
    write_json(folder / CHECKPOINT_DONE, {"seconds": 1.0})
    return folder


FAULTS = {
    "no_token": ("没有令牌", no_token),
    "wrong_token": ("令牌抄漏了一位", wrong_token),
    "read_only_token": ("令牌只能读", read_only_token),
    "somebody_elses": ("别人的仓库", somebody_elses),
    "no_network": ("连不上", no_network),
    "no_space": ("空间满了", no_space),
    "other_contents": ("仓库里是别的东西", other_contents),
    "already_public": ("仓库早已公开", already_public),
    "two_machines": ("另一台机器也在推", two_machines),
    "code_inside": ("取来的检查点里有代码", code_inside),
}


# ---------------------------------------------------------------- 一件一件弄出来


def cause(name: str) -> str:
    """弄出一种错，返回它说的话；什么也没说是空的。"""
    before = dict(os.environ)
    with LocalHub({}, users={TOKEN: "learner", READ_ONLY: "learner"}) as hub:
        hub.readers.add(READ_ONLY)
        os.environ |= {"HF_TOKEN": TOKEN, "HF_ENDPOINT": hub.url, "NO_PROXY": "127.0.0.1"}
        try:
            with tempfile.TemporaryDirectory() as work:
                FAULTS[name][1](hub, Path(work))
        except UserError as error:
            return str(error)
        finally:
            os.environ.clear()
            os.environ.update(before)
    return ""


def main(argv: list[str] | None = None) -> dict[str, str]:
    # 这些在导入 huggingface_hub 之前设好才算数：本机的 hub 不会说 Xet；读者设过的离线，这里用不着
    os.environ["HF_HUB_DISABLE_XET"] = "1"
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        os.environ.pop(name, None)
    settings = parse_arguments(FaultSettings, argv)
    out = Path(settings.out).expanduser() if settings.out else None
    if out and (out.is_dir() or not out.absolute().parent.is_dir()):
        raise UserError(f"--out {settings.out} 写不了：它是文件夹，或者它的上一级不是文件夹。")
    said = {}
    for name, (title, _) in FAULTS.items():
        said[name] = cause(name)
        print(f"\n{title}\n  " + said[name].replace("\n", "\n  "))
    if out:
        write_json(out, said)
    return said


if __name__ == "__main__":
    run_main(main)
