"""埋毛病用的文字：乱码与网页残渣、别的语言、个人信息（都是编的，校验位是对的），还有"像而不是"的。"""

from __future__ import annotations

import random

from nlp_common.tiny import world

HALF_WIDTH = str.maketrans("，。？！", ",.?!")
FILLERS = ["嗯，", "那个，", "对了，", "请问，"]
# 区划代码只取几个真有的；别的由清洗的人自己查
AREAS = ["110105", "310104", "440305", "510107", "330106", "420111", "610113", "230102"]
ENGLISH = {
    "who": ["Tom", "Alice", "Peter", "Mary", "James", "Linda", "Kevin", "Grace"],
    "where": ["the garden", "the school", "the hill", "the beach", "the market", "the station"],
    "what": ["a squirrel", "a rabbit", "a pigeon", "a turtle", "a fox", "a hedgehog", "a goat"],
    "ate": ["a banana", "an apple", "some bread", "a cookie", "some peanuts", "a slice of cake"],
}
JAPANESE = {
    "who": ["たろう", "はなこ", "けんた", "さくら", "ゆうき", "みどり", "あきら"],
    "where": ["こうえん", "がっこう", "うみ", "えき", "やま", "いちば"],
    "what": ["うさぎ", "りす", "きつね", "かめ", "はと", "やぎ"],
    "ate": ["バナナ", "りんご", "パン", "クッキー", "ぶどう"],
}
RUSSIAN = {
    "who": ["Иван", "Анна", "Пётр", "Мария", "Олег", "Ольга"],
    "where": ["в сад", "в школу", "на гору", "на пляж", "на рынок", "на вокзал"],
    "what": ["белка", "лиса", "черепаха", "коза", "сова"],
    "ate": ["банан", "яблоко", "хлеб", "печенье", "виноград"],
}
TRADITIONAL = {
    "who": ["小剛", "小蘭", "小麗", "小強", "小龍", "小軍"],
    "where": ["花園", "學校", "山頂", "海邊", "車站", "橋頭", "書店"],
    "what": ["松鼠", "烏龜", "鸚鵡", "獼猴", "信鴿"],
    "ate": ["蘋果", "麵包", "餅乾", "蘿蔔", "西瓜"],
}
FOREIGN = {
    "english": (
        ENGLISH,
        "That evening {who} went to {where}. Suddenly {what} came running, and {who} gave it {ate}.\nWhere did {who} go?",
        "{who} went to {where}.",
        "I don't know.",
    ),
    "japanese": (
        JAPANESE,
        "ゆうがた、{who}は{where}にいきました。{what}がはしってきて、{who}は{ate}をあげました。\n{who}はどこにいきましたか。",
        "{who}は{where}にいきました。",
        "わかりません。",
    ),
    "russian": (
        RUSSIAN,
        "Вечером {who} пошёл {where}. Прибежала {what}, её угостили: {ate}.\nКуда пошёл {who}?",
        "{who} пошёл {where}.",
        "Не знаю.",
    ),
    "traditional": (
        TRADITIONAL,
        "那天傍晚，{who}來到{where}。忽然跑來一隻雪白的{what}。{who}拿出{ate}給牠吃，覺得很難過。\n{who}去了什麼地方？",
        "您好，{who}去了{where}，這是傍晚的時候發生的事情。",
        "這個問題我不會回答。",
    ),
}


def reworded(rng: random.Random, text: str) -> str:
    """同一句话抄的时候改了一点：标点换成半角的，或前面添一个口头语，或末尾多个空格。"""
    way = rng.randrange(3)
    if way == 0:
        return text.translate(HALF_WIDTH)
    return rng.choice(FILLERS) + text if way == 1 else text + " "


# ---------------------------------------------------------------- 垃圾


