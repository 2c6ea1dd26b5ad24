"""Analyses that need a residual stream written by attention and MLP alone, where others write too."""

from __future__ import annotations

import pytest
import torch
from helpers.lens import subject_of, texts
from helpers.steering import message

from evals.architectures import tiny
from steer import SteerError
from steer.lens.decomposition import decompose
from steer.lens.patching import patch

# What passes although every path is closed.
OTHER_PATHS = {
    "bloom": "the stream inside attention and MLP",
    "mpt": "the stream inside the MLP",
    "falcon_h1": "a state space model beside the attention",
    "minimax": "factors on the stream",
    "gemma4_text": "inputs of each layer, and a factor on the stream",
    "doge": "a gain on the stream",
    "openai-gpt": "norms of the stream itself",
}


@pytest.mark.parametrize("direction", ["add", "remove"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", OTHER_PATHS)
def test_a_model_with_other_paths_is_refused(tiny_tokenizer, model_type, dtype, direction) -> None:
    subject = subject_of(tiny(model_type).to(dtype), tiny_tokenizer, layers="0-1")
    before = hooks(subject.model)
    with pytest.raises(SteerError, match="with every path closed") as error:
        patch(subject, texts(), direction=direction)
    message(error)
    with pytest.raises(SteerError) as error:
        decompose(subject, texts())
    message(error)
    assert hooks(subject.model) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", ["qwen3_5_text", "olmo_hybrid", "granite", "cohere", "rwkv"])
def test_models_without_other_paths(tiny_tokenizer, model_type, dtype) -> None:
    subject = subject_of(tiny(model_type).to(dtype), tiny_tokenizer, layers="0-1")
    found = patch(subject, texts())
    tolerance = (
        1e-4 if dtype == torch.float32 else 0.1
    )  # shares of the effect; bfloat16 rounds what is taken out
    assert found["everything"] == pytest.approx(1, abs=tolerance)
    assert found["nothing"] == pytest.approx(0, abs=tolerance)


@pytest.mark.parametrize("model_type", ["qwen3_5_text", "biogpt"])
def test_layers_of_several_kinds_are_split(tiny_tokenizer, model_type) -> None:
    found = decompose(subject_of(tiny(model_type), tiny_tokenizer, layers="0-1"), texts())
    assert found.error < 1e-4
    assert abs(sum(found.totals.values()) - 1) < 1e-4


@pytest.mark.parametrize("model_type", ["opt", "longcat_flash", "inkling_text", "trocr"])
def test_a_refused_analysis_leaves_no_hooks(tiny_tokenizer, model_type) -> None:
    """Hooks of the paths that were found before the missing module once stayed in the model."""
    subject = subject_of(tiny(model_type), tiny_tokenizer, layers="0-1")
    before = hooks(subject.model)
    for analysis in (patch, decompose):
        with pytest.raises(SteerError) as error:
            analysis(subject, texts())
        message(error)
        assert hooks(subject.model) == before


def hooks(model: torch.nn.Module) -> list[tuple[int, int]]:
    return [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()]
