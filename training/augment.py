"""Random crop of PIL images, in the loader; flip of uint8 batches, on the device."""

from __future__ import annotations

import hashlib
import math
import random

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mixmim_serve.preprocess import jpeg_reduction

ASPECT_RATIOS = (3 / 4, 4 / 3)

Box = tuple[int, int, int, int]  # left, upper, right, lower


class RandomCrop:
    """Random resized crop (bicubic, antialiased) of one image to uint8 (size, size, 3)."""

    def __init__(self, size: int, min_crop: float, rng: random.Random) -> None:
        self.size, self.min_crop, self.rng = size, min_crop, rng
        self.drawn: tuple[tuple[int, int], Box] | None = None  # (width, height) of the image, and the box in it

    def reduction(self, width: int, height: int) -> int:
        """Draw the box and return the factor by which `preprocess.decode` may shrink the image.

        The shrunk box is still at least `size` pixels wide, so the box has to be drawn before decoding.
        """
        left, upper, right, lower = box = random_crop_box(width, height, self.min_crop, self.rng)
        self.drawn = (width, height), box
        return jpeg_reduction(min(right - left, lower - upper), self.size)

    def __call__(self, image: Image.Image) -> np.ndarray:
        """Crop and resize; a shrunk image is cropped to the same part."""
        if self.drawn is None:
            self.reduction(*image.size)
        assert self.drawn is not None  # noqa: S101 - for the type checker
        (width, height), box = self.drawn
        size = (self.size, self.size)
        if image.size == (width, height):
            # Crop, then resize, as torchvision does: resize(box=...) would also read the pixels around the box.
            return np.asarray(image.crop(box).resize(size, Image.Resampling.BICUBIC))
        scale_x, scale_y = image.width / width, image.height / height
        scaled = (box[0] * scale_x, box[1] * scale_y, box[2] * scale_x, box[3] * scale_y)  # fractions of pixels
        return np.asarray(image.resize(size, Image.Resampling.BICUBIC, box=scaled))


def random_crop_box(width: int, height: int, min_crop: float, rng: random.Random) -> Box:
    """A box (left, upper, right, lower) with a share of `min_crop` to 1 of the area and an aspect ratio of 3/4 to 4/3.

    After ten failed draws, the centre crop nearest to that (torchvision's RandomResizedCrop).
    """
    low, high = (math.log(ratio) for ratio in ASPECT_RATIOS)
    for _ in range(10):
        area = width * height * rng.uniform(min_crop, 1.0)
        ratio = math.exp(rng.uniform(low, high))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, upper = rng.randint(0, width - w), rng.randint(0, height - h)
            return left, upper, left + w, upper + h
    ratio = min(max(width / height, ASPECT_RATIOS[0]), ASPECT_RATIOS[1])
    w, h = min(width, round(height * ratio)), min(height, round(width / ratio))
    left, upper = (width - w) // 2, (height - h) // 2
    return left, upper, left + w, upper + h


def flip(pixels_BHWC: Tensor, flipped_B: Tensor) -> Tensor:
    """Mirror the images (B, H, W, 3) for which `flipped_B` is True."""
    return torch.where(flipped_B.view(-1, 1, 1, 1), pixels_BHWC.flip(2), pixels_BHWC)


def step_seed(*parts: int) -> int:
    """A 63-bit seed from numbers such as (seed, step, rank); nearby numbers give unrelated seeds."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1
