"""mc_tasks.py、mc_templates.py：任务 yaml 的 include、本地的题、例题；!function 不运行；写错了说出是哪个文件的哪一行。"""

import json

import pytest

from mc_tasks import build_items, load_task, skipped_metrics
from nlp_common.base.errors import UserError

ROWS = [
    {"q": "小刚去了哪里？", "options": ["花园", "海边"], "label": 1},
    {"q": "谁来了？", "options": ["王伯", "李婶"], "label": 0},
]
TASK = """task: mine
dataset_path: json
dataset_kwargs: {data_files: {test: rows.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{q}}答："
doc_to_choice: options
doc_to_target: label
"""


@pytest.fixture
def folder(tmp_path):
    write_rows(tmp_path, ROWS)
    (tmp_path / "task.yaml").write_text(TASK, encoding="utf-8")
    return tmp_path


def write_rows(folder, rows):
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / "rows.jsonl").write_text(text, encoding="utf-8")


def change(folder, old: str, new: str):
    (folder / "task.yaml").write_text(TASK.replace(old, new), encoding="utf-8")
    return load_task(folder / "task.yaml")


def test_files_lie_beside_the_task(folder):
    items = build_items(load_task(folder / "task.yaml"))
    assert [(each.ask.context, each.ask.continuations, each.gold) for each in items] == [
        ("小刚去了哪里？答：", [" 花园", " 海边"], [1]),
        ("谁来了？答：", [" 王伯", " 李婶"], [0]),
    ]


def test_included_files_come_first(folder):
    (folder / "base.yaml").write_text(TASK.replace("task: mine\n", "target_delimiter: X\n"), encoding="utf-8")
    (folder / "more.yaml").write_text("include: base.yaml\ntask: b\ntarget_delimiter: ''\n", encoding="utf-8")
    items = build_items(load_task(folder / "more.yaml"))
    assert items[0].ask.continuations == ["花园", "海边"]


def test_several_right_answers(folder):
    items = build_items(change(folder, "doc_to_target: label", "doc_to_target: '[0, 1]'"))
    assert items[0].gold == [0, 1]


def test_a_local_copy_replaces_the_hub(folder):
    """任务写的是 hub 上的名字，题在本地有一份。"""
    task = change(
        folder, "dataset_path: json\ndataset_kwargs: {data_files: {test: rows.jsonl}}", "dataset_path: a/b"
    )
    assert len(build_items(task, dataset=str(folder / "rows.jsonl"))) == 2
    for number, where in enumerate(
        ("test.jsonl", "data/test-00000-of-00001.jsonl", "law_test.jsonl", "test/law.jsonl")
    ):
        copy = folder / str(number)
        (copy / where).parent.mkdir(parents=True)
        (copy / where).write_bytes((folder / "rows.jsonl").read_bytes())
        assert len(build_items(task | {"dataset_name": "law"}, dataset=str(copy))) == 2
    with pytest.raises(UserError, match=r"里没有 dev 这一份；里面有：test\.jsonl"):
        build_items(task | {"test_split": "dev"}, dataset=str(folder / "0"))
    with pytest.raises(UserError, match="没有 --dataset"):
        build_items(task, dataset=str(folder / "none"))


def test_lm_evals_own_ceval_task_reads_a_local_folder(tmp_path):
    """lm_eval 自带的 C-Eval 任务文件原样能用，只要题在本地。"""
    tasks = pytest.importorskip("lm_eval.tasks", reason='用它自带的任务文件：pip install -e ".[evaluation]"')
    from pathlib import Path

    for split, n in (("val", 3), ("dev", 5)):
        rows = "".join(f"{i},{split}题{i},甲{i},乙,丙,丁,{'ABCD'[i % 4]}\n" for i in range(n))
        (tmp_path / f"{split}.csv").write_text("id,question,A,B,C,D,answer\n" + rows, encoding="utf-8")
    path = Path(tasks.__file__).parent / "ceval" / "ceval-valid_law.yaml"
    task = load_task(path)
    items = build_items(task, shots=2, dataset=str(tmp_path))
    assert [each.gold for each in items] == [[0], [1], [2]]
    assert items[0].ask.context == (
        "以下是中国关于法学的单项选择题，请选出其中的正确答案。\n\n"
        "dev题0\nA. 甲0\nB. 乙\nC. 丙\nD. 丁\n答案： A\n\ndev题1\nA. 甲1\nB. 乙\nC. 丙\nD. 丁\n答案： B\n\n"
        "val题0\nA. 甲0\nB. 乙\nC. 丙\nD. 丁\n答案："
    )
    assert skipped_metrics(task) == []


