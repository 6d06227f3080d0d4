"""一个模型和几个座位：每个座位是 KV 缓存的一行，座位上的人各写各的，一步一起算。

    model.prefill(提示)     几个新来的坐到后面，提示一起读完 → 各自下一个 token 的 logits (n, V)
    model.step(token)       在座的各添一个 token → 各自下一个的 logits (在座的人数, V)
    model.drop(第几行)      他走了：最后一行的人搬到这里，在座的总是挨着的 0 … n−1 行，一步算的没有空位

batching.py 只认得这三样，换一个引擎，写这三样就够了。
"""

from __future__ import annotations

from typing import Protocol

import torch

from nlp_common.base.errors import UserError
from nlp_common.lm.generation import takes_4d_masks


class SlotModel(Protocol):
    slots: int  # 几个座位
    context: int  # 一个座位上，提示加回答最多几个 token

    def prefill(self, prompts: list[list[int]]) -> torch.Tensor: ...

    def step(self, tokens: list[int]) -> torch.Tensor: ...

    def drop(self, row: int) -> None: ...


class SlotCache:
    """各层的 K、V，一行一个座位，每行 context 列，一开始就占好。

    模型的每一层来 update：交出这一步新的 K、V，拿回要看的全部。第 i 行写在第 lengths[i] 列，别人写到哪里不相干。
    """

    def __init__(self, config, slots: int, context: int, dtype: torch.dtype, device: torch.device):
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        shape = (config.num_hidden_layers, slots, config.num_key_value_heads, context, head)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)  # (层, S, H, C, D)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.lengths: list[int] = []  # 在座的各写到哪里

    @property
    def n_bytes(self) -> int:
        return 2 * self.keys.numel() * self.keys.element_size()

    def begin_step(self) -> tuple[torch.Tensor, torch.Tensor]:
        """→ (位置 (n, 1), 掩码 (n, 1, 1, 最长的 + 1))：每一行看得到自己写过的，和正在写的这一个。"""
        self.n, self.width = len(self.lengths), max(self.lengths) + 1
        places = torch.tensor(self.lengths, device=self.keys.device)  # (n,)
        self.rows, self.places = torch.arange(self.n, device=places.device), places
        seen = torch.arange(self.width, device=places.device) <= places[:, None]  # (n, width)
        return places[:, None], seen[:, None, None]

    def update(self, keys, values, layer: int, *_, **__) -> tuple[torch.Tensor, torch.Tensor]:
        """keys、values：(n, H, 1, D)。"""
        self.keys[layer, self.rows, :, self.places] = keys[:, :, 0]
        self.values[layer, self.rows, :, self.places] = values[:, :, 0]
        return self.keys[layer, : self.n, :, : self.width], self.values[layer, : self.n, :, : self.width]

    def drop(self, row: int) -> None:
        """最后一行搬到 row。"""
        length, last = self.lengths.pop(), len(self.lengths)
        if row < last:
            self.keys[:, row, :, :length] = self.keys[:, last, :, :length]
            self.values[:, row, :, :length] = self.values[:, last, :, :length]
            self.lengths[row] = length


class TorchSlots:
    """transformers 的模型，任何整段注意力的（Qwen2、Llama …）。"""

    def __init__(self, model, slots: int, context: int):
        if not takes_4d_masks(model):
            raise UserError(
                f"{model.config.model_type} 有滑动窗口或别的注意力，这里的座位只会整段的：换一个模型，或用 --engine llama。"
            )
        self.model, self.slots, self.context = model.eval(), slots, context
        self.cache = SlotCache(model.config, slots, context, model.dtype, model.device)

    @torch.inference_mode()
    def prefill(self, prompts: list[list[int]]) -> torch.Tensor:
        """右填充：每个 token 只看得到前面的，填充都在后面，谁也看不到它，不用掩码；它的 K、V 以后会被盖掉。"""
        lengths = [len(prompt) for prompt in prompts]
        width, first = max(lengths), len(self.cache.lengths)
        ids = torch.tensor([prompt + [0] * (width - len(prompt)) for prompt in prompts])  # (n, T)
        last = torch.tensor(lengths, device=self.model.device) - 1  # (n,)
        columns, place = last.unique(return_inverse=True)  # 输出层只算各行的最后一个 token
        out = self.model(ids.to(self.model.device), use_cache=True, logits_to_keep=columns)
        for number, layer in enumerate(out.past_key_values.layers):  # 各层 (n, H, T, D)
            self.cache.keys[number, first : first + len(prompts), :, :width] = layer.keys
            self.cache.values[number, first : first + len(prompts), :, :width] = layer.values
        self.cache.lengths += lengths
        return out.logits[torch.arange(len(prompts), device=place.device), place]  # (n, V)

    @torch.inference_mode()
    def step(self, tokens: list[int]) -> torch.Tensor:
        positions, mask = self.cache.begin_step()
        ids = torch.tensor(tokens, device=self.model.device)[:, None]  # (n, 1)
        out = self.model(
            ids, attention_mask=mask, position_ids=positions, past_key_values=self.cache, use_cache=True
        )
        self.cache.lengths = [length + 1 for length in self.cache.lengths]
        return out.logits[:, -1]  # (n, V)

    def drop(self, row: int) -> None:
        self.cache.drop(row)
