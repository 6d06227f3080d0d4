"""最小的词向量训练：让模型猜下一个词，看 cats 和 dogs 的向量怎样自己靠拢。

你会学到
  1. 词向量（embedding）就是一张表：第 i 行是第 i 个词的 8 个数字，开始时全是随机数。
  2. 没有人告诉模型 cats 和 dogs 相近；它们后面跟的词差不多，要猜得准，两行数字就只能变得差不多。
  3. loss 不会降到 0：i 后面可以是 love 也可以是 drive，谁也猜不准，这个下限可以直接算出来。

怎么运行
  python minimal_word_embedding_train.py
  python minimal_word_embedding_train.py --seed 3 --words cats cars

应当看到（种子 0，种子 0–9 的范围见 README）
  loss 从 3.0055 降到 0.5323，语料自己的下限是 0.5319；cats–dogs 的余弦相似度从 -0.57 升到 0.99，
  不相关的词里最高的一对只有 0.29；图存在 outputs/word_embedding.png。
"""

import argparse
import math
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import torch
from torch import nn

OUTPUT_DIR = Path(__file__).resolve().parent / "outputs"

# ---------- 1. 数据：cats 和 dogs 出现在一样的位置，cars 出现在别的位置 ----------
SENTENCES = [
    "i love cats",
    "i love dogs",
    "we like cats",
    "we like dogs",
    "cats are cute",
    "dogs are cute",
    "cats sleep all day",
    "dogs sleep all day",
    "cats eat fish",
    "dogs eat meat",
    "i drive cars",
    "we drive cars",
    "cars need fuel",
    "cars have wheels",
]


def build_vocab(sentences):
    """每个不同的词一个编号，按出现的先后。"""
    words = [word for sentence in sentences for word in sentence.split()]
    return {word: index for index, word in enumerate(dict.fromkeys(words))}


def build_pairs(sentences, vocab):
    """ "i love cats" 变成两道题：i → love，love → cats。"""
    pairs = []
    for sentence in sentences:
        ids = [vocab[word] for word in sentence.split()]
        pairs += pairwise(ids)
    return torch.tensor(pairs)  # (N, 2)：第 0 列是输入，第 1 列是答案


def loss_floor(pairs):
    """最好的成绩：按语料里的真实比例去猜，平均还剩多少 loss（条件熵）。"""
    pair_count = Counter((word, answer) for word, answer in pairs.tolist())
    word_count = Counter(pairs[:, 0].tolist())
    total = 0.0
    for (word, _), count in pair_count.items():
        share = count / word_count[word]  # 这个词后面，有几成是这个答案
        total += count * -math.log(share)  # 猜得最好，这道题的 loss 也有 -log(share)；它出现 count 次
    return total / len(pairs)


# ---------- 2. 模型：查表 → 线性层 ----------
class WordEmbeddingModel(nn.Module):
    def __init__(self, vocab_size, dim=8):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, dim)  # 我们要的就是这张表 (V, dim)
        # PyTorch 默认的随机数标准差是 1，训练添上去的那一点盖不过它；从小的数开始，学到的才看得清。
        nn.init.normal_(self.embedding.weight, std=0.1)
        self.output = nn.Linear(dim, vocab_size)  # 给每个词打分：它是下一个词吗？

    def forward(self, ids):  # (N,)
        vectors = self.embedding(ids)  # (N, dim)
        return self.output(vectors)  # (N, V)


