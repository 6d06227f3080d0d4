"""训练循环：累积几批、重算激活，走出的都是同一步；与库自带的训练器走出同样的几步；记录、学习率、次序都对。"""

import copy
from functools import partial
from itertools import chain
from types import SimpleNamespace

import pytest
import torch
from transformers import get_scheduler

import pretrain_chinese as pretrain
from nlp_common.lm.losses import IGNORE, count_labels
from nlp_common.lm.packing import collate_blocks, pack_documents
from nlp_common.lm.pairs import collate_pairs, count_pairs, encode_pair, pair_length, pair_tokens
from nlp_common.tiny import world
from nlp_common.train import loop
from nlp_common.train.batches import bucketed, my_batches, shuffled
from nlp_common.train.loop import train_loop
from nlp_common.train.settings import StageSettings, parse_settings
from nlp_common.train.trainer import trainer_arguments

BETA, SFT_WEIGHT, BLOCK = 0.3, 0.3, 24
FULL = "Qwen/Qwen1.5-0.5B"


def fake_stage(tmp_path, settings) -> SimpleNamespace:
    """循环用得着的那几样：设置、设备、检查点放在哪里。"""
    return SimpleNamespace(
        settings=settings,
        device=torch.device("cpu"),
        folder=SimpleNamespace(checkpoints=tmp_path / "checkpoints"),
        checkpoint=lambda: None,
        seconds=lambda: 1.0,
        report=lambda point: None,
    )


def settings_of(script, *argv, cls=StageSettings):
    common = ["--preset", "tiny", "--per_device_train_batch_size", "8", "--warmup_steps", "0"]
    return parse_settings(cls, script.PRESETS, [*common, *argv], FULL)


# ---------------------------------------------------------------- 四个阶段各给循环什么


@pytest.fixture(scope="module")
def work(load_script, model64, reference64, reward64, chat_tokenizer):
    """``work(阶段)`` → 从哪个模型开始，行，怎样拼批，损失，数几项，每行几个 token，手算的平均损失。"""
    pad_id = chat_tokenizer.pad_token_id
    sft, dpo = load_script("sft_chinese_qwen"), load_script("dpo_chinese_qwen")
    reward = load_script("reward_model")

    def of_pretrain():
        generator = torch.Generator().manual_seed(7)
        lengths = [24, 11, 13, 9, 6, 8, 20, 3, 17, 15, 22, 2, 21]
        documents = [torch.randint(5, 500, (n,), generator=generator).tolist() for n in lengths]
        blocks = pack_documents(documents, BLOCK)
        assert len(blocks) == 8 and len({sum(len(d) - 1 for d in b) for b in blocks}) > 3

        def by_hand(net):  # 逐篇文档算
            total = 0.0
            for document in documents:
                ids = torch.tensor([document])
                total = total + net(input_ids=ids, labels=ids).loss * (len(document) - 1)
            return total / sum(len(document) - 1 for document in documents)

        collate = partial(collate_blocks, block_size=BLOCK, pad_id=pad_id)
        tokens = [sum(map(len, block)) for block in blocks]
        return model64, blocks, collate, pretrain.causal_lm_loss, count_labels, tokens, by_hand

    def of_sft():
        chats = sorted((row["messages"] for row in world.chats(40, 4)), key=lambda m: len(str(m)))[::5]
        rows = [sft.encode_row(chat_tokenizer, messages) for messages in chats]
        collate = partial(sft.collate, pad_id=pad_id)

        def by_hand(net):
            batch = collate(rows)
            logits = net(input_ids=batch["input_ids"]).logits[:, :-1].flatten(0, 1)
            labels = batch["labels"][:, 1:].flatten()
            return torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORE)

        tokens = [len(row["input_ids"]) for row in rows]
        return model64, rows, collate, sft.answer_loss, count_labels, tokens, by_hand

    def of_reward():
        rows = [encode_pair(chat_tokenizer, row, with_end=False) for row in world.pairs(8, 4)]
        collate = partial(collate_pairs, pad_id=pad_id)

        def by_hand(net):
            scores = reward.score_pairs(net, collate(rows)["input_ids"])
            return reward.pairwise_loss(*scores).mean()

        return reward64, rows, collate, reward.reward_loss, count_pairs, list(map(pair_tokens, rows)), by_hand

    def of_dpo():
        rows = [dpo.encode(chat_tokenizer, row) for row in world.pairs(8, 4)]
        refs = dpo.logps_of(copy.deepcopy(reference64), rows, pad_id, 8).tolist()
        for row, (chosen, rejected) in zip(rows, refs, strict=True):
            row["ref_chosen"], row["ref_rejected"] = chosen, rejected
        collate = partial(dpo.collate, pad_id=pad_id)

        def by_hand(net):
            batch = collate(rows)
            logps = dpo.sequence_logps(net, batch["input_ids"], batch["labels"]).chunk(2)
            extra = dpo.chosen_sft_loss(logps[0], batch["labels"])
            return (dpo.dpo_loss(*logps, *batch["ref_logps"].chunk(2), BETA)[0] + SFT_WEIGHT * extra).mean()

        loss = partial(dpo.pair_loss, beta=BETA, sft_weight=SFT_WEIGHT)
        return model64, rows, collate, loss, count_pairs, list(map(pair_tokens, rows)), by_hand

    return {"pretrain": of_pretrain, "sft": of_sft, "reward": of_reward, "dpo": of_dpo}


