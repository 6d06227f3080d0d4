"""中文预训练，Apple M1–M4 的配置。算法、用法、预期输出都在 pretrain_chinese.py。

与 NVIDIA 配置的不同，以及为什么：
- float32：MPS 的混合精度不稳，会出 NaN；
- 每步 2 行、累积 4 步：统一内存小，等效的批大小仍是 8；
- 读数据 0 个子进程：macOS 上 DataLoader 的子进程会卡住。

运行：
    python pretrain_chinese-mac.py                         # 自动选预设
    python pretrain_chinese-mac.py --preset tiny           # 离线小世界，约一分钟
    python pretrain_chinese-mac.py --preset full           # Qwen1.5-0.5B + 中文维基，MPS
"""

from nlp_common.base.cli import run_main

import pretrain_chinese

PRESETS = {
    "tiny": pretrain_chinese.PRESETS["tiny"],
    "full": pretrain_chinese.PRESETS["full"]
    | {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "dataloader_num_workers": 0},
}


def main(argv: list[str] | None = None) -> dict:
    return pretrain_chinese.main(argv, PRESETS, "mps", other="pretrain_chinese-nvidia.py")


if __name__ == "__main__":
    run_main(main)
