"""logit lens 与激活修补：答案在第几层、哪个位置上出现，换掉那里，答案跟不跟着换。

你会学到
  1. logit lens：残差流从头到尾是同一个空间，每一层都可以直接接上最后的归一与输出层，看它"现在想说什么"。
     hidden_states 的最后一项已经归一过了，再归一一次就错了。
  2. 激活修补：两个故事只差一个词。把一个故事算到一半的某个位置换进另一个故事，看答案改没改：
     这不是"看起来相关"，是动手换了、结果变了。
  3. 信息怎样走：开头在答案那个词上，经过注意力，搬到最后一个位置。

怎么运行
  python logit_lens.py                        # Qwen 链 tiny 的 SFT 模型
  python logit_lens.py --model smollm2 --text "The capital of France is the city of"
  python logit_lens.py --model smollm2        # 真模型，英文的事实题

应当看到（tiny，实测见本文件夹的 README.md）：第一个字答对，词向量 0，最后一层全对；修补答案的那个词，答案就换。

参考：nostalgebraist 2020（logit lens）；Vig et al. 2020、Meng et al. 2022（激活修补）；Belrose et al. 2023（tuned lens）。
"""

from nlp_common.base.cli import run_main

import contextlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from nlp_common.base.arguments import COUNT, option
from nlp_common.base.errors import UserError
from nlp_common.draw.figures import cjk_font
from nlp_common.draw.plots import bar_chart
from nlp_common.lm.chatml import whole_pieces
from nlp_common.train.lesson import run_lesson
from nlp_common.train.settings import parse_settings
from nlp_common.train.stage import Stage
from questions import Question, describe, make_questions, swap_answer
from readers import (
    HOME,
    Reader,
    ReaderSettings,
    encode,
    find_reader,
    layers_of,
    lesson_name,
    load_reader,
    mixer_of,
    need_language_model,
    norm_of,
)

PRESETS = {"tiny": {"questions": 504, "pairs": 96}, "full": {"questions": 20, "pairs": 4}}
PLACES = {"source": "答案那个词", "last": "最后一个位置", "rest": "其余的位置"}


@dataclass
class LensSettings(ReaderSettings):
    questions: int | None = option("logit lens 看多少道题", limits=COUNT)
    pairs: int | None = option("激活修补用多少对故事", limits=COUNT)
    text: str | None = option("不出题，只看这段文字每层每个位置想说什么")


# ---------------------------------------------------------------- 1. logit lens


@torch.no_grad()
def logit_lens(model, ids: list[int]) -> torch.Tensor:
    """每一层每个位置想说什么：(L+1, T, V) 的 logits；第 0 行是词向量，最后一行就是模型的输出。"""
    inputs = torch.tensor([ids], device=model.device)
    states = model(inputs, output_hidden_states=True).hidden_states  # L+1 个 (1, T, C)
    norm, head = norm_of(model), model.get_output_embeddings()
    lens = [head(norm(state[0])) for state in states[:-1]]
    lens.append(head(states[-1][0]))  # 最后一项库已经归一过了
    return torch.stack(lens)


def lens_accuracy(model, questions: list[Question]) -> tuple[list[float], list[float]]:
    """每层在最后一个位置上：(最想说的正是答案的题占多少, 答案的平均概率)。"""
    right, probability = [], []
    for question in questions:
        last = logit_lens(model, question.ids)[:, -1]  # (L+1, V)
        right.append((last.argmax(-1) == question.answer).float())
        probability.append(last.softmax(-1)[:, question.answer])
    return torch.stack(right).mean(0).tolist(), torch.stack(probability).mean(0).tolist()


# ---------------------------------------------------------------- 2. 激活修补


@torch.no_grad()
def residual_stream(model, ids: list[int]) -> list[torch.Tensor]:
    """进入每一层之前的残差流，和最后归一之前的，一共 L+1 个 (T, C)。"""
    seen: list[torch.Tensor] = []

    def keep(module, inputs: tuple) -> None:
        seen.append(inputs[0][0].clone())

    hooks = [module.register_forward_pre_hook(keep) for module in (*layers_of(model), norm_of(model))]
    try:
        model(torch.tensor([ids], device=model.device))
    finally:
        for hook in hooks:
            hook.remove()
    return seen


