"""Coverage-guided fuzzing of the readers of bodies; optional, and no part of the tests: `pip install atheris`.

    python tests/security/fuzz_bodies.py json CORPUS -max_total_time=600
    python tests/security/fuzz_bodies.py form CORPUS -max_total_time=600

New inputs are kept in CORPUS. A crash is an exception other than `RequestError`, JSON that the standard library
refuses, a form whose parts depend on how it was cut into chunks, or (with -timeout=1) a body that takes a second.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from typing import TypeVar

import atheris

MODULES = ["mixmim_serve.service.bounded_json", "mixmim_serve.service.body", "mixmim_serve.service.uploads"]
with atheris.instrument_imports(include=[*MODULES, "python_multipart"]):
    from mixmim_serve.service.body import Part, split_form
    from mixmim_serve.service.bounded_json import MAX_DEPTH, is_deeper
    from mixmim_serve.service.errors import RequestError
    from mixmim_serve.service.uploads import KEY, decode_inputs, parse_json

MAX_IMAGES = 4
MAX_PART = 64
MAX_LENGTH = 1024
CONTENT_TYPE = "multipart/form-data; boundary=b"
SEEDS = {
    "json": [b'{"input": "data:image/png;base64,aGF0"}', b'{"input": ["aGF0", "http://x", 1, null]}', b"[[[[{}]]]]"],
    "form": [
        b'--b\r\nContent-Disposition: form-data; name="image"; filename="a.jpg"\r\n\r\nhat\r\n--b--\r\n',
        b'--b\r\nContent-Disposition: form-data; name="top"\r\n\r\n1\r\n--b\r\n\r\n\r\n--b--',
    ],
}
Result = TypeVar("Result")


def check_json(body: bytes) -> None:
    """Any bytes are read or refused, and an image of a JSON body is bytes or its own error."""
    try:
        value = parse_json(body, max_items=MAX_IMAGES)
        json.loads(body)
        if is_deeper(value, MAX_DEPTH):
            raise AssertionError("deeper than allowed")
        uploads = decode_inputs(value.get(KEY), MAX_IMAGES)
    except RequestError as error:
        check_error(error)
        return
    for image in uploads.images:
        if isinstance(image, RequestError):
            check_error(image)


def check_form(body: bytes) -> None:
    """A form is read or refused, in one piece as in many; no part exceeds the limit by more than a byte."""
    whole, pieces = read_form([body]), read_form([body[at : at + 1] for at in range(len(body))])
    if whole != pieces:
        raise AssertionError(f"in one piece {whole}, in many {pieces}")
    if whole and any(len(part.data) > MAX_PART + 1 for part in whole):
        raise AssertionError("a part above the limit")


def read_form(chunks: list[bytes]) -> list[Part] | None:
    """The parts of a form; None if it is refused."""

    async def read() -> list[Part]:
        return [part async for part in split_form(in_pieces(chunks), CONTENT_TYPE, MAX_PART)]

    try:
        return run(read())
    except RequestError as error:
        check_error(error)
        return None


async def in_pieces(chunks: list[bytes]) -> AsyncIterator[bytes]:
    """What a server receives."""
    for chunk in chunks:
        yield chunk


def run(coroutine: Coroutine[object, object, Result]) -> Result:
    """The result of a coroutine that waits for nothing; an event loop would take most of the time."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        result: Result = stop.value
        return result
    raise AssertionError("the reader waited")


def check_error(error: RequestError) -> None:
    """A refusal is the client's fault, and says so in few words."""
    if not (400 <= error.status < 500 and 0 < len(str(error)) < MAX_LENGTH):
        raise error


if __name__ == "__main__":
    logging.disable()  # python-multipart logs each refusal
    target, folder = sys.argv.pop(1), Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for index, seed in enumerate(SEEDS[target]):
        (folder / f"seed-{index}").write_bytes(seed)
    atheris.Setup([*sys.argv, f"-max_len={MAX_LENGTH}"], {"json": check_json, "form": check_form}[target])
    atheris.Fuzz()
