"""benchmarks_mc.py：从命令行跑一遍，结果文件读得回；位置偏好、成对比较量得准；写坏了的题、参数说得清。"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import benchmarks_mc as script
from answering import Answerer
from mc_report import compare, score_table
from mc_score import Ask
from nlp_common.base.errors import UserError
from results import find_results, item

FOLDER = Path(script.__file__).parent


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(FOLDER / "benchmarks_mc.py"), "--preset", "tiny", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        encoding="utf-8",
    )


def test_from_the_command_line(tmp_path, chat_folder, capsys):
    """两套题、一个模型：成绩单、结果文件、图；第二次直接用。"""
    options = ["--models", str(chat_folder), "--benchmarks", "world,knowledge_zh", "--limit", "6"]
    options += ["--output_dir", str(tmp_path / "out"), "--shots", "2", "--max_new_tokens", "4"]
    done = run(*options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "knowledge_zh：6 道题，瞎猜 0.250" in done.stdout and "选项转四次" in done.stdout
    results = find_results([tmp_path / "out"])
    assert [each["benchmark"] for each in results] == ["knowledge_zh", "world"]
    first = results[0]["items"][0]
    assert first["group"] == "地理" and first["prompt"].startswith("中国最长的河流是哪一条？\nA. ")
    assert set(first["scores"]) >= {"letter_acc", "letter_same", "text_acc_norm", "generate_acc", "picks_D"}
    assert sum(first["scores"][f"picks_{letter}"] for letter in "ABCD") == 1
    assert (tmp_path / "out" / "world.svg").exists() and (tmp_path / "out" / "world_positions.svg").exists()
    script.main(["--preset", "tiny", *options])
    assert "已有训练结果，直接加载" in capsys.readouterr().out


@pytest.fixture
def own(tmp_path):
    """自己的题，和一个查泄漏用的训练文件。"""
    stories = [
        "小刚去花园看见什么",
        "海边跑来的是哪种动物",
        "谁把香蕉分给它吃",
        "傍晚王伯为何也来了",
        "学校门口的信鸽什么颜色",
        "她心情怎么样",
    ]
    rows = [
        {"question": f"{text}？", "A": "松鼠", "B": "野兔", "C": "山羊", "answer": "ABC"[i % 3]}
        for i, text in enumerate(stories)
    ]
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    train = tmp_path / "train.jsonl"
    lines = [{"text": "不相干的话"}, {"messages": [{"role": "user", "content": rows[4]["question"]}]}]
    train.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in lines), encoding="utf-8")
    return path, train


def settings_for(chat_folder, tmp_path, *more: str) -> list[str]:
    return ["--preset", "tiny", "--models", str(chat_folder), "--output_dir", str(tmp_path / "out"), *more]


def test_own_file_and_contamination(own, chat_folder, tmp_path, capsys):
    path, train = own
    script.main(
        settings_for(
            chat_folder, tmp_path, "--benchmarks", str(path), "--check_contamination", str(train),
            "--methods", "text",
        )
    )  # fmt: skip
    shown = capsys.readouterr().out
    assert "查到 1 道" in shown and "0005  盖住 100%" in shown and "train.jsonl 第 2 行" in shown
    [result] = find_results([tmp_path / "out"])
    assert [each["scores"]["contaminated"] for each in result["items"]] == [0, 0, 0, 0, 1, 0]
    assert "瞎猜 0.333" in shown  # 三个选项


def test_a_task_file(own, chat_folder, tmp_path, capsys):
    assert own[0].exists()
    (tmp_path / "mine.yaml").write_text(
        "task: mine\ndataset_path: json\ndataset_kwargs: {data_files: {test: own.jsonl}}\ntest_split: test\n"
        "output_type: multiple_choice\ndoc_to_text: question\ndoc_to_choice: '{{[A, B, C]}}'\n"
        "doc_to_target: '{{\"ABC\".index(answer)}}'\nmetric_list: [{metric: acc}, {metric: f1}]\n",
        encoding="utf-8",
    )
    script.main(settings_for(chat_folder, tmp_path, "--benchmarks", str(tmp_path / "mine.yaml")))
    shown = capsys.readouterr().out
    assert "要的 f1 这里不量" in shown and "mine：6 道题，瞎猜 0.333" in shown


def test_bad_rows_stop_or_are_skipped(own, chat_folder, tmp_path, capsys):
    path, _ = own
    lines = path.read_text(encoding="utf-8").splitlines()
    broken = json.loads(lines[1]) | {"B": ""}
    path.write_text("\n".join([lines[0], json.dumps(broken, ensure_ascii=False), lines[2]]), encoding="utf-8")
    options = settings_for(chat_folder, tmp_path, "--benchmarks", str(path), "--methods", "text")
    with pytest.raises(
        UserError, match=r"有 1 道写坏了的题（跳过它们：--bad_rows skip）：\n.*第 2 行：选项 B 是空的"
    ):
        script.main(options)
    script.main([*options, "--bad_rows", "skip"])
    shown = capsys.readouterr().out
    assert "own.jsonl 第 2 行：选项 B 是空的" in shown and "own：2 道题" in shown


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--methods", "letters"], "--methods 不认识 letters，可以是 letter、text、generate"),
        (["--models", "sft,sft"], "写了不止一次"),
        (["--shots_file", "a.csv"], "要与 --shots 一起给"),
        (["--dataset", "a.csv"], "写在 --benchmarks 里"),
        (["--benchmarks", "none.csv"], "没有 none.csv"),
        (["--benchmarks", "none.yaml"], "没有任务文件 none.yaml"),
        (["--shots", "9", "--benchmarks", "knowledge_zh"], "要 9 道例题，knowledge_zh 里只有 5 道"),
    ],
)
def test_mistakes_on_the_command_line(options, message, chat_folder, tmp_path):
    with pytest.raises(UserError, match=message):
        script.main([*settings_for(chat_folder, tmp_path), *options])


# ---------------------------------------------------------------- 位置偏好：埋一个，量出来


def answer_with(monkeypatch, tokenizer, choose) -> list[dict]:
    """换一个假的模型：choose(选项的全文, 第几个字母) → 分数。"""

    def fake(model, tokenizer, asks: list[Ask], share=True):
        found = []
        for ask in asks:
            lines = ask.context.split("\n")
            options = [line.split(". ", 1)[1] for line in lines if line[1:3] == ". "]
            found.append([choose(option, place) for place, option in enumerate(options)])
        return found

    monkeypatch.setattr(script, "log_likelihoods", fake)
    monkeypatch.setattr(script, "too_long", lambda *given: 0)
    settings = script.ChoiceSettings(
        preset="tiny", models="x", benchmarks="knowledge_zh", methods="letter", limit=200
    )
    answerer = Answerer("x", "model:x", tokenizer, None)
    return script.evaluate(answerer, script.read_benchmark("knowledge_zh", settings), settings)


def test_a_model_that_always_says_a(monkeypatch, tokenizer):
    table = score_table(answer_with(monkeypatch, tokenizer, lambda option, place: -float(place > 0)), 0)
    assert table["picks_A"].value == 1 and table["picks_B"].value == 0
    assert table["letter_rotated_acc"].value == 0.25 and table["letter_same"].value == 0
    assert table["letter_acc"].low < 0.25 < table["letter_acc"].high


def test_a_model_that_knows_but_likes_c(monkeypatch, tokenizer):
    """会，但偏爱 C：转着问、概率平均之后，偏好抵消了，全对。"""
    right = {q.text: q.options[q.answer] for q in script.load_questions("knowledge_zh")[0]}
    answers = set(right.values())
    items = answer_with(
        monkeypatch, tokenizer, lambda option, place: 1.0 * (option in answers) + 1.5 * (place == 2)
    )
    alone = [
        each
        for each in items
        if sum(o.split(". ")[1] in answers for o in each["prompt"].split("\n")[1:]) == 1
    ]
    table = score_table(alone, 0)
    assert table["picks_C"].value == 1 and table["letter_rotated_acc"].value == 0.25
    assert table["letter_averaged_acc"].value == 1


# ---------------------------------------------------------------- 成对比较


def test_pairing_narrows_the_difference(capsys):
    """两个模型对错几乎一样：成对的标准误比不成对的小，差分得出。"""
    ours = [item(str(i), {"text_acc": float(i % 2 == 0 or i in (1, 3, 5, 7, 9, 11))}) for i in range(60)]
    theirs = [item(str(i), {"text_acc": float(i % 2 == 0)}) for i in range(60)]
    found = compare({"theirs": theirs, "ours": ours}, seed=0)
    assert found["ours_minus_theirs.text_acc"] == pytest.approx(0.1)
    assert found["ours_minus_theirs.text_acc_stderr_ratio"] < 0.6
    assert "分得出" in capsys.readouterr().out
    compare({"a": ours, "b": ours}, seed=0)
    assert "对错每道题都一样" in capsys.readouterr().out
