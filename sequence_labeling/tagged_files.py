"""标注数据：一句话是一串字，加上哪些字合成一个实体（或词）。读自带的《人民日报》、BIO/BIOES/BMES 文件、CLUENER 式的 JSON。

读进来都变成 Sentence：字与实体，不管文件用的是哪种标记法；训练时再写成标签（tags_of）。标记法由文件里的开头字母认出：

    BIO    B-PER I-PER O            BIOES  B-PER I-PER E-PER S-PER O      BMES  B-PER M-PER E-PER S-PER O
    IOB1   I-PER I-PER O（同类的两个挨着时，后一个才用 B-）               BILOU 与 BIOES 相同，E、S 写作 L、U

文件夹里叫 train、dev、test 的是三份；只有一个文件就从里面分。
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from nlp_common.base.errors import UserError
from nlp_common.data.encodings import BOM, raw_lines, what_is_wrong
from nlp_common.data.files import read_file, row_place, sha256_of
from nlp_common.data.people_daily import Word, tagged_people_daily
from nlp_common.data.rows import sha256_of_rows

Span = tuple[str, int, int]  # (类型, 从第几个字, 到第几个字之前)

BUILTIN = "people_daily"
ENTITIES = {"nr": "PER", "ns": "LOC", "nt": "ORG"}  # 《人民日报》的词性 → 实体类型
FEW_FAULTS = 0.01  # 残缺的实体不到这个比例，说一声就用；更多就是整个文件写错了
JSON_SUFFIXES = (".json", ".jsonl")
TAG_SUFFIXES = (
    ".bmes",
    ".bio",
    ".bioes",
    ".bieo",
    ".bieos",
    ".iob",
    ".iob2",
    ".conll",
    ".txt",
    ".tsv",
    ".tag",
)
SPLIT_NAMES = {"train": ("train",), "dev": ("dev", "validation", "valid", "val"), "test": ("test",)}
SCHEMES = {"BIO": "BIO", "BIOES": "BIOES", "BMES": "BMESO", "BILOU": "BILOU"}  # IOB1 的字母与 BIO 相同
TO_BMES = {"I": "M", "L": "E", "U": "S"}  # 各家的中间、结尾、单字 → BMES 的写法


@dataclass
class Sentence:
    """一句话：一个个字，与其中的实体（按位置，互不重叠）。"""

    chars: list[str]
    spans: list[Span] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(self.chars)


# ---------------------------------------------------------------- 1. 实体 → 标签


def tags_of(sentence: Sentence, scheme: str = "BMES") -> list[str]:
    """一句话的标签，每个字一个；scheme 是 BMES、BIO 或 BIOES。类型是空的（分词）就只有字母。"""
    tags = ["O"] * len(sentence.chars)
    for kind, start, end in sentence.spans:
        letters = "B" + "M" * (end - start - 2) + "E" if end - start > 1 else "S"
        if scheme == "BIO":
            letters = "B" + "I" * (end - start - 1)
        elif scheme == "BIOES":
            letters = letters.replace("M", "I")
        for place, letter in zip(range(start, end), letters, strict=True):
            tags[place] = f"{letter}-{kind}" if kind else letter
    return tags


# ---------------------------------------------------------------- 2. 自带的《人民日报》


def sentences_of(words: list[Word]) -> list[list[Word]]:
    """一段 → 一句句：在句号、问号、叹号（及其后的引号）之后切开。"""
    sentences: list[list[Word]] = [[]]
    for word in words:
        after_end = sentences[-1] and sentences[-1][-1][0] in "。！？"
        if after_end and word[0] not in "”’）》。！？":
            sentences.append([])
        sentences[-1].append(word)
        if word[0] in "”’" and len(sentences[-1]) > 1 and sentences[-1][-2][0] in "。！？":
            sentences.append([])
    return [sentence for sentence in sentences if sentence]


def as_entities(words: list[Word]) -> Sentence:
    """词与词性 → 字与实体：人名、地名、机构名。"""
    sentence = Sentence([])
    for word, pos in words:
        start = len(sentence.chars)
        sentence.chars += word
        if pos in ENTITIES:
            sentence.spans.append((ENTITIES[pos], start, start + len(word)))
    return sentence


def as_words_with_pos(words: list[Word]) -> Sentence:
    """词与词性 → 字与词：每个词是一段，类型是词性。"""
    sentence = Sentence([])
    for word, pos in words:
        sentence.spans.append((pos, len(sentence.chars), len(sentence.chars) + len(word)))
        sentence.chars += word
    return sentence


def people_daily_sentences(split: str, convert: Callable[[list[Word]], Sentence]) -> list[Sentence]:
    """《人民日报》的一份（train 或 validation），切成句子。"""
    found = []
    for paragraph in tagged_people_daily(split):
        found += [convert(words) for words in sentences_of(paragraph)]
    return found


# ---------------------------------------------------------------- 3. 一行一个字的标注文件


def read_rows(path: Path) -> list[list[tuple[int, str, str]]]:
    """一行是"字 标签"（空格或制表符隔开，中间可以有别的列），空行隔开句子 → 每句 [(第几行, 字, 标签)]。"""
    rows: list[list[tuple[int, str, str]]] = [[]]
    columns = 0
    for number, line in _lines(path):
        if not line.strip(" \t"):
            rows.append([])
            continue
        cells = re.split(r"[ \t]+", line.rstrip(" \t"))
        if cells[0] == "":  # 行首就是空格：这个"字"是空格本身
            cells[0] = " "
        if cells[0] == "-DOCSTART-":
            continue
        columns = columns or len(cells)
        if len(cells) < 2:
            raise UserError(
                f'{path} 第 {number} 行只有一列（{line.strip()!r}），要的是"字 标签"两列，用空格或制表符隔开。'
            )
        if len(cells) != columns:
            raise UserError(
                f"{path} 第 {number} 行有 {len(cells)} 列，前面的行有 {columns} 列：{line.strip()!r}。"
            )
        rows[-1].append((number, cells[0], cells[-1]))
    rows = [row for row in rows if row]  # 连着的空行不是句子
    if not rows:
        raise UserError(f"{path} 里没有一句话。")
    return rows


def read_tag_file(path: Path, scheme: str = "auto") -> list[Sentence]:
    """一个标注文件 → 句子；有错的说出第几行。scheme 是 auto、bio、iob1、bioes、bmes、bilou。"""
    rows = read_rows(path)
    known = recognise(path, rows)  # 标签本身不认识的，给了 --scheme 也要说
    scheme = known if scheme == "auto" else scheme.upper()
    faults: list[str] = []
    sentences = [_sentence_from_tags(row, scheme, faults) for row in rows]
    if len(faults) > FEW_FAULTS * sum(len(sentence.spans) for sentence in sentences):
        advice = "请改好；如果整个文件都没有 B-、只有 I-，就是 IOB1，加 --scheme iob1。"
        raise UserError(f"{path} 有 {len(faults)} 个实体残缺：{'；'.join(faults[:3])}。{advice}")
    if faults:  # 真实的数据里常有几个，如句子从实体中间断开
        print(f"{path.name} 有 {len(faults)} 个实体残缺，当作 O：{'；'.join(faults[:3])}。")
    return sentences


def recognise(path: Path, rows: list[list[tuple[int, str, str]]]) -> str:
    """看全部标签的开头字母，认出标记法；认不出是 UserError。"""
    first: dict[str, int] = {}  # 字母 → 第一次在第几行
    starts_inside = b_after_same = b_elsewhere = 0
    for row in rows:
        previous = "O"
        for number, _, tag in row:
            letter, dash, kind = tag.partition("-")
            if letter not in tuple("BIMESLUO") or (dash and not kind) or (letter == "O" and dash):
                raise UserError(
                    f"{path} 第 {number} 行的标签 {tag!r} 不认识。认得的写法：O、B-PER 这样的（BIO、BIOES、BMES、BILOU、IOB1），"
                    "分词的可以只写 B、M、E、S。"
                )
            first.setdefault(letter, number)
            same = previous != "O" and previous.partition("-")[2] == kind
            starts_inside += letter == "I" and not same
            b_after_same += letter == "B" and same
            b_elsewhere += letter == "B" and not same
            previous = tag
    letters = set(first)
    if letters <= set("BIO"):
        return "IOB1" if starts_inside and not b_elsewhere else "BIO"
    for name, allowed in SCHEMES.items():
        if letters <= set(allowed):
            return name
    shown = "、".join(f"{letter}（第 {first[letter]} 行）" for letter in sorted(letters))
    raise UserError(
        f"{path} 的标签混了几种标记法，开头字母有 {shown}。一个文件只能用一种："
        "BIO、BIOES（B I E S O）、BMES（B M E S O）或 BILOU（B I L U O）。"
    )


def _sentence_from_tags(row: list[tuple[int, str, str]], scheme: str, faults: list[str]) -> Sentence:
    """标签 → 实体。没有开头的、没有结尾的是标错了：当作 O，并在 faults 里写上第几行、什么毛病。"""
    sentence = Sentence([char for _, char, _ in row])
    open_kind, open_at = None, 0  # 还没有结束的实体
    broken = None  # 正在经过的没有开头的一段是什么类型：一段只说一次
    ends_itself = scheme in ("BMES", "BIOES", "BILOU")
    for place, (number, _, tag) in enumerate([*row, (row[-1][0], "", "O")]):
        letter, _, kind = tag.partition("-")
        letter = TO_BMES.get(letter, letter)  # 只剩 B M E S O
        goes_on = letter in "ME" and kind == open_kind
        if open_kind is not None and not goes_on:
            if ends_itself:
                faults.append(f"第 {row[open_at][0]} 行开始的 {open_kind or '词'} 没有结尾（E-）")
            else:
                sentence.spans.append((open_kind, open_at, place))
            open_kind = None
        if letter in "ME" and not goes_on:
            if scheme == "IOB1":
                letter = "B"
            elif broken != kind:
                faults.append(f"第 {number} 行的 {tag} 前面没有 B-{kind}，没有开头".replace("B-，", "B，"))
        broken = kind if letter in "ME" and not goes_on else None
        if letter == "B":
            open_kind, open_at = kind, place
        elif letter == "S":
            sentence.spans.append((kind, place, place + 1))
        elif letter == "E" and goes_on:
            sentence.spans.append((kind, open_at, place + 1))
            open_kind = None
    return sentence


def _lines(path: Path):
    """(第几行, 这一行)；解不了码的说出第几行、像哪种编码。"""
    try:
        for number, raw in enumerate(raw_lines(path), 1):
            yield number, raw.decode("utf-8").replace(BOM, "").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise UserError(what_is_wrong(path, number, error)) from error
    except OSError as error:
        raise UserError(f"读不了 {path}：{error.strerror or error}") from error


# ---------------------------------------------------------------- 4. JSON


def read_json_file(path: Path) -> list[Sentence]:
    """CLUENER 式的 JSON，一行一句：``{"text": "叶老桂认为…", "label": {"name": {"叶老桂": [[0, 2]]}}}``，位置含尾。

    也认 ``{"text": …, "entities": [{"type": "name", "start": 0, "end": 3}]}``，位置不含尾。
    重叠的实体一个字只能属于一个：留长的，并说出有几个没用。
    """
    sentences, empty, dropped = [], 0, 0
    for index, row in enumerate(read_file(path)):
        if not isinstance(row.get("text"), str) or not ("label" in row or "entities" in row):
            raise UserError(
                f'{path} {row_place(path, index)}：要有 "text" 和 "label"（CLUENER 的写法）或 "entities"，'
                f"这里有 {'、'.join(row) or '（空的）'}。"
            )
        if not row["text"].strip():
            empty += 1
            continue
        spans = []
        for kind, start, end, mention in _json_entities(path, index, row):
            if not 0 <= start < end <= len(row["text"]) or mention not in (None, row["text"][start:end]):
                raise UserError(
                    f"{path} {row_place(path, index)}：{kind} 的位置 [{start}, {end}) 上是 {row['text'][start:end]!r}，"
                    f"写的却是 {mention!r}。CLUENER 的位置从 0 数、含最后一个字。"
                )
            spans.append((kind, start, end))
        kept: list[Span] = []
        for span in sorted(spans, key=lambda span: (span[1] - span[2], span[1])):  # 长的在前
            if all(span[2] <= other[1] or other[2] <= span[1] for other in kept):
                kept.append(span)
        dropped += len(spans) - len(kept)
        sentences.append(Sentence(list(row["text"]), sorted(kept, key=lambda span: span[1])))
    if empty:
        print(f"{path.name} 有 {empty} 个空句子，跳过。")
    if dropped:
        print(f"{path.name} 有 {dropped} 个实体与更长的重叠，没有用。")
    if not sentences:
        raise UserError(f"{path} 里没有一句话。")
    return sentences


def _json_entities(path: Path, index: int, row: dict):
    """一行里的实体 → (类型, 从, 到（不含）, 那几个字或 None)。"""
    try:
        if "label" in row:
            for kind, mentions in row["label"].items():
                for mention, places in mentions.items():
                    for start, last in places:
                        yield kind, int(start), int(last) + 1, mention
        else:
            for each in row["entities"]:
                yield str(each["type"]), int(each["start"]), int(each["end"]), each.get("text")
    except (AttributeError, KeyError, TypeError, ValueError):
        raise UserError(
            f"{path} {row_place(path, index)}的实体写得不对。要写成 "
            '{"label": {"name": {"叶老桂": [[0, 2]]}}} 或 {"entities": [{"type": "name", "start": 0, "end": 3}]}。'
        ) from None


# ---------------------------------------------------------------- 5. --dataset：三份


def load_splits(
    dataset: str,
    limit: int | None = None,
    scheme: str = "auto",
    convert: Callable[[list[Word]], Sentence] = as_entities,
    seed: int = 0,
) -> tuple[dict[str, list[Sentence]], dict]:
    """→ ({"train", "dev", "test"}, 来历)。limit 是训练最多用几句（打乱之后的前几句）。

    自带的《人民日报》：test 是整篇留出的文章，dev 从训练的段落里分出约二十分之一。没有 dev 的也从训练里分；
    没有 test 的，dev 就是 test，并且说出来。train 与 test 里一模一样的句子，从 train 里去掉。
    """
    if not dataset.strip():
        raise UserError(f"--dataset 是空的：给一个文件、文件夹，或自带的 {BUILTIN}。")
    if dataset == BUILTIN:
        splits = {"train": people_daily_sentences("train", convert)}
        splits["test"] = people_daily_sentences("validation", convert)
        sha256 = sha256_of_rows([{"chars": s.chars, "spans": s.spans} for s in splits["test"]])
        source = {"name": BUILTIN, "kind": "builtin", "test_sha256": sha256}
    else:
        splits, source = _read_folder(Path(dataset).expanduser(), dataset, scheme)
    test = {sentence.text for sentence in splits.get("test", []) + splits.get("dev", [])}
    if dataset == BUILTIN:  # 短句（"新华社北京一月一日电"）在留出的文章里也有
        splits["train"] = [sentence for sentence in splits["train"] if sentence.text not in test]
    for name in ("dev", "test"):
        if name not in splits:
            held = [_bucket(s.text) % 20 == (name == "test") for s in splits["train"]]
            splits[name] = [s for s, h in zip(splits["train"], held, strict=True) if h]
            splits["train"] = [s for s, h in zip(splits["train"], held, strict=True) if not h]
            if not splits[name] or not splits["train"]:
                raise UserError(
                    f"{dataset} 的句子太少，分不出训练、验证、测试三份：至少要几十句，或给出三个文件。"
                )
            source[name] = "从训练数据里分出"
    if limit is not None and limit < len(splits["train"]):
        splits["train"] = random.Random(seed).sample(splits["train"], limit)
    source |= {f"{name}_sentences": len(sentences) for name, sentences in splits.items()}
    return splits, source


def _bucket(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")


def _read_folder(path: Path, name: str, scheme: str) -> tuple[dict[str, list[Sentence]], dict]:
    files = {}
    if path.is_file():
        files["train"] = path
    elif path.is_dir():
        for split, stems in SPLIT_NAMES.items():
            inside = [
                p for p in sorted(path.iterdir()) if p.suffix.lower() in (*TAG_SUFFIXES, *JSON_SUFFIXES)
            ]
            found = [p for stem in stems for p in inside if re.split(r"[._-]", p.name.lower())[0] == stem]
            if found:
                files[split] = found[0]
        if "train" not in files:
            shown = "、".join(sorted(p.name for p in path.iterdir())[:10]) or "（空的）"
            raise UserError(
                f"文件夹 {path} 里没有叫 train 的标注文件（里面有：{shown}）。要有 train.bmes、dev.bmes、test.bmes 这样的文件，"
                f"后缀可以是 {' '.join((*TAG_SUFFIXES, *JSON_SUFFIXES))}。"
            )
    else:
        raise UserError(f"没有 {name} 这个文件或文件夹。请检查 --dataset；自带的数据叫 {BUILTIN}。")
    splits = {}
    for split, file in files.items():
        reader_is_json = file.suffix.lower() in JSON_SUFFIXES
        splits[split] = read_json_file(file) if reader_is_json else read_tag_file(file, scheme)
        if not any(sentence.spans for sentence in splits[split]):
            if split == "train":
                raise UserError(f"{file} 里没有一个实体，全是 O：没有东西可学。")
            print(f"{file.name} 里没有一个实体（没有公开标签？），不用它评测。")
            del splits[split]
    if "test" not in splits and "dev" in splits:
        print("没有带标签的 test：报的数是 dev 上的。")
        splits["test"] = splits["dev"]
    known = {kind for sentence in splits["train"] for kind, _, _ in sentence.spans}
    for split in ("dev", "test"):
        for sentence in splits.get(split, []):
            for kind, _, _ in sentence.spans:
                if kind not in known:
                    print(f"注意：{split} 里的类型 {kind} 训练数据里没有，一定认不出。")
                    known.add(kind)
    return splits, {"name": name, "kind": "file", "sha256": sha256_of(sorted(files.values()))}
