"""把脚本做成 notebooks/*.ipynb：一个主题一本，给习惯用 Jupyter、Colab 的读者。脚本或这个文件改了，就重做一遍。

一个脚本变成这样几格：开头的说明 → 在 `# ---------- 1. …` 处切开的代码，标题是上面的一格文字 → 调用 main。
代码与脚本相同，只少了 `if __name__ == "__main__":`；哪些脚本、用什么参数调用，写在 topics.py。
结果里没有输出，没有随机的编号：同样的脚本，做出来的文件逐字节相同。

运行（要先 pip install nbformat）：
    make notebooks
    python notebooks/make_notebooks.py            # 全部重做
    python notebooks/make_notebooks.py gpt        # 只做一本
    python notebooks/make_notebooks.py --check    # 只看哪几本与脚本不一致，有就退出码 1
"""

import argparse
import ast
import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

import nbformat
from nbformat import v4

from topics import REMARKS, REPOSITORY, TOPICS, Call

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
LONG = 40  # 一格代码多少行算长：再长，就在两个函数之间切开


# ---------------------------------------------------------------- 1. 脚本 → 段落


@dataclass
class Script:
    doc: str  # 开头的说明
    sections: list[tuple[str, list[str]]]  # (标题, 几段代码)；第一节的标题是空的
    main_takes_argv: bool
    main_returns: bool


SECTION = re.compile(r"# -{8,} *(.*?) *-*$")


def read_script(path: Path) -> Script:
    source = path.read_text(encoding="utf-8")
    tree = ast.parse(source)
    lines = source.splitlines()
    doc = ast.get_docstring(tree)
    if doc is None:
        raise SystemExit(f"错误：{path} 开头没有说明（模块的文档字符串）。")
    statements = [node for node in tree.body[1:] if not is_main_guard(node)]
    mains = [node for node in statements if isinstance(node, ast.FunctionDef) and node.name == "main"]
    if not mains:
        raise SystemExit(f"错误：{path} 里没有 main。")
    check_names(path, statements)

    sections: list[tuple[str, list[str]]] = [("", [])]
    read_to = tree.body[0].end_lineno  # 读到第几行了
    after_imports = False
    for node in statements:
        comments = lines[read_to : first_line(node) - 1]  # 上一句之后、这一句之前：空行与注释
        code = comments + lines[first_line(node) - 1 : node.end_lineno]
        read_to = node.end_lineno
        marks = [i for i, line in enumerate(comments) if SECTION.match(line)]
        if marks:
            title = SECTION.match(comments[marks[-1]])[1]
            sections.append((title, []))
            code = code[marks[-1] + 1 :]
        cells = sections[-1][1]
        is_import = isinstance(node, (ast.Import, ast.ImportFrom))
        imports_end = cells and not is_import and not after_imports  # 导入单独一格
        after_imports = after_imports or not is_import
        text = "\n".join(code)
        if not cells or imports_end or len((cells[-1] + text).splitlines()) > LONG:
            cells.append(text)
        else:
            cells[-1] += "\n" + text
    tidy = [(title, [cell.strip("\n") for cell in cells]) for title, cells in sections if cells]
    main = mains[-1]
    returns = main.returns is not None and ast.unparse(main.returns) != "None"
    return Script(doc, tidy, bool(main.args.args), returns)


def is_main_guard(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and "__name__" in ast.unparse(node.test)


def first_line(node: ast.stmt) -> int:
    return min([node.lineno, *(each.lineno for each in getattr(node, "decorator_list", []))])


def check_names(path: Path, statements: list[ast.stmt]) -> None:
    """准备的那一格用掉的名字，脚本不能再用：同一本笔记本里它们是同一个变量。"""
    taken = {"TOPIC", "REPOSITORY", "ROOT", "enter"}
    for node in statements:
        names = {each.id for each in ast.walk(node) if isinstance(each, ast.Name) and is_stored(each)}
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):  # 里面的变量是它自己的
            names = {node.name}
        if clash := names & taken:
            raise SystemExit(f"错误：{path} 第 {node.lineno} 行的 {clash.pop()} 与笔记本准备的一格重名。")


def is_stored(name: ast.Name) -> bool:
    return isinstance(name.ctx, ast.Store)


# ---------------------------------------------------------------- 2. 说明 → Markdown

COMMAND = re.compile(r"\s*(python|pip|cat|accelerate|export|cd|make) ")
ITEM = re.compile(r"\s*(\d+\.|-) ")
DRAWING = re.compile(r"[│▼▲─└┘┌┐]|──")


