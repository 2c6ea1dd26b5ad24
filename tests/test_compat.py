"""What steer relies on in other libraries is as it was: a failure names what an upstream release changed."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers.trainer
from trl.generation.vllm_generation import VLLMGeneration
from trl.trainer import grpo_trainer

from steer import compat, engine
from steer.compat import (
    APIS,
    BATCH_ATTRIBUTES,
    ENGINE_ATTRIBUTES,
    MODULE_ATTRIBUTES,
    MORE,
    TRAINER_ATTRIBUTES,
    Api,
    changed,
)
from steer.engine import compat as engine_compat
from steer.training.answer_trainers import SteeringDPOTrainer, SteeringSFTTrainer
from steer.training.baselines import BaselineGRPOTrainer
from steer.training.steering_trainer import SteeringGRPOTrainer

STEER = Path(compat.__file__).parent
TABLES = (*APIS, *engine_compat.APIS)
# Documented, or Python's own.
OTHERS = {
    *("_actions", "_ActionsContainer", "_argument_group_name", "_asdict", "_C", "_exit", "_fill_text"),
    *("_replace", "_SubParsersAction"),
}


@pytest.mark.parametrize("api", APIS, ids=lambda api: api.name)
def test_upstream_is_as_it_was(api: Api) -> None:
    assert changed(api) is None


def test_trainer_attributes_are_there(run: Any) -> None:
    trainer = run(train=False)
    assert [name for name in TRAINER_ATTRIBUTES if not hasattr(trainer, name)] == []
    assert [name for name in MODULE_ATTRIBUTES if not hasattr(trainer.model, name)] == []


@pytest.mark.parametrize(
    ("name", "parameters", "said"),
    [
        ("trl.trainer.utils.nowhere", None, "trl.trainer.utils has no nowhere"),
        ("trl.GRPOTrainer._nothing", ("self",), "GRPOTrainer has no _nothing"),
        ("no_such_library.thing", None, "No module named 'no_such_library'"),
        ("trl.trainer.utils.nanstd", ("tensor",), r"parameters are \['tensor', 'dim', 'keepdim'\], expected"),
        ("trl.trainer.utils.nanstd", ("values", MORE), r"parameters are \['tensor'\], expected \['values'\]"),
    ],
)
def test_a_change_is_named(name: str, parameters: tuple[str, ...] | None, said: str) -> None:
    told = changed(Api(name, "trl 1.0", "calls it", parameters))
    assert told is not None and told.startswith(f"{name} (checked with trl 1.0; steer calls it): ")
    assert re.search(said, told)
    assert changed(Api("trl.trainer.utils.nanstd", "trl 1.0", "calls it", ("tensor", MORE))) is None


def overridden(kind: type) -> set[str]:
    """The private methods and attributes of other libraries that steer's part of a class redefines."""
    ours = [base for base in kind.__mro__ if base.__module__.startswith("steer.")]
    others = [base for base in kind.__mro__ if base not in ours and base is not object]
    private = {name for base in ours for name in vars(base) if name[0] == "_" and name[1] != "_"}
    return {name for name in private for base in others if name in vars(base)}


def test_every_override_is_in_the_table() -> None:
    from steer.engine.rollout import VectorGeneration

    assert issubclass(VectorGeneration, VLLMGeneration)
    named = {api.name.rpartition(".")[2] for api in APIS}
    trainers = (SteeringGRPOTrainer, SteeringSFTTrainer, SteeringDPOTrainer, BaselineGRPOTrainer)
    for kind in (*trainers, VectorGeneration):
        assert overridden(kind) - {"_abc_impl", "_parameters"} <= named, kind


def private_names() -> dict[str, set[str]]:
    """By file: private attributes that are used and that steer defines nowhere."""
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in STEER.rglob("*.py")}
    defined, used = set(), {}
    for path, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                defined.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                defined.add(node.id)
            elif isinstance(node, ast.Attribute):
                owner = getattr(node.value, "id", "")
                if isinstance(node.ctx, ast.Store) and owner in ("self", "cls"):
                    defined.add(node.attr)
                elif node.attr.startswith("_") and not node.attr.endswith("__"):
                    used.setdefault(str(path.relative_to(STEER)), set()).add(node.attr)
            elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("steer"):
                private = {name.name for name in node.names if name.name.startswith("_")}
                used.setdefault(str(path.relative_to(STEER)), set()).update(private)
    return {path: names - defined - OTHERS for path, names in used.items() if names - defined - OTHERS}


def test_every_private_name_of_another_library_is_in_the_table() -> None:
    named = {api.name.rpartition(".")[2] for api in TABLES} | {
        *(*TRAINER_ATTRIBUTES, *BATCH_ATTRIBUTES, *ENGINE_ATTRIBUTES, *MODULE_ATTRIBUTES)
    }
    found = private_names()
    assert {path: names - named for path, names in found.items() if names - named} == {}
    # and only the modules that stand for it, and the classes that inherit it, use one
    inherit = {path for path in found if path.startswith("training/")} | {"engine/rollout.py"}
    assert set(found) - inherit - {"compat.py", "engine/compat.py"} == set()


def test_importing_it_imports_no_other_library() -> None:
    code = (
        "import sys; from steer import compat; from steer.engine import compat as other; "
        "print(sorted({'trl', 'vllm', 'peft', 'transformers'} & set(sys.modules)))"
    )
    told = subprocess.run([sys.executable, "-c", code], cwd=STEER.parent, capture_output=True, text=True)
    assert told.stdout == "[]\n", told.stderr


def test_a_quantised_model_passes_for_one_with_an_adapter_for_a_while(tiny_llama: Any) -> None:
    with compat.trainable_when_quantised(tiny_llama):
        assert not tiny_llama._hf_peft_config_loaded
    tiny_llama.is_quantized = True
    with pytest.raises(ZeroDivisionError), compat.trainable_when_quantised(tiny_llama):
        assert tiny_llama._hf_peft_config_loaded
        raise ZeroDivisionError
    assert not tiny_llama._hf_peft_config_loaded


def test_what_is_trained_on_a_quantised_model_keeps_its_precision(tiny_llama: Any) -> None:
    tiny_llama.is_quantized = True
    norm = tiny_llama.model.norm.weight
    before = norm.detach().clone().fill_(1 + 2**-20)
    norm.data = before.clone()
    with compat.trainable_when_quantised(tiny_llama):
        norm.data = norm.data.to(torch.bfloat16)
    assert norm.dtype == torch.float32 and torch.equal(norm, before)


def test_what_is_replaced_is_put_back() -> None:
    before = transformers.trainer._is_peft_model, grpo_trainer.VLLMGeneration
    with compat.base_left_out(), compat.vllm_backend(SimpleNamespace):
        assert transformers.trainer._is_peft_model(None)
        assert grpo_trainer.VLLMGeneration is SimpleNamespace
    assert before == (transformers.trainer._is_peft_model, grpo_trainer.VLLMGeneration)
    assert importlib.import_module("steer.engine") is engine
