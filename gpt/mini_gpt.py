"""MiniGPT：从零写一个 GPT，一个文件，只用 PyTorch。

你会学到
  1. 自回归：每个位置只做一件事，猜下一个 token；写句子就是把猜到的一次次接回去。
  2. 因果掩码：猜的时候不许偷看后面。
  3. 位置向量、多头注意力、pre-norm 与残差、权重共享、KV 缓存，各是哪几行。

怎么运行
  python mini_gpt.py                              # 四句话的玩具，几秒
  python mini_gpt.py --data input.txt             # 任何 UTF-8 文本，一个字一个 token
  python mini_gpt.py --data input.txt --prompt "ROMEO:" --temperature 0.5    # 训练完再运行：只生成

应当看到（玩具，种子 0）
  loss 从 1.8081 降到 0.1638（"i love" 后面三次里两次是 cats，这份数据的下限是 0.1591），贪心写出 i love cats。

参考：Radford et al. 2019（GPT-2）；Vaswani et al. 2017（注意力）；Loshchilov & Hutter 2019（AdamW）；Jordan et al. 2024（Muon）。
"""

import argparse
import hashlib
import math
import os
import time
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

SENTENCES = ["i love cats", "i love cats", "i love dogs", "you love dogs"]
END = "<end>"


def option(default, help):
    return field(default=default, metadata={"help": help})


@dataclass
class Settings:
    layers: int = option(4, "Transformer 块的层数")
    heads: int = option(4, "注意力的头数")
    dim: int = option(128, "每个 token 的向量有多少维")
    block: int = option(64, "上下文最多多少个 token")
    gpt2: bool = option(False, "和 GPT-2 分毫不差：带偏置，GELU 用 tanh 近似；默认不要，快一点")
    attention: str = option("sdpa", "注意力的算法：manual 手写的三行，sdpa 是 PyTorch 的一个函数")
    batch: int = option(24, "每步多少段")
    steps: int = option(600, "更新多少步；玩具里就是多少轮")
    optimizer: str = option("muon", "块里的矩阵用哪个优化器：muon 或 adamw")
    precision: str = option("auto", "矩阵乘法的精度：fp32、bf16，auto 是试一试哪个快")
    lr: float = option(1e-2, "学习率的峰值；之后按余弦降到 0")
    warmup: int = option(40, "学习率从 0 升到峰值用多少步")
    weight_decay: float = option(0.1, "权重衰减，只用在矩阵上")
    beta2: float = option(0.95, "AdamW 二阶矩的衰减")
    seed: int = option(0, "随机种子：同一种子，结果相同")
    eval_every: int = option(100, "每多少步量一次验证 loss，并存检查点")
    prompt: str = option(None, "生成时的开头；默认是文本的第一个字，玩具是 i")
    max_new_tokens: int = option(300, "最多生成多少个 token")
    temperature: float = option(0.8, "采样温度，大于 0：越小越保守")
    greedy: bool = option(False, "贪心：不采样，总取概率最大的")
    data: str = option(None, "训练用的文本文件（UTF-8）；不给就跑玩具")
    out: str = option(None, "检查点存到哪里；默认是本脚本旁边的 outputs/mini_gpt-<文件名>.pt")
    retrain: bool = option(False, "不用已有的检查点，从头训练")


TOY = Settings(layers=2, heads=2, dim=64, block=4, batch=4, steps=100, optimizer="adamw", warmup=0, lr=3e-3)
TOY = replace(TOY, attention="manual", precision="fp32", eval_every=20, max_new_tokens=4, temperature=1.0)
# 不影响训练结果的参数，改了也能用同一个检查点。
FREE = {"attention", "eval_every", "prompt", "max_new_tokens", "temperature", "greedy"}
FREE |= {"data", "out", "retrain"}


def fail(message):
    raise SystemExit(f"错误：{message}")


