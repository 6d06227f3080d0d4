"""约束解码：每一步只许文法接得下去的 token，写出来的 JSON、选项、日期、算式一定合法。

学到什么：约束只是给 logits 加一张掩码；掩码从哪里来（文法 → 自动机 → 词表）；为什么不许随便写空白、长度到了怎样收尾；
合法不等于答对。

运行：
    python constrained_decoding.py                        # Qwen 链的 SFT 模型：它从没见过 JSON
    python constrained_decoding.py --model smollm2        # 会写一点 JSON 的模型
    python constrained_decoding.py --schema 我的.json --prompt "…"      # 自己的 JSON schema
    python constrained_decoding.py --grammar 我的.gbnf --prompt "…"     # 自己的文法

预期输出（实测见本文件夹的 README.md）：合法的比例 0 → 100%；掩码每个 token 不到 0.6 毫秒。

参考：Willard & Louf 2023（有限状态机与词表的掩码）；Dong et al. 2024（xgrammar：上下文无关文法的掩码缓存）。
"""

from nlp_common.base.cli import run_main

import ast
import json
import random
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from char_gpt import check_room
from grammar_peers import RECORD_FIELDS, mask_costs, record_schema, whitespace_lover
from nlp_common.base.arguments import COUNT, option
from nlp_common.base.errors import UserError
from nlp_common.draw.figures import render
from nlp_common.draw.plots import COLORS
from nlp_common.lm.automaton import Matcher
from nlp_common.lm.chatml import prompt_ids, whole_pieces
from nlp_common.lm.gbnf import parse_grammar
from nlp_common.lm.generation import stop_tokens
from nlp_common.lm.loading import load_causal_lm
from nlp_common.lm.schema_fits import is_json
from nlp_common.lm.schema_grammar import schema_to_grammar
from nlp_common.lm.token_masks import TokenMasks, make_masks
from nlp_common.tiny import world
from nlp_common.train.chain import chain_model
from nlp_common.train.lesson import run_lesson
from nlp_common.train.settings import LessonSettings, parse_settings
from nlp_common.train.stage import Stage

HOME = Path(__file__).resolve().parent
FULL_MODEL = "Qwen/Qwen1.5-0.5B-Chat"
PRESETS = {"tiny": {"n_prompts": 20}, "full": {"n_prompts": 5}}
ARITHMETIC = """
root   ::= sum
sum    ::= term (("+" | "-") term)*
term   ::= factor ("*" factor)*
factor ::= [1-9] [0-9]{0,2} | "(" sum ")"
"""


@dataclass
class ConstrainedSettings(LessonSettings):
    model: str | None = option(
        "用哪个聊天模型：hub 名、本地文件夹或 smollm2；默认是 Qwen 链 tiny 预设的 SFT 模型"
    )
    source: Literal["hf", "modelscope"] = option("hub 名从哪里下载", "hf")
    schema: str | None = option("JSON schema 的文件：只用它写 --prompt")
    grammar: str | None = option("GBNF 文法的文件：只用它写 --prompt")
    prompt: str | None = option("自己的问题，配 --schema 或 --grammar 用")
    n_prompts: int | None = option("每种形式问几题", None, COUNT)
    max_new_tokens: int = option("最多写多少个 token：到了就收尾，照样合法", 120)
    temperature: float = option("0 是贪心", 0.0)

    def check(self) -> None:
        if self.schema and self.grammar:
            raise UserError("--schema 与 --grammar 只能给一个。")
        if bool(self.schema or self.grammar) != bool(self.prompt):
            raise UserError("--prompt 要配 --schema 或 --grammar 用：说清楚问什么、写成什么样。")


# ---------------------------------------------------------------- 1. 算法


