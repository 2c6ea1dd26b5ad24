"""
Which log-probabilities an engine must return so that they compare with the trainer's.

The trainer scores a token by log softmax(logits / temperature). vLLM's `logprobs_mode` chooses between the
distribution that it drew from (`processed_logprobs`: after temperature, penalties and truncation) and
log softmax(logits) (`raw_logprobs`). Truncated to top_p = 0.8, the former are higher than the trainer's by up
to 0.22 a token although both have the same weights, and the ratio of a long answer vanishes.
"""

from __future__ import annotations

from typing import Any, cast

from trl import GRPOConfig

from steer.errors import SteerError

RAW, PROCESSED = "raw_logprobs", "processed_logprobs"
# Keys of `generation_kwargs` that do not change the distribution of the next token.
_SAME_DISTRIBUTION = frozenset({"stop", "stop_token_ids", "include_stop_str_in_output", "ignore_eos"})


def logprobs_mode(args: GRPOConfig) -> str | None:
    """
    The `logprobs_mode` of vLLM whose log-probabilities compare with the trainer's, for samples drawn as
    `args` says: `processed_logprobs` for plain sampling, at any temperature; `raw_logprobs` where truncation
    or penalties change the distribution, at temperature 1.

    Returns:
        The mode, or None where no mode compares and nothing needs one.

    Raises:
        SteerError: no mode compares, but importance weights or `off_policy_mask_threshold` need one.
    """
    extra = cast(dict[str, Any], args.generation_kwargs or {})  # JSON is read when the settings are made
    guided = args.vllm_structured_outputs_regex is not None or "structured_outputs" in extra
    changed = {
        "top_p": args.top_p < 1,
        "top_k": args.top_k > 0,
        "min_p": bool(args.min_p),
        "repetition_penalty": args.repetition_penalty != 1,
        "generation_kwargs": bool(set(extra) - _SAME_DISTRIBUTION),
        "structured outputs": guided,  # whose mask is in vLLM's raw log-probabilities too
    }
    names = " and ".join(name for name, is_changed in changed.items() if is_changed)
    if not names:
        return PROCESSED
    if args.temperature == 1 and not guided:
        return RAW
    if args.vllm_importance_sampling_correction or args.off_policy_mask_threshold is not None:
        warmer = "" if guided else ", or temperature=1"
        raise SteerError(
            f"with {names} at temperature {args.temperature:g} vLLM's log-probabilities do not compare with "
            "the trainer's, which importance weights need: set "
            "vllm_importance_sampling_correction=false (and "
            f"off_policy_mask_threshold=null){warmer}, or leave {names} out"
        )
    return None
