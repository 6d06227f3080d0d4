"""几十句写法简单的标注数据，各测试文件共用。"""

from pathlib import Path

NAMES = ("王小明", "李雷", "欧阳山尊", "桥本龙太郎", "江平", "韩梅梅")
PLACES = ("上海", "哈尔滨", "北京", "巴黎", "内蒙古", "纽约")
FRAMES = (
    "{n}昨天到了{p}",
    "记者在{p}见到{n}",
    "{p}的{n}说他很高兴",
    "我们去{p}吧",
    "{n}和朋友在{p}开会",
    "今天的天气很好",
)


def small_sentences(count: int):
    """几十句人名、地名，写法都一样简单：小模型一会儿就学得会。"""
    from tagged_files import Sentence

    rows = []
    for i in range(count):
        name, place = NAMES[i % 6], PLACES[(i // 6 + i) % 6]
        text = FRAMES[(i // 5) % 6].format(n=name, p=place)
        spans = [
            (k, text.index(w), text.index(w) + len(w))
            for k, w in (("PER", name), ("LOC", place))
            if w in text
        ]
        rows.append(Sentence(list(text), sorted(spans, key=lambda span: span[1])))
    return rows


def write_tag_file(path: Path, sentences, scheme: str = "BMES") -> Path:
    from tagged_files import tags_of

    blocks = [
        "\n".join(f"{c} {t}" for c, t in zip(s.chars, tags_of(s, scheme), strict=True)) for s in sentences
    ]
    path.write_text("\n\n".join(blocks) + "\n", encoding="utf-8")
    return path
