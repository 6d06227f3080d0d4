"""训练曲线的五种去处（``--report_to``），一种一个类，接口是 tracking.py 的 Place。各家的遥测在 base/environment.py 里关掉。

不设环境变量，都记在本机（tracking_folder()）；要上网的，照各家自己的写法：MLFLOW_TRACKING_URI、WANDB_API_KEY、SWANLAB_API_KEY。
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import re
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock

from nlp_common.base.measurements import numbers_in
from nlp_common.train.tracking import Place, tracking_folder, without_secrets

PROJECT = "nlp-learning"


def advice(to: str) -> str:
    """记不了的时候怎么办。"""
    return {
        "jsonl": "看看 NLP_LEARNING_TRACKING 指的文件夹能不能写。",
        "tensorboard": "看看 NLP_LEARNING_TRACKING 指的文件夹能不能写。",
        "mlflow": (
            f"服务器没有开、令牌不对：看 MLFLOW_TRACKING_URI（现在是 {without_secrets(mlflow_uri())}）"
            "与 MLFLOW_TRACKING_TOKEN；数据库锁着：等另一个程序用完，再运行同一条命令。"
        ),
        "wandb": "令牌不对：看 WANDB_API_KEY；不联网：先 export WANDB_MODE=offline，以后用 wandb sync 送上去。",
        "swanlab": "令牌不对：看 SWANLAB_API_KEY；不联网：先 export SWANLAB_MODE=offline，以后用 swanlab sync 送上去。",
    }[to]


def new_number(name: str) -> str:
    """这一次的编号，也是文件名：什么时候、哪个阶段；两个进程同一秒开始也不会相同。"""
    safe = re.sub(r"[^\w.-]", "_", name)
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{safe}-{secrets.token_hex(3)}"


def results(record: dict) -> dict[str, float]:
    """run.json 里最后的指标：``result/…``，与曲线分开。"""
    values = numbers_in({"seconds": record["seconds"], **record["metrics"]})
    return {f"result/{name}": value for name, value in values.items()}


def last_step(record: dict) -> int:
    steps = [row["step"] for row in record.get("history", []) if isinstance(row, dict) and "step" in row]
    return max(steps, default=0)


# ---------------------------------------------------------------- 一个文件


class Jsonl:
    """一次训练一个文件，一行一件事：不用装什么，两次训练同时写也各写各的。"""

    def open(self, run: dict, number: str | None) -> tuple[str, str]:
        number = number or new_number(run["name"])
        folder = tracking_folder() / "jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"{number}.jsonl"
        half = self.path.exists() and not self.path.read_bytes().endswith(b"\n")
        if half:  # 上次写到一半被杀了：另起一行，那半行读的时候跳过
            with self.path.open("a", encoding="utf-8") as file:
                file.write("\n")
        self._write({"event": "start", **run})
        return number, f"{self.path}"

    def _write(self, row: dict) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**row, "time": round(time.time(), 3)}, ensure_ascii=False) + "\n")

    def log(self, step: int, values: dict[str, float]) -> None:
        self._write({"step": step, **values})

    def finish(self, record: dict) -> None:
        self._write({"event": "finish", "run": record})

    def stop(self, failed: bool) -> None:
        self._write({"event": "failed" if failed else "interrupted"})


def read_jsonl(path: Path) -> list[dict]:
    """一个文件里的各行；写到一半的行跳过。"""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return [row for row in rows if isinstance(row, dict)]


# ---------------------------------------------------------------- TensorBoard


class TensorBoard:
    def open(self, run: dict, number: str | None) -> tuple[str, str]:
        from torch.utils.tensorboard import SummaryWriter

        number = number or new_number(run["name"])
        folder = tracking_folder() / "tensorboard"
        self.writer = SummaryWriter(str(folder / number))  # 接着训练：同一个文件夹，多一个文件
        self.writer.add_text(
            "settings", f"```\n{json.dumps(run['settings'], ensure_ascii=False, indent=2)}\n```"
        )
        self.writer.flush()
        return number, f"{folder / number}，看它：tensorboard --logdir {folder}"

    def log(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()  # 不然两分钟才写一次：被杀了就没有了

    def finish(self, record: dict) -> None:
        for name, value in results(record).items():
            self.writer.add_scalar(name, value, last_step(record))
        self.writer.close()

    def stop(self, failed: bool) -> None:
        self.writer.close()


# ---------------------------------------------------------------- MLflow


def mlflow_uri() -> str:
    """MLFLOW_TRACKING_URI，没设就是 tracking_folder() 里的一个 SQLite 文件（3.13 起不许再用文件夹）。"""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{tracking_folder().resolve() / 'mlflow.db'}"


def mlflow_client() -> Any:
    """连上 MLflow；服务器连不上，试两次就说，不等几分钟。"""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault(
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true"
    )  # 一次训练两行网址，下面一句说过了
    from mlflow import MlflowClient
    from mlflow.utils.logging_utils import disable_logging

    disable_logging()  # 建数据库时的一屏 INFO
    uri = mlflow_uri()
    if "://" not in uri or uri.startswith("file:"):
        raise ValueError(
            f"MLflow 3.13 起不再记在文件夹里（{uri}）：MLFLOW_TRACKING_URI 写成 sqlite:///路径.db，或服务器的网址"
        )
    if not uri.startswith("sqlite:///"):
        return MlflowClient(uri, registry_uri=uri)
    database = Path(uri.removeprefix("sqlite:///"))
    database.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{database}.lock"):  # 两次训练同时开始，都来建表，后来的那个会出错
        client = MlflowClient(uri, registry_uri=uri)
        client.search_experiments(max_results=1)
        client.search_registered_models(max_results=1)
    return client


class MLflow:
    """名字里它不收的字（括号等）换成下划线。"""

    def open(self, run: dict, number: str | None) -> tuple[str, str]:
        self.client, uri = mlflow_client(), mlflow_uri()
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or PROJECT
        experiment = self.client.get_experiment_by_name(name)
        if experiment is None:
            local = uri.startswith("sqlite:")  # 服务器自己知道文件放哪里
            place = (tracking_folder().resolve() / "mlruns").as_uri() if local else None
            try:
                kind = {"mlflow.experimentKind": "custom_model_development"}  # 不然页面先显示聊天应用的那一套
                experiment_id = self.client.create_experiment(name, artifact_location=place, tags=kind)
            except Exception:  # 另一次训练同时也在建它，先建成了
                experiment = self.client.get_experiment_by_name(name)
                if experiment is None:
                    raise
        if experiment is not None:
            experiment_id = experiment.experiment_id
        if number is None:
            number = self.client.create_run(experiment_id, run_name=run["name"]).info.run_id
            for key, value in run["settings"].items():
                self.client.log_param(number, key, value)
        else:
            self.client.update_run(number, status="RUNNING")
        self.number = number
        if uri.startswith("sqlite:"):
            return number, f"MLflow 的 {number}，看它：mlflow server --backend-store-uri {uri}"
        return number, f"{without_secrets(uri)}/#/experiments/{experiment_id}/runs/{number}"

    def log(self, step: int, values: dict[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        names = {re.sub(r"[^\w.\-/ :]", "_", name): value for name, value in values.items()}
        self.client.log_batch(self.number, [Metric(key, value, now, step) for key, value in names.items()])

    def finish(self, record: dict) -> None:
        self.log(last_step(record), results(record))
        tags = {"id": record["id"], "commit": record.get("commit"), "script": record.get("script")}
        for field, parent in record["parent"].items():
            tags[f"parent.{field}"] = f"{parent['stage']}:{parent['id']}"
        for name, source in record["data"].items():
            tags[f"data.{name}"] = source.get("sha256") if isinstance(source, dict) else None
        self._log_data(record["data"])
        for key, value in tags.items():
            if value:
                self.client.set_tag(self.number, key, value)
        self.client.log_text(self.number, json.dumps(record, ensure_ascii=False, indent=2), "run.json")
        self.client.set_terminated(self.number)

    def _log_data(self, data: dict) -> None:
        """页面上 Dataset 一栏：用了哪份数据，sha256 的开头。"""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        inputs = []
        for context, source in data.items():
            if isinstance(source, dict) and source.get("sha256"):
                name = Path(str(source["name"])).name
                place = json.dumps({"uri": str(source.get("path") or source["name"])}, ensure_ascii=False)
                dataset = Dataset(name=name, digest=source["sha256"][:16], source_type="local", source=place)
                inputs.append(DatasetInput(dataset, [InputTag("mlflow.data.context", context)]))
        if inputs:
            self.client.log_inputs(self.number, inputs)

    def stop(self, failed: bool) -> None:
        self.client.set_terminated(self.number, "FAILED" if failed else "KILLED")


# ---------------------------------------------------------------- W&B 与 SwanLab


class WandB:
    """没有令牌就记在本机（offline），以后 ``wandb sync``。横轴是我们的 step，不是它数的第几次：同一点记两遍，图上还是一点。"""

    buffered = True  # 它十几秒才写一次盘

    def open(self, run: dict, number: str | None) -> tuple[str, str]:
        import wandb

        mode: Any = os.environ.get("WANDB_MODE") or (
            "online" if os.environ.get("WANDB_API_KEY") else "offline"
        )
        number = number or secrets.token_hex(4)  # 文件夹的名字里已有时间
        folder = tracking_folder().resolve()
        folder.mkdir(parents=True, exist_ok=True)
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or PROJECT,
            name=run["name"],
            id=number,
            resume="allow",
            dir=str(folder),
            mode=mode,
            config=run["settings"],
            settings=wandb.Settings(
                silent=True, console="off", disable_git=True, init_timeout=20, x_disable_stats=True,
                x_save_requirements=False, x_disable_machine_info=True,
            ),
        )  # fmt: skip
        self.run.define_metric("*", step_metric="step")
        if mode != "offline":
            return number, self.run.url or number
        path = Path(self.run.dir).parent  # …/wandb/offline-run-…/files
        return number, f"{path}，送上网：wandb sync {path}"

    def log(self, step: int, values: dict[str, float]) -> None:
        self.run.log({"step": step, **values})

    def finish(self, record: dict) -> None:
        self.run.summary.update({**results(record), "id": record["id"]})
        self.run.config.update(
            {"run": {key: record.get(key) for key in ("script", "commit", "parent", "data")}}
        )
        self.run.finish()

    def stop(self, failed: bool) -> None:
        self.run.finish(exit_code=1)


class SwanLab:
    """没有令牌就记在本机（offline），以后 ``swanlab sync``。"""

    buffered = True

    def open(self, run: dict, number: str | None) -> tuple[str, str]:
        import swanlab

        key = os.environ.get("SWANLAB_API_KEY")
        mode = os.environ.get("SWANLAB_MODE") or ("online" if key else "offline")
        folder = tracking_folder().resolve() / "swanlab"
        folder.mkdir(parents=True, exist_ok=True)
        private = {"runtime": False, "requirements": False, "git": False, "monitor": False}
        again = {"id": number, "resume": "allow"} if number and mode == "online" else {}
        with contextlib.redirect_stdout(io.StringIO()):  # 它说的几句英文，下面用一句说完
            self.run = swanlab.init(
                project=os.environ.get("SWANLAB_PROJ_NAME") or PROJECT,
                name=run["name"],
                log_dir=str(folder),
                mode=mode,
                config=run["settings"],
                settings=swanlab.Settings(probe=private, terminal={"proxy_type": "none"}, interactive=False),
                **again,
            )
        if mode == "online":
            return self.run.id, str(self.run.url)
        return self.run.id, f"{self.run.dir}，送上网：swanlab sync {self.run.dir}"

    def log(self, step: int, values: dict[str, float]) -> None:
        self.run.log({name: value for name, value in values.items() if math.isfinite(value)}, step=step)

    def finish(self, record: dict) -> None:
        self.log(last_step(record), results(record))
        with contextlib.redirect_stdout(io.StringIO()):
            self.run.finish()

    def stop(self, failed: bool) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            if failed:
                self.run.finish(state="crashed", error="没有训练完")
            else:
                self.run.finish(state="aborted")


PLACES_BY_NAME: dict[str, Callable[[], Place]] = {
    "jsonl": Jsonl,
    "tensorboard": TensorBoard,
    "mlflow": MLflow,
    "wandb": WandB,
    "swanlab": SwanLab,
}
