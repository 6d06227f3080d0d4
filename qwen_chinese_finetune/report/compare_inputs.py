"""比较用的模型和题目：从一组结果里找齐模型，题目用训练时留出的那些，或读者给的。"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from types import SimpleNamespace

from chain import FOLDERS, HOME, SCRIPTS, STAGES
from nlp_common.base.errors import UserError
from nlp_common.data.chats import to_questions
from nlp_common.data.rows import has_split, read_rows
from nlp_common.lm.loading import load_tokenizer
from nlp_common.tiny import world
from nlp_common.train.chain import find_trained
from nlp_common.train.splits import EVAL_SEED, load_train_and_eval

PRESETS = {"full": "真实模型", "tiny": "小世界的小模型"}
HELPERS = {"reward": "不报奖励模型的分", "sft": "不报对 SFT 的 KL"}  # 缺了也能比的，与缺了会少什么


def find_root(settings, names: tuple[str, ...], given: dict[str, str]) -> tuple[Path, str | None]:
    """→ (结果所在的文件夹，预设)；给了 --output_root 时预设是 None。

    与训练脚本不同，auto 不看有没有加速器：这里只推理，哪一组结果齐全就用哪一组，先看 full。
    """
    if settings.output_root:
        return Path(settings.output_root).expanduser().resolve(), None
    preset, why = settings.preset, f"你给了 --preset {settings.preset}"
    if preset == "auto":
        trained = [
            p for p in PRESETS if all((_root(p) / FOLDERS[n]).is_dir() for n in names if n not in given)
        ]
        preset = trained[0] if trained else "tiny"
        why = f"outputs/{preset} 里{'有' if trained else '还没有'}训练好的模型"
    other = "tiny" if preset == "full" else "full"
    print(f"预设 {preset}（{PRESETS[preset]}）：{why}。要换另一组，加 --preset {other}。")
    return _root(preset), preset


def _root(preset: str) -> Path:
    return HOME / "outputs" / preset


def find_models(
    names: tuple[str, ...], given: dict[str, str], root: Path, preset: str | None, source: str
) -> dict[str, dict]:
    """→ ``{名字: {"path", "stage", "id", "run"}}``：要比的 names，加上有的话 reward 和 sft。

    given 是 --models 指定的（名字 → 路径），其余在 root 里找。
    要比的模型没有是 UserError，写明该运行哪个脚本；辅助的 reward、sft 没有只说一声。
    """
    found = {}
    for name in dict.fromkeys([*names, *HELPERS]):
        folder = root / FOLDERS.get(name, name)
        trained = find_trained(given.get(name), folder, source)
        if trained is None and name in names:
            raise UserError(_how_to_train(name, folder, preset))
        if trained is None:
            print(f"没有{STAGES[name]}的结果（{SCRIPTS[name]}），{HELPERS[name]}。")
            continue
        found[name] = trained
    return found


def parse_models(texts: list[str]) -> dict[str, str]:
    """``["sft=路径", …]`` → ``{"sft": "路径"}``。"""
    known = [*FOLDERS, "reward"]
    given = {}
    for text in texts:
        name, _, path = text.partition("=")
        if not path or name not in known:
            raise UserError(
                f"--models 里的 {text} 看不懂：要写成 名字=路径，名字是 {'、'.join(known)} 之一，"
                "例如 sft=outputs/tiny/sft。"
            )
        given[name] = path
    return given


def _how_to_train(name: str, folder: Path, preset: str | None) -> str:
    script, flag = SCRIPTS[FOLDERS[name]], f"--preset {preset}" if preset else f"--output_dir {folder}"
    every = f"python run_all.py {flag if preset else f'--output_dir {folder.parent}'}"
    return (
        f"还没有{STAGES[FOLDERS[name]]}的结果：{folder}。先运行 python {script} {flag}"
        f"（或 {every}，一次跑完各阶段），或者用 --models {name}=路径 指定一个模型。"
    )


def check_same_vocab(found: dict[str, dict]):
    """各模型的词表要相同，否则 token 级的 KL 和奖励没有意义。返回分词器。"""
    first, *others = found
    tokenizer = load_tokenizer(found[first]["path"])
    vocab = tokenizer.get_vocab()
    for name in others:
        if load_tokenizer(found[name]["path"]).get_vocab() != vocab:
            raise UserError(
                f"{found[name]['path']}（{name}）与 {found[first]['path']}（{first}）的词表不同，不能放在一起比："
                "请用 --models 给出同一个模型训练出来的各阶段结果。"
            )
    return tokenizer


def load_questions(settings, found: dict[str, dict]) -> tuple[list[dict], dict]:
    """→ (题目, 来源)。没给 --dataset 就用 PPO（没有就 DPO）训练时留出的：那些题模型没有学过。

    来源是 ``{"dataset", "rows", "sha256"}``；settings.max_new_tokens 没给的，也在这里定下。
    """
    n, name = settings.max_eval_samples, settings.dataset
    runs = [found[m]["run"] for m in ("ppo", "grpo", "dpo") if m in found and found[m]["run"]]
    if settings.max_new_tokens is None:
        settings.max_new_tokens = next((r["settings"].get("max_new_tokens") for r in runs), None) or 128
    if name is None:
        if not runs:
            raise UserError(
                "不知道该问什么题：--models 给的模型没有 run.json。用 --dataset 指定题目，如 --dataset tiny_world。"
            )
        trained = runs[0]["settings"]
        if trained["dataset"] == "tiny_world" and not trained["eval_dataset"]:
            name = "tiny_world"
        else:
            again = SimpleNamespace(**trained | {"max_eval_samples": n})
            _, questions, _ = load_train_and_eval(again, "questions", to_questions)
            return questions[:n], _source(f"{trained['dataset']}（训练时留出的）", questions[:n])
    if name == "tiny_world":
        questions = world.heldout_questions(n, EVAL_SEED)
    else:
        split = "validation" if has_split(name, "validation") or not Path(name).exists() else "train"
        rows = read_rows(name, split=split, limit=n, source=settings.source).rows
        questions = to_questions(rows, name)
    return questions, _source(name, questions)


def _source(dataset: str, questions: list[dict]) -> dict:
    digest = hashlib.sha256(json.dumps(questions, ensure_ascii=False, sort_keys=True).encode()).hexdigest()
    return {"dataset": dataset, "rows": len(questions), "sha256": digest}
