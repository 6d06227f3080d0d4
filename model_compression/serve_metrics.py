"""服务的计数，写成 Prometheus 的文字（GET /metrics）：普罗米修斯每隔十几秒来抄一次，画成曲线。

counter 只增不减（重启归零），gauge 是现在的数，histogram 数的是"不超过这么多秒的有几个"，一档包着前一档。
"""

from __future__ import annotations

import threading

BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)  # 秒
HELP = {
    "requests_total": "counter 回了几个请求，按 HTTP 状态",
    "prompt_tokens_total": "counter 读了几个提示的 token",
    "completion_tokens_total": "counter 写了几个 token",
    "cancelled_total": "counter 没有说完就走了的请求",
    "steps_total": "counter 转了几圈",
    "step_rows_total": "counter 每一圈几个人，加起来；除以圈数，就是座位平均坐几个",
    "running": "gauge 在座的",
    "waiting": "gauge 在排队的",
    "slots": "gauge 座位",
    "first_token_seconds": "histogram 从请求到第一个 token",
}
PREFIX = "chat_"


class Metrics:
    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.statuses: dict[int, int] = {}
        self.prompt_tokens = self.completion_tokens = self.cancelled = 0
        self.buckets = [0] * len(BUCKETS)
        self.first_sum, self.first_count = 0.0, 0

    def answered(self, status: int) -> None:
        status = int(status)  # http.server 自己的错给的是 HTTPStatus
        with self.lock:
            self.statuses[status] = self.statuses.get(status, 0) + 1

    def finished(self, job) -> None:
        """一个请求离座了。"""
        with self.lock:
            self.prompt_tokens += len(job.prompt)
            self.completion_tokens += len(job.written)
            self.cancelled += job.end == "cancelled"
            if job.first_at:
                seconds = job.first_at - job.came
                self.first_sum, self.first_count = self.first_sum + seconds, self.first_count + 1
                for place, limit in enumerate(BUCKETS):
                    self.buckets[place] += seconds <= limit

    def text(self, batcher) -> str:
        with self.lock:
            rows: dict[str, list[tuple[str, float]]] = {
                "requests_total": [(f'{{status="{s}"}}', n) for s, n in sorted(self.statuses.items())],
                "prompt_tokens_total": [("", self.prompt_tokens)],
                "completion_tokens_total": [("", self.completion_tokens)],
                "cancelled_total": [("", self.cancelled)],
                "steps_total": [("", batcher.steps)],
                "step_rows_total": [("", batcher.step_rows)],
                "running": [("", len(batcher.seated))],
                "waiting": [("", len(batcher.waiting))],
                "slots": [("", batcher.slots)],
            }
            pairs = list(zip(BUCKETS, self.buckets, strict=True))
            rows["first_token_seconds"] = [(f'_bucket{{le="{limit:g}"}}', n) for limit, n in pairs]
            rows["first_token_seconds"] += [
                ('_bucket{le="+Inf"}', self.first_count),
                ("_sum", round(self.first_sum, 6)),
                ("_count", self.first_count),
            ]
        lines = []
        for name, values in rows.items():
            kind, help_text = HELP[name].split(" ", 1)
            lines += [f"# HELP {PREFIX}{name} {help_text}", f"# TYPE {PREFIX}{name} {kind}"]
            lines += [f"{PREFIX}{name}{label} {value}" for label, value in values]
        return "\n".join(lines) + "\n"
