"""Push a bundle to the Hugging Face Hub or to a folder, and pull it from there.

Published are the bundle's files and a model card, but not the certificates, which belong to one machine. Pulled files
are compared with the bundle's checksums before the folder appears under its name.
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
    """Publish a bundle; returns its path or the URL of the commit.

    A missing repository of the Hub is created, private unless `public`; a new version is a new commit. A folder is
    written atomically, and replaced only with `overwrite`.

    Raises:
        BundleError: when `path` is not a bundle or is altered, or the target folder cannot be replaced.
        HubError: when the Hub rejects the upload or cannot be reached.
    """
    if path.is_file():
        raise BundleError(
            f"{path} is a file, but only bundles can be pushed: run `mixmim export` on a checkpoint first."
        )
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
    """Fetch a bundle into a folder that appears only once every file matches its checksum.

    `revision` is a branch, tag or commit of the Hub; the default is the newest commit of the main branch.

    Raises:
        BundleError: when `repo` is not a bundle, incomplete or altered, or the target cannot be replaced.
        HubError: when the repository does not exist, or the Hub cannot be reached.
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
    """Whether `repo` is a folder, and not a repository of the Hub.

    Raises:
        HubError: when it could be both, or is neither.
    """
    if repo.startswith(_FOLDER):
        return True
    if _REPO.fullmatch(repo) is None:
        raise HubError(f"{repo!r} is not a repository: give user/name for the Hub, or a folder such as ./{repo}.")
    if Path(repo).exists():  # do not publish by mistake what was meant for a shared disk
        raise HubError(
            f"{repo} is a folder here, but may also be on the Hub: write ./{repo}, or run this in another folder."
        )
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
    """Fetch one commit: config.json first, then only the files that it lists and the model card."""
    with _hub(repo) as hub:
        commit = hub.HfApi(library_name="mixmim-serve").model_info(repo, revision=revision or None).sha
        hub.snapshot_download(repo, revision=commit, local_dir=folder, allow_patterns=[CONFIG])
    bundle = open_bundle(folder)
    with _hub(repo) as hub:
        hub.snapshot_download(repo, revision=commit, local_dir=folder, allow_patterns=[*bundle.checksums, CARD])
    shutil.rmtree(folder / ".cache", ignore_errors=True)  # the client's metadata
    bundle.check_links()
    if (folder / CARD).is_symlink():
        raise BundleError(f"{folder / CARD} is a symbolic link: replace it with the file itself.")
    bundle.verify()


@contextlib.contextmanager
def _hub(repo: str) -> Iterator[ModuleType]:
    """The Hub's client; its exceptions, which have no common base, become a `HubError`.

    Raises:
        HubError: for any failure inside the block.
    """
    import huggingface_hub
    from huggingface_hub import errors

    try:
        yield huggingface_hub
    except errors.RepositoryNotFoundError as error:
        raise HubError(
            f"the Hub has no repository {repo} that you can access: check its name, or sign in with `hf auth login`."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise HubError(f"{repo} has no such revision: give one of its branches, tags or commits.") from error
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise HubError(f"cannot access {repo} on the Hub: {reason}") from error
