"""A panel of one reconstruction: both originals, the mixed image, and both images as the network completes them."""

from __future__ import annotations

from collections.abc import Mapping
from io import BytesIO
from typing import Any

from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from mixmim_serve.config import Preprocessing
from mixmim_serve.preprocess import denormalize

TILE = 256  # pixels on one side, at least
GAP = 8
CAPTION = 28
TILES = {  # array of the reconstruct graph -> caption
    "image_a": "image A",
    "image_b": "image B",
    "mixed": "mixed, as the network sees it",
    "reconstruction_a": "A, covered parts predicted",
    "reconstruction_b": "B, covered parts predicted",
}


def draw_panel(arrays: Mapping[str, NDArray[Any]], preprocessing: Preprocessing) -> Image.Image:
    """Five captioned tiles in a row, from arrays (3, size, size) in normalised pixel units.

    Covered units are predictions, denormalised by the mean and deviation of the original's own units.
    """
    scale = max(1, TILE // preprocessing.image_size)
    side = preprocessing.image_size * scale
    panel = Image.new("RGB", (len(TILES) * (side + GAP) + GAP, side + CAPTION + GAP), "white")
    draw = ImageDraw.Draw(panel)
    font = ImageFont.load_default(size=15)
    for number, (name, caption) in enumerate(TILES.items()):
        left = GAP + number * (side + GAP)
        tile = Image.fromarray(denormalize(arrays[name], preprocessing))
        panel.paste(tile.resize((side, side), Image.Resampling.NEAREST), (left, CAPTION))
        draw.text((left, CAPTION // 2), caption, fill="black", font=font, anchor="lm")
    return panel


def png(image: Image.Image) -> bytes:
    """The image encoded as PNG."""
    buffer = BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
