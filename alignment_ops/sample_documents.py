"""一个文件夹的样板文档：小动物的档案，每份六件事，存成五种格式，各带各的脏东西。

文档是程序写的，所以每件事的答案、哪几行是脏东西，都知道：读、清洗、出题的每一步因此量得出对几成。
"""

from __future__ import annotations

import random
import zipfile
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

from nlp_common.tiny.world import WORLD

FORMATS = ("md", "txt", "html", "pdf", "docx")
FIELDS = ("place", "food", "friend", "time", "color", "mood")
# 每件事的几种写法；{s} 是这只动物。最后一种写得随便，规则多半认不出：真的文档里总有这样的句子。
SENTENCES = {
    "place": ["{s}住在{v}。", "{s}住在{v}，不怕生人。", "要找{s}，就去{v}。"],
    "food": ["{s}爱吃{v}。", "{s}每天吃{v}。", "给一块{v}，{s}就过来。"],
    "friend": ["照看{s}的是{v}。", "{s}由{v}照看。", "{v}天天来看{s}。"],
    "time": ["{s}在{v}出来。", "{s}每天{v}出来走走。", "想见{s}，{v}来最好。"],
    "color": ["颜色：{v}", "{s}的颜色是{v}。", "{s}一身{v}。"],
    "mood": ["心情：{v}", "{s}的心情是{v}。", "看上去{s}很{v}。"],
}
ODD_SHARE = 0.06  # 随便写的占多少
NAV = ["首页 | 动物 | 照片 | 联系我们", "版权所有 动物园，转载请注明出处"]
COVER = "动物园档案 内部资料 请勿外传"
RULE_LINE = "＝" * 16
# 每种格式里的脏东西，看还在不在用的（空格不算）
NOISE = {
    "md": ["updated:", "待补照片", "photo.png", "index.html", "**"],
    "txt": ["内部资料", "＝＝", "\u200b"],
    "html": ["联系我们", "版权所有"],
    "pdf": ["内部资料", "第1页", "第2页"],
    "docx": ["内部资料"],
}


@dataclass(frozen=True)
class Sample:
    """一份样板：subject 是写谁的，facts 是 {哪件事: 答案}，sentences 是 {哪件事: 原句}，copy_of 是照着哪一份另存的。"""

    name: str
    subject: str
    facts: dict[str, str]
    sentences: dict[str, str]
    copy_of: str | None = None


def write_samples(folder: Path, n: int, copies: int, seed: int) -> list[Sample]:
    """往 folder 里写 n 份不同的文档，再把其中 copies 份换一种格式另存；返回每一份写了什么。"""
    rng = random.Random(f"samples-{seed}")
    subjects = [f"{person}的{animal}" for person in WORLD["person"] for animal in WORLD["animal"]]
    rng.shuffle(subjects)
    folder.mkdir(parents=True, exist_ok=True)
    samples = []
    for number, subject in enumerate(subjects[:n]):
        facts = {field: rng.choice(WORLD[field]) for field in FIELDS}
        told = tell(rng, subject, facts)
        kind = FORMATS[number % len(FORMATS)]
        samples.append(_save(folder, f"{number:03d}", kind, subject, facts, told))
        if number < copies:  # 同一份，另一个人换一种格式又存了一遍：名字不同，写的一样
            kind = FORMATS[(number + 1) % len(FORMATS)]
            name = f"{number:03d}-副本"
            samples.append(_save(folder, name, kind, subject, facts, told, samples[-1].name))
    return samples


def tell(rng: random.Random, subject: str, facts: dict[str, str]) -> list[dict[str, str]]:
    """→ 两段 {哪件事: 一句}，每段三句。每段的头一句写名字，后面的用"它"；冒号写法的放在最后，像档案里的一栏。"""
    fields = list(facts)
    rng.shuffle(fields)
    paragraphs = []
    for part in (fields[:3], fields[3:]):
        forms = {}
        for field in part:
            plain, other, odd = SENTENCES[field]
            forms[field] = odd if rng.random() < ODD_SHARE else rng.choice([plain, other])
        ordered = sorted(part, key=lambda field: "：" in forms[field])
        lines, name = {}, subject
        for field in ordered:
            lines[field] = forms[field].format(s=name, v=facts[field])
            name = "它"
        paragraphs.append(lines)
    return paragraphs


def _save(
    folder: Path,
    name: str,
    kind: str,
    subject: str,
    facts: dict[str, str],
    told: list[dict[str, str]],
    copy_of: str | None = None,
) -> Sample:
    path = folder / f"{name}.{kind}"
    WRITERS[kind](path, subject, [list(lines.values()) for lines in told])
    sentences = {field: line for lines in told for field, line in lines.items()}
    return Sample(path.name, subject, facts, sentences, copy_of)


