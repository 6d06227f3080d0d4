"""模型登记簿：哪个版本在用，从哪里来，怎样退回去。

你会学到
  1. 版本只增不改：登记一次得一个号，号指着一个文件夹和它的权重的编号；文件夹里换了别的权重，用的时候就发现。
  2. 别名会动：champion 是正在用的，challenger 是正在试的。发布是把 champion 指到新的号，回滚是指回上一个，都是在末尾添一行。
  3. 记录只添不改，所以什么时候、为什么换的都在，任何一刻的状态都可以从头算出来（replay）。
  4. 同一件事做两遍与做一遍一样：被 kill -9 打断的流程再来一遍，不会登记出两个版本，也不会回滚两次。

在程序里
  registry = Registry("outputs/tiny/registry.jsonl")
  version = registry.register("assistant", folder, serving={"temperature": 1.0})   # 做完了的结果文件夹（里面有 run.json）→ 1、2、3 …；成了 challenger
  registry.promote("assistant", version, over=2, reason="…")  # → champion；over：是与哪个版本比过的，这时已经换了别的就不发布
  registry.reject("assistant", version, reason="…")           # 没有通过：不再是 challenger
  registry.rollback("assistant", version, reason="…")         # 发布以后出了事：champion 退回上一个，返回它的版本号（没有上一个是 None）
  registry.aliases("assistant")         # {"champion": 3, "challenger": 4}；没有的不在里面
  registry.find("assistant", "champion")  # 那一版：{"version", "folder"（绝对路径）, "id", "status", "stage", "parent", "metrics", …}，权重核对过
  registry.versions("assistant")        # 全部版本；status 是 registered、challenger、champion、retired、rejected、rolled_back
  registry.history("assistant")         # 全部的行，依次

在终端里
  python registry.py                                     # 工作流的登记簿里有什么
  python registry.py --history true                      # 什么时候、为什么换的
  python registry.py --rollback 4 --reason 用户说答非所问    # 退回上一个
  python registry.py --promote 3 --reason 手工换上

参考：MLflow 的 Model Registry（2.9 起用别名，不再用 Staging、Production 那样的阶段）。
"""

from nlp_common.base.cli import run_main

import hashlib
import time
from dataclasses import dataclass
from pathlib import Path

import line_log
from nlp_common.base.arguments import option, parse_arguments
from nlp_common.base.console import padded
from nlp_common.base.errors import UserError
from nlp_common.base.runs import file_sha256, load_run

HOME = Path(__file__).resolve().parent
OURS = HOME / "outputs" / "tiny" / "qwen_alignment_workflow" / "registry.jsonl"
STATUS = {
    "registered": "登记了",
    "challenger": "正在试",
    "champion": "正在用",
    "retired": "用过",
    "rejected": "没通过",
    "rolled_back": "退下的",
}


# ---------------------------------------------------------------- 1. 五件事


