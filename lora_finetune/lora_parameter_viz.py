"""训练到底给 W 加上了什么？把 LoRA 的 ΔW 与全参数微调的 ΔW 画出来，数一数它们的秩。

学到什么：ΔW = (α/r)BA 长什么样，为什么像格子布；全参数的 ΔW 秩有多高，其中真正要紧的有几个方向；
参数怎样数；刚装上时为什么什么也不变；学到的东西落在哪一层、哪个矩阵里。

运行：
    python lora_parameter_viz.py                       # SFT 的小模型再学"抽取"，全参数与 LoRA 各一次；约一分钟
    python lora_parameter_viz.py --r 1 --output_dir outputs/viz-r1
    python lora_parameter_viz.py --task recap --output_dir outputs/viz-recap
    python lora_parameter_viz.py --dataset 我的对话.jsonl --output_dir outputs/viz-mine   # 学自己的对话，看留出损失
    python lora_parameter_viz.py --preset full         # Qwen1.5-0.5B，需要加速器

预期输出（tiny，实测见本文件夹的 README.md）：全参数的 ΔW 要几十个方向才有九成，LoRA 的不到 r 个；可是只留最大的几个方向，答得一样好。

参考：Hu et al. 2021（LoRA，第 7 节：ΔW 的秩）；Aghajanyan et al. 2020（内在维度）；Eckart & Young 1936（截断 SVD 是最近的低秩矩阵）。
"""

from nlp_common.base.cli import run_main

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from lora_by_hand import add_lora, lora_layers, merge_lora, trainable
from nlp_common.base.arguments import COUNT, POSITIVE, option
from nlp_common.base.errors import UserError
from nlp_common.draw.plots import line_chart, render
from nlp_common.lm.chat_rows import chat_row, collate
from nlp_common.train.chain import chain_model
from nlp_common.train.lesson import run_lesson, run_part
from nlp_common.train.settings import LoopSettings, parse_settings
from nlp_common.train.sft import train_on_chats
from nlp_common.train.stage import Stage
from start import fill_in, load_start
from tasks import NEW_TASKS, OWN, score, score_key, score_name, task_chats, use_own

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HOME = Path(__file__).resolve().parent
FULL_MODEL = "Qwen/Qwen1.5-0.5B"
PRESETS = {
    "tiny": {"dataset": "tiny_world", "max_train_samples": 3200},
    "full": {"dataset": "tiny_world", "max_train_samples": 4000},
}
SMALL = {"learning_rate": 5e-3, "full_learning_rate": 2e-3}  # 小世界的模型
REAL = {"learning_rate": 2e-4, "full_learning_rate": 2e-5}  # 真的模型
LEVEL = 0.9  # 有效秩：几个方向才占平方和的九成
KEPT = (1, 2, 4, 8, 16, 32)  # 全参数的 ΔW 只留最大的几个方向


@dataclass
class VizSettings(LoopSettings):
    COMMON: ClassVar[dict] = LoopSettings.COMMON | {
        "per_device_train_batch_size": 16,
        "adam_beta2": 0.98,
        "max_length": 512,
        "save_steps": 1000,
    }
    model: str | None = option("从哪个模型开始；默认是 Qwen 链 tiny 预设的 SFT 模型")
    source: Literal["hf", "modelscope"] = option("hub 名从哪里下载", "hf")
    dataset: str | None = option(
        "学什么：tiny_world 照 --task；自己的对话给文件、文件夹或 hub 名，写法同 SFT"
    )
    task: str = option(f"小世界里学哪样：qa、{'、'.join(NEW_TASKS)}", "extract")
    r: int = option("LoRA 的秩", 8, COUNT)
    alpha_over_r: float = option("α/r：增量放大几倍", 2.0, POSITIVE)
    target: str = option("装在哪里：attention、mlp、all，或逗号隔开的层名", "all")
    learning_rate: float | None = option("LoRA 的学习率")
    full_learning_rate: float | None = option("全参数的学习率", limits=POSITIVE)
    n_questions: int = option("留出几道题", 200, COUNT)

    def check(self) -> None:
        fill_in(self, SMALL, REAL)
        if self.task not in ("qa", *NEW_TASKS):
            raise UserError(f"--task 不认识 {self.task}，可以是 qa、{'、'.join(NEW_TASKS)}。")
        if self.dataset != "tiny_world":
            self.task = OWN


# ---------------------------------------------------------------- 1. 数


def lora_count(shapes: list[tuple[int, int]], r: int) -> int:
    """Σ r(d_in + d_out)：A 是 (r, d_in)，B 是 (d_out, r)。"""
    return sum(r * (d_out + d_in) for d_out, d_in in shapes)


