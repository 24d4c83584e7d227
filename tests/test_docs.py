"""The pages say what the code says: settings, metrics, error codes, commands, routes; links lead somewhere."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, get_type_hints

import pytest
import yaml
from conftest import REPOSITORY
from test_layout import LAYERS
from test_readme import README, shown

from mixmim_serve.cli import app
from mixmim_serve.errors import ImageError
from mixmim_serve.extract import lead
from mixmim_serve.service.metrics import Metrics
from mixmim_serve.service.settings import Settings
from training.config import AugmentConfig, DistillConfig, FinetuneConfig, PretrainConfig

DOCS = REPOSITORY / "docs"
PAGES = sorted([*DOCS.rglob("*.md"), *REPOSITORY.glob("*.md"), *(REPOSITORY / "examples").glob("*.md")])
WIDTH = 120
OPTIONS_OF_THEIR_OWN = {"api_keys", "cors", "log_format", "jobs_roots"}


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    """What generates parts of the site; needs no mkdocs until it is built."""
    spec = importlib.util.spec_from_file_location("docs_hooks", DOCS / "hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows(page: str, section: str) -> Iterator[list[str]]:
    """The cells of a section's tables, without their headings."""
    text = (DOCS / page).read_text().split(f"## {section}\n")[1].split("\n## ")[0]
    for line in text.splitlines():
        if line.startswith("| `"):
            yield [cell.strip() for cell in line.strip("|").split("|")]


def names(cell: str) -> list[str]:
    """What stands in backticks."""
    return re.findall(r"`([^`]+)`", cell)


def defaults(page: str, section: str, column: int = 1) -> dict[str, str]:
    """The default that a table gives for each key; rows for several keys list theirs in order."""
    found: dict[str, str] = {}
    for cells in rows(page, section):
        keys = names(cells[0])
        values = cells[column].split(", ") if len(keys) > 1 else [cells[column]]
        found |= dict(zip(keys, values, strict=len(keys) > 1 and values != [""]))
    return found


def as_written(value: Any) -> str:
    """A default as the tables write it."""
    if value is None:
        return "auto"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return ", ".join(as_written(part) for part in value) or "none"
    if isinstance(value, float):
        return f"{value:g}".replace("e-0", "e-").replace("0.00015", "1.5e-4").replace("0.0005", "5e-4")
    return str(value) if value != "" else "empty"


def fields_of(config: Any, prefix: str = "") -> dict[str, str]:
    """Each field of a dataclass with its default."""
    return {prefix + field.name: as_written(getattr(config, field.name)) for field in dataclasses.fields(config)}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(REPOSITORY).as_posix())
def test_lines_fit(page: Path) -> None:
    assert not [line for line in page.read_text().splitlines() if len(line) > WIDTH]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(REPOSITORY).as_posix())
def test_links_lead_to_files(page: Path) -> None:
    text = page.read_text()
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"^\[[^\]]+\]: (\S+)$", text, re.MULTILINE)
    local = [target.partition("#")[0] for target in targets if "://" not in target]
    generated = {"contributing.md", "changelog.md"}
    assert not [
        target for target in local if target and target not in generated and not (page.parent / target).exists()
    ]


def test_every_page_is_in_the_navigation() -> None:
    config = yaml.safe_load((REPOSITORY / "mkdocs.yml").read_text())
    listed = set(re.findall(r"[\w/-]+\.md", json.dumps(config["nav"])))
    assert listed == {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")} | {
        "contributing.md",
        "changelog.md",
    }


def test_server_settings() -> None:
    expected = fields_of(Settings())
    found = defaults("reference/settings.md", "Server")
    assert found.keys() == expected.keys()
    own = OPTIONS_OF_THEIR_OWN
    assert {key: found[key] for key in found if key not in own} == {
        key: expected[key] for key in expected if key not in own
    }


def test_extraction_settings() -> None:
    parts = {field.name: field for field in dataclasses.fields(get_type_hints(lead.run)["job"])}
    expected = {}
    for name in ("options", "effort"):
        factory = parts[name].default_factory
        config = parts[name].default if factory is dataclasses.MISSING else factory()
        expected |= fields_of(config, f"{name}.")
    assert defaults("reference/settings.md", "Extraction") == expected


def test_training_settings() -> None:
    for column, config in enumerate((PretrainConfig(), FinetuneConfig()), start=1):
        expected = fields_of(config)
        if expected.pop("augment", None):
            expected |= fields_of(AugmentConfig(), "augment.")
        found = defaults("reference/settings.md", "Training", column)
        assert {key: value for key, value in found.items() if value} == expected


def test_distillation_settings() -> None:
    """What pretraining does not have, or has otherwise."""
    ours, theirs = fields_of(DistillConfig()), fields_of(PretrainConfig())
    expected = {key: value for key, value in ours.items() if theirs.get(key) != value}
    assert defaults("reference/settings.md", "Distillation") == expected


def test_metrics() -> None:
    families = [metric for metric in Metrics().registry.collect() if metric.name.startswith("mixmim_")]
    expected = {metric.name + ("_total" if metric.type == "counter" else ""): metric.type for metric in families}
    text = (DOCS / "reference" / "metrics.md").read_text().split("\n## ")[0]
    assert dict(re.findall(r"^\| `(mixmim_\w+)` \| (\w+) \|", text, re.MULTILINE)) == expected


