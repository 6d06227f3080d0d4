"""谁看谁：把每一层、每个头的注意力画成能点的网页，和一张矩阵的图。

你会学到
  1. 注意力的权重从哪里拿：attn_implementation="eager"。默认的 sdpa 从不写出 (T, T) 的矩阵，要了也没有。
  2. 头各有各的习惯：有的看前一个 token，有的看自己，有的看第一个，有的看相同的字。四个数就分得出。
  3. 权重一个字节一个就够：整个网页一个文件，不联网，几十 KB。

怎么运行
  python head_view.py                                  # Qwen 链 tiny 的 SFT 模型，一道故事题
  python head_view.py --text "我不喜欢这部电影" --model bert-base-chinese
  python head_view.py --model smollm2 --layers 0,14,29 --text "The cat sat on the mat because it was tired."
  python head_view.py --hand                           # 这里手写的编码器
  python head_view.py --attention 文件.json            # 你自己的模型存下的注意力

应当看到：outputs/<预设>/head_view/head_view.html，用浏览器打开；matrix.png 是同样的内容。自己的一句在 head_view-text/ 里。

参考：Vaswani et al. 2017；Vig 2019（bertviz）；Clark et al. 2019（What Does BERT Look At?）。
"""

from nlp_common.base.cli import run_main

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from hand_transformer import hand_example
from nlp_common.base.arguments import option
from nlp_common.base.errors import UserError
from nlp_common.base.runs import file_sha256
from nlp_common.draw.figures import cjk_font
from nlp_common.lm.chatml import whole_pieces
from nlp_common.lm.checks import quiet
from nlp_common.train.lesson import run_lesson
from nlp_common.train.settings import parse_settings
from nlp_common.train.stage import Stage
from pages import head_page, read_saved
from questions import make_questions
from readers import (
    HOME,
    Reader,
    ReaderSettings,
    attention_maps,
    encode,
    find_reader,
    lesson_name,
    load_reader,
)

PRESETS: dict[str, dict] = {"tiny": {}, "full": {}}
ENGLISH = "The cat sat on the mat because it was tired."
MOST_TOKENS = 512  # 再长，线就看不清了


@dataclass
class HeadViewSettings(ReaderSettings):
    text: str | None = option("看哪一段文字；默认是一道故事题（小世界的模型）或一句英文")
    layers: str | None = option("只要哪几层，用逗号隔开，例如 0,14,29；默认全部")
    hand: bool = option("不看语言模型，看这里手写的编码器（hand_transformer.py）", False)
    attention: str | None = option("不载入模型，看这个 JSON 文件里存着的注意力")


# ---------------------------------------------------------------- 1. 注意力从哪里来


def learn(stage: Stage, found: dict | None) -> dict:
    settings = stage.settings
    data: dict = {}
    metrics: dict = {}
    if settings.attention:
        tokens, maps = read_saved(settings.attention)
        name = Path(settings.attention).name
        data = {
            "attention": {
                "name": name,
                "kind": "file",
                "rows": 1,
                "sha256": file_sha256(Path(settings.attention)),
            }
        }
    elif settings.hand:
        example = hand_example(settings.seed)
        tokens, maps, data, name = example.pieces, example.maps, example.data, "手写的编码器"
    else:
        reader = load_reader(found)
        ids = text_ids(reader, settings)
        tokens = whole_pieces(reader.tokenizer, ids)
        maps = attention_maps(reader.model, ids)
        metrics = eager_against_sdpa(reader, ids)
        name = settings.model or "Qwen 链 tiny 的 SFT 模型"
        data = {
            "text": {"name": settings.text or "built in", "kind": "argument", "rows": 1, "tokens": len(ids)}
        }
    layers = chosen_layers(settings.layers, len(maps))
    maps = [maps[layer] for layer in layers]

    habits = [head_habits(weights, tokens) for weights in maps]
    print_habits(habits, layers)
    page = head_page(f"{Path(name).name}：谁看谁", tokens, maps, layers)
    metrics |= {
        "page_kb": len(page.encode()) / 1000,
        "tokens": len(tokens),
        "heads": len(maps) * len(maps[0]),
        "habits": {f"layer{n}": habit for n, habit in zip(layers, habits, strict=True)},
    }

    def write(folder: Path) -> None:
        (folder / "head_view.html").write_text(page, encoding="utf-8")
        draw_matrices(folder / "matrix.png", tokens, maps, layers)

    record = stage.save(metrics, data, write)
    print(
        f"用浏览器打开：{stage.path / 'head_view.html'}（{metrics['page_kb']:.0f} KB，{len(tokens)} 个 token，{metrics['heads']} 个头）"
    )
    return record


def text_ids(reader: Reader, settings: HeadViewSettings) -> list[int]:
    """要看的那段文字的 token。"""
    if settings.text is None and reader.trained_on == "tiny_world":
        return make_questions(reader.tokenizer, "tiny_world", 1, settings.seed)[0].ids
    return encode(reader, ENGLISH if settings.text is None else settings.text, MOST_TOKENS)


