"""投机解码：小模型先猜几个 token，大模型一次前向核对；写出来的与大模型自己写的一样，什么时候才更快。

学到什么：贪心时为什么一字不差，采样时为什么分布不变（用卡方检验证明，写错一行就检验得出）；快慢由三个数决定：
猜中的比例 α、小模型的价钱 c、一次核对几个的价钱 v。大模型大、小模型小才赢，反过来就输：两种都在这里。

运行：
    python speculative_decoding.py                      # Qwen 链的小模型，现场训练一个更小的：算法全对，可是不快
    python speculative_decoding.py --model smollm2      # 真的大模型（1.35 亿参数），写格式固定的文字：快
    python speculative_decoding.py --preset full        # Qwen1.5-4B-Chat 由 0.5B 来猜，需要加速器

预期输出（实测见本文件夹的 README.md）：贪心逐 token 相同；卡方检验的 p 值不小；tiny 慢于一个一个写，smollm2 快 1.3 倍以上。

参考：Leviathan et al. 2023、Chen et al. 2023（投机解码与投机采样）。
"""

from nlp_common.base.cli import run_main

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import ClassVar, Literal

import torch
from scipy.stats import chisquare

from nlp_common.base.arguments import COUNT, POSITIVE, option
from nlp_common.base.errors import UserError
from nlp_common.draw.plots import line_chart
from nlp_common.lm.generation import stop_tokens
from nlp_common.lm.loading import load_plain_lm
from nlp_common.train.chain import chain_model
from nlp_common.train.lesson import run_lesson
from nlp_common.train.settings import LoopSettings, parse_settings
from nlp_common.train.stage import Stage
from speculative import (
    Reader,
    accept_or_replace,
    accept_or_resample_p,
    plain_generate,
    speculative_generate,
)
from speculative_draft import load_draft, train_draft, work

HOME = Path(__file__).resolve().parent
FULL_MODEL, FULL_DRAFT = "Qwen/Qwen1.5-4B-Chat", "Qwen/Qwen1.5-0.5B-Chat"
PRESETS = {
    "tiny": {
        "max_train_samples": 6000,
        "n_prompts": 12,
        "rounds": 7,
        "max_new_tokens": 48,
        "samples": 1500,
        "draft_dim": 64,
        "draft_layers": 1,
    },
    "full": {
        "max_train_samples": 6000,
        "num_train_epochs": 3.0,
        "n_prompts": 3,
        "rounds": 3,
        "max_new_tokens": 64,
        "samples": 0,
        "draft_dim": 128,
        "draft_layers": 2,
    },
}


@dataclass
class SpeculativeSettings(LoopSettings):
    COMMON: ClassVar[dict] = LoopSettings.COMMON | {
        "per_device_train_batch_size": 32,
        "learning_rate": 3e-3,
        "adam_beta2": 0.98,
        "max_length": 512,
    }
    model: str | None = option("大模型：hub 名、本地文件夹或 smollm2；默认是 Qwen 链 tiny 预设的 SFT 模型")
    source: Literal["hf", "modelscope"] = option("hub 名从哪里下载", "hf")
    draft: str | None = option("小模型，词表要与大模型的相同；默认现场训练一个")
    k: int = option("小模型每次猜几个", 5, COUNT)
    draft_dim: int | None = option("现场训练的小模型的宽度", None, COUNT)
    draft_layers: int | None = option("现场训练的小模型的层数", None, COUNT)
    n_prompts: int | None = option("比快慢用几个开头", None, COUNT)
    max_new_tokens: int | None = option("每个开头写多少个 token")
    rounds: int | None = option("比快慢时各轮流跑几遍，取中位数", None, COUNT)
    samples: int | None = option("卡方检验采样几次；0 是不做")
    temperature: float = option("卡方检验用的温度，大于 0", 1.0, POSITIVE)

    def check(self) -> None:
        if self.draft_dim % 8:
            raise UserError(
                f"--draft_dim 要是 8 的倍数（4 个头，每个头的宽度是偶数），给的是 {self.draft_dim}。"
            )
        if 0 < self.samples < 200:
            raise UserError(
                f"--samples 至少 200（或 0，不做检验），给的是 {self.samples}：格子里的数太少，卡方检验不准。"
            )


# ---------------------------------------------------------------- 1. 证明：贪心一字不差，采样分布不变


def fresh(reader: Reader) -> Reader:
    """同一个模型，缓存从头来。"""
    return Reader(reader.model, reader.small_of, reader.big_of)


def exact_cells(
    target: Reader, prompt: list[int], depth: int, temperature: float, least: float
) -> dict[tuple, float]:
    """大模型自己写的前 depth 个 token 的精确概率；小于 least 的不再细分，合成一格 ()。"""
    cells: dict[tuple, float] = {}
    waiting = [((), 1.0)]
    while waiting:
        prefix, probability = waiting.pop()
        if len(prefix) == depth:
            cells[prefix] = probability
            continue
        with torch.no_grad():
            p = target.distribution(target.logits([*prompt, *prefix], 1)[0], temperature)  # (V,)
        for token in torch.nonzero(p * probability >= least)[:, 0].tolist():
            waiting.append(((*prefix, token), probability * p[token].item()))
    cells[()] = max(0.0, 1 - sum(cells.values()))
    return cells


