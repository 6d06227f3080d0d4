"""损失里到处要用的两样：不算损失的标签，和有标签的 token 的 log π。"""

from __future__ import annotations

IGNORE = -100  # 交叉熵忽略的标签
