"""Random crop and flip of pretraining, on PIL images, from a generator that the caller seeds."""

from __future__ import annotations

import math
import random

import numpy as np
from PIL import Image

ASPECT_RATIOS = (3 / 4, 4 / 3)


def crop_and_flip(image: Image.Image, size: int, min_crop: float, rng: random.Random) -> np.ndarray:
    """RandomResizedCrop (bicubic, antialiased) and horizontal flip to uint8 (size, size, 3)."""
    box = random_crop_box(image.width, image.height, min_crop, rng)
    flip = rng.random() < 0.5
    # Crop, then resize, as torchvision does: resize(box=...) would also read the pixels around the box.
    crop = image.crop(box).resize((size, size), Image.Resampling.BICUBIC)
    if flip:
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(crop)


def random_crop_box(width: int, height: int, min_crop: float, rng: random.Random) -> tuple[int, int, int, int]:
    """A box (left, upper, right, lower) of `min_crop` to 1 of the area and a side ratio of 3/4 to 4/3.

    After ten failures the centre, as near to that as the image allows (torchvision's RandomResizedCrop).
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
