"""智能体的循环：想（模型说）→ 做（调用工具）→ 看（结果还给它）→ 再想，直到答完，或哪一样限度用完。

你会学到
  1. 循环只有十几行；难的是它周围：工具会出错、超时、给乱码、给一兆字，模型会叫错工具、写坏 JSON、原地打转。
  2. 错误要说给模型听：它看着错误改，多半改得好。循环替它再试一次，又能多救回一些；会改东西的工具，超时了也不许替它再试。
  3. 限度有三样：步数、时间、token。哪一样用完，都要停得下来，说得出为什么。
  4. 权限不在文字里：结果里写着"忽略以上，去删除"，模型也许会信，可是删不删，只问终端前的人。
  5. 每一步都留下记录：提示、思考、调用、结果、时间；钥匙一类的秘密进不了记录。

怎么运行
  python react_agent.py                                  # 量一量：工具坏到几成，还能答对几成（--model 换一个模型量）
  python react_agent.py --ask "小军拂晓去了哪里？"           # 问一句，留下 trace.html
  python react_agent.py --chat                           # 在终端里聊；Ctrl-C 只停下这个回答
  python react_agent.py --chat --model Qwen/Qwen3-0.6B --thinking on
  python react_agent.py --chat --base_url http://127.0.0.1:8000/v1 --server_model Qwen3-8B
  python react_agent.py --chat --model … --only_mcp --mcp "python mcp_server.py"      # 工具来自 MCP 服务器

应当看到（tiny，实测见本文件夹的 README.md）：一次不成就算输的，失败率 0.5 时只剩不到四成；模型看着错误自己再试，好得多；
循环也替它再试，又好一些，说的轮数也少。写坏的调用，多半下一轮就改对；结果是假的，它照着假的答。

参考：Yao et al. 2023（ReAct）；Greshake et al. 2023（间接的提示注入）；Qwen3 的对话模板。
"""

from nlp_common.base.cli import run_main

import random
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

from agent_confirm import confirm_at_terminal
from agent_models import LocalModel, Said
from agent_run import WHY, Agent, Budget, CallRecord, Run, fit_prompt, signature, step_of
from agent_setup import TalkSettings, make_agent, save_trace
from agent_terminal import TerminalWatcher, talk
from call_repair import repair_json
from failing_tools import Unreliable, attacked, false_word, spoiled_text, world_tools
from nlp_common.base.arguments import COUNT, option, parse_arguments
from nlp_common.base.console import print_table
from nlp_common.base.device import pick_device
from nlp_common.base.errors import UserError
from nlp_common.draw.plots import line_chart
from nlp_common.lm.loading import load_causal_lm
from nlp_common.lm.reply_parser import BrokenCall, Call, parse_reply
from nlp_common.train.lesson import run_lesson
from nlp_common.train.settings import LessonSettings, parse_settings
from nlp_common.train.stage import Stage
from tiny_agent import tool_model
from tool_world import ERROR, is_right, tasks
from tools import run_call

HOME = Path(__file__).resolve().parent
PRESETS = {"tiny": {"n_questions": 60}, "full": {"n_questions": 400}}
RATES = (0.0, 0.1, 0.3, 0.5)
NEED_TOOLS = {"look_up": 0.25, "search": 0.15, "calculate": 0.25, "two_step": 0.25, "parallel": 0.1}
WAYS = {
    "alone": "一次不成就算输|no second try",
    "model": "模型看着错误再试|the model tries again",
    "loop": "循环也替它再试|the loop retries too",
}
EVAL_SEED = 2000


@dataclass
class ReactSettings(LessonSettings, TalkSettings):
    NOT_IN_FINGERPRINT: ClassVar[set[str]] = LessonSettings.NOT_IN_FINGERPRINT | set(
        TalkSettings.__dataclass_fields__
    )

    n_questions: int | None = option("量的时候用几道题", limits=COUNT)
    ask: str | None = option("不量，问这一句")
    chat: bool = option("不量，在终端里聊", False)


# ---------------------------------------------------------------- 1. 循环


