"""mc_questions.py、mc_prompts.py：各家的栏目，写坏了的题说出第几行，选项的次序，题面，从回答里认出答案；自带的题经得起查。"""

import csv
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mc_prompts import WORDINGS, extract, language_of, letter_ask, text_ask
from mc_questions import (
    HERE,
    LETTERS,
    Question,
    example_questions,
    load_questions,
    read_question_file,
    reordered,
    rotations,
    world_questions,
)
from nlp_common.base.errors import UserError

GPQA_ROW = {
    "Record ID": "rec1",
    "Question": "第一行\n第二行，带逗号?",
    "Correct Answer": "对",
    "Incorrect Answer 1": "错一\n",
    "Incorrect Answer 2": "错二",
    "Incorrect Answer 3": "错三",
    "Explanation": "因为 …",
    "High-level domain": "Physics",
    "Subdomain": "Optics",
    "Canary String": "canary",
}


def write_csv(path, rows):
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_parquet(path, rows):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


LETTER_ROW = {"id": 0, "question": "题", "A": "一", "B": "二", "C": "三", "D": "四", "answer": "C"}


# ---------------------------------------------------------------- 各家的栏目


def test_ceval_folder(tmp_path):
    """C-Eval：一个学科一个文件；几个文件里的编号都从 0 数。"""
    write_csv(
        tmp_path / "law_val.csv",
        [LETTER_ROW | {"explanation": ""}, LETTER_ROW | {"id": 1, "question": "题二"}],
    )
    write_csv(tmp_path / "art_studies_val.csv", [LETTER_ROW])
    questions, faults = load_questions(str(tmp_path))
    assert not faults and [each.id for each in questions] == ["art_studies-0", "law-0", "law-1"]
    assert questions[1].options == ["一", "二", "三", "四"] and questions[1].answer == 2


def test_cmmlu(tmp_path):
    """CMMLU：头一栏没有名字，栏目首字母大写。"""
    path = tmp_path / "anatomy.csv"
    path.write_text(",Question,A,B,C,D,Answer\n0,题,一,二,三,四,D\n1,题二,1,2,3,4,A\n", encoding="utf-8")
    questions, faults = load_questions(str(path))
    assert not faults and [(each.answer, each.group) for each in questions] == [
        (3, "anatomy"),
        (0, "anatomy"),
    ]


def test_mmlu_pro_has_up_to_ten_options(tmp_path):
    rows = [
        {"question_id": 70, "question": "Q?", "options": [f"o{i}" for i in range(10)], "answer": "I",
         "answer_index": 8, "cot_content": "", "category": "business", "src": "x"},
        {"question_id": 71, "question": "Q2?", "options": ["a", "b", "c"], "answer": "B", "answer_index": 1,
         "cot_content": "", "category": "law", "src": "x"},
    ]  # fmt: skip
    questions, faults = load_questions(str(write_parquet(tmp_path / "test-00000-of-00001.parquet", rows)))
    assert not faults
    assert [(q.id, len(q.options), q.answer, q.group) for q in questions] == [
        ("70", 10, 8, "business"),
        ("71", 3, 1, "law"),
    ]
    text = [row | {"options": json.dumps(row["options"])} for row in rows]
    again, _ = load_questions(str(write_csv(tmp_path / "pro.csv", text)))
    assert [each.options for each in again] == [each.options for each in questions]


def test_mmlu_and_arc(tmp_path):
    path = write_parquet(
        tmp_path / "mmlu.parquet",
        [{"question": "Q?", "subject": "law", "choices": ["a", "b", "c", "d"], "answer": 3}],
    )
    assert load_questions(str(path))[0][0].answer == 3
    arc = {
        "id": "x",
        "question": "Q?",
        "choices": {"text": ["a", "b"], "label": ["1", "2"]},
        "answerKey": "2",
    }
    assert load_questions(str(write_jsonl(tmp_path / "arc.jsonl", [arc])))[0][0].answer == 1


