"""会用工具才答得出的小世界：一架子故事（题里看不到）、三个工具、几种题；该怎样调用、答案是什么，程序都知道。

  look_up     小刚清晨去了哪里？                  查一次，读出来
  search      谁在花园见到了松鼠？                照词找一次，读出来
  calculate   小刚有23个苹果，又拿来48个，一共几个？  列算式，抄结果
  two_step    小刚清晨带的香蕉每个12元，一共多少元？   先查，再拿查到的去算（或去找）
  parallel    小刚清晨和小兰深夜各去了哪里？        一轮里两个调用
  direct      故事就在题里                       不必调用
  small_talk  你好                              不必调用
  missing     要用的工具没有列出来                 不能调用，说没有

训练与留出的题不共用槽位的组合（nlp_common/tiny/world.py）、也不共用两个数的组合。
"""

from __future__ import annotations

import random
import re
import zlib

from nlp_common.lm.tool_text import call_text, with_tools
from nlp_common.tiny.world import (
    QUESTION,
    SENTENCE,
    SMALL_TALK,
    WORLD,
    Draw,
    draw_slots,
    is_heldout,
    write_document,
    write_story,
)
from schema_check import check_call
from tool_calls import ERROR

SHELF = 12  # 架子上几个故事
KINDS = {  # 训练时各占多少；容易乱调用、答错的多练些
    "look_up": 0.14,
    "search": 0.11,
    "calculate": 0.16,
    "two_step": 0.16,
    "parallel": 0.05,
    "direct": 0.22,
    "small_talk": 0.06,
    "missing": 0.10,
}
UNNEEDED = ("direct", "small_talk", "missing")  # 不该调用的
NO_TOOL = "我没有合适的工具。"
NOT_FOUND = "没有找到"
PASSING = ("超时了，请再试一次。", "连不上，请再试一次。", "服务器太忙，请再试一次。")  # 再试一次也许就好的
SPOILED = 0.12  # 训练的对话里，多少是头一次没有调用成的


def _tool(name: str, description: str, arguments: list[str]) -> dict:
    properties = {argument: {"type": "string"} for argument in arguments}
    parameters = {"type": "object", "properties": properties, "required": arguments}
    return {
        "type": "function",
        "function": {"name": name, "description": description, "parameters": parameters},
    }


TOOLS = {
    "look_up": _tool("look_up", "查一个人某时的故事", ["person", "time"]),
    "search": _tool("search", "找有这些词的故事", ["words"]),
    "calculator": _tool("calculator", "算一个算式", ["expression"]),
}

# 问法与答法；"故事里的人、时间"之外，{n} 是带了几个
LOOK_UP_ASKS = {
    "place": "{person}{time}去了哪里？",
    "animal": "{person}{time}见到了什么动物？",
    "color": "{person}{time}见到的动物是什么颜色的？",
    "food": "{person}{time}拿出了什么？",
    "friend": "{person}{time}出门，后来谁来了？",
    "mood": "{person}{time}的心情怎么样？",
    "n": "{person}{time}带了几个吃的？",
}
SEARCH_ASKS = {
    ("place", "animal"): ("谁在{place}见到了{animal}？", "{person}在{place}见到了{animal}"),
    ("animal", "food"): ("谁给{animal}吃了{food}？", "{person}给{animal}吃了{food}"),
    ("place", "food"): ("谁带着{food}去了{place}？", "{person}带着{food}去了{place}"),
}
SUMS = {  # 运算符 → 问法；答法都是"答案是…"
    "+": ["{a}加{b}是多少？", "{person}有{a}个{food}，又拿来{b}个，一共几个？"],
    "-": ["{a}减{b}是多少？", "{person}有{a}个{food}，吃了{b}个，还剩几个？"],
    "*": ["{a}乘{b}是多少？", "一盒{food}有{a}个，{b}盒一共几个？"],
}
SAID = {"+": "加", "-": "减", "*": "乘"}
ANSWERS = SENTENCE | {"n": "{person}带了{n}个{food}"}
TOLD_AMOUNT = "{person}带了{n}个{food}。"


# ---------------------------------------------------------------- 1. 题


