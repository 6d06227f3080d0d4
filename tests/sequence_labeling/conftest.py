"""让测试能导入 sequence_labeling 里的脚本；一份小的标注数据。"""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "sequence_labeling"))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from small_ner import small_sentences, write_tag_file


@pytest.fixture(scope="session")
def small_dataset(tmp_path_factory) -> Path:
    """train.bmes、dev.bmes、test.bmes。"""
    folder = tmp_path_factory.mktemp("ner")
    rows = small_sentences(180)
    write_tag_file(folder / "train.bmes", rows[:120])
    write_tag_file(folder / "dev.bmes", rows[120:150])
    write_tag_file(folder / "test.bmes", rows[150:])
    return folder
