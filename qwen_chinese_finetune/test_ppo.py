"""试用 PPO 模型：问它一串问题，看奖励模型教出来的口气。

学到什么：PPO 从没见过"标准答案"，只见过奖励模型的分；对照 test_sft.py 同样的题，看它改了什么：
回答变完整、有礼，敷衍和只答一个词的没有了，而故事里的事还是答得对。

运行：
    python test_ppo.py                                     # 有 full 的结果就用，没有就用 tiny 的
    python test_ppo.py --preset tiny --temperature 0       # 贪心
    python test_ppo.py --questions "你好" "你是谁？"
    python test_ppo.py --file questions.txt                # 一行一个问题
    python test_ppo.py --seed 7                            # tiny：换六道题

预期输出（tiny，温度 1 采样）：六道留出的题多半得 1.0 分（对、完整、有礼）。
要先训练好：python run_all.py --preset tiny，或 python ppo_alignment.py --preset tiny。
"""

from nlp_common.base.cli import run_main

from chat_app.asking import ask_all, load_questions
from chat_app.trying import AskSettings, find_results, open_speaker
from nlp_common.base.arguments import parse_arguments

DEFAULTS = {
    # 小世界里用温度 1：口气改了没有，采样才看得出来，preferred_rate 也是这样量的。
    "tiny": {"max_new_tokens": 48, "temperature": 1.0, "top_p": 1.0},
    "full": {"max_new_tokens": 256, "temperature": 0.7, "top_p": 0.9},
}


class PPOSettings(AskSettings):
    """参数都在 AskSettings 里；单独一个类，--help 才显示本文件的说明。"""


def main(argv: list[str] | None = None) -> list[list[float]]:
    settings = parse_arguments(PPOSettings, argv)
    results = find_results(settings, ["ppo"], DEFAULTS)
    questions = load_questions(settings, results.preset)
    speaker = open_speaker(results.title("ppo"), results.paths["ppo"], settings.seed)
    return ask_all([speaker], questions, settings)


if __name__ == "__main__":
    run_main(main)