# ---------- 1. 模型：层的名字和 GPT-2 一样，所以权重可以一一对应 ----------
class CausalSelfAttention(nn.Module):
    def __init__(self, s):
        super().__init__()
        self.heads, self.attention = s.heads, s.attention
        self.c_attn = nn.Linear(s.dim, 3 * s.dim, bias=s.gpt2)  # Q、K、V 三个矩阵并成一次乘法
        self.c_proj = nn.Linear(s.dim, s.dim, bias=s.gpt2)
        # 第 t 行：第 t 个位置看得见谁。只有自己和前面的。
        mask = torch.ones(s.block, s.block, dtype=torch.bool).tril()
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, x, past=None):
        """x (B, T, C)。past 是这一层的缓存 [K, V]：接上新的，旧的不用重算。"""
        B, T, C = x.shape
        q, k, v = (
            part.view(B, T, self.heads, C // self.heads).transpose(1, 2)  # (B, nh, T, hs)
            for part in self.c_attn(x).split(C, dim=2)
        )
        if past:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)  # (B, nh, S, hs)
        if past is not None:
            past[:] = [k, v]
        S = k.shape[2]  # 看得见的总长：缓存里的加上这次的 T 个
        if self.attention == "manual":
            mask = self.mask[S - T : S, :S]  # (T, S)
            scores = q @ k.transpose(-2, -1) / math.sqrt(C // self.heads)  # (B, nh, T, S)
            weights = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1)  # 看不见的正好是 0
            y = weights @ v  # (B, nh, T, hs)
        else:  # T 比 S 小时 T 是 1：最后一个 token，前面的都看得见
            # CPU 上它的 bf16 反向比 float32 慢三倍（一步 45 毫秒对 16），所以这一处总用 float32。
            with torch.autocast("cpu", enabled=False):
                q, k, v = q.float(), k.float(), v.float()
                y = F.scaled_dot_product_attention(q, k, v, is_causal=S == T)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, s):
        super().__init__()
        self.c_fc = nn.Linear(s.dim, 4 * s.dim, bias=s.gpt2)
        self.c_proj = nn.Linear(4 * s.dim, s.dim, bias=s.gpt2)
        # GPT-2 用 tanh 近似，那时它快；现在的 CPU 上正好反过来，前向加反向 0.6 毫秒对 1.6 毫秒。
        self.gelu = "tanh" if s.gpt2 else "none"

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate=self.gelu))


class Block(nn.Module):
    """pre-norm：先归一再进子层；残差那条路上什么也不做，层数多了也好训练。"""

    def __init__(self, s):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(s.dim, bias=s.gpt2), nn.LayerNorm(s.dim, bias=s.gpt2)
        self.attn, self.mlp = CausalSelfAttention(s), MLP(s)

    def forward(self, x, past=None):
        x = x + self.attn(self.ln_1(x), past)
        return x + self.mlp(self.ln_2(x))


class MiniGPT(nn.Module):
    def __init__(self, vocab_size, s):
        super().__init__()
        self.block_size = s.block
        self.wte = nn.Embedding(vocab_size, s.dim)  # 是哪个 token
        self.wpe = nn.Embedding(s.block, s.dim)  # 在第几个位置
        self.h = nn.ModuleList(Block(s) for _ in range(s.layers))
        self.ln_f = nn.LayerNorm(s.dim, bias=s.gpt2)
        self.lm_head = nn.Linear(s.dim, vocab_size, bias=False)
        self.lm_head.weight = self.wte.weight  # 权重共享：读进来和写出去用同一张表
        for name, parameter in self.named_parameters():
            if name == "wte.weight":
                # 权重共享时，每个词起初最像它自己，会猜下一个还是自己；表小一些，开头才接近瞎猜。
                nn.init.normal_(parameter, std=0.01)
            elif parameter.dim() == 2:
                # 每层往残差上加两次；除以 √(2·层数)，加完之后的大小才不随层数变。
                shrink = math.sqrt(2 * s.layers) if name.endswith("c_proj.weight") else 1.0
                nn.init.normal_(parameter, std=0.02 / shrink)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

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

    KV 缓存：前面的 K、V 不会再变，新来一个 token 只算它自己那一行。位置向量只有 block 个，写满之后窗口要往前移，
    每个 token 的位置都变了，缓存作废：从那以后每步都取最后 block 个重算，和没有缓存一样慢。
    """
    model.eval()
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
    """

    def __init__(self, params, lr, weight_decay, momentum=0.95, dtype=torch.float32):
        by_shape = {}
        for p in params:
            by_shape.setdefault(p.shape, []).append(p)  # 形状相同的叠在一起算，少调用几十次
        groups = [{"params": same} for same in by_shape.values()]
        self.dtype = dtype
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params, lr, momentum = group["params"], group["lr"], group["momentum"]
            gradient = torch.stack([p.grad for p in params])  # (N, 行, 列)
            state = self.state[params[0]]
            average = state.setdefault("average", torch.zeros_like(gradient))
            average.lerp_(gradient, 1 - momentum)
            update = orthogonalize(gradient.lerp(average, momentum).to(self.dtype))
            # 正交化之后每格约 1/√(较长的边)；乘上 0.2·√(较长的边)，步子就和 AdamW 的差不多大，学习率可以通用。
            size = lr * 0.2 * math.sqrt(max(gradient.shape[1:]))
            for p, direction in zip(params, update, strict=True):
                p.mul_(1 - lr * group["weight_decay"]).sub_(direction, alpha=size)


