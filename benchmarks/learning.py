"""The proof that it learns: a pretrained backbone against the same network untrained and trained from scratch.

    python benchmarks/learning.py data --start tiny --out runs/learning

DATA holds clothing10 (train, val, test) and caltech99 (train, val). Judged are clothing10's test and caltech99's val
photos, which no training saw. Frozen features (k-NN, linear probe) are compared with those of three untrained
networks; fine-tuning with training from scratch, the same recipe and number of epochs, three seeds each. From scratch
there is no layer decay, which would keep the first layers untrained, and twice the warm-up; of its peak rates 5e-4,
1e-3 and 2e-3 the best on clothing10's val photos is the recipe's own. What is finished is passed over, so that the
command can be given again after an interruption; the table is written to OUT/results.md.
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
ALONE = World(0, 1, torch.device("cpu"))


@dataclass(frozen=True)
class Photos:
    """A data set: what is learned from, and what is judged."""

    name: str
    judged: str  # folder beside `train`

    def open(self, data: Path) -> tuple[Labelled, Labelled]:
        """Both parts."""
        known = Labelled.of(open_source(data / self.name / "train"))
        return known, Labelled.of(open_source(data / self.name / self.judged), known.classes)


SETS = (Photos("clothing10", "test"), Photos("caltech99", "val"))


def main() -> None:
    """Run what is missing, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--start", type=Path, default=BUNDLES / "tiny", help="a checkpoint or bundle of size tiny")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=10, help="of fine-tuning")
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
    """All that is not measured yet for one data set."""
    known, judged = photos.open(data)
    record(out / f"{photos.name}-frozen-pretrained-0.json", frozen, start, 0, known, judged)
    for seed in seeds:
        record(out / f"{photos.name}-frozen-untrained-{seed}.json", frozen, None, seed, known, judged)
    for seed in seeds:
        for name, origin in (("pretrained", start), ("scratch", None)):
            run = out / f"{photos.name}-tuned-{name}-{seed}"
            record(run.with_suffix(".json"), tuned, origin, known, judged, run, epochs, seed)


def record(path: Path, work: Callable[..., dict[str, float]], *arguments: Any) -> None:
    """Do the work unless its result is there."""
    if not path.exists():
        found = work(*arguments)
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(found, indent=2) + "\n")
        print(path.stem, found, flush=True)


def frozen(origin: Start | None, seed: int, known: Labelled, judged: Labelled) -> dict[str, float]:
    """Top-1 of k-NN and linear probe, in percent."""
    model, description = (origin.model(), origin.description) if origin else untrained("tiny", seed)
    found = probe(model, description, known, judged, ALONE)
    return {f"k-NN, k = {k}": each.top1 for k, each in found.neighbours.items()} | {"linear probe": found.linear.top1}


def tuned(
    origin: Start | None, known: Labelled, judged: Labelled, run: Path, epochs: int, seed: int
) -> dict[str, float]:
    """Top-1 and top-5 after fine-tuning, or after as many epochs from scratch, in percent."""
    final = train(
        Finetuning(settings(origin, epochs, seed), known.classes, origin, None), known.source, run,
        Console(stderr=True, log_path=False), resume=(run / "config.json").exists(),
    )  # fmt: skip
    if final is None:
        raise SystemExit("ended; the same command goes on")
    found = evaluate(read_start(final), judged.source, ALONE).accuracy
    return {"fine-tuned": found.top1, "fine-tuned, top-5": found.top5}


def settings(origin: Start | None, epochs: int, seed: int) -> FinetuneConfig:
    """The recipe, shortened; from scratch every layer learns at the full rate, after a longer warm-up."""
    config = replace(tiny_finetune_cpu().with_epochs(epochs), seed=seed)
    return config if origin else replace(config, size="tiny", layer_decay=1.0, warmup_epochs=0.2 * epochs)


def rows(out: Path) -> Iterator[str]:
    """A Markdown table: mean and deviation over the seeds."""
    yield "| judged on | by | MixMIM | without | gain |"
    yield "|---|---|---|---|---|"
    for photos in SETS:
        for kind, other in (("frozen", "untrained"), ("tuned", "scratch")):
            ours, theirs = (collect(out, f"{photos.name}-{kind}-{name}") for name in ("pretrained", other))
            for measure_name in ours:
                one, two = ours[measure_name], theirs.get(measure_name, [])
                if one and two:
                    gain = statistics.mean(one) - statistics.mean(two)
                    yield (
                        f"| {photos.name} {photos.judged} | {measure_name} | {spread(one)} | {spread(two)} ({other}) | "
                        f"{gain:+.1f} |"
                    )


def collect(out: Path, stem: str) -> dict[str, list[float]]:
    """Values of all seeds by measure."""
    found: dict[str, list[float]] = {}
    for path in sorted(out.glob(f"{stem}-*.json")):
        for name, value in json.loads(path.read_text()).items():
            found.setdefault(name, []).append(value)
    return found


def spread(values: list[float]) -> str:
    """Mean and deviation, in percent."""
    mean = f"{statistics.mean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.1f}"


if __name__ == "__main__":
    main()
