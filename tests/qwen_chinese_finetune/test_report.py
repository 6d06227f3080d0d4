"""report.json 与 report.html：内容齐全，一个文件离线能开，模型写出的标签只是文字，缺阶段也画得出来。"""

import json
import re
from html.parser import HTMLParser

import pytest

from report.metrics import highlights
from report.write import write_report

STAGES = ["pretrain", "sft", "reward", "dpo", "ppo", "compare"]
NASTY = '<script>alert("x")</script>&\x00'
VOID = {"meta", "br", "link", "img", "input", "hr"}


def record(metrics: dict, history: list[dict], seconds: float = 10.0) -> dict:
    settings = {"learning_rate": 1e-3, "max_train_samples": 100, "max_steps": -1, "seed": 0}
    return {
        "seconds": seconds,
        "metrics": metrics,
        "history": history,
        "settings": settings,
        "data": {"train": {"name": "tiny_world"}},
        "versions": {"python": "3.11", "torch": "2.13"},
        "device": "CPU（2 核）",
    }


def reply(text: str, right: bool) -> dict:
    verdict = {"right": right, "complete": right, "courteous": right, "score": 1.0 if right else 0.1}
    return {"text": text, "ended": right, "reward": 1.5, "verdict": verdict}


@pytest.fixture
def root(tmp_path):
    """一条完整的链留下的记录，不含模型。"""
    loss = [{"step": 10 * i, "loss": 2.0 / i} for i in range(1, 5)]
    ppo = [
        {"step": i, "score": i, "kl": 0.1 * i, "length": 9.0, "clip_fraction": 0.1, "value_loss": 1 / i}
        for i in range(1, 4)
    ]
    chat = {"qa_accuracy": 0.99, "ended_rate": 1.0, "preferred_rate": 0.3}
    after = chat | {"preferred_rate": 0.97, "judge_score": 0.9, "judge_score_before": 0.6}
    rewards = {"reward_mean": 3.0, "reward_mean_before": 1.0, "reward_std_before": 1.5, "kl_to_sft": 0.2}
    records = {
        "pretrain": record({"heldout_loss": 0.33, "entropy_floor": 0.32, "loss_over_floor": 1.02}, loss, 40),
        "sft": record(chat, loss, 30),
        "reward": record({"pair_accuracy": 0.5, "pair_accuracy_before": 0.4}, loss, 20),
        "dpo": record(after, [row | {"rewards/margins": 1.0} for row in loss], 20),
        "ppo": record(after | rewards, ppo, 50),
    }
    question = {"messages": [{"role": "user", "content": NASTY + "谁？"}], "answer": "老王", "slot": "friend"}
    models = ("base", "sft", "dpo", "ppo")
    sample = question | {"replies": {name: reply(f"{NASTY}{name}", name != "base") for name in models}}
    metrics = {
        name: {"n": 500, "judge_score": 0.9, "mean_chars": 9.0, "reward_mean": 2.0, "kl_to_sft": 0.1} | chat
        for name in models
    }
    compared = record(metrics, [], 9)
    records["compare"] = compared | {"samples": [sample], "data": {"dataset": "tiny_world"}}
    for name, each in records.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(json.dumps(each), encoding="utf-8")
    (tmp_path / "compare" / "compare.json").write_text(json.dumps([sample] * 3), encoding="utf-8")
    return tmp_path


class Page(HTMLParser):
    """检查标签配对，收下 id、引用和文字。"""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.ids, self.links, self.tags, self.text = [], [], [], [], ""
        self.feed(text)
        assert not self.open, f"没有关上：{self.open}"

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        attributes = dict(attributes)
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.links += [attributes[k] for k in ("src", "href", "xlink:href") if k in attributes]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_data(self, data):
        self.text += data


def test_report_json_schema(root):
    report = write_report(root, STAGES, "tiny", True, seed=3)
    assert report == json.loads((root / "report.json").read_text(encoding="utf-8"))
    assert report["preset"] == "tiny" and report["seed"] == 3
    assert report["seconds"] == 169 == sum(stage["seconds"] for stage in report["stages"].values())
    assert report["stages"]["sft"]["qa_accuracy"] == 0.99
    assert list(report["models"]) == ["base", "sft", "dpo", "ppo"] and report["models"]["dpo"]["n"] == 500