def orthogonalize(matrices, steps=5):
    """(N, 行, 列)：奇异值都推到 1 附近，方向不变。五次 Newton–Schulz 迭代，只用矩阵乘法，不用慢得多的 SVD。"""
    x = matrices.mT if matrices.shape[1] > matrices.shape[2] else matrices  # 让 x @ x.mT 是小的那个
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.mT if matrices.shape[1] > matrices.shape[2] else x


def make_optimizers(model, s):
    """块里的矩阵用 Muon；词表、位置、LayerNorm 用 AdamW。"""
    named = dict(model.named_parameters())
    matrices = [p for name, p in named.items() if p.dim() == 2 and name.startswith("h.")]
    tables = [named["wte.weight"], named["wpe.weight"]]
    vectors = [p for p in named.values() if p.dim() < 2]  # LayerNorm 与偏置，往 0 拉没有道理
    groups = [{"params": tables if s.optimizer == "muon" else tables + matrices}]
    groups += [{"params": vectors, "weight_decay": 0.0}]
    # fused：全部参数一次处理完，这一步从 2.8 毫秒降到 0.5 毫秒。
    adamw = torch.optim.AdamW(groups, s.lr, betas=(0.9, s.beta2), weight_decay=s.weight_decay, fused=True)
    if s.optimizer == "adamw":
        return [adamw]
    dtype = torch.bfloat16 if s.precision == "bf16" else torch.float32
    return [adamw, Muon(matrices, s.lr, s.weight_decay, dtype=dtype)]


# ---------- 4. 训练 ----------
def learning_rate(step, s):
    """先线性升到峰值，再按余弦降到 0。"""
    if step < s.warmup:
        return s.lr * (step + 1) / s.warmup
    return s.lr * 0.5 * (1 + math.cos(math.pi * (step - s.warmup) / max(1, s.steps - s.warmup)))


def pick_precision(device):
    """bf16 的乘法，有专门指令的机器快一倍，没有的慢十倍以上：量一量才知道。权重和优化器总是 float32。"""

    def seconds(dtype):
        x = torch.ones(512, 512, dtype=dtype, device=device)
        (x @ x)[0, 0].item()  # 第一次要准备，不算；item 等 GPU 算完
        started = time.perf_counter()
        for _ in range(4):
            (x @ x)[0, 0].item()
        return time.perf_counter() - started

    if device.type not in ("cpu", "cuda"):
        return "fp32"
    fp32, bf16 = (min(seconds(dtype) for _ in range(3)) for dtype in (torch.float32, torch.bfloat16))
    return "bf16" if bf16 < 0.75 * fp32 else "fp32"


def train_step(model, optimizers, inputs, targets, lr, precision="fp32"):
    # bf16：乘法占一步的七成，快一倍；别的运算和权重仍是 float32。
    with torch.autocast(inputs.device.type, torch.bfloat16, enabled=precision == "bf16"):
        loss = next_token_loss(model(inputs), targets)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
    return loss.detach()


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
    inputs = data[: n * model.block_size].view(n, -1)
    targets = data[1 : n * model.block_size + 1].view(n, -1)
    batches = zip(inputs.split(batch), targets.split(batch), strict=True)
    return sum(next_token_loss(model(x), y).item() * len(x) for x, y in batches) / n


def save_checkpoint(path, wanted, step, history, model, optimizers):
    """先写到旁边再改名：任何时候被打断，path 都是一个写完整的检查点。"""
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {"settings": wanted, "step": step, "history": history, "model": model.state_dict()}
    state["optimizers"] = [optimizer.state_dict() for optimizer in optimizers]
    torch.save(state, f"{path}.tmp")
    os.replace(f"{path}.tmp", path)


def load_checkpoint(path, wanted):
    """读检查点；设置或数据不同就逐项说出来，不悄悄接着用。"""
    mend = "加 --retrain 从头训练，或用 --out 另存"
    try:
        state = torch.load(path, weights_only=True)  # 只读张量，不执行 pickle 里的代码
        old = state["settings"]
    except Exception as error:  # 坏文件在各版本里抛的异常不同
        fail(f"{path} 不是完整的检查点（{type(error).__name__}）。{mend}。")
    if wanted["precision"] == "auto":  # 接着训练就用原来的精度，不再量：机器忙闲不同，量出来的会变
        wanted["precision"] = old.get("precision")
    changed = [name for name in sorted(old | wanted) if old.get(name) != wanted.get(name)]
    if changed:
        lines = "".join(f"\n  {name}：已有 {old.get(name)}，这次 {wanted.get(name)}" for name in changed)
        fail(f"{path} 是用别的设置训练的：{lines}\n改回去，或{mend}。")
    return state


