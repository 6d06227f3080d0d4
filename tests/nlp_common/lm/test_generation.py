"""生成：左填充的一批与一个一个地生成相同，与 transformers 的 generate 相同；采样、停止、KL 都对。"""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from transformers import TopPLogitsWarper

from nlp_common.lm.chatml import prompt_ids
from nlp_common.lm.generation import generate, pad_left, pick_next, stop_tokens, stream_tokens
from nlp_common.lm.replies import reply_to, score_replies, token_kl
from nlp_common.tiny import world

LENGTH = 20


@pytest.fixture(scope="module")
def prompts(chat_tokenizer):
    """12 个提示，长短不一，单轮追问都有，也有极短的。"""
    rows = [prompt_ids(chat_tokenizer, q["messages"]) for q in world.questions(10, 3)]
    rows += [prompt_ids(chat_tokenizer, [{"role": "user", "content": "你好"}]), [rows[0][0]]]
    assert len({len(row) for row in rows}) > 5
    return rows


def probabilities(logits, **kwargs) -> torch.Tensor:
    """pick_next 抽 20000 次的频率。"""
    generator = torch.Generator().manual_seed(0)
    picked = pick_next(logits.expand(20_000, -1), generator=generator, **kwargs)
    return torch.bincount(picked, minlength=logits.shape[-1]) / 20_000


# ---- 贪心 ----


def test_left_padded_batch_equals_one_by_one(model, chat_tokenizer, prompts):
    batch = generate(model, chat_tokenizer, prompts, LENGTH)
    alone = [generate(model, chat_tokenizer, [prompt], LENGTH)[0] for prompt in prompts]
    assert batch == alone
    assert generate(model, chat_tokenizer, prompts, LENGTH, batch_size=5) == alone
    assert generate(model, chat_tokenizer, prompts[::-1], LENGTH) == alone[::-1]
    assert len({len(reply) for reply in alone}) > 2  # 一批里有先说完的，也有后说完的


def test_greedy_equals_transformers_generate(model, chat_tokenizer, prompts):
    stops, pad_id = stop_tokens(chat_tokenizer), chat_tokenizer.pad_token_id
    ids, mask = pad_left(prompts, pad_id)
    out = model.generate(
        input_ids=ids,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=LENGTH,
        eos_token_id=stops,
        pad_token_id=pad_id,
    )
    for ours, theirs in zip(
        generate(model, chat_tokenizer, prompts, LENGTH), out[:, ids.shape[1] :].tolist(), strict=True
    ):
        assert theirs[: len(ours)] == ours
        assert set(theirs[len(ours) :]) <= {pad_id}


def test_greedy_equals_a_loop_without_cache(model, chat_tokenizer, prompts):
    stops = stop_tokens(chat_tokenizer)
    for prompt in prompts[-4:]:
        ids = list(prompt)
        while len(ids) < len(prompt) + LENGTH:
            with torch.no_grad():
                ids.append(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item())
            if ids[-1] in stops:
                break
        assert generate(model, chat_tokenizer, [prompt], LENGTH) == [ids[len(prompt) :]]


def test_generate_leaves_the_training_flag_alone(model, chat_tokenizer, prompts):
    for training in (True, False):
        net = copy.deepcopy(model).train(training)
        generate(net, chat_tokenizer, prompts[:1], 2)
        assert net.training is training


# ---- 停止 ----


class Scripted(torch.nn.Module):
    """按剧本说话的模型：第 i 行依次说出 scripts[i]，不管输入是什么。"""

    def __init__(self, scripts: list[list[int]], vocab: int):
        super().__init__()
        self.scripts, self.vocab, self.calls = scripts, vocab, []
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, input_ids, past_key_values=None, **kwargs):
        self.calls.append({"input_ids": input_ids, **kwargs})
        step = past_key_values or 0
        logits = torch.zeros(len(input_ids), 1, self.vocab)
        for row, script in enumerate(self.scripts):
            logits[row, 0, script[step]] = 1e4
        return SimpleNamespace(logits=logits, past_key_values=step + 1)


