"""RAG 的网页：把文档拖进来，看着它建索引，提问，出处在原文里标出来。只有这台机器打得开，不联网。

你会学到
  1. 一个能用的 RAG 就是前面几块拼起来：读文件 → 切块 → 编码、建索引 → 混合检索 → 照着答 → 标出处。
  2. 读不了的文件（空的、扫描的 PDF、压缩炸弹）要说出是哪个、为什么，别的照读；同名的文件换成新的，没变的块不重新编码。
  3. 出处要让人一眼看得到：编号、文件、第几个字到第几个字，相同的字标黄；文档里的 <script> 只是几个字。

怎么运行
  python rag_web.py                                    # 打开网页；书架上先有 handbook 里的三份规章
  python rag_web.py --documents 我的文件夹               # 先放一个文件夹进去
  python rag_web.py --ask 学生证能借几本？               # 不开网页，在终端里问一句
  python rag_web.py --generator Qwen/Qwen3-0.6B --store pgvector://…

应当看到：左边拖文件、看进度，右边提问；回答注着 [1] 这样的出处，下面是查到的几块，相同的字标黄。

参考：网页用 Gradio（pip install "gradio>=6"）。
"""

from nlp_common.base.cli import run_main

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nlp_common.base.arguments import COUNT, Limits, option, parse_arguments
from nlp_common.base.errors import UserError
from nlp_common.base.web_page import import_gradio, serve
from rag_common.embed import choose_embedder, load_embedder
from rag_common.generate import load_generator
from rag_common.store import open_store
from rag_library import WAYS, Library, sources_html

HOME = Path(__file__).resolve().parent
HANDBOOK = HOME / "handbook"
EXAMPLES = ["学生证一次最多借几本？", "新书能续借吗？", "书丢了怎么办？", "星期一开门吗？"]
STYLE = """
.source { border: 1px solid var(--border-color-primary); border-radius: 8px; padding: 8px 12px; margin: 8px 0; }
.source .where { color: var(--body-text-color-subdued); font-size: 13px; margin: 0 0 4px; }
.source mark { background: #ffe58a; color: #222; padding: 0; }
"""


@dataclass
class WebSettings:
    preset: Literal["auto", "tiny", "full"] = option("只决定书架放在 outputs 的哪里", "tiny")
    documents: str | None = option("先放进去的文件夹或文件；默认是 handbook 里的三份规章")
    embedder: str = option("auto（有 e5 用 e5）、e5、hashed，或 hub 名、本地文件夹", "auto")
    generator: str = option('extract（抄最像的一句）、hub 名、文件夹、smollm2，或 "网址 模型名"', "extract")
    store: str | None = option("书架放在哪里，例如 qdrant://文件夹；默认 faiss://，关了再开还在")
    size: int = option("一块最多多少字", 120, limits=Limits(at_least=20))
    k: int = option("查几块", 3, limits=COUNT)
    way: str = option("怎样查", WAYS[0], choices=WAYS)
    ask: str | None = option("不开网页，问这一句")
    port: int | None = option("网页的端口；默认找一个空的")


def main(argv: list[str] | None = None) -> dict | None:
    settings = parse_arguments(WebSettings, argv)
    if settings.ask is not None and not settings.ask.strip():
        raise UserError("--ask 后面还没有写问题。")
    if settings.ask is None:
        import_gradio()  # 没有装，现在就说，不等编码完
    library = open_library(settings)
    if settings.ask is not None:
        return ask_once(library, settings)
    serve(build_page(library, settings), settings.port, css=STYLE)
    return None


def open_library(settings: WebSettings) -> Library:
    """打开书架，把 --documents 放进去（没给、书架又是空的，就放 handbook）。"""
    embedder = load_embedder(choose_embedder(settings.embedder))
    preset = "full" if settings.preset == "full" else "tiny"
    url = settings.store or f"faiss://{HOME / 'outputs' / preset / 'rag_web' / embedder.fingerprint}"
    store = open_store(url, embedder.fingerprint, embedder.dim)
    library = Library(store, embedder, load_generator(settings.generator))
    if settings.documents or not store.count():
        for line in library.add(files_of(Path(settings.documents or HANDBOOK).expanduser()), settings.size):
            print(f"  {line}", flush=True)
    print(f"书架 {url}：{len(library.documents())} 份文档，{store.count()} 块；{embedder.name} 向量")
    return library


