"""
`SteeringTrainerConfig`: the settings of every trainer of vectors, to be put before a config of trl.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from steer.errors import SteerError
from steer.training.settings import check, check_ranges

if TYPE_CHECKING:
    from transformers import TrainingArguments
else:
    TrainingArguments = object  # a mixin: it comes before a config of trl

# Settings that are mappings, and what one is like.
_MAPPINGS = {
    "chat_template_kwargs": "variables of the chat template, such as {enable_thinking: false}",
    "generation_kwargs": "arguments of the sampler, such as {presence_penalty: 1.0}",
    "lr_scheduler_kwargs": "arguments of the scheduler, such as {num_cycles: 1}",
    "gradient_checkpointing_kwargs": "arguments of checkpointing, such as {use_reentrant: false}",
}
# Floors of a schedule that transformers divides by `learning_rate`, whichever rate a layer has.
_FLOORS = {"cosine_with_min_lr": "min_lr", "cosine_warmup_with_min_lr": "min_lr", "polynomial": "lr_end"}
_RATE = r"(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_PART = re.compile(rf"(\d+)(?:-(\d+))?:({_RATE})")
_GEOMETRIC = re.compile(rf"geometric:({_RATE}):({_RATE})")


@dataclass
class SteeringTrainerConfig(TrainingArguments):
    """
    Settings of every trainer of vectors (`SteeringTrainerMixin`), with defaults that fit them: vectors want
    rates about a thousand times those of a full fine-tune, and so few numbers need no gradient checkpointing.

    It is a mixin. Put it before the config of a trainer of trl:

        @dataclass
        class SteeringKTOConfig(SteeringTrainerConfig, KTOConfig):
            pass

    Raises:
        SteerError: a setting out of range, one that no trainer reads, or rates that cannot be read.
    """

    # Settings of trl that this trainer does not read, or that break something without a word, and why.
    ignored: ClassVar[Mapping[str, str]] = {}

    learning_rate: float = field(
        default=1e-3, metadata={"help": "Learning rate of every vector that `lr_by_layer` does not name."}
    )
    lr_by_layer: str | None = field(
        default=None,
        metadata={
            "help": "Learning rates of single layers: '0:0.003,3-7:0.007', or 'geometric:FIRST:LAST' "
            "for equal ratios "
            "from the first steered layer to the last. Late layers need rates up to 30 times those of "
            "early ones."
        },
    )
    max_grad_norm: float = field(
        default=2.0, metadata={"help": "Clip the norm of all gradients together; 0 is off."}
    )
    lr_scheduler_type: str = field(
        default="constant_with_warmup", metadata={"help": "Schedule of the learning rate."}
    )
    warmup_steps: float = field(
        default=0.03, metadata={"help": "Warm-up steps, or a share of all steps when below 1."}
    )
    logging_steps: float = field(default=1, metadata={"help": "Log every this many updates."})
    router_aux_loss_coef: float | None = field(
        default=0.0,
        metadata={
            "help": "Weight of the load-balancing loss of a mixture of experts, whose router is frozen here; "
            "null in a config: the model's own weight, as in trl."
        },
    )
    gradient_checkpointing: bool = field(
        default=False,
        metadata={"help": "Recompute activations in the backward pass: less memory, more time."},
    )
    bf16: bool = field(
        default=False,
        metadata={"help": "Autocast to bfloat16. Not needed when the base model is loaded in bfloat16."},
    )
    disable_tqdm: bool | None = field(default=False, metadata={"help": "No progress bar."})
    save_steps: float = field(default=10, metadata={"help": "Write a checkpoint every this many updates."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Keep this many checkpoints."})

    if TYPE_CHECKING:  # of all trl's configs, which read JSON
        model_init_kwargs: dict[str, Any] | None = field(default=None)
        trust_remote_code: bool = field(default=False)

    def __post_init__(self) -> None:
        check_ranges(self)
        self._name_checkpointing()
        super().__post_init__()
        check(self, self.ignored)
        for strategy in ("checkpoint", "all_checkpoints"):
            if self.hub_strategy == strategy:
                raise SteerError(
                    f"hub_strategy={strategy} is not supported: what is trained is uploaded, and not "
                    "the optimizer's state; set every_save, or end"
                )
        for name, example in _MAPPINGS.items():
            if not isinstance(value := getattr(self, name, None), (dict, type(None))):
                raise SteerError(
                    f"{name}={value!r} is not a mapping; give {example} (on the command line as JSON)"
                )
        if self.lr_by_layer is not None:
            self.lr_by_layer = str(self.lr_by_layer).replace(" ", "")
            if geometric := _GEOMETRIC.fullmatch(self.lr_by_layer):
                if not float(geometric[1]) or not float(geometric[2]):
                    raise SteerError(
                        f"lr_by_layer={self.lr_by_layer!r} starts or ends at zero, which has no ratio; "
                        "give rates above zero"
                    )
            else:
                for part in self.lr_by_layer.split(","):
                    match = _PART.fullmatch(part)
                    if not match or int(match[2] or match[1]) < int(match[1]):
                        raise SteerError(
                            f"lr_by_layer={self.lr_by_layer!r} is not readable at {part!r}; write "
                            "'0:0.003,3-7:0.007' "
                            "or 'geometric:0.003:0.1'"
                        )
            for schedule, floor in _FLOORS.items():
                if self.lr_scheduler_type == schedule and floor in (self.lr_scheduler_kwargs or {}):
                    raise SteerError(
                        f"lr_scheduler_kwargs has {floor}, which is a floor of learning_rate alone, beside "
                        "lr_by_layer; give min_lr_rate, a share of each layer's rate, with "
                        "lr_scheduler_type=cosine_with_min_lr"
                    )

    def _name_checkpointing(self) -> None:
        """
        Give gradient checkpointing the name that later versions of transformers have for it too: they warn of
        the old one, also where it is set by a default.
        """
        for old in ("gradient_checkpointing", "gradient_checkpointing_kwargs"):
            new = old.replace("gradient", "activation")
            if hasattr(self, new) and getattr(self, new) is None:
                setattr(self, new, getattr(self, old))

    def layer_rates(self, layers: list[int], num_hidden_layers: int) -> dict[int | None, float]:
        """
        The learning rate of each of `layers`, by layer. One table may serve runs of single layers: a layer
        of the model that is not steered may be named, one that the model (of `num_hidden_layers`) lacks
        raises SteerError.
        """
        rates: dict[int | None, float] = dict.fromkeys(layers, self.learning_rate)
        if self.lr_by_layer is None:
            return rates
        if geometric := _GEOMETRIC.fullmatch(self.lr_by_layer):
            first, last = float(geometric[1]), float(geometric[2])
            steps = max(len(layers) - 1, 1)
            return {layer: first * (last / first) ** (i / steps) for i, layer in enumerate(layers)}
        for part in self.lr_by_layer.split(","):
            match = _PART.fullmatch(part)
            assert match
            for layer in range(int(match[1]), int(match[2] or match[1]) + 1):
                if layer >= num_hidden_layers:
                    raise SteerError(
                        f"lr_by_layer names layer {layer}; the model has layers 0 to {num_hidden_layers - 1}"
                    )
                rates[layer] = float(match[3])
        return {layer: rates[layer] for layer in layers}
