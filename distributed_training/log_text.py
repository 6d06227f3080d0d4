"""一行文字里的"名字—数"：各家的名字不同（lm loss、train/loss、grad norm、gnorm、tok/s），认成同一个。"""

from __future__ import annotations

import re
from datetime import datetime

# 项 → 它的各种名字（空格、下划线、横线、斜线当作一样）；排在前面的先认
NAMES = {
    "eval_loss": r"(?:eval|val|valid|validation|test) ?loss|loss ?(?:eval|val|valid|validation|test)",
    "loss": r"(?:train|training|lm|train lm) ?loss|loss ?train|loss",
    "grad_norm": r"(?:global |total |train )?(?:grad|gradient) ?norm|gnorm",
    "learning_rate": r"(?:train )?(?:learning ?rate|lr)(?: 0)?|lr AdamW.*",
    "tokens_per_s": r"(?:train )?(?:tokens?|tok|words) ?(?:per )?s(?:ec|econd)?|tps|wps|train tokens per s",
    "tokens": r"(?:train )?(?:num input tokens seen|tokens seen|consumed tokens|total tokens|tokens)",
    "skipped_total": r"skipped",
    "skipped": r"number of skipped iterations",
    "step_seconds": r"elapsed time per iteration|(?:step|iter|iteration) ?time|time|dt|duration",
    "time": r"timestamp|wall ?time|elapsed|runtime|seconds",
    "batch": r"batch (?:id|hash|sha256)|data (?:id|hash|sha256)",
    "step": r"(?:train |trainer )?(?:global ?steps?|steps?|iterations?|iter|num updates|updates?)",
}
PATTERNS = {name: re.compile(pattern, re.IGNORECASE) for name, pattern in NAMES.items()}
UNITS = {"ms": 1e-3, "k": 1e3, "K": 1e3, "M": 1e6, "B": 1e9}

NUMBER = r"[-+]?(?:\d[\d,]*\.?\d*|\.\d+)(?:[eE][-+]?\d+)?|[-+]?\b(?:nan|inf|infinity)\b"
PAIR = re.compile(
    r"(?<![A-Za-z0-9])(?P<name>[A-Za-z][A-Za-z0-9_/ -]{0,50}?)\s*(?:\((?P<inside>ms|s)\))?[\"']?\s*[:=]?\s*[\[(]?\s*[\"']?"
    rf"(?P<number>{NUMBER})(?P<unit>\s?ms\b|[kKMB]\b|)",
    re.IGNORECASE,
)
SPEED = re.compile(
    rf"(?P<number>{NUMBER})(?P<unit>[kKM]?)\s*(?:tok|tokens|words)/s(?:ec)?\b(?!\s*[:=]?\s*[\d.])"
)
PACE = re.compile(rf"(?P<number>{NUMBER})\s*(?P<unit>ms|s)(?:/(?:it|step|iter))(?![a-z])")
BARE_MS = re.compile(rf"[|,]\s*(?P<number>{NUMBER})\s*ms\s*(?=[|,]|$)")
MOMENTS = (
    (re.compile(r"(\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d)(?:[.,](\d+))?"), "%Y-%m-%d %H:%M:%S"),
    (re.compile(r"(\d\d/\d\d/\d{4} \d\d:\d\d:\d\d)(?:[.,](\d+))?"), "%m/%d/%Y %H:%M:%S"),
)
COLOUR = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


def clean(line: str) -> str:
    """去掉终端的颜色。"""
    return COLOUR.sub("", line).strip()


def name_of(key: str) -> str | None:
    """一个名字是哪一项；不认得是 None。"""
    spoken = re.sub(r"[\s_/.-]+", " ", key).strip()
    for name, pattern in PATTERNS.items():
        if pattern.fullmatch(spoken):
            return name
    return None


def fields_of(line: str) -> dict[str, float]:
    """一行里认得的各项，连同行首的时刻。"""
    found: dict[str, float] = {}
    for pattern, form in MOMENTS:
        if moment := pattern.search(line):
            try:
                at = datetime.strptime(moment[1].replace("T", " "), form).timestamp()
            except ValueError:  # 如 13 月
                continue
            found["time"] = at + float(f"0.{moment[2]}") if moment[2] else at
            line = line[: moment.start()] + " | " + line[moment.end() :]
            break
    for pattern, name in ((SPEED, "tokens_per_s"), (PACE, "step_seconds"), (BARE_MS, "step_seconds")):
        if pair := pattern.search(line):
            unit = pair.groupdict().get("unit", "ms")
            found[name] = _number(pair["number"]) * UNITS.get(unit, 1.0)
            line = line[: pair.start()] + " | " + line[pair.end() :]
    for pair in PAIR.finditer(line):
        name = _spoken_last(pair["name"])
        if name is None or name in found:
            continue
        unit = (pair["inside"] or pair["unit"].strip()) or ""
        scale = UNITS.get(unit, 1.0) if name in ("step_seconds", "tokens", "tokens_per_s") else 1.0
        found[name] = _number(pair["number"]) * scale
    if found.get("step_seconds", 0) > 1e9:  # 叫 time，其实是时刻
        found["time"] = found.pop("step_seconds")
    return found if found.keys() - {"time"} else {}


def _spoken_last(text: str) -> str | None:
    """ "INFO step"、"elapsed time per iteration"：从长到短，后几个词认得的那一项；前面剩下的词是别的修饰就不认（aux loss）。"""
    words = re.split(r"[\s]+", text.strip())
    for start in range(len(words)):
        name = name_of(" ".join(words[start:]))
        if name is not None:
            before = words[start - 1] if start else ""
            modified = before and not before.isupper() and name in ("loss", "step_seconds", "tokens")
            return None if modified else name
    return None


def _number(text: str) -> float:
    return float(text.replace(",", ""))
