"""MiniGPT：从零写一个 GPT，一个文件，只用 PyTorch。

你会学到：自回归（只猜下一个 token，再接回去）；因果掩码（猜的时候不许偷看后面）；
位置向量、多头注意力、pre-norm 与残差、权重共享、KV 缓存，各是哪几行。

怎么运行
  python mini_gpt.py                              # 四句话的玩具，几秒
  python mini_gpt.py --data input.txt             # 任何 UTF-8 文本，一个字一个 token
  python mini_gpt.py --data input.txt --prompt "ROMEO:" --temperature 0.5    # 训练完再运行：只生成

应当看到（玩具，种子 0）
  loss 从 1.8203 降到 0.1646（"i love" 后面三次里两次是 cats，这份数据的下限是 0.1591），贪心写出 i love cats。

参考：Radford et al. 2019（GPT-2）；Vaswani et al. 2017（注意力）；Loshchilov & Hutter 2019（AdamW）；Jordan et al. 2024（Muon）。
"""

import argparse
import hashlib
import math
import os
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

SENTENCES = ["i love cats <end>", "i love cats <end>", "i love dogs <end>", "you love dogs <end>"]

# 名字：(--data 的默认值, 玩具的默认值, 说明)。这一张决定训练出什么，检查点里记着，改了就不能接着训练。
TRAINING = {
    "layers": (4, 2, "Transformer 块的层数"),
    "heads": (4, 2, "注意力的头数"),
    "dim": (128, 64, "每个 token 的向量有多少维"),
    "block": (64, 4, "上下文最多多少个 token"),
    "gpt2": (False, False, "和 GPT-2 分毫不差：偏置、LayerNorm 的增益、GELU；默认都省掉，用 ReLU，快一成多"),
    "batch": (24, 4, "每步多少段；玩具总是四句一起"),
    "steps": (600, 100, "更新多少步；玩具里就是多少轮"),
    "optimizer": ("muon", "adamw", "块里的矩阵用哪个优化器：muon 或 adamw"),
    "lr": (1.4e-2, 3e-3, "学习率的峰值；之后按余弦下降"),
    "min_lr": (0.0, 0.0, "学习率降到多少为止"),
    "warmup": (20, 0, "学习率从 0 升到峰值用多少步"),
    "beta2": (0.95, 0.95, "AdamW 的 β2：越近 1，步子的大小参考越久以前的梯度"),
    "weight_decay": (0.1, 0.1, "权重衰减：矩阵每步往 0 拉一点"),
    "clip": (1.0, 1.0, "梯度的总长度最多多少，超过就按比例缩短"),
    "seed": (0, 0, "随机种子：同一种子，结果相同"),
}
OTHER = {  # 这一张随便换，检查点照用
    "attention": ("sdpa", "manual", "注意力的算法：manual 手写的三行，sdpa 是 PyTorch 的一个函数"),
    "eval_every": (100, 20, "每多少步量一次验证 loss，并存检查点"),
    "prompt": (None, "i", "生成时的开头；默认是文本的第一个字"),
    "max_new_tokens": (300, 4, "最多生成多少个 token"),
    "temperature": (0.8, 1.0, "采样温度，大于 0：越小越保守"),
    "greedy": (False, False, "贪心：不采样，总取概率最大的"),
    "data": ("", "", "训练用的文本文件（UTF-8）；不给就跑玩具"),
    "out": ("", "", "检查点存到哪里；默认是本脚本旁边的 outputs/mini_gpt-<文件名>.pt"),
    "retrain": (False, False, "不用已有的检查点，从头训练"),
}
RULES = [  # (哪些参数, 怎样才对, 不对时说什么)
    ("layers heads dim block batch steps eval_every max_new_tokens", lambda v: v > 0, "要是正整数"),
    ("lr clip", lambda v: 0 < v < math.inf, "要大于 0"),
    ("warmup min_lr weight_decay", lambda v: 0 <= v < math.inf, "不能是负数"),
    ("beta2", lambda v: 0 <= v < 1, "要在 0 与 1 之间"),
    ("temperature", lambda v: 0 < v < math.inf, "要大于 0；要总取概率最大的，用 --greedy"),
    ("attention", ("manual", "sdpa").__contains__, "只有 manual、sdpa"),
    ("optimizer", ("muon", "adamw").__contains__, "只有 muon、adamw"),
]


