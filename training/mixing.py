"""Mixup, cutmix and label smoothing: a batch is mixed with itself in reverse order, and so are its soft targets.

timm's batch mode, as in the official fine-tuning code: one share and one box for the whole batch; image i is mixed
with image B - 1 - i, so in an odd batch the middle image is its own partner. Papers: mixup arXiv
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

CUTMIX_PROBABILITY = 0.5  # per batch, when both are on: timm's `switch_prob`


class Box(NamedTuple):
    """A rectangle of pixels; `bottom` and `right` are exclusive."""

    top: int
    bottom: int
    left: int
    right: int

    @property
    def area(self) -> int:
        """Number of pixels inside."""
        return (self.bottom - self.top) * (self.right - self.left)

    def crop(self, pixels: Tensor) -> Tensor:
        """The box in every image of (..., H, W), as a view."""
        return pixels[..., self.top : self.bottom, self.left : self.right]


@dataclass(frozen=True)
class Mix:
    """How a batch is mixed; the default leaves it unchanged."""

    kept: float = 1.0  # weight of the image and its label against the partner's: lambda in both papers
    box: Box | None = None  # filled with the partner's pixels (cutmix); None blends whole images (mixup)


def draw_mix(mixup: float, cutmix: float, height: int, width: int, rng: random.Random) -> Mix:
    """A mix whose share is drawn from Beta(alpha, alpha); `mixup` and `cutmix` are the alphas, 0 switches one off.

    For cutmix `kept` is the exact share outside the box, after rounding and clipping at the border.
    """
    if not mixup and not cutmix:
        return Mix()
    if not mixup or (cutmix and rng.random() < CUTMIX_PROBABILITY):
        box = draw_box(rng.betavariate(cutmix, cutmix), height, width, rng)
        return Mix(1 - box.area / (height * width), box)
    return Mix(rng.betavariate(mixup, mixup))


def draw_box(kept: float, height: int, width: int, rng: random.Random) -> Box:
    """A box with the image's aspect ratio and 1 - `kept` of its area, at a random centre, clipped at the border."""
    ratio = math.sqrt(1 - kept)
    # Half sides, rounded down as in timm: the box is never larger than requested.
    half_height, half_width = int(height * ratio) // 2, int(width * ratio) // 2
    y, x = rng.randrange(height), rng.randrange(width)
    return Box(
        max(y - half_height, 0), min(y + half_height, height), max(x - half_width, 0), min(x + half_width, width)
    )


def mix_pixels(pixels_BCHW: Tensor, mix: Mix) -> None:
    """Blend each image with its partner, or paste the partner's box, in place; `pixels_BCHW` is floating point."""
    if mix.box is not None:
        region = mix.box.crop(pixels_BCHW)
        region.copy_(region.flip(0))  # flip copies, so the partners are still unmixed
    elif mix.kept < 1:
        pixels_BCHW.lerp_(pixels_BCHW.flip(0), 1 - mix.kept)


def soft_targets(labels_B: Tensor, num_classes: int, smoothing: float, kept: float) -> Tensor:
    """Labels, int64 in [0, K), as float32 (B, K) with rows that sum to 1: smoothed, and mixed as the pixels were.

    Smoothing gives every class `smoothing / K`, the label's included, and the rest to the label (timm's
    `mixup_target`).
    """
    off = smoothing / num_classes
    targets_BK = torch.full((len(labels_B), num_classes), off, device=labels_B.device)
    targets_BK.scatter_(1, labels_B[:, None], 1 - smoothing + off)
    return targets_BK.lerp(targets_BK.flip(0), 1 - kept)
