"""指标：困惑度、完全一致、F1、BLEU、chrF、ROUGE、人工打分的一致性。中文里多半一用默认就错，这里量的是指标自己。

你会学到
  1. 困惑度要按 token 加权；切断了的文字虚高；分词器不同的模型只能比每个字几比特。小世界的语法知道下限。
  2. 中文没有空格：BLEU、ROUGE、F1 的默认切法给 0，或者只看见数字和字母。按字切，与 sacrebleu、rouge-score 一样。
  3. 指标与好坏是两回事：答错一个词的整句分很高，有礼的回答分变低。与真的评判（nlp_common/tiny/judge.py）的相关量得出来。
  4. 人也要量：Cohen、Fleiss、Krippendorff；κ 的悖论：两个人一样仔细，一类多了，κ 就掉。

怎么运行
  python evaluation_metrics.py                                  # 全部，在 Qwen 链 tiny 的模型上（没有就当场训练）
  python evaluation_metrics.py --file answers.jsonl             # 你自己的：prediction、reference 两栏（可以有几个标准答案）
  python evaluation_metrics.py --file a.jsonl --compare b.jsonl # 两个模型，同样的题，成对地比
  python evaluation_metrics.py --ratings ratings.csv            # 你自己的打分表：item,甲,乙,丙
  python evaluation_metrics.py --text novel.txt --models pretrain,smollm2   # 你自己的文字，分词器不同的两个模型

应当看到（tiny，实测见本文件夹的 README.md）：默认的 BLEU 与 ROUGE-L 是 0.0，该用的是几十；只有一个标准答案时，
BLEU 说 DPO、PPO 比 SFT 差，真的评判说好；把几种开头都写进标准答案，次序才对。

参考：Papineni et al. 2002（BLEU）；Popović 2015（chrF）；Lin 2004（ROUGE）；Post 2018（sacrebleu）；Cui et al. 2019（CMRC 2018）；
Cohen 1960、1968；Fleiss 1971；Krippendorff 2011；Feinstein & Cicchetti 1990；Gwet 2008。
"""

from nlp_common.base.cli import run_main

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

import correlation
from answer_scores import NAMES, corpus_scores, default_scores, differences_to_peers, item_scores
from answering import Answerer, find_answerer, load_answerer, replies, split_names
from language_metrics import (
    NgramModel,
    bits_per_char,
    corpus_perplexity,
    cut_losses,
    mixed_documents,
    perplexities,
    strided_losses,
    token_losses,
)
from metrics_report import draw_pictures, plain, show_agreement, show_all
from nlp_common.base.arguments import COUNT, Limits, option
from nlp_common.base.errors import UserError
from nlp_common.base.intervals import paired_difference, statistic_interval
from nlp_common.data.rows import data_sha256, sha256_of_rows
from nlp_common.lm.chatml import encode_texts
from nlp_common.tiny.judge import judge
from nlp_common.tiny.world import OPENINGS, WORLD, documents, heldout_questions
from nlp_common.train.settings import LessonSettings, parse_settings
from nlp_common.train.stage import Stage
from own_texts import score_text
from rating_tables import agreement_table, example_ratings, paradox_table, read_ratings
from results import item, run_evaluation, write_result
from scored_files import score_file

HOME = Path(__file__).resolve().parent
PRESETS = {
    "tiny": {"questions": 200, "documents": 400, "draws": 200},
    "full": {"questions": 1000, "documents": 2000, "draws": 1000},
}
SEED_OF_TEXTS = 20_000  # 与各阶段量效果用的题不同
MAX_REPLY = 32
WINDOW, STRIDES, LONG = 96, (48, 24, 8, 1), 64  # 窗口宽、每次挪几个、量几篇
NGRAM_ORDER, NGRAM_DOCUMENTS = 5, 2000
FILES = ("file", "compare", "ratings", "text", "check_contamination")  # 读者给的文件
RATED = 60  # 自带的打分表有几样东西


