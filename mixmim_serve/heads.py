"""Classification heads of a bundle: class names and a small matrix over the encoder's outputs, each under a name.

`main` is the head that the network was exported with: its logits are an output of the encoder graph. Named heads are
fitted to frozen features afterwards (`mixmim head`). They lie in one file of the bundle and are multiplied here, not in
the graphs: the product takes microseconds, any engine can serve a new head at once, and neither the model fingerprint
nor certificates change with it.

heads-SHA.safetensors    `NAME.weight` (classes, F) and `NAME.bias` (classes,), float32; the metadata key `heads` holds
                         names, classes, inputs and provenance as JSON

The file is named after its content, and config.json lists it: a bundle has its old heads or its new ones, whenever it
is read.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from mixmim_serve.bundle import HEADS, STAGE_OUTPUTS, Bundle, canonical_json, check_target, open_bundle
from mixmim_serve.config import Architecture, unknown
from mixmim_serve.errors import BundleError, ConfigError, quoted
from mixmim_serve.files import atomic_folder, atomic_path
from mixmim_serve.strict_json import parse_json

Floats = NDArray[np.float32]

MAIN = "main"  # the head inside the network
INPUTS = ("embedding", *STAGE_OUTPUTS)  # encoder outputs that a named head may read; of a stage, the mean over places
FORMAT = 1  # increased when an older reader would misread the file
METADATA_KEY = "heads"
MAX_HEADS = 64  # in a bundle
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,39}")


@dataclass(frozen=True, eq=False)
class Head:
    """One head. `weight` and `bias` are None for `main`, whose logits the engine computes."""

    name: str
    classes: tuple[str, ...]  # in the order of the logits
    inputs: tuple[str, ...]  # encoder outputs that it reads, in the order of the weight's columns
    about: Mapping[str, Any] = field(default_factory=dict)  # JSON values: `accuracy` in percent, and where it is from
    weight: Floats | None = None  # (classes, F)
    bias: Floats | None = None  # (classes,)

    def logits(self, outputs: Mapping[str, Floats]) -> Floats:
        """Logits (classes,) of one image, from its encoder outputs; the same to the last bit in any batch."""
        if self.weight is None or self.bias is None:
            return outputs[self.inputs[0]]
        return self.weight @ pooled(outputs, self.inputs) + self.bias

    @property
    def is_main(self) -> bool:
        """Whether the head is part of the network."""
        return self.weight is None

    @property
    def identity(self) -> dict[str, str]:
        """What an answer says of the head; nothing for `main`, whose answers are older than names."""
        return {} if self.is_main else {"head": self.name}

    @property
    def fingerprint(self) -> str:
        """128 bits, in hex, of classes, inputs and weights; empty for `main`, which the model fingerprint covers."""
        if self.weight is None or self.bias is None:
            return ""
        digest = hashlib.sha256(canonical_json([self.classes, self.inputs]))
        digest.update(np.ascontiguousarray(self.weight).data)
        digest.update(np.ascontiguousarray(self.bias).data)
        return digest.hexdigest()[:32]

    def describe(self) -> dict[str, Any]:
        """Everything but the weights, as JSON values."""
        return {"name": self.name, "classes": list(self.classes), "inputs": list(self.inputs), **self.about}


@dataclass(frozen=True, eq=False)
class Heads:
    """The heads of one bundle by name, `main` first; `default` is empty where there are none."""

    by_name: Mapping[str, Head]
    default: str

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all heads."""
        return tuple(self.by_name)

    def require(self) -> None:
        """Check that there is a head.

        Raises:
            BundleError: when there is none.
        """
        if not self.by_name:
            raise BundleError(
                "this model has no classification head: fit one to labelled images with `mixmim head`, fine-tune the "
                "model on them, or use its embeddings."
            )

    def choose(self, name: str = "") -> Head:
        """The head of this name, or the default one.

        Raises:
            BundleError: when there is no head at all.
            ConfigError: for an unknown name, listing those that exist.
        """
        self.require()
        if (name or self.default) not in self.by_name:
            raise unknown("head", name, self.names)
        return self.by_name[name or self.default]

    def describe(self) -> list[dict[str, Any]]:
        """All heads as JSON values, the default one marked."""
        return [
            {"default": head.name == self.default, **head.describe(), "fingerprint": head.fingerprint}
            for head in self.by_name.values()
        ]

    def plus(self, head: Head, *, default: bool = False) -> Heads:
        """These heads and another, in place of one with its name; the first of a bundle becomes the default."""
        chosen = head.name if default or not self.default else self.default
        return Heads({**self.by_name, head.name: head}, chosen)

    def with_default(self, name: str) -> Heads:
        """These heads with another default.

        Raises:
            ConfigError: for an unknown name.
        """
        return Heads(self.by_name, self.choose(name).name)

    def minus(self, name: str) -> Heads:
        """These heads without one; if it was the default, the first of the others is.

        Raises:
            ConfigError: for an unknown name, or `main`, which is part of the network.
        """
        if self.choose(name).is_main:
            raise ConfigError(f"{MAIN} is part of the network and cannot be removed: set another head as the default.")
        rest = {other: head for other, head in self.by_name.items() if other != name}
        return Heads(rest, self.default if self.default != name else next(iter(rest), ""))


