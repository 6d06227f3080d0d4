"""小世界：同一种子写同样的数据，训练与留出不共享组合，nats 就是真正的熵，评判不冤枉也不放水。"""

import inspect
import itertools
import math
import random
import re
from collections import Counter, defaultdict

import pytest

from nlp_common.lm.replies import distinct_n
from nlp_common.tiny import judge as judging
from nlp_common.tiny import world
from nlp_common.tiny.judge import judge, measure_chat
from nlp_common.tiny.world import (
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

# 句子与客套话的写法常调，这里只依赖它们的名字：客套话在句前（OPENINGS）或句后（CLOSES）
OPENINGS = getattr(world, "OPENINGS", [])
CLOSES = getattr(world, "CLOSES", [])
KINDS = {
    "documents": world.documents,
    "chats": world.chats,
    "pairs": world.pairs,
    "questions": world.questions,
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
    """消息 → (故事的槽位, 每一轮问的是哪个槽位)；最后的寒暄不算。"""
    slots, _, rest = parse_story(messages[0]["content"])
    assert rest.startswith("\n")
    asks = [rest[1:]] + [m["content"] for m in messages[1:] if m["role"] == "user"]
    if any(asks[-1] in talk for talk, _ in SMALL_TALK):
        asks.pop()
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


def polite(sentence: str) -> list[str]:
    """一句话的各种有礼的说法。"""
    return [o + sentence for o in OPENINGS] + [sentence + c for c in CLOSES]


def misplaced(sentence: str) -> str:
    """客套话放错了一头。"""
    return sentence + OPENINGS[0] if OPENINGS else CLOSES[0] + sentence


def find_sentences(text: str, slots: dict[str, str]) -> list[tuple[str, str, str, bool]]:
    """故事之后的部分 → [(句前的字, 槽位, 说的值, 对不对)]，最后一项是 (剩下的字, "", "", True)。

    每一句都是某个槽位的完整回答，除了这个槽位，别的词都照故事。
    """
    options = {
        SENTENCE[slot].format(**slots | {slot: value}): (slot, value, value == slots[slot])
        for slot in SLOTS
        for value in WORLD[slot]
    }
    assert len(options) == sum(map(len, WORLD.values()))  # 没有两句写出来相同
    found, at = [], 0
    for match in re.finditer("|".join(sorted(map(re.escape, options), key=len, reverse=True)), text):
        found.append((text[at : match.start()], *options[match[0]]))
        at = match.end()
    return [*found, (text[at:], "", "", True)]


def lead() -> str:
    """故事与第一句回顾之间的那几个字。"""
    slots, _, rest = parse_story(world.documents(1, 0)[0]["text"])
    return find_sentences(rest, slots)[0][0]


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
    assert world.heldout_questions(20, 3) == world.questions(20, 3, heldout=True)
    for row in world.recap_prompts(50, 0):
        slots, _, rest = parse_story(row["prompt"])
        assert is_heldout(slots)
        # 前文能且只能接出正确答案
        (slot,) = {s for s in SLOTS if SENTENCE[s].format(**slots).startswith(rest[len(lead()) :])}
        assert rest.startswith(lead()) and row["answer"] == slots[slot]


def test_every_heldout_slot_value_is_seen_in_training():
    seen = Counter(v for row in world.documents(500, 0) for v in parse_story(row["text"])[0].values())
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


def placeholders(text: str) -> set[str]:
    return set(re.findall(r"\{(\w+)\}", text))


def small_grammar(n_values: list[int]) -> tuple[list, dict[str, list[str]]]:
    """头几句故事，和它们用到的槽位（第 i 个槽位只留 n_values[i] 个词）：小得可以走遍。"""
    for k in range(1, len(STORY) + 1):
        used = set().union(*(placeholders(text) for text in itertools.chain(*STORY[:k])))
        if all(placeholders(SENTENCE[slot]) <= used for slot in used):
            break
    slots = [slot for slot in SLOTS if slot in used]
    sizes = dict(itertools.zip_longest(slots, n_values[: len(slots)], fillvalue=n_values[-1]))
    return STORY[:k], {slot: WORLD[slot][:n] for slot, n in sizes.items()}


@pytest.mark.parametrize(
    "n_values, lengths", [([3, 2], (2, 0)), ([2], (1, 2)), ([3, 2], (1, 1)), ([3], (0, 1))]
)
def test_nats_is_the_entropy_of_an_enumerated_small_grammar(monkeypatch, n_values, lengths):
    story, words = small_grammar(n_values)
    monkeypatch.setattr(world, "STORY", story)
    parameters = inspect.signature(write_document).parameters.values()
    counts = [p.name for p in parameters if isinstance(p.default, int)]  # 几句回顾、清点几个词……
    given = dict(zip(counts, lengths, strict=False))
    if "world" in inspect.signature(write_document).parameters:
        given["world"] = words
    paths = list(all_paths(lambda draw: write_document(draw, draw_slots(draw, words), **given)))
    assert len(paths) > 50
    assert len({text for text, _, _ in paths}) == len(paths)  # 不同的推导写出不同的文本
    assert math.fsum(p for _, _, p in paths) == pytest.approx(1, abs=1e-9)
    for _, nats, p in paths:
        assert math.exp(-nats) == pytest.approx(p, rel=1e-9)
    text_probability = defaultdict(float)
    for text, _, p in paths:
        text_probability[text] += p
    entropy = -math.fsum(p * math.log(p) for p in text_probability.values())
    assert entropy == pytest.approx(math.fsum(p * nats for _, nats, p in paths), rel=1e-9)


class Recorder(Draw):
    """另记一份：每次选择有几个选项。"""

    def __init__(self, rng):
        super().__init__(rng)
        self.sizes: list[int] = []

    def pick(self, options):
        self.sizes.append(len(options))
        return super().pick(options)


@pytest.mark.parametrize("heldout", [False, True])
def test_document_nats_counts_every_choice_behind_the_text(monkeypatch, heldout):
    """从槽位到最后一句，每个选择都算了；为凑够留出（或训练）组合而丢掉的那些次不算。"""
    behind: dict[str, Recorder] = {}

    def spy(draw, *args, **kwargs):
        text = write_document(draw, *args, **kwargs)
        behind[text] = draw
        return text

    monkeypatch.setattr(world, "Draw", Recorder)
    monkeypatch.setattr(world, "write_document", spy)
    story = sum(math.log(len(values)) for values in [*WORLD.values(), *STORY])
    recaps = sum(math.log(len(SLOTS) - i) for i in range(RECAPS))
    for row in world.documents(200, 0, heldout=heldout):
        sizes = behind[row["text"]].sizes
        assert row["nats"] == pytest.approx(math.fsum(map(math.log, sizes)), rel=1e-12)
        assert sizes[: len(SLOTS)] == [len(values) for values in WORLD.values()]
        assert row["nats"] >= story + recaps - 1e-9


def test_documents_tell_the_story_then_recap_it_truly():
    variants, recapped = Counter(), Counter()
    texts = [row["text"] for row in world.documents(300, 0)]
    for text in texts:
        slots, used, rest = parse_story(text)
        variants.update(enumerate(used))
        recaps = find_sentences(rest, slots)[:RECAPS]
        assert all(true for _, _, _, true in recaps)
        asked = [slot for _, slot, _, _ in recaps]
        assert len(set(asked)) == RECAPS and "" not in asked
        recapped.update(asked)
    assert set(variants) == {(i, j) for i, options in enumerate(STORY) for j in range(len(options))}
    assert set(recapped) == set(SLOTS)
    # 模型不预测第一个字；它若带信息，按预测的 token 数算的熵就不对了
    assert len({text[0] for text in texts}) == 1


# ---- 对话与题目 ----


def test_questions_cover_every_slot_in_both_forms():
    asked = {1: Counter(), 2: Counter()}
    for question in world.questions(1000, 0):
        slots, turns = parse_prompt(question["messages"])
        asked[len(turns)][turns[-1]] += 1
        assert turns[-1] == question["slot"] and len(set(turns)) == len(turns)
        assert question["answer"] == slots[question["slot"]]
        assert question["sentence"] == SENTENCE[question["slot"]].format(**slots)
    assert set(asked[1]) == set(asked[2]) == set(SLOTS)
    assert 0.4 < sum(asked[2].values()) / 1000 < 0.6


def test_follow_ups_need_the_earlier_turn():
    follow_ups = [q for q in world.questions(400, 1, heldout=True) if len(q["messages"]) > 1]
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
    asked, forms, styles, small_talk, closings, lengths = Counter(), set(), Counter(), 0, 0, set()
    chats = world.chats(600, 0)
    for row in chats:
        messages = row["messages"]
        assert [m["role"] for m in messages] == ["user", "assistant"] * (len(messages) // 2)
        if slots_of("chats", row) is None:
            small_talk += 1
            ((reply),) = {reply for asks, reply in SMALL_TALK if messages[0]["content"] in asks}
            assert messages[1]["content"] == reply
            continue
        slots, turns = parse_prompt(messages)
        assert len(turns) == len(set(turns))
        lengths.add(len(turns))
        if len(turns) < len(messages) // 2:
            closings += 1
            assert any(
                messages[-2]["content"] in asks and messages[-1]["content"] == r for asks, r in SMALL_TALK
            )
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
    assert 0.1 < closings / len(chats) < 0.3 and lengths == {1, 2, 3, 4, 5}
    total = sum(styles.values())
    for style, share in STYLES.items():
        assert styles[style] / total == pytest.approx(share, abs=0.05)


def test_small_talk_has_greeting_and_identity():
    asks = {ask for options, _ in SMALL_TALK for ask in options}
    assert any("你好" in ask for ask in asks) and any("谁" in ask for ask in asks)
    seen = {row["messages"][0]["content"] for row in world.chats(2000, 0)} & asks
    assert {reply for options, reply in SMALL_TALK if seen & set(options)} == {r for _, r in SMALL_TALK}


# ---- 偏好对 ----


def test_pairs_prefer_what_the_judge_scores_higher():
    kinds, small_talk, faults = Counter(), 0, set()
    for row in world.pairs(800, 0):
        if slots_of("pairs", row) is None:
            small_talk += 1
            (question,) = [q for q in world.small_talk_questions() if q["messages"] == row["prompt"]]
            assert judge(question, row["chosen"][0]["content"], True).score == 1
            assert judge(question, row["rejected"][0]["content"], True).score == 0
            assert row["kinds"][0] == "small_talk"
            faults.add(row["kinds"][1])
            continue
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
    assert 0.04 < small_talk / 800 < 0.12 and faults == set(world.TALK_FAULTS)


def test_prompts_for_ppo_hold_all_small_talk_and_the_held_out_ones_none():
    rows = world.prompts(2000, 0)
    talk = [row["messages"][0]["content"] for row in rows if row["slot"] is None]
    assert set(talk) == {ask for asks, _ in SMALL_TALK for ask in asks}
    assert len(talk) / len(rows) == pytest.approx(world.PROMPT_TALK_SHARE, abs=0.03)
    assert world.prompts(50, 0, heldout=True) == world.heldout_questions(50, 0)


def test_wrong_answers_are_wrong_but_plausible():
    styles = set()
    for row in world.pairs(600, 1):
        if "wrong" not in row["kinds"]:
            continue
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
    fixed = [re.sub(r"\{\w+\}", "|", t) for t in templates] + OPENINGS + CLOSES + UNHELPFUL
    assert not [(value, text) for value in values for text in fixed if value in text]


def test_the_last_character_of_a_value_is_its_own():
    """看到这个字，就知道故事里有没有这个词：别的词、句子的固定部分里都没有它。"""
    values = [value for group in WORLD.values() for value in group]
    fixed = "".join(itertools.chain(*STORY, SENTENCE.values()))
    elsewhere = {
        v: "".join(other for other in values if other != v) + re.sub(r"\{\w+\}", "", fixed) for v in values
    }
    assert [v for v in values if v[-1] in elsewhere[v]] == []


@pytest.mark.parametrize("slot", SLOTS)
def test_judge_on_every_style_of_every_value(slot):
    for seed, value in enumerate(WORLD[slot]):
        slots = random_slots(seed) | {slot: value}
        question = question_for(slots, slot)
        for reply in polite(question["sentence"]):
            verdict = judge(question, reply, True)
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
    good = polite(question["sentence"])[0]
    cases = {  # 回复: (对, 完整, 有礼, 分)
        wrong: (False, False, False, 0.1),
        polite(wrong)[1]: (False, False, True, 0.1),
        other_value(question): (False, False, False, 0.1),
        question["sentence"] + wrong: (False, False, False, 0.0),  # 两个答案都说
        polite(wrong + question["sentence"])[0]: (False, False, True, 0.0),
        question["answer"] + other_value(question): (False, False, False, 0.0),
        UNHELPFUL[0]: (False, False, False, 0.0),
        polite("")[0]: (False, False, True, 0.0),
        "": (False, False, False, 0.0),
        polite(good)[0]: (True, False, True, 0.4),  # 客套两遍
        misplaced(question["sentence"]): (True, False, False, 0.4),
        polite(question["answer"])[0]: (True, False, True, 0.6),
        polite(question["sentence"] * 2)[0]: (True, False, True, 0.4),  # 说两遍
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


@pytest.fixture
def asked(monkeypatch):
    """把 judge.py 里的 reply_to 换成照本宣科；返回 (题目, 贪心回复, 采样回复, 调用记录)。"""
    questions = world.heldout_questions(4, 0)

    def reply(text, ended=True):
        return {"text": text, "ids": [0], "ended": ended}

    good = [reply(polite(q["sentence"])[0]) for q in questions]
    greedy = [good[0], reply(questions[1]["sentence"]), reply(other_value(questions[2])), reply("", False)]
    sampled = [good[0], reply(questions[1]["answer"]), good[2], {**good[3], "ended": False}]
    calls = []

    talk = world.small_talk_questions()
    small_talk = [reply(q["answer"]) for q in talk[:-1]] + [reply(talk[-1]["answer"][:2])]  # 最后一句没说完

    def reply_to(model, tokenizer, these, **sampling):
        if these == talk:
            return small_talk
        assert [q["messages"] for q in these] == [q["messages"] for q in questions]
        calls.append(sampling)
        return sampled if sampling.get("temperature") else greedy

    monkeypatch.setattr(judging, "reply_to", reply_to)
    return questions, greedy, sampled, calls


def test_measure_chat_counts_greedy_and_sampled_replies(asked, model, chat_tokenizer):
    questions, greedy, sampled, calls = asked
    metrics, *replies = measure_chat(model, chat_tokenizer, questions, seed=9)
    assert replies == [greedy, sampled]
    assert calls == [{}, {"temperature": 1.0, "seed": 9}]
    assert metrics["n"] == 4
    assert metrics["qa_accuracy"] == 0.5
    assert metrics["ended_rate"] == 0.75
    assert metrics["small_talk"] == pytest.approx(12 / 13)
    assert metrics["preferred_rate"] == 0.5
    assert metrics["sampled_accuracy"] == 0.75
    assert metrics["judge_score"] == pytest.approx((1.0 + 0.6 + 1.0 + 0.0) / 4)
    assert metrics["mean_chars"] == sum(len(r["text"]) for r in sampled) / 4


def test_stories_written_from_slots_parse_back():
    for seed in range(50):
        slots = random_slots(seed)
        assert parse_story(write_story(Draw(random.Random(seed)), slots))[0] == slots
