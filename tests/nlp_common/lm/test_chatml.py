"""ChatML 与标签掩码：与 transformers 的模板逐 token 相同，与 TRL 的助手掩码相同。"""

import copy
import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer
from trl.chat_template_utils import qwen3_training_chat_template

from nlp_common.data.chats import to_chats
from nlp_common.draw.tokens import LEARNED
from nlp_common.lm.chatml import (
    CHAT_TEMPLATE,
    IM_END,
    IM_START,
    answer_ids,
    encode_chat,
    encode_text,
    prompt_ids,
    whole_pieces,
)
from nlp_common.lm.loading import load_tokenizer
from nlp_common.lm.losses import IGNORE
from nlp_common.lm.pairs import encode_pair
from nlp_common.tiny import world

SHARED = Path(__file__).resolve().parents[4] / "shared" / "data"
QWEN3 = SHARED / "tokenizers" / "qwen3"
needs_qwen3 = pytest.mark.skipif(not QWEN3.is_dir(), reason="没有 ../shared/data/tokenizers/qwen3")


def turns(*contents: str, system: str | None = None) -> list[dict]:
    head = [{"role": "system", "content": system}] if system else []
    return head + [
        {"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)
    ]


HAND_MADE = [
    turns("你好", "你好！有什么想问我的吗？"),
    turns("问", "答", "再问", "再答", "三问", "三答"),
    turns("问", "答", "再问", "再答", system="你是小故事助手。"),
    turns("写一段 Python", "```python\nfor i in range(3):\n    print(i)\n```\n\n好了。😀"),
    turns("  前后有空格  ", "第一行\n\n第二行\n", "Hello, world!", "don't  stop…"),
    turns("1+1=?", "2", "你叫什么？", ""),
]


@pytest.fixture(scope="session")
def qwen3():
    return load_tokenizer(str(QWEN3))


def world_chats() -> list[list[dict]]:
    return [row["messages"] for row in world.chats(60, 5)]


def reference(tokenizer, messages, template=None) -> tuple[list[int], list[int]]:
    """transformers 自己的 (input_ids, 助手掩码)。"""
    out = tokenizer.apply_chat_template(
        messages, chat_template=template, return_assistant_tokens_mask=True, return_dict=True
    )
    return out["input_ids"], out["assistant_masks"]


# ---- 与 transformers 相同 ----


@pytest.mark.parametrize("messages", HAND_MADE)
def test_ids_and_mask_equal_transformers_on_the_tiny_tokenizer(tokenizer, messages):
    assert encode_chat(tokenizer, messages) == reference(tokenizer, messages)


def test_ids_and_mask_equal_transformers_on_the_tiny_world(tokenizer):
    chats = world_chats()
    assert max(map(len, chats)) >= 6  # 多轮
    for messages in chats:
        ids, mask = encode_chat(tokenizer, messages)
        assert (ids, mask) == reference(tokenizer, messages)
        assert ids == tokenizer.apply_chat_template(messages, return_dict=False)
        text = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
        assert prompt_ids(tokenizer, messages[:-1]) == tokenizer(text)["input_ids"]


@needs_qwen3
@pytest.mark.parametrize("messages", HAND_MADE)
def test_ids_and_mask_equal_transformers_on_qwen3(qwen3, messages):
    assert encode_chat(qwen3, messages) == reference(qwen3, messages, CHAT_TEMPLATE)


@needs_qwen3
def test_ids_and_mask_equal_transformers_on_real_conversations(qwen3):
    with next((SHARED / "sharegpt_zh").glob("*.jsonl")).open(encoding="utf-8") as file:
        rows = [json.loads(line) for line, _ in zip(file, range(60), strict=False)]
    chats = [row["messages"] for row in to_chats(rows, "sharegpt_zh")]
    # 内容以换行开头的，整段一起分词时换行会与角色后面的换行并成一个 token；生成时不会，所以我们分开切
    chats = [messages for messages in chats if all(m["content"] == m["content"].lstrip() for m in messages)]
    assert len(chats) > 30 and any(len(messages) > 4 for messages in chats)
    for messages in chats:
        assert encode_chat(qwen3, messages) == reference(qwen3, messages, CHAT_TEMPLATE)


# ---- 与 TRL 相同 ----


def test_labels_equal_trl_on_the_tiny_tokenizer(sft, model, chat_tokenizer, trainer_args):
    """整条路都走 TRL 的：SFTTrainer 分词、掩码、拼批，与我们的 encode_row、collate 逐格相同。"""
    chats = HAND_MADE + world_chats()
    trainer = SFTTrainer(
        copy.deepcopy(model),
        args=SFTConfig(**trainer_args(SFTConfig), assistant_only_loss=True, max_length=None),
        train_dataset=Dataset.from_list([{"messages": messages} for messages in chats]),
        processing_class=copy.deepcopy(chat_tokenizer),
    )
    theirs = trainer.data_collator(list(trainer.train_dataset))
    rows = [sft.encode_row(chat_tokenizer, messages) for messages in chats]
    ours = sft.collate(rows, chat_tokenizer.pad_token_id)
    assert torch.equal(ours["input_ids"], theirs["input_ids"])
    assert torch.equal(ours["labels"], theirs["labels"])
    assert (ours["labels"] != IGNORE).any(1).all()


@needs_qwen3
def test_labels_equal_trl_on_qwen3_but_for_the_newline_after_im_end(sft, qwen3):
    """TRL 的 Qwen3 训练模板：回答前有（空的）思考段；还在 <|im_end|> 之后的换行上算损失，生成永远到不了那里。"""
    for messages in HAND_MADE:
        ids, mask = reference(qwen3, messages, qwen3_training_chat_template)
        think = [
            {**m, "content": "<think>\n\n</think>\n\n" + m["content"].lstrip("\n")}
            if m["role"] == "assistant"
            else m
            for m in messages
        ]
        row = sft.encode_row(qwen3, think)
        assert row["input_ids"] == ids
        end = qwen3.convert_tokens_to_ids(IM_END)
        extra = [i for i in range(len(ids)) if mask[i] and row["labels"][i] == IGNORE]
        assert all(ids[i - 1] == end and qwen3.decode([ids[i]]) == "\n" for i in extra)
        assert len(extra) == sum(m["role"] == "assistant" for m in messages)
        assert not [i for i in range(len(ids)) if row["labels"][i] != IGNORE and not mask[i]]


@needs_qwen3
def test_stock_template_has_no_assistant_mask(qwen3):
    """这就是为什么掩码要自己拼：自带的模板没有 {% generation %}，掩码全是 0。"""
    stock = qwen3.chat_template
    assert "{% generation" not in stock and "{%- generation" not in stock
    assert not any(reference(qwen3, HAND_MADE[0])[1])


# ---- 标签本身 ----


@pytest.mark.parametrize("messages", HAND_MADE)
def test_encode_row_learns_each_answer_and_its_end_and_nothing_else(sft, tokenizer, messages):
    row = sft.encode_row(tokenizer, messages)
    assert len(row["input_ids"]) == len(row["labels"])
    kept = [label for label in row["labels"] if label != IGNORE]
    assert all(label in (IGNORE, token) for token, label in zip(row["input_ids"], row["labels"], strict=True))
    answers = [m["content"] for m in messages if m["role"] == "assistant"]
    assert tokenizer.decode(kept) == "".join(answer + IM_END for answer in answers)
    assert row["labels"][0] == IGNORE  # 第一个 token 没有前文，本来就预测不了
    assert row["labels"][-1] == IGNORE and row["input_ids"][-2] == tokenizer.convert_tokens_to_ids(IM_END)


def test_collate_pads_right_and_ignores_padding(sft, tokenizer):
    rows = [sft.encode_row(tokenizer, messages) for messages in HAND_MADE]
    batch = sft.collate(rows, tokenizer.pad_token_id)
    assert (
        batch["input_ids"].shape == batch["labels"].shape == (len(rows), max(len(r["labels"]) for r in rows))
    )
    for row, ids, labels in zip(rows, batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
        n = len(row["input_ids"])
        assert ids[:n] == row["input_ids"] and labels[:n] == row["labels"]
        assert set(ids[n:]) <= {tokenizer.pad_token_id} and set(labels[n:]) <= {IGNORE}


def test_show_batch_prints_every_token_and_the_count(sft, tokenizer, capsys, tmp_path):
    rows = [sft.encode_row(tokenizer, HAND_MADE[0])]
    sft.show_batch(tokenizer, rows, tmp_path / "mask.svg")
    printed = capsys.readouterr().out
    learned = sum(label != IGNORE for label in rows[0]["labels"])
    assert f"{len(rows[0]['labels'])} 个 token，其中 {learned} 个（绿色）算损失" in printed
    for message in HAND_MADE[0]:
        assert message["content"] in printed
    assert printed.count(IM_START) == 2
    picture = ElementTree.parse(tmp_path / "mask.svg").getroot()
    boxes = [box.get("fill") for box in picture if box.tag.endswith("rect")]
    assert len(boxes) == len(rows[0]["labels"]) and boxes.count(LEARNED[0]) == learned


def test_prompt_and_answer_join_into_the_chat(tokenizer):
    """训练时的整段 = 生成时的提示 + 回答 + 换行：模型学的正是生成时遇到的。"""
    newline = encode_text(tokenizer, "\n")
    for messages in HAND_MADE:
        ids, _ = encode_chat(tokenizer, messages)
        answer = answer_ids(tokenizer, messages[-1]["content"])
        assert prompt_ids(tokenizer, messages[:-1]) + answer + newline == ids


def test_pairs_share_the_prompt_and_end_with_im_end(tokenizer):
    end = tokenizer.convert_tokens_to_ids(IM_END)
    for row in world.pairs(30, 2):
        pair, bare = (encode_pair(tokenizer, row, with_end=with_end) for with_end in (True, False))
        for kind in ("chosen", "rejected"):
            ids, mask = encode_chat(tokenizer, row["prompt"] + row[kind])
            answer = pair[f"{kind}_ids"]
            assert pair["prompt_ids"] + answer == ids[:-1]
            assert answer[-1] == end and answer.count(end) == 1
            assert all(mask[len(pair["prompt_ids"]) : -1])
            assert bare[f"{kind}_ids"] == answer[:-1] and bare["prompt_ids"] == pair["prompt_ids"]


def test_a_turn_of_weight_zero_is_in_the_context_but_not_learned(tokenizer):
    messages = [
        {"role": "user", "content": "问"},
        {"role": "assistant", "content": "坏答"},
        {"role": "user", "content": "再问"},
        {"role": "assistant", "content": "好答"},
    ]
    ids, learned = encode_chat(tokenizer, messages)
    messages[1]["weight"] = 0
    same, fewer = encode_chat(tokenizer, messages)
    assert same == ids
    assert tokenizer.decode([i for i, keep in zip(ids, fewer, strict=True) if keep]) == "好答<|im_end|>"
    assert sum(learned) > sum(fewer)


def test_whole_pieces_never_show_half_a_character(tokenizer):
    text = "好🤗的👌，龘①™︎ ok\n"
    ids = encode_text(tokenizer, text)
    pieces = whole_pieces(tokenizer, ids)
    assert len(pieces) == len(ids) and "".join(pieces) == text
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces) and "🤗" in pieces
    half = encode_text(tokenizer, "🤗")[:2]  # 切断的字：留在最后，不丢
    assert len(whole_pieces(tokenizer, half)) == 2
