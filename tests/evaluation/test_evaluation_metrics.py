"""evaluation_metrics.py：一课从头到尾（随机的小模型）、造出来的回答、成对与相关、读者自己的文件、写错了说得清。"""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

import evaluation_metrics as em
import results
import scored_files
from answer_scores import item_scores
from nlp_common.base.errors import UserError
from nlp_common.tiny.judge import judge
from nlp_common.tiny.world import heldout_questions

SCRIPT = Path(em.__file__)


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


ROWS = [
    {
        "id": "a",
        "question": "去了哪里？",
        "prediction": "小刚去了花园。",
        "references": ["小刚去了花园", "花园"],
    },
    {"id": "b", "question": "是什么？", "prediction": "是松鼠", "references": ["松鼠"]},
    {"id": "c", "question": "吃了什么？", "prediction": "", "references": ["香蕉"]},
    {"id": "d", "question": "心情？", "prediction": "很高興", "references": "很高兴"},
]


# ---------------------------------------------------------------- 一课


@pytest.fixture
def chain(monkeypatch, chat_folder):
    """不管要链上的哪个模型，都是那个随机的小模型。"""
    found, load = em.find_answerer, em.load_answerer
    monkeypatch.setattr(em, "find_answerer", lambda name, source="hf": found(str(chat_folder)))
    monkeypatch.setattr(em, "load_answerer", lambda name, source="hf": load(str(chat_folder)))


ARGS = [
    "--preset",
    "tiny",
    "--questions",
    "8",
    "--documents",
    "6",
    "--draws",
    "8",
    "--models",
    "pretrain,sft,dpo",
]


