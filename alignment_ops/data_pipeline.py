"""从一个文件夹的文档到指令数据：读、洗、出题、检查、分开，再看练出来的模型多会了什么。

学到什么
  1. 文档里不全是正文：菜单、页眉、页码、被排成一行一行的段落。不洗，两成的句子是碎的。
  2. 一问一答照规则出，或请一个大模型出；哪一种都要过门：答案要在那一段里，要答得上那一问。
  3. 分训练与留出要按文档，改名另存的算同一份。一行一行地随机分，同一件事换个问法就在两边：考的是背。
  4. 开卷（给那一段）学到的本事，没见过的文档也用得上；闭卷（只有问题）记住的，只有教过的那些。
     记住了就不必读：再加几行开卷的，那一段的答案换成别的，没见过的文档多答对一成多。

运行
  python data_pipeline.py                              # 自带的样板：六十份小动物的档案，五种格式
  python data_pipeline.py --dataset 我的文件夹          # 自己的 txt md html pdf docx csv，只出数据，不训练
  python data_pipeline.py --dataset 我的文件夹 --llm_url http://127.0.0.1:8000/v1 --llm_model Qwen3-8B
  python data_pipeline.py --dataset 我的文件夹 --preset full --train true    # 在 Qwen2.5-0.5B 上训练，要加速器
结果文件夹里：train.jsonl、heldout.jsonl（SFT 脚本直接读）、dropped.jsonl（不要的，各有原因）、statistics.html。

应当看到（tiny，实测见本文件夹的 README.md）：洗完句子全是完整的；没见过的文档，开卷从四成多升到九成以上；
教过的文档，闭卷从接近零升到几乎全对，换一种没教过的问法六成；一行一行分的，闭卷的"留出"也有六成，那是假的。

参考：Wang et al. 2023（Self-Instruct）；Lewis et al. 2021（PAQ：照段落出题再过滤）；Longpre et al. 2021（换掉段落里的答案）；
Ovadia et al. 2024（微调能不能添知识）。
"""

from nlp_common.base.cli import run_main

import json
import shutil
from collections import Counter
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

from instruction_rows import by_documents, by_rows, distinct, groups_of, heldout_documents, leaked, to_rows
from llm_rows import Asked, agreeing, write_pairs
from nlp_common.base.arguments import COUNT, NOT_NEGATIVE, Limits, option
from nlp_common.base.console import print_table
from nlp_common.base.errors import UserError
from nlp_common.data.documents import read_folder
from nlp_common.data.files import sha256_of
from nlp_common.hub.chat_server import ChatServer
from nlp_common.tiny.world import chats
from nlp_common.train.chain import chain_model
from nlp_common.train.lesson import result_folder, run_lesson
from nlp_common.train.settings import LessonSettings, parse_settings
from nlp_common.train.stage import Stage
from pipeline_exam import EXAMS, TITLES, measure, read_by_row_split
from pipeline_page import draw, write_page
from qa_rules import Pair, Passage, pairs_of, passages_of
from row_checks import FAULTS, REASONS, check_pairs, measure_gate
from sample_documents import Sample, cleaning_score, rule_score, write_samples
from stages import run_stage
from text_cleaning import Cleaned, clean_documents

HOME = Path(__file__).resolve().parent
FULL_MODEL = "Qwen/Qwen2.5-0.5B-Instruct"
SAMPLES = "samples"
PRESETS = {
    "tiny": {
        "n_documents": 60,
        "replay": 500,
        "num_train_epochs": 8.0,
        "learning_rate": 1e-3,
        "max_length": 256,
    },
    "full": {
        "n_documents": 100,
        "replay": 0,
        "num_train_epochs": 3.0,
        "learning_rate": 2e-5,
        "max_length": 1024,
    },
}
SECONDS = 120  # 大模型一句最多等多久
MOST_FAULTS = 8  # 屏幕上说几份读不了的


