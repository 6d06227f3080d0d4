"""几件事同时做：次序、异常、线程数，以及什么时候不该同时做。"""

import threading
from functools import partial

import pytest
import torch

from nlp_common.fast import together as module
from nlp_common.fast.together import together


@pytest.fixture
def two_cores():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_tasks_run_at_the_same_time_each_on_its_share(two_cores):
    meet = threading.Barrier(2, timeout=20)  # 两件事都到了才放行：一件件做就会超时

    def task(name):
        meet.wait()
        return name, torch.get_num_threads(), torch.is_grad_enabled()

    with torch.no_grad():
        results = together(partial(task, "a"), partial(task, "b"))
    # no_grad 是每个线程各自的：外面写的管不到里面
    assert results == [("a", 1, True), ("b", 1, True)]
    assert torch.get_num_threads() == 2


def test_an_error_is_raised_after_all_are_done(two_cores):
    done = []

    def fails():
        raise ValueError("坏了")

    with pytest.raises(ValueError, match="坏了"):
        together(fails, partial(done.append, 1))
    assert done == [1] and torch.get_num_threads() == 2


@pytest.mark.parametrize("why", ["one core", "accelerator", "processes"])
def test_one_after_another(why, two_cores, monkeypatch):
    if why == "one core":
        torch.set_num_threads(1)
    elif why == "accelerator":
        monkeypatch.setattr(module, "accelerator_available", lambda: True)
    else:
        monkeypatch.setattr(module, "num_processes", lambda: 2)
    here = threading.get_ident()
    assert together(threading.get_ident, threading.get_ident) == [here, here]
