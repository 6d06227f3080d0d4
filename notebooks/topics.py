"""每本笔记本里有哪些脚本，依次怎样调用它们的 main；make_notebooks.py 照着做。添一个主题，就在 TOPICS 里添一项。"""

from dataclasses import dataclass, field

REPOSITORY = "https://github.com/<账号>/<仓库>.git"  # 仓库有了固定的地址，就写在这里


@dataclass
class Call:
    """一次 main：命令行参数，先说的一句话，做完给读者看的图（相对于主题的文件夹）。"""

    argv: list[str] = field(default_factory=list)
    note: str = ""
    pictures: list[str] = field(default_factory=list)


def stage(name: str, note: str, *more: str, pictures: tuple[str, ...] = ()) -> Call:
    argv = ["--preset", "tiny", "--output_dir", f"outputs/notebook/{name}", *more]
    return Call(argv, note, list(pictures))


TINY = ["--preset", "tiny"]
SHORT_BERT = [*TINY, "--mlm_epochs", "0.5", "--num_train_epochs", "1"]
SHORT_BERT += ["--output_dir", "my_bert_model-notebook"]

# 主题 → 脚本 → 依次怎样调用 main。一次调用一两分钟以内（CPU）。
TOPICS: dict[str, dict[str, list[Call]]] = {
    "simple_demo": {
        "minimal_word_embedding_train.py": [Call(pictures=["outputs/word_embedding.png"])],
        "simple_sentiment_classifier.py": [Call()],
        "rnn_text_classifier.py": [Call()],
        "transformer_sentiment_classification.py": [Call(pictures=["outputs/attention.png"])],
        "transformer_encoder_classifier.py": [Call()],
        "compare_models.py": [
            Call(
                ["--models", "mean", "tfidf1", "tfidf"],
                "只比最快的三个。全部八个要几分钟，请在终端里运行 `python compare_models.py`："
                "其中的 SnowNLP 要另开一个进程，在笔记本里开不了。",
                ["outputs/compare_models.png"],
            )
        ],
    },
    "gpt": {
        "mini_gpt.py": [
            Call([], '四句话的玩具。要在一本书上训练，把 `[]` 换成 `["--data", "一个文本文件"]`。')
        ],
        "gpt2_generate.py": [
            Call(
                TINY,
                "第一次先现场训练一个小 GPT-2，半分钟左右。连得上 hub 时去掉 `tiny`，就是真的 GPT-2。",
                ["outputs/next_token.png"],
            )
        ],
    },
    "pipeline": {
        "sentiment_analysis_demo.py": [Call(TINY, "第一次先训练英文小模型，十几秒。")],
        "sentiment_pipeline_chinese.py": [
            Call(TINY, "没有训练好的中文模型时，先训练一个最小的，不到一分钟。")
        ],
    },
    "sentiment_classifier": {
        "bert_finetune_sentiment.py": [
            Call(
                SHORT_BERT,
                "为了一两分钟做完，这里的预训练只读半遍，微调只读一遍，所以正确率比 README 里的低，例句也可能判错；"
                '照 README 的数去训练，只留前两个参数：`main(["--preset", "tiny"])`，约五分钟。',
                ["my_bert_model-notebook/learning_curve.png"],
            ),
            Call(
                [*SHORT_BERT, "--predict", "屏幕太暗，后悔买了", "物流很快，下次还来"],
                "模型已经存下，再调用一次就直接加载：换成自己的句子试试。",
            ),
        ]
    },
    "news_classifier": {
        "bert_news_multiclass.py": [
            Call(TINY, "从随机的权重训练四遍，不到一分钟。", ["tnews_bert_model-tiny/confusion.png"])
        ]
    },
    "sequence_labeling": {
        "span_metrics.py": [Call(TINY, "先看指标：95% 的字对了，实体只对了七成。")],
        "hmm_crf.py": [Call(TINY, "数出来的 HMM 与手写的 CRF，半分钟左右。")],
        "rnn_tagger.py": [Call(TINY, "RNN、LSTM、GRU 写出来，约两分钟。")],
        "bilstm_crf.py": [Call(TINY, "三个模型，约三分钟。")],
    },
    "attention_visualization": {
        "head_view.py": [
            Call(
                TINY,
                "没有 Qwen 链的小模型时先训练它（另开进程，两三分钟）。能点的网页是 `outputs/tiny/head_view/head_view.html`，用浏览器打开。",
            )
        ],
        "rollout_and_flow.py": [Call(TINY, "几层叠起来看，半分钟左右。")],
        "logit_lens.py": [Call(TINY, "答案在第几层、哪个位置出现，半分钟左右。")],
    },
    "lora_finetune": {
        "lora_by_hand.py": [
            Call(
                [*TINY, "--ranks", "4", "--targets", "all", "--output_dir", "outputs/notebook/by_hand"],
                "没有 Qwen 链的小模型时先训练它（另开进程，两三分钟）。表里只做一格，约两分钟；全部的表在终端里 `python lora_by_hand.py`。",
                ["outputs/notebook/by_hand/rates.svg"],
            )
        ],
        "qlora_theory.py": [Call(TINY, "NF4 的十六个数从哪里来，十几秒。")],
        "merge_lora.py": [Call(TINY, "两个适配器怎样合、怎样加，约一分钟。")],
    },
    "evaluation": {
        "evaluation_metrics.py": [
            Call(TINY, "没有 Qwen 链的小模型时先训练它（另开进程，两三分钟）。中文的尺、困惑度、一致性。")
        ],
        "benchmarks_mc.py": [Call(TINY, "选择题的三种算法。")],
        "bias_scan.py": [Call(TINY, "先看有多大的本事发现偏见。")],
    },
    "rag": {
        "hybrid_retrieval.py": [Call(TINY, "BM25、向量、合起来，约一分钟；没装 e5 就用只认字面的向量。")],
        "update_strategy.py": [Call(TINY, "只算变了的块，断了接着来，十几秒。")],
        "customer_service_case.py": [Call(TINY, "几家店、几种人，没把握就说不知道，约一分钟。")],
    },
    "agent": {
        "tool_format.py": [Call(TINY, "从函数到调用，每个 token 看得见。")],
        "sft_tool_call.py": [
            Call(TINY, "教一个小模型用工具，三四分钟。", ["outputs/tiny/sft_tool_call/tool_kinds.svg"])
        ],
        "react_agent.py": [Call(TINY, "工具坏到几成，还能答对几成，一分钟；小模型没有训练过就先训练。")],
    },
    "model_compression": {
        "distillation.py": [
            Call(TINY, "没有 Qwen 链的小模型时先训练它（另开进程，两三分钟）。学生跟老师学，约四分钟。")
        ],
        "pruning.py": [Call(TINY, "三种剪枝，每一种花了几道题。")],
        "quantization.py": [Call(TINY, "三种量化，几位、几个一组。")],
    },
    "distributed_training": {
        "collectives.py": [Call(TINY, "五种集合通信，四个进程，几秒。")],
        "zero.py": [Call(TINY, "ZeRO-1、2、3，等于一个进程。")],
        "pipeline_parallel.py": [Call(TINY, "GPipe 与 1F1B 的时间线。")],
    },
    "alignment_ops": {
        "near_duplicates.py": [Call(TINY, "MinHash 与 LSH：估得准不准、漏多少，约一分钟。")],
        "canary_simulation.py": [Call(TINY, "灰度的检验错退几次、几次请求就退，一分钟以内。")],
        "customer_alignment.py": [
            Call(
                [*TINY, "--noises", "0.1", "--weeks", "3", "--output_dir", "outputs/notebook/weeks"],
                "一种客户、三周，约一分钟；没有 Qwen 链的小模型时先训练它（另开进程，两三分钟）。",
                ["outputs/notebook/weeks/customer_weeks.svg"],
            )
        ],
    },
    "text_generation": {
        "constrained_decoding.py": [
            Call(TINY, "没有 Qwen 链的小模型时先训练它（另开进程，两三分钟），之后半分钟左右。")
        ],
        "speculative_decoding.py": [Call(TINY, "草稿模型当场训练，半分钟左右。")],
        "poem_gpt.py": [Call(TINY, "写诗的小 GPT，约三分钟。")],
    },
    "qwen_chinese_finetune": {
        "pretrain_chinese.py": [
            stage("pretrain", "结果放在 `outputs/notebook/`，与在终端里跑出来的 `outputs/tiny/` 各不相干。")
        ],
        "sft_chinese_qwen.py": [
            stage(
                "sft",
                "先看清楚哪些 token 算损失（绿色的才是模型要学的）。",
                "--show_batch",
                pictures=("outputs/notebook/sft-mask.svg",),
            ),
            stage("sft", "从上面预训练好的模型开始。"),
        ],
        "reward_model.py": [stage("reward", "从 SFT 模型开始，换上一个打分的头。")],
        "dpo_chinese_qwen.py": [stage("dpo", "也从 SFT 模型开始，不用奖励模型。")],
        "ppo_alignment.py": [stage("ppo", "SFT 模型自己回答，上面的奖励模型打分。")],
    },
}

# 多说几句的主题
REMARKS = {
    "qwen_chinese_finetune": (
        "从预训练到 PPO 走完整条链，都是 tiny 预设的默认步数，空闲的两核机器上一个阶段半分钟上下，数字与 README 里的相近；"
        '赶时间就给每个 `main` 加上 `"--max_steps", "20", "--max_eval_samples", "50"`，那时只看得出跑得通，数字没有意义。'
        "几个模型的并排比较与网页报告（`run_all.py`）、聊天（`chat.py`）请在终端里运行。"
    )
}
