"""compact.py：压过的权重的文件夹，少了、坏了、对不上，都说得清。"""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from nlp_common.base.errors import UserError
from nlp_common.base.runs import file_sha256
from nlp_common.lm.compact import check_file, model_from_state, read_note


def config(tied: bool) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=11, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=tied,
    )  # fmt: skip


def test_notes(tmp_path):
    for folder, said in (
        (tmp_path / "none", "没有文件夹.*python a.py"),
        (tmp_path, "没有 sums.json.*不是 a.py 写的；再来"),
    ):
        with pytest.raises(UserError, match=said):
            read_note(folder, "sums.json", "a.py", "再来")
    (tmp_path / "sums.json").write_bytes(b"\xff{")
    with pytest.raises(UserError, match=r"sums\.json 坏了，读不出来；再来"):
        read_note(tmp_path, "sums.json", "a.py", "再来")
    (tmp_path / "sums.json").write_text('{"a": 1}', encoding="utf-8")
    assert read_note(tmp_path, "sums.json", "a.py", "再来") == {"a": 1}


def test_files(tmp_path):
    file = tmp_path / "w"
    with pytest.raises(UserError, match="少了 w"):
        check_file(file, "", "再来")
    file.write_bytes(b"123")
    right = file_sha256(file)
    check_file(file, right, "再来")
    file.write_bytes(b"124")
    with pytest.raises(UserError, match=f"写的时候是 {right[:12]}…；再来"):
        check_file(file, right, "再来")


def test_what_is_missing_is_said(tmp_path):
    """与嵌入共用的输出层可以不在；不共用的少了，就不能悄悄地用随机的。"""
    for tied in (True, False):
        model = LlamaForCausalLM(config(tied))
        state = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
        if tied:
            again = model_from_state(tmp_path, config(tied), state, "再来")
            ids = torch.tensor([[1, 2, 3]])
            assert torch.equal(again.eval()(ids).logits, model.eval()(ids).logits)
        else:
            with pytest.raises(UserError, match=r"对不上（lm_head\.weight）；再来"):
                model_from_state(tmp_path, config(tied), state, "再来")
        with pytest.raises(UserError, match="对不上（more）"):
            model_from_state(tmp_path, config(tied), model.state_dict() | {"more": ids}, "再来")
        wrong = model.state_dict() | {"model.norm.weight": torch.zeros(3)}
        with pytest.raises(UserError, match=r"对不上.*size mismatch"):
            model_from_state(tmp_path, config(tied), wrong, "再来")
