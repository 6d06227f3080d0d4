"""量到的数记成数据：docs/measurements/<主题>.jsonl，一个数一行。README 里的表由它填（docs/readme_numbers.py）。

    record("qwen", {"sft.qa_accuracy": 1.0, "sft.seconds": 33.0}, seed=0)

同名、同种子的一行换成新的，别的不动。一行是：name、value、unit、seed、command、commit、processor、date。
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from nlp_common.base.errors import UserError
from nlp_common.base.processes import is_main
from nlp_common.base.runs import without_password, write_text

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "docs" / "measurements"
FIELDS = ("name", "value", "unit", "seed", "command", "commit", "processor", "date")
NAME = re.compile(r"[^\s{}@:/()|`]+")  # 没有空格，没有模板和表格里有意思的字

# 名字的最后一段以什么结尾 → 单位；排在前面的先认
UNITS = (
    ("samples_per_s", "rows/s"),
    ("rows_per_s", "rows/s"),
    ("tokens_per_s", "tokens/s"),
    ("episodes_per_s", "answers/s"),
    ("completions_per_s", "answers/s"),
    ("sentences_per_s", "sentences/s"),
    ("same_seconds", "fraction"),  # accuracy_sft_same_seconds：同样秒数的正确率
    ("seconds", "s"),
    ("_s", "s"),
    ("memory_mb", "MB"),
    ("memory_gb", "GB"),
    ("accuracy", "fraction"),
    ("rate", "fraction"),
    ("f1", "fraction"),
    ("judge_score", "fraction"),
    ("loss_over_floor", "ratio"),
    ("ratio", "ratio"),
    ("loss", "nats"),
    ("mean_chars", "chars"),
    ("bits_per_char", "bits/char"),
    ("kl_to_sft", "nats/token"),
    ("entropy_floor", "nats/token"),
)


# ---------------------------------------------------------------- 一行里的各项


def git(*arguments: str) -> str:
    """git 命令的输出；这里不是本仓库的工作副本时是 UserError。"""
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(
            f"记下量到的数要知道是哪个提交，而 {ROOT} 不是 git 的工作副本。"
            "用 git clone 下来的仓库再运行，或去掉 --record。"
        ) from error
    return done.stdout.strip()


def current_commit() -> str:
    """现在的提交；代码与它不同时末尾加 +。文档（docs/ 与 README）不算：每记一次它们都会变。"""
    if Path(git("rev-parse", "--show-toplevel")).resolve() != ROOT:
        raise UserError(
            f"{ROOT} 在别的 git 仓库里，不是本仓库的工作副本：记不下量到的数。去掉 --record 再运行。"
        )
    changed = git("diff", "--name-only", "HEAD", "--", ".", ":!docs", ":!*.md")
    return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")


def processor() -> str:
    """量的机器，例如 ``Intel Xeon Processor，2 核，AVX512``；用了加速器就是它的名字。"""
    torch = sys.modules.get("torch")  # 没有导入它的程序，不为了这一项去导入
    if torch and torch.accelerator.is_available():
        from nlp_common.base.device import describe, pick_device

        return describe(pick_device())
    model, flags = platform.processor() or platform.machine(), ""
    if Path("/proc/cpuinfo").exists():
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        if found := re.search(r"^model name\s*: (.*)", text, re.MULTILINE):
            model = found[1].replace("(R)", "").replace("(TM)", "")
        if found := re.search(r"^flags\s*: (.*)", text, re.MULTILINE):
            flags = f" {found[1]} "
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = torch.get_num_threads() if torch else int(os.environ.get("OMP_NUM_THREADS") or cores)
    parts = [" ".join(model.split()), f"{min(cores, threads)} 核"]
    for flag, label in ((" avx512f ", "AVX512"), (" avx2 ", "AVX2")):
        if flag in flags:
            parts.append(label)
            break
    if " avx512_bf16 " in flags or " amx_bf16 " in flags:
        parts.append("bf16")
    return "，".join(parts)


def current_command() -> str:
    """正在运行的命令，照读者在仓库最上层会写的样子：没有本机的路径，没有 --record，没有仓库外的 --output_dir。"""
    words, skip = ["python", _short(str(Path(sys.argv[0]).resolve()))], False
    for place, word in enumerate(sys.argv[1:], 1):
        name, equals, value = word.partition("=")
        after = sys.argv[place + 1] if place + 1 < len(sys.argv) else ""
        if skip:
            skip = False
        elif name == "--record" or (name == "--output_dir" and _outside(value if equals else after)):
            skip = not equals and not after.startswith("--")
        else:
            words.append(f"{name}={_short(value)}" if equals else _short(word))
    return shlex.join(words)


def _outside(text: str) -> bool:
    return Path(text).is_absolute() and not Path(text).is_relative_to(ROOT)


def _short(text: str) -> str:
    """仓库里的路径从仓库最上层写起，别处的绝对路径只留最后一段；网址里的密码不写。"""
    path = Path(text)
    if not path.is_absolute():
        return without_password(text)
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name


def unit_of(name: str) -> str:
    """由名字看单位，先看最后一段；认不出就是空的。"""
    for part in reversed(name.split(".")):
        if part.startswith("times_"):
            return "ratio"
        for ending, unit in UNITS:
            if part.removesuffix("_before").endswith(ending):
                return unit
    return ""


def numbers_in(values: dict, prefix: str = "") -> dict[str, float]:
    """嵌套的字典 → ``{"a.b": 数}``；不是数的（文字、列表、真假、None）不要。"""
    found: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            found |= numbers_in(value, f"{prefix}{name}.")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            found[f"{prefix}{name}"] = value
    return found


# ---------------------------------------------------------------- 读与写


def load_rows(topic: str) -> list[dict]:
    path = FOLDER / f"{topic}.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def save_rows(topic: str, new: list[dict], keep: Callable[[dict], bool] | None = None) -> int:
    """新的几行并进文件：同名、同种子的换掉；按名字、种子排好，改了什么一看 diff 就知道。

    keep 说留不留这一行，没给就都留；返回去掉了几行。
    """
    FOLDER.mkdir(parents=True, exist_ok=True)
    lock = Path(git("rev-parse", "--absolute-git-dir")) / "measurements.lock"
    with FileLock(lock):  # 两个种子可以同时跑，各用一个核
        rows = {(row["name"], row["seed"]): row for row in load_rows(topic) + new}
        kept = {key: row for key, row in rows.items() if keep is None or keep(row)}
        order = sorted(kept, key=lambda key: (key[0], -1 if key[1] is None else key[1]))
        lines = [
            json.dumps({field: kept[key][field] for field in FIELDS}, ensure_ascii=False) for key in order
        ]
        write_text(FOLDER / f"{topic}.jsonl", "".join(f"{line}\n" for line in lines))
    return len(rows) - len(kept)


def record(
    topic: str,
    values: dict,
    *,
    unit: str | dict[str, str] | None = None,
    seed: int | None = None,
    command: str | None = None,
) -> None:
    """把 values 里的数记进 docs/measurements/<topic>.jsonl，名字前面加上主题。

    unit：都用这一个单位，或 {名字的最后一段: 单位}；没给的由名字看。command：默认是正在运行的这一条。
    """
    if not is_main():
        return
    found = numbers_in(values)
    if wrong := [name for name in [topic, *found] if not NAME.fullmatch(str(name))]:
        raise UserError(f"名字里有不能用的字：{'、'.join(wrong)}。不能有空格、括号，也不能有 @ : / |。")
    same = {"command": command or current_command(), "commit": current_commit(), "processor": processor()}
    same["date"] = time.strftime("%Y-%m-%d")
    rows = []
    for name, value in found.items():
        its_unit = unit if isinstance(unit, str) else (unit or {}).get(name.rsplit(".", 1)[-1], unit_of(name))
        row = {"name": f"{topic}.{name}", "value": _rounded(value), "unit": its_unit, "seed": seed}
        rows.append(row | same)
    save_rows(topic, rows)
    print(f"记下 {len(rows)} 个数：docs/measurements/{topic}.jsonl（make numbers-fill 填进 README）")


def _rounded(value: float) -> float:
    """六位小数；很小的数（float64 的误差，1e-16 上下）留三位有效数字，不写成 0。"""
    return round(value, 6) if value == 0 or abs(value) >= 1e-4 else float(f"{value:.3g}")


def split_prefix(prefix: str) -> tuple[str, str]:
    """``sentiment.reviews`` → ``("sentiment", "reviews")``：主题，其余是各个数的名字的开头。

    写错了、这里不是 git 的工作副本，是 UserError：训练之前先试一次，不必等训练完才知道。
    """
    topic, _, rest = prefix.partition(".")
    if not rest or not NAME.fullmatch(prefix):
        raise UserError(f"--record 要写成 主题.名字，例如 sentiment.reviews，给的是 {prefix!r}。")
    current_commit()
    return topic, rest


def record_run(prefix: str, run: dict) -> None:
    """把一次训练的 run.json 记下来：用时、内存、各项指标。prefix 是 --record 后面写的。"""
    topic, rest = split_prefix(prefix)
    values = {"seconds": run["seconds"], "peak_memory_mb": run.get("peak_memory_mb"), **run["metrics"]}
    record(topic, numbers_in(values, f"{rest}."), seed=run["settings"]["seed"])
