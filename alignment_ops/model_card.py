"""模型卡：一个模型从哪里来、怎样训练、量到什么、不该用来做什么，都从它的 run.json 填，不手写。

怎么运行
  python model_card.py --run ../qwen_chinese_finetune/outputs/tiny/dpo                 # 印出来看看
  python model_card.py --run 结果文件夹 --repo 拥有者/名字 --write true                 # 写成结果文件夹里的 README.md

hub 认得开头 YAML 里的几项（语言、任务、起点模型、数据集、量到的数），显示在模型的网页上；后面是给人看的。
参考：Mitchell et al. 2019（Model Cards for Model Reporting）；hub 的 model card 说明。
"""

from nlp_common.base.cli import run_main

import re
from dataclasses import dataclass
from pathlib import Path

from hub_repo import without_paths
from nlp_common.base.arguments import option, parse_arguments
from nlp_common.base.errors import UserError
from nlp_common.base.runs import load_run, write_text

HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")
# 写进卡里的指标：名字 → 怎样念；训练前的那个数在 <名字>_before
METRICS = {
    "qa_accuracy": "留出的题答对（贪心）",
    "preferred_rate": "采样回答又对、又完整、又有礼",
    "judge_score": "判分程序给采样回答的分",
    "preference_accuracy": "留出的偏好对，好的一边得分高",
    "margin": "隐式奖励的差",
    "heldout_loss": "留出的损失",
    "small_talk": "寒暄答得对",
    "mean_chars": "回答平均几个字",
}
FROM_NOTHING = "从头训练"
STAGES = {"sft": "SFT", "dpo": "DPO", "kto": "KTO", "pretrain": "预训练", "ppo": "PPO", "grpo": "GRPO"}
NOT_SETTINGS = {
    "output_dir",
    "retrain",
    "record",
    "dry_run",
    "verify",
    "report_to",
    "model",
    "dataset",
    "eval_dataset",
}


@dataclass
class CardSettings:
    run: str = option("结果文件夹，里面有 run.json", "../qwen_chinese_finetune/outputs/tiny/dpo")
    repo: str = option("hub 上的名字", "我/我的模型")
    write: bool = option("写成结果文件夹里的 README.md；不写就印出来", False)


def model_card(run: dict, repo: str, public: bool = False) -> str:
    """run.json 的内容 → 模型卡的全文。本机的路径只留最后一段。"""
    run = without_paths(run)
    return f"---\n{front_matter(run, repo)}---\n\n{body(run, repo, public)}"


def front_matter(run: dict, repo: str) -> str:
    """开头的 YAML：让 huggingface_hub 写，引号、转义不会错。"""
    from huggingface_hub import EvalResult, ModelCardData

    parent, dataset = start_of(run), run["data"]["train"]["name"]
    results = [
        EvalResult("text-generation", "held-out", f"{dataset} held-out", name, round(run["metrics"][name], 4))
        for name in METRICS
        if name in run["metrics"]
    ]
    data = ModelCardData(
        language="zh",
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=[run["stage"], "chatml"],
        base_model=parent if HUB_NAME.fullmatch(parent) else None,
        datasets=[dataset.partition(":")[0]] if HUB_NAME.fullmatch(dataset.partition(":")[0]) else None,
        model_name=repo.rsplit("/", 1)[-1],
        eval_results=results or None,
    )
    return data.to_yaml() + "\n"


def body(run: dict, repo: str, public: bool) -> str:
    data, metrics = run["data"], run["metrics"]
    stage = STAGES.get(run["stage"], run["stage"])
    tiny = run["settings"].get("preset") == "tiny"
    what = "教学用的小模型，只会小世界的故事和问题。" if tiny else f"用 {stage} 训练的对话模型。"
    rows = [
        f"| {METRICS[name]} | {before(metrics, name)} | {metrics[name]:.4g} |"
        for name in METRICS
        if name in metrics
    ]
    settings = {
        name: value
        for name, value in run["settings"].items()
        if name not in NOT_SETTINGS and value is not None
    }
    return f"""# {repo.rsplit("/", 1)[-1]}

{what}{start_words(run)}，权重的编号 `{run["id"]}`。

## 怎样用

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{repo}")  # {"公开" if public else "私有"}的仓库{"" if public else "，先设好环境变量 HF_TOKEN"}
model = AutoModelForCausalLM.from_pretrained("{repo}")
messages = [{{"role": "user", "content": "你好"}}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
reply = model.generate(**inputs, max_new_tokens=64, do_sample=False)
print(tokenizer.decode(reply[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```

## 量到的

| 在没训练过的数据上 | 训练前 | 训练后 |
|---|---|---|
{chr(10).join(rows)}

## 数据

| | 名字 | 行数 | sha256 |
|---|---|---|---|
{chr(10).join(data_row(*pair) for pair in data.items())}

## 训练

{stage}，{run["device"]}，{run["seconds"]:.0f} 秒。

| 设置 | 值 |
|---|---|
{chr(10).join(f"| {name} | {value} |" for name, value in settings.items())}

库：{"，".join(f"{name} {value}" for name, value in run["versions"].items())}。

## 不该用来做什么

{limits(tiny)}

许可：跟着起点模型与数据的许可走，公开之前自己核对，在开头的 YAML 里补上 `license`。
"""


def start_of(run: dict) -> str:
    """起点：hub 名，或本机上那个阶段的名字与编号。"""
    parent = run.get("parent", {}).get("model")
    if not parent:
        return FROM_NOTHING
    name = str(parent["id"])
    return name if HUB_NAME.fullmatch(name) else f"{parent['stage']} 模型（{name}）"


def start_words(run: dict) -> str:
    start = start_of(run)
    return start if start == FROM_NOTHING else f"从 {start}开始"


def before(metrics: dict, name: str) -> str:
    return f"{metrics[f'{name}_before']:.4g}" if f"{name}_before" in metrics else "—"


def data_row(split: str, source: dict) -> str:
    title = {"train": "训练", "eval": "留出"}.get(split, split)
    return f"| {title} | {source['name']} | {source.get('rows', '—')} | `{source.get('sha256', '—')}` |"


def limits(tiny: bool) -> str:
    if tiny:
        return "它不认识小世界以外的任何东西，数字只说明这个训练阶段在小世界里有没有用，与大模型无关。"
    return (
        "没有专门量过偏见与安全（evaluation/bias_scan.py 可以量偏见），不要直接放到用户面前；医疗、法律、金钱上的话不要照着做；"
        "上面没有列出的能力，没有量过。"
    )


def main(argv: list[str] | None = None) -> str:
    settings = parse_arguments(CardSettings, argv)
    folder = Path(settings.run).expanduser().resolve()
    run = load_run(folder)
    if run is None:
        raise UserError(f"没有 {folder}：--run 要指着一个训练好的结果文件夹。")
    if missing := [name for name in ("stage", "data", "metrics", "settings", "id") if name not in run]:
        raise UserError(
            f"{folder / 'run.json'} 里没有 {'、'.join(missing)}：不是一次训练的结果，写不出模型卡。"
        )
    card = model_card(run, settings.repo)
    if settings.write:
        write_text(folder / "README.md", card)
        print(f"写好了：{folder / 'README.md'}")
    else:
        print(card)
    return card


if __name__ == "__main__":
    run_main(main)
