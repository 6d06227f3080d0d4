"""episodes.py：照剧本说话的模型，一局怎样走、哪些 token 是模型说的、各个分怎样数，都用手算的比。"""

import pytest

import episodes as ep
import tool_world as tw
from nlp_common.lm.chatml import prompt_ids
from nlp_common.lm.tool_text import call_text
from tiny_agent import build_base, build_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="module")
def one_of_each():
    return {kind: tw.tasks(1, 3, kinds={kind: 1})[0] for kind in tw.KINDS}


@pytest.fixture
def scripted(tokenizer, monkeypatch):
    """``scripted({题的问话: [第一轮说的, 第二轮说的 …]})``：生成照剧本来，别的照旧。"""

    def install(lines: dict[str, list[str]]):
        spoken = {question: list(turns) for question, turns in lines.items()}

        def generate(model, tokenizer, prompts, max_new_tokens, temperature=0.0, seed=0):
            replies = []
            for prompt in prompts:
                text = tokenizer.decode(prompt)
                question = next(each for each in spoken if f"user\n{each}<|im_end|>" in text)
                line = spoken[question].pop(0)
                end = [] if line.endswith("…") else [tokenizer.convert_tokens_to_ids("<|im_end|>")]
                replies.append(tokenizer(line, add_special_tokens=False)["input_ids"] + end)
            return replies

        monkeypatch.setattr(ep, "generate", generate)

    return install


def right_lines(task: dict) -> list[str]:
    return [*(call_text(step) for step in task["steps"]), task["reply"]]


@pytest.fixture(scope="module")
def model(tokenizer):
    return build_base(tokenizer, 0)


def test_the_right_script_scores_one(scripted, tokenizer, model, one_of_each):
    tasks = list(one_of_each.values())
    scripted({task["question"]: right_lines(task) for task in tasks})
    episodes = ep.play(model, tokenizer, tasks)
    found = ep.measure(episodes)
    for name in (
        "tool_choice",
        "argument_exact",
        "final_accuracy",
        "no_call_when_unneeded",
        "two_step_accuracy",
    ):
        assert found[name] == 1, name
    assert found["valid_calls"] == 1 and found["n"] == len(tasks) and set(found["by_kind"]) == set(tw.KINDS)


def test_scores_by_hand(scripted, tokenizer, model, one_of_each):
    look, sums, talk = (one_of_each[kind] for kind in ("look_up", "calculate", "small_talk"))
    wrong = [{"name": "calculator", "arguments": {"expression": "1+1"}}]
    needless = call_text([{"name": "search", "arguments": {"words": "你好"}}])
    scripted(
        {
            look["question"]: [call_text(look["steps"][0]), "我不知道"],  # 叫对了，答错了
            sums["question"]: [call_text(wrong), sums["reply"]],  # 工具对，参数错，蒙对
            talk["question"]: [needless, talk["reply"]],  # 不该调用
        }
    )
    found = ep.measure(ep.play(model, tokenizer, [look, sums, talk]))
    assert found["tool_choice"] == 1 and found["argument_exact"] == 0.5
    assert found["final_accuracy"] == pytest.approx(2 / 3) and found["no_call_when_unneeded"] == 0
    assert found["valid_calls"] in (1, pytest.approx(2 / 3))  # 寒暄的题不一定列着 search


def test_what_the_model_said_and_what_it_did_not(scripted, tokenizer, model, one_of_each):
    """ids 就是整段对话的 token；spoken 是 1 的，拼起来正是模型的话，工具的结果一个 token 也不在内。"""
    task = one_of_each["two_step"]
    scripted({task["question"]: right_lines(task)})
    [episode] = ep.play(model, tokenizer, [task])
    assert len(episode.ids) == len(episode.spoken)
    said = tokenizer.decode([i for i, spoken in zip(episode.ids, episode.spoken, strict=True) if spoken])
    assert said == "".join(line + "<|im_end|>" for line in right_lines(task))
    whole = prompt_ids(tokenizer, episode.messages)  # 最后多出 "\n<|im_start|>assistant\n"
    assert whole[: len(episode.ids)] == episode.ids
    results = [tw.run_tool(task, call) for step in task["steps"] for call in step]
    assert [m["content"] for m in episode.messages if m["role"] == "tool"] == results


def test_a_broken_call_goes_back_to_the_model(scripted, tokenizer, model, one_of_each):
    task = one_of_each["look_up"]
    scripted({task["question"]: ['<tool_call>\n{"name": \n</tool_call>', *right_lines(task)]})
    [episode] = ep.play(model, tokenizer, [task])
    told = next(m["content"] for m in episode.messages if m["role"] == "tool")
    assert told.startswith(tw.ERROR) and tw.is_right(task, episode.answer)
    assert ep.measure([episode])["valid_calls"] == 0.5 and ep.measure([episode])["argument_exact"] == 0


def test_not_finished_is_no_answer(scripted, tokenizer, model, one_of_each):
    task, again = one_of_each["look_up"], one_of_each["search"]
    scripted({task["question"]: ["小刚…"], again["question"]: [call_text(again["steps"][0])] * 9})
    cut, looping = ep.play(model, tokenizer, [task, again], most_turns=3)
    assert cut.answer is None and looping.answer is None and len(looping.calls) == 3


def test_too_long_an_episode_stops(scripted, tokenizer, model, one_of_each):
    task = one_of_each["search"]
    scripted({task["question"]: right_lines(task)})
    [episode] = ep.play(model, tokenizer, [task], tool=lambda task, call: "很长" * 2000)
    assert episode.answer is None and len(episode.calls) == 1


def test_a_real_model_plays(tokenizer, model, one_of_each):
    """没训练过的模型说的是胡话，也走得完；同一种子一样。"""
    tasks = list(one_of_each.values())
    first, second = (ep.play(model, tokenizer, tasks, temperature=1.0, seed=1) for _ in range(2))
    assert [e.ids for e in first] == [e.ids for e in second]
    assert ep.measure(first)["argument_exact"] == 0
