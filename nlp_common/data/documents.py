"""读者自己的文件 → 文字：txt md html pdf docx csv。读不了的说出是哪个文件、为什么、怎么办，别的文件照读。"""

from __future__ import annotations

import logging
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nlp_common.base.errors import UserError
from nlp_common.data.encodings import BOM, raw_lines, what_is_wrong
from nlp_common.data.files import read_file

MOST_BYTES = 100 << 20  # 一个文件最大 100 MB
MOST_UNPACKED = 200 << 20  # docx 解开之后最大 200 MB，
MOST_RATIO = 200  # 且不超过压缩时的 200 倍：再多就是压缩炸弹
# 网页里自成一行的：前后都换行
BLOCKS = ["p", "div", "br", "li", "tr", "h1", "h2", "h3", "h4", "h5", "h6", "section", "article", "title"]
BLOCKS += [
    "nav",
    "header",
    "footer",
    "aside",
    "main",
    "table",
    "ul",
    "ol",
    "dl",
    "dt",
    "dd",
    "pre",
    "blockquote",
]
MENU_ROLES = {"navigation", "menu", "menubar", "search"}  # 写成别的标签的菜单
FURNITURE = ["header", "footer", "aside"]  # 页眉、页脚、边栏：在文章外面、没有整句的，也是菜单
HEADINGS = ["h1", "h2", "h3", "h4", "h5", "h6"]
INSTALL = '{path}：{what} 需要 {package}：pip install {package}（或 pip install -e ".[rag]"）。'


@dataclass(frozen=True)
class Document:
    """一篇文档。id 在一个语料里只有一个；meta 里是别的栏；menu 是网页里没有读的菜单，一行一个。"""

    id: str
    text: str
    meta: dict = field(default_factory=dict)
    menu: tuple[str, ...] = ()


