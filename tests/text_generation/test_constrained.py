"""constrained_decoding.py：合法 0 → 100%；自己的 schema、文法；写错的参数；两边的掩码花多久。"""

import json

import pytest

import constrained_decoding as cd
from nlp_common.base.errors import UserError


def test_the_lesson(tmp_path, capsys, chat_folder):
    """随机的模型从不写 JSON；加上约束，各种形式全部合法。"""
    arguments = [
        "--preset",
        "tiny",
        "--model",
        str(chat_folder),
        "--n_prompts",
        "2",
        "--max_new_tokens",
        "150",
    ]
    record = cd.main([*arguments, "--temperature", "1.0", "--output_dir", str(tmp_path / "out")])
    metrics = record["metrics"]
    assert metrics["valid_before"] < 0.2 and metrics["valid"] == 1.0
    assert metrics["whitespace_lover_valid"] == 1.0
    assert metrics["mask_ms"] < 0.6
    assert (tmp_path / "out" / "allowed.svg").exists()
    capsys.readouterr()
    cd.main([*arguments, "--temperature", "1.0", "--output_dir", str(tmp_path / "out")])
    assert "直接加载" in capsys.readouterr().out


def test_own_schema_and_grammar(tmp_path, chat_folder):
    schema = tmp_path / "s.json"
    schema.write_text(
        '{"type": "object", "properties": {"城": {"enum": ["京", "沪"]}}, "required": ["城"]}', "utf-8"
    )
    common = ["--preset", "tiny", "--model", str(chat_folder), "--prompt", "去哪里？"]
    answer = cd.main([*common, "--schema", str(schema)])["answer"]
    assert json.loads(answer)["城"] in ("京", "沪")
    grammar = tmp_path / "g.gbnf"
    grammar.write_text('root ::= ("东" | "西") [0-9]{2}', "utf-8")
    answer = cd.main([*common, "--grammar", str(grammar)])["answer"]
    assert answer[0] in "东西" and answer[1:].isdecimal() and len(answer) == 3


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("s.json", "{", "第 1 行不是合法的 JSON"),
        ("s.json", '{"type": "text"}', "'text' 不认识"),
        ("s.json", '{"items": ' * 3000 + "{}" + "}" * 3000, "套得太深"),
        ("g.gbnf", "root ::= x", "没有定义"),
        ("g.gbnf", "root ::= " + "(" * 3000 + '"a"' + ")" * 3000, "套得太深"),
        ("g.gbnf", 'root ::= "a"{300}', "--max_new_tokens"),
    ],
)
def test_bad_files(tmp_path, chat_folder, name, text, said):
    file = tmp_path / name
    file.write_text(text, encoding="utf-8")
    flag = "--schema" if name.endswith("json") else "--grammar"
    with pytest.raises(UserError, match=said):
        cd.main(["--preset", "tiny", "--model", str(chat_folder), "--prompt", "问", flag, str(file)])


def test_a_prompt_longer_than_the_context(tmp_path, chat_folder):
    file = tmp_path / "g.gbnf"
    file.write_text('root ::= "a"', encoding="utf-8")
    with pytest.raises(UserError, match="把 --prompt 改短"):
        cd.main(
            ["--preset", "tiny", "--model", str(chat_folder), "--prompt", "问" * 900, "--grammar", str(file)]
        )


def test_bad_arguments(tmp_path, chat_folder):
    with pytest.raises(UserError, match="--prompt 要配"):
        cd.main(["--preset", "tiny", "--prompt", "问"])
    for folder, said in ((tmp_path, "它是一个文件夹"), (tmp_path / "没有.json", "没有这个文件")):
        with pytest.raises(UserError, match=said):
            cd.main(["--preset", "tiny", "--prompt", "问", "--schema", str(folder)])
    with pytest.raises(UserError, match="只能给一个"):
        cd.main(["--preset", "tiny", "--prompt", "问", "--schema", "a", "--grammar", "b"])
    with pytest.raises(UserError, match="读不了"):
        missing = ["--schema", str(tmp_path / "没有.json")]
        cd.main(["--preset", "tiny", "--model", str(chat_folder), "--prompt", "问", *missing])


def test_arithmetic_is_judged_by_python():
    assert cd.is_arithmetic("(1+2)*3") and not cd.is_arithmetic("1/2")
    assert not cd.is_arithmetic("f(1)") and not cd.is_arithmetic("1 + 2") and not cd.is_arithmetic("")
