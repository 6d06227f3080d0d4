"""试用预训练模型（基座）：给它一串开头，看它怎么接着写。

学到什么：基座只会续写，给什么开头都接着写下去，问它问题也只会接着写；小世界里给出"故事 + 回顾的开头"，
它能往前看、把故事里的词抄过来，后面的 SFT 靠的就是这个本领。

运行：
    python test_gen.py                                     # 有 full 的结果就用，没有就用 tiny 的
    python test_gen.py --preset tiny --temperature 1       # 采样：每次写出不同的故事
    python test_gen.py --questions "那天清晨，小红" "那天夜里"     # 自己给开头
    python test_gen.py --file openings.txt                 # 一行一个开头
    python test_gen.py --model Qwen/Qwen1.5-0.5B           # 没有继续训练过的原版

预期输出（tiny，贪心）：回顾题都接对；给半句话，它写完一个故事、回想几句，然后自己结束。
要先训练好：python run_all.py --preset tiny，或 python pretrain_chinese-nvidia.py --preset tiny。
"""

from nlp_common.base.cli import run_main

from chat_app.asking import answer, read_lines, show_speakers
from chat_app.trying import AskSettings, find_results, open_speaker
from nlp_common.base.arguments import parse_arguments
from nlp_common.lm.chatml import encode_untrusted
from nlp_common.lm.speaker import Speaker
from nlp_common.tiny import world

DEFAULTS = {
    "tiny": {"max_new_tokens": 160, "temperature": 0.0, "top_p": 1.0},
    "full": {"max_new_tokens": 128, "temperature": 0.7, "top_p": 0.9},
}
FULL_OPENINGS = ["中国的首都是", "长城位于", "人工智能是计算机科学的一个分支，", "唐朝是", "水的沸点"]


class GenSettings(AskSettings):
    """参数都在 AskSettings 里；单独一个类，--help 才显示本文件的说明。"""


def load_openings(settings: GenSettings, preset: str) -> list[dict]:
    """``[{"prompt", 可能有的 "answer"}]``；默认 tiny：三道留出的回顾题（知道该接什么）加两个自由的开头。"""
    if lines := read_lines(settings):
        return [{"prompt": line} for line in lines]
    if preset == "full":
        return [{"prompt": text} for text in FULL_OPENINGS]
    story = world.documents(1, settings.seed, heldout=True)[0]["text"]
    free = [{"prompt": "那天"}, {"prompt": story[: story.index("。") + 1]}]
    return world.recap_prompts(3, settings.seed) + free


def continue_all(speaker: Speaker, openings: list[dict], settings: GenSettings) -> list[str]:
    """逐个开头续写，边写边打印；返回续写的文字。"""
    show_speakers([speaker], settings)
    texts = []
    for number, opening in enumerate(openings, 1):
        print(f"【{number}】开头：{opening['prompt']}")
        if "answer" in opening:
            print(f"     该接：{opening['answer']}")
        # 没有 ChatML，没有角色：基座看到的就是一段文字，里面的控制符字样也只是文字。
        reply = answer(speaker, encode_untrusted(speaker.tokenizer, opening["prompt"]), settings)
        if reply is None:
            continue
        ending = "写完了" if reply.end else "没写完，到了 --max_new_tokens"
        if "answer" in opening:
            ending = ("接对了" if reply.text.startswith(opening["answer"]) else "接错了") + "；" + ending
        print(f"  （{ending}）\n")
        texts.append(reply.text)
    return texts


def main(argv: list[str] | None = None) -> list[str]:
    settings = parse_arguments(GenSettings, argv)
    results = find_results(settings, ["base"], DEFAULTS)
    openings = load_openings(settings, results.preset)
    speaker = open_speaker(results.title("base"), results.paths["base"], settings.seed)
    return continue_all(speaker, openings, settings)


if __name__ == "__main__":
    run_main(main)