def test_stop_tokens_are_the_chat_end_and_the_document_end(tokenizer, chat_tokenizer):
    end, document_end = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert stop_tokens(tokenizer) == sorted([end, document_end])  # 基座：eos 是文档的结束
    assert stop_tokens(chat_tokenizer) == [end]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_each_row_stops_at_its_own_end(chat_tokenizer, temperature):
    (end,), pad_id = stop_tokens(chat_tokenizer), chat_tokenizer.pad_token_id
    scripts = [[end, 7, 7, 7, 7], [5, 6, end, 7, 7], [5, 6, 7, 8, 9], [5, end, 5, end, 5]]
    net = Scripted(scripts, len(chat_tokenizer))
    replies = generate(net, chat_tokenizer, [[3], [3], [3], [3]], 5, temperature=temperature)
    assert replies == [[end], [5, 6, end], [5, 6, 7, 8, 9], [5, end]]
    ids, mask = pad_left([[3], [3, 3]], pad_id)
    net = Scripted([[5, end, 7, 7, 7], [end, 7, 7, 7, 7]], len(chat_tokenizer))
    columns = list(stream_tokens(net, ids, mask, 5, [end], pad_id))
    assert torch.stack(columns, 1).tolist() == [[5, end], [end, pad_id]]  # 全都说完就不再往下算
    assert len(net.calls) == 2


def test_positions_do_not_count_padding(chat_tokenizer):
    net = Scripted([[5, 6, 7]] * 2, len(chat_tokenizer))
    ids, mask = pad_left([[3], [3, 4, 5]], chat_tokenizer.pad_token_id)
    assert ids.tolist()[0][-1] == 3 and mask.tolist() == [[0, 0, 1], [1, 1, 1]]
    list(stream_tokens(net, ids, mask, 3, stop_tokens(chat_tokenizer), chat_tokenizer.pad_token_id))
    positions = [call["position_ids"].tolist() for call in net.calls]
    assert [row[-1] for row, _ in positions] == [0, 1, 2] and positions[0][0] == [0, 0, 0]
    assert [row for _, row in positions] == [[0, 1, 2], [3], [4]]
    assert net.calls[2]["attention_mask"].tolist() == [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]
    assert [call["input_ids"].shape[1] for call in net.calls] == [3, 1, 1]  # 有缓存，只送新 token


def test_reply_to_hides_stop_tokens_and_reports_the_end(chat_tokenizer):
    (end,) = stop_tokens(chat_tokenizer)
    said = chat_tokenizer("你好。")["input_ids"]
    net = Scripted([[*said, end], [*said, *said]], len(chat_tokenizer))
    questions = [{"messages": [{"role": "user", "content": "问"}]}] * 2
    first, second = reply_to(net, chat_tokenizer, questions, max_new_tokens=4)
    assert first == {"text": "你好。", "ids": [*said, end], "ended": True}
    assert second["ended"] is False and second["ids"] == [*said, said[0]]


def test_document_end_is_not_the_chat_end(tokenizer):
    """基座模型以 <|endoftext|> 结束的，不算把话说完。"""
    said = tokenizer("好")["input_ids"]
    net = Scripted([[*said, tokenizer.eos_token_id]], len(tokenizer))
    (reply,) = reply_to(net, tokenizer, [{"messages": [{"role": "user", "content": "问"}]}], 4)
    assert reply["text"] == "好" and not reply["ended"]


# ---- 采样 ----


def test_temperature_zero_is_argmax():
    logits = torch.tensor([[0.1, 3.0, 2.9], [5.0, -1.0, 4.0]])
    assert pick_next(logits, 0).tolist() == [1, 0]
    assert pick_next(logits, 0, top_p=0.1).tolist() == [1, 0]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_sampling_frequencies_follow_the_softmax(temperature):
    logits = torch.tensor([[1.0, 0.0, -1.0, 2.0]])
    weights = [math.exp(x / temperature) for x in logits[0].tolist()]
    expected = torch.tensor([w / sum(weights) for w in weights])
    torch.testing.assert_close(probabilities(logits, temperature=temperature), expected, rtol=0, atol=0.015)


@pytest.mark.parametrize(
    "top_p, expected",
    [
        (0.2, [0, 1, 0, 0]),  # 最可能的一个总在
        (0.45, [0, 1, 0, 0]),
        (0.55, [0, 5 / 8, 3 / 8, 0]),  # 0.5 不够，补上 0.3
        (0.79, [0, 5 / 8, 3 / 8, 0]),  # 0.5 + 0.3 已够
        (0.81, [3 / 19, 10 / 19, 6 / 19, 0]),  # 再补 0.15
        (0.96, [0.15, 0.5, 0.3, 0.05]),
        (1.0, [0.15, 0.5, 0.3, 0.05]),
    ],
)
def test_top_p_by_hand(top_p, expected):
    logits = torch.tensor([[0.15, 0.5, 0.3, 0.05]]).log()
    found = probabilities(logits, temperature=1.0, top_p=top_p)
    torch.testing.assert_close(found, torch.tensor(expected).float(), rtol=0, atol=0.015)
    assert (found == 0).tolist() == [p == 0 for p in expected]