def settings(toy=False, **given):
    return argparse.Namespace(**{name: row[toy] for name, row in (TRAINING | OTHER).items()} | given)


def fail(message):
    raise SystemExit(f"错误：{message}")


# ---------- 1. 模型：层的名字和 GPT-2 一样，所以权重可以一一对应 ----------
class CausalSelfAttention(nn.Module):
    def __init__(self, s):
        super().__init__()
        self.heads, self.attention = s.heads, s.attention
        self.c_attn = nn.Linear(s.dim, 3 * s.dim, bias=s.gpt2)  # Q、K、V 三个矩阵并成一次乘法
        self.c_proj = nn.Linear(s.dim, s.dim, bias=s.gpt2)
        # 第 t 行：位置 t 只看得见自己和前面的
        self.register_buffer("mask", torch.ones(s.block, s.block, dtype=torch.bool).tril(), persistent=False)

    def forward(self, x, past=None):
        """x (B, T, C)。past 是这一层的缓存 [K, V]：接上新的，旧的不用重算。"""
        B, T, C = x.shape
        q, k, v = self.c_attn(x).view(B, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # 各 (B, nh, T, hs)
        if past is not None:
            if past:
                k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)  # (B, nh, S, hs)
            past[:] = [k, v]
        S = k.shape[2]  # 看得见的总长：缓存里的加上这次的 T 个
        if self.attention == "manual":
            scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])  # (B, nh, T, S)
            # 看不见的先换成负无穷，softmax 之后正好是 0
            scores = scores.masked_fill(~self.mask[S - T : S, :S], float("-inf"))
            y = scores.softmax(dim=-1) @ v  # (B, nh, T, hs)
        else:  # T 比 S 小时 T 是 1：最后一个 token，前面的都看得见
            y = F.scaled_dot_product_attention(q, k, v, is_causal=S == T)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


class Block(nn.Module):
    """pre-norm：先归一再进子层；残差那条路上什么也不做，层数多了也好训练。"""

    def __init__(self, s):
        super().__init__()
        # GPT-2 归一之后每一维还乘一个数、加一个数；后面的矩阵自己就学得会，默认省掉
        self.ln_1 = nn.LayerNorm(s.dim, elementwise_affine=s.gpt2)
        self.ln_2 = nn.LayerNorm(s.dim, elementwise_affine=s.gpt2)
        self.attn = CausalSelfAttention(s)
        wide, narrow = nn.Linear(s.dim, 4 * s.dim, bias=s.gpt2), nn.Linear(4 * s.dim, s.dim, bias=s.gpt2)
        self.mlp = nn.ModuleDict({"c_fc": wide, "c_proj": narrow})
        self.gpt2 = s.gpt2

    def forward(self, x, past=None):
        x = x + self.attn(self.ln_1(x), past)
        hidden = self.mlp.c_fc(self.ln_2(x))  # (B, T, 4C)
        # GELU 要算 tanh 或 erf，反向还要算一遍：在 CPU 上一步贵一成多，每步学得只好一点点
        hidden = F.gelu(hidden, approximate="tanh") if self.gpt2 else F.relu(hidden)
        return x + self.mlp.c_proj(hidden)


