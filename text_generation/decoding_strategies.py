"""一个模型，十几种写法：贪心、束、分组束、对比搜索，温度、top-k、top-p、min-p、typical，重复惩罚、n-gram 不许重复。

学到什么：模型只给概率，怎么挑是解码的事；概率最大的文字反而最不像人写的：它在绕圈子；各种写法在
"模型觉得多可能"与"有多少不同"之间各站在哪里，人写的又站在哪里。每一种都是几行代码，与 transformers 的相等。

运行：
    python decoding_strategies.py                        # 现场在《人民日报》上训练一个小模型，一两分钟
    python decoding_strategies.py --model smollm2 --prompt "Once upon a time"
    python decoding_strategies.py --preset full          # Qwen1.5-0.5B

预期输出（tiny，实测见本文件夹的 README.md）：贪心与束搜索每字的 nats 最低、四字重复最多；纯采样最接近人写的；一张图看全部。

参考：Holtzman et al. 2020（top-p 与重复）；Meister et al. 2023（typical）；Nguyen et al. 2024（min-p）；Keskar et al. 2019（重复惩罚）；
Paulus et al. 2018（n-gram 不许重复）；Vijayakumar et al. 2016（分组束）；Su et al. 2022（对比搜索）。
"""

from nlp_common.base.cli import run_main

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from char_gpt import char_tokenizer, check_room, collate, count_targets, next_token_loss, small_gpt
from decoding_search import beam_search, contrastive_search, diverse_beam_search
from nlp_common.base.arguments import COUNT, option
from nlp_common.base.errors import UserError
from nlp_common.data.people_daily import people_daily
from nlp_common.draw.figures import label_width, render
from nlp_common.draw.plots import COLORS
from nlp_common.hub.models import require_model
from nlp_common.lm.generation import stop_tokens
from nlp_common.lm.loading import load_plain_lm
from nlp_common.train.lesson import run_lesson, run_part
from nlp_common.train.loop import train_loop
from nlp_common.train.settings import LoopSettings, parse_settings
from nlp_common.train.stage import Stage

HOME = Path(__file__).resolve().parent
FULL_MODEL = "Qwen/Qwen1.5-0.5B"
START = 16  # 开头几个 token
CONTEXT = 256  # 现场训练的小模型的上下文
PRESETS = {
    "tiny": {
        "max_train_samples": 9000,
        "max_length": 65,
        "per_device_train_batch_size": 32,
        "num_train_epochs": 2.0,
        "learning_rate": 3e-3,
        "adam_beta2": 0.98,
        "n_prompts": 20,
        "max_new_tokens": 48,
    },
    "full": {
        "max_train_samples": 1,
        "max_length": 128,
        "per_device_train_batch_size": 1,
        "learning_rate": 1e-3,
        "n_prompts": 50,
        "max_new_tokens": 100,
    },
}


@dataclass
class DecodingSettings(LoopSettings):
    model: str | None = option("用哪个模型：hub 名、本地文件夹或 smollm2；默认现场训练一个小的")
    source: Literal["hf", "modelscope"] = option("hub 名从哪里下载", "hf")
    prompt: list[str] = field(
        default_factory=list,
        metadata={"help": "开头，可以写几个；默认是《人民日报》留出部分的句子，有人写的可比"},
    )
    n_prompts: int | None = option("用留出部分的几个开头", None, COUNT)
    max_new_tokens: int | None = option("每个开头写多少个 token")

    def check(self) -> None:
        if any(not text.strip() for text in self.prompt):
            raise UserError("--prompt 里有空的：模型要有个开头才知道接什么。")
        if not self.model and self.preset == "tiny" and START + self.max_new_tokens > CONTEXT:
            raise UserError(
                f"--max_new_tokens {self.max_new_tokens} 太大：小模型的上下文是 {CONTEXT} 个字，最多写 {CONTEXT - START} 个。"
            )


# ---------------------------------------------------------------- 1. 改动那张表：logits (V,) → logits (V,)


def repetition_penalty(logits: torch.Tensor, seen: list[int], penalty: float) -> torch.Tensor:
    """出现过的 token：正的得分除以 penalty，负的乘以它，都是变小。"""
    logits = logits.clone()
    old = logits[seen]
    logits[seen] = torch.where(old > 0, old / penalty, old * penalty)
    return logits


def no_repeat_ngram(logits: torch.Tensor, seen: list[int], n: int) -> torch.Tensor:
    """前面出现过的连续 n 个 token，不许再出现：会凑成它的那个 token 的得分变成负无穷。"""
    logits = logits.clone()
    tail = seen[len(seen) - n + 1 :]
    for start in range(len(seen) - n + 1):
        if seen[start : start + n - 1] == tail:
            logits[seen[start + n - 1]] = float("-inf")
    return logits


