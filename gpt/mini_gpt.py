"""MiniGPT：从零写一个 GPT，一个文件，只用 PyTorch。结构和 GPT-2 一样，读得进它的权重。
你会学到：自回归、因果掩码、位置向量、多头注意力、pre-norm 与残差、权重共享、KV 缓存，各是哪几行。

  python mini_gpt.py                       # 四句话的玩具，几秒：loss 从 1.8013 降到 0.1645，贪心写出 i love cats
  python mini_gpt.py --data input.txt      # 任何 UTF-8 文本，一个字一个 token；训练完再运行就只生成
  python mini_gpt.py --data input.txt --recipe fast        # 换上更快的那一套，每一项买到什么见 README
参考：Radford et al. 2019（GPT-2）；Vaswani et al. 2017（注意力）；Loshchilov & Hutter 2019（AdamW）。
"""

import argparse
import hashlib
import math
import os
import sys
import time
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn


def option(default, text):
    return field(default=default, metadata={"help": text})


@dataclass
class Config:  # 决定训练出什么；每一项也是一个命令行参数（--layers 6、--no-bias）
    layers: int = option(4, "Transformer 块的层数")
    heads: int = option(4, "注意力的头数")
    dim: int = option(128, "每个 token 的向量有多少维")
    block: int = option(64, "上下文最多多少个 token")
    bias: bool = option(True, "线性层和 LayerNorm 带偏置")
    gain: bool = option(True, "LayerNorm 归一之后，每一维再乘一个学来的数")
    activation: str = option("gelu_tanh", "前馈的激活：gelu_tanh（GPT-2 的近似式）、gelu（精确）、relu")
    attention: str = option("sdpa", "注意力的算法：manual 手写的三行，sdpa 是 PyTorch 的一个函数，结果相同")
    optimizer: str = option("adamw", "块里的矩阵用哪个优化器：adamw 或 muon")
    batch: int = option(12, "每步多少段；玩具总是四句一起")
    steps: int = option(1500, "更新多少步；玩具里就是多少轮")
    lr: float = option(6e-3, "学习率的峰值；之后按余弦下降")
    min_lr: float = option(0.0, "学习率降到多少为止")
    warmup: int = option(100, "学习率从 0 升到峰值用多少步")
    beta2: float = option(0.95, "AdamW 的 β2：越近 1，步子的大小参考越久以前的梯度")
    weight_decay: float = option(0.1, "权重衰减：矩阵每步往 0 拉一点")
    clip: float = option(1.0, "梯度的总长度最多多少，超过就按比例缩短")
    seed: int = option(0, "随机种子：同一种子，结果相同")


class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads, self.attention = config.heads, config.attention
        self.c_attn = nn.Linear(config.dim, 3 * config.dim, bias=config.bias)  # Q、K、V 并成一次乘法
        self.c_proj = nn.Linear(config.dim, config.dim, bias=config.bias)
        mask = torch.ones(config.block, config.block, dtype=torch.bool).tril()  # 第 t 行：看得见 0 到 t
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, x, cache=None):  # x (B, T, C)。cache 是这一层的 KVCache，只在生成时用
        B, T, C = x.shape
        parts = self.c_attn(x).split(C, dim=2)  # 各 (B, T, C)
        q, k, v = (part.view(B, T, self.heads, -1).transpose(1, 2) for part in parts)  # 各 (B, nh, T, hs)
        if cache is not None:
            k, v = cache.append(k, v)
        S = k.shape[2]  # 看得见的总长：缓存里的加上这次的 T 个
        if self.attention == "manual":
            scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])  # (B, nh, T, S)
            # 看不见的先换成负无穷，softmax 之后正好是 0
            scores = scores.masked_fill(~self.mask[S - T : S, :S], float("-inf"))
            y = scores.softmax(dim=-1) @ v  # (B, nh, T, hs)
        else:  # T 比 S 小时 T 是 1：最后一个 token，前面的都看得见
            y = F.scaled_dot_product_attention(q, k, v, is_causal=S == T)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


