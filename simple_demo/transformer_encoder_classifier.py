"""用 PyTorch 自带的 nn.TransformerEncoderLayer 做同一件事，再逐步核对它里面算了什么。

你会学到
  1. transformer_sentiment_classification.py 里手写的一层，PyTorch 一行就有；层数、维度、头数随意改。
  2. 多头：16 维切成 2 份，每份 8 维各算各的注意力，再拼回 16 维。
  3. 它里面没有秘密：拿它的权重手算一遍，每一步都相等（打印成一张表）。
  4. dropout 让训练时的输出带随机，预测前一定要 model.eval()。

怎么运行
  python transformer_encoder_classifier.py
  python transformer_encoder_classifier.py --seed 3 --text "we love this food"

应当看到（种子 0，种子 0–9 的范围见 README）
  loss 50 轮从 0.7235 降到 0.0010，三句没见过的话全部判对；手写和 PyTorch 每一步的差都在 1e-6 以内。
"""

import argparse
import sys

import torch
from torch import nn

PAD = 0
MAX_LENGTH = 8
LABELS = ["负面", "正面"]

# ---------- 1. 数据：和手写版一样，用两种句式拼出来，i love cats 和 this movie is good；1 正面，0 负面 ----------
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


# ---------- 2. 模型 ----------
class TransformerEncoderClassifier(nn.Module):
    """词向量 + 位置向量 → nn.TransformerEncoderLayer × 2 → 第一个位置 → 2 类。"""

    def __init__(
        self, vocab_size, dim=16, heads=2, num_layers=2, num_classes=2, max_length=MAX_LENGTH, dropout=0.1
    ):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, dim)
        self.position = nn.Embedding(max_length, dim)
        nn.init.normal_(self.embedding.weight, std=0.1)  # 从小的数开始，理由见手写版
        nn.init.normal_(self.position.weight, std=0.1)
        # 不用 nn.TransformerEncoder：它把同一层复制几份，几层的初始权重一模一样。
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(dim, heads, dim_feedforward=4 * dim, dropout=dropout, batch_first=True)
            for _ in range(num_layers)
        )
        self.output = nn.Linear(dim, num_classes)

    def embed(self, ids):  # (B, T)
        words = self.embedding(ids)  # (B, T, C)
        places = self.position.weight[: ids.shape[1]]  # (T, C)：每句都加同样的
        return words + places

    def forward(self, ids):  # (B, T)
        x = self.embed(ids)  # (B, T, C)
        for layer in self.layers:
            # 注意方向：PyTorch 的 mask 里 True 是“不许看”，和手写版相反。
            x = layer(x, src_key_padding_mask=ids == PAD)  # (B, T, C)
        first = x[:, 0]  # (B, C)：第一个位置代表整句
        return self.output(first)  # (B, 2)


def layer_by_hand(layer, x, padding):
    """nn.TransformerEncoderLayer 做的全部事情。x (B, T, C)，padding (B, T)：<PAD> 是 True。返回每一步的结果。"""
    attention = layer.self_attn
    heads = attention.num_heads
    batch, length, dim = x.shape
    size = dim // heads  # 每个头分到几维
    # 三个 C→C 的线性层叠成一个 C→3C，算完再切开。
    qkv = nn.functional.linear(x, attention.in_proj_weight, attention.in_proj_bias)  # (B, T, 3C)
    q, k, v = qkv.chunk(3, dim=-1)  # 各 (B, T, C)
    # (B, T, C) → (B, nh, T, C/nh)：每个头只看自己那一份维度
    q = q.view(batch, length, heads, size).transpose(1, 2)
    k = k.view(batch, length, heads, size).transpose(1, 2)
    v = v.view(batch, length, heads, size).transpose(1, 2)

    scores = q @ k.transpose(2, 3) / size**0.5  # (B, nh, T, T)
    scores = scores.masked_fill(padding[:, None, None], float("-inf"))  # padding 变成 (B, 1, 1, T)
    weights = torch.softmax(scores, dim=-1)  # (B, nh, T, T)
    mixed = weights @ v  # (B, nh, T, C/nh)
    joined = mixed.transpose(1, 2).reshape(batch, length, dim)  # (B, T, C)：各头拼回来
    attended = attention.out_proj(joined)

    normed = layer.norm1(x + attended)
    feed_forward = layer.linear2(torch.relu(layer.linear1(normed)))
    return weights, attended, normed, layer.norm2(normed + feed_forward)


