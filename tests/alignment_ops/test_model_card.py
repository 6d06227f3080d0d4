"""model_card.py：卡里的每个数都是 run.json 里的，hub 读得懂开头的 YAML，照着它的几行代码真的能用，不带本机的路径。"""

import json
import re

import pytest
import yaml

import model_card as script
from nlp_common.base.errors import UserError

RUN = {
    "stage": "dpo",
    "parent": {"model": {"path": "/home/li/sft", "stage": "sft", "id": "3e86"}},
    "data": {
        "train": {"name": "/home/li/pairs.jsonl", "rows": 3000, "sha256": "b825"},
        "eval": {"name": "/home/li/pairs.jsonl", "rows": 500, "sha256": "6df4"},
    },
    "settings": {
        "preset": "tiny",
        "output_dir": "/home/li/out",
        "learning_rate": 5e-4,
        "beta": 0.3,
        "model": "/home/li/sft",
    },
    "versions": {"torch": "2.13.0"},
    "device": "CPU（2 核）",
    "seconds": 12.9,
    "metrics": {
        "qa_accuracy": 1.0,
        "preferred_rate": 0.98,
        "preferred_rate_before": 0.234,
        "train_seconds": 6.5,
    },
    "id": "a9bf635772431234",
}


def test_numbers_come_from_the_run():
    card = script.model_card(RUN, "li/dpo")
    assert "| 采样回答又对、又完整、又有礼 | 0.234 | 0.98 |" in card
    assert "| 留出的题答对（贪心） | — | 1 |" in card
    assert "| 训练 | pairs.jsonl | 3000 | `b825` |" in card and "| beta | 0.3 |" in card
    assert "`a9bf635772431234`" in card and "从 sft 模型（3e86）开始" in card
    assert "/home/li" not in card and "train_seconds" not in card


def test_the_hub_understands_it():
    from huggingface_hub import ModelCard

    run = json.loads(json.dumps(RUN))
    run["parent"]["model"]["id"] = "Qwen/Qwen1.5-0.5B"
    run["data"]["train"]["name"] = "shibing624/DPO-En-Zh-20k-Preference:zh"
    data = ModelCard(script.model_card(run, "li/dpo")).data
    assert data.base_model == "Qwen/Qwen1.5-0.5B" and data.language == "zh" and "dpo" in data.tags
    assert data.datasets == ["shibing624/DPO-En-Zh-20k-Preference"]
    found = {result.metric_type: result.metric_value for result in data.eval_results}
    assert found == {"qa_accuracy": 1.0, "preferred_rate": 0.98}
    local = yaml.safe_load(script.model_card(RUN, "li/dpo").split("---\n")[1])
    assert "base_model" not in local and "datasets" not in local  # 本机的东西，hub 上没有


def test_public_and_private_and_no_parent():
    assert "HF_TOKEN" in script.model_card(RUN, "li/dpo") and "HF_TOKEN" not in script.model_card(
        RUN, "li/dpo", True
    )
    alone = {name: value for name, value in RUN.items() if name != "parent"} | {"metrics": {}}
    card = script.model_card(alone, "li/dpo")
    assert "从头训练" in card and "model-index" not in card


def test_the_lines_of_code_in_it_work(chat_folder, capsys):
    card = script.model_card(RUN, chat_folder.as_posix())
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    exec(code, {})
    assert capsys.readouterr().out.endswith("\n")


def test_command_line(tmp_path, capsys):
    (tmp_path / "run.json").write_text(json.dumps(RUN), encoding="utf-8")
    script.main(["--run", str(tmp_path), "--repo", "li/dpo"])
    assert "# dpo" in capsys.readouterr().out and not (tmp_path / "README.md").exists()
    script.main(["--run", str(tmp_path), "--repo", "li/dpo", "--write", "true"])
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == script.model_card(RUN, "li/dpo")
    with pytest.raises(UserError, match=r"没有 .*nowhere"):
        script.main(["--run", str(tmp_path / "nowhere")])
    (tmp_path / "run.json").write_text(json.dumps({"stage": "lesson"}), encoding="utf-8")
    with pytest.raises(UserError, match="没有 data、metrics、settings、id"):
        script.main(["--run", str(tmp_path)])
