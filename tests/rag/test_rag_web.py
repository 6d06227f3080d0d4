"""网页：书架收文件、给进度、换成新的；提问给出处、标黄；在真的浏览器里拖文件、提问一遍（没有就跳过）。"""

import re
import shutil
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rag_web as rw
from nlp_common.base import web_page
from nlp_common.base.errors import UserError
from rag_common.chunking import Chunk
from rag_common.embed import HashedEmbedder
from rag_common.generate import Answer, load_generator
from rag_common.store import open_store
from rag_library import Found, Library, marked, sources_html

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture
def library(tmp_path):
    embedder = HashedEmbedder()
    store = open_store(f"faiss://{tmp_path / 'shelf'}", embedder.fingerprint, embedder.dim)
    yield Library(store, embedder, load_generator("extract"))
    store.close()


def write(folder, **texts):
    folder.mkdir(exist_ok=True)
    paths = []
    for name, text in texts.items():
        path = folder / f"{name}.txt"
        path.write_text(text, encoding="utf-8")
        paths.append(path)
    return paths


# ---------------------------------------------------------------- 书架


def test_files_come_in_with_progress_and_bad_ones_are_named(library, tmp_path):
    long = "\n\n".join(f"第 {i} 段，讲的是编号 {i} 的事情，一共写了这么几个字。" for i in range(40))
    paths = [
        *write(tmp_path / "in", 甲="牛肉面二十元。", 长=long),
        tmp_path / "in" / "空.txt",
        tmp_path / "in" / "图.xyz",
    ]
    paths[2].write_bytes(b"")
    paths[3].write_text("x")
    lines = list(library.add(paths, 40))
    assert "✓ 甲.txt：1 块" in lines
    steps = [line for line in lines if line.startswith("… 长.txt")]
    assert len(steps) > 1 and re.search(r"(\d+) / \1 块", steps[-1])
    assert sum(line.startswith("✗") for line in lines) == 2
    assert any("空.txt 是空文件" in line for line in lines) and any(
        "不认识这种文件" in line for line in lines
    )
    assert library.documents()["甲.txt"] == 1 and list(library.documents()) == ["甲.txt", "长.txt"]


def test_a_file_of_the_same_name_replaces_and_keeps_what_did_not_change(library, tmp_path):
    text = "# 甲\n\n" + "第一段话写在这里。" * 5 + "\n\n" + "第二段话也在这里。" * 5
    list(library.add(write(tmp_path / "in", 规章=text), 50))
    before = library.store.count()
    seen = library.embedder.tokens_seen
    lines = list(library.add(write(tmp_path / "in", 规章=text.replace("第二段", "改过的")), 50))
    assert "块没变，不用重新编码" in lines[-1]
    assert library.embedder.tokens_seen - seen < 120  # 只编码了改过的那一段
    assert library.store.count() == before == len(library.bm25)
    assert "改过的" in library.ask("改过的话在哪里？").answer.text
    assert "第二段" not in "".join(chunk.text for chunk in library.ask("第二段话").sources)


def test_what_was_removed_is_never_found_again(library, tmp_path):
    list(library.add(write(tmp_path / "in", 甲="暗号是芝麻开门。", 乙="今天吃面条。"), 60))
    assert "芝麻开门" in library.ask("暗号是什么？").answer.text
    assert library.remove("甲.txt") == "✓ 拿走了 甲.txt（1 块）"
    assert library.remove("甲.txt") == "书架上没有 甲.txt"
    for way in ("混合", "字面", "向量"):
        assert all(chunk.document == "乙.txt" for chunk in library.ask("暗号是什么？", 5, way).sources)


def test_the_shelf_is_still_there_after_a_restart(library, tmp_path):
    list(library.add(write(tmp_path / "in", 甲="暗号是芝麻开门。"), 60))
    embedder = HashedEmbedder()
    store = open_store(library.store.url, embedder.fingerprint, embedder.dim)
    again = Library(store, embedder, load_generator("extract"))
    assert again.documents() == {"甲.txt": 1} and again.ask("暗号？").sources[0].document == "甲.txt"
    store.close()


def test_an_empty_question_and_an_empty_shelf(library):
    with pytest.raises(UserError, match="还没有写问题"):
        library.ask("  ")
    with pytest.raises(UserError, match="书架是空的"):
        library.ask("有吗？")


# ---------------------------------------------------------------- 出处


def test_the_same_words_are_yellow():
    assert marked("借期几天？", "借期十天。", "新书借期十天，不续。") == "新书<mark>借期十天</mark>，不续。"
    assert marked("甲", "乙", "丙") == "丙"
    assert marked("借期几天？", "", "İİ借期") == "İİ<mark>借期</mark>"  # 小写比大写长的字


