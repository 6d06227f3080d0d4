"""从量化好的模型开同一个服务：bitsandbytes 的 int8 与 NF4、手写的 int4、OpenVINO 的 int4，各占多少、答对几成、多快。

你会学到
  1. 服务只认座位（slot_model.py）：权重是几位的、谁在算，换一个载入的函数（quantized_models.py）就行，接口、队伍一点不变。
  2. 量化省的可能是磁盘，可能是内存，可能是每一步要读的字节，不一定快：CPU 上 bitsandbytes 的 int8 每一步都要压一遍、还原一遍，反而慢。
  3. 快的是一边还原一边乘的核：OpenVINO、llama.cpp、显卡上的 Marlin；小模型上连它们也不快，权重本来就在缓存里。
  4. 一台机器不够了：vLLM、SGLang 的命令；DeepSpeed 的推理哪里坏了，哪里能用。

怎么运行
  python quantized_deploy.py                        # 五种各开一个服务，问 512 道题，两三分钟
  python quantized_deploy.py --serve bnb_nf4 --port 8000          # 只开一种，直到 Ctrl-C
  python quantized_deploy.py --serve int4 --model outputs/tiny/quantization/packed    # quantization.py 存下的
  python quantized_deploy.py --commands --model 合并好的文件夹    # vLLM、SGLang、DeepSpeed 的命令
  python quantized_deploy.py --deepspeed                          # 一个进程；几块显卡：torchrun --nproc_per_node 2 quantized_deploy.py --deepspeed

应当看到（tiny，实测见本文件夹的 README.md）：四种都答得与 float32 差不多对；字节小到一半以下（int4 六分之一）；这个小模型在 CPU 上，没有一种比 float32 快多少。

参考：Dettmers et al. 2022、2023（LLM.int8()、QLoRA）；Kwon et al. 2023（vLLM）；DeepSpeed 的 8577 号问题。
"""

from nlp_common.base.cli import run_main

import re
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import deepspeed_part
from load_clients import ask_all, summary
from load_test import alone, running
from nlp_common.base.arguments import COUNT, Limits, option
from nlp_common.base.console import print_table
from nlp_common.base.errors import UserError
from nlp_common.draw.plots import bar_chart
from nlp_common.lm.replies import MAX_REPLY
from nlp_common.tiny import world
from nlp_common.tiny.judge import judge
from nlp_common.train.chain import chain_model
from nlp_common.train.lesson import run_lesson, run_part
from nlp_common.train.settings import LessonSettings, parse_settings
from nlp_common.train.stage import Stage
from packed_weights import ABOUT
from quantized_models import VARIANTS, load_variant
from serve import ServeSettings, serve, service_of

HOME = Path(__file__).resolve().parent
FULL_MODEL = "Qwen/Qwen2.5-0.5B-Instruct"
PRESETS = {"tiny": {"n_questions": 512}, "full": {"n_questions": 512}}
CLIENTS = (1, 16)
LOADED = re.compile(r"：([\d,]+) 字节（(.*?)），载入 ([\d.]+) 秒")