class Registry:
    """一个登记簿文件；几个进程可以同时用。每个方法都是：锁住 → 从头算出现在的状态 → 能不能做 → 添一行。"""

    def __init__(self, path: str | Path):
        self.path = Path(path).expanduser().resolve()

    def register(
        self,
        name: str,
        folder: str | Path,
        run: dict | None = None,
        challenge: bool = True,
        serving: dict | None = None,
    ) -> int:
        """登记一个做完了的结果文件夹，返回版本号。同样的权重、文件夹、serving 登记过，就返回那时的号，什么也不添。

        run：它的 run.json（没给就去读）。challenge：同时成为 challenger（原来的 challenger 回到 registered）。
        serving：上线时怎样用它，如 {"temperature": 1.0}。用户见到的是两样合起来，所以改了它就是新的一版。
        """
        folder = Path(folder).expanduser().resolve()
        run = run or load_run(folder)
        if run is None:
            raise UserError(f"没有 {folder}，登记不了：先训练，再登记做完了的结果文件夹。")
        weights = _checked_weights(folder, run["id"], f"{folder} 的 run.json")
        with line_log.updating(self.path) as (events, add):
            known = replay(events, name)["versions"]
            for version, row in known.items():
                same = row["id"] == weights and self._absolute(row["folder"]) == folder
                if same and row.get("serving", {}) == (serving or {}):
                    return version
            version = len(known) + 1
            event = {"event": "register", "name": name, "version": version, "folder": self._relative(folder)}
            event |= {"id": weights, "serving": serving or {}, "challenge": challenge, "time": _now()}
            add(event | {key: run.get(key) for key in ("stage", "parent", "metrics")})
        return version

    def promote(self, name: str, version: int, over: int | None = None, reason: str = "") -> None:
        """把 champion 指到 version。over：它是与哪个版本比过、比它好的；现在的 champion 已经不是那个，比的就作废了。"""
        row = self.find(name, version)  # 权重坏了的不发布
        with line_log.updating(self.path) as (events, add):
            state = replay(events, name)
            champion = state["champions"][-1] if state["champions"] else None
            if champion == version:
                return
            if state["versions"][version]["status"] == "rolled_back":
                raise UserError(
                    f"{name} 第 {version} 版是退下来的，不能再发布：改好了，作为新的一版登记（{row['folder']}）。"
                )
            if over is not None and champion != over:
                raise UserError(
                    f"{name} 第 {version} 版是与第 {over} 版比的，而现在正在用的已经是第 {champion} 版：没有发布。与第 {champion} 版再比一次。"
                )
            add(_event("promote", name, version, reason))

    def reject(self, name: str, version: int, reason: str = "") -> None:
        """没有通过：不再是 challenger。正在用的不能这样去掉（用 rollback）。"""
        with line_log.updating(self.path) as (events, add):
            row = _one(replay(events, name), name, version, self.path)
            if row["status"] == "champion":
                raise UserError(f"{name} 第 {version} 版正在用：要换下它，用 rollback。")
            if row["status"] != "rejected":
                add(_event("reject", name, version, reason))

    def rollback(self, name: str, version: int | None = None, reason: str = "") -> int | None:
        """champion 退回它的上一个，返回退回到的版本号；没有上一个是 None（就没有 champion 了）。

        version：要换下的那一版（没给就是现在的 champion）。已经换下了，就什么也不做：再说一遍不会多退一版。
        要退回的那一版自己坏了（文件没了），不退，是 UserError。
        """
        with line_log.updating(self.path) as (events, add):
            state = replay(events, name)
            champions = state["champions"]
            if version is None and not champions:
                raise UserError(f"{name} 现在没有正在用的版本，没有什么可退。")
            version = champions[-1] if version is None else version
            status = _one(state, name, version, self.path)["status"]
            if status == "rolled_back":
                return champions[-1] if champions else None
            if status != "champion":
                raise UserError(
                    f"{name} 第 {version} 版不是正在用的（{STATUS[status]}），不用退；正在用的是第 {champions[-1] if champions else '（没有）'} 版。"
                )
            if len(champions) > 1:
                back_to = state["versions"][champions[-2]]
                _checked_weights(
                    self._absolute(back_to["folder"]), back_to["id"], f"要退回的第 {champions[-2]} 版"
                )
            add(_event("rollback", name, version, reason))
            return champions[-2] if len(champions) > 1 else None

    # ------------------------------------------------------------ 只看，不写

    def find(self, name: str, which: int | str) -> dict:
        """一个版本（版本号，或 champion、challenger），folder 是绝对路径；文件夹没了、权重不是登记时的，是 UserError。"""
        state = replay(line_log.read(self.path), name)
        if isinstance(which, str):
            version = _aliases(state).get(which)
            if version is None:
                raise UserError(f"{self.path} 里，{name} 现在没有 {which}。")
            which = version
        row = _one(state, name, which, self.path)
        folder = self._absolute(row["folder"])
        _checked_weights(folder, row["id"], f"登记簿里 {name} 的第 {which} 版")
        return row | {"folder": folder}

    def aliases(self, name: str) -> dict[str, int]:
        return _aliases(replay(line_log.read(self.path), name))

    def versions(self, name: str) -> list[dict]:
        return list(replay(line_log.read(self.path), name)["versions"].values())

    def history(self, name: str) -> list[dict]:
        events = line_log.read(self.path)
        replay(events, name)  # 坏了的不给
        return [event for event in events if event["name"] == name]

    def names(self) -> list[str]:
        return list(dict.fromkeys(event.get("name", "") for event in line_log.read(self.path)))

    def _relative(self, folder: Path) -> str:
        """登记簿所在文件夹里的写相对路径：整个文件夹搬走，登记簿还能用。"""
        inside = folder.is_relative_to(self.path.parent)
        return folder.relative_to(self.path.parent).as_posix() if inside else str(folder)

    def _absolute(self, folder: str) -> Path:
        return (self.path.parent / folder).resolve()


# ---------------------------------------------------------------- 2. 从头算出现在的状态


