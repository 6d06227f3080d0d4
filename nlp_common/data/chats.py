"""各家数据集的列名五花八门；这里认出是哪一种，统一成三种写法：

- 文档   ``{"text": str}``                                            预训练
- 对话   ``{"messages": [{"role", "content"}, …]}``                   SFT
- 偏好对 ``{"prompt": [消息…], "chosen": [消息], "rejected": [消息]}``  奖励模型、DPO、PPO

对话总是：可有一条 system，然后 user、assistant 一问一答；一次回答之前可以几次调用工具（assistant、tool 交替）。
对话旁边的 system、history、tools 几栏接到对话前面（工具与调用写成文字，见 tool_turns.py），
KTO 的 label 是 false 的回答不学；别的用不到的列原样保留，并说出是哪几栏。
格式只按第一条数据认一次。缺一栏、类型不对、角色不认识是格式错了，停下来报第几条；
内容空、轮次乱、好坏答案相同是数据里难免的废行，跳过并说明各有多少。
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from nlp_common.base.errors import UserError
from nlp_common.data.faults import Malformed, Skip, as_string
from nlp_common.data.tool_turns import TOOL_COLUMNS
from nlp_common.data.turns import (
    Turn,
    as_turns,
    checked,
    is_spoken,
    opening,
    turn,
)


def to_texts(rows: list[dict], where: str) -> list[dict]:
    """统一成 ``[{"text": 文档, …其余的列}]``；认识的列：text、completion、content。

    where 是数据的来处（如文件名），用在消息里。格式不认识、缺栏、没有一条可用时抛出 UserError。
    """
    return _convert(rows, where, "预训练")


def to_chats(rows: list[dict], where: str, skipped_rows: dict[int, str] | None = None) -> list[dict]:
    """统一成 ``[{"messages": [{"role", "content"}, …], …其余的列}]``，最后一轮是 assistant。

    认识的格式见 SCHEMAS["SFT"]；where 与错误同 to_texts。给了 skipped_rows，跳过的行写进去：第几条（从 0 数）→ 为什么。
    """
    return _convert(rows, where, "SFT", skipped_rows=skipped_rows)


def to_pairs(rows: list[dict], where: str, skipped_rows: dict[int, str] | None = None) -> list[dict]:
    """统一成 ``[{"prompt": [消息…], "chosen": [消息], "rejected": [消息], …其余的列}]``。

    prompt 最后一轮是 user，chosen 与 rejected 各是一条 assistant。
    认识的格式见 SCHEMAS["偏好对齐"]；where、skipped_rows 与错误同 to_chats。
    """
    return _convert(rows, where, "偏好对齐", skipped_rows=skipped_rows)


def to_thumbs(rows: list[dict], where: str) -> list[dict]:
    """KTO 用的回答 ``{"prompt": [消息…], "answer": [消息], "good": bool}``：label 等一栏说回答好不好；偏好对照 to_pairs。

    认识的格式见 SCHEMAS["KTO"]；where 与错误同 to_texts。
    """
    if not rows or any(column in rows[0] for column in GOOD):
        return _convert(rows, where, "KTO")
    if not any(column in rows[0] for column in ("chosen", "response_chosen")):
        raise UserError(
            f"{where} 里没有说回答好不好的一栏：每行要有 label（true 是赞，false 是踩；{'、'.join(GOOD[1:])} 也认），"
            f"或者是偏好对（prompt、chosen、rejected）。它的列是：{'、'.join(rows[0]) or '（没有列）'}。"
        )
    return to_pairs(rows, where)


def to_questions(rows: list[dict], where: str, keep: tuple[str, ...] = ()) -> list[dict]:
    """PPO 用的题目 ``{"messages"}``，以用户的话结尾：偏好数据取提示，对话数据去掉最后一个回答，只有题目的照用。

    keep：另外原样留下的栏，如给验证器看的标准答案 answer。
    """
    if rows and ("chosen" in rows[0] or "response_chosen" in rows[0]):
        found = [row | {"messages": row["prompt"]} for row in to_pairs(rows, where)]
    else:
        found = _convert(rows, where, "PPO", keep)
    return [{name: row[name] for name in ("messages", *keep) if name in row} for row in found]


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


def _question(column: str) -> Callable[[dict], dict]:
    """PPO：问到最后一句为止，后面的回答不要。"""

    def convert(row: dict) -> dict:
        turns = as_turns(row[column], column, "user")
        if turns and turns[-1]["role"] == "assistant":
            turns = turns[:-1]
        return {"messages": checked(opening(row, [_plain(each) for each in turns]), "user")}

    return convert


def _instruction_question(row: dict) -> dict:
    return {"messages": checked(opening(row, [turn("user", _asked(row), "instruction")]), "user")}


def _plain(message: Turn) -> Turn:
    """去掉 weight：做题时，前面的回答只是上文。"""
    return {"role": message["role"], "content": message["content"]}


def _input_target(row: dict) -> dict:
    asked = [turn("user", row["input"], "input"), turn("assistant", row["target"], "target")]
    return _chat(opening(row, asked))


def _asked(row: dict) -> str:
    """要求，后面跟着可有可无的材料（input）。"""
    parts = [as_string(row.get(column), column) for column in ("instruction", "input")]
    return "\n".join(part for part in parts if part.strip())


def _instruction(row: dict) -> dict:
    answer = turn("assistant", row["output"], "output")
    return _chat(opening(row, [turn("user", _asked(row), "instruction"), answer]))


def _prompt_completion(row: dict) -> dict:
    prompt = opening(row, as_turns(row["prompt"], "prompt", "user"))
    return _chat(prompt + as_turns(row["completion"], "completion", "assistant"))


def _thumb(convert: Callable[[dict], dict], column: str) -> Callable[[dict], dict]:
    """一段对话，与 column 一栏的真假：最后一个回答是赞还是踩。"""

    def thumb(row: dict) -> dict:
        if not _is_true_or_false(row[column]):
            raise Malformed(f"{column} 要是 true 或 false（也可以是 1、0），现在是 {row[column]!r}")
        messages = convert(row)["messages"]
        return {"prompt": messages[:-1], "answer": messages[-1:], "good": _is_true(row[column])}

    return thumb


def _prompt_pair(column: str) -> Callable[[dict], dict]:
    def convert(row: dict) -> dict:
        prompt = opening(row, as_turns(row[column], column, "user"))
        chosen = as_turns(row["chosen"], "chosen", "assistant")
        rejected = as_turns(row["rejected"], "rejected", "assistant")
        if chosen[:1] and chosen[0]["role"] != "assistant":  # 不只是回答，而是从头到尾的整段对话
            pair = _whole_conversations(row, chosen, rejected)
            if not _asks(pair["prompt"], prompt):
                raise Skip(f"{column} 与 chosen、rejected 里的问题不同")
            return pair
        return _pair(prompt, chosen, rejected)

    return convert


def _instruction_pair(row: dict) -> dict:
    chosen = as_turns(row["chosen"], "chosen", "assistant")
    rejected = as_turns(row["rejected"], "rejected", "assistant")
    return _pair(opening(row, [turn("user", _asked(row), "instruction")]), chosen, rejected)


def _implicit_prompt(row: dict) -> dict:
    for column in ("chosen", "rejected"):
        value = row[column]
        if isinstance(value, str) and not is_spoken(value) and not value.lstrip().startswith("["):
            raise Malformed(
                f"{column} 只是一个回答，而没有问题：要有 prompt、instruction 或 question 一栏；"
                f"或者 {column} 应是消息的列表，从提问写起（也可以是 'Human: …'、空一行、'Assistant: …' 的字符串）"
            )
    return _whole_conversations(row, as_turns(row["chosen"], "chosen"), as_turns(row["rejected"], "rejected"))


def _history_pair(row: dict) -> dict:
    return _pair(
        opening(row, [turn("user", row["question"], "question")]),
        [turn("assistant", row["response_chosen"], "response_chosen")],
        [turn("assistant", row["response_rejected"], "response_rejected")],
    )


BESIDE = ("system", "history", *TOOL_COLUMNS)  # 对话旁边的栏，哪种格式都可以有
# 次序有意义：一条数据同时有几种格式的列时，取前面的。
SCHEMAS: dict[str, list[tuple[tuple[str, ...], tuple[str, ...], Callable[[dict], dict]]]] = {
    # (必有的列, 可有的列, 转换函数)
    "预训练": [
        (("text",), (), _text("text")),
        (("completion",), (), _text("completion")),
        (("content",), (), _text("content")),
    ],
    "SFT": [
        (("messages",), BESIDE, _conversation("messages")),
        (("conversations",), BESIDE, _conversation("conversations")),
        (("conversation",), BESIDE, _conversation("conversation")),
        (("input", "target"), BESIDE, _input_target),
        (("instruction", "output"), ("input", *BESIDE), _instruction),
        (("prompt", "completion"), BESIDE, _prompt_completion),
    ],
    "偏好对齐": [
        (("prompt", "chosen", "rejected"), BESIDE, _prompt_pair("prompt")),
        (("conversations", "chosen", "rejected"), BESIDE, _prompt_pair("conversations")),
        (("instruction", "chosen", "rejected"), ("input", *BESIDE), _instruction_pair),
        (("question", "chosen", "rejected"), BESIDE, _prompt_pair("question")),
        (("query", "chosen", "rejected"), BESIDE, _prompt_pair("query")),
        (("input", "chosen", "rejected"), BESIDE, _prompt_pair("input")),
        (("question", "response_chosen", "response_rejected"), BESIDE, _history_pair),
        (("chosen", "rejected"), BESIDE, _implicit_prompt),
    ],
    "PPO": [  # 偏好数据也行，见 to_questions；有没有回答都可以
        (("messages",), BESIDE, _question("messages")),
        (("conversations",), BESIDE, _question("conversations")),
        (("conversation",), BESIDE, _question("conversation")),
        (("input", "target"), BESIDE, _question("input")),
        (("instruction",), ("input", *BESIDE), _instruction_question),
        (("prompt",), BESIDE, _question("prompt")),
        (("question",), BESIDE, _question("question")),
        (("query",), BESIDE, _question("query")),
    ],
}
GOOD = ("label", "kto_tag", "desirable")  # KTO 数据：这个回答好（true）还是不好（false）
SCHEMAS["KTO"] = [
    ((*needed, column), optional, _thumb(convert, column))
    for column in GOOD
    for needed, optional, convert in SCHEMAS["SFT"]
]
USED_LATER = {"kinds"}  # 留在行里，奖励模型的评测要用


def _convert(
    rows: list[dict],
    where: str,
    stage: str,
    keep: tuple[str, ...] = (),
    skipped_rows: dict[int, str] | None = None,
) -> list[dict]:
    if not rows:
        raise UserError(f"{where} 里没有数据。")
    needed, optional, convert = _detect(rows[0], where, stage)
    verdict = (
        next((column for column in GOOD if _all_true_or_false(rows, column)), None)
        if stage == "SFT"
        else None
    )
    used = {*needed, *optional, *USED_LATER, *keep, verdict}
    results: list[dict] = []
    skipped: Counter[str] = Counter()
    unused: dict[str, None] = {}  # 只用它的次序
    for number, row in enumerate(rows, 1):
        if missing := [column for column in needed if column not in row]:
            raise UserError(
                f"{where} 第 {number} 条缺少 {'、'.join(missing)} 一栏（它有 {'、'.join(row) or '零栏'}）；"
                f"第 1 条是 {'-'.join(needed)} 格式，各条要一样。"
            )
        unused |= dict.fromkeys(column for column in row if column not in used and row[column] is not None)
        try:
            if verdict and not _is_true(row[verdict]):
                raise Skip(f"{verdict} 是 false（不好的回答，不能照着学）")
            if stage == "SFT" and row.get("weight") in (0, "0"):
                raise Skip("weight 是 0")
            result = convert({column: row[column] for column in needed + optional if column in row})
        except Malformed as error:
            raise UserError(f"{where} 第 {number} 条：{error}。") from None
        except Skip as reason:
            skipped[str(reason)] += 1
            if skipped_rows is not None:
                skipped_rows[number - 1] = str(reason)
            continue
        kept = {key: value for key, value in row.items() if key not in needed + optional}
        results.append(kept | result)
    counts = "，".join(f"{reason} {count} 行" for reason, count in skipped.most_common())
    if not results:
        raise UserError(f"{where} 的 {len(rows)} 行没有一行可用：{counts}。请检查内容，或换一个 --dataset。")
    if skipped:
        print(f"{where}：跳过 {skipped.total()} 行（共 {len(rows)} 行）：{counts}")
    if unused:
        print(f"{where}：没有用到的栏：{'、'.join(unused)}")
    return results


def _all_true_or_false(rows: list[dict], column: str) -> bool:
    """这一栏在每一行里都是真假：是在说回答好不好，不是类别。"""
    return all(_is_true_or_false(row.get(column)) for row in rows)


def _is_true_or_false(value: object) -> bool:
    """真假写作 true、false（大小写不拘），或 1、0。"""
    return str(value).strip().lower() in ("true", "false", "1", "0")


def _is_true(value: object) -> bool:
    return str(value).strip().lower() in ("true", "1")


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
    fits = [name for name in fits if name != "PPO"] or fits  # 别的阶段的数据，PPO 大多也能用
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
    if chosen and rejected and {chosen[same]["role"], rejected[same]["role"]} != {"assistant"}:
        raise Skip("chosen 和 rejected 的问题不同")
    return _pair(opening(row, chosen[:same]), chosen[same:], rejected[same:])


def _asks(whole: list[Turn], prompt: list[Turn]) -> bool:
    """整段对话里有没有 prompt 一栏的最后那个问题；prompt 是空的不比。"""
    wanted = [message["content"].strip() for message in prompt if message["role"] == "user"][-1:]
    asked = [message["content"].strip() for message in whole if message["role"] == "user"]
    return not wanted or not wanted[0] or wanted[0] in asked
