"""归因：答案是从故事里哪个 token 来的？五种方法各指一个，对着标准答案数一数。注意力也在其中。

你会学到
  1. 梯度 × 输入：在这一点上，输入往哪边动一点，答案的分变多少。便宜，但只看眼前的一点。
  2. 积分梯度：从"什么都没写"的故事一路走到真的故事，把一路的梯度加起来；各 token 的份额之和正好等于分数的变化（完备性）。
  3. 遮挡：把一个 token 换掉，看分数掉多少。最直接，一个 token 要前向一次。
  4. 注意力不是解释：放在答案上的权重最小的头，去掉它，答对的题掉得最多；权重大的头，去掉了却没事。

怎么运行
  python attribution.py                      # Qwen 链 tiny 的 SFT 模型，504 道题
  python attribution.py --text "那天清晨，小刚去了花园。"  # 只看这一句的下一个字
  python attribution.py --model smollm2      # 真模型，英文的事实题

应当看到（tiny，实测见本文件夹的 README.md）：积分梯度、遮挡指对的比最好的单个头多得多。

参考：Sundararajan et al. 2017（积分梯度）；Simonyan et al. 2014（梯度）；Zeiler & Fergus 2014（遮挡）；
Jain & Wallace 2019（Attention is not Explanation）；DeYoung et al. 2020（去掉之后，答案还在不在）。
"""

from nlp_common.base.cli import run_main

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from nlp_common.base.arguments import COUNT, option
from nlp_common.base.errors import UserError
from nlp_common.draw.plots import bar_chart
from nlp_common.lm.chatml import whole_pieces
from nlp_common.lm.generation import batches_by_length
from nlp_common.lm.loading import make_fast
from nlp_common.train.lesson import run_lesson
from nlp_common.train.settings import parse_settings
from nlp_common.train.stage import Stage
from questions import Question, chance, describe, hits, make_questions, rank_correlation
from readers import (
    HOME,
    Reader,
    ReaderSettings,
    attention_maps,
    encode,
    find_reader,
    lesson_name,
    load_reader,
    need_language_model,
    without_heads,
)
from rollout_and_flow import rollout
from strips import Strip, write_strips

PRESETS = {
    "tiny": {"questions": 504, "points": 40},
    "full": {"questions": 10, "points": 32},
}
LABELS = {
    "chance": "随手一指|chance",
    "attention": "最好的头|best head",
    "layer_mean": "末层平均|last layer",
    "rollout": "滚动|rollout",
    "gradient": "梯度的长|gradient",
    "gradient_x_input": "梯度×输入|grad x input",
    "integrated_gradients": "积分梯度|IG",
    "occlusion": "遮挡|occlusion",
}
ALL_HEADS = 32  # 头不多于这么多，就一个一个都去掉试试
REMOVED = 2  # "去掉得分最高的几个 token，还答得对吗"：一个词两个字


@dataclass
class AttributionSettings(ReaderSettings):
    questions: int | None = option("多少道知道答案在哪里的题", limits=COUNT)
    points: int | None = option("积分梯度在路上取多少个点", limits=COUNT)
    text: str | None = option("不出题，只看这段文字后面的下一个 token 是从哪里来的")


# ---------------------------------------------------------------- 1. 要解释的分数


def answer_score(model, vectors: torch.Tensor, question: Question) -> torch.Tensor:
    """词向量 (B, T, C) → 答案的分 (B,)：答案的 logit 减去同类别的词的 logit 的平均。

    不用概率：概率连同"该说一个动物"也算进去了，而要问的是"为什么是这一个动物"。
    """
    last = torch.tensor([vectors.shape[1] - 1], device=vectors.device)  # 只要最后一个位置的输出
    logits = model(inputs_embeds=vectors, use_cache=False, logits_to_keep=last).logits[:, -1]  # (B, V)
    return logits[:, question.answer] - logits[:, question.others].mean(-1)


def word_vectors(model, question: Question) -> torch.Tensor:
    """(1, T, C)"""
    return model.get_input_embeddings()(torch.tensor([question.ids], device=model.device))


def blank_vectors(model, question: Question) -> torch.Tensor:
    """ "什么都没写"的故事 (1, T, C)：故事的每个 token 换成全词表的平均向量，问题和格式照旧。

    不用零向量：RMSNorm 把长度除掉了，零附近的方向没有意义；问题也不能抹掉，抹掉了就不知道在问什么。
    """
    blank = word_vectors(model, question).clone()
    blank[0, question.story] = model.get_input_embeddings().weight.mean(0)
    return blank


# ---------------------------------------------------------------- 2. 四种归因，各给出 (T,)


