"""选择题评测：C-Eval、CMMLU、MMLU-Pro、GPQA 的文件，lm-evaluation-harness 的任务 yaml，和自带的三套题。

你会学到
  1. 同一个模型、同样的题，三种问法是三个分数：比字母的概率，比选项全文的概率，让它写出来再从话里找答案。
  2. 先看瞎猜线：四个选项，25% 是什么也不会；小模型按字母答，多半就在这条线上，按全文答却会。
  3. 选项换个次序，答案就变了：每个选项在每个位置上各站一次，看模型偏爱哪个字母，几次选的是不是同一个。
  4. 每个分数有区间；两个模型答同样的题，一道一道地相减，差的标准误比各算各的小。

怎么运行
  python benchmarks_mc.py                                                # 小世界的阅读题、常识题，链上的三个模型
  python benchmarks_mc.py --models smollm2 --benchmarks knowledge_en     # 真的权重（135M），不联网
  python benchmarks_mc.py --models 模型文件夹 --benchmarks ceval/val --shots 5 --shots_file ceval/dev
  python benchmarks_mc.py --models sft --benchmarks 任务.yaml            # 与 lm_eval 的分数逐位相同
  python benchmarks_mc.py --check_contamination 训练数据.jsonl            # 题在不在训练数据里，一道一道地说

应当看到（tiny，实测见本文件夹的 README.md）：小世界的题，SFT 的模型按全文几乎全对，按字母和瞎猜一样；常识题它没学过，怎样问都是瞎猜。

参考：Hendrycks et al. 2021（MMLU）；Huang et al. 2023（C-Eval）；Zheng et al. 2024（选项的位置偏好）；Biderman et al. 2024（lm-eval）。
"""

from nlp_common.base.cli import run_main

import dataclasses
import json
import math
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from answering import Answerer, find_answerer, load_answerer, split_names
from contamination import check_questions
from mc_prompts import WORDINGS, extract, language_of, letter_ask, reply_prompt, text_ask
from mc_questions import LETTERS, Question, example_questions, load_questions, reordered, rotations
from mc_report import METHODS, compare, draw, report
from mc_score import log_likelihoods, too_long
from mc_tasks import Item, build_items, load_task, skipped_metrics
from nlp_common.base.arguments import COUNT, NOT_NEGATIVE, option
from nlp_common.base.errors import UserError
from nlp_common.data.rows import data_sha256
from nlp_common.lm.generation import generate
from nlp_common.lm.replies import reply_of
from nlp_common.train.lesson import run_part
from nlp_common.train.settings import LessonSettings, parse_settings
from nlp_common.train.stage import Stage
from results import item, run_evaluation, write_result

HOME = Path(__file__).resolve().parent
PRESETS = {
    "tiny": {"models": "pretrain,sft,dpo", "benchmarks": "world,knowledge_zh", "limit": 200},
    "full": {"models": "Qwen/Qwen1.5-0.5B-Chat", "benchmarks": "knowledge_zh,knowledge_en", "limit": 100_000},
}
CHAT_STAGES = ("sft", "dpo", "ppo", "grpo")
TASK_FILES = (".yaml", ".yml")  # lm_eval 的任务


