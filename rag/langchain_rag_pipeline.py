"""同一条流水线写两遍：几十行平常的函数，和 LangChain 1.x + LangGraph。答案一字不差，差的是别的。

你会学到
  1. 一条 RAG 流水线是几个函数调用：编码 → 向量检索、BM25 → RRF → 生成。先看手写的，再看框架里的同一件事。
  2. LangChain 1.x 的写法：``langchain.retrievers``、``langchain.chains`` 都没有了；接口在 langchain_core，流程用 LangGraph。
  3. 框架换来了什么：每一步的回调，不改流水线就记得下来，画成一页网页，或交给 OpenTelemetry。付出了什么：一题多几毫秒。
  4. LangChain 的 index() 有几个坑：改一块，没改的块也重新编码；一个字没改也会；库清空了，它说"都在，跳过"。数给你看。

怎么运行
  pip install langchain langgraph opentelemetry-sdk
  python langchain_rag_pipeline.py                                      # 一百件商品的手册，每题都要一字不差
  python langchain_rag_pipeline.py --generator smollm2 --questions 8    # 换成真的聊天模型（HTTP 的写成 "网址 模型名"）
  python langchain_rag_pipeline.py --otlp http://127.0.0.1:4317         # 步骤交给 Jaeger 一类的服务

应当看到（tiny，实测见本文件夹的 README.md）：三种写法每一题的答案、引用、查到的段都相同；框架自己一题用一两毫秒到几毫秒；
同样改一块，我们的只编码一块。

参考：langchain_core.indexing.index 的源码；LangGraph 的 StateGraph；OpenTelemetry 的 trace 规范。
"""

from nlp_common.base.cli import run_main

import random
import shutil
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

from catalogue import FACTS, Product, make_products
from index_traps import TRAPS, index_traps, print_traps
from langchain_trace import (
    check_tree,
    export_spans,
    group_by_parent,
    make_recorder,
    otlp_exporter,
    write_trace_page,
)
from nlp_common.base.arguments import COUNT, option
from nlp_common.base.errors import UserError
from nlp_common.base.runs import write_json
from nlp_common.draw.plots import bar_chart
from nlp_common.train.lesson import run_lesson
from nlp_common.train.settings import LessonSettings, parse_settings
from nlp_common.train.stage import Stage
from rag_common.bm25 import BM25
from rag_common.embed import Embedder, load_embedder
from rag_common.fuse import reciprocal_rank
from rag_common.generate import Generator, load_generator
from rag_common.store import Store
from store_keeping import StorePlace, fill, texts_of

HOME = Path(__file__).resolve().parent
PRESETS = {
    "tiny": {"products": 100, "questions": 200, "embedder": "hashed"},
    "full": {"products": 2000, "questions": 1000, "embedder": "e5"},
}
INSTALL = "pip install langchain langgraph"
DEPTH = 10  # 两种检索各取前多少名去融合
STEPS = {"embed": "编码", "dense": "向量检索", "sparse": "BM25", "fuse": "融合", "generate": "生成"}
WAYS = {"hand": "手写", "chain": "LCEL", "graph": "LangGraph", "traced": "LangGraph + 回调"}


@dataclass
class PipelineSettings(LessonSettings):
    NOT_IN_FINGERPRINT = LessonSettings.NOT_IN_FINGERPRINT | {"otlp", "store"}

    products: int | None = option("手册里几件商品（一件四段）", limits=COUNT)
    questions: int | None = option("最多问几题", limits=COUNT)
    k: int = option("递给生成器几段", 3, limits=COUNT)
    embedder: str | None = option("hashed（只认字面，快）、e5，或 hub 名、本地文件夹")
    generator: str = option('extract（抄最像的一句）、hub 名、文件夹、smollm2，或 "网址 模型名"', "extract")
    store: str | None = option("知识库放在哪里，例如 qdrant://文件夹；默认 faiss://，用完就删")
    otlp: str | None = option("每一步交给这个 OpenTelemetry 服务（gRPC），例如 http://127.0.0.1:4317")

    def check(self) -> None:
        if self.otlp:
            otlp_exporter(self.otlp)  # 网址不对、没有安装，开始之前就说


@dataclass
class Parts:
    """流水线的几块，三种写法用的是同样的几个对象。"""

    embedder: Embedder
    store: Store
    index: BM25
    generator: Generator
    k: int


# ---------------------------------------------------------------- 1. 从头到尾


