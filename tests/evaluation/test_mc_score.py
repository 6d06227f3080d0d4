"""mc_score.py：题目只算一遍等于分开算；与 lm_eval 同一个任务逐题相同（题面、对数概率、acc、acc_norm、acc_bytes）。"""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Qwen3Config,
)

import mc_score
from benchmarks_mc import picks
from mc_score import Ask, encode, log_likelihoods, max_length, same_beginnings, too_long
from mc_tasks import build_items, load_task
from nlp_common.base.errors import UserError

SHOTS = "以下是关于动物的单项选择题，请选出其中的正确答案。\n\n松鼠是什么颜色的？\n答案：乌黑\n\n"
ASKS = [
    Ask("小刚去了花园。小刚去了哪里？答案：", ["花园", "海边", "学校的山顶", "市"]),
    Ask("谁来了？", list("ABCD")),
    Ask("", ["花园", "小刚去了学校"]),
    Ask("  ", ["花园", "海"]),
    Ask([5, 9, 300, 4], ["花园", "王伯也来了"]),
    Ask("题目末尾有空格 ", ["A", "B"]),
    *(
        Ask(SHOTS + f"第 {i} 题：{'小' * i}刚去了哪里？", ["花园", "海边边", "学"][: 2 + i % 2])
        for i in range(9)
    ),
]


def furthest(one, other):
    return max(
        abs(a - b) for left, right in zip(one, other, strict=True) for a, b in zip(left, right, strict=True)
    )


def by_definition(model, tokenizer, ask: Ask) -> list[float]:
    """一个选项一个前向，一个 token 一个 token 地查表。"""
    found = []
    row = encode(tokenizer, [ask], 512)[0]
    for option in row.options:
        ids = row.context + option
        with torch.no_grad():
            logps = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        found.append(sum(float(logps[len(row.context) - 1 + i, token]) for i, token in enumerate(option)))
    return found


def test_one_row_for_all_options_equals_one_row_each(model64, tokenizer):
    shared = log_likelihoods(model64, tokenizer, ASKS)
    apart = log_likelihoods(model64, tokenizer, ASKS, share=False)
    assert furthest(shared, apart) < 1e-9
    assert furthest(shared, [by_definition(model64, tokenizer, ask) for ask in ASKS]) < 1e-5


@settings(max_examples=15, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.text("小刚花园海边ABC \n", min_size=1, max_size=30),
            st.lists(st.text("小刚花园ab", min_size=1, max_size=6), min_size=1, max_size=5),
        ),
        min_size=1,
        max_size=6,
    )
)
def test_sharing_never_changes_a_number(model64, tokenizer, drawn):
    asks = [Ask(text + "：", options) for text, options in drawn]
    shared, apart = (log_likelihoods(model64, tokenizer, asks, share) for share in (True, False))
    assert furthest(shared, apart) < 1e-9


def test_common_examples_are_computed_once_per_subject(tokenizer):
    """例题按学科换：一个学科一组；没有共同开头的放在一起。"""
    other = SHOTS.replace("动物", "食物") * 2
    asks = [Ask(start + f"第{i}题", ["A", "B"]) for i in range(3) for start in (SHOTS, other, "")]
    groups = same_beginnings(encode(tokenizer, asks, 512))
    assert sorted(len(group) for _, group in groups) == [3, 3, 3]
    assert [prefix for prefix, _ in groups][-1] == 0 and min(prefix for prefix, _ in groups[:-1]) > 40
    for prefix, group in groups[:-1]:
        assert len({tuple(row.context[:prefix]) for row in group}) == 1


