"""KTO：不要成对的回答，只要每个回答一个赞或一个踩。

学到什么：人更在意损失（前景理论），KTO 的损失怎样从它来；参考点 z₀ 是什么，为什么用"张冠李戴"的回答估计；
赞多踩少、标错了的时候怎么办。数据便宜得多：线上的每一次点赞、点踩都是一行，不必同一个问题写两个回答。

运行：
    python kto_alignment.py                                 # 自动选预设
    python kto_alignment.py --dataset 我的.jsonl            # 每行 prompt、completion、label（true 是赞）；偏好对也行
    python kto_alignment.py --noise 0.2 --output_dir outputs/tiny/kto-noise     # 两成的标签标反
    python kto_alignment.py --sweep --output_dir outputs/tiny/kto-sweep         # 标错几成、赞占几成，各训练一次
    python kto_alignment.py --preset full                   # DPO-En-Zh-20k 拆成单个的，需要加速器

预期输出（tiny，实测见本文件夹的 README.md）：又对、又完整、又有礼的回答从两成多到九成以上，正确率不降。

参考：Ethayarajh et al. 2024（KTO）式 7、式 8；Kahneman & Tversky 1979（前景理论）。
"""

from nlp_common.base.cli import run_main

import dataclasses
import random
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

import dpo_chinese_qwen
from chain import CHAIN
from dpo_chinese_qwen import add_references, logps_of, sequence_logps
from nlp_common.base.arguments import NOT_NEGATIVE, SHARE, option
from nlp_common.base.errors import UserError
from nlp_common.data.chats import to_thumbs
from nlp_common.draw.plots import bar_chart
from nlp_common.lm.chatml import answer_ids, encode_text, prompt_ids
from nlp_common.lm.loading import load_chat_lm
from nlp_common.lm.pairs import count_pairs, pair_length, pair_tokens
from nlp_common.tiny import world
from nlp_common.tiny.judge import measure_chat
from nlp_common.train.chain import run_stage
from nlp_common.train.lesson import run_part
from nlp_common.train.loop import Trained, train_loop
from nlp_common.train.settings import StageSettings, parse_settings
from nlp_common.train.splits import EVAL_SEED, drop_long, load_train_and_eval
from nlp_common.train.stage import Stage

PRESETS = {
    "tiny": {
        "dataset": "tiny_world",
        "max_train_samples": 3000,
        "max_length": 256,
        "per_device_train_batch_size": 8,
        "learning_rate": 3e-4,
        "adam_beta2": 0.98,
        "beta": 0.3,
    },
    "full": {
        "dataset": "shibing624/DPO-En-Zh-20k-Preference:zh",
        "max_train_samples": 5000,
        "max_length": 512,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 4,
        "learning_rate": 5e-6,
        "beta": 0.1,
    },
}
# --sweep 的各个对照，只换这几样
EVEN = {"desirable_weight": 1.0, "undesirable_weight": 1.0}
VARIANTS = {
    "noise_10": {"noise": 0.1},
    "noise_20": {"noise": 0.2},
    "noise_30": {"noise": 0.3},
    "good_10": {"desirable_share": 0.1},
    "good_10_even": {"desirable_share": 0.1} | EVEN,
    "good_90": {"desirable_share": 0.9},
    "good_90_even": {"desirable_share": 0.9} | EVEN,
}
LABELS = {
    "default": "照原样|as is",
    "noise_10": "标反一成|10% wrong",
    "noise_20": "标反两成|20% wrong",
    "noise_30": "标反三成|30% wrong",
    "good_10": "赞占一成|10% good",
    "good_10_even": "同左，不配平|unbalanced",
    "good_90": "赞占九成|90% good",
    "good_90_even": "同左，不配平 |unbalanced ",
}


@dataclass
class KTOSettings(StageSettings):
    beta: float | None = option("离参考模型多远的代价：越小走得越远")
    desirable_weight: float | None = option("赞的权重 λ_D；不给就按赞与踩的个数配平", None, NOT_NEGATIVE)
    undesirable_weight: float | None = option("踩的权重 λ_U；不给就按赞与踩的个数配平", None, NOT_NEGATIVE)
    desirable_share: float = option("从偏好对里取：赞占几成，其余取踩", 0.5, SHARE)
    noise: float = option("训练的标签里标反几成", 0.0, SHARE)
    sweep: bool = option("再训练几个对照：标反 1～3 成，赞只占一成、占九成，配平与不配平", False)

    def check(self) -> None:
        super().check()
        self.check_loop_only()
        if self.per_device_train_batch_size < 2:
            raise UserError("--per_device_train_batch_size 至少 2：参考点 z₀ 要用同一批里别的回答来估计。")


# ---------------------------------------------------------------- 1. 数据：一个回答，一个赞或踩


