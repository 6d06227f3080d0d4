"""pass@k 等于数遍各种取法、等于发表的估计；无偏；区间盖得住；题目自检、坏的文件、答案怎样接起来。"""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import code_answers as ca
import code_eval as ce
import pass_at_k as pk
from code_tasks import TASKS
from nlp_common.base.errors import UserError
from nlp_common.sandbox.sandbox import Limits, Verdict

HERE = Path(__file__).resolve().parent
SHORT = {"task_id": "t/add", "entry_point": "add", "prompt": 'def add(a, b):\n    """加起来"""\n',
         "canonical_solution": "    return a + b\n", "test": "def check(f):\n    assert f(1, 2) == 3\n"}  # fmt: skip


def write_rows(path, rows):
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    return str(path)


# ---------------------------------------------------------------- 估计


@settings(deadline=None)
@given(st.integers(1, 9).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_equals_counting_every_subset(case):
    n, c, k = case
    outcomes = [True] * c + [False] * (n - c)
    subsets = list(itertools.combinations(outcomes, k))
    assert pk.pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)


@settings(deadline=None)
@given(st.integers(1, 300).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_equals_the_published_estimator(case):
    """Chen et al. 2021 论文里的公式，用精确的组合数算。"""
    n, c, k = case
    assert pk.pass_at_k(n, c, k) == pytest.approx(1 - math.comb(n - c, k) / math.comb(n, k), abs=1e-12)


@settings(max_examples=50, deadline=None)
@given(st.floats(0, 1), st.integers(1, 12), st.integers(1, 12))
def test_unbiased_and_the_naive_one_is_low(p, n, k):
    if k > n:
        return
    weights = [math.comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)]
    expected = sum(w * pk.pass_at_k(n, c, k) for c, w in enumerate(weights))
    naive = sum(w * pk.naive_pass_at_k(n, c, k) for c, w in enumerate(weights))
    assert expected == pytest.approx(1 - (1 - p) ** k, abs=1e-9)
    assert naive <= expected + 1e-9


def test_bias_table_is_exact():
    table = pk.bias_table(0.6, 0.9, [1, 5], ns=(5, 20))
    for row in table.values():
        for each in row.values():
            assert each["unbiased"] == pytest.approx(each["true"], abs=1e-9)
    assert table["5"]["5"]["naive"] < table["20"]["5"]["naive"] < table["20"]["5"]["true"]
    assert pk.beta_binomial(7, 2.0, 3.0).sum() == pytest.approx(1)
    chances = np.random.default_rng(0).beta(0.6, 0.9, 200_000)
    assert pk.population_pass_at_k(0.6, 0.9, 5) == pytest.approx(pk.true_pass_at_k(chances, 5), abs=0.005)


@pytest.mark.parametrize(("n", "c", "k"), [(5, 6, 1), (5, -1, 1), (5, 1, 6), (5, 1, 0)])
def test_impossible_counts(n, c, k):
    with pytest.raises(ValueError, match="给的是"):
        pk.pass_at_k(n, c, k)


def test_intervals_cover_and_the_pooled_one_does_not():
    found = pk.coverage(0.6, 0.9, tasks=25, n=20, k=1, repeats=150)
    assert 0.88 <= found["new_tasks"] <= 1 and 0.88 <= found["same_tasks"] <= 1
    assert found["every_sample"] < 0.75
    assert found["same_tasks_by_items"] > found["same_tasks"]


# ---------------------------------------------------------------- 题与答案


def test_builtin_tasks():
    assert len(TASKS) >= 20 and len({task["task_id"] for task in TASKS}) == len(TASKS)
    for task in TASKS:
        assert any("\u4e00" <= c <= "\u9fff" for c in task["prompt"]) and task["wrong"]


def test_a_few_builtin_tasks_pass_and_their_wrong_answers_fail():
    tasks = TASKS[::6]
    answers = [[task["canonical_solution"], *task["wrong"]] for task in tasks]
    for verdicts in ce.run_all(tasks, answers, Limits(seconds=10), 2):
        assert verdicts[0].passed and not any(verdict.passed for verdict in verdicts[1:])


@pytest.mark.slow
def test_every_wrong_answer_of_every_task_fails():
    verdicts = ce.run_all(TASKS, [task["wrong"] for task in TASKS], Limits(seconds=5), 2)
    assert not any(verdict.passed for each in verdicts for verdict in each)


@pytest.mark.parametrize(
    "answer",
    [
        "    return a + b\n",  # 接在题面后面
        "def add(a, b):\n    return a + b\n",  # 整个函数
        "好的：\n```python\ndef add(a, b):\n    return a + b\n```\n这样就行。",
        "```py\nimport math\ndef add(a, b):\n    return math.fsum([a, b])\n",  # 没有写完的代码块
    ],
)
def test_answers_are_joined_to_the_prompt(answer):
    space = {}
    exec(ca.code_of(SHORT, answer), space)
    assert space["add"](1, 2) == 3


def test_imports_of_the_prompt_are_kept():
    task = next(task for task in TASKS if task["entry_point"] == "softmax")
    code = ca.code_of(task, "```python\ndef softmax(numbers):\n    return math.exp(0)\n```")
    assert code.startswith("import math\n")
    compile(code, "answer.py", "exec")


def test_helpers_of_the_prompt_are_kept():
    """HumanEval/38 的样子：题面里先有一个函数，回答只写了要写的那个。"""
    prompt = 'def twice(x):\n    return 2 * x\n\n\ndef four(x):\n    """x 的四倍"""\n'
    task = {"entry_point": "four", "prompt": prompt}
    space = {}
    exec(ca.code_of(task, "```python\ndef four(x):\n    return twice(twice(x))\n```"), space)
    assert space["four"](3) == 12


