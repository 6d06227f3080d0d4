"""工具调用怎样评：照 BFCL 的几类题（单个、几选一、并行、不该调用、多轮），用我们自己写的 AST 匹配。

你会学到
  1. 不能比文字：同一个调用有许多写法（参数的次序、空格、1 与 1.0、北京与北京市）。AST 匹配先读成"函数、参数、值"再比，
     每个参数有几个可接受的值，可以不写的可以不写。
  2. AST 匹配也会错：没有想到的写法，它判错（可接受的值没有列全）；BFCL 的规矩去掉标点再比，12-3 冒充得了 12*3。
     把两边都做一遍、比结果（执行匹配），认得出这些；可是结果碰巧一样的，它也认。量尺自己要先量一量。
  3. 多轮的题比状态与结果：每一轮以后，世界一不一样，该看到的结果看到没有；怎样走到那里，不管。
  4. 约束解码能让每个调用都合法，不能让它对；不该调用的题，它还一定错。

怎么运行
  python evaluate_tools.py                                     # 量尺的考试；小模型答小世界的题、日常的中文题
  python evaluate_tools.py --constrained                       # 每个模型再答一遍，只许写合法的调用
  python evaluate_tools.py --models smollm2 --dataset daily --n 24
  python evaluate_tools.py --models Qwen/Qwen3-0.6B --dataset daily
  python evaluate_tools.py --base_url http://127.0.0.1:8000/v1 --server_model 名字 --dataset daily
  python evaluate_tools.py --dataset bfcl:simple_python --models …     # 装了 bfcl-eval：它自带的题
  python evaluate_tools.py --dataset 题.json --possible_answer 答案.json --answers 结果.json

应当看到（tiny，实测见本文件夹的 README.md）：会用工具的小模型在自己的世界里几乎全对，换成没有见过的工具就几乎全错；
没训练过的模型只有"不该调用"是满分：它什么也不会，也就什么也不叫。约束让合法的调用变成全部，对的没有变多。

参考：Patil et al. 2025（BFCL）；Yan et al. 2024（gorilla.cs.berkeley.edu，Berkeley Function-Calling Leaderboard）。
"""

from nlp_common.base.cli import run_main

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from agent_models import LocalModel, ServerModel
from call_answers import ask, read_answers, read_calls
from call_questions import DAILY, GROUPS, Question, load_questions
from call_report import RULERS, draw_rulers, print_failures, print_rulers, print_scores, write_page
from call_values import OMITTED, value_fault
from call_variants import text_of, variants_of
from call_world import same_effect
from nlp_common.base.arguments import COUNT, POSITIVE, option
from nlp_common.base.device import pick_device
from nlp_common.base.errors import UserError
from nlp_common.base.intervals import Interval, mean_of_intervals, proportion_interval
from nlp_common.data.rows import data_sha256
from nlp_common.hub.chat_server import ChatServer
from nlp_common.lm.loading import load_causal_lm
from nlp_common.lm.reply_parser import BrokenCall, Call
from nlp_common.train.lesson import run_lesson, run_part
from nlp_common.train.settings import LessonSettings, parse_settings
from nlp_common.train.stage import Stage
from schema_check import check_call
from tiny_agent import build_base, tool_model

HOME = Path(__file__).resolve().parent
PRESETS = {
    "tiny": {"models": "tool,untrained", "dataset": "built_in", "max_new_tokens": 96},
    "full": {"models": "Qwen/Qwen3-0.6B", "dataset": "daily", "max_new_tokens": 512},
}


