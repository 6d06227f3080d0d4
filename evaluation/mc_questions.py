"""选择题文件：各家的栏目各不相同，读成同一种 Question；写坏了的题，说出是哪个文件的哪一行、坏在哪里。

    C-Eval      id, question, A, B, C, D, answer[, explanation]           law_val.csv、law_dev.csv，一个学科一个文件
    CMMLU       （没有名字的一栏）, Question, A, B, C, D, Answer            test/anatomy.csv、dev/anatomy.csv
    MMLU-Pro    question_id, question, options, answer, answer_index, cot_content, category, src      parquet，最多十个选项
    MMLU        question, subject, choices, answer（第几个，从 0 数）       parquet
    GPQA        Question, Correct Answer, Incorrect Answer 1…3, High-level domain, Record ID …       csv，几十栏

GPQA 的文件里对的总是第一个，所以读进来就按种子打乱；别的照原来的次序。
"""

from __future__ import annotations

import ast
import json
import random
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from nlp_common.base.errors import UserError
from nlp_common.data.files import READERS, read_file, row_place
from nlp_common.tiny import world

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
GPQA = ("Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")
BUILT_IN = {"knowledge_zh": "knowledge_zh.jsonl", "knowledge_en": "knowledge_en.jsonl"}
KNOWN_LAYOUTS = (
    "C-Eval、CMMLU（A、B、C、D 与 answer）、MMLU-Pro（options）、MMLU（choices）、GPQA（Correct Answer …）"
)
SPLITS = r"[_-](val|dev|test|train|validation)$"
HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Question:
    """一道选择题；answer 是对的在第几个（从 0 数）。

    messages：聊天的模型看到的题（没有就是题面）；stem：续写的模型看到的题，接着写的就是选项（没有就是"题目 + 答案："）。
    """

    id: str
    text: str
    options: list[str]
    answer: int
    group: str = ""
    place: str = ""
    messages: list[dict] = field(default_factory=list)
    stem: str = ""


# ---------------------------------------------------------------- 1. 读


def load_questions(name: str, seed: int = 0, limit: int | None = None) -> tuple[list[Question], list[str]]:
    """名字（world、knowledge_zh、knowledge_en）、文件或文件夹 → (题, 各条毛病)。

    毛病一条一行，写着文件与行；有毛病的题不在题里。题一道也没有、栏目认不出是 UserError。
    """
    if name == "world":
        return world_questions(limit or 400, seed), []
    path = HERE / BUILT_IN[name] if name in BUILT_IN else Path(name).expanduser()
    files = [path] if path.is_file() else _files_in(path)
    found: list[Question] = []
    faults: list[str] = []
    for file in files:
        questions, wrong = read_question_file(file, seed)
        found += [each for each in questions if name not in BUILT_IN or each.group != "例题"]
        faults += wrong
    if not found and faults:
        raise UserError(f"{name} 里没有一道能用的题：\n  " + "\n  ".join(faults[:5]))
    if len(files) > 1:  # 几个文件里的编号会重
        found = [replace(each, id=f"{each.group}-{each.id}") for each in found]
    return _unique(found)[:limit], faults


def example_questions(name: str, seed: int = 0) -> list[Question]:
    """例题：自带的题里分出来的几道，或读者给的文件。"""
    if name in BUILT_IN:
        questions, _ = read_question_file(HERE / BUILT_IN[name], seed)
        return [each for each in questions if each.group == "例题"]
    if name == "world":
        return world_questions(8, seed + 1, heldout=False)
    questions, faults = load_questions(name, seed)
    if faults:
        raise UserError(f"例题里有写坏的：\n  {faults[0]}")
    return questions


def _files_in(path: Path) -> list[Path]:
    if not path.is_dir():
        raise UserError(
            f"没有 {path}：--benchmarks 要是 world、{'、'.join(BUILT_IN)}，或题目的文件、文件夹（csv、jsonl、parquet），"
            "或 lm-evaluation-harness 的任务 yaml。"
        )
    files = sorted(each for each in path.rglob("*") if each.suffix.lower() in READERS and each.is_file())
    files = [each for each in files if each.suffix.lower() != ".txt"]
    if not files:
        raise UserError(f"文件夹 {path} 里没有题目文件（csv、tsv、json、jsonl、parquet）。")
    return files