@dataclass
class PipelineSettings(LessonSettings):
    dataset: str = option(f"文档的文件夹；{SAMPLES} 是自带的样板", SAMPLES)
    model: str | None = option("从哪个模型开始；tiny 默认是 Qwen 链的 SFT 模型")
    source: Literal["hf", "modelscope"] = option("hub 名从哪里下载", "hf")
    closed: bool = option("训练里也要闭卷的行：只有问题，没有那一段", True)
    swap: bool | None = option("加几行开卷的，那一段的答案换成别的：逼它读，不靠记；默认只有样板加")
    llm_url: str | None = option("请这个 OpenAI 接口的服务器出题，写到 /v1 为止；没给就照规则出")
    llm_model: str | None = option("服务器上的模型名")
    llm_pairs: int = option("请它每段出几题", 3, COUNT)
    round_trip: bool = option("大模型出的题，让它只看那一段再答一遍，两次一样才要", True)
    n_documents: int | None = option("样板写几份文档", limits=Limits(at_least=10, at_most=100))
    copies: int = option("样板里，几份换一种格式另存了一遍", 5, NOT_NEGATIVE)
    most_characters: int | None = option(
        "一段最多几个字；默认样板 80，自己的文档 400", limits=Limits(at_least=20)
    )
    heldout_share: float = option("留出几成文档", 0.25, Limits(above=0, below=1))
    train: bool | None = option("在这些行上训练、量一量；默认只有自带的样板训练")
    replay: int | None = option("训练时混进几段小世界的对话：不混，新的学会了，旧的忘了", limits=NOT_NEGATIVE)
    num_train_epochs: float | None = option("训练几遍")
    learning_rate: float | None = option("学习率的峰值")
    max_length: int | None = option("每行最多多少个 token；更长的行不用")

    def check(self) -> None:
        if bool(self.llm_url) != bool(self.llm_model):
            raise UserError("--llm_url 与 --llm_model 要一起给：哪个服务器、上面的哪个模型。")
        if self.dataset != SAMPLES and not Path(self.dataset).expanduser().is_dir():
            raise UserError(
                f"--dataset 要一个文档的文件夹，没有 {self.dataset}（当前文件夹是 {Path.cwd()}）。"
            )
        for name in ("train", "swap"):
            if getattr(self, name) is None:
                setattr(self, name, self.dataset == SAMPLES)
        if self.most_characters is None:
            self.most_characters = 80 if self.dataset == SAMPLES else 400


@dataclass
class Material:
    """流水线走到一半手里有的：洗过的文档、切成的段、能要的题、不能要的题与原因。"""

    cleaned: list[Cleaned]
    passages: list[Passage]
    pairs: list[Pair] = field(default_factory=list)
    dropped: list[tuple[Pair, str]] = field(default_factory=list)


# ---------------------------------------------------------------- 1. 从头到尾


def learn(stage: Stage) -> dict:
    settings = stage.settings
    folder, samples = find_documents(stage)
    documents, faults = read_folder(folder)
    say_unread(faults)
    material = prepare([*documents], settings.most_characters)
    pairs, llm_faults = write_questions(stage, material)
    material.pairs, material.dropped = filter_pairs(stage, pairs)
    train, heldout, metrics = split(settings, material)
    metrics |= {"documents": len(documents), "unread": len(faults), "passages": len(material.passages)}
    metrics |= {"pairs": len(pairs), "kept_pairs": len(material.pairs), "llm_faults": dict(llm_faults)}
    metrics["dropped"] = {name: sum(r == name for _, r in material.dropped) for name in ALL_REASONS}
    metrics["gate"] = measure_gate(material.pairs, settings.seed)
    if samples:
        metrics["cleaning"] = cleaning_score(samples, documents, material.cleaned)
        metrics["rules"] = rule_score(samples, material.pairs)
    taught = to_rows(train, settings.closed, settings.swap, settings.seed)
    rows = {"train": taught, "heldout": to_rows(heldout, closed=False)}
    for name, its in rows.items():
        write_jsonl(stage.folder.work / f"{name}.jsonl", its)
    if settings.train:
        metrics["sft"] = train_and_measure(stage, taught, train, heldout, material.pairs)

    def write(result: Path) -> None:
        for name in rows:
            shutil.copy(stage.folder.work / f"{name}.jsonl", result / f"{name}.jsonl")
        lost = [asdict(pair) | {"reason": reason} for pair, reason in material.dropped]
        write_jsonl(result / "dropped.jsonl", lost)
        if settings.train:
            shutil.copytree(stage.folder.work / "sft", result / "sft")
        draw(result, metrics)
        write_page(result / "statistics.html", metrics, documents, faults, material, rows)

    files = [folder / document.id for document in documents]
    source = {"name": settings.dataset, "kind": "folder", "rows": len(files), "sha256": sha256_of(files)}
    return stage.save(metrics, {"documents": source}, write)


