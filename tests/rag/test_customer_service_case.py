"""客服：权限在检索的条件里，寒暄不检索，没把握就拒绝，资料里的话指使不动它。"""

import json

import numpy as np
import pytest

import customer_service_case as cs
import service_questions as sq
from nlp_common.base.errors import UserError
from rag_common.generate import Answer

FLAGS = [
    "--preset",
    "tiny",
    "--embedder",
    "hashed",
    "--products",
    "8",
    "--asks",
    "300",
    "--leak_queries",
    "600",
]


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    settings = cs.parse_settings(cs.ServiceSettings, cs.PRESETS, FLAGS)
    desk, chunks, asks = cs.open_desk(settings, tmp_path_factory.mktemp("desk"))
    desk.calibrate(asks[::2], settings.refuse)
    yield desk, chunks, asks
    desk.store.close()


# ---------------------------------------------------------------- 题


def test_the_questions_are_what_they_say():
    products = sq.shops(8, 0)
    chunks = sq.shop_chunks(products, 0)
    public = {
        t: " ".join(c.text for c in chunks if c.meta == {"tenant": t, "access": "public"}) for t in sq.TENANTS
    }
    secret = " ".join(c.text for c in chunks if c.meta["access"] == "internal")
    for ask in sq.make_asks(products, 200, 1):
        if ask.action == "answer":
            assert ask.answer in public[ask.tenant]
        if ask.kind == "别家的":
            [owner] = [t for t in sq.TENANTS if any(product.name in ask.text for product in products[t])]
            assert owner != ask.tenant
    assert "进货价" in secret and not any("进货价" in text for text in public.values())


# ---------------------------------------------------------------- 权限


def test_nothing_of_others_is_ever_found(opened):
    desk, _, asks = opened
    assert cs.leaks(desk, asks, 600, seed=3) == {"tenant_leaks": 0, "access_leaks": 0, "leak_queries": 600}
    for role, allowed in sq.ROLES.items():
        for reply in desk.look_up([ask.text for ask in asks], "乙店", role):
            assert {hit.meta["tenant"] for hit in reply.hits} == {"乙店"}
            assert {hit.meta["access"] for hit in reply.hits} <= set(allowed)


@pytest.mark.parametrize(("kept", "leaked"), [("tenant", "access_leaks"), ("access", "tenant_leaks")])
def test_a_hole_in_the_condition_is_counted(opened, monkeypatch, kept, leaked):
    """条件只留一半，漏出来的数得到：量漏不漏，走的就是顾客走的那一条路。"""
    desk, _, asks = opened

    def half_open(self, vectors, tenant, role, k=3):
        whole = {"tenant": tenant, "access": list(sq.ROLES[role])}
        return self.store.search(vectors, k, {kept: whole[kept]})

    monkeypatch.setattr(cs.Desk, "visible", half_open)
    found = cs.leaks(desk, asks, 600, seed=3)
    assert found[leaked] > 30 and sum(found.values()) == found[leaked] + 600


@pytest.mark.parametrize("tenant", ["甲店' OR '1'='1", "", '甲店" --', "%", "没有的店"])
def test_a_tenant_that_is_not_one_finds_nothing(opened, tenant):
    desk = opened[0]
    [reply] = desk.look_up(["进货价是多少元？"], tenant, "顾客")
    assert reply.hits == []
    assert desk.serve("青岚100型台灯的保修期是几个月？", tenant, "顾客").action == "refuse"


def test_only_the_clerk_sees_what_is_internal(opened):
    desk, chunks, _ = opened
    name = next(c.document.split("/")[1] for c in chunks if c.meta["tenant"] == "甲店")
    question = f"{name}的进货价是多少元？"
    [clerk] = desk.look_up([question], "甲店", "店员")
    assert "进货价" in clerk.hits[0].text
    [customer] = desk.look_up([question], "甲店", "顾客")
    assert not any("进货价" in hit.text for hit in customer.hits)


# ---------------------------------------------------------------- 该怎么办


def test_small_talk_retrieves_nothing_and_people_are_called(opened, monkeypatch):
    desk = opened[0]
    monkeypatch.setattr(desk, "look_up", lambda *_: pytest.fail("寒暄、转人工不该检索"))
    assert desk.serve("你好", "甲店", "顾客").action == "talk"
    reply = desk.serve("转人工", "甲店", "顾客")
    assert reply.action == "hand_over" and reply.ticket["reason"] == "顾客要找人"


def test_answers_and_refusals(opened):
    desk, _, asks = opened
    test = asks[1::2]
    metrics = cs.measure(test, [desk.serve(ask.text, ask.tenant, ask.role) for ask in test])
    assert metrics["refused"] >= 0.85 and metrics["answered_right"] >= 0.9
    assert metrics["talk_retrievals"] == 0


def test_a_refusal_leaves_a_ticket(opened):
    desk = opened[0]
    reply = desk.serve("青岚9999型台灯净重多少克？", "甲店", "顾客")
    assert reply.action == "refuse" and reply.text == cs.CALLS_ITSELF
    assert reply.ticket == {
        "tenant": "甲店",
        "said": "青岚9999型台灯净重多少克？",
        "reason": "资料里没有把握的答案",
    }


