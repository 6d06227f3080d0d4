"""命令行入口：输出接到 head，它读够就走，不该留下一屏 traceback。"""

import subprocess
import sys

import pytest

HEAD = "import argparse, os, sys; from nlp_common.base.cli import run_main; from nlp_common.base.errors import UserError\n"


def run_unread(code: str) -> tuple[int, str]:
    """标准输出没有人读时运行 code：(退出码, 标准错误)。"""
    process = subprocess.Popen(
        [sys.executable, "-c", HEAD + code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8"
    )
    process.stdout.close()
    errors = process.stderr.read()
    process.stderr.close()
    return process.wait(timeout=60), errors


@pytest.mark.parametrize(
    "body",
    [
        "[print(i) for i in range(1000)]",
        "sys.stdout.write('没有换行')",
    ],
)
def test_output_that_nobody_reads_ends_quietly(body):
    assert run_unread(f"run_main(lambda: {body})") == (141, "")


def test_help_that_nobody_reads_ends_quietly():
    status, errors = run_unread("run_main(lambda: argparse.ArgumentParser().parse_args(['--help']))")
    assert status in (0, 141) and errors == ""  # 有的版本的 argparse 自己吞掉这个错误


def test_another_broken_pipe_is_not_hidden():
    code = HEAD + "r, w = os.pipe(); os.close(r)\nrun_main(lambda: os.write(w, b'x'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", timeout=60)
    assert done.returncode == 1 and "BrokenPipeError" in done.stderr


def test_the_reader_still_sees_the_mistake():
    status, errors = run_unread("def main():\n    raise UserError('写错了')\nrun_main(main)")
    assert status == 2 and errors == "错误：写错了\n"


def test_interrupted_while_importing_says_one_sentence():
    """Ctrl-C 落在 run_main 之前（正在导入库）：一句中文；别的错误照常有 traceback。"""
    for name, said in (("KeyboardInterrupt", "已中断"), ("ValueError", "Traceback")):
        code = f"import nlp_common.base.cli\nraise {name}"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", timeout=60)
        assert done.returncode != 0 and said in done.stderr
        assert ("Traceback" in done.stderr) == (name == "ValueError")
