"""LoRA：大矩阵不动，旁边添两个小矩阵，只训练它们。

（本文件的课文由这一课补全；下面是别的脚本也用的部分。）

参考：Hu et al. 2021（LoRA）；Rafailov 等之外的写法与名字随 PEFT 0.21。
"""

from nlp_common.base.cli import run_main  # noqa: F401

import math

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from nlp_common.base.errors import UserError

ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
TARGETS = {"attention": ATTENTION, "mlp": MLP, "all": ATTENTION + MLP}


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


def add_lora(model: nn.Module, target: str = "all", r: int = 8, alpha: float = 16, dropout: float = 0.0):
    """冻住 model，把名字合 target 的每个 Linear 换成 LoRALinear，返回换了哪些。

    target：attention、mlp、all（除输出层外的全部），或逗号隔开的名字（q_proj,v_proj）。一个也不合、r 太大是 UserError。
    """
    model.requires_grad_(False)
    wanted = TARGETS.get(target) or tuple(name.strip() for name in target.split(","))
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    chosen = [name for name in linears if name.rsplit(".", 1)[-1] in wanted]
    if not chosen:
        there = sorted({name.rsplit(".", 1)[-1] for name in linears})
        raise UserError(
            f"--target {target} 一个线性层也不合；模型里有 {'、'.join(there)}，或写 attention、mlp、all。"
        )
    for name in chosen:
        linear = linears[name]
        limit = min(linear.in_features, linear.out_features)
        if r > limit:
            raise UserError(
                f"--r {r} 比 {name} 的秩还大（{linear.out_features}×{linear.in_features}，最多 {limit}）。"
            )
        parent, _, last = name.rpartition(".")
        lora = LoRALinear(linear, r, alpha, dropout).to(linear.weight.device)
        setattr(model.get_submodule(parent), last, lora)
    return chosen


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


class TokenRows(nn.Module):
    """嵌入表里只训练几行：预训练里没见过的字，LoRA 冻着它们的嵌入，怎么学也学不会。

    装在 weight 上（parametrize）：用到 weight 时，那几行换成在学的 rows。等于 PEFT 的 trainable_token_indices。
    """

    def __init__(self, weight: Tensor, ids: list[int]):
        super().__init__()
        self.register_buffer("ids", torch.tensor(ids, device=weight.device))
        self.rows = nn.Parameter(weight[self.ids].detach().clone())  # (几个, H)

    def forward(self, weight: Tensor) -> Tensor:  # (V, H) → (V, H)
        return weight.index_copy(0, self.ids, self.rows)


def train_token_rows(model, ids: list[int]) -> TokenRows:
    """嵌入表的 ids 这几行可以训练；输出层与嵌入表共用权重（tie_word_embeddings）的，两边用同一份。"""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is not None and head.weight is embedding.weight
    rows = TokenRows(embedding.weight, ids)
    for module in (embedding, head) if tied else (embedding,):
        parametrize.register_parametrization(module, "weight", rows)
        module.parametrizations.weight.original.requires_grad_(False)
    return rows


def merge_token_rows(model) -> None:
    """在学的行写回嵌入表，去掉 train_token_rows 装的；共用的权重仍然共用。"""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    for module in (embedding, head):
        if module is not None and parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
    if model.config.tie_word_embeddings:
        head.weight = embedding.weight


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """名字 → 在学的参数：适配器的全部。"""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}
