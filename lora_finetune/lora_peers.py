"""与 PEFT 比：同样的 A、B，同样的一批，损失、每个梯度、三步 AdamW 之后的参数最多差多少。"""

import copy

import torch

from lora_by_hand import add_lora, lora_layers, trainable
from nlp_common.lm.adapters import require_peft
from nlp_common.lm.chat_rows import answer_loss, chat_row, collate
from token_rows import train_token_rows


def peft_twin(start, r: int, alpha: float, names: list[str], token_ids: list[int]):
    """PEFT 的 LoRA，装在 names 那些层上；token_ids 的嵌入也学。"""
    peft = require_peft()
    config = peft.LoraConfig(
        r=r,
        lora_alpha=alpha,
        target_modules=names,
        trainable_token_indices=token_ids or None,
        task_type="CAUSAL_LM",
    )
    return peft.get_peft_model(copy.deepcopy(start), config)


def difference_to_peft(start, tokenizer, chats: list[dict], settings, token_ids: list[int]) -> float:
    """float64，三步 AdamW：两边的损失、梯度、参数最多差多少。"""
    start = copy.deepcopy(start).double()
    rows = [chat_row(tokenizer, chat["messages"]) for chat in chats]
    batch = collate(rows, tokenizer.pad_token_id)
    batch = {name: tensor.to(start.device) for name, tensor in batch.items()}
    ours = copy.deepcopy(start)
    alpha = settings.alpha_over_r * settings.r
    names = add_lora(ours, settings.target, settings.r, alpha)
    ours.double()
    train_token_rows(ours, token_ids)
    theirs = peft_twin(start, settings.r, alpha, names, token_ids).double()
    pairs = matched_parameters(ours, theirs)
    with torch.no_grad():
        for mine, other in pairs:
            other.copy_(mine)
    optimizers = [torch.optim.AdamW([pair[i] for pair in pairs], 1e-2, weight_decay=0.0) for i in (0, 1)]
    worst = 0.0
    for _ in range(3):
        losses = [answer_loss(model, batch)[0] for model in (ours, theirs)]
        worst = max(worst, (losses[0] - losses[1]).abs().item())
        for loss in losses:
            loss.backward()
        worst = max(worst, *((mine.grad - other.grad).abs().max().item() for mine, other in pairs))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        worst = max(worst, *((mine - other).abs().max().item() for mine, other in pairs))
    return worst


def matched_parameters(ours, theirs) -> list[tuple[torch.nn.Parameter, torch.nn.Parameter]]:
    """两边在学的参数，一对一对；有一个没有对上就是 KeyError。"""
    other = dict(trainable(theirs))
    pairs = []
    for name, layer in lora_layers(ours).items():
        for mine, kind in ((layer.A, "lora_A"), (layer.B, "lora_B")):
            pairs.append((mine, other.pop(f"base_model.model.{name}.{kind}.default.weight")))
    rows = [p for name, p in trainable(ours).items() if name.endswith(".rows")]
    deltas = [name for name in other if "token_adapter" in name]
    for mine, name in zip(rows, deltas, strict=True):
        pairs.append((mine, other.pop(name)))
    if other:
        raise KeyError(f"PEFT 多出了 {list(other)}")
    return pairs