@dataclass
class ToolEvaluation(LessonSettings):
    models: str | None = option(
        "评哪几个，逗号隔开：tool（会用工具的小模型）、untrained、smollm2、文件夹、hub 名"
    )
    source: str = option("hub 名从哪里下载", "hf", choices=("hf", "modelscope"))
    dataset: str | None = option(
        "题：tiny_world、daily（日常的中文题）、built_in（这两套）、bfcl:类别，或 BFCL 格式的文件"
    )
    possible_answer: str | None = option("BFCL 的答案文件；默认找题目旁边的 possible_answer/同名文件")
    n: int | None = option("每套最多几道题；默认小世界 200 道，别的全部", limits=COUNT)
    answers: list[str] | None = option("不用模型，评这些文件里的回答：一行一个 id 与 result")  # noqa: RUF009
    base_url: str | None = option("回答的是一个 OpenAI 接口的服务器，写到 /v1 为止")
    server_model: str | None = option("服务器上的哪个模型")
    api_key_env: str = option("钥匙在哪个环境变量里", "OPENAI_API_KEY")
    timeout: float = option("服务器几秒不回答就算没有回答", 60.0, POSITIVE)
    constrained: bool = option("本机的模型再答一遍，只许写合法的调用（多轮的题不答：它停不下来）", False)
    max_new_tokens: int | None = option("一次回答最多几个 token", limits=COUNT)

    def check(self) -> None:
        if self.answers and self.base_url:
            raise UserError("--answers 与 --base_url 只给一个：评现成的回答，还是问服务器。")
        if bool(self.base_url) != bool(self.server_model):
            raise UserError("--base_url 与 --server_model 要一起给：网址，和那里的哪个模型。")
        if self.possible_answer and self.dataset in ("tiny_world", "daily", "built_in"):
            raise UserError(f"{self.dataset} 自带答案：去掉 --possible_answer，或 --dataset 写题的文件。")
        if self.constrained and (self.answers or self.base_url):
            raise UserError("--constrained 要看得到模型的分数，只能用在本机：去掉 --answers、--base_url。")
        if self.answers and len({Path(path).stem for path in self.answers}) < len(self.answers):
            raise UserError("--answers 的几个文件同名：模型的名字取自文件名，请改成不同的。")


# ---------------------------------------------------------------- 1. AST 匹配


@dataclass(frozen=True)
class Verdict:
    """对不对；kind 是哪一种错（call_report.KINDS），message 是一句话。"""

    right: bool
    kind: str = ""
    message: str = ""


RIGHT = Verdict(True)


def match_call(tool: dict, call: Call, answer: dict, own: bool = False) -> Verdict:
    """一个调用对一个标准答案：函数名、该写的参数、多写的参数、每个值，最后是没有写的参数。"""
    ((name, accepted),) = answer.items()
    parameters = tool.get("bfcl") or tool["function"]["parameters"]
    if call.name != name:
        return Verdict(False, "function", f"要 {name}，叫的是 {call.name}")
    for argument in parameters.get("required", []):
        if argument not in call.arguments:
            return Verdict(False, "missing", f"少了 {argument}")
    for argument, value in call.arguments.items():
        if argument not in parameters["properties"] or argument not in accepted:
            return Verdict(False, "unexpected", f"多了 {argument}")
        if fault := value_fault(value, parameters["properties"][argument], accepted[argument], own):
            return Verdict(False, fault[0], f"{argument} 的{fault[1]}")
    for argument, values in accepted.items():
        if argument not in call.arguments and OMITTED not in values:
            return Verdict(False, "missing", f"少了 {argument}：可以不写的参数，这里要写")
    return RIGHT