def tasks(n: int, seed: int, heldout: bool = False, kinds: dict[str, float] | None = None) -> list[dict]:
    """n 道题；kinds 是各种题占多少。每道：

    kind；question（用户的话）；tools（列出来的工具）；shelf（架子上的故事，每个是槽位与 text）；
    steps（每一步该有的几个调用，``{"name", "arguments"}``）；answer（答案里要有的几个词）；slot（答案是哪个槽位）；
    reply（照样子写的回答）；messages（列好工具的 system 与 user，可以直接交给模型）。
    """
    rng = random.Random(f"tools-{seed}-{heldout}")
    names, weights = zip(*(kinds or KINDS).items(), strict=True)
    return [_task(rng, rng.choices(names, weights)[0], heldout) for _ in range(n)]


def _task(rng: random.Random, kind: str, heldout: bool) -> dict:
    shelf = _shelf(rng, heldout)
    source = rng.choice(("look_up", "search", "calculate")) if kind == "missing" else kind
    task = ASK[source](rng, shelf, heldout)
    needed = {call["name"] for step in task["steps"] for call in step}
    if kind == "missing":
        listed = [name for name in TOOLS if name not in needed]
        task |= {"steps": [], "answer": [NO_TOOL], "slot": None, "reply": NO_TOOL}
    else:
        spare = [name for name in TOOLS if name not in needed]
        listed = [*needed, *rng.sample(spare, rng.randint(0 if needed else 1, len(spare)))]
    listed = sorted(listed)
    rng.shuffle(listed)
    task |= {"kind": kind, "shelf": shelf, "tools": [TOOLS[name] for name in listed]}
    task["messages"] = [
        {"role": "system", "content": with_tools("", task["tools"])},
        {"role": "user", "content": task["question"]},
    ]
    return task


def _shelf(rng: random.Random, heldout: bool) -> list[dict]:
    """一架子故事，没有两个是同一个人同一时间的。"""
    shelf: list[dict] = []
    while len(shelf) < SHELF:
        slots = draw_slots(Draw(rng))
        taken = any((each["person"], each["time"]) == (slots["person"], slots["time"]) for each in shelf)
        if is_heldout(slots) == heldout and not taken:
            shelf.append(_story(rng, slots))
    return shelf


def _story(rng: random.Random, slots: dict) -> dict:
    slots = slots | {"n": str(rng.randint(10, 99))}
    return slots | {"text": write_story(Draw(rng), slots) + TOLD_AMOUNT.format(**slots)}


def _made(
    question: str, steps: list[list[tuple[str, dict]]], answer: list[str], slot: str | None, reply: str
) -> dict:
    calls = [[{"name": name, "arguments": arguments} for name, arguments in step] for step in steps]
    return {"question": question, "steps": calls, "answer": answer, "slot": slot, "reply": reply}


def _of(story: dict) -> tuple[str, dict]:
    return "look_up", {"person": story["person"], "time": story["time"]}


def _ask_look_up(rng: random.Random, shelf: list[dict], heldout: bool) -> dict:
    story, slot = rng.choice(shelf), rng.choice(list(LOOK_UP_ASKS))
    question, reply = LOOK_UP_ASKS[slot].format(**story), ANSWERS[slot].format(**story)
    return _made(question, [[_of(story)]], [story[slot]], slot, reply)


def _only(shelf: list[dict], story: dict, pair: tuple[str, str]) -> bool:
    """架子上有这两个词的故事，只有这一个。"""
    return len(found_stories(shelf, [story[slot] for slot in pair])) == 1


def _ask_search(rng: random.Random, shelf: list[dict], heldout: bool) -> dict:
    while True:
        story, pair = rng.choice(shelf), rng.choice(list(SEARCH_ASKS))
        if _only(shelf, story, pair):
            break
    ask, reply = SEARCH_ASKS[pair]
    words = " ".join(story[slot] for slot in pair)
    step = [("search", {"words": words})]
    return _made(ask.format(**story), [step], [story["person"]], "person", reply.format(**story))


def _pair(rng: random.Random, heldout: bool) -> tuple[int, int]:
    """两个两位数，在训练的或留出的一边。"""
    while True:
        a, b = rng.randint(10, 99), rng.randint(10, 99)
        if is_heldout_pair(a, b) == heldout:
            return a, b


