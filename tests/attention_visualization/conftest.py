"""让测试能导入 attention_visualization 里的模块；一个认得小世界的随机小模型，和用它出的几道题。"""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "attention_visualization"))

import questions as question_module
import readers


@pytest.fixture(scope="module")
def reader(chat_folder):
    """随机但不呆板的两层小 Qwen，eager。"""
    found = {"path": str(chat_folder), "stage": "model", "id": "test", "run": None}
    return readers.load_reader(found)


@pytest.fixture(scope="module")
def reader64(chat_folder):
    """float64 的：两种算法只差舍入。"""
    found = {"path": str(chat_folder), "stage": "model", "id": "test", "run": None}
    reader = readers.load_reader(found)
    reader.model.double()
    return reader


@pytest.fixture(scope="session")
def few(tokenizer):
    """16 道小世界的题，八种各两道。"""
    return question_module.make_questions(tokenizer, "tiny_world", 16, 0)
