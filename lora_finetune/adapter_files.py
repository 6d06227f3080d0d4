"""适配器的文件与合并好的文件：照 PEFT 的布局读写 A、B，几个适配器合成一个，导出完整的模型并核对。"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora_by_hand import LoRALinear, lora_layers
from nlp_common.base.errors import UserError
from nlp_common.base.runs import file_sha256
from nlp_common.lm.adapters import CONFIG, PREFIX, WEIGHTS, check_base, read_adapter, write_base
from nlp_common.lm.loading import load_causal_lm


@dataclass
class LoRA:
    """一层的适配器：ΔW = scaling · B A。"""

    A: Tensor  # (r, d_in)
    B: Tensor  # (d_out, r)
    scaling: float

    def delta(self) -> Tensor:
        return self.scaling * self.B @ self.A  # (d_out, d_in)


@dataclass
class Adapter:
    layers: dict[str, LoRA]  # 层的名字 → 它的 A、B
    whole: dict[str, Tensor]  # 整个换掉的权重（PEFT 的 modules_to_save），例如训练过的 lm_head


# ---------------------------------------------------------------- 1. 读、写（PEFT 的布局）


def save_adapter(folder: Path, model: nn.Module, base: str, mark: str) -> None:
    """装着 LoRALinear 的 model → PEFT 读得了的文件夹。每一层的 α/r 要相同。"""
    layers = lora_layers(model)
    first = next(iter(layers.values()))
    r = len(first.A)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, layer in layers.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = layer.A.detach().cpu().contiguous()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = layer.B.detach().cpu().contiguous()
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": r,
        "lora_alpha": first.scaling * r,
        "lora_dropout": first.dropout.p,
        "bias": "none",
        "target_modules": sorted({name.rsplit(".", 1)[-1] for name in layers}),
        "inference_mode": True,
    }
    (folder / CONFIG).write_text(json.dumps(config, ensure_ascii=False, indent=2), encoding="utf-8")
    write_base(folder, base, mark)


def base_name(given: str | None, path: str) -> str:
    """记下的原模型的名字：--model 给的 hub 名；本地的是完整的路径，从哪里都找得到。"""
    return given if given and not Path(given).expanduser().is_dir() else str(Path(path).resolve())


def load_adapter(folder: Path) -> Adapter:
    """读出各层的 A、B。手写的合并只会平常的 LoRA；DoRA、训练了偏置的等是 UserError。"""
    config = read_adapter(folder)
    odd = [
        name for name in ("use_dora", "alpha_pattern", "rank_pattern", "fan_in_fan_out") if config.get(name)
    ]
    odd += ["bias"] if config.get("bias", "none") != "none" else []
    tensors = load_file(folder / WEIGHTS)
    layers: dict[str, LoRA] = {}
    whole: dict[str, Tensor] = {}
    for key, value in tensors.items():
        name, is_lora, side = key.removeprefix(PREFIX).partition(".lora_")
        if not is_lora and name.rpartition(".")[0].rsplit(".", 1)[-1] in (
            config.get("modules_to_save") or ()
        ):
            whole[name] = value
        elif side == "A.weight":
            other = tensors.get(key.replace(".lora_A.", ".lora_B."))
            if other is None:
                raise UserError(f"适配器 {folder} 不完整：{name} 有 A，没有 B；请重新复制或重新训练它。")
            r = len(value)
            scaling = config["lora_alpha"] / (math.sqrt(r) if config.get("use_rslora") else r)
            layers[name] = LoRA(value, other, scaling)
        elif side != "B.weight":
            odd.append(key.removeprefix(PREFIX))
    if odd:
        raise UserError(
            f"适配器 {folder} 不是平常的 LoRA（{odd[0]}），手写的合并不会：请用 peft 的 merge_and_unload 合并它。"
        )
    return Adapter(layers, whole)


def put_on(model: nn.Module, adapter: Adapter) -> nn.Module:
    """把各层的 A、B 装到 model 上（LoRALinear，不训练），返回 model。"""
    for name, lora in adapter.layers.items():
        linear = model.get_submodule(name)
        layer = LoRALinear(linear, len(lora.A), lora.scaling * len(lora.A)).to(linear.weight.device)
        layer.A.data, layer.B.data = lora.A.to(linear.weight), lora.B.to(linear.weight)
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, layer)
    return model.requires_grad_(False)


# ---------------------------------------------------------------- 2. 合并


@torch.no_grad()
def merge_into(model, adapter: Adapter) -> None:
    """W ← W + ΔW，改的就是 model；整个换掉的权重也换上。float32 的模型，ΔW 也用 float32 算。"""
    for name, lora in adapter.layers.items():
        weight = model.get_submodule(name).weight
        weight += LoRA(lora.A.to(weight), lora.B.to(weight), lora.scaling).delta()
    for name, value in adapter.whole.items():
        module = model.get_submodule(name.rpartition(".")[0])
        module.weight = nn.Parameter(value.to(module.weight), requires_grad=False)  # 新的一份：不再与别人共用
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is not None and head.weight is not embedding.weight:
        untie(model)


def untie(model) -> None:
    """输出层与嵌入表已经不是同一份：配置里也要说，不然重新载入时训练过的那一份就没了（transformers 45127）。"""
    model.config.tie_word_embeddings = False


def is_tied(model) -> bool:
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


def export(model, tokenizer, folder: Path, dtype: torch.dtype = torch.float32) -> dict[str, str]:
    """合并好的 model 存成完整的文件夹，重新载入核对，返回 {文件: sha256}。

    合并已经在 float32 里做完，最后才换成 dtype（model 也跟着换了）。载入以后与存的不同（例如丢了输出层）是 UserError。
    """
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} 里已经有东西，不会动它：--export 请换一个还不存在的文件夹。")
    model.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    check_export(model, folder)
    return {path.name: file_sha256(path) for path in sorted(folder.glob("*.safetensors"))}


@torch.no_grad()
def check_export(model, folder: Path) -> None:
    """重新载入 folder，逐个权重与 model 的相同，共用的还共用；不是就是 UserError。"""
    again = load_causal_lm(str(folder))[1]
    wanted, found = model.state_dict(), again.state_dict()
    for name, value in wanted.items():
        if not torch.equal(found[name].float(), value.float().cpu()):
            raise UserError(
                f"{folder} 重新载入以后 {name} 与合并好的不同：config.json 的 tie_word_embeddings 说输出层与嵌入共用，"
                "存盘时就丢了一份。存之前把它改成 false（见 adapter_files.py 的 untie）。"
            )
    if is_tied(again) != is_tied(model):
        raise UserError(
            f"{folder} 重新载入以后，输出层与嵌入表共不共用变了：请检查 config.json 的 tie_word_embeddings。"
        )


# ---------------------------------------------------------------- 3. 几个合成一个（与 PEFT 的 add_weighted_adapter 相同）


def linear(loras: list[LoRA], weights: list[float]) -> LoRA:
    """A、B 各自加权相加，权重各开平方：快，但 (Σ√w B)(Σ√w A) 里多出 B₁A₂ 这样的交叉项，不等于 Σ w ΔW。"""
    return _sides(loras, weights, _add)


def cat(loras: list[LoRA], weights: list[float]) -> LoRA:
    """A 接着 A，B 接着 B：BA 恰好是 Σ w ΔW，一点不差；秩是几个相加。"""
    A = torch.cat([w * lora.scaling * lora.A for w, lora in zip(weights, loras, strict=True)])
    return LoRA(A, torch.cat([lora.B for lora in loras], 1), 1.0)


def svd(loras: list[LoRA], weights: list[float]) -> LoRA:
    """Σ w ΔW 里最大的 r 个奇异值（r 不变）：秩 r 里最近的（Eckart–Young）。"""
    total = sum(w * lora.delta() for w, lora in zip(weights, loras, strict=True))
    r = max(len(lora.A) for lora in loras)
    U, S, Vh = torch.linalg.svd(total, full_matrices=False)
    return LoRA(Vh[:r], U[:, :r] * S[:r], 1.0)


def ties(loras: list[LoRA], weights: list[float], density: float = 0.5) -> LoRA:
    """TIES（Yadav et al. 2023）：各留最大的几成；每个位置按总和定正负；只平均与它同号的。A、B 各做一遍。"""
    return _sides(loras, weights, _elect_sign, density, keep_largest)


def dare(loras: list[LoRA], weights: list[float], density: float = 0.5) -> LoRA:
    """DARE（Yu et al. 2023）：随机丢掉一些，剩下的除以留下的比例，期望不变；再加权相加。A、B 各做一遍。"""
    return _sides(loras, weights, _add, density, drop_at_random)


COMBINE = {"linear": linear, "cat": cat, "svd": svd, "ties": ties, "dare": dare}


def _sides(loras: list[LoRA], weights: list[float], join, density: float = 1.0, thin=None) -> LoRA:
    """A、B 各合一遍：各乘 √|w·scaling|（负号只给 A），先 thin（稀疏），再 join。"""
    shares = [w * lora.scaling for w, lora in zip(weights, loras, strict=True)]
    joined = []
    for side, sign in (("A", True), ("B", False)):
        plain = [getattr(lora, side) for lora in loras]
        thinned = [thin(tensor, density) for tensor in plain] if thin else plain
        factors = [math.copysign(math.sqrt(abs(s)), s if sign else 1) for s in shares]
        scaled = [factor * tensor for factor, tensor in zip(factors, thinned, strict=True)]
        joined.append(join(scaled, thinned))
    return LoRA(joined[0], joined[1], 1.0)


def keep_largest(tensor: Tensor, density: float) -> Tensor:
    """绝对值最大的 density 成留下，其余是 0。"""
    flat = tensor.abs().flatten()
    kept = flat.topk(int(density * len(flat))).indices
    mask = torch.zeros_like(flat)
    mask[kept] = 1
    return tensor * mask.view_as(tensor)


def drop_at_random(tensor: Tensor, density: float) -> Tensor:
    """每个以 density 的机会留下，留下的除以 density。"""
    return tensor * torch.bernoulli(torch.full_like(tensor, density)) / density


def _add(scaled: list[Tensor], thinned: list[Tensor]) -> Tensor:
    return torch.stack(scaled).sum(0)


def _elect_sign(scaled: list[Tensor], thinned: list[Tensor]) -> Tensor:
    """每个位置：稀疏以后的总和定正负，与它同号的加权平均（几个同号就除以几）。"""
    plain = torch.stack(thinned)  # (个, …)
    elected = torch.where(plain.sum(0) >= 0, 1, -1)
    agree = plain.sign() == elected
    return (torch.stack(scaled) * agree).sum(0) / agree.sum(0).clamp(min=1)


def combine(adapters: list[Adapter], weights: list[float], how: str) -> Adapter:
    """几个适配器按 weights 合成一个。层不同、秩不同而要逐个数相加的，是 UserError。"""
    names = [set(adapter.layers) for adapter in adapters]
    if any(each != names[0] for each in names) or any(adapter.whole for adapter in adapters):
        raise UserError("要合的几个适配器装的层不同（或有整个换掉的权重）：只能分开用，或各自合并成模型。")
    if how not in ("cat", "svd"):
        ranks = sorted({len(lora.A) for adapter in adapters for lora in adapter.layers.values()})
        if len(ranks) > 1:
            raise UserError(
                f"--combine {how} 要几个适配器的秩相同，给的是 {'、'.join(map(str, ranks))}：请用 --combine cat 或 svd。"
            )
    layers = {}
    for name in adapters[0].layers:
        loras = [adapter.layers[name] for adapter in adapters]
        layers[name] = COMBINE[how](loras, weights)
    return Adapter(layers, {})


def read_all(folders: dict[str, Path], model, base: str) -> list[Adapter]:
    """读几个适配器，先查是不是 base 的。"""
    for folder in folders.values():
        check_base(folder, model, base)
    return [load_adapter(folder) for folder in folders.values()]
