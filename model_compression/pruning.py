"""剪枝：一半的权重变成 0，剪哪一半，剪完怎样补？幅度、Wanda、SparseGPT，手写。

学到什么：看权重大小（magnitude）、看权重乘输入（Wanda）、剪一个就让后面的补上（SparseGPT）；剪三成到八成与 2:4 各花几道题；
剪坏了，几步保住掩码的 LoRA 找回多少；文件真的小多少，乘法真的快多少（平常的乘法：一点也不快）。

运行：
    python pruning.py                                        # Qwen 链的 SFT 模型，三种办法 × 七种稀疏度，约两分钟
    python pruning.py --shares 0.6,2:4 --methods wanda,sparsegpt --output_dir outputs/two
    python pruning.py --model smollm2                        # 真的小模型，英文，看困惑度
    python pruning.py --model 文件夹 --dataset 我的对话.jsonl --output_dir outputs/mine    # 校准用自己的对话

预期输出（实测见本文件夹的 README.md）：五成以内几乎不花题，六成开始坏，八成全坏；SparseGPT 多半好于 Wanda，可是小模型没有离群的输入，
magnitude 不比它们差；剪七成，学两百步就都找回来；乘法的时间不变。

参考：Han et al. 2015（幅度）；Sun et al. 2023（Wanda）；Frantar & Alistarh 2023（SparseGPT）；Mishra et al. 2021（2:4）。
保住掩码的 LoRA 在 masked_lora.py，存法在 sparse_weights.py，快慢在 sparse_speed.py，数据在 prune_data.py。
"""

from nlp_common.base.cli import run_main

import copy
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor

from calibration import linear_blocks, walk_blocks
from masked_lora import masks_of, recover, zeros
from nlp_common.base.arguments import COUNT, NOT_NEGATIVE, option
from nlp_common.base.errors import UserError
from nlp_common.lm.loading import load_chat_lm
from nlp_common.train.chain import chain_model
from nlp_common.train.lesson import run_lesson, run_part
from nlp_common.train.settings import parse_settings
from nlp_common.train.stage import Stage
from prune_data import CalibratedSettings, PruneData, load_data
from prune_report import draw, share_key, show
from sparse_speed import sparse_speed
from sparse_weights import save_sparse, total_bytes

HOME = Path(__file__).resolve().parent
FULL_MODEL = "Qwen/Qwen2.5-0.5B-Instruct"
METHODS = ("magnitude", "wanda", "sparsegpt")
VARIANTS = ("magnitude_row", "wanda_layer")  # 换一个范围比：magnitude 一行里比，Wanda 整个矩阵一起比
DAMPING = 0.01  # H 的对角线加上它平均的 1%：校准没有照到的方向，也不会除以 0
BLOCK = 128  # SparseGPT 一次挑几列的掩码；要是 4 的倍数
ERROR_BLOCKS = 4  # 一层一层比误差，只比前几块：几十层的模型也不用等很久
EXACT_UP_TO = 512  # 输入不超过这么宽的层，另算同一张掩码的精确最优解（一行解一个方程组，太宽就慢）
Share = float | Literal["2:4"]
PRESETS = {
    "tiny": {"batch_size": 16, "max_eval_samples": 512},
    "full": {"batch_size": 8, "max_eval_samples": 512},
}


