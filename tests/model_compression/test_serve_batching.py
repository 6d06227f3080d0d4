"""座位与圈：每一行的 logits 与单独算的相同；随便几个人、什么时候来，各人的回答都是自己的；静态、连续、忙、走、关。"""

import threading
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from parrot import Parrot, until

from batching import Batcher, Closed, Full, Job, hand_out
from engine_slots import EngineSlots, LlamaBatcher
from nlp_common.base.errors import UserError
from nlp_common.lm.loading import load_causal_lm
from slot_model import TorchSlots

STOP = 1


@pytest.fixture(scope="module")
def tiny(base_folder):
    return load_causal_lm(str(base_folder))


def drain(job, seconds=20.0):
    """→ (token, 为什么说完)。"""
    tokens = []
    while not isinstance(event := job.events.get(timeout=seconds), str):
        tokens.append(event)
    return tokens, event


# ---------------------------------------------------------------- 座位


def check_rows(model, slots, tolerance):
    """坐下、走一步、走掉一个、再来一个：每一行的 logits 都与把整段单独算一遍的相同。"""
    generator = torch.Generator().manual_seed(0)
    histories = [torch.randint(3, 600, (n,), generator=generator).tolist() for n in (3, 11, 6)]

    def check(logits, rows):
        for got, history in zip(logits, rows, strict=True):
            with torch.no_grad():
                alone = model(torch.tensor([history])).logits[0, -1]
            assert (got.to(alone.dtype) - alone).abs().max() < tolerance

    check(slots.prefill([list(each) for each in histories]), histories)
    for number in range(6):
        tokens = torch.randint(3, 600, (len(histories),), generator=generator).tolist()
        for history, token in zip(histories, tokens, strict=True):
            history.append(token)
        check(slots.step(tokens), histories)
        if number == 1:
            slots.drop(0)
            histories[0] = histories.pop()
        if number == 3:
            new = [torch.randint(3, 600, (n,), generator=generator).tolist() for n in (9, 2)]
            check(slots.prefill([list(each) for each in new]), new)
            histories += new


def test_rows_equal_computing_alone(tiny):
    check_rows(tiny[1], TorchSlots(tiny[1], 4, 64), 1e-5)


def test_rows_equal_computing_alone_in_float64(base_folder):
    _, model = load_causal_lm(str(base_folder))
    model = model.double()
    check_rows(model, TorchSlots(model, 4, 64), 1e-9)


def test_engines_step_in_the_same_seats(base_folder, tiny):
    import engines

    check_rows(tiny[1], EngineSlots(engines.load(str(base_folder), "torch"), 4, 64), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["onnx", "openvino"])
def test_other_engines_step_in_the_same_seats(engine, base_folder, tiny, tmp_path):
    import engines

    if command := engines.missing(engine):
        pytest.skip(f"没有装 {engine}：{command}")
    loaded = engines.load(str(base_folder), engine, cache=str(tmp_path))
    check_rows(tiny[1], EngineSlots(loaded, 4, 64), 1e-4)


def test_sliding_windows_are_refused(tiny):
    import copy

    _, model = tiny
    other = copy.copy(model)
    other.config = copy.deepcopy(model.config)
    other.config.layer_types = ["sliding_attention", "full_attention"]
    with pytest.raises(UserError, match="--engine llama"):
        TorchSlots(other, 2, 64)


# ---------------------------------------------------------------- 圈


def own_reply(prompt):
    """每个提示自己的话：长短、内容都由提示定。"""
    seed = sum(prompt) * 31 + len(prompt)
    return [2 + (seed + 7 * k) % 40 for k in range(seed % 9)] + [STOP] * 50


@settings(max_examples=25, deadline=None)
@given(
    prompts=st.lists(st.lists(st.integers(2, 40), min_size=1, max_size=6), min_size=1, max_size=20),
    slots=st.integers(1, 6),
    static=st.booleans(),
    at_most=st.integers(1, 10),
)
def test_everyone_gets_their_own_answer(prompts, slots, static, at_most):
    model = Parrot(own_reply, 50, slots)
    batcher = Batcher(model, static, most_waiting=100)
    jobs = [Job(prompt, at_most, [STOP]) for prompt in prompts]
    for job in jobs:
        batcher.submit(job)
    for job in jobs:
        said = own_reply(job.prompt)
        whole = said[: said.index(STOP)]
        tokens, why = drain(job)
        assert tokens == whole[:at_most]
        assert why == ("length" if len(whole) >= at_most else "stop")
    batcher.close()
    assert model.rows == [] and model.most <= slots


def test_long_prompts_do_not_all_come_at_once(monkeypatch):
    """一起读的提示有上限：在座的不必停着等一大批读完。"""
    import batching

    monkeypatch.setattr(batching, "PREFILL", 10)
    model, sizes = Parrot(own_reply, 50, slots=4), []
    prefill = model.prefill
    model.prefill = lambda prompts: (sizes.append([len(p) for p in prompts]), prefill(prompts))[1]
    batcher = Batcher(model)
    jobs = [Job([3] * n, 5, [STOP]) for n in (2, 2, 2, 6, 30)]
    with batcher.changed:  # 一起来
        batcher.waiting.extend(jobs)
        batcher.changed.notify()
    assert all(drain(job)[1] in ("stop", "length") for job in jobs)
    batcher.close()
    assert [size for each in sizes for size in each] == [2, 2, 2, 6, 30]
    assert all(len(each) * max(each) <= 10 or len(each) == 1 for each in sizes)


