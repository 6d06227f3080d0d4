"""用 PEFT 微调一个真模型，然后聊天：一个模型，两个几兆的适配器，一句话换一种口气。

学到什么：真干活时用 PEFT 的那几行（LoraConfig、get_peft_model、set_adapter、disable_adapter、save_pretrained）；
适配器的文件夹里有什么，为什么要记下原模型的名字；两个适配器共用一个模型，随时切换，关掉就与原来逐位相同；合并导出完整的模型。

运行：
    python lora_chat.py                                   # 小世界的模型：教有礼、简短两种口气，各几秒
    python lora_chat.py --model smollm2                   # SmolLM2-135M，离线，CPU 上几分钟
    python lora_chat.py --chat                            # 学完（或上次学好的）接着聊：switch terse、switch base
    python lora_chat.py --adapter 甲 --adapter 乙 --chat   # 不训练，拿别处训练好的聊；甲、乙是文件夹
    python lora_chat.py --adapter 甲 --questions "你好" "你是谁？"   # 不用人在旁边，一次问完
    python lora_chat.py --dataset 我的对话.jsonl            # 学自己的对话，适配器叫 mine
    python lora_chat.py --export 新文件夹                   # 把第一个适配器合并进去，存成完整的模型
    python ../qwen_chinese_finetune/chat.py --adapter outputs/tiny/lora_chat/terse   # 在 Qwen 链的聊天里用

预期输出（实测见本文件夹的 README.md）：同一题，原来的模型整句回答，有礼的先道谢、照样答对，简短的只答一个词、答对的少一些。

ChatGLM（一到三代）用不了：它的分词器自 transformers 4.34 起载入就出错，仓库里的代码也没有再改；GLM-4 以后的可以。

参考：Hu et al. 2021（LoRA）；PEFT 0.21 的文档。
"""

from nlp_common.base.cli import run_main

from collections import deque
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import nn

from adapter_files import base_name, export, load_adapter, merge_into
from lora_by_hand import matching_linears, trainable
from nlp_common.base.arguments import COUNT, POSITIVE, option
from nlp_common.base.errors import UserError
from nlp_common.draw.plots import line_chart
from nlp_common.hub.models import require_model
from nlp_common.lm.adapters import WEIGHTS, base_of, name_adapters, require_peft, weights_mark, write_base
from nlp_common.lm.chatml import prompt_ids
from nlp_common.lm.speaker import Reply, Speaker, adapted, load_speaker, room, say
from nlp_common.train.chain import chain_model
from nlp_common.train.lesson import result_folder, run_lesson, run_part
from nlp_common.train.settings import LoopSettings, parse_settings
from nlp_common.train.sft import train_on_chats
from nlp_common.train.stage import Stage
from start import fill_in, heldout_loss, is_real, load_start, own_chats
from styles import STYLES, language_of, measure_style, style_chats, style_questions

HOME = Path(__file__).resolve().parent
FULL_MODEL = "Qwen/Qwen1.5-0.5B-Chat"
PRESETS: dict[str, dict] = {"tiny": {}, "full": {}}
# 没给的参数：小世界的模型与真的模型（Qwen、SmolLM2）各一组，与预设无关
SMALL = {
    "max_train_samples": 1600,
    "num_train_epochs": 1.0,
    "learning_rate": 5e-3,
    "per_device_train_batch_size": 16,
    "n_questions": 200,
    "max_new_tokens": 32,
}
REAL = {
    "max_train_samples": 800,
    "num_train_epochs": 3.0,
    "learning_rate": 2e-3,
    "per_device_train_batch_size": 8,
    "n_questions": 200,
    "max_new_tokens": 48,
}
MEMORY = 5  # 聊天记得几轮


