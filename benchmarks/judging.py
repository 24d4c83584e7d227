"""Draw the curves of several runs beside each other.

python benchmarks/judging.py docs/images/judging.png good=runs/good "rate times ten=runs/high" "200 photos=runs/few"
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

CURVES = {
    "loss": "loss",
    "knn20_top1": "k-NN on labelled photos, %",
    "effective_rank": "effective rank",
    "uniformity": "uniformity",
    "dead_dimensions": "share of dead dimensions",
    "spectrum_decay": "decay of the spectrum",
}


def main(target: Path, runs: dict[str, Path]) -> None:
    """One picture per metric, over the share of the run."""
    figure, axes = plt.subplots(2, 3, figsize=(11, 5.6), layout="constrained")
    for axis, (name, title) in zip(axes.flat, CURVES.items(), strict=True):
        for label, run in runs.items():
            lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            epochs = json.loads((run / "config.json").read_text())["config"]["epochs"]
            values = [(line["epoch"] / epochs, line[name]) for line in lines if name in line]
            axis.plot(*zip(*values, strict=True), linewidth=1.5, label=label)
        axis.set_title(title, loc="left", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    axes[1, 1].set_xlabel("share of the run")
    axes[0, 0].legend(frameon=False, fontsize=9)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=80)


if __name__ == "__main__":
    main(Path(sys.argv[1]), {name: Path(run) for name, run in (pair.split("=") for pair in sys.argv[2:])})
