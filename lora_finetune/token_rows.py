"""嵌入表里只学几行：预训练里没见过的字、控制符，LoRA 冻着它们的嵌入，要另外放开。"""

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from nlp_common.lm.chatml import encode_text
from nlp_common.tiny import world


def unseen_tokens(tokenizer, rows: list[dict]) -> list[int]:
    """rows（带 input_ids）里有、小世界的预训练文档里没有的 token。"""
    seen = {i for document in world.documents(2000, seed=0) for i in encode_text(tokenizer, document["text"])}
    return sorted({token for row in rows for token in row["input_ids"]} - seen)


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
