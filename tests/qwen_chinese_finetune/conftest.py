"""这个文件夹的几个测试文件共用：脚本（模块）、GRPO 的小设置、TRL 要的原样的模型。"""

import pytest
from accelerate import Accelerator
from accelerate.state import AcceleratorState


@pytest.fixture(scope="session")
def grpo(load_script):
    return load_script("grpo_alignment")


@pytest.fixture(scope="session")
def kto(load_script):
    return load_script("kto_alignment")


@pytest.fixture(scope="session")
def identity(load_script):
    return load_script("identity_dpo")


@pytest.fixture(scope="session")
def best_of_k(load_script):
    return load_script("best_of_k_sft")


@pytest.fixture(scope="session")
def methods(load_script):
    return load_script("compare_methods")


@pytest.fixture
def accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(cpu=True)


@pytest.fixture(scope="session")
def settings_of(grpo):
    """``settings_of(**更改)`` → GRPO 的设置：四道题，每题 3 个回答，最多 6 个 token。"""

    def make(**changes):
        given = {"num_generations": 3, "max_new_tokens": 6, "per_device_train_batch_size": 12}
        given |= {"micro_batch_size": 12, "max_grad_norm": 1e9, "max_steps": 10, "warmup_steps": 0}
        return grpo.GRPOSettings(**given | changes)

    return make


@pytest.fixture(scope="session")
def plain_copy():
    """``plain_copy(模型)`` → 同样的权重，没有装 nlp_common/fast 的：TRL 要的是 transformers 原样的模型。"""

    def copy(net):
        other = type(net)(net.config).double()
        other.load_state_dict(net.state_dict())
        return other.eval()

    return copy


@pytest.fixture(scope="session")
def few():
    """几步就完的设置：只看走得通、写对了。"""
    return ["--preset", "tiny", "--max_steps", "2", "--max_eval_samples", "6"]