def codes_in_the_code() -> set[tuple[str, str]]:
    """Status and code of every error that the service raises on purpose."""
    found = {(str(kind.status), kind.code) for kind in ImageError.__subclasses__()}
    for path in (REPOSITORY / "mixmim_serve" / "service").rglob("*.py"):
        found |= set(re.findall(r"\b([45]\d\d),\s*\"(\w+)\"", path.read_text()))
    return found


def test_error_codes() -> None:
    section = (DOCS / "reference" / "http.md").read_text().split("## Errors\n")[1]
    status, listed = "", set()
    for line in section.splitlines():
        if line.startswith("| ") and not line.startswith("| status"):
            first, codes = [cell.strip() for cell in line.strip("|").split("|")][:2]
            status = first or status
            listed |= {(status, code) for code in names(codes)}
    assert {pair for pair in listed if not pair[1].startswith("http_")} == codes_in_the_code()


def test_every_command_is_generated(hooks: ModuleType) -> None:
    text = hooks.commands()
    commands = [each.name or each.callback.__name__ for each in app.registered_commands if each.callback]
    assert re.findall(r"^## `mixmim (\w+)`$", text, re.MULTILINE) == commands
    assert "--help`" not in text
    assert len(re.findall(r"^\$ mixmim \w+ [^\[{]", text, re.MULTILINE)) == len(commands)  # an example each


def test_every_route_is_generated(hooks: ModuleType) -> None:
    document = json.loads((DOCS / "openapi.json").read_text())
    operations = [(method.upper(), path) for path, methods in document["paths"].items() for method in methods]
    text = hooks.routes()
    assert re.findall(r"^### ([A-Z]+) (\S+) \{", text, re.MULTILINE) == operations
    anchors = set(re.findall(r"\{ #([\w-]+) \}", text)) | {"statuses", "schemas"}
    assert set(re.findall(r"\]\(#([\w-]+)\)", text)) <= anchors


ROOTS = ("", "mixmim_serve", "mixmim_serve/service", "mixmim_serve/engines", "mixmim_serve/extract", "training")


@pytest.mark.parametrize("page", ["docs/architecture.md", "CONTRIBUTING.md"])
def test_named_files_exist(page: str) -> None:
    """As paths from the repository, a package, or the part of it that the section is about."""
    text = (REPOSITORY / page).read_text()
    named = {name for name in re.findall(r"`([\w/]+(?:\.py|/))`", text) if "NAME" not in name}
    assert len(named) > 10
    missing = [name for name in named if not any((REPOSITORY / root / name).exists() for root in ROOTS)]
    assert not missing


def test_the_layers_are_those_of_the_layout_test() -> None:
    section = (DOCS / "architecture.md").read_text().split("## Layers\n")[1].split("\n## ")[0]
    for number, layer in enumerate(LAYERS, start=1):
        (line,) = re.findall(rf"^{number}\. (.*(?:\n   .*)*)$", section, re.MULTILINE)
        assert {module.removeprefix("mixmim_serve.") for module in layer} <= set(names(line))


def test_decisions_are_dated() -> None:
    headings = re.findall(r"^## (.*)$", (DOCS / "decisions.md").read_text(), re.MULTILINE)
    dates = [heading[:10] for heading in headings]
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\d", date) for date in dates)
    assert dates == sorted(dates, reverse=True)


def test_python_reference_names_what_exists() -> None:
    """Without importing torch: `::: a.b` is a module, or a name of one; so are the members that are picked of it."""
    text = (DOCS / "reference" / "python.md").read_text()
    for name, members in re.findall(r"^::: (\S+)$(?:\n    options: \{ members: \[(.*)\] \})?", text, re.MULTILINE):
        module = source_of(name)
        if module is None:
            assert name.rpartition(".")[2] in defined(source_of(name.rpartition(".")[0])), name
        elif members:
            assert set(members.split(", ")) <= defined(module), name


def source_of(module: str) -> Path | None:
    """The file of a module or package; None for what is neither."""
    place = REPOSITORY / Path(*module.split("."))
    file = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
    return file if file.is_file() else None


def defined(file: Path | None) -> set[str]:
    """Names that a module defines or imports at its top."""
    assert file is not None
    found: set[str] = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.ImportFrom):
            found |= {alias.asname or alias.name for alias in node.names}
    return found


def test_tutorials_show_what_the_readme_shows() -> None:
    """The README's outputs are compared with the real ones by its own test; the same commands look the same here."""
    known = {each.command.partition("  ")[0]: each.output for each in shown(README)}
    repeated = 0
    for page in sorted((DOCS / "tutorials").glob("*.md")):
        for each in shown(page.read_text()):
            if output := known.get(each.command.partition("  ")[0]):
                assert each.output[: len(output)] == output, each.command
                repeated += 1
    assert repeated >= 3


def test_every_extra_is_listed() -> None:
    extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    section = (DOCS / "index.md").read_text().split("## Install\n")[1].split("\n## ")[0]
    listed = {name for line in section.splitlines() if line.startswith("| `") for name in names(line.split("|")[1])}
    assert listed == extras.keys() - {"test"}
