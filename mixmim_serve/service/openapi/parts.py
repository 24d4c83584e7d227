"""Pieces of the OpenAPI document that several routes share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from mixmim_serve.service.options import Json
from mixmim_serve.service.settings import MAX_REQUEST_TIMEOUT

STRING: Json = {"type": "string"}
INTEGER: Json = {"type": "integer"}
NUMBERS: Json = {"type": "array", "items": {"type": "number"}}
BINARY: Json = {"type": "string", "format": "binary"}
CLOSED: Json = {"additionalProperties": False}

PHOTO = "data:image/jpeg;base64,/9j/4AAQSkZJRgABAQAAAQABAAD/"
IDENTITY: Json = {
    "model": "shoes",
    "fingerprint": "00112233445566778899aabbccddeeff",
    "model_fingerprint": "2e1b81021939d7351b9dd02985363a0a",
}  # an example
IDENTITY_SCHEMA: Json = {
    "model": STRING | {"description": "The bundle's name."},
    "fingerprint": STRING
    | {
        "description": "The engine fingerprint: weights, preprocessing, runtime and precision. Vectors and scores "
        "compare only where it is the same."
    },
    "model_fingerprint": STRING
    | {"description": "The model fingerprint, which `mixmim export` prints: weights and preprocessing alone."},
}  # in every answer

ERRORS = {
    400: "The body, an option or a header is malformed.",
    401: "The API key is missing or wrong.",
    404: "Not found: a part of this model (head, decoder or calibration), a model, a job; or the server takes no jobs.",
    406: "The route can write none of the media types in Accept.",
    408: "The body arrived too slowly.",
    409: "The job has not ended.",
    413: "Too many bytes, pixels or images.",
    415: "The body, or an image in it, is of a type that is not accepted.",
    422: "The image cannot be decoded, or none of several can.",
    429: "The server is full: retry after the time in Retry-After.",
    500: "The server failed; its log has the reason.",
    503: "The server is starting or shutting down, gives wrong answers, or cannot use its list of jobs.",
    504: "The deadline passed.",
    507: "The server's disk is full.",
}


def object_schema(properties: Json, required: Iterable[str] | None = None) -> Json:
    """The schema of an object; all properties are required unless `required` names some."""
    names = properties if required is None else required
    return {"type": "object", "properties": properties, "required": list(names)}


def ref(name: str) -> Json:
    """A reference to a schema by its name."""
    return {"$ref": f"#/components/schemas/{name}"}


def error_refs(*statuses: int) -> Json:
    """References to the error responses of an operation."""
    return {str(status): {"$ref": f"#/components/responses/{status}"} for status in statuses}


def error_response(description: str) -> Json:
    """The response of one kind of error."""
    return {"description": description, "content": {"application/json": {"schema": ref("Refusal")}}}


def header(name: str, description: str, schema: Json) -> Json:
    """A parameter in the headers."""
    return {"name": name, "in": "header", "description": description, "schema": schema}


def image_operation(summary: str, parameters: Sequence[Json], body: Json, answer: Json) -> Json:
    """An operation that takes images."""
    seconds = {"type": "number", "exclusiveMinimum": 0, "maximum": MAX_REQUEST_TIMEOUT}
    timeout = header("X-Request-Timeout", "Deadline in seconds; work that misses it is cancelled.", seconds)
    request_id = header("X-Request-Id", "Returned in the response and written to the log.", {"type": "string"})
    return {
        "summary": summary,
        "parameters": [*parameters, timeout, request_id],
        "requestBody": {"required": True, "content": body},
        "responses": {"200": answer} | error_refs(*(status for status in ERRORS if status not in (409, 507))),
    }


def get_operation(
    summary: str,
    schema: Json,
    *,
    media: str = "application/json",
    parameters: Sequence[Json] = (),
    errors: tuple[int, ...] = (401, 503),
) -> Json:
    """An operation that only reads."""
    answer = {"description": "The result.", "content": {media: {"schema": schema}}}
    operation = {"summary": summary, "responses": {"200": answer} | error_refs(*errors)}
    return operation | ({"parameters": list(parameters)} if parameters else {})
