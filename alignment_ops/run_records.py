"""运行记录：找到它们，沿着 parent 往上走，看数据与权重还是不是那时的。

一次训练的 run.json 里有：用了哪些数据（sha256）、从哪个模型开始（上一次的编号）、每个设置、哪个脚本与提交、各库的版本、几个线程。
文件夹删了，``--report_to jsonl`` 记下的那一份还在。
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from nlp_common.base.errors import UserError
from nlp_common.base.measurements import ROOT
from nlp_common.base.runs import RUN_FILE, file_sha256, load_run
from nlp_common.data.rows import data_sha256
from nlp_common.train.track_to import read_jsonl
from nlp_common.train.tracking import tracking_folder

PATTERNS = ("*/outputs/*/*/run.json", "*/outputs/*/*/*/run.json", "*/*_bert_model*/run.json")
DATA_FIELDS = ("dataset", "eval_dataset", "third_dataset")  # 设置里是数据的几项


@dataclass(frozen=True)
class Run:
    record: dict
    folder: Path | None  # None：只有记录，文件夹没有了

    @property
    def id(self) -> str:
        return self.record["id"]

    @property
    def title(self) -> str:
        return f"{self.record['stage']} {self.id[:8]}"


# ---------------------------------------------------------------- 1. 找到运行记录


def find_runs(folder: Path | None = None) -> list[Run]:
    """仓库里的（folder：再加上它里面的）全部结果，加上只剩下记录的；同一个编号只要一个，先要文件夹还在的。"""
    files = [path for pattern in PATTERNS for path in ROOT.glob(pattern)]
    files += sorted(folder.glob("**/run.json")) if folder else []
    found: dict[tuple[str, str], Run] = {}
    for path in files:
        if any(part.startswith(".") for part in path.parent.relative_to(path.anchor).parts[-4:]):
            continue  # 正在训练的工作文件夹
        run = _read(path.parent)
        if run:
            found.setdefault((run.record["stage"], run.id), run)
    for run in recorded_runs():
        found.setdefault((run.record["stage"], run.id), run)
    return list(found.values())


def _read(folder: Path) -> Run | None:
    try:
        record = load_run(folder)
    except UserError:
        return None  # 写坏了的：列的时候不管它，点名要它时会说
    return Run(record, folder) if record and {"stage", "id"} <= record.keys() else None


def recorded_runs() -> list[Run]:
    """``--report_to jsonl`` 记下的，训练完了的那些。"""
    runs = []
    for path in sorted((tracking_folder() / "jsonl").glob("*.jsonl")):
        for row in read_jsonl(path):
            if row.get("event") == "finish" and {"stage", "id"} <= row["run"].keys():
                runs.append(Run(row["run"], None))
    return runs


def find_run(name: str, runs: list[Run]) -> Run:
    """读者说的一次：文件夹，或编号的开头几位。"""
    folder = Path(name).expanduser()
    if folder.is_dir():
        record = load_run(folder)  # 没有 run.json 是 UserError
        if record is None or not {"stage", "id"} <= record.keys():
            raise UserError(f"{folder} 的 {RUN_FILE} 里没有 stage 与 id，不是这里训练的。")
        return Run(record, folder.resolve())
    matches = [run for run in runs if run.id.startswith(name)] if len(name) >= 4 else []
    if len(matches) == 1:
        return matches[0]
    if matches:
        shown = "、".join(run.title for run in matches)
        raise UserError(f"{name} 开头的不止一次：{shown}。多写几位，或写文件夹。")
    raise UserError(
        f"没有 {name} 这个文件夹，也没有编号以它开头的运行（至少写四位）。有哪些：python version_tracking.py list"
    )


# ---------------------------------------------------------------- 2. 现在还是不是那时的


def check_weights(folder: Path, record: dict) -> str:
    """权重与 run.json 里的编号对不对得上；对得上是空的，不然一句话。"""
    weights = sorted(folder.glob("*.safetensors"))
    number = hashlib.sha256("".join(file_sha256(path) for path in weights).encode()).hexdigest()[:16]
    return "" if number == record["id"] else "权重不是训练出来的那一份（sha256 不同）"


def data_places(record: dict) -> dict[str, tuple[Path, str]]:
    """用到的本地数据 → ``{设置里的名字: (路径, 那时的 sha256)}``；相对的路径从那时的文件夹算起。"""
    found = {}
    for name in DATA_FIELDS:
        recorded = record["fingerprint"].get(f"{name}_sha256")
        if recorded:
            path = Path(record["fingerprint"][name]).expanduser()
            found[name] = Path(record.get("directory", ".")) / path, recorded
    return found


def check_data(path: Path, recorded: str) -> str:
    """数据文件还是不是那时的；是就是空的，不然一句话。"""
    now = data_sha256(str(path))
    if now is None:
        return "文件没有了"
    return "" if now == recorded else f"文件改过了（那时 {recorded[:8]}，现在 {now[:8]}）"


# ---------------------------------------------------------------- 3. 沿着 parent 往上走


@dataclass
class Node:
    """家谱里的一次训练：fault 是空的，就是一切还与那时一样。"""

    field: str  # 它是下面那一次的哪一样：model、reward_model
    title: str
    run: Run | None
    fault: str
    data: list[tuple[str, str]]  # (说明, 出了什么错)
    parents: list[Node]


def lineage(run: Run, runs: list[Run], field: str = "") -> Node:
    fault = check_weights(run.folder, run.record) if run.folder else "文件夹没有了，只有记录"
    parents = []
    for name, parent in run.record.get("parent", {}).items():
        found, problem = find_parent(parent, runs)
        if found is None:
            parents.append(Node(name, f"{parent['stage']} {parent['id'][:8]}", None, problem, [], []))
        else:
            node = lineage(found, runs, name)
            node.fault = problem or node.fault
            parents.append(node)
    return Node(field, run.title, run, fault, data_of(run.record), parents)


def find_parent(parent: dict, runs: list[Run]) -> tuple[Run | None, str]:
    """→ (上一次, 出了什么错)。先看那时的文件夹，它里面已经是另一次训练的，就按编号去找。"""
    there = _read(Path(parent["path"])) if Path(parent["path"]).is_dir() else None
    if there and there.id == parent["id"]:
        return there, ""
    same = [run for run in runs if run.id == parent["id"]]
    taken = f"{parent['path']} 里现在是另一次训练的（{there.id[:8]}）" if there else ""
    if same:
        return same[0], taken  # 权重一样的另一份，或只剩下记录
    return None, taken or f"找不到：{parent['path']} 没有了，记录里也没有"


def data_of(record: dict) -> list[tuple[str, str]]:
    """各份数据的说明，与出了什么错；自带的、网上的只说明。"""
    places = data_places(record)
    rows = []
    for name, source in record.get("data", {}).items():
        if not isinstance(source, dict):
            continue
        field = {"train": "dataset", "eval": "eval_dataset"}.get(name, name)
        label = re.sub(r"^\S*/", "", str(source.get("name", "")))  # 路径只写最后一段
        count = "" if "行" in label else f" {source.get('rows', 0):,} 行"
        text = f"{name} {label}{count} {(source.get('sha256') or '')[:8]}"
        rows.append((text.rstrip(), check_data(*places[field]) if field in places else ""))
    return rows


def faults(node: Node) -> list[str]:
    """一棵家谱里与那时不一样的：``["sft 3e86…：文件夹没有了", …]``。"""
    found = [f"{node.title}：{node.fault}"] if node.fault else []
    found += [f"{node.title} 的数据 {text}：{fault}" for text, fault in node.data if fault]
    for parent in node.parents:
        found += faults(parent)
    return found


def show_lineage(node: Node, indent: str = "") -> None:
    """画成一棵树：下面一层是它的数据，和它从哪里来。"""
    what = f"↑ {node.field}：" if node.field else ""
    print(f"{indent}{what}{node.title}{'' if not node.fault else f'  ✗ {node.fault}'}")
    if node.run and node.run.folder:
        print(f"{indent}  {_short(node.run.folder)}")
    for text, fault in node.data:
        print(f"{indent}  数据 {text}{'' if not fault else f'  ✗ {fault}'}")
    for parent in node.parents:
        show_lineage(parent, indent + "  ")


def _short(path: Path) -> str:
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else str(path)
