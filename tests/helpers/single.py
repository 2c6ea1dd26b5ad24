"""A stand-in for a GPU without float64, Apple's: tensors that refuse it until they are brought to the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class Single(torch.Tensor):
    """What is computed from it is one, too; `cpu()` and `to("cpu")` give an ordinary tensor."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        if name == "cpu" or (name == "to" and "cpu" in map(str, (*args[1:], *kwargs.values()))):
            plain = args[0].as_subclass(torch.Tensor)
            return plain if name == "cpu" else plain.to(*args[1:], **kwargs)
        out = super().__torch_function__(function, types, args, kwargs)
        if isinstance(out, Single) and out.dtype == torch.float64:
            raise TypeError(f"{name}: this device has no float64")
        return out

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        copied = self.detach().clone()
        memo[id(self)] = nn.Parameter(copied) if isinstance(self, nn.Parameter) else copied
        return memo[id(self)]


def without_float64(model: nn.Module) -> nn.Module:
    """The same model, its weights and buffers on a device without float64."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                data = parameter.detach().as_subclass(Single)
                module._parameters[name] = nn.Parameter(data, parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.as_subclass(Single)
    return model
