"""清洗的结果：每一步查准、查全几成，三份数据训练出来的差多少，印在终端里。"""

from __future__ import annotations

from collections import defaultdict

import numpy as np

from curation_rows import STEPS, TABLES, Table, turns_of
from label_errors import average_precision
from nlp_common.base.console import print_table
from nlp_common.base.intervals import mean_interval, paired_difference
from personal_data import find_personal

FAULTS = {
    "duplicate": "一样的",
    "near_duplicate": "近重复",
    "garbage": "垃圾",
    "language": "别的语言",
    "personal": "个人信息",
    "contaminated": "评测的题",
    "wrong_answer": "答错的",
    "flipped": "标反的",
}
ARM_NAMES = {"raw": "原样", "curated": "清洗过", "random": "随便丢同样多"}


def precision_recall(tables: dict[str, Table]) -> dict:
    """埋了毛病的数据：每种毛病查准、查全几成；总的，好的行冤枉几成，坏的行漏掉几成。"""
    found: dict = defaultdict(lambda: [0, 0])  # 毛病 → [查出来的里真是的, 查出来的]
    caught: dict = defaultdict(lambda: [0, 0])  # 毛病 → [埋的里查出来的, 埋的]
    kinds: dict = defaultdict(lambda: [0, 0])  # 细类，如 garbage.mojibake
    total = {"bad": 0, "bad_left": 0, "good": 0, "good_dropped": 0}
    for table in tables.values():
        planted = table.planted
        for step, (_, faults) in STEPS.items():
            if step not in FAULTS:
                continue
            flagged = [number for number in table.found_in(step) if not _is_moved_copy(table, number)]
            found[step][0] += sum(planted.faults.get(number) in faults for number in flagged)
            found[step][1] += len(flagged)
        step_of = {row["row"]: row["step"] for row in table.dropped} | dict.fromkeys(table.masked, "personal")
        for number, fault in planted.faults.items():
            right = fault in STEPS.get(step_of.get(number, ""), ("", ()))[1]
            for counts in (caught[fault], kinds[f"{fault}.{planted.details.get(number, '')}"]):
                counts[0] += right
                counts[1] += 1
        for number in range(len(table.raw)):
            bad, dropped = number in planted.faults, number in step_of and step_of[number] != "personal"
            total["bad" if bad else "good"] += 1
            total["bad_left"] += bad and number not in step_of
            total["good_dropped"] += not bad and dropped
    metrics: dict = {"precision": {}, "recall": {}, "details": {}}
    for fault in FAULTS:
        if caught[fault][1]:
            metrics["recall"][fault] = caught[fault][0] / caught[fault][1]
            metrics["precision"][fault] = found[fault][0] / max(found[fault][1], 1)
    metrics["details"] = {
        name: right / n for name, (right, n) in sorted(kinds.items()) if not name.endswith(".")
    }
    metrics["average_precision"] = ranking(tables)
    metrics["flipped_at_zero"] = simple_line(tables["pairs"])
    metrics["personal_exact"] = exact_spans(tables)
    metrics["bad_share"] = total["bad"] / (total["bad"] + total["good"])
    left = total["good"] - total["good_dropped"] + total["bad_left"]
    metrics["bad_share_left"] = total["bad_left"] / left
    metrics["good_dropped_share"] = total["good_dropped"] / total["good"]
    lookalikes = [
        number in {row["row"] for row in table.dropped} or number in table.masked
        for table in tables.values()
        for number in table.planted.lookalikes
    ]
    metrics["lookalikes_blamed"] = sum(lookalikes) / max(len(lookalikes), 1)
    return metrics


def ranking(tables: dict[str, Table]) -> dict:
    """不画线，只看排得好不好（平均查准率）：余地，与对数之比。"""
    found = {}
    for name, which, scores in (
        ("wrong_answer", "chats", "margins"),
        ("wrong_answer_log_ratio", "chats", "log_ratios"),
        ("flipped", "pairs", "margins"),
    ):
        table = tables[which]
        values = {
            number: value for number, value in getattr(table, scores).items() if number not in table.masked
        }
        kind = "wrong_answer" if which == "chats" else "flipped"
        is_wrong = np.array([table.planted.faults.get(number) == kind for number in values], bool)
        if is_wrong.any():
            found[name] = average_precision(np.array(list(values.values())), is_wrong)
    return found


def simple_line(table: Table) -> dict:
    """标反的，线不按 confident learning 画，就画在 0：模型更喜欢标为差的，就算标反。"""
    flagged = {number for number, margin in table.margins.items() if margin < 0}
    flipped = {number for number in table.margins if table.planted.faults.get(number) == "flipped"}
    right = len(flagged & flipped)
    return {"precision": right / max(len(flagged), 1), "recall": right / max(len(flipped), 1)}


def _is_moved_copy(table: Table, number: int) -> bool:
    """原件已经因为别的丢了，副本算不算重复说不清：不计。"""
    return number in table.planted.copies and table.planted.copies[number] not in table.alive