def test_the_whole_lesson(chain, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(em, "NGRAM_DOCUMENTS", 40)
    monkeypatch.setattr(em, "STRIDES", (48, 24))
    arguments = [*ARGS, "--output_dir", str(tmp_path / "out")]
    run = em.main(arguments)
    metrics = run["metrics"]
    perplexity = metrics["perplexity"]
    assert perplexity["averages"]["token_weighted"] == pytest.approx(perplexity["interval"]["value"])
    assert perplexity["grammar"] < perplexity["averages"]["token_weighted"]  # 没训练过的，离下限很远
    averages = perplexity["averages"]
    assert averages["mean_of_perplexities"] >= averages["mean_of_losses"]
    units = perplexity["units"]
    assert units["grammar"]["bits_per_char"]["value"] < units["ngram_char"]["bits_per_char"]["value"]
    assert set(metrics["systems"]) == {
        f"{name}_{how}" for name in ("pretrain", "sft", "dpo") for how in ("greedy", "sampled")
    }
    assert metrics["paired"]["dpo"]["judge"]["value"] == 0.0  # 同一个模型，同一个种子
    assert metrics["traps"]["rouge_l"]["default"] <= metrics["traps"]["rouge_l"]["right"]
    for name in ("stride", "constructed", "correlation", "paradox"):
        assert (tmp_path / "out" / f"{name}.svg").read_text(encoding="utf-8").startswith("<svg")
    found = results.find_results([tmp_path / "out"])
    assert len(found) == 6 and {"judge", "bleu_corpus", "em"} <= set(found[0]["scores"])
    capsys.readouterr()
    assert em.main(arguments)["id"] == run["id"]  # 第二次直接用
    assert "已有训练结果" in capsys.readouterr().out


def test_constructed_answers_are_what_they_say():
    """造出来的五种回答，真的评判给的正是那一级；BLEU 给答错的整句比给有礼的整句高。"""
    wanted = {"courteous": 1.0, "plain": 0.8, "terse": 0.6, "wrong": 0.1, "unhelpful": 0.0}
    for number, question in enumerate(heldout_questions(40, 3)):
        for kind, score in wanted.items():
            assert judge(question, em.constructed(question, kind, number), True).score == score
    found = em.measure_constructed(heldout_questions(40, 3))
    assert found["wrong"]["bleu"] > found["courteous"]["bleu"]
    assert found["courteous"]["judge"] > found["plain"]["judge"]


def test_two_references_turn_the_order():
    question = heldout_questions(1, 0)[0]
    said = em.constructed(question, "courteous", 0)
    one = item_scores(said, [question["sentence"]])
    several = item_scores(said, [question["sentence"], *(o + question["sentence"] for o in em.OPENINGS)])
    assert one["em"] == 0.0 and several["em"] == several["bleu"] == 1.0


def test_correlation_of_the_judge_with_itself():
    """指标就是真的评判，相关是 1；反着来是 −1；重抽的是题。"""
    rng = np.random.default_rng(0)
    truth = rng.choice([0.0, 0.1, 0.6, 0.8, 1.0], size=(30, 4)) + np.array([0, 0.1, 0.2, 0.3])
    both = [np.stack([row, row]) for row in truth]
    against = [np.stack([-row, row]) for row in truth]
    for method in ("pearson", "spearman", "kendall"):
        assert em.over_answers(both, method) == pytest.approx(1.0)
        assert em.over_answers(against, method) == pytest.approx(-1.0)
    assert em.over_systems(both) == pytest.approx(1.0)
    # 与"全部摊平"的 scipy 相同
    from scipy import stats

    noisy = [np.stack([row + rng.normal(0, 0.2, 4), row]) for row in truth]
    flat = np.concatenate([each[0] for each in noisy]), np.concatenate([each[1] for each in noisy])
    assert em.over_answers(noisy, "kendall") == pytest.approx(stats.kendalltau(*flat).statistic)


# ---------------------------------------------------------------- 读者自己的文件


def test_own_file(tmp_path, capsys):
    path = jsonl(tmp_path / "mine.jsonl", ROWS)
    run = em.main(["--preset", "tiny", "--file", path, "--output_dir", str(tmp_path / "out")])
    scores = run["metrics"]["files"]["mine"]["scores"]
    assert scores["em"]["value"] == 0.25 and scores["em"]["n"] == 4
    assert run["metrics"]["files"]["mine"]["empty"] == 1
    assert "1 题是空的" in capsys.readouterr().out
    result = results.read_result(tmp_path / "out" / "results" / "answers--mine.json")
    assert [each["id"] for each in result["items"]] == ["a", "b", "c", "d"]
    assert result["items"][2]["scores"]["rouge_l"] == 0.0
    assert result["scores"]["bleu_corpus"]["n"] == 4


def test_file_changed_under_the_same_name(tmp_path):
    """给了 --output_dir，文件的内容变了：不静悄悄地用旧的。"""
    path = jsonl(tmp_path / "mine.jsonl", ROWS)
    arguments = ["--preset", "tiny", "--file", path, "--output_dir", str(tmp_path / "out")]
    em.main(arguments)
    jsonl(tmp_path / "mine.jsonl", [ROWS[0] | {"prediction": "学校"}, *ROWS[1:]])
    with pytest.raises(UserError, match="file_sha256"):
        em.main(arguments)
    assert em.main([*arguments, "--retrain"])["metrics"]["files"]["mine"]["scores"]["em"]["value"] == 0.0


@pytest.mark.skipif(importlib.util.find_spec("snownlp") is None, reason="繁简的表在 snownlp 里")
def test_traditional_answers(tmp_path):
    path = jsonl(tmp_path / "mine.jsonl", ROWS)
    run = em.main(["--preset", "tiny", "--file", path, "--simplified", "--output_dir", str(tmp_path / "out")])
    assert run["metrics"]["files"]["mine"]["scores"]["em"]["value"] == 0.5


def test_two_files_are_compared_in_pairs(tmp_path):
    """难题两边都难：成对的区间比各自的窄。"""
    rng = np.random.default_rng(0)
    hard = rng.random(80)
    ours, theirs = [], []
    for number in range(80):
        row = {"id": number, "reference": "小刚去了花园"}
        ours.append(row | {"prediction": "小刚去了花园" if hard[number] < 0.6 else "不知道"})
        theirs.append(row | {"prediction": "小刚去了花园" if hard[number] < 0.5 else "不知道"})
    paths = jsonl(tmp_path / "a.jsonl", ours), jsonl(tmp_path / "b.jsonl", theirs)
    arguments = ["--preset", "tiny", "--file", paths[0], "--compare", paths[1]]
    metrics = em.main([*arguments, "--output_dir", str(tmp_path / "out")])["metrics"]
    difference = metrics["difference"]["em"]
    a, b = (metrics["files"][name]["scores"]["em"] for name in ("a", "b"))
    assert difference["value"] == pytest.approx(a["value"] - b["value"]) and difference["low"] > 0
    assert difference["stderr"] < 0.5 * np.hypot(a["stderr"], b["stderr"])


@pytest.mark.parametrize(
    ("rows", "more", "message"),
    [
        ([{"text": "好", "reference": "好"}], [], "不知道哪一栏是回答"),
        ([{"prediction": "好"}], [], "不知道哪一栏是标准答案"),
        ([ROWS[0], {"id": "x", "references": ["花园"]}], [], "第 2 行没有 prediction"),
        ([ROWS[0], ROWS[1] | {"references": []}], [], "第 2 行的 references 是空的"),
        ([ROWS[0], ROWS[1] | {"references": ["花园", " "]}], [], "第 2 行的 references 是空的"),
        ([ROWS[0] | {"prediction": ["花园"]}], [], "第 1 行的 prediction 要是一段文字"),
        ([ROWS[0], ROWS[0]], [], "id a 出现了 2 次"),
        ([ROWS[0]], ["--reference_field", "right"], "没有 right 这一栏（--reference_field）"),
        ([ROWS[0]], ["--prediction_field", "references"], "不能既是回答又是标准答案"),
    ],
)
def test_faults_of_files_are_named(tmp_path, rows, more, message):
    path = jsonl(tmp_path / "bad.jsonl", rows)
    with pytest.raises(UserError) as error:
        em.main(["--preset", "tiny", "--file", path, "--output_dir", str(tmp_path / "out"), *more])
    assert message in str(error.value)


def test_names_of_two_files(tmp_path):
    one, other = tmp_path / "x", tmp_path / "y"
    assert scored_files.labels_of(["p/a.jsonl", "b.jsonl"]) == ["a", "b"]
    assert scored_files.labels_of(["a.jsonl", "a.csv"]) == ["a.jsonl", "a.csv"]
    assert scored_files.labels_of([str(one / "a.jsonl"), str(other / "a.jsonl")]) == [
        "x_a.jsonl",
        "y_a.jsonl",
    ]
    deep = [str(one / "z" / "a.jsonl"), str(other / "z" / "a.jsonl")]
    assert scored_files.labels_of(deep) == ["a_a.jsonl", "b_a.jsonl"]
    with pytest.raises(UserError, match="同一个文件"):
        scored_files.labels_of(["a.jsonl", "./a.jsonl"])


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (ROWS[:3], "4 题"),
        ([*ROWS[:2], ROWS[3], ROWS[2]], "第 3 题的 id"),
        ([ROWS[0] | {"references": ["学校"]}, *ROWS[1:]], "第 1 题（id a）的标准答案"),
        ([row | {"question": "别的题"} for row in ROWS], "第 1 题，"),
    ],
)
def test_only_the_same_questions_are_compared(tmp_path, other, message):
    paths = jsonl(tmp_path / "a.jsonl", ROWS), jsonl(tmp_path / "b.jsonl", other)
    with pytest.raises(UserError) as error:
        em.main(
            [
                "--preset",
                "tiny",
                "--file",
                paths[0],
                "--compare",
                paths[1],
                "--output_dir",
                str(tmp_path / "o"),
            ]
        )
    assert message in str(error.value)


