"""chat.py --web：同样的对话放到网页上，还能把几个模型的回答并排放。页面用 Gradio 画，只有本机打得开。

记忆、裁剪、切换都是 chat.py 里的 Chat 做的；这里只管把它说的话一点一点送到页面上。
"""

import html
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from nlp_common.base.console import printable
from nlp_common.base.errors import UserError
from nlp_common.base.web_page import import_gradio
from nlp_common.lm.speaker import Reply, stream_reply

# ---------------------------------------------------------------- 一个窗口里的对话


@dataclass
class Panel:
    """页面上的一栏对话：chat 是它自己的 Chat（记忆不与别的栏共用），shown 是栏里显示的各条。"""

    chat: Any
    shown: list[dict] = field(default_factory=list)

    @classmethod
    def new(cls, chat) -> "Panel":
        panel = cls(chat)
        panel.chat = chat.fork(notify=panel.say)
        return panel

    def say(self, text: str, role: str = "assistant") -> None:
        self.shown.append({"role": role, "content": html.escape(text)})

    def clear(self) -> None:
        self.chat.clear()
        self.shown.clear()

    def answer(self, question: str, name: str, stop: threading.Event) -> Iterator[None]:
        """问一句，每多说出一点就 yield 一次；stop 设上了就停在那里，已经说的照样记住。"""
        self.say(question, "user")
        yield
        try:
            speaker = self.chat.choose(name)
        except UserError as error:
            self.say(f"（{error}）")
            return
        prepared = self.chat.prepare(question)
        if prepared is None:
            return
        question, ids = prepared
        reply, head, ending = Reply(), f"{speaker.name}：", ""
        self.say(head)
        line = self.shown[-1]
        for _ in stream_reply(speaker, ids, self.chat.settings, reply):
            line["content"] = html.escape(head + printable(reply.text))
            yield
            if stop.is_set():
                ending = "……（停下了）"
                break
        else:
            if not reply.text:
                ending = "（什么也没说）"
            elif not reply.end:
                ending = "……（没有说完，到了最多 token 数）"
        line["content"] += ending
        if any(each is line for each in self.shown):  # 说到一半被清空的，不记
            self.chat.remember(question, reply.text)


class Visitor:
    """一个浏览器窗口：聊天的一栏，并排的几栏，以及"停下"。"""

    def __init__(self, chat, names: list[str]):
        self.talk = Panel.new(chat)
        self.beside = {name: Panel.new(chat) for name in names}
        self.stop = threading.Event()

    def set_options(self, system: str, temperature: float, top_p: float, max_new_tokens: float) -> None:
        for panel in (self.talk, *self.beside.values()):
            settings = panel.chat.settings
            settings.system, settings.temperature = system.strip() or None, temperature
            settings.top_p, settings.max_new_tokens = top_p, int(max_new_tokens)


def take_turns(steps: list[Iterator[None]]) -> Iterator[None]:
    """几个模型轮流各说一点，看上去就是一起在说。"""
    while steps:
        steps = [step for step in steps if next(step, "说完") is None]
        yield


# ---------------------------------------------------------------- 页面


