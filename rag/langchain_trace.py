"""一次提问经过了哪些步骤、各用了多久：LangChain 的回调记成一串 Span，画成一页网页，或交给 OpenTelemetry。

recorder = make_recorder()                      # 要 langchain-core
graph.invoke({…}, config={"callbacks": [recorder]})
write_trace_page(文件, recorder.spans)           # 一个 HTML，没有外面的文件
export_spans(recorder.spans, exporter)          # 要 opentelemetry-sdk；exporter 在内存里，或 otlp_exporter(网址)
"""

from __future__ import annotations

import html
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nlp_common.base.errors import UserError
from nlp_common.base.runs import write_text

OTEL_HINT = "pip install opentelemetry-sdk"
OTLP_HINT = "pip install opentelemetry-exporter-otlp-proto-grpc"
SHOWN = 300  # 网页里一段文字最多写几个字


@dataclass
class Span:
    """一步：从什么时候到什么时候（纳秒），在哪一步里面，进来与出去的是什么。"""

    id: str
    parent: str | None
    name: str
    kind: str  # chain、retriever、model
    start: int
    end: int = 0
    told: str = ""
    said: str = ""
    error: str = ""
    facts: dict = field(default_factory=dict)

    @property
    def milliseconds(self) -> float:
        return (self.end - self.start) / 1e6


def make_recorder() -> Any:
    """记下每一步的回调。几个线程同时跑（LangGraph 的并行分支）也记得对。"""
    from langchain_core.callbacks import BaseCallbackHandler

    class Recorder(BaseCallbackHandler):
        def __init__(self) -> None:
            self.open: dict[str, Span] = {}
            self.spans: list[Span] = []
            self.lock = threading.Lock()

        def begin(self, kind: str, name: str, told: Any, run_id: Any, parent_run_id: Any) -> None:
            parent = str(parent_run_id) if parent_run_id else None
            with self.lock:
                self.open[str(run_id)] = Span(
                    str(run_id), parent, name, kind, time.time_ns(), told=text_of(told)
                )

        def finish(self, run_id: Any, said: Any, error: str = "", **facts: Any) -> None:
            with self.lock:
                span = self.open.pop(str(run_id))
                span.end, span.error, span.facts = time.time_ns(), error, facts
                span.said = text_of(said)
                self.spans.append(span)

        def on_chain_start(self, serialized, inputs, *, run_id, parent_run_id=None, **kwargs):
            self.begin("chain", name_of(serialized, kwargs), inputs, run_id, parent_run_id)

        def on_chain_end(self, outputs, *, run_id, **kwargs):
            self.finish(run_id, outputs)

        def on_retriever_start(self, serialized, query, *, run_id, parent_run_id=None, **kwargs):
            self.begin("retriever", name_of(serialized, kwargs), query, run_id, parent_run_id)

        def on_retriever_end(self, documents, *, run_id, **kwargs):
            self.finish(run_id, [d.page_content for d in documents], documents=[d.id for d in documents])

        def on_chat_model_start(self, serialized, messages, *, run_id, parent_run_id=None, **kwargs):
            told = messages[0][-1].content
            self.begin("model", name_of(serialized, kwargs), told, run_id, parent_run_id)

        def on_llm_end(self, response, *, run_id, **kwargs):
            self.finish(run_id, response.generations[0][0].text)

        def on_chain_error(self, error, *, run_id, **kwargs):
            self.finish(run_id, "", f"{type(error).__name__}：{error}")

        on_retriever_error = on_llm_error = on_chain_error

    return Recorder()


def name_of(serialized: dict | None, kwargs: dict) -> str:
    return kwargs.get("name") or (serialized or {}).get("name") or "?"


def text_of(value: Any) -> str:
    """进来的、出去的是什么，给人看：向量只说几个数，文档只写文字。"""
    if isinstance(value, dict):
        return "\n".join(f"{key}：{text_of(each)}" for key, each in value.items())
    if isinstance(value, list | tuple):
        if value and isinstance(value[0], float):
            return f"{len(value)} 个数"
        return "\n".join(f"[{number}] {text_of(each)}" for number, each in enumerate(value, 1))
    return str(getattr(value, "page_content", getattr(value, "content", value)))


def shorten(text: str) -> str:
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…（共 {len(text)} 字）"


def group_by_parent(spans: Sequence[Span]) -> dict[str | None, list[Span]]:
    """上一步的 id → 它里面的各步，先开始的在前；None 是最外面的。"""
    groups: dict[str | None, list[Span]] = {None: []}
    for span in sorted(spans, key=lambda each: each.start):
        groups.setdefault(span.parent, []).append(span)
        groups.setdefault(span.id, [])
    return groups


def check_tree(spans: Sequence[Span]) -> None:
    """每一步都在它的上一步里面开始、里面结束；上一步也记下了。不是这样，是记错了。"""
    known = {span.id: span for span in spans}
    for span in spans:
        parent = known.get(span.parent) if span.parent else None
        if span.parent and parent is None:
            raise UserError(f"{span.name} 的上一步没有记下来。")
        if span.end < span.start or (parent and not parent.start <= span.start <= span.end <= parent.end):
            raise UserError(f"{span.name} 的时间不在它的上一步里面。")


