"""Augmentation for fine-tuning, batch-wise on the device: RandAugment, normalisation, random erasing, mixing.

RandAugment is timm's `rand-m9-mstd0.5-inc1`, with the arguments of the official fine-tuning code (util/datasets.py:
bicubic, the mean as fill colour); random erasing is timm's `pixel` mode. Papers: arXiv 1909.13719, 1708.04896.

Each image draws its own operations, and images with the same one are transformed together: at most eleven calls per
round, since rotations, shears and translations are one warp. kornia's RandAugment (0.9.0) does not replace this: it
draws one set of operations for the whole batch, from the global generator, and lacks timm's magnitudes and its coin
toss before each operation; nor is it faster. kornia's functions are used where they agree with Pillow's, which tests
check. Two do not: its solarize-add also inverts, and its affine warp blends the border with the fill colour. Between
rounds the pixels are uint8, as in Pillow, so unchanged images stay exact.

All random numbers are drawn on the host from the seed and sent in one copy: nothing is read back from the device, and
the global generators are not touched.

Shape suffixes: B images of a batch, N of them that share a transform, C channels, H height, W width (equal), K classes,
P parameters, D coordinates.
"""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from kornia import enhance
from torch import Tensor

from mixmim_serve.config import Preprocessing
from mixmim_serve.errors import ConfigError, DataError
from mixmim_serve.model.normalize import Normalize
from training.config import AugmentConfig
from training.mixing import Box, draw_mix, mix_pixels, soft_targets

OPERATION_PROBABILITY = 0.5  # that a drawn operation is applied (timm)
MAX_MAGNITUDE = 10.0
ERASED_AREA = (0.02, 1 / 3)  # share of the image
ERASED_ASPECT = (0.3, 1 / 0.3)  # height / width
PARAMETERS = 6  # most numbers that an operation takes: those of an affine map

Parameters = tuple[float, ...]
Transform = Callable[[Tensor, Tensor], Tensor]  # (N, 3, H, W) in [0, 1], (N, PARAMETERS) -> (N, 3, H, W), unclipped


