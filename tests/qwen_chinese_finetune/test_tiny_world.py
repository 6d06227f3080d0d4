"""小世界：同一种子写同样的数据，训练与留出不共享组合，nats 就是真正的熵，评判不冤枉也不放水。"""

import itertools
import math
import random
import re
from collections import Counter, defaultdict

import pytest
from qwen_common import judging, tiny_world
from qwen_common.judging import distinct_n, judge, measure_chat
from qwen_common.tiny_world import (
    CLOSES,
    QUALITY,
    QUESTION,
    RECAPS,
    SENTENCE,
    SLOTS,
    SMALL_TALK,
    STORY,
    STYLES,
    UNHELPFUL,
    WORLD,
    Draw,
    draw_slots,
    is_heldout,
    write_document,
    write_story,
)

KINDS = {
    "documents": tiny_world.documents,
    "chats": tiny_world.chats,
    "pairs": tiny_world.pairs,
    "questions": tiny_world.questions,
}
STYLED = ["courteous", "plain", "terse"]  # 答得出答案的口气


# ---- 独立的读法：从文本倒推出槽位 ----


def parse_story(text: str) -> tuple[dict[str, str], list[int], str]:
    """文本 → (槽位, 每句用了哪种写法, 故事之后的部分)；每一句都必须只有一种读法。"""
    slots: dict[str, str] = {}
    used = []
    for variants in STORY:
        readings = []
        for index, variant in enumerate(variants):
            pattern = re.escape(variant)
            for slot in SLOTS:
                values = [slots[slot]] if slot in slots else WORLD[slot]
                pattern = pattern.replace(re.escape("{" + slot + "}"), f"(?P<{slot}>{'|'.join(values)})", 1)
                assert re.escape("{" + slot + "}") not in pattern
            if match := re.match(pattern, text):
                readings.append((index, match))
        if len(readings) != 1:
            raise ValueError(f"{text!r} 有 {len(readings)} 种读法")
        ((index, match),) = readings
        used.append(index)
        slots |= match.groupdict()
        text = text[match.end() :]
    assert set(slots) == set(SLOTS)
    return {slot: slots[slot] for slot in SLOTS}, used, text


def slot_asked(ask: str, slots: dict[str, str]) -> str:
    """这句话问的是哪个槽位；任何两个槽位都不会问出同一句话。"""
    (slot,) = {s for s in SLOTS for q in QUESTION[s] if q.format(**slots) == ask}
    return slot


def parse_prompt(messages: list[dict]) -> tuple[dict[str, str], list[str]]:
    """消息 → (故事的槽位, 每一轮问的是哪个槽位)。"""
    slots, _, rest = parse_story(messages[0]["content"])
    assert rest.startswith("\n")
    asks = [rest[1:]] + [m["content"] for m in messages[1:] if m["role"] == "user"]
    return slots, [slot_asked(ask, slots) for ask in asks]


def slots_of(kind: str, row: dict) -> dict[str, str] | None:
    """任何一种数据的一行 → 槽位；寒暄是 None。"""
    if kind == "documents":
        return parse_story(row["text"])[0]
    messages = row["prompt"] if kind == "pairs" else row["messages"]
    if any(messages[0]["content"] in asks for asks, _ in SMALL_TALK):
        return None
    return parse_prompt(messages)[0]


def question_for(slots: dict[str, str], slot: str) -> dict:
    return {"slot": slot, "answer": slots[slot], "sentence": SENTENCE[slot].format(**slots)}


def random_slots(seed: int) -> dict[str, str]:
    rng = random.Random(seed)
    return {slot: rng.choice(values) for slot, values in WORLD.items()}


# 故事与回顾之间的那几个字
LEAD = parse_story(write_document(Draw(random.Random(0)), random_slots(0), recaps=0))[2]

