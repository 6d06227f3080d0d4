"""拿不到 GPT-2 时用的小模型：自己编的英文小故事、GPT2LMHeadModel 的小号、半分钟以内的训练。

类和真的一样，存成 hub 的文件夹布局，所以 from_pretrained 那一行不必改。它只会写下面这些词组成的故事。
"""

from __future__ import annotations

import math
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from transformers.utils import logging

from nlp_common.base.device import describe, library_versions, pick_device, seed_everything
from nlp_common.base.runs import file_sha256, open_run

END = "<|endoftext|>"
SEED = 0
STORIES = 3000  # 训练用的故事
HELD_OUT = 100  # 另编的故事，只用来量 loss
STEPS = 280
BATCH = 8
LENGTH = 128  # 一段多少个 token

# 越靠前的越常用（见 pick），所以下一个词的概率有高有低，各种采样的差别才看得出来。
HEROES = [
    "fox",
    "girl",
    "boy",
    "king",
    "bear",
    "old woman",
    "cat",
    "farmer",
    "mouse",
    "bird",
    "queen",
    "wolf",
]
ADJECTIVES = ["little", "brave", "young", "clever", "kind", "hungry", "lonely", "happy", "quiet", "proud"]
PLACES = ["forest", "village", "castle", "house by the sea", "garden", "mountain", "city", "cave"]
THINGS = ["apple", "golden key", "letter", "lamp", "map", "bell", "red book", "stone", "song", "boat"]
FRIENDS = ["rabbit", "frog", "horse", "baker", "sailor", "owl", "child", "duck", "stranger"]
FEELINGS = ["happy", "sad", "afraid", "tired", "surprised", "proud"]
TIMES = ["one day", "one morning", "one night", "in the spring", "after the rain"]


def pick(rng: random.Random, words: list[str]) -> str:
    """第 k 个词的机会是第一个的 1/k（Zipf 定律：真的语言里也大致如此）。"""
    weights = [1 / (k + 1) for k in range(len(words))]
    return rng.choices(words, weights)[0]


def article(phrase: str) -> str:
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def write_story(rng: random.Random) -> str:
    """一个小故事。主角、朋友、东西前后一致：要接得对，就得往前看。"""
    hero, friend, thing = pick(rng, HEROES), pick(rng, FRIENDS), pick(rng, THINGS)
    place, other = pick(rng, PLACES), pick(rng, PLACES)
    who = article(f"{pick(rng, ADJECTIVES)} {hero}")
    openings = [  # (这种开头多常见, 开头)
        (8, f"once upon a time there was {who} who lived in {article(place)} ."),
        (5, f"once upon a time {who} lived in {article(place)} ."),
        (3, f"once upon a time , in {article(place)} , there lived {who} ."),
        (3, f"once upon a time in {article(place)} there was {who} ."),
        (2, f"once upon a time the {hero} of the {place} was very {pick(rng, FEELINGS)} ."),
        (1, f"once upon a time , when animals could talk , there was {who} ."),
        (1, f"once upon a time two friends , {article(friend)} and {who} , lived in {article(place)} ."),
        (1, f"once upon a time all was quiet in the {place} . only the {hero} was there ."),
        (4, f"long ago there was {who} in {article(place)} ."),
    ]
    weights = [weight for weight, _ in openings]
    _, opening = rng.choices(openings, weights)[0]
    meeting = rng.choice(
        [
            f"{pick(rng, TIMES)} the {hero} went to the {other} and met {article(friend)} .",
            f"{pick(rng, TIMES)} {article(friend)} came to the {place} and found the {hero} .",
        ]
    )
    middle = rng.choice(
        [
            f"the {friend} gave the {hero} {article(thing)} . the {hero} was very {pick(rng, FEELINGS)} .",
            f"the {friend} had lost {article(thing)} , and the {hero} helped to look for the {thing} .",
            f'the {hero} asked , " do you like my {thing} ? " the {friend} said , " yes , i do . "',
        ]
    )
    ending = rng.choice(
        [
            f"from that day the {hero} and the {friend} were good friends .",
            f"then the {hero} went home with the {thing} and was {pick(rng, FEELINGS)} .",
            f"the {hero} and the {friend} lived happily ever after .",
        ]
    )
    return f"{opening} {meeting} {middle} {ending}"