def read_question_file(path: Path, seed: int = 0) -> tuple[list[Question], list[str]]:
    """一个文件 → (题, 毛病)。"""
    rows = list(read_file(path))
    reader = find_reader(rows[0], path)
    group = re.sub(SPLITS, "", path.stem) if path.stem not in ("test", "val", "dev", "train") else ""
    questions, faults = [], []
    for index, row in enumerate(rows):
        try:
            question = check(reader(row))
        except ValueError as error:
            faults.append(f"{path} {row_place(path, index)}：{error}")
            continue
        question = replace(
            question,
            id=question.id or f"{index + 1:04d}",
            group=question.group or group,
            place=f"{path.name} 第 {index + 1} 题",
        )
        if "Correct Answer" in row:
            question = shuffled(question, random.Random(f"{seed}-{question.id}"))
        questions.append(question)
    return questions, faults


def _unique(questions: list[Question]) -> list[Question]:
    """编号重了的，后面的添上第几道。"""
    seen: dict[str, int] = {}
    found = []
    for each in questions:
        seen[each.id] = seen.get(each.id, 0) + 1
        found.append(replace(each, id=f"{each.id}#{seen[each.id]}") if seen[each.id] > 1 else each)
    return found


# ---------------------------------------------------------------- 2. 各家的栏目


def find_reader(row: dict, path: Path) -> Any:
    """看栏目是哪一家的；认不出是 UserError。"""
    if all(name in row for name in GPQA):
        return read_gpqa
    if "options" in row or "choices" in row:
        return read_list
    if "A" in row and "B" in row:
        return read_letters
    raise UserError(f"{path} 的栏目认不出来：{'、'.join(map(str, row))[:200]}。能读的是 {KNOWN_LAYOUTS}。")


def read_letters(row: dict) -> Question:
    """C-Eval、CMMLU：一个选项一栏，A、B、C、D …。"""
    given = [(letter, row[letter]) for letter in LETTERS if letter in row]
    while len(given) > 2 and _text(given[-1][1]) == "":  # 选项少的题，后面的几栏空着
        given.pop()
    for letter, value in given:
        if not _text(value):
            raise ValueError(f"选项 {letter} 是空的")
    answer = row.get("answer", row.get("Answer"))
    if answer is None or not str(answer).strip():
        raise ValueError("没有答案（C-Eval 的 test 不公开答案，请用 val）")
    options = [_text(value) for _, value in given]
    return Question(
        id=_text(row.get("id", "")),
        text=_text(row.get("question", row.get("Question"))),
        options=options,
        answer=letter_place(answer, options),
        group=_text(row.get("subject") or row.get("category") or ""),
    )


def read_list(row: dict) -> Question:
    """MMLU-Pro、MMLU：选项是一个列表；csv 里列表写成了文字。"""
    options = row.get("options", row.get("choices"))
    if isinstance(options, dict):  # ARC：{"text": […], "label": […]}
        labels, options = [str(each) for each in options.get("label", [])], options.get("text")
        if row.get("answerKey") not in labels:
            raise ValueError(f"答案 {row.get('answerKey')!r} 不在 {'、'.join(labels)} 里")
        row = row | {"answer": labels.index(row["answerKey"])}
    if isinstance(options, str):
        options = _listed(options)
    if not isinstance(options, list):
        raise ValueError(f"选项要是一个列表，读到的是 {str(options)[:40]!r}")
    options = [_text(each) for each in options]
    index = row.get("answer_index")
    answer = row.get("answer", index)
    if answer is None or not str(answer).strip():
        raise ValueError("没有答案")
    place = letter_place(answer, options)
    if index is not None and str(index).strip() and int(index) != place:
        raise ValueError(f"answer 是 {answer}，answer_index 是 {index}，两个说的不是同一个选项")
    return Question(
        id=_text(row.get("question_id", row.get("id", ""))),
        text=_text(row.get("question", row.get("Question"))),
        options=options,
        answer=place,
        group=_text(row.get("category") or row.get("subject") or ""),
    )


