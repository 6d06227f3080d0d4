"""预处理：切法与指标对得上手算；句向量与公式、与 sentence-transformers 相同；质量检查在做坏的文档上。"""

import json
import math
import random
from collections import Counter

import numpy as np
import pytest
import torch

import data_preprocess as dp
import sentence_bert
from nlp_common.base.errors import UserError
from planted_faults import KINDS, change_characters, pdf_of, plant, read_back
from rag_common.corpus import Corpus, Question
from rag_common.documents import Document, read_document
from rag_common.noise import common
from text_quality import (
    DriftGauge,
    boilerplate,
    divergence,
    duplicates,
    find_faults,
    is_garbled,
    longest_sentence,
    without_boilerplate,
)

QUICK = ["--preset", "tiny", "--embedder", "hashed", "--documents", "150", "--questions", "60"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("out") / "r"
    arguments = [*QUICK, "--output_dir", str(folder)]
    return dp.main(arguments), arguments, folder


def test_the_lesson(finished):
    record, arguments, folder = finished
    metrics = record["metrics"]
    cuts = {name: row["kept"] for name, row in metrics["cuts"].items()}
    assert cuts["chinese"] == 1.0 > cuts["default"]  # 出处是两个标点之间的话：中文分隔符不会切断它
    assert metrics["gain"]["gain"] == pytest.approx(cuts["chinese"] - cuts["default"])
    for row in metrics["overlap"].values():
        assert row["none"]["stored_ratio"] <= 1 < row["half"]["stored_ratio"]
        assert row["none"]["kept"] <= row["half"]["kept"]
    for row in metrics["shrink"].values():
        assert row["evidence_at_1"] <= min(row["evidence_at_5"], row["document_at_1"])
        assert row["evidence_at_5"] <= row["kept"]
    assert metrics["script"]["traditional"]["recall_at_1"] <= metrics["script"]["converted"]["recall_at_1"]
    kinds = metrics["monitor"]["kinds"]
    assert set(kinds) == {kind.replace(".", "_") for kind in KINDS}
    assert kinds["duplicate_exact"] == kinds["garbled_utf8_as_gbk"] == 1.0
    assert metrics["drift"]["traditional"]["alarm_rate"] == 1.0 > metrics["drift"]["same"]["alarm_rate"]
    assert (folder / "cuts.svg").is_file() and (folder / "shrink.svg").is_file()
    assert dp.main(arguments) == json.loads((folder / "run.json").read_text(encoding="utf-8"))  # 第二次直接用
    with pytest.raises(UserError, match="size"):
        dp.main([*arguments, "--size", "64"])


def small() -> Corpus:
    text = "图书馆周一不开，一次最多借五本书。逾期一天罚一角钱。"
    return Corpus(
        "手算",
        [Document("甲", text), Document("乙", "别的一篇，没有关系。")],
        [
            Question("一次借几本？", "借五本书", frozenset("甲")),
            Question("罚多少？", "一天罚一角", frozenset("甲")),
        ],
    )


def test_kept_whole_by_hand():
    corpus = small()  # 12 字一刀：图书馆周一不开，一次最多｜借五本书。逾期一天罚一角｜钱。
    chunks = dp.cut(corpus, "fixed", 12)
    assert [chunk.text for chunk in chunks if chunk.document == "甲"] == [
        "图书馆周一不开，一次最多",
        "借五本书。逾期一天罚一角",
        "钱。",
    ]
    assert dp.kept_whole(corpus, chunks) == [1.0, 1.0]
    assert dp.kept_whole(corpus, dp.cut(corpus, "fixed", 10)) == [1.0, 0.0]  # …逾期一｜天罚一角钱。
    assert dp.kept_whole(corpus, dp.cut(corpus, "chinese", 10)) == [1.0, 1.0]
    assert dp.describe_chunks(chunks, corpus)["stored_ratio"] == 1.0


def test_evidence_is_the_clause_of_a_made_up_question():
    made_up = Question("他去了哪里？", "北京", frozenset("甲"), "ns", {"clause": "他 去了北京"})
    assert dp.evidence(made_up) == "他去了北京"
    assert dp.evidence(Question("去哪？", "北京", frozenset("甲"))) == "北京"


@pytest.mark.parametrize("size", ["4", "0", "多"])
def test_a_size_that_is_none(size, tmp_path):
    with pytest.raises(UserError, match="--size"):
        dp.main([*QUICK, "--size", size, "--output_dir", str(tmp_path / "r")])


def test_own_folder_and_questions_without_answers(tmp_path, capsys):
    folder = tmp_path / "docs"
    folder.mkdir()
    (folder / "规则.md").write_text(
        "# 借书\n\n" + small().documents[0].text + "办理读者证要带上身份证件，服务台在一楼大厅。",
        encoding="utf-8",
    )
    (folder / "坏.pdf").write_bytes(b"not a pdf")
    settings = dp.PreprocessSettings(dataset=str(folder), documents=50, questions=20, size=64)
    corpus = dp.whole_documents(settings)
    assert [document.id for document in corpus.documents] == ["规则.md"]
    assert all(question.gold == {"规则.md"} for question in corpus.questions)
    assert "坏.pdf" in capsys.readouterr().out
    rows = tmp_path / "q.jsonl"
    rows.write_text(json.dumps({"context": "一段话。", "question": "问？"}) + "\n", encoding="utf-8")
    settings.dataset = str(rows)
    with pytest.raises(UserError, match="都没有答案"):
        dp.whole_documents(settings)


def test_real_questions_if_they_are_here():
    from pathlib import Path

    path = Path(dp.HOME.parent).parent / "shared" / "data" / "cmrc2018" / "trial.jsonl"
    if not path.is_file():
        pytest.skip("没有 ../shared/data/cmrc2018")
    settings = dp.PreprocessSettings(dataset=str(path), documents=60, questions=100)
    corpus = dp.whole_documents(settings)
    kept = {how: np.mean(dp.kept_whole(corpus, dp.cut(corpus, how, 128))) for how in ("default", "chinese")}
    assert kept["default"] < 0.85 < 0.9 < kept["chinese"]


# ---------------------------------------------------------------- 六种文件


def test_six_formats(tmp_path):
    for package in ("bs4", "pypdf", "docx"):
        pytest.importorskip(package)
    rows = read_back(tmp_path, "甲乙丙，丁。\n第二段：３个字！" + "长" * 70)
    assert list(rows) == ["txt", "md", "html", "pdf", "docx", "csv"]
    assert all(row["kept"] == 1.0 and 0 <= row["extra_characters"] <= 30 for row in rows.values())


def test_a_pdf_by_hand(tmp_path):
    pytest.importorskip("pypdf")
    (tmp_path / "a.pdf").write_bytes(pdf_of(["中文，PDF。", "第二行"]))
    assert read_document(tmp_path / "a.pdf").split() == ["中文，PDF。", "第二行"]


# ---------------------------------------------------------------- 句向量


class Tiny:
    """两层的随机 BERT，与一个按字的分词器。"""

    def __init__(self, folder):
        from tokenizers import Tokenizer, models, pre_tokenizers, processors
        from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"借书馆一次五本还"]
        raw = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="[UNK]"))
        raw.pre_tokenizer = pre_tokenizers.Split("", "isolated")
        raw.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
        self.tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=raw, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
        )
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=len(words), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=32, max_position_embeddings=32,
        )  # fmt: skip
        BertModel(config, add_pooling_layer=False).save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        self.model = BertModel.from_pretrained(folder, add_pooling_layer=False).eval()
        self.dim, self.max_length, self.device = 16, 32, torch.device("cpu")


