"""一个模型，四种引擎，一样的用法：PyTorch、ONNX Runtime、OpenVINO、llama.cpp。

    engine = load("模型文件夹", "onnx", "int4")
    engine.logits([[1, 2, 3]])                    # (1, V)：接下来一个 token 的 logits
    engine.generate([[1, 2, 3], [4, 5]], 32)      # 贪心；一批里提示可以不一样长
    for row, token in engine.stream(prompts, 32, temperature=0.7, seed=1): …   # 写一个给一个

PyTorch、ONNX Runtime、OpenVINO 做的都是"一步"（step）：这一步的 token 与以前的 K、V 进去，logits 与加长了的 K、V 出来；
生成的循环是 nlp_common/lm/generation.py 里同一个。llama.cpp 自己管 K、V，把几个提示一起交给它。
"""

from __future__ import annotations

import contextlib
import queue
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn

import engine_files as files
import llama_engine
from nlp_common.base.errors import UserError
from nlp_common.lm.chatml import encode_text
from nlp_common.lm.generation import batches_by_length, pad_left, padded_positions, stop_tokens, stream_tokens
from nlp_common.lm.loading import end_chat_turns, load_causal_lm, load_tokenizer

PRECISIONS = {
    "torch": ("fp32", "bf16", "int8"),
    "onnx": ("fp32", "int8", "int4"),
    "openvino": ("fp32", "int8", "int4"),
    "llama": ("f16", "q8_0", "q4_0"),
}
NAMES = {"torch": "PyTorch", "onnx": "ONNX Runtime", "openvino": "OpenVINO", "llama": "llama.cpp"}
INSTALL = {
    "onnx": "pip install onnx onnx-ir onnxruntime",
    "openvino": "pip install onnx onnx-ir onnxruntime openvino",
    "llama": llama_engine.INSTALL,
}
ONNX = ("onnx", "onnx_ir", "onnxruntime")  # onnxruntime 压权重的工具要 onnx_ir，自己却不装它
NEEDS = {"torch": (), "onnx": ONNX, "openvino": (*ONNX, "openvino")}
CONTEXT = 2048  # 最多给多长的前文留地方：llama.cpp 一开始就要占下
SLOTS = 8  # llama.cpp 一次最多一起写几个


def missing(engine: str) -> str | None:
    """没有装：pip 的命令；装了是 None。"""
    there = find_spec("xllamacpp") if engine == "llama" else all(map(find_spec, NEEDS[engine]))
    return None if there else INSTALL[engine]


def installed() -> list[str]:
    return [engine for engine in PRECISIONS if missing(engine) is None]


def load(
    folder: str,
    engine: str = "torch",
    precision: str | None = None,
    cache: str | None = None,
    context: int | None = None,
    slots: int = SLOTS,
):
    """模型文件夹 → 能用的引擎；没给 precision 是第一种。要导出的文件放在 cache（默认 outputs/engines），写过就不再写。"""
    if engine not in PRECISIONS:
        raise UserError(f"不认识引擎 {engine}，可以是 {'、'.join(PRECISIONS)}。")
    precision = precision or PRECISIONS[engine][0]
    if precision not in PRECISIONS[engine]:
        raise UserError(f"{NAMES[engine]} 没有 {precision}，可以是 {'、'.join(PRECISIONS[engine])}。")
    if command := missing(engine):
        raise UserError(f"没有装 {NAMES[engine]}：{command}。")
    path = Path(folder)
    tokenizer = load_tokenizer(folder)
    kinds = {"torch": TorchEngine, "onnx": OnnxEngine, "openvino": OpenVinoEngine, "llama": LlamaEngine}
    found = kinds[engine](path, tokenizer, precision, cache, context, slots)
    found.engine, found.precision = engine, precision
    return found