@torch.no_grad()
def generate(
    model,
    prompt: list[int],
    masks: TokenMasks | None,
    max_new_tokens: int,
    stop_ids: list[int],
    temperature: float,
    seed: int,
) -> tuple[list[int], list[float]]:
    """→ (写出的 token, 每步掩码花的毫秒)。masks 是 None 就不加约束。"""
    check_room(model, len(prompt), max_new_tokens)
    generator = torch.Generator(model.device).manual_seed(seed)
    state = masks.matcher.start if masks else None
    if masks and masks.matcher.need(state) > max_new_tokens - 1:
        raise UserError(
            f"这部文法最短也要 {masks.matcher.need(state)} 个字节，--max_new_tokens {max_new_tokens} 可能写不完：改大些。"
        )
    ids: list[int] = []
    cache, new, spent = None, prompt, []
    for step in range(max_new_tokens):
        out = model(input_ids=torch.tensor([new], device=model.device), past_key_values=cache, use_cache=True)
        cache, logits = out.past_key_values, out.logits[0, -1].float()  # (V,)
        if masks:
            started = time.perf_counter()
            mask = masks.allowed(state, budget=max_new_tokens - step - 2)  # 这一个写完，还要留一个给结束符
            if not mask.any():
                raise UserError(
                    "写到一半没有一个 token 接得下去：这个分词器拼不出文法要的字，换一个字节级的分词器。"
                )
            logits = logits.masked_fill(~torch.from_numpy(mask).to(logits.device), float("-inf"))
            spent.append(1000 * (time.perf_counter() - started))
        if temperature == 0:
            token = int(logits.argmax())
        else:
            token = int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator))
        if token in stop_ids:
            break
        ids.append(token)
        new = [token]
        if masks:
            state = masks.next(state, token)
    return ids, spent


# ---------------------------------------------------------------- 2. 几种形式


def is_arithmetic(text: str) -> bool:
    """不用我们的文法，用 Python 的语法树来判：只有整数、加减乘、括号。"""
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError):
        return False
    allowed = (ast.Expression, ast.BinOp, ast.Add, ast.Sub, ast.Mult, ast.Constant)
    return " " not in text and all(isinstance(node, allowed) for node in ast.walk(tree))


CHINESE = dict(place="地点", date="日期", count="数量", price="价钱", note="备注", tags="标签", done="完成")
ENGLISH = {name: name for name in RECORD_FIELDS}


def shapes(is_chain: bool) -> dict[str, tuple[str, object, str]]:
    """名字 → (文法, 判合不合法的函数, 跟模型说的要求)。"""
    places = world.WORLD["place"] if is_chain else ["Paris", "London", "Berlin", "Rome"]
    record = record_schema(CHINESE if is_chain else ENGLISH, places)
    schemas = {
        "选项|choice": ({"enum": places}, "Answer with one city name in JSON quotes."),
        "日期|date": (
            {"type": "string", "format": "date"},
            'Answer with the date only, in JSON quotes, like "2020-01-31".',
        ),
        "整数|integer": ({"type": "integer", "minimum": 1, "maximum": 100}, "Answer with the number only."),
        "记录|record": (record, f"Answer only with a JSON object with the keys {', '.join(ENGLISH)}."),
    }
    found = {
        name: (schema_to_grammar(schema), partial(is_json, schema=schema), ask)
        for name, (schema, ask) in schemas.items()
    }
    found["算式|arithmetic"] = (
        ARITHMETIC,
        is_arithmetic,
        "Answer only with an arithmetic expression for the total.",
    )
    return found


def english_story(rng: random.Random) -> str:
    city, count, price = (
        rng.choice(["Paris", "London", "Berlin", "Rome"]),
        rng.randint(2, 9),
        rng.randint(2, 20),
    )
    day = f"{rng.randint(1, 28)} {rng.choice(['March', 'May', 'June'])} 2024"
    return f"Anna went to {city} on {day} and bought {count} books for {price} dollars each. "


def prompts_for(settings, tokenizer, is_chain: bool, ask: str) -> list[list[int]]:
    if is_chain:  # 链上的小模型听不懂要求，只会答故事里的问题
        questions = world.heldout_questions(settings.n_prompts, 0)
        return [prompt_ids(tokenizer, each["messages"]) for each in questions]
    rng = random.Random(settings.seed)
    texts = [english_story(rng) + ask for _ in range(settings.n_prompts)]
    return [prompt_ids(tokenizer, [{"role": "user", "content": text}]) for text in texts]


# ---------------------------------------------------------------- 3. 量


