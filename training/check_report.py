"""What `mixmim check` reports: facts of each source, problems, and what the data is enough for."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from mixmim_serve.sources.passed_over import sentence
from training.evaluation.overlap import leak
from training.fit_to_data import FEWEST, too_few
from training.sufficiency import Use, uses

SHOWN = 10  # entries of a list in the text; JSON has all


@dataclass(frozen=True)
class ShorterSide:
    """The shorter side of the readable images, in pixels."""

    smallest: int
    median: int
    largest: int
    below_image_size: int  # images whose shorter side is below the training size, so they are upscaled


@dataclass(frozen=True)
class SourceReport:
    """One source: the training or the validation images."""

    name: str
    fingerprint: str
    images: int
    bytes: int  # of the readable images, as are the next three
    formats: dict[str, int]
    shorter_side: ShorterSide | None  # None when no image is readable
    greyscale: float  # share of images without colour, 0 to 1, estimated from 4,096 pixels of each
    classes: dict[str, int] | None  # images per class; None without labels
    unreadable: dict[str, str]  # reason by key
    passed_over: dict[str, int]  # other files of the source, by suffix
    duplicates: tuple[tuple[str, ...], ...]  # groups of keys with equal bytes
    conflicts: tuple[tuple[str, ...], ...]  # the duplicates with more than one label


@dataclass(frozen=True)
class Report:
    """The result of `check`."""

    image_size: int  # pixels on one side in training
    train: SourceReport
    val: SourceReport | None
    in_both: tuple[tuple[str, str], ...]  # keys (val, train) with equal bytes: leaks into the validation images

    @property
    def unreadable(self) -> int:
        """Images of both parts that cannot be read."""
        return sum(len(part.unreadable) for _, part in self._parts())

    @property
    def refusal(self) -> str | None:
        """Why no training command would take these images, in its words; None when they do."""
        return str(too_few(self.train.name, self.train.images)) if self.train.images < FEWEST else None

    @property
    def uses(self) -> tuple[Use, ...]:
        """What the training images are enough for; copies and unreadable ones do not count."""
        part = self.train
        copies = sum(len(group) - 1 for group in part.duplicates)
        return uses(part.images - len(part.unreadable) - copies, part.classes)

    @property
    def warnings(self) -> tuple[str, ...]:
        """One sentence per problem to look at before training."""
        sentences = [text for role, part in self._parts() for text in _part_warnings(role, part)]
        if self.in_both:
            sentences.append(leak(self.in_both))
        if self.val is not None:
            sentences.extend(_class_warnings(self.train.classes, self.val.classes))
        return tuple(sentences)

    def to_dict(self) -> dict[str, Any]:
        """JSON values, lists in full."""
        judged = {use.name: {"enough": use.enough, "reason": use.reason} for use in self.uses}
        more = {"enough_for": judged, "refusal": self.refusal, "warnings": list(self.warnings)}
        return {**dataclasses.asdict(self), **more}

    def lines(self) -> Iterator[str]:
        """Lines of text: the facts of each source, what it is enough for, then the warnings."""
        for role, part in self._parts():
            yield from _facts(role, part, self.image_size)
        yield "enough for"
        yield from (f"  {use.name}: {'yes' if use.enough else 'no'}, {use.reason}" for use in self.uses)
        yield from (f"warning: {text}" for text in self.warnings)
        if not self.warnings and not self.refusal:
            yield "no problems found"

    def _parts(self) -> list[tuple[str, SourceReport]]:
        return [("train", self.train), *([("val", self.val)] if self.val is not None else [])]


def _facts(role: str, part: SourceReport, image_size: int) -> Iterator[str]:
    yield f"{role}: {part.name}"
    yield f"  {_images(part.images)}, {_size(part.bytes)}{_classes(part.classes)}"
    if part.shorter_side is not None:
        side = part.shorter_side
        yield f"  formats: {', '.join(f'{name} {count:,}' for name, count in part.formats.items())}"
        yield f"  shorter side: {side.smallest} to {side.largest} pixels, median {side.median}; " + (
            f"{side.below_image_size:,} below {image_size}"
        )
        yield f"  greyscale: about {part.greyscale:.0%}"
    if part.passed_over:
        yield f"  {sentence(part.passed_over)}"
    if part.unreadable:
        yield f"  unreadable: {len(part.unreadable):,}"
        yield from (f"    {key}: {reason}" for key, reason in itertools.islice(part.unreadable.items(), SHOWN))
        if len(part.unreadable) > SHOWN:
            yield f"    and {len(part.unreadable) - SHOWN:,} more"


def _classes(classes: dict[str, int] | None) -> str:
    if classes is None:
        return ", no labels"
    if len(set(classes.values())) == 1:
        return f", {len(classes):,} classes of {next(iter(classes.values())):,} images each"
    small, large = min(classes, key=classes.__getitem__), max(classes, key=classes.__getitem__)
    return f", {len(classes):,} classes of {classes[small]:,} ({small}) to {classes[large]:,} ({large}) images"


def _part_warnings(role: str, part: SourceReport) -> Iterator[str]:
    if part.unreadable:
        key, reason = next(iter(part.unreadable.items()))
        yield f"{_images(len(part.unreadable))} of {role} cannot be read, such as {key}: {reason}"
    if part.duplicates:
        copies = sum(len(group) - 1 for group in part.duplicates)
        first, second = part.duplicates[0][:2]
        yield f"{_images(copies)} of {role} duplicate others, such as {second} (same content as {first})."
    if part.conflicts:
        mislabelled = sum(len(group) for group in part.conflicts)
        first, second = part.conflicts[0][:2]
        yield (
            f"{_images(mislabelled)} of {role} with equal content have different labels, such as {first} and {second}: "
            "keep those with the right label."
        )


def _class_warnings(train: dict[str, int] | None, val: dict[str, int] | None) -> Iterator[str]:
    if train is None or val is None:
        if train is not val:
            labelled, bare = ("val", "train") if train is None else ("train", "val")
            yield f"{labelled} has labels and {bare} has none: classes cannot be compared."
        return
    if absent := [name for name in train if name not in val]:
        yield f"val has no image of {_named(absent)}: add some to evaluate those too."
    if unseen := [name for name in val if name not in train]:
        yield f"train has no image of {_named(unseen)}: a class only in val cannot be learned."


def _named(classes: Sequence[str]) -> str:
    if len(classes) == 1:
        return f"class {classes[0]}"
    more = f" and {len(classes) - SHOWN:,} more" if len(classes) > SHOWN else ""
    return f"{len(classes):,} classes ({', '.join(classes[:SHOWN])}{more})"


def _images(count: int) -> str:
    return f"{count:,} image" if count == 1 else f"{count:,} images"


def _size(count: int) -> str:
    unit, factor = next((unit for unit in (("GB", 1e9), ("MB", 1e6)) if count >= unit[1]), ("kB", 1e3))
    return f"{count / factor:,.1f} {unit}"
