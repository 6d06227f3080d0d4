"""试用脚本 test_gen.py、test_sft.py、test_dpo.py、test_ppo.py：问什么、打印什么、写错了说什么。

模型没有训练过，答的是胡话；这里查的是脚本，不是模型。
"""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from chat_app import asking, trying
from nlp_common.base.errors import UserError
from nlp_common.base.runs import RunFolder
from nlp_common.tiny import world
from nlp_common.tiny.judge import Verdict

QWEN = Path(__file__).resolve().parents[2] / "qwen_chinese_finetune"
ASKING = ["test_sft", "test_dpo", "test_ppo"]


def finished(folder: Path, source: Path, **record) -> Path:
    """把模型 source 做成一个训练好的阶段文件夹。"""
    RunFolder(folder).finish(lambda path: shutil.copytree(source, path, dirs_exist_ok=True), record)
    return folder


def stages(root: Path, source: Path, preset: str, names=("pretrain", "sft", "dpo", "ppo")) -> Path:
    for name in names:
        metrics = {"n": 500, "qa_accuracy": 0.9876}
        finished(root / name, source, stage=name, settings={"preset": preset}, metrics=metrics)
    return root


@pytest.fixture(scope="session")
def tiny(chat_folder, tmp_path_factory) -> list[str]:
    """指向一组 tiny 结果的命令行参数。"""
    root = stages(tmp_path_factory.mktemp("tiny-outputs"), chat_folder, "tiny")
    return ["--output_root", str(root), "--max_new_tokens", "6"]


@pytest.fixture(scope="session")
def full(chat_folder, tmp_path_factory) -> list[str]:
    """指向一组 full 结果的命令行参数；模型其实也是小的。"""
    root = stages(tmp_path_factory.mktemp("full-outputs"), chat_folder, "full")
    return ["--output_root", str(root), "--max_new_tokens", "6"]


# ---------------------------------------------------------------- 打印的内容


@pytest.mark.parametrize("script", ASKING)
def test_tiny_asks_held_out_questions_and_judges(load_script, tiny, capsys, script):
    scores = load_script(script).main(tiny)
    out = capsys.readouterr().out
    assert out.startswith("预设 tiny（小世界的小模型）：你给了 --output_root")
    questions = world.heldout_questions(6, 0)
    for question in questions:
        story, _, ask = question["messages"][0]["content"].partition("\n")
        assert story in out and ask in out and f"标准答案：{question['answer']}\n" in out
    assert "【7】你好\n" in out and "训练时教的：我是小故事助手。" in out
    assert [len(each) for each in scores] == ([6, 6] if script == "test_dpo" else [6])
    assert out.count("分）\n") == sum(map(len, scores)) and "6 道有标准答案的题，平均" in out
    assert "贪心答对 98.8%" in out  # run.json 里的成绩


@pytest.mark.parametrize("script", ASKING)
def test_full_asks_common_questions_without_scores(load_script, full, capsys, script):
    load_script(script).main(full)
    out = capsys.readouterr().out
    assert out.startswith("预设 full（真实模型）") and "【1】你好，请介绍一下你自己。" in out
    assert "标准答案" not in out and "分）" not in out


def test_gen_continues_openings(load_script, tiny, full, capsys):
    gen = load_script("test_gen")
    texts = gen.main(tiny)
    out = capsys.readouterr().out
    recaps = world.recap_prompts(3, 0)
    assert all(f"开头：{r['prompt']}\n     该接：{r['answer']}\n" in out for r in recaps)
    assert len(texts) == 5 and out.count("接错了") + out.count("接对了") == 3
    assert len(gen.main(full)) == len(gen.FULL_OPENINGS)
    assert gen.main([*tiny, "--questions", "那天", "小红"]) == gen.main(
        [*tiny, "--questions", "那天", "小红"]
    )