def test_code_in_a_task_is_not_run(folder):
    (folder / "utils.py").write_text("raise SystemExit('运行了')", encoding="utf-8")
    with pytest.raises(UserError, match=r"task\.yaml 第 6 行是 !function utils\.text：它要运行"):
        change(folder, 'doc_to_text: "{{q}}答："', "doc_to_text: !function utils.text")


def test_templates_are_sandboxed(folder):
    task = change(folder, "{{q}}答：", "{{q.__class__.__mro__[1].__subclasses__()}}")
    with pytest.raises(UserError, match="doc_to_text 的模板拼不出来"):
        build_items(task)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("test_split: test", "", "没有 test_split，也没有 validation_split"),
        (
            "output_type: multiple_choice",
            "output_type: generate_until",
            "output_type 是 generate_until，这里只算",
        ),
        ("output_type: multiple_choice", "output_type: multiple_choice\nuse_prompt: x", "用了 use_prompt"),
        ("doc_to_target: label", "", "没有 doc_to_target"),
        ("doc_to_text: ", "include: task.yaml\ndoc_to_text: ", "include 绕回了自己"),
        (
            "doc_to_text: ",
            "include: none.yaml\ndoc_to_text: ",
            "没有任务文件 .*none.yaml（.*task.yaml 的 include）",
        ),
        ("task: mine", "task: [a, b]", "是一组任务"),
        ("task: mine", "task: [", "不是合法的 yaml"),
        (TASK, "- a", "里要是 名字: 值，读到的是 list"),
        ("rows.jsonl", "none.jsonl", "data_files 里的 none.jsonl 不存在"),
        ("{test: rows.jsonl}", "rows.jsonl", "那一份叫 train；任务却要 test"),
        ("{test: rows.jsonl}", "{dev: rows.jsonl}", "data_files 里没有 test，有的是 dev"),
        (
            "{{q}}",
            "{{question}}",
            r"rows\.jsonl 第 1 行：doc_to_text 的模板拼不出来（'question' is undefined）",
        ),
        ("{{q}}答：", "{{q | length}}", "拼出来是一个数 7"),
        ("doc_to_choice: options", "doc_to_choice: '{{q}}'", "doc_to_choice 拼出来的不是一个列表"),
        ("doc_to_choice: options", "doc_to_choice: [A]", "要给出至少两个文字选项"),
        ("doc_to_choice: options", "doc_to_choice: [A, A]", "选项 A 出现了不止一次"),
        ("doc_to_choice: options", "doc_to_choice: [A, '']", "第 2 个选项是空的"),
        (
            "doc_to_target: label",
            "doc_to_target: '7'",
            r"rows\.jsonl 第 1 行：答案 7 不在选项里；选项有 2 个",
        ),
        ("doc_to_target: label", "doc_to_target: 丙", "答案 '丙' 不在选项里"),
    ],
)
def test_mistakes_are_named(folder, old, new, message):
    with pytest.raises(UserError, match=message):
        build_items(change(folder, old, new))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("fewshot_config: {sampler: balanced}", "sampler 是 balanced，这里有 default 与 first_n"),
        ("fewshot_config: {fewshot_indices: [1]}", "fewshot_config 里有不认识的 fewshot_indices"),
        ("fewshot_split: dev", "data_files 里没有 dev"),
        ("fewshot_config: {sampler: first_n}\nfewshot_split: test", "要 3 道例题，那一份里只有 1 道"),
    ],
)
def test_mistakes_in_the_examples_are_named(folder, config, message):
    with pytest.raises(UserError, match=message):
        build_items(change(folder, "task: mine", f"task: mine\n{config}"), shots=3)


def test_the_second_row_is_named(folder):
    write_rows(folder, [ROWS[0], {**ROWS[1], "options": ["王伯", "王伯"]}])
    with pytest.raises(UserError, match=r"rows\.jsonl 第 2 行：选项 王伯 出现了不止一次"):
        build_items(load_task(folder / "task.yaml"))