def test_sentence_bert_by_the_formula_one_text_at_a_time(tmp_path):
    tiny, texts = Tiny(tmp_path), ["借书", "一次借五本书还馆", "书"]
    ours = sentence_bert.encode(tiny, texts, "mean", size=3)
    for text, vector in zip(texts, ours, strict=True):  # 一次一句，没有填充：每个 token 的平均，除以长度
        with torch.no_grad():
            hidden = tiny.model(**tiny.tokenizer(text, return_tensors="pt")).last_hidden_state[0].numpy()
        mean = sum(hidden) / len(hidden)
        assert np.allclose(vector, mean / math.sqrt(sum(mean**2)), atol=1e-6)
    padded = sentence_bert.encode(tiny, texts, "padded", size=3)
    assert np.allclose(padded[1], ours[1], atol=1e-6)  # 最长的一句没有填充
    assert not np.allclose(padded[2], ours[2], atol=1e-3)  # 短的被填充拉偏了，而且与谁同一批有关


def test_equal_to_sentence_transformers(tmp_path):
    pytest.importorskip("sentence_transformers", reason="没有装 sentence-transformers")
    tiny, texts = Tiny(tmp_path), ["借书", "一次借五本书还馆", "书"]
    peer = sentence_bert.with_sentence_transformers(tiny, texts)
    assert np.allclose(peer, sentence_bert.encode(tiny, texts, "mean"), atol=1e-6)


