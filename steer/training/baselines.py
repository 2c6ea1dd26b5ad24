"""
What steering is compared with: full fine-tuning and peft's own methods, trained by the same trainer, sampler
and loss as vectors are.
"""

from __future__ import annotations

import json
import logging
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import peft
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel, set_seed
from transformers.pytorch_utils import Conv1D
from trl.trainer.grpo_trainer import RewardFunc

from steer import compat
from steer.config import SteeringConfig
from steer.errors import SteerError
from steer.files import replace_file
from steer.models import MIXED
from steer.sites import find_decoder
from steer.training.config import SteeringGRPOConfig
from steer.training.group_trainer import GroupGRPOTrainer
from steer.training.loading import load_policy

log = logging.getLogger("steer")

METHODS = {
    "full": "every weight of the model",
    "lora": "LoRA (arXiv 2106.09685)",
    "beft": "a bias on each of target_modules; on down_proj the same function as steering vectors",
    "tinylora": "TinyLoRA (arXiv 2602.04118): tinylora_u numbers for each of target_modules",
}
_LINEAR = (nn.Linear, Conv1D)
# peft's names; older versions have neither TinyLoRA nor BEFT.
_CONFIGS = {"lora": "LoraConfig", "beft": "BeftConfig", "tinylora": "TinyLoraConfig"}


@dataclass
class Baseline:
    """What is trained instead of vectors."""

    _argument_group_name = "what is trained"

    method: str = field(
        default="full", metadata={"help": "; ".join(f"{k} = {v}" for k, v in METHODS.items()) + "."}
    )
    lora_rank: int = field(default=4, metadata={"help": "Rank of LoRA, and of the frozen part of TinyLoRA."})
    lora_alpha: float = field(default=32.0, metadata={"help": "LoRA's update is scaled by alpha / rank."})
    tinylora_u: int = field(default=13, metadata={"help": "Trained numbers of each module, for tinylora."})
    target_modules: list[str] = field(
        default_factory=lambda: ["all-linear"],
        metadata={"help": "Modules to adapt, by the end of their names; all-linear: all but the head."},
    )
    target_layers: str = field(
        default="all",
        metadata={
            "help": "Layers whose modules are adapted: 'all', an index, a range, or a comma-separated mix of "
            "those."
        },
    )

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise SteerError(f"method={self.method!r} is unknown; choose one of {', '.join(METHODS)}")
        for name in ("lora_rank", "tinylora_u"):
            if getattr(self, name) < 1:
                raise SteerError(f"{name}={getattr(self, name)} is below 1")


def peft_config(baseline: Baseline, model: PreTrainedModel) -> peft.PeftConfig:
    """peft's configuration of this method; SteerError where this peft lacks it or the model the modules."""
    kind = getattr(peft, _CONFIGS[baseline.method], None)
    if kind is None:
        raise SteerError(
            f"method={baseline.method}: peft {peft.__version__} has no {_CONFIGS[baseline.method]}; install "
            "a newer peft"
        )
    options: dict[str, Any] = {
        "target_modules": _modules(baseline, model),
        "task_type": "CAUSAL_LM",
    }
    if baseline.method == "lora":
        options |= {"r": baseline.lora_rank, "lora_alpha": baseline.lora_alpha, "lora_dropout": 0.0}
    if baseline.method == "tinylora":
        # the random projections are drawn again from their seed
        options |= {"r": baseline.lora_rank, "u": baseline.tinylora_u, "save_projection": False}
    return kind(**options)


def _modules(baseline: Baseline, model: PreTrainedModel) -> list[str]:
    """The full names of the modules to adapt. Layers may differ in those that they have."""
    decoder = find_decoder(model)
    layers = SteeringConfig(layers=baseline.target_layers).resolve_layers(decoder.num_hidden_layers)
    wanted = baseline.target_modules
    adapted = []
    have: dict[str, list[int]] = {}  # by the end of a name, the layers with a linear module of it
    for layer in layers:
        for name, module in decoder.layers[layer].named_modules():
            if not isinstance(module, _LINEAR):
                continue
            end = name.split(".")[-1]
            have.setdefault(end, []).append(layer)
            if wanted == ["all-linear"] or end in wanted:
                adapted.append(f"{decoder.name}.{layer}.{name}")
    asked = set(wanted) - {"all-linear"}
    unknown = sorted(asked - have.keys())
    if unknown or not adapted:
        raise SteerError(
            f"target_modules={wanted}: the linear modules in the layers of {type(model).__name__} that are "
            f"adapted are {', '.join(have) or 'none'}; there is no {', '.join(unknown) or 'such one'}"
        )
    for end in sorted(asked):
        if lacking := [str(layer) for layer in layers if layer not in have[end]]:
            log.info("target_modules: layers %s have no %s; the others are adapted", ", ".join(lacking), end)
    return adapted


