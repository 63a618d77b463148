"""Draw the README's plots from what the measurements wrote.

    .venv/bin/python tests/bench/plots.py shots MASKS.json NO_MASKS.json -o .images/shots.png
    .venv/bin/python tests/bench/plots.py inspector INSPECTOR.json… -o .images/inspector.png
    .venv/bin/python tests/bench/plots.py synthesised -o .images/synthesised.png

The first two are `ls-anomaly eval --shots … --json` with and without masks; the others `inspector.py --json` or
`live_inspector.py --json`, one file or several with a part of the classes each. The last shows made-up defects on the
washers of `make demo`, each kind in turn.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

mpl.use("agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from anomaly_workers import sample
from anomaly_workers.refine.synthetic import DEFECTS, synthesised
from anomaly_workers.types import Picture

BLUE, ORANGE, GREY = "#1f6fb2", "#e08e1b", "#777777"
COLOURS = {"random": GREY, "highest unsupervised": ORANGE, "mix": BLUE}


def grid(count: int) -> tuple[Figure, list[Axes]]:
    """Return a figure with room for `count` plots, three in a row."""
    rows = -(-count // 3)
    figure, axes = plt.subplots(rows, 3, figsize=(9, 2.5 * rows), squeeze=False)
    flat = list(axes.flat)
    for axis in flat[count:]:
        axis.set_visible(False)
    for axis in flat[:count]:
        axis.grid(alpha=0.4)
    return figure, flat[:count]


def shots(masks: dict[str, Any], verdicts: dict[str, Any]) -> Figure:
    """Image AUROC over the number of confirmed defects, a plot for each class."""
    figure, axes = grid(len(masks))
    for axis, name in zip(axes, masks, strict=True):
        counts = list(masks[name]["shots"])
        places = range(len(counts))
        bank = [masks[name]["shots"][count]["bank"]["image_auroc"]["mean"] for count in counts]
        axis.plot(places, bank, "--", color=GREY, label="bank")
        head = [masks[name]["shots"][count]["head"]["image_auroc"]["mean"] for count in counts]
        axis.plot(places[1:], head[1:], ":", color=BLUE, linewidth=1, label="head alone, masks")
        fused = []
        for figures, colour, label in ((masks, BLUE, "fused, masks"), (verdicts, ORANGE, "fused, verdicts alone")):
            cells = [figures[name]["shots"][count]["fused"]["image_auroc"] for count in counts]
            means, spread = [cell["mean"] for cell in cells], [cell.get("std", 0.0) for cell in cells]
            axis.errorbar(places, means, spread, color=colour, marker="o", markersize=4, capsize=3, label=label)
            fused += means
        low, high = min([*bank, *fused]), max([*bank, *fused])
        axis.set_ylim(low - max(0.03, 0.5 * (high - low)), min(1.005, high + 0.03))
        axis.set_xticks(list(places), counts)
        axis.set_title(name, fontsize=10)
    axes[0].legend(fontsize=7)
    figure.supxlabel("confirmed defects", fontsize=9)
    figure.supylabel("image AUROC", fontsize=9)
    return figure


def inspector(figures: dict[str, Any]) -> Figure:
    """Share of the defects found over the share of the tasks reviewed, a plot for each class."""
    figure, axes = grid(len(figures))
    for axis, (name, orders) in zip(axes, figures.items(), strict=True):
        for order, row in orders.items():
            found = [100 * share for share in row["curve"]]
            axis.plot(range(len(found)), found, color=COLOURS[order], label=order)
        row = next(iter(orders.values()))
        perfect = 100 * row["defects"] / row["tasks"]
        axis.plot([0, perfect, 40], [0, 100, 100], ":", color="black", linewidth=1, label="perfect")
        axis.set_title(f"{name}: {row['defects']} defects in {row['tasks']}", fontsize=9)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="lower right", ncols=2, fontsize=8)
    figure.supxlabel("tasks reviewed, %", fontsize=9)
    figure.supylabel("defects found, %", fontsize=9)
    return figure


def made_up() -> Figure:
    """Two washers with a defect of each kind, outlined."""
    random = np.random.default_rng(3)
    washers = [np.asarray(sample.washer(random)) for _ in range(8)]
    pictures = [Picture(pixels, pixels.shape[:2]) for pixels in washers]
    figure, axes = plt.subplots(2, len(DEFECTS), figsize=(9, 3.3))
    for column, kind in enumerate(DEFECTS):
        shape, fill = (part.__name__.strip("_") for part in kind)
        for axis, one in zip(axes[:, column], synthesised(pictures, 2, kinds=[kind], seed=column), strict=True):
            axis.imshow(one.picture.pixels)
            axis.contour(one.mask, [0.5], colors=ORANGE, linewidths=0.7)
            axis.set_axis_off()
        axes[0, column].set_title(f"{shape}, {fill}", fontsize=8)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plot", choices=("shots", "inspector", "synthesised"))
    parser.add_argument("files", type=Path, nargs="*")
    parser.add_argument("-o", "--out", type=Path, required=True)
    given = parser.parse_args()
    read = [json.loads(file.read_text()) for file in given.files]
    joined = {name: orders for one in read for name, orders in one.items()}
    drawn = {"shots": lambda: shots(*read), "inspector": lambda: inspector(joined), "synthesised": made_up}
    figure = drawn[given.plot]()
    figure.tight_layout()
    figure.savefig(given.out, dpi=100)
    print(given.out)


if __name__ == "__main__":
    main()
