"""任务文件里的模板：一道题的题面、选项、答案，一道例题怎样写。规矩与 lm_eval 0.4.13 的相同。

doc_to_text、doc_to_choice、doc_to_target 写的是一栏的名字，就取那一栏；不是，就当 jinja 模板，用这道题的各栏去填。
答案可以是第几个选项（从 0 数）、选项的全文，或一个列表（几个都算对）。
"""

from __future__ import annotations

import ast
import re
from typing import Any

from nlp_common.base.errors import UserError
from nlp_common.data.files import row_place


def place_of(doc: dict) -> str:
    file, index = doc["_place"]
    return f"{file} {row_place(file, index)}" if file else f"第 {index + 1} 题"


def environment() -> Any:
    """jinja，关在沙箱里：模板只能拼文字，碰不到别的。设置与 lm_eval 的相同：末尾的换行留着，没有的栏就报错。"""
    from jinja2 import BaseLoader, StrictUndefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    env = ImmutableSandboxedEnvironment(
        loader=BaseLoader(), undefined=StrictUndefined, keep_trailing_newline=True
    )
    env.filters["regex_replace"] = replace
    return env


def replace(string: str, pattern: str, repl: str, count: int = 0) -> str:
    return re.sub(pattern, repl, string, count=count)


class Writer:
    """照任务文件拼题面。"""

    def __init__(self, config: dict):
        self.config, self.env, self.compiled = config, environment(), {}
        fewshot = config.get("fewshot_config") or {}
        if extra := set(fewshot) - FEWSHOT_FIELDS:
            raise UserError(f"{config['_path']} 的 fewshot_config 里有不认识的 {'、'.join(sorted(extra))}。")
        self.fewshot = {name: config.get(name) for name in FORMAT_FIELDS} | fewshot
        for names in (config, self.fewshot):
            for name, default in (("target_delimiter", " "), ("fewshot_delimiter", "\n\n")):
                if names.get(name) is None:
                    names[name] = default

    def render(self, template: str, doc: dict, what: str) -> str:
        from jinja2 import TemplateError

        try:
            if template not in self.compiled:
                self.compiled[template] = self.env.from_string(template)
            return self.compiled[template].render(**{k: v for k, v in doc.items() if k != "_place"})
        except (TemplateError, ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
            raise UserError(f"{place_of(doc)}：{what} 的模板拼不出来（{error}）。") from error

    def text(self, doc: dict, template: Any) -> str:
        if not isinstance(template, str):
            raise UserError(f"{self.config['_path']} 的 doc_to_text 要是文字模板，这里是 {template!r}。")
        if template in doc:
            return str(doc[template])
        written = self.render(template, doc, "doc_to_text")
        if written.isdigit():
            raise UserError(
                f"{place_of(doc)}：doc_to_text 拼出来是一个数 {written}：题面各不相同、后文相同的任务（winogrande 一类），这里没有。"
            )
        return written

    def choices(self, doc: dict, template: Any) -> list[str]:
        if isinstance(template, str):
            found = doc[template] if template in doc else self.literal(template, doc, "doc_to_choice")
        else:
            found = list(template.values()) if isinstance(template, dict) else template
        if (
            not isinstance(found, (list, tuple))
            or len(found) < 2
            or not all(isinstance(c, str) for c in found)
        ):
            raise UserError(f"{place_of(doc)}：doc_to_choice 要给出至少两个文字选项，得到的是 {found!r}。")
        if empty := [str(i + 1) for i, each in enumerate(found) if not each.strip()]:
            raise UserError(f"{place_of(doc)}：第 {'、'.join(empty)} 个选项是空的。")
        if repeated := sorted({each for each in found if list(found).count(each) > 1}):
            raise UserError(f"{place_of(doc)}：选项 {'、'.join(repeated)} 出现了不止一次。")
        return list(found)

    def literal(self, template: str, doc: dict, what: str) -> Any:
        written = self.render(template, doc, what)
        try:
            return ast.literal_eval(written)
        except (SyntaxError, ValueError) as error:
            raise UserError(f"{place_of(doc)}：{what} 拼出来的不是一个列表：{written[:80]}") from error

    def target(self, doc: dict, template: Any) -> Any:
        """对的是哪个：第几个（整数）、选项的文字，或几个都算对（列表）。"""
        if not isinstance(template, str):
            return template
        if template in doc:
            return doc[template]
        written = self.render(template, doc, "doc_to_target")
        if written.isdigit():
            return int(written)
        if written.startswith("[") and written.endswith("]"):
            try:
                return ast.literal_eval(written)
            except (SyntaxError, ValueError):
                return written
        return written

    def gold(self, doc: dict, choices: list[str]) -> list[int]:
        target = self.target(doc, self.config["doc_to_target"])
        found = []
        for each in target if isinstance(target, list) else [target]:
            place = choices.index(each) if isinstance(each, str) and each in choices else each
            if not isinstance(place, int) or not 0 <= place < len(choices):
                raise UserError(
                    f"{place_of(doc)}：答案 {each!r} 不在选项里；选项有 {len(choices)} 个：{'、'.join(choices)[:80]}。"
                )
            found.append(place)
        return found

    def shot(self, doc: dict) -> str:
        """一道例题，连同它的答案。"""
        how = self.fewshot
        choices = self.choices(doc, how["doc_to_choice"]) if how.get("doc_to_choice") is not None else None
        answer = self.target(doc, how["doc_to_target"])
        if isinstance(answer, list):
            answer = answer[0]
        if choices and isinstance(answer, int):
            if not 0 <= answer < len(choices):
                raise UserError(f"{place_of(doc)}：例题的答案 {answer} 不在选项里。")
            answer = choices[answer]
        text, prefix = self.text(doc, how["doc_to_text"]), how.get("gen_prefix")
        prefix = (doc[prefix] if prefix in doc else self.render(prefix, doc, "gen_prefix")) if prefix else ""
        if prefix:
            before = joined(text, prefix, how["target_delimiter"])[: -len(prefix)]
            return before + joined(prefix, str(answer), " ") + how["fewshot_delimiter"]
        return text + how["target_delimiter"] + str(answer) + how["fewshot_delimiter"]


FORMAT_FIELDS = (
    "doc_to_text",
    "doc_to_choice",
    "doc_to_target",
    "gen_prefix",
    "fewshot_delimiter",
    "target_delimiter",
)
FEWSHOT_FIELDS = {*FORMAT_FIELDS, "sampler", "split", "samples"}


def joined(left: str, right: str, delimiter: str) -> str:
    """两段接起来；接缝两边都没有空白，才添分隔符。"""
    gap = bool(left) and bool(right) and not (left[-1].isspace() or right[0].isspace())
    return left + (delimiter if gap else "") + right
