"""这条链：脚本在哪里，各阶段由哪个脚本训练，各阶段和模型在终端、网页里叫什么。"""

from __future__ import annotations

from pathlib import Path

from nlp_common.train.chain import QWEN_SCRIPTS, Chain

HOME = Path(__file__).resolve().parent
FULL_MODEL = "Qwen/Qwen1.5-0.5B"
STAGES = {
    "pretrain": "预训练",
    "sft": "SFT",
    "reward": "奖励模型",
    "dpo": "DPO",
    "ppo": "PPO",
    "grpo": "GRPO",
    "compare": "对比",
}
EXTRA = ("grpo",)  # run_all.py --with 才跑的阶段
MODELS = {"base": "预训练", "sft": "SFT", "dpo": "DPO", "ppo": "PPO", "grpo": "GRPO"}
FOLDERS = {
    "base": "pretrain",
    "sft": "sft",
    "dpo": "dpo",
    "ppo": "ppo",
    "grpo": "grpo",
}  # 模型是哪个阶段的结果
SCRIPTS = QWEN_SCRIPTS
CHAIN = Chain(HOME, SCRIPTS, FULL_MODEL)
