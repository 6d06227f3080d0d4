"""每个选项有多像：题目只算一遍，几个选项各接一段，一次前向全算出来。

一道题有四个选项，平常的做法是四行，每行都从头算：题目算了四遍。因果注意力里，题目看不到后面的选项，四遍的结果一字不差。
所以并成一行：

    题目（左填充） | 选项甲 | 选项乙 | 选项丙 | 选项丁（右填充）          每个选项看得到题目和自己，看不到别的选项

选项的位置都接着题目数。选项的最后一个 token 后面没有要猜的，不用算：只有一个字母的选项，一列也不用添。
题目前面的说明与例题（few-shot），各题都一样，KV 只算一次，各批接着用。

怎样分词、长了从哪里截、并列时选哪个，都与 lm-evaluation-harness 0.4.13 相同（测试里逐题比过），所以分数可以直接比。
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from nlp_common.base.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

AT_ONCE = 1024  # 一批至多多少列 × 行
CACHED = 4096  # 连上共同开头的 KV（每行一份），一批至多多少列 × 行：例题很长时，别占满内存
WORTH = 16  # 各题开头有这么多 token 相同，才值得另算一次 KV
TOLERANCE = 1e-3  # 并成一行与分开算，对数概率差得比它大，这种模型就分开算
KNOWN = {"Qwen2ForCausalLM", "Qwen3ForCausalLM", "LlamaForCausalLM", "GPT2LMHeadModel"}  # 测试里试过


@dataclass
class Ask:
    """一道题要模型算的：context 之后接各个 continuation。context 是文字，或已经分好的 token（聊天模板）。"""

    context: str | list[int]
    continuations: list[str]


@dataclass
class Encoded:
    """一道题的 token；options 里是各选项的，places 是第几个选项（太长要截的题，一个选项单独一道）。"""

    number: int
    context: list[int]
    options: list[list[int]]
    places: list[int] = field(default_factory=list)


@torch.no_grad()
def log_likelihoods(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, asks: list[Ask], share: bool = True
) -> list[list[float]]:
    """每道题各选项的 log p(选项 | 题目)，选项的各个 token 加起来。share=False 是分开算，用来比。"""
    rows = encode(tokenizer, asks, max_length(model, tokenizer))
    found: list[list[float]] = [[0.0] * len(ask.continuations) for ask in asks]
    if share and type(model).__name__ not in KNOWN:
        share = can_share(model, rows[0])
    for prefix, group in same_beginnings(rows) if share else [(0, rows)]:
        past = None
        if prefix:
            past = model(_tensor(model, group[0].context[:prefix]), use_cache=True).past_key_values
        for batch in in_batches(group, prefix):
            scores = shared_rows(model, batch, past, prefix) if share else plain_rows(model, batch)
            for row, values in zip(batch, scores, strict=True):
                for place, value in zip(row.places, values, strict=True):
                    found[row.number][place] = value
    return found


# ---------------------------------------------------------------- 1. 分词


def encode(tokenizer: PreTrainedTokenizerBase, asks: list[Ask], longest: int) -> list[Encoded]:
    """文字 → token。

    题目与选项合在一起分词再切开：分开分，两边接缝处的切法与模型平常见到的不同。题目末尾的空格归选项（" A" 多半是一个 token）。
    """
    for number, ask in enumerate(asks):
        if empty := [each for each in ask.continuations if not each]:
            raise UserError(f"第 {number + 1} 题有 {len(empty)} 个选项是空的。")
    with_text = [ask for ask in asks if _has_text(ask)]
    contexts = iter(_ids(tokenizer, [ask.context.rstrip() for ask in with_text]))
    wholes = iter(_ids(tokenizer, [ask.context + each for ask in with_text for each in ask.continuations]))
    bare = [each for ask in asks if not _has_text(ask) for each in ask.continuations]
    alone = iter(tokenizer(bare, add_special_tokens=False)["input_ids"] if bare else [])
    rows = []
    for number, ask in enumerate(asks):
        if _has_text(ask):
            context = next(contexts)
            options = [next(wholes)[len(context) :] for _ in ask.continuations]
        elif ask.context and not isinstance(ask.context, str):
            context, options = list(ask.context), [next(alone) for _ in ask.continuations]
        else:
            context, options = [_start(tokenizer)], [next(alone) for _ in ask.continuations]
            options = [ids[1:] if ids[0] == context[0] else ids for ids in options]  # 选项自己就以它打头
        if not all(options):
            raise UserError(
                f"第 {number + 1} 题：分词器把选项并进了题目的最后一个 token，算不了它的概率。"
                "在题目末尾加一个空格或冒号再试。"
            )
        if max(len(ids) for ids in options) + len(context) <= longest + 1:
            rows.append(Encoded(number, context, options, list(range(len(options)))))
            continue
        for place, ids in enumerate(options):  # 太长：从左边截，各选项截得不一样多，就各算各的
            room = max(1, longest + 1 - len(ids))
            rows.append(Encoded(number, context[-room:], [ids], [place]))
    return rows


def _has_text(ask: Ask) -> bool:
    return isinstance(ask.context, str) and bool(ask.context.strip())


def _ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """照分词器自己的习惯添不添开始符；文字里已经写了的，不再添。"""
    if not texts:
        return []
    start = tokenizer.bos_token
    written = [bool(start) and text.startswith(start) for text in texts]
    if not any(written):
        return tokenizer(texts)["input_ids"]
    return [
        tokenizer(text, **({"add_special_tokens": False} if has else {}))["input_ids"]
        for text, has in zip(texts, written, strict=True)
    ]


def _start(tokenizer: PreTrainedTokenizerBase) -> int:
    """题目是空的，前面放什么：开始符，没有就是结束符。"""
    return tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id


def max_length(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    config = model.config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "n_ctx"):
        if getattr(config, name, None):
            return getattr(config, name)
    return min(tokenizer.model_max_length, 2048)


def too_long(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, asks: list[Ask]) -> int:
    """几道题长得要截。一个字至多四个 token 左右，字数远远不到的不必分词就知道。"""
    longest = max_length(model, tokenizer)
    if 4 * max(len(ask.context) + max(map(len, ask.continuations)) for ask in asks) < longest:
        return 0
    rows = encode(tokenizer, asks, longest)
    whole = {row.number for row in rows if len(row.places) == len(asks[row.number].continuations)}
    return len(asks) - len(whole)


def same_beginnings(rows: list[Encoded]) -> list[tuple[int, list[Encoded]]]:
    """→ [(前面相同的 token 有几个, 这样的几道题)]；与谁也不够相同的放在一起，是 0。

    按 token 排好，相同的就挨着。一半以上与这一组的第一道相同，才算一组：例题按学科换，一个学科就是一组。
    """
    groups: list[list[Encoded]] = []
    for row in sorted(rows, key=lambda row: row.context):
        if groups and 2 * same_tokens(groups[-1][0].context, row.context) >= len(row.context):
            groups[-1].append(row)
        else:
            groups.append([row])
    found, alone = [], []
    for group in groups:
        # 排好了，整组相同的就是头尾两道相同的；每道至少留一个 token 自己算
        prefix = min(same_tokens(group[0].context, group[-1].context), *(len(r.context) - 1 for r in group))
        if prefix >= WORTH and len(group) > 1:
            found.append((prefix, group))
        else:
            alone += group
    return [*found, (0, alone)] if alone else found


def same_tokens(one: list[int], other: list[int]) -> int:
    n = min(len(one), len(other))
    return next((i for i in range(n) if one[i] != other[i]), n)


def in_batches(rows: list[Encoded], prefix: int) -> list[list[Encoded]]:
    """长短相近的放一批，填充最少。"""
    width = {id(row): len(row.context) - prefix + sum(len(ids) - 1 for ids in row.options) for row in rows}
    batches: list[list[Encoded]] = []
    for row in sorted(rows, key=lambda row: -width[id(row)]):
        widest, rows_now = (width[id(batches[-1][0])], len(batches[-1]) + 1) if batches else (0, 0)
        if batches and rows_now * widest <= AT_ONCE and rows_now * (prefix + widest) <= CACHED:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


# ---------------------------------------------------------------- 2. 几个选项并成一行


def shared_rows(model, batch: list[Encoded], past, prefix: int) -> list[list[float]]:
    """一批题 → 各选项的对数概率。past 是前 prefix 个 token 的 KV。"""
    questions = [row.context[prefix:] for row in batch]
    tails = [[token for ids in row.options for token in ids[:-1]] for row in batch]
    left, right = max(map(len, questions)), max(map(len, tails))
    width, device = left + right, model.device
    ids = torch.zeros(len(batch), width, dtype=torch.long)  # (B, W)
    part = torch.full((len(batch), width), -1)  # (B, W)：-1 填充，0 题目，k 第 k 个选项
    position = torch.zeros(len(batch), width, dtype=torch.long)  # (B, W)
    for b, (row, question) in enumerate(zip(batch, questions, strict=True)):
        start, at = left - len(question), left
        ids[b, start:left] = torch.tensor(question)
        part[b, start:left] = 0
        position[b, start:left] = torch.arange(prefix, prefix + len(question))
        for k, option in enumerate(row.options, 1):
            end = at + len(option) - 1
            ids[b, at:end] = torch.tensor(option[:-1], dtype=torch.long)
            part[b, at:end] = k
            position[b, at:end] = torch.arange(len(row.context), len(row.context) + len(option) - 1)
            at = end
    place = torch.arange(width)
    sees = (part[:, :, None] == part[:, None, :]) | (part[:, None, :] == 0)  # (B, W, W)：自己那一段，和题目
    sees &= (place[:, None] >= place) & (part[:, None, :] >= 0)
    sees |= torch.eye(width, dtype=torch.bool)  # 填充看自己，不出 NaN
    sees = torch.cat([torch.ones(len(batch), width, prefix, dtype=torch.bool), sees], 2)  # (B, W, P + W)
    inputs = {"use_cache": False}
    if past is not None:
        again = copy.deepcopy(past)  # 前向会往里添，各批用各的
        again.batch_repeat_interleave(len(batch))
        inputs = {"use_cache": True, "past_key_values": again}
    logits = model(
        input_ids=ids.to(device),
        attention_mask=sees[:, None].to(device),
        position_ids=position.to(device),
        logits_to_keep=torch.arange(left - 1, width, device=device),  # 题目的最后一个，和各选项
        **inputs,
    ).logits  # (B, 1 + R, V)
    return [read_row(logits[b], row) for b, row in enumerate(batch)]


def read_row(logits: torch.Tensor, row: Encoded) -> list[float]:
    """(1 + R, V)：第 0 行猜各选项的第一个 token，后面依次猜各选项的第二个起。"""
    logps = logits[: 1 + sum(len(option) - 1 for option in row.options)].log_softmax(-1)
    scores, at = [], 1
    for option in row.options:
        places = [0, *range(at, at + len(option) - 1)]
        at += len(option) - 1
        scores.append(float(logps[places, option].sum()))
    return scores


# ---------------------------------------------------------------- 3. 分开算：一个选项一行


def plain_rows(model, batch: list[Encoded]) -> list[list[float]]:
    scores = []
    for row in batch:
        rows = [row.context + option[:-1] for option in row.options]
        width = max(map(len, rows))
        ids = torch.tensor([each + [0] * (width - len(each)) for each in rows], device=model.device)
        logps = model(ids, use_cache=False).logits.log_softmax(-1)  # (K, T, V)
        found = []
        for k, option in enumerate(row.options):
            places = torch.arange(len(row.context) - 1, len(row.context) - 1 + len(option))
            found.append(float(logps[k, places, option].sum()))
        scores.append(found)
    return scores


def can_share(model, row: Encoded) -> bool:
    """没试过的模型（滑动窗口、线性注意力 …）先拿一道题两种算法比一比；不一样就说出来，分开算。"""
    apart = plain_rows(model, [row])[0]
    try:
        shared = shared_rows(model, [row], None, 0)[0]
        off = max(abs(a - b) for a, b in zip(apart, shared, strict=True))
    except (TypeError, ValueError, RuntimeError, AttributeError):
        off = float("inf")
    tolerance = TOLERANCE if next(model.parameters()).dtype == torch.float32 else 0.25
    if off > tolerance:
        print(f"{type(model).__name__} 不能把几个选项并成一行（差 {off:.2g}），一个选项一行地算，慢几倍。")
    return off <= tolerance


def _tensor(model, ids: list[int]) -> torch.Tensor:
    return torch.tensor([ids], device=model.device)