ALL_REASONS = (*REASONS, "disagrees", "repeated")


def find_documents(stage: Stage) -> tuple[Path, list[Sample]]:
    """文档在哪里；样板当场写好，另外返回写了什么（量每一步对几成要用）。"""
    settings = stage.settings
    if settings.dataset != SAMPLES:
        return Path(settings.dataset).expanduser(), []
    folder = stage.folder.work / "documents"
    shutil.rmtree(folder, ignore_errors=True)
    return folder, write_samples(folder, settings.n_documents, settings.copies, settings.seed)


def say_unread(faults: list[str]) -> None:
    """读不了的文件，一份一句；缺同一个包的合成一句。"""
    reasons = Counter(fault.partition("：")[2] if "pip install" in fault else fault for fault in faults)
    for reason, n in list(reasons.items())[:MOST_FAULTS]:
        print(f"没有读：{reason}" if n == 1 else f"没有读 {n} 份：{reason}")
    if len(reasons) > MOST_FAULTS:
        print(f"没有读的还有 {len(reasons) - MOST_FAULTS} 份，都写在统计页里。")


def prepare(documents: list, most: int) -> Material:
    cleaned = clean_documents(documents)
    passages = [passage for each in cleaned for passage in passages_of(each, most)]
    return Material(cleaned, passages)


# ---------------------------------------------------------------- 2. 出题，过门


def write_questions(stage: Stage, material: Material) -> tuple[list[Pair], dict]:
    """每一段出题：照规则，或请大模型。一题也没有是 UserError。"""
    settings = stage.settings
    if settings.llm_url:
        asked = model_of(stage)
        asked.server.check()
        pairs, faults = write_pairs(asked, material.passages, settings.llm_pairs)
    else:
        pairs, faults = [pair for passage in material.passages for pair in pairs_of(passage)], {}
    if not pairs and settings.llm_url:
        counts = "；".join(f"{name} {count} 次" for name, count in faults.items())
        raise UserError(
            f"{settings.llm_model} 看了 {len(material.passages)} 段，写的没有一题读得出（{counts or '都是空的列表'}）。"
            f"它写的在 {asked.saved}；太小的模型写不出 JSON，换一个大些的。"
        )
    if not pairs:
        raise UserError(
            f"{len(material.passages)} 段里没有一句是规则认得的句式（见 qa_rules.py）。"
            "文章式的文档，请用 --llm_url、--llm_model 让大模型出题。"
        )
    return pairs, faults


def model_of(stage: Stage) -> Asked:
    settings = stage.settings
    server = ChatServer(settings.llm_url, settings.llm_model, timeout=SECONDS)
    return Asked(server, stage.folder.work / "llm.jsonl")


