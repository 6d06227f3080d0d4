"""谁来打分：语言模型的对数概率、奖励模型、情感分类器。一律是"越大越好"的一个数，换人前后相减。"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from answering import find_answerer
from nlp_common.base.device import pick_device
from nlp_common.base.errors import UserError
from nlp_common.lm.chatml import answer_ids, encode_text, prompt_ids
from nlp_common.lm.checks import config_of
from nlp_common.lm.generation import batches_by_length, pad_left, padded_positions
from nlp_common.lm.loading import load_chat_lm, load_reward_model, load_tokenizer
from nlp_common.lm.losses import IGNORE, token_logps
from nlp_common.lm.replies import score_replies
from nlp_common.tiny.world import OPENINGS
from nlp_common.train.chain import QWEN_SCRIPTS, chain_model
from nlp_common.train.progress import progress_bar

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SENTIMENT = "snownlp"


@dataclass
class Scorer:
    """kind 是 lm、reward 或 sentiment；in_world：读的是小世界的故事。"""

    name: str
    id: str
    kind: str
    in_world: bool
    tokenizer: PreTrainedTokenizerBase | None = None
    model: PreTrainedModel | None = None


def find_scorer_id(name: str, source: str = "hf") -> str:
    """不载入，只说是哪一份；还没有训练的链就当场训练。"""
    if name == SENTIMENT:
        return name
    found = chain_model("reward") if name == "reward" else find_answerer(name, source)
    return f"{found['stage']}:{found['id']}"


def load_scorer(name: str, source: str = "hf", in_world: bool = False) -> Scorer:
    """in_world：文件夹里的也是读小世界的故事的（链上的阶段总是）。"""
    if name == SENTIMENT:
        return Scorer(name, name, "sentiment", False)
    found = chain_model("reward") if name == "reward" else find_answerer(name, source)
    in_world, id_ = in_world or name in QWEN_SCRIPTS, f"{found['stage']}:{found['id']}"
    architectures = config_of(found["path"]).get("architectures") or [""]
    if "SequenceClassification" in architectures[0]:
        tokenizer = load_tokenizer(found["path"])
        model = load_reward_model(found["path"], tokenizer).to(pick_device()).eval()
        return Scorer(name, id_, "reward", in_world, tokenizer, model)
    tokenizer, model = load_chat_lm(found["path"], pick_device())
    return Scorer(name, id_, "lm", in_world, tokenizer, model.eval())


def score_sides(scorer: Scorer, sides: list[dict]) -> np.ndarray:
    """每一边一个分，(N,)。"""
    if scorer.kind == "sentiment":
        return sentiment(sides)
    if scorer.kind == "reward":
        return rewards(scorer, sides)
    if scorer.in_world:
        return courtesy(scorer.model, scorer.tokenizer, sides)
    return good_over_bad(scorer.model, scorer.tokenizer, sides)


@torch.no_grad()
def courtesy(model, tokenizer, sides: list[dict], batch_size: int = 128) -> np.ndarray:
    """小世界：回答以客套开头的对数胜率，log P(您、好、谢) − log P(别的)。"""
    firsts = sorted({encode_text(tokenizer, opening)[0] for opening in OPENINGS})
    prompts = [prompt_ids(tokenizer, side["messages"]) for side in sides]
    scores = np.empty(len(prompts))
    for batch in batches_by_length([len(ids) for ids in prompts], batch_size):
        ids, mask = pad_left([prompts[i] for i in batch], tokenizer.pad_token_id, model.device)
        logits = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=padded_positions(mask),
            use_cache=False,
            logits_to_keep=1,
        ).logits[:, -1]  # (B, V)
        chance = logits.double().softmax(-1)[:, firsts].sum(-1)
        scores[batch] = torch.logit(chance, eps=1e-12).cpu().numpy()
    return scores


def good_over_bad(model, tokenizer, sides: list[dict]) -> np.ndarray:
    """真模型：接着写好词比接着写坏词，对数概率高多少。人名常不常见，两个词上一样，减掉了。"""
    words: dict[str, set] = {}  # 同一句话后面要接的词：句子只算一遍
    for side in sides:
        words.setdefault(side["text"], set()).update((side["good"], side["bad"]))
    bar = progress_bar("打分", len(words), 0)
    known = {}
    for text, after in words.items():
        known[text] = word_logps(model, tokenizer, text, sorted(after))
        bar.update(1)
    bar.close()
    return np.array([known[side["text"]][side["good"]] - known[side["text"]][side["bad"]] for side in sides])


@torch.no_grad()
def word_logps(model, tokenizer, text: str, words: list[str]) -> dict[str, float]:
    """text 后面接着写每个词的对数概率；text 只前向一遍，词的后几个 token 从它的缓存接着算。"""
    start = torch.tensor([encode_text(tokenizer, text)], device=model.device)
    endings = [encode_text(tokenizer, word) for word in words]
    out = model(input_ids=start, use_cache=True)
    first = out.logits[0, -1].double().log_softmax(-1)  # (V,)
    logps = [float(first[ending[0]]) for ending in endings]
    longer = [i for i, ending in enumerate(endings) if len(ending) > 1]
    if longer:
        width = max(len(endings[i]) for i in longer)
        ids = torch.zeros(len(longer), width, dtype=torch.long, device=model.device)  # 右填充，前面的看不到它
        for row, i in enumerate(longer):
            ids[row, : len(endings[i])] = torch.tensor(endings[i])
        out.past_key_values.batch_repeat_interleave(len(longer))
        logits = model(input_ids=ids[:, :-1], past_key_values=out.past_key_values, use_cache=True).logits
        rest = logits.double().log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]  # (词, width−1)
        for row, i in enumerate(longer):
            logps[i] += float(rest[row, : len(endings[i]) - 1].sum())
    return dict(zip(words, logps, strict=True))


@torch.no_grad()
def continuation_logps(
    model, tokenizer, prompts: list[list[int]], endings: list[list[int]], batch_size: int = 64
) -> np.ndarray:
    """每个结尾接在提示后面的对数概率，(N,)。"""
    lengths = [len(p) + len(e) for p, e in zip(prompts, endings, strict=True)]
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    scores = np.empty(len(prompts))
    for batch in batches_by_length(lengths, batch_size):
        width = max(lengths[i] for i in batch)
        ids = torch.full((len(batch), width), pad)
        labels = torch.full((len(batch), width), IGNORE)
        for row, i in enumerate(batch):
            ids[row, : lengths[i]] = torch.tensor(prompts[i] + endings[i])
            labels[row, len(prompts[i]) : lengths[i]] = torch.tensor(endings[i])
        logps = token_logps(model, ids.to(model.device), labels.to(model.device))
        scores[batch] = logps.double().sum(1).cpu().numpy()
    return scores


def rewards(scorer: Scorer, sides: list[dict]) -> np.ndarray:
    """奖励模型给同一个回答的分：问的故事只换了人。"""
    replies = [
        {"ids": answer_ids(scorer.tokenizer, side["plain"] if scorer.in_world else side["good"])}
        for side in sides
    ]
    questions = [
        {"messages": side["messages"] if scorer.in_world else [{"role": "user", "content": side["text"]}]}
        for side in sides
    ]
    return score_replies(scorer.model, scorer.tokenizer, questions, replies).double().numpy()


def sentiment(sides: list[dict]) -> np.ndarray:
    """SnowNLP 的情感分（朴素贝叶斯，学的是网购评论），换成对数胜率。"""
    try:
        from snownlp import SnowNLP
    except ImportError as error:
        raise UserError("情感分类器 snownlp 没有安装：pip install snownlp==0.12.3。") from error
    known: dict[str, float] = {}
    for side in sides:
        text = side["text"] + side["good"]
        if text not in known:
            p = min(max(SnowNLP(text).sentiments, 1e-9), 1 - 1e-9)
            known[text] = math.log(p / (1 - p))
    return np.array([known[side["text"] + side["good"]] for side in sides])


def choose(scorer: Scorer, questions: list[dict]) -> list[int]:
    """CBBQ 的题选哪个：三个答案接在题后面，平均每个 token 的对数概率最高的。"""
    prompts, endings = [], []
    for question in questions:
        options = "，".join(question["answers"])
        text = f"{question['context']}\n问题：{question['question']}（从这里选：{options}）\n答案："
        for answer in question["answers"]:
            prompts.append(encode_text(scorer.tokenizer, text))
            endings.append(encode_text(scorer.tokenizer, answer))
    logps = continuation_logps(scorer.model, scorer.tokenizer, prompts, endings)
    means = (logps / [len(ending) for ending in endings]).reshape(-1, 3)
    return means.argmax(1).tolist()
