"""几个进程的统计合成一份。"""

from nlp_common.base import processes
from nlp_common.base.processes import merge_stats


def test_stats_are_averaged_except_the_largest(monkeypatch):
    monkeypatch.setattr(processes, "gather", lambda values: [*values, {"loss": 3.0, "ratio_max": 7.0}])
    merged = merge_stats({"loss": 1.0, "ratio_max": 2.0}, largest={"ratio_max"})
    assert merged == {"loss": 2.0, "ratio_max": 7.0}


def test_one_process_keeps_its_own():
    assert merge_stats({"loss": 1.5, "ratio_max": 2.0}, largest={"ratio_max"}) == {
        "loss": 1.5,
        "ratio_max": 2.0,
    }
