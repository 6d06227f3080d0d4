"""语料：一些文档，和一些知道答案在哪一篇的问题。

people_daily   内置：1998 年 1 月《人民日报》；问题由程序照词性造：一个分句里的人名、地名、时间换成"谁""哪里"…
tiny_world     内置：小世界的故事。问题里提到几样（锚），就有几篇合得上，所以最多能找对多少算得出来
文件            cmrc2018 那样的：每行 {"context", "question", "answers"}，或 SQuAD 的嵌套写法
文件夹          读者自己的文档（documents.py），问题也由程序造；里面有 questions.jsonl 就用它
"""

from __future__ import annotations

import dataclasses
import functools
import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nlp_common.base.errors import UserError
from nlp_common.data.files import read_file, row_place, sha256_of
from nlp_common.data.people_daily import people_daily, tagged_people_daily
from nlp_common.tiny.world import SLOTS, STORY, WORLD, Draw, draw_slots, write_story
from rag_common.chunking import structure
from rag_common.documents import Document, read_folder

PASSAGE = 400  # 文件夹里的文档切成不超过这么多字的段，一段算一篇
CLAUSE = (8, 30)  # 造问题用的分句有几个字
CONTENT = ("n", "v", "a", "i", "l", "j")  # 实词：名、动、形、成语、习语、简称（vn、an 等也算）
ASK = {"nr": "谁", "ns": "哪里", "nt": "哪个单位", "t": "什么时候", "m": "多少"}  # 词性 → 疑问词
POOR = ("中国", "我国", "北京", "新华社")  # 到处都有的，问出来没有意思


@dataclass(frozen=True)
class Question:
    """gold 是有答案的文档的 id；kind 是哪一类问题；meta 里是别的，如小世界里有几篇合得上（matches）。"""

    text: str
    answer: str
    gold: frozenset[str]
    kind: str = "plain"
    meta: dict = field(default_factory=dict)


@dataclass
class Corpus:
    name: str
    documents: list[Document]
    questions: list[Question]
    notes: list[str] = field(default_factory=list)  # 读不了的文件等，要说给读者听的

    def with_questions(self, change: Callable[[str], str]) -> Corpus:
        """同样的文档，问题的文字换成 change(文字)。"""
        questions = [dataclasses.replace(each, text=change(each.text)) for each in self.questions]
        return Corpus(self.name, self.documents, questions, self.notes)

    def describe(self) -> dict:
        """记进 run.json 的 data 一项。"""
        characters = sum(len(document.text) for document in self.documents)
        return {
            "name": self.name,
            "documents": len(self.documents),
            "characters": characters,
            "questions": len(self.questions),
        }


def load_corpus(dataset: str, n_documents: int, n_questions: int, seed: int = 0) -> Corpus:
    """--dataset 的值 → 语料。n_documents、n_questions 是最多用多少。"""
    if dataset == "people_daily":
        return people_daily_corpus(n_documents, n_questions, seed)
    if dataset == "tiny_world":
        return tiny_world_corpus(n_documents, n_questions, seed=seed)
    path = Path(dataset).expanduser()
    if path.is_dir():
        return folder_corpus(path, n_documents, n_questions, seed)
    if path.is_file():
        return cmrc_corpus(path, n_documents, n_questions, seed)
    raise UserError(
        f"--dataset {dataset}：可以是 people_daily、tiny_world、一个文件夹，或 cmrc2018 那样的 json/jsonl 文件。"
    )


# ---------------------------------------------------------------- 人民日报，程序造的问题


