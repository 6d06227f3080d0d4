"""打分、题目与回答文件、服务器、训练的奖励：手算的，写错了说得清，从头到尾跑一遍。"""

import json
from types import SimpleNamespace

import pytest
import torch

import ifeval_zh as iz
import instruction_files as files
import reward_gaming as gaming
from instruction_prompts import general_prompts, tiny_prompts
from nlp_common.base.errors import UserError
from results import find_results, read_result

COMMA = {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
BOTH = {
    "instruction_id_list": ["punctuation:no_comma", "zh:start_with"],
    "kwargs": [{}, {"start_phrase": "春"}],
}


def said(*texts):
    return [{"text": text, "ended": True} for text in texts]


def test_scores_by_hand():
    rows = [COMMA, BOTH, BOTH]
    scored = iz.score_all(rows, said("好。", "春天，来了", "好的\n春天"))
    assert [each["strict"] for each in scored] == [[True], [False, True], [True, False]]
    assert [each["prompt_strict"] for each in scored] == [1, 0, 0]
    assert [each["prompt_loose"] for each in scored] == [1, 0, 1]  # 去掉首行就合
    assert [each["unread"] for each in scored] == [0.5, 0, 0]  # 第一题：别的两个回答里一个没有逗号
    found = iz.summarise(scored, 0)
    assert found["prompt_strict"]["value"] == pytest.approx(1 / 3, abs=1e-4)
    assert found["instruction_strict"]["value"] == pytest.approx(3 / 5)
    assert found["instruction_loose"]["value"] == pytest.approx(4 / 5)
    low, high = (found["instruction_strict"][side] for side in ("low", "high"))
    assert 0 <= low < 0.6 < high <= 1
    gap = found["read_gap"]
    assert gap["value"] == pytest.approx((1 - 0.5) / 3, abs=1e-4)


def test_comparison_is_paired():
    rows = [COMMA] * 4
    scored = {
        "a": iz.score_all(rows, said("，", "，", "好", "好")),
        "b": iz.score_all(rows, said("，", "好", "好", "好")),
    }
    gap = iz.compare(scored, "b", 0)["prompt_strict"]
    assert gap["value"] == pytest.approx(0.25) and gap["n"] == 4 and gap["low"] >= 0


def test_program_written_answers_score_one_and_say_nothing():
    """程序写的套话满分；小世界里程序写的回答又合格又对。"""
    for rows in (general_prompts(60, 0), tiny_prompts(30, 0)):
        scored = iz.score_all(rows, said(*(row["example"] for row in rows)))
        assert all(each["prompt_strict"] == each["prompt_loose"] == 1 for each in scored)
    assert all(each["right"] == each["both"] == 1 for each in scored)
    wrong = iz.score_all(rows, said(*["我不知道。"] * len(rows)))
    assert not any(each["right"] for each in wrong) and any(each["prompt_strict"] for each in wrong)


def test_rewards():
    row = tiny_prompts(1, 0)[0] | BOTH
    right = row["question"]["answer"]
    assert gaming.form_reward(row, {"text": "春天。", "ended": True}) == 1
    assert gaming.form_reward(row, {"text": "春，", "ended": True}) == 0.5
    assert gaming.form_reward(row, {"text": "春天。", "ended": False}) == 0
    assert gaming.form_reward(row, {"text": "", "ended": True}) == 0
    assert gaming.is_right(row, {"text": right, "ended": True}) == 1
    assert gaming.is_right(row, {"text": right, "ended": False}) == 0
    assert gaming.smooth([1.0, 0.0, 0.5], 2) == [1.0, 0.5, 0.25]


def test_the_step_is_grpo(load_script):
    """优势与梯度等于 grpo_alignment.py 的（dapo 的损失，还没有更新，概率比是 1）。"""
    grpo = load_script("grpo_alignment")
    generator = torch.Generator().manual_seed(0)
    rewards = torch.rand(16, generator=generator, dtype=torch.float64).round(decimals=1)
    advantages = gaming.group_advantages(rewards)
    assert torch.allclose(advantages, grpo.group_advantages(rewards, gaming.GROUP, "grpo", None), atol=1e-9)
    mask = torch.rand(16, 5, generator=generator) < 0.7
    ours = torch.randn(16, 5, generator=generator, dtype=torch.float64).requires_grad_()
    gaming.policy_loss(ours, advantages, mask).backward()
    theirs = ours.detach().clone().requires_grad_()
    limits = SimpleNamespace(clip_range=0.2, clip_range_high=None)
    losses, _ = grpo.token_losses("dapo", theirs, theirs.detach(), advantages, mask, limits)
    (losses * grpo.token_weights("dapo", mask, None, mask.sum(), 5)).sum().backward()
    assert torch.allclose(ours.grad, theirs.grad, atol=1e-9)


@pytest.fixture
def few_answers(monkeypatch):
    """一步只写 2 × 8 个回答。"""
    monkeypatch.setattr(gaming, "QUESTIONS", 2)


def test_training_is_deterministic(chat_folder, few_answers):
    """同一种子，两次训练的每一步、训练后的回答都相同。"""
    rows = [
        iz.as_question(row | COMMA | {"instruction_id_list": ["zh:no_punctuation"]})
        for row in tiny_prompts(32, 0, heldout=False)
    ]
    part = SimpleNamespace(settings=SimpleNamespace(steps=3, learning_rate=3e-3, seed=0))
    runs = [gaming.train_on_reward(part, "form", str(chat_folder), "hf", rows, rows[:2]) for _ in range(2)]
    assert runs[0] == runs[1]
    assert len(runs[0]["history"]) == 3 and len(runs[0]["answers"]) == 2
    assert all(0 <= row["form"] <= 1 for row in runs[0]["history"])


def test_the_whole_script(chat_folder, tmp_path, capsys, few_answers):
    arguments = ["--preset", "tiny", "--models", str(chat_folder), "--n", "8", "--steps", "2"]
    arguments += ["--output_dir", str(tmp_path / "r")]
    run = iz.main(arguments)
    assert run["metrics"]["program_strict"] == 1
    assert len(run["metrics"]["models"]) == 3 and len(run["metrics"]["gap"]) == 2
    results = sorted((tmp_path / "r" / "results").iterdir())
    assert len(results) == 3
    for path in results:
        result = read_result(path)
        assert len(result["items"]) == 8 and {"instruction_strict", "unread", "right"} <= set(
            result["scores"]
        )
    for name in ("scores.svg", "gaming.svg"):
        assert "<svg" in (tmp_path / "r" / name).read_text(encoding="utf-8")
    assert len((tmp_path / "r" / "prompts.jsonl").read_text(encoding="utf-8").splitlines()) == 8
    assert "换题" in capsys.readouterr().out
    assert iz.main(arguments)["seconds"] == run["seconds"]  # 第二次直接用
    with pytest.raises(UserError, match="设置"):
        iz.main([*arguments, "--seed", "1"])


# ---------------------------------------------------------------- 读者的文件


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_files_of_ones_own(tmp_path):
    rows = general_prompts(30, 0)
    layout = ("key", "prompt", "instruction_id_list", "kwargs")
    empty = dict.fromkeys(["num_words", "relation", "keywords"])  # hub 上的 IFEval：没有的参数是 null
    asked = [{name: row[name] for name in layout} for row in rows]
    asked = [row | {"kwargs": [empty | kwargs for kwargs in row["kwargs"]]} for row in asked]
    questions = write_rows(tmp_path / "q.jsonl", asked)
    good = write_rows(
        tmp_path / "good.jsonl", [{"prompt": r["prompt"], "response": r["example"]} for r in rows]
    )
    lazy = write_rows(tmp_path / "lazy.jsonl", [{"key": r["key"], "answer": "好的。"} for r in rows[::-1]])
    out = [
        "--preset",
        "tiny",
        "--dataset",
        questions,
        "--answers",
        good,
        lazy,
        "--output_dir",
        str(tmp_path / "r"),
    ]
    metrics = iz.main(out)["metrics"]
    assert metrics["models"]["good"]["prompt_strict"]["value"] == 1
    assert 0 < metrics["models"]["lazy"]["prompt_strict"]["value"] < 0.5
    assert metrics["gap"]["lazy"]["prompt_strict"]["high"] < 0
    assert "program_strict" not in metrics and "right" not in metrics["models"]["good"]


def test_leaked_prompts_are_found(tmp_path, capsys):
    rows = general_prompts(5, 0)
    train = write_rows(
        tmp_path / "train.jsonl", [{"text": "别的话。" + rows[3]["prompt"]}, {"text": "无关的一行。"}]
    )
    said = write_rows(tmp_path / "mine.jsonl", [{"key": r["key"], "response": "好的。"} for r in rows])
    out = [
        "--preset",
        "tiny",
        "--dataset",
        "general",
        "--n",
        "5",
        "--answers",
        said,
        "--check_contamination",
        train,
    ]
    assert iz.main([*out, "--output_dir", str(tmp_path / "out")])["metrics"]["contaminated"] == 1
    assert "q4" in capsys.readouterr().out
    [result] = find_results([tmp_path / "out"])
    assert [row["id"] for row in result["items"] if row["scores"]["contaminated"]] == ["q4"]


def test_csv_and_parquet_questions(tmp_path):
    table = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    row = {
        "key": 7,
        "prompt": "写",
        "instruction_id_list": ["keywords:existence"],
        "kwargs": [{"keywords": ["花"], "n": None}],
    }
    parquet.write_table(table.Table.from_pylist([row]), tmp_path / "q.parquet")
    (tmp_path / "q.csv").write_text(
        'key,prompt,instruction_id_list,kwargs\n7,写,"[""keywords:existence""]","[{""keywords"": [""花""]}]"\n',
        encoding="utf-8",
    )
    for name in ("q.parquet", "q.csv"):
        found = files.read_instruction_file(str(tmp_path / name))
        assert found[0]["kwargs"] == [{"keywords": ["花"]}]
        assert found[0]["instruction_id_list"] == ["keywords:existence"]


GOOD_ROW = {"key": 1, "prompt": "写一段。", **COMMA}


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ({"instruction_id_list": ["punctuation:no_coma"]}, r"第 2 行（key=2）.*punctuation:no_comma"),
        ({"instruction_id_list": ["length_constraints:number_words"]}, r"第 2 行.*缺参数"),
        ({"kwargs": []}, None),  # 没有 kwargs：要求本来就不要参数，可以
        ({"kwargs": [{}, {}]}, r"第 2 行.*1 条要求，kwargs 却有 2 项"),
        ({"kwargs": ["x"]}, r"第 2 行.*一个对象"),
        ({"instruction_id_list": []}, r"第 2 行.*是空的"),
        ({"key": 1}, r"第 2 行的 key 1 与第 1 行"),
        ({"prompt": " "}, r"第 2 行的 prompt 是空的"),
    ],
)
def test_bad_questions_are_named_by_row(row, named, tmp_path):
    path = write_rows(tmp_path / "q.jsonl", [GOOD_ROW, GOOD_ROW | {"key": 2, "prompt": "再写。"} | row])
    if named is None:
        assert len(files.read_instruction_file(path)) == 2
        return
    with pytest.raises(UserError, match=named):
        files.read_instruction_file(path)