def gradient(model, question: Question) -> torch.Tensor:
    """∂分数/∂词向量，(T, C)。"""
    vectors = word_vectors(model, question).clone().requires_grad_(True)
    (slope,) = torch.autograd.grad(answer_score(model, vectors, question).sum(), vectors)
    return slope[0]


def gradient_x_input(model, question: Question) -> torch.Tensor:
    """Σ_c 梯度_c · 输入_c：分数的一阶近似里，每个 token 出的一份。"""
    return (gradient(model, question) * word_vectors(model, question)[0]).sum(-1)


def integrated_gradients(model, question: Question, points: int) -> torch.Tensor:
    """(x − x₀) · ∫₀¹ ∂F(x₀ + α(x − x₀))/∂x dα（Sundararajan et al. 2017 式 1）。

    积分用高斯—勒让德求积：同样几个点，比等距取点准得多。各 token 之和应当等于 F(x) − F(x₀)。
    """
    full, blank = word_vectors(model, question), blank_vectors(model, question)
    places, weights = np.polynomial.legendre.leggauss(points)  # 在 [−1, 1] 上
    alphas = torch.tensor((places + 1) / 2, dtype=full.dtype, device=full.device)[:, None, None]
    weights = torch.tensor(weights / 2, dtype=full.dtype, device=full.device)[:, None, None]
    path = (blank + alphas * (full - blank)).requires_grad_(True)  # (P, T, C)
    (slopes,) = torch.autograd.grad(answer_score(model, path, question).sum(), path)
    return ((full - blank) * (weights * slopes).sum(0)).sum(-1)[0]


@torch.no_grad()
def completeness(model, question: Question, shares: torch.Tensor) -> tuple[float, float]:
    """(份额之和与分数变化相差多少, 分数变化)，都是绝对值。"""
    full = answer_score(model, word_vectors(model, question), question)
    blank = answer_score(model, blank_vectors(model, question), question)
    change = (full - blank).item()
    return abs(shares.sum().item() - change), abs(change)


@torch.no_grad()
def occlusion(model, question: Question) -> torch.Tensor:
    """每个故事 token 换成平均向量，分数掉多少；别的位置是 0。"""
    full, blank = word_vectors(model, question), blank_vectors(model, question)
    rows = full.repeat(len(question.story), 1, 1)  # 每行遮一个
    for row, place in enumerate(question.story):
        rows[row, place] = blank[0, place]
    drop = torch.zeros(len(question.ids), dtype=full.dtype)
    drop[question.story] = (answer_score(model, full, question) - answer_score(model, rows, question)).cpu()
    return drop


# ---------------------------------------------------------------- 3. 去掉几个头


@torch.no_grad()
def accuracy(model, questions: list[Question]) -> float:
    """下一个 token（整个词表里最高的）正是答案的题，占多少。"""
    right = 0
    by_length: dict[int, list[Question]] = {}
    for question in questions:
        by_length.setdefault(len(question.ids), []).append(question)
    for group in by_length.values():
        for batch in batches_by_length([len(q.ids) for q in group], 64):
            ids = torch.tensor([group[i].ids for i in batch], device=model.device)  # (B, T)，一样长，不用填充
            best = model(ids, logits_to_keep=1, use_cache=False).logits[:, -1].argmax(-1)
            right += sum(int(best[n]) == group[i].answer for n, i in enumerate(batch))
    return right / len(questions)


def heads_table(reader: Reader, questions: list[Question], scores: dict[str, list]) -> dict:
    """每个头：放在答案上的注意力、指对的题、去掉它之后的正确率。

    头多的大模型，一个一个去掉太慢：只去掉看答案最多的 6 个和最少的 6 个，别的头没有 accuracy_without。
    """
    table: dict[str, dict] = {}
    for layer in range(reader.layers):
        for head in range(reader.heads):
            name = f"layer{layer}.head{head}"
            on_answer = [float(w[q.source].sum()) for w, q in zip(scores[name], questions, strict=True)]
            table[name] = {"weight": sum(on_answer) / len(on_answer), "hits": hits(scores[name], questions)}
    order = sorted(table, key=lambda name: table[name]["weight"])
    for name in order if len(order) <= ALL_HEADS else order[:6] + order[-6:]:
        layer, head = (int(part) for part in name.removeprefix("layer").split(".head"))
        with without_heads(reader.model, [(layer, head)]):
            table[name]["accuracy_without"] = accuracy(reader.model, questions)
    return table


# ---------------------------------------------------------------- 4. 从头到尾


