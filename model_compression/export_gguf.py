"""导出成 GGUF：llama.cpp、Ollama、LM Studio 用的一个文件，权重、分词器、对话模板都在里面。

学到什么：GGUF 里有什么，一个字节一个字节地写出来；Q8_0、Q4_0 怎样把 32 个数压成一块，各丢掉多少；
分词器的哪几项写错了，llama.cpp 不报错，只是胡说。

运行：
    python export_gguf.py                                # Qwen 链 tiny 预设的 SFT 模型，半分钟
    python export_gguf.py --model 文件夹                 # 任何 SFT 的结果、合并好的 LoRA（Qwen2、Llama 结构）
    python export_gguf.py --model smollm2 --output_dir outputs/smollm2
    python export_gguf.py --formats q4_0 --embedding q4_0 --output_dir outputs/q4   # 嵌入也压成四位
    cd outputs/tiny/export_gguf && ollama create mine -f Modelfile && ollama run mine

预期输出（实测见本文件夹的 README.md）：F16 一半大小，答案一字不差；Q8_0 约四分之一；Q4_0 约六分之一，一百句里两句说法变了，照样答对。
装了 llama.cpp（pip install xllamacpp）就用它答同样的题：F16 与 PyTorch 的贪心回答相同。

参考：ggml 的 docs/gguf.md；llama.cpp 的 convert_hf_to_gguf.py。文件的写法在 gguf_format.py，压缩在 gguf_blocks.py。
"""

from nlp_common.base.cli import run_main

import copy
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch

import llama_engine
from gguf_blocks import BLOCK, decode, encode
from gguf_checks import answers, through_transformers
from gguf_format import GGUF, KINDS, TensorInfo, read_gguf, write_gguf
from gguf_tokenizer import tokenizer_metadata
from modelfile import default_system, modelfile
from nlp_common.base.arguments import COUNT, option
from nlp_common.base.errors import UserError
from nlp_common.draw.plots import bar_chart
from nlp_common.lm.loading import load_causal_lm
from nlp_common.lm.replies import MAX_REPLY, reply_to, token_kl
from nlp_common.tiny import world
from nlp_common.train.chain import chain_model
from nlp_common.train.lesson import run_lesson
from nlp_common.train.settings import LessonSettings, parse_settings
from nlp_common.train.stage import Stage

HOME = Path(__file__).resolve().parent
PRESETS = {"tiny": {"n_questions": 512}, "full": {"n_questions": 64}}
FULL_MODEL = "Qwen/Qwen2.5-0.5B-Instruct"
FILE_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 7}  # general.file_type：文件里多数权重的存法
TINY_WORLD = 2000  # 词表比这小的，是小世界的模型：题与标准答案用小世界的
OTHER_QUESTIONS = (
    "What is the capital of France?",
    "List three colors.",
    "What do bees make?",
    "Write one sentence about the sea.",
    "你好",
    "一年有几个月？",
    "Is the sun a star?",
    "Name a fruit that is yellow.",
)


@dataclass
class ExportSettings(LessonSettings):
    COMMON: ClassVar[dict] = {}

    model: str | None = option("导出哪个模型：文件夹、hub 名或 smollm2；默认是 Qwen 链 tiny 预设的 SFT 模型")
    source: Literal["hf", "modelscope"] = option("hub 名从哪里下载", "hf")
    formats: str = option("写成哪几种，逗号隔开：f32、f16、q8_0、q4_0", "f16,q8_0,q4_0")
    embedding: str = option("q4_0 的文件里，嵌入与输出层用哪一种：它们最怕压缩", "q8_0", choices=[*KINDS])
    pre: str = option("切分规则在 llama.cpp 里的名字；auto 自己认", "auto")
    n_questions: int | None = option("用几道留出的题量", limits=COUNT)

    def check(self) -> None:
        self.formats = self.formats.replace(" ", "").lower()
        for name in self.formats.split(","):
            if name not in KINDS:
                raise UserError(
                    f"--formats 不认识 {name or '空的一项'}，可以是 {'、'.join(KINDS)}，逗号隔开。"
                )