def test_compare_puts_both_models_under_each_question(load_script, tiny, capsys):
    load_script("test_dpo").main([*tiny, "--questions", "你好", "你是谁？"])
    lines = capsys.readouterr().out.splitlines()
    start = lines.index("【1】你好")
    assert lines[start + 1].startswith("  SFT：") and lines[start + 2].startswith("  DPO：")
    assert lines[start + 4] == "【2】你是谁？"


def test_dpo_mode_asks_one_model(load_script, tiny, capsys):
    assert len(load_script("test_dpo").main([*tiny, "--mode", "dpo"])) == 1
    assert "SFT：" not in capsys.readouterr().out


def test_interactive_mode_answers_until_quit(load_script, tiny, capsys, monkeypatch):
    lines = iter(["你好", "", "那天，小红去了花园。小红很高兴。谁去了花园?", "quit", "不会问到"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    asked = []
    script = load_script("test_dpo")
    answer = script.answer
    monkeypatch.setattr(
        script, "answer", lambda s, ids, c: asked.append(s.tokenizer.decode(ids)) or answer(s, ids, c)
    )
    script.main([*tiny, "--mode", "interactive"])
    assert [text.count("user") for text in asked] == [1, 1]  # 不记得上一问
    assert "高兴。\n谁去了花园？<|im_end|>" in asked[1]
    assert capsys.readouterr().out.count("  DPO：") == 2


@pytest.mark.parametrize("script", ["test_gen", *ASKING])
def test_same_seed_same_output(load_script, tiny, capsys, script):
    outputs = []
    for seed in (1, 1, 2):
        arguments = ["--questions", "你好", "--temperature", "1.5", "--seed", str(seed)]
        load_script(script).main([*tiny, *arguments])
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] != outputs[2]


def test_questions_too_long_are_skipped_and_said(load_script, tiny, capsys):
    load_script("test_sft").main([*tiny, "--questions", "长" * 400, "你好"])
    out = capsys.readouterr().out
    assert out.count("没有问") == 1 and "最多读 506 个" in out and "【2】你好" in out


# ---------------------------------------------------------------- 题目


def test_file_of_questions(load_script, tiny, tmp_path, capsys):
    file = tmp_path / "题.txt"
    file.write_bytes("\ufeff第一问\r\n\r\n  第二问  \n".encode())
    load_script("test_sft").main([*tiny, "--questions", "命令行的", "--file", str(file)])
    out = capsys.readouterr().out
    assert (
        "【1】命令行的\n" in out and "【2】第一问\n" in out and "【3】第二问\n" in out and "【4】" not in out
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "读不了 --file .*请检查路径"),
        (b"", "一行问题也没有"),
        (b"\n \n", "一行问题也没有"),
        ("你好".encode("gbk"), "不是 UTF-8"),
    ],
)
def test_bad_files(load_script, tiny, tmp_path, content, message):
    file = tmp_path / "题.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_script("test_sft").main([*tiny, "--file", str(file)])


def test_file_is_a_folder(load_script, tiny, tmp_path):
    with pytest.raises(UserError, match="读不了 --file"):
        load_script("test_sft").main([*tiny, "--file", str(tmp_path)])


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("小红去了花园。小红很高兴。谁去了花园？", "小红去了花园。小红很高兴。\n谁去了花园？"),
        ("小红去了花园。 谁去了花园? ", "小红去了花园。\n谁去了花园？"),
        ("小红去了花园。\n谁去了花园？", "小红去了花园。\n谁去了花园？"),
        ("小红去了花园。小红很高兴。", "小红去了花园。小红很高兴。"),
        ("你是谁？", "你是谁？"),
        ("你好", "你好"),
        ("", ""),
    ],
)
def test_story_then_question(line, expected):
    assert asking.story_then_question(line) == expected
    assert asking.story_then_question(expected) == expected


def test_one_line_questions_get_the_training_format_back():
    for question in world.heldout_questions(50, 1):
        text = question["messages"][0]["content"]
        assert asking.story_then_question(text.replace("\n", "")) == text