# ---------- 3. 训练 ----------
def train(model, ids, labels, epochs=50, lr=0.01):
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    model.train()  # 打开 dropout
    for epoch in range(1, epochs + 1):
        loss = nn.functional.cross_entropy(model(ids), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if epoch == 1 or epoch % 10 == 0:
            print(f"  epoch {epoch:2d}  loss {loss.item():.4f}")
    return loss.item()


# ---------- 4. 预测和核对 ----------
def predict(model, ids):
    """每一类的概率 (B, 2)。eval() 关掉 dropout，no_grad() 不记梯度。"""
    model.eval()
    with torch.no_grad():
        return torch.softmax(model(ids), dim=-1)


def print_comparison(model, ids):
    """逐步核对：我们手算一遍，PyTorch 的模块算一遍。只比真词，<PAD> 位置的输出没有人用。"""
    model.eval()
    padding = ids == PAD  # (B, T)
    print("  层  形状            最大相差   手写                      PyTorch")
    with torch.no_grad():
        x = model.embed(ids)  # (B, T, C)
        for number, layer in enumerate(model.layers, 1):
            weights, attended, normed, by_hand = layer_by_hand(layer, x, padding)
            built_in, built_in_weights = layer.self_attn(x, x, x, padding, average_attn_weights=False)
            rows = [
                (weights, built_in_weights, "softmax(QK'/sqrt(d))", "self_attn[1]"),
                (attended, built_in, "output(weights @ V)", "self_attn[0]"),
                (normed, layer.norm1(x + built_in), "LayerNorm(x + attention)", "norm1(x + self_attn)"),
            ]
            x = layer(x, src_key_padding_mask=padding)  # (B, T, C)
            rows.append((by_hand, x, "LayerNorm(x + FFN)", "TransformerEncoderLayer"))
            for ours, theirs, name, module in rows:
                gap = (ours - theirs).abs()
                if gap.dim() == 4:
                    gap = gap.transpose(1, 2)  # (B, nh, T, T) → (B, T, nh, T)，才好挑出真词
                shape = str(tuple(ours.shape))
                print(f"  {number}   {shape:15s} {gap[~padding].max():.1e}    {name:26s}{module}")


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
    parser = Parser(description="用 nn.TransformerEncoderLayer 做情感分类")
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
    model = TransformerEncoderClassifier(len(vocab))

    print(f"要看的事：PyTorch 自带的编码器层，和手写的是不是同一个东西？（种子 {args.seed}）")
    print(
        f"训练 {len(DATA)} 句，输入形状 {tuple(ids.shape)}，参数 {sum(p.numel() for p in model.parameters())} 个"
    )
    print("\n训练 50 轮（瞎猜的 loss 是 ln 2 = 0.6931）")
    train(model, ids, labels)
    accuracy = (predict(model, ids).argmax(-1) == labels).float().mean()
    print(f"训练集正确率 {accuracy:.0%}")

    print("\n预测" + ("" if args.text else "（三句都不在训练数据里）"))
    for sentence, (bad, good) in zip(sentences, predict(model, test_ids).tolist(), strict=True):
        print(f"  {sentence!r} → {LABELS[good > bad]}（正面的概率 {good:.4f}）")

    print("\n手写对照 PyTorch（2 个头，含 <PAD>）")
    print_comparison(model, test_ids)

    print(f"\n同一句 {sentences[0]!r} 连问三次，正面的得分")
    with torch.no_grad():
        for training, name in ((True, "train()：dropout 开着"), (False, "eval() ：dropout 关了")):
            model.train(training)
            scores = [model(test_ids)[0, 1].item() for _ in range(3)]
            print(f"  {name}   " + "  ".join(f"{score:.4f}" for score in scores))


if __name__ == "__main__":
    if hasattr(sys.stdout, "reconfigure"):  # IDLE 里没有
        sys.stdout.reconfigure(errors="replace")  # 终端写不出的字印成问号，不中途报错
    main()
