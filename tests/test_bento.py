"""BentoML around our routes: as a bento would run them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from conftest import REPOSITORY

HAT = REPOSITORY / "examples" / "hat.jpg"
START = 30  # seconds to be ready, or to give up

IN_BENTOML = """
import sys, warnings
from pathlib import Path
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
assert app.state.runtime is None  # closed
assert "torch" not in sys.modules
"""


def test_bentoml_serves_our_routes_without_torch(exported_bundle: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", IN_BENTOML, str(HAT)],
        env=os.environ | {"MIXMIM_BUNDLE": str(exported_bundle), "BENTOML_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=START,
    )
    assert done.returncode == 0, done.stderr
