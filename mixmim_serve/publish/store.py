"""Bundles in BentoML's model store, under tags such as shoes:2026.

The store is a folder of folders below BENTOML_HOME. Only its own functions touch it; what it knows of frameworks, which
is deprecated, is not used. Importing BentoML takes a second, so that happens when a tag is really looked up.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from types import ModuleType

from mixmim_serve.bundle import Bundle, open_bundle
from mixmim_serve.config import size_name
from mixmim_serve.errors import BundleError
from mixmim_serve.version import __version__

_WORD = r"[a-z0-9](?:[-._a-z0-9]{0,61}[a-z0-9])?"  # as BentoML has it, 63 characters at most
_TAG = re.compile(f"{_WORD}(?::{_WORD})?")


def is_tag(text: str) -> bool:
    """Whether this could be NAME, NAME:VERSION or NAME:latest; a path with a slash in it is not."""
    return _TAG.fullmatch(text) is not None


def check_new_tag(tag: str) -> None:
    """Whether a bundle can be stored under a tag, asked before the minutes that its export takes.

    Raises:
        BundleError: when it is no tag, or its version is taken.
    """
    if not is_tag(tag) or tag.endswith(":latest"):
        raise BundleError(
            f"{tag!r} is no name for BentoML's store: give NAME or NAME:VERSION in small letters and digits."
        )
    if ":" in tag and any(str(model.tag) == tag for model in _bentoml().models.list()):
        raise BundleError(f"BentoML's store has {tag} already: choose another version, or NAME alone for a new one.")


def store_bundle(bundle: Bundle, tag: str) -> str:
    """Copy a bundle into the store and verify the copy; the tag with its version.

    Raises:
        BundleError: for a tag that is none or taken, a bundle that is altered, or a copy that is not whole.
    """
    check_new_tag(tag)
    bentoml = _bentoml()
    about = {
        "fingerprint": bundle.fingerprint,
        "image_size": bundle.arch.image_size,
        "embedding_size": bundle.arch.embedding_size,
        "precisions": list(bundle.precisions),
        "outputs": {graph: list(outputs) for graph, outputs in bundle.graphs.items()},
        "classes": bundle.arch.num_classes,
    }
    labels = {"architecture": size_name(bundle.arch), "made_by": f"mixmim-serve-{__version__}"}
    try:
        with bentoml.models.create(tag, module="mixmim_serve", labels=labels, metadata=about) as model:
            bundle.copy(Path(model.path))
    except bentoml.exceptions.BentoMLException as error:
        raise BundleError(f"BentoML's store did not take {tag}: {error}") from error
    stored = bentoml.models.get(model.tag)
    try:
        open_bundle(Path(stored.path)).verify()
    except BundleError:
        bentoml.models.delete(stored.tag)
        raise
    return str(stored.tag)


def stored_path(tag: str) -> Path:
    """The folder of a bundle in the store; NAME alone and NAME:latest are the newest.

    Raises:
        BundleError: when there is none, listing what is there, or when the tag is of something else.
    """
    bentoml = _bentoml()
    try:
        model = bentoml.models.get(tag)
    except bentoml.exceptions.BentoMLException as error:
        raise BundleError(f"{tag} is no bundle: no folder is so named, and BentoML's store {_content()}.") from error
    return Path(model.path)


def _content() -> str:
    bentoml = _bentoml()
    try:
        tags = [str(model.tag) for model in bentoml.models.list()]
    except bentoml.exceptions.BentoMLException as error:  # a copy that was interrupted
        return f"cannot be listed ({error})"
    return f"has {', '.join(tags)}" if tags else "is empty"


def _bentoml() -> ModuleType:
    os.environ.setdefault("BENTOML_DO_NOT_TRACK", "true")  # storing a model would be reported
    import bentoml

    return bentoml
