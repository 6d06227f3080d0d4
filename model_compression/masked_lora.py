"""保住掩码的 LoRA：剪掉的位置合并以后还是 0。

平常的 LoRA 合并以后是 W + (α/r)BA，BA 是稠密的，剪掉的位置又都不是 0 了，白剪。这里在训练时就把 BA 乘上掩码：

    y = x (W + m ∘ (α/r)BA)ᵀ + b

参考：Lu et al. 2024（SPP）、Hu et al. 2025（LoRS）都这样保住掩码。
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calibration import linear_blocks
from nlp_common.lm.chat_rows import answer_loss, collate
from nlp_common.lm.losses import count_labels
from nlp_common.train.batches import bucketed
from nlp_common.train.stage import Stage
from prune_data import PruneData


class MaskedLora(nn.Module):
    """masked 是 False 就是平常的 LoRA：合并以后，剪掉的又不是 0 了。"""

    def __init__(self, base: nn.Linear, rank: int, alpha: float, masked: bool):
        super().__init__()
        self.base, self.scaling, self.masked = base, alpha / rank, masked
        self.mask = base.weight != 0  # (out, in)
        like = {"device": base.weight.device, "dtype": base.weight.dtype}
        self.A = nn.Parameter(torch.empty(rank, base.in_features, **like))
        self.B = nn.Parameter(torch.zeros(base.out_features, rank, **like))  # 从 0 开始：刚装上时 y 不变
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def weight(self) -> Tensor:
        """合并以后的权重，(out, in)。"""
        delta = self.scaling * self.B @ self.A
        return self.base.weight + (delta * self.mask if self.masked else delta)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, in) → (B, T, out)
        return F.linear(x, self.weight(), self.base.bias)


def add_lora(model: nn.Module, rank: int, alpha: float, masked: bool) -> list[nn.Parameter]:
    """冻住 model，解码块里每个线性层换成 MaskedLora；返回要学的参数。"""
    model.requires_grad_(False)
    learned: list[nn.Parameter] = []
    for layers in list(linear_blocks(model)):
        for name, layer in layers.items():
            lora = MaskedLora(layer, rank, alpha, masked)
            model.set_submodule(name, lora)
            learned += [lora.A, lora.B]
    return learned


@torch.no_grad()
def merge_lora(model: nn.Module) -> None:
    """BA 加进权重，MaskedLora 换回原来的线性层。"""
    for name, module in list(model.named_modules()):
        if isinstance(module, MaskedLora):
            module.base.weight.copy_(module.weight())
            model.set_submodule(name, module.base)


def recover(part: Stage, model, tokenizer, data: PruneData, masked: bool) -> dict:
    """剪过的 model 学 recover_steps 步 LoRA，合并；返回合并以后量到的，与还有几成是 0。

    masked 是 False：平常的 LoRA，合并以后剪掉的都不是 0 了，再照原来的掩码剪一次。
    """
    settings = part.settings
    masks = masks_of(model)
    learned = add_lora(model, settings.lora_r, 2.0 * settings.lora_r, masked)
    optimizer = torch.optim.AdamW(learned, lr=settings.learning_rate, weight_decay=0.0)
    lengths = [len(row["input_ids"]) for row in data.train]
    size, epoch, order = min(settings.batch_size, len(data.train)), 0, []
    model.train()
    for step in range(settings.recover_steps):
        if len(order) < size:
            order, epoch = bucketed(lengths, size, settings.seed, epoch), epoch + 1
        chosen, order = order[:size], order[size:]
        batch = collate([data.train[place] for place in chosen], tokenizer.pad_token_id)
        batch = {name: tensor.to(part.device) for name, tensor in batch.items()}
        loss = answer_loss(model, batch)[0] / count_labels(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * (1 - step / settings.recover_steps)
        optimizer.step()
        optimizer.zero_grad()
    merge_lora(model)
    model.eval()
    found = {"merged": data.measure(model, tokenizer) | {"zeros": zeros(model)}}
    if not masked:
        with torch.no_grad():
            for name, keep in masks.items():
                model.get_submodule(name).weight *= keep
        found["pruned_again"] = data.measure(model, tokenizer) | {"zeros": zeros(model)}
    return found


def masks_of(model) -> dict[str, Tensor]:
    """解码块里每个线性层留下（不是 0）的位置，{全名: (out, in) bool}。"""
    return {name: layer.weight != 0 for block in linear_blocks(model) for name, layer in block.items()}


def zeros(model) -> float:
    """解码块的线性层里，几成的权重是 0。"""
    masks = masks_of(model).values()
    return sum(int((~keep).sum()) for keep in masks) / sum(keep.numel() for keep in masks)
