"""把量化好的模型存成文件：手写的 int4（GPTQ 的布局），与 bitsandbytes 的；读回来一点不差，坏了的读不进来。

学到什么：八个四位的数怎样装进一个 int32；GPTQ 的检查点里 qweight、qzeros、scales、g_idx 各是什么；
线性层小到 1/7，嵌入不量化，所以小模型整个文件没有小那么多；存、读之后用 sha256 核对，半个文件不会被悄悄用上。

运行：
    python save_quantized.py                       # Qwen 链 tiny 预设的 SFT 模型，两种都存，读回来量
    python save_quantized.py --model smollm2       # 真的小模型
    python save_quantized.py --load outputs/tiny/save_quantized/gptq   # 只核对、读回来、量正确率
    python save_quantized.py --preset full         # Qwen1.5-0.5B-Chat

预期输出（实测见本文件夹的 README.md）：线性层小到 1/7 以下；bitsandbytes 存、读之后 logits 相差 0。

参考：Frantar et al. 2022（GPTQ；这里只用它的文件布局，取整是最近的一个）。布局与读写在 gptq_layout.py。
"""

from nlp_common.base.cli import run_main

import tempfile
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar, Literal

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from gptq_layout import WEIGHTS, check_sums, load_gptq, save_gptq, write_sums
from nf4 import BLOCK, INSTALL, import_bitsandbytes
from nlp_common.base.arguments import Limits, option
from nlp_common.base.errors import UserError
from nlp_common.base.runs import file_sha256
from nlp_common.draw.plots import bar_chart
from nlp_common.lm.loading import end_chat_turns, load_tokenizer
from nlp_common.tiny.judge import qa_accuracy
from nlp_common.train.chain import chain_model
from nlp_common.train.lesson import run_lesson
from nlp_common.train.settings import LessonSettings, parse_settings
from nlp_common.train.stage import Stage
from start import heldout_questions, load_start

HOME = Path(__file__).resolve().parent
FULL_MODEL = "Qwen/Qwen1.5-0.5B-Chat"
PRESETS = {"tiny": {"n_questions": 300}, "full": {"n_questions": 100}}


@dataclass
class SaveSettings(LessonSettings):
    COMMON: ClassVar[dict] = {}
    NOT_IN_FINGERPRINT: ClassVar[set[str]] = LessonSettings.NOT_IN_FINGERPRINT | {"load"}

    model: str | None = option("存哪个模型；默认是 Qwen 链 tiny 预设的 SFT 模型")
    source: Literal["hf", "modelscope"] = option("hub 名从哪里下载", "hf")
    group_size: int = option("几个相邻的输入共用一个刻度", 128, Limits(at_least=8))
    n_questions: int | None = option("留出几道题", limits=Limits(at_least=1))
    load: str | None = option("不存，只核对并读回这个文件夹，量正确率")


# ---------------------------------------------------------------- 1. 手写的：GPTQ 的布局


@torch.no_grad()
def logits_of(model, tokenizer) -> torch.Tensor:
    ids = tokenizer("那天傍晚，小刚去了花园。", return_tensors="pt").input_ids.to(model.device)
    return model.eval()(input_ids=ids).logits.float()


def save_ours(folder: Path, path: str, questions: list[dict], group: int, device: torch.device) -> dict:
    """存成 GPTQ 的文件夹，读回来，量。"""
    tokenizer, model = load_start(path, device)
    metrics = {}
    if questions:
        metrics["qa_accuracy_before"] = qa_accuracy(model, tokenizer, questions)
    shrunk = save_gptq(folder, model, tokenizer, group)
    back = load_gptq(folder).to(device)
    again = folder.parent / "again"
    save_gptq(again, back, tokenizer, group)  # 还原的再量化一次：应当还是同样的编号
    if questions:
        metrics["qa_accuracy_gptq"] = qa_accuracy(back, tokenizer, questions)
    difference = (logits_of(back, tokenizer) - logits_of(model, tokenizer)).abs().max().item()
    return metrics | {
        "bytes_float32": 4 * sum(p.numel() for p in model.parameters()),
        "bytes_gptq": (folder / WEIGHTS).stat().st_size,
        "linears_shrunk": min(shrunk.values()),
        "logits_difference_gptq": difference,
        "same_after_saving_again": float(file_sha256(folder / WEIGHTS) == file_sha256(again / WEIGHTS)),
    }


# ---------------------------------------------------------------- 2. bitsandbytes 的


