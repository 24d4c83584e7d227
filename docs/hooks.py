"""What the site adds to the pages: the command line and the HTTP API from their sources, and files outside `docs`.

mkdocs calls the functions named `on_...` (mkdocs.yml names this file under `hooks`). Everything is generated when the
site is built, so nothing that can be read from the code is written twice.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

REPOSITORY = Path(__file__).parent.parent
PAGES = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}  # from the repository's root
LINKED = ("benchmarks/results/*", "mixmim_serve/bundles/*.csv")  # files that pages link to or show
SCHEMA = "#/components/schemas/"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add pages and linked files that do not lie in `docs`."""
    from mkdocs.structure.files import File

    places = dict(PAGES)
    for pattern in LINKED:
        names = [path.relative_to(REPOSITORY).as_posix() for path in REPOSITORY.glob(pattern)]
        places |= {name: name for name in names}
    for name, uri in sorted(places.items()):
        files.append(File.generated(config, uri, abs_src_path=str(REPOSITORY / name)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Fill in what is generated, and let links out of `docs` find the files that `on_files` added."""
    if page.file.src_uri in PAGES.values():
        for name, uri in {"docs/": "", **PAGES}.items():
            markdown = markdown.replace(f"]({name}", f"]({uri}")
    up = "../" * page.file.src_uri.count("/")
    markdown = re.sub(r"(\]\(|\]: )(?:\.\./)+(benchmarks/results/|mixmim_serve/bundles/)", rf"\1{up}\2", markdown)
    for marker, generate in (("<!-- commands -->", commands), ("<!-- routes -->", routes)):
        if marker in markdown:
            markdown = markdown.replace(marker, generate())
    return markdown


def commands() -> str:
    """Every command with its arguments and options, as Typer's own generator writes them.

    Raises:
        CalledProcessError: the command line cannot be imported.
    """
    call = [sys.executable, "-m", "typer", "mixmim_serve.cli", "utils", "docs", "--name", "mixmim"]
    text = subprocess.run(call, cwd=REPOSITORY, check=True, capture_output=True, text=True).stdout  # noqa: S603
    text = text[text.index("\n## ") :]  # the introduction only lists what follows
    text = "\n".join(line for line in text.splitlines() if not line.startswith("* `--help`"))
    text = re.sub(r"^Example: (mixmim .*)$", r"**Example**:\n\n```console\n$ \1\n```", text, flags=re.MULTILINE)
    return re.sub(r"\*\*Options\*\*:\s+(?=## |$)", "", text)  # of commands whose only option was --help


def routes() -> str:
    """Every operation of `docs/openapi.json` and the schemas that they name."""
    document = json.loads((REPOSITORY / "docs" / "openapi.json").read_text())
    operations = [
        (operation["tags"][0], _operation(method, path, operation))
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    ]
    parts = []
    for tag in document["tags"]:
        parts.append(f"## {tag['name']}\n\n{tag['description']}")
        parts += [text for name, text in operations if name == tag["name"]]
    statuses = [f"| {code} | {value['description']} |" for code, value in document["components"]["responses"].items()]
    parts.append("\n".join(["## Statuses", "", "| status | meaning |", "|---|---|", *statuses]))
    parts.append("## Schemas")
    parts += [_schema(name, schema) for name, schema in document["components"]["schemas"].items()]
    return "\n\n".join(parts)


def _operation(method: str, path: str, operation: dict[str, Any]) -> str:
    lines = [f"### {method.upper()} {path} {{ #{method}{_anchor(path)} }}", "", f"{operation['summary']}."]
    if "description" in operation:
        lines += ["", operation["description"]]
    if "requestBody" in operation:
        lines += ["", "**Body:** " + _contents(operation["requestBody"]["content"]) + "."]
    if parameters := operation.get("parameters"):
        lines += ["", "| parameter | in | type | default | |", "|---|---|---|---|---|"]
        lines += [_parameter(parameter) for parameter in parameters]
    good = {code: value for code, value in operation["responses"].items() if "$ref" not in value}
    for code, response in good.items():
        content = _contents(response.get("content", {}))
        lines += ["", f"**{code}:** {response['description']}" + (f" {content}." if content else "")]
    if bad := [f"[{code}](#statuses)" for code in operation["responses"] if code not in good]:
        lines += ["", "**Errors:** " + ", ".join(bad) + "."]
    return "\n".join(lines)


def _contents(content: dict[str, Any]) -> str:
    """Media types, each with the schemas that it names."""
    return ", ".join(
        f"`{kind}`" + (f" ({names})" if (names := _names(value.get("schema", {}))) else "")
        for kind, value in content.items()
    )


def _names(schema: dict[str, Any]) -> str:
    """Links to the schemas that a schema is, or is one of."""
    options = schema.get("anyOf") or schema.get("oneOf") or [schema]
    names = [option["$ref"].removeprefix(SCHEMA) for option in options if "$ref" in option]
    return " or ".join(f"[{name}](#{name.lower()})" for name in names)


def _parameter(parameter: dict[str, Any]) -> str:
    schema = parameter["schema"]
    default = f"`{json.dumps(schema['default'])}`" if "default" in schema else ""
    name = f"`{parameter['name']}`" + (" (required)" if parameter.get("required") and parameter["in"] != "path" else "")
    about = parameter.get("description", "")
    return f"| {name} | {parameter['in']} | {_type(schema)} | {default} | {about} |"


def _schema(name: str, schema: dict[str, Any]) -> str:
    lines = [f"### {name} {{ #{name.lower()} }}", "", "| field | type | |", "|---|---|---|"]
    required = schema.get("required", [])
    for field, value in schema.get("properties", {}).items():
        about = value.get("description", "") if field in required else f"Optional. {value.get('description', '')}"
        lines.append(f"| `{field}` | {_type(value)} | {about.strip()} |")
    return "\n".join(lines)


def _type(schema: dict[str, Any]) -> str:
    """A JSON schema in a few words."""
    if "$ref" in schema:
        return _names(schema)
    if "const" in schema:
        return f"`{json.dumps(schema['const'])}`"
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if options := schema.get("oneOf") or schema.get("anyOf"):
        return " or ".join(dict.fromkeys(_type(option) for option in options))
    kind = schema.get("type", "any")
    if isinstance(kind, list):
        return " or ".join(kind)
    if kind == "array":
        inner = _type(schema["items"]) if "items" in schema else "any"
        return f"array of {inner}" + _range(schema, "minItems", "maxItems")
    if kind == "object" and "properties" in schema:
        return "object: " + ", ".join(f"`{name}`" for name in schema["properties"])
    return f"{kind}" + _range(schema, "minimum", "maximum")


def _range(schema: dict[str, Any], low: str, high: str) -> str:
    lowest = f"{schema[low]:g}" if low in schema else f"above {schema['exclusiveMinimum']:g}" if _open(schema) else ""
    if high in schema:
        return f" ({lowest or 'up'} to {schema[high]:g})"
    return f" ({lowest} or more)" if low in schema else ""


def _open(schema: dict[str, Any]) -> bool:
    return "exclusiveMinimum" in schema


def _anchor(path: str) -> str:
    """`/jobs/file` -> `-jobs-file`."""
    return re.sub(r"[^a-z0-9]+", "-", path).rstrip("-")
