"""Mixup, cutmix and label smoothing: a batch mixed with itself in reverse order, and its soft targets.

timm's batch mode, as the official fine-tuning code calls it: one share and one box for the whole batch; the partner of
an image is the one at the mirrored place, so in an odd batch the middle image is its own. Papers: mixup arXiv
1710.09412, cutmix arXiv 1905.04899, label smoothing arXiv 1512.00567.

Shape suffixes: B images of a batch, K classes, H height, W width.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

CUTMIX_PROBABILITY = 0.5  # of a batch, where both are switched on: timm's `switch_prob`


class Box(NamedTuple):
    """A rectangle of pixels; `bottom` and `right` are the first ones outside."""

    top: int
    bottom: int
    left: int
    right: int

    @property
    def area(self) -> int:
        """In pixels."""
        return (self.bottom - self.top) * (self.right - self.left)

    def of(self, pixels: Tensor) -> Tensor:
        """The box of every image of (..., H, W), as a view."""
        return pixels[..., self.top : self.bottom, self.left : self.right]


@dataclass(frozen=True)
class Mix:
    """How a batch is mixed; the default leaves it alone."""

    kept: float = 1.0  # share of its own that an image and its label keep: lambda in both papers
    box: Box | None = None  # where the partner's pixels go (cutmix); None blends the whole images (mixup)


def draw_mix(mixup: float, cutmix: float, height: int, width: int, rng: random.Random) -> Mix:
    """A mix with the share drawn from Beta(alpha, alpha); `mixup` and `cutmix` are the alphas, 0 switches one off.

    For cutmix `kept` is the share that the box really leaves, after rounding and after clipping at the border.
    """
    if not mixup and not cutmix:
        return Mix()
    if not mixup or (cutmix and rng.random() < CUTMIX_PROBABILITY):
        box = draw_box(rng.betavariate(cutmix, cutmix), height, width, rng)
        return Mix(1 - box.area / (height * width), box)
    return Mix(rng.betavariate(mixup, mixup))


def draw_box(kept: float, height: int, width: int, rng: random.Random) -> Box:
    """A box of the image's proportions and 1 - `kept` of its area, centred anywhere, clipped at the border."""
    ratio = math.sqrt(1 - kept)
    # Half sides, rounded down as timm does: the box is never larger than asked for.
    half_height, half_width = int(height * ratio) // 2, int(width * ratio) // 2
    y, x = rng.randrange(height), rng.randrange(width)
    return Box(
        max(y - half_height, 0), min(y + half_height, height), max(x - half_width, 0), min(x + half_width, width)
    )


def mix_pixels(pixels_BCHW: Tensor, mix: Mix) -> None:
    """Blend each image with its partner, or paste the partner's box into it, in place; `pixels_BCHW` is floating."""
    if mix.box is not None:
        region = mix.box.of(pixels_BCHW)
        region.copy_(region.flip(0))  # flip copies, so the partners are still whole
    elif mix.kept < 1:
        pixels_BCHW.lerp_(pixels_BCHW.flip(0), 1 - mix.kept)


def soft_targets(labels_B: Tensor, num_classes: int, smoothing: float, kept: float) -> Tensor:
    """Labels, int64 in [0, K), as float32 (B, K), rows that sum to 1: smoothed, and mixed as the pixels were.

    Smoothing gives every class `smoothing / K`, its own one too, and leaves the rest to the label (timm's
    `mixup_target`).
    """
    off = smoothing / num_classes
    targets_BK = torch.full((len(labels_B), num_classes), off, device=labels_B.device)
    targets_BK.scatter_(1, labels_B[:, None], 1 - smoothing + off)
    return targets_BK.lerp(targets_BK.flip(0), 1 - kept)
