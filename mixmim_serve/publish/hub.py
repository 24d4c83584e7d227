"""Push a bundle to the Hugging Face hub, or to a folder, and pull it from there.

What is published: the bundle's own files and a model card. Certificates stay: they are of one machine. What is pulled
is compared with the bundle's checksums before the folder appears under its name.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from mixmim_serve.bundle import CONFIG, Bundle, check_target, copy_file, open_bundle
from mixmim_serve.errors import BundleError, HubError
from mixmim_serve.files import atomic_folder
from mixmim_serve.publish.card import CARD, model_card

_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_FOLDER = ("/", "./", "../", "~/")


def push(path: Path, repo: str, *, public: bool = False, overwrite: bool = False) -> str:
    """Publish a bundle; says where it lies now.

    A repository of the hub is made if there is none, private unless `public`; a new version is a new commit. A folder
    is written whole or not at all, and replaced only with `overwrite`.

    Raises:
        BundleError: when the bundle is none or altered, or something is in the folder's way.
        HubError: when the hub refuses or cannot be reached.
    """
    if path.is_file():
        raise BundleError(f"{path} is a file, and only bundles are pushed: run `mixmim export` on a checkpoint first.")
    bundle = open_bundle(path)
    bundle.verify()
    if not is_folder(repo):
        with tempfile.TemporaryDirectory() as temporary:
            _write(bundle, Path(temporary), repo)
            return _upload(Path(temporary), repo, public)
    target = Path(repo).expanduser()
    check_target(target, overwrite)
    with atomic_folder(target) as folder:
        _write(bundle, folder, repo)
    return str(target)


def pull(repo: str, target: Path, *, revision: str = "", overwrite: bool = False) -> Bundle:
    """Fetch a bundle into a folder that appears only when every file is as its checksum says.

    `revision` is a branch, tag or commit of the hub; without one it is the newest of the main branch.

    Raises:
        BundleError: when what is there is no bundle, incomplete or altered, or something is in the way.
        HubError: when there is no such repository, or the hub cannot be reached.
    """
    check_target(target, overwrite)
    local = is_folder(repo)
    if local and revision:
        raise HubError(f"{repo} is a folder and has no revisions: leave --revision out.")
    with atomic_folder(target) as folder:
        try:
            if local:
                _copy(Path(repo).expanduser(), folder)
            else:
                _download(repo, revision, folder)
        except BundleError as error:
            raise BundleError(f"nothing was pulled: {str(error).replace(str(folder), repo)}") from error
    return open_bundle(target)


def is_folder(repo: str) -> bool:
    """Whether a repository is a folder, and not one of the hub's.

    Raises:
        HubError: when it could be both, or is neither.
    """
    if repo.startswith(_FOLDER):
        return True
    if _REPO.fullmatch(repo) is None:
        raise HubError(f"{repo!r} is no repository: give user/name for one of the hub, or a folder such as ./{repo}.")
    if Path(repo).exists():  # nobody should publish by mistake what was meant for a shared disk
        raise HubError(f"{repo} is a folder here and may be of the hub: write ./{repo}, or run this elsewhere.")
    return False


def _write(bundle: Bundle, folder: Path, repo: str) -> None:
    bundle.copy(folder)
    (folder / CARD).write_text(model_card(bundle, repo), encoding="utf-8")


def _copy(source: Path, folder: Path) -> None:
    open_bundle(source).copy(folder)
    if (source / CARD).exists() or (source / CARD).is_symlink():
        copy_file(source / CARD, folder / CARD)


def _upload(folder: Path, repo: str, public: bool) -> str:
    with _hub(repo) as hub:
        api = hub.HfApi(library_name="mixmim-serve")
        api.create_repo(repo, private=not public, exist_ok=True)
        return str(api.upload_folder(repo_id=repo, folder_path=folder, commit_message="mixmim push").commit_url)


def _download(repo: str, revision: str, folder: Path) -> None:
    """The files of one commit: config.json first, which names the others; nothing else of the repository is fetched."""
    with _hub(repo) as hub:
        commit = hub.HfApi(library_name="mixmim-serve").model_info(repo, revision=revision or None).sha
        hub.snapshot_download(repo, revision=commit, local_dir=folder, allow_patterns=[CONFIG])
    bundle = open_bundle(folder)
    with _hub(repo) as hub:
        hub.snapshot_download(repo, revision=commit, local_dir=folder, allow_patterns=[*bundle.checksums, CARD])
    shutil.rmtree(folder / ".cache", ignore_errors=True)  # the client's notes
    bundle.check_links()
    if (folder / CARD).is_symlink():
        raise BundleError(f"{folder / CARD} is a symbolic link: replace it with the file itself.")
    bundle.verify()


@contextlib.contextmanager
def _hub(repo: str) -> Iterator[ModuleType]:
    """The hub's client; its errors, which have no common base, become one of ours.

    Raises:
        HubError: for whatever goes wrong inside.
    """
    import huggingface_hub
    from huggingface_hub import errors

    try:
        yield huggingface_hub
    except errors.RepositoryNotFoundError as error:
        raise HubError(
            f"the hub has no {repo} that you may use: check the name, or sign in with `hf auth login`."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise HubError(f"{repo} has no such revision: give a branch, tag or commit of it.") from error
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise HubError(f"the hub could not be used for {repo}: {reason}") from error