@dataclass
class PruneSettings(CalibratedSettings):
    DEFAULTS: ClassVar[dict[bool, dict]] = {
        False: {"shares": "0.3,0.4,0.5,0.6,0.7,0.8,2:4", "n_calibration": 128, "recover_steps": 200},
        True: {"shares": "0.5,2:4", "n_calibration": 24, "recover_steps": 0},
    }

    methods: str = option(f"试哪几种，逗号隔开：{'、'.join(METHODS + VARIANTS)}", ",".join(METHODS))
    shares: str | None = option("剪几成，逗号隔开：0 到 1 之间的小数，或 2:4")
    recover_share: str = option("剪几成以后试着恢复", "0.7")
    recover_steps: int | None = option("恢复学几步；0 是不试", limits=NOT_NEGATIVE)
    batch_size: int | None = option("恢复时一步几段对话", limits=COUNT)
    lora_r: int = option("恢复的 LoRA 的秩", 8, COUNT)
    learning_rate: float = option("恢复的学习率的峰值", 2e-3)
    save: str = option("存下哪一种，写成 办法-几成；load_sparse 读得回来", "sparsegpt-0.5")

    def check(self) -> None:
        super().check()
        for name in self.methods.split(","):
            if name not in METHODS + VARIANTS:
                known = "、".join(METHODS + VARIANTS)
                raise UserError(f"--methods 不认识 {name or '空的一项'}，可以是 {known}，逗号隔开。")
        for word in self.shares.split(","):
            read_share(word, "--shares")
        read_share(self.recover_share, "--recover_share")
        method, _, share = self.save.partition("-")
        if method not in METHODS + VARIANTS:
            raise UserError(f"--save 要写成 办法-几成，例如 sparsegpt-0.5，给的是 {self.save}。")
        read_share(share, "--save")


def read_share(word: str, flag: str = "share") -> Share:
    """ "0.5" → 0.5，"2:4" → "2:4"；别的是 UserError，说出是 flag 给的。"""
    if word == "2:4":
        return "2:4"
    try:
        share = float(word)
    except ValueError:
        share = -1.0
    if not 0 <= share < 1:
        raise UserError(f"{flag} 要是 0 到 1 之间的小数（不到 1），或 2:4，给的是 {word or '空的一项'}。")
    return share


# ---------------------------------------------------------------- 1. 一个矩阵


def two_of_four(score: Tensor) -> Tensor:
    """score (out, in) → 留下的位置：每四个相邻的输入里，分高的两个。"""
    fours = score.unflatten(1, (-1, 4))  # (out, in/4, 4)
    places = fours.topk(2, dim=-1).indices
    return torch.zeros_like(fours, dtype=torch.bool).scatter(-1, places, True).flatten(1)


def keep_highest(score: Tensor, share: Share) -> Tensor:
    """score (…, n)：最后一维里分最低的 share 成剪掉 → 留下的位置，bool。"""
    if share == "2:4":
        return two_of_four(score)
    n_pruned = round(score.shape[-1] * share)
    pruned = score.topk(n_pruned, dim=-1, largest=False).indices
    return torch.ones_like(score, dtype=torch.bool).scatter(-1, pruned, False)


def magnitude_mask(weight: Tensor, share: Share, by_row: bool = False) -> Tensor:
    """绝对值小的剪掉，整个矩阵一起比。不看输入，不要校准。"""
    return mask_of(weight.abs(), share, by_row)


def wanda_mask(weight: Tensor, x: Tensor, share: Share, by_row: bool = True) -> Tensor:
    """|W_ij| · ‖x_j‖ 小的剪掉，一个输出的各个输入之间比；x (N, in) 是这一层收到的输入。

    小权重乘上大输入，也要紧：输出里少掉的正是 W_ij x_j。一行里比：每个输出都留一样多。
    """
    return mask_of(weight.abs() * x.norm(dim=0), share, by_row)


def mask_of(score: Tensor, share: Share, by_row: bool) -> Tensor:
    if by_row or share == "2:4":
        return keep_highest(score, share)
    return keep_highest(score.flatten(), share).view_as(score)


def hessian_of(x: Tensor) -> Tensor:
    """‖(W' − W)X‖² 对 W' 一行的二阶导数 H = 2XXᵀ（X 一列一个 token；这里 x 一行一个，所以是 2xᵀx），加 1% 阻尼。float64。"""
    x = x.double()
    h = 2 * x.T @ x  # (in, in)
    return h + DAMPING * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype, device=h.device)


