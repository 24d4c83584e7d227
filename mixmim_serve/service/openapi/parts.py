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
IDENTITY: Json = {"model": "tiny", "fingerprint": "00112233445566778899aabbccddeeff"}  # an example
IDENTITY_SCHEMA: Json = {"model": STRING, "fingerprint": STRING}  # in every answer

ERRORS = {
    400: "Malformed: the body, an option or a header.",
    401: "The API key is missing or wrong.",
    404: "No such thing: a part of this model (a head, a decoder), a model, a job, or jobs at all.",
    406: "None of the media types in Accept can be written.",
    408: "The body came too slowly.",
    409: "The job has not ended.",
    413: "Too many bytes, pixels or images.",
    415: "The body, or an image in it, is of another type.",
    422: "The image, or all of them, cannot be decoded.",
    429: "The server is full: Retry-After says when to come again.",
    500: "A bug; the server's log has the reason.",
    503: "Not ready, or shutting down.",
    504: "The deadline passed.",
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
    timeout = header("X-Request-Timeout", "Seconds until the answer is of no more use.", seconds)
    request_id = header("X-Request-Id", "Comes back in the answer and stands in the log.", {"type": "string"})
    return {
        "summary": summary,
        "parameters": [*parameters, timeout, request_id],
        "requestBody": {"required": True, "content": body},
        "responses": {"200": answer} | error_refs(*(status for status in ERRORS if status != 409)),
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
    answer = {"description": "The answer.", "content": {media: {"schema": schema}}}
    operation = {"summary": summary, "responses": {"200": answer} | error_refs(*errors)}
    return operation | ({"parameters": list(parameters)} if parameters else {})
