"""The hub as a folder: no network."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from huggingface_hub.errors import LocalEntryNotFoundError


def cached_model(
    source: Path, name: str, commits: dict[str, str], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """The model in the folder `source` as `name` in a cache of the hub: a commit for each revision."""
    home = cache / f"models--{name.replace('/', '--')}"
    (home / "refs").mkdir(parents=True)
    for revision, commit in commits.items():
        shutil.copytree(source, home / "snapshots" / commit)
        (home / "refs" / revision).write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return home


def fake_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Replaces the hub: `calls` that were made, `files` of a repository, and the folder `home` of all."""
    home, calls = tmp_path / "remote", []

    class Api:
        def __init__(self, token: str | None = None):
            calls.append(("token", token))

        def create_repo(self, repo_id: str, **arguments: Any) -> Any:
            calls.append(("create_repo", repo_id, arguments))
            return SimpleNamespace(repo_id=repo_id)

        def create_branch(self, repo_id: str, **arguments: Any) -> None:
            calls.append(("create_branch", repo_id, arguments))

        def upload_folder(self, *, repo_id: str, folder_path: str, **arguments: Any) -> str:
            calls.append(("upload_folder", repo_id, arguments))
            shutil.copytree(folder_path, home / repo_id, dirs_exist_ok=True)
            return f"https://huggingface.co/{repo_id}/commit/1"

        def list_models(self, *, filter: list[str], author: str | None, sort: str, limit: int) -> Any:
            """By the tags of the cards, as the hub does."""
            calls.append(("list_models", filter, author, sort, limit))
            for folder in sorted(home.glob(f"{author or '*'}/*"))[:limit]:
                card = folder / "README.md"
                metadata = yaml.safe_load(card.read_text().split("---")[1]) if card.exists() else {}
                tags = [*metadata.get("tags", []), f"base_model:{metadata.get('base_model')}"]
                if {*filter} <= {*tags}:
                    yield SimpleNamespace(id=f"{folder.parent.name}/{folder.name}")

        def get_paths_info(self, repo_id: str, paths: list[str]) -> Any:
            found = [home / repo_id / path for path in paths]
            return [SimpleNamespace(size=path.stat().st_size) for path in found if path.exists()]

    def download(repo_id: str, name: str, *, revision: str | None, token: str | None) -> str:
        calls.append(("download", repo_id, name, revision, token))
        if not (home / repo_id / name).exists():
            raise LocalEntryNotFoundError("not there\nsecond line")
        return str(home / repo_id / name)

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.chdir(tmp_path)
    return SimpleNamespace(calls=calls, files=lambda repo: sorted(os.listdir(home / repo)), home=home)
