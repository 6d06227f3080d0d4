"""不是测试文件：做一个假的结果文件夹，权重只由设置、数据、上一次的编号决定（不导入 torch，几十毫秒）。"""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file


def make_run(folder, stage, parents, dataset, seed=0, script=None, version="1", replace=False) -> dict:
    """→ run.json 的内容。version：冒充代码的版本，它不同，权重就不同。"""
    if replace:
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    fingerprint = {"seed": seed, "dataset": str(dataset) if dataset else None}
    data, ids = {}, {}
    if dataset:
        content = Path(dataset).read_bytes()
        fingerprint["dataset_sha256"] = hashlib.sha256(content).hexdigest()
        rows = content.count(b"\n")
        data["train"] = {"name": str(dataset), "rows": rows, "sha256": fingerprint["dataset_sha256"]}
    for name, path in parents.items():
        run = json.loads((Path(path) / "run.json").read_text(encoding="utf-8"))
        ids[name] = {"path": str(path), "stage": run["stage"], "id": run["id"]}
    known = {k: v for k, v in fingerprint.items() if k != "dataset"}
    basis = json.dumps([stage, known, [each["id"] for each in ids.values()], version], sort_keys=True)
    digest = hashlib.sha256(basis.encode()).digest()
    save_file({"w": np.frombuffer(digest, dtype=np.uint8)}, folder / "model.safetensors")
    weights = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    record = {
        "stage": stage, "parent": ids, "data": data, "fingerprint": fingerprint, "script": script, "commit": "c1",
        "settings": {"stage": stage, "seed": seed, "dataset": fingerprint["dataset"], "model": None, "output_dir": "x"},
        "versions": {"torch": "1"}, "device": "CPU", "threads": 1, "seconds": 1.0,
        "metrics": {"accuracy": digest[0] / 255, "train_seconds": 1.0}, "history": [{"step": 10, "loss": digest[1] / 255}],
        "id": hashlib.sha256(weights.encode()).hexdigest()[:16],
    }  # fmt: skip
    (folder / "run.json").write_text(json.dumps(record, ensure_ascii=False), encoding="utf-8")
    return record