def compare(model, tokenizer, settings, is_chain: bool) -> tuple[dict, list[float]]:
    """各种形式不加约束、加约束各写一遍 → ({形式: {…}}, 每步掩码的毫秒)。"""
    rows, every = {}, []
    for name, (grammar, is_valid, ask) in shapes(is_chain).items():
        prompts = prompts_for(settings, tokenizer, is_chain, ask)
        masks = make_masks(grammar, tokenizer, model.config.vocab_size)
        valid, first = {}, {}
        for label, used in (("before", None), ("after", masks)):
            texts = []
            for i, prompt in enumerate(prompts):
                ids, spent = generate(
                    model,
                    prompt,
                    used,
                    settings.max_new_tokens,
                    stop_tokens(tokenizer),
                    settings.temperature,
                    i,
                )
                texts.append(tokenizer.decode(ids))
                every += spent
            valid[label] = sum(is_valid(text) for text in texts) / len(texts)
            first[label] = texts[0].replace("\n", "⏎")
        rows[name] = {"valid_before": valid["before"], "valid": valid["after"]}
        print(f"  {name.partition('|')[0]:<4}合法 {valid['before']:.0%} → {valid['after']:.0%}")
        print(f"      不加约束：{first['before'][:60]}\n      加约束：　{first['after'][:100]}")
    return rows, every


def answer_accuracy(model, tokenizer, n: int) -> dict[str, float]:
    """合法不等于答对：同样的题，随便写、在标准写法里几选一，各答对多少（只有小世界知道标准答案）。"""
    free = right = 0
    for question in world.heldout_questions(n, 0):
        words = world.WORLD[question["slot"]]
        schema = {
            "type": "object",
            "properties": {world.LABEL[question["slot"]]: {"enum": words}},
            "required": [world.LABEL[question["slot"]]],
        }
        prompt, stops = prompt_ids(tokenizer, question["messages"]), stop_tokens(tokenizer)
        text = tokenizer.decode(generate(model, prompt, None, 40, stops, 0.0, 0)[0])
        free += question["answer"] in text and sum(word in text for word in words) == 1
        masks = make_masks(schema_to_grammar(schema), tokenizer, model.config.vocab_size)
        text = tokenizer.decode(generate(model, prompt, masks, 40, stops, 0.0, 0)[0])
        right += next(iter(json.loads(text).values())) == question["answer"]
    return {"answer_accuracy_free": free / n, "answer_accuracy": right / n}


# ---------------------------------------------------------------- 4. 全课


def learn(stage: Stage, path: str, is_chain: bool) -> dict:
    settings = stage.settings
    tokenizer, model = load_causal_lm(path)
    model = model.to(stage.device).eval()
    rows, spent = compare(model, tokenizer, settings, is_chain)
    metrics: dict = {
        "valid_before": float(np.mean([row["valid_before"] for row in rows.values()])),
        "valid": float(np.mean([row["valid"] for row in rows.values()])),
        "mask_ms_generating": float(np.mean(spent)),
    }
    metrics |= {name.partition("|")[2]: row for name, row in rows.items()}
    metrics |= mask_costs(tokenizer, model.config.vocab_size)
    metrics |= whitespace_lover(tokenizer, model.config.vocab_size)
    if is_chain:
        metrics |= answer_accuracy(model, tokenizer, 40)

    def draw(folder: Path) -> None:
        draw_allowed(folder / "allowed.svg", tokenizer, model.config.vocab_size, is_chain)

    data = {"name": "tiny_world" if is_chain else "english stories", "kind": "builtin"}
    return stage.save(metrics, {"prompts": data}, draw)