def broken_text(rng: random.Random, text: str, story: str) -> tuple[str, str]:
    """一个回答 → (坏法, 坏了的回答)。"""
    way = rng.choice(["mojibake", "latin", "html", "repeated", "random_han", "keyboard", "control", "advert"])
    sentence = text if len(text) >= 8 else story.split("\n")[0]
    if way == "mojibake":  # UTF-8 的字节当成 GBK 读
        return way, sentence.encode().decode("gb18030", errors="ignore")
    if way == "latin":  # UTF-8 的字节当成 Latin-1 读
        return way, sentence.encode().decode("latin-1")
    if way == "html":
        return way, f'<div class="answer"><p>{text}</p><br/>&nbsp;&nbsp;</div>'
    if way == "repeated":
        return way, text + text[-2:] * rng.randint(12, 30)
    if way == "random_han":
        return way, "".join(chr(rng.randrange(0x4E00, 0x9FA0)) for _ in range(rng.randint(12, 30)))
    if way == "keyboard":
        letters = "asdfghjkl;qwertzxcvbnm"
        return way, "".join(rng.choice(letters) for _ in range(rng.randint(12, 30)))
    if way == "control":
        cut = rng.randrange(len(text) + 1)
        return way, text[:cut] + "���\x00" + text[cut:]
    return way, text + rng.choice(
        [
            "点击查看更多精彩内容 http://www.example.com/a?id=123",
            "关注公众号领取红包，加微信送资料！",
            "本文来自网络，版权归原作者所有，转载请注明出处。",
        ]
    )


# ---------------------------------------------------------------- 别的语言


def foreign_turns(rng: random.Random) -> tuple[str, list[str]]:
    """→ (哪种语言, [问, 答, 差的答])。"""
    language = rng.choice(list(FOREIGN))
    words, asked, answer, worse = FOREIGN[language]
    chosen = {name: rng.choice(values) for name, values in words.items()}
    return language, [asked.format(**chosen), answer.format(**chosen), worse]


# ---------------------------------------------------------------- 个人信息


def personal_sentence(rng: random.Random) -> tuple[str, str, str]:
    """→ (哪一种, 号码原文, 带着它的一句话)。号码是编的，校验位是对的；写法各种各样。"""
    kind = rng.choice(["phone", "email", "id_number", "bank_card"])
    if kind == "phone":
        digits = "1" + rng.choice("3578") + "".join(rng.choice("0123456789") for _ in range(9))
        spaced = f"{digits[:3]}-{digits[3:7]}-{digits[7:]}"
        chinese = digits.translate(str.maketrans("0123456789", "零一二三四五六七八九"))
        written = rng.choice(
            [digits, digits, spaced, spaced.replace("-", " "), "+86 " + digits, full_width(digits), chinese]
        )
        if rng.random() < 0.15:
            written = rng.choice(["010-8", "021-6", "0755-2"]) + "".join(
                rng.choice("0123456789") for _ in range(7)
            )
        sentence = rng.choice(["我的电话是{}。", "有事请打{}找我。", "手机：{}", "（联系方式{}）"])
    elif kind == "email":
        name = "".join(rng.choice("abcdefghij_.0123456789") for _ in range(7)).strip("._") or "li"
        written = f"x{name}@{rng.choice(['example.com', 'mail.example.cn', 'EXAMPLE.org'])}"
        written = rng.choice([written, written, written.replace("@", "＠"), written.replace("@", " @ ")])
        sentence = rng.choice(["发到我的邮箱{}就行。", "邮箱：{}", "请回信给{}。"])
    elif kind == "id_number":
        written = made_id_number(rng)
        written = rng.choice(
            [
                written,
                written,
                written.lower(),
                full_width(written),
                f"{written[:6]} {written[6:14]} {written[14:]}",
            ]
        )
        sentence = rng.choice(["身份证号{}。", "我的证件号码是{}。", "登记用的是{}，请核对。"])
    else:
        written = made_card(rng)
        groups = " ".join(written[i : i + 4] for i in range(0, len(written), 4))
        written = rng.choice([written, written, groups, groups.replace(" ", "-")])
        sentence = rng.choice(["请把钱打到{}。", "卡号：{}", "银行卡{}，户名不写了。"])
    return kind, written, sentence.format(written)


