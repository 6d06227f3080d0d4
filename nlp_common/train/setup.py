"""训练开始前与结束后，和硬件有关的几步：精度、重算激活、收齐分片的参数。"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator, DistributedType

from nlp_common.base.device import precision
from nlp_common.base.errors import UserError
from nlp_common.train.settings import LoopSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED)


def make_accelerator(device: torch.device, settings: LoopSettings) -> Accelerator:
    """按设备定精度（nlp_common/base/device.py）的 Accelerator；几个进程、分片都由它管。"""
    mixed_precision = precision(device)
    if mixed_precision == "fp32":
        mixed_precision = "no"
    accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision=mixed_precision)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:  # 它要先知道每批几行，又自己管梯度累积
        if settings.gradient_accumulation_steps > 1:
            raise UserError(
                "DeepSpeed 下不支持 --gradient_accumulation_steps：调大 --per_device_train_batch_size。"
            )
        config = accelerator.state.deepspeed_plugin.deepspeed_config
        config["train_micro_batch_size_per_gpu"] = settings.per_device_train_batch_size
    return accelerator


def recompute_activations(model: PreTrainedModel) -> None:
    """前向不留激活，反向时重算：用时间换显存（gradient checkpointing）。transformers 5.23 起改名。"""
    new_name = getattr(model, "activation_checkpointing_enable", None)
    (new_name or model.gradient_checkpointing_enable)()


def gather_state(accelerator: Accelerator, model: torch.nn.Module) -> dict | None:
    """参数分片在各个进程里时（FSDP、ZeRO-3）收齐成一份，各进程都要调用；没有分片是 None。"""
    return accelerator.get_state_dict(model) if accelerator.distributed_type in SHARDED else None