# ---------------------------------------------------------------- 1×8 与 8×1、重算激活，走出同一步

# (每批几行, 累积几批, 重算激活吗)
SHAPES = [(8, 1, False), (1, 8, False), (2, 4, False), (3, 3, False), (8, 1, True), (2, 4, True)]


@pytest.mark.parametrize("stage", ["pretrain", "sft", "reward", "dpo"])
def test_every_way_to_cut_a_step_is_the_same_step(stage, work, tmp_path, monkeypatch):
    """SGD 的一步就是学习率乘梯度：与手算的平均损失的梯度比。"""
    start, rows, collate, loss, count, tokens, by_hand = work[stage]()
    lr = {"reward": 0.02, "dpo": 0.1}.get(stage, 0.5)
    monkeypatch.setattr(loop, "make_optimizer", lambda model, _: torch.optim.SGD(model.parameters(), lr))
    expected = copy.deepcopy(start)
    by_hand(expected).backward()
    for batch_size, accumulation, recompute in SHAPES:
        net, forwards = copy.deepcopy(start), []
        net.model.layers[0].mlp.register_forward_pre_hook(lambda *_, seen=forwards: seen.append(1))
        settings = settings_of(pretrain, "--max_steps", "1", "--max_grad_norm", "0")
        settings.per_device_train_batch_size, settings.gradient_accumulation_steps = batch_size, accumulation
        settings.gradient_checkpointing = recompute
        trained = train_loop(
            fake_stage(tmp_path, settings), "", net, rows, collate, loss, tokens, lengths=tokens, count=count
        )
        assert len(forwards) == accumulation * (2 if recompute else 1)  # 反向时真的又算了一遍
        assert trained.state is None
        moved = 0.0
        for (name, after), before, p in zip(
            net.named_parameters(), start.parameters(), expected.parameters(), strict=True
        ):
            wanted = before - lr * p.grad if p.grad is not None else before
            torch.testing.assert_close(after.detach(), wanted.detach(), rtol=0, atol=1e-6, msg=name)
            moved = max(moved, (after - before).abs().max().item())
        assert moved > 1e-3


# ---------------------------------------------------------------- 与库自带的训练器走出同样的几步


