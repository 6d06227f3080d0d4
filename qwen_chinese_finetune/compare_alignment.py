"""同样的题，问训练到不同阶段的模型：预训练、SFT、DPO、PPO，各变好了什么，又付出了什么。

学到什么：为什么只看一个分数会上当。奖励涨了，要同时看程序的评分（奖励模型没见过它）、对 SFT 的 KL、
长度和用词多样；DPO 与 PPO 都在拿"像不像 SFT"换"合不合偏好"。

运行：
    python compare_alignment.py                            # 四个模型一起比（--mode all）
    python compare_alignment.py --mode dpo-ppo             # 只比两个：dpo-ppo、sft-dpo、sft-ppo、ppo-grpo
    python compare_alignment.py --mode all-grpo            # 四个，再加 GRPO
    python compare_alignment.py --dataset 题目.jsonl        # 用自己的题（没有标准答案，就没有程序的评分）
    python compare_alignment.py --models dpo=路径 ppo=路径 --mode dpo-ppo

预期输出（tiny，实测见本文件夹的 README.md）：预训练模型一题也答不对；SFT 答对 97% 以上，但口气混杂；
DPO 和 PPO 差不多一样准，又对、又完整、又有礼的回答到九成以上，回答变长，用词变单调。

参考：Li et al. 2016（distinct-n）；Ouyang et al. 2022 第 4 节；Gao et al. 2023（奖励模型的过度优化）。
"""

from nlp_common.base.cli import run_main

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from rich.console import Console

from chain import MODELS
from nlp_common.base.arguments import option, parse_arguments
from nlp_common.base.device import describe, library_versions, peak_memory_mb, pick_device
from nlp_common.base.errors import UserError
from nlp_common.base.runs import RunFolder, differences, load_run, open_run
from nlp_common.lm.chatml import prompt_ids
from nlp_common.lm.loading import load_causal_lm, load_reward_model, load_tokenizer
from nlp_common.lm.replies import distinct_n, reply_to, score_replies, token_kl
from nlp_common.tiny.judge import judge, measure_chat
from nlp_common.train.splits import drop_long
from report.compare_inputs import check_same_vocab, find_models, find_root, load_questions, parse_models
from report.comparison import show_lengths, show_metrics, show_samples

MODES = {
    "all": ("base", "sft", "dpo", "ppo"),
    "dpo-ppo": ("dpo", "ppo"),
    "sft-dpo": ("sft", "dpo"),
    "sft-ppo": ("sft", "ppo"),
    "all-grpo": ("base", "sft", "dpo", "ppo", "grpo"),
    "ppo-grpo": ("ppo", "grpo"),
}
N_SAMPLES = 24  # run.json 里留几道题的回答给人看；全部回答在 compare.json


@dataclass
class CompareSettings:
    mode: Literal["all", "dpo-ppo", "sft-dpo", "sft-ppo", "all-grpo", "ppo-grpo"] = option(
        "比哪几个模型", "all"
    )
    preset: Literal["auto", "tiny", "full"] = option(
        "比哪一组结果：outputs/tiny 或 outputs/full；auto：哪一组齐全用哪一组，先看 full", "auto"
    )
    output_root: str | None = option("各阶段的结果所在的文件夹；默认 outputs/<预设>，在脚本所在的文件夹里")
    models: list[str] = field(
        default_factory=list,
        metadata={
            "help": "换掉某个模型：名字=路径或 hub 名，名字是 base、sft、dpo、ppo、grpo、reward，可写几个"
        },
    )
    dataset: str | None = option(
        "题目：tiny_world、hub 名、本地文件夹或文件；默认是训练 PPO（或 DPO）时留出的"
    )
    max_eval_samples: int = option("最多问几道题", 500)
    max_length: int = option("提示最多多少个 token；更长的题不用，并报告有几道", 512)
    max_new_tokens: int | None = option("一个回答最多多少个 token；小世界固定是 32")
    seed: int = option("采样的种子", 0)
    samples: int = option("在终端里显示几道题的回答", 6)
    source: Literal["hf", "modelscope"] = option("hub 名从哪里下载", "hf")
    output_dir: str | None = option("结果写到哪里；默认是各阶段旁边的 compare（--mode all）或 compare-<mode>")
    retrain: bool = option("不用已有的比较结果，重新比", False)


# ---------------------------------------------------------------- 1. 量一个模型


def ask(model, tokenizer, questions: list[dict], settings: CompareSettings) -> tuple[dict, list[dict]]:
    """让模型回答每道题 → (指标, 温度 1 采样的回复)。题目带标准答案的，回复里有程序的评语 verdict。"""
    if "sentence" in questions[0]:
        metrics, _, replies = measure_chat(model, tokenizer, questions, seed=settings.seed)
        for question, reply in zip(questions, replies, strict=True):
            reply["verdict"] = asdict(judge(question, reply["text"], reply["ended"]))
        return metrics, replies
    replies = reply_to(
        model, tokenizer, questions, settings.max_new_tokens, temperature=1.0, seed=settings.seed
    )
    texts = [reply["text"] for reply in replies]
    metrics = {
        "n": len(questions),
        "ended_rate": sum(reply["ended"] for reply in replies) / len(replies),
        "mean_chars": sum(map(len, texts)) / len(texts),
        "distinct_2": distinct_n(texts),
    }
    return metrics, replies