# ---- 决定性与划分 ----


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("heldout", [False, True])
def test_same_seed_writes_the_same_rows(kind, heldout):
    first = KINDS[kind](30, 7, heldout=heldout)
    random.random()  # 与全局随机数无关
    assert first == KINDS[kind](30, 7, heldout=heldout)
    assert len(first) == 30
    assert first != KINDS[kind](30, 8, heldout=heldout)
    assert first[:10] == KINDS[kind](10, 7, heldout=heldout)  # 少要几行就是前几行


@pytest.mark.parametrize("kind", KINDS)
def test_train_and_heldout_never_share_a_combination(kind):
    combinations = {}
    for heldout in (False, True):
        found = [slots_of(kind, row) for seed in (0, 1) for row in KINDS[kind](200, seed, heldout=heldout)]
        stories = [slots for slots in found if slots]
        assert len(stories) > 300
        assert {is_heldout(slots) for slots in stories} == {heldout}
        combinations[heldout] = {tuple(slots.values()) for slots in stories}
    assert not combinations[False] & combinations[True]


def test_one_tenth_of_combinations_is_held_out_whatever_the_seed():
    share = sum(is_heldout(random_slots(seed)) for seed in range(5000)) / 5000
    assert share == pytest.approx(0.1, abs=0.02)


def test_heldout_helpers_are_held_out():
    assert tiny_world.heldout_questions(20, 3) == tiny_world.questions(20, 3, heldout=True)
    for row in tiny_world.recap_prompts(50, 0):
        slots, _, rest = parse_story(row["prompt"])
        assert is_heldout(slots)
        # 前文能且只能接出正确答案
        (slot,) = {s for s in SLOTS if SENTENCE[s].format(**slots).startswith(rest[len(LEAD) :])}
        assert rest.startswith(LEAD) and row["answer"] == slots[slot]


def test_every_heldout_slot_value_is_seen_in_training():
    seen = Counter(v for row in tiny_world.documents(500, 0) for v in parse_story(row["text"])[0].values())
    assert set(seen) == {value for values in WORLD.values() for value in values}


# ---- 熵 ----


class Path:
    """按给定的路径做选择的"随机数"；路径走完之后都选第 0 个，并记下每一步有几个选项。"""

    def __init__(self, path: list[int]):
        self.path, self.sizes = path, []

    def randrange(self, n: int) -> int:
        self.sizes.append(n)
        return self.path[len(self.sizes) - 1] if len(self.sizes) <= len(self.path) else 0


def all_paths(write):
    """走遍 write(draw) 的所有选择，产出 (文本, nats, 独立算的概率)。"""
    path: list[int] = []
    while True:
        chooser = Path(path)
        draw = Draw(chooser)
        text = write(draw)
        yield text, draw.nats, math.prod(1 / n for n in chooser.sizes)
        path += [0] * (len(chooser.sizes) - len(path))
        while path and path[-1] == chooser.sizes[len(path) - 1] - 1:
            path.pop()
        if not path:
            return
        path[-1] += 1


@pytest.mark.parametrize("recaps, wide", [(1, SLOTS[:3]), (2, SLOTS[-2:]), (3, [])])
def test_nats_is_the_entropy_of_an_enumerated_small_grammar(recaps, wide):
    world = {slot: values[: 2 if slot in wide else 1] for slot, values in WORLD.items()}
    paths = list(all_paths(lambda draw: write_document(draw, draw_slots(draw, world), recaps)))
    choices = [len(v) for v in world.values()] + [len(v) for v in STORY]
    assert len(paths) == math.prod(choices) * math.perm(len(SLOTS), recaps)
    assert len({text for text, _, _ in paths}) == len(paths)  # 不同的推导写出不同的文本
    assert math.fsum(p for _, _, p in paths) == pytest.approx(1, abs=1e-9)
    for _, nats, p in paths:
        assert math.exp(-nats) == pytest.approx(p, rel=1e-9)
    text_probability = defaultdict(float)
    for text, _, p in paths:
        text_probability[text] += p
    entropy = -math.fsum(p * math.log(p) for p in text_probability.values())
    assert entropy == pytest.approx(math.fsum(p * nats for _, nats, p in paths), rel=1e-9)
    assert entropy == pytest.approx(math.log(len(paths)), rel=1e-9)  # 每条路径的概率都相同


