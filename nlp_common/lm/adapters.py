"""适配器（PEFT 存的文件夹）：认得出、查得出坏在哪里，接到模型上。聊天的脚本与 lora_finetune 用它。

一个适配器文件夹是 adapter_config.json（接在哪个模型上、接在哪几层、r 与 α）加 adapter_model.safetensors（各层的 A、B）。
我们存的还有 base.json：原模型权重的记号。形状相同、权重不同的两个模型，只有它分得清。
"""

from __future__ import annotations

import copy
import hashlib
import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nlp_common.base.errors import UserError
from nlp_common.base.runs import whole_safetensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONFIG, WEIGHTS, BASE = "adapter_config.json", "adapter_model.safetensors", "base.json"
PREFIX = "base_model.model."  # PEFT 存的名字比模型里的多这一段
INSTALL = "pip install peft"


# ---------------------------------------------------------------- 给了哪几个，各是什么


def name_adapters(given: list[str] | None) -> dict[str, Path]:
    """``--adapter 文件夹`` 或 ``--adapter 名字=文件夹``，可以给几次 → {名字: 文件夹}；名字默认是文件夹的。

    两个同名是 UserError。
    """
    found: dict[str, Path] = {}
    for each in given or []:
        name, mark, rest = each.partition("=")
        named = bool(mark) and not Path(each).expanduser().exists()
        folder = Path(rest if named else each).expanduser()
        name = name if named else folder.resolve().name
        if name in found:
            raise UserError(
                f"两个适配器都叫 {name}（{found[name]}、{folder}），分不清要换成哪个：给一个另起名字，"
                f"例如 --adapter {name}2={folder}。"
            )
        found[name] = folder
    return found


