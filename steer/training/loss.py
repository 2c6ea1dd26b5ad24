"""
The training objective as functions of tensors: rewards to advantages, the policy loss with its KL term, and
importance weights for samples of another engine.

`SteeringGRPOTrainer` and `PopulationTrainer` both take advantages and importance weights from here. The
population also takes its loss from here; the trainer's is computed by trl's `GRPOTrainer._compute_loss`, and
`tests/training/test_loss.py` holds the two equal, value and gradient, for every setting that both support.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from trl.trainer.utils import nanstd

from steer.training.config import SteeringGRPOConfig

# The values of `loss_type` that `token_losses` and `token_weights` implement.
LOSSES = ("dapo", "grpo", "bnpo", "dr_grpo")


class TokenLosses(NamedTuple):
    """Per-token terms, each (rows, tokens): the loss, and the KL estimate in it (None where beta is 0)."""

    loss: torch.Tensor
    kl: torch.Tensor | None


def total_rewards(scores: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """
    The weighted sum of the reward functions.

    Args:
        scores: (rows, functions), NaN where a function returned None.
        weights: (functions,).

    Returns:
        (rows,): the sum over the functions that scored the row; NaN where none did.
    """
    total = (scores * weights).nansum(1)
    return total.masked_fill(scores.isnan().all(1), torch.nan)


def group_advantages(rewards: torch.Tensor, group: int, args: SteeringGRPOConfig) -> torch.Tensor:
    """
    Advantages of samples that come in groups of one prompt.

    With `advantage="loo"` the baseline of a sample is the mean reward of the other scored samples of its
    group (RLOO, arXiv 2402.14740); with `"group"` it is the mean of all scored samples, and the difference is
    divided by a standard deviation as `scale_rewards` says (GRPO, arXiv 2402.03300).

    Args:
        rewards: (rows,), `group` consecutive rows a prompt, NaN where a sample was not scored.
        group: samples of a prompt.
        args: read for `advantage` and `scale_rewards`.

    Returns:
        (rows,): zero for a sample that was not scored, and for one that was scored alone in its group.
    """
    grouped = rewards.view(-1, group)
    advantages = grouped - torch.nanmean(grouped, dim=1, keepdim=True)
    if args.advantage == "loo":
        # r_i - mean of the n - 1 others = (r_i - mean of all n) * n / (n - 1)
        scored = (~grouped.isnan()).sum(1, keepdim=True)
        advantages = advantages * (scored / (scored - 1).clamp(min=1))
    elif args.scale_rewards == "group":
        advantages = advantages / (nanstd(grouped, dim=1, keepdim=True) + 1e-4)
    elif args.scale_rewards == "batch":
        advantages = advantages / (nanstd(rewards) + 1e-4)
    return torch.nan_to_num(advantages.reshape(-1), nan=0.0)


def token_losses(
    log_probs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    args: SteeringGRPOConfig,
    old_log_probs: torch.Tensor | None = None,
    reference: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
) -> TokenLosses:
    """
    The clipped policy-gradient loss of each token, with the KL term.

    loss = -min(r A, clip(r, 1 - epsilon, 1 + epsilon_high) A) w + beta k3, where r is the ratio of the policy
    to the policy that sampled (PPO, arXiv 1707.06347, eq. 7), w the importance weight and k3 = exp(d) - d - 1
    with d = log p_reference - log p (http://joschu.net/blog/kl-approx.html). `use_bias_correction_kl`
    multiplies k3 by r, which changes its gradient even where r = 1 (arXiv 2512.02556).

    Args:
        log_probs: (rows, tokens) of the policy, with gradient.
        advantages: (rows,).
        mask: (rows, tokens), 1 at the tokens that count. It is read for sequence-level ratios alone: the
            losses of other tokens are not zero.
        args: read for `beta`, `use_bias_correction_kl`, `epsilon`, `epsilon_high`, `delta` and
            `importance_sampling_level`.
        old_log_probs: (rows, tokens) of the policy that sampled; by default `log_probs`, so that r = 1.
        reference: (rows, tokens) of the reference policy; needed where `beta` is not 0.
        weights: (rows, tokens or 1), as `importance_weights` returns them.
    """
    difference = log_probs - (log_probs.detach() if old_log_probs is None else old_log_probs)
    if args.importance_sampling_level == "sequence":  # GSPO, arXiv 2507.18071
        difference = (difference * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
    ratio = difference.exp()
    high = args.epsilon if args.epsilon_high is None else args.epsilon_high
    clipped = ratio.clamp(1 - args.epsilon, 1 + high)
    bounded = ratio if args.delta is None else ratio.clamp(max=args.delta)
    advantage = advantages[:, None]
    loss = -torch.min(bounded * advantage, clipped * advantage)
    if weights is not None:
        loss = loss * weights
    if not args.beta:
        return TokenLosses(loss.expand_as(log_probs), None)
    assert reference is not None, "a KL term needs the reference policy"
    gap = reference - log_probs
    kl = gap.exp() - gap - 1
    if args.use_bias_correction_kl:
        kl = kl * ratio
    return TokenLosses(loss + args.beta * kl, kl)


def token_weights(mask: torch.Tensor, args: SteeringGRPOConfig) -> torch.Tensor:
    """
    What each token counts in the loss of an update, by `loss_type`.

    The loss is the sum of weight times token loss: a mean over the tokens of the whole update (dapo), over
    those of each row and then over rows (grpo), over those of each micro-batch and then over micro-batches
    (bnpo), or a sum divided by rows times `max_completion_length` (dr_grpo).

    Args:
        mask: (rows, tokens) of the whole update, 1 at the tokens that count.
        args: read for `loss_type`, `max_completion_length` and `per_device_train_batch_size`.

    Returns:
        (rows, tokens), zero where `mask` is.
    """
    mask = mask.float()
    if args.loss_type == "dapo":
        return mask / mask.sum().clamp(min=1)
    if args.loss_type == "grpo":
        return mask / mask.sum(1, keepdim=True).clamp(min=1) / len(mask)
    if args.loss_type == "dr_grpo":
        return mask / (len(mask) * args.max_completion_length)
    parts = mask.split(args.per_device_train_batch_size)
    return torch.cat([part / part.sum().clamp(min=1) / len(parts) for part in parts])


def importance_weights(
    log_probs: torch.Tensor, sampled: torch.Tensor, mask: torch.Tensor, args: SteeringGRPOConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The weights of tokens that another engine sampled, and which of them were limited.

    The weight is the ratio of the trainer's probability to the engine's, of a token or of a whole sample.
    Ratios outside of `vllm_importance_sampling_clip_min` and `..._clip_max` are limited: set to zero
    (`*_mask`) or to the bound (`*_truncate`), as `vllm_importance_sampling_mode` says.

    Args:
        log_probs: (rows, tokens) of the trainer, without gradient.
        sampled: (rows, tokens) of the engine; NaN where it gave none, which counts as a ratio of 1.
        mask: (rows, tokens), 1 at the tokens that count.
        args: read for the `vllm_importance_sampling_...` fields.

    Returns:
        weights: (rows, tokens) for the token modes, (rows, 1) for the sequence modes.
        limited: (rows, tokens), True at the tokens that count whose weight was limited.
    """
    level, _, limit = args.vllm_importance_sampling_mode.partition("_")
    difference = torch.nan_to_num((log_probs - sampled) * mask, nan=0.0)
    ratio = (difference.sum(1, keepdim=True) if level == "sequence" else difference).exp()
    low, high = args.vllm_importance_sampling_clip_min, args.vllm_importance_sampling_clip_max
    low, high = float("-inf") if low is None else low, float("inf") if high is None else high
    limited = (ratio < low) | (ratio > high)
    weights = ratio.clamp(low, high) if limit == "truncate" else ratio.masked_fill(limited, 0.0)
    return weights, limited & mask.bool()


def limited_shares(limited: torch.Tensor, mask: torch.Tensor) -> dict[str, float]:
    """
    What importance weighting limited: the share of the tokens that count, and the share of the samples with
    one such token or more.
    """
    tokens, rows = mask.sum().clamp(min=1), mask.any(1).sum().clamp(min=1)
    return {
        "limited_tokens": (limited.sum() / tokens).item(),
        "limited_sequences": (limited.any(1).sum() / rows).item(),
    }