def is_heldout_pair(a: int, b: int) -> bool:
    """十分之一的组合留出，文档里、训练的算式里都没有；不论先后。"""
    return zlib.crc32(f"{min(a, b)}|{max(a, b)}".encode()) % 10 == 0


def _ask_calculate(rng: random.Random, shelf: list[dict], heldout: bool) -> dict:
    a, b = _pair(rng, heldout)
    sign = rng.choice(list(SUMS))
    a, b = (max(a, b), min(a, b)) if sign == "-" else (a, b)
    question = rng.choice(SUMS[sign]).format(a=a, b=b, **rng.choice(shelf))
    expression = f"{a}{sign}{b}"
    result = calculated(expression)
    return _made(question, [[("calculator", {"expression": expression})]], [result], "n", f"答案是{result}")


def _ask_two_step(rng: random.Random, shelf: list[dict], heldout: bool) -> dict:
    if rng.random() < 0.5:  # 先查带了几个，再算一共多少钱
        story = rng.choice(shelf)
        n = int(story["n"])
        price = rng.choice([p for p in range(10, 100) if p != n and is_heldout_pair(n, p) == heldout])
        question = "{person}{time}带的{food}每个{price}元，一共多少元？".format(price=price, **story)
        expression = f"{story['n']}*{price}"
        result = calculated(expression)
        steps = [[_of(story)], [("calculator", {"expression": expression})]]
        return _made(question, steps, [result], "n", f"答案是{result}")
    while True:  # 先查去了哪里，再找谁在那里见到了什么
        first, second = rng.sample(shelf, 2)
        if first["place"] != second["place"]:
            moved = {key: second[key] for key in WORLD} | {"place": first["place"]}
            if is_heldout(moved) != heldout:
                continue
            shelf[shelf.index(second)] = second = _story(rng, moved)
        if _only(shelf, second, ("place", "animal")) and first["animal"] != second["animal"]:
            break
    question = f"谁在{first['person']}{first['time']}去的地方见到了{second['animal']}？"
    words = f"{second['place']} {second['animal']}"
    reply = SEARCH_ASKS["place", "animal"][1].format(**second)
    steps = [[_of(first)], [("search", {"words": words})]]
    return _made(question, steps, [second["person"]], "person", reply)


def _ask_parallel(rng: random.Random, shelf: list[dict], heldout: bool) -> dict:
    first, second = rng.sample(shelf, 2)
    while first["person"] == second["person"] or first["place"] == second["place"]:
        first, second = rng.sample(shelf, 2)
    question = f"{first['person']}{first['time']}和{second['person']}{second['time']}各去了哪里？"
    told = [SENTENCE["place"].format(**story) for story in (first, second)]
    return _made(question, [[_of(first), _of(second)]], told, None, "，".join(told))


def _ask_direct(rng: random.Random, shelf: list[dict], heldout: bool) -> dict:
    story, slot = rng.choice(shelf), rng.choice(list(QUESTION))
    question = story["text"] + "\n" + rng.choice(QUESTION[slot]).format(**story)
    return _made(question, [], [story[slot]], slot, SENTENCE[slot].format(**story))


def _ask_small_talk(rng: random.Random, shelf: list[dict], heldout: bool) -> dict:
    asks, reply = rng.choice(SMALL_TALK)
    return _made(rng.choice(asks), [], [reply], None, reply)


ASK = {
    "look_up": _ask_look_up,
    "search": _ask_search,
    "calculate": _ask_calculate,
    "two_step": _ask_two_step,
    "parallel": _ask_parallel,
    "direct": _ask_direct,
    "small_talk": _ask_small_talk,
}


# ---------------------------------------------------------------- 2. 工具真的做什么，答得对不对


def run_tool(task: dict, call: dict) -> str:
    """做一个调用（``{"name", "arguments"}``）；参数不合、没有这个工具，结果以 ERROR 开头。"""
    if faults := check_call(call, task["tools"]):
        return ERROR + "；".join(faults)
    name, arguments = call["name"], call["arguments"]
    if name == "look_up":
        wanted = (arguments["person"], arguments["time"])
        return "\n".join(s["text"] for s in task["shelf"] if (s["person"], s["time"]) == wanted) or NOT_FOUND
    if name == "search":
        found = found_stories(task["shelf"], arguments["words"].split())
        return "\n".join(story["text"] for story in found[:3]) or NOT_FOUND
    try:
        return calculated(arguments["expression"])
    except ValueError as error:
        return ERROR + str(error)


