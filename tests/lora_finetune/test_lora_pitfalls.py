"""别处常出的错：fp16 的适配器、全零的起点、α/r 藏着学习率、够不着的专家、变了名字的 state_dict、合并存盘后学到的行还在。"""

import copy

import pytest
import torch
from torch import nn

import lora_by_hand as lora
from nlp_common.lm.chat_rows import answer_loss, chat_row, collate
from nlp_common.tiny import world
from token_rows import merge_token_rows, train_token_rows


@pytest.fixture(scope="module")
def batch(chat_tokenizer):
    rows = [chat_row(chat_tokenizer, row["messages"]) for row in world.chats(4, 0)]
    return collate(rows, chat_tokenizer.pad_token_id)


def one_layer(r: int = 2, alpha: float = 4) -> lora.LoRALinear:
    torch.manual_seed(0)
    return lora.LoRALinear(nn.Linear(6, 5), r, alpha)


@pytest.mark.parametrize("base_type", [torch.float32, torch.float16])
def test_the_adapter_stays_float32_so_gradients_can_be_unscaled(base_type):
    """混合精度只在前向里转换：底座是半精度的，A、B 也是 float32，GradScaler 不报 unscale，B 离开 0。"""
    layer = one_layer()
    layer.base.to(base_type)
    assert layer.A.dtype == layer.B.dtype == torch.float32
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    optimizer = torch.optim.AdamW([layer.A, layer.B], 1e-2)
    with torch.autocast("cpu", torch.float16):
        loss = layer(torch.randn(3, 6)).float().pow(2).mean()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    assert layer.B.abs().max() > 0


def test_a_half_precision_adapter_is_what_fails_elsewhere():
    layer = one_layer().half()
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    optimizer = torch.optim.AdamW([layer.A, layer.B], 1e-2)
    scaler.scale(layer(torch.randn(3, 6).half()).float().pow(2).mean()).backward()
    with pytest.raises(ValueError, match="unscale FP16"):
        scaler.step(optimizer)


def test_both_zero_never_learns():
    """A 也从 0 开始：谁的梯度也出不来。"""
    layer = one_layer()
    nn.init.zeros_(layer.A)
    layer(torch.randn(3, 6)).pow(2).sum().backward()
    assert layer.A.grad.abs().max() == 0 and layer.B.grad.abs().max() == 0


def test_alpha_over_r_scales_the_first_step():
    """α/r 大一倍，SGD 的第一步在 ΔW 上走四倍：B 的梯度大一倍，增量又乘一倍。所以换 α 就是换学习率。"""
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))
    deltas = []
    for alpha in (2, 4):
        layer = one_layer(r=2, alpha=alpha)
        # 损失对 y 是线性的：两次的上游梯度一样，只差 α/r
        layer(x).sum().backward()
        with torch.no_grad():
            layer.B -= 0.1 * layer.B.grad
        deltas.append(layer.delta())
    torch.testing.assert_close(deltas[1], 4 * deltas[0])


def test_fused_experts_are_not_reached_and_it_is_said(capsys):
    """transformers 5 把 MoE 的专家并成三维的参数，不是 Linear：LoRA 只装到注意力上，并且说出来。"""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    experts = {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 8,
        "decoder_sparse_step": 1,
    }
    net = Qwen3MoeForCausalLM(Qwen3MoeConfig(vocab_size=32, head_dim=8, **small, **experts))
    assert any(p.dim() == 3 for p in net.parameters())
    names = lora.add_lora(net, "all", r=2, alpha=4)
    assert len(names) == 4 and all("self_attn" in name for name in names)
    assert "专家" in capsys.readouterr().out


def test_a_peft_state_dict_loaded_loosely_is_the_untrained_model(model, batch):
    """名字都变了：strict=False 载回去不报错，模型还是没有学过的；合并以后名字才对得上。"""
    peft = pytest.importorskip("peft", reason="要 peft 才有它的名字")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    wrapped = peft.get_peft_model(copy.deepcopy(model), config).eval()
    judged = copy.deepcopy(model).eval()
    with torch.no_grad():
        untrained, learned = (answer_loss(net, batch)[0] for net in (judged, wrapped))
        assert judged.load_state_dict(wrapped.state_dict(), strict=False).unexpected_keys
        assert torch.equal(answer_loss(judged, batch)[0], untrained) and not torch.equal(learned, untrained)
        # get_peft_model 改的就是原来的模型：在它身上量到的是学过的
        assert torch.equal(answer_loss(wrapped.get_base_model(), batch)[0], learned)
        judged.load_state_dict(wrapped.merge_and_unload().state_dict())
        torch.testing.assert_close(answer_loss(judged, batch)[0], learned, rtol=1e-4, atol=1e-4)


def test_learned_rows_survive_merging_saving_and_loading(model, batch, tmp_path):
    """合并后存盘再载入：增量、学到的嵌入行（与共用的输出层）一样不少。"""
    from transformers import AutoModelForCausalLM

    net = copy.deepcopy(model).eval()
    lora.add_lora(net, "all", r=2, alpha=4)
    rows = train_token_rows(net, batch["input_ids"].unique().tolist()[:3])
    with torch.no_grad():
        rows.rows += 0.3
        for layer in lora.lora_layers(net).values():
            nn.init.normal_(layer.B, std=0.05)
        trained = answer_loss(net, batch)[0].item()
        merge_token_rows(lora.merge_lora(net))
        net.save_pretrained(tmp_path)
        again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        assert answer_loss(again, batch)[0].item() == pytest.approx(trained, rel=1e-5)
    assert again.lm_head.weight is again.get_input_embeddings().weight
    assert answer_loss(model.eval(), batch)[0].item() != pytest.approx(trained, rel=1e-3)
