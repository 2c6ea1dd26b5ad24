"""
vLLM in processes of its own: compiled, with a separate engine process, tensor parallel, without the plugin.
This file is also what those processes run.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.paths import ROOT
from helpers.steering import fill
from helpers.vllm_engine import LENGTH, SHAPES, Sampled, prompt, run, same, start
from transformers import AutoModelForCausalLM, PreTrainedModel

import steer
from steer import SteerError, engine


def main(folder: str, vectors: str, settings: dict[str, Any]) -> dict[str, Any]:
    """What a user does from start to end: the base model, two sets of vectors, a wrong name."""
    from vllm.compilation.counter import compilation_counter

    llm = start(folder, **settings)

    def sample(extra: Any) -> dict[str, Any]:
        (found,) = run(llm, [prompt()], [extra])
        return {"ids": found.ids, "logps": found.logps.tolist()}

    answer: dict[str, Any] = {"base": sample(None)}
    try:
        engine.push(llm, vectors)
        answer["steered"] = sample(None)
        engine.push(llm, vectors, name="set")
        answer["names"] = engine.names(llm)
        answer["named"] = sample(engine.request("set"))
        (out,) = llm.generate([{"prompt_token_ids": prompt()}], _params("nobody"), use_tqdm=False)
        answer["unknown"] = out.outputs[0].finish_reason
        answer["after"] = sample(engine.request("set"))
    except SteerError as error:
        answer["error"] = str(error)
    answer["loaded"] = compilation_counter.num_aot_artifacts_loaded
    return answer


def _params(name: str) -> Any:
    from vllm import SamplingParams

    return SamplingParams(max_tokens=2, detokenize=False, extra_args=engine.request(name))


def elsewhere(folder: Path, vectors: Path, env: dict[str, str], **settings: Any) -> dict[str, Any]:
    """`main` in a new process with `env`."""
    done = subprocess.run(
        [sys.executable, __file__, str(folder), str(vectors), json.dumps(settings)],
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", **env},
        cwd=folder.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("ANSWER ")]
    assert lines, done.stderr[-3000:]
    return json.loads(lines[0].removeprefix("ANSWER "))


def check(model: PreTrainedModel, answer: dict[str, Any], steered: bool) -> None:
    """With the model's vectors and not without, or the other way round."""
    found = Sampled(answer["ids"], LENGTH, torch.tensor(answer["logps"]), 0)
    assert same(model, found) is steered
    with steer.attached(model).disabled():
        assert same(model, found) is not steered


@pytest.fixture
def saved(
    request: pytest.FixtureRequest, build_tiny: Callable[..., PreTrainedModel], tmp_path: Path
) -> tuple[PreTrainedModel, Path, Path]:
    """A model (a Llama unless the test says otherwise) with vectors, and the folders of both."""
    kind = getattr(request, "param", "llama")
    shape = SHAPES.get(kind, {"hidden_size": 128, "initializer_range": 0.1})
    build_tiny(kind, **shape).save_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="float32")
    return model, tmp_path / "model", fill(steer.attach(model), 0.3).save(tmp_path / "vectors")


# vLLM runs these with the code of transformers, whose classes it alters: not in the process of the tests.
@pytest.mark.parametrize("saved", ["olmo2", pytest.param("gpt_neox", marks=pytest.mark.slow)], indirect=True)
def test_architectures_that_vllm_borrows(saved: Any) -> None:
    model, folder, vectors = saved
    answer = elsewhere(folder, vectors, {})
    check(model, answer["base"], steered=False)
    check(model, answer["steered"], steered=True)
    assert answer["error"] == "no vectors named 'nobody'; the engine has default, set"


@pytest.mark.slow
def test_compiled_and_its_cache(saved: Any, tmp_path: Path) -> None:
    model, folder, vectors = saved
    cache = {"VLLM_CACHE_ROOT": str(tmp_path / "cache")}
    no_plugin = {**cache, "VLLM_PLUGINS": "lora_filesystem_resolver"}
    without = elsewhere(folder, vectors, no_plugin, enforce_eager=False)
    check(model, without["base"], steered=False)
    assert "the engine runs without steer's vLLM plugin" in without["error"]
    assert list((tmp_path / "cache").rglob("*.cpp"))
    # In the cache lies now the graph of this very model without the addition: it must not be found. The
    # second time the graph that is found is the steered one.
    for loaded in (0, 1):
        answer = elsewhere(folder, vectors, cache, enforce_eager=False)
        assert answer["loaded"] == loaded
        check(model, answer["base"], steered=False)
        check(model, answer["steered"], steered=True)
        check(model, answer["named"], steered=True)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"tensor_parallel_size": 2}], ids=["one", "tensor-parallel"])
def test_an_engine_in_other_processes(saved: Any, settings: dict[str, Any]) -> None:
    model, folder, vectors = saved
    answer = elsewhere(folder, vectors, {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}, **settings)
    check(model, answer["base"], steered=False)
    check(model, answer["steered"], steered=True)
    check(model, answer["named"], steered=True)
    assert answer["names"] == ["default", "set"]
    assert answer["unknown"] == "error"
    assert answer["after"] == answer["named"]  # the engine lives


if __name__ == "__main__":
    print("ANSWER", json.dumps(main(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))))
