"""多样性：种数等于枚举，self-BLEU 等于 sacrebleu，熵等于穷举出来的，整个脚本照读者那样跑一遍。"""

import itertools
import json
import math
import random
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

import diversity_evaluation as de
from answering import Answerer
from nlp_common.base.errors import UserError
from nlp_common.lm.generation import sampling_weights

# ---------------------------------------------------------------- 几种


@pytest.mark.parametrize("m", [1, 2, 3, 5])
def test_expected_different_equals_counting_every_subset(m):
    drawn = ["甲", "甲", "乙", "错", "丙", "甲"]
    right = [each for each in drawn if each != "错"]
    subsets = list(itertools.combinations(drawn, m))
    by_hand = sum(len(set(subset) - {"错"}) for subset in subsets) / len(subsets)
    assert de.expected_different(right, len(drawn), m) == pytest.approx(by_hand)


def test_expected_different_does_not_depend_on_how_many_were_asked():
    """无偏：从 6 个里估计抽 3 个的，平均等于真的只抽 3 个；直接数 K 个里几种，K 越大越多。"""
    rng = random.Random(0)
    options, weights = ["甲", "乙", "丙", "丁"], [0.6, 0.2, 0.15, 0.05]
    truth = sum(1 - (1 - p) ** 3 for p in weights)
    for k in (3, 6, 16):
        found = [de.expected_different(rng.choices(options, weights, k=k), k, 3) for _ in range(4000)]
        assert sum(found) / len(found) == pytest.approx(truth, abs=0.03)


# ---------------------------------------------------------------- self-BLEU


def test_self_bleu_equals_sacrebleu():
    sacrebleu = pytest.importorskip("sacrebleu", reason="与 sacrebleu 比：pip install sacrebleu")
    texts = [
        "您好，松鼠吃了香蕉",
        "松鼠吃了香蕉",
        "香蕉",
        "好的，松鼠吃了蛋糕",
        "香",
        "松鼠吃了香蕉",
        "不知道",
    ]
    theirs = [
        sacrebleu.sentence_bleu(
            text, texts[:i] + texts[i + 1 :], tokenize="char", use_effective_order=True
        ).score
        / 100
        for i, text in enumerate(texts)
    ]
    assert de.self_bleu(texts) == pytest.approx(sum(theirs) / len(theirs), abs=1e-9)


def test_self_bleu_by_hand():
    assert de.self_bleu(["一样的话"] * 3) == pytest.approx(1.0)
    assert de.self_bleu(["甲乙", "丙丁"]) == 0.0
    assert de.self_bleu(["只有一个"]) == 0.0
    # "甲乙丁"对"甲乙丙"：一元 2/3，二元 1/2，三元 0 当作半个：1/2；长度一样，不罚
    once = (2 / 3 * 1 / 2 * 1 / 2) ** (1 / 3)
    assert de.self_bleu(["甲乙丁", "甲乙丙"]) == pytest.approx(once)


# ---------------------------------------------------------------- 熵


class Automaton(torch.nn.Module):
    """说什么只看上一个 token 的小模型：0 是结束符，概率写在表里，可以穷举它的全部回答。"""

    def __init__(self, table: torch.Tensor):
        super().__init__()
        self.table, self.device = table.log(), torch.device("cpu")

    def forward(self, input_ids, attention_mask, position_ids, use_cache, logits_to_keep):
        return SimpleNamespace(logits=self.table[input_ids][:, -logits_to_keep:])


def all_answers(table, start, most):
    """→ {回答: 概率}，到结束符 0 或 most 个 token 为止。"""
    found, open_ = {}, {(): 1.0}
    for _ in range(most):
        following = {}
        for answer, p in open_.items():
            last = answer[-1] if answer else start
            for token, q in enumerate(table[last].tolist()):
                (found if token == 0 else following)[(*answer, token)] = p * q
        open_ = following
    return found | open_


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_entropy_equals_that_of_all_answers(monkeypatch, temperature):
    table = torch.tensor([[1.0, 0, 0, 0], [0.5, 0.2, 0.2, 0.1], [0.1, 0.6, 0.2, 0.1], [0.3, 0.3, 0.3, 0.1]])
    table = table.clamp(min=1e-30).double()
    warm = sampling_weights(table.log(), temperature).double()
    answers = all_answers(warm, start=3, most=4)
    truth = -sum(p * math.log(p) for p in answers.values() if p > 0)
    monkeypatch.setattr(de, "prompt_ids", lambda tokenizer, messages: messages)
    tokenizer = SimpleNamespace(pad_token_id=0)
    total = 0.0
    answerer = Answerer("a", "a", tokenizer, Automaton(table))
    likely = [answer for answer, p in answers.items() if p > 1e-12]
    for answer in likely:  # 各回答按它的概率出现：期望就是穷举的和
        [entropy] = de.answer_entropies(
            answerer, [{"messages": [2, 3]}], [[{"ids": list(answer)}]], temperature, 1.0
        )
        total += answers[answer] * entropy
    assert total == pytest.approx(truth, abs=1e-5)


