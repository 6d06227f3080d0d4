"""能说话的一个模型：载入它，让它一边想一边说。chat.py、test_*.py 用它。"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch

from nlp_common.base.console import printable
from nlp_common.base.device import pick_device
from nlp_common.base.errors import UserError
from nlp_common.base.runs import run_record
from nlp_common.lm.adapters import attach, shared_copy
from nlp_common.lm.generation import stop_tokens, stream_tokens
from nlp_common.lm.loading import load_causal_lm

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Sampling(Protocol):
    """设置里这里要用的几项。"""

    max_new_tokens: int
    temperature: float
    top_p: float


@dataclass
class Speaker:
    """能说话的一个模型；run 是它的运行记录，generator 是它自己的随机数。"""

    name: str
    path: str
    tokenizer: PreTrainedTokenizerBase
    model: PreTrainedModel
    run: dict
    generator: torch.Generator


def load_speaker(title: str, path: str, seed: int) -> Speaker:
    """载入一个模型；文件夹不完整、不是会说话的模型是 UserError。"""
    folder = Path(path)
    run: dict = {}
    if folder.is_dir():
        run = run_record(path)
        architectures = json.loads((folder / "config.json").read_text("utf-8")).get("architectures") or [""]
        if "Classification" in architectures[0]:
            raise UserError(f"{path} 是 {architectures[0]}：只会打分，不会说话。请用 --model 换一个模型。")
    tokenizer, model = load_causal_lm(path)
    device = pick_device()
    generator = torch.Generator(device).manual_seed(seed)
    return Speaker(title, path, tokenizer, model.to(device).eval(), run, generator)


def adapted(speaker: Speaker, name: str, folder: Path, seed: int) -> Speaker:
    """speaker 的模型接上 folder 里的适配器：层是另一套，权重还是那一份，speaker 照旧能用。不是它的适配器是 UserError。"""
    model = attach(shared_copy(speaker.model), folder, speaker.path)
    generator = torch.Generator(model.device).manual_seed(seed)
    return Speaker(name, str(folder), speaker.tokenizer, model.eval(), {}, generator)


@dataclass
class Reply:
    """说出来的话；end 是说完时的结束符，None 表示没有说完（长度到了，或被打断）。"""

    text: str = ""
    end: str | None = None


def room(speaker: Speaker, settings: Sampling) -> int:
    """提示最多多少个 token，才给回答留得下 max_new_tokens 个。"""
    return speaker.model.config.max_position_embeddings - settings.max_new_tokens


def stream_reply(speaker: Speaker, prompt: list[int], settings: Sampling, reply: Reply) -> Iterator[str]:
    """一边生成一边给出新的文字，并记进 reply。

    一个汉字是三个字节，可能由几个 token 拼成：解码的结尾是半个字（U+FFFD）时先等着，凑齐了再给出。
    """
    tokenizer = speaker.tokenizer
    stops = stop_tokens(tokenizer)
    ids: list[int] = []
    input_ids = torch.tensor([prompt], device=speaker.model.device)  # (1, T)
    for token in stream_tokens(
        speaker.model,
        input_ids,
        torch.ones_like(input_ids),
        settings.max_new_tokens,
        stops,
        tokenizer.pad_token_id,
        settings.temperature,
        settings.top_p,
        speaker.generator,
    ):
        token_id = int(token)
        if token_id in stops:
            reply.end = tokenizer.convert_ids_to_tokens(token_id)
            return
        ids.append(token_id)
        text = tokenizer.decode(ids)
        if not text.endswith("\N{REPLACEMENT CHARACTER}") and len(text) > len(reply.text):
            new, reply.text = text[len(reply.text) :], text
            yield new


def say(speaker: Speaker, prompt: list[int], settings: Sampling, reply: Reply) -> None:
    """边生成边打印（不换行）。Ctrl-C 照常抛出，已经说出的话在 reply 里。"""
    for piece in stream_reply(speaker, prompt, settings, reply):
        print(printable(piece), end="", flush=True)
