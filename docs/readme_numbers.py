"""README 里的数由数据填：量到的数在 docs/measurements/*.jsonl，写法在 docs/measurements/templates/*.md。

    python docs/readme_numbers.py fill        # 把各 README 里 <!-- numbers:名字 --> 之间的换成模板加数据，连同下一条的 page
    python docs/readme_numbers.py check       # 只看一样不一样；不一样的说出是哪个 README 的哪一块，退出码 1
    python docs/readme_numbers.py page        # 只写 docs/measurements/README.md：全部数字，每个是哪条命令量的
    python docs/readme_numbers.py trim 主题     # 去掉没有一个模板用到、也不是一课总指标的细数（如每个区间、每个点的）
    python docs/readme_numbers.py record 主题 文件.json --command "python gpt/mini_gpt.py"
                                              # 不导入 nlp_common 的脚本：记它写出的 JSON 或 run.json（写 - 就读标准输入的最后一行）

模板里花括号中的换成数：

    {qwen.sft.qa_accuracy@0:.3f}              名字 @ 种子 : 写法（Python 的格式）；只有一行时不用写种子
    {gpt.ours.wall_s/gpt.nanogpt.wall_s:.2f}  除法，也可以除以一个数
    {mean(qwen.ppo.judge_score):.3f}          各种子的 mean、min、max
"""

from nlp_common.base.cli import run_main

import argparse
import json
import re
import sys
from pathlib import Path
from statistics import mean

from nlp_common.base import measurements
from nlp_common.base.errors import UserError
from nlp_common.base.runs import write_text

ROOT = measurements.ROOT
# 标记各占一行；正文里提到它的不算
BLOCK = re.compile(
    r"^([ \t]*<!-- numbers:(\S+) -->\n)(.*?)([ \t]*<!-- /numbers:\2 -->)$", re.DOTALL | re.MULTILINE
)
MARK = re.compile(r"^[ \t]*<!-- /?numbers:\S+ -->$", re.MULTILINE)
CELL = re.compile(r"\{([^{}\n]+)\}")
OVER_SEEDS = {"mean": mean, "min": min, "max": max}
# 一行一种方法的表里说好要量的：模板没有用到也留着
ALWAYS_KEPT = {
    "recall_at_1", "recall_at_5", "mrr", "precision", "recall", "task1_before", "task1_after", "task2_after",
    "qa_accuracy", "heldout_loss", "bytes", "preferred_rate",
}  # fmt: skip
HEADINGS = "| 名字 | 值 | 单位 |\n|---|---|---|"


# ---------------------------------------------------------------- 1. 花括号 → 数


def load_table() -> dict[str, dict]:
    """全部数据：``{名字: {种子: 值}}``。"""
    table = {}
    for path in sorted(measurements.FOLDER.glob("*.jsonl")):
        for row in measurements.load_rows(path.stem):
            table.setdefault(row["name"], {})[row["seed"]] = row["value"]
    return table


def by_seed(name: str, table: dict[str, dict]) -> dict:
    if name not in table:
        raise UserError(f"数据里没有 {name}")
    return table[name]


def value_of(text: str, table: dict[str, dict]) -> float:
    """一项：一个数、名字、名字@种子，或 mean(名字)。"""
    if re.fullmatch(r"\d+(\.\d+)?", text):
        return float(text)
    if found := re.fullmatch(r"(mean|min|max)\((.+)\)", text):
        return OVER_SEEDS[found[1]](by_seed(found[2], table).values())
    name, at, seed = text.partition("@")
    values = by_seed(name, table)
    if at:
        if not seed.isdecimal() or int(seed) not in values:
            raise UserError(f"数据里的 {name} 没有种子 {seed}，有的是 {sorted(map(str, values))}")
        return values[int(seed)]
    if len(values) > 1:
        raise UserError(f"{name} 有几个种子 {sorted(map(str, values))}，要写明是哪个，例如 {name}@0")
    return next(iter(values.values()))


