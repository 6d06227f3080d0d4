"""试用训练好的模型：参数、找到某个阶段的结果、载入。chat.py 与 test_*.py 用它，这里不训练。"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from chain import FOLDERS, HOME, MODELS, SCRIPTS
from nlp_common.base.arguments import option
from nlp_common.base.device import describe
from nlp_common.base.errors import UserError
from nlp_common.base.runs import run_record
from nlp_common.hub.models import find_model, require_model
from nlp_common.lm.speaker import Speaker, load_speaker

with contextlib.suppress(ImportError):  # Windows 没有
    import readline  # noqa: F401  导入即生效：上下键翻旧话、退格能删整个汉字

# ---------------------------------------------------------------- 参数


@dataclass
class SpeakSettings:
    """chat.py 与 test_*.py 共有的参数；默认值是 None 的，选定预设之后再补上。"""

    preset: Literal["auto", "tiny", "full"] = option(
        "用哪一组训练结果：outputs/tiny 或 outputs/full；auto：有 full 的就用 full，没有就用 tiny", "auto"
    )
    model: str | None = option("不用训练结果，改用这个模型：本地文件夹、hub 名或 smollm2")
    output_root: str | None = option("各阶段的结果所在的文件夹；默认 outputs/<预设>，在脚本所在的文件夹里")
    source: Literal["hf", "modelscope"] = option("hub 名从哪里下载", "hf")
    verify: bool = option("核对下载的模型：每个文件的大小和哈希与服务器上的一不一样", False)
    max_new_tokens: int | None = option("一次最多生成多少个 token；默认由预设定，下面两个也是")
    temperature: float | None = option("采样温度：0 是贪心（每次都选最可能的），越大越随意")
    top_p: float | None = option("核采样：只在概率和刚够 top_p 的那些 token 里选；1 是不限制")
    seed: int = option("随机种子：同一种子，结果相同；tiny 的题目也由它决定", 0)

    def __post_init__(self) -> None:
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise UserError(f"--max_new_tokens 要是正整数，给的是 {self.max_new_tokens}。")
        if self.temperature is not None and self.temperature < 0:
            raise UserError(f"--temperature 不能是负数，给的是 {self.temperature}。")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"--top_p 要大于 0、不超过 1，给的是 {self.top_p}。")


@dataclass
class AskSettings(SpeakSettings):
    questions: list[str] | None = field(
        default=None, metadata={"help": '问什么，可以有几个：--questions "你好" "你是谁？"', "nargs": "+"}
    )
    file: str | None = option("从文件读问题：UTF-8，一行一个；可以与 --questions 一起用")


# ---------------------------------------------------------------- 找到训练结果


@dataclass(frozen=True)
class Results:
    """选定的一组结果：预设，base、sft、dpo、ppo → 模型的路径（只有已经训练好的），以及 --model 给的模型。

    适配器也在 paths 里；adapters 是它接在哪一个上。
    """

    preset: str
    paths: dict[str, str]
    given: str | None = None
    adapters: dict[str, str] = field(default_factory=dict)

    def title(self, name: str) -> str:
        """打印时叫它什么。--model 给的不知道是训练到哪一步的，就用它自己的名字；适配器也是。"""
        if name in self.adapters:
            return name
        return Path(self.given).name if self.given else MODELS[name]


def find_results(
    settings: SpeakSettings,
    names: list[str],
    defaults: dict[str, dict],
    needed: Callable[[Iterable[bool]], bool] = all,
) -> Results:
    """选定预设、找到各个模型，并用 defaults[预设] 补上没给的参数。第一行就打印用的是哪个、为什么。

    与训练脚本不同，auto 不看有没有加速器：这里只推理，有哪一组结果就用哪一组，先看 full。
    needed：``all`` 要求 names 都训练好了，``any`` 只要有一个；不满足是 UserError，写明该运行什么。
    给了 --model 时，它顶替 names 的最后一个，不再找别的。
    """
    presets = ["full", "tiny"] if settings.preset == "auto" else [settings.preset]
    roots = [HOME / "outputs" / preset for preset in presets]
    why = f"你给了 --preset {settings.preset}"
    if settings.output_root:
        roots = [Path(settings.output_root).expanduser().resolve()]
        why = f"你给了 --output_root {settings.output_root}"
    if settings.model:
        paths = {names[-1]: require_model(settings.model, settings.source, settings.verify)}
        why = f"你给了 --model {settings.model}"
    else:
        found = [(root, _trained(root, names)) for root in roots]
        root, paths = next(((r, p) for r, p in found if needed(n in p for n in names)), (None, {}))
        if root is None:
            raise UserError(_how_to_train(settings, names, found, needed))
        if settings.preset == "auto" and not settings.output_root:
            why = f"{short(root)} 里有训练好的模型" + (
                "" if root == roots[0] else f"，{short(roots[0])} 里还没有"
            )
    preset = settings.preset if settings.preset != "auto" else _trained_with(next(iter(paths.values())))
    kind, other = ("小世界的小模型", "full") if preset == "tiny" else ("真实模型", "tiny")
    switch = "" if settings.model or settings.output_root else f"要换另一组，加 --preset {other}。"
    print(f"预设 {preset}（{kind}）：{why}。{switch}")
    for name, value in defaults[preset].items():
        if getattr(settings, name) is None:
            setattr(settings, name, value)
    return Results(preset, paths, settings.model)


def _trained(root: Path, names: list[str]) -> dict[str, str]:
    return {name: str(root / FOLDERS[name]) for name in names if (root / FOLDERS[name]).is_dir()}


def _how_to_train(settings: SpeakSettings, names: list[str], found: list[tuple], needed) -> str:
    absent = [name for name in names if not any(name in paths for _, paths in found)] or names
    places = "、".join(short(root / FOLDERS[name]) for root, _ in found for name in absent)
    script = SCRIPTS[FOLDERS[absent[-1] if needed is all else "sft"]]
    lines = []
    if settings.preset != "full":
        lines.append("python run_all.py --preset tiny    （离线，CPU 上几分钟，训练整条链）")
        lines.append(f"python {script} --preset tiny    （只训练到这一步，缺的前几步会自动补上）")
    if settings.preset != "tiny":
        lines.append(f"python {script} --preset full    （真实模型，需要加速器）")
    steps = "\n  ".join(lines)
    return f"还没有训练好的模型：{places} 不存在。先在 {HOME} 里运行其中一条：\n  {steps}\n或者用 --model 指定一个模型。"


def short(path: str | Path) -> str:
    """给人看的路径：脚本文件夹里的只写相对的一段，其余原样。"""
    return str(Path(path).relative_to(HOME)) if Path(path).is_relative_to(HOME) else str(path)


def _trained_with(path: str) -> str:
    """训练它用的是哪个预设；不是我们训练的当作 full。"""
    return run_record(path).get("settings", {}).get("preset", "full")


def with_adapters(results: Results, folders: dict[str, Path], base: str) -> Results:
    """results 加上几个适配器，都接在 base 上；与某个模型同名是 UserError。"""
    if both := [name for name in folders if name in results.paths or name in MODELS]:
        folder = folders[both[0]]
        raise UserError(
            f"适配器 {folder} 与模型 {both[0]} 同名，分不清要换成哪个：另起一个名字，例如 --adapter my_{both[0]}={folder}。"
        )
    paths = results.paths | {name: str(folder) for name, folder in folders.items()}
    return replace(results, paths=paths, adapters=dict.fromkeys(folders, base))


# ---------------------------------------------------------------- 载入


def open_speaker(title: str, path: str, seed: int) -> Speaker:
    """载入一个模型；文件夹不完整、不是会说话的模型是 UserError。"""
    find_model(path)  # 写了一半的文件夹在这里报错
    return load_speaker(title, path, seed)


def show_speaker(speaker: Speaker) -> None:
    """一行：名字、在哪里、训练完时在留出题上的成绩。"""
    metrics = speaker.run.get("metrics", {})
    names = {"qa_accuracy": "贪心答对", "preferred_rate": "采样又对又完整又有礼"}
    scores = [f"{say} {metrics[key]:.1%}" for key, say in names.items() if key in metrics]
    measured = f"（训练完时在留出题上：{'，'.join(scores)}）" if scores else ""
    print(f"{speaker.name}：{short(speaker.path)}{measured}")


def describe_sampling(settings: SpeakSettings, speaker: Speaker) -> str:
    how = "贪心" if settings.temperature == 0 else f"温度 {settings.temperature:g}，top_p {settings.top_p:g}"
    return f"{how}，最多 {settings.max_new_tokens} 个 token，{describe(speaker.model.device)}"


# ---------------------------------------------------------------- 读一行


def read_line(prompt: str) -> str | None:
    """在提示符下读一行；Ctrl-D、连按两次 Ctrl-C 是 None（要退出了）。"""
    for hint in ("（再按一次 Ctrl-C 退出）", ""):
        try:
            line = input(prompt)
        except EOFError:
            print()
            return None
        except KeyboardInterrupt:
            print(f"\n{hint}" if hint else "")
            continue
        line = line.replace("\ufeff", "").strip()  # 记事本存的文件从管道读来，开头有 BOM，行尾有 \r
        if not sys.stdin.isatty():
            print(line)  # 从管道读来的话屏幕上看不到，补上才成一段对话
        return line
    return None
