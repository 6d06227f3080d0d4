"""断路器与时钟。断路器：一样服务接连出错，就先别去问它了，歇一会儿，再放一个请求去试，好了才恢复。

breaker = CircuitBreaker(clock.now, limit=3, rest=5.0)
if breaker.allow():
    try:    结果 = 去问服务();  breaker.record(True)
    except: breaker.record(False)

       接连 limit 次出错           过了 rest 秒，放一个去试
closed ────────────────→ open ────────────────────────→ half_open
  ↑                        ↑──────── 试的那个出错 ────────────┤
  └───────────────────────────────── 试的那个成功 ────────────┘
"""

from __future__ import annotations

from collections.abc import Callable


class CircuitBreaker:
    """clock 给出现在是第几秒；真用的时候是 time.monotonic，实验里是 Clock.now。不管线程：一个线程一个，或在外面加锁。"""

    def __init__(self, clock: Callable[[], float], limit: int = 3, rest: float = 5.0):
        self.clock, self.limit, self.rest = clock, limit, rest
        self.failures, self.opened, self.probing = 0, None, False

    @property
    def state(self) -> str:
        if self.opened is None:
            return "closed"
        return "half_open" if self.probing or self.clock() - self.opened >= self.rest else "open"

    def allow(self) -> bool:
        """可以去问吗。歇够了，只放一个去试，它回来以前别的都不放。"""
        if self.opened is None:
            return True
        if self.probing or self.clock() - self.opened < self.rest:
            return False
        self.probing = True
        return True

    def record(self, ok: bool) -> None:
        """去问的那一次成没成。"""
        if ok:
            self.failures, self.opened, self.probing = 0, None, False
            return
        self.failures += 1
        if self.probing or self.failures >= self.limit:
            self.opened, self.probing = self.clock(), False


class Clock:
    """实验里的钟：谁花了几秒，就往前拨几秒。不必真等，同一种子每次都一样。"""

    def __init__(self) -> None:
        self.seconds = 0.0

    def now(self) -> float:
        return self.seconds

    def pass_by(self, seconds: float) -> None:
        self.seconds += seconds