def test_unknown_instructions_can_be_skipped(tmp_path, capsys):
    bad = GOOD_ROW | {"key": 2, "instruction_id_list": ["某某"]}
    path = write_rows(tmp_path / "q.jsonl", [GOOD_ROW, bad])
    assert [row["key"] for row in files.read_instruction_file(path, skip=True)] == [1]
    assert "第 2 行（不认识的要求 某某" in capsys.readouterr().out
    with pytest.raises(UserError, match="没有一道"):
        files.read_instruction_file(write_rows(tmp_path / "b.jsonl", [bad]), skip=True)


ROWS = [{"key": 1, "prompt": "甲"}, {"key": 2, "prompt": "乙"}]


@pytest.mark.parametrize(
    ("answers", "named"),
    [
        ([{"prompt": "甲", "response": "好"}], r"没有答到 1 道题：第 2 道（key=2）"),
        ([{"prompt": "甲"}], r"第 1 行没有 response"),
        ([{"response": "好"}], r"第 1 行没有 prompt，也没有 key"),
        ([{"key": 1, "response": "好"}, {"prompt": "甲", "response": "坏"}], r"第 2 行与第 1 行"),
    ],
)
def test_bad_answers_are_named_by_row(answers, named, tmp_path):
    with pytest.raises(UserError, match=named):
        files.read_answer_file(write_rows(tmp_path / "a.jsonl", answers), ROWS)