class MiniGPT(nn.Module):
    def __init__(self, vocab_size, s):
        super().__init__()
        self.block_size = s.block
        self.wte = nn.Embedding(vocab_size, s.dim)  # 是哪个 token
        self.wpe = nn.Embedding(s.block, s.dim)  # 在第几个位置
        self.h = nn.ModuleList(Block(s) for _ in range(s.layers))
        self.ln_f = nn.LayerNorm(s.dim, elementwise_affine=s.gpt2)
        self.lm_head = nn.Linear(s.dim, vocab_size, bias=False)
        self.lm_head.weight = self.wte.weight  # 权重共享：读进来和写出去用同一张表
        # 比 0.02 小的两种。wte：权重共享时每个词起初最像自己，会猜下一个还是自己；
        # c_proj：每层往残差上加两次，这样加完之后的大小不随层数变。
        std = {"wte": 0.01, "c_proj": 0.02 / math.sqrt(2 * s.layers)}
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif p.dim() == 2:
                nn.init.normal_(p, std=std.get(name.split(".")[-2], 0.02))

    def forward(self, ids, cache=None):
        """ids (B, T) → logits (B, T, V)。cache 是每层一个 list，由 generate 建好。"""
        start = cache[0][0].shape[2] if cache and cache[0] else 0
        positions = torch.arange(start, start + ids.shape[1], device=ids.device)
        x = self.wte(ids) + self.wpe(positions)  # (B, T, C)
        for i, block in enumerate(self.h):
            x = block(x, cache[i] if cache else None)
        return self.lm_head(self.ln_f(x))


def next_token_loss(logits, targets):
    """(B, T, V) 与 (B, T) → 平均每个 token 的 -log p(正确的下一个)。"""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


# ---------- 2. 生成 ----------
@torch.no_grad()
def generate(model, ids, max_new_tokens, temperature=1.0, greedy=False, seed=0, use_cache=True):
    """ids (1, T) → 一个一个地产出新 token。

    KV 缓存：前面的 K、V 不会再变，只算新 token 那一行。位置向量只有 block 个，写满之后窗口要往前移，每个 token 的
    位置都变了，缓存作废：从那以后每步都取最后 block 个重算，和没有缓存一样慢。
    """
    generator = torch.Generator().manual_seed(seed)
    cache = None
    for _ in range(max_new_tokens):
        if cache and ids.shape[1] <= model.block_size:
            logits = model(ids[:, -1:], cache)
        else:
            cache = [[] for _ in model.h] if use_cache else None
            logits = model(ids[:, -model.block_size :], cache)
        probs = (logits[0, -1].cpu() / temperature).softmax(-1)  # (V,)：最后一个位置猜的下一个
        token = probs.argmax() if greedy else probs.multinomial(1, generator=generator)
        yield token.item()
        ids = torch.cat([ids, token.view(1, 1).to(ids.device)], dim=1)


# ---------- 3. 优化器 ----------
class Muon(torch.optim.Optimizer):
    """矩阵的更新方向先“正交化”再走一步（Jordan et al. 2024）。

    梯度矩阵里常有几个方向特别大，AdamW 跟着它们走，别的方向学得慢。正交化把各个方向的大小拉成差不多一样。
    一组参数是形状相同的 N 个矩阵，叠成一批一起算：比一个一个算，每步快一成。
    """

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            same, lr = group["params"], group["lr"]
            grads = torch.stack([p.grad for p in same])  # (N, 行, 列)
            average = self.state[same[0]].setdefault("average", torch.zeros_like(grads))
            average.lerp_(grads, 0.05)
            # 正交化之后每格约 1/√长边；乘上 0.2·√长边，步子就和 AdamW 的差不多大，学习率可以通用。
            size = lr * 0.2 * math.sqrt(max(same[0].shape))
            for p, direction in zip(same, orthogonalize(grads.lerp(average, 0.95)), strict=True):
                p.mul_(1 - lr * group["weight_decay"]).sub_(direction, alpha=size)


