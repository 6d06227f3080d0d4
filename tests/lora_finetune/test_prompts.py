"""prompts.py：前缀、提示、P-Tuning 与 PEFT 的 logits、梯度相同；重算激活不丢前缀；从真的文字开始等于放上那段文字。"""

import copy

import pytest
import torch

from nlp_common.lm.chat_rows import answer_loss, chat_row, collate
from nlp_common.lm.chatml import prompt_ids
from nlp_common.lm.generation import generate
from nlp_common.tiny import world
from nlp_common.train.setup import recompute_activations
from prompts import PrefixTuned, PromptTuned, PTuned

M = 5


@pytest.fixture(scope="module")
def batch(chat_tokenizer):
    rows = [chat_row(chat_tokenizer, chat["messages"]) for chat in world.chats(6, seed=0)]
    return collate(rows, chat_tokenizer.pad_token_id)


def ours_of(cls, model):
    torch.manual_seed(0)
    return cls(copy.deepcopy(model).double(), M).double()


def peft_of(model, kind: str, **more):
    peft = pytest.importorskip("peft", reason="没有装 peft：不与它比")
    classes = {
        "prefix": peft.PrefixTuningConfig,
        "prompt": peft.PromptTuningConfig,
        "encoder": peft.PromptEncoderConfig,
    }
    config = classes[kind](task_type="CAUSAL_LM", num_virtual_tokens=M, **more)
    return peft.get_peft_model(copy.deepcopy(model).double(), config).double()


def peft_prefix(ours: PrefixTuned) -> torch.Tensor:
    """我们的 (L, n_kv, m, hs) 两份 → PEFT 的一张表 (m, 2·L·H)：每个虚拟 token 一行，各层的 K、V 依次排开。"""
    both = torch.stack([ours.keys, ours.values], 1)  # (L, 2, n_kv, m, hs)
    return both.permute(3, 0, 1, 2, 4).reshape(ours.m, -1)


def test_prefix_equals_peft(model, batch):
    ours, theirs = ours_of(PrefixTuned, model), peft_of(model, "prefix")
    table = theirs.prompt_encoder["default"].embedding.weight
    with torch.no_grad():
        table.copy_(peft_prefix(ours))
    a, b = ours(batch["input_ids"]).logits, theirs(input_ids=batch["input_ids"]).logits
    assert (a - b).abs().max() < 1e-9
    a.logsumexp(-1).sum().backward()
    b.logsumexp(-1).sum().backward()
    both = torch.stack([ours.keys.grad, ours.values.grad], 1).permute(3, 0, 1, 2, 4).reshape(M, -1)
    assert both.abs().max() > 1e-3
    assert (both - table.grad).abs().max() < 1e-9


def test_prompt_equals_peft(model, batch):
    ours, theirs = ours_of(PromptTuned, model), peft_of(model, "prompt")
    table = theirs.prompt_encoder["default"].embedding.weight
    with torch.no_grad():
        table.copy_(ours.vectors)
    a, b = ours(batch["input_ids"]).logits, theirs(input_ids=batch["input_ids"]).logits[:, M:]
    assert a.shape == b.shape and (a - b).abs().max() < 1e-9
    a.logsumexp(-1).sum().backward()
    b.logsumexp(-1).sum().backward()
    assert (ours.vectors.grad - table.grad).abs().max() < 1e-9 < ours.vectors.grad.abs().max()


def test_p_tuning_equals_peft(model, batch):
    ours = ours_of(PTuned, model)
    theirs = peft_of(model, "encoder", encoder_hidden_size=128, encoder_reparameterization_type="MLP")
    encoder = theirs.prompt_encoder["default"]
    with torch.no_grad():
        encoder.embedding.weight.copy_(ours.vectors)
    encoder.mlp_head.load_state_dict(ours.encoder.state_dict())
    a, b = ours(batch["input_ids"]).logits, theirs(input_ids=batch["input_ids"]).logits[:, M:]
    assert (a - b).abs().max() < 1e-9


