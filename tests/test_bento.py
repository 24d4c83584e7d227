"""BentoML around our routes: as a bento would run them."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest
from conftest import REPOSITORY
from serving import free_port

from mixmim_serve.bundle import open_bundle

HAT = REPOSITORY / "examples" / "hat.jpg"
SBOM = REPOSITORY / "mixmim_serve" / "sbom.cdx.json"
PINS = REPOSITORY / "requirements" / "serve.txt"
START = 40  # seconds to be ready, or to give up
BUILD = 60

IN_BENTOML = """
import sys, warnings
from io import BytesIO
from pathlib import Path
from PIL import Image
warnings.simplefilter("ignore")
from starlette.testclient import TestClient
from mixmim_serve.service.bento import MixMIMService, app

photo = Path(sys.argv[1]).read_bytes()
with TestClient(MixMIMService.to_asgi()) as client:
    assert client.get("/readyz").status_code == 200
    assert client.get("/livez").status_code == 200
    assert "mixmim_requests_total" in client.get("/metrics").text
    answer = client.post("/embed", files={"image": ("hat.jpg", photo)})
    assert (answer.status_code, len(answer.json()["embedding"])) == (200, 64), answer.text
    answer = client.post("/embed", files={"image": (None, "http://127.0.0.1:1/hat.jpg")})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "input[0]"), answer.text
    answer = client.post("/embed", files={"image": ("cut.jpg", photo[:900])})
    assert (answer.status_code, answer.json()["error"]["param"]) == (422, "input[0]"), answer.text
    answer = client.post("/embed", files=[("image", ("a.jpg", photo))] * 3)
    assert (answer.status_code, answer.json()["error"]["code"]) == (429, "queue_full"), answer.text
    stream = BytesIO()
    Image.new("RGB", (1500, 1500)).save(stream, "PNG")
    answer = client.post("/embed", files=[("image", ("a.png", stream.getvalue()))] * 2)
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "too_much_to_decode"), answer.text
assert app.state.runtime is None  # closed
assert "torch" not in sys.modules
"""


def test_bentoml_serves_our_routes_without_torch(exported_bundle: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", IN_BENTOML, str(HAT)],
        env=os.environ
        | {"MIXMIM_BUNDLE": str(exported_bundle), "BENTOML_HOME": str(tmp_path)}
        | {"MIXMIM_SERVICE": json.dumps({"max_client_waiting": 2, "max_request_megapixels": 1})},
        capture_output=True,
        text=True,
        timeout=START,
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture
def context(exported_bundle: Path, tmp_path: Path) -> Path:
    """What `bentoml build` packs, with a bundle of the user's own."""
    folder = tmp_path / "context"
    ignored = shutil.ignore_patterns("bundles", "__pycache__")
    shutil.copytree(REPOSITORY / "mixmim_serve", folder / "mixmim_serve", ignore=ignored)
    for name in ("bentofile.yaml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, folder)
    shutil.copytree(REPOSITORY / "requirements", folder / "requirements", ignore=ignored)
    shutil.copytree(exported_bundle, folder / "bundle")
    return folder


@pytest.mark.slow
def test_a_bento_serves_the_bundle_inside_it_without_torch(
    context: Path, exported_bundle: Path, photos: Path, tmp_path: Path
) -> None:
    environment = os.environ | {"BENTOML_HOME": str(tmp_path / "home"), "BENTOML_DO_NOT_TRACK": "true"}
    jobs = {"jobs_roots": [str(photos)], "jobs_dir": str(tmp_path / "jobs")}
    environment |= {"MIXMIM_SERVICE": json.dumps(jobs)}
    environment.pop("PYTHONPATH", None)
    bentoml = [sys.executable, "-m", "bentoml"]
    built = subprocess.run(
        [*bentoml, "build", "--output", "tag", str(context)],
        env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=BUILD,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    tag = built.stdout.strip().removeprefix("__tag__:")
    shutil.rmtree(context)
    content = tmp_path / "home" / "bentos" / tag.replace(":", "/")
    assert (content / "src/mixmim_serve/sbom.cdx.json").read_bytes() == SBOM.read_bytes()
    installed = (content / "env/python/requirements.txt").read_text()
    assert installed.count("--hash=sha256:") == PINS.read_text().count("--hash=sha256:") > 1000
    port = free_port()
    with (tmp_path / "log").open("wb") as log:
        server = subprocess.Popen(
            [*bentoml, "serve", tag, "--port", str(port), "--timeout-graceful-shutdown", "5"],
            env=environment, cwd=tmp_path, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
        )  # fmt: skip
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=START) as client:
            wait_until_ready(client, server, tmp_path / "log")
            answer = client.post("/embed", content=HAT.read_bytes(), headers={"content-type": "image/jpeg"})
            assert (answer.status_code, len(answer.json()["embedding"])) == (200, 64)
            assert client.get("/model").json()["bundle"] == open_bundle(exported_bundle).fingerprint
            assert 'mixmim_requests_total{route="/embed",status="200"} 1.0' in client.get("/metrics").text
            url = client.post("/jobs", json={"source": "."}).json()["url"]
            deadline = time.monotonic() + START
            while (job := client.get(url).json())["state"] in ("queued", "running") and time.monotonic() < deadline:
                time.sleep(0.1)
            assert (job["state"], job["error"], job["rows"]) == ("done", None, 24)
        processes = [psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)]
        maps = "".join(Path(f"/proc/{process.pid}/maps").read_text() for process in processes)
        assert "onnxruntime" in maps or "openvino" in maps
        assert "libtorch" not in maps
    finally:
        server.terminate()
        assert server.wait(START) == 0


def wait_until_ready(client: httpx.Client, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START
    while time.monotonic() < deadline and server.poll() is None:
        with contextlib.suppress(httpx.TransportError):
            if client.get("/readyz").status_code == 200:
                return
        time.sleep(0.2)
    pytest.fail(f"not ready:\n{log.read_text()}")
