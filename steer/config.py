"""
`SteeringConfig`: which vectors, where, for which model, and how they were asked (`steer.prompt.PromptSpec`).
Its dump is in the artifact.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from steer.errors import SteerError, shown
from steer.files import json_object
from steer.prompt import PromptSpec, prompt_in_provenance

FORMAT_VERSION = 2
# Fields that format 1 does not have.
_NEW = ("prompt", "base_adapter", "condition")
# What format 1 calls these fields.
_FORMAT_1 = {"hidden_size": "width", "num_hidden_layers": "depth", "base_model_name_or_path": "base_model"}

SITES = {
    "resid_post": "the residual stream after the layer",
    "resid_mid": "the residual stream between attention and MLP",
    "attn_out": "the output of the attention module",
    "mlp_out": "the output of the MLP module",
    "resid_pre": "the residual stream before the layer (layer 0: the embeddings)",
}

POSITIONS = {
    "all": "every token",
    "prompt": "the tokens of the prompt",
    "last_prompt": "the last token of the prompt, whose output is the first generated token",
    "completion": "the generated tokens",
    "first_completion": "the first generated token",
}

KINDS = {
    "constant": "one vector per layer, the same at every token",
    "adaptive": "one vector per layer times a learned linear read-out of the token: rank one on the MLP's "
    "down-projection",
    "shared": "every layer's vector is its own mix of `rank` directions that all layers share",
}

DTYPES = ("float32", "float64", "bfloat16", "float16")
# More layers than any model has; a config that claims them is damaged.
MAX_LAYERS = 1000

_RANGE = re.compile(r"(-?\d{1,9})(?:-(-?\d{1,9}))?", re.ASCII)


@dataclass
class SteeringArguments:
    """What a user chooses of a set of vectors; the field docs are the help of the command line."""

    _argument_group_name = "steering vectors"

    kind: str = field(
        default="constant",
        metadata={"help": "; ".join(f"{k} = {v}" for k, v in KINDS.items()) + "."},
    )
    rank: int = field(default=4, metadata={"help": "Number of shared directions, for kind=shared."})
    layers: str = field(
        default="all",
        metadata={
            "help": "Layers that get a vector: 'all', 'last', an index (negative ones count from the "
            "end), an inclusive "
            "range such as '4-20', or a comma-separated mix of those. Python callers may pass an int "
            "or a list of ints."
        },
    )
    site: str = field(
        default="resid_post",
        metadata={"help": "Where in the layer: " + "; ".join(f"{k} = {v}" for k, v in SITES.items()) + "."},
    )
    positions: str = field(
        default="all",
        metadata={
            "help": "Which tokens are steered, named by the token at the position: "
            + "; ".join(f"{k} = {v}" for k, v in POSITIONS.items())
            + "."
        },
    )
    scale: float = field(
        default=1.0,
        metadata={"help": "Factor on every vector: 0.5 is weaker, 2 stronger, -1 the opposite direction."},
    )
    dtype: str = field(
        default="float32",
        metadata={
            "help": f"Precision of the vectors, whatever the base model has; one of {', '.join(DTYPES)}."
        },
    )

    def __post_init__(self) -> None:
        self.layers = _canonical(self.layers)
        for name, value, known in (
            ("kind", self.kind, KINDS),
            ("site", self.site, SITES),
            ("positions", self.positions, POSITIONS),
            ("dtype", self.dtype, DTYPES),
        ):
            if not isinstance(value, str) or value not in known:
                raise SteerError(f"{name}={shown(value)} is unknown; choose one of {', '.join(known)}")
        if (
            isinstance(self.scale, bool)
            or not isinstance(self.scale, (int, float))
            or not abs(self.scale) <= sys.float_info.max  # whole numbers may be larger than any float
        ):
            raise SteerError(f"scale={shown(self.scale)} is not a finite number; give one such as 1.0")
        self.scale = float(self.scale)
        _check_count("rank", self.rank, None)
        if self.kind == "adaptive" and self.site != "resid_post":
            raise SteerError(
                "kind='adaptive' is added at the MLP's down-projection and takes no site, got "
                f"{self.site!r}; leave site at its default"
            )


@dataclass(frozen=True)
class Condition:
    """
    When a set of vectors acts, decided for each prompt once, at its last token: where the cosine of the
    residual stream after a layer with a probe is above a threshold ("Programming Refusal with Conditional
    Activation Steering", arXiv 2409.05907).

    Args:
        layer: the layer, from 0, below all layers that have vectors.
        threshold: of the cosine, from -1 to 1.
    """

    layer: int
    threshold: float

    def __post_init__(self) -> None:
        layer: Any = self.layer
        if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < MAX_LAYERS:
            raise SteerError(f"condition: layer={shown(layer)} is not the index of a layer, from 0")
        threshold: Any = self.threshold
        number = isinstance(threshold, (int, float)) and not isinstance(threshold, bool)
        if not number or not -1 <= threshold <= 1:
            raise SteerError(f"condition: threshold={shown(threshold)} is not a cosine, from -1 to 1")
        object.__setattr__(self, "threshold", float(threshold))

    @classmethod
    def from_dict(cls, values: Any) -> Condition:
        """From the JSON of a config; SteerError for anything else."""
        if not isinstance(values, dict) or set(values) != {"layer", "threshold"}:
            raise SteerError(
                f"condition={shown(values)} is not an object with the fields layer and threshold"
            )
        return cls(**values)


@dataclass
class SteeringConfig(SteeringArguments):
    """
    One vector per layer, added to the residual stream of a frozen model: h <- h + scale * s_l
    ("Small Vectors, Big Effects", arXiv 2509.06608, section 2).
    """

    base_model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Id of the base model. Filled in from the model when vectors are attached."},
    )
    base_revision: str | None = field(
        default=None, metadata={"help": "Revision of the base model, where known."}
    )
    base_adapter: str | None = field(
        default=None, metadata={"help": "Folder of the adapter that is merged into the base. Filled in."}
    )
    model_type: str | None = field(default=None, metadata={"help": "Architecture of the base. Filled in."})
    hidden_size: int | None = field(
        default=None, metadata={"help": "Width of the residual stream. Filled in."}
    )
    num_hidden_layers: int | None = field(
        default=None, metadata={"help": "Number of decoder layers of the base. Filled in."}
    )
    base_checksum: str | None = field(
        default=None, metadata={"help": "Tells the base's weights from others of its shape. Filled in."}
    )
    tokenizer_checksum: str | None = field(
        default=None, metadata={"help": "Tells the base's vocabulary from others. Filled in."}
    )
    format_version: int = field(default=FORMAT_VERSION, metadata={"help": "Version of the artifact format."})
    provenance: dict[str, Any] | None = field(
        default=None, metadata={"help": "How the vectors were made: recipe, data, reward, settings, scores."}
    )
    prompt: PromptSpec | None = field(
        default=None, metadata={"help": "How the vectors were asked in training; None where nobody knows."}
    )
    condition: Condition | None = field(
        default=None, metadata={"help": "When the vectors act; None for every prompt."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, limit in (("hidden_size", None), ("num_hidden_layers", MAX_LAYERS)):
            _check_count(name, getattr(self, name), limit)
        for name in (
            "base_model_name_or_path",
            "base_revision",
            "base_adapter",
            "model_type",
            "base_checksum",
            "tokenizer_checksum",
        ):
            text = getattr(self, name)
            if text is not None and not (isinstance(text, str) and text.isprintable()):
                raise SteerError(f"{name}={shown(text)} is not a line of text")
        if not isinstance(self.provenance, (dict, type(None))):
            raise SteerError(f"provenance is a {type(self.provenance).__name__}, expected an object")
        if not isinstance(self.prompt, (PromptSpec, type(None))):
            raise SteerError(f"prompt is a {type(self.prompt).__name__}, expected a PromptSpec")
        if not isinstance(self.condition, (Condition, type(None))):
            raise SteerError(f"condition is a {type(self.condition).__name__}, expected a Condition")
        if self.condition is not None and self.num_hidden_layers is not None:
            first = self.resolve_layers(self.num_hidden_layers)[0]
            if self.condition.layer >= first:
                raise SteerError(
                    f"the condition is read after layer {self.condition.layer}, and layer {first} has a "
                    "vector: read it below all layers that have one, or steer later layers"
                )
        _check_version(self.format_version)
        if self.format_version < FORMAT_VERSION:
            raise SteerError(
                f"format_version={self.format_version}: a config in memory is of format {FORMAT_VERSION}; "
                "SteeringConfig.from_dict reads older ones"
            )

    def refuse_condition(self, what: str) -> None:
        """SteerError where the vectors have a condition; `what` cannot be done with one."""
        if self.condition is not None:
            raise SteerError(
                f"{what}: these vectors have a condition (a cosine above {self.condition.threshold:.3g} at "
                f"layer {self.condition.layer}), which only transformers computes: use steer.load, steer "
                "generate or steer eval with --engine hf"
            )

    def resolve_layers(self, num_hidden_layers: int) -> list[int]:
        """
        Layer indices in ascending order, each from 0 to num_hidden_layers - 1. SteerError for a layer the
        model does not have.
        """
        chosen: set[int] = set()
        for part in self.layers.split(","):
            if part == "all":
                chosen.update(range(num_hidden_layers))
            elif part == "last":
                chosen.add(num_hidden_layers - 1)
            else:
                match = _RANGE.fullmatch(part)
                assert match, part  # __post_init__ checked the form
                first, last = (_index(int(x), num_hidden_layers) for x in (match[1], match[2] or match[1]))
                if first > last:
                    raise SteerError(f"layers={part!r} runs backwards; write the smaller layer first")
                chosen.update(range(first, last + 1))
        return sorted(chosen)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, in field order. `condition` only where there is one: older readers refuse it."""
        made = {**asdict(self), "prompt": self.prompt and self.prompt.to_dict()}
        return {name: value for name, value in made.items() if name != "condition" or value is not None}

    @classmethod
    def from_json(cls, text: str | bytes, where: str | os.PathLike[str]) -> SteeringConfig:
        """The config in a file at `where`; SteerError for anything that is not one."""
        values = json_object(text, f"{where}: the steering config")
        try:
            return cls.from_dict(values)
        except TypeError as error:
            raise SteerError(f"{where}: the config has a field of the wrong type ({error})") from error

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SteeringConfig:
        """
        The config in `values`: the inverse of `to_dict`, which also reads what format 1 wrote.

        Args:
            values: field names and JSON values. `format_version` says which format's names they are, by
                default the present one.

        Returns:
            The config, in the present format.

        Raises:
            SteerError: for a newer format version, a field that the format does not have, and a value that
                is not allowed.
        """
        version = values.get("format_version", FORMAT_VERSION)
        _check_version(version)  # first: it explains unknown fields
        known = {f.name: f.name for f in fields(cls)}  # by the name in the file
        if version == 1:
            known = {_FORMAT_1.get(name, name): name for name in known if name not in _NEW}
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise SteerError(
                f"steering config has unknown fields {shown(', '.join(unknown))}; was it written by steer?"
            )
        made = {known[name]: value for name, value in values.items()} | {"format_version": FORMAT_VERSION}
        if version == 1:  # it named the prompt in the provenance alone
            made["prompt"] = prompt_in_provenance(made.get("provenance"))
        elif made.get("prompt") is not None:
            made["prompt"] = PromptSpec.from_dict(made["prompt"])
        if made.get("condition") is not None:
            made["condition"] = Condition.from_dict(made["condition"])
        return cls(**made)


def _check_version(version: Any) -> None:
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise SteerError(
            f"format_version={shown(version)} is not a version number, expected {FORMAT_VERSION}"
        )
    if version > FORMAT_VERSION:
        raise SteerError(
            f"artifact format {shown(version)} is newer than this steer reads ({FORMAT_VERSION}); "
            "upgrade steer"
        )


def _check_count(name: str, value: Any, limit: int | None) -> None:
    if value is None and name != "rank":
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < 1 or (limit and value > limit):
        raise SteerError(
            f"{name}={shown(value)} is not a whole number from 1" + (f" to {limit}" if limit else "")
        )


def _canonical(layers: Any) -> str:
    """
    'all', 3, [0, 1, 5] or '4-20' as one comma-separated string; raises SteerError on an empty or unreadable
    set.
    """
    items = layers if isinstance(layers, Sequence) and not isinstance(layers, str) else [layers]
    if not items:
        raise SteerError(
            "layers is empty: no layer would be steered; use 'all', 'last', an index or a range '4-20'"
        )
    parts = [part.strip() for item in items for part in str(item).split(",")]
    known = all(part in ("all", "last") or _RANGE.fullmatch(part) for part in parts)
    if not known or len(parts) > MAX_LAYERS:
        raise SteerError(
            f"layers={shown(layers)} is not a layer set; use 'all', 'last', an index, a range '4-20' or "
            "a comma list"
        )
    return ",".join(parts)


def _index(layer: int, num_hidden_layers: int) -> int:
    if not -num_hidden_layers <= layer < num_hidden_layers:
        raise SteerError(
            f"layer {layer} does not exist: the model has layers 0 to {num_hidden_layers - 1} "
            f"(or -{num_hidden_layers} to -1)"
        )
    return layer % num_hidden_layers


def join_layers(layers: Iterable[int]) -> str:
    """Ascending layers as `SteeringConfig.layers` writes them: 0, 1, 2, 7 is `0-2,7`."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ",".join(f"{a}-{b}" if b > a else str(a) for a, b in runs)