def people_daily_corpus(n_documents: int, n_questions: int, seed: int = 0, size: int = 160) -> Corpus:
    """报上接连的 n_documents 段（每段是几个整句，不超过 size 字），与照词性造的问题。"""
    documents: list[Document] = []
    for number, row in enumerate(people_daily("train", n_documents)):  # 一篇至少切出一段，所以够了
        for part, (start, end) in enumerate(structure(row["text"], size)):
            documents.append(Document(f"报{number:04d}#{part}", row["text"][start:end]))
    documents = documents[:n_documents]
    places = {document.id: _squeezed(document.text) for document in documents}
    shown = set("".join(places.values()))
    found: list[Question] = []
    for words in _tagged()[: 4 * n_documents]:
        if not set("".join(word for word, _ in words)) <= shown | set(" \u3000"):
            continue  # 有没出现过的字，这一段不会在里面：不必一处一处找
        for clause, answer, tag in clauses_with_answer(words):
            gold = frozenset(name for name, text in places.items() if _squeezed(clause) in text)
            if len(gold) == 1:  # 别处也有同样一句的，找到那一处也对，就说不清谁对谁错了
                asked = clause.replace(answer, ASK[tag], 1) + "？"
                found.append(Question(asked, answer, gold, tag, {"clause": clause}))
    return Corpus("people_daily", documents, _sample(found, n_questions, seed))


@functools.cache
def _tagged() -> list[list[tuple[str, str]]]:
    return tagged_people_daily("train")  # 184 万字，读一遍要几秒


def clauses_with_answer(words: Sequence[tuple[str, str]]) -> list[tuple[str, str, str]]:
    """一段带词性的词 → [(分句, 里面的一个人名、地名、机构、时间或数, 词性)]，一个分句最多造一题。

    分句在标点之间；除了答案，实词至少两个、动词至少一个（没有动词的多半是署名、标题），问题才找得到出处；
    答案在分句里只出现一次。时间与数要有数字（"最近"不问）；"某某等人"的不问。
    """
    found, clause = [], []
    for word, tag in [*words, ("。", "w")]:
        if not tag.startswith("w"):
            clause.append((word, tag))
            continue
        text = "".join(each for each, _ in clause)
        solid = [
            each for each, kind in clause if kind.startswith(CONTENT) and kind not in ASK and len(each) > 1
        ]
        verbs = [each for each, kind in clause if kind == "v"]
        if len(solid) >= 2 and verbs and CLAUSE[0] <= len(text) <= CLAUSE[1]:
            asked = [(each, kind) for each, kind in clause if kind in ASK and _worth_asking(each, kind, text)]
            found += [(text, *asked[0])] if asked else []
        clause = []
    return found


def _worth_asking(word: str, kind: str, clause: str) -> bool:
    if len(word) < 2 or word in POOR or clause.count(word) != 1 or word + "等" in clause:
        return False
    digits = {"t": "[0-9０-９一二三四五六七八九十]", "m": "[0-9０-９]"}  # "一些""十分"也标作数
    return kind not in digits or re.search(digits[kind], word) is not None


def _squeezed(text: str) -> str:
    return re.sub(r"\s+", "", text)


def _only_once(questions: list[Question], documents: list[Document]) -> list[Question]:
    """原来的分句只在一篇里有的问题：别处也有同样一句的，找到那一篇也对，就说不清谁对谁错了。"""
    whole = "\n\n".join(_squeezed(document.text) for document in documents)
    return [each for each in questions if whole.count(_squeezed(each.meta["clause"])) == 1]


def _sample(questions: list[Question], n: int, seed: int) -> list[Question]:
    """随机留下 n 道，次序不变；同样的问题只留一道。"""
    different = list({each.text: each for each in questions}.values())
    chosen = sorted(random.Random(f"questions-{seed}").sample(range(len(different)), min(n, len(different))))
    return [different[place] for place in chosen]


# ---------------------------------------------------------------- 小世界

