"""DeepSpeed 的推理：init_inference 把模型切到几块显卡上（张量并行），设置写在 deepspeed_inference.json。

今天坏了的：dtype=torch.int8（它自己的教程里还写着）在每一种设备上都被拒绝（DeepSpeed 的 8577 号问题），连 CPU 上也是；
init_inference 的 quant 一项收下了，权重却没有变。能用的：bf16 或 fp16 切开，不用 int8；要省显存，用已经量化好的权重，
交给 vLLM、SGLang，或者 quantized_deploy.py --serve bnb_nf4（一块显卡）。
"""

from __future__ import annotations

import json
import logging
import os
import time
from importlib.util import find_spec
from pathlib import Path

import torch

from nlp_common.base.device import pick_device
from nlp_common.base.errors import UserError
from nlp_common.lm.loading import load_causal_lm
from nlp_common.lm.replies import MAX_REPLY, reply_to
from nlp_common.tiny import world
from nlp_common.tiny.judge import qa_accuracy

INSTALL = "DS_BUILD_OPS=0 pip install --no-build-isolation deepspeed"
QUESTION = "小刚去了哪里？"


def read_config(path: Path) -> dict:
    """设置文件 → 字典，tp_size 改成启动器开了几个进程。"""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--deepspeed_config {path} 读不了（{error.strerror}）。") from error
    except ValueError as error:
        raise UserError(f"--deepspeed_config {path} 不是合法的 JSON：{error}") from error
    if not isinstance(config, dict):
        raise UserError(f"--deepspeed_config {path} 要是一个 JSON 对象。")
    if config.get("dtype") in ("int8", "torch.int8"):
        raise UserError(
            f"{path} 的 dtype 是 int8：DeepSpeed 现在在每一种设备上都不收（8577 号问题），改成 bf16 或 fp16。"
        )
    config["tensor_parallel"] = {
        **config.get("tensor_parallel", {}),
        "tp_size": int(os.environ.get("WORLD_SIZE", 1)),
    }
    return config


def run(path: str, config_path: Path, n: int) -> dict:
    """切开的模型答 n 道题：与没有切的差多少、答对几成、每秒几个 token。几个进程一起跑，第 0 个说话。"""
    if not find_spec("deepspeed"):
        raise UserError(f"没有装 DeepSpeed：{INSTALL}。")
    config = read_config(config_path)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed

    tokenizer, plain = load_causal_lm(path)
    device = pick_device()
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    plain = plain.to(device).eval()
    ids = torch.tensor([tokenizer(QUESTION)["input_ids"]], device=device)
    with torch.no_grad():
        wanted = plain(ids).logits
    refused = int8_is_refused(deepspeed, path)
    _, model = load_causal_lm(path)
    model = deepspeed.init_inference(model.to(device).eval(), config=config).module
    with torch.no_grad():
        difference = (model(ids).logits.float() - wanted).abs().max().item()
    questions = world.heldout_questions(n, seed=0)
    started = time.perf_counter()
    replies = reply_to(model, tokenizer, questions, MAX_REPLY)
    seconds = time.perf_counter() - started
    found = {
        "difference": difference,
        "qa_accuracy": qa_accuracy(model, tokenizer, questions),
        "tokens_per_s": sum(len(reply["ids"]) for reply in replies) / seconds,
        "int8_refused": float(bool(refused)),
    }
    if int(os.environ.get("RANK", 0)) == 0:
        show(config, device, refused, found)
    return found


def int8_is_refused(deepspeed, path: str) -> str:
    """它今天怎样说；哪天修好了，是空的。"""
    try:
        deepspeed.init_inference(load_causal_lm(path)[1], config={"dtype": "int8"})
    except ValueError as error:
        return str(error)
    return ""


def show(config: dict, device: torch.device, refused: str, found: dict) -> None:
    print(
        f"\nDeepSpeed，{device}，张量并行 {config['tensor_parallel']['tp_size']}，{config.get('dtype', 'fp16')}"
    )
    print(f"  dtype=int8：{'被拒绝，' + refused if refused else '现在收了'}")
    print(
        f"  与没有切的 logits 最多差 {found['difference']:.3g}；答对 {found['qa_accuracy']:.3f}；"
        f"每秒 {found['tokens_per_s']:,.0f} 个 token"
    )
