"""出题：从程序能检查的要求里抽几条，配上参数，写成中文的题目。格式同 IFEval：key、prompt、instruction_id_list、kwargs。

    general_prompts   写一段话、回答一个问题，加上一到三条要求：给真模型
    tiny_prompts      小世界的故事与问题，前面写着一到三条要求：给 Qwen 链的小模型；答案对不对，程序也知道
每道题都做得到：出题时程序先按要求写出一个合格的回答（"example"），写不出来的那几条不放在一起。
"""

from __future__ import annotations

import random

from chinese_counts import RELATIONS
from instruction_examples import repair, start_text
from instructions_zh import ANSWERS, RULES, follows_strict
from nlp_common.tiny import world
from nlp_common.tiny.judge import judge

TOPICS = {
    "春天": ["花朵", "阳光", "燕子", "田野", "细雨"],
    "读书": ["书店", "故事", "习惯", "知识", "安静"],
    "早餐": ["豆浆", "面包", "鸡蛋", "牛奶", "热气"],
    "长城": ["城墙", "砖石", "北方", "历史", "游客"],
    "手机": ["屏幕", "电池", "照片", "消息", "信号"],
    "跑步": ["呼吸", "汗水", "操场", "坚持", "清晨"],
    "大海": ["波浪", "沙滩", "渔船", "贝壳", "海风"],
    "老师": ["黑板", "粉笔", "耐心", "作业", "课堂"],
    "火车": ["车站", "铁轨", "窗外", "旅客", "远方"],
    "月亮": ["夜空", "中秋", "月饼", "思念", "星星"],
}
ASKS = (
    "请写一段话介绍{topic}。",
    "请谈谈你对{topic}的看法。",
    "请给朋友写一封短信，说说{topic}。",
    "请向小学生讲一讲{topic}。",
)
ALONE = ("detectable_format:constrained_response",)  # 回答只有一句，不与别的放在一起
LANGUAGE_NAMES = {"zh": "中文", "en": "英文", "ja": "日文"}
SCRIPT_WORDS = {"simplified": "简体", "traditional": "繁体"}
WIDTH_WORDS = {"full": "全角", "half": "半角"}

# 每条要求怎样对模型说；花括号里是参数
WORDING = {
    "keywords:existence": "要出现{keywords}",
    "keywords:forbidden_words": "不要出现{forbidden_words}",
    "keywords:frequency": "「{keyword}」出现的次数{relation} {frequency} 次",
    "keywords:letter_frequency": "「{letter}」字出现的次数{let_relation} {let_frequency} 次",
    "length_constraints:number_words": "字数{relation} {num_words}（标点不算）",
    "length_constraints:number_sentences": "句数{relation} {num_sentences} 句",
    "length_constraints:number_paragraphs": "分成 {num_paragraphs} 段，段与段之间用单独一行 *** 隔开",
    "length_constraints:nth_paragraph_first_word": "正好 {num_paragraphs} 段，用空行隔开，第 {nth_paragraph} 段以「{first_word}」开头",
    "detectable_content:number_placeholders": "至少留 {num_placeholders} 个占位符，用方括号括起来，例如【姓名】",
    "detectable_content:postscript": "最后另起一行写附言，以「{postscript_marker}」开头",
    "detectable_format:number_bullet_lists": "正好列 {num_bullets} 条，每条一行，以 * 开头",
    "detectable_format:constrained_response": "只能从这几个回答里选一个：{options}",
    "detectable_format:number_highlighted_sections": "至少用 **加粗** 标出 {num_highlights} 处",
    "detectable_format:multiple_sections": "至少分 {num_sections} 节，各节的标题写成「{section_spliter}」，{{}} 换成节的编号",
    "detectable_format:json_format": "整个回答写成 JSON",
    "detectable_format:title": "要有一个题目，写在 <<>> 里",
    "combination:two_responses": "给出两个不同的回答，中间用单独一行 ****** 隔开",
    "combination:repeat_prompt": "先把「{prompt_to_repeat}」一字不差地重复一遍，再回答",
    "startend:end_checker": "以「{end_phrase}」结尾",
    "startend:quotation": "整个回答用引号括起来",
    "change_case:english_capital": "用英文回答，字母全部大写",
    "change_case:english_lowercase": "用英文回答，字母全部小写",
    "change_case:capital_word_frequency": "全部大写的英文词{capital_relation} {capital_frequency} 个",
    "punctuation:no_comma": "不用逗号",
    "language:response_language": "用{language}回答",
    "zh:start_with": "以「{start_phrase}」开头",
    "zh:length_range": "字数在 {min_words} 到 {max_words} 之间（标点不算）",
    "zh:blank_line_paragraphs": "正好 {num_paragraphs} 段，用空行隔开",
    "zh:paragraph_length": "每段不多于 {max_words} 个字",
    "zh:sentence_length": "每句不多于 {max_words} 个字",
    "zh:poem_lines": "正好 {num_lines} 行，每行 {num_words} 个字",
    "zh:keyword_order": "依次出现{keywords}",
    "zh:acrostic": "每行一句，各行的第一个字连起来是「{head}」",
    "zh:numbered_list": "正好列 {num_items} 条，用 1. 2. 3. 编号",
    "zh:json_keys": "整个回答是一个 JSON 对象，键正好是{keys}",
    "zh:table": "用一张 {num_columns} 列的 Markdown 表",
    "zh:divider": "正好用 {num_dividers} 条分隔线，每条是单独一行 ---",
    "zh:book_title": "第一行是题目，用《》括起来",
    "zh:code_block": "要有一段用 ``` 围起来的代码",
    "zh:script": "全用{script}字",
    "zh:punctuation_width": "标点全用{width}的",
    "zh:no_punctuation": "不用任何标点",
    "zh:no_digits": "不用阿拉伯数字",
    "zh:no_latin": "不用英文字母",
    "zh:no_repeat": "没有两句相同",
}


