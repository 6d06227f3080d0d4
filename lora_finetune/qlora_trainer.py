"""QLoRA：底座压成四位、冻住，只训练旁边的 LoRA；内存少了，正确率少了没有，一步慢了多少。

学到什么：四位的底座怎样参与训练（前向还原一次，反向再还原一次，梯度穿过去，自己不动）；
正确率与没有量化的 LoRA 差多少；省的是权重那一份，梯度与优化器本来就只有适配器的；代价是每一步多两次还原。

运行：
    python qlora_trainer.py                                  # 小模型：没有量化的、NF4 的各训练一次
    python qlora_trainer.py --bases none,nf4,int4,fp4        # 多比几种四位的写法
    python qlora_trainer.py --backend bitsandbytes --bases nf4   # 底座换成 bitsandbytes 的
    python qlora_trainer.py --preset full                    # Qwen2.5-7B-Instruct，一块 24 GB 的显卡
    python qlora_trainer.py --preset full --dry_run          # 只算内存

预期输出（实测见本文件夹的 README.md）：NF4 的正确率与没有量化的 LoRA 一样，底座小到 1/7.5 以下，一步慢百分之几到一成。

参考：Dettmers et al. 2023（QLoRA）。底座（NF4Linear）在 nf4.py，LoRA 在 lora_by_hand.py。
"""

from nlp_common.base.cli import run_main

import copy
import time
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import ClassVar, Literal

import torch
from safetensors.torch import save_file
from torch import nn

from adapter_files import save_adapter
from finetune_memory import parts_of, tensor_bytes
from lora_by_hand import add_lora, lora_layers, trainable
from nf4 import BLOCK, NF4Linear, import_bitsandbytes, quantize_model
from nlp_common.base.arguments import COUNT, POSITIVE, option
from nlp_common.base.errors import UserError
from nlp_common.data.chats import to_chats
from nlp_common.draw.plots import bar_chart
from nlp_common.lm.adapters import BASE
from nlp_common.lm.chat_rows import answer_loss, chat_length, chat_row, collate
from nlp_common.lm.loading import end_chat_turns, load_tokenizer, make_fast
from nlp_common.lm.losses import count_labels
from nlp_common.tiny.judge import qa_accuracy
from nlp_common.train.chain import chain_model
from nlp_common.train.lesson import run_lesson, run_part
from nlp_common.train.loop import make_optimizer, train_loop
from nlp_common.train.settings import StageSettings, parse_settings
from nlp_common.train.splits import drop_long, load_train_and_eval
from nlp_common.train.stage import Stage
from qlora_dry_run import dry_run
from qlora_peers import BLOCK as PEER_BLOCK
from qlora_peers import copy_scales, losses, peft_model
from start import fill_in, heldout_loss, heldout_questions, load_start, names
from token_rows import train_token_rows, unseen_tokens

HOME = Path(__file__).resolve().parent
FULL_MODEL = "Qwen/Qwen2.5-7B-Instruct"
ROUNDS = 12  # 量一步的时间，几种底座轮流走几遍
PRESETS = {
    "tiny": {
        "dataset": "tiny_world",
        "max_train_samples": 3000,
        "max_length": 256,
        "per_device_train_batch_size": 8,
        "adam_beta2": 0.98,
        "bases": "none,nf4",
        "backend": "ours",
        "optimizer": "adamw",
        "n_questions": 300,
    },
    "full": {
        "dataset": "YeungNLP/firefly-train-1.1M",
        "max_train_samples": 10_000,
        "max_length": 512,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 4,
        "gradient_checkpointing": True,
        "bases": "nf4",
        "backend": "bitsandbytes",
        "optimizer": "paged_adamw_8bit",
        "n_questions": 100,
    },
}
SMALL, REAL = {"learning_rate": 1e-2}, {"learning_rate": 2e-4}  # 小世界的模型、真的模型
NAMES = {
    "none": "没有量化|not quantised",
    "nf4": "NF4",
    "fp4": "FP4",
    "int4": "int4",
}