@torch.no_grad()
def eager_against_sdpa(reader: Reader, ids: list[int]) -> dict:
    """同一个模型换成 sdpa：输出一样，权重却没有了。"""
    inputs = torch.tensor([ids], device=reader.model.device)
    eager = reader.model(inputs)[0]
    reader.model.set_attn_implementation("sdpa")
    quick = reader.model(inputs)[0]
    difference = (eager - quick).abs().max().item()
    try:
        with quiet():  # 库会用英文说 sdpa 不支持，下面用中文说
            given = reader.model(inputs, output_attentions=True).attentions or ()
    except ValueError:  # 有的模型不肯，直接出错
        given = ()
    written = sum(each is not None for each in given)
    reader.model.set_attn_implementation("eager")
    print(
        f"eager 交出 {reader.layers} 层的权重，sdpa 交出 {written} 层；两种写法的输出相差 {difference:.1e}\n"
    )
    return {"sdpa_layers_with_weights": written, "max_difference_to_sdpa": difference}


def chosen_layers(text: str | None, count: int) -> list[int]:
    """--layers 0,14,29 → [0, 14, 29]。"""
    if text is None:
        return list(range(count))
    layers = []
    for word in text.replace("，", ",").split(","):
        if not word.strip().isdecimal() or int(word) >= count:
            raise UserError(
                f"--layers 里的 {word.strip()!r} 不对：要是 0 到 {count - 1} 的整数，用逗号隔开。"
            )
        layers.append(int(word))
    return sorted(set(layers))


# ---------------------------------------------------------------- 2. 每个头的习惯


def head_habits(weights: torch.Tensor, tokens: list[str]) -> dict[str, list[float]]:
    """一层的权重 (H, T, T) → 每个头平均有多少放在：前一个、自己、第一个、前面相同的 token；还有多散（熵，nats）。

    从第二个 token 算起：第一个只能看自己。
    """
    size = len(tokens)
    queries = torch.arange(1, size)
    same = torch.tensor(
        [[tokens[i] == tokens[j] and j < i for j in range(size)] for i in range(size)]
    )  # (T, T)
    again = same.any(-1)  # (T,)：前面有相同的
    entropy = -(weights * weights.clamp(min=1e-12).log()).sum(-1)  # (H, T)
    habits = {
        "previous": weights[:, queries, queries - 1].mean(-1),
        "itself": weights[:, queries, queries].mean(-1),
        "first": weights[:, queries, 0].mean(-1),
        "same": (weights * same).sum(-1)[:, again].mean(-1) if again.any() else torch.zeros(len(weights)),
        "entropy": entropy[:, queries].mean(-1),
    }
    return {name: [round(value, 4) for value in values.tolist()] for name, values in habits.items()}


def print_habits(habits: list[dict], layers: list[int]) -> None:
    print("层.头   前一个  自己   第一个  前面相同的  熵")
    rows = [
        (n, h, habit) for n, habit in zip(layers, habits, strict=True) for h in range(len(habit["previous"]))
    ]
    for layer, head, habit in rows[:24]:
        cells = "   ".join(
            f"{habit[name][head]:.2f}" for name in ("previous", "itself", "first", "same", "entropy")
        )
        print(f"  {layer}.{head}    {cells}")
    if len(rows) > 24:
        print(f"  …… 其余 {len(rows) - 24} 个头在网页里")
    print()


# ---------------------------------------------------------------- 3. 矩阵的图


def draw_matrices(path: Path, tokens: list[str], maps: list[torch.Tensor], layers: list[int]) -> None:
    """每个头一个方块，一层一行，最多八行八列；行是看的，列是被看的。"""
    from matplotlib.figure import Figure

    maps, layers = maps[:8], layers[:8]
    columns = min(8, len(maps[0]))
    figure = Figure(figsize=(2.6 * columns, 2.7 * len(maps)), layout="constrained")
    grid = figure.subplots(len(maps), columns, squeeze=False)
    labelled = len(tokens) <= 12 and (cjk_font() is not None or all(token.isascii() for token in tokens))
    for row, weights in enumerate(maps):
        for head in range(columns):
            axes = grid[row][head]
            axes.imshow(weights[head].numpy(), cmap="Blues", vmin=0, vmax=1)
            axes.set_title(f"layer {layers[row]} head {head}", fontsize=9)
            axes.set(xticks=[], yticks=[])
            if labelled:
                axes.set_xticks(range(len(tokens)), tokens, rotation=60, fontsize=7, fontfamily=cjk_font())
                axes.set_yticks(range(len(tokens)), tokens, fontsize=7, fontfamily=cjk_font())
    figure.savefig(path, dpi=70)


def main(argv: list[str] | None = None) -> dict:
    settings = parse_settings(HeadViewSettings, PRESETS, argv, None)
    given = [name for name in ("hand", "attention", "text") if getattr(settings, name) not in (None, False)]
    if len(given) > 1:
        raise UserError(f"--{given[0]} 与 --{given[1]} 只能给一个。")
    found, more = None, {}
    if settings.attention:
        read_saved(settings.attention)  # 写错了，先说
        more = {"attention_sha256": file_sha256(Path(settings.attention))}
    elif not settings.hand:
        found = find_reader(settings)
        more = {"model_id": found["id"]}
    return run_lesson(lesson_name("head_view", settings), HOME, settings, partial(learn, found=found), **more)


if __name__ == "__main__":
    run_main(main)
