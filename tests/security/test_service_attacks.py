"""Keys that were revoked, and an engine that has gone wrong: neither may go on."""

from __future__ import annotations

import logging
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from serving import HAT, SHOES, Around, client_of, files, refusal

from mixmim_serve.engines import Engine
from mixmim_serve.service import auth

KEY, OTHER = "a key of sixteen characters", "another key, also long enough"


@pytest.fixture
def keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("mixmim_serve.service.auth.RELOAD_SECONDS", 0.0)
    (tmp_path / "keys").write_text(KEY)
    return tmp_path / "keys"


def spoil(path: Path, how: str) -> None:
    """Make a file of keys unusable, in place of the one that had `KEY`."""
    path.unlink()
    if how == "short line":
        path.write_text(f"{OTHER}\nshort\n")
    elif how == "not text":
        path.write_bytes(b"\xff\xfe" + OTHER.encode())
    elif how == "too large":
        path.write_bytes(f"{OTHER}\n".encode() * 50_000)
    elif how == "pipe":
        os.mkfifo(path)
    elif how == "device":
        path.symlink_to("/dev/zero")
    elif how == "folder":
        path.mkdir()


@pytest.mark.parametrize("how", ["gone", "short line", "not text", "too large", "pipe", "device", "folder"])
def test_an_unusable_file_of_keys_closes_the_door(
    engine: Engine, keys: Path, how: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(auth.VARIABLE, "a key of the environment")
    with client_of(engine, api_keys=str(keys)) as client, caplog.at_level(logging.INFO, auth.__name__):

        def status(key: str) -> int:
            return client.get("/model", headers={"x-api-key": key}).status_code

        assert status(KEY) == status("a key of the environment") == 200
        spoil(keys, how)
        began = time.monotonic()
        assert [status(key) for key in (KEY, OTHER, "a key of the environment", "")] == [401] * 4
        code, message, _ = refusal(client.get("/readyz"))
        assert (code, message[:47]) == (503, "the file of API keys is missing or invalid, so ")
        assert str(keys) not in message
        assert time.monotonic() - began < 2
        assert len([record for record in caplog.records if record.levelno == logging.ERROR]) == 1
        if keys.is_dir():
            keys.rmdir()
        keys.unlink(missing_ok=True)
        keys.write_text(OTHER)
        assert [status(key) for key in (KEY, OTHER, "a key of the environment")] == [401, 200, 200]
        assert client.get("/readyz").status_code == 200


def test_a_key_that_is_replaced_by_one_as_long_within_a_tick(engine: Engine, keys: Path) -> None:
    with client_of(engine, api_keys=str(keys)) as client:
        times = keys.stat()
        keys.write_text(KEY[::-1])
        os.utime(keys, ns=(times.st_atime_ns, times.st_mtime_ns))  # as `cp -p` and some editors do
        assert client.get("/model", headers={"x-api-key": KEY}).status_code == 401


class Rotting(Around):
    """An engine whose numbers can go wrong."""

    rotten = False

    def run(self, *arguments: Any) -> Any:
        return {name: array * (1.3 if self.rotten else 1.0) for name, array in super().run(*arguments).items()}


def test_a_wrong_canary_stops_answers_until_it_is_right(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mixmim_serve.service.runtime.CANARY_EVERY", 0.0)
    monkeypatch.setattr("mixmim_serve.service.runtime.CANARY_AGE", 0.0)
    rotting = Rotting(engine, list)
    with client_of(rotting) as client:

        def answers() -> list[int]:
            return [
                client.post("/embed", files=files(HAT)).status_code,
                client.post("/embed", files=files(HAT, SHOES)).status_code,
                client.post("/classify", files=files(HAT)).status_code,
                client.post("/reconstruct", files=files(HAT, SHOES)).status_code,
            ]

        def settle(statuses: list[int]) -> None:
            deadline = time.monotonic() + 10
            while answers() != statuses:
                assert time.monotonic() < deadline
                time.sleep(0.02)

        assert answers() == [200] * 4
        rotting.rotten = True
        settle([503] * 4)
        assert refusal(client.post("/embed", files=files(HAT)))[1].startswith("the engine gives a wrong answer")
        lines = client.post("/embed/stream", files=files(HAT)).text.splitlines()
        assert '"not_well"' in lines[0]
        assert "embedding" not in lines[0]
        assert client.get("/model").status_code == 200
        rotting.rotten = False
        settle([200] * 4)


def test_a_slow_engine_stops_no_answers(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mixmim_serve.service.runtime.CANARY_SECONDS", 0.01)
    monkeypatch.setattr("mixmim_serve.service.runtime.CANARY_EVERY", 0.0)
    with client_of(Around(engine, lambda: threading.Event().wait(0.05))) as client:
        assert client.get("/readyz").status_code == 503
        assert [client.post("/embed", files=files(HAT)).status_code for _ in range(5)] == [200] * 5
