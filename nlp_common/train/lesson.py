"""一课的外壳：不是一个 Hugging Face 模型的结果（几个小模型、图、网页、表）也放进结果文件夹。

    def main(argv=None) -> dict:
        settings = parse_settings(CRFSettings, PRESETS, argv)
        return run_lesson("hmm_crf", HOME, settings, learn)

    def learn(stage: Stage) -> dict:            # 只在还没有同样设置的结果时才运行
        ...
        return stage.save(metrics, data, write=draw)   # draw(文件夹) 往里面画图、存权重

一课里训练几个模型，每个用 run_part 包起来：中断以后，做完的不重做。
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nlp_common.base.device import seed_everything
from nlp_common.base.errors import UserError
from nlp_common.train.settings import LessonSettings, fingerprint
from nlp_common.train.stage import Stage, open_result, show_metrics

if TYPE_CHECKING:
    import torch

WEIGHTS = "model.safetensors"


def run_lesson(
    name: str, home: Path, settings: LessonSettings, learn: Callable[[Stage], dict], **more: Any
) -> dict:
    """跑一课，返回 run.json 的内容：``home/outputs/<预设>/<name>`` 里已有同样设置的结果就直接用。

    more：设置之外决定结果的（如上游模型的编号），也记进 fingerprint。设置不同是 UserError，列出每一项不同。
    """
    if getattr(settings, "dry_run", False):
        raise UserError("这一课要训练好几个模型，没有 --dry_run：去掉它。")
    with open_result(
        result_folder(name, home, settings), name, settings, fingerprint(settings, **more)
    ) as stage:
        if stage.record is None:
            learn(stage)
            assert stage.record is not None, "learn 没有调用 stage.save"
            show_metrics(stage.record["metrics"])
            print(f"已存到 {stage.path}（{stage.record['seconds']:.0f} 秒）")
        else:
            show_metrics(stage.record["metrics"])
        return stage.record


def result_folder(name: str, home: Path, settings: LessonSettings) -> Path:
    """一课的结果放在哪里：--output_dir，没给就是 ``home/outputs/<预设>/<name>``。"""
    return Path(settings.output_dir or home / "outputs" / settings.preset / name).expanduser().resolve()


def run_part(
    stage: Stage, name: str, work: Callable[[Stage], dict], model: torch.nn.Module | None = None
) -> dict:
    """一课里的一个部分，返回 work(部分) 给出的指标；中断以前做完了的不重做，model 的权重从那时存的读回。

    部分也是一个 Stage，可以交给 train_loop；它的种子与做没做过别的部分无关。
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_model, save_model

    def write(folder: Path) -> None:
        if model is not None:
            save_model(model, str(folder / WEIGHTS))

    folder = stage.folder.work / "parts" / name
    with open_result(folder, name, stage.settings, stage.fingerprint, reuse="derived") as part:
        part.part_of(stage)
        if part.record is None:
            part.save(work(part), {}, write)
        else:
            print(f"{name}：上次中断以前做完了，直接用。")
            if model is not None:
                try:
                    load_model(model, str(folder / WEIGHTS))
                except (RuntimeError, OSError, SafetensorError) as error:
                    reason = str(error).strip().splitlines()[-1].strip()
                    raise UserError(
                        f"{name} 是上次中断以前做的，现在的代码读不回它（{reason}）：删掉 {stage.folder.work}，再运行一次。"
                    ) from None
            stage.started -= part.record["seconds"]
        assert part.record is not None
        seed_everything(stage.settings.seed)  # 后面的部分，不论这一部分是刚做的还是读回的，随机数都一样
        return part.record["metrics"]


def once(stage: Stage, name: str, work: Callable[..., Any], *given: Any) -> Any:
    """work(*given) 的结果也存成一个部分：中断以前做完了的，读回那时的。结果要能写成 JSON，元组读回来是列表。"""
    return run_part(stage, name, lambda part: {"found": work(*given)})["found"]
