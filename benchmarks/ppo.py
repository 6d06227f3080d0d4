"""PPO 的速度：ppo_alignment.py 的一轮对 TRL 1.12 的 PPOTrainer（最后一个带着它的版本），每秒多少个回答。

同样的权重（没训练过的两层小模型，所以两边的回答都写满 24 个 token 上下）、同样的提示、批大小 64、4 遍更新、
单独的价值网络、float32。我们的一边由 nlp_common 载入，装着 nlp_common/fast 里的；TRL 一边是 transformers 原样的模型，
它的用户就是这样用的，加 --fast_trl 给它也装上。TRL 跑四种设置：一批切成 1 份或 2 份，梯度检查点开（它的默认）或关；
倍数对其中最快的算。各跑一个进程，一个跑完再跑下一个；每边的第一轮不算（要热身）。机器上有别的事，就用 --pairs 3：
两边轮流跑三遍，取中位数。

    pip install --no-deps --target trl112 trl==1.12.0      # 只给这个基准用，不动已装的 TRL
    python benchmarks/ppo.py --trl trl112                  # 约 1 分钟
    python benchmarks/ppo.py                               # 只量我们自己：采样、打分、更新各几秒

打印一行 JSON。
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

BATCH, NEW_TOKENS, EPOCHS, LEARNING_RATE, KL_COEF = 64, 24, 4, 1e-4, 0.1


def prompts(tokenizer, rounds: int) -> list[list[int]]:
    from nlp_common.lm.chatml import prompt_ids
    from nlp_common.tiny import world

    return [prompt_ids(tokenizer, q["messages"]) for q in world.questions(BATCH * rounds, seed=6)]


def ours(model: str, rounds: int) -> dict:
    """每一轮的秒数，以及其中采样、打分、更新各占多少（都取中位数）。"""
    import torch
    from accelerate import Accelerator

    import ppo_alignment as ppo
    from nlp_common.lm.loading import end_chat_turns, load_causal_lm, load_reward_model, load_value_model

    tokenizer, policy = load_causal_lm(model)
    _, reference = load_causal_lm(model)
    end_chat_turns(policy, tokenizer)
    reward = load_reward_model(model, tokenizer).eval().requires_grad_(False)
    value = load_value_model(model, tokenizer)
    models = ppo.Models(policy, value, reference.eval().requires_grad_(False), reward, 0.0, 1.0)
    settings = ppo.PPOSettings(
        max_new_tokens=NEW_TOKENS, ppo_epochs=EPOCHS, micro_batch_size=16, max_grad_norm=1.0
    )
    optimizers = {
        "policy": torch.optim.AdamW(policy.parameters(), LEARNING_RATE, fused=True),
        "value": torch.optim.AdamW(value.parameters(), LEARNING_RATE, fused=True),
    }
    accelerator, rows, seconds, parts = Accelerator(), prompts(tokenizer, rounds), [], []
    for step in range(rounds):
        start = time.perf_counter()
        batch = rows[step * BATCH : (step + 1) * BATCH]
        generator = torch.Generator().manual_seed(step)
        parts.append(
            ppo.ppo_step(models, optimizers, batch, tokenizer, settings, accelerator, generator, KL_COEF)
        )
        seconds.append(time.perf_counter() - start)
    result = {"round_s": median(seconds[1:])}
    for name in ("rollout_s", "scoring_s", "update_s"):
        result[name] = median(part[name] for part in parts[1:])
    return result


def trl(model: str, rounds: int, mini_batches: int, checkpointing: bool, fast: bool, folder: str) -> dict:
    """每一轮的秒数。"""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, TrainerCallback
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    from nlp_common.lm.loading import end_chat_turns, load_tokenizer, make_fast

    class Clock(TrainerCallback):
        ticks: ClassVar[list[float]] = []

        def on_step_end(self, *_, **__):
            self.ticks.append(time.perf_counter())

    def load(auto_class, **changes):
        net = auto_class.from_pretrained(model, dtype=torch.float32, **changes)
        return make_fast(net) if fast else net

    def load_scorer():
        scorer = load(AutoModelForSequenceClassification, num_labels=1)
        scorer.config.pad_token_id = tokenizer.pad_token_id
        return scorer

    tokenizer = load_tokenizer(model)
    policy, reference = load(AutoModelForCausalLM), load(AutoModelForCausalLM)
    end_chat_turns(policy, tokenizer)
    tokenizer.padding_side = "left"
    rows = prompts(tokenizer, rounds)
    config = PPOConfig(
        output_dir=folder,
        per_device_train_batch_size=BATCH,
        num_mini_batches=mini_batches,
        num_ppo_epochs=EPOCHS,
        local_rollout_forward_batch_size=BATCH,
        total_episodes=BATCH * rounds,
        response_length=NEW_TOKENS,
        learning_rate=LEARNING_RATE,
        kl_coef=KL_COEF,
        num_sample_generations=0,
        gradient_checkpointing=checkpointing,
        bf16=False,
        save_strategy="no",
        report_to="none",
    )
    trainer = PPOTrainer(
        args=config,
        processing_class=tokenizer,
        model=policy,
        ref_model=reference,
        reward_model=load_scorer(),
        value_model=load_scorer(),
        train_dataset=Dataset.from_dict({"input_ids": rows}),
        eval_dataset=Dataset.from_dict({"input_ids": rows[:BATCH]}),
        optimizers=(None, None),
        callbacks=[Clock()],
    )
    trainer.train()
    assert torch.isfinite(next(trainer.policy_model.parameters())).all()
    ticks = Clock.ticks
    return {"round_s": median(b - a for a, b in itertools.pairwise(ticks))}


def run(side: str, args, folder: str, flags: dict) -> dict:
    """在自己的进程里跑一边，读它打印的最后一行。"""
    command = [sys.executable, __file__, "--side", side, "--model", f"{folder}/model", "--folder", folder]
    command += ["--rounds", str(args.rounds)]
    for name, value in flags.items():
        command += [name, str(value)]
    path = args.trl if side == "trl" else ""
    environment = os.environ | {"PYTHONPATH": path, "HF_HUB_DISABLE_TELEMETRY": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(f"{side} 没有跑完：\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def compare(args, folder: str) -> dict:
    """两边轮流跑 args.pairs 遍 → 各自每秒多少个回答（中位数）与倍数。"""
    ours_rounds: list[dict] = []
    trl_rounds: dict[str, list[float]] = {}
    for _ in range(args.pairs):
        ours_rounds.append(run("ours", args, folder, {}))
        for n, on in itertools.product((1, 2), (1, 0)) if args.trl else ():
            name = f"trl_{n}_mini_batch{'_checkpointing' if on else ''}"
            flags = {"--mini_batches": n, "--checkpointing": on, "--fast_trl": int(args.fast_trl)}
            trl_rounds.setdefault(name, []).append(run("trl", args, folder, flags)["round_s"])
    result = {"episodes_per_s": round(BATCH / median(each["round_s"] for each in ours_rounds), 1)}
    for name in ("rollout_s", "scoring_s", "update_s"):
        result[name] = round(median(each[name] for each in ours_rounds), 3)
    for name, seconds in trl_rounds.items():
        result[name] = round(BATCH / median(seconds), 1)
    if trl_rounds:
        result["ratio"] = round(result["episodes_per_s"] / max(result[name] for name in trl_rounds), 2)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trl", help="装着 trl 1.12 的文件夹；不给就只量我们自己")
    parser.add_argument("--rounds", type=int, default=8, help="每边跑几轮，第一轮不算（默认 8）")
    parser.add_argument("--pairs", type=int, default=1, help="两边轮流跑几遍，取中位数（默认 1）")
    parser.add_argument(
        "--fast_trl", type=int, nargs="?", const=1, default=0, help="给 TRL 的模型也装上 nlp_common/fast"
    )
    for hidden in ("--side", "--model", "--folder"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--mini_batches", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--checkpointing", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--record", action="store_true", help="记进 docs/measurements")
    args = parser.parse_args()
    if args.side == "ours":
        return print(json.dumps(ours(args.model, args.rounds)))
    if args.side == "trl":
        setting = (args.mini_batches, args.checkpointing, args.fast_trl)
        return print(json.dumps(trl(args.model, args.rounds, *setting, args.folder)))
    if args.trl and not (Path(args.trl) / "trl").is_dir():
        sys.exit(f"{args.trl} 里没有 trl。先运行：pip install --no-deps --target {args.trl} trl==1.12.0")
    if args.rounds < 3:
        sys.exit(f"--rounds 至少是 3（第一轮不算），给的是 {args.rounds}。")
    with tempfile.TemporaryDirectory() as folder:
        from nlp_common.tiny import qwen

        qwen.save_tiny_base(Path(folder) / "model", seed=0)
        result = compare(args, folder)
        print(json.dumps(result))
        if args.record:
            from nlp_common.base.measurements import record

            units = {name: "answers/s" for name in result if name.startswith("trl_")}
            record("qwen", {"ppo_speed_fast_trl" if args.fast_trl else "ppo_speed": result}, unit=units)


if __name__ == "__main__":
    main()
