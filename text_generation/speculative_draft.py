"""投机解码的两种活儿与小模型：写什么，谁来猜。speculative_decoding.py 用它们。"""

import random
from functools import partial

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from char_gpt import collate, count_targets, next_token_loss
from nlp_common.base.errors import UserError
from nlp_common.hub.models import require_model
from nlp_common.lm.chatml import encode_chat, prompt_ids
from nlp_common.lm.loading import load_plain_lm
from nlp_common.tiny import world
from nlp_common.train.loop import train_loop
from nlp_common.train.stage import Stage
from speculative import Reader

# ---------------------------------------------------------------- 1. 写什么：两种活儿

SERVICES, METHODS = ["web", "login", "search", "orders", "images"], ["GET", "POST", "PUT"]
PATHS = ["/index.html", "/users", "/cart", "/search", "/images/logo.png", "/orders"]


def log_text(rng: random.Random, n: int) -> str:
    """n 行服务器日志：格式固定的文字（SmolLM2 只懂英语）。真实的活儿里，报表、工单、代码都有大半是这样。"""
    lines, clock, day = [], rng.randint(0, 80000), rng.randint(10, 28)
    for _ in range(n):
        clock += rng.randint(1, 9)
        moment = f"{clock // 3600:02}:{clock // 60 % 60:02}:{clock % 60:02}"
        status = rng.choice(["200 OK", "200 OK", "200 OK", "404 Not Found", "500 Internal Server Error"])
        lines.append(
            f"[2024-03-{day} {moment}] INFO server-{rng.randint(1, 4)} service={rng.choice(SERVICES)}: request "
            f"{rng.choice(METHODS)} {rng.choice(PATHS)} from 10.0.0.{rng.randint(10, 99)} finished with status {status} "
            f"in {rng.randint(10, 99)} ms\n"
        )
    return "".join(lines)


def work(settings, tokenizer, is_chain: bool) -> tuple[list[list[int]], list[list[int]]]:
    """→ (训练小模型的行, 比快慢用的开头)。Qwen 链的模型答小世界的题，别的模型接着写服务器日志。"""
    n, n_prompts = settings.max_train_samples, settings.n_prompts
    if is_chain:
        rows = [encode_chat(tokenizer, chat["messages"])[0] for chat in world.chats(n, settings.seed)]
        questions = world.heldout_questions(n_prompts, 0)
        return rows, [prompt_ids(tokenizer, each["messages"]) for each in questions]
    rng = random.Random(settings.seed)
    texts = [log_text(rng, 3) for _ in range(n // 4)]
    prompts = [log_text(rng, 5) for _ in range(n_prompts)]
    encode = partial(tokenizer, add_special_tokens=False)
    return [encode(text)["input_ids"] for text in texts], [encode(text)["input_ids"] for text in prompts]


# ---------------------------------------------------------------- 2. 小模型：给的，或者现场训练


def train_draft(stage: Stage, rows: list[list[int]], n_tokens: int) -> Reader:
    """词表只取训练行里出现过的 token：五万个 token 的输出层，比小模型的其余部分还贵几十倍。"""
    settings = stage.settings
    used = sorted({token for row in rows for token in row})
    if n_tokens <= 4096:  # 词表本来就小，不用挑
        used = list(range(n_tokens))
    big_of = torch.tensor(used, device=stage.device)  # (v,)
    small_of = torch.zeros(n_tokens, dtype=torch.long, device=stage.device)  # (V,)，没有的读成 0 号
    small_of[big_of] = torch.arange(len(used), device=stage.device)
    torch.manual_seed(settings.seed)
    config = Qwen2Config(
        vocab_size=len(used),
        hidden_size=settings.draft_dim,
        intermediate_size=3 * settings.draft_dim,
        num_hidden_layers=settings.draft_layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        initializer_range=settings.draft_dim**-0.5,
        rope_parameters={"rope_type": "default", "rope_theta": 2000.0},
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    model = Qwen2ForCausalLM(config).to(stage.device)
    small_rows = [small_of[torch.tensor(row)].tolist()[: settings.max_length] for row in rows]
    lengths = [len(row) for row in small_rows]
    print(f"小模型：{model.num_parameters():,} 个参数，词表 {len(used):,}")
    pad = partial(collate, pad_id=0)
    train_loop(
        stage,
        "小模型",
        model,
        small_rows,
        pad,
        next_token_loss,
        lengths,
        lengths=lengths,
        count=count_targets,
    )
    return Reader(model.eval(), small_of, big_of)


def load_draft(name: str, source: str, tokenizer) -> Reader:
    other, model = load_plain_lm(require_model(name, source))
    if other.get_vocab() != tokenizer.get_vocab():
        raise UserError(
            f"--draft {name} 的词表与大模型的不同：投机解码要两个模型说同一种 token。换同一系列的小模型。"
        )
    return Reader(model.eval())