def draw_allowed(path: Path, tokenizer, size: int, is_chain: bool) -> None:
    """一份 JSON 从左到右，每一步许可几个 token：多数地方只有一两个，模型其实没有什么可选。"""
    words = CHINESE if is_chain else ENGLISH
    places = world.WORLD["place"] if is_chain else ["Paris", "London"]
    schema = record_schema(words, places)
    document = {
        words["place"]: places[0],
        words["date"]: "2024-02-29",
        words["count"]: 12,
        words["price"]: 3.5,
    }
    document[words["done"]] = True
    ids = tokenizer(json.dumps(document, ensure_ascii=False), add_special_tokens=False)["input_ids"]
    masks = make_masks(schema_to_grammar(schema), tokenizer, size)
    state, counts = masks.matcher.start, []
    for token in ids:
        counts.append(int(masks.allowed(state).sum()))
        state = masks.next(state, token)
    labels = [picture_text(piece) for piece in whole_pieces(tokenizer, ids)]

    def bars(axes, text) -> None:
        axes.bar(range(len(ids)), counts, color=COLORS[0])
        axes.set_yscale("log")
        axes.set_ylim(0.7, size * 1.5)
        ticks = [10**i for i in range(len(str(size)))]
        axes.set_yticks(ticks, [f"{tick:,}" for tick in ticks])
        axes.minorticks_off()
        axes.set_xticks(range(len(ids)), [text(label) for label in labels], fontsize=8)
        axes.axhline(size, color="#999999", linewidth=1, linestyle="--")
        axes.annotate(
            text(f"全部 {size:,} 个|all {size:,}"),
            (0, size),
            xytext=(0, -11),
            textcoords="offset points",
            fontsize=8,
        )

    labels_of_axes = (
        "每一步许可几个 token|Tokens allowed at each step",
        "写出的 token|token",
        "许可几个|allowed",
    )
    render(path, bars, [], labels_of_axes, min_width=1.1 * len(ids))


def picture_text(text: str) -> str:
    return text.replace(" ", "␣").replace("|", "/")


def read_grammar(settings) -> str:
    """--schema 或 --grammar 的文件 → 文法；读不了、写错了是 UserError，说出在哪里。"""
    file = Path(settings.schema or settings.grammar).expanduser()
    try:
        text = file.read_text(encoding="utf-8-sig")
        grammar = schema_to_grammar(json.loads(text)) if settings.schema else text
        Matcher(parse_grammar(grammar))  # 写错了，不必等模型载入
    except OSError as error:
        why = "它是一个文件夹" if file.is_dir() else "没有这个文件" if not file.exists() else error.strerror
        raise UserError(f"读不了 {file}：{why}。") from None
    except UnicodeDecodeError:
        raise UserError(f"{file} 不是 UTF-8 的文字。请另存为 UTF-8 再试。") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{file} 的第 {error.lineno} 行不是合法的 JSON（{error.msg}）。") from None
    except RecursionError:
        raise UserError(f"{file} 套得太深（上千层括号），读不了：写浅一些。") from None
    return grammar


def answer_one(settings, grammar: str, path: str) -> dict:
    """读者自己的形式，写一次。"""
    tokenizer, model = load_causal_lm(path)
    tokenizer.model_max_length = 10**9  # 太长的由 check_room 说，不要库的英文警告
    masks = make_masks(grammar, tokenizer, model.config.vocab_size)
    prompt = prompt_ids(tokenizer, [{"role": "user", "content": settings.prompt}])
    ids, _ = generate(
        model.eval(),
        prompt,
        masks,
        settings.max_new_tokens,
        stop_tokens(tokenizer),
        settings.temperature,
        settings.seed,
    )
    answer = tokenizer.decode(ids)
    print(answer)
    return {"answer": answer}


def main(argv: list[str] | None = None) -> dict:
    settings = parse_settings(ConstrainedSettings, PRESETS, argv, FULL_MODEL)
    if settings.preset == "full" and settings.model is None:
        settings.model = FULL_MODEL
    grammar = read_grammar(settings) if settings.prompt else ""
    found = chain_model("sft", settings.model, settings.source)
    if grammar:
        return answer_one(settings, grammar, found["path"])
    is_chain = (found["run"] or {}).get("data", {}).get("train", {}).get("name") == "tiny_world"
    name = "constrained_decoding" + ("_smollm2" if settings.model == "smollm2" else "")
    return run_lesson(
        name,
        HOME,
        settings,
        partial(learn, path=found["path"], is_chain=is_chain),
        target=f"{found['stage']}:{found['id']}",
    )


if __name__ == "__main__":
    run_main(main)