@dataclass
class ChoiceSettings(LessonSettings):
    models: str | None = option("评谁，逗号隔开：链的阶段（sft、dpo …）、本地文件夹、hub 名、smollm2")
    benchmarks: str | None = option(
        "哪些题，逗号隔开：world、knowledge_zh、knowledge_en、题目的文件或文件夹、lm_eval 的任务 yaml"
    )
    methods: str = option("怎样问，逗号隔开：letter、text、generate", "letter,text,generate")
    shots: int | None = option("题目前面放几道例题；默认 0，任务 yaml 的照它写的", None, NOT_NEGATIVE)
    shots_file: str | None = option("例题的文件或文件夹；自带的题有自带的例题")
    dataset: str | None = option("任务 yaml 的题在本地的哪里；默认照 yaml 写的")
    limit: int | None = option("每套题最多几道", None, COUNT)
    chat: Literal["auto", "yes", "no"] = option(
        "用不用聊天模板；auto：链上 SFT 以后的模型用，别的比概率时直接续写（与 lm_eval 相同），生成时用",
        "auto",
    )
    rotate: bool = option("按字母时，每个选项在每个位置上各站一次，量位置偏好", True)
    bad_rows: Literal["stop", "skip"] = option("写坏了的题：stop 停下来说，skip 说了就跳过", "stop")
    check_contamination: str | None = option("训练数据的文件或文件夹：查每道题的 n 元组在不在里面")
    max_new_tokens: int = option("生成最多几个 token", 32, COUNT)
    source: Literal["hf", "modelscope"] = option("hub 名从哪里下载", "hf")

    def check(self) -> None:
        names = [short_name(name) for name in split_names(self.models)]
        if len(set(names)) < len(names):
            raise UserError(
                f"--models 里有两个文件夹都叫 {'、'.join(sorted({n for n in names if names.count(n) > 1}))}，改个名字才分得清。"
            )
        asked = [name.strip() for name in self.benchmarks.split(",") if name.strip()]
        if not asked:
            raise UserError("--benchmarks 里没有题：例如 world,knowledge_zh，或题目的文件。")
        if self.dataset and not any(Path(name).suffix in TASK_FILES for name in asked):
            raise UserError(
                "--dataset 是任务 yaml 的题在哪里；自己的题写在 --benchmarks 里，例如 --benchmarks 题.jsonl。"
            )
        titles = [title_of(name) for name in asked]
        if repeated := sorted({title for title in titles if titles.count(title) > 1}):
            raise UserError(
                f"--benchmarks 里有两套题都叫 {'、'.join(repeated)}：结果文件会互相盖掉，改个名字。"
            )
        if unknown := {name or "（空的）" for name in self.methods.split(",")} - set(METHODS):
            raise UserError(f"--methods 不认识 {'、'.join(sorted(unknown))}，可以是 {'、'.join(METHODS)}。")
        if self.shots_file and not self.shots:
            raise UserError("--shots_file 要与 --shots 一起给：放几道例题。")


# ---------------------------------------------------------------- 1. 一套题


@dataclass
class Benchmark:
    """一套题：自己读的是 questions，任务 yaml 的是 items。"""

    name: str
    questions: list[Question]
    shots: list[Question]
    items: list[Item]

    @property
    def chance(self) -> float:
        """瞎猜：每道题 1 ÷ 选项个数，平均。"""
        sizes = [len(each.options) for each in self.questions] or [len(each.choices) for each in self.items]
        return sum(1 / size for size in sizes) / len(sizes)


def title_of(name: str) -> str:
    """一套题在表里、结果文件里叫什么：不带后缀的文件名，或文件夹的名字。"""
    return Path(name).stem if Path(name).suffix else Path(name).name


def read_benchmark(name: str, settings: ChoiceSettings) -> Benchmark:
    short = title_of(name)
    if Path(name).suffix in TASK_FILES:
        task = load_task(name)
        if skipped := skipped_metrics(task):
            print(f"{name} 要的 {'、'.join(skipped)} 这里不量，量 acc、acc_norm、acc_bytes。")
        return Benchmark(short, [], [], build_items(task, settings.shots, settings.limit, settings.dataset))
    questions, faults = load_questions(name, settings.seed, settings.limit)
    if faults and settings.bad_rows == "stop":
        raise UserError(
            f"{name} 里有 {len(faults)} 道写坏了的题（跳过它们：--bad_rows skip）：\n  "
            + "\n  ".join(faults[:5])
        )
    if faults:
        print(f"跳过 {name} 里写坏了的 {len(faults)} 道题：\n  " + "\n  ".join(faults[:5]))
    shots = example_questions(settings.shots_file or name, settings.seed) if settings.shots else []
    if len(shots) < (settings.shots or 0):
        raise UserError(f"要 {settings.shots} 道例题，{settings.shots_file or name} 里只有 {len(shots)} 道。")
    return Benchmark(short, questions, shots, [])


def shots_of(question: Question, pool: list[Question], n: int) -> list[Question]:
    """这道题的例题：同一学科的开头 n 道；同学科的不够，就用别的补，不用它自己。"""
    others = [each for each in pool if each.text != question.text]
    same = [each for each in others if each.group == question.group]
    return (same + [each for each in others if each not in same])[:n]


# ---------------------------------------------------------------- 2. 一个模型答一套题


