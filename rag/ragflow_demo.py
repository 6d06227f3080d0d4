"""RAGFlow：一个现成的 RAG 服务器。怎样装，怎样用它的接口建知识库、提问、核对引用。

你会学到
  1. RAGFlow 是几个容器（Elasticsearch、MySQL、MinIO、Redis 和它自己）：先看机器够不够（--do doctor），再装。
  2. 用接口走完一遍：建知识库 → 上传 → 解析（要等）→ 只查不答 → 助手提问，带引用。
  3. 回答里的 [ID:0] 指第几块：引用要核对，块里真有那句话才算数。
  4. 接口的脾气：HTTP 200 不等于成功，要看正文的 code；解析是异步的；删除什么也不给，就是删全部。

怎么运行
  python ragflow_demo.py                          # 没有服务器：先体检，再对着本机的替身走一遍
  python ragflow_demo.py --do doctor              # 只体检：缺 Docker、内存、模型，还是钥匙；怎样装
  export RAGFLOW_API_KEY=……；python ragflow_demo.py --url http://127.0.0.1:9380
  python ragflow_demo.py --url … --documents 我的文件夹 --question 多少钱？

应当看到：体检表；六个问题的回答，每个注着出处；替身上答对 6 题、引用全部核对得上。

参考：RAGFlow 的 HTTP API 文档 https://ragflow.io/docs/http_api_reference。
"""

from nlp_common.base.cli import run_main

import os
import re
import shutil
import subprocess
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nlp_common.base.arguments import Limits, option
from nlp_common.base.errors import UserError
from nlp_common.base.runs import write_json
from nlp_common.train.lesson import run_lesson
from nlp_common.train.settings import LessonSettings, parse_settings
from nlp_common.train.stage import Stage
from ragflow_client import RAGFlow
from ragflow_stand_in import KEY, stand_in

HOME = Path(__file__).resolve().parent
PRESETS: dict[str, dict] = {"tiny": {}, "full": {}}
NAME = "nlp_learning_demo"
HANDBOOK = HOME / "handbook"
QUESTIONS = [  # 问题，回答里要有的话
    ("学生证一次最多借几本？", "十二本"),
    ("新书架上的书借期多少天？", "十天"),
    ("预约之后迟到多久，座位就自动放出？", "二十分钟"),
    ("讨论室一共几间？", "六间"),
    ("补办读者证收多少工本费？", "十元"),
    ("缺页的书怎么处理？", "丢失"),
]
# RAGFlow 文档写的最低要求
NEEDS = {"cores": 4, "memory_gb": 16, "disk_gb": 50, "max_map_count": 262_144}
DEPLOY = """怎样装（Linux，x86_64；macOS、Windows 用 Docker Desktop，内存调到 16 GB 以上）：
  sudo sysctl -w vm.max_map_count=262144              # Elasticsearch 要；写进 /etc/sysctl.conf 才不会重启就没了
  git clone https://github.com/infiniflow/ragflow.git && cd ragflow/docker
  docker compose -f docker-compose.yml up -d          # 第一次要下几个 GB；拉不动就给 Docker 配镜像
  docker logs -f docker-ragflow-cpu-1                 # 看到网址就好了；老的版本里叫 ragflow-server
然后：浏览器开 http://本机，注册；头像 → 模型提供商，加一个嵌入模型、一个聊天模型，设成默认；头像 → API，建一把钥匙：
  export RAGFLOW_API_KEY=ragflow-……
  python ragflow_demo.py --url http://127.0.0.1:9380"""


