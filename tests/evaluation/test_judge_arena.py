"""擂台从头到尾：读者自己的回答，程序与本机的服务器当评判；小世界里的数；结果文件；写错了说得清。"""

import json
from pathlib import Path

import numpy as np
import pytest

import judge_arena as ja
from answer_files import read_answers
from judge_bias import exam
from judges import program_judge
from matches import turn_quality
from nlp_common.base.errors import UserError
from results import find_results
from two_turns import two_turn_questions


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def files(tmp_path):
    """两个模型答 30 道题：好的答对 24 道，差的答对 15 道；差的有一个空的。"""
    paths = []
    for name, right in (("bad", 15), ("good", 24)):
        rows = [
            {"prompt": f"{i} 加 1 等于几？", "right": f"得{i + 1}。", "answer": f"得{i + 1 + (i >= right)}。"}
            for i in range(30)
        ]
        if name == "bad":
            rows[29]["answer"] = " "
        paths.append(write_rows(tmp_path / f"{name}.jsonl", rows))
    return paths


# ---------------------------------------------------------------- 读者自己的回答


def test_answers_with_the_program(files, tmp_path, capsys):
    out = tmp_path / "out"
    argv = ["--answers", *files, "--output_dir", str(out), "--orders", "20"]
    record = ja.main(argv)
    metrics = record["metrics"]
    for name in ("raw_win_rate", "lc_win_rate", "elo_order_sd"):
        assert isinstance(metrics[name], float)
    assert metrics["max_difference_to_choix"] is None or metrics["max_difference_to_choix"] < 1e-6
    pair = metrics["pairs"]["good-bad"]
    assert metrics["raw_win_rate"] == pair["win_rate"]["value"]
    assert metrics["lc_win_rate"] == pair["lc"]["value"]
    # 15 道都对（平），9 道只有好的对，6 道都错：5 道平，1 道对方是空的
    assert pair["win_rate"]["value"] == pytest.approx((15 * 0.5 + 9 + 5 * 0.5 + 1) / 30)
    assert metrics["ratings"]["good"]["value"] > metrics["ratings"]["bad"]["value"]
    said = capsys.readouterr().out
    assert "bad.jsonl 第 30 行的回答是空的" in said and "turns" not in metrics
    results = find_results([out])
    assert [r["model"] for r in results] == ["bad", "good"]
    assert results[1]["scores"]["win_rate"]["value"] == pytest.approx(pair["win_rate"]["value"])
    assert results[0]["scores"]["win_rate"]["n"] == 30 and "rating" in results[0]["scores"]
    games = [json.loads(line) for line in (out / "games.jsonl").read_text("utf-8").splitlines()]
    assert len(games) == 30 and games[29]["answer_b"].strip() == "" and games[29]["points"] == 1.0
    assert ja.main(argv)["id"] == record["id"]  # 再运行直接用
    assert "已有训练结果" in capsys.readouterr().out
    for picture in ("enough.svg", "ratings.svg"):
        assert "<svg" in (out / picture).read_text("utf-8")


def test_questions_in_the_training_data_are_named(files, tmp_path, capsys):
    train = tmp_path / "train.jsonl"
    write_rows(train, [{"text": "小学算术：12 加 1 等于几？得十三。"}, {"text": "别的事情，与题无关。"}])
    argv = ["--answers", *files, "--orders", "2", "--check_contamination", str(train)]
    ja.main([*argv, "--output_dir", str(tmp_path / "out")])
    assert "q0013" in capsys.readouterr().out
    for result in find_results([tmp_path / "out"]):
        assert [row["id"] for row in result["items"] if row["scores"]["contaminated"]] == ["q0013"]
    with pytest.raises(UserError, match="没有这个文件"):
        ja.main([*argv[:-1], str(tmp_path / "没有.jsonl"), "--output_dir", str(tmp_path / "out2")])


def test_changed_answers_are_not_taken_from_the_old_result(files, tmp_path):
    argv = ["--answers", *files, "--orders", "2", "--output_dir", str(tmp_path / "out")]
    ja.main(argv)
    with Path(files[0]).open("a", encoding="utf-8") as file:
        file.write("\n")
    with pytest.raises(UserError, match="设置不同"):
        ja.main(argv)


