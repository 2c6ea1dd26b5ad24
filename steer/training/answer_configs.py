"""`SteeringSFTConfig` and `SteeringDPOConfig`: trl's settings with defaults that fit vectors."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from trl import DPOConfig, SFTConfig

from steer.errors import SteerError
from steer.training.settings import IGNORED_BY_DPO, IGNORED_BY_SFT
from steer.training.trainer_config import SteeringTrainerConfig

if TYPE_CHECKING:
    from transformers import TrainingArguments
else:
    TrainingArguments = object  # a mixin: it comes before a config of trl


@dataclass
class _AnswerSettings(TrainingArguments):
    """What `steer train` reads where given answers are trained on: how the model is asked and scored."""

    max_completion_length: int = field(
        default=256,
        metadata={
            "help": "Most tokens of an answer to a held-out or validation problem; of `steer train` alone. "
            "max_length limits what is trained on."
        },
    )
    chat_template_kwargs: dict | str | None = field(
        default=None,
        metadata={
            "help": "Variables of the chat template, as JSON: '{\"enable_thinking\": false}'; of `steer "
            "train` alone."
        },
    )

    if TYPE_CHECKING:
        output_dir: str = field(default="trainer_output")


@dataclass
class SteeringSFTConfig(_AnswerSettings, SteeringTrainerConfig, SFTConfig):  # type: ignore[misc]
    """
    All of trl's `SFTConfig`, with defaults that fit vectors (`SteeringTrainerConfig`).
    """

    _argument_group_name = "training"
    _VALID_DICT_FIELDS: ClassVar[list[str]] = [*SFTConfig._VALID_DICT_FIELDS, "chat_template_kwargs"]  # type: ignore[misc]
    ignored: ClassVar = IGNORED_BY_SFT
    method: ClassVar = "sft"


@dataclass
class SteeringDPOConfig(_AnswerSettings, SteeringTrainerConfig, DPOConfig):  # type: ignore[misc]
    """
    All of trl's `DPOConfig`, with defaults that fit vectors (`SteeringTrainerConfig`). The reference model is
    the same model with its vectors off.
    """

    _argument_group_name = "training"
    _VALID_DICT_FIELDS: ClassVar[list[str]] = [*DPOConfig._VALID_DICT_FIELDS, "chat_template_kwargs"]  # type: ignore[misc]
    ignored: ClassVar = IGNORED_BY_DPO
    method: ClassVar = "dpo"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beta == 0:
            raise SteerError("beta=0 leaves no gradient to train by; give a value above 0, such as 0.1")
