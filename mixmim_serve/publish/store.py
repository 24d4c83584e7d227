"""Bundles in BentoML's model store, under tags such as shoes:2026.

The store is a folder in BENTOML_HOME. Only BentoML's own functions access it; its deprecated support of frameworks is
not used. Importing BentoML takes a second, so it is imported only when a tag is looked up.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from types import ModuleType

from mixmim_serve.bundle import Bundle, open_bundle
from mixmim_serve.config import size_name
from mixmim_serve.errors import BundleError
from mixmim_serve.heads import read_heads
from mixmim_serve.version import __version__

_WORD = r"[a-z0-9](?:[-._a-z0-9]{0,61}[a-z0-9])?"  # BentoML's rule: at most 63 characters
_TAG = re.compile(f"{_WORD}(?::{_WORD})?")


def is_tag(text: str) -> bool:
    """Whether a text could be NAME, NAME:VERSION or NAME:latest; a path with a slash cannot."""
    return _TAG.fullmatch(text) is not None


def check_new_tag(tag: str) -> None:
    """Check that a bundle can be stored under a tag, before an export that takes minutes.

    Raises:
        BundleError: when the tag is invalid, or its version exists.
    """
    if not is_tag(tag) or tag.endswith(":latest"):
        raise BundleError(f"{tag!r} is not a valid tag for BentoML's store: give NAME or NAME:VERSION in lower case.")
    if ":" in tag and any(str(model.tag) == tag for model in _bentoml().models.list()):
        raise BundleError(f"BentoML's store already has {tag}: choose another version, or NAME alone for a new one.")


def store_bundle(bundle: Bundle, tag: str) -> str:
    """Copy a bundle into the store and verify the copy; returns the tag with its version.

    Raises:
        BundleError: for an invalid or existing tag, an altered bundle, or an incomplete copy.
    """
    check_new_tag(tag)
    bentoml = _bentoml()
    heads = read_heads(bundle)
    metadata = {
        "name": bundle.name,
        "fingerprint": bundle.fingerprint,
        "model_fingerprint": bundle.fingerprint,
        "image_size": bundle.arch.image_size,
        "embedding_size": bundle.arch.embedding_size,
        "precisions": list(bundle.precisions),
        "outputs": {graph: list(outputs) for graph, outputs in bundle.graphs.items()},
        "classes": len(heads.choose().classes) if heads.by_name else 0,
        "heads": list(heads.names),
    }
    labels = {"architecture": size_name(bundle.arch), "made_by": f"mixmim-serve-{__version__}"}
    try:
        with bentoml.models.create(tag, module="mixmim_serve", labels=labels, metadata=metadata) as model:
            bundle.copy(Path(model.path))
    except bentoml.exceptions.BentoMLException as error:
        raise BundleError(f"BentoML's store rejected {tag}: {error}") from error
    stored = bentoml.models.get(model.tag)
    try:
        open_bundle(Path(stored.path)).verify()
    except BundleError:
        bentoml.models.delete(stored.tag)
        raise
    return str(stored.tag)


def stored_path(tag: str) -> Path:
    """The folder of a bundle in the store; NAME alone and NAME:latest mean the newest version.

    Raises:
        BundleError: when the tag does not exist, listing those that do.
    """
    bentoml = _bentoml()
    try:
        model = bentoml.models.get(tag)
    except bentoml.exceptions.BentoMLException as error:
        raise BundleError(
            f"{tag} is not a bundle: no folder has this name, and BentoML's store {_content()}."
        ) from error
    return Path(model.path)


def _content() -> str:
    bentoml = _bentoml()
    try:
        tags = [str(model.tag) for model in bentoml.models.list()]
    except bentoml.exceptions.BentoMLException as error:  # after an interrupted copy
        return f"cannot be listed ({error})"
    return f"has {', '.join(tags)}" if tags else "is empty"


def _bentoml() -> ModuleType:
    os.environ.setdefault("BENTOML_DO_NOT_TRACK", "true")  # else BentoML reports that a model was stored
    import bentoml

    return bentoml
