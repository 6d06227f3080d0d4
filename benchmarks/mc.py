"""选择题评测的快慢：evaluation/mc_score.py 与 lm-evaluation-harness 0.4.13 的 HFLM，同一个任务、同一份权重，轮流跑，打印一行 JSON。

    python benchmarks/mc.py                                        # 链上的 SFT 小模型，175 道常识题
    python benchmarks/mc.py --model smollm2 --language en          # 真的权重
    python benchmarks/mc.py --how letter --shots 5                 # 按字母、五道例题：例题的 KV 只算一次
    python benchmarks/mc.py --record mc_text

要另装：pip install lm_eval==0.4.13。先比对错：每道题每个选项的对数概率、acc、acc_norm、acc_bytes 都要一样，不一样就说出来、退出码 1。
lm_eval 的批各试一遍（--batch_sizes），比的是它最快的那一种；只计读完题以后：分词、前向、选答案，两边都算。
ratio 是 它的秒数 ÷ 我们的，各轮比值的中位数；ratio_apart 是我们自己一个选项一行地算，慢多少。
"""

from __future__ import annotations

from nlp_common.base.cli import run_main

import argparse
import contextlib
import io
import json
import logging
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from nlp_common.base.errors import UserError
from nlp_common.data.files import read_file
from nlp_common.lm.loading import load_causal_lm
from nlp_common.train.chain import chain_model

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "evaluation"))
from benchmarks_mc import HOME, picks
from mc_score import log_likelihoods
from mc_tasks import build_items, load_task

SCORES = ("acc", "acc_norm", "acc_bytes")
TASKS = {
    "text": {
        "zh": ("{{question}}\\n答案：", "{{[A, B, C, D]}}"),
        "en": ("Question: {{question}}\\nAnswer:", "{{[A, B, C, D]}}"),
    },
    "letter": {
        "zh": ("{{question}}\\nA. {{A}}\\nB. {{B}}\\nC. {{C}}\\nD. {{D}}\\n答案：", "[A, B, C, D]"),
        "en": ("{{question}}\\nA. {{A}}\\nB. {{B}}\\nC. {{C}}\\nD. {{D}}\\nAnswer:", "[A, B, C, D]"),
    },
}


def write_task(folder: Path, how: str, language: str, limit: int | None) -> Path:
    """自带的题写成 lm_eval 读的任务。"""
    rows = list(read_file(HOME / f"knowledge_{language}.jsonl"))
    parts = {"dev": [row for row in rows if row["subject"] == "例题"]}
    parts["test"] = [row for row in rows if row["subject"] != "例题"][:limit]
    for split, its in parts.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in its)
        (folder / f"{split}.jsonl").write_text(text, encoding="utf-8")
    text, choices = TASKS[how][language]
    task = folder / "mc_speed.yaml"
    task.write_text(
        f"""task: mc_speed
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{folder}/test.jsonl", dev: "{folder}/dev.jsonl"}}}}
output_type: multiple_choice
test_split: test
fewshot_split: dev
fewshot_config: {{sampler: first_n}}
doc_to_text: "{text}"
doc_to_choice: {json.dumps(choices) if choices.startswith("{") else choices}
doc_to_target: "{{{{['A', 'B', 'C', 'D'].index(answer)}}}}"
metric_list:
"""
        + "".join(f"  - {{metric: {name}, aggregation: mean, higher_is_better: true}}\n" for name in SCORES),
        encoding="utf-8",
    )
    return task


def load_harness(model, tokenizer, task: Path, shots: int):
    """lm_eval 的任务与模型：(它的任务, 函数：批 → HFLM)。"""
    try:
        from lm_eval.api.task import ConfigurableTask
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks._yaml_loader import load_yaml
    except ImportError as error:
        raise UserError("要与 lm_eval 比，先装它：pip install lm_eval==0.4.13") from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    import datasets

    datasets.disable_progress_bars()
    datasets.config.HF_DATASETS_CACHE = task.parent / "cache"
    theirs = ConfigurableTask(config=load_yaml(task) | {"num_fewshot": shots})
    return theirs, lambda batch: HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch, device="cpu")


