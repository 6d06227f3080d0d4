"""simple_demo 五个脚本的效果：换十个种子，运行读者运行的那个脚本，读它印出来的 loss 和看点。

python benchmarks/simple_demo.py                 # 十个种子，两三分钟；每个脚本、每个种子打印一行 JSON
python benchmarks/simple_demo.py --seeds 0 1 --record   # 记进 docs/measurements/simple_demo.jsonl
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "simple_demo"
# 脚本 → {名字: 印出来的哪一处}
SHOWN = {
    "minimal_word_embedding_train": {
        "cats_dogs": r"cats - dogs +\S+ +(\S+)",
        "unrelated_max": r"训练后最高的是 .*：(\S+)",
    },
    "simple_sentiment_classifier": {"positive_probability": r"'i love this' +→ 正面 +（正面 ([\d.]+)"},
    "rnn_text_classifier": {"right_of_8": r"RNN 判对 (\d)/8", "mean_right_of_8": r"取平均 判对 (\d)/8"},
    "transformer_sentiment_classification": {
        "feeling_share_before": r"第一个词看好恶词.*：(\S+) →",
        "feeling_share": r"第一个词看好恶词.*→ (\S+)",
    },
    "transformer_encoder_classifier": {},
}


def measure(script: str, seed: int, folder: str) -> dict[str, float]:
    shutil.copy(FOLDER / f"{script}.py", folder)  # 图画在它旁边，不盖掉读者的
    command = [sys.executable, f"{script}.py", "--seed", str(seed)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, encoding="utf-8")
    if done.returncode:
        sys.exit(f"{script}.py --seed {seed} 没有跑完：\n{done.stderr[-2000:]}")
    shown = re.findall(r"epoch +(\d+) +loss ([\d.]+)", done.stdout)
    last = max(int(epoch) for epoch, _ in shown)
    losses = [float(loss) for epoch, loss in shown if int(epoch) in (1, last)]  # RNN 之后还训练一个，不要
    found = {"loss_before": losses[0], "loss": losses[1]}
    for name, pattern in SHOWN[script].items():
        place = re.search(pattern, done.stdout)
        if place is None:
            sys.exit(f"{script}.py 印出来的字里没有 {pattern}：\n{done.stdout}")
        found[name] = float(place[1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scripts", nargs="+", default=list(SHOWN), choices=list(SHOWN), metavar="脚本")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(10)))
    parser.add_argument("--record", action="store_true", help="记进 docs/measurements/simple_demo.jsonl")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for script in args.scripts:
            for seed in args.seeds:
                found = measure(script, seed, folder)
                print(json.dumps({"script": script, "seed": seed, **found}), flush=True)
                if args.record:
                    from nlp_common.base.measurements import record

                    command = f"python simple_demo/{script}.py --seed {seed}"
                    record("simple_demo", {script: found}, seed=seed, command=command)


if __name__ == "__main__":
    main()
