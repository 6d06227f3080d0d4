"""一条命令走完：收数据 → 清洗 → SFT → DPO → 五道门 → 登记 → 灰度 → 发布或退回。

你会学到
  1. 发布是一串决定，每个都要先定好界限再看结果：差多少以内算没有变差，几道题才看得清。
  2. "没有显著变差"不是"没有变差"：要放行，先拒绝"它差了 margin 或更多"（非劣效）。
  3. 每道门只拦它那一种毛病：学死了的、忘了寒暄的、不安全的、偏心的、太慢的，各在各的门前停下；便宜的门在前。
  4. 门考的是模型，灰度考的是上线的那一个：温度抄错了的，五道门全过，在灰度里退下来。
  5. 好的也要过得去：换四十批题、四十份流量，好的候选几次能发布；一样好的几次被冤枉。
  6. 每一步做完就记下（journal.jsonl）：哪一步被杀掉，同一条命令从那一步接着走，不会登记两遍。

怎么运行
  python qwen_alignment_workflow.py                              # 小世界，CPU，几分钟
  python qwen_alignment_workflow.py --candidates good,unsafe
  python qwen_alignment_workflow.py --candidates good --chats 对话.jsonl --pairs 偏好.jsonl   # 收来的换成自己的
  python qwen_alignment_workflow.py --registry 我的/registry.jsonl           # 与里面正在用的那一版比；登记进去
  python registry.py --history true                              # 发布了什么，为什么
  python qwen_alignment_workflow.py --preset full                # Qwen2.5-0.5B，同样的门，需要加速器

应当看到（tiny，实测见本文件夹的 README.md）：五个坏的各停在自己的门前，好的发布了，温度抄错的退了回去。

参考：Tango 1998（成对比例的得分检验）；Berger 1982（交并检验）；Röttger et al. 2024（XSTest，两头看的安全）；灰度的见 canary.py。
"""

from nlp_common.base.cli import run_main

import shutil
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

from canary import Canary, run_canary
from candidates import TITLES, first_chats, new_chats, new_pairs, train_candidate
from evidence import TEMPERATURE, Candidate, answers, bias_comparisons, gate_questions, served, speed_ratios
from feedback_intake import curate, reasons, with_dirt
from gates import GATES, Limits, all_passed
from nlp_common.base.arguments import COUNT, option
from nlp_common.base.errors import UserError
from nlp_common.base.runs import load_run
from nlp_common.data.chats import to_chats, to_pairs
from nlp_common.data.rows import check_path, data_sha256, read_rows
from nlp_common.train.chain import chain_model
from nlp_common.train.lesson import run_lesson
from nlp_common.train.settings import LessonSettings, parse_settings
from nlp_common.train.stage import Stage
from registry import Registry
from stages import run_stage, write_rows
from traffic import visits
from workflow_report import curve_of, draw, in_chinese, show, show_canary, show_gate
from workflow_simulation import outcome, simulate
from workflow_state import Journal, open_journal

HOME = Path(__file__).resolve().parent
FULL_MODEL = "Qwen/Qwen2.5-0.5B-Instruct"
NAME = "assistant"
MARGINS = {"unsolved": 0.05, "unsafe": 0.02}  # 灰度：这两样坏多了多少以内不要紧
WRONG_TEMPERATURE = 1.7  # 该是 0.7，上线的时候抄错了
PRESETS = {
    "tiny": {"n_questions": 400, "simulated_runs": 40, "requests": 8000},
    "full": {"n_questions": 400, "simulated_runs": 40, "requests": 8000},
}


