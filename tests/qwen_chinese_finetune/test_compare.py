"""compare_alignment.py：指标与各处同一个定义；比过就不再比，变了就说变了什么；缺模型、写错参数说得清楚。"""

import json
import shutil

import pytest

from nlp_common.base.console import printable
from nlp_common.base.errors import UserError
from nlp_common.base.runs import load_run
from nlp_common.lm.loading import load_causal_lm
from nlp_common.lm.replies import distinct_n, reply_to, score_replies, token_kl
from nlp_common.tiny import world
from nlp_common.tiny.judge import judge, measure_chat
from report.comparison import length_bins, mark_of

SETTINGS = {"dataset": "tiny_world", "eval_dataset": None, "max_new_tokens": 24}


@pytest.fixture(scope="module")
def compare(load_script):
    return load_script("compare_alignment")


@pytest.fixture(scope="module")
def root(base_folder, chat_folder, reward_folder, reference, chat_tokenizer, tmp_path_factory):
    """假装训练好的一组结果：几个不同的随机小模型。"""
    root = tmp_path_factory.mktemp("results")
    for stage, folder in {"pretrain": base_folder, "sft": chat_folder, "reward": reward_folder}.items():
        shutil.copytree(folder, root / stage)
    shutil.copytree(chat_folder, root / "ppo")
    for each in (reference, chat_tokenizer):
        each.save_pretrained(root / "dpo")
    for stage in ("pretrain", "sft", "reward", "dpo", "ppo"):
        record = {"stage": stage, "id": f"id-{stage}", "settings": SETTINGS, "fingerprint": {}}
        (root / stage / "run.json").write_text(json.dumps(record), encoding="utf-8")
    return root


@pytest.fixture
def run(compare, root, tmp_path):
    def call(*arguments: str) -> dict:
        places = ["--output_root", str(root), "--output_dir", str(tmp_path / "compare")]
        return compare.main([*places, "--max_eval_samples", "12", *arguments])

    return call


def test_metrics_equal_the_shared_definitions(run, root, reward_net, tmp_path):
    record = run()
    questions = world.heldout_questions(12, 0)
    assert list(record["metrics"]) == ["base", "sft", "dpo", "ppo"]
    reference = load_causal_lm(str(root / "sft"))[1].eval()
    for name, folder in {"base": "pretrain", "sft": "sft", "dpo": "dpo"}.items():
        tokenizer, model = load_causal_lm(str(root / folder))
        wanted, _, replies = measure_chat(model.eval(), tokenizer, questions)
        found = record["metrics"][name]
        assert {key: found[key] for key in wanted} == wanted
        scores = score_replies(reward_net, tokenizer, questions, replies)
        assert found["reward_mean"] == pytest.approx(scores.mean().item())
        assert found["kl_to_sft"] == pytest.approx(
            token_kl(model, reference, tokenizer, questions, replies), abs=1e-6
        )
    assert record["metrics"]["sft"]["kl_to_sft"] == 0.0
    assert record["metrics"]["ppo"]["kl_to_sft"] == pytest.approx(0.0, abs=1e-6)  # 同样的权重，另一个文件夹
    assert record["metrics"]["dpo"]["kl_to_sft"] > 1e-4
    answers = json.loads((tmp_path / "compare" / "compare.json").read_text(encoding="utf-8"))
    assert len(answers) == 12 and answers[:12] == record["samples"]
    for row in answers:
        for reply in row["replies"].values():
            verdict = judge(row, reply["text"], reply["ended"])
            assert reply["verdict"]["score"] == verdict.score
            assert {"text", "ended", "reward", "verdict"} <= reply.keys()
    assert record["metrics"]["dpo"]["mean_chars"] == pytest.approx(
        sum(len(row["replies"]["dpo"]["text"]) for row in answers) / 12
    )


def test_finished_comparison_is_reused_and_changes_are_named(run, root, tmp_path, capsys):
    first = run()
    capsys.readouterr()
    assert run() == first
    assert "已有比较结果" in capsys.readouterr().out
    again = run("--max_eval_samples", "5")
    out = capsys.readouterr().out
    assert "rows：已有 12，这次 5" in out and again["metrics"]["sft"]["n"] == 5
    retrained = load_run(root / "dpo") | {"id": "another"}
    (root / "dpo" / "run.json").write_text(json.dumps(retrained), encoding="utf-8")
    run("--max_eval_samples", "5")
    assert "model_dpo：已有 dpo:id-dpo，这次 dpo:another" in capsys.readouterr().out


