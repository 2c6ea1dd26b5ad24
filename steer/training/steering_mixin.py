"""
`SteeringTrainerMixin`: any trainer of trl, for vectors on a frozen model.

The reference model is the same model with its vectors off, each layer may have a learning rate of its own,
and a checkpoint is an artifact plus optimizer state: the base model is never written.
"""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel, Trainer

from steer import artifact, compat
from steer.config import SteeringConfig
from steer.errors import SteerError
from steer.generation import allocator, cpu
from steer.generation.scoring import add_group_scoring
from steer.generation.verify import fast_paths
from steer.identity import describe, tokenizer_checksum
from steer.stop_tokens import stop_token_ids
from steer.training.callbacks import VectorLog, watch
from steer.training.loading import already_loaded, load_policy
from steer.training.resuming import ResumableMixin
from steer.training.trainer_config import SteeringTrainerConfig
from steer.vectors import SteeringVectors, attach, attached, detach

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)


class SteeringTrainerMixin(ResumableMixin):
    """
    Makes a trainer of trl train steering vectors. Put it before the trainer, and `SteeringTrainerConfig`
    before its config:

        @dataclass
        class SteeringKTOConfig(SteeringTrainerConfig, KTOConfig):
            pass

        class SteeringKTOTrainer(SteeringTrainerMixin, KTOTrainer):
            pass

        trainer = SteeringKTOTrainer(model, SteeringKTOConfig("out"), SteeringConfig(), train_dataset=data,
                                     processing_class=tokenizer)

    What it does:

    - attaches the vectors, and freezes everything else;
    - a trainer that takes a `ref_model` gets the same model with its vectors off: no second model is loaded;
    - `save_model` and checkpoints write the artifact, never the base model; a run resumes from them;
    - the optimizer has the learning rates of `lr_by_layer`;
    - every log has the norm and the gradient of each layer's vector;
    - vectors of other `positions` than 'all' are told where each row's prompt ends, by the `completion_mask`
      or the `labels` of a batch. Override `prompt_lengths` for a trainer whose batches have neither.

    Args:
        model: a transformers causal LM, with vectors attached or to be attached; or its name, as
            `steer.models.load_model` takes it. By name it is loaded in the precision it was saved in, unless
            `args.model_init_kwargs` says otherwise (`{"dtype": "bfloat16", "revision": "main"}`), and with
            its tokenizer where no `processing_class` is given.
        args: the settings.
        steering: the vectors to attach; None where the model has them, or for the defaults.
        kwargs: all other arguments of the trainer.

    Raises:
        SteerError: for a model that cannot be loaded or steered, and for settings that cannot work.
    """

    args: SteeringTrainerConfig
    ref_model: Any
    vectors: SteeringVectors
    eos_token_ids: list[int]
    # Whether `save_model` uploads with `push_to_hub`. A recipe does so itself, when the scores are known.
    uploads_saved = True
    # How many updates made the vectors, where they were loaded and not trained since; 0: it is not known.
    _loaded: int | None = None
    # Whether the trainer computes log-probabilities by trl's fused LM head, which some models cannot take.
    uses_fused_head = True

    def __init__(
        self,
        model: PreTrainedModel | str,
        args: SteeringTrainerConfig,
        steering: SteeringConfig | None = None,
        **kwargs: Any,
    ):
        trainer = type(self).__name__
        if kwargs.get("peft_config") is not None:
            raise SteerError(f"{trainer} trains vectors on a frozen base; drop peft_config")
        if not isinstance(args, SteeringTrainerConfig):
            raise SteerError(
                f"args is a {type(args).__name__}, and {trainer} needs the settings of vectors too; derive "
                "its config from SteeringTrainerConfig and that of trl"
            )
        policy = load_policy(model, args, kwargs)
        has_vectors = "steering_vectors" in policy.__dict__
        if has_vectors and steering is not None:
            raise SteerError(
                "the model already has steering vectors; pass no `steering`, or steer.detach(model) first"
            )
        _still(policy)
        self.vectors = attached(policy) if has_vectors else attach(policy, steering)
        self.vectors.config.refuse_condition("training")
        if has_vectors:  # loaded, they name the base that they were made for
            self.vectors.config = replace(self.vectors.config, **describe(policy))
        try:
            _check_trained(policy, self.vectors)
            reference: dict[str, Any] = {}
            if "ref_model" in inspect.signature(super().__init__).parameters:
                _check_reference(args, kwargs)
                reference["ref_model"] = _BaseModel(self.vectors)
            rewards = kwargs.get("reward_funcs", [])
            rewards = rewards if isinstance(rewards, Sequence) and not isinstance(rewards, str) else [rewards]
            with ExitStack() as inside:
                inside.enter_context(compat.trainable_when_quantised(policy))
                inside.enter_context(already_loaded(args, rewards))
                inside.enter_context(self._constructing(args))
                super().__init__(model=policy, args=args, **reference, **kwargs)
            if reference:  # the one that trl was given had its forward replaced, and knew no autocast
                self.ref_model = _BaseModel(self.vectors)
            if self.uses_fused_head:
                self._prepare_head()
        except BaseException:
            if not has_vectors:
                detach(policy)
            raise
        tokenizer = text_tokenizer(self)
        self.vectors.config.tokenizer_checksum = tokenizer_checksum(tokenizer)
        if not hasattr(self, "eos_token_ids"):
            self.eos_token_ids = list(stop_token_ids(tokenizer, policy.generation_config))
        if (metrics := getattr(self, "_metrics", None)) is not None:
            self.add_callback(VectorLog(self.vectors, metrics["train"]))
        watch(self)

    def _constructing(self, args: SteeringTrainerConfig) -> AbstractContextManager:
        """Around the making of trl's trainer."""
        return nullcontext()

    def _prepare_head(self) -> None:
        """Refuse a model whose log-probabilities trl's fused LM head does not compute."""
        if self.accelerator.device.type == "cpu":
            cpu.prepare()
        base = self.accelerator.unwrap_model(self.model)
        add_group_scoring(base)
        if reason := fast_paths(base).head:
            raise SteerError(
                f"{type(base).__name__}: {reason}, and {type(self).__name__} computes its loss with trl's; "
                "train by GRPO, whose loss can do without, or another model"
            )

    def reference(self) -> AbstractContextManager:
        """Inside, the vectors are off."""
        return self.vectors.disabled()

    # ---- forward and backward passes

    def prompt_lengths(self, inputs: Any) -> torch.Tensor | None:
        """
        How many columns of each row of a batch are its prompt, (rows,); None where that is not told, which
        vectors of other `positions` than 'all' refuse.
        """
        if not isinstance(inputs, Mapping):
            return None
        if "completion_mask" in inputs:
            counts = inputs["completion_mask"] != 0
        elif "labels" in inputs and inputs["labels"].dim() == 2:
            counts = inputs["labels"] != -100
        else:
            return None
        return counts.int().argmax(1).to(self.accelerator.device)

    @contextmanager
    def _told(self, inputs: Any) -> Iterator[None]:
        """Around the passes over a batch: where its prompts end. Backward too: checkpointing asks again."""
        lengths = None if self.vectors.config.positions == "all" else self.prompt_lengths(inputs)
        with nullcontext() if lengths is None else self.vectors.prompt_length(lengths):
            yield

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        allocator.limit_kept_memory(self.accelerator.device)
        self._loaded = None
        with self._told(inputs):
            return super().training_step(model, inputs, *args, **kwargs)

    def prediction_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        with self._told(inputs):
            return super().prediction_step(model, inputs, *args, **kwargs)

    # ---- optimizer, checkpoints

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            trained = [p for p in cast(nn.Module, model or self.model).parameters() if p.requires_grad]
            self.optimizer = make_optimizer(self.args, self.vectors, trained)
        return self.optimizer

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the artifact; the base model is never written."""
        tensors = self.vectors.tensors()  # every process takes part in the gathering of sharded ones
        config = self.vectors.config
        updates = self.state.global_step if self._loaded is None else self._loaded
        if config.provenance and updates:
            config = replace(config, provenance={**config.provenance, "updates": updates})
        vectors = artifact.Artifact(config, tensors)
        folder = cast(str, output_dir or self.args.output_dir)
        if self.args.should_save:
            artifact.write(folder, vectors)
        if self.args.push_to_hub and self.uploads_saved and not _internal_call:
            self._push(vectors)

    def _push(self, vectors: artifact.Artifact) -> None:
        if self.is_world_process_zero():
            push(vectors, cast(str, self.hub_model_id), self.args)  # `init_hf_repo` has set it

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self.args.hub_strategy == "end" or not self.is_world_process_zero():
            return
        try:
            self._push(artifact.read(checkpoint_folder))
        except SteerError as error:
            log.warning("the vectors of %s were not uploaded: %s", checkpoint_folder, error)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        with compat.base_left_out():
            super()._save_optimizer_and_scheduler(output_dir)

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> tuple:
        with compat.base_left_out() if self.is_deepspeed_enabled else nullcontext():
            return super()._prepare_for_training(*args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        saved = artifact.read(resume_from_checkpoint)
        self.vectors.set_tensors(saved.tensors)
        self._loaded = (saved.config.provenance or {}).get("updates", 0)

    def _load_best_model(self) -> None:  # transformers looks for the files of a whole model
        self._load_from_checkpoint(cast(str, self.state.best_model_checkpoint))


def push(vectors: artifact.Artifact, repo_id: str, args: SteeringTrainerConfig) -> str:
    """
    Upload vectors as the settings of a run say.

    Returns:
        The address of the commit.

    Raises:
        SteerError: the hub refuses or cannot be reached.
    """
    return vectors.push_to_hub(
        repo_id,
        private=args.hub_private_repo,
        token=args.hub_token,
        revision=args.hub_revision,
        commit_message="Steering vectors",
    )


class _BaseModel(nn.Module):
    """
    What trl takes for a reference model: the policy's own model with its vectors off. It holds no parameter,
    so that nothing moves, wraps or writes the base a second time.
    """

    def __init__(self, vectors: SteeringVectors):
        super().__init__()
        self.__dict__["vectors"] = vectors
        self.config = cast(PreTrainedModel, vectors.model).config

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        vectors: SteeringVectors = self.__dict__["vectors"]
        with torch.no_grad(), vectors.disabled():
            return vectors.model(*args, **kwargs)


def text_tokenizer(trainer: Trainer) -> PreTrainedTokenizerBase:
    """The tokenizer of a trainer, which may have it inside of a processor."""
    found: Any = trainer.processing_class
    return getattr(found, "tokenizer", found)


def _check_trained(model: nn.Module, vectors: SteeringVectors) -> None:
    """SteerError unless the vectors, and nothing else, require a gradient."""
    own = {id(p) for p in vectors.parameters()}
    if not any(p.requires_grad for p in vectors.parameters()):
        raise SteerError(
            "no vector requires a gradient, so there is nothing to train; call requires_grad_(True) on those "
            "of vectors.parameters() that are to be trained"
        )
    others = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in own]
    if others:
        raise SteerError(
            f"{len(others)} parameters of the base model require a gradient ({others[0]} first), and "
            "checkpoints hold vectors alone; call requires_grad_(False) on them"
        )


def _check_reference(args: SteeringTrainerConfig, kwargs: dict[str, Any]) -> None:
    """SteerError for settings that need another reference model than the base."""
    if kwargs.pop("ref_model", None) is not None:
        raise SteerError("the reference model is the same model with its vectors off; drop ref_model")
    for name, why in (
        ("sync_ref_model", "the reference model is the same model with its vectors off"),
        ("precompute_ref_log_probs", "the reference model takes no memory of its own"),
    ):
        if getattr(args, name, False):
            raise SteerError(f"{name}=true cannot work: {why}; set {name}=false")
    if getattr(args, "neftune_noise_alpha", None):
        raise SteerError(
            "neftune_noise_alpha would put noise into the reference model too, which is the same model; "
            "leave it out"
        )
    fsdp = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true" or getattr(args, "fsdp", None)
    if args.deepspeed_plugin is not None or fsdp:
        raise SteerError(
            "a loss with a reference model is not computed on a sharded model here; launch with "
            "recipes/accelerate/ddp.yaml"
        )


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
    args: SteeringTrainerConfig, vectors: SteeringVectors, trained: Sequence[nn.Parameter]
) -> torch.optim.Optimizer:
    """The optimizer that `args` asks for, with each layer's rate. `trained`: the parameters of `vectors`."""
    by_layer = args.layer_rates(vectors.layers, vectors.num_hidden_layers)
    owners = zip(vectors.parameters(), vectors.parameter_layers(), strict=True)
    rates = [by_layer.get(layer, args.learning_rate) for p, layer in owners if p.requires_grad]
    kind, options = Trainer.get_optimizer_cls_and_kwargs(args, cast(PreTrainedModel, vectors.model))
    groups = [{"params": [p], "lr": rate} for p, rate in zip(trained, rates, strict=True)]
    return kind(groups, **{**options, "weight_decay": args.weight_decay})