def learn(stage: Stage, found: dict) -> dict:
    settings = stage.settings
    reader = load_reader(found)
    need_language_model(reader)
    if settings.text is not None:
        return explain_text(stage, reader)
    kind = "tiny_world" if reader.trained_on == "tiny_world" else "facts"
    questions = make_questions(reader.tokenizer, kind, settings.questions, settings.seed)
    before = accuracy(reader.model, questions)
    print(
        f"{len(questions)} 道题（{kind}），第一个字答对 {before:.3f}；随手指一个故事 token，指中 {chance(questions):.3f}"
    )
    if before == 0:
        raise UserError(
            f"这个模型一道题也答不对（{kind}），没有什么可解释的。请用 --model 换一个，或用 --text 自己写一句。"
        )

    # 一、注意力怎么说（要权重，所以是 eager），去掉各个头又怎样
    scores = attention_scores(reader, questions)
    heads = heads_table(reader, questions, scores)
    print_heads(heads, before)
    best = max(heads, key=lambda name: heads[name]["hits"])
    ways = {"attention": scores[best], "layer_mean": scores["layer_mean"], "rollout": scores["rollout"]}

    # 二、别的方法怎么说（不要权重，换回快的写法）
    reader.model.set_attn_implementation("sdpa")
    model = make_fast(reader.model)
    errors, changes = [], []
    for name in ("gradient", "gradient_x_input", "integrated_gradients", "occlusion"):
        ways[name] = []
    for question in questions:
        slope = gradient(model, question)
        shares = integrated_gradients(model, question, settings.points)
        error, change = completeness(model, question, shares)
        ways["gradient"].append(slope.norm(dim=-1))
        ways["gradient_x_input"].append((slope * word_vectors(model, question)[0]).sum(-1))
        ways["integrated_gradients"].append(shares)
        ways["occlusion"].append(occlusion(model, question))
        errors.append(error)
        changes.append(change)

    metrics = {"accuracy": before, "chance": chance(questions), "best_head": best}
    metrics |= {f"hits_{name}": hits(values, questions) for name, values in ways.items()}
    metrics["completeness_error"] = sum(errors) / sum(changes)
    metrics["completeness_error_worst"] = max(e / c for e, c in zip(errors, changes, strict=True))
    heads = {name: row for name, row in heads.items() if "accuracy_without" in row}
    removed = list(heads.values())
    metrics["weight_and_importance"] = rank_correlation(
        [row["weight"] for row in removed], [before - row["accuracy_without"] for row in removed]
    )
    metrics["accuracy_after_removing"] = {
        name: accuracy_after_removing(model, questions, values) for name, values in ways.items()
    }
    metrics["by_slot"] = by_slot(questions, ways)
    metrics["heads"] = heads
    print_ways(metrics, ways)

    def write(folder: Path) -> None:
        draw(folder, metrics, questions[0], ways)

    return stage.save(metrics, describe(questions, kind), write)


def attention_scores(reader: Reader, questions: list[Question]) -> dict[str, list]:
    """每个头、最后一层的平均、滚动：从最后一个位置看，每题一个 (T,) 的分。"""
    scores: dict[str, list] = {}
    for question in questions:
        maps = attention_maps(reader.model, question.ids)
        for layer, weights in enumerate(maps):
            for head in range(len(weights)):
                scores.setdefault(f"layer{layer}.head{head}", []).append(weights[head, -1])
        scores.setdefault("layer_mean", []).append(maps[-1].mean(0)[-1])
        scores.setdefault("rollout", []).append(rollout(maps)[-1][-1])
    return scores


@torch.no_grad()
def accuracy_after_removing(model, questions: list[Question], scores: list) -> float:
    """把这种方法得分最高的 REMOVED 个故事 token 换成平均向量，还答得对的题占多少：指得越准，剩得越少。"""
    right = 0
    for question, score in zip(questions, scores, strict=True):
        top = sorted(question.story, key=lambda place: float(score[place]), reverse=True)[:REMOVED]
        vectors = word_vectors(model, question).clone()
        vectors[0, top] = blank_vectors(model, question)[0, top]
        right += (
            int(model(inputs_embeds=vectors, use_cache=False, logits_to_keep=1).logits[0, -1].argmax())
            == question.answer
        )
    return right / len(questions)


def by_slot(questions: list[Question], ways: dict[str, list]) -> dict:
    """各类问题上指对的题。"""
    table: dict[str, dict] = {}
    for slot in dict.fromkeys(q.slot for q in questions):
        chosen = [n for n, q in enumerate(questions) if q.slot == slot]
        table[slot] = {
            name: hits([values[n] for n in chosen], [questions[n] for n in chosen])
            for name, values in ways.items()
        }
    return table


# ---------------------------------------------------------------- 5. 看


