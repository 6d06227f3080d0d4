"""中文预训练，NVIDIA 显卡的配置。算法、用法、预期输出都在 pretrain_chinese.py。

运行：
    python pretrain_chinese-nvidia.py                      # 自动选预设
    python pretrain_chinese-nvidia.py --preset tiny        # 离线小世界，CPU 约一分钟
    python pretrain_chinese-nvidia.py --preset full        # Qwen1.5-0.5B + 中文维基，CUDA
"""

from nlp_common.base.cli import run_main

import pretrain_chinese

PRESETS = {
    "tiny": pretrain_chinese.PRESETS["tiny"],
    "full": pretrain_chinese.PRESETS["full"] | {"dataloader_num_workers": 4},
}


def main(argv: list[str] | None = None) -> dict:
    return pretrain_chinese.main(argv, PRESETS, "cuda", other="pretrain_chinese-mac.py")


if __name__ == "__main__":
    run_main(main)
