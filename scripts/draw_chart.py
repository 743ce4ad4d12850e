"""Draw the README's chart of the demo's reference scores: ``python scripts/draw_chart.py``."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import pandas as pd
from matplotlib import pyplot

from benchmarks.compare.reference import REFERENCE, read_csv
from benchmarks.results.scores import in_order

OUTPUT = Path("docs/demo.png")
PANELS = (
    ("classification", "top1", "demo", "Classification: top-1 accuracy\n(ViT, DeiT, Swin)"),
    ("retrieval", "R@1", "demo [vision]", "Retrieval: R@1\n(CLIP, vision tower)"),
    ("detection", "AP_box", "demo", "Detection: box AP\n(Mask R-CNN, Cascade)"),
)


def draw(table: pd.DataFrame, path: Path) -> None:
    """Draw one panel per task: mean score of each method at W3/A3, beside full precision.

    Args:
        table: the demo's reference, see :func:`benchmarks.compare.agreement.observations`.
        path: the PNG file to write.
    """
    figure, axes = pyplot.subplots(1, len(PANELS), figsize=(10, 3.4), width_ratios=(1.3, 1, 1))
    white = {"va": "center", "ha": "right", "color": "white", "fontsize": 7}
    for axis, (task, metric, variant, title) in zip(axes, PANELS, strict=True):
        rows = table[(table["task"] == task) & (table["metric"] == metric)]
        full = rows[rows["method"] == "fp"].groupby("model")["value"].mean().mean()
        low = rows[(rows["w_bit"] == 3) & rows["variant"].str.startswith(variant)]
        means = low.groupby(["method", "model"])["value"].mean().groupby("method").mean()
        means = means[in_order(means.index)[::-1]]
        colors = ["#1f5fa8" if method == "fimaq" else "#7390ad" for method in means.index]
        axis.barh(means.index, means, color=colors)
        for place, value in enumerate(means):
            axis.text(value - 1, place, f"{value:.1f}", **white)
        axis.axvline(full, color="#444444", linewidth=1, linestyle="--")
        axis.set_xlim(0, 100)
        axis.set_title(title, fontsize=9)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    title = "3-bit weights and activations, by method (dashed: full precision; percent)"
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    draw(read_csv(REFERENCE / "demo.csv"), OUTPUT)
    print(f"wrote {OUTPUT}")
