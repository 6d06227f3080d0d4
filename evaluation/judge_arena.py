"""擂台：两个回答放在一起，谁好？评判自己偏不偏心，赢多少才算赢？

你会学到
  1. 每一对都换个次序再问一遍：位置的偏见就抵消了，还量得出有多大。
  2. 评判偏爱长的，写得长就赢：长度控制的胜率把它去掉；可是"长而且好"也一起去掉了。
  3. Elo 看对局的次序，同样的对局洗一洗牌，第一名就换人；Bradley–Terry 不看次序，还有区间。
  4. 两个模型差得越少，要的题越多；边看边停，误报就多。
  5. 两轮的题（MT-Bench）：第二问带着模型自己的第一个回答。

怎么运行
  python judge_arena.py                                          # Qwen 链的 SFT、DPO、PPO，程序当评判，一分钟以内
  python judge_arena.py --judge reward                           # 奖励模型当评判
  python judge_arena.py --judge smollm2 --models sft,dpo --questions 10 --exam_questions 20   # 真的小模型当评判：它只看位置；几分钟
  python judge_arena.py --judge_url http://127.0.0.1:8000/v1 --judge_model qwen3   # 任何 OpenAI 接口的服务器
  python judge_arena.py --answers a.jsonl b.jsonl --judge_url …  # 评你自己的回答，一行一个 prompt、answer

应当看到（实测见本文件夹的 README.md）：种下的位置、长度偏见都量得回来；一样强的两个模型，原始胜率（raw_win_rate）约 0.6，
长度控制之后（lc_win_rate）约 0.5；用 --answers 时，这两个是第二个文件对第一个的胜率。

参考：Zheng et al. 2023（MT-Bench）；Dubois et al. 2024（长度控制）；Chiang et al. 2024（Chatbot Arena）；Hunter 2004（Bradley–Terry）。
"""

from nlp_common.base.cli import run_main

import dataclasses
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np

from answer_files import read_answers
from answering import find_answerer, load_answerer, split_names
from arena_pages import show, write_all
from contamination import check_questions
from judge_bias import (
    Planted,
    coverage,
    exam,
    first_points,
    length_gap,
    plant_and_find,
    win_rate_without_bias,
)
from judges import (
    both_ways,
    model_judge,
    need_right,
    points_of,
    program_judge,
    reward_judge,
    same_verdict,
    server_judge,
)
from length_control import lc_win_rate, recovered
from matches import Match, games_by_question, make_asks, turn_quality
from nlp_common.base.arguments import COUNT, NOT_NEGATIVE, POSITIVE, option
from nlp_common.base.device import pick_device
from nlp_common.base.errors import UserError
from nlp_common.base.intervals import mean_interval
from nlp_common.base.runs import file_sha256
from nlp_common.data.rows import check_path, data_sha256
from nlp_common.hub.chat_server import ChatServer
from nlp_common.lm.loading import load_reward_model, load_tokenizer
from nlp_common.train.chain import chain_model
from nlp_common.train.settings import LessonSettings, parse_settings
from nlp_common.train.stage import Stage
from ratings import (
    difference_to_choix,
    elo_over_orders,
    enough,
    peeking,
    power_curve,
    rating_intervals,
    ratings,
    win_table,
)
from results import run_evaluation
from two_turns import answer_both_turns, two_turn_questions

HOME = Path(__file__).resolve().parent
PRESETS = {
    "tiny": {"questions": 400, "max_new_tokens": 32, "exam_questions": 100},
    "full": {"questions": 1000, "max_new_tokens": 256, "exam_questions": 100},
}
PLANTED = Planted(position=0.6, length=0.8)
ALPACA_QUESTIONS = 805  # AlpacaEval 的题数
SIZES = (5, 6, 7, 8, 9, 10, 12, 15, 20, 30, 50, 75, 100, 150, 200, 300, 500, 750, 1000, 1500, 2000, 3000)