def measure(name: str, path: str, helpers: dict, questions: list[dict], settings: CompareSettings):
    """一个模型的全部指标：回答的好坏、奖励模型的分、离 SFT 多远。→ (指标, 回复)"""
    tokenizer, model = load_causal_lm(path)
    model.to(pick_device()).eval()
    metrics, replies = ask(model, tokenizer, questions, settings)
    if "reward" in helpers:
        scores = score_replies(helpers["reward"], tokenizer, questions, replies)
        metrics["reward_mean"] = scores.mean().item()
        metrics["reward_std"] = scores.std().item() if len(scores) > 1 else 0.0  # 只有一题
        for reply, score in zip(replies, scores.tolist(), strict=True):
            reply["reward"] = round(score, 4)
    if path == helpers.get("sft_path"):
        metrics["kl_to_sft"] = 0.0  # 自己对自己
    elif "sft" in helpers:
        metrics["kl_to_sft"] = token_kl(model, helpers["sft"], tokenizer, questions, replies)
    return metrics, replies


# ---------------------------------------------------------------- 2. 几个模型，同样的题


def compare(names: tuple[str, ...], found: dict, questions: list[dict], settings: CompareSettings):
    """→ (模型 → 指标, 每道题与各模型的回答)"""
    helpers: dict = {}
    if "reward" in found:
        tokenizer = load_tokenizer(found["reward"]["path"])
        reward = load_reward_model(found["reward"]["path"], tokenizer)
        helpers["reward"] = reward.to(pick_device()).eval()
    if "sft" in found:
        helpers["sft"] = load_causal_lm(found["sft"]["path"])[1].to(pick_device()).eval()
        helpers["sft_path"] = found["sft"]["path"]
    metrics: dict[str, dict] = {}
    answered = [question | {"replies": {}} for question in questions]
    for name in names:
        started = time.perf_counter()
        metrics[name], replies = measure(name, found[name]["path"], helpers, questions, settings)
        for question, reply in zip(answered, replies, strict=True):
            question["replies"][name] = {k: v for k, v in reply.items() if k != "ids"}
        print(f"  {MODELS[name]} 回答了 {len(questions)} 道题（{time.perf_counter() - started:.1f} 秒）")
    return metrics, answered


def save(folder: RunFolder, record: dict, answered: list[dict]) -> dict:
    """run.json 是指标、设置和几道题的样例；compare.json 是每一道题、每个模型的回答，一题一行。"""

    def write(path: Path) -> None:
        lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in answered)
        (path / "compare.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")

    return folder.finish(write, record)


# ---------------------------------------------------------------- 3. 主程序


def finished(folder: RunFolder, wanted: dict) -> dict | None:
    """同样的模型、同样的题比过了，就用它；变了就说出变了什么，重新比（只要几秒，不必让人加 --retrain）。"""
    run = load_run(folder.path)
    if run and (changed := differences(run["fingerprint"], wanted)):
        print("已有的比较结果与这次不同，重新比：\n  " + "\n  ".join(changed))
        return None
    if run:
        print(f"已有比较结果，直接加载：{folder.path}（--retrain 重新比）")
    return run


def main(argv: list[str] | None = None) -> dict:
    settings = parse_arguments(CompareSettings, argv)
    if min(settings.max_eval_samples, settings.max_length) < 1:
        raise UserError("--max_eval_samples 和 --max_length 要是正整数。")
    names, given = MODES[settings.mode], parse_models(settings.models)
    root, preset = find_root(settings, names, given)
    found = find_models(names, given, root, preset, settings.source)
    questions, source = load_questions(settings, found)
    tokenizer = check_same_vocab(found)
    questions = drop_long(
        questions, lambda q: len(prompt_ids(tokenizer, q["messages"])), settings.max_length, "题目"
    )

    wanted = {f"model_{name}": f"{each['stage']}:{each['id']}" for name, each in found.items()}
    wanted |= {k: getattr(settings, k) for k in ("mode", "max_length", "max_new_tokens", "seed")} | source
    folder_name = "compare" if settings.mode == "all" else f"compare-{settings.mode}"
    out = Path(settings.output_dir or root / folder_name).expanduser().resolve()
    with open_run(out) as folder:
        record = None if settings.retrain else finished(folder, wanted)
        if record is None:
            started = time.time()
            print(f"题目 {source['dataset']}（{len(questions)} 道），设备 {describe(pick_device())}")
            metrics, answered = compare(names, found, questions, settings)
            record = {
                "stage": "compare",
                "parent": {
                    name: {k: each[k] for k in ("path", "stage", "id")} for name, each in found.items()
                },
                "data": source,
                "settings": asdict(settings),
                "fingerprint": wanted,
                "versions": library_versions(),
                "device": describe(pick_device()),
                "seconds": round(time.time() - started, 1),
                "peak_memory_mb": peak_memory_mb(),
                "metrics": metrics,
                "samples": answered[:N_SAMPLES],
            }
            record = save(folder, record, answered)
        answered = json.loads((out / "compare.json").read_text(encoding="utf-8"))
    console = Console()
    show_samples(console, record["samples"][: settings.samples])
    lengths = {name: [len(row["replies"][name]["text"]) for row in answered] for name in names}
    show_lengths(console, lengths)
    show_metrics(console, record["metrics"])
    print(f"全部回答在 {out / 'compare.json'}（{record['seconds']:.0f} 秒）")
    return record


if __name__ == "__main__":
    run_main(main)