# ---------------------------------------------------------------- 1. 名字与形状：transformers → GGUF

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    """model.layers.3.mlp.up_proj.weight → blk.3.ffn_up.weight"""
    module, _, kind = name.rpartition(".")
    if module.startswith("model.layers."):
        _, _, layer, inside = module.split(".", 3)
        return f"blk.{layer}.{NAMES[inside]}.{kind}"
    return f"{NAMES[module]}.{kind}"


def weights_of(model) -> dict[str, torch.Tensor]:
    """GGUF 的名字 → 权重；输出层与嵌入共用的，只写一份。"""
    weights = {gguf_name(name): p.detach() for name, p in model.named_parameters()}
    if model.config.tie_word_embeddings:
        weights.pop("output.weight", None)
    return weights


def permute(weight: torch.Tensor, n_heads: int) -> torch.Tensor:
    """Llama 的 Q、K：transformers 的 RoPE 把第 i 与 i + d/2 维配成对，llama.cpp 的 llama 把第 2i 与 2i+1 维配成对。

    行换个次序就是同一个模型。Qwen2 在 llama.cpp 里也是前一半配后一半，不用换。
    """
    half = weight.shape[0] // n_heads // 2
    return weight.unflatten(0, (n_heads, 2, half)).transpose(1, 2).reshape(weight.shape)


def unpermute(weight: torch.Tensor, n_heads: int) -> torch.Tensor:
    half = weight.shape[0] // n_heads // 2
    return weight.unflatten(0, (n_heads, half, 2)).transpose(1, 2).reshape(weight.shape)