def to_markdown(doc: str) -> str:
    """命令、画的图放进代码块，"1. …" 是列表，其余是段落；"你会学到" 这样单独一行的成了粗体。"""
    blocks, group = [], []
    for line in [*doc.splitlines(), ""]:
        starts = bool(group) and (kind_of(line) != kind_of(group[-1]) or ITEM.match(line) is not None)
        goes_on = bool(group) and is_continuation(line, group)
        if group and (not line.strip() or starts) and not goes_on:
            blocks.append(group)
            group = []
        if line.strip():
            group.append(line)
    text = ""
    for block in join_commands(blocks):
        in_list = text and kind_of(block[0]) == "item" and ITEM.match(text.splitlines()[-1])
        text += ("\n" if in_list else "\n\n") + render(block)
    return text.strip()


def kind_of(line: str) -> str:
    if COMMAND.match(line) or DRAWING.search(line):
        return "code"
    return "item" if ITEM.match(line) else "indented" if line.startswith("  ") else "text"


def is_continuation(line: str, group: list[str]) -> bool:
    """一条列表、一段话写不完，下一行接着写。"""
    if not line.strip() or kind_of(line) not in ("indented", "text"):
        return False
    if kind_of(group[0]) == "item":
        return line.startswith("  ")
    return kind_of(group[0]) in ("indented", "text") and kind_of(line) == kind_of(group[0])


def join_commands(blocks: list[list[str]]) -> list[list[str]]:
    """挨着的命令放在一个代码块里。"""
    joined: list[list[str]] = []
    for block in blocks:
        if joined and kind_of(block[0]) == kind_of(joined[-1][0]) == "code":
            joined[-1] += block
        else:
            joined.append(block)
    return joined


def render(block: list[str]) -> str:
    if kind_of(block[0]) == "code":
        return "```text\n" + textwrap.dedent("\n".join(block)) + "\n```"
    text = escape(join_lines(line.strip() for line in block))
    is_label = kind_of(block[0]) == "text" and len(block) == 1 and len(text) < 30 and text[-1] not in "。；"
    return f"**{text.rstrip('：')}**" if is_label else text


def join_lines(lines) -> str:
    """中文折行处不要空格，两边都是英文才要。"""
    text = ""
    for line in lines:
        both_ascii = text and text[-1].isascii() and line[:1].isascii()
        text += (" " if both_ascii else "") + line
    return text


def escape(text: str) -> str:
    """<PAD> 这样的字样在 Markdown 里会被当成标签，* 与 $ 也各有意思；反引号里的照原样。"""
    pieces = text.replace("``", "`").split("`")
    for i in range(0, len(pieces), 2):
        pieces[i] = re.sub(r"([*$])", r"\\\1", pieces[i].replace("&", "&amp;").replace("<", "&lt;"))
        pieces[i] = pieces[i].replace("__", r"\_\_")
    return "`".join(pieces)


# ---------------------------------------------------------------- 3. 一本笔记本

SETUP = '''\
import ast
import os
import subprocess
import sys
from pathlib import Path

TOPIC = "{topic}"
REPOSITORY = "{repository}"  # 不在仓库里运行（例如 Colab）时，从这里克隆

folders = [Path.cwd(), *Path.cwd().parents, Path.cwd() / "nlp_learning"]
ROOT = next((folder for folder in folders if (folder / "nlp_common").is_dir()), None)
if ROOT is None:
    if "<" in REPOSITORY:
        raise ValueError("请先把上面的 REPOSITORY 换成仓库的地址，再运行这一格。")
    ROOT = Path.cwd() / "nlp_learning"
    subprocess.run(["git", "clone", "--depth", "1", REPOSITORY, str(ROOT)], check=True)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "-r", "requirements.txt"]
    subprocess.run(pip, cwd=ROOT, check=True)
os.chdir(ROOT / TOPIC)
sys.path[:0] = [str(ROOT / TOPIC), str(ROOT)]


def enter(script):
    """下面几格来自 script：脚本用到自己在哪里（__file__）、自己的说明（__doc__），笔记本里要补上。"""
    path = ROOT / TOPIC / script
    globals()["__file__"] = str(path)
    globals()["__doc__"] = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


print("在", Path.cwd())'''

INTRODUCTION = """\
# {title}

这一本由 `notebooks/make_notebooks.py` 从 [`{topic}/`](../{topic}/README.md) 的脚本做成，代码与脚本相同。
一格一格往下运行（Shift+Enter）。改了某个脚本的一格，就从这个脚本的第一格起再运行一遍：几个脚本里有同名的函数，后运行的算数。
公式、图、实测的数字和练习都在 [{topic}/README.md](../{topic}/README.md)，不认识的词查[术语表](../docs/术语.md)。

| 脚本 | 学什么 |
|---|---|
{rows}
"""