# ---------- 3. 训练 ----------
def train(model, pairs, epochs=1000, lr=0.01):
    loss_function = nn.CrossEntropyLoss()
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    model.train()
    for epoch in range(1, epochs + 1):
        loss = loss_function(model(pairs[:, 0]), pairs[:, 1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if epoch == 1 or epoch % (epochs // 5) == 0:
            print(f"  epoch {epoch:4d}  loss {loss.item():.4f}")
    return loss.item()


# ---------- 4. 看结果 ----------
def cosine(vectors, a, b):
    """两个向量夹角的余弦：1 方向相同，0 互相垂直，-1 方向相反。"""
    return torch.cosine_similarity(vectors[a], vectors[b], dim=0).item()


def unrelated_pairs(pairs):
    """不相关的一对：两个词都有下一个词，而且没有一个下一个词是共同的。"""
    following = {}  # 词 → 跟在它后面的那些词
    for word, answer in pairs.tolist():
        following.setdefault(word, set()).add(answer)
    found = []
    for a in following:
        for b in following:
            if a < b and not following[a] & following[b]:  # a < b：一对只算一次
                found.append((a, b))
    return found


def draw(before, after, words, path):
    """8 维画不出来：用主成分（SVD）取变化最大的两个方向，画成平面图。words 是 {词: 行号}。"""
    from matplotlib.figure import Figure  # 画图时才导入，不拖慢启动；不用 pyplot，也就不需要屏幕

    figure = Figure(figsize=(11, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, vectors, title in ((left, before, "before training"), (right, after, "after training")):
        rows = vectors[list(words.values())]  # (W, dim)
        centered = rows - rows.mean(0)
        directions = torch.linalg.svd(centered, full_matrices=False).Vh  # (dim, dim)：变化大的方向在前
        points = centered @ directions[:2].T  # (W, 2)
        for word, (x, y) in zip(words, points.tolist(), strict=True):
            color = {"cats": "tab:red", "dogs": "tab:red", "cars": "tab:blue"}.get(word, "dimgray")
            offset = (4, -12) if word in ("dogs", "like") else (4, 5)  # 靠得太近的词，标签上下错开
            axes.scatter(x, y, color=color)
            axes.annotate(word, (x, y), xytext=offset, textcoords="offset points", color=color)
        axes.set_title(title)
        axes.margins(0.15)
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
    parser = Parser(description="训练最小的词向量")
    parser.add_argument("--seed", type=seed_number, default=0, help="随机种子")
    parser.add_argument(
        "--words", nargs=2, default=["cats", "dogs"], metavar=("词1", "词2"), help="比较哪两个词"
    )
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)  # 张量太小，多线程光是互相等待就比计算还久

    vocab = build_vocab(SENTENCES)
    for word in args.words:
        if word not in vocab:
            raise SystemExit(f"错误：--words 里的 {word!r} 不在词表里。可以用的词：{' '.join(vocab)}")
    pairs = build_pairs(SENTENCES, vocab)  # (N, 2)
    unrelated = unrelated_pairs(pairs)
    model = WordEmbeddingModel(len(vocab))
    before = model.embedding.weight.detach().clone()  # (V, 8)

    print(
        f"要看的事：猜下一个词，会让 {args.words[0]} 和 {args.words[1]} 的向量变成什么样？（种子 {args.seed}）"
    )
    print(f"语料 {len(SENTENCES)} 句，词表 {len(vocab)} 个词，训练题 {len(pairs)} 道，例如 i → love")
    print(f"\n训练 1000 轮（这份语料的 loss 下限是 {loss_floor(pairs):.4f}）")
    train(model, pairs)
    after = model.embedding.weight.detach()  # (V, 8)

    print("\n词表和训练后的向量（8 维）")
    inputs = set(pairs[:, 0].tolist())
    for word, index in vocab.items():
        note = "" if index in inputs else "  <- 只出现在句尾，没当过输入，还是随机数"
        print(f"  {index:2d} {word:7s}" + " ".join(f"{x:5.2f}" for x in after[index].tolist()) + note)

    print("\n余弦相似度          训练前   训练后")
    first, second = args.words
    others = [word for word in ("cars", "love", "i") if word not in args.words]
    for other in [second, *others]:
        old = cosine(before, vocab[first], vocab[other])
        new = cosine(after, vocab[first], vocab[other])
        print(f"  {first + ' - ' + other:16s} {old:7.2f}  {new:7.2f}")
    top, a, b = max((cosine(after, a, b), a, b) for a, b in unrelated)
    names = list(vocab)  # 编号 → 词
    print(f"  不相关的词一共 {len(unrelated)} 对，训练后最高的是 {names[a]} - {names[b]}：{top:.2f}")

    with torch.no_grad():
        probs = torch.softmax(model(torch.tensor([vocab["cats"], vocab["dogs"]])), dim=-1)  # (2, V)
    print("\n下一个词的概率（和语料里的比例一样）")
    for word, row in zip(("cats", "dogs"), probs, strict=True):
        best = row.topk(4)
        guesses = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        print(f"  {word} → " + "，".join(f"{names[i]} {p:.2f}" for i, p in guesses if p > 0.01))

    try:
        trained = {word: index for word, index in vocab.items() if index in inputs}
        draw(before, after, trained, OUTPUT_DIR / "word_embedding.png")
        print(f"\n图：{OUTPUT_DIR / 'word_embedding.png'}")
    except (ImportError, OSError) as error:
        print(f"\n没有画成图：{error}。没装 matplotlib 的话：pip install matplotlib")


if __name__ == "__main__":
    if hasattr(sys.stdout, "reconfigure"):  # IDLE 里没有
        sys.stdout.reconfigure(errors="replace")  # 终端写不出的字印成问号，不中途报错
    main()
