"""GRPO 的优势与损失等于 TRL 1.16 的，也算得上手。一整步在 test_grpo_step.py，打分在 test_grpo_rewards.py，脚本在 test_grpo_script.py。"""

import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

G, WIDTH = 3, 6  # 与 conftest.py 的 settings_of 相同

# ---- 优势：与 TRL 的 ----

REWARDS = torch.tensor(
    [[0.0, 1.0, 1.0], [0.6, 0.6, 0.6], [0.1, 0.8, 1.0], [-2.0, 5.0, 0.0]], dtype=torch.float64
).flatten()


@pytest.fixture(scope="module")
def trl_advantages(chat_folder, tmp_path_factory):
    """``trl_advantages(训练器类, 配置类, **设置)`` → TRL 采样一批、用 REWARDS 打分之后给出的优势。"""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    def run(trainer_class, config_class, **changes):
        checkpointing = next(
            n
            for n in ("activation_checkpointing", "gradient_checkpointing")
            if n in config_class.__dataclass_fields__
        )
        config = config_class(
            output_dir=str(tmp_path_factory.mktemp("trl")),
            per_device_train_batch_size=len(REWARDS),
            num_generations=G,
            max_completion_length=2,
            use_cpu=True,
            bf16=False,
            report_to="none",
            disable_tqdm=True,
            **{checkpointing: False},
            **changes,
        )
        prompts = [[{"role": "user", "content": f"第{i}题"}] for i in range(4)]

        def reward(completions, **_):
            return REWARDS.tolist()

        trainer = trainer_class(
            model=AutoModelForCausalLM.from_pretrained(chat_folder, dtype=torch.float32),
            processing_class=AutoTokenizer.from_pretrained(chat_folder),
            reward_funcs=reward,
            args=config,
            train_dataset=Dataset.from_dict({"prompt": prompts}),
        )
        batch = [{"prompt": prompt} for prompt in prompts for _ in range(G)]
        return trainer._generate_and_score_completions(batch)["advantages"]

    return run


@pytest.mark.parametrize(
    ("kind", "name", "changes"),
    [
        ("grpo", "GRPO", {}),
        ("dr_grpo", "GRPO", {"scale_rewards": "none"}),
        ("rloo", "RLOO", {}),
        ("reinforce_pp", "RLOO", {"normalize_advantages": True}),
    ],
)
def test_advantages_equal_trl(grpo, trl_advantages, accelerator, kind, name, changes):
    trl = pytest.importorskip("trl")
    theirs = trl_advantages(getattr(trl, f"{name}Trainer"), getattr(trl, f"{name}Config"), **changes)
    ours = grpo.group_advantages(REWARDS, G, kind, accelerator)
    torch.testing.assert_close(ours.float(), theirs, rtol=0, atol=2e-6)  # TRL 用 float32 算


def test_advantages_by_hand(grpo, accelerator):
    def advantages(rewards, group, kind):
        return grpo.group_advantages(torch.tensor(rewards), group, kind, accelerator).tolist()

    std = math.sqrt(1 / 3)  # 0, 1, 1 的标准差，除以 G−1
    expected = [-2 / 3 / (std + 1e-4), 1 / 3 / (std + 1e-4), 1 / 3 / (std + 1e-4)]
    assert advantages([0.0, 1.0, 1.0], 3, "grpo") == pytest.approx(expected)
    assert advantages([0.0, 1.0, 1.0], 3, "dr_grpo") == pytest.approx([-2 / 3, 1 / 3, 1 / 3])
    assert advantages([0.0, 1.0, 1.0], 3, "rloo") == pytest.approx([-1.0, 0.5, 0.5])
    for kind in ("grpo", "dr_grpo", "rloo"):
        assert advantages([0.6, 0.6], 2, kind) == [0.0, 0.0]


def test_std_erases_the_size_of_a_reward_when_there_are_two(grpo, accelerator):
    """G = 2 时，除以标准差之后总是 ±1/√2：好一点点与好很多没有分别；dr_grpo、rloo 看得见。"""
    close, far = torch.tensor([0.8, 0.9]), torch.tensor([0.0, 1.0])
    near, wide = (grpo.group_advantages(r, 2, "grpo", accelerator) for r in (close, far))
    torch.testing.assert_close(near, wide, rtol=0, atol=2e-3)
    torch.testing.assert_close(near.abs(), torch.full((2,), 1 / math.sqrt(2)), rtol=0, atol=2e-3)
    near, wide = (grpo.group_advantages(r, 2, "rloo", accelerator) for r in (close, far))
    assert wide[1] / near[1] == pytest.approx(10)


