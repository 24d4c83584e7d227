"""Pictures that tests make."""

from __future__ import annotations

import numpy as np
from PIL import Image


def photo(seed: int, width: int = 96, height: int = 80) -> Image.Image:
    """Soft coloured clouds, smooth like photos, so that there is something to learn."""
    cells = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), np.uint8)
    return Image.fromarray(cells).resize((width, height), Image.Resampling.BICUBIC)