class KVCache:  # 一层里前面各位置的 K 和 V：后面多了一个 token，它们也不变，存起来就不用重算
    def __init__(self, config, device):  # 开始时一个位置也没有：(1, nh, 0, hs)
        self.k = self.v = torch.zeros(1, config.heads, 0, config.dim // config.heads, device=device)

    def append(self, k, v):
        self.k, self.v = torch.cat([self.k, k], dim=2), torch.cat([self.v, v], dim=2)
        return self.k, self.v


class Block(nn.Module):  # pre-norm：先归一再进子层；残差那条路上什么也不做，层数多了也好训练
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.dim, elementwise_affine=config.gain, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.dim, elementwise_affine=config.gain, bias=config.bias)
        activations = {"gelu_tanh": nn.GELU("tanh"), "gelu": nn.GELU(), "relu": nn.ReLU()}
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(config.dim, 4 * config.dim, bias=config.bias))  # (B, T, 4C)
        self.mlp.add_module("activation", activations[config.activation])
        self.mlp.add_module("c_proj", nn.Linear(4 * config.dim, config.dim, bias=config.bias))

    def forward(self, x, cache=None):
        x = x + self.attn(self.ln_1(x), cache)
        return x + self.mlp(self.ln_2(x))


class MiniGPT(nn.Module):  # 层的名字和 GPT-2 一样，所以权重可以一一对应
    def __init__(self, vocab_size, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(vocab_size, config.dim)  # 是哪个 token
        self.wpe = nn.Embedding(config.block, config.dim)  # 在第几个位置
        self.h = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.ln_f = nn.LayerNorm(config.dim, elementwise_affine=config.gain, bias=config.bias)
        self.lm_head = nn.Linear(config.dim, vocab_size, bias=False)
        self.lm_head.weight = self.wte.weight  # 权重共享：读进来和写出去用同一张表
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif name == "wte.weight":  # 权重共享时每个词起初最像自己，会猜下一个还是自己，所以再小一半
                nn.init.normal_(p, std=0.01)
            elif name.endswith("c_proj.weight"):  # 每层往残差上加两次，这样加完之后的大小不随层数变
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.layers))
            elif p.dim() == 2:
                nn.init.normal_(p, std=0.02)

    def forward(self, ids, cache=None):
        """ids (B, T) → logits (B, T, V)。cache 是每层一个 KVCache，只在生成时用。"""
        start = 0 if cache is None else cache[0].k.shape[2]
        positions = torch.arange(start, start + ids.shape[1], device=ids.device)  # (T,)
        x = self.wte(ids) + self.wpe(positions)  # (B, T, C)
        for i, block in enumerate(self.h):
            x = block(x, None if cache is None else cache[i])
        return self.lm_head(self.ln_f(x))


def next_token_loss(logits, targets):  # (B, T, V) 与 (B, T) → 平均每个 token 的 -log p(正确的下一个)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


@torch.no_grad()
def generate(model, ids, max_new_tokens, temperature=1.0, greedy=False, seed=0, use_cache=True):
    """ids (1, T) → 一个一个地产出新 token。"""
    generator = torch.Generator().manual_seed(seed)
    cache = [KVCache(model.config, ids.device) for _ in model.h]
    new = ids  # 还没有进过缓存的 token
    for _ in range(max_new_tokens):
        if use_cache and ids.shape[1] <= model.config.block:
            logits = model(new, cache)
        else:  # 位置向量只有 block 个：写满之后窗口要往前移，人人的位置都变了，缓存作废，每步重算
            logits = model(ids[:, -model.config.block :])
        probs = (logits[0, -1].cpu() / temperature).softmax(-1)  # (V,)：最后一个位置猜的下一个
        token = probs.argmax() if greedy else probs.multinomial(1, generator=generator)
        yield token.item()
        new = token.view(1, 1).to(ids.device)
        ids = torch.cat([ids, new], dim=1)


# ---------- 训练 ----------
def make_optimizers(model, config):  # 词表、位置、增益与偏置总用 AdamW；块里的矩阵用 AdamW 或 Muon
    tables = [model.wte.weight, model.wpe.weight]
    matrices = [p for p in model.h.parameters() if p.dim() == 2]  # 每块四个
    vectors = [p for p in model.parameters() if p.dim() < 2]  # 增益与偏置：往 0 拉没有道理
    pulled = tables if config.optimizer == "muon" else tables + matrices
    groups = [{"params": vectors, "weight_decay": 0.0}]
    groups.append({"params": pulled, "weight_decay": config.weight_decay})
    # fused：全部参数一次处理完，不必一个参数调用几次
    adamw = torch.optim.AdamW(groups, config.lr, (0.9, config.beta2), fused=True)
    if config.optimizer == "adamw":
        return [adamw]
    try:
        from muon import Muon  # 只有这里用到，没有 muon.py 也能用 AdamW 训练
    except ImportError:
        fail("--optimizer muon 要用 muon.py：和 mini_gpt.py 放在一起，或用 --optimizer adamw。")
    return [adamw, Muon(matrices, config.lr, config.weight_decay)]