def evaluate(answerer: Answerer, benchmark: Benchmark, settings: ChoiceSettings) -> list[dict]:
    """→ 每道题一项（results.item）：各种问法对不对。"""
    if benchmark.items:
        return task_scores(answerer, benchmark.items)
    stage = answerer.id.split(":")[0]
    chat = settings.chat == "yes" or (settings.chat == "auto" and stage in CHAT_STAGES)
    questions, wording = benchmark.questions, WORDINGS[language_of(benchmark.questions)]
    shots = [shots_of(each, benchmark.shots, settings.shots or 0) for each in questions]
    rows = [{"scores": {}, "answer": ""} for _ in questions]
    methods = settings.methods.split(",")
    if "letter" in methods:
        by_letter(answerer, questions, shots, wording, chat, settings.rotate, rows)
    if "text" in methods:
        asks = [
            text_ask(answerer.tokenizer, each, its, wording, chat)
            for each, its in zip(questions, shots, strict=True)
        ]
        warn_if_long(answerer, asks)
        for row, question, logps in zip(
            rows, questions, log_likelihoods(answerer.model, answerer.tokenizer, asks), strict=True
        ):
            for name, picked in picks(logps, question.options).items():
                row["scores"][f"text_{name}"] = float(picked == question.answer)
    if "generate" in methods:
        talks = chat or (settings.chat == "auto" and stage not in ("base", "pretrain"))
        by_reply(answerer, questions, shots, wording, talks, settings.max_new_tokens, rows)
    return [
        item(
            each.id,
            row["scores"],
            prompt=f"{each.text}\n" + "\n".join(map("{}. {}".format, LETTERS, each.options)),
            answer=row["answer"],
            right=f"{LETTERS[each.answer]}. {each.options[each.answer]}",
            group=each.group,
        )
        for each, row in zip(questions, rows, strict=True)
    ]


def picks(logps: list[float], options: list[str]) -> dict[str, int]:
    """三种比法各选哪个：概率本身；除以几个字；除以几个字节。不除，长的选项总吃亏。并列的选前面的。"""
    per_char = [logp / len(text) for logp, text in zip(logps, options, strict=True)]
    per_byte = [logp / len(text.encode("utf-8")) for logp, text in zip(logps, options, strict=True)]
    return {
        name: values.index(max(values))
        for name, values in zip(("acc", "acc_norm", "acc_bytes"), (logps, per_char, per_byte), strict=True)
    }


def by_letter(answerer, questions, shots, wording, chat, rotate: bool, rows: list[dict]) -> None:
    """按字母；rotate：每题问 n 次，每次转一格，第 0 次是原来的次序。"""
    asks, orders = [], []
    for question, its in zip(questions, shots, strict=True):
        turns = rotations(question) if rotate else rotations(question)[:1]
        orders.append(turns)
        asks += [
            letter_ask(answerer.tokenizer, reordered(question, turn), its, wording, chat) for turn in turns
        ]
    warn_if_long(answerer, asks)
    found = iter(log_likelihoods(answerer.model, answerer.tokenizer, asks))
    for row, question, turns in zip(rows, questions, orders, strict=True):
        n = len(question.options)
        total, chosen = [0.0] * n, []
        for turn in turns:
            logps = next(found)  # (n,)：第 i 个位置的字母
            place = logps.index(max(logps))
            chosen.append((place, turn[place]))
            norm = math.log(sum(math.exp(each - max(logps)) for each in logps)) + max(logps)
            for i, logp in enumerate(logps):
                total[turn[i]] += logp - norm
        row["scores"]["letter_acc"] = float(chosen[0][1] == question.answer)
        row["positions"] = [place for place, _ in chosen]
        if rotate:
            right = [option == question.answer for _, option in chosen]
            row["scores"]["letter_rotated_acc"] = sum(right) / n
            row["scores"]["letter_averaged_acc"] = float(total.index(max(total)) == question.answer)
            row["scores"]["letter_same"] = float(len({option for _, option in chosen}) == 1)
            if n == 4:
                for place, letter in enumerate("ABCD"):
                    row["scores"][f"picks_{letter}"] = row["positions"].count(place) / n


def by_reply(answerer, questions, shots, wording, chat, max_new_tokens: int, rows: list[dict]) -> None:
    prompts = [
        reply_prompt(answerer.tokenizer, each, its, wording, chat)
        for each, its in zip(questions, shots, strict=True)
    ]
    replies = generate(answerer.model, answerer.tokenizer, prompts, max_new_tokens)
    for row, question, ids in zip(rows, questions, replies, strict=True):
        row["answer"] = reply_of(answerer.tokenizer, ids)["text"]
        picked = extract(row["answer"], question.options)
        row["scores"]["generate_acc"] = float(picked == question.answer)
        row["scores"]["generate_answered"] = float(picked is not None)


