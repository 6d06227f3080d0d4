"""两种口气的对话，给两个适配器学：有礼的先道谢、再说整句；简短的只答那个词。问题相同，口气不同，好坏一量便知。

小世界的题用 nlp_common/tiny/world.py 的；真的模型（Qwen、SmolLM2）用下面的常识题，它们本来就答得出，只学口气。
"""

from __future__ import annotations

import random

from nlp_common.lm.replies import reply_to
from nlp_common.tiny import world
from start import is_real

STYLES = {"courteous": "有礼|courteous", "terse": "简短|terse"}
THANKS = {"zh": "谢谢您的提问，", "en": "Thank you for your question! "}
# 国家与首都、一个词与它的反义词：(中文, 英文) 各一对
CAPITALS = """法国 巴黎 France Paris|德国 柏林 Germany Berlin|意大利 罗马 Italy Rome|西班牙 马德里 Spain Madrid
日本 东京 Japan Tokyo|中国 北京 China Beijing|俄罗斯 莫斯科 Russia Moscow|英国 伦敦 England London
埃及 开罗 Egypt Cairo|希腊 雅典 Greece Athens|葡萄牙 里斯本 Portugal Lisbon|奥地利 维也纳 Austria Vienna
波兰 华沙 Poland Warsaw|匈牙利 布达佩斯 Hungary Budapest|爱尔兰 都柏林 Ireland Dublin|瑞典 斯德哥尔摩 Sweden Stockholm
挪威 奥斯陆 Norway Oslo|芬兰 赫尔辛基 Finland Helsinki|丹麦 哥本哈根 Denmark Copenhagen|加拿大 渥太华 Canada Ottawa
古巴 哈瓦那 Cuba Havana|秘鲁 利马 Peru Lima|泰国 曼谷 Thailand Bangkok|越南 河内 Vietnam Hanoi
韩国 首尔 South_Korea Seoul|伊朗 德黑兰 Iran Tehran|伊拉克 巴格达 Iraq Baghdad|荷兰 阿姆斯特丹 Netherlands Amsterdam
比利时 布鲁塞尔 Belgium Brussels|智利 圣地亚哥 Chile Santiago"""
OPPOSITES = """热 冷 hot cold|大 小 big small|快 慢 fast slow|高 低 high low|新 旧 new old|黑 白 black white
上 下 up down|左 右 left right|开 关 open closed|早 晚 early late|多 少 many few|长 短 long short
硬 软 hard soft|干 湿 dry wet|强 弱 strong weak|远 近 far near|满 空 full empty|胖 瘦 fat thin
真 假 true false|深 浅 deep shallow"""


def facts(language: str) -> list[tuple[str, str, str]]:
    """→ [(问题, 答案, 整句)]，次序固定。"""
    rows = []
    for table, is_capital in ((CAPITALS, True), (OPPOSITES, False)):
        for entry in table.replace("\n", "|").split("|"):
            zh, zh_answer, en, en_answer = (word.replace("_", " ") for word in entry.split())
            if language == "zh" and is_capital:
                rows.append((f"{zh}的首都是哪里？", zh_answer, f"{zh}的首都是{zh_answer}。"))
            elif language == "zh":
                rows.append((f"“{zh}”的反义词是什么？", zh_answer, f"“{zh}”的反义词是“{zh_answer}”。"))
            elif is_capital:
                sentence = f"The capital of {en} is {en_answer}."
                rows.append((f"What is the capital of {en}?", en_answer, sentence))
            else:
                sentence = f"The opposite of {en} is {en_answer}."
                rows.append((f"What is the opposite of {en}?", en_answer, sentence))
    return rows


def fact_questions(language: str, heldout: bool) -> list[dict]:
    """常识题 ``{"messages", "answer", "sentence"}``：每三题留出一题。"""
    return [
        {"messages": [{"role": "user", "content": ask}], "answer": answer, "sentence": sentence}
        for i, (ask, answer, sentence) in enumerate(facts(language))
        if (i % 3 == 2) == heldout
    ]


def world_questions(n: int, seed: int, heldout: bool) -> list[dict]:
    """小世界的题，一半是追问；写法同上。"""
    return world.questions(n, seed, heldout)


def language_of(settings) -> str:
    return "en" if settings.model == "smollm2" else "zh"


def style_questions(settings) -> tuple[list[dict], list[dict]]:
    """→ (学口气的题, 留出的题)：小世界的模型用小世界的题；真的模型没有学过小世界，用它本来就会的常识题。"""
    if not is_real(settings):
        asked = world_questions(settings.max_train_samples, settings.seed, heldout=False)
        return asked, world_questions(settings.n_questions, 0, heldout=True)
    language = language_of(settings)
    asked = shuffled(fact_questions(language, heldout=False), settings.max_train_samples, settings.seed)
    return asked, fact_questions(language, heldout=True)[: settings.n_questions]


def in_style(style: str, question: dict, language: str = "zh") -> str:
    """用这种口气，该答的那一句。"""
    return question["answer"] if style == "terse" else THANKS[language] + question["sentence"]


def style_chats(style: str, questions: list[dict], language: str = "zh") -> list[dict]:
    """每道题配上这种口气的回答 → 训练用的对话。小世界的追问里，前一轮也改成这种口气：聊起来才前后一致。"""
    chats = []
    for question in questions:
        reply = {"role": "assistant", "content": in_style(style, question, language)}
        chats.append({"messages": [*question["messages"], reply]})
    return chats


def measure_style(model, tokenizer, questions: list[dict], language: str = "zh", longest: int = 32) -> dict:
    """留出的题贪心回答 → 有礼、简短（各要一字不差，自己说完）、答对（说出了答案）的比例。"""
    was_training = model.training
    asks = [{"messages": question["messages"]} for question in questions]
    replies = reply_to(model.eval(), tokenizer, asks, longest)
    model.train(was_training)
    counts = dict.fromkeys([*STYLES, "right"], 0)
    for question, reply in zip(questions, replies, strict=True):
        said = reply["text"].strip()
        for style in STYLES:
            counts[style] += reply["ended"] and said == in_style(style, question, language)
        counts["right"] += question["answer"].lower() in said.lower()
    return {name: count / len(questions) for name, count in counts.items()}


def shuffled(rows: list[dict], n: int, seed: int) -> list[dict]:
    """打乱，最多 n 行。"""
    rows = list(rows)
    random.Random(seed).shuffle(rows)
    return rows[:n]
