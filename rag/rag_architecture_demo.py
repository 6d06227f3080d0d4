"""检索增强生成的全貌：不检索 → 检索 → 重排 → 有人把对的那一段递上来，一步一步值多少，都量出来。

你会学到
  1. 同一个模型、同一批题，只换递给它的那一段：答对几成就从一成升到十成。瓶颈在检索还是在模型，一看便知。
  2. 端到端的正确率不是一个谜：= 找对 × 会读 + 没找对 × 碰巧。会读的本领在别的题上量，碰巧的概率算得出来，乘起来与量到的
     相差不到两个标准误。
  3. 重排：把前几名连同问题一对一对地再看一遍。训练它要"难的反例"：BM25 排在前面、却不对的。它能补上 BM25 补不了的（换了
     说法），也补不了 BM25 已经做好的（照原文问的）。
  4. 装错了的重排比没有更坏：没训练过的分类头、不认汉字的模型，把排好的又打乱了。
  5. 引用要查：编号在不在、引的那一段里有没有这句话。三种编造的引用各抓出几成。

怎么运行
  python rag_architecture_demo.py                                   # 小世界，与人民日报 200 段
  python rag_architecture_demo.py --reader Qwen/Qwen3-0.6B          # 真的段落上换成 Qwen3 来答
  python rag_architecture_demo.py --reader "http://127.0.0.1:8000/v1 Qwen3-8B"
  python rag_architecture_demo.py --dataset cmrc2018.jsonl           # 人写的问题；也可以是自己的文件夹
  python rag_architecture_demo.py --reranker e5 --layers 4          # 从 e5 的前四层开始训练重排
  python rag_architecture_demo.py --reranker aligner                # 不用 e5 的重排

应当看到（tiny，实测见本文件夹的 README.md）：四步的正确率一级一级上去；算出来的与量到的对得上；照原文问的段落上，
训练过的重排也没有多少可加，随机的头却坏得多。

参考：Lewis et al. 2020（RAG）；Nogueira & Cho 2019（交叉编码器重排）；Khattab & Zaharia 2020（ColBERT，最像的字）。
"""

from nlp_common.base.cli import run_main

import random
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from citations import FAULTS, check_citation, plant_faults
from nlp_common.base.arguments import COUNT, option
from nlp_common.base.console import print_table
from nlp_common.draw.plots import bar_chart, line_chart
from nlp_common.tiny.world import WORLD
from nlp_common.train.chain import chain_model
from nlp_common.train.lesson import once, run_lesson, run_part
from nlp_common.train.settings import LessonSettings, parse_settings
from nlp_common.train.stage import Stage
from rag_benches import Bench, make_news, make_world, search_dense
from rag_common.corpus import Question, data_of
from rag_common.embed import choose_embedder, torch_threads
from rag_common.generate import FromServer, Generator, load_generator
from rag_common.metrics import paired_bootstrap
from rag_common.rerank import RandomHead, Reranker, load_reranker, rank

HOME = Path(__file__).resolve().parent
PRESETS = {
    "tiny": {"stories": 120, "questions": 200, "documents": 200, "asked": 80, "compared": 40, "layers": 4},
    "full": {
        "stories": 1000,
        "questions": 2000,
        "documents": 3000,
        "asked": 1000,
        "compared": 500,
        "layers": 12,
    },
}
# 没有给的时候：从哪一种开始 → 学习率、tiny 训练几步、full 训练几步。编码器懂得多，几十步就够；aligner 从零学，也便宜
RECIPES = {"aligner": (1e-2, 400, 3000), "encoder": (1e-4, 60, 1000)}
NEGATIVES, BATCH = 4, (3, 1)  # 一题配几个难的反例；一步几道小世界的、几道真的段落的
STEPS = {"without": "不检索", "retrieve": "检索", "rerank": "重排", "oracle": "递上对的"}
COSTS = {
    "none": "不重排",
    "trained": "训练过的",
    "untrained": "没训练，只数一样的",
    "random_head": "随机的头",
    "blind": "不认汉字",
}