def test_static_waits_for_the_longest_continuous_does_not():
    def reply(prompt):
        return [5] * prompt[0] + [STOP] * 9

    steps = {}
    for static in (False, True):
        batcher = Batcher(Parrot(reply, 50, slots=2, wait=0.001), static)
        jobs = [Job([n], 40, [STOP]) for n in (2, 20, 2, 2, 2, 2)]
        for job in jobs:
            batcher.submit(job)
        ends = [drain(job)[1] for job in jobs]
        batcher.close()
        steps[static] = batcher.steps
        assert ends == ["stop"] * 6
    assert steps[False] < steps[True]


def test_sampling_does_not_depend_on_the_neighbours(tiny):
    """同一个种子，旁边坐着谁都一样。"""
    tokenizer, model = tiny
    prompt = tokenizer("小刚去了")["input_ids"]

    def ask(neighbours):
        batcher = Batcher(TorchSlots(model, 4, 64))
        others = [Job(prompt[:n], 12, [], temperature=1.0, seed=n) for n in range(1, 1 + neighbours)]
        mine = Job(prompt, 12, [], temperature=1.0, top_p=0.9, seed=7)
        for job in [*others, mine]:
            batcher.submit(job)
        tokens, _ = drain(mine)
        batcher.close(10)
        return tokens

    alone = ask(0)
    assert alone == ask(3) and len(alone) == 12
    assert len(set(alone)) > 1


def test_hand_out_by_hand():
    jobs = [Job([1], 5, [STOP]), Job([1], 1, [STOP]), Job([1], 5, [STOP], temperature=1.0)]
    logits = torch.full((3, 4), -50.0)
    logits[0, STOP] = logits[1, 3] = logits[2, 2] = 50.0
    hand_out(jobs, logits)
    assert [job.end for job in jobs] == ["stop", "length", ""]
    assert [job.written for job in jobs] == [[], [3], [2]]


def test_a_full_queue_says_so_and_a_closed_one_too():
    batcher = Batcher(Parrot(lambda p: [5] * 100, 50, slots=1, wait=0.005), most_waiting=2)
    first = Job([1], 60, [STOP])
    batcher.submit(first)
    assert until(lambda: batcher.seated)
    others = [Job([1], 3, [STOP]) for _ in range(2)]
    for job in others:
        batcher.submit(job)
    with pytest.raises(Full):
        batcher.submit(Job([1], 3, [STOP]))
    batcher.close(0.0)
    assert drain(first)[1] == "shutdown" and [drain(job)[1] for job in others] == ["shutdown"] * 2
    with pytest.raises(Closed):
        batcher.submit(Job([1], 3, [STOP]))


def test_closing_lets_the_seated_finish():
    batcher = Batcher(Parrot(lambda p: [5] * 100, 50, slots=1, wait=0.002), most_waiting=2)
    jobs = [Job([1], 10, [STOP]) for _ in range(2)]
    for job in jobs:
        batcher.submit(job)
    batcher.close(10.0)
    assert [drain(job) for job in jobs] == [([5] * 10, "length")] * 2


def test_who_leaves_frees_the_seat():
    left = []
    batcher = Batcher(
        Parrot(lambda p: [5] * 9000, 50, slots=1, context=9999, wait=0.001), finished=left.append
    )
    endless, next_one, gone = Job([1], 8000, [STOP]), Job([1], 4, [STOP]), Job([1], 4, [STOP])
    for job in (endless, gone, next_one):
        batcher.submit(job)
    gone.left = True  # 没有轮到就走了
    assert endless.events.get(timeout=5) == 5
    endless.left = True
    assert drain(next_one) == ([5] * 4, "length")
    assert until(lambda: len(left) == 3)
    assert {job.end for job in (endless, gone)} == {"cancelled"}
    batcher.close()


def test_an_error_is_told_and_the_next_goes_on():
    model = Parrot(own_reply, 50, fails=lambda prompt: prompt == [9])
    batcher = Batcher(model)
    bad, good = Job([9], 5, [STOP]), Job([4, 4], 5, [STOP])
    batcher.submit(bad)
    assert drain(bad) == ([], "error RuntimeError：坏了")
    batcher.submit(good)
    assert drain(good)[1] in ("stop", "length")
    step, model.step = model.step, lambda tokens: 1 / 0
    broken = Job([7], 50, [])
    batcher.submit(broken)
    assert drain(broken)[1].startswith("error ZeroDivisionError")
    model.step = step
    again = Job([4, 4], 5, [STOP])
    batcher.submit(again)
    assert drain(again)[1] in ("stop", "length") and until(lambda: model.rows == [])
    batcher.close()


# ---------------------------------------------------------------- llama.cpp 自己排座位


class Fake:
    """engines.LlamaEngine 的样子。"""

    def __init__(self):
        self.at_once = self.most = 0
        self.lock = threading.Lock()

    def stream(self, prompts, n, temperature, top_p, seed):
        with self.lock:
            self.at_once += 1
            self.most = max(self.most, self.at_once)
        try:
            for token in own_reply(prompts[0])[:n]:
                time.sleep(0.001)
                yield 0, token
        finally:
            with self.lock:
                self.at_once -= 1


def test_llama_batcher():
    engine, left = Fake(), []
    batcher = LlamaBatcher(engine, 2, 20, left.append)
    jobs = [Job([n, n + 1], 6, [STOP]) for n in range(2, 14)]
    for job in jobs:
        batcher.submit(job)
    for job in jobs:
        said = own_reply(job.prompt)
        assert drain(job)[0] == said[: said.index(STOP)][:6]
    assert engine.most <= 2 and until(lambda: len(left) == 12)
    batcher.close(5)
    with pytest.raises(Closed):
        batcher.submit(jobs[0])
