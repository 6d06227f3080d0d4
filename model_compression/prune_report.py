"""剪枝的表与图。"""

from __future__ import annotations

from pathlib import Path

from nlp_common.draw.plots import bar_chart, line_chart

MAIN = ("magnitude", "wanda", "sparsegpt")
TITLES = {
    "magnitude": "幅度|magnitude",
    "wanda": "Wanda",
    "sparsegpt": "SparseGPT",
    "magnitude_row": "幅度，一行里比|magnitude by row",
    "wanda_layer": "Wanda，整层一起比|Wanda by layer",
}
EXACT = {"wanda_exact": "Wanda 的掩码，最优解", "sparsegpt_exact": "SparseGPT 的掩码，最优解"}
CLOSE = 0.001  # 损失差不到这么多 nats，算一样


def share_key(share: str) -> str:
    """ "0.5" → "50"，"2:4" → "2of4"：指标名字里不能有冒号。"""
    return "2of4" if share == "2:4" else f"{100 * float(share):g}"


def show(metrics: dict, settings) -> None:
    methods = metrics["methods"]
    names = list(methods)
    what = "qa_accuracy" if "qa_accuracy" in metrics["dense"] else "perplexity"
    title = {"qa_accuracy": "答对", "perplexity": "困惑度"}[what]
    dense = metrics["dense"]
    print(f"\n不剪：{title} {dense[what]:.3f}，留出损失 {dense['heldout_loss']:.4f}")
    print(f"{title} / 留出损失  " + "".join(f"{name:>20}" for name in names))
    for share in settings.shares.split(","):
        cells = [methods[name][share_key(share)] for name in names]
        row = "".join(f"{its[what]:11.3f} /{its['heldout_loss']:7.4f}" for its in cells)
        print(f"  {share:<16}{row}   {order(methods, share_key(share))}")
    if "errors" in metrics:
        print("各层各剪一半，输出相对误差的平均：")
        for key, error in metrics["errors"]["mean"].items():
            print(f"  {error:.4f}  {EXACT.get(key, key)}")
        print(f"各层最大的输入是中间的几倍，平均：{metrics['errors']['norm_ratio']:.1f}")
    for key, its in metrics.get("recovered", {}).items():
        before = methods[names[-1] if key == "plain" else key].get(share_key(settings.recover_share))
        start = f"{before['heldout_loss']:.4f} → " if before else ""
        merged, who = its["merged"], "平常的 LoRA" if key == "plain" else f"{key}，保住掩码的 LoRA"
        print(
            f"剪 {settings.recover_share}，{who} {settings.recover_steps} 步：留出损失 {start}{merged['heldout_loss']:.4f}，"
            f"{title} {merged[what]:.3f}，合并以后 {merged['zeros']:.1%} 是 0"
        )
        if "pruned_again" in its:
            again = its["pruned_again"]
            print(
                f"    再照原来的掩码剪一次：留出损失 {again['heldout_loss']:.4f}，{title} {again[what]:.3f}"
            )
    show_bytes(metrics["bytes"], settings.save)
    show_speed(metrics["speed"])


def order(methods: dict, key: str) -> str:
    """这一行里，留出损失的次序是不是 magnitude > Wanda ≥ SparseGPT；三种不全就不说。"""
    if not set(MAIN) <= set(methods):
        return ""
    magnitude, wanda, sparsegpt = (methods[name][key]["heldout_loss"] for name in MAIN)
    first = "≈" if abs(magnitude - wanda) < CLOSE else (">" if magnitude > wanda else "<")
    second = "≈" if abs(wanda - sparsegpt) < CLOSE else (">" if wanda > sparsegpt else "<")
    return f"magnitude {first} Wanda {second} SparseGPT"


def show_bytes(sizes: dict, save: str) -> None:
    names = {
        "dense": "照存 0",
        "bitmap": "一位掩码",
        "csr16": "CSR（16 位列号）",
        "torch": "torch 的 CSR",
        "2of4": "2:4",
    }
    said = "，".join(f"{names[key]} {size / sizes['dense']:.2f}" for key, size in sizes.items())
    print(f"{save}，一个数 16 位，各种存法是原来的几倍：{said}")


def show_speed(speed: dict) -> None:
    print("剪过的矩阵乘起来比没剪的快几倍（1 个 token / 64 个 token）：")
    for share in speed["columns_1"]:
        one, many = (speed[f"columns_{n}"][share] for n in (1, 64))
        print(
            f"  {share:>3}% 是 0：稠密 {one['dense_speedup']:.2f} / {many['dense_speedup']:.2f}，"
            f"CSR {one['csr_speedup']:.2f} / {many['csr_speedup']:.2f}"
        )
    print(f"torch 的 2:4 乘法，在 CPU 上：{speed['two_of_four'] or '能用'}")


def draw(folder: Path, metrics: dict) -> None:
    methods = metrics["methods"]
    what = "qa_accuracy" if "qa_accuracy" in metrics["dense"] else "perplexity"
    label = {"qa_accuracy": "答对|accuracy", "perplexity": "困惑度|perplexity"}[what]
    for name, ylabel in ((what, label), ("heldout_loss", "留出损失|held-out loss")):
        series = {}
        for method, its in methods.items():
            points = sorted((float(key), found[name]) for key, found in its.items() if key != "2of4")
            points.insert(0, (0.0, metrics["dense"][name]))
            series[TITLES[method]] = ([x for x, _ in points], [y for _, y in points])
        lines = {"没剪|dense": metrics["dense"][name]}
        title = "剪几成，花多少|Pruning"
        line_chart(
            folder / f"pruning_{name}.svg", series, title, "是 0 的百分比|% zeros", ylabel, hlines=lines
        )
    bars = {}
    for share in ("50", "2of4"):
        if all(share in its for its in methods.values()):
            bars["2:4" if share == "2of4" else "随意的一半|any half"] = {
                TITLES[method]: its[share]["heldout_loss"] for method, its in methods.items()
            }
    if bars:
        bar_chart(
            folder / "pruning_2of4.svg",
            bars,
            "同样剪一半|Half pruned",
            "",
            "留出损失|held-out loss",
            digits=3,
        )
