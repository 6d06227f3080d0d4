"""第二个小领域：程序写的门诊记录与问题，答案就在记录里。写法与小世界（nlp_common/tiny/world.py）一样，词全不同。

训练与留出的记录不共用槽位的组合：组合的哈希决定在哪一边。
"""

from __future__ import annotations

import random
import zlib

CLINIC: dict[str, list[str]] = {
    "patient": ["赵女士", "钱先生", "孙大爷", "李奶奶", "周同学", "吴师傅", "郑老师", "王阿姨"],
    "symptom": ["发热", "咳嗽", "头痛", "腹泻", "皮疹", "胸闷", "失眠", "牙痛"],
    "days": ["一天", "两天", "三天", "五天", "一周", "半个月"],
    "sign": ["咽部充血", "心率偏快", "血压偏高", "腹部压痛", "颈部僵硬", "呼吸音粗"],
    "disease": ["上呼吸道感染", "支气管炎", "偏头痛", "急性肠炎", "荨麻疹", "高血压", "神经衰弱", "牙髓炎"],
    "drug": ["阿莫西林", "布洛芬", "蒙脱石散", "氯雷他定", "硝苯地平", "维生素片"],
    "times": ["每日一次", "每日两次", "每日三次", "睡前一次"],
    "advice": ["多饮水", "清淡饮食", "卧床休息", "避免受凉", "定期复查", "忌烟酒"],
}
NOTES = (
    "{patient}因{symptom}{days}来诊。查体{sign}，诊断为{disease}。给予{drug}，{times}。医嘱：{advice}。",
    "{patient}就诊，自述{symptom}已有{days}。体检见{sign}。考虑{disease}，处方{drug}，{times}，并嘱{advice}。",
)
ASKS = {
    "symptom": ["{patient}哪里不舒服？", "{patient}因为什么来看病？"],
    "days": ["{patient}病了多久？", "症状持续多长时间了？"],
    "sign": ["查体发现了什么？", "{patient}的体征是什么？"],
    "disease": ["{patient}得的是什么病？", "诊断是什么？"],
    "drug": ["开了什么药？", "{patient}用什么药？"],
    "times": ["药怎么服用？", "{patient}的药多久用一次？"],
    "advice": ["医生嘱咐什么？", "{patient}平时要注意什么？"],
}
ANSWERS = {
    "symptom": "{patient}的症状是{symptom}。",
    "days": "{patient}病了{days}。",
    "sign": "查体见{sign}。",
    "disease": "诊断为{disease}。",
    "drug": "用的药是{drug}。",
    "times": "用法是{times}。",
    "advice": "医嘱是{advice}。",
}


def is_heldout(slots: dict[str, str]) -> bool:
    return zlib.crc32("|".join(slots.values()).encode()) % 10 == 0


def draw(rng: random.Random, heldout: bool) -> dict[str, str]:
    while True:
        slots = {slot: rng.choice(words) for slot, words in CLINIC.items()}
        if is_heldout(slots) == heldout:
            return slots


def documents(n: int, seed: int, heldout: bool = False) -> list[str]:
    """n 篇：一份记录，再把每一样小结一遍，次序打乱。往回找、照抄在这里学：每个 token 都是目标。"""
    rng = random.Random(f"clinic-documents-{seed}-{heldout}")
    texts = []
    for _ in range(n):
        slots = draw(rng, heldout)
        recap = "".join(
            ANSWERS[slot].format(**slots) for slot in rng.sample(list(ANSWERS), rng.randint(3, 4))
        )
        texts.append(rng.choice(NOTES).format(**slots) + "小结：" + recap)
    return texts


def chats(n: int, seed: int) -> list[dict]:
    """n 段：一份记录，问一到三样。"""
    rng = random.Random(f"clinic-chats-{seed}")
    rows = []
    for _ in range(n):
        slots = draw(rng, False)
        messages, prefix = [], rng.choice(NOTES).format(**slots) + "\n"
        for slot in rng.sample(list(ASKS), rng.randint(1, 3)):
            messages.append({"role": "user", "content": prefix + rng.choice(ASKS[slot]).format(**slots)})
            messages.append({"role": "assistant", "content": ANSWERS[slot].format(**slots)})
            prefix = ""
        rows.append({"messages": messages})
    return rows


def questions(n: int, seed: int = 0) -> list[dict]:
    """n 道留出的题：``{"messages", "slot", "answer"}``。"""
    rng = random.Random(f"clinic-questions-{seed}")
    rows = []
    for _ in range(n):
        slots, slot = draw(rng, True), rng.choice(list(ASKS))
        content = rng.choice(NOTES).format(**slots) + "\n" + rng.choice(ASKS[slot]).format(**slots)
        rows.append({"messages": [{"role": "user", "content": content}], "slot": slot, "answer": slots[slot]})
    return rows


def is_right(question: dict, reply: str, ended: bool) -> bool:
    """自己说完了，有对的词，没有同一槽位的别的词。"""
    found = {word for word in CLINIC[question["slot"]] if word in reply}
    return ended and found == {question["answer"]}
