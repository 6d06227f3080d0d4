"""归纳头：模型怎样学会"上次在这个词后面出现的是什么，这次就接什么"，一步一步看它长出来。

你会学到
  1. 两层合起来才抄得成：第一层的头把"前一个是谁"写进每个位置，第二层的头去找"前一个和我一样"的位置，抄它。
  2. 三个分数认得出这样的头：看前一个（previous）、看相同的（duplicate）、看相同的后一个（induction）。
  3. 它不是慢慢变好的：有一段几百步的突变，归纳分数升起来，重复部分的 loss 同时落下去。
  4. 是不是它，去掉就知道：去掉归纳头或"看前一个"的头，抄不成了；去掉别的头，照抄不误。分数高的头不一定有人用。

怎么运行
  python induction_heads.py                    # 在随机的重复序列上训练一个两层的小 Qwen
  python induction_heads.py --model smollm2    # 不训练，看真模型里有没有
  python induction_heads.py --model ../qwen_chinese_finetune/outputs/tiny/sft     # 链上的小模型里没有

应当看到（tiny，实测见本文件夹的 README.md）：归纳分数从 0.03 升到 0.9 以上，抄对从瞎猜到全对；去掉一个头就抄不成了。

参考：Elhage et al. 2021；Olsson et al. 2022（In-context Learning and Induction Heads）。
"""

from nlp_common.base.cli import run_main

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.utils import logging

from nlp_common.base.arguments import COUNT, NOT_NEGATIVE, POSITIVE, option
from nlp_common.base.errors import UserError
from nlp_common.draw.plots import bar_chart, line_chart
from nlp_common.train.lesson import run_lesson, run_part
from nlp_common.train.progress import progress_bar
from nlp_common.train.settings import parse_settings
from nlp_common.train.stage import Stage
from questions import ids_sha256
from readers import HOME, ReaderSettings, find_reader, load_reader, need_language_model, without_heads

PRESETS = {
    "tiny": {"steps": 2400, "hidden": 64, "heads": 4, "vocab": 64, "half": 24},
    "full": {"steps": 6000, "hidden": 128, "heads": 8, "vocab": 512, "half": 50},
}
BATCH, SHORTEST = 32, 8  # 一步几条序列；训练时一半至少多长
TESTED = 64  # 量分数、量正确率用几条序列
CLEAR = 0.3  # 分数超过它，就叫它归纳头（或看前一个的头）


@dataclass
class InductionSettings(ReaderSettings):
    steps: int | None = option("训练多少步", limits=COUNT)
    hidden: int | None = option("小模型的宽度", limits=COUNT)
    heads: int | None = option("小模型每层几个头", limits=COUNT)
    vocab: int | None = option("随机序列里有几种 token", limits=COUNT)
    half: int | None = option("序列的一半最长多长；后一半是前一半的重复", limits=COUNT)
    learning_rate: float = option("学习率", 3e-3, POSITIVE)
    thrift: float = option(
        "训练的后一半，每个头的大小要付的代价：0 是不收，头就个个都当归纳头", 0.02, NOT_NEGATIVE
    )

    def check(self) -> None:
        if self.hidden % self.heads or self.hidden // self.heads % 2:
            raise UserError(
                f"--hidden {self.hidden} 要是 --heads {self.heads} 的偶数倍：每个头一样宽，RoPE 两个数一对。"
            )
        if self.half < SHORTEST:
            raise UserError(f"--half 至少是 {SHORTEST}，给的是 {self.half}。")
        if self.vocab < self.half:
            raise UserError(f"--vocab {self.vocab} 不能小于 --half {self.half}：一半里的 token 各不相同。")


# ---------------------------------------------------------------- 1. 数据与三个分数


def repeated(tokens: torch.Tensor, half: int, rows: int, generator: torch.Generator) -> torch.Tensor:
    """随机的一半再重复一遍，(rows, 2·half)；一半里各不相同。前一半谁也猜不到，后一半只要会抄就全对。"""
    first = torch.stack(
        [tokens[torch.randperm(len(tokens), generator=generator)[:half]] for _ in range(rows)]
    )
    return torch.cat([first, first], dim=1)


