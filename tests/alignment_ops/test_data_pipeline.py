"""文档到指令数据：样板读得回、洗得净；规则出的题对；门拦得住写错的；分开不漏；大模型出的题一样过门；脚本从头到尾。"""

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import data_pipeline
import instruction_rows as ir
import llm_rows
import pipeline_exam
import row_checks as rc
from nlp_common.base.errors import UserError
from nlp_common.data.chats import to_chats
from nlp_common.data.documents import Document, read_folder
from nlp_common.hub.chat_server import ChatServer
from nlp_common.tiny.world import WORLD
from qa_rules import Pair, Passage, pairs_of, passages_of, split_sentences
from sample_documents import NOISE, cleaning_score, pdf_bytes, rule_score, write_samples
from text_cleaning import Cleaned, clean_documents, join_lines, tidy_characters

HAN = st.text(alphabet="小刚的松鼠住在花园爱吃，。！\n #-：", max_size=120)


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    """二十份样板：(文件夹, 写了什么)。"""
    folder = tmp_path_factory.mktemp("samples")
    return folder, write_samples(folder, 20, 5, seed=0)


def cleaned_of(text: str, name: str = "a.txt") -> str:
    return clean_documents([Document(name, text)])[0].text


def pair(
    question="普通图书借期多少天？",
    answer="三十天",
    passage="普通图书借期三十天，可以续借一次。新书十天。",
    **more,
):
    fields = {"document": "a", "subject": "借书", "rule": "number", "evidence": passage.split("。")[0] + "。"}
    return Pair(passage=passage, questions=(question,), answer=answer, said=f"{answer}。", **fields | more)


# ---------------------------------------------------------------- 样板与清洗


def test_samples_are_the_same_for_a_seed(samples, tmp_path):
    folder, wrote = samples
    again = write_samples(tmp_path, 20, 5, seed=0)
    assert again == wrote and len(wrote) == 25 and sum(s.copy_of is not None for s in wrote) == 5
    for path in folder.iterdir():
        assert path.read_bytes() == (tmp_path / path.name).read_bytes(), path.name


def test_every_format_is_read_and_cleaned(samples):
    for package in ("bs4", "pypdf", "docx"):
        pytest.importorskip(package, reason=f"没有装 {package}")
    folder, wrote = samples
    documents, faults = read_folder(folder)
    cleaned = clean_documents(documents)
    score = cleaning_score(wrote, documents, cleaned)
    assert not faults and len(documents) == 25
    assert score["whole"] == 1 and score["noise_left"] == 0 and score["whole_before"] < 0.9
    assert score["sentences"] == 25 * 6 and score["noise"] >= 25  # 每份都有脏东西
    whys = Counter(why for each in cleaned for _, why in each.removed)
    assert set(whys) == {"标记", "分隔线", "各份都有", "页码", "菜单"} and set(NOISE) == {
        "md",
        "txt",
        "html",
        "pdf",
        "docx",
    }
    pairs = [p for each in cleaned for passage in passages_of(each, 80) for p in pairs_of(passage)]
    rules = rule_score(wrote, pairs)
    assert rules["precision"] == 1 and 0.85 < rules["recall"] < 1  # 随便写的句子，规则认不出


def test_pdf_is_read_by_pypdf(tmp_path):
    pypdf = pytest.importorskip("pypdf", reason="没有装 pypdf")
    path = tmp_path / "a.pdf"
    path.write_bytes(pdf_bytes([["小刚的松鼠", "住在花园。"], ["第二页"]]))
    texts = [page.extract_text().strip() for page in pypdf.PdfReader(path, strict=True).pages]
    assert texts == ["小刚的松鼠\n住在花园。", "第二页"]


