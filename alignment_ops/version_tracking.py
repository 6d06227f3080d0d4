"""版本与来历：这个模型是用哪份数据、从哪个模型、照什么设置训练的；能不能照样再做一遍，一位不差。

你会学到
  1. 来历是一棵树：数据 → SFT → DPO。每次训练的 run.json 记着上一次的编号（权重的 sha256）与数据的 sha256，顺着它就走得回去；
     文件改了一个字、权重换了、文件夹被另一次训练占了，走一遍就发现。
  2. 能再做出来才算记全了：数据、设置、上一次、线程数都照那时的，重做出来的权重逐位相同；上一次的文件夹删了，照记录先重做它。
  3. 两个版本差在哪里（diff）：先看条件（设置、数据里换了几行、代码），再看结果（指标、曲线从第几步分开）。
  4. 曲线记到哪里只差一个参数：--report_to jsonl、tensorboard、mlflow、wandb、swanlab，训练照旧；记不上的不耽误训练，以后补。
  5. champion 与 challenger 是会动的别名，不是文件夹的名字：登记簿与 MLflow 是同一套说法。

怎么运行
  python version_tracking.py                                  # 全课：两份数据各训练 SFT、DPO，约两分钟
  python version_tracking.py list                             # 有哪些训练好的
  python version_tracking.py lineage 文件夹或编号               # 它从哪里来，还是不是那时的
  python version_tracking.py diff A B                         # 差在哪里
  python version_tracking.py reproduce A --output_dir 新文件夹   # 照记录再做一遍；--at_commit true 用那时的代码
  python version_tracking.py upload A --report_to mlflow       # 训练的时候没有记，补记
  mlflow server --backend-store-uri sqlite:///…/mlflow.db     # 看记到 MLflow 的（路径训练时会说）

应当看到（实测见本文件夹的 README.md）：四处动了手脚全被发现；删掉 SFT 再重做 DPO，两次的权重逐位相同；五种去处记下的点与训练时的相同。

参考：Zaharia et al. 2018（MLflow）；Mitchell et al. 2019（Model Cards）；Gundersen & Kjensmo 2018（再做得出来要记些什么）。
"""

from nlp_common.base.cli import run_main

import json
import random
import shutil
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from nlp_common.base.arguments import COUNT, SHARE, option
from nlp_common.base.errors import UserError
from nlp_common.base.runs import write_text
from nlp_common.draw.plots import line_chart
from nlp_common.lm.loading import load_chat_lm
from nlp_common.tiny import world
from nlp_common.tiny.judge import measure_chat
from nlp_common.train.chain import chain_model
from nlp_common.train.lesson import run_lesson
from nlp_common.train.settings import LessonSettings, parse_settings
from nlp_common.train.splits import EVAL_SEED
from nlp_common.train.stage import Stage
from run_again import reproduce
from run_compare import changed_rows, first_parting, show_difference
from run_records import Run, faults, find_run, find_runs, lineage, show_lineage
from stages import run_stage
from tracking_places import alias_story, measure_places
from version_commands import COMMANDS

HOME = Path(__file__).resolve().parent
PRESETS = {
    "tiny": {"n_chats": 2000, "n_pairs": 600, "n_questions": 200},
    "full": {"n_chats": 8000, "n_pairs": 3000, "n_questions": 500},
}


@dataclass
class TrackingSettings(LessonSettings):
    model: str | None = option("从哪个模型开始做 SFT：默认是 Qwen 链 tiny 预设的预训练模型")
    n_chats: int | None = option("SFT 的数据几段对话", None, COUNT)
    n_pairs: int | None = option("DPO 的数据几对", None, COUNT)
    n_questions: int | None = option("每个模型考几道题", None, COUNT)
    bad_share: float = option("第一份数据里几成的对话答非所问", 0.3, SHARE)


# ---------------------------------------------------------------- 1. 全课


