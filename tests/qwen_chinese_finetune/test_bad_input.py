"""读者会犯的错：每一种都要说清哪里错、怎么改，而且没有 traceback。"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nlp_common.tiny import qwen, world

HOME = Path(__file__).resolve().parents[2] / "qwen_chinese_finetune"
STAGES = [
    "pretrain_chinese-nvidia.py",
    "pretrain_chinese-mac.py",
    "sft_chinese_qwen.py",
    "reward_model.py",
    "dpo_chinese_qwen.py",
    "ppo_alignment.py",
]
OTHERS = [
    "run_all.py",
    "compare_alignment.py",
    "grpo_alignment.py",
    "r1_zero.py",
    "chat.py",
    "test_gen.py",
    "test_sft.py",
    "test_dpo.py",
    "test_ppo.py",
]


def run_script(script: str, *arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(HOME / script), *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "100"},
    )


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("models") / "base"
    qwen.save_tiny_base(folder, seed=0)
    return str(folder)


@pytest.fixture
def main_of(load_script):
    """脚本的 main，在本进程里运行，省去每次导入。"""
    return lambda script: load_script(Path(script).stem).main


@pytest.mark.parametrize("script", [*STAGES, *OTHERS])
def test_help(script, main_of, capsys):
    with pytest.raises(SystemExit) as done:
        main_of(script)(["--help"])
    shown = capsys.readouterr().out
    assert done.value.code == 0
    assert "--preset" in shown
    assert re.search("[一-鿿]{4}", shown), "帮助要有中文说明"


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    return str(path)


def small(base: str, out: Path, dataset: str, *more: str) -> list[str]:
    settings = ["--preset", "tiny", "--model", base, "--dataset", dataset, "--output_dir", str(out)]
    return [*settings, "--max_steps", "1", "--max_eval_samples", "4", *more]


def test_bad_data_files_are_named_with_line_and_field(base, tmp_path, main_of):
    from nlp_common.base.errors import UserError

    sft, dpo = main_of("sft_chinese_qwen.py"), main_of("dpo_chinese_qwen.py")
    good = world.chats(3, seed=0)

    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    broken = tmp_path / "broken.jsonl"
    broken.write_text(json.dumps(good[0]) + '\n{"messages": [\n', encoding="utf-8")
    strange = write(tmp_path / "strange.jsonl", [{"foo": 1, "bar": 2}])
    missing_field = write(tmp_path / "missing.jsonl", [good[0], {"other": 1}])
    blank = write(tmp_path / "blank.jsonl", [{"prompt": "你好", "chosen": "  ", "rejected": "嗯"}])
    cases = [
        (sft, str(tmp_path / "nowhere.jsonl"), "没有.*nowhere.jsonl"),
        (sft, str(empty), "empty.jsonl"),
        (sft, str(broken), "broken.jsonl.*第 2 行"),
        (sft, strange, "(?s)foo.*messages"),
        (sft, missing_field, "第 2 条.*messages"),
        (dpo, blank, "blank.jsonl"),
    ]
    for main, dataset, pattern in cases:
        with pytest.raises(UserError, match=pattern):
            main(small(base, tmp_path / "out", dataset))
    assert not (tmp_path / "out").exists()


def test_long_rows_are_counted_and_never_cut(base, tmp_path, main_of, capsys):
    from nlp_common.base.errors import UserError

    long = [{"messages": [{"role": "user", "content": "长" * 400}, {"role": "assistant", "content": "好"}]}]
    data = write(tmp_path / "long.jsonl", [*world.chats(40, seed=0), *long, *long])
    main_of("sft_chinese_qwen.py")(small(base, tmp_path / "sft", data, "--eval_dataset", data))
    assert "训练数据：2 行超过 --max_length 256" in capsys.readouterr().out
    with pytest.raises(UserError, match="--max_length"):
        main_of("sft_chinese_qwen.py")(small(base, tmp_path / "sft2", data, "--max_length", "5"))


def test_bad_model_folders(base, tmp_path, main_of):
    from nlp_common.base.errors import UserError

    sft = main_of("sft_chinese_qwen.py")
    with pytest.raises(UserError, match="nowhere"):
        sft(["--preset", "tiny", "--model", str(tmp_path / "nowhere"), "--output_dir", str(tmp_path / "o")])
    half = tmp_path / "half"
    shutil.copytree(base, half)
    (half / "model.safetensors").unlink()
    with pytest.raises(UserError, match="safetensors"):
        sft(["--preset", "tiny", "--model", str(half), "--output_dir", str(tmp_path / "o")])
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    with pytest.raises(UserError, match=r"run\.json[\s\S]*--output_dir"):
        sft(["--preset", "tiny", "--model", base, "--output_dir", str(unfinished)])


def test_damaged_earlier_stage(base, tmp_path, main_of):
    from nlp_common.base.errors import UserError
    from nlp_common.base.runs import RunFolder

    RunFolder(tmp_path / "pretrain").finish(
        lambda folder: shutil.copytree(base, folder, dirs_exist_ok=True), {"stage": "pretrain"}
    )
    weights, tokenizer = (tmp_path / "pretrain" / name for name in ("model.safetensors", "tokenizer.json"))
    whole, sft = weights.read_bytes(), main_of("sft_chinese_qwen.py")
    run = ["--preset", "tiny", "--output_dir", str(tmp_path / "sft")]
    weights.write_bytes(whole[:-100])
    with pytest.raises(UserError, match=r"pretrain 不完整：model\.safetensors"):
        sft(run)
    weights.write_bytes(whole)
    tokenizer.write_text(tokenizer.read_text(encoding="utf-8")[:-100], encoding="utf-8")
    with pytest.raises(UserError, match=r"(?s)载入 .*pretrain 失败：.*--model"):
        sft(run)
    assert not (tmp_path / "sft").exists()


def test_missing_earlier_stage_full_names_the_command(tmp_path, main_of):
    from nlp_common.base.errors import UserError

    with pytest.raises(UserError, match=r"sft_chinese_qwen\.py --preset full"):
        main_of("dpo_chinese_qwen.py")(["--preset", "full", "--output_dir", str(tmp_path / "dpo")])


def test_missing_earlier_stage_tiny_builds_it(tmp_path):
    """没有 base 也没有 pretrain：mac 那份配置自己造出 base，并说明这台机器用的是什么硬件。"""
    done = run_script(
        "pretrain_chinese-mac.py",
        *("--preset", "tiny", "--output_dir", str(tmp_path / "pretrain")),
        *("--max_steps", "1", "--max_train_samples", "20", "--max_eval_samples", "4"),
    )
    assert done.returncode == 0, done.stderr
    assert "这份配置是给 MPS 的" in done.stdout
    assert (tmp_path / "base" / "run.json").exists() and (tmp_path / "pretrain" / "run.json").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["--preset", "huge"],
        ["--learning_rate", "abc"],
        ["--nonsense", "1"],
        ["--retrain", "maybe"],
        ["--learning_rate"],
        ["--help=1"],
        ["--preset", "tiny", "--max_length", "0"],
    ],
)
def test_bad_arguments(arguments, main_of):
    from nlp_common.base.errors import UserError

    with pytest.raises(UserError, match="--") as error:
        main_of("sft_chinese_qwen.py")(arguments)
    assert "argument" not in str(error.value), "argparse 的英文报错要译成中文"


@pytest.mark.parametrize(
    "arguments",
    [
        ["--gradient_accumulation_steps", "2"],
        ["--gradient_checkpointing", "True"],
        ["--num_train_epochs", "2"],
        ["--lr_scheduler_type", "cosine"],
    ],
)
def test_ppo_refuses_what_it_does_not_use(arguments, main_of, tmp_path):
    from nlp_common.base.errors import UserError

    with pytest.raises(UserError, match=f"PPO 用不着 {arguments[0]}，改用 --"):
        main_of("ppo_alignment.py")(["--preset", "tiny", "--output_dir", str(tmp_path / "ppo"), *arguments])


def test_reader_sees_a_message_not_a_traceback(tmp_path):
    done = run_script("sft_chinese_qwen.py", "--preset", "tiny", "--dataset", "./nothing.jsonl", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("错误：") and "Traceback" not in done.stderr


def test_two_runs_in_one_folder(base, tmp_path, main_of):
    from filelock import FileLock

    from nlp_common.base.errors import UserError
    from nlp_common.base.runs import write_json

    with FileLock(tmp_path / ".sft.lock"):
        write_json(
            tmp_path / ".sft.owner.json",
            {"pid": 4321, "host": "h", "started": "now", "command": "python x.py"},
        )
        with pytest.raises(UserError, match="进程 4321"):
            main_of("sft_chinese_qwen.py")(
                ["--preset", "tiny", "--model", base, "--output_dir", str(tmp_path / "sft")]
            )


def test_show_batch_prints_what_is_learned(base, tmp_path, main_of, capsys):
    """只看数据：早已训练过的也给看，那份结果不动。"""
    done = tmp_path / "s" / "run.json"
    done.parent.mkdir()
    done.write_text('{"stage": "sft", "fingerprint": {}, "metrics": {}}', encoding="utf-8")
    before = done.read_bytes()
    main_of("sft_chinese_qwen.py")(
        ["--preset", "tiny", "--model", base, "--output_dir", str(tmp_path / "s"), "--show_batch"]
    )
    shown = capsys.readouterr().out
    assert "<|im_end|>" in shown and "算损失" in shown
    assert list(done.parent.iterdir()) == [done] and done.read_bytes() == before


# ---- 读者真有的文件与文件夹（issue 19） ----


def test_a_terminal_that_cannot_write_emoji_loses_nothing(base, tmp_path):
    rows = [
        {"messages": [{"role": "user", "content": f"第{n}问🤗"}, {"role": "assistant", "content": "好的👌①"}]}
        for n in range(6)
    ]
    data = write(tmp_path / "emoji.jsonl", rows)
    done = subprocess.run(
        [sys.executable, str(HOME / "sft_chinese_qwen.py"), *small(base, tmp_path / "sft", data)],
        capture_output=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "gbk"},
    )
    assert done.returncode == 0, done.stderr.decode("gbk", errors="replace")
    record = json.loads((tmp_path / "sft" / "run.json").read_text(encoding="utf-8"))
    assert record["samples"][0]["reference"] == "好的👌①"  # 文件里是完整的字


def test_show_batch_shows_whole_characters_and_what_weight_zero_leaves_out(base, tmp_path, main_of, capsys):
    turns = [("user", "问🤗"), ("assistant", "坏答👎"), ("user", "再问"), ("assistant", "好答👌")]
    messages = [{"role": role, "content": content} for role, content in turns]
    messages[1]["weight"] = 0
    data = write(tmp_path / "weights.jsonl", [{"messages": messages, "id": n, "n": str(n)} for n in range(3)])
    main_of("sft_chinese_qwen.py")(small(base, tmp_path / "s", data, "--show_batch", "--eval_dataset", data))
    shown = capsys.readouterr().out
    assert "🤗" in shown and "👎" in shown and "👌" in shown and "\N{REPLACEMENT CHARACTER}" not in shown
    assert "没有用到的栏：id、n" in shown
    # 好答👌：两个汉字、emoji 的四个字节，加上 <|im_end|>
    assert re.search(r"其中 ([3-7]) 个（绿色）算损失", shown)


def test_an_output_folder_of_other_things_is_never_replaced(base, tmp_path, main_of, monkeypatch):
    from nlp_common.base.errors import UserError

    (tmp_path / "mine.txt").write_text("我的", encoding="utf-8")
    (tmp_path / "mine2.txt").write_text("我的", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    for more in ([], ["--retrain"]):
        with pytest.raises(
            UserError, match=r"里是别的东西（mine\.txt、mine2\.txt；没有 run\.json）.*--output_dir"
        ):
            main_of("sft_chinese_qwen.py")(["--preset", "tiny", "--model", base, "--output_dir", ".", *more])
    assert (tmp_path / "mine.txt").read_text(encoding="utf-8") == "我的"


def test_ppo_refuses_a_reward_model_without_a_head(base, tmp_path, main_of):
    from nlp_common.base.errors import UserError

    run = ["--preset", "tiny", "--model", base, "--reward_model", base, "--output_dir", str(tmp_path / "ppo")]
    with pytest.raises(UserError, match=r"--reward_model 给的 .* 是 Qwen2ForCausalLM，没有训练好的打分头"):
        main_of("ppo_alignment.py")(run)


def test_ppo_refuses_a_classifiers_file(base, tmp_path):
    from nlp_common.base.errors import UserError
    from nlp_common.data.chats import to_questions

    with pytest.raises(UserError, match=r"格式不认识[\s\S]*sentence, label[\s\S]*prompt"):
        to_questions([{"sentence": "题", "label": 3}], "分类.jsonl")


@pytest.mark.parametrize(
    "config, expected",
    [
        ({"model_type": "qwen9"}, "不认识"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "量化过的模型"),
    ],
)
def test_dry_run_says_the_same_about_the_model(base, tmp_path, main_of, config, expected):
    from nlp_common.base.errors import UserError

    folder = tmp_path / "odd"
    shutil.copytree(base, folder)
    found = json.loads((folder / "config.json").read_text(encoding="utf-8")) | config
    (folder / "config.json").write_text(json.dumps(found), encoding="utf-8")
    with pytest.raises(UserError, match=expected):
        main_of("sft_chinese_qwen.py")(["--preset", "tiny", "--model", str(folder), "--dry_run"])


def test_piped_questions_lose_their_bom_and_carriage_returns(monkeypatch, capsys):
    import io

    from chat_app.trying import read_line

    monkeypatch.setattr("sys.stdin", io.StringIO("\ufeff你好\r\n\ufeff你是谁？\r\n"))
    assert [read_line("你："), read_line("你："), read_line("你：")] == ["你好", "你是谁？", None]
    assert "\ufeff" not in capsys.readouterr().out


CASES = Path(__file__).resolve().parents[3] / "shared" / "cases"


@pytest.mark.skipif(not CASES.is_dir(), reason="没有 ../shared/cases")
@pytest.mark.parametrize(
    "kind, name, count",
    [
        ("chats", "system_col_messages", 12),
        ("chats", "history_prompt", 12),
        ("chats", "weight0", 12),
        ("chats", "kto", 6),
        ("chats", "parts", 13),
        ("chats", "messages_str", 12),
        ("pairs", "pairs_llamafactory", 12),
        ("pairs", "pairs_hh", 12),
        ("pairs", "pairs_history", 12),
        ("questions", "ppo_prompt_only", 12),
    ],
)
def test_files_of_the_case_list(kind, name, count):
    from nlp_common.data import chats
    from nlp_common.data.rows import read_rows

    convert = getattr(chats, f"to_{kind}")
    assert len(convert(read_rows(str(CASES / f"{name}.jsonl")).rows, name)) == count
