"""读者自己的回答文件：一行一题，回答与标准答案两栏 → 全部指标带区间、每题的分、结果文件；另一个文件，成对地比。"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from answer_scores import NAMES, corpus_scores, default_scores, item_scores
from contamination import Overlap, check_questions
from metrics_report import plain, show_file
from nlp_common.base.errors import UserError
from nlp_common.base.intervals import mean_interval, paired_difference
from nlp_common.data.files import row_place
from nlp_common.data.rows import read_rows
from nlp_common.train.stage import Stage
from results import item, write_result
from text_metrics import to_simplified

PREDICTIONS = ("prediction", "pred", "answer", "response", "output", "hypothesis", "回答")
REFERENCES = ("references", "reference", "answers", "target", "label", "gold", "right", "标准答案")
PROMPTS = ("prompt", "question", "input", "问题")


@dataclass
class Answers:
    """一个文件里的回答；references[i] 是第 i 题的几个标准答案。"""

    ids: list[str]
    prompts: list[str]
    predictions: list[str]
    references: list[list[str]]
    empty: int  # 几个回答是空的：照样算，得 0 分
    source: dict


def read_answers(
    path: str, prediction_field: str | None = None, reference_field: str | None = None
) -> Answers:
    """读回答文件；少了哪一栏、哪一行没有标准答案，是 UserError，说出第几行。"""
    found = read_rows(path)
    columns = [str(name) for name in found.rows[0]]
    said_in = find_field(path, columns, prediction_field, PREDICTIONS, "回答", "--prediction_field")
    wanted_in = find_field(path, columns, reference_field, REFERENCES, "标准答案", "--reference_field")
    if said_in == wanted_in:
        raise UserError(f"{path} 的 {said_in} 一栏不能既是回答又是标准答案：用 --prediction_field 说清楚。")
    prompt_in = next((name for name in PROMPTS if name in columns), None)
    answers = Answers([], [], [], [], 0, found.source)
    for place, row in enumerate(found.rows):
        where = f"{path} {row_place(Path(path).expanduser(), place)}"
        for name in (said_in, wanted_in):
            if name not in row:
                raise UserError(f"{where}没有 {name} 这一栏；这一行有的是：{'、'.join(map(str, row))}。")
        said = row[said_in]
        if isinstance(said, (list, dict)):
            raise UserError(f"{where}的 {said_in} 要是一段文字，这里是 {type(said).__name__}。")
        said = "" if said is None else str(said)
        answers.empty += not said.strip()
        answers.ids.append(str(row["id"]) if row.get("id") not in (None, "") else f"row{place + 1}")
        answers.prompts.append(str(row[prompt_in]) if prompt_in and row.get(prompt_in) is not None else "")
        answers.predictions.append(said)
        answers.references.append(as_references(row[wanted_in], f"{where}的 {wanted_in} "))
    number, times = Counter(answers.ids).most_common(1)[0]
    if times > 1:
        raise UserError(f"{path} 里 id {number} 出现了 {times} 次：一题一行，id 不重复。")
    return answers


def find_field(
    path: str, columns: list[str], given: str | None, usual: tuple[str, ...], what: str, flag: str
) -> str:
    if given:
        if given not in columns:
            raise UserError(f"{path} 没有 {given} 这一栏（{flag}）；有的是：{'、'.join(columns)}。")
        return given
    name = next((name for name in usual if name in columns), None)
    if name is None:
        raise UserError(
            f"{path} 里不知道哪一栏是{what}：有的是 {'、'.join(columns)}。用 {flag} 说出来，或把栏名改成 {usual[0]}。"
        )
    return name


def as_references(value: object, where: str) -> list[str]:
    """一个标准答案是一段文字，几个是列表；SQuAD、CMRC 的 {"text": […]} 也认。空的是 UserError。"""
    if isinstance(value, dict) and "text" in value:
        value = value["text"]
    each = value if isinstance(value, list) else [value]
    each = [one["text"] if isinstance(one, dict) and "text" in one else one for one in each]
    if not each or any(one is None or isinstance(one, (list, dict)) or not str(one).strip() for one in each):
        raise UserError(f"{where}是空的，或不是文字：没有标准答案就没法打分，请补上或删去这一行。")
    return list(dict.fromkeys(str(one) for one in each))


def score_file(stage: Stage) -> dict:
    """--file（和 --compare）：打分、印表、写结果文件。"""
    settings = stage.settings
    names = [settings.file] + [settings.compare] * bool(settings.compare)
    files = [read_answers(name, settings.prediction_field, settings.reference_field) for name in names]
    labels = labels_of(names)
    if settings.simplified:
        for answers in files:
            answers.predictions = [to_simplified(said) for said in answers.predictions]
            answers.references = [[to_simplified(each) for each in row] for row in answers.references]
    if len(files) == 2:
        check_same_questions(names, files)

    metrics: dict = {"n": len(files[0].ids), "files": {}, "difference": {}}
    leaked = {}
    rows = {label: score_all(answers) for label, answers in zip(labels, files, strict=True)}
    for label, answers in zip(labels, files, strict=True):
        scores = {name: mean_interval([row[name] for row in rows[label]], settings.seed) for name in NAMES}
        corpus = corpus_scores(answers.predictions, answers.references, settings.seed, settings.draws)
        firsts = [wanted[0] for wanted in answers.references]
        metrics["files"][label] = {"scores": scores | corpus, "empty": answers.empty}
        metrics["files"][label]["traps"] = default_scores(answers.predictions, firsts)
    if len(files) == 2:
        for name in NAMES:
            ours, theirs = ([row[name] for row in rows[label]] for label in labels)
            metrics["difference"][name] = paired_difference(ours, theirs, settings.seed)
    if settings.check_contamination:
        leaked = check_training_file(files[0], settings.check_contamination)
        metrics["contamination"] = {
            "checked": sum(each.checked for each in leaked.values()),
            "contaminated": sum(each.found for each in leaked.values()) / len(leaked),
        }
    show_file(metrics)

    def write(folder: Path) -> None:
        for label, answers in zip(labels, files, strict=True):
            columns = (answers.ids, rows[label], answers.prompts, answers.predictions, answers.references)
            items = [
                item(number, scores, prompt, said, " / ".join(wanted))
                for number, scores, prompt, said, wanted in zip(*columns, strict=True)
            ]
            corpus = {
                name: metrics["files"][label]["scores"][name] for name in ("bleu_corpus", "chrf_corpus")
            }
            write_result(
                folder,
                "answers",
                label,
                items,
                model_id=answers.source["sha256"][:16],
                seed=settings.seed,
                settings={"simplified": settings.simplified},
                scores=corpus,
                leaked=leaked,
            )

    data = {label: answers.source for label, answers in zip(labels, files, strict=True)}
    return stage.save(plain(metrics), data, write)


def labels_of(names: list[str]) -> list[str]:
    """文件在表里、结果里叫什么：不带后缀的文件名；两个同名就带上后缀，再不行带上文件夹。"""
    paths = [Path(name).expanduser().resolve() for name in names]
    if len(paths) == 2 and paths[0] == paths[1]:
        raise UserError(f"--file 与 --compare 是同一个文件：{names[0]}。")
    for labels in (
        [p.stem for p in paths],
        [p.name for p in paths],
        [f"{p.parent.name}_{p.name}" for p in paths],
    ):
        if len(set(labels)) == len(labels):
            return labels
    return [f"{letter}_{path.name}" for letter, path in zip("ab", paths, strict=False)]


def score_all(answers: Answers) -> list[dict[str, float]]:
    pairs = zip(answers.predictions, answers.references, strict=True)
    return [item_scores(said, wanted) for said, wanted in pairs]


def check_same_questions(names: list[str], files: list[Answers]) -> None:
    """成对地比，两个文件要是同样的题：题数、id、标准答案都一样；不一样的是 UserError，说出第几题。"""
    ours, theirs = files
    if len(ours.ids) != len(theirs.ids):
        raise UserError(
            f"成对地比要同样的题：{names[0]} 有 {len(ours.ids)} 题，{names[1]} 有 {len(theirs.ids)} 题。"
        )
    for place, (mine, other) in enumerate(zip(ours.ids, theirs.ids, strict=True), 1):
        if mine != other:
            raise UserError(f"第 {place} 题的 id，{names[0]} 是 {mine}，{names[1]} 是 {other}：次序要相同。")
    for place, (mine, other) in enumerate(zip(ours.prompts, theirs.prompts, strict=True), 1):
        if mine and other and mine != other:
            raise UserError(
                f"第 {place} 题，{names[0]} 问的是“{mine[:20]}”，{names[1]} 问的是“{other[:20]}”：次序要相同。"
            )
    for place, (mine, other) in enumerate(zip(ours.references, theirs.references, strict=True), 1):
        if mine != other:
            raise UserError(
                f"第 {place} 题（id {ours.ids[place - 1]}）的标准答案，两个文件不一样：不是同样的题，不能成对地比。"
            )


def check_training_file(answers: Answers, path: str) -> dict[str, Overlap]:
    """题有没有混进训练数据（n 元组，见 contamination.py）；没有题目那一栏，就拿标准答案去查。"""
    texts = {
        number: prompt or wanted[0]
        for number, prompt, wanted in zip(answers.ids, answers.prompts, answers.references, strict=True)
    }
    return check_questions(texts, path)
