"""数实体：精确率、召回率、F1 手写一遍，看清为什么"字的正确率"不是实体的成绩。

学到什么：标签怎样变成实体；一个实体要类型、开头、结尾全对才算对；字的正确率为什么总是好看得多；
常用的 seqeval 在中文数据的 BMES 标签上会怎样数错。

运行：
    python span_metrics.py                              # 在几句例子上数给你看
    python span_metrics.py --gold 标准.bmes --predicted 预测.bmes   # 比较两个标注文件

预期输出：同一份预测，字的正确率 0.89，实体的 F1 只有 0.70；装了 seqeval 的，还会看到它把 M- 数错的样子。

参考：Tjong Kim Sang & De Meulder 2003（CoNLL 的评测：实体完全相同才算对）。
"""

from nlp_common.base.cli import run_main

import importlib.util
import math
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from nlp_common.base.arguments import option
from nlp_common.base.console import padded
from nlp_common.base.errors import UserError
from nlp_common.draw.plots import bar_chart
from nlp_common.train.lesson import run_lesson
from nlp_common.train.settings import LessonSettings, parse_settings
from nlp_common.train.stage import Stage
from tagged_files import Sentence, Span, tags_of
from two_files import read_pair

HOME = Path(__file__).resolve().parent
INSIDE = {"I": "M", "L": "E", "U": "S"}  # BIOES、BILOU 的写法 → BMES 的

# 例子：一句话，标准答案，一份预测；实体写作 (类型, 从, 到（不含）)
EXAMPLES = [
    (
        "高勇，中国国籍，任北京大学教授",
        [("PER", 0, 2), ("LOC", 3, 5), ("ORG", 9, 13)],
        [("PER", 0, 2), ("LOC", 3, 5), ("LOC", 9, 11)],
    ),
    (
        "李岚清在上海会见了桥本龙太郎",
        [("PER", 0, 3), ("LOC", 4, 6), ("PER", 9, 14)],
        [("PER", 0, 3), ("LOC", 4, 6), ("PER", 9, 13)],
    ),
    (
        "新华社记者兰红光昨天从哈尔滨报道",
        [("ORG", 0, 3), ("PER", 5, 8), ("LOC", 11, 14)],
        [("ORG", 0, 3), ("PER", 6, 8), ("LOC", 11, 14)],
    ),
    ("会议在人民大会堂举行", [("LOC", 3, 8)], [("LOC", 3, 8)]),
    ("他昨天说，这件事以后再谈，大家都同意", [], []),
]


@dataclass
class MetricsSettings(LessonSettings):
    gold: str | None = option("标准答案：一行一个字的标注文件")
    predicted: str | None = option("预测：同样的字，标签是预测的")

    def check(self) -> None:
        if (self.gold is None) != (self.predicted is None):
            raise UserError("--gold 与 --predicted 要一起给。")


# ---------------------------------------------------------------- 1. 标签 → 实体


def spans_of(tags: list[str], has_ends: bool = True) -> list[Span]:
    """一句话的标签 → 实体 [(类型, 从, 到（不含）)]，严格：开头、中间、结尾都在、类型一致，才是一个实体。

    BMES、BIOES：B-x、若干 M-x（I-x）、E-x，或者单独的 S-x；残缺的（没有开头、没有结尾、中途换了类型）不算。
    has_ends=False 是 BIO：B-x 与后面连着的 I-x；没有 B- 的 I- 不算。
    """
    spans: list[Span] = []
    kind, start = None, 0  # 正在进行的实体
    for place, tag in enumerate([*tags, "O"]):
        letter, _, this = tag.partition("-")
        letter = INSIDE.get(letter, letter)
        if letter in "ME" and kind is not None and this == kind:
            if letter == "E":
                spans.append((kind, start, place + 1))
                kind = None
            continue
        if kind is not None and not has_ends:  # BIO：没有结尾的标记，遇到别的就结束
            spans.append((kind, start, place))
        kind = None
        if letter == "B":
            kind, start = this, place
        elif letter == "S":
            spans.append((this, place, place + 1))
    return spans


def illegal_transitions(tags: list[str]) -> int:
    """BMES 的一句里有几处接不上：M、E 的前面不是同类的 B、M，或者 B、M 的后面不是同类的 M、E。句首句尾也算。"""
    count = 0
    for before, after in zip(["O", *tags], [*tags, "O"], strict=True):
        count += not may_follow(before, after)
    return count


