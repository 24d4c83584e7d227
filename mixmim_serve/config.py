"""Model configuration: frozen dataclasses, validated on construction, and the table of named sizes.

Free of torch, because the service, the engines and the command line read it too.
Sizes: Table 1 of arXiv 2205.13137, windows at 384 px from the official fine-tuning code; Swin: section 3.3 of
arXiv 2103.14030; PVT: Table 1 of arXiv 2102.12122.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from mixmim_serve.errors import MAX_QUOTED, ConfigError, quoted
from mixmim_serve.families import FAMILIES, Family

PATCH_SIZE = 4  # pixels on one side of a patch
STAGES = 4
UNIT_SIZE = PATCH_SIZE * 2 ** (STAGES - 1)  # 32 pixels: one token of the last stage, one cell of the mixing mask
MLP_RATIO = 4  # of the decoder; the encoder's are its family's
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


_LATER_FIELDS = ("family", "class_token")  # of Architecture: missing in earlier checkpoints and bundles


@dataclass(frozen=True)
class Architecture:
    """Everything needed to rebuild a network; `decoder` is None without a decoder, `num_classes` 0 without a head."""

    embed_dim: int  # channels of the first stage; later stages have their family's multiple of it
    depths: tuple[int, ...]  # blocks per stage
    heads: tuple[int, ...]  # attention heads per stage
    image_size: int = 224  # pixels on one side
    windows: tuple[int, ...] = ()  # tokens on one side of an attention window, per stage; () for the default
    decoder: DecoderConfig | None = None
    num_classes: int = 0
    family: str = "mixmim"  # a row of FAMILIES
    class_token: bool = False  # in the last stage; its output is then the embedding

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise unknown("family", str(self.family), FAMILIES)
        _require_positive(self, "embed_dim", "image_size")
        if self.image_size % UNIT_SIZE:
            raise ConfigError(
                f"image size {self.image_size} is not a multiple of {UNIT_SIZE}: "
                f"use {max(1, round(self.image_size / UNIT_SIZE)) * UNIT_SIZE}."
            )
        windows = tuple(self.windows) or self.facts.default_windows(self.grids)
        for name, value in (("depths", self.depths), ("heads", self.heads), ("windows", windows)):
            object.__setattr__(self, name, tuple(value))
            if (value or name != "windows") and (len(value) != STAGES or min(value) < 1):
                raise ConfigError(f"{name} must be {STAGES} positive numbers, one per stage, got {list(value)}.")
        if self.embed_dim % 4:
            raise ConfigError(f"embed dim {self.embed_dim} must be a multiple of 4 (2-D sine-cosine positions).")
        if self.num_classes < 0:
            raise ConfigError(f"num_classes must be 0 (no head) or positive, got {self.num_classes}.")
        for number, (dim, heads) in enumerate(zip(self.dims, self.heads, strict=True), start=1):
            if dim % heads:
                raise ConfigError(f"stage {number}: {dim} channels cannot be split over {heads} heads.")
        object.__setattr__(self, "windows", self.facts.fit_windows(self.grids, self.windows))
        self._check_class_token()

    def _check_class_token(self) -> None:
        if self.class_token and not self.facts.class_token:
            raise ConfigError(f"a {self.family} network has no class token: leave it out.")
        if self.class_token and self.decoder:
            raise ConfigError("pretraining leaves the class token out, which would see both images: set it to false.")

    @property
    def facts(self) -> Family:
        """What the family sets."""
        return FAMILIES[self.family]

    @property
    def dims(self) -> tuple[int, ...]:
        """Channels of each stage."""
        return tuple(self.embed_dim * width for width in self.facts.widths)

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

    def resized(self, image_size: int = 0, windows: tuple[int, ...] = ()) -> Architecture:
        """The same network at another input size, if given, with other windows, if given; one number is for all stages.

        Without windows it has its own at its own input size, and the defaults at another.
        """
        size, windows = image_size or self.image_size, tuple(windows)
        if not windows and size == self.image_size:
            return self
        return self.at(size, windows * STAGES if len(windows) == 1 else windows)

    def identity(self) -> dict[str, Any]:
        """What of it a fingerprint covers: fields that earlier versions lacked only where they are not the default."""
        values = dataclasses.asdict(self)
        later = {field.name: field.default for field in dataclasses.fields(self) if field.name in _LATER_FIELDS}
        return {name: value for name, value in values.items() if name not in later or value != later[name]}


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
        if _network(size) == _network(arch):
            candidates = [n for n in (name, f"{name}-{arch.image_size}") if n in _SIZES]
            for candidate in candidates:
                if _SIZES[candidate].image_size == arch.image_size:
                    return candidate
            return f"{name}@{arch.image_size}"
    return "custom"


def _network(arch: Architecture) -> tuple[object, ...]:
    """What makes a network this size and no other."""
    return arch.family, arch.embed_dim, arch.depths, arch.heads


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


_DECODER = DecoderConfig()
_SMALL_DECODER = DecoderConfig(128, 4, 4)
_SWIN_T, _SWIN_S, _PVT_HEADS = (3, 6, 12, 24), (2, 2, 18, 2), (1, 2, 5, 8)

_SIZES = {
    # Our own, for CPUs: the proportions of base with fewer channels; about 5 M encoder parameters.
    "tiny": Architecture(32, (2, 2, 8, 4), (1, 2, 4, 8), 128, decoder=_SMALL_DECODER),
    "base": Architecture(128, (2, 2, 18, 2), (4, 8, 16, 32), decoder=_DECODER),
    "base-384": Architecture(128, (2, 2, 18, 2), (4, 8, 16, 32), 384, decoder=_DECODER),
    "large": Architecture(192, (2, 2, 18, 2), (6, 12, 24, 48), decoder=_DECODER),
    "large-384": Architecture(192, (2, 2, 18, 2), (6, 12, 24, 48), 384, decoder=_DECODER),
    "huge": Architecture(352, (2, 2, 18, 2), (11, 22, 44, 88), decoder=_DECODER),
    # Our own, for CPUs: swin-tiny with a third of its channels, at 128 px with windows of 4 as at 224 px with 7.
    "swin-mini": Architecture(32, (2, 2, 6, 2), (1, 2, 4, 8), 128, decoder=_SMALL_DECODER, family="swin"),
    "swin-tiny": Architecture(96, (2, 2, 6, 2), _SWIN_T, decoder=_DECODER, family="swin"),
    "swin-small": Architecture(96, _SWIN_S, _SWIN_T, decoder=_DECODER, family="swin"),
    "swin-base": Architecture(128, _SWIN_S, (4, 8, 16, 32), decoder=_DECODER, family="swin"),
    "swin-base-384": Architecture(128, _SWIN_S, (4, 8, 16, 32), 384, decoder=_DECODER, family="swin"),
    "swin-large": Architecture(192, _SWIN_S, (6, 12, 24, 48), decoder=_DECODER, family="swin"),
    "swin-large-384": Architecture(192, _SWIN_S, (6, 12, 24, 48), 384, decoder=_DECODER, family="swin"),
    # Our own, for CPUs: pvt-tiny with half its channels.
    "pvt-mini": Architecture(32, (2, 2, 2, 2), _PVT_HEADS, 128, decoder=_SMALL_DECODER, family="pvt"),
    "pvt-tiny": Architecture(64, (2, 2, 2, 2), _PVT_HEADS, decoder=_DECODER, family="pvt"),
    "pvt-small": Architecture(64, (3, 4, 6, 3), _PVT_HEADS, decoder=_DECODER, family="pvt"),
    "pvt-medium": Architecture(64, (3, 4, 18, 3), _PVT_HEADS, decoder=_DECODER, family="pvt"),
    "pvt-large": Architecture(64, (3, 8, 27, 3), _PVT_HEADS, decoder=_DECODER, family="pvt"),
}