def learning_rate(step, config):  # 先线性升到 lr，再按余弦降到 min_lr
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    progress = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.min_lr + (config.lr - config.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def train_step(model, optimizers, inputs, targets, step, config):
    loss = next_token_loss(model(inputs), targets)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), config.clip)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config)
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


def get_batch(data, config, step):  # 只由 (seed, step) 决定：中断后接着训练，读到的还是同样的批
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
    starts = torch.randint(len(data) - config.block, (config.batch, 1), generator=generator)
    places = starts + torch.arange(config.block + 1)  # (B, T+1)
    rows = data[places.to(data.device)]  # 一次取完，不用 Python 循环
    return rows[:, :-1], rows[:, 1:]


@torch.no_grad()
def evaluate(model, data, batch=64):
    """整份数据的 loss：切成不重叠的段，末尾不足一段的不算。没有随机数，次次一样。"""
    rows = data.unfold(0, model.config.block + 1, model.config.block)  # (N, T+1)：多取一个字做目标
    total = 0.0
    for part in rows.split(batch):
        total += next_token_loss(model(part[:, :-1]), part[:, 1:]).item() * len(part)
    return total / len(rows)


def load_checkpoint(path, wanted):  # 读检查点；设置或数据不同就逐项说出来，不悄悄接着用
    mend = "加 --retrain 从头训练，或用 --out 另存"
    try:
        state = torch.load(path, weights_only=True)  # 只读张量，不执行 pickle 里的代码
        old = state["settings"]
    except Exception as error:  # 坏文件在各版本里抛的异常不同
        fail(f"{path} 不是完整的检查点（{type(error).__name__}）。{mend}。")
    changed = [name for name in sorted(old | wanted) if old.get(name) != wanted.get(name)]
    if changed:
        lines = "".join(f"\n  {name}：已有 {old.get(name)}，这次 {wanted.get(name)}" for name in changed)
        fail(f"{path} 是用别的设置训练的：{lines}\n改回去，或{mend}。")
    return state


def train(model, train_data, val_data, s, path, wanted, state):  # state 是从哪个检查点继续，None 是从头
    optimizers, done = make_optimizers(model, s), 0
    if state:
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        done = state["step"]
    path.parent.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    for step in range(done, s.steps):
        inputs, targets = get_batch(train_data, s, step)  # 各 (B, T)
        loss = train_step(model, optimizers, inputs, targets, step, s)
        if (step + 1) % s.eval_every == 0 or step + 1 == s.steps:
            speed = (step + 1 - done) * s.batch * s.block / (time.perf_counter() - started)
            shown = f"训练 {loss:.4f}  验证 {evaluate(model, val_data):.4f}  {speed:,.0f} 字/秒"
            print(f"  第 {step + 1:4d} 步  {shown}", flush=True)
            saved = {"settings": wanted, "step": step + 1, "model": model.state_dict()}
            saved["optimizers"] = [optimizer.state_dict() for optimizer in optimizers]
            torch.save(saved, f"{path}.tmp")
            os.replace(f"{path}.tmp", path)  # 写完再改名：任何时候被打断，path 都是完整的
            started, done = time.perf_counter(), step + 1


# ---------- 两种用法 ----------
SENTENCES = ["i love cats <end>", "i love cats <end>", "i love dogs <end>", "you love dogs <end>"]


@dataclass
class Settings(Config):  # 再加上怎么跑：这几项随便换，检查点照用
    recipe: str = option("gpt2", "一整套默认值：gpt2，或更快的 fast")
    eval_every: int = option(100, "每多少步量一次验证 loss，并存检查点")
    prompt: str = option(None, "生成时的开头；默认是文本的第一个字")
    max_new_tokens: int = option(300, "最多生成多少个 token")
    temperature: float = option(0.8, "采样温度，大于 0：越小越保守")
    greedy: bool = option(False, "贪心：不采样，总取概率最大的")
    data: str = option("", "训练用的文本文件（UTF-8）；不给就跑玩具")
    out: str = option("", "检查点存到哪里；默认是本脚本旁边的 outputs/mini_gpt-<文件名>.pt")
    retrain: bool = option(False, "不用已有的检查点，从头训练")