def test_questions_in_the_training_data(tmp_path, capsys):
    rows = [row | {"question": f"第{row['id']}题：小刚在花园里看见了什么动物？"} for row in ROWS]
    path = jsonl(tmp_path / "mine.jsonl", rows)
    train = jsonl(
        tmp_path / "train.jsonl", [{"text": "松鼠"}, {"text": "问：" + rows[1]["question"] + "答：松鼠"}]
    )
    arguments = ["--preset", "tiny", "--file", path, "--output_dir", str(tmp_path / "out")]
    metrics = em.main([*arguments, "--check_contamination", train])["metrics"]
    assert metrics["contamination"]["contaminated"] > 0
    [result] = (tmp_path / "out" / "results").glob("*.json")
    assert [row["scores"]["contaminated"] for row in json.loads(result.read_text("utf-8"))["items"]].count(
        1.0
    )
    assert "train.jsonl 第 2 行" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--file", "nowhere.jsonl"], "没有 --file 给的文件：nowhere.jsonl"),
        (["--file", SCRIPT.parent.as_posix()], "要一个文件"),
        (["--compare", SCRIPT.as_posix()], "要与 --file 一起给"),
        (["--reference_field", "answer"], "要与 --file 一起给"),
        (["--order", "差,好"], "要与 --ratings 一起给"),
        (["--file", SCRIPT.as_posix(), "--ratings", SCRIPT.as_posix()], "一次只给一个"),
        (["--questions", "0"], "--questions 要是正整数"),
        (["--models", "sft,sft"], "写了不止一次"),
        (["--models", "reward"], "不会说话"),
    ],
)
def test_faults_of_arguments(arguments, message):
    with pytest.raises(UserError) as error:
        em.main(["--preset", "tiny", *arguments])
    assert message in str(error.value)


