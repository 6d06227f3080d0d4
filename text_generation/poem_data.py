"""poem_gpt.py 的数据与尺子：诗从哪里来；格式、平仄、押韵、对仗、重复、抄了多少怎么量。"""

import itertools
import json
import random
from pathlib import Path

import poem_grammar
from nlp_common.base.errors import UserError
from nlp_common.data.files import sha256_of
from nlp_common.data.rows import read_rows
from poem_grammar import COUPLETS, KINDS, QUATRAINS, pattern
from poem_sounds import TONES, learn_tones, rhyme_of

PACKAGE = "chinese-poetry"
HOW_TO_GET = (
    f"npm pack {PACKAGE} && tar xzf {PACKAGE}-*.tgz，再加 --dataset package（约 85 MB；没有 npm 就到它的"
    "网站上下载同名的包）"
)
FREE = "文"  # 读者自己的文字：不论格律


# ---------------------------------------------------------------- 1. 诗从哪里来


def find_package(here: Path) -> str | None:
    """装在旁边的 chinese-poetry（npm install 或解开的 npm pack）；没有是 None。"""
    for folder in (Path.cwd(), here, here.parent):
        for name in (f"node_modules/{PACKAGE}", "package", PACKAGE):
            if is_package(folder / name):
                return str(folder / name)
    return None


def is_package(folder: Path) -> bool:
    return (folder / "dist" / "quantangshi").is_dir()


def load_poems(dataset: str, n: int, n_heldout: int, seed: int) -> tuple[list[dict], list[dict], dict, dict]:
    """→ (训练的诗, 留出的诗, 字 → 平仄, 数据来历)；一首诗是 ``{"kind", "text"}``，两边没有相同的。"""
    if dataset == "grammar":
        train = poem_grammar.poems(n, seed)
        heldout = poem_grammar.poems(n_heldout, 0, heldout=True)
        source = {"name": "grammar", "kind": "builtin", "rows": len(train)}
        return train, heldout, TONES, source
    tones: dict[str, str] = {}
    folder = Path(dataset).expanduser()
    if is_package(folder):
        rows, tones, source = tang_poems(folder)
    else:
        found = read_rows(dataset)
        texts = [row.get("text") for row in found.rows]
        if not all(isinstance(text, str) and text.strip() for text in texts):
            line = next(i for i, text in enumerate(texts, 1) if not (isinstance(text, str) and text.strip()))
            raise UserError(f"{dataset} 的第 {line} 行没有 text 一栏，或者是空的。")
        rows, source = [guess_kind(text.strip()) for text in texts], found.source
    rows = list({row["text"]: row for row in rows}.values())  # 先去重再分
    if len(rows) < 20:
        raise UserError(f"{dataset} 去掉重复只有 {len(rows)} 首，至少要 20 首。")
    train, heldout = split(rows, n_heldout)
    source["rows"] = len(train[:n])
    return train[:n], heldout, tones, source


def guess_kind(text: str) -> dict:
    """读者的一首：行数、字数合得上就是绝句或对联，合不上就只当文字学。"""
    lines = lines_of(text)
    for kind, (length, n_lines) in KINDS.items():
        if len(lines) == n_lines and all(len(line) == length for line in lines):
            return {"kind": kind, "text": "".join(line + "，。"[i % 2] for i, line in enumerate(lines))}
    return {"kind": FREE, "text": text}


def tang_poems(package: Path) -> tuple[list[dict], dict[str, str], dict]:
    """《全唐诗》的五绝、七绝，与律诗中间两联拆出的对联；每个字的平仄从包里的 strains 学来。"""
    rows, aligned = [], []
    files = sorted((package / "dist" / "quantangshi").glob("poet.tang.*.json"))
    strains: dict[str, str] = {}
    for path in sorted((package / "dist" / "strains" / "json").glob("poet.tang.*.json")):
        for each in json.loads(path.read_text(encoding="utf-8")):
            strains[each["id"]] = "".join(each["strains"])
    for path in files:
        for poem in json.loads(path.read_text(encoding="utf-8")):
            text = "".join(poem["paragraphs"])
            if len(strains.get(poem["id"], "")) == len(text):
                aligned.append((text, strains[poem["id"]]))
            rows += poems_in(poem["paragraphs"])
    if not rows:
        raise UserError(
            f"{package} 里没有读得懂的唐诗（dist/quantangshi/poet.tang.*.json）。要用的包：{HOW_TO_GET}。"
        )
    source = {
        "name": f"{PACKAGE}：全唐诗",
        "kind": "folder",
        "path": str(package),
        "sha256": sha256_of(files),
    }
    return rows, learn_tones(aligned), source


def poems_in(paragraphs: list[str]) -> list[dict]:
    """一首唐诗 → 绝句一首，或律诗的颔联、颈联两副对联；别的（排律、古风、缺字的）不要。"""
    lines = [line for paragraph in paragraphs for line in lines_of(paragraph)]
    length = len(lines[0]) if lines else 0
    if length not in (5, 7) or any(len(line) != length or not line.isalpha() for line in lines):
        return []
    number = "五" if length == 5 else "七"
    if len(lines) == 4:
        text = "".join(line + "，。"[i % 2] for i, line in enumerate(lines))
        return [{"kind": f"{number}绝", "text": text}]
    if len(lines) == 8:
        pairs = [lines[2:4], lines[4:6]]
        return [{"kind": f"{number}联", "text": f"{upper}，{lower}。"} for upper, lower in pairs]
    return []