def test_top_p_keeps_the_same_tokens_as_transformers():
    generator = torch.Generator().manual_seed(8)
    for _ in range(20):
        logits = 2 * torch.randn(1, 12, generator=generator)
        kept = TopPLogitsWarper(0.7)(None, logits)[0] > -math.inf
        assert torch.equal(probabilities(logits, temperature=1.0, top_p=0.7) > 0, kept) or (
            logits.softmax(-1)[0][kept].min() < 1e-3  # 太少见，20000 次里碰巧没抽到
        )


def test_rows_are_sampled_independently_and_without_temperature_mixing():
    logits = torch.tensor([[0.0, 1e4, 0.0], [1e4, 0.0, 0.0], [0.0, 0.0, 1e4]])
    assert pick_next(logits, 1.0, top_p=0.5).tolist() == [1, 0, 2]


def test_sampling_is_determined_by_the_seed(model, chat_tokenizer, prompts):
    first = generate(model, chat_tokenizer, prompts, LENGTH, temperature=1.0, seed=1)
    torch.manual_seed(999)  # 与全局随机数无关
    assert first == generate(model, chat_tokenizer, prompts, LENGTH, temperature=1.0, seed=1)
    assert first != generate(model, chat_tokenizer, prompts, LENGTH, temperature=1.0, seed=2)
    state = torch.get_rng_state()
    generate(model, chat_tokenizer, prompts, LENGTH, temperature=1.0, seed=1)
    assert torch.equal(torch.get_rng_state(), state)


def test_first_sampled_token_follows_the_model(model, chat_tokenizer, prompts):
    """同一个提示采很多次，第一个 token 的频率就是模型给的概率。"""
    prompt = prompts[-2]
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([prompt])).logits[0, -1].softmax(-1)
    replies = generate(model, chat_tokenizer, [prompt] * 4000, 1, temperature=1.0, batch_size=4000)
    found = torch.bincount(torch.tensor(replies).flatten(), minlength=len(expected)) / 4000
    likely = expected.topk(5).indices
    torch.testing.assert_close(found[likely], expected[likely], rtol=0, atol=0.025)
    assert expected[likely[0]] > 0.03


# ---- 在回复上量 ----


@pytest.fixture(scope="module")
def answered(model, chat_tokenizer):
    questions = world.heldout_questions(7, 2)
    replies = reply_to(model, chat_tokenizer, questions, LENGTH, temperature=1.0)
    assert len({len(reply["ids"]) for reply in replies}) > 1
    return questions, replies


def test_token_kl_equals_an_explicit_sum(model64, reference64, chat_tokenizer, answered):
    questions, replies = answered
    total, count = 0.0, 0
    for question, reply in zip(questions, replies, strict=True):
        prompt = prompt_ids(chat_tokenizer, question["messages"])
        with torch.no_grad():
            p, q = (
                net(input_ids=torch.tensor([prompt + reply["ids"]])).logits[0]
                for net in (model64, reference64)
            )
        for t in range(len(reply["ids"])):
            log_p, log_q = (x[len(prompt) + t - 1] - x[len(prompt) + t - 1].exp().sum().log() for x in (p, q))
            total += sum(math.exp(a) * (a - b) for a, b in zip(log_p.tolist(), log_q.tolist(), strict=True))
            count += 1
    kl = token_kl(copy.deepcopy(model64), reference64, chat_tokenizer, questions, replies)
    assert kl == pytest.approx(total / count, abs=1e-5) and kl > 1e-3
    assert kl == pytest.approx(
        token_kl(copy.deepcopy(model64), reference64, chat_tokenizer, questions, replies, batch_size=3),
        abs=1e-6,
    )
    same = token_kl(copy.deepcopy(model64), copy.deepcopy(model64), chat_tokenizer, questions, replies)
    assert same == 0


def test_score_replies_equals_scoring_one_by_one(reward64, chat_tokenizer, answered):
    """奖励模型训练时没见过结束符，打分时也不给它看。"""
    questions, replies = answered
    scores = score_replies(reward64, chat_tokenizer, questions, replies, batch_size=4)
    assert scores.shape == (7,) and scores.std() > 1e-2
    stops = stop_tokens(chat_tokenizer)
    for question, reply, score in zip(questions, replies, scores.tolist(), strict=True):
        said = [i for i in reply["ids"] if i not in stops]
        ids = torch.tensor([prompt_ids(chat_tokenizer, question["messages"]) + said])
        with torch.no_grad():
            hidden = reward64.model(input_ids=ids).last_hidden_state[0, -1]
        # 左填充的行位置整体后移：旋转位置编码只看相对位置，结果只差 float32 的舍入
        assert score == pytest.approx((hidden @ reward64.score.weight[0]).item(), abs=1e-4)
