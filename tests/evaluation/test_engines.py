"""How the engine of an evaluation is started; vLLM itself is stood in for."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.steering import fill
from safetensors.torch import save_file

import steer
from steer.errors import SteerError
from steer.evaluation import variants
from steer.evaluation.engines import VllmEngine


@pytest.mark.parametrize(("given", "expected"), [(None, True), (False, False), (True, True)])
def test_engine_args_decide_whether_vllm_compiles(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, given: bool | None, expected: bool
) -> None:
    started: dict[str, Any] = {}
    vllm, platforms = ModuleType("vllm"), ModuleType("vllm.platforms")
    vllm.LLM = lambda **settings: started.update(settings)  # type: ignore[attr-defined]
    platforms.current_platform = SimpleNamespace(is_cpu=lambda: True)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setitem(sys.modules, "vllm.platforms", platforms)
    asked = {} if given is None else {"enforce_eager": given}
    with caplog.at_level("INFO", "steer"):
        VllmEngine("model", None, "float32", 64, [], asked, tokens=10)
    assert started["enforce_eager"] is expected
    assert (started["enable_chunked_prefill"], started["max_num_batched_tokens"]) == (False, 4096)
    assert ("starts without compiling" in caplog.text) == (given is None)


def test_vectors_of_another_base_are_told(
    tiny_llama: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tiny_llama.config.name_or_path = "org/tiny"
    fill(steer.attach(tiny_llama)).save(tmp_path / "vectors")
    compared = [variants.Variant("v", "vectors", str(tmp_path / "vectors"), scale) for scale in (1.0, 2.0)]
    with caplog.at_level("WARNING", "steer"):
        variants.tell_of_other_base(compared, tiny_llama)
        assert not caplog.text
        tiny_llama.config.name_or_path = "org/other"
        variants.tell_of_other_base(compared, tiny_llama)
    assert caplog.text.count("made for org/tiny; this model is org/other") == 1


def test_a_learned_prompt_is_refused(tmp_path: Path) -> None:
    """peft puts it before the prompt when it is called itself: the answers would be the base's."""
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PromptLearningConfig

    learned = [
        kind.value
        for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()
        if issubclass(config, PromptLearningConfig)
    ]
    assert "PREFIX_TUNING" in learned
    save_file({"prompt_embeddings": torch.zeros(2, 4)}, tmp_path / "adapter_model.safetensors")
    for kind in learned:
        (tmp_path / "adapter_config.json").write_text(f'{{"peft_type": "{kind}"}}')
        with pytest.raises(SteerError, match=f"a {kind} adapter trains what stands before the prompt"):
            variants.collect(variants.Variant("base"), adapters=[str(tmp_path)])
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(SteerError, match="names no peft_type"):
        variants.collect(variants.Variant("base"), adapters=[str(tmp_path)])