@torch.no_grad()
def head_scores(model, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """重复序列 ids (B, 2n) 上每个头的三个分数，各 (L, H)，都是注意力的平均，在 0 到 1 之间。

    previous：位置 t 看 t−1。duplicate：后一半的 t 看 t−n，就是前一半里相同的 token。
    induction：后一半的 t 看 t−n+1，相同的那个 token 的后一个，正是要抄的。
    """
    half = ids.shape[1] // 2
    maps = model(ids, output_attentions=True).attentions  # L 个 (B, H, T, T)
    every, second = torch.arange(1, 2 * half), torch.arange(half, 2 * half)
    scores: dict[str, list] = {"previous": [], "duplicate": [], "induction": []}
    for weights in maps:
        scores["previous"].append(weights[:, :, every, every - 1].mean((0, 2)))
        scores["duplicate"].append(weights[:, :, second, second - half].mean((0, 2)))
        scores["induction"].append(weights[:, :, second, second - half + 1].mean((0, 2)))
    return {name: torch.stack(rows).float().cpu() for name, rows in scores.items()}


@torch.no_grad()
def copying(model, ids: torch.Tensor) -> tuple[float, float]:
    """后一半上 (抄对的比例, loss)。第一个重复的 token 还看不出是重复，从第二个算起。"""
    half = ids.shape[1] // 2
    logits = model(ids).logits[:, half:-1]  # (B, n−1, V)
    target = ids[:, half + 1 :]
    loss = F.cross_entropy(logits.flatten(0, 1).float(), target.flatten())
    return (logits.argmax(-1) == target).float().mean().item(), loss.item()


# ---------------------------------------------------------------- 2. 训练


def build_model(settings: InductionSettings) -> Qwen2ForCausalLM:
    """两层的 Qwen2，随机初始化。一层不行：归纳要先有"前一个是谁"，再去找。"""
    config = Qwen2Config(
        vocab_size=settings.vocab,
        hidden_size=settings.hidden,
        intermediate_size=settings.hidden,
        num_hidden_layers=2,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads,
        max_position_embeddings=4 * settings.half,
        initializer_range=0.08,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},  # 序列短，转得快些才分得清前一个
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        dtype=torch.float32,
    )
    config._attn_implementation = "eager"  # 要看权重
    return Qwen2ForCausalLM(config)


def train(model, settings: InductionSettings) -> list[dict]:
    """训练，每 25 步量一次 → 经过：step、loss（后一半）、accuracy、三个分数各自最高的头。"""
    optimizer = torch.optim.AdamW(model.parameters(), settings.learning_rate, weight_decay=0.01, fused=True)
    generator = torch.Generator().manual_seed(settings.seed)
    tokens = torch.arange(settings.vocab)
    test = repeated(tokens, settings.half, TESTED, torch.Generator().manual_seed(settings.seed + 10_000))
    history = []
    bar = progress_bar("归纳头", settings.steps, 0)
    for step in range(settings.steps + 1):
        if step % 25 == 0:
            history.append({"step": step, **measure(model, test)})
            bar.set_postfix_str(f"归纳 {history[-1]['induction']:.2f}", refresh=False)
        # 每步换一个长度：总是一样长，只记"隔几个"就够了，学不到"找相同的"
        half = int(torch.randint(SHORTEST, settings.half + 1, (1,), generator=generator))
        ids = repeated(tokens, half, BATCH, generator)  # (B, 2n)
        logits = model(ids).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        if 2 * step >= settings.steps:
            loss = loss + settings.thrift * head_sizes(model, settings.heads)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        bar.update(1)
    bar.close()
    return history


def head_sizes(model, heads: int) -> torch.Tensor:
    """每个头的 W_V 与 W_O 的长度，加起来（组稀疏，Yuan & Lin 2006）：可有可无的头会缩到 0，只留用得着的。

    不收这个代价，同一层的几个头会一起变成归纳头，互相顶替，去掉哪一个都不要紧。
    """
    total = torch.zeros(())
    for layer in model.model.layers:
        value = layer.self_attn.v_proj.weight.unflatten(0, (heads, -1))  # (H, d, C)
        output = layer.self_attn.o_proj.weight.unflatten(1, (heads, -1))  # (C, H, d)
        total = total + (value.pow(2).sum((1, 2)) + output.pow(2).sum((0, 2))).sqrt().sum()
    return total


def measure(model, test: torch.Tensor) -> dict:
    accuracy, loss = copying(model, test)
    scores = head_scores(model, test)
    return {
        "loss": loss,
        "accuracy": accuracy,
        **{name: float(values.max()) for name, values in scores.items()},
    }


# ---------------------------------------------------------------- 3. 去掉几个头