@dataclass
class RAGFlowSettings(LessonSettings):
    do: Literal["demo", "doctor", "clean"] = option(
        "demo：走一遍；doctor：只体检；clean：删掉留在服务器上的", "demo"
    )
    url: str | None = option("RAGFlow 服务器，写到端口为止；默认没有，用本机的替身")
    documents: str | None = option("上传哪个文件夹里的文件；默认是 handbook，一家图书馆的三份规章")
    question: str | None = option("只问这一句；默认问六句，答案是知道的")
    k: int = option("只查不答时看几块", 3, limits=Limits(at_least=1))
    wait_seconds: float = option("最多等多久解析完", 600.0, limits=Limits(above=0))
    keep: bool = option("走完以后把知识库留在服务器上（默认删掉）", False)

    def check(self) -> None:
        if self.question is not None and not self.question.strip():
            raise UserError("--question 后面还没有写问题。")
        if self.url is not None and not self.url.startswith(("http://", "https://")):
            raise UserError(f"--url {self.url} 不是网址：例如 http://127.0.0.1:9380。")


# ---------------------------------------------------------------- 全貌


def main(argv: list[str] | None = None) -> dict:
    settings = parse_settings(RAGFlowSettings, PRESETS, argv)
    if settings.do == "clean":
        return clean(server_of(settings))
    report = doctor(settings.url)
    print_doctor(report)
    if settings.do == "doctor":
        return {"doctor": report}
    if settings.url or settings.documents or settings.question:
        settings.retrain = True  # 别人的服务器、自己的文档与问题，每次都重新问
    return run_lesson("ragflow_demo", HOME, settings, walk_through)


def walk_through(stage: Stage) -> dict:
    """建知识库 → 上传 → 解析 → 查 → 问 → 核对引用；走完（或半路出错）都删掉留在服务器上的。"""
    settings = stage.settings
    paths = documents_of(settings.documents or HANDBOOK)
    if not settings.url:
        print(
            "\n没有 --url：下面是本机的替身（ragflow_stand_in.py），会说同样的接口，查得准不准与 RAGFlow 无关。"
        )
    with stand_in() if not settings.url else nullcontext(settings.url) as url:
        server = server_of(settings) if settings.url else RAGFlow(url, KEY)
        clean(server)  # 上次中断留下的
        try:
            dataset, seconds = build(server, paths, settings)
            answers = ask_all(server, dataset, settings)
        finally:
            if not settings.keep:
                clean_up(
                    RAGFlow(server.url, server.key)
                )  # 另开一条连接：请求到一半按了 Ctrl-C，原来的那条用不得了
    known = [each for each in answers if each["right"] is not None]
    metrics = {
        "documents": len(paths),
        "parse_seconds": seconds,
        "n": len(answers),
        "citations_right": share([each["cited"] for each in answers]),
    }
    if known:
        metrics["answer_right"] = share([each["right"] for each in known])
        metrics["recall_at_k"] = share([each["found"] for each in known])
    data = {"name": str(settings.documents or "handbook"), "rows": len(paths)}
    return stage.save(metrics, data, write=lambda folder: write_json(folder / "answers.json", answers))


def server_of(settings: RAGFlowSettings) -> RAGFlow:
    if not settings.url:
        raise UserError("--do clean 要 --url：替身关了就什么也没有了。")
    key = os.environ.get("RAGFLOW_API_KEY")
    if not key:
        raise UserError("没有钥匙：RAGFlow 的网页里 头像 → API 建一把，然后 export RAGFLOW_API_KEY=……")
    return RAGFlow(settings.url, key)


def documents_of(folder: str | Path) -> list[Path]:
    folder = Path(folder).expanduser()
    paths = sorted(path for path in folder.iterdir() if path.is_file()) if folder.is_dir() else [folder]
    paths = [path for path in paths if not path.name.startswith(".")]
    if not paths or not paths[0].exists():
        raise UserError(f"--documents {folder} 里没有文件。")
    if empty := [path.name for path in paths if path.stat().st_size == 0]:
        raise UserError(f"空的文件：{'、'.join(empty)}；RAGFlow 解析不了，先拿走。")
    return paths


# ---------------------------------------------------------------- 走一遍