def files_of(place: Path) -> list[Path]:
    """一个文件，或文件夹里（连同下面各层）不以 . 开头的文件。"""
    if not place.exists():
        raise UserError(f"没有 --documents {place}（当前目录是 {Path.cwd()}）。")
    found = [place] if place.is_file() else sorted(path for path in place.rglob("*") if path.is_file())
    found = [path for path in found if not path.name.startswith(".")]
    if not found:
        raise UserError(f"--documents {place} 里没有文件。")
    return found


def ask_once(library: Library, settings: WebSettings) -> dict:
    found = library.ask(settings.ask, settings.k, settings.way)
    print(f"\n问　{settings.ask}\n答　{found.answer.text or '（模型没有回答）'}")
    for number, chunk in enumerate(found.sources):
        mark = "→" if number in found.answer.cited else " "
        print(
            f"  {mark} [{number + 1}] {chunk.document} 第 {chunk.start + 1}–{chunk.end} 字：{' '.join(chunk.text.split())}"
        )
    library.store.close()
    return {"answer": found.answer.text, "sources": [chunk.document for chunk in found.sources]}


# ---------------------------------------------------------------- 网页


def build_page(library: Library, settings: WebSettings):
    """→ gradio 的页面。"""
    gr = import_gradio()

    def shelf() -> list[list]:
        return [[name, count] for name, count in library.documents().items()]

    def names():
        return gr.update(choices=list(library.documents()), value=None)

    def put(files, size):
        """每动一下，进度多一行；最后是书架现在的样子。"""
        lines: list[str] = []
        for line in library.add([Path(file) for file in files or []], int(size)):
            if lines and lines[-1].startswith("…"):
                lines.pop()  # 同一份文档的进度只留最后一句
            lines.append(line)
            yield "\n".join(lines), gr.skip(), gr.skip(), gr.skip()
        yield "\n".join(lines) or "没有选文件。", shelf(), names(), None

    def take(name):
        return (library.remove(name) if name else "先选一份文档。"), shelf(), names()

    def ask(question, k, way):
        try:
            found = library.ask(question, int(k), way)
        except UserError as error:
            return f"（{error}）", ""
        return found.answer.text or "（模型没有回答）", sources_html(question, found)

    with gr.Blocks(analytics_enabled=False, title="问文档") as page:
        gr.Markdown("## 问文档\n文档、索引、回答都在这台机器上，不联网。")
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                files = gr.File(
                    file_count="multiple",
                    label="把文档拖进来（txt md html pdf docx csv）",
                    elem_id="files",
                    height=140,
                )
                add = gr.Button("放上书架", variant="primary", elem_id="add")
                progress = gr.Textbox(label="进度", lines=4, interactive=False, elem_id="progress")
                table = gr.Dataframe(
                    shelf(), headers=["文档", "几块"], label="书架", interactive=False, elem_id="shelf"
                )
                with gr.Row():
                    chosen = gr.Dropdown(
                        list(library.documents()), label="拿走哪一份", value=None, elem_id="chosen"
                    )
                    remove = gr.Button("拿走", elem_id="remove", min_width=80)
            with gr.Column(scale=3, min_width=320):
                question = gr.Textbox(
                    label="问题", placeholder="问一句，回车发送", elem_id="question", autofocus=True
                )
                with gr.Accordion("设置", open=False):
                    k = gr.Slider(1, 10, settings.k, step=1, label="查几块")
                    way = gr.Radio(WAYS, value=settings.way, label="怎样查")
                    size = gr.Slider(20, 500, settings.size, step=10, label="新放上来的，一块最多多少字")
                send = gr.Button("问", variant="primary", elem_id="send")
                answer = gr.Textbox(label="回答", lines=2, interactive=False, elem_id="answer")
                sources = gr.HTML(label="出处", elem_id="sources")
                gr.Examples(EXAMPLES, question, label="可以这样问（点一下填进去）")

        one = {"concurrency_limit": 1, "concurrency_id": "library"}  # 编码、生成都吃处理器，一个个来
        add.click(put, [files, size], [progress, table, chosen, files], show_progress="hidden", **one)
        remove.click(take, chosen, [progress, table, chosen], show_progress="hidden", **one)
        gr.on(
            [send.click, question.submit],
            ask,
            [question, k, way],
            [answer, sources],
            show_progress="hidden",
            **one,
        )
    return page


if __name__ == "__main__":
    run_main(main)