def test_simulated_programmer_is_as_good_as_it_says():
    answers, chances = ca.simulated(TASKS * 8, n=50, seed=1)
    right = [np.mean([text == task["canonical_solution"] for text in each])
             for task, each in zip(TASKS * 8, answers, strict=True)]  # fmt: skip
    assert np.corrcoef(right, chances)[0, 1] > 0.95
    assert np.mean(right) == pytest.approx(np.mean(chances), abs=0.02)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"test": "print('没有断言')"}, "第 2 行的 test 里没有 assert"),
        ({"prompt": "def plus(a, b):\n"}, "没有 def add"),
        ({"task_id": "t/add"}, "与第 1 行重复"),
        ({"entry_point": ""}, "第 2 行的 entry_point 是空的"),
        ({"prompt": None}, "第 2 行的 prompt"),
    ],
)
def test_bad_task_files_are_named_by_row(tmp_path, change, said):
    path = write_rows(tmp_path / "tasks.jsonl", [SHORT, SHORT | {"task_id": "t/2"} | change])
    with pytest.raises(UserError, match=said):
        ca.load_tasks(path)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"task_id": "t/other", "completion": "x"}], "第 1 行的 task_id t/other 不在题目里"),
        ([{"task_id": "t/add"}], "第 1 行没有 completion"),
        ([{"task_id": "t/add", "completion": 3}], "第 1 行没有 completion"),
        ([{"completion": "x"}], "第 1 行没有 task_id"),
    ],
)
def test_bad_samples_are_named_by_row(tmp_path, rows, said):
    with pytest.raises(UserError, match=said):
        ca.load_samples(write_rows(tmp_path / "s.jsonl", rows), [SHORT])


def test_tasks_without_samples_are_named(tmp_path):
    path = write_rows(tmp_path / "s.jsonl", [{"task_id": "t/add", "completion": ""}])
    with pytest.raises(UserError, match="1 道题没有答案：t/2"):
        ca.load_samples(path, [SHORT, SHORT | {"task_id": "t/2"}])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"canonical_solution": "    return a - b\n"}, "标准答案没有通过"),
        ({"test": "def check(f):\n    assert f\n"}, "什么也不写就通过了"),
        ({"test": "def check(f):\n    pass  # assert\n"}, "什么也不写就通过了"),
    ],
)
def test_broken_tasks_are_found_before_anyone_is_scored(change, said):
    with pytest.raises(UserError, match=said):
        ce.check_tasks([SHORT | change], Limits(seconds=10), 1)


def test_a_broken_sandbox_is_an_error_not_zero(monkeypatch):
    """别的评测在 Windows 上悄悄地人人 0 分；这里停下来说。"""
    monkeypatch.setattr(ce, "run_answer", lambda *_: Verdict("error", "沙箱的进程没有起来"))
    with pytest.raises(UserError, match="沙箱在这台机器上不能用"):
        ce.check_tasks([SHORT], Limits(), 1)


def test_every_dangerous_answer_is_stopped(capsys):
    assert ce.show_dangerous(Limits(seconds=1)) == 1.0
    assert "做了不许做的事" in capsys.readouterr().out


# ---------------------------------------------------------------- 整个脚本


def test_samples_of_a_readers_own_file(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ce, "DANGEROUS", {})
    monkeypatch.setattr(ce, "show_dangerous", lambda limits: 1.0)
    tasks = write_rows(tmp_path / "tasks.jsonl", [SHORT, SHORT | {"task_id": "t/2"}])
    samples = write_rows(
        tmp_path / "mine.jsonl",
        [{"task_id": "t/add", "completion": c} for c in ("    return a + b\n", "    return b + a\n", "")]
        + [{"task_id": "t/2", "completion": "    return 3\n"}] * 3,
    )
    record = ce.main(
        ["--dataset", tasks, "--samples", samples, "--k", "1,2,5", "--check_contamination", tasks,
         "--output_dir", str(tmp_path / "out")]
    )  # fmt: skip
    mine = record["metrics"]["mine"]
    assert mine["pass_at_1"] == pytest.approx((2 / 3 + 1) / 2)
    assert mine["pass_at_2"] == pytest.approx(1.0)
    assert "pass_at_5" not in mine and "算不了 pass@5" in capsys.readouterr().out
    result = json.loads((tmp_path / "out" / "results" / "code--mine.json").read_text("utf-8"))
    assert result["scores"]["contaminated"]["value"] == 1  # 训练数据就是题目自己
    assert result["scores"]["pass@1"]["n"] == 2 and result["items"][0]["id"] == "t/add"
    assert (tmp_path / "out" / "pass_at_k.svg").exists()
    again = ce.main(
        ["--dataset", tasks, "--samples", samples, "--k", "1,2,5", "--check_contamination", tasks,
         "--output_dir", str(tmp_path / "out")]
    )  # fmt: skip
    assert again["id"] == record["id"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--k", "0"], "--k 要是"),
        (["--k", "a"], "--k 要是"),
        (["--n", "3", "--k", "5"], "算不了 pass@5"),
        (["--seconds", "0"], "--seconds"),
        (["--dataset", "没有.jsonl"], "没有.jsonl"),
        (["--samples", "没有.jsonl"], "没有.jsonl"),
        (["--samples", str(HERE)], "是文件夹"),
    ],
)
def test_bad_settings(arguments, said, tmp_path):
    with pytest.raises(UserError, match=said):
        ce.main([*arguments, "--preset", "tiny", "--output_dir", str(tmp_path / "out")])
