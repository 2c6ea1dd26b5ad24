"""
Features of what steering changes: a DiffSAE's features compared between right and wrong completions, and
their effect on the logits. `steer.sae.intervene` adds them to a model and takes them away.

A completion is the unit of every test, not a token: tokens of one completion are not independent. Nor are the
completions of one prompt, so a test compares right and wrong ones of the same prompt.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import NormalDist

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from steer.errors import SteerError
from steer.final_norm import through_final_norm
from steer.sae.activations import Reader, Window, check_base, read_all
from steer.sae.model import SAE
from steer.stats import LEVEL, benjamini_hochberg


@dataclass(frozen=True)
class GradedCompletion:
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
    `difference` that of right and wrong ones of the same prompt, `low` and `high` its 95 % interval, `p` the
    p-value of the test within prompts and `q` the same corrected for the number of features tested. `mean` is
    its mean strength over all written tokens.
    """

    index: int
    right: float
    wrong: float
    difference: float
    low: float
    high: float
    p: float
    q: float
    mean: float
    strongest: float
    promotes: list[str]
    suppresses: list[str]
    snippets: list[Snippet]


def read_completions(reader: Reader, completions: Sequence[GradedCompletion]) -> Tensor:
    """Activations (written tokens, width) of the completions, in their order; equal ones are read once."""
    numbers: dict[tuple[tuple[int, ...], tuple[int, ...]], int] = {}
    which = [numbers.setdefault((tuple(c.prompt), tuple(c.ids)), len(numbers)) for c in completions if c.ids]
    distinct = [GradedCompletion(list(prompt), list(ids), False) for prompt, ids in numbers]
    parts = read_all(reader, [c.window() for c in distinct]).split([len(c.ids) for c in distinct])
    return torch.cat([parts[number] for number in which])


@torch.no_grad()
def analyse(
    sae: SAE,
    reader: Reader,
    tokenizer: PreTrainedTokenizerBase,
    completions: Sequence[GradedCompletion],
    snippets: int = 5,
    words: int = 8,
    least: int = 5,
    rows: Tensor | None = None,
) -> list[Feature]:
    """
    Every feature that fires in at least `least` completions, the most different between right and wrong
    first.

    reader: of the activations that the SAE was trained on. completions: several of each prompt, since right
    and wrong ones of the same prompt are compared; without tokens they do not count. rows: what
    `read_completions` gives for them, where that is at hand. Raises SteerError unless there are right and
    wrong completions, with tokens.
    """
    check_base(sae.cfg.source, reader.model)
    completions = [c for c in completions if c.ids]
    correct = torch.tensor([c.correct for c in completions], dtype=torch.bool)
    if not correct.any() or correct.all():
        raise SteerError(
            f"{int(correct.sum())} of {len(completions)} completions are right; a comparison needs right and "
            "wrong ones: sample more, at temperature 1, or choose other problems"
        )
    lengths = [len(c.ids) for c in completions]
    rows = (read_completions(reader, completions) if rows is None else rows).to(sae.device, sae.dtype)
    parts = rows.split(4096)
    active = [sae.active(part) for part in parts]
    owner = torch.arange(len(completions)).repeat_interleave(torch.tensor(lengths)).to(sae.device)
    fires = torch.zeros(len(completions), sae.cfg.d_sae, dtype=torch.bool, device=sae.device)
    total = torch.zeros(sae.cfg.d_sae, dtype=torch.float64, device=sae.device)
    peak = torch.zeros(len(completions), sae.cfg.d_sae, device=sae.device)
    for strengths, owners in zip(active, owner.split(4096), strict=True):
        on = strengths.values > 0
        place = owners[:, None].expand_as(strengths.indices)[on], strengths.indices[on]
        fires[place] = True
        values = strengths.values[on].float()
        total.index_add_(0, place[1], values.double())
        flat = place[0] * sae.cfg.d_sae + place[1]
        peak.view(-1).scatter_reduce_(0, flat, values, "amax")
    fires, peak, mean = fires.cpu(), peak.cpu(), (total / len(rows)).cpu()
    counts = fires[correct].sum(0), fires[~correct].sum(0)
    tested = ((counts[0] + counts[1]) >= least).nonzero().squeeze(1).tolist()
    sizes = int(correct.sum()), int((~correct).sum())
    numbers: dict[tuple[int, ...], int] = {}
    prompt = torch.tensor([numbers.setdefault(tuple(c.prompt), len(numbers)) for c in completions])
    p = within_prompts(fires[:, tested], correct, prompt).tolist()
    q = benjamini_hochberg(p)
    within = torch.stack(difference_within_prompts(fires[:, tested], correct, prompt), 1).tolist()
    up, down = logit_effects(sae, reader.model, tokenizer, tested, words)
    starts = torch.tensor([0, *lengths]).cumsum(0).tolist()
    features = []
    for place_in_list, f in enumerate(tested):
        hits = int(counts[0][f]), int(counts[1][f])
        difference, low, high = within[place_in_list]
        shown: dict[tuple[int, ...], int] = {}  # of equal texts the first
        for c in peak[:, f].argsort(descending=True, stable=True).tolist():
            if len(shown) == snippets or peak[c, f] <= 0:
                break
            shown.setdefault((*completions[c].prompt, *completions[c].ids), c)
        features.append(
            Feature(
                f,
                hits[0] / sizes[0],
                hits[1] / sizes[1],
                difference,
                low,
                high,
                p[place_in_list],
                q[place_in_list],
                mean[f].item(),
                peak[:, f].max().item(),
                up[place_in_list],
                down[place_in_list],
                [
                    Snippet(
                        [str(tokenizer.decode([token])) for token in completions[c].ids],
                        _strengths(sae, rows[starts[c] : starts[c + 1]], f),
                        completions[c].correct,
                    )
                    for c in shown.values()
                ],
            )
        )
    return sorted(features, key=lambda feature: (feature.p, -abs(feature.difference)))


