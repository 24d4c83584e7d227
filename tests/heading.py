"""What the tests of named heads share: heads with random weights, and bundles that have them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mixmim_serve.bundle import Bundle, open_bundle
from mixmim_serve.heads import Head, Heads, input_size, read_heads, write_heads

COLOURS = ("blue", "green", "red", "yellow")
SHAPES = ("circle", "square")
ACCURACY = {"top1": 61.25, "ece": 2.5, "images": 80, "judged_on": "80 validation photos"}


def random_head(
    bundle: Bundle, name: str, classes: Sequence[str], seed: int = 0, inputs: Sequence[str] = ("embedding",)
) -> Head:
    """A head with random weights, and an accuracy that was never measured."""
    generator = np.random.default_rng(seed)
    shape = (len(classes), input_size(bundle.arch, inputs))
    weight, bias = (generator.normal(size=size).astype(np.float32) for size in (shape, shape[:1]))
    about = {"accuracy": dict(ACCURACY), "provenance": {"made_by": "tests"}}
    return Head(name, tuple(classes), tuple(inputs), about, weight, bias)


def with_named_heads(folder: Path, default: str = "") -> Bundle:
    """Give a bundle the heads `colours`, and `shapes`, which reads a stage too."""
    bundle = open_bundle(folder)
    heads = read_heads(bundle).plus(random_head(bundle, "colours", COLOURS, 1))
    heads = heads.plus(random_head(bundle, "shapes", SHAPES, 2, ("embedding", "stage3")))
    return write_heads(bundle, Heads(heads.by_name, default or heads.default))


def softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Probabilities, computed in another way than the code under test."""
    powers = np.exp(logits.astype(np.float64))
    return powers / powers.sum()