def ablate(model, scores: dict[str, torch.Tensor], test: torch.Tensor) -> dict:
    """去掉一个头、一类头，后一半还抄得对多少。"""
    layers, heads = scores["induction"].shape
    each = {}
    for layer in range(layers):
        for head in range(heads):
            with without_heads(model, [(layer, head)]):
                each[name_of((layer, head))] = copying(model, test)[0]
    induction, previous = (
        where(scores[name] > CLEAR) or [top(scores[name])] for name in ("induction", "previous")
    )
    result: dict = {"accuracy_without": each}
    with without_heads(model, induction):
        result["accuracy_without_all_induction"] = copying(model, test)[0]
    # 分数高、去掉又最伤的，才是真在抄的那个：别的也看着同一个地方，只是没有人用它们取来的东西
    copier, source = (min(group, key=lambda at: each[name_of(at)]) for group in (induction, previous))
    rest = [value for name, value in each.items() if name not in (name_of(copier), name_of(source))]
    result["head"], result["previous_head"] = name_of(copier), name_of(source)
    result["accuracy_without_head"] = each[name_of(copier)]
    result["accuracy_without_previous_head"] = each[name_of(source)]
    result["accuracy_without_one_other"] = min(rest)
    result["heads_above"] = int((scores["induction"] > CLEAR).sum())
    return result


def name_of(at: tuple[int, int]) -> str:
    return f"layer{at[0]}.head{at[1]}"


def where(chosen: torch.Tensor) -> list[tuple[int, int]]:
    return [(int(layer), int(head)) for layer, head in chosen.nonzero()]


def top(scores: torch.Tensor) -> tuple[int, int]:
    """(L, H) 的分数里最高的那个头：(层, 头)。"""
    return divmod(int(scores.argmax()), scores.shape[1])


# ---------------------------------------------------------------- 4. 从头到尾


def learn(stage: Stage) -> dict:
    settings = stage.settings
    logging.disable_progress_bar()  # 存几百 KB 的模型，不用进度条
    torch.manual_seed(settings.seed)
    model = build_model(settings)
    history: list[dict] = []

    def work(part: Stage) -> dict:
        history.extend(train(model, settings))
        return {"history": json.dumps(history)}

    print(f"训练 {settings.steps} 步：{settings.vocab} 种 token 的随机序列，后一半重复前一半")
    part = run_part(stage, "train", work, model)
    history = json.loads(part["history"])
    model.eval()
    test = repeated(
        torch.arange(settings.vocab),
        settings.half,
        TESTED,
        torch.Generator().manual_seed(settings.seed + 20_000),
    )
    scores = head_scores(model, test)
    accuracy, loss = copying(model, test)
    result = ablate(model, scores, test)
    metrics = {
        "induction_score_before": history[0]["induction"],
        "induction_score": float(scores["induction"].max()),
        "previous_score": float(scores["previous"].max()),
        "accuracy_before": history[0]["accuracy"],
        "accuracy": accuracy,
        "repeat_loss_before": history[0]["loss"],
        "repeat_loss": loss,
        "step_of_score_half": first_step(history, "induction", 0.5),
        "step_of_accuracy_half": first_step(history, "accuracy", 0.5),
        **result,
        "scores": as_table(scores),
    }
    report(metrics, scores)

    def write(folder: Path) -> None:
        model.save_pretrained(folder)
        draw(folder, history, metrics)

    data = {
        "train": {
            "name": "repeated",
            "kind": "builtin",
            "rows": settings.steps * BATCH,
            "sha256": ids_sha256(test.tolist()),
        }
    }
    return stage.save(metrics, data, write, history)


