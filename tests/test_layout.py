"""The rules of the house: which way imports flow, and that serving never loads torch."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from conftest import REPOSITORY

PACKAGES = ("mixmim_serve", "export", "training")

# Lowest first. A module may import its own layer and those below it. (docs/architecture.md)
LAYERS: tuple[tuple[str, ...], ...] = (
    (
        "mixmim_serve.errors",
        "mixmim_serve.families",
        "mixmim_serve.config",
        "mixmim_serve.containers",
        "mixmim_serve.version",
        "mixmim_serve.cores",
        "mixmim_serve.files",
        "mixmim_serve.heif",
        "mixmim_serve.locks",
        "mixmim_serve.settings",
        "mixmim_serve.signals",
        "mixmim_serve.strict_json",
    ),
    (
        "mixmim_serve.description",
        "mixmim_serve.preprocess",
        "mixmim_serve.runs",
        "mixmim_serve.bundle",
        "mixmim_serve.heads",
        "mixmim_serve.sources",
    ),
    ("mixmim_serve.engines", "mixmim_serve.model"),
    ("mixmim_serve.tasks", "mixmim_serve.panel", "mixmim_serve.shipped"),
    (
        "mixmim_serve.service",
        "mixmim_serve.client",
        "mixmim_serve.anomaly",
        "mixmim_serve.extract",
        "mixmim_serve.explore",
        "mixmim_serve.fitting",
        "mixmim_serve.bench",
        "mixmim_serve.publish",
    ),
    ("mixmim_serve.cli",),
)
BESIDE = ("export", "training")  # may use the first four layers, and not each other
MAY_IMPORT_TORCH = ("mixmim_serve.model", "mixmim_serve.engines.torch", "export", "training")
HEAVY = (
    "torch",
    "fsspec",
    "pillow_heif",
    "huggingface_hub",
    "lance",
    "ray",
    "scipy",
    "sklearn",
    "usearch",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "bentoml",
    "pyarrow",
)


def modules() -> dict[str, Path]:
    """Every module by its dotted name."""
    found = {}
    for package in PACKAGES:
        for path in (REPOSITORY / package).rglob("*.py"):
            parts = path.relative_to(REPOSITORY).with_suffix("").parts
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


def imports(path: Path) -> tuple[set[str], set[str]]:
    """Modules that are imported at the top of a file, and those inside its functions."""
    tree = ast.parse(path.read_text())
    top: set[str] = set()
    inside: set[str] = set()
    deferred = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [str(node.module)]
        (inside if id(node) in deferred else top).update(names)
    return top, inside


def graph(files: dict[str, Path]) -> dict[str, set[str]]:
    """Which of these files each of them imports anywhere: at its top, in functions and for type checkers alone."""
    edges = {}
    for module, path in files.items():
        targets = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                targets |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                members = {f"{node.module}.{alias.name}" for alias in node.names}
                targets |= members & files.keys() or {str(node.module)}
        edges[module] = targets & files.keys() - {module}
    return edges


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """One circle of imports after another, each cut at its closing import before the next is looked for."""
    edges, found = {module: set(targets) for module, targets in edges.items()}, []
    while True:
        try:
            graphlib.TopologicalSorter(edges).prepare()
        except graphlib.CycleError as error:
            first, second, *_ = circle = error.args[1]  # each is imported by the next; the last is the first again
            edges[second].remove(first)
            found.append(circle)
        else:
            return found


def layer(module: str) -> int:
    """Position in LAYERS."""
    for position, names in enumerate(LAYERS):
        if any(module == name or module.startswith(f"{name}.") for name in names):
            return position
    raise AssertionError(f"{module} stands in no layer: add it to LAYERS")


def test_imports_flow_one_way() -> None:
    broken = []
    for module, path in modules().items():
        top, inside = imports(path)
        for target in top | inside:
            package = target.partition(".")[0]
            if package not in PACKAGES or target == "mixmim_serve" or module == "mixmim_serve":
                continue
            own = module.partition(".")[0]
            if own in BESIDE:
                allowed = package == own or (package == "mixmim_serve" and layer(target) <= 3)
            elif package in BESIDE:
                allowed = module.startswith("mixmim_serve.cli") and target not in top
            else:
                # open_engine and the layers' own folders look inside themselves; nothing looks up
                allowed = layer(target) <= layer(module)
            if not allowed:
                broken.append(f"{module} imports {target}")
    assert not broken


def test_no_imports_run_in_circles() -> None:
    assert circles(graph(modules())) == []


def test_circles_are_found_whatever_hides_them(tmp_path: Path) -> None:
    texts = {
        "package": "from package.plain import x\n",
        "package.plain": "import os\n",
        "package.deferred": "def f():\n    from package import typed\n",
        "package.typed": "if TYPE_CHECKING:\n    import package.deferred\n",
        "package.third": "from package.typed import a\n",
    }
    files = {name: tmp_path / name for name in texts}
    for name, text in texts.items():
        files[name].write_text(text)
    (circle,) = circles(graph(files))
    assert set(circle) == {"package.deferred", "package.typed"}


def test_torch_is_imported_only_where_it_belongs() -> None:
    for module, path in modules().items():
        names = {name.partition(".")[0] for name in imports(path)[0]}
        if not module.startswith(MAY_IMPORT_TORCH):
            assert not names & {"torch", "onnx", "onnxscript", "onnx_ir"}, module


TORCH_FREE = sorted(name for name in modules() if not name.startswith(MAY_IMPORT_TORCH))


SERVING = [name for name in TORCH_FREE if ".service" in name or name.count(".") < 2]
# Each module in a process of its own, forked from one that has imported what they share of others' packages.
IMPORT_EACH = """
import importlib, os, sys
import numpy, orjson, PIL.Image, prometheus_client, rich.console, starlette.applications, typer
assert not sys.modules.keys() & {"torch", "onnx", "mixmim_serve"}
for module in sys.argv[1:]:
    child = os.fork()
    if not child:
        importlib.import_module(module)
        sys.stdout.flush()
        os._exit(bool(sys.modules.keys() & {"torch", "onnx"}))
    print(module, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def imported() -> dict[str, str]:
    """Of each module of serving: "0" if it was imported without torch and onnx."""
    done = subprocess.run([sys.executable, "-c", IMPORT_EACH, *SERVING], check=True, stdout=subprocess.PIPE, text=True)
    return dict(line.split() for line in done.stdout.splitlines())


@pytest.mark.parametrize("module", SERVING)
def test_serving_modules_import_without_torch(imported: dict[str, str], module: str) -> None:
    assert imported[module] == "0"


def test_the_client_loads_no_server() -> None:
    heavy = {"torch", "onnxruntime", "bentoml", "starlette", "uvicorn", "mixmim_serve.service"}
    code = f"import sys, mixmim_serve.client; assert not sys.modules.keys() & {heavy!r}"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_help_loads_nothing_heavy() -> None:
    code = f"""
import sys
from typer.testing import CliRunner
from mixmim_serve.cli import app
for arguments in (["--help"], ["embed", "--help"], ["serve", "--help"], ["push", "--help"]):
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0 and "Usage" in result.output
assert not sys.modules.keys() & set({HEAVY!r}), sys.modules.keys() & set({HEAVY!r})
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_no_extra_brings_both_onnx_runtimes() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]

    def closure(extra: str) -> set[str]:
        names = set()
        for requirement in extras[extra]:
            if requirement.startswith("mixmim-serve["):
                for inner in requirement.removeprefix("mixmim-serve[").partition("]")[0].split(","):
                    names |= closure(inner)
            else:
                names.add(requirement.partition(">")[0].partition("=")[0].partition("[")[0].strip())
        return names

    base = {requirement.partition(">")[0].partition("=")[0] for requirement in project["dependencies"]}
    assert not base & {"onnxruntime", "onnxruntime-gpu", "torch", "onnx"}
    for extra in extras:
        assert not {"onnxruntime", "onnxruntime-gpu"} <= closure(extra), extra
    assert "onnxruntime" in closure("cpu")
    assert "torch" not in closure("cpu") | closure("gpu") | closure("extract")


def test_files_stay_readable() -> None:
    long = {path.name: lines for path in modules().values() if (lines := len(path.read_text().splitlines())) > 350}
    assert not long