@dataclass
class QLoRASettings(StageSettings):
    COMMON: ClassVar[dict] = StageSettings.COMMON | {"max_eval_samples": 200}

    model: str | None = option("从哪个模型开始；tiny 默认是 Qwen 链 tiny 预设的预训练模型")
    bases: str | None = option(f"底座怎样存，逗号隔开，各训练一次：{'、'.join(NAMES)}")
    backend: Literal["ours", "bitsandbytes"] | None = option(
        "四位的底座用谁的：nf4.py 的，或 bitsandbytes 的"
    )
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit"] | None = option(
        "优化器：八位的两种要 bitsandbytes；分页的在显存不够的一刻，把状态挪到内存里"
    )
    target: str = option("LoRA 装在哪里：attention、mlp、all，或逗号隔开的名字", "all")
    r: int = option("LoRA 的秩", 8, COUNT)
    alpha: float = option("LoRA 的 α；装上去的是 α/r 倍", 16.0, POSITIVE)
    double_quant: bool = option("双重量化：刻度也量化", True)
    n_questions: int | None = option("留出几道题", limits=COUNT)

    def check(self) -> None:
        super().check()
        fill_in(self, SMALL, REAL)
        wrong = [base for base in base_names(self) if base not in NAMES]
        if wrong:
            raise UserError(f"--bases 不认识 {'、'.join(wrong) or '空的'}，可以是 {'、'.join(NAMES)}。")
        if self.backend == "bitsandbytes" and "int4" in base_names(self):
            raise UserError("bitsandbytes 没有 int4：--backend ours，或 --bases nf4,fp4。")
        if self.trainer == "library":
            raise UserError("QLoRA 这一课只有看得见的训练循环：去掉 --trainer library。")
        if self.optimizer != "adamw" or self.backend == "bitsandbytes":
            import_bitsandbytes()  # 没有装，现在就说


def base_names(settings: QLoRASettings) -> list[str]:
    return names(settings.bases)


# ---------------------------------------------------------------- 1. 四位的底座，加上 LoRA


def load_base(path: str, base: str, settings, device: torch.device):
    """→ (分词器, 模型)：底座按 base 存。backend 是 bitsandbytes 时，显卡上没有量化的部分是 bfloat16。"""
    if settings.backend == "ours":
        tokenizer, model = load_start(path, device)
        if base != "none":
            quantize_model(model, base, double=settings.double_quant)
        return tokenizer, model
    from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

    half = torch.bfloat16 if device.type == "cuda" else torch.float32
    config = None
    if base != "none":
        refuse_odd_widths(AutoConfig.from_pretrained(path, trust_remote_code=False), device)
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=base,
            bnb_4bit_use_double_quant=settings.double_quant,
            bnb_4bit_compute_dtype=half,
        )
    tokenizer = load_tokenizer(path)
    model = AutoModelForCausalLM.from_pretrained(
        path, quantization_config=config, dtype=half, device_map={"": device}, trust_remote_code=False
    )
    end_chat_turns(model, tokenizer)
    return tokenizer, make_fast(model)


def refuse_odd_widths(config, device: torch.device) -> None:
    """bitsandbytes 0.50.2 在 CPU 上，矩阵的宽不是块的整数倍就还原错，训练出来没有意义：UserError。"""
    odd = sorted({width for _, width in parts_of(config).linears if width % BLOCK})
    if device.type == "cpu" and odd:
        raise UserError(
            f"bitsandbytes 在 CPU 上还原不对宽 {odd[0]} 的矩阵（要是 {BLOCK} 的倍数）：用 --backend ours，或换一个模型。"
        )


def equip(model, settings, new_tokens: list[int]):
    """装上 LoRA；new_tokens 是预训练里没有见过的 token，它们的嵌入也学（为什么见 lora_by_hand.py）。"""
    add_lora(model, settings.target, settings.r, settings.alpha)
    if new_tokens:
        train_token_rows(model, new_tokens)
    return model


def build_optimizer(model: nn.Module, settings) -> torch.optim.Optimizer:
    if settings.optimizer == "adamw":
        return make_optimizer(model, settings)
    optim = import_bitsandbytes().optim
    kind = optim.PagedAdamW8bit if settings.optimizer.startswith("paged") else optim.AdamW8bit
    parameters = [p for p in model.parameters() if p.requires_grad]
    betas = (0.9, settings.adam_beta2)
    return kind(parameters, settings.learning_rate, betas, weight_decay=settings.weight_decay)


