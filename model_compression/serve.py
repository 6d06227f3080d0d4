"""一个小的聊天服务：OpenAI 的接口，连续批处理，写在我们自己的生成上。

你会学到
  1. 十六个人同时问，一个一个地答，最后那个要等十五个人；坐在一起、一步各写一个 token，总的快几倍，谁也不必多等多少。
  2. 连续批处理（continuous batching）就是一个圈：有空位就坐下，在座的各写一个，说完的离座（batching.py，一屏）。
  3. 每个座位是 KV 缓存的一行，各写各的长短（slot_model.py）；vLLM 的分页只是把这一行切成小块，不必一开始占满。
  4. 服务不只是生成：队伍满了马上说忙（429），挂断的让出座位，请求写错了说清哪一项，关的时候把话说完。

怎么运行
  python serve.py                                   # 小世界的 SFT 模型，http://127.0.0.1:8000/v1
  python serve.py --model smollm2 --threads 2       # 真的权重；或 hub 名、文件夹
  python serve.py --engine openvino --precision int4
  CHAT_KEY=自己定的钥匙 python serve.py --host 0.0.0.0 --api_key_env CHAT_KEY
  curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\
       -d '{"model": "tiny-sft", "messages": [{"role": "user", "content": "你好"}], "stream": true}'
  python load_test.py                               # 给它打压力，另一个脚本

应当看到：一行网址，Ctrl-C（或 SIGTERM）关掉：在说的再给几秒说完。快几倍，见 load_test.py 与本文件夹的 README.md。

参考：Yu et al. 2022（Orca：连续批处理）；Kwon et al. 2023（vLLM：分页的 KV 缓存）；OpenAI Chat Completions API。
"""

from nlp_common.base.cli import run_main

import os
import signal
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import engines
from batching import Batcher
from chat_api import ChatHTTPServer, Service
from engine_slots import EngineSlots, LlamaBatcher
from nlp_common.base.arguments import COUNT, NOT_NEGATIVE, Limits, option, parse_arguments
from nlp_common.base.device import describe, pick_device
from nlp_common.base.errors import UserError
from nlp_common.hub.preset import announce, choose_preset
from nlp_common.lm.generation import stop_tokens
from nlp_common.lm.loading import load_causal_lm
from nlp_common.train.chain import chain_model
from serve_metrics import Metrics
from slot_model import TorchSlots

FULL_MODEL = "Qwen/Qwen2.5-0.5B-Instruct"
LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass
class ServeSettings:
    preset: Literal["auto", "tiny", "full"] = option(
        "tiny：小世界的 SFT 模型；full：" + FULL_MODEL + "；auto：有加速器又拿得到模型才用 full", "auto"
    )
    model: str | None = option("用哪个模型：hub 名、文件夹或 smollm2；默认看预设")
    source: Literal["hf", "modelscope"] = option("hub 名从哪里下载", "hf")
    name: str | None = option("请求里的 model 写什么；默认是模型的名字，小世界的是 tiny-sft")
    engine: Literal["torch", "onnx", "openvino", "llama"] = option("用哪个引擎算", "torch")
    precision: str | None = option("权重的精度，各引擎有的见 engines.py；默认 fp32（llama 是 f16）")
    batching: Literal["continuous", "static"] = option("谁说完谁让座，还是一批都说完才换", "continuous")
    slots: int = option("几个座位：最多几个请求一起算；1 就是一个一个地答", 16, COUNT)
    waiting: int = option("队伍最多多长，再来的就说忙（429）", 64, COUNT)
    context: int | None = option(
        "一个座位最多几个 token（提示加回答）；默认是模型的，最多 2048", None, Limits(at_least=16)
    )
    max_tokens: int = option("一个回答最多几个 token", 512, COUNT)
    max_body: int = option("一个请求最多几个字节", 1 << 20, COUNT)
    temperature: float = option("请求没有写 temperature 时用几", 1.0, Limits(at_least=0, at_most=2))
    thinking: Literal["on", "off"] = option("会思考的模型（Qwen3）先想一想再说", "off")
    host: str = option("听哪个地址；不是本机的，要先有钥匙", "127.0.0.1")
    port: int = option("听哪个端口；0 是随便哪个空着的", 8000, Limits(at_least=0, at_most=65535))
    api_key_env: str | None = option("钥匙在哪个环境变量里（不写在命令行：别人看得到）；没给就不要钥匙")
    grace: float = option("关的时候，在说的再给几秒说完", 5.0, NOT_NEGATIVE)
    threads: int = option("算的时候用几个线程", 1, COUNT)


def main(argv: list[str] | None = None) -> dict:
    settings = parse_arguments(ServeSettings, argv)
    key = read_key(settings)
    choice = choose_preset(
        settings.preset, settings.model, full_model=FULL_MODEL, needs_accelerator=True, source=settings.source
    )
    print(announce(choice))
    model = settings.model or (FULL_MODEL if choice.preset == "full" else None)
    found = chain_model("sft", model, settings.source)
    name = settings.name or (Path(model.rstrip("/")).name if model else "tiny-sft")
    return serve(open_service(found["path"], name, settings, key), settings)


