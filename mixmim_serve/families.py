"""The families of backbones: what sets one apart before any network is built, in one table. Free of torch.

A family is a backbone of four stages at strides 4, 8, 16 and 32, in which nothing but attention mixes 32-pixel units.
`mixmim_serve.model.encoder` has the other half of the table: the stages themselves. Sources: arXiv 2205.13137 (MixMIM),
2103.14030 (Swin), 2102.12122 (PVT).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mixmim_serve.errors import ConfigError


@dataclass(frozen=True)
class Family:
    """One row. A grid is the number of tokens on one side of a stage, a window that of an attention window."""

    widths: tuple[int, ...]  # channels of each stage, in multiples of the first stage's
    mlp_ratios: tuple[int, ...]  # hidden channels of each stage's MLPs, in multiples of its channels
    default_windows: Callable[[Sequence[int]], tuple[int, ...]]  # by the grids
    fit_windows: Callable[[Sequence[int], tuple[int, ...]], tuple[int, ...]]  # to the grids, or a ConfigError
    attention_macs: Callable[[int, int, int, int], float]  # multiply-adds of one block's attention, see below
    frozen_positions: bool = False  # a sine-cosine embedding is added after patch embedding
    class_token: bool = False  # the last stage can have one


# MixMIM: windows that never shift.


def largest_windows(grids: Sequence[int]) -> tuple[int, ...]:
    """The divisor of each grid nearest (as a ratio) to 16 tokens in stages 1 and 2, to 24 after.

    Gives the published windows at 224 px (14, 14, 14, 7) and 384 px (16, 16, 24, 12).
    """
    return tuple(_nearest_divisor(grid, 16 if stage < 2 else 24) for stage, grid in enumerate(grids))


def dividing(grids: Sequence[int], windows: tuple[int, ...]) -> tuple[int, ...]:
    """Windows as they are; one at least as large as its grid becomes the whole grid when the network is built."""
    for number, (grid, window) in enumerate(zip(grids, windows, strict=True), start=1):
        if window < grid and grid % window:
            raise ConfigError(
                f"stage {number}: a window of {window} does not divide its grid of {grid} tokens: "
                f"use one of {_divisors(grid)}."
            )
    return windows


# Swin: windows of one size that shift in every second block; a grid that they do not divide is padded.


def eighth_of_the_patches(grids: Sequence[int]) -> tuple[int, ...]:
    """The last stage's grid in every stage: 7 at 224 px and 12 at 384 px, as published, and never any padding.

    timm's rule for other input sizes (`set_input_size`, window ratio 8).
    """
    return (grids[-1],) * len(grids)


def clamped(grids: Sequence[int], windows: tuple[int, ...]) -> tuple[int, ...]:
    """Windows cut to their grids, which are then one window each, as in the official code."""
    if max(windows) > grids[0]:
        raise ConfigError(
            f"a window of {max(windows)} tokens is larger than the {grids[0]} x {grids[0]} tokens of the first stage: "
            f"use at most {grids[0]}."
        )
    return tuple(min(pair) for pair in zip(grids, windows, strict=True))


# PVT: no windows; keys and values are one per 32-pixel unit.


def no_windows(grids: Sequence[int]) -> tuple[int, ...]:
    """None."""
    return ()


def refuse_windows(grids: Sequence[int], windows: tuple[int, ...]) -> tuple[int, ...]:
    """None, whatever the grids are."""
    if windows:
        raise ConfigError(f"a PVT attends to the whole image and has no windows, got {list(windows)}: leave them out.")
    return ()


# Multiply-adds of one block's attention with its linear layers: tokens on one side of the grid and of a window,
# channels, units of the image.


def windowed_macs(grid: int, window: int, dim: int, units: int) -> float:
    """Attention within windows; padding takes part."""
    tokens = (math.ceil(grid / window) * window) ** 2
    return 4.0 * tokens * dim**2 + 2.0 * tokens * min(window, grid) ** 2 * dim


def reduced_macs(grid: int, window: int, dim: int, units: int) -> float:
    """Attention to one key per unit, which a convolution makes wherever there are more tokens than units."""
    tokens = grid**2
    reduction = tokens * dim**2 if tokens > units else 0
    return 2.0 * (tokens + units) * dim**2 + reduction + 2.0 * tokens * units * dim


FAMILIES = {
    "mixmim": Family((1, 2, 4, 8), (4, 4, 4, 4), largest_windows, dividing, windowed_macs, frozen_positions=True),
    "swin": Family((1, 2, 4, 8), (4, 4, 4, 4), eighth_of_the_patches, clamped, windowed_macs),
    "pvt": Family((1, 2, 5, 8), (8, 8, 4, 4), no_windows, refuse_windows, reduced_macs, class_token=True),
}


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def _nearest_divisor(number: int, target: int) -> int:
    return min(_divisors(number), key=lambda d: abs(math.log(d / target)))
