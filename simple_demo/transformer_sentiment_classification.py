"""手写一个 Transformer 编码器：每个词看一遍所有的词，自己决定看谁多一点。

你会学到
  1. 自注意力 = softmax(QKᵀ/√d)V：每个词拿自己的 Q 去比所有词的 K，比得越像，分到的 V 越多。
  2. 编码器一层的次序：LayerNorm(x + 自注意力(x))，再 LayerNorm(x + 前馈网络(x))。
  3. 注意力不知道次序，所以每个位置也学一个向量；<PAD> 的分数换成负无穷，softmax 之后正好是 0。

怎么运行
  python transformer_sentiment_classification.py [--seed 3] [--text "we love this food"]

应当看到（种子 0，种子 0–9 的范围见 README）
  loss 从 0.7058 降到 0.00005；第一个词（分类用它）放在 love、hate 这类词上的注意力从 0.29 升到 0.99；
  热力图打印在终端，也存在 outputs/attention.png。
"""

import argparse
import math
import sys
from pathlib import Path

import torch
from torch import nn

PAD = 0
MAX_LENGTH = 8  # 位置向量只有 8 个，句子也就不能再长
LABELS = ["负面", "正面"]
OUTPUT_DIR = Path(__file__).resolve().parent / "outputs"

# ---------- 1. 数据：用两种句式拼出来，i love cats 和 this movie is good；1 正面，0 负面 ----------
TEST_SENTENCES = ["i love this", "we dislike this food", "they hate dogs"]  # 不参加训练
WHO = ["i", "we", "they"]
VERBS = {"love": 1, "like": 1, "hate": 0, "dislike": 0}
WHAT = ["cats", "dogs", "this movie", "this food"]
ADJECTIVES = {"good": 1, "great": 1, "bad": 0, "boring": 0}

DATA = [(f"{who} {verb} {what}", VERBS[verb]) for what in WHAT for verb in VERBS for who in WHO]
DATA += [(f"{what} is {word}", ADJECTIVES[word]) for what in WHAT[2:] for word in ADJECTIVES]
DATA = [row for row in DATA if row[0] not in TEST_SENTENCES]


def build_vocab(data):
    """词 → 编号；0 号留给 <PAD>。顺便检查标签。"""
    vocab = {"<PAD>": PAD}
    for sentence, label in data:
        if label not in range(len(LABELS)):
            raise SystemExit(f"错误：DATA 里 {sentence!r} 的标签是 {label!r}，只能是 0（负面）或 1（正面）。")
        for word in sentence.split():
            vocab.setdefault(word, len(vocab))
    return vocab


def encode(sentences, vocab):
    """一批句子 → 编号 (B, T)，短的在右边补 <PAD>。"""
    known = " ".join(list(vocab)[1:])
    rows = []
    for sentence in sentences:
        words = sentence.lower().split()
        if not 1 <= len(words) <= MAX_LENGTH:
            raise SystemExit(f"错误：--text 要 1 到 {MAX_LENGTH} 个词，现在有 {len(words)} 个：{words}")
        for word in words:
            if word not in vocab:
                raise SystemExit(f"错误：--text 里的 {word!r} 没有学过。可以用的词：{known}")
        rows.append(torch.tensor([vocab[word] for word in words]))
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)