def match_calls(question: Question, calls: list[Call | BrokenCall], own: bool = False) -> Verdict:
    """单轮的题：不该调用的、该调用的，和几个调用对几个答案，次序不论。"""
    readable = [call for call in calls if isinstance(call, Call)]
    if question.group == "irrelevance":  # 写坏了的不算调用，BFCL 也这样
        return Verdict(False, "unneeded", f"不该调用，叫了 {readable[0].name}") if readable else RIGHT
    if not readable and calls:
        return Verdict(False, "broken", calls[0].error)
    if not readable:
        return Verdict(False, "no_call", "没有调用")
    if question.group == "relevance":
        return RIGHT
    if len(calls) != len(question.answers):
        return Verdict(False, "count", f"要 {len(question.answers)} 个调用，写了 {len(calls)} 个")
    tools = {tool["function"]["name"]: tool for tool in question.tools}
    left = list(calls)
    for answer in question.answers:  # 一个答案找一个合它的调用，找到的不再用
        tried = []
        for call in left:
            if isinstance(call, BrokenCall):
                tried.append(Verdict(False, "broken", call.error))
                continue
            tried.append(match_call(tools[next(iter(answer))], call, answer, own))
            if tried[-1].right:
                left.remove(call)
                break
        if not tried[-1].right:
            return next((each for each in tried if each.kind != "function"), tried[0])
    return RIGHT


# ---------------------------------------------------------------- 2. 多轮：比状态，比结果


def check_turns(
    make_world: Callable, said: list[list[Call]], truth: list[list[Call]], silent: bool = True
) -> Verdict:
    """两个一样的世界，一个照模型的调用做，一个照标准的做；每一轮以后比。

    状态：要一样。结果：标准的这一轮的每个结果，模型到这一轮为止都看到过（多看的不算错）。
    silent：标准里不调用的一轮（缺了参数、缺了工具，该问），模型也不许调用；BFCL 只靠下一轮的状态看，不另外管。
    """
    if len(said) != len(truth):
        return Verdict(False, "broken", f"要 {len(truth)} 轮，只说了 {len(said)} 轮")
    ours, theirs, seen = make_world(), make_world(), []
    for turn, (calls, wanted) in enumerate(zip(said, truth, strict=True), 1):
        seen += [ours.run(call) for call in calls]
        results = [theirs.run(call) for call in wanted]
        if not wanted:
            if calls and silent:
                return Verdict(False, "unneeded", f"第 {turn} 轮不该调用，叫了 {calls[0].name}")
            continue
        if not calls:
            return Verdict(False, "no_call", f"第 {turn} 轮没有调用")
        if ours.state() != theirs.state():
            return Verdict(False, "state", f"第 {turn} 轮以后状态不对")
        left = list(seen)
        for result in results:
            if result not in left:
                return Verdict(False, "response", f"第 {turn} 轮没有看到该有的结果：{result[:60]}")
            left.remove(result)
    return RIGHT


# ---------------------------------------------------------------- 3. 五把量尺


def judge(question: Question, turns: list[list[str]]) -> dict[str, Verdict]:
    """一道题的回答，几把量尺各怎样判；多轮的只有一把（状态与结果）。"""
    calls = [[read_calls(text, question.tools) for text in turn] for turn in turns]
    if question.is_multi_turn:
        flat = [[call for step in turn for call in step if isinstance(call, Call)] for turn in calls]
        return {"bfcl": check_turns(question.make_world, flat, question.truth)}
    text = turns[0][0] if turns and turns[0] else ""
    return judge_calls(question, text, calls[0][0] if text else [])


def judge_calls(question: Question, text: str, calls: list) -> dict[str, Verdict]:
    found = {"bfcl": match_calls(question, calls), "own": match_calls(question, calls, own=True)}
    if question.group in ("irrelevance", "relevance"):
        return found
    wanted = question.reference
    readable = [call for call in calls if isinstance(call, Call)]
    found["text"] = Verdict(text.strip() == text_of(wanted))
    found["json"] = Verdict(sorted_json(calls) == sorted_json(wanted))
    if question.make_world:
        same = len(readable) == len(calls) and same_effect(question.make_world, readable, wanted)
        found["run"] = Verdict(same)
    return found


def sorted_json(calls: list) -> list[str]:
    """读成 JSON 再比：空格、参数的次序不计较，值要一模一样，1 与 1.0 也不同。"""
    return [
        json.dumps([call.name, call.arguments], sort_keys=True) if isinstance(call, Call) else call.text
        for call in calls
    ]