def linear_bytes(model: nn.Module) -> int:
    """LoRA 底下的线性层占多少字节：四位的编号与刻度，或普通的权重。"""
    total = 0
    for layer in lora_layers(model).values():
        if isinstance(layer.base, NF4Linear):
            total += layer.base.four_bit().n_bytes()
            continue
        total += tensor_bytes([layer.base.weight])
        if state := getattr(layer.base.weight, "quant_state", None):  # bitsandbytes 的
            total += tensor_bytes([state.absmax])
            if state.nested:
                total += tensor_bytes([state.state2.absmax, state.offset])
    return total


# ---------------------------------------------------------------- 2. 训练一次


def train_one(part: Stage, base: str, tokenizer, model, rows: list[dict], heldout: list[dict]) -> dict:
    settings = part.settings
    lengths = [chat_length(row) for row in rows]
    pad = partial(collate, pad_id=tokenizer.pad_token_id)
    trained = train_loop(
        part,
        f"LoRA，底座 {base}",
        model,
        rows,
        pad,
        answer_loss,
        lengths,
        lengths,
        count_labels,
        build_optimizer,
    )
    still = [name for name, layer in lora_layers(model).items() if not layer.B.any()]
    if still:
        raise UserError(
            f"训练完了，{still[0]} 等 {len(still)} 层的 B 还是 0，什么也没学到："
            "多走几步（--max_steps、--max_train_samples），或加大 --learning_rate。"
        )
    metrics = {
        "heldout_loss": heldout_loss(model, tokenizer, heldout, settings.max_length),
        "linear_bytes": linear_bytes(model),
        "trainable": sum(p.numel() for p in trainable(model).values()),
        "train_seconds": trained.metrics["train_seconds"],
    }
    if settings.dataset == "tiny_world":
        metrics["qa_accuracy"] = qa_accuracy(model, tokenizer, heldout_questions(settings.n_questions))
    return metrics


def step_times(part: Stage, path: str, tokenizer, rows: list[dict]) -> dict[str, float]:
    """底座 → 一步（前向、反向）要几毫秒。几种轮流走，取中位数：机器忙闲不影响谁比谁慢。"""
    settings = part.settings
    batch = collate(rows[: settings.per_device_train_batch_size], tokenizer.pad_token_id)
    batch = {name: tensor.to(part.device) for name, tensor in batch.items()}
    models = {base: load_base(path, base, settings, part.device)[1] for base in base_names(settings)}
    times: dict[str, list[float]] = {base: [] for base in models}
    for model in models.values():
        equip(model, settings, []).train()
    for _ in range(ROUNDS):
        for base, model in models.items():
            started = time.perf_counter()
            answer_loss(model, batch)[0].backward()
            if part.device.type == "cuda":
                torch.cuda.synchronize()
            times[base].append(1000 * (time.perf_counter() - started))
    return {base: median(each[1:]) for base, each in times.items()}  # 第一次有准备的工夫，不算


def compare_with_peers(path: str, settings, device, rows) -> dict:
    """三步 AdamW 的损失，与 bitsandbytes 的 Linear4bit + PEFT 最多差多少；没有装的不比。"""
    missing = [name for name in ("bitsandbytes", "peft") if not find_spec(name)]
    if missing or device.type != "cpu" or settings.backend != "ours":
        return {}
    tokenizer, start = load_start(path, device)
    ours = copy.deepcopy(start)
    quantize_model(ours, "nf4", PEER_BLOCK, settings.double_quant)
    equip(ours, settings, [])
    theirs = peft_model(start, ours, "nf4", settings.double_quant)
    changed = copy_scales(ours, theirs) if settings.double_quant else 0
    batches = [collate(rows[i : i + 4], tokenizer.pad_token_id) for i in (0, 4, 8)]

    def mean_loss(model, batch):
        return answer_loss(model, batch)[0] / count_labels(batch)

    pair = [losses(model, batches, mean_loss, settings.learning_rate) for model in (ours, theirs)]
    worst = max(abs(a - b) for a, b in zip(*pair, strict=True))
    return {"max_difference_to_bitsandbytes": worst, "scales_rounded_otherwise": changed}


# ---------------------------------------------------------------- 3. 全课