def top_k(logits: torch.Tensor, k: int) -> torch.Tensor:
    """只留得分最高的 k 个。"""
    return logits.masked_fill(logits < logits.topk(min(k, len(logits))).values[-1], float("-inf"))


def top_p(logits: torch.Tensor, p: float) -> torch.Tensor:
    """只留概率加起来够 p 的最少几个。"""
    probs, order = logits.softmax(-1).sort(descending=True)
    outside = probs.cumsum(-1) - probs >= p  # 排在它前面的已经够 p 了
    return logits.masked_fill(outside[order.argsort()], float("-inf"))


def min_p(logits: torch.Tensor, p: float) -> torch.Tensor:
    """只留概率不小于 p × 最大概率的：拿得准时留得少，拿不准时留得多。"""
    probs = logits.softmax(-1)
    return logits.masked_fill(probs < p * probs.max(), float("-inf"))


def typical(logits: torch.Tensor, p: float) -> torch.Tensor:
    """只留"意外的程度"最接近平均的：按 |−log p(v) − H| 从小到大取，概率加起来够 p 为止，H 是这一步的熵。"""
    logps = logits.log_softmax(-1)
    probs = logps.exp()
    entropy = -(probs * logps).nansum()
    order = (-logps - entropy).abs().argsort()
    total = probs[order].cumsum(-1)
    last = int((total < p).sum())  # 第一个让和够 p 的也留下
    kept = order[: last + 1]
    return torch.full_like(logits, float("-inf")).scatter(0, kept, logits[kept])


# ---------------------------------------------------------------- 2. 一步一步地写


@torch.no_grad()
def write(model, prompt: list[int], settings, stops: list[int], change, greedy: bool, seed: int) -> list[int]:
    """每步：logits (V,) 交给 change(logits, 已有的 token) 改动，再取最大的或采样。"""
    generator = torch.Generator(model.device).manual_seed(seed)
    cache, new, ids = None, prompt, list(prompt)
    for _ in range(settings.max_new_tokens):
        out = model(
            input_ids=torch.tensor([new], device=model.device),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long, device=model.device),
            past_key_values=cache,
            use_cache=True,
        )
        cache, logits = out.past_key_values, change(out.logits[0, -1].float(), ids)
        probs = logits.softmax(-1)
        token = int(probs.argmax() if greedy else torch.multinomial(probs, 1, generator=generator))
        ids.append(token)
        new = [token]
        if token in stops:
            break
    return ids[len(prompt) :]


def unchanged(logits: torch.Tensor, seen: list[int]) -> torch.Tensor:
    return logits


# 名字 → (改动, 贪心还是采样)
ONE_BY_ONE = {
    "贪心|greedy": (unchanged, True),
    "重复惩罚 1.3|penalty 1.3": (partial(repetition_penalty, penalty=1.3), True),
    "三字不重复|no 3-gram": (partial(no_repeat_ngram, n=3), True),
    "采样|sampling": (unchanged, False),
    "温度 0.7|temp 0.7": (lambda logits, seen: logits / 0.7, False),
    "top-k 20|top-k 20": (lambda logits, seen: top_k(logits, 20), False),
    "top-p 0.9|top-p 0.9": (lambda logits, seen: top_p(logits, 0.9), False),
    "min-p 0.1|min-p 0.1": (lambda logits, seen: min_p(logits, 0.1), False),
    "typical 0.9|typical 0.9": (lambda logits, seen: typical(logits, 0.9), False),
}
SEARCHES = {
    "束 4|beam 4": lambda model, prompt, n, stops: search_one(model, prompt, n, stops),
    "分组束 4/2|diverse beam": lambda model, prompt, n, stops: best(
        diverse_beam_search(model, prompt, 4, 2, n, stops, 1.0)
    ),
    "对比搜索|contrastive": lambda model, prompt, n, stops: contrastive_search(model, prompt, n, stops),
}


def search_one(model, prompt: list[int], n: int, stops: list[int]) -> list[int]:
    ids = torch.tensor([prompt], device=model.device)
    return best(beam_search(model, ids, torch.ones_like(ids), 4, n, stops)[0])


def best(paths: list) -> list[int]:
    return max(paths, key=lambda path: path.score).ids


# ---------------------------------------------------------------- 3. 量