@pytest.mark.parametrize(
    "raw, wanted",
    [
        ("借 书 须 知\n一 次\u200b五本。", "借书须知\n一次五本。"),
        ("电话１２３，ＡＢＣ。", "电话123，ABC。"),
        ("machine learning 很好。", "machine learning 很好。"),  # 英文词之间的空格留着
        ("一次五本。\n- 3 -\n第 1 页 共 2 页\n＊＊＊＊\n可以续借。", "一次五本。\n可以续借。"),
        (
            "普通图书借期三十天，到期前可以续\n借一次，再加十五天。",
            "普通图书借期三十天，到期前可以续借一次，再加十五天。",
        ),
        ("小芳的松鼠住在花园，不怕生人\n。", "小芳的松鼠住在花园，不怕生人。"),  # 句号被挤到下一行
        ("期限：三十天\n每次：五本", "期限：三十天\n每次：五本"),  # 一栏一栏的不接
        ("期限 | 三十天", "期限：三十天"),  # 表格里的两格
    ],
)
def test_cleaning_by_hand(raw, wanted):
    assert cleaned_of(raw) == wanted


def test_markdown_leaves_the_prose():
    text = "---\ntitle: 甲\n---\n# 借书\n\n![图](a.png)\n一次**五**本，见[规章](b.md)。<!-- 待改 -->\n\n[回首页](c.md)\n"
    assert cleaned_of(text, "a.md") == "# 借书\n\n一次五本，见规章。"


def test_only_lines_that_most_files_of_a_kind_share_are_boilerplate():
    menu = [
        Document(f"{n}.html", f"首页 | 联系我们\n期限：{'三四'[n > 2]}十天\n正文{'甲乙丙丁戊'[n]}。")
        for n in range(5)
    ]
    plain = [Document(f"{n}.txt", f"首页 | 联系我们\n文字{'子丑'[n]}。") for n in range(2)]
    cleaned = clean_documents(menu + plain)
    assert all("首页" not in each.text and "期限：" in each.text for each in cleaned[:5])
    assert all("首页" in each.text for each in cleaned[5:])  # 两份不够说它是菜单
    assert cleaned[0].removed == [("首页 | 联系我们", "各份都有")]
    stops = [
        Document(f"{n}.pdf", f"小芳的松鼠住在{'花园山顶海边市场'[2 * n : 2 * n + 2]}，不怕生人\n。")
        for n in range(4)
    ]
    assert all(each.text.endswith("不怕生人。") for each in clean_documents(stops))  # 份份都有的句号不是页眉


@settings(max_examples=80, deadline=None)
@given(HAN)
def test_no_character_is_lost(text):
    kept = Counter(char for char in tidy_characters(text) if not char.isspace())
    assert kept == Counter(char for char in text if not char.isspace())
    assert tidy_characters(tidy_characters(text)) == tidy_characters(text)
    assert "".join(split_sentences(text)) == text
    assert Counter(join_lines(text).replace("\n", "")) - Counter(text) == Counter()
    passages = passages_of(Cleaned("a.txt", text), 20)
    assert all(0 < len(passage.text) <= 20 for passage in passages)


# ---------------------------------------------------------------- 规则与门


@pytest.mark.parametrize(
    "sentence, rule, question, answer",
    [
        ("普通图书借期三十天，到期前可以续借一次。", "number", "普通图书借期多少天？", "三十天"),
        ("馆长：王伯", "key_value", "图书馆的馆长是什么？", "王伯"),
        ("本馆位于山顶，欢迎来。", "place", "图书馆位于哪里？", "山顶"),
        ("图书馆由赵姨管理。", "carer", "管理图书馆的是谁？", "赵姨"),
        ("照看它的是王伯。", "carer", "照看图书馆的是谁？", "王伯"),
        ("它每天清晨开门。", "time", "图书馆什么时候开门？", "清晨"),
        ("图书馆的颜色是雪白。", "attribute", "图书馆的颜色是什么？", "雪白"),
        ("图书馆是指收藏书刊供人阅览的地方。", "definition", "图书馆是什么？", "收藏书刊供人阅览的地方"),
    ],
)
def test_rules_by_hand(sentence, rule, question, answer):
    [found] = pairs_of(Passage("a.txt", "图书馆", sentence))
    assert (found.rule, found.questions[0], found.answer) == (rule, question, answer)
    assert len(set(found.questions)) == 3 and answer in found.said and "它" not in found.said


@pytest.mark.parametrize(
    "sentence", ["逾期满九十天，读者证停用。", "大家都很高兴。", "他说：你好，王伯，请坐。", "第三次，罚款。"]
)
def test_rules_leave_what_they_do_not_know(sentence):
    assert pairs_of(Passage("a.txt", "图书馆", sentence)) == []