def test_same_seed_same_result(files, tmp_path):
    runs = [
        ja.main(["--answers", *files, "--output_dir", str(tmp_path / name), "--orders", "2"])["metrics"]
        for name in ("one", "two")
    ]
    assert runs[0] == runs[1]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda rows: rows[4].pop("answer"), r"b\.jsonl 第 5 行没有 answer；这一行有的是：prompt"),
        (lambda rows: rows[3].update(prompt=" "), r"b\.jsonl 第 4 行的 prompt 是空的"),
        (lambda rows: rows[5].update(prompt=rows[1]["prompt"]), r"b\.jsonl 第 6 行与第 2 行是同一道题"),
        (lambda rows: rows.pop(7), r"a\.jsonl 第 8 行的题，.*b\.jsonl 里没有：题 7"),
        (
            lambda rows: rows.append({"prompt": "多的", "answer": "答"}),
            r"b\.jsonl 第 11 行的题，.*a\.jsonl 里没有",
        ),
    ],
)
def test_wrong_files_name_the_row(tmp_path, change, said):
    rows = [{"prompt": f"题 {i}", "answer": "答"} for i in range(10)]
    a = write_rows(tmp_path / "a.jsonl", rows)
    change(rows)
    b = write_rows(tmp_path / "b.jsonl", rows)
    with pytest.raises(UserError, match=said):
        read_answers([a, b])


def test_alpaca_eval_columns_and_file_names(tmp_path):
    rows = [{"instruction": "问", "output": None}, {"instruction": "再问", "output": 12}]
    paths = [write_rows(tmp_path / f"{name}.json", []) for name in "ab"]
    for path in paths:
        Path(path).write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    questions, answers = read_answers(paths)
    assert [q["turns"][0]["ask"] for q in questions] == ["问", "再问"]
    assert [reply[0]["text"] for reply in answers["a"]] == ["", "12"]
    with pytest.raises(UserError, match="两个以上的文件"):
        read_answers(paths[:1])
    with pytest.raises(UserError, match="同名"):
        read_answers([paths[0], paths[0]])


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--judge_url", "http://127.0.0.1:9/v1"], "还要 --judge_model"),
        (["--judge_model", "m"], "还要 --judge_url"),
        (["--models", "sft"], "至少要两个模型"),
        (["--models", "sft,sft"], "写了不止一次"),
        (["--questions", "0"], "--questions 要是正整数"),
        (["--answers", "没有这个.jsonl", "也没有.jsonl"], "没有这个文件"),
    ],
)
def test_wrong_settings(argv, said, tmp_path):
    with pytest.raises(UserError, match=said):
        ja.main([*argv, "--output_dir", str(tmp_path / "out")])


def test_program_needs_the_right_answers(tmp_path):
    rows = [{"prompt": f"题 {i}", "answer": "答"} for i in range(3)]
    paths = [write_rows(tmp_path / f"{name}.jsonl", rows) for name in "ab"]
    with pytest.raises(UserError, match=r"a\.jsonl 第 1 行没有 right.*--judge_url"):
        ja.main(["--answers", *paths, "--output_dir", str(tmp_path / "out")])


# ---------------------------------------------------------------- 服务器


@pytest.fixture
def server(chat_server):
    """选长的那个；问题里有"等于几"的单数题，胡说。"""

    def answer(body):
        text = body["messages"][0]["content"]
        if "【回答 A】" not in text:
            return "我不好说"
        first = text.split("【回答 A】\n")[1].split("\n【回答 B】")[0]
        second = text.split("【回答 B】\n")[1].split("\n【以上是回答】")[0]
        if "【问题】\n7 加" in text:
            return "各有千秋"
        return "[[A]]" if len(first) > len(second) else "[[B]]" if len(second) > len(first) else "[[平]]"

    chat_server.answer = answer
    return chat_server


def test_a_server_is_the_judge(files, server, tmp_path, monkeypatch, capsys):
    """读者那样运行：评判是服务器，钥匙在环境变量里；一道题没有结论，不算谁赢。"""
    monkeypatch.setenv("MY_KEY", "secret-9")
    command = ["--answers", *files, "--judge_url", server.url]
    command += ["--judge_model", "长的好", "--exam_questions", "3", "--output_dir", str(tmp_path / "out")]
    command += ["--orders", "5", "--api_key_env", "MY_KEY"]
    ja.main(command)
    said = capsys.readouterr()
    run = json.loads((tmp_path / "out" / "run.json").read_text("utf-8"))
    assert run["metrics"]["judge"] == "长的好"
    assert run["metrics"]["no_verdict_rate"] == pytest.approx(1 / 30)
    assert run["metrics"]["pairs"]["good-bad"]["win_rate"]["n"] == 29
    wordy = run["metrics"]["exam"]["长的好"]["wordy"]
    assert wordy["value"] == 1.0  # 啰嗦的总赢：考得出来
    assert "secret-9" not in said.out + said.err + json.dumps(run)
    assert run["settings"]["api_key_env"] == "MY_KEY"


