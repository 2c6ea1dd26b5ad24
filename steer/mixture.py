"""
Several sets of vectors at once, their sum: what `steer.expression` names, from artifacts, and in a model.

    artifacts = {"math": steer.read("runs/math"), "brief": steer.read("runs/brief")}
    with mixed(model, chosen(parse("math@0.7+brief@-0.3"), artifacts)):
        model.generate(...)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from steer.artifact import Artifact
from steer.artifact_tensors import renamed
from steer.errors import SteerError
from steer.expression import Term
from steer.hooks import hook
from steer.probe import verify
from steer.prompt_watch import PromptWatch
from steer.sites import find_decoder
from steer.vectors import SteeringVectors, build, check_fits

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


LARGEST = torch.finfo(torch.float32).max


def chosen(terms: Sequence[Term], artifacts: Mapping[str, Artifact]) -> dict[str, Artifact]:
    """
    What each term adds, by the name of its set, in the order of the names. Sets of scale 0 are left out.

    Args:
        terms: of an expression.
        artifacts: the sets that it can name.

    Raises:
        SteerError: a name that is none of them; a layer that the model does not have; layers of which the set
            steers none.
    """
    found = {}
    for term in terms:
        if term.name not in artifacts:
            raise SteerError(f"no vectors named {term.name!r}; there are {', '.join(artifacts) or 'none'}")
        artifact = artifacts[term.name]
        try:
            if term.layers is not None:
                artifact = artifact.select(term.layers)
            scaled = replace(artifact.config, scale=term.scale * artifact.config.scale)
            if max(abs(term.scale), abs(scaled.scale)) > LARGEST:
                raise SteerError(
                    f"scale={term.scale:g} is too large for float32; give less than {LARGEST:.2g}"
                )
        except SteerError as error:
            raise SteerError(f"steering of {term.name!r}: {error}") from error
        if term.positions is not None:
            scaled = replace(scaled, positions=term.positions)
        if scaled.scale:
            found[term.name] = replace(artifact, config=scaled)
    return dict(sorted(found.items()))


@contextmanager
def mixed(
    model: nn.Module, artifacts: Mapping[str, Artifact], tokenizer: PreTrainedTokenizerBase | None = None
) -> Iterator[dict[str, SteeringVectors]]:
    """
    Inside, the sum of the artifacts steers `model`, every artifact at its own site, layers and positions.
    Outside it is the base model, as it is inside without artifacts. Gives the vectors of each by its name,
    for the `prompt_length` of passes that are not those of `generate()`.

    Args:
        model: a decoder-only causal LM without vectors.
        artifacts: by the names that messages call them.
        tokenizer: to compare its vocabulary with that of the artifacts.

    Raises:
        SteerError: an artifact is for a model of another shape, or the model has vectors already.
    """
    if "steering_vectors" in model.__dict__:
        raise SteerError("the model already has steering vectors; call steer.detach(model) first")
    decoder = find_decoder(model)
    made = {}
    for name, saved in artifacts.items():
        check_fits(saved, model, name, tokenizer)
        vectors, places = build(model, saved.config)
        verify(decoder, vectors.layers, saved.config.kind, saved.config.site, places)
        vectors.set_tensors(renamed(saved.tensors, decoder.name))
        for parameter in vectors.parameters():
            parameter.requires_grad_(False)
        made[name] = (vectors, places)
    with ExitStack() as stack:
        for vectors, places in made.values():
            for module, place in zip(vectors._modules.values(), places, strict=True):
                stack.callback(hook(module, place).remove)
            if vectors.reads_prompt:
                stack.callback(PromptWatch(model, vectors._state, vectors._asked).remove)
        yield {name: vectors for name, (vectors, _) in made.items()}
