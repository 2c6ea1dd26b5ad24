"""
A plain Hugging Face checkpoint that carries the vectors itself: any tool that loads the base model loads it.

constant, shared   A vector is a bias on the last matrix of the MLP or the attention
                   (`steer.export.architecture`). Models that have that bias (GPT2, GPT-NeoX, Phi) get it
                   added. Llama has room for one (`mlp_bias`, `attention_bias`); the other biases that come
                   with it are zero. Qwen2 and Mistral have none, but are Llamas in all else, and are saved as
                   such.
adaptive           Rank one, merged into the MLP's last matrix: W + vector readout^T. Any dense model.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from steer.artifact import Artifact
from steer.base_adapter import artifact_base
from steer.config import SteeringConfig
from steer.errors import SteerError
from steer.export.architecture import bias_place, check_everywhere, check_same_logits
from steer.export.transformers4 import add_names
from steer.identity import MERGED
from steer.models import load_model, load_tokenizer, skeleton
from steer.outputs import CHECKPOINT_MARK
from steer.quantization import quantization_method
from steer.sites import Decoder, find_decoder, find_down_projections
from steer.vectors import detach, load

# Why a model without room for the bias cannot be saved as a Llama.
_NO_LLAMA = {
    "qwen3": "Llama has no norms on queries and keys",
    "smollm3": "Llama has no layers without rotary embeddings",
    "phi3": "its attention and MLP matrices are fused",
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text"), "Llama's norms and embeddings are scaled otherwise"),
}


def write(
    artifact: Artifact,
    model_name: str | None,
    folder: str | os.PathLike[str],
    revision: str | None = None,
    trust_remote_code: bool = False,
    base_adapter: str | None = None,
) -> Path:
    """
    Write the model `model_name` with the vectors in it to `folder`, which must be new or empty: weights in
    the dtype they are saved in, config, generation config, tokenizer, and a small file by which `--force`
    knows it (`steer.outputs`); whole or not at all. Returns it.

    A `model_name` of None is the artifact's base, of its revision and with its adapter merged into it where
    no other `revision` or `base_adapter` is given. A model that comes with code of its own is loaded with
    `trust_remote_code` only.

    Raises SteerError when the vectors do not fit the model, when they are no bias of a matrix, or when the
    architecture cannot hold the bias. Warns, with the size of the error, when merging rounds adaptive
    vectors off; constant ones are rounded to the model's dtype as they are in use.
    """
    folder = Path(folder)
    if folder.is_file():
        raise SteerError(f"{folder} is a file: a checkpoint is a folder; give a new or an empty one")
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise SteerError(f"{folder} is not empty: a checkpoint needs a new or an empty folder")
    made = artifact.config
    check_everywhere(made, "a plain checkpoint")
    place = bias_place(made, "a plain checkpoint") if made.kind != "adaptive" else None
    model_name, revision = artifact_base(made, model_name, revision, base_adapter, trust_remote_code)
    common: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    config = skeleton(model_name, **common).config  # before all weights are loaded
    if quantization_method(config) is not None:
        raise SteerError(f"{model_name} is quantised; write the checkpoint from its unquantised weights")
    if getattr(config, "vision_config", None) is not None:
        raise SteerError(
            f"{model_name} is a vision-language model, and plain checkpoints hold text models; export "
            "a PEFT adapter, or use steer.load"
        )
    model: Any = load_model(model_name, dtype="auto", **common)
    vectors = load(artifact, model)  # refuses vectors of another shape, warns of other weights
    steered = _logits(model)
    with vectors.disabled():
        base = _logits(model)
    detach(model)
    vars(model.config).pop(MERGED, None)  # with the vectors in it, it is that base no more
    decoder = find_decoder(model)
    if place is None:
        config = _merge(artifact, decoder, model)
    else:
        config = _add_biases(artifact, place, decoder, model)
    if (
        place is not None or model.dtype == torch.float32
    ):  # what rounding loses of a merge is reported separately
        check_same_logits(_logits(model), steered, base, "a plain checkpoint")
    try:
        _save(model, config, model_name, common, folder, made)
    except OSError as error:
        raise SteerError(f"cannot write a checkpoint to {folder}: {error.strerror or error}") from error
    return folder


@torch.no_grad()
def _logits(model: Any) -> torch.Tensor:
    """Of a few tokens, (tokens, vocabulary)."""
    ids = torch.arange(3, 19, device=model.device)[None] % model.config.get_text_config().vocab_size
    return model(input_ids=ids, use_cache=False).logits[0]


def _merge(artifact: Artifact, decoder: Decoder, model: Any) -> Any:
    """Adds vector readout^T to each down-projection's weight; the config stays."""
    steered = artifact.rank_one()
    change, error = 0.0, 0.0
    downs = find_down_projections(decoder, list(steered))
    for (vector, readout), (down, _) in zip(steered.values(), downs, strict=True):
        weight: Any = down.weight
        added = torch.outer(vector.double(), readout.double())
        exact = weight.detach().double() + (added.T if type(down).__name__ == "Conv1D" else added)
        weight.data = exact.to(weight.dtype)
        change += added.square().sum().item()
        error += (weight.detach().double() - exact).square().sum().item()
    if model.dtype != torch.float32 and error:
        lost = (error / change) ** 0.5
        warnings.warn(
            f"merging into {str(model.dtype).removeprefix('torch.')} weights rounds the adaptive vectors off "
            f"by {lost:.0%} of their size; load them with steer, or as a LoRA, to have them whole",
            stacklevel=3,
        )
    return model.config


