"""`SteeringGRPOTrainer`: group-based policy gradients for vectors on a frozen model."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import PreTrainedModel
from trl.trainer.grpo_trainer import RewardFunc

from steer.config import SteeringConfig
from steer.engine.logprobs import logprobs_mode
from steer.errors import SteerError
from steer.training.batches import loss_mask
from steer.training.config import SteeringGRPOConfig
from steer.training.group_trainer import GroupGRPOTrainer
from steer.training.loading import check_engine
from steer.training.loss import importance_weights, limited_shares
from steer.training.mismatch import MismatchCheck, mismatch
from steer.training.steering_mixin import SteeringTrainerMixin
from steer.training.tool_calls import check_tools
from steer.training.trainer_config import SteeringTrainerConfig
from steer.vectors import attached

if TYPE_CHECKING:
    from steer.engine.rollout import VectorGeneration


class SteeringGRPOTrainer(SteeringTrainerMixin, GroupGRPOTrainer):
    """
    Train steering vectors by group-based policy gradients (GRPO, arXiv 2402.03300; RLOO, arXiv 2402.14740).
    What it shares with other trainers is in `SteeringTrainerMixin`.

    Args:
        model: a transformers causal LM, with vectors attached or to be attached; or its name, as
            `steer.models.load_model` takes it. By name it is loaded in the precision it was saved in, unless
            `args.model_init_kwargs` says otherwise (`{"dtype": "bfloat16", "revision": "main"}`), and with
            its tokenizer where no `processing_class` is given.
        reward_funcs: as trl's. What they return is checked: a wrong number of rewards, NaN or Inf raise
            SteerError.
        args: the settings.
        steering: the vectors to attach; None where the model has them, or for the defaults.
        kwargs: all other arguments of trl's `GRPOTrainer`.

    Raises:
        SteerError: for a model that cannot be loaded or steered, and for settings that cannot work.
    """

    _tag_names = ["trl", "grpo", "steering-vectors"]  # noqa: RUF012

    args: SteeringGRPOConfig
    uses_fused_head = False  # its own scoring can do without

    def __init__(
        self,
        model: PreTrainedModel | str,
        reward_funcs: RewardFunc | list[RewardFunc],
        args: SteeringGRPOConfig,
        steering: SteeringConfig | None = None,
        **kwargs: Any,
    ):
        config = steering or SteeringConfig()
        if not isinstance(model, str) and "steering_vectors" in model.__dict__:
            config = attached(model).config
        check_tools(kwargs, args.use_vllm, config.positions)
        super().__init__(model, args, steering, reward_funcs=reward_funcs, **kwargs)
        self.mismatch_check = MismatchCheck(args, self.accelerator)
        if self.use_vllm and logprobs_mode(args) is not None:
            self.add_callback(self.mismatch_check)

    def _constructing(self, args: SteeringTrainerConfig) -> AbstractContextManager:
        return self._engine(cast(SteeringGRPOConfig, args))

    def scoring(self, prompt_length: int | torch.Tensor) -> AbstractContextManager:
        return self.vectors.prompt_length(prompt_length)

    # ---- an engine that is sent the vectors alone

    def _engine(self, args: SteeringGRPOConfig) -> AbstractContextManager:
        """Inside, `use_vllm` means an engine that is sent the vectors alone."""
        if not args.use_vllm:
            return nullcontext()
        check_engine(self.vectors.model)
        from steer.engine.rollout import vector_rollouts

        return vector_rollouts(self.vectors, args)

    def _generate(self, prompts: list) -> tuple:
        if self.use_vllm:
            self._push_changed()
        return super()._generate(prompts)

    def _push_changed(self) -> None:
        """Let trl push vectors that changed without an update; it pushes at another `global_step` alone."""
        if off := self.vectors._off():
            raise SteerError(
                f"the engine samples with the vectors that it was sent, and they are off here ({off}): "
                "sample outside of that block, or set vectors.scale = 0 for samples of the base model"
            )
        if self.state.global_step == self._last_loaded_step:
            engine = cast("VectorGeneration", self.vllm_generation)
            if self._any_process(engine.outdated()):
                self._last_loaded_step = -1

    def _loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        loss = super()._loss(model, inputs)
        if self.use_vllm:
            engine = cast("VectorGeneration", self.vllm_generation)
            training = self.model.training
            metrics: dict[str, float] = {"sync_seconds": engine.sync_seconds, "sync_bytes": engine.sync_bytes}
            if engine.logprobs_mode is not None:
                mask, sampled = loss_mask(inputs), inputs["sampling_per_token_logps"]
                weighed = inputs.get("old_per_token_logps", self._scored)  # as when they were sampled
                compare = self.mismatch_check.add if training else mismatch
                metrics |= compare(weighed, sampled, mask)
                if self.vllm_importance_sampling_correction:
                    _, limited = importance_weights(weighed, sampled, mask, self.args)
                    metrics |= limited_shares(limited, mask)
            for name, value in metrics.items():
                self._metrics["train" if training else "eval"][f"engine/{name}"].append(value)
        return loss