def found_stories(shelf: list[dict], words: list[str]) -> list[dict]:
    """架子上每个词都有的故事。"""
    return [story for story in shelf if words and all(word in story["text"] for word in words)]


def calculated(expression: str) -> str:
    """两个整数的加、减、乘；别的是 ValueError。"""
    parts = re.fullmatch(r"\s*(\d{1,9})\s*([-+*])\s*(\d{1,9})\s*", expression, re.ASCII)
    if parts is None:
        raise ValueError(f"算不了 {expression[:40]}，要是两个整数相加、相减或相乘")
    a, sign, b = int(parts[1]), parts[2], int(parts[3])
    return str(a + b if sign == "+" else a - b if sign == "-" else a * b)


def is_right(task: dict, text: str) -> bool:
    """最后的回答对不对：该有的词都有，同一槽位的别的词一个也没有；是数的，只写了这一个数。"""
    slot = task["slot"]
    if slot == "n":
        return re.findall(r"\d+", text) == task["answer"]
    if slot is None:
        return text.strip() == task["reply"]
    others = [word for word in WORLD[slot] if word not in task["answer"]]
    return all(word in text for word in task["answer"]) and not any(word in text for word in others)


# ---------------------------------------------------------------- 3. 训练用的对话


def chats(n: int, seed: int, tools: bool = True, uneven: bool = False) -> list[dict]:
    """n 段训练的对话 ``{"messages"}``：调用、结果、回答；有一些头一次没有调用成，再来一次才成。

    tools=False：同样的题，没有工具，直接回答。uneven：示范有好有坏（真的数据多半这样），要用工具的有两成不查就猜，
    一半的步查到了还再查一遍，题里就有的有一半还去查。
    """
    rng = random.Random(f"tool-chats-{seed}")
    if uneven:
        return [{"messages": _carelessly(task, rng)} for task in tasks(n, seed)]
    return [{"messages": _played(task, rng) if tools else _told(task)} for task in tasks(n, seed)]


def _told(task: dict) -> list[dict]:
    return [task["messages"][1], {"role": "assistant", "content": task["reply"]}]


def _played(task: dict, rng: random.Random) -> list[dict]:
    messages = list(task["messages"])
    for step in task["steps"]:
        call = {"role": "assistant", "content": call_text(step)}
        if rng.random() < SPOILED:
            messages += _first_try(task, step, rng)
        messages.append(call)
        messages += [{"role": "tool", "content": run_tool(task, each)} for each in step]
    return [*messages, {"role": "assistant", "content": task["reply"]}]


def _carelessly(task: dict, rng: random.Random) -> list[dict]:
    if task["steps"] and rng.random() < 0.2:
        return [*task["messages"], {"role": "assistant", "content": _guess(task, rng)}]
    steps = task["steps"]
    if task["kind"] == "direct" and rng.random() < 0.5 and TOOLS["look_up"] in task["tools"]:
        story = next(story for story in task["shelf"] if story["text"] in task["question"])
        name, arguments = _of(story)
        steps = [[{"name": name, "arguments": arguments}]]
    twice = [step for step in steps for _ in range(rng.choice((1, 2)))]
    return _played(task | {"steps": twice}, rng)


def _guess(task: dict, rng: random.Random) -> str:
    """没有查，照样子编一个：词换成同类的随便一个，数换成随便一个。"""
    slot = task["slot"] or "place"  # 一轮两个的，问的都是地点
    if slot == "n":
        return re.sub(r"\d+", lambda found: str(rng.randint(10, 9999)), task["reply"])
    return re.sub("|".join(WORLD[slot]), lambda found: rng.choice(WORLD[slot]), task["reply"])