@dataclass
class MetricsSettings(LessonSettings):
    models: str = option(
        "比哪几个模型，用逗号隔开：Qwen 链 tiny 的阶段、hub 名、本地文件夹", "pretrain,sft,dpo,ppo"
    )
    source: str = option("hub 名从哪里下载", "hf", choices=("hf", "modelscope"))
    questions: int | None = option("每个模型答几道题", limits=COUNT)
    documents: int | None = option("用几段文字量困惑度", limits=COUNT)
    draws: int | None = option("算区间重抽几次", limits=COUNT)
    file: str | None = option("给这个文件里的回答打分：json/jsonl/csv/tsv/parquet，要有回答与标准答案两栏")
    compare: str | None = option("另一个模型的回答，与 --file 同样的题、同样的次序：成对地比")
    prediction_field: str | None = option("回答在哪一栏；默认 prediction、answer、output …")
    reference_field: str | None = option("标准答案在哪一栏；默认 reference、target、label …")
    simplified: bool = option("比之前把繁体变成简体（回答与标准答案都变）", False)
    check_contamination: str | None = option("训练数据的文件或文件夹：查 --file 里的题在不在里面")
    ratings: str | None = option("算这张打分表的一致性：csv 等，item,甲,乙,丙 或 item,rater,rating")
    text: str | None = option("量这个文件里的文字的困惑度与每字比特：txt（空行分段）或有 text 一栏的文件")
    window: int = option("--text 的窗口几个 token；更长的文字每次挪半个窗口", 512, Limits(at_least=2))
    order: str | None = option("--ratings 里的分不是数：从低到高写出来，例如 差,中,好")

    def check(self) -> None:
        for flag in FILES:
            path = getattr(self, flag)
            exists = Path(path or "").expanduser()
            if flag != "check_contamination" and exists.is_dir() and path:
                raise UserError(f"--{flag} 要一个文件，{path} 是文件夹。")
            if path and not (exists.is_file() or (flag == "check_contamination" and exists.is_dir())):
                raise UserError(f"没有 --{flag} 给的文件：{path}（当前文件夹是 {Path.cwd()}）。")
        if (self.compare or self.check_contamination) and not self.file:
            raise UserError("--compare、--check_contamination 要与 --file 一起给：它们说的是那个文件里的题。")
        if (self.prediction_field or self.reference_field) and not self.file:
            raise UserError("--prediction_field、--reference_field 要与 --file 一起给：它们是那个文件的栏。")
        if self.order and not self.ratings:
            raise UserError("--order 要与 --ratings 一起给。")
        if sum(map(bool, (self.file, self.ratings, self.text))) > 1:
            raise UserError("--file、--ratings、--text 一次只给一个。")


# ---------------------------------------------------------------- 1. 从头到尾


def learn(stage: Stage) -> dict:
    """不给文件时的一课：困惑度 → 造出来的回答 → 各模型的回答与相关 → 人工打分。"""
    settings = stage.settings
    questions = heldout_questions(settings.questions, SEED_OF_TEXTS + settings.seed)
    metrics: dict = {
        "perplexity": measure_perplexity(settings),
        "constructed": measure_constructed(questions),
    }
    systems = answer_all(settings, questions)
    speaking = [system for system in systems if system["model"] != "pretrain"] or systems
    said, wanted = texts_of([system for system in speaking if system["sampled"]], questions)
    metrics["traps"] = default_scores(said, wanted)
    said, wanted = texts_of(systems, questions)
    metrics["difference_to_peers"] = differences_to_peers(said, [[each] for each in wanted])
    metrics["systems"] = {system["name"]: system_means(system) for system in systems}
    metrics["correlation"] = {
        "one_reference": correlate(systems, "one_reference", settings),
        # 一个什么也不会的模型放进来，什么指标都显得准：再去掉它算一次
        "one_reference_without_pretrain": correlate(speaking, "one_reference", settings),
        "all_references": correlate(systems, "all_references", settings),
    }
    metrics["paired"] = paired_with_sft(systems, settings.seed)
    table = agreement_table(example_ratings(RATED, settings.seed), settings.seed, settings.draws)
    metrics["agreement"] = table
    metrics["paradox"] = {
        f"{share:.2f}": paradox_table(share, 0.95) for share in (0.5, 0.7, 0.8, 0.9, 0.95, 0.99)
    }
    show_all(metrics)

    def write(folder: Path) -> None:
        write_systems(folder, systems, questions, settings)
        draw_pictures(folder, metrics)

    data = {"test": {"name": "tiny_world", "kind": "builtin", "rows": len(questions)}}
    data["test"]["sha256"] = sha256_of_rows(questions)
    return stage.save(plain(metrics), data, write)


