"""Trainer 的参数、按长度分批、进度：训练循环之外、只有 Qwen 链用得着的部分。"""

from __future__ import annotations

import torch

from nlp_common.base.processes import num_processes
from nlp_common.train.stage import Stage
from nlp_common.train.trainer import ExactTrainer, LengthBucketSampler
from nlp_common.train.trainer import Progress as BaseProgress


class Bucketed(ExactTrainer):
    """混入任何 Trainer：训练数据按长度分批，几个进程合用一批。用之前设好 ``row_lengths``。"""

    row_lengths: list[int]

    def _get_train_sampler(self, *_):
        batch_size = self.args.per_device_train_batch_size * num_processes()
        return LengthBucketSampler(self.row_lengths, batch_size, self.args.data_seed or self.args.seed)


class PairTrainer(Bucketed):
    """混入 TRL 的训练器：一批是 collate_pairs 拼的，损失按对数平均。"""

    def count_items(self, batch: dict) -> torch.Tensor:
        return torch.tensor(len(batch["input_ids"]) // 2, device=batch["input_ids"].device)

    def note(self, name: str, values: torch.Tensor) -> None:
        """把这一批（各进程合起来）的平均值记进训练日志。"""
        values = values.detach().float()
        total, n = self.accelerator.reduce(torch.stack([values.sum(), torch.ones_like(values).sum()]))
        self._metrics["train"][name].append((total / n).item())


class Progress(BaseProgress):
    """再统计每秒多少个 token（不算填充）。"""

    def __init__(self, stage: Stage, label: str, row_tokens: list[int]):
        """row_tokens：每行有几个 token。"""
        super().__init__(label, len(row_tokens), stage.seconds)
        self.tokens_per_row = sum(row_tokens) / len(row_tokens)

    def on_train_end(self, args, state, control, **_):
        super().on_train_end(args, state, control)
        rows_per_s = self.metrics["train_samples_per_s"]
        self.metrics["train_tokens_per_s"] = round(rows_per_s * self.tokens_per_row, 1)


def loss_curve(log_history: list[dict]) -> list[dict]:
    """Trainer 的日志里留下画曲线要用的：``{"step", "loss", …}``。"""
    drop = {"epoch", "grad_norm", "learning_rate"}
    return [{k: v for k, v in row.items() if k not in drop} for row in log_history if "loss" in row]
