"""智能体的网页：聊天，每个调用和结果折起来看得到；会改东西的，页面上问你；随时停下；每个回答都有记录。

你会学到
  1. 循环（react_agent.py）一点没改：网页只是另一个在旁边看着的（Watcher），和另一个被问的人（confirm）。
  2. 许可是按钮，不是文字：按钮认得它问的是哪一次，刚弹出来半秒里的点击不算（那是在点上一个）。
  3. 模型、工具写的都当文字显示：里面的 <script>、Markdown 的图片（会把话带出去）都只是几个字。

怎么运行
  python agent_web.py                                       # 小世界的工具模型
  python agent_web.py --model Qwen/Qwen3-0.6B --thinking on
  python agent_web.py --base_url http://127.0.0.1:8000/v1 --server_model Qwen3-8B --only_mcp --mcp "python mcp_server.py"

应当看到：问一句，先是折起来的"→ look_up …"，点开是参数与结果，然后是回答；右下"记录"里一步一步都有。

参考：网页用 Gradio（pip install "gradio>=6"）。
"""

from nlp_common.base.cli import run_main

import html
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from agent_confirm import describe
from agent_run import WHY, Agent, CallRecord, Run, Step, Watcher
from agent_setup import TalkSettings, example_questions, make_agent
from agent_trace import KINDS, trace_page, trace_rows, visible
from nlp_common.base.arguments import option, parse_arguments
from nlp_common.base.errors import UserError
from nlp_common.base.web_page import import_gradio, serve
from nlp_common.lm.reply_parser import BrokenCall, Call, StreamParser
from react_agent import run_agent

EVERY = 0.1  # 秒：页面多久看一眼
PATIENCE = 300.0  # 秒：问许可，这么久没有人理，就是不许
TOO_SOON = 0.5  # 秒：刚弹出来就点的不算，那是在点上一个
NO_TRACE = "<p>还没有记录。</p>"
STYLE = """
#asking { border: 2px solid #d1602f; border-radius: 8px; padding: 4px 8px; }
#asking #asking { border: none; padding: 0; }
#asked pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 4px 0; font-size: 14px; }
#trace iframe { width: 100%; height: 560px; border: 1px solid var(--border-color-primary); border-radius: 8px; background: #fff; }
"""


@dataclass
class WebSettings(TalkSettings):
    port: int | None = option("网页的端口；默认找一个空的")


def main(argv: list[str] | None = None) -> None:
    settings = parse_arguments(WebSettings, argv)
    import_gradio()  # 没有装，现在就说，不等模型载入
    with make_agent(settings) as agent:
        examples = example_questions() if settings.tiny_world else ["现在几点？", "123 乘 456 是多少？"]
        serve(build_page(agent, examples, settings.tiny_world), settings.port, css=STYLE)


# ---------------------------------------------------------------- 问许可


@dataclass
class Asking:
    """正在问的一次许可。"""

    number: int
    text: str
    since: float = field(default_factory=time.monotonic)
    decided: threading.Event = field(default_factory=threading.Event)
    allowed: bool = False


# ---------------------------------------------------------------- 一个窗口


