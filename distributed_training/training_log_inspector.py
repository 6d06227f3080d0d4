"""看一份训练日志：哪里不对、从第几步起、多半为什么、怎么办；日志里没有记的，说出来看不了。

学到什么：损失的尖峰怎样从噪声里认出来（滑动中位数 + MAD）；裁剪的比例、每秒多少 token、MFU 怎样算；
"数据喂重了"没有写在日志里，也能从损失的起伏里看出来（自相关）。先在埋了毛病的小训练上考它自己，再看你的日志。

运行：
    python training_log_inspector.py                               # 考试：九样毛病各埋几次，加上十次没有毛病的
    python training_log_inspector.py --log ../qwen_chinese_finetune/outputs/tiny/sft
    python training_log_inspector.py --log 我的训练/ --model 我的模型/ --length 4096 --gpu h100 --n_gpus 8
    python training_log_inspector.py --log train.log --page 体检.html

预期输出（实测见本文件夹的 README.md）：埋下的都找到，没有毛病的一次也不报；MFU 与 torch 的计数器相同。

参考：Chowdhery et al. 2022（PaLM：MFU、跳过尖峰）；Iglewicz & Hoaglin 1993（用 MAD 的 z）。
读日志在 log_readers.py，MFU 在 step_flops.py，网页在 log_page.py，埋毛病在 planted_runs.py。
"""

from nlp_common.base.cli import run_main

import math
import sys
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Literal

import numpy as np

from log_exam import exam
from log_page import draw_faults, print_report, write_page
from log_readers import TrainingLog, broken_weights, read_log
from nlp_common.base.arguments import COUNT, POSITIVE, option
from nlp_common.base.errors import UserError
from nlp_common.train.lesson import run_lesson
from nlp_common.train.settings import LessonSettings, parse_settings, preset_announced
from nlp_common.train.stage import Stage
from step_flops import PEAKS, flops_per_token, mfu, read_shape, step_seconds, tokens_per_s

HOME = Path(__file__).resolve().parent
PRESETS: dict[str, dict] = {
    "tiny": {"n_clean": 10, "n_planted": 2, "steps": 240},
    "full": {"n_clean": 40, "n_planted": 10, "steps": 240},
}
WINDOW = 15  # 滑动中位数看前后一共几点
SPIKE_Z = 8.0  # 干净的训练里最大的 z 是 5 上下
REPEAT_SCORE, MOST_LAGS = 5.0, 5000
FEWEST = 40  # 点数比这少，趋势与重复都看不出来
STALL_SECONDS, STALL_TIMES = 1.0, 5.0
LEAST_SIGMA = 0.005  # 平均过的、四舍五入过的日志，起伏可能是 0
MAD_TO_SIGMA = 1.4826  # 正态分布里，标准差是 MAD 的几倍


@dataclass
class InspectSettings(LessonSettings):
    log: str | None = option("看哪一份日志：文件或文件夹；没给就考一考自己")
    page: str | None = option("网页写到哪里；默认 outputs/inspect/<日志的名字>.html，在脚本的文件夹里")
    model: str | None = option(
        "训练的是哪个模型：有 config.json 的文件夹，算 MFU 用；日志的文件夹里有就不用写"
    )
    length: int | None = option("一行几个 token，算 MFU 用", limits=COUNT)
    gpu: Literal["", *PEAKS] = option("哪种卡，算 MFU 用", "")  # type: ignore[valid-type]
    peak_tflops: float | None = option("表里没有的卡：bf16 稠密的峰值，TFLOP/s", limits=POSITIVE)
    n_gpus: int = option("几张卡一起训练", 1, COUNT)
    tokens_per_step: float | None = option("每步一共几个 token；日志里没有记时写上", limits=POSITIVE)
    max_grad_norm: float | None = option("梯度裁剪的阈值；日志里没有记时写上", limits=POSITIVE)
    n_clean: int | None = option("考试：没有毛病的训练几次", limits=COUNT)
    n_planted: int | None = option("考试：每样毛病几次", limits=COUNT)
    steps: int | None = option("考试：每次训练几步", limits=COUNT)

    def check(self) -> None:
        if self.steps < 100:
            raise UserError(f"--steps 不能小于 100（太短看不出趋势），给的是 {self.steps}。")


