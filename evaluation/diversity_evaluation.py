"""多样性：同一道题问许多遍，说法有几种；对齐之后少了多少，换来了什么。

你会学到
  1. 四把尺：distinct-n（字组重不重复）、self-BLEU（答案之间像不像）、熵（模型自己有多犹豫）、
     不同的正确答案有几种。前三把量不出对错：胡说八道最"多样"，所以要和对错一起看。
  2. 少抽几次，看到的种数一定少。各模型都从 K 个回答估计"抽 m 个，平均看得到几种"，才公平（与 pass@k 同一个式子）。
  3. 温度越高越多样、也越容易错。要比多样性，先把各模型调到同样的正确率上。
  4. 对齐（DPO、PPO、GRPO）把概率集中到评分高的那几种说法上：又对又有礼的多了，说法少了。把两样画在一张图上。

怎么运行
  python diversity_evaluation.py                                  # SFT、DPO、PPO、GRPO，小世界的题
  python diversity_evaluation.py --models sft,dpo --questions 200
  python diversity_evaluation.py --models smollm2 --dataset 我的题.jsonl --max_new_tokens 40   # 只量多样，不量对错

应当看到（tiny，实测见本文件夹的 README.md）：温度 1 时，对齐之后熵、不同的答案都少了，self-BLEU 升了，而又对又有礼的从
四分之一升到九成以上。但先把正确率调到一样再数，不同的正确答案并没有变少：SFT 多出来的那些说法里，许多是错的。

参考：Li et al. 2016（distinct-n）；Zhu et al. 2018（Texygen，self-BLEU）；Hurlbert 1971（稀疏化：m 个里有几种）；
Kirk et al. 2024（arXiv 2310.06452，RLHF 减少多样性）。
"""

from nlp_common.base.cli import run_main

import itertools
import math
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from answering import Answerer, as_text, find_answerer, load_answerer, replies, split_names
from contamination import check_questions
from nlp_common.base.arguments import COUNT, SHARE, option
from nlp_common.base.console import padded, width
from nlp_common.base.errors import UserError
from nlp_common.base.intervals import mean_interval, paired_difference
from nlp_common.data.rows import check_path, data_sha256
from nlp_common.draw.figures import render
from nlp_common.draw.plots import COLORS
from nlp_common.lm.chatml import prompt_ids
from nlp_common.lm.generation import batches_by_length, pad_left, padded_positions, sampling_weights
from nlp_common.lm.replies import MAX_REPLY, distinct_n
from nlp_common.tiny import world
from nlp_common.tiny.judge import judge
from nlp_common.train.lesson import run_part
from nlp_common.train.settings import LessonSettings, parse_settings
from nlp_common.train.stage import Stage
from question_files import read_questions
from results import file_name, item, run_evaluation, write_result
from text_metrics import bleu, bleu_counts, split_char

HOME = Path(__file__).resolve().parent
PRESETS = {
    "tiny": {"models": "sft,dpo,ppo,grpo", "questions": 60, "samples": 16, "max_new_tokens": MAX_REPLY},
    "full": {"models": "Qwen/Qwen1.5-0.5B-Chat", "questions": 100, "samples": 16, "max_new_tokens": 128},
}
NAMES = {
    "right": "答对",
    "preferred": "对、整、有礼",
    "different_right": "不同的正确答案",
    "different": "不同的答案",
    "distinct_1": "distinct-1",
    "distinct_2": "distinct-2",
    "self_bleu": "self-BLEU",
    "entropy": "熵（nats）",
}


