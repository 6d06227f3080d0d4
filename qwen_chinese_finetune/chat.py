"""与训练好的模型多轮聊天：记得最近 5 轮，可以随时换成训练到另一步的模型。

学到什么：模型自己没有记忆，"记得"就是把前几轮的话放进提示里再问一次；上下文装不下时按整轮丢掉最早的；
同一段对话换给预训练、SFT、DPO、PPO 的模型，各答成什么样。

运行：
    python chat.py                                         # 有 full 的结果就用，没有就用 tiny 的
    python chat.py --preset tiny --start sft               # 从 SFT 模型开始聊
    python chat.py --model Qwen/Qwen1.5-0.5B-Chat          # 与别人训练好的模型聊
    python chat.py --system "你是一个耐心的老师。"
    python chat.py --adapter 甲 --adapter 乙                # 接上 LoRA 适配器（PEFT 存的文件夹），switch 甲、switch 乙
    python chat.py --web                                   # 在网页上聊，还能并排看几个模型的回答
    printf '你好\\n你是谁？\\n' | python chat.py             # 从管道读，也可以

命令（单独一行）：switch 名字（或 切换）、clear（清空）、history（历史）、save 文件（保存）、help（帮助）、
quit（退出，或 exit、Ctrl-D）。
回答时按 Ctrl-C 只停下这个回答。

预期输出（tiny）：贴一个故事和一个问题，答得对；接着只问"它是什么颜色的？"，也答得对，因为故事还在上一轮里；
switch base 之后就答非所问了。
要先训练好：python run_all.py --preset tiny。
"""

from nlp_common.base.cli import run_main

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from chain import FOLDERS, MODELS, SCRIPTS
from chat_app.asking import FULL_QUESTIONS, story_then_question
from chat_app.log import save_talks
from chat_app.trying import (
    Results,
    SpeakSettings,
    describe_sampling,
    find_results,
    open_speaker,
    read_line,
    show_speaker,
    with_adapters,
)
from chat_app.web import build_page
from nlp_common.base.arguments import option, parse_arguments
from nlp_common.base.console import printable
from nlp_common.base.errors import UserError
from nlp_common.base.web_page import serve
from nlp_common.lm.adapters import base_of, name_adapters
from nlp_common.lm.chatml import prompt_ids
from nlp_common.lm.speaker import Reply, Speaker, adapted, room, say
from nlp_common.tiny import world

DEFAULTS = {
    "tiny": {"max_new_tokens": 48, "temperature": 0.0, "top_p": 1.0},
    "full": {"max_new_tokens": 512, "temperature": 0.7, "top_p": 0.9},
}
MEMORY = 5  # 记得几轮
ALIASES = {"基座": "base", "预训练": "base", "pretrain": "base", "微调": "sft"}
COMMANDS = {
    "清空": "clear",
    "历史": "history",
    "帮助": "help",
    "?": "help",
    "？": "help",
    "退出": "quit",
    "exit": "quit",
    "切换": "switch",
    "保存": "save",
}
HELP = """  switch 名字   换一个模型接着聊（base、sft、dpo、ppo、grpo；也可以写 切换 微调），对话保留
  clear         清空对话，从头开始（清空）
  history       看记得的对话（历史）
  save 文件     把这次的对话存下来（保存）：.jsonl 是 messages 格式，可以当 --dataset 用；其余是文本
  quit          退出（退出、exit、Ctrl-D）；回答时按 Ctrl-C 只停下这个回答"""

TINY_NOTE = "小世界的模型只会读一个小故事、回答里面的事，和几句寒暄（你好、你是谁？）；别的话它没有学过，也会答，答的不算数。"


@dataclass
class ChatSettings(SpeakSettings):
    system: str | None = option("系统提示：放在对话最前面的一句话，例如 你是一个耐心的老师。")
    adapter: list[str] | None = field(
        default=None,
        metadata={
            "help": "接上这个 LoRA 适配器：PEFT 存的文件夹，或 名字=文件夹；可以给几次，用 switch 换。"
            "没给 --model、--start，就用它记着的原模型",
            "action": "extend",
        },
    )
    start: Literal["auto", "base", "sft", "dpo", "ppo", "grpo"] = option(
        "从哪个模型开始聊；auto：训练到最后的那个（ppo，没有就 grpo、dpo、sft、base）", "auto"
    )
    web: bool = option("在网页上聊，只有这台机器打得开；要先 pip install gradio", False)
    port: int | None = option("网页用哪个端口；默认从 7860 起找一个空着的")


# ---------------------------------------------------------------- 1. 记忆：提示里放哪几轮


@dataclass
class Turn:
    """一轮：一问一答；name 是谁答的。"""

    question: str
    answer: str
    name: str


