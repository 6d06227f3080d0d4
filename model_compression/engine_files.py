"""引擎要读的文件：从一个 Hugging Face 的模型文件夹写出 ONNX、OpenVINO、GGUF，写好了留着，下次直接用。

一张图带着 KV 缓存：输入这一步的 token 与到此为止的 K、V，输出下一个 token 的 logits 与加长了的 K、V，一步一步地生成就靠它。
ONNX 用 torch.onnx.export，OpenVINO 直接读这个 ONNX，都不经过 optimum（装它会换掉 torch 与 transformers）。
int8、int4 的权重 ONNX Runtime 与 OpenVINO 用的是同一个文件：两家的差别就只在算得多快。
"""

from __future__ import annotations

import json
import logging
import shutil
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from filelock import FileLock
from torch import nn
from transformers import DynamicCache

from nlp_common.base.errors import UserError
from nlp_common.base.runs import file_sha256, write_json
from nlp_common.lm.loading import load_causal_lm

HOME = Path(__file__).resolve().parent
DONE = "engine.json"  # 全部写完才写它：各文件多大、一步要读几个字节
GROUP = 32  # int8、int4 每几个数一个刻度，与 GGUF 的一块相同
EMBEDDING_BITS = 8  # int4 的文件里，输出层仍是八位：它最怕压
TOO_LARGE = 1_900_000_000  # protobuf 的一个文件最多 2 GB，再大的权重另放一个文件
FORMAT = 1  # 写法改了就加一：以前写的不再用


def prepare(folder: Path, engine: str, precision: str, cache: str | None = None) -> Path | None:
    """引擎要读的文件所在的文件夹，还没有就写；PyTorch 直接读模型，不用写。"""
    if engine == "torch":
        return None
    writer = {"onnx": onnx_writer, "openvino": openvino_writer, "llama": gguf_writer}[engine]
    return cached_files(folder, f"{engine}-{precision}", partial(writer, folder, precision, cache), cache)


def onnx_writer(folder: Path, precision: str, cache: str | None, target: Path) -> dict:
    if precision == "fp32":
        return write_onnx(load_causal_lm(str(folder))[1], target, str(folder))
    source = prepare(folder, "onnx", "fp32", cache)  # 小的从 float32 的来
    return write_small_onnx(source, target, int(precision.removeprefix("int")))


def openvino_writer(folder: Path, precision: str, cache: str | None, target: Path) -> dict:
    return write_openvino(prepare(folder, "onnx", precision, cache), target)


def gguf_writer(folder: Path, precision: str, _cache: str | None, target: Path) -> dict:
    tokenizer, model = load_causal_lm(str(folder))
    return write_gguf(model, tokenizer, target, precision, folder.name)


