"""手写一个 Transformer 编码器：每个词看一遍所有的词，自己决定看谁多一点。

你会学到
  1. 自注意力 = softmax(QKᵀ/√d)V：每个词拿自己的 Q 去比所有词的 K，比得越像，分到的 V 越多。
  2. 编码器一层的次序：LayerNorm(x + 自注意力(x))，再 LayerNorm(x + 前馈网络(x))。
  3. 注意力本身不知道次序，所以给每个位置也学一个向量，加到词向量上。
  4. <PAD> 的分数在 softmax 之前换成负无穷，它的权重就正好是 0。

怎么运行
  python transformer_sentiment_classification.py
  python transformer_sentiment_classification.py --seed 3 --text "we love this food"

应当看到（种子 0，种子 0–9 的范围见 README）
  loss 50 轮从 0.XXXX 降到 0.XXXX；第一个词（分类用它）把注意力从平均分变成集中在 love、hate 这样的词上；
  热力图打印在终端，也存在 outputs/attention.png。
"""

import argparse
import math
from pathlib import Path

import torch
from torch import nn

PAD = 0
MAX_LENGTH = 8
LABELS = ["负面", "正面"]
OUTPUT_DIR = Path(__file__).resolve().parent / "outputs"

# ---------- 1. 数据：1 正面，0 负面 ----------
DATA = [
    ("i love cats", 1),
    ("i hate cats", 0),
    ("we love this movie", 1),
    ("we hate this movie", 0),
    ("i like dogs", 1),
    ("i dislike dogs", 0),
    ("we like cats", 1),
    ("we dislike cats", 0),
    ("this movie is great", 1),
    ("this movie is boring", 0),
    ("this food is good", 1),
    ("this food is bad", 0),
    ("i am very happy today", 1),
    ("i am very sad today", 0),
]
# 三句都没有在训练数据里出现过，只是每个词都见过。
TEST_SENTENCES = ["i love this", "we dislike this food", "this food is great"]


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
    """一批句子 → 编号，短的在右边补 <PAD>。"""
    rows = []
    for sentence in sentences:
        words = sentence.lower().split()
        if not 1 <= len(words) <= MAX_LENGTH:
            raise SystemExit(f"错误：{sentence!r} 有 {len(words)} 个词；--text 要 1 到 {MAX_LENGTH} 个词。")
        unknown = [word for word in words if word not in vocab]
        if unknown:
            known = " ".join(list(vocab)[1:])
            raise SystemExit(f"错误：{sentence!r} 里的 {' '.join(unknown)} 没有学过。--text 可以用的词：{known}")
        rows.append([vocab[word] for word in words])
    longest = max(map(len, rows))
    return torch.tensor([row + [PAD] * (longest - len(row)) for row in rows])  # (B, T)


# ---------- 2. 模型 ----------
class SelfAttention(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.query, self.key, self.value = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.output = nn.Linear(dim, dim)  # 多头时把各头混在一起；一个头也留着，好和 PyTorch 的一一对应

    def forward(self, x, mask):  # x (B, T, C)，mask (B, T)：真词 True
        q, k, v = self.query(x), self.key(x), self.value(x)  # 各 (B, T, C)
        # 除以 √C：C 个乘积相加，不除的话分数太大，softmax 一开始就只认一个词。
        scores = q @ k.transpose(1, 2) / math.sqrt(x.shape[-1])  # (B, T, T)：第 i 行是词 i 给每个词的分
        scores = scores.masked_fill(~mask.unsqueeze(1), float("-inf"))  # exp(-inf) = 0，谁也看不到 <PAD>
        weights = torch.softmax(scores, dim=-1)  # (B, T, T)：每一行加起来是 1
        return self.output(weights @ v), weights  # (B, T, C)，(B, T, T)


class LayerNorm(nn.Module):
    """每个位置的 C 个数：减平均，除以标准差，再乘一个、加一个学来的数。"""

    def __init__(self, dim):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))

    def forward(self, x):  # (B, T, C)
        mean = x.mean(-1, keepdim=True)  # (B, T, 1)
        variance = x.var(-1, keepdim=True, unbiased=False)  # 除以 C，不是 C - 1
        return (x - mean) / torch.sqrt(variance + 1e-5) * self.weight + self.bias


class EncoderLayer(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.attention = SelfAttention(dim)
        self.norm1 = LayerNorm(dim)
        self.feed_forward = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, dim))
        self.norm2 = LayerNorm(dim)

    def forward(self, x, mask):  # (B, T, C)，(B, T)
        attended, weights = self.attention(x, mask)
        x = self.norm1(x + attended)  # 先相加再归一：原来的信息一直留着一条直路
        x = self.norm2(x + self.feed_forward(x))
        return x, weights


class TransformerClassifier(nn.Module):
    """词向量 + 位置向量 → 编码器一层 → 第一个位置 → 2 类。"""

    def __init__(self, vocab_size, dim=8, hidden=16, num_classes=2, max_length=MAX_LENGTH):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, dim)
        self.position = nn.Embedding(max_length, dim)
        self.layer = EncoderLayer(dim, hidden)
        self.output = nn.Linear(dim, num_classes)

    def encode(self, ids):  # (B, T)
        positions = torch.arange(ids.shape[1], device=ids.device)  # (T,)
        x = self.embedding(ids) + self.position(positions)  # (B, T, C)
        return self.layer(x, ids != PAD)  # (B, T, C)，(B, T, T)

    def forward(self, ids):
        states, _ = self.encode(ids)
        return self.output(states[:, 0])  # (B, 2)：第一个位置看过了整句，用它代表整句


# ---------- 3. 训练 ----------
def train(model, ids, labels, epochs=50, lr=0.02):
    loss_function = nn.CrossEntropyLoss()
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    model.train()
    for epoch in range(1, epochs + 1):
        loss = loss_function(model(ids), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if epoch == 1 or epoch % (epochs // 5) == 0:
            print(f"  epoch {epoch:2d}  loss {loss.item():.4f}")
    return loss.item()


# ---------- 4. 预测和热力图 ----------
def predict(model, ids):
    """每一类的概率 (B, 2) 和注意力 (B, T, T)。eval() 关掉只在训练时用的部分，no_grad() 不记梯度。"""
    model.eval()
    with torch.no_grad():
        return torch.softmax(model(ids), dim=-1), model.encode(ids)[1]

