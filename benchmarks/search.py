"""Short pretraining runs of `tiny-cpu`, each with one setting changed, judged by nearest neighbours.

    python -m benchmarks.search photos data --out runs/search --epochs 5

Every run sees the same images in the same order for as many epochs; `images` of other sizes and other batches change
steps or time. The measure is the top-1 of k-NN (k = 10, cosine, DINO's weights) on the val parts of clothing10 and
caltech99 under DATA, with their train parts as neighbours: the test parts stay unseen. `--only NAME` runs some of
them, `--seeds 0 1 2` each with several seeds. Finished runs are skipped, interrupted ones resume; the table is
written to OUT/results.md and OUT/results.json after each.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.learning import ALONE, Photos, record
from mixmim_serve.config import Architecture
from mixmim_serve.files import atomic_path
from mixmim_serve.sources import open_source
from training.config import PretrainConfig
from training.evaluation.embed import run_network
from training.evaluation.knn import knn_accuracy
from training.pretraining import Pretraining
from training.recipes import tiny_cpu
from training.start import read_start
from training.trainer import train

NEAREST = 10  # the k of k-NN
SETS = (Photos("clothing10", "val"), Photos("caltech99", "val"))


@dataclass(frozen=True)
class DecoderDepth(PretrainConfig):
    """A run whose decoder has another number of blocks."""

    decoder_depth: int = 4

    @property
    def arch(self) -> Architecture:
        """The network to train."""
        arch = super().arch
        if arch.decoder is None:
            raise ValueError(f"{self.size} has no decoder.")
        return dataclasses.replace(arch, decoder=dataclasses.replace(arch.decoder, depth=self.decoder_depth))


# What each run changes of `tiny-cpu`.
VARIANTS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "rate 1e-3": {"base_lr": 1e-3},
    "rate 4e-3": {"base_lr": 4e-3},
    "batch 64": {"batch_size": 64},
    "batch 256": {"batch_size": 256},
    "mask 0.4": {"mask_ratio": 0.4},
    "mask 0.6": {"mask_ratio": 0.6},
    "crop 0.08": {"min_crop": 0.08},
    "crop 0.4": {"min_crop": 0.4},
    "decoder of 2": {"decoder_depth": 2},
    "decoder of 1": {"decoder_depth": 1},
    "160 px": {"image_size": 160},
}


def main() -> None:
    """Run what is missing, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", help="images to pretrain on")
    parser.add_argument("data", type=Path, help="folder of the labelled sets")
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    arguments = parser.parse_args()
    source = open_source(arguments.images)
    for name in arguments.only:
        for seed in arguments.seeds:
            run = arguments.out / f"{name.replace(' ', '-')}-{seed}"
            config = configuration(name, arguments.epochs, seed)
            if train(Pretraining(config, source), source, run, resume=(run / "config.json").exists()) is None:
                raise SystemExit("stopped; the same command resumes")
            record(run / "judged.json", judge, run, arguments.data)
            write_table(arguments.out)


def configuration(name: str, epochs: int, seed: int) -> PretrainConfig:
    """The recipe with one setting changed."""
    changes = VARIANTS[name]
    base = dataclasses.asdict(tiny_cpu().with_epochs(epochs)) | {"seed": seed, "keep_every": 1000}
    return (DecoderDepth if "decoder_depth" in changes else PretrainConfig)(**base | changes)


def judge(run: Path, data: Path) -> dict[str, float]:
    """Top-1 in percent on each set, the last loss, and the seconds of the run without evaluation."""
    start = read_start(run / "final.safetensors")
    model = start.model().eval()
    result = {}
    for photos in SETS:
        train_part, val_part = photos.open(data)
        neighbours, queries = (
            run_network(model, part.source, start.description.preprocessing, ALONE, workers=1)
            for part in (train_part, val_part)
        )
        accuracy = knn_accuracy(
            neighbours.values_NX, train_part.labels_of(neighbours), queries.values_NX, val_part.labels_of(queries),
            len(train_part.classes), ks=(NEAREST,),
        )[NEAREST]  # fmt: skip
        result[photos.name] = accuracy.top1
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rates = [line["rate"] for line in lines if "rate" in line]
    losses = [line["loss"] for line in lines if "loss" in line]
    return result | {"loss": statistics.mean(losses[-5:]), "images/s": statistics.median(rates)}


def write_table(out: Path) -> None:
    """Write the results so far, as JSON and as a Markdown table with mean and deviation over the seeds."""
    results: dict[str, list[dict[str, float]]] = {}
    for name in VARIANTS:
        for path in sorted(out.glob(f"{name.replace(' ', '-')}-[0-9]*/judged.json")):
            results.setdefault(name, []).append(json.loads(path.read_text()))
    columns = [*(photos.name for photos in SETS), "loss", "images/s"]
    table = [f"| changed | seeds | {' | '.join(columns)} |", "|---" * (len(columns) + 2) + "|"]
    for name, runs in results.items():
        cells = [spread([values[column] for values in runs]) for column in columns]
        table.append(f"| {name} | {len(runs)} | {' | '.join(cells)} |")
    for path, text in ((out / "results.md", "\n".join(table) + "\n"), (out / "results.json", json.dumps(results))):
        with atomic_path(path) as temporary:
            temporary.write_text(text)
    print("\n".join(table), flush=True)


def spread(values: Sequence[float]) -> str:
    """Mean, and standard deviation if there are several."""
    mean = f"{statistics.mean(values):.3g}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.2g}"


if __name__ == "__main__":
    main()
