"""故意做坏的文档，和同一段文字写成的六种文件：知道坏在哪里，才量得出检查找回了几成、冤枉了几成。"""

from __future__ import annotations

import csv
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from nlp_common.base.errors import UserError
from rag_common.documents import read_document
from rag_common.noise import common, to_traditional

FOOTER = "本站内容仅供参考，转载请注明出处，第{}页。"
VARIED = "以上内容来自{}的{}，版权归{}所有。"
SITES = (
    "晨星网",
    "江南书屋",
    "远方来信",
    "百家文摘",
    "小城故事",
    "北窗",
    "青石巷",
    "长风论坛",
    "知春",
    "半亩塘",
)
# 毛病.做法，由容易到难
KINDS = {
    "empty.blank": "只有空白",
    "empty.punctuation": "只有标点",
    "duplicate.exact": "一字不差",
    "duplicate.few_changes": "改了 2%",
    "duplicate.many_changes": "改了 15%",
    "garbled.utf8_as_gbk": "UTF-8 读成 GBK",
    "garbled.utf8_as_latin1": "UTF-8 读成 Latin-1",
    "garbled.half": "后半篇读成 GBK",
    "boilerplate.footer": "页脚，页码不同",
    "boilerplate.other_words": "页脚，站名不同",
    "overlong.no_stops": "四百字没有标点",
}
# 一批怎样变了
DRIFTS = {
    "traditional": "全是繁体",
    "half_length": "只剩前一半",
    "other_domain": "全是别处来的",
    "quarter_other": "四分之一是别处来的",
    "tenth_other": "十分之一是别处来的",
}


def plant(texts: dict[str, str], share: float, seed: int) -> tuple[dict[str, str], dict[str, str]]:
    """→ (做坏了一些的文档, {名字: 哪种坏法})。每种坏法各做 share 那么多篇，重复的是另加的几篇。"""
    rng = random.Random(f"faults-{seed}")
    usable = [name for name, text in texts.items() if len(text) >= 80]
    each = max(6, int(share * len(usable)))  # 套话要有几篇才叫套话
    chosen = rng.sample(usable, min(len(KINDS) * each, len(usable)))
    spoiled, planted = dict(texts), {}
    for place, name in enumerate(chosen):
        kind = list(KINDS)[place % len(KINDS)]
        text = texts[name]
        if kind.startswith("duplicate"):
            name = f"{name}（又一份）"
        spoiled[name] = spoil(text, kind, rng)
        planted[name] = kind
    return spoiled, planted


