"""合格与不合格的样子：每条要求，程序把一段文字改成合格的（repair），再把合格的改成不合格的（spoil）。

两个用处：出题时，几条要求一条条改下来全都合格，这道题才出，所以每道题都做得到；
测试时，检查器对着构造好的一对，一个该过，一个该不过。
"""

from __future__ import annotations

import json
import re
from itertools import count

from chinese_counts import (
    FULL_WIDTH,
    HALF_WIDTH,
    NUMERAL,
    PUNCTUATION,
    SENTENCE_END,
    WORD,
    count_of,
    count_words,
    paragraphs,
    sentences,
)
from instructions_zh import ANSWERS

FILLERS = (
    "说到这里，每个人想到的都不一样。",
    "有人喜欢它的热闹，有人喜欢它的安静。",
    "小时候见过的样子，长大以后还记得清楚。",
    "如果有时间，不妨自己去看一看。",
    "慢慢地看，总能看出一些从前没有注意到的地方。",
    "朋友问起来，我也会这样回答。",
    "道理并不难懂，难的是坚持下去。",
    "这样的小事，往往最让人高兴。",
    "一年又一年，它变了，又好像没有变。",
    "老人说，好东西要慢慢品味。",
)
DIGITS = "零一二三四五六七八九"
ENGLISH = "Reading a little every day is a good habit. It takes ten minutes and it opens many doors."
JAPANESE = "毎日すこしずつ本を読むのは、とてもいい習慣です。"
TRADITIONAL = "讀書是一種習慣。每天讀幾頁，時間長了，見識就廣了。"
WIDEN = str.maketrans(HALF_WIDTH[:8], "，。；：！？（）")
NARROW = str.maketrans(FULL_WIDTH, ",.;:!?(),\"\"''")


# ---------------------------------------------------------------- 加长、截短


def filler(number: int) -> str:
    """第几句套话；各句不相同，没有数字和字母。"""
    if number < len(FILLERS):
        return FILLERS[number]
    return f"再说第{''.join(DIGITS[int(each)] for each in str(number))}件事。"


def start_text(topic: str) -> str:
    return f"{topic}离我们的生活很近，许多人都愿意谈起它。" + FILLERS[0]


def lengthen(text: str, at_least: int) -> str:
    """后面添套话，添到不少于几个字。"""
    for number in count(1):
        if count_words(text) >= at_least:
            return text
        text += filler(number)


def shorten(text: str, at_most: int) -> str:
    """只留前几个字。"""
    found = list(WORD.finditer(text))
    return text if len(found) <= at_most else text[: found[at_most - 1].end()] + "。"


def fit(text: str, low: int, high: int) -> str:
    return shorten(lengthen(text, low), high)


def fit_sentences(text: str, low: int, high: int) -> str:
    found = sentences(text)[:high]
    number = 0
    while len(found) < low:
        number += 1
        found.append(filler(number).rstrip("。"))
    return "。".join(found) + "。"


def bounds(relation: str, wanted: int, wrong: bool = False) -> tuple[int, int]:
    """relation 许可的最少与最多；wrong：刚好越过界的那个数。"""
    many = 10**6
    if relation == "at least":
        return (wanted - 1, wanted - 1) if wrong else (wanted, many)
    if relation == "less than":
        return (wanted, wanted) if wrong else (1, wanted - 1)
    if relation == "at most":
        return (wanted + 1, wanted + 1) if wrong else (1, wanted)
    return (wanted + 1, wanted + 1) if wrong else (wanted, wanted)


def repeat_word(text: str, word: str, low: int, high: int) -> str:
    """让 word 出现的次数落在 low 与 high 之间。"""
    if count_of(text, word) > high:
        text = text.replace(word, "")
    missing = low - count_of(text, word)
    return text + "".join(f"这里有{word}。" for _ in range(missing))


def join(text: str, number: int, between: str) -> str:
    """text 后面接上几段套话，一共 number 段。"""
    return between.join([text, *(filler(place) for place in range(1, number))])


# ---------------------------------------------------------------- 改成合格的


