"""一本会变的商品手册：程序写的，所以每个问题的答案、改了哪一处、旧答案是什么，都知道。更新、客服的脚本用它。"""

from __future__ import annotations

import random
from dataclasses import dataclass

COLORS = ["青岚", "赤霞", "墨石", "白桦", "金穗", "银湖", "紫藤", "碧波", "橙光", "玄武"]
KINDS = [
    "电热水壶",
    "台灯",
    "吸尘器",
    "电饭煲",
    "加湿器",
    "电风扇",
    "榨汁机",
    "空气净化器",
    "电熨斗",
    "路由器",
]
PLACES = ["上海", "武汉", "成都", "沈阳", "西安", "广州", "杭州", "济南"]
FACTS = ("price", "warranty", "stock", "weight")
# 一样事实一段；问题与答案也由它来
PARAGRAPHS = {
    "price": "价格：{name}的零售价是{price}元。会员下单时再减{off}元，不与别的优惠同时使用。",
    "warranty": "保修：{name}的整机保修期是{warranty}个月，从签收那天算起；人为摔坏、进水不在保修之内，可以付费修理。",
    "stock": "发货：{name}从{stock}的仓库发出，一般三天之内送到；大件要先打电话约时间，收货时请当面开箱看一看。",
    "weight": "规格：{name}净重{weight}克，包装里有一份说明书、一张保修卡和一袋备用零件。",
}
QUESTIONS = {
    "price": "{name}的零售价是多少元？",
    "warranty": "{name}的保修期是几个月？",
    "stock": "{name}从哪里的仓库发货？",
    "weight": "{name}净重多少克？",
}
ANSWERS = {
    "price": "{price}元",
    "warranty": "{warranty}个月",
    "stock": "{stock}的仓库",
    "weight": "{weight}克",
}


@dataclass(frozen=True)
class Product:
    """一件商品：名字不重复，facts 是四样事实。"""

    name: str
    facts: dict

    def text(self) -> str:
        """它的手册：四段，每段一样事实。"""
        return "\n\n".join(PARAGRAPHS[fact].format(name=self.name, **self.facts) for fact in FACTS)

    def question(self, fact: str) -> str:
        return QUESTIONS[fact].format(name=self.name)

    def answer(self, fact: str) -> str:
        return ANSWERS[fact].format(**self.facts)


def make_products(n: int, seed: int = 0, start: int = 100) -> list[Product]:
    """n 件商品，编号从 start 起，所以两次要的不会同名。"""
    rng = random.Random(f"{seed}-{start}")
    products = []
    for number in range(start, start + n):
        name = f"{rng.choice(COLORS)}{number}型{rng.choice(KINDS)}"
        products.append(Product(name, draw_facts(rng)))
    return products


def draw_facts(rng: random.Random) -> dict:
    return {
        "price": rng.randrange(60, 900),
        "off": rng.randrange(5, 30),
        "warranty": rng.choice([6, 12, 18, 24, 36]),
        "stock": rng.choice(PLACES),
        "weight": rng.randrange(300, 9000),
    }


def change(product: Product, fact: str, rng: random.Random) -> Product:
    """改一样事实，别的不动；改了的一定与原来不同。"""
    while True:
        facts = product.facts | {fact: draw_facts(rng)[fact]}
        if facts != product.facts:
            return Product(product.name, facts)