def test_gpqa_is_shuffled_because_the_right_answer_comes_first(tmp_path):
    rows = [GPQA_ROW | {"Record ID": f"rec{i}"} for i in range(40)]
    questions, faults = load_questions(str(write_csv(tmp_path / "gpqa_diamond.csv", rows)))
    assert not faults and {each.options[each.answer] for each in questions} == {"对"}
    assert {each.answer for each in questions} == {0, 1, 2, 3}  # 四个位置都有
    assert questions[0].text == "第一行\n第二行，带逗号?" and questions[0].group == "Physics"
    assert load_questions(str(tmp_path / "gpqa_diamond.csv"))[0] == questions  # 同一种子，同一次序


# ---------------------------------------------------------------- 写坏了的题


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"question": " "}, "题目是空的"),
        ({"B": ""}, "选项 B 是空的"),
        ({"answer": "E"}, "答案 E 不在选项里：只有 4 个选项（ABCD）"),
        ({"answer": "对"}, "答案 '对' 不在选项里"),
        ({"answer": ""}, "没有答案（C-Eval 的 test 不公开答案，请用 val）"),
        ({"D": "二"}, "选项 B 与 D 一样，都是 '二'"),
    ],
)
def test_bad_rows_are_named(tmp_path, change, message):
    path = write_csv(tmp_path / "a.csv", [LETTER_ROW, LETTER_ROW | {"question": "坏的"} | change, LETTER_ROW])
    questions, faults = read_question_file(path)
    assert len(questions) == 2 and faults == [f"{path} 第 3 行：{message}"]  # 表头是第 1 行


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"options": ["a"], "answer": "A"}, "只有 1 个选项，至少要两个"),
        ({"options": ["a", ""], "answer": "A"}, "选项 B 是空的"),
        ({"options": ["a", None], "answer": "A"}, "选项 B 是空的"),
        ({"options": "a b", "answer": "A"}, "选项要是一个列表，读到的是 'None'"),
        ({"options": ["a", "b"], "answer": "B", "answer_index": 0}, "两个说的不是同一个选项"),
        ({"options": ["a", "b"], "answer": 2}, "答案 2 不在选项里"),
        ({"options": ["a", "b"], "answer": -1}, "答案 -1 不在选项里"),
        ({"options": ["a", "b"]}, "没有答案"),
        ({"options": [str(i) for i in range(30)], "answer": 1}, "有 30 个选项，最多 26 个"),
    ],
)
def test_bad_lists_are_named(tmp_path, row, message):
    good = {"question": "Q?", "options": ["a", "b"], "answer": "A"}
    path = write_jsonl(tmp_path / "a.jsonl", [good, {"question": "Q?"} | row])
    _, faults = read_question_file(path)
    assert len(faults) == 1 and faults[0].startswith(f"{path} 第 2 行：") and message in faults[0]


def test_no_question_left(tmp_path):
    path = write_csv(tmp_path / "a.csv", [LETTER_ROW | {"answer": ""}])
    with pytest.raises(UserError, match=r"没有一道能用的题：\n.*第 2 行：没有答案"):
        load_questions(str(path))