def _first_try(task: dict, step: list[dict], rng: random.Random) -> list[dict]:
    """没有成的头一次：调用对，工具一时不行；或者调用写坏了，工具说坏在哪里（写坏的不学，只是上文）。"""
    if rng.random() < 0.5:
        result = rng.choice([ERROR + rng.choice(PASSING), rubbish(rng)])
        tried = {"role": "assistant", "content": call_text(step)}
        return [tried, *({"role": "tool", "content": result} for _ in step)]
    spoiled = [spoil(call, task, rng) for call in step]
    tried = {"role": "assistant", "content": call_text(spoiled), "weight": 0}
    return [tried, *({"role": "tool", "content": run_tool(task, call)} for call in spoiled)]


def rubbish(rng: random.Random) -> str:
    """工具给的乱码。"""
    return "".join(rng.choice("#@$%&!?~^|") for _ in range(rng.randint(0, 12)))


def spoil(call: dict, task: dict, rng: random.Random) -> dict:
    """把一个对的调用写坏：工具名错、参数名错、少一个参数、多一个参数，或者值的类型不对。"""
    name, arguments = call["name"], dict(call["arguments"])
    key = rng.choice(list(arguments))
    how = rng.choice(("name", "key", "lost", "more", "type"))
    if how == "name":
        name = rng.choice(["find", "read", "run"])
    elif how == "key":
        arguments = {("name" if each == key else each): value for each, value in arguments.items()}
    elif how == "lost":
        del arguments[key]
    elif how == "more":
        arguments["name"] = arguments[key]
    else:
        arguments[key] = 0
    return {"name": name, "arguments": arguments}


# ---------------------------------------------------------------- 4. 预训练用的文档


def documents(n: int, seed: int, digits: bool) -> list[str]:
    """n 篇文档；digits=False 是小世界的故事与回顾，没有数字；True 的有带数的故事、算式、得数，都要照抄。"""
    rng = random.Random(f"tool-documents-{seed}-{digits}")
    texts = []
    while len(texts) < n:
        draw = Draw(rng)
        slots = draw_slots(draw)
        if is_heldout(slots):
            continue
        if not digits:
            texts.append(write_document(draw, slots))
        else:
            write = rng.choices((_count_document, _number_document, _result_document), (4, 4, 3))[0]
            texts.append(write(rng, slots))
    return texts


def _count_document(rng: random.Random, slots: dict) -> str:
    """带数的故事，回顾几个槽位，总有带了几个。"""
    story = _story(rng, slots)
    told = rng.sample([slot for slot in ANSWERS if slot != "n"], 3)
    told.insert(rng.randint(0, 3), "n")
    return story["text"] + "回想一下，" + "".join(ANSWERS[slot].format(**story) + "。" for slot in told)


def _number_document(rng: random.Random, slots: dict) -> str:
    """算术题与它的算式：紧挨着抄的，下一句写的，隔几句再写的。只抄，不算：眼前的会抄了，远处的才跟着会。"""
    between = _between(rng, slots)
    near = _problem(rng, ["{a}{said}{b}"])
    return f"{near[0]}写成{near[1]}。" + "".join(
        f"{question}{middle}算式是{expression}。"
        for middle, (question, expression) in (("", _problem(rng)), (between, _problem(rng)))
    )


def _result_document(rng: random.Random, slots: dict) -> str:
    """一到四位的得数，照抄：几位都有，不多抄也不少抄。紧挨着的，隔几句的，换了行的。"""
    lines = []
    for between in ("，", "。\n", "。" + _between(rng, slots), "。" + _between(rng, slots)):
        digits = rng.choice((1, 2, 3, 3, 4, 4))
        result = rng.randrange(10 ** (digits - 1), 10**digits)
        lines.append(f"算出来{result}{between}答案是{result}。")
    rng.shuffle(lines)
    return "".join(lines)


def _between(rng: random.Random, slots: dict) -> str:
    """故事里的一到三句。"""
    sentences = write_story(Draw(rng), slots).split("。")[:-1]
    return "".join(each + "。" for each in rng.sample(sentences, rng.randint(1, 3)))


def _problem(rng: random.Random, forms: list[str] | None = None) -> tuple[str, str]:
    """一道算术题的话，与它的算式。"""
    sign = rng.choice(list(SUMS))
    a, b = _pair(rng, heldout=False)
    words = {slot: rng.choice(WORLD[slot]) for slot in ("person", "food")}
    question = rng.choice(forms or SUMS[sign]).format(a=a, b=b, said=SAID[sign], **words)
    return question, f"{a}{sign}{b}"