@dataclass
class DiversitySettings(LessonSettings):
    models: str | None = option("比哪几个：链的阶段（sft、dpo …）、本地文件夹、hub 名或 smollm2，用逗号隔开")
    source: str = option("hub 名从哪里下载", "hf", choices=("hf", "modelscope"))
    dataset: str | None = option(
        "自己的题：json、jsonl、csv、tsv、parquet，一行一个 prompt；默认是小世界的留出题"
    )
    questions: int | None = option("几道题", limits=COUNT)
    samples: int | None = option("每道题问几遍（K）", limits=COUNT)
    draws: int = option("不同的答案有几种，按抽几个算（m，不超过 --samples）", 8, limits=COUNT)
    temperatures: str = option("各个温度，用逗号隔开；要有 1", "0.4,0.7,1.0,1.3,1.6")
    top_ps: str = option("温度 1 时，另外试的 top_p，用逗号隔开", "0.9,0.7")
    same_right: float = option("在哪个正确率上比不同的正确答案有几种", 0.95, SHARE)
    max_new_tokens: int | None = option("每个回答最多多少个 token", limits=COUNT)

    check_contamination: str | None = option("训练数据的文件或文件夹：查每道题的 n 元组在不在里面")

    def check(self) -> None:
        split_names(self.models)
        check_path(self.check_contamination, "--check_contamination")
        if self.draws > self.samples:
            raise UserError(f"--draws {self.draws} 比 --samples {self.samples} 还多：问了几遍，最多抽几个。")
        if (1.0, 1.0) not in sampling_grid(self):
            raise UserError("--temperatures 里要有 1：各模型是在温度 1 上写进结果文件的。")


# ---------------------------------------------------------------- 全貌


def main(argv: list[str] | None = None) -> dict:
    settings = parse_settings(DiversitySettings, PRESETS, argv)
    ids = {name: find_answerer(name, settings.source)["id"] for name in split_names(settings.models)}
    train = data_sha256(settings.check_contamination)
    return run_evaluation(
        "diversity_evaluation", HOME, settings, measure_models, ids=ids, check_contamination_sha256=train
    )


def measure_models(stage: Stage) -> dict:
    """每个模型、每种采样设置：每道题问 K 遍，量对错与多样；写结果文件、画图。"""
    settings = stage.settings
    questions = load_questions(settings)
    leaked = {}
    if settings.check_contamination:
        prompts = {f"q{place:04d}": as_text(q["messages"]) for place, q in enumerate(questions, 1)}
        leaked = check_questions(prompts, settings.check_contamination)
    grids: dict[str, dict[str, dict[str, float]]] = {}  # 模型 → 设置 → 各项的均值
    tables: dict[str, dict] = {}  # 模型 → 温度 1 时各题的分，和例子
    for name in split_names(settings.models):
        grids[name] = {}
        for temperature, top_p in tqdm(sampling_grid(settings), desc=name, leave=False, disable=None):
            work = partial(measure_one, name=name, questions=questions, temperature=temperature, top_p=top_p)
            key = f"t{temperature:g}" if top_p == 1 else f"p{top_p:g}"
            found = run_part(stage, f"{file_name(name)}-{key}", work)  # 断了，做完的设置不重做
            grids[name][key] = found["means"]
            if key == "t1":
                tables[name] = found
        print_grid(f"{name}：{len(questions)} 道题，每道问 {settings.samples} 遍", grids[name])

    metrics: dict = {"grid": grids, "at_same_right": {}, "lost": {}}
    judged = "right" in next(iter(tables.values()))["items"][0]["scores"]
    if judged:
        for name, grid in grids.items():
            metrics["at_same_right"][name] = at_quality(temperature_curve(grid), settings.same_right)
    metrics["lost"] = what_was_traded(tables)
    print_examples(questions[0], tables)

    def write(folder: Path) -> None:
        for name, table in tables.items():
            write_result(
                folder, "diversity", name, table["items"], model_id=table["id"], seed=settings.seed,
                settings={"samples": settings.samples, "draws": settings.draws, "temperature": 1.0},
                leaked=leaked,
            )  # fmt: skip
        draw_pictures(folder, grids, judged, settings.draws)

    return stage.save(metrics, {"name": settings.dataset or "tiny_world", "rows": len(questions)}, write)


