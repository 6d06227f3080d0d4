"""在自己的进程里量一种引擎：cpu_inference_case.py 给它一个 JSON 文件，说量哪一种、用哪些提示；量到的写进另一个文件。

另开一个进程，内存的最高点才是这一种引擎的，与别的无关。速度只看钟：同样的提示写 1 个 token 的秒数是读提示（prefill）的，
写 1 + n 个的多出来的，是一个一个写（decode）的。
"""

from nlp_common.base.cli import run_main

import json
import sys
import time
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from engines import load
from nlp_common.base.device import peak_memory_mb
from nlp_common.base.errors import UserError

BATCH = 8
REPEATS = 2  # 量几次，取最快的：别的程序插进来只会更慢


def main() -> None:
    if len(sys.argv) != 2:
        raise UserError("engine_probe.py 由 cpu_inference_case.py 运行，不用自己来。")
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    import_first(request["model"], request["engine"])
    before = peak_memory_mb() or 0.0  # 库都导入了，模型还没有
    started = time.perf_counter()
    engine = load(
        request["model"], request["engine"], request["precision"], request["cache"], request["context"]
    )
    found = {"load_seconds": time.perf_counter() - started, "bytes_read": engine.bytes_read}
    prompts = request["speed_prompts"]
    engine.generate(prompts[:1], 2, stop=False)  # 热身：第一次要分配、编译
    found |= speed(engine, prompts[:1], request["new_tokens"])
    found[f"batch_{BATCH}"] = speed(engine, prompts[:BATCH], request["new_tokens"])
    peak = peak_memory_mb() or 0.0
    found |= {"peak_memory_mb": peak, "model_memory_mb": peak - before}
    np.save(request["logits"], engine.logits(request["prefixes"]).numpy())  # (N, V)
    found["replies"] = (
        engine.generate(request["questions"], request["max_reply"]) if request["questions"] else []
    )
    engine.close()
    Path(request["answer"]).write_text(json.dumps(found), encoding="utf-8")


def import_first(model: str, engine: str) -> None:
    """引擎的库、模型结构的代码先导入：导入的几秒不算载入，占的内存也不算模型的。"""
    import_module({"onnx": "onnxruntime", "openvino": "openvino", "llama": "xllamacpp"}.get(engine, "torch"))
    if engine == "torch":
        with torch.device("meta"):
            AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model, trust_remote_code=False))


def speed(engine, prompts: list[list[int]], n: int) -> dict[str, float]:
    """一批同样长的提示：读提示每秒几个 token，写每秒几个 token（一批的合起来）。"""
    first, whole = [], []
    for _ in range(REPEATS):
        for seconds, length in ((first, 1), (whole, 1 + n)):
            started = time.perf_counter()
            engine.generate(prompts, length, stop=False)
            seconds.append(time.perf_counter() - started)
    prefill, decode = min(first), max(min(whole) - min(first), 1e-9)
    read = sum(map(len, prompts))
    return {
        "prefill_tokens_per_s": read / prefill,
        "decode_tokens_per_s": len(prompts) * n / decode,
    }


if __name__ == "__main__":
    run_main(main)