class Engine:
    """几种引擎共有的：检查长短，成批生成。子类给出 step。"""

    engine: str
    precision: str
    bytes_read: int  # 写一个 token 要读几个字节的权重

    def __init__(self, tokenizer, config, context: int | None):
        self.tokenizer, self.config = tokenizer, config
        longest = config.max_position_embeddings
        self.context = min(context or CONTEXT, longest)
        self.stop_ids = stop_tokens(tokenizer)

    def step(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past
    ) -> tuple[Tensor, list]:
        """input_ids、position_ids (B, T)，attention_mask (B, P + T)，past 是每层的 K、V (B, 头数, P, 维数)，第一步是 None。

        → logits (B, V)，加长到 P + T 的 K、V。
        """
        raise NotImplementedError

    def __call__(self, input_ids, attention_mask, position_ids, past_key_values=None, **_) -> SimpleNamespace:
        """像 transformers 的模型那样调用：stream_tokens 就不必知道它是谁。"""
        logits, past = self.step(input_ids, attention_mask, position_ids, past_key_values)
        return SimpleNamespace(logits=logits[:, None], past_key_values=past)

    @torch.no_grad()
    def logits(self, prompts: list[list[int]]) -> Tensor:
        """每个提示之后下一个 token 的 logits，(B, V)；提示可以不一样长。"""
        self.check(prompts)
        ids, mask = pad_left(prompts, self.tokenizer.pad_token_id)
        return self.step(ids, mask, padded_positions(mask), None)[0].float()

    def stream(
        self,
        prompts: list[list[int]],
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: bool = True,
    ) -> Iterator[tuple[int, int]]:
        """一批提示，写出一个就给一个：(第几个提示, token)；结束符也给。stop=False 不理会结束符，写满为止（量速度用）。

        写到上下文装不下为止。不要了，就 close() 这个生成器。
        """
        max_new_tokens = self.check(prompts, max_new_tokens)
        stops = self.stop_ids if stop else []
        ids, mask = pad_left(prompts, self.tokenizer.pad_token_id)
        generator = torch.Generator().manual_seed(seed)
        ended = [False] * len(prompts)
        for tokens in stream_tokens(
            self, ids, mask, max_new_tokens, stops, self.tokenizer.pad_token_id, temperature, top_p, generator
        ):
            for row, token in enumerate(tokens.tolist()):
                if not ended[row]:
                    yield row, token
                    ended[row] = token in stops

    def generate(
        self, prompts: list[list[int]], max_new_tokens: int, batch_size: int = 32, **how
    ) -> list[list[int]]:
        """每个提示的回复（token）；自己说完的以结束符结尾。长短相近的排在一批里，返回的次序与 prompts 相同。"""
        replies: list[list[int]] = [[] for _ in prompts]
        for batch in batches_by_length([len(prompt) for prompt in prompts], batch_size):
            for row, token in self.stream([prompts[i] for i in batch], max_new_tokens, **how):
                replies[batch[row]].append(token)
        return replies

    def check(self, prompts: list[list[int]], max_new_tokens: int = 1) -> int:
        """提示空着、太长是 UserError；返回还写得下几个 token。"""
        if not prompts or not all(prompts):
            raise UserError("提示是空的：至少要有一个 token。")
        longest = max(map(len, prompts))
        if longest >= self.context:
            raise UserError(
                f"提示有 {longest} 个 token，上下文一共 {self.context} 个，没有地方写回答：缩短它。"
            )
        return min(max_new_tokens, self.context - longest)

    def close(self) -> None:
        """不再用了。"""


# ---------------------------------------------------------------- PyTorch


class TorchEngine(Engine):
    def __init__(self, folder: Path, tokenizer, precision: str, *rest):
        _, self.model = load_causal_lm(str(folder))
        super().__init__(tokenizer, self.model.config, rest[1])
        end_chat_turns(self.model, self.tokenizer)
        self.model.eval()
        if precision == "bf16":
            self.model = self.model.to(torch.bfloat16)
        if precision == "int8":
            self.model = dynamic_int8(self.model)
        self.bytes_read = linear_bytes(self.model)
        self.one_step = files.Step(self.model)  # 导出成 ONNX 的也是它

    @torch.no_grad()
    def step(self, input_ids, attention_mask, position_ids, past):
        logits, *past = self.one_step(input_ids, attention_mask, position_ids, *(past or []))
        return logits, past