def task_scores(answerer: Answerer, items: list[Item]) -> list[dict]:
    """任务 yaml 的题：acc、acc_norm、acc_bytes，与 lm_eval 的相同。"""
    warn_if_long(answerer, [each.ask for each in items])
    found = log_likelihoods(answerer.model, answerer.tokenizer, [each.ask for each in items])
    rows = []
    for each, logps in zip(items, found, strict=True):
        chosen = picks(logps, each.choices)
        scores = {f"text_{name}": float(place in each.gold) for name, place in chosen.items()}
        right = "、".join(each.choices[place] for place in each.gold)
        rows.append(item(each.id, scores, each.text, each.choices[chosen["acc"]], right))
    return rows


def warn_if_long(answerer: Answerer, asks: list) -> None:
    if cut := too_long(answerer.tokenizer, answerer.model, asks):
        print(f"{answerer.name}：{cut} 道题长过模型的上下文，从左边截掉（例题先没了）。")


# ---------------------------------------------------------------- 3. 从头到尾


def answer(part: Stage, model: str, benchmark: Benchmark, loaded: dict[str, Answerer]) -> dict:
    """一个模型答一套题；换了模型才重新载入，中断以前答完的不再答。"""
    if model not in loaded:
        loaded.clear()
        loaded[model] = load_answerer(model, part.settings.source)
    print(f"{model} 答 {benchmark.name} …")
    items = evaluate(loaded[model], benchmark, part.settings)
    return {"items": json.dumps(items, ensure_ascii=False), "model_id": loaded[model].id}


def short_name(model: str) -> str:
    """表里、结果文件里的名字：路径只留最后一段，hub 名的 / 换掉。"""
    return Path(model).name if Path(model).is_dir() else re.sub(r"[\\/:]", "_", model)


def learn(stage: Stage) -> dict:
    settings: ChoiceSettings = stage.settings
    names = [name.strip() for name in settings.benchmarks.split(",") if name.strip()]
    benchmarks = [read_benchmark(name, settings) for name in names]
    contaminated = {}
    if settings.check_contamination:
        for benchmark in benchmarks:
            texts = {each.id: each.text for each in [*benchmark.questions, *benchmark.items]}
            contaminated[benchmark.name] = check_questions(texts, settings.check_contamination)
    answered: dict[str, dict[str, list[dict]]] = {each.name: {} for each in benchmarks}
    ids: dict[str, str] = {}
    loaded: dict[str, Answerer] = {}
    for model in split_names(settings.models):
        for benchmark in benchmarks:
            work = partial(answer, model=model, benchmark=benchmark, loaded=loaded)
            part = run_part(stage, f"{short_name(model)}--{benchmark.name}", work)
            answered[benchmark.name][short_name(model)] = json.loads(part["items"])
            ids[short_name(model)] = part["model_id"]
    metrics = {}
    for benchmark in benchmarks:
        for items in answered[benchmark.name].values():
            for each in items if benchmark.name in contaminated else []:
                each["scores"]["contaminated"] = float(contaminated[benchmark.name][each["id"]].found)
        metrics[benchmark.name] = report(
            benchmark.name, benchmark.chance, answered[benchmark.name], settings.seed
        )
        if len(answered[benchmark.name]) > 1:
            metrics[benchmark.name]["paired"] = compare(answered[benchmark.name], settings.seed)

    def write(folder: Path) -> None:
        for name, models in answered.items():
            for model, items in models.items():
                write_result(
                    folder,
                    name,
                    model,
                    items,
                    model_id=ids[model],
                    seed=settings.seed,
                    settings=dataclasses.asdict(settings),
                )
        draw(folder, metrics)

    data = {name: {"name": name, "sha256": data_sha256(name)} for name in names}
    return stage.save(metrics, data, write)


def main(argv: list[str] | None = None) -> dict:
    settings = parse_settings(ChoiceSettings, PRESETS, argv)
    found = {name: find_answerer(name, settings.source) for name in split_names(settings.models)}
    files = [
        *settings.benchmarks.split(","),
        settings.shots_file,
        settings.dataset,
        settings.check_contamination,
    ]
    more = {f"{name}_id": f"{each['stage']}:{each['id']}" for name, each in found.items()}
    more |= {f"{name}_sha256": mark for name in files if (mark := data_sha256(name))}
    return run_evaluation("benchmarks_mc", HOME, settings, learn, **more)


if __name__ == "__main__":
    run_main(main)
