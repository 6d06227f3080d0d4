"""投机解码的算法：小模型先写几个 token，大模型一次前向全部核对。speculative_decoding.py 讲它、量它。

一次核对 k 个 token，与一个一个写，读的权重一样多：大模型一次只写一个 token 时，时间都花在把权重从内存搬来，
顺便多算几个几乎不花时间。快多少，看小模型猜中多少、它自己花多少。
"""

from dataclasses import dataclass, field

import torch


@dataclass
class Reader:
    """一个带 KV 缓存的模型；seen 是缓存里已经有的 token。小模型的词表可以只是大模型的一部分（small_of、big_of）。"""

    model: torch.nn.Module
    small_of: torch.Tensor | None = None  # 大词表的编号 → 小词表的编号 (V,)
    big_of: torch.Tensor | None = None  # 小词表的编号 → 大词表的编号 (v,)
    cache: object = None
    seen: list[int] = field(default_factory=list)

    def logits(self, ids: list[int], last: int) -> torch.Tensor:
        """读到 ids 为止，返回最后 last 个位置猜下一个 token 的 logits (last, v)；缓存里不同的先退掉。"""
        same = 0
        while same < len(self.seen) and same < len(ids) - last and self.seen[same] == ids[same]:
            same += 1
        if extra := len(self.seen) - same:
            self.cache.crop(-extra)
        new = torch.tensor([ids[same:]], device=self.model.device)
        if self.small_of is not None:
            new = self.small_of[new]
        out = self.model(input_ids=new, past_key_values=self.cache, use_cache=True, logits_to_keep=last)
        self.cache, self.seen = out.past_key_values, list(ids)
        return out.logits[0].float()

    def distribution(self, logits: torch.Tensor, temperature: float) -> torch.Tensor:
        """logits (…, v) → 大词表上的概率 (…, V)；温度 0 是贪心：最大的那个概率是 1。"""
        if temperature == 0:
            probs = torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
        else:
            probs = (logits / temperature).softmax(-1)
        if self.big_of is None:
            return probs
        whole = probs.new_zeros(*probs.shape[:-1], len(self.small_of))
        whole[..., self.big_of] = probs  # 小模型没有的 token，它猜的概率是 0
        return whole


@dataclass
class Written:
    """写出的 token 与账：大模型几次前向，小模型猜了几个、核对了几个、猜中几个。"""

    ids: list[int]
    forwards: int = 0
    drafted: int = 0
    checked: int = 0
    accepted: int = 0


def accept_or_replace(
    token: int, p: torch.Tensor, q: torch.Tensor, generator: torch.Generator | None
) -> tuple[bool, int]:
    """核对一个猜的 token：以 min(1, p/q) 的概率收下；不收，就从 (p − q)₊ 里另抽一个。p、q：(V,)。

    这样写出的 token 的分布正好是 p（Leviathan et al. 2023 附录 A）：
    收下 x 的概率是 q(x)·min(1, p/q) = min(p, q)，换成 x 的概率补上剩下的 (p − q)₊，加起来就是 p。
    """
    u = torch.rand((), generator=generator, device=p.device)
    if u * q[token] < p[token]:  # u < p/q，写成乘法，q 是 0 也不出错
        return True, token
    rest = (p - q).clamp(min=0)  # (V,)
    if not rest.any():  # p 与 q 只差舍入
        rest = p
    return False, int(torch.multinomial(rest, 1, generator=generator))


def accept_or_resample_p(
    token: int, p: torch.Tensor, q: torch.Tensor, generator: torch.Generator | None
) -> tuple[bool, int]:
    """常见的写错：不收的时候，直接从 p 里另抽。小模型爱猜的 token 就偏多了；贪心时看不出来。"""
    kept, _ = accept_or_replace(token, p, q, generator)
    return kept, token if kept else int(torch.multinomial(p, 1, generator=generator))


@torch.no_grad()
def speculative_generate(
    target: Reader,
    draft: Reader,
    prompt: list[int],
    max_new_tokens: int,
    stop_ids: set[int],
    k: int,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
    accept=accept_or_replace,
) -> Written:
    """从 prompt 写下去，最多 max_new_tokens 个，遇到 stop_ids 就停。k：小模型每次猜几个。"""
    ids, end = list(prompt), len(prompt) + max_new_tokens
    written = Written([])
    while len(ids) < end:
        # 1. 小模型一个一个地猜
        guesses, qs = [], []
        for _ in range(min(k, end - len(ids) - 1)):
            q = draft.distribution(draft.logits(ids + guesses, 1)[0], temperature)  # (V,)
            guesses.append(int(torch.multinomial(q, 1, generator=generator)))
            qs.append(q)
        # 2. 大模型一次前向：每个猜的 token 之前的分布，再加最后一个之后的
        ps = target.distribution(target.logits(ids + guesses, len(guesses) + 1), temperature)  # (k+1, V)
        written.forwards += 1
        written.drafted += len(guesses)
        # 3. 从头核对；第一个不收的，换上一个，后面的作废
        new: list[int] = []
        for guess, p, q in zip(guesses, ps, qs, strict=False):
            kept, token = accept(guess, p, q, generator)
            written.checked += 1
            written.accepted += kept
            new.append(token)
            if not kept or token in stop_ids:
                break
        else:  # 全部收下：最后一个分布还没用，白得一个
            new.append(int(torch.multinomial(ps[-1], 1, generator=generator)))
        ids += new
        if ids[-1] in stop_ids:
            break
    written.ids = ids[len(prompt) :]
    return written


@torch.no_grad()
def plain_generate(
    target: Reader,
    prompt: list[int],
    max_new_tokens: int,
    stop_ids: set[int],
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
) -> Written:
    """不投机：一次前向写一个。与上面的用同样的 Reader，比快慢才公平。"""
    ids, written = list(prompt), Written([])
    for _ in range(max_new_tokens):
        p = target.distribution(target.logits(ids, 1)[0], temperature)
        ids.append(int(torch.multinomial(p, 1, generator=generator)))
        written.forwards += 1
        if ids[-1] in stop_ids:
            break
    written.ids = ids[len(prompt) :]
    return written