def filter_pairs(stage: Stage, pairs: list[Pair]) -> tuple[list[Pair], list[tuple[Pair, str]]]:
    """过门；大模型出的，再让它自己答一遍。"""
    kept, dropped = check_pairs(pairs)
    if stage.settings.llm_url and stage.settings.round_trip:
        again = agreeing(model_of(stage), kept)
        dropped += [(pair, "disagrees") for pair, same in zip(kept, again, strict=True) if not same]
        kept = [pair for pair, same in zip(kept, again, strict=True) if same]
    if len({pair.document for pair in kept}) < 2:
        reasons = "、".join(
            f"{REASONS.get(reason, reason)}：{pair.questions[0]}" for pair, reason in dropped[:3]
        )
        raise UserError(
            f"{len(pairs)} 题里能要的只有 {len(kept)} 题，不到两份文档，分不出训练与留出。不要的例如 {reasons or '（没有）'}。"
        )
    return kept, dropped


# ---------------------------------------------------------------- 3. 分开


def split(settings: PipelineSettings, material: Material) -> tuple[list[Pair], list[Pair], dict]:
    """按文档分，几乎一样的文档算一份；另外两种分法各漏多少，一起量出来。"""
    pairs, share, seed = material.pairs, settings.heldout_share, settings.seed
    texts: dict[str, str] = {}
    for passage in material.passages:
        texts[passage.document] = texts.get(passage.document, "") + passage.text
    names = [name for name in texts if any(pair.document == name for pair in pairs)]
    groups = groups_of([texts[name] for name in names])
    if len(set(groups)) < 2:
        raise UserError(f"{len(names)} 份文档几乎一样，分不出训练与留出：再放几份不同的进来。")
    parts = by_documents(pairs, heldout_documents(names, groups, share, seed))
    by_files = by_documents(pairs, heldout_documents(names, range(len(names)), share, seed))
    leaks = {
        "rows": leaked(*by_rows([p for p in pairs for _ in p.questions], share, seed)),
        "files": leaked(*by_files),
        "documents": leaked(*parts),
    }
    train, heldout = (distinct(part) for part in parts)
    kept = {id(pair) for pair in (*train, *heldout)}
    material.dropped += [(pair, "repeated") for pair in pairs if id(pair) not in kept]
    counts = {"train_pairs": len(train), "heldout_pairs": len(heldout), "groups": len(set(groups))}
    return train, heldout, counts | {"leaked": leaks}


# ---------------------------------------------------------------- 4. 训练，考


def train_and_measure(
    stage: Stage, taught: list[dict], train: list[Pair], heldout: list[Pair], pairs: list[Pair]
) -> dict:
    """在 taught（加上回放的对话）上做 SFT，训练前后各考一遍。

    另练两个来比：没有换答案的行的；一行一行随机分的，看它的"留出"有多虚高。
    """
    settings = stage.settings
    start = chain_model("sft", settings.model, settings.source)["path"]
    replayed = [{"messages": chat["messages"]} for chat in chats(settings.replay, settings.seed)]
    exam = partial(measure, pairs=pairs, device=stage.device, small_world=settings.replay > 0)
    metrics = {"before": exam(start, train, heldout)}
    if metrics["before"]["open_heldout"]["accuracy"] == 1:
        print("训练之前，没见过的文档开卷就全对了：这些题对这个模型太容易。")
    metrics["after"] = exam(fit(stage, "sft", taught + replayed, start), train, heldout)
    if settings.swap:
        plain = to_rows(train, settings.closed)
        metrics["without_swap"] = exam(fit(stage, "without_swap", plain + replayed, start), train, heldout)
    seen, hidden = read_by_row_split(pairs, settings.heldout_share, settings.seed)
    leaky = exam(fit(stage, "row_split", seen + replayed, start), [], hidden)
    return metrics | {"row_split": leaky["closed_heldout"]}