def exact_spans(tables: dict[str, Table]) -> float:
    """埋的号码里，盖住的正好是那几个字（不多不少）的比例。"""
    right = []
    for table in tables.values():
        for number, (kind, written) in table.planted.personal.items():
            spans = [
                (each.kind, message["content"][each.start : each.end])
                for message in turns_of(table.raw[number])
                for each in find_personal(message["content"])
            ]
            right.append((kind, written) in spans)
    return sum(right) / max(len(right), 1)


def compare_arms(models: dict, seed: int) -> dict:
    """三份数据训练出来的：各阶段的指标，与清洗过的减别的两份的差（同样的题，成对比）。"""
    metrics: dict = {"sft": {}, "dpo": {}}
    names = ("qa_accuracy", "preferred_rate", "sampled_accuracy", "judge_score", "small_talk", "rows")
    for kind, arms in models.items():
        for arm, found in arms.items():
            metrics[kind][arm] = {name: found[name] for name in names}
    last = models.get("dpo") or models["sft"]
    for arm, found in last.items():
        score = mean_interval(found["scores"], seed)
        metrics |= {f"preferred_rate_{arm}": score.value, f"qa_accuracy_{arm}": found["qa_accuracy"]}
        metrics[f"preferred_{arm}"] = {"low": score.low, "high": score.high}
    for arm in ("raw", "random"):
        gap = paired_difference(last["curated"]["scores"], last[arm]["scores"], seed)
        metrics[f"gain_over_{arm}"] = {"value": gap.value, "low": gap.low, "high": gap.high}
    return metrics


def count_curation(table: Table) -> dict:
    return {
        "rows": table.steps[0]["before"],
        "kept": len(table.alive),
        "masked": len(table.masked),
        "steps": {
            step["step"]: {
                "dropped": step["before"] - step["after"],
                "reasons": list(step["reasons"].items()),
            }
            for step in table.steps
        },
    }


# ---------------------------------------------------------------- 给人看


def show(metrics: dict) -> None:
    for name, title in TABLES.items():
        if name in metrics:
            show_steps(title, metrics[name])
    if "precision" in metrics:
        rows = [["埋的毛病", "查准", "查全"]]
        for fault in metrics["recall"]:
            rows.append(
                [FAULTS[fault], f"{metrics['precision'][fault]:.3f}", f"{metrics['recall'][fault]:.3f}"]
            )
        print_table(rows)
        print(
            f"  坏行：清洗前 {metrics['bad_share']:.1%}，清洗后 {metrics['bad_share_left']:.1%}；"
            f"好行冤枉了 {metrics['good_dropped_share']:.1%}；像而不是的冤枉了 {metrics['lookalikes_blamed']:.1%}"
        )
    if "bias" in metrics:
        show_bias(metrics["bias"])
    if "preferred_rate_curated" in metrics:
        show_arms(metrics)


def show_steps(title: str, counts: dict) -> None:
    rows = [[title, "丢掉", "为什么"]]
    for step, row in counts["steps"].items():
        reasons = "、".join(f"{reason} {n}" for reason, n in row["reasons"][:4])
        dropped = f"{row['dropped']}" if step != "personal" else f"盖 {counts['masked']} 行"
        rows.append([STEPS[step][0], dropped, reasons])
    print_table(rows)
    print(f"  {counts['rows']} 行，留下 {counts['kept']} 行")
    for kind in [row for row in counts["coverage"] if row["fewer"]]:
        print(
            f"  注意：{kind['kind']} 只留下 {kind['kept']:.0%}（{kind['before']} → {kind['after']}），比别的少得多"
        )


def show_bias(bias: dict) -> None:
    for when, title in (("raw", "清洗前"), ("curated", "清洗后")):
        length, position = bias[when]["length"], bias[when]["position"]
        said = []
        if length["n"]:
            said.append(
                f"长的那个被标为好的 {length['longer_chosen']:.1%}（{length['low']:.1%}–{length['high']:.1%}）"
            )
        if position["n"]:
            said.append(
                f"先看到的被标为好的 {position['first_chosen']:.1%}（{position['low']:.1%}–{position['high']:.1%}）"
            )
        people = [
            f"{row['annotator']}偏爱{row['bias']}（{row['share']:.0%}）"
            for row in bias[when]["annotators"]
            if row["biased"]
        ]
        if said:
            print(f"  {title}：" + "；".join(said + people))


def show_arms(metrics: dict) -> None:
    rows = [["训练在", "SFT 行数", "采样答对", "DPO 行数", "采样又对又全又有礼", "贪心答对", "寒暄"]]
    for arm, title in ARM_NAMES.items():
        sft, dpo = metrics["sft"].get(arm), metrics["dpo"].get(arm)
        rows.append(
            [title, sft["rows"], f"{sft['sampled_accuracy']:.3f}", dpo["rows"], f"{dpo['preferred_rate']:.3f}",
             f"{dpo['qa_accuracy']:.3f}", f"{dpo['small_talk']:.3f}"]
        )  # fmt: skip
    print_table(rows)
    for arm in ("raw", "random"):
        gap = metrics[f"gain_over_{arm}"]
        print(f"  清洗过的比{ARM_NAMES[arm]}：{gap['value']:+.3f}（{gap['low']:+.3f} 到 {gap['high']:+.3f}）")