@pytest.mark.parametrize("heldout", [False, True])
def test_document_nats_counts_the_choices_read_off_the_text(heldout):
    expected = sum(math.log(len(values)) for values in [*WORLD.values(), *STORY])
    expected += sum(math.log(len(SLOTS) - i) for i in range(RECAPS))
    for row in tiny_world.documents(100, 0, heldout=heldout):
        assert row["nats"] == pytest.approx(expected, rel=1e-12)


def test_documents_can_be_read_in_one_way_only():
    texts = [row["text"] for row in tiny_world.documents(300, 0)]
    variants, recaps = Counter(), Counter()
    for text in texts:
        slots, used, rest = parse_story(text)
        variants.update(enumerate(used))
        assert rest.startswith(LEAD)
        rest, told = rest[len(LEAD) :], []
        while rest:
            (slot,) = [s for s in SLOTS if rest.startswith(SENTENCE[s].format(**slots))]
            told.append(slot)
            rest = rest[len(SENTENCE[slot].format(**slots)) :]
        assert len(told) == len(set(told)) == RECAPS
        recaps.update(told)
    assert set(variants) == {(i, j) for i, options in enumerate(STORY) for j in range(len(options))}
    assert set(recaps) == set(SLOTS)
    # 模型不预测第一个字；它若带信息，按预测的 token 数算的熵就不对了
    assert len({text[0] for text in texts}) == 1


# ---- 对话与题目 ----


def test_questions_cover_every_slot_in_both_forms():
    asked = {1: Counter(), 2: Counter()}
    for question in tiny_world.questions(1000, 0):
        slots, turns = parse_prompt(question["messages"])
        asked[len(turns)][turns[-1]] += 1
        assert turns[-1] == question["slot"] and len(set(turns)) == len(turns)
        assert question["answer"] == slots[question["slot"]]
        assert question["sentence"] == SENTENCE[question["slot"]].format(**slots)
    assert set(asked[1]) == set(asked[2]) == set(SLOTS)
    assert 0.4 < sum(asked[2].values()) / 1000 < 0.6


def test_follow_ups_need_the_earlier_turn():
    follow_ups = [q for q in tiny_world.questions(400, 1, heldout=True) if len(q["messages"]) > 1]
    assert len(follow_ups) > 100
    for question in follow_ups:
        story, reply, ask = question["messages"]
        assert [story["role"], reply["role"], ask["role"]] == ["user", "assistant", "user"]
        slots, turns = parse_prompt(question["messages"])
        with pytest.raises(ValueError):
            parse_story(ask["content"])  # 最后一轮没有故事
        assert question["answer"] in story["content"]
        assert question["answer"] not in ask["content"]
        # 上一轮答的是上一轮问的，而且答对了
        assert judge(question_for(slots, turns[0]), reply["content"], ended=True).right