@given(st.text("ab<>&\"'甲乙", max_size=30), st.text("ab<甲乙", max_size=10))
@settings(max_examples=100, deadline=None)
def test_text_of_documents_stays_text(text, question):
    import html

    said = marked(question, "", text)
    assert html.unescape(re.sub(r"</?mark>", "", said)) == text
    assert said.count("<mark>") == said.count("</mark>") and "<mark><mark>" not in said


def test_sources_name_where_they_are_from():
    chunk = Chunk("i", "<script>x</script>\n借期十天", "坏<b>.txt", 4, 20)
    page = sources_html("借期？", Found(Answer("借期十天[1]", [0]), [chunk]))
    assert "坏&lt;b&gt;.txt　第 5–20 字" in page and "回答引用了它" in page and "<script>" not in page
    assert "什么也没有查到" in sources_html("？", Found(Answer(""), []))


# ---------------------------------------------------------------- 命令行


def flags(tmp_path, *more):
    return ["--embedder", "hashed", "--store", f"faiss://{tmp_path / 's'}", *more]


def test_asking_without_a_page(tmp_path, capsys):
    found = rw.main(flags(tmp_path, "--ask", "学生证一次最多借几本？"))
    assert "十二本" in found["answer"] and found["sources"][0] == "借书.md"
    assert "→ [1] 借书.md" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "said"),
    [(["--documents", "没有的"], "没有 --documents"), (["--way", "猜"], "猜"), (["--size", "1"], "20")],
)
def test_bad_settings(tmp_path, more, said):
    with pytest.raises(UserError, match=said):
        rw.main(flags(tmp_path, "--ask", "问？", *more))


# ---------------------------------------------------------------- 浏览器


@pytest.mark.slow
def test_documents_are_dropped_in_and_asked_about_in_a_browser(library, tmp_path):
    pytest.importorskip("gradio", reason="没有装 gradio，不测网页")
    sync_api = pytest.importorskip("playwright.sync_api", reason="没有装 playwright，不测网页")
    if CHROMIUM is None:
        pytest.skip("没有找到 Chromium（Debian：apt-get install chromium），不测网页")
    paths = write(tmp_path / "in", 菜单="牛肉面一碗二十元。<script>alert(1)</script>炸酱面一碗十五元。")
    paths.append(tmp_path / "in" / "图.xyz")
    paths[1].write_text("x")
    page_settings = SimpleNamespace(k=3, way="混合", size=60)
    page = rw.build_page(library, page_settings)
    url = web_page.launch(page, None, css=rw.STYLE)
    try:
        with sync_api.sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
            window = browser.new_page(viewport={"width": 1200, "height": 900})
            errors, urls = [], []
            window.on("pageerror", lambda error: errors.append(str(error)))
            window.on("dialog", lambda dialog: errors.append(dialog.message))
            window.on("request", lambda request: urls.append(request.url))
            window.goto(url)
            window.fill("#question textarea", "炸酱面多少钱？")
            window.press("#question textarea", "Enter")
            window.wait_for_function(
                "document.querySelector('#answer textarea').value.includes('书架是空的')"
            )
            # 给内容不给路径：测试里没有 LANG，浏览器打不开中文的路径
            files = [
                {"name": path.name, "mimeType": "text/plain", "buffer": path.read_bytes()} for path in paths
            ]
            window.locator("#files input[type=file]").set_input_files(files)
            window.locator("#files", has_text="菜单").wait_for()
            window.click("#add")
            window.wait_for_function(
                "document.querySelector('#progress textarea').value.includes('✓ 菜单.txt')"
            )
            window.locator("#shelf", has_text="菜单.txt").wait_for()
            window.fill("#question textarea", "炸酱面多少钱？")
            window.press("#question textarea", "Enter")
            window.wait_for_function("document.querySelector('#answer textarea').value.includes('十五元')")
            assert (
                "炸酱面" in window.inner_text("#sources mark >> nth=0")
                or window.locator("#sources mark").count()
            )
            assert "<script>alert(1)</script>" in window.inner_text("#sources")
            background = window.eval_on_selector("#sources mark", "e => getComputedStyle(e).backgroundColor")
            assert background == "rgb(255, 229, 138)"
            if picture := tmp_path / "page.png":
                window.screenshot(path=str(picture))
            browser.close()
        assert errors == []
        assert not [each for each in urls if not each.startswith(("http://127.0.0.1:", "data:", "blob:"))]
    finally:
        page.close()
