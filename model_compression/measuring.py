"""量一个模型：答对几成、留出损失多少、占几个字节。压缩的每一种办法都用同一把尺子。"""

from __future__ import annotations

from torch import nn

from nlp_common.lm.chat_rows import chat_row, heldout_loss
from nlp_common.tiny import world
from nlp_common.tiny.judge import qa_accuracy

N_LOSS = 256  # 留出损失用几段对话


def measure(model, tokenizer, questions: list[dict]) -> dict[str, float]:
    """{"qa_accuracy": 贪心回答答对的比例, "heldout_loss": 留出对话里助手每个 token 的平均损失（nats）}。"""
    return {
        "qa_accuracy": qa_accuracy(model, tokenizer, questions),
        "heldout_loss": world_loss(model, tokenizer),
    }


def world_loss(model, tokenizer, n: int = N_LOSS) -> float:
    """小世界留出的 n 段对话上，助手每个 token 的平均损失（nats）。"""
    rows = [chat_row(tokenizer, chat["messages"]) for chat in world.chats(n, seed=1, heldout=True)]
    return heldout_loss(model, rows, tokenizer.pad_token_id, 32)


def model_bytes(model: nn.Module) -> int:
    """参数与缓冲区占几个字节；共用的（嵌入与输出）只算一遍。"""
    tensors = [*model.parameters(), *model.buffers()]
    return sum({t.data_ptr(): t.numel() * t.element_size() for t in tensors if t.numel()}.values())
