"""
Features of what steering changes: a DiffSAE's features compared between right and wrong completions, their
effect on the logits, and the model with one of them added or taken away.

A completion is the unit of every test, not a token: tokens of one completion are not independent.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import erfc, sqrt
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from steer.errors import SteerError
from steer.sae.activations import Reader, Window, read_all
from steer.sae.model import SAE
from steer.sites import find_decoder, find_sites

Z = 1.959964  # of a 95 % interval


@dataclass(frozen=True)
class Completion:
    """Token ids of a prompt and what was written after it, and whether that was right."""

    prompt: list[int]
    ids: list[int]
    correct: bool

    def window(self) -> Window:
        """All of its tokens, the written ones kept."""
        return Window([*self.prompt, *self.ids], [False] * len(self.prompt) + [True] * len(self.ids))


@dataclass(frozen=True)
class Snippet:
    """A completion's tokens with the strength of one feature at each; `correct` is the completion's."""

    tokens: list[str]
    strengths: list[float]
    correct: bool


@dataclass(frozen=True)
class Feature:
    """
    One feature. `right` and `wrong` are the shares of the right and wrong completions in which it fires,
    `low` and `high` the 95 % interval of their difference, `p` and `q` the test's p-value and the same
    corrected for the number of features tested. `mean` is its mean strength over all written tokens.
    """

    index: int
    right: float
    wrong: float
    low: float
    high: float
    p: float
    q: float
    mean: float
    strongest: float
    promotes: list[str]
    suppresses: list[str]
    snippets: list[Snippet]

    @property
    def difference(self) -> float:
        return self.right - self.wrong


@torch.no_grad()
def analyse(
    sae: SAE,
    reader: Reader,
    tokenizer: PreTrainedTokenizerBase,
    completions: Sequence[Completion],
    snippets: int = 5,
    words: int = 8,
    least: int = 5,
) -> list[Feature]:
    """
    Every feature that fires in at least `least` completions, the most different between right and wrong
    first.

    reader: of the activations that the SAE was trained on. Raises SteerError unless there are right and wrong
    completions, with tokens.
    """
    completions = [c for c in completions if c.ids]
    correct = torch.tensor([c.correct for c in completions], dtype=torch.bool)
    if not correct.any() or correct.all():
        raise SteerError(
            f"{int(correct.sum())} of {len(completions)} completions are right; a comparison needs right and "
            "wrong ones: sample more, at temperature 1, or choose other problems"
        )
    lengths = [len(c.ids) for c in completions]
    rows = read_all(reader, [c.window() for c in completions]).to(sae.device, sae.dtype)
    parts = rows.split(4096)
    active = [sae.active(part) for part in parts]
    owner = torch.arange(len(completions)).repeat_interleave(torch.tensor(lengths)).to(sae.device)
    fires = torch.zeros(len(completions), sae.cfg.d_sae, dtype=torch.bool, device=sae.device)
    total = torch.zeros(sae.cfg.d_sae, dtype=torch.float64, device=sae.device)
    peak = torch.zeros(len(completions), sae.cfg.d_sae, device=sae.device)
    for found, owners in zip(active, owner.split(4096), strict=True):
        on = found.values > 0
        place = owners[:, None].expand_as(found.indices)[on], found.indices[on]
        fires[place] = True
        values = found.values[on].float()
        total.index_add_(0, place[1], values.double())
        flat = place[0] * sae.cfg.d_sae + place[1]
        peak.view(-1).scatter_reduce_(0, flat, values, "amax")
    fires, peak, mean = fires.cpu(), peak.cpu(), (total / len(rows)).cpu()
    counts = fires[correct].sum(0), fires[~correct].sum(0)
    tested = ((counts[0] + counts[1]) >= least).nonzero().squeeze(1).tolist()
    sizes = int(correct.sum()), int((~correct).sum())
    tests = {f: compare(int(counts[0][f]), sizes[0], int(counts[1][f]), sizes[1]) for f in tested}
    corrected = dict(zip(tested, benjamini_hochberg([tests[f][2] for f in tested]), strict=True))
    up, down = logit_effects(sae, reader.model, tokenizer, tested, words)
    starts = torch.tensor([0, *lengths]).cumsum(0).tolist()
    features = []
    for place_in_list, f in enumerate(tested):
        low, high, p = tests[f]
        shown = [int(c) for c in peak[:, f].topk(min(snippets, len(completions))).indices if peak[c, f] > 0]
        features.append(
            Feature(
                f,
                int(counts[0][f]) / sizes[0],
                int(counts[1][f]) / sizes[1],
                low,
                high,
                p,
                corrected[f],
                mean[f].item(),
                peak[:, f].max().item(),
                up[place_in_list],
                down[place_in_list],
                [
                    Snippet(
                        [tokenizer.decode([token]) for token in completions[c].ids],
                        _strengths(sae, rows[starts[c] : starts[c + 1]], f),
                        completions[c].correct,
                    )
                    for c in shown
                ],
            )
        )
    return sorted(features, key=lambda feature: (feature.p, -abs(feature.difference)))


def _strengths(sae: SAE, rows: Tensor, feature: int) -> list[float]:
    found = sae.active(rows)
    return (found.values * (found.indices == feature)).sum(1).tolist()


def compare(hits: int, count: int, other_hits: int, other_count: int) -> tuple[float, float, float]:
    """
    The 95 % interval of the difference of two shares (Newcombe 1998, method 10, from Wilson's intervals), and
    the two-sided p-value of the pooled z-test that they are equal.
    """
    a, b = hits / count, other_hits / other_count
    (a_low, a_high), (b_low, b_high) = wilson(hits, count), wilson(other_hits, other_count)
    low = a - b - sqrt((a - a_low) ** 2 + (b_high - b) ** 2)
    high = a - b + sqrt((a_high - a) ** 2 + (b - b_low) ** 2)
    pooled = (hits + other_hits) / (count + other_count)
    spread = sqrt(pooled * (1 - pooled) * (1 / count + 1 / other_count))
    p = erfc(abs(a - b) / spread / sqrt(2)) if spread else 1.0
    return low, high, p


def wilson(hits: int, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share."""
    share = hits / count
    centre = (share + Z * Z / (2 * count)) / (1 + Z * Z / count)
    half = Z * sqrt(share * (1 - share) / count + Z * Z / (4 * count**2)) / (1 + Z * Z / count)
    return max(0.0, centre - half), min(1.0, centre + half)


def benjamini_hochberg(p: Sequence[float]) -> list[float]:
    """
    Each p-value corrected for the number of tests: calling those below 0.05 true is wrong in 5 % of them.
    """
    order = sorted(range(len(p)), key=lambda index: p[index])
    corrected, least = [0.0] * len(p), 1.0
    for rank in range(len(p), 0, -1):
        index = order[rank - 1]
        least = min(least, p[index] * len(p) / rank)
        corrected[index] = least
    return corrected


@torch.no_grad()
def logit_effects(
    sae: SAE, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, features: Sequence[int], words: int
) -> tuple[list[list[str]], list[list[str]]]:
    """
    The tokens whose logits each feature's direction raises and lowers most, straight through the unembedding
    (with the gain of the final norm, without what later layers make of it).
    """
    if not features:
        return [], []
    weight = model.get_output_embeddings().weight
    gain = _final_gain(model)
    directions = sae.W_dec[torch.tensor(features, device=sae.device)].to(weight.device, weight.dtype)
    up, down = [], []
    for part in directions.split(256):
        logits = (part * gain if gain is not None else part) @ weight.T
        logits = logits - logits.mean(1, keepdim=True)
        up += logits.topk(words).indices.tolist()
        down += logits.topk(words, largest=False).indices.tolist()
    return [[tokenizer.decode([t]) for t in row] for row in up], [
        [tokenizer.decode([t]) for t in row] for row in down
    ]


def _final_gain(model: PreTrainedModel) -> Tensor | None:
    """The weight of the norm after the last layer: the trunk's last one-dimensional parameter."""
    decoder = find_decoder(model)
    inside = {id(p) for p in decoder.layers.parameters()}
    found = [
        (name, p)
        for name, p in decoder.trunk.named_parameters()
        if p.shape == (decoder.width,) and id(p) not in inside and name.endswith("weight")
    ]
    if not found:
        return None
    gain = found[-1][1]
    return gain + 1 if model.config.get_text_config().model_type.startswith("gemma") else gain


@contextmanager
def shifted(
    model: PreTrainedModel, layer: int, direction: Tensor, site: str = "resid_post"
) -> Iterator[None]:
    """
    Inside, `direction` (width,) is added to the activations at the site, at every token. Adding a feature is
    `strength * sae.W_dec[f]` in the base model; taking it away is minus its mean contribution in the steered
    one.
    """
    decoder = find_decoder(model)
    if direction.shape != (decoder.width,):
        raise SteerError(f"direction of shape {tuple(direction.shape)} for a model of width {decoder.width}")
    place = find_sites(decoder, [layer % decoder.depth], site)[0]

    def add(hidden: Tensor) -> Tensor:
        return hidden + direction.to(hidden.device, hidden.dtype)

    def after(module: Any, args: tuple, output: Any) -> Any:
        return (add(output[0]), *output[1:]) if isinstance(output, tuple) else add(output)

    def before(module: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if args:
            return (add(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": add(kwargs["hidden_states"])}

    if place.on_input:
        handle = place.module.register_forward_pre_hook(before, with_kwargs=True)
    else:
        handle = place.module.register_forward_hook(after)
    try:
        yield
    finally:
        handle.remove()