# ---------- 2. 模型：B 是几句话，T 是每句几个词，C 是一个词几个数（8） ----------
class SelfAttention(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.query = nn.Linear(dim, dim)  # Q：我在找什么样的词
        self.key = nn.Linear(dim, dim)  # K：我是什么样的词，拿给别人比
        self.value = nn.Linear(dim, dim)  # V：看中了我，就拿走这些
        self.output = nn.Linear(dim, dim)  # 多头时把各头混在一起；一个头也留着，好和 PyTorch 的一一对应

    def forward(self, x, mask):  # x (B, T, C)，mask (B, T)：真词 True，<PAD> False
        q = self.query(x)  # (B, T, C)
        k = self.key(x)  # (B, T, C)
        v = self.value(x)  # (B, T, C)

        # 第 i 行是词 i 给每个词的分。除以 √C：C 个乘积相加，不除的话分数太大，softmax 一开始就只认一个词。
        scores = q @ k.transpose(1, 2) / math.sqrt(x.shape[-1])  # (B, T, T)
        # 负无穷过了 softmax 正好是 0，谁也看不到 <PAD>。mask 变成 (B, 1, T)，每一行都盖同样几格。
        scores = scores.masked_fill(~mask.unsqueeze(1), float("-inf"))
        weights = torch.softmax(scores, dim=-1)  # (B, T, T)：每一行加起来是 1

        mixed = weights @ v  # (B, T, C)：每个词按自己那一行的比例，把各词的 V 加在一起
        return self.output(mixed), weights


class LayerNorm(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x):  # (B, T, C)：每个位置的 C 个数自己归一，和别的词、别的句子无关
        mean = x.mean(-1, keepdim=True)  # (B, T, 1)
        variance = x.var(-1, keepdim=True, unbiased=False)  # (B, T, 1)：除以 C，不是 C-1
        normalized = (x - mean) / torch.sqrt(variance + 1e-5)  # 1e-5：C 个数全相等时，也不会除以 0
        return normalized * self.weight + self.bias


class EncoderLayer(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.attention = SelfAttention(dim)
        self.norm1 = LayerNorm(dim)
        self.feed_forward = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, dim))
        self.norm2 = LayerNorm(dim)

    def forward(self, x, mask):  # x (B, T, C)，mask (B, T)
        attended, weights = self.attention(x, mask)  # (B, T, C)，(B, T, T)：从别的词那里取
        x = self.norm1(x + attended)  # 残差：先把原来的 x 加回来，再归一
        x = self.norm2(x + self.feed_forward(x))  # 前馈：每个词自己再想一想，不看别人
        return x, weights


class TransformerClassifier(nn.Module):
    """词向量 + 位置向量 → 编码器一层 → 第一个位置 → 2 类。"""

    def __init__(self, vocab_size, dim=8, hidden=16, num_classes=2, max_length=MAX_LENGTH):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, dim)
        self.position = nn.Embedding(max_length, dim)
        nn.init.normal_(self.embedding.weight, std=0.1)  # 从小的数开始：注意力接近平均分，之后全是学来的
        nn.init.normal_(self.position.weight, std=0.1)
        self.layer = EncoderLayer(dim, hidden)
        self.output = nn.Linear(dim, num_classes)

    def encode(self, ids):  # (B, T)
        words = self.embedding(ids)  # (B, T, C)
        places = self.position.weight[: ids.shape[1]]  # (T, C)：每句都加同样的
        return self.layer(words + places, ids != PAD)  # (B, T, C)，(B, T, T)

    def forward(self, ids):  # (B, T)
        encoded, _ = self.encode(ids)  # (B, T, C)
        first = encoded[:, 0]  # (B, C)：第一个位置看过了整句，用它代表整句
        return self.output(first)  # (B, 2)


# ---------- 3. 训练 ----------
def train(model, ids, labels, epochs=50, lr=0.04):
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    model.train()
    for epoch in range(1, epochs + 1):
        loss = nn.functional.cross_entropy(model(ids), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if epoch == 1 or epoch % 10 == 0:
            print(f"  epoch {epoch:2d}  loss {loss.item():.5f}")
    return loss.item()


# ---------- 4. 预测和热力图 ----------
def predict(model, ids):
    """每一类的概率 (B, 2) 和注意力 (B, T, T)。eval() 关掉只在训练时用的部分，no_grad() 不记梯度。"""
    model.eval()
    with torch.no_grad():
        probs = torch.softmax(model(ids), dim=-1)
        _, weights = model.encode(ids)
    return probs, weights


def feeling_share(model, ids, vocab):
    """第一个词的注意力里，有多少落在表达好恶的词上（各句平均）。"""
    feeling_ids = torch.tensor([vocab[word] for word in VERBS | ADJECTIVES])
    is_feeling = torch.isin(ids, feeling_ids)  # (B, T)
    _, weights = predict(model, ids)  # (B, T, T)
    return (weights[:, 0] * is_feeling).sum(1).mean().item()  # weights[:, 0]：第一个词怎样分配


def print_heat_map(words, weights):
    """终端里的热力图：每一行是一个词怎样分配它的注意力。weights (T, T)。"""
    print(" " * 13 + "".join(f"{word:9s}" for word in words))
    for word, row in zip(words, weights.tolist(), strict=True):
        if word == "<PAD>":  # 这几行没有人用
            continue
        print(f"    {word:9s}" + "".join(f"{p:.2f} {' ▁▂▃▄▅▆▇█'[round(p * 8)]}   " for p in row))


def draw_heat_map(words, before, after, path):
    """训练前后两张热力图画成一张 PNG，不画 <PAD>。before、after (T, T)。"""
    from matplotlib.figure import Figure  # 画图时才导入，不拖慢启动；不用 pyplot，也就不需要屏幕

    size = len(words)
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, weights, title in ((left, before, "before training"), (right, after, "after training")):
        grid = weights[:size, :size].tolist()
        axes.imshow(grid, cmap="Blues", vmin=0, vmax=1)
        axes.set(xticks=range(size), xticklabels=words, yticks=range(size), yticklabels=words)
        axes.set(title=title, xlabel="looks at (key)", ylabel="word (query)")
        for i in range(size):
            for j in range(size):
                color = "white" if grid[i][j] > 0.5 else "black"  # 底色深了，字就用白的
                axes.text(j, i, f"{grid[i][j]:.2f}", ha="center", va="center", color=color)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)