class DeviceAugment:
    """Turns batches of cropped and flipped images into network input and soft targets."""

    def __init__(
        self,
        config: AugmentConfig,
        preprocessing: Preprocessing,
        num_classes: int,
        device: torch.device,
    ) -> None:
        if num_classes < 1:
            raise ConfigError(f"num_classes must be at least 1, got {num_classes}.")
        self.config, self.num_classes, self.device = config, num_classes, device
        self.normalize = Normalize(preprocessing).to(device)
        self.operations = operations(torch.tensor(preprocessing.mean, device=device))
        self.noise = torch.Generator(device)

    def __call__(self, pixels_BHWC: Tensor, labels_B: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """uint8 (B, H, W, 3) and int64 (B,) to normalised float32 (B, 3, H, W) and float32 (B, K).

        On a CPU equal images, labels and seed give equal bits.

        Raises:
            DataError: when the pixels are not square uint8 images.
        """
        if pixels_BHWC.dtype != torch.uint8 or pixels_BHWC.shape[1] != pixels_BHWC.shape[2]:
            raise DataError(f"expected square uint8 images, got {pixels_BHWC.dtype} {tuple(pixels_BHWC.shape)}.")
        rng = random.Random(seed)  # noqa: S311 - augmentation, not secrets
        self.noise.manual_seed(seed)
        pixels_BCHW = pixels_BHWC.to(self.device, non_blocking=True).permute(0, 3, 1, 2)
        pixels_BCHW = pixels_BCHW.clone(memory_format=torch.contiguous_format)
        with torch.autocast(self.device.type, enabled=False):  # bfloat16 would lose bits of the pixels
            rand_augment(pixels_BCHW, self.operations, self.config, rng)
        pixels_BCHW = self.normalize(pixels_BCHW.permute(0, 2, 3, 1))
        erase(pixels_BCHW, self.config.erase, rng, self.noise)
        _, _, height, width = pixels_BCHW.shape
        mix = draw_mix(self.config.mixup, self.config.cutmix, height, width, rng)
        mix_pixels(pixels_BCHW, mix)
        labels_B = labels_B.to(self.device, non_blocking=True)
        return pixels_BCHW, soft_targets(labels_B, self.num_classes, self.config.smoothing, mix.kept)


def rand_augment(
    pixels_BCHW: Tensor, operations: dict[str, Operation], config: AugmentConfig, rng: random.Random
) -> None:
    """Apply `config.rand_augment_ops` rounds of drawn operations to uint8 pixels, in place."""
    rounds = [draw_round(len(pixels_BCHW), operations, config, rng) for _ in range(config.rand_augment_ops)]
    groups = [group for drawn in rounds for group in drawn.items()]
    if not groups:
        return
    table = torch.tensor([row for _, rows in groups for row in rows], dtype=torch.float32)
    table = table.to(pixels_BCHW.device, non_blocking=True)
    tables = torch.split(table, [len(rows) for _, rows in groups])
    for (transform, _), rows in zip(groups, tables, strict=True):
        images_N = rows[:, 0].long()
        pixels_BCHW[images_N] = transform_pixels(pixels_BCHW[images_N], transform, rows[:, 1:])


def draw_round(
    count: int, operations: dict[str, Operation], config: AugmentConfig, rng: random.Random
) -> dict[Transform, list[Parameters]]:
    """For each transform, rows of (image, parameters); about half of the images are in none."""
    rows: dict[Transform, list[Parameters]] = defaultdict(list)
    names = tuple(operations)
    for image in range(count):
        transform, parameters = operations[rng.choice(names)]
        if rng.random() < OPERATION_PROBABILITY:
            magnitude = rng.gauss(config.rand_augment_magnitude, config.rand_augment_std)
            strength = min(max(magnitude, 0.0), MAX_MAGNITUDE) / MAX_MAGNITUDE
            numbers = parameters(strength, rng.choice((-1, 1)))
            rows[transform].append((image, *numbers, *[0.0] * (PARAMETERS - len(numbers))))
    return rows


def transform_pixels(pixels_NCHW: Tensor, transform: Transform, parameters_NP: Tensor) -> Tensor:
    """uint8 to uint8 through [0, 1], rounded (Pillow truncates some of its results, which darkens by half a level)."""
    return (transform(pixels_NCHW.float() / 255, parameters_NP) * 255).round_().clamp_(0, 255).to(torch.uint8)


class Operation(NamedTuple):
    """A transform, and its parameters (at most PARAMETERS) from a strength in [0, 1] and a sign, -1 or 1."""

    transform: Transform
    parameters: Callable[[float, int], Parameters]


def operations(fill_C: Tensor) -> dict[str, Operation]:
    """The fifteen of timm's `_RAND_INCREASING_TRANSFORMS`; a warp fills with `fill_C`, in [0, 1], outside the image."""
    warp = partial(warp_affine, fill_C=fill_C)
    return {
        "autocontrast": Operation(_without_parameters(autocontrast), _no_parameters),
        "equalize": Operation(_without_parameters(enhance.equalize), _no_parameters),
        "invert": Operation(_without_parameters(invert), _no_parameters),
        "rotate": Operation(warp, lambda strength, sign: _rotation(sign * strength * 30)),
        "posterize": Operation(_with_one_parameter(posterize), lambda strength, _: (4 - int(strength * 4),)),
        "solarize": Operation(_with_one_parameter(solarize), lambda strength, _: (256 - int(strength * 256),)),
        "solarize_add": Operation(_with_one_parameter(solarize_add), lambda strength, _: (int(strength * 110),)),
        "color": Operation(_with_one_parameter(enhance.adjust_saturation_with_gray_subtraction), _enhancement),
        "contrast": Operation(_with_one_parameter(enhance.adjust_contrast_with_mean_subtraction), _enhancement),
        "brightness": Operation(_with_one_parameter(enhance.adjust_brightness_accumulative), _enhancement),
        "sharpness": Operation(_with_one_parameter(enhance.sharpness), _enhancement),
        "shear_x": Operation(warp, lambda strength, sign: _shear_x(sign * strength * 0.3)),
        "shear_y": Operation(warp, lambda strength, sign: _transposed(_shear_x(sign * strength * 0.3))),
        "translate_x": Operation(warp, lambda strength, sign: _translation_x(sign * strength * 0.45)),
        "translate_y": Operation(warp, lambda strength, sign: _transposed(_translation_x(sign * strength * 0.45))),
    }


def autocontrast(pixels_NCHW: Tensor) -> Tensor:
    """Stretch each channel of each image over [0, 1]; constant channels stay."""
    low, high = (values[..., None] for values in pixels_NCHW.flatten(2).aminmax(dim=2, keepdim=True))
    return torch.where(high > low, (pixels_NCHW - low) / (high - low), pixels_NCHW)


def invert(pixels_NCHW: Tensor) -> Tensor:
    """The negative, 1 - pixels."""
    return 1 - pixels_NCHW


def posterize(pixels_NCHW: Tensor, bits_N: Tensor) -> Tensor:
    """Keep the upper bits; 0 gives a black image, which timm's `int` yields only at full magnitude."""
    return enhance.posterize(pixels_NCHW, bits_N.int())


def solarize(pixels_NCHW: Tensor, threshold_N: Tensor) -> Tensor:
    """Invert the levels at or above `threshold_N` of 256."""
    return enhance.solarize(pixels_NCHW, (threshold_N - 0.5) / 255)  # between two levels, where rounding is harmless


def solarize_add(pixels_NCHW: Tensor, levels_N: Tensor) -> Tensor:
    """Add `levels_N` of 255 to the darker half of the levels."""
    added = pixels_NCHW + levels_N[:, None, None, None] / 255
    return torch.where(pixels_NCHW < 127.5 / 255, added, pixels_NCHW)


def warp_affine(pixels_NCHW: Tensor, map_N6: Tensor, fill_C: Tensor) -> Tensor:
    """Output point (x, y) shows the input at x' = a x + b y + c, y' = d x + e y + f; `map_N6` holds (a, ..., f).

    Coordinates run from -1 to 1 between the outer borders. Bicubic; the fill starts sharply, as in Pillow. The map is
    written out because the matrix product of `affine_grid` may run in TF32 on CUDA.
    """
    side = pixels_NCHW.shape[-1]
    x_W = (torch.arange(side, device=pixels_NCHW.device) * 2 + 1) / side - 1
    y_H1 = x_W[:, None]
    a, b, c, d, e, f = map_N6.T[..., None, None]
    grid_NHWD = torch.stack((a * x_W + b * y_H1 + c, d * x_W + e * y_H1 + f), dim=-1)
    inside_N1HW = (grid_NHWD.abs() <= 1).all(-1)[:, None]
    warped_NCHW = F.grid_sample(pixels_NCHW, grid_NHWD, mode="bicubic", padding_mode="border", align_corners=False)
    return torch.where(inside_N1HW, warped_NCHW, fill_C[:, None, None])


def erase(pixels_BCHW: Tensor, probability: float, rng: random.Random, noise: torch.Generator) -> None:
    """Fill a rectangle of each normalised image with normal noise, with this probability, in place."""
    _, _, height, width = pixels_BCHW.shape
    for pixels_CHW in pixels_BCHW:
        if rng.random() < probability:
            # A loop: noise for whole images would cost more than these few small calls.
            draw_erased_box(height, width, rng).crop(pixels_CHW).normal_(generator=noise)


def draw_erased_box(height: int, width: int, rng: random.Random) -> Box:
    """A rectangle of ERASED_AREA and ERASED_ASPECT that fits; empty after ten failed draws (timm)."""
    for _ in range(10):
        area = height * width * rng.uniform(*ERASED_AREA)
        aspect = math.exp(rng.uniform(*map(math.log, ERASED_ASPECT)))
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if h < height and w < width:
            top, left = rng.randint(0, height - h), rng.randint(0, width - w)
            return Box(top, top + h, left, left + w)
    return Box(0, 0, 0, 0)


def _without_parameters(function: Callable[[Tensor], Tensor]) -> Transform:
    return lambda pixels, _: function(pixels)


def _with_one_parameter(function: Callable[[Tensor, Tensor], Tensor]) -> Transform:
    return lambda pixels, parameters: function(pixels, parameters[:, 0])


def _no_parameters(_strength: float, _sign: int) -> Parameters:
    return ()


def _enhancement(strength: float, sign: int) -> Parameters:
    """Pillow's factor, where 1 changes nothing."""
    return (1 + sign * strength * 0.9,)


def _rotation(degrees: float) -> Parameters:
    """Anticlockwise about the centre, as displayed."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return (cos, -sin, 0.0, sin, cos, 0.0)


def _shear_x(factor: float) -> Parameters:
    """The upper border stays in place (timm's shear has its origin in the upper left corner)."""
    return (1.0, factor, factor, 0.0, 1.0, 0.0)


def _translation_x(share: float) -> Parameters:
    """To the left, by a share of the width."""
    return (1.0, 0.0, 2 * share, 0.0, 1.0, 0.0)


def _transposed(map_6: Parameters) -> Parameters:
    """The same map with x and y swapped."""
    a, b, c, d, e, f = map_6
    return (e, d, f, b, a, c)