def may_follow(before: str, after: str) -> bool:
    """BMES：标签 after 能不能跟在 before 后面。句首之前、句尾之后都当作 O。"""
    unfinished = before[0] in "BM"
    continues = after[0] in "ME"
    if unfinished or continues:
        return unfinished and continues and before[1:] == after[1:]
    return True


# ---------------------------------------------------------------- 2. 三个数


def span_scores(gold: list[list[Span]], predicted: list[list[Span]]) -> dict[str, float]:
    """几句话的实体 → 精确率、召回率、F1（微平均：各句、各类的实体放在一起数）。

    P = 对的 ÷ 找到的，R = 对的 ÷ 该找到的，F1 = 2PR ÷ (P + R)；分母是 0 的算 0。
    """
    right = sum(len(set(a) & set(b)) for a, b in zip(gold, predicted, strict=True))
    found, wanted = sum(map(len, predicted)), sum(map(len, gold))
    precision = right / found if found else 0.0
    recall = right / wanted if wanted else 0.0
    f1 = 2 * precision * recall / (precision + recall) if right else 0.0
    return {"precision": precision, "recall": recall, "f1": f1, "entities": wanted}


def scores_by_type(gold: list[list[Span]], predicted: list[list[Span]]) -> dict[str, dict[str, float]]:
    """每一类各算一遍，实体多的在前。"""
    counts = Counter(kind for spans in gold for kind, _, _ in spans)
    table = {}
    for kind in sorted(counts, key=lambda kind: (-counts[kind], kind)):
        mine = [[s for s in spans if s[0] == kind] for spans in gold]
        theirs = [[s for s in spans if s[0] == kind] for spans in predicted]
        table[kind] = span_scores(mine, theirs)
    return table


def character_accuracy(gold: list[list[str]], predicted: list[list[str]]) -> float:
    """标签对了的字的比例：大半的字是 O，猜 O 就对，所以它总是好看。"""
    right = sum(a == b for x, y in zip(gold, predicted, strict=True) for a, b in zip(x, y, strict=True))
    return right / max(1, sum(map(len, gold)))


def f1_standard_error(gold: list[list[Span]], predicted: list[list[Span]], rounds: int = 200) -> float:
    """F1 的标准误差：把句子有放回地重抽 rounds 次（bootstrap），各算一遍，取标准差。"""
    import numpy as np

    rng = np.random.default_rng(0)
    counts = [(len(set(a) & set(b)), len(a) + len(b)) for a, b in zip(gold, predicted, strict=True)]
    table = np.array(counts, dtype=float)  # (句数, 2)：对的，找到的加该找到的
    picks = rng.integers(len(table), size=(rounds, len(table)))
    sums = table[picks].sum(1)  # (rounds, 2)
    return float((2 * sums[:, 0] / np.maximum(sums[:, 1], 1)).std())


# ---------------------------------------------------------------- 3. 错在哪里


def type_confusion(gold: list[list[Span]], predicted: list[list[Span]]) -> dict[str, Counter]:
    """标的是什么 → 预测成了什么：{类型: {类型、"边界不对"、"没找到": 个数}}；"多找的" 是哪里也不沾的预测。

    位置完全相同看类型；只沾上一部分的是"边界不对"；一个字也没沾上的是"没找到"。
    """
    table: dict[str, Counter] = {}
    for wanted, found in zip(gold, predicted, strict=True):
        at = {(start, end): kind for kind, start, end in found}
        for kind, start, end in wanted:
            touches = any(s < end and start < e for _, s, e in found)
            guess = at.get((start, end), "边界不对" if touches else "没找到")
            table.setdefault(kind, Counter())[guess] += 1
        for kind, start, end in found:
            if not any(s < end and start < e for _, s, e in wanted):
                table.setdefault("多找的", Counter())[kind] += 1
    return table


def print_confusion(table: dict[str, Counter]) -> None:
    """混淆表：一行是标准答案的一类，一列是预测成了什么。"""
    rows = sorted(table, key=lambda kind: (kind == "多找的", -sum(table[kind].values())))
    columns = [kind for kind in rows if kind != "多找的"]
    columns += sorted({kind for counts in table.values() for kind in counts} - set(columns))
    width = max(10, *(len(name) + 2 for name in columns))
    print("标准答案＼预测".ljust(12) + "".join(padded(name, width, right=True) for name in columns))
    for kind in rows:
        print(
            padded(kind, 18)
            + "".join(padded(str(table[kind].get(c) or "·"), width, right=True) for c in columns)
        )


