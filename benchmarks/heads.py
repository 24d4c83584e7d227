"""How far does a head on frozen features get? Kinds of heads, fitted to the same photos, judged by the same others.

    python -m benchmarks.heads tiny data --sets clothing10/test caltech99/val --out benchmarks/results/heads_tiny_X.md

Each set has `train` beside the part that judges. Views are made once: the photo, its mirror image, and crops of 40 to
100 % of it, at random mirrored. Linear heads are those of `mixmim head` (penalty and temperature chosen on held-out
train photos); the two networks hold out the same photos and stop at the epoch that is best for them.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from benchmarks.provenance import about, heading
from mixmim_serve.cli.common import bundle_path
from mixmim_serve.config import Preprocessing
from mixmim_serve.engines import Engine, open_engine
from mixmim_serve.files import atomic_path
from mixmim_serve.fitting.linear import best_temperature, fit_linear, folds
from mixmim_serve.fitting.photos import Photos, numbered
from mixmim_serve.fitting.quality import log_loss, quality
from mixmim_serve.preprocess import Pixels, decode, resize_and_crop
from mixmim_serve.sources import open_source

Floats = NDArray[np.float32]
Views = dict[
    str, Floats
]  # by output: embedding and mean of stage3 (images, views, D), stage4 (images, views, D, places)
CROPS = 6
BATCH = 32
EPOCHS, LR = 60, 1e-3  # of the two networks, AdamW


@dataclass(frozen=True)
class Set:
    """Views of the photos to fit to, of the photos to judge by, and their labels."""

    name: str
    known: Views
    labels: NDArray[np.int64]
    queries: Views
    truth: NDArray[np.int64]
    classes: int


Logits = Callable[[Set], NDArray[Any]]  # of the queries


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, help="a bundle folder, or tiny")
    parser.add_argument("data", type=Path)
    parser.add_argument("--sets", nargs="+", default=["clothing10/test", "caltech99/val"])
    parser.add_argument("--out", type=Path, required=True, help="the Markdown file to write, after each set anew")
    arguments = parser.parse_args()
    engine = open_engine(bundle_path(arguments.bundle), "onnx", "fp32")
    title = f"Heads on frozen features of {engine.bundle.name}, {engine.bundle.fingerprint[:8]}"
    lines = heading(title, about("heads", None, ("torch", "onnxruntime", "scikit-learn")))
    for name in arguments.sets:
        lines += ["", *rows(open_set(engine, arguments.data, name))]
        with atomic_path(arguments.out) as path:
            path.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def rows(photos: Set) -> Iterator[str]:
    """The lines of a table: what each kind of head gets."""
    yield f"{photos.name}: {len(photos.labels):,} photos to fit to, {len(photos.truth):,} to judge by."
    yield ""
    yield "| head | top-1, % | top-5, % | ECE, % | seconds to fit |"
    yield "|---|---|---|---|---|"
    for name, kind in KINDS.items():
        began = time.perf_counter()
        logits = kind(photos)
        seconds = time.perf_counter() - began
        found = quality(logits, photos.truth)
        top5 = f"{found['top5']:.1f}" if "top5" in found else ""
        yield f"| {name} | {found['top1']:.1f} | {top5} | {found['ece']:.1f} | {seconds:.0f} |"
        print(photos.name, name, {key: round(value, 2) for key, value in found.items()}, flush=True)


# Features


def open_set(engine: Engine, data: Path, name: str) -> Set:
    """Run the engine over all views of a set."""
    folder, _, judge = name.partition("/")
    train = numbered(open_source(str(data / folder / "train")))
    other = numbered(open_source(str(data / folder / judge)), train.classes)
    known, queries = views_of(engine, train, 2 + CROPS), views_of(engine, other, 2)
    return Set(name, known, train.labels, queries, other.labels, len(train.classes))


def views_of(engine: Engine, photos: Photos, views: int) -> Views:
    """The outputs for so many views of every photo; an unreadable one ends the benchmark."""
    preprocessing = engine.bundle.description.preprocessing
    with ThreadPoolExecutor(2) as pool:
        images = pool.map(
            lambda index: cut(photos.source.read(index), preprocessing, views, index), range(len(photos.labels))
        )
        batches = [run(engine, np.concatenate(group)) for group in _groups(images, max(1, BATCH // views))]
    joined = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
    return {name: array.reshape(len(photos.labels), views, *array.shape[1:]) for name, array in joined.items()}


def run(engine: Engine, pixels: Pixels) -> dict[str, Floats]:
    """Outputs of the encoder: of stage 3 the mean over places, of stage 4 all places, in one dimension."""
    outputs = engine.run("encoder", {"pixels": pixels}, ["embedding", "stage3", "stage4"])
    stage4 = outputs["stage4"].reshape(*outputs["stage4"].shape[:2], -1)
    return {"embedding": outputs["embedding"], "stage3": outputs["stage3"].mean(axis=(2, 3)), "stage4": stage4}


def cut(data: bytes, preprocessing: Preprocessing, views: int, seed: int) -> Pixels:
    """Views of one photo, (views, size, size, 3)."""
    image = decode(data)
    whole = resize_and_crop(image, preprocessing)
    generator, size = np.random.default_rng(seed), preprocessing.image_size
    crops = []
    for _ in range(views - 2):
        share = np.sqrt(generator.uniform(0.4, 1))
        width, height = (max(1, round(share * side)) for side in image.size)
        left, top = generator.integers(image.width - width + 1), generator.integers(image.height - height + 1)
        part = image.crop((int(left), int(top), int(left) + width, int(top) + height))
        pixels = np.asarray(part.resize((size, size), Image.Resampling.BICUBIC))
        crops.append(pixels[:, ::-1] if generator.random() < 0.5 else pixels)
    return np.ascontiguousarray(np.stack([whole, whole[:, ::-1], *crops]))


def _groups(items: Iterator[Pixels], size: int) -> Iterator[list[Pixels]]:
    group: list[Pixels] = []
    for item in items:
        group.append(item)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def read(views: Views, inputs: Sequence[str]) -> Floats:
    """One vector per view, (images, views, F): `stage4` is a mean over places, `stage4 max` and `stage4 std` others."""
    pools = {"": np.mean, "max": np.max, "std": np.std}
    vectors = []
    for name in inputs:
        output, _, pool = name.partition(" ")
        vectors.append(pools[pool](views[output], axis=-1) if output == "stage4" else views[output])
    return np.concatenate(vectors, axis=-1).astype(np.float32)


# Kinds of heads


def linear(views: int, *inputs: str, averaged: bool = False) -> Logits:
    """The head of `mixmim head`; `averaged` over photo and mirror image also when it is used."""

    def logits(photos: Set) -> NDArray[Any]:
        fit = fit_linear(read(photos.known, inputs)[:, :views], photos.labels, photos.classes)
        found = read(photos.queries, inputs) @ fit.weight.T + fit.bias
        return found.mean(axis=1) if averaged else found[:, 0]

    return logits


def mlp(views: int, hidden: int) -> Logits:
    """A network with one hidden layer on the embedding."""

    def logits(photos: Set) -> NDArray[Any]:
        known = torch.from_numpy(read(photos.known, ["embedding"])[:, :views].copy())
        queries = torch.from_numpy(read(photos.queries, ["embedding"])[:, 0].copy())
        mean, std = known.mean(dim=(0, 1)), known.std(dim=(0, 1))
        size = known.shape[-1]

        def make() -> nn.Module:
            return nn.Sequential(nn.Linear(size, hidden), nn.GELU(), nn.Dropout(0.5), nn.Linear(hidden, photos.classes))

        return trained(make, (known - mean) / std, photos, (queries - mean) / std)

    return logits


class Attentive(nn.Module):
    """A learned query attends to all places of stage 4; a linear layer follows."""

    def __init__(self, size: int, classes: int, heads: int = 8) -> None:
        super().__init__()
        self.norm, self.query = nn.LayerNorm(size), nn.Parameter(torch.randn(1, 1, size) * 0.02)
        self.attention = nn.MultiheadAttention(size, heads, dropout=0.1, batch_first=True)
        self.head = nn.Sequential(nn.LayerNorm(size), nn.Dropout(0.3), nn.Linear(size, classes))

    def forward(self, features_BDN: Tensor) -> Tensor:
        """(B, D, places) to logits (B, classes)."""
        places_BND = self.norm(features_BDN.transpose(1, 2))
        found_B1D, _ = self.attention(self.query.expand(len(places_BND), -1, -1), places_BND, places_BND)
        logits_BC: Tensor = self.head(found_B1D[:, 0])
        return logits_BC


def attentive(views: int) -> Logits:
    """Attentive pooling over stage 4."""

    def logits(photos: Set) -> NDArray[Any]:
        known = torch.from_numpy(photos.known["stage4"][:, :views].copy())
        queries = torch.from_numpy(photos.queries["stage4"][:, 0].copy())
        return trained(lambda: Attentive(known.shape[2], photos.classes), known, photos, queries)

    return logits


def trained(make: Callable[[], nn.Module], known: Tensor, photos: Set, queries: Tensor) -> NDArray[Any]:
    """Train on views (images, views, ...), take the epoch and temperature that held-out photos choose."""
    labels = torch.from_numpy(photos.labels)
    kept, held = (torch.from_numpy(rows) for rows in folds(photos.labels)[0])
    torch.manual_seed(0)
    model, best = make(), (np.inf, 0, 1.0)
    for epoch, _ in enumerate(epochs(model, known[kept], labels[kept]), start=1):
        with torch.inference_mode():
            found = model.eval()(known[held, 0]).numpy()
        loss = log_loss(found, photos.labels[held.numpy()])
        if loss < best[0]:
            best = loss, epoch, best_temperature(found, photos.labels[held.numpy()])
    torch.manual_seed(0)
    model = make()
    for epoch, _ in enumerate(epochs(model, known, labels), start=1):
        if epoch == best[1]:
            break
    with torch.inference_mode():
        return np.asarray(model.eval()(queries).numpy() / best[2])


def epochs(model: nn.Module, known: Tensor, labels: Tensor) -> Iterator[None]:
    """Train for `EPOCHS` of one random view of every photo."""
    optimiser = torch.optim.AdamW(model.parameters(), LR, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, LR, total_steps=EPOCHS * -(-len(labels) // 128))
    for _ in range(EPOCHS):
        model.train()
        view = torch.randint(known.shape[1], (len(labels),))
        for rows in torch.randperm(len(labels)).split(128):
            optimiser.zero_grad()
            F.cross_entropy(model(known[rows, view[rows]]), labels[rows]).backward()
            optimiser.step()
            schedule.step()
        yield


KINDS: Mapping[str, Logits] = {
    "linear on the embedding": linear(1, "embedding"),
    "... fitted to mirror images too": linear(2, "embedding"),
    "... and to six crops": linear(2 + CROPS, "embedding"),
    "... mirror images, averaged in use (twice the work)": linear(2, "embedding", averaged=True),
    "linear on the means of stages 3 and 4, mirror images": linear(2, "stage3", "stage4"),
    "linear on embedding and mean of stage 3, mirror images": linear(2, "embedding", "stage3"),
    "linear on embedding, maximum and deviation of stage 4, mirror images": linear(
        2, "embedding", "stage4 max", "stage4 std"
    ),
    "one hidden layer of 512 on the embedding, six crops": mlp(2 + CROPS, 512),
    "attentive pooling over stage 4, six crops": attentive(2 + CROPS),
}


if __name__ == "__main__":
    main()