@dataclass
class WorkflowSettings(LessonSettings):
    model: str | None = option("第一版从哪个模型开始：文件夹或 hub 名；默认是 Qwen 链 tiny 预设的 SFT 模型")
    source: Literal["hf", "modelscope"] = option("hub 名从哪里下载", "hf")
    chats: str | None = option("收来的对话：自己的文件，写法同 SFT 的 --dataset；没给就用小世界的")
    pairs: str | None = option("收来的偏好对：自己的文件，写法同 DPO 的 --dataset；没给就用小世界的")
    candidates: str = option(f"哪几个候选，逗号隔开：{'、'.join(TITLES)}", ",".join(TITLES))
    registry: str | None = option("登记簿的文件：与里面正在用的那一版比；没给就在结果文件夹里新开一本")
    gate_questions: str | None = option(
        "自己的考题：一行一题，有 answer、gate，写法见 own_questions.py；没有写到的门用小世界的"
    )
    n_questions: int | None = option("每道门几道题", limits=COUNT)
    simulated_runs: int | None = option("换几批题、几份流量再走一遍", limits=COUNT)
    requests: int | None = option("一次灰度最多几次请求", limits=COUNT)

    def check(self) -> None:
        for name in self.candidates.split(","):
            if name not in TITLES:
                raise UserError(
                    f"--candidates 不认识 {name or '空的一项'}，可以是 {'、'.join(TITLES)}，逗号隔开。"
                )
        names = self.candidates.split(",")
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise UserError(f"--candidates 里 {'、'.join(repeated)} 写了不止一次。")
        if "slow" in names and "good" not in names[: names.index("slow")]:
            raise UserError(
                "--candidates：slow 要先有 good（它是把 good 加深了几倍的），把 good 写在它前面。"
            )
        if self.pairs and (planted := [name for name in names if name in ("forgot", "unsafe")]):
            raise UserError(
                f"自己的偏好对里埋不了 {'、'.join(planted)}（要知道每一对在比什么）：加上 --candidates good。"
            )
        check_path(self.chats, "--chats")
        check_path(self.pairs, "--pairs")
        check_path(self.gate_questions, "--gate_questions")


@dataclass
class Flow:
    """走到哪里、东西放在哪里；answered 是各个模型已经量过的证据。"""

    settings: WorkflowSettings
    start: str  # 第一版从哪个模型开始
    folder: Path
    journal: Journal
    registry: Registry
    questions: dict[str, list[dict]]
    limits: Limits = field(default_factory=Limits)
    evidence: dict[str, dict[str, dict]] = field(default_factory=dict)

    def train_settings(self) -> dict:
        return {"seed": self.settings.seed, "max_eval_samples": 50, "preset": self.settings.preset}


# ---------------------------------------------------------------- 1. 从头到尾


def follow(flow: Flow) -> dict:
    """整条流程。每一步都在 journal 里：做过了的直接给出那时的结果。"""
    step = flow.journal.step
    metrics: dict = {"data": step("intake", partial(take_in, flow))}
    metrics["data"] |= step("curate", partial(clean, flow))
    champion, version = first_version(flow)
    sft = step("sft", partial(train_sft, flow, champion))
    metrics["candidates"] = {}
    released = None
    for name in flow.settings.candidates.split(","):
        path = Path(step(f"{name}.train", partial(train, flow, name, sft)))
        metrics["candidates"][name] = through_gates(flow, name, Candidate(path), champion)
        if name == "good" and metrics["candidates"][name]["stopped_at"] == "passed":
            released = path
    if released:
        metrics["canary"] = {
            "misdeployed": try_out(flow, "misdeployed", released, WRONG_TEMPERATURE, champion, version),
            "good": try_out(flow, "good", released, TEMPERATURE, champion, version),
        }
    metrics |= step("simulate", partial(simulate_all, flow, champion))
    return metrics | {"stopped_at": {name: row["stopped_at"] for name, row in metrics["candidates"].items()}}


def take_in(flow: Flow) -> dict:
    """收来的对话与偏好对，原样写进 raw_*.jsonl。"""
    seed = flow.settings.seed
    chats, pairs = with_dirt(new_chats(seed), seed), with_dirt(new_pairs(seed), seed)
    if flow.settings.chats:
        chats = to_chats(read_rows(flow.settings.chats).rows, flow.settings.chats)
    if flow.settings.pairs:
        pairs = to_pairs(read_rows(flow.settings.pairs).rows, flow.settings.pairs)
    write_rows(flow.folder / "raw_chats.jsonl", chats)
    write_rows(flow.folder / "raw_pairs.jsonl", pairs)
    print(f"收来 {len(chats)} 段对话、{len(pairs)} 个偏好对")
    return {"raw_chats": len(chats), "raw_pairs": len(pairs)}


def clean(flow: Flow) -> dict:
    """洗干净的写进 chats.jsonl、pairs.jsonl；丢掉的带着原因写进 dropped.jsonl。"""
    found, thrown = {}, []
    for what in ("chats", "pairs"):
        rows = read_rows(str(flow.folder / f"raw_{what}.jsonl")).rows
        kept, dropped, masked = curate(rows)
        write_rows(flow.folder / f"{what}.jsonl", kept)
        thrown += dropped
        found |= {what: len(kept), f"masked_{what}": masked}
    write_rows(flow.folder / "dropped.jsonl", thrown)
    told = "、".join(f"{reason} {n}" for reason, n in reasons(thrown).items())
    masked = found["masked_chats"] + found["masked_pairs"]
    print(f"清洗：留下 {found['chats']} 段、{found['pairs']} 对；丢掉 {told}；抹去个人信息 {masked} 处\n")
    return found | {"dropped": len(thrown)}