@dataclass
class ArchitectureSettings(LessonSettings):
    NOT_IN_FINGERPRINT = LessonSettings.NOT_IN_FINGERPRINT | {"threads"}

    stories: int | None = option("小世界里多少篇故事", limits=COUNT)
    questions: int | None = option("小世界里多少题", limits=COUNT)
    dataset: str = option(
        "真的段落：people_daily、文件夹，或 cmrc2018 那样的 json/jsonl 文件", "people_daily"
    )
    documents: int | None = option("真的段落考多少段（另用两倍的训练重排）", limits=COUNT)
    asked: int | None = option("真的段落上最多问几题", limits=COUNT)
    generator: str = option("答小世界的模型：chain 是 Qwen 链的 SFT 模型", "chain")
    reader: str = option('答真的段落的：extract（抄最像的一句）、hub 名、文件夹，或 "网址 模型名"', "extract")
    embedder: str = option("向量检索用的：auto（有 e5 用 e5）、e5、hashed，或 hub 名", "auto")
    reranker: str = option("重排从什么开始：auto（有 e5 用 e5）、e5、aligner（不要模型），或 hub 名", "auto")
    layers: int | None = option("重排用编码器的前几层", limits=COUNT)
    steps: int | None = option("重排训练几步", limits=COUNT)
    compared: int | None = option("比较几种重排，各用前多少题", limits=COUNT)
    learning_rate: float | None = option("重排的学习率；默认编码器 1e-4，aligner 1e-2")
    depth: int = option("重排前几名", 6, limits=COUNT)
    threads: int = option("用几个线程", 1, limits=COUNT)


# ---------------------------------------------------------------- 1. 从头到尾


def learn(stage: Stage) -> dict:
    settings = stage.settings
    generator, reader = (
        load_generator(settings.generator, 32),
        load_generator(settings.reader, flag="--reader"),
    )
    for each in (generator, reader):  # 没有开的服务器，现在就说，不要算到最后全是 0
        if isinstance(each, FromServer):
            each.server.check()
    reranker = load_reranker(settings.reranker, settings.layers, settings.seed)
    world, world_train, spare = make_world(settings)
    news, news_train = make_news(settings)
    dense = Bench(news.corpus, once(stage, "dense", search_dense, news.corpus, settings))

    print(f"重排：{reranker.name}；训练 {settings.steps} 步，反例是 BM25 找错的", flush=True)
    examples = [hard_examples(world_train), hard_examples(news_train)]
    with torch_threads(settings.threads):
        train = partial(train_reranker, model=reranker, examples=examples, settings=settings)
        trained = run_part(stage, "reranker", train, reranker.learned())
        right, first = once(stage, "tiny_world", four_ways, world, reranker, generator)
        skill = once(stage, "reading", reading, generator, spare)
        identity = check_identity(right, first, world.corpus.questions, skill)
        real = {"bm25": once(stage, "news_bm25", four_ways, news, reranker, reader)[0]}
        again = once(stage, "news_dense", four_ways, dense, reranker, reader, ("retrieve", "rerank"))[0]
        real["dense"] = real["bm25"] | again
        costs = {
            name: once(stage, f"costs_{name}", compare_rerankers, bench, reranker, settings)
            for name, bench in {"tiny_world": world, "news": news}.items()
        }
        citations = once(stage, "citations", check_citations, news, reader, settings.seed)
        show_one(world, reranker, generator)
        show_one(news, reranker, reader)

    metrics = {f"accuracy_{step}": mean(right[step]) for step in STEPS}
    metrics["identity_gap"] = identity["retrieve"]["gap"]
    metrics["identity"] = identity
    metrics["gain"] = gain(right, settings.seed)
    metrics["news"] = {name: {step: mean(each[step]) for step in STEPS} for name, each in real.items()}
    metrics["news_gain"] = {name: gain(each, settings.seed) for name, each in real.items()}
    metrics["costs"], metrics["citations"] = costs, citations
    metrics["n"] = {"tiny_world": len(world.corpus.questions), "news": len(news.corpus.questions)}
    curve = [{"step": int(step), "loss": loss} for step, loss in trained.pop("curve").items()]
    metrics["reranker"] = {"name": reranker.name, **trained}
    report(metrics)
    data = {
        "tiny_world": world.corpus.describe(),
        "dataset": {**news.corpus.describe(), **data_of(settings.dataset)},
    }
    return stage.save(metrics, data, lambda folder: draw(folder, metrics, curve), curve)