def say(id: str, kwargs: dict) -> str:
    """一条要求的中文。"""
    shown = {}
    for name, value in ({"options": list(ANSWERS)} | kwargs).items():
        if isinstance(value, list):
            value = "、".join(f"「{each}」" for each in value)
        shown[name] = RELATIONS.get(value, value) if "relation" in name else value
    for name, words in (("language", LANGUAGE_NAMES), ("script", SCRIPT_WORDS), ("width", WIDTH_WORDS)):
        if name in shown:
            shown[name] = words.get(shown[name], shown[name])
    return WORDING[id].format(**shown)


# ---------------------------------------------------------------- 抽参数


def draw_kwargs(id: str, rng: random.Random, topic: str = "春天") -> dict:
    """给一条要求抽参数；词从话题里来。"""
    words = rng.sample(TOPICS[topic], 3)
    relation = rng.choice(["at least", "less than", "at most", "exactly"])
    match id:
        case "keywords:existence" | "zh:keyword_order":
            return {"keywords": words[: rng.randint(2, 3)]}
        case "keywords:forbidden_words":
            return {"forbidden_words": rng.sample(["许多", "生活", "喜欢", "愿意", topic], 2)}
        case "keywords:frequency":
            return {"keyword": words[0], "relation": relation, "frequency": rng.randint(2, 5)}
        case "keywords:letter_frequency":
            return {
                "letter": rng.choice("的了是我一"),
                "let_relation": relation,
                "let_frequency": rng.randint(2, 6),
            }
        case "length_constraints:number_words":
            return {"relation": relation, "num_words": rng.randint(20, 200)}
        case "length_constraints:number_sentences":
            return {"relation": relation, "num_sentences": rng.randint(2, 8)}
        case "length_constraints:number_paragraphs" | "zh:blank_line_paragraphs":
            return {"num_paragraphs": rng.randint(2, 5)}
        case "length_constraints:nth_paragraph_first_word":
            number = rng.randint(2, 4)
            return {"num_paragraphs": number, "nth_paragraph": rng.randint(1, number), "first_word": words[0]}
        case "detectable_content:number_placeholders":
            return {"num_placeholders": rng.randint(1, 4)}
        case "detectable_content:postscript":
            return {"postscript_marker": rng.choice(["附言：", "又及：", "P.S."])}
        case "detectable_format:number_bullet_lists":
            return {"num_bullets": rng.randint(2, 6)}
        case "detectable_format:number_highlighted_sections":
            return {"num_highlights": rng.randint(1, 4)}
        case "detectable_format:multiple_sections":
            return {
                "section_spliter": rng.choice(["第{}节", "Section {}"]),
                "num_sections": rng.randint(2, 4),
            }
        case "combination:repeat_prompt":
            return {"prompt_to_repeat": f"请说说{topic}"}
        case "startend:end_checker":
            return {"end_phrase": rng.choice(["你觉得呢？", "谢谢您的阅读。", "以上就是全部内容。"])}
        case "change_case:capital_word_frequency":
            return {"capital_relation": relation, "capital_frequency": rng.randint(1, 4)}
        case "language:response_language":
            return {"language": rng.choice(list(LANGUAGE_NAMES))}
        case "zh:start_with":
            return {"start_phrase": rng.choice(["您好，", "亲爱的朋友：", words[0]])}
        case "zh:length_range":
            low = rng.randint(20, 150)
            return {"min_words": low, "max_words": low + rng.randint(5, 50)}
        case "zh:paragraph_length":
            return {"max_words": rng.randint(20, 80)}
        case "zh:sentence_length":
            return {"max_words": rng.randint(8, 20)}
        case "zh:poem_lines":
            return {"num_lines": rng.choice([4, 8]), "num_words": rng.choice([5, 7])}
        case "zh:acrostic":
            return {"head": rng.choice(["春暖花开", "天天向上", "平安", "学而时习"])}
        case "zh:numbered_list":
            return {"num_items": rng.randint(2, 6)}
        case "zh:json_keys":
            return {"keys": words}
        case "zh:table":
            return {"num_columns": rng.randint(2, 4)}
        case "zh:divider":
            return {"num_dividers": rng.randint(1, 3)}
        case "zh:script":
            return {"script": rng.choice(list(SCRIPT_WORDS))}
        case "zh:punctuation_width":
            return {"width": rng.choice(list(WIDTH_WORDS))}
    return {}


