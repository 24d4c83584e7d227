"""The OpenAPI document, written by hand: routes read bodies themselves, so nothing could derive it.

A committed copy (docs/openapi.json) shows every change in review; a test holds the two, and the routes, together.
"""

from __future__ import annotations

import functools
import json
from typing import Any

from mixmim_serve.bundle import STAGE_OUTPUTS
from mixmim_serve.service.settings import Settings
from mixmim_serve.version import __version__

Json = dict[str, Any]

PHOTO = "data:image/jpeg;base64,/9j/4AAQSkZJRgABAQAAAQABAAD..."
ABOUT: Json = {"model": "tiny", "fingerprint": "00112233445566778899aabbccddeeff"}
BINARY = {
    "application/x-npy": "one array, a row an image",
    "application/x-npz": "arrays by name, a row an image",
    "application/x-safetensors": "arrays by name, a row an image",
}


@functools.cache
def document() -> Json:
    """The whole of it."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "mixmim-serve",
            "version": __version__,
            "description": "Embeddings, classes, features, scores and reconstructions of images by a MixMIM backbone.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": _image_paths() | _openai_paths() | _other_paths(),
        "components": {
            "schemas": _schemas(),
            "responses": {str(status): _refusal(text) for status, text in REFUSALS.items()},
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "header": {"type": "apiKey", "in": "header", "name": "X-Api-Key"},
            },
        },
        "security": [{}, {"bearer": []}, {"header": []}],
    }


REFUSALS = {
    400: "Malformed: the body, an option or a header.",
    401: "The API key is missing or wrong.",
    404: "The model has no such part (a head, a decoder), or there is no such model.",
    406: "None of the media types in Accept can be written.",
    408: "The body came too slowly.",
    413: "Too many bytes, pixels or images.",
    415: "The body, or an image in it, is of another type.",
    422: "The image, or all of them, cannot be decoded.",
    429: "The server is full: Retry-After says when to come again.",
    500: "A bug; the server's log has the reason.",
    503: "Not ready, or shutting down.",
    504: "The deadline passed.",
}


def _image_paths() -> Json:
    normalize = _option("normalize", {"type": "boolean", "default": False}, "Give each vector length 1.")
    top = _option("top", {"type": "integer", "minimum": 1, "default": 5}, "How many classes, at most all.")
    stages = _option(
        "stages", {"type": "string", "default": "stage4"}, f"Of {', '.join(STAGE_OUTPUTS)}; several between commas."
    )
    layout = _option("layout", {"enum": ["map", "tokens"], "default": "map"}, "(D, H, W), or (H * W, D).")
    masks = _option("masks", {"type": "integer", "minimum": 1, "maximum": 16, "default": 2}, "Pairs of masks.")
    with_map = _option("map", {"type": "boolean", "default": False}, "Also the error of each unit of 32 pixels.")
    seed = _option("seed", {"type": "integer", "minimum": 0, "maximum": 2**32 - 1, "default": 0}, "Of the mask.")
    ratio = _option(
        "ratio", {"type": "number", "minimum": 0, "maximum": 1, "default": 0.5}, "Share of units that B covers."
    )
    dtype = _option("dtype", {"enum": ["float32", "float16"], "default": "float32"}, "Of the numbers in the answer.")
    guesses = [{"index": 3, "label": "hat", "probability": 0.91}]
    return {
        "/embed": _post("Embed images", "Embedding", [normalize, dtype], BINARY, {"embedding": [0.12, -0.5]} | ABOUT),
        "/classify": _post("Classify images", "Classes", [top, dtype], BINARY, {"classes": guesses} | ABOUT),
        "/features": _post(
            "Dense features of the encoder's stages", "Features", [stages, layout, dtype], BINARY,
            {"stage4": [[[0.1, 0.2]]]} | ABOUT,
        ),
        "/score": _post(
            "How unlike its training data an image is", "Score", [masks, with_map, dtype],
            {media: text for media, text in BINARY.items() if media != "application/x-npy"}, {"score": 0.31} | ABOUT,
        ),
        "/reconstruct": _reconstruct([seed, ratio]),
        "/embed/stream": _stream([normalize, dtype]),
    }  # fmt: skip


def _post(summary: str, schema: str, options: list[Json], binary: dict[str, str], example: Json) -> Json:
    several = {"data": [{"index": 0, "status": "ok"} | {k: v for k, v in example.items() if k not in ABOUT}]} | ABOUT
    content: Json = {
        "application/json": {
            "schema": {"oneOf": [_ref(schema), _ref(f"{schema}List")]},
            "examples": {"one image": {"value": example}, "several images": {"value": several}},
        }
    }
    content |= {media: {"schema": {"type": "string", "format": "binary"}} for media in binary}
    return {"post": _operation(summary, options, _images(), {"description": "The answer.", "content": content})}


def _reconstruct(options: list[Json]) -> Json:
    kinds = ("image/png", "application/x-npz", "application/x-safetensors")
    content = {media: {"schema": {"type": "string", "format": "binary"}} for media in kinds}
    answer = {"description": "A panel, or the arrays.", "content": content}
    return {"post": _operation("Mix two images and complete both", options, _images(raw=False), answer)}


def _stream(options: list[Json]) -> Json:
    line = {"index": 0, "id": "a.jpg", "status": "ok", "embedding": [0.12, -0.5]}
    body = {
        "application/x-ndjson": {
            "schema": {"type": "string"},
            "example": f'{{"input": "{PHOTO}", "id": "a.jpg"}}\n',
        },
        "multipart/form-data": {"schema": _ref("Form")},
    }
    lines = {"schema": {"type": "string"}, "example": json.dumps(line) + "\n"}
    answer = {
        "description": "A line an image, in order, while the body is still being sent.",
        "content": {"application/x-ndjson": lines},
    }
    return {"post": _operation("Embed a stream of images", options, body, answer)}


def _openai_paths() -> Json:
    request = {"model": "tiny", "input": [PHOTO], "encoding_format": "float"}
    answer = {
        "object": "list",
        "data": [{"object": "embedding", "index": 0, "embedding": [0.12, -0.5]}],
        "usage": {"prompt_tokens": 49, "total_tokens": 49},
    } | ABOUT
    body = {"application/json": {"schema": _ref("OpenAIRequest"), "example": request}}
    found = {
        "description": "The answer.",
        "content": {"application/json": {"schema": {"type": "object"}, "example": answer}},
    }
    name = {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}
    return {
        "/v1/embeddings": {"post": _operation("Embeddings, as OpenAI's clients ask for them", [], body, found)},
        "/v1/models": {"get": _get("The model that is served, as OpenAI's clients ask for it")},
        "/v1/models/{name}": {"get": _get("The same, by name", parameters=[name], refusals=(401, 404, 503))},
    }


def _other_paths() -> Json:
    return {
        "/model": {"get": _get("What is served: network, preprocessing, labels, engine, fingerprint")},
        "/livez": {"get": _get("Whether the process lives", "text/plain", refusals=())},
        "/healthz": {"get": _get("The same as /livez", "text/plain", refusals=())},
        "/readyz": {"get": _get("Whether a known photo gets the right answer", "text/plain", refusals=(503,))},
        "/metrics": {"get": _get("For Prometheus", "text/plain", refusals=())},
    }


def _operation(summary: str, options: list[Json], body: Json, answer: Json) -> Json:
    refusals = {str(status): {"$ref": f"#/components/responses/{status}"} for status in REFUSALS}
    return {
        "summary": summary,
        "parameters": [*options, _header("X-Request-Timeout", "Seconds until the answer is of no more use."),
                       _header("X-Request-Id", "Comes back in the answer and stands in the log.")],
        "requestBody": {"required": True, "content": body},
        "responses": {"200": answer} | refusals,
    }  # fmt: skip


def _get(
    summary: str, media: str = "application/json", parameters: list[Json] | None = None,
    refusals: tuple[int, ...] = (401, 503),
) -> Json:  # fmt: skip
    schema = {"type": "object"} if media == "application/json" else {"type": "string"}
    answer = {"description": "The answer.", "content": {media: {"schema": schema}}}
    responses = {"200": answer} | {str(s): {"$ref": f"#/components/responses/{s}"} for s in refusals}
    return {"summary": summary, "responses": responses, **({"parameters": parameters} if parameters else {})}


def _images(*, raw: bool = True) -> Json:
    body: Json = {
        "multipart/form-data": {"schema": _ref("Form")},
        "application/json": {"schema": _ref("Input"), "example": {"input": [PHOTO]}},
    }
    if raw:
        body["image/*"] = {"schema": {"type": "string", "format": "binary"}}
    return body


def _schemas() -> Json:
    numbers = {"type": "array", "items": {"type": "number"}}
    guess = {
        "type": "object",
        "properties": {"index": {"type": "integer"}, "label": {"type": "string"}, "probability": {"type": "number"}},
    }
    image = {"type": "string", "description": "A data URI, or base64 alone.", "examples": [PHOTO]}
    most = Settings().max_items
    images = {"oneOf": [image, {"type": "array", "items": image, "minItems": 1, "maxItems": most}]}
    file = {"type": "string", "format": "binary"}
    flat: dict[str, Json] = {
        "Embedding": {"embedding": numbers},
        "Classes": {"classes": {"type": "array", "items": guess}},
        "Features": {stage: {"type": "array"} for stage in STAGE_OUTPUTS},
        "Score": {"score": {"type": "number"}, "map": {"type": "array", "items": numbers}},
    }
    schemas: Json = {}
    for name, properties in flat.items():
        about = {"model": {"type": "string"}, "fingerprint": {"type": "string"}}
        schemas[name] = {"type": "object", "properties": properties | about, "required": list(about)}
        one = {"index": {"type": "integer"}, "status": {"enum": ["ok", "error"]}, "error": _ref("Error")} | properties
        each = {"type": "object", "properties": one, "required": ["index", "status"]}
        data = {"data": {"type": "array", "items": each}}
        schemas[f"{name}List"] = {"type": "object", "properties": data | about, "required": ["data", *about]}
    return schemas | {
        "Form": {
            "type": "object",
            "properties": {"image": {"type": "array", "items": file, "maxItems": most}},
            "required": ["image"],
        },
        "Input": {
            "type": "object",
            "properties": {"input": images},
            "required": ["input"],
            "additionalProperties": False,
        },
        "OpenAIRequest": {
            "type": "object",
            "properties": {
                "model": {"type": "string"},
                "input": images,
                "encoding_format": {"enum": ["float", "base64"], "default": "float"},
                "dimensions": {"type": "integer", "description": "Must be the embedding's own length."},
                "user": {"type": "string"},
            },
            "required": ["model", "input"],
            "additionalProperties": False,
        },
        "Error": {
            "type": "object",
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"], "examples": ["input[3]"]},
                "code": {"type": "string"},
            },
            "required": ["message", "type", "param", "code"],
        },
        "Refusal": {"type": "object", "properties": {"error": _ref("Error")}, "required": ["error"]},
    }  # fmt: skip


def _refusal(text: str) -> Json:
    return {"description": text, "content": {"application/json": {"schema": _ref("Refusal")}}}


def _option(name: str, schema: Json, text: str) -> Json:
    return {"name": name, "in": "query", "description": text, "schema": schema}


def _header(name: str, text: str) -> Json:
    return {"name": name, "in": "header", "description": text, "schema": {"type": "string"}}


def _ref(name: str) -> Json:
    return {"$ref": f"#/components/schemas/{name}"}