def dynamic_int8(model: nn.Module) -> nn.Module:
    """线性层的权重存成 int8（每行一个刻度），输入到了再量化：PyTorch 自带的动态量化，载入时当场做。"""
    from torch.ao.quantization import per_channel_dynamic_qconfig, quantize_dynamic

    with warnings.catch_warnings():  # 将来的版本里要改用 torchao 的，现在的这一版还在
        warnings.filterwarnings("ignore", message="torch.ao.quantization is deprecated.*")
        warnings.filterwarnings("ignore", message="torch.quantize_per_tensor.*")
        return quantize_dynamic(model, {nn.Linear: per_channel_dynamic_qconfig}, inplace=True)


def linear_bytes(model: nn.Module) -> int:
    """线性层（输出层在内）的权重几个字节；嵌入只取几行，不算。"""
    total = 0
    for module in model.modules():
        if isinstance(module, nn.Linear):
            total += sum(p.numel() * p.element_size() for p in module.parameters())
        elif type(module).__module__ == "torch.ao.nn.quantized.dynamic.modules.linear":
            weight = module.weight()
            total += weight.numel() * weight.element_size() + 4 * len(weight)  # 每行一个刻度
    return total


# ---------------------------------------------------------------- ONNX Runtime、OpenVINO


class OnnxEngine(Engine):
    def __init__(self, folder: Path, tokenizer, precision: str, cache, context, _slots):
        import onnxruntime

        super().__init__(tokenizer, read_config(folder), context)
        source = files.prepare(folder, "onnx", precision, cache)
        self.bytes_read = files.noted(source)["bytes_read"]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # 空等的线程不占着核
        with readable(source):
            self.session = onnxruntime.InferenceSession(
                str(source / "model.onnx"), options, providers=["CPUExecutionProvider"]
            )
        self.names = ["input_ids", "attention_mask", "position_ids", *files.past_names(self.config)]

    def step(self, input_ids, attention_mask, position_ids, past):
        past = past or files.empty_past(self.config, len(input_ids))
        inputs = [tensor.numpy() for tensor in (input_ids, attention_mask, position_ids, *past)]
        logits, *past = map(
            torch.from_numpy, self.session.run(None, dict(zip(self.names, inputs, strict=True)))
        )
        return logits, past


class OpenVinoEngine(Engine):
    def __init__(self, folder: Path, tokenizer, precision: str, cache, context, _slots):
        import openvino

        super().__init__(tokenizer, read_config(folder), context)
        source = files.prepare(folder, "openvino", precision, cache)
        self.bytes_read = files.noted(source)["bytes_read"]
        hints = {"INFERENCE_NUM_THREADS": torch.get_num_threads()}
        if precision == "fp32":
            hints["INFERENCE_PRECISION_HINT"] = "f32"  # 有 AMX 的处理器上，它自己会换成 bf16
        with readable(source):
            compiled = openvino.Core().compile_model(source / "model.xml", "CPU", hints)
        self.request = compiled.create_infer_request()
        self.names = ["input_ids", "attention_mask", "position_ids", *files.past_names(self.config)]

    def step(self, input_ids, attention_mask, position_ids, past):
        past = past or files.empty_past(self.config, len(input_ids))
        inputs = [tensor.numpy() for tensor in (input_ids, attention_mask, position_ids, *past)]
        found = self.request.infer(dict(zip(self.names, inputs, strict=True)), share_inputs=True)
        logits, *past = (torch.from_numpy(found[place]) for place in range(len(found)))
        return logits, past


def read_config(folder: Path):
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder, trust_remote_code=False)


@contextlib.contextmanager
def readable(source: Path) -> Iterator[None]:
    """引擎读不了写好的文件：说出是哪个文件夹，怎样重来，不是一屏 C++ 的报错。"""
    try:
        yield
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise UserError(f"{source} 里的文件读不了（{first}）：删掉这个文件夹再运行，会重新写。") from error


# ---------------------------------------------------------------- llama.cpp