# ---------------------------------------------------------------- 给真模型的题


def general_prompts(n: int, seed: int) -> list[dict]:
    """n 道题，每道一到三条要求，各种要求轮流出；example 是程序写的合格的回答。"""
    rng = random.Random(f"ifeval-{seed}")
    rows: list[dict] = []
    turn = list(RULES)
    rng.shuffle(turn)
    while len(rows) < n:
        topic = rng.choice(list(TOPICS))
        first = turn[len(rows) % len(turn)]
        others = [id for id in RULES if id not in (first, *ALONE)]
        more = 0 if first in ALONE else rng.choice([0, 0, 1, 1, 2])
        ids = [first, *rng.sample(others, more)]
        found = [(id, draw_kwargs(id, rng, topic)) for id in ids]
        example = make_example(found, topic)
        if example is None:
            continue
        asks = rng.choice(ASKS).format(topic=topic)
        prompt = asks + "要求：" + "；".join(say(id, kwargs) for id, kwargs in found) + "。"
        rows.append(
            {
                "key": len(rows) + 1,
                "prompt": prompt,
                "instruction_id_list": ids,
                "kwargs": [kwargs for _, kwargs in found],
                "example": example,
            }
        )
    return rows


def make_example(found: list[tuple[str, dict]], topic: str) -> str | None:
    """一条条改下来，几条都合格的回答；换两种次序都改不成是 None。"""
    for order in (found, found[::-1]):
        text = start_text(topic)
        for id, kwargs in order:
            text = repair(id, kwargs, text)
        if all(follows_strict(id, kwargs, text) for id, kwargs in found):
            return text
    return None


# ---------------------------------------------------------------- 给小模型的题


# 小世界里说得出来的要求，各占几份。没有哪一种说法都合；只答一个词，合得最多
TINY = (
    (3, "length_constraints:number_words", {"relation": ["at most"], "num_words": [3, 5]}),
    (2, "keywords:forbidden_words", {"forbidden_words": [["的"], ["是"]]}),
    (1, "zh:no_punctuation", {}),
    (1, "punctuation:no_comma", {}),
    (1, "zh:start_with", {"start_phrase": ["您好", "谢谢"]}),
    (1, "length_constraints:number_words", {"relation": ["at least"], "num_words": [8, 10]}),
)


def draw_tiny(rng: random.Random) -> tuple[str, dict]:
    _, id, choices = rng.choices(TINY, [share for share, *_ in TINY])[0]
    return id, {name: rng.choice(values) for name, values in choices.items()}


def tiny_prompts(n: int, seed: int, heldout: bool = True) -> list[dict]:
    """n 道小世界的题，前面加上一到三条要求；question 是原来的题（判对错用），example 又对又合格。"""
    rng = random.Random(f"ifeval-tiny-{seed}-{heldout}")
    rows: list[dict] = []
    questions = [q for q in world.questions(3 * n + 20, seed, heldout) if len(q["messages"]) == 1]
    for question in questions[:n]:
        while True:
            found = [draw_tiny(rng) for _ in range(rng.randint(1, 3))]
            good = [
                text for text in right_answers(question) if all(follows_strict(*each, text) for each in found)
            ]
            if good and len({id for id, _ in found}) == len(found):
                break
        told = "；".join(say(id, kwargs) for id, kwargs in found)
        rows.append(
            {
                "key": len(rows) + 1,
                "prompt": f"要求：{told}。\n{question['messages'][0]['content']}",
                "instruction_id_list": [id for id, _ in found],
                "kwargs": [kwargs for _, kwargs in found],
                "example": rng.choice(good),
                "question": question,
            }
        )
    return rows


def right_answers(question: dict) -> list[str]:
    """这道题的各种说法，都是对的：有没有客套、整句还是一个词、带不带句号。"""
    texts = [
        opening + body + end
        for opening in ("", *world.OPENINGS)
        for body in (question["sentence"], question["answer"])
        for end in ("", "。")
    ]
    return [text for text in texts if judge(question, text, True).right]
