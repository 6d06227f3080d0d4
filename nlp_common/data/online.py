"""从 Hugging Face 或魔搭社区（ModelScope）读数据集；失败时告诉读者下一步能做什么。

网上的数据集是一边下载一边读的（firefly 有一百多万行，只要前一万行就不必下载其余的），Hugging Face 的缓存里
没有它；所以读过的行存在本项目自己的缓存里：第二次运行不再下载，断网也能训练。
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NoReturn

from nlp_common.base.errors import UserError
from nlp_common.hub.network import MIRROR, TIMEOUT, cache_root, endpoint, hub_reachable, why_unreachable

WAYS_OUT = f"""可以这样做（任选一种）：
  用镜像：        先设环境变量 HF_ENDPOINT={MIRROR}，再运行同一条命令
  用魔搭社区：    pip install modelscope，并加上 --source modelscope
  用自己的文件：  --dataset 路径/train.jsonl（json、jsonl、csv、tsv、parquet、txt 都行）
  不下载先试试：  --preset tiny"""

# datasets 的英文报错 → 对读者说的话
_LOAD_ERRORS = [
    (r"Bad split|Unknown split", "没有 {split} 这一份数据"),
    (r"Config name is missing", "有好几个子集，要在名字后面写明用哪个，如 --dataset {repo}:子集名"),
    (r"BuilderConfig .* not found", "没有叫 {config} 的子集"),
    (r"[Gg]ated", "要先在它的网页上申请访问，批准后运行 hf auth login 登录"),
    (r"scripts are no longer supported", "靠 Python 脚本加载，datasets 4 起不再支持；请找它的 Parquet 版本"),
]


def hub_rows(name: str, split: str, source: str = "hf") -> Iterator[dict]:
    """逐行读网上的数据集，不先下载整个（ModelScope 例外：先下载到它的缓存文件夹）；读过的行存在本地。

    name 是 ``owner/name`` 或 ``owner/name:子集``；source 是 ``hf`` 或 ``modelscope``。
    连不上而本地也没有存够、没有这个数据集、没有这一份、没有权限时抛出 UserError。
    """
    repo, _, config = name.partition(":")
    if source == "modelscope":
        yield from _stream(_download_from_modelscope(repo), name, split)
        return
    if source != "hf":
        raise UserError(f"--source 只能是 hf 或 modelscope，给的是 {source}。")
    folder = rows_folder(repo, config, split)
    revision = _revision_on_hub(repo) if hub_reachable() else None
    if revision:
        yield from read_through(
            folder / f"{revision}.jsonl",
            lambda skip: _stream(repo, name, split, revision, skip),
        )
    elif saved := newest_revision(folder):
        print(f"连不上 {endpoint()}：数据集 {name} 用上次存下的（{folder / saved}.jsonl）。")
        yield from read_through(folder / f"{saved}.jsonl", lambda count: _no_more(name, count))
    else:
        raise UserError(f"{why_unreachable()}，本地也没有存过，读不了数据集 {repo}。\n{WAYS_OUT}")


def _stream(place: str, name: str, split: str, revision: str | None = None, skip: int = 0) -> Iterator[dict]:
    """从 place（hub 名或文件夹）逐行读，跳过前 skip 行；英文的报错换成读者看得懂的话。"""
    import datasets  # 导入它时就定下了 HF_ENDPOINT，而且要一秒多，所以用到才导入

    # 断线时重连几次；默认 20 次，要等将近十分钟才说。读到的行都存着，再运行会接着读。
    datasets.config.STREAMING_READ_MAX_RETRIES = 3
    repo, _, config = name.partition(":")
    try:
        rows = datasets.load_dataset(place, config or None, split=split, streaming=True, revision=revision)
        yield from rows.skip(skip)
    except Exception as error:  # 网络、权限、格式的错各有各的类型，分属四个库；都要变成读者看得懂的话
        detail = " ".join(str(error).split("Example of usage")[0].split())[:300]
        for pattern, meaning in _LOAD_ERRORS:
            if re.search(pattern, detail):
                what = meaning.format(split=split, config=config, repo=repo)
                raise UserError(f"数据集 {repo} {what}。（{detail}）") from error
        raise UserError(f"读数据集 {name} 时出错：{type(error).__name__}：{detail}\n{WAYS_OUT}") from error


def _no_more(name: str, count: int) -> NoReturn:
    """断网时存着的行用完了。"""
    raise UserError(
        f"本地只存了数据集 {name} 的前 {count} 行，要更多得连网。"
        f"连上网再运行，或加 --max_train_samples {count} 只用这些。"
    )


def _revision_on_hub(repo: str) -> str:
    """数据集现在的版本（提交号）。先问这一次：直接 load_dataset 会反复重试，出错时要等几分钟才说。"""
    from huggingface_hub import HfApi, errors

    try:
        return HfApi(endpoint=endpoint()).dataset_info(repo, timeout=TIMEOUT).sha
    except errors.GatedRepoError as error:
        raise UserError(
            f"数据集 {repo} 要先在 {endpoint()}/datasets/{repo} 申请访问，批准后运行 hf auth login 登录。\n{WAYS_OUT}"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"{endpoint()} 上没有数据集 {repo}（或它是私有的），本地也没有叫这个名字的文件或文件夹。"
            f"请检查 --dataset 的拼写。\n{WAYS_OUT}"
        ) from error
    except Exception as error:  # 超时、证书、5xx：错误类型随 huggingface_hub 的版本变
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"{endpoint()} 没有正常回答，读不了数据集 {repo}（{reason}）。\n{WAYS_OUT}"
        ) from error


def _download_from_modelscope(repo: str) -> str:
    """用魔搭的下载器取下整个数据集，返回文件夹。

    不用它的 MsDataset：那要装 modelscope[datasets]，它会把 datasets 降到 4.8 以下，和本项目的版本冲突。
    """
    try:
        from modelscope import dataset_snapshot_download
    except ImportError as error:
        raise UserError(
            f"--source modelscope 要用到 modelscope 包。请运行：pip install modelscope（{error}）"
        ) from error
    try:
        return dataset_snapshot_download(repo)
    except Exception as error:  # 同上：连不上、没有、没权限，类型随版本变
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"从魔搭社区取不到数据集 {repo}（{reason}）。\n{WAYS_OUT}") from error


# ---------------------------------------------------------------- 读过的行存在本地


def rows_folder(repo: str, config: str, split: str) -> Path:
    return cache_root() / "rows" / repo.replace("/", "--") / (config or "default") / split


def newest_revision(folder: Path) -> str | None:
    """最近存下的是哪个版本（hub 上的提交号）；没有存过是 None。"""
    newest = max(folder.glob("*.jsonl"), key=lambda path: path.stat().st_mtime, default=None)
    return newest.stem if newest else None


def read_through(path: Path, read_on: Callable[[int], Iterable[dict]]) -> Iterator[dict]:
    """先给出 path 里存着的行，不够时用 read_on(已有几行) 接着读；读到哪里就存到哪里。"""
    rows, whole = load_rows(path)
    kept = len(rows)
    yield from rows
    if whole:
        return
    try:
        for row in read_on(kept):
            rows.append(row)
            yield row
        whole = True
    finally:  # 读够了（生成器被关上）、断线、Ctrl-C：读到的都留着
        if whole or len(rows) > kept:
            save_rows(path, rows, whole)


def load_rows(path: Path) -> tuple[list[dict], bool]:
    """→ (各行, 是不是数据集的全部)；没有、或者坏了（会说明）是 ([], False)。"""
    try:
        with path.open(encoding="utf-8") as file:
            head = json.loads(next(file))
            rows = [json.loads(line) for line in file]
        if len(rows) != head["rows"]:
            raise ValueError(f"应有 {head['rows']} 行，实有 {len(rows)} 行")
        return rows, head["whole"]
    except FileNotFoundError:
        return [], False
    except (OSError, ValueError, KeyError, TypeError, StopIteration) as error:
        print(f"缓存文件 {path} 坏了（{error}），不用它，重新读。")
        return [], False


def save_rows(path: Path, rows: list[dict], whole: bool) -> None:
    """第一行是行数，其余一行一条。先写临时文件再改名；存不了不是大事，说一声就行。"""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("w", encoding="utf-8") as file:
            for each in ({"rows": len(rows), "whole": whole}, *rows):
                file.write(json.dumps(each, ensure_ascii=False) + "\n")
        temporary.replace(path)
    except (OSError, TypeError, ValueError) as error:  # 磁盘满、没有权限；图片、日期等 JSON 存不了的
        with contextlib.suppress(OSError):
            temporary.unlink()
        print(f"（读来的数据没有存进缓存 {path}：{error}。下次要重新下载。）")
