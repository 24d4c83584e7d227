"""Model configuration: frozen dataclasses, validated on construction, and the table of named sizes.

Free of torch, because the service, the engines and the command line read it too.
Sizes: Table 1 of arXiv 2205.13137; windows at 384 px from the official fine-tuning code.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from mixmim_serve.errors import MAX_QUOTED, ConfigError, quoted

PATCH_SIZE = 4  # pixels on one side of a patch
STAGES = 4
UNIT_SIZE = PATCH_SIZE * 2 ** (STAGES - 1)  # 32 pixels: one token of the last stage, one cell of the mixing mask
MLP_RATIO = 4
TARGET_EPS = 1e-6  # added to a unit's variance when its pixels are normalised

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class DecoderConfig:
    """The pretraining decoder: plain ViT blocks over the units of one image."""

    dim: int = 512
    depth: int = 8
    heads: int = 16
    norm_eps: float = 1e-5  # 1e-6 in mmpretrain's implementation
    normalize_targets: bool = True  # predict pixels normalised per unit (`norm_pix_loss` in the official code)

    def __post_init__(self) -> None:
        _require_positive(self, "dim", "depth", "heads")
        if self.dim % self.heads or self.dim % 4:
            raise ConfigError(f"decoder dim {self.dim} must be a multiple of its {self.heads} heads and of 4.")


@dataclass(frozen=True)
class Architecture:
    """Everything needed to rebuild a network; `decoder` is None without a decoder, `num_classes` 0 without a head."""

    embed_dim: int  # channels of the first stage; each later stage has twice as many
    depths: tuple[int, ...]  # blocks per stage
    heads: tuple[int, ...]  # attention heads per stage
    image_size: int = 224  # pixels on one side
    windows: tuple[int, ...] = ()  # tokens on one side of an attention window, per stage; () for the default
    decoder: DecoderConfig | None = None
    num_classes: int = 0

    def __post_init__(self) -> None:
        _require_positive(self, "embed_dim", "image_size")
        if self.image_size % UNIT_SIZE:
            raise ConfigError(
                f"image size {self.image_size} is not a multiple of {UNIT_SIZE}: "
                f"use {max(1, round(self.image_size / UNIT_SIZE)) * UNIT_SIZE}."
            )
        windows = tuple(self.windows) or default_windows(self.image_size)
        for name, value in (("depths", self.depths), ("heads", self.heads), ("windows", windows)):
            object.__setattr__(self, name, tuple(value))
            if len(value) != STAGES or min(value) < 1:
                raise ConfigError(f"{name} must be {STAGES} positive numbers, one per stage, got {list(value)}.")
        if self.embed_dim % 4:
            raise ConfigError(f"embed dim {self.embed_dim} must be a multiple of 4 (2-D sine-cosine positions).")
        if self.num_classes < 0:
            raise ConfigError(f"num_classes must be 0 (no head) or positive, got {self.num_classes}.")
        self._check_stages()

    def _check_stages(self) -> None:
        stages = zip(self.dims, self.heads, self.grids, self.windows, strict=True)
        for number, (dim, heads, grid, window) in enumerate(stages, start=1):
            if dim % heads:
                raise ConfigError(f"stage {number}: {dim} channels cannot be split over {heads} heads.")
            if window < grid and grid % window:
                raise ConfigError(
                    f"stage {number}: a window of {window} does not divide its grid of {grid} tokens: "
                    f"use one of {_divisors(grid)}."
                )

    @property
    def dims(self) -> tuple[int, ...]:
        """Channels of each stage."""
        return tuple(self.embed_dim * 2**stage for stage in range(STAGES))

    @property
    def grids(self) -> tuple[int, ...]:
        """Tokens on one side of each stage's grid."""
        return tuple(self.image_size // PATCH_SIZE // 2**stage for stage in range(STAGES))

    @property
    def embedding_size(self) -> int:
        """Length of the pooled embedding: the channels of the last stage."""
        return self.dims[-1]

    @property
    def units(self) -> int:
        """Cells of the mixing mask (32 x 32 pixels each)."""
        return self.grids[-1] ** 2

    def at(self, image_size: int, windows: tuple[int, ...] = ()) -> Architecture:
        """The same network for another input size, with the default windows of that size unless given."""
        return dataclasses.replace(self, image_size=image_size, windows=windows)


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes network input; stored in checkpoint and bundle."""

    image_size: int = 224  # pixels on one side after the centre crop
    resize_size: int = 256  # pixels on the shorter side before the crop
    mean: tuple[float, ...] = IMAGENET_MEAN  # of pixels in [0, 1], RGB
    std: tuple[float, ...] = IMAGENET_STD

    def __post_init__(self) -> None:
        object.__setattr__(self, "mean", tuple(self.mean))
        object.__setattr__(self, "std", tuple(self.std))
        _require_positive(self, "image_size", "resize_size")
        if self.resize_size < self.image_size:
            raise ConfigError(
                f"resize size {self.resize_size} is smaller than the crop of {self.image_size}: increase it."
            )
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ConfigError("mean and std must be three numbers each, with std above 0.")

    @classmethod
    def evaluation(cls, image_size: int) -> Preprocessing:
        """The official code's evaluation rule: crop ratio 224/256 up to 224 px, 1.0 above."""
        resize = int(image_size * 256 / 224) if image_size <= 224 else image_size
        return cls(image_size=image_size, resize_size=resize)


def units_from_partner(units: int, ratio: float, advice: str = "choose one between 0 and 1") -> int:
    """Number of mask units that come from the partner image: `int(units * ratio)`, as in the official code.

    Raises:
        ConfigError: when that is no unit, or all of them.
    """
    count = int(units * ratio)
    if not 0 < count < units:
        raise ConfigError(f"a mask ratio of {ratio} takes {count} of {units} units: {advice}.")
    return count


def default_windows(image_size: int) -> tuple[int, ...]:
    """Window per stage: the divisor of its grid nearest (as a ratio) to 16 tokens in stages 1 and 2, to 24 after.

    Gives the published windows at 224 px (14, 14, 14, 7) and 384 px (16, 16, 24, 12).
    """
    grids = [image_size // PATCH_SIZE // 2**stage for stage in range(STAGES)]
    return tuple(_nearest_divisor(grid, 16 if stage < 2 else 24) for stage, grid in enumerate(grids))


def architecture(name: str, *, num_classes: int = 0, with_decoder: bool = True) -> Architecture:
    """The named size as an `Architecture`.

    Raises:
        ConfigError: for an unknown name, listing the valid ones.
    """
    if name not in _SIZES:
        raise unknown("size", name, _SIZES)
    size = _SIZES[name]
    return dataclasses.replace(size, num_classes=num_classes, decoder=size.decoder if with_decoder else None)


def unknown(kind: str, name: str, choices: Iterable[str]) -> ConfigError:
    """The error for a name that is not among `choices`; its message lists them and suggests the closest."""
    names = list(choices)
    closest = difflib.get_close_matches(name[:MAX_QUOTED], names, n=1)
    hint = f" Did you mean {closest[0]}?" if closest else ""
    return ConfigError(f"unknown {kind} {quoted(name)}: choose one of {', '.join(names)}.{hint}")


def size_names() -> tuple[str, ...]:
    """The named sizes, smallest first."""
    return tuple(_SIZES)


def size_name(arch: Architecture) -> str:
    """The name of this encoder's size, such as `base`, at another input size `base@320`; `custom` if it has none."""
    for name, size in _SIZES.items():
        if (size.embed_dim, size.depths, size.heads) == (arch.embed_dim, arch.depths, arch.heads):
            candidates = [n for n in (name, f"{name}-{arch.image_size}") if n in _SIZES]
            for candidate in candidates:
                if _SIZES[candidate].image_size == arch.image_size:
                    return candidate
            return f"{name}@{arch.image_size}"
    return "custom"


def architecture_from_dict(values: Mapping[str, Any]) -> Architecture:
    """The inverse of `dataclasses.asdict`.

    Raises:
        ConfigError: for unknown or missing keys.
    """
    fields = dict(values)
    decoder = fields.pop("decoder", None)
    try:
        return Architecture(**fields, decoder=DecoderConfig(**decoder) if decoder else None)
    except TypeError as error:
        raise ConfigError(f"invalid architecture: {error}.") from error


def preprocessing_from_dict(values: Mapping[str, Any]) -> Preprocessing:
    """The inverse of `dataclasses.asdict`.

    Raises:
        ConfigError: for unknown keys.
    """
    try:
        return Preprocessing(**values)
    except TypeError as error:
        raise ConfigError(f"invalid preprocessing: {error}.") from error


def _require_positive(config: object, *names: str) -> None:
    for name in names:
        if getattr(config, name) < 1:
            raise ConfigError(f"{name} must be at least 1, got {getattr(config, name)}.")


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def _nearest_divisor(number: int, target: int) -> int:
    return min(_divisors(number), key=lambda d: abs(math.log(d / target)))


_SIZES = {
    # Our own, for CPUs: the proportions of base with fewer channels; about 5 M encoder parameters.
    "tiny": Architecture(32, (2, 2, 8, 4), (1, 2, 4, 8), 128, decoder=DecoderConfig(128, 4, 4)),
    "base": Architecture(128, (2, 2, 18, 2), (4, 8, 16, 32), decoder=DecoderConfig()),
    "base-384": Architecture(128, (2, 2, 18, 2), (4, 8, 16, 32), 384, decoder=DecoderConfig()),
    "large": Architecture(192, (2, 2, 18, 2), (6, 12, 24, 48), decoder=DecoderConfig()),
    "large-384": Architecture(192, (2, 2, 18, 2), (6, 12, 24, 48), 384, decoder=DecoderConfig()),
    "huge": Architecture(352, (2, 2, 18, 2), (11, 22, 44, 88), decoder=DecoderConfig()),
}
