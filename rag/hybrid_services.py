"""混合推理那一课的服务与毛病：检索、生成各花几秒、现在是好是坏，坏的时候给出什么。

模型的回答事先一批算好（表），服务照着表答：几千次请求不必一次次生成，毛病却与真的一样：连不上、慢、空、乱答。
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch

from circuit_breaker import Clock
from nlp_common.lm.chatml import prompt_ids
from nlp_common.lm.losses import IGNORE, token_logps
from nlp_common.lm.replies import reply_to
from nlp_common.tiny.world import small_talk_questions
from nlp_common.train.lesson import once
from nlp_common.train.stage import Stage
from rag_benches import ANCHORS, can_ask, with_reading
from rag_common.bm25 import BM25
from rag_common.corpus import Corpus, Question, tiny_world_corpus
from rag_common.generate import FromModel

WINDOWS = [  # 一段一段地出毛病，中间是好的：{哪样服务: 什么毛病}
    {}, {"retriever": "down"}, {}, {"retriever": "slow"}, {}, {"retriever": "empty"}, {}, {"retriever": "garbage"},
    {}, {"generator": "down"}, {}, {"generator": "slow"}, {}, {"generator": "garbage"}, {},
    {"retriever": "down", "generator": "down"}, {},
]  # fmt: skip
LABELS = {
    "retriever": "检索",
    "generator": "生成",
    "down": "断了",
    "slow": "慢",
    "empty": "空",
    "garbage": "乱给",
}
SECONDS = {"retriever": (0.02, 0.06), "generator": (0.2, 0.5), "local": (0.01, 0.02)}  # 好的时候花几秒
SLOW, REFUSED = 20.0, 0.01  # 慢的要几秒；连不上的，多久知道连不上
LOCAL_SHARE = 0.9  # 本机的副本是旧的，只有九成的文档
RUBBISH = ("", "Internal Server Error", "��锟斤拷锟斤拷", "的的的的的的的的", "作为一个人工智能")


class Down(Exception):
    """连不上。"""


@dataclass
class Table:
    """一题事先算好的：kind 是 inside、chat、unknown；几种资料各一段（没有是 None）与照着它的回答；模型自己的回答与把握。"""

    question: Question
    kind: str
    found: str | None  # 检索的第一名
    wrong: str | None  # 乱给的时候给的一段
    local: str | None  # 本机那份旧的副本里的第一名
    replies: dict[str, str]  # 一段的文字 → 照着它的回答
    own: str = ""
    sure: float = 0.0


class Services:
    """照着表答的两样服务。faults 是现在的毛病；timeout 是最多等几秒（不限是 None）。"""

    def __init__(self, clock: Clock, seed: int):
        self.clock, self.rng = clock, random.Random(f"services-{seed}")
        self.faults: dict[str, str] = {}
        self.calls = {"retriever": 0, "generator": 0, "local": 0}

    def retrieve(self, row: Table, timeout: float | None) -> str | None:
        self._spend("retriever", timeout)
        fault = self.faults.get("retriever")
        return None if fault == "empty" else row.wrong if fault == "garbage" else row.found

    def retrieve_local(self, row: Table) -> str | None:
        self._spend("local", None)
        return row.local

    def read(self, row: Table, passage: str, timeout: float | None) -> str:
        self._spend("generator", timeout)
        return self._maybe_rubbish(row.replies[passage])

    def say(self, row: Table, timeout: float | None) -> tuple[str, float]:
        """模型自己的回答，与把握；乱答的没有把握。"""
        self._spend("generator", timeout)
        text = self._maybe_rubbish(row.own)
        return text, row.sure if text == row.own else 0.0

    def _maybe_rubbish(self, text: str) -> str:
        return self.rng.choice(RUBBISH) if self.faults.get("generator") == "garbage" else text

    def _spend(self, part: str, timeout: float | None) -> None:
        self.calls[part] += 1
        fault = self.faults.get(part)
        if fault == "down":
            self.clock.pass_by(REFUSED)
            raise Down(part)
        seconds = SLOW if fault == "slow" else self.rng.uniform(*SECONDS[part])
        if timeout is not None and seconds > timeout:
            self.clock.pass_by(timeout)
            raise TimeoutError(part)
        self.clock.pass_by(seconds)


# ---------------------------------------------------------------- 题，与事先算好的回答


def prepare(stage: Stage, generator: FromModel) -> tuple[list[Table], list[str]]:
    """→ (各题，资料的各段)。模型的回答算好就存下，中断了不必再答一遍。"""
    settings = stage.settings
    tables, texts = make_tables(settings.stories, settings.questions, settings.seed)
    write_replies(tables, once(stage, "replies", read_all, tables, generator))
    return tables, texts


def make_tables(stories: int, n: int, seed: int) -> tuple[list[Table], list[str]]:
    """三种问题混在一起，每题的检索结果先算好；回答还没有（read_all、write_replies）。"""
    corpus = tiny_world_corpus(stories, 2 * n, ANCHORS, seed)
    other = tiny_world_corpus(stories, 2 * n, ANCHORS, seed + 5000)  # 没有收进资料的故事
    asked = [(each, "inside") for each in readable(corpus) if each.meta["matches"] == 1][:n]
    asked += [(each, "unknown") for each in readable(other) if not in_some(each, other, corpus)][:n]
    for number in range(n // 2):
        talk = small_talk_questions()[number % len(small_talk_questions())]
        text = talk["messages"][0]["content"]
        asked.append((Question(text, talk["answer"], frozenset(), "chat", {"read": text}), "chat"))
    rng = random.Random(f"hybrid-{seed}")
    rng.shuffle(asked)
    texts = [each.text for each in corpus.documents]
    return look_up(asked, texts, rng), texts


def readable(corpus: Corpus) -> list[Question]:
    return [with_reading(corpus, each) for each in corpus.questions if can_ask(each)]


def in_some(question: Question, its: Corpus, corpus: Corpus) -> bool:
    """收进的资料里也有一篇合得上题里的每一样：那就不是资料里没有的题。"""
    facts = next(each.meta for each in its.documents if each.id in question.gold)
    named = question.meta["anchors"]
    return any(all(each.meta[slot] == facts[slot] for slot in named) for each in corpus.documents)


def look_up(asked: list[tuple[Question, str]], texts: list[str], rng: random.Random) -> list[Table]:
    remote, local = BM25(), BM25()
    ids = [str(number) for number in range(len(texts))]
    kept = int(LOCAL_SHARE * len(texts))
    remote.add(ids, texts)
    local.add(ids[:kept], texts[:kept])
    tables = []
    for question, kind in asked:
        best = [[texts[int(name)] for name, _ in index.search(question.text, 1)] for index in (remote, local)]
        found, copy = (each[0] if each else None for each in best)
        wrong = rng.choice([each for each in texts if each != found])
        tables.append(Table(question, kind, found, wrong, copy, {}))
    return tables


def read_all(tables: list[Table], generator: FromModel) -> list[list]:
    """模型照着各段答一遍，再什么也不看答一遍，连同把握 → 每题 [{段: 照着它的回答}, 自己的回答, 把握]。"""
    pairs = []  # [(第几题, 一段)]
    for number, row in enumerate(tables):
        pairs += [(number, text) for text in dict.fromkeys((row.found, row.wrong, row.local)) if text]
    questions = [row.question.meta["read"] for row in tables]
    said = generator.answer([questions[number] for number, _ in pairs], [[text] for _, text in pairs])
    found: list[list] = [[{}, "", 0.0] for _ in tables]
    for (number, text), answer in zip(pairs, said, strict=True):
        found[number][0][text] = answer.text
    asks = [{"messages": [{"role": "user", "content": question}]} for question in questions]
    replies = reply_to(generator.model, generator.tokenizer, asks, generator.max_new_tokens)
    for each, ask, reply in zip(found, asks, replies, strict=True):
        each[1:] = reply["text"], how_sure(generator, ask["messages"], reply["ids"])
    return found


def write_replies(tables: list[Table], found: list[list]) -> None:
    for row, (replies, own, sure) in zip(tables, found, strict=True):
        row.replies, row.own, row.sure = replies, own, sure


@torch.inference_mode()
def how_sure(generator: FromModel, messages: list[dict], reply: list[int]) -> float:
    """最没有把握的那个 token 的概率：背熟的话每个字都有把握，编的总有一处是随便挑的。"""
    if not reply:
        return 0.0
    prompt = prompt_ids(generator.tokenizer, messages)
    ids = torch.tensor([prompt + list(reply)], device=generator.model.device)  # (1, T)
    labels = torch.tensor([[IGNORE] * len(prompt) + list(reply)], device=ids.device)
    return float(token_logps(generator.model, ids, labels).min().exp())