def draw_confusion(path: Path, table: dict[str, Counter]) -> None:
    """混淆表画成一张图：一行是标准答案的一类（各行自己归一），颜色越深越多。"""
    from nlp_common.draw.figures import render

    rows = sorted(table, key=lambda kind: (kind == "多找的", -sum(table[kind].values())))
    columns = [kind for kind in rows if kind != "多找的"]
    columns += sorted({kind for counts in table.values() for kind in counts} - set(columns))
    english = {"多找的": "多找的|spurious", "没找到": "没找到|missed", "边界不对": "边界不对|boundary"}

    def draw(axes, text) -> None:
        for y, kind in enumerate(rows):
            total = sum(table[kind].values())
            for x, column in enumerate(columns):
                count = table[kind].get(column, 0)
                color = "#2f8f5b" if kind == column else "#d1602f"
                axes.add_patch(
                    Rectangle(
                        (x - 0.5, y - 0.5), 1, 1, color=color, alpha=0.75 * (count / total) ** 0.5, lw=0
                    )
                )
                if count:
                    axes.text(x, y, str(count), ha="center", va="center", fontsize=8)
        axes.set_xticks(range(len(columns)), [text(english.get(c, c)) for c in columns])
        axes.set_yticks(range(len(rows)), [text(english.get(r, r)) for r in rows])
        axes.set(xlim=(-0.5, len(columns) - 0.5), ylim=(len(rows) - 0.5, -0.5))

    from matplotlib.patches import Rectangle

    labels = ("标的是什么，认成了什么|Gold and predicted types", "认成|predicted", "标的是|gold")
    render(path, draw, [], labels, min_width=5.5 * len(columns))


def longest_wrong(sentences: list[Sentence], predicted: list[list[Span]], count: int = 5) -> list[dict]:
    """没有认对的实体里最长的几个，以及那里预测了什么。"""
    wrong = []
    for sentence, found in zip(sentences, predicted, strict=True):
        for kind, start, end in set(sentence.spans) - set(found):
            here = [(k, sentence.text[s:e]) for k, s, e in found if s < end and start < e]
            wrong.append({"type": kind, "text": "".join(sentence.chars[start:end]), "predicted": here})
    wrong.sort(key=lambda row: (-len(row["text"]), row["text"]))
    return wrong[:count]


def print_longest_wrong(wrong: list[dict]) -> None:
    for row in wrong:
        here = "、".join(f"{kind}「{text}」" for kind, text in row["predicted"]) or "什么也没有"
        print(f"  {row['type']}「{row['text']}」（{len(row['text'])} 字）→ {here}")


# ---------------------------------------------------------------- 4. 一句话，实体上色

COLORS = (32, 34, 35, 36, 33, 31, 92, 94, 95, 96, 93, 91)  # 终端的前景色


def coloured(chars: list[str], spans: list[Span], kinds: list[str], use_color: bool) -> str:
    """一句话，实体用颜色标出，后面写上类型；终端没有颜色的（管道、文件）用方括号。"""
    pieces, at = [], 0
    for kind, start, end in sorted(spans, key=lambda span: span[1]):
        text = "".join(chars[start:end])
        pieces.append("".join(chars[at:start]))
        if use_color:
            color = COLORS[kinds.index(kind) % len(COLORS)] if kind in kinds else 37
            pieces.append(f"\033[1;4;{color}m{text}\033[0m\033[{color}m/{kind}\033[0m")
        else:
            pieces.append(f"[{text}/{kind}]")
        at = end
    return "".join([*pieces, *chars[at:]])


# ---------------------------------------------------------------- 5. 与 seqeval 比


SEQEVAL_CASES = (
    ("BIOES，全对", "B-A I-A E-A O", "B-A I-A E-A O"),
    ("BMES，全对", "B-A M-A E-A O", "B-A M-A E-A O"),
    ("BMES，没有结尾", "B-A E-A O O", "B-A M-A O O"),
    ("BIOES，没有开头", "B-A I-A E-A O", "I-A I-A E-A O"),
)