# ---------------------------------------------------------------- 2. 训练重排


def hard_examples(bench: Bench) -> list[tuple[str, list[str]]]:
    """每题：(问题, [对的那一段, BM25 排在前面的几段错的])。随手抓的反例太容易，学不到东西。"""
    examples = []
    for question, found in bench.pairs():
        wrong = [name for name in found if name not in question.gold][:NEGATIVES]
        if wrong and question.meta.get("matches", 1) == 1:  # 别的故事也合得上的题，没有错的一段
            right = min(question.gold)
            examples.append((question.text, [bench.texts[name] for name in (right, *wrong)]))
    return examples


def some(pool: list, size: int, rng: random.Random) -> list:
    return rng.sample(pool, min(size, len(pool)))


def train_reranker(
    part: Stage, model: Reranker, examples: list[list], settings: ArchitectureSettings
) -> dict:
    """每题的几段打分，softmax 之后，对的那一段的概率越大越好（listwise 交叉熵）。"""
    rng = random.Random(f"rerank-{settings.seed}")
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=settings.learning_rate, weight_decay=0.0)
    losses = []
    model.train()
    for step in tqdm(range(settings.steps), desc="训练重排", leave=False, disable=None):
        for group in optimizer.param_groups:  # 预热十步，再线性降到 0
            group["lr"] = settings.learning_rate * min(1, (step + 1) / 10) * (1 - step / settings.steps)
        batch = [each for size, pool in zip(BATCH, examples, strict=True) for each in some(pool, size, rng)]
        questions = [question for question, passages in batch for _ in passages]
        scores = model(questions, [text for _, passages in batch for text in passages])
        lists = scores.split([len(passages) for _, passages in batch])  # 每题一列，第 0 个是对的
        loss = -torch.stack([each.log_softmax(0)[0] for each in lists]).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    size = max(1, settings.steps // 20)
    curve = {str(start + size): mean(losses[start : start + size]) for start in range(0, len(losses), size)}
    return {"examples": sum(map(len, examples)), "loss": mean(losses[-size:]), "curve": curve}


# ---------------------------------------------------------------- 3. 四步，各答对几成


def four_ways(
    bench: Bench, reranker: torch.nn.Module, generator: Generator, steps=tuple(STEPS)
) -> tuple[dict, dict]:
    """→ (每一步每一题答对没有, 每一步递上去的是哪一篇)。递给模型的只有一段。"""
    questions = bench.corpus.questions
    first = {
        "without": [None] * len(questions),
        "retrieve": [found[0] if found else None for found in bench.found],
        "rerank": [
            rerank(bench, reranker, each.text, found)[0] if found else None for each, found in bench.pairs()
        ],
        "oracle": [min(each.gold) for each in questions],
    }
    right = {step: answered_right(bench, generator, first[step]) for step in steps}
    return right, first


def rerank(bench: Bench, reranker: torch.nn.Module, question: str, found: list[str]) -> list[str]:
    return [found[place] for place in rank(reranker, question, [bench.texts[name] for name in found])]


def answered_right(bench: Bench, generator: Generator, names: list[str | None]) -> list[bool]:
    questions = bench.corpus.questions
    texts = [each.meta.get("read", each.text) for each in questions]
    answers = generator.answer(texts, [[bench.texts[name]] if name else [] for name in names])
    return [bool(q.answer) and q.answer in a.text for q, a in zip(questions, answers, strict=True)]


def reading(generator: Generator, spare: Bench) -> tuple[float, int]:
    """会读的本领：另一批题，递上对的那一段，答对几成；量了几题。"""
    right = answered_right(spare, generator, [min(each.gold) for each in spare.corpus.questions])
    return mean(right), len(right)


def check_identity(right: dict, first: dict, questions: list[Question], reader: tuple[float, int]) -> dict:
    """正确率 = 找对 · 会读 + 没找对 · 碰巧。

    碰巧：递上的是别的故事，问的那一样它也有一个，恰好相同的概率是 1/那一类有几个词，再乘会读的本领。
    标准误：每题是一枚正面概率 p 的硬币；会读的本领自己也有误差。
    """
    skill, n_skill = reader
    found = {}
    for step in ("retrieve", "rerank"):
        hits = [name in each.gold for name, each in zip(first[step], questions, strict=True)]
        same = [
            1.0 if hit else 1 / len(WORLD[q.meta["slot"]]) for hit, q in zip(hits, questions, strict=True)
        ]
        chances = [skill * each for each in same]
        n = len(questions)
        variance = sum(p * (1 - p) for p in chances) / n**2 + mean(same) ** 2 * skill * (1 - skill) / n_skill
        measured, predicted = mean(right[step]), mean(chances)
        found[step] = {
            "hit": mean(hits),
            "reader": skill,
            "coincidence": mean([p for p, hit in zip(chances, hits, strict=True) if not hit] or [0.0]),
            "predicted": predicted,
            "measured": measured,
            "gap": abs(measured - predicted),
            "two_se": 2 * variance**0.5,
        }
    return found


def gain(right: dict, seed: int) -> dict:
    """重排比不重排多对几成，95% 区间。"""
    more, low, high = paired_bootstrap(
        [float(each) for each in right["rerank"]], [float(each) for each in right["retrieve"]], seed=seed
    )
    return {"gain": more, "low": low, "high": high}


# ---------------------------------------------------------------- 4. 装错了的重排，与引用


def compare_rerankers(bench: Bench, trained: Reranker, settings: ArchitectureSettings) -> dict[str, float]:
    """几种重排的第一名对几成，同一批候选。不认汉字：汉字在它的词表里都是同一个"不认识"。"""
    fresh = load_reranker(settings.reranker, settings.layers, settings.seed)
    models = {
        "trained": trained,
        "untrained": fresh,
        "random_head": RandomHead(fresh, settings.seed),
        "blind": trained,
    }
    pairs = bench.pairs()[: settings.compared]
    rows = {"none": mean([found[:1] != [] and found[0] in q.gold for q, found in pairs])}
    for name, model in models.items():
        see = blind if name == "blind" else str
        rows[name] = mean([
            first_right(model, see(q.text), [see(bench.texts[each]) for each in found], found, q)
            for q, found in pairs
        ])  # fmt: skip
    return rows


def first_right(
    model: torch.nn.Module, text: str, passages: list[str], found: list[str], question: Question
) -> bool:
    return bool(found) and found[rank(model, text, passages)[0]] in question.gold


def blind(text: str) -> str:
    return "".join("□" if "\u4e00" <= each <= "\u9fff" else each for each in text)


def check_citations(bench: Bench, reader: Generator, seed: int, k: int = 3) -> dict:
    """递上前 k 段，回答要注明出自哪一段；再把对的回答改出三种毛病，看查得出几成。"""
    questions = bench.corpus.questions
    passages = [[bench.texts[name] for name in found[:k]] for found in bench.found]
    answers = reader.answer([each.text for each in questions], passages)
    said = [(a, texts) for a, texts in zip(answers, passages, strict=True) if a.found]
    passed = [check_citation(answer.text, texts) == "" for answer, texts in said]
    honest = [pair for pair, ok in zip(said, passed, strict=True) if ok]
    rng = random.Random(f"citations-{seed}")
    planted = plant_faults(honest, rng)
    caught = {kind: mean([check_citation(*each) != "" for each in rows]) for kind, rows in planted.items()}
    return {"answers": len(said), "passed": mean(passed), "caught": caught}


# ---------------------------------------------------------------- 5. 看


def mean(values) -> float:
    values = list(values)
    return float(sum(values) / len(values)) if values else 0.0


def show_one(bench: Bench, reranker: torch.nn.Module, generator: Generator) -> None:
    """一道题走一遍：挑 BM25 找错、重排改对的第一道；没有就第一道。"""
    pairs = [pair for pair in bench.pairs() if pair[1]]
    changed = (
        pair for pair in pairs
        if pair[1][0] not in pair[0].gold and rerank(bench, reranker, pair[0].text, pair[1])[0] in pair[0].gold
    )  # fmt: skip
    question, found = next(changed, pairs[0])
    again = rerank(bench, reranker, question.text, found)
    print(f"\n问：{question.text}　（标准答案：{question.answer}）")
    for name, names in (("检索的第一名", found), ("重排的第一名", again)):
        ask = question.meta.get("read", question.text)
        [answer] = generator.answer([ask], [[bench.texts[names[0]]]])
        mark = "对" if question.answer in answer.text else "错"
        shown = " ".join(bench.texts[names[0]].split())[:60]
        print(f"  {name}：{shown}\n    答：{answer.text}　（{mark}）")


def report(metrics: dict) -> None:
    rows = {"小世界（换了说法）": {step: metrics[f"accuracy_{step}"] for step in STEPS}}
    rows |= {"真的段落，BM25": metrics["news"]["bm25"], "真的段落，向量": metrics["news"]["dense"]}
    table = [[name, *(f"{row[step]:.3f}" for step in STEPS)] for name, row in rows.items()]
    print_table([["答对几成", *STEPS.values()], *table])
    print()
    for step, row in metrics["identity"].items():
        print(
            f"  {STEPS[step]}：找对 {row['hit']:.3f} × 会读 {row['reader']:.3f} + 没找对 {1 - row['hit']:.3f} × 碰巧 {row['coincidence']:.3f}"
            f" = {row['predicted']:.3f}，量到 {row['measured']:.3f}，差 {row['gap']:.3f}（两个标准误 {row['two_se']:.3f}）"
        )
    names = {"tiny_world": "小世界", "news": "真的段落"}
    table = [[names[name], *(f"{row[kind]:.3f}" for kind in COSTS)] for name, row in metrics["costs"].items()]
    print_table([["第一名对几成", *COSTS.values()], *table])
    cited = metrics["citations"]
    caught = "，".join(f"{FAULTS[kind]} {share:.3f}" for kind, share in cited["caught"].items())
    print(f"\n  引用：{cited['answers']} 个回答，查过关的 {cited['passed']:.3f}；编造的抓出：{caught}\n")


def draw(folder: Path, metrics: dict, curve: list[dict]) -> None:
    english = {"without": "no retrieval", "retrieve": "retrieve", "rerank": "rerank", "oracle": "oracle"}
    rows = {
        "小世界|tiny world": {step: metrics[f"accuracy_{step}"] for step in STEPS},
        "真的段落，BM25|real, BM25": metrics["news"]["bm25"],
        "真的段落，向量|real, dense": metrics["news"]["dense"],
    }
    bars = {name: {f"{STEPS[s]}|{english[s]}": row[s] for s in STEPS} for name, row in rows.items()}
    bar_chart(folder / "steps.svg", bars, "一步一步值多少|Accuracy by step", "", "答对几成|accuracy")
    names = {"tiny_world": "小世界|tiny world", "news": "真的段落|real"}
    bars = {names[k]: {f"{COSTS[c]}|{c}": row[c] for c in COSTS} for k, row in metrics["costs"].items()}
    bar_chart(folder / "rerankers.svg", bars, "几种重排|Rerankers", "", "R@1")
    line = {"loss": ([row["step"] for row in curve], [row["loss"] for row in curve])}
    line_chart(folder / "training.svg", line, "训练重排|Training the reranker", "步|step", "loss")


def main(argv: list[str] | None = None) -> dict:
    settings = parse_settings(ArchitectureSettings, PRESETS, argv)
    settings.embedder = choose_embedder(settings.embedder)
    if settings.reranker == "auto":
        settings.reranker = "e5" if settings.embedder == "e5" else "aligner"
    rate, tiny, full = RECIPES["aligner" if settings.reranker == "aligner" else "encoder"]
    settings.learning_rate = settings.learning_rate or rate
    settings.steps = settings.steps or (full if settings.preset == "full" else tiny)
    model = chain_model("sft")["id"] if settings.generator == "chain" else settings.generator
    return run_lesson("rag_architecture_demo", HOME, settings, learn, generator_id=model)


if __name__ == "__main__":
    run_main(main)