def test_a_row_of_a_table_is_about_its_first_cell():
    [first, second] = passages_of(Cleaned("a.csv", "名称：松鼠；食物：香蕉\n\n名称：乌龟；食物：西瓜"), 80)
    assert (first.subject, second.subject) == ("松鼠", "乌龟")
    assert pairs_of(second)[-1].questions[0] == "乌龟的食物是什么？" and pairs_of(second)[-1].answer == "西瓜"


PASSAGE = "普通图书借期三十天，可以续借一次。新书架上的书借期十天。借书由王伯负责。"


@pytest.mark.parametrize(
    "question, answer, reason",
    [
        ("普通图书借期多少天？", "三十天", None),
        ("新书架上的书借期多少天？", "十天", None),
        ("普通图书借期多少天？", "十天", "wrong_sentence"),  # 十天在另一句；"三十天"里的不算
        ("普通图书借期多少天？", "九十天", "not_in_passage"),
        ("普通图书借期是三十天吗？", "三十天", "in_question"),
        ("普通图书借期多少天？", "王伯", "wrong_kind"),
        ("火车站几点开门？", "王伯", "off_topic"),
        ("借书由谁负责？", "", "malformed"),
        ("普通图书借期三十天。", "三十天", "malformed"),
        ("几？", "三十天", "malformed"),
    ],
)
def test_gate_by_hand(question, answer, reason):
    assert rc.fault_of(question, answer, PASSAGE, "借书") == reason


def test_a_question_that_names_another_document_is_off_topic():
    told = ("小刚的松鼠住在哪里？", "花园", "它住在花园。", "小兰的松鼠")
    assert rc.fault_of(*told) is None  # 字大半对得上，看不出来
    assert rc.fault_of(*told, subjects={"小刚的松鼠", "小兰的松鼠"}) == "off_topic"


CMRC = Path(__file__).resolve().parents[3] / "shared" / "data" / "cmrc2018" / "trial.jsonl"


@pytest.mark.skipif(not CMRC.exists(), reason="没有 ../shared/data/cmrc2018")
def test_gate_on_questions_that_people_wrote():
    """真人写的题大半能要；换成同一段里另一题的答案，九成拦得住：宁可漏，不要错的。"""
    by_text: dict[str, list] = {}
    for line in CMRC.open(encoding="utf-8"):
        row = json.loads(line)
        by_text.setdefault(row["context"], []).append((row["question"], row["answers"][0]))
    kept, caught = [], []
    for text, rows in list(by_text.items())[:150]:
        kept += [rc.fault_of(question, answer, text, "") is None for question, answer in rows]
        for question, right in rows:
            others = [answer for _, answer in rows if rc.normal(answer) != rc.normal(right)]
            caught += [rc.fault_of(question, answer, text, "") is not None for answer in others]
    assert sum(kept) / len(kept) > 0.6 and sum(caught) / len(caught) > 0.87


def test_answers_stand_whole():
    assert rc.stands_in("十天", "借期十天") and not rc.stands_in("十天", "借期三十天")
    assert rc.stands_in("十天", "三十天，新书十天") and not rc.stands_in("30", "共1300本")
    assert rc.stands_in("ABC 公司", "在abc公司") and not rc.stands_in("甲", "")


def test_conflicting_answers_are_all_dropped():
    right, wrong = pair(), pair(answer="四十天", passage="普通图书借期四十天。", document="b")
    other = pair(question="可以续借多少次？", answer="一次")
    kept, dropped = rc.check_pairs([right, wrong, other, right])
    assert kept == [other] and [reason for _, reason in dropped] == ["conflict"] * 3


def test_planted_faults_are_caught(samples):
    folder, _ = samples
    texts = [
        Document(path.name, path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.[mt][dx]*"))
    ]
    pairs = [
        p for each in clean_documents(texts) for passage in passages_of(each, 80) for p in pairs_of(passage)
    ]
    gate = data_pipeline.measure_gate(pairs, seed=0)
    assert gate["false_alarms"] == 0
    assert all(rate == 1 for kind, rate in gate["recall"].items() if kind != "wrong_span")
    assert gate["recall"]["wrong_span"] < 0.6  # 同一句里抄错几个字：只看字看不出来
    assert rc.plant_faults([], 10, 0) == []


# ---------------------------------------------------------------- 分开与套模板


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=2, max_size=20), st.floats(0.05, 0.9), st.integers(0, 5))
def test_split_keeps_groups_together(groups, share, seed):
    if len(set(groups)) < 2:
        return
    names = [f"{n}.txt" for n in range(len(groups))]
    held = ir.heldout_documents(names, groups, share, seed)
    sides = {
        group: {name in held for name, g in zip(names, groups, strict=True) if g == group} for group in groups
    }
    assert all(len(side) == 1 for side in sides.values())
    assert held and held != set(names) and held == ir.heldout_documents(names, groups, share, seed)


