"""运行 Qwen 链的一个阶段，像读者在终端里那样：另开一个进程，结果是一个文件夹，里面有 run.json。

alignment_ops 不另写训练：SFT、DPO、KTO 都是 qwen_chinese_finetune 里的那几个脚本，这里只管把数据交给它们。
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from filelock import FileLock, Timeout

from nlp_common.base.errors import UserError
from nlp_common.base.processes import without_launcher
from nlp_common.base.runs import load_run, write_text

QWEN = Path(__file__).resolve().parents[1] / "qwen_chinese_finetune"
SCRIPTS = {"sft": "sft_chinese_qwen.py", "dpo": "dpo_chinese_qwen.py", "kto": "kto_alignment.py"}
LAST_LINES = 12  # 没有跑完时，显示输出的最后几行


def run_stage(
    stage: str,
    out: Path,
    model: str | Path,
    dataset: str | Path,
    preset: str = "tiny",
    threads: int | None = None,
    **settings: object,
) -> dict:
    """从 model 开始在 dataset（内置名、hub 名或文件）上训练一个阶段，结果在 out；返回它的 run.json。

    settings：那个脚本的别的参数，例如 ``learning_rate=1e-4``；threads：用几个核，几个一起训练时各用一个。
    已有同样设置的结果就直接用；中断了再来一次，接着训练。
    输出写进 ``<out>.log``；没有跑完是 UserError，带上输出的最后几行。
    """
    script = QWEN / SCRIPTS[stage]
    command = [sys.executable, str(script), "--preset", preset, "--output_dir", str(out)]
    command += ["--model", str(model), "--dataset", str(dataset)]
    for name, value in settings.items():
        command += [f"--{name}", str(value)]
    run_command(f"{stage} 没有训练成", command, out.with_name(f"{out.name}.log"), threads)
    run = load_run(out)
    assert run is not None, f"{script.name} 结束了，却没有 {out}"
    return run


def write_rows(path: Path, rows: list[dict]) -> Path:
    """一行一个 JSON，给 run_stage 的 dataset；返回 path。"""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def run_command(failed: str, command: list[str], log: Path, threads: int | None = None) -> None:
    """另开一个进程，输出写进 log；没有跑完是 UserError，以 failed 开头，带上输出的最后几行。"""
    environment = without_launcher() | {"PYTHONIOENCODING": "utf-8"}
    if threads:
        environment["OMP_NUM_THREADS"] = str(threads)
    log.parent.mkdir(parents=True, exist_ok=True)
    out, code = Path(command[command.index("--output_dir") + 1]), None
    while code is None or (code == 2 and in_use(out)):  # 上次被杀掉的流程开的进程，可能正抢在前面
        wait_until_free(out)
        with log.open("w", encoding="utf-8") as file:
            code = subprocess.run(
                command,
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
            ).returncode
    if code in (130, -2):
        raise KeyboardInterrupt
    if code:
        said = "\n  ".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-LAST_LINES:])
        raise UserError(f"{failed}（退出码 {code}），全部输出在 {log}，最后几行：\n  {said}")


def wait_until_free(out: Path) -> None:
    """out 正被别的进程写着就等：流程被 kill -9 时，它开的进程还在做，做完的结果正好用上。"""
    if in_use(out):
        print(f"还有一个进程在写 {out.name}（多半是上次被杀掉的流程开的），等它做完。")
        with _lock_of(out):
            pass


def in_use(out: Path) -> bool:
    try:
        with _lock_of(out).acquire(timeout=0):
            return False
    except Timeout:
        return True


def _lock_of(out: Path) -> FileLock:
    """open_run 锁结果文件夹用的那一把。"""
    return FileLock(out.with_name(f".{out.name}.lock"))
