"""Ollama 的 Modelfile：用哪个 GGUF，对话怎样拼，在哪里停。

Ollama 不用 GGUF 里的 Jinja 模板，要再写一遍，用 Go 的 text/template：``.System``、``.Tools``、``.Messages`` 是它给的，
``{{-`` 吃掉前面的空白。拼出来的与 chatml.CHAT_TEMPLATE 一字不差：工具列在 system 里，调用写在助手的话里，连着的几个结果在一轮里。
"""

from __future__ import annotations

import re

from nlp_common.lm.tool_text import TOOLS_AFTER, TOOLS_BEFORE

TEMPLATE = (
    "{{- if or .System .Tools }}<|im_start|>system\n"
    "{{ .System }}"
    "{{- if .Tools }}{{ if .System }}\n\n{{ end }}"
    + TOOLS_BEFORE
    + "{{ range .Tools }}\n{{ . }}{{ end }}"
    + TOOLS_AFTER
    + "{{ end }}<|im_end|>\n{{ end }}"
    '{{- $previous := "" }}'
    "{{- range $index, $message := .Messages }}"
    # 一轮工具结果到此为止
    '{{- if and (eq $previous "tool") (ne .Role "tool") }}<|im_end|>\n{{ end }}'
    '{{- if eq .Role "user" }}<|im_start|>user\n{{ .Content }}<|im_end|>\n'
    '{{ else if eq .Role "assistant" }}<|im_start|>assistant\n{{ .Content }}'
    "{{- range $number, $call := .ToolCalls }}"
    "{{ if or $message.Content $number }}\n{{ end }}"
    '<tool_call>\n{"name": "{{ .Function.Name }}", "arguments": {{ .Function.Arguments }}}\n</tool_call>'
    "{{ end }}<|im_end|>\n"
    '{{ else if eq .Role "tool" }}{{ if ne $previous "tool" }}<|im_start|>user{{ end }}\n'
    "<tool_response>\n{{ .Content }}\n</tool_response>"
    "{{- end }}"
    "{{- $previous = .Role }}"
    "{{- end }}"
    '{{- if eq $previous "tool" }}<|im_end|>\n{{ end }}'
    "<|im_start|>assistant\n"
)


def modelfile(weights: str, tokenizer, context: int) -> str:
    """Modelfile 的文字；weights 是同一个文件夹里的 GGUF。"""
    lines = [
        "# ollama create 名字 -f Modelfile，然后 ollama run 名字",
        f"FROM ./{weights}",
        f'TEMPLATE """{TEMPLATE}"""',
    ]
    if system := default_system(tokenizer):
        lines.append(f'SYSTEM """{system}"""')
    lines += [
        'PARAMETER stop "<|im_end|>"',
        'PARAMETER stop "<|im_start|>"',
        f"PARAMETER num_ctx {min(context, 8192)}",
        "# 贪心，与这里量的相同；想要回答有变化，改大",
        "PARAMETER temperature 0",
    ]
    return "\n".join(lines) + "\n"


def default_system(tokenizer) -> str:
    """模型自己的模板补上的 system；不补的（小世界的、我们训练的）是空的。"""
    if not tokenizer.chat_template:
        return ""
    text = tokenizer.apply_chat_template([{"role": "user", "content": "?"}], tokenize=False)
    found = re.match(r"<\|im_start\|>system\n(.*?)<\|im_end\|>", text, re.DOTALL)
    return found[1] if found else ""
