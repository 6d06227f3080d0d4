"""--dry_run 的数字：参数、AdamW 与真的一样，激活与实际留下的相差不到一成。"""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from transformers import Qwen2Config, Qwen2ForCausalLM

from nlp_common.base.errors import UserError
from nlp_common.fast.columns import use_read_columns
from nlp_common.lm.loading import load_reward_model, load_value_model
from nlp_common.lm.rollout import Rollout, response_logps, response_values
from nlp_common.train import dry_run_qwen as dr
from nlp_common.train.settings import parse_settings

FULL = "Qwen/Qwen1.5-0.5B"


def test_parameters_are_those_of_the_real_models(model, reward_folder, chat_tokenizer):
    real = {
        dr.CAUSAL: model,
        dr.SCORE: load_reward_model(str(reward_folder), chat_tokenizer),
        dr.VALUES: load_value_model(str(reward_folder), chat_tokenizer),
    }
    for cls, loaded in real.items():
        counted = dr.count_parameters(cls, model.config)
        assert counted == (sum(p.numel() for p in loaded.parameters()), len(list(loaded.parameters())))


def test_qwen_0_5b_has_its_published_size():
    # 嵌入 V·H，每层 4H² + 3H（偏置）+ 3HI + 2H，最后的归一化 H
    by_hand = 151936 * 1024 + 24 * (4 * 1024**2 + 3 * 1024 + 3 * 1024 * 2816 + 2 * 1024) + 1024
    assert dr.count_parameters(dr.CAUSAL, dr.qwen_0_5b())[0] == by_hand == 463_987_712


def settings_of(sft, *argv):
    return parse_settings(sft.SFTSettings, sft.PRESETS, ["--preset", "tiny", *argv], FULL)


def test_optimizer_bytes_are_those_of_a_real_adamw(sft, model):
    net = Qwen2ForCausalLM(model.config).float()
    optimizer = torch.optim.AdamW(net.parameters())
    net(input_ids=torch.tensor([[5, 6, 7]])).logits.sum().backward()
    optimizer.step()
    held = sum(t.nbytes for state in optimizer.state.values() for t in state.values())
    fixed = dr.estimate("sft", settings_of(sft), model.config, half=False)["fixed"]
    assert next(v for k, v in fixed.items() if "AdamW" in k) == held
    assert next(v for k, v in fixed.items() if "梯度" in k) == sum(p.grad.nbytes for p in net.parameters())


def sized(kv_heads: int = 8) -> Qwen2Config:
    return Qwen2Config(
        vocab_size=3000,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=kv_heads,
        tie_word_embeddings=True,
        pad_token_id=0,
    )


@contextlib.contextmanager
def counting(nets: list, half: bool, token_counts: set[int]):
    """在这里面前向，为反向留下的每块内存（不算权重和它们的半精度副本）记进给出的字典：地址 → 字节数。"""
    weights = {p.untyped_storage().data_ptr() for net in nets for p in net.parameters()}
    kept, alive = {}, []

    def pack(tensor):
        storage = tensor.untyped_storage()
        at = storage.data_ptr()
        half_weight = (
            tensor.dim() == 2 and tensor.dtype == torch.bfloat16 and tensor.shape[0] not in token_counts
        )
        if at not in weights and not half_weight:
            kept[at] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=half),
    ):
        yield kept


@pytest.mark.parametrize("n_columns", [64, 24])
@pytest.mark.parametrize("kv_heads", [8, 2])
@pytest.mark.parametrize("half", [False, True])
def test_activations_are_within_a_tenth_of_what_is_really_kept(half, kv_heads, n_columns):
    config = sized(kv_heads)
    net = use_read_columns(Qwen2ForCausalLM(config).float().train())
    ids = torch.randint(0, 3000, (2, 64), generator=torch.Generator().manual_seed(0))
    columns = torch.arange(64 - n_columns, 64)
    with counting([net], half, {128, 2 * n_columns}) as kept:
        logits = net(input_ids=ids, use_cache=False, logits_to_keep=columns).logits
        F.cross_entropy(logits.flatten(0, 1).float(), ids[:, columns].flatten())
    saved = dr.saved_bytes(config, ids.numel(), half, head=True, n_read=2 * n_columns)
    assert saved == pytest.approx(sum(kept.values()), rel=0.1)