def make(topic: str) -> str:
    """一个主题 → .ipynb 文件的内容。"""
    scripts = {name: read_script(ROOT / topic / name) for name in TOPICS[topic]}
    first_lines = {name: escape(script.doc.splitlines()[0].rstrip("。")) for name, script in scripts.items()}
    readme = ROOT / topic / "README.md"
    title = topic
    if readme.exists():
        title = readme.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
    rows = "\n".join(
        f"| `{name}` | {line.replace('|', chr(92) + '|')} |" for name, line in first_lines.items()
    )
    introduction = INTRODUCTION.format(title=title, topic=topic, rows=rows)
    if topic in REMARKS:
        introduction += "\n" + REMARKS[topic] + "\n"

    cells = [v4.new_markdown_cell(introduction.strip(), id=f"{topic}-introduction")]
    cells.append(
        v4.new_markdown_cell("**准备**：找到仓库；在 Colab 里先克隆它、装依赖。", id=f"{topic}-prepare")
    )
    setup = SETUP.format(topic=topic, repository=REPOSITORY)
    cells.append(v4.new_code_cell(setup, id=f"{topic}-setup"))
    for number, (name, script) in enumerate(scripts.items(), 1):
        cells += script_cells(number, name, script, TOPICS[topic][name])
    ending = (
        f"练习在 [{topic}/README.md](../{topic}/README.md)：照它说的改格子，再从那个脚本的第一格起运行一遍。"
    )
    cells.append(v4.new_markdown_cell(ending, id=f"{topic}-exercises"))

    notebook = v4.new_notebook(cells=cells)
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    notebook.nbformat_minor = 5  # 写定：新版的 nbformat 换了默认值，文件也不变
    nbformat.validate(notebook)
    return nbformat.writes(notebook) + "\n"


def script_cells(number: int, name: str, script: Script, calls: list[Call]) -> list:
    first, _, rest = script.doc.partition("\n")
    cells = [(v4.new_markdown_cell, f"## {number}. {name}\n\n{escape(first)}\n\n{to_markdown(rest)}".strip())]
    entered = False
    for title, codes in script.sections:
        if title:
            cells.append((v4.new_markdown_cell, f"### {escape(title)}"))
        for code in codes:
            if not entered:
                code, entered = f'enter("{name}")\n\n{code}', True
            cells.append((v4.new_code_cell, code))
    for index, call in enumerate(calls):
        heading = f"### 运行 {name}\n\n" if index == 0 else ""
        if heading or call.note:
            cells.append((v4.new_markdown_cell, (heading + call.note).strip()))
        cells.append((v4.new_code_cell, call_code(name, script, call)))
        if call.pictures:
            cells.append((v4.new_code_cell, picture_code(call.pictures)))
    stem = re.sub(r"[^A-Za-z0-9_-]", "-", Path(name).stem)
    return [make_cell(source, id=f"{stem}-{i:02d}") for i, (make_cell, source) in enumerate(cells, 1)]


def call_code(name: str, script: Script, call: Call) -> str:
    words = [f'"{word}"' for word in call.argv]
    if not script.main_takes_argv:
        words.insert(0, f'"{name}"')
        return f"sys.argv = [{', '.join(words)}]\nmain()"
    result = "record = " if script.main_returns else ""
    line = f"{result}main([{', '.join(words)}])"
    if len(line) < 90:
        return line
    lines: list[str] = []  # 一行一个参数，它的值跟在后面
    for word in words:
        if word.startswith('"--') or not lines:
            lines.append(f"        {word},")
        else:
            lines[-1] += f" {word},"
    return "\n".join([f"{result}main(", "    [", *lines, "    ]", ")"])


def picture_code(pictures: list[str]) -> str:
    shown = [("SVG" if each.endswith(".svg") else "Image", each) for each in pictures]
    names = ", ".join([*sorted({kind for kind, _ in shown}), "display"])
    lines = [f'display({kind}("{each}"))' for kind, each in shown]
    return "\n".join([f"from IPython.display import {names}", "", *lines])


# ---------------------------------------------------------------- 4. 写文件


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("topics", nargs="*", metavar="主题", help=f"做哪几本，默认全部：{' '.join(TOPICS)}")
    parser.add_argument("--check", action="store_true", help="不写文件，只看哪几本与脚本不一致")
    args = parser.parse_args(argv)
    different = []
    for topic in args.topics or TOPICS:
        if topic not in TOPICS:
            raise SystemExit(f"错误：没有主题 {topic}，可以是 {'、'.join(TOPICS)}。")
        path, text = HERE / f"{topic}.ipynb", make(topic)
        old = path.read_text(encoding="utf-8") if path.exists() else None
        if text == old:
            continue
        different.append(path.name)
        if not args.check:
            path.write_text(text, encoding="utf-8", newline="\n")
    print(f"{'与脚本不一致' if args.check else '写了'}：{'、'.join(different) or '没有'}")
    if args.check and different:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