def seqeval_cases() -> list[dict]:
    """同样的标签，我们数的与 seqeval 数的：默认，与严格（按 BIOES）；没装 seqeval 是空的。"""
    if importlib.util.find_spec("seqeval") is None:
        return []
    from seqeval.metrics import f1_score
    from seqeval.scheme import IOBES

    rows = []
    for name, gold_text, predicted_text in SEQEVAL_CASES:
        gold, predicted = gold_text.split(), predicted_text.split()
        row = {"case": name, "gold": gold_text, "predicted": predicted_text}
        row["ours"] = span_scores([spans_of(gold)], [spans_of(predicted)])["f1"]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*seems not to be NE tag")  # 它警告之后照样数下去
            row["default"] = float(f1_score([gold], [predicted], zero_division=0))
        try:
            strict = f1_score([gold], [predicted], mode="strict", scheme=IOBES, zero_division=0)
            row["strict"] = float(strict)
        except KeyError as error:  # 它不认识 M-
            row["strict"] = f"KeyError: {error}"
        rows.append(row)
    return rows


# ---------------------------------------------------------------- 6. 从头到尾


def learn(stage: Stage) -> dict:
    settings = stage.settings
    if settings.gold:
        gold_sentences, gold_tags, predicted = read_pair(Path(settings.gold), Path(settings.predicted))
    else:
        gold_sentences = [Sentence(list(text), spans) for text, spans, _ in EXAMPLES]
        gold_tags = [tags_of(sentence) for sentence in gold_sentences]
        predicted = [tags_of(Sentence(list(text), spans)) for text, _, spans in EXAMPLES]
    gold = [sentence.spans for sentence in gold_sentences]
    has_ends = any(tag[0] in "MESLU" for tags in gold_tags + predicted for tag in tags)
    found = [spans_of(tags, has_ends) for tags in predicted]

    kinds = sorted({kind for spans in gold + found for kind, _, _ in spans})
    for sentence, spans in list(zip(gold_sentences, found, strict=True))[:5]:
        print(f"  标准  {coloured(sentence.chars, sentence.spans, kinds, use_color=False)}")
        print(f"  预测  {coloured(sentence.chars, spans, kinds, use_color=False)}")
    scores = span_scores(gold, found)
    accuracy = character_accuracy(gold_tags, predicted)
    print(
        f"\n同一份预测：字的正确率 {accuracy:.3f}，实体 P {scores['precision']:.3f}，R {scores['recall']:.3f}，F1 {scores['f1']:.3f}"
    )
    print_confusion(type_confusion(gold, found))
    print_longest_wrong(longest_wrong(gold_sentences, found))

    cases = seqeval_cases()
    print("\n与 seqeval 比：" if cases else "\n没有装 seqeval，不与它比：pip install seqeval==1.2.2")
    for row in cases:
        strict = row["strict"] if isinstance(row["strict"], str) else f"{row['strict']:.2f}"
        print(
            f"  {padded(row['case'], 20)} 我们 {row['ours']:.2f}   seqeval 默认 {row['default']:.2f}   严格 {strict}"
        )
        print(f"    标准 {row['gold']}   预测 {row['predicted']}")

    metrics = {
        "character_accuracy": accuracy,
        **{f"entity_{k}": v for k, v in scores.items() if k != "entities"},
    }
    wrong = [
        row
        for row in cases
        if not isinstance(row["strict"], float) or not math.isclose(row["ours"], row["default"])
    ]
    if cases:
        metrics["seqeval_differs"] = len(wrong)

    def draw(folder: Path) -> None:
        bars = {"字的正确率|characters": accuracy, "实体精确率|precision": scores["precision"]}
        bars |= {"实体召回率|recall": scores["recall"], "实体 F1|F1": scores["f1"]}
        bar_chart(
            folder / "span_metrics.svg",
            {"同一份预测|same predictions": bars},
            "字与实体|Characters and entities",
            "",
            "",
        )

    data = {"name": settings.gold or "examples", "sentences": len(gold)}
    return stage.save(metrics, data, draw, by_type=scores_by_type(gold, found), seqeval=cases)


def main(argv: list[str] | None = None) -> dict:
    settings = parse_settings(MetricsSettings, {"tiny": {}, "full": {}}, argv)
    return run_lesson("span_metrics", HOME, settings, learn)


if __name__ == "__main__":
    run_main(main)