def read_folder(folder: str | Path) -> tuple[list[Document], list[str]]:
    """一个文件夹（连同里面的文件夹）→ (文档, 读不了的文件各一句话)。id 是相对的路径，次序固定。

    以 . 开头的不读；后缀不认识的也记一句。一篇也没有是 UserError。
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise UserError(f"没有这个文件夹：{folder}（当前目录是 {Path.cwd()}）。")
    documents, faults = [], []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_dir() or any(part.startswith(".") for part in name.parts):
            continue
        try:
            menu: list[str] = []
            text = read_document(path, menu)
            documents.append(Document(name.as_posix(), text, menu=tuple(menu)))
        except UserError as error:
            faults.append(str(error))
    if not documents:
        reasons = "\n  ".join(faults[:5]) or "里面没有文件"
        raise UserError(f"{folder} 里没有一个能读的文件（能读 {' '.join(READERS)}）：\n  {reasons}")
    return documents, faults


def read_document(path: str | Path, menu: list[str] | None = None) -> str:
    """一个文件的文字。空的、坏的、不认识的、太大的是 UserError。网页的菜单不读；给了 menu，就添进去。"""
    path = Path(path).expanduser()
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"{path}：不认识这种文件，能读的后缀有 {' '.join(READERS)}。")
    try:
        size = path.stat().st_size
        if size == 0:
            raise UserError(f"{path} 是空文件（0 字节）。")
        if size > MOST_BYTES:
            raise UserError(f"{path} 有 {size >> 20} MB，超过 {MOST_BYTES >> 20} MB：先拆成几个小的。")
        text = _read_html(path, menu) if reader is _read_html else reader(path)
    except OSError as error:
        raise UserError(f"读不了 {path}：{error.strerror or error}。") from error
    text = re.sub(r"[ \t\u3000\xa0]+\n", "\n", text.replace("\r\n", "\n").replace("\r", "\n"))
    text = re.sub(r"\n{3,}", "\n\n", text).strip()
    if not text:
        raise UserError(f"{path} 里没有文字。")
    return text


# ---------------------------------------------------------------- 各种格式


def _read_text(path: Path) -> str:
    data = path.read_bytes()
    if b"\0" in data[:4096] and data[:2] not in (b"\xff\xfe", b"\xfe\xff"):
        raise UserError(f"{path} 不是文字文件（里面有 0 字节）。")
    try:
        return data.decode("utf-8").replace(BOM, "")
    except UnicodeDecodeError:
        for number, line in enumerate(raw_lines(path), 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise UserError(what_is_wrong(path, number, error)) from error
        raise


def _read_html(path: Path, menu: list[str] | None = None) -> str:
    """网页上看得见的字：脚本、样式、模板、菜单不要，块之间换行。除了菜单什么也没有的，菜单也算。"""
    try:
        from bs4 import BeautifulSoup
    except ImportError:
        raise UserError(INSTALL.format(path=path, what="读 html", package="beautifulsoup4")) from None
    page = BeautifulSoup(_html_text(path), "html.parser")
    for node in page(["script", "style", "noscript", "template", "svg", "iframe", "object"]):
        node.decompose()
    for node in page.find_all(style=re.compile(r"display\s*:\s*none", re.IGNORECASE)) + page.find_all(
        hidden=True
    ):
        node.decompose()
    for node in page(BLOCKS):
        node.insert_before("\n")
        node.append("\n")
    for node in page(["td", "th"]):
        node.append(" ")
    whole = _lines_of(page)
    taken = _take_menus(page)
    lines = _lines_of(page)
    if not lines:
        return "\n".join(whole)
    if menu is not None:
        menu += taken
    return "\n".join(lines)


def _take_menus(page: Any) -> list[str]:
    """从网页里拿走菜单，返回拿走的各行。页眉里的标题留下。"""
    taken: list[str] = []
    for node in page(True):
        if node.decomposed:
            continue
        is_menu = node.name == "nav" or str(node.get("role")).lower() in MENU_ROLES
        outside = node.name in FURNITURE and not node.find_parent(["article", "main"])
        if not is_menu and not (outside and not re.search("[。！？]", node.get_text())):
            continue
        for heading in [] if is_menu else node(HEADINGS):
            node.insert_before(heading.extract())
        taken += _lines_of(node)
        node.decompose()
    return taken


def _lines_of(node: Any) -> list[str]:
    lines = (" ".join(line.split()) for line in node.get_text().split("\n"))
    return [line for line in lines if line]


def _html_text(path: Path) -> str:
    """网页写明了编码的照它解（gb2312 的网页常有 GBK 的字，按更大的 gb18030 解）；没写的是 UTF-8。"""
    data = path.read_bytes()
    declared = re.search(rb"charset\s*=\s*[\"']?\s*([\w-]+)", data[:4096], re.IGNORECASE)
    encoding = declared[1].decode("ascii").lower() if declared else "utf-8"
    encoding = "gb18030" if encoding in ("gb2312", "gbk") else encoding
    if encoding not in ("utf-8", "utf8"):
        try:
            return data.decode(encoding)
        except (UnicodeDecodeError, LookupError):
            pass  # 写错了：按 UTF-8 再试，还不行就说出来
    return _read_text(path)


def _read_pdf(path: Path) -> str:
    try:
        import pypdf
    except ImportError:
        raise UserError(INSTALL.format(path=path, what="读 pdf", package="pypdf")) from None
    logging.getLogger("pypdf").setLevel(logging.CRITICAL)  # 小毛病它自己绕得过去；大毛病在下面用中文说
    try:
        reader = pypdf.PdfReader(path)
        if reader.is_encrypted and not reader.decrypt(""):
            raise UserError(f"{path} 有密码：先去掉密码再放进来。")
        pages = [page.extract_text() or "" for page in reader.pages]
    except UserError:
        raise
    except Exception as error:  # 坏的 PDF 花样很多，pypdf 各抛各的
        raise UserError(
            f"{path} 不是完好的 PDF（{error.__class__.__name__}）：重新下载或另存一遍。"
        ) from error
    if not pages:
        raise UserError(f"{path} 一页也没有。")
    if not "".join(pages).strip():
        raise UserError(
            f"{path} 有 {len(pages)} 页，没有一个字：多半是扫描的图，先用 OCR 认出文字（如 ocrmypdf -l chi_sim）。"
        )
    return "\n\n".join(pages)


def _read_docx(path: Path) -> str:
    """段落与表格，按次序；表格一行一行，格子之间是竖线。"""
    try:
        import docx
    except ImportError:
        raise UserError(INSTALL.format(path=path, what="读 docx", package="python-docx")) from None
    refuse_bomb(path)
    try:
        blocks = []
        for block in docx.Document(str(path)).iter_inner_content():
            if hasattr(block, "rows"):
                blocks += [" | ".join(cell.text.strip() for cell in row.cells) for row in block.rows]
            else:
                blocks.append(block.text)
    except Exception as error:
        raise UserError(
            f"{path} 不是完好的 docx（{error.__class__.__name__}）：用 Word 打开另存一遍。"
        ) from error
    return "\n".join(blocks)


def refuse_bomb(path: Path) -> None:
    """压缩包说自己解开有多大：太大，或是压缩时的几百倍，不解。"""
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(item.file_size for item in archive.infolist())
    except (zipfile.BadZipFile, OSError) as error:
        raise UserError(
            f"{path} 不是完好的 docx（{error}）：用 Word 打开另存一遍；旧的 .doc 要先转成 .docx。"
        ) from error
    if unpacked > MOST_UNPACKED or unpacked > MOST_RATIO * path.stat().st_size + (1 << 20):
        raise UserError(f"{path} 解开有 {unpacked / 2**20:.0f} MB，像是压缩炸弹，不读它。")


def _read_csv(path: Path) -> str:
    """一行一段，写成"列名：值"。"""
    lines = []
    for row in read_file(path):
        cells = [f"{name}：{str(value).strip()}" for name, value in row.items() if str(value).strip()]
        lines.append("；".join(cells))
    return "\n\n".join(lines)


READERS: dict[str, Callable[[Path], str]] = {
    ".txt": _read_text,
    ".md": _read_text,
    ".html": _read_html,
    ".htm": _read_html,
    ".pdf": _read_pdf,
    ".docx": _read_docx,
    ".csv": _read_csv,
    ".tsv": _read_csv,
}
