"""Shared by all commands: the app, `main`, common options, and bundles by name."""

from __future__ import annotations

import os
import shlex
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mixmim_serve.errors import MixMIMError
from mixmim_serve.publish.store import is_tag, stored_path

if TYPE_CHECKING:
    from rich.console import Console

app = typer.Typer(
    name="mixmim",
    help="MixMIM backbones: pretrain on your own photos, fine-tune, export, embed, classify, search, serve.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

BundleArgument = Annotated[
    Path,
    typer.Argument(metavar="BUNDLE", help="A bundle folder, the shipped bundle (tiny), or a BentoML model tag."),
]
EngineOption = Annotated[
    str,
    typer.Option(
        "--engine",
        help="onnx, onnx-tensorrt, openvino, tensorrt, tensorrt-rtx or torch; auto: fastest that agrees with torch.",
    ),
]

# The extra that installs a package which a command needs.
EXTRAS = {
    "torch": "train",
    "onnx": "export",
    "onnxscript": "export",
    "onnx_ir": "export",
    "onnxruntime": "cpu",
    "cuda": "tensorrt",
    "pyarrow": "extract",
    "filelock": "extract",
    "ray": "ray",
    "lance": "lance",
    "sklearn": "explore",
    "scipy": "explore",
    "usearch": "explore",
    "kornia": "train",
    "matplotlib": "train",
    "tensorboard": "train",
    "fsspec": "remote",
    "mlflow": "mlflow",
    "wandb": "wandb",
    "huggingface_hub": "hub",
    "pillow_heif": "heif",
}


def main() -> None:
    """Run the command; our errors become one sentence on standard error and exit code 1."""
    warnings.filterwarnings("ignore", module="PIL")  # about unusual files that still decode
    try:
        app()
    except MixMIMError as error:
        _fail(str(error))
    except ModuleNotFoundError as error:
        extra = EXTRAS.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        _fail(f"this command needs {error.name}: run pip install 'mixmim-serve[{extra}]'.")
    except OSError as error:
        _fail(f"{error.filename or 'input or output'}: {error.strerror or error}.")


def bundle_path(path: Path) -> Path:
    """The path itself, a shipped bundle by its name, or a bundle in BentoML's model store by its tag.

    Raises:
        BundleError: for a tag that is not in the store.
    """
    shipped = Path(__file__).parent.parent / "bundles" / path
    if path.exists():
        return path
    if shipped.is_dir():
        return shipped
    return stored_path(str(path)) if is_tag(str(path)) else path


def shell(*words: object) -> str:
    """A command line to copy into a shell: words with spaces and other special characters are quoted."""
    return shlex.join(map(str, words))


def first_process() -> bool:
    """Whether this process prints: under torchrun only the first one does."""
    return os.environ.get("RANK", "0") == "0"


def progress_console() -> Console:
    """A console on standard error, so that results can be piped."""
    from rich.console import Console

    return Console(stderr=True, log_path=False, quiet=not first_process())


def say_passed_over(counts: Mapping[str, int]) -> None:
    """Name the files that are no images, or cannot be read here, on standard error."""
    from mixmim_serve.sources.passed_over import sentence

    if counts and first_process():
        typer.echo(sentence(counts), err=True)


def _fail(message: str) -> None:
    typer.echo(f"mixmim: {message}", err=True)
    sys.exit(1)
