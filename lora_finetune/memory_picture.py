"""一步训练里，内存怎样涨落：激活全留着、重算激活、优化器分页，三条线画在一起。"""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedConfig

from finetune_memory import GB, activations, memory, parts_of
from nlp_common.draw.plots import line_chart
from nlp_common.train.dry_run_qwen import layer_bytes

TOKENS, RANK = 4 * 1024, 64  # 一批 4 行、每行 1,024 个 token


def draw_one_step(folder: Path, config: PreTrainedConfig) -> None:
    """QLoRA 的一步：前向一层一层往上，反向一层一层往下，最后更新。横轴是走到第几层，纵轴是 GB。"""
    kept, recomputed, optimizer = one_step(config)
    room = max(recomputed) - optimizer / 2  # 只差一点放不下的显存：分页正好有用
    paged = [gb if gb <= room else max(room, gb - optimizer) for gb in recomputed]
    xs = list(range(len(kept)))
    where = "前向 → 反向 → 更新，走到第几层|forward, backward, update"
    line_chart(
        folder / "checkpointing.svg",
        {"激活全留着|keep all": (xs, kept), "重算激活|recompute": (xs, recomputed)},
        "7B 的 QLoRA，一步里的内存|Memory in one QLoRA step, 7B",
        where,
        "GB",
    )
    line_chart(
        folder / "paging.svg",
        {
            "优化器留在显存|optimizer stays": (xs, recomputed),
            "放不下时挪走几页|paged optimizer": (xs, paged),
        },
        "分页的优化器：只在最高的一刻让出地方|Paged optimizer",
        where,
        "GB",
        hlines={f"显存 {room:.1f} GB|GPU {room:.1f} GB": room},
    )


def one_step(config: PreTrainedConfig) -> tuple[list[float], list[float], float]:
    """→ (激活全留着, 重算激活, 其中优化器占的)，GB。

    激活照 dry_run_qwen.py 的公式：每层一份；重算时每层只留入口，反向时加上正在重算的那一层。
    """
    parts, layers = parts_of(config), config.num_hidden_layers
    used = memory(parts, "qlora", RANK, weight_bytes=2)
    fixed = sum(used.values()) / GB  # 底座、适配器、梯度、优化器：一直在
    whole = layer_bytes(config, TOKENS, TOKENS, half=True) / GB
    entry = 4 * TOKENS * config.hidden_size / GB
    head = activations(config, TOKENS, True, False) / GB - layers * whole  # 词表上的
    up = [fixed + n * whole for n in range(layers + 1)]
    kept = [*up, up[-1] + head, *reversed(up)]
    up = [fixed + n * entry for n in range(layers + 1)]
    down = [fixed + n * entry + whole for n in range(layers, 0, -1)]
    recomputed = [*up, up[-1] + head, *down, fixed]
    return kept, recomputed, used["optimizer"] / GB
