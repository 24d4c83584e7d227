"""Routes for OpenAI clients in the OpenAPI document."""

from __future__ import annotations

from collections.abc import Sequence

from mixmim_serve.service.openapi.images import IMAGE, IMAGES
from mixmim_serve.service.openapi.parts import (
    CLOSED,
    IDENTITY,
    IDENTITY_SCHEMA,
    INTEGER,
    NUMBERS,
    PHOTO,
    STRING,
    get_operation,
    image_operation,
    object_schema,
    ref,
)
from mixmim_serve.service.options import Json


def embeddings(parameters: Sequence[Json]) -> Json:
    """POST /v1/embeddings."""
    request = {"model": IDENTITY["model"], "input": [PHOTO], "encoding_format": "float"}
    example = {
        "object": "list",
        "data": [{"object": "embedding", "index": 0, "embedding": [0.12, -0.5]}],
        "usage": {"prompt_tokens": 49, "total_tokens": 49},
    } | IDENTITY
    body = {"application/json": {"schema": ref("OpenAIRequest"), "example": request}}
    answer = {
        "description": "The result.",
        "content": {"application/json": {"schema": ref("OpenAIEmbeddings"), "example": example}},
    }
    return image_operation("Embed images through an OpenAI client", parameters, body, answer)


def models(parameters: Sequence[Json]) -> Json:
    """GET /v1/models."""
    return get_operation("List the served model for an OpenAI client", ref("OpenAIModels"))


def model(parameters: Sequence[Json]) -> Json:
    """GET /v1/models/{name}."""
    name = {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}
    return get_operation("Get the served model by name", ref("OpenAIModel"), parameters=[name], errors=(401, 404, 503))


def request_schema() -> Json:
    """The body of POST /v1/embeddings."""
    properties = {
        "model": STRING,
        "input": {"oneOf": [IMAGE, IMAGES]},
        "encoding_format": {"enum": ["float", "base64"], "default": "float"},
        "dimensions": {"type": "integer", "description": "Must equal the length of the embedding."},
        "user": STRING,
    }
    return {"OpenAIRequest": object_schema(properties, required=("model", "input")) | CLOSED}


def answer_schemas() -> Json:
    """The answers of the /v1 routes."""
    vector = {"description": "Numbers, or base64 of little-endian float32.", "oneOf": [NUMBERS, STRING]}
    embedding = object_schema({"object": {"const": "embedding"}, "index": INTEGER, "embedding": vector})
    usage = object_schema({"prompt_tokens": INTEGER, "total_tokens": INTEGER})
    listed = {"object": {"const": "list"}}
    named = {"id": IDENTITY_SCHEMA["model"], "object": {"const": "model"}, "created": INTEGER, "owned_by": STRING}
    model = named | {name: IDENTITY_SCHEMA[name] for name in ("fingerprint", "model_fingerprint")}
    embeddings = listed | {"data": {"type": "array", "items": embedding}, "usage": usage} | IDENTITY_SCHEMA
    return {
        "OpenAIEmbeddings": object_schema(embeddings),
        "OpenAIModel": object_schema(model),
        "OpenAIModels": object_schema(listed | {"data": {"type": "array", "items": ref("OpenAIModel")}}),
    }