def heads_of(name: str, config) -> int:
    """要换次序的权重有几个头；不用换的是 0。"""
    if config.model_type != "llama":
        return 0
    return {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(
        name.split(".")[-2], 0
    )


def kind_of(name: str, weight: torch.Tensor, wanted: str, embedding: str) -> str:
    """这个张量用哪种存法：归一的增益与偏置总是 f32，它们小，llama.cpp 也要求这样。"""
    if weight.dim() == 1:
        return "f32"
    if wanted == "q4_0" and name in ("token_embd.weight", "output.weight"):
        return embedding
    return wanted


# ---------------------------------------------------------------- 2. 元数据：结构与分词器


def metadata_of(model, tokenizer, wanted: str, name: str, pre: str) -> dict:
    """键 → 值；次序就是写进文件的次序。"""
    config = model.config
    kind = config.model_type
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    metadata = {
        "general.architecture": kind,
        "general.name": name,
        "general.file_type": FILE_TYPES[wanted],
        "general.quantization_version": 2,
        f"{kind}.context_length": config.max_position_embeddings,
        f"{kind}.embedding_length": config.hidden_size,
        f"{kind}.block_count": config.num_hidden_layers,
        f"{kind}.feed_forward_length": config.intermediate_size,
        f"{kind}.attention.head_count": config.num_attention_heads,
        f"{kind}.attention.head_count_kv": config.num_key_value_heads,
        f"{kind}.rope.freq_base": float(config.rope_parameters["rope_theta"]),
        f"{kind}.attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        f"{kind}.vocab_size": config.vocab_size,
    }
    if kind == "llama":
        metadata["llama.rope.dimension_count"] = head
    return metadata | tokenizer_metadata(tokenizer, config, pre)


def check_model(model, formats: list[str], embedding: str, path: str) -> None:
    """这里不会写的，开始之前就说。"""
    config = model.config
    if config.model_type not in ("qwen2", "llama"):
        raise UserError(
            f"{path} 是 {config.model_type}，这里只会写 Qwen2（Qwen1.5、Qwen2、Qwen2.5）与 Llama 结构的："
            "别的结构用 llama.cpp 的 convert_hf_to_gguf.py。"
        )
    rope = config.rope_parameters or {}
    if rope.get("rope_type", "default") != "default":
        raise UserError(
            f"{path} 的位置编码是 {rope['rope_type']}（拉长过的），这里只写平常的 RoPE：用 convert_hf_to_gguf.py。"
        )
    if getattr(config, "use_sliding_window", False):
        raise UserError(f"{path} 用滑动窗口的注意力，llama.cpp 的 qwen2 没有这一项，写出来答案会不同。")
    head = getattr(config, "head_dim", None) or 0
    if head and head * config.num_attention_heads != config.hidden_size:
        raise UserError(f"{path} 的一个头有 {head} 维，不是宽度除以头数，这里不会写。")
    for wanted in formats:
        for name, weight in weights_of(model).items():
            kind = kind_of(name, weight, wanted, embedding)
            if KINDS[kind][1] > 1 and weight.shape[1] % BLOCK:
                raise UserError(
                    f"{name} 的一行有 {weight.shape[1]} 个数，不是 {BLOCK} 的倍数，写不成 {kind}：加 --formats f16。"
                )


# ---------------------------------------------------------------- 3. 写出，读回


def export(model, tokenizer, path: Path, wanted: str, embedding: str, name: str, pre: str) -> None:
    """model → 一个 GGUF 文件。"""
    weights = weights_of(model)
    infos = [
        TensorInfo(key, tuple(weight.shape), kind_of(key, weight, wanted, embedding))
        for key, weight in weights.items()
    ]
    write_gguf(path, metadata_of(model, tokenizer, wanted, name, pre), infos, encoded(model, weights, infos))


def encoded(model, weights: dict, infos: list[TensorInfo]) -> Iterator[np.ndarray]:
    for info in infos:
        weight = weights[info.name].float().cpu()
        if n_heads := heads_of(info.name, model.config):
            weight = permute(weight, n_heads)
        yield encode(weight.numpy(), info.kind)


@torch.no_grad()
def import_weights(file: GGUF, model):
    """GGUF 里的权重还原成 float32，装进 model 的一份：llama.cpp 用的就是这些数。"""
    model = copy.deepcopy(model)
    for name, parameter in weights_of(model).items():
        info = file.tensors[name]
        weight = torch.from_numpy(decode(file.raw(name), info.kind, info.shape))
        if n_heads := heads_of(name, model.config):
            weight = unpermute(weight, n_heads)
        parameter.copy_(weight)
    return model


# ---------------------------------------------------------------- 4. 全课


def learn(stage: Stage, found: dict) -> dict:
    settings = stage.settings
    tokenizer, model = load_causal_lm(found["path"])
    model.eval()
    formats = list(dict.fromkeys(settings.formats.split(",")))
    check_model(model, formats, settings.embedding, found["path"])
    name = Path(settings.model or "tiny-sft").name
    check_space(stage.path.parent, model, formats)
    tiny = len(tokenizer) < TINY_WORLD
    questions = world.heldout_questions(settings.n_questions, seed=0) if tiny else other_questions(tokenizer)
    n_parameters = sum(weight.numel() for weight in weights_of(model).values())
    reference = reply_to(model, tokenizer, questions, MAX_REPLY)
    metrics: dict = {"n_parameters": n_parameters, "bytes_float32": 4 * n_parameters}
    if tiny:
        metrics["qa_accuracy"] = answers(questions, reference, reference)["qa_accuracy"]

    def write(folder: Path) -> None:  # 写在临时文件夹里，全部写完、量完才改名：磁盘满了也不留下半个
        for wanted in formats:
            path = folder / f"model-{wanted}.gguf"
            export(model, tokenizer, path, wanted, settings.embedding, name, settings.pre)
            file = read_gguf(path)
            packed = import_weights(file, model)
            replies = reply_to(packed, tokenizer, questions, MAX_REPLY)
            its = {"bytes": path.stat().st_size, "bits_per_weight": bits(file)}
            its["kl"] = token_kl(packed, model, tokenizer, questions, reference)
            its |= answers(questions, replies, reference)
            if (difference := through_transformers(path, packed, tokenizer, questions)) is not None:
                its["max_difference_to_transformers"] = difference
            if llama_engine.engine():
                chats = [question["messages"] for question in questions]
                context = min(model.config.max_position_embeddings, 2048)
                by_llama, speed = llama_engine.greedy_replies(path, chats, MAX_REPLY, context)
                its["llama_cpp"] = answers(questions, by_llama, replies) | {"decode_tokens_per_s": speed}
            metrics[wanted] = its
        best = "q8_0" if "q8_0" in formats else formats[0]
        text = modelfile(f"model-{best}.gguf", tokenizer, model.config.max_position_embeddings)
        (folder / "Modelfile").write_text(text, encoding="utf-8")
        show(metrics, formats)
        draw(folder, metrics, formats)

    return stage.save(metrics, {"model": {"path": found["path"], "id": found["id"]}}, write)


def other_questions(tokenizer) -> list[dict]:
    """小世界之外的模型：几道平常的题，没有标准答案。模型自己的模板会补上的 system，这里写明，两边才是同一个提示。"""
    system = default_system(tokenizer)
    before = [{"role": "system", "content": system}] if system else []
    return [{"messages": [*before, {"role": "user", "content": text}]} for text in OTHER_QUESTIONS]


def bits(file: GGUF) -> float:
    """一个数平均占几位，刻度也算。"""
    infos = file.tensors.values()
    return 8 * sum(info.n_bytes for info in infos) / sum(int(np.prod(info.shape)) for info in infos)


def check_space(folder: Path, model, formats: list[str]) -> None:
    """写之前看看盘上够不够：写到一半才满，白等半天。"""
    n = sum(weight.numel() for weight in weights_of(model).values())
    needed = sum(n * KINDS[wanted][2] // KINDS[wanted][1] for wanted in formats) + (4 << 20)
    folder = next(each for each in (folder, *folder.parents) if each.exists())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"{folder} 所在的盘只剩 {free / 1e6:,.0f} MB，要写 {needed / 1e6:,.0f} MB："
            "清出空间，或少写几种（--formats），或用 --output_dir 换一个盘。"
        )


def show(metrics: dict, formats: list[str]) -> None:
    print(
        "\n存法        字节      一个数几位   KL（nats）  与原模型同答   答对      llama.cpp 同答   答对   token/秒"
    )
    for wanted in formats:
        its = metrics[wanted]
        llama = its.get("llama_cpp", {})
        columns = [
            f"{wanted:<6}{its['bytes']:12,d}{its['bits_per_weight']:12.2f}{its['kl']:14.2g}{its['same_answers']:12.3f}",
            f"{its['qa_accuracy']:12.3f}" if "qa_accuracy" in its else " " * 12,
        ]
        if llama:
            columns.append(f"{llama['same_answers']:14.3f}")
            columns.append(f"{llama['qa_accuracy']:10.3f}" if "qa_accuracy" in llama else " " * 10)
            columns.append(f"{llama['decode_tokens_per_s']:10.0f}")
        print("".join(columns))
    if not llama_engine.engine():
        print(f"没有装 llama.cpp，不用它答：{llama_engine.INSTALL}。")


def draw(folder: Path, metrics: dict, formats: list[str]) -> None:
    megabytes = {"float32": metrics["bytes_float32"] / 1e6}
    megabytes |= {wanted.upper(): metrics[wanted]["bytes"] / 1e6 for wanted in formats}
    bar_chart(
        folder / "gguf_bytes.svg", {"MB": megabytes}, "文件多大|File size", "存法|format", "MB", digits=2
    )


def main(argv: list[str] | None = None) -> dict:
    settings = parse_settings(ExportSettings, PRESETS, argv, FULL_MODEL)
    if settings.preset == "full" and settings.model is None:
        settings.model = FULL_MODEL
    found = chain_model("sft", settings.model, settings.source)
    start = f"{found['stage']}:{found['id']}"
    record = run_lesson("export_gguf", HOME, settings, partial(learn, found=found), start=start)
    print(
        "Ollama：ollama create mine -f Modelfile（在结果文件夹里）；llama.cpp：llama-cli -m model-q8_0.gguf"
    )
    return record


if __name__ == "__main__":
    run_main(main)