def chi_square(
    target: Reader, draft: Reader, prompt: list[int], settings, accept, depth: int = 3
) -> tuple[float, int]:
    """→ (p 值, 几格)：投机采样写 samples 次前 depth 个 token，频数与大模型的精确概率合不合。"""
    n = settings.samples
    cells = exact_cells(fresh(target), prompt, depth, settings.temperature, 5 / n)
    generator = torch.Generator(target.model.device).manual_seed(settings.seed)
    counts = dict.fromkeys(cells, 0)
    target, draft = fresh(target), fresh(draft)  # 开头的缓存 n 次共用
    for _ in range(n):
        written = speculative_generate(
            target, draft, prompt, depth, set(), depth - 1, settings.temperature, generator, accept
        )
        key = tuple(written.ids)
        counts[key if key in cells else ()] += 1
    if cells[()] * n < 5:  # 剩下的太少，并进最小的一格
        smallest = min((key for key in cells if key), key=cells.__getitem__)
        cells[smallest] += cells.pop(())
        counts[smallest] += counts.pop(())
    expected = [cells[key] * n for key in cells]
    return float(chisquare([counts[key] for key in cells], expected, sum_check=False).pvalue), len(cells)


# ---------------------------------------------------------------- 2. 快慢


def timed(run, prompts: list[list[int]]) -> tuple[float, list]:
    """→ (秒, 各开头写出的)"""
    started = time.perf_counter()
    results = [run(prompt) for prompt in prompts]
    return time.perf_counter() - started, results


def race(
    target: Reader, draft: Reader, prompts: list[list[int]], stops: set[int], settings, ks: list[int]
) -> dict:
    """一个一个写与各个 k 轮流跑 rounds 遍，取中位数 → {k: (秒, 写出的)}；k = 0 是一个一个写。"""
    n = settings.max_new_tokens
    seconds: dict[int, list[float]] = {k: [] for k in [0, *ks]}
    results: dict[int, list] = {}
    for _ in range(settings.rounds):
        for k in seconds:
            if k == 0:
                run = lambda prompt: plain_generate(fresh(target), prompt, n, stops)  # noqa: E731
            else:
                run = partial(spec_greedy, target, draft, n=n, stops=stops, k=k)
            used, results[k] = timed(run, prompts)
            seconds[k].append(used)
    return {k: (median(seconds[k]), results[k]) for k in seconds}


def spec_greedy(target, draft, prompt, n, stops, k):
    return speculative_generate(fresh(target), fresh(draft), prompt, n, stops, k)


def library_race(
    target: Reader, draft: Reader, prompts: list[list[int]], tokenizer, settings
) -> dict[str, float]:
    """transformers 的 generate：贪心，与 assistant_model（它的投机解码），每秒几个 token。"""
    speeds: dict[str, list[float]] = {"transformers": [], "transformers_assisted": []}
    for _ in range(settings.rounds):
        for name, extra in (
            ("transformers", {}),
            ("transformers_assisted", {"assistant_model": draft.model}),
        ):
            started, count = time.perf_counter(), 0
            for prompt in prompts:
                ids = torch.tensor([prompt], device=target.model.device)
                out = target.model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    do_sample=False,
                    max_new_tokens=settings.max_new_tokens,
                    eos_token_id=stop_tokens(tokenizer),
                    pad_token_id=tokenizer.pad_token_id,
                    **extra,
                )
                count += out.shape[1] - len(prompt)
            speeds[name].append(count / (time.perf_counter() - started))
    return {f"{name}_tokens_per_s": median(values) for name, values in speeds.items()}