# ---------------------------------------------------------------- 读者自己的文字


def test_own_text(tmp_path, chat_folder):
    """一篇比窗口长、一篇短；每字比特 = 总的信息量 ÷ 字数，与逐 token 的损失对得上。"""
    import torch

    from nlp_common.lm.chatml import encode_text
    from nlp_common.lm.loading import load_plain_lm

    texts = ["小刚去了花园，松鼠跑了过来。" * 3, "傍晚，小兰来到海边。"]
    (tmp_path / "two.txt").write_text("\n\n".join(texts), encoding="utf-8")
    arguments = ["--preset", "tiny", "--text", str(tmp_path / "two.txt"), "--models", str(chat_folder)]
    run = em.main([*arguments, "--output_dir", str(tmp_path / "out"), "--window", "512"])
    found = run["metrics"]["models"]["chat"]
    tokenizer, model = load_plain_lm(str(chat_folder))
    model.eval()
    total = chars = tokens = 0.0
    for text in texts:
        ids = torch.tensor([encode_text(tokenizer, text)])
        with torch.no_grad():
            loss = model(input_ids=ids, labels=ids).loss.item()
        total += loss * (ids.shape[1] - 1)
        tokens += ids.shape[1] - 1
        chars += len(text) - len(tokenizer.decode(ids[0, :1]))
    assert found["perplexity"]["value"] == pytest.approx(np.exp(total / tokens), rel=1e-5)
    assert found["bits_per_char"]["value"] == pytest.approx(total / chars / np.log(2), rel=1e-5)
    narrow = em.main([*arguments, "--output_dir", str(tmp_path / "narrow"), "--window", "8"])
    assert narrow["metrics"]["models"]["chat"]["window"] == 8
    result = results.read_result(tmp_path / "out" / "results" / "text--chat.json")
    assert result["scores"]["perplexity"]["value"] == found["perplexity"]["value"]  # 不是各篇的平均


def test_texts_without_words_are_named(tmp_path):
    path = jsonl(tmp_path / "t.jsonl", [{"text": "好"}, {"text": " "}])
    with pytest.raises(UserError, match="第 2 行没有文字"):
        em.main(["--preset", "tiny", "--text", path, "--output_dir", str(tmp_path / "out")])


def test_references_of_many_shapes():
    assert scored_files.as_references("花园", "") == ["花园"]
    assert scored_files.as_references({"text": ["花园", "园"], "answer_start": [1, 2]}, "") == ["花园", "园"]
    assert scored_files.as_references([{"text": "花园"}, {"text": "花园"}], "") == ["花园"]
    assert scored_files.as_references(35, "") == ["35"]


def test_ratings_in_a_fresh_folder(tmp_path, monkeypatch, capsys):
    """在空文件夹里，相对路径：打分表从头到尾。"""
    monkeypatch.chdir(tmp_path)
    table = tmp_path / "ratings.csv"
    table.write_text("item,甲,乙,丙\n1,5,4,5\n2,3,3,2\n3,1,1,2\n4,,2,2\n", encoding="utf-8")
    em.main(["--preset", "tiny", "--ratings", "ratings.csv", "--output_dir", "out"])
    said = capsys.readouterr().out
    assert "Krippendorff α，次序" in said and "有缺的，不能算" in said
    metrics = json.loads((tmp_path / "out" / "run.json").read_text(encoding="utf-8"))["metrics"]
    assert metrics["alpha"]["ordinal"]["n"] == 4 and set(metrics["without"]) == {"甲", "乙", "丙"}