class BaselineGRPOTrainer(GroupGRPOTrainer):
    """
    Train all of `model`, or a peft adapter on it, as `baseline` says; all other arguments are trl's. A model
    may be given by name, as to `SteeringGRPOTrainer`; for a full fine-tune it is loaded in float32 unless
    `model_init_kwargs` says otherwise.

    A checkpoint holds what is trained (an adapter as peft saves it, or the whole model as safetensors) and
    the optimizer's state. Full fine-tuning needs the model in float32: small updates are lost in bfloat16.
    """

    def __init__(
        self,
        model: PreTrainedModel | str,
        reward_funcs: RewardFunc | list[RewardFunc],
        args: SteeringGRPOConfig,
        baseline: Baseline,
        **kwargs: Any,
    ):
        if args.lr_by_layer is not None:
            raise SteerError(
                f"lr_by_layer={args.lr_by_layer!r} is for vectors; give method={baseline.method} one "
                "learning_rate"
            )
        policy = load_policy(model, args, kwargs, dtype="float32" if baseline.method == "full" else "auto")
        self.adapted: peft.PeftModel | None = None
        inner = policy
        if baseline.method == "full":
            if args.beta:
                raise SteerError(
                    f"beta={args.beta} with method=full needs the untrained model beside the trained one; "
                    "set beta=0, as in the published recipe, or choose another method"
                )
            policy.requires_grad_(True)
        else:
            if args.use_vllm:
                raise SteerError(f"method={baseline.method} samples with steer's own sampler; drop use_vllm")
            set_seed(args.seed)  # the adapter's random start belongs to the run
            self.adapted = peft.get_peft_model(policy, peft_config(baseline, policy))
            inner = cast(PreTrainedModel, self.adapted.get_base_model())
        with compat.trainable_when_quantised(inner):
            super().__init__(inner, reward_funcs, args, **kwargs)
        if self.sharded and (self.adapted is not None or self.is_deepspeed_enabled):
            raise SteerError(
                f"method={baseline.method} cannot be sharded by this launcher; launch with "
                "recipes/accelerate/ddp.yaml"
            )

    def reference(self) -> AbstractContextManager:
        """Inside, the adapter is off. A full fine-tune puts nothing aside, and no KL term asks for it."""
        return nullcontext() if self.adapted is None else self.adapted.disable_adapter()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the adapter as peft does, or the whole model and its tokenizer."""
        folder = Path(output_dir or self.args.output_dir)
        if self.adapted is None:
            if self.is_fsdp_enabled:
                self._save_gathered(folder)
            else:
                super().save_model(str(folder), _internal_call=True)
            if self.args.should_save:  # a pickle of the settings, which are in run.json
                (folder / "training_args.bin").unlink(missing_ok=True)
                if dtype := MIXED.get(self.accelerator.mixed_precision):
                    _name_precision(folder / "config.json", dtype)
                    if not _internal_call:  # a checkpoint is exact
                        _round(
                            folder, getattr(torch, dtype), {name for name, _ in self.model.named_buffers()}
                        )
        elif self.args.should_save:
            self.adapted.save_pretrained(str(folder))

    def _save_gathered(self, folder: Path) -> None:
        """Write a model in shards whole, which transformers leaves out where checkpoints are in shards."""
        weights = self.accelerator.get_state_dict(self.model)  # all processes take part
        if self.args.should_save:
            self.accelerator.unwrap_model(self.model).save_pretrained(folder, state_dict=weights)
            self._tokenizer.save_pretrained(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.adapted is None:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            saved = load_file(Path(resume_from_checkpoint) / "adapter_model.safetensors")
            peft.set_peft_model_state_dict(self.adapted, saved)


def _name_precision(config: Path, dtype: str) -> None:
    """Name in a model's configuration the precision that it learned in, so that it is loaded in it."""
    settings = json.loads(config.read_text()) | {"dtype": dtype}
    replace_file(config, (json.dumps(settings, indent=2) + "\n").encode())


def _round(folder: Path, dtype: torch.dtype, buffers: set[str]) -> None:
    """
    Round the weights, which are all but the `buffers`, of the model in `folder` as mixed training did. What
    was sampled and differentiated were the rounded ones. The float32 weights behind them drift by what is
    rounded away, and can be far worse.
    """
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        rounded = {n: t if n in buffers else t.to(dtype).to(t.dtype) for n, t in tensors.items()}
        save_file(rounded, file.with_suffix(".part"), metadata={"format": "pt"})
        file.with_suffix(".part").replace(file)


def readable(checkpoint: Path) -> None:
    """Raise SteerError where a weights file of `checkpoint` is missing or cut short."""
    files = list(checkpoint.glob("*.safetensors"))
    try:
        for file in files:
            safe_open(file, "pt")
    except SafetensorError as error:
        raise SteerError(f"{checkpoint} is damaged ({error})") from error
    if not files:
        raise SteerError(f"{checkpoint} holds no weights")