# Settings 里的默认值就是 --recipe gpt2；下面只写不一样的。命令行上敲了的，总是最后算数。
FAST = {"bias": False, "gain": False, "activation": "relu", "optimizer": "muon"}
FAST |= {"batch": 24, "steps": 600, "lr": 1.4e-2, "warmup": 20}
TOY = {"layers": 2, "heads": 2, "dim": 64, "block": 4, "attention": "manual", "batch": 4, "steps": 100}
TOY |= {"lr": 3e-3, "warmup": 0, "eval_every": 20, "prompt": "i", "max_new_tokens": 4, "temperature": 1.0}


def fail(message):
    raise SystemExit(f"错误：{message}")


def encode(pieces, vocab, what, block):
    usable = f"可以用的{what}：{' '.join(list(vocab)[:100])!r}"
    if not pieces:
        fail(f"--prompt 是空的。{usable}")
    for piece in pieces:
        if piece not in vocab:
            fail(f"--prompt 里的{what} {piece!r} 不在词表里。{usable}")
    if len(pieces) > block:
        print(f"开头有 {len(pieces)} 个{what}，上下文只有 {block} 个：只看得见最后 {block} 个。")
    return torch.tensor([[vocab[piece] for piece in pieces]])


def run_toy(s):  # 四句话，六个词：看得见掩码，看得见 loss 降到哪里为止
    rows = [sentence.split() for sentence in SENTENCES]
    words = list(dict.fromkeys(word for row in rows for word in row))
    vocab = {word: i for i, word in enumerate(words)}
    ids = torch.tensor([[vocab[word] for word in row] for row in rows])  # (4, 4)
    if s.block < ids.shape[1]:
        fail(f"--block {s.block} 太小：玩具的句子有 {ids.shape[1]} 个词。")
    prompt = encode(s.prompt.split(), vocab, "词", s.block)
    torch.set_num_threads(1)  # 张量太小，多线程光是互相等待就比计算还久
    model = MiniGPT(len(vocab), s)
    print(f"词表 {len(vocab)} 个：{' '.join(vocab)}；参数 {sum(p.numel() for p in model.parameters()):,} 个")
    print("\n因果掩码：一行是一个词，1 是它看得见的")
    print(" " * 7 + "".join(f"{word:>7}" for word in rows[0]))
    for word, row in zip(rows[0], model.h[0].attn.mask.int().tolist(), strict=False):
        print(f"{word:>7}" + "".join(f"{cell:>7}" for cell in row[: len(rows[0])]))
    print(f"\n训练 {s.steps} 轮（瞎猜的 loss 是 ln {len(vocab)} = {math.log(len(vocab)):.4f}）")
    optimizers = make_optimizers(model, s)
    for step in range(s.steps):
        loss = train_step(model, optimizers, ids[:, :-1], ids[:, 1:], step, s)
        if step == 0 or (step + 1) % s.eval_every == 0:
            print(f"  epoch {step + 1:3d}  loss {loss:.4f}")

    def say(**how):
        tokens = [words[t] for t in generate(model, prompt, s.max_new_tokens, s.temperature, **how)]
        return " ".join([s.prompt, *tokens]).split(" <end>")[0]

    print(f"\n贪心：{say(greedy=True)}")
    print(f"采样（温度 {s.temperature:g}）：" + "；".join(say(seed=s.seed + i) for i in range(6)))


