"""Does MixMIM help a Swin and a PVT? Pretraining in the small, against untrained networks and training from scratch.

    python -m benchmarks.families PHOTOS DATA --out runs/families

Each network is pretrained on PHOTOS as `tiny` is (recipe tiny-cpu), then measured like it (benchmarks/learning.py):
frozen features against three untrained networks, and fine-tuning against training from scratch at equal epochs, on
clothing10's test and caltech99's val photos in DATA. Every result is kept in OUT/SIZE as soon as it is there, and the
same command goes on after an interruption, also in the middle of a training; OUT/results.md is written after each.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from rich.console import Console

from benchmarks import learning
from mixmim_serve.files import atomic_path
from mixmim_serve.sources import open_source
from training.fit_to_data import fit
from training.pretraining import Pretraining
from training.recipes import tiny_cpu
from training.start import Start, read_start
from training.trainer import train

SIZES = ("swin-mini", "pvt-mini")


def main() -> None:
    """Pretrain and measure what is missing, one network after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", help="images to pretrain on")
    parser.add_argument("data", type=Path, help="folder of the labelled sets")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), help="named sizes")
    parser.add_argument("--epochs", type=int, default=tiny_cpu().epochs, help="epochs of pretraining")
    parser.add_argument("--tuning-epochs", type=int, default=10)
    parser.add_argument("--sets", nargs="+", default=[photos.name for photos in learning.SETS])
    parser.add_argument("--seeds", nargs="+", type=int, default=list(learning.SEEDS))
    options = parser.parse_args()
    for size in options.sizes:
        start = pretrained(size, options)
        for photos in learning.SETS:
            if photos.name in options.sets:
                out = options.out / size
                learning.measure(photos, options.data, start, out, options.tuning_epochs, options.seeds)
                write_table(options)
    print((options.out / "results.md").read_text())


def pretrained(size: str, options: argparse.Namespace) -> Start:
    """The pretrained network; its run is continued if it was interrupted."""
    run = options.out / size / "pretraining"
    if not (run / "final.safetensors").exists():
        config = dataclasses.replace(tiny_cpu().with_epochs(options.epochs), size=size)
        source = open_source(options.photos)
        config, _ = fit(config, source.name, len(source.keys), {"epochs"})  # as `mixmim pretrain` would
        task = Pretraining(config, source)
        console = Console(stderr=True, log_path=False)
        if train(task, source, run, console, resume=(run / "config.json").exists()) is None:
            raise SystemExit("stopped; the same command resumes")
    return read_start(run)


def write_table(options: argparse.Namespace) -> None:
    """Write the tables of all networks measured so far."""
    lines: list[str] = []
    for size in options.sizes:
        if (options.out / size).exists():
            lines += [f"## {size}", "", *learning.rows(options.out / size), ""]
    with atomic_path(options.out / "results.md") as path:
        path.write_text("\n".join(lines))


if __name__ == "__main__":
    main()
