"""试用 DPO 模型：与它的起点 SFT 模型回答同样的题，看偏好数据改了什么。

学到什么：DPO 没有教新知识，改的是口气：SFT 的几种口气混着来（有礼的、干巴巴的、一个词的、敷衍的），
DPO 之后几乎总是完整又有礼，而故事里的事仍然答得对。

运行：
    python test_dpo.py                                     # compare：SFT 与 DPO 答同样的题
    python test_dpo.py --mode dpo                          # 只看 DPO
    python test_dpo.py --mode interactive                  # 自己打字问 DPO，一问一答（要记得上文，用 chat.py）
    python test_dpo.py --questions "你好" "你是谁？"
    python test_dpo.py --file questions.txt                # 一行一个问题
    python test_dpo.py --model 路径 --sft_model 路径        # 指定两个模型

预期输出（tiny，温度 1 采样）：六道留出的题，DPO 的平均分比 SFT 高。
要先训练好：python run_all.py --preset tiny，或 python dpo_chinese_qwen.py --preset tiny。
"""

from nlp_common.base.cli import run_main

from dataclasses import dataclass
from typing import Literal

from chain import MODELS
from chat_app.asking import (
    answer,
    ask_all,
    load_questions,
    read_lines,
    show_speakers,
    story_then_question,
    user_question,
)
from chat_app.trying import AskSettings, Results, find_results, open_speaker, read_line, run_record
from nlp_common.base.arguments import option, parse_arguments
from nlp_common.base.errors import UserError
from nlp_common.hub.models import require_model
from nlp_common.lm.chatml import prompt_ids
from nlp_common.lm.speaker import Speaker

DEFAULTS = {
    # 小世界里用温度 1：口气改了没有，采样才看得出来，preferred_rate 也是这样量的。
    "tiny": {"max_new_tokens": 48, "temperature": 1.0, "top_p": 1.0},
    "full": {"max_new_tokens": 256, "temperature": 0.7, "top_p": 0.9},
}


@dataclass
class DPOSettings(AskSettings):
    mode: Literal["compare", "dpo", "interactive"] = option(
        "compare：SFT 与 DPO 答同样的题；dpo：只看 DPO；interactive：自己打字问 DPO", "compare"
    )
    sft_model: str | None = option("compare 里的 SFT 模型；默认是 DPO 训练时的起点")


# ---------------------------------------------------------------- compare：与起点比


def find_sft(settings: DPOSettings, results: Results) -> str:
    """DPO 该与谁比：--sft_model，或同一组结果里的 sft，或 DPO 的运行记录里写着的起点。"""
    if settings.sft_model:
        return require_model(settings.sft_model, settings.source)
    start = run_record(results.paths["dpo"]).get("parent", {}).get("model", {})
    path = results.paths.get("sft") or start.get("path")
    if path is None:
        raise UserError("compare 要有 SFT 模型才能比：加 --sft_model 路径，或用 --mode dpo 只看 DPO。")
    if start and run_record(path).get("id") != start["id"]:
        print(
            f"注意：DPO 不是从 {path} 训练出来的（起点是 {start['path']}，编号 {start['id']}），差别不全是 DPO 的功劳。"
        )
    return path


# ---------------------------------------------------------------- interactive：自己打字问


def interact(speaker: Speaker, settings: DPOSettings, tiny: bool) -> None:
    """一问一答，每一问都从头开始，不记得上一问。"""
    show_speakers([speaker], settings)
    print("打字提问，回车发送；每一问都从头开始。quit 或 Ctrl-D 结束，回答时按 Ctrl-C 停下这个回答。")
    while (line := read_line("问：")) is not None and line.lower() not in ("quit", "exit", "退出"):
        if not line:
            continue
        text = story_then_question(line) if tiny else line
        try:
            answer(speaker, prompt_ids(speaker.tokenizer, user_question(text)["messages"]), settings)
            print()
        except KeyboardInterrupt:
            print("（停下了）")


def main(argv: list[str] | None = None) -> list[list[float]] | None:
    settings = parse_arguments(DPOSettings, argv)
    names = ["sft", "dpo"] if settings.mode == "compare" and not settings.sft_model else ["dpo"]
    results = find_results(settings, names, DEFAULTS)
    dpo = open_speaker(results.title("dpo"), results.paths["dpo"], settings.seed)
    if settings.mode == "interactive":
        if read_lines(settings):
            raise UserError(
                "--mode interactive 是自己打字提问，不用 --questions 和 --file；去掉它们，或换一个 --mode。"
            )
        return interact(dpo, settings, results.preset == "tiny")
    questions = load_questions(settings, results.preset)
    if settings.mode == "dpo":
        return ask_all([dpo], questions, settings)
    sft = open_speaker(MODELS["sft"], find_sft(settings, results), settings.seed)
    return ask_all([sft, dpo], questions, settings)


if __name__ == "__main__":
    run_main(main)