@dataclass
class LoraChatSettings(LoopSettings):
    COMMON: ClassVar[dict] = {
        name: value for name, value in LoopSettings.COMMON.items() if name != "num_train_epochs"
    } | {"adam_beta2": 0.98, "max_length": 512, "logging_steps": 5}
    NOT_IN_FINGERPRINT: ClassVar[set[str]] = LoopSettings.NOT_IN_FINGERPRINT | {
        "adapter",
        "chat",
        "export",
        "questions",
        "temperature",
        "top_p",
        "max_new_tokens",
    }
    model: str | None = option("原模型：hub 名、本地文件夹或 smollm2；默认是 Qwen 链 tiny 预设的 SFT 模型")
    dataset: str | None = option("学自己的对话：json、jsonl 等文件，写法同 SFT；默认学有礼、简短两种口气")
    source: Literal["hf", "modelscope"] = option("hub 名从哪里下载", "hf")
    target: str = option("接在哪些层：attention、mlp、all，或逗号隔开的名字", "all")
    r: int = option("秩", 8, COUNT)
    alpha: float = option("α：ΔW 乘上 α/r", 16.0, POSITIVE)
    n_questions: int | None = option("评测用几道留出的题", None, COUNT)
    adapter: list[str] | None = field(
        default=None,
        metadata={"help": "不训练，用这个适配器：文件夹，或 名字=文件夹；可以给几次", "action": "extend"},
    )
    questions: list[str] | None = field(
        default=None, metadata={"help": "问这几句，原模型与每个适配器各答一遍", "nargs": "+"}
    )
    chat: bool = option("聊天：switch 名字 换适配器，switch base 不用适配器", False)
    export: str | None = option("把第一个适配器合并进去，完整的模型存到这个还不存在的文件夹")
    max_new_tokens: int | None = option("一次最多说多少个 token")
    temperature: float = option("采样温度：0 是贪心", 0.0)
    top_p: float = option("核采样", 1.0)

    def check(self) -> None:
        if "chatglm" in (self.model or "").lower():
            raise UserError(
                f"--model {self.model} 用不了：ChatGLM（一到三代）的分词器自 transformers 4.34 起载入就出错，"
                "它还要运行仓库里自带的代码；请换成 Qwen 一类的，例如 --model Qwen/Qwen1.5-0.5B-Chat。"
            )
        fill_in(self, SMALL, REAL)


# ---------------------------------------------------------------- 1. 数据：学什么口气，怎样量


def prepare(settings) -> tuple[dict[str, list[dict]], list[dict]]:
    """→ ({适配器: 训练的对话}, 留出的题；--dataset 是留出的对话)。"""
    if settings.dataset:
        mine, heldout, _ = own_chats(settings.dataset, settings.max_train_samples, settings.source)
        return {"mine": mine}, heldout
    asked, heldout = style_questions(settings)
    return {style: style_chats(style, asked, language_of(settings)) for style in STYLES}, heldout


def measure(settings, model, tokenizer, heldout: list[dict]) -> dict[str, float]:
    if settings.dataset:
        return {"heldout_loss": heldout_loss(model, tokenizer, heldout, settings.max_length)}
    return measure_style(model, tokenizer, heldout, language_of(settings), settings.max_new_tokens)


# ---------------------------------------------------------------- 2. PEFT：装上两个适配器，各训练各的


def with_adapters(model, names: list[str], settings):
    """get_peft_model 冻住原来的权重，各层旁边装上 A、B；每个名字一套。"""
    peft = require_peft()
    linears = matching_linears(model, settings.target)
    limit = min(min(linear.weight.shape) for linear in linears.values())
    if settings.r > limit:
        raise UserError(f"--r {settings.r} 比矩阵的秩还大：接的层里最小的一边是 {limit}。")
    if fused := [name for name, p in model.named_parameters() if p.dim() == 3 and "expert" in name]:
        print(f"（{fused[0]} 是三维的参数：transformers 5 把各专家叠在一起，--target 够不着，这些层不学。）")
    chosen = sorted({name.rsplit(".", 1)[-1] for name in linears})
    config = peft.LoraConfig(
        r=settings.r, lora_alpha=settings.alpha, target_modules=chosen, task_type="CAUSAL_LM"
    )
    adapted_model = peft.get_peft_model(model, config, adapter_name=names[0])
    for name in names[1:]:
        adapted_model.add_adapter(name, config)
    return adapted_model


def train_one(part: Stage, name: str, model, tokenizer, chats: list[dict]) -> dict:
    label = STYLES.get(name, name).split("|")[0]
    trained = train_on_chats(part, label, model, tokenizer, chats)
    losses = [[row["step"], row["loss"]] for row in trained.history]
    return {"seconds": trained.metrics["train_seconds"], "losses": losses}


@torch.no_grad()
def logits_of(model, tokenizer, heldout: list[dict]) -> torch.Tensor:
    ids = prompt_ids(tokenizer, heldout[0]["messages"])
    return model(torch.tensor([ids], device=model.device)).logits