def build_page(chat, examples: list[str], note: str = ""):
    """→ gradio 的页面。chat 是已经载入了一个模型的 Chat，每个窗口从它 fork；note 写在标题下面。"""
    gr = import_gradio()
    names = list(chat.results.paths)
    titles = [(chat.results.title(name), name) for name in names]
    compared = [name for name in names if name != "base"] or names
    visitors: dict[str, Visitor] = {}

    def visitor(request: gr.Request) -> Visitor:
        return visitors.setdefault(request.session_hash, Visitor(chat, names))

    def talk(question, name, system, temperature, top_p, max_new_tokens, request: gr.Request):
        me = visitor(request)
        me.set_options(system, temperature, top_p, max_new_tokens)
        me.stop.clear()
        box = ""  # 清空输入框，只在开头：读者会趁模型说话时打下一句
        for _ in me.talk.answer(question.strip(), name, me.stop) if question.strip() else ():
            yield box, me.talk.shown
            box = gr.skip()
        yield box, me.talk.shown

    def ask_beside(question, chosen, system, temperature, top_p, max_new_tokens, request: gr.Request):
        me = visitor(request)
        me.set_options(system, temperature, top_p, max_new_tokens)
        me.stop.clear()
        steps = [me.beside[name].answer(question.strip(), name, me.stop) for name in chosen]
        box = ""
        for _ in take_turns(steps if question.strip() else []):
            yield box, *(me.beside[name].shown for name in names)
            box = gr.skip()
        yield box, *(me.beside[name].shown for name in names)

    def stop_now(request: gr.Request):
        visitor(request).stop.set()

    def leave(request: gr.Request):
        visitors.pop(request.session_hash, None)

    def clear_talk(request: gr.Request):
        stop_now(request)
        visitor(request).talk.clear()
        return []

    def clear_beside(request: gr.Request):
        stop_now(request)
        for panel in visitor(request).beside.values():
            panel.clear()
        return tuple([] for _ in names)

    def forget_one(name: str):
        def clear_column(request: gr.Request):
            stop_now(request)
            visitor(request).beside[name].clear()

        return clear_column

    def chatbot(label: str, **more):
        # 原样显示每个字（say 里已转义），不当作 Markdown 或 HTML；不要点赞、复制这些按钮
        return gr.Chatbot(
            label=label,
            placeholder="还没有说话，从下面挑一句试试",
            render_markdown=False,
            feedback_options=None,
            buttons=[],
            **more,
        )

    wide = {"show_label": False, "scale": 8, "min_width": 300}  # 窄屏上自己占一行，按钮在下一行
    with gr.Blocks(analytics_enabled=False, title="和训练好的模型聊天", fill_height=True) as page:
        gr.Markdown(
            f"## 和训练好的模型聊天（{chat.results.preset}）\n模型和对话都在这台机器上，不联网。{note}"
        )
        with gr.Accordion("设置", open=False), gr.Row():
            settings = chat.settings
            options = [
                gr.Textbox(settings.system or "", label="系统提示"),
                gr.Slider(0, 2, settings.temperature, step=0.1, label="温度（0 是贪心）"),
                gr.Slider(0.05, 1, settings.top_p, step=0.05, label="top_p"),
                gr.Slider(1, 2048, settings.max_new_tokens, step=1, label="最多 token 数"),
            ]

        with gr.Tab("聊天"):
            model = gr.Radio(titles, value=chat.name, label="和谁聊（随时可以换，对话保留）")
            shown = chatbot("对话", elem_id="talk", show_label=False)
            with gr.Row():
                said = gr.Textbox(placeholder="说点什么，回车发送", elem_id="say", autofocus=True, **wide)
                send, stop, clear = (
                    gr.Button("发送", variant="primary", min_width=80),
                    gr.Button("停下", min_width=80),
                    gr.Button("清空", min_width=80),
                )
            gr.Examples(examples, said, label="可以这样问（点一下填进去）")

        with gr.Tab("并排"):
            chosen = gr.CheckboxGroup(titles, value=compared, label="让谁回答（各自记得各自的对话）")
            with gr.Row():
                columns = [
                    chatbot(title, elem_id=f"beside-{name}", visible=name in compared, min_width=200)
                    for title, name in titles
                ]
            with gr.Row():
                asked = gr.Textbox(placeholder="问同一个问题，回车发送", elem_id="ask", **wide)
                ask = gr.Button("一起问", variant="primary", min_width=80)
                stop_beside, clear_all = gr.Button("停下", min_width=80), gr.Button("清空", min_width=80)
            gr.Examples(examples, asked, label="可以这样问（点一下填进去）")

        # 一次只让一个窗口生成：两个一起抢同一个处理器，谁都更慢
        one = {"concurrency_limit": 1, "concurrency_id": "model", "show_progress": "hidden"}
        one["trigger_mode"] = "multiple"  # 还在回答时发的下一句排队等着，默认会丢掉
        gr.on([said.submit, send.click], talk, [said, model, *options], [said, shown], **one)
        gr.on([asked.submit, ask.click], ask_beside, [asked, chosen, *options], [asked, *columns], **one)
        for button in (stop, stop_beside):
            button.click(stop_now, queue=False)
        clear.click(clear_talk, outputs=shown, queue=False)
        shown.clear(clear_talk, outputs=shown, queue=False)  # 框上自带的垃圾桶：显示和记忆要一起清
        clear_all.click(clear_beside, outputs=columns, queue=False)
        for name, column in zip(names, columns, strict=True):
            column.clear(forget_one(name), queue=False)
        chosen.change(
            lambda chosen: [gr.update(visible=name in chosen) for name in names], chosen, columns, queue=False
        )
        page.unload(leave)
    return page
