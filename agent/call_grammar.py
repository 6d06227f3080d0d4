"""只写得出合法调用的解码：工具 → 文法 → 自动机 → 词表上的掩码。tool_schema.py 的第三步。

    工具 ──call_schema──> 一份 schema：{"name": 就是这一个, "arguments": 它的参数}，几件工具就几选一
      ──nlp_common/lm/schema_grammar.py──> 文法：JSON 的写法只有一种（逗号、冒号后一个空格，参数按 schema 里的次序）
      ──nlp_common/lm/automaton.py──> 自动机：状态是"还剩什么没写"，读一个字节换一个状态
      ──nlp_common/lm/token_masks.py──> 这个状态下，词表里哪些 token 的全部字节走得通

<tool_call> 与 </tool_call> 没有选择的余地，直接写上，不问模型；文法管的是它们中间的那一行。
"""

import copy
from typing import Any

import torch

from nlp_common.base.errors import UserError
from nlp_common.lm.automaton import Matcher
from nlp_common.lm.chatml import encode_text
from nlp_common.lm.gbnf import parse_grammar
from nlp_common.lm.generation import stop_tokens
from nlp_common.lm.schema_grammar import schema_to_grammar
from nlp_common.lm.token_masks import TokenMasks, token_bytes
from nlp_common.lm.tool_text import CALL, CALL_END
from schema_words import KNOWN, check_schema

FORMATS = ("date", "time", "date-time")  # 文法写得出的几种；别的 format 只是说明


# ---------------------------------------------------------------- 1. 工具 → 文法


def call_schema(tools: list[dict]) -> dict:
    """几件工具 → 一个调用的 schema：名字定了，参数就定了。

    各工具的参数放在 $defs 里，以工具的名字为名；它们自己的 $ref 也跟着挪过去。
    """
    if not tools:
        raise UserError("一件工具也没有：没有可以写的调用。")
    kinds, parts = [], {}
    for tool in tools:
        name = tool["function"]["name"]
        if name in parts:
            raise UserError(f"两件工具都叫 {name}：不知道调用的是哪一件，改掉一个名字。")
        parameters = {"type": "object", "properties": {}} | (tool["function"].get("parameters") or {})
        check_schema(parameters, f"工具 {name} 的 parameters")
        parts[name] = writable(parameters, name)
        place = name.replace("~", "~0").replace("/", "~1")
        fields = {"name": {"const": name}, "arguments": {"$ref": f"#/$defs/{place}"}}
        kinds.append({"type": "object", "properties": fields, "required": ["name", "arguments"]})
    return {"anyOf": kinds, "$defs": parts}


def writable(schema: Any, tool: str) -> Any:
    """schema 里的说明去掉，$ref 挪到这件工具名下。限制一条也不去：写不成文法的，schema_to_grammar 会说出来。"""
    if not isinstance(schema, dict):
        return schema
    found = {}
    for name, value in schema.items():
        if name in ("properties", "$defs", "definitions"):
            found[name] = {key: writable(each, tool) for key, each in value.items()}
        elif name in ("anyOf", "oneOf", "allOf"):
            found[name] = [writable(each, tool) for each in value]
        elif name in ("items", "additionalProperties"):
            found[name] = writable(value, tool)
        elif name == "$ref":
            found[name] = f"#/$defs/{tool.replace('~', '~0').replace('/', '~1')}{value.removeprefix('#')}"
        elif name in KNOWN or (name == "format" and value in FORMATS):
            found[name] = copy.deepcopy(value)
    if len(found.get("allOf", [])) == 1:  # pydantic 爱写的 {"allOf": [{"$ref": …}]}
        (only,) = found.pop("allOf")
        found |= only
    if found.pop("nullable", False):
        found = {"anyOf": [found, {"type": "null"}]}
    return found


class CallGrammar:
    """一组工具的文法：text 是写出来的文法（GBNF），matcher 是它的自动机。"""

    def __init__(self, tools: list[dict]):
        self.schema = call_schema(tools)
        body = schema_to_grammar(self.schema)
        # 最后的换行也归文法管：真的分词器里 "}}\n" 常是一个 token
        self.text = 'root ::= call "\\n"\n' + body.replace("root ::=", "call ::=", 1)
        self.matcher = Matcher(parse_grammar(self.text))

    def masks(self, tokenizer, size: int) -> TokenMasks:
        """size 是模型输出层的大小。控制符（加进词表的，<tool_call> 也是）不是文字，字符串里也不许写。"""
        words = token_bytes(tokenizer)
        for number in tokenizer.added_tokens_decoder:
            words[number] = b""
        return TokenMasks(self.matcher, words + [b""] * (size - len(words)), stop_tokens(tokenizer))


# ---------------------------------------------------------------- 2. 写一个调用


@torch.no_grad()
def generate_call(
    model,
    tokenizer,
    prompt: list[int],
    masks: TokenMasks | None,
    max_new_tokens: int = 200,
    temperature: float = 0.0,
    seed: int = 0,
) -> str:
    """让模型写一个调用，返回文字，从 <tool_call> 到 </tool_call>。masks 是 None 就不加约束，写到哪里算哪里。

    每一步：模型给每个 token 打分 (V,)，不许可的打成负无穷，再选。长度快到了，只许可往写完的方向走的，所以总写得完。
    """
    generator = torch.Generator(model.device).manual_seed(seed)
    state = masks.matcher.start if masks else 0
    if masks and masks.matcher.need(state) > max_new_tokens:
        raise UserError(f"最短的调用也要 {masks.matcher.need(state)} 个字节：把 max_new_tokens 改大些。")
    ids: list[int] = []
    cache, new = None, prompt + control_ids(tokenizer, CALL) + encode_text(tokenizer, "\n")
    for step in range(max_new_tokens):
        out = model(input_ids=torch.tensor([new], device=model.device), past_key_values=cache, use_cache=True)
        cache, logits = out.past_key_values, out.logits[0, -1].float()  # (V,)
        if masks:
            allowed = torch.from_numpy(masks.allowed(state, budget=max_new_tokens - step - 1))
            logits = logits.masked_fill(~allowed.to(logits.device), float("-inf"))
        if temperature == 0:
            token = int(logits.argmax())
        else:
            token = int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator))
        if not masks and (token in stop_tokens(tokenizer) or [token] == control_ids(tokenizer, CALL_END)):
            break
        ids.append(token)
        new = [token]
        if masks:
            state = masks.next(state, token)
            if masks.matcher.can_end(state):  # JSON 与换行都写完了
                break
    return f"{CALL}\n{tokenizer.decode(ids)}{CALL_END}"


def control_ids(tokenizer, word: str) -> list[int]:
    """<tool_call> 这样的字样：分词器里有这个控制符就是它一个，没有就照普通的文字切开。"""
    number = tokenizer.get_vocab().get(word)
    return encode_text(tokenizer, word) if number is None else [number]


def walk(masks: TokenMasks, ids: list[int]) -> list[tuple[int, list[int]]]:
    """照着一串 token 走一遍：每一步之前许可几个，其中的前几个是哪些。走不通是 ValueError。"""
    state, steps = masks.matcher.start, []
    for place, token in enumerate(ids):
        tokens, _ = masks.after(state)
        steps.append((len(tokens), [int(each) for each in tokens[:4]]))
        state = masks.next(state, token)
        if not state:
            raise ValueError(f"第 {place + 1} 个 token 不许可")
    return steps