def thumbs(rows: list[dict], share: float, noise: float, rng: random.Random) -> list[dict]:
    """→ ``[{"prompt", "answer", "good"}]``。偏好对只取一边（赞占 share）；标签标反 noise。"""
    result = []
    for row in rows:
        if "chosen" in row:
            good = rng.random() < share
            answer = row["chosen" if good else "rejected"]
        else:
            good, answer = row["good"], row["answer"]
        if rng.random() < noise:
            good = not good
        result.append({"prompt": row["prompt"], "answer": answer[-1]["content"], "good": good})
    return result


def both_sides(rows: list[dict]) -> list[dict]:
    """留出的偏好对，两个回答都要：→ 同 thumbs。"""
    rng = random.Random(0)
    pairs = [row for row in rows if "chosen" in row]
    return (
        thumbs(pairs, 1.0, 0.0, rng)
        + thumbs(pairs, 0.0, 0.0, rng)
        + thumbs([row for row in rows if "chosen" not in row], 1.0, 0.0, rng)
    )


def encode(tokenizer, rows: list[dict]) -> list[dict]:
    """→ token，写成一对的样子，拼批、参考模型就与 DPO 的相同：chosen 是自己的回答，rejected 是"张冠李戴"的——
    上一行的回答接在这一行的提示后面，用来估计 z₀。

    踩的回答不带结尾的 <|im_end|>：它差在内容，不差在"说完了"（与 dpo_chinese_qwen.py 同样的道理）。
    """
    encoded = []
    for row, before in zip(rows, [rows[-1], *rows[:-1]], strict=True):
        encoded.append(
            {
                "prompt_ids": prompt_ids(tokenizer, row["prompt"]),
                "chosen_ids": ids_of(tokenizer, row),
                "rejected_ids": ids_of(tokenizer, before),
                "good": row["good"],
            }
        )
    return encoded


def ids_of(tokenizer, row: dict) -> list[int]:
    return (answer_ids if row["good"] else encode_text)(tokenizer, row["answer"])


def collate(rows: list[dict], pad_id: int) -> dict[str, torch.Tensor]:
    """B 行 → input_ids、labels (2B, T)：前 B 行是自己的回答，后 B 行是张冠李戴的；good (B,)，ref_logps (2B,)。"""
    return dpo_chinese_qwen.collate(rows, pad_id) | {"good": torch.tensor([row["good"] for row in rows])}


# ---------------------------------------------------------------- 2. 损失


def kto_loss(
    ratio: torch.Tensor, good: torch.Tensor, kl: torch.Tensor, beta: float, weights: tuple[float, float]
) -> torch.Tensor:
    """每个回答的损失 (B,)。ratio = log π(y|x) − log π_ref(y|x)，(B,)；good (B,)；kl 是参考点 z₀，一个数。

    式 7、式 8：v = σ(β(r − z₀))（赞）或 σ(β(z₀ − r))（踩），损失是 λ(1 − v)。比参考点好很多、坏很多都不再有梯度：
    已经很好的不必更好，怎么也学不会的（多半是标错了）不再纠缠。
    """
    value = torch.sigmoid(beta * torch.where(good, ratio - kl, kl - ratio))
    return torch.where(good, weights[0], weights[1]) * (1 - value)


def reference_point(ratio_other: torch.Tensor) -> torch.Tensor:
    """z₀：KL(π‖π_ref) 的估计，张冠李戴的回答上 log 比的平均，不小于 0，不求梯度。"""
    return ratio_other.mean().clamp(min=0).detach()


def batch_loss(
    model, batch: dict[str, torch.Tensor], beta: float, weights: tuple[float, float]
) -> tuple[torch.Tensor, dict]:
    logps = sequence_logps(model, batch["input_ids"], batch["labels"])  # (2B,)
    ratio, ratio_other = (logps - batch["ref_logps"]).chunk(2)  # 各 (B,)
    kl = reference_point(ratio_other)
    loss = kto_loss(ratio, batch["good"], kl, beta, weights)
    return loss.sum(), {"kl": kl.expand(len(loss)), "right": (ratio > kl) == batch["good"]}


def balanced(rows: list[dict], settings) -> tuple[float, float]:
    """(λ_D, λ_U)。没给就配平：少的一边加重，使 λ_D·赞的个数 = λ_U·踩的个数（论文建议两者之比在 1 到 4/3）。"""
    n_good = sum(row["good"] for row in rows)
    n_bad = len(rows) - n_good
    if 0 in (n_good, n_bad):
        raise UserError(
            f"训练的回答全是{'赞' if n_good else '踩'}：KTO 要两样都有。数据里要有 label 是 true 的，也有是 false 的；"
            "给的是偏好对，就不要把 --desirable_share 设成 0 或 1。"
        )
    most = max(n_good, n_bad)
    desirable, undesirable = settings.desirable_weight, settings.undesirable_weight
    return (
        most / n_good if desirable is None else desirable,
        most / n_bad if undesirable is None else undesirable,
    )


