"""An 8-bit copy of a checkpoint in the format of compressed-tensors, as vLLM reads it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

# Inputs are quantised as they come, each token by its own scale.
SCHEME: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {
                "num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False
            },
            "input_activations": {
                "num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True
            },
        }
    },
}  # fmt: skip


def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The weight of a linear layer in 8 bits, symmetric.

    Args:
        weight: (outputs, inputs).

    Returns:
        int8 (outputs, inputs) and float32 (outputs, 1); their product is `weight` up to half a step of the
        output's scale.
    """
    weight = weight.float()
    scale = (weight.abs().amax(1, keepdim=True) / 127).clamp(min=torch.finfo(torch.float32).tiny)
    return (weight / scale).round().clamp(-127, 127).to(torch.int8), scale


def write(source: Path, out: Path, dtype: torch.dtype) -> int:
    """
    Write the checkpoint in `source` to `out` with the linear layers of its decoder in 8 bits and the rest
    (embeddings, LM head, norms, biases) in `dtype`.

    Returns:
        Bytes of all tensors.
    """
    out.mkdir(parents=True)
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in _tensors(source):
        if ".layers." in name and name.endswith("proj.weight"):
            tensors[name], tensors[f"{name}_scale"] = quantize(tensor)
        else:
            tensors[name] = tensor.to(dtype)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    for file in source.glob("*"):
        if file.suffix in (".json", ".txt", ".model", ".jinja") and "safetensors" not in file.name:
            shutil.copy(file, out)
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = SCHEME
    config["dtype"] = str(dtype).removeprefix("torch.")
    (out / "config.json").write_text(json.dumps(config, indent=1))
    return sum(t.numel() * t.element_size() for t in tensors.values())


def _tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118  # not a mapping
                yield name, opened.get_tensor(name)
