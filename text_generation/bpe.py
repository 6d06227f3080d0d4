"""BPE（字节对编码）的训练与切分，手写。tokenizer_training.py 讲它；测试里它与 tokenizers 库的合并表逐条相同。

训练：从单个符号开始，每次把出现最多的相邻一对并成一个新符号，直到词表够大。
一样多的时候，编号小的一对先并（与 tokenizers 的约定相同），所以结果是确定的。
"""

import heapq
import itertools
from collections import Counter, defaultdict


def train_bpe(
    words: dict[str, int], vocab_size: int, specials: list[str] = (), alphabet: set[str] | None = None
) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """words：预切分好的词 → 出现几次，合并不跨词。返回（词表，合并表），合并表按学会的次序。

    alphabet：就算没出现也放进词表的符号（字节级的 256 个）。
    """
    symbols = {char for word in words for char in word} | set(alphabet or ())
    vocab = {token: i for i, token in enumerate([*specials, *sorted(symbols)])}
    names = list(vocab)
    pieces = [[vocab[char] for char in word] for word in words]  # 每个词现在切成哪些符号
    counts = list(words.values())
    pair_counts: Counter = Counter()
    where: dict[tuple, set[int]] = defaultdict(set)  # 一对在哪些词里
    for i, piece in enumerate(pieces):
        for pair in itertools.pairwise(piece):
            pair_counts[pair] += counts[i]
            where[pair].add(i)

    heap = [(-count, pair) for pair, count in pair_counts.items()]
    heapq.heapify(heap)  # 出现最多的在顶上；次数变了不去改它，弹出来时再核对
    merges: list[tuple[str, str]] = []
    while len(vocab) < vocab_size and heap:
        negative, pair = heapq.heappop(heap)
        if -negative != pair_counts[pair]:  # 记的是从前的次数
            if pair_counts[pair] > 0:
                heapq.heappush(heap, (-pair_counts[pair], pair))
            continue
        if -negative < 1:
            break
        merges.append((names[pair[0]], names[pair[1]]))
        token = names[pair[0]] + names[pair[1]]
        if token not in vocab:  # 两条路可能并出同一个词
            vocab[token] = len(vocab)
            names.append(token)
        grown = set()  # 次数变多的，要放进堆里
        for i in sorted(where.pop(pair)):
            old = pieces[i]
            new = merge(old, pair, vocab[token])
            pieces[i] = new
            for each in itertools.pairwise(old):
                pair_counts[each] -= counts[i]
            for each in itertools.pairwise(new):
                pair_counts[each] += counts[i]
                where[each].add(i)
                grown.add(each)
        pair_counts[pair] = 0
        for each in grown:
            heapq.heappush(heap, (-pair_counts[each], each))
    return vocab, merges


def merge(piece: list[int], pair: tuple[int, int], new: int) -> list[int]:
    """从左到右，把相邻的一对换成 new。"""
    found, i = [], 0
    while i < len(piece):
        if i + 1 < len(piece) and (piece[i], piece[i + 1]) == pair:
            found.append(new)
            i += 2
        else:
            found.append(piece[i])
            i += 1
    return found


def encode_word(word: str, ranks: dict[tuple[str, str], int], vocab: dict[str, int]) -> list[int]:
    """切一个词：每次并最早学会的那一对，直到没有可并的。词表里没有的字，换成它的 UTF-8 字节（byte fallback）。"""
    parts = list(word)
    while len(parts) > 1:
        best = min(itertools.pairwise(parts), key=lambda pair: ranks.get(pair, len(ranks)))
        if best not in ranks:
            break
        joined, i = [], 0
        while i < len(parts):
            if i + 1 < len(parts) and (parts[i], parts[i + 1]) == best:
                joined.append(parts[i] + parts[i + 1])
                i += 2
            else:
                joined.append(parts[i])
                i += 1
        parts = joined
    ids: list[int] = []
    for part in parts:
        if part in vocab:
            ids.append(vocab[part])
        else:
            ids += [vocab[f"<0x{byte:02X}>"] for byte in part.encode()]
    return ids


def decode(ids: list[int], names: list[str]) -> str:
    """token → 文字：连着的 <0xE4> 这样的字节拼回一个字，拼不成的是 U+FFFD。"""
    data = b""
    for i in ids:
        name = names[i]
        data += bytes([int(name[3:5], 16)]) if is_byte(name) else name.encode()
    return data.decode(errors="replace")


def is_byte(name: str) -> bool:
    return len(name) == 6 and name.startswith("<0x") and name.endswith(">")