# 问题里怎样提到一样东西。这些话里只有 {} 是有用的，别的字要么篇篇都有，要么哪一篇都没有：不然"去了"也会帮着挑。
ANCHOR = {
    "time": "那天{}",
    "person": "{}",
    "place": "{}",
    "color": "{}的",
    "animal": "一只{}",
    "food": "{}",
    "friend": "{}也来了",
    "mood": "很{}",
}
ASKED = {
    "time": "那是几点钟？",
    "person": "请问主人公叫啥？",
    "place": "请问位于何处？",
    "color": "请问毛皮怎样？",
    "animal": "请问何种动物？",
    "food": "请问喂何物？",
    "friend": "请问另有何人？",
    "mood": "请问心境如何？",
}
# 换一种说法，与原来的词没有一个字相同：字面对不上，意思对得上。人名没有别的说法。
SYNONYM = {
    "清晨": "大早上", "正午": "十二点", "傍晚": "黄昏", "深夜": "三更", "拂晓": "刚亮", "日落": "太阳下山",
    "花园": "苗圃", "学校": "教室", "山顶": "高峰", "海边": "沙滩", "市场": "菜摊",
    "车站": "月台", "田间": "庄稼地", "桥头": "过河处", "书店": "卖读物的铺子", "村口": "乡下路旁",
    "乌黑": "墨色", "雪白": "奶色", "银灰": "铅色", "深棕": "咖啡色", "金黄": "橙色", "火红": "朱色",
    "松鼠": "啮齿动物", "野兔": "长耳朵动物", "信鸽": "送邮件的鸟", "乌龟": "硬壳爬行动物", "狐狸": "狡猾的犬科动物",
    "刺猬": "浑身长针的动物", "山羊": "咩咩叫的家畜", "鹦鹉": "会学舌的鸟", "麻雀": "叽叽喳喳的鸟", "猕猴": "会爬树的灵长类",
    "香蕉": "弯弯的热带水果", "苹果": "红富士", "面包": "吐司", "饼干": "曲奇", "花生": "带壳坚仁",
    "玉米": "苞谷", "葡萄": "提子", "萝卜": "根茎蔬菜", "蛋糕": "奶油甜点", "西瓜": "夏天解渴的水果",
    "高兴": "开怀", "失望": "沮丧", "平静": "安宁", "难受": "痛苦", "激动": "热血沸腾", "满意": "知足", "害怕": "恐惧", "骄傲": "自豪",
}  # fmt: skip
NAMED = ("person", "friend")  # 没有同义词的槽位


def tiny_world_corpus(
    n_stories: int, n_questions: int, anchors: int = 3, seed: int = 0, synonyms: int = 0
) -> Corpus:
    """n_stories 篇故事；每题提到自己那一篇的 anchors 样东西，问另外一样。

    meta 里：slot 问的是哪一样，anchors 提到了哪几样，matches 有几篇合得上全部的锚（连同自己那一篇），
    literal 有几篇合得上照原样写的锚。synonyms：有几个锚换成同义词，与原来的词一个字也不同。
    文档的 meta 是那一篇的各个槽位。
    """
    if (
        not 0 <= synonyms <= anchors <= len(SLOTS) - 1
        or anchors < 1
        or synonyms > len(SLOTS) - 1 - len(NAMED)
    ):
        raise UserError(
            f"一题里提到的东西（anchors）是 1 到 {len(SLOTS) - 1} 样，其中换成同义词的不多于它、不多于 {len(SLOTS) - 3}，"
            f"给的是 {anchors} 与 {synonyms}。"
        )
    rng = random.Random(f"rag-{seed}")
    draw = Draw(rng)
    documents = []
    for number in range(n_stories):
        slots = draw_slots(draw)
        documents.append(Document(f"故事{number:04d}", write_story(draw, slots), slots))
    questions = []
    for _ in range(n_questions):
        gold = rng.choice(documents)
        asked = rng.choice(SLOTS)
        others = [slot for slot in SLOTS if slot != asked]
        replaced = rng.sample([slot for slot in others if slot not in NAMED], synonyms)
        kept = rng.sample([slot for slot in others if slot not in replaced], anchors - synonyms)
        named = sorted([*replaced, *kept], key=SLOTS.index)
        mentioned = []
        for slot in named:
            word = gold.meta[slot]
            mentioned.append(ANCHOR[slot].format(SYNONYM[word] if slot in replaced else word))
        facts = {
            "slot": asked,
            "anchors": named,
            "matches": _matching(documents, gold, named),
            "literal": _matching(documents, gold, kept),
        }
        text, kind = "，".join(mentioned) + "，" + ASKED[asked], "synonyms" if synonyms else "plain"
        questions.append(Question(text, gold.meta[asked], frozenset([gold.id]), kind, facts))
    return Corpus("tiny_world", documents, questions)


