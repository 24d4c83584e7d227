"""Draw the loss curve of a run.

python benchmarks/loss_curve.py runs/tiny/metrics.jsonl docs/images/loss.png
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt


def main(metrics: Path, target: Path) -> None:
    """Draw one point per line of metrics.jsonl, with the learning rate below."""
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    epochs = [line["epoch"] for line in lines]
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(8, 5), sharex=True, height_ratios=(3, 1))
    top.plot(epochs, [line["loss"] for line in lines], linewidth=1)
    top.set_ylabel("reconstruction loss (normalised units)")
    top.grid(alpha=0.3)
    bottom.plot(epochs, [line["lr"] for line in lines], linewidth=1, color="tab:orange")
    bottom.set_ylabel("learning rate")
    bottom.set_xlabel("epoch")
    bottom.grid(alpha=0.3)
    figure.tight_layout()
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=110)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