def replay(events: list[dict], name: str) -> dict:
    """把记录从头走一遍 → {"versions": {号: 那一版}, "champions": [依次用过、没有退下的]}。最后一个 champion 是正在用的。"""
    versions: dict[int, dict] = {}
    champions: list[int] = []
    for line, event in enumerate(events, 1):
        if missing := {"event", "name", "version"} - event.keys():
            raise UserError(
                f"登记簿第 {line} 行缺 {'、'.join(sorted(missing))}：是手工改过的，从备份取回这个文件。"
            )
        if event["name"] != name:
            continue
        number = event["version"]
        if event["event"] != "register" and number not in versions:
            raise UserError(
                f"登记簿第 {line} 行说的 {name} 第 {number} 版没有登记过：少了几行，从备份取回这个文件。"
            )
        if event["event"] == "register":
            versions[number] = {**event, "status": "registered"}
            if event["challenge"]:
                for row in versions.values():
                    row["status"] = "registered" if row["status"] == "challenger" else row["status"]
                versions[number]["status"] = "challenger"
        elif event["event"] == "promote":
            if champions:
                versions[champions[-1]]["status"] = "retired"
            champions.append(number)
            versions[number]["status"] = "champion"
        elif event["event"] == "reject":
            versions[number]["status"] = "rejected"
        elif event["event"] == "rollback":
            champions = [each for each in champions if each != number]
            versions[number]["status"] = "rolled_back"
            if champions:
                versions[champions[-1]]["status"] = "champion"
    return {"versions": versions, "champions": champions}


def _aliases(state: dict) -> dict[str, int]:
    found = {"champion": state["champions"][-1]} if state["champions"] else {}
    for number, row in state["versions"].items():
        if row["status"] == "challenger":
            found["challenger"] = number
    return found


def _one(state: dict, name: str, version: int, path: Path) -> dict:
    if version not in state["versions"]:
        known = "、".join(str(each) for each in state["versions"]) or "一个也没有"
        raise UserError(f"{path} 里没有 {name} 的第 {version} 版；登记了的：{known}。")
    return state["versions"][version]


def _event(kind: str, name: str, version: int, reason: str) -> dict:
    return {"event": kind, "name": name, "version": version, "reason": reason, "time": _now()}


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S")


def _checked_weights(folder: Path, recorded: str, who: str) -> str:
    """文件夹里权重的编号（与 run.json 的 id 同一个算法）；与记着的不同是 UserError。"""
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise UserError(f"{who} 要的权重不在 {folder} 里了：从备份取回来，或换一个版本。")
    found = hashlib.sha256("".join(file_sha256(path) for path in weights).encode()).hexdigest()[:16]
    if found != recorded:
        raise UserError(
            f"{folder} 里的权重（{found}）不是 {who} 记着的（{recorded}）：登记以后重新训练过，或文件坏了。"
            "把原来的取回来；或者把现在的作为新的一版登记。"
        )
    return found


# ---------------------------------------------------------------- 3. 给人用


@dataclass
class RegistrySettings:
    registry: str | None = option("登记簿的文件；默认是工作流的那一本（tiny 预设）")
    name: str | None = option("哪个模型；登记簿里只有一个时不用写")
    history: bool = option("列出全部记录，不只是现在的状态", False)
    promote: int | None = option("把这一版换上")
    rollback: int | None = option("把正在用的这一版退下，换回上一个")
    reason: str = option("为什么，记在登记簿里", "")


def main(argv: list[str] | None = None) -> None:
    settings = parse_arguments(RegistrySettings, argv)
    registry = Registry(settings.registry or OURS)
    names = registry.names()
    if not names:
        raise UserError(
            f"{settings.registry or registry.path} 里还什么也没有登记：先运行 qwen_alignment_workflow.py。"
        )
    if settings.name is None and len(names) > 1:
        raise UserError(f"登记簿里有几个模型，用 --name 说是哪个：{'、'.join(names)}。")
    name = settings.name or names[0]
    if name not in names:
        raise UserError(f"登记簿里没有 {name}；有的是：{'、'.join(names)}。")
    if settings.promote is not None and settings.rollback is not None:
        raise UserError("--promote 和 --rollback 一次只能做一样。")
    if settings.promote is not None:
        registry.promote(name, settings.promote, reason=settings.reason)
    if settings.rollback is not None:
        registry.rollback(name, settings.rollback, settings.reason)
    if settings.history:
        show_history(registry.history(name))
    else:
        show_versions(name, registry.versions(name))


def show_versions(name: str, versions: list[dict]) -> None:
    print(f"{name}：{len(versions)} 个版本")
    print(f"  {padded('版本', 6)}{padded('状态', 10)}{padded('登记', 21)}{padded('权重', 18)}文件夹")
    for row in versions:
        state = STATUS[row["status"]]
        print(f"  {row['version']:<6}{padded(state, 10)}{row['time']:<21}{row['id']:<18}{row['folder']}")


def show_history(events: list[dict]) -> None:
    verbs = {"register": "登记", "promote": "发布", "reject": "没通过", "rollback": "回滚"}
    for event in events:
        print(
            f"  {event['time']}  {padded(verbs[event['event']], 8)}第 {event['version']} 版  {event.get('reason', '')}"
        )


if __name__ == "__main__":
    run_main(main)
