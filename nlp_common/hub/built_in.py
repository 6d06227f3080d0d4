"""内置模型：把 PyPI 包里的权重写成 hub 布局的文件夹，只写一次，放在缓存里。"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from nlp_common.base.errors import UserError
from nlp_common.hub.model_folder import missing_file


def write_once(folder: str | Path, write: Callable[[Path], None]) -> Path:
    """folder 里还没有完整的模型，就用 write(文件夹) 写一个；返回 folder。

    先写到旁边的临时文件夹再改名，中断不会留下半个模型；两个进程同时来，后一个等前一个写完，直接用。
    folder 里已有别的东西、写不进去是 UserError。
    """
    folder = Path(folder).expanduser()
    if folder.is_dir() and missing_file(folder) is None:
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f".{folder.name}.lock")):
            if folder.is_dir() and missing_file(folder) is None:
                return folder  # 等锁的时候，另一个进程已经写好了
            if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
                raise UserError(f"{folder} 已经存在，又不是完整的模型；请删掉它或换一个文件夹。")
            temporary = folder.with_name(f".{folder.name}.tmp")
            shutil.rmtree(temporary, ignore_errors=True)  # 上次被打断留下的
            write(temporary)
            if folder.exists():
                folder.rmdir()  # 空文件夹；Windows 不能改名到已有的文件夹上
            temporary.rename(folder)
    except PermissionError as error:
        raise UserError(
            f"没有写入权限：{error.filename or folder}。设环境变量 NLP_LEARNING_CACHE 换一个缓存位置。"
        ) from error
    return folder
