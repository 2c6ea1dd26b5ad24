"""The Hugging Face Hub: single files from it, and folders to it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from steer.errors import SteerError, one_line


def is_hub_id(name: str) -> bool:
    """Whether `name` is written like a model on the hub, `org/model`, and is not a folder or file here."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.count("/") == 1 and not Path(name).exists()


def refuse_revision(here: object, revision: str | None) -> None:
    """SteerError for a revision of `here`, a folder or file that is not on the hub."""
    if revision is not None:
        raise SteerError(
            f"revision {revision!r} was given with {str(here)!r}: only hub ids have one, omit it"
        )


def fetch(repo_id: str, file: str, revision: str | None = None, token: str | None = None) -> Path:
    """
    One file of a model repository, downloaded unless it is in the cache.

    Args:
        repo_id: such as "org/name".
        file: its name in the repository.
        revision: branch, tag or commit, by default the main branch.
        token: for private repositories, by default that of `hf auth login`.

    Returns:
        Where it lies in the cache.

    Raises:
        SteerError: when there is no such repository or file, or the hub cannot be reached.
    """
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repo_id, file, revision=revision, token=token))
    except Exception as error:  # network, permissions, a name that is not an id: classes of several packages
        raise SteerError(
            f"no folder {repo_id}, and the hub did not give {file} of that id ({one_line(error)})"
        ) from error


def commit(repo_id: str, revision: str | None = None) -> str | None:
    """
    The commit from which a model was loaded just now, as the cache knows it: asks no network.

    Args:
        repo_id: such as "org/name", or a local folder.
        revision: branch, tag or commit, by default the main branch.

    Returns:
        40 hex digits; None for a local folder, and where the cache does not know the commit.
    """
    from huggingface_hub import try_to_load_from_cache

    if Path(repo_id).exists():
        return None
    file = try_to_load_from_cache(repo_id, "config.json", revision=revision)
    return Path(file).parent.name if isinstance(file, str) else None


def search(tags: Sequence[str], author: str | None = None, limit: int = 20) -> list[str]:
    """
    The ids of model repositories that have all of these tags, those changed last first.

    Args:
        tags: such as "steering-vectors".
        author: user or organisation; None for all.
        limit: at most so many.

    Raises:
        SteerError: when the hub refuses or cannot be reached.
    """
    from huggingface_hub import HfApi

    try:
        found = HfApi().list_models(filter=list(tags), author=author, sort="last_modified", limit=limit)
        return [model.id for model in found]
    except Exception as error:  # network, permissions: classes of several packages
        raise SteerError(
            f"the hub cannot be searched ({one_line(error)}); check the network, and that HF_HUB_OFFLINE is "
            "not set"
        ) from error


def size(repo_id: str, file: str) -> int | None:
    """
    The size of a file of a model repository, in bytes; None where there is no such file.

    Raises:
        SteerError: when the hub refuses or cannot be reached.
    """
    from huggingface_hub import HfApi

    try:
        found = HfApi().get_paths_info(repo_id, [file])
    except Exception as error:
        raise SteerError(
            f"the hub does not tell the size of {file} in {repo_id} ({one_line(error)})"
        ) from error
    return next((entry.size for entry in found if hasattr(entry, "size")), None)


def push(
    write: Callable[[Path, str], object],
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str,
) -> str:
    """
    Create a model repository unless it is there, and upload a folder to it as one commit.

    Args:
        write: called with a folder and the id of the repository, writes the files into it. Nothing is
            created if it raises.
        repo_id: such as "user/name"; without "user/" a repository of the user who is logged in, whose id
            `write` is then called with once more.
        private: whether a repository that is created is private, by default as the user's account says.
        token: with write access, by default that of `hf auth login`.
        revision: branch that is committed to, created unless it is there; by default the main branch.
        commit_message: the title of the commit.

    Returns:
        The address of the commit.

    Raises:
        SteerError: when the hub refuses or cannot be reached.
    """
    from huggingface_hub import HfApi

    with tempfile.TemporaryDirectory() as name:
        write(Path(name), repo_id)
        try:
            api = HfApi(token=token)
            repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            if repo != repo_id:
                write(Path(name), repo)
            if revision is not None:
                api.create_branch(repo, branch=revision, exist_ok=True)
            sent = api.upload_folder(
                repo_id=repo, folder_path=name, commit_message=commit_message, revision=revision
            )
            return str(sent)
        except (
            Exception
        ) as error:  # network, permissions, a name that is not an id: classes of several packages
            raise SteerError(
                f"cannot push to {repo_id} ({one_line(error)}); give USER/NAME of yours and log in with "
                "`hf auth login`, or pass token="
            ) from error