def read_key(settings: ServeSettings) -> str:
    key = os.environ.get(settings.api_key_env or "", "").strip()
    if settings.api_key_env and not key:
        raise UserError(
            f"环境变量 {settings.api_key_env} 没有设，或是空的：先写 export {settings.api_key_env}=钥匙。"
        )
    if settings.host not in LOOPBACK and not key:
        raise UserError(
            f"--host {settings.host} 别的机器也连得上，要先有钥匙：加上 --api_key_env 环境变量的名字。"
            "（这里不加密；真的放到网上，前面还要有一个管 TLS 的反向代理。）"
        )
    return key


# ---------------------------------------------------------------- 引擎、座位、服务


def open_service(path: str, name: str, settings: ServeSettings, key: str = "") -> Service:
    """模型文件夹 → 一个转起来的服务（还没有开端口）。"""
    if settings.engine == "llama" and settings.batching == "static":
        raise UserError("--engine llama 自己排座位，只有 --batching continuous。")
    if settings.engine == "torch" and settings.precision in (None, "fp32"):
        tokenizer, model = load_causal_lm(path)
        model = model.to(pick_device())
        slots = TorchSlots(model, settings.slots, context_of(model.config, settings))
        return service_of(slots, tokenizer, name, settings, key)
    engine = engines.load(
        path, settings.engine, settings.precision, context=settings.context, slots=settings.slots
    )
    context = context_of(engine.config, settings)
    if settings.engine == "llama":
        metrics = Metrics()
        batcher = LlamaBatcher(engine, settings.slots, settings.waiting, metrics.finished)
        return finish_service(batcher, metrics, engine.tokenizer, name, context, settings, key)
    if settings.engine == "torch":  # bf16、int8
        slots = TorchSlots(engine.model, settings.slots, context)
    else:
        slots = EngineSlots(engine, settings.slots, context)
    return service_of(slots, engine.tokenizer, name, settings, key)


def context_of(config, settings: ServeSettings) -> int:
    longest = config.max_position_embeddings
    if settings.context and settings.context > longest:
        raise UserError(f"--context {settings.context} 太长：这个模型最多 {longest} 个 token。")
    return settings.context or min(longest, engines.CONTEXT)


def service_of(slots, tokenizer, name: str, settings: ServeSettings, key: str = "") -> Service:
    """几个座位（slot_model.SlotModel）→ 转起来的服务。"""
    metrics = Metrics()
    batcher = Batcher(
        slots, settings.batching == "static", settings.waiting, metrics.finished, settings.threads
    )
    return finish_service(batcher, metrics, tokenizer, name, slots.context, settings, key)


def finish_service(
    batcher, metrics, tokenizer, name: str, context: int, settings: ServeSettings, key: str
) -> Service:
    tokenizer.model_max_length = 1 << 30  # 长短由 Service.job 查，分词器不必另说一句
    return Service(
        name, tokenizer, batcher, metrics, stop_tokens(tokenizer), context, min(settings.max_tokens, context - 1),
        key, settings.max_body, settings.slots + settings.waiting + 64, settings.temperature,
        settings.thinking == "on", "enable_thinking" in (tokenizer.chat_template or ""),
    )  # fmt: skip


# ---------------------------------------------------------------- 开与关


def serve(service: Service, settings: ServeSettings) -> dict:
    """开着，直到 Ctrl-C 或 SIGTERM：先不收新的，在说的再给 grace 秒，然后才关端口。"""
    server = ChatHTTPServer(settings.host, settings.port, service)
    stopping = threading.Event()
    before = {
        each: signal.signal(each, lambda *_: stopping.set()) for each in (signal.SIGINT, signal.SIGTERM)
    }
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True)
    thread.start()
    cache = getattr(getattr(service.batcher, "model", None), "cache", None)
    memory = f"，KV 缓存 {cache.n_bytes / 1e6:,.0f} MB" if cache else ""
    print(
        f"{service.name}，{engines.NAMES[settings.engine]}，{describe(pick_device())}，{service.batcher.slots} 个座位，每个 {service.context} 个 token{memory}\n"
        f"服务开着：{server.url}/v1{'（要钥匙）' if service.key else ''}。按 Ctrl-C 关掉。",
        flush=True,
    )
    try:
        while not stopping.wait(0.5):  # 隔一会儿醒一次：Windows 上一直等着就听不见 Ctrl-C
            pass
        for each in before:  # 再按一次，马上就走
            signal.signal(each, signal.SIG_DFL)
        print("正在关：在说的说完就走 …", flush=True)
        service.batcher.close(settings.grace)
        wait_for_writers(server)
    finally:
        server.shutdown()
        server.server_close()
        for each, handler in before.items():
            signal.signal(each, handler)
    answered = dict(sorted(service.metrics.statuses.items()))
    said = "，".join(f"{status} 的 {n} 个" for status, n in answered.items()) or "0 个请求"
    print(f"关了。回了 {said}，写了 {service.metrics.completion_tokens} 个 token。")
    return {"answered": answered}


def wait_for_writers(server: ChatHTTPServer, seconds: float = 2.0) -> None:
    """算完了，还有没送完的：等送的线程把最后几行写出去。"""
    for _ in range(int(seconds / 0.05)):
        if server.answering == 0:
            return
        threading.Event().wait(0.05)


if __name__ == "__main__":
    run_main(main)