@dataclass
class ArenaSettings(LessonSettings):
    NOT_IN_FINGERPRINT: ClassVar[set[str]] = LessonSettings.NOT_IN_FINGERPRINT | {
        "api_key_env",
        "judge_timeout",
        "judge_retries",
        "judge_workers",
    }
    models: str = option(
        "谁来比，逗号隔开：Qwen 链的阶段、本地文件夹、hub 名、smollm2；第一个是基准", "sft,dpo,ppo"
    )
    answers: list[str] | None = option(  # noqa: RUF009
        "不用模型，比这些文件里的回答：一个模型一个文件，一行一个 prompt、answer"
    )
    questions: int | None = option("几道两轮的题", limits=COUNT)
    max_new_tokens: int | None = option("一个回答最多多少个 token")
    temperature: float = option("采样的温度", 1.0)
    judge: str = option(
        "谁当评判：program（标准答案）、reward（奖励模型），或一个本地模型（smollm2、文件夹）", "program"
    )
    judge_url: str | None = option("评判是一个 OpenAI 接口的服务器，写到 /v1 为止")
    judge_model: str | None = option("服务器上的哪个模型")
    api_key_env: str = option("钥匙在哪个环境变量里", "OPENAI_API_KEY")
    judge_timeout: float = option("服务器几秒不回答就算没有回答", 60.0, POSITIVE)
    judge_retries: int = option("没有回答，再试几次", 2, NOT_NEGATIVE)
    judge_max_tokens: int = option("服务器一次最多写多少个 token（会先想一想的模型要多些）", 1024, COUNT)
    judge_workers: int = option("同时问服务器几句", 4, COUNT)
    exam_questions: int | None = option("考评判的每份考卷几道题", limits=COUNT)
    orders: int = option("Elo 洗几次牌", 200, COUNT)
    check_contamination: str | None = option("训练数据的文件或文件夹：查每道题的 n 元组在不在里面")
    source: Literal["hf", "modelscope"] = option("hub 名从哪里下载", "hf")

    def check(self) -> None:
        check_path(self.check_contamination, "--check_contamination")
        if self.judge_url and not self.judge_model:
            raise UserError("--judge_url 还要 --judge_model：服务器上的哪个模型。")
        if self.judge_model and not self.judge_url:
            raise UserError("--judge_model 是服务器上的模型，还要 --judge_url；本地的模型写在 --judge 后面。")
        if not self.answers and len(split_names(self.models)) < 2:
            raise UserError("--models 至少要两个模型，才有得比。")


# ---------------------------------------------------------------- 1. 参赛的与评判的


def contestants(settings: ArenaSettings) -> tuple[list[dict], dict[str, list[list[dict]]], dict[str, str]]:
    """→ (题，{模型: 各题各轮的回答}，{模型: 编号})。"""
    if settings.answers:
        questions, answers = read_answers(settings.answers)
        shas = [file_sha256(Path(path).expanduser())[:16] for path in settings.answers]
        return questions, answers, dict(zip(answers, shas, strict=True))
    questions = two_turn_questions(settings.questions, settings.seed)
    answers, ids = {}, {}
    for name in split_names(settings.models):
        answerer = load_answerer(name, settings.source)
        answers[name] = answer_both_turns(
            answerer, questions, settings.max_new_tokens, settings.temperature, settings.seed
        )
        ids[name] = answerer.id
    return questions, answers, ids


def choose_judge(settings: ArenaSettings, stage: Stage):
    """→ (评判的名字，评判)。评判是一个函数：[Ask] → [A、B、平或 None]。"""
    if settings.judge_url:
        server = ChatServer(
            settings.judge_url,
            settings.judge_model,
            settings.api_key_env,
            settings.judge_timeout,
            settings.judge_retries,
        )
        server.check()
        kept = stage.folder.work / "verdicts.jsonl"
        return settings.judge_model, partial(
            server_judge,
            server=server,
            kept=kept,
            workers=settings.judge_workers,
            max_tokens=settings.judge_max_tokens,
        )
    if settings.judge == "program":
        return "program", program_judge
    if settings.judge == "reward":
        return "reward", reward_of_chain()
    return settings.judge, partial(model_judge, answerer=load_answerer(settings.judge, settings.source))


def reward_of_chain():
    path = chain_model("reward")["path"]
    tokenizer = load_tokenizer(path)
    model = load_reward_model(path, tokenizer).to(pick_device()).eval()
    return partial(reward_judge, reward_model=model, tokenizer=tokenizer)


# ---------------------------------------------------------------- 2. 比赛


def play(questions: list[dict], answers: dict, judge_them) -> list[Match]:
    """两两比赛，a 是后写的那个：dpo 对 sft，看的是 dpo 赢多少。"""
    matches = []
    for b, a in combinations(answers, 2):
        asks = make_asks(questions, answers[a], answers[b])
        matches.append(Match(a, b, asks, both_ways(asks, judge_them)))
    if all(points is None for match in matches for points in match.points):
        raise UserError(
            "评判一个结论也没有给：它不照格式回答，或者服务器不回答。请换一个评判，或看看它说了什么。"
        )
    return matches


# ---------------------------------------------------------------- 3. 算


