"""MiniGPT 的证明：和 GPT-2 相等、看不见后面、缓存不改变结果、loss 是手算的那个、接着训练等于没中断。"""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import mini_gpt as mg
import muon

SMALL = mg.Config(layers=3, heads=2, dim=32, block=16, batch=4, steps=12, warmup=3)
FAST = replace(SMALL, bias=False, gain=False, activation="relu", optimizer="muon")  # --recipe fast 的结构
BOTH = pytest.mark.parametrize("config", [SMALL, FAST], ids=["gpt2", "fast"])
VOCAB = 37


def make(settings=SMALL, seed=0, vocab=VOCAB):
    """参数全部随机（LayerNorm 和偏置也是），不然有些层对不对都看不出来。"""
    torch.manual_seed(seed)
    model = mg.MiniGPT(vocab, settings)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def take(stream):
    return list(stream)


# ---------- 和 GPT-2 相等 ----------
@pytest.fixture(scope="module")
def gpt2_pair():
    """同一套随机权重：transformers 的 GPT2LMHeadModel 与 MiniGPT，后者用默认的结构。"""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(1)
    config = GPT2Config(vocab_size=VOCAB, n_positions=16, n_embd=32, n_layer=3, n_head=2, eos_token_id=None)
    config.bos_token_id = None
    reference = GPT2LMHeadModel(config).eval()
    for parameter in reference.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    ours = mg.MiniGPT(VOCAB, SMALL).eval()
    state = {name.removeprefix("transformer."): value for name, value in reference.state_dict().items()}
    for name in state:
        if re.search(r"(c_attn|c_proj|c_fc)\.weight", name):  # Conv1D 存的是 nn.Linear 的转置
            state[name] = state[name].T
    assert state.keys() == ours.state_dict().keys()  # 一一对应，不多不少
    ours.load_state_dict(state)
    return reference, ours


@pytest.mark.parametrize("attention", ["manual", "sdpa"])
def test_same_logits_as_gpt2(gpt2_pair, attention):
    reference, ours = gpt2_pair
    for block in ours.h:
        block.attn.attention = attention
    ids = torch.randint(VOCAB, (3, 16), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected, got = reference(ids).logits, ours(ids)
    assert expected.std() > 0.3  # 不是一片差不多的数
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_same_greedy_text_as_gpt2(gpt2_pair):
    reference, ours = gpt2_pair
    ids = torch.tensor([[5, 3, 8]])
    expected = reference.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=13, do_sample=False, pad_token_id=0
    )
    assert take(mg.generate(ours, ids, 13, greedy=True)) == expected[0, 3:].tolist()


def test_default_is_the_architecture_of_gpt2_and_fast_leaves_things_out(monkeypatch):
    """命令行的默认与 --recipe：结构、优化器；单独敲的参数比一整套的优先。"""
    seen = []
    monkeypatch.setattr(mg, "run_file", seen.append)
    monkeypatch.setattr(mg, "run_toy", seen.append)
    mg.main(["--data", "x"])
    mg.main(["--data", "x", "--recipe", "fast"])
    mg.main(["--data", "x", "--recipe", "fast", "--optimizer", "adamw", "--gain", "--batch", "7"])
    mg.main(["--recipe", "fast"])
    mg.main(["--no-bias", "--activation", "gelu"])
    gpt2, fast, mixed, toy_fast, toy = seen
    assert (gpt2.bias, gpt2.gain, gpt2.activation, gpt2.optimizer) == (True, True, "gelu_tanh", "adamw")
    assert (fast.bias, fast.gain, fast.activation, fast.optimizer) == (False, False, "relu", "muon")
    assert (mixed.bias, mixed.gain, mixed.activation, mixed.optimizer) == (False, True, "relu", "adamw")
    assert mixed.batch == 7 and mixed.lr == fast.lr
    assert (toy_fast.bias, toy_fast.optimizer, toy_fast.layers, toy_fast.lr) == (False, "muon", 2, 3e-3)
    assert (toy.bias, toy.gain, toy.activation, toy.steps) == (False, True, "gelu", 100)
    names = [name for name, _ in mg.MiniGPT(VOCAB, gpt2).named_parameters()]
    kept = [name for name in names if not name.endswith("bias") and "ln_" not in name]
    assert kept == [name for name, _ in mg.MiniGPT(VOCAB, fast).named_parameters()] and len(kept) < len(names)