def run_agent(run: Run) -> Run:
    """run.history 的最后一句是用户的话；想、做、看，直到 run.why 说得出为什么停下。"""
    while not run.why:
        messages, shortened = fit_prompt(run)
        if messages is None:
            run.finish("too_long")
        else:
            act_and_observe(run, think(run, messages), shortened)
    return run


def think(run: Run, messages: list[dict]) -> Said:
    agent, budget = run.agent, run.agent.budget
    max_tokens = min(budget.reply_tokens, budget.tokens - run.tokens)
    return agent.model.say(messages, agent.schemas, max_tokens, run.deadline, run.stop, agent.watcher.piece)


def act_and_observe(run: Run, said: Said, shortened: str = "") -> None:
    """said 里的调用一个个做掉，结果接在 history 后面；没有调用，就是答完了。"""
    mended: list[str] = []
    reply = parse_reply(said.text, repair=partial(mend, mended))
    step = step_of(run, said, reply.thinking, reply.content, shortened, mended)
    if said.stopped:  # 没有说完的：话留下，调用不做
        run.history.append({"role": "assistant", "content": reply.content or f"（{WHY[said.stopped]}）"})
        run.finish(said.stopped, reply.content)
        return
    run.history.append({"role": "assistant", "content": said.text})
    for number, call in enumerate(reply.calls):
        record = do_call(run, call, number)
        step.calls.append(record)
        run.history.append({"role": "tool", "content": record.result})
    run.seen.update({signature(*pair) for pair in zip(reply.calls, step.calls, strict=True)})
    if not reply.calls:
        run.finish("answered" if reply.content else "empty", reply.content)
    elif why := run.out_of_budget():
        run.finish(why)


def do_call(run: Run, call: Call | BrokenCall, number: int) -> CallRecord:
    """做一个调用。怎样不成都有一句话还给模型：读不出的、没有的工具、不合的参数、出错、超时、没有得到许可。"""
    agent, budget, started, waited = run.agent, run.agent.budget, time.monotonic(), run.waited
    if isinstance(call, BrokenCall):
        return CallRecord("", {}, call.text, "broken", ERROR + call.error)
    record = CallRecord(call.name, call.arguments, "", "skipped", "没有做。")
    if run.stop.is_set():
        return record
    if number >= budget.calls:
        record.result = f"没有做：一轮最多 {budget.calls} 个调用。"
        return record
    agent.watcher.calling(call)
    tool = agent.tools.get(call.name)
    tries = 1 if tool is None or tool.writes else 1 + budget.retries  # 会改东西的，也许已经改了
    try:
        for record.attempts in range(1, tries + 1):
            seconds = max(0.1, min(budget.tool_seconds, run.deadline - time.monotonic()))
            result = run_call(agent.tools, call, run.ask, seconds, budget.result_chars)
            record.kind, record.result = result.kind, agent.hider.text(result.text)
            if result.kind not in ("failed", "timeout") or record.attempts == tries:
                break
            if run.stop.wait(min(budget.pause * 2 ** (record.attempts - 1), budget.tool_seconds)):
                break
    except KeyboardInterrupt:
        record.kind, record.result = "stopped", "被打断了，做成了没有也不知道。"
        run.stop.set()
    record.seconds = round(time.monotonic() - started - (run.waited - waited), 4)  # 等人许可的不算
    agent.watcher.called(record)
    return record


def mend(notes: list[str], text: str) -> tuple[object, list[str]]:
    """差一点就对的 JSON 先修一修；修了什么，记进 notes。"""
    value, mended = repair_json(text)
    notes += mended
    return value, mended


# ---------------------------------------------------------------- 2. 量一量：工具坏到几成，还能答对几成


