"""load_test.py：每个请求都有下场，串的、丢的数得出；太忙是 429，断了不算答完；打谁、几个引擎写错了说清。"""

import dataclasses
import http.client
import json
import threading

import pytest
from parrot import Parrot, serving, until

import load_test as script
from load_clients import Call, Target, ask_all, hang_up_call, summary
from nlp_common.base.errors import UserError
from nlp_common.lm.chatml import IM_END, prompt_ids
from nlp_common.lm.loading import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(base_folder):
    return load_tokenizer(str(base_folder))


def question(n):
    return {"messages": [{"role": "user", "content": f"第{n}问" + "好" * (n % 5)}], "answer": str(n)}


def echoing(tokenizer, questions, **changes):
    """每一题答它自己的号码。"""
    end = tokenizer.convert_tokens_to_ids(IM_END)
    replies = {
        tuple(prompt_ids(tokenizer, each["messages"])): [
            *tokenizer(f"答{each['answer']}。")["input_ids"],
            *[end] * 9,
        ]
        for each in questions
    }
    return Parrot(lambda prompt: replies[tuple(prompt)], len(tokenizer), **changes)


def target_of(server):
    return Target(f"{server.url}/v1", "tiny")


def test_none_is_lost_or_mixed_up(tokenizer):
    questions = [question(n) for n in range(40)]
    expected = {id(each): f"答{each['answer']}。" for each in questions}
    with serving(echoing(tokenizer, questions, wait=0.001), tokenizer, waiting=40) as (server, _):
        calls = ask_all(target_of(server), questions, 16, temperature=0)
    row = summary(calls, expected)
    assert (row["sent"], row["ok"], row["lost"], row["mixed"], row["same"]) == (40, 40, 0, 0, 1.0)
    assert row["right"] == 1.0 and row["repeated_ids"] == 0 and row["tokens_per_s"] > 0
    assert all(0 < call.sent <= call.first <= call.end for call in calls)


def test_a_client_keeps_its_connection(tokenizer, monkeypatch):
    """一题接一题用同一个连接；拒绝了的（没有这个模型），读完了也接着用；挂断了的下一题重新连。"""
    opened = []
    connect = http.client.HTTPConnection.connect
    monkeypatch.setattr(
        http.client.HTTPConnection, "connect", lambda self: (opened.append(1), connect(self))[1]
    )
    questions = [question(n) for n in range(6)]
    with serving(echoing(tokenizer, questions, wait=0.001), tokenizer) as (server, _):
        target = target_of(server)
        assert all(call.finished for call in ask_all(target, questions, 2, temperature=0))
        assert len(opened) == 2
        refused = ask_all(dataclasses.replace(target, model="别的"), questions, 1)
        assert [call.status for call in refused] == [404] * 6 and "没有 别的" in refused[5].why
        assert len(opened) == 3
        gone = ask_all(target, questions, 1, hang_up_call, temperature=0)
        assert all(call.text and not call.finished for call in gone) and len(opened) == 9


def test_too_many_are_told(tokenizer):
    questions = [question(n) for n in range(24)]
    model = echoing(tokenizer, questions, slots=1, wait=0.01)
    with serving(model, tokenizer, waiting=2) as (server, _):
        calls = ask_all(target_of(server), questions, 24, temperature=0)
    row = summary(calls, {id(each): f"答{each['answer']}。" for each in questions})
    assert row["busy"] > 0 and row["ok"] + row["busy"] == 24 and row["lost"] == row["mixed"] == 0
    assert "rate_limit" in next(call.why for call in calls if call.status == 429)


def test_hanging_up(tokenizer):
    questions = [question(n) for n in range(6)]
    with serving(echoing(tokenizer, questions, wait=0.05), tokenizer) as (server, service):
        calls = ask_all(target_of(server), questions, 6, hang_up_call, temperature=0)
        assert all(call.text and not call.finished for call in calls)
        assert until(lambda: not service.batcher.seated)
        again = ask_all(target_of(server), questions, 6, temperature=0)
    assert summary(calls, {id(q): "" for q in questions})["lost"] == 6  # 没有说完的不算答完
    assert [call.finished for call in again] == ["stop"] * 6