@pytest.mark.parametrize("activation", ["gelu_tanh", "gelu", "relu"])
def test_activation_by_hand(activation):
    block = mg.MiniGPT(VOCAB, replace(SMALL, activation=activation)).h[0]
    x = torch.randn(2, 3, 32, dtype=torch.float64)
    block.double()
    h = block.mlp.c_fc(x)
    by_hand = {
        "gelu_tanh": 0.5 * h * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (h + 0.044715 * h**3))),
        "gelu": 0.5 * h * (1 + torch.erf(h / 2**0.5)),
        "relu": h * (h > 0),
    }
    torch.testing.assert_close(block.mlp(x), block.mlp.c_proj(by_hand[activation]), atol=1e-12, rtol=1e-9)


# ---------- 因果、缓存、loss ----------
@BOTH
@pytest.mark.parametrize("attention", ["manual", "sdpa"])
def test_a_later_token_changes_no_earlier_logit(attention, config):
    model = make(replace(config, attention=attention))
    ids = torch.randint(VOCAB, (2, 16))
    with torch.no_grad():
        before = model(ids)
        for t in (1, 7, 15):
            changed = ids.clone()
            changed[:, t] = (changed[:, t] + 1) % VOCAB
            after = model(changed)
            assert torch.equal(after[:, :t], before[:, :t])
            assert (after[:, t:] - before[:, t:]).abs().amax((0, 2)).min() > 1e-4  # 自己和后面的都变了


@pytest.mark.parametrize("attention", ["manual", "sdpa"])
@pytest.mark.parametrize("count", [10, 30], ids=["inside the context", "past the context"])
def test_cached_generation_equals_uncached(attention, count):
    # 偏置和增益也随机，又挑了种子：贪心写出来的才不总是一两个词
    model = make(replace(SMALL, attention=attention), seed=57)
    ids = torch.tensor([[1, 2, 3]])
    for how in ({"greedy": True}, {"temperature": 1.3, "seed": 4}):
        cached = take(mg.generate(model, ids, count, **how))
        assert cached == take(mg.generate(model, ids, count, use_cache=False, **how))
        assert len(cached) == count and len(set(cached)) > 3


def test_cache_feeds_one_token_at_a_time():
    """缓存真的省了计算：第一步之后每次只喂一个 token，写满上下文之后才整段重算。"""
    model, lengths = make(), []
    model.register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))
    take(mg.generate(model, torch.tensor([[1, 2, 3]]), 16, greedy=True))
    assert lengths == [3] + [1] * 13 + [16, 16]


