"""启动用的文件：accelerate 读得懂每个 YAML，shell 没有语法错，PyTorchJob 的字段齐，启动页里的路径都在；真的用 torchrun_node.sh 开一次。"""

import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

HOME = Path(__file__).resolve().parents[2]
CLUSTER = HOME / "distributed_training" / "cluster"
CONFIGS = sorted((HOME / "accelerate_configs").glob("*.yaml"))
KINDS = {
    "ddp": "MULTI_GPU",
    "two_machines": "MULTI_GPU",
    "fsdp": "FSDP",
    "zero2": "DEEPSPEED",
    "zero3": "DEEPSPEED",
}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_reads_the_configs(path):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    assert str(config.distributed_type).endswith(KINDS[path.stem])
    assert config.num_processes == 8 * config.num_machines


def test_every_config_is_known():
    assert {path.stem for path in CONFIGS} == set(KINDS)


@pytest.mark.parametrize("name", ["torchrun_node.sh", "slurm.sbatch"])
def test_shell_has_no_syntax_errors(name):
    if not shutil.which("bash"):
        pytest.skip("没有 bash")
    done = subprocess.run(["bash", "-n", str(CLUSTER / name)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    text = (CLUSTER / name).read_text(encoding="utf-8")
    assert text.startswith("#!/usr/bin/env bash") and "set -euo pipefail" in text
    if os.name == "posix":
        assert os.access(CLUSTER / name, os.X_OK)


def test_slurm_options_come_before_any_command():
    """sbatch 只读第一条命令以前的 #SBATCH。"""
    lines = (CLUSTER / "slurm.sbatch").read_text(encoding="utf-8").splitlines()
    last = max(i for i, line in enumerate(lines) if line.startswith("#SBATCH"))
    first = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    assert last < first
    assert "#SBATCH --ntasks-per-node=1" in lines


def test_the_pytorchjob_has_what_the_operator_needs():
    job = yaml.safe_load((CLUSTER / "pytorchjob.yaml").read_text(encoding="utf-8"))
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    for role in ("Master", "Worker"):
        replica = job["spec"]["pytorchReplicaSpecs"][role]
        pod = replica["template"]["spec"]
        container = pod["containers"][0]
        assert container["name"] == "pytorch" and replica["replicas"] == 1
        gpus = container["resources"]["limits"]["nvidia.com/gpu"]
        assert str(gpus) == job["spec"]["nprocPerNode"]
        mounted = {each["name"] for each in container["volumeMounts"]}
        assert mounted == {each["name"] for each in pod["volumes"]}
        assert all(isinstance(each["value"], str) for each in container["env"])


def test_paths_on_the_page_exist():
    page = (HOME / "distributed_training" / "启动.md").read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#]+)", page):
        if link == "training_log_inspector.py":
            continue
        assert (HOME / "distributed_training" / link).exists(), link
    for name in re.findall(r"\.\./accelerate_configs/(\w+\.yaml)", page):
        assert (HOME / "accelerate_configs" / name).exists(), name


SUM = """
import os, torch, torch.distributed as dist
dist.init_process_group("gloo")
x = torch.ones(1)
dist.all_reduce(x)
open(os.environ["OUT"] + os.environ["RANK"], "w").write(f"{int(x)} {os.environ['GROUP_RANK']}")
dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix" or not shutil.which("bash"), reason="要 bash")
def test_two_machines_on_one(tmp_path):
    """两台"机器"，各一个进程，同一条命令：碰上头，和是 2，编号各不相同。"""
    (tmp_path / "sum.py").write_text(SUM, encoding="utf-8")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "NODES": "2",
        "GPUS_PER_NODE": "1",
        "HEAD": "localhost",
        "PORT": str(port),
        "OUT": str(tmp_path / "out"),
        "OMP_NUM_THREADS": "1",
    }
    command = ["bash", str(CLUSTER / "torchrun_node.sh"), str(tmp_path / "sum.py")]
    nodes = [subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    try:
        for node in nodes:
            errors = node.communicate(timeout=120)[1]
            assert node.returncode == 0, errors
    finally:
        for node in nodes:
            node.kill()
    results = sorted((tmp_path / f"out{rank}").read_text() for rank in range(2))
    assert results == ["2 0", "2 1"]


def test_no_script_is_said():
    if not shutil.which("bash"):
        pytest.skip("没有 bash")
    done = subprocess.run(["bash", str(CLUSTER / "torchrun_node.sh")], capture_output=True, text=True)
    assert done.returncode == 2 and "用法" in done.stderr
