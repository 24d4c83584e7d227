"""The OpenAPI document, written by hand: routes read bodies themselves, so nothing could derive it.

A committed copy (docs/openapi.json) shows every change in review; a test holds the two, and the routes, together.
"""

from __future__ import annotations

import functools
import json

from mixmim_serve.bundle import STAGE_OUTPUTS
from mixmim_serve.service.openapi_jobs import job_paths, job_schemas
from mixmim_serve.service.openapi_parts import (
    CLOSED,
    INTEGER,
    NUMBERS,
    REFUSALS,
    STRING,
    Json,
    header,
    object_of,
    option,
    ref,
    refusal,
    refusals_of,
)
from mixmim_serve.service.settings import LONGEST_DEADLINE, Settings
from mixmim_serve.version import __version__

PHOTO = "data:image/jpeg;base64,/9j/4AAQSkZJRgABAQAAAQABAAD/"
ABOUT: Json = {"model": "tiny", "fingerprint": "00112233445566778899aabbccddeeff"}
STRINGS: Json = {"model": STRING, "fingerprint": STRING}  # what every answer says of itself
BASE64 = r"^(data:[A-Za-z0-9/+.=-]*;base64,)?([A-Za-z0-9+/]{4})*([A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?$"
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
        "paths": _image_paths() | _openai_paths() | job_paths() | _other_paths(),
        "components": {
            "schemas": _schemas(),
            "responses": {str(status): refusal(text) for status, text in REFUSALS.items()},
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "header": {"type": "apiKey", "in": "header", "name": "X-Api-Key"},
            },
        },
        "security": [{}, {"bearer": []}, {"header": []}],
    }


def _image_paths() -> Json:
    normalize = option("normalize", {"type": "boolean", "default": False}, "Give each vector length 1.")
    top = option("top", {"type": "integer", "minimum": 1, "default": 5}, "How many classes, at most all.")
    stage = f"({'|'.join(STAGE_OUTPUTS)})"
    stages = option(
        "stages", {"type": "string", "pattern": f"^{stage}(,{stage})*$", "default": "stage4"},
        f"Of {', '.join(STAGE_OUTPUTS)}; several between commas.",
    )  # fmt: skip
    layout = option("layout", {"enum": ["map", "tokens"], "default": "map"}, "(D, H, W), or (H * W, D).")
    masks = option("masks", {"type": "integer", "minimum": 1, "maximum": 16, "default": 2}, "Pairs of masks.")
    with_map = option("map", {"type": "boolean", "default": False}, "Also the error of each unit of 32 pixels.")
    seed = option("seed", {"type": "integer", "minimum": 0, "maximum": 2**32 - 1, "default": 0}, "Of the mask.")
    ratio = option(
        "ratio",
        {"type": "number", "minimum": 0, "maximum": 1, "default": 0.5},
        "Share of units that B covers: some, and not all.",
    )
    dtype = option("dtype", {"enum": ["float32", "float16"], "default": "float32"}, "Of the numbers in the answer.")
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
            "schema": {"anyOf": [ref(schema), ref(f"{schema}List")]},
            "examples": {"one image": {"value": example}, "several images": {"value": several}},
        }
    }
    content |= {media: {"schema": {"type": "string", "format": "binary"}} for media in binary}
    return {"post": _operation(summary, options, _images(), {"description": "The answer.", "content": content})}


def _reconstruct(options: list[Json]) -> Json:
    kinds = ("image/png", "application/x-npz", "application/x-safetensors")
    content = {media: {"schema": {"type": "string", "format": "binary"}} for media in kinds}
    answer = {"description": "A panel, or the arrays.", "content": content}
    body: Json = {
        "multipart/form-data": {"schema": ref("FormOfTwo")},
        "application/json": {"schema": ref("InputOfTwo"), "example": {"input": [PHOTO, PHOTO]}},
    }
    return {"post": _operation("Mix two images and complete both", options, body, answer)}


def _stream(options: list[Json]) -> Json:
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
    body = {"application/json": {"schema": ref("OpenAIRequest"), "example": request}}
    found = {
        "description": "The answer.",
        "content": {"application/json": {"schema": ref("OpenAIEmbeddings"), "example": answer}},
    }
    name = {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}
    return {
        "/v1/embeddings": {"post": _operation("Embeddings, as OpenAI's clients ask for them", [], body, found)},
        "/v1/models": {"get": _get("The model that is served, as OpenAI's clients ask for it", "OpenAIModels")},
        "/v1/models/{name}": {
            "get": _get("The same, by name", "OpenAIModel", parameters=[name], refusals=(401, 404, 503))
        },
    }


def _other_paths() -> Json:
    return {
        "/model": {"get": _get("What is served: network, preprocessing, labels, engine, fingerprint", "Model")},
        "/livez": {"get": _get("Whether the process lives", media="text/plain", refusals=())},
        "/healthz": {"get": _get("The same as /livez", media="text/plain", refusals=())},
        "/readyz": {"get": _get("Whether a known photo gets the right answer", media="text/plain", refusals=(503,))},
        "/metrics": {"get": _get("For Prometheus", media="text/plain", refusals=())},
        "/openapi.json": {"get": _get("This document", refusals=())},
        "/docs": {"get": _get("A page to try it", media="text/html", refusals=())},
    }