def test_copies_are_one_group_and_nothing_leaks():
    texts = ["小刚的松鼠住在花园，爱吃香蕉，由王伯照看。", "小兰的乌龟住在山顶，爱吃西瓜，由李婶照看。"]
    assert ir.groups_of([*texts, texts[0] + "！"]) == [0, 1, 0]
    a, b = pair(document="a"), pair(document="b")
    other = pair(question="可以续借多少次？", answer="一次", document="c")
    assert ir.leaked([a], [b, other]) == 0.5 and ir.leaked([a], [other]) == 0 and ir.leaked([], []) == 0
    assert ir.distinct([a, b, other]) == [a, other]
    train, held = ir.by_rows([a, b, other, other], 0.25, 0)
    assert len(train) == 3 and len(held) == 1


def test_rows_are_what_sft_reads():
    three = Pair(
        "a",
        "借期三十天。",
        "借书",
        "number",
        ("甲？？", "乙？？", "丙？？"),
        "三十天",
        "借期三十天。",
        "借期三十天。",
    )
    rows = ir.to_rows([three])
    assert [row["book"] for row in rows] == ["open", "closed"] * 2
    assert [row["messages"][0]["content"] for row in rows] == [
        "借期三十天。\n甲？？",
        "甲？？",
        "资料：借期三十天。\n问题：乙？？",
        "请问，乙？？",
    ]
    assert not any("丙" in row["messages"][0]["content"] for row in rows)  # 留着考
    assert ir.exam_of([three], "closed", other_wording=True)[0]["messages"] == [
        {"role": "user", "content": "丙？？"}
    ]
    chats = to_chats(rows, "rows")
    assert [chat["messages"][-1]["content"] for chat in chats] == ["借期三十天。"] * 4
    assert len(ir.to_rows([three], closed=False)) == 2 and len(ir.to_rows([pair()])) == 2


def test_swapped_answers_are_swapped_everywhere_and_only_in_their_rows():
    pairs = [
        pair(f"{who}住在哪里？", where, f"{who}住在{where}。它很乖。", subject=who, rule="place")
        for who, where in (("松鼠", "花园"), ("乌龟", "山顶"), ("狐狸", "海边"))
    ]
    rows = ir.to_rows(pairs, swap=True)
    assert ir.to_rows(pairs, swap=True) == rows != ir.to_rows(pairs, swap=True, seed=1)
    assert [row for row in rows if row["book"] != "swapped"] == ir.to_rows(pairs) and len(rows) == 9
    for true, changed in zip(pairs, rows[2::3], strict=True):
        asked, said = (turn["content"] for turn in changed["messages"])
        assert changed["answer"] != true.answer and true.answer not in asked + said
        assert changed["answer"] in asked and changed["answer"] in said
    twice = pair(passage="普通图书借期三十天。新书也是三十天。")  # 换不干净，不换
    assert len(ir.to_rows([twice, pair(answer="九天", passage="借期九天。")], swap=True)) == 4 + 1


@pytest.mark.parametrize(
    "text, ended, right",
    [
        ("是三十天。", True, True),
        ("是三十天。", False, False),
        ("三十天或十天", True, False),
        ("十天", True, False),
    ],
)
def test_scoring_by_hand(text, ended, right):
    assert ir.is_right({"text": text, "ended": ended}, pair(), {"三十天", "十天"}) is right


# ---------------------------------------------------------------- 大模型出题


def server_of(chat_server, answer) -> ChatServer:
    chat_server.answer = answer
    return ChatServer(chat_server.url, "m", timeout=5, retries=0, wait=0)


