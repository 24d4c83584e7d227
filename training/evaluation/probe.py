"""`mixmim probe`: k-NN and linear-probe accuracy of frozen features; the probe can become a checkpoint's head."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mixmim_serve.config import Preprocessing, architecture
from mixmim_serve.description import Description
from mixmim_serve.model import Encoder
from mixmim_serve.model.checkpoint import save_checkpoint
from mixmim_serve.version import __version__
from training.distributed import World
from training.evaluation.confusion import Accuracy, accuracy
from training.evaluation.embed import OnImages, run_network
from training.evaluation.knn import NEIGHBOURS, knn_accuracy
from training.evaluation.labelled import Labelled
from training.evaluation.linear import LinearProbe, ProbeConfig, linear_probe
from training.start import Start


@dataclass(frozen=True)
class ProbeResult:
    """Accuracies of frozen features on one labelled set."""

    neighbours: dict[int, Accuracy]  # by k
    linear: Accuracy
    head: LinearProbe
    unreadable: tuple[str, ...]  # one sentence per image

    def to_dict(self) -> dict[str, Any]:
        """JSON values, accuracies in percent."""
        return {
            "knn": {f"k={k}": _rounded(result) for k, result in self.neighbours.items()},
            "linear": _rounded(self.linear) | {"lr": self.head.lr, "sweep": _sweep(self.head)},
            "unreadable": list(self.unreadable),
        }


def probe(
    model: Encoder,
    description: Description,
    train: Labelled,
    val: Labelled,
    world: World,
    *,
    seed: int = 0,
    workers: int = 0,
    progress: OnImages = lambda _: None,
) -> ProbeResult:
    """Embed both parts once, then score them. `val` never takes part in choosing the probe's learning rate."""
    model = model.to(world.device).eval()
    reference, queries = (
        run_network(model, part.source, description.preprocessing, world, workers=workers, progress=progress)
        for part in (train, val)
    )
    labels_N, labels_M, classes = train.labels_of(reference), val.labels_of(queries), len(train.classes)
    neighbours = knn_accuracy(reference.values_NX, labels_N, queries.values_NX, labels_M, classes, ks=NEIGHBOURS)
    head = linear_probe(reference.values_NX, labels_N, classes, ProbeConfig(seed=seed))
    linear = accuracy(head.scores(queries.values_NX), labels_M)
    return ProbeResult(neighbours, linear, head, reference.unreadable + queries.unreadable)


def untrained(size: str, seed: int) -> tuple[Encoder, Description]:
    """A named network with random weights, as a baseline."""
    torch.manual_seed(seed)
    arch = architecture(size, with_decoder=False)
    return Encoder(arch), Description(arch, Preprocessing.evaluation(arch.image_size))


def save_with_head(path: Path, start: Start, classes: tuple[str, ...], result: ProbeResult) -> None:
    """Write the checkpoint with the probe as its head; encoder and decoder are unchanged, so every task still works."""
    arch = dataclasses.replace(start.description.arch, num_classes=len(classes))
    weights = {name: weight for name, weight in start.weights.items() if not name.startswith("head.")}
    weights |= {"head.weight": result.head.weight_CD, "head.bias": result.head.bias_C}
    head = {"made_by": f"mixmim-serve {__version__}, linear probe", "lr": result.head.lr, "top1": result.linear.top1}
    provenance = dict(start.description.provenance) | {"head": head}
    save_checkpoint(path, weights, Description(arch, start.description.preprocessing, classes, provenance))


def _rounded(result: Accuracy) -> dict[str, float]:
    return {name: round(value, 2) for name, value in dataclasses.asdict(result).items()}


def _sweep(head: LinearProbe) -> dict[str, float]:
    """Top-1 on the held-out training images by learning rate."""
    return {f"{lr:g}": round(top1, 2) for lr, top1 in head.sweep}
