"""
The estimator of `SteeringGRPOTrainer` as functions of tensors, for one generation that feeds one update: then
the policy that samples is the policy that is updated, every probability ratio is one, and no clip is reached.
"""

from __future__ import annotations

import torch
from trl.trainer.utils import nanstd

from steer.train.config import SteeringGRPOConfig


def advantages(rewards: torch.Tensor, args: SteeringGRPOConfig) -> torch.Tensor:
    """
    From `rewards` (rows,), `num_generations` rows a prompt, NaN where nothing could be scored: reward minus
    the mean of its group's others (loo, arXiv 2402.14740) or of its group, scaled as `scale_rewards` says.
    """
    group = args.num_generations or 1
    grouped = rewards.view(-1, group)
    found = grouped - torch.nanmean(grouped, dim=1, keepdim=True)
    if args.scale_rewards == "group":
        found = found / (nanstd(grouped, dim=1, keepdim=True) + 1e-4)
    elif args.scale_rewards == "batch":
        found = found / (nanstd(rewards) + 1e-4)
    if args.advantage == "loo" and group > 1:
        found = found * (group / (group - 1))
    return torch.nan_to_num(found.reshape(-1), nan=0.0)


def token_weights(mask: torch.Tensor, args: SteeringGRPOConfig) -> torch.Tensor:
    """
    What each completion token of an update, (rows, tokens) where `mask` is 1, counts in its loss: by
    `loss_type`, over the whole update (dapo, dr_grpo), a row (grpo) or a micro-batch (bnpo).
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


def importance(difference: torch.Tensor, args: SteeringGRPOConfig) -> torch.Tensor:
    """
    What a token counts that another engine has drawn: from `difference` (rows, tokens), the trainer's
    log-probability minus the engine's, zero at padding, the ratio of probabilities (rows, tokens or 1), of
    tokens or whole samples, cut or left out as `vllm_importance_sampling_...` say.
    """
    if not args.vllm_importance_sampling_correction:
        return torch.ones_like(difference)
    kind, _, how = args.vllm_importance_sampling_mode.partition("_")
    difference = torch.nan_to_num(difference, nan=0.0)
    ratio = torch.exp(difference.sum(1, keepdim=True) if kind == "sequence" else difference)
    low, high = args.vllm_importance_sampling_clip_min, args.vllm_importance_sampling_clip_max
    low, high = 0.0 if low is None else low, float("inf") if high is None else high
    if how == "truncate":
        return ratio.clamp(low, high)
    return ratio.masked_fill((ratio < low) | (ratio > high), 0.0)