PASSAGES = [
    Passage("a.txt", "借书", "普通图书借期三十天。<|im_end|>借书由王伯负责。"),
    Passage("b.txt", "座位", "讨论室一共六间。"),
]


def test_a_model_writes_and_the_gate_reads(chat_server, tmp_path):
    written = {
        "借期": '好的：```json\n[{"question": "普通图书借期多少天？", "another": "借期几天？", "answer": "三十天"},'
        '{"question": "普通图书借期多少天？", "answer": "九十天"}, {"question": "缺一栏"}, 7]\n```',
        "讨论室": "我不会",
    }

    def answer(body):
        return next(said for word, said in written.items() if word in body["messages"][1]["content"])

    server = server_of(chat_server, answer)
    pairs, faults = llm_rows.write_pairs(llm_rows.Asked(server, tmp_path / "llm.jsonl"), PASSAGES, 2)
    assert faults == {"缺 question 或 answer": 2, "不是 JSON 列表": 1}
    assert [p.answer for p in pairs] == ["三十天", "九十天"] and pairs[0].questions == (
        "普通图书借期多少天？",
        "借期几天？",
    )
    kept, dropped = rc.check_pairs(pairs)
    assert [p.answer for p in kept] == ["三十天"] and dropped[0][1] == "not_in_passage"
    assert "<|im_end|>" not in json.dumps(chat_server.asked[0][2], ensure_ascii=False)  # 文档里的变不成控制符
    asked = len(chat_server.asked)
    again, _ = llm_rows.write_pairs(llm_rows.Asked(server, tmp_path / "llm.jsonl"), PASSAGES, 2)
    assert again == pairs and len(chat_server.asked) == asked  # 问过的不再问


def test_half_a_line_is_asked_again(chat_server, tmp_path):
    saved = tmp_path / "llm.jsonl"
    server = server_of(chat_server, lambda body: "[]")
    llm_rows.write_pairs(llm_rows.Asked(server, saved), PASSAGES[:1], 1)
    saved.write_bytes(saved.read_bytes()[:-8])
    llm_rows.write_pairs(llm_rows.Asked(server, saved), PASSAGES[:1], 1)
    llm_rows.write_pairs(llm_rows.Asked(server, saved), PASSAGES[:1], 1)
    assert len(chat_server.asked) == 2 and len(saved.read_text(encoding="utf-8").splitlines()) == 2


def test_a_silent_server_stops_and_keeps_what_it_wrote(chat_server, tmp_path):
    answers = iter(["[]"] + [(500, b"")] * 20)
    server = server_of(chat_server, lambda body: next(answers))
    many = [Passage("a.txt", "甲", f"第{n}段写了些什么。") for n in range(20)]
    with pytest.raises(UserError, match=r"接连 5 句没有回答.*第 6/20 段.*接着往下"):
        llm_rows.write_pairs(llm_rows.Asked(server, tmp_path / "llm.jsonl"), many, 1)
    assert len(chat_server.asked) == 6
    chat_server.answer = lambda body: "[]"
    llm_rows.write_pairs(llm_rows.Asked(server, tmp_path / "llm.jsonl"), many, 1)
    assert len(chat_server.asked) == 6 + 19


def test_the_second_answer_must_agree(chat_server, tmp_path):
    said = {"甲": "三十天。", "乙": "借期是三十天", "丙": "没有", "丁": "十天", "戊": (500, b""), "己": ""}
    server = server_of(chat_server, lambda body: said[body["messages"][1]["content"][-1]])
    pairs = [pair(question=f"普通图书借期多少天？{who}") for who in said]
    assert llm_rows.agreeing(llm_rows.Asked(server, tmp_path / "a"), pairs) == [True, True] + [False] * 4
    asked = len(chat_server.asked)
    assert llm_rows.agreeing(llm_rows.Asked(server, tmp_path / "a"), pairs) == [True, True] + [False] * 4
    assert len(chat_server.asked) == asked + 1  # 只有没回答的那一句再问


# ---------------------------------------------------------------- 脚本


def handbook(folder: Path, n: int = 4) -> Path:
    folder.mkdir()
    told = zip(WORLD["person"], WORLD["animal"], WORLD["place"], WORLD["food"], strict=False)
    for number, (person, animal, place, food) in enumerate(list(told)[:n]):
        who = f"{person}的{animal}"
        text = f"{who}\n\n{who}住在{place}。它每天吃{food}。"
        (folder / f"{number}.txt").write_text(text, encoding="utf-8")
    return folder