def effective_rank(singular: Tensor, level: float = LEVEL) -> int:
    """最少要几个方向，才占平方和的 level；‖ΔW‖² = Σ σᵢ²。全是 0 的矩阵是 0。"""
    energy = singular.double() ** 2
    if energy.sum() == 0:
        return 0
    share = energy.cumsum(0) / energy.sum()
    return int((share < level).sum()) + 1


def decompose(deltas: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """每个矩阵的奇异值分解 (U, σ, Vᵀ)。"""
    return {name: tuple(torch.linalg.svd(delta, full_matrices=False)) for name, delta in deltas.items()}


def low_rank(parts: tuple[Tensor, Tensor, Tensor], k: int) -> Tensor:
    """秩不超过 k 的矩阵里离原来最近的：只留最大的 k 个奇异值（Eckart & Young 1936）。"""
    u, s, v = parts
    return u[:, :k] * s[:k] @ v[:k]


# ---------------------------------------------------------------- 2. 同样的对话，两种学法


def train(part: Stage, model, tokenizer, chats: list[dict], rate: float) -> dict:
    part.settings = replace(part.settings, learning_rate=rate)
    trained = train_on_chats(part, part.name, model, tokenizer, chats)
    return {"seconds": trained.metrics["train_seconds"]}


@torch.no_grad()
def logits_moved(start, model, tokenizer, chats: list[dict]) -> float:
    """两个模型的 logits 最多差多少。"""
    batch = collate([chat_row(tokenizer, chat["messages"]) for chat in chats], tokenizer.pad_token_id)
    ids = batch["input_ids"].to(start.device)
    return (start(ids).logits - model(ids).logits).abs().max().item()


# ---------------------------------------------------------------- 3. ΔW


@torch.no_grad()
def full_deltas(start, model, names: list[str]) -> dict[str, Tensor]:
    return {
        name: model.get_submodule(name).weight.cpu() - start.get_submodule(name).weight.cpu()
        for name in names
    }


@torch.no_grad()
def outside_share(start, model, deltas: dict[str, Tensor]) -> float:
    """全参数的改动，有几成（平方和）在 deltas 以外：嵌入、归一化、偏置。"""
    before = dict(start.named_parameters())
    total = sum(((p - before[name]) ** 2).sum().item() for name, p in model.named_parameters())
    return 1 - sum((d**2).sum().item() for d in deltas.values()) / total


@torch.no_grad()
def examine(start, full: dict[str, Tensor], lora: dict[str, Tensor]) -> list[dict]:
    """每个矩阵一行：两边的奇异值、有效秩、改了几成（‖ΔW‖ / ‖W‖）。"""
    rows = []
    for name in lora:
        weight = start.get_submodule(name).weight.cpu()
        row = {"name": name, "layer": layer_of(name), "kind": name.rsplit(".", 1)[-1]}
        row["start_effective_rank"] = effective_rank(torch.linalg.svdvals(weight))
        for side, delta in (("full", full[name]), ("lora", lora[name])):
            singular = torch.linalg.svdvals(delta)
            row[f"{side}_singular"] = singular.tolist()
            row[f"{side}_effective_rank"] = effective_rank(singular)
            row[f"{side}_norm"] = (delta.norm() / weight.norm()).item()
        rows.append(row)
    return rows


def layer_of(name: str) -> int:
    """model.layers.1.mlp.up_proj → 1；不在哪一层里的是 −1。"""
    return next((int(part) for part in name.split(".") if part.isdigit()), -1)


def mean(rows: list[dict], key: str) -> float:
    return sum(row[key] for row in rows) / len(rows)


def mean_by(rows: list[dict], group: str, key: str) -> dict[str, float]:
    """group（层、矩阵的种类）→ 其中各行 key 的平均。"""
    groups = dict.fromkeys(row[group] for row in rows)
    return {str(g): mean([row for row in rows if row[group] == g], key) for g in groups}


@torch.no_grad()
def keep_directions(start, full_model, parts: dict[str, tuple], k: int) -> torch.nn.Module:
    """全参数学完的模型，各矩阵的 ΔW 只留最大的 k 个方向；嵌入、归一化照旧是学完的。"""
    model = copy.deepcopy(full_model)
    for name, its in parts.items():
        weight = model.get_submodule(name).weight
        weight.copy_(start.get_submodule(name).weight + low_rank(its, k).to(weight.device))
    return model


# ---------------------------------------------------------------- 4. 全课


def learn(stage: Stage, path: str) -> dict:
    settings = stage.settings
    source = use_own(settings, settings.dataset)
    tokenizer, start = load_start(path, stage.device)
    chats = task_chats(settings.task, settings.max_train_samples, settings.seed)
    questions = task_chats(settings.task, settings.n_questions, seed=0, heldout=True)
    measure = partial(score, tokenizer=tokenizer, task=settings.task, questions=questions)
    key = score_key(settings.task)
    metrics = {f"{key}_before": measure(start)}

    # LoRA：装上，数，看一眼 B = 0 时什么也没变，再学
    model = copy.deepcopy(start)
    names = add_lora(model, settings.target, settings.r, settings.alpha_over_r * settings.r)
    shapes = [tuple(start.get_submodule(name).weight.shape) for name in names]
    metrics["trainable"] = sum(p.numel() for p in trainable(model).values())
    assert metrics["trainable"] == lora_count(shapes, settings.r)
    metrics["trainable_share"] = metrics["trainable"] / sum(p.numel() for p in start.parameters())
    metrics["start_logit_difference"] = logits_moved(start, model, tokenizer, chats[:8])
    work = partial(train, model=model, tokenizer=tokenizer, chats=chats, rate=settings.learning_rate)
    metrics["lora_seconds"] = run_part(stage, "lora", work, model)["seconds"]
    lora = {name: layer.delta().detach().cpu() for name, layer in lora_layers(model).items()}
    metrics[f"{key}_lora"] = measure(merge_lora(model))

    # 全参数：同样的对话，学习率小几倍
    model = copy.deepcopy(start)
    work = partial(train, model=model, tokenizer=tokenizer, chats=chats, rate=settings.full_learning_rate)
    metrics["full_seconds"] = run_part(stage, "full", work, model)["seconds"]
    full = full_deltas(start, model, names)
    if not any(delta.any() for delta in (*full.values(), *lora.values())):
        raise UserError(
            "没有学到，ΔW 全是 0：步数太少，学习率还在预热（第一步是 0）。"
            "请多给几步（--max_steps、--max_train_samples），或不预热（--warmup_steps 0）。"
        )
    metrics[f"{key}_full"] = measure(model)
    metrics["full_outside_share"] = outside_share(start, model, full)

    rows = examine(start, full, lora)
    metrics |= {
        key: mean(rows, key) for key in ("start_effective_rank", "full_effective_rank", "lora_effective_rank")
    }
    for side in ("full", "lora"):
        metrics[f"{side}_norm_by_kind"] = mean_by(rows, "kind", f"{side}_norm")
        metrics[f"{side}_norm_by_layer"] = mean_by(rows, "layer", f"{side}_norm")
    parts = decompose(full)
    metrics[f"{key}_kept"] = {str(k): measure(keep_directions(start, model, parts, k)) for k in (0, *KEPT)}
    metrics["modules"] = rows
    return stage.save(metrics, {"train": source}, partial(draw, rows=rows, full=full, lora=lora))


def show(metrics: dict, task: str) -> None:
    key, what = score_key(task), score_name(task).split("|")[0]
    print(f"在学的参数 {metrics['trainable']:,d}（{metrics['trainable_share']:.1%}）＝ Σ r(d_in + d_out)")
    print(f"刚装上（B = 0），logits 最多差 {metrics['start_logit_difference']:g}")
    print("矩阵                                有效秩：W   全参数 ΔW   LoRA ΔW    ‖ΔW‖/‖W‖：全参数   LoRA")
    for row in metrics["modules"]:
        print(
            f"{row['name']:<34}{row['start_effective_rank']:>11d}{row['full_effective_rank']:>12d}"
            f"{row['lora_effective_rank']:>10d}{row['full_norm']:>22.3f}{row['lora_norm']:>8.3f}"
        )
    print(f"全参数的 ΔW 只留最大的几个方向，{what}（学之前 {metrics[f'{key}_before']:.3f}）：")
    print("  ".join(f"{k} 个 {value:.3f}" for k, value in metrics[f"{key}_kept"].items()))
    print(f"  全留 {metrics[f'{key}_full']:.3f}；LoRA {metrics[f'{key}_lora']:.3f}")


# ---------------------------------------------------------------- 5. 图


def draw(folder: Path, rows: list[dict], full: dict[str, Tensor], lora: dict[str, Tensor]) -> None:
    draw_deltas(folder / "deltas.png", rows, full, lora)
    draw_spectrum(folder / "spectrum.svg", rows)
    draw_where(folder / "where.png", rows)


def draw_spectrum(path: Path, rows: list[dict]) -> None:
    """横轴是留几个方向，纵轴是占了平方和的几成（各矩阵平均）。"""
    series = {}
    for side, title in (("full", "全参数 ΔW|full ΔW"), ("lora", "LoRA ΔW")):
        n = min(len(row[f"{side}_singular"]) for row in rows)
        shares = []
        for row in rows:
            energy = torch.tensor(row[f"{side}_singular"]).double() ** 2
            shares.append((energy.cumsum(0) / energy.sum().clamp_min(1e-30))[:n])
        series[title] = (list(range(n + 1)), [0.0, *torch.stack(shares).mean(0).tolist()])
    line_chart(
        path,
        series,
        "奇异值：几个方向占了多少|Singular values",
        "最大的几个方向|largest directions",
        "占平方和几成|share of squared norm",
        hlines={"九成|90%": LEVEL},
    )


def tile(delta: Tensor, size: int = 48) -> Tensor:
    """矩阵缩成 size × size：每隔几行、几列取一个，除以其中 99% 的数不超过的大小。"""
    rows = torch.linspace(0, delta.shape[0] - 1, size).round().long()
    columns = torch.linspace(0, delta.shape[1] - 1, size).round().long()
    small = delta[rows][:, columns]
    return small / small.abs().flatten().quantile(0.99).clamp_min(1e-12)


def draw_deltas(path: Path, rows: list[dict], full: dict[str, Tensor], lora: dict[str, Tensor]) -> None:
    """一列一种矩阵，一行一层，上面全参数，下面 LoRA；最多画三层：头、中、尾。"""
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    layers = shown_layers(rows)
    size, gap = 48, 6
    image = torch.full((len(layers) * 2 * (size + gap), len(kinds) * (size + gap)), torch.nan)
    labels = []
    for i, layer in enumerate(layers):
        for j, (side, deltas) in enumerate((("全参数|full", full), ("LoRA|LoRA", lora))):
            top = (2 * i + j) * (size + gap)
            zh, en = side.split("|")
            labels.append((top + size / 2, f"第 {layer} 层 {zh}|layer {layer} {en}"))
            for row in rows:
                if row["layer"] == layer:
                    left = kinds.index(row["kind"]) * (size + gap)
                    image[top : top + size, left : left + size] = tile(deltas[row["name"]], size)

    def paint(axes: "Axes", text: Callable[[str], str]) -> None:
        axes.figure.set_figheight(1.0 + 0.95 * len(labels))
        axes.grid(False)
        axes.imshow(image.numpy(), cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
        axes.set_xticks([k * (size + gap) + size / 2 for k in range(len(kinds))], kinds)
        axes.set_yticks([y for y, _ in labels], [text(label) for _, label in labels])
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)

    render(path, paint, [], ("ΔW：红加蓝减|ΔW: red +, blue −", "", ""), min_width=8.5 * len(kinds))


def shown_layers(rows: list[dict]) -> list[int]:
    layers = sorted({row["layer"] for row in rows})
    return layers if len(layers) <= 3 else [layers[0], layers[len(layers) // 2], layers[-1]]


def draw_where(path: Path, rows: list[dict]) -> None:
    """改了几成（‖ΔW‖ / ‖W‖）：左半边全参数，右半边 LoRA，各自一列一种矩阵，一行一层。"""
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    layers = sorted({row["layer"] for row in rows})
    width = len(kinds)
    image = torch.full((len(layers), 2 * width + 1), torch.nan)
    for row in rows:
        for offset, side in ((0, "full"), (width + 1, "lora")):
            image[layers.index(row["layer"]), offset + kinds.index(row["kind"])] = row[f"{side}_norm"]

    def paint(axes: "Axes", text: Callable[[str], str]) -> None:
        axes.figure.set_figheight(1.8 + 0.4 * len(layers))
        axes.grid(False)
        shown = axes.imshow(image.numpy(), cmap="Blues", vmin=0, aspect="auto")
        axes.figure.colorbar(shown, ax=axes, label=text("‖ΔW‖ / ‖W‖"))
        places = [*range(width), *range(width + 1, 2 * width + 1)]
        axes.set_xticks(places, [*kinds, *kinds], rotation=60, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(len(layers)), [str(layer) for layer in layers])
        axes.spines[:].set_visible(False)

    title = "学到的落在哪里：左全参数，右 LoRA|Where it went: full (left), LoRA (right)"
    render(path, paint, [], (title, "", "层|layer"), min_width=5.0 * width)


def main(argv: list[str] | None = None) -> dict:
    settings = parse_settings(VizSettings, PRESETS, argv, FULL_MODEL)
    if settings.preset == "full" and settings.model is None:
        settings.model = FULL_MODEL
    found = chain_model("sft", settings.model, settings.source)
    learn_it = partial(learn, path=found["path"])
    record = run_lesson(
        "lora_parameter_viz", HOME, settings, learn_it, start=f"{found['stage']}:{found['id']}"
    )
    show(record["metrics"], settings.task)
    return record


if __name__ == "__main__":
    run_main(main)
