"""几种搜索：束搜索、分组束搜索、对比搜索。decoding_strategies.py 讲它们；采样在那个脚本里。

贪心只看眼前这一步，搜索往前多看几步：同时留着几条路，最后挑总分最高的。
"""

from dataclasses import dataclass

import torch

from nlp_common.lm.generation import padded_positions


@dataclass
class Path:
    """走到一半的一条路：写了哪些 token，log 概率之和。"""

    ids: list[int]
    score: float


@torch.no_grad()
def beam_search(
    model,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    num_beams: int,
    max_new_tokens: int,
    stop_ids: list[int],
    length_penalty: float = 1.0,
) -> list[list[Path]]:
    """束搜索：input_ids、attention_mask 是左填充的 (B, T)，返回每个开头的 num_beams 条路，最好的在前。

    每步把 K 条路各接上全部 V 个 token，K·V 个里留下总分最高的 K 个还没写完的。写完的路按 总分 ÷ 长度^length_penalty 排；
    没写完的最好的一条也赢不了已写完的最差的一条，就停。与 transformers 的 generate（early_stopping=False）相同。
    """
    n_paths, stops = num_beams, set(stop_ids)
    n_candidates = max(2, 1 + len(stops)) * n_paths  # 就算排在前面的都写完了，也还剩 K 条没写完的
    items = list(range(len(input_ids)))  # 还在写的是第几个开头
    finished: list[list[Path]] = [[] for _ in items]
    paths = [[Path([], 0.0)] for _ in items]  # 第一步每个开头只有一条空的路
    position_ids = padded_positions(attention_mask)
    cache = None
    for length in range(1, max_new_tokens + 1):
        out = model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache = out.past_key_values
        logps = out.logits[:, -1].float().log_softmax(-1)  # (b·k, V)，k 第一步是 1，以后是 K
        size = logps.shape[-1]
        scores = torch.tensor(
            [[path.score for path in paths[i]] for i in items], device=logps.device
        )  # (b, k)
        total = (scores.flatten()[:, None] + logps).view(len(items), -1)  # (b, k·V)
        top, index = total.topk(min(n_candidates, total.shape[1]))
        top, index = top.tolist(), index.tolist()

        rows, tokens, still = [], [], []  # 下一步的每一行：接着缓存的第几行，读哪个 token
        width = scores.shape[1]
        for place, i in enumerate(items):
            kept: list[Path] = []
            kept_rows = []
            for rank, (score, where) in enumerate(zip(top[place], index[place], strict=True)):
                row, token = divmod(where, size)
                ids = [*paths[i][row].ids, token]
                if token in stops or length == max_new_tokens:
                    if rank < n_paths:  # 排在 K 名之外的，写完了也不要
                        finished[i].append(Path(ids, score / length**length_penalty))
                elif len(kept) < n_paths:
                    kept.append(Path(ids, score))
                    kept_rows.append(place * width + row)
            finished[i] = sorted(finished[i], key=lambda path: -path.score)[:n_paths]
            is_full = len(finished[i]) == n_paths
            if not kept or (is_full and kept[0].score / length**length_penalty <= finished[i][-1].score):
                continue  # 这个开头写完了，下一步就不再算它
            paths[i] = kept
            still.append(i)
            rows += kept_rows
            tokens += [path.ids[-1] for path in kept]
        items = still
        if not items:
            break
        select = torch.tensor(rows, device=logps.device)
        cache.reorder_cache(select)
        input_ids = torch.tensor(tokens, device=logps.device)[:, None]
        attention_mask = torch.cat([attention_mask[select], torch.ones_like(input_ids)], 1)
        position_ids = position_ids[select, -1:] + 1
    return finished