def build_prompt(
    tokenizer, turns: list[Turn], question: str, system: str | None, limit: int
) -> tuple[list[int], int]:
    """→ (提示的 token, 放进了几轮)：系统提示、最近的几轮、这一问；超过 limit 个 token 就从最早的丢起。

    按整轮丢：留下半轮，模型会看到没有问题的回答。一轮也不放还是太长，就返回那个太长的提示。
    """
    kept = list(turns)
    while True:
        messages = [{"role": "system", "content": system}] if system else []
        for turn in kept:
            messages.append({"role": "user", "content": turn.question})
            messages.append({"role": "assistant", "content": turn.answer})
        ids = prompt_ids(tokenizer, [*messages, {"role": "user", "content": question}])
        if len(ids) <= limit or not kept:
            return ids, len(kept)
        kept.pop(0)


# ---------------------------------------------------------------- 2. 会话


@dataclass
class Chat:
    """一次聊天：在用哪个模型、记得哪几轮。模型用到才载入，载入了就留着。"""

    settings: ChatSettings
    results: Results
    name: str = ""
    speakers: dict[str, Speaker] = field(default_factory=dict)
    notify: Callable[[str], None] = print  # 要告诉读者的话往哪里说
    turns: deque[Turn] = field(default_factory=lambda: deque(maxlen=MEMORY))
    log: list[list[Turn]] = field(default_factory=lambda: [[]])  # 存盘用，从头到尾；一个新故事是另一段
    story: str = ""  # 小世界：先贴了故事，还没有问
    forgetting: bool = False  # 说过"最早的一轮忘掉了"没有，每次清空之后只说一遍

    @property
    def tiny(self) -> bool:
        return self.results.preset == "tiny"

    def fork(self, notify: Callable[[str], None]) -> "Chat":
        """另起一段对话：载入的模型共用，设置与记忆各管各的（网页上一个窗口一段）。"""
        return Chat(replace(self.settings), self.results, self.name, self.speakers, notify)

    def choose(self, name: str) -> Speaker:
        """换成另一个模型；不认识、没有训练是 UserError，原来的模型照旧。"""
        paths = self.results.paths
        name = name if name in paths else ALIASES.get(name, name.lower())
        if name == self.name and name in self.speakers:
            return self.speakers[name]
        if self.settings.model and self.speakers and len(paths) == 1:
            raise UserError("你给了 --model，只有这一个模型；不给 --model 才能在训练结果里换来换去。")
        if name not in paths:
            problem = f"没有叫 {name} 的模型" if name else "要写上模型的名字"
            if name in MODELS:
                command = f"python {SCRIPTS[FOLDERS[name]]} --preset {self.results.preset}"
                problem = f"{MODELS[name]} 还没有训练好（训练它：{command}）"
            raise UserError(f"{problem}。可以换成：{'、'.join(paths)}，例如 switch {next(iter(paths))}")
        self.load(name)
        self.name = name
        return self.speakers[name]

    def load(self, name: str) -> Speaker:
        """载入一个模型，或先载入原模型、再接上适配器；载入过的直接用。"""
        if name not in self.speakers:
            path, title, seed = self.results.paths[name], self.results.title(name), self.settings.seed
            if base := self.results.adapters.get(name):
                self.speakers[name] = adapted(self.load(base), title, Path(path), seed)
            else:
                self.speakers[name] = open_speaker(title, path, seed)
        return self.speakers[name]

    def switch(self, name: str) -> None:
        show_speaker(self.choose(name))
        if self.name == "base":
            print("（它只学过续写，没学过对话：答非所问、停不下来都是正常的。）")

    def place_story(self, line: str) -> str:
        """小世界专用：把故事和问题摆成训练时的样子；只贴了故事的先记下，返回空的，等下一行的问题。"""
        question = story_then_question(line)
        if question.count("。") > 2 and question.endswith("。"):
            self.story = question
            self.notify("（故事记下了，问一个故事里的问题吧。）")
            return ""
        if self.story:
            question, self.story = f"{self.story}\n{question}", ""
        if "\n" in question and any("\n" in turn.question for turn in self.turns):
            self.notify("（新故事：小世界的模型一次只读一个，前面的对话不带了。）")
            self.forget()
        return question

    def prepare(self, question: str) -> tuple[str, list[int]] | None:
        """→ (摆好的问题, 提示的 token)；还没有问（只贴了故事）、问题太长，就说明白，返回 None。"""
        if self.tiny and not (question := self.place_story(question)):
            return None
        speaker, limit = self.speakers[self.name], room(self.speakers[self.name], self.settings)
        ids, kept = build_prompt(speaker.tokenizer, list(self.turns), question, self.settings.system, limit)
        if len(ids) > limit:
            why = f"{len(ids)} 个 token，模型最多读 {limit} 个"
            self.notify(f"（太长了：{why}。请缩短，或调小 --max_new_tokens。）")
            return None
        if kept < len(self.turns):
            self.notify(f"（上下文装不下，这次只带上最近 {kept} 轮。）")
        return question, ids

    def remember(self, question: str, answer: str) -> None:
        """记住这一轮；什么也没说的不记。"""
        if not answer:
            return
        if len(self.turns) == MEMORY and not self.forgetting:
            self.forgetting = True
            more = "要接着问同一个故事，把它再贴一遍。" if self.tiny else ""
            self.notify(f"（只记得最近 {MEMORY} 轮，最早的一轮忘掉了。{more}）")
        turn = Turn(question, answer, self.speakers[self.name].name)
        self.turns.append(turn)
        self.log[-1].append(turn)

    def ask(self, question: str) -> None:
        """问一句：边想边打印，并记住这一轮。Ctrl-C 停下，已经说出来的也记住。"""
        prepared = self.prepare(question)
        if prepared is None:
            return
        question, ids = prepared
        speaker, reply = self.speakers[self.name], Reply()
        print(f"{speaker.name}：", end="", flush=True)
        try:
            say(speaker, ids, self.settings, reply)
            ending = "" if reply.text else "（什么也没说）"
            print(ending if reply.end else "……（没有说完，到了 --max_new_tokens）")
        except KeyboardInterrupt:
            print("……（停下了）")
        self.remember(question, reply.text)

    def forget(self) -> None:
        """忘掉前面的对话；存盘时另起一段。"""
        self.turns.clear()
        self.story, self.forgetting = "", False
        if self.log[-1]:
            self.log.append([])

    def clear(self) -> None:
        self.forget()
        self.log = [[]]

    def save(self, name: str) -> None:
        talks = [talk for talk in self.log if talk]
        path = save_talks(name, talks, self.settings.system)
        print(f"（{sum(map(len, talks))} 轮对话存到 {path}）")

    def show_history(self) -> None:
        print(f"记得 {len(self.turns)} 轮（最多 {MEMORY} 轮）")
        for number, turn in enumerate(self.turns, 1):
            print(f"  {number}. 你：{turn.question}\n     {turn.name}：{printable(turn.answer)}")

    def handle(self, line: str) -> bool:
        """处理一行：命令或要说的话。返回 False 表示退出。"""
        words = line.removeprefix("/").split() or [line]
        command = COMMANDS.get(words[0].lower(), words[0].lower())
        if command == "switch" and len(words) <= 2:
            self.switch(words[1] if len(words) == 2 else "")
        elif command == "save" and (len(words) <= 2 or Path(words[-1]).suffix in (".txt", ".jsonl")):
            self.save(line.removeprefix("/")[len(words[0]) :].strip())  # 文件名里可以有空格
        elif len(words) > 1 or command not in COMMANDS.values():
            self.ask(line)
        elif command == "clear":
            self.clear()
            print("（清空了，从头开始。）")
        elif command == "history":
            self.show_history()
        elif command == "help":
            print(HELP)
        return command != "quit" or len(words) > 1


