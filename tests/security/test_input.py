"""What clients put into JSON, options and headers: its size and depth cost nothing, and little of it comes back."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import orjson
import pytest
from conftest import REPOSITORY
from serving import HAT, JPEG, MODEL, TestClient, refusal
from test_server import serve

from mixmim_serve.bundle import open_bundle
from mixmim_serve.config import unknown
from mixmim_serve.errors import MAX_QUOTED, MixMIMError, quoted
from mixmim_serve.service.bounded_json import MAX_PARTS, has_more_parts, load_json
from mixmim_serve.service.errors import RequestError
from mixmim_serve.service.jobs.options import parse_options
from mixmim_serve.service.jobs.roots import Roots
from mixmim_serve.service.routes.stream import MAX_ID, parse_line
from mixmim_serve.service.server import open_door

LONG = "x" * 3_000_000
JSON = {"content-type": "application/json"}


def nested(depth: int, inner: str = "1") -> bytes:
    return b"[" * depth + inner.encode() + b"]" * depth


# Many values


@pytest.mark.parametrize("unit", [b"{},", b"[],", b"1,", b'{"a":1},', b'"",', b"[[]],"])
def test_json_of_many_values_is_refused_before_it_is_parsed(unit: bytes) -> None:
    body = b"[" + unit * (33_000_000 // len(unit)) + b"1]"
    began = time.process_time()
    with pytest.raises(RequestError, match="far more values") as caught:
        load_json(body)
    assert (caught.value.status, caught.value.code) == (413, "json_too_complex")
    assert time.process_time() - began < 0.2  # 2 s when it was parsed


@pytest.mark.parametrize("route", ["/embed", "/v1/embeddings", "/classify"])
def test_many_values_are_refused_in_one_sentence(client: TestClient, route: str) -> None:
    response = client.post(route, content=b'{"input": [' + b"{}," * 100_000 + b"{}]}", headers=JSON)
    status, message, _ = refusal(response)
    assert (status, response.json()["error"]["code"]) == (413, "json_too_complex")
    assert message.startswith("the body has far more values than images could need: ")


def test_many_values_cost_no_memory(exported_bundle: Path, tmp_path: Path) -> None:
    with serve(exported_bundle, tmp_path) as server:
        server.wait_until_ready()
        before = memory(server.process.pid, "VmRSS")
        body = b'{"input": [' + b"{}," * 11_000_000 + b"{}]}"
        answer = httpx.post(f"http://127.0.0.1:{server.port}/embed", content=body, headers=JSON, timeout=30)
        assert answer.status_code == 413
        assert memory(server.process.pid, "VmHWM") - before < 120e6  # the body, and once more as it is put together


def memory(process: int, field: str) -> int:
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024


def test_the_bound_counts_at_least_the_values() -> None:
    def values(value: object) -> int:
        if isinstance(value, dict):
            return 1 + sum(1 + values(item) for item in value.values())
        return 1 + sum(map(values, value)) if isinstance(value, list) else 1

    for value in ([], {}, [1, [2, {}]], {"a": [{"b": {}}, 1, "x,y"], "c": None}, [[[[]]]], [{"a": 1}] * 9):
        data = orjson.dumps(value)
        most = next(most for most in range(100) if not has_more_parts(data, most))
        assert values(value) <= 2 * most + 1


def test_as_many_images_as_allowed_are_read() -> None:
    images = ["data:image/jpeg;base64,AAAA"] * 5000
    assert load_json(orjson.dumps({"input": images}), 5000) == {"input": images}
    with pytest.raises(RequestError):
        load_json(orjson.dumps(["a"] * (MAX_PARTS + 200)))


# Depth


@pytest.mark.parametrize("depth", [17, 300, 1000, 100_000])
def test_nested_json_is_refused_in_one_sentence(client: TestClient, depth: int) -> None:
    for key in ("model", "input", "user"):
        body = b'{"%s": %s}' % (key.encode(), nested(depth))
        status, message, _ = refusal(client.post("/v1/embeddings", content=body, headers=JSON))
        assert status in (400, 413)
        assert message.startswith("the body ")


@pytest.mark.parametrize("model", [[], {}, 1, True, nested(10), b'{"a":' * 9 + b"1" + b"}" * 9])
def test_a_model_that_is_no_string_is_refused(client: TestClient, model: object) -> None:
    text = model if isinstance(model, bytes) else orjson.dumps(model)
    status, message, param = refusal(client.post("/v1/embeddings", content=b'{"model": %s}' % text, headers=JSON))
    assert (status, param) == (400, "model")
    assert message.startswith("model must be a string, got ")


@pytest.mark.parametrize(
    "id_", [nested(3), nested(300), b"{}", b'{"a":' * 300 + b"1" + b"}" * 300, b'"%s"' % LONG.encode()]
)
def test_an_id_that_cannot_be_repeated_is_an_error_in_its_place(client: TestClient, id_: bytes) -> None:
    lines = [b'{"input": "AAAA", "id": %s}' % text for text in (b"1", id_, b'"b"')]
    response = client.post("/embed/stream", content=b"\n".join(lines), headers={"content-type": "application/x-ndjson"})
    answers = [json.loads(line) for line in response.text.splitlines()]
    assert [answer.get("id") for answer in answers] == [1, None, "b"]
    assert answers[1]["error"]["code"] in ("bad_id", "json_too_complex")
    assert answers[1]["error"]["param"] == "input[1]"
    assert len(response.content) < 2000


@pytest.mark.parametrize("id_", ["a" * MAX_ID, "", 1, -1.5, True, None, 2**64 - 1])
def test_an_id_may_be_any_scalar(id_: object) -> None:
    line = parse_line(0, orjson.dumps({"input": "AAAA", "id": id_}))
    assert (line.image, line.id) == (b"\0\0\0", id_)


# Echoes


@pytest.mark.parametrize(
    "value", [LONG, [LONG] * 100, {LONG: LONG}, [[[[[LONG]]]]], json.loads(nested(900)), "\x00" * 1000, "é" * 1000]
)
def test_a_quotation_is_short(value: object) -> None:
    began = time.process_time()
    assert len(quoted(value)) <= MAX_QUOTED
    assert time.process_time() - began < 0.05


@pytest.mark.parametrize("value", ["", "a", "it's", 'a "b"', "a\nb", 1, 1.5, None, True, ["a", 1], {"a": 1}])
def test_what_is_short_is_quoted_in_full(value: object) -> None:
    assert quoted(value) == repr(value)


REQUESTS: dict[str, Callable[[TestClient], object]] = {
    "key": lambda client: client.post("/embed", content=orjson.dumps({LONG: 1}), headers=JSON),
    "url": lambda client: client.post("/embed", content=orjson.dumps({"input": "http://" + LONG}), headers=JSON),
    "input": lambda client: client.post("/embed", content=orjson.dumps({"input": LONG + ",x"}), headers=JSON),
    "parameter": lambda client: client.post("/v1/embeddings", content=orjson.dumps({LONG: 1}), headers=JSON),
    "model": lambda client: client.post("/v1/embeddings", content=orjson.dumps({"model": LONG}), headers=JSON),
    "encoding": lambda client: client.post(
        "/v1/embeddings", content=orjson.dumps({"model": MODEL, "encoding_format": [LONG]}), headers=JSON
    ),
    "model in the path": lambda client: client.get(f"/v1/models/{LONG[:60_000]}"),
    "option": lambda client: client.post(f"/embed?{LONG[:60_000]}=1", content=HAT, headers=JPEG),
    "number": lambda client: client.post(f"/classify?top={LONG[:60_000]}", content=HAT, headers=JPEG),
    "choice": lambda client: client.post(f"/embed?dtype={LONG[:60_000]}", content=HAT, headers=JPEG),
    "switch": lambda client: client.post(f"/embed?normalize={LONG[:60_000]}", content=HAT, headers=JPEG),
    "words": lambda client: client.post(f"/features?stages={LONG[:60_000]}", content=HAT, headers=JPEG),
    "content type": lambda client: client.post("/embed", content=HAT, headers={"content-type": LONG}),
    "stream": lambda client: client.post("/embed/stream", content=HAT, headers={"content-type": LONG}),
    "accept": lambda client: client.post("/embed", content=HAT, headers=JPEG | {"accept": LONG}),
    "timeout": lambda client: client.post("/embed", content=HAT, headers=JPEG | {"x-request-timeout": LONG}),
    "request": lambda client: client.post("/nowhere", content=HAT, headers=JPEG | {"x-request-id": LONG}),
}


@pytest.mark.parametrize("case", REQUESTS)
def test_errors_repeat_little(client: TestClient, case: str) -> None:
    response = REQUESTS[case](client)
    assert refusal(response)[0] in (400, 404, 406, 415)
    assert len(response.content) < 1500
    assert sum(len(name) + len(value) for name, value in response.headers.items()) < 500


def test_errors_of_jobs_repeat_little(exported_bundle: Path, tmp_path: Path) -> None:
    bundle = open_bundle(exported_bundle)
    attempts = [
        *(lambda values=values: parse_options(values, bundle) for values in (
            {LONG: 1}, {"format": LONG}, {"batch": LONG}, {"features": [LONG]}, {"features": LONG},
            {"max_failures": [LONG]}, {"fast_jpeg": {LONG: LONG}},
        )),
        lambda: Roots([str(tmp_path)]).find(LONG),
    ]  # fmt: skip
    for attempt in attempts:
        began = time.process_time()
        with pytest.raises(MixMIMError) as caught:
            attempt()
        assert len(str(caught.value)) < 600
        assert time.process_time() - began < 0.5


def test_looking_for_a_similar_name_costs_nothing() -> None:
    began = time.process_time()
    assert len(str(unknown("option", LONG * 10, ["batch", "features"]))) < 300
    assert time.process_time() - began < 0.05


# An open door


def test_a_server_without_keys_says_what_anyone_can_do() -> None:
    warning = open_door("0.0.0.0", (), None)  # noqa: S104
    assert warning.startswith("WARNING: no API key is set, and 0.0.0.0 can be reached from other machines.")
    assert "use the model" in warning
    assert "jobs" not in warning
    warning = open_door("0.0.0.0", ("/photos", "s3://more"), "/var/jobs")  # noqa: S104
    for ability in ("images lie below /photos, s3://more", "delete everybody's jobs", "fill the disk of /var/jobs"):
        assert ability in warning


@pytest.mark.parametrize(
    ("host", "key", "warned"), [("192.0.2.1", "", True), ("192.0.2.1", "k" * 20, False), ("127.0.0.1", "", False)]
)
def test_the_warning_is_printed(exported_bundle: Path, host: str, key: str, warned: bool) -> None:
    code = f"""
from pathlib import Path
from mixmim_serve.service import server
from mixmim_serve.service.settings import Settings
bind = server.bind
server.bind = lambda host, port: bind("127.0.0.1", port)
server.run = lambda app, listener: None  # it never listens
server.launch(Path({str(exported_bundle)!r}), {host!r}, 0, "onnx", Settings())
"""
    environment = {"PYTHONPATH": str(REPOSITORY), "MIXMIM_API_KEYS": key, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == 0, done.stderr
    assert ("WARNING: no API key is set" in done.stdout) is warned
