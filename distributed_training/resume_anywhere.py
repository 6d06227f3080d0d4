"""检查点存成一个文件夹，几个进程都能接着训练：4 个进程训练到一半被杀掉，2 个、1 个、3 个进程接着来，损失一样。

学到什么：每个进程只存自己手里的那一份，合起来是一个文件夹（torch.distributed.checkpoint）；文件里记的是"哪个张量的哪一段"，
不是"第几号进程的"，所以换了进程数，各读各的那一段就行。数据也要接得上：一步用哪几行只看步数，不看有几个进程。

运行：
    python resume_anywhere.py                    # 十几秒：4 个进程，第 7 步被杀掉，2 个进程接着
    python resume_anywhere.py --first 4 --then 1 # 换进程数
    python resume_anywhere.py --preset full      # 多几步

预期输出（实测见本文件夹的 README.md）：每一步的损失与一口气训练完的最多相差 1e-15 上下（float64）。

参考：torch.distributed.checkpoint 的文档；fully_shard（FSDP2）。进程是 ranks.py 开的。
"""

from nlp_common.base.cli import run_main

import os
import shutil
import signal
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

from nlp_common.base.arguments import COUNT, option
from nlp_common.base.errors import UserError
from nlp_common.draw.plots import line_chart
from nlp_common.train.lesson import run_lesson
from nlp_common.train.settings import LessonSettings, parse_settings
from nlp_common.train.stage import Stage
from ranks import run_ranks
from small_gpt import Sizes, loss_sum, make_batch, make_model

HOME = Path(__file__).resolve().parent
PRESETS = {
    "tiny": {"n_steps": 12, "kill_at": 7, "save_every": 3},
    "full": {"n_steps": 40, "kill_at": 25, "save_every": 10},
}
ROWS, LENGTH = 12, 16  # 一步几行：1、2、3、4 个进程都分得匀


@dataclass
class ResumeSettings(LessonSettings):
    NOT_IN_FINGERPRINT: ClassVar[set[str]] = LessonSettings.NOT_IN_FINGERPRINT | {"port"}
    COMMON: ClassVar[dict] = {"first": 4, "then": 2, "learning_rate": 3e-3}

    first: int | None = option("先用几个进程", limits=COUNT)
    then: int | None = option("接着用几个进程", limits=COUNT)
    n_steps: int | None = option("一共几步", limits=COUNT)
    kill_at: int | None = option("第几步被杀掉（那一步没有做完）", limits=COUNT)
    save_every: int | None = option("每几步存一个检查点", limits=COUNT)
    learning_rate: float | None = option("学习率")
    port: int | None = option("进程们碰头的端口；默认找一个空的")

    def check(self) -> None:
        for name in ("first", "then"):
            if ROWS % getattr(self, name):
                raise UserError(
                    f"一步 {ROWS} 行不能平分给 {getattr(self, name)} 个进程：--{name} 可以是 1、2、3、4、6、12。"
                )
        if self.kill_at > self.n_steps:
            raise UserError(f"--kill_at {self.kill_at} 比 --n_steps {self.n_steps} 还大：训练完了才杀。")
        if self.kill_at <= self.save_every:
            raise UserError(
                f"--kill_at {self.kill_at} 要比 --save_every {self.save_every} 大：还没有存过检查点，没有可接的。"
            )


# ---------------------------------------------------------------- 全课


def learn(stage: Stage) -> dict:
    settings = stage.settings
    whole = train(1, settings, None)
    print(f"一个进程一口气 {settings.n_steps} 步：损失 {whole[0]:.4f} → {whole[-1]:.4f}。")

    folder = stage.folder.work / "checkpoints"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    before = killed(settings, folder)
    kept = newest(folder)
    print(
        f"{settings.first} 个进程：第 {settings.kill_at} 步被杀掉（做完了 {len(before)} 步），检查点到第 {kept[0]} 步。"
    )
    show_folder(kept[1])

    after = train(settings.then, settings, folder)
    print(f"{settings.then} 个进程从第 {kept[0] + 1} 步接着：损失 {after[0]:.4f} → {after[-1]:.4f}。")
    difference = max(abs(a - b) for a, b in zip(after, whole[kept[0] :], strict=True))
    print(f"接着的 {len(after)} 步，损失与一口气的最多相差 {difference:.1e}（float64）。")
    metrics = {
        "max_difference": difference,
        "max_difference_before": max(abs(a - b) for a, b in zip(before, whole, strict=False)),
        "killed_at": settings.kill_at,
        "resumed_from": kept[0],
        "files": len(list(kept[1].glob("*.distcp"))),
        "checkpoint_kb": sum(path.stat().st_size for path in kept[1].iterdir()) / 1000,
        "loss_first": whole[0],
        "loss_last": whole[-1],
    }
    history = [{"step": i + 1, "loss": loss} for i, loss in enumerate(whole)]
    data = {"train": {"name": "random", "kind": "builtin", "rows": ROWS * settings.n_steps}}
    draw_it = partial(draw, whole=whole, before=before, after=after, start=kept[0])
    return stage.save(metrics, data, write=draw_it, history=history)