def sparsegpt(weight: Tensor, h: Tensor, share: Share | Tensor, block: int = BLOCK) -> Tensor:
    """剪过、补过的 W'，(out, in) float64。share 也可以是一张现成的掩码 (out, in)，True 是留下。

    从左到右一列一列地剪。剪掉 w_j，右边还没轮到的列怎样补、误差多少，OBS 有公式（左边的不再动）：

        Δw = −w_j / [H⁻¹]_jj · [H⁻¹]_j,:        ε = w_j² / (2[H⁻¹]_jj)

    H⁻¹ 是只剩第 j 列以后那一块 H 的逆，一列一列会变。不必次次求逆：H⁻¹ = UᵀU（U 上三角）的第 j 行，
    除以 U_jj 正是 [H⁻¹]_j,: / [H⁻¹]_jj，而 [H⁻¹]_jj = U_jj²。
    """
    w = weight.double().clone()
    n_in = w.shape[1]
    u = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)  # (in, in)
    keep = share if isinstance(share, Tensor) else torch.ones_like(w, dtype=torch.bool)
    for start in range(0, n_in, block):
        end = min(start + block, n_in)
        if not isinstance(share, Tensor) and share != "2:4":  # 一块的掩码一起挑，轮到时前面的已经补过
            score = w[:, start:end] ** 2 / u.diagonal()[start:end] ** 2  # 2ε，(out, block)
            keep[:, start:end] = keep_highest(score.flatten(), share).view_as(score)
        errors = torch.zeros_like(w[:, start:end])
        for j in range(start, end):
            if not isinstance(share, Tensor) and share == "2:4" and j % 4 == 0:  # 四列四列地挑
                score = w[:, j : j + 4] ** 2 / u.diagonal()[j : j + 4] ** 2
                keep[:, j : j + 4] = two_of_four(score)
            kept = w[:, j] * keep[:, j]
            error = (w[:, j] - kept) / u[j, j]  # (out,)；留下的是 0
            w[:, j:end] -= error[:, None] * u[j, j:end]  # 块里的马上补
            w[:, j] = kept
            errors[:, j - start] = error
        w[:, end:] -= errors @ u[start:end, end:]  # 块外面的攒到一起补：一次矩阵乘法，快得多
    return w


def least_squares(weight: Tensor, h: Tensor, keep: Tensor) -> Tensor:
    """掩码 keep 定了，留下的全都能改（左边的也能）时的最优解，一行一个方程组：SparseGPT 离它还有多远。

    min (w' − w)H(w' − w)ᵀ，w'_P = 0  ⟹  w'_K = w_K + H_KK⁻¹ H_KP w_P
    """
    w = weight.double()
    best = torch.zeros_like(w)
    for row in range(len(w)):
        k, p = keep[row], ~keep[row]
        best[row, k] = w[row, k] + torch.linalg.solve(h[k][:, k], h[k][:, p] @ w[row, p])
    return best


def relative_error(new: Tensor, old: Tensor, h: Tensor) -> float:
    """‖(W' − W)X‖ / ‖WX‖。"""
    change, old = new.double() - old.double(), old.double()
    return (((change @ h) * change).sum() / ((old @ h) * old).sum()).sqrt().item()


# ---------------------------------------------------------------- 2. 整个模型


@torch.no_grad()
def prune(model, tokenizer, rows: list[dict], method: str, share: Share) -> dict[str, Tensor]:
    """就地剪解码块里的每个线性层（嵌入、输出层、归一不剪）→ {全名: 留下的位置}。rows 是校准的 chat_row。

    一块剪好了，下一块收到的输入就是剪过的模型给的：前面的误差，后面看得见。
    """
    check(model, rows, method, share)
    masks = {}
    if method.startswith("magnitude"):
        for layers in linear_blocks(model):
            for name, layer in layers.items():
                masks[name] = magnitude_mask(layer.weight, share, by_row=method == "magnitude_row")
                layer.weight *= masks[name]
        return masks
    for layers, inputs in walk_blocks(model, rows, tokenizer.pad_token_id):
        before = h = None
        for name, layer in layers.items():
            x = inputs[name]  # (N, in)
            check_inputs(name, x, method)
            if method.startswith("wanda"):
                masks[name] = wanda_mask(layer.weight, x, share, by_row=method == "wanda")
                layer.weight *= masks[name]
            else:
                if before is None or not torch.equal(x, before):  # Q、K、V 收到的是同一份，H 只算一次
                    before, h = x, hessian_of(x)
                layer.weight.copy_(sparsegpt(layer.weight, h, share))
                masks[name] = layer.weight != 0
    return masks