# ---------------------------------------------------------------- 3. 主循环


def tiny_example(seed: int) -> list[str]:
    """小世界里可以照着问的两句：一个故事带一个问题，再加一个要靠记性的追问。"""
    asked = world.heldout_questions(50, seed)
    messages = next(q["messages"] for q in asked if len(q["messages"]) == 3)
    return [messages[0]["content"].replace("\n", ""), messages[2]["content"]]


def welcome(chat: Chat) -> None:
    print(describe_sampling(chat.settings, chat.speakers[chat.name]))
    others = [name for name in chat.results.paths if name != chat.name]
    if others:
        print(f"还可以换成：{'、'.join(others)}（例如 switch {others[0]}）。")
    print("命令：switch、clear、history、save、help、quit。")
    if chat.tiny:
        story, follow_up = tiny_example(chat.settings.seed)
        print(f"""
{TINY_NOTE}
粘贴这一行试试：
    {story}
再接着问（故事在上一轮里，这里考的是记性）：
    {follow_up}""")
        if chat.settings.system:
            print("小世界的训练数据里没有系统提示，--system 有什么效果说不准。")
    print()


def main(argv: list[str] | None = None) -> None:
    settings = parse_arguments(ChatSettings, argv)
    if settings.model and settings.start != "auto":
        raise UserError("--model 和 --start 只能给一个：--start 是从训练结果里选。")
    folders = name_adapters(settings.adapter)
    if folders and not settings.model and settings.start == "auto":
        settings.model = base_of(next(iter(folders.values())))
    names = ["model"] if settings.model else ["base", "sft", "dpo", "ppo", "grpo"]
    results = find_results(settings, names, DEFAULTS, needed=any)
    order = ("model", "ppo", "grpo", "dpo", "sft", "base") if settings.start == "auto" else (settings.start,)
    first = next((name for name in order if name in results.paths), settings.start)
    results = with_adapters(results, folders, first)
    chat = Chat(settings, results)
    for name in reversed(folders):  # 坏了的、不是它的，开头就说；最后停在第一个
        chat.choose(name)
    chat.switch(next(iter(folders), first))
    if settings.web:
        examples = [*tiny_example(settings.seed), "你是谁？"] if chat.tiny else FULL_QUESTIONS
        serve(build_page(chat, examples, f"\n\n{TINY_NOTE}" if chat.tiny else ""), settings.port)
        return
    welcome(chat)
    while (line := read_line("你：")) is not None:
        try:
            if line and not chat.handle(line):
                break
        except UserError as error:
            print(f"（{error}）")
        except KeyboardInterrupt:
            print("（停下了）")
    print("再见！")


if __name__ == "__main__":
    run_main(main)
