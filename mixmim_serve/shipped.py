"""The model that comes with the package, and those that earlier releases came with."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from mixmim_serve.bundle import DEFAULT_BUNDLE, Bundle, open_bundle
from mixmim_serve.engines.base import combined_fingerprint
from mixmim_serve.errors import BundleError
from mixmim_serve.heads import heads_file

# Model fingerprints of the bundles `tiny` of earlier releases. When the bundle changes, add the one that it replaces.
EARLIER = ("1fb760df8d2baa7cd412039e8c643e75",)  # until November 2026: 10,022 photos, 25 epochs, one head


def is_shipped(bundle: Bundle) -> bool:
    """Whether a bundle is the shipped one, of this or an earlier release, wherever it lies; with other heads it is not.

    Its classes mean nothing to other photos.
    """
    model, heads = _shipped()
    known = {model: heads} if model else {}
    return {**dict.fromkeys(EARLIER, ""), **known}.get(bundle.fingerprint) == heads_file(bundle)


def earlier_advice(made_by: Mapping[str, Any]) -> str:
    """What to do with results of a shipped model of an earlier release; empty for those of any other model.

    `made_by` has `fingerprint`, `engine` and `precision`, as manifests of all versions do.
    """
    current, _ = _shipped()
    runtime = str(made_by["engine"]), str(made_by["precision"])
    if not current or made_by["fingerprint"] not in [
        combined_fingerprint(model, *runtime) for model in EARLIER if model != current
    ]:
        return ""
    return (
        f"the package shipped that model until it was replaced by a better one (model fingerprint {current[:8]}), and "
        "vectors of the two do not compare: extract again into another folder, or keep the bundle `tiny` of the "
        "earlier release and name its folder"
    )


@functools.cache
def _shipped() -> tuple[str, str]:
    """Model fingerprint and file of heads of the shipped bundle; empty in a package that leaves it out."""
    try:
        bundle = open_bundle(DEFAULT_BUNDLE)
    except BundleError:
        return "", ""
    return bundle.fingerprint, heads_file(bundle)
