"""Artifacts on the hub: found, taken and given. Their files are read, never run."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from steer import hub
from steer.artifact import CARD_FILE, read, write
from steer.artifact_file import CONFIG_FILE, TENSOR_FILE
from steer.card import MARK, TAG
from steer.config import SteeringConfig
from steer.errors import SteerError


@dataclass(frozen=True)
class Found:
    """
    An artifact on the hub.

    Attributes:
        repo_id: such as "user/name".
        config: of its `steering_config.json`; None where that cannot be read.
        size: of its tensor file, in bytes; None where there is none.
        problem: why it cannot be read, in one line.
    """

    repo_id: str
    config: SteeringConfig | None = None
    size: int | None = None
    problem: str | None = None


def find(author: str | None = None, tag: str | None = None, limit: int = 20) -> list[Found]:
    """
    The steering vectors on the hub, those changed last first.

    Args:
        author: user or organisation; None for all.
        tag: a further tag of the repository, such as "base_model:org/name".
        limit: most repositories.

    Raises:
        SteerError: the hub refuses or cannot be reached.
    """
    tags = [TAG, *([tag] if tag else [])]
    return [_look(repo_id) for repo_id in hub.search(tags, author, limit)]


def _look(repo_id: str) -> Found:
    try:
        path = hub.fetch(repo_id, CONFIG_FILE)
        config = SteeringConfig.from_json(path.read_text(errors="replace"), path)
        return Found(repo_id, config, hub.size(repo_id, TENSOR_FILE))
    except SteerError as error:  # somebody else's repository must not hide the rest
        return Found(repo_id, problem=str(error))


def pull(repo_id: str, folder: Path, revision: str | None = None) -> None:
    """
    Download an artifact into a folder, with every check of `steer.read`.

    Args:
        repo_id: such as "user/name".
        folder: made if missing.
        revision: branch, tag or commit; by default the main branch.

    Raises:
        SteerError: the repository is not there or holds no artifact, or the folder cannot be written.
    """
    if not hub.is_hub_id(repo_id):
        here = "a folder here" if Path(repo_id).exists() else "no id of the hub"
        raise SteerError(f"{repo_id!r} is {here}; give USER/NAME")
    artifact = read(repo_id, revision)
    write(folder, artifact, repo_id)
    try:
        card = hub.fetch(repo_id, CARD_FILE, revision).read_bytes()
    except SteerError:  # the one that `write` made stays
        return
    (folder / CARD_FILE).write_bytes(card)


@contextmanager
def packed(source: str, repo_id: str) -> Iterator[Path]:
    """
    Inside, a folder of what is to be uploaded: the artifact in `source`, and its card, which names `repo_id`.
    A card of the user's own in `source` goes as it is.

    Raises:
        SteerError: there is no artifact in `source`, or it is damaged.
    """
    artifact = read(source)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder, artifact, repo_id)
        own = Path(source) / CARD_FILE
        if own.is_file() and MARK not in own.read_text(errors="replace"):
            (folder / CARD_FILE).write_bytes(own.read_bytes())
        yield folder