def test_empty_and_extra_answers_are_said(tmp_path, capsys):
    answers = [{"key": "2", "response": None}, {"key": 1, "output": " "}, {"prompt": "丙", "response": "好"}]
    found = files.read_answer_file(write_rows(tmp_path / "a.jsonl", answers), ROWS)
    assert [each["text"] for each in found] == [" ", ""]
    printed = capsys.readouterr().out
    assert "第 1 行、第 2 行的回答是空的" in printed and "第 3 行的题不在题目里" in printed
    assert not any(each["prompt_strict"] for each in iz.score_all([COMMA, COMMA], found))


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--answers", "a.jsonl", "--answers_url", "http://127.0.0.1:1"], "只给一个"),
        (["--answers_url", "http://127.0.0.1:1/v1"], "--answers_model"),
        (["--answers", "a.jsonl", "b/a.jsonl"], "同名"),
        (["--models", "sft,sft"], "不止一次"),
        (["--dataset", "没有.jsonl"], "没有这个文件"),
        (["--n", "0"], "--n"),
        (["--dataset", "general", "--steps", "5"], "--steps"),
    ],
)
def test_bad_flags(more, named):
    with pytest.raises(UserError, match=named):
        iz.main(["--preset", "tiny", *more])


# ---------------------------------------------------------------- 服务器


