"""decoding_search.py：束搜索与 transformers 相等，分组束与对比搜索和不用缓存的笨办法相等。"""

import pytest
import torch

from decoding_search import beam_search, contrastive_search, diverse_beam_search
from nlp_common.lm.generation import pad_left, stop_tokens
from nlp_common.tiny import world


@pytest.fixture(scope="module")
def prompts(chat_tokenizer):
    texts = [row["text"][: 10 + 7 * i] for i, row in enumerate(world.documents(5, 0))]
    return [chat_tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]


@pytest.fixture(scope="module")
def stops(model, chat_tokenizer, prompts):
    """结束符之外，再把贪心写出的两个 token 也当作结束：有的路早早写完，有的写到头。"""
    ids = torch.tensor([prompts[0]])
    greedy = beam_search(model, ids, torch.ones_like(ids), 1, 12, [])[0][0].ids
    return [*stop_tokens(chat_tokenizer), greedy[4], greedy[9]]


@pytest.mark.parametrize("num_beams", [1, 2, 4])
@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0])
def test_beam_search_equals_transformers(model, chat_tokenizer, prompts, stops, num_beams, length_penalty):
    """一批几个长短不同的开头；有的路早早写完，有的写到头。"""
    ids, mask = pad_left(prompts, chat_tokenizer.pad_token_id)
    found = beam_search(model, ids, mask, num_beams, 20, stops, length_penalty)
    expected = model.generate(
        input_ids=ids,
        attention_mask=mask,
        num_beams=num_beams,
        num_return_sequences=num_beams,
        do_sample=False,
        max_new_tokens=20,
        length_penalty=length_penalty,
        eos_token_id=stops,
        pad_token_id=chat_tokenizer.pad_token_id,
        return_dict_in_generate=True,
        output_scores=True,
    )
    rows = expected.sequences[:, ids.shape[1] :].tolist()
    lengths = set()
    for i, paths in enumerate(found):
        assert len(paths) == num_beams
        for k, path in enumerate(paths):
            row = rows[i * num_beams + k]
            end = next((j + 1 for j, token in enumerate(row) if token in stops), len(row))
            assert path.ids == row[:end]
            if num_beams > 1:
                assert path.score == pytest.approx(
                    expected.sequences_scores[i * num_beams + k].item(), abs=1e-5
                )
            lengths.add(len(path.ids))
    assert num_beams == 1 or length_penalty == 2 or len(lengths) > 1, (
        "这几个开头没有一个早早写完：测试太容易了"
    )


def test_a_wide_beam_finds_the_best_of_all(model, chat_tokenizer, prompts):
    """束宽到装得下全部两步的路，就是穷举：找到的是概率最大的两个 token。"""
    prompt = prompts[0]
    with torch.no_grad():
        first = model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
        size = len(first)
        rows = torch.tensor([[*prompt, token] for token in range(size)])
        second = model(rows).logits[:, -1].log_softmax(-1)
    total = first[:, None] + second
    ids = torch.tensor([prompt])
    best = beam_search(model, ids, torch.ones_like(ids), size, 2, [], 0.0)[0][0]
    assert best.ids == list(divmod(int(total.argmax()), size))
    assert best.score == pytest.approx(total.max().item(), abs=1e-4)


def naive_diverse(model, prompt, num_beams, num_groups, n, stops, diversity):
    """不用缓存、一条路一次前向的写法。"""
    per_group = num_beams // num_groups
    groups = [[([], 0.0)] for _ in range(num_groups)]
    finished = [[] for _ in range(num_groups)]
    for length in range(1, n + 1):
        used = {}
        for g in range(num_groups):
            candidates = []
            for ids, score in groups[g]:
                with torch.no_grad():
                    logps = model(torch.tensor([prompt + ids])).logits[0, -1].log_softmax(-1).tolist()
                candidates += [
                    (score + logp - diversity * used.get(token, 0), score + logp, [*ids, token])
                    for token, logp in enumerate(logps)
                ]
            candidates.sort(key=lambda each: -each[0])
            kept = []
            for rank, (_, score, ids) in enumerate(candidates):
                if ids[-1] in stops or length == n:
                    if rank < per_group:
                        finished[g].append((score / length, ids))
                elif len(kept) < per_group:
                    kept.append((ids, score))
                if len(kept) == per_group:
                    break
            finished[g] = sorted(finished[g], key=lambda each: -each[0])[:per_group]
            full = len(finished[g]) == per_group
            if full and kept and max(s for _, s in kept) / length <= finished[g][-1][0]:
                kept = []
            groups[g] = kept
            for ids, _ in kept:
                used[ids[-1]] = used.get(ids[-1], 0) + 1
    return [ids for group in finished for _, ids in group]


@pytest.mark.parametrize("diversity", [0.0, 0.5, 5.0])
def test_diverse_beam_search_equals_the_naive_way(model, prompts, stops, diversity):
    found = diverse_beam_search(model, prompts[1], 4, 2, 8, stops, diversity)
    assert [path.ids for path in found] == naive_diverse(model, prompts[1], 4, 2, 8, stops, diversity)


def test_groups_differ_only_with_diversity(model, prompts):
    same = diverse_beam_search(model, prompts[1], 2, 2, 6, [], 0.0)
    assert same[0].ids == same[1].ids
    different = diverse_beam_search(model, prompts[1], 2, 2, 6, [], 100.0)
    assert all(a != b for a, b in zip(different[0].ids, different[1].ids, strict=True))
    one_group = diverse_beam_search(model, prompts[1], 3, 1, 6, [], 1.0)
    ids = torch.tensor([prompts[1]])
    beam = beam_search(model, ids, torch.ones_like(ids), 3, 6, [])[0]
    assert [path.ids for path in one_group] == [path.ids for path in beam]


def naive_contrastive(model, prompt, n, k, alpha):
    ids = list(prompt)
    for _ in range(n):
        with torch.no_grad():
            probs = model(torch.tensor([ids])).logits[0, -1].softmax(-1).topk(k)
            scores = []
            for p, token in zip(probs.values, probs.indices, strict=True):
                hidden = model(torch.tensor([[*ids, int(token)]]), output_hidden_states=True).hidden_states[
                    -1
                ][0]
                cosine = torch.cosine_similarity(hidden[-1:], hidden[:-1]).max()
                scores.append((1 - alpha) * p - alpha * cosine)
        ids.append(int(probs.indices[int(torch.stack(scores).argmax())]))
    return ids[len(prompt) :]


@pytest.mark.parametrize(("k", "alpha"), [(4, 0.6), (3, 0.3), (1, 0.6), (5, 0.0)])
def test_contrastive_search_equals_the_naive_way(model, prompts, k, alpha):
    found = contrastive_search(model, prompts[2], 10, [], k, alpha)
    assert found == naive_contrastive(model, prompts[2], 10, k, alpha)


def test_contrastive_without_penalty_is_greedy(model, prompts):
    ids = torch.tensor([prompts[2]])
    greedy = beam_search(model, ids, torch.ones_like(ids), 1, 10, [])[0][0].ids
    assert contrastive_search(model, prompts[2], 10, [], 4, 0.0) == greedy
