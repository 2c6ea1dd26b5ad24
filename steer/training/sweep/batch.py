"""One member's samples of one update: their rewards, advantages and weights in its loss."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedTokenizerBase, TrainerState
from trl.trainer.utils import nanstd

from steer.generation.completion import Completion
from steer.training.loss import group_advantages, token_weights, total_rewards
from steer.training.sweep.member import Member


@dataclass
class Batch:
    """One member's samples of one update. Rows are padded on the left (prompts) and right (completions)."""

    member: Member
    prompts: list[list[int]]
    completions: list[Completion]
    advantages: torch.Tensor  # (rows,)
    weights: torch.Tensor  # (rows, longest completion)
    kept: list[int]  # the rows that have a gradient

    totals: dict[str, float] = field(default_factory=lambda: defaultdict(float))  # sums over its kept rows


def score(
    member: Member,
    columns: dict[str, list],
    completions: list[Completion],
    tokenizer: PreTrainedTokenizerBase,
    first: bool = True,
) -> torch.Tensor:
    """
    The rewards of some of a member's samples. What its reward functions log of the first round is left in
    `member.metrics`.

    Args:
        member: whose samples they are.
        columns: the columns of their problems, which the reward functions read.
        completions: what was sampled.
        tokenizer: turns the completions into text.
        first: whether the samples are those of the first round.

    Returns:
        (rows, functions): NaN where a function returned None.
    """
    ids = [one.ids for one in completions]
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    given = {k: v for k, v in columns.items() if k not in ("prompt", "completion", "completion_ids")}
    scored = torch.zeros(len(ids), len(member.reward_funcs))

    def log_metric(name: str, value: float) -> None:
        if first:
            member.metrics[name].append(value)

    before = random.getstate()
    random.setstate(member.random)
    try:
        for i, reward in enumerate(member.reward_funcs):
            values = reward(
                prompts=columns["prompt"],
                completions=texts,
                completion_ids=ids,
                trainer_state=TrainerState(global_step=member.step, max_steps=member.steps),
                log_metric=log_metric,
                log_extra=lambda column, values: None,  # there is no table of completions
                **given,
            )
            scored[:, i] = torch.tensor([torch.nan if v is None else v for v in values])
        member.random = random.getstate()
    finally:
        random.setstate(before)
    return scored


def judge(
    member: Member,
    prompts: list[list[int]],
    completions: list[Completion],
    scored: torch.Tensor,
    tokenizer: PreTrainedTokenizerBase,
    stop_tokens: Sequence[int],
) -> Batch:
    """
    Advantages and weights of a member's samples. What is logged of them is left in `member.metrics`.

    Args:
        member: whose samples they are.
        prompts: token ids of the prompts, one for each sample.
        completions: what was sampled after each.
        scored: (rows, functions), as `score` returns them.
        tokenizer: read for its padding token.
        stop_tokens: the ids that end a completion.
    """
    args, log = member.args, member.metrics
    ids = [one.ids for one in completions]
    ended = torch.tensor([row[-1] in (*stop_tokens, tokenizer.pad_token_id) for row in ids])
    lengths = torch.tensor([float(len(row)) for row in ids])
    for i, reward in enumerate(member.reward_funcs):
        log[f"rewards/{reward.__name__}/mean"] = [torch.nanmean(scored[:, i]).item()]
    rewards = total_rewards(scored, member.reward_weights)
    mask = torch.arange(int(lengths.max()))[None, :] < lengths[:, None]
    if args.mask_truncated_completions:
        mask = mask & ended[:, None]
    group = args.num_generations
    advantages = group_advantages(rewards, group, args)
    every = args.beta != 0 or not args.skip_zero_advantage
    spread = nanstd(rewards) if args.scale_rewards == "batch" else nanstd(rewards.view(-1, group), dim=1)
    log["reward"] = [torch.nanmean(rewards).item()]
    log["reward_std"] = [nanstd(rewards).item()]
    log["frac_reward_zero_std"] = [torch.isclose(spread, torch.zeros(())).float().mean().item()]
    log["completions/mean_length"] = [lengths.mean().item()]
    log["completions/clipped_ratio"] = [1 - ended.float().mean().item()]
    # One row at least, as alone: a step without a gradient is still a step, and its entropy is logged.
    kept = [i for i in range(len(ids)) if every or advantages[i] != 0] or [0]
    return Batch(member, prompts, completions, advantages, token_weights(mask, args), kept)
