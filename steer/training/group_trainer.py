"""
`GroupGRPOTrainer`: trl's GRPOTrainer with a cheaper step, whatever is trained; subclasses say what that is.

What differs from trl is in small overridden methods: the reference policy is the same model with what was
trained put aside, prompts shared by a group are computed once, rows without an advantage are left out,
activations are held for some rows at a time, and samples do not depend on how many processes drew them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sized
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from math import ceil
from typing import Any, cast
from unittest.mock import patch

import torch
from torch import nn
from transformers import PreTrainedModel
from trl.models import unwrap_model_for_generation
from trl.trainer.grpo_trainer import RewardFunc

from steer import compat
from steer.errors import SteerError
from steer.generation import allocator, cpu
from steer.generation.sampler import Sampling, rollout, uniforms
from steer.generation.scoring import Scored, add_group_scoring
from steer.generation.verify import fast_attention, fast_paths, no_router_loss
from steer.stop_tokens import stop_token_ids
from steer.tasks.prompts import prompt_ids
from steer.tasks.rewards import guard
from steer.training.batches import check_padding, check_text, loss_mask, placed, rows_of
from steer.training.callbacks import watch
from steer.training.config import BATCH_TOKEN_LOSSES, ROW_LOSSES, SteeringGRPOConfig
from steer.training.loading import already_loaded
from steer.training.loss import group_advantages, importance_weights, total_rewards
from steer.training.memory import UpdateMemory, check_settings, memory_limit, row_sizes
from steer.training.sampling_trainer import SamplingGRPOTrainer


class _Reference:
    """Stands in trl's code for a reference model: the policy's own model, scored inside `reference()`."""


class GroupGRPOTrainer(SamplingGRPOTrainer):
    """
    Train a causal LM, or part of one, by group-based policy gradients (GRPO, arXiv 2402.03300; RLOO, arXiv
    2402.14740). What of `model` requires a gradient is trained; a subclass writes and reads it (`save_model`,
    `_load_from_checkpoint`) and puts it aside (`reference`).

    All arguments are trl's. Reward functions are checked: a wrong number of rewards, NaN or Inf raise
    SteerError.
    """

    num_generations_eval: int
    max_completion_length: int
    optimizer: torch.optim.Optimizer | None
    _unweighed: dict[str, Any] | None = None  # rows of another engine that the next scores weigh
    update_memory: UpdateMemory | None = None  # measured at the first update
    evaluated_rows = 0  # rows of trl's evaluation that were drawn in its earlier batches

    def __init__(
        self,
        model: PreTrainedModel,
        reward_funcs: RewardFunc | list[RewardFunc],
        args: SteeringGRPOConfig,
        **kwargs: Any,
    ):
        data = kwargs.get("train_dataset")
        wanted = args.generation_batch_size // args.num_generations
        if isinstance(data, Sized) and len(data) < wanted:
            raise SteerError(
                f"the data set has {len(data)} problems, a step takes {wanted}; give more problems, or lower "
                "per_device_train_batch_size or gradient_accumulation_steps"
            )
        check_text(data)
        functions = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]
        functions = [f if isinstance(f, (nn.Module, str)) else guard(f) for f in functions]
        here = args.generation_batch_size // args.world_size
        if here % args.num_generations and any(getattr(f, "whole_groups", False) for f in functions):
            raise SteerError(
                f"a reward compares the samples of a prompt, and a process has {here} rows, which is not a "
                f"multiple of num_generations={args.num_generations}; change per_device_train_batch_size or "
                "gradient_accumulation_steps"
            )
        # trl loads a second base model when beta != 0; ours is the same one without what was trained.
        beta, args.beta = args.beta, 0.0
        try:
            with already_loaded(args, functions):
                super().__init__(model=model, reward_funcs=functions, args=args, **kwargs)
        finally:
            args.beta = beta
        self.beta = beta
        if beta != 0.0:
            self.ref_model = cast(PreTrainedModel, _Reference())
        check_settings(args, "FSDP or DeepSpeed" if self._in_step() else None)
        if self.accelerator.device.type == "cpu":
            cpu.prepare()
        self._set_stop_tokens()
        self.model_accepts_loss_kwargs: bool = False
        add_group_scoring(self.model, self.temperature)
        watch(self)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        if self.accelerator.device.type == "cpu":
            allocator.return_freed_memory()  # of loading, and of answers before training
        return super().train(*args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        self.evaluated_rows = 0
        return super().evaluation_loop(*args, **kwargs)

    # ---- what is trained

    def reference(self) -> AbstractContextManager:
        """Inside, the model is the one that training began with."""
        raise NotImplementedError

    def scoring(self, prompt_length: int | torch.Tensor) -> AbstractContextManager:
        """
        Around each forward pass over rows whose first `prompt_length` columns, of all or of each (rows,), are
        prompts.
        """
        return nullcontext()

    # ---- sampling

    def _set_stop_tokens(self) -> None:
        """What ends a completion, for steer's sampler, `generate()` and vLLM alike."""
        base = self.accelerator.unwrap_model(self.model)
        self.eos_token_ids = list(stop_token_ids(self._tokenizer, base.generation_config))
        if self.use_vllm:
            vllm = self.vllm_generation
            vllm.generation_kwargs = {"stop_token_ids": self.eos_token_ids, **vllm.generation_kwargs}
        elif "eos_token_id" not in (self.args.generation_kwargs or {}):
            self.generation_config.eos_token_id = self.eos_token_ids
            self.generation_kwargs["eos_token_id"] = self.eos_token_ids

    def _tokenize_prompts(self, prompts: list) -> tuple:
        if isinstance(prompts[0], str):
            return prompt_ids(self._tokenizer, prompts), None, {}
        return super()._tokenize_prompts(prompts)

    def _generate_single_turn(
        self, prompt_ids: list[list[int]], images: Any, multimodal_fields: dict, *args: Any, **kwargs: Any
    ) -> tuple:
        # What only `generate()` can do goes there: trl's engines, tools, penalties, generation settings.
        special = (
            self.use_vllm
            or self.use_transformers_continuous_batching
            or multimodal_fields
            or self.tools
            or self.repetition_penalty != 1.0
            or self.args.generation_kwargs
            or self.args.cache_implementation
        )
        if special or not self.args.fast_sampler:
            base = self.accelerator.unwrap_model(self.model)
            if not (self.use_vllm or self.use_transformers_continuous_batching):
                check_padding(base, [len(ids) for ids in prompt_ids])
            # generate() fills in from the model's own generation config: a min_p or words to suppress would
            # change what is drawn, and not what is scored.
            own: AbstractContextManager = nullcontext()
            if not self.use_vllm:
                own = patch.object(base, "generation_config", self.generation_config)
            with own, fast_attention(base), cpu.head_inputs_copied(base):
                return super()._generate_single_turn(prompt_ids, images, multimodal_fields, *args, **kwargs)
        sampling = Sampling(
            self.max_completion_length,
            tuple(self.eos_token_ids),
            self.temperature,
            self.top_k,
            self.top_p,
            self.min_p,
        )
        training = self.model.training
        drawn = self.first_row if training else self.evaluated_rows
        first = drawn + self.accelerator.process_index * len(prompt_ids)
        rows = range(first, first + len(prompt_ids))
        # Evaluation draws from streams of its own.
        seed = self.args.seed if training else self.args.seed + (1 << 32)
        noise = uniforms(rows, self.max_completion_length, seed, self._step)
        with (
            unwrap_model_for_generation(
                self.model_wrapped, self.accelerator, self.args.ds3_gather_for_generation
            ) as model,
            self._dist.summon_full_params(self.model_wrapped, recurse=False),
            self.accelerator.autocast(),
        ):
            model.eval()
            together = self._any_process if self.sharded else None
            size = self.args.sample_rows or len(prompt_ids)
            ids: list[list[int]] = []
            for i in range(0, len(prompt_ids), size):
                part = slice(i, i + size)
                ids += [one.ids for one in rollout(model, prompt_ids[part], sampling, noise[part], together)]
            model.train(training)
        if not training:
            self.evaluated_rows += self.accelerator.num_processes * len(prompt_ids)
        return ids, None

    def _any_process(self, flag: bool) -> bool:
        return bool(self.accelerator.reduce(torch.tensor(float(flag), device=self.accelerator.device)) > 0)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        if not inputs:
            raise SteerError(
                "a process got no prompts: the data set is smaller than one batch; lower the batch size"
            )
        allocator.limit_kept_memory(self.accelerator.device)
        # To weigh what an engine drew, trl scores it in a pass of its own; the update's scores are the same.
        weighed = patch.object(self, "vllm_importance_sampling_correction", False)
        with weighed if self._one_update() else nullcontext():
            output = super()._generate_and_score_completions(inputs)
        if self.multi_objective_aggregation == "sum_then_normalize":
            rewards = total_rewards(self._scores, self.reward_weights.to(self._scores.device))
            group = self.num_generations if self.model.training else self.num_generations_eval
            advantages = group_advantages(rewards, group, self.args)
            own = self.accelerator.process_index * len(inputs)
            output["advantages"] = advantages[own : own + len(inputs)]
            # As long as a generation: what does not fit has left it.
            logged = cast(deque[float], self._logs["advantages"])
            for _ in range(min(len(advantages), len(logged))):
                logged.pop()
            logged.extend(advantages.tolist())
        return output

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self._scores = super()._calculate_rewards(*args, **kwargs)  # (rows of all processes, functions)
        return self._scores

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        # trl shuffles a generation's rows before it cuts them into micro-batches. When all enter one update
        # the order means nothing, and rows of one prompt stay together so that they can share it.
        if not self._one_update():
            return super()._prepare_inputs(generation_batch)
        if self._step % self.args.steps_per_generation == 0 or self._buffered_inputs is None:
            batch = self._generate_and_score_completions(generation_batch)
            size = self.args.per_device_train_batch_size
            self._buffered_inputs = [
                rows_of(batch, slice(i, i + size)) for i in range(0, len(batch["prompt_ids"]), size)
            ]
        return self._buffered_inputs[self._step % self.args.steps_per_generation]

    def _one_update(self) -> bool:
        """Whether a generation's rows all enter one update, the next."""
        aligned = self.args.steps_per_generation == self.args.gradient_accumulation_steps
        return self.model.training and aligned and self.num_iterations == 1

    # ---- scoring and loss

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits_to_keep: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple:
        if isinstance(model, _Reference):
            with self.reference():
                return self._score(self.model, input_ids, attention_mask, logits_to_keep, *args, **kwargs)
        scored = self._score(model, input_ids, attention_mask, logits_to_keep, *args, **kwargs)
        self._scored = scored[0].detach()
        if self._unweighed is not None:  # trl reads the ratio when it has scored
            weights, _ = importance_weights(
                self._scored,
                self._unweighed["sampling_per_token_logps"],
                loss_mask(self._unweighed),
                self.args,
            )
            self._unweighed["importance_sampling_ratio"] = weights
        return scored

    def _score(
        self,
        model: Any,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits_to_keep: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple:
        prompt = input_ids.shape[1] - logits_to_keep
        base = self.accelerator.unwrap_model(self.model)
        options = fast_paths(base).scoring()
        others = {k for k, v in kwargs.items() if v is not None and k not in _PLAIN_ARGUMENTS}
        # Under checkpointing the backward pass runs the layers again, outside of this block.
        recomputes = compat.recomputes_activations(base)
        with nullcontext() if recomputes else fast_attention(base):
            if others or kwargs.get("compute_aux_loss"):  # images, a router's loss: trl's own way
                check_padding(base, attention_mask[:, :prompt].sum(1).tolist())
                if reason := fast_paths(base).head or (not others and no_router_loss(base)):
                    raise SteerError(
                        f"{type(base).__name__}: {reason}, and images and a router's loss are computed by "
                        "trl alone; set router_aux_loss_coef=0 and leave images out"
                    )
                with self.scoring(prompt):
                    return super()._get_per_token_logps_and_entropies(
                        model if others else partial(placed, base, model),
                        input_ids,
                        attention_mask,
                        logits_to_keep,
                        *args,
                        **kwargs,
                    )
            options["share"] &= self.args.share_prompts
            options["share"] &= not recomputes and not self.sharded
            size = kwargs.get("batch_size")  # none in an update, which is cut in `_parts`
            if size and options["share"]:  # whole groups: a part reads its prompts itself
                group = self.num_generations if self.model.training else self.num_generations_eval
                size = ceil(size / group) * group
            with nullcontext() if recomputes else self._recomputing(input_ids, attention_mask, prompt):
                parts = [
                    self._score_rows(model, ids, mask, prompt, options)
                    for ids, mask in zip(
                        input_ids.split(size or len(input_ids)),
                        attention_mask.split(size or len(input_ids)),
                        strict=True,
                    )
                ]
        entropy = torch.cat([part.entropy for part in parts]) if kwargs.get("compute_entropy") else None
        return torch.cat([part.log_probs for part in parts]), entropy, None

    def _score_rows(
        self, model: Any, ids: torch.Tensor, mask: torch.Tensor, prompt: int, options: dict[str, bool]
    ) -> Scored:
        lengths = mask[:, :prompt].sum(1)
        # Columns of padding that all these prompts share do nothing.
        spare = prompt - int(lengths.max())
        ids, mask, prompt = ids[:, spare:], mask[:, spare:], prompt - spare
        # Rows that are read whole are padded on the right.
        with self.scoring(prompt if options["share"] else lengths), self.accelerator.autocast():
            return model(
                score_group=True,
                prompt_ids=ids[:, :prompt],
                prompt_mask=mask[:, :prompt],
                completion_ids=ids[:, prompt:],
                completion_mask=mask[:, prompt:],
                **options,
            )

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        kept = inputs
        if self._zero_advantage_is_zero_gradient():
            active = inputs["advantages"] != 0
            # trl gathers numbers row by row: every process keeps as many rows as the one that needs most.
            count = max(1, int(self.accelerator.gather(active.sum()).max()))
            if count < len(active):
                kept = rows_of(inputs, active.int().argsort(descending=True, stable=True)[:count])
        *earlier, last = self._parts(kept)
        done = torch.zeros((), device=self.accelerator.device)
        for part in earlier:  # their graphs are gone before the next one's is made
            with self.accelerator.no_sync(model):
                loss = self._share(part, inputs) * self._loss(model, part)
                with torch.autocast(loss.device.type, enabled=False):
                    self.accelerator.backward(loss)
            done += loss.detach()
        return self._share(last, inputs) * self._loss(model, last) + done

    def _parts(self, inputs: dict[str, Any]) -> list[dict[str, Any]]:
        """
        The rows in parts of about equal size, none above `update_rows` or `update_memory`, where that changes
        no gradient.
        """
        if not (self.model.training and self._one_by_one()) or self._in_step():
            return [inputs]
        count = len(inputs["advantages"])
        most = self.args.update_rows or count
        if compat.recomputes_activations(self.accelerator.unwrap_model(self.model)):
            size = ceil(count / ceil(count / most))  # what a layer keeps is not known
            parts = [slice(i, i + size) for i in range(0, count, size)]
        else:
            ids, prompt, mask = (inputs[k] for k in ("prompt_ids", "prompt_mask", "completion_mask"))
            rows = row_sizes(ids, prompt, mask, self.args.share_prompts)
            if self.accelerator.num_processes > 1:  # all of them cut in the same way
                every = cast(torch.Tensor, self.accelerator.gather(rows.to(self.accelerator.device)))
                rows = every.view(-1, *rows.shape).amax(0).cpu()
            parts = self._bounded().parts(rows, most)
        return [rows_of(inputs, part) for part in parts]

    def _in_step(self) -> bool:
        """Whether every process runs as many backward passes as the others."""
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    def _bounded(self) -> UpdateMemory:
        if self.update_memory is None:
            base, args = self.accelerator.unwrap_model(self.model), self.args
            options = fast_paths(base).scoring()

            def score(tokens: int) -> Scored:
                ids = torch.full((1, 1 + tokens), 3, device=self.accelerator.device)
                with torch.enable_grad(), fast_attention(base):
                    return self._score_rows(base, ids, torch.ones_like(ids), 1, options)

            limit = torch.tensor(
                [memory_limit(self.accelerator.device, args.update_memory)], dtype=torch.float64
            )
            if self.accelerator.num_processes > 1:  # that of the smallest machine: all cut in the same way
                limit = cast(torch.Tensor, self.accelerator.gather(limit.to(self.accelerator.device)))
            self.update_memory = UpdateMemory(
                base, score, args.max_completion_length, float(limit.min()), args.recompute_mlps
            )
        return self.update_memory

    def _recomputing(self, ids: torch.Tensor, mask: torch.Tensor, prompt: int) -> AbstractContextManager:
        if not (torch.is_grad_enabled() and self.model.training) or self._in_step():
            return nullcontext()
        rows = row_sizes(ids[:, :prompt], mask[:, :prompt], mask[:, prompt:], self.args.share_prompts)
        return self._bounded().recomputing(rows)

    def _share(self, part: dict[str, Any], whole: dict[str, Any]) -> float | torch.Tensor:
        """
        The weight of a part's loss: trl's losses are means over the rows or tokens they are given, or divide
        by the tokens of the whole step.
        """
        if self.loss_type in ROW_LOSSES:
            return len(part["advantages"]) / len(whole["advantages"])
        if self.loss_type in BATCH_TOKEN_LOSSES:
            return loss_mask(part).sum() / loss_mask(whole).sum().clamp(min=1)
        return 1.0

    def _loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        if self.use_vllm and self.vllm_importance_sampling_correction and self._one_update():
            self._unweighed = inputs = dict(inputs)
        try:
            return super()._compute_loss(model, inputs)
        finally:
            self._unweighed = None

    def _zero_advantage_is_zero_gradient(self) -> bool:
        wanted = self.args.skip_zero_advantage and self.model.training
        return wanted and self.beta == 0.0 and self._one_by_one()

    def _one_by_one(self) -> bool:
        """Whether a row's part of the loss does not depend on which other rows are computed with it."""
        return (
            not self._entropy_bonus_enabled and not self.aux_loss_enabled and self.top_entropy_quantile == 1.0
        )


_PLAIN_ARGUMENTS = ("batch_size", "compute_entropy", "compute_aux_loss")
