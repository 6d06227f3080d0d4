"""一局：模型说话，里面的调用做掉，结果还给它，再说，直到不再调用为止。许多局一起玩，一批一批地生成。

react_agent.py 是一局的读法（各种出错、限度、记录）；这里是训练与评测用的许多局，工具就在程序里，不会超时。
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from nlp_common.lm.chatml import encode_text, prompt_ids
from nlp_common.lm.generation import generate
from nlp_common.lm.replies import reply_of
from tool_format import BrokenCall, Call, parse_reply
from tool_schema import check_call
from tool_world import ERROR, UNNEEDED, is_right, run_tool

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LONGEST_REPLY = 64  # 一轮最多几个 token：两个调用约 50 个
MOST_TURNS = 5  # 一局里模型最多说几次：两步各错一次，再加回答


@dataclass
class Episode:
    """一局。ids 是从头到尾的 token，spoken 同样长：1 是模型说的（算损失），0 是题目、工具的结果。"""

    task: dict
    messages: list[dict]
    ids: list[int]
    spoken: list[int]
    calls: list[list[Call | BrokenCall]] = field(default_factory=list)  # 每一轮的几个调用
    answer: str | None = None  # 最后的回答；没有说完、轮数到了，是 None


def play(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: list[dict],
    temperature: float = 0.0,
    seed: int = 0,
    tool: Callable[[dict, dict], str] = run_tool,
    most_turns: int = MOST_TURNS,
    max_new_tokens: int = LONGEST_REPLY,
) -> list[Episode]:
    """每道题一局；tool(题, 调用) 给出工具的结果。一局说得太长，超过模型的位置数，也算没有说完。"""
    room = model.config.max_position_embeddings - max_new_tokens
    episodes = []
    for task in tasks:
        ids = prompt_ids(tokenizer, task["messages"])
        episodes.append(Episode(task, list(task["messages"]), ids, [0] * len(ids)))
    live = episodes
    for turn in range(most_turns):
        live = [episode for episode in live if len(episode.ids) <= room]
        replies = generate(
            model, tokenizer, [episode.ids for episode in live], max_new_tokens, temperature, seed=seed + turn
        )
        calling = []
        for episode, ids in zip(live, replies, strict=True):
            reply = reply_of(tokenizer, ids)
            episode.ids = episode.ids + ids
            episode.spoken = episode.spoken + [1] * len(ids)
            episode.messages.append({"role": "assistant", "content": reply["text"]})
            if not reply["ended"]:
                continue
            if calls := parse_reply(reply["text"]).calls:
                episode.calls.append(calls)
                give_results(episode, tokenizer, [call_result(episode.task, call, tool) for call in calls])
                calling.append(episode)
            else:
                episode.answer = reply["text"]
        live = calling
        if not live:
            break
    return episodes


def call_result(task: dict, call: Call | BrokenCall, tool: Callable[[dict, dict], str]) -> str:
    if isinstance(call, BrokenCall):
        return ERROR + call.error
    return tool(task, {"name": call.name, "arguments": call.arguments})


def give_results(episode: Episode, tokenizer: PreTrainedTokenizerBase, results: list[str]) -> None:
    """结果接在后面，并请模型接着说；这一段都不是模型说的。"""
    told = [{"role": "tool", "content": result} for result in results]
    added = [*encode_text(tokenizer, "\n"), *prompt_ids(tokenizer, told)]
    episode.ids = episode.ids + added
    episode.spoken = episode.spoken + [0] * len(added)
    episode.messages += told


# ---------------------------------------------------------------- 量一量


def as_dicts(step: list[Call | BrokenCall]) -> list[dict]:
    """一轮的几个调用，照 task["steps"] 的写法；读不出来的是 ``{}``。"""
    return [
        {"name": call.name, "arguments": call.arguments} if isinstance(call, Call) else {} for call in step
    ]


def measure(episodes: list[Episode]) -> dict[str, float]:
    """一批局 → 各个分，都是 0 到 1。

    tool_choice               该调用的题里，每一轮叫的都是该叫的工具
    argument_exact            该调用的题里，每一轮的调用连参数都一样
    final_accuracy            最后的回答对（tool_world.is_right）
    no_call_when_unneeded     不该调用的题里，一次也没有调用
    two_step_accuracy         两步的题里，最后的回答对
    valid_calls               所有调用里，读得出、工具与参数都合规定的
    """
    made = [[as_dicts(step) for step in episode.calls] for episode in episodes]
    kinds = [episode.task["kind"] for episode in episodes]
    right = [float(e.answer is not None and is_right(e.task, e.answer)) for e in episodes]
    needed = [i for i, episode in enumerate(episodes) if episode.task["steps"]]
    names = [[[call.get("name") for call in step] for step in steps] for steps in made]
    wanted = [[[call["name"] for call in step] for step in e.task["steps"]] for e in episodes]
    calls = [
        (e.task, call) for e, steps in zip(episodes, made, strict=True) for step in steps for call in step
    ]

    def share(flags: list) -> float:
        return sum(flags) / len(flags) if flags else float("nan")

    return {
        "tool_choice": share([names[i] == wanted[i] for i in needed]),
        "argument_exact": share([made[i] == episodes[i].task["steps"] for i in needed]),
        "final_accuracy": share(right),
        "no_call_when_unneeded": share(
            [not steps for steps, kind in zip(made, kinds, strict=True) if kind in UNNEEDED]
        ),
        "two_step_accuracy": share([r for r, kind in zip(right, kinds, strict=True) if kind == "two_step"]),
        "valid_calls": share([bool(call) and not check_call(call, task["tools"]) for task, call in calls]),
        "by_kind": {
            kind: share([r for r, each in zip(right, kinds, strict=True) if each == kind])
            for kind in dict.fromkeys(kinds)
        },
        "n": len(episodes),
    }