@torch.no_grad()
def nats_per_token(model, prompt: list[int], written: list[int]) -> float:
    """模型自己觉得这段文字多可能：平均每个 token 的 −log p。"""
    logps = model(torch.tensor([prompt + written], device=model.device)).logits[0].float().log_softmax(-1)
    places = range(len(prompt) - 1, len(prompt) + len(written) - 1)
    return -sum(logps[place, token].item() for place, token in zip(places, written, strict=True)) / len(
        written
    )


def distinct_n(rows: list[list[int]], n: int) -> float:
    """全部文字里连续 n 个 token，不同的占多少。"""
    grams = [tuple(row[i : i + n]) for row in rows for i in range(len(row) - n + 1)]
    return len(set(grams)) / max(1, len(grams))


def repeated_share(row: list[int], n: int = 4) -> float:
    """一段之内，连续 n 个 token 有多少是前面出现过的：绕圈子的程度。"""
    grams = [tuple(row[i : i + n]) for i in range(len(row) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def measure(model, prompts: list[list[int]], rows: list[list[int]]) -> dict[str, float]:
    nats = [nats_per_token(model, prompt, row) for prompt, row in zip(prompts, rows, strict=True)]
    return {
        "nats_per_token": sum(nats) / len(nats),
        "distinct_1": distinct_n(rows, 1),
        "distinct_2": distinct_n(rows, 2),
        "repeated_4": sum(map(repeated_share, rows)) / len(rows),
    }


# ---------------------------------------------------------------- 4. 模型与开头


def train_small(stage: Stage) -> tuple:
    """《人民日报》上的小 GPT，一个字一个 token → (分词器, 模型, 数据来历)。"""
    settings = stage.settings
    texts = [row["text"] for row in people_daily("train", settings.max_train_samples)]
    tokenizer = char_tokenizer(texts, size=3000)
    rows = []
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        rows += [ids[i : i + settings.max_length] for i in range(0, len(ids) - 8, settings.max_length)]
    rows = rows[: settings.max_train_samples]
    torch.manual_seed(settings.seed)
    model = small_gpt(tokenizer, CONTEXT, 128, 2).to(stage.device)
    print(f"《人民日报》{len(rows)} 段，词表 {len(tokenizer)}，参数 {model.num_parameters():,}")
    pad = partial(collate, pad_id=tokenizer.pad_token_id)

    def work(part: Stage) -> dict:
        lengths = [len(row) for row in rows]
        return train_loop(
            part, "小模型", model, rows, pad, next_token_loss, lengths, lengths=lengths, count=count_targets
        ).metrics

    run_part(stage, "model", work, model)
    return tokenizer, model.eval(), {"name": "people_daily", "kind": "builtin", "rows": len(rows)}


def starts(tokenizer, settings) -> tuple[list[list[int]], list[list[int]]]:
    """→ (开头, 人接着写的)；自己给的 --prompt 没有人写的。"""
    if settings.prompt:
        encoded = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in settings.prompt]
        for text, ids in zip(settings.prompt, encoded, strict=True):
            if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids:
                raise UserError(f"--prompt {text!r} 里有小模型没学过的字。换个字，或用 --model 换一个模型。")
        return encoded, []
    prompts, human = [], []
    for row in people_daily("validation"):
        ids = tokenizer(row["text"], add_special_tokens=False)["input_ids"]
        if len(ids) >= START + settings.max_new_tokens and tokenizer.unk_token_id not in ids[:START]:
            prompts.append(ids[:START])
            human.append(ids[START : START + settings.max_new_tokens])
        if len(prompts) == settings.n_prompts:
            break
    if not prompts:
        raise UserError(
            f"留出的文章没有一篇够写 {settings.max_new_tokens} 个 token：把 --max_new_tokens 改小，或用 --prompt。"
        )
    return prompts, human


# ---------------------------------------------------------------- 5. 全课


def learn(stage: Stage) -> dict:
    settings = stage.settings
    if settings.model:
        tokenizer, model = load_plain_lm(require_model(settings.model, settings.source))
        model, source = model.to(stage.device).eval(), {"name": settings.model}
        tokenizer.model_max_length = 10**9  # 太长的由 check_room 说，不要库的英文警告
    else:
        tokenizer, model, source = train_small(stage)
    prompts, human = starts(tokenizer, settings)
    check_room(model, max(map(len, prompts)), settings.max_new_tokens)
    stops, n = stop_tokens(tokenizer), settings.max_new_tokens
    written: dict[str, list[list[int]]] = {}
    for name, (change, greedy) in ONE_BY_ONE.items():
        written[name] = [
            write(model, prompt, settings, stops, change, greedy, settings.seed + i)
            for i, prompt in enumerate(prompts)
        ]
    for name, search in SEARCHES.items():
        written[name] = [search(model, prompt, n, stops) for prompt in prompts]
    if human:
        written["人写的|human"] = human
    metrics = {name: measure(model, prompts, rows) for name, rows in written.items()}
    show(tokenizer, prompts[0], written, metrics)

    def save(folder: Path) -> None:
        draw(folder / "decoding.svg", metrics)
        if not settings.model:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)

    names = {name: name.partition("|")[2].replace(" ", "_") for name in metrics}
    return stage.save({names[name]: values for name, values in metrics.items()}, {"prompts": source}, save)


