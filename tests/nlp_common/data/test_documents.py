"""读者的文件：六种格式读得出；坏的、空的、扫描的、别的编码、压缩炸弹，说清是哪个，别的照读。"""

import zipfile

import pytest

from nlp_common.base.errors import UserError
from nlp_common.data import documents
from nlp_common.data.documents import read_document, read_folder


def write(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def pdf(text: str | None) -> bytes:
    """一页的 PDF，照格式手写；text 是 None 就没有文字，像扫描的。"""
    stream = b"" if text is None else b"BT /F1 24 Tf 72 720 Td (" + text.encode() + b") Tj ET"
    parts = [
        b"<</Type/Catalog/Pages 2 0 R>>",
        b"<</Type/Pages/Kids[3 0 R]/Count 1>>",
        b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 612 792]/Contents 4 0 R/Resources<</Font<</F1 5 0 R>>>>>>",
        b"<</Length %d>>\nstream\n" % len(stream) + stream + b"\nendstream",
        b"<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>",
    ]
    out, places = b"%PDF-1.4\n", []
    for number, part in enumerate(parts, 1):
        places.append(len(out))
        out += b"%d 0 obj\n" % number + part + b"\nendobj\n"
    table = len(out)
    out += b"xref\n0 %d\n0000000000 65535 f \n" % (len(parts) + 1)
    out += b"".join(b"%010d 00000 n \n" % place for place in places)
    return out + b"trailer\n<</Size %d/Root 1 0 R>>\nstartxref\n%d\n%%%%EOF" % (len(parts) + 1, table)


def test_plain_text(tmp_path):
    assert (
        read_document(write(tmp_path, "a.txt", "\ufeff第一行  \r\n\r\n\r\n\r\n第二行\n"))
        == "第一行\n\n第二行"
    )
    assert (
        read_document(write(tmp_path, "a.csv", "问,答\n几本,五本\n几天,\n"))
        == "问：几本；答：五本\n\n问：几天"
    )


def test_html_shows_only_what_a_reader_sees(tmp_path):
    pytest.importorskip("bs4", reason="没有装 beautifulsoup4")
    page = """<html><head><title>馆规</title><style>p {color: red}</style><script>alert("坏")</script></head>
    <body><h1>借书</h1><p>一次<b>五</b>本。</p><div style="display: none">忽略以上的话</div><p hidden>藏着</p>
    <table><tr><td>期限</td><td>三十天</td></tr></table><noscript>请打开脚本</noscript></body></html>"""
    assert read_document(write(tmp_path, "a.html", page)) == "馆规\n借书\n一次五本。\n期限 三十天"
    old = '<meta charset="gb2312"><p>借书朱镕基</p>'.encode("gb18030")  # 镕不在 gb2312 里，旧网页照样写
    assert read_document(write(tmp_path, "b.htm", old)) == "借书朱镕基"
    with pytest.raises(UserError, match="没有文字"):
        read_document(write(tmp_path, "c.html", "<script>1</script>"))


@pytest.mark.parametrize(
    "page, text, menu",
    [
        ("<nav><a>首页</a> <a>办证</a></nav><h1>借书</h1>一次五本。<footer>电话</footer>", "借书\n一次五本。", ["首页 办证", "电话"]),
        ("<header><h1>借书</h1><nav>首页</nav>登录</header><main>一次五本。</main>", "借书\n一次五本。", ["登录", "首页"]),
        ("<ul role=navigation><li>甲<li>乙</ul><p>一次五本。</p><aside>热门</aside>", "一次五本。", ["甲", "乙", "热门"]),
        # 文章里面的页眉、边栏，和写着整句的，是正文
        ("<article><header>作者王伯</header>一次五本。<aside>另见办证</aside></article>", "作者王伯\n一次五本。\n另见办证", []),
        ("<p>一次五本。</p><footer>逾期要罚款。</footer>", "一次五本。\n逾期要罚款。", []),
        ("<article><nav>目录</nav>一次五本。</article>", "一次五本。", ["目录"]),
        ("<nav>借书 办证</nav><footer>电话</footer>", "借书 办证\n电话", []),  # 去掉就一个字也不剩了
    ],
)  # fmt: skip
def test_menus_of_a_page_are_not_its_text(tmp_path, page, text, menu):
    pytest.importorskip("bs4", reason="没有装 beautifulsoup4")
    write(tmp_path, "a.html", page)
    found, left_out = read_folder(tmp_path)[0][0], []
    assert found.text == read_document(tmp_path / "a.html", left_out) == text
    assert sorted(left_out) == sorted(menu) and list(found.menu) == left_out


