"""The HTML page of a map: one file with all pictures, whose script zooms, colours and enlarges them (map.html)."""

from __future__ import annotations

import base64
import dataclasses
import html
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from mixmim_serve.explore.colours import colouring
from mixmim_serve.explore.columns import Column
from mixmim_serve.explore.map import MapLayout
from mixmim_serve.explore.pages import crop_square, data_uri, from_images, jpeg, shrink
from mixmim_serve.extract.features import FeatureFolder

TEMPLATE = Path(__file__).with_name("map.html")
ON_MAP = 64  # pixels on both sides of a picture,
ON_FULL_MAP, FULL_MAP = 32, 4000  # fewer above this number of images: browsers decode all of them at once
# Pixels on the longer side of an enlarged picture, by the number of images: a page stays below about 20 MB.
ENLARGED = ((250, 480), (600, 320), (1500, 224))
ENLARGED_MANY = 160


@dataclass(frozen=True)
class MapPicture:
    """An image on the map, and enlarged."""

    square: Image.Image
    enlarged: bytes  # a JPEG


def map_pictures(features: FeatureFolder, keys: Sequence[str]) -> dict[str, MapPicture]:
    """The pictures of these images by key; those that cannot be read are grey.

    Raises:
        DataError: the source of the features is gone.
    """
    side = next((side for most, side in ENLARGED if len(keys) <= most), ENLARGED_MANY)
    small = ON_MAP if len(keys) <= FULL_MAP else ON_FULL_MAP

    def make(image: Image.Image) -> MapPicture:
        square = crop_square(image, small)  # first: shrink changes the image
        return MapPicture(square, jpeg(shrink(image, side)))

    return from_images(features, keys, make, side)


def map_page(
    title: str, layout: MapLayout, pictures: dict[str, MapPicture], columns: Sequence[Column], first: str = ""
) -> str:
    """A page with every image at its position, coloured by the column `first`; another one is chosen in the page."""
    shown = [pictures[key] for key in layout.keys]
    side, across = shown[0].square.width, int(len(shown) ** 0.5)
    atlas = Image.new("RGB", (across * side, -(-len(shown) // across) * side))
    for number, picture in enumerate(shown):
        atlas.paste(picture.square, (number % across * side, number // across * side))
    data = {
        "side": side,
        "across": across,
        "keys": layout.keys,
        "x": layout.places[:, 0].round(4).tolist(),
        "y": layout.places[:, 1].round(4).tolist(),
        "columns": [_column(column) for column in columns],
        "first": first,
    }
    parts = {
        "title": html.escape(title),
        "atlas": data_uri(atlas),
        "data": _script(data),
        "photos": _script([base64.b64encode(picture.enlarged).decode() for picture in shown]),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda name: parts[name[1]], TEMPLATE.read_text(encoding="utf-8"))


def _column(column: Column) -> dict[str, Any]:
    found = colouring(column.values)
    entries = [dataclasses.asdict(entry) for entry in found.entries]
    return {"name": column.name, "values": column.values, "entries": entries, "of": found.of}


def _script(value: object) -> str:
    """JSON that is safe inside a script element."""
    text = json.dumps(value, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
