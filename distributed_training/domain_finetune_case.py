"""一个行业从头到尾：接着预训练 → 微调，学会门诊记录，又不忘原来会的。

学到什么：先在行业的文档上接着预训练，再学问答；只学新的，旧的忘得很快；混进一两成旧数据，就记得住；
LoRA 学得少些，也忘得少些，是不是更划算，量出来看。

运行：
    python domain_finetune_case.py                           # 从小世界的 SFT 模型开始，五六分钟
    python domain_finetune_case.py --mixes 0,0.2 --lora false --output_dir outputs/two
    python domain_finetune_case.py --documents 我的文档       # 自己的文件夹（txt、md）：只接着预训练，看留出损失
    python domain_finetune_case.py --preset full             # Qwen2.5-0.5B，同样的数据，需要加速器

预期输出（实测见本文件夹的 README.md）：门诊的题从全错到九成左右；不混旧数据的，小世界的题几乎忘光，混一成的一道不忘。

参考：Gururangan et al. 2020（接着预训练有用）；Ibrahim et al. 2024（混旧数据、重新升温）；Biderman et al. 2024（LoRA 学得少忘得少）。
"""

from nlp_common.base.cli import run_main

import copy
import random
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch

import clinic_world
from nlp_common.base.arguments import COUNT, POSITIVE, SHARE, option
from nlp_common.base.console import print_table
from nlp_common.base.errors import UserError
from nlp_common.draw.plots import bar_chart
from nlp_common.lm.chat_rows import answer_loss
from nlp_common.lm.loading import end_chat_turns, load_chat_lm
from nlp_common.lm.losses import count_labels
from nlp_common.lm.packing import collate_blocks, cut_long, pack_documents
from nlp_common.lm.replies import MAX_REPLY, reply_to
from nlp_common.tiny import world
from nlp_common.tiny.judge import qa_accuracy
from nlp_common.train.chain import chain_model
from nlp_common.train.lesson import run_lesson, run_part
from nlp_common.train.loop import train_loop
from nlp_common.train.settings import LoopSettings, parse_settings
from nlp_common.train.sft import train_on_chats
from nlp_common.train.stage import Stage

HOME = Path(__file__).resolve().parent
FULL_MODEL = "Qwen/Qwen2.5-0.5B-Instruct"
PRESETS = {
    "tiny": {"n_documents": 5000, "n_chats": 4000, "max_length": 256, "per_device_train_batch_size": 16,
             "learning_rate": 1e-3, "adam_beta2": 0.98, "lora_rate": 5e-3, "n_questions": 256},
    "full": {"n_documents": 4000, "n_chats": 4000, "max_length": 512, "per_device_train_batch_size": 8,
             "learning_rate": 1e-5, "lora_rate": 1e-4, "n_questions": 256},
}  # fmt: skip
SUFFIXES = (".txt", ".md")


@dataclass
class DomainSettings(LoopSettings):
    model: str | None = option("从哪个模型开始：文件夹或 hub 名；默认是 Qwen 链 tiny 预设的 SFT 模型")
    source: Literal["hf", "modelscope"] = option("hub 名从哪里下载", "hf")
    mixes: str = option("混几成旧数据，逗号隔开，各练一遍", "0,0.1,0.2")
    lora: bool = option("旁边也练 LoRA（混第一种与最后一种）", True)
    lora_r: int = option("LoRA 的秩", 16, COUNT)
    lora_rate: float | None = option("LoRA 的学习率", limits=POSITIVE)
    documents: str | None = option("自己的文档：一个文件夹（txt、md），只接着预训练")
    heldout_share: float = option("自己的文档，留出几成", 0.1, SHARE)
    n_documents: int | None = option("几篇门诊文档", limits=COUNT)
    n_chats: int | None = option("几段门诊问答", limits=COUNT)
    n_questions: int | None = option("各留出几道题", limits=COUNT)

    def check(self) -> None:
        self.shares()

    def shares(self) -> list[float]:
        try:
            found = [float(each) for each in self.mixes.split(",")]
        except ValueError:
            found = [-1.0]
        if not all(0 <= share < 1 for share in found) or len(set(found)) < len(found):
            raise UserError(
                f"--mixes 要是 0 到 1 之间不同的数，逗号隔开，例如 0,0.1,0.2，给的是 {self.mixes}。"
            )
        return found


# ---------------------------------------------------------------- 1. 一种练法：文档，再问答