def build(server: RAGFlow, paths: list[Path], settings: RAGFlowSettings) -> tuple[str, float]:
    """建知识库、上传、解析，返回它的 id 和解析用了几秒。"""
    dataset = server.create_dataset(NAME)
    documents = server.upload(dataset, paths)
    print(f"\n建了知识库 {NAME}，上传 {len(documents)} 个文件，解析 …", flush=True)
    started = time.monotonic()
    server.parse(dataset, documents)
    for document in server.wait_parsed(dataset, documents, settings.wait_seconds):
        print(f"  {document['name']}：{document['chunk_count']} 块")
    return dataset, time.monotonic() - started


def ask_all(server: RAGFlow, dataset: str, settings: RAGFlowSettings) -> list[dict]:
    """每个问题：只查不答，看答案在不在前 k 块里；再问助手，核对引用。自己的问题不知道标准答案，right 是 None。"""
    questions = [(settings.question, None)] if settings.question else QUESTIONS
    if settings.documents and not settings.question:
        raise UserError("自己的文档没有现成的问题：用 --question 问一句。")
    chat = server.create_chat(NAME, [dataset])
    session = server.create_session(chat, NAME)
    answers = []
    for question, wanted in questions:
        found = server.retrieve([dataset], question, settings.k)
        said = server.ask(chat, session, question)
        cited = check_citations(said["answer"], said["chunks"])
        print(f"\n问　{question}\n答　{said['answer']}")
        for number, chunk in cited["chunks"]:
            print(
                f"    [ID:{number}] 出自 {chunk.get('document_name') or chunk.get('document_keyword')}：{one_line(chunk['content'])}"
            )
        answers.append(
            {
                "question": question,
                "answer": said["answer"],
                "right": None if wanted is None else wanted in said["answer"],
                "found": None if wanted is None else any(wanted in chunk["content"] for chunk in found),
                "cited": cited["right"],
            }
        )
    return answers


MARK = re.compile(r"\[ID:\s*(\d+)\]|##(\d+)\$\$")  # 现在的写法，与 0.17 以前的


def check_citations(answer: str, chunks: list[dict]) -> dict:
    """引用对不对：有引用，每个都指得到一块，回答的话（去掉引用）与所指的块有足够长的相同的字。

    → ``{"right", "chunks": [(编号, 块)]}``。说"没有找到"而不引用，也算对。
    """
    numbers = [int(first or second) for first, second in MARK.findall(answer)]
    text = MARK.sub("", answer).strip()
    pointed = [(number, chunks[number]) for number in numbers if number < len(chunks)]
    if not numbers:
        return {"right": not chunks or "没有找到" in text, "chunks": []}
    supported = all(longest_common(text, chunk["content"]) >= min(6, len(text)) for _, chunk in pointed)
    return {"right": len(pointed) == len(numbers) and supported, "chunks": pointed}


def longest_common(a: str, b: str) -> int:
    """最长的一段相同的字有多长。"""
    best, row = 0, [0] * (len(b) + 1)
    for char in a:
        row = [0] + [row[j] + 1 if char == other else 0 for j, other in enumerate(b)]
        best = max(best, *row)
    return best


def one_line(text: str, most: int = 48) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else text[:most] + "…"


def share(right: list[bool]) -> float:
    return sum(right) / len(right)


def clean(server: RAGFlow) -> dict:
    """删掉叫 NAME 的知识库（连同其中的文档）；别的不碰。"""
    ids = [each["id"] for each in server.datasets(NAME) if each["name"] == NAME]
    server.delete_datasets(ids)
    return {"deleted": len(ids)}


def clean_up(server: RAGFlow) -> None:
    """走完、出错、中断都删掉自己建的；删不成只说一句，不盖住真正的原因。"""
    try:
        clean(server)
    except UserError as error:
        print(f"（留在服务器上的 {NAME} 没有删成：{error}以后用 --do clean 再删。）")


# ---------------------------------------------------------------- 体检


