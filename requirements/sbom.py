"""What `make sbom` writes: of all that an environment holds, the packages that requirements/serve.txt pins.

    cyclonedx-py environment ... .venv/bin/python | python requirements/sbom.py mixmim_serve/sbom.cdx.json

Names, versions, licences and the dependency graph stay. Links are dropped: they change without the packages.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPOSITORY = Path(__file__).parent.parent
PINS = REPOSITORY / "requirements" / "serve.txt"
DROPPED = ("externalReferences", "properties")  # links, and which extra of the environment asked for it


def main() -> None:
    """Read CycloneDX from standard input, write it to the file that is named."""
    sys.path.insert(0, str(REPOSITORY))
    from mixmim_serve.version import __version__

    document = json.load(sys.stdin)
    installed = {canonicalize_name(entry["name"]): entry for entry in document["components"]}
    document["components"] = [component(pin, installed) for pin in pins(PINS)]
    document["dependencies"] = list(edges(document))
    document["metadata"]["component"]["version"] = __version__
    for tool in document["metadata"]["tools"]["components"]:
        tool.pop("externalReferences", None)
    Path(sys.argv[1]).write_text(json.dumps(document, indent=1, sort_keys=True, ensure_ascii=False) + "\n")


def pins(path: Path) -> Iterator[Requirement]:
    """Every `name==version ; marker` of a file of requirements."""
    for line in path.read_text().splitlines():
        if line[:1].isalnum():
            yield Requirement(line.rstrip("\\ "))


def component(pin: Requirement, installed: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The installed package; one for another platform is listed as optional, by name and version."""
    name, version = canonicalize_name(pin.name), str(pin.specifier).removeprefix("==")
    if pin.marker and not pin.marker.evaluate():
        purl = f"pkg:pypi/{name}@{version}"
        return {
            "bom-ref": f"{name}=={version}", "type": "library", "name": name, "version": version, "purl": purl,
            "scope": "optional",
        }  # fmt: skip
    entry = installed.get(name)
    if entry is None or entry["version"] != version:
        sys.exit(f"{name} {version} is pinned, but {entry['version'] if entry else 'nothing'} is installed.")
    return {key: value for key, value in entry.items() if key not in DROPPED}


def edges(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The dependencies between what is listed."""
    listed = {entry["bom-ref"] for entry in [*document["components"], document["metadata"]["component"]]}
    known = {edge["ref"]: edge.get("dependsOn", []) for edge in document["dependencies"]}
    for ref in sorted(listed):
        yield {"ref": ref, "dependsOn": sorted(listed.intersection(known.get(ref, [])))}


if __name__ == "__main__":
    main()
