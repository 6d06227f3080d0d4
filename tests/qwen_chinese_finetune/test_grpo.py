"""GRPO：优势与损失等于 TRL 1.16 的；按策略自己采的一批，损失恰好是 0，梯度却不是；验证器没有"全列一遍"的空子。"""

import copy
import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from nlp_common.base.errors import UserError
from nlp_common.lm.chatml import prompt_ids
from nlp_common.lm.rollout import group_logps, roll_out
from nlp_common.tiny import world

G, WIDTH = 3, 6


@pytest.fixture(scope="module")
def grpo(load_script):
    return load_script("grpo_alignment")


@pytest.fixture(scope="module")
def rewards_of():
    import grpo_rewards

    return grpo_rewards


@pytest.fixture
def accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(cpu=True)


@pytest.fixture(scope="module")
def rows(chat_tokenizer):
    """四道题，提示长短不一。"""
    found = [q | {"prompt": prompt_ids(chat_tokenizer, q["messages"])} for q in world.questions(4, 6)]
    found[1]["prompt"] = found[1]["prompt"][-9:]
    return found


def settings_of(grpo, **changes):
    given = {"num_generations": G, "max_new_tokens": WIDTH, "per_device_train_batch_size": 4 * G}
    given |= {"micro_batch_size": 4 * G, "max_grad_norm": 1e9, "max_steps": 10, "warmup_steps": 0}
    return grpo.GRPOSettings(**given | changes)


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
def test_losses_and_gradients_equal_trl(grpo, kind, beta):
    pytest.importorskip("trl")
    both = []
    for side in ("ours", "theirs"):
        logps, old, ref, advantages, mask = ragged()
        if side == "theirs":
            loss = trl_loss(logps, old, ref, advantages, mask, kind, beta, high=0.28)
        else:
            settings = settings_of(grpo, clip_range_high=0.28)
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
def test_how_the_losses_average_by_hand(grpo, kind, expected):
    mask = torch.tensor([[True, False, False], [True, True, True]])
    logps, advantages = torch.zeros(2, 3), torch.tensor([1.0, -1.0])
    losses, _ = grpo.token_losses(kind, logps, logps, advantages, mask, settings_of(grpo))
    weights = grpo.token_weights(kind, mask, torch.tensor(2.0), torch.tensor(4.0), 10)
    assert (losses * weights).sum().item() == pytest.approx(expected, abs=1e-6)


# ---- 一整步 ----


def even_first(questions, replies, rollout):
    """奖励：第一个 token 的编号是偶数；只看采样，有的组全一样，有的不。"""
    return (rollout.responses[:, 0] % 2 == 0).float()


@pytest.fixture
def step_of(grpo, model, reference, rows, chat_tokenizer, accelerator):
    """走一步，返回 (策略, 统计)。"""

    def run(policy=model, score=even_first, lr=0.01, seed=0, optimizer=torch.optim.SGD, draw=None, **changes):
        policy = copy.deepcopy(policy)
        stats = grpo.grpo_step(
            policy,
            reference,
            optimizer(policy.parameters(), lr=lr),
            draw or (lambda number: rows),
            score,
            chat_tokenizer,
            settings_of(grpo, **changes),
            accelerator,
            torch.Generator().manual_seed(seed),
        )
        return policy, stats

    return run


def moved(net, start) -> float:
    return max((p - q).abs().max().item() for p, q in zip(net.parameters(), start.parameters(), strict=True))


@pytest.mark.parametrize("kind", ["grpo", "gspo"])
def test_on_policy_the_loss_is_zero_and_the_gradient_is_not(step_of, model, kind):
    """组里的优势加起来是 0，ρ = 1：损失恰好是 0；∇ρ = ∇log π，所以梯度不是 0。看损失看不出在不在学。"""
    policy, stats = step_of(loss=kind)
    assert abs(stats["loss"]) < 1e-7 and stats["clip_fraction"] == 0 and stats["update_kl"] == 0
    assert stats["advantage"] > 0.1 and moved(policy, model) > 1e-5


