"""训练脚本的参数与预设：哪几类脚本有哪些参数，默认值从哪里来，决定结果的是哪些。

LessonSettings          每个脚本都有的：预设、结果放哪里、种子、重做、记数
  TrainSettings         训练的：学习率、批、遍数 …
    LoopSettings        用 nlp_common/train/loop.py 训练的
    RunSettings         从一个真模型、真数据开始的（BERT 的两个脚本）
      StageSettings     两样都有：Qwen 链的各阶段
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

from nlp_common.base.arguments import option, parse_arguments
from nlp_common.base.errors import UserError
from nlp_common.base.measurements import split_prefix
from nlp_common.base.processes import num_processes, on_main
from nlp_common.base.runs import check_writable, without_password
from nlp_common.data.rows import check_data, data_sha256
from nlp_common.hub.preset import announce, choose_preset
from nlp_common.train.tracking import PLACES, check_installed

# transformers 的 get_scheduler 里，只要预热步数与总步数就能用的
SCHEDULES = (
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
)


@dataclass
class LessonSettings:
    """每个脚本都有的参数；默认是 None 的由预设补上。"""

    COMMON: ClassVar[dict] = {}  # 各预设相同的默认值
    # 这些参数不影响结果，改了也可以直接用已有的结果。
    NOT_IN_FINGERPRINT: ClassVar[set[str]] = {
        "preset",
        "output_dir",
        "source",
        "retrain",
        "dry_run",
        "record",
        "report_to",
    }

    preset: Literal["auto", "tiny", "full"] = option(
        "tiny：离线的小模型和自带的数据，CPU 几分钟；full：真模型真数据；auto：有加速器又拿得到模型才用 full",
        "auto",
    )
    output_dir: str | None = option("结果写到哪个文件夹；默认在脚本所在的文件夹里")
    retrain: bool = option("不用已有的结果，重新训练", False)
    record: str | None = option("把这次量到的数记进 docs/measurements，名字以它开头，例如 sentiment.reviews")
    seed: int = option("随机种子：同一种子，结果相同", 0)

    def check(self) -> None:
        """训练到一半才会出错的数，补上默认值之后就说：子类在这里抛出 UserError。"""


@dataclass
class TrainSettings(LessonSettings):
    """训练一个模型的参数，名字与 transformers 的 TrainingArguments 相同。"""

    max_train_samples: int | None = option("最多用多少行训练数据")
    max_length: int | None = option("每行最多多少个 token")
    per_device_train_batch_size: int | None = option("每个设备每步多少行")
    learning_rate: float | None = option("学习率的峰值")
    num_train_epochs: float | None = option("训练几遍数据")
    warmup_steps: float | None = option("学习率预热：步数，或小于 1 的比例")
    weight_decay: float | None = option("权重衰减")
    report_to: str = option(
        "训练曲线另外记到哪里：jsonl 是一个文件；tensorboard、mlflow、wandb、swanlab 要先装，默认都记在本机",
        "none",
        choices=PLACES,
    )


@dataclass
class LoopSettings(TrainSettings):
    """用看得见的训练循环（nlp_common/train/loop.py）训练的参数。"""

    COMMON: ClassVar[dict] = {
        "gradient_accumulation_steps": 1,
        "num_train_epochs": 1.0,
        "max_steps": -1,
        "warmup_steps": 0.05,
        "weight_decay": 0.0,
        "adam_beta2": 0.999,
        "max_grad_norm": 1.0,
        "lr_scheduler_type": "linear",
        "gradient_checkpointing": False,
        "dataloader_num_workers": 0,
        "logging_steps": 10,
        "save_steps": 100,
    }
    NOT_IN_FINGERPRINT: ClassVar[set[str]] = LessonSettings.NOT_IN_FINGERPRINT | {
        "logging_steps",
        "save_steps",
    }

    gradient_accumulation_steps: int | None = option("累积几步的梯度再更新一次")
    max_steps: int | None = option("最多更新几步；-1 表示由 num_train_epochs 决定")
    adam_beta2: float | None = option("Adam 二阶矩的衰减：步数少时取小些，跟得上梯度的变化")
    max_grad_norm: float | None = option("梯度裁剪的范数")
    lr_scheduler_type: str | None = option("学习率曲线", choices=SCHEDULES)
    gradient_checkpointing: bool | None = option("用时间换显存：反向时重算激活")
    dataloader_num_workers: int | None = option("读数据的进程数")
    logging_steps: int | None = option("每几步记一次 loss")
    save_steps: int | None = option("每几步存一个检查点，中断后从它继续")


@dataclass
class RunSettings(TrainSettings):
    """从一个真模型、真数据开始的训练。"""

    model: str | None = option("从哪个模型开始：hub 名或本地文件夹")
    dataset: str | None = option("训练数据：内置名、hub 名、本地文件夹或 json/jsonl/csv/tsv/parquet/txt 文件")
    source: Literal["hf", "modelscope"] = option("hub 名从哪里下载", "hf")
    dry_run: bool = option("只估算要多少内存、多少步、多久，不下载权重也不训练", False)


@dataclass
class StageSettings(RunSettings, LoopSettings):
    """语言模型各阶段共有的参数。"""

    COMMON: ClassVar[dict] = LoopSettings.COMMON | {"max_eval_samples": 500, "trainer": "loop"}
    NOT_IN_FINGERPRINT: ClassVar[set[str]] = LoopSettings.NOT_IN_FINGERPRINT | {"show_batch", "verify"}

    model: str | None = option("从哪个模型开始：hub 名、本地文件夹或 smollm2；默认是上一阶段的结果")
    eval_dataset: str | None = option(
        "留出数据，写法同 --dataset；默认用数据集自带的，没有就从训练数据里分出来"
    )
    output_dir: str | None = option("结果写到哪个文件夹；默认 outputs/<预设>/<阶段>，在脚本所在的文件夹里")
    verify: bool = option("核对下载的模型：每个文件的大小和哈希与服务器上的一不一样", False)
    max_eval_samples: int | None = option("留出数据最多用多少行")
    max_length: int | None = option("每行最多多少个 token；更长的行不用，并报告有几行")
    trainer: Literal["loop", "library"] | None = option(
        "loop：看得见的训练循环（nlp_common/train/loop.py，默认）；library：库自带的训练器，训练同样的行"
    )

    def check(self) -> None:
        for name in ("per_device_train_batch_size", "gradient_accumulation_steps", "max_length"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} 要是正整数，给的是 {getattr(self, name)}。")
        check_data(self.eval_dataset, "--eval_dataset")

    def check_loop_only(self) -> None:
        """没有库自带的训练器可比的脚本，在 check 里调用。"""
        if self.trainer == "library":
            raise UserError(
                "--trainer library 只有预训练、SFT、奖励模型、DPO 有；这个脚本用看得见的循环，去掉它。"
            )


S = TypeVar("S", bound=LessonSettings)  # 各脚本自己的设置
_announced = ContextVar("announced", default=False)


@contextlib.contextmanager
def preset_announced() -> Iterator[None]:
    """已经说过用了哪个预设：在这里面运行的阶段不再各说一遍。"""
    token = _announced.set(True)
    try:
        yield
    finally:
        _announced.reset(token)


def parse_settings(
    settings_class: type[S], presets: dict[str, dict], argv: list[str] | None, full_model: str | None = None
) -> S:
    """命令行 → 设置：先选预设（第一行就说选了哪个、为什么），再把没给的参数用预设补上，然后检查。

    full_model 是 full 预设从哪个模型开始；没有，full 就只是大些的设置。
    """
    settings = parse_arguments(settings_class, argv)
    choice = on_main(
        lambda: choose_preset(
            settings.preset,
            getattr(settings, "model", None),
            full_model=full_model,
            needs_accelerator=True,
            source=getattr(settings, "source", "hf"),
        )
    )
    if not _announced.get():
        print(announce(choice))
    settings.preset = choice.preset
    for name, value in (settings.COMMON | presets[choice.preset]).items():
        if getattr(settings, name) is None:
            setattr(settings, name, value)
    settings.check()
    check_installed(getattr(settings, "report_to", "none"))
    if settings.record:
        split_prefix(settings.record)  # 写错了就说
    if settings.output_dir:
        check_writable(Path(settings.output_dir).expanduser())
    check_data(getattr(settings, "dataset", None))
    return settings


def as_told(settings: LessonSettings) -> dict:
    """各项设置，记下来、印出来的样子：网址里的密码换成 ***。"""
    values = dataclasses.asdict(settings)
    return {k: without_password(v) if isinstance(v, str) else v for k, v in values.items()}


def fingerprint(settings: LessonSettings, **more: Any) -> dict:
    """决定结果的一切：设置、本地数据的内容、进程数，以及 more（如上游模型的编号）。"""
    values = {k: v for k, v in as_told(settings).items() if k not in settings.NOT_IN_FINGERPRINT}
    for name in ("dataset", "eval_dataset", "third_dataset", "reward_file"):
        if sha256 := data_sha256(values.get(name)):
            values[f"{name}_sha256"] = sha256
    if num_processes() > 1:  # 一步多少行，要乘上它
        values["num_processes"] = num_processes()
    return values | more
