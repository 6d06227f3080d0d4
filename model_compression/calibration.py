"""校准：压缩一层之前，先看它真正收到什么输入。Wanda、SparseGPT、GPTQ、AWQ 都要。

一块一块地压：前面的块压过了，后面的块收到的就是压过的模型给的输入，误差不会越积越多而没有人看见。
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from nlp_common.base.errors import UserError
from nlp_common.lm.chat_rows import chat_row, collate
from nlp_common.tiny import world


def calibration_rows(tokenizer, n: int, seed: int, chats: list[dict] | None = None) -> list[dict]:
    """n 段对话（没给就是小世界训练的那一边）的 chat_row；不够 n 段就有几段用几段，一段也没有是 UserError。"""
    chats = world.chats(n, seed) if chats is None else chats[:n]
    rows = [chat_row(tokenizer, chat["messages"]) for chat in chats]
    if not rows:
        raise UserError("校准要有对话，这里一段也没有：看看 --dataset 指的文件，或调大 --n_calibration。")
    return rows


def linear_blocks(model: nn.Module) -> Iterator[dict[str, nn.Linear]]:
    """一个解码块一个 {全名: 线性层}，从前往后；嵌入与 lm_head 不在里面。"""
    decoder = model.get_decoder()
    prefix = next(name for name, module in model.named_modules() if module is decoder)
    for place, block in enumerate(decoder.layers):
        yield {
            f"{prefix}.layers.{place}.{name}": layer
            for name, layer in block.named_modules()
            if isinstance(layer, nn.Linear)
        }


@torch.no_grad()
def capture_inputs(
    model: nn.Module, rows: list[dict], layers: dict[str, nn.Linear], pad_id: int, batch_size: int = 32
) -> dict[str, Tensor]:
    """rows 经过 model 时，layers 里每一层收到的输入，{全名: X (N, in)}；填充的位置不算。"""
    caught: dict[str, list[Tensor]] = {name: [] for name in layers}
    real = torch.empty(0, dtype=torch.bool)

    def keep(name: str):
        def hook(_module, args) -> None:
            caught[name].append(args[0][real])  # (B, T, in) → (真实 token, in)

        return hook

    hooks = [layer.register_forward_pre_hook(keep(name)) for name, layer in layers.items()]
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(rows), batch_size):
            part = rows[start : start + batch_size]
            ids = collate(part, pad_id)["input_ids"]  # (B, T)
            lengths = torch.tensor([len(row["input_ids"]) for row in part])
            real = (torch.arange(ids.shape[1]) < lengths[:, None]).to(model.device)  # (B, T)
            model.get_decoder()(input_ids=ids.to(model.device))
    finally:
        for hook in hooks:
            hook.remove()
        model.train(was_training)
    return {name: torch.cat(parts) for name, parts in caught.items()}


class _Enough(Exception):
    """第一块的输入已经有了，后面的不必算。"""


@torch.no_grad()
def walk_blocks(
    model: nn.Module, rows: list[dict], pad_id: int, batch_size: int = 32
) -> Iterator[tuple[dict[str, nn.Linear], dict[str, Tensor]]]:
    """一块一块地给出 ({全名: 线性层}, {全名: 它收到的输入 X (N, in)})：循环体里改了这一块，下一块收到的就是改过的。

    每一块只算两遍：改之前记下输入，改之后算出交给下一块的；不用每一块都从头算起，几十层的模型才走得完。
    """
    was_training = model.training
    model.eval()
    try:
        batches = _first_inputs(model, rows, pad_id, batch_size)
        for block, layers in zip(model.get_decoder().layers, linear_blocks(model), strict=True):
            yield layers, _block_inputs(block, layers, batches)
            batches = [(block(hidden, **more), real, more) for hidden, real, more in batches]
    finally:
        model.train(was_training)


def _block_inputs(
    block: nn.Module, layers: dict[str, nn.Linear], batches: list[tuple[Tensor, Tensor, dict[str, Any]]]
) -> dict[str, Tensor]:
    """batches 经过一块时，里面每个线性层收到的输入，{全名: X (N, in)}；填充的位置不算。"""
    caught: dict[str, list[Tensor]] = {name: [] for name in layers}

    def keep(name: str):
        def hook(_module, args) -> None:
            caught[name].append(args[0])  # (B, T, in)

        return hook

    hooks = [layer.register_forward_pre_hook(keep(name)) for name, layer in layers.items()]
    try:
        for hidden, real, more in batches:
            block(hidden, **more)
            for parts in caught.values():
                parts[-1] = parts[-1][real]  # (B, T, in) → (真实 token, in)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: torch.cat(parts) for name, parts in caught.items()}


def _first_inputs(
    model: nn.Module, rows: list[dict], pad_id: int, batch_size: int
) -> list[tuple[Tensor, Tensor, dict[str, Any]]]:
    """一批一项：(第一块收到的 (B, T, H), 哪些位置是真实 token (B, T), 第一块另外收到的参数：位置的旋转等)。"""
    found: list[tuple[Tensor, Tensor, dict[str, Any]]] = []
    decoder = model.get_decoder()
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        ids = collate(part, pad_id)["input_ids"].to(model.device)  # (B, T)
        lengths = torch.tensor([len(row["input_ids"]) for row in part])
        real = (torch.arange(ids.shape[1]) < lengths[:, None]).to(model.device)

        def stop(_module, args, more, real=real):  # 第一块收到的就记下来，后面的块不跑
            hidden = args[0] if args else more.pop("hidden_states")
            found.append((hidden, real, more))
            raise _Enough

        hook = decoder.layers[0].register_forward_pre_hook(stop, with_kwargs=True)
        try:
            decoder(input_ids=ids, use_cache=False)
        except _Enough:
            pass
        finally:
            hook.remove()
    return found
