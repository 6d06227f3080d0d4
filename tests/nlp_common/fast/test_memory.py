"""释放了的内存留在进程里：再要同样大的，不再缺页。"""

import ctypes
import os
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
import numpy as np
import nlp_common  # 导入就留住

def faults(n):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(n):
        big = [np.ones(1_000_000) for _ in range(6)]  # 6 × 8 MB
        del big
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults(3)  # 头几次总要缺页
print(faults(10))
"""


def glibc() -> bool:
    return sys.platform.startswith("linux") and hasattr(ctypes.CDLL(None), "mallopt")


@pytest.mark.skipif(not glibc(), reason="只有 glibc 有 mallopt")
def test_freed_memory_is_used_again():
    def run(way):
        env = os.environ | {"NLP_LEARNING_KEEP_MEMORY": "0" if way == "default" else "1"}
        command = [sys.executable, "-c", FAULTS]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
        return int(done.stdout)

    assert run("keep") < 100 < 10_000 < run("default")


def test_harmless_elsewhere(monkeypatch):
    from nlp_common.fast import memory

    monkeypatch.setattr(memory.sys, "platform", "win32")
    monkeypatch.setattr(memory.ctypes, "CDLL", None)  # Windows 上 CDLL(None) 会抛异常，不该走到
    memory.keep_freed_memory()