def test_unknown_columns(tmp_path):
    path = write_csv(tmp_path / "a.csv", [{"问": "题", "答": "一"}])
    with pytest.raises(UserError, match="栏目认不出来：问、答。能读的是 C-Eval"):
        load_questions(str(path))
    with pytest.raises(UserError, match="没有 none：--benchmarks 要是 world"):
        load_questions("none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="里没有题目文件"):
        load_questions(str(tmp_path / "empty"))


# ---------------------------------------------------------------- 次序与题面

FOUR = Question("1", "哪个？", ["甲", "乙", "丙", "丁"], 2)


def test_every_option_stands_everywhere_once():
    turned = [reordered(FOUR, order) for order in rotations(FOUR)]
    assert turned[0] == FOUR
    for place in range(4):
        assert {each.options[place] for each in turned} == set(FOUR.options)
    assert [each.options[each.answer] for each in turned] == ["丙"] * 4


@given(st.permutations(range(4)))
def test_the_right_answer_moves_with_its_text(order):
    assert reordered(FOUR, list(order)).options[reordered(FOUR, list(order)).answer] == "丙"


def test_prompts(chat_tokenizer):
    shot = Question("0", "例？", ["一", "二"], 1)
    ask = letter_ask(chat_tokenizer, FOUR, [shot], WORDINGS["zh"], chat=False)
    assert ask.context == "例？\nA. 一\nB. 二\n答案：B\n\n哪个？\nA. 甲\nB. 乙\nC. 丙\nD. 丁\n答案："
    assert ask.continuations == ["A", "B", "C", "D"]
    ask = text_ask(chat_tokenizer, FOUR, [shot], WORDINGS["en"], chat=False)
    assert ask.context == "Question: 例？\nAnswer: 二\n\nQuestion: 哪个？\nAnswer:"
    assert ask.continuations == [" 甲", " 乙", " 丙", " 丁"]
    ask = text_ask(chat_tokenizer, FOUR, [shot], WORDINGS["zh"], chat=True)
    assert chat_tokenizer.decode(ask.context) == (
        "<|im_start|>user\n例？<|im_end|>\n<|im_start|>assistant\n二<|im_end|>\n"
        "<|im_start|>user\n哪个？<|im_end|>\n<|im_start|>assistant\n"
    )
    assert language_of([FOUR]) == "zh" and language_of([Question("1", "Which?", ["a", "b"], 0)]) == "en"


# ---------------------------------------------------------------- 从回答里认出答案

CITIES = ["北京", "上海", "广州", "深圳"]


@pytest.mark.parametrize(
    ("reply", "picked"),
    [
        ("B", 1), ("B。", 1), ("B. 上海", 1), ("（C）", 2), ("我选D。", 3), ("答案是B", 1), ("正确答案应为（B）", 1),
        ("The answer is (A).", 0), ("Answer: C", 2), (r"所以 \boxed{C}", 2), ("上海", 1), ("应该是上海。", 1),
        ("选A不对，答案：C", 2), ("<think>A 或 B，答案是A</think>答案：D", 3), ("选 C，理由是 A 不对", 2),
        ("北京和上海", None), ("不知道", None), ("", None), ("答案是E", None), ("答案不是 A，而是 B", None),
        ("A dog is an animal", None), ("I think so", None),
    ],
)  # fmt: skip
def test_extraction(reply, picked):
    assert extract(reply, CITIES) == picked


def test_an_option_inside_another():
    assert extract("红细胞", ["细胞", "红细胞"]) == 1


@given(
    st.integers(0, 9),
    st.sampled_from(["答案是{}", "答案：{}。", "{}", "({})", "{}. 因为 …", "The answer is {}."]),
)
def test_every_letter_is_recognised(place, template):
    options = [f"选项{i}号" for i in range(10)]
    assert extract(template.format(LETTERS[place]), options) == place


@given(st.text("小花园很好的，。！ ", max_size=40))
def test_text_without_letters_or_options_is_no_answer(text):
    assert extract(text, ["甲", "乙"]) is None


# ---------------------------------------------------------------- 自带的题


@pytest.mark.parametrize(
    ("name", "at_least", "subjects"), [("knowledge_zh", 150, 10), ("knowledge_en", 60, 6)]
)
def test_the_built_in_set(name, at_least, subjects):
    """题够多、不重复、四个选项、对的在四个位置上一样多（总选 A 也只有四分之一对）；例题不在题里。"""
    questions, faults = load_questions(name)
    assert not faults and len(questions) >= at_least
    assert len({each.text for each in questions}) == len(questions)
    assert len({each.group for each in questions}) >= subjects
    counts = [sum(each.answer == place for each in questions) for place in range(4)]
    assert max(counts) - min(counts) <= 1
    shots = example_questions(name)
    assert len(shots) == 5 and not {each.text for each in shots} & {each.text for each in questions}
    assert (HERE / f"{name}.jsonl").stat().st_size < 100_000


def test_length_does_not_give_the_answer_away():
    """总选最长的选项、总选最短的，都离瞎猜不远：题面没有泄露答案。"""
    questions, _ = load_questions("knowledge_zh")
    for pick in (max, min):
        right = sum(pick(q.options, key=len) == q.options[q.answer] for q in questions) / len(questions)
        assert abs(right - 0.25) < 0.08


def test_world_questions_are_answered_by_the_story():
    for each in world_questions(60, seed=3):
        inside = [option for option in each.options if option in each.text]
        assert each.options[each.answer] in inside and len(each.options) == len(set(each.options)) == 4
        assert re.search("回想一下，", each.stem)
    assert len(world_questions(60, 3)) == 60 and len(world_questions(400, 0)) == 400