@dataclass
class DeploySettings(LessonSettings):
    NOT_IN_FINGERPRINT = LessonSettings.NOT_IN_FINGERPRINT | {
        "serve", "port", "name", "commands", "deepspeed", "deepspeed_config",
    }  # fmt: skip

    model: str | None = option("用哪个模型：hub 名、文件夹；默认是 Qwen 链 tiny 预设的 SFT 模型")
    source: Literal["hf", "modelscope"] = option("hub 名从哪里下载", "hf")
    variants: str = option("量哪几种，逗号隔开；没有装的跳过", ",".join(VARIANTS))
    n_questions: int | None = option(
        "16 个客户一共问几题（一个客户的，问它的八分之一）", limits=Limits(at_least=16)
    )
    slots: int = option("几个座位", 16, COUNT)
    threads: int = option("算的时候用几个线程", 1, COUNT)
    serve: str | None = option("只开这一种的服务，直到 Ctrl-C", choices=[*VARIANTS])
    port: int = option("--serve 听哪个端口；0 是随便哪个空着的", 8000, Limits(at_least=0, at_most=65535))
    name: str = option("--serve 时，请求里的 model 写什么", "tiny-sft")
    commands: bool = option("印出 vLLM、SGLang、DeepSpeed 的命令", False)
    deepspeed: bool = option("用 DeepSpeed 的 init_inference 答题", False)
    deepspeed_config: str = option("它的设置文件", str(HOME / "deepspeed_inference.json"))

    def check(self) -> None:
        for name in self.variants.replace(" ", "").split(","):
            if name not in VARIANTS:
                raise UserError(
                    f"--variants 不认识 {name or '空的一项'}，可以是 {'、'.join(VARIANTS)}，逗号隔开。"
                )
        if not self.deepspeed and self.deepspeed_config != type(self).deepspeed_config:
            raise UserError("--deepspeed_config 要与 --deepspeed 一起给。")


# ---------------------------------------------------------------- 1. 全课：一种开一个服务，问同样的题


def learn(stage: Stage, path: str) -> dict:
    settings = stage.settings
    questions = world.heldout_questions(settings.n_questions, seed=0)
    expected = alone(path, questions)  # float32 单独问的
    metrics: dict = {"n": len(questions)}
    for name in dict.fromkeys(settings.variants.replace(" ", "").split(",")):
        if command := VARIANTS[name].missing():
            print(f"没有装，跳过 {name}：{command}。")
            continue
        work = partial(try_variant, name=name, path=path, questions=questions, expected=expected)
        metrics[name] = run_part(stage, name, work)
    if len(metrics) == 1:
        raise UserError("这几种一样也没有装。")
    show(metrics)
    return stage.save(metrics, {"name": "tiny_world"}, partial(draw, metrics=metrics))


