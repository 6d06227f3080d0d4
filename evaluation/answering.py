"""被评的是谁：Qwen 链的一个阶段、一个本地文件夹、hub 名、或 smollm2。会说 OpenAI 接口的服务器在 nlp_common/hub/chat_server.py。"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nlp_common.base.device import pick_device
from nlp_common.base.errors import UserError
from nlp_common.lm.loading import load_chat_lm
from nlp_common.lm.replies import reply_to
from nlp_common.train.chain import QWEN_SCRIPTS, chain_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SPEAKING = tuple(stage for stage in QWEN_SCRIPTS if stage != "reward")  # 奖励模型只打分，不说话


@dataclass
class Answerer:
    """载入好的一个模型；id 认得出是哪一份权重。"""

    name: str
    id: str
    tokenizer: PreTrainedTokenizerBase
    model: PreTrainedModel


def split_names(names: str) -> list[str]:
    """``sft,dpo`` → ``["sft", "dpo"]``；空的、重复的是 UserError。"""
    found = [name.strip() for name in names.replace("，", ",").split(",") if name.strip()]
    if not found:
        raise UserError(f"--models 里没有模型：要写成 {','.join(SPEAKING[1:3])} 这样，用逗号隔开。")
    if repeated := sorted({name for name in found if found.count(name) > 1}):
        raise UserError(f"--models 里 {'、'.join(repeated)} 写了不止一次。")
    return found


def find_answerer(name: str, source: str = "hf") -> dict:
    """一个模型在哪里 → ``{"path", "stage", "id", "run"}``，不载入；链的阶段还没有训练就当场训练。"""
    if name == "reward":
        raise UserError("reward 是奖励模型：只会打分，不会说话。")
    if name in SPEAKING and not Path(name).exists():
        return chain_model(name)
    try:
        return chain_model("sft", name, source)
    except UserError as error:
        if "/" in name or Path(name).exists():
            raise
        known = "、".join(SPEAKING)
        raise UserError(
            f"{name} 不是链的阶段（{known}）、smollm2 或本地文件夹；当作 hub 名，也{error}"
        ) from error


def load_answerer(name: str, source: str = "hf") -> Answerer:
    """载入 --models 里的一个模型，eval 状态。得不到、不会说话是 UserError。"""
    found = find_answerer(name, source)
    tokenizer, model = load_chat_lm(found["path"], pick_device())
    model.eval().requires_grad_(False)
    return Answerer(name, f"{found['stage']}:{found['id']}", tokenizer, model)


def replies(
    answerer: Answerer,
    questions: list[dict],
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> list[dict]:
    """每道题（``{"messages": […]}``）一个回答 ``{"text", "ids", "ended"}``；temperature 0 是贪心。"""
    return reply_to(
        answerer.model,
        answerer.tokenizer,
        questions,
        max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
    )


def as_text(messages: list[dict]) -> str:
    """一道题给人看的样子：只有一问就是那一问，几轮的每轮前面写上谁说的。"""
    if len(messages) == 1:
        return messages[0]["content"]
    names = {"user": "问", "assistant": "答", "system": "系统"}
    return "\n".join(f"{names.get(each['role'], each['role'])}：{each['content']}" for each in messages)
