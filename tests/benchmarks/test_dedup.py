"""benchmarks/dedup.py：两边做的是同一件事，量出来的数都在。"""

import importlib.util
import random
from itertools import islice
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "dedup.py"


def test_both_sides_find_the_same(monkeypatch):
    pytest.importorskip("datasketch", reason="要 datasketch 才比得了")
    spec = importlib.util.spec_from_file_location("dedup_benchmark", SCRIPT)
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    rng = random.Random(0)
    letters = "".join("。" if at % 30 == 29 else chr(rng.randrange(0x4E00, 0x5E00)) for at in range(30_000))
    monkeypatch.setattr("nlp_common.data.people_daily.people_daily", lambda split: [{"text": letters}])
    found = bench.compare(list(islice(bench.texts(0), 300)), rounds=1)
    assert found["dropped"] == found["dropped_datasketch"] == found["dropped_by_both"] > 20
    assert all(found[f"times_{name}"] > 0 for name in ("signatures", "signatures_crc32", "duplicates"))