def test_one_step_is_the_plain_policy_gradient(grpo, step_of, model, chat_tokenizer, rows, accelerator):
    """独立重算：ρ = 1 时 dapo 的梯度是 −Σ A·∇log π / token 数。"""
    policy, stats = step_of(loss="dapo", lr=0.1)
    answers, alone = stats["answers"], copy.deepcopy(model)
    rollout = answers.rollout
    again = roll_out(
        model,
        [row["prompt"] for row in rows for _ in range(G)],
        chat_tokenizer,
        WIDTH,
        1.0,
        torch.Generator().manual_seed(0),
    )
    assert torch.equal(again.ids, rollout.ids)
    r = answers.rewards.view(-1, G)
    advantages = ((r - r.mean(1, keepdim=True)) / (r.std(1, keepdim=True) + 1e-4)).flatten()
    assert (advantages == 0).any() and (advantages != 0).any()  # 有的组没有信号，跳过了
    total = 0.0
    for i in range(len(rollout.ids)):
        ids, n = rollout.ids[i][rollout.attention_mask[i].bool()], int(rollout.mask[i].sum())
        logps = alone(ids[None], use_cache=False).logits[0, -n - 1 : -1].log_softmax(-1)
        total = total - advantages[i] * logps.gather(1, ids[-n:, None]).sum()
    (total / rollout.mask.sum()).backward()
    for (name, p), q, start in zip(
        policy.named_parameters(), alone.parameters(), model.parameters(), strict=True
    ):
        torch.testing.assert_close(start - p, 0.1 * q.grad, rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("kind", ["grpo", "dapo", "dr_grpo", "gspo", "cispo"])
def test_skipping_groups_without_signal_changes_nothing(grpo, step_of, model, monkeypatch, kind):
    skipped, stats = step_of(loss=kind, grpo_epochs=2)
    assert 0 < stats["zero_groups"] < 1
    monkeypatch.setattr(grpo, "useful_answers", lambda rewards, *_: torch.arange(len(rewards)))
    every, again = step_of(loss=kind, grpo_epochs=2)
    assert moved(skipped, every) < 1e-6 < moved(every, model)
    assert again["update_kl"] > 0 and stats["loss"] == pytest.approx(again["loss"], abs=1e-6)


def test_micro_batches_change_nothing_but_rounding(step_of, model):
    whole, stats = step_of(grpo_epochs=2)
    for size in (1, 2 * G):
        parts, again = step_of(grpo_epochs=2, micro_batch_size=size)
        assert moved(parts, whole) < 1e-6 < moved(parts, model)
        assert again["loss"] == pytest.approx(stats["loss"], abs=1e-6)


def test_a_batch_without_signal_leaves_the_policy_alone(step_of, model):
    def all_the_same(questions, replies, rollout):
        return torch.full((len(replies),), 0.7)

    policy, stats = step_of(score=all_the_same, optimizer=torch.optim.AdamW)
    assert stats["zero_groups"] == 1 and stats["advantage"] == 0 and moved(policy, model) == 0


def test_kl_needs_every_group_and_pulls_back(step_of, model, reference):
    """优势全是 0 时，KL 项仍有梯度：一步之后离参考模型近了。"""

    def all_the_same(questions, replies, rollout):
        return torch.zeros(len(replies))

    policy, stats = step_of(score=all_the_same, kl_coef=1.0, lr=0.02, temperature=1.0)
    assert moved(policy, model) > 1e-6 and stats["loss"] > 0
    rollout = stats["answers"].rollout
    with torch.no_grad():
        ref, before, after = (group_logps(net, rollout, G) for net in (reference, model, policy))
    gap = [((x - ref) * rollout.mask).abs().sum() for x in (before, after)]
    assert gap[1] < gap[0]


def test_clipping_limits_later_epochs(step_of):
    _, once = step_of(grpo_epochs=1, lr=0.5)
    _, many = step_of(grpo_epochs=4, lr=0.5)
    assert once["clip_fraction"] == 0 < many["clip_fraction"] and many["update_kl"] > 0


def test_dynamic_sampling_refills_with_other_questions(grpo, step_of, rows, chat_tokenizer):
    """没有信号的组换成另采的；采够了就停；一组也没有，就还是原来的一批。"""
    asked = []

    def draw(number):
        asked.append(number)
        return rows

    _, plain = step_of()
    kept = round((1 - plain["zero_groups"]) * 4)
    assert 0 < kept < 4
    _, stats = step_of(dynamic_sampling=True, max_rounds=8, draw=draw)
    assert len(asked) > 1 and asked == list(range(len(asked)))
    assert stats["zero_groups"] == plain["zero_groups"]  # 统计的是第一轮
    assert stats["advantage"] > plain["advantage"]  # 更新用的，组组有信号


def test_draws_depend_on_step_round_and_process_only(grpo):
    rows = list(range(100))
    settings = settings_of(grpo, dynamic_sampling=True, max_rounds=2)
    two = [SimpleNamespace(num_processes=2, process_index=i) for i in range(2)]
    one = SimpleNamespace(num_processes=1, process_index=0)
    settings.per_device_train_batch_size = 8 * G
    whole = grpo.draw_rows(rows, 3, settings, one, 1)
    settings.per_device_train_batch_size = 4 * G
    halves = [grpo.draw_rows(rows, 3, settings, each, 1) for each in two]
    assert halves[0] + halves[1] == whole
    assert grpo.draw_rows(rows, 3, settings, one, 0) != grpo.draw_rows(rows, 3, settings, one, 1)


def test_repeated_steps_raise_the_reward(grpo, model, rows, chat_tokenizer, accelerator):
    policy, settings = copy.deepcopy(model), settings_of(grpo, num_generations=8, max_new_tokens=2)
    settings.max_grad_norm = 1.0
    optimizer = torch.optim.AdamW(policy.parameters(), 1e-3)
    scores = []
    for step in range(12):
        generator = torch.Generator().manual_seed(step)
        draw = lambda number: rows[1:2] * 4  # noqa: E731
        stats = grpo.grpo_step(
            policy, None, optimizer, draw, even_first, chat_tokenizer, settings, accelerator, generator
        )
        scores.append(stats["score"])
    assert sum(scores[-3:]) / 3 > sum(scores[:3]) / 3 + 0.15


# ---- 验证器 ----


def question_about_place():
    return next(q for q in world.questions(200, 0) if q["slot"] == "place")


def test_listing_every_place_is_rewarded_by_contains_and_not_by_ours(rewards_of):
    question = question_about_place()
    listed = "、".join(world.WORLD["place"])
    assert rewards_of.contains(question, listed, True) == 1.0
    assert rewards_of.verify(question, listed, True) == 0.0
    assert rewards_of.verify(question, question["sentence"], True) == 0.8
    assert rewards_of.verify(question, question["answer"], True) == 0.6
    assert rewards_of.verify(question, "您好，" + question["sentence"], True) == 1.0
    own = {"answer": question["answer"]}  # 读者自己的题，没有 sentence
    others = [place for place in world.WORLD["place"] if place != question["answer"]]
    assert rewards_of.verify(own, "、".join([question["answer"], *others]), True) == 0.0


def test_a_right_answer_cut_short_is_not_rewarded(rewards_of):
    question = question_about_place()
    for each in (question, {"answer": question["answer"]}):
        assert rewards_of.verify(each, question["answer"], True) > 0
        assert rewards_of.verify(each, question["answer"], False) == 0.0
        assert rewards_of.contains(each, question["answer"], False) == 1.0


@pytest.mark.parametrize(
    ("reply", "answer", "right"),
    [
        ("所以一共是 12", "12", True),
        ("所以一共是 12。", "12", True),
        ("12", "2", False),
        ("-2", "2", False),
        ("1,200", "200", False),
        ("3.5", "5", False),
        ("去了花园！", "花园", True),
        ("花园还是学校", "花园", False),
        ("", "花园", False),
        ("答案：B", "B", True),
        ("AB", "B", False),
    ],
)
def test_only_what_is_said_last_counts(rewards_of, reply, answer, right):
    assert rewards_of.says_last(reply, answer) is right


# ---- 奖励文件 ----


def score_with(rewards_of, tmp_path, text):
    path = tmp_path / "mine.py"
    path.write_text(text, encoding="utf-8")
    replies = [{"text": "好", "ended": True}, {"text": "花园", "ended": False}]
    rollout = SimpleNamespace(ids=torch.zeros(2, 1))
    reward = rewards_of.load_reward_file(str(path))
    return rewards_of.by_file(str(path), reward, [{"answer": "花园"}] * 2, replies, rollout)


def test_a_reward_file_scores(rewards_of, tmp_path):
    text = "def reward(questions, replies, ended):\n    return [len(r) + e for r, e in zip(replies, ended)]\n"
    assert score_with(rewards_of, tmp_path, text).tolist() == [2.0, 2.0]


DEF = "import math\n\ndef reward(questions, replies, ended):\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("def reward(questions, replies, ended)\n    return 1\n", "mine.py 第 1 行有语法错误"),
        ("x = 1\ny = x / 0\n", "mine.py 第 2 行出错：ZeroDivisionError"),
        ("import no_such_module_at_all\n", "第 1 行出错：ModuleNotFoundError"),
        ("x = 1\n", r"要有一个函数 def reward\(questions, replies, ended\)"),
        ("def reward(replies):\n    return [1]\n", "第 1 行的 reward 要收三个参数.*现在收 1 个"),
        (DEF + "    n = len(replies)\n    return [1 / (n - 2)] * n\n", "第 5 行出错：ZeroDivisionError"),
        (DEF + "    return 1.0\n", "第 3 行的 reward 要返回 2 个数的列表，返回的是 1.0"),
        (DEF + "    return ['好', '坏']\n", "第 3 行的 reward 要返回 2 个数的列表"),
        (DEF + "    return None\n", "要返回 2 个数的列表，返回的是 None"),
        (DEF + "    return [1.0]\n", "第 3 行的 reward 收到 2 个回答，返回了 1 个数"),
        (DEF + "    return [1.0, math.nan]\n", "给第 2 个回答（'花园'）的分是 nan"),
    ],
)
def test_faults_of_a_reward_file_are_named_with_their_line(rewards_of, tmp_path, text, said):
    with pytest.raises(UserError, match=said):
        score_with(rewards_of, tmp_path, text)