def run_file(s):  # 在一个文本文件上训练，然后生成
    try:
        text = Path(s.data).read_text(encoding="utf-8").replace("\ufeff", "")  # 看不见的 BOM 不是字
    except OSError as error:
        why = "没有这个文件" if isinstance(error, FileNotFoundError) else "它是文件夹，或者没有权限读"
        fail(f"读不了 --data {s.data}：{why}（当前目录是 {Path.cwd()}）。")
    except UnicodeDecodeError as error:
        fail(f"{s.data} 第 {error.start + 1} 个字节起不是 UTF-8。请另存为 UTF-8 再试。")
    if text.lstrip().startswith('{"'):
        fail(f"{s.data} 里是 JSON：把要学的字段取出来，存成纯文本，不然学的是括号和引号。")
    split = int(len(text) * 0.9)  # 前 90% 训练，后 10% 验证
    if len(text) - split <= s.block:
        problem = f"{s.data} 只有 {len(text)} 个字，后 10% 留作验证，不够一段（--block {s.block}）"
        fail(f"{problem}。换一份 {10 * s.block + 10} 个字以上的文本，或把 --block 改小。")
    chars = sorted(set(text))
    vocab = {char: i for i, char in enumerate(chars)}
    start = text[0] if s.prompt is None else s.prompt
    prompt = encode(start, vocab, "字", s.block)
    wanted = {f.name: getattr(s, f.name) for f in fields(Config)}  # 全都一样才可以接着训练
    del wanted["attention"]  # 两种算法结果相同，随便换
    wanted["data_sha256"] = hashlib.sha256(text.encode()).hexdigest()
    wanted["version"] = 3  # 模型或优化器的写法变了就加一：旧的检查点接不上，要说出来
    path = Path(s.out or Path(__file__).parent / "outputs" / f"mini_gpt-{Path(s.data).stem}.pt")
    state = load_checkpoint(path, wanted) if path.exists() and not s.retrain else None
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    ids = torch.tensor([vocab[char] for char in text], device=device)
    model = MiniGPT(len(vocab), s).to(device)
    size = sum(p.numel() for p in model.parameters())
    print(f"{len(text):,} 个字，{len(vocab)} 种；参数 {size:,} 个；{device.type}")
    print(f"检查点 {path}" + (f"：从第 {state['step']} 步继续（--retrain 从头训练）" if state else ""))
    try:
        train(model, ids[:split], ids[split:], s, path, wanted, state)
    except KeyboardInterrupt:
        raise SystemExit(f"\n已中断。再运行同一条命令，就从 {path} 里最近的检查点继续。") from None
    except OSError as error:
        fail(f"写不了检查点 {path}：{error.strerror}。用 --out 换个地方。")
    print(f"\n生成（{'贪心' if s.greedy else f'温度 {s.temperature:g}'}）：\n{start}", end="")
    for token in generate(model, prompt.to(device), s.max_new_tokens, s.temperature, s.greedy, s.seed):
        print(chars[token], end="", flush=True)
    print()


def check(s):  # 写错的参数，训练之前就说
    def need(good, name, rule):
        if not good:
            fail(f"--{name} {rule}（现在是 {getattr(s, name)}）。")

    for name in ("layers", "heads", "dim", "block", "batch", "steps", "eval_every", "max_new_tokens"):
        need(getattr(s, name) > 0, name, "要是正整数")
    for name in ("lr", "clip"):
        need(0 < getattr(s, name) < math.inf, name, "要大于 0")
    for name in ("warmup", "min_lr", "weight_decay"):
        need(0 <= getattr(s, name) < math.inf, name, "不能是负数")
    need(s.recipe in ("gpt2", "fast"), "recipe", "只有 gpt2、fast")
    need(0 <= s.beta2 < 1, "beta2", "要在 0 与 1 之间")
    need(0 < s.temperature < math.inf, "temperature", "要大于 0；要总取概率最大的，用 --greedy")
    need(s.activation in ("gelu_tanh", "gelu", "relu"), "activation", "只有 gelu_tanh、gelu、relu")
    need(s.attention in ("manual", "sdpa"), "attention", "只有 manual、sdpa")
    need(s.optimizer in ("muon", "adamw"), "optimizer", "只有 muon、adamw")
    if s.dim % s.heads:
        fail(f"--dim {s.dim} 不能平分给 --heads {s.heads} 个头。")


def main(argv=None):
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    parser.error = lambda message: fail(f"参数写错了：{message}。用法见 python mini_gpt.py --help。")
    for f in fields(Settings):
        kind = {"action": argparse.BooleanOptionalAction} if f.type is bool else {"type": f.type}
        text = f.metadata["help"]
        if f.default not in (None, "", False):
            text += f"（默认 {f.default}；fast {FAST.get(f.name, '同')}；玩具 {TOY.get(f.name, '同')}）"
        parser.add_argument(f"--{f.name}", default=argparse.SUPPRESS, help=text, **kind)
    given = vars(parser.parse_args(argv))  # 只有敲了的；没敲的由默认值补上
    defaults = FAST if given.get("recipe") == "fast" else {}
    s = Settings(**(defaults | ({} if "data" in given else TOY) | given))
    check(s)
    torch.manual_seed(s.seed)
    run = run_file if "data" in given else run_toy
    run(s)


if __name__ == "__main__":
    if hasattr(sys.stdout, "reconfigure"):  # IDLE 里没有
        sys.stdout.reconfigure(errors="replace")  # 终端写不出的字印成问号，不中途报错
    main()
