"""每份 Markdown 里的链接：文件、图都在，锚点也在。"""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LEFT_OUT = {".venv", "node_modules", "outputs", "templates"}  # 模板填进 README 之后才有文件夹可言
PAGES = [p for p in sorted(ROOT.rglob("*.md")) if not LEFT_OUT & set(p.relative_to(ROOT).parts)]


def anchors(text: str) -> set[str]:
    """一页里能跳到的地方：``<a id="…">``，和各级标题（GitHub 的写法：小写，去掉标点，空格换成横线）。"""
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    made = {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}
    return made | set(re.findall(r'id="([^"]+)"', text))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```|`[^`]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith(("http", "mailto:")):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        exists = target.exists()
        if exists and anchor and target.suffix == ".md":
            exists = anchor in anchors(target.read_text(encoding="utf-8"))
        if not exists:
            broken.append(link)
    assert not broken