def learn_from_model(stage: Stage, found: dict) -> dict:
    """--model：不训练，在随机 token 的重复序列上量一个现成的模型。"""
    settings = stage.settings
    reader = load_reader(found)
    need_language_model(reader)
    special = set(reader.tokenizer.all_special_ids)
    tokens = torch.tensor([i for i in range(len(reader.tokenizer)) if i not in special])
    half = min(settings.half, len(tokens), reader.model.config.max_position_embeddings // 2)
    rows = TESTED if reader.layers <= 4 else 8  # 大模型慢，少量几条
    test = repeated(tokens, half, rows, torch.Generator().manual_seed(settings.seed))
    scores = head_scores(reader.model, test)
    accuracy, loss = copying(reader.model, test)
    metrics = {
        "induction_score": float(scores["induction"].max()),
        "previous_score": float(scores["previous"].max()),
        "duplicate_score": float(scores["duplicate"].max()),
        "accuracy": accuracy,
        "repeat_loss": loss,
        **ablate_few(reader.model, scores, test),
    }
    if reader.layers * reader.heads <= 32:
        metrics["scores"] = as_table(scores)
    report(metrics, scores)

    def write(folder: Path) -> None:
        (folder / "scores.json").write_text(json.dumps(as_table(scores), indent=1), encoding="utf-8")

    data = {
        "test": {"name": "repeated", "kind": "builtin", "rows": rows, "sha256": ids_sha256(test.tolist())}
    }
    return stage.save(metrics, data, write)


def ablate_few(model, scores: dict[str, torch.Tensor], test: torch.Tensor) -> dict:
    """大模型里归纳头有好多个，互相顶替：去掉分数最高的 1、4、16 个，与去掉同样多个别的头比。"""
    order = scores["induction"].flatten().argsort(descending=True)
    heads = [divmod(int(place), scores["induction"].shape[1]) for place in order]
    result = {}
    for count in (1, 4, 16):
        if 2 * count > len(heads):
            break
        best, others = heads[:count], heads[len(heads) // 2 :][:count]  # 排在后一半的头，不是归纳头
        with without_heads(model, best):
            result[f"accuracy_without_top{count}"] = copying(model, test)[0]
        with without_heads(model, others):
            result[f"accuracy_without_other{count}"] = copying(model, test)[0]
    result["accuracy_without_head"] = result["accuracy_without_top1"]
    return result


def first_step(history: list[dict], name: str, limit: float) -> int:
    """第一次到 limit 的那一步；没有是 −1。"""
    for row in history:
        if row[name] >= limit:
            return row["step"]
    return -1


def as_table(scores: dict[str, torch.Tensor]) -> dict:
    layers, heads = scores["induction"].shape
    return {
        f"layer{n}.head{h}": {name: float(values[n, h]) for name, values in scores.items()}
        for n in range(layers)
        for h in range(heads)
    }


def report(metrics: dict, scores: dict[str, torch.Tensor]) -> None:
    print(f"后一半抄对 {metrics['accuracy']:.3f}，loss {metrics['repeat_loss']:.3f}")
    print("分数最高的头    看前一个  看相同的  归纳    去掉它之后抄对")
    best = scores["induction"].flatten().topk(min(4, scores["induction"].numel())).indices.tolist()
    best += scores["previous"].flatten().topk(2).indices.tolist()
    for place in best:
        layer, head = divmod(place, scores["induction"].shape[1])
        left = metrics.get("accuracy_without", {}).get(name_of((layer, head)))
        cells = "    ".join(
            f"{float(scores[name][layer, head]):.3f}" for name in ("previous", "duplicate", "induction")
        )
        print(f"  第 {layer} 层头 {head}    {cells}" + ("" if left is None else f"     {left:.3f}"))
    print()


def draw(folder: Path, history: list[dict], metrics: dict) -> None:
    steps = [row["step"] for row in history]
    top_loss = max(row["loss"] for row in history)
    series = {
        "归纳分数|induction score": (steps, [row["induction"] for row in history]),
        "看前一个的分数|previous-token score": (steps, [row["previous"] for row in history]),
        "抄对|copied right": (steps, [row["accuracy"] for row in history]),
        "loss ÷ 最高|loss / highest": (steps, [row["loss"] / top_loss for row in history]),
    }
    line_chart(
        folder / "rise.svg", series, "归纳头长出来的时候|When the induction head appears", "步数|step", ""
    )
    left, score = {}, {}
    for name, row in metrics["scores"].items():
        short = name.replace("layer", "").replace(".head", ".")
        left[short], score[short] = metrics["accuracy_without"][name], row["induction"]
    series = {"去掉这个头还抄对|copied right without it": left, "它的归纳分数|its induction score": score}
    bar_chart(folder / "ablation.svg", series, "去掉一个头|One head removed", "层.头|layer.head", "")


def main(argv: list[str] | None = None) -> dict:
    settings = parse_settings(InductionSettings, PRESETS, argv, None)
    if not settings.model:
        return run_lesson("induction_heads", HOME, settings, learn)
    found = find_reader(settings)
    return run_lesson(
        "induction_heads", HOME, settings, partial(learn_from_model, found=found), model_id=found["id"]
    )


if __name__ == "__main__":
    run_main(main)