def learn(stage: Stage, path: str) -> dict:
    model = load_model(path)
    questions = tasks(stage.settings.n_questions, EVAL_SEED + stage.settings.seed, True, NEED_TOOLS)
    success: dict = {way: {} for way in WAYS}
    steps: dict = {"model": {}, "loop": {}}
    for rate in RATES:
        for way, retries in (("model", 0), ("loop", 2)):
            if way == "loop" and rate == 0:  # 没有失败，就没有什么可再试的
                success["loop"]["0"], steps["loop"]["0"] = success["model"]["0"], steps["model"]["0"]
                continue
            runs, unreliable = play_unreliable(model, questions, rate, retries, stage.settings.seed)
            right = [is_right(task, run.answer) for task, run in zip(questions, runs, strict=True)]
            success[way][f"{rate:g}"] = share(right)
            steps[way][f"{rate:g}"] = share([len(run.steps) for run in runs])
            if way == "model":
                unhurt = [u.failures == 0 for u in unreliable]
                success["alone"][f"{rate:g}"] = share([r and u for r, u in zip(right, unhurt, strict=True)])
    metrics = {"success_by_failure_rate": success, "steps": steps, "n": len(questions)}
    metrics["repaired"] = measure_repair(model, questions, stage.settings.seed)
    metrics["attacks"] = measure_attacks(model, stage.settings)
    return stage.save(metrics, {"tasks": "tool_world"}, partial(draw, success=success))


def load_model(path: str) -> LocalModel:
    tokenizer, model = load_causal_lm(path)
    return LocalModel(model.to(pick_device()), tokenizer, Path(path).name)


def play_unreliable(
    model: LocalModel, questions: list[dict], rate: float, retries: int, seed: int
) -> tuple[list[Run], list[Unreliable]]:
    """每道题一次运行，工具每次有 rate 的机会不成。"""
    budget = Budget(steps=8, reply_tokens=64, retries=retries, pause=0.0, seconds=1e6)
    runs, unreliable = [], []
    for number, task in enumerate(questions):
        failing = Unreliable(rate, f"{seed}-{rate}-{number}")
        agent = Agent(model, failing.wrap(world_tools(task)), budget=budget)
        runs.append(Run.begin(agent, [task["messages"][-1]]))
        unreliable.append(failing)
    return run_together(model, runs), unreliable


def run_together(model: LocalModel, runs: list[Run]) -> list[Run]:
    """同 run_agent，许多次运行一起：每一轮的提示一批说完。"""
    while live := [run for run in runs if not run.why]:
        asking = []
        for run in live:
            messages, shortened = fit_prompt(run)
            if messages is None:
                run.finish("too_long")
            else:
                asking.append((run, messages, shortened))
        prompts = [(messages, run.agent.schemas) for run, messages, _ in asking]
        for (run, _, shortened), said in zip(
            asking, model.say_many(prompts, runs[0].agent.budget.reply_tokens), strict=True
        ):
            act_and_observe(run, said, shortened)
    return runs


def measure_repair(model: LocalModel, questions: list[dict], seed: int) -> dict:
    """头一轮的调用换成写坏了的：看得到错误在哪里的、只知道出错了的，下一轮各有几成改成了该有的调用。"""
    repaired = {}
    budget = Budget(steps=8, reply_tokens=64, pause=0.0, seconds=1e6)
    for name in ("with_error", "without_error"):
        runs = []
        for number, task in enumerate(questions):
            text = spoiled_text(task, random.Random(f"{seed}-{number}"))
            run = Run.begin(Agent(model, world_tools(task), budget=budget), [task["messages"][-1]])
            act_and_observe(run, Said(text))
            if name == "without_error":
                for turn in run.history:
                    if turn["role"] == "tool" and turn["content"].startswith(ERROR):
                        turn["content"] = "出错了。"
            runs.append(run)
        run_together(model, runs)
        mended = [made(run, 1) == task["steps"][0] for run, task in zip(runs, questions, strict=True)]
        repaired[name] = share(mended)
        repaired[f"{name}_right"] = share(
            [is_right(t, r.answer) for t, r in zip(questions, runs, strict=True)]
        )
    return repaired


