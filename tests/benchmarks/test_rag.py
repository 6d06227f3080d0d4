"""benchmarks/rag.py 在小的规模上：各项都量得出，两边的结果相同（不管快慢）。"""

import importlib.util
from pathlib import Path

import pytest

FILE = Path(__file__).resolve().parents[2] / "benchmarks" / "rag.py"


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    import sys

    before = list(sys.path)
    spec = importlib.util.spec_from_file_location("benchmark_rag", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = before


@pytest.fixture(scope="module")
def texts(bench):
    return bench.windows(300, 64, 0)


@pytest.fixture
def index(bench, texts):
    from rag_common.bm25 import BM25

    index = BM25()
    index.add([str(n) for n in range(len(texts))], texts)
    return index


def test_bm25_against_bm25s(bench, texts, index):
    pytest.importorskip("bm25s", reason="没有装 bm25s")
    found = bench.measure_bm25(index, texts, bench.windows(160, 10, 1), rounds=1)
    assert found["max_relative_difference"] < 3e-6 and found["times_query"] > 0 and found["query_ms"] > 0


def test_updates_leave_the_index_as_it_was(bench, texts, index):
    before = index.search(texts[5], 10)
    found = bench.measure_update(index, texts, build_s=1.0, rounds=2)
    assert found["times_update"] > 0 and dict(index.search(texts[5], 10)) == pytest.approx(
        dict(before), abs=3e-6
    )


def test_retrieval_is_timed_per_question(bench, texts, index):
    found = bench.measure_retrieval(index, texts, texts[:5], dim=8)
    assert 0 < found["retrieval_p50_ms"] <= found["retrieval_p95_ms"]
    assert bench.percentile([3.0, 1.0, 2.0], 0.5) == 2.0 and bench.percentile([1.0], 0.95) == 1.0