@pytest.mark.parametrize("cpu", [False, True])
def test_ppo_keeps_the_activations_of_what_it_updates_at_once(ppo, cpu):
    """一份 micro batch 3 行，提示 40 个、回答 20 个 token；在 CPU 上，策略与价值模型同时更新。"""
    config = sized()
    config.num_labels = 1
    policy, value = (use_read_columns(cls.from_config(config)) for cls in (dr.CAUSAL, dr.VALUES))
    ids = torch.randint(1, 3000, (3, 60), generator=torch.Generator().manual_seed(0))
    ones = torch.ones_like(ids)
    rollout = Rollout(ids, ones, ones.cumsum(1) - 1, ones[:, :20].bool(), ones[:, 0].bool())
    settings = parse_settings(
        ppo.PPOSettings, ppo.PRESETS, ["--preset", "tiny", "--micro_batch_size", "3"], FULL
    )
    settings.max_length, settings.max_new_tokens = 40, 20
    result = dr.estimate("ppo", settings, config, half=False, cpu=cpu)
    with counting([policy, value], False, set()) as kept:
        outputs = [response_logps(policy, rollout)]
        if cpu:
            outputs.append(response_values(value, rollout))
    assert all(output.requires_grad for output in outputs)
    without_gradients = result["activations"][False] - dr.logits_bytes(config, 60)
    assert without_gradients == pytest.approx(sum(kept.values()), rel=0.1)


@pytest.mark.parametrize(
    ("script", "n_models"),
    [("pretrain_chinese-mac", 1), ("sft", 1), ("reward", 1), ("dpo", 2), ("ppo", 4)],
)
def test_every_stage_reports_offline_and_writes_nothing(
    load_script, request, script, n_models, tmp_path, monkeypatch, capsys
):
    module = load_script(script) if "-" in script else request.getfixturevalue(script)
    monkeypatch.setattr(dr, "find_model", lambda *_: None)
    monkeypatch.setattr(dr, "device_bytes", lambda _: 2**30)
    out = tmp_path / "out"
    result = module.main(["--preset", "full", "--dry_run", "--output_dir", str(out)])["dry_run"]
    assert len(result["models"]) == n_models and result["fits"] is False and result["steps"] > 0
    printed = capsys.readouterr().out
    assert "内置的尺寸表" in printed and "警告" in printed and "没有实测时间" in printed
    if script == "ppo":  # PPO 不重算激活，靠 --micro_batch_size
        assert list(result["total"]) == [False] and "checkpointing" not in printed
    else:
        assert result["total"][True] < result["total"][False]
    assert ("是上限" in printed) == (script in ("sft", "dpo"))
    assert not out.exists()


def test_a_small_model_is_timed(sft, tmp_path):
    argv = ["--preset", "tiny", "--dry_run", "--output_dir", str(tmp_path / "out")]
    result = sft.main([*argv, "--per_device_train_batch_size", "2", "--max_length", "32"])["dry_run"]
    steps = sft.PRESETS["tiny"]["max_train_samples"] // 2
    assert result["seconds_per_step"] > 0 and result["steps"] == steps and result["fits"]


@pytest.mark.parametrize(("flags", "bound"), [([], False), (["--packing", "True"], True)])
def test_packing_makes_the_step_count_an_upper_bound(sft, monkeypatch, capsys, flags, bound):
    monkeypatch.setattr(dr, "why_not_measured", lambda *_: "不必量")
    result = sft.main(["--preset", "tiny", "--dry_run", *flags])["dry_run"]
    assert (f"至多 {result['steps']} 步" in capsys.readouterr().out) == bound


def test_modelscope_within_reach_is_not_called_unreachable(sft, monkeypatch, capsys):
    monkeypatch.setattr(dr, "find_model", lambda name, _: name)  # 连得上，只是缓存里没有
    argv = ["--preset", "full", "--dry_run", "--source", "modelscope"]
    sft.main(argv)
    printed = capsys.readouterr().out
    assert "还没有从 ModelScope 下载" in printed and "连不上" not in printed
    with pytest.raises(UserError, match="modelscope download --model some/model"):
        sft.main([*argv, "--model", "some/model"])