# ---------------------------------------------------------------- 2. 困惑度


def measure_perplexity(settings: MetricsSettings) -> dict:
    """预训练的小模型，在语法写的留出文字上：平均的对与错、窗口怎样挪、切法不同怎样比。"""
    reader = load_answerer("pretrain")
    rows = mixed_documents(settings.documents, SEED_OF_TEXTS + settings.seed)
    ids = encode_texts(reader.tokenizer, [row["text"] for row in rows])
    losses = token_losses(reader.model, ids)
    found: dict = {"averages": perplexities(losses)}
    # bootstrap 重抽的是段，不是 token：同一段里的 token 不是互不相干的
    pairs = [(row.sum().item(), len(row)) for row in losses]
    found["interval"] = statistic_interval(pairs, corpus_perplexity, settings.seed, settings.draws)
    floor = [(row["nats"], len(loss)) for row, loss in zip(rows, losses, strict=True)]
    found["grammar"] = corpus_perplexity(floor)

    whole = [place for place, row in enumerate(rows) if row["kind"] == "document"]
    found["stride"] = measure_stride(reader, [ids[place] for place in whole[:LONG]])
    found["units"] = measure_units([rows[i] for i in whole], [losses[i] for i in whole], settings)
    return found


def measure_stride(reader: Answerer, documents: list[list[int]]) -> dict:
    """窗口只有 WINDOW 个 token、文档更长：切断、每次挪 48 … 1、一次看全；困惑度与前向的 token 数。"""
    found = {}
    for name in ("cut", *STRIDES, "whole"):
        losses, forwarded = [], 0
        for ids in documents:
            if name == "whole":
                each, count = token_losses(reader.model, [ids])[0], len(ids)
            elif name == "cut":
                each, count = cut_losses(reader.model, ids, WINDOW)
            else:
                each, count = strided_losses(reader.model, ids, WINDOW, name)
            losses.append(each)
            forwarded += count
        found[str(name)] = {"perplexity": perplexities(losses)["token_weighted"], "forwarded": forwarded}
    return found


def measure_units(rows: list[dict], losses: list, settings: MetricsSettings) -> dict:
    """同样的文档，三种切法的模型与语法自己：每个单位的困惑度不能比，每个字几比特能比。"""
    train = [row["text"] for row in documents(NGRAM_DOCUMENTS, settings.seed)]
    texts = [row["text"] for row in rows]
    chars = [len(text) for text in texts]
    kinds = len(set("".join(train))) + 1
    by_char = NgramModel(NGRAM_ORDER, kinds).learn(train)
    by_byte = NgramModel(NGRAM_ORDER, 256).learn([text.encode() for text in train])
    sizes = [len(text.encode()) for text in texts]
    measured = {  # 名字 → 每段的 −ln p、每段几个单位
        "qwen": ([loss.sum().item() for loss in losses], [len(loss) for loss in losses]),
        "ngram_char": ([by_char.nats(text) for text in texts], chars),
        "ngram_byte": ([by_byte.nats(text.encode()) for text in texts], sizes),
        "grammar": ([row["nats"] for row in rows], chars),
    }
    found = {}
    for name, (nats, units) in measured.items():
        per_char = list(zip(nats, chars, strict=True))
        found[name] = {
            "perplexity": corpus_perplexity(list(zip(nats, units, strict=True))),
            "bits_per_char": statistic_interval(per_char, bits_per_char, settings.seed, settings.draws),
        }
    return found


# ---------------------------------------------------------------- 3. 造出来的回答：知道哪种好