def split(rows: list[dict], n_heldout: int) -> tuple[list[dict], list[dict]]:
    """固定地分：每隔几首留出一首，与种子无关。"""
    step = max(2, len(rows) // min(n_heldout, max(1, len(rows) // 10)))
    heldout = rows[::step][:n_heldout]
    kept = {row["text"] for row in heldout}
    train = [row for row in rows if row["text"] not in kept]
    random.Random(0).shuffle(train)  # 只取一部分时，不要只取排在前面的诗人
    return train, heldout


# ---------------------------------------------------------------- 2. 尺子


def lines_of(text: str) -> list[str]:
    """一首 → 各句，不带标点。"""
    for mark in "，。！？；、\n":
        text = text.replace(mark, " ")
    return text.split()


def length_kept(poem: dict) -> bool:
    """句数、每句的字数、标点都对。"""
    length, n_lines = KINDS[poem["kind"]]
    lines = lines_of(poem["text"])
    return [len(line) for line in lines] == [length] * n_lines and len(poem["text"]) == (length + 1) * n_lines


def line_fits(line: str, form: str, tones: dict[str, str]) -> bool:
    """一句合不合这个句式；平仄不明的字放过。"""
    wanted = pattern(form, len(line))
    return all(want is None or tones.get(char, want) == want for char, want in zip(line, wanted, strict=True))


def metre_kept(poem: dict, tones: dict[str, str]) -> bool:
    """整首合不合一种格式：每句的平仄，加上句与句之间的粘、对。"""
    if not length_kept(poem):
        return False
    lines = lines_of(poem["text"])
    formats = COUPLETS if len(lines) == 2 else QUATRAINS
    return any(
        all(line_fits(line, form, tones) for line, form in zip(lines, forms, strict=True))
        for forms in formats
    )


def rhymes(poem: dict) -> bool:
    """绝句的第二、四句押不押韵：末字同一个韵部。"""
    lines = lines_of(poem["text"])
    if len(lines) < 4:
        return False
    first, second = rhyme_of(lines[1][-1]), rhyme_of(lines[3][-1])
    return first is not None and first == second


def parallel(poem: dict) -> bool | None:
    """自带语法的对联：上下联的第一个名词是不是同一类；不是语法里的词是 None。"""
    nouns = [line[-5:-3] for line in lines_of(poem["text"])]
    if any(noun not in poem_grammar.ALL_NOUNS for noun in nouns):
        return None
    return poem_grammar.category(nouns[0]) == poem_grammar.category(nouns[1])


def distinct(texts: list[str], n: int = 2) -> float:
    """句内相邻 n 个字的组合，不同的占多少。与量了多少首有关，要拿同样多的比。"""
    grams = [line[i : i + n] for text in texts for line in lines_of(text) for i in range(len(line) - n + 1)]
    return len(set(grams)) / max(1, len(grams))


def five_grams(line: str) -> list[str]:
    return [line[i : i + 5] for i in range(len(line) - 4)]


def copied_share(texts: list[str], train: list[str]) -> float:
    """句内连续五个字的组合，训练数据里原样有的占多少。一句五言只有一个，所以就是整句照抄的比例。"""
    seen = {gram for text in train for line in lines_of(text) for gram in five_grams(line)}
    grams = [gram for text in texts for line in lines_of(text) for gram in five_grams(line)]
    return sum(gram in seen for gram in grams) / max(1, len(grams))


def mean(values: list) -> float:
    return sum(values) / max(1, len(values))


def measure(poems: list[dict], train: list[str], tones: dict[str, str]) -> dict[str, float]:
    """一批诗的全部指标；没有可量的（没有绝句、不知道平仄）就没有那一项。"""
    regular = [poem for poem in poems if poem["kind"] in KINDS]
    quatrains = [poem for poem in regular if poem["kind"].endswith("绝")]
    texts = [poem["text"] for poem in poems]
    found = {"distinct_2": distinct(texts), "copied_share": copied_share(texts, train)}
    if regular:
        found["length_kept"] = mean([length_kept(poem) for poem in regular])
        if tones:
            found["metre_kept"] = mean([metre_kept(poem, tones) for poem in regular])
    if quatrains:
        found["rhyme_kept"] = mean([rhymes(poem) for poem in quatrains])
    pairs = [parallel(poem) for poem in regular if poem["kind"].endswith("联") and length_kept(poem)]
    if known := [each for each in pairs if each is not None]:
        found["parallel_kept"] = mean(known)
    return found


def random_rhyme(poems: list[dict]) -> float:
    """不是一首诗里的两句碰巧同韵的比例：这一首的第二句，与下一首的第四句。"""
    quatrains = [
        lines_of(poem["text"]) for poem in poems if poem["kind"].endswith("绝") and length_kept(poem)
    ]
    if len(quatrains) < 2:
        return 0.0
    ends = [(a[1][-1], b[3][-1]) for a, b in itertools.pairwise(quatrains)]
    return mean([rhyme_of(a) is not None and rhyme_of(a) == rhyme_of(b) for a, b in ends])
