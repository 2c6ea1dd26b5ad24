"""
`--init`: an artifact that training starts from. A run keeps a copy of it in its folder, so that going on
needs it no more.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from steer import artifact
from steer.artifact import Artifact
from steer.artifact_file import digest
from steer.artifact_tensors import renamed
from steer.errors import SteerError, shown
from steer.files import read_json
from steer.identity import check_fits
from steer.sites import find_decoder
from steer.vectors import SteeringVectors

log = logging.getLogger("steer")

# The copy, in the folder of a run.
FOLDER = "init"


def remembered(init: str | None, output_dir: str | None, run_file: str) -> str | None:
    """`init`; where none is given, that of the run in `output_dir`, if there is one that had it."""
    path = Path(output_dir or "") / run_file
    try:
        if init is not None or not (path.parent / FOLDER).is_dir() or not path.is_file():
            return init
    except OSError as error:
        raise SteerError(f"cannot write to {shown(output_dir)}: {error.strerror}") from error
    known = read_json(path).get("run", {}).get("init")
    if known:
        log.info("init=%s, as this run began", known)
    return known


def read(init: str, output_dir: str | None) -> Artifact:
    """The artifact `init`, or the run's copy of it where it is no longer there."""
    copy = Path(output_dir or "") / FOLDER
    try:
        return artifact.read(init)
    except OSError as error:
        raise SteerError(f"cannot read --init {shown(init)}: {error.strerror}") from error
    except SteerError:
        if not copy.is_dir():
            raise
        return artifact.read(copy)


def keep(init: str, output_dir: str | None) -> None:
    """Copy the artifact into the folder of the run, once."""
    copy = Path(output_dir or "") / FOLDER
    if not copy.is_dir():
        artifact.write(copy, artifact.read(init))


def checksum(saved: Artifact) -> str:
    """16 hex digits of the config and the numbers."""
    numbers = {name: tensor.double().numpy().tobytes() for name, tensor in saved.tensors.items()}
    return digest(json.dumps(saved.config.to_dict()), numbers)[:16]


def describe(saved: Artifact) -> dict[str, Any]:
    """What the provenance of the trained vectors says of those that they started from."""
    made = saved.config.provenance or {}
    recipe = {"recipe": made["recipe"]} if "recipe" in made else {}
    extracted = made.get("extract")
    return {"checksum": checksum(saved), **recipe, **(extracted if isinstance(extracted, dict) else {})}


def start(vectors: SteeringVectors, saved: Artifact, name: str, tokenizer: Any = None) -> None:
    """
    Give vectors that are attached the values of an artifact, its scale folded in.

    Args:
        vectors: those of the run.
        saved: the artifact. Layers of it that are not trained are left out, which is logged.
        name: of the artifact, for messages.
        tokenizer: of the model.

    Raises:
        SteerError: the artifact is for a model of another shape, of another kind, site, rank or positions, or
            has no vector in a layer that is trained. Another base of the same shape gets a warning, as in
            `steer.load`.
    """
    model, config, own = vectors.model, vectors.config, saved.config
    own.refuse_condition(f"training from init={name}")
    check_fits(own, model, f"init={name}", tokenizer)
    for field in ("kind", "site", "positions", *(("rank",) if config.kind == "shared" else ())):
        have, wanted = getattr(own, field), getattr(config, field)
        if have != wanted:
            raise SteerError(
                f"init={name} has {field}={have}, this run trains {field}={wanted}; set {field}={have}"
            )
    layers = own.resolve_layers(vectors.num_hidden_layers)
    if lacking := [layer for layer in vectors.layers if layer not in layers]:
        raise SteerError(
            f"init={name} has vectors in layers {own.layers}, and none in layer {lacking[0]}, which this run "
            f"trains; set layers={own.layers}, or layers among them"
        )
    if not config.scale:
        raise SteerError(f"scale=0 adds nothing, and init={name} would play no part; set another scale")
    if rest := [layer for layer in layers if layer not in vectors.layers]:
        log.info("init=%s: its vectors in layers %s are left out", name, ", ".join(map(str, rest)))
    factor = own.scale / config.scale
    scaled = (".vector", ".mix")  # what a read-out or shared directions multiply
    tensors = renamed(saved.tensors, find_decoder(model).name)
    vectors.set_tensors(
        {
            part: tensors[part] * (factor if part.endswith(scaled) else 1.0)
            for part in vectors.named_parameters()
        }
    )