@pytest.mark.parametrize("cls", [PrefixTuned, PromptTuned, PTuned])
def test_recomputing_activations_keeps_the_virtual_tokens(model, batch, cls):
    """transformers 重算激活时扔掉缓存：前缀放在缓存里的，训练就没有前缀了；我们的梯度一样。"""
    plain, recomputed = ours_of(cls, model).train(), ours_of(cls, model).train()
    recomputed.gradient_checkpointing_enable()
    for each in (plain, recomputed):
        answer_loss(each, batch)[0].backward()
    for (name, a), b in zip(plain.named_parameters(), recomputed.parameters(), strict=True):
        if a.requires_grad:
            assert a.grad.abs().max() > 1e-6, name
            assert (a.grad - b.grad).abs().max() < 1e-9, name
        else:
            assert a.grad is None, name


def test_peft_prefix_breaks_when_recomputing(model, batch):
    """PEFT 0.21.2：前缀在缓存里，重算激活时缓存没有了，掩码还在。哪天它修好了，这个测试就会说。"""
    theirs = peft_of(model, "prefix").train()
    theirs(input_ids=batch["input_ids"])
    recompute_activations(theirs.base_model)
    with pytest.raises(RuntimeError, match="must match the size"):
        theirs(input_ids=batch["input_ids"], use_cache=False)


@pytest.mark.parametrize("cls", [PrefixTuned, PromptTuned])
def test_real_text_is_the_same_as_putting_the_text_in_front(model, batch, cls):
    ours = ours_of(cls, model)
    text = batch["input_ids"][0, :M].tolist()
    ours.start_from(text)
    ids = batch["input_ids"][1:, 5:40]
    expected = (
        copy.deepcopy(model)
        .double()(torch.cat([torch.tensor([text]).expand(len(ids), -1), ids], 1))
        .logits[:, M:]
    )
    assert (ours(ids).logits - expected).abs().max() < 1e-9


@pytest.mark.parametrize("cls", [PrefixTuned, PromptTuned, PTuned])
def test_generating_in_a_batch_equals_one_by_one_without_cache(model, chat_tokenizer, cls):
    ours = ours_of(cls, model).eval()
    prompts = [prompt_ids(chat_tokenizer, q["messages"]) for q in world.heldout_questions(3, 0)]
    together = generate(ours, chat_tokenizer, prompts, 8)
    for prompt, reply in zip(prompts, together, strict=True):
        ids = list(prompt)
        with torch.no_grad():
            for token in reply:
                assert ours(torch.tensor([ids])).logits[0, -1].argmax() == token
                ids.append(token)


@pytest.mark.parametrize("cls", [PrefixTuned, PromptTuned])
def test_the_loss_reads_the_same_logits(model, batch, cls):
    """损失只算有标签的位置（nlp_common/fast），与全部算完再挑的一样。"""
    ours = ours_of(cls, model)
    logits = ours(batch["input_ids"]).logits[:, :-1].log_softmax(-1)
    labels = batch["labels"][:, 1:]
    keep = labels >= 0
    expected = -logits[keep].gather(1, labels[keep][:, None]).sum()
    assert abs(answer_loss(ours, batch)[0].item() - expected.item()) < 1e-4 * expected.item()


def test_only_the_virtual_tokens_learn(model):
    ours = ours_of(PrefixTuned, model)
    learned = {name for name, p in ours.named_parameters() if p.requires_grad}
    assert learned == {"keys", "values"}
    config = model.config
    assert ours.keys.numel() + ours.values.numel() == 2 * config.num_hidden_layers * M * config.hidden_size


def test_only_the_vectors_of_a_p_tuning_are_kept(model, batch):
    """学完的小网络可以扔掉：它给出的 m 个向量当作提示，logits 相同。"""
    ours, kept = ours_of(PTuned, model), ours_of(PromptTuned, model)
    with torch.no_grad():
        kept.vectors.copy_(ours.prompt())
        assert torch.equal(kept(batch["input_ids"]).logits, ours(batch["input_ids"]).logits)
