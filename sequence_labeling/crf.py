"""线性链 CRF，快的写法：与 hmm_crf.py 里的公式逐项相同，只是算得快。给 bilstm_crf.py 和 word_segmentation.py 用。

快在三处：
1. 前向、后向在概率（不是对数）上算，每步是一次 (B, K) × (K, K) 的矩阵乘法，随时除以最大的一个，用 float64，不会下溢；
   分数的起伏大到 float64 也装不下的，退回对数里的算法。
2. log Z 的梯度就是边缘概率，后向算法直接给出它（custom autograd function），不必让 autograd 记下每一步再倒着走一遍。
3. Viterbi 前进时只求最大的分数，不求从哪里来；倒着走时，只为真正走到的那一个标签重新找它从哪里来，整批一起。
"""

from __future__ import annotations

import torch
from torch import nn

from hmm_crf import NEVER, log_marginals, sequence_score
from span_metrics import may_follow

# 分数的起伏在这以内，概率不会下溢：float64 到 e^-700，float32（苹果的 GPU 没有 float64）只到 e^-87
SMALLEST = {torch.float64: 1e-300, torch.float32: 1e-37}
LARGEST_RANGE = {torch.float64: 200.0, torch.float32: 20.0}


def legal_mask(tags: list[str]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """BMES 的标签 → 合法的 (开头 (K,), 转移 (K, K), 结尾 (K,))，True 是可以。"""
    start = torch.tensor([may_follow("O", tag) for tag in tags])
    end = torch.tensor([may_follow(tag, "O") for tag in tags])
    steps = torch.tensor([[may_follow(before, after) for after in tags] for before in tags])
    return start, steps, end


class CRF(nn.Module):
    """K 个标签的 CRF：起始 (K,)、转移 (K, K)（行是前一个）、结尾 (K,) 三组分数。"""

    def __init__(self, n_tags: int, legal: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None):
        super().__init__()
        self.start = nn.Parameter(torch.empty(n_tags).uniform_(-0.1, 0.1))
        self.transitions = nn.Parameter(torch.empty(n_tags, n_tags).uniform_(-0.1, 0.1))
        self.end = nn.Parameter(torch.empty(n_tags).uniform_(-0.1, 0.1))
        for name, allowed in zip(("start", "transitions", "end"), legal or (None,) * 3, strict=True):
            self.register_buffer(f"{name}_legal", allowed, persistent=False)

    def scores(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(起始, 转移, 结尾)，不合规矩的换成 NEVER：再好的发射分数也走不通。"""
        values = []
        for name in ("start", "transitions", "end"):
            value, allowed = getattr(self, name), getattr(self, f"{name}_legal")
            values.append(value if allowed is None else value.masked_fill(~allowed, NEVER))
        return values[0], values[1], values[2]

    def forward(self, emissions: torch.Tensor, tags: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """每句的损失 −log p(标签 | 句子) = log Z − 分数。(B, T, K)、(B, T)、(B,) → (B,)。"""
        start, steps, end = self.scores()
        return NegativeLogLikelihood.apply(emissions, tags, lengths, start, steps, end)

    def decode(self, emissions: torch.Tensor, lengths: torch.Tensor) -> list[list[int]]:
        """分数最高的标签，每句一个列表。"""
        return viterbi_batch(emissions, lengths, *self.scores())


class NegativeLogLikelihood(torch.autograd.Function):
    """−log p(y|x)。反向不用 autograd：对每个分数的梯度 = 它的期望次数 − 它在标准答案里的次数。"""

    @staticmethod
    def forward(ctx, emissions, tags, lengths, start, steps, end):
        log_z, node, edge = marginals_fast(emissions, lengths, start, steps, end)
        score = sequence_score(emissions, tags, lengths, start, steps, end)
        ctx.save_for_backward(node, edge, tags, lengths)
        return (log_z - score).to(emissions.dtype)

    @staticmethod
    def backward(ctx, gradient):  # (B,)：各句的损失在总损失里的权重
        node, edge_parts, tags, lengths = ctx.saved_tensors
        _, n_steps, n_tags = node.shape
        mask = torch.arange(n_steps, device=tags.device) < lengths[:, None]  # (B, T)
        weight = gradient.to(node.dtype)
        onehot = torch.zeros_like(node).scatter_(2, tags[:, :, None], 1.0) * mask[:, :, None]
        difference = (node - onehot) * weight[:, None, None]  # (B, T, K)：期望 − 观察
        last = (lengths - 1)[:, None, None].expand(-1, 1, n_tags)
        # 转移：期望次数由 edge_parts 给出，每句一个 (K, K)，按权重相加
        expected = (edge_parts * weight[:, None, None]).sum(0)
        pair_weight = (mask[:, 1:] * weight[:, None]).flatten()  # (B(T−1),)
        pairs = (tags[:, :-1] * n_tags + tags[:, 1:]).flatten()
        observed = torch.zeros(n_tags * n_tags, dtype=node.dtype, device=tags.device)
        observed.index_add_(0, pairs, pair_weight)
        dtype = gradient.dtype
        return (
            difference.to(dtype),
            None,
            None,
            difference[:, 0].sum(0).to(dtype),
            (expected - observed.view(n_tags, n_tags)).to(dtype),
            difference.gather(1, last).sum((0, 1)).to(dtype),
        )


def marginals_fast(emissions, lengths, start, steps, end):
    """→ (log Z (B,)，每个位置是每个标签的概率 (B, T, K)，每句里每种转移的期望次数 (B, K, K))，float64。

    前向 α_t = (α_{t−1} A) ∘ e_t，后向 β_t = A (e_{t+1} ∘ β_{t+1})，A = exp(转移)，e = exp(发射)；
    每步除以最大的一个，除掉的数记在 log Z 里。两个方向在同一个循环里走：后向就是倒过来的句子、转置的 A 上的前向。
    """
    n_rows, n_steps, n_tags = emissions.shape
    mask = torch.arange(n_steps, device=emissions.device) < lengths[:, None]  # (B, T)
    dtype = torch.float32 if emissions.device.type == "mps" else torch.float64
    emissions, start, steps, end = (value.to(dtype) for value in (emissions, start, steps, end))
    if too_wide(emissions, mask, start, steps, end):
        return log_marginals(emissions, lengths, start, steps, end)
    raw = emissions.masked_fill(~mask[:, :, None], 0.0)
    top = raw.amax(2, keepdim=True)  # (B, T, 1)：先减去每个位置最大的，exp 不会上溢
    emit = (raw - top).exp()
    trans_top = steps.max()
    trans = (steps - trans_top).exp()  # (K, K)
    last = lengths - 1

    # 每句各自倒过来：(B, T) 的下标，补齐的仍在后面
    order = (last[:, None] - torch.arange(n_steps, device=emissions.device)).clamp(min=0)
    backwards = emit.gather(1, order[:, :, None].expand(-1, -1, n_tags))
    both = torch.stack([emit, backwards]).transpose(1, 2).contiguous()  # (2, T, B, K)
    moves = torch.stack([trans, trans.T.contiguous()])  # (2, K, K)
    state = torch.stack([start.exp(), end.exp()])[:, None] * both[:, 0]  # (2, B, K)
    scale = state.amax(2, keepdim=True)
    state = state / scale
    states, scales = [state], [scale]
    for t in range(1, n_steps):
        state = torch.bmm(state, moves).mul_(both[:, t])  # (2, B, K)
        scale = state.amax(2, keepdim=True)
        state = state.div_(scale)
        states.append(state)
        scales.append(scale)
    history = torch.stack(states, 2)  # (2, B, T, K)：补齐处也在走，下面不去看它
    alpha = history[0]
    # 倒着走的第 s 步是位置 last−s，含着那里的发射
    beta_with_emission = history[1].gather(1, order[:, :, None].expand(-1, -1, n_tags))
    log_scale = torch.stack(scales, 2)[0, :, :, 0].log()  # (B, T)
    ends = alpha[torch.arange(n_rows), last] @ end.exp()  # (B,)
    log_z = (log_scale * mask).sum(1) + (top[:, :, 0] * mask).sum(1) + ends.log() + trans_top * last

    node = alpha * beta_with_emission / emit.clamp(min=SMALLEST[dtype])
    node = node / node.sum(2, keepdim=True).clamp(min=SMALLEST[dtype]) * mask[:, :, None]
    # 转移 (t, t+1) 的概率 ∝ α_t(i) A_ij e_{t+1}(j) β_{t+1}(j)；先求每处的归一化常数，再一次矩阵乘法加起来
    left, right = alpha[:, :-1], beta_with_emission[:, 1:]
    total = ((left @ trans) * right).sum(2, keepdim=True)  # (B, T−1, 1)
    left = left / total.clamp(min=SMALLEST[dtype]) * mask[:, 1:, None]
    edge = torch.bmm(left.transpose(1, 2), right) * trans  # (B, K, K)
    return log_z, node, edge


def too_wide(emissions, mask, start, steps, end) -> bool:
    """分数的起伏会不会让 float64 的概率下溢；不合规矩的转移（NEVER）变成 0，不算。"""
    spread = (emissions.amax(2) - emissions.amin(2)).masked_fill(~mask, 0.0).max()
    for value in (start, steps, end):
        kept = value[value > NEVER / 2]
        spread = spread + (kept.max() - kept.min() if kept.numel() else 0.0)
    return not bool(spread < LARGEST_RANGE[emissions.dtype])  # NaN 也走这条路，由对数里的算法原样传下去


def viterbi_batch(emissions, lengths, start, steps, end) -> list[list[int]]:
    """整批的 Viterbi：(B, T, K) → 每句一个标签列表。

    分数排成 (从, 到, B)：取最大是沿着第一维，后两维在内存里连着，一条指令比好几个数。
    """
    n_rows, n_steps, _ = emissions.shape
    emit = emissions.permute(1, 2, 0).contiguous()  # (T, K, B)
    moves = steps[:, :, None].contiguous()  # (从, 到, 1)
    score = start[:, None] + emit[0]  # (K, B)
    best = [score]
    for t in range(1, n_steps):
        score = (score[:, None, :] + moves).amax(0).add_(emit[t])  # (到, B)
        best.append(score)
    stacked = torch.stack(best)  # (T, K, B)
    last = lengths - 1
    rows = torch.arange(n_rows, device=emissions.device)
    tag = (stacked[last, :, rows] + end).argmax(1)  # (B,)：各句最后一个字的标签
    path = [tag]
    for t in range(n_steps - 2, -1, -1):
        came_from = (stacked[t] + steps[:, tag]).argmax(0)  # (B,)：走到 tag 之前是谁
        tag = torch.where(last > t, came_from, tag)  # 还没到句尾的短句不动
        path.append(tag)
    chains = torch.stack(path[::-1], 1).tolist()
    return [chain[:length] for chain, length in zip(chains, lengths.tolist(), strict=True)]
