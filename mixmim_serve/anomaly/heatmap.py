"""Distances of patches drawn over the photo."""

from __future__ import annotations

import re
import zlib

import numpy as np
from PIL import Image

from mixmim_serve.anomaly.patches import Floats
from mixmim_serve.preprocess import Pixels

PLACE_QUANTILES = (0.5, 0.9, 0.99, 0.999)  # of the places of normal photos, which the colours are scaled by
SIDE = 256  # pixels of a drawn photo, at least
OPACITY = 0.6
# From nothing over yellow to red; colour-blind people see it by its darkness too.
COLOURS = np.array([(255, 255, 178), (254, 204, 92), (253, 141, 60), (240, 59, 32), (189, 0, 38)], np.float32)


def overlay(pixels: Pixels, places_HW: Floats, normal_quantiles: Floats) -> Image.Image:
    """The photo (size, size, 3) with its unusual places coloured, enlarged to at least `SIDE` pixels.

    Places as near as nine in ten of normal photos stay as they are; red is twice as far beyond as hardly any of theirs.
    """
    scale = max(1, -(-SIDE // len(pixels)))
    side = len(pixels) * scale
    photo = Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC)
    small = Image.fromarray(strength(places_HW, normal_quantiles))
    heat = np.asarray(small.resize((side, side), Image.Resampling.BICUBIC)).clip(0, 1)
    position = heat * (len(COLOURS) - 1)
    lower = np.minimum(position.astype(int), len(COLOURS) - 2)
    share = (position - lower)[..., None]
    colours = COLOURS[lower] * (1 - share) + COLOURS[lower + 1] * share
    opacity = (OPACITY * np.minimum(2 * heat, 1))[..., None]
    mixed = np.asarray(photo, np.float32) * (1 - opacity) + colours * opacity
    return Image.fromarray(mixed.round().astype(np.uint8))


def strength(places_HW: Floats, normal_quantiles: Floats) -> Floats:
    """From 0, for places as near as nine in ten normal ones, to 1, for those far beyond all but one in a thousand."""
    begin, end = normal_quantiles[1], normal_quantiles[3]
    return np.asarray((places_HW - begin) / np.maximum(2 * (end - begin), 1e-6), np.float32).clip(0, 1)


def overlay_name(key: str) -> str:
    """The file name of a photo's overlay: its key without what a name cannot have, then told apart by a checksum."""
    flat = re.sub(r"[^\w.-]+", "_", key).lstrip(".")[-150:]
    return f"{flat}.png" if flat == key else f"{flat}.{zlib.crc32(key.encode(errors='surrogateescape')):08x}.png"