def _add_biases(artifact: Artifact, place: str, decoder: Decoder, model: Any) -> Any:
    """Gives the matrices at `place` the vectors for biases; returns the config of what the model is then."""
    vectors = artifact.by_layer()
    matrices = {layer: decoder.layers[layer].get_submodule(place) for layer in vectors}
    config = model.config
    if any(matrix.bias is None for matrix in matrices.values()):
        config = _as_llama(model)
        for block in decoder.layers:
            attention: Any = block.self_attn
            mlp: Any = block.mlp
            if place.startswith("mlp."):
                config.mlp_bias = True
                _add_zeros(mlp.gate_proj, mlp.up_proj, mlp.down_proj)
            if place.startswith("self_attn.") or attention.q_proj.bias is not None:
                config.attention_bias = True
                _add_zeros(attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
        _check_llama(model, config)
    for layer, vector in vectors.items():
        bias: Any = matrices[layer].bias
        bias.data = (bias.data.to(vector.dtype) + vector).to(bias.dtype)
    return config


def _add_zeros(*linears: Any) -> None:
    """A bias of zeros for each of `linears` that has none."""
    for linear in linears:
        if linear.bias is None:
            weight = linear.weight
            linear.bias = nn.Parameter(torch.zeros(len(weight), dtype=weight.dtype, device=weight.device))


def _as_llama(model: Any) -> LlamaConfig:
    """The config of the Llama that computes what `model`, a Llama, Qwen2 or Mistral, does."""
    config = model.config
    name = config.model_type
    if name not in ("llama", "qwen2", "mistral"):
        reason = _NO_LLAMA.get(name, "it is none of llama, qwen2 and mistral")
        raise SteerError(
            f"a plain {name} checkpoint has no room for the vectors and cannot be saved as a Llama: {reason}"
            "; export a PEFT adapter"
        )
    window = getattr(config, "sliding_window", None)
    if window is not None and window < config.max_position_embeddings:
        raise SteerError(
            f"this {name} attends to the last {window} tokens and cannot be saved as a Llama, which attends "
            "to all; export a PEFT adapter"
        )
    values = config.to_dict()
    kept = {key: values[key] for key in values if key in LlamaConfig().to_dict() and key != "model_type"}
    return LlamaConfig(**{**kept, "architectures": [LlamaForCausalLM.__name__]})


def _save(
    model: Any, config: Any, model_name: str, common: dict[str, Any], folder: Path, vectors: SteeringConfig
) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        model.save_pretrained(work)
        if config is not model.config:
            config.dtype = model.dtype
            config.save_pretrained(work)
        try:
            load_tokenizer(model_name, **common).save_pretrained(work)
        except SteerError as error:
            warnings.warn(f"the checkpoint has no tokenizer: {error}", stacklevel=4)
        if reason := add_names(work):
            warnings.warn(
                f"only transformers 5 computes the same with this checkpoint, version 4 does not: {reason}",
                stacklevel=4,
            )
        told = {"base_model": vectors.base_model_name_or_path, "layers": vectors.layers}
        (work / CHECKPOINT_MARK).write_text(json.dumps({**told, "scale": vectors.scale}) + "\n")
        work.chmod(0o755)
        for file in work.iterdir():  # safetensors gives its files to their owner alone
            file.chmod(0o644)
        os.replace(work, folder)  # an empty folder gives way
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def _check_llama(model: Any, config: LlamaConfig) -> None:
    """SteerError unless the model's weights are, by name and shape, those of a Llama of this config."""
    with torch.device("meta"):
        llama = LlamaForCausalLM(config)
    expected, actual = ({k: v.shape for k, v in m.state_dict().items()} for m in (llama, model))
    wrong = sorted(expected.items() ^ actual.items())
    if wrong:
        raise SteerError(
            f"{model.config.name_or_path} cannot be saved as a Llama, whose {wrong[0][0]} is another; "
            "export a PEFT adapter"
        )
