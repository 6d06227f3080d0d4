"""evaluate_tools.py 的题：自带的（daily_questions.jsonl）、小世界的、本地的 BFCL 文件，读成一个样子。

答案照 BFCL 的写法：``[{工具名: {参数: [可接受的值, …]}}]``，值里有空字符串，就是可以不写。
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from call_world import TOOLS, TinyWorld, daily_world
from daily_apis import SYSTEM, fresh_world, methods_of
from nlp_common.base.errors import UserError
from nlp_common.lm.reply_parser import Call
from tool_world import UNNEEDED, tasks

DAILY = Path(__file__).with_name("daily_questions.jsonl")
NEWLY = "刚才缺的工具现在有了，请再试一次。"  # 多轮题里，工具后来才有的那一轮
JSON_TYPES = {"dict": "object", "float": "number", "tuple": "array", "any": "string"}
KEPT = ("type", "description", "properties", "required", "items", "enum", "default", "additionalProperties")
LANGUAGES = ("java", "javascript")
GROUPS = ("simple", "multiple", "parallel", "parallel_multiple", "irrelevance", "relevance", "multi_turn")


@dataclass
class Question:
    """一道题。turns 是每一轮用户的话；answers 是单轮的答案，truth 是多轮的每一轮该有的调用。

    make_world 造一个新的世界（才能执行），没有就是 None；later 是第几轮才有的工具。
    """

    id: str
    category: str
    turns: list[list[dict]]
    tools: list[dict]
    answers: list[dict] = field(default_factory=list)
    truth: list[list[Call]] = field(default_factory=list)
    system: str = ""
    later: dict[int, list[str]] = field(default_factory=dict)
    make_world: Callable[[], Any] | None = None
    also_right: list[list[Call]] = field(default_factory=list)
    also_wrong: list[list[Call]] = field(default_factory=list)

    @property
    def group(self) -> str:
        """BFCL 的大类：live_simple、simple_python 都是 simple。"""
        name = self.category.removeprefix("live_")
        return "multi_turn" if name.startswith("multi_turn") else name.removesuffix("_python")

    @property
    def is_multi_turn(self) -> bool:
        return self.group == "multi_turn"

    @property
    def reference(self) -> list[Call]:
        """答案里头一组可接受的值；可以不写的不写。"""
        return [reference_call(answer) for answer in self.answers]

    def tools_at(self, turn: int) -> list[dict]:
        """第 turn 轮列出来的工具。"""
        hidden = {name for first, names in self.later.items() if turn < first for name in names}
        return [tool for tool in self.tools if tool["function"]["name"] not in hidden]


def reference_call(answer: dict) -> Call:
    ((name, accepted),) = answer.items()
    written = {key: values for key, values in accepted.items() if values and "" not in values}
    return Call(name, {key: plain_value(values[0]) for key, values in written.items()})


def listed(accepted: Any) -> list:
    return accepted if isinstance(accepted, list) else [accepted]


def plain_value(value: Any) -> Any:
    """可接受的值里的字典，每一栏又是一列可接受的值：都取头一个。再往里就是值本身。"""
    if isinstance(value, dict):
        return {
            key: listed(each)[0] for key, each in value.items() if listed(each) and "" not in listed(each)
        }
    if isinstance(value, list):
        return [plain_value(each) if isinstance(each, dict) else each for each in value]
    return value


# ---------------------------------------------------------------- 自带的、小世界的


def load_questions(name: str, n: int | None, seed: int, possible_answer: str | None = None) -> list[Question]:
    """--dataset 的一个 → 题；n 是最多几道，各类照原来的比例取。"""
    if name == "daily":
        return some_of(daily_questions(), n)
    if name == "tiny_world":
        return tiny_questions(n or 200, seed)
    return some_of(bfcl_questions(name, possible_answer), n)


def some_of(questions: list[Question], n: int | None) -> list[Question]:
    """隔几道取一道，次序不变；题是一类一类排的，所以各类的比例不变。"""
    if n is None or n >= len(questions):
        return questions
    return [questions[i * len(questions) // n] for i in range(n)]


def daily_questions() -> list[Question]:
    rows = [json.loads(line) for line in DAILY.read_text(encoding="utf-8").splitlines()]
    return [daily_question(row) for row in rows]


def daily_question(row: dict) -> Question:
    category = row["id"].rpartition("_")[0]
    if "truth" in row:
        names = [name for api in fresh_world(row["apis"]).values() for name in methods_of(api)]
        later = {int(turn): hidden for turn, hidden in row.get("later", {}).items()}
        turns = [[{"role": "user", "content": ask or NEWLY}] for ask in row["asks"]]
        truth = [as_calls(turn) for turn in row["truth"]]

        def make_world():
            return daily_world(row["apis"])

        tools = [TOOLS[name] for name in names]
        return Question(row["id"], category, turns, tools, [], truth, SYSTEM, later, make_world)
    return Question(
        row["id"],
        category,
        [[{"role": "user", "content": row["ask"]}]],
        [TOOLS[name] for name in row["tools"]],
        row.get("answers", []),
        system=SYSTEM,
        make_world=daily_world,
        also_right=[as_calls(calls) for calls in row.get("also_right", [])],
        also_wrong=[as_calls(calls) for calls in row.get("also_wrong", [])],
    )


def as_calls(calls: list[dict]) -> list[Call]:
    """``[{工具名: 参数}]`` → 调用。"""
    return [Call(name, arguments) for call in calls for name, arguments in call.items()]


def tiny_questions(n: int, seed: int) -> list[Question]:
    """小世界留出的题，照 BFCL 的类分：只列一件工具的是 simple，几件的是 multiple；两步的当作一轮的 multi_turn。"""
    found = []
    for place, task in enumerate(tasks(n, seed, heldout=True), 1):
        steps, kind = task["steps"], task["kind"]
        if kind in UNNEEDED:
            category = "irrelevance"
        elif len(steps) > 1:
            category = "multi_turn_base"
        elif len(steps[0]) > 1:
            category = "parallel"
        else:
            category = "simple" if len(task["tools"]) == 1 else "multiple"
        calls = [Call(call["name"], call["arguments"]) for step in steps for call in step]
        multi = category == "multi_turn_base"
        answers = [{c.name: {key: [value] for key, value in c.arguments.items()}} for c in calls]
        found.append(
            Question(
                f"{category}_{place}",
                category,
                [[{"role": "user", "content": task["question"]}]],
                task["tools"],
                [] if multi else answers,
                [calls] if multi else [],
                make_world=world_maker(task),
            )
        )
    return found


def world_maker(task: dict) -> Callable[[], TinyWorld]:
    def make() -> TinyWorld:
        return TinyWorld(task)

    return make


# ---------------------------------------------------------------- BFCL 的文件


def bfcl_folder() -> Path:
    """装了的 bfcl-eval 带着的数据。"""
    spec = find_spec("bfcl_eval")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            "没有装 bfcl-eval，不知道它的题在哪里：pip install --no-deps bfcl-eval（只要里面的数据，2 MB），"
            "或用 --dataset 给出一个 BFCL 的文件。"
        )
    return Path(next(iter(spec.submodule_search_locations))) / "data"


def bfcl_questions(name: str, possible_answer: str | None = None) -> list[Question]:
    """BFCL 的题目文件（一行一道 JSON）与答案文件；bfcl:simple_python 是装了的 bfcl-eval 自带的那一类。

    没有给答案文件，就找题目旁边的 possible_answer/同名文件。irrelevance、relevance 没有答案。
    """
    path = Path(name).expanduser()
    if name.startswith("bfcl:"):
        path = bfcl_folder() / f"BFCL_v4_{name.removeprefix('bfcl:')}.json"
        if not path.exists():
            have = sorted(each.stem.removeprefix("BFCL_v4_") for each in path.parent.glob("BFCL_v4_*.json"))
            raise UserError(
                f"bfcl-eval 里没有 {name.removeprefix('bfcl:')} 这一类；有的是：{'、'.join(have)}。"
            )
    if not path.is_file():
        raise UserError(f"没有这个题目文件：{name}。请检查 --dataset 的路径。")
    rows = json_lines(path)
    answer_path = (
        Path(possible_answer).expanduser() if possible_answer else path.parent / "possible_answer" / path.name
    )
    if possible_answer and not answer_path.is_file():
        raise UserError(f"没有这个答案文件：{possible_answer}。请检查 --possible_answer 的路径。")
    answers: dict[str, tuple[int, Any]] = {}
    if answer_path.is_file():
        for line, row in json_lines(answer_path):
            if not isinstance(row.get("id"), str) or not isinstance(row.get("ground_truth"), list):
                raise UserError(f"{answer_path.name} 第 {line} 行要有 id（文字）与 ground_truth（列表）。")
            answers[row["id"]] = (line, row["ground_truth"])
    found, seen = [], {}
    for line, row in rows:
        where = f"{path.name} 第 {line} 行"
        question = bfcl_question(row, where)
        if question.id in seen:
            raise UserError(f"{where}的 id {question.id} 与第 {seen[question.id]} 行的重复。")
        seen[question.id] = line
        if "relevance" not in question.category:
            if question.id not in answers:
                raise UserError(
                    f"{where}（{question.id}）没有答案：用 --possible_answer 给出答案文件，或放在题目旁边的 possible_answer/{path.name}。"
                )
            at, truth = answers[question.id]
            question.answers = checked_answers(truth, question, f"{answer_path.name} 第 {at} 行")
        found.append(question)
    return found


def json_lines(path: Path) -> list[tuple[int, dict]]:
    """一行一个 JSON 对象 → (行号, 对象)；坏的行说出行号。"""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{path.name} 不是 UTF-8 的文字：请另存为 UTF-8。") from None
    found = []
    for line, written in enumerate(text.splitlines(), 1):
        if not written.strip():
            continue
        try:
            row = json.loads(written)
        except (json.JSONDecodeError, RecursionError) as error:
            column = getattr(error, "colno", 1)
            raise UserError(
                f"{path.name} 第 {line} 行第 {column} 个字不是合法的 JSON：{written[max(0, column - 10) : column + 10]}"
                "。BFCL 的文件一行一个 JSON 对象（不是一个大列表）。"
            ) from None
        if not isinstance(row, dict):
            raise UserError(f"{path.name} 第 {line} 行要是一个 JSON 对象 {{…}}。")
        found.append((line, row))
    if not found:
        raise UserError(f"{path.name} 是空的，没有一行。")
    return found


def bfcl_question(row: dict, where: str) -> Question:
    if not isinstance(row.get("id"), str) or "_" not in row["id"]:
        raise UserError(f"{where}没有 id，或不像 simple_python_0 这样的写法：类别从 id 里读。")
    category = row["id"].rpartition("_")[0]
    if category.rpartition("_")[2] in LANGUAGES:
        raise UserError(
            f"{where}（{row['id']}）的参数是 Java、JavaScript 的写法，这里只评 Python 与 JSON 的：换 simple_python 等文件。"
        )
    if category.startswith("multi_turn"):
        raise UserError(
            f"{where}（{row['id']}）是 BFCL 的多轮题，要它自己的接口类，这里不做；自带的多轮题用 --dataset daily。"
        )
    question = Question(row["id"], category, [], [])
    if question.group not in GROUPS:
        raise UserError(
            f"{where}的类别 {category} 不认识；认识的是：{'、'.join(GROUPS[:-1])}（前面可以有 live_）。"
        )
    turns, functions = row.get("question"), row.get("function")
    good = isinstance(turns, list) and turns and all(isinstance(turn, list) and turn for turn in turns)
    if not good or not all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
        for turn in turns
        for m in turn
    ):
        raise UserError(f'{where}的 question 要写成 [[{{"role": "user", "content": "…"}}]]。')
    if isinstance(functions, dict):
        functions = [functions]
    needed = question.group not in ("irrelevance", "relevance")  # BFCL 有一道不该调用的，一件工具也没有列
    if not isinstance(functions, list) or (needed and not functions):
        raise UserError(f"{where}没有 function：要一个列表，列出可以用的函数。")
    question.system = "".join(m["content"] for m in turns[0] if m["role"] == "system")
    question.turns = [[m for m in turns[0] if m["role"] != "system"]]
    question.tools = [bfcl_tool(function, where) for function in functions]
    return question


def bfcl_tool(function: Any, where: str) -> dict:
    """BFCL 的函数说明 → OpenAI 的写法：类型的名字换成 JSON schema 的，原来的留在 bfcl 里（比类型用）。"""
    parameters = function.get("parameters") if isinstance(function, dict) else None
    good = isinstance(parameters, dict) and isinstance(parameters.get("properties"), dict)
    if not good or not isinstance(function.get("name"), str):
        raise UserError(f"{where}有一个函数不成样子：要有 name，与 parameters 里的 properties。")
    for name, schema in parameters["properties"].items():
        if not isinstance(schema, dict) or not isinstance(schema.get("type"), str):
            raise UserError(f"{where}的函数 {function['name']} 的参数 {name} 没有写 type。")
    written = {
        "name": function["name"],
        "description": str(function.get("description", "")),
        "parameters": json_schema(parameters),
    }
    return {"type": "function", "function": written, "bfcl": parameters}


def json_schema(schema: dict) -> dict:
    """BFCL 的说明里有 optional 一类不是 JSON schema 的栏：不要。"""
    found = {}
    for key, value in schema.items():
        if key not in KEPT or (key == "required" and not isinstance(value, list)):
            continue
        if key == "type":
            value = JSON_TYPES.get(value, value)
        elif key == "items" and isinstance(value, dict):
            value = json_schema(value)
        elif key == "properties" and isinstance(value, dict):
            value = {name: json_schema(each) for name, each in value.items() if isinstance(each, dict)}
        found[key] = value
    return found


def checked_answers(truth: list, question: Question, where: str) -> list[dict]:
    names = {tool["function"]["name"] for tool in question.tools}
    for answer in truth:
        good = isinstance(answer, dict) and len(answer) == 1
        accepted = next(iter(answer.values())) if good else None
        if not isinstance(accepted, dict) or not all(isinstance(each, list) for each in accepted.values()):
            raise UserError(f"{where}的 ground_truth 要写成 [{{函数名: {{参数: [可接受的值, …]}}}}]。")
        if next(iter(answer)) not in names:
            raise UserError(f"{where}的答案用了 {next(iter(answer))}，题目里没有这个函数。")
    if not truth:
        raise UserError(f"{where}的 ground_truth 是空的。")
    return truth