def test_cache_holds_what_each_position_computed():
    """一次喂完和一个一个地喂，缓存里是同样的 K、V，最后一个位置的 logits 也相同。"""
    model = make()
    ids = torch.randint(VOCAB, (1, 9))
    whole, single = ([mg.KVCache(SMALL, ids.device) for _ in model.h] for _ in range(2))
    assert whole[0].k.shape == (1, 2, 0, 16)
    with torch.no_grad():
        expected = model(ids, whole)
        torch.testing.assert_close(expected, model(ids), atol=1e-6, rtol=1e-5)
        for t in range(9):
            logits = model(ids[:, t : t + 1], single)
            torch.testing.assert_close(logits[:, 0], expected[:, t], atol=1e-5, rtol=1e-5)
    for a, b in zip(whole, single, strict=True):
        assert a.k.shape == a.v.shape == (1, 2, 9, 16)
        torch.testing.assert_close(a.k, b.k, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(a.v, b.v, atol=1e-5, rtol=1e-5)


def test_loss_is_cross_entropy_by_hand():
    logits, targets = torch.randn(2, 3, 5), torch.randint(5, (2, 3))
    total = 0.0
    for b in range(2):
        for t in range(3):
            exps = [torch.exp(x).item() for x in logits[b, t]]
            total -= torch.log(torch.tensor(exps[targets[b, t]] / sum(exps))).item()
    assert mg.next_token_loss(logits, targets).item() == pytest.approx(total / 6, abs=1e-5)


def test_evaluate_covers_the_whole_split_once():
    model, data = make(), torch.randint(VOCAB, (16 * 70 + 5,))
    rows = [(data[i : i + 16], data[i + 1 : i + 17]) for i in range(0, 16 * 70, 16)]
    with torch.no_grad():
        expected = sum(mg.next_token_loss(model(x[None]), y[None]).item() for x, y in rows) / len(rows)
    assert mg.evaluate(model, data) == pytest.approx(expected, abs=1e-5)


# ---------- 优化器与学习率 ----------
@pytest.mark.parametrize("shape", [(8, 32), (32, 8)])
def test_orthogonalize_keeps_directions_and_evens_sizes(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    matrix[:, 0] *= 20  # 有一个方向特别大
    result = muon.orthogonalize(matrix[None])[0]
    sizes = torch.linalg.svdvals(result)
    assert torch.linalg.svdvals(matrix).max() / torch.linalg.svdvals(matrix).min() > 10
    assert sizes.min() > 0.5 and sizes.max() < 1.3
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    middle = u.mT @ result @ vh.mT  # 方向没变的话是对角阵
    assert (middle - torch.diag(middle.diagonal())).abs().max() < 1e-3


def test_same_update_as_pytorch_muon():
    """同样的梯度，和 torch.optim.Muon 走同一步（它用 bfloat16 算，所以只相近）。"""
    torch.manual_seed(0)
    start = [torch.randn(24, 8), torch.randn(24, 8) * 3, torch.randn(8, 24)]
    mine = [torch.nn.Parameter(p.clone()) for p in start]
    theirs = [torch.nn.Parameter(p.clone()) for p in start]
    a = muon.Muon(mine, lr=0.1, weight_decay=0.2)
    assert [len(group["params"]) for group in a.param_groups] == [2, 1]  # 前两个形状相同，叠成一批
    b = torch.optim.Muon(theirs, lr=0.1, weight_decay=0.2, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        for p, q in zip(mine, theirs, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        a.step()
        b.step()
    for p, q, s in zip(mine, theirs, start, strict=True):
        assert (p - q).norm() < 0.05 * (p - s).norm()


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_every_parameter_is_trained_once_and_only_matrices_decay(optimizer):
    s = replace(SMALL, optimizer=optimizer, weight_decay=0.3, beta2=0.9)
    model = mg.MiniGPT(VOCAB, s)
    groups = [group for each in mg.make_optimizers(model, s) for group in each.param_groups]
    trained = [id(p) for group in groups for p in group["params"]]
    assert sorted(trained) == sorted(id(p) for p in model.parameters())
    assert len({id(p) for group in groups for p in group["params"] if p.dim() == 2}) == 2 + 4 * 3
    for group in groups:
        assert {(p.dim(), group["weight_decay"]) for p in group["params"]} in ({(2, 0.3)}, {(1, 0.0)})
        assert group.get("betas", (0.9, 0.9)) == (0.9, 0.9)


def test_one_step_is_adamw_by_hand():
    """第一步：偏差校正之后，每个数都走 lr · sign(梯度)，矩阵先乘 1 − lr · weight_decay。"""
    s = replace(SMALL, optimizer="adamw", warmup=0, lr=0.01, weight_decay=0.5, clip=1e9)
    model = make(s)
    x, y = mg.get_batch(torch.randint(VOCAB, (200,)), s, 0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    mg.next_token_loss(model(x), y).backward()
    signs = {name: p.grad.sign() * (p.grad.abs() > 1e-4) for name, p in model.named_parameters()}
    model.zero_grad()
    mg.train_step(model, mg.make_optimizers(model, s), x, y, 0, s)
    for name, p in model.named_parameters():
        decayed = before[name] * (1 - 0.01 * 0.5 * (p.dim() == 2))
        big = signs[name] != 0  # 梯度太小的，分母里的 1e-8 看得出来，不比
        assert big.any()
        torch.testing.assert_close(p.detach()[big], (decayed - 0.01 * signs[name])[big], atol=1e-5, rtol=0)


def test_gradient_is_clipped_to_its_total_length(monkeypatch):
    seen = []
    monkeypatch.setattr(
        torch.optim.AdamW, "step", lambda self: seen.append([p.grad.clone() for p in model.parameters()])
    )
    for clip in (1e9, 0.25):
        model, s = make(), replace(SMALL, optimizer="adamw", clip=clip)
        x, y = mg.get_batch(torch.arange(200) % VOCAB, s, 0)
        mg.train_step(model, mg.make_optimizers(model, s), x, y, 0, s)
    whole, clipped = (torch.cat([g.flatten() for g in grads]) for grads in seen)
    assert whole.norm() > 0.3 and clipped.norm() == pytest.approx(0.25, rel=1e-4)
    torch.testing.assert_close(clipped, whole * 0.25 / whole.norm(), atol=1e-6, rtol=1e-4)


def test_learning_rate_rises_then_falls_to_min_lr():
    rates = [mg.learning_rate(step, SMALL) for step in range(SMALL.steps)]
    assert rates[:3] == pytest.approx([SMALL.lr / 3, SMALL.lr * 2 / 3, SMALL.lr])
    assert rates[2:] == sorted(rates[2:], reverse=True) and 0 < rates[-1] < 0.05 * SMALL.lr
    floor = replace(SMALL, min_lr=SMALL.lr / 10)
    assert mg.learning_rate(SMALL.steps, floor) == pytest.approx(SMALL.lr / 10)
    assert mg.learning_rate(3, floor) == pytest.approx(SMALL.lr)


def test_batches_depend_on_seed_and_step_only():
    data = torch.arange(500)
    x, y = mg.get_batch(data, SMALL, 7)
    assert torch.equal(y, x + 1) and x.shape == (4, 16)  # 目标就是下一个
    torch.rand(5)
    assert torch.equal(mg.get_batch(data, SMALL, 7)[0], x)
    assert not torch.equal(mg.get_batch(data, SMALL, 8)[0], x)
    assert not torch.equal(mg.get_batch(data, replace(SMALL, seed=1), 7)[0], x)


# ---------- 训练一个文件 ----------
TEXT = "the cat sat on the mat. a dog ran to the cat.\n" * 30


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "我的 文本.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def arguments(text_file, *more):
    small = {"layers": 2, "heads": 2, "dim": 16, "block": 16, "batch": 4, "steps": 12, "warmup": 2}
    flags = [word for name, value in small.items() for word in (f"--{name}", str(value))]
    out = text_file.with_name("out.pt")
    return [
        *flags,
        "--eval_every",
        "4",
        "--data",
        str(text_file),
        "--out",
        str(out),
        "--max_new_tokens",
        "20",
        *more,
    ]


class Stop(BaseException):
    pass


@pytest.mark.parametrize(
    "more", [[], ["--recipe", "fast"], ["--optimizer", "muon"], ["--recipe", "fast", "--optimizer", "adamw"]]
)
def test_resumed_training_equals_uninterrupted(text_file, monkeypatch, capsys, more):
    whole = text_file.with_name("whole.pt")
    mg.main(arguments(text_file, "--out", str(whole), *more))
    uninterrupted = capsys.readouterr().out

    step = mg.train_step

    def interrupted(*args, calls=[]):  # noqa: B006
        calls.append(1)
        if len(calls) == 11:
            raise KeyboardInterrupt
        return step(*args)

    monkeypatch.setattr(mg, "train_step", interrupted)
    with pytest.raises(SystemExit, match="再运行同一条命令"):
        mg.main(arguments(text_file, *more))
    assert torch.load(text_file.with_name("out.pt"), weights_only=True)["step"] == 8
    monkeypatch.setattr(mg, "train_step", step)
    capsys.readouterr()
    mg.main(arguments(text_file, *more))
    resumed = capsys.readouterr().out
    assert "从第 8 步继续" in resumed
    a, b = (torch.load(p, weights_only=True) for p in (whole, text_file.with_name("out.pt")))
    assert a["step"] == b["step"] == 12
    assert all(torch.equal(a["model"][name], b["model"][name]) for name in a["model"])
    tail = "第   12 步"  # 最后一次的训练 loss、验证 loss，和生成的文字（速度不比）
    ends = [re.sub(r"[\d,]+ 字/秒", "", out[out.index(tail) :]) for out in (uninterrupted, resumed)]
    assert ends[0] == ends[1]


def test_finished_training_is_loaded_and_only_generates(text_file, monkeypatch, capsys):
    mg.main(arguments(text_file))
    capsys.readouterr()
    monkeypatch.setattr(mg, "train_step", lambda *args: pytest.fail("不该再训练"))
    mg.main(arguments(text_file, "--prompt", "the", "--temperature", "0.5"))
    out = capsys.readouterr().out
    assert "从第 12 步继续" in out and "生成（温度 0.5）：\nthe" in out


def test_retrain_starts_over_whatever_the_settings_were(text_file, capsys):
    mg.main(arguments(text_file))
    first = capsys.readouterr().out
    mg.main(arguments(text_file, "--retrain", "--lr", "0.02"))
    other = capsys.readouterr().out
    assert "继续" not in other and "第    4 步" in other
    mg.main(arguments(text_file, "--retrain"))
    again = capsys.readouterr().out
    assert again[again.index("生成") :] == first[first.index("生成") :] != other[other.index("生成") :]


def test_training_lowers_the_loss_below_the_letter_frequencies(text_file, capsys):
    mg.main(arguments(text_file, "--steps", "150", "--eval_every", "150"))
    loss = float(re.search(r"验证 ([\d.]+)", capsys.readouterr().out)[1])
    counts = torch.tensor([TEXT.count(c) for c in sorted(set(TEXT))]) / len(TEXT)
    assert loss < 0.5 * -(counts * counts.log()).sum()  # 只记住每个字多常见，最多到这个熵


def error_of(monkeypatch, *argv):
    monkeypatch.setattr(mg, "train_step", lambda *args: pytest.fail("应当在训练前就说"))
    with pytest.raises(SystemExit) as caught:
        mg.main([str(each) for each in argv])
    assert isinstance(caught.value.code, str) and caught.value.code.startswith("错误：")
    return caught.value.code


def test_changed_settings_and_data_are_named_and_refused(text_file, monkeypatch):
    mg.main(arguments(text_file))
    changed = arguments(text_file, "--lr", "0.5", "--seed", "3")
    message = error_of(monkeypatch, *changed)
    assert (
        "lr：已有 0.006，这次 0.5" in message and "seed：已有 0，这次 3" in message and "--retrain" in message
    )
    message = error_of(monkeypatch, *arguments(text_file, "--recipe", "fast"))
    assert (
        "activation：已有 gelu_tanh，这次 relu" in message and "optimizer：已有 adamw，这次 muon" in message
    )
    text_file.write_text(TEXT + "a", encoding="utf-8")
    message = error_of(monkeypatch, *arguments(text_file))
    assert "data_sha256" in message and "lr" not in message
    monkeypatch.undo()
    mg.main([*changed, "--retrain"])  # 照它说的做，就从头训练


def test_a_checkpoint_of_older_code_is_said(text_file, monkeypatch):
    mg.main(arguments(text_file))
    out = text_file.with_name("out.pt")
    state = torch.load(out, weights_only=True)
    del state["settings"]["version"]
    torch.save(state, out)
    message = error_of(monkeypatch, *arguments(text_file))
    assert "version：已有 None，这次 3" in message and "--retrain" in message


def test_a_broken_checkpoint_is_said(text_file, monkeypatch):
    text_file.with_name("out.pt").write_bytes(b"half a file")
    message = error_of(monkeypatch, *arguments(text_file))
    assert "不是完整的检查点" in message and "--retrain" in message


def test_a_checkpoint_that_cannot_be_written_is_said(text_file, monkeypatch):
    message = error_of(monkeypatch, *arguments(text_file, "--out", text_file / "out.pt"))
    assert "写不了检查点" in message and "--out" in message


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--prompt", ""], ["--prompt 是空的"]),
        (["--prompt", "i love zebras"], ["'zebras' 不在词表里", "i love cats"]),
        (["--temperature", "0"], ["--temperature 要大于 0", "--greedy"]),
        (["--temperature", "-1"], ["--temperature 要大于 0", "现在是 -1"]),
        (["--temperature", "nan"], ["--temperature 要大于 0"]),
        (["--block", "3"], ["--block 3 太小"]),
        (["--heads", "3"], ["--dim 64 不能平分给 --heads 3"]),
        (["--steps", "0"], ["--steps 要是正整数"]),
        (["--steps", "abc"], ["参数写错了", "--steps", "'abc'", "--help"]),
        (["--step", "5"], ["参数写错了", "--step 5"]),
        (["--attention", "flash"], ["--attention 只有 manual、sdpa（现在是 flash）"]),
        (["--optimizer", "sgd"], ["--optimizer 只有 muon、adamw（现在是 sgd）"]),
        (["--recipe", "slow"], ["--recipe 只有 gpt2、fast（现在是 slow）"]),
        (["--activation", "silu"], ["--activation 只有 gelu_tanh、gelu、relu（现在是 silu）"]),
        (["--seed", "0.5"], ["参数写错了", "--seed", "'0.5'"]),
        (["--gpt2"], ["参数写错了", "--gpt2"]),
        (["--clip", "0"], ["--clip 要大于 0"]),
        (["--min_lr", "-1"], ["--min_lr 不能是负数"]),
        (["--weight_decay", "inf"], ["--weight_decay 不能是负数"]),
        (["--beta2", "1"], ["--beta2 要在 0 与 1 之间"]),
        (["--lr", "nan"], ["--lr 要大于 0"]),
        (["--warmup", "-1"], ["--warmup 不能是负数"]),
        (["--data", "没有这个文件.txt"], ["读不了 --data 没有这个文件.txt", "当前目录"]),
        (["--data", "."], ["读不了 --data ."]),
    ],
)
def test_bad_input(monkeypatch, argv, words):
    message = error_of(monkeypatch, *argv)
    assert all(word in message for word in words), message


def test_bad_text_files(text_file, monkeypatch):
    assert "'Z' 不在词表里" in error_of(monkeypatch, *arguments(text_file, "--prompt", "aZ"))
    assert "--prompt 是空的" in error_of(monkeypatch, *arguments(text_file, "--prompt", ""))
    text_file.write_text("abc" * 50, encoding="utf-8")  # 150 个字，验证集 15 个，不够一段 16 + 1
    message = error_of(monkeypatch, *arguments(text_file))
    assert "只有 150 个字" in message and "--block" in message and "170" in message
    text_file.write_text("", encoding="utf-8")
    assert "只有 0 个字" in error_of(monkeypatch, *arguments(text_file))
    text_file.write_bytes("你好".encode("gbk"))
    assert "不是 UTF-8" in error_of(monkeypatch, *arguments(text_file))
    text_file.write_text('{"text": "一行一个对象"}\n' * 50, encoding="utf-8")
    assert "里是 JSON" in error_of(monkeypatch, *arguments(text_file))


def test_a_long_prompt_is_cropped_and_said(text_file, capsys):
    mg.main(arguments(text_file, "--prompt", "the cat sat on the mat."))
    assert "开头有 23 个字，上下文只有 16 个：只看得见最后 16 个" in capsys.readouterr().out
    model = make()
    ids = torch.randint(VOCAB, (1, 23))
    assert take(mg.generate(model, ids, 5, greedy=True)) == take(
        mg.generate(model, ids[:, -16:], 5, greedy=True)
    )


def test_attention_may_change_and_the_checkpoint_still_serves(text_file, monkeypatch, capsys):
    mg.main(arguments(text_file, "--greedy"))
    first = capsys.readouterr().out
    monkeypatch.setattr(mg, "train_step", lambda *args: pytest.fail("不该再训练"))
    mg.main(arguments(text_file, "--greedy", "--attention", "manual"))
    again = capsys.readouterr().out
    assert "从第 12 步继续" in again and again[again.index("生成") :] == first[first.index("生成") :]


# ---------- 像读者那样运行 ----------
def run_alone(tmp_path, *argv):
    """把 mini_gpt.py 一个文件拷到别处运行：不依赖本仓库。"""
    (tmp_path / "mini_gpt.py").write_bytes(Path(mg.__file__).read_bytes())
    command = [sys.executable, "mini_gpt.py", *argv]
    return subprocess.run(command, cwd=tmp_path, capture_output=True, encoding="utf-8", timeout=120)


def test_muon_without_its_file_is_said(tmp_path):
    done = run_alone(tmp_path, "--recipe", "fast")
    assert done.returncode == 1 and done.stderr.startswith("错误：") and "Traceback" not in done.stderr
    assert "muon.py" in done.stderr and "--optimizer adamw" in done.stderr
    assert run_alone(tmp_path, "--recipe", "fast", "--optimizer", "adamw").returncode == 0
    (tmp_path / "muon.py").write_bytes(Path(muon.__file__).read_bytes())
    done = run_alone(tmp_path, "--recipe", "fast")
    assert done.returncode == 0 and "贪心：i love cats\n" in done.stdout


def test_help_is_complete(tmp_path):
    done = run_alone(tmp_path, "--help")
    assert done.returncode == 0 and done.stderr == ""
    text = re.sub(r"\s", "", done.stdout)
    assert (
        "--no-bias" in text
        and "（默认adamw；fastmuon；玩具同）" in text
        and "（默认4；fast同；玩具2）" in text
    )


def test_toy_run_as_a_reader(tmp_path):
    done = run_alone(tmp_path)
    assert done.returncode == 0 and done.stderr == ""
    losses = [float(x) for x in re.findall(r"epoch +\d+  loss ([\d.]+)", done.stdout)]
    assert losses[0] == pytest.approx(1.81, abs=0.07) and losses[-1] < 0.3
    assert "贪心：i love cats\n" in done.stdout
    mask = re.findall(r"^ +\S+((?: +[01]){4})$", done.stdout, re.M)
    assert [row.split() for row in mask] == [["1"] * (t + 1) + ["0"] * (3 - t) for t in range(4)]
    first, last = map(float, re.search(r"loss 从 ([\d.]+) 降到 ([\d.]+\d)", mg.__doc__).groups())
    assert (losses[0], losses[-1]) == pytest.approx((first, last), abs=0.01)  # 说明里写的就是跑出来的
