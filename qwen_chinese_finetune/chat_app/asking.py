"""问模型问题：边想边说（流式）、默认的题目、打印回答与评语。"""

from __future__ import annotations

import re
from pathlib import Path

from chat_app.trying import AskSettings, SpeakSettings, describe_sampling, show_speaker
from nlp_common.base.errors import UserError
from nlp_common.lm.chatml import IM_END, prompt_ids
from nlp_common.lm.speaker import Reply, Speaker, room, say
from nlp_common.tiny import world
from nlp_common.tiny.judge import judge

FULL_QUESTIONS = [
    "你好，请介绍一下你自己。",
    "中国的首都是哪里？",
    "请用三句话介绍一下长城。",
    "怎样才能睡得更好？请给出三条建议。",
    "小明有 5 个苹果，吃了 2 个，又买了 4 个，现在有几个？",
    "把这句话翻译成英文：今天天气很好。",
]

# ---------------------------------------------------------------- 边想边说


# ---------------------------------------------------------------- 题目


def story_then_question(line: str) -> str:
    """小世界专用：一行里的"故事。问题？" → 训练时的写法"故事。\\n问题？"；不是这样的一行原样返回。

    提示符下不好输入换行，文件里也是一行一题，所以在最后一个问句之前补上换行。
    """
    line = line.replace("?", "？").strip()
    match = re.fullmatch(r"([^\n]*。)\s*([^。\n]+？)", line)
    return f"{match[1]}\n{match[2]}" if match else line


def read_lines(settings: AskSettings) -> list[str]:
    """--questions 与 --file 给的各行，都没给就是空的；文件读不了、没有内容是 UserError。"""
    lines = list(settings.questions or [])
    if any(not line.strip() for line in lines):
        raise UserError("--questions 里有空的问题；请写上内容，或去掉它。")
    if settings.file:
        path = Path(settings.file).expanduser()
        try:
            text = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise UserError(f"--file {path} 不是 UTF-8 文本；请另存为 UTF-8 再试。") from error
        except OSError as error:
            where = "" if path.is_absolute() else f"（当前目录是 {Path.cwd()}）"
            raise UserError(f"读不了 --file {path}{where}：{error.strerror}。请检查路径。") from error
        found = [line.strip() for line in text.replace("\ufeff", "").split("\n") if line.strip()]
        if not found:
            raise UserError(f"--file {path} 里一行问题也没有；请一行写一个问题，存成 UTF-8。")
        lines += found
    return lines


def user_question(text: str, **extra) -> dict:
    return {"messages": [{"role": "user", "content": text}], **extra}


def load_questions(settings: AskSettings, preset: str) -> list[dict]:
    """要问的题。没有给的话，tiny：六道留出的题（有标准答案）加打招呼、问身份；full：几个常见的问题。"""
    tiny = preset == "tiny"
    if lines := read_lines(settings):
        return [user_question(story_then_question(line) if tiny else line) for line in lines]
    if not tiny:
        return [user_question(text) for text in FULL_QUESTIONS]
    talk = [user_question(asks[0], reference=reply) for asks, reply in world.SMALL_TALK[:2]]
    return world.heldout_questions(6, settings.seed) + talk


# ---------------------------------------------------------------- 提问与打印


def show_question(number: int, question: dict) -> None:
    """打印一道题；小世界的题把故事、上一轮、问题分行写。"""
    *earlier, last = [message["content"] for message in question["messages"]]
    story, _, ask = (earlier[0] if earlier else last).rpartition("\n")
    print(f"【{number}】" + (f"故事：{story}" if story else ask))
    if earlier:
        print(f"     上一轮：{ask} → {earlier[1]}")
    if story:
        print(f"     问题：{last if earlier else ask}")
    if known := question.get("answer") or question.get("reference"):
        print(f"     {'标准答案' if 'answer' in question else '训练时教的'}：{known}")


def verdict_text(question: dict, reply: Reply) -> tuple[str, float | None]:
    """→ (评语, 分)；没有标准答案的题没有分。"""
    if "answer" not in question:
        return ("" if reply.end else "（没有说完，到了 --max_new_tokens）"), None
    verdict = judge(question, reply.text, ended=reply.end == IM_END)
    words = ["对" if verdict.right else "错" if verdict.score > 0 else "没答上来"]
    if reply.end != IM_END:
        words = ["没有自己说完"]
    words += ["完整"] * verdict.complete + ["有礼"] * verdict.courteous
    return f"（{'、'.join(words)}：{verdict.score:.1f} 分）", verdict.score


def answer(speaker: Speaker, prompt: list[int], settings: SpeakSettings) -> Reply | None:
    """打印"名字："和边生成边打印的回答（不换行）；提示太长、模型读不下时说明，返回 None。"""
    print(f"  {speaker.name}：", end="", flush=True)
    if len(prompt) > room(speaker, settings):
        print(f"（没有问：{len(prompt)} 个 token，这个模型最多读 {room(speaker, settings)} 个）")
        return None
    reply = Reply()
    say(speaker, prompt, settings, reply)
    return reply


def show_speakers(speakers: list[Speaker], settings: SpeakSettings) -> None:
    for speaker in speakers:
        show_speaker(speaker)
    print(f"{describe_sampling(settings, speakers[0])}\n")


def ask_all(speakers: list[Speaker], questions: list[dict], settings: SpeakSettings) -> list[list[float]]:
    """每道题依次问每个模型，边答边打印；最后是平均分。返回每个模型在有标准答案的题上的分。"""
    show_speakers(speakers, settings)
    scores: list[list[float]] = [[] for _ in speakers]
    for number, question in enumerate(questions, 1):
        show_question(number, question)
        for speaker, marks in zip(speakers, scores, strict=True):
            reply = answer(speaker, prompt_ids(speaker.tokenizer, question["messages"]), settings)
            if reply:
                text, score = verdict_text(question, reply)
                print(f"  {text}" if text else "")
                marks += [] if score is None else [score]
        print()
    for speaker, marks in zip(speakers, scores, strict=True):
        if marks:
            mean = sum(marks) / len(marks)
            print(f"{speaker.name}：{len(marks)} 道有标准答案的题，平均 {mean:.2f} 分（满分 1）")
    return scores
