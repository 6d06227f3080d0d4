"""head_view：网页里的数就是模型的数；不联网；够小；坏的输入说得清。浏览器里真的画得出来。"""

import base64
import json
import re
import shutil
import subprocess

import pytest
import torch
from transformers import BertConfig, BertModel, MambaConfig, MambaForCausalLM

import head_view as hv
import pages
import readers
from nlp_common.base.errors import UserError


def random_maps(layers: int, heads: int, size: int, causal: bool) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    scores = [torch.randn(heads, size, size, generator=generator) * 3 for _ in range(layers)]
    if causal:
        hidden = torch.ones(size, size).triu(1).bool()
        scores = [each.masked_fill(hidden, float("-inf")) for each in scores]
    return [each.softmax(-1) for each in scores]


def data_of(page: str) -> dict:
    return json.loads(re.search(r'<script id="data"[^>]*>(.*?)</script>', page, re.DOTALL)[1])


def unpack(data: dict) -> torch.Tensor:
    """照网页里的脚本那样读回来：(层, 头, T, T)。"""
    values, size = base64.b64decode(data["weights"]), len(data["tokens"])
    one = size * (size + 1) // 2 if data["causal"] else size * size
    result = torch.zeros(len(data["layers"]), data["heads"], size, size)
    for n in range(len(data["layers"])):
        for h in range(data["heads"]):
            for i in range(size):
                for j in range(i + 1 if data["causal"] else size):
                    at = i * (i + 1) // 2 + j if data["causal"] else i * size + j
                    result[n, h, i, j] = values[(n * data["heads"] + h) * one + at] / 255
    return result


@pytest.mark.parametrize("causal", [True, False])
def test_the_page_holds_the_weights(causal):
    maps = random_maps(2, 3, 7, causal)
    data = data_of(pages.head_page("题", list("一二三四五六七"), maps, [0, 5]))
    assert data["causal"] == causal and data["layers"] == [0, 5] and data["title"] == "题"
    assert (unpack(data) - torch.stack(maps)).abs().max() <= 1 / 510 + 1e-6


def test_57_tokens_and_8_heads_fit_in_100_kb_offline():
    page = pages.head_page("题", ["词"] * 57, random_maps(2, 4, 57, True), [0, 1])
    assert len(page.encode()) <= 100_000
    whole = pages.head_page("题", ["词"] * 57, random_maps(2, 4, 57, False), [0, 1])  # 编码器：整个矩阵
    assert len(whole.encode()) <= 100_000
    addresses = set(re.findall(r"https?://[^\"'\s]+", whole))
    assert addresses <= {"http://www.w3.org/2000/svg"}  # 是名字空间，不是要去取的东西
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=", whole)


def test_a_token_cannot_end_the_script():
    page = pages.head_page("</title>", ["</script><b>", "&"], random_maps(1, 1, 2, True), [0])
    assert page.count("</script>") == 2 and data_of(page)["tokens"] == ["</script><b>", "&"]


def test_too_big_for_a_browser(monkeypatch):
    monkeypatch.setattr(pages, "MOST_BYTES", 10)
    with pytest.raises(UserError, match="--layers 只选几层"):
        pages.head_page("题", ["词"] * 9, random_maps(1, 1, 9, True), [0])


def test_habits():
    size = 5
    previous = torch.zeros(size, size)
    previous[0, 0] = 1
    for i in range(1, size):
        previous[i, i - 1] = 1
    uniform = torch.ones(size, size).tril()
    uniform = uniform / uniform.sum(-1, keepdim=True)
    habits = hv.head_habits(torch.stack([previous, torch.eye(size), uniform]), ["甲", "乙", "甲", "乙", "丙"])
    assert habits["previous"][:2] == [1.0, 0.0] and habits["itself"][:2] == [0.0, 1.0]
    assert habits["first"][0] == 0.25  # 四个里只有第 1 个的前一个是第 0 个
    assert habits["same"][2] == pytest.approx((1 / 3 + 1 / 4) / 2, abs=1e-4)
    assert habits["entropy"][:2] == [0.0, 0.0]
    assert habits["entropy"][2] == pytest.approx(torch.tensor([2.0, 3, 4, 5]).log().mean().item(), abs=1e-4)