def load_questions(settings: DiversitySettings) -> list[dict]:
    """小世界的留出题（程序判得了对错），或读者的题（只有 messages）。"""
    if not settings.dataset:
        return world.heldout_questions(settings.questions, settings.seed)
    rows = read_questions(settings.dataset, ("prompt",), settings.questions)
    return [{"messages": [{"role": "user", "content": str(row["prompt"])}]} for row in rows]


def sampling_grid(settings: DiversitySettings) -> list[tuple[float, float]]:
    """要试的 (温度, top_p)。"""
    grid = [(number, 1.0) for number in _numbers("--temperatures", settings.temperatures, above=0)]
    grid += [(1.0, number) for number in _numbers("--top_ps", settings.top_ps, above=0, at_most=1)]
    return list(dict.fromkeys(grid))


def _numbers(flag: str, text: str, above: float, at_most: float = math.inf) -> list[float]:
    parts = [part.strip() for part in text.replace("，", ",").split(",") if part.strip()]
    try:
        numbers = [float(part) for part in parts]
    except ValueError:
        raise UserError(f"{flag} 要写成 0.7,1.0 这样，用逗号隔开，给的是 {text!r}。") from None
    if not all(above < number <= at_most and math.isfinite(number) for number in numbers):
        limit = f"大于 {above:g}" + (f"、不大于 {at_most:g}" if at_most < math.inf else "")
        raise UserError(f"{flag} 里的数要{limit}，给的是 {text!r}。")
    return numbers


def measure_one(part: Stage, name: str, questions: list[dict], temperature: float, top_p: float) -> dict:
    """一个模型在一种采样设置下：各项的均值，每道题的分和头几个回答。"""
    settings = part.settings
    answerer = load_answerer(name, settings.source)
    groups = ask_many_times(answerer, questions, settings, temperature, top_p)
    entropies = answer_entropies(answerer, questions, groups, temperature, top_p)
    scores = [
        score_group(question, group, settings.draws) | {"entropy": entropy}
        for question, group, entropy in zip(questions, groups, entropies, strict=True)
    ]
    means = {key: sum(each[key] for each in scores) / len(scores) for key in scores[0]}
    return {"means": means, "id": answerer.id, "items": as_items(questions, groups, scores)}


def ask_many_times(
    answerer: Answerer, questions: list[dict], settings: DiversitySettings, temperature: float, top_p: float
) -> list[list[dict]]:
    """每道题问 K 遍 → 每道题 K 个回答。"""
    k = settings.samples
    asked = [question for question in questions for _ in range(k)]
    said = replies(answerer, asked, settings.max_new_tokens, temperature, top_p, settings.seed)
    return [said[start : start + k] for start in range(0, len(said), k)]


# ---------------------------------------------------------------- 四把尺


def score_group(question: dict, group: list[dict], draws: int) -> dict[str, float]:
    """一道题的 K 个回答 → 各项的分；小世界的题才有对错。"""
    texts = [reply["text"] for reply in group]
    scores: dict[str, float] = {}
    if "sentence" in question:
        verdicts = [judge(question, reply["text"], reply["ended"]) for reply in group]
        scores["right"] = sum(verdict.right for verdict in verdicts) / len(group)
        scores["preferred"] = sum(verdict.preferred for verdict in verdicts) / len(group)
        good = [text for text, verdict in zip(texts, verdicts, strict=True) if verdict.right]
        scores["different_right"] = expected_different(good, len(group), draws)
    scores["different"] = expected_different(texts, len(group), draws)
    scores["distinct_1"] = distinct_n(texts, 1)
    scores["distinct_2"] = distinct_n(texts, 2)
    scores["self_bleu"] = self_bleu(texts)
    return scores


def expected_different(answers: list[str], k: int, m: int) -> float:
    """从 K 个回答里不放回地抽 m 个，平均有几种 answers 里的答案（answers 是 K 个里要数的那些）。

    一种答案在 K 个里有 c 个，抽 m 个一个也没抽到的概率是 C(K−c, m)/C(K, m)：1 减去它，各种加起来。
    这与 pass@k 的无偏估计是同一个式子（Hurlbert 1971；Chen et al. 2021）。
    """
    missed = [math.comb(k - count, m) / math.comb(k, m) for count in Counter(answers).values()]
    return sum(1 - each for each in missed)


