"""终端的编码写不出的字换成问号，绝不因为一次打印丢掉训练好的结果。"""

import os
import subprocess
import sys

import pytest

CODE = """
from nlp_common.base.cli import run_main
import sys
def main():
    print("好🤗①™︎")
    print("警告🤗", file=sys.stderr)
    print("收到", len(sys.stdin.read()))
    print("存好了")
run_main(main)
"""


@pytest.mark.parametrize("encoding", ["gbk", "cp1252", "ascii", "utf-8", "gbk:strict"])
def test_a_print_never_loses_a_run(encoding, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", CODE],
        input="🤗你好".encode() + b"\xff",
        capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"},
    )
    assert done.returncode == 0, done.stderr
    codec = encoding.split(":")[0]
    assert "存好了".encode(codec, errors="replace") in done.stdout and b"Traceback" not in done.stderr
    assert "好".encode(codec, errors="replace") in done.stdout