def test_verdicts_in_words(monkeypatch):
    question = {"answer": "香蕉"}

    def words(right, complete, courteous, score, end="<|im_end|>"):
        monkeypatch.setattr(asking, "judge", lambda *_, **__: Verdict(right, complete, courteous, score))
        return asking.verdict_text(question, asking.Reply("…", end))[0]

    assert words(True, True, True, 1.0) == "（对、完整、有礼：1.0 分）"
    assert words(True, False, False, 0.6) == "（对：0.6 分）"
    assert words(False, False, True, 0.1) == "（错、有礼：0.1 分）"
    assert words(False, False, False, 0.0) == "（没答上来：0.0 分）"
    assert words(False, False, False, 0.0, end=None) == "（没有自己说完：0.0 分）"


# ---------------------------------------------------------------- 用哪个模型


def test_auto_prefers_full_and_says_so(load_script, chat_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(trying, "HOME", tmp_path)
    arguments = ["--questions", "你好", "--max_new_tokens", "2"]
    stages(tmp_path / "outputs" / "tiny", chat_folder, "tiny", ["sft"])
    load_script("test_sft").main(arguments)
    assert capsys.readouterr().out.startswith(
        "预设 tiny（小世界的小模型）：outputs/tiny 里有训练好的模型，outputs/full 里还没有。要换另一组，加 --preset full。\n"
        "SFT：outputs/tiny/sft"
    )
    stages(tmp_path / "outputs" / "full", chat_folder, "full", ["sft"])
    load_script("test_sft").main(arguments)
    assert capsys.readouterr().out.startswith(
        "预设 full（真实模型）：outputs/full 里有训练好的模型。要换另一组，加 --preset tiny。\nSFT：outputs/full/sft"
    )
    load_script("test_sft").main([*arguments, "--preset", "tiny"])
    assert capsys.readouterr().out.startswith("预设 tiny（小世界的小模型）：你给了 --preset tiny。")


@pytest.mark.parametrize(
    ("script", "preset", "commands"),
    [
        (
            "test_gen",
            "tiny",
            ["python run_all.py --preset tiny", "python pretrain_chinese-nvidia.py --preset tiny"],
        ),
        ("test_sft", "auto", ["python run_all.py --preset tiny", "python sft_chinese_qwen.py --preset full"]),
        ("test_dpo", "full", ["python dpo_chinese_qwen.py --preset full"]),
        ("test_ppo", "tiny", ["python ppo_alignment.py --preset tiny"]),
    ],
)
def test_missing_stage_names_the_command(load_script, tmp_path, monkeypatch, script, preset, commands):
    monkeypatch.setattr(trying, "HOME", tmp_path)
    with pytest.raises(UserError, match="还没有训练好的模型") as error:
        load_script(script).main(["--preset", preset])
    assert all(command in str(error.value) for command in commands)
    assert ("tiny" in str(error.value)) == (preset != "full")


def test_compare_needs_the_sft_model_too(load_script, chat_folder, tmp_path):
    stages(tmp_path, chat_folder, "tiny", ["dpo"])
    with pytest.raises(UserError, match=r"sft 不存在.*\n.*\n.*sft_chinese_qwen.py"):
        load_script("test_dpo").main(["--output_root", str(tmp_path)])


def test_a_given_model_is_called_by_its_own_name(load_script, tiny, chat_folder, capsys):
    load_script("test_sft").main([*tiny[2:], "--model", str(chat_folder), "--questions", "你好"])
    out = capsys.readouterr().out
    assert out.startswith(f"预设 full（真实模型）：你给了 --model {chat_folder}。\nchat：{chat_folder}\n")
    load_script("test_sft").main([*tiny[2:], "--model", f"{tiny[1]}/ppo"])  # run.json 说是小世界的
    assert "标准答案" in capsys.readouterr().out


def test_compare_with_the_model_dpo_started_from(load_script, chat_folder, tmp_path, capsys):
    script, sft = load_script("test_dpo"), finished(tmp_path / "sft", chat_folder, stage="sft")
    start = {"path": str(sft), "stage": "sft", "id": trying.run_record(str(sft))["id"]}
    dpo = finished(tmp_path / "dpo", chat_folder, stage="dpo", parent={"model": start})
    short = ["--questions", "你好", "--max_new_tokens", "2"]
    script.main(["--model", str(dpo), *short])
    out = capsys.readouterr().out
    assert f"SFT：{sft}\n" in out and "注意" not in out

    finished(tmp_path / "dpo", chat_folder, stage="dpo", parent={"model": start | {"id": "别的"}})
    script.main(["--output_root", str(tmp_path), *short])
    assert "注意：DPO 不是从" in capsys.readouterr().out
    with pytest.raises(UserError, match="--sft_model"):
        script.main(["--model", str(chat_folder), *short])
    assert script.main(["--model", str(chat_folder), "--sft_model", str(chat_folder), *short]) == [[], []]


def test_models_that_cannot_talk_are_refused(load_script, chat_folder, reward_folder, tmp_path):
    with pytest.raises(UserError, match="只会打分，不会说话"):
        load_script("test_sft").main(["--model", str(reward_folder)])
    half = shutil.copytree(chat_folder, tmp_path / "half")
    weights = half / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:10_000])
    with pytest.raises(UserError, match="不完整"):
        load_script("test_sft").main(["--model", str(half)])
    with pytest.raises(UserError, match="没有这个文件夹"):
        load_script("test_sft").main(["--model", "./nothing"])


