"""What is installed is pinned by hash, listed in the SBOM, and the same in `make`, wheel and bento."""

from __future__ import annotations

import json
import re
import tomllib
from typing import Any

import pytest
from bentoml._internal.bento.build_config import BentoBuildConfig, BentoPathSpec
from conftest import REPOSITORY
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from mixmim_serve.version import __version__

PACKAGES = ("mixmim_serve", "export", "training")
SBOM = "mixmim_serve/sbom.cdx.json"


def pins(name: str) -> dict[str, str]:
    """Name and version of every requirement of a file."""
    lines = [line.rstrip("\\ ") for line in (REPOSITORY / name).read_text().splitlines()]
    found = [Requirement(line) for line in lines if re.match(r"\w", line)]
    return {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in found}


@pytest.fixture
def sbom() -> dict[str, Any]:
    return json.loads((REPOSITORY / SBOM).read_text())


def test_every_pin_of_serving_has_hashes_and_names_no_index() -> None:
    text = (REPOSITORY / "requirements" / "serve.txt").read_text()
    entries = [entry for entry in re.split(r"\n(?=\w)", text)[1:] if entry.strip()]
    assert len(entries) == len(pins("requirements/serve.txt")) > 50
    for entry in entries:
        first, *hashes = [line.strip().rstrip(" \\") for line in entry.strip().splitlines()]
        assert re.fullmatch(r"[\w.-]+==[\w.]+( ; .+)?", first)
        assert hashes, f"{first} has no hash: run make lock"
        assert all(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", line) for line in hashes), first
    assert "://" not in text
    assert [line for line in text.splitlines() if re.match("-", line)] == ["--only-binary :all:"]


def test_serving_is_pinned_to_the_versions_of_constraints_txt() -> None:
    constraints = pins("constraints.txt")
    for name, version in pins("requirements/serve.txt").items():
        assert constraints[name] == version, f"{name}: run make lock sbom"


def test_what_serving_needs_is_pinned() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    needed = [
        *project["project"]["dependencies"],
        *extras["cpu"],
        *extras["openvino"],
        *project["build-system"]["requires"],
    ]
    pinned = pins("requirements/serve.txt")
    for requirement in map(Requirement, needed):
        assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)]), f"{requirement}: make lock"


def test_the_sbom_lists_what_serving_installs(sbom: dict[str, Any]) -> None:
    assert (sbom["bomFormat"], sbom["specVersion"]) == ("CycloneDX", "1.6")
    root = sbom["metadata"]["component"]
    assert (root["name"], root["version"]) == ("mixmim-serve", __version__)
    listed = {canonicalize_name(entry["name"]): entry for entry in sbom["components"]}
    pinned = pins("requirements/serve.txt")
    assert {name: entry["version"] for name, entry in listed.items()} == pinned, "run make sbom"
    assert {name: entry["purl"] for name, entry in listed.items()} == {
        name: f"pkg:pypi/{name}@{version}" for name, version in pinned.items()
    }
    assert {name for name, entry in listed.items() if entry.get("scope") == "optional"} == {"colorama"}  # for Windows


def test_the_sbom_holds_the_dependencies(sbom: dict[str, Any]) -> None:
    refs = {entry["bom-ref"] for entry in sbom["components"]} | {sbom["metadata"]["component"]["bom-ref"]}
    edges = {edge["ref"]: set(edge["dependsOn"]) for edge in sbom["dependencies"]}
    assert edges.keys() == refs
    assert set().union(*edges.values()) < refs
    direct = {canonicalize_name(ref.partition("=")[0]) for ref in edges[sbom["metadata"]["component"]["bom-ref"]]}
    assert direct > {"bentoml", "onnxruntime", "openvino", "pillow", "starlette", "uvicorn"}


def test_a_bento_installs_by_hash_and_holds_the_sbom() -> None:
    with (REPOSITORY / "bentofile.yaml").open() as file:
        config = BentoBuildConfig.from_yaml(file)
    assert (config.python.requirements_txt, config.python.lock_packages) == ("requirements/serve.txt", False)
    assert config.python.packages is None
    assert BentoPathSpec(config.include, config.exclude, str(REPOSITORY)).includes(SBOM)


def test_every_exception_to_a_security_rule_has_its_reason() -> None:
    for path in (path for package in PACKAGES for path in (REPOSITORY / package).rglob("*.py")):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if re.search(r"noqa:.*\bS\d{3}", line):
                assert re.search(r"noqa: [A-Z0-9, ]+ - \S", line), f"{path}:{number}"
            assert "nosec" not in line, f"{path}:{number}"