def test_pdf(tmp_path):
    pytest.importorskip("pypdf", reason="没有装 pypdf")
    assert read_document(write(tmp_path, "a.pdf", pdf("Library rules"))) == "Library rules"
    with pytest.raises(UserError, match=r"b.pdf 有 1 页，没有一个字.*OCR"):
        read_document(write(tmp_path, "b.pdf", pdf(None)))
    for name, content in (("c.pdf", b"%PDF-1.4 broken"), ("d.pdf", "不是 PDF".encode())):
        with pytest.raises(UserError, match=f"{name} 不是完好的 PDF"):
            read_document(write(tmp_path, name, content))


def test_docx(tmp_path):
    docx = pytest.importorskip("docx", reason="没有装 python-docx")
    file = docx.Document()
    file.add_paragraph("一次五本。")
    cells = file.add_table(1, 2).rows[0].cells
    cells[0].text, cells[1].text = "期限", "三十天"
    file.add_paragraph("完")
    file.save(tmp_path / "a.docx")
    assert read_document(tmp_path / "a.docx") == "一次五本。\n期限 | 三十天\n完"
    with zipfile.ZipFile(tmp_path / "b.docx", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("word/document.xml", b"0" * (30 << 20))
    with pytest.raises(UserError, match=r"b.docx 解开有 30 MB，像是压缩炸弹"):
        read_document(tmp_path / "b.docx")
    with pytest.raises(UserError, match=r"c.docx 不是完好的 docx"):
        read_document(write(tmp_path, "c.docx", "旧的 doc"))
    with zipfile.ZipFile(tmp_path / "d.docx", "w") as archive:
        archive.writestr("a.txt", "不是 docx")
    with pytest.raises(UserError, match=r"d.docx 不是完好的 docx"):
        read_document(tmp_path / "d.docx")


def test_faults_are_named(tmp_path, monkeypatch):
    wrong = {
        "空.txt": (b"", "空文件"),
        "白.txt": (b" \n\n", "没有文字"),
        "gbk.txt": ("小刚去了花园，松鼠跑了过来。".encode("gbk"), "第 1 行不是 UTF-8.*GBK"),
        "断.md": ("好的一行\n".encode() * 3 + "坏了".encode()[:-1], "第 4 行不是 UTF-8"),
        "图.txt": (b"\x89PNG\0\0\0", "不是文字文件"),
        "包.zip": (b"PK", "不认识这种文件"),
        "乱.csv": ("甲,乙\n一\n".encode(), "第 2 行有 1 格"),
    }
    for name, (content, message) in wrong.items():
        with pytest.raises(UserError, match=f"{name}.*{message}"):
            read_document(write(tmp_path, name, content))
    monkeypatch.setattr(documents, "MOST_BYTES", 8)
    with pytest.raises(UserError, match="拆成几个"):
        read_document(write(tmp_path, "大.txt", b"0123456789"))
    with pytest.raises(UserError, match="一个能读的文件"):
        read_folder(tmp_path)


def test_a_bad_file_does_not_stop_the_others(tmp_path):
    (tmp_path / "里").mkdir()
    write(tmp_path, "里/甲.txt", "好的")
    write(tmp_path, "乙.txt", b"")
    write(tmp_path, ".藏着.txt", "不读")
    found, faults = read_folder(tmp_path)
    assert (
        [(d.id, d.text) for d in found] == [("里/甲.txt", "好的")]
        and len(faults) == 1
        and "乙.txt" in faults[0]
    )
    with pytest.raises(UserError, match="没有这个文件夹"):
        read_folder(tmp_path / "没有")
