"""HEIC through pillow-heif, the extra `heif`: whether it is installed, and decoding with it.

It is an extra of its own because its wheels hold x265, which is under the GPL (docs/decisions.md, 2026-11-25). The
package is imported with the first HEIC file.
"""

from __future__ import annotations

import functools
import importlib.util
from io import BytesIO
from typing import Any

from PIL import Image

from mixmim_serve.errors import UnsupportedImageError

SUFFIXES = (".heic", ".heif", ".hif")
EXTRA = "pip install 'mixmim-serve[heif]'"
LEAST_LIBHEIF = (1, 23, 4)  # older ones write beyond their memory for crafted files
PACKAGE = "pillow_heif"


@functools.cache
def is_installed() -> bool:
    """Whether pillow-heif is there; it is not imported."""
    return importlib.util.find_spec(PACKAGE) is not None


def require() -> None:
    """Check that HEIC can be read.

    Raises:
        UnsupportedImageError: pillow-heif is not installed.
    """
    if not is_installed():
        raise UnsupportedImageError(f"HEIC images are not read here: run {EXTRA}, or send a JPEG.")


@functools.cache
def load() -> Any:
    """The module, set to decode nothing but the image itself, in one thread.

    Raises:
        UnsupportedImageError: not installed, or with a libheif that has known holes.
    """
    require()
    import pillow_heif

    version = str(pillow_heif.libheif_version())
    if tuple(int(part) for part in version.split(".")[:3]) < LEAST_LIBHEIF:
        least = ".".join(map(str, LEAST_LIBHEIF))
        raise UnsupportedImageError(
            f"HEIC needs libheif {least} or newer, found {version}, which has known holes: run {EXTRA} --upgrade."
        )
    options = pillow_heif.options
    options.THUMBNAILS = options.DEPTH_IMAGES = options.AUX_IMAGES = False
    options.DECODE_THREADS = 1  # the decode lanes already use every core
    return pillow_heif


def decode(data: bytes) -> Image.Image:
    """The primary image of a HEIC file, upright: libheif applies the rotation and mirroring that the file asks for.

    Exif orientation is ignored, as the standard says: cameras write the same turn there a second time. More than 8 bits
    a channel become 8.
    """
    file = load().HeifFile(BytesIO(data), convert_hdr_to_8bit=True)
    image = file[file.primary_index]
    if not image.info.get("primary"):  # it is damaged, and the package has chosen another
        raise ValueError("no primary image")
    pixels = image.data  # decodes, and may correct the size
    return Image.frombytes(image.mode, image.size, pixels, "raw", image.mode, image.stride)