def test_answers_from_a_server(tmp_path, monkeypatch, capsys, chat_server):
    """照题写合格的回答；有一道题服务器总是 500。"""
    rows = general_prompts(6, 0)
    answers = {row["prompt"]: row["example"] for row in rows} | {rows[2]["prompt"]: (500, b"")}
    chat_server.answer = lambda body: answers.get(body["messages"][-1]["content"], "你好")
    monkeypatch.setattr("nlp_common.hub.chat_server.time.sleep", lambda seconds: None)
    arguments = ["--preset", "tiny", "--dataset", "general", "--n", "6", "--answers_model", "m"]
    arguments += ["--answers_url", chat_server.url, "--output_dir", str(tmp_path / "r")]
    metrics = iz.main(arguments)["metrics"]
    assert metrics["models"]["m"]["prompt_strict"]["value"] == pytest.approx(
        5 / 6, abs=1e-3
    )  # 没有回答的不算合格
    assert "1 个回答没说完" in capsys.readouterr().out


@pytest.mark.slow
def test_a_model_trained_on_the_checker_games_it(tmp_path):
    """SFT 模型：奖励只看形式，合格的多了，答对的少了；乘上对错，答对的还在。"""
    metrics = iz.main(
        [
            "--preset",
            "tiny",
            "--models",
            "sft",
            "--n",
            "100",
            "--steps",
            "40",
            "--output_dir",
            str(tmp_path / "r"),
        ]
    )["metrics"]
    before, form, both = (metrics["models"][name] for name in ("sft", "sft+form", "sft+both"))
    assert form["prompt_strict"]["value"] > before["prompt_strict"]["value"] + 0.2
    assert form["right"]["value"] < before["right"]["value"] - 0.2  # 降多少，随机器的浮点数而不同
    assert both["right"]["value"] > 0.9