def measure_constructed(questions: list[dict]) -> dict:
    """同一道题的五种回答，好坏是知道的；各指标（标准答案只有那一句完整的话）与真的评判各给多少。"""
    found: dict = {}
    for kind in ("courteous", "plain", "terse", "wrong", "unhelpful"):
        scores = []
        for number, question in enumerate(questions):
            said = constructed(question, kind, number)
            truth = judge(question, said, ended=True).score
            scores.append(item_scores(said, [question["sentence"]]) | {"judge": truth})
        found[kind] = {name: float(np.mean([row[name] for row in scores])) for name in scores[0]}
    return found


def constructed(question: dict, kind: str, number: int) -> str:
    """kind 这种回答：有礼的整句、整句、只答词、整句但词换成同类的另一个、不搭理。"""
    sentence = question["sentence"]
    others = [word for word in WORLD[question["slot"]] if word != question["answer"]]
    return {
        "courteous": OPENINGS[number % len(OPENINGS)] + sentence,
        "plain": sentence,
        "terse": question["answer"],
        "wrong": sentence.replace(question["answer"], others[number % len(others)]),
        "unhelpful": "我不知道。",
    }[kind]


# ---------------------------------------------------------------- 4. 各模型的回答，与真的评判


def answer_all(settings: MetricsSettings, questions: list[dict]) -> list[dict]:
    """每个模型贪心答一遍、温度 1 采样答一遍 → 一份一个 dict：每道题的各项分与真的评判。"""
    systems = []
    names = split_names(settings.models)
    shorts = [Path(name).name for name in names]
    for name in names:
        # 两个文件夹末尾同名，就用整个路径叫它
        short = Path(name).name if shorts.count(Path(name).name) == 1 else name.strip("/").replace("/", "_")
        answerer = load_answerer(name, settings.source)
        for sampled in (False, True):
            said = replies(answerer, questions, MAX_REPLY, temperature=float(sampled), seed=settings.seed)
            system = {
                "name": f"{short}_{'sampled' if sampled else 'greedy'}",
                "model": short,
                "id": answerer.id,
                "sampled": sampled,
                "replies": said,
                "judge": [
                    judge(q, r["text"], r["ended"]).score for q, r in zip(questions, said, strict=True)
                ],
                "one_reference": [],
                "all_references": [],
            }
            for question, reply in zip(questions, said, strict=True):
                wanted = [question["sentence"]]
                system["one_reference"].append(item_scores(reply["text"], wanted))
                wanted += [opening + question["sentence"] for opening in OPENINGS]
                system["all_references"].append(item_scores(reply["text"], wanted))
            systems.append(system)
            print(f"  {system['name']} 答完 {len(said)} 题", flush=True)
    return systems


def texts_of(systems: list[dict], questions: list[dict]) -> tuple[list[str], list[str]]:
    """几份回答接成一串，与它们各自的那句完整的话。"""
    said = [reply["text"] for system in systems for reply in system["replies"]]
    return said, [question["sentence"] for _ in systems for question in questions]


def system_means(system: dict) -> dict:
    """一份回答的各项平均（只有一个标准答案、几种开头都写进标准答案）与真的评判。"""
    found: dict = {"judge": float(np.mean(system["judge"]))}
    for kind in ("one_reference", "all_references"):
        found[kind] = {name: float(np.mean([row[name] for row in system[kind]])) for name in NAMES}
    return found


def paired_with_sft(systems: list[dict], seed: int) -> dict:
    """对齐之后的模型与 SFT 的差，同样的题上成对地减（温度 1）：真的评判怎么说，BLEU 怎么说。"""
    sampled = {system["model"]: system for system in systems if system["sampled"]}
    found: dict = {}
    for name in sampled:
        if "sft" not in sampled or name in ("sft", "pretrain"):
            continue
        ours, theirs = sampled[name], sampled["sft"]
        found[name] = {"judge": paired_difference(ours["judge"], theirs["judge"], seed)}
        for kind in ("one_reference", "all_references"):
            pair = ([row["bleu"] for row in system[kind]] for system in (ours, theirs))
            found[name][f"bleu_{kind}"] = paired_difference(*pair, seed)
    return found


