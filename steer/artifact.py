"""
The artifact: a folder of two small files that holds a set of steering vectors.

docs/format.md describes the format. In short: `steering.safetensors` holds the trainable parameters under
their names in the model, and the config in its metadata, so that this one file is a whole artifact;
`steering_config.json` is a copy of the config, and `README.md` the model card (`steer.card`). Each file is
written beside its target and renamed over it, tensors first: a kill at any moment leaves the old artifact or
the new one. Nothing in any of the files can execute code.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steer import hub
from steer.artifact_file import CONFIG_FILE, TENSOR_FILE, digest, read_file
from steer.artifact_scores import with_scores, without_scores
from steer.artifact_tensors import (
    check_arrays,
    check_tensors,
    decoder_name,
    directions_name,
    expected_names,
    probe_name,
    same_tensors,
)
from steer.card import MARK, PLACE, card
from steer.config import Condition, SteeringConfig, join_layers
from steer.errors import SteerError, shown
from steer.files import replace_files, with_metadata

if TYPE_CHECKING:
    import torch
    from torch import nn

log = logging.getLogger("steer")

CARD_FILE = "README.md"


@dataclass(frozen=True)
class Artifact:
    """
    Vectors at rest: `config`, and `tensors` by parameter name (shapes: see the format above).

    Artifacts of one base model add, subtract, scale and negate: `a + 0.5 * b`, `-a`, `a.layers(4, 20)`,
    `mean([a, b])`.
    """

    config: SteeringConfig
    tensors: Mapping[str, Any]  # torch tensors, or numpy arrays from `read_numpy`

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Artifact):
            return NotImplemented
        return self.config == other.config and same_tensors(self.tensors, other.tensors)

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | os.PathLike[str], revision: str | None = None, token: str | None = None
    ) -> Artifact:
        """
        The artifact in a folder, in a `.safetensors` file or on the hub. `steer.read` is the same.

        Args:
            name_or_path: folder, file or hub id (`user/name`).
            revision: branch, tag or commit of a hub id.
            token: for private repositories, by default that of `hf auth login`.

        Returns:
            The artifact, every tensor checked.

        Raises:
            SteerError: when there is none, or it is damaged, of a newer format or not consistent.
        """
        return read(name_or_path, revision, token)

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> Path:
        """
        Write the artifact. `steer.artifact.write` is the same.

        Args:
            save_directory: the folder, made if missing; an artifact in it is replaced.

        Returns:
            The folder.

        Raises:
            SteerError: when the folder cannot be written, or a vector holds NaN or Inf.
        """
        return write(save_directory, self)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        revision: str | None = None,
        commit_message: str = "Upload steering vectors",
    ) -> str:
        """
        Upload the artifact to a model repository, which is created if missing, as one commit. The model card
        in the repository is replaced.

        Args:
            repo_id: such as "user/name".
            private: whether a repository that is created is private, by default as the account says.
            token: with write access, by default that of `hf auth login`.
            revision: branch that is committed to, by default the main branch.
            commit_message: the title of the commit.

        Returns:
            The address of the commit.

        Raises:
            SteerError: when the artifact cannot be saved, the hub refuses or cannot be reached.
        """
        return hub.push(
            lambda folder, name: write(folder, self, name),
            repo_id,
            private=private,
            token=token,
            revision=revision,
            commit_message=commit_message,
        )

    @property
    def num_hidden_layers(self) -> int:
        """Number of decoder layers of the base model."""
        assert self.config.num_hidden_layers is not None
        return self.config.num_hidden_layers

    @property
    def decoder(self) -> str:
        """Name of the list of decoder layers in the base model, such as `model.layers`."""
        name = decoder_name(self.tensors)
        assert name is not None
        return name

    def by_layer(self) -> dict[int, torch.Tensor]:
        """
        What each steered layer adds: (hidden_size,) by layer, `config.scale` folded in, in float32 or better.
        SteerError for adaptive vectors, which add something else at every token, and for a condition.
        """
        self.config.refuse_condition("no vectors of their own express this set")
        return self._by_layer()

    def _by_layer(self) -> dict[int, torch.Tensor]:
        if self.config.kind == "adaptive":
            raise SteerError(
                "adaptive vectors add another amount at every token: no constant vector expresses them; "
                "export them as a PEFT LoRA or a checkpoint, which can"
            )
        at = {layer: f"{self.decoder}.{layer}.steering" for layer in self._indices()}
        scale = self.config.scale
        if self.config.kind == "shared":
            directions = _wide(self.tensors[directions_name(self.decoder)])
            return {i: scale * (_wide(self.tensors[f"{name}.mix"]) @ directions) for i, name in at.items()}
        return {i: scale * _wide(self.tensors[f"{name}.vector"]) for i, name in at.items()}

    def rank_one(self) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
        """
        Adaptive vectors by layer: (vector (hidden_size,), readout (inner,)), `config.scale` folded into the
        vector. The down-projection's output gets (x . readout) * vector for its input x.
        """
        self.config.refuse_condition("no LoRA expresses this set")
        return self._rank_one()

    def _rank_one(self) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
        assert self.config.kind == "adaptive", self.config.kind
        names = {layer: f"{self.decoder}.{layer}.steering" for layer in self._indices()}
        return {
            layer: (
                self.config.scale * _wide(self.tensors[f"{name}.vector"]),
                _wide(self.tensors[f"{name}.readout"]),
            )
            for layer, name in names.items()
        }

    def effective(self) -> dict[int, torch.Tensor]:
        """As `by_layer`; an adaptive vector is as long as the vector times its read-out."""
        if self.config.kind != "adaptive":
            return self._by_layer()
        return {
            layer: vector * (readout @ readout) ** 0.5
            for layer, (vector, readout) in self._rank_one().items()
        }

    def layers(self, first: int, last: int) -> Artifact:
        """The part that steers layers `first` to `last`, both included; negative ones count from the end."""
        return self.select(f"{first}-{last}", {"layers": [first, last]})

    def select(self, layers: str, step: dict[str, Any] | None = None) -> Artifact:
        """
        The part that steers some of the layers.

        Args:
            layers: as in `SteeringConfig`; those that have no vector are left out.
            step: what the provenance says of it.

        Raises:
            SteerError: the model has no such layer, or none of them has a vector.
        """
        wanted = replace(self.config, layers=layers, condition=None).resolve_layers(self.num_hidden_layers)
        kept = [layer for layer in self._indices() if layer in wanted]
        if not kept:
            raise SteerError(f"none of layers {layers} is steered, only {shown(self.config.layers)}")
        step = step or {"layers": layers}
        if self.config.kind == "shared" and self.config.rank > len(kept):  # fewer vectors than directions
            vectors = self.by_layer()
            return self._constant({layer: vectors[layer] for layer in kept}, step, self.config.dtype)
        names = expected_names(replace(self.config, layers=join_layers(kept)), self.decoder)
        config = self._derived(step, layers=join_layers(kept))
        return Artifact(config, {name: self.tensors[name] for name in names})

    def with_condition(self, condition: Condition, probe: Any, told: Mapping[str, Any]) -> Artifact:
        """
        The same vectors with a condition, in place of one that they have.

        Args:
            condition: the layer and the threshold.
            probe: (hidden_size,), the direction with which the cosine is computed.
            told: what the provenance says of it, plain JSON.

        Raises:
            SteerError: a layer of the vectors is not above that of the condition; a probe of another size,
                or one without a direction.
        """
        import torch

        probe = torch.as_tensor(probe).detach().cpu().to(getattr(torch, self.config.dtype))
        config = self._derived({"condition": dict(told)}, condition=condition)
        made = Artifact(config, {**self.tensors, probe_name(self.decoder): probe})
        check(made, "the condition")
        return made

    def __mul__(self, factor: float) -> Artifact:
        if isinstance(factor, bool) or not isinstance(factor, (int, float)):
            return NotImplemented
        return Artifact(self._derived({"times": factor}, scale=factor * self.config.scale), self.tensors)

    __rmul__ = __mul__

    def __neg__(self) -> Artifact:
        return -1.0 * self

    def __add__(self, other: Artifact) -> Artifact:
        return self._sum(other, 1.0) if isinstance(other, Artifact) else NotImplemented

    def __sub__(self, other: Artifact) -> Artifact:
        return self._sum(other, -1.0) if isinstance(other, Artifact) else NotImplemented

    def _sum(self, other: Artifact, sign: float) -> Artifact:
        _check_same_base(self.config, other.config)
        left, right = self.by_layer(), {i: sign * v for i, v in other.by_layer().items()}
        total = {**left, **{i: left[i] + v if i in left else v for i, v in right.items()}}
        total = dict(sorted(total.items()))
        step = {"plus" if sign > 0 else "minus": _origin(other.config)}
        made = self._constant(total, step, self.config.dtype, other.config.dtype)
        one, two = self.config.prompt, other.config.prompt
        if one == two:
            return made
        log.warning("warning: the sum has no prompt: its parts were trained with %s and %s", one, two)
        return replace(made, config=replace(made.config, prompt=None))

    def _constant(self, vectors: dict[int, torch.Tensor], step: dict[str, Any], *dtypes: str) -> Artifact:
        dtype = "float64" if "float64" in dtypes else "float32"
        config = self._derived(step, kind="constant", layers=join_layers(vectors), scale=1.0, dtype=dtype)
        return Artifact(config, _constant_tensors(vectors, self.decoder, dtype))

    def _indices(self) -> list[int]:
        return self.config.resolve_layers(self.num_hidden_layers)

    def _derived(self, step: dict[str, Any], **changes: Any) -> SteeringConfig:
        """The config after one step of arithmetic, which its provenance remembers; scores no longer hold."""
        made = without_scores(self.config.provenance or {})
        steps = made.get("derived")
        made["derived"] = [*(steps if isinstance(steps, list) else []), step]
        return replace(self.config, provenance=made, **changes)


def mean(artifacts: Sequence[Artifact]) -> Artifact:
    """The mean of several artifacts of one base model; a layer that one lacks counts as zero there."""
    if not artifacts:
        raise SteerError("mean of no artifacts; give at least one")
    total = artifacts[0]
    for other in artifacts[1:]:
        total = total + other
    return (1.0 / len(artifacts)) * total


def from_vectors(vectors: Mapping[int, torch.Tensor], model: nn.Module, **fields: Any) -> Artifact:
    """
    A constant artifact for `model` (any device, `meta` too) from (hidden_size,) vectors by layer; `fields`
    are those of the config. SteerError for a layer or a hidden size that the model does not have.
    """
    from steer.identity import describe
    from steer.sites import find_decoder

    decoder = find_decoder(model)
    if not vectors:
        raise SteerError("no vectors were given: nothing would be steered")
    config = replace(SteeringConfig(layers=join_layers(sorted(vectors)), **fields), **describe(model))
    config.resolve_layers(decoder.num_hidden_layers)
    made = Artifact(config, _constant_tensors(dict(sorted(vectors.items())), decoder.name, config.dtype))
    check(made, "the vectors given")
    return made


def write(folder: str | os.PathLike[str], artifact: Artifact, name: str = PLACE) -> Path:
    """
    Write `artifact`, atomically per file.

    Args:
        folder: made if missing; an artifact in it is replaced, a card of the user's own stays.
        artifact: what is written.
        name: what the card's code calls the artifact, such as its id on the hub.

    Returns:
        The folder.

    Raises:
        SteerError: when the folder cannot be written, the config is not plain JSON, or the tensors are not
            those of the config or hold NaN or Inf.
    """
    import torch
    from safetensors.torch import save

    check(artifact, str(folder))
    artifact = replace(artifact, config=with_scores(artifact.config, artifact.tensors))
    text = _text(artifact.config, Path(folder))
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in artifact.tensors.items()}
    folder = Path(folder)
    if folder.is_file():
        raise SteerError(f"cannot save vectors to {folder}: it is a file; give a folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        data = {name: bytes(t.reshape(-1).view(torch.uint8).numpy()) for name, t in tensors.items()}
        metadata = {"steering_config": text, "sha256": digest(text, data)}
        whole = with_metadata(save(tensors), metadata)
        files = {folder / TENSOR_FILE: whole, folder / CONFIG_FILE: (text + "\n").encode()}
        page = folder / CARD_FILE
        if not page.exists() or MARK in page.read_text(errors="replace"):
            numbers = sum(tensor.numel() for tensor in tensors.values())
            files[page] = card(artifact.config, artifact.decoder, numbers, len(whole), name).encode()
        replace_files(files)
    except OSError as error:
        raise SteerError(
            f"cannot save vectors to {folder}: {error.strerror}; what was there before is untouched"
        ) from error
    return folder


def read(source: str | os.PathLike[str], revision: str | None = None, token: str | None = None) -> Artifact:
    """
    Read an artifact and check every tensor in it.

    Args:
        source: folder, `.safetensors` file or hub id.
        revision: branch, tag or commit of a hub id.
        token: for private repositories on the hub, by default that of `hf auth login`.

    Returns:
        The artifact, its tensors on the CPU in the config's dtype.

    Raises:
        SteerError: when there is none, or it is damaged, of a newer format or not consistent.
    """
    import torch

    path, config, entries = read_file(source, revision, token)
    tensors = {}
    for name, (dtype, shape, data) in entries.items():
        tensors[name] = torch.frombuffer(bytearray(data), dtype=getattr(torch, dtype)).reshape(shape)
    artifact = Artifact(config, tensors)
    check(artifact, str(path))
    return replace(artifact, config=with_scores(config, tensors))


def read_numpy(source: str | os.PathLike[str]) -> Artifact:
    """The same with float64 numpy arrays for tensors: starts without torch."""
    import numpy as np

    path, config, entries = read_file(source)
    arrays = {}
    for name, (dtype, shape, data) in entries.items():
        if dtype == "bfloat16":  # numpy has none: the upper half of a float32
            flat = (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4")
        else:
            flat = np.frombuffer(data, np.dtype(dtype).newbyteorder("<"))
        with np.errstate(invalid="ignore"):  # a signalling NaN is refused below, like any other
            arrays[name] = flat.reshape(shape).astype(np.float64)
    artifact = Artifact(config, arrays)
    check_arrays(config, arrays, str(path))
    return artifact


def check(artifact: Artifact, where: str) -> None:
    """Raise SteerError unless the tensors are exactly those that the config speaks of, and finite."""
    check_tensors(artifact.config, artifact.tensors, where)


def _wide(values: Any) -> Any:
    """Half precision as float32; the others, and numpy arrays, as they are."""
    return values.float() if str(values.dtype) in ("torch.bfloat16", "torch.float16") else values


def _constant_tensors(vectors: Mapping[int, Any], decoder: str, dtype: str) -> dict[str, Any]:
    import torch

    return {
        f"{decoder}.{i}.steering.vector": torch.as_tensor(v).detach().cpu().to(getattr(torch, dtype))
        for i, v in vectors.items()
    }


def _origin(config: SteeringConfig) -> dict[str, Any]:
    return {"base_model_name_or_path": config.base_model_name_or_path, **(config.provenance or {})}


def _check_same_base(one: SteeringConfig, other: SteeringConfig) -> None:
    for name in ("model_type", "hidden_size", "num_hidden_layers", "base_checksum", "site", "positions"):
        left, right = getattr(one, name), getattr(other, name)
        if name == "base_checksum" and not (left and right):
            continue
        if left != right:
            place = name in ("site", "positions")
            fix = "they steer different places" if place else "move one with `steer transfer` first"
            raise SteerError(
                f"cannot combine vectors of {one.base_model_name_or_path} and "
                f"{other.base_model_name_or_path}: {name} is {left} and {right}; {fix}"
            )


def _text(config: SteeringConfig, path: Path) -> str:
    """The config as JSON that `read` takes back."""
    try:
        text = json.dumps(config.to_dict(), indent=2)
    except (TypeError, ValueError, RecursionError) as error:
        reason = shown(str(error))
        raise SteerError(
            f"cannot save vectors to {path}: their provenance is not plain JSON ({reason})"
        ) from error
    SteeringConfig.from_json(text, path)
    return text