def learn(stage: Stage, start: str) -> dict:
    settings = stage.settings
    place = stage.path.with_name(
        f"{stage.path.name}-runs"
    )  # run.json 里记着它的路径，所以不能在会改名的文件夹里
    data = write_data(place / "data", settings)
    shutil.rmtree(place / "again", ignore_errors=True)  # 上次重做的：与 sft-2 一样的一份，来历里会找到它
    folders = train_versions(place, data, start, settings)
    metrics: dict = {"models": {name: measure(folder, settings) for name, folder in folders.items()}}
    runs = find_runs(place)
    a, b = (find_run(str(folders[name]), runs) for name in ("dpo-1", "dpo-2"))

    print("\n—— 它从哪里来")
    show_lineage(lineage(b, runs))
    print("\n—— 差在哪里")
    sft = [find_run(str(folders[name]), runs) for name in ("sft-1", "sft-2")]
    show_difference(*sft)
    show_difference(a, b)
    metrics["changed_rows"] = changed_rows(*sft)["dataset"][0]
    metrics["parted_at_step"] = first_parting(sft[0].record, sft[1].record)

    print("\n—— 动四处手脚，走一遍看得出来吗")
    metrics |= tamper(place, folders, data, b)
    print("\n—— 删掉 SFT，照记录把 DPO 再做一遍")
    metrics |= rebuild(place, folders, b)
    print("\n—— 五种去处")
    metrics["places"] = measure_places(place / "places", [*sft, a, b])
    print("\n—— champion 与 challenger")
    metrics |= alias_story(place, [folders["dpo-1"], folders["dpo-2"]])
    curves = {name: find_run(str(folder), runs).record["history"] for name, folder in folders.items()}
    source = {name: {"name": path.name, "kind": "file"} for name, path in data.items()}
    return stage.save(metrics, source, partial(draw, curves=curves))