def cached_files(folder: Path, name: str, write: Callable[[Path], dict], cache: str | None = None) -> Path:
    """folder 里的模型写成的 name（如 onnx-int4）放在哪里；还没有，或坏了，就用 write(文件夹) 写一份。

    write 返回要记下的数（bytes_read）。先写进旁边的临时文件夹，写完、记下每个文件的大小才改名：磁盘满了、按了 Ctrl-C，
    都不会留下半份。两个进程同时来，后一个等前一个写完。
    """
    root = Path(cache) if cache else HOME / "outputs" / "engines"
    target = root / weights_id(folder) / name
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_name(f".{name}.lock")):
        if target.exists():
            if whole(target):
                return target
            print(f"{target} 不完整（少了文件，或大小不对），重新写。")
            shutil.rmtree(target)
        temporary = target.with_name(f".{name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)  # 上次被打断留下的
        check_space(root, folder)
        temporary.mkdir()
        try:
            found = write(temporary)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        sizes = {path.name: path.stat().st_size for path in sorted(temporary.iterdir())}
        write_json(temporary / DONE, {"files": sizes, **found})
        temporary.rename(target)
    return target


def check_space(root: Path, folder: Path) -> None:
    """最大的一份（float32 的 ONNX）是 bfloat16 的权重的两倍半；不够就不开始。"""
    needed = 3 * sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    if (free := shutil.disk_usage(root).free) < needed:
        raise UserError(
            f"{root} 所在的盘只剩 {free / 1e6:,.0f} MB，要 {needed / 1e6:,.0f} MB：清出空间再运行。"
        )


def whole(target: Path) -> bool:
    """写完了，每个文件都还是那么大。"""
    try:
        sizes = json.loads((target / DONE).read_text(encoding="utf-8"))["files"]
        return all((target / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError, AttributeError):
        return False


def noted(target: Path) -> dict:
    return json.loads((target / DONE).read_text(encoding="utf-8"))


def weights_id(folder: Path) -> str:
    """权重与结构的指纹：换了模型，旧的文件就不会被当成它的。"""
    files = [*sorted(folder.glob("*.safetensors")), folder / "config.json"]
    return "-".join([f"{FORMAT}", *(file_sha256(path)[:12] for path in files)])[:60]


# ---------------------------------------------------------------- ONNX


class Step(nn.Module):
    """生成的一步，输入输出都是平常的张量：导出的就是它。"""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask, position_ids, *past):
        """input_ids、position_ids (B, T)，attention_mask (B, P + T)，past 是每层的 K、V (B, 头数, P, 维数)。

        → logits (B, V)，与加长到 P + T 的 K、V。
        """
        cache = DynamicCache(list(zip(past[::2], past[1::2], strict=True)))
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return (out.logits[:, -1], *(part for layer in out.past_key_values.layers for part in (layer.keys, layer.values)))  # fmt: skip


def past_names(config) -> list[str]:
    return [f"past_{part}_{layer}" for layer in range(config.num_hidden_layers) for part in ("key", "value")]


def empty_past(config, batch: int, length: int = 0, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """还没有前文时的 K、V：长度 0。"""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    shape = (batch, config.num_key_value_heads, length, head)
    return [torch.zeros(shape, dtype=dtype) for _ in range(2 * config.num_hidden_layers)]


def write_onnx(model: nn.Module, folder: Path, name: str) -> dict:
    """model.onnx：float32，批、步长、前文长度都可变。name 是报错时说的。"""
    kinds = set(getattr(model.config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        raise UserError(
            f"{name} 的注意力是 {'、'.join(sorted(kinds))}，这里只会导出看得到全部前文的：用 PyTorch。"
        )
    import onnx

    model = plain(model)
    names = past_names(model.config)
    outputs = [name.replace("past", "present") for name in names]
    example = (
        torch.ones(2, 3, dtype=torch.long),
        torch.ones(2, 8, dtype=torch.long),
        torch.arange(5, 8).repeat(2, 1),
        *empty_past(model.config, 2, 5),
    )
    axes = {name: {0: "batch", 1: "step"} for name in ("input_ids", "position_ids")}
    axes |= {"attention_mask": {0: "batch", 1: "total"}, "logits": {0: "batch"}}
    axes |= {name: {0: "batch", 2: "past"} for name in names}
    axes |= {name: {0: "batch", 2: "total"} for name in outputs}
    with torch.no_grad(), warnings.catch_warnings():
        # 跟着走一遍（trace）的老写法：新的写法（dynamo=True）慢几百倍，tiny 模型也要半分钟。它的警告说的是"照这一遍走的记"，
        # 走的是不是别的批、别的长度也对，测试一一比过。
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)
        warnings.filterwarnings("ignore", message=".*legacy TorchScript-based ONNX export.*")
        warnings.filterwarnings("ignore", message="Exporting aten::index operator.*")
        warnings.filterwarnings("ignore", message="The feature will be removed", category=DeprecationWarning)
        torch.onnx.export(
            Step(model),
            example,
            str(folder / "model.onnx"),
            input_names=["input_ids", "attention_mask", "position_ids", *names],
            output_names=["logits", *outputs],
            dynamic_axes=axes,
            opset_version=17,
            dynamo=False,
        )
    return {"bytes_read": onnx_bytes_read(onnx.load(folder / "model.onnx", load_external_data=False))}


def plain(model: nn.Module) -> nn.Module:
    """去掉 nlp_common/fast 装上的快写法（每个模块自己的 forward），导出原来的算子。"""
    for module in model.modules():
        module.__dict__.pop("forward", None)
    return model.eval()


def write_small_onnx(source: Path, folder: Path, bits: int) -> dict:
    """source 里的 model.onnx → 权重 bits 位的一份：每个输出行、每 GROUP 个数一个刻度，四舍五入（RTN）。

    矩阵乘法换成 MatMulNBits，它一边还原一边乘，读的就是小的；嵌入只取几行，不压。
    """
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    graph = onnx.load(source / "model.onnx")
    heads = [node.name for node in graph.graph.node if "lm_head" in node.name and node.op_type == "MatMul"]
    passes = [(bits, heads), (EMBEDDING_BITS, [])] if bits < EMBEDDING_BITS else [(bits, [])]
    log = logging.getLogger("onnxruntime.quantization.matmul_nbits_quantizer")
    log.setLevel(logging.WARNING)  # 它每个算子说一行
    for its_bits, kept in passes:
        quantizer = MatMulNBitsQuantizer(
            graph, bits=its_bits, block_size=GROUP, is_symmetric=True, accuracy_level=4, nodes_to_exclude=kept
        )
        quantizer.process()
        graph = quantizer.model.model
    large = sum(len(weight.raw_data) for weight in graph.graph.initializer) > TOO_LARGE
    bytes_read = onnx_bytes_read(graph)
    onnx.save(graph, folder / "model.onnx", save_as_external_data=large, location="model.data")
    return {"bytes_read": bytes_read}


def onnx_bytes_read(graph) -> int:
    """生成一个 token 要读几个字节的权重：全部，除了只被 Gather 取几行的嵌入。"""
    import numpy as np
    from onnx import helper

    readers: dict[str, set[str]] = {}
    for node in graph.graph.node:
        for name in node.input:
            readers.setdefault(name, set()).add(node.op_type)
    total = 0
    for weight in graph.graph.initializer:
        if readers.get(weight.name, set()) != {"Gather"}:
            total += int(np.prod(weight.dims)) * helper.tensor_dtype_to_np_dtype(weight.data_type).itemsize
    return total


# ---------------------------------------------------------------- OpenVINO 与 GGUF


def write_openvino(source: Path, folder: Path) -> dict:
    """source 里的 model.onnx → OpenVINO 自己的格式（model.xml、model.bin）；MatMulNBits 也认得。"""
    import openvino

    # openvino.convert_model 读 ONNX 用的也是 read_model，只是还要连网报一次使用统计，断网时白等十秒
    model = openvino.Core().read_model(source / "model.onnx")
    openvino.save_model(model, folder / "model.xml", compress_to_fp16=False)
    return {"bytes_read": noted(source)["bytes_read"]}


def write_gguf(model, tokenizer, folder: Path, wanted: str, name: str) -> dict:
    """model.gguf，export_gguf.py 手写的那一种；q4_0 的嵌入（也是输出层）是 q8_0。"""
    from export_gguf import check_model, export
    from gguf_format import read_gguf

    model = plain(model)
    check_model(model, [wanted], "q8_0", name)
    path = folder / "model.gguf"
    export(model, tokenizer, path, wanted, "q8_0", name, "auto")
    tensors = read_gguf(path).tensors
    untied = "output.weight" in tensors  # 嵌入不兼任输出层，就只取几行
    read = [info.n_bytes for key, info in tensors.items() if not (untied and key == "token_embd.weight")]
    return {"bytes_read": sum(read)}