@contextlib.contextmanager
def patched(module, places: list[int], values: torch.Tensor) -> Iterator[None]:
    """里面运行的模型，module 的输入在 places 这几个位置上换成 values (len(places), C)。"""

    def put(_, inputs: tuple) -> tuple:
        changed = inputs[0].clone()  # (1, T, C)
        changed[0, places] = values
        return (changed, *inputs[1:])

    hook = module.register_forward_pre_hook(put)
    try:
        yield
    finally:
        hook.remove()


@torch.no_grad()
def preference(model, ids: list[int], new: int, old: int) -> float:
    """最后一个位置上，新答案的 logit 减旧答案的。"""
    logits = model(torch.tensor([ids], device=model.device), logits_to_keep=1).logits[0, -1]
    return (logits[new] - logits[old]).item()


def patch_pair(model, here: Question, there: Question) -> dict:
    """把 there 的残差流换进 here：每层、每类位置各换一次，答案移过去多少（0 没动，1 完全是 there 的答案）。

    移过去多少 = (换了以后的偏好 − here 的) / (there 的 − here 的)，偏好是新旧两个答案的 logit 之差。
    """
    new, old = there.answer, here.answer
    start, goal = preference(model, here.ids, new, old), preference(model, there.ids, new, old)
    stream = residual_stream(model, there.ids)
    last = len(here.ids) - 1
    groups = {
        "source": here.source,
        "last": [last],
        "rest": [place for place in range(last) if place not in here.source],
    }
    moved: dict[str, list[float]] = {name: [] for name in groups}
    for module, values in zip((*layers_of(model), norm_of(model)), stream, strict=True):
        for name, places in groups.items():
            with patched(module, places, values[places]):
                now = preference(model, here.ids, new, old)
            moved[name].append((now - start) / (goal - start))
    return moved


def patch_heads(model, here: Question, there: Question, heads: int) -> list[list[float]]:
    """只换一个头在最后一个位置上取来的东西：每层每头，答案移过去多少。"""
    new, old = there.answer, here.answer
    start, goal = preference(model, here.ids, new, old), preference(model, there.ids, new, old)
    last = len(here.ids) - 1
    mixed: list[torch.Tensor] = []  # there 里每层各头取来的东西，各 (T, H·d)

    def keep(_, inputs: tuple) -> None:
        mixed.append(inputs[0][0].clone())

    mixers = [mixer_of(layer) for layer in layers_of(model)]
    hooks = [mixer.register_forward_pre_hook(keep) for mixer in mixers]
    with torch.no_grad():
        model(torch.tensor([there.ids], device=model.device))
    for hook in hooks:
        hook.remove()

    table = []
    for mixer, other in zip(mixers, mixed, strict=True):
        size = other.shape[-1] // heads
        row = []
        for head in range(heads):
            part = slice(head * size, (head + 1) * size)

            def put(_, inputs: tuple, part=part, other=other) -> tuple:
                changed = inputs[0].clone()
                changed[0, last, part] = other[last, part]
                return (changed, *inputs[1:])

            hook = mixer.register_forward_pre_hook(put)
            row.append((preference(model, here.ids, new, old) - start) / (goal - start))
            hook.remove()
        table.append(row)
    return table


