"""speculative.py：贪心逐 token 相同，采样的分布不变（写错一行就检验得出），缓存退得对。"""

import pytest
import torch
from scipy.stats import chisquare

import speculative_decoding as sd
from nlp_common.base.errors import UserError
from nlp_common.lm.chatml import prompt_ids
from nlp_common.lm.generation import stop_tokens
from nlp_common.tiny import world
from speculative import Reader, accept_or_replace, accept_or_resample_p, plain_generate, speculative_generate


def counts_of(accept, p, q, n):
    generator = torch.Generator().manual_seed(0)
    guesses = torch.multinomial(q, n, replacement=True, generator=generator)
    tokens = [accept(int(guess), p, q, generator)[1] for guess in guesses]
    return torch.bincount(torch.tensor(tokens), minlength=len(p))


DISTRIBUTIONS = [
    (torch.tensor([0.5, 0.3, 0.15, 0.05]), torch.tensor([0.1, 0.2, 0.3, 0.4])),
    (torch.tensor([0.25, 0.25, 0.25, 0.25]), torch.tensor([0.97, 0.01, 0.01, 0.01])),
    (torch.tensor([0.7, 0.3, 0.0, 0.0]), torch.tensor([0.0, 0.0, 0.5, 0.5])),  # 没有一个猜得中
]


@pytest.mark.parametrize(("p", "q"), DISTRIBUTIONS)
def test_one_token_has_exactly_the_targets_distribution(p, q):
    n = 6000
    counts = counts_of(accept_or_replace, p, q, n)
    assert counts[p == 0].sum() == 0
    assert chisquare(counts[p > 0].numpy(), (n * p[p > 0]).double().numpy(), sum_check=False).pvalue > 1e-3


def test_resampling_from_p_is_caught():
    p, q = DISTRIBUTIONS[0]
    counts = counts_of(accept_or_resample_p, p, q, 6000)
    assert chisquare(counts.numpy(), (6000 * p).double().numpy(), sum_check=False).pvalue < 1e-6


def test_equal_distributions_are_always_accepted():
    p = torch.tensor([0.2, 0.3, 0.5])
    generator = torch.Generator().manual_seed(0)
    assert all(accept_or_replace(token, p, p, generator) == (True, token) for token in [0, 1, 2] * 50)


@pytest.fixture(scope="module")
def prompts(chat_tokenizer):
    return [prompt_ids(chat_tokenizer, each["messages"]) for each in world.heldout_questions(6, 0)]


@pytest.mark.parametrize("k", [1, 3, 7])
def test_greedy_is_the_same_token_for_token(model, reference, chat_tokenizer, prompts, k):
    stops = set(stop_tokens(chat_tokenizer))
    accepted = checked = 0
    for prompt in prompts:
        plain = plain_generate(Reader(model), prompt, 24, stops)
        fast = speculative_generate(Reader(model), Reader(reference), prompt, 24, stops, k)
        assert fast.ids == plain.ids
        assert fast.forwards <= plain.forwards
        accepted, checked = accepted + fast.accepted, checked + fast.checked
    assert 0 < accepted < checked, "全收下或全不收，测不出回退"


def test_greedy_equals_transformers(model, reference, chat_tokenizer, prompts):
    ids = torch.tensor([prompts[0]])
    stops = stop_tokens(chat_tokenizer)
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=24,
        eos_token_id=stops,
        pad_token_id=chat_tokenizer.pad_token_id,
    )
    fast = speculative_generate(Reader(model), Reader(reference), prompts[0], 24, set(stops), 4)
    assert fast.ids == out[0, ids.shape[1] :].tolist()


def test_a_perfect_draft_writes_k_plus_one_a_forward(model, prompts):
    written = speculative_generate(Reader(model), Reader(model), prompts[0], 20, set(), 4)
    assert written.accepted == written.checked and written.forwards == 4


def test_going_back_leaves_the_same_logits(model, prompts):
    reader = Reader(model)
    with torch.no_grad():
        reader.logits(prompts[0], 1)
        reader.logits([*prompts[0], 5, 6, 7, 8], 5)
        after = reader.logits([*prompts[0], 5, 9], 2)  # 退掉三个，换一个
        expected = model(torch.tensor([[*prompts[0], 5, 9]])).logits[0, -2:]
    torch.testing.assert_close(after, expected, atol=1e-4, rtol=1e-4)


def test_the_joint_distribution_of_three_tokens(model, reference, prompts):
    """两个真的模型：三个 token 的联合分布，频数与精确概率合；写错一行就不合。"""
    settings = sd.SpeculativeSettings(samples=250, temperature=0.35)
    p, cells = sd.chi_square(Reader(model), Reader(reference), prompts[0], settings, accept_or_replace)
    assert cells >= 4 and p > 1e-3


def test_a_draft_with_a_smaller_vocabulary(model, prompts):
    """小模型只认得几个 token：它猜不到的，照样写得出。"""
    size = model.config.vocab_size
    plain = plain_generate(Reader(model), prompts[1], 12, set())
    used = sorted({*plain.ids[:4], 3})
    small_of = torch.zeros(size, dtype=torch.long)
    small_of[torch.tensor(used)] = torch.arange(len(used))

    class Always(torch.nn.Module):  # 永远猜第一个认得的
        device = torch.device("cpu")

        def forward(self, input_ids, past_key_values, use_cache, logits_to_keep):
            logits = torch.zeros(1, logits_to_keep, len(used))
            logits[..., 0] = 1
            return type("Out", (), {"logits": logits, "past_key_values": self})()

        def crop(self, n):
            pass

    draft = Reader(Always(), small_of, torch.tensor(used))
    assert speculative_generate(Reader(model), draft, prompts[1], 12, set(), 3).ids == plain.ids


def test_the_formula_of_the_speedup():
    assert sd.predicted(1.0, 4, 0.0, 1.0) == 5
    assert sd.predicted(0.0, 4, 0.0, 1.0) == 1
    assert sd.predicted(0.5, 2, 0.1, 1.0) == pytest.approx(1.75 / 1.2)


def test_bad_input(tmp_path, base_folder, chat_folder):
    common = ["--output_dir", str(tmp_path / "out"), "--model", str(base_folder)]
    with pytest.raises(UserError, match="--samples"):
        sd.main([*common, "--samples", "5"])
    with pytest.raises(UserError, match="--draft_dim"):
        sd.main([*common, "--draft_dim", "12"])
    with pytest.raises(UserError, match="--k"):
        sd.main([*common, "--k", "0"])


@pytest.mark.slow
def test_the_lesson(tmp_path, chat_folder):
    arguments = ["--model", str(chat_folder), "--preset", "tiny", "--output_dir", str(tmp_path / "out")]
    arguments += [
        "--max_train_samples",
        "200",
        "--n_prompts",
        "2",
        "--samples",
        "200",
        "--max_new_tokens",
        "16",
    ]
    metrics = sd.main(arguments)["metrics"]
    assert metrics["same_greedy"] == 1.0 and {"speedup", "accepted_share", "chi_square_p"} <= set(metrics)
    assert (tmp_path / "out" / "speedup.svg").exists()