def adapt(
    stage: Stage, name: str, start, tokenizer, share: float, lora: bool
) -> tuple[dict, torch.nn.Module]:
    """start 的一份，在门诊的文档、问答上各练一遍，混进 share 的旧数据 → (量到的, 练好的模型)。"""
    settings = stage.settings
    model = copy.deepcopy(start)
    if lora:
        model = with_lora(model, tokenizer, settings)
    documents = mixed(
        clinic_world.documents(settings.n_documents, settings.seed), old_documents, share, settings.seed
    )
    chats = mixed(clinic_world.chats(settings.n_chats, settings.seed), world.chats, share, settings.seed)
    changed = replace(settings, learning_rate=settings.lora_rate if lora else settings.learning_rate)

    def read(part: Stage) -> dict:
        part.settings = changed
        return read_documents(part, f"{name} 文档", model, tokenizer, documents)

    def answer(part: Stage) -> dict:
        part.settings = changed
        return train_on_chats(part, f"{name} 问答", model, tokenizer, chats).metrics

    run_part(stage, f"{name}-documents", read, model)
    after_reading = measure(model, tokenizer, settings.n_questions)
    run_part(stage, f"{name}-chats", answer, model)
    found: dict = measure(model, tokenizer, settings.n_questions)
    found["after_documents"] = after_reading
    found["trainable"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return found, model.merge_and_unload() if lora else model


def mixed(new: list, old, share: float, seed: int) -> list:
    """新的全留着，再加旧的，使旧的占 share；打乱。"""
    rows = new + old(round(len(new) * share / (1 - share)), seed)
    random.Random(seed).shuffle(rows)
    return rows


def old_documents(n: int, seed: int) -> list[str]:
    return [row["text"] for row in world.documents(n, seed)]


def read_documents(part: Stage, label: str, model, tokenizer, texts: list[str]) -> dict:
    """接着预训练：每个 token 都是目标；一块装几篇，互不相看。"""
    blocks = to_blocks(tokenizer, texts, part.settings.max_length)
    collate = partial(collate_blocks, block_size=part.settings.max_length, pad_id=tokenizer.pad_token_id)
    tokens = [sum(map(len, block)) for block in blocks]
    part.settings = replace(
        part.settings, per_device_train_batch_size=max(1, part.settings.per_device_train_batch_size // 2)
    )
    return train_loop(part, label, model, blocks, collate, answer_loss, tokens).metrics


def to_blocks(tokenizer, texts: list[str], size: int) -> list:
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return pack_documents(cut_long([[*row, tokenizer.eos_token_id] for row in ids], size), size)


def new_characters(tokenizer, texts: list[str]) -> list[str]:
    """文档里哪些字要用几个 token 才拼得出来：真的大词表里很少有，小世界的词表里，行业的字几乎都是。"""
    characters = sorted({c for text in texts for c in text if not c.isspace()})
    ids = tokenizer(characters, add_special_tokens=False)["input_ids"]
    return [c for c, pieces in zip(characters, ids, strict=True) if len(pieces) > 1]


@torch.no_grad()
def add_characters(model, tokenizer, characters: list[str], seed: int) -> None:
    """一个新字一个 token，一行新的嵌入：随机的，与旧的各行一样大。旧的一行也不动。"""
    if not characters:
        return
    tokenizer.add_tokens(characters)
    old = model.get_input_embeddings().weight.detach().clone()
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    rows = model.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(seed)
    new = torch.randn(len(rows) - len(old), old.shape[1], generator=generator)
    rows[len(old) :] = (new * old.std().cpu()).to(rows)
    if (head := model.get_output_embeddings().weight) is not rows:  # 不共用的，输出那一层也要
        head[len(old) :] = rows[len(old) :]


def with_lora(model, tokenizer, settings: DomainSettings):
    """全部线性层加 LoRA；嵌入冻住，只放开新字的那几行：不放开，新字怎样也学不会。"""
    from peft import LoraConfig, get_peft_model

    special = set(tokenizer.all_special_ids)
    new = sorted(i for i in tokenizer.get_added_vocab().values() if i not in special)
    config = LoraConfig(
        r=settings.lora_r, lora_alpha=2 * settings.lora_r, target_modules="all-linear", task_type="CAUSAL_LM",
        trainable_token_indices=new or None,
    )  # fmt: skip
    return get_peft_model(model, config)


# ---------------------------------------------------------------- 2. 两边各答对几成


def measure(model, tokenizer, n: int) -> dict[str, float]:
    """门诊的题、小世界的题，各答对几成（贪心，没有学过的组合）。"""
    was_training = model.training
    model.eval()
    asked = clinic_world.questions(n)
    replies = reply_to(model, tokenizer, asked, 2 * MAX_REPLY)  # 新字一个三个 token
    domain = [clinic_world.is_right(q, r["text"], r["ended"]) for q, r in zip(asked, replies, strict=True)]
    general = qa_accuracy(model, tokenizer, world.heldout_questions(n, seed=0))
    model.train(was_training)
    return {"domain_accuracy": sum(domain) / n, "general_accuracy": general}


@torch.no_grad()
def document_loss(model, tokenizer, texts: list[str], size: int) -> float:
    """文档上每个 token 的平均损失（nats）。"""
    model.eval()
    total, n = 0.0, 0
    for block in to_blocks(tokenizer, texts, size):
        batch = {
            k: v.to(model.device) for k, v in collate_blocks([block], size, tokenizer.pad_token_id).items()
        }
        total += answer_loss(model, batch)[0].item()
        n += count_labels(batch)
    return total / n


# ---------------------------------------------------------------- 3. 全课


def learn(stage: Stage, path: str) -> dict:
    settings = stage.settings
    tokenizer, start = load_chat_lm(path, stage.device)
    before = measure(start, tokenizer, settings.n_questions)
    new = new_characters(tokenizer, clinic_world.documents(settings.n_documents, settings.seed))
    add_characters(start, tokenizer, new, settings.seed)
    shares = settings.shares()
    runs = [(f"full_{share:g}", share, False) for share in shares]
    if settings.lora:
        runs += [(f"lora_{share:g}", share, True) for share in dict.fromkeys((shares[0], shares[-1]))]
    metrics: dict = {"before": before, "new_characters": len(new)}
    models = {}
    for name, share, lora in runs:
        metrics[name], models[name] = adapt(stage, name, start, tokenizer, share, lora)
    best = max((name for name, *_ in runs), key=lambda name: sum(list(metrics[name].values())[:2]))
    metrics |= {"best": best, "domain_accuracy": metrics[best]["domain_accuracy"]}
    metrics |= {"general_accuracy": metrics[best]["general_accuracy"]}
    end_chat_turns(models[best], tokenizer)
    picture = partial(draw, metrics=metrics, names=[name for name, *_ in runs])
    return stage.finish(models[best], tokenizer, metrics, {"train": "clinic_world"}, [], draw=picture)


def learn_own(stage: Stage, path: str, files: list[Path]) -> dict:
    """自己的文档：按文件留出，接着预训练，看留出的损失，与小世界的题忘了多少。"""
    settings = stage.settings
    texts = [read_text(file) for file in files]
    order = list(range(len(texts)))
    random.Random(settings.seed).shuffle(order)
    n = max(1, round(len(texts) * settings.heldout_share))
    heldout, train = [texts[i] for i in order[:n]], [texts[i] for i in order[n:]]
    tokenizer, model = load_chat_lm(path, stage.device)
    metrics: dict = {
        "files": len(texts),
        "loss_before": document_loss(model, tokenizer, heldout, settings.max_length),
    }
    metrics["general_before"] = measure(model, tokenizer, settings.n_questions)["general_accuracy"]
    rows = mixed(train, old_documents, settings.shares()[-1], settings.seed)
    read = partial(read_documents, label="读文档", model=model, tokenizer=tokenizer, texts=rows)
    run_part(stage, "documents", read, model)
    metrics["loss_after"] = document_loss(model, tokenizer, heldout, settings.max_length)
    metrics["general_after"] = measure(model, tokenizer, settings.n_questions)["general_accuracy"]
    end_chat_turns(model, tokenizer)
    return stage.finish(model, tokenizer, metrics, {"train": settings.documents}, [])


def find_files(folder: str) -> list[Path]:
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise UserError(f"--documents 要是一个文件夹，{folder} 不是。")
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
    if len(files) < 2:
        raise UserError(
            f"{folder} 里只有 {len(files)} 个 {'、'.join(SUFFIXES)} 文件：至少要两个，一个练，一个留出。"
        )
    return files


def read_text(file: Path) -> str:
    try:
        text = file.read_text(encoding="utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise UserError(f"{file} 不是 UTF-8（第 {error.start + 1} 个字节）：另存为 UTF-8 再来。") from None
    if not text:
        raise UserError(f"{file} 是空的：删掉它，或写上内容。")
    return text


def show(metrics: dict) -> None:
    if "loss_before" in metrics:
        print(
            f"\n留出的文档：每个 token 的损失 {metrics['loss_before']:.3f} → {metrics['loss_after']:.3f} nats"
        )
        print(f"小世界的题答对：{metrics['general_before']:.3f} → {metrics['general_after']:.3f}\n")
        return
    table = [["", "门诊", "小世界", "读完文档时：门诊", "小世界"]]
    for name, its in metrics.items():
        if isinstance(its, dict):
            after = its.get("after_documents", {})
            cells = [its["domain_accuracy"], its["general_accuracy"], *after.values()]
            table.append([name, *(f"{cell:.3f}" for cell in cells), *[""] * (4 - len(cells))])
    print()
    print_table(table)
    print(f"  full、lora 后面是混几成旧数据；两边加起来最好的是 {metrics['best']}\n")


def draw(folder: Path, metrics: dict, names: list[str]) -> None:
    every = {"之前|before": "before"} | {name.replace("_", " "): name for name in names}
    series = {
        "门诊|clinic": {title: metrics[name]["domain_accuracy"] for title, name in every.items()},
        "小世界|tiny world": {title: metrics[name]["general_accuracy"] for title, name in every.items()},
    }
    bar_chart(
        folder / "domain.svg", series, "学会新的，忘了多少旧的|New domain, old tasks", "", "答对|accuracy"
    )  # fmt: skip


def main(argv: list[str] | None = None) -> dict:
    settings = parse_settings(DomainSettings, PRESETS, argv, FULL_MODEL)
    if settings.preset == "full" and settings.model is None:
        settings.model = FULL_MODEL
    files = find_files(settings.documents) if settings.documents else []
    found = chain_model("sft", settings.model, settings.source)
    work = (
        partial(learn_own, path=found["path"], files=files) if files else partial(learn, path=found["path"])
    )
    record = run_lesson("domain_finetune_case", HOME, settings, work, start=f"{found['stage']}:{found['id']}")
    show(record["metrics"])
    return record


if __name__ == "__main__":
    run_main(main)