@dataclass
class Finding:
    """看出来的一样毛病。"""

    kind: str
    steps: list[int]  # 在哪几步；一直都有的，是从第几步起
    said: str  # 看到了什么
    advice: str


@dataclass
class Report:
    log: TrainingLog
    findings: list[Finding] = field(default_factory=list)
    cannot: list[str] = field(default_factory=list)  # 缺了什么，所以看不了什么
    numbers: dict[str, float] = field(default_factory=dict)


def inspect(log: TrainingLog, settings: InspectSettings) -> Report:
    """一份日志从头看到尾。"""
    report = Report(log)
    losses = log.column("loss")
    norms = log.column("grad_norm")
    good = [(step, loss) for step, loss in losses if math.isfinite(loss) and loss > 0]
    report.numbers |= {"points": len(losses), "last_step": log.points[-1]["step"]}
    if any(loss <= 0 for _, loss in losses):
        report.cannot.append("有的损失不大于 0（强化学习的？），取不了对数：只看大于 0 的那些点。")
    if good:
        report.numbers |= {"first_loss": good[0][1], "last_loss": good[-1][1]}
    find_nan(report, losses, norms)
    find_spikes(report, good)
    find_divergence_or_plateau(report, good)
    find_repeats(report, good)
    look_at_gradients(report, norms, settings.max_grad_norm or log.facts.get("max_grad_norm"))
    look_at_time(report, settings)
    if (skipped := log.facts.get("skipped", 0)) > 0.05 * max(len(losses), 1):
        said = f"{skipped:.0f} 步没有更新（fp16 溢出），记下的一共 {len(losses)} 步。"
        report.findings.append(
            Finding("skipped", [], said, "开头几步溢出是在找倍数，一直溢出就换 bf16，或降学习率。")
        )
    if bad := log.facts.get("broken_weights"):
        said = f"权重里有 NaN、无穷大或坏了的文件：{'、'.join(bad[:3])}。"
        report.findings.append(Finding("weights", [], said, "从更早的检查点接着训练。"))
    return report


# ---------------------------------------------------------------- 1. 损失


def robust_z(values: np.ndarray, window: int = WINDOW) -> np.ndarray:
    """每一点比前后的中位数高出几个标准差；标准差用 MAD 估，尖峰自己抬不高它。

    取了对数再看：损失从 10 降到 1，同样的起伏占同样的比例。
    """
    residual = detrended(values, window)
    center = np.median(residual)
    sigma = MAD_TO_SIGMA * np.median(np.abs(residual - center))
    return (residual - center) / max(sigma, LEAST_SIGMA)


def detrended(values: np.ndarray, window: int = WINDOW) -> np.ndarray:
    """减去前后各半个窗口的滑动中位数。"""
    half = window // 2
    padded = np.pad(np.log(values), half, mode="reflect")
    trend = np.median(np.lib.stride_tricks.sliding_window_view(padded, window), axis=1)
    return np.log(values) - trend


def rises(values: np.ndarray, index: int, times: float) -> bool:
    """比前面几点里最低的高出几倍：训练刚开始降得快，第一点比后面的高，那不是尖峰。"""
    before = values[max(0, index - 3) : index]
    return len(before) > 0 and values[index] > times * before.min()


def find_nan(report: Report, losses: list, norms: list) -> None:
    bad = sorted({step for step, value in losses + norms if not math.isfinite(value)})
    if bad:
        said = f"第 {bad[0]} 步起有 NaN 或无穷大，一共 {len(bad)} 步。"
        advice = "从它之前的检查点接着训练，跳过那一批；看那一批的数据（空的标签、除以 0）；fp16 换 bf16，或降学习率。"
        report.findings.append(Finding("nan", bad[:1], said, advice))


