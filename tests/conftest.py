"""让测试能导入 qwen_chinese_finetune 里的 qwen_common；并行时一个进程只用一个核。"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "qwen_chinese_finetune"))

if "PYTEST_XDIST_WORKER" in os.environ:  # 要在导入 torch 之前；测试启动的脚本也继承它
    os.environ["OMP_NUM_THREADS"] = "1"


def pytest_collection_modifyitems(items):
    """最长的先跑：它占住一个进程的时候，别的测试在另一个进程里跑。"""
    items.sort(key=lambda item: item.path.name != "test_expected_numbers.py")
