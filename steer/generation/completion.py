"""What a model writes after a prompt, whichever engine sampled it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Completion:
    """
    One sampled completion.

    Args:
        ids: its token ids, the token that ended it included.
        finished: whether a stop token ended it; otherwise the limit on its length did.
        logps: the log-probability of each token under the sampler; None where the engine does not tell, or
            tells numbers that do not compare with a trainer's.
    """

    ids: list[int]
    finished: bool
    logps: list[float] | None = None