def repair(id: str, kwargs: dict, text: str) -> str:
    match id, kwargs:
        case "keywords:existence", {"keywords": words}:
            return text + "".join(f"还要说到{word}。" for word in words if word not in text)
        case "keywords:forbidden_words", {"forbidden_words": words}:
            for word in words:
                text = text.replace(word, "")
            return text
        case "keywords:frequency", {"keyword": word, "relation": relation, "frequency": wanted}:
            return repeat_word(text, word, *bounds(relation, wanted))
        case "keywords:letter_frequency", {"letter": word, "let_relation": relation, "let_frequency": wanted}:
            return repeat_word(text, word, *bounds(relation, wanted))
        case "length_constraints:number_words", {"relation": relation, "num_words": wanted}:
            return fit(text, *bounds(relation, wanted))
        case "length_constraints:number_sentences", {"relation": relation, "num_sentences": wanted}:
            return fit_sentences(text, *bounds(relation, wanted))
        case "length_constraints:number_paragraphs", {"num_paragraphs": number}:
            return join(text, number, "\n***\n")
        case "length_constraints:nth_paragraph_first_word", {"nth_paragraph": nth, "first_word": word}:
            parts = join(text, kwargs["num_paragraphs"], "\n\n").split("\n\n")
            parts[nth - 1] = word + parts[nth - 1]
            return "\n\n".join(parts)
        case "detectable_content:number_placeholders", {"num_placeholders": number}:
            return text + "".join(f"【{DIGITS[place % 10]}】" for place in range(number))
        case "detectable_content:postscript", {"postscript_marker": marker}:
            return f"{text}\n{marker}别忘了带伞。"
        case "detectable_format:number_bullet_lists", {"num_bullets": number}:
            return text + "".join(f"\n* {filler(place)}" for place in range(number))
        case "detectable_format:constrained_response", _:
            return kwargs.get("options", ANSWERS)[0]
        case "detectable_format:number_highlighted_sections", {"num_highlights": number}:
            return text + "".join(f"**重点{DIGITS[place % 10]}**。" for place in range(number))
        case "detectable_format:multiple_sections", {"section_spliter": mark, "num_sections": number}:
            heads = (
                mark.format(place + 1) if "{}" in mark else f"{mark} {place + 1}" for place in range(number)
            )
            return "\n".join(f"{head}\n{filler(place)}" for place, head in enumerate(heads))
        case "detectable_format:json_format", _:
            return json.dumps({"回答": text}, ensure_ascii=False)
        case "detectable_format:title", _:
            return f"<<短文>>\n{text}"
        case "combination:two_responses", _:
            return f"{text}\n******\n{filler(3)}"
        case "combination:repeat_prompt", {"prompt_to_repeat": prompt}:
            return f"{prompt}\n{text}"
        case "startend:end_checker", {"end_phrase": phrase}:
            return text + phrase
        case "startend:quotation", _:
            return f"“{text}”"
        case "change_case:english_capital", _:
            return ENGLISH.upper()
        case "change_case:english_lowercase", _:
            return ENGLISH.lower()
        case "change_case:capital_word_frequency", {
            "capital_relation": relation,
            "capital_frequency": wanted,
        }:
            low, high = bounds(relation, wanted)
            return (text if high >= 10**6 else text.lower()) + " NLP" * (
                low if relation != "less than" else 0
            )
        case "punctuation:no_comma", _:
            return re.sub("[,，]", "。", text)
        case "language:response_language", {"language": language}:
            return {"en": ENGLISH, "ja": JAPANESE}.get(language, text)
        case _:
            return repair_chinese(id, kwargs, text)


def repair_chinese(id: str, kwargs: dict, text: str) -> str:
    """zh: 开头的。"""
    match id, kwargs:
        case "zh:start_with", {"start_phrase": phrase}:
            return phrase + text
        case "zh:length_range", {"min_words": low, "max_words": high}:
            return fit(text, low, high)
        case "zh:blank_line_paragraphs", {"num_paragraphs": number}:
            return join(text, number, "\n\n")
        case "zh:paragraph_length", {"max_words": most}:
            return "\n\n".join(shorten(each, most) for each in paragraphs(text))
        case "zh:sentence_length", {"max_words": most}:
            return "".join(
                shorten(each, most).rstrip("。") + "。" for each in sentences(text.replace("，", "。"))
            )
        case "zh:poem_lines", {"num_lines": number, "num_words": width}:
            words = WORD.findall(lengthen(PUNCTUATION.sub("", text), number * width))
            return "\n".join("".join(words[row * width : (row + 1) * width]) for row in range(number))
        case "zh:keyword_order", {"keywords": words}:
            return text + "".join(f"接着说{word}。" for word in words)
        case "zh:acrostic", {"head": head}:
            return "\n".join(char + filler(place) for place, char in enumerate(head))
        case "zh:numbered_list", {"num_items": number}:
            return text + "".join(f"\n{place + 1}. {filler(place)}" for place in range(number))
        case "zh:json_keys", {"keys": keys}:
            return json.dumps(dict.fromkeys(keys, text), ensure_ascii=False)
        case "zh:table", {"num_columns": columns}:
            rows = ("甲", "---", "乙")
            return text + "".join("\n|" + f" {cell} |" * columns for cell in rows)
        case "zh:divider", {"num_dividers": number}:
            return text + "".join(f"\n---\n{filler(place + 1)}" for place in range(number))
        case "zh:book_title", _:
            return f"《短文》\n{text}"
        case "zh:code_block", _:
            return f"{text}\n```python\nprint('你好')\n```"
        case "zh:script", {"script": script}:
            return text if script == "simplified" else TRADITIONAL
        case "zh:punctuation_width", {"width": width}:
            return text.translate(WIDEN if width == "full" else NARROW)
        case "zh:no_punctuation", _:
            return PUNCTUATION.sub("", text)
        case "zh:no_digits", _:
            return re.sub("[0-9０-９]", "", text)
        case "zh:no_latin", _:
            return re.sub("[A-Za-zＡ-Ｚａ-ｚ]", "", text)
        case "zh:no_repeat", _:
            return "。".join(dict.fromkeys(sentences(text))) + "。"
    raise KeyError(id)


