"""评判：小世界里程序知道标准答案，所以每个回复的好坏是算出来的，不是估出来的。奖励模型从没见过这些分数。"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from nlp_common.fast.together import together
from nlp_common.lm.replies import distinct_n, reply_to, score_replies, token_kl
from nlp_common.tiny.world import OPENINGS, WORLD, small_talk_questions

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Verdict:
    """一个回复的评语；score 的分级：错 0.1，只答出词 0.6，整句 0.8，整句且有礼 1.0，其余（含没说完）0。"""

    right: bool
    complete: bool
    courteous: bool
    score: float

    @property
    def preferred(self) -> bool:
        return self.right and self.complete and self.courteous


def judge(question: dict, reply: str, ended: bool) -> Verdict:
    """评一个回复。question 见 world.questions；ended：回复是不是自己以 <|im_end|> 结束的。

    对：含标准答案，且不含同类的其他词。完整：去掉客套话之后正好是那一句完整的回答。寒暄：一字不差才对。
    """
    if question["slot"] is None:
        right = ended and reply == question["answer"]
        return Verdict(right, right, right, float(right))
    opening = next((o for o in OPENINGS if reply.startswith(o)), "")
    body = reply[len(opening) :]
    found = {value for value in WORLD[question["slot"]] if value in reply}
    right = ended and found == {question["answer"]}
    complete = ended and body == question["sentence"]
    courteous = ended and bool(opening)
    if right:
        score = (
            1.0 if complete and courteous else 0.8 if complete else 0.6 if body == question["answer"] else 0.4
        )
    else:
        score = 0.1 if ended and len(found) == 1 else 0.0
    return Verdict(right, complete, courteous, score)


def share_right(questions: list[dict], replies: list[dict]) -> float:
    """答对的比例；replies 与 questions 一一对应，写法同 reply_to 的结果。"""
    right = [judge(q, r["text"], r["ended"]).right for q, r in zip(questions, replies, strict=True)]
    return sum(right) / len(right)


def qa_accuracy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, questions: list[dict], **sampling: Any
) -> float:
    """measure_chat 的 qa_accuracy，只生成这一遍；sampling 交给 reply_to（temperature、seed），没给就是贪心。"""
    was_training = model.training
    replies = reply_to(model.eval(), tokenizer, questions, **sampling)
    model.train(was_training)
    return share_right(questions, replies)


def measure_chat(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, questions: list[dict], seed: int = 0
) -> tuple[dict, list[dict], list[dict]]:
    """小世界的对话指标，各处同一个定义。返回 (指标, 贪心回复, 采样回复)。

    - ``qa_accuracy``：贪心回复自己结束、含标准答案、不含同类其他词的比例；
    - ``ended_rate``：贪心回复自己结束的比例；
    - ``preferred_rate``：温度 1 采样的回复又对、又完整、又有礼的比例；
    - ``judge_score``：采样回复的程序评分均值；``sampled_accuracy``：采样回复答对的比例；
    - ``small_talk``：全部寒暄里，贪心回复一字不差的比例。
    """
    was_training = model.training
    model.eval()  # 两边同时用一个模型，模式先定好
    greedy, sampled = together(
        partial(reply_to, model, tokenizer, questions),
        partial(reply_to, model, tokenizer, questions, temperature=1.0, seed=seed),
    )
    asks = small_talk_questions()
    talk = reply_to(model, tokenizer, asks)
    model.train(was_training)
    on_greedy = [judge(q, r["text"], r["ended"]) for q, r in zip(questions, greedy, strict=True)]
    on_sampled = [judge(q, r["text"], r["ended"]) for q, r in zip(questions, sampled, strict=True)]
    n = len(questions)
    metrics = {
        "n": n,
        "qa_accuracy": sum(v.right for v in on_greedy) / n,
        "ended_rate": sum(r["ended"] for r in greedy) / n,
        "preferred_rate": sum(v.preferred for v in on_sampled) / n,
        "judge_score": sum(v.score for v in on_sampled) / n,
        "sampled_accuracy": sum(v.right for v in on_sampled) / n,
        "small_talk": share_right(asks, talk),
        "mean_chars": sum(len(r["text"]) for r in sampled) / n,
        "distinct_2": distinct_n([r["text"] for r in sampled]),
    }
    return metrics, greedy, sampled


def measure_aligned(
    policy: PreTrainedModel,
    reference: PreTrainedModel,
    reward_model: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    questions: list[dict],
    max_new_tokens: int,
) -> dict:
    """对齐前（reference，名字带 _before）与对齐后（policy）：奖励的均值与标准差，policy 对 reference 的 KL。

    没有奖励模型（GRPO 用验证器打分）就没有奖励那两项。

    小世界的题另有程序的评分（measure_chat）；别的题，回答最多 max_new_tokens 个 token，温度 1 采样。
    """
    metrics: dict = {}
    for suffix, model in (("_before", reference), ("", policy)):
        if "sentence" in questions[0]:
            chat, _, replies = measure_chat(model, tokenizer, questions)
            names = ("qa_accuracy", "preferred_rate", "judge_score", "small_talk") if suffix else tuple(chat)
            for name in names:
                metrics[name + suffix] = chat[name]
        else:
            replies = reply_to(model, tokenizer, questions, max_new_tokens, temperature=1.0)
        if reward_model is not None:
            scores = score_replies(reward_model, tokenizer, questions, replies)
            metrics[f"reward_mean{suffix}"] = scores.mean().item()
            metrics[f"reward_std{suffix}"] = scores.std().item() if len(scores) > 1 else 0.0  # 只有一题
    metrics["kl_to_sft"] = token_kl(policy, reference, tokenizer, questions, replies)
    return metrics