def spoil(text: str, kind: str, rng: random.Random) -> str:
    if kind == "empty.blank":
        return " \n\u3000\n"
    if kind == "empty.punctuation":
        return "……——（）。，" * 6
    if kind == "duplicate.exact":
        return f"\u3000\u3000{text}\n"
    if kind == "duplicate.few_changes":
        return change_characters(text, 0.02, rng)
    if kind == "duplicate.many_changes":
        return change_characters(text, 0.15, rng)
    if kind == "garbled.utf8_as_gbk":
        return text.encode().decode("gbk", errors="replace")
    if kind == "garbled.utf8_as_latin1":
        return text.encode().decode("latin-1")
    if kind == "garbled.half":  # 只有后半是乱码，接在同一行
        half = len(text) // 2
        return text[:half] + text[half:].encode().decode("gbk", errors="replace")
    if kind == "boilerplate.footer":
        return f"{text}\n{FOOTER.format(rng.randrange(1, 99))}"
    if kind == "boilerplate.other_words":  # 意思一样，字不一样
        return f"{text}\n{VARIED.format(*rng.sample(SITES, 3))}"
    kept = "".join(char for char in text if char.isalnum())  # overlong：没有标点的一大串
    return kept * (400 // max(len(kept), 1) + 1)


def change_characters(text: str, rate: float, rng: random.Random) -> str:
    """把 rate 那么多的汉字换成别处的汉字。"""
    letters = [char for char in text if common(char)]
    return "".join(rng.choice(letters) if common(char) and rng.random() < rate else char for char in text)


def drifted(kind: str, texts: Sequence[str], strangers: Sequence[str], rng: random.Random) -> list[str]:
    """一批文档 → 变了的一批。strangers 是别处来的文字。"""
    if kind == "traditional":
        return [to_traditional(text) for text in texts]
    if kind == "half_length":
        return [text[: len(text) // 2] for text in texts]
    share = {"other_domain": 1.0, "quarter_other": 0.25, "tenth_other": 0.1}[kind]
    count = round(share * len(texts))
    return [*rng.sample(list(strangers), count), *texts[count:]]


# ---------------------------------------------------------------- 六种文件


def write_formats(folder: Path, title: str, paragraphs: Sequence[str]) -> list[Path]:
    """同样的几段，写成六种文件；没有装 python-docx 就没有 docx。"""
    folder.mkdir(parents=True, exist_ok=True)
    writers: dict[str, Callable[[Path], object]] = {
        "txt": lambda path: path.write_text("\n\n".join([title, *paragraphs]), encoding="utf-8"),
        "md": lambda path: path.write_text("\n\n".join([f"# {title}", *paragraphs]), encoding="utf-8"),
        "html": lambda path: path.write_text(page_of(title, paragraphs), encoding="utf-8"),
        "pdf": lambda path: path.write_bytes(pdf_of([title, *paragraphs])),
        "docx": lambda path: write_docx(path, title, paragraphs),
        "csv": lambda path: write_csv(path, title, paragraphs),
    }
    files = []
    for ending, write in writers.items():
        path = folder / f"样本.{ending}"
        try:
            write(path)
        except ImportError:
            print("（没有装 python-docx，跳过 docx：pip install python-docx）")
            continue
        files.append(path)
    return files


def read_back(folder: Path, text: str) -> dict[str, dict]:
    """text 写成六种文件再读回来：原文的几成在，多出来几个字（脚本、藏着的字、页眉都算多出来的）。"""
    whole = [re.sub(r"\s+", "", line) for line in text.split("\n") if line.strip()]
    rows = {}
    for path in write_formats(folder, "样本", whole):
        try:
            read = re.sub(r"\s+", "", read_document(path))
        except UserError as error:  # 没有装读它的包
            print(f"（{error}）")
            continue
        kept = sum(len(line) for line in whole if line in read) / sum(map(len, whole))
        rows[path.suffix[1:]] = {"kept": kept, "extra_characters": len(read) - sum(map(len, whole))}
    return rows


def page_of(title: str, paragraphs: Sequence[str]) -> str:
    """一页网页：除了正文，还有脚本、样式和藏起来的字，读的时候都不该要。"""
    body = "\n".join(f"<p>{text}</p>" for text in paragraphs)
    return (
        f"<html><head><meta charset='utf-8'><title>{title}</title><style>p {{ color: red }}</style></head><body>"
        f"<script>alert('广告')</script><div style='display:none'>藏着的字</div>{body}</body></html>"
    )


def write_docx(path: Path, title: str, paragraphs: Sequence[str]) -> None:
    import docx

    file = docx.Document()
    for text in (title, *paragraphs):
        file.add_paragraph(text)
    file.save(str(path))


def write_csv(path: Path, title: str, paragraphs: Sequence[str]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["题目", "正文"])
        writer.writerows([title, text] for text in paragraphs)


def pdf_of(lines: Sequence[str], width: int = 30) -> bytes:
    """照格式手写的一页 PDF。字的编号就是它的 Unicode，ToUnicode 表说了出来，所以读得回文字；一行 width 个字。"""
    rows = [text[i : i + width] for text in lines for i in range(0, len(text), width)]
    shown = "".join(f"<{row.encode('utf-16-be').hex()}> Tj 0 -16 Td\n" for row in rows)
    stream = f"BT /F1 12 Tf 40 800 Td\n{shown}ET".encode()
    codes = sorted({char.encode("utf-16-be").hex() for char in "".join(rows) if ord(char) < 0x10000})
    parts_of_map = []
    for start in range(0, len(codes), 100):  # 一节最多 100 行
        part = codes[start : start + 100]
        lines_of_part = "".join(f"<{code}> <{code}>\n" for code in part)
        parts_of_map.append(f"{len(part)} beginbfchar\n{lines_of_part}endbfchar\n")
    table = (
        "/CIDInit /ProcSet findresource begin 12 dict begin begincmap /CMapName /U def /CMapType 2 def\n"
        f"1 begincodespacerange <0000> <FFFF> endcodespacerange\n{''.join(parts_of_map)}endcmap end end"
    ).encode()
    objects = [
        b"<</Type/Catalog/Pages 2 0 R>>",
        b"<</Type/Pages/Kids[3 0 R]/Count 1>>",
        b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 595 842]/Contents 4 0 R/Resources<</Font<</F1 5 0 R>>>>>>",
        b"<</Length %d>>\nstream\n%b\nendstream" % (len(stream), stream),
        b"<</Type/Font/Subtype/Type0/BaseFont/Song/Encoding/Identity-H/DescendantFonts[6 0 R]/ToUnicode 7 0 R>>",
        b"<</Type/Font/Subtype/CIDFontType2/BaseFont/Song/DW 1000"
        b"/CIDSystemInfo<</Registry(Adobe)/Ordering(Identity)/Supplement 0>>>>",
        b"<</Length %d>>\nstream\n%b\nendstream" % (len(table), table),
    ]
    out, places = b"%PDF-1.4\n", []
    for number, each in enumerate(objects, 1):
        places.append(len(out))
        out += b"%d 0 obj\n%b\nendobj\n" % (number, each)
    start = len(out)
    out += b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1)
    out += b"".join(b"%010d 00000 n \n" % place for place in places)
    return out + b"trailer\n<</Size %d/Root 1 0 R>>\nstartxref\n%d\n%%%%EOF" % (len(objects) + 1, start)
