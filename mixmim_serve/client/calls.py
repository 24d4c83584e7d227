"""One function a route: what is sent, and what is made of the answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar

from mixmim_serve.client.answers import Reply, each, read_arrays, read_json
from mixmim_serve.client.results import Classes, Embedding, Features, ModelInfo, Reconstruction, Score
from mixmim_serve.errors import ImageError
from mixmim_serve.tasks import Class

Made = TypeVar("Made", covariant=True)

Dtype = Literal["float32", "float16"]
Layout = Literal["map", "tokens"]
RECONSTRUCTED = ("image_a", "image_b", "from_partner", "mixed", "reconstruction_a", "reconstruction_b")
JSON, SAFETENSORS = "application/json", "application/x-safetensors"


@dataclass(frozen=True)
class Call(Generic[Made]):
    """A request, whatever sends it: POST with images, GET without, unless `method` says otherwise."""

    path: str
    read: Callable[[Reply], Made]
    images: Sequence[bytes] = ()
    params: Mapping[str, str] = field(default_factory=dict)
    accept: str = SAFETENSORS
    method: str = ""
    body: Any = None  # JSON
    headers: Mapping[str, str] = field(default_factory=dict)


def embed(images: Sequence[bytes], normalize: bool, dtype: Dtype) -> Call[list[Embedding | ImageError]]:
    """POST /embed."""

    def read(reply: Reply) -> list[Embedding | ImageError]:
        return each(reply, len(images), lambda arrays, about: Embedding(vector=arrays["embedding"], **_named(about)))

    return Call("/embed", read, images, {"normalize": _word(normalize), "dtype": dtype})


def classify(image: bytes, top: int | None) -> Call[Classes]:
    """POST /classify, as JSON: the labels come with it."""

    def read(reply: Reply) -> Classes:
        found = read_json(reply)
        return Classes(classes=tuple(Class(**each) for each in found["classes"]), **_named(found))

    return Call("/classify", read, [image], {} if top is None else {"top": str(top)}, JSON)


def features(image: bytes, stages: Sequence[str], layout: Layout, dtype: Dtype) -> Call[Features]:
    """POST /features."""

    def read(reply: Reply) -> Features:
        arrays, about = read_arrays(reply)
        return Features(stages={name: array[0] for name, array in arrays.items()}, **_named(about))

    return Call("/features", read, [image], {"stages": ",".join(stages), "layout": layout, "dtype": dtype})


def score(image: bytes, masks: int | None, with_map: bool) -> Call[Score]:
    """POST /score."""

    def read(reply: Reply) -> Score:
        arrays, about = read_arrays(reply)
        return Score(score=float(arrays["score"][0]), map=arrays["map"][0] if with_map else None, **_named(about))

    options = {} if masks is None else {"masks": str(masks)}
    return Call("/score", read, [image], options | {"map": _word(with_map)})


def reconstruct(images: Sequence[bytes], seed: int, ratio: float) -> Call[Reconstruction]:
    """POST /reconstruct."""

    def read(reply: Reply) -> Reconstruction:
        arrays, about = read_arrays(reply)
        values: dict[str, Any] = {name: arrays[name] for name in RECONSTRUCTED}
        return Reconstruction(**(values | _named(about)))

    return Call("/reconstruct", read, images, {"seed": str(seed), "ratio": str(ratio)})


def _model(reply: Reply) -> ModelInfo:
    found = read_json(reply)
    return ModelInfo(
        embedding_size=found["embedding_size"],
        labels=tuple(found["labels"]),
        outputs={graph: tuple(names) for graph, names in found["outputs"].items()},
        about=found,
        **_named(found),
    )


MODEL = Call("/model", _model, accept=JSON)
READY = Call("/readyz", lambda reply: True, accept="*/*")


def _named(about: Mapping[str, str]) -> dict[str, str]:
    return {"model": about["model"], "fingerprint": about["fingerprint"]}


def _word(value: bool) -> str:
    return "true" if value else "false"