def check(model, rows: list[dict], method: str, share: Share) -> None:
    """剪之前就知道不行的。"""
    if method not in METHODS + VARIANTS:
        raise UserError(f"剪枝的办法不认识 {method}，可以是 {'、'.join(METHODS + VARIANTS)}。")
    read_share(str(share))
    if any(getattr(model.config, name, None) for name in ("quantization_config", "packed")):
        raise UserError("这个模型已经量化过：剪枝会改权重，改过就不在它的格子上了。先剪枝，再量化。")
    layers = {name: layer for block in linear_blocks(model) for name, layer in block.items()}
    if not layers:
        raise UserError(
            f"{type(model).__name__} 的解码块里没有 nn.Linear，不知道剪什么：换成 Qwen2、Llama 一类的。"
        )
    odd = [f"{name}（{layer.in_features}）" for name, layer in layers.items() if layer.in_features % 4]
    if share == "2:4" and odd:
        raise UserError(
            f"2:4 要每层的输入宽度是 4 的倍数，{len(odd)} 层不是，例如 {odd[0]}：换成 0.5 这样的。"
        )
    if not method.startswith("magnitude") and not rows:
        raise UserError(
            f"{method} 要看输入，校准的对话一段也没有：看看 --dataset 指的文件，或调大 --n_calibration。"
        )


def check_inputs(name: str, x: Tensor, method: str) -> None:
    """校准给这一层的输入够不够、坏没坏。"""
    if not x.isfinite().all() or not x.any():
        raise UserError(
            f"校准时 {name} 收到的输入全是 0，或有无穷大、NaN：模型的权重坏了，或校准的对话不对。"
        )
    if method == "sparsegpt" and len(x) < x.shape[1]:
        raise UserError(
            f"校准太少：一共 {len(x)} 个 token，而 {name} 有 {x.shape[1]} 个输入，H 不满秩，补不准。"
            "把 --n_calibration 调大，或用 --methods magnitude,wanda。"
        )


# ---------------------------------------------------------------- 3. 全课


@torch.no_grad()
def layer_errors(part: Stage, model, tokenizer, rows: list[dict], share: Share) -> dict:
    """不动模型，每一层各剪一次：同样的输入、同样的几成，输出差多少。*_exact 是同一张掩码的最优解。"""
    found, ratios = {}, {}
    for layers, inputs in islice(walk_blocks(model, rows, tokenizer.pad_token_id), ERROR_BLOCKS):
        for name, layer in layers.items():
            w, x = layer.weight, inputs[name]
            check_inputs(name, x, "sparsegpt")
            h, norms = hessian_of(x), x.norm(dim=0)
            ratios[name] = (norms.max() / norms.median()).item()  # 最大的输入是平常的几倍：有没有离群的
            pruned = {
                "magnitude": w * magnitude_mask(w, share),
                "wanda": w * wanda_mask(w, x, share),
                "sparsegpt": sparsegpt(w, h, share),
            }
            if layer.in_features <= EXACT_UP_TO:
                for method in ("wanda", "sparsegpt"):
                    pruned[f"{method}_exact"] = least_squares(w, h, pruned[method] != 0)
            found[name] = {key: relative_error(new, w, h) for key, new in pruned.items()}
    keys = {key for its in found.values() for key in its}
    means = {key: [its[key] for its in found.values() if key in its] for key in sorted(keys)}
    mean = {key: sum(each) / len(each) for key, each in means.items()}
    return {"layers": found, "mean": mean, "norm_ratio": sum(ratios.values()) / len(ratios)}


