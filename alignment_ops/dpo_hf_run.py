"""在租来的 GPU 上训练：检查点随写随推到 hub，机器没了，换一台接着来，结果一位也不差。

你会学到
  1. 检查点先推走，才不怕机器被收回：写完整一个推一个，一次推送是一次提交，仓库里不会有半个检查点。
  2. 换一台机器，要带走的不只是权重：优化器、学习率走到哪里、随机数、起点模型、设置、数据的 sha256，少一样就不是同一次训练。
  3. 令牌只从环境变量 HF_TOKEN 读，仓库默认私有；运行记录里本机的路径，推之前去掉。
  4. 从 hub 取来的检查点不能直接读：里面有 pickle，别人的 pickle 一读就可能运行别人的代码。
  5. 训练完了写一张模型卡：从哪里来、用什么训练、量到什么，都从 run.json 填。

怎么运行
  python dpo_hf_run.py                        # 没有网、没有账号也行：本机开一个 hub 演习一遍，约一分钟
  export HF_TOKEN=hf_…                        # 真的：先在 hub 网站的设置里建一个有 write 权限的令牌
  python dpo_hf_run.py --repo my-dpo --preset full --model 我的SFT模型
  # 机器没了？在另一台上设好 HF_TOKEN，再运行同一条命令（起点模型从仓库里取，不用给 --model）
  python model_card.py --run 结果文件夹          # 只要一张模型卡
  python hub_faults.py                        # 只看十种出错各说什么

应当看到（实测见本文件夹的 README.md）：机器一推了两个检查点就被杀掉，机器二从第二个接着训练，得到的权重与从没中断过的
逐位相同；只带走权重的那次，损失跳回开头；十种出错各有一句话；令牌在推上去的、写下来的文件里一处也找不到。

参考：Rafailov et al. 2023（DPO）；Mitchell et al. 2019（Model Cards for Model Reporting）；huggingface_hub 的 create_commit。
"""

from nlp_common.base.cli import run_main

import json
import shutil
import sys
import threading
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import ClassVar

from hub_drill import run_drill, show
from hub_repo import HubRepo, open_repo, snapshot, weights_id
from model_card import model_card
from nlp_common.base.arguments import option
from nlp_common.base.device import library_versions
from nlp_common.base.errors import UserError
from nlp_common.base.runs import (
    RunFolder,
    differences,
    load_run,
    open_run,
    run_record,
    write_json,
    write_text,
)
from nlp_common.hub.models import require_model
from nlp_common.train.chain import chain_model
from nlp_common.train.lesson import run_lesson
from nlp_common.train.settings import TrainSettings, fingerprint, parse_settings, preset_announced
from nlp_common.train.stage import show_metrics
from stages import run_stage

HOME = Path(__file__).resolve().parent
FULL_MODEL = "Qwen/Qwen1.5-0.5B"  # 只用来看要不要用 full；从哪个 SFT 模型开始，要自己说
PRESETS = {
    "tiny": {"dataset": "tiny_world", "save_steps": 100},
    "full": {"dataset": "shibing624/DPO-En-Zh-20k-Preference:zh", "save_steps": 100},
}
LOOK_EVERY = 0.5  # 秒：多久看一次有没有新的检查点
# 交给 DPO 脚本的设置；没有给的，用它自己的默认值
PASSED_ON = (
    "max_train_samples", "max_length", "per_device_train_batch_size", "gradient_accumulation_steps",
    "learning_rate", "num_train_epochs", "warmup_steps", "weight_decay", "beta", "sft_weight",
    "save_steps", "max_eval_samples", "source", "seed", "report_to",
)  # fmt: skip