def orthogonalize(x):
    """x (N, 行, 列)：奇异值都推到 1 附近，方向不变。五次 Newton–Schulz 迭代，只用矩阵乘法，不用慢得多的 SVD。"""
    if x.shape[1] > x.shape[2]:
        return orthogonalize(x.mT).mT  # 让 x @ x.mT 是小的那个
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):  # x ← 3.4445 x − 4.7750 (x xᵀ) x + 2.0315 (x xᵀ)² x；baddbmm 把加和乘并成一次
        a = x @ x.mT
        a = torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, a, x, beta=3.4445)
    return x


def make_optimizers(model, s):
    """块里的矩阵用 Muon；词表、位置、增益与偏置用 AdamW。"""
    matrices = [[p for p in block.parameters() if p.dim() == 2] for block in model.h]  # 每块四个
    tables = [model.wte.weight, model.wpe.weight]
    vectors = [p for p in model.parameters() if p.dim() < 2]  # --gpt2 才有的增益与偏置：往 0 拉没有道理
    muon = s.optimizer == "muon"
    groups = [{"params": tables if muon else sum(matrices, tables)}, {"params": vectors, "weight_decay": 0.0}]
    # fused：全部参数一次处理完，不必一个参数调用几次。
    adamw = torch.optim.AdamW(groups, s.lr, (0.9, s.beta2), weight_decay=s.weight_decay, fused=True)
    same = [{"params": each} for each in zip(*matrices, strict=True)]  # 各块里同一个位置的，形状相同
    return [adamw, Muon(same, {"lr": s.lr, "weight_decay": s.weight_decay})] if muon else [adamw]


# ---------- 4. 训练 ----------
def learning_rate(step, s):
    """先线性升到 lr，再按余弦降到 min_lr。"""
    if step < s.warmup:
        return s.lr * (step + 1) / s.warmup
    progress = (step - s.warmup) / max(1, s.steps - s.warmup)
    return s.min_lr + (s.lr - s.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def train_step(model, optimizers, inputs, targets, step, s):
    loss = next_token_loss(model(inputs), targets)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), s.clip)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, s)
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


def get_batch(data, s, step):
    """第 step 步的那一批，只由 (seed, step) 决定：中断后接着训练，读到的还是同样的批。"""
    generator = torch.Generator().manual_seed(s.seed * 1_000_003 + step)
    starts = torch.randint(len(data) - s.block, (s.batch, 1), generator=generator)
    rows = data[(starts + torch.arange(s.block + 1)).to(data.device)]  # (B, T+1)：一次取完，不用 Python 循环
    return rows[:, :-1], rows[:, 1:]


@torch.no_grad()
def evaluate(model, data, batch=64):
    """整份数据的 loss：切成不重叠的段，末尾不足一段的不算。没有随机数，次次一样。"""
    n = (len(data) - 1) // model.block_size
    rows = (data[i : i + n * model.block_size].view(n, -1).split(batch) for i in (0, 1))  # 输入与目标
    return sum(next_token_loss(model(x), y).item() * len(x) for x, y in zip(*rows, strict=True)) / n


def load_checkpoint(path, wanted):
    """读检查点；设置或数据不同就逐项说出来，不悄悄接着用。"""
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


def train(model, train_data, val_data, s, path, wanted, state):
    """训练到 s.steps 步，边训练边存；state 是从哪个检查点继续，None 是从头。"""
    optimizers, done = make_optimizers(model, s), 0
    if state:
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        done = state["step"]
    path.parent.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    for step in range(done, s.steps):
        loss = train_step(model, optimizers, *get_batch(train_data, s, step), step, s)
        if (step + 1) % s.eval_every == 0 or step + 1 == s.steps:
            speed = (step + 1 - done) * s.batch * s.block / (time.perf_counter() - started)
            shown = f"训练 {loss:.4f}  验证 {evaluate(model, val_data):.4f}  {speed:,.0f} 字/秒"
            print(f"  第 {step + 1:4d} 步  {shown}", flush=True)
            saved = {"settings": wanted, "step": step + 1, "model": model.state_dict()}
            saved["optimizers"] = [optimizer.state_dict() for optimizer in optimizers]
            torch.save(saved, f"{path}.tmp")
            os.replace(f"{path}.tmp", path)  # 写完再改名：任何时候被打断，path 都是完整的
            started, done = time.perf_counter(), step + 1