def run(*argv) -> dict:
    return data_pipeline.main(["--preset", "tiny", *map(str, argv)])


def test_own_folder_gives_rows_and_a_page(tmp_path, capsys):
    folder, out = handbook(tmp_path / "docs"), tmp_path / "out"
    (folder / "坏.md").write_bytes("甲".encode("gbk"))
    record = run("--dataset", folder, "--output_dir", out)
    said = capsys.readouterr().out
    assert "没有读：" in said and "坏.md" in said and "sft" not in record["metrics"]
    metrics = record["metrics"]
    assert metrics["documents"] == 4 and metrics["unread"] == 1 and metrics["leaked"]["documents"] == 0
    rows = {
        name: [json.loads(line) for line in (out / f"{name}.jsonl").open(encoding="utf-8")]
        for name in ("train", "heldout")
    }
    assert not {row["document"] for row in rows["train"]} & {row["document"] for row in rows["heldout"]}
    assert len(to_chats(rows["train"], "train")) == 3 * 2 * 4 and {
        row["book"] for row in rows["heldout"]
    } == {"open"}
    page = (out / "statistics.html").read_text(encoding="utf-8")
    assert (
        "坏.md" in page
        and rows["train"][0]["messages"][1]["content"] in page
        and "http" not in page
        and "$" not in page
    )
    assert "已有训练结果" not in said
    run("--dataset", folder, "--output_dir", out)
    assert "已有训练结果" in capsys.readouterr().out
    (folder / "0.txt").write_text("小刚的松鼠\n\n它住在学校。", encoding="utf-8")
    with pytest.raises(UserError, match="documents_sha256"):
        run("--dataset", folder, "--output_dir", out)


def test_text_of_documents_is_escaped_on_the_page(tmp_path):
    folder = handbook(tmp_path / "docs")
    (folder / "x.txt").write_text("<script>怪\n\n<script>怪住在<b>花园。它每天吃玉米。", encoding="utf-8")
    run("--dataset", folder, "--output_dir", tmp_path / "out")
    page = (tmp_path / "out" / "statistics.html").read_text(encoding="utf-8")
    assert "<script>" not in page and "<b>花" not in page


@pytest.mark.parametrize(
    "options, message",
    [
        (["--dataset", "没有的文件夹"], "--dataset 要一个文档的文件夹，没有 没有的文件夹"),
        (["--llm_url", "http://127.0.0.1:1/v1"], "--llm_url 与 --llm_model 要一起给"),
        (["--n_documents", "5"], "--n_documents 要在 10 到 100 之间"),
        (["--heldout_share", "1"], "--heldout_share"),
    ],
)
def test_wrong_options_are_said(options, message):
    with pytest.raises(UserError, match=message):
        run(*options)


def test_folders_without_questions_are_said(tmp_path):
    one = handbook(tmp_path / "one", 1)
    with pytest.raises(UserError, match="不到两份文档"):
        run("--dataset", one, "--output_dir", tmp_path / "a")
    shutil.copy(one / "0.txt", one / "1.txt")
    with pytest.raises(UserError, match="几乎一样"):
        run("--dataset", one, "--output_dir", tmp_path / "b")
    for path in one.iterdir():
        path.write_text("大家都很高兴，唱了一天的歌。", encoding="utf-8")
    with pytest.raises(UserError, match=r"没有一句是规则认得的句式.*--llm_url"):
        run("--dataset", one, "--output_dir", tmp_path / "c")
    for path in one.iterdir():
        path.write_bytes(b"")
    with pytest.raises(UserError, match="一个能读的文件"):
        run("--dataset", one, "--output_dir", tmp_path / "d")