# ---------------------------------------------------------------- 质量检查


def test_garbled_by_hand():
    text = "学习中文信息处理，要从读对编码开始，不然后面全是错的。"
    assert not is_garbled(text) and not is_garbled("學習中文資訊處理，要從讀對編碼開始，不然後面全是錯的。")
    assert not is_garbled("温馨的贺卡") and not is_garbled("Plain English, naïve café words in one line.")
    assert is_garbled(text.encode().decode("gbk", errors="replace"))
    assert is_garbled(text.encode().decode("latin-1"))
    assert is_garbled(text.encode("gbk").decode("utf-8", errors="replace"))


def test_duplicates_follow_the_formula():
    rng = random.Random(0)
    alphabet = [chr(code) for code in range(0x4E00, 0x4E00 + 2000)]
    text = "".join(rng.choice(alphabet) for _ in range(400))
    few = "".join(rng.choice(alphabet) if rng.random() < 0.02 else char for char in text)
    many = "".join(rng.choice(alphabet) if rng.random() < 0.15 else char for char in text)
    # 改 p，一片（5 字）不变的概率 s=(1-p)^5，Jaccard≈s/(2-s)：2% 是 0.82，15% 是 0.29；门槛 0.6
    assert duplicates({"甲": text, "乙": few, "丙": many, "丁": f" {text}\n"}) == {"乙": "甲", "丁": "甲"}


def test_boilerplate_is_found_and_removed():
    texts = {
        f"文{n}": f"这是第{n}篇独有的内容{'甲乙丙丁戊己庚辛'[n]}。\n转载请注明出处，第{n}页。"
        for n in range(8)
    }
    repeated = boilerplate(texts)
    assert repeated == {"转载请注明出处，第0页。"}
    assert without_boilerplate(texts["文3"], repeated) == "这是第3篇独有的内容丁。\n"


def test_every_plain_kind_is_found_and_the_rest_left_alone():
    rng = random.Random(1)
    words = [char for char in map(chr, range(0x4E00, 0x9FA6)) if common(char)]
    texts = {
        f"文{n}": "。".join("".join(rng.choice(words) for _ in range(20)) for _ in range(8))
        for n in range(120)
    }
    assert not any(find_faults(texts).values())
    spoiled, planted = plant(texts, 0.05, seed=0)
    found = find_faults(spoiled)
    hard = {"duplicate.many_changes", "boilerplate.other_words"}
    for name, kind in planted.items():
        assert (name in found[kind.split(".")[0]]) == (kind not in hard), kind
    assert set().union(*found.values()) <= set(planted)
    assert longest_sentence("甲" * 301) == 301
    assert change_characters("甲乙", 0.0, rng) == "甲乙"


def test_divergence_against_scipy():
    from scipy.spatial.distance import jensenshannon

    first, second = Counter("甲甲乙丙"), Counter("甲乙乙丁")
    keys = sorted(first | second)
    theirs = jensenshannon([first[k] / 4 for k in keys], [second[k] / 4 for k in keys], base=2) ** 2
    assert divergence(first, second) == pytest.approx(theirs, abs=1e-12)
    assert divergence(Counter("甲"), Counter("乙")) == 1.0 and divergence(first, first) == 0.0


def test_drift_is_quiet_when_nothing_changed():
    rng = random.Random(2)
    words = [chr(code) for code in range(0x4E00, 0x4E00 + 500)]
    texts = ["".join(rng.choice(words) for _ in range(rng.randrange(50, 150))) for _ in range(240)]
    gauge = DriftGauge(texts[:160], 30)
    quiet = [bool(gauge.alarms(rng.sample(texts[160:], 30))) for _ in range(40)]
    assert sum(quiet) <= 4
    assert "length" in gauge.alarms([text[:25] for text in texts[160:190]])
    assert "characters" in gauge.alarms(["别处来的文字" * 10] * 30)