def self_bleu(texts: list[str]) -> float:
    """每个回答以其余的为参考算 BLEU（按字），取平均，0 到 1；越大，彼此越像。"""
    if len(texts) < 2:
        return 0.0
    total = 0.0
    counts = Counter(texts)
    for text, count in counts.items():
        others = [other for other in counts if other != text or count > 1]  # 参考重复几遍，BLEU 不变
        total += count * bleu(bleu_counts(text, others, split_char), short=True) / 100
    return total / len(texts)


@torch.no_grad()
def answer_entropies(
    answerer: Answerer,
    questions: list[dict],
    groups: list[list[dict]],
    temperature: float,
    top_p: float,
    batch_size: int = 32,  # 真的词表有几万个词，再大就要几 GB 内存
) -> list[float]:
    """每道题的回答的熵 H(回答 | 题)，nats：e^H 约是"一样常见的说法有几种"。

    H(回答) = E[Σ_t H(第 t 个 token | 前面的)]：对采样到的每个回答，把各步精确的熵加起来，再平均（熵的链式法则）。
    比"数一数 K 个回答里各种的频率再算熵"好：那样算，熵不会超过 ln K。
    """
    model, tokenizer = answerer.model, answerer.tokenizer
    asked = [
        (prompt_ids(tokenizer, q["messages"]), r["ids"])
        for q, g in zip(questions, groups, strict=True)
        for r in g
    ]
    entropies = torch.zeros(len(asked))
    for batch in batches_by_length([len(prompt) + len(reply) for prompt, reply in asked], batch_size):
        rows = [asked[i][0] + asked[i][1] for i in batch]
        ids, mask = pad_left(rows, tokenizer.pad_token_id, model.device)
        lengths = torch.tensor([len(asked[i][1]) for i in batch], device=model.device)
        width = int(lengths.max())
        logits = model(
            input_ids=ids, attention_mask=mask, position_ids=padded_positions(mask), use_cache=False,
            logits_to_keep=width + 1,
        ).logits[:, :-1]  # (B, width, V)：说每个 token 之前的  # fmt: skip
        weights = sampling_weights(logits, temperature, top_p)
        probs = weights / weights.sum(-1, keepdim=True)
        steps = torch.special.entr(probs).sum(-1)  # −p·ln p，p = 0 时是 0；(B, width)
        in_reply = torch.arange(width, device=model.device) >= width - lengths[:, None]
        entropies[batch] = (steps * in_reply).sum(-1).cpu()
    return entropies.view(len(questions), -1).mean(1).tolist()


# ---------------------------------------------------------------- 比


def temperature_curve(grid: dict[str, dict]) -> list[dict]:
    """各温度的一行，由低到高。"""
    keys = sorted((float(key[1:]), key) for key in grid if key.startswith("t"))
    return [{"temperature": temperature} | grid[key] for temperature, key in keys]


def at_quality(curve: list[dict], right: float) -> dict:
    """正确率降到 right 时的温度，和那里的多样：相邻两个温度之间按直线算。

    最低的温度就不到 right：没有这样的点，返回空的；最高的温度还在 right 以上：取最高的温度（reached 是 0）。
    """
    if curve[0]["right"] < right:
        return {}
    for low, high in itertools.pairwise(curve):
        if high["right"] < right:
            part = (low["right"] - right) / (low["right"] - high["right"])
            at = {key: low[key] + part * (high[key] - low[key]) for key in low}
            return {"temperature": at["temperature"], "different_right": at["different_right"], "reached": 1}
    last = curve[-1]
    return {"temperature": last["temperature"], "different_right": last["different_right"], "reached": 0}