def prune_copy(part: Stage, copied, tokenizer, data: PruneData, method: str, share: Share) -> dict:
    """把 copied 剪了，量一量。"""
    prune(copied, tokenizer, data.calibration, method, share)
    return data.measure(copied, tokenizer) | {"zeros": zeros(copied)}


def learn(stage: Stage, path: str) -> dict:
    settings = stage.settings
    tokenizer, model = load_chat_lm(path, stage.device)
    model.eval()
    data = load_data(settings, tokenizer)
    methods, shares = settings.methods.split(","), settings.shares.split(",")
    kept = tuple(settings.save.split("-"))
    runs = [(method, share) for share in shares for method in methods]
    for method, share in [*runs, kept]:  # 不行的，剪第一个之前就说
        check(model, data.calibration, method, read_share(share))
    metrics: dict = {
        "n_calibration_tokens": sum(len(row["input_ids"]) for row in data.calibration),
        "dense": data.measure(model, tokenizer),
        "methods": {method: {} for method in methods},
    }
    rows = data.calibration
    if set(methods) == set(METHODS):
        work = partial(layer_errors, model=model, tokenizer=tokenizer, rows=rows, share=0.5)
        metrics["errors"] = run_part(stage, "errors", work)
    saved = copy.deepcopy(model)
    for method, share in runs:
        print(f"{method} {share} …", flush=True)
        copied = saved if (method, share) == kept else copy.deepcopy(model)
        work = partial(
            prune_copy, copied=copied, tokenizer=tokenizer, data=data, method=method, share=read_share(share)
        )
        key = f"{method}_{share_key(share)}"
        metrics["methods"][method][share_key(share)] = run_part(
            stage, key, work, copied if copied is saved else None
        )
    if kept not in runs:
        prune(saved, tokenizer, rows, kept[0], read_share(kept[1]))
    if settings.recover_steps:
        metrics["recovered"] = recover_each(stage, model, tokenizer, data, methods)
    metrics["speed"] = run_part(stage, "speed", lambda part: sparse_speed(part.settings.seed))
    masks = masks_of(saved)
    metrics["bytes"] = total_bytes(masks)

    def write(folder: Path) -> None:
        saved.save_pretrained(folder / "pruned")  # 平常的文件夹：0 也照存，一个字节也不省
        tokenizer.save_pretrained(folder / "pruned")
        save_sparse(folder / "sparse", saved, tokenizer, masks)
        draw(folder, metrics)

    return stage.save(metrics, data.source, write)


def recover_each(stage: Stage, model, tokenizer, data: PruneData, methods: list[str]) -> dict:
    """每种办法剪 recover_share 成，学几步保住掩码的 LoRA；最后一种再用平常的 LoRA 学一遍，作对照。"""
    settings = stage.settings
    found = {}
    for method, masked in [*((method, True) for method in methods), (methods[-1], False)]:
        key = method if masked else "plain"
        print(f"恢复 {key} …", flush=True)
        copied = copy.deepcopy(model)
        prune(copied, tokenizer, data.calibration, method, read_share(settings.recover_share))
        work = partial(recover, model=copied, tokenizer=tokenizer, data=data, masked=masked)
        found[key] = run_part(stage, f"recover_{key}", work)
    return found


def main(argv: list[str] | None = None) -> dict:
    settings = parse_settings(PruneSettings, PRESETS, argv, FULL_MODEL)
    if settings.preset == "full" and settings.model is None:
        settings.model = FULL_MODEL
    found = chain_model("sft", settings.model, settings.source)
    learn_it = partial(learn, path=found["path"])
    name = "pruning" + ("_smollm2" if settings.model == "smollm2" else "")
    record = run_lesson(name, HOME, settings, learn_it, start=f"{found['stage']}:{found['id']}")
    show(record["metrics"], settings)
    return record


if __name__ == "__main__":
    run_main(main)
