"""Tasks on an engine: classification, reconstruction, scoring. Shared by the service and the command line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixmim_serve.bundle import Bundle
from mixmim_serve.config import TARGET_EPS, UNIT_SIZE, units_from_partner
from mixmim_serve.engines import Engine
from mixmim_serve.engines.base import largest_batch
from mixmim_serve.errors import BundleError
from mixmim_serve.heads import Head
from mixmim_serve.preprocess import Pixels, normalize

Floats = NDArray[np.float32]

RECONSTRUCT_OUTPUTS = ("mixed", "reconstruction_a", "reconstruction_b")


@dataclass(frozen=True)
class Class:
    """One predicted class."""

    index: int
    label: str
    probability: float


def require_decoder(bundle: Bundle) -> None:
    """Check that the bundle can reconstruct.

    Raises:
        BundleError: when it cannot.
    """
    if "reconstruct" not in bundle.graphs:
        raise BundleError("this model has no decoder: only pretraining checkpoints can reconstruct images.")


def top_classes(head: Head, logits: Floats, count: int = 5) -> list[Class]:
    """The most probable classes of one image, best first; `logits` is (classes,), those of the head."""
    likelihood = probabilities(logits)
    order = np.argsort(-likelihood, kind="stable")[:count]
    return [Class(int(index), head.classes[index], float(likelihood[index])) for index in order]


def probabilities(logits: Floats) -> NDArray[np.float64]:
    """Softmax over the last dimension."""
    exponents = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True))
    return np.asarray(exponents / exponents.sum(axis=-1, keepdims=True))


def random_mask(units: int, ratio: float = 0.5, seed: int = 0) -> NDArray[np.bool_]:
    """Mask (units,), True for the `int(units * ratio)` units that come from the partner; a function of the seed.

    Raises:
        ConfigError: when that is no unit, or all of them.
    """
    count = units_from_partner(units, ratio)
    mask = np.zeros(units, np.bool_)
    mask[np.random.default_rng(seed).permutation(units)[:count]] = True
    return mask


def scoring_masks(units: int, count: int) -> NDArray[np.bool_]:
    """Masks (2 * count, units) of seeds 0, 1, ..., each followed by its complement, so that all units count equally."""
    masks = np.stack([random_mask(units, 0.5, seed) for seed in range(count)])
    return np.stack([masks, ~masks], axis=1).reshape(2 * count, units)


def score_map(bundle: Bundle, pixels: Pixels, masks: NDArray[np.bool_], completed: Sequence[Floats]) -> Floats:
    """Reconstruction error of each unit, (rows, columns), averaged over pairs of masks; its mean is the score.

    `masks` are those of `scoring_masks`, `completed` the `reconstruction_a` under each, (3, size, size).

    Raises:
        BundleError: when the bundle cannot reconstruct.
    """
    require_decoder(bundle)
    decoder, side = bundle.arch.decoder, bundle.arch.image_size // UNIT_SIZE
    assert decoder is not None  # noqa: S101 - `require_decoder`
    original = normalize(pixels, bundle.description.preprocessing)
    mean = np.zeros((side, side), np.float32)
    for mask, reconstruction in zip(masks, completed, strict=True):
        errors = unit_errors(original, reconstruction, decoder.normalize_targets)
        mean += np.where(mask.reshape(side, side), errors, 0) / (len(masks) // 2)
    return mean


def score_image(engine: Engine, pixels: Pixels, partner: Pixels, count: int = 2) -> Floats:
    """`score_map` of one image under `count` pairs of masks; `partner` is the photo that covers it, see `partner_of`.

    Raises:
        BundleError: when the bundle cannot reconstruct.
    """
    require_decoder(engine.bundle)
    masks = scoring_masks(engine.bundle.arch.units, count)
    completed: list[Floats] = []
    for start in range(0, len(masks), largest_batch(engine, len(masks))):
        part = masks[start : start + largest_batch(engine, len(masks))]
        images = {"image_a": pixels, "image_b": partner}
        inputs = {name: np.repeat(image[None], len(part), axis=0) for name, image in images.items()}
        outputs = engine.run("reconstruct", inputs | {"from_partner": part}, ["reconstruction_a"])
        completed += list(outputs["reconstruction_a"])
    return score_map(engine.bundle, pixels, masks, completed)


def partner_of(golden: Mapping[str, NDArray[Any]]) -> Pixels:
    """The photo that covers parts of a scored image: always the same one of the bundle's golden arrays."""
    partner: Pixels = golden["reconstruct.image_b"][0]
    return partner


def unit_errors(image: Floats, reconstruction: Floats, normalize_targets: bool) -> Floats:
    """Mean squared error of each unit, (rows, columns), as pretraining minimises it; see `MixMIM.reconstruction_loss`.

    Both images are normalised, (3, size, size). Units that were not covered have an error of 0.
    """
    side = image.shape[-1] // UNIT_SIZE
    original, predicted = (
        array.astype(np.float64).reshape(3, side, UNIT_SIZE, side, UNIT_SIZE) for array in (image, reconstruction)
    )
    errors = np.square(predicted - original).mean(axis=(0, 2, 4))
    if normalize_targets:
        errors /= original.var(axis=(0, 2, 4), ddof=1) + TARGET_EPS
    return np.asarray(errors, np.float32)


def reconstruct_inputs(image_a: Pixels, image_b: Pixels, mask: NDArray[np.bool_]) -> dict[str, NDArray[Any]]:
    """Inputs of the reconstruct graph for one pair, without the batch dimension."""
    return {"image_a": image_a, "image_b": image_b, "from_partner": mask}


def reconstruct_pair(
    engine: Engine, image_a: Pixels, image_b: Pixels, ratio: float = 0.5, seed: int = 0
) -> dict[str, NDArray[Any]]:
    """Reconstruct a pair of preprocessed images (size, size, 3); returns the arrays of `reconstructed`.

    Raises:
        BundleError: when the bundle cannot reconstruct.
        ConfigError: for a ratio that covers no unit, or all.
    """
    require_decoder(engine.bundle)
    inputs = reconstruct_inputs(image_a, image_b, random_mask(engine.bundle.arch.units, ratio, seed))
    outputs = engine.run("reconstruct", {name: array[None] for name, array in inputs.items()}, RECONSTRUCT_OUTPUTS)
    return reconstructed(engine.bundle, inputs, {name: array[0] for name, array in outputs.items()})


def reconstructed(
    bundle: Bundle, inputs: Mapping[str, NDArray[Any]], outputs: Mapping[str, NDArray[Any]]
) -> dict[str, NDArray[Any]]:
    """Inputs and outputs of the reconstruct graph for one pair; images are float32 (3, size, size), normalised."""
    images = {name: normalize(inputs[name], bundle.description.preprocessing) for name in ("image_a", "image_b")}
    return {**inputs, **images, **outputs}
