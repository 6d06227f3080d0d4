"""用 llama.cpp 运行一个 GGUF：xllamacpp（有编好的包）或 llama-cpp-python（要编译好几分钟），装了哪个用哪个。

对话原样交给它：模板、分词、控制符、在哪里停，都用 GGUF 里写的。所以回答与 PyTorch 相同，说明这些都写对了，不只是权重。
"""

from __future__ import annotations

import time
from importlib.util import find_spec
from pathlib import Path

import torch

INSTALL = "pip install xllamacpp（编好的包，34 MB）"


def engine() -> str | None:
    """装了的那一个；都没有是 None。"""
    return next((name for name in ("xllamacpp", "llama_cpp") if find_spec(name)), None)


def greedy_replies(
    path: Path, chats: list[list[dict]], max_new_tokens: int, context: int
) -> tuple[list[dict], float]:
    """每段对话（以用户的话结尾）的贪心回答 → ([{"text", "ended"}], 每秒几个 token)。"""
    if engine() == "xllamacpp":
        ask = open_server(path, context).handle_chat_completions
    else:
        ask = _llama_cpp(path, context)
    replies, tokens, started = [], 0, time.perf_counter()
    for messages in chats:
        answer = ask({"messages": messages, "max_tokens": max_new_tokens, "temperature": 0.0, "top_k": 1})
        choice = answer["choices"][0]
        tokens += answer["usage"]["completion_tokens"]
        ended = choice["finish_reason"] == "stop"
        replies.append({"text": choice["message"]["content"] or "", "ended": ended})
    return replies, tokens / (time.perf_counter() - started)


def open_server(path: Path, context: int, slots: int = 1):
    """xllamacpp 的服务，在这个进程里；一次最多一起写 slots 个，各有 context 个 token 的地方。"""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel = context * slots, slots
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = torch.get_num_threads()
    # 缓存也用 float32：默认是 float16，与 PyTorch 的差就不只是权重的
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.verbosity, params.warmup = 0, False
    return xllamacpp.Server(params)


def _llama_cpp(path: Path, context: int):
    import llama_cpp

    model = llama_cpp.Llama(
        str(path),
        n_ctx=context,
        n_threads=torch.get_num_threads(),
        type_k=llama_cpp.GGML_TYPE_F32,
        type_v=llama_cpp.GGML_TYPE_F32,
        verbose=False,
    )

    def ask(request: dict) -> dict:
        return model.create_chat_completion(**request)

    return ask
