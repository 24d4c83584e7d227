"""Publishing: BentoML's model store, folders, and the Hugging Face hub's own client against a small hub of ours."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from conftest import REPOSITORY
from test_cli import Mixmim, assert_one_sentence, mixmim  # noqa: F401 - a fixture
from test_server import serve

from mixmim_serve.bundle import open_bundle
from mixmim_serve.errors import BundleError, HubError
from mixmim_serve.publish.card import model_card
from mixmim_serve.publish.hub import is_folder, pull, push
from mixmim_serve.publish.store import is_tag

HAT = REPOSITORY / "examples" / "hat.jpg"
COMMAND = [sys.executable, "-c", "from mixmim_serve.cli import main; main()"]
FILES = {"config.json", "weights.safetensors", "encoder.onnx", "reconstruct.onnx", "golden.safetensors"}


def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own: BentoML and the hub's client read the environment when they are imported."""
    return subprocess.run(
        [*COMMAND, *map(str, arguments)], env=os.environ | environment, capture_output=True, text=True, timeout=60
    )


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# BentoML's store


@pytest.fixture(scope="module")
def home(exported_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BENTOML_HOME in whose store `mixmim export` put one bundle, shoes:1 (exported before, to save the seconds)."""
    home = tmp_path_factory.mktemp("home") / "bentoml"
    code = """
import export.build
from mixmim_serve.bundle import open_bundle
from mixmim_serve.cli import main
export.build.export_bundle = lambda _, target, *rest: export.build.Exported(open_bundle(target), {})
main()
"""
    done = subprocess.run(
        [sys.executable, "-c", code, "export", "unread", str(exported_bundle), "--store", "shoes:1"],
        env=os.environ | {"BENTOML_HOME": str(home)},
        capture_output=True,
        text=True,
    )
    assert done.stdout.endswith("stored as shoes:1\n"), done.stderr
    return home


def test_an_export_can_be_stored(home: Path) -> None:
    stored = open_bundle(home / "models" / "shoes" / "1")
    stored.verify()
    assert names(stored.path) - {"certificates"} == FILES | {"model.yaml"}
    about = (stored.path / "model.yaml").read_text()
    assert all(word in about for word in (stored.fingerprint, "architecture: custom", "- fp32", "image_size: 64"))


@pytest.fixture(scope="module")
def embedded(exported_bundle: Path) -> Any:
    """What `mixmim embed` prints of a photo."""
    return json.loads(run("embed", exported_bundle, HAT, "--engine", "onnx").stdout)


@pytest.mark.parametrize("tag", ["shoes", "shoes:1", "shoes:latest"])
def test_a_tag_is_as_good_as_a_folder(home: Path, embedded: Any, tag: str) -> None:
    done = run("embed", tag, HAT, "--engine", "onnx", BENTOML_HOME=str(home))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == embedded


def test_a_tag_is_served(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though the server gets a BENTOML_HOME of its own: the user's is $HOME/bentoml."""
    monkeypatch.delenv("BENTOML_HOME", raising=False)
    monkeypatch.setenv("HOME", str(home.parent))
    with serve("shoes:latest", tmp_path) as server:
        server.wait_until_ready()
        model = json.loads(server.ask("GET", "/model")[1])
    assert model["labels"] == ["cat", "dog", "owl"]


def test_an_unknown_tag_lists_what_is_there(home: Path) -> None:
    for tag in ("hats", "shoes:2"):
        done = run("info", tag, BENTOML_HOME=str(home))
        assert (done.returncode, done.stdout) == (1, "")
        assert (
            done.stderr == f"mixmim: {tag} is not a bundle: no folder has this name, and BentoML's store has shoes:1.\n"
        )


def test_a_version_is_stored_once(home: Path, tmp_path: Path) -> None:
    """And it is said before the checkpoint is read."""
    for tag, reason in (
        ("shoes:1", "already has shoes:1"),
        ("A/b", "'A/b' is not a valid tag"),
        ("a:latest", "is not a valid tag"),
    ):
        done = run("export", tmp_path / "none", tmp_path / "bundle", "--store", tag, BENTOML_HOME=str(home))
        assert (done.returncode, done.stdout) == (1, "")
        assert reason in done.stderr
    assert not names(tmp_path)


def test_an_altered_bundle_is_not_stored(home: Path, bundle_copy: Path) -> None:
    (bundle_copy / "encoder.onnx").write_bytes(b"altered")
    code = f"""
from pathlib import Path
from mixmim_serve.bundle import open_bundle
from mixmim_serve.publish.store import store_bundle
from mixmim_serve.errors import BundleError
bundle = open_bundle(Path({str(bundle_copy)!r}))
try:
    store_bundle(bundle, "no/tag")
except BundleError as error:
    print(error)
store_bundle(bundle, "hats")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"BENTOML_HOME": str(home)}, capture_output=True, text=True
    )
    assert done.stdout.startswith("'no/tag' is not a valid tag for BentoML's store")
    assert "was altered after the export" in done.stderr
    assert names(home / "models") == {"shoes"}


@pytest.mark.parametrize(("text", "tag"), [
    ("shoes", True), ("shoes:1", True), ("a-b_c.d:latest", True), ("a/b", False), ("./a", False), ("a:", False),
    ("a:b:c", False), ("A", False), ("-a", False), ("", False), ("a" * 64, False),
])  # fmt: skip
def test_what_may_be_a_tag(text: str, tag: bool) -> None:
    assert is_tag(text) is tag


# Folders


def test_what_is_pushed_can_be_pulled(exported_bundle: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(exported_bundle, tmp_path / "source"))
    (source / "certificates").mkdir(exist_ok=True)
    (source / "notes.txt").write_text("not of the bundle")
    repo = tmp_path / "shared" / "shoes"
    assert push(source, str(repo)) == str(repo)
    assert names(repo) == FILES | {"README.md"}
    assert names(repo.parent) == {"shoes"}
    (repo / "extra.bin").write_bytes(b"put there by somebody")
    pulled = pull(str(repo), tmp_path / "pulled")
    assert pulled.checksums == open_bundle(exported_bundle).checksums
    assert names(tmp_path / "pulled") == FILES | {"README.md"}


def damage(repo: Path, how: str) -> None:
    config = json.loads((repo / "config.json").read_text())
    if how == "altered":
        (repo / "weights.safetensors").write_bytes((repo / "weights.safetensors").read_bytes()[:-1] + b"x")
    elif how == "incomplete":
        (repo / "encoder.onnx").unlink()
    elif how == "foreign":
        (repo / "config.json").write_text('{"model_type": "vit"}')
    elif how == "newer":
        (repo / "config.json").write_text(json.dumps(config | {"format": 99}))
    elif how == "reaching out":
        (repo.parent / "secret").write_text("of somebody else")
        digest = hashlib.sha256(b"of somebody else").hexdigest()
        (repo / "config.json").write_text(json.dumps(config | {"sha256": {"../secret": digest}}))
    else:
        shutil.rmtree(repo)


DAMAGES = {
    "altered": "was altered after the export",
    "incomplete": "lacks encoder.onnx",
    "foreign": "is damaged",
    "newer": "update mixmim-serve",
    "reaching out": "'../secret' is not a file name",
    "missing": "is not a bundle",
}


@pytest.mark.parametrize(("how", "reason"), DAMAGES.items())
def test_a_damaged_folder_is_not_pulled(bundle_copy: Path, tmp_path: Path, how: str, reason: str) -> None:
    damage(bundle_copy, how)
    (tmp_path / "here").mkdir()
    with pytest.raises(BundleError, match=rf"^nothing was pulled: {bundle_copy}.*{reason}"):
        pull(str(bundle_copy), tmp_path / "here" / "pulled")
    assert not names(tmp_path / "here")


def test_an_altered_bundle_is_not_pushed(bundle_copy: Path, tmp_path: Path) -> None:
    damage(bundle_copy, "altered")
    with pytest.raises(BundleError, match=f"^{bundle_copy}/weights.safetensors was altered"):
        push(bundle_copy, str(tmp_path / "repo"))
    assert not (tmp_path / "repo").exists()


def test_what_is_in_the_way_is_replaced_only_when_told(exported_bundle: Path, bundle_copy: Path) -> None:
    (bundle_copy / "encoder.onnx").write_bytes(b"old")
    for act in (push, lambda bundle, folder, **how: pull(str(bundle), Path(folder), **how)):
        with pytest.raises(BundleError, match=r"is already a bundle: .* --overwrite"):
            act(exported_bundle, str(bundle_copy))
        assert (bundle_copy / "encoder.onnx").read_bytes() == b"old"
        act(exported_bundle, str(bundle_copy), overwrite=True)
        open_bundle(bundle_copy).verify()
        (bundle_copy / "encoder.onnx").write_bytes(b"old")
        assert names(bundle_copy.parent) == {bundle_copy.name}


def test_commands(mixmim: Mixmim, small_checkpoint: Path, exported_bundle: Path, tmp_path: Path) -> None:  # noqa: F811
    repo, pulled = tmp_path / "repo", tmp_path / "pulled"
    assert mixmim("push", exported_bundle, repo).out == f"pushed to {repo}\n"
    assert mixmim("pull", repo, pulled).out == (
        f"wrote {pulled}: model small, model fingerprint {open_bundle(repo).fingerprint}\n"
    )
    assert_one_sentence(mixmim("push", small_checkpoint, repo), "run `mixmim export` on a checkpoint first")
    assert_one_sentence(mixmim("pull", repo, tmp_path / "other", "--revision", "v1"), "has no revisions")
    assert_one_sentence(mixmim("pull", "shoes", tmp_path / "other"), "a folder such as ./shoes")
    assert names(tmp_path) == {"repo", "pulled"}


def test_a_repository_is_never_taken_for_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert all(is_folder(repo) for repo in ("/a", "./a", "../a", "~/a", "./me/a"))
    assert not is_folder("me/shoes")
    (tmp_path / "me" / "shoes").mkdir(parents=True)
    for repo in ("me/shoes", "shoes", "a/b/c", "me/", "https://hub/me/shoes", ""):
        with pytest.raises(HubError):
            is_folder(repo)


def test_the_card_says_what_it_is(exported_bundle: Path) -> None:
    bundle = open_bundle(exported_bundle)
    card = model_card(bundle, "me/shoes")
    assert card.startswith("---\nlibrary_name: mixmim-serve\npipeline_tag: image-feature-extraction\ntags:\n- mixmim\n")
    assert "license" not in card
    for words in ("64 x 64 pixels", "64 numbers", bundle.fingerprint, "cat, dog, owl", "pull me/shoes bundles/shoes"):
        assert words in card
    assert "mixmim pull '/shared/my shoes' 'bundles/my shoes'\n" in model_card(bundle, "/shared/my shoes")


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ("cc-by-4.0", "license: cc-by-4.0\n"),
        ('Mine: "all"', 'license: other\nlicense_name: "Mine: \\"all\\""\n'),
    ],
)
def test_the_card_has_the_licence(exported_bundle: Path, given: str, line: str) -> None:
    bundle = open_bundle(exported_bundle)
    description = dataclasses.replace(bundle.description, provenance={"license": given})
    assert line in model_card(dataclasses.replace(bundle, description=description), "me/shoes")


# The hub


class Hub(ThreadingHTTPServer):
    """What the hub's client asks for when one small model is pushed and pulled, in memory; one commit a push."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.commits: list[dict[str, bytes]] = []
        self.visibility: list[str] = []  # that new repositories were asked to have
        self.fetched: list[str] = []  # names of files whose bytes went out

    @property
    def environment(self) -> dict[str, str]:
        return {
            "HF_ENDPOINT": f"http://127.0.0.1:{self.server_port}",
            "HF_TOKEN": "hf_nobody",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
        }

    def name_of(self, number: int) -> str:
        """A commit's name, 40 hex digits."""
        return f"{number:040x}"

    def find(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """Name and files of a commit, or of the newest for `main`."""
        known = {self.name_of(number): files for number, files in enumerate(self.commits)}
        name = list(known)[-1] if revision == "main" and known else revision
        return (name, known[name]) if name in known else None


class Handler(BaseHTTPRequestHandler):
    """Paths as the hub's client 1.x has them."""

    server: Hub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        path = urlsplit(self.path).path
        if path == "/api/repos/create":
            self.server.visibility.append(json.loads(body)["visibility"])
            self.answer({"url": f"{self.server.environment['HF_ENDPOINT']}/me/shoes"})
        elif path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif path == "/api/models/me/shoes/preupload/main":
            files = json.loads(body)["files"]
            self.answer(
                {"files": [{"path": each["path"], "uploadMode": "regular", "shouldIgnore": False} for each in files]}
            )
        elif path == "/api/models/me/shoes/commit/main":
            lines = [json.loads(line) for line in body.splitlines()]
            new = {
                line["value"]["path"]: base64.b64decode(line["value"]["content"])
                for line in lines
                if line["key"] == "file"
            }
            self.server.commits.append((self.server.commits[-1] if self.server.commits else {}) | new)
            name = self.server.name_of(len(self.server.commits) - 1)
            self.answer(
                {"commitOid": name, "commitUrl": f"{self.server.environment['HF_ENDPOINT']}/me/shoes/commit/{name}"}
            )
        else:
            self.refuse("RepoNotFound")

    def do_GET(self) -> None:
        words = urlsplit(self.path).path.strip("/").split("/")
        if words[:3] == ["api", "models", "me"] and words[3] == "shoes":
            found = self.server.find(words[5] if len(words) > 5 else "main")
            if found is None:
                self.refuse("RevisionNotFound")
            elif words[4:5] == ["tree"]:
                self.answer(
                    [
                        {"type": "file", "path": name, "size": len(data), "oid": etag(data)}
                        for name, data in found[1].items()
                    ]
                )
            else:
                self.answer({"id": "me/shoes", "sha": found[0], "siblings": [{"rfilename": name} for name in found[1]]})
        elif words[:3] == ["me", "shoes", "resolve"] and (found := self.server.find(words[3])) and words[4] in found[1]:
            data = found[1][words[4]]
            self.server.fetched += [words[4]] * (self.command == "GET")
            self.answer(data, {"ETag": f'"{etag(data)}"', "X-Repo-Commit": found[0]})
        else:
            self.refuse("RepoNotFound")

    do_HEAD = do_GET

    def answer(self, value: Any, headers: dict[str, str] | None = None, status: int = 200) -> None:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, content in ({"Content-Length": str(len(data))} | (headers or {})).items():
            self.send_header(name, content)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def refuse(self, code: str) -> None:
        self.answer({"error": code}, {"X-Error-Code": code}, 404)

    def log_message(self, *_: object) -> None:
        """Nothing."""


def etag(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


@pytest.fixture(scope="module")
def hub(exported_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """The hub, after a first push."""
    pytest.importorskip("huggingface_hub")
    with Hub() as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        cache = {"HF_HOME": str(tmp_path_factory.mktemp("hub"))}
        done = run("push", exported_bundle, "me/shoes", **hub.environment, **cache)
        try:
            assert f"pushed to {hub.environment['HF_ENDPOINT']}/me/shoes/commit/" in done.stdout, done.stderr
            yield hub
        finally:
            hub.shutdown()
            thread.join()


@pytest.fixture
def online(hub: Hub, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a command with that hub, and an empty cache."""
    return lambda *arguments: run(*arguments, **hub.environment, HF_HOME=str(tmp_path / "cache"))


def test_the_hub_gets_the_bundle_and_its_card(hub: Hub, exported_bundle: Path) -> None:
    files = hub.commits[0]
    assert hub.visibility == ["private"]
    assert files.keys() == FILES | {"README.md"}
    assert all(files[name] == (exported_bundle / name).read_bytes() for name in FILES)
    assert files["README.md"].startswith(b"---\nlibrary_name: mixmim-serve")


def test_the_hub_gives_it_back(hub: Hub, online: Any, tmp_path: Path) -> None:
    hub.commits.append(hub.commits[0] | {"pytorch_model.bin": b"put there by somebody"})
    hub.fetched.clear()
    done = online("pull", "me/shoes", tmp_path / "pulled")
    hub.commits.pop()
    assert done.returncode == 0, done.stderr
    assert names(tmp_path / "pulled") == FILES | {"README.md"}
    assert sorted(hub.fetched) == sorted(FILES | {"README.md"})  # each once, and nothing else
    open_bundle(tmp_path / "pulled").verify()


@pytest.mark.parametrize("how", ["altered", "incomplete", "foreign"])
def test_a_damaged_repository_is_not_pulled(hub: Hub, online: Any, tmp_path: Path, how: str) -> None:
    name = {"altered": "weights.safetensors", "incomplete": "encoder.onnx", "foreign": "config.json"}[how]
    spoilt = {key: data for key, data in hub.commits[0].items() if key != name}
    if how != "incomplete":
        spoilt[name] = b"{}" if how == "foreign" else hub.commits[0][name][:-1] + b"x"
    hub.commits.append(spoilt)
    done = online("pull", "me/shoes", tmp_path / "here" / "pulled")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines()[-1].startswith("mixmim: nothing was pulled: me/shoes")
    assert DAMAGES[how] in done.stderr
    assert not names(tmp_path / "here")
    first = online("pull", "me/shoes", tmp_path / "first", "--revision", hub.name_of(0))
    hub.commits.pop()
    assert first.returncode == 0, first.stderr


def test_what_the_hub_does_not_have_is_said_in_a_sentence(hub: Hub, online: Any, tmp_path: Path) -> None:
    for arguments, reason in (
        (("me/hats", tmp_path / "pulled"), "the Hub has no repository me/hats that you can access"),
        (("me/shoes", tmp_path / "pulled", "--revision", "v9"), "me/shoes has no such revision"),
    ):
        done = online("pull", *arguments)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith(f"mixmim: {reason}")
        assert done.stderr.count("\n") == 1
    assert not (tmp_path / "pulled").exists()


def test_a_hub_that_is_not_there_is_said_in_a_sentence(hub: Hub, exported_bundle: Path, tmp_path: Path) -> None:
    environment = hub.environment | {"HF_ENDPOINT": "http://127.0.0.1:1", "HF_HOME": str(tmp_path / "cache")}
    for arguments in (("pull", "me/shoes", tmp_path / "pulled"), ("push", exported_bundle, "me/shoes")):
        done = run(*arguments, **environment)
        assert (done.returncode, done.stdout) == (1, "")
        assert "mixmim: cannot access me/shoes on the Hub: " in done.stderr
        assert "Traceback" not in done.stderr
    assert not (tmp_path / "pulled").exists()