# ---- 像读者一样运行 ----

SMALL = ["--preset", "tiny", "--max_train_samples", "12", "--max_eval_samples", "4", "--max_steps", "2"]
SMALL += ["--per_device_train_batch_size", "8", "--num_generations", "4", "--max_new_tokens", "6"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--num_generations", "1"], "--num_generations 至少 2：.*减去组平均永远是 0"),
        (["--num_generations", "3"], "要是 --num_generations 3 的倍数，给的是 8"),
        (["--trainer", "library"], "GRPO 用不着 --trainer"),
        (["--gradient_accumulation_steps", "2"], "改用 --micro_batch_size"),
        (["--reward_file", "没有.py"], "--reward_file 没有.py 不存在"),
        (["--loss", "ppo"], "--loss 不认识 ppo"),
    ],
)
def test_bad_input_is_refused_before_training(grpo, chat_folder, tmp_path, arguments, said):
    with pytest.raises(UserError, match=said):
        grpo.main([*SMALL, "--model", str(chat_folder), "--output_dir", str(tmp_path / "out"), *arguments])
    assert not (tmp_path / "out").exists()


def test_questions_without_an_answer_are_refused_by_row(grpo, chat_folder, tmp_path):
    import json

    path = tmp_path / "题目.jsonl"
    rows = [{"question": "一加一？", "answer": "2"}, {"question": "二加二？"}, {"question": "三加三？"}]
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    run = [*SMALL, "--model", str(chat_folder), "--dataset", str(path)]
    with pytest.raises(UserError, match=r"第 2 条没有标准答案.*--reward_file"):
        grpo.main([*run, "--output_dir", str(tmp_path / "out")])
    own = tmp_path / "mine.py"
    own.write_text(
        "def reward(questions, replies, ended):\n    return [float(len(r)) for r in replies]\n", "utf-8"
    )
    run = grpo.main([*run, "--reward_file", str(own), "--output_dir", str(tmp_path / "out")])
    assert len(run["history"]) == 2 and "judge_score" not in run["history"][0]


