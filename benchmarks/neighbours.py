"""What else one could have done with the same hour: MixMIM's neighbours on the same network, photos and budget.

    python -m benchmarks.neighbours photos data --out runs/neighbours --epochs 25 --seeds 0 1 2

mixmim       the recipe `tiny-cpu`, with so many epochs
simmim       mask tokens instead of the other photo, one reconstruction (arXiv 2111.09886)
simclr       two crops of a photo, told from all others of the batch (arXiv 2002.05709)
supervised   classification on the labels of all sets under DATA together: their train parts are the photos of `mixmim`
untrained    the network as it is initialised

All have the recipe's batch, schedule, rate and augmentation (crops and flips), and as many epochs as cost what those of
`mixmim` cost: seconds of all cores per image are measured once, taking turns, and kept in OUT/cost.json. SimCLR stands
for joint-embedding methods: it needs no second network and no centring, and a loss on a batch of 128 pairs is in the
range in which temperature 0.2 to 0.5 works; DINO's small crops and its schedules are made for hundreds of epochs. With
crops alone it lacks the colour distortion that its paper finds important: that is the equal augmentation.

Judged by frozen features (k-NN with k = 10, linear probe, 5-shot) and fine-tuning, on clothing10's test and caltech99's
val part. Finished runs are skipped, interrupted ones resume; OUT/results.md and OUT/results.json are rewritten after
each.
"""

from __future__ import annotations

import benchmarks.sleeping  # noqa: F401

# isort: split
import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.ablation import VARIANTS as ABLATION
from benchmarks.cost import epochs_at_equal_cost
from benchmarks.learning import SETS, record
from benchmarks.runs import figures, folder_of, frozen, parser, trained, tuned_all, write_table
from mixmim_serve.description import Description
from mixmim_serve.files import atomic_path
from mixmim_serve.model import Encoder
from mixmim_serve.model.checkpoint import save_checkpoint
from mixmim_serve.sources import open_source
from training.config import AugmentConfig, FinetuneConfig, PretrainConfig
from training.data import Batch
from training.evaluation.labelled import Labelled
from training.evaluation.probe import untrained
from training.feature_targets import PROJECTED, same_photo, two_layers
from training.finetuning import Finetuning
from training.pretraining import Pretraining
from training.recipes import tiny_cpu
from training.task import Objective, Task

NAMES = ("mixmim", "simmim", "simclr", "supervised", "untrained")


class ContrastiveObjective(Objective):
    """Which of the other crops of a batch shows the same photo?"""

    crops = 2

    def __init__(self, model: Encoder) -> None:
        super().__init__()
        self.model = model
        size = model.arch.embedding_size
        self.projection = two_layers(size, size, PROJECTED)

    def forward(self, pixels_2BCHW: Tensor) -> Tensor:
        """The loss, a scalar, for the first crops of all photos and then the second."""
        return same_photo(self.projection(self.model(pixels_2BCHW).embedding_BD))


class Contrastive(Pretraining):
    """SimCLR on the encoder of the recipe's network."""

    name = "simclr"

    def __init__(self, config: PretrainConfig) -> None:
        super().__init__(config, None)
        torch.manual_seed(config.seed)
        self.arch = dataclasses.replace(self.arch, decoder=None)
        self.objective = ContrastiveObjective(Encoder(self.arch))

    def inputs(self, batch: Batch, mask_seed: int, seed: int) -> tuple[Tensor, ...]:
        """Normalised crops (2B, 3, size, size), the first of all photos, then the second."""
        return (torch.cat(self.normalize(batch.pixels_on(self.device)).chunk(2, dim=2)),)


def main() -> None:
    """Run what is missing, then write the table."""
    options = parser(__doc__, NAMES, epochs=25)
    options.add_argument("--tune", type=int, default=10, help="epochs of fine-tuning; 0 for none")
    arguments = options.parse_args()
    photos, labelled = open_source(arguments.images), all_labels(arguments.data, arguments.out)
    sources = dict.fromkeys(NAMES, photos) | {"supervised": labelled.source}
    trainable = [name for name in NAMES if name != "untrained"]
    tasks = {name: maker(name, labelled) for name in trainable}
    epochs = epochs_at_equal_cost(arguments.out / "cost.json", tasks, sources, "mixmim", arguments.epochs)
    for seed in arguments.seeds or [0]:
        for name in arguments.only:
            run = folder_of(arguments.out, name, seed)
            if name == "untrained":
                save_untrained(run / "final.safetensors", seed)
            else:
                trained(task_of(name, epochs[name], seed, labelled), sources[name], run)
            record(run / "judged.json", judge, run, arguments.data, arguments.tune, seed)
            write_table(arguments.out, NAMES, "trained as")


def maker(name: str, labelled: Labelled) -> Callable[[], Task]:
    """What builds the task of one epoch to measure its cost."""
    return lambda: task_of(name, 1, 0, labelled, workers=0)


def task_of(name: str, epochs: int, seed: int, labelled: Labelled, workers: int = 1) -> Task:
    """A neighbour as a task of the trainer."""
    config = dataclasses.replace(tiny_cpu().with_epochs(epochs), seed=seed, keep_every=1000, workers=workers)
    if name == "simclr":
        return Contrastive(config)
    if name == "simmim":
        variant = ABLATION["mask tokens for mixing"]
        return variant.task(dataclasses.replace(config, attention=variant.attention), None)
    if name == "supervised":
        return Finetuning(supervised(config), labelled.classes, None, None)
    return Pretraining(config, None)


def supervised(config: PretrainConfig) -> FinetuneConfig:
    """Classification from random weights with what the recipe of pretraining sets: schedule, rate, crops and flips."""
    common = {field.name: getattr(config, field.name) for field in dataclasses.fields(FinetuneConfig)
              if hasattr(config, field.name)}  # fmt: skip
    augment = AugmentConfig(rand_augment_ops=0, erase=0.0, mixup=0.0, cutmix=0.0)
    return FinetuneConfig(**common, layer_decay=1.0, drop_path=0.05, augment=augment)


def all_labels(data: Path, out: Path) -> Labelled:
    """The train parts of all sets under DATA, classes named SET/CLASS, as one source: the list OUT/labelled.txt."""
    lines = []
    for folder in sorted(path for path in data.iterdir() if (path / "train").is_dir()):
        source = open_source(folder / "train")
        pairs = zip(source.keys, source.labels or (), strict=True)
        lines += [f"{(folder / 'train' / key).resolve()}\t{folder.name}/{label}" for key, label in pairs]
    path = out / "labelled.txt"
    with atomic_path(path) as temporary:
        temporary.write_text("\n".join(lines) + "\n")
    return Labelled.from_source(open_source(path))


def save_untrained(path: Path, seed: int) -> None:
    """A checkpoint of random weights."""
    model, description = untrained("tiny", seed)
    plain = Description(dataclasses.replace(description.arch, decoder=None), description.preprocessing)
    save_checkpoint(path, model.state_dict(), plain)


def judge(run: Path, data: Path, epochs: int, seed: int) -> dict[str, float]:
    """Top-1 in percent of frozen features and after fine-tuning, and figures of the log."""
    final = run / "final.safetensors"
    measured = frozen(final, data, SETS, knn_only=False) | tuned_all(final, data, SETS, run, epochs, seed)
    return measured | (figures(run) if (run / "metrics.jsonl").exists() else {})


if __name__ == "__main__":
    main()