def test_page_is_whole_safe_and_offline(root):
    write_report(root, STAGES, "tiny", True)
    text = (root / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert "script" not in page.tags and NASTY.replace("\x00", "�") + "ppo" in page.text
    assert "\x00" not in text and '<meta charset="utf-8">' in text and 'lang="zh-CN"' in text
    assert all(link.startswith("#") for link in page.links)  # 只引用自己
    assert not re.search(r"@import|url\((?!#)|<link|<img", text)
    assert len(page.ids) == len(set(page.ids))  # 几张图的 id 不相撞
    assert page.tags.count("svg") == 11
    for words in (
        "语法的熵（下限）",
        "价值损失",
        "回答长度的分布",
        "标准答案：老王",
        "没说完",
        "PingFang SC",
    ):
        assert words in text
    assert text.count('class="reply good"') == 3 and text.count('class="reply wrong"') == 1
    assert not re.search(r"\$[a-z]", text)  # 模板里没有漏填的


def test_unfinished_chain_still_gives_a_page(root):
    run = json.loads((root / "pretrain" / "run.json").read_text(encoding="utf-8"))
    run["history"] = []  # 只走一两步，还没有记过 loss
    (root / "pretrain" / "run.json").write_text(json.dumps(run), encoding="utf-8")
    report = write_report(root, ["pretrain", "没有"], "full", False)
    assert list(report["stages"]) == ["pretrain"] and report["models"] == {}  # 以前留下的后几个阶段不混进来
    page = Page((root / "report.html").read_text(encoding="utf-8"))
    assert "svg" not in page.tags and "没有可画的" in page.text and "目标" not in page.text
    assert not any(words in page.text for words in ("PPO", "样例", "compare.json"))  # 没跑到的不占地方


def test_real_data_has_no_judge(root):
    path = root / "compare" / "run.json"
    run = json.loads(path.read_text(encoding="utf-8"))
    for sample in run["samples"]:
        del sample["answer"]
        for each in sample["replies"].values():
            del each["verdict"], each["reward"]
    for metrics in run["metrics"].values():
        del metrics["qa_accuracy"], metrics["preferred_rate"], metrics["judge_score"]
    path.write_text(json.dumps(run), encoding="utf-8")
    write_report(root, STAGES, "full", False)
    page = Page((root / "report.html").read_text(encoding="utf-8"))
    assert page.tags.count("svg") == 10
    assert not any(words in page.text for words in ("标准答案：", "程序的评分", "△"))


def test_highlights_compare_with_targets(root):
    stages = write_report(root, STAGES, "tiny", True)["stages"]
    rows = {(row["stage"], row["label"]): row for row in highlights(stages, True)}
    reached = {key: row["reached"] for key, row in rows.items()}
    assert reached["pretrain", "留出损失 ÷ 语法的熵"] is True
    assert reached["pretrain", "留出损失（nats/token）"] is None  # 没有目标，只看
    assert reached["reward", "留出偏好对判对"] is False
    assert reached["ppo", "奖励模型的平均分"] is True  # 3.0 ≥ 1.0 + 1.5
    assert rows["ppo", "奖励模型的平均分"]["target"] == "≥ 2.5"
    assert rows["reward", "留出偏好对判对"]["before"] == 0.4
    assert reached["ppo", "答对（贪心）"] is True
    assert all(row["target"] is None and row["reached"] is None for row in highlights(stages, False))
    del stages["sft"]  # 目标要与 SFT 比，而 SFT 没有量
    assert {(r["stage"], r["label"]): r for r in highlights(stages, True)}["ppo", "答对（贪心）"][
        "target"
    ] is None


def test_grpo_has_its_own_section_when_it_ran(root):
    write_report(root, STAGES, "tiny", True)
    assert "没有信号的组" not in (root / "report.html").read_text(encoding="utf-8")
    history = [
        {"step": i, "score": 0.1 * i, "advantage": 0.5, "zero_groups": 0.1 * i, "length": 9.0}
        for i in (1, 2, 3)
    ]
    metrics = {"judge_score": 0.97, "judge_score_before": 0.7, "preferred_rate": 0.94, "qa_accuracy": 0.99}
    (root / "grpo").mkdir()
    (root / "grpo" / "run.json").write_text(json.dumps(record(metrics, history)), encoding="utf-8")
    report = write_report(root, [*STAGES[:-1], "grpo", "compare"], "tiny", True)
    page = (root / "report.html").read_text(encoding="utf-8")
    assert "没有信号的组" in page and Page(page).text.count("GRPO") >= 2
    assert (root / "pictures" / "grpo-score.svg").is_file()
    reached = {
        row["label"]: row["reached"] for row in highlights(report["stages"], True) if row["stage"] == "grpo"
    }
    assert reached["程序评分（采样）"] is True and reached["又对又完整又有礼（采样）"] is False