class Visitor(Watcher):
    """一个浏览器窗口：它自己的对话、停下、正在问的许可。循环在另一个线程里跑，这里记下看到的。"""

    def __init__(self, agent: Agent, forgetful: bool):
        self.agent = replace(agent, watcher=self, confirm=self.confirm)
        self.forgetful = forgetful  # 小世界的模型一次只会一问
        self.history: list[dict] = []
        self.showing: list[dict] = []  # 正在答的这一句写在哪里
        self.trace = ""
        self.stop = threading.Event()
        self.asking: Asking | None = None
        self.asked = 0
        self.clear()

    def clear(self) -> None:
        self.history, self.shown, self.trace = [], [], ""  # 还没有停下的那个回答，接着写它自己的 showing
        self.parser, self.line, self.words, self.thought = StreamParser(), None, "", None

    # 循环说给这里听的（在它的线程里）

    def piece(self, text: str) -> None:
        self.add_words(self.parser.feed(text))
        if self.parser.state == "<think>":
            if self.thought is None:
                self.thought = self.fold("思考 …", "", pending=True)
            self.thought["content"] = self.plainly(self.parser.rest)

    def said(self, step: Step) -> None:
        self.add_words(self.parser.finish())
        if self.thought is not None:
            self.thought["content"] = self.plainly(step.thinking)
            self.thought["metadata"] = {"title": "思考", "status": "done"}
        self.parser, self.line, self.thought = StreamParser(), None, None
        for note in filter(None, [step.shortened, "；".join(step.mended)]):
            self.say(f"（{note}）")

    def calling(self, call: Call | BrokenCall) -> None:
        self.doing = self.fold(f"→ {call.name} …", "", pending=True)

    def called(self, record: CallRecord) -> None:
        arguments = json.dumps(record.arguments, ensure_ascii=False)
        again = f"，试了 {record.attempts} 次" if record.attempts > 1 else ""
        title = f"→ {record.name}（{KINDS[record.kind]}，{record.seconds:.2f} 秒{again}）"
        self.doing["content"] = self.plainly(f"参数　{arguments}\n结果　{record.result}")
        self.doing["metadata"] = {"title": self.plainly(title), "status": "done"}

    def add_words(self, text: str) -> None:
        if not text:
            return
        if self.line is None:
            self.line, self.words = self.say(""), ""
        self.words += text
        self.line["content"] = self.plainly(self.words)

    def say(self, text: str, role: str = "assistant") -> dict:
        self.showing.append({"role": role, "content": self.plainly(text)})
        return self.showing[-1]

    def fold(self, title: str, text: str, pending: bool = False) -> dict:
        """折起来的一条，点开看 text；pending 的转着圈。"""
        line = self.say(text)
        line["metadata"] = {"title": self.plainly(title), "status": "pending" if pending else "done"}
        return line

    def plainly(self, text: str) -> str:
        """模型与工具写的，只是文字：看不见的字符换掉，秘密隐去，HTML 转义。"""
        return html.escape(visible(self.agent.hider.text(text)))

    # 许可

    def confirm(self, call: Call) -> bool:
        """在循环的线程里等：按了"许可"才是许可；不许、停下、太久没有人理，都不是。"""
        self.asked += 1
        asking = Asking(self.asked, describe(call, self.agent.hider))
        self.asking = asking
        ends = asking.since + PATIENCE
        while not asking.decided.wait(EVERY) and not self.stop.is_set() and time.monotonic() < ends:
            pass
        self.asking = None
        return asking.allowed and not self.stop.is_set()

    def decide(self, number: int, allowed: bool) -> None:
        """按了按钮：只算正在问的那一次；刚弹出来的点击不算许可。"""
        asking = self.asking
        if asking is None or asking.number != number or asking.decided.is_set():
            return
        if allowed and time.monotonic() - asking.since < TOO_SOON:
            return
        asking.allowed = allowed
        asking.decided.set()

    # 问一句

    def answer(self, question: str) -> Iterator[None]:
        """每过一会 yield 一次，页面照 shown 重画；说完了，记录在 trace 里。"""
        if self.forgetful:
            self.history = []
        self.stop.clear()
        self.showing = self.shown
        self.say(question, "user")
        self.history.append({"role": "user", "content": question})
        run, errors = Run.begin(self.agent, self.history, self.stop), []
        job = threading.Thread(target=self._work, args=(run, errors), daemon=True)
        job.start()
        while job.is_alive():
            yield
            job.join(EVERY)
        if errors:
            run.history.pop()
            self.say(f"（{errors[0]}）")
        elif run.why != "answered":
            self.say(f"（停下了：{WHY[run.why]}）")
        if run.why and self.showing is self.shown:  # 没有被清空
            self.trace = trace_page(trace_rows(run, self.agent.hider), WHY[run.why])
        yield

    @staticmethod
    def _work(run: Run, errors: list) -> None:
        try:
            run_agent(run)
        except UserError as error:
            errors.append(error)


def trace_frame(page: str) -> str:
    """记录的网页放进一个什么也不许做的框里。"""
    if not page:
        return NO_TRACE
    return f'<iframe sandbox="" title="记录" srcdoc="{html.escape(page)}"></iframe>'


