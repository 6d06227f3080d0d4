"""行业一课：门诊记录的两边不相交、答案就在记录里；新字加得对，旧的一行不动；整个脚本走得通。"""

import pytest
import torch

import clinic_world
import domain_finetune_case as case
from nlp_common.base.errors import UserError
from nlp_common.tiny.qwen import build_model, build_tokenizer


def test_clinic_questions_are_held_out_and_their_answers_stand_in_the_note():
    learned = {text.split("小结：")[0] for text in clinic_world.documents(300, seed=0)}
    for question in clinic_world.questions(100):
        note = question["messages"][0]["content"].split("\n")[0]
        assert question["answer"] in note and note not in learned
        assert clinic_world.is_right(question, f"是{question['answer']}。", True)
        assert not clinic_world.is_right(question, question["answer"], False)
        both = "、".join(clinic_world.CLINIC[question["slot"]])
        assert not clinic_world.is_right(question, both, True)
    assert clinic_world.documents(5, 1) == clinic_world.documents(5, 1)


@pytest.mark.parametrize(("share", "n_old"), [(0.0, 0), (0.1, 10), (0.2, 22)])
def test_old_data_take_their_share(share, n_old):
    rows = case.mixed(["new"] * 90, lambda n, seed: ["old"] * n, share, 0)
    assert rows.count("old") == n_old and rows.count("new") == 90


def test_new_characters_get_a_row_each_and_the_old_rows_stay():
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, seed=0)
    texts = clinic_world.documents(50, seed=0)
    old = model.get_input_embeddings().weight.detach().clone()
    characters = case.new_characters(tokenizer, texts)
    assert "咽" in characters and "小" not in characters
    case.add_characters(model, tokenizer, characters, seed=0)
    rows = model.get_input_embeddings().weight
    assert torch.equal(rows[: len(old)], old) and len(rows) == len(old) + len(characters)
    assert model.get_output_embeddings().weight is rows
    assert rows[len(old) :].std().item() == pytest.approx(old.std().item(), rel=0.1)
    assert len(tokenizer("咽部")["input_ids"]) == 2 and case.new_characters(tokenizer, texts) == []


def test_documents_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match="要是一个文件夹"):
        case.find_files(str(tmp_path / "none"))
    (tmp_path / "a.txt").write_text("一", encoding="utf-8")
    with pytest.raises(UserError, match="至少要两个"):
        case.find_files(str(tmp_path))
    (tmp_path / "b.md").write_bytes("门诊".encode("gbk"))
    with pytest.raises(UserError, match=r"b\.md 不是 UTF-8"):
        case.read_text(case.find_files(str(tmp_path))[1])
    (tmp_path / "c.txt").write_text(" \n", encoding="utf-8")
    with pytest.raises(UserError, match="是空的"):
        case.read_text(tmp_path / "c.txt")


@pytest.mark.parametrize("mixes", ["1", "a", "0.1,0.1", ""])
def test_bad_mixes(mixes):
    with pytest.raises(UserError, match="--mixes"):
        case.main(["--preset", "tiny", "--mixes", mixes])


@pytest.mark.slow
def test_the_script(tmp_path):
    """几步就停：走得通，两边都量了，LoRA 只放开一小部分。"""
    pytest.importorskip("peft", reason="LoRA 用 peft")
    flags = ["--preset", "tiny", "--mixes", "0.1", "--n_documents", "40", "--n_chats", "40", "--n_questions", "8",
             "--output_dir", str(tmp_path / "out")]  # fmt: skip
    metrics = case.main(flags)["metrics"]
    assert metrics["lora_0.1"]["trainable"] < 0.5 * metrics["full_0.1"]["trainable"]
    assert metrics["new_characters"] > 50 and (tmp_path / "out" / "domain.svg").exists()
    assert metrics["before"]["domain_accuracy"] < 0.2 < metrics["before"]["general_accuracy"]


@pytest.mark.slow
def test_own_documents(tmp_path):
    folder = tmp_path / "own"
    folder.mkdir()
    for i, text in enumerate(clinic_world.documents(40, seed=3)):
        (folder / f"{i}.txt").write_text(text, encoding="utf-8")
    flags = ["--preset", "tiny", "--documents", str(folder), "--num_train_epochs", "5", "--n_questions", "8",
             "--output_dir", str(tmp_path / "out")]  # fmt: skip
    metrics = case.main(flags)["metrics"]
    assert metrics["loss_after"] < metrics["loss_before"] and metrics["files"] == 40
