"""几个回答共用一个提示：提示只算一遍，结果不变（Wang & Hegde 2024，Prefix Sharing）。

DPO、奖励模型一批有 2B 行，前 B 行是好回答，后 B 行是差回答，第 i 行与第 B+i 行的提示一字不差。因果注意力里提示
看不到回答，两行在提示上算出来的完全相同。所以把一对并成一行：

    提示（左填充到 P） | 好回答（右填充到 A） | 差回答（右填充到 D）

差回答看得到提示，看不到好回答；它的位置接着提示数。2T 列变成 P+A+D 列，提示长、回答短时少算近一半。
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

WORTH = 0.85  # 并成一行之后的列数，不到原来两行的这么多，才值得


@dataclass
class Merged:
    """并好的一批；(row, column) 是原来 2B 行里的位置。"""

    input_ids: torch.Tensor  # (B, W)
    position_ids: torch.Tensor  # (B, W)
    attention_mask: torch.Tensor  # (B, 1, W, W)，True 是看得到
    shared: torch.Tensor  # (B,)，一对共用几个 token
    starts: tuple[int, int]  # 好回答、差回答从第几列开始

    def locate(self, rows: torch.Tensor, columns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """原来的位置（各 (M,)）→ 并好之后的位置：第几行、第几列。"""
        pair, shared = rows % len(self.shared), self.shared[rows % len(self.shared)]
        start = self.starts[0] + (rows >= len(self.shared)) * (self.starts[1] - self.starts[0])
        start = torch.where(columns < shared, self.starts[0], start)  # 提示里的，看好回答那一份
        return pair, start + columns - shared


def merge_pairs(input_ids: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> Merged | None:
    """input_ids (2B, T)，右填充；要读的是 (rows, columns) 这些位置，各 (M,)。没有共用的提示、不值得并时是 None。"""
    n, width = input_ids.shape
    if n % 2:
        return None
    used = torch.zeros(n, dtype=torch.long, device=input_ids.device)
    used.scatter_reduce_(0, rows, columns + 1, "amax")  # 每行读到第几列；后面的（填充）不用算
    good, bad = input_ids.chunk(2)
    good_used, bad_used = used.chunk(2)
    shared = (good == bad).long().cumprod(1).sum(1)  # (B,)
    shared = torch.minimum(shared, torch.minimum(good_used, bad_used) - 1).clamp(min=0)
    n_prompt = int(shared.max())
    n_good, n_bad = int((good_used - shared).max()), int((bad_used - shared).max())
    total = n_prompt + n_good + n_bad
    if total > WORTH * 2 * width:
        return None

    place = torch.arange(total, device=input_ids.device)  # (W,)
    first, second = n_prompt, n_prompt + n_good
    part = (place >= first).long() + (place >= second).long()  # (W,)：0 提示，1 好回答，2 差回答
    start = torch.tensor([first, first, second], device=input_ids.device)[part]
    position = place - start + shared[:, None]  # (B, W)：在原来那一行的第几列，左填充的是负数
    inside = position.clamp(0, width - 1)
    ids = torch.where(part == 2, bad.gather(1, inside), good.gather(1, inside))

    sees = (part[:, None] == part[None, :]) | (part[None, :] == 0)  # (W, W)：自己那一段，和提示
    sees = sees & (place[:, None] >= place[None, :])
    mask = sees & (position >= 0)[:, None, :]  # (B, W, W)：谁也看不到左填充
    mask |= torch.eye(total, dtype=torch.bool, device=input_ids.device)  # 填充看自己，不出 NaN
    return Merged(ids, position.clamp(min=0), mask[:, None], shared, (first, second))


# ---------------------------------------------------------------- 一个提示的 G 个回答（GRPO）


@dataclass
class MergedGroups:
    """同一提示的 G 个回答并成一行：提示（去掉最后一个 token） | 回答 1 | 回答 2 | …，每段 R 列。

    每一段以提示的最后一个 token 的副本开头：它的输出猜这个回答的第一个 token，各段互不相干。回答的最后一个
    token 后面没有要猜的，不用算。
    """

    input_ids: torch.Tensor  # (B, W)，W = P−1 + G·R
    position_ids: torch.Tensor  # (B, W)
    attention_mask: torch.Tensor  # (B, 1, W, W)，True 是看得到
    keep: torch.Tensor  # (B, W)，True 的位置依次猜 (B·G, R) 里的真实 token，一行一行地排


def merge_groups(
    ids: torch.Tensor, attention_mask: torch.Tensor, mask: torch.Tensor, group: int
) -> MergedGroups | None:
    """ids、attention_mask (B·G, P+R)：左填充的提示接右填充的回答；mask (B·G, R)。不值得并时是 None。"""
    rows, width = mask.shape
    n_prompt, batch = ids.shape[1] - width - 1, rows // group  # P−1
    total = n_prompt + group * width
    if total > WORTH * group * ids.shape[1]:
        return None
    first, device = ids[::group], ids.device
    starts = ids[:, n_prompt : n_prompt + width].reshape(
        batch, group * width
    )  # 提示的最后一个，和回答的前 R−1 个
    real = attention_mask[::group, :n_prompt].bool()  # (B, P−1)
    n_real = real.sum(1, keepdim=True)  # (B, 1)
    place = torch.arange(total, device=device)
    part = torch.where(
        place < n_prompt, 0, 1 + (place - n_prompt) // width
    )  # (W,)：0 是提示，1…G 是第几个回答
    in_prompt = (real.cumsum(1) - 1).clamp(min=0)  # (B, P−1)
    after = n_real + torch.arange(width, device=device).repeat(group)  # (B, G·R)
    sees = (part[:, None] == part[None, :]) | (part[None, :] == 0)  # (W, W)
    sees = sees & (place[:, None] >= place[None, :])
    visible = torch.cat([real, torch.ones_like(starts, dtype=torch.bool)], 1)  # (B, W)
    seen = sees & visible[:, None, :]
    seen |= torch.eye(total, dtype=torch.bool, device=device)  # 填充看自己，不出 NaN
    no_prompt = torch.zeros(batch, n_prompt, dtype=torch.bool, device=device)
    return MergedGroups(
        input_ids=torch.cat([first[:, :n_prompt], starts], 1),
        position_ids=torch.cat([in_prompt, after], 1),
        attention_mask=seen[:, None],
        keep=torch.cat([no_prompt, mask.reshape(batch, group * width)], 1),
    )
