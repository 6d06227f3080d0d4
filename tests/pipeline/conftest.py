"""让测试能导入 pipeline 里的文件；全部测试共用一个英文小模型（默认的设置，约 9 秒）。"""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "pipeline"))


@pytest.fixture(scope="session")
def english(tmp_path_factory):
    """→ (文件夹, 训练记录)。"""
    import torch

    from tiny_english import tiny_english

    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("小 模型") / "tiny-english"
    return folder, tiny_english(folder, seed=0)