def ranking(matches: list[Match], names: list[str], settings: ArenaSettings) -> dict:
    """Bradley–Terry（按题、按局两种区间）与 Elo（洗牌）。"""
    groups = games_by_question(matches, names)
    games = [game for group in groups for game in group]
    table = win_table(games, len(names))
    by_question = rating_intervals(groups, len(names), settings.seed)
    by_game = rating_intervals([[game] for game in games], len(names), settings.seed)
    shuffled = elo_over_orders(games, len(names), settings.orders, settings.seed)  # (orders, M)
    best = int(np.argmax(ratings(table)))
    found: dict = {
        "elo_order_sd": float(shuffled.std(0, ddof=1).max()) if settings.orders > 1 else 0.0,
        "elo_another_first": float((shuffled.argmax(1) != best).mean()),
        "max_difference_to_choix": difference_to_choix(table),
        "games": len(games),
        "ratings": {},
    }
    for i, name in enumerate(names):
        found["ratings"][name] = dataclasses.asdict(by_question[i]) | {
            "width": by_question[i].high - by_question[i].low,
            "width_by_game": by_game[i].high - by_game[i].low,
            "elo_lowest": float(shuffled[:, i].min()),
            "elo_highest": float(shuffled[:, i].max()),
        }
    return found


def pair_numbers(match: Match, seed: int) -> dict:
    """一对模型：胜率、长度控制的胜率、长度差、要多少题。"""
    by_question = match.by_question()
    lengths = {"first": {}, "second": {}}
    for ask in match.asks:
        for side, texts in (("first", ask.first), ("second", ask.second)):
            name = ask.question["id"]
            lengths[side][name] = lengths[side].get(name, 0) + len(texts[ask.turn])
    ours, theirs = ([lengths[side][name] for name in by_question] for side in ("first", "second"))
    points = list(by_question.values())
    lc, phi = lc_win_rate(points, ours, theirs, seed)
    curve = power_curve(points, SIZES, seed)
    return {
        "win_rate": dataclasses.asdict(mean_interval(points, seed)),
        "lc": dataclasses.asdict(lc),
        "length_coefficient": phi,
        "chars_more": float(np.mean(ours) - np.mean(theirs)),
        "curve": {str(n): chance for n, chance in curve.items()},
        "enough": enough(curve),
    }


def win_rates_of(pair: dict) -> dict:
    """读者自己的回答：第二个文件对第一个的两种胜率。"""
    return {"raw_win_rate": pair["win_rate"]["value"], "lc_win_rate": pair["lc"]["value"]}


def judge_numbers(matches: list[Match], seed: int) -> dict:
    """这次的评判：没有结论的、两种次序说法不同的、排在前面的平均得几分（不看位置是 0.5）。"""
    pairs = [pair for match in matches for pair in match.verdicts]
    told = [pair for pair in pairs if points_of(pair) is not None]
    return {
        "no_verdict_rate": 1 - len(told) / len(pairs),
        "disagree_with_itself": 1 - sum(map(same_verdict, told)) / len(told),
        "first_points": dataclasses.asdict(mean_interval([first_points(pair) for pair in told], seed)),
    }


# ---------------------------------------------------------------- 4. 知道答案的世界里：量评判，量方法


def world_numbers(
    questions: list[dict], answers: dict, matches: list[Match], settings: ArenaSettings
) -> dict:
    """小世界的题才有的：各轮的程序分；种下的偏见量不量得回来；给长的加分的评判，胜率变成多少。"""
    found: dict = {"turns": {name: turn_scores(questions, answers[name], settings.seed) for name in answers}}
    asks = [ask for match in matches for ask in match.asks if ask.first[ask.turn] and ask.second[ask.turn]]
    spread = float(np.std([length_gap(ask) for ask in asks])) or 1.0
    bias, _ = plant_and_find(asks, PLANTED, spread, settings.seed)
    covered = coverage(asks[: 2 * len(questions)], PLANTED, spread, settings.seed, 100)
    for name in ("position", "length"):
        found[name] = dataclasses.asdict(bias[name])
        found[name] |= {"planted": getattr(PLANTED, name), "coverage": covered[name]}

    found["biased"] = {
        f"{match.a}-{match.b}": biased_numbers(match, spread, settings.seed) for match in matches
    }
    return found


def biased_numbers(match: Match, spread: float, seed: int) -> dict[str, float]:
    """同样的回答换三个评判：程序；会看错、不偏心的；一样会看错、还给长的加分的。长度控制能不能由第三个回到第二个？"""
    fair = replace(match, verdicts=both_ways(match.asks, program_judge))
    noisy = replace(match, verdicts=plant_and_find(match.asks, Planted(0.0, 0.0), spread, seed, draws=2)[1])
    longer = Planted(0.0, PLANTED.length)
    biased = replace(match, verdicts=plant_and_find(match.asks, longer, spread, seed, draws=2)[1])
    found = {}
    for name, each in (("program", fair), ("noisy", noisy), ("biased", biased)):
        numbers = pair_numbers(each, seed)
        found |= {f"{name}_raw": numbers["win_rate"]["value"], f"{name}_lc": numbers["lc"]["value"]}
    found["biased_knowing_quality"] = win_rate_without_bias(match.asks, biased.verdicts, spread)
    return found