SMALL = {"vocab_size": 1000, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
OTHERS = {
    "llama": LlamaConfig(**SMALL, intermediate_size=64, num_key_value_heads=2),
    "qwen3": Qwen3Config(**SMALL, intermediate_size=64, num_key_value_heads=2, head_dim=8),
    "gpt2": GPT2Config(vocab_size=1000, n_embd=32, n_layer=2, n_head=4),
    "mistral": MistralConfig(**SMALL, intermediate_size=64, num_key_value_heads=2, sliding_window=6),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_architectures(kind, tokenizer, capsys):
    """试过的几种结构并成一行，结果不变；滑动窗口的看得出并不得，就分开算。"""
    torch.manual_seed(0)
    net = AutoModelForCausalLM.from_config(OTHERS[kind]).double().eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(3.0)
    shared, apart = (log_likelihoods(net, tokenizer, ASKS, share) for share in (True, False))
    assert furthest(shared, apart) < 1e-9
    assert ("不能把几个选项并成一行" in capsys.readouterr().out) == (kind == "mistral")


def test_long_questions_lose_their_beginning(model, tokenizer):
    """长过上下文的从左边截，留下选项与最近的题面；与 lm_eval 的截法相同。"""
    longest = max_length(model, tokenizer)
    ask = Ask("小" * (longest + 50), ["花园", "海边的学校"])
    assert too_long(tokenizer, model, [ASKS[0], ask]) == 1
    rows = encode(tokenizer, [ask], longest)
    assert [len(row.context) + len(row.options[0]) for row in rows] == [longest + 1] * 2
    assert math.isfinite(log_likelihoods(model, tokenizer, [ask])[0][0])


def test_an_empty_option_is_named(model, tokenizer):
    with pytest.raises(UserError, match="第 2 题有 1 个选项是空的"):
        log_likelihoods(model, tokenizer, [ASKS[0], Ask("谁？", ["A", ""])])


def test_three_ways_to_choose():
    """手算：长的选项总概率小，除以字数、字节数之后倒过来。"""
    logps, options = [-4.0, -6.0, -5.0], ["ab", "abcdef", "猫狗"]
    assert picks(logps, options) == {"acc": 0, "acc_norm": 1, "acc_bytes": 2}
    assert picks([-1.0, -1.0], ["a", "b"])["acc"] == 0  # 并列的选前面的，与 numpy 的 argmax 相同


# ---------------------------------------------------------------- 与 lm_eval 逐题比


ROWS = [
    {
        "question": " 小刚去了哪里？",
        "A": "花园",
        "B": "海边",
        "C": "学校",
        "D": "山顶",
        "answer": "B",
        "subject": "地点",
    },
    {
        "question": "跑来的是什么动物？",
        "A": "松鼠",
        "B": "野兔吧",
        "C": "鸟",
        "D": "它是一只山羊",
        "answer": "D",
        "subject": "动物",
    },
    {
        "question": "它吃了什么？",
        "A": "香蕉",
        "B": "苹果",
        "C": "面包",
        "D": "大西瓜",
        "answer": "A",
        "subject": "食物",
    },
    {
        "question": "心情怎么样？",
        "A": "高兴",
        "B": "很失望",
        "C": "平静",
        "D": "害怕",
        "answer": "C",
        "subject": "心情",
    },
    {
        "question": "Who came later?",
        "A": "Uncle Wang",
        "B": "a fox",
        "C": "the end",
        "D": "no one",
        "answer": "A",
        "subject": "en",
    },
]
BASE = """dataset_path: {kind}
dataset_kwargs:
  data_files:
    test: {folder}/test.{kind}
    dev: {folder}/dev.{kind}
test_split: test
output_type: multiple_choice
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_bytes, aggregation: mean, higher_is_better: true}}
"""
TASKS = {
    "letters": """include: base
fewshot_split: dev
fewshot_config: {sampler: first_n}
description: "以下是关于{{subject}}的单项选择题。\\n\\n"
doc_to_text: "{{question.strip()}}\\nA. {{A}}\\nB. {{B}}\\nC. {{C}}\\nD. {{D}}\\n答案："
doc_to_choice: ["A", "B", "C", "D"]
doc_to_target: "{{['A', 'B', 'C', 'D'].index(answer)}}"
""",
    "full_text_random_shots": """include: base
fewshot_split: test
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_choice: "{{[A, B, C, D]}}"
doc_to_target: "{{{'A': A, 'B': B, 'C': C, 'D': D}[answer]}}"
""",
    "columns_and_prefix": """include: [base]
fewshot_split: dev
gen_prefix: "选"
target_delimiter: ""
fewshot_delimiter: "\\n---\\n"
doc_to_text: question
doc_to_choice: {a: "A", b: "B", c: "C", d: "D"}
doc_to_target: answer
num_fewshot: 1
""",
    "own_shots": """include: base
fewshot_config:
  doc_to_text: "例题 {{question}}"
  samples:
    - {question: 谁来了？, answer: B}
    - {question: 去哪里？, answer: D}
    - {question: 吃什么？, answer: A}
doc_to_text: "{{question | regex_replace('小刚', '小兰')}} "
doc_to_choice: ["A", "B", "C", "D"]
doc_to_target: answer
""",
}


@pytest.fixture
def task_folder(tmp_path):
    for kind in ("json", "csv"):
        for split, rows in (("test", ROWS), ("dev", ROWS[::-1][:3])):
            if kind == "json":
                text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            else:
                text = ",".join(rows[0]) + "\n" + "".join(",".join(row.values()) + "\n" for row in rows)
            (tmp_path / f"{split}.{kind}").write_text(text, encoding="utf-8")
    for name, text in TASKS.items():
        (tmp_path / f"{name}.yaml").write_text(f"task: {name}\n{text}", encoding="utf-8")
    return tmp_path


def harness(model, tokenizer, folder, task: str, shots: int, monkeypatch) -> dict:
    """lm_eval 在这个进程里跑一遍。"""
    lm_eval = pytest.importorskip("lm_eval", reason='对照 lm_eval：pip install -e ".[evaluation]"')
    import datasets
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(folder / "cache"))
    found = lm_eval.simple_evaluate(
        HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2, device="cpu"),
        tasks=[task],
        num_fewshot=shots,
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        log_samples=True,
        bootstrap_iters=0,
    )
    return {"scores": found["results"][task], "samples": found["samples"][task]}