def test_a_server_writes_the_rows_of_the_script(chat_server, tmp_path, monkeypatch):
    monkeypatch.setattr("nlp_common.hub.chat_server.time.sleep", lambda seconds: None)
    folder = handbook(tmp_path / "docs")

    def answer(body):
        text = body["messages"][-1]["content"]
        if "问题：" in text:  # 再答一遍：小兰的那一题，这次答得不一样
            return "没有" if "小兰" in text else text.split("住在")[1].split("。")[0]
        if "标题：" not in text:
            return "好"
        who, place = text.split("\n")[0][3:], text.split("住在")[1].split("。")[0]
        return json.dumps(
            [
                {"question": f"{who}住在哪里？", "answer": place},
                {"question": f"{who}吃什么？", "answer": "土"},
            ]
        )

    chat_server.answer = answer
    options = [
        "--dataset",
        folder,
        "--llm_url",
        chat_server.url,
        "--llm_model",
        "m",
        "--output_dir",
        tmp_path / "out",
    ]
    metrics = run(*options)["metrics"]
    assert metrics["pairs"] == 8 and metrics["kept_pairs"] == 3
    assert metrics["dropped"]["not_in_passage"] == 4 and metrics["dropped"]["disagrees"] == 1
    assert metrics["train_pairs"] + metrics["heldout_pairs"] == 3


def test_training_part(tmp_path, monkeypatch, chat_folder, capsys):
    """训练换成照抄一个小模型：考试、混进的对话、参数都接得上。"""
    asked = []

    def copied(stage, out, model, dataset, preset, **options):
        asked.append((out.name, len(Path(dataset).read_text(encoding="utf-8").splitlines()), options))
        shutil.copytree(chat_folder, out)

    monkeypatch.setattr(data_pipeline, "run_stage", copied)
    monkeypatch.setattr(pipeline_exam, "WORLD_QUESTIONS", 4)
    folder, out = handbook(tmp_path / "docs", 5), tmp_path / "out"
    options = [
        "--dataset",
        folder,
        "--train",
        "true",
        "--swap",
        "true",
        "--replay",
        "7",
        "--output_dir",
        out,
        "--model",
        chat_folder,
    ]
    sft = run(*options)["metrics"]["sft"]
    assert [name for name, _, _ in asked] == ["sft", "without_swap", "row_split"]
    assert asked[0][1] == 4 * 2 * 6 + 7 and asked[1][1] == 4 * 2 * 4 + 7
    assert asked[0][2]["max_train_samples"] == asked[0][1] and asked[0][2]["learning_rate"] == 1e-3
    assert set(pipeline_exam.EXAMS) <= set(sft["after"]) and sft["before"] == sft["after"]  # 同一个模型
    assert "qa_accuracy" in sft["after"] and {"accuracy", "low", "high", "n"} == set(sft["row_split"])
    assert (out / "sft" / "model.safetensors").exists() and (out / "pipeline_gain.svg").exists()
    assert "没见过的文档，开卷" in capsys.readouterr().out


@pytest.mark.slow
def test_sft_on_the_rows_teaches(tmp_path):
    """真的训练一遍：没见过的文档开卷更好，教过的文档闭卷记住了，没教过的仍然只能猜。

    十六份文档，留出的只有二十一题，学没学会看运气；三十六份有五十题，开卷从一半到九成。
    """
    record = run("--n_documents", 36, "--replay", 200, "--output_dir", tmp_path / "out")
    sft = record["metrics"]["sft"]
    assert sft["without_swap"]["closed_trained"]["accuracy"] > 0.8
    before, after = (
        {name: sft[when][name]["accuracy"] for name in pipeline_exam.EXAMS} for when in ("before", "after")
    )
    assert after["closed_trained"] > 0.8 > 0.2 > before["closed_trained"]
    assert after["open_heldout"] > before["open_heldout"] + 0.1 and after["closed_heldout"] < 0.4
    assert sft["row_split"]["accuracy"] > after["closed_heldout"] and sft["after"]["qa_accuracy"] > 0.9


def test_thinking_is_not_the_answer():
    thought = '<think>[先想想] 这里有 "[括号]"。</think>\n[{"question": "甲在哪里？", "answer": "花园"}]'
    passage = Passage("d", "甲在花园。", "甲")
    pairs, faults = llm_rows.read_reply(llm_rows.without_thinking(thought), passage)
    assert [pair.answer for pair in pairs] == ["花园"] and not faults
    _, faults = llm_rows.read_reply(llm_rows.without_thinking("<think>还没有想完"), passage)
    assert "思考" in next(iter(faults))