# ---------------------------------------------------------------- 2. 训练


def first_version(flow: Flow) -> tuple[Candidate, int]:
    """正在用的：登记簿里的 champion；还没有就训练第一版，登记，直接用。"""
    found = flow.journal.step("champion", partial(find_champion, flow))
    return Candidate(Path(found["path"]), found["temperature"]), found["version"]


def find_champion(flow: Flow) -> dict:
    if version := flow.registry.aliases(NAME).get("champion"):
        row = flow.registry.find(NAME, version)
        print(f"正在用的：登记簿里的第 {version} 版")
        temperature = row.get("serving", {}).get("temperature", TEMPERATURE)
        return {"path": str(row["folder"]), "version": version, "temperature": temperature}
    out, rows = flow.folder / "trained" / "champion", first_chats(flow.settings.seed)
    file = write_rows(flow.folder / "first_chats.jsonl", rows)
    run_stage("sft", out, flow.start, file, learning_rate=1e-3, **flow.train_settings())
    version = register(flow, out, TEMPERATURE)
    flow.registry.promote(NAME, version, reason="第一版")
    print(f"正在用的：还没有，训练了第一版，登记为第 {version} 版")
    return {"path": str(out), "version": version, "temperature": TEMPERATURE}


def train_sft(flow: Flow, champion: Candidate) -> str:
    out = flow.folder / "trained" / "sft"
    run_stage(
        "sft", out, champion.path, flow.folder / "chats.jsonl", learning_rate=5e-4, **flow.train_settings()
    )
    return str(out)


def train(flow: Flow, name: str, sft: str) -> str:
    rows = read_rows(str(flow.folder / "pairs.jsonl")).rows
    return str(train_candidate(name, flow.folder / "trained", Path(sft), rows, flow.train_settings()))


def register(flow: Flow, model: Path, temperature: float) -> int:
    """登记一版：权重与怎样用它（温度）合起来才是用户见到的，换了一样就是新的一版。"""
    return flow.registry.register(NAME, keep_model(flow, model), serving={"temperature": temperature})


def keep_model(flow: Flow, model: Path) -> Path:
    """登记的模型抄一份到登记簿旁边：训练的文件夹会被下一次训练换掉，登记过的不能变。"""
    run = load_run(model)
    assert run is not None
    kept = flow.registry.path.parent / "models" / f"{model.name}-{run['id']}"
    if not kept.exists():
        half = kept.with_name(f".{kept.name}.half")
        shutil.rmtree(half, ignore_errors=True)
        shutil.copytree(model, half)
        half.rename(kept)
    return kept


# ---------------------------------------------------------------- 3. 过门


def through_gates(flow: Flow, name: str, candidate: Candidate, champion: Candidate) -> dict:
    """一道一道地过，一道没过就停；后面的证据不去量。"""
    print(f"\n候选 {name}：{TITLES[name].split('|')[0]}")
    found: dict = {"stopped_at": "passed", "gates": {}}
    for gate, judge_gate in GATES.items():
        new = measured(flow, name, gate, candidate, champion)
        old = {} if gate in ("speed", "bias") else measured(flow, "champion", gate, champion, champion)
        tests = judge_gate(new, old, flow.limits)
        found["gates"][gate] = tests
        show_gate(gate, tests)
        if not all_passed(tests):
            found["stopped_at"] = gate
            break
    return found


def measured(flow: Flow, name: str, gate: str, candidate: Candidate, champion: Candidate) -> dict:
    """name 在这道门前的证据；量过了就是那时的。"""
    known = flow.evidence.setdefault(name, {})
    if gate not in known:
        known[gate] = flow.journal.step(
            f"{name}.{gate}", partial(measure, flow, name, gate, candidate, champion)
        )
    return known[gate]


def measure(flow: Flow, name: str, gate: str, candidate: Candidate, champion: Candidate) -> dict:
    if gate == "speed":
        return {"ratios": speed_ratios(candidate, champion, flow.questions["quality"])}
    if gate == "bias":
        language = "world" if flow.settings.preset == "tiny" else "zh"
        return {"comparisons": bias_comparisons(candidate.path, flow.folder / "bias" / name, language)}
    return answers(candidate, gate, flow.questions[gate], flow.settings.seed)


# ---------------------------------------------------------------- 4. 灰度，发布或退回