def read_gpqa(row: dict) -> Question:
    return Question(
        id=_text(row.get("Record ID", "")),
        text=_text(row.get("Question")),
        options=[_text(row[name]) for name in GPQA],
        answer=0,
        group=_text(row.get("High-level domain", "")),
    )


def letter_place(answer: Any, options: list[str]) -> int:
    """答案（字母、"(B)"、从 0 数的第几个、选项的全文）→ 第几个；不在选项里是 ValueError。"""
    if isinstance(answer, int) and not isinstance(answer, bool):
        place = answer
    else:
        text = str(answer).strip()
        bare = text.strip("()（）.．、 ").upper()
        if len(bare) == 1 and bare in LETTERS:
            place = LETTERS.index(bare)
        elif text in options:
            return options.index(text)
        elif re.fullmatch(r"-?\d+", text):
            place = int(text)
        else:
            raise ValueError(f"答案 {text[:40]!r} 不在选项里")
    if not 0 <= place < len(options):
        raise ValueError(f"答案 {answer} 不在选项里：只有 {len(options)} 个选项（{LETTERS[: len(options)]}）")
    return place


def _text(value: Any) -> str:
    return "" if value is None or value != value else str(value).strip()


def _listed(text: str) -> list | None:
    """``["a", "b"]`` 或 ``['a', 'b']`` → 列表；别的是 None。"""
    for read in (json.loads, ast.literal_eval):
        try:
            found = read(text)
        except (ValueError, SyntaxError):
            continue
        return found if isinstance(found, list) else None
    return None


def check(question: Question) -> Question:
    """题目空着、选项缺了、重了，是 ValueError，说出是哪个。"""
    if not question.text:
        raise ValueError("题目是空的")
    if len(question.options) < 2:
        raise ValueError(f"只有 {len(question.options)} 个选项，至少要两个")
    if len(question.options) > len(LETTERS):
        raise ValueError(f"有 {len(question.options)} 个选项，最多 {len(LETTERS)} 个")
    for letter, option in zip(LETTERS, question.options, strict=False):
        if not option:
            raise ValueError(f"选项 {letter} 是空的")
    for place, option in enumerate(question.options):
        if option in question.options[:place]:
            first = question.options.index(option)
            raise ValueError(f"选项 {LETTERS[first]} 与 {LETTERS[place]} 一样，都是 {option[:20]!r}")
    return question


# ---------------------------------------------------------------- 3. 选项的次序


def shuffled(question: Question, rng: random.Random) -> Question:
    return reordered(question, rng.sample(range(len(question.options)), len(question.options)))


def reordered(question: Question, order: list[int]) -> Question:
    """order[i]：新的第 i 个选项是原来的第几个。"""
    return replace(
        question, options=[question.options[i] for i in order], answer=order.index(question.answer)
    )


def rotations(question: Question) -> list[list[int]]:
    """每个选项在每个位置上各站一次：n 个选项转 n 次。"""
    n = len(question.options)
    return [[(i + turn) % n for i in range(n)] for turn in range(n)]


# ---------------------------------------------------------------- 4. 小世界的题：答案就在故事里


def world_questions(n: int, seed: int, heldout: bool = True) -> list[Question]:
    """小世界的阅读题：对的答案，加同类的另外三个词。链上的模型会答，所以看得出评测的方法对不对。"""
    rng = random.Random(f"mc-{seed}-{heldout}")
    found = []
    for number, row in enumerate(world.questions(3 * n, seed, heldout=heldout)):
        if len(row["messages"]) > 1:  # 追问的不要：题面要在一段话里
            continue
        others = [value for value in world.WORLD[row["slot"]] if value != row["answer"]]
        options = [row["answer"], *rng.sample(others, 3)]
        rng.shuffle(options)
        story, ask = row["messages"][0]["content"].split("\n")
        before, _, _ = row["sentence"].partition(row["answer"])
        found.append(
            Question(
                id=f"w{number:04d}",
                text=f"{story}\n{ask}",
                options=options,
                answer=options.index(row["answer"]),
                group=world.LABEL[row["slot"]],
                place=f"小世界第 {number} 题",
                messages=row["messages"],
                stem=f"{story}回想一下，{before}",
            )
        )
    return found[:n]
