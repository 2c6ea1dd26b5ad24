"""The model that a trainer is given by name, as trl's trainers take it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from steer.errors import SteerError
from steer.models import load_model, load_tokenizer
from steer.training import settings
from steer.training.trainer_config import SteeringTrainerConfig

_OPTIONS = [name for name, p in inspect.signature(load_model).parameters.items() if p.kind is p.KEYWORD_ONLY]


def load_policy(
    model: PreTrainedModel | str, args: SteeringTrainerConfig, kwargs: dict[str, Any], dtype: str = "auto"
) -> PreTrainedModel:
    """
    The model that is trained.

    Args:
        model: a model, or a name for `steer.models.load_model`: hub id, folder, .gguf file, bundled weights.
        args: the trainer's settings; `model_init_kwargs` are arguments of `load_model`, and
            `trust_remote_code` is one.
        kwargs: the trainer's other arguments, changed in place: `quantization_config` is used up, and
            `processing_class` becomes the model's tokenizer where none is given.
        dtype: precision of the model where `model_init_kwargs` has none.

    Returns:
        The model.

    Raises:
        SteerError: when there is no such model, for an unknown option, and for options that are given beside
            a model that is loaded.
    """
    if not isinstance(model, str):
        settings.check_loaded(args)
        return model
    options: dict[str, Any] = dict(args.model_init_kwargs or {})
    if unknown := sorted(set(options) - set(_OPTIONS)):
        raise SteerError(
            f"model_init_kwargs has {', '.join(unknown)}; a model given by name is loaded with "
            f"{', '.join(_OPTIONS)}: load it yourself and give the model"
        )
    if (quantization := kwargs.pop("quantization_config", None)) is not None:
        if "quantization_config" in options:
            raise SteerError("quantization_config is given to the trainer and in model_init_kwargs; drop one")
        options["quantization_config"] = quantization
    options = {"dtype": dtype, "trust_remote_code": args.trust_remote_code, **options}
    if kwargs.get("processing_class") is None:
        kwargs["processing_class"] = load_tokenizer(
            model, revision=options.get("revision"), trust_remote_code=options["trust_remote_code"]
        )
    return load_model(model, **options)


def check_engine(model: nn.Module) -> None:
    """SteerError for a model whose vectors vLLM does not apply."""
    config: Any = model.config
    if getattr(config, "vision_config", None) is not None:
        raise SteerError(
            f"{config.model_type} is a vision-language model, which the engine does not steer; set "
            "use_vllm=false"
        )


@contextmanager
def already_loaded(args: SteeringTrainerConfig, reward_funcs: Sequence[Any]) -> Iterator[None]:
    """
    Inside, trl is not told of `model_init_kwargs`: it would warn that they are ignored. Reward models that
    are given by name are loaded with them, as in trl.
    """
    options = args.model_init_kwargs
    if not any(isinstance(function, str) for function in reward_funcs):
        args.model_init_kwargs = None
    try:
        yield
    finally:
        args.model_init_kwargs = options
