"""nlp_common 的各间屋子只许往下导入；主题之间互不导入；单独成文件的脚本不导入本仓库。"""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LEVEL = {"base": 0, "fast": 1, "draw": 1, "sandbox": 1, "hub": 2, "lm": 2, "data": 3, "tiny": 3, "train": 4}
# 名字固定的主题文件夹，含还没有写的
TOPICS = {
    "simple_demo",
    "gpt",
    "pipeline",
    "sentiment_classifier",
    "news_classifier",
    "qwen_chinese_finetune",
    "sequence_labeling",
    "attention_visualization",
    "text_generation",
    "lora_finetune",
    "model_compression",
    "distributed_training",
    "evaluation",
    "alignment_ops",
    "rag",
    "agent",
}


def imported(path: Path) -> set[str]:
    """一个文件导入的模块的全名；函数里的也算。"""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 or path.name == "__init__.py", f"{path} 用了相对导入"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_every_file_lives_in_a_room():
    rooms = {path.name for path in (ROOT / "nlp_common").iterdir() if path.is_dir()} - {"__pycache__"}
    assert rooms == set(LEVEL)
    assert [path.name for path in (ROOT / "nlp_common").glob("*.py")] == ["__init__.py"]


def test_imports_run_downwards():
    wrong = []
    for path in (ROOT / "nlp_common").rglob("*.py"):
        room = path.parent.name
        for name in imported(path):
            parts = name.split(".")
            if parts[0] != "nlp_common" or room == "nlp_common":
                continue
            if parts[1] != room and LEVEL[parts[1]] >= LEVEL[room]:
                wrong.append(f"{path.relative_to(ROOT)} 导入了 {name}")
    assert not wrong


def modules_of(topic: Path) -> set[str]:
    """这个主题自己的模块叫什么：脚本与子包。"""
    return {path.stem for path in topic.glob("*.py")} | {
        path.parent.name for path in topic.glob("*/__init__.py")
    }


def test_no_topic_imports_another_and_the_library_imports_none():
    own = {name: modules_of(ROOT / name) for name in TOPICS if (ROOT / name).is_dir()}
    wrong = []
    for place in [*own, "nlp_common"]:
        foreign = set().union(*(modules for name, modules in own.items() if name != place)) - own.get(
            place, set()
        )
        for path in (ROOT / place).rglob("*.py"):
            for name in imported(path):
                if name.split(".")[0] in foreign | (TOPICS - {place}):
                    wrong.append(f"{path.relative_to(ROOT)} 导入了 {name}")
    assert len(own) >= 6 and not wrong


def test_scripts_that_stand_alone_import_nothing_of_ours():
    alone = [*(ROOT / "simple_demo").glob("*.py"), ROOT / "gpt" / "mini_gpt.py", ROOT / "gpt" / "muon.py"]
    for path in alone:
        assert not [name for name in imported(path) if name.startswith("nlp_common")], path


def test_environment_is_set_before_any_hugging_face_library_is_imported():
    """脚本里第一条导入就是 nlp_common 的：HF_ENDPOINT 等环境变量是那些库导入时读的。"""
    libraries = {
        "transformers",
        "datasets",
        "trl",
        "accelerate",
        "huggingface_hub",
        "evaluate",
        "tokenizers",
        "peft",
    }
    checked = 0
    for topic in TOPICS:
        for path in (ROOT / topic).glob("*.py"):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            if not any(isinstance(n, ast.If) and "__main__" in ast.dump(n.test) for n in tree.body):
                continue
            seen_ours = False
            for node in tree.body:
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                names += [node.module] if isinstance(node, ast.ImportFrom) else []
                seen_ours |= any(name.startswith("nlp_common") for name in names)
                assert seen_ours or not {name.split(".")[0] for name in names} & libraries, path
            checked += seen_ours
    assert checked >= 15