# ---------- 5. 两种用法 ----------
def encode(pieces, vocab, what, s):
    unknown = [piece for piece in pieces if piece not in vocab]
    if unknown or not pieces:
        problem = f"里的{what} {unknown[0]!r} 不在词表里" if unknown else "是空的"
        fail(f"--prompt {problem}。可以用的{what}：{' '.join(list(vocab)[:100])!r}")
    if len(pieces) > s.block:
        print(f"开头有 {len(pieces)} 个{what}，上下文只有 {s.block} 个：只看得见最后 {s.block} 个。")
    return torch.tensor([[vocab[piece] for piece in pieces]])  # (1, T)


def run_toy(s):
    """四句话，六个词：看得见掩码，看得见 loss 降到哪里为止。"""
    rows = [sentence.split() for sentence in SENTENCES]
    words = list(dict.fromkeys(word for row in rows for word in row))
    vocab = {word: i for i, word in enumerate(words)}
    ids = torch.tensor([[vocab[word] for word in row] for row in rows])  # (4, 4)
    if s.block < ids.shape[1]:
        fail(f"--block {s.block} 太小：玩具的句子有 {ids.shape[1]} 个词。")
    prompt = encode(s.prompt.split(), vocab, "词", s)
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


def run_file(s):
    """在一个文本文件上训练，然后生成。"""
    try:
        text = Path(s.data).read_text(encoding="utf-8")
    except OSError as error:
        why = "没有这个文件" if isinstance(error, FileNotFoundError) else error.strerror
        fail(f"读不了 --data {s.data}：{why}（当前目录是 {Path.cwd()}）。")
    except UnicodeDecodeError as error:
        fail(f"{s.data} 第 {error.start + 1} 个字节起不是 UTF-8。请另存为 UTF-8 再试。")
    split = int(len(text) * 0.9)  # 前 90% 训练，后 10% 验证
    if len(text) - split <= s.block:
        problem = f"{s.data} 只有 {len(text)} 个字，后 10% 留作验证，不够一段（--block {s.block}）"
        fail(f"{problem}。换一份 {10 * s.block + 10} 个字以上的文本，或把 --block 改小。")
    chars = sorted(set(text))
    vocab = {char: i for i, char in enumerate(chars)}
    start = text[0] if s.prompt is None else s.prompt
    prompt = encode(start, vocab, "字", s)
    wanted = {name: getattr(s, name) for name in TRAINING}
    # version：模型或优化器的写法变了就加一，旧的检查点接不上，要说出来
    wanted |= {"data_sha256": hashlib.sha256(text.encode()).hexdigest(), "version": 2}
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


def main(argv=None):
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    parser.error = lambda message: fail(f"参数写错了：{message}。用法见 python mini_gpt.py --help。")
    for name, (default, toy, text) in (TRAINING | OTHER).items():
        kind = {"action": "store_true"} if default is False else {"type": type(toy)}
        shown = "" if default is False or default in (None, "") else f"（默认 {default}；玩具 {toy}）"
        parser.add_argument(f"--{name}", default=argparse.SUPPRESS, help=text + shown, **kind)
    given = vars(parser.parse_args(argv))  # 只有敲了的；没敲的由表里的默认值补上
    s = settings("data" not in given, **given)
    for names, good, rule in RULES:
        for name in names.split():
            if not good(getattr(s, name)):
                fail(f"--{name} {rule}（现在是 {getattr(s, name)}）。")
    if s.dim % s.heads:
        fail(f"--dim {s.dim} 不能平分给 --heads {s.heads} 个头。")
    torch.manual_seed(s.seed)
    run_file(s) if "data" in given else run_toy(s)


if __name__ == "__main__":
    main()
