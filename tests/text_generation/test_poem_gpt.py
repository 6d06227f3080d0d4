"""poem_gpt.py：字音表、语法、尺子、约束；写错的参数；整课走一遍，中断了接着走。"""

import json
import math

import pytest
import torch

import poem_data
import poem_gpt as pg
import poem_grammar as grammar
import poem_sounds as sounds
from char_gpt import char_tokenizer, small_gpt
from nlp_common.base.errors import UserError
from nlp_common.tiny.world import Draw

ENTERING = set("独竹白石昨隔蝶一夕笛菊曲")  # 今天读一、二声的入声字，旧诗里是仄
TWO_READINGS = set("长还塞朝过观中空疏片")  # 多音字：诗里用的音不一定是最常见的


def grammar_chars() -> set[str]:
    words = [word for words in grammar.WORDS.values() for word in words]
    return set("".join(words))


def test_every_character_of_the_grammar_has_one_sound():
    assert grammar_chars() <= set(sounds.TONES)
    every = "".join(side for sides in sounds.SOUNDS.values() for side in sides)
    assert len(every) == len(set(every))


def test_sounds_agree_with_pypinyin():
    pypinyin = pytest.importorskip("pypinyin", reason="没有装 pypinyin")
    for char in grammar_chars() - TWO_READINGS:
        syllable = pypinyin.lazy_pinyin(char, style=pypinyin.Style.TONE3)[0]
        tone = sounds.PING if syllable[-1] in "12" and char not in ENTERING else sounds.ZE
        assert sounds.TONES[char] == tone, (char, syllable)
        assert sounds.RHYMES[char] == sounds.rhyme_of_pinyin(syllable.rstrip("12345")), (char, syllable)


def test_rhymes_of_other_characters_come_from_snownlp():
    found = {char: sounds.rhyme_of(char) for char in "風開詩略绿居月是云"}
    assert found == dict(
        zip("風開詩略绿居月是云", ["庚", "开", "支", "皆", "齐", "齐", "皆", "支", "文"], strict=True)
    )
    assert sounds.rhyme_of("，") is None


def test_the_grammar_keeps_its_own_rules():
    rows = grammar.poems(400, 0)
    assert {row["kind"] for row in rows} == set(grammar.KINDS)
    found = poem_data.measure(rows, [], sounds.TONES)
    assert found["length_kept"] == found["metre_kept"] == found["rhyme_kept"] == found["parallel_kept"] == 1.0
    assert poem_data.random_rhyme(rows) < 0.3
    for row in rows:
        if row["kind"].endswith("绝"):  # 押韵的字不重复
            ends = [line[-1] for line in poem_data.lines_of(row["text"])]
            assert len({ends[1], ends[3]}) == 2


def test_train_and_heldout_never_share_a_poem():
    train = {row["text"] for row in grammar.poems(500, 0)}
    assert not train & {row["text"] for row in grammar.poems(500, 1, heldout=True)}


def test_the_nats_are_exact():
    """一句的全部写法数一遍：概率加起来是 1，没有两条路写出同一句，所以 nats 就是 −ln p。"""

    class Every:  # 像 Draw，却照着给定的选择走，走过的都记下来
        def __init__(self, path):
            self.path, self.sizes = list(path), []

        def pick(self, options):
            self.sizes.append(len(options))
            return options[self.path[len(self.sizes) - 1] if len(self.sizes) <= len(self.path) else 0]

    for form, rhyme in (("乙", "微"), ("丁", "尤")):
        found: dict[str, float] = {}
        path: list[int] = []
        while True:
            draw = Every(path)
            text, _ = grammar.write_line(draw, form, 5, rhyme, "")
            assert text not in found
            found[text] = 1 / math.prod(draw.sizes)
            path = (path + [0] * len(draw.sizes))[: len(draw.sizes)]
            while path and path[-1] + 1 == draw.sizes[len(path) - 1]:
                path.pop()
            if not path:
                break
            path[-1] += 1
        assert sum(found.values()) == pytest.approx(1.0)
    import random

    draw = Draw(random.Random(0))
    text, _ = grammar.write_line(draw, "丁", 5, "尤", "")
    assert draw.nats == pytest.approx(-math.log(found[text]))


