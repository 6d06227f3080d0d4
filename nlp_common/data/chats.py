"""各家数据集的列名五花八门；这里认出是哪一种，统一成三种写法：

- 文档   ``{"text": str}``                                            预训练
- 对话   ``{"messages": [{"role", "content"}, …]}``                   SFT
- 偏好对 ``{"prompt": [消息…], "chosen": [消息], "rejected": [消息]}``  奖励模型、DPO、PPO

对话总是：可有一条 system，然后 user、assistant 一问一答。用不到的列原样保留。
格式只按第一条数据认一次。缺一栏、类型不对、角色不认识是格式错了，停下来报第几条；
内容空、轮次乱、好坏答案相同是数据里难免的废行，跳过并说明各有多少。
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from nlp_common.base.errors import UserError
from nlp_common.data.turns import Malformed, Skip, Turn, as_string, as_turns, checked, opening, turn


def to_texts(rows: list[dict], where: str) -> list[dict]:
    """统一成 ``[{"text": 文档, …其余的列}]``；认识的列：text、completion、content。

    where 是数据的来处（如文件名），用在消息里。格式不认识、缺栏、没有一条可用时抛出 UserError。
    """
    return _convert(rows, where, "预训练")


def to_chats(rows: list[dict], where: str) -> list[dict]:
    """统一成 ``[{"messages": [{"role", "content"}, …], …其余的列}]``，最后一轮是 assistant。

    认识的格式见 SCHEMAS["SFT"]；where 与错误同 to_texts。
    """
    return _convert(rows, where, "SFT")


def to_pairs(rows: list[dict], where: str) -> list[dict]:
    """统一成 ``[{"prompt": [消息…], "chosen": [消息], "rejected": [消息], …其余的列}]``。

    prompt 最后一轮是 user，chosen 与 rejected 各是一条 assistant。
    认识的格式见 SCHEMAS["偏好对齐"]；where 与错误同 to_texts。
    """
    return _convert(rows, where, "偏好对齐")


def to_questions(rows: list[dict], where: str) -> list[dict]:
    """PPO 用的题目 ``{"messages"}``，以用户的话结尾：偏好数据取提示，对话数据去掉最后一个回答。"""
    if rows and ("chosen" in rows[0] or "response_chosen" in rows[0]):
        return [{"messages": row["prompt"]} for row in to_pairs(rows, where)]
    return [{"messages": row["messages"][:-1]} for row in to_chats(rows, where)]


# ---- 每种格式一个函数：一条数据 → 统一的写法 ----


def _text(column: str) -> Callable[[dict], dict]:
    def convert(row: dict) -> dict:
        text = as_string(row[column], column)
        if not text.strip():
            raise Skip(f"{column} 是空的")
        return {"text": text}

    return convert


def _conversation(column: str) -> Callable[[dict], dict]:
    return lambda row: _chat(opening(row, as_turns(row[column], column)))


def _input_target(row: dict) -> dict:
    return _chat([turn("user", row["input"], "input"), turn("assistant", row["target"], "target")])


def _instruction(row: dict) -> dict:
    parts = [as_string(row.get(column), column) for column in ("instruction", "input")]
    question = "\n".join(part for part in parts if part.strip())  # input 是可有可无的材料，跟在要求后面
    answer = turn("assistant", row["output"], "output")
    return _chat(opening(row, [turn("user", question, "instruction"), answer]))


def _prompt_completion(row: dict) -> dict:
    prompt = as_turns(row["prompt"], "prompt", "user")
    return _chat(prompt + as_turns(row["completion"], "completion", "assistant"))


def _prompt_pair(column: str) -> Callable[[dict], dict]:
    def convert(row: dict) -> dict:
        prompt = opening(row, as_turns(row[column], column, "user"))
        chosen = as_turns(row["chosen"], "chosen", "assistant")
        rejected = as_turns(row["rejected"], "rejected", "assistant")
        if chosen[:1] and chosen[0]["role"] != "assistant":  # 不只是回答，而是从头到尾的整段对话
            return _whole_conversations(row, chosen, rejected)
        return _pair(prompt, chosen, rejected)

    return convert


def _implicit_prompt(row: dict) -> dict:
    return _whole_conversations(row, as_turns(row["chosen"], "chosen"), as_turns(row["rejected"], "rejected"))


def _history_pair(row: dict) -> dict:
    return _pair(
        opening(row, [turn("user", row["question"], "question")]),
        [turn("assistant", row["response_chosen"], "response_chosen")],
        [turn("assistant", row["response_rejected"], "response_rejected")],
    )


# 次序有意义：一条数据同时有几种格式的列时，取前面的。
SCHEMAS: dict[str, list[tuple[tuple[str, ...], tuple[str, ...], Callable[[dict], dict]]]] = {
    # (必有的列, 可有的列, 转换函数)
    "预训练": [
        (("text",), (), _text("text")),
        (("completion",), (), _text("completion")),
        (("content",), (), _text("content")),
    ],
    "SFT": [
        (("messages",), (), _conversation("messages")),
        (("conversations",), ("system",), _conversation("conversations")),
        (("input", "target"), (), _input_target),
        (("instruction", "output"), ("input", "system", "history"), _instruction),
        (("prompt", "completion"), (), _prompt_completion),
    ],
    "偏好对齐": [
        (("prompt", "chosen", "rejected"), ("system",), _prompt_pair("prompt")),
        (("conversations", "chosen", "rejected"), ("system",), _prompt_pair("conversations")),
        (("question", "response_chosen", "response_rejected"), ("system", "history"), _history_pair),
        (("chosen", "rejected"), (), _implicit_prompt),
    ],
}


def _convert(rows: list[dict], where: str, stage: str) -> list[dict]:
    if not rows:
        raise UserError(f"{where} 里没有数据。")
    needed, optional, convert = _detect(rows[0], where, stage)
    results: list[dict] = []
    skipped: Counter[str] = Counter()
    for number, row in enumerate(rows, 1):
        if missing := [column for column in needed if column not in row]:
            raise UserError(
                f"{where} 第 {number} 条缺少 {'、'.join(missing)} 一栏（它有 {'、'.join(row) or '零栏'}）；"
                f"第 1 条是 {'-'.join(needed)} 格式，各条要一样。"
            )
        try:
            result = convert({column: row[column] for column in needed + optional if column in row})
        except Malformed as error:
            raise UserError(f"{where} 第 {number} 条：{error}。") from None
        except Skip as reason:
            skipped[str(reason)] += 1
            continue
        kept = {key: value for key, value in row.items() if key not in needed + optional}
        results.append(kept | result)
    counts = "，".join(f"{reason} {count} 行" for reason, count in skipped.most_common())
    if not results:
        raise UserError(f"{where} 的 {len(rows)} 行没有一行可用：{counts}。请检查内容，或换一个 --dataset。")
    if skipped:
        print(f"{where}：跳过 {skipped.total()} 行（共 {len(rows)} 行）：{counts}")
    return results


def _detect(row: dict, where: str, stage: str) -> tuple:
    for schema in SCHEMAS[stage]:
        if all(column in row for column in schema[0]):
            return schema
    wanted = "\n".join(
        f"  {', '.join(needed)}" + (f"（可有 {', '.join(optional)}）" if optional else "")
        for needed, optional, _ in SCHEMAS[stage]
    )
    message = f"{where} 的格式不认识。它的列是：{', '.join(row) or '（没有列）'}\n{stage}要下面任意一组列：\n{wanted}"
    fits = [
        name
        for name, schemas in SCHEMAS.items()
        if any(all(column in row for column in needed) for needed, _, _ in schemas)
    ]
    if fits:
        message += f"\n这份数据像是给{'、'.join(fits)}用的，是不是用错了脚本或文件？"
    raise UserError(message)


# ---- 几种格式都要用的零件 ----


def _chat(turns: list[Turn]) -> dict:
    return {"messages": checked(turns, "assistant")}


def _pair(prompt: list[Turn], chosen: list[Turn], rejected: list[Turn]) -> dict:
    prompt = checked(prompt, "user")
    for answer in (chosen, rejected):
        if not answer or any(not message["content"].strip() for message in answer):
            raise Skip("有一个回答是空的")
        if [message["role"] for message in answer] != ["assistant"]:
            raise Skip("回答不止一轮")
    if chosen == rejected:
        raise Skip("好坏两个回答相同")
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _whole_conversations(row: dict, chosen: list[Turn], rejected: list[Turn]) -> dict:
    """两段完整的对话：开头相同的部分就是提示。各自的最后一轮总算回答，哪怕两者相同。"""
    same = 0
    while same < min(len(chosen), len(rejected)) - 1 and chosen[same] == rejected[same]:
        same += 1
    return _pair(opening(row, chosen[:same]), chosen[same:], rejected[same:])