def stories(count: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    return [write_story(rng) for _ in range(count)]


def build_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """字节级 BPE，和 GPT-2 同一种：故事里的词都合并成一个 token，没见过的词退回到字节，什么开头都能写。"""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    # GPT-2 没有 pad；生成只有一行，用不到填充，拿 eos 顶上即可。
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=END, eos_token=END, pad_token=END, model_max_length=LENGTH
    )


def make_rows(tokenizer, texts: list[str], seed: int) -> torch.Tensor:
    """故事首尾相接（中间是 <|endoftext|>），切成等长的段 (N, LENGTH)：不浪费一个填充。"""
    order = random.Random(seed).sample(texts, len(texts))
    ids = [i for story in tokenizer([END + text for text in order]).input_ids for i in story]
    count = len(ids) // LENGTH
    return torch.tensor(ids[: count * LENGTH]).view(count, LENGTH)


def next_token_loss(model, rows: torch.Tensor) -> torch.Tensor:
    """rows (B, T)：每个位置猜下一个。没有填充，attention_mask 全是 1。"""
    logits = model(input_ids=rows, attention_mask=torch.ones_like(rows)).logits  # (B, T, V)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten())


def train_tiny() -> tuple[GPT2LMHeadModel, PreTrainedTokenizerFast, dict]:
    """→ (模型, 分词器, 指标)。"""
    seed_everything(SEED)
    device = pick_device()
    texts = stories(STORIES, SEED)
    tokenizer = build_tokenizer(texts)
    rows = make_rows(tokenizer, texts, SEED).to(device)
    heldout = make_rows(tokenizer, stories(HELD_OUT, SEED + 1), SEED).to(device)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=LENGTH,
        n_embd=128,
        n_layer=2,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = GPT2LMHeadModel(config).to(device).train()
    print(
        f"还没有小模型，先训练：{STORIES} 个自编的小故事，{model.num_parameters():,} 个参数，{describe(device)} …"
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.95), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=STEPS, pct_start=0.1)
    started = time.perf_counter()
    for step in range(STEPS):
        batch = rows[torch.randint(len(rows), (BATCH,), device=device)]  # (B, T)
        loss = next_token_loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if (step + 1) % 70 == 0:
            print(f"  第 {step + 1:3d} 步  loss {loss.item():.3f}", flush=True)
    model.eval()
    with torch.no_grad():
        heldout_loss = next_token_loss(model, heldout).item()
    seconds = time.perf_counter() - started
    print(
        f"  训练了 {seconds:.0f} 秒；没见过的故事，loss {heldout_loss:.3f}（瞎猜是 {math.log(len(tokenizer)):.2f}）"
    )
    return model, tokenizer, {"heldout_loss": heldout_loss, "seconds": round(seconds, 1), "steps": STEPS}


def tiny_gpt2(folder: Path, retrain: bool = False) -> Path:
    """小模型所在的文件夹；没有就训练，训练过就直接用。"""
    wanted = {"source_sha256": file_sha256(Path(__file__)), "seed": SEED, "steps": STEPS}
    with open_run(folder) as run:
        if not retrain and run.finished(wanted):
            return folder
        model, tokenizer, metrics = train_tiny()

        def write(path: Path) -> None:
            logging.disable_progress_bar()  # 只关"写出权重"的进度条
            model.save_pretrained(path)
            tokenizer.save_pretrained(path)

        record = {"stage": "tiny_gpt2", "fingerprint": wanted, "versions": library_versions()}
        run.finish(write, record | {"metrics": metrics})
        return folder