def learn(stage: Stage, path: str, base: str) -> dict:
    settings = stage.settings
    tokenizer, model = load_start(path, stage.device)
    chats, heldout = prepare(settings)
    mark, before = weights_mark(model), logits_of(model, tokenizer, heldout)
    rows = {"base": measure(settings, model, tokenizer, heldout)}
    n_base = sum(p.numel() for p in model.parameters())
    peft_model = with_adapters(model, list(chats), settings)  # A、B 就装在 model 里：下面照常用 model

    metrics: dict = {}
    curves = {}
    for name, rows_of in chats.items():
        peft_model.set_adapter(name)  # 前向只用它，也只有它在训练
        weights = trainable(model)
        metrics |= {"trainable": sum(p.numel() for p in weights.values())}
        work = partial(train_one, name=name, model=model, tokenizer=tokenizer, chats=rows_of)
        done = run_part(stage, name, work, nn.ParameterList(weights.values()))  # 中断以后只读回 A、B
        if not all(p.any() for key, p in weights.items() if "lora_B" in key):
            raise UserError(
                f"{name} 没有学到，B 还是 0：步数太少，学习率还在预热（第一步是 0）。"
                "请多给几步（--num_train_epochs），或不预热（--warmup_steps 0）。"
            )
        metrics[f"train_seconds_{name}"], curves[name] = done["seconds"], done["losses"]
        rows[name] = measure(settings, model, tokenizer, heldout)
    with peft_model.disable_adapter():
        off = (logits_of(model, tokenizer, heldout) - before).abs().max().item()
    metrics |= {"trainable_share": metrics["trainable"] / n_base, "off_difference": off, "rows": rows}

    def write(folder: Path) -> None:
        peft_model.save_pretrained(folder)  # 每个适配器一个文件夹
        for name in chats:
            write_base(folder / name, base, mark)
        if any(curves.values()):
            draw(folder / "loss.svg", curves)

    folder = stage.folder.work / "sizes"
    write(folder)
    metrics["adapter_mb"] = (folder / next(iter(chats)) / WEIGHTS).stat().st_size / 1e6
    metrics["base_mb"] = n_base * 4 / 1e6
    show(metrics)
    name = settings.dataset or ("facts" if is_real(settings) else "tiny_world")
    return stage.save(metrics, {"train": {"name": name, "rows": len(next(iter(chats.values())))}}, write)


def show(metrics: dict) -> None:
    print(
        f"\n训练 {metrics['trainable']:,} 个参数（{metrics['trainable_share']:.2%}），"
        f"一个适配器 {metrics['adapter_mb']:.2f} MB，原模型 {metrics['base_mb']:.1f} MB；"
        f"关掉适配器，logits 与原来差 {metrics['off_difference']:.1g}"
    )
    names = {"courteous": "有礼", "terse": "简短", "right": "答对", "heldout_loss": "留出损失"}
    for name, row in metrics["rows"].items():
        print(f"  {name:<12}" + "  ".join(f"{names[key]} {value:.3f}" for key, value in row.items()))


def draw(path: Path, curves: dict[str, list]) -> None:
    series = {
        STYLES.get(name, name): tuple(zip(*points, strict=True)) for name, points in curves.items() if points
    }
    line_chart(path, series, "两个适配器各学各的|Two adapters, one model", "步|step", "损失|loss")


# ---------------------------------------------------------------- 3. 聊天：一个模型，几个适配器


