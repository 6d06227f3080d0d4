"""把选好的切法写成三种文件：DeepSpeed 的 JSON、accelerate 的 YAML（用那个 JSON 里同样的设置）、FSDP2 的 YAML。"""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from memory_plan import ALLGATHER_BUCKET, MAX_LIVE, PREFETCH_BUCKET, REDUCE_BUCKET, Choice, Machines


def deepspeed_json(choice: Choice, batch: int, accumulation: int) -> dict:
    """DeepSpeed 的设置；哪些数我们在账里用了，就照写出来，不留给默认值。"""
    zero: dict = {
        "stage": choice.stage,
        "overlap_comm": True,
        "contiguous_gradients": True,
        "reduce_bucket_size": REDUCE_BUCKET,
    }
    if choice.stage == 3:
        zero |= {
            "stage3_max_live_parameters": MAX_LIVE,
            "stage3_prefetch_bucket_size": PREFETCH_BUCKET,
            "stage3_gather_16bit_weights_on_model_save": True,
        }
    elif choice.stage:
        zero["allgather_bucket_size"] = ALLGATHER_BUCKET
    if choice.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    if choice.offload_param:
        zero["offload_param"] = {"device": "cpu", "pin_memory": True}
    return {
        "train_micro_batch_size_per_gpu": batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "zero_optimization": zero,
    }


def accelerate_yaml(choice: Choice, machines: Machines, accumulation: int) -> dict:
    """accelerate launch --config_file 用的；与 accelerate_configs/ 里的同样写法。"""
    if choice.stage == 0:
        return _common(machines) | {"distributed_type": "MULTI_GPU", "mixed_precision": "bf16"}
    device = {True: "cpu", False: "none"}
    deepspeed = {
        "zero_stage": choice.stage,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 1.0,
        "offload_optimizer_device": device[choice.offload_optimizer],
        "offload_param_device": device[choice.offload_param],
    }
    if choice.stage == 3:
        deepspeed |= {"zero3_init_flag": True, "zero3_save_16bit_model": True}
    return _common(machines) | {
        "distributed_type": "DEEPSPEED",
        "mixed_precision": "bf16",
        "deepspeed_config": deepspeed,
    }


def fsdp2_yaml(choice: Choice, machines: Machines) -> dict:
    """同样的切法用 PyTorch 的 FSDP2：ZeRO-3 是用完就放；ZeRO-1、2 是前向以后留着参数，反向不再收一次。

    FSDP2 挪走是参数、梯度、优化器一起挪，没有只挪优化器的。
    """
    return _common(machines) | {
        "distributed_type": "FSDP",
        "mixed_precision": "bf16",
        "fsdp_config": {
            "fsdp_version": 2,
            "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "fsdp_reshard_after_forward": choice.stage in (0, 3),
            "fsdp_state_dict_type": "SHARDED_STATE_DICT",  # 模型大时不收齐，各存各的
            "fsdp_cpu_ram_efficient_loading": True,
            "fsdp_offload_params": choice.offload_optimizer,
        },
    }


def _common(machines: Machines) -> dict:
    settings = {
        "compute_environment": "LOCAL_MACHINE",
        "num_machines": machines.nodes,
        "num_processes": machines.gpus,
        "machine_rank": 0,
    }
    if machines.nodes > 1:  # 各台机器上只有 machine_rank 不同
        settings |= {"main_process_ip": "10.0.0.1", "main_process_port": 29500, "rdzv_backend": "static"}
    return settings


def write_configs(folder: Path, choice: Choice, machines: Machines, batch: int, accumulation: int) -> None:
    if choice.stage:
        text = json.dumps(deepspeed_json(choice, batch, accumulation), indent=2)
        (folder / "deepspeed.json").write_text(text + "\n", encoding="utf-8")
    for name, settings in (
        ("accelerate.yaml", accelerate_yaml(choice, machines, accumulation)),
        ("fsdp2.yaml", fsdp2_yaml(choice, machines)),
    ):
        (folder / name).write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
