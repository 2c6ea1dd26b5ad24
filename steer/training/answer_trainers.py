"""
`SteeringSFTTrainer` and `SteeringDPOTrainer`: vectors trained on given answers, alone or in pairs of a better
and a worse one.
"""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel
from trl import DPOTrainer, SFTTrainer

from steer.config import SteeringConfig
from steer.errors import SteerError
from steer.training.answer_configs import SteeringDPOConfig, SteeringSFTConfig
from steer.training.batches import check_text
from steer.training.steering_mixin import SteeringTrainerMixin


class SteeringSFTTrainer(SteeringTrainerMixin, SFTTrainer):
    """
    Train steering vectors by supervised learning: trl's `SFTTrainer`, with all that `SteeringTrainerMixin`
    does.

        trainer = SteeringSFTTrainer(model, SteeringSFTConfig("out"), SteeringConfig(), train_dataset=data,
                                     processing_class=tokenizer)

    Args:
        model: a transformers causal LM, or its name (`SteeringTrainerMixin`).
        args: the settings.
        steering: the vectors to attach; None where the model has them, or for the defaults.
        kwargs: all other arguments of trl's `SFTTrainer`. `train_dataset` has one of its forms: with columns
            `prompt` and `completion` the loss is on the completion alone.

    Raises:
        SteerError: for a model that cannot be loaded or steered, for settings that cannot work and for data
            with images.
    """

    _tag_names = ["trl", "sft", "steering-vectors"]  # noqa: RUF012

    def __init__(
        self,
        model: PreTrainedModel | str,
        args: SteeringSFTConfig,
        steering: SteeringConfig | None = None,
        **kwargs: Any,
    ):
        check_text(kwargs.get("train_dataset"))
        super().__init__(model, args, steering, **kwargs)

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        made = super()._prepare_dataset(dataset, *args, **kwargs)
        positions = self.vectors.config.positions
        if positions != "all" and (row := next(iter(made), None)) and row["labels"][0] != -100:
            raise SteerError(
                f"positions={positions!r} needs to know where a prompt ends, and the loss is on a text from "
                "its first token on; give data with columns 'prompt' and 'completion' and leave "
                "completion_only_loss out, or set positions='all'"
            )
        return made


class SteeringDPOTrainer(SteeringTrainerMixin, DPOTrainer):
    """
    Train steering vectors by direct preference optimization (arXiv 2305.18290): trl's `DPOTrainer`, with all
    that `SteeringTrainerMixin` does. The reference model is the same model with its vectors off, and no
    second one is loaded.

    Args:
        model: a transformers causal LM, or its name (`SteeringTrainerMixin`).
        args: the settings.
        steering: the vectors to attach; None where the model has them, or for the defaults.
        kwargs: all other arguments of trl's `DPOTrainer` but `ref_model`. `train_dataset` has columns
            `prompt`, `chosen` and `rejected`, as text or chats; or token ids in `prompt_ids`, `chosen_ids`
            and `rejected_ids`, which are taken as they are.

    Raises:
        SteerError: for a model that cannot be loaded or steered, for settings that cannot work and for data
            with images.
    """

    _tag_names = ["trl", "dpo", "steering-vectors"]  # noqa: RUF012

    def __init__(
        self,
        model: PreTrainedModel | str,
        args: SteeringDPOConfig,
        steering: SteeringConfig | None = None,
        **kwargs: Any,
    ):
        check_text(kwargs.get("train_dataset"))
        super().__init__(model, args, steering, **kwargs)

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(dataset, Dataset) and "chosen_ids" in dataset.column_names:
            return dataset
        return super()._prepare_dataset(dataset, *args, **kwargs)