# ---------------------------------------------------------------- 五种格式


def _blocks(lines: list[str]) -> tuple[str, list[str]]:
    """一段 → (连成一段的句子, 冒号写法的几栏)。"""
    return "".join(line for line in lines if "：" not in line), [line for line in lines if "：" in line]


def write_md(path: Path, subject: str, paragraphs: list[list[str]]) -> None:
    """脏东西：front matter、注释、图片、链接。"""
    text = f"---\nauthor: 动物园\nupdated: 2026-11-02\n---\n\n# {subject}\n\n![照片](photo.png)\n<!-- 待补照片 -->\n"
    for title, lines in zip(("概况", "日常"), paragraphs, strict=True):
        prose, items = _blocks(lines)
        text += f"\n## {title}\n\n{prose}\n\n" + "".join(f"- **{item}**\n" for item in items)
    path.write_text(text + "\n[回到首页](index.html)\n", encoding="utf-8")


def write_txt(path: Path, subject: str, paragraphs: list[list[str]]) -> None:
    """脏东西：字中间的空格、零宽字符、分隔线、封面上的一行。"""
    text = f"{COVER}\n{RULE_LINE}\n{subject}\n{RULE_LINE}\n"
    for lines in paragraphs:
        prose, items = _blocks(lines)
        spaced = prose[:6].replace("", " ").strip() + "\u200b" + prose[6:]
        text += f"\n　　{spaced}\n" + "".join(f"{item}\n" for item in items)
    path.write_text(text, encoding="utf-8")


def write_html(path: Path, subject: str, paragraphs: list[list[str]]) -> None:
    """脏东西：菜单、页脚、脚本、样式。"""
    body = f"<nav>{NAV[0]}</nav><script>var n = 1;</script><h1>{subject}</h1>"
    for lines in paragraphs:
        prose, items = _blocks(lines)
        body += f"<p>{prose}</p>" if prose else ""
        if items:
            cells = (item.split("：") for item in items)
            body += "<table>" + "".join(f"<tr><td>{a}：</td><td>{b}</td></tr>" for a, b in cells) + "</table>"
    page = f'<html><head><meta charset="utf-8"><style>p {{color: red}}</style></head><body>{body}'
    path.write_text(f"{page}<footer>{NAV[1]}</footer></body></html>", encoding="utf-8")


def write_docx(path: Path, subject: str, paragraphs: list[list[str]]) -> None:
    """一个 docx 是几个 xml 压在一起。脏东西：封面上的一行。"""
    body = _word(COVER) + _word(subject)
    for lines in paragraphs:
        prose, items = _blocks(lines)
        body += _word(prose) if prose else ""
        if items:
            rows = ["".join(f"<w:tc>{_word(cell)}</w:tc>" for cell in item.split("：")) for item in items]
            body += "<w:tbl>" + "".join(f"<w:tr>{row}</w:tr>" for row in rows) + "</w:tbl>"
    office = "http://schemas.openxmlformats.org"
    parts = {
        "[Content_Types].xml": f'<Types xmlns="{office}/package/2006/content-types"><Default Extension="rels" '
        'ContentType="application/vnd.openxmlformats-package.relationships+xml"/><Override PartName="/word/document.xml" '
        'ContentType="application/vnd.openxmlformats-officedocument.wordprocessingml.document.main+xml"/></Types>',
        "_rels/.rels": f'<Relationships xmlns="{office}/package/2006/relationships"><Relationship Id="r1" '
        f'Type="{office}/officeDocument/2006/relationships/officeDocument" Target="word/document.xml"/></Relationships>',
        "word/document.xml": f'<w:document xmlns:w="{office}/wordprocessingml/2006/main"><w:body>{body}</w:body></w:document>',
    }
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, xml in parts.items():  # 时间写死：同一种子，文件一个字节也不差
            item = zipfile.ZipInfo(name, date_time=(2026, 1, 1, 0, 0, 0))
            archive.writestr(item, '<?xml version="1.0" encoding="UTF-8"?>' + xml)


def _word(text: str) -> str:
    return f"<w:p><w:r><w:t>{escape(text)}</w:t></w:r></w:p>"


PDF_WIDTH = 14  # 一行几个字：PDF 里没有段落，只有排好的一行一行