class Talk:
    """一段对话：原模型与几个适配器共用权重，谁答都记得前几轮。"""

    def __init__(self, settings, base: Speaker, folders: dict[str, Path]):
        self.settings, self.base, self.folders = settings, base, folders
        self.speakers = {"base": base}
        self.name = "base"
        self.turns: deque[list[dict]] = deque(maxlen=MEMORY)

    def switch(self, name: str) -> None:
        if name != "base" and name not in self.folders:
            known = "、".join(["base", *self.folders])
            raise UserError(f"没有叫 {name or '（空的）'} 的适配器，可以换成：{known}。")
        if name not in self.speakers:
            self.speakers[name] = adapted(self.base, name, self.folders[name], self.settings.seed)
        self.name = name

    def ask(self, question: str) -> str:
        speaker, user = self.speakers[self.name], {"role": "user", "content": question}
        while True:  # 装不下就从最早的一轮丢起
            ids = prompt_ids(speaker.tokenizer, [m for turn in self.turns for m in turn] + [user])
            if len(ids) <= room(speaker, self.settings) or not self.turns:
                break
            self.turns.popleft()
        if len(ids) > room(speaker, self.settings):
            raise UserError(f"这一句太长了：{len(ids)} 个 token。请缩短，或调小 --max_new_tokens。")
        print(f"{self.name}：", end="", flush=True)
        reply = Reply()
        say(speaker, ids, self.settings, reply)
        print("" if reply.end else "……（没有说完，到了 --max_new_tokens）")
        self.turns.append([user, {"role": "assistant", "content": reply.text}])
        return reply.text


def ask_all(talk: Talk, questions: list[str]) -> dict[str, list[str]]:
    """每一句，原模型与每个适配器各答一遍，互不相干 → {谁: 各句的回答}。"""
    said: dict[str, list[str]] = {name: [] for name in ["base", *talk.folders]}
    for question in questions:
        print(f"\n问：{question}")
        for name, replies in said.items():
            talk.turns.clear()
            talk.switch(name)
            replies.append(talk.ask(question))
    return said


def chat(talk: Talk) -> None:
    talk.switch(next(iter(talk.folders)))
    print(f"现在用 {talk.name}。命令：switch 名字（{'、'.join(['base', *talk.folders])}）、clear、quit。")
    while True:
        try:
            line = input("你：").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        words = line.split()
        try:
            if line in ("quit", "exit", "退出"):
                return
            if words[:1] == ["switch"] and len(words) <= 2:
                talk.switch(words[1] if len(words) == 2 else "")
                print(f"（换成 {talk.name}，前面的对话还记得。）")
            elif line == "clear":
                talk.turns.clear()
                print("（清空了。）")
            elif line:
                talk.ask(line)
        except UserError as error:
            print(f"（{error}）")
        except KeyboardInterrupt:
            print("……（停下了）")


def talk_with(settings, folders: dict[str, Path], base: str) -> dict[str, list[str]]:
    """载入原模型与适配器，问 --questions、聊天、导出。"""
    path = require_model(base, settings.source)
    talk = Talk(settings, load_speaker("base", path, settings.seed), folders)
    for name in folders:  # 不是它的、坏了的，开头就说
        talk.switch(name)
    said = ask_all(talk, settings.questions) if settings.questions else {}
    if settings.export:
        name, folder = next(iter(folders.items()))
        tokenizer, model = load_start(path, torch.device("cpu"))
        merge_into(model, load_adapter(folder))
        for file, sha256 in export(model, tokenizer, Path(settings.export).expanduser()).items():
            print(f"{name} 合并好了：{Path(settings.export) / file}  sha256 {sha256}")
    if settings.chat:
        talk.turns.clear()
        chat(talk)
    return said


# ---------------------------------------------------------------- 4. 主程序


def examples(settings) -> list[str]:
    heldout = prepare(settings)[1]
    return [q["messages"][0]["content"] for q in heldout if len(q["messages"]) == 1][:2]


def main(argv: list[str] | None = None) -> dict:
    settings = parse_settings(LoraChatSettings, PRESETS, argv, FULL_MODEL)
    if settings.adapter:
        folders = name_adapters(settings.adapter)
        base = settings.model or base_of(next(iter(folders.values())))
        return {"replies": talk_with(settings, folders, base)}
    if settings.preset == "full" and settings.model is None:
        settings.model = FULL_MODEL
    found = chain_model("sft", settings.model, settings.source)
    base = base_name(settings.model, found["path"])
    name = "lora_chat" + ("_smollm2" if settings.model == "smollm2" else "")
    learn_it = partial(learn, path=found["path"], base=base)
    record = run_lesson(name, HOME, settings, learn_it, start=f"{found['stage']}:{found['id']}")
    folder = result_folder(name, HOME, settings)
    folders = {each: folder / each for each in record["metrics"]["rows"] if each != "base"}
    if settings.questions is None and not settings.dataset and not settings.chat:
        settings.questions = examples(settings)
    return record | {"replies": talk_with(settings, folders, base)}


if __name__ == "__main__":
    run_main(main)
