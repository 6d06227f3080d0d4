"""Trainer 的参数、按长度分批、进度：训练循环之外、只有 Qwen 链用得着的部分。"""

from __future__ import annotations

import torch
from transformers import TrainingArguments

from nlp_common.device import precision_flags
from nlp_common.processes import num_processes
from nlp_common.training import ExactTrainer, LengthBucketSampler
from nlp_common.training import Progress as BaseProgress

from .stage import Stage


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


def training_kwargs(stage: Stage) -> dict:
    """settings → TrainingArguments / DPOConfig / RewardConfig 共有的参数。"""
    s = stage.settings
    names = [
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "learning_rate",
        "num_train_epochs",
        "max_steps",
        "warmup_steps",
        "weight_decay",
        "adam_beta2",
        "max_grad_norm",
        "lr_scheduler_type",
        "dataloader_num_workers",
        "logging_steps",
        "save_steps",
        "seed",
    ]
    # transformers 5.23 起改名；TRL 的配置默认开着它，所以总要写明
    fields = TrainingArguments.__dataclass_fields__
    checkpointing = next(n for n in ("activation_checkpointing", "gradient_checkpointing") if n in fields)
    return {
        checkpointing: s.gradient_checkpointing,
        **{name: getattr(s, name) for name in names},
        **precision_flags(stage.device),
        "use_cpu": stage.device.type == "cpu",  # 几个进程时，据此选 gloo
        "ddp_find_unused_parameters": False,  # 参数个个都用得上，不必每步去找
        "output_dir": str(stage.folder.checkpoints),
        "save_strategy": "steps",
        "save_total_limit": 2,  # 正在写的一个加上写完的一个：写到一半被杀，还有前一个可用
        "report_to": "none",
        "disable_tqdm": True,  # 进度由 Progress 显示
        "remove_unused_columns": False,
        "dataloader_pin_memory": stage.device.type == "cuda",
    }


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