def test_the_rulers_by_hand():
    good = {"kind": "五绝", "text": "白日依山尽，黄河入海流。欲穷千里目，更上一层楼。"}
    assert poem_data.length_kept(good) and poem_data.rhymes(good)
    assert not poem_data.rhymes(good | {"text": good["text"].replace("楼", "山")})
    assert not poem_data.length_kept(good | {"text": good["text"].replace("目", "")})
    tones = dict(
        zip(
            "白日依山尽黄河入海流欲穷千里目更上一层楼",
            "仄仄平平仄平平仄仄平仄平平仄仄仄仄仄平平",
            strict=True,
        )
    )
    assert poem_data.metre_kept(good, tones)
    assert not poem_data.metre_kept(good, tones | {"山": "仄"})
    assert poem_data.copied_share(["春眠不觉晓，处处闻啼鸟。"], ["春眠不觉晓，夜来风雨声。"]) == 0.5
    assert poem_data.copied_share(["两个黄鹂鸣翠柳"], ["两个黄鹂鸣"]) == pytest.approx(1 / 3)
    assert poem_data.distinct(["春春春，"], 2) == 0.5


def test_tones_are_learnt_from_strains():
    tones = sounds.learn_tones([("春看", "平平"), ("看花", "仄平"), ("雨缺", "仄○")])
    assert tones == {"春": "平", "花": "平", "雨": "仄"}


@pytest.fixture(scope="module")
def untrained():
    rows = grammar.poems(300, 0)
    tokenizer = char_tokenizer([row["text"] for row in rows], [f"<{kind}>" for kind in grammar.KINDS])
    torch.manual_seed(0)
    return tokenizer, small_gpt(tokenizer, 64, 32, 1).eval()


@pytest.fixture
def settings():
    return pg.PoemSettings(max_length=64, dim=32, layers=1, dataset="grammar")


@pytest.mark.parametrize("kind", list(grammar.KINDS))
def test_constraints_hold_whatever_the_model_says(untrained, settings, kind):
    """没训练过的模型也写得合律：保证来自约束，不来自模型。"""
    tokenizer, model = untrained
    found = pg.write(model, tokenizer, kind, 12, settings, pg.Rules(tokenizer, sounds.TONES))
    measured = poem_data.measure(found, [], sounds.TONES)
    assert measured["length_kept"] == measured["metre_kept"] == 1.0
    assert measured.get("rhyme_kept", 1.0) == 1.0
    free = pg.write(model, tokenizer, kind, 12, settings, None)
    assert poem_data.measure(free, [], sounds.TONES)["metre_kept"] == 0.0


def test_acrostics(untrained, settings):
    tokenizer, model = untrained
    rules = pg.Rules(tokenizer, sounds.TONES)
    for kind, heads in (("五绝", "春江花月"), ("七绝", "风雨江山"), ("七联", "春秋")):
        found = pg.acrostic(model, tokenizer, heads, kind, settings, rules, tries=6)
        for poem in found:
            assert "".join(line[0] for line in poem_data.lines_of(poem["text"])) == heads
            assert poem_data.length_kept(poem)
        assert [p["nats_per_char"] for p in found] == sorted(p["nats_per_char"] for p in found)
    with pytest.raises(UserError, match="饕"):
        pg.acrostic(model, tokenizer, "春江饕月", "五绝", settings, rules)


