"""lm-evaluation-harness 的任务文件（yaml）：读懂它，写出与它一字不差的题面。

一个任务文件说四件事：题在哪里（dataset_path、dataset_kwargs），题面怎样拼（doc_to_text），选项是什么（doc_to_choice），
哪个对（doc_to_target）；拼题面的是 jinja 模板。例题（few-shot）从 fewshot_split 里取，怎样取看 fewshot_config。

    task: my_task
    dataset_path: json                       # json、csv、parquet：本地文件；别的是 hub 上的名字，用 --dataset 指到本地的一份
    dataset_kwargs: {data_files: {test: test.jsonl, dev: dev.jsonl}}
    output_type: multiple_choice
    test_split: test
    fewshot_split: dev
    doc_to_text: "{{question}}\\nA. {{A}}\\nB. {{B}}\\nC. {{C}}\\nD. {{D}}\\n答案："
    doc_to_choice: ["A", "B", "C", "D"]
    doc_to_target: "{{['A','B','C','D'].index(answer)}}"

`!function` 是让评测去运行任务旁边的一个 Python 文件：别人的任务文件可以借它做任何事，这里一律不运行，说出是哪一行。
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mc_score import Ask
from mc_templates import Writer, joined
from nlp_common.base.errors import UserError
from nlp_common.data.files import READERS, read_file
from nlp_common.data.rows import read_rows

FEWSHOT_SEED = 1234  # lm_eval 的 --seed 默认是 0,1234,1234,1234，最后一个管例题
LOADERS = {
    "json",
    "csv",
    "parquet",
    "text",
}  # dataset_path 写这几个名字，题在 dataset_kwargs 的 data_files 里
MEASURED = ("acc", "acc_norm", "acc_bytes")
NOT_HERE = ("use_prompt", "process_docs", "process_results", "custom_dataset", "doc_to_image", "doc_to_audio")


@dataclass
class Item:
    """一道题：ask 是要模型算的；choices 是不带分隔符的选项（算长度用），gold 是对的那些是第几个。"""

    id: str
    ask: Ask
    choices: list[str]
    gold: list[int]
    text: str  # 题面，没有说明与例题


# ---------------------------------------------------------------- 1. 读 yaml


def load_task(path: str | Path, _seen: tuple[Path, ...] = ()) -> dict:
    """任务文件 → 设置；include 的先读，这里写的盖过它。写错了是 UserError，说出文件与行。"""
    import yaml

    path = Path(path).expanduser()
    if path.resolve() in _seen:
        raise UserError(f"{path} 的 include 绕回了自己：{' → '.join(each.name for each in _seen)}。")

    class Loader(yaml.SafeLoader):
        pass

    def refuse(loader: Any, node: Any) -> None:
        raise UserError(
            f"{path} 第 {node.start_mark.line + 1} 行是 !function {node.value}：它要运行 {path.parent} 里的 Python 代码，"
            "这里不运行任务文件带来的代码。请把它改写成 jinja 模板，或先用那个函数把题存成 jsonl，再让任务文件读它。"
        )

    Loader.add_constructor("!function", refuse)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        asked = f"（{_seen[-1]} 的 include）" if _seen else ""
        raise UserError(f"没有任务文件 {path}{asked}。") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"读不了任务文件 {path}：{error}") from error
    try:
        config = yaml.load(text, Loader=Loader)
    except yaml.YAMLError as error:
        raise UserError(f"{path} 不是合法的 yaml：{' '.join(str(error).split())}") from error
    if not isinstance(config, dict):
        raise UserError(f"{path} 里要是 名字: 值，读到的是 {type(config).__name__}。")
    includes = config.pop("include", [])
    merged: dict = {}
    for each in includes if isinstance(includes, list) else [includes]:
        merged |= load_task(path.parent / each, (*_seen, path.resolve()))
    if isinstance(config.get("task"), list) or isinstance(merged.get("task"), list):
        raise UserError(f"{path} 是一组任务（task 是一个列表），请一个个地给里面的任务文件。")
    return merged | config | {"_path": path}


def check_task(config: dict) -> None:
    """这里算不了的任务，开始之前就说。"""
    path = config["_path"]
    kind = config.get("output_type", "generate_until")
    if kind != "multiple_choice":
        raise UserError(f"{path} 的 output_type 是 {kind}，这里只算 multiple_choice。")
    if used := [name for name in NOT_HERE if config.get(name) is not None]:
        raise UserError(f"{path} 用了 {'、'.join(used)}，这里没有。")
    if missing := [name for name in ("doc_to_text", "doc_to_choice", "doc_to_target") if name not in config]:
        raise UserError(f"{path} 没有 {'、'.join(missing)}。")
    if not config.get("test_split") and not config.get("validation_split"):
        raise UserError(f"{path} 没有 test_split，也没有 validation_split：不知道评哪一份。")


def skipped_metrics(config: dict) -> list[str]:
    """任务要、这里不量的指标。"""
    wanted = [str(each.get("metric")) for each in config.get("metric_list") or []]
    return [name for name in wanted if name not in MEASURED]


# ---------------------------------------------------------------- 2. 题在哪里


def read_split(config: dict, split: str, dataset: str | None = None, source: str = "hf") -> list[dict]:
    """一份题；每行还带着 _place，说得出它在哪个文件的哪一行。"""
    name, kwargs = config.get("dataset_path"), dict(config.get("dataset_kwargs") or {})
    if dataset:
        files = split_files(Path(dataset).expanduser(), split, config.get("dataset_name"))
        return _placed([row for file in files for row in read_file(file)], files)
    if name in LOADERS:
        files = _files(config, split, kwargs.pop("data_files", None))
        kwargs.pop("trust_remote_code", None)
        if kwargs:
            raise UserError(
                f"{config['_path']} 的 dataset_kwargs 里有 {'、'.join(kwargs)}，这里只认 data_files。"
            )
        return _placed([row for file in files for row in read_file(file)], files)
    if not name:
        raise UserError(f"{config['_path']} 没有 dataset_path：不知道题在哪里，用 --dataset 指出来。")
    whole = f"{name}:{config['dataset_name']}" if config.get("dataset_name") else str(name)
    try:
        return _placed(read_rows(whole, split=split, source=source).rows, [])
    except UserError as error:
        raise UserError(f"{error}\n题在本地有一份的话，用 --dataset 指到那个文件或文件夹。") from error


def split_files(place: Path, split: str, name: str | None) -> list[Path]:
    """--dataset 里的这一份：一个文件就是它；文件夹里找 val.csv、law_val.csv、val/law.csv、law/val-00000-of-00001.parquet 这样的。"""
    if place.is_file():
        return [place]
    if not place.is_dir():
        raise UserError(f"没有 --dataset {place}：要一个题目文件，或放着各份题的文件夹。")
    part = rf"{re.escape(split)}(-\d+-of-\d+)?"
    names = [part] if not name else [part, rf"{re.escape(name)}[_-]{part}"]
    folders = [place, place / "data", place / split, *([place / name] if name else [])]
    for folder in folders:
        inside = sorted(each for each in folder.glob("*") if each.suffix.lower() in READERS)
        wanted = [*names, re.escape(name)] if name and folder.name == split else names
        if found := [each for each in inside if re.fullmatch("|".join(wanted), each.stem)]:
            return found
    have = "、".join(sorted(each.name for each in place.iterdir())[:20])
    raise UserError(
        f"--dataset {place} 里没有 {split} 这一份{f'（{name}）' if name else ''}；里面有：{have}。"
    )


def _files(config: dict, split: str, data_files: Any) -> list[Path]:
    if isinstance(data_files, dict):
        if split not in data_files:
            raise UserError(
                f"{config['_path']} 的 data_files 里没有 {split}，有的是 {'、'.join(data_files)}。"
            )
        data_files = data_files[split]
    elif split != "train" and data_files:
        raise UserError(
            f"{config['_path']} 的 data_files 没有分成几份，那一份叫 train；任务却要 {split}。写成 data_files: {{{split}: 文件}}。"
        )
    if not data_files:
        raise UserError(f"{config['_path']} 的 dataset_kwargs 里没有 data_files：不知道读哪个文件。")
    found = []
    for each in [data_files] if isinstance(data_files, str) else data_files:
        beside = config["_path"].parent / each  # 当前目录里没有，就看任务文件旁边
        path = Path(each).expanduser()
        if not path.is_file() and not beside.is_file():
            raise UserError(
                f"{config['_path']} 的 data_files 里的 {each} 不存在（当前目录、任务文件旁边都没有）。"
            )
        found.append(path if path.is_file() else beside)
    return found


def _placed(rows: list[dict], files: list[Path]) -> list[dict]:
    """csv 里全是整数的一列换成整数，与 datasets 读出来的一样；再记下每行的位置。"""
    if files and files[0].suffix.lower() in (".csv", ".tsv"):
        for name in rows[0]:
            values = [row.get(name) for row in rows]
            if all(isinstance(v, str) and re.fullmatch(r"-?(0|[1-9]\d*)", v) for v in values):
                for row in rows:
                    row[name] = int(row[name])
    for index, row in enumerate(rows):
        row["_place"] = (files[0] if len(files) == 1 else None, index)
    return rows


# ---------------------------------------------------------------- 3. 例题


class Sampler:
    """例题怎样取：first_n 总是开头几道；default 每题随机抽，随机数一路用下去（与 lm_eval 的次序相同）。"""

    def __init__(self, config: dict, pool: list[dict], same_split: bool):
        fewshot = config.get("fewshot_config") or {}
        self.kind = fewshot.get("sampler", "default")
        if self.kind not in ("default", "first_n"):
            raise UserError(f"{config['_path']} 的 sampler 是 {self.kind}，这里有 default 与 first_n。")
        self.pool, self.same_split, self.random = pool, same_split, random.Random(FEWSHOT_SEED)

    def take(self, n: int, doc: dict) -> list[dict]:
        others = [each for each in self.pool if not same(each, doc)] if self.same_split else self.pool
        if n > len(others):
            raise UserError(f"要 {n} 道例题，那一份里只有 {len(others)} 道：把 --shots 改小。")
        if self.kind == "first_n":
            return others[:n]
        if not self.same_split:
            return self.random.sample(self.pool, n)
        drawn = self.random.sample(self.pool, min(n + 1, len(self.pool)))
        found = [each for each in drawn if not same(each, doc)][:n]
        return found if len(found) == n else self.random.sample(others, n)


def same(one: dict, other: dict) -> bool:
    return {k: v for k, v in one.items() if k != "_place"} == {
        k: v for k, v in other.items() if k != "_place"
    }


# ---------------------------------------------------------------- 4. 从任务文件到题


def build_items(
    config: dict, shots: int | None = None, limit: int | None = None, dataset: str | None = None
) -> list[Item]:
    """任务 → 全部题。shots 是例题几道，没给看 num_fewshot；次序、题面与 lm_eval 的相同。"""
    check_task(config)
    writer = Writer(config)
    split = config.get("test_split") or config["validation_split"]
    docs = read_split(config, split, dataset)
    n_shots = config.get("num_fewshot") or 0
    if shots is not None and config.get("num_fewshot") != 0:  # 写明了 0 的，lm_eval 也不许改
        n_shots = shots
    sampler = find_sampler(config, split, docs, dataset) if n_shots else None
    items = []
    for number, doc in enumerate(docs[:limit]):
        description = config.get("description") or ""
        context = description and (doc.get(description) or writer.render(description, doc, "description"))
        if sampler:
            context += "".join(writer.shot(each) for each in sampler.take(n_shots, doc))
        text = writer.text(doc, config["doc_to_text"])
        context += text
        if prefix := config.get("gen_prefix"):
            prefix = doc[prefix] if prefix in doc else writer.render(prefix, doc, "gen_prefix")
            context = joined(context, prefix, config["target_delimiter"])
        choices = writer.choices(doc, config["doc_to_choice"])
        continuations = [config["target_delimiter"] + each for each in choices]
        items.append(
            Item(f"{number:05d}", Ask(context, continuations), choices, writer.gold(doc, choices), text)
        )
    return items


def find_sampler(config: dict, split: str, docs: list[dict], dataset: str | None) -> Sampler:
    fewshot = config.get("fewshot_config") or {}
    from_split = fewshot.get("split") or config.get("fewshot_split")
    if (samples := fewshot.get("samples")) and not from_split:
        if not isinstance(samples, list) or not all(isinstance(each, dict) for each in samples):
            raise UserError(f"{config['_path']} 的 fewshot_config.samples 要是一个列表，每项是一道题。")
        pool = [{**each, "_place": (None, i)} for i, each in enumerate(samples)]
        return Sampler(config, pool, not config.get("test_split"))
    used = from_split or config.get("training_split") or config.get("validation_split") or split
    pool = docs if used == split else read_split(config, used, dataset)
    return Sampler(config, pool, from_split == config.get("test_split"))
