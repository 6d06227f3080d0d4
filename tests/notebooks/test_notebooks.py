"""notebooks/：重做一遍与收进仓库的逐字节相同；没有输出；挑两本从头到尾运行。"""

import importlib.util
import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="没有装 nbformat：pip install -r requirements-dev.txt")

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = ROOT / "notebooks"
LEFT_OUT = (".*", "outputs", "__pycache__", "*bert_model*", "*.egg-info", "tests", "node_modules")


def load(path):
    sys.path.insert(0, str(path.parent))  # 它要导入旁边的 topics.py
    spec = importlib.util.spec_from_file_location("make_notebooks", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclass 要按名字找到它
    spec.loader.exec_module(module)
    return module


maker = load(NOTEBOOKS / "make_notebooks.py")


@pytest.mark.parametrize("topic", maker.TOPICS)
def test_making_again_gives_the_committed_notebook(topic):
    committed = (NOTEBOOKS / f"{topic}.ipynb").read_text(encoding="utf-8")
    assert maker.make(topic) == committed, "脚本改过了：运行 make notebooks，把结果一起提交"


def test_no_other_notebooks():
    assert {path.stem for path in NOTEBOOKS.glob("*.ipynb")} == set(maker.TOPICS)


@pytest.mark.parametrize("topic", maker.TOPICS)
def test_clean_small_and_valid(topic):
    path = NOTEBOOKS / f"{topic}.ipynb"
    assert path.stat().st_size < 1_000_000
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    ids = [cell.id for cell in notebook.cells]
    assert len(ids) == len(set(ids))
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None
            compile(cell.source, cell.id, "exec")


@pytest.mark.parametrize("topic", maker.TOPICS)
def test_links_lead_to_files(topic):
    for cell in json.loads((NOTEBOOKS / f"{topic}.ipynb").read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "markdown":
            for link in re.findall(r"\]\(([^)#:]+)\)", "".join(cell["source"])):
                assert (NOTEBOOKS / link).exists(), link


@pytest.mark.parametrize("topic", maker.TOPICS)
def test_every_line_of_the_script_is_there(topic):
    """除了开头的说明、小节的标题和 if __name__ 那几行，脚本里的每一行都在，次序也一样。"""
    notebook = nbformat.read(NOTEBOOKS / f"{topic}.ipynb", as_version=4)
    shown = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code").splitlines()
    shown = iter([line for line in shown if line.strip()])
    for name in maker.TOPICS[topic]:
        source = (ROOT / topic / name).read_text(encoding="utf-8")
        body = source.split('"""', 2)[2].split("\nif __name__")[0]
        for line in body.splitlines():
            if line.strip() and not maker.SECTION.match(line):
                assert line in shown, f"{name}：{line}"  # in 会把 shown 往前走到这一行


def test_markdown_of_a_docstring():
    doc = (
        "你会学到\n  1. 用 ``a_b`` 与 <PAD>\n     接着写\n  2. a * b\n\n"
        "怎么运行\n  python a.py\n  python a.py --x\n\n应当看到：y_<t 与 $5。"
    )
    assert maker.to_markdown(doc) == (
        "**你会学到**\n\n1. 用 `a_b` 与 &lt;PAD>接着写\n2. a \\* b\n\n"
        "**怎么运行**\n\n```text\npython a.py\npython a.py --x\n```\n\n应当看到：y_&lt;t 与 \\$5。"
    )


def test_says_what_is_wrong_with_a_script(tmp_path):
    for source, why in [
        ("def main(): pass\n", "没有说明"),
        ('"""说明"""\n', "没有 main"),
        ('"""说明"""\nROOT = 1\n\n\ndef main(): pass\n', "ROOT 与笔记本准备的一格重名"),
    ]:
        path = tmp_path / "script.py"
        path.write_text(source, encoding="utf-8")
        with pytest.raises(SystemExit, match=why):
            maker.read_script(path)


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    """读者的那一份仓库：中文和空格的路径，没有训练过的结果；笔记本按现在的脚本做。"""
    copy = tmp_path_factory.mktemp("读者 的文件夹") / "nlp"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*LEFT_OUT))
    for topic in maker.TOPICS:
        (copy / "notebooks" / f"{topic}.ipynb").write_text(maker.make(topic), encoding="utf-8")
    return copy


def execute(reader, topic, monkeypatch) -> str:
    """从头到尾运行一本，返回各格打印出来的字。"""
    nbclient = pytest.importorskip("nbclient", reason="没有装 nbclient：pip install -r requirements-dev.txt")
    pytest.importorskip("ipykernel", reason="没有装 ipykernel：pip install -r requirements-dev.txt")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("IPYTHONDIR", os.fspath(reader.parent / "ipython"))
    path = reader / "notebooks" / f"{topic}.ipynb"
    notebook = nbformat.read(path, as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": os.fspath(path.parent)}}
    )
    client.execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 1
    return "".join(output.get("text", "") for output in outputs)


@pytest.mark.slow
def test_simple_demo_runs(reader, monkeypatch):
    text = execute(reader, "simple_demo", monkeypatch)
    assert re.search(r"cats - dogs +-0\.57 +0\.99", text)
    assert "RNN 判对 8/8" in text
    assert re.search(r"TF-IDF 一二字 \+ 逻辑回归 +0\.8", text)
    assert (reader / "simple_demo" / "outputs" / "attention.png").exists()


@pytest.mark.slow
def test_gpt_runs(reader, monkeypatch):
    text = execute(reader, "gpt", monkeypatch)
    assert "贪心：i love cats" in text
    assert "【8】重复惩罚" in text and "once upon a time →" in text
    assert (reader / "gpt" / "outputs" / "next_token.png").exists()