def turn_scores(questions: list[dict], answers: list[list[dict]], seed: int) -> dict:
    """两轮各得几分（程序评分 0 到 1）；第二问，分第一问自己答对了的与答错了的。"""
    scores: list[list[float]] = [[], []]
    for question, replies in zip(questions, answers, strict=True):
        for turn in range(2):
            scores[turn].append(turn_quality(question, replies, turn))
    after = {"right": [], "wrong": []}
    for one, two in zip(*scores, strict=True):
        after["right" if one >= 0.4 else "wrong"].append(two)  # 0.4 起是答对了的
    found = {f"turn{turn + 1}": dataclasses.asdict(mean_interval(scores[turn], seed)) for turn in range(2)}
    for name, values in after.items():
        if values:
            found[f"turn2_after_{name}"] = dataclasses.asdict(mean_interval(values, seed))
    return found


def simulated(seed: int) -> dict:
    """三种真相下，偏爱长回答的评判给出的原始胜率与长度控制的胜率；一样强的那一种写在最前面。"""
    by_truth = {truth: recovered(truth, ALPACA_QUESTIONS, 200, seed) for truth in (0.4, 0.5, 0.6)}
    win_rates = {"raw_win_rate": by_truth[0.5]["raw"], "lc_win_rate": by_truth[0.5]["lc"]}
    return win_rates | {"by_truth": {f"{truth:g}": each for truth, each in by_truth.items()}}


# ---------------------------------------------------------------- 5. 从头到尾


def learn(stage: Stage) -> dict:
    settings = stage.settings
    name, judge_them = choose_judge(settings, stage)  # 先看评判在不在：服务器没开，不必等模型答完才知道
    questions, answers, ids = contestants(settings)
    if settings.answers and name == "program":
        need_right(questions, settings.answers[0])
    leaked = {}
    if settings.check_contamination:
        texts = {q["id"]: "\n".join(turn["ask"] for turn in q["turns"]) for q in questions}
        leaked = check_questions(texts, settings.check_contamination)
    print(f"{len(questions)} 道题，{'、'.join(answers)}；评判：{name}")
    matches = play(questions, answers, judge_them)
    pairs = {f"{m.a}-{m.b}": pair_numbers(m, settings.seed) for m in matches if m.by_question()}
    metrics = win_rates_of(next(iter(pairs.values()))) if settings.answers else simulated(settings.seed)
    once, every = peeking(200, settings.seed)
    metrics |= {"false_alarms_once": once, "false_alarms_peeking": every}
    metrics |= {"judge": name, "questions": len(questions)}
    metrics |= judge_numbers(matches, settings.seed) | ranking(matches, list(answers), settings)
    metrics["pairs"] = pairs
    if not settings.answers:
        metrics |= world_numbers(questions, answers, matches, settings)
    judges = {name: judge_them}
    if not settings.answers:
        judges = {"program": program_judge, "reward": reward_of_chain()} | judges
    papers = two_turn_questions(settings.exam_questions, settings.seed + 1)
    metrics["exam"] = {
        each: {
            paper: found and dataclasses.asdict(found)
            for paper, found in exam(papers, judge, settings.seed).items()
        }
        for each, judge in judges.items()
    }
    show(metrics)
    source = {"name": "、".join(settings.answers or ["tiny_world"]), "rows": len(questions)}
    write = partial(
        write_all,
        questions=questions,
        answers=answers,
        ids=ids,
        matches=matches,
        metrics=metrics,
        settings=settings,
        leaked=leaked,
    )
    return stage.save(metrics, {"questions": source}, write)


def main(argv: list[str] | None = None) -> dict:
    settings = parse_settings(ArenaSettings, PRESETS, argv)
    files = [path for path in [*(settings.answers or []), settings.check_contamination] if path]
    more = {f"{path}_sha256": data_sha256(path) for path in files}
    if not settings.answers:
        more |= {name: find_answerer(name, settings.source)["id"] for name in split_names(settings.models)}
    name = "judge_arena" + ("-answers" if settings.answers else "")
    return run_evaluation(name, HOME, settings, learn, **more)


if __name__ == "__main__":
    run_main(main)
