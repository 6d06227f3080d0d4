"""两个 pipeline 演示共有的：参数、用哪个模型、句子从命令行还是标准输入来。"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Literal

from nlp_common.base.arguments import option, parse_arguments
from nlp_common.base.errors import UserError
from nlp_common.hub.models import require_model
from nlp_common.hub.preset import announce, choose_preset


@dataclass
class DemoSettings:
    text: list[str] | None = field(
        default=None, metadata={"help": "要判断的句子，可以写好几句；写 - 就从标准输入读，一行一句"}
    )
    preset: Literal["auto", "tiny", "full"] = option(
        "tiny：自带的小模型，离线；full：真模型；auto：拿得到真模型就用 full", "auto"
    )
    model: str | None = option("用哪个模型：hub 上的名字，或装着模型的文件夹")
    source: Literal["hf", "modelscope"] = option("hub 名从哪里下载", "hf")
    batch_size: int = option("一批几句", 8)
    output_dir: str | None = option("tiny 的小模型存在哪个文件夹；默认在脚本旁边的 outputs 里")
    seed: int = option("训练小模型的随机种子", 0)
    retrain: bool = option("不用已有的小模型，重新训练", False)


def parse_demo(settings_class, full_model: str, argv: list[str] | None):
    """→ (设置, 模型的路径或 hub 名字)；选了 tiny 时后者是 None。第一行打印选了哪个、为什么。"""
    settings = parse_arguments(settings_class, argv)
    if settings.batch_size < 1:
        raise UserError(f"--batch_size 要是正整数，给的是 {settings.batch_size}。")
    if settings.preset == "tiny" and settings.model:
        raise UserError("--preset tiny 用自带的小模型，--model 用不上：两个去掉一个。")
    choice = choose_preset(
        settings.preset,
        settings.model,
        full_model=full_model,
        needs_accelerator=False,
        source=settings.source,
    )
    print(announce(choice))
    settings.preset = choice.preset
    if choice.preset == "tiny":
        return settings, None
    return settings, require_model(settings.model or full_model, settings.source)


def read_sentences(given: list[str] | None) -> list[str]:
    """--text 的句子；其中的 - 换成标准输入的各行（空行不算）。空的句子、不是 UTF-8 的输入是 UserError。"""
    sentences = []
    for number, text in enumerate(given or [], 1):
        if text == "-":
            sentences += _read_stdin()
        elif not text.strip():
            raise UserError(f"--text 的第 {number} 句是空的（{text!r}）。请写上要判断的句子。")
        else:
            sentences.append(text.strip())
    return sentences


def _read_stdin() -> list[str]:
    if sys.stdin.isatty():
        print("从键盘读，一行一句，写完按 Ctrl-D（Windows 是 Ctrl-Z 再回车）：", flush=True)
    lines = []
    for number, raw in enumerate(sys.stdin.buffer, 1):
        try:
            lines.append(raw.decode("utf-8-sig").strip())
        except UnicodeDecodeError as error:
            raise UserError(
                f"标准输入第 {number} 行不是 UTF-8 编码（多半是 GBK）。可以先转码：iconv -f GB18030 -t UTF-8 文件 | python …"
            ) from error
    lines = [line for line in lines if line]
    if not lines:
        raise UserError(
            "标准输入里没有一句话（空的，或只有空行）。例如：cat 句子.txt | python 脚本.py --text -"
        )
    return lines
