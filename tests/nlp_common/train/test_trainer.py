"""库的训练器说的英文：没有事的不显示，有事的译成中文。"""

import logging

import torch
from transformers.utils.logging import get_logger

from nlp_common.train.trainer import HarmlessMissingKeys


class Tied(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(4, 2)
        self.lm_head = torch.nn.Linear(2, 4, bias=True)
        self.lm_head.weight = self.embed.weight


def test_missing_keys_of_shared_weights_are_not_shown():
    shown: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record):
            shown.append(record.getMessage())

    logger, keep, harmless = get_logger("transformers.trainer"), Keep(), HarmlessMissingKeys(Tied())
    logger.addHandler(keep)
    logger.addFilter(harmless)
    try:
        logger.warning("There were missing keys in the checkpoint model loaded: ['lm_head.weight'].")
        logger.warning(
            "There were missing keys in the checkpoint model loaded: ['lm_head.weight', 'lm_head.bias']."
        )
        logger.warning("another warning")
    finally:
        logger.removeFilter(harmless)
        logger.removeHandler(keep)
    assert shown == ["检查点里缺这些权重：lm_head.bias", "another warning"]