@pytest.mark.parametrize("mode", ["dpo-ppo", "sft-dpo", "sft-ppo"])
def test_modes(compare, root, mode):
    record = compare.main(["--output_root", str(root), "--mode", mode, "--max_eval_samples", "3"])
    assert "-".join(record["metrics"]) == mode
    assert (root / f"compare-{mode}" / "compare.json").is_file()  # 不盖掉四个一起比的结果
    assert all("kl_to_sft" in metrics and "reward_mean" in metrics for metrics in record["metrics"].values())


def test_real_questions_have_no_judge(run, tmp_path):
    file = tmp_path / "题目.jsonl"
    chats = [[("user", f"第{i}个问题？"), ("assistant", "答")] for i in range(4)]
    rows = [{"messages": [{"role": role, "content": text} for role, text in chat]} for chat in chats]
    file.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    record = run("--dataset", str(file), "--max_new_tokens", "7")
    metrics = record["metrics"]["dpo"]
    assert not {"qa_accuracy", "preferred_rate", "judge_score"} & metrics.keys()
    assert {"n", "mean_chars", "distinct_2", "reward_mean", "kl_to_sft"} <= metrics.keys()
    assert metrics["n"] == 4 and "verdict" not in record["samples"][0]["replies"]["dpo"]
    assert record["samples"][0]["messages"] == [{"role": "user", "content": "第0个问题？"}]


def test_helpers_may_be_absent(compare, root, tmp_path, capsys):
    """DPO 不需要奖励模型：没有它也能比，说一声就行。"""
    for stage in ("dpo", "ppo"):
        shutil.copytree(root / stage, tmp_path / stage)
    record = compare.main(["--output_root", str(tmp_path), "--mode", "dpo-ppo", "--max_eval_samples", "3"])
    out = capsys.readouterr().out
    assert "没有奖励模型的结果（reward_model.py）" in out and "没有SFT的结果（sft_chinese_qwen.py）" in out
    assert not {"reward_mean", "kl_to_sft"} & record["metrics"]["dpo"].keys()


def error_of(call, *arguments) -> str:
    with pytest.raises(UserError) as caught:
        call(*arguments)
    return str(caught.value)


def test_missing_model_names_the_script(compare, root, tmp_path):
    message = error_of(compare.main, ["--output_root", str(tmp_path / "无")])
    assert "pretrain_chinese-nvidia.py" in message and "run_all.py" in message
    for stage in ("pretrain", "sft", "reward"):
        shutil.copytree(root / stage, tmp_path / stage)
    message = error_of(compare.main, ["--output_root", str(tmp_path)])
    assert "python dpo_chinese_qwen.py" in message and str(tmp_path / "dpo") in message
    (tmp_path / "sft" / "model.safetensors").write_bytes(b"half")
    message = error_of(compare.main, ["--output_root", str(tmp_path), "--mode", "sft-dpo"])
    assert "model.safetensors" in message


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["--mode", "sft-rm"], "dpo-ppo"),
        (["--modes", "all"], "--mode"),
        (["--models", "sft"], "名字=路径"),
        (["--models", "rlhf=x"], "base、sft、dpo、ppo、grpo、reward"),
        (["--max_eval_samples", "0"], "正整数"),
        (["--max_eval_samples", "many"], "整数"),
    ],
)
def test_bad_arguments(run, arguments, hint):
    assert hint in error_of(run, *arguments)


def test_another_vocabulary_is_refused(run, root, base_folder, tmp_path):
    tokenizer, model = load_causal_lm(str(base_folder))
    tokenizer.add_tokens(["新词"])
    model.resize_token_embeddings(len(tokenizer))
    for each in (model, tokenizer):
        each.save_pretrained(tmp_path / "other")
    assert "词表不同" in error_of(run, "--models", f"dpo={tmp_path / 'other'}")


def test_small_parts(model, chat_tokenizer):
    assert distinct_n(["一二三", "一二"]) == pytest.approx(2 / 3)
    assert length_bins({"a": [0, 1, 7], "b": [3]}, bins=4) == (2, {"a": [2, 0, 0, 1], "b": [0, 1, 0, 0]})
    assert printable("好\x1b[31m\x00\n") == "好�[31m�\n"
    verdict = {"right": True, "complete": True, "courteous": True, "score": 1.0}
    assert mark_of({"verdict": verdict}) == "good" and mark_of({}) is None
    assert mark_of({"verdict": verdict | {"courteous": False}}) == "right"
    assert mark_of({"verdict": verdict | {"right": False}}) == "wrong"
    (reply,) = reply_to(model, chat_tokenizer, world.heldout_questions(1, 0))
    assert set(reply) == {"text", "ids", "ended"}
