"""不是测试文件：测试另开一个进程运行它（不导入 torch，起得快）。

    python killed_workflow.py kill 文件夹      # 一条小的流程，每一次写盘的前、中、后用 SIGKILL 杀掉（或盘满了），再来一遍
    python killed_workflow.py together 文件夹  # 八个进程同时登记、同时发布

最后印一行 JSON：量到的。
"""

import errno
import json
import os
import random
import signal
import sys
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "alignment_ops"))

import line_log
from canary import Canary, run_canary
from nlp_common.base.errors import UserError
from registry import Registry
from traffic import visits
from workflow_state import open_journal

REQUESTS = 150
FULL = 3  # 退出码：盘满了，说清楚了
write = os.write


def make_model(folder: Path, content: str) -> Path:
    """一个做完了的结果文件夹：run.json 与 safetensors（登记簿只看它们的散列）。"""
    import hashlib

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.safetensors").write_text(content, encoding="utf-8")
    digest = hashlib.sha256(content.encode()).hexdigest()
    run = {"id": hashlib.sha256(digest.encode()).hexdigest()[:16], "stage": "dpo", "metrics": {}}
    (folder / "run.json").write_text(json.dumps(run), encoding="utf-8")
    return folder


def workflow(home: Path) -> dict:
    """老的在用，新的登记、灰度、发布，第二天出了事，退回去。"""
    registry = Registry(home / "registry.jsonl")
    with open_journal(home / "journal.jsonl", {"seed": 0}) as journal:
        old = journal.step("old", lambda: registry.register("m", make_model(home / "old", "1")))
        journal.step("old.promote", lambda: registry.promote("m", old))
        folder = journal.step("train", lambda: str(make_model(home / "new", "2")))
        new = journal.step("register", lambda: registry.register("m", folder))
        found = journal.step("canary", lambda: canary(home))
        if found["decision"] != "rollback":
            journal.step("promote", lambda: registry.promote("m", new, over=old, reason="灰度没有退"))
        journal.step("rollback", lambda: registry.rollback("m", new, reason="答非所问"))
    return {
        "found": found,
        "aliases": registry.aliases("m"),
        "events": [(event["event"], event["version"]) for event in registry.history("m")],
        "served": len(line_log.read(home / "canary.jsonl")) - 1,
    }


def canary(home: Path) -> dict:
    rng = random.Random(0)
    table = [[float(rng.random() < 0.2) for _ in range(20)] for _ in range(2)]  # 两边各题坏不坏

    def answer(arm, request):
        return {"unsolved": table[arm == "canary"][request.question]}

    kinds = ["a", "b"] * 10
    return run_canary(
        visits(kinds, REQUESTS, 0), answer, Canary({"unsolved": None}), "m-2", home / "canary.jsonl"
    )


# ---------------------------------------------------------------- 杀


class Killer:
    """第 at 次写盘时杀掉自己：一个字节也没写、写了一半、写完了；或者写了一半时盘满了。"""

    def __init__(self, at: int, when: str):
        self.at, self.when, self.count = at, when, 0

    def __call__(self, descriptor: int, content: bytes) -> int:
        self.count += 1
        if self.count == self.at:
            part = {"before": 0, "after": len(content)}.get(self.when, len(content) // 2)
            write(descriptor, content[:part])
            if self.when == "full":
                raise OSError(errno.ENOSPC, "No space left on device")
            os.kill(os.getpid(), signal.SIGKILL)
        return write(descriptor, content)


def in_child(work) -> int:
    """在子进程里做 work；返回它的退出码（被 SIGKILL 是 -9）。"""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except UserError as error:
            os._exit(FULL if "磁盘满了" in str(error) else 1)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def run_killed(home: Path, killer: Killer) -> int:
    def work() -> None:
        line_log.os.write = killer
        workflow(home)

    return in_child(work)


def run_to_end(home: Path) -> dict:
    def work() -> None:
        (home / "result.json").write_text(json.dumps(workflow(home)), encoding="utf-8")

    assert in_child(work) == 0
    return json.loads((home / "result.json").read_text(encoding="utf-8"))


def kill_everywhere(home: Path) -> dict:
    clean_home = home / "clean"
    clean_home.mkdir(parents=True)
    counter = Killer(0, "never")
    line_log.os.write = counter
    clean = json.loads(json.dumps(workflow(clean_home)))
    line_log.os.write = write
    writes, cases, wrong = counter.count, 0, []
    in_canary = range(10, 10 + REQUESTS)  # 灰度里的各次请求：挑着杀
    for at in range(1, writes + 1):
        if at in in_canary and at % 50 != 0:
            continue
        for when in ("before", "half", "after", "full"):
            place = home / f"{at}-{when}"
            killed = run_killed(place, Killer(at, when))
            result = run_to_end(place)
            again = run_to_end(place)  # 走完了的再来一遍：什么也不多做
            cases += 1
            expected = FULL if when == "full" else -signal.SIGKILL
            if killed != expected or result != clean or again != clean:
                wrong.append((at, when, killed, result))
    every_time = home / "every-time"  # 同一个文件夹，每走几步就被杀一次
    times = 0
    while run_killed(every_time, Killer(40, ("before", "half", "after")[times % 3])) != 0:
        times += 1
    return {
        "writes": writes,
        "cases": cases,
        "wrong": wrong,
        "clean": clean,
        "every_time": run_to_end(every_time) == clean,
        "times_killed": times,
    }


# ---------------------------------------------------------------- 一起来


def together(home: Path) -> dict:
    registry = Registry(home / "registry.jsonl")
    base = registry.register("m", make_model(home / "base", "base"))
    registry.promote("m", base)

    def one(number: int) -> None:
        version = registry.register("m", make_model(home / f"model{number}", f"weights {number}"))
        try:
            registry.promote("m", version, over=base)
        except UserError:
            (home / f"refused{number}").touch()

    children = []
    for number in range(8):
        child = os.fork()
        if child == 0:
            try:
                one(number)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    rows = registry.versions("m")
    return {
        "codes": codes,
        "versions": [row["version"] for row in rows],
        "folders": len({row["folder"] for row in rows}),
        "refused": len(list(home.glob("refused*"))),
        "aliases": registry.aliases("m"),
    }


if __name__ == "__main__":
    how, folder = sys.argv[1], Path(sys.argv[2])
    print(json.dumps({"kill": kill_everywhere, "together": together}[how](folder)))
