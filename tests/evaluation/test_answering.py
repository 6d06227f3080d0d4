"""被评的是谁：名字、模型、题目给人看的样子。"""

import pytest

import answering
from nlp_common.base.errors import UserError


def test_model_names(monkeypatch):
    assert answering.split_names("sft， dpo,") == ["sft", "dpo"]
    with pytest.raises(UserError, match="没有模型"):
        answering.split_names(" , ")
    with pytest.raises(UserError, match="sft 写了不止一次"):
        answering.split_names("sft,dpo,sft")
    with pytest.raises(UserError, match="只会打分"):
        answering.find_answerer("reward")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(
        UserError, match=r"nosuch 不是链的阶段（.*sft.*）、smollm2 或本地文件夹；当作 hub 名，也得不到"
    ):
        answering.find_answerer("nosuch")


def test_a_folder_answers(chat_folder):
    answerer = answering.load_answerer(str(chat_folder))
    asks = [{"messages": [{"role": "user", "content": text}]} for text in ("你好", "小刚去了哪里？")]
    answers = answering.replies(answerer, asks, max_new_tokens=4)
    assert len(answers) == 2 and all(set(a) == {"text", "ids", "ended"} for a in answers)
    assert answers == answering.replies(answerer, asks, max_new_tokens=4)
    assert not any(p.requires_grad for p in answerer.model.parameters())


def test_a_question_as_people_see_it():
    first = {"role": "user", "content": "故事。小刚去了哪里？"}
    assert answering.as_text([first]) == "故事。小刚去了哪里？"
    more = [first, {"role": "assistant", "content": "花园"}, {"role": "user", "content": "谁去了？"}]
    assert answering.as_text(more) == "问：故事。小刚去了哪里？\n答：花园\n问：谁去了？"
