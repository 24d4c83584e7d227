"""What a data set is enough for: pretraining from scratch, continued pretraining, fine-tuning, probe and k-NN."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from training.fit_to_data import FEWEST

FROM_SCRATCH = 5000  # images; 10,022 gave a model that beats an untrained one by 20 points (docs/shipped-model.md)
CONTINUED = 100  # images
PER_CLASS = 10  # labelled images of a class to fine-tune with
PROBED = 5  # labelled images of a class for a cross-validation of five parts


@dataclass(frozen=True)
class Use:
    """One use of a data set, and whether it is enough for it."""

    name: str
    enough: bool
    reason: str  # a clause, such as "from about 5,000 images, these are 200"


def uses(images: int, classes: Mapping[str, int] | None) -> tuple[Use, ...]:
    """Judge distinct readable images; `classes` has the images of each class, None without labels."""
    return (
        _pretraining("pretraining from scratch", images, FROM_SCRATCH, "continue from a model with --from tiny"),
        _pretraining("continued pretraining", images, CONTINUED, "use a model as it is"),
        _labelled("fine-tuning", images, classes, PER_CLASS),
        _labelled("probe and k-NN", images, classes, PROBED),
    )


def _pretraining(name: str, images: int, least: int, instead: str) -> Use:
    if images >= least:
        return Use(name, True, f"{images:,} images")
    if images < FEWEST:
        return Use(name, False, f"not below {FEWEST} images, these are {images}")
    return Use(name, False, f"from about {least:,} images on, these are {images:,}: {instead}")


def _labelled(name: str, images: int, classes: Mapping[str, int] | None, least: int) -> Use:
    if classes is None:
        return Use(name, False, "needs labels: put the images of each class into a folder named after it")
    if len(classes) < 2:
        return Use(name, False, f"needs two classes, there is {next(iter(classes), 'none')}")
    small = min(classes, key=classes.__getitem__)
    if images < FEWEST or classes[small] < least:
        return Use(name, False, f"from about {least} images of each class on, {small} has {classes[small]:,}")
    return Use(name, True, f"at least {classes[small]:,} images of each class")
