"""Shared by the tests of loading models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from steer import SteerError


def refusal(call: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    """The one line with which the call is refused."""
    with pytest.raises(SteerError) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def assert_same_weights(one: torch.nn.Module, two: torch.nn.Module) -> None:
    first, second = one.state_dict(), two.state_dict()
    assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)
