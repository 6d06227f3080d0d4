"""全貌：四步、恒等式、重排的训练、装错的重排、引用。"""

import json
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rag_architecture_demo as demo
from citations import check_citation, plant_faults
from nlp_common.base.errors import UserError
from nlp_common.tiny.world import WORLD
from rag_benches import Bench, can_ask, make_news, make_world
from rag_common.corpus import Corpus, Question
from rag_common.documents import Document
from rag_common.generate import Answer, Extractive
from rag_common.rerank import RandomHead, TokenAligner, best_match, rank

QUICK = ["--preset", "tiny", "--embedder", "hashed", "--reranker", "aligner", "--stories", "40", "--questions", "40",
         "--documents", "40", "--asked", "20", "--steps", "30", "--generator", "extract"]  # fmt: skip


class Oracle:
    """会读的模型：照着递来的故事，把问的那一样说出来；没有故事就说不知道。"""

    name = "oracle"

    def answer(self, questions, passages):
        return [Answer(texts[0] if texts else "不知道") for texts in passages]


def parsed(*more):
    found = demo.parse_settings(demo.ArchitectureSettings, demo.PRESETS, [*QUICK, *more])
    found.learning_rate = 1e-2
    return found


@pytest.fixture(scope="module")
def benches():
    return make_world(parsed())


# ---------------------------------------------------------------- 题


def test_the_three_worlds_do_not_meet(benches):
    stories = [set(bench.texts.values()) for bench in benches]
    assert not stories[0] & stories[1] and not stories[0] & stories[2]
    for bench in benches:
        for question, found in bench.pairs():
            assert can_ask(question) and len(found) <= 6
            facts = next(each.meta for each in bench.corpus.documents if each.id in question.gold)
            assert facts[question.meta["slot"]] not in question.meta["read"]  # 答案没有写在问题里


def test_news_for_training_is_not_the_news_of_the_exam():
    exam, train = make_news(parsed())
    assert len(exam.texts) == 40 and len(train.texts) == 80 and not set(exam.texts) & set(train.texts)
    for bench in (exam, train):
        assert all(question.gold <= set(bench.texts) for question in bench.corpus.questions)


# ---------------------------------------------------------------- 恒等式


def small_bench() -> Bench:
    documents = [Document("甲", "那天清晨，小刚去了花园"), Document("乙", "那天傍晚，小兰去了学校")]
    questions = [
        Question("问", "清晨", frozenset(["甲"]), meta={"slot": "time"}),
        Question("问", "傍晚", frozenset(["乙"]), meta={"slot": "time"}),
    ]
    return Bench(Corpus("小", documents, questions), [["甲", "乙"], ["甲", "乙"]])


def test_the_identity_by_hand():
    """两题，一题找对。会读 0.9：(1 + 1/6) · 0.9 / 2。"""
    bench = small_bench()
    right, first = demo.four_ways(bench, TokenAligner(), Oracle())
    assert right["without"] == [False, False] and right["oracle"] == [True, True]
    assert right["retrieve"] == [True, False] and first["retrieve"] == ["甲", "甲"]
    row = demo.check_identity(right, first, bench.corpus.questions, (0.9, 100))["retrieve"]
    assert row["hit"] == 0.5 and row["predicted"] == pytest.approx(0.9 * (1 + 1 / len(WORLD["time"])) / 2)
    assert row["coincidence"] == pytest.approx(0.9 / 6) and row["gap"] == pytest.approx(abs(0.5 - 0.525))
    p, q, share = 0.9, 0.15, (1 + 1 / 6) / 2
    assert row["two_se"] == pytest.approx(
        2 * ((p * (1 - p) + q * (1 - q)) / 4 + share**2 * 0.09 / 100) ** 0.5
    )


def test_the_identity_holds_for_a_reader_that_reads():
    world, _, _ = make_world(parsed("--stories", "100", "--questions", "300"))
    right, first = demo.four_ways(world, TokenAligner(), Oracle())
    for row in demo.check_identity(right, first, world.corpus.questions, (1.0, 300)).values():
        assert row["gap"] <= 1.5 * row["two_se"]  # 三个标准误：种子固定，不是碰运气
        assert 0.3 < row["hit"] < 0.9


# ---------------------------------------------------------------- 重排


def test_best_match_is_what_it_says():
    vectors = torch.nn.functional.normalize(torch.randn(1, 5, 3, dtype=torch.float64), dim=-1)
    weights = torch.randn(1, 5, dtype=torch.float64)
    asked = torch.tensor([[True, True, False, False, False]])
    told = torch.tensor([[False, False, True, True, False]])  # 最后一个是填充
    shares = weights[0, :2].exp() / weights[0, :2].exp().sum()
    expected = sum(shares[t] * max(vectors[0, t] @ vectors[0, s] for s in (2, 3)) for t in (0, 1))
    assert best_match(vectors, weights, asked, told).item() == pytest.approx(expected.item(), abs=1e-12)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.text("甲乙丙丁。", max_size=8), min_size=1, max_size=4), st.integers(0, 3))
def test_a_score_does_not_depend_on_the_batch(passages, place):
    """填充不算数：一段的分，与它和谁放在一批里无关。"""
    model, place = TokenAligner(), place % len(passages)
    together = model(["甲乙？"] * len(passages), passages)[place]
    assert together.item() == pytest.approx(model(["甲乙？"], [passages[place]]).item(), abs=1e-4)
    assert sorted(rank(model, "甲乙？", passages)) == list(range(len(passages)))