# ---------- 5. 从头到尾 ----------
class Parser(argparse.ArgumentParser):
    def error(self, message):  # argparse 自己报错是几行英文，换成一句中文
        raise SystemExit(f"错误：参数不对（{message}）。加 --help 看全部参数。")


def seed_number(text):
    """--seed 后面的字 → 整数。"""
    if not (text.isdecimal() and len(text) < 19):  # 再长 PyTorch 就装不下了
        raise SystemExit(f"错误：--seed 要一个 0 以上的整数，现在是 {text!r}。")
    return int(text)


def main():
    parser = Parser(description="手写 Transformer 编码器做情感分类")
    parser.add_argument("--seed", type=seed_number, default=0, help="随机种子")
    parser.add_argument("--text", action="append", help="要判断的英文句子，可以写多次")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)  # 张量太小，多线程光是互相等待就比计算还久

    vocab = build_vocab(DATA)
    ids = encode([sentence for sentence, _ in DATA], vocab)  # (54, 4)
    labels = torch.tensor([label for _, label in DATA])  # (54,)
    sentences = args.text or TEST_SENTENCES
    test_ids = encode(sentences, vocab)  # (3, 4)
    model = TransformerClassifier(len(vocab))
    print(f"要看的事：没有人告诉它哪个词重要，训练后第一个词会去看谁？（种子 {args.seed}）")
    print(f"训练 {len(DATA)} 句，例如 {DATA[0][0]!r}；词表 {len(vocab)} 个，输入形状 {tuple(ids.shape)}\n")

    share_before = feeling_share(model, ids, vocab)
    _, maps_before = predict(model, test_ids)  # (3, 4, 4)
    print("训练 50 轮（瞎猜的 loss 是 ln 2 = 0.6931）")
    train(model, ids, labels)
    probs, _ = predict(model, ids)  # (54, 2)
    print(f"训练集正确率 {(probs.argmax(-1) == labels).float().mean():.0%}")

    words = list(vocab)  # 编号 → 词
    print("\n每行一个词，看它把 1 分给了谁" + ("" if args.text else "（三句都不在训练数据里）"))
    probs, maps = predict(model, test_ids)  # (3, 2)，(3, 4, 4)
    for i, sentence in enumerate(sentences):
        print(f"  {sentence!r} → {LABELS[probs[i].argmax()]}（正面的概率 {probs[i, 1]:.4f}）")
        print_heat_map([words[index] for index in test_ids[i]], maps[i])
    print(f"第一个词看好恶词（训练集平均）：{share_before:.2f} → {feeling_share(model, ids, vocab):.2f}")

    try:
        draw_heat_map(sentences[0].split(), maps_before[0], maps[0], OUTPUT_DIR / "attention.png")
        print(f"图：{OUTPUT_DIR / 'attention.png'}")
    except (ImportError, OSError) as error:
        print(f"没有画成图：{error}。没装 matplotlib 的话：pip install matplotlib")


if __name__ == "__main__":
    if hasattr(sys.stdout, "reconfigure"):  # IDLE 里没有
        sys.stdout.reconfigure(errors="replace")  # 终端写不出的字印成问号，不中途报错
    main()
