"""LoRA：大矩阵不动，旁边添两个小矩阵，只训练它们。

学到什么：四十行写出 LoRA（A、B、α/r、合并），等于 PEFT；几个百分点的参数，学得和全参数一样好；学习率要大些，照库的默认值什么也学不会；
以及一个坑：预训练里没见过的字（真模型里是控制符），嵌入那几行冻着，怎么学也学不会，把那几行放开就好。

运行：
    python lora_by_hand.py                                  # 从 Qwen 链 tiny 的预训练模型开始，做一遍 SFT；约三分钟
    python lora_by_hand.py --ranks 8 --targets all --output_dir outputs/r8        # 表里只做一格
    python lora_by_hand.py --model smollm2 --dataset 我的.jsonl --ranks 8 --targets all
    python lora_by_hand.py --preset full                    # Qwen1.5-0.5B + firefly，需要加速器

预期输出（tiny，实测见本文件夹的 README.md）：全参数答对九成九以上；LoRA r=4 加上没见过的字那几行，不到 6% 的参数，也在 95% 以上。

参考：Hu et al. 2021（LoRA）；Biderman et al. 2024（LoRA learns less and forgets less）；Schulman et al. 2025（LoRA Without Regret：
学习率约是全参数的十倍）；PEFT 的 LoraConfig(trainable_token_indices=…)。
"""

from nlp_common.base.cli import run_main

import copy
import importlib.util
import math
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from nlp_common.base.arguments import COUNT, POSITIVE, option
from nlp_common.base.errors import UserError
from nlp_common.data.chats import to_chats
from nlp_common.draw.plots import line_chart
from nlp_common.lm.chat_rows import chat_row
from nlp_common.lm.chatml import IM_END, IM_START
from nlp_common.tiny.judge import qa_accuracy
from nlp_common.train.chain import chain_model
from nlp_common.train.lesson import run_lesson, run_part
from nlp_common.train.settings import StageSettings, parse_settings
from nlp_common.train.sft import train_on_chats
from nlp_common.train.splits import load_train_and_eval
from nlp_common.train.stage import Stage
from start import fill_in, heldout_loss, heldout_questions, load_start, names
from token_rows import train_token_rows, unseen_tokens

HOME = Path(__file__).resolve().parent
FULL_MODEL = "Qwen/Qwen1.5-0.5B"
PRESETS = {
    "tiny": {
        "dataset": "tiny_world",
        "max_train_samples": 3000,  # 最后两行用全部，扫学习率、填表各用一半
        "max_eval_samples": 200,
        "max_length": 256,
        "per_device_train_batch_size": 8,
        "adam_beta2": 0.98,
        "ranks": "1,2,4,8,16",
        "targets": "attention,mlp,all",
    },
    "full": {
        "dataset": "YeungNLP/firefly-train-1.1M",
        "max_train_samples": 10_000,
        "max_length": 512,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "ranks": "8",
        "targets": "all",
    },
}
SMALL = {"full_rates": "5e-4,2e-3,5e-3,1e-2", "lora_rates": "2e-5,2e-3,5e-3,1e-2,2e-2"}  # 小世界的模型
REAL = {"full_rates": "2e-5", "lora_rates": "2e-5,2e-4"}  # 真的模型
ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
TARGETS = {"attention": ATTENTION, "mlp": MLP, "all": ATTENTION + MLP}


# ---------------------------------------------------------------- 1. LoRA


class LoRALinear(nn.Module):
    """y = xWᵀ + (α/r)·x Aᵀ Bᵀ（Hu et al. 2021 式 3）：W 冻住，只学 A、B。

    B 从 0 开始，所以刚装上时 y 不变；A 随机，不然两边都是 0，谁的梯度也出不来。
    """

    def __init__(self, base: nn.Linear, r: int, alpha: float, dropout: float = 0.0):
        super().__init__()
        self.base, self.scaling, self.merged = base.requires_grad_(False), alpha / r, False
        self.A = nn.Parameter(torch.empty(r, base.in_features))  # (r, d_in)
        self.B = nn.Parameter(torch.zeros(base.out_features, r))  # (d_out, r)
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, d_in) → (B, T, d_out)
        y = self.base(x)
        if self.merged:
            return y
        return y + self.scaling * (self.dropout(x) @ self.A.T @ self.B.T)

    def delta(self) -> Tensor:
        """ΔW = (α/r)BA，(d_out, d_in)：训练给 W 加上了什么。"""
        return self.scaling * self.B @ self.A

    @torch.no_grad()
    def merge(self) -> None:
        """把 ΔW 加进 W：此后与普通的 Linear 一样快。"""
        if not self.merged:
            self.base.weight += self.delta()
            self.merged = True

    @torch.no_grad()
    def unmerge(self) -> None:
        if self.merged:
            self.base.weight -= self.delta()
            self.merged = False