def show(tokenizer, prompt: list[int], written: dict, metrics: dict) -> None:
    print(f"\n开头：{tokenizer.decode(prompt)}\n")
    print("每字 nats  distinct-2  四字重复   接着写的")
    for name, rows in written.items():
        values = metrics[name]
        text = tokenizer.decode(rows[0]).replace("\n", "⏎")
        print(
            f"{values['nats_per_token']:9.2f}{values['distinct_2']:12.3f}{values['repeated_4']:10.3f}"
            f"   {name.partition('|')[0]}：{text[:48]}"
        )


WIDTH, HEIGHT = 470, 290  # 坐标区大约多宽、多高（磅），用来看字会不会叠在一起


def is_free(place: tuple, move: tuple, wide: float, taken: list[tuple]) -> bool:
    """一行字放在 place 旁边的 move 处，碰不碰得到已经占了的方框、出不出图。"""
    left, bottom = place[0] + move[0], place[1] + move[1] - 5
    right, top = left + wide, bottom + 10
    inside = left > 0 and right < WIDTH and bottom > 0 and top < HEIGHT
    return inside and not any(
        left < box[1] and right > box[0] and bottom < box[3] and top > box[2] for box in taken
    )


def draw(path: Path, metrics: dict) -> None:
    """横：模型觉得多可能；竖：有多少不同；圈的大小：绕不绕圈子。人写的是星。"""

    xs = [values["nats_per_token"] for values in metrics.values()]
    low, high = min(xs) - 0.4, max(xs) + 0.4

    def points(axes, text) -> None:
        axes.figure.set_figheight(5)
        axes.set(xlim=(low, high), ylim=(0, 1.05))
        taken: list[tuple] = []  # 已经占了的方框（左、右、下、上），单位是磅
        for i, (name, values) in enumerate(metrics.items()):
            human = name.startswith("人")
            size = 240 if human else 40 + 900 * values["repeated_4"]
            x, y = values["nats_per_token"], values["distinct_2"]
            marker, color = ("*", "#c02020") if human else ("o", COLORS[i % len(COLORS)])
            axes.scatter(x, y, s=size, marker=marker, color=color, alpha=0.75)
            half = size**0.5 / 2
            place = ((x - low) / (high - low) * WIDTH, y / 1.05 * HEIGHT)
            taken.append((place[0] - half, place[0] + half, place[1] - half, place[1] + half))
        for name, values in metrics.items():
            x, y = values["nats_per_token"], values["distinct_2"]
            half = (240 if name.startswith("人") else 40 + 900 * values["repeated_4"]) ** 0.5 / 2 + 3
            place, wide = ((x - low) / (high - low) * WIDTH, y / 1.05 * HEIGHT), 8 * label_width(name)
            sides = {
                "left": (half, 0.0),
                "right": (-half - wide, 0.0),
                "up": (-wide / 2, half + 5),
                "down": (-wide / 2, -half - 5),
            }
            dx, dy = next((move for move in sides.values() if is_free(place, move, wide, taken)), (half, 0.0))
            taken.append((place[0] + dx, place[0] + dx + wide, place[1] + dy - 5, place[1] + dy + 5))
            axes.annotate(
                text(name), (x, y), xytext=(dx, dy), textcoords="offset points", va="center", fontsize=8
            )

    title = "圈越大，绕的圈子越多|bigger circles repeat themselves more"
    render(path, points, [], (title, "每个 token 的 −log p|nats per token", "distinct-2"), min_width=50)


def main(argv: list[str] | None = None) -> dict:
    settings = parse_settings(DecodingSettings, PRESETS, argv, FULL_MODEL)
    if settings.preset == "full" and settings.model is None:
        settings.model = FULL_MODEL
    return run_lesson("decoding_strategies", HOME, settings, learn)


if __name__ == "__main__":
    run_main(main)