def test_reading_the_npm_package(tmp_path):
    poems, strains = tmp_path / "dist" / "quantangshi", tmp_path / "dist" / "strains" / "json"
    poems.mkdir(parents=True)
    strains.mkdir(parents=True)
    lines = ["白日依山盡，黃河入海流。", "欲窮千里目，更上一層樓。"]
    octave = [f"甲甲甲甲{c}，乙乙乙乙{c}。" for c in "天地玄黃"]
    broken = ["□日依山盡，黃河入海流。", "欲窮千里目，更上一層樓。"]
    rows = [{"id": str(i), "paragraphs": each} for i, each in enumerate([lines, octave, broken])]
    (poems / "poet.tang.0.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    strain = [{"id": "0", "strains": ["仄仄平平仄，平平仄仄平。", "仄平平仄仄，仄仄仄平平。"]}]
    (strains / "poet.tang.0.json").write_text(json.dumps(strain, ensure_ascii=False), encoding="utf-8")
    found, tones, source = poem_data.tang_poems(tmp_path)
    assert [row["text"] for row in found] == [
        "白日依山盡，黃河入海流。欲窮千里目，更上一層樓。",
        "甲甲甲甲地，乙乙乙乙地。",
        "甲甲甲甲玄，乙乙乙乙玄。",
    ]
    assert tones["白"] == "仄" and tones["流"] == "平" and len(source["sha256"]) == 64
    assert poem_data.rhymes(found[0])  # 繁体的韵也查得到


def test_own_texts(tmp_path):
    path = tmp_path / "诗.txt"
    path.write_text("".join(row["text"] + "\n" for row in grammar.poems(60, 0)), encoding="utf-8")
    train, heldout, _, _ = poem_data.load_poems(str(path), 1000, 10, 0)
    assert {row["kind"] for row in train} == set(grammar.KINDS)
    assert not {row["text"] for row in train} & {row["text"] for row in heldout}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--heads", "春江花"], "--heads"),
        (["--dim", "30"], "--dim"),
        (["--dim", "0"], "--dim"),
        (["--layers", "0"], "--layers"),
        (["--n_poems", "0"], "--n_poems"),
        (["--max_length", "20"], "--max_length 至少 34"),
        (["--temperature", "0"], "--temperature"),
        (["--dataset", "没有.txt"], "没有.txt"),
    ],
)
def test_bad_input(tmp_path, arguments, said):
    with pytest.raises(UserError, match=said):
        pg.main(["--preset", "tiny", "--output_dir", str(tmp_path / "out"), *arguments])


def test_too_few_poems(tmp_path):
    path = tmp_path / "few.txt"
    path.write_text("白日依山尽，黄河入海流。\n", encoding="utf-8")
    with pytest.raises(UserError, match="至少要 20 首"):
        pg.main(["--preset", "tiny", "--dataset", str(path), "--output_dir", str(tmp_path / "out")])


SMALL = ["--preset", "tiny", "--dataset", "grammar", "--max_train_samples", "128", "--num_train_epochs", "1"]
SMALL += ["--n_poems", "4", "--dim", "32", "--layers", "1"]


def test_a_small_lesson_and_the_second_run(tmp_path, capsys):
    record = pg.main([*SMALL, "--output_dir", str(tmp_path / "out")])
    metrics = record["metrics"]
    assert metrics["heldout_loss"] > metrics["loss_floor"] > 1
    assert metrics["constrained"]["metre_kept"] == metrics["heldout"]["rhyme_kept"] == 1.0
    assert {"copied_share", "distinct_2"} <= set(metrics)
    assert (tmp_path / "out" / "poems.svg").exists()
    capsys.readouterr()
    pg.main([*SMALL, "--output_dir", str(tmp_path / "out"), "--heads", "山明水月"])
    shown = capsys.readouterr().out
    assert "直接加载" in shown and "藏头“山明水月”" in shown


def results(record: dict) -> dict:
    """指标里除了快慢的。"""
    return {name: value for name, value in record["metrics"].items() if not name.startswith("train_")}


def test_interrupted_it_ends_the_same(tmp_path, monkeypatch, capsys):
    """训练到一半被打断，同一条命令接着来：与一口气训练完的逐位相同。"""
    arguments = [*SMALL, "--per_device_train_batch_size", "8", "--save_steps", "3"]
    whole = pg.main([*arguments, "--output_dir", str(tmp_path / "whole")])
    original, calls = pg.next_token_loss, []

    def interrupted(model, batch):
        calls.append(1)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return original(model, batch)

    monkeypatch.setattr(pg, "next_token_loss", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pg.main([*arguments, "--output_dir", str(tmp_path / "cut")])
    assert not (tmp_path / "cut").exists()
    capsys.readouterr()
    again = pg.main([*arguments, "--output_dir", str(tmp_path / "cut")])
    assert "接着上次的检查点继续" in capsys.readouterr().out and len(calls) < 8 + 16
    assert results(again) == results(whole) and again["id"] == whole["id"]