def write_data(folder: Path, settings) -> dict[str, Path]:
    """两份 SFT 数据：v1 有几成答非所问，v2 把它们改回来了；一份偏好对。"""
    good = world.chats(settings.n_chats, settings.seed)
    rng = random.Random(settings.seed)
    bad = []
    for chat in good:
        messages = list(chat["messages"])
        if rng.random() < settings.bad_share:
            messages[-1] = rng.choice(good)["messages"][-1]  # 别的对话的最后一句回答
        bad.append({"messages": messages})
    pairs = [
        {key: row[key] for key in ("prompt", "chosen", "rejected")}
        for row in world.pairs(settings.n_pairs, settings.seed)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    found = {}
    for name, rows in {"chats-v1": bad, "chats-v2": good, "pairs": pairs}.items():
        found[name] = folder / f"{name}.jsonl"
        write_text(found[name], "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return found


def train_versions(place: Path, data: dict[str, Path], start: str, settings) -> dict[str, Path]:
    """数据 v1、v2 → sft-1、sft-2 → dpo-1、dpo-2；曲线与记录另外记一份在 jsonl 里。"""
    same = {"preset": settings.preset, "seed": settings.seed, "report_to": "jsonl"}
    folders = {name: place / name for name in ("sft-1", "sft-2", "dpo-1", "dpo-2")}
    for number in (1, 2):
        sft, dpo = folders[f"sft-{number}"], folders[f"dpo-{number}"]
        print(f"训练 {sft.name}、{dpo.name} …", flush=True)
        run_stage("sft", sft, start, data[f"chats-v{number}"], **same)
        run_stage("dpo", dpo, sft, data["pairs"], **same)
    return folders


def measure(folder: Path, settings) -> dict:
    tokenizer, model = load_chat_lm(str(folder), "cpu")
    found = measure_chat(model, tokenizer, world.heldout_questions(settings.n_questions, EVAL_SEED))[0]
    kept = {name: found[name] for name in ("qa_accuracy", "preferred_rate")}
    print(f"  {folder.name}：答对 {kept['qa_accuracy']:.3f}，又对又完整又有礼 {kept['preferred_rate']:.3f}")
    return kept


# ---------------------------------------------------------------- 2. 动手脚，重做


def tamper(place: Path, folders: dict[str, Path], data: dict[str, Path], run: Run) -> dict:
    """四处手脚，一次动一处，每次走一遍 dpo-2 的来历；看完放回去。"""
    sft, saved = folders["sft-2"], place / ".saved"  # 点开头的不算运行结果
    found = {}
    for name, work in {
        "data": change_data,
        "weights": swap_weights,
        "other": another_run,
        "gone": remove,
    }.items():
        shutil.rmtree(saved, ignore_errors=True)
        shutil.copytree(sft, saved / "sft-2")
        shutil.copy(data["chats-v2"], saved)
        try:
            work(sft, folders["sft-1"], data["chats-v2"])
            said = faults(lineage(run, find_runs(place)))
        finally:
            shutil.rmtree(sft, ignore_errors=True)
            shutil.copytree(saved / "sft-2", sft)
            shutil.copy(saved / data["chats-v2"].name, data["chats-v2"])
        found[name] = len(said)
        print(f"  {work.__doc__}：{said[0] if said else '没有发现'}")
    shutil.rmtree(saved)
    clean = faults(lineage(run, find_runs(place)))
    print(f"  都放回去：{clean[0] if clean else '没有问题'}")
    return {
        "tampered": len(found),
        "tampering_found": sum(n > 0 for n in found.values()),
        "false_alarms": len(clean),
    }


def change_data(sft: Path, other: Path, data: Path) -> None:
    """数据里改了一个字"""
    text = data.read_text(encoding="utf-8")
    data.write_text(text.replace("了", "过", 1), encoding="utf-8")


def swap_weights(sft: Path, other: Path, data: Path) -> None:
    """sft-2 的权重换成了 sft-1 的"""
    shutil.copy(other / "model.safetensors", sft / "model.safetensors")


def another_run(sft: Path, other: Path, data: Path) -> None:
    """sft-2 的文件夹里换成了另一次训练"""
    shutil.rmtree(sft)
    shutil.copytree(other, sft)


def remove(sft: Path, other: Path, data: Path) -> None:
    """sft-2 的文件夹删了"""
    shutil.rmtree(sft)


def rebuild(place: Path, folders: dict[str, Path], run: Run) -> dict:
    """把 sft-2 移走，只剩下记录；重做 dpo-2（它先重做 sft-2），与原来的比。"""
    again, hidden = place / "again", place / ".hidden-sft-2"
    shutil.rmtree(hidden, ignore_errors=True)
    folders["sft-2"].rename(hidden)
    try:
        rebuilt = reproduce(run, find_runs(place), again / "dpo-2")
    finally:
        hidden.rename(folders["sft-2"])
    same = "逐位相同" if rebuilt.same else f"不同：{'；'.join(rebuilt.causes) or '条件都相同'}"
    print(f"  dpo-2 {run.id} → {rebuilt.run.id}：{same}（上游重做了 {rebuilt.parents} 次）")
    return {"rebuilt_same": int(rebuilt.same), "rebuilt_parents": rebuilt.parents}


def draw(folder: Path, curves: dict[str, list[dict]]) -> None:
    series = {}
    for name in ("sft-1", "sft-2"):
        series[f"{name}|{name}"] = ([p["step"] for p in curves[name]], [p["loss"] for p in curves[name]])
    title = "三成的行答非所问，曲线看得出来|Two versions of the data"
    line_chart(folder / "versions.svg", series, title, "步|step", "损失|loss")


# ---------------------------------------------------------------- 3. 命令行


def main(argv: list[str] | None = None) -> object:
    words = sys.argv[1:] if argv is None else argv
    if words and not words[0].startswith("-"):
        if words[0] not in COMMANDS:
            raise UserError(f"不认识 {words[0]}：可以是 {'、'.join(COMMANDS)}；什么都不写是全课。")
        return COMMANDS[words[0]](words[1:])
    settings = parse_settings(TrackingSettings, PRESETS, argv)
    found = chain_model("pretrain", settings.model)
    record = run_lesson(
        "version_tracking",
        HOME,
        settings,
        partial(learn, start=found["path"]),
        start=f"{found['stage']}:{found['id']}",
    )
    show(record["metrics"])
    return record


def show(metrics: dict) -> None:
    print(
        f"\n动了 {metrics['tampered']} 处手脚，发现 {metrics['tampering_found']} 处，没有动时的误报 {metrics['false_alarms']} 处"
    )
    print(
        f"重做的 DPO 与原来{'逐位相同' if metrics['rebuilt_same'] else '不同'}，为它先重做了 {metrics['rebuilt_parents']} 次上游"
    )
    for name, its in metrics["places"].items():
        print(
            f"  {name:<12} 连上 {its['open_seconds']:6.2f} 秒，每点 {its['ms_per_point']:7.3f} 毫秒，读回来相同 {its['same_points']}/{its['points']}"
        )


if __name__ == "__main__":
    run_main(main)