def learn(stage: Stage) -> dict:
    settings = stage.settings
    work = stage.folder.work / "stores"
    shutil.rmtree(work, ignore_errors=True)
    embedder = load_embedder(settings.embedder)
    place = StorePlace(settings.store, work, embedder)
    products = make_products(settings.products, settings.seed)
    parts = build(place.open("手册"), embedder, products, settings)
    asked = [(product, fact) for product in products for fact in FACTS]
    random.Random(settings.seed).shuffle(asked)
    asked = asked[: settings.questions]
    texts = [product.question(fact) for product, fact in asked]
    print(f"\n{parts.store.count()} 块，{len(texts)} 题；{embedder.name} 向量，{settings.generator} 生成")

    results, times, spans = three_ways(parts, texts)
    different = sum(not each[0] == each[1] == each[2] for each in zip(*results.values(), strict=True))
    if different and not settings.generator.startswith("http"):  # 服务器上同一题两次也可能答得不一样
        raise UserError(f"{different} 题的三种写法答得不一样：流水线写错了。")
    right = sum(
        product.answer(fact) in row["answer"]
        for (product, fact), row in zip(asked, results["hand"], strict=True)
    )
    print(
        f"三种写法的答案、引用、查到的段：{len(texts)} 题里 {different} 题不同；答对 {right / len(texts):.3f}"
    )
    rows = milliseconds(times)
    print_times(rows)
    parts.store.close()

    traps = index_traps(place, embedder, settings.seed)
    print_traps(traps)
    exported = export_spans(spans, otlp_exporter(settings.otlp)) if settings.otlp else 0
    if exported:
        print(f"{exported} 步交给了 {settings.otlp}")
    metrics = {
        "questions": len(texts),
        "different": different,
        "accuracy": right / len(texts),
        "milliseconds": rows,
        "overhead_ms": rows["graph"]["all"] - rows["hand"]["all"],
        "callbacks_ms": rows["traced"]["all"] - rows["graph"]["all"],
        "spans": len(spans),
        "traps": traps,
    }

    def write(folder: Path) -> None:
        write_trace_page(folder / "trace.html", spans, most=10)
        write_json(folder / "answers.json", dict(zip(texts, results["hand"], strict=True)))
        draw(folder, rows, traps)
        shutil.rmtree(work, ignore_errors=True)

    return stage.save(metrics, {"name": "catalogue", "rows": len(products)}, write)


def build(store: Store, embedder: Embedder, products: list[Product], settings: PipelineSettings) -> Parts:
    fill(store, embedder, texts_of(products))
    chunks = store.get(store.ids())
    index = BM25()
    index.add([chunk.id for chunk in chunks], [chunk.text for chunk in chunks])
    return Parts(embedder, store, index, load_generator(settings.generator), settings.k)


def three_ways(parts: Parts, texts: list[str]) -> tuple[dict, dict, list]:
    """同样的题，三种写法各问一遍 → (答案, 每题每步的毫秒, 记下的步骤)。"""
    from langsmith import tracing_context

    chain, graph, recorder = make_chain(parts), make_graph(parts), make_recorder()
    results = {"hand": [], "chain": [], "graph": []}
    times = {"hand": [], "chain": [], "graph": [], "traced": []}
    # 设了 LANGSMITH_TRACING 的机器上，LangChain 会把问题和资料发到它的网站：这里关掉
    with tracing_context(enabled=False):
        ask_by_hand(parts, texts[0]), graph.invoke({"question": texts[0]}), chain.invoke(texts[0])  # 热身
        for text in texts:
            row, took = ask_by_hand(parts, text)
            results["hand"].append(row)
            times["hand"].append(took)

            started = time.perf_counter()
            results["chain"].append(chain.invoke(text))
            times["chain"].append({"all": since(started)})

            started = time.perf_counter()
            results["graph"].append(said(graph.invoke({"question": text})))
            times["graph"].append({"all": since(started)})

            started = time.perf_counter()
            graph.invoke({"question": text}, config={"callbacks": [recorder]})
            times["traced"].append({"all": since(started)})
    check_tree(recorder.spans)
    by_parent = group_by_parent(recorder.spans)
    for root, took in zip(by_parent[None], times["traced"], strict=True):
        took |= {span.name: span.milliseconds for span in by_parent[root.id] if span.name in STEPS}
    return results, times, recorder.spans


# ---------------------------------------------------------------- 2. 手写的


def ask_by_hand(parts: Parts, question: str) -> tuple[dict, dict[str, float]]:
    """一题从头到尾 → (答案, 每步几毫秒)。"""
    at = [time.perf_counter()]
    vector = parts.embedder.queries([question])  # (1, D)
    at.append(time.perf_counter())
    [hits] = parts.store.search(vector, DEPTH)
    at.append(time.perf_counter())
    sparse = parts.index.search(question, DEPTH)
    at.append(time.perf_counter())
    fused = reciprocal_rank([[hit.id for hit in hits], [name for name, _ in sparse]])
    names = [name for name, _ in fused[: parts.k]]
    passages = [chunk.text for chunk in parts.store.get(names)]
    at.append(time.perf_counter())
    [answer] = parts.generator.answer([question], [passages])
    at.append(time.perf_counter())
    took = {step: 1000 * (b - a) for step, a, b in zip(STEPS, at, at[1:], strict=False)}
    row = {"answer": answer.text, "cited": answer.cited, "passages": names}
    return row, took | {"all": 1000 * (at[-1] - at[0])}


def since(started: float) -> float:
    return 1000 * (time.perf_counter() - started)


# ---------------------------------------------------------------- 3. LangChain 的