# ---------------------------------------------------------------- 3. 训练


def train_kto(stage: Stage, model, reference, tokenizer, rows: list[dict]) -> Trained:
    """rows：thumbs 的结果。"""
    settings, pad_id = stage.settings, tokenizer.pad_token_id
    weights = balanced(rows, settings)
    print(
        f"赞 {sum(row['good'] for row in rows)} 个，踩 {sum(not row['good'] for row in rows)} 个；权重 {weights}"
    )
    rows = drop_long(encode(tokenizer, rows), pair_length, settings.max_length, "训练数据")
    add_references(reference, rows, pad_id, settings.per_device_train_batch_size)
    loss = partial(batch_loss, beta=settings.beta, weights=weights)
    tokens, lengths = [pair_tokens(row) for row in rows], [pair_length(row) for row in rows]
    pad = partial(collate, pad_id=pad_id)
    return train_loop(stage, "KTO", model, rows, pad, loss, tokens, lengths, count_pairs)


@torch.no_grad()
def heldout_accuracy(model, reference, tokenizer, rows: list[dict], settings) -> float:
    """留出的回答里，log 比在参考点哪一边与赞、踩相符的占几成。"""
    encoded = encode(tokenizer, rows)
    encoded = drop_long(encoded, pair_length, settings.max_length, "留出数据")
    ratios = [logps_of(each, encoded, tokenizer.pad_token_id, 16) for each in (model, reference)]
    ratio, other = (ratios[0] - ratios[1]).T  # 各 (N,)
    good = torch.tensor([row["good"] for row in encoded])
    return ((ratio > reference_point(other)) == good).float().mean().item()


def measure(model, reference, tokenizer, heldout: list[dict], settings) -> dict:
    metrics = {"preference_accuracy": heldout_accuracy(model, reference, tokenizer, heldout, settings)}
    if settings.dataset == "tiny_world":
        questions = world.heldout_questions(settings.max_eval_samples, EVAL_SEED)
        metrics |= measure_chat(model, tokenizer, questions)[0]
    return metrics


def train_and_measure(
    part: Stage, changes: dict, model, reference, tokenizer, train_rows: list[dict], heldout: list[dict]
) -> dict:
    """--sweep 的一个对照：只换 changes 里的设置。"""
    part.settings = dataclasses.replace(part.settings, **changes)
    settings = part.settings
    rows = thumbs(train_rows, settings.desirable_share, settings.noise, random.Random(settings.seed))
    train_kto(part, model, reference, tokenizer, rows)
    return measure(model, reference, tokenizer, heldout, settings)


def train(stage: Stage) -> dict:
    settings = stage.settings
    tokenizer, reference = load_chat_lm(stage.model_path, stage.device)
    _, model = load_chat_lm(stage.model_path, stage.device)
    train_rows, heldout_rows, data = load_train_and_eval(settings, "pairs", to_thumbs)
    heldout = both_sides(heldout_rows)
    rows = thumbs(train_rows, settings.desirable_share, settings.noise, random.Random(settings.seed))
    trained = train_kto(stage, model, reference, tokenizer, rows)
    after = measure(model, reference, tokenizer, heldout, settings)
    before = measure(reference, reference, tokenizer, heldout, settings)
    names = ("qa_accuracy", "preferred_rate", "judge_score")
    metrics = after | trained.metrics | {f"{k}_before": before[k] for k in names if k in before}
    if settings.sweep:
        metrics["sweep"] = {"default": after}
        for name, changes in VARIANTS.items():
            _, other = load_chat_lm(stage.model_path, stage.device)
            work = partial(
                train_and_measure,
                changes=changes,
                model=other,
                reference=reference,
                tokenizer=tokenizer,
                train_rows=train_rows,
                heldout=heldout,
            )
            metrics["sweep"][name] = run_part(stage, name, work)
    draw = partial(draw_sweep, sweep=metrics.get("sweep"))
    return stage.finish(model, tokenizer, metrics, data, trained.history, state=trained.state, draw=draw)


def draw_sweep(folder: Path, sweep: dict[str, dict] | None) -> None:
    if not sweep or "judge_score" not in sweep["default"]:
        return
    names = {"judge_score": "程序评分|judge score", "qa_accuracy": "答对|correct"}
    series = {
        label: {LABELS[name]: metrics[key] for name, metrics in sweep.items()} for key, label in names.items()
    }
    bar_chart(folder / "sweep.svg", series, "标错、赞多踩少|Noise and imbalance", "", "")


def main(argv: list[str] | None = None) -> dict:
    settings = parse_settings(KTOSettings, PRESETS, argv, CHAIN.full_model)
    return run_stage("kto", settings, {"model": "sft"}, train, CHAIN)


if __name__ == "__main__":
    run_main(main)