def write_pdf(path: Path, subject: str, paragraphs: list[list[str]]) -> None:
    """两页的 PDF，照格式手写。脏东西：每页的页眉、页码，段落被排成一行一行。"""
    pages = []
    for number, lines in enumerate(paragraphs, 1):
        prose, items = _blocks(lines)
        shown = [COVER, *([subject] if number == 1 else [])]
        shown += [prose[start : start + PDF_WIDTH] for start in range(0, len(prose), PDF_WIDTH)]
        pages.append([*shown, *items, f"第 {number} 页 共 {len(paragraphs)} 页"])
    path.write_bytes(pdf_bytes(pages))


def pdf_bytes(pages: list[list[str]]) -> bytes:
    """几页文字 → PDF。汉字用阅读器自带的宋体（UniGB-UCS2-H：一个字就是它的 UTF-16 码），不装字体。"""
    kids = " ".join(f"{6 + 2 * number} 0 R" for number in range(len(pages)))
    objects = [
        b"<</Type/Catalog/Pages 2 0 R>>",
        f"<</Type/Pages/Kids[{kids}]/Count {len(pages)}>>".encode(),
        b"<</Type/Font/Subtype/Type0/BaseFont/STSong-Light/Encoding/UniGB-UCS2-H/DescendantFonts[4 0 R]>>",
        b"<</Type/Font/Subtype/CIDFontType0/BaseFont/STSong-Light/DW 1000/FontDescriptor 5 0 R"
        b"/CIDSystemInfo<</Registry(Adobe)/Ordering(GB1)/Supplement 2>>>>",
        b"<</Type/FontDescriptor/FontName/STSong-Light/Flags 6/FontBBox[-25 -254 1000 880]/ItalicAngle 0"
        b"/Ascent 880/Descent -120/CapHeight 880/StemV 93>>",
    ]
    for number, lines in enumerate(pages):
        shown = "".join(f"<{line.encode('utf-16-be').hex()}> Tj 0 -20 Td\n" for line in lines)
        stream = f"BT /F1 14 Tf 72 760 Td\n{shown}ET".encode("ascii")
        objects.append(
            f"<</Type/Page/Parent 2 0 R/MediaBox[0 0 595 842]/Contents {7 + 2 * number} 0 R"
            "/Resources<</Font<</F1 3 0 R>>>>>>".encode()
        )
        objects.append(b"<</Length %d>>\nstream\n" % len(stream) + stream + b"\nendstream")
    out, places = b"%PDF-1.4\n", []
    for number, body in enumerate(objects, 1):
        places.append(len(out))
        out += b"%d 0 obj\n" % number + body + b"\nendobj\n"
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    start = len(out)
    out += b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1) + table
    return out + b"trailer\n<</Size %d/Root 1 0 R>>\nstartxref\n%d\n%%%%EOF" % (len(objects) + 1, start)


WRITERS = {"md": write_md, "txt": write_txt, "html": write_html, "pdf": write_pdf, "docx": write_docx}


# ---------------------------------------------------------------- 量每一步


def cleaning_score(samples: list[Sample], documents: list, cleaned: list) -> dict:
    """原句在洗之前、洗之后各有几成完整；脏东西还剩几成。没读出来的文档不算。"""
    before = {each.id: each.text for each in documents}
    after = {each.id: each.text for each in cleaned}
    read = [sample for sample in samples if sample.name in after]
    total = sum(len(sample.sentences) for sample in read)
    whole = {
        name: sum(line in texts[sample.name] for sample in read for line in sample.sentences.values())
        for name, texts in (("before", before), ("after", after))
    }
    left, noise = 0, 0
    for sample in read:
        for mark in NOISE[sample.name.rpartition(".")[2]]:
            if mark in before[sample.name].replace(" ", ""):
                noise += 1
                left += mark in after[sample.name].replace(" ", "")
    return {
        "whole_before": whole["before"] / total,
        "whole": whole["after"] / total,
        "noise_left": left / max(1, noise),
        "sentences": total,
        "noise": noise,
    }


def rule_score(samples: list[Sample], pairs: list) -> dict:
    """规则出的题：写明的事认出几成（recall），出的题对几成（precision）。问的是哪件事，看它出自哪一句。"""
    by_name = {sample.name: sample for sample in samples}
    found, right = set(), 0
    for pair in pairs:
        sample = by_name[pair.document]
        for field, line in sample.sentences.items():
            if line in pair.evidence and pair.answer == sample.facts[field]:
                right += 1
                found.add((pair.document, field))
    stated = sum(len(by_name[name].facts) for name in {pair.document for pair in pairs})
    return {"recall": len(found) / stated, "precision": right / len(pairs), "stated": stated}