def _operation(summary: str, options: list[Json], body: Json, answer: Json) -> Json:
    seconds = {"type": "number", "exclusiveMinimum": 0, "maximum": LONGEST_DEADLINE}
    return {
        "summary": summary,
        "parameters": [*options, header("X-Request-Timeout", "Seconds until the answer is of no more use.", seconds),
                       header("X-Request-Id", "Comes back in the answer and stands in the log.", {"type": "string"})],
        "requestBody": {"required": True, "content": body},
        "responses": {"200": answer} | refusals_of(*(status for status in REFUSALS if status != 409)),
    }  # fmt: skip


def _get(
    summary: str, name: str = "", *, media: str = "application/json", parameters: list[Json] | None = None,
    refusals: tuple[int, ...] = (401, 503),
) -> Json:  # fmt: skip
    schema: Json = {"type": "object"} if media == "application/json" else {"type": "string"}
    schema = ref(name) if name else schema
    answer = {"description": "The answer.", "content": {media: {"schema": schema}}}
    responses = {"200": answer} | refusals_of(*refusals)
    return {"summary": summary, "responses": responses, **({"parameters": parameters} if parameters else {})}


def _images() -> Json:
    return {
        "multipart/form-data": {"schema": ref("Form")},
        "application/json": {"schema": ref("Input"), "example": {"input": [PHOTO]}},
        "image/*": {"schema": {"type": "string", "format": "binary"}},
    }


def _schemas() -> Json:
    return _answers() | _bodies() | _openai() | job_schemas() | {
        "Model": object_of({**STRINGS, "embedding_size": INTEGER, "outputs": {"type": "object"}}),
        "Error": object_of({"message": STRING, "type": STRING, "code": STRING,
                          "param": {"type": ["string", "null"], "examples": ["input[3]"]}}),
        "Refusal": object_of({"error": ref("Error")}),
    }  # fmt: skip


def _answers() -> Json:
    """Of each route: flat for one image, a list for several."""
    guess = object_of({"index": INTEGER, "label": STRING, "probability": {"type": "number"}})
    flat: dict[str, Json] = {
        "Embedding": {"embedding": NUMBERS},
        "Classes": {"classes": {"type": "array", "items": guess}},
        "Features": {stage: {"type": "array"} for stage in STAGE_OUTPUTS},
        "Score": {"score": {"type": "number"}, "map": {"type": "array", "items": NUMBERS}},
    }
    schemas: Json = {}
    for name, properties in flat.items():
        schemas[name] = object_of(properties | STRINGS, required=STRINGS)
        one = {"index": INTEGER, "status": {"enum": ["ok", "error"]}, "error": ref("Error")} | properties
        data = {"data": {"type": "array", "items": object_of(one, required=("index", "status"))}}
        schemas[f"{name}List"] = object_of(data | STRINGS)
    return schemas


def _bodies() -> Json:
    image = {"type": "string", "description": "A data URI, or base64 alone.", "pattern": BASE64, "examples": [PHOTO]}
    most = Settings().max_items
    several = {"type": "array", "items": image, "minItems": 1, "maxItems": most}
    file = {"type": "string", "format": "binary"}
    files = {"type": "array", "items": file, "minItems": 1, "maxItems": most}
    two = {"minItems": 2, "maxItems": 2}
    request = {
        "model": STRING,
        "input": {"oneOf": [image, several]},
        "encoding_format": {"enum": ["float", "base64"], "default": "float"},
        "dimensions": {"type": "integer", "description": "Must be the embedding's own length."},
        "user": STRING,
    }
    return {
        "Form": object_of({"image": files}),
        "FormOfMany": object_of({"image": {"type": "array", "items": file}}, required=()),
        "FormOfTwo": object_of({"image": files | two}),
        "Input": object_of({"input": {"oneOf": [image, several]}}) | CLOSED,
        "InputOfTwo": object_of({"input": several | two}) | CLOSED,
        "OpenAIRequest": object_of(request, required=("model", "input")) | CLOSED,
    }


def _openai() -> Json:
    found = {"description": "Numbers, or base64 of little-endian float32.", "oneOf": [NUMBERS, STRING]}
    embedding = object_of({"object": {"const": "embedding"}, "index": INTEGER, "embedding": found})
    listed = {"object": {"const": "list"}}
    model = {"id": STRING, "object": {"const": "model"}, "created": INTEGER, "owned_by": STRING, "fingerprint": STRING}
    return {
        "OpenAIEmbeddings": object_of(
            listed | {"data": {"type": "array", "items": embedding},
                      "usage": object_of({"prompt_tokens": INTEGER, "total_tokens": INTEGER})} | STRINGS
        ),
        "OpenAIModel": object_of(model),
        "OpenAIModels": object_of(listed | {"data": {"type": "array", "items": ref("OpenAIModel")}}),
    }  # fmt: skip