def patch_grid(model, here: Question, there: Question) -> torch.Tensor:
    """一次只换一层里的一个位置：(L+1, T)，答案移过去多少。画图用；层多的模型隔几层换一次，没换的是 0。"""
    new, old = there.answer, here.answer
    start, goal = preference(model, here.ids, new, old), preference(model, there.ids, new, old)
    stream = residual_stream(model, there.ids)
    grid = torch.zeros(len(stream), len(here.ids))
    every = max(1, len(stream) // 4) if len(stream) > 8 else 1
    for row, (module, values) in enumerate(zip((*layers_of(model), norm_of(model)), stream, strict=True)):
        if row % every and row != len(stream) - 1:
            continue
        for place in range(len(here.ids)):
            with patched(module, [place], values[[place]]):
                grid[row, place] = (preference(model, here.ids, new, old) - start) / (goal - start)
    return grid


# ---------------------------------------------------------------- 3. 从头到尾


def learn(stage: Stage, found: dict) -> dict:
    settings = stage.settings
    reader = load_reader(found)
    need_language_model(reader)
    model = reader.model
    if settings.text is not None:
        return lens_text(stage, reader)
    kind = "tiny_world" if reader.trained_on == "tiny_world" else "facts"
    questions = make_questions(reader.tokenizer, kind, settings.questions, settings.seed)
    right, probability = lens_accuracy(model, questions)
    print(f"{len(questions)} 道题（{kind}）。如果到这一层就开口，第一个字答对：")
    shown_layers = [n for n in range(reader.layers) if n % max(1, reader.layers // 8) == 0] + [reader.layers]
    for layer in shown_layers:
        name = "词向量" if layer == 0 else f"第 {layer} 层后"
        print(f"  {name}  {right[layer]:.3f}   答案的平均概率 {probability[layer]:.3f}")
    if right[-1] == 0:
        raise UserError(f"这个模型一道题也答不对（{kind}）。请用 --model 换一个，或用 --text 自己写一句。")

    pairs = make_pairs(reader, questions, settings)
    moved = [patch_pair(model, here, there) for here, there in pairs]
    few = pairs if reader.layers * reader.heads <= 32 else pairs[:1]  # 头多的大模型，一个个换太慢，只换一对
    heads = torch.tensor([patch_heads(model, here, there, reader.heads) for here, there in few]).mean(0)
    table = {
        name: [sum(m[name][layer] for m in moved) / len(moved) for layer in range(reader.layers + 1)]
        for name in PLACES
    }
    print(f"\n{len(pairs)} 对只差一个词的故事，把另一个故事的残差流换过来，答案移过去多少（1 是完全换了）：")
    for name, label in PLACES.items():
        cells = "  ".join(f"第{layer}层前 {table[name][layer]:.2f}" for layer in shown_layers[:-1])
        print(f"  {label}{'　' * (6 - len(label))}  {cells}  最后 {table[name][-1]:.2f}")
    best = int(heads.argmax())
    print(
        f"  只换一个头取来的：最多的是第 {best // reader.heads} 层头 {best % reader.heads}，移过去 {heads.max():.2f}\n"
    )

    metrics = {f"lens_accuracy.layer{n}": value for n, value in enumerate(right)}
    metrics |= {f"lens_probability.layer{n}": value for n, value in enumerate(probability)}
    metrics |= {f"moved_{name}.layer{n}": value for name, row in table.items() for n, value in enumerate(row)}
    metrics["moved_head"] = {
        f"layer{n}.head{h}": float(heads[n, h]) for n in range(reader.layers) for h in range(reader.heads)
    }
    grid = patch_grid(model, *pairs[0])

    def write(folder: Path) -> None:
        draw(folder, right, probability, grid, pairs[0])

    return stage.save(metrics, describe(questions, kind), write)


def make_pairs(
    reader: Reader, questions: list[Question], settings: LensSettings
) -> list[tuple[Question, Question]]:
    """只差一个词的两道题，模型两道都答对，才谈得上"答案移过去"。"""
    rng = random.Random(f"pairs-{settings.seed}")
    pairs = []
    for question in questions:
        other = swap_answer(reader.tokenizer, question, rng)
        if other is None or len(pairs) == settings.pairs:
            continue
        said = [int(logit_lens(reader.model, each.ids)[-1, -1].argmax()) for each in (question, other)]
        if said == [question.answer, other.answer]:
            pairs.append((question, other))
    if not pairs:
        raise UserError(
            "没有一对故事是模型两个都答对的，修补不出什么来：请用 --model 换一个会答这些题的模型。"
        )
    return pairs


def lens_text(stage: Stage, reader: Reader) -> dict:
    """--text：每层每个位置最想说的 token。"""
    ids = encode(reader, stage.settings.text, 64)
    lens = logit_lens(reader.model, ids)  # (L+1, T, V)
    pieces = whole_pieces(reader.tokenizer, ids)
    said = [[reader.tokenizer.decode([int(token)]) for token in row] for row in lens.argmax(-1)]
    print("每层最想说的下一个 token（最后四个位置）：")
    for layer, row in enumerate(said):
        print(
            f"  {'词向量' if layer == 0 else f'第 {layer} 层后'}  "
            + "  ".join(f"{p!r}→{s!r}" for p, s in list(zip(pieces, row, strict=True))[-4:])
        )
    final = said[-1][-1]
    first = min(layer for layer in range(len(said)) if all(row[-1] == final for row in said[layer:]))
    print(f"结尾的 {final!r} 从第 {first} 层起就定了\n")

    def write(folder: Path) -> None:
        draw_text(folder / "lens.png", pieces, said, lens.softmax(-1).max(-1).values)

    data = {"text": {"name": "text", "kind": "argument", "rows": 1, "text": stage.settings.text}}
    return stage.save({"settled_at_layer": first, "tokens": len(ids)}, data, write)


# ---------------------------------------------------------------- 4. 图


def draw(folder: Path, right: list[float], probability: list[float], grid: torch.Tensor, pair: tuple) -> None:
    names = ["词向量|embedding", *(f"{n} 层后|after {n}" for n in range(1, len(right)))]
    chosen = range(0, len(right), max(1, len(right) // 8))
    bars = {
        "第一个字答对|first token right": {names[n]: right[n] for n in chosen},
        "答案的概率|probability of it": {names[n]: probability[n] for n in chosen},
    }
    bar_chart(folder / "lens.svg", bars, "到这一层就开口|If it spoke after this layer", "", "")
    here, there = pair
    labels = [f"{a}/{b}" if a != b else a for a, b in zip(here.pieces, there.pieces, strict=True)]
    draw_grid(folder / "patching.png", grid, labels, f"{here.word} -> {there.word}")


def shown(text: str) -> str:
    """图上的一个 token：没有中文字体就只留能画的。"""
    text = "".join(
        c if c.isprintable() and c != "\N{REPLACEMENT CHARACTER}" else "."
        for c in text.replace("\n", "⏎").replace("$", "")
    )
    text = text.replace("<|im_start|>", "<s>").replace("<|im_end|>", "<e>")
    return text if cjk_font() or text.isascii() else "".join(c if c.isascii() else "?" for c in text)


def draw_grid(path: Path, grid: torch.Tensor, labels: list[str], title: str) -> None:
    """行是层，列是位置，颜色是答案移过去多少。"""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(6, 0.2 * grid.shape[1]), 1.6 + 0.32 * grid.shape[0]), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(grid.numpy(), cmap="RdBu", vmin=-1, vmax=1, aspect="auto")
    axes.set_xticks(
        range(len(labels)), [shown(label) for label in labels], fontsize=7, rotation=90, fontfamily=cjk_font()
    )
    axes.set_yticks(range(len(grid)), [f"before {n}" for n in range(len(grid) - 1)] + ["final"], fontsize=8)
    axes.set_title(shown(title), fontsize=10, fontfamily=cjk_font())
    figure.colorbar(image, ax=axes, pad=0.01)
    figure.savefig(path, dpi=90)


def draw_text(path: Path, pieces: list[str], said: list[list[str]], sure: torch.Tensor) -> None:
    """每格写着这一层在这个位置最想说的 token，颜色是它有多大把握。"""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.5 + 0.75 * len(pieces), 1.2 + 0.24 * len(said)), layout="constrained")
    axes = figure.subplots()
    axes.imshow(sure.numpy(), cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for row, words in enumerate(said):
        for column, word in enumerate(words):
            ink = "white" if sure[row, column] > 0.55 else "black"
            axes.text(
                column,
                row,
                shown(word)[:8],
                ha="center",
                va="center",
                fontsize=6,
                color=ink,
                fontfamily=cjk_font(),
            )
    axes.set_xticks(range(len(pieces)), [shown(piece) for piece in pieces], fontsize=7, fontfamily=cjk_font())
    axes.set_yticks(range(len(said)), ["embed", *range(1, len(said))], fontsize=7)
    figure.savefig(path, dpi=90)


def main(argv: list[str] | None = None) -> dict:
    settings = parse_settings(LensSettings, PRESETS, argv, None)
    found = find_reader(settings)
    name = lesson_name("logit_lens", settings)
    return run_lesson(name, HOME, settings, partial(learn, found=found), model_id=found["id"])


if __name__ == "__main__":
    run_main(main)
