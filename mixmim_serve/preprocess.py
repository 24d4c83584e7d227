"""Image bytes to network input: the project's only evaluation preprocessing.

    bytes --decode--> upright RGB image --resize_and_crop--> uint8 HWC (--normalize--> float32 CHW)

Exported graphs take the uint8 array and normalise it themselves, bit-identically; torch takes what `normalize` returns.

How `decode` converts each pixel mode (of the first frame of an animation, the first page of a TIFF):

    1, L, P, YCbCr, LAB     Pillow's conversion to RGB
    CMYK                    Pillow's plain formula, Adobe's inversion undone; ICC profiles are ignored
    alpha, transparency     dropped, not blended: the stored colour stays, as in torchvision's `convert("RGB")`
    16 bits per channel     the high byte; for grey too, which Pillow alone clips to white; of 12 bits the top 8
    32-bit integer, float   no white point is defined: the lowest finite value becomes 0, the highest 255

EXIF orientation is applied when it can be read and ignored otherwise; HEIC has a rotation of its own, which is applied
instead. Every rejected image raises an `ImageError`.
Pillow's global settings stay untouched, so any number of threads may decode at once. Decoding `MAX_PIXELS` takes at
least 4 bytes per pixel (256 MB), and up to four times as much for WebP.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image
from PIL.TiffImagePlugin import BITSPERSAMPLE, TiffImageFile

from mixmim_serve import heif
from mixmim_serve.config import Preprocessing
from mixmim_serve.containers import MAX_PIXELS, Container, inspect
from mixmim_serve.errors import ImageError, ImageTooLargeError, UndecodableImageError

MAX_IMAGE_BYTES = 20_000_000

_TRANSPOSE = {  # EXIF 2.3, tag 0x0112: the transposition to upright; 1 is upright, others are invalid
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SWAPPING = tuple(_TRANSPOSE[orientation] for orientation in (5, 6, 7, 8))  # swap width and height

_MAX_RESIZED_SIDE = 8192  # pixels; above it only the crop is resized

Pixels = NDArray[np.uint8]
Values = NDArray[np.float32]


def preprocess(data: bytes, preprocessing: Preprocessing) -> Pixels:
    """Encoded image -> engine input, uint8 RGB (size, size, 3).

    Raises:
        ImageError: the image is rejected; see `decode`.
    """
    return resize_and_crop(decode(data), preprocessing)


def decode(
    data: bytes,
    *,
    max_bytes: int = MAX_IMAGE_BYTES,
    max_pixels: int = MAX_PIXELS,
    reduction: Callable[[int, int], int] | None = None,
    container: Container | None = None,
) -> Image.Image:
    """Encoded image -> upright RGB image, 8 bits per channel, without metadata; see the module for each pixel mode.

    `reduction` takes the upright width and height of a JPEG and returns the factor (1, 2, 4 or 8) by which the decoder
    may shrink it, several times faster than decoding it in full. Other formats are decoded in full. `container` is what
    `containers.inspect` says of the file, if that is known already.

    Raises:
        ImageTooLargeError: more bytes, or according to its header more pixels, than the limits (Pillow's own limit of
            178 megapixels applies as well).
        UnsupportedImageError: not an image of `containers.ACCEPTED_FORMATS`.
        UndecodableImageError: empty, truncated or damaged.
    """
    _check_bytes(data, max_bytes)
    container = container or inspect(data, max_pixels)
    try:
        if container.format == "HEIC":
            return _to_rgb(heif.decode(data))
        image = _open(data, container)
        if reduction is not None and container.format == "JPEG":
            _shrink(image, reduction)
        image.load()
        return _to_rgb(_upright(image))
    except ImageError:
        raise
    except Exception as error:  # Pillow and its plugins raise a dozen classes for bad files, struct.error among them
        raise _refusal(error, container.format, max_pixels) from error


def resize_and_crop(image: Image.Image, preprocessing: Preprocessing) -> Pixels:
    """RGB image -> uint8 (size, size, 3): shorter side to `resize_size`, then the centre.

    Bit-equal to torchvision's `Resize(resize_size, BICUBIC)` (antialiased) and `CenterCrop(image_size)` on PIL images.
    Of an image so elongated that its longer side would exceed `_MAX_RESIZED_SIDE` only the crop is resized: the same
    filter at the same positions, in memory independent of the length. Pillow may then filter columns before rows, so
    rounding (2 of 255) and the clipping of overshoot between the passes differ.
    """
    short = min(image.size)
    width, height = (int(preprocessing.resize_size * side / short) for side in image.size)
    size = preprocessing.image_size
    left, top = round((width - size) / 2), round((height - size) / 2)
    right, bottom = left + size, top + size
    if max(width, height) <= _MAX_RESIZED_SIDE:
        resized = image.resize((width, height), Image.Resampling.BICUBIC)
        return np.array(resized.crop((left, top, right, bottom)))
    full_width, full_height = image.size
    box = (
        left * full_width / width,
        top * full_height / height,
        right * full_width / width,
        bottom * full_height / height,
    )
    return np.array(image.resize((size, size), Image.Resampling.BICUBIC, box=box))


def normalize(pixels: Pixels, preprocessing: Preprocessing) -> Values:
    """uint8 (H, W, 3) -> contiguous float32 (3, H, W): scaled to [0, 1], minus mean, divided by std."""
    values = np.ascontiguousarray(pixels.transpose(2, 0, 1), dtype=np.float32)
    values /= 255
    values -= _per_channel(preprocessing.mean)
    values /= _per_channel(preprocessing.std)
    return values


def denormalize(values: Values, preprocessing: Preprocessing) -> Pixels:
    """float32 (3, H, W) -> uint8 (H, W, 3), rounded and clipped: network input or output as a picture."""
    scaled = (values * _per_channel(preprocessing.std) + _per_channel(preprocessing.mean)) * 255
    return np.ascontiguousarray(scaled.round().clip(0, 255).astype(np.uint8).transpose(1, 2, 0))


def read_limited(path: str | os.PathLike[str], max_bytes: int = MAX_IMAGE_BYTES) -> bytes:
    """The bytes of an image file.

    Raises:
        ImageTooLargeError: larger than `max_bytes`; at most one more byte is read.
        ImageError: missing, not a regular file (a pipe would block), or not readable.
    """
    file = Path(path)
    try:
        if file.exists() and not file.is_file():
            raise ImageError(f"cannot read {path}: it is not a file.")
        with file.open("rb") as opened:
            data = opened.read(max_bytes + 1)
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        reason = getattr(error, "strerror", None) or "not a file name"
        raise ImageError(f"cannot read {path}: {reason.lower()}.") from error
    if len(data) > max_bytes:
        raise ImageTooLargeError(f"{path} is larger than the limit of {max_bytes:,} bytes: make it smaller.")
    return data


def _check_bytes(data: bytes, max_bytes: int) -> None:
    if len(data) > max_bytes:
        raise ImageTooLargeError(f"the image has {len(data):,} bytes, the limit is {max_bytes:,}: send a smaller one.")


def _open(data: bytes, container: Container) -> Image.Image:
    """Read the header with Pillow, which must find no more pixels than the limits were checked for."""
    image = Image.open(BytesIO(data), formats=(container.format,))
    if image.width * image.height > container.width * container.height:
        raise UndecodableImageError(
            f"the {container.format} image has several sizes, of which the decoder takes the largest: save it again."
        )
    return image


def jpeg_reduction(short: int, least: float) -> int:
    """The largest factor by which the decoder may shrink a JPEG so that `short` pixels keep at least `least`."""
    return max(factor for factor in (1, 2, 4, 8) if factor == 1 or short >= factor * least)


def _shrink(image: Image.Image, reduction: Callable[[int, int], int]) -> None:
    """Decode a JPEG at a fraction of its size."""
    width, height = image.size
    swapped = _orientation(image) in _SWAPPING
    factor = reduction(*((height, width) if swapped else (width, height)))
    if factor > 1:
        image.draft(None, (max(1, width // factor), max(1, height // factor)))


def _orientation(image: Image.Image) -> Image.Transpose | None:
    try:
        return _TRANSPOSE.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged EXIF raises as many classes as a damaged image
        return None


def _upright(image: Image.Image) -> Image.Image:
    method = _orientation(image)  # after load(): PNG stores EXIF behind the pixels, and TIFF transposes itself
    image.info.clear()  # else convert() warns about transparency, and metadata stays in memory
    return image if method is None else image.transpose(method)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode in ("RGBa", "La"):  # a HEIC image whose colours were multiplied with its transparency
        return image.convert(image.mode.upper()).convert("RGB")
    if image.mode.startswith("I;16"):
        # Pillow leaves 12-bit TIFF values at 0..4095; the image is still a TiffImageFile, since TIFF transposes itself.
        twelve = isinstance(image, TiffImageFile) and image.tag_v2.get(BITSPERSAMPLE) == (12,)
        image = Image.fromarray((np.asarray(image) >> (4 if twelve else 8)).astype(np.uint8))
    elif image.mode in ("I", "F"):
        image = Image.fromarray(_stretch(np.array(image, dtype=np.float32)))
    return image.convert("RGB")


def _stretch(values: Values) -> Pixels:
    """float32 (H, W), altered in place -> uint8: lowest finite value to 0, highest to 255, NaN to 0."""
    finite = np.isfinite(values)
    low, high = values.min(where=finite, initial=np.inf), values.max(where=finite, initial=-np.inf)
    with np.errstate(all="ignore"):  # no range, or one beyond float32: all become 0
        np.subtract(values, low, out=values)
        np.multiply(values, 255 / (high - low), out=values)
        np.nan_to_num(values, copy=False, posinf=255, neginf=0)
        return values.round(out=values).clip(0, 255, out=values).astype(np.uint8)


def _refusal(error: Exception, name: str, max_pixels: int) -> ImageError:
    if isinstance(
        error, (Image.DecompressionBombError, Image.DecompressionBombWarning)
    ):  # a warning may be raised as an error
        return ImageTooLargeError(
            f"the {name} image has more than the limit of {max_pixels:,} pixels: send a smaller one."
        )
    if isinstance(error, MemoryError):
        return ImageTooLargeError(f"the {name} image needs more memory than is available: send a smaller one.")
    if "truncated" in str(error).lower():
        return UndecodableImageError(f"the {name} image is truncated: send the complete file.")
    return UndecodableImageError(f"the {name} image is damaged, incomplete or of a rare variant: save it again as PNG.")


def _per_channel(values: tuple[float, ...]) -> Values:
    return np.array(values, np.float32)[:, None, None]
