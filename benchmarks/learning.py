"""Does pretraining help? A pretrained backbone against the same network untrained and trained from scratch.

    python benchmarks/learning.py data --start tiny --out runs/learning

DATA holds clothing10 (train, val, test) and caltech99 (train, val). Evaluation uses clothing10's test and caltech99's
val photos, which no training saw. Frozen features (k-NN, linear probe) are compared with those of three untrained
networks; fine-tuning with training from scratch, same recipe and epochs, three seeds each. Training from scratch has
no layer decay, which would keep the first layers untrained, and twice the warm-up; of the peak learning rates 5e-4,
1e-3 and 2e-3 the recipe's own is best on clothing10's val photos. Finished runs are skipped, so after an interruption
the same command continues; the table is written to OUT/results.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from mixmim_serve.config import size_name
from mixmim_serve.files import atomic_path
from mixmim_serve.sources import open_source
from training.config import FinetuneConfig
from training.distributed import World
from training.evaluation.evaluate import evaluate
from training.evaluation.labelled import Labelled
from training.evaluation.probe import probe, untrained
from training.finetuning import Finetuning
from training.recipes import tiny_finetune_cpu
from training.start import Start, read_start
from training.trainer import train

SEEDS = (0, 1, 2)
BUNDLES = Path(__file__).parent.parent / "mixmim_serve" / "bundles"
ALONE = World(0, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu"))


@dataclass(frozen=True)
class Photos:
    """A data set with a training and an evaluation part."""

    name: str
    evaluated: str  # folder next to `train`

    def open(self, data: Path) -> tuple[Labelled, Labelled]:
        """The training and the evaluation part."""
        train_part = Labelled.from_source(open_source(data / self.name / "train"))
        source = open_source(data / self.name / self.evaluated)
        return train_part, Labelled.from_source(source, train_part.classes)


SETS = (Photos("clothing10", "test"), Photos("caltech99", "val"))


def main() -> None:
    """Run what is missing, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--start", type=Path, default=BUNDLES / "tiny", help="a checkpoint or bundle of a named size")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=10, help="epochs of fine-tuning")
    parser.add_argument("--sets", nargs="+", default=[photos.name for photos in SETS])
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    arguments = parser.parse_args()
    start = read_start(arguments.start)
    for photos in SETS:
        if photos.name in arguments.sets:
            measure(photos, arguments.data, start, arguments.out, arguments.epochs, arguments.seeds)
    table = "\n".join(rows(arguments.out)) + "\n"
    with atomic_path(arguments.out / "results.md") as path:
        path.write_text(table)
    print(table)


def measure(photos: Photos, data: Path, start: Start, out: Path, epochs: int, seeds: list[int]) -> None:
    """Measure what is missing for one data set."""
    train_part, test_part = photos.open(data)
    record(out / f"{photos.name}-frozen-pretrained-0.json", frozen, start, 0, train_part, test_part)
    size = size_name(start.description.arch)
    for seed in seeds:
        record(out / f"{photos.name}-frozen-untrained-{seed}.json", frozen, size, seed, train_part, test_part)
    for seed in seeds:
        for name, origin in (("pretrained", start), ("scratch", size)):
            run = out / f"{photos.name}-tuned-{name}-{seed}"
            record(run.with_suffix(".json"), tuned, origin, train_part, test_part, run, epochs, seed)


def record(path: Path, work: Callable[..., dict[str, float]], *arguments: Any) -> None:
    """Do the work unless its result exists."""
    if not path.exists():
        result = work(*arguments)
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(result, indent=2) + "\n")
        print(path.stem, result, flush=True)


def frozen(origin: Start | str, seed: int, train_part: Labelled, test_part: Labelled) -> dict[str, float]:
    """Top-1 of k-NN and linear probe, in percent; untrained for the name of a size."""
    model, description = untrained(origin, seed) if isinstance(origin, str) else (origin.model(), origin.description)
    result = probe(model, description, train_part, test_part, ALONE)
    neighbours = {f"k-NN, k = {k}": accuracy.top1 for k, accuracy in result.neighbours.items()}
    return neighbours | {"linear probe": result.linear.top1}


def tuned(
    origin: Start | str, train_part: Labelled, test_part: Labelled, run: Path, epochs: int, seed: int
) -> dict[str, float]:
    """Top-1 and top-5 after fine-tuning, or for the name of a size after as many epochs from scratch, in percent."""
    start = None if isinstance(origin, str) else origin
    final = train(
        Finetuning(settings(origin, epochs, seed), train_part.classes, start, None), train_part.source, run,
        Console(stderr=True, log_path=False), resume=(run / "config.json").exists(),
    )  # fmt: skip
    if final is None:
        raise SystemExit("stopped; the same command resumes")
    accuracy = evaluate(read_start(final), test_part.source, ALONE).accuracy
    return {"fine-tuned": accuracy.top1, "fine-tuned, top-5": accuracy.top5}


def settings(origin: Start | str, epochs: int, seed: int) -> FinetuneConfig:
    """The recipe, shortened; from scratch every layer has the full learning rate, after a longer warm-up."""
    config = replace(tiny_finetune_cpu().with_epochs(epochs), seed=seed)
    if not isinstance(origin, str):
        return config
    return replace(config, size=origin, layer_decay=1.0, warmup_epochs=0.2 * epochs)


def rows(out: Path) -> Iterator[str]:
    """The lines of a Markdown table: mean and standard deviation over the seeds."""
    yield "| evaluated on | by | MixMIM | without | gain |"
    yield "|---|---|---|---|---|"
    for photos in SETS:
        for kind, other in (("frozen", "untrained"), ("tuned", "scratch")):
            ours, theirs = (collect(out, f"{photos.name}-{kind}-{name}") for name in ("pretrained", other))
            for measure_name in ours:
                one, two = ours[measure_name], theirs.get(measure_name, [])
                if one and two:
                    gain = statistics.mean(one) - statistics.mean(two)
                    yield (
                        f"| {photos.name} {photos.evaluated} | {measure_name} | {spread(one)} "
                        f"| {spread(two)} ({other}) | {gain:+.1f} |"
                    )


def collect(out: Path, stem: str) -> dict[str, list[float]]:
    """Values of all seeds by measure."""
    values: dict[str, list[float]] = {}
    for path in sorted(out.glob(f"{stem}-*.json")):
        for name, value in json.loads(path.read_text()).items():
            values.setdefault(name, []).append(value)
    return values


def spread(values: list[float]) -> str:
    """Mean and standard deviation, in percent."""
    mean = f"{statistics.mean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.1f}"


if __name__ == "__main__":
    main()
