"""Image routes in the OpenAPI document."""

from __future__ import annotations

import json
from collections.abc import Sequence

from mixmim_serve.bundle import STAGE_OUTPUTS
from mixmim_serve.service.openapi.parts import (
    BINARY,
    CLOSED,
    IDENTITY,
    IDENTITY_SCHEMA,
    INTEGER,
    NUMBERS,
    PHOTO,
    STRING,
    image_operation,
    object_schema,
    ref,
)
from mixmim_serve.service.options import Json
from mixmim_serve.service.settings import Settings

BASE64 = r"^(data:[A-Za-z0-9/+.=-]*;base64,)?([A-Za-z0-9+/]{4})*([A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?$"
IMAGE: Json = {"type": "string", "description": "A data URI, or base64 alone.", "pattern": BASE64, "examples": [PHOTO]}
IMAGES: Json = {"type": "array", "items": IMAGE, "minItems": 1, "maxItems": Settings().max_items}


def embed(parameters: Sequence[Json]) -> Json:
    """POST /embed."""
    example = {"embedding": [0.12, -0.5]}
    return _operation("Embed images", "Embedding", parameters, example, ("x-npy", "x-npz", "x-safetensors"))


def classify(parameters: Sequence[Json]) -> Json:
    """POST /classify."""
    example = {"classes": [{"index": 3, "label": "hat", "probability": 0.91}]}
    binary = ("x-npy", "x-npz", "x-safetensors")
    return _operation("Classify images", "Classes", parameters, example, binary, form="FormForHead")


def features(parameters: Sequence[Json]) -> Json:
    """POST /features."""
    summary, example = "Get dense feature maps of the encoder's stages", {"stage4": [[[0.1, 0.2]]]}
    return _operation(summary, "Features", parameters, example, ("x-npy", "x-npz", "x-safetensors"))


def score(parameters: Sequence[Json]) -> Json:
    """POST /score."""
    summary, example = "Measure how badly the network reconstructs an image", {"score": 0.31}
    return _operation(summary, "Score", parameters, example, ("x-npz", "x-safetensors"))


def anomaly(parameters: Sequence[Json]) -> Json:
    """POST /anomaly."""
    summary, example = (
        "Judge whether an image is normal",
        {"score": 3.4, "percentile": 100.0, "normal": False, "threshold": 2.9},
    )
    operation = _operation(summary, "Anomaly", parameters, example, ("x-npz", "x-safetensors"))
    operation["responses"]["200"]["content"]["image/png"] = {"schema": BINARY}
    return operation


def reconstruct(parameters: Sequence[Json]) -> Json:
    """POST /reconstruct."""
    kinds = ("image/png", "application/x-npz", "application/x-safetensors")
    answer = {"description": "A PNG panel, or the arrays.", "content": {media: {"schema": BINARY} for media in kinds}}
    body: Json = {
        "multipart/form-data": {"schema": ref("FormOfTwo")},
        "application/json": {"schema": ref("InputOfTwo"), "example": {"input": [PHOTO, PHOTO]}},
    }
    return image_operation("Mix two images and complete both", parameters, body, answer)


def embed_stream(parameters: Sequence[Json]) -> Json:
    """POST /embed/stream."""
    line = {"index": 0, "id": "a.jpg", "status": "ok", "embedding": [0.12, -0.5]}
    body = {
        "application/x-ndjson": {
            "schema": {"type": "string"},
            "example": f'{{"input": "{PHOTO}", "id": "a.jpg"}}\n',
        },
        "multipart/form-data": {"schema": ref("FormOfMany")},
    }
    lines = {"schema": {"type": "string"}, "example": json.dumps(line) + "\n"}
    answer = {
        "description": "One line per image, in order, while the body is still being sent.",
        "content": {"application/x-ndjson": lines},
    }
    return image_operation("Embed a stream of images", parameters, body, answer)


def _operation(
    summary: str, schema: str, parameters: Sequence[Json], example: Json, binary: tuple[str, ...], form: str = "Form"
) -> Json:
    """A route with one entry per image: flat JSON for one, a list for several, or binary arrays."""
    several = {"data": [{"index": 0, "status": "ok"} | example]} | IDENTITY
    content: Json = {
        "application/json": {
            "schema": {"anyOf": [ref(schema), ref(f"{schema}List")]},
            "examples": {"one image": {"value": example | IDENTITY}, "several images": {"value": several}},
        }
    }
    content |= {f"application/{media}": {"schema": BINARY} for media in binary}
    body = {
        "multipart/form-data": {"schema": ref(form)},
        "application/json": {"schema": ref("Input"), "example": {"input": [PHOTO]}},
        "image/*": {"schema": BINARY},
    }
    return image_operation(summary, parameters, body, {"description": "The result.", "content": content})


def answer_schemas() -> Json:
    """The answers of the image routes: flat for one image, a list for several."""
    guess = object_schema({"index": INTEGER, "label": STRING, "probability": {"type": "number"}})
    flat: dict[str, Json] = {
        "Embedding": {"embedding": NUMBERS},
        "Classes": {"classes": {"type": "array", "items": guess}},
        "Features": {stage: {"type": "array"} for stage in STAGE_OUTPUTS},
        "Anomaly": {
            "score": {"type": "number"},
            "percentile": {"type": "number", "minimum": 0, "maximum": 100},
            "normal": {"type": "boolean"},
            "threshold": {"type": "number"},
            "map": {"type": "array", "items": NUMBERS},
            "overlay": STRING | {"description": "A data URI of a PNG."},
        },
        "Score": {
            "score": {"type": "number"},
            "percentile": {"type": "number", "description": "Among normal photos, if the bundle is calibrated."},
            "map": {"type": "array", "items": NUMBERS},
        },
    }
    head = {"head": STRING | {"description": "The head that answers; missing for the one inside the network, main."}}
    schemas: Json = {}
    for name, properties in flat.items():
        identity = IDENTITY_SCHEMA | (head if name == "Classes" else {})
        schemas[name] = object_schema(properties | identity, required=IDENTITY_SCHEMA)
        one = {"index": INTEGER, "status": {"enum": ["ok", "error"]}, "error": ref("Error")} | properties
        data = {"data": {"type": "array", "items": object_schema(one, required=("index", "status"))}}
        schemas[f"{name}List"] = object_schema(data | identity, required=("data", *IDENTITY_SCHEMA))
    return schemas


def body_schemas() -> Json:
    """The bodies of the image routes."""
    files = {"type": "array", "items": BINARY, "minItems": 1, "maxItems": Settings().max_items}
    two = {"minItems": 2, "maxItems": 2}
    return {
        "Form": object_schema({"image": files}),
        "FormForHead": object_schema({"image": files, "head": STRING}, required=("image",)),
        "FormOfMany": object_schema({"image": {"type": "array", "items": BINARY}}, required=()),
        "FormOfTwo": object_schema({"image": files | two}),
        "Input": object_schema({"input": {"oneOf": [IMAGE, IMAGES]}}) | CLOSED,
        "InputOfTwo": object_schema({"input": IMAGES | two}) | CLOSED,
    }
