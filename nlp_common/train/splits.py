"""把 --dataset、--eval_dataset 变成训练行和留出行。"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

from nlp_common.base.errors import UserError
from nlp_common.base.processes import on_main
from nlp_common.data.rows import has_split, read_rows, sha256_of_rows
from nlp_common.tiny import world
from nlp_common.train.settings import StageSettings

EVAL_SEED = 0  # 留出的题与训练种子无关：不同种子的结果可以相比
TINY_ROWS = {
    "documents": world.documents,
    "chats": world.chats,
    "pairs": world.pairs,
    "questions": world.prompts,
}


def load_train_and_eval(
    settings: StageSettings, kind: str, convert: Callable
) -> tuple[list[dict], list[dict], dict]:
    """→ (训练行, 留出行, 数据来源)；kind 是小世界里的数据种类，convert 是 data/chats.py 里的 to_*。

    留出行依次取自：--eval_dataset；数据集自带的 validation；都没有就从训练行里固定地分出 5%。
    几个进程一起训练时，主进程读（下载）一遍，分给大家。
    """
    train, heldout, data = on_main(lambda: _train_and_eval(settings, kind, convert))
    print(f"训练 {len(train)} 行，留出 {len(heldout)} 行")
    return train, heldout, data


def _train_and_eval(
    settings: StageSettings, kind: str, convert: Callable
) -> tuple[list[dict], list[dict], dict]:
    train, source = _read(settings, kind, convert, settings.dataset, "train", settings.max_train_samples)
    data = {"train": source}
    if settings.eval_dataset:
        path = Path(settings.eval_dataset)
        split = "validation" if not path.exists() or has_split(path, "validation") else "train"
        heldout, data["eval"] = _read(
            settings, kind, convert, settings.eval_dataset, split, settings.max_eval_samples
        )
    elif settings.dataset == "tiny_world" or has_split(settings.dataset, "validation"):
        heldout, data["eval"] = _read(
            settings, kind, convert, settings.dataset, "validation", settings.max_eval_samples
        )
    else:
        train = distinct_rows(train, settings.dataset)
        if len(train) < 2:
            raise UserError(
                f"{settings.dataset} 只有 {len(train)} 行，至少要两行：一行训练，一行留出。"
                "请给多一些数据，或用 --eval_dataset 另给留出的数据。"
            )
        n = max(1, min(settings.max_eval_samples, len(train) // 20))
        order = list(range(len(train)))
        random.Random(0).shuffle(order)
        heldout = [train[i] for i in order[:n]]
        train = [train[i] for i in sorted(order[n:])]
        data["eval"] = {"name": f"{settings.dataset} 里固定留出的 {n} 行", "rows": n}
    if settings.dataset != "tiny_world":
        seen = {_content(row) for row in train}
        if both := sum(_content(row) in seen for row in heldout):
            print(f"留出的 {len(heldout)} 行里有 {both} 行训练数据里也有：留出的成绩会偏高。")
    return train, heldout, data


def distinct_rows(rows: list[dict], where: str) -> list[dict]:
    """内容相同（只差空白也算）的行只留第一行，说出去掉几行：先去重再分，同一行才不会训练和留出两边都有。"""
    kept: dict[str, dict] = {}
    for row in rows:
        kept.setdefault(_content(row), row)
    if repeated := len(rows) - len(kept):
        print(f"{where}：去掉重复的 {repeated} 行，剩 {len(kept)} 行，再从里面留出。")
    return list(kept.values())


def _content(row: dict) -> str:
    """一行里要学的内容（data/chats.py 统一的那几栏），别的栏不管；空白多少不算不同。"""
    said = []
    if "text" in row:
        said.append(" ".join(row["text"].split()))
    for name in ("messages", "prompt", "chosen", "rejected", "answer"):
        if isinstance(row.get(name), list):  # 别的栏也可能叫 answer，如验证器看的标准答案
            for message in row[name]:
                said.append(f"{name} {message['role']} {' '.join(message['content'].split())}")
    if "good" in row:  # KTO：同一个问题的几个回答、同一个回答的赞与踩，都不是重复
        said.append(str(row["good"]))
    return "\n".join(said)


def _read(
    settings: StageSettings, kind: str, convert: Callable, name: str, split: str, limit: int | None
) -> tuple[list[dict], dict]:
    """一份数据 → (统一写法的行, 来历)。小世界的行由语法直接写出，已经是统一的写法。"""
    if name != "tiny_world":
        found = read_rows(name, split=split, limit=limit, source=settings.source)
        return convert(found.rows, f"{name}（{split}）"), found.source
    is_train = split == "train"
    rows = TINY_ROWS[kind](limit or 500, settings.seed if is_train else EVAL_SEED, heldout=not is_train)
    source = {"name": name, "kind": "builtin", "path": None, "split": split, "rows": len(rows)}
    return rows, source | {"sha256": sha256_of_rows(rows)}


def drop_long(rows: list[dict], length: Callable[[dict], int], max_length: int, what: str) -> list[dict]:
    """去掉超过 max_length 个 token 的行并说出有几行；宁可不用，也不把提示切成半句。"""
    kept = [row for row in rows if length(row) <= max_length]
    if dropped := len(rows) - len(kept):
        print(f"{what}：{dropped} 行超过 --max_length {max_length} 个 token，不用。")
    if not kept:
        raise UserError(f"{what}：没有一行不超过 {max_length} 个 token；把 --max_length 调大。")
    return kept
