"""MLflow 的 Model Registry 里的 champion 与 challenger，与 registry.py 的同一套说法。

MLflow 2.9 起不再用 Staging、Production 那样的阶段，改用别名：一个名字指着一个版本，可以随时指到别的版本去。
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from nlp_common.base.errors import UserError
from nlp_common.train.track_to import advice, mlflow_client
from nlp_common.train.tracking import check_installed, reason


class MLflowAliases:
    """一个名字的各个版本与别名。要先装 mlflow。"""

    def __init__(self, name: str):
        check_installed("mlflow")
        self.name = name
        try:
            self.client: Any = mlflow_client()
            with contextlib.suppress(_already_exists()):  # 别的进程也可能刚建了它
                self.client.create_registered_model(name)
        except Exception as error:
            raise UserError(f"连不上 MLflow：{reason(error)}。{advice('mlflow')}") from error

    def register(self, folder: Path, record: dict) -> int:
        """登记一个结果文件夹，返回版本号；同样的权重登记过，就返回那时的号。"""
        for row in self.client.search_model_versions(f"name = '{self.name}'"):
            if row.tags.get("id") == record["id"]:
                return int(row.version)
        tags = {"id": record["id"], "stage": record["stage"], "folder": str(folder)}
        # 权重留在结果文件夹里：服务器不收本机的路径，只记编号，文件夹记在 tags 里
        made = self.client.create_model_version(
            self.name, source=f"nlp-learning:///{record['id']}", tags=tags
        )
        return int(made.version)

    def point(self, alias: str, version: int) -> None:
        """别名指到 version；它原来指着别的版本，就离开那里。"""
        self.client.set_registered_model_alias(self.name, alias, str(version))

    def drop(self, alias: str) -> None:
        self.client.delete_registered_model_alias(self.name, alias)

    def aliases(self) -> dict[str, int]:
        found = self.client.get_registered_model(self.name).aliases
        return {alias: int(version) for alias, version in found.items()}

    def find(self, alias: str) -> dict:
        """别名指着的那一版：``{"version", "folder", "id"}``。"""
        row = self.client.get_model_version_by_alias(self.name, alias)
        return {"version": int(row.version), "folder": Path(row.tags["folder"]), "id": row.tags["id"]}


def _already_exists() -> type[Exception]:
    from mlflow.exceptions import MlflowException

    return MlflowException
