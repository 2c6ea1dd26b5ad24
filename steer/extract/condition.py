"""
Conditions: prompts that a set of vectors is for, and prompts that it is not for, told apart by a probe
("Programming Refusal with Conditional Activation Steering", arXiv 2409.05907).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from steer.artifact import Artifact
from steer.config import Condition, SteeringConfig
from steer.errors import SteerError, shown
from steer.extract.activations import read_activations
from steer.extract.rows import Row
from steer.files import json_lines
from steer.sites import find_decoder
from steer.stats import wilson
from steer.tasks.prompts import prompt_ids

SIDES = ("positive", "negative")
# Prompts of each side that a probe is fitted on, at least.
LEAST = 2


@dataclass(frozen=True)
class Rate:
    """How often: `hits` of `count`, with Wilson's 95% interval."""

    hits: int
    count: int

    def __str__(self) -> str:
        low, high = wilson(self.hits, self.count)
        return f"{self.hits}/{self.count} = {self.hits / self.count:.3f} [{low:.3f}, {high:.3f}]"


@dataclass(frozen=True)
class Fit:
    """
    A condition that was fitted.

    Args:
        condition: the layer and the threshold.
        probe: (hidden_size,), of length 1.
        f1: of the prompts that it was fitted on.
        wrong: negative prompts that were held out and on which it acts.
        missed: positive prompts that were held out and on which it does not.
    """

    condition: Condition
    probe: Tensor
    f1: float
    wrong: Rate
    missed: Rate

    def told(self) -> dict[str, Any]:
        """For the provenance."""
        rates = {"wrong activations": asdict(self.wrong), "missed activations": asdict(self.missed)}
        return {"f1 of the prompts fitted on": self.f1, "held out": rates}


def read_prompts(path: str | os.PathLike[str]) -> dict[str, list[str]]:
    """
    The prompts in a file of JSON lines, each with `positive`, `negative` or both: texts.

    Raises:
        SteerError: names the line that is something else.
    """
    sides: dict[str, list[str]] = {side: [] for side in SIDES}
    for number, line in enumerate(json_lines(Path(path)), 1):
        if line is None:
            continue
        where = f"{path}, line {number}"
        unknown = sorted(set(line) - set(SIDES)) if isinstance(line, dict) else [shown(line)]
        if unknown or not line:
            what = f"unknown {unknown[0]}" if unknown else "no prompt"
            raise SteerError(f"{where}: {what}; expected {{'positive': a prompt}} or 'negative', or both")
        for side, text in line.items():
            if not isinstance(text, str) or not text.strip():
                raise SteerError(f"{where}: {side}={shown(text)} is not the text of a prompt")
            if text in sides[side]:
                raise SteerError(
                    f"{where}: {side}={shown(text)} is in the file twice, so it could be fitted on and held "
                    "out: give each prompt once"
                )
            sides[side].append(text)
    return sides


def fit_condition(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    artifact: Artifact,
    prompts: dict[str, list[str]],
    format_problem: Callable[[str], str],
    *,
    layers: str = "all",
    held_out: float = 0.3,
    seed: int = 0,
    batch_size: int = 16,
    label: str | None = None,
) -> Fit:
    """
    Find the probe, the layer and the threshold that tell the prompts apart.

    The probe of a layer is the mean of the positive prompts' states at their last token minus that of the
    negative ones. The threshold has the best F1 on these prompts, in the middle of the widest gap between
    cosines that has it. Of several layers the one with the best F1 is taken, and of equal ones that with the
    widest such gap. The prompts held out take no part in it.

    Args:
        model: the base model; vectors that are attached to it are off meanwhile.
        tokenizer: of the model.
        artifact: the vectors that get the condition: it is read below their first layer.
        prompts: of `read_prompts`.
        format_problem: how a text is put to the model.
        layers: to choose from, as in `SteeringConfig.layers`; those below the vectors count.
        held_out: share of the prompts of each side that is held out, at least one.
        seed: of the choice which.
        batch_size: prompts in a forward pass.
        label: of the progress bar; None for none.

    Raises:
        SteerError: too few prompts; no such layer below the vectors; sides that do not differ.
    """
    if not 0 < held_out < 1:
        raise SteerError(f"held_out={held_out!r} is not a share between 0 and 1")
    first = artifact.config.resolve_layers(artifact.num_hidden_layers)[0]
    asked = SteeringConfig(layers=layers).resolve_layers(find_decoder(model).num_hidden_layers)
    below = [layer for layer in asked if layer < first]
    if not below:
        raise SteerError(
            f"a condition is read below all layers that have a vector, the first of which is {first}, and "
            f"layers={layers} has none there; give lower layers, or vectors of later layers"
        )
    states, fitted = {}, {}
    generator = torch.Generator().manual_seed(seed)
    for side in SIDES:
        texts = prompts[side]
        out = max(1, round(held_out * len(texts)))
        if len(texts) - out < LEAST:
            raise SteerError(
                f"there are {len(texts)} {side} prompts, of which {out} are held out: give at least "
                f"{LEAST} to fit on, and one to hold out"
            )
        ids = prompt_ids(tokenizer, [format_problem(text) for text in texts])
        rows = [Row(tuple(row), len(row)) for row in ids]
        name = label and f"{label}, {side}"
        read = read_activations(model, rows, below, "resid_post", "last", batch_size, True, name)
        order = torch.randperm(len(texts), generator=generator)
        assert read.texts is not None
        states[side], fitted[side] = read.texts[order].double(), len(texts) - out
    best: tuple[float, float] | None = None
    for place, layer in enumerate(below):
        here = {side: states[side][:, place] for side in SIDES}
        known = [here[side][: fitted[side]] for side in SIDES]
        probe = known[0].mean(0) - known[1].mean(0)
        if not probe.norm() > 1e-6 * known[0].norm(dim=1).mean():  # rounding
            continue
        probe = probe / probe.norm()
        cosines = [torch.cosine_similarity(part, probe[None], dim=1) for part in known]
        threshold, f1, gap = best_threshold(*(part.tolist() for part in cosines))
        if best is None or (f1, gap) > best:
            best = f1, gap
            chosen = layer, threshold, probe, f1, here
    if best is None:
        raise SteerError("the positive and negative prompts have the same states; give prompts that differ")
    layer, threshold, probe, f1, here = chosen
    out_cosines = [torch.cosine_similarity(here[s][fitted[s] :], probe[None], dim=1) for s in SIDES]
    positive, negative = (part > threshold for part in out_cosines)
    wrong = Rate(int(negative.sum()), len(negative))
    missed = Rate(int((~positive).sum()), len(positive))
    return Fit(Condition(layer, threshold), probe.float(), f1, wrong, missed)


def best_threshold(positive: Sequence[float], negative: Sequence[float]) -> tuple[float, float, float]:
    """
    The threshold above which positive values have the best F1: between two values, in the widest gap of those
    with that F1. Returns it with the F1 and the gap's width.
    """
    values = sorted({*positive, *negative})
    below = (values[0] - 1.0, values[0])  # everything is above
    best = (-1.0, -1.0, 0.0)
    for low, high in [below, *pairwise(values)]:
        hits = sum(value >= high for value in positive)
        false = sum(value >= high for value in negative)
        f1 = 2 * hits / (len(positive) + hits + false)
        width = 0.0 if (low, high) == below else high - low
        best = max(best, (f1, width, (low + high) / 2))
    f1, width, threshold = best
    return max(-1.0, min(1.0, threshold)), f1, width
