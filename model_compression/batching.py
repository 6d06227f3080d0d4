"""成批地答：一条队伍，几个座位，一个线程转着一个圈。这就是 vLLM、SGLang、llama.cpp 的服务器里面那个圈，只是没有分页。

    连续（continuous）  谁说完谁走，座位马上给队里的下一个：每一步，座位都是满的
    静态（static）      坐满一批，等最长的那个说完，才换下一批：短的陪着长的，空座位也不给人
    一个一个（slots=1） 一次只答一个

一步的时间，一个人与十六个人差不多（权重都要读一遍，小算子的开销也都是一份），所以座位坐满了，每秒写的 token 就多了。
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from nlp_common.lm.generation import pick_next
from slot_model import SlotModel

PREFILL = 2048  # 一次最多一起读几个提示的 token：读提示的时候，在座的都停着等


@dataclass
class Job:
    """一个请求。events 里是一个个 token，最后是一个字符串：为什么说完了（stop、length、cancelled、error …）。"""

    prompt: list[int]
    max_tokens: int
    stops: list[int]  # 遇到这些 token 就算说完
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    came: float = field(default_factory=time.perf_counter)
    events: queue.SimpleQueue = field(default_factory=queue.SimpleQueue)
    written: list[int] = field(default_factory=list)
    left: bool = False  # 问的人走了，或已经够了：下一圈让出座位
    end: str = ""
    first_at: float = 0.0  # 第一个 token 的时刻

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)

    def take(self, token: int) -> None:
        """写下一个 token；说完了就定下 end。"""
        self.first_at = self.first_at or time.perf_counter()
        if token in self.stops:
            self.finish("stop")
            return
        self.written.append(token)
        self.events.put(token)
        if len(self.written) >= self.max_tokens:
            self.finish("length")

    def finish(self, why: str) -> None:
        if not self.end:
            self.end = why
            self.events.put(why)


class Full(Exception):
    """队伍满了。"""


class Closed(Exception):
    """服务正在关。"""


class Line:
    """队伍与座位的数；谁来算，看子类。finished(job) 在每个请求离座时调用（记数用）。"""

    def __init__(self, slots: int, most_waiting: int, finished: Callable[[Job], None]):
        self.slots, self.most_waiting, self.finished = slots, most_waiting, finished
        self.waiting: deque[Job] = deque()
        self.seated: list[Job] = []
        self.changed = threading.Condition()  # 队伍变了，或要关了
        self.closed = False
        self.steps, self.step_rows = 0, 0  # 转了几圈；每圈几个人，加起来

    def submit(self, job: Job) -> None:
        """排队。队伍满了是 Full：说一声忙，比让人没完没了地等好。"""
        with self.changed:
            if self.closed:
                raise Closed
            if len(self.waiting) >= self.most_waiting:
                raise Full
            self.waiting.append(job)
            self.changed.notify_all()

    def stop_all(self) -> None:
        """在座的、在等的就此打住。self.changed 在手里的时候用。"""
        for job in [*self.seated, *self.waiting]:
            job.finish("shutdown")
            job.left = True


class Batcher(Line):
    """转圈的线程。第 i 个在座的坐在第 i 行。"""

    def __init__(
        self, model: SlotModel, static: bool = False, most_waiting: int = 64,
        finished: Callable[[Job], None] = lambda job: None, threads: int = 1,
    ):  # fmt: skip
        super().__init__(model.slots, most_waiting, finished)
        self.model, self.static, self.threads = model, static, threads
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    # ------------------------------------------------------------ 那个圈

    def _run(self) -> None:
        torch.set_num_threads(self.threads)
        while self._wait_for_work():
            try:
                self._admit()
                self._step()
            except Exception as error:  # 引擎出了错：在座的都要知道，后面的照常
                for job in self.seated:
                    job.finish(f"error {type(error).__name__}：{error}")
            self._leave()
        self._turn_away()

    def _wait_for_work(self) -> bool:
        """有人在座或在等；没有就睡着。要关了、人也都走了，是 False。"""
        with self.changed:
            while not self.seated and not self.waiting and not self.closed:
                self.changed.wait()
            return bool(self.seated or self.waiting)

    def _admit(self) -> None:
        """有空座位，队里的就坐下，提示一起读；各写出第一个 token。"""
        newcomers: list[Job] = []
        free = self.model.slots - len(self.seated)
        if self.static and self.seated:
            free = 0
        with self.changed:
            while self.waiting and len(newcomers) < free:
                widest = max(len(job.prompt) for job in [*newcomers, self.waiting[0]])
                if newcomers and widest * (len(newcomers) + 1) > PREFILL:
                    break
                job = self.waiting.popleft()
                if job.left:  # 没轮到就走了
                    job.finish("cancelled")
                    self.finished(job)
                else:
                    newcomers.append(job)
        if newcomers:
            try:
                logits = self.model.prefill([job.prompt for job in newcomers])  # (n, V)
            except Exception as error:  # 还没有坐下：座位没有动
                for job in newcomers:
                    job.finish(f"error {type(error).__name__}：{error}")
                    self.finished(job)
                return
            self.seated += newcomers
            hand_out(newcomers, logits)
            self._leave()

    def _step(self) -> None:
        """在座的各写一个 token。"""
        if self.seated:
            logits = self.model.step([job.written[-1] for job in self.seated])  # (n, V)
            hand_out(self.seated, logits)
            self.steps, self.step_rows = self.steps + 1, self.step_rows + len(self.seated)

    def _leave(self) -> None:
        """说完的、走了的离座；最后一行的人搬过来补上。"""
        for row in reversed(range(len(self.seated))):
            job = self.seated[row]
            if job.left:
                job.finish("cancelled")
            if job.end:
                self.model.drop(row)
                self.seated[row] = self.seated[-1]
                self.seated.pop()
                self.finished(job)

    def _turn_away(self) -> None:
        with self.changed:
            for job in self.waiting:
                job.finish("shutdown")
            self.waiting.clear()

    # ------------------------------------------------------------ 关

    def close(self, grace: float = 0.0) -> None:
        """不再收新的；在座的、在等的再给 grace 秒说完，没有说完的就此打住（end 是 shutdown）。"""
        with self.changed:
            self.closed = True
            self.changed.notify()
        self.thread.join(grace)
        with self.changed:
            self.stop_all()
        self.thread.join()


def hand_out(jobs: list[Job], logits: torch.Tensor) -> None:
    """每个人从自己那一行 logits 里选一个 token：贪心的一起选，采样的各用各的种子，与旁边坐着谁无关。"""
    greedy = logits.argmax(-1).tolist()
    for job, row, best in zip(jobs, logits, greedy, strict=True):
        if job.temperature == 0:
            job.take(best)
        else:
            job.take(int(pick_next(row[None].float().cpu(), job.temperature, job.top_p, job.generator)))