@torch.no_grad()
def diverse_beam_search(
    model,
    prompt: list[int],
    num_beams: int,
    num_groups: int,
    max_new_tokens: int,
    stop_ids: list[int],
    diversity: float,
    length_penalty: float = 1.0,
) -> list[Path]:
    """分组束搜索（Vijayakumar et al. 2016）：K 条路分成几组，一步之内后面的组少用前面的组刚用过的 token。

    第 g 组给 token v 的分是 log p(v) − diversity × 前面的组这一步用了 v 几次；写完的路按不扣分的 log 概率排。
    transformers 5 把它移到了要联网下载的代码里。
    """
    stops, per_group = set(stop_ids), num_beams // num_groups
    groups = [[Path([], 0.0)] for _ in range(num_groups)]
    finished: list[list[Path]] = [[] for _ in range(num_groups)]
    cache = None
    input_ids = torch.tensor([prompt] * num_groups, device=model.device)
    for length in range(1, max_new_tokens + 1):
        out = model(input_ids=input_ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = out.past_key_values
        logps = out.logits[:, -1].float().log_softmax(-1)  # (各组的路一共 n 条, V)
        size = logps.shape[-1]
        used = logps.new_zeros(size)  # 前面的组这一步用了哪个 token 几次
        rows, tokens, offset = [], [], 0
        for g, group in enumerate(groups):
            own = (
                torch.tensor([path.score for path in group], device=logps.device)[:, None]
                + logps[offset : offset + len(group)]
            )  # (k, V)
            order = (
                (own - diversity * used).flatten().topk(min(2 * per_group + len(stops), own.numel())).indices
            )
            kept, kept_rows = [], []
            for rank, where in enumerate(order.tolist()):
                row, token = divmod(where, size)
                path = Path([*group[row].ids, token], own[row, token].item())
                if token in stops or length == max_new_tokens:
                    if rank < per_group:
                        finished[g].append(Path(path.ids, path.score / length**length_penalty))
                elif len(kept) < per_group:
                    kept.append(path)
                    kept_rows.append(offset + row)
            offset += len(group)
            finished[g] = sorted(finished[g], key=lambda path: -path.score)[:per_group]
            worst = finished[g][-1].score if len(finished[g]) == per_group else float("-inf")
            if kept and max(path.score for path in kept) / length**length_penalty <= worst:
                kept, kept_rows = [], []
            groups[g] = kept
            for path in kept:
                used[path.ids[-1]] += 1
            rows += kept_rows
            tokens += [path.ids[-1] for path in kept]
        if not rows:
            break
        cache.reorder_cache(torch.tensor(rows, device=logps.device))
        input_ids = torch.tensor(tokens, device=logps.device)[:, None]
    return [path for group in finished for path in group]


@torch.no_grad()
def contrastive_search(
    model, prompt: list[int], max_new_tokens: int, stop_ids: list[int], k: int = 4, alpha: float = 0.6
) -> list[int]:
    """对比搜索（Su et al. 2022）：概率最大的 k 个里，挑"既可能、又不像前文"的一个。

    v 的分 = (1 − α)·p(v) − α·max_j cos(h_v, h_j)，h 是最后一层的隐状态，j 走遍前面所有的 token。
    一次前向把 k 个候选都读进去：选中的那个，它的隐状态和下一步的概率就都有了。
    """
    out = model(
        input_ids=torch.tensor([prompt], device=model.device), use_cache=True, output_hidden_states=True
    )
    cache = out.past_key_values
    past = torch.nn.functional.normalize(out.hidden_states[-1][0].float(), dim=-1)  # (T, C)
    logits = out.logits[0, -1].float()  # (V,)
    written: list[int] = []
    for _ in range(max_new_tokens):
        top = logits.softmax(-1).topk(k)
        cache.reorder_cache(torch.zeros(k, dtype=torch.long, device=model.device))  # 一行变成 k 行
        out = model(
            input_ids=top.indices[:, None], past_key_values=cache, use_cache=True, output_hidden_states=True
        )
        hidden = torch.nn.functional.normalize(out.hidden_states[-1][:, -1].float(), dim=-1)  # (k, C)
        alike = (hidden @ past.T).max(1).values  # (k,)：与前文最像的有多像
        best = int(((1 - alpha) * top.values - alpha * alike).argmax())
        written.append(int(top.indices[best]))
        if written[-1] in stop_ids:
            break
        cache.reorder_cache(torch.tensor([best], device=model.device))  # 只留选中的那一行
        past = torch.cat([past, hidden[best : best + 1]])
        logits = out.logits[best, -1].float()
    return written