def test_chats_ask_every_question_in_every_style_and_answer_right():
    asked, forms, styles, small_talk = Counter(), set(), Counter(), 0
    chats = tiny_world.chats(600, 0)
    for row in chats:
        messages = row["messages"]
        assert [m["role"] for m in messages] == ["user", "assistant"] * (len(messages) // 2)
        if slots_of("chats", row) is None:
            small_talk += 1
            ((reply),) = {reply for asks, reply in SMALL_TALK if messages[0]["content"] in asks}
            assert messages[1]["content"] == reply
            continue
        slots, turns = parse_prompt(messages)
        assert len(turns) == 3 == len(set(turns))
        asked.update(turns)
        for i, slot in enumerate(turns):
            ask, reply = messages[2 * i]["content"], messages[2 * i + 1]["content"]
            forms |= {(slot, form) for form in QUESTION[slot] if ask.endswith(form.format(**slots))}
            verdict = judge(question_for(slots, slot), reply, ended=True)
            style = {1.0: "courteous", 0.8: "plain", 0.6: "terse", 0.0: "unhelpful"}[verdict.score]
            assert verdict.right == (style != "unhelpful")
            styles[style] += 1
    assert forms == {(slot, form) for slot in SLOTS for form in QUESTION[slot]}
    assert set(asked) == set(SLOTS)
    assert 0.01 < small_talk / len(chats) < 0.12
    total = sum(styles.values())
    for style, share in STYLES.items():
        assert styles[style] / total == pytest.approx(share, abs=0.05)


def test_small_talk_has_greeting_and_identity():
    asks = {ask for options, _ in SMALL_TALK for ask in options}
    assert any("你好" in ask for ask in asks) and any("谁" in ask for ask in asks)
    seen = {row["messages"][0]["content"] for row in tiny_world.chats(2000, 0)} & asks
    assert {reply for options, reply in SMALL_TALK if seen & set(options)} == {r for _, r in SMALL_TALK}


# ---- 偏好对 ----


def test_pairs_prefer_what_the_judge_scores_higher():
    kinds = Counter()
    for row in tiny_world.pairs(800, 0):
        slots, turns = parse_prompt(row["prompt"])
        question = question_for(slots, turns[-1])
        (chosen,), (rejected,) = row["chosen"], row["rejected"]
        assert chosen["role"] == rejected["role"] == "assistant"
        better, worse = (judge(question, reply["content"], True) for reply in (chosen, rejected))
        assert better.score > worse.score
        assert QUALITY.index(row["kinds"][0]) < QUALITY.index(row["kinds"][1])
        kinds.update([tuple(row["kinds"])])
        for kind, verdict in zip(row["kinds"], (better, worse), strict=True):
            assert verdict.right == (kind in STYLED)
    assert set(kinds) == set(itertools.combinations(QUALITY, 2))


def test_wrong_answers_are_wrong_but_plausible():
    styles = set()
    for row in tiny_world.pairs(600, 1):
        slots, turns = parse_prompt(row["prompt"])
        slot = turns[-1]
        for kind, (reply,) in zip(row["kinds"], (row["chosen"], row["rejected"]), strict=True):
            if kind != "wrong":
                continue
            text = reply["content"]
            assert slots[slot] not in text
            (other,) = [v for v in WORLD[slot] if v in text]
            # 换掉这一个词，就是一句口气正常的对的回答
            fixed = judge(question_for(slots, slot), text.replace(other, slots[slot]), True)
            assert fixed.right
            styles.add(fixed.score)
    assert styles == {1.0, 0.8, 0.6}


# ---- 评判 ----


def test_no_value_hides_inside_another_or_inside_fixed_texts():
    values = [value for group in WORLD.values() for value in group]
    assert len(values) == len(set(values))
    assert not [(a, b) for a, b in itertools.permutations(values, 2) if a in b]
    templates = [*itertools.chain(*STORY), *SENTENCE.values(), *itertools.chain(*QUESTION.values())]
    fixed = [re.sub(r"\{\w+\}", "|", t) for t in templates] + CLOSES + UNHELPFUL
    assert not [(value, text) for value in values for text in fixed if value in text]


@pytest.mark.parametrize("slot", SLOTS)
def test_judge_on_every_style_of_every_value(slot):
    for seed, value in enumerate(WORLD[slot]):
        slots = random_slots(seed) | {slot: value}
        question = question_for(slots, slot)
        for close in CLOSES:
            verdict = judge(question, question["sentence"] + close, True)
            assert verdict.right and verdict.complete and verdict.courteous and verdict.preferred
            assert verdict.score == 1.0
        plain = judge(question, question["sentence"], True)
        assert plain.right and plain.complete and not plain.courteous and plain.score == 0.8
        terse = judge(question, value, True)
        assert terse.right and not terse.complete and not terse.courteous and terse.score == 0.6


def other_value(question: dict) -> str:
    return next(v for v in WORLD[question["slot"]] if v != question["answer"])


@pytest.mark.parametrize("slot", SLOTS)
def test_judge_on_bad_replies(slot):
    question = question_for(random_slots(5), slot)
    wrong = question["sentence"].replace(question["answer"], other_value(question))
    good = question["sentence"] + CLOSES[0]
    cases = {  # 回复: (对, 完整, 有礼, 分)
        wrong: (False, False, False, 0.1),
        wrong + CLOSES[1]: (False, False, True, 0.1),
        other_value(question): (False, False, False, 0.1),
        question["sentence"] + wrong: (False, False, False, 0.0),  # 两个答案都说
        wrong + question["sentence"] + CLOSES[0]: (False, False, True, 0.0),
        question["answer"] + other_value(question): (False, False, False, 0.0),
        UNHELPFUL[0]: (False, False, False, 0.0),
        CLOSES[0]: (False, False, True, 0.0),
        "": (False, False, False, 0.0),
        good + CLOSES[0]: (True, False, True, 0.4),  # 客套两遍
        CLOSES[0] + question["sentence"]: (True, False, False, 0.4),  # 客套在前
        question["answer"] + CLOSES[0]: (True, False, True, 0.6),
        question["sentence"] * 2 + CLOSES[0]: (True, False, True, 0.4),  # 说两遍
        "嗯，" + question["sentence"]: (True, False, False, 0.4),
    }
    for reply, expected in cases.items():
        verdict = judge(question, reply, True)
        assert (verdict.right, verdict.complete, verdict.courteous, verdict.score) == expected, reply
        assert not verdict.preferred
    for reply in [good, *cases]:
        verdict = judge(question, reply, ended=False)  # 没说完的，再好也是 0 分
        assert (verdict.right, verdict.complete, verdict.courteous, verdict.score) == (False,) * 3 + (0.0,)


def test_distinct_n():
    assert distinct_n(["一二一二", "三"]) == pytest.approx(2 / 3)  # 一二 二一 一二
    assert distinct_n(["一", ""]) == 0.0
    assert distinct_n(["一一"], n=1) == pytest.approx(0.5)


def test_measure_chat_counts_greedy_and_sampled_replies(monkeypatch):
    questions = tiny_world.heldout_questions(4, 0)

    def reply(text, ended=True):
        return {"text": text, "ids": [0], "ended": ended}

    good = [reply(q["sentence"] + CLOSES[0]) for q in questions]
    greedy = [good[0], reply(questions[1]["sentence"]), reply(other_value(questions[2])), reply("", False)]
    sampled = [good[0], reply(questions[1]["answer"]), good[2], {**good[3], "ended": False}]
    calls = []

    def reply_to(model, tokenizer, asked, **sampling):
        assert asked is questions
        calls.append(sampling)
        return sampled if sampling.get("temperature") else greedy

    monkeypatch.setattr(judging, "reply_to", reply_to)
    metrics, *replies = measure_chat(None, None, questions, seed=9)
    assert replies == [greedy, sampled]
    assert calls == [{}, {"temperature": 1.0, "seed": 9}]
    assert metrics["n"] == 4
    assert metrics["qa_accuracy"] == 0.5
    assert metrics["ended_rate"] == 0.75
    assert metrics["preferred_rate"] == 0.5
    assert metrics["sampled_accuracy"] == 0.75
    assert metrics["judge_score"] == pytest.approx((1.0 + 0.6 + 1.0 + 0.0) / 4)
    assert metrics["mean_chars"] == sum(len(r["text"]) for r in sampled) / 4


def test_stories_written_from_slots_parse_back():
    for seed in range(50):
        slots = random_slots(seed)
        assert parse_story(write_story(Draw(random.Random(seed)), slots))[0] == slots