def correlate(systems: list[dict], kind: str, settings: MetricsSettings) -> dict:
    """每个指标与真的评判的相关：一个回答一个点（pearson、spearman、kendall），一份回答一个点（systems）。

    重抽的是题：同一道题的几个回答一起进、一起出，它们不是互不相干的。
    """
    truth = np.array([system["judge"] for system in systems]).T  # (题, 份)
    found: dict = {}
    for name in NAMES:
        scores = np.array([[row[name] for row in system[kind]] for system in systems]).T  # (题, 份)
        both = list(np.stack([scores, truth], axis=1))  # 一道题一个 (2, 份)
        found[name] = {}
        for method in ("pearson", "spearman", "kendall"):
            statistic = partial(over_answers, method=method)
            found[name][method] = statistic_interval(both, statistic, settings.seed, settings.draws)
        found[name]["systems"] = statistic_interval(both, over_systems, settings.seed, settings.draws)
    return found


def over_answers(both: list[np.ndarray], method: str) -> float:
    """全部回答上，一个回答一个点。"""
    scores, truth = np.stack(both).transpose(1, 0, 2).reshape(2, -1)
    return getattr(correlation, method)(scores, truth)


def over_systems(both: list[np.ndarray]) -> float:
    """先各自平均，一份回答一个点：指标排出的名次与真的名次（Spearman）。"""
    scores, truth = np.stack(both).mean(0)
    return correlation.spearman(scores, truth)


def write_systems(
    folder: Path, systems: list[dict], questions: list[dict], settings: MetricsSettings
) -> None:
    """每份回答一个结果文件，给 benchmark_report.py 读；标准答案是四种写法都算。"""
    for system in systems:
        rows = []
        for number, (question, reply) in enumerate(zip(questions, system["replies"], strict=True)):
            scores = system["all_references"][number] | {"judge": system["judge"][number]}
            prompt = question["messages"][-1]["content"]
            right = question["sentence"]
            rows.append(item(f"q{number:04d}", scores, prompt, reply["text"], right, question["slot"]))
        wanted = [[q["sentence"], *(opening + q["sentence"] for opening in OPENINGS)] for q in questions]
        said = [reply["text"] for reply in system["replies"]]
        write_result(
            folder,
            f"tiny_answers_{'sampled' if system['sampled'] else 'greedy'}",
            system["model"],
            rows,
            model_id=system["id"],
            seed=settings.seed,
            settings={"questions": len(questions), "temperature": float(system["sampled"])},
            scores=corpus_scores(said, wanted, settings.seed, settings.draws),
        )


# ---------------------------------------------------------------- 5. 你自己的打分表；main


def learn_ratings(stage: Stage) -> dict:
    """--ratings：读者的打分表。"""
    settings = stage.settings
    ratings = read_ratings(settings.ratings, settings.order)
    table = agreement_table(ratings, settings.seed, settings.draws)
    show_agreement(table, f"{settings.ratings}：{len(ratings.rows)} 样东西，{len(ratings.raters)} 个人")
    data = {"test": {"name": settings.ratings, "kind": "file", "rows": len(ratings.rows)}}
    return stage.save(plain(table), data)


def main(argv: list[str] | None = None) -> dict:
    settings = parse_settings(MetricsSettings, PRESETS, argv)
    for flag, work in (("file", score_file), ("ratings", learn_ratings), ("text", score_text)):
        if getattr(settings, flag):
            # 自己的文件每次都重新算（几秒），换一个不必加 --retrain
            settings.retrain = settings.retrain or not settings.output_dir
            contents = {f"{name}_sha256": data_sha256(getattr(settings, name)) for name in FILES}
            return run_evaluation(f"evaluation_metrics-{flag}", HOME, settings, work, **contents)
    ids = [find_answerer(name, settings.source)["id"] for name in split_names(settings.models)]
    return run_evaluation("evaluation_metrics", HOME, settings, learn, model_ids=ids)


if __name__ == "__main__":
    run_main(main)