def make_chain(parts: Parts) -> Any:
    """LCEL：用 | 连起来。编码藏在检索器里面，看不见。"""
    from langchain_core.runnables import RunnableLambda, RunnableParallel, RunnablePassthrough

    from langchain_parts import BM25Retriever, OurChatModel, OurEmbeddings, OurVectorStore, prompt_messages

    store = OurVectorStore(parts.store, OurEmbeddings(parts.embedder))
    dense = store.as_retriever(search_kwargs={"k": DEPTH})
    sparse = BM25Retriever(index=parts.index, store=parts.store, k=DEPTH)
    fused = RunnableLambda(lambda found: fuse_documents(parts, found["dense"], found["sparse"]))
    prompt = RunnableLambda(lambda row: prompt_messages(row["question"], row["documents"]))
    found = RunnableParallel(dense=dense, sparse=sparse) | fused
    model = OurChatModel(generator=parts.generator)
    answered = RunnablePassthrough.assign(message=prompt | model)
    return RunnableParallel(question=RunnablePassthrough(), documents=found) | answered | RunnableLambda(said)


def make_graph(parts: Parts) -> Any:
    """LangGraph：每一步是一个节点，编码之后的向量检索与 BM25 是两条路，两条都到了才融合。"""
    from typing import TypedDict

    from langgraph.graph import END, START, StateGraph

    from langchain_parts import BM25Retriever, OurChatModel, OurEmbeddings, OurVectorStore, prompt_messages

    class State(TypedDict, total=False):
        question: str
        vector: list[float]
        near: list
        alike: list
        documents: list
        message: Any

    embeddings = OurEmbeddings(parts.embedder)
    store = OurVectorStore(parts.store, embeddings)
    retriever = BM25Retriever(index=parts.index, store=parts.store, k=DEPTH)
    model = OurChatModel(generator=parts.generator)

    def embed(state: State) -> State:
        return {"vector": embeddings.embed_query(state["question"])}

    def dense(state: State) -> State:
        return {"near": store.similarity_search_by_vector(state["vector"], DEPTH)}

    def sparse(state: State) -> State:
        return {"alike": retriever.invoke(state["question"])}

    def fuse(state: State) -> State:
        return {"documents": fuse_documents(parts, state["near"], state["alike"])}

    def generate(state: State) -> State:
        return {"message": model.invoke(prompt_messages(state["question"], state["documents"]))}

    graph = StateGraph(State)
    for node in (embed, dense, sparse, fuse, generate):
        graph.add_node(node.__name__, node)
    graph.add_edge(START, "embed")
    graph.add_edge("embed", "dense")
    graph.add_edge(START, "sparse")
    graph.add_edge(["dense", "sparse"], "fuse")
    graph.add_edge("fuse", "generate")
    graph.add_edge("generate", END)
    return graph.compile()


def fuse_documents(parts: Parts, dense: list, sparse: list) -> list:
    """RRF，只看名次；LangChain 1.x 本身没有，旧的 EnsembleRetriever 在 langchain_classic 里。"""
    by_id = {document.id: document for document in [*dense, *sparse]}
    ranked = reciprocal_rank([[document.id for document in each] for each in (dense, sparse)])
    return [by_id[name] for name, _ in ranked[: parts.k]]


def said(state: dict) -> dict:
    message, names = state["message"], [document.id for document in state["documents"]]
    return {"answer": message.content, "cited": message.response_metadata["cited"], "passages": names}


# ---------------------------------------------------------------- 4. 看


def milliseconds(times: dict[str, list[dict]]) -> dict[str, dict[str, float]]:
    """各写法各步的中位数：忙的机器上，平均数会被几次等待带偏。"""
    return {way: {step: median(row[step] for row in rows) for step in rows[0]} for way, rows in times.items()}


def print_times(rows: dict[str, dict[str, float]]) -> None:
    print("\n一题几毫秒（中位数）" + "".join(f"{name:>7}" for name in STEPS.values()) + f"{'整题':>7}")
    for way, row in rows.items():
        cells = "".join(f"{row[step]:>9.3f}" if step in row else f"{'':>9}" for step in STEPS)
        print(f"  {WAYS[way]:<16}{cells}{row['all']:>9.3f}")


def draw(folder: Path, rows: dict, traps: dict) -> None:
    bars = {f"{WAYS[way]}|{way}": {"整题|whole": row["all"]} for way, row in rows.items()}
    bar_chart(folder / "times.svg", bars, "一题几毫秒|Milliseconds per question", "", "ms")
    shown = ("full", "incremental", "incremental_4", "nothing_changed", "offsets", "ours")
    bars = {"编码|embedded": {f"{TRAPS[key]}|{key}": traps[key]["embedded"] for key in shown}}
    title = "改一块，编码了几块|Chunks embedded after one changed"
    bar_chart(folder / "traps.svg", bars, title, "", "块|chunks", digits=0)


def main(argv: list[str] | None = None) -> dict:
    missing = [name for name in ("langchain_core", "langgraph") if find_spec(name) is None]
    if missing:
        raise UserError(f"这个脚本要 {'、'.join(missing)}，没有安装。请运行：{INSTALL}")
    settings = parse_settings(PipelineSettings, PRESETS, argv)
    return run_lesson("langchain_rag_pipeline", HOME, settings, learn)


if __name__ == "__main__":
    run_main(main)
