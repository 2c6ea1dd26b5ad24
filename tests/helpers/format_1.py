"""Artifacts as format 1 wrote them: the file names of today, other names in the config."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from steer.artifact_file import CONFIG_FILE, TENSOR_FILE
from steer.artifact_scores import MEASURED

OLD = {"hidden_size": "width", "num_hidden_layers": "depth", "base_model_name_or_path": "base_model"}


def old_config(values: dict[str, Any]) -> dict[str, Any]:
    """A config of the present format as format 1 wrote it."""
    kept = {name: value for name, value in values.items() if name not in ("prompt", "base_adapter")}
    kept["provenance"] = {k: v for k, v in (values["provenance"] or {}).items() if k != MEASURED} or None
    return {OLD.get(name, name): value for name, value in kept.items()} | {"format_version": 1}


def downgrade(folder: Path) -> None:
    """Rewrite the artifact in `folder` in format 1."""
    path = folder / TENSOR_FILE
    with safe_open(path, framework="np") as file:
        text = json.dumps(old_config(json.loads(file.metadata()["steering_config"])), indent=2)
    tensors = load_file(path)
    checksum = sha256(text.encode())
    for name in sorted(tensors):
        checksum.update(name.encode() + tensors[name].tobytes())
    save_file(tensors, path, {"steering_config": text, "sha256": checksum.hexdigest()})
    (folder / CONFIG_FILE).write_text(text + "\n")
