"""能由程序检查的要求：一条要求一个函数，收回答和参数，说合不合。只看形式，不看说得对不对。

id 与参数的名字同 IFEval（Zhou et al. 2023），英文的题目文件也读得进来；zh: 开头的是中文才有、或 IFEval 没有的。
字数、句数怎样数，在 chinese_counts.py。

    RULES            id → 怎样检查、要哪些参数
    kwargs_fault     参数哪里不对
    follows_strict   合不合：空的回答什么也不合
    follows_loose    同上，但去掉 * 号、首行、末行之后合也算（IFEval 的宽松分）
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field

from chinese_counts import (
    NUMERAL,
    PUNCTUATION,
    QUOTES,
    RELATIONS,
    SCRIPT_NAMES,
    SCRIPTS,
    WIDTHS,
    compare,
    count_of,
    count_words,
    in_script,
    language_is,
    lines,
    paragraphs,
    punctuation_width,
    sentences,
)

ANSWERS = ("我的答案是：是。", "我的答案是：不是。", "我的答案是：不确定。")
ENGLISH_ANSWERS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")


# ---------------------------------------------------------------- 词


def has_all(text: str, keywords: list[str]) -> bool:
    return all(count_of(text, word) for word in keywords)


def has_none(text: str, forbidden_words: list[str]) -> bool:
    return not any(count_of(text, word) for word in forbidden_words)


def word_often(text: str, keyword: str, relation: str, frequency: int) -> bool:
    return compare(count_of(text, keyword), relation, frequency)


def letter_often(text: str, letter: str, let_relation: str, let_frequency: int) -> bool:
    return compare(count_of(text, letter), let_relation, let_frequency)


def in_order(text: str, keywords: list[str]) -> bool:
    """依次出现：后一个在前一个之后。"""
    at = 0
    for word in keywords:
        at = text.find(word, at)
        if at < 0:
            return False
        at += len(word)
    return True


def capitals_often(text: str, capital_relation: str, capital_frequency: int) -> bool:
    words = re.findall(r"[A-Za-z][A-Za-z'-]*", text)
    return compare(sum(word.isupper() for word in words), capital_relation, capital_frequency)


# ---------------------------------------------------------------- 长短


def words_number(text: str, relation: str, num_words: int) -> bool:
    return compare(count_words(text), relation, num_words)


def words_between(text: str, min_words: int, max_words: int) -> bool:
    return min_words <= count_words(text) <= max_words


def sentences_number(text: str, relation: str, num_sentences: int) -> bool:
    return compare(len(sentences(text)), relation, num_sentences)


def sentences_short(text: str, max_words: int) -> bool:
    return all(count_words(each) <= max_words for each in sentences(text))


def starred_paragraphs(text: str, num_paragraphs: int) -> bool:
    """用 *** 隔开的段落正好几段；中间不能有空的一段。"""
    parts = [part.strip() for part in re.split(r"\s?\*\*\*\s?", text)]
    inside = parts[0 if parts[0] else 1 : len(parts) if parts[-1] else -1]
    return all(inside) and len(inside) == num_paragraphs


def paragraphs_number(text: str, num_paragraphs: int) -> bool:
    return len(paragraphs(text)) == num_paragraphs


def paragraphs_short(text: str, max_words: int) -> bool:
    return all(count_words(each) <= max_words for each in paragraphs(text))


def nth_starts(text: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    """正好几段，第几段以 first_word 开头；英文的词要整个相同。"""
    found = paragraphs(text)
    if len(found) != num_paragraphs or not 1 <= nth_paragraph <= num_paragraphs:
        return False
    start = found[nth_paragraph - 1].lstrip("\"'“‘「『*# ").lower()
    after = start.removeprefix(first_word.lower())
    is_cut = first_word[-1:].isascii() and after[:1].isascii() and after[:1].isalnum()
    return after != start and not is_cut


def poem_lines(text: str, num_lines: int, num_words: int) -> bool:
    """正好几行，每行几个字。"""
    found = lines(text)
    return len(found) == num_lines and all(count_words(line) == num_words for line in found)


# ---------------------------------------------------------------- 格式


def placeholders(text: str, num_placeholders: int) -> bool:
    return len(re.findall(r"\[.*?\]|【.*?】", text)) >= num_placeholders


def has_postscript(text: str, postscript_marker: str) -> bool:
    """P.S.、P.P.S 照 IFEval 在哪里都算；别的（附言：）要另起一行，冒号不分全角半角。"""
    marker = postscript_marker.strip().lower()
    if marker in ("p.s.", "p.p.s", "p.p.s."):
        letters = [re.escape(letter) for letter in marker.replace(".", "")]
        return (
            re.search(r"\.\s?".join(letters) + (r"\." if marker == "p.s." else ""), text.lower()) is not None
        )
    starts = [line.lower().replace(":", "：") for line in lines(text)]
    return any(line.startswith(marker.replace(":", "：")) for line in starts)


def bullets_number(text: str, num_bullets: int) -> bool:
    """以 * 、- 或 • 开头的行正好几行；只有 --- 的行是分隔线，不算。"""
    found = re.findall(r"^\s*(?:\*(?!\*)|•|-(?!-+\s*$))\s*\S.*$", text, re.MULTILINE)
    return len(found) == num_bullets


def numbered_items(text: str, num_items: int) -> bool:
    """1. 2. 3. 依次编号，正好几条；1、与 1）也行。"""
    found = re.findall(r"^\s*(\d+)[.．、)）]", text, re.MULTILINE)
    return found == [str(number + 1) for number in range(num_items)]


def one_of_answers(text: str, options: tuple[str, ...] | list[str] = ANSWERS + ENGLISH_ANSWERS) -> bool:
    """说了其中一个，而且只说了一个。"""
    return sum(option in text for option in options) == 1


def highlights(text: str, num_highlights: int) -> bool:
    """*一颗星* 与 **两颗星** 的都算，里面要有字。"""
    single, double = re.findall(r"\*([^\n*]*)\*", text), re.findall(r"\*\*([^\n*]*)\*\*", text)
    return sum(bool(each.strip()) for each in single + double) >= num_highlights


def sections(text: str, section_spliter: str, num_sections: int) -> bool:
    """至少几节；「第{}节」里的 {} 是数字或中文数字，别的（Section）后面跟着数字。"""
    before, _, after = section_spliter.strip().partition("{}")
    pattern = rf"{re.escape(before)}{NUMERAL}{re.escape(after)}"
    return len(re.findall(pattern, text)) >= num_sections


def read_json(text: str) -> object:
    """回答整个是 JSON（可以包在 ``` 里）→ 它的值；不是，ValueError。"""
    inside = re.sub(r"^\s*```(?:json)?|```\s*$", "", text, flags=re.IGNORECASE)
    return json.loads(inside)


def is_json(text: str) -> bool:
    try:
        read_json(text)
    except (ValueError, RecursionError):
        return False
    return True


def has_json_keys(text: str, keys: list[str]) -> bool:
    """是一个 JSON 对象，正好这几个键。"""
    try:
        value = read_json(text)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and set(value) == set(keys)


def has_title(text: str) -> bool:
    return any(each.lstrip("<").rstrip(">").strip() for each in re.findall(r"<<[^\n]+>>", text))


def first_line_title(text: str) -> bool:
    """第一行是《题目》，后面还有正文。"""
    found = lines(text)
    return len(found) > 1 and re.fullmatch(r"《[^《》]+》", found[0]) is not None


def has_table(text: str, num_columns: int) -> bool:
    """一张 Markdown 表：表头、分隔行、至少一行，各行都是这么多列。"""
    rows = [line.strip("|").split("|") for line in lines(text) if line.startswith("|") and line.endswith("|")]
    ruled = len(rows) >= 3 and all(re.fullmatch(r"\s*:?-+:?\s*", cell) for cell in rows[1])
    return ruled and all(len(row) == num_columns for row in rows)


def dividers(text: str, num_dividers: int) -> bool:
    return sum(re.fullmatch(r"-{3,}", line) is not None for line in lines(text)) == num_dividers


def has_code(text: str) -> bool:
    return re.search(r"^```[^\n]*\n.+?\n```\s*$", text, re.DOTALL | re.MULTILINE) is not None


def two_responses(text: str) -> bool:
    """两个不同的回答，用 ****** 隔开。"""
    parts = [part.strip() for part in text.split("******")]
    inside = parts[0 if parts[0] else 1 : len(parts) if parts[-1] else -1]
    return len(inside) == 2 and all(inside) and inside[0] != inside[1]


def repeats_prompt(text: str, prompt_to_repeat: str) -> bool:
    return text.strip().lower().startswith(prompt_to_repeat.strip().lower())


def acrostic(text: str, head: str) -> bool:
    """藏头：各行（没有换行就各句）的第一个字连起来是 head。"""
    found = lines(text) if "\n" in text.strip() else sentences(text)
    return "".join(each[0] for each in found) == head


# ---------------------------------------------------------------- 开头、结尾、文字、标点


def starts_with(text: str, start_phrase: str) -> bool:
    return text.lstrip().lower().startswith(start_phrase.strip().lower())


def ends_with(text: str, end_phrase: str) -> bool:
    """以这几个字结尾；外面包着的引号不算。"""
    said, wanted = text.strip().lower(), end_phrase.strip().lower()
    return said.endswith(wanted) or said.rstrip('"”」』').endswith(wanted)


def quoted(text: str) -> bool:
    said = text.strip()
    return len(said) > 1 and said[0] + said[-1] in QUOTES


def all_capital(text: str) -> bool:
    return language_is(text, "en") and text.isupper()


def all_lowercase(text: str) -> bool:
    return language_is(text, "en") and text.islower()


def no_latin(text: str) -> bool:
    return re.search(r"[A-Za-zＡ-Ｚａ-ｚ]", text) is None


def no_digits(text: str) -> bool:
    return re.search(r"[0-9０-９]", text) is None


def no_comma(text: str) -> bool:
    return re.search(r"[,，﹐､]", text) is None


def no_punctuation(text: str) -> bool:
    return PUNCTUATION.search(text) is None


def no_repeat(text: str) -> bool:
    """没有两句相同。"""
    found = sentences(text)
    return len(set(found)) == len(found)


# ---------------------------------------------------------------- id → 怎样检查、要哪些参数


@dataclass(frozen=True)
class Rule:
    """参数的种类：number 0 以上的整数，word 一段字，words 几段字，relation 见 RELATIONS，或许可的几个字。"""

    check: Callable[..., bool]
    kwargs: dict[str, str | tuple[str, ...]] = field(default_factory=dict)
    optional: tuple[str, ...] = ()


def _counted(check: Callable[..., bool], name: str, relation: str = "", **more: str) -> Rule:
    return Rule(check, {name: "number"} | ({relation: "relation"} if relation else {}) | more)


RULES = {
    "keywords:existence": Rule(has_all, {"keywords": "words"}),
    "keywords:forbidden_words": Rule(has_none, {"forbidden_words": "words"}),
    "keywords:frequency": _counted(word_often, "frequency", "relation", keyword="word"),
    "keywords:letter_frequency": _counted(letter_often, "let_frequency", "let_relation", letter="word"),
    "length_constraints:number_words": _counted(words_number, "num_words", "relation"),
    "length_constraints:number_sentences": _counted(sentences_number, "num_sentences", "relation"),
    "length_constraints:number_paragraphs": _counted(starred_paragraphs, "num_paragraphs"),
    "length_constraints:nth_paragraph_first_word": _counted(
        nth_starts, "num_paragraphs", nth_paragraph="number", first_word="word"
    ),
    "detectable_content:number_placeholders": _counted(placeholders, "num_placeholders"),
    "detectable_content:postscript": Rule(has_postscript, {"postscript_marker": "word"}),
    "detectable_format:number_bullet_lists": _counted(bullets_number, "num_bullets"),
    "detectable_format:constrained_response": Rule(one_of_answers, {"options": "words"}, ("options",)),
    "detectable_format:number_highlighted_sections": _counted(highlights, "num_highlights"),
    "detectable_format:multiple_sections": _counted(sections, "num_sections", section_spliter="word"),
    "detectable_format:json_format": Rule(is_json),
    "detectable_format:title": Rule(has_title),
    "combination:two_responses": Rule(two_responses),
    "combination:repeat_prompt": Rule(repeats_prompt, {"prompt_to_repeat": "word"}),
    "startend:end_checker": Rule(ends_with, {"end_phrase": "word"}),
    "startend:quotation": Rule(quoted),
    "change_case:english_capital": Rule(all_capital),
    "change_case:english_lowercase": Rule(all_lowercase),
    "change_case:capital_word_frequency": _counted(capitals_often, "capital_frequency", "capital_relation"),
    "punctuation:no_comma": Rule(no_comma),
    "language:response_language": Rule(language_is, {"language": tuple(SCRIPTS)}),
    "zh:start_with": Rule(starts_with, {"start_phrase": "word"}),
    "zh:length_range": _counted(words_between, "min_words", max_words="number"),
    "zh:blank_line_paragraphs": _counted(paragraphs_number, "num_paragraphs"),
    "zh:paragraph_length": _counted(paragraphs_short, "max_words"),
    "zh:sentence_length": _counted(sentences_short, "max_words"),
    "zh:poem_lines": _counted(poem_lines, "num_lines", num_words="number"),
    "zh:keyword_order": Rule(in_order, {"keywords": "words"}),
    "zh:acrostic": Rule(acrostic, {"head": "word"}),
    "zh:numbered_list": _counted(numbered_items, "num_items"),
    "zh:json_keys": Rule(has_json_keys, {"keys": "words"}),
    "zh:table": _counted(has_table, "num_columns"),
    "zh:divider": _counted(dividers, "num_dividers"),
    "zh:book_title": Rule(first_line_title),
    "zh:code_block": Rule(has_code),
    "zh:script": Rule(in_script, {"script": SCRIPT_NAMES}),
    "zh:punctuation_width": Rule(punctuation_width, {"width": WIDTHS}),
    "zh:no_punctuation": Rule(no_punctuation),
    "zh:no_digits": Rule(no_digits),
    "zh:no_latin": Rule(no_latin),
    "zh:no_repeat": Rule(no_repeat),
}


def kwargs_fault(id: str, kwargs: dict) -> str | None:
    """参数哪里不对；都对是 None。id 要在 RULES 里。"""
    rule = RULES[id]
    for name, kind in rule.kwargs.items():
        if name not in kwargs:
            if name in rule.optional:
                continue
            return f"缺参数 {name}"
        value = kwargs[name]
        if kind == "number" and not _is_count(value):
            return f"{name} 要是 0 以上的整数，给的是 {value!r}"
        if kind == "word" and not _is_word(value):
            return f"{name} 要是一段字，给的是 {value!r}"
        if kind == "words" and not (isinstance(value, list) and value and all(map(_is_word, value))):
            return f"{name} 要是几段字的列表，给的是 {value!r}"
        allowed = (*RELATIONS, *RELATIONS.values()) if kind == "relation" else kind
        if isinstance(allowed, tuple) and value not in allowed:
            return f"{name} 可以是 {'、'.join(allowed)}，给的是 {value!r}"
    if unknown := [name for name in kwargs if name not in rule.kwargs]:
        return f"不认识的参数 {'、'.join(unknown)}"
    return None


def _is_count(value: object) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and value >= 0 and value == int(value)


def _is_word(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def follows_strict(id: str, kwargs: dict, answer: str) -> bool:
    return bool(answer.strip()) and RULES[id].check(answer, **kwargs)


def follows_loose(id: str, kwargs: dict, answer: str) -> bool:
    """模型爱加一句"好的，以下是…"或加粗：去掉首行、末行、* 号的各种组合里，有一种合就算。"""
    rows = answer.split("\n")
    without = [answer, *("\n".join(part).strip() for part in (rows[1:], rows[:-1], rows[1:-1]))]
    return any(follows_strict(id, kwargs, text) for each in without for text in (each, each.replace("*", "")))