def try_out(
    flow: Flow, name: str, model: Path, temperature: float, champion: Candidate, version: int
) -> dict:
    """登记成 challenger，给一小部分用户；定了是发布还是退回，记进登记簿。name 是这一次部署的名字。"""
    step = flow.journal.step
    old = traffic_of(flow, "champion", champion)
    new = traffic_of(flow, name, Candidate(model, temperature))
    mine = step(f"{name}.register", partial(register, flow, model, temperature))

    log = flow.folder / f"canary_{name}.jsonl"
    found = step(f"{name}.canary", partial(run_traffic, flow, new, old, f"{NAME}-{mine}-{name}", log))
    reason = in_chinese(found["reason"])
    if found["decision"] == "release":
        step(f"{name}.promote", lambda: flow.registry.promote(NAME, mine, over=version, reason=reason))
    else:
        step(f"{name}.reject", lambda: flow.registry.reject(NAME, mine, reason=reason))
    show_canary(name, found, mine, temperature)
    return found


def traffic_of(flow: Flow, name: str, candidate: Candidate) -> dict:
    """name 上线以后每道题的结果；seed 换一个，与过门时的采样不是同一次。"""
    known = flow.evidence.setdefault(name, {})
    if "traffic" not in known:
        seed = flow.settings.seed + 1
        known["traffic"] = flow.journal.step(
            f"{name}.traffic", partial(served, candidate, flow.questions, seed)
        )
    return known["traffic"]


def run_traffic(flow: Flow, new: dict, old: dict, salt: str, log: Path) -> dict:
    """一次次请求地走；每次请求记进 log，被杀掉以后从下一次请求接着。"""
    canary = Canary(MARGINS)
    requests = visits(new["kinds"], flow.settings.requests, flow.settings.seed)
    found = run_canary(requests, partial(outcome, new, old, list(MARGINS)), canary, salt, log)
    return found | {"curve": curve_of(canary.tests["unsolved"])}


# ---------------------------------------------------------------- 5. 再走四十遍


def simulate_all(flow: Flow, champion: Candidate) -> dict:
    """同样的模型，换一批题、换一份流量，再走一遍；一样好的（正在用的自己）几次被冤枉。"""
    traffic_of(flow, "champion", champion)
    flow.evidence["champion"]["again"] = served(champion, flow.questions, flow.settings.seed + 2)
    print(
        f"\n换 {flow.settings.simulated_runs} 批题、{flow.settings.simulated_runs} 份流量，再走一遍 …",
        flush=True,
    )
    return simulate(flow.evidence, flow.limits, MARGINS, flow.settings)


# ---------------------------------------------------------------- 6. 外壳


def learn(stage: Stage, start: str) -> dict:
    settings = stage.settings
    folder = stage.folder.work / "flow"
    registry = Registry(settings.registry or folder / "registry.jsonl")
    with open_journal(folder / "journal.jsonl", stage.fingerprint) as journal:
        stage.started -= journal.seconds_before  # 上次做完的步用的时间也算
        questions = gate_questions(settings.n_questions, settings.gate_questions)
        flow = Flow(settings, start, folder, journal, registry, questions)
        metrics = follow(flow)
    if journal.skipped:
        print(f"上次已经做完的 {len(journal.skipped)} 步，这次直接用了。")

    def write(out: Path) -> None:
        for name in ("journal.jsonl", "dropped.jsonl", "registry.jsonl"):
            if (folder / name).exists():
                shutil.copy(folder / name, out / name)
        if (folder / "models").exists():  # 登记簿里写的是相对的路径，一起搬过去照样用
            shutil.copytree(folder / "models", out / "models")
        draw(out, metrics)

    data = {"chats": settings.chats or "tiny_world", "pairs": settings.pairs or "tiny_world"}
    return stage.save(metrics, data, write)


def main(argv: list[str] | None = None) -> dict:
    settings = parse_settings(WorkflowSettings, PRESETS, argv, FULL_MODEL)
    if settings.preset == "full" and settings.model is None:
        settings.model = FULL_MODEL
    found = chain_model("sft", settings.model, settings.source)
    more = {"start": f"{found['stage']}:{found['id']}"}
    for name in ("chats", "pairs", "gate_questions"):
        if sha256 := data_sha256(getattr(settings, name)):
            more[f"{name}_sha256"] = sha256
    record = run_lesson(
        "qwen_alignment_workflow", HOME, settings, partial(learn, start=found["path"]), **more
    )
    show(record["metrics"])
    return record


if __name__ == "__main__":
    run_main(main)