# ---- 损失：与 TRL 的 _compute_loss，float64，长短不一 ----


def ragged():
    """→ 新旧 log π、参考的、优势、掩码；五个回答，一个 token 的到写满的都有。"""
    generator = torch.Generator().manual_seed(0)
    old, moved, ref = torch.randn(3, 6, WIDTH, generator=generator, dtype=torch.float64)
    advantages = torch.randn(6, generator=generator, dtype=torch.float64)
    mask = torch.arange(WIDTH) < torch.tensor([1, 3, WIDTH, 2, 5, WIDTH])[:, None]
    logps = (old + 0.3 * moved).requires_grad_()
    return logps, old, old + 0.2 * ref, advantages, mask


def trl_loss(logps, old, ref, advantages, mask, kind, beta, high=0.2):
    """TRL 的 GRPOTrainer._compute_loss 原样，只是 log π 由我们给；gspo 是它的 sequence 级重要性。"""
    from trl import GRPOTrainer

    fake = SimpleNamespace(
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="sequence" if kind == "gspo" else "token",
        loss_type="grpo" if kind == "gspo" else kind,
        beta=beta,
        args=SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1),
        epsilon_low=0.2,
        epsilon_high=5.0 if kind == "cispo" else high,
        use_vllm=False,
        vllm_importance_sampling_correction=False,
        current_gradient_accumulation_steps=1,
        max_completion_length=10,
        accelerator=SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, **_: x),
        model=SimpleNamespace(training=True),
        _entropy_bonus_enabled=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _get_per_token_logps_and_entropies=lambda *_, **__: (logps, torch.zeros_like(logps), None),
    )
    inputs = {
        "prompt_ids": torch.zeros(6, 1),
        "prompt_mask": torch.ones(6, 1),
        "completion_ids": torch.zeros(6, WIDTH),
        "completion_mask": mask.double(),
        "advantages": advantages,
        "old_per_token_logps": old,
        "ref_per_token_logps": ref,
        "num_items_in_batch": mask.sum().double(),
    }
    return GRPOTrainer._compute_loss(fake, fake.model, inputs)


@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("kind", ["grpo", "dapo", "dr_grpo", "gspo", "cispo"])
def test_losses_and_gradients_equal_trl(grpo, kind, beta, settings_of):
    pytest.importorskip("trl")
    both = []
    for side in ("ours", "theirs"):
        logps, old, ref, advantages, mask = ragged()
        if side == "theirs":
            loss = trl_loss(logps, old, ref, advantages, mask, kind, beta, high=0.28)
        else:
            settings = settings_of(clip_range_high=0.28)
            losses, clipped = grpo.token_losses(kind, logps, old, advantages, mask, settings)
            losses = losses + beta * grpo.kl_estimate(logps, ref, "k3")
            sizes = (torch.tensor(6.0, dtype=torch.float64), mask.sum().double())
            loss = (losses * grpo.token_weights(kind, mask.double(), *sizes, 10)).sum()
            assert (clipped & mask).any() or kind == "cispo"
        loss.backward()
        both.append((loss.detach(), logps.grad))
    torch.testing.assert_close(both[0][0], both[1][0], rtol=0, atol=1e-12)
    torch.testing.assert_close(both[0][1], both[1][1], rtol=0, atol=1e-12)
    assert both[0][1].abs().max() > 1e-3


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        # 两个回答，1 个与 3 个 token，A = 1、−1，ρ = 1：一个 token 的损失是 −1，三个的各是 +1
        ("grpo", (-1 + 1) / 2),
        ("dapo", (-1 + 3) / 4),
        ("dr_grpo", (-1 + 3) / (2 * 10)),
        ("gspo", (-1 + 1) / 2),
    ],
)
def test_how_the_losses_average_by_hand(grpo, kind, expected, settings_of):
    mask = torch.tensor([[True, False, False], [True, True, True]])
    logps, advantages = torch.zeros(2, 3), torch.tensor([1.0, -1.0])
    losses, _ = grpo.token_losses(kind, logps, logps, advantages, mask, settings_of())
    weights = grpo.token_weights(kind, mask, torch.tensor(2.0), torch.tensor(4.0), 10)
    assert (losses * weights).sum().item() == pytest.approx(expected, abs=1e-6)