class LlamaEngine(Engine):
    """xllamacpp：几个提示一次交给它，它自己管 K、V，自己排成一批（continuous batching）。几个线程可以同时用。"""

    def __init__(self, folder: Path, tokenizer, precision: str, cache, context, slots):
        super().__init__(tokenizer, read_config(folder), context)
        source = files.prepare(folder, "llama", precision, cache)
        self.bytes_read = files.noted(source)["bytes_read"]
        with readable(source):
            self.server = llama_engine.open_server(source / "model.gguf", self.context, slots)
        self.slots, self.letter = slots, encode_text(tokenizer, "a")[0]

    def logits(self, prompts: list[list[int]]) -> Tensor:
        """同上；llama.cpp 给的是 log 概率，与 logits 只差一个常数。"""
        self.check(prompts)
        size = self.config.vocab_size
        found = torch.full((len(prompts), size), float("-inf"))
        for row, prompt in enumerate(prompts):
            # 抽出的若是结束符或半个汉字，它就不给概率：让它必抽一个字母，给出的仍是没有动过的概率
            chosen = {"n_predict": 1, "temperature": 0.0, "logit_bias": [[self.letter, 1e4]]}
            answer = self.ask({"prompt": prompt, "n_probs": size, **chosen})
            best = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
            found[row, [each["id"] for each in best]] = torch.tensor([each["logprob"] for each in best])
        return found

    def generate(self, prompts, max_new_tokens, batch_size: int = 32, **how) -> list[list[int]]:
        """同上；几个线程各问一个，它自己排成一批。"""
        max_new_tokens = self.check(prompts, max_new_tokens)
        with ThreadPoolExecutor(self.slots) as threads:
            return list(threads.map(partial(self.whole, max_new_tokens=max_new_tokens, **how), prompts))

    def whole(self, prompt: list[int], max_new_tokens: int, **how) -> list[int]:
        """一个提示的回复，一次给全：一个 token 也不少。"""
        request = self.request([prompt], max_new_tokens, **how) | {"stream": False}
        return self.ask(request)["__verbose"]["tokens"]

    def request(self, prompts, max_new_tokens, temperature=0.0, top_p=1.0, seed=0, stop=True) -> dict:
        how = {"temperature": temperature, "top_p": top_p, "seed": seed, "ignore_eos": not stop}
        return {"prompt": prompts, "n_predict": max_new_tokens, "stream": True, "verbose": True, **how}

    def stream(self, prompts, max_new_tokens, **how):
        """同上；一个汉字要几个 token 的，写全了才一起给，token 照文字重新分：文字一个不差，编号可能不同。"""
        request = self.request(prompts, self.check(prompts, max_new_tokens), **how)
        events: queue.Queue = queue.Queue()
        left = threading.Event()

        def hear(answer: dict | None) -> bool:
            events.put(answer)
            return left.is_set()  # True：不要了，停下

        def run() -> None:
            try:
                self.ask(request, hear)
            except BaseException as error:  # 交给读的那一边去抛
                events.put(error)
            events.put(StopIteration())

        worker = threading.Thread(target=run, daemon=True)
        worker.start()
        try:
            while not isinstance(event := events.get(), StopIteration):
                if isinstance(event, BaseException):
                    raise event
                yield from self.tokens_in(event)
        finally:
            left.set()
            worker.join()

    def ask(self, request: dict, hear=None) -> dict:
        exact = {"cache_prompt": False, "top_k": 0, "min_p": 0.0, "return_tokens": True, **request}
        answer = (
            self.server.handle_completions(exact, hear) if hear else self.server.handle_completions(exact)
        )
        refuse_error(answer or {})
        return answer

    def tokens_in(self, event: dict | None) -> list[tuple[int, int]]:
        """llama.cpp 的一条流 → [(第几个提示, token)]；说完了的那一条没有新 token。"""
        if not event:
            return []
        refuse_error(event)
        choice, tokens = event["choices"][0], event.get("__verbose", {}).get("tokens", [])
        if choice["text"] and self.tokenizer.decode(tokens) != choice["text"]:
            tokens = encode_text(self.tokenizer, choice["text"])
        return [(choice["index"], token) for token in tokens]

    def close(self) -> None:
        self.server = None


def refuse_error(answer: dict) -> None:
    if "error" in answer:
        raise UserError(f"llama.cpp 不能回答：{answer['error'].get('message', answer['error'])}")