def pooled(outputs: Mapping[str, Floats], inputs: Iterable[str]) -> Floats:
    """One vector (F,) per image: the embedding (D,) as it is, stages (D, H, W) as their mean over places, joined."""
    vectors = [outputs[name] if outputs[name].ndim == 1 else outputs[name].mean(axis=(1, 2)) for name in inputs]
    return vectors[0] if len(vectors) == 1 else np.concatenate(vectors)


def input_size(arch: Architecture, inputs: Iterable[str]) -> int:
    """Length of the vector that `pooled` gives."""
    sizes = dict(zip(INPUTS, (arch.embedding_size, *arch.dims), strict=True))
    return sum(sizes[name] for name in inputs)


def check_head_name(name: str) -> str:
    """The name, if a new head can have it.

    Raises:
        ConfigError: when it cannot.
    """
    if name == MAIN or not _NAME.fullmatch(name):
        raise ConfigError(
            f"{quoted(name)} cannot name a head: give 1 to 40 lower-case letters, digits, - or _, other than {MAIN}."
        )
    return name


def accuracy_in_words(head: Head) -> str:
    """The measured accuracy of a head in one line, such as `top-1 61.3 %, calibration error 2.1 % (372 photos)`."""
    known = head.about.get("accuracy", {})
    words = {"top1": "top-1", "top5": "top-5", "ece": "calibration error"}
    figures = ", ".join(f"{text} {known[key]:.1f} %" for key, text in words.items() if key in known)
    if not figures:
        return "not measured"
    return f"{figures} ({known['judged_on']})" if "judged_on" in known else figures


def heads_file(bundle: Bundle) -> str:
    """The name of the file with a bundle's named heads, which tells of their content; empty without any."""
    return next((name for name in bundle.checksums if name.startswith(HEADS)), "")


def read_heads(bundle: Bundle) -> Heads:
    """All heads of a bundle, whose files must have been verified.

    Raises:
        BundleError: when the file of heads is damaged or belongs to another model.
    """
    heads: dict[str, Head] = {}
    if count := bundle.arch.num_classes:
        labels = bundle.description.labels or tuple(map(str, range(count)))
        heads[MAIN] = Head(MAIN, labels, ("logits",), _about_main(bundle.description.provenance.get("head")))
    default, file = next(iter(heads), ""), heads_file(bundle)
    if not file:
        return Heads(heads, default)
    try:
        named, default = _read(bundle.path / file, bundle.fingerprint, bundle.arch)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError, ConfigError) as error:
        raise BundleError(
            f"{bundle.path / file} is damaged ({error}): fit its heads again, or export again."
        ) from error
    heads |= {head.name: head for head in named}
    if default not in heads:
        raise BundleError(f"{bundle.path / file} is damaged (no head {quoted(default)}): fit its heads again.")
    return Heads(heads, default)


def _about_main(probe: Any) -> dict[str, Any]:
    """`Head.about` of a linear probe that became the network's head, from its provenance."""
    if not isinstance(probe, Mapping):
        return {}
    accuracy = {key: probe[key] for key in ("top1", "judged_on") if key in probe}
    return {"accuracy": accuracy, "provenance": dict(probe)} if accuracy else {"provenance": dict(probe)}


