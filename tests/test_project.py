"""项目的几个设置文件说的是同一回事。"""

import re
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def load(path: str) -> dict:
    return yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))


def test_pre_commit_runs_the_same_ruff():
    pinned = re.search(r'"ruff==([\d.]+)"', PYPROJECT)[1]
    assert [repo["rev"] for repo in load(".pre-commit-config.yaml")["repos"]] == [f"v{pinned}"]


def test_the_workflow_runs_make_test_on_three_systems_from_the_oldest_python():
    job = load(".github/workflows/test.yml")["jobs"]["test"]
    oldest = re.search(r'requires-python = ">=([\d.]+)"', PYPROJECT)[1]
    matrix = job["strategy"]["matrix"]
    assert matrix["python"] == [oldest, "3.13"]
    assert [name.split("-")[0] for name in matrix["os"]] == ["ubuntu", "windows", "macos"]
    commands = [step.get("run", "") for step in job["steps"]]
    assert commands[-1].startswith("make test ")
    targets = set(re.findall(r"^([\w./-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert {line.split()[1] for line in commands if line.startswith("make ")} <= targets


def test_ci_runs_both_test_commands():
    assert "make test test-all" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_requirements_install_what_pyproject_says():
    for name in ("requirements.txt", "requirements-dev.txt"):
        lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
        first = next(line for line in lines if line and not line.startswith("#"))
        assert first.startswith("-e ."), name
        extras = re.findall(r"\w+", first.removeprefix("-e ."))
        assert all(re.search(rf"^{extra} = \[", PYPROJECT, re.MULTILINE) for extra in extras), name
