"""`steer eval --side-effects`: the KL to the base and the perplexity of each variant on neutral text."""

from __future__ import annotations

import argparse
import gc
import logging
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from steer import artifact, vectors
from steer.errors import SteerError
from steer.evaluation import task_effects
from steer.evaluation.engines import HfEngine
from steer.evaluation.side_effects import BaseText, check_positions
from steer.evaluation.store import Store
from steer.evaluation.variants import Variant

log = logging.getLogger("steer")


def check(variants: Sequence[Variant], fine_tuned: bool, tasks: Sequence[str] = ()) -> None:
    """SteerError where the side effects of these variants, or `tasks` of lm-eval, cannot be measured."""
    if fine_tuned:
        raise SteerError(
            "--side-effects compare with the base model, which a run of a fine-tune does not have; leave "
            "out --side-effects, or --fine-tuned if the model is the base"
        )
    changed = [variant for variant in variants if variant.kind != "base"]
    if not changed:
        raise SteerError("--side-effects measure vectors and adapters; give --vectors or --adapter")
    for variant in changed:
        if variant.kind == "vectors":
            try:
                check_positions(artifact.read(variant.path).config)
            except SteerError as error:
                raise SteerError(f"{variant.path}: {error}; leave out --side-effects") from error
    if tasks:
        task_effects.check(tasks, changed)


def add(
    args: argparse.Namespace, store: Store, tokenizer: PreTrainedTokenizerBase, variants: Sequence[Variant]
) -> HfEngine | None:
    """
    Measure what the run does not have yet, before anything is sampled. Returns the engine, for sampling with
    it; vLLM gets the memory of a device for itself.
    """
    known = store.settings.setdefault("side_effects", {})
    # other prompts (--prefixes, --systems, the elicited base) leave neutral text as it is
    told = [v for v in variants if v.kind != "base" or not (v.prefix or v.system or v.asked)]
    missing = [variant for variant in told if variant.name not in known]
    tasks, limit = args.side_effect_tasks, args.side_effect_limit
    unanswered = task_effects.missing(store.settings, told, tasks, limit)
    if not missing and not unanswered:
        return None
    engine = HfEngine(args.model, args.revision, args.dtype, args.trust_remote_code)
    known.update(measure(engine, tokenizer, missing))
    store.save_settings()
    answered = store.settings.setdefault(task_effects.KEY, {}) if tasks else {}
    for variant, lacking in unanswered:
        found = task_effects.measure(engine, tokenizer, variant, lacking, limit)
        answered.setdefault(variant.name, {}).update(found)
        store.save_settings()
    if args.engine == "hf":
        return engine
    del engine
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


def measure(
    engine: HfEngine, tokenizer: PreTrainedTokenizerBase, variants: Sequence[Variant]
) -> dict[str, dict[str, float]]:
    """
    The side effects of each variant by its name: `kl` (nats a token), `perplexity`, `base_perplexity` and
    `tokens`.
    """
    found: dict[str, dict[str, float]] = {}
    if not variants:
        return found
    text = BaseText(engine.model, tokenizer)
    for variant in variants:
        log.info("side effects of %s", variant.name)
        with engine.variant(variant):
            effects = _measure(text, engine.model, variant)
        found[variant.name] = {**effects, "base_perplexity": text.perplexity, "tokens": text.tokens}
    return found


def _measure(text: BaseText, model: Any, variant: Variant) -> dict[str, float]:
    if variant.kind == "base":
        return {"kl": 0.0, "perplexity": text.perplexity}
    if variant.kind == "vectors":
        with vectors.attached(model).prompt_length(1):
            return asdict(text.measure())
    return asdict(text.measure())
