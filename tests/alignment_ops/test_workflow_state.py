"""流程的日志：做过的步不再做，得到同样的结果；没做成的不记；设置变了从头来；两个进程不走同一条。"""

import pytest
from filelock import FileLock

import line_log
from nlp_common.base.errors import UserError
from workflow_state import open_journal


class Work:
    """数一数做了几次的一步。"""

    def __init__(self, result=None, fails=0):
        self.result, self.fails, self.times = result, fails, 0

    def __call__(self):
        self.times += 1
        if self.times <= self.fails:
            raise UserError("没有做成")
        return self.result


def test_done_steps_are_not_done_again(tmp_path):
    works = {"a": Work({"score": (0.5, "好"), "none": None}), "b": Work(3), "c": Work()}
    for time in range(2):
        before = line_log.read(tmp_path / "j.jsonl")
        with open_journal(tmp_path / "j.jsonl", {"seed": 0}) as journal:
            results = [journal.step(name, work) for name, work in works.items()]
            assert results == [{"score": [0.5, "好"], "none": None}, 3, None]  # 头一次与接着做，是同样的东西
            assert journal.skipped == ([] if time == 0 else ["a", "b", "c"])
            assert journal.seconds_before == sum(event.get("seconds", 0) for event in before)
    assert [work.times for work in works.values()] == [1, 1, 1]


@pytest.mark.parametrize("error", [UserError, KeyboardInterrupt])
def test_a_step_that_failed_is_done_again(tmp_path, error):
    first, second = Work("一"), Work("二")

    def interrupted():
        second()
        raise error("停")

    with pytest.raises(error), open_journal(tmp_path / "j.jsonl", {}) as journal:
        journal.step("first", first)
        journal.step("second", interrupted)
    with open_journal(tmp_path / "j.jsonl", {}) as journal:
        assert [journal.step("first", first), journal.step("second", second)] == ["一", "二"]
        assert journal.skipped == ["first"]
    assert (first.times, second.times) == (1, 2)


def test_other_settings_begin_again_and_the_old_journal_is_kept(tmp_path, capsys):
    path, work = tmp_path / "j.jsonl", Work(1)
    for seed in (0, 0, 1):
        with open_journal(path, {"seed": seed}) as journal:
            journal.step("a", work)
    assert work.times == 2
    assert "seed：已有 0，这次 1" in capsys.readouterr().out
    assert line_log.read(tmp_path / "j.jsonl.old")[0]["settings"] == {"seed": 0}


def test_a_half_written_step_is_done_again(tmp_path):
    path, work = tmp_path / "j.jsonl", Work("结果")
    with open_journal(path, {}) as journal:
        journal.step("a", work)
    path.write_bytes(path.read_bytes()[:-9])
    with open_journal(path, {}) as journal:
        assert journal.step("a", work) == "结果"
    assert work.times == 2


def test_one_flow_is_walked_by_one_process(tmp_path):
    path = tmp_path / "j.jsonl"
    with (
        FileLock(f"{path}.running"),
        pytest.raises(UserError, match="另一个进程正在走"),
        open_journal(path, {}),
    ):
        pass
    with open_journal(path, {}):
        pass


def test_steps_with_one_name_and_places_that_cannot_be_written(tmp_path):
    with open_journal(tmp_path / "j.jsonl", {}) as journal:
        journal.step("a", Work())
        with pytest.raises(ValueError, match="两步都叫 a"):
            journal.step("a", Work())
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="--output_dir"), open_journal(tmp_path / "file" / "j.jsonl", {}):
        pass


def test_a_journal_without_its_first_line_is_named(tmp_path):
    line_log.append(tmp_path / "j.jsonl", {"event": "done", "step": "a", "result": 1, "seconds": 0.0})
    with pytest.raises(UserError, match="第 1 行不是流程的开头"), open_journal(tmp_path / "j.jsonl", {}):
        pass