def fill_cell(inside: str, table: dict[str, dict]) -> str:
    """花括号里的一串 → 写进 README 的数。"""
    expression, _, form = inside.partition(":")
    top, slash, bottom = expression.partition("/")
    value = value_of(top.strip(), table)
    if slash:
        value = value / value_of(bottom.strip(), table)
    try:
        return format(value, form)
    except ValueError as error:
        raise UserError(f"写法 {form!r} 不对（{error}）") from error


def render(template: str, table: dict[str, dict]) -> str:
    """模板 → 填好的一块；哪一处不对就说哪一处。"""
    pieces, end = [], 0
    for found in CELL.finditer(template):
        pieces.append(template[end : found.start()])
        try:
            pieces.append(fill_cell(found[1], table))
        except UserError as error:
            raise UserError(f"{found[0]}：{error}。") from error
        end = found.end()
    return "".join([*pieces, template[end:]])


# ---------------------------------------------------------------- 2. README


def readmes() -> list[Path]:
    return [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("*/README*.md"))]


def fill_blocks(
    text: str, where: str, templates: dict[str, str], table: dict[str, dict]
) -> tuple[str, list[str]]:
    """一份 README → (填好的全文, 与原来不同的块)。"""
    pieces, changed, end = [], [], 0
    for found in BLOCK.finditer(text):
        opening, name, old, closing = found.groups()
        if name not in templates:
            raise UserError(f"{where} 里的 numbers:{name} 没有模板 docs/measurements/templates/{name}.md。")
        try:
            new = render(templates[name], table)
        except UserError as error:
            raise UserError(f"docs/measurements/templates/{name}.md 里的 {error}") from error
        if new != old:
            changed.append(name)
        pieces += [text[end : found.start()], opening, new, closing]
        end = found.end()
    if MARK.search(BLOCK.sub("", text)):
        raise UserError(f"{where} 里有 <!-- numbers:… --> 没有配成一对。")
    return "".join([*pieces, text[end:]]), changed


def load_templates() -> dict[str, str]:
    paths = sorted((measurements.FOLDER / "templates").glob("*.md"))
    return {path.stem: path.read_text(encoding="utf-8") for path in paths}


def compare_all() -> list[tuple[Path, str, list[str]]]:
    """各 README 与数据页 → [(文件, 应当有的全文, 不同的块)]。"""
    templates, table, found = load_templates(), load_table(), []
    for path in readmes():
        text = path.read_text(encoding="utf-8")
        found.append((path, *fill_blocks(text, path.relative_to(ROOT).as_posix(), templates, table)))
    page, path = page_text(), measurements.FOLDER / "README.md"
    old = path.read_text(encoding="utf-8") if path.exists() else ""
    found.append((path, page, [] if page == old else ["全部"]))
    return found


def fill() -> None:
    for path, text, changed in compare_all():
        if changed:
            write_text(path, text)
            print(f"填好 {path.relative_to(ROOT)}：{'、'.join(changed)}")


def check() -> None:
    used = {name for path in readmes() for _, name, _, _ in BLOCK.findall(path.read_text(encoding="utf-8"))}
    if unused := sorted(set(load_templates()) - used):
        raise UserError(f"没有一个 README 用到这些模板：{'、'.join(unused)}。")
    different = [(path, changed) for path, _, changed in compare_all() if changed]
    for path, changed in different:
        print(f"{path.relative_to(ROOT)} 与数据不同：{'、'.join(changed)}")
    if different:
        print("运行 make numbers-fill（python docs/readme_numbers.py fill）。")
        sys.exit(1)


# ---------------------------------------------------------------- 3. 全部数字的一页


def page_text() -> str:
    lines = [
        "# 量到的数",
        "",
        "各 README 里的数都从这里来，一次运行一张表。本页由 `python docs/readme_numbers.py page` 写成，不要手改；",
        "数据在同一个文件夹的 `*.jsonl`，由脚本、基准的 `--record` 写。提交后面的 + 是说：当时的代码与那个提交不完全一样。",
        "命令在仓库的最上层运行。机器的快慢会变，秒数、速度只看同一条命令里的前后。",
    ]
    for path in sorted(measurements.FOLDER.glob("*.jsonl")):
        lines += ["", f"## {path.stem}"]
        for (command, *where, seed), rows in by_run(measurements.load_rows(path.stem)).items():
            said = "，".join(map(str, where)) + ("" if seed is None else f"，种子 {seed}")
            lines += ["", f"`{command}`（{said}）", "", HEADINGS]
            for row in rows:
                lines.append(f"| `{row['name']}` | {row['value']} | {row['unit']} |")
    return "\n".join(lines) + "\n"


