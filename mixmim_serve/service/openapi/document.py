"""The OpenAPI document. Bodies and results are described by hand, since routes read bodies themselves.

A committed copy (docs/openapi.json) shows every change in review; a test compares the two.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

from mixmim_serve.service.openapi import images, jobs, openai
from mixmim_serve.service.openapi.parts import (
    ERRORS,
    IDENTITY_SCHEMA,
    INTEGER,
    STRING,
    error_response,
    get_operation,
    object_schema,
    ref,
)
from mixmim_serve.service.openapi.purposes import PURPOSES, TAGS
from mixmim_serve.service.options import Json
from mixmim_serve.service.request import Endpoint
from mixmim_serve.version import __version__

PLAIN: Json = {"type": "string"}
BOOLEAN: Json = {"type": "boolean"}
OPERATIONS: dict[tuple[str, str], Callable[[Sequence[Json]], Json]] = {
    ("POST", "/embed"): images.embed,
    ("POST", "/classify"): images.classify,
    ("POST", "/features"): images.features,
    ("POST", "/score"): images.score,
    ("POST", "/anomaly"): images.anomaly,
    ("POST", "/reconstruct"): images.reconstruct,
    ("POST", "/embed/stream"): images.embed_stream,
    ("POST", "/v1/embeddings"): openai.embeddings,
    ("GET", "/v1/models"): openai.models,
    ("GET", "/v1/models/{name}"): openai.model,
    ("POST", "/jobs"): jobs.create,
    ("GET", "/jobs"): jobs.show,
    ("DELETE", "/jobs"): jobs.remove,
    ("POST", "/jobs/cancel"): jobs.cancel,
    ("POST", "/jobs/resume"): jobs.resume,
    ("GET", "/jobs/file"): jobs.file,
    ("GET", "/model"): lambda _: get_operation(
        "Describe the served model: name, network, preprocessing, heads, engine, fingerprints", ref("Model")
    ),
    ("GET", "/livez"): lambda _: _plain("Check that the process is alive"),
    ("GET", "/healthz"): lambda _: _plain("Same as /livez"),
    ("GET", "/readyz"): lambda _: _plain("Check that a known photo gets the right answer", errors=(503,)),
    ("GET", "/metrics"): lambda _: _plain("Get metrics in Prometheus' text format"),
    ("GET", "/openapi.json"): lambda _: get_operation("Get this document", {"type": "object"}, errors=()),
    ("GET", "/docs"): lambda _: _plain("Open a page to try the routes", media="text/html"),
}


@functools.cache
def document(endpoints: tuple[Endpoint, ...]) -> Json:
    """The document of a route table.

    Raises:
        KeyError: for a documented endpoint that has no operation here, or no purpose.
    """
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "mixmim-serve",
            "version": __version__,
            "description": "Embeddings, classes, features, scores, alarms and reconstructions of images by a MixMIM "
            "backbone.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "tags": TAGS,
        "paths": _paths(endpoints),
        "components": {
            "schemas": _schemas(),
            "responses": {str(status): error_response(text) for status, text in ERRORS.items()},
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "header": {"type": "apiKey", "in": "header", "name": "X-Api-Key"},
            },
        },
        "security": [{}, {"bearer": []}, {"header": []}],
    }


def _paths(endpoints: Sequence[Endpoint]) -> Json:
    paths: Json = {}
    for endpoint in endpoints:
        if endpoint.is_documented:
            path = endpoint.path.replace(":path}", "}")
            parameters = [option.parameter() for option in endpoint.options or ()]
            operation = OPERATIONS[endpoint.method, path](parameters)
            tag, description = PURPOSES[endpoint.method, path]
            about = {"tags": [tag], "summary": operation.pop("summary"), "description": description}
            paths.setdefault(path, {})[endpoint.method.lower()] = about | operation
    return paths


def _plain(summary: str, *, media: str = "text/plain", errors: tuple[int, ...] = ()) -> Json:
    return get_operation(summary, PLAIN, media=media, errors=errors)


def _list_of(items: Json, description: str) -> Json:
    return {"type": "array", "items": items, "description": description}


def _schemas() -> Json:
    return (
        images.answer_schemas()
        | images.body_schemas()
        | openai.request_schema()
        | openai.answer_schemas()
        | jobs.schemas()
        | {
            "Model": object_schema(
                {
                    **IDENTITY_SCHEMA,
                    "engine_fingerprint": STRING | {"description": "The same as `fingerprint`."},
                    "size": STRING | {"description": "Named size of the network, or custom."},
                    "embedding_size": INTEGER,
                    "labels": _list_of(STRING, "Classes of the default head."),
                    "heads": _list_of(ref("Head"), "Classification heads, for `head` of /classify."),
                    "outputs": {"type": "object"},
                }
            ),
            "Head": object_schema(
                {
                    "name": STRING,
                    "default": BOOLEAN,
                    "classes": _list_of(STRING, "In the order of the probabilities in binary formats."),
                    "inputs": _list_of(STRING, "Outputs of the encoder that it reads."),
                    "fingerprint": STRING | {"description": "Of classes and weights; empty for `main`."},
                    "accuracy": {"type": "object", "description": "In percent, and what it was judged on."},
                    "provenance": {"type": "object"},
                },
                required=("name", "default", "classes", "inputs", "fingerprint"),
            ),
            "Error": object_schema(
                {
                    "message": STRING,
                    "type": STRING,
                    "code": STRING,
                    "param": {"type": ["string", "null"], "examples": ["input[3]"]},
                }
            ),
            "Refusal": object_schema({"error": ref("Error")}),
        }
    )