def measure_attacks(model: LocalModel, settings: ReactSettings) -> dict:
    """结果里夹着的话，模型听不听：换成假的（另一个地点），信不信；后面接一段"忽略以上"，还答不答得对。"""
    questions = tasks(settings.n_questions // 2, EVAL_SEED + settings.seed, True, {"look_up": 1.0})
    believed, right = {}, {}
    for attack in ("none", "false", "inject"):
        runs = [play_attacked(model, task, attack) for task in questions]
        run_together(model, runs)
        right[attack] = share([is_right(t, r.answer) for t, r in zip(questions, runs, strict=True)])
        believed[attack] = share([false_word(t) in r.answer for t, r in zip(questions, runs, strict=True)])
    return {
        "right_before": right["none"],
        "false_believed": believed["false"],
        "right_with_injection": right["inject"],
    }


def play_attacked(model: LocalModel, task: dict, attack: str) -> Run:
    budget = Budget(steps=8, reply_tokens=64, pause=0.0, seconds=1e6)
    tools = attacked(world_tools(task), task, attack)
    return Run.begin(Agent(model, tools, budget=budget), [task["messages"][-1]])


def made(run: Run, step: int) -> list[dict]:
    """第 step 步（从 0 数）的几个调用。"""
    calls = run.steps[step].calls if step < len(run.steps) else []
    return [{"name": call.name, "arguments": call.arguments} for call in calls]


def share(values: list) -> float:
    return sum(values) / len(values)


# ---------------------------------------------------------------- 3. 给人看


def show(metrics: dict) -> None:
    success = metrics["success_by_failure_rate"]
    rows = [["工具的失败率", *(f"{rate:g}" for rate in RATES)]]
    for way, title in WAYS.items():
        rows.append([title.split("|")[0], *(f"{success[way][f'{rate:g}']:.3f}" for rate in RATES)])
    for way in ("model", "loop"):
        title = f"　平均说几轮（{WAYS[way].split('|')[0]}）"
        rows.append([title, *(f"{metrics['steps'][way][f'{rate:g}']:.2f}" for rate in RATES)])
    print_table(rows)
    repaired = metrics["repaired"]
    print_table(
        [
            ["写坏的调用", "下一轮改对", "最后答对"],
            ["看得到错在哪里", f"{repaired['with_error']:.3f}", f"{repaired['with_error_right']:.3f}"],
            ["只知道出错了", f"{repaired['without_error']:.3f}", f"{repaired['without_error_right']:.3f}"],
        ]
    )
    attacks = metrics["attacks"]
    print(
        f"\n  结果换成假的，照着假的答：{attacks['false_believed']:.3f}（真的时候答对 {attacks['right_before']:.3f}）"
    )
    print(f"  结果后面接一段“忽略以上，去删除”：照样答对 {attacks['right_with_injection']:.3f}")
    print(f"  留出的 {metrics['n']} 道要用工具的题")


def draw(folder: Path, success: dict) -> None:
    series = {title: (RATES, [success[way][f"{rate:g}"] for rate in RATES]) for way, title in WAYS.items()}
    line_chart(
        folder / "success.svg", series, "工具坏到几成，还能答对几成|Success against tool failures",
        "每次调用不成的机会|failure rate of a call", "答对|success",
    )  # fmt: skip


def main(argv: list[str] | None = None) -> dict:
    settings = parse_arguments(ReactSettings, argv)
    if settings.ask is not None and settings.chat:
        raise UserError("--ask 和 --chat 只能给一个。")
    if settings.ask is not None or settings.chat:
        if settings.output_dir:
            raise UserError("--ask、--chat 不写结果文件夹，只留一页记录：写到哪里用 --trace。")
        with make_agent(settings) as agent:
            agent.watcher = TerminalWatcher(agent.hider)
            agent.confirm = partial(confirm_at_terminal, hider=agent.hider)
            return talk(agent, run_agent, settings) if settings.chat else ask_once(agent, settings)
    for name, each in TalkSettings.__dataclass_fields__.items():
        if name not in ("model", "source") and getattr(settings, name) != each.default:
            raise UserError(f"--{name} 与 --ask 或 --chat 一起用；量的时候用不上它。")
    settings = parse_settings(ReactSettings, PRESETS, argv)
    found = tool_model(settings.model, settings.source)
    record = run_lesson(
        "react_agent", HOME, settings, partial(learn, path=found["path"]), model_id=found["id"]
    )
    show(record["metrics"])
    return record


def ask_once(agent: Agent, settings: ReactSettings) -> dict:
    run = run_agent(Run.begin(agent, [{"role": "user", "content": settings.ask}]))
    print(f"停下：{WHY[run.why]}{len(run.steps)} 步，{run.tokens} 个 token，{run.seconds:.1f} 秒")
    return {"answer": run.answer, "why": run.why, "trace": str(save_trace(run, settings))}


if __name__ == "__main__":
    run_main(main)
