"""Commands that publish bundles: push, pull."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mixmim_serve.cli.common import BundleArgument, app, bundle_path

RepoArgument = Annotated[
    str, typer.Argument(metavar="REPO", help="user/name on the Hugging Face hub, or a folder: /shared/shoes, ./shoes.")
]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace an existing bundle in a folder.")]


@app.command()
def push(
    bundle: BundleArgument,
    repo: RepoArgument,
    public: Annotated[bool, typer.Option("--public", help="Let everyone see a repository that this makes.")] = False,
    overwrite: OverwriteOption = False,
) -> None:
    """Publish a bundle with a model card; a hub repository that is not there yet is made, a private one.

    Example: mixmim push bundles/shoes me/shoes
    """
    from mixmim_serve.publish.hub import push as publish

    typer.echo(f"pushed to {publish(bundle_path(bundle), repo, public=public, overwrite=overwrite)}")


@app.command()
def pull(
    repo: RepoArgument,
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="The bundle folder to write.")],
    revision: Annotated[str, typer.Option(help="A branch, tag or commit of the hub.")] = "",
    overwrite: OverwriteOption = False,
) -> None:
    """Fetch a published bundle; every file is compared with its checksum before the folder appears.

    Example: mixmim pull me/shoes bundles/shoes
    """
    from mixmim_serve.publish.hub import pull as fetch

    bundle = fetch(repo, folder, revision=revision, overwrite=overwrite)
    typer.echo(f"wrote {folder}  fingerprint {bundle.fingerprint}")
