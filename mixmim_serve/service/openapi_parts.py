"""What the parts of the OpenAPI document are made of."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

Json = dict[str, Any]

STRING: Json = {"type": "string"}
INTEGER: Json = {"type": "integer"}
NUMBERS: Json = {"type": "array", "items": {"type": "number"}}
CLOSED: Json = {"additionalProperties": False}

REFUSALS = {
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


def object_of(properties: Json, required: Iterable[str] | None = None) -> Json:
    """All properties are required unless they are named."""
    wanted = properties if required is None else required
    return {"type": "object", "properties": properties, "required": list(wanted)}


def refusals_of(*statuses: int) -> Json:
    """The answers of an operation that may fail in these ways."""
    return {str(status): {"$ref": f"#/components/responses/{status}"} for status in statuses}


def refusal(text: str) -> Json:
    """An answer of one kind of error."""
    return {"description": text, "content": {"application/json": {"schema": ref("Refusal")}}}


def option(name: str, schema: Json, text: str) -> Json:
    """A parameter in the query string."""
    return {"name": name, "in": "query", "description": text, "schema": schema}


def header(name: str, text: str, schema: Json) -> Json:
    """A parameter among the headers."""
    return {"name": name, "in": "header", "description": text, "schema": schema}


def ref(name: str) -> Json:
    """A schema by its name."""
    return {"$ref": f"#/components/schemas/{name}"}