@pytest.mark.parametrize("stage", ["pretrain", "sft", "reward", "dpo"])
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
def test_the_library_takes_the_same_steps(
    stage, work, load_script, reference64, chat_tokenizer, tmp_path, monkeypatch
):
    """float64，预热、裁剪、学习率都在，几步之后参数相差 1e-6 以内。SFT、奖励、DPO 一批装下全部的行，次序就不要紧。

    预训练用 AdamW；其余用 SGD：transformers 的损失把 logits 转成 float32，Adam 会把几乎是 0 的梯度里的舍入放大。
    """
    start, rows, collate, loss, count, tokens, _ = work[stage]()
    script = {"sft": "sft_chinese_qwen", "reward": "reward_model", "dpo": "dpo_chinese_qwen"}.get(stage)
    script = load_script(script) if script else pretrain
    cls = {"sft": "SFTSettings", "dpo": "DPOSettings"}.get(stage, "StageSettings")
    argv = ["--max_steps", "5", "--warmup_steps", "2", "--learning_rate", "1e-3", "--logging_steps", "1"]
    argv += ["--max_grad_norm", "0.5", "--save_steps", "100"]
    if stage == "pretrain":
        argv += [
            "--weight_decay",
            "0.1",
            "--per_device_train_batch_size",
            "2",
        ]  # 一遍四步：打乱的次序也要一样
    if stage == "dpo":  # TRL 的 SFT 项按整批平均，我们的按每个回答平均：不用它就相等
        argv += ["--sft_weight", "0", "--beta", str(BETA)]
        loss = partial(script.pair_loss, beta=BETA, sft_weight=0.0)
    settings = settings_of(script, *argv, cls=getattr(script, cls))
    if stage != "pretrain":
        settings.learning_rate = {"reward": 0.02, "dpo": 0.1}.get(stage, 0.5)
        sgd = partial(torch.optim.SGD, lr=settings.learning_rate)
        monkeypatch.setattr(loop, "make_optimizer", lambda model, _: sgd(model.parameters()))
        monkeypatch.setattr(script, "trainer_arguments", partial(trainer_arguments, optim="sgd"))
    ours, theirs = copy.deepcopy(start), copy.deepcopy(start)
    run = fake_stage(tmp_path, settings)
    lengths = None if stage == "pretrain" else tokens
    torch.manual_seed(settings.seed)
    a = train_loop(run, "", ours, rows, collate, loss, tokens, lengths=lengths, count=count)
    tokenizer = copy.deepcopy(chat_tokenizer)
    if stage == "pretrain":
        b = script.train_with_transformers(run, theirs, rows, collate, tokens)
    elif stage == "dpo":
        b = script.train_with_trl(run, theirs, copy.deepcopy(reference64), tokenizer, rows, tokens)
    else:
        b = script.train_with_trl(run, theirs, tokenizer, rows, tokens)
    moved = 0.0
    for (name, p), q, before in zip(
        ours.named_parameters(), theirs.parameters(), start.parameters(), strict=True
    ):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=0, atol=1e-6, msg=name)
        moved = max(moved, (p - before).abs().max().item())
    assert moved > 1e-3
    assert [row["step"] for row in a.history] == [row["step"] for row in b.history] == [1, 2, 3, 4, 5]
    for mine, other in zip(a.history, b.history, strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], abs=1e-4)
    assert a.metrics.keys() == b.metrics.keys()


# ---------------------------------------------------------------- 记录、学习率、检查点


def test_history_averages_the_steps_in_between(work, tmp_path):
    start, rows, collate, loss, count, tokens, _ = work["reward"]()
    settings = settings_of(pretrain, "--max_steps", "5", "--logging_steps", "1", "--learning_rate", "1e-3")
    settings.per_device_train_batch_size = 3
    each = train_loop(
        fake_stage(tmp_path, settings), "", copy.deepcopy(start), rows, collate, loss, tokens, tokens, count
    ).history
    settings.logging_steps = 2
    pairs = train_loop(
        fake_stage(tmp_path, settings), "", copy.deepcopy(start), rows, collate, loss, tokens, tokens, count
    ).history
    assert [row["step"] for row in pairs] == [2, 4]
    for row, first, second in zip(pairs, each[0::2], each[1::2], strict=False):
        for name in ("loss", "accuracy"):
            assert row[name] == pytest.approx((first[name] + second[name]) / 2, abs=2e-5)