def test_the_whole_script(chat_folder, tmp_path, capsys):
    folder = tmp_path / "r"
    arguments = [
        "--model",
        str(chat_folder),
        "--text",
        "小刚去了花园。",
        "--layers",
        "1",
        "--output_dir",
        str(folder),
    ]
    record = hv.main(arguments)
    metrics = record["metrics"]
    assert metrics["sdpa_layers_with_weights"] == 0 and metrics["max_difference_to_sdpa"] < 1e-4
    assert metrics["heads"] == 4 and metrics["tokens"] == 7
    page = (folder / "head_view.html").read_text(encoding="utf-8")
    assert len(page.encode()) == round(metrics["page_kb"] * 1000)
    data = data_of(page)
    assert data["tokens"] == list("小刚去了花园。") and data["layers"] == [1]
    reader = readers.load_reader({"path": str(chat_folder), "stage": "m", "id": "i", "run": None})
    maps = readers.attention_maps(reader.model, readers.encode(reader, "小刚去了花园。"))
    assert (unpack(data)[0] - maps[1]).abs().max() <= 1 / 510 + 1e-6
    assert (folder / "matrix.png").stat().st_size > 1000
    capsys.readouterr()
    hv.main(arguments)
    assert "直接加载" in capsys.readouterr().out


def test_the_hand_written_encoder_and_a_saved_file(tmp_path, monkeypatch):
    import hand_transformer

    file = tmp_path / "注意力.json"
    monkeypatch.setattr("sys.argv", ["hand_transformer.py", str(file)])
    hand_transformer.main()
    tokens, maps = pages.read_saved(str(file))
    example = hand_transformer.hand_example(0)
    assert tokens == example.pieces and torch.allclose(
        torch.stack(maps), torch.stack(example.maps), atol=1e-5
    )
    hv.main(["--preset", "tiny", "--attention", str(file), "--output_dir", str(tmp_path / "saved")])
    hv.main(["--preset", "tiny", "--hand", "--output_dir", str(tmp_path / "hand")])
    pages_ = [(tmp_path / name / "head_view.html").read_text(encoding="utf-8") for name in ("saved", "hand")]
    assert (unpack(data_of(pages_[0])) - unpack(data_of(pages_[1]))).abs().max() <= 1 / 255 + 1e-6


def test_hand_written_layer_equals_pytorch():
    import hand_transformer

    torch.manual_seed(0)
    layer = hand_transformer.Layer(16, 2)
    theirs = torch.nn.MultiheadAttention(16, 2, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([layer.query.weight, layer.key.weight, layer.value.weight]))
        theirs.in_proj_bias.copy_(torch.cat([layer.query.bias, layer.key.bias, layer.value.bias]))
        theirs.out_proj.weight.copy_(layer.output.weight)
        theirs.out_proj.bias.copy_(layer.output.bias)
        x = torch.randn(3, 5, 16)
        _, weights = theirs(x, x, x, average_attn_weights=False)
        layer(x)
    assert torch.allclose(layer.weights, weights, atol=1e-6)


@pytest.mark.parametrize(
    ("saved", "said"),
    [
        ("{", "读不出来"),
        ("[]", "里要是"),
        ('{"tokens": 3, "attention": [[[[1]]]]}', "都要是列表"),
        ('{"tokens": ["a"], "attention": 5}', "都要是列表"),
        ('{"tokens": ["a"], "attention": [[[[null]]]]}', "不是整齐的"),
        ('{"tokens": [], "attention": []}', "没有 token"),
        ('{"tokens": ["a"], "attention": [[[[1, 0]]]]}', "第 0 层的形状"),
        ('{"tokens": ["a", "b"], "attention": [[[[1, 0], [1]]]]}', "不是整齐的"),
        ('{"tokens": ["a", "b"], "attention": [[[[1, 0], [3, 4]]]]}', "softmax 之前"),
        ('{"tokens": ["a"], "attention": [[[[1]]], [[[1]], [[1]]]]}', "第 1 层有 2 个头"),
    ],
)
def test_a_bad_saved_file(tmp_path, saved, said):
    file = tmp_path / "a.json"
    file.write_text(saved, encoding="utf-8")
    with pytest.raises(UserError, match=said):
        pages.read_saved(str(file))


