"""LangChain 的写法与手写的相同；index() 的坑照数出来的那样；步骤记得对，网页完整，OpenTelemetry 收得到。"""

import http.server
import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import langchain_rag_pipeline as pipeline
import langchain_trace
from catalogue import make_products
from langchain_trace import Span, check_tree, export_spans, group_by_parent, write_trace_page
from nlp_common.base.errors import UserError
from rag_common.embed import HashedEmbedder
from rag_common.fuse import reciprocal_rank
from store_keeping import StorePlace

RAG = Path(__file__).resolve().parents[2] / "rag"
QUICK = ["--preset", "tiny", "--products", "12", "--questions", "12"]
needs_langchain = pytest.mark.skipif(
    any(pipeline.find_spec(name) is None for name in ("langchain_core", "langgraph")),
    reason="没有安装 langchain、langgraph",
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    pytest.importorskip("langchain_core", reason="没有安装 langchain")
    pytest.importorskip("langgraph", reason="没有安装 langgraph")
    folder = tmp_path_factory.mktemp("langchain") / "out"
    return pipeline.main([*QUICK, "--output_dir", str(folder)]), folder


@pytest.fixture
def parts(tmp_path):
    embedder = HashedEmbedder()
    place = StorePlace(None, tmp_path, embedder)
    settings = pipeline.parse_settings(pipeline.PipelineSettings, pipeline.PRESETS, QUICK)
    made = pipeline.build(place.open("手册"), embedder, make_products(12), settings)
    yield made
    made.store.close()


# ---------------------------------------------------------------- 相同的答案


def test_every_answer_is_the_same_and_right(run):
    record, folder = run
    metrics = record["metrics"]
    assert metrics["different"] == 0 and metrics["questions"] == 12 and metrics["accuracy"] == 1.0
    answers = json.loads((folder / "answers.json").read_text("utf-8"))
    assert len(answers) == 12 and all(row["cited"] and row["passages"] for row in answers.values())
    assert {each.name for each in folder.iterdir()} == {
        "answers.json", "run.json", "times.svg", "trace.html", "traps.svg",
    }  # fmt: skip
    assert pipeline.main([*QUICK, "--output_dir", str(folder)]) == record  # 第二次直接用


@needs_langchain
def test_a_question_nobody_can_answer_is_the_same_too(parts):
    graph, chain = pipeline.make_graph(parts), pipeline.make_chain(parts)
    for text in ("？", "Ω", "今天天气怎么样"):
        row, took = pipeline.ask_by_hand(parts, text)
        assert row == chain.invoke(text) == pipeline.said(graph.invoke({"question": text}))
        assert took["all"] == pytest.approx(sum(took[step] for step in pipeline.STEPS))


@needs_langchain
def test_a_wrong_pipeline_is_noticed(parts, monkeypatch, tmp_path):
    real = pipeline.fuse_documents
    monkeypatch.setattr(pipeline, "fuse_documents", lambda *each: real(*each)[::-1])
    with pytest.raises(UserError, match="答得不一样"):
        pipeline.main([*QUICK, "--output_dir", str(tmp_path / "out")])


def test_fusion_is_that_of_the_ensemble_retriever():
    retrievers = pytest.importorskip("langchain_classic.retrievers", reason="没有安装 langchain-classic")
    from langchain_core.documents import Document
    from langchain_core.runnables import RunnableLambda

    nobody = [RunnableLambda(list), RunnableLambda(list)]

    @hypothesis_settings(max_examples=30, deadline=None)
    @given(st.lists(st.permutations("甲乙丙丁戊己"), min_size=2, max_size=2), st.integers(0, 6))
    def same(lists, keep):
        lists = [lists[0], lists[1][:keep]]
        theirs = retrievers.EnsembleRetriever(retrievers=nobody, weights=[0.5, 0.5], c=60)
        ranked = theirs.weighted_reciprocal_rank([[Document(page_content=n) for n in each] for each in lists])
        assert [d.page_content for d in ranked] == [name for name, _ in reciprocal_rank(lists)]

    same()


@needs_langchain
def test_the_store_as_a_vector_store(parts):
    from langchain_core.documents import Document

    from langchain_parts import OurEmbeddings, OurVectorStore

    vectors = OurVectorStore(parts.store, OurEmbeddings(parts.embedder))
    before = parts.store.count()
    [name] = vectors.add_texts(["借期三十天。"], [{"document": "图书馆", "tenant": "甲"}])
    [found] = vectors.similarity_search("借期多少天？", 1, filter={"tenant": "甲"})
    assert found.id == name and found.metadata == {"document": "图书馆", "tenant": "甲"}
    assert vectors.get_by_ids([name])[0].page_content == found.page_content
    vectors.add_documents([Document(page_content="借期四十天。", id=name)])  # 同一个 id 是改
    assert parts.store.count() == before + 1 and vectors.delete([name]) and parts.store.count() == before


# ---------------------------------------------------------------- index() 的坑


def test_traps(run):
    rows = run[0]["metrics"]["traps"]
    chunks = rows["full"]["first"]
    assert chunks == 320 and rows["full"]["embedded"] == 1
    # 一批 4 块，一篇 8 块：每篇的后 4 块都先被删掉，再编码一遍；改了的那块另算
    assert rows["incremental_4"]["embedded"] == chunks // 2 + 1
    # 一批 100：边界落在中间的两篇，第 100、300 块那里各少 4 块；200 正好是 25 篇
    assert rows["nothing_changed"]["embedded"] == 8 and rows["nothing_changed"]["fewest"] == chunks - 4
    assert rows["offsets"]["embedded"] == 8  # 改了的那篇全部
    assert rows["full_of_one"]["left"] == 8  # 别的全删了
    assert rows["emptied"] == {"first": chunks, "embedded": 0, "fewest": 0, "left": 0, "skipped": chunks}
    assert rows["ours"]["embedded"] == 1 and rows["ours"]["fewest"] == chunks
    assert rows["ours_unchanged"]["embedded"] == 0 and rows["ours_emptied"]["left"] == chunks


# ---------------------------------------------------------------- 记下的步骤


@needs_langchain
def test_every_step_is_recorded_once(parts):
    recorder = pipeline.make_recorder()
    graph = pipeline.make_graph(parts)
    for text in ("甲", "乙"):
        graph.invoke({"question": text}, config={"callbacks": [recorder]})
    check_tree(recorder.spans)
    assert not recorder.open
    groups = group_by_parent(recorder.spans)
    for root in groups[None]:
        assert sorted(span.name for span in groups[root.id]) == sorted(pipeline.STEPS)
    kinds = [span.kind for span in recorder.spans]
    assert kinds.count("retriever") == 2 and kinds.count("model") == 2


@needs_langchain
def test_a_failing_step_is_recorded_as_failing(parts, tmp_path):
    class Broken:
        name = "broken"

        def answer(self, questions, passages):
            raise RuntimeError("<没有回答>")

    parts.generator = Broken()
    recorder = pipeline.make_recorder()
    with pytest.raises(RuntimeError):
        pipeline.make_graph(parts).invoke({"question": "甲"}, config={"callbacks": [recorder]})
    assert not recorder.open
    failed = {span.name for span in recorder.spans if span.error}
    assert {"generate", "OurChatModel", "LangGraph"} <= failed
    write_trace_page(tmp_path / "trace.html", recorder.spans)
    page = (tmp_path / "trace.html").read_text("utf-8")
    assert "&lt;没有回答&gt;" in page and "<没有回答>" not in page


def test_the_page_needs_nothing_else(run):
    page = (run[1] / "trace.html").read_text("utf-8")
    assert page.count("<h2>") == 10 and "OurChatModel" in page and "512 个数" in page
    assert "http" not in page and "<script" not in page and "<link" not in page


def test_the_page_escapes_what_it_is_told(tmp_path):
    span = Span("1", None, "<b>", "chain", 0, 1000, told="<script>", said="&")
    write_trace_page(tmp_path / "trace.html", [span])
    page = (tmp_path / "trace.html").read_text("utf-8")
    assert "<script>" not in page and "<b>" not in page and "&lt;script&gt;" in page and "&amp;" in page


@pytest.mark.parametrize(
    "spans",
    [
        [Span("2", "1", "子", "chain", 0, 1)],
        [Span("1", None, "父", "chain", 5, 9), Span("2", "1", "子", "chain", 4, 6)],
        [Span("1", None, "父", "chain", 5, 4)],
    ],
)
def test_a_wrong_tree_is_noticed(spans):
    with pytest.raises(UserError):
        check_tree(spans)


def test_opentelemetry_in_memory():
    memory = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter", reason="没有安装")
    exporter = memory.InMemorySpanExporter()
    root = Span("1", None, "LangGraph", "chain", 1_000, 9_000, told="秘密的问题", said="秘密")
    child = Span("2", "1", "dense", "retriever", 2_000, 3_000, facts={"documents": ["甲", "乙"]})
    broken = Span("3", "1", "generate", "model", 4_000, 5_000, error="RuntimeError：秘密")
    assert export_spans([child, broken, root], exporter) == 3
    found = {span.name: span for span in exporter.get_finished_spans()}
    for span in (root, child, broken):
        assert (found[span.name].start_time, found[span.name].end_time) == (span.start, span.end)
    assert found["dense"].parent.span_id == found["LangGraph"].context.span_id
    assert found["LangGraph"].parent is None and found["generate"].status.status_code.name == "ERROR"
    assert found["dense"].attributes["rag.documents"] == ("甲", "乙")
    assert "秘密" not in "".join(span.to_json() for span in found.values())  # 文字不离开这台机器


def test_otlp_over_grpc():
    grpc = pytest.importorskip("grpc", reason="没有安装 grpcio")
    pytest.importorskip("opentelemetry.exporter.otlp.proto.grpc", reason="没有安装 OTLP")
    from concurrent.futures import ThreadPoolExecutor

    from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as pb

    got = []

    def export(request, context):
        got.extend(s.name for r in request.resource_spans for scope in r.scope_spans for s in scope.spans)
        return pb.ExportTraceServiceResponse()

    method = grpc.unary_unary_rpc_method_handler(
        export, pb.ExportTraceServiceRequest.FromString, pb.ExportTraceServiceResponse.SerializeToString
    )
    service = "opentelemetry.proto.collector.trace.v1.TraceService"
    server = grpc.server(ThreadPoolExecutor(1))
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(service, {"Export": method})])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    exporter = langchain_trace.otlp_exporter(f"http://127.0.0.1:{port}")
    assert export_spans([Span("1", None, "LangGraph", "chain", 1, 2)], exporter) == 1
    server.stop(0)
    assert got == ["LangGraph"]


