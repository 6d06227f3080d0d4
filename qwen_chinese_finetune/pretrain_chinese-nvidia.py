"""中文预训练（NVIDIA 显卡的配置）：在文档上继续训练 Qwen，量训练前后的留出困惑度。

学到什么：文档怎样打包成块而不互相偷看；因果语言模型的损失；怎样知道预训练已经到头。
算法在 pretrain_chinese.py（与 pretrain_chinese-mac.py 共用），这里是硬件配置。

运行：
    python pretrain_chinese-nvidia.py                      # 自动选预设
    python pretrain_chinese-nvidia.py --preset tiny        # 离线小世界，CPU 约一分钟
    python pretrain_chinese-nvidia.py --preset full        # Qwen1.5-0.5B + 中文维基，CUDA
    python pretrain_chinese-nvidia.py --preset tiny --dataset people_daily   # 真实语料，不用下载

预期输出（tiny，实测见本文件夹的 README.md）：留出损失降到语法熵的 1.03 倍以内，回顾题全对，
但问它问题一题也答不对：它只会续写，还不会对话。

参考：Radford et al. 2018（GPT）；Krell et al. 2021（无跨文档污染的打包）。
"""

from nlp_common.base.cli import run_main

import pretrain_chinese

PRESETS = {
    "tiny": pretrain_chinese.TINY,
    "full": {
        "dataset": "pleisto/wikipedia-cn-20230720-filtered",
        "max_train_samples": 3000,
        "max_length": 512,
        "per_device_train_batch_size": 8,
        "dataloader_num_workers": 4,
        "learning_rate": 2e-5,
    },
}


def main(argv: list[str] | None = None) -> dict:
    return pretrain_chinese.main(argv, PRESETS, "cuda", other="pretrain_chinese-mac.py")


if __name__ == "__main__":
    run_main(main)
