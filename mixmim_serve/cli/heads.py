"""The command on the heads of a bundle: head."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mixmim_serve.cli.common import (
    BundleArgument,
    EngineOption,
    app,
    bundle_path,
    progress_console,
    say_passed_over,
)

if TYPE_CHECKING:
    from mixmim_serve.bundle import Bundle
    from mixmim_serve.fitting.head import FittedHead
    from mixmim_serve.heads import Heads


@app.command()
def head(
    bundle: BundleArgument,
    data: Annotated[
        str, typer.Argument(metavar="DATA", help="Photos in one folder per class, or DATA/train and DATA/val.")
    ] = "",
    name: Annotated[str, typer.Option(help="The head's name, for `classify --head` and /classify?head=.")] = "",
    val: Annotated[str, typer.Option(help="Photos to judge the head by, if not DATA/val.")] = "",
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Write a copy of BUNDLE with the change.")] = None,
    default: Annotated[bool, typer.Option("--default", help="Make it the head that answers without a name.")] = False,
    remove: Annotated[bool, typer.Option("--remove", help="Remove the head NAME.")] = False,
    engine: EngineOption = "auto",
) -> None:
    """Fit a classification head to labelled photos and write it into a bundle; without DATA list the heads.

    The head is a logistic regression on the embeddings; the network, its vectors and its fingerprint stay the same.

    Example: mixmim head bundles/mine labelled --name garments
    """
    from mixmim_serve.bundle import open_bundle
    from mixmim_serve.heads import change_heads, read_heads

    opened = open_bundle(bundle_path(bundle))
    opened.verify()
    if not (name or data or default or remove):
        _print_heads(read_heads(opened))
        return
    _check_options(name, data, default=default, remove=remove)
    if out is None:
        _check_may_change(bundle, opened)
    if data:
        fitted = _fit(opened, data, val, name, engine)
        changed = change_heads(opened, lambda heads: heads.plus(fitted.head, default=default), out)
        _report(fitted)
    else:
        changed = change_heads(opened, lambda heads: heads.minus(name) if remove else heads.with_default(name), out)
    heads = read_heads(changed)
    if heads.names:
        typer.echo(f"{changed.path} has the heads {', '.join(heads.names)}")
        typer.echo(f"{heads.default} answers where none is named")
    else:
        typer.echo(f"{changed.path} has no head")


def _check_options(name: str, data: str, *, default: bool, remove: bool) -> None:
    """Refuse what cannot be meant, before minutes of work.

    Raises:
        ConfigError: saying what is missing or too much.
    """
    from mixmim_serve.errors import ConfigError
    from mixmim_serve.heads import check_head_name

    if not name:
        raise ConfigError("which head? Give its name, such as --name garments.")
    if (remove and (data or default)) or not (data or default or remove):
        raise ConfigError("give DATA to fit a head to, or --default or --remove for one that exists.")
    if data:
        check_head_name(name)


def _check_may_change(given: Path, bundle: Bundle) -> None:
    """Leave bundles alone that came with the package or lie in a model store.

    Raises:
        ConfigError: when the bundle was named, not given as a folder.
    """
    from mixmim_serve.bundle import DEFAULT_BUNDLE
    from mixmim_serve.errors import ConfigError

    if not given.exists() or bundle.path.resolve() == DEFAULT_BUNDLE.resolve():
        raise ConfigError(f"{given} is shipped or stored, and not to be changed: write a copy with --out DIR.")


def _fit(bundle: Bundle, data: str, val: str, name: str, engine: str) -> FittedHead:
    """Fit a head, with a progress bar."""
    from rich.progress import Progress

    from mixmim_serve.engines import open_engine
    from mixmim_serve.fitting.head import fit_head
    from mixmim_serve.fitting.photos import open_photos

    train, validation = open_photos(data, val)
    parts = (train, validation) if validation else (train,)
    for part in parts:
        say_passed_over(part.source.passed_over)
    opened = open_engine(bundle, engine)
    with Progress(console=progress_console(), transient=True) as bar:
        task = bar.add_task("embed", total=sum(len(part.source.keys) for part in parts))
        return fit_head(
            opened, name, train, validation,
            progress=lambda count: bar.advance(task, count),
            step=lambda text: bar.update(task, description=f"fit, {text}"),
        )  # fmt: skip


def _report(fitted: FittedHead) -> None:
    """Say how good the head is, and warn of what spoils the figures."""
    from mixmim_serve.heads import accuracy_in_words

    head = fitted.head
    typer.echo(f"{head.name}, {len(head.classes):,} classes: {accuracy_in_words(head)}")
    if fitted.in_both:
        typer.echo(
            f"warning: {fitted.in_both:,} photos of val are also in train, so val is easier than it looks", err=True
        )
    if fitted.unreadable:
        typer.echo(f"warning: {len(fitted.unreadable):,} unreadable, such as {fitted.unreadable[0]}", err=True)


def _print_heads(heads: Heads) -> None:
    """One line per head, the default one first."""
    from mixmim_serve.heads import accuracy_in_words

    if not heads.names:
        typer.echo("no head: fit one with mixmim head BUNDLE DATA --name NAME")
    for head in sorted(heads.by_name.values(), key=lambda each: each.name != heads.default):
        marked = " (default)" if head.name == heads.default else ""
        typer.echo(f"{head.name}{marked}: {len(head.classes):,} classes, {accuracy_in_words(head)}")
