"""Saved artifacts, and changes to their files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from helpers.steering import fill
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel

import steer
from steer import SteeringConfig, SteeringVectors
from steer.artifact import CONFIG_FILE, TENSOR_FILE, Artifact


def steered(model: PreTrainedModel, **config: Any) -> SteeringVectors:
    vectors = steer.attach(model, SteeringConfig(**config))
    with torch.no_grad():
        for index, parameter in enumerate(vectors.parameters()):
            parameter.copy_(torch.randn(32, generator=torch.Generator().manual_seed(index)))
    return vectors


def random_artifact(model: PreTrainedModel, **config: Any) -> Artifact:
    """Random vectors for `model`, which stays steered."""
    vectors = fill(steer.attach(model, SteeringConfig(**config)))
    return Artifact(vectors.config, vectors.tensors())


def equal(one: Artifact, other: Artifact) -> bool:
    """Everything, bit for bit."""
    same = one.config == other.config and list(one.tensors) == list(other.tensors)
    return same and all(torch.equal(one.tensors[name], other.tensors[name]) for name in one.tensors)


def saved_vectors(model: PreTrainedModel, folder: Path) -> Path:
    """Saved vectors of all three layers of `model`, which has been detached again."""
    model.config._name_or_path = "org/tiny"
    out = steered(model, provenance={"recipe": "test", "scores": [0.5]}).save(folder)
    steer.detach(model)
    return out


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def change(folder: Path, tensors: dict[str, torch.Tensor | None] | None = None, **config: Any) -> None:
    """Rewrite the tensor file with other tensors (None takes one out) or another embedded config."""
    path = folder / TENSOR_FILE
    with safe_open(path, framework="pt") as file:
        values = json.loads(file.metadata()["steering_config"]) | config
        kept: dict[str, torch.Tensor | None] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    kept |= tensors or {}
    text = json.dumps(values)
    save_file({n: t for n, t in kept.items() if t is not None}, path, metadata={"steering_config": text})
    (folder / CONFIG_FILE).write_text(text)
