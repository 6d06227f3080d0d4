"""读者自己的文字，几个模型各有多意外：困惑度（各自的 token，不能互相比）与每字比特（能比）。"""

from __future__ import annotations

import math
from pathlib import Path

from answering import find_answerer, split_names
from language_metrics import bits_per_char, corpus_perplexity, strided_losses, token_losses
from metrics_report import plain, row
from nlp_common.base.device import pick_device
from nlp_common.base.errors import UserError
from nlp_common.base.intervals import statistic_interval
from nlp_common.data.files import row_place
from nlp_common.data.rows import read_rows
from nlp_common.lm.chatml import encode_text
from nlp_common.lm.loading import load_plain_lm
from nlp_common.train.stage import Stage
from results import item, write_result


def read_texts(path: str) -> tuple[list[str], dict]:
    """文件里的各篇（txt 以空行分段；其余要有 text 一栏）→ (文字, 来源)。"""
    found = read_rows(path)
    texts = []
    for place, each in enumerate(found.rows):
        text = each.get("text")
        if not isinstance(text, str) or not text.strip():
            where = row_place(Path(path).expanduser(), place)
            raise UserError(f"{path} {where}没有文字：要有 text 一栏，里面是一段话。")
        texts.append(text)
    return texts, found.source


def measure_text(model, tokenizer, text: str, window: int) -> dict | None:
    """一篇：总的 −ln p（nats）、几个 token、几个字。第一个 token 没有前文，它和它的字都不算；只有一个 token 是 None。"""
    ids = encode_text(tokenizer, text)
    if len(ids) < 2:
        return None
    if len(ids) <= window:
        losses = token_losses(model, [ids])[0]
    else:
        losses, _ = strided_losses(model, ids, window, max(1, window // 2))
    chars = max(1, len(text) - len(tokenizer.decode(ids[:1])))
    return {"nats": losses.sum().item(), "tokens": len(losses), "chars": chars}


def score_text(stage: Stage) -> dict:
    """--text：每个模型一行。"""
    settings = stage.settings
    texts, source = read_texts(settings.text)
    metrics: dict = {"documents": len(texts), "models": {}}
    found = {}
    print(f"\n{settings.text}：{len(texts)} 篇，{sum(map(len, texts)):,} 个字")
    print(row("模型", ["每字比特", "一个 token 几个字", "困惑度（各自的 token）"], 20, 28))
    for name in split_names(settings.models):
        at = find_answerer(name, settings.source)
        tokenizer, model = load_plain_lm(at["path"])
        model.to(pick_device()).eval().requires_grad_(False)
        tokenizer.model_max_length = 10**9  # 比窗口长的由滑动的窗口管，不要库的英文警告
        window = min(settings.window, getattr(model.config, "max_position_embeddings", settings.window))
        measured = {}
        for place, text in enumerate(texts):
            if (each := measure_text(model, tokenizer, text, window)) is not None:
                measured[f"text{place:04d}"] = each
        if not measured:
            raise UserError(f"{settings.text} 里每一篇在 {name} 眼里都只有一个 token：太短，没有可量的。")
        by_token = [(each["nats"], each["tokens"]) for each in measured.values()]
        by_char = [(each["nats"], each["chars"]) for each in measured.values()]
        scores = {
            "perplexity": statistic_interval(by_token, corpus_perplexity, settings.seed, settings.draws),
            "bits_per_char": statistic_interval(by_char, bits_per_char, settings.seed, settings.draws),
        }
        chars, tokens = (sum(each[unit] for each in measured.values()) for unit in ("chars", "tokens"))
        label = Path(name).name
        metrics["models"][label] = scores | {"chars_per_token": chars / tokens, "window": window}
        found[label] = (f"{at['stage']}:{at['id']}", measured, scores)
        said = [each.text() if len(measured) > 1 else f"{each.value:.3f}" for each in scores.values()]
        print(row(label, [said[1], f"{chars / tokens:.2f}", said[0]], 20, 28))
    if len(texts) == 1:
        print("  只有一篇，没有区间：分成几篇（txt 以空行分段）就有。")

    def write(folder: Path) -> None:
        for label, (number, measured, scores) in found.items():
            items = []
            for place, each in measured.items():
                own = {
                    "perplexity": math.exp(min(each["nats"] / each["tokens"], 50)),
                    "bits_per_char": each["nats"] / each["chars"] / math.log(2),
                }
                items.append(item(place, own, prompt=texts[int(place[4:])][:200]))
            # 整批的盖过各篇的平均：困惑度不能一篇一票地平均
            write_result(folder, "text", label, items, model_id=number, seed=settings.seed, scores=scores)

    return stage.save(plain(metrics), {"test": source}, write)