def test_equal_scores_keep_the_order_and_nothing_is_nothing():
    assert rank(TokenAligner(), "甲", ["乙", "乙", "乙"]) == [0, 1, 2]
    assert rank(TokenAligner(), "甲", []) == []


def test_training_learns_synonyms():
    """三样换了说法的题：训练之前只认字面，训练之后在没见过的故事上好得多。"""
    options = parsed("--steps", "150", "--stories", "80", "--compared", "200")
    world, train, _ = make_world(options)
    model = TokenAligner()
    before = demo.compare_rerankers(world, model, options)
    assert before["trained"] == before["untrained"]
    demo.train_reranker(None, model=model, examples=[demo.hard_examples(train), []], settings=options)
    after = demo.compare_rerankers(world, model, options)
    assert after["trained"] >= after["untrained"] + 0.1 and after["trained"] > after["none"]
    assert after["random_head"] < after["none"]


def test_hard_examples_are_wrong_and_ranked_high(benches):
    train = benches[1]
    right = {question.text: train.texts[min(question.gold)] for question in train.corpus.questions}
    for text, passages in demo.hard_examples(train):
        assert passages[0] == right[text] and right[text] not in passages[1:]
        assert 1 <= len(passages) - 1 <= demo.NEGATIVES


def test_a_random_head_knows_nothing_of_the_words():
    model = RandomHead(TokenAligner())
    scores = model(["甲"] * 3, ["甲", "乙", "丙丁"])
    assert len(set(scores.tolist())) == 3 and torch.equal(scores, model(["甲"] * 3, ["甲", "乙", "丙丁"]))
    assert demo.blind("甲1a乙。") == "□1a□。"


# ---------------------------------------------------------------- 引用


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("借期三十天。[1]", ""),
        ("借期三十天。[2]", "没有这些话"),
        ("借期三十天。[3]", "没有第 3 段"),
        ("借期三十天。[0]", "没有第 0 段"),
        ("借期三十天。", "没有注明"),
        ("罚款5元。[2]", ""),
        ("罚款50元。[2]", "没有这个数：50"),
        ("[1]", "没有这些话"),
    ],
)
def test_citations(text, said):
    fault = check_citation(text, ["普通图书借期三十天。", "过期每天罚款5元。"])
    assert said in fault and bool(fault) == bool(said)


def test_planted_faults_are_faults():
    passages = ["普通图书借期30天。", "过期每天罚款5元。"]
    [answer] = Extractive().answer(["普通图书借期多少天？"], [passages])
    assert check_citation(answer.text, passages) == ""
    planted = plant_faults([(answer, passages)], random.Random(0))
    assert {kind: len(rows) for kind, rows in planted.items()} == {
        "other_passage": 1,
        "no_such_passage": 1,
        "changed_number": 1,
    }
    assert all(check_citation(*each) for rows in planted.values() for each in rows)


# ---------------------------------------------------------------- 整个脚本


def test_script(tmp_path, capsys):
    out = ["--output_dir", str(tmp_path / "out")]
    record = demo.main([*QUICK, *out])
    metrics = record["metrics"]
    names = {"accuracy_without", "accuracy_retrieve", "accuracy_rerank", "accuracy_oracle", "identity_gap"}
    assert names <= set(metrics) and metrics["news"]["bm25"]["without"] == 0
    assert {each.name for each in (tmp_path / "out").glob("*.svg")} == {
        "steps.svg",
        "rerankers.svg",
        "training.svg",
    }
    assert "标准误" in capsys.readouterr().out
    assert demo.main([*QUICK, *out]) == json.loads((tmp_path / "out" / "run.json").read_text("utf-8"))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--steps", "0"], "steps"),
        (["--dataset", "没有的"], "没有的"),
        (["--reader", "http://127.0.0.1:9/v1"], "模型名"),
        (["--reranker", "没有的/模型"], "没有的/模型"),
    ],
)
def test_bad_settings(flags, said, tmp_path):
    with pytest.raises(UserError, match=said):
        demo.main([*QUICK, *flags, "--output_dir", str(tmp_path / "out")])


def test_a_dataset_with_too_little_in_it(tmp_path):
    line = json.dumps(
        {"context": "甲在花园。", "question": "谁在花园？", "answers": ["甲"]}, ensure_ascii=False
    )
    (tmp_path / "one.jsonl").write_text(line + "\n", "utf-8")
    with pytest.raises(UserError, match="1 段考试"):
        make_news(parsed("--dataset", str(tmp_path / "one.jsonl")))


def test_own_questions(tmp_path):
    rows = [
        {"context": f"{n}号图书馆在{n}街，馆长是第{n}任。", "question": f"{n}号图书馆的馆长是第几任？", "answers": [f"第{n}任"]}
        for n in range(12)
    ]  # fmt: skip
    (tmp_path / "own.jsonl").write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8"
    )
    exam, train = make_news(parsed("--dataset", str(tmp_path / "own.jsonl")))
    assert len(exam.corpus.questions) == 4 and len(train.corpus.questions) == 8
    right, _ = demo.four_ways(exam, TokenAligner(), Extractive())
    assert right["oracle"] == [True] * 4
