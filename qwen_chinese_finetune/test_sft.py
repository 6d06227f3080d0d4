"""试用 SFT 模型：问它一串问题，看它会不会一问一答、会不会自己停下来。

学到什么：SFT 之后模型学会了答话和停下；但训练数据里几种口气混在一起，它的口气也是混的，
有礼的、干巴巴的、只答一个词的、敷衍的都有（--temperature 1 看得最清楚）。DPO 和 PPO 要改的就是这个。

运行：
    python test_sft.py                                     # 有 full 的结果就用，没有就用 tiny 的
    python test_sft.py --preset tiny --temperature 1       # 采样，同一个模型的各种口气
    python test_sft.py --questions "你好" "你是谁？"
    python test_sft.py --file questions.txt                # 一行一个问题
    python test_sft.py --model Qwen/Qwen1.5-0.5B-Chat      # 别人训练好的模型

预期输出（tiny，贪心）：六道留出的题都答对，每个回答都自己说完；打招呼和问身份答得出训练时教的话。
要先训练好：python run_all.py --preset tiny，或 python sft_chinese_qwen.py --preset tiny。
"""

from nlp_common.base.cli import run_main

from chat_app.asking import ask_all, load_questions
from chat_app.trying import AskSettings, find_results, open_speaker
from nlp_common.base.arguments import parse_arguments

DEFAULTS = {
    "tiny": {"max_new_tokens": 48, "temperature": 0.0, "top_p": 1.0},
    "full": {"max_new_tokens": 256, "temperature": 0.7, "top_p": 0.9},
}


class SFTSettings(AskSettings):
    """参数都在 AskSettings 里；单独一个类，--help 才显示本文件的说明。"""


def main(argv: list[str] | None = None) -> list[list[float]]:
    settings = parse_arguments(SFTSettings, argv)
    results = find_results(settings, ["sft"], DEFAULTS)
    questions = load_questions(settings, results.preset)
    speaker = open_speaker(results.title("sft"), results.paths["sft"], settings.seed)
    return ask_all([speaker], questions, settings)


if __name__ == "__main__":
    run_main(main)
