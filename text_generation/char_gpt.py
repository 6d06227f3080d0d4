"""这一课里现场训练的小模型：分词器、模型、数据行、损失。训练用 nlp_common/train/loop.py。"""

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from transformers.utils import logging

from nlp_common.base.errors import UserError
from nlp_common.lm.losses import IGNORE

logging.disable_progress_bar()  # 只关存取权重的进度条，警告照常显示
PAD, END, UNKNOWN = "<pad>", "<end>", "<unk>"


def char_tokenizer(texts: list[str], specials: list[str] = (), size: int | None = None):
    """一个字一个 token；texts 里没有的字是 <unk>。size：最多要几个字，常见的优先。"""
    counts: dict[str, int] = {}
    for text in texts:
        for char in text:
            counts[char] = counts.get(char, 0) + 1
    chars = sorted(counts, key=lambda char: (-counts[char], char))[:size]
    vocab = {token: i for i, token in enumerate([PAD, END, UNKNOWN, *specials, *chars])}
    core = Tokenizer(models.WordLevel(vocab, unk_token=UNKNOWN))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        eos_token=END,
        unk_token=UNKNOWN,
        additional_special_tokens=list(specials),
        clean_up_tokenization_spaces=False,
    )


def small_gpt(tokenizer, length: int, dim: int, layers: int, heads: int = 4) -> GPT2LMHeadModel:
    """随机初始化的 GPT-2，结构不变，尺寸小；length 是上下文。"""
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=length,
        n_embd=dim,
        n_layer=layers,
        n_head=heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        initializer_range=dim**-0.5,  # 大模型惯用的 0.02 对这么窄的太小：注意力要很久才分得出轻重
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return GPT2LMHeadModel(config)


def collate(rows: list[list[int]], pad_id: int) -> dict[str, torch.Tensor]:
    """B 行 token → input_ids、labels (B, T)，右边补齐；补的不算损失。"""
    width = max(map(len, rows))
    ids = torch.tensor([row + [pad_id] * (width - len(row)) for row in rows])
    labels = torch.tensor([row + [IGNORE] * (width - len(row)) for row in rows])
    return {"input_ids": ids, "labels": labels}


def next_token_loss(model, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict]:
    """Σ −log p(下一个 token)：第 t 个位置的输出猜第 t+1 个。因果注意力看不到右边，补在右边的不用另外遮。"""
    ids = batch["input_ids"]
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, :-1]  # (B, T-1, V)
    labels = batch["labels"][:, 1:]  # (B, T-1)
    loss = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="sum"
    )
    return loss, {}


def count_targets(batch: dict[str, torch.Tensor]) -> int:
    """一批里要猜几个 token。"""
    return int((batch["labels"][:, 1:] != IGNORE).sum())


@torch.no_grad()
def heldout_nats(model, rows: list[list[int]], pad_id: int, batch_size: int = 64) -> tuple[float, int]:
    """留出行的 (Σ −log p, 算了几个 token)；每行第一个 token 是给定的，不算。"""
    model.eval()
    total, count = 0.0, 0
    device = next(model.parameters()).device
    for start in range(0, len(rows), batch_size):
        batch = {k: v.to(device) for k, v in collate(rows[start : start + batch_size], pad_id).items()}
        total += next_token_loss(model, batch)[0].item()
        count += count_targets(batch)
    model.train()
    return total, count


def encode_known(tokenizer, text: str, flag: str) -> list[int]:
    """读者在命令行上写的字 → token；有词表里没有的字是 UserError。"""
    known = tokenizer.get_vocab()
    if strange := [char for char in dict.fromkeys(text) if char not in known]:
        raise UserError(
            f"{flag} 里的 {'、'.join(strange)} 训练数据里没有，模型不认识：换个字，或用 --dataset 换一份数据。"
        )
    return [known[char] for char in text]


def check_room(model, prompt: int, new: int) -> None:
    """开头 prompt 个 token，再写 new 个，模型的上下文装不装得下。"""
    context = model.config.max_position_embeddings
    if prompt >= context:
        raise UserError(f"开头有 {prompt} 个 token，模型的上下文只有 {context} 个：把 --prompt 改短。")
    if prompt + new > context:
        raise UserError(
            f"--max_new_tokens {new} 太大：开头有 {prompt} 个 token，模型的上下文一共 {context} 个，最多再写 {context - prompt} 个。"
        )