def doctor(url: str | None) -> list[dict]:
    """一项一行：``{"name", "ok": True|False|None, "said"}``；None 是看不出来。"""
    report = [check_docker(), *check_machine(), check_map_count()]
    key = os.environ.get("RAGFLOW_API_KEY")
    report.append(
        {"name": "钥匙", "ok": bool(key), "said": "RAGFLOW_API_KEY 有" if key else "没有设 RAGFLOW_API_KEY"}
    )
    if not url:
        report.append({"name": "服务器", "ok": None, "said": "没有给 --url"})
        return report
    server = RAGFlow(url, key or "none", timeout=5)
    try:
        datasets = server.datasets()
    except UserError as error:
        report.append({"name": "服务器", "ok": False, "said": str(error)})
        return report
    report.append(
        {"name": "服务器", "ok": True, "said": f"{url} 连得上，钥匙对，有 {len(datasets)} 个知识库"}
    )
    report.append(check_models(server))
    return report


def check_models(server: RAGFlow) -> dict:
    """没有默认的嵌入模型，知识库就建不了：建一个空的试试，随即删掉。聊天模型要到提问时才知道。"""
    try:
        server.delete_datasets([server.create_dataset(f"{NAME}_doctor")])
    except UserError as error:
        return {"name": "模型", "ok": False, "said": f"建不了知识库：{error}"}
    return {"name": "模型", "ok": True, "said": "有默认的嵌入模型（建得了知识库）；聊天模型要到提问时才知道"}


def check_docker() -> dict:
    if not shutil.which("docker"):
        return {"name": "Docker", "ok": False, "said": "没有装：https://docs.docker.com/engine/install/"}
    for command in (["docker", "info"], ["docker", "compose", "version"]):
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return {
                "name": "Docker",
                "ok": False,
                "said": f"{' '.join(command)} 10 秒没有回答：Docker 开着吗？",
            }
        if done.returncode:
            lines = (done.stderr or done.stdout).strip().splitlines() or ["没有说原因"]
            return {"name": "Docker", "ok": False, "said": f"{' '.join(command)} 不成：{lines[-1]}"}
    return {"name": "Docker", "ok": True, "said": "装了，开着，有 compose"}


def check_machine() -> list[dict]:
    cores, disk = os.cpu_count() or 1, shutil.disk_usage(Path.home()).free / 2**30
    memory = memory_gb()
    rows = [("核", cores, NEEDS["cores"], " 个"), ("磁盘", disk, NEEDS["disk_gb"], " GB 空着")]
    report = [
        {"name": name, "ok": have >= need, "said": f"{have:.0f}{unit}，要 {need}"}
        for name, have, need, unit in rows
    ]
    said = "看不出来" if memory is None else f"{memory:.0f} GB，要 {NEEDS['memory_gb']}"
    # 16 GB 的机器，系统自己占去一点，看到的是 15 GB 多
    ok = None if memory is None else memory >= NEEDS["memory_gb"] * 0.95
    return [*report, {"name": "内存", "ok": ok, "said": said}]


def memory_gb() -> float | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    except (AttributeError, ValueError, OSError):  # Windows 没有 sysconf
        return None


def check_map_count(path: Path = Path("/proc/sys/vm/max_map_count")) -> dict:
    """Elasticsearch 要的内核参数；只有 Linux 有。"""
    if not path.exists():
        return {"name": "max_map_count", "ok": None, "said": "不是 Linux，在 Docker Desktop 的虚拟机里"}
    have, need = int(path.read_text()), NEEDS["max_map_count"]
    mend = "" if have >= need else f"：sudo sysctl -w vm.max_map_count={need}"
    return {"name": "max_map_count", "ok": have >= need, "said": f"{have}，要 {need}{mend}"}


def print_doctor(report: list[dict]) -> None:
    print("\n体检")
    for row in report:
        mark = {True: "✓", False: "✗", None: "?"}[row["ok"]]
        print(f"  {mark} {row['name']}　{row['said']}")
    if any(row["ok"] is False for row in report):
        print(f"\n{DEPLOY}")


if __name__ == "__main__":
    run_main(main)
