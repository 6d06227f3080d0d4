"""客服的题：几家店的手册、店里人才看得的内部资料、顾客会说的各种话，答案与该怎么办都知道。"""

from __future__ import annotations

import random
from dataclasses import dataclass

from catalogue import COLORS, FACTS, KINDS, Product, make_products
from rag_common.chunking import Chunk, make_chunks

TENANTS = ("甲店", "乙店", "丙店")
ROLES = {"顾客": ("public",), "店员": ("public", "internal")}  # 谁看得见哪些资料
INTERNAL = "内部：{name}的进货价是{cost}元，低于这个价不能卖；这一条只给店员看。"
# 手册里没有的事：问得像，答案却不在
MISSING = (
    "{name}有没有红色的？",
    "{name}可以分期付款吗？",
    "{name}的耗电量是多少瓦？",
    "{name}是哪一年上市的？",
    "{name}能寄到国外吗？",
)
SMALL_TALK = (
    "你好", "您好", "在吗", "在不在", "有人吗", "早上好", "晚上好", "谢谢", "谢谢你", "多谢了", "太感谢了", "好的", "知道了", "明白了",
    "没事了", "再见", "拜拜", "下次再聊", "你真好", "辛苦了", "哈哈", "你叫什么", "你是机器人吗", "今天天气不错", "祝你愉快", "嗯嗯",
    "你会讲笑话吗", "周末愉快", "不用了", "打扰了", "你几岁了", "吃饭了吗", "最近怎么样", "新年快乐", "哦", "行", "可以的", "麻烦你了",
)  # fmt: skip
HAND_OVER = (
    "转人工", "我要找人工客服", "叫你们经理来", "我要投诉", "能不能让真人跟我说", "人工服务", "接客服", "我不想跟机器人说话", "换个人来",
    "我要和你们老板谈", "投诉电话是多少", "给我转接人工", "有没有真人在", "请人来处理", "我要求赔偿，找人来", "叫人工", "我要投诉你们",
    "找个负责的人", "联系人工坐席", "让主管给我回电话",
)  # fmt: skip


@dataclass(frozen=True)
class Ask:
    """一句话：谁在哪家店说的，该怎么办（answer、refuse、talk、hand_over），标准答案，为什么该拒绝。"""

    text: str
    tenant: str
    role: str
    action: str
    answer: str = ""
    kind: str = ""


def shops(per_tenant: int, seed: int) -> dict[str, list[Product]]:
    """每家店的商品；三家店的商品不同名。"""
    return {
        tenant: make_products(per_tenant, seed, start=100 + 1000 * number)
        for number, tenant in enumerate(TENANTS)
    }


def shop_chunks(products: dict[str, list[Product]], seed: int) -> list[Chunk]:
    """全部店的资料，一段一块；meta 里写着是谁家的、谁看得。"""
    rng = random.Random(seed)
    chunks = []
    for tenant, mine in products.items():
        for product in mine:
            text = product.text()
            chunks += make_chunks(
                f"{tenant}/{product.name}", text, paragraph_spans(text), tenant=tenant, access="public"
            )
            secret = INTERNAL.format(name=product.name, cost=rng.randrange(20, 60))
            chunks += make_chunks(
                f"{tenant}/{product.name}/内部", secret, [(0, len(secret))], tenant=tenant, access="internal"
            )
    return chunks


def paragraph_spans(text: str) -> list[tuple[int, int]]:
    spans, start = [], 0
    for paragraph in text.split("\n\n"):
        spans.append((start, start + len(paragraph)))
        start += len(paragraph) + 2
    return spans


def make_asks(products: dict[str, list[Product]], n: int, seed: int) -> list[Ask]:
    """n 句：一半答得出，其余答不出（没有这件商品、手册没写、别家的、内部的），外加寒暄与要转人工的。"""
    rng = random.Random(seed)
    asks = []
    for number in range(n):
        tenant = rng.choice(TENANTS)
        product = rng.choice(products[tenant])
        if number % 2 == 0:
            fact = rng.choice(FACTS)
            asks.append(Ask(product.question(fact), tenant, "顾客", "answer", product.answer(fact)))
            continue
        kind = ("没有这件商品", "手册没写", "别家的", "内部的")[number // 2 % 4]
        asks.append(
            Ask(refused_text(kind, tenant, product, products, rng), tenant, "顾客", "refuse", kind=kind)
        )
    talk = [(text, "talk") for text in SMALL_TALK] + [(text, "hand_over") for text in HAND_OVER]
    asks += [Ask(text, rng.choice(TENANTS), "顾客", action) for text, action in talk]
    rng.shuffle(asks)
    return asks


def refused_text(
    kind: str, tenant: str, product: Product, products: dict[str, list[Product]], rng: random.Random
) -> str:
    """一句该拒绝的话。"""
    if kind == "没有这件商品":
        name = f"{rng.choice(COLORS)}{rng.randrange(5000, 9999)}型{rng.choice(KINDS)}"
        return Product(name, product.facts).question(rng.choice(FACTS))
    if kind == "手册没写":
        return rng.choice(MISSING).format(name=product.name)
    if kind == "别家的":
        other = rng.choice([each for each in TENANTS if each != tenant])
        return rng.choice(products[other]).question(rng.choice(FACTS))
    return f"{product.name}的进货价是多少元？"
