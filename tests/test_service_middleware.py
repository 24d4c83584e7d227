"""What happens around every route: ids, times, keys, deadlines, who leaves, what is counted, whether all is well."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from serving import HAT, JPEG, PATIENCE, SHOES, Around, Gate, TestClient, app_of, client_of, files, refusal

from mixmim_serve.engines import Engine
from mixmim_serve.errors import ConfigError
from mixmim_serve.service.app import create_app
from mixmim_serve.service.metrics import JsonFormatter
from mixmim_serve.service.settings import Settings, from_assignments, from_environment

KEY, OTHER_KEY = "correct-horse-battery", "staple-staple-staple"


def metric(client: TestClient, line: str) -> float:
    """The value of one series, 0 before it exists."""
    for each in client.get("/metrics").text.splitlines():
        if each.startswith(f"{line} "):
            return float(each.rpartition(" ")[2])
    return 0.0


# Headers


def test_every_answer_has_an_id_and_its_times(client: TestClient) -> None:
    response = client.post("/embed", files=files(HAT), headers={"x-request-id": "my-id-7"})
    assert response.headers["x-request-id"] == "my-id-7"
    stages = [entry.partition(";")[0] for entry in response.headers["server-timing"].split(", ")]
    assert stages == ["decode", "queue", "infer", "encode"]
    assert all(float(entry.partition("dur=")[2]) >= 0 for entry in response.headers["server-timing"].split(", "))
    for odd in ("", "two words", "x" * 200):
        response = client.get("/model", headers={"x-request-id": odd})
        assert len(response.headers["x-request-id"]) == 32  # one of ours
    assert "x-request-id" in client.post("/embed", files=files(b"bad")).headers
    assert "x-request-id" in client.get("/nothing").headers


# Keys


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_text(f"# of the shop\n{KEY}\n\n")
    return path


@pytest.mark.parametrize("header", [{"authorization": f"Bearer {KEY}"}, {"x-api-key": KEY}])
def test_a_key_lets_in(engine: Engine, keys: Path, header: dict[str, str]) -> None:
    with client_of(engine, api_keys=str(keys)) as client:
        assert client.post("/embed", files=files(HAT), headers=header).status_code == 200
        assert client.get("/model", headers=header).status_code == 200


@pytest.mark.parametrize(
    "header", [{}, {"authorization": f"Bearer {KEY}x"}, {"authorization": f"Basic {KEY}"}, {"x-api-key": KEY[:-1]}]
)
def test_without_a_key_only_probes_answer(engine: Engine, keys: Path, header: dict[str, str]) -> None:
    with client_of(engine, api_keys=str(keys)) as client:
        for response in (
            client.post("/embed", files=files(HAT), headers=header),
            client.get("/model", headers=header),
            client.get("/v1/models", headers=header),
            client.get("/nothing", headers=header),
        ):
            assert refusal(response)[0] == 401
            assert response.headers["www-authenticate"] == "Bearer"
            assert KEY not in response.text
        for path in ("/livez", "/readyz", "/healthz", "/metrics", "/openapi.json", "/docs", "/docs/swagger-ui.css"):
            assert client.get(path, headers=header).status_code == 200


def test_a_changed_file_of_keys_is_taken_up(engine: Engine, keys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mixmim_serve.service.auth.RELOAD_SECONDS", 0.0)
    with client_of(engine, api_keys=str(keys)) as client:

        def status(key: str) -> int:
            return client.get("/model", headers={"x-api-key": key}).status_code

        keys.write_text(OTHER_KEY)
        assert (status(KEY), status(OTHER_KEY)) == (401, 200)
        keys.write_text("short")  # a mistake closes the door
        assert (status(KEY), status(OTHER_KEY)) == (401, 401)
        keys.write_text(OTHER_KEY)
        assert (status(KEY), status(OTHER_KEY)) == (401, 200)
        keys.unlink()
        assert (status(KEY), status(OTHER_KEY)) == (401, 401)
        keys.write_text("")
        assert (status(KEY), status(OTHER_KEY)) == (401, 401)


def test_keys_of_the_environment(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIXMIM_API_KEYS", f"{KEY}, {OTHER_KEY}")
    with client_of(engine) as client:
        assert client.get("/model").status_code == 401
        assert [client.get("/model", headers={"x-api-key": key}).status_code for key in (KEY, OTHER_KEY)] == [200, 200]


@pytest.mark.parametrize("content", [None, b"short", b"\xff\xfe"])
def test_keys_that_cannot_be_used_end_the_start(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "keys"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"keys in|API key of fewer"):
        create_app(Settings(api_keys=str(path)))


# Deadlines, and who leaves


def test_a_deadline_is_answered_504_and_never_reaches_the_engine(engine: Engine) -> None:
    gate = Gate()
    around = Around(engine, gate)
    with client_of(around) as client, ThreadPoolExecutor(1) as other:
        first = other.submit(client.post, "/embed", files=files(HAT))
        assert gate.reached.wait(PATIENCE)
        response = client.post("/embed", files=files(SHOES), headers={"x-request-timeout": "0.05"})
        assert refusal(response)[0] == 504
        assert "no answer within 0.05 s" in refusal(response)[1]
        gate.release.set()
        assert first.result(PATIENCE).status_code == 200
        assert client.post("/embed", files=files(HAT)).status_code == 200
        assert metric(client, 'mixmim_failures_total{reason="deadline"}') == 1
        assert metric(client, 'mixmim_batch_size_sum{graph="encoder"}') == 2
    assert len(around.ran) == 2


@pytest.mark.parametrize("text", ["0", "-1", "nan", "soon", "1e9"])
def test_a_timeout_that_is_none_is_refused(client: TestClient, text: str) -> None:
    response = client.post("/embed", files=files(HAT), headers={"x-request-timeout": text})
    assert refusal(response)[::2] == (400, "X-Request-Timeout")


def test_a_client_that_leaves_never_reaches_the_engine(engine: Engine) -> None:
    gate = Gate()
    around = Around(engine, gate)
    app = app_of(around)
    runtime = app.state.runtime

    async def ask(image: bytes, leave: asyncio.Event | None = None) -> list[dict[str, Any]]:
        sent: list[dict[str, Any]] = []
        messages = [{"type": "http.request", "body": image, "more_body": False}]

        async def receive() -> dict[str, Any]:
            if messages:
                return messages.pop()
            await (leave or asyncio.Event()).wait()
            return {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        headers = [(b"content-type", b"image/jpeg")]
        scope = {"type": "http", "method": "POST", "path": "/embed", "query_string": b"", "headers": headers}
        await app(scope, receive, send)
        return sent

    async def play() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        leave = asyncio.Event()
        first = asyncio.create_task(ask(HAT))
        assert await asyncio.to_thread(gate.reached.wait, PATIENCE)
        second = asyncio.create_task(ask(SHOES, leave))
        while runtime.batchers["encoder"].queued < 1:
            await asyncio.sleep(0.01)
        leave.set()
        left = await second
        gate.release.set()
        return await first, left

    stayed, left = asyncio.run(asyncio.wait_for(play(), PATIENCE))
    assert stayed[0]["status"] == 200
    assert left == []
    assert len(around.ran) == 1
    assert (app.state.admission.images, app.state.admission.bytes) == (0, 0)
    assert b'mixmim_failures_total{reason="client_left"} 1.0' in app.state.metrics.exposition()
    runtime.close()


# Room


def test_retry_after_comes_from_the_drain_rate(engine: Engine) -> None:
    gate = Gate()
    around = Around(engine, list)
    with client_of(around, max_waiting=8) as client, ThreadPoolExecutor(1) as other:
        for _ in range(5):
            client.post("/embed", files=files(*[HAT] * 8))
        admission = client.app.state.admission
        around.before = gate
        job = other.submit(client.post, "/embed", files=files(*[HAT] * 8))
        assert gate.reached.wait(PATIENCE)
        response = client.post("/embed", files=files(HAT))
        milliseconds = int(response.headers["retry-after-ms"])
        rate = admission.drain_rate()
        gate.release.set()
        assert job.result(PATIENCE).status_code == 200
    assert response.status_code == 429
    assert milliseconds == pytest.approx(max(8 / 2 / rate, 0.1) * 1e3, rel=0.5)
    assert int(response.headers["retry-after"]) == -(-milliseconds // 1000)


def test_bodies_in_progress_share_the_memory_set_aside(engine: Engine) -> None:
    with client_of(engine, max_held_bytes=len(HAT) + 5000) as client:
        assert client.post("/embed", content=HAT, headers=JPEG).status_code == 200
        response = client.post("/embed", files=files(HAT, SHOES))
    assert refusal(response)[0] == 429


# Health


def test_ready_only_while_a_known_photo_gets_the_right_answer(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mixmim_serve.service.runtime.CANARY_AGE", 0.0)
    rotten, broken = False, False

    class Rotting(Around):
        def run(self, *arguments: Any) -> Any:
            if broken:
                raise RuntimeError("the device fell off the bus")
            results = super().run(*arguments)
            return {name: array + (1.0 if rotten else 0.0) for name, array in results.items()}

    with client_of(Rotting(engine, list)) as client:
        assert client.get("/readyz").status_code == 200
        rotten = True
        response = client.get("/readyz")
        assert refusal(response)[0] == 503
        assert "known photo" in refusal(response)[1]
        assert metric(client, "mixmim_ready") == 0
        rotten, broken = False, True
        assert client.get("/readyz").status_code == 503
        broken = False
        assert client.get("/readyz").status_code == 200
        assert metric(client, "mixmim_ready") == 1
        assert client.get("/livez").status_code == 200


def test_ready_does_not_wait_for_ever(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mixmim_serve.service.runtime.CANARY_SECONDS", 0.1)
    gate = Gate()
    with client_of(Around(engine, gate)) as client:
        began = time.monotonic()
        assert client.get("/readyz").status_code == 503
        assert time.monotonic() - began < PATIENCE / 2
        gate.release.set()


def test_a_server_that_shuts_down_says_so(engine: Engine) -> None:
    with client_of(engine) as client:
        client.app.state.draining = True
        for response in (client.get("/readyz"), client.post("/embed", files=files(HAT))):
            assert refusal(response)[0] == 503
            assert response.headers["retry-after"] == "1"
        assert client.get("/livez").status_code == 200


# Metrics and logs


def test_metrics_count_routes_statuses_and_reasons(engine: Engine) -> None:
    with client_of(engine) as client:
        client.post("/embed", files=files(HAT, b"bad"))
        client.post("/embed", files=files(HAT[:900]))
        for number in range(50):
            client.get(f"/nothing/{number}")
        assert metric(client, 'mixmim_requests_total{route="/embed",status="200"}') == 1
        assert metric(client, 'mixmim_requests_total{route="/embed",status="422"}') == 1
        assert metric(client, 'mixmim_requests_total{route="other",status="404"}') == 50
        assert metric(client, 'mixmim_failures_total{reason="unsupported_image"}') == 1
        assert metric(client, 'mixmim_failures_total{reason="undecodable_image"}') == 1
        assert metric(client, 'mixmim_stage_seconds_count{stage="infer"}') == 1
        assert metric(client, 'mixmim_queue_images{graph="encoder"}') == 0
        text = client.get("/metrics").text
        series = [line for line in text.splitlines() if line.startswith("mixmim_")]
        assert "nothing" not in text
        assert len(series) < 250  # however many paths were asked for
        assert "process_resident_memory_bytes" in text


def test_access_log_lines_for_people_and_machines(client: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "mixmim_serve.access"):
        client.post("/embed", files=files(HAT), headers={"x-request-id": "seven"})
        client.get("/no%0Athing")
        client.get("/livez")
    good, forged = caplog.records
    assert good.getMessage().startswith("POST '/embed' 200 ")
    assert good.getMessage().endswith("1 images, request seven")
    assert "\n" not in forged.getMessage()
    about = json.loads(JsonFormatter().format(good))
    assert (about["path"], about["status"], about["images"], about["request"]) == ("/embed", 200, 1, "seven")
    assert about["infer_ms"] >= 0


# Pages and other origins


def test_the_document_and_a_page_to_try_it(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    assert document["openapi"].startswith("3.1")
    page = client.get("/docs")
    assert "swagger-ui-bundle.js" in page.text
    assert "//" not in page.text.replace("<!doctype", "")  # nothing from elsewhere
    script = client.get("/docs/swagger-ui-bundle.js")
    assert (script.status_code, script.headers["content-type"].partition(";")[0]) == (200, "text/javascript")
    assert len(script.content) > 100_000
    assert refusal(client.get("/docs/other.js"))[0] == 404


def test_the_root_leads_to_the_page(engine: Engine, client: TestClient, keys: Path) -> None:
    response = client.get("/", follow_redirects=False)
    assert (response.status_code, response.headers["location"]) == (307, "/docs")
    with client_of(engine, api_keys=str(keys)) as guarded:
        assert "swagger" in guarded.get("/").text


def test_other_origins_are_let_in_only_when_asked_for(engine: Engine, client: TestClient) -> None:
    origin = {"origin": "https://shop.example"}
    assert "access-control-allow-origin" not in client.post("/embed", files=files(HAT), headers=origin).headers
    with client_of(engine, cors=("https://shop.example",)) as open_client:
        answer = open_client.post("/embed", files=files(HAT), headers=origin)
        assert answer.headers["access-control-allow-origin"] == "https://shop.example"
        other = open_client.post("/embed", files=files(HAT), headers={"origin": "https://else.example"})
        assert "access-control-allow-origin" not in other.headers


# Settings


def test_settings_from_the_command_line() -> None:
    settings = from_assignments(["max_items=3", "body_seconds=1.5", "cors=a,b"], api_keys="")
    assert (settings.max_items, settings.body_seconds, settings.cors) == (3, 1.5, ("a", "b"))


@pytest.mark.parametrize(
    ("assignment", "sentence"),
    [
        ("max_item=3", "max_items"),
        ("max_items", "must be KEY=VALUE"),
        ("max_items=few", "must be a whole number"),
        ("max_items=0", "must be 1 or more"),
        ("body_seconds=inf", "must be a number"),
        ("body_seconds=0", "number of seconds above 0"),
        ("log_format=xml", "text or json"),
    ],
)
def test_settings_that_cannot_be(assignment: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        from_assignments([assignment])


def test_settings_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIXMIM_SERVICE", Settings(max_items=7, cors=("a",)).to_json())
    assert from_environment() == Settings(max_items=7, cors=("a",))
    for text in ("{", "[]", '{"max_itemz": 3}', '{"max_items": "x"}', '{"body_seconds": Infinity}'):
        monkeypatch.setenv("MIXMIM_SERVICE", text)
        with pytest.raises(ConfigError):
            from_environment()
