"""HTML pages of pictures, each a single file with embedded thumbnails and no external resources."""

from __future__ import annotations

import base64
import html
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from typing import TypeVar

from PIL import Image

from mixmim_serve.cores import usable_cores
from mixmim_serve.errors import DataError, ImageError
from mixmim_serve.extract.features import FeatureFolder
from mixmim_serve.preprocess import decode, jpeg_reduction
from mixmim_serve.sources import open_source

THUMBNAIL = 160  # pixels on the longer side

Made = TypeVar("Made")

_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"/><meta name="viewport" content="width=device-width, initial-scale=1"/>
<title>{title}</title>
<style>
body {{ font: 14px/1.4 system-ui, sans-serif; margin: clamp(.75rem, 3vw, 2rem); color: #222; background: #fff; }}
h1 {{ font-size: 1.3rem; }} h2 {{ font-size: 1rem; margin: 1.5rem 0 .5rem; }} p {{ max-width: 70ch; }}
section {{ display: flex; flex-wrap: wrap; gap: .8rem; }}
figure {{ margin: 0; width: {width}px; }} figure img {{ display: block; max-width: 100%; }}
figcaption {{ font-size: .75rem; overflow-wrap: anywhere; color: #555; }}
.warning {{ border-left: 4px solid #b35900; padding: .4rem .8rem; background: #fff4e5; }}
.histogram {{ display: block; width: 100%; max-width: 640px; font-size: 12px; fill: #444; }}
.histogram .below {{ fill: #999; }} .histogram .above {{ fill: #b35900; }}
.histogram .axis {{ stroke: #444; }} .histogram line.threshold {{ stroke: #222; stroke-dasharray: 4 3; }}
</style></head><body><h1>{title}</h1>
{body}
</body></html>
"""


@dataclass(frozen=True)
class Picture:
    """One image on a page."""

    data: str  # a data URI
    caption: str


def pictures(features: FeatureFolder, matches: Sequence[tuple[str, float]]) -> list[Picture]:
    """Pictures of these keys, captioned with their cosines; see `thumbnails`."""
    images = thumbnails(features, [key for key, _ in matches])
    return [Picture(data_uri(images[key]), f"{cosine:.4f} {key}") for key, cosine in matches]


def thumbnails(features: FeatureFolder, keys: Iterable[str]) -> dict[str, Image.Image]:
    """Thumbnails of these images by key; see `from_images`."""
    return from_images(features, keys, shrink)


def from_images(
    features: FeatureFolder, keys: Iterable[str], make: Callable[[Image.Image], Made], side: int = THUMBNAIL
) -> dict[str, Made]:
    """What `make` makes of each of these images, by key; they are read from the source, grey if they cannot be.

    Large JPEGs are decoded at a fraction of their size, with at least `side` pixels on the shorter side.

    Raises:
        DataError: the source of the features is gone.
    """
    wanted = set(keys)
    source = open_source(features.manifest["source"]["name"])
    indices = [index for index, key in enumerate(source.keys) if key in wanted]
    if not indices:
        raise DataError(f"{source.name} has none of these images: restore the source of the features.")

    def read(index: int) -> Made:
        try:
            image = decode(source.read(index), reduction=lambda *size: jpeg_reduction(min(size), 2 * side))
        except ImageError:
            image = _missing()
        return make(image)

    with ThreadPoolExecutor(usable_cores()) as pool:
        made = dict(zip((source.keys[index] for index in indices), pool.map(read, indices), strict=True))
    return {key: made[key] if key in made else make(_missing()) for key in wanted}


def shrink(image: Image.Image, side: int = THUMBNAIL) -> Image.Image:
    """Shrink to at most `side` pixels wide and high."""
    image.thumbnail((side, side))
    return image


def crop_square(image: Image.Image, side: int) -> Image.Image:
    """The centre of an image, as a square of `side` pixels."""
    least = min(image.size)
    left, top = (image.width - least) // 2, (image.height - least) // 2
    return image.resize((side, side), box=(left, top, left + least, top + least))


def data_uri(image: Image.Image) -> str:
    """The image as a JPEG data URI."""
    return "data:image/jpeg;base64," + base64.b64encode(jpeg(image)).decode()


def jpeg(image: Image.Image) -> bytes:
    """The image as a JPEG."""
    buffer = BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return buffer.getvalue()


def gallery(title: str, sections: Sequence[tuple[str, Sequence[Picture]]], intro: str = "") -> str:
    """A page of sections, each a heading with pictures, below an introduction in HTML."""
    body = [intro] if intro else []
    for heading, pictures in sections:
        figures = "\n".join(
            f'<figure><img src="{picture.data}" alt="{html.escape(picture.caption)}"/>'
            f"<figcaption>{html.escape(picture.caption)}</figcaption></figure>"
            for picture in pictures
        )
        body.append(f"<h2>{html.escape(heading)}</h2>\n<section>{figures}</section>")
    return _PAGE.format(title=html.escape(title), width=THUMBNAIL, body="\n".join(body))


def _missing() -> Image.Image:
    return Image.new("RGB", (THUMBNAIL, THUMBNAIL), "#cccccc")
