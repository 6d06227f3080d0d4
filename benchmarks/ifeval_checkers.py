"""照搬英文的检查器，在中文里判错多少：我们构造的合格、不合格各一份，问 lm-evaluation-harness 的 IFEval 与我们的。

用法：python benchmarks/ifeval_checkers.py [--draws 40]
打印一行 JSON：每种要求它判错的比例，全部的比例，我们的比例。要 lm_eval 与 nltk（pip install lm_eval==0.4.13 nltk），不联网。
参数的比较词只用它也认得的"不少于"与"少于"；"第 1 节"这样的标题它的参数写不出来，不比。
"""

from nlp_common.base.cli import run_main

import argparse
import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "evaluation"))

from ifeval_peers import CHECKERS, harness_follows, load_harness
from instruction_examples import repair, spoil, start_text
from instruction_prompts import TOPICS, draw_kwargs
from instructions_zh import follows_strict


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=40, help="每种要求抽几次参数")
    draws = parser.parse_args().draws
    harness = load_harness()
    wrong: dict[str, float] = {}
    ours = 0
    ids = [id for id in CHECKERS if id != "detectable_format:multiple_sections"]
    for id in ids:
        errors = 0
        for seed in range(draws):
            kwargs, topic = draw(id, seed)
            good = repair(id, kwargs, start_text(topic))
            for text, expected in ((good, True), (spoil(id, kwargs, good), False)):
                errors += harness_follows(harness, id, kwargs, text) != expected
                ours += follows_strict(id, kwargs, text) != expected
        wrong[id.replace(":", ".")] = errors / (2 * draws)
        print(f"{id:<50}{wrong[id.replace(':', '.')]:.2f}", file=sys.stderr, flush=True)
    total = {"wrong": sum(wrong.values()) / len(wrong), "ours_wrong": ours / (2 * draws * len(ids))}
    total |= {"kinds": len(ids), "kinds_wrong": sum(each > 0 for each in wrong.values())}
    print(json.dumps({"ifeval_checkers": total | {"by_kind": wrong, "texts": 2 * draws * len(ids)}}))


def draw(id: str, seed: int) -> tuple[dict, str]:
    """参数与话题；比较词是它认得的两种。"""
    rng = random.Random(f"{id}-{seed}")
    topic = rng.choice(list(TOPICS))
    kwargs = draw_kwargs(id, rng, topic)
    if "relation" in kwargs:
        kwargs["relation"] = rng.choice(["at least", "less than"])
    return kwargs, topic


if __name__ == "__main__":
    run_main(main)
