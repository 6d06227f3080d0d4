"""中文情感分析的 pipeline：步骤和英文的一模一样，换的只是模型的名字。

先读 sentiment_analysis_demo.py：一句、一批、拆开看、快慢、拿不准，五步都写在那里，这里直接拿来用。

你会学到
  1. 换一种语言、换一个任务，pipeline 的用法不变：分词器、模型、类别的名字都跟着模型走。
  2. 中文的 BERT 一个汉字一个 token，不用先分词。
  3. 模型只懂它学过的那一行：学的是购物评论，拿来判断影评、新闻，就要打折扣。

怎么运行
  python sentiment_pipeline_chinese.py                  # 拿得到真模型就用真的，否则用自己训练的小 BERT
  python sentiment_pipeline_chinese.py --preset tiny    # 离线
  python sentiment_pipeline_chinese.py --text "物流太慢了" "下次还来"
  python sentiment_pipeline_chinese.py --model ../sentiment_classifier/my_bert_model   # 指定一个模型
  cat 评论.txt | python sentiment_pipeline_chinese.py --text -

  tiny 用哪个模型：../sentiment_classifier 里有训练好的 my_bert_model 或 my_bert_model-tiny 就用它；都没有，
  就在 outputs/tiny-chinese 里训练一个最小的（不到一分钟，只此一次）。

应当看到（tiny 的实测见 README）
  full："这个电影真的太好看了，我特别喜欢！" 是好评，"这个手机太卡了，我非常失望。" 是差评。
  tiny 把第一句也判成负面：它只读过一万多条书、酒店、商品的评论，里面有“太”字的三条有两条是差评，“太好看”一共出现过 3 次。

参考
  Zhao et al. 2019（UER），uer/roberta-base-finetuned-jd-binary-chinese 的说明页。
"""

from nlp_common.base.cli import run_main

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from demo_settings import DemoSettings, parse_demo, read_sentences
from nlp_common.base.device import describe, pick_device
from nlp_common.base.errors import UserError
from nlp_common.base.runs import RUN_FILE, load_run
from sentiment_analysis_demo import load_classifier, show_scores, tour

HERE = Path(__file__).resolve().parent
FULL_MODEL = "uer/roberta-base-finetuned-jd-binary-chinese"
SENTIMENT = HERE.parent / "sentiment_classifier"
# 最小的设置：几十秒就训练完，够看懂 pipeline；要更准的，去 sentiment_classifier 里正经训练一个。
QUICK = ["--preset", "tiny", "--mlm_epochs", "0", "--num_layers", "1", "--hidden_size", "64"]
QUICK += ["--max_length", "64", "--num_train_epochs", "3", "--learning_rate", "3e-3"]
QUICK += ["--per_device_train_batch_size", "64"]

SENTENCES = [
    "这个电影真的太好看了，我特别喜欢！",
    "这个手机太卡了，我非常失望。",
    "房间很干净，服务员也很热情。",
    "书的内容空洞，不值这个价钱。",
    "包装破了，客服也不理人。",
]
# 拿不准的几种：前后矛盾、不褒不贬、没有线索、不是评论。
HARD_SENTENCES = [
    "酒店位置不错，就是隔音太差。",
    "一般般吧，说不上好也说不上坏。",
    "不是不好看，是太好看了。",
    "我昨天收到了货。",
    "央行今天公布了新的利率。",
]


@dataclass
class Settings(DemoSettings):
    """中文情感分析的设置；全部参数见 demo_settings.py。"""


def local_model() -> Path | None:
    """sentiment_classifier 里训练好的模型；有 run.json 的文件夹才是训练完的。"""
    for name in ("my_bert_model", "my_bert_model-tiny"):
        if (SENTIMENT / name / RUN_FILE).is_file():
            return SENTIMENT / name
    return None


def prepare_tiny(settings) -> str:
    """自己训练的小 BERT 所在的文件夹；还没有就训练一个，用的就是 sentiment_classifier 的脚本。"""
    trained = None if settings.output_dir or settings.retrain else local_model()
    if trained:
        print(f"用 sentiment_classifier 训练好的模型：{trained}")
        return str(trained)
    folder = Path(settings.output_dir or HERE / "outputs" / "tiny-chinese").resolve()
    if not settings.retrain and (record := load_run(folder)):
        made = record.get("settings", {})
        old = "sentiment" if "mlm_epochs" in made else None  # 早先的记录里没有 stage
        if record.get("stage", old) != "sentiment":
            raise UserError(
                f"{folder} 里的不是 bert_finetune_sentiment.py 训练的模型。用 --output_dir 换一个位置。"
            )
        if made["seed"] != settings.seed:
            raise UserError(
                f"{folder} 里的模型是种子 {made['seed']} 训练的，这次要的是 {settings.seed}。"
                "加 --retrain 重新训练并替换它，或用 --output_dir 另存一份。"
            )
        print(f"已有训练结果，直接加载：{folder}（--retrain 重新训练）")
        return str(folder)
    print("还没有训练好的中文模型，先训练一个最小的（不到一分钟，只此一次）…", flush=True)
    command = [sys.executable, str(SENTIMENT / "bert_finetune_sentiment.py"), *QUICK, "--retrain"]
    command += ["--seed", str(settings.seed), "--output_dir", str(folder)]
    if code := subprocess.run(command).returncode:
        raise UserError(f"小 BERT 没有训练完（退出码 {code}）：python {' '.join(command[1:])}")
    return str(folder)


def main(argv: list[str] | None = None) -> None:
    settings, model_path = parse_demo(Settings, FULL_MODEL, argv)
    own = read_sentences(settings.text)  # 句子有问题，训练前就说
    if model_path is None:
        model_path = prepare_tiny(settings)
    device = pick_device()
    print(f"模型 {model_path}，设备 {describe(device)}")
    classifier = load_classifier(model_path, device)
    if own:
        show_scores(classifier, own, settings.batch_size)
        return
    many = [first + second for first in SENTENCES for second in SENTENCES + HARD_SENTENCES]
    tour(classifier, model_path, SENTENCES, HARD_SENTENCES, many, settings)


if __name__ == "__main__":
    run_main(main)