# ---------------------------------------------------------------- 2. 装到模型上，合并


def add_lora(
    model: nn.Module, target: str = "all", r: int = 8, alpha: float = 16, dropout: float = 0.0
) -> list[str]:
    """冻住 model，把名字合 target 的每个 Linear 换成 LoRALinear，返回换了哪些。r 太大是 UserError。"""
    model.requires_grad_(False)
    chosen = matching_linears(model, target)
    for name, linear in chosen.items():
        limit = min(linear.in_features, linear.out_features)
        if r > limit:
            raise UserError(
                f"--r {r} 比 {name} 的秩还大（{linear.out_features}×{linear.in_features}，最多 {limit}）。"
            )
        parent, _, last = name.rpartition(".")
        lora = LoRALinear(linear, r, alpha, dropout).to(linear.weight.device)
        setattr(model.get_submodule(parent), last, lora)
    fused = [name for name, p in model.named_parameters() if p.dim() == 3 and "expert" in name]
    if fused:
        print(f"（{fused[0]} 是叠在一起的专家，三维的参数，不是线性层：--target 够不着，它们不学。）")
    return list(chosen)


def matching_linears(model: nn.Module, target: str) -> dict[str, nn.Linear]:
    """名字合 target 的 Linear。target：attention、mlp、all（除输出层外的全部），或逗号隔开的名字（q_proj,v_proj）。

    给的名字有一个在模型里找不到，是 UserError：写错一个字，就少学了几层。
    """
    wanted = TARGETS.get(target) or names(target)
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    there = {name.rsplit(".", 1)[-1] for name in linears}
    lost = [name for name in wanted if name not in there]
    if lost and (target not in TARGETS or len(lost) == len(wanted)):
        raise UserError(
            f"--target 里的 {'、'.join(lost)} 一个线性层也不合；模型里有 {'、'.join(sorted(there))}，或写 attention、mlp、all。"
        )
    return {name: linear for name, linear in linears.items() if name.rsplit(".", 1)[-1] in wanted}


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """名字 → model 里的 LoRALinear。"""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


def merge_lora(model: nn.Module) -> nn.Module:
    """合进去，换回普通的 Linear：从此可以照常 save_pretrained。返回 model。"""
    for name, layer in lora_layers(model).items():
        layer.merge()
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, layer.base)
    return model


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """名字 → 在学的参数：适配器的全部。"""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


# ---------------------------------------------------------------- 3. 设置


@dataclass
class LoRASettings(StageSettings):
    COMMON: ClassVar[dict] = StageSettings.COMMON | {"learning_rate": 0.0, "save_steps": 10_000}

    r: int = option("扫学习率与最后一行用的秩", 4, COUNT)
    alpha_over_r: float = option("α/r：增量放大几倍；定下它，换秩不必另找学习率", 2.0, POSITIVE)
    target: str = option("扫学习率与最后一行用的：attention、mlp、all，或逗号隔开的层名", "all")
    ranks: str | None = option("表里有哪些秩，逗号分开")
    targets: str | None = option("表里有哪些 target，逗号分开")
    full_rates: str | None = option("全参数扫哪些学习率，逗号分开")
    lora_rates: str | None = option("LoRA 扫哪些学习率，逗号分开")

    def check(self) -> None:
        super().check()
        self.check_loop_only()
        fill_in(self, SMALL, REAL)
        for name, number in (("ranks", int), ("full_rates", float), ("lora_rates", float)):
            try:
                given = numbers(getattr(self, name), number)
            except ValueError:
                raise UserError(f"--{name} 要是逗号分开的数，给的是 '{getattr(self, name)}'。") from None
            if min(given) <= 0:
                raise UserError(f"--{name} 里的数都要大于 0，给的是 '{getattr(self, name)}'。")


def numbers(text: str, number) -> list:
    return [number(each) for each in names(text)]


# ---------------------------------------------------------------- 4. 哪些 token 预训练里从来没有