def full_width(text: str) -> str:
    return "".join(chr(ord(each) + 0xFEE0) if "!" <= each <= "~" else each for each in text)


def made_id_number(rng: random.Random) -> str:
    """编一个十八位身份证号：地区、生日、顺序号，最后一位由前十七位算出（GB 11643）。"""
    birthday = f"{rng.randint(1950, 2010)}{rng.randint(1, 12):02d}{rng.randint(1, 28):02d}"
    body = rng.choice(AREAS) + birthday + f"{rng.randint(1, 999):03d}"
    weights = [7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2]
    return body + "10X98765432"[sum(int(d) * w for d, w in zip(body, weights, strict=True)) % 11]


def made_card(rng: random.Random) -> str:
    """编一个银行卡号：62 开头，最后一位由 Luhn 算法算出。"""
    length = rng.choice([16, 19])
    body = "62" + "".join(rng.choice("0123456789") for _ in range(length - 3))
    total = 0
    for place, digit in enumerate(reversed(body)):
        doubled = int(digit) * 2 if place % 2 == 0 else int(digit)
        total += doubled - 9 if doubled > 9 else doubled
    return body + str(-total % 10)


# ---------------------------------------------------------------- 像而不是


def lookalike_turns(rng: random.Random, story: str) -> tuple[str, list[str]]:
    """没有毛病、却像有的一行 → (像哪一种, [问, 答, 差的答])。"""
    kind = rng.choice(["personal", "language", "garbage", "near_duplicate"])
    slots = world.draw_slots(world.Draw(rng))
    told = world.write_story(world.Draw(rng), slots)
    ask, answer = (
        told + "\n" + world.QUESTION["place"][0].format(**slots),
        world.SENTENCE["place"].format(**slots),
    )
    digits = "".join(rng.choice("0123456789") for _ in range(20))
    if kind == "personal":  # 订单号、时间戳、快递单号：校验位不对，或位数不对
        card, person = made_card(rng), made_id_number(rng)
        number = rng.choice(
            ["订单号" + card[:-1] + str((int(card[-1]) + 3) % 10), "编号" + person[:-1] + ("1" if person[-1] == "0" else "0"),
             "时间戳17" + digits[:11], "价格" + digits[:2] + "." + digits[3:5] + "元", "版本12.34.5678.9012", "网址里的@符号",
             "流水号2026" + digits[:14], "二〇二六年十一月二十八日", "热线12345，内线" + digits[:8]]
        )  # fmt: skip
        return kind, [ask + f"（{number}）", answer + "。", "我不知道。"]
    if kind == "language":  # 题目要的就是英文；中文里夹着英文词、日文名
        word, english = rng.choice(
            [("花园", "garden"), ("松鼠", "squirrel"), ("苹果", "apple"), ("海边", "seaside")]
        )
        return kind, [told + f"\n“{word}”用英语怎么说？", english, "我不知道。"]
    if kind == "garbage":  # 笑声、代码、列表
        text = rng.choice(
            [
                "哈哈哈，" + answer + "。",
                "```python\nprint('" + answer + "')\n```",
                "1. " + answer + "\n2. " + world.SENTENCE["food"].format(**slots),
            ]
        )
        return kind, [ask, text, "我不知道。"]
    lines = story.split("\n")[0]  # 同一个故事，换了一个词：与原来那一行只像，不是重复
    said = [
        (slot, value)
        for slot, values in world.WORLD.items()
        for value in values
        if value in lines and slot in ("place", "animal", "person")
    ]
    if not said:
        return kind, [ask, answer, "我不知道。"]
    slot, value = rng.choice(said)
    other = rng.choice([each for each in world.WORLD[slot] if each != value])
    friend = next((each for each in world.WORLD["friend"] if each in lines), "没有人")
    return kind, [lines.replace(value, other) + "\n后来谁也来了？", "后来的是" + friend, "我不知道。"]
