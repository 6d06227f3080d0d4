"""一个个 token → 给人看的文字、调用：一边来一边给，停在 stop 的字样之前。

三样东西要先扣住几个字，看清了再给：一个汉字由几个 token 拼成，还没有凑齐；"<tool_c" 也许正在变成 <tool_call>；
结尾几个字也许是 stop 的开头。所以流式的一片一片接起来，总与不流式的一样。
"""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass, field

from nlp_common.hub.chat_server import CONTROL_WORD
from nlp_common.lm.reply_parser import BrokenCall, Call, StreamParser, unfinished_marker
from nlp_common.lm.tool_text import CALL, CALL_END

HALF = "\N{REPLACEMENT CHARACTER}"  # 一个字的字节还没有凑齐
LONGEST_CHARACTER = 8  # 一个字至多四个字节、四个 token；真有坏字节，也不永远等


@dataclass
class Spoken:
    """一个回答说到现在。"""

    content: str = ""
    calls: list[dict] = field(default_factory=list)  # OpenAI 的 tool_calls
    thinking: str = ""
    tokens: int = 0
    stopped: bool = False  # 碰到了 stop 的字样


class TextStream:
    """push(token) 给出新的文字；finish() 给出扣着的，calls 也在那时读完。"""

    def __init__(self, tokenizer, stop: list[str], has_tools: bool, thinks: bool = False):
        self.tokenizer, self.stop = tokenizer, stop
        added = tokenizer.added_tokens_decoder.items()
        self.control = {number: token.content for number, token in added if len(token.content) > 1}
        self.marks_are_tokens = CALL in self.control.values()
        self.has_tools = has_tools
        self.parser = StreamParser() if has_tools or thinks else None
        self.pending: list[int] = []  # 还没有凑成整个字的
        self.plain = ""  # 平常的字，结尾也许正在变成控制符的样子
        self.held = ""  # 结尾也许是 stop 的开头
        self.spoken = Spoken()

    def push(self, token: int) -> str:
        self.spoken.tokens += 1
        return self._show(self._parse(self._decode(token)))

    def finish(self) -> str:
        """说完了。读不懂的调用照原文放在话里：不丢掉模型说的。"""
        rest = self._parse(self._plain_out(self.tokenizer.decode(self.pending), last=True))
        self.pending = []
        if self.parser:
            rest += self.parser.finish()
            self.spoken.thinking = self.parser.thinking
        shown = self._show(rest)
        if not self.spoken.stopped:
            shown += self._give(self.held)
        self.held = ""
        if self.parser and not self.spoken.stopped:
            for call in self.parser.calls:
                if isinstance(call, BrokenCall) or not self.has_tools:
                    text = (
                        call.text
                        if isinstance(call, BrokenCall)
                        else json.dumps(vars(call), ensure_ascii=False)
                    )
                    before = "\n" if self.spoken.content else ""
                    shown += self._give(f"{before}{CALL}\n{text}\n{CALL_END}")
                else:
                    self.spoken.calls.append(openai_call(call))
        return shown

    # ------------------------------------------------------------ 三道

    def _decode(self, token: int) -> str:
        """token → 文字。平常的字拼出来的 "<tool_call>" 不是调用：用户叫它"照着念"，它就念，"<" 写成全角的。"""
        if token in self.control:
            before = self._plain_out(self.tokenizer.decode(self.pending), last=True)
            self.pending = []
            return before + self.control[token]
        self.pending.append(token)
        text = self.tokenizer.decode(self.pending)
        if text.endswith(HALF) and len(self.pending) < LONGEST_CHARACTER:
            return ""
        self.pending = []
        return self._plain_out(text)

    def _plain_out(self, text: str, last: bool = False) -> str:
        self.plain += text
        if not self.marks_are_tokens:  # 没有工具控制符的分词器（Qwen1.5）：分不出来，照原样
            text, self.plain = self.plain, ""
            return text
        keep = 0 if last else unfinished_marker(self.plain)
        text, self.plain = self.plain[: len(self.plain) - keep], self.plain[len(self.plain) - keep :]
        return CONTROL_WORD.sub("＜", text)

    def _parse(self, text: str) -> str:
        return self.parser.feed(text) if self.parser else text

    def _show(self, text: str) -> str:
        if self.spoken.stopped:
            return ""
        self.held += text
        places = [at for word in self.stop if (at := self.held.find(word)) >= 0]
        if places:
            text, self.held = self.held[: min(places)], ""
            self.spoken.stopped = True
            return self._give(text)
        keep = max((beginning_of(word, self.held) for word in self.stop), default=0)
        text, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        return self._give(text)

    def _give(self, text: str) -> str:
        self.spoken.content += text
        return text


def beginning_of(word: str, text: str) -> int:
    """text 的结尾有几个字正是 word 的开头："好的" 与 "的话" → 1。"""
    for size in range(min(len(word) - 1, len(text)), 0, -1):
        if word.startswith(text[-size:]):
            return size
    return 0


def openai_call(call: Call) -> dict:
    arguments = json.dumps(call.arguments, ensure_ascii=False)
    return {
        "id": f"call_{secrets.token_hex(8)}",
        "type": "function",
        "function": {"name": call.name, "arguments": arguments},
    }