def test_nowhere_to_write(tmp_path, monkeypatch):
    import hand_transformer

    monkeypatch.setattr("sys.argv", ["hand_transformer.py", str(tmp_path / "没有" / "a.json")])
    with pytest.raises(UserError, match="写不了"):
        hand_transformer.main()


def test_one_thing_to_look_at():
    with pytest.raises(UserError, match="--hand 与 --text 只能给一个"):
        hv.main(["--preset", "tiny", "--hand", "--text", "你好"])


def test_no_such_saved_file(tmp_path):
    with pytest.raises(UserError, match="没有这个文件"):
        pages.read_saved("没有.json")
    with pytest.raises(UserError, match="它是一个文件夹"):
        pages.read_saved(str(tmp_path))
    (tmp_path / "a.json").write_text("你好", encoding="gbk")
    with pytest.raises(UserError, match="不是 UTF-8"):
        pages.read_saved(str(tmp_path / "a.json"))


@pytest.mark.parametrize("text", ["9", "a", "0,,1", "-1"])
def test_bad_layers(text):
    with pytest.raises(UserError, match="--layers 里的"):
        hv.chosen_layers(text, 2)
    assert hv.chosen_layers("1，0,1", 2) == [0, 1] and hv.chosen_layers(None, 2) == [0, 1]


def test_a_model_without_attention(tmp_path, chat_tokenizer):
    """Mamba 没有注意力。"""
    config = MambaConfig(vocab_size=len(chat_tokenizer), hidden_size=16, num_hidden_layers=1, state_size=4)
    MambaForCausalLM(config).save_pretrained(tmp_path / "mamba")
    chat_tokenizer.save_pretrained(tmp_path / "mamba")
    with pytest.raises(UserError, match="没有注意力，没有权重可看"):
        hv.main(["--model", str(tmp_path / "mamba"), "--text", "你好", "--output_dir", str(tmp_path / "r")])


def test_sdpa_gives_no_weights(chat_folder):
    reader = readers.load_reader({"path": str(chat_folder), "stage": "m", "id": "i", "run": None})
    reader.model.set_attn_implementation("sdpa")
    with pytest.raises(UserError, match="没有交出注意力权重"):
        readers.attention_maps(reader.model, [1, 2, 3])


def test_an_encoder_can_be_seen(tmp_path):
    """BERT：整个矩阵，前后有 [CLS] 与 [SEP]；没有下一个词的脚本说得清。"""
    from transformers import BertTokenizer

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "我", "喜", "欢", "你"]
    tokenizer = BertTokenizer(vocab={word: number for number, word in enumerate(words)})
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
    )
    config.architectures = ["BertModel"]
    BertModel(config).save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    record = hv.main(
        ["--model", str(tmp_path / "bert"), "--text", "我喜欢你", "--output_dir", str(tmp_path / "r")]
    )
    data = data_of((tmp_path / "r" / "head_view.html").read_text(encoding="utf-8"))
    assert data["tokens"] == ["[CLS]", "我", "喜", "欢", "你", "[SEP]"] and not data["causal"]
    assert record["metrics"]["sdpa_layers_with_weights"] == 0
    import logit_lens

    with pytest.raises(UserError, match="没有“下一个词”可看"):
        logit_lens.main(["--model", str(tmp_path / "bert"), "--output_dir", str(tmp_path / "x")])


@pytest.mark.slow
def test_the_browser_draws_the_lines(tmp_path):
    """真的在浏览器里打开，断着网：线、词、矩阵都画出来了。"""
    browser = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
    if not browser:
        pytest.skip("没有 chromium：不看浏览器里的样子")
    page = tmp_path / "a.html"
    text = pages.head_page("题", list("小刚去了花园"), random_maps(2, 4, 6, True), [0, 1])
    page.write_text(text, encoding="utf-8")
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--host-resolver-rules=MAP * ~NOTFOUND",
        "--dump-dom",
    ]
    drawn = subprocess.run(
        [browser, *flags, page.as_uri()], capture_output=True, text=True, timeout=120
    ).stdout
    assert drawn.count("<line") > 20 and drawn.count("<text") == 12
    page.write_text(text.replace("matrix=false", "matrix=true"), encoding="utf-8")
    drawn = subprocess.run(
        [browser, *flags, page.as_uri()], capture_output=True, text=True, timeout=120
    ).stdout
    assert drawn.count("<canvas") == 4