@pytest.mark.parametrize(("task", "kind"), [*((name, "json") for name in TASKS), ("letters", "csv")])
def test_equals_lm_eval(task, kind, model, tokenizer, task_folder, monkeypatch):
    (task_folder / "base").write_text(BASE.format(kind=kind, folder=task_folder), encoding="utf-8")
    for shots in (0, 2):
        theirs = harness(model, tokenizer, task_folder, task, shots, monkeypatch)
        items = build_items(load_task(task_folder / f"{task}.yaml"), shots)
        ours = log_likelihoods(model, tokenizer, [each.ask for each in items])
        right = {name: 0.0 for name in ("acc", "acc_norm", "acc_bytes")}
        for each, logps, sample in zip(items, ours, theirs["samples"], strict=True):
            asked = [(each.ask.context, continuation) for continuation in each.ask.continuations]
            assert [tuple(pair) for pair in sample["arguments"]] == asked  # 题面一字不差
            assert logps == pytest.approx([float(r[0][0]) for r in sample["resps"]], abs=1e-5, rel=1e-6)
            for name, place in picks(logps, each.choices).items():
                assert float(place in each.gold) == sample[name]
                right[name] += float(place in each.gold)
        for name, total in right.items():
            assert total / len(items) == theirs["scores"][f"{name},none"]


def test_long_prompts_equal_lm_eval(model, tokenizer, task_folder, monkeypatch):
    """题面长过模型的上下文（512）：两边截得一样。"""
    (task_folder / "base").write_text(BASE.format(kind="json", folder=task_folder), encoding="utf-8")
    text = TASKS["letters"].replace("以下是关于", "以下是很长很长的说明。" * 60)
    (task_folder / "letters.yaml").write_text(f"task: letters\n{text}", encoding="utf-8")
    theirs = harness(model, tokenizer, task_folder, "letters", 0, monkeypatch)
    items = build_items(load_task(task_folder / "letters.yaml"), 0)
    ours = log_likelihoods(model, tokenizer, [each.ask for each in items])
    assert too_long(tokenizer, model, [each.ask for each in items]) == len(items)
    for logps, sample in zip(ours, theirs["samples"], strict=True):
        assert logps == pytest.approx([float(r[0][0]) for r in sample["resps"]], abs=1e-5, rel=1e-6)


def test_batches_hold_every_question_once(tokenizer):
    rows = encode(tokenizer, ASKS, 512)
    batches = mc_score.in_batches(rows, 0)
    assert sorted(row.number for batch in batches for row in batch) == list(range(len(ASKS)))


def test_long_examples_make_small_batches(tokenizer):
    """共同的开头很长：每行带一份它的 KV，一批的行数跟着少，内存不会满。"""
    rows = encode(tokenizer, [Ask("小" * 1500 + f"第{i}题：", ["花园", "海"]) for i in range(20)], 4096)
    batches = mc_score.in_batches(rows, 1500)
    assert max(map(len, batches)) == 2 and sum(map(len, batches)) == 20