def killed(settings: ResumeSettings, folder: Path) -> list[float]:
    """first 个进程训练到 kill_at 步，0 号被 SIGKILL（内存不够时系统就是这样做的）；返回做完的各步的损失。"""
    try:
        train(settings.first, settings, folder, kill_at=settings.kill_at)
    except UserError as error:
        print(f"（{error}）")
    losses = (folder / "losses.txt").read_text(encoding="utf-8").split()
    return [float(loss) for loss in losses]


def train(n: int, settings: ResumeSettings, folder: Path | None, kill_at: int | None = None) -> list[float]:
    """n 个进程训练到 n_steps，返回做过的各步的损失（0 号进程的，已是全体的）。"""
    given = (settings.seed, settings.n_steps, settings.save_every, settings.learning_rate)
    path = None if folder is None else str(folder)
    return run_ranks(worker, n, *given, path, kill_at, port=settings.port or 0)[0]


# ---------------------------------------------------------------- 每个进程里


def worker(
    rank: int,
    n: int,
    seed: int,
    n_steps: int,
    save_every: int,
    rate: float,
    path: str | None,
    kill_at: int | None,
) -> list[float]:
    folder = None if path is None else Path(path)
    sizes = Sizes()
    model = make_model(sizes, seed)
    mesh = dist.init_device_mesh("cpu", (n,))
    for block in model.blocks:  # 参数切成 n 份，一个进程一份（ZeRO-3）
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)

    done = 0
    if folder is not None and (found := newest(folder)):
        done = load(found[1], model, optimizer)
    losses = []
    for step in range(done + 1, n_steps + 1):
        rows = make_batch(
            ROWS, LENGTH, sizes.vocab, seed=seed * 1000 + step % 3
        )  # 三批轮流：只看步数，不看进程
        mine = rows[rank::n]
        loss = loss_sum(model, mine) / (ROWS * LENGTH / n)  # fully_shard 再除以 n
        loss.backward()
        if step == kill_at and rank == 0:
            os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach() / n
        dist.all_reduce(total)
        losses.append(total.item())
        if folder is None:
            continue
        if rank == 0:
            with (folder / "losses.txt").open("a", encoding="utf-8") as file:
                file.write(f"{losses[-1]!r}\n")
        if step % save_every == 0:
            save(folder / f"step-{step}", model, optimizer, step)
    return losses


def save(folder: Path, model, optimizer, step: int) -> None:
    """各进程一起写：先写进别的名字，都写完了再改名，所以叫 step-N 的文件夹总是完整的。"""
    part = folder.with_name(folder.name + ".part")
    dcp.save(state_of(model, optimizer) | {"step": torch.tensor(step)}, checkpoint_id=part)
    if dist.get_rank() == 0:  # save 返回时，各进程都写完了
        part.rename(folder)
    dist.barrier()


def load(folder: Path, model, optimizer) -> int:
    """各进程只读自己要的那几段：写的时候有几个进程，读的时候不必知道。返回做到第几步。"""
    state = state_of(model, optimizer) | {"step": torch.tensor(0)}
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    return int(state["step"])


def state_of(model, optimizer) -> dict:
    """参数与 Adam 的状态，都按参数的名字存（不按优化器里第几个），切成几份也写在张量里。"""
    weights, moments = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": moments}


def newest(folder: Path) -> tuple[int, Path] | None:
    """最后一个写完整的检查点：→ (第几步, 文件夹)；没有是 None。"""
    found = [
        (int(path.name.removeprefix("step-")), path)
        for path in folder.glob("step-*")
        if not path.name.endswith(".part")
    ]
    return max(found, default=None)


# ---------------------------------------------------------------- 看一看


def show_folder(folder: Path) -> None:
    names = sorted(path.name for path in folder.iterdir())
    print(
        f"  {folder.name}/ 里是 {'、'.join(names)}：一个进程一个 .distcp，.metadata 记着哪个张量的哪一段在哪里。"
    )


def draw(folder: Path, whole: list[float], before: list[float], after: list[float], start: int) -> None:
    steps = list(range(1, len(whole) + 1))
    line_chart(
        folder / "resume.svg",
        {
            "一口气，一个进程|one process": (steps, whole),
            "先前的，被杀掉|killed": (steps[: len(before)], [loss - 0.02 for loss in before]),
            "接着的|resumed": (steps[start:], [loss + 0.02 for loss in after]),
        },
        "三条线叠在一起，所以上下各移了 0.02|Shifted by 0.02 to be seen",
        "步数|step",
        "损失|loss",
    )


def main(argv: list[str] | None = None) -> dict:
    settings = parse_settings(ResumeSettings, PRESETS, argv)
    return run_lesson("resume_anywhere", HOME, settings, learn)


if __name__ == "__main__":
    run_main(main)
