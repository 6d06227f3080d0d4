"""最简单的句子分类：把句中每个词的向量取平均，再判断正面还是负面。

你会学到
  1. 句子有长有短，网络只收固定大小的输入：取平均，几个词都变成一个 8 维向量。
  2. 一批句子要补 <PAD> 到一样长，但 <PAD> 不能算进平均，否则同一句话补得越多结果越偏。
  3. 平均不管词序：喜欢狗讨厌猫、讨厌狗喜欢猫，对它是同一句话（怎么解决，看 rnn_text_classifier.py）。

怎么运行
  python simple_sentiment_classifier.py
  python simple_sentiment_classifier.py --seed 3 --text "we love cats"

应当看到（种子 0，种子 0–9 的范围见 README）
  loss 从 0.6967 降到 0.0001；"i love this" 判为正面，概率 0.99 以上。
"""

import argparse
import sys

import torch
from torch import nn

PAD = 0
LABELS = ["负面", "正面"]

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
        if not words:
            raise SystemExit('错误：句子是空的。请给至少一个词，例如 --text "i love this"')
        unknown = [word for word in words if word not in vocab]
        if unknown:
            known = " ".join(list(vocab)[1:])
            raise SystemExit(
                f"错误：{sentence!r} 里的 {' '.join(unknown)} 没有学过。--text 可以用的词：{known}"
            )
        rows.append([vocab[word] for word in words])
    longest = max(map(len, rows))
    return torch.tensor([row + [PAD] * (longest - len(row)) for row in rows])  # (B, T)


# ---------- 2. 模型：查表 → 平均 → 8→16 → ReLU → 16→2 ----------
def mean_pooling(vectors, mask):
    """只对真词取平均。vectors (B, T, C)，mask (B, T)：真词 True，<PAD> False。"""
    weights = mask.unsqueeze(-1).to(vectors.dtype)  # (B, T, 1)
    return (vectors * weights).sum(1) / weights.sum(1)  # (B, C)：除以真词的个数，不是 T


class MeanPoolingClassifier(nn.Module):
    def __init__(self, vocab_size, dim=8, hidden=16, num_classes=2):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, dim)
        self.hidden = nn.Linear(dim, hidden)
        self.output = nn.Linear(hidden, num_classes)

    def forward(self, ids):  # (B, T)
        vectors = self.embedding(ids)  # (B, T, 8)
        pooled = mean_pooling(vectors, ids != PAD)  # (B, 8)
        return self.output(torch.relu(self.hidden(pooled)))  # (B, 2)


# ---------- 3. 训练 ----------
def train(model, ids, labels, epochs=300, lr=0.01):
    loss_function = nn.CrossEntropyLoss()
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    model.train()
    for epoch in range(1, epochs + 1):
        loss = loss_function(model(ids), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if epoch == 1 or epoch % (epochs // 6) == 0:
            print(f"  epoch {epoch:3d}  loss {loss.item():.4f}")
    return loss.item()


# ---------- 4. 预测 ----------
def predict(model, ids):
    """每一类的概率 (B, 2)。eval() 关掉只在训练时用的部分，no_grad() 不记梯度。"""
    model.eval()
    with torch.no_grad():
        return torch.softmax(model(ids), dim=-1)


def show_predictions(model, sentences, vocab):
    for sentence in sentences:
        probs = predict(model, encode([sentence], vocab))[0]  # (2,)
        label = LABELS[probs.argmax()]
        print(f"  {sentence!r:26s} → {label}  （正面 {probs[1]:.4f}，负面 {probs[0]:.4f}）")


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
    parser = Parser(description="平均词向量做情感分类")
    parser.add_argument("--seed", type=seed_number, default=0, help="随机种子")
    parser.add_argument("--text", action="append", help="要判断的英文句子，可以写多次")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)  # 张量太小，多线程光是互相等待就比计算还久

    vocab = build_vocab(DATA)
    ids = encode([sentence for sentence, _ in DATA], vocab)  # (14, 5)
    labels = torch.tensor([label for _, label in DATA])  # (14,)
    sentences = TEST_SENTENCES if args.text is None else args.text
    encode(sentences, vocab)  # 句子有问题，训练前就说
    model = MeanPoolingClassifier(len(vocab))

    print(f"要看的事：只靠平均词向量，能不能分出正面和负面？（种子 {args.seed}）")
    print(f"训练数据 {len(DATA)} 句，词表 {len(vocab)} 个（0 号是 <PAD>），补齐后的形状 {tuple(ids.shape)}")
    print(f"  {DATA[0][0]!r} → {ids[0].tolist()}")
    print("\n训练 300 轮（瞎猜的 loss 是 ln 2 = 0.6931）")
    train(model, ids, labels)
    accuracy = (predict(model, ids).argmax(-1) == labels).float().mean()
    print(f"训练集正确率 {accuracy:.0%}")

    print("\n预测" + ("（三句都不在训练数据里）" if args.text is None else ""))
    show_predictions(model, sentences, vocab)

    print(f"\n补 <PAD> 不该改变结果：训练过的 {len(DATA)} 句再多补几个 <PAD>，判错几句？")
    for count in (0, 3, 30):
        padded = nn.functional.pad(ids, (0, count), value=PAD)  # (14, 5 + count)
        right = (predict(model, padded).argmax(-1) != labels).sum()
        with torch.no_grad():
            vectors = model.embedding(padded).mean(1)  # (14, 8)：常见的错误，<PAD> 也算了进去
            scores = model.output(torch.relu(model.hidden(vectors)))  # (14, 2)
        wrong = (scores.argmax(-1) != labels).sum()
        print(f"  补 {count:2d} 个：{right} 句   （若把 <PAD> 也平均进去：{wrong} 句）")

    print("\n平均看不见词序：同样的词换个顺序，输出一定相同")
    show_predictions(model, ["i love dogs i hate cats", "i hate dogs i love cats"], vocab)


if __name__ == "__main__":
    if hasattr(sys.stdout, "reconfigure"):  # IDLE 里没有
        sys.stdout.reconfigure(errors="replace")  # 终端写不出的字印成问号，不中途报错
    main()
