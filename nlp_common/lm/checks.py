"""载入模型时的检查：这里能不能用它，权重是不是个个对得上。Qwen 一类与 BERT 共用。

对不上的权重，库会用随机数补上，只在屏幕上印一张英文的表，训练照常进行；这里一律停下来，说出是哪几个。
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, GenerationConfig
from transformers import __version__ as TRANSFORMERS
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from nlp_common.base.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

OTHER = "请用 --model 换一个模型"
# 训练时的包装留在权重名字里的前缀：torch.compile、FSDP、重算激活；后三种只在开头
WRAPPERS = r"(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
LEADING = ("module.", "_forward_module.", "base_model.model.")
# 旧版本存下来、现在用不着的，缺了、多了都不要紧
BUFFERS = re.compile(r"(position_ids|inv_freq|masked_bias|attn\.bias|attention\.bias)$")
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")


@contextlib.contextmanager
def readable_errors(path: str) -> Iterator[None]:
    """文件坏了、不是模型：各个库的异常类型都不同，一律说成读者能照着做的话。"""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(
            f"载入 {path} 失败：{reason}\n如果是从 hub 下载的，加 --verify 看是哪个文件坏了；"
            "如果是自己复制来的，重新复制一遍，或用 --model 换一个模型。"
        ) from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """里面的英文警告不显示：该说的由这里的检查来说。"""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


# ---------------------------------------------------------------- 载入之前：看 config.json


def config_of(path: str | Path) -> dict:
    """文件夹里的 config.json；path 是 hub 名、还不是文件夹时是空的。"""
    file = Path(path) / "config.json"
    if not file.is_file():
        return {}
    try:
        config = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{file} 坏了，读不出来（{error}）。请重新复制或下载它，或用 --model 换一个。"
        ) from error
    return config if isinstance(config, dict) else {}


def check_config(path: str | Path) -> dict:
    """量化过的、要运行文件夹里的代码的、这个版本不认识的结构，都是 UserError；能用就返回配置。"""
    config = config_of(path)
    kind = str(config.get("model_type") or "")
    if method := _quantization(config):
        raise UserError(
            f"{path} 是量化过的模型（{method}），权重压成了低精度的整数，这里读不了也训练不了："
            "请换成没有量化的原模型（名字里不带 GPTQ、AWQ、Int4、4bit、FP8 的那个）。"
        )
    if kind and kind not in CONFIG_MAPPING_NAMES:
        if config.get("auto_map"):
            raise UserError(
                f"{path} 的结构 {kind} 要运行文件夹里自带的代码（config.json 的 auto_map）才能用，"
                f"出于安全，这里从不运行别人的代码。{OTHER}，例如 Qwen/Qwen1.5-0.5B。"
            )
        raise UserError(
            f"装着的 transformers {TRANSFORMERS} 不认识 {path} 的结构 {kind}：它可能比这个版本新，"
            f"先 pip install -U transformers 再试；还不行，{OTHER}。"
        )
    name = _architecture(config)
    if "vision_config" in config or "VL" in name or "Vision" in name or "vl" in kind.split("_"):
        raise UserError(
            f"{path} 是看图的模型（{name or kind}，视觉语言模型），这里只用文字：请换成它的纯文字版，或{OTHER[1:]}。"
        )
    return config


def _architecture(config: dict) -> str:
    """例如 Qwen2ForCausalLM；没有写是空的。"""
    names = config.get("architectures")
    return str(names[0]) if isinstance(names, list) and names else ""


def _quantization(config: dict) -> str | None:
    """量化的方法，没有量化是 None；"quantization" 是 MLX 的写法。"""
    found = config.get("quantization_config") or config.get("quantization")
    if not isinstance(found, dict) or not found:
        return None
    name = str(found.get("quant_method") or "")
    if not name:
        name = "bitsandbytes" if found.get("load_in_4bit") or found.get("load_in_8bit") else "方法没有写明"
    bits = found.get("bits") or found.get("w_bit")
    if found.get("load_in_4bit"):
        bits = 4
    if found.get("load_in_8bit"):
        bits = 8
    return f"{name}，{bits} 位" if bits else name


def check_decoder(path: str | Path, scores: bool = False) -> None:
    """不是自回归的语言模型（只会填空的、编码器—解码器）就是 UserError；scores 时，换了打分头的也可以。"""
    config = check_config(path)
    name, kind = _architecture(config), config.get("model_type")
    if not scores and ("Classification" in name or "RewardModel" in name):
        raise UserError(f"{path} 是 {name}：只会打分，不会说话。{OTHER}。")
    if "MaskedLM" in name or "PreTraining" in name:
        raise UserError(
            f"{path} 是 {name}：BERT 一类，只会填空，不会接着写。{OTHER}，例如 Qwen/Qwen1.5-0.5B。"
        )
    if "ConditionalGeneration" in name or config.get("is_encoder_decoder"):
        raise UserError(f"{path} 是 {name or kind}：不是只有解码器的语言模型，这里用不了。{OTHER}。")
    if kind and kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UserError(
            f"{path} 是 {name or kind}：不是会接着写的语言模型。{OTHER}，例如 Qwen/Qwen1.5-0.5B。"
        )


def check_scores(path: str | Path, flag: str) -> None:
    """奖励模型没有训练好的打分头是 UserError：头会是随机的，照它的分训练没有意义。"""
    name = _architecture(check_config(path))
    if name and "Classification" not in name:
        raise UserError(
            f"{flag} 给的 {path} 是 {name}，没有训练好的打分头，不是奖励模型：请给 reward_model.py 训练出来的文件夹。"
        )


# ---------------------------------------------------------------- 载入，并核对每一个权重


def load_weights(
    model_class: Any, path: str | Path, new: tuple[str, ...] = (), **options: Any
) -> tuple[PreTrainedModel, list[str]]:
    """``from_pretrained``，加上核对 → (float32 的模型, 新初始化的参数名)。

    new：名字以它们开头的可以是新的（换上的分类层）；别的缺了、形状不对、多出一层，都是 UserError。
    """
    _check_generation_file(path)
    prefixes = wrapping_prefixes(path)
    with readable_errors(str(path)), quiet():
        source: Any = path
        if prefixes:  # 权重由这里读好、改好名字；库自己的 key_mapping 存盘时会把前缀又加回去
            options["config"] = _config_for(path, options)
            options["state_dict"] = _without_prefixes(path, prefixes)
            source, model_class = None, _concrete(model_class, options["config"])
        model, info = model_class.from_pretrained(
            source,
            dtype=torch.float32,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # 不让它报一屏英文，形状不对的在下面说
            output_loading_info=True,
            **options,
        )
        if prefixes and (Path(path) / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(path)
    mismatched = {name: (tuple(saved), tuple(wanted)) for name, saved, wanted in info["mismatched_keys"]}
    missing = sorted(name for name in info["missing_keys"] if not BUFFERS.search(name))
    unexpected = sorted(name for name in info["unexpected_keys"] if not BUFFERS.search(name))
    fresh = [name for name in [*missing, *mismatched] if name.startswith(new)] if new else []
    faults = []
    if absent := [name for name in missing if name not in fresh]:
        faults.append(f"缺 {_some(absent)}")
    wrong = [name for name in mismatched if name not in fresh]
    if wrong:
        saved, wanted = mismatched[wrong[0]]
        faults.append(f"形状不对的 {_some(wrong)}（文件里 {saved}，模型要 {wanted}）")
    inside = f"{model.base_model_prefix}." if model.base_model_prefix else "model."
    extra = [name for name in unexpected if name.startswith(inside) or re.search(r"\.\d+\.", name)]
    if extra or (faults and unexpected):
        faults.append(f"多出 {_some(extra or unexpected)}")
    if faults:
        tied = ""
        if absent == ["lm_head.weight"]:
            tied = "（如果它本来就与嵌入共用，把 config.json 里的 tie_word_embeddings 改成 true）"
        raise UserError(
            f"{path} 的权重和 config.json 写的 {type(model).__name__} 对不上：{'；'.join(faults)}{tied}。"
            f"缺的会变成随机数，所以不用它。请换成配套的 config.json 与权重，或{OTHER[1:]}。"
        )
    check_numbers(model, path)
    clean_generation(model)
    return model, fresh


def wrapping_prefixes(path: str | Path) -> list[str]:
    """权重名字里训练时的包装留下的前缀（正则式）；没有的是空的。没有合并的 LoRA 是 UserError。"""
    names = _weight_names(Path(path))
    if any("lora_A" in name or "lora_B" in name for name in names):
        raise UserError(
            f"{path} 的权重里有没有合并的 LoRA（名字带 lora_A）：请先合并（peft 的 merge_and_unload）再存成文件夹；"
            "手里是适配器文件夹的，python lora_finetune/merge_lora.py --adapter 适配器 --export 新文件夹。"
        )
    prefixes = []
    if any(re.search(WRAPPERS, name) for name in names):
        prefixes.append(WRAPPERS)
    bare = [re.sub(WRAPPERS, "", name) for name in names]
    for prefix in LEADING:
        if bare and all(name.startswith(prefix) for name in bare):
            prefixes.append("^" + re.escape(prefix))
    if prefixes:
        print(f"{path} 的权重名字带着训练时的包装（{names[0]}），去掉前缀再读。")
    return prefixes


def _without_prefixes(path: str | Path, prefixes: list[str]) -> dict[str, torch.Tensor]:
    """去掉了前缀的权重。"""
    from safetensors.torch import load_file

    weights = {}
    for file in _weight_files(Path(path)):
        for name, value in load_file(file).items():
            for prefix in prefixes:
                name = re.sub(prefix, "", name)
            weights[name] = value
    return weights


def _config_for(path: str | Path, options: dict) -> PreTrainedConfig:
    """载入要用的配置；options 里改配置的几项（id2label 等）从中取走。"""
    if "config" in options:
        return options["config"]
    changes = {name: options.pop(name) for name in list(options) if name != "attn_implementation"}
    return AutoConfig.from_pretrained(path, trust_remote_code=False, **changes)


def _concrete(model_class: Any, config: PreTrainedConfig) -> Any:
    """AutoModelForCausalLM 这样的，换成这份配置的那个类：给 state_dict 时要用它。"""
    mapping = getattr(model_class, "_model_mapping", None)
    return mapping[type(config)] if mapping else model_class


def _weight_files(folder: Path) -> list[Path]:
    """from_pretrained 会读的 safetensors：一个，或索引里写的几片。"""
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    return sorted(folder.glob("model-*.safetensors"))


def _weight_names(folder: Path) -> list[str]:
    """文件夹里全部权重的名字；只读文件头。"""
    from safetensors import safe_open

    names: list[str] = []
    for file in _weight_files(folder):
        with readable_errors(str(folder)), safe_open(file, framework="np") as opened:
            names += opened.keys()
    return names


def _some(names: Iterable[str], most: int = 3) -> str:
    names = list(names)
    shown = "、".join(names[:most])
    return f"{shown} 等 {len(names)} 个" if len(names) > most else shown


def check_numbers(model: PreTrainedModel, path: str | Path) -> None:
    """权重里有 NaN 或无穷大是 UserError：算出来的全是 NaN。"""
    bad = []
    for name, value in model.named_parameters():
        value = value.detach()
        if torch.isfinite(value.sum()):  # 求和很快；和是有限的，就个个有限
            continue
        if not torch.isfinite(value).all():
            bad.append(name)
    if bad:
        raise UserError(
            f"{path} 的权重里有 NaN 或无穷大（{_some(bad)}），算出来的都没有意义：它训练时已经发散了，"
            f"请用更早的检查点，或{OTHER[1:]}。"
        )


def _check_generation_file(path: str | Path) -> None:
    """generation_config.json 坏了、或者库根本不肯读的，载入之前就说。"""
    if not (Path(path) / "generation_config.json").is_file():
        return
    try:
        with quiet():
            GenerationConfig.from_pretrained(path)
    except (ValueError, OSError, TypeError) as error:
        raise UserError(
            f"{path} 的 generation_config.json 里的设置自相矛盾或坏了（{' '.join(str(error).split())[:200]}）："
            "它只管怎样生成，删掉这个文件再运行同一条命令就行。"
        ) from error


def clean_generation(model: PreTrainedModel) -> None:
    """generation_config.json 自相矛盾时，库要到存盘那一步才报错，训练就白做了：在这里改好。"""
    config = getattr(model, "generation_config", None)
    if config is None or _valid(config):
        return
    removed = []
    if not config.do_sample:
        for name in SAMPLING:
            if getattr(config, name, None) is not None:
                setattr(config, name, None)
                removed.append(name)
    if _valid(config):
        print(f"（generation_config.json 里 do_sample 是 false，{'、'.join(removed)} 用不着，去掉了。）")
        return
    model.generation_config = GenerationConfig.from_model_config(model.config)
    print("（generation_config.json 里的设置自相矛盾，不用它，换成默认的。）")


def _valid(config: GenerationConfig) -> bool:
    try:
        config.validate(strict=True)
    except ValueError:
        return False
    return True


# ---------------------------------------------------------------- 分词器


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, path: str | Path) -> None:
    """词表里只有控制符：分词器的文件没有一起复制过来，库却造了一个空的。"""
    words = set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens)
    if not words:
        raise UserError(
            f"{path} 里没有分词器的文件（tokenizer.json，或 vocab.json 与 merges.txt，或 vocab.txt）："
            "请从原模型的文件夹把它们（连同 tokenizer_config.json）一起复制过来。"
        )


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: str | Path) -> None:
    """分词器的编号超出嵌入的行数是 UserError：用到那个 token 时才会出错。"""
    largest = max(tokenizer.get_vocab().values())
    rows = model.get_input_embeddings().num_embeddings
    if largest >= rows:
        raise UserError(
            f"{path} 的分词器有 {largest + 1} 个 token，模型的嵌入只有 {rows} 行，后面的 token 没有嵌入："
            f"分词器多半加过词，或是另一个模型的；请换成配套的分词器，或{OTHER[1:]}。"
        )