# ---------------------------------------------------------------- 改成不合格的


def spoil(id: str, kwargs: dict, text: str) -> str:
    """text 是合格的；改成刚刚不合格的。"""
    match id, kwargs:
        case "keywords:existence", {"keywords": words}:
            return text.replace(words[-1], "")
        case "keywords:forbidden_words", {"forbidden_words": words}:
            return f"{text}再说说{words[-1]}的事。"
        case "keywords:frequency", {"keyword": word, "relation": relation, "frequency": wanted}:
            return spoil_often(text, word, relation, wanted)
        case "keywords:letter_frequency", {"letter": word, "let_relation": relation, "let_frequency": wanted}:
            return spoil_often(text, word, relation, wanted)
        case "length_constraints:number_words", {"relation": relation, "num_words": wanted}:
            return fit(text, *bounds(relation, wanted, wrong=True))
        case "length_constraints:number_sentences", {"relation": relation, "num_sentences": wanted}:
            return fit_sentences(text, *bounds(relation, wanted, wrong=True))
        case "length_constraints:number_paragraphs", _:
            return f"{text}\n***\n{filler(0)}"
        case "length_constraints:nth_paragraph_first_word", {"nth_paragraph": nth}:
            parts = paragraphs(text)
            parts[nth - 1] = "另外，" + parts[nth - 1]
            return "\n\n".join(parts)
        case "detectable_content:number_placeholders", _:
            return re.sub(r"[【\[]", "", text, count=1)
        case "detectable_content:postscript", {"postscript_marker": marker}:
            return text.replace(marker, "")
        case "detectable_format:number_bullet_lists", _:
            return f"{text}\n* 多出来的一条。"
        case "detectable_format:constrained_response", _:
            return text + kwargs.get("options", ANSWERS)[1]
        case "detectable_format:number_highlighted_sections", _:
            return text.replace("**", "", 2)
        case "detectable_format:multiple_sections", {"section_spliter": mark}:
            before, _, after = mark.partition("{}")
            return re.sub(re.escape(before) + NUMERAL + re.escape(after), "", text, count=1)
        case "detectable_format:json_format", _:
            return text[:-1]
        case "detectable_format:title", _:
            return text.replace("<<", "<")
        case "combination:two_responses", _:
            return text.replace("******", "***")
        case "combination:repeat_prompt" | "startend:quotation", _:
            return "好的，" + text
        case "startend:end_checker", _:
            return text + "就这些了哦"
        case "change_case:english_capital", _:
            return text.lower()
        case "change_case:english_lowercase", _:
            return text.upper()
        case "change_case:capital_word_frequency", {
            "capital_relation": relation,
            "capital_frequency": wanted,
        }:
            return text.lower() + " NLP" * bounds(relation, wanted, wrong=True)[0]
        case "punctuation:no_comma", _:
            return text + "，好的"
        case "language:response_language", {"language": language}:
            return filler(0) if language != "zh" else ENGLISH
        case _:
            return spoil_chinese(id, kwargs, text)


def spoil_often(text: str, word: str, relation: str, wanted: int) -> str:
    low, high = bounds(relation, wanted, wrong=True)
    return repeat_word(text.replace(word, ""), word, low, high) or "。"


def spoil_chinese(id: str, kwargs: dict, text: str) -> str:
    match id, kwargs:
        case "zh:start_with" | "zh:acrostic", _:
            return "另外，" + text
        case "zh:length_range", {"min_words": low}:
            return shorten(text, low - 1)
        case "zh:blank_line_paragraphs", _:
            return f"{text}\n\n{filler(0)}"
        case "zh:paragraph_length" | "zh:sentence_length", {"max_words": most}:
            return SENTENCE_END.sub("", text) + "长" * (most + 1)
        case "zh:poem_lines", _:
            return text + "多"
        case "zh:keyword_order", {"keywords": words}:
            for word in words:
                text = text.replace(word, "")
            return text + "，".join(reversed(words))
        case "zh:numbered_list", {"num_items": number}:
            return f"{text}\n{number + 1}. 多出来的一条。"
        case "zh:json_keys", _:
            return json.dumps(json.loads(text) | {"多出来的": ""}, ensure_ascii=False)
        case "zh:table", {"num_columns": columns}:
            return text + "\n|" + " 丙 |" * (columns + 1)
        case "zh:divider", _:
            return f"{text}\n---"
        case "zh:book_title", _:
            return text.partition("\n")[2]
        case "zh:code_block", _:
            return text.replace("```", "")
        case "zh:script", {"script": script}:
            return text + ("這個" if script == "simplified" else "这个")
        case "zh:punctuation_width", {"width": width}:
            return text + (", " if width == "full" else "，")
        case "zh:no_punctuation", _:
            return text + "。"
        case "zh:no_digits", _:
            return text + "3"
        case "zh:no_latin", _:
            return text + "OK"
        case "zh:no_repeat", _:
            return text + sentences(text)[0] + "。"
    raise KeyError(id)