def change_heads(bundle: Bundle, change: Callable[[Heads], Heads], out: Path | None = None) -> Bundle:
    """Apply a change to the heads of a bundle as it is now, or of a copy that is written to `out`.

    Raises:
        BundleError: when `out` exists already, or the bundle is damaged.
        ConfigError: from `change`.
    """
    if out is None:
        current = open_bundle(bundle.path)  # another command may have changed it meanwhile
        return write_heads(current, change(read_heads(current)))
    check_target(out, overwrite=False)
    with atomic_folder(out) as folder:
        copied = bundle.copy(folder)
        changed = write_heads(copied, change(read_heads(copied)))
    return replace(changed, path=out)


def write_heads(bundle: Bundle, heads: Heads) -> Bundle:
    """Store heads in a bundle in place of those that it has; returns the bundle as it is then."""
    old = heads_file(bundle)
    checksums = {name: digest for name, digest in bundle.checksums.items() if name != old}
    named = [head for head in heads.by_name.values() if not head.is_main]
    if named:
        name, digest = _write(bundle, named, heads.default)
        checksums[name] = digest
    changed = replace(bundle, checksums=checksums)
    changed.save_config()  # from here on the bundle has the new heads
    if old and old not in checksums:
        (bundle.path / old).unlink(missing_ok=True)
    return changed


def _write(bundle: Bundle, named: Sequence[Head], default: str) -> tuple[str, str]:
    """Write the file of heads; returns its name and sha256."""
    tensors: dict[str, NDArray[Any]] = {}
    for head in named:
        for part in ("weight", "bias"):
            tensors[f"{head.name}.{part}"] = np.ascontiguousarray(getattr(head, part), np.float32)
    values = {
        "format": FORMAT,
        "model_fingerprint": bundle.fingerprint,
        "default": default,
        "heads": [head.describe() for head in named],
    }
    content = save(tensors, {METADATA_KEY: json.dumps(values)})
    digest = hashlib.sha256(content).hexdigest()
    name = f"{HEADS}{digest[:16]}.safetensors"
    with atomic_path(bundle.path / name) as temporary:
        temporary.write_bytes(content)
    return name, digest


@functools.lru_cache(8)  # a server reads them again for each job, when the file may have been replaced
def _read(path: Path, model_fingerprint: str, arch: Architecture) -> tuple[tuple[Head, ...], str]:
    """The named heads in a file, whose name tells of its content, and the name of the default one.

    Raises:
        BundleError: when they belong to another model, or a newer version wrote them.
        ValueError, KeyError, TypeError, ConfigError: when the file is damaged.
    """
    with safe_open(path, framework="np") as file:
        values = parse_json((file.metadata() or {})[METADATA_KEY])
        if values["format"] != FORMAT:
            raise BundleError(
                f"{path} has format {values['format']}, this version reads {FORMAT}: update mixmim-serve."
            )
        if values["model_fingerprint"] != model_fingerprint:
            raise BundleError(f"{path} has heads of another model: fit them again with `mixmim head`.")
        if not 0 < len(values["heads"]) <= MAX_HEADS:
            raise ValueError(f"{len(values['heads'])} heads")
        heads = tuple(_head(arch, entry, file.get_tensor) for entry in values["heads"])
    if len({head.name for head in heads}) < len(heads):
        raise ValueError("two heads of one name")
    return heads, str(values["default"])


def _head(arch: Architecture, entry: Mapping[str, Any], tensor: Callable[[str], Floats]) -> Head:
    """One head from its entry in the metadata and its tensors."""
    name, classes, inputs = check_head_name(entry["name"]), tuple(entry["classes"]), tuple(entry["inputs"])
    if not classes or not all(isinstance(label, str) for label in classes):
        raise ValueError(f"the classes of {name} are not names")
    if not inputs or not set(inputs) <= set(INPUTS):
        raise ValueError(f"{name} reads {', '.join(map(str, inputs))[:200]}")
    weight, bias = tensor(f"{name}.weight"), tensor(f"{name}.bias")
    shapes = (len(classes), input_size(arch, inputs)), (len(classes),)
    if (weight.shape, bias.shape) != shapes or {weight.dtype, bias.dtype} != {np.dtype(np.float32)}:
        raise ValueError(f"the weights of {name} are {weight.shape} and {bias.shape} instead of {shapes}")
    if not (np.isfinite(weight).all() and np.isfinite(bias).all()):
        raise ValueError(f"the weights of {name} are not finite")
    about = {key: dict(entry[key]) for key in ("accuracy", "provenance") if key in entry}
    return Head(name, classes, inputs, about, weight, bias)
