"""会用工具的小模型：分词器、随机的起点，与训练好的那一个放在哪里。

分词器与小世界的（nlp_common/tiny/qwen.py）一样，一个汉字一个 token；不同的有三样：JSON 的标点连成串（`":` 是一个 token，
真的分词器都这样）；数字两位一个 token（GPT-4、Llama 3 是三位，Qwen 是一位：一位一位地抄，小模型要学久得多）；
另有 Qwen3 的 <tool_call>、<tool_response>、<think> 六个控制符。
"""

from __future__ import annotations

from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM

import tool_world
from nlp_common.lm.chatml import CHAT_TEMPLATE, END_OF_TEXT, IM_END, IM_START
from nlp_common.tiny.qwen import build_model
from nlp_common.train.chain import find_trained, run_script

HOME = Path(__file__).resolve().parent
LONGEST = 1024  # 一局最多几个 token：工具的说明、几次调用与结果
TOOL_WORDS = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"]
# Qwen2 的切法，改了两处：汉字一个一个切开，数字两位一切
SPLIT = r"\p{Han}|[^\r\n\p{L}\p{N}]?[\p{L}&&[^\p{Han}]]+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"


def build_tokenizer() -> PreTrainedTokenizerFast:
    """字节级 BPE；训练文字里的英文词和标点串都并成一个 token。"""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        min_frequency=1,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    text = tool_world.documents(2000, seed=0, digits=True)
    text += [m["content"] for row in tool_world.chats(2000, seed=0) for m in row["messages"]]
    text += ["user", "assistant", "system", " ".join(f"{n:02d}" for n in range(100))]
    for word in TOOL_WORDS:  # 它们是控制符，不必再学成别的 token
        text = [each.replace(word, "") for each in text]
    bpe.train_from_iterator(text, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT, model_max_length=LONGEST
    )
    tokenizer.add_special_tokens({"additional_special_tokens": [IM_START, IM_END]})
    tokenizer.add_tokens(TOOL_WORDS)  # 同 Qwen3：是控制符，却不算"特殊"的
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_base(tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen2ForCausalLM:
    """随机的起点：结构同小世界的模型，词表是自己的，一局长些。"""
    model = build_model(tokenizer, seed)
    model.config.max_position_embeddings = LONGEST
    return model


def tool_model(model: str | None = None, source: str = "hf", name: str = "sft_tool_call") -> dict:
    """会用工具的模型 → ``{"path", "stage", "id", "run"}``：--model 给的，没给就是 sft_tool_call.py 的 tiny 结果。

    name 是 sft_uneven：照有好有坏的示范学的，强化学习从它开始。
    还没有训练，就当场训练，并说出来。得不到 model 是 UserError。
    """
    folder = HOME / "outputs" / "tiny" / name
    found = find_trained(model, folder, source)
    if found is None:
        script = HOME / "sft_tool_call.py"
        options = ["--preset", "tiny", "--output_dir", str(folder)]
        if name == "sft_uneven":
            options += ["--uneven", "true", "--compare", "false"]
        print(f"要用会调用工具的小模型（{name}），还没有训练：先运行 {script.name} …", flush=True)
        run_script("会调用工具的小模型没有训练成", script, *options)
        found = find_trained(None, folder)
    assert found is not None
    return found