def train(model, train_data, val_data, s, path=None, wanted=None, state=None):
    """训练到 s.steps 步，state 是从哪个检查点继续；返回 [(步, 验证 loss), …]。"""
    optimizers = make_optimizers(model, s)
    step, history = 0, []
    if state:
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        step, history = state["step"], state["history"]
    started, tokens = time.perf_counter(), 0
    while step < s.steps:
        inputs, targets = get_batch(train_data, s, step)
        loss = train_step(model, optimizers, inputs, targets, learning_rate(step, s), s.precision)
        step, tokens = step + 1, tokens + inputs.numel()
        if step % s.eval_every == 0 or step == s.steps:
            speed = tokens / (time.perf_counter() - started)
            history.append((step, evaluate(model, val_data)))
            shown = f"训练 {loss:.4f}  验证 {history[-1][1]:.4f}  {speed:,.0f} 字/秒"
            print(f"  第 {step:4d} 步  {shown}", flush=True)
            if path:
                save_checkpoint(path, wanted, step, history, model, optimizers)
            started, tokens = time.perf_counter(), 0
    return history


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
    rows = [[*sentence.split(), END] for sentence in SENTENCES]
    words = list(dict.fromkeys(word for row in rows for word in row))
    vocab = {word: i for i, word in enumerate(words)}
    ids = torch.tensor([[vocab[word] for word in row] for row in rows])  # (4, 4)
    if s.block < ids.shape[1]:
        fail(f"--block {s.block} 太小：玩具的句子有 {ids.shape[1]} 个词。")
    start = "i" if s.prompt is None else s.prompt
    prompt = encode(start.split(), vocab, "词", s)
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
        loss = train_step(model, optimizers, ids[:, :-1], ids[:, 1:], learning_rate(step, s))
        if step == 0 or (step + 1) % s.eval_every == 0:
            print(f"  epoch {step + 1:3d}  loss {loss:.4f}")

    def say(**how):
        tokens = [words[t] for t in generate(model, prompt, s.max_new_tokens, s.temperature, **how)]
        return " ".join([start, *tokens]).split(f" {END}")[0]

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
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    wanted = {name: value for name, value in asdict(s).items() if name not in FREE}
    wanted["data_sha256"] = hashlib.sha256(text.encode()).hexdigest()
    path = Path(s.out or Path(__file__).parent / "outputs" / f"mini_gpt-{Path(s.data).stem}.pt")
    state = load_checkpoint(path, wanted) if path.exists() and not s.retrain else None
    if wanted["precision"] == "auto":
        wanted["precision"] = pick_precision(device)
    s = replace(s, precision=wanted["precision"])

    ids = torch.tensor([vocab[char] for char in text], device=device)
    model = MiniGPT(len(vocab), s).to(device)
    size = f"参数 {sum(p.numel() for p in model.parameters()):,} 个"
    print(f"{len(text):,} 个字，{len(vocab)} 种；{size}；{device.type}，{s.precision}")
    print(f"检查点 {path}" + (f"：从第 {state['step']} 步继续（--retrain 从头训练）" if state else ""))
    try:
        train(model, ids[:split], ids[split:], s, path, wanted, state)
    except KeyboardInterrupt:
        raise SystemExit(f"\n已中断。再运行同一条命令，就从 {path} 里最近的检查点继续。") from None
    print(f"\n生成（{'贪心' if s.greedy else f'温度 {s.temperature:g}'}）：\n{start}", end="")
    for token in generate(model, prompt.to(device), s.max_new_tokens, s.temperature, s.greedy, s.seed):
        print(chars[token], end="", flush=True)
    print()


def parse(argv=None):
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    for each in fields(Settings):
        kind = {"action": "store_true"} if each.type is bool else {"type": each.type}
        shown = f"（默认 {each.default}；玩具 {getattr(TOY, each.name)}）" if each.default else ""
        parser.add_argument(f"--{each.name}", default=None, help=each.metadata["help"] + shown, **kind)
    given = {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not None}
    s = replace(Settings() if "data" in given else TOY, **given)
    for name in ("layers", "heads", "dim", "block", "batch", "steps", "eval_every", "max_new_tokens"):
        if getattr(s, name) < 1:
            fail(f"--{name} 要是正整数，现在是 {getattr(s, name)}。")
    if s.dim % s.heads:
        fail(f"--dim {s.dim} 不能平分给 --heads {s.heads} 个头。")
    if not s.temperature > 0:
        fail(f"--temperature 要大于 0，现在是 {s.temperature:g}；要总取概率最大的，用 --greedy。")
    for name, known in {
        "attention": "manual sdpa",
        "optimizer": "muon adamw",
        "precision": "auto fp32 bf16",
    }.items():
        if getattr(s, name) not in known.split():
            fail(f"--{name} 只有 {'、'.join(known.split())}，没有 {getattr(s, name)}。")
    return s


def main(argv=None):
    s = parse(argv)
    torch.manual_seed(s.seed)
    run_toy(s) if s.data is None else run_file(s)


if __name__ == "__main__":
    main()
