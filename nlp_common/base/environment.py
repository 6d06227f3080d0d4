"""导入别的库之前要设好的环境变量。``import nlp_common`` 时就设，所以脚本把它的导入排在最前面。"""

from __future__ import annotations

import logging
import os
import time

STARTED = time.perf_counter()  # 脚本的用时从这里算起：导入几个大库也要几秒


def prepare_environment() -> None:
    """设好环境变量（用户自己设过的不动）。要在导入任何 Hugging Face 库之前调用。"""
    defaults = {
        "HF_HUB_DISABLE_TELEMETRY": "1",  # TRL 一导入就会联网报告，离线时白等
        "TOKENIZERS_PARALLELISM": "false",  # DataLoader 分叉进程之后，并行分词会报警甚至死锁
        "TRL_EXPERIMENTAL_SILENCE": "1",
        # 各家的库往外发使用情况：都关掉
        "DO_NOT_TRACK": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "WANDB_ERROR_REPORTING": "false",
        "RAY_USAGE_STATS_ENABLED": "0",
        "ANONYMIZED_TELEMETRY": "False",  # chromadb
        "GRADIO_ANALYTICS_ENABLED": "False",
        "HF_HUB_ETAG_TIMEOUT": "5",
        "HF_HUB_DOWNLOAD_TIMEOUT": "10",
        # torch 的线程互相等的时候空转多久：默认的 30 万次在空着的机器上也不更快，旁边有别的程序时要慢几倍
        # （benchmarks/busy.py）。Linux 的 torch 用 GNU 的 OpenMP。
        "GOMP_SPINCOUNT": "1000",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    # 装了 bitsandbytes，accelerate、peft 就会导入它；它在 CPU 上一导入就用英文劝人另装一个只管推理的内核：这里用不着
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
