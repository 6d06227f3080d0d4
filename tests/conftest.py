"""各测试文件共用：不受读者的环境变量影响；能导入 qwen_chinese_finetune 里的模块；并行时一个进程只用一个核；整个会话只造一次的小模型。"""

import copy
import functools
import importlib.util
import json
import os
import re
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

# 读者为自己设的：镜像、离线、缓存在哪里、代理、几个线程、语言。测试自己要哪个，自己设。
READERS_OWN = re.compile(
    r"(HF|HUGGINGFACE|TRANSFORMERS|DATASETS|MODELSCOPE|TRL|TOKENIZERS|ACCELERATE|NLP_LEARNING|MLFLOW|WANDB|SWANLAB|OMP|LC)_.*"
    r"|.*_PROXY|LANG|LANGUAGE|PYTHONIOENCODING",
    re.IGNORECASE,
)


def clear_environment() -> None:
    """这些库一导入就读环境变量，等到 fixture 就晚了：在下面的导入之前做，测试启动的脚本也继承它。"""
    for name in list(os.environ):
        if READERS_OWN.fullmatch(name):
            del os.environ[name]
    os.environ["OMP_NUM_THREADS"] = "1"  # 测试开的子进程也只用一个：舍入才逐位相同，并行也不互相抢


clear_environment()
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "qwen_chinese_finetune"))

import nlp_common  # noqa: F401, I001  要在导入任何 Hugging Face 库之前

import torch

from nlp_common.lm.loading import (
    end_chat_turns,
    load_causal_lm,
    load_reward_model,
    load_tokenizer,
    load_value_model,
)
from nlp_common.tiny import qwen

QWEN = Path(__file__).resolve().parents[1] / "qwen_chinese_finetune"


@functools.cache
def _load(name: str):
    spec = importlib.util.spec_from_file_location("script_" + name.replace("-", "_"), QWEN / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclass 与参数解析要按名字找到它
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """accelerate 在一个进程里只认第一次的精度（如 BERT 的 bf16）：每个测试之后清掉，与先后无关。"""
    yield
    if state := sys.modules.get("accelerate.state"):
        state.AcceleratorState._reset_state(reset_partial_state=True)


class _ChatHandler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, dict(self.headers), body))
        said = self.server.answer(body)
        code, data = said if isinstance(said, tuple) else (200, said)
        if isinstance(data, str):
            data = json.dumps({"choices": [{"message": {"content": data}}]}).encode()
        try:
            self.send_response(code)
            self.end_headers()
            self.wfile.write(data)
        except OSError:
            pass  # 等得不耐烦，走了

    def log_message(self, *_):
        pass


@pytest.fixture
def chat_server():
    """本机的一个会说 OpenAI 聊天接口的服务器，地址是 .url。

    .answer(请求的 body) → 说什么，测试自己写：文字；bytes 照原样发；(状态码, 文字或 bytes)。.asked 是 [(路径, 头, body)]。
    """
    server = ThreadingHTTPServer(("127.0.0.1", 0), _ChatHandler)
    server.url, server.asked, server.answer = (
        f"http://127.0.0.1:{server.server_port}/v1",
        [],
        lambda body: "好",
    )
    threading.Thread(target=lambda: server.serve_forever(0.02), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="session")
def readers_own() -> re.Pattern:
    """哪些环境变量是读者自己的，开始时就清掉了。"""
    return READERS_OWN


@pytest.fixture(scope="session")
def load_script():
    """``load_script("pretrain_chinese-mac")`` → 模块；文件名有连字符，不能 import。"""
    return _load


@pytest.fixture(scope="session")
def sft(load_script):
    return load_script("sft_chinese_qwen")


@pytest.fixture(scope="session")
def dpo(load_script):
    return load_script("dpo_chinese_qwen")


@pytest.fixture(scope="session")
def reward(load_script):
    return load_script("reward_model")


@pytest.fixture(scope="session")
def ppo(load_script):
    return load_script("ppo_alignment")