# ---------------------------------------------------------------- 不该发生的


@needs_langchain
def test_nothing_goes_to_langsmith(parts, monkeypatch):
    """设了 LANGSMITH_TRACING 的机器上，问题与资料也不发出去。"""
    heard = []

    class Ear(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            heard.append(self.path)
            self.send_response(200)
            self.end_headers()

        do_GET = do_PATCH = do_POST

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Ear)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("LANGSMITH_TRACING", "true")
    monkeypatch.setenv("LANGSMITH_API_KEY", "x")
    monkeypatch.setenv("LANGSMITH_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    pipeline.three_ways(parts, ["甲", "乙"])
    from langchain_core.tracers.langchain import wait_for_all_tracers

    wait_for_all_tracers()
    server.shutdown()
    assert heard == []


def test_without_langchain_the_command_is_named(tmp_path):
    code = (
        "import sys; sys.modules['langchain_core'] = None; sys.modules['langgraph'] = None\n"
        "import importlib.util as u; real = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name in ('langchain_core', 'langgraph') else real(name, *a)\n"
        f"sys.path[:0] = [{str(RAG)!r}, {str(RAG.parent)!r}]\n"
        "import langchain_rag_pipeline as p\n"
        "from nlp_common.base.cli import run_main\n"
        "run_main(p.main)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode != 0 and "pip install langchain langgraph" in done.stderr + done.stdout
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("flags", "said"),
    [(["--products", "0"], "products"), (["--otlp", "127.0.0.1:4317"], "不是网址"), (["--k", "0"], "k")],
)
def test_bad_settings(flags, said, tmp_path):
    pytest.importorskip("langchain_core", reason="没有安装 langchain")
    with pytest.raises(UserError, match=said):
        pipeline.main([*QUICK, "--output_dir", str(tmp_path / "out"), *flags])