def find_spikes(report: Report, good: list) -> None:
    if len(good) < WINDOW + 5:
        report.cannot.append(f"损失只有 {len(good)} 点，看不出尖峰（至少要 {WINDOW + 5} 点）。")
        return
    steps, values = np.array(good).T
    z = robust_z(values)
    rising = [z[index] for index in range(len(values)) if rises(values, index, 1.0)]
    report.numbers["largest_z"] = float(max(rising, default=0.0))
    high = np.flatnonzero((z > SPIKE_Z) & (detrended(values) > math.log(1.1)))
    high = [index for index in high if rises(values, index, 1.1)]
    starts = [index for index in high if index - 1 not in high]  # 连着的几步算一次
    if starts:
        places = [int(steps[index]) for index in starts]
        worst = max(starts, key=lambda index: z[index])
        said = f"损失有 {len(places)} 次尖峰，在第 {shown(places)} 步；最高的 {values[worst]:.3g}，z = {z[worst]:.0f}。"
        advice = (
            "看那几步的数据（乱码、超长、标签错位）；数据没问题就降学习率、加长预热、把 Adam 的 β₂ 调小些。"
        )
        report.findings.append(Finding("spike", places, said, advice))


def find_divergence_or_plateau(report: Report, good: list) -> None:
    """分成十段，各取中位数：后面比前面最低的还高，是发散；后一半不再降，是停住了。"""
    if len(good) < FEWEST:
        report.cannot.append(f"损失只有 {len(good)} 点，看不出是不是停住了、发散了（至少要 {FEWEST} 点）。")
        return
    steps, values = np.array(good).T
    values = np.log(values)
    parts = [float(np.median(part)) for part in np.array_split(values, 10)]
    noise = MAD_TO_SIGMA * float(np.median(np.abs(detrended(np.exp(values)))))
    error = 1.25 * noise * math.sqrt(10 / len(values))  # 一段的中位数的标准误
    lowest = int(np.argmin(parts))
    if parts[-1] - parts[lowest] > max(math.log(1.05), 6 * error):
        start = int(steps[(lowest + 1) * len(steps) // 10])
        said = f"损失从第 {start} 步前后起往上走：从 {math.exp(parts[lowest]):.3g} 到 {math.exp(parts[-1]):.3g}。"
        advice = "学习率太大，或曲线写错了：回到更早的检查点，学习率减半；看那一步前后改过什么。"
        report.findings.append(Finding("divergence", [start], said, advice))
        return
    middle, late = (
        np.median(values[len(values) * 2 // 5 : len(values) * 3 // 5]),
        np.median(values[-len(values) // 5 :]),
    )
    drop = float(middle - late)
    report.numbers["late_drop"] = drop
    if drop < 3 * error and 3 * error > 0.1:
        report.cannot.append("损失的起伏太大（或点太少），看不出后一半是不是停住了。")
    elif drop < max(0.005, 3 * error):
        said = (
            f"后一半的损失没有再降：中间两成的中位数 {math.exp(middle):.3g}，最后两成 {math.exp(late):.3g}。"
        )
        advice = "到底了（与留出损失、数据的下限比一比），就可以停；没到底，看学习率是不是早降到了 0、参数有没有交给优化器。"
        report.findings.append(Finding("plateau", [int(steps[len(steps) // 2])], said, advice))


def find_repeats(report: Report, good: list) -> None:
    """同样的批再来一次，难的还是难，容易的还是容易：去掉趋势的损失，隔 P 步的两段起伏一样。"""
    ids = [(point["step"], point["batch"]) for point in report.log.points if "batch" in point]
    if ids:
        seen: dict[str, int] = {}
        again = [(step, seen[each]) for step, each in ids if seen.setdefault(each, step) != step]
        if again:
            said = f"有 {len(again)} 步的批与从前的一字不差，例如第 {again[0][0]} 步就是第 {again[0][1]} 步的那一批。"
            report.findings.append(Finding("repeated", [again[0][0]], said, REPEAT_ADVICE))
        return
    if len(good) < FEWEST:
        report.cannot.append("日志里没有记每一步是哪一批数据，点又太少：看不出数据有没有喂重。")
        return
    steps, values = np.array(good).T
    early = len(values) // 10  # 开头降得太快，起伏被趋势盖住
    residual = np.clip(robust_z(values)[early:], -4, 4)
    lag, score, correlation = best_lag(residual)
    report.numbers["repeat_score"] = score
    if score > REPEAT_SCORE and correlation > 0.35:
        every = int(steps[early + lag] - steps[early])
        said = f"损失的起伏隔 {every} 步就重演一遍（相关 {correlation:.2f}）：同样的批在按同样的次序再来。"
        report.findings.append(Finding("repeated", [every], said, REPEAT_ADVICE))


REPEAT_ADVICE = (
    "每一遍用不同的种子打乱；接着训练时跳过走过的批（或存下读到了哪里）；几个进程各拿各的一份，不要都从头读。"
)


def best_lag(residual: np.ndarray) -> tuple[int, float, float]:
    """起伏与自己错开 lag 点，相关最显著的：(lag, 比 0 高几个标准差, r)。重叠不到 30 点的不看。

    相关 r 取 Fisher 变换 atanh(r)，没有相关时近似正态，标准差 1/√(n−3)。
    """
    best = (0, 0.0, 0.0)
    for lag in range(WINDOW, min(len(residual) - 30, MOST_LAGS)):  # 再近，两个窗口重叠
        a, b = residual[lag:], residual[:-lag]
        if a.std() > 0 and b.std() > 0:
            r = float(np.corrcoef(a, b)[0, 1])
            score = math.atanh(min(r, 0.999999)) * math.sqrt(len(a) - 3)
            best = max(best, (lag, score, r), key=lambda each: each[1])
    return best


# ---------------------------------------------------------------- 2. 梯度


def look_at_gradients(report: Report, norms: list, limit: float | None) -> None:
    """范数有没有忽然大起来；有几成的步被裁剪了。"""
    good = [(step, norm) for step, norm in norms if math.isfinite(norm) and norm > 0]
    if len(good) < WINDOW + 5:
        if not norms:
            report.cannot.append("没有记梯度的范数：看不出梯度有没有忽然变大、被裁剪了几成。")
        elif not good:
            said = "梯度的范数一直是 0：参数没有在学。"
            report.findings.append(
                Finding("gradient", [norms[0][0]], said, "看 requires_grad、detach、no_grad。")
            )
        return
    steps, values = np.array(good).T
    report.numbers["grad_norm"] = float(np.median(values))
    z = robust_z(values)
    report.numbers["largest_gradient_z"] = float(z.max())
    high = np.flatnonzero((z > SPIKE_Z) & (detrended(values) > math.log(3)))
    high = [index for index in high if rises(values, index, 3)]
    if high:
        places = [int(steps[index]) for index in high]
        worst = max(high, key=lambda index: z[index])
        said = f"梯度的范数在第 {shown(places)} 步忽然变大，最大 {values[worst]:.3g}（平常 {np.median(values):.3g}）。"
        advice = "那一步的数据，或累积的批数除错了；裁剪挡得住一两次，经常有就要找原因。"
        report.findings.append(Finding("gradient", places, said, advice))
    if limit is None:
        report.cannot.append("不知道裁剪的阈值：看不出被裁剪了几成（写上 --max_grad_norm）。")
        return
    later = values[len(values) // 10 :]
    share = float((later > limit).mean())
    report.numbers["clipped_share"] = share
    if share > 0.5:
        said = f"预热以后 {share:.0%} 的步被裁剪了：阈值 {limit:g}，范数的中位数 {np.median(later):.3g}。"
        advice = "几乎步步都裁，裁剪就不再是保险，而是在改学习率（各步不同）：把阈值放到平常范数的两三倍。"
        report.findings.append(Finding("clipping", [int(steps[len(steps) // 10])], said, advice))


# ---------------------------------------------------------------- 3. 时间


def look_at_time(report: Report, settings: InspectSettings) -> None:
    """每秒多少 token、MFU、停了几次。"""
    log = report.log
    paces = step_seconds(log)
    speed = tokens_per_s(log, paces, settings.tokens_per_step)
    if paces:
        usual = median(seconds for _, seconds in paces)
        report.numbers["step_seconds"] = usual
        stalls = [
            (step, seconds)
            for step, seconds in paces
            if seconds > STALL_TIMES * usual and seconds - usual > STALL_SECONDS
        ]
        if stalls:
            lost = sum(seconds - usual for _, seconds in stalls)
            said = f"停住了 {len(stalls)} 次，在第 {shown([step for step, _ in stalls])} 步，一共多用 {lost:.1f} 秒（平常一步 {usual:.3g} 秒）。"
            advice = (
                "有规律的多半是存检查点或评测；没有规律的看读数据（加进程、预先读）、网络盘、别的进程抢卡。"
            )
            report.findings.append(Finding("stall", [step for step, _ in stalls], said, advice))
    else:
        report.cannot.append("没有记时刻，也没有记每步的秒数：看不出中间停没停过。")
    if speed is None:
        report.cannot.append("没有记 token 数：算不出每秒多少 token 与 MFU（写上 --tokens_per_step）。")
        return
    report.numbers["tokens_per_s"] = speed
    folder = log.path.parent
    model = Path(settings.model) if settings.model else folder if (folder / "config.json").exists() else None
    peak = settings.peak_tflops or PEAKS.get(settings.gpu)
    if model is None or settings.length is None or peak is None:
        lacking = [
            name
            for name, value in (("--model", model), ("--length", settings.length), ("--gpu", peak))
            if value is None
        ]
        report.cannot.append(f"算 MFU 还要 {'、'.join(lacking)}。")
        return
    flops = flops_per_token(read_shape(model), settings.length)
    report.numbers["mfu"] = mfu(speed, flops, peak * 1e12 * settings.n_gpus)
    if report.numbers["mfu"] > 1:
        report.cannot.append("算出来的 MFU 大于 1：模型、--length、卡的型号与张数，有一样写错了。")


def shown(steps: list[int]) -> str:
    return "、".join(map(str, steps[:5])) + (" 等" if len(steps) > 5 else "")


# ---------------------------------------------------------------- 4. 全课


def learn(stage: Stage) -> dict:
    found = exam(stage, inspect)
    data = {"train": {"name": "tiny_world", "kind": "builtin"}}
    return stage.save(found["metrics"], data, write=partial(draw_faults, found=found))


def look_at(settings: InspectSettings) -> dict:
    """看读者的一份日志：终端里说，再写一页网页。"""
    path = Path(settings.log).expanduser()
    try:
        log = read_log(path)
    except OSError as error:
        raise UserError(f"读不了 {error.filename or path}（{error.strerror}）。") from None
    if log.kind == "run.json" and (bad := broken_weights(log.path.parent)):
        log.facts["broken_weights"] = bad
    report = inspect(log, settings)
    print_report(report)
    page = Path(settings.page or HOME / "outputs" / "inspect" / f"{path.resolve().stem}.html").expanduser()
    try:
        write_page(page, report)
    except OSError as error:
        raise UserError(
            f"网页写不到 {error.filename or page}（{error.strerror}）：--page 换一个文件名。"
        ) from None
    print(f"\n网页：{page.resolve()}")
    return {"findings": [finding.kind for finding in report.findings], **report.numbers}


def main(argv: list[str] | None = None) -> dict:
    arguments = sys.argv[1:] if argv is None else argv
    own = any(word.split("=")[0] == "--log" for word in arguments)
    with preset_announced() if own else nullcontext():  # 看自己的日志，与预设无关，不必说
        settings = parse_settings(InspectSettings, PRESETS, argv)
    if settings.log:
        return look_at(settings)
    return run_lesson("training_log_inspector", HOME, settings, learn)


if __name__ == "__main__":
    run_main(main)