def _matching(documents: list[Document], gold: Document, slots: list[str]) -> int:
    """有几篇的这几个槽位与 gold 的全相同。"""
    return sum(all(each.meta[slot] == gold.meta[slot] for slot in slots) for each in documents)


def best_recall(questions: Sequence[Question], k: int, known: str = "matches") -> float:
    """小世界里，任何检索的前 k 名平均最多能对多少：合得上的有 M 篇，谁也分不出是哪一篇，k 个里碰上的概率是 min(k, M)/M。

    known="literal"：只认字面、不懂同义词的检索最多能对多少。
    """
    return sum(min(k, q.meta[known]) / q.meta[known] for q in questions) / len(questions)


# ---------------------------------------------------------------- 读者的文件


def cmrc_corpus(path: str | Path, n_documents: int, n_questions: int, seed: int = 0) -> Corpus:
    """问答的文件：相同的 context 是一篇文档，问题的 gold 就是它。"""
    path = Path(path)
    nested = _squad_rows(path)
    rows = list(nested or read_file(path))
    names: dict[str, str] = {}
    different: set[str] = set()
    questions, empty = [], 0
    for number, row in enumerate(rows, 1):
        context, asked = row.get("context", row.get("context_text")), row.get("question")
        if not isinstance(context, str) or not isinstance(asked, str):
            where = f"第 {number} 题" if nested else row_place(path, number - 1)
            raise UserError(
                f"{path} {where}：要有 context（一段文字）与 question，有的栏是 {'、'.join(row)}。"
            )
        if not context.strip() or not asked.strip():
            empty += 1
            continue
        different.add(context)
        if context not in names and len(names) >= n_documents:
            continue
        name = names.setdefault(context, f"段{len(names):04d}")
        answers = _answers(row.get("answers") or row.get("answer"))
        questions.append(
            Question(asked, answers[0] if answers else "", frozenset([name]), "plain", {"answers": answers})
        )
    documents = [Document(name, context) for context, name in names.items()]
    notes = [f"{path} 有 {empty} 条的问题或文字是空的，不用。"] if empty else []
    notes += _only_the_first(path, len(different), n_documents)
    texts = {document.id: document.text for document in documents}
    apart = sum(bool(q.answer) and all(q.answer not in texts[name] for name in q.gold) for q in questions)
    if apart:
        notes.append(f"{path} 有 {apart} 题的答案不是文字里的原话：怎样切、怎样抄，这些题都算不上对。")
    if not questions:
        raise UserError(f"{path} 里没有一个能用的问题。")
    return Corpus(path.name, documents, _sample(questions, n_questions, seed), notes)


def _squad_rows(path: Path) -> list[dict]:
    """SQuAD、CMRC 原来的嵌套写法 {"data": [{"paragraphs": [{"context", "qas"}]}]} → 平的各行；不是的话是空的。"""
    if path.suffix.lower() != ".json":
        return []
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError):
        return []  # 有错让 read_file 去说
    if not isinstance(value, dict) or "data" not in value:
        return []
    rows = []
    try:
        for article in value["data"]:
            for paragraph in article["paragraphs"]:
                for qa in paragraph["qas"]:
                    answers = [answer["text"] for answer in qa.get("answers", [])]
                    row = {"context": paragraph["context"], "question": qa["question"], "answers": answers}
                    rows.append(row)
    except (TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"{path} 里有 data，像 SQuAD 的嵌套写法，可是第 {len(rows) + 1} 题那里不成样子："
            '要写成 {"data": [{"paragraphs": [{"context": "…", "qas": [{"question": "…", "answers": [{"text": "…"}]}]}]}]}。'
        ) from error
    if not rows:
        raise UserError(f"{path} 的 data 里没有一道题。")
    return rows


def _answers(value: object) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):  # datasets 的写法 {"text": […], "answer_start": […]}
        value = value.get("text", [])
    return [str(each) for each in value] if isinstance(value, list) else []


