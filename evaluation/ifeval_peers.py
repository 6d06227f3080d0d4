"""lm-evaluation-harness 里的 IFEval 检查器（Google 原版），给测试与 benchmarks/ifeval_checkers.py 用，与我们的比。

它一导入就要 nltk 的分句数据、langdetect 与 immutabledict；只用不需要它们的那些检查器，所以没有也行，换成空壳。
"""

from __future__ import annotations

import importlib.util
import sys
import types
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

from nlp_common.base.errors import UserError

# id → 它的类；要分句数据、要 langdetect 的几个不在里面
CHECKERS = {
    "keywords:existence": "KeywordChecker",
    "keywords:frequency": "KeywordFrequencyChecker",
    "keywords:forbidden_words": "ForbiddenWords",
    "length_constraints:number_words": "NumberOfWords",
    "length_constraints:number_paragraphs": "ParagraphChecker",
    "length_constraints:nth_paragraph_first_word": "ParagraphFirstWordCheck",
    "detectable_content:number_placeholders": "PlaceholderChecker",
    "detectable_content:postscript": "PostscriptChecker",
    "detectable_format:number_bullet_lists": "BulletListChecker",
    "detectable_format:number_highlighted_sections": "HighlightSectionChecker",
    "detectable_format:multiple_sections": "SectionChecker",
    "detectable_format:json_format": "JsonFormat",
    "detectable_format:title": "TitleChecker",
    "combination:two_responses": "TwoResponsesChecker",
    "combination:repeat_prompt": "RepeatPromptThenAnswer",
    "startend:end_checker": "EndChecker",
    "startend:quotation": "QuotationChecker",
    "punctuation:no_comma": "CommaChecker",
}


def load_harness() -> types.ModuleType:
    """它的 instructions 模块；没装 lm_eval 是 UserError。"""
    if not find_spec("lm_eval") or not find_spec("nltk"):
        raise UserError("要与 lm-evaluation-harness 比，请先 pip install lm_eval==0.4.13 nltk。")
    import nltk

    folder = Path(find_spec("lm_eval").origin).parent / "tasks" / "ifeval"
    stubs = {name: types.ModuleType(name) for name in ("langdetect", "immutabledict") if not find_spec(name)}
    if "immutabledict" in stubs:
        stubs["immutabledict"].immutabledict = dict
    sys.modules.update(stubs)
    with mock.patch.object(nltk.data, "find", str):
        for name in ("instructions_util", "instructions"):
            spec = importlib.util.spec_from_file_location(
                f"lm_eval.tasks.ifeval.{name}", folder / f"{name}.py"
            )
            module = importlib.util.module_from_spec(spec)
            sys.modules[spec.name] = module
            spec.loader.exec_module(module)
    for name in stubs:  # 只去掉替身：不能用 mock.patch.dict，它连这期间导入的 datasets 也去掉，再导入就报错
        del sys.modules[name]
    return module


def harness_follows(harness: types.ModuleType, id: str, kwargs: dict[str, Any], text: str) -> bool:
    """它说合不合。"""
    checker = getattr(harness, CHECKERS[id])(id)
    checker.build_description(**kwargs)
    return bool(checker.check_following(text))