@pytest.fixture
def trainer_args(tmp_path):
    """``trainer_args(DPOConfig, **更改)`` → 各种训练器的最简设置：CPU、float32、不存盘、不联网、SGD。

    SGD 的一步就是梯度乘学习率，两个训练器的梯度差多少一看便知；Adam 会把极小的差放大成正负号。
    """

    def make(config_class, recompute: bool = False, **changes) -> dict:
        fields = config_class.__dataclass_fields__
        # transformers 5.23 起改名；TRL 的配置默认开着它
        checkpointing = next(n for n in ("activation_checkpointing", "gradient_checkpointing") if n in fields)
        return {
            "output_dir": str(tmp_path),
            "per_device_train_batch_size": 8,
            "max_steps": 1,
            "optim": "sgd",
            "learning_rate": 0.5,
            "lr_scheduler_type": "constant",
            "max_grad_norm": 0.0,
            "bf16": False,
            "use_cpu": True,
            "report_to": "none",
            "save_strategy": "no",
            "logging_strategy": "no",
            "disable_tqdm": True,
            "remove_unused_columns": False,
            checkpointing: recompute,
            **changes,
        }

    return make


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory) -> Path:
    """没训练过的小模型，hub 布局的文件夹。"""
    folder = tmp_path_factory.mktemp("tiny") / "base"
    qwen.save_tiny_base(folder, seed=0)
    return folder


@pytest.fixture(scope="session")
def control_folder(tmp_path_factory) -> Path:
    """同上，分词器里另有 Qwen3 那六个不算特殊的控制符：查用户、文档、工具的话变不变得成它们。"""
    folder = tmp_path_factory.mktemp("tiny") / "control"
    tokenizer = qwen.build_tokenizer()
    model = qwen.build_model(tokenizer, seed=0)
    names = ("tool_call", "tool_response", "think")
    tokenizer.add_tokens([word for name in names for word in (f"<{name}>", f"</{name}>")])
    model.resize_token_embeddings(len(tokenizer))
    for each in (model, tokenizer):
        each.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(base_folder):
    """基座的分词器（eos 是 <|endoftext|>）；只读。"""
    return load_tokenizer(str(base_folder))


@pytest.fixture(scope="session")
def _chat(base_folder):
    tokenizer, model = load_causal_lm(str(base_folder))
    end_chat_turns(model, tokenizer)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            # 矩阵放大，贪心输出才各不相同、有时自己结束；偏置和归一化也打乱，写漏了它们才看得出来
            if parameter.dim() > 1:
                parameter.mul_(1.8)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
        # <|im_end|> 的得分起伏更大：有的回答早早说完，有的说不完
        model.get_input_embeddings().weight[tokenizer.eos_token_id] *= 2
    return tokenizer, model.eval()


@pytest.fixture(scope="session")
def chat_tokenizer(_chat):
    """聊天阶段的分词器（eos 是 <|im_end|>）；只读。"""
    return _chat[0]


@pytest.fixture(scope="session")
def model(_chat):
    """随机但不呆板的小模型，eval 状态；只读，要改就 copy.deepcopy。"""
    return _chat[1]


@pytest.fixture(scope="session")
def reference(model):
    """与 model 略有不同的另一个模型；只读。"""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return other.eval()


@pytest.fixture(scope="session")
def chat_folder(_chat, tmp_path_factory) -> Path:
    """model 存成的文件夹。"""
    folder = tmp_path_factory.mktemp("tiny") / "chat"
    for each in _chat:
        each.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def reward_folder(chat_folder, chat_tokenizer, tmp_path_factory) -> Path:
    """以 model 为骨干、打分头随机的奖励模型存成的文件夹。"""
    torch.manual_seed(2)
    scorer = load_reward_model(str(chat_folder), chat_tokenizer)
    with torch.no_grad():
        scorer.score.weight.normal_(std=0.5)
    folder = tmp_path_factory.mktemp("tiny") / "reward"
    scorer.save_pretrained(folder)
    chat_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def reward_net(reward_folder, chat_tokenizer):
    """奖励模型，eval 状态；只读。"""
    return load_reward_model(str(reward_folder), chat_tokenizer).eval()


@pytest.fixture(scope="session")
def value_net(reward_folder, chat_tokenizer):
    """价值模型，从奖励模型开始，eval 状态；只读。"""
    return load_value_model(str(reward_folder), chat_tokenizer).eval()


# float64 的副本：两种算法若只差舍入，差别在 1e-7 以下，1e-5 的界就不靠运气


@pytest.fixture(scope="session")
def model64(model):
    return copy.deepcopy(model).double()


@pytest.fixture(scope="session")
def reference64(reference):
    return copy.deepcopy(reference).double()


@pytest.fixture(scope="session")
def reward64(reward_net):
    return copy.deepcopy(reward_net).double()


def pytest_collection_modifyitems(items):
    """最长的先跑：它占住一个进程的时候，别的测试在另一个进程里跑。"""
    items.sort(key=lambda item: item.path.name != "test_expected_numbers.py")
