"""Pages of pictures: one HTML file each, thumbnails inside, nothing fetched from anywhere."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO

from PIL import Image

from mixmim_serve.cores import usable_cores
from mixmim_serve.errors import DataError, ImageError
from mixmim_serve.explore.map import MapLayout
from mixmim_serve.extract.features import FeatureFolder
from mixmim_serve.preprocess import decode, jpeg_reduction
from mixmim_serve.sources import open_source

THUMBNAIL = 160  # pixels, the longer side
ON_MAP = 48  # pixels, a square
COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bbbbbb")  # Paul Tol's bright scheme

_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"/><title>{title}</title>
<style>
body {{ font: 14px/1.4 system-ui, sans-serif; margin: 2rem; color: #222; }}
h1 {{ font-size: 1.3rem; }} h2 {{ font-size: 1rem; margin: 1.5rem 0 .5rem; }}
section {{ display: flex; flex-wrap: wrap; gap: .8rem; }}
figure {{ margin: 0; width: {width}px; }} figure img {{ display: block; max-width: 100%; }}
figcaption {{ font-size: .75rem; overflow-wrap: anywhere; color: #555; }}
{style}
</style></head><body><h1>{title}</h1>
{body}
</body></html>
"""

_MAP_STYLE = """
#map {{ position: relative; width: min(88vw, 1400px); aspect-ratio: 1; overflow: hidden; border: 1px solid #ccc; }}
#map i {{ position: absolute; width: {side}px; height: {side}px; margin: -{half}px; border-radius: 3px;
  background-image: url({atlas}); }}
#map i:hover {{ transform: scale(2.5); z-index: 2; }}
"""

# The places are kept as left and top in per cent; zooming moves them, the pictures keep their size.
_MAP_SCRIPT = """<script>
const map = document.getElementById("map"), dots = [...map.children].map(dot =>
  [dot, parseFloat(dot.style.left), parseFloat(dot.style.top)]);
let zoom = 1, x = 0, y = 0, held = null;
const draw = () => { for (const [dot, left, top] of dots) {
  dot.style.left = (left - x) * zoom + "%"; dot.style.top = (top - y) * zoom + "%"; } };
map.addEventListener("wheel", event => { event.preventDefault();
  const box = map.getBoundingClientRect(), factor = Math.exp(-event.deltaY / 500);
  const at = [(event.clientX - box.left) / box.width * 100, (event.clientY - box.top) / box.height * 100];
  const before = zoom; zoom = Math.min(40, Math.max(1, zoom * factor));
  x += at[0] / before - at[0] / zoom; y += at[1] / before - at[1] / zoom; draw(); }, { passive: false });
map.addEventListener("pointerdown", event => { held = [event.clientX, event.clientY]; });
addEventListener("pointerup", () => { held = null; });
addEventListener("pointermove", event => { if (!held) return;
  const box = map.getBoundingClientRect();
  x -= (event.clientX - held[0]) / box.width * 100 / zoom; y -= (event.clientY - held[1]) / box.height * 100 / zoom;
  held = [event.clientX, event.clientY]; draw(); });
</script>"""


@dataclass(frozen=True)
class Picture:
    """One image of a page."""

    data: str  # a data URI
    caption: str


def pictures(features: FeatureFolder, found: Sequence[tuple[str, float]]) -> list[Picture]:
    """Of keys and cosines, in order; see `thumbnails`."""
    small = thumbnails(features, [key for key, _ in found])
    return [Picture(data_uri(small[key]), f"{cosine:.4f} {key}") for key, cosine in found]


def thumbnails(features: FeatureFolder, keys: Iterable[str], square: int = 0) -> dict[str, Image.Image]:
    """Small pictures of some images, read again from the source; those that cannot be read are grey.

    `square`: cut to a square of so many pixels; else at most `THUMBNAIL` wide and high.

    Raises:
        DataError: the source is not where it was.
    """
    wanted = set(keys)
    source = open_source(features.manifest["source"]["name"])
    found = [index for index, key in enumerate(source.keys) if key in wanted]
    if not found:
        raise DataError(f"{source.name} holds none of these images: bring back the source of the features.")

    def small(index: int) -> Image.Image:
        try:
            image = decode(source.read(index), reduction=lambda *size: jpeg_reduction(min(size), 2 * THUMBNAIL))
        except ImageError:
            return _missing(square)
        return shrink(image, square)

    with ThreadPoolExecutor(usable_cores()) as pool:
        made = dict(zip((source.keys[index] for index in found), pool.map(small, found), strict=True))
    return {key: made.get(key) or _missing(square) for key in wanted}


def shrink(image: Image.Image, square: int = 0) -> Image.Image:
    """At most `THUMBNAIL` wide and high; or the middle, as a square of so many pixels."""
    if not square:
        image.thumbnail((THUMBNAIL, THUMBNAIL))
        return image
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.resize((square, square), box=(left, top, left + side, top + side))


def data_uri(image: Image.Image) -> str:
    """The image inside an address."""
    buffer = BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def gallery(title: str, sections: Sequence[tuple[str, Sequence[Picture]]]) -> str:
    """A page of headings with pictures below."""
    body = []
    for heading, pictures in sections:
        figures = "\n".join(
            f'<figure><img src="{each.data}" alt="{html.escape(each.caption)}"/>'
            f"<figcaption>{html.escape(each.caption)}</figcaption></figure>"
            for each in pictures
        )
        body.append(f"<h2>{html.escape(heading)}</h2>\n<section>{figures}</section>")
    return _PAGE.format(title=html.escape(title), width=THUMBNAIL, style="", body="\n".join(body))


def map_page(title: str, found: MapLayout, small: Mapping[str, Image.Image]) -> str:
    """A page with every picture at its place; the wheel zooms, dragging moves, a picture tells its key.

    Frames are coloured by the first folder of the keys, where there are at most as many as colours.
    """
    across = max(1, int(len(found.keys) ** 0.5))
    atlas = Image.new("RGB", (across * ON_MAP, -(-len(found.keys) // across) * ON_MAP))
    folders = sorted({_folder(key) for key in found.keys})
    colours = dict(zip(folders, COLOURS, strict=False)) if 1 < len(folders) <= len(COLOURS) else {}
    dots = []
    for number, (key, (x, y)) in enumerate(zip(found.keys, found.places, strict=True)):
        left, top = number % across * ON_MAP, number // across * ON_MAP
        atlas.paste(small[key], (left, top))
        frame = f"outline:2px solid {colours[_folder(key)]};" if colours else ""
        place = f"left:{2 + 96 * x:.2f}%;top:{2 + 96 * y:.2f}%"
        dots.append(f'<i style="{place};{frame}background-position:-{left}px -{top}px" title="{html.escape(key)}"></i>')
    legend = " ".join(
        f'<span style="color:{colour}">&#9632; {html.escape(name)}</span>' for name, colour in colours.items()
    )
    body = f'<p>{legend}</p>\n<div id="map">{"".join(dots)}</div>\n{_MAP_SCRIPT}'
    style = _MAP_STYLE.format(side=ON_MAP, half=ON_MAP // 2, atlas=data_uri(atlas))
    return _PAGE.format(title=html.escape(title), width=THUMBNAIL, style=style, body=body)


def _folder(key: str) -> str:
    return key.partition("/")[0] if "/" in key else ""


def _missing(square: int) -> Image.Image:
    return Image.new("RGB", (square or THUMBNAIL,) * 2, "#cccccc")
