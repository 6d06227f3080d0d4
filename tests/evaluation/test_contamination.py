"""contamination.py：埋进去的题查得出来，改了标点、全半角也查得到；手算的几成；没有的不冤枉；说得出在哪一行。"""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

import contamination as script
from contamination import KINDS, check_questions, plant, planted
from mc_questions import load_questions
from nlp_common.base.errors import UserError
from nlp_common.data.overlap import overlaps, tokens_of
from nlp_common.tiny import world
from results import find_results

QUESTION = "中国最长的河流是哪一条？"  # 11 个字


def found_in(line: str, n: int = 4, text: str = QUESTION):
    return overlaps({"q": text}, iter([("第 1 行", "别的话"), ("第 2 行", line)]), n, 0.7)["q"]


def test_tokens():
    assert tokens_of("《GPT-4》，答Ａ　１２3！") == ["gpt", "4", "答a"[0], "a", "123"]


@pytest.mark.parametrize(
    ("line", "share", "longest"),
    [
        ("前面的话，中国最长的河流是哪一条？后面的话", 1.0, 11),
        ("中 国,最长的 河流是\n哪一条", 1.0, 11),  # 标点、空格、换行都不算
        ("中国最长的河，流是哪一条", 1.0, 11),
        ("中国最长的山，河流是哪一条", 11 / 11, 11),  # 前五个字、后六个字，各是连着的四元组
        ("中国最长的山", 5 / 11, 5),
        ("河流是哪里", 4 / 11, 4),
        ("最长的", 0.0, 0),
        ("哪一条河流最长？", 0.0, 0),
    ],
)
def test_shares_by_hand(line, share, longest):
    overlap = found_in(line)
    assert overlap.share == pytest.approx(share) and overlap.longest == longest
    assert overlap.found == (share >= 0.7) and overlap.place == ("第 2 行" if share else "")


def test_lines_are_not_added_up():
    """两行各盖住一半，不是泄漏：每行碰巧相同几个字，语料大了总会凑满。"""
    lines = [("1", "中国最长的山"), ("2", "河流是哪一条路")]
    assert overlaps({"q": QUESTION}, iter(lines), 4, 0.7)["q"].share == pytest.approx(6 / 11)


def test_short_questions():
    """比 n 短的题整道题是一组；不到五个字的不查，说出来。"""
    assert found_in("问：二加二等于几？", 13, "二加二等于几？").share == 1.0
    short = found_in("谁来了？", 8, "谁来了？")
    assert not short.found and not short.checked


@given(
    st.lists(st.sampled_from(["小刚去了花园看松鼠", "不相干的一句话", "野兔吃了面包和萝卜"]), min_size=1),
    st.integers(2, 9),
)
def test_the_order_of_the_lines_does_not_matter(lines, n):
    rows = [(str(i), line) for i, line in enumerate(lines)]
    texts = {"a": "小刚去了花园看松鼠吗？", "b": "野兔吃了什么？"}
    forward, backward = overlaps(texts, iter(rows), n), overlaps(texts, iter(rows[::-1]), n)
    assert [each.share for each in forward.values()] == [each.share for each in backward.values()]


def test_planted_questions_are_found_in_a_file(tmp_path, capsys):
    """每种样子埋几道，写进对话文件里：原样的、改了标点的都查得到，说得出是哪一行；没埋的一道也没有。"""
    questions, _ = load_questions("knowledge_zh")
    kinds, chats = plant(questions, 24, seed=1)
    assert sorted(kinds.values()).count("reworded") == 6 and set(kinds.values()) == set(KINDS)
    path = tmp_path / "train.jsonl"
    rows = world.chats(200, 0) + chats
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    found = check_questions({each.id: each.text for each in questions}, str(path))
    for kind in ("verbatim", "punctuation"):
        assert all(found[name].found for name, its in kinds.items() if its == kind)
    for kind in ("half", "reworded"):
        assert not any(found[name].share == 1 for name, its in kinds.items() if its == kind)
    clean = [each.id for each in questions if each.id not in kinds]
    assert sum(found[name].found for name in clean) <= 0.05 * len(clean)
    first = next(iter(kinds))
    assert found[first].place.endswith("|200") and "train.jsonl 第 201 行" in capsys.readouterr().out


def test_ways_of_planting():
    question = load_questions("knowledge_zh")[0][0]
    assert planted(question, "verbatim", {}) == "中国最长的河流是哪一条？"
    assert planted(question, "punctuation", {}) == "中 国 最 长 的 河 流 是 哪 一 条 ?"
    assert planted(question, "half", {}) == "中国最长的河……"
    assert planted(question, "reworded", {question.text: "换"}) == "换"


def test_checking_only(tmp_path, capsys):
    """--questions 与 --train：训练数据可以是文件夹，各种格式。"""
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "a.txt").write_text("一行话\n圆周率保留两位小数是多少\n", encoding="utf-8")
    (folder / "b.csv").write_text("text,n\n世界最高峰珠穆朗玛峰在哪条山脉？,1\n", encoding="utf-8")
    found = script.main(["--preset", "tiny", "--questions", "knowledge_zh", "--train", str(folder)])
    assert sum(each["found"] for each in found.values()) == 2
    shown = capsys.readouterr().out
    assert "查到 2 道" in shown and "a.txt 第 2 条" in shown and "b.csv 第 2 行" in shown


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--questions", "knowledge_zh"], "--questions 与 --train 要一起给"),
        (["--questions", "knowledge_zh", "--train", "none"], "没有训练数据 none"),
        (["--questions", "none", "--train", "none"], "没有 none"),
        (["--n", "1"], "--n 不能小于 2"),
    ],
)
def test_mistakes(options, message):
    with pytest.raises(UserError, match=message):
        script.main(["--preset", "tiny", *options])


def test_the_lesson(tmp_path, chat_folder, capsys):
    """整课，练几步：结果文件里每道题埋没埋、查没查到、训练后对不对。"""
    options = ["--preset", "tiny", "--model", str(chat_folder), "--max_train_samples", "16", "--copies", "1"]
    run = script.main([*options, "--leaked", "8", "--max_steps", "3", "--output_dir", str(tmp_path / "out")])
    metrics = run["metrics"]
    assert metrics["recall_verbatim"] == metrics["recall_punctuation"] == 1
    assert metrics["detection"]["n8_at0.7"]["verbatim"] == 1
    assert metrics["accuracy"]["all_before"] == pytest.approx(0.25, abs=0.12)  # 没训练过的：瞎猜
    [result] = find_results([tmp_path / "out"])
    assert len(result["items"]) == metrics["n"] and sum(e["group"] != "clean" for e in result["items"]) == 8
    assert "没泄漏的" in capsys.readouterr().out and (tmp_path / "out" / "leak.svg").exists()