def folder_corpus(folder: str | Path, n_documents: int, n_questions: int, seed: int = 0) -> Corpus:
    """读者的文件夹：每个文件切成不超过 PASSAGE 字的段，一段算一篇。"""
    files, notes = read_folder(folder)
    documents: list[Document] = []
    for file in files:
        for number, (start, end) in enumerate(structure(file.text, PASSAGE), 1):
            facts = {"file": file.id, "start": start, "end": end}
            documents.append(Document(f"{file.id}#{number}", file.text[start:end], facts))
    asked = Path(folder).expanduser() / "questions.jsonl"
    notes = [note for note in notes if not note.startswith(str(asked))]
    given = _asked(asked, documents, notes) if asked.is_file() else []
    notes += _only_the_first(folder, len(documents), n_documents)
    documents = documents[:n_documents]
    used = {document.id for document in documents}
    found = [dataclasses.replace(each, gold=each.gold & used) for each in given if each.gold & used]
    if not given:
        found = made_up(documents, seed)
    if len(found) < len(given):
        notes.append(f"{asked} 有 {len(given) - len(found)} 题的出处不在用的这 {len(documents)} 段里，不问。")
    if not found:
        if given:
            raise UserError(f"{asked} 的题，出处都不在用的前 {n_documents} 段里：把 --documents 写大些。")
        raise UserError(
            f"{folder} 里的文字太短，造不出问题：在里面放一个 questions.jsonl（每行 question 与 answer）。"
        )
    return Corpus(Path(folder).name, documents, _sample(found, n_questions, seed), notes)


def _only_the_first(where: str | Path, there: int, n_documents: int) -> list[str]:
    """没有全用，要说出来。"""
    return [f"{where} 共 {there} 段，只用前 {n_documents} 段。"] if there > n_documents else []


def _asked(path: Path, documents: list[Document], unread: list[str]) -> list[Question]:
    """questions.jsonl：每行 question，和 answer（答案的原话）或 document（哪个文件）；gold 是有答案的各段。"""
    questions = []
    for number, row in enumerate(read_file(path), 1):
        answer, file = str(row.get("answer", "")), str(row.get("document", ""))
        here = [d for d in documents if not file or d.meta["file"] == file]
        gold = frozenset(d.id for d in here if answer in d.text)
        if not row.get("question") or not gold or not (answer or file):
            raise UserError(
                f"{path} {row_place(path, number - 1)}：要有 question，和在文档里找得到原话的 answer，或文件名 document。"
                + "".join(f"\n  （{note}）" for note in unread)  # 多半是答案所在的文件没有读成
            )
        questions.append(Question(str(row["question"]), answer, gold))
    return questions


def made_up(documents: list[Document], seed: int = 0) -> list[Question]:
    """没有词性的文字也造得出问题：一个分句中间的两三个字换成"什么"。"""
    rng = random.Random(f"made-up-{seed}")
    found = []
    for document in documents:
        for clause in re.split(r"[，。！？；：、,.!?;:\s“”\"（）()《》]+", document.text):
            if CLAUSE[0] <= len(clause) <= CLAUSE[1]:
                size = rng.choice((2, 3))
                start = rng.randrange(2, len(clause) - size - 1)
                asked = clause[:start] + "什么" + clause[start + size :] + "？"
                gold = frozenset([document.id])
                found.append(Question(asked, clause[start : start + size], gold, "plain", {"clause": clause}))
    return _only_once(found, documents)


def data_of(dataset: str) -> dict:
    """--dataset 是读者的文件或文件夹时，它的 sha256（run.json 要记）。"""
    path = Path(dataset).expanduser()
    if path.is_file():
        return {"sha256": sha256_of([path])}
    if path.is_dir():
        return {"sha256": sha256_of(sorted(p for p in path.rglob("*") if p.is_file()))}
    return {}


assert len(STORY) == 5 and set(ANCHOR) == set(ASKED) == set(WORLD)  # 小世界改了，这里也要改