def read_adapter(folder: Path) -> dict:
    """adapter_config.json 的内容。不是适配器、只写了一半、不是 LoRA 一类的，都是 UserError。"""
    if not folder.is_dir():
        raise UserError(f"没有适配器文件夹 {folder}：请检查 --adapter 的写法。")
    if not (folder / CONFIG).is_file():
        if (folder / "config.json").is_file():
            raise UserError(f"{folder} 是完整的模型，不是适配器：请用 --model {folder}。")
        inside = sorted(path.parent for path in folder.glob(f"*/{CONFIG}"))
        hint = f"适配器在它里面，例如 --adapter {inside[0]}" if inside else "请给训练时存下的那个文件夹"
        raise UserError(f"{folder} 里没有 {CONFIG}，不是适配器文件夹：{hint}。")
    again = "多半是存到一半、复制到一半就断了，请重新复制或重新训练它"
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        kind = str(config["peft_type"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"适配器 {folder} 不完整：{CONFIG} 读不出来（{type(error).__name__}），{again}。"
        ) from error
    if kind.upper() != "LORA":
        raise UserError(f"适配器 {folder} 是 {kind}，这里只接得上 LoRA：别的请用 peft 自己载入。")
    if not (folder / WEIGHTS).is_file() and (folder / "adapter_model.bin").is_file():
        raise UserError(
            f"适配器 {folder} 的权重是 adapter_model.bin，pickle 格式，出于安全不读：请换成 safetensors 的。"
        )
    if not whole_safetensors(folder / WEIGHTS):
        raise UserError(f"适配器 {folder} 不完整：{WEIGHTS} 缺失或没写完，{again}。")
    return config


def base_of(folder: Path) -> str:
    """适配器接在哪个模型上（hub 名或文件夹）；没有写、写的文件夹不在了，是 UserError。"""
    name = read_adapter(folder).get("base_model_name_or_path")
    if not name:
        raise UserError(f"适配器 {folder} 没有写它接在哪个模型上：请用 --model 写明原来的模型。")
    if Path(name).is_absolute() and not Path(name).is_dir():
        raise UserError(
            f"适配器 {folder} 接在 {name} 上，那个文件夹不在了（搬走了？）：请用 --model 写明它现在在哪里。"
        )
    return str(name)


# ---------------------------------------------------------------- 与模型配不配


def weights_mark(model: PreTrainedModel) -> str:
    """权重的记号：每个参数挑 16 个数算的 sha256，几毫秒；同样形状的两个模型，训练过的一步也分得清。"""
    digest = hashlib.sha256()
    for name, value in model.named_parameters():
        flat = value.detach().flatten()
        picked = flat[:: max(1, len(flat) // 16)][:16].float().cpu()
        digest.update(name.encode() + picked.numpy().tobytes())
    return digest.hexdigest()[:16]


def write_base(folder: Path, base: str, mark: str) -> None:
    """记下原模型：名字写进 PEFT 的 adapter_config.json，权重的记号写进 base.json。"""
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = base
    (folder / CONFIG).write_text(json.dumps(config, ensure_ascii=False, indent=2), encoding="utf-8")
    (folder / BASE).write_text(json.dumps({"model": base, "weights_mark": mark}, ensure_ascii=False), "utf-8")


def check_base(folder: Path, model: PreTrainedModel, base: str) -> None:
    """适配器是不是 model 的（base 是它的名字，报错用）：层不在、缺了层、形状不对、权重的记号不同，都是 UserError。"""
    from safetensors import safe_open
    from torch import nn

    config = read_adapter(folder)
    said = config.get("base_model_name_or_path") or "另一个模型"
    mend = f"请用 --model {said}（它原来的模型）" if said != base else "请找到训练它时的那个模型"
    linears: dict[str, Any] = dict(model.named_modules())
    there = set()
    with safe_open(folder / WEIGHTS, framework="pt") as opened:
        for key in opened.keys():  # noqa: SIM118 （它不是字典）
            module, found, side = key.removeprefix(PREFIX).partition(".lora_")
            if not found or side not in ("A.weight", "B.weight"):
                continue
            shape = tuple(opened.get_slice(key).get_shape())
            weight = getattr(linears.get(module), "weight", None)
            if weight is None:
                raise UserError(f"适配器 {folder} 不是 {base} 的：这个模型里没有 {module}；{mend}。")
            there.add(module)
            place = 1 if side == "A.weight" else 0
            if shape[place] != weight.shape[place]:
                raise UserError(
                    f"适配器 {folder} 不是 {base} 的：{module} 的 {side[0]} 是 {shape}，"
                    f"模型那里是 {tuple(weight.shape)}；{mend}。"
                )
    targets = config.get("target_modules")
    if isinstance(targets, list) and not (config.get("layers_to_transform") or config.get("exclude_modules")):
        for name, module in linears.items():
            wanted = any(f".{name}".endswith(f".{target}") for target in targets)
            if wanted and isinstance(module, nn.Linear) and name not in there:
                raise UserError(
                    f"适配器 {folder} 不完整：{WEIGHTS} 里缺 {name} 的 A、B，请重新复制或重新训练它。"
                )
    if (folder / BASE).is_file():
        mark = _mark_in(folder)
        if mark and mark != weights_mark(model):
            raise UserError(
                f"适配器 {folder} 不是 {base} 的：形状相同，权重却不是训练它时的那一份；{mend}，或重新训练适配器。"
            )
    elif Path(said).name != Path(base).name:
        print(f"（适配器 {folder.name} 说它接在 {said} 上，这里接到 {base}：形状对得上，答得怎样要自己看。）")


def _mark_in(folder: Path) -> str:
    """base.json 里原模型的记号；读不出来是 UserError。"""
    try:
        return json.loads((folder / BASE).read_text(encoding="utf-8"))["weights_mark"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"适配器 {folder} 不完整：{BASE} 读不出来（{type(error).__name__}），请重新复制它；"
            f"确定原模型没有弄错，也可以删掉 {BASE}。"
        ) from error


# ---------------------------------------------------------------- 接上去


def shared_copy(model: PreTrainedModel) -> PreTrainedModel:
    """另一套层，权重还是同一份：几个适配器各接一套，互不相干，不多占内存。"""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def attach(model: PreTrainedModel, folder: Path, base: str) -> PreTrainedModel:
    """把适配器接到 model 上（改的就是 model），返回它，不训练；不是它的、缺几个权重是 UserError。"""
    peft: Any = require_peft()
    check_base(folder, model, base)
    try:
        wrapped = peft.PeftModel.from_pretrained(model, str(folder))
    except (RuntimeError, ValueError, TypeError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"适配器 {folder} 接不到 {base} 上（{reason}）：请用训练它时的模型与 peft 版本。"
        ) from error
    # save_embedding_layers=False：不然它要上网去看原模型的词表大小
    expected = set(peft.get_peft_model_state_dict(wrapped, save_embedding_layers=False))
    if lost := sorted(expected - _names(folder)):
        raise UserError(
            f"适配器 {folder} 不完整：{WEIGHTS} 里缺 {lost[0].removeprefix(PREFIX)} 等 {len(lost)} 个权重，"
            "请重新复制或重新训练它。"
        )
    return wrapped.get_base_model()


def _names(folder: Path) -> set[str]:
    from safetensors import safe_open

    with safe_open(folder / WEIGHTS, framework="np") as opened:
        return set(opened.keys())


def require_peft() -> Any:
    """peft 这个库；没有装是 UserError，写明怎样装。"""
    try:
        import peft
    except ImportError as error:
        raise UserError(f"适配器要用到 peft。请运行：{INSTALL}（{error}）") from error
    # peft 0.21 里还是 transformers 5.23 改名以前的写法：只这一条不显示
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
    return peft