def explain_text(stage: Stage, reader: Reader) -> dict:
    """--text：下一个 token 是从哪里来的。与它相比的是得分第二到第十的 token。"""
    ids = encode(reader, stage.settings.text)
    reader.model.set_attn_implementation("sdpa")
    with torch.no_grad():
        logits = reader.model(torch.tensor([ids], device=reader.model.device)).logits[0, -1]
    best, *others = logits.topk(10).indices.tolist()
    pieces = whole_pieces(reader.tokenizer, ids)
    word = reader.tokenizer.decode([best])
    question = Question(ids, pieces, list(range(len(ids))), [], best, others, "text", word)
    shares = integrated_gradients(reader.model, question, stage.settings.points)
    error, change = completeness(reader.model, question, shares)
    rows = [
        Strip("梯度×输入", pieces, gradient_x_input(reader.model, question).tolist()),
        Strip("积分梯度", pieces, shares.tolist()),
        Strip("遮挡", pieces, occlusion(reader.model, question).tolist()),
    ]
    print(f"下一个 token 最可能是 {word!r}。各种方法说它来自（前三名）：")
    for row in rows:
        top = sorted(range(len(pieces)), key=lambda n: -row.scores[n])[:3]
        print(f"  {row.label}：" + "，".join(f"{pieces[n]!r}（第 {n} 个）{row.scores[n]:.2f}" for n in top))

    def write(folder: Path) -> None:
        write_strips(folder / "attribution", rows, f"为什么下一个是“{word}”", "与得分第二到第十的 token 相比")

    data = {"text": {"name": "text", "kind": "argument", "rows": 1, "text": stage.settings.text}}
    return stage.save({"completeness_error": error / max(change, 1e-9)}, data, write)


def print_heads(heads: dict, before: float) -> None:
    print("\n头              放在答案上的权重   指对的题   去掉它之后的正确率")
    removed = [(name, row) for name, row in heads.items() if "accuracy_without" in row]
    rows = sorted(removed, key=lambda item: item[1]["accuracy_without"])
    for name, row in rows[:12]:
        print(f"  {name:<14}{row['weight']:>12.3f}{row['hits']:>14.3f}{row['accuracy_without']:>14.3f}")
    if len(rows) > 12:
        print(
            f"  …… 其余 {len(rows) - 12} 个头，去掉后都在 {rows[12][1]['accuracy_without']:.3f} 以上（原来 {before:.3f}）"
        )


def print_ways(metrics: dict, ways: dict) -> None:
    print(f"\n方法            指对的题   去掉它指的 {REMOVED} 个 token 之后还答对")
    for name in ways:
        left = metrics["accuracy_after_removing"][name]
        label = LABELS[name].split("|")[0]
        print(f"  {label}{' ' * (14 - 2 * len(label))}{metrics[f'hits_{name}']:>10.3f}{left:>14.3f}")
    error = metrics["completeness_error"]
    print(
        f"积分梯度的份额之和，与分数的变化差 {error:.1%}"
        + ("：不可信，加大 --points 再看。\n" if error > 0.01 else "\n")
    )


def draw(folder: Path, metrics: dict, question: Question, ways: dict) -> None:
    bars = {LABELS["chance"]: metrics["chance"]} | {LABELS[name]: metrics[f"hits_{name}"] for name in ways}
    bar_chart(
        folder / "hits.svg",
        {"hits": bars},
        "答案抄自哪里：各种方法指对的题|Where the answer came from: hits",
        "",
        "",
    )
    heads = metrics["heads"]
    if len(heads) <= 16:
        short = {name: name.replace("layer", "").replace(".head", ".") for name in heads}
        series = {
            "放在答案上的权重|weight on the answer": {short[n]: row["weight"] for n, row in heads.items()},
            "去掉它之后的正确率|accuracy without it": {
                short[n]: row["accuracy_without"] for n, row in heads.items()
            },
        }
        bar_chart(
            folder / "heads.svg", series, "看得多不等于要紧|Weight is not importance", "层.头|layer.head", ""
        )
    story, marks = question.story, [place in question.source for place in question.story]
    pieces = [question.pieces[place] for place in story]
    rows = []
    for name, scores in ways.items():
        rows.append(Strip(LABELS[name].split("|")[0], pieces, [float(scores[0][p]) for p in story], marks))
    write_strips(
        folder / "attribution", rows, "答案来自故事里的谁", f"答案是“{question.word}”，方框是标准答案"
    )


def main(argv: list[str] | None = None) -> dict:
    settings = parse_settings(AttributionSettings, PRESETS, argv, None)
    found = find_reader(settings)
    name = lesson_name("attribution", settings)
    return run_lesson(name, HOME, settings, partial(learn, found=found), model_id=found["id"])


if __name__ == "__main__":
    run_main(main)
