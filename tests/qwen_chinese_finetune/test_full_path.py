"""full 预设的整条路：真的 Hugging Face 客户端，对着 127.0.0.1 上的假 hub，下载、缓存、各走几步。

假 hub 上的"Qwen/Qwen1.5-0.5B"是没训练过的小模型，数据集只有几十行，列名与真的相同；其余都是 full 的设置。
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from fake_hub import FakeHub
from nlp_common.tiny import world

HOME = Path(__file__).resolve().parents[2] / "qwen_chinese_finetune"
pytestmark = pytest.mark.slow
# 一个进程依次运行几个脚本的 main：省去每次导入 torch。
RUN = """
import importlib.util, json, sys
from nlp_common.base.cli import run_main
sys.path.insert(0, sys.argv[1])
for number, (script, arguments) in enumerate(json.loads(sys.argv[2])):
    spec = importlib.util.spec_from_file_location(f"script_{number}", f"{sys.argv[1]}/{script}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    run_main(lambda: module.main(["--preset", "full", *arguments]))
"""


def run(folder: Path, endpoint: str, *steps: tuple[str, list[str]], **more: str):
    env = {k: v for k, v in os.environ.items() if not k.lower().endswith(("_proxy", "_offline"))}
    env |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(folder / "hf"), "OMP_NUM_THREADS": "1"}
    env |= {"NLP_LEARNING_CACHE": str(folder / "rows")} | more
    command = [sys.executable, "-c", RUN, str(HOME), json.dumps(steps)]
    return subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, timeout=240)


def step(script: str, folder: Path, stage: str, *more: str) -> tuple[str, list[str]]:
    few = ["--max_steps", "2", "--max_train_samples", "24", "--max_eval_samples", "4"]
    return script, ["--output_dir", str(folder / "full" / stage), *few, *more]


def lines(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def hub_contents(base: Path) -> dict:
    texts = [row["text"] for row in world.documents(40, seed=0)]
    pairs = [
        {
            "system": "",
            "history": [],
            "question": row["prompt"][-1]["content"],
            "response_chosen": row["chosen"][-1]["content"],
            "response_rejected": row["rejected"][-1]["content"],
        }
        for row in world.pairs(40, seed=0)
    ]
    talks = [row["messages"] for row in world.chats(40, seed=0)]
    card = "---\nconfigs:\n- config_name: en\n  data_files: dpo_en.json\n- config_name: zh\n  data_files: dpo_zh.json\n---\n"
    return {
        "models/Qwen/Qwen1.5-0.5B": {path.name: path.read_bytes() for path in base.iterdir()},
        "datasets/pleisto/wikipedia-cn-20230720-filtered": {
            "wikipedia-cn-20230720-filtered.json": json.dumps(
                [{"completion": text} for text in texts]
            ).encode()
        },
        "datasets/YeungNLP/firefly-train-1.1M": {
            "firefly-train-1.1M.jsonl": lines(
                [{"kind": "QA", "input": talk[0]["content"], "target": talk[1]["content"]} for talk in talks]
            )
        },
        "datasets/shibing624/DPO-En-Zh-20k-Preference": {
            "README.md": card.encode(),
            "dpo_en.json": lines(pairs[:2]),
            "dpo_zh.json": lines(pairs),
        },
    }


@pytest.fixture(scope="module")
def trained(base_folder, tmp_path_factory):
    """五个训练脚本依次跑过 full 预设；→ (文件夹, 假 hub, 打印的话)。服务器已经关了。"""
    folder = tmp_path_factory.mktemp("full_path")
    ppo = ["--max_new_tokens", "8", "--max_steps", "1"]
    with FakeHub(hub_contents(base_folder)) as server:
        done = run(
            folder,
            server.url,
            step("pretrain_chinese-nvidia.py", folder, "pretrain", "--verify"),
            step("sft_chinese_qwen.py", folder, "sft"),
            step("reward_model.py", folder, "reward"),
            step("dpo_chinese_qwen.py", folder, "dpo"),
            step("ppo_alignment.py", folder, "ppo", *ppo),
        )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, server, done.stdout


def test_every_stage_downloads_what_it_names_and_trains(trained):
    folder, server, out = trained
    records = {
        stage: json.loads((folder / "full" / stage / "run.json").read_text(encoding="utf-8"))
        for stage in ("pretrain", "sft", "reward", "dpo", "ppo")
    }
    assert records["pretrain"]["parent"]["model"]["id"] == "Qwen/Qwen1.5-0.5B"
    assert server.commit("models/Qwen/Qwen1.5-0.5B") in records["pretrain"]["parent"]["model"]["path"]
    assert out.count("预设 full") == 5 and "大小和哈希一致" in out
    for stage, name in [
        ("pretrain", "pleisto/wikipedia-cn-20230720-filtered"),
        ("sft", "YeungNLP/firefly-train-1.1M"),
        ("dpo", "shibing624/DPO-En-Zh-20k-Preference:zh"),
        ("ppo", "shibing624/DPO-En-Zh-20k-Preference:zh"),
    ]:
        source = records[stage]["data"]["train"]
        assert (source["name"], source["kind"]) == (name, "hub")
    assert len({record["id"] for record in records.values()}) == 5  # 每一步都动了权重
    got = server.downloads()
    assert got.count("model.safetensors") == 1
    assert "dpo_en.json" not in got  # 只读中文的那一份


def test_the_next_run_needs_no_network(trained):
    folder, server, _ = trained
    mac = step("pretrain_chinese-mac.py", folder, "again", "--verify")
    done = run(folder, server.url, mac, HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "用上次存下的" in done.stdout and "缓存里下载时的记录" in done.stdout
    first, again = (
        json.loads((folder / "full" / stage / "run.json").read_text(encoding="utf-8"))
        for stage in ("pretrain", "again")
    )
    assert again["data"]["train"]["sha256"] == first["data"]["train"]["sha256"]
    assert again["metrics"]["heldout_loss_before"] == pytest.approx(
        first["metrics"]["heldout_loss_before"], abs=1e-5
    )