@dataclass
class HubRunSettings(TrainSettings):
    NOT_IN_FINGERPRINT: ClassVar[set[str]] = TrainSettings.NOT_IN_FINGERPRINT | {
        "repo", "public", "save_steps", "keep_checkpoints", "model", "die_at",
    }  # fmt: skip

    repo: str | None = option("hub 上的仓库：名字，或 拥有者/名字；没有就建。不给就在本机演习")
    public: bool = option("仓库公开；默认是私有的，只有自己看得到", False)
    keep_checkpoints: bool = option("训练完了，仓库里也留着检查点", False)
    model: str | None = option("从哪个 SFT 模型开始：hub 名或文件夹；tiny 默认是 Qwen 链的 SFT 模型")
    dataset: str | None = option("偏好对：内置名、hub 名或文件，写法同 dpo_chinese_qwen.py")
    source: str = option("hub 名从哪里下载：hf 或 modelscope", "hf", choices=("hf", "modelscope"))
    gradient_accumulation_steps: int | None = option("累积几步的梯度再更新一次")
    beta: float | None = option("离参考模型多远的代价：越小走得越远")
    sft_weight: float | None = option("好回答上的 SFT 损失占多大的权重")
    save_steps: int | None = option("每几步存一个检查点、推一次")
    max_eval_samples: int | None = option("留出数据最多用多少行")
    die_at: int = option("演习：推上第几步（或之后）的检查点时，机器一被杀掉", 200)


# ---------------------------------------------------------------- 1. 一台机器上，从头到尾


def train_and_push(settings: HubRunSettings) -> dict:
    """查好令牌和仓库 → 接着仓库里的，或从头开始 → 一边训练一边推 → 发布。返回 DPO 的 run.json。"""
    repo = open_repo(settings.repo, settings.public)
    out = result_folder(settings, repo)
    note = repo.read_note()  # 里面是别的东西，在这里就停下
    if settings.retrain:
        note = None
    start = note["start"] if note and not settings.model else find_start(settings)
    mine = describe_run(settings, start)
    seen = "公开" if repo.public else "私有"
    print(f"仓库 {repo.api.endpoint}/{repo.name}（{seen}）；结果 {out}", flush=True)

    folder = prepare(out, mine, settings.retrain)
    if note:
        check_same(note, mine, repo)
        if finished := fetch_finished(repo, note, folder):
            return finished
        start = start if "path" in start else fetch_start(repo, start, out, settings.source)
        fetch_newest(repo, folder)
    else:
        repo.push_note(mine, Path(start["path"]) if start["from"] == "start" else None)

    pusher = Pusher(repo, folder)
    pusher.start()
    try:
        options = dpo_options(settings)
        model = start["path"] if start["from"] == "start" else start["from"]  # hub 上的，记名字不记缓存在哪里
        run = run_stage("dpo", out, model, settings.dataset, settings.preset, **options)
    except KeyboardInterrupt:
        print("停下了；手上的检查点推完就走（再按一次 Ctrl-C，不推了）。", flush=True)
        raise
    finally:
        pusher.finish()

    card = model_card(run, repo.name, repo.public)
    write_text(out / "README.md", card)
    repo.publish(out, card, mine | {"finished": run["id"]}, settings.keep_checkpoints)
    print(f"模型和模型卡推上去了：{repo.api.endpoint}/{repo.name}")
    return run


def dpo_options(settings: HubRunSettings) -> dict:
    return {name: value for name in PASSED_ON if (value := getattr(settings, name)) is not None}


def result_folder(settings: HubRunSettings, repo: HubRepo) -> Path:
    default = HOME / "outputs" / settings.preset / repo.name.replace("/", "_")
    return Path(settings.output_dir or default).expanduser().resolve()


def find_start(settings: HubRunSettings) -> dict:
    """起点模型：--model 给的；没给，tiny 用 Qwen 链的 SFT 模型。

    hub 上的模型，名字就够了；只在本机的（from 是 start），要推到仓库的 start/ 里，换了机器才有。
    """
    if not settings.model and settings.preset == "full":
        raise UserError("full 预设要说从哪个 SFT 模型开始：--model 文件夹或 hub 名，或加 --preset tiny。")
    path = chain_model("sft", settings.model, settings.source)["path"]
    local = not settings.model or Path(settings.model).expanduser().exists()
    return {
        "from": "start" if local else settings.model,
        "weights": weights_id(Path(path)),
        "path": path,
    }