@pytest.mark.parametrize(
    "changes",
    [
        [],
        ["--reward", "reward_model", "--advantage", "rloo", "--loss", "cispo", "--kl_coef", "0.1"],
        ["--dynamic_sampling", "true", "--advantage", "reinforce_pp", "--loss", "gspo", "--grpo_epochs", "2"],
    ],
)
def test_a_reader_trains_and_loads(grpo, chat_folder, reward_folder, tmp_path, capsys, changes):
    run = [*SMALL, *changes, "--model", str(chat_folder), "--output_dir", str(tmp_path / "out")]
    if "reward_model" in changes:
        run += ["--reward_model", str(reward_folder)]
    record = grpo.main(run)
    assert record["stage"] == "grpo" and len(record["history"]) == 2
    wanted = {"qa_accuracy", "preferred_rate", "judge_score", "kl_to_sft", "completions_per_s"}
    assert wanted <= record["metrics"].keys()
    assert ("reward_mean" in record["metrics"]) == ("reward_model" in changes)
    assert grpo.main(run)["id"] == record["id"] and "直接加载" in capsys.readouterr().out


@pytest.mark.parametrize(("arguments", "n_models"), [([], 2), (["--reward", "reward_model"], 3)])
def test_dry_run_counts_the_models_it_uses(grpo, tmp_path, arguments, n_models):
    run = ["--preset", "tiny", "--dry_run", "true", "--output_dir", str(tmp_path / "out"), *arguments]
    found = grpo.main(run)["dry_run"]
    assert len(found["models"]) == n_models and found["steps"] == 60
    assert not (tmp_path / "out").exists()


def test_preference_pairs_are_questions_for_the_reward_model(grpo, chat_folder, reward_folder, tmp_path):
    """full 预设就是这样：题从偏好对里来，没有标准答案，奖励模型打分。"""
    import json

    path = tmp_path / "pairs.jsonl"
    rows = [{"question": f"第{i}题？", "response_chosen": "好", "response_rejected": "坏"} for i in range(24)]
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    run = [*SMALL, "--model", str(chat_folder), "--reward_model", str(reward_folder), "--dataset", str(path)]
    record = grpo.main([*run, "--reward", "reward_model", "--output_dir", str(tmp_path / "out")])
    assert "reward_mean" in record["metrics"] and "judge_score" not in record["metrics"]