# ---------------------------------------------------------------- 命令行


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("test_dpo", ["--mode", "all"], "--mode 不认识 all，可以是 'compare', 'dpo', 'interactive'"),
        ("test_sft", ["--preset", "big"], "--preset 不认识 big"),
        ("test_sft", ["--questoins", "你好"], "不认识 --questoins 你好，是不是 --questions？"),
        ("test_sft", ["你好"], "不认识 你好"),
        ("test_sft", ["--temp", "1"], "不认识 --temp"),  # 不许缩写
        ("test_sft", ["--questions"], "--questions 后面要写上值"),
        ("test_sft", ["--questions", " "], "空的问题"),
        ("test_ppo", ["--max_new_tokens", "0"], "--max_new_tokens 要是正整数，给的是 0"),
        ("test_ppo", ["--max_new_tokens", "x"], "--max_new_tokens 要是整数，给的是 'x'"),
        ("test_gen", ["--temperature", "-1"], "--temperature 不能是负数"),
        ("test_gen", ["--temperature", "热"], "--temperature 要是数"),
        ("test_gen", ["--top_p", "1.5"], "--top_p 要大于 0、不超过 1"),
        ("test_dpo", ["--mode", "interactive", "--questions", "你好"], "去掉它们"),
    ],
)
def test_mistakes_are_explained_in_chinese(load_script, tiny, script, arguments, message):
    with pytest.raises(UserError) as error:
        load_script(script).main([*tiny[:2], *arguments])
    assert message in str(error.value)


@pytest.mark.parametrize("script", ["test_gen", *ASKING, "chat"])
def test_help_shows_the_scripts_own_docstring(load_script, capsys, script):
    with pytest.raises(SystemExit) as stop:
        load_script(script).main(["--help"])
    assert stop.value.code == 0
    assert load_script(script).__doc__.split("\n")[0] in capsys.readouterr().out.replace("\n", "")


def test_as_a_reader_runs_it(tiny, tmp_path):
    def run(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, str(QWEN / "test_sft.py"), *arguments],
            capture_output=True,
            text=True,
            encoding="utf-8",
            cwd=tmp_path,
        )

    done = run(*tiny, "--questions", "你好")
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.startswith("预设 tiny") and "【1】你好\n  SFT：" in done.stdout
    done = run("--output_root", "没有")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("错误：还没有训练好的模型") and "Traceback" not in done.stderr