def by_run(rows: list[dict]) -> dict[tuple, list[dict]]:
    """同一次运行量到的放在一起：命令、提交、处理器、日期、种子只说一遍。"""
    runs: dict[tuple, list[dict]] = {}
    for row in rows:
        run = tuple(row[name] for name in ("command", "commit", "processor", "date", "seed"))
        runs.setdefault(run, []).append(row)
    return runs


def page() -> None:
    write_text(measurements.FOLDER / "README.md", page_text())


# ---------------------------------------------------------------- 4. 去掉用不到的


def names_in(inside: str) -> set[str]:
    """花括号里的一串用到的名字。"""
    names = set()
    for term in inside.partition(":")[0].split("/"):
        found = re.fullmatch(r"(?:mean|min|max)\((.+)\)", term.strip())
        names.add((found[1] if found else term.strip()).partition("@")[0])
    return names


def is_kept(name: str, used: set[str]) -> bool:
    """模板用到的；一课的总指标（主题.课.指标，三段）；说好要量的。别的是细数，脚本自己的 run.json 里都有。"""
    return name in used or name.count(".") <= 2 or name.rpartition(".")[2] in ALWAYS_KEPT


def trim(topic: str) -> None:
    """一个主题的数据里，只留下用得到的：一份文件不过 1 MB，翻得到要找的。"""
    if not measurements.load_rows(topic):
        raise UserError(f"没有 docs/measurements/{topic}.jsonl，或者它是空的。")
    used = set()
    for template in load_templates().values():
        for found in CELL.finditer(template):
            used |= names_in(found[1])
    dropped = measurements.save_rows(topic, [], lambda row: is_kept(row["name"], used))
    print(f"{topic} 去掉 {dropped} 个没有一个模板用到的细数。")
    page()


# ---------------------------------------------------------------- 5. 记下别的脚本写出的 JSON


def record(topic: str, file: str, prefix: str, command: str, seed: int | None) -> None:
    try:
        text = sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8")
        values = json.loads(text.strip().splitlines()[-1] if file == "-" else text)
    except (OSError, ValueError, IndexError) as error:
        raise UserError(f"{file} 里没有读得懂的 JSON（{error}）。") from error
    if not isinstance(values, dict) or not measurements.numbers_in(values):
        raise UserError(f"{file} 里要是 {{名字: 数}}，可以嵌套。")
    if isinstance(values.get("metrics"), dict):  # run.json：只要用时与指标
        values = {"seconds": values["seconds"], **values["metrics"]}
    measurements.record(topic, {prefix: values} if prefix else values, seed=seed, command=command)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    actions = parser.add_subparsers(dest="action", required=True)
    for name, text in (("fill", "填好各 README"), ("check", "看一样不一样"), ("page", "写全部数字的一页")):
        actions.add_parser(name, help=text)
    trimmer = actions.add_parser("trim", help="去掉没有一个模板用到的细数")
    trimmer.add_argument("topic", help="主题")
    recorder = actions.add_parser("record", help="记下一个 JSON 文件里的数")
    recorder.add_argument("topic", help="主题，也就是文件名：docs/measurements/主题.jsonl")
    recorder.add_argument("file", help="JSON 文件，- 是标准输入")
    recorder.add_argument("--command", required=True, help="量出它的命令，照读者会写的样子")
    recorder.add_argument("--prefix", default="", help="各个名字的开头")
    recorder.add_argument("--seed", type=int, help="随机种子；与种子无关的不写")
    args = parser.parse_args()
    if args.action == "record":
        record(args.topic, args.file, args.prefix, args.command, args.seed)
    elif args.action == "trim":
        trim(args.topic)
    else:
        {"fill": fill, "check": check, "page": page}[args.action]()


if __name__ == "__main__":
    run_main(main)
