"""Commands that publish bundles: push, pull."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mixmim_serve.cli.common import BundleArgument, app, bundle_path

RepoArgument = Annotated[
    str,
    typer.Argument(metavar="REPO", help="user/name on the Hugging Face Hub, or a folder: /shared/shoes, ./shoes."),
]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace an existing bundle in a folder.")]


@app.command()
def push(
    bundle: BundleArgument,
    repo: RepoArgument,
    public: Annotated[bool, typer.Option("--public", help="Make a new repository public.")] = False,
    overwrite: OverwriteOption = False,
) -> None:
    """Publish a bundle with a model card; a new Hub repository is private unless --public is given.

    Example: mixmim push bundles/shoes me/shoes
    """
    from mixmim_serve.publish.hub import push as publish

    typer.echo(f"pushed to {publish(bundle_path(bundle), repo, public=public, overwrite=overwrite)}")


@app.command()
def pull(
    repo: RepoArgument,
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="The bundle folder to write.")],
    revision: Annotated[str, typer.Option(help="A branch, tag or commit on the Hub.")] = "",
    overwrite: OverwriteOption = False,
) -> None:
    """Download a published bundle; every checksum is verified before the folder appears.

    Example: mixmim pull me/shoes bundles/shoes
    """
    from mixmim_serve.publish.hub import pull as fetch

    bundle = fetch(repo, folder, revision=revision, overwrite=overwrite)
    typer.echo(f"wrote {folder}: model {bundle.name}, model fingerprint {bundle.fingerprint}")