def describe_run(settings: HubRunSettings, start: dict) -> dict:
    """推上去的 hub_run.json：两台机器的都一样，才是同一次训练。没有令牌，没有本机的路径。"""
    wanted = fingerprint(settings)
    if "dataset_sha256" in wanted:  # 本机的文件：看内容，不看放在哪里
        wanted["dataset"] = Path(wanted["dataset"]).name
    start = {name: start[name] for name in ("from", "weights")}
    return {"settings": wanted, "start": start, "versions": library_versions()}


def check_same(note: dict, mine: dict, repo: HubRepo) -> None:
    """仓库里的那次训练与这次的设置、起点不同是 UserError；库的版本不同，只说一声。"""
    if note["start"]["weights"] != mine["start"]["weights"]:
        raise UserError(
            f"{repo.name} 里的训练是从另一个起点模型开始的：去掉 --model，用仓库里的；或换一个 --repo。"
        )
    if changed := differences(note["settings"], mine["settings"]):
        raise UserError(
            f"{repo.name} 里是一次设置不同的训练：\n  "
            + "\n  ".join(changed)
            + "\n改成一样的接着它训练，或换一个 --repo，或加 --retrain 从头来、替换它。"
        )
    if other := differences(note["versions"], mine["versions"]):
        print(f"库的版本与那台机器的不同（{'；'.join(other)}）：照样接着训练，只是结果不一定逐位相同。")


def prepare(out: Path, mine: dict, retrain: bool) -> RunFolder:
    """结果旁边的工作文件夹；里面是别的设置、别的起点留下的半途结果，就清掉。另一个进程正在用它是 UserError。"""
    same = {name: mine[name] for name in ("settings", "start")}
    with open_run(out) as folder:
        record = folder.work / "hub_run.json"
        if retrain or (record.exists() and json.loads(record.read_text(encoding="utf-8")) != same):
            shutil.rmtree(folder.work, ignore_errors=True)
        if retrain and load_run(out):
            shutil.rmtree(out)
        folder.checkpoints.mkdir(parents=True, exist_ok=True)
        write_json(record, same)
    return folder


# ---------------------------------------------------------------- 2. 换一台机器：从仓库里取


def fetch_start(repo: HubRepo, start: dict, out: Path, source: str) -> dict:
    """那台机器用的起点模型：在仓库的 start/ 里，或是 hub 上的一个模型；权重要一样。"""
    if start["from"] == "start":
        print("起点模型从仓库里取。", flush=True)
        path = repo.download("start/*", out.with_name(f".{out.name}.start")) / "start"
    else:
        path = Path(require_model(start["from"], source))
    if weights_id(path) != start["weights"]:
        raise UserError(
            f"{path} 的权重与开始训练时的起点模型不同（没有下载完，或后来改了）：删掉它，再运行同一条命令。"
        )
    return start | {"path": str(path)}


def fetch_newest(repo: HubRepo, folder: RunFolder) -> None:
    """本机没有、或比仓库里的旧，就取仓库里最新的检查点；DPO 脚本看到它，就从它接着训练。"""
    if folder.path.exists():  # 训练早已做完，只是没有推完
        return
    if step := repo.fetch_checkpoint(folder.checkpoints, newer_than=step_of(folder.latest_checkpoint())):
        print(f"从 hub 取来第 {step} 步的检查点，接着训练。", flush=True)


