"""benchmarks/simple_demo.py 从脚本印出来的字里读对了数；改了脚本的印法，这里就会失败。"""

import importlib.util
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "simple_demo.py"


def test_numbers_are_the_printed_ones(tmp_path):
    spec = importlib.util.spec_from_file_location("simple_demo_benchmark", SCRIPT)
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    found = bench.measure("rnn_text_classifier", 0, str(tmp_path))
    assert found["loss"] < 0.001 < 0.6 < found["loss_before"]  # 第二次训练（取平均）的 loss 到 0.38 就停
    assert found["right_of_8"] == 8 and found["mean_right_of_8"] == 4
