"""The bet: does predicting features besides pixels give better ones, at an equal budget?

    python -m benchmarks.bet photos data --out runs/bet --epochs 25 --seeds 0 1 2
    python -m benchmarks.bet photos data --out runs/bet --cost          # only measures what a photo costs

`tiny-cpu` with and without predicted features and matched embeddings (`training/feature_targets.py`), the same photos,
order and masks. They cost time, so pixels alone also get as many epochs as cost what pixels and features cost: seconds
of all cores per image are measured once, taking turns, and kept in OUT/cost.json. Frozen features are judged by 10
nearest neighbours on the val and test parts of clothing10 and on caltech99's val, with their train parts as neighbours.
Where there is an average of weights, it is judged beside the trained ones. `--set` changes the variants beyond pixels,
`--all` every one, `--only` takes some of the variants. Finished runs are skipped, interrupted ones resume;
OUT/results.md and OUT/results.json are rewritten after each.
"""

from __future__ import annotations

import benchmarks.sleeping  # noqa: F401

# isort: split
import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.cost import epochs_at_equal_cost
from benchmarks.learning import record
from benchmarks.runs import average_of, figures, folder_of, frozen, parser, trained, write_table
from mixmim_serve.settings import override
from mixmim_serve.sources import Source, open_source
from training.config import PretrainConfig
from training.pretraining import Pretraining
from training.recipes import tiny_cpu

LONGER = "pixels, equal cost"
VARIANTS: dict[str, dict[str, Any]] = {
    "pixels": {},
    LONGER: {},
    "pixels and features": {"feature_weight": 1.0},
    "pixels and features by batch": {"feature_weight": 1.0, "feature_norm": "batch"},
    "features": {"feature_weight": 1.0, "pixel_weight": 0.0},
    "pixels and embeddings": {"embedding_weight": 1.0},
    "pixels and embeddings of one crop": {"embedding_weight": 1.0, "embedding_crops": 1},
    "all three": {"feature_weight": 1.0, "embedding_weight": 1.0, "embedding_crops": 1},
}
OVER = "pixels and features"  # the variant at whose cost pixels alone get more epochs


def main() -> None:
    """Run what is missing, then write the table."""
    options = parser(__doc__, VARIANTS, epochs=25)
    options.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="for the variants with features")
    options.add_argument("--all", nargs="+", default=[], metavar="KEY=VALUE", help="for every variant")
    options.add_argument("--cost", action="store_true", help="only measure what a photo costs with each variant")
    arguments = options.parse_args()
    source = open_source(arguments.images)
    if arguments.cost:
        longer(arguments.out, source, arguments.epochs, arguments.all)
        return
    for seed in arguments.seeds or [0]:
        for name in arguments.only:
            epochs = arguments.epochs
            if name == LONGER:
                epochs = longer(arguments.out, source, epochs, arguments.all)
            run = folder_of(arguments.out, name, seed)
            config = configuration(name, epochs, seed, arguments.set, arguments.all)
            trained(Pretraining(config, source), source, run)
            record(run / "judged.json", judge, run, arguments.data)
            write_table(arguments.out, VARIANTS)


def configuration(
    name: str, epochs: int, seed: int, settings: Sequence[str] = (), of_all: Sequence[str] = ()
) -> PretrainConfig:
    """The recipe as a variant changes it; `settings` change those beyond pixels, `of_all` every one."""
    changes = VARIANTS[name] | {"seed": seed, "keep_every": 1000}
    config = override(dataclasses.replace(tiny_cpu().with_epochs(epochs), **changes), of_all)
    return override(config, settings) if config.beyond_pixels else config


def longer(out: Path, source: Source, epochs: int, of_all: Sequence[str]) -> int:
    """Epochs of pixels alone at the cost of so many of `OVER`."""
    tasks = {name: functools.partial(task_to_measure, name, of_all) for name in VARIANTS if name != LONGER}
    return epochs_at_equal_cost(out / "cost.json", tasks, dict.fromkeys(tasks, source), OVER, epochs)["pixels"]


def task_to_measure(name: str, of_all: Sequence[str]) -> Pretraining:
    """A variant for `benchmarks/cost.py`."""
    return Pretraining(dataclasses.replace(configuration(name, 1, 0, of_all=of_all), workers=0), None)


def judge(run: Path, data: Path) -> dict[str, float]:
    """Top-1 in percent of the trained weights and of their average, and figures of the log."""
    measured = frozen(run / "final.safetensors", data)
    if average := average_of(run):
        measured |= {f"{name}, average": value for name, value in frozen(average, data).items()}
    return measured | figures(run)


if __name__ == "__main__":
    main()