def their_run(theirs, lm) -> tuple[list[list[float]], dict[str, float]]:
    """拼题面、算对数概率、算分，与 lm_eval 的 evaluate 里做的相同。"""
    theirs.set_fewshot_seed(1234)
    theirs.build_all_requests(limit=None, rank=0, world_size=1)
    answers = iter(lm.loglikelihood(theirs.instances, disable_tqdm=True))
    by_doc: dict[int, list] = {}
    for instance in theirs.instances:
        by_doc.setdefault(instance.doc_id, []).append(next(answers))
    docs = list(theirs.test_docs())
    scores = [theirs.process_results(docs[number], pairs) for number, pairs in by_doc.items()]
    means = {name: sum(each[name] for each in scores) / len(scores) for name in SCORES}
    return [[float(logp) for logp, _ in pairs] for pairs in by_doc.values()], means


def our_run(model, tokenizer, config: dict, shots: int, share: bool):
    items = build_items(dict(config), shots)
    found = log_likelihoods(model, tokenizer, [each.ask for each in items], share)
    right = dict.fromkeys(SCORES, 0)
    for each, logps in zip(items, found, strict=True):
        for name, place in picks(logps, each.choices).items():
            right[name] += place in each.gold
    return found, {name: total / len(items) for name, total in right.items()}


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", help="本地文件夹、hub 名或 smollm2；默认是链上的 SFT 小模型")
    parser.add_argument("--how", choices=TASKS, default="text", help="按选项的全文，或按字母")
    parser.add_argument("--language", choices=["zh", "en"], default="zh")
    parser.add_argument("--shots", type=int, default=0, help="几道例题（至多 5）")
    parser.add_argument("--limit", type=int, help="几道题")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch_sizes", default="1,8,32", help="lm_eval 的批试哪几种")
    parser.add_argument("--record", metavar="名字", help="记进 docs/measurements/evaluation.jsonl")
    settings = parser.parse_args(argv)
    if settings.rounds < 1 or not 0 <= settings.shots <= 5 or (settings.limit or 1) < 1:
        parser.error("--rounds、--limit 要是正整数，--shots 在 0 到 5 之间")
    tokenizer, model = load_causal_lm(chain_model("sft", settings.model)["path"])
    model.eval()
    batches = [int(size) for size in settings.batch_sizes.split(",")]
    seconds: dict[str, list[float]] = {name: [] for name in ["ours", "apart", *map(str, batches)]}
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        task = write_task(Path(folder), settings.how, settings.language, settings.limit)
        config = load_task(task)
        theirs, make = load_harness(model, tokenizer, task, settings.shots)
        harnesses = {str(size): make(size) for size in batches}
        our_run(model, tokenizer, config, settings.shots, True)  # 热身
        for _ in range(settings.rounds):
            for name in seconds:
                started = time.perf_counter()
                if name in harnesses:
                    with contextlib.redirect_stderr(io.StringIO()):  # 它的进度条
                        results[name] = their_run(theirs, harnesses[name])
                else:
                    results[name] = our_run(model, tokenizer, config, settings.shots, name == "ours")
                seconds[name].append(time.perf_counter() - started)
    best = min(map(str, batches), key=lambda size: statistics.median(seconds[size]))
    ours, wanted = results["ours"], results[best]
    off = max(abs(a - b) for x, y in zip(ours[0], wanted[0], strict=True) for a, b in zip(x, y, strict=True))
    n = len(ours[0])

    def ratio(name: str) -> float:
        return round(statistics.median(b / a for a, b in zip(seconds["ours"], seconds[name], strict=True)), 2)

    row = {
        "questions": n,
        "questions_per_s": round(n / statistics.median(seconds["ours"]), 1),
        "lm_eval_questions_per_s": round(n / statistics.median(seconds[best]), 1),
        "lm_eval_batch": int(best),
        "ratio": ratio(best),
        "ratio_apart": ratio("apart"),
        "max_logp_difference": off,
        "same": float(ours[1] == wanted[1]),
        **{name: value for name, value in ours[1].items()},
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(row))
    if ours[1] != wanted[1] or off > 1e-3:
        print(f"两边不一样：{ours[1]}，lm_eval {wanted[1]}，对数概率最多差 {off:.2g}。", file=sys.stderr)
        sys.exit(1)
    if settings.record:
        from nlp_common.base.measurements import record

        record("evaluation", {settings.record: row}, seed=0)
    return row


if __name__ == "__main__":
    run_main(main)