def try_variant(part: Stage, name: str, path: str, questions: list[dict], expected: dict) -> dict:
    settings = part.settings
    found: dict = {}
    options = ["--serve", name, "--slots", str(settings.slots), "--preset", "tiny"]
    with running(path, settings.threads, *options, script="quantized_deploy.py") as target:
        n_bytes, where, seconds = LOADED.search(target.said).groups()
        found |= {"bytes": int(n_bytes.replace(",", "")), "where": where, "load_seconds": float(seconds)}
        ask_all(target, questions[:4], 2, temperature=0, max_tokens=MAX_REPLY)  # 热身
        for clients in CLIENTS:
            some = questions if clients > 1 else questions[: max(8, len(questions) // 8)]
            calls = ask_all(target, some, clients, temperature=0, max_tokens=MAX_REPLY)
            row = summary(calls, expected)
            found[f"clients{clients}"] = {
                each: row[each] for each in ("tokens_per_s", "first_ms", "same", "lost", "mixed", "ok")
            }
    right = [judge(c.question, c.text, c.finished == "stop").right for c in calls]  # 最后一批：全部的题
    return found | {"qa_accuracy": sum(right) / len(right)}


# ---------------------------------------------------------------- 2. 给人看


def show(metrics: dict) -> None:
    rows = [["", "字节", "哪里的", "载入（秒）", "答对", "与 float32 同答", "token/s（1 个客户）", "token/s（16 个）", "第一个字 p95（毫秒）"]]  # fmt: skip
    for name in VARIANTS:
        if not (its := metrics.get(name)):
            continue
        many = its["clients16"]
        rows.append(
            [VARIANTS[name].label.split("|")[0], f"{its['bytes']:,.0f}", its["where"], f"{its['load_seconds']:.1f}",
             f"{its['qa_accuracy']:.3f}", f"{many['same']:.3f}", f"{its['clients1']['tokens_per_s']:,.0f}",
             f"{many['tokens_per_s']:,.0f}", f"{many['first_ms']['p95']:.0f}"]
        )  # fmt: skip
    print_table(rows)
    print(
        "\n字节在哪里：内存，是权重在内存里占的；磁盘，是存下来的文件，算的时候还原成 float32；每步读，是写一个 token 要读的。"
    )


def draw(folder: Path, metrics: dict) -> None:
    speed = {
        VARIANTS[name].label: its["clients16"]["tokens_per_s"]
        for name, its in metrics.items()
        if name in VARIANTS
    }
    bar_chart(
        folder / "deploy_speed.svg", {"token/s": speed}, "16 个客户，每秒几个 token|Tokens per second, 16 clients",
        "权重|weights", "token/s", digits=0,
    )  # fmt: skip


# ---------------------------------------------------------------- 3. 只开一种


def serve_one(settings: DeploySettings, path: str) -> dict:
    started = time.perf_counter()
    loaded = load_variant(settings.serve, path, settings.slots)
    label, seconds = VARIANTS[settings.serve].label.split("|")[0], time.perf_counter() - started
    print(f"{label}：{loaded.n_bytes:,} 字节（{loaded.where}），载入 {seconds:.1f} 秒")
    serving = ServeSettings(port=settings.port, slots=settings.slots, threads=settings.threads)
    return serve(service_of(loaded.slots, loaded.tokenizer, settings.name, serving), serving)


# ---------------------------------------------------------------- 4. 一台机器不够了

COMMANDS = """\
合并好的模型（LoRA 先合并：lora_finetune/merge_lora.py --export）是一个普通的 hub 文件夹，下面几样都直接读。

vLLM（显卡；分页的 KV 缓存，连续批）：
  pip install vllm                     # 另建一个虚拟环境：它要自己那一版的 torch
  vllm serve {path} --served-model-name mine --host 127.0.0.1 --port 8000 --max-model-len 4096 \\
      --enable-auto-tool-choice --tool-call-parser hermes --api-key "$CHAT_KEY"
  …… --quantization bitsandbytes       # 当场压成 NF4
  …… --tensor-parallel-size 2          # 两块显卡，一层切成两半

SGLang（同上；相同的开头只算一遍）：
  pip install sglang                   # 也另建一个
  python -m sglang.launch_server --model-path {path} --served-model-name mine --host 127.0.0.1 --port 8000 \\
      --tool-call-parser qwen --api-key "$CHAT_KEY"
  …… --quantization fp8                # 有 FP8 的显卡（Hopper、Ada）
  …… --tp 2

DeepSpeed（张量并行；设置在 deepspeed_inference.json，dtype 不要写 int8）：
  torchrun --nproc_per_node 2 quantized_deploy.py --deepspeed --model {path}

然后，同样的压力：
  python load_test.py --url http://127.0.0.1:8000/v1 --server_model mine --api_key_env CHAT_KEY
"""


def main(argv: list[str] | None = None) -> dict:
    settings = parse_settings(DeploySettings, PRESETS, argv)
    if settings.commands:
        print(COMMANDS.format(path=settings.model or "合并好的文件夹"), end="")
        return {}
    model = settings.model or (FULL_MODEL if settings.preset == "full" else None)
    if settings.serve == "int4" and model and (Path(model) / ABOUT).exists():  # 已经量化好的，不是 hub 的样子
        found = {"path": model, "stage": "packed", "id": Path(model).name}
    else:
        found = chain_model("sft", model, settings.source)
    if settings.serve:
        return serve_one(settings, found["path"])
    if settings.deepspeed:
        return deepspeed_part.run(found["path"], Path(settings.deepspeed_config), settings.n_questions)
    start = f"{found['stage']}:{found['id']}"
    return run_lesson("quantized_deploy", HOME, settings, partial(learn, path=found["path"]), start=start)


if __name__ == "__main__":
    run_main(main)
