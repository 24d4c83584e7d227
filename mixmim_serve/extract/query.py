"""An image embedded as the features of a folder were, so that both may be compared."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mixmim_serve.engines import engine_fingerprint, open_engine
from mixmim_serve.errors import OutputError
from mixmim_serve.extract.features import Vectors
from mixmim_serve.preprocess import preprocess


def embed_query(manifest: Mapping[str, Any], data: bytes, bundle: Path | None = None) -> Vectors:
    """The embedding, (D,), of an encoded image by the bundle, engine and precision that a manifest names.

    Raises:
        ImageError: the image cannot be read.
        BundleError: the bundle is not where it was.
        OutputError: it is another bundle now, or another engine.
    """
    engine = open_engine(
        bundle or Path(manifest["bundle"]), manifest["engine"].partition("-")[0], manifest["precision"]
    )
    if engine_fingerprint(engine) != manifest["fingerprint"]:
        raise OutputError(
            f"{engine.bundle.path} by {engine.name} does not give the numbers of these features (made by "
            f"{manifest['model']} on {manifest['engine']}): name their bundle with --bundle."
        )
    pixels = preprocess(data, engine.bundle.description.preprocessing)
    vector: Vectors = engine.run("encoder", {"pixels": pixels[None]}, ["embedding"])["embedding"][0]
    return vector
