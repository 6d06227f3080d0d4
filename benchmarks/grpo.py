"""GRPO 一整步（采样、打分、更新）每秒多少个回答：grpo_alignment.py 对 TRL 的 GRPOTrainer，同样的模型、提示、G 和长度。

    python benchmarks/grpo.py                      # 两边轮流各跑两遍，约 3 分钟
    python benchmarks/grpo.py --ablation           # 再量我们自己：提示算 G 遍时各慢多少

两边都是：没训练过的小模型（几乎每个回答都写满 24 个 token，所以两边一样长），每步 16 道题、每题 8 个回答，更新一遍，β = 0，
损失 dapo，AdamW，float32。打分是编号为偶数的 token 占几成：每一组都有信号，谁也不能跳过。第一步不算，其余取中位数。
TRL 量默认（重算激活）与不重算两种，与较快的比。

打印一行 JSON：completions_per_s 与其中各部分的秒数、trl_default、trl_no_checkpointing（每秒几个回答）、ratio。
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import ClassVar

QWEN = Path(__file__).resolve().parent.parent / "qwen_chinese_finetune"
sys.path.insert(0, str(QWEN))  # 基准不在脚本的文件夹里，要自己找到 chain.py 等

N_PROMPTS, GROUP, NEW_TOKENS, LEARNING_RATE = 16, 8, 24, 1e-5
BATCH = N_PROMPTS * GROUP


def even_share(ids: list[int]) -> float:
    return sum(i % 2 == 0 for i in ids) / max(1, len(ids))


def ours(model: str, rounds: int, repeat: bool) -> dict:
    """每一步的秒数，以及其中采样打分、更新各占多少（都取中位数）。repeat：提示算 G 遍，不并成一行。"""
    import torch
    from accelerate import Accelerator

    import grpo_alignment as grpo
    from nlp_common.lm import rollout
    from nlp_common.lm.chatml import prompt_ids
    from nlp_common.lm.loading import end_chat_turns, load_causal_lm
    from nlp_common.tiny import world

    if repeat:
        rollout.takes_4d_masks = lambda _: False
    tokenizer, policy = load_causal_lm(model)
    end_chat_turns(policy, tokenizer)
    settings = grpo.GRPOSettings(
        num_generations=GROUP,
        per_device_train_batch_size=BATCH,
        micro_batch_size=BATCH,
        max_new_tokens=NEW_TOKENS,
        max_grad_norm=1.0,
    )
    questions = world.questions(N_PROMPTS * rounds, seed=6)
    rows = [{"prompt": prompt_ids(tokenizer, q["messages"])} for q in questions]
    optimizer = torch.optim.AdamW(policy.parameters(), LEARNING_RATE, fused=True)

    def score(questions, replies, rollout):
        return torch.tensor([even_share(reply["ids"]) for reply in replies])

    accelerator, seconds, parts = Accelerator(), [], []
    for step in range(rounds):
        start = time.perf_counter()
        batch = rows[step * N_PROMPTS : (step + 1) * N_PROMPTS]
        generator = torch.Generator().manual_seed(step)
        given = (lambda number, batch=batch: batch, score, tokenizer, settings, accelerator, generator)
        parts.append(grpo.grpo_step(policy, None, optimizer, *given))
        seconds.append(time.perf_counter() - start)
        assert parts[-1]["zero_groups"] == 0
    result = {"round_s": median(seconds[1:]), "length": median(part["length"] for part in parts)}
    for name in ("rollout_s", "update_s"):
        result[name] = median(part[name] for part in parts[1:])
    return result


def trl(model: str, rounds: int, checkpointing: bool, folder: str) -> dict:
    """每一步的秒数。"""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from nlp_common.lm.loading import end_chat_turns, load_tokenizer
    from nlp_common.tiny import world

    class Clock(TrainerCallback):
        ticks: ClassVar[list[float]] = []

        def on_step_end(self, *_, **__):
            self.ticks.append(time.perf_counter())

    tokenizer = load_tokenizer(model)
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    end_chat_turns(policy, tokenizer)
    lengths = []

    def reward(completion_ids, **_):
        lengths.extend(map(len, completion_ids))
        return [even_share(ids) for ids in completion_ids]

    fields = GRPOConfig.__dataclass_fields__
    name = next(n for n in ("activation_checkpointing", "gradient_checkpointing") if n in fields)
    config = GRPOConfig(
        output_dir=folder,
        per_device_train_batch_size=BATCH,
        num_generations=GROUP,
        max_completion_length=NEW_TOKENS,
        max_steps=rounds,
        learning_rate=LEARNING_RATE,
        beta=0.0,
        loss_type="dapo",
        bf16=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **{name: checkpointing},
    )
    rows = [{"prompt": q["messages"]} for q in world.questions(N_PROMPTS * rounds, seed=6)]
    trainer = GRPOTrainer(
        model=policy,
        processing_class=tokenizer,
        reward_funcs=reward,
        args=config,
        train_dataset=Dataset.from_list(rows),
        callbacks=[Clock()],
    )
    trainer.train()
    seconds = [b - a for a, b in itertools.pairwise(Clock.ticks)]
    return {"round_s": median(seconds), "length": sum(lengths) / len(lengths)}


def run(side: str, args, folder: str, *flags: str) -> dict:
    """在自己的进程里跑一边，读它打印的最后一行。"""
    command = [sys.executable, __file__, "--side", side, "--model", f"{folder}/model", "--folder", folder]
    command += ["--rounds", str(args.rounds), *flags]
    environment = os.environ | {"HF_HUB_DISABLE_TELEMETRY": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(f"{side} 没有跑完：\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def compare(args, folder: str) -> dict:
    """两边轮流跑 args.pairs 遍 → 各自每秒多少个回答（中位数）与倍数。"""
    sides = {"ours": ("ours", []), "trl_default": ("trl", ["--checkpointing"])}
    sides["trl_no_checkpointing"] = ("trl", [])
    if args.ablation:
        sides["repeated_prompts"] = ("ours", ["--repeat"])
    runs: dict[str, list[dict]] = {name: [] for name in sides}
    for _ in range(args.pairs):
        for name, (side, flags) in sides.items():
            runs[name].append(run(side, args, folder, *flags))
    speed = {name: BATCH / median(each["round_s"] for each in found) for name, found in runs.items()}
    result = {"completions_per_s": round(speed.pop("ours"), 1)}
    for name in ("rollout_s", "update_s", "length"):
        result[name] = round(median(each[name] for each in runs["ours"]), 3)
    result["trl_length"] = round(median(each["length"] for each in runs["trl_default"]), 3)
    result |= {name: round(value, 1) for name, value in speed.items()}
    fastest = max(result[name] for name in ("trl_default", "trl_no_checkpointing"))
    result["ratio"] = round(result["completions_per_s"] / fastest, 2)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=8, help="每边跑几步，第一步不算（默认 8）")
    parser.add_argument("--pairs", type=int, default=2, help="两边轮流跑几遍，取中位数（默认 2）")
    parser.add_argument("--ablation", action="store_true", help="再量我们自己：提示算 G 遍")
    for hidden in ("--side", "--model", "--folder"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    for hidden in ("--checkpointing", "--repeat"):
        parser.add_argument(hidden, action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--record", action="store_true", help="记进 docs/measurements")
    args = parser.parse_args()
    if args.side == "ours":
        return print(json.dumps(ours(args.model, args.rounds, args.repeat)))
    if args.side == "trl":
        return print(json.dumps(trl(args.model, args.rounds, args.checkpointing, args.folder)))
    if args.rounds < 3:
        sys.exit(f"--rounds 至少是 3（第一步不算），给的是 {args.rounds}。")
    with tempfile.TemporaryDirectory() as folder:
        from nlp_common.tiny import qwen

        qwen.save_tiny_base(Path(folder) / "model", seed=0)
        result = compare(args, folder)
        print(json.dumps(result))
        if args.record:
            from nlp_common.base.measurements import record

            names = ("trl_default", "trl_no_checkpointing", "repeated_prompts")
            record("qwen", {"grpo_speed": result}, unit=dict.fromkeys(names, "answers/s"))


if __name__ == "__main__":
    main()