def forward_ms(reader: Reader, prompt: list[int], n: int) -> float:
    """接着 prompt 一次读 n 个 token 要几毫秒。"""
    reader = fresh(reader)
    extra = (prompt * (1 + n // len(prompt)))[:n]
    times = []
    with torch.no_grad():
        for _ in range(9):
            reader.logits(prompt, 1)
            started = time.perf_counter()
            reader.logits(prompt + extra, n)
            times.append(1000 * (time.perf_counter() - started))
    return median(times)


def predicted(alpha: float, k: int, c: float, v: float) -> float:
    """快几倍（Leviathan et al. 2023 定理 3.8）：一轮写出 (1 − α^(k+1))/(1 − α) 个，花 k·c + v 次大模型的前向。"""
    tokens = k + 1 if alpha >= 1 else (1 - alpha ** (k + 1)) / (1 - alpha)
    return tokens / (k * c + v)


# ---------------------------------------------------------------- 3. 全课


def learn(stage: Stage, path: str, is_chain: bool) -> dict:
    settings = stage.settings
    tokenizer, model = load_plain_lm(path)
    target = Reader(model.to(stage.device).eval())
    rows, prompts = work(settings, tokenizer, is_chain)
    stops = set(stop_tokens(tokenizer))
    if settings.draft:
        draft = load_draft(settings.draft, settings.source, tokenizer)
        draft.model.to(stage.device)
    else:
        draft = train_draft(stage, rows, model.config.vocab_size)

    ks = sorted({1, 2, 3, settings.k, 8})
    results = race(target, draft, prompts, stops, settings, ks)
    plain_seconds, plain = results[0]
    seconds, written = results[settings.k]
    checked, accepted = sum(w.checked for w in written), sum(w.accepted for w in written)
    n_tokens = sum(len(w.ids) for w in written)
    metrics: dict = {
        "same_greedy": float(
            all(a.ids == b.ids for k in ks for a, b in zip(results[k][1], plain, strict=True))
        ),
        "accepted_share": accepted / max(1, checked),
        "tokens_per_forward": n_tokens / sum(w.forwards for w in written),
        "speedup": plain_seconds / seconds,
        "plain_tokens_per_s": sum(len(w.ids) for w in plain) / plain_seconds,
        "tokens_per_s": n_tokens / seconds,
    }
    one = forward_ms(target, prompts[0], 1)
    costs = {
        "target_ms": one,
        "draft_cost": forward_ms(draft, prompts[0], 1) / one,
        "verify_cost": forward_ms(target, prompts[0], settings.k + 1) / one,
    }
    metrics |= costs
    metrics["speedup_predicted"] = predicted(
        metrics["accepted_share"], settings.k, costs["draft_cost"], costs["verify_cost"]
    )
    metrics["speedup_by_k"] = {str(k): plain_seconds / results[k][0] for k in ks}
    if draft.big_of is None or len(draft.big_of) == model.config.vocab_size:  # 词表不同的，它不收
        metrics |= library_race(target, draft, prompts, tokenizer, settings)
    if settings.samples:
        metrics["chi_square_p"], metrics["chi_square_cells"] = chi_square(
            target, draft, prompts[0], settings, accept_or_replace
        )
        metrics["chi_square_p_wrong"], _ = chi_square(
            target, draft, prompts[0], settings, accept_or_resample_p
        )
    show(metrics, tokenizer, prompts[0], written[0].ids)

    def save(folder: Path) -> None:
        draft.model.save_pretrained(folder)
        line_chart(
            folder / "speedup.svg",
            curves(metrics, ks),
            "猜几个最快|Speed-up by number of guesses",
            "每次猜几个 k|guesses k",
            "快几倍|times",
            hlines={"一个一个写|one by one": 1.0},
        )

    source = {"name": "tiny_world" if is_chain else "server logs", "kind": "builtin", "rows": len(rows)}
    return stage.save(metrics, {"train": source}, save)


def curves(metrics: dict, ks: list[int]) -> dict:
    """公式的曲线（核对几个都是一个价钱 v：权重只搬一遍）与量出来的。"""
    alpha, c, v = metrics["accepted_share"], metrics["draft_cost"], metrics["verify_cost"]
    xs = list(range(1, max(ks) + 1))
    measured = metrics["speedup_by_k"]
    return {
        f"算出来的 α={alpha:.2f}|formula, a={alpha:.2f}": (xs, [predicted(alpha, k, c, v) for k in xs]),
        "量出来的|measured": ([int(k) for k in measured], list(measured.values())),
    }


def show(metrics: dict, tokenizer, prompt: list[int], ids: list[int]) -> None:
    print(f"\n开头的末尾：…{tokenizer.decode(prompt[-40:])}")
    print(f"写出：{tokenizer.decode(ids)}\n")
    print(f"贪心与一个一个写逐 token 相同：{'是' if metrics['same_greedy'] else '否'}")
    print(
        f"猜中 {metrics['accepted_share']:.1%}，大模型一次前向写出 {metrics['tokens_per_forward']:.2f} 个；"
        f"快 {metrics['speedup']:.2f} 倍（公式说 {metrics['speedup_predicted']:.2f}）"
    )
    if "chi_square_p" in metrics:
        print(
            f"采样的分布对不对（卡方检验，{metrics['chi_square_cells']} 格）：p = {metrics['chi_square_p']:.3f}；"
            f"故意写错一行，p = {metrics['chi_square_p_wrong']:.2g}"
        )


def main(argv: list[str] | None = None) -> dict:
    settings = parse_settings(SpeculativeSettings, PRESETS, argv, FULL_MODEL)
    if settings.preset == "full" and settings.model is None:
        settings.model, settings.draft = FULL_MODEL, settings.draft or FULL_DRAFT
    found = chain_model("sft", settings.model, settings.source)
    is_chain = (found["run"] or {}).get("data", {}).get("train", {}).get("name") == "tiny_world"
    name = "speculative_decoding" + ("_smollm2" if settings.model == "smollm2" else "")
    learn_it = partial(learn, path=found["path"], is_chain=is_chain)
    return run_lesson(name, HOME, settings, learn_it, target=f"{found['stage']}:{found['id']}")


if __name__ == "__main__":
    run_main(main)