def fetch_finished(repo: HubRepo, note: dict, folder: RunFolder) -> dict | None:
    """那次训练已经做完了：本机没有它的结果就下载，不再训练。还没有做完是 None。"""
    if "finished" not in note:
        return None
    out = folder.path
    if not out.exists() or run_record(str(out)).get("id") != note["finished"]:
        temporary = out.with_name(f".{out.name}.download")
        shutil.rmtree(temporary, ignore_errors=True)
        repo.download("*", temporary)
        if weights_id(temporary) != note["finished"]:
            raise UserError(f"从 {repo.name} 取来的模型坏了（权重对不上）：再运行同一条命令，重新取。")
        for extra in ("start", "checkpoints"):
            shutil.rmtree(temporary / extra, ignore_errors=True)
        shutil.rmtree(out, ignore_errors=True)
        temporary.rename(out)
    shutil.rmtree(folder.work, ignore_errors=True)
    print("这次训练早已做完，用仓库里的结果（--retrain 从头来）。")
    run = run_record(str(out))
    show_metrics(run["metrics"])
    return run


def step_of(checkpoint: Path | None) -> int:
    return int(checkpoint.name.rsplit("-", 1)[1]) if checkpoint else 0


# ---------------------------------------------------------------- 3. 一边训练一边推


@dataclass
class Pusher:
    """旁边的一个线程：看见新的、写完整的检查点就推。推不上去不耽误训练：说一声，下一个再推。"""

    repo: HubRepo
    folder: RunFolder
    pushed: int = 0  # 推到第几步了
    stop: threading.Event = field(default_factory=threading.Event)

    def start(self) -> None:
        self.pushed = max(self.repo.steps(), default=0)
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()

    def finish(self) -> None:
        """训练完了、出了错、按了 Ctrl-C：手上还没有推的检查点，推完再走。"""
        self.stop.set()
        self.thread.join()

    def watch(self) -> None:
        last_round = False
        while not last_round:
            last_round = self.stop.wait(LOOK_EVERY)
            latest = self.folder.latest_checkpoint()
            if step_of(latest) > self.pushed:
                self.push(latest, step_of(latest))

    def push(self, checkpoint: Path, step: int) -> None:
        place = self.folder.path.with_name(f".{self.folder.path.name}.push") / checkpoint.name
        try:
            photo = snapshot(checkpoint, place)
            if photo is None:  # 正好被更新的挤掉了：下一轮推更新的
                return
            size = self.repo.push_checkpoint(photo)
            print(f"第 {step} 步的检查点推上去了（{size / 1e6:.1f} MB）。", flush=True)
        except Exception as error:  # 推是另一个线程的事：什么错都不能让训练停下，也不能不说
            said = str(error) if isinstance(error, UserError) else f"{type(error).__name__}：{error}"
            print(f"第 {step} 步的检查点没有推上去，训练照旧：{said}", flush=True)
        self.pushed = step
        shutil.rmtree(place.parent, ignore_errors=True)


# ---------------------------------------------------------------- 4. 演习，或真的


def main(argv: list[str] | None = None) -> dict:
    argv = sys.argv[1:] if argv is None else argv
    if any(word == "--repo" or word.startswith("--repo=") for word in argv):
        return train_and_push(parse_settings(HubRunSettings, PRESETS, argv, FULL_MODEL))
    with preset_announced():
        settings = parse_settings(HubRunSettings, PRESETS, ["--preset", "tiny", *argv], FULL_MODEL)
    if settings.preset == "full":
        raise UserError("演习只在小世界里做：去掉 --preset full；真的训练，加 --repo 仓库名。")
    print("演习：本机开一个 hub，两台机器是两个文件夹。真的往 hub 上推：--repo 仓库名。")
    start = chain_model("sft", settings.model, settings.source)
    drill = partial(
        run_drill, script=Path(__file__).resolve(), start=start["path"], options=dpo_options(settings)
    )
    more = {
        "start": f"{start['stage']}:{start['id']}",
        "save_steps": settings.save_steps,
        "die_at": settings.die_at,
    }
    record = run_lesson("dpo_hf_run", HOME, settings, drill, **more)
    show(record)
    return record


if __name__ == "__main__":
    run_main(main)
