"""把注意力写进一个能单独打开的网页：数据、样式、脚本都在一个文件里，不联网。"""

from __future__ import annotations

import base64
import json
from pathlib import Path

import torch

from nlp_common.base.errors import UserError

TEMPLATE = Path(__file__).resolve().parent / "head_view.html"
MOST_BYTES = 64 * 2**20  # 浏览器还打得开


def is_causal(maps: list[torch.Tensor]) -> bool:
    """谁也没有看后面的：上三角全是 0。"""
    return all(bool((weights.triu(1) == 0).all()) for weights in maps)


def pack(maps: list[torch.Tensor]) -> str:
    """各层的权重 (H, T, T) → base64：一个权重一个字节，误差至多 1/510；自回归的只存下三角。

    写成小数的文字要六七个字节一个，还要存一半的 0：同样的内容大五倍以上。
    """
    size = len(maps[0][0])
    parts = []
    for weights in maps:
        bytes_ = (weights * 255).round().to(torch.uint8)  # (H, T, T)
        if is_causal(maps):
            rows, columns = torch.tril_indices(size, size)
            bytes_ = bytes_[:, rows, columns]  # (H, T·(T+1)/2)，一行接一行
        parts.append(bytes_.flatten())
    packed = torch.cat(parts)
    if len(packed) > MOST_BYTES:
        raise UserError(
            f"{len(maps)} 层、{len(maps[0])} 个头、{size} 个 token 要 {len(packed) / 2**20:.0f} MB，浏览器打不开："
            "用 --layers 只选几层，或把文字写短。"
        )
    return base64.b64encode(packed.numpy().tobytes()).decode()


def head_page(title: str, tokens: list[str], maps: list[torch.Tensor], layers: list[int]) -> str:
    """网页的文字。tokens 长 T；maps 是 layers 这几层的权重，各 (H, T, T)。"""
    data = {
        "title": title,
        "tokens": tokens,
        "layers": layers,
        "heads": len(maps[0]),
        "causal": is_causal(maps),
        "weights": pack(maps),
    }
    text = json.dumps(data, ensure_ascii=False)
    text = text.replace("<", "\\u003c")  # token 里有 </script> 也不会把网页截断
    return TEMPLATE.read_text(encoding="utf-8").replace("__DATA__", text)


def read_saved(path: str) -> tuple[list[str], list[torch.Tensor]]:
    """自己的模型存下的注意力 ``{"tokens": [T 个], "attention": [层][头][T][T]}``；哪里不对就说哪里。"""
    file = Path(path)
    try:
        saved = json.loads(file.read_text(encoding="utf-8-sig"))
    except OSError as error:
        why = "它是一个文件夹" if file.is_dir() else "没有这个文件" if not file.exists() else error.strerror
        raise UserError(f"--attention 给的 {path} 读不出来：{why}。") from error
    except UnicodeDecodeError as error:
        raise UserError(f"--attention 给的 {path} 读不出来：不是 UTF-8 的文字，请另存为 UTF-8。") from error
    except ValueError as error:
        line = getattr(error, "lineno", 1)
        raise UserError(f"--attention 给的 {path} 读不出来：第 {line} 行不是合法的 JSON。") from error
    if not isinstance(saved, dict) or not {"tokens", "attention"} <= saved.keys():
        raise UserError(f'{path} 里要是 {{"tokens": [...], "attention": [层][头][T][T]}}。')
    if not isinstance(saved["tokens"], list) or not isinstance(saved["attention"], list):
        raise UserError(f"{path} 里的 tokens 与 attention 都要是列表。")
    tokens = [str(token) for token in saved["tokens"]]
    maps: list[torch.Tensor] = []
    for number, layer in enumerate(saved["attention"]):
        try:
            weights = torch.tensor(layer, dtype=torch.float32)
        except (ValueError, TypeError, RuntimeError) as error:
            raise UserError(f"{path} 第 {number} 层不是整齐的 [头][T][T]（{error}）。") from error
        if weights.dim() != 3 or weights.shape[1:] != (len(tokens), len(tokens)):
            raise UserError(
                f"{path} 第 {number} 层的形状是 {tuple(weights.shape)}，要是 (头, {len(tokens)}, {len(tokens)})。"
            )
        if maps and len(weights) != len(maps[0]):
            raise UserError(f"{path} 第 {number} 层有 {len(weights)} 个头，第 0 层有 {len(maps[0])} 个。")
        sums = weights.sum(-1)
        if not torch.isfinite(weights).all() or (weights < 0).any() or (sums - 1).abs().max() > 1e-2:
            raise UserError(
                f"{path} 第 {number} 层的权重不是每行和为 1 的非负数：存的是 softmax 之前的分吗？"
            )
        maps.append(weights)
    if not tokens or not maps:
        raise UserError(f"{path} 里没有 token 或没有注意力。")
    return tokens, maps