# ---------------------------------------------------------------- 页面


def build_page(agent: Agent, examples: list[str], forgetful: bool = False):
    """→ gradio 的页面。agent 的模型、工具大家共用，对话、许可各是各的。"""
    gr = import_gradio()
    visitors: dict[str, Visitor] = {}

    def visitor(request: gr.Request) -> Visitor:
        return visitors.setdefault(request.session_hash, Visitor(agent, forgetful))

    def view(me: Visitor) -> tuple:
        """页面现在的样子：对话、许可的框、问的是什么、第几次、记录。"""
        asking = me.asking
        text = f"<pre>{html.escape(asking.text)}</pre>" if asking else ""
        number = asking.number if asking else 0
        return me.shown, gr.update(visible=asking is not None), text, number, trace_frame(me.trace)

    def ask(question: str, request: gr.Request):
        me, box = visitor(request), ""
        for _ in me.answer(question.strip()) if question.strip() else ():
            yield box, *view(me)
            box = gr.skip()  # 只在开头清空：读者会趁模型说话时打下一句
        yield box, *view(me)

    def stop_now(request: gr.Request):
        visitor(request).stop.set()

    def allow(number: float, request: gr.Request):
        visitor(request).decide(int(number), True)

    def deny(number: float, request: gr.Request):
        visitor(request).decide(int(number), False)

    def clear_all(request: gr.Request):
        me = visitor(request)
        me.stop.set()
        me.clear()
        return view(me)

    def leave(request: gr.Request):
        if me := visitors.pop(request.session_hash, None):
            me.stop.set()

    names = "、".join(f"{name}（要你许可）" if tool.writes else name for name, tool in agent.tools.items())
    with gr.Blocks(analytics_enabled=False, title="会用工具的智能体", fill_height=True) as page:
        gr.Markdown("## 会用工具的智能体")
        gr.HTML(f"<p>{html.escape(visible(f'{agent.model.name}；工具：{names}'))}</p>")
        talk = gr.Chatbot(
            show_label=False, elem_id="talk", height=420, render_markdown=False, feedback_options=None, buttons=[],
            placeholder="问一句，看它怎样用工具",
        )  # fmt: skip
        with gr.Group(visible=False, elem_id="asking") as asking:
            gr.Markdown("**要做一件会改东西的事。许可吗？** 只有这两个按钮算数，对话里写什么都不算。")
            asked = gr.HTML(elem_id="asked")
            number = gr.Number(0, visible=False)
            with gr.Row():
                yes = gr.Button("许可这一次", elem_id="allow", min_width=120)
                no = gr.Button("不许", variant="primary", elem_id="deny", min_width=120)
        with gr.Row():
            said = gr.Textbox(
                placeholder="问一句，回车发送", elem_id="say", show_label=False, scale=8, min_width=300, autofocus=True
            )  # fmt: skip
            send = gr.Button("发送", variant="primary", elem_id="send", min_width=80)
            stop = gr.Button("停下", elem_id="stop", min_width=80)
            clear = gr.Button("清空", elem_id="clear", min_width=80)
        gr.Examples(examples, said, label="可以这样问（点一下填进去）")
        with gr.Accordion("上一个回答的记录", open=False, elem_id="record"):
            trace = gr.HTML(NO_TRACE, elem_id="trace")

        outputs = [talk, asking, asked, number, trace]
        private = {"api_visibility": "private", "show_progress": "hidden"}
        one = {"concurrency_limit": 1, "concurrency_id": "model", "trigger_mode": "multiple", **private}
        gr.on([said.submit, send.click], ask, said, [said, *outputs], **one)
        stop.click(stop_now, queue=False, **private)
        yes.click(allow, number, queue=False, **private)
        no.click(deny, number, queue=False, **private)
        clear.click(clear_all, outputs=outputs, queue=False, **private)
        talk.clear(clear_all, outputs=outputs, queue=False, **private)  # 框上自带的垃圾桶
        page.unload(leave)
    return page


if __name__ == "__main__":
    run_main(main)
