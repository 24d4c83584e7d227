"""Is it worth going on from a model? A set that `tiny` has not seen: from scratch, from `tiny`, and `tiny` as it is.

    python -m benchmarks.going_on DATA --out runs/going-on

DATA has folders `train` and `test` with one folder per class, such as grocery's; labels are used for evaluation alone.
Ten epochs of pretraining on the train photos from scratch (recipe tiny-cpu) and from `tiny` (tiny-continue-cpu), three
seeds each; then k-NN and a linear probe on the test photos with the train photos as reference. Finished runs are kept
in OUT, interrupted ones are continued by the same command; OUT/results.md is written after each.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from rich.console import Console

from benchmarks.learning import ALONE, BUNDLES, collect, record, spread
from mixmim_serve.files import atomic_path
from mixmim_serve.sources import open_source
from training.config import PretrainConfig
from training.evaluation.labelled import Labelled
from training.evaluation.probe import probe, untrained
from training.fit_to_data import fit
from training.pretraining import Pretraining
from training.recipes import tiny_continue_cpu, tiny_cpu
from training.start import Start, read_start
from training.trainer import train

NAMES = {"untrained": "untrained", "scratch": "from scratch", "continued": "from the model", "model": "as it is"}


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="a folder with train and test")
    parser.add_argument("--start", type=Path, default=BUNDLES / "tiny", help="a checkpoint or bundle")
    parser.add_argument("--size", default="tiny", help="of the network from scratch")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--image-size", type=int, default=0, help="pixels; 0: the network's own")
    options = parser.parse_args()
    start = read_start(options.start)
    train_part = Labelled.from_source(open_source(options.data / "train"))
    parts = train_part, Labelled.from_source(open_source(options.data / "test"), train_part.classes)
    record(options.out / "model-0.json", judged, start, 0, parts, options)
    for seed in options.seeds:
        record(options.out / f"untrained-{seed}.json", judged, None, seed, parts, options)
        for name, origin in (("scratch", None), ("continued", start)):
            run = options.out / f"{name}-{seed}"
            record(run.with_suffix(".json"), trained, origin, run, seed, parts, options)
        write_table(options.out, options.data.name)
    print((options.out / "results.md").read_text())


def judged(
    start: Start | None, seed: int, parts: tuple[Labelled, Labelled], options: argparse.Namespace
) -> dict[str, float]:
    """Top-1 of k-NN and a linear probe on frozen features, in percent."""
    model, description = (start.model(), start.description) if start else untrained(options.size, seed)
    result = probe(model, description, *parts, ALONE)
    neighbours = {f"k-NN, k = {k}": accuracy.top1 for k, accuracy in result.neighbours.items()}
    return neighbours | {"linear probe": result.linear.top1}


def trained(
    origin: Start | None, run: Path, seed: int, parts: tuple[Labelled, Labelled], options: argparse.Namespace
) -> dict[str, float]:
    """The same after pretraining on the train photos."""
    source = parts[0].source
    task = Pretraining(settings(origin, seed, len(source.keys), source.name, options), source, start=origin)
    console = Console(stderr=True, log_path=False)
    final = train(task, source, run, console, resume=(run / "config.json").exists())
    if final is None:
        raise SystemExit("stopped; the same command resumes")
    return judged(read_start(final), seed, parts, options)


def settings(origin: Start | None, seed: int, images: int, name: str, options: argparse.Namespace) -> PretrainConfig:
    """The recipe that `mixmim pretrain` would take, with the batch that it would choose for so few images."""
    recipe = (tiny_continue_cpu() if origin else tiny_cpu()).with_epochs(options.epochs)
    size = {} if origin else {"size": options.size}
    config = dataclasses.replace(recipe, seed=seed, image_size=options.image_size, **size)
    return fit(config, name, images, {"epochs"})[0]


def write_table(out: Path, name: str) -> None:
    """One row for each measure: mean and deviation over the seeds."""
    values = {kind: collect(out, kind) for kind in NAMES}
    lines = [f"| {name} test | {' | '.join(NAMES.values())} |", "|---" * (len(NAMES) + 1) + "|"]
    for measure in values["model"]:
        cells = (spread(values[kind][measure]) if measure in values[kind] else "" for kind in NAMES)
        lines.append(f"| {measure} | {' | '.join(cells)} |")
    with atomic_path(out / "results.md") as path:
        path.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