def never_pretrained(tokenizer, chats: list[dict], is_tiny_world: bool) -> list[int]:
    """对话里有、预训练里从来没有的 token：小世界数得出来；真模型的语料数不了，只有控制符是肯定的。"""
    if not is_tiny_world:
        return tokenizer.convert_tokens_to_ids([IM_START, IM_END])
    return unseen_tokens(tokenizer, [chat_row(tokenizer, chat["messages"]) for chat in chats])


# ---------------------------------------------------------------- 5. 一次训练


@dataclass(frozen=True)
class Trial:
    rate: float
    r: int = 0  # 0 是全参数
    target: str = "all"
    token_rows: bool = True  # 没见过的 token 的嵌入也学
    share: float = 0.5  # 用多少训练数据

    @property
    def name(self) -> str:
        method = f"r{self.r}-{self.target}" if self.r else "full"
        return (
            f"{method}-{self.rate:g}"
            + ("" if self.token_rows else "-frozen")
            + ("-long" if self.share == 1 else "")
        )


def equip(start, trial: Trial, new_tokens: list[int], alpha_over_r: float):
    """start 的一份，照 trial 装好。"""
    model = copy.deepcopy(start)
    if trial.r:
        add_lora(model, trial.target, trial.r, alpha_over_r * trial.r)
        if trial.token_rows:
            train_token_rows(model, new_tokens)
    return model


def train_and_measure(
    part: Stage, trial: Trial, start, tokenizer, chats: list[dict], heldout: list[dict], new_tokens: list[int]
) -> dict:
    settings = part.settings
    model = equip(start, trial, new_tokens, settings.alpha_over_r)
    learned = sum(p.numel() for p in trainable(model).values())
    part.settings = replace(settings, learning_rate=trial.rate)
    trained = train_on_chats(part, trial.name, model, tokenizer, chats[: round(len(chats) * trial.share)])
    metrics = {
        "trainable": learned,
        "trainable_share": learned / sum(p.numel() for p in start.parameters()),
        "optimizer_bytes": 2 * 4 * learned,  # AdamW 的两个状态，float32
        "seconds": trained.metrics["train_seconds"],
        "heldout_loss": heldout_loss(model, tokenizer, heldout, settings.max_length),
    }
    if settings.dataset == "tiny_world":
        metrics["qa_accuracy"] = qa_accuracy(model, tokenizer, heldout_questions(settings.max_eval_samples))
    return metrics


# ---------------------------------------------------------------- 6. 全课


def learn(stage: Stage, path: str) -> dict:
    settings = stage.settings
    tokenizer, start = load_start(path, stage.device)
    chats, heldout, data = load_train_and_eval(settings, "chats", to_chats)
    is_tiny_world = settings.dataset == "tiny_world"
    for target in (settings.target, *names(settings.targets)):  # 写错了现在就说，不等扫完学习率
        add_lora(copy.deepcopy(start), target, max(settings.r, *numbers(settings.ranks, int)))
    new_tokens = never_pretrained(tokenizer, chats, is_tiny_world)
    print(f"预训练里没有的 token {len(new_tokens)} 个：{tokenizer.decode(new_tokens)}")
    shared = {
        "start": start,
        "tokenizer": tokenizer,
        "chats": chats,
        "heldout": heldout,
        "new_tokens": new_tokens,
    }

    done: dict[Trial, dict] = {}

    def run(trial: Trial) -> dict:
        if trial not in done:
            done[trial] = run_part(stage, trial.name, partial(train_and_measure, trial=trial, **shared))
        return done[trial]

    # 1. 各自最好的学习率
    full = {rate: run(Trial(rate)) for rate in numbers(settings.full_rates, float)}
    lora = {
        rate: run(Trial(rate, settings.r, settings.target)) for rate in numbers(settings.lora_rates, float)
    }
    best_full, best_lora = best_rate(full), best_rate(lora)
    print(f"最好的学习率：全参数 {best_full:g}，LoRA {best_lora:g}，{best_lora / best_full:.1f} 倍")

    # 2. 表：秩 × 装在哪些层，每一种装法先扫自己的学习率；α/r 定下了，秩变了不必再扫
    table, rates = {}, {}
    for target in names(settings.targets):
        around = {
            rate: run(Trial(rate, settings.r, target)) for rate in (best_lora / 2, best_lora, best_lora * 2)
        }
        rates[target] = best_rate(around)
        table[target] = {str(r): run(Trial(rates[target], r, target)) for r in numbers(settings.ranks, int)}
    # 3. 坑：没见过的字的嵌入冻着
    frozen = run(Trial(best_lora, settings.r, settings.target, token_rows=False))
    # 4. 学得久一点
    long_full = run(Trial(best_full, share=1.0))
    long_lora = run(Trial(best_lora, settings.r, settings.target, share=1.0))

    score = "qa_accuracy" if is_tiny_world else "heldout_loss"
    metrics = {
        f"{score}_full": long_full[score],
        f"{score}_lora": long_lora[score],
        f"{score}_frozen_tokens": frozen[score],
        "trainable_share": long_lora["trainable_share"],
        "learning_rate_full": best_full,
        "learning_rate_lora": best_lora,
        "learning_rates_by_target": rates,
        "new_tokens": len(new_tokens),
        "sweep_full": {f"{rate:g}": found for rate, found in full.items()},
        "sweep_lora": {f"{rate:g}": found for rate, found in lora.items()},
        "table": table,
        "full": long_full,
        "lora": long_lora,
    }
    if importlib.util.find_spec("peft") is not None:
        from lora_peers import difference_to_peft

        metrics["max_difference_to_peft"] = difference_to_peft(
            start, tokenizer, chats[:8], settings, new_tokens
        )
    return stage.save(metrics, data, partial(draw, metrics=metrics, score=score))


