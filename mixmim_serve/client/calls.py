"""One function per route: the request, and how to read its response."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar

import numpy as np

from mixmim_serve.client.answers import Reply, read_arrays, read_each, read_json
from mixmim_serve.client.results import Anomaly, Classes, Embedding, Features, ModelInfo, Reconstruction, Score
from mixmim_serve.errors import ImageError
from mixmim_serve.tasks import Class

Value = TypeVar("Value", covariant=True)

Dtype = Literal["float32", "float16"]
Layout = Literal["map", "tokens"]
RECONSTRUCTED = ("image_a", "image_b", "from_partner", "mixed", "reconstruction_a", "reconstruction_b")
JSON, SAFETENSORS = "application/json", "application/x-safetensors"


@dataclass(frozen=True)
class Call(Generic[Value]):
    """A request: POST with images and GET without, unless `method` is set; `read` parses the response."""

    path: str
    read: Callable[[Reply], Value]
    images: Sequence[bytes] = ()
    params: Mapping[str, str] = field(default_factory=dict)
    accept: str = SAFETENSORS
    method: str = ""
    body: Any = None  # JSON
    headers: Mapping[str, str] = field(default_factory=dict)


def embed(images: Sequence[bytes], normalize: bool, dtype: Dtype) -> Call[list[Embedding | ImageError]]:
    """POST /embed."""

    def read(reply: Reply) -> list[Embedding | ImageError]:
        return read_each(
            reply, len(images), lambda arrays, metadata: Embedding(vector=arrays["embedding"], **_model_of(metadata))
        )

    return Call("/embed", read, images, {"normalize": _as_text(normalize), "dtype": dtype})


def classify(image: bytes, top: int | None, head: str | None) -> Call[Classes]:
    """POST /classify, as JSON, which includes the labels."""

    def read(reply: Reply) -> Classes:
        values = read_json(reply)
        classes = tuple(Class(**entry) for entry in values["classes"])
        return Classes(classes=classes, head=values.get("head"), **_model_of(values))

    options = {} if top is None else {"top": str(top)}
    return Call("/classify", read, [image], options | ({} if head is None else {"head": head}), JSON)


def features(image: bytes, stages: Sequence[str], layout: Layout, dtype: Dtype) -> Call[Features]:
    """POST /features."""

    def read(reply: Reply) -> Features:
        arrays, metadata = read_arrays(reply)
        return Features(stages={name: array[0] for name, array in arrays.items()}, **_model_of(metadata))

    return Call("/features", read, [image], {"stages": ",".join(stages), "layout": layout, "dtype": dtype})


def score(image: bytes, masks: int | None, with_map: bool) -> Call[Score]:
    """POST /score."""

    def read(reply: Reply) -> Score:
        arrays, metadata = read_arrays(reply)
        percentile = float(arrays["percentile"][0]) if "percentile" in arrays else None
        found = arrays["map"][0] if with_map else None
        return Score(score=float(arrays["score"][0]), map=found, percentile=percentile, **_model_of(metadata))

    options = {} if masks is None else {"masks": str(masks)}
    return Call("/score", read, [image], options | {"map": _as_text(with_map)})


def anomaly(image: bytes, with_map: bool, overlay: bool) -> Call[Anomaly]:
    """POST /anomaly, as JSON, which includes the overlay."""

    def read(reply: Reply) -> Anomaly:
        values = read_json(reply)
        return Anomaly(
            score=values["score"],
            percentile=values["percentile"],
            normal=values["normal"],
            threshold=values["threshold"],
            map=np.array(values["map"], np.float32) if with_map else None,
            overlay=base64.b64decode(values["overlay"].partition(",")[2]) if overlay else None,
            **_model_of(values),
        )

    return Call("/anomaly", read, [image], {"map": _as_text(with_map), "overlay": _as_text(overlay)}, JSON)


def reconstruct(images: Sequence[bytes], seed: int, ratio: float) -> Call[Reconstruction]:
    """POST /reconstruct."""

    def read(reply: Reply) -> Reconstruction:
        arrays, metadata = read_arrays(reply)
        values: dict[str, Any] = {name: arrays[name] for name in RECONSTRUCTED}
        return Reconstruction(**(values | _model_of(metadata)))

    return Call("/reconstruct", read, images, {"seed": str(seed), "ratio": str(ratio)})


def _model_info(reply: Reply) -> ModelInfo:
    values = read_json(reply)
    return ModelInfo(
        embedding_size=values["embedding_size"],
        labels=tuple(values["labels"]),
        heads={head["name"]: tuple(head["classes"]) for head in values.get("heads", ())},
        outputs={graph: tuple(names) for graph, names in values["outputs"].items()},
        about=values,
        **_model_of(values),
    )


MODEL = Call("/model", _model_info, accept=JSON)
READY = Call("/readyz", lambda reply: True, accept="*/*")


def _model_of(metadata: Mapping[str, str]) -> dict[str, str]:
    known = {"model": metadata["model"], "fingerprint": metadata["fingerprint"]}
    return known | {"model_fingerprint": metadata.get("model_fingerprint", "")}


def _as_text(value: bool) -> str:
    return "true" if value else "false"