def learn(stage: Stage, path: str, is_tiny: bool) -> dict:
    settings = stage.settings
    train_rows, heldout, data = load_train_and_eval(settings, "chats", to_chats)
    tokenizer = load_tokenizer(path)
    rows = [chat_row(tokenizer, row["messages"]) for row in train_rows]
    rows = drop_long(rows, chat_length, settings.max_length, "训练数据")
    new_tokens = unseen_tokens(tokenizer, rows) if is_tiny else []
    metrics: dict = compare_with_peers(path, settings, stage.device, rows)
    results, adapters, learners = {}, {}, {}
    for base in base_names(settings):
        torch.manual_seed(settings.seed)  # 每一种底座，A 的初值相同
        _, model = load_base(path, base, settings, stage.device)
        equip(model, settings, new_tokens)
        learned = {name.replace(".", "-"): p for name, p in trainable(model).items()}
        work = partial(train_one, base=base, tokenizer=tokenizer, model=model, rows=rows, heldout=heldout)
        results[base] = run_part(stage, base, work, nn.ParameterDict(learned))
        adapters[base] = {name: p.detach().cpu().clone() for name, p in trainable(model).items()}
        if not new_tokens:
            learners[base] = model
    if len(results) > 1:
        work = partial(step_times, path=path, tokenizer=tokenizer, rows=rows)
        for base, each in run_part(stage, "step_times", work).items():
            results[base]["step_ms"] = each
    metrics |= {"bases": results, **summary(results)}

    def save(folder: Path) -> None:
        for base, tensors in adapters.items():
            save_file(tensors, folder / f"adapter-{base}.safetensors")
        for (
            base,
            model,
        ) in learners.items():  # PEFT 的布局：lora_chat.py --adapter 读得了；记号是没有量化的底座的，这里没有
            save_adapter(folder / f"adapter-{base}", model, path, mark="")
            (folder / f"adapter-{base}" / BASE).unlink()
        draw(folder, results)

    return stage.save(metrics, data, save)


def summary(results: dict[str, dict]) -> dict:
    found: dict = {}
    for base, row in results.items():
        if "qa_accuracy" in row:
            found[f"qa_accuracy_{'lora' if base == 'none' else base}"] = row["qa_accuracy"]
    if {"none", "nf4"} <= set(results):
        none, nf4 = results["none"], results["nf4"]
        found["base_shrunk"] = none["linear_bytes"] / nf4["linear_bytes"]
        found["step_time_ratio"] = nf4["step_ms"] / none["step_ms"]
    return found


def show(metrics: dict) -> None:
    print("\n底座      线性层字节  正确率  留出损失  一步毫秒")
    for base, row in metrics["bases"].items():  # 自己的数据没有正确率，只训练一种底座不量时间
        right = f"{row['qa_accuracy']:8.3f}" if "qa_accuracy" in row else f"{'—':>8}"
        step = f"{row['step_ms']:10.1f}" if "step_ms" in row else f"{'—':>10}"
        print(f"{base:<8}{row['linear_bytes']:>12,d}{right}{row['heldout_loss']:10.4f}{step}")
    if "base_shrunk" in metrics:
        print(f"底座小到 1/{metrics['base_shrunk']:.2f}，一步是 {metrics['step_time_ratio']:.2f} 倍的时间")


def draw(folder: Path, results: dict[str, dict]) -> None:
    first = results[next(iter(results))]
    series = {
        "线性层的字节|linear bytes": {
            NAMES[b]: row["linear_bytes"] / first["linear_bytes"] for b, row in results.items()
        },
    }
    if "step_ms" in first:
        series["一步的时间|step time"] = {
            NAMES[b]: row["step_ms"] / first["step_ms"] for b, row in results.items()
        }
    if "qa_accuracy" in first:
        series["正确率|accuracy"] = {NAMES[b]: row["qa_accuracy"] for b, row in results.items()}
    bar_chart(
        folder / "qlora.svg",
        series,
        "四位的底座：省了什么，花了什么|QLoRA: saved and spent",
        "底座|base",
        "比第一种|ratio",
    )


def main(argv: list[str] | None = None) -> dict:
    settings = parse_settings(QLoRASettings, PRESETS, argv, FULL_MODEL)
    if settings.dry_run:
        return {"dry_run": dry_run(settings, base_names(settings), FULL_MODEL)}
    if settings.preset == "full" and settings.model is None:
        settings.model = FULL_MODEL
    found = chain_model("pretrain", settings.model, settings.source)
    is_tiny = found["stage"] == "pretrain"
    learn_it = partial(learn, path=found["path"], is_tiny=is_tiny)
    record = run_lesson("qlora_trainer", HOME, settings, learn_it, start=f"{found['stage']}:{found['id']}")
    show(record["metrics"])
    return record


if __name__ == "__main__":
    run_main(main)