def examine_rulers(questions: list[Question]) -> dict:
    """量尺的考试：知道对错的写法（call_variants.py），各量尺判成对的有几成。→ {写法: {"right", "n", 量尺: 比例}}"""
    found: dict[str, dict] = {}
    for question in questions:
        if question.is_multi_turn or question.make_world is None:
            continue
        for kind, right, text in variants_of(question):
            verdicts = judge_calls(question, text, read_calls(text, question.tools))
            row = found.setdefault(kind, {"right": right, "n": 0} | dict.fromkeys(RULERS, 0))
            row["n"] += 1
            for ruler in RULERS:
                row[ruler] += verdicts[ruler if ruler in verdicts else "bfcl"].right
    for row in found.values():
        row |= {ruler: row[ruler] / row["n"] for ruler in RULERS}
    return found


# ---------------------------------------------------------------- 4. 分


def summarise(questions: list[Question], answers: dict[str, list[list[str]]]) -> tuple[dict, list[dict]]:
    """→ (分, 答错的)。各类的分、总分（各类一样重），各量尺的分，合法的调用占几成。"""
    by_group: dict[str, list[bool]] = {}
    rulers: dict[str, list[bool]] = {}
    valid, failures = [], []
    for question in questions:
        turns = answers[question.id]
        verdicts = judge(question, turns)
        by_group.setdefault(question.group, []).append(verdicts["bfcl"].right)
        if "text" in verdicts:
            for ruler, verdict in verdicts.items():
                rulers.setdefault(ruler, []).append(verdict.right)
        listed = [{key: tool[key] for key in ("type", "function")} for tool in question.tools]
        for call in [call for turn in turns for text in turn for call in read_calls(text, question.tools)]:
            valid.append(not check_call(call, listed))
        if not verdicts["bfcl"].right:
            failures.append(failure(question, turns, verdicts["bfcl"]))
    groups = {
        group: proportion_interval(sum(by_group[group]), len(by_group[group]))
        for group in GROUPS
        if group in by_group
    }
    scores = {
        "groups": {group: as_dict(each) for group, each in groups.items()},
        "overall": as_dict(mean_of_intervals(list(groups.values()))),
        "every": as_dict(proportion_interval(sum(map(sum, by_group.values())), len(questions))),
        "rulers": {
            ruler: as_dict(proportion_interval(sum(each), len(each))) for ruler, each in rulers.items()
        },
        "errors": {},
    }
    if valid:
        scores["valid"] = as_dict(proportion_interval(sum(valid), len(valid)))
    for each in failures:
        scores["errors"][each["kind"]] = scores["errors"].get(each["kind"], 0) + 1
    return scores, failures


def failure(question: Question, turns: list[list[str]], verdict: Verdict) -> dict:
    wanted = [text_of(calls) for calls in question.truth] or [text_of(question.reference)]
    return {
        "id": question.id,
        "kind": verdict.kind,
        "message": verdict.message,
        "asked": [turn[-1]["content"] for turn in question.turns],
        "wanted": wanted,
        "said": turns,
    }


def as_dict(interval: Interval) -> dict:
    ends = {name: abs(round(getattr(interval, name), 4)) for name in ("value", "low", "high")}
    return ends | {"n": interval.n}


# ---------------------------------------------------------------- 5. 全貌