def odd_widths(config) -> list[str]:
    """宽不是块的整数倍的线性层叫什么：bitsandbytes 0.50.2 在 CPU 上还原不对它们。"""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    linears = {n.rsplit(".", 1)[-1]: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    return sorted(name for name, linear in linears.items() if linear.in_features % BLOCK)


def save_bitsandbytes(folder: Path, path: str, questions: list[dict], device: torch.device) -> dict:
    """用 bitsandbytes 量化成 NF4，存，再读：logits 相差多少。没有装就跳过。"""
    if not find_spec("bitsandbytes"):
        print(f"没有装 bitsandbytes，跳过它的一份：{INSTALL}。")
        return {}
    import_bitsandbytes()
    from transformers import BitsAndBytesConfig

    odd = (
        odd_widths(AutoConfig.from_pretrained(path, trust_remote_code=False)) if device.type == "cpu" else []
    )
    if odd:
        print(f"bitsandbytes 在 CPU 上只会宽是 {BLOCK} 的倍数的矩阵，它的一份里 {'、'.join(odd)} 不量化。")
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        llm_int8_skip_modules=["lm_head", *odd],
    )
    placed = {"device_map": {"": device}, "dtype": torch.float32, "trust_remote_code": False}
    tokenizer = load_tokenizer(path)
    model = AutoModelForCausalLM.from_pretrained(path, quantization_config=config, **placed)
    end_chat_turns(model, tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_sums(folder)
    check_sums(folder)
    back = AutoModelForCausalLM.from_pretrained(folder, **placed)
    difference = (logits_of(model, tokenizer) - logits_of(back, tokenizer)).abs().max().item()
    metrics = {
        "bytes_bitsandbytes": (folder / WEIGHTS).stat().st_size,
        "reload_difference_bitsandbytes": difference,
    }
    if questions:
        metrics["qa_accuracy_bitsandbytes"] = qa_accuracy(back, tokenizer, questions)
    return metrics


# ---------------------------------------------------------------- 3. 全课


def learn(stage: Stage, path: str, is_chain: bool) -> dict:
    settings = stage.settings
    with tempfile.TemporaryDirectory(dir=stage.folder.work) as work:
        ours, theirs = Path(work) / "gptq", Path(work) / "bitsandbytes"
        questions = heldout_questions(settings.n_questions) if is_chain else []  # 别的模型没学过小世界
        metrics = save_ours(ours, path, questions, settings.group_size, stage.device)
        metrics |= save_bitsandbytes(theirs, path, questions, stage.device)
        metrics["whole_shrunk"] = metrics["bytes_float32"] / metrics["bytes_gptq"]
        show(metrics)

        def save(folder: Path) -> None:
            ours.rename(folder / "gptq")
            if theirs.is_dir():
                theirs.rename(folder / "bitsandbytes")
            draw(folder, metrics)

        return stage.save(metrics, {}, save)


def show(metrics: dict) -> None:
    print()
    if "qa_accuracy_before" in metrics:
        print(f"正确率：原来 {metrics['qa_accuracy_before']:.3f}，int4 {metrics['qa_accuracy_gptq']:.3f}")
    print(
        f"线性层小到 1/{metrics['linears_shrunk']:.2f}，整个文件 1/{metrics['whole_shrunk']:.2f}（嵌入没有量化）"
    )
    if "reload_difference_bitsandbytes" in metrics:
        print(f"bitsandbytes 存、读之后，logits 相差 {metrics['reload_difference_bitsandbytes']:g}")


def draw(folder: Path, metrics: dict) -> None:
    sizes = {"float32": metrics["bytes_float32"], "int4（GPTQ）|int4 (GPTQ)": metrics["bytes_gptq"]}
    if "bytes_bitsandbytes" in metrics:
        sizes["NF4（bitsandbytes）|NF4 (bitsandbytes)"] = metrics["bytes_bitsandbytes"]
    bar_chart(
        folder / "sizes.svg",
        {"文件|file": {name: size / 2**20 for name, size in sizes.items()}},
        "存下来多大|Size on disk",
        "",
        "MB",
    )


def load_only(settings) -> dict:
    """--load：核对、读回、量。"""
    folder = Path(settings.load).expanduser()
    model = load_gptq(folder)
    tokenizer = load_tokenizer_of(folder)
    end_chat_turns(model, tokenizer)
    accuracy = qa_accuracy(model, tokenizer, heldout_questions(settings.n_questions))
    print(f"{folder}：sha256 都对；正确率 {accuracy:.3f}")
    return {"qa_accuracy": accuracy}


def load_tokenizer_of(folder: Path):
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def main(argv: list[str] | None = None) -> dict:
    settings = parse_settings(SaveSettings, PRESETS, argv, FULL_MODEL)
    if settings.load:
        if settings.model:
            raise UserError("--load 只读，--model 是要存的模型：只给一个。")
        return load_only(settings)
    if settings.preset == "full" and settings.model is None:
        settings.model = FULL_MODEL
    found = chain_model("sft", settings.model, settings.source)
    name = "save_quantized" + ("_smollm2" if settings.model == "smollm2" else "")
    is_chain = (found["run"] or {}).get("data", {}).get("train", {}).get("name") == "tiny_world"
    learn_it = partial(learn, path=found["path"], is_chain=is_chain)
    return run_lesson(name, HOME, settings, learn_it, start=f"{found['stage']}:{found['id']}")


if __name__ == "__main__":
    run_main(main)
