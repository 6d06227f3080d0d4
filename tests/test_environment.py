"""测试不看读者的环境变量：设了离线、镜像、代理、语言、线程数，结果都一样。"""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
READERS = {
    "HF_HUB_OFFLINE": "1",
    "HF_ENDPOINT": "http://127.0.0.1:9",  # 9 号端口没有人听
    "HF_HOME": str(ROOT / "没有这个文件夹"),
    "TRANSFORMERS_OFFLINE": "1",
    "MODELSCOPE_ENDPOINT": "http://127.0.0.1:9",
    "NLP_LEARNING_CACHE": str(ROOT / "没有这个文件夹"),
    "ALL_PROXY": "socks5://127.0.0.1:9",
    "https_proxy": "http://127.0.0.1:9",
    "OMP_NUM_THREADS": "many",
    "LANG": "C",
    "LC_ALL": "C",
    "PYTHONIOENCODING": "ascii",
}


def test_the_readers_environment_changes_nothing():
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    chosen = [
        f"tests/nlp_common/{name}"
        for name in ("hub/test_hub_server.py", "hub/test_hub.py", "base/test_cli.py")
    ]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *chosen]
    command += ["-k", "downloads_once or is_said or verify_says or environment or test_cli"]
    done = subprocess.run(
        command, cwd=ROOT, env=env | READERS, capture_output=True, text=True, encoding="utf-8", timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    passed = int(done.stdout.rsplit(" passed", 1)[0].split()[-1])
    assert passed >= 10, done.stdout


def test_what_is_cleared_and_what_is_kept(readers_own):
    for name in [*READERS, "HF_TOKEN", "LC_CTYPE", "no_proxy", "DATASETS_CACHE"]:
        assert readers_own.fullmatch(name), name
    for name in ("PATH", "HOME", "PYTHONPATH", "TMPDIR", "CI", "OPENBLAS_CORETYPE", "CUDA_VISIBLE_DEVICES"):
        assert not readers_own.fullmatch(name), name