def main(argv: list[str] | None = None) -> dict:
    settings = parse_settings(ToolEvaluation, PRESETS, argv)
    names = ["tiny_world", "daily"] if settings.dataset == "built_in" else [settings.dataset]
    sets = {name: load_questions(name, settings.n, settings.seed, settings.possible_answer) for name in names}
    files = [DAILY if name == "daily" else name for name in names] + [settings.possible_answer]
    more: dict = {"files": [data_sha256(str(file)) for file in files if file]}
    given = {}
    if settings.answers:  # 文件写错了，先说
        if len(sets) > 1:
            raise UserError("--answers 只能评一套题：--dataset 写 tiny_world、daily 或一个文件。")
        (questions,) = sets.values()
        given = {Path(path).stem: read_answers(path, questions) for path in settings.answers}
        more["answers_sha256"] = [data_sha256(path) for path in settings.answers]
    elif settings.base_url:
        server_of(settings).check()
    else:
        more["ids"] = {name: find_model(name, settings)["id"] for name in split(settings.models)}
    record = run_lesson("evaluate_tools", HOME, settings, partial(evaluate, sets=sets, given=given), **more)
    print_scores(record["metrics"])
    return record


def split(names: str) -> list[str]:
    return list(dict.fromkeys(name.strip() for name in names.replace("，", ",").split(",") if name.strip()))


def evaluate(stage: Stage, sets: dict[str, list[Question]], given: dict) -> dict:
    settings = stage.settings
    metrics: dict = {"sets": {}}
    failures: dict[str, dict] = {}
    if "daily" in sets and not settings.answers:
        metrics["exam"] = examine_rulers(load_questions("daily", None, settings.seed))
        print_rulers(metrics["exam"])
    for name, questions in sets.items():
        title = Path(name).stem.replace(":", "-")
        metrics["sets"][title] = {}
        failures[title] = {}
        for model, answers, asked in answers_of(stage, title, questions, given):
            scores, wrong = summarise(asked, answers)
            metrics["sets"][title][model] = scores
            failures[title][model] = wrong
            print_failures(title, model, wrong)

    def write(folder: Path) -> None:
        write_page(folder / "report.html", metrics, failures)
        if "exam" in metrics:
            draw_rulers(folder / "rulers.svg", metrics["exam"])

    return stage.save(metrics, {"name": settings.dataset, "rows": sum(map(len, sets.values()))}, write)


def answers_of(stage: Stage, title: str, questions: list[Question], given: dict):
    """→ (模型的名字, {题: 回答}, 答的是哪些题)；答完一份存一份，中断了不重做。"""
    settings = stage.settings
    if given:
        for model, answers in given.items():
            yield model, answers, questions
        return
    names = [settings.server_model] if settings.base_url else split(settings.models)
    for name in names:
        for constrained in (False, True) if settings.constrained else (False,):
            asked = [each for each in questions if not (constrained and each.is_multi_turn)]
            label = Path(name).name + ("+constrained" if constrained else "")
            work = partial(answer_all, name=name, questions=asked, constrained=constrained)
            found = run_part(stage, f"{title}-{label}", work)
            for key, what in (("too_long", "次提示放不下，没有问"), ("silent", "次服务器没有回答")):
                if found[key]:
                    print(f"{title}，{label}：{found[key]} {what}，都算没有调用。")
            yield label, found["answers"], asked


def answer_all(part: Stage, name: str, questions: list[Question], constrained: bool) -> dict:
    settings = part.settings
    if settings.base_url:
        model = ServerModel(server_of(settings))
    else:
        tokenizer, network = load_causal_lm(find_model(name, settings)["path"])
        tokenizer.model_max_length = 1 << 30  # 放不放得下由 ask 看，不用分词器警告
        if name == "untrained":
            network = build_base(tokenizer, settings.seed)
        model = LocalModel(network.to(pick_device()).requires_grad_(False), tokenizer, name)
    return ask(model, questions, settings.max_new_tokens, constrained)


def find_model(name: str, settings: ToolEvaluation) -> dict:  # untrained 只用 tool 的分词器
    return tool_model(None if name in ("tool", "untrained") else name, settings.source)


def server_of(settings: ToolEvaluation) -> ChatServer:
    return ChatServer(
        settings.base_url, settings.server_model, settings.api_key_env, timeout=settings.timeout
    )


if __name__ == "__main__":
    run_main(main)