def test_summary_by_hand():
    questions = [question(n) for n in range(4)]
    expected = {id(each): f"答{each['answer']}" for each in questions}

    def call(n, text, **more):
        made = Call(
            questions[n], sent=1.0, first=1.1, end=1.5, status=200, text=text, finished="stop", tokens=3
        )
        made.number = f"id{n}"
        for name, value in more.items():
            setattr(made, name, value)
        return made

    calls = [call(0, "答0"), call(1, "答2"), call(2, "别的"), call(3, "", status=0, finished=""),
             call(3, "", status=429, finished=""), call(3, "答", finished="")]  # fmt: skip
    row = summary(calls, expected)
    assert (row["ok"], row["busy"], row["lost"], row["mixed"]) == (3, 1, 2, 1)
    assert row["same"] == pytest.approx(1 / 3) == row["right"]
    assert row["first_ms"]["p50"] == pytest.approx(100) and row["whole_ms"]["p99"] == pytest.approx(500)
    assert row["tokens_per_s"] == pytest.approx(9 / 0.5)
    assert summary([call(0, "答0", number="a"), call(1, "答1", number="a")], expected)["repeated_ids"] == 1


def test_nobody_there():
    calls = ask_all(Target("http://127.0.0.1:9/v1", "tiny"), [question(0)], 1)
    assert calls[0].status == 0 and "Refused" in calls[0].why


def test_rows_a_step_by_hand():
    before = {"chat_steps_total": 10, "chat_step_rows_total": 20}
    assert script.rows_a_step(before, {"chat_steps_total": 14, "chat_step_rows_total": 50}) == 7.5
    assert script.rows_a_step(before, before) == 0.0


def test_arguments_that_cannot_be():
    for argv, match in (
        (["--url", "http://127.0.0.1:1/v1"], "--server_model 要一起给"),
        (["--url", "ftp://a/v1", "--server_model", "m"], "不是网址"),
        (["--engines", "torch,"], "空的一项"),
        (["--engines", "vllm"], "不认识 vllm"),
        (["--n_questions", "3"], "16"),
    ):
        with pytest.raises(UserError, match=match):
            script.main(["--preset", "tiny", *argv])
    with pytest.raises(UserError, match="不是这台机器"):
        Target("http://192.0.2.1:80/v1", "m").connect()


def test_another_server(tokenizer, capsys):
    """--url：不是我们开的也打得。"""
    from nlp_common.tiny import world

    questions = world.heldout_questions(64, seed=0)
    with serving(echoing(tokenizer, questions), tokenizer, waiting=80) as (server, _):
        argv = [
            "--preset",
            "tiny",
            "--url",
            f"{server.url}/v1",
            "--server_model",
            "tiny",
            "--n_questions",
            "64",
        ]
        found = script.main(argv)
    assert [found[f"clients{n}"]["ok"] for n in (1, 4, 16)] == [4, 16, 64]
    assert found["clients16"]["right"] == 1.0 and "每秒 token" in capsys.readouterr().out


@pytest.mark.slow
def test_a_server_that_does_not_start(tmp_path):
    with pytest.raises(UserError, match=r"serve\.py 没有开起来"), script.running(str(tmp_path / "none"), 1):
        pass


@pytest.mark.slow
def test_the_whole_lesson(base_folder, tmp_path):
    argv = [
        "--preset",
        "tiny",
        "--model",
        str(base_folder),
        "--n_questions",
        "32",
        "--output_dir",
        str(tmp_path / "out"),
    ]
    metrics = script.main(argv)["metrics"]
    for way in script.WAYS:
        row = metrics["torch"][way]["clients16"]
        assert row["ok"] == 32 and row["lost"] == row["mixed"] == 0 and row["same"] > 0.9
    assert metrics["hang_up"]["still_seated"] == 0 and metrics["busy"]["lost"] == 0
    assert metrics["busy"]["ok"] + metrics["busy"]["busy"] == 64
    assert (tmp_path / "out" / "serve_throughput.svg").exists()
    assert (
        script.main(argv)["metrics"]
        == json.loads((tmp_path / "out" / "run.json").read_text("utf-8"))["metrics"]
    )
    assert threading.active_count() < 20
