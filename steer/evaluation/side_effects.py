"""
What vectors do to text that has nothing to do with their task: how far the next-token distributions move from
the base model's, and the perplexity, on the neutral text of the package. And the scale at which that is as
much as one allows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from steer.config import SteeringConfig
from steer.errors import SteerError
from steer.evaluation.neutral_text import prose
from steer.models import context_length
from steer.vectors import SteeringVectors

# A scale is found to this share of what is asked for.
TOLERANCE = 0.01
# The scale is looked for from 2^-STEPS to 2^STEPS times the saved one.
STEPS = 20
# Parts of the scale that was found, at which the curve is measured.
CURVE = (0.25, 0.5, 1.0, 1.5, 2.0)


@dataclass(frozen=True)
class SideEffects:
    """
    Means over the tokens of the text: `kl` of the steered from the base distribution (nats), and perplexity.
    """

    kl: float
    perplexity: float


class BaseText:
    """
    The neutral text as the base model reads it.

    Args:
        model: without vectors, or with its vectors off.
        tokenizer: of the model.
        texts: other texts than the package's.

    Raises:
        SteerError: texts of one token.
    """

    def __init__(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str] | None = None
    ) -> None:
        self.model, context = model, context_length(model.config)
        ids = tokenizer(list(texts or prose()), verbose=False)["input_ids"]
        self.ids = [row[:context] for row in ids if len(row) > 1]
        if not self.ids:
            raise SteerError("the texts have one token or none, and nothing to predict; give longer ones")
        self.base = [self._log_probs(row) for row in self.ids]
        losses = sum(self._loss(row, found) for row, found in zip(self.ids, self.base, strict=True))
        self.tokens = sum(len(row) - 1 for row in self.ids)
        self.perplexity = math.exp(losses / self.tokens)

    def measure(self) -> SideEffects:
        """The side effects of what is on the model now: vectors, an adapter."""
        kl = loss = 0.0
        for row, base in zip(self.ids, self.base, strict=True):
            found = self._log_probs(row)
            kl += (found.exp() * (found - base)).sum().item()
            loss += self._loss(row, found)
        perplexity = math.exp(min(loss / self.tokens, 700)) if math.isfinite(loss) else math.inf
        return SideEffects(kl / self.tokens if math.isfinite(kl) else math.inf, perplexity)

    @torch.no_grad()
    def _log_probs(self, row: Sequence[int]) -> torch.Tensor:
        """(tokens - 1, vocabulary) in float32."""
        model = self.model
        was_training = model.training
        model.eval()
        ids = torch.tensor([list(row)], device=model.device)
        try:
            logits = model(input_ids=ids, use_cache=False).logits
        finally:
            model.train(was_training)
        return logits[0, :-1].float().log_softmax(-1)

    @staticmethod
    def _loss(row: Sequence[int], log_probs: torch.Tensor) -> float:
        targets = torch.tensor(list(row[1:]), device=log_probs.device)
        return -log_probs.gather(1, targets[:, None]).sum().item()


class NeutralText:
    """
    The neutral text as a model with vectors reads it.

    Args:
        vectors: attached to the model; they are off while the base reads.
        tokenizer: of the model.
        texts: other texts than the package's.

    Raises:
        SteerError: vectors that steer a prompt alone, which a plain text has none of; texts of one token.
    """

    def __init__(
        self,
        vectors: SteeringVectors,
        tokenizer: PreTrainedTokenizerBase,
        texts: Sequence[str] | None = None,
    ):
        check_positions(vectors.config)
        self.vectors = vectors
        with vectors.disabled():
            self._base = BaseText(vectors.model, tokenizer, texts)
        self.tokens, self.base_perplexity = self._base.tokens, self._base.perplexity

    def measure(self, factor: float = 1.0) -> SideEffects:
        """The side effects of the vectors at `factor` times the scale that they have."""
        vectors, before = self.vectors, self.vectors.scale
        vectors.scale = factor * before
        try:
            with vectors.prompt_length(1):
                return self._base.measure()
        finally:
            vectors.scale = before


def check_positions(config: SteeringConfig) -> None:
    """SteerError for vectors that depend on a prompt, of which the neutral text has none."""
    if config.condition is not None:
        raise SteerError(
            "these vectors have a condition on prompts, and the neutral text has none: side effects are "
            "measured of vectors without a condition"
        )
    if config.positions not in ("all", "completion"):
        raise SteerError(
            f"vectors with positions={config.positions} act at a prompt or right after it, and the neutral "
            "text has none: side effects are measured of positions all and completion"
        )


def calibrate(
    text: NeutralText, target_kl: float | None = None, max_perplexity: float | None = None
) -> tuple[float, SideEffects]:
    """
    The factor on the vectors at which their side effects are as large as asked for, by bisection.

    Args:
        text: with the vectors.
        target_kl: the mean KL from the base, in nats a token; or
        max_perplexity: the perplexity, above the base's.

    Returns:
        The factor above 0, and the side effects there. Where they rise and fall with the scale, one of the
        factors at which they cross the value.

    Raises:
        SteerError: not exactly one of the two; a value that no scale reaches.
    """
    if (target_kl is None) == (max_perplexity is None):
        raise SteerError("give one of --target-kl and --max-perplexity")
    measured: Callable[[SideEffects], float]
    if target_kl is not None:
        name, wanted, floor, measured = "KL", target_kl, 0.0, lambda found: found.kl
    else:
        assert max_perplexity is not None
        name, wanted, floor = "perplexity", max_perplexity, text.base_perplexity
        measured = lambda found: found.perplexity  # noqa: E731
    if not floor < wanted < math.inf:
        least = f"above the base's, {floor:.4g}" if floor else "above 0"
        raise SteerError(f"a {name} of {wanted:g} is out of range; give a number {least}")
    low, high = 0.0, 1.0
    effects = text.measure(high)
    while measured(effects) < wanted:
        low, high = high, 2 * high
        if high > 2**STEPS:
            raise SteerError(
                f"the {name} is {measured(effects):.4g} at {low:g} times the scale and does not reach "
                f"{wanted:g}"
            )
        effects = text.measure(high)
    factor = high
    for _ in range(3 * STEPS):
        if abs(measured(effects) - wanted) <= TOLERANCE * (wanted - floor):
            return factor, effects
        factor = (low + high) / 2
        effects = text.measure(factor)
        low, high = (factor, high) if measured(effects) < wanted else (low, factor)
    raise SteerError(
        f"no scale found: the {name} jumps over {wanted:g} near {factor:g} times the scale; load the model "
        "in float32, or ask for another value"
    )


def curve(text: NeutralText, factor: float) -> list[dict[str, float]]:
    """
    Side effects by scale, around `factor` times the scale that the vectors have.

    Returns:
        One row for each of `CURVE`: `scale`, `kl` in nats a token, `perplexity`.
    """
    scale = factor * text.vectors.scale
    return [{"scale": part * scale, **asdict(text.measure(part * factor))} for part in CURVE]