def test_a_judge_without_any_verdict(files, server, tmp_path):
    server.answer = lambda body: "我不好说"
    argv = ["--answers", *files, "--judge_url", server.url, "--judge_model", "m"]
    rows = [json.loads(line) for line in Path(files[0]).read_text("utf-8").splitlines()]
    rows[29]["answer"] = "不空"  # 空的不用问评判，也有结论
    write_rows(Path(files[0]), rows)
    with pytest.raises(UserError, match="一个结论也没有给"):
        ja.main([*argv, "--output_dir", str(tmp_path / "out")])


def test_no_server(files, tmp_path):
    argv = ["--answers", *files, "--judge_url", "http://127.0.0.1:9/v1", "--judge_model", "m"]
    argv += ["--judge_retries", "0", "--output_dir", str(tmp_path / "out")]
    with pytest.raises(UserError, match="没有回答：连不上"):
        ja.main(argv)


# ---------------------------------------------------------------- 小世界


def spoken(questions, kind, seed):
    """照 kind 的口气答：每道题 {kind: 机会}。"""
    rng = np.random.default_rng(seed)
    answers = []
    for question in questions:
        replies = []
        for turn in question["turns"]:
            texts = {
                "courteous": "您好，" + turn["sentence"],
                "plain": turn["sentence"],
                "terse": turn["answer"],
                "unhelpful": "我不知道。",
            }
            name = rng.choice(list(kind), p=list(kind.values()))
            replies.append({"text": texts[str(name)], "ids": [], "ended": True})
        answers.append(replies)
    return answers


@pytest.fixture(scope="module")
def world():
    questions = two_turn_questions(150, seed=0)
    answers = {
        "sft": spoken(questions, {"courteous": 0.3, "plain": 0.4, "terse": 0.2, "unhelpful": 0.1}, 1),
        "dpo": spoken(questions, {"courteous": 0.95, "plain": 0.05}, 2),
    }
    return questions, answers, ja.play(questions, answers, program_judge)


def test_numbers_of_the_world(world, monkeypatch):
    questions, answers, matches = world
    monkeypatch.setattr(
        ja, "coverage", lambda *a: {"position": 0.95, "length": 0.95}
    )  # 自己的测试在 test_judges.py
    found = ja.world_numbers(questions, answers, matches, ja.ArenaSettings())
    assert found["turns"]["dpo"]["turn1"]["value"] > 0.95 > found["turns"]["sft"]["turn1"]["value"]
    for name in ("position", "length"):
        assert found[name]["low"] <= found[name]["planted"] <= found[name]["high"]
    row = found["biased"]["dpo-sft"]
    # 又长又好：长度控制把好也去掉了；知道质量的，回到不偏的评判那里
    assert row["program_lc"] < row["program_raw"] - 0.1
    assert abs(row["biased_knowing_quality"] - row["noisy_raw"]) < 0.06
    assert abs(row["biased_lc"] - row["noisy_raw"]) > 0.06


def test_ranking_of_the_world(world):
    _, answers, matches = world
    settings = ja.ArenaSettings(orders=30)
    found = ja.ranking(matches, list(answers), settings)
    assert found["games"] == 300 and found["elo_order_sd"] > 5
    assert found["ratings"]["dpo"]["value"] > 1000 > found["ratings"]["sft"]["value"]
    row = found["ratings"]["dpo"]
    assert row["elo_lowest"] < row["value"] + 400 and row["elo_highest"] > row["elo_lowest"]
    pair = ja.pair_numbers(matches[0], 0)
    assert pair["win_rate"]["low"] > 0.5 and pair["enough"] <= 50 and pair["chars_more"] > 0
    assert ja.judge_numbers(matches, 0)["disagree_with_itself"] == 0


def test_simulation_is_the_issues_number():
    found = ja.simulated(0)
    assert found["raw_win_rate"] == pytest.approx(0.6, abs=0.01)
    assert found["lc_win_rate"] == pytest.approx(0.5, abs=0.005)


def test_turn_quality_looks_at_its_own_turn():
    question = two_turn_questions(1, seed=0)[0]
    good = {"text": question["turns"][0]["sentence"], "ended": True}
    assert turn_quality(question, [good, good], 0) == 0.8
    assert turn_quality(question, [good, {"text": "我不知道。", "ended": True}], 1) == 0.0


def test_models_that_speak(chat_folder, tmp_path):
    """两个文件夹里的模型答两轮：随机的小模型说不对，走得通就行。"""
    from answering import load_answerer
    from two_turns import answer_both_turns

    questions = two_turn_questions(3, seed=0)
    answers = answer_both_turns(load_answerer(str(chat_folder)), questions, 6, 1.0, seed=0)
    assert [len(each) for each in answers] == [2, 2, 2]
    papers = exam(questions, program_judge, 0)
    assert papers["right"].value == 1.0