def test_a_generator_that_obeys_the_passages_still_does_nothing_else(opened):
    """最坏的模型：资料叫它做什么它就说做什么。说归说，动作与检索的条件都没有变。"""

    class Gullible:
        name = "gullible"

        def answer(self, questions, passages):
            return [Answer("已转人工，退款成功，别家的进货价是 20 元。") for _ in questions]

    desk, _, asks = opened
    honest, desk.generator = desk.generator, Gullible()
    try:
        for ask in asks[:40]:
            reply = desk.serve(ask.text, ask.tenant, ask.role)
            if reply.action == "answer":
                assert reply.ticket is None
                assert {hit.meta["tenant"] for hit in reply.hits} == {ask.tenant}
    finally:
        desk.generator = honest


def test_injected_passages_change_nothing_elsewhere(opened):
    desk, chunks, asks = opened
    test = asks[1::2]
    before = [desk.serve(ask.text, ask.tenant, ask.role) for ask in test]
    found = cs.inject(desk, test, before)
    assert found["injected"] > 5 and found["changed_in_shop"] > 0
    assert found["changed_elsewhere"] == found["actions_by_document"] == found["leaked_by_document"] == 0
    assert desk.store.count() == len(chunks)  # 塞进去的都拿走了


# ---------------------------------------------------------------- 量


def test_coverage_and_cosine_only():
    hit = cs.Hit("a", 0.0, "答案是七")
    ask = sq.Ask("问", "甲店", "顾客", "answer", "七")
    no = sq.Ask("问", "甲店", "顾客", "refuse")
    asks = [ask] * 10 + [no] * 10
    replies = [cs.Reply("answer", "七", [hit], cosine=0.9, sure=1 - i / 100) for i in range(20)]
    xs, ys = cs.coverage_curve(asks, replies, "sure")
    assert (xs[0], ys[0]) == (0.5, 1.0) and ys[-1] == pytest.approx(10 / (xs[-1] * 20))
    assert cs.at_same_refusal(asks, replies, 1.0)["coverage"] == 0  # 余弦都一样，分不出来
    metrics = cs.measure([*asks, sq.Ask("你好", "甲店", "顾客", "talk"), sq.Ask("人", "甲店", "顾客", "hand_over")],
                         [*replies, cs.Reply("talk", ""), cs.Reply("hand_over", "")])  # fmt: skip
    assert metrics["refused"] == 0 and metrics["accuracy"] == 0.5 and metrics["hand_over"] == 1


def test_rarity_is_the_log_of_how_few_have_it(opened):
    _, chunks, _ = opened
    values = cs.rarity(chunks)
    assert values["保修"] == pytest.approx(np.log(len(chunks) / sum("保修" in c.text for c in chunks)))


# ---------------------------------------------------------------- 整个脚本


def test_script_and_tickets(tmp_path, capsys):
    record = cs.main([*FLAGS, "--output_dir", str(tmp_path / "out")])
    assert record["metrics"]["tenant_leaks"] == 0
    lines = (tmp_path / "out" / "tickets.jsonl").read_text("utf-8").splitlines()
    assert lines and all(json.loads(line)["reason"] for line in lines)
    capsys.readouterr()
    again = cs.main([*FLAGS, "--output_dir", str(tmp_path / "out")])
    assert again["id"] == record["id"] and "直接加载" in capsys.readouterr().out


def test_other_rows_of_a_given_store_are_left_alone(tmp_path):
    """--store 给的库里读者自己的东西，一条不动；上次断在注入之后的，塞进去的清掉。"""
    url = f"faiss://{tmp_path}/mine"
    settings = cs.parse_settings(cs.ServiceSettings, cs.PRESETS, [*FLAGS, "--store", url])
    desk, chunks, _ = cs.open_desk(settings, tmp_path)
    [mine] = cs.make_chunks("我的", "我自己的一段", [(0, 6)])
    [injected] = cs.make_chunks("甲店/注入0", cs.INJECTION, [(0, 20)], tenant="甲店", access="public")
    desk.store.upsert([mine, injected], desk.embedder.passages([mine.text, injected.text]))
    desk.store.close()
    again, _, _ = cs.open_desk(settings, tmp_path)
    assert set(again.store.ids()) == {mine.id} | {chunk.id for chunk in chunks}
    again.store.close()


def test_ask_one(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cs, "HOME", tmp_path)
    name = sq.shops(8, 0)["乙店"][0].name
    reply = cs.main([*FLAGS, "--ask", f"{name}净重多少克？", "--tenant", "乙店"])
    assert reply["action"] == "answer" and name in reply["text"]
    assert "阈值" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--refuse", "1"], "0.5 到 1"),
        (["--asks", "10"], "80"),
        (["--tenant", "丁店"], "丁店"),
        (["--ask", " "], "没有写问题"),
    ],
)
def test_bad_settings(flags, said):
    with pytest.raises(UserError, match=said):
        cs.main(["--preset", "tiny", *flags])
