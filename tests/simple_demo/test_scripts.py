"""像读者那样运行：把文件夹拷到别处，敲 python 脚本名；再试各种写错的参数。"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import minimal_word_embedding_train as words
import rnn_text_classifier as rnn
import simple_sentiment_classifier as mean
import transformer_encoder_classifier as built_in
import transformer_sentiment_classification as hand

FOLDER = Path(words.__file__).parent
CLASSIFIERS = [mean, rnn, hand, built_in]
SCRIPTS = [words, *CLASSIFIERS]
NAMES = [Path(script.__file__).name for script in SCRIPTS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    copy = tmp_path_factory.mktemp("读者 的文件夹") / "simple_demo"  # 中文和空格是读者常有的
    shutil.copytree(FOLDER, copy, ignore=shutil.ignore_patterns("outputs", "__pycache__"))
    return copy


def run(folder, *arguments):
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, encoding="utf-8", timeout=120)


@pytest.fixture(scope="module")
def outputs(folder):
    """五个脚本各运行一次：{文件名: 终端上的字}。"""
    found = {}
    for name in NAMES:
        done = run(folder, name)
        assert done.returncode == 0 and done.stderr == "", f"{name}\n{done.stderr}"
        found[name] = done.stdout
    return found


@pytest.mark.parametrize("script", SCRIPTS, ids=NAMES)
def test_loss_is_the_one_the_docstring_promises(outputs, script):
    printed = [
        float(x) for x in re.findall(r"epoch +\d+ +loss ([\d.]+)", outputs[Path(script.__file__).name])
    ]
    first, last = map(float, re.search(r"loss.*?从 ([\d.]+) 降到 ([\d.]+\d)", script.__doc__).groups())
    assert len(printed) >= 6
    assert printed[0] == pytest.approx(first, abs=0.0005)
    run_end = printed[len(printed) // 2 - 1] if script is rnn else printed[-1]  # RNN 后面还有取平均的那一次
    assert run_end == pytest.approx(last, rel=0.1, abs=0.0001)


def test_word_embedding_shows_vocabulary_vectors_and_similarity(outputs, folder):
    text = outputs[NAMES[0]]
    vectors = re.findall(r"^ +\d+ (\w+) +((?: *-?\d+\.\d\d){8})", text, re.M)
    assert len(vectors) == 20 and dict(vectors).keys() >= {"cats", "dogs", "cars"}
    before, after = map(float, re.search(r"cats - dogs +(\S+) +(\S+)", text).groups())
    top = float(re.search(r"不相关的词.*：(-?[\d.]+)", text)[1])
    assert (before, after, top) == pytest.approx((-0.57, 0.99, 0.29), abs=0.02)
    assert is_picture(folder / "outputs" / "word_embedding.png")


def test_classifiers_show_probabilities_for_known_and_unseen_sentences(outputs):
    for script, name in zip(CLASSIFIERS, NAMES[1:], strict=True):
        if script is rnn:
            rows = re.findall(r"it is \w+ not \w+ +(正面|负面) +([\d.]+)", outputs[name])
            assert len(rows) == 8
            assert all((float(p) > 0.99) == (label == "正面") for label, p in rows)
            assert "RNN 判对 8/8" in outputs[name] and "取平均 判对 4/8" in outputs[name]
        else:
            for sentence, label in zip(
                script.TEST_SENTENCES, (1, 0, 1 if script is mean else 0), strict=True
            ):
                found = re.search(rf"'{sentence}' +→ (正面|负面).*?([\d.]+)", outputs[name])
                assert found[1] == ("负面", "正面")[label] and (float(found[2]) > 0.5) == label


def test_padding_demonstrations(outputs):
    for name in ("simple_sentiment_classifier.py", "rnn_text_classifier.py"):
        rows = re.findall(r"补 +(\d+) 个：\D*(\d+) 句\D*(\d+) 句", outputs[name])
        assert [(int(count), int(right)) for count, right, _ in rows] == [(0, 0), (3, 0), (30, 0)]
        assert int(rows[-1][2]) > 0  # 常见的错误写法真的会错


def test_attention_heat_map(outputs, folder):
    rows = re.findall(r"^ {4}(\w+) +((?:\d\.\d\d .? *){4})$", outputs[NAMES[3]], re.M)
    assert [word for word, _ in rows[:3]] == ["i", "love", "this"]
    weights = [[float(x) for x in re.findall(r"\d\.\d\d", row)] for _, row in rows]
    assert all(sum(row) == pytest.approx(1, abs=0.021) for row in weights)
    assert weights[0][1] > 0.9 and all(row[3] == 0 for row in weights[:3])  # 第四格是 <PAD>
    assert is_picture(folder / "outputs" / "attention.png")


def test_pytorch_table_agrees(outputs):
    gaps = re.findall(r"\) +(\d\.\d)e-(\d\d) ", outputs[NAMES[4]])
    assert len(gaps) == 8 and all(int(power) >= 7 for _, power in gaps)
    trained, evaluated = (
        re.search(rf"{mode}\(\).*?  ([-\d. ]+)$", outputs[NAMES[4]], re.M)[1].split()
        for mode in ("train", "eval")
    )
    assert len(set(trained)) == 3 and len(set(evaluated)) == 1  # dropout 开着，三次三个样


def is_picture(path):
    import matplotlib.image

    picture = matplotlib.image.imread(path)
    return picture.shape[0] > 300 and picture.shape[1] > 600 and picture.std() > 0.05


def error_of(script, monkeypatch, *arguments):
    """脚本对读者说的话。SystemExit 里是一句话，所以不会有 traceback。"""
    monkeypatch.setattr(sys, "argv", ["script.py", *arguments])
    monkeypatch.setattr(script, "train", lambda *args, **options: pytest.fail("应当在训练前就说"))
    with pytest.raises(SystemExit) as caught:
        script.main()
    assert isinstance(caught.value.code, str) and caught.value.code.startswith("错误：")
    return caught.value.code


@pytest.mark.parametrize("script", CLASSIFIERS, ids=NAMES[1:])
def test_bad_sentences(script, monkeypatch):
    message = error_of(script, monkeypatch, "--text", "zebra is good")
    assert "zebra" in message and "没有学过" in message and "可以用的词" in message and "good" in message
    assert "zebra" in error_of(script, monkeypatch, "--text", "good", "--text", "zebra")
    empty = error_of(script, monkeypatch, "--text", "   ")
    assert "空" in empty or "0 个" in empty
    if script is not mean:
        assert "9 个" in error_of(script, monkeypatch, "--text", "good " * 9)


@pytest.mark.parametrize("script", CLASSIFIERS, ids=NAMES[1:])
def test_label_out_of_range(script, monkeypatch):
    monkeypatch.setattr(script, "DATA", [*script.DATA, ("this is good", 2)])
    message = error_of(script, monkeypatch)
    assert "'this is good' 的标签是 2" in message and "0（负面）或 1（正面）" in message


@pytest.mark.parametrize("script", SCRIPTS, ids=NAMES)
@pytest.mark.parametrize("seed", ["-1", "abc", "1.5", "", "9" * 30])
def test_bad_seed(script, seed, monkeypatch):
    assert f"--seed 要一个 0 以上的整数，现在是 {seed!r}" in error_of(script, monkeypatch, "--seed", seed)


@pytest.mark.parametrize("script", SCRIPTS, ids=NAMES)
def test_seed_is_an_integer(script):
    assert script.seed_number("3") == 3 and script.seed_number("9" * 18) == 10**18 - 1


@pytest.mark.parametrize("script", SCRIPTS, ids=NAMES)
@pytest.mark.parametrize("arguments", [["--seed"], ["--sed3", "3"], ["--seed", "-x"], ["3"]])
def test_argparse_speaks_chinese_too(script, arguments, monkeypatch):
    assert "参数不对" in error_of(script, monkeypatch, *arguments)


def test_one_word_is_not_a_pair(monkeypatch):
    assert "参数不对" in error_of(words, monkeypatch, "--words", "cats")


def test_unknown_word_for_the_embedding(monkeypatch):
    message = error_of(words, monkeypatch, "--words", "cats", "zebra")
    assert "'zebra' 不在词表里" in message and "dogs" in message


def test_what_the_reader_sees_of_an_error(folder):
    for arguments in (["--text", "zebra is good"], ["--sed3", "3"]):
        done = run(folder, "rnn_text_classifier.py", *arguments)
        assert done.returncode == 1 and done.stdout == ""
        assert done.stderr.startswith("错误：") and done.stderr.count("\n") == 1


def test_capital_letters_are_fine(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["script.py", "--text", "I LOVE this"])
    mean.main()
    assert re.search(r"'I LOVE this' +→ 正面", capsys.readouterr().out)


@pytest.mark.parametrize("script", [words, hand], ids=["words", "hand"])
def test_no_picture_is_said_and_is_no_failure(script, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["script.py"])
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(script, "OUTPUT_DIR", tmp_path / "file" / "outputs")  # 建不了的文件夹
    script.main()
    assert "没有画成图" in capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # 没装 matplotlib
    script.main()
    assert "pip install matplotlib" in capsys.readouterr().out
