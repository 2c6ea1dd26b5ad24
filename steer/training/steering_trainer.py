"""
`SteeringGRPOTrainer`: group-based policy gradients for vectors on a frozen model.

The reference policy is the same model with its vectors off, each layer may have a learning rate of its own,
and a checkpoint is an artifact plus optimizer state: the base model is never written.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, cast

import torch
from huggingface_hub import HfApi
from torch import nn
from transformers import PreTrainedModel, Trainer
from trl.trainer.grpo_trainer import RewardFunc

from steer import artifact, compat
from steer.config import SteeringConfig
from steer.engine.logprobs import logprobs_mode
from steer.errors import SteerError
from steer.identity import tokenizer_checksum
from steer.training.batches import loss_mask
from steer.training.callbacks import VectorLog
from steer.training.config import SteeringGRPOConfig
from steer.training.group_trainer import GroupGRPOTrainer
from steer.training.loading import check_engine, load_policy
from steer.training.loss import importance_weights, limited_shares
from steer.training.mismatch import MismatchCheck, mismatch
from steer.vectors import SteeringVectors, attach, attached, detach

log = logging.getLogger(__name__)


class SteeringGRPOTrainer(GroupGRPOTrainer):
    """
    Train steering vectors by group-based policy gradients (GRPO, arXiv 2402.03300; RLOO, arXiv 2402.14740).

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

    def __init__(
        self,
        model: PreTrainedModel | str,
        reward_funcs: RewardFunc | list[RewardFunc],
        args: SteeringGRPOConfig,
        steering: SteeringConfig | None = None,
        **kwargs: Any,
    ):
        if kwargs.get("peft_config") is not None:
            raise SteerError(
                "steering vectors are trained on a frozen base; drop peft_config or use trl's GRPOTrainer"
            )
        policy = load_policy(model, args, kwargs)
        has_vectors = "steering_vectors" in policy.__dict__
        if has_vectors and steering is not None:
            raise SteerError(
                "the model already has steering vectors; pass no `steering`, or steer.detach(model) first"
            )
        _still(policy)
        self.vectors: SteeringVectors = attached(policy) if has_vectors else attach(policy, steering)
        try:
            with compat.trainable_when_quantised(policy), self._engine(args):
                super().__init__(policy, reward_funcs, args, **kwargs)
        except BaseException:
            if not has_vectors:
                detach(policy)
            raise
        self.vectors.config.tokenizer_checksum = tokenizer_checksum(self._tokenizer)
        self.add_callback(VectorLog(self.vectors, self._metrics["train"]))
        self.mismatch_check = MismatchCheck(args, self.accelerator)
        if self.use_vllm and logprobs_mode(args) is not None:
            self.add_callback(self.mismatch_check)

    def reference(self) -> AbstractContextManager:
        """Inside, the vectors are off."""
        return self.vectors.disabled()

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

    def _loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        loss = super()._loss(model, inputs)
        if self.use_vllm:
            from steer.engine.rollout import VectorGeneration

            engine = cast(VectorGeneration, self.vllm_generation)
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

    # ---- optimizer, checkpoints

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            trained = [p for p in (self.model if model is None else model).parameters() if p.requires_grad]
            self.optimizer = make_optimizer(self.args, self.vectors, trained)
        return self.optimizer

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the artifact; the base model is never written."""
        tensors = self.vectors.tensors()  # every process takes part in the gathering of sharded ones
        vectors = artifact.Artifact(self.vectors.config, tensors)
        folder = output_dir or self.args.output_dir
        if self.args.should_save:
            artifact.write(folder, vectors)
            if self.args.push_to_hub and not _internal_call:
                self._push(folder)

    def _push(self, folder: str) -> None:
        HfApi().upload_folder(
            repo_id=cast(str, self.hub_model_id),  # `init_hf_repo` has set it
            folder_path=folder,
            allow_patterns=[artifact.CONFIG_FILE, artifact.TENSOR_FILE, artifact.CARD_FILE],
            commit_message="Steering vectors",
            token=self.args.hub_token,
            revision=self.args.hub_revision,
        )

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self.args.should_save and self.args.hub_strategy != "end":
            self._push(checkpoint_folder)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        with compat.base_left_out():
            super()._save_optimizer_and_scheduler(output_dir)

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> tuple:
        with compat.base_left_out() if self.is_deepspeed_enabled else nullcontext():
            return super()._prepare_for_training(*args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.vectors.set_tensors(artifact.read(resume_from_checkpoint).tensors)


def _still(model: nn.Module) -> None:
    """
    Keep routers with noise in evaluation mode. In training mode they choose other experts than those that
    sampled, to spread the load over experts that learn; these are frozen.
    """
    noisy = [
        module
        for module in model.modules()
        if any(
            "jitter" in name and isinstance(value, float) and value for name, value in vars(module).items()
        )
    ]
    for module in noisy:
        module.eval()
        module.__dict__["train"] = partial(_unchanged, module)
    if noisy:
        log.info("the noise of %d routers in training is off, since the experts are frozen", len(noisy))


def _unchanged(module: nn.Module, mode: bool = True) -> nn.Module:
    return module


def make_optimizer(
    args: SteeringGRPOConfig, vectors: SteeringVectors, trained: Sequence[nn.Parameter]
) -> torch.optim.Optimizer:
    """The optimizer that `args` asks for, with each layer's rate. `trained`: the parameters of `vectors`."""
    by_layer = args.layer_rates(vectors.layers, vectors.num_hidden_layers)
    rates = [by_layer.get(i, args.learning_rate) for i in vectors.parameter_layers()]
    kind, options = Trainer.get_optimizer_cls_and_kwargs(args, cast(PreTrainedModel, vectors.model))
    groups = [{"params": [p], "lr": rate} for p, rate in zip(trained, rates, strict=True)]
    return kind(groups, **{**options, "weight_decay": args.weight_decay})