# ---------------------------------------------------------------- 网页

STYLE = """
body { font: 15px/1.6 system-ui, "Noto Sans CJK SC", "Microsoft YaHei", sans-serif; max-width: 1000px; margin: 2em auto; color: #222; padding: 0 1em }
details { border-bottom: 1px solid #eee } summary { display: grid; grid-template-columns: 15em 1fr 6em; gap: 1em; padding: .3em 0; cursor: pointer }
.lane { position: relative; background: #f4f6f8; height: 1.4em } .bar { position: absolute; top: 0; height: 100%; min-width: 2px }
.chain { background: #9db8d2 } .retriever { background: #2f8f5b } .model { background: #d1602f } .ms { text-align: right }
.error { color: #b00020 } pre { white-space: pre-wrap; background: #fafafa; padding: .5em; margin: .3em 0 .6em }
h2 { font-size: 1.05em; margin-top: 2em } .key span { padding: 0 .6em; color: #fff; margin-right: .5em }
"""


def write_trace_page(
    path: str | Path, spans: Sequence[Span], most: int = 100, title: str = "一次提问经过了什么"
) -> None:
    """前 most 次提问，每次一张时间图：横条是从什么时候到什么时候，点开看进来的与出去的。"""
    groups = group_by_parent(spans)
    parts = [tree_of(root, groups) for root in groups[None][:most]]
    key = '<p class="key"><span class="chain">步骤</span><span class="retriever">检索</span><span class="model">生成</span>点一行，看进来的与出去的。</p>'
    page = f'<!doctype html><html lang="zh"><meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style><h1>{html.escape(title)}</h1>{key}{"".join(parts)}</html>\n'
    write_text(Path(path), page)


def tree_of(root: Span, groups: dict[str | None, list[Span]]) -> str:
    rows, waiting = [], [(root, 0)]
    while waiting:  # 先看一步，再看它里面的各步
        span, depth = waiting.pop()
        rows.append(row_of(span, root, depth))
        waiting += [(child, depth + 1) for child in reversed(groups[span.id])]
    return f"<h2>{html.escape(root.told)}</h2>{''.join(rows)}"


def row_of(span: Span, root: Span, depth: int) -> str:
    whole = max(root.end - root.start, 1)
    left, width = 100 * (span.start - root.start) / whole, 100 * (span.end - span.start) / whole
    said = (
        f'<span class="error">{html.escape(span.error)}</span>'
        if span.error
        else html.escape(shorten(span.said))
    )
    return (
        f'<details><summary><span style="padding-left:{depth}em">{html.escape(span.name)}</span>'
        f'<span class="lane"><span class="bar {span.kind}" style="left:{left:.2f}%;width:{width:.2f}%"></span></span>'
        f'<span class="ms">{span.milliseconds:.2f} ms</span></summary>'
        f"<pre>进来：{html.escape(shorten(span.told))}\n出去：{said}</pre></details>"
    )


# ---------------------------------------------------------------- OpenTelemetry


def export_spans(spans: Sequence[Span], exporter: Any) -> int:
    """Span → OpenTelemetry 的 span，时间、父子关系照旧，交给 exporter；返回交了几个。

    文字不交出去：问题与资料可能是不该离开这台机器的，只交长短与 id。
    """
    try:
        from opentelemetry import trace
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import SpanExportResult
        from opentelemetry.trace import Status, StatusCode
    except ImportError as error:
        raise UserError(f"要先安装 OpenTelemetry：{OTEL_HINT}（{error}）") from error
    tracer = TracerProvider(resource=Resource.create({"service.name": "nlp-learning-rag"})).get_tracer("rag")
    made: dict[str, Any] = {}
    for span in sorted(spans, key=lambda each: each.start):  # 上一步总是先开始
        parent = made.get(span.parent)
        context = trace.set_span_in_context(parent) if parent is not None else None
        one = tracer.start_span(span.name, context, start_time=span.start)
        one.set_attribute("rag.kind", span.kind)
        one.set_attribute("rag.input_chars", len(span.told))
        one.set_attribute("rag.output_chars", len(span.said))
        for key, value in span.facts.items():
            one.set_attribute(f"rag.{key}", value)
        if span.error:
            one.set_status(Status(StatusCode.ERROR, span.error.partition("：")[0]))
        made[span.id] = one
    for span in spans:
        made[span.id].end(span.end)
    if exporter.export(list(made.values())) is not SpanExportResult.SUCCESS:
        raise UserError(
            "收 OpenTelemetry 的服务没有收下：看它启动了没有、网址对不对（gRPC 的端口多半是 4317）。"
        )
    return len(made)


def otlp_exporter(url: str) -> Any:
    """Jaeger、Tempo、OpenTelemetry Collector 一类的服务，例如 http://127.0.0.1:4317。"""
    if not url.startswith(("http://", "https://")):
        raise UserError(f"--otlp {url} 不是网址：例如 http://127.0.0.1:4317。")
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    except ImportError as error:
        raise UserError(f"--otlp 要先安装：{OTLP_HINT}（{error}）") from error
    return OTLPSpanExporter(endpoint=url, insecure=url.startswith("http://"), timeout=5)