def best_rate(sweep: dict[float, dict]) -> float:
    """留出的题答对最多的学习率；不是小世界，就是留出损失最小的。"""
    return max(sweep, key=lambda rate: sweep[rate].get("qa_accuracy", -sweep[rate]["heldout_loss"]))


def show(metrics: dict) -> None:
    score = "qa_accuracy" if "qa_accuracy_full" in metrics else "heldout_loss"
    for name, label in (("sweep_full", "全参数"), ("sweep_lora", "LoRA")):
        print(
            f"{label}，学习率 → {score}："
            + "  ".join(f"{r}: {m[score]:.3f}" for r, m in metrics[name].items())
        )
    print("装在哪里      秩    参数      占几成   AdamW 字节   秒      " + score)
    for target, row in metrics["table"].items():
        for r, m in row.items():
            print(
                f"{target:<12}{r:>4}{m['trainable']:>9,d}{m['trainable_share']:>9.1%}{m['optimizer_bytes']:>12,d}"
                f"{m['seconds']:>7.1f}{m[score]:>10.3f}"
            )
    print(
        f"没见过的字冻着（一半数据）：{metrics[f'{score}_frozen_tokens']:.3f}；全部数据：全参数 {metrics[f'{score}_full']:.3f}，"
    )
    print(f"LoRA {metrics[f'{score}_lora']:.3f}（{metrics['trainable_share']:.1%} 的参数）")
    if "max_difference_to_peft" in metrics:
        print(f"与 PEFT 的最大差（损失、梯度、三步 AdamW，float64）：{metrics['max_difference_to_peft']:.1e}")


def draw(folder: Path, metrics: dict, score: str) -> None:
    series = {}
    for name, label in (("sweep_full", "全参数|full"), ("sweep_lora", "LoRA")):
        sweep = metrics[name]
        series[label] = ([math.log10(float(r)) for r in sweep], [m[score] for m in sweep.values()])
    title = "各自最好的学习率|Each at its own learning rate"
    line_chart(folder / "rates.svg", series, title, "学习率（10 的几次方）|log10 learning rate", score)
    series = {
        target: ([math.log2(int(r)) for r in row], [m[score] for m in row.values()])
        for target, row in metrics["table"].items()
    }
    frozen = {"没见过的字冻着|frozen tokens": metrics[f"{score}_frozen_tokens"]}
    title = "秩与装在哪里|Rank and target"
    line_chart(folder / "ranks.svg", series, title, "秩（2 的几次方）|log2 rank", score, hlines=frozen)


def main(argv: list[str] | None = None) -> dict:
    settings = parse_settings(LoRASettings, PRESETS, argv, FULL_MODEL)
    if settings.preset == "full" and settings.model is None:
        settings.model = FULL_MODEL
    found = chain_model("pretrain", settings.model, settings.source)
    learn_it = partial(learn, path=found["path"])
    record = run_lesson("lora_by_hand", HOME, settings, learn_it, start=f"{found['stage']}:{found['id']}")
    show(record["metrics"])
    return record


if __name__ == "__main__":
    run_main(main)
