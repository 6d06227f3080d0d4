"""终端里的智能体：边想边印、调用与结果各一行；会改东西的，问终端前的人；Ctrl-C 只停下这个回答。"""

from __future__ import annotations

import sys
from collections.abc import Callable

from agent_confirm import describe
from agent_run import WHY, Agent, CallRecord, Run, Step, Watcher
from agent_secrets import Hider
from agent_setup import TalkSettings, example_questions, save_trace
from agent_trace import KINDS, visible
from nlp_common.base.errors import UserError
from nlp_common.lm.reply_parser import BrokenCall, Call, StreamParser

HELP = """  clear   忘掉前面的对话（清空）
  tools   有哪些工具（工具）
  trace   上一个回答的记录在哪里（记录）
  help    帮助
  quit    退出（退出、exit、Ctrl-D）；回答时按 Ctrl-C 只停下这个回答"""
COMMANDS = {"清空": "clear", "工具": "tools", "记录": "trace", "帮助": "help", "退出": "quit", "exit": "quit"}
LONGEST = 300  # 结果在终端里最多印几个字


class TerminalWatcher(Watcher):
    """模型的话一到就印；思考、调用的原文不印，调用印成一行。"""

    def __init__(self, hider: Hider):
        self.hider = hider
        self.fresh, self.thinking, self.parser = True, False, StreamParser()

    def piece(self, text: str) -> None:
        shown = self.parser.feed(text)
        if self.parser.state == "<think>" and not self.thinking:
            print("（在想……）", flush=True)
            self.thinking = True
        if shown:
            if self.fresh:
                print("答　", end="")
                self.fresh = False
            print(visible(shown), end="", flush=True)

    def said(self, step: Step) -> None:
        """一轮说完了。"""
        if rest := self.parser.finish():
            print(("答　" if self.fresh else "") + visible(rest), end="")
            self.fresh = False
        if not self.fresh:
            print()
        self.fresh, self.thinking, self.parser = True, False, StreamParser()
        if step.shortened:
            print(f"  （提示太长：{step.shortened}）")
        for note in step.mended:
            print(f"  （调用的 JSON 修过：{visible(note)}）")

    def calling(self, call: Call | BrokenCall) -> None:
        if isinstance(call, Call):
            print(f"  → {describe(call, self.hider)}", flush=True)

    def called(self, record: CallRecord) -> None:
        text = visible(record.result)
        text = text if len(text) <= LONGEST else f"{text[:LONGEST]}……（一共 {len(text)} 个字，全文在记录里）"
        note = "" if record.kind == "ok" else f"（{KINDS[record.kind]}）"
        again = f"（试了 {record.attempts} 次）" if record.attempts > 1 else ""
        print("  ← " + note + again + text.replace("\n", "\n    "), flush=True)


# ---------------------------------------------------------------- 聊天


def talk(agent: Agent, run_agent: Callable[[Run], Run], settings: TalkSettings) -> dict:
    """一行一问，直到 quit。history 记着整段对话；小世界的模型一次只会一问，每问从头开始。"""
    history: list[dict] = []
    said, place = 0, ""
    if settings.tiny_world:
        print(f"小世界的模型只会查故事、找故事、算两个数，一次一问。可以问：{'　'.join(example_questions())}")
    print("命令：clear、tools、trace、help、quit。")
    while (line := read_line()) is not None:
        command = COMMANDS.get(line.lower(), line.lower())
        if command == "quit":
            break
        if command == "clear":
            history.clear()
            print("（清空了，从头开始。）")
        elif command == "tools":
            show_tools(agent)
        elif command == "trace":
            print(f"（{place or '还没有记录'}）")
        elif command == "help":
            print(HELP)
        elif line:
            if settings.tiny_world:
                history.clear()
            try:
                place = answer(agent, run_agent, settings, history, line)
                said += 1
            except UserError as error:
                print(f"（{error}）")
    print("再见！")
    return {"answers": said}


def answer(
    agent: Agent, run_agent: Callable[[Run], Run], settings: TalkSettings, history: list[dict], question: str
) -> str:
    """问一句，返回记录在哪里。服务器拒绝了之类的错误，这一问就当没有问过。"""
    before = len(history)
    history.append({"role": "user", "content": question})
    run = Run.begin(agent, history)
    try:
        run_agent(run)
    except KeyboardInterrupt:  # 正好在两步之间
        run.finish("stopped")
    except UserError:
        del history[before:]
        raise
    if run.why != "answered":
        print(f"（停下了：{WHY[run.why]}）")
    return str(save_trace(run, settings))


def show_tools(agent: Agent) -> None:
    for name, tool in agent.tools.items():
        writes = "（会改东西，每次要你许可）" if tool.writes else ""
        print(f"  {visible(name)}{writes}：{visible(tool.schema['function'].get('description', ''))[:100]}")


def read_line() -> str | None:
    """读一行；Ctrl-D、连按两次 Ctrl-C 是 None。"""
    for hint in ("（再按一次 Ctrl-C 退出）", ""):
        try:
            line = input("你：")
        except EOFError:
            print()
            return None
        except KeyboardInterrupt:
            print(f"\n{hint}" if hint else "")
            continue
        line = line.replace("\ufeff", "").strip()
        if not sys.stdin.isatty():
            print(line)
        return line
    return None
