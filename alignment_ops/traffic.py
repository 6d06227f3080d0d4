"""模拟的流量：谁来了，问的哪一题；一个用户归哪一边。

    for request in visits(kinds, 5000, seed=0):      # kinds[i]：第 i 题是哪一类
        arm = arm_of(request.user, share=0.1, salt="assistant-4")   # "canary" 或 "champion"

真的流量有三样事，简单的模拟里没有，而灰度的检验正是栽在它们上面：
1. 有的用户来一次，有的来几百次（每来一次请求，或者是新用户，或者是以前某一次请求的那个人又来了：来得多的越来越多）；
2. 一个用户老问同一类题，所以他的几次请求不是独立的：题难的人，次次都难；
3. 一个用户固定归一边（不然他会看到助手一会儿一个样），于是一个常客的全部请求都压在一边。
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple

NEW = 0.5  # 一次请求是新用户的可能：平均每人来两次，而来得最多的一个会来几百次
LOYAL = 0.7  # 问自己老问的那一类的可能


class Request(NamedTuple):
    number: int  # 第几次请求，从 0 数
    user: int
    question: int  # 第几题
    first: bool  # 这个用户头一次来


def visits(
    kinds: Sequence[str], n: int, seed: int, new: float = NEW, loyal: float = LOYAL
) -> Iterator[Request]:
    """n 次请求；同一个 seed 是同样的流量，n 大的开头就是 n 小的。"""
    rng = random.Random(f"traffic-{seed}")
    places: dict[str, list[int]] = {}
    for place, kind in enumerate(kinds):
        places.setdefault(kind, []).append(place)
    favourites: list[str] = []  # 每个用户老问哪一类
    who: list[int] = []  # 以前各次请求是谁的
    for number in range(n):
        first = not who or rng.random() < new
        if first:
            favourites.append(rng.choice(list(places)))
        user = len(favourites) - 1 if first else rng.choice(who)
        who.append(user)
        asks_own = rng.random() < loyal
        question = rng.choice(places[favourites[user]]) if asks_own else rng.randrange(len(kinds))
        yield Request(number, user, question, first)


def arm_of(user: object, share: float, salt: str) -> str:
    """一个用户归哪一边：由散列定，不用记；share 加大，原来在 canary 的还在。

    salt 每次灰度换一个：不然每次试新东西的总是同一批人。
    """
    digest = hashlib.blake2b(f"{salt}|{user}".encode(), digest_size=8).digest()
    return "canary" if int.from_bytes(digest, "big") / 2**64 < share else "champion"