def test_entropy_of_a_batch_is_that_of_each_alone(chat_folder):
    from answering import load_answerer

    answerer = load_answerer(str(chat_folder))
    questions = [{"messages": [{"role": "user", "content": text}]} for text in ("你好", "小刚去了哪里？")]
    groups = [[{"ids": [5, 6, 7]}, {"ids": [9]}], [{"ids": [8, 8]}, {"ids": [4, 5, 6, 7, 8]}]]
    together = de.answer_entropies(answerer, questions, groups, 1.0, 0.9)
    alone = [
        sum(de.answer_entropies(answerer, [q], [[reply]], 1.0, 0.9)[0] for reply in group) / len(group)
        for q, group in zip(questions, groups, strict=True)
    ]
    assert together == pytest.approx(alone, abs=1e-4)


# ---------------------------------------------------------------- 比


def test_at_quality_reads_between_two_temperatures():
    curve = [
        {"temperature": 0.5, "right": 1.0, "different_right": 2.0},
        {"temperature": 1.0, "right": 0.9, "different_right": 4.0},
        {"temperature": 1.5, "right": 0.5, "different_right": 3.0},
    ]
    assert de.at_quality(curve, 0.95) == pytest.approx(
        {"temperature": 0.75, "different_right": 3.0, "reached": 1}
    )
    assert de.at_quality(curve, 0.2)["reached"] == 0
    assert de.at_quality(curve[1:], 0.95) == {}


def test_scores_of_a_group():
    question = {
        "messages": [{"role": "user", "content": "…"}], "slot": "food", "answer": "香蕉", "sentence": "松鼠吃了香蕉",
    }  # fmt: skip
    said = ["您好，松鼠吃了香蕉", "香蕉", "香蕉", "面包"]
    scores = de.score_group(question, [{"text": text, "ended": True} for text in said], draws=4)
    assert scores["right"] == 0.75 and scores["preferred"] == 0.25
    assert scores["different_right"] == 2 and scores["different"] == 3
    assert scores["distinct_1"] == len(set("".join(said))) / len("".join(said))
    assert Counter(scores) == Counter({**dict.fromkeys(scores, 0), **scores})


# ---------------------------------------------------------------- 整个脚本


def run(chat_folder, tmp_path, *more):
    return de.main(
        ["--preset", "tiny", "--models", str(chat_folder), "--questions", "3", "--samples", "4", "--draws", "2",
         "--max_new_tokens", "6", "--temperatures", "0.7,1", "--top_ps", "0.9", "--output_dir", str(tmp_path / "out"),
         *more]
    )  # fmt: skip


def test_script_writes_results_and_loads_them_again(chat_folder, tmp_path, capsys):
    record = run(chat_folder, tmp_path)
    assert list(record["metrics"]["grid"][str(chat_folder)]) == ["t0.7", "t1", "p0.9"]
    assert len(list((tmp_path / "out" / "results").glob("diversity--*.json"))) == 1
    assert (tmp_path / "out" / "equal_quality.svg").read_text("utf-8").startswith("<svg")
    capsys.readouterr()
    assert run(chat_folder, tmp_path)["id"] == record["id"]
    assert "直接加载" in capsys.readouterr().out


def test_own_questions_have_no_right_and_wrong(chat_folder, tmp_path):
    path = tmp_path / "题.jsonl"
    path.write_text('{"prompt": "你好"}\n{"prompt": "写一句话"}\n', encoding="utf-8")
    record = run(chat_folder, tmp_path, "--dataset", str(path), "--check_contamination", str(path))
    [grid] = record["metrics"]["grid"].values()
    assert "right" not in grid["t1"] and grid["t1"]["entropy"] > 0
    [result] = (tmp_path / "out" / "results").glob("*.json")
    scores = json.loads(result.read_text("utf-8"))["scores"]
    assert scores["contaminated"]["value"] == 0  # 两道题都不到 5 个字，没有查
    path.write_text('{"prompt": "你好"}\n{"prompt": " "}\n', encoding="utf-8")
    with pytest.raises(UserError, match="第 2 行的 prompt 是空的"):
        run(chat_folder, tmp_path, "--dataset", str(path), "--retrain")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--temperatures", "0.5"], "要有 1"),
        (["--temperatures", "1,0"], "大于 0"),
        (["--top_ps", "1.5"], "不大于 1"),
        (["--top_ps", "九成"], "0.7,1.0"),
        (["--draws", "5"], "比 --samples 4 还多"),
        (["--models", "reward"], "只会打分"),
    ],
)
def test_bad_settings(chat_folder, tmp_path, flags, said):
    with pytest.raises(UserError, match=said):
        run(chat_folder, tmp_path, *flags)