def of_equal_mass(features: Sequence[Feature], chosen: Collection[int], seed: int = 0) -> list[int]:
    """
    As many other features as `chosen`, of nearly the same mass, the sum of their mean strengths: a control
    for ablating the chosen ones.

    Args:
        features: of `analyse`.
        chosen: indices of some of them. Others whose corrected p is below 0.05 are left out as well.
        seed: of the random set that the search begins with. One feature at a time is exchanged for another
            that brings the mass nearer, until none does.

    Returns:
        Their indices, sorted.

    Raises:
        SteerError: there are fewer others than chosen ones.
    """
    others = [f for f in features if f.index not in chosen and f.q >= 0.05]
    if len(others) < len(chosen):
        raise SteerError(
            f"{len(others)} other features are not as many as the {len(chosen)} chosen; test more features, "
            "or choose fewer"
        )
    masses = torch.tensor([f.mean for f in others], dtype=torch.float64)
    target = sum(f.mean for f in features if f.index in chosen)
    order = torch.randperm(len(others), generator=torch.Generator().manual_seed(seed))
    used, free = order[: len(chosen)], order[len(chosen) :]
    while len(used) and len(free):
        off = masses[used].sum() - target
        after = (off + masses[free][None] - masses[used][:, None]).abs()
        best = int(after.argmin())
        if not after.flatten()[best] < off.abs():
            break
        out, into = divmod(best, len(free))
        used[out], free[into] = free[into].clone(), used[out].clone()
    return sorted(others[index].index for index in used.tolist())


def _strengths(sae: SAE, rows: Tensor, feature: int) -> list[float]:
    active = sae.active(rows)
    return (active.values * (active.indices == feature)).sum(1).tolist()


def within_prompts(fires: Tensor, correct: Tensor, prompt: Tensor) -> Tensor:
    """
    Two-sided p-values (features,) of "a feature fires in right and in wrong completions of a prompt alike":
    the Cochran-Mantel-Haenszel test, prompts as strata. What a feature owes to easy prompts does not count.

    fires: (completions, features), boolean; correct: (completions,), boolean; prompt: (completions,), the
    number of each one's prompt. 1 where no prompt has right and wrong completions that differ in firing.
    """
    count = torch.bincount(prompt).double()
    right = torch.bincount(prompt[correct], minlength=len(count)).double()
    all_hits, hits = (torch.zeros(len(count), fires.shape[1], dtype=torch.float64) for _ in range(2))
    all_hits.index_add_(0, prompt, fires.double())
    hits.index_add_(0, prompt[correct], fires[correct].double())
    excess = (hits - all_hits * (right / count)[:, None]).sum(0)
    spread = right * (count - right) / (count.square() * (count - 1).clamp(min=1))
    variance = (spread[:, None] * all_hits * (count[:, None] - all_hits)).sum(0)
    p = torch.erfc(excess.abs() / variance.sqrt() / sqrt(2))
    return torch.where(variance > 0, p, 1.0)


def difference_within_prompts(
    fires: Tensor, correct: Tensor, prompt: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """
    How much more often each feature fires in right than in wrong completions of the same prompt, and the ends
    of the 95 % interval, (features,) each; the arguments are those of `within_prompts`.

    The Mantel-Haenszel difference, prompts as strata, with the variance of Sato, Greenland and Robins ("On
    the variance estimator for the Mantel-Haenszel risk difference", Biometrics 45, 1989), which also holds
    for many prompts of few completions. An approximation by the normal distribution: with few completions in
    all it is too narrow. 0, -1 and 1 where no prompt has right and wrong completions.
    """
    count = int(prompt.max()) + 1
    sizes: list[Tensor] = []  # of right and of wrong completions, (prompts, 1)
    fired: list[Tensor] = []  # of those in which each feature fires, (prompts, features)
    for some in (correct, ~correct):
        hits = torch.zeros(count, fires.shape[1], dtype=torch.float64)
        fired.append(hits.index_add_(0, prompt[some], fires[some].double()))
        sizes.append(torch.bincount(prompt[some], minlength=count).double()[:, None])
    (right, wrong), (a, b) = sizes, fired
    both = right + wrong
    weight = (right * wrong / both).sum()
    if weight == 0:
        zero = torch.zeros(fires.shape[1], dtype=torch.float64)
        return zero, zero - 1, zero + 1
    found = (((a * wrong - b * right) / both).sum(0) / weight).clamp(-1, 1)
    skew = (right**2 * b - wrong**2 * a + right * wrong * (wrong - right) / 2) / both**2
    discordant = (a * (wrong - b) + b * (right - a)) / (2 * both)
    variance = (found * skew.sum(0) + discordant.sum(0)).clamp(min=0) / weight**2
    reach = NormalDist().inv_cdf(1 - LEVEL / 2) * variance.sqrt()
    return found, (found - reach).clamp(min=-1), (found + reach).clamp(max=1)


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
    directions = sae.W_dec[torch.tensor(features, device=sae.device)].to(weight.device, weight.dtype)
    directions = through_final_norm(model, directions)
    up, down = [], []
    for part in directions.split(256):
        logits = part @ weight.T
        logits = logits - logits.mean(1, keepdim=True)
        up += logits.topk(words).indices.tolist()
        down += logits.topk(words, largest=False).indices.tolist()
    texts = [[[str(tokenizer.decode([t])) for t in row] for row in rows] for rows in (up, down)]
    return texts[0], texts[1]