def what_was_traded(tables: dict[str, dict]) -> dict:
    """温度 1 时，第二个起的各模型减第一个（同样的题，成对）：多样少了多少，好答案多了多少。"""
    first, *others = tables
    found: dict = {}
    for name in others:
        found[name] = {}
        for score in ("preferred", "right", "different_right", "different", "self_bleu", "entropy"):
            ours, theirs = (
                [each["scores"][score] for each in tables[model]["items"] if score in each["scores"]]
                for model in (name, first)
            )
            if ours:
                gap = paired_difference(ours, theirs)
                found[name][score] = {"value": gap.value, "low": gap.low, "high": gap.high, "n": gap.n}
    return found


# ---------------------------------------------------------------- 给人看的


def as_items(questions: list[dict], groups: list[list[dict]], scores: list[dict]) -> list[dict]:
    return [
        item(
            f"q{place:04d}",
            score,
            prompt=as_text(question["messages"]),
            answer="\n".join(
                f"{count} 遍　{text}" for text, count in Counter(r["text"] for r in group).most_common(6)
            ),
            right=question.get("answer", ""),
            group=question.get("slot") or "",
        )
        for place, (question, group, score) in enumerate(zip(questions, groups, scores, strict=True), 1)
    ]


def print_grid(title: str, grid: dict[str, dict]) -> None:
    columns = [key for key in NAMES if key in next(iter(grid.values()))]
    print(f"\n{title}\n  {padded('采样', 12)}" + "  ".join(NAMES[key] for key in columns))
    for key, row in grid.items():
        label = f"温度 {key[1:]}" if key.startswith("t") else f"top_p {key[1:]}"
        print(f"  {padded(label, 12)}" + "  ".join(f"{row[c]:>{width(NAMES[c])}.3f}" for c in columns))


def print_examples(question: dict, tables: dict[str, dict]) -> None:
    print(f"\n同一道题，温度 1：{as_text(question['messages'])}")
    for name, table in tables.items():
        first = table["items"][0]
        gap = mean_interval([each["scores"]["different"] for each in table["items"]])
        print(f"  {name}（平均 {gap.text(2)} 种）")
        for line in first["answer"].splitlines():
            print(f"    {line}")
    print()


def draw_pictures(folder: Path, grids: dict[str, dict], judged: bool, draws: int) -> None:
    """一个模型一条线，线上各点是各温度：同样的正确率上有几种正确说法；好答案多了，熵少了多少。"""
    curves = {name: temperature_curve(grid) for name, grid in grids.items()}
    if not judged:
        y = f"{draws} 个回答里不同的答案|different answers in {draws}"
        draw_curves(
            folder / "variety.svg",
            curves,
            "temperature",
            "different",
            ("温度与多样|Temperature and variety", "温度|temperature", y),
        )
        return
    x, y = "答对的比例|share right", f"{draws} 个回答里不同的正确答案|different right answers in {draws}"
    title = "正确率一样时，有几种正确说法|Right answers at equal quality"
    draw_curves(folder / "equal_quality.svg", curves, "right", "different_right", (title, x, y))
    x, y = "对、整、有礼的比例|preferred rate", "回答的熵（nats）|entropy of the answer (nats)"
    title = "对齐换来了什么|What alignment bought"
    draw_curves(folder / "trade.svg", curves, "preferred", "entropy", (title, x, y))


def draw_curves(
    path: Path, curves: dict[str, list[dict]], x: str, y: str, labels: tuple[str, str, str]
) -> None:
    def draw(axes, text) -> None:
        for color, (name, curve) in zip(itertools.cycle(COLORS), curves.items(), strict=False):
            xs, ys = [row[x] for row in curve], [row[y] for row in curve]
            axes.plot(xs, ys, label=text(name), color=color, linewidth=1.4, marker="o", markersize=3.5)
            for row in curve:
                if row["temperature"] in (curve[0]["temperature"], 1.0, curve[-1]["temperature"]):
                    place = (row[x], row[y])
                    shown = {"textcoords": "offset points", "color": color, "fontsize": 8}
                    axes.annotate(f"{row['temperature']:g}", place, (3, 4), **shown)

    render(path, draw, [*curves], labels)


if __name__ == "__main__":
    run_main(main)
