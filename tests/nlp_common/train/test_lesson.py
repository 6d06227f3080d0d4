"""一课的外壳：第二次运行直接用；设置不同说出来；中断以后做完的部分不重做，结果与不中断的一样。"""

import re
import shutil
from dataclasses import dataclass

import pytest
import torch

from nlp_common.base.arguments import option
from nlp_common.base.errors import UserError
from nlp_common.base.measurements import current_command
from nlp_common.hub.preset import announce, choose_preset
from nlp_common.train import chain
from nlp_common.train.lesson import once, run_lesson, run_part
from nlp_common.train.settings import LessonSettings, parse_settings

PRESETS = {"tiny": {"width": 3}, "full": {"width": 30}}


@dataclass
class Settings(LessonSettings):
    width: int | None = option("几列")


def settings_of(*argv):
    return parse_settings(Settings, PRESETS, ["--preset", "tiny", *argv])


def lesson(calls, stop_after=None):
    """两个部分，各有一个模型，权重由随机数定；stop_after 之后当作被打断。"""

    def learn(stage):
        models = {}
        for name in ("first", "second"):
            model = models[name] = torch.nn.Linear(stage.settings.width, 1)

            def work(part, name=name, model=model):
                calls.append(name)
                torch.nn.init.normal_(model.weight)
                return {"sum": model.weight.sum().item()}

            run_part(stage, name, work, model)
            if name == stop_after:
                raise KeyboardInterrupt
        sums = {name: model.weight.sum().item() for name, model in models.items()}
        last = torch.rand(1).item()  # 部分之后的随机数，也不因为读回而不同
        return stage.save(sums | {"last": last}, {}, lambda folder: (folder / "a.txt").write_text("图"))

    return learn


def test_second_run_uses_the_result_and_other_settings_are_named(tmp_path, capsys):
    calls = []
    first = run_lesson("demo", tmp_path, settings_of(), lesson(calls))
    assert calls == ["first", "second"] and first["settings"]["width"] == 3
    folder = tmp_path / "outputs" / "tiny" / "demo"
    assert (folder / "a.txt").exists() and not (folder / "parts").exists()
    capsys.readouterr()
    assert run_lesson("demo", tmp_path, settings_of(), lesson(calls)) == first
    assert calls == ["first", "second"] and "已有训练结果" in capsys.readouterr().out
    with pytest.raises(UserError, match="width：已有 3，这次 4"):
        run_lesson("demo", tmp_path, settings_of("--width", "4"), lesson(calls))
    run_lesson("demo", tmp_path, settings_of("--width", "4", "--retrain"), lesson(calls))
    assert len(calls) == 4


def test_finished_parts_survive_an_interruption_and_the_result_is_the_same(tmp_path):
    whole = run_lesson("demo", tmp_path / "a", settings_of(), lesson([]))
    with pytest.raises(KeyboardInterrupt):
        run_lesson("demo", tmp_path / "b", settings_of(), lesson([], stop_after="first"))
    assert not (tmp_path / "b" / "outputs" / "tiny" / "demo").exists()  # 没做完的不算
    calls = []
    resumed = run_lesson("demo", tmp_path / "b", settings_of(), lesson(calls))
    assert calls == ["second"]
    assert resumed["metrics"] == whole["metrics"]


def test_a_part_that_the_changed_code_cannot_read_is_said(tmp_path, monkeypatch):
    """中断以后代码改了（同样的设置，模型的形状不同）：说出删哪里，不是一串 traceback；删了就做得成。"""
    with pytest.raises(KeyboardInterrupt):
        run_lesson("demo", tmp_path, settings_of(), lesson([], stop_after="first"))
    linear = torch.nn.Linear
    monkeypatch.setattr(torch.nn, "Linear", lambda n, m: linear(n + 1, m))
    with pytest.raises(UserError, match="first 是上次中断以前做的") as error:
        run_lesson("demo", tmp_path, settings_of(), lesson([]))
    shutil.rmtree(re.search("删掉 (.*)，", str(error.value))[1])
    assert run_lesson("demo", tmp_path, settings_of(), lesson([]))["metrics"]


def test_lessons_without_a_real_model_do_not_promise_one():
    said = announce(choose_preset("tiny", None, full_model=None, needs_accelerator=True))
    assert "真实大模型" not in said and "--preset full" in said


def test_another_topics_model_is_found_or_trained_on_the_spot(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(chain, "__file__", str(tmp_path / "nlp_common" / "train" / "chain.py"))
    home, answers = tmp_path / "qwen_chinese_finetune", [None, {"path": "there"}]
    monkeypatch.setattr(chain, "find_trained", lambda given, folder, source="hf": answers.pop(0))
    commands = []

    class Done:
        returncode = 0

    monkeypatch.setattr(chain.subprocess, "run", lambda command, env: commands.append(command) or Done())
    assert chain.chain_model("sft") == {"path": "there"}
    assert commands[0][1:] == [str(home / "sft_chinese_qwen.py"), "--preset", "tiny"]
    assert "还没有训练" in capsys.readouterr().out
    Done.returncode, answers[:] = 2, [None]
    with pytest.raises(UserError, match="没有训练成"):
        chain.chain_model("sft")


@dataclass
class StoreSettings(LessonSettings):
    store: str | None = option("知识库的网址")


def test_a_password_is_neither_kept_nor_shown(tmp_path, monkeypatch):
    """网址里的密码不进 run.json，也不在"设置不同"的话里；换一个密码，还是同样的结果。"""
    monkeypatch.setattr("sys.argv", ["lesson.py", "--store", "pgvector://u:secret@h/x"])

    def run(url):
        argv = ["--preset", "tiny", "--store", url, "--output_dir", str(tmp_path / "out")]
        settings = parse_settings(StoreSettings, {"tiny": {}, "full": {}}, argv)
        return run_lesson("x", tmp_path, settings, lambda stage: stage.save({"n": 1}, {}))

    first = run("pgvector://u:secret@h/x")
    assert run("pgvector://u:other@h/x") == first
    with pytest.raises(UserError, match=r"u:\*\*\*@h/y") as refused:
        run("pgvector://u:secret@h/y")
    assert "secret" not in str(refused.value)
    assert "secret" not in (tmp_path / "out" / "run.json").read_text(encoding="utf-8")
    assert "secret" not in current_command()


def test_once_is_done_once(tmp_path):
    """中断以前做完的，读回那时的：元组读回来是列表。"""
    asked = []

    def work(a, b):
        asked.append(a)
        return a, b

    def learn(stage):
        found = [once(stage, name, work, name, 0.1) for name in ("first", "second")]
        if len(asked) == 2:
            raise KeyboardInterrupt
        stage.save({"found": found}, {})

    with pytest.raises(KeyboardInterrupt):
        run_lesson("x", tmp_path, settings_of(), learn)
    asked.append("再来")
    record = run_lesson("x", tmp_path, settings_of(), learn)
    assert record["metrics"]["found"] == [["first", 0.1], ["second", 0.1]] and len(asked) == 3