@pytest.mark.parametrize(("kind", "warmup"), [("linear", 3), ("cosine", 0.2), ("constant", 0)])
def test_learning_rate_follows_the_named_schedule(kind, warmup, work, tmp_path, monkeypatch):
    start, rows, collate, loss, _, tokens, _ = work["sft"]()
    seen = []

    class Noting(torch.optim.SGD):
        def step(self, closure=None):
            seen.append(self.param_groups[0]["lr"])
            return super().step(closure)

    monkeypatch.setattr(loop, "make_optimizer", lambda model, s: Noting(model.parameters(), s.learning_rate))
    settings = settings_of(pretrain, "--max_steps", "10", "--learning_rate", "0.01")
    settings.lr_scheduler_type, settings.warmup_steps = kind, warmup
    train_loop(fake_stage(tmp_path, settings), "", copy.deepcopy(start), rows, collate, loss, tokens)
    other = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 0.01)
    schedule = get_scheduler(kind, other, 2 if warmup == 0.2 else warmup, 10)
    expected = []
    for _ in range(10):
        expected.append(other.param_groups[0]["lr"])
        other.step()
        schedule.step()
    assert seen == pytest.approx(expected)


def test_every_epoch_sees_every_row_in_a_new_order(work, tmp_path):
    start, rows, _, _, _, _, _ = work["sft"]()
    rows = [row | {"number": i} for i, row in enumerate(rows)] + [rows[0] | {"number": 8}]
    seen = []

    def collate(batch):
        seen.append([row["number"] for row in batch])
        return {"labels": torch.zeros(len(batch), 3, dtype=torch.long)}

    def loss(model, batch):
        return model.lm_head.weight.sum() * 0.0, {}

    settings = settings_of(pretrain, "--num_train_epochs", "2.5", "--seed", "11")
    settings.per_device_train_batch_size, settings.gradient_accumulation_steps = 2, 2
    tokens = [len(row["input_ids"]) for row in rows]
    trained = train_loop(
        fake_stage(tmp_path, settings), "", copy.deepcopy(start), rows, collate, loss, tokens, lengths=tokens
    )
    first, second = bucketed(tokens, 2, 11, 0), bucketed(tokens, 2, 11, 1)
    assert list(chain(*seen[:5])) == first and list(chain(*seen[5:10])) == second and first != second
    assert len(seen) in (13, 14)  # 9 行、每批 2 行：一遍 5 批、3 步；2.5 遍是 8 步，第三遍走两步
    assert sorted(first) == list(range(9)) and trained.metrics["train_samples_per_s"] > 0


def test_plain_order_is_the_one_of_transformers_trainer():
    from accelerate.data_loader import SeedableRandomSampler

    torch.manual_seed(3)
    theirs = SeedableRandomSampler(range(50), data_seed=None)
    for epoch in range(3):
        theirs.set_epoch(epoch)
        assert shuffled(50, 3, epoch) == list(theirs)


@pytest.mark.parametrize("n_rows", [16, 17, 18, 23, 24])
@pytest.mark.parametrize("parts", [1, 2, 3])
@pytest.mark.parametrize("bucket", [False, True])
def test_shares_add_up_to_one_big_batch(n_rows, parts, bucket, monkeypatch):
    """n 个进程各 4 行，与一个进程 4n 行，是同样的批；不满的一批也尽量平分。"""
    lengths = [(7 * i) % 13 for i in range(n_rows)] if bucket else None
    big = my_batches(n_rows, lengths, SimpleNamespace(per_device_train_batch_size=4 * parts, seed=5), 1)
    big = [batch for batch in big if len(batch) >= parts]
    shares = []
    for index in range(parts):
        monkeypatch.setattr("nlp_common.train.batches.num_processes", lambda: parts)
        monkeypatch.setattr("nlp_common.train.batches.process_index", lambda index=index: index)
        shares.append(my_batches(n_rows, lengths, SimpleNamespace(per_device_train_batch_size=4, seed=5), 1))
    assert [list(chain(*step)) for step in zip(*shares, strict=True)] == big
    for step in zip(*shares, strict=True):
        sizes = [len(share) for share in step]
        assert min(sizes) > 0 and max(sizes) - min(sizes) <= 1


def test_pair_lengths_are_the_longer_answer(work):
    _, rows, _, _, _, _, _ = work["dpo"]()
    for row in rows:
        longer = max(len(row["chosen_ids"]), len(row["rejected_ids"]))
        assert pair_length(row) == len(row["prompt_ids"]) + longer