def fit(stage: Stage, name: str, rows: list[dict], start: str) -> Path:
    """一次 SFT，返回模型的文件夹：qwen_chinese_finetune 的脚本，另开一个进程；中断了接着来。"""
    settings, path = stage.settings, stage.folder.work / f"{name}_rows.jsonl"
    write_jsonl(path, rows)
    print(f"{name}：在 {len(rows)} 行上训练，一分钟左右 …", flush=True)
    options = {
        "num_train_epochs": settings.num_train_epochs,
        "learning_rate": settings.learning_rate,
        "max_length": settings.max_length,
        "max_train_samples": len(rows),
        "eval_dataset": stage.folder.work / "heldout.jsonl",  # 不给，它会从训练的行里分走 5%
        "seed": settings.seed,
    }
    out = stage.folder.work / name
    run_stage("sft", out, start, path, settings.preset, **options)
    return out


def write_jsonl(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


# ---------------------------------------------------------------- 5. 给人看


def show(metrics: dict) -> None:
    print(
        f"\n{metrics['documents']} 份文档（另有 {metrics['unread']} 份没有读）→ {metrics['passages']} 段 → {metrics['pairs']} 题"
        f" → 能要的 {metrics['kept_pairs']} 题 → 训练 {metrics['train_pairs']}、留出 {metrics['heldout_pairs']}"
    )
    if "cleaning" in metrics:
        its, rules = metrics["cleaning"], metrics["rules"]
        print(
            f"洗：完整的句子 {its['whole_before']:.3f} → {its['whole']:.3f}，脏东西还剩 {its['noise_left']:.3f}"
        )
        print(f"出题：写明的事认出 {rules['recall']:.3f}，出的题对 {rules['precision']:.3f}")
    gate, leaks = metrics["gate"], metrics["leaked"]
    rows = [["门：故意写错的", "拦住"]]
    rows += [[FAULTS[kind], f"{rate:.3f}"] for kind, rate in gate["recall"].items()]
    print_table([*rows, ["写对的，冤枉了", f"{gate['false_alarms']:.3f}"]])
    rows = [["留出的题，训练里也有的", ""], ["一行一行随机分", f"{leaks['rows']:.3f}"]]
    rows += [["按文件分", f"{leaks['files']:.3f}"], ["按文档分（这里用的）", f"{leaks['documents']:.3f}"]]
    print_table(rows)
    if "sft" not in metrics:
        return
    sft = metrics["sft"]
    columns = {"before": "训练前", "after": "训练后", "without_swap": "没有换答案的行"}
    columns = {when: title for when, title in columns.items() if when in sft}
    rows = [["考什么", "题", *columns.values()]]
    for name in EXAMS:
        scores = [f"{sft[when][name]['accuracy']:.3f}" for when in columns]
        rows.append([TITLES[name], sft["after"][name]["n"], *scores])
    fake = sft["row_split"]
    blank = [""] * (len(columns) - 2)
    rows.append(["一行一行分的“留出”，闭卷（虚高）", fake["n"], "", f"{fake['accuracy']:.3f}", *blank])
    for name, title in (("qa_accuracy", "原来会的：小世界的题"), ("small_talk", "原来会的：寒暄")):
        if name in sft["after"]:
            rows.append([title, "", *(f"{sft[when][name]:.3f}" for when in columns)])
    print_table(rows)
    print()


def main(argv: list[str] | None = None) -> dict:
    settings = parse_settings(PipelineSettings, PRESETS, argv, FULL_MODEL)
    if settings.preset == "full" and settings.model is None:
        settings.model = FULL_MODEL
    start = chain_model("sft", settings.model, settings.source) if settings.train else None
    more = {"start": f"{start['stage']}:{start['id']}"} if start else {}
    if settings.dataset != SAMPLES:
        files = sorted(path for path in Path(settings.dataset).expanduser().rglob("*") if path.is_file())
        more["documents_sha256"] = sha256_of(files)
    record = run_lesson("data_pipeline", HOME, settings, learn, **more)
    show(record["metrics"])
    print(f"训练与留出的行、统计页在 {result_folder('data_pipeline', HOME, settings)}")
    return record


if __name__ == "__main__":
    run_main(main)
