"""`PromptSpec`: how problems are put to a model. Artifacts save it; all that asks a model reads it."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from steer.errors import SteerError, shown


@dataclass(frozen=True)
class PromptSpec:
    """
    How problems are put to a model: all that decides the text of a prompt but the problem and the tokenizer.

    Args:
        template: name of a prompt template, a key of `steer.tasks.prompts.TEMPLATES`.
        prefix: forced opening of the model's own turn, such as "To" or "Step".
        system: a constant system text, before the template's own where it has one.
        chat_template_kwargs: variables of the tokenizer's chat template: `{"enable_thinking": False}`.
        examples: worked examples before the problem, each a problem and its answer as the model should write
            it (`steer.tasks.elicited.choose`): turns of a chat, text in a template that is none.

    Raises:
        SteerError: a field of another type.
    """

    template: str = "boxed"
    prefix: str = ""
    system: str = ""
    chat_template_kwargs: Mapping[str, Any] | None = None
    examples: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        for name in ("template", "prefix", "system"):
            if not isinstance(getattr(self, name), str):
                raise SteerError(f"prompt: {name}={shown(getattr(self, name))} is not text")
        variables: Any = self.chat_template_kwargs
        if variables is not None and not (
            isinstance(variables, Mapping) and all(isinstance(name, str) for name in variables)
        ):
            raise SteerError(
                f"prompt: chat_template_kwargs={shown(variables)} is not a mapping from names to values"
            )
        pairs: Any = self.examples
        if not isinstance(pairs, (list, tuple)) or not all(map(_is_example, pairs)):
            raise SteerError(
                f"prompt: examples={shown(pairs)} is not a list of pairs of texts, a problem and its answer"
            )
        # one form of what is equal
        object.__setattr__(self, "chat_template_kwargs", dict(variables) if variables else None)
        object.__setattr__(self, "examples", tuple((problem, answer) for problem, answer in pairs))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, in field order."""
        return {
            "template": self.template,
            "prefix": self.prefix,
            "system": self.system,
            "chat_template_kwargs": copy.deepcopy(self.chat_template_kwargs),
            "examples": [list(pair) for pair in self.examples],
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PromptSpec:
        """
        The inverse of `to_dict`; a field that is left out is at its default.

        Raises:
            SteerError: `values` is not a mapping, or has an unknown field (the nearest known one is named)
                or of another type.
        """
        if not isinstance(values, Mapping):
            raise SteerError(f"prompt is {shown(values)}, expected an object such as {{'template': 'boxed'}}")
        known = [f.name for f in fields(cls)]
        for name in values:
            if name not in known:
                near = difflib.get_close_matches(str(name), known, 1, 0.5)
                meant = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"
                raise SteerError(f"prompt has no field {shown(name)}; {meant}")
        return cls(**values)

    def __str__(self) -> str:
        """For people: `template boxed, prefix 'To', 2 examples`."""
        parts = [f"template {self.template}"]
        parts += [f"prefix {self.prefix!r}"] if self.prefix else []
        parts += [f"system text {shown(self.system)}"] if self.system else []
        variables = self.chat_template_kwargs
        parts += [f"chat_template_kwargs {shown(variables)}"] if variables else []
        count = len(self.examples)
        parts += [f"{count} worked example{'s' * (count > 1)}"] if count else []
        return ", ".join(parts)


def _is_example(pair: Any) -> bool:
    return isinstance(pair, (list, tuple)) and len(pair) == 2 and all(isinstance(text, str) for text in pair)


def recorded(provenance: Mapping[str, Any] | None, part: str) -> Mapping[str, Any]:
    """One part of an artifact's provenance, such as "run"; empty where it has none."""
    values = (provenance or {}).get(part)
    return values if isinstance(values, dict) else {}


def prompt_in_provenance(provenance: Mapping[str, Any] | None) -> PromptSpec | None:
    """
    The prompt that artifacts of format 1 name in their provenance; None where they name none.

    Raises:
        SteerError: what the provenance says describes no prompt, being altered or of another program.
    """
    run, training = (recorded(provenance, part) for part in ("run", "training"))
    fields_set = {
        **{name: run[name] for name in ("template", "prefix") if run.get(name)},
        **{name: training[name] for name in ("chat_template_kwargs",) if training.get(name)},
    }
    try:
        return PromptSpec.from_dict(fields_set) if fields_set else None
    except SteerError as error:
        raise SteerError(
            f"the artifact's provenance describes no prompt ({error}); correct its steering_config.json, or "
            "remove that entry"
        ) from error
