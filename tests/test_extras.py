"""The core works without the extras, a missing one is one line, and pyproject.toml declares every import."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from helpers.paths import ROOT
from helpers.steering import message

from steer import extras
from steer.cli import main
from steer.errors import SteerError
from steer.extras import MODULES, require

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# Distributions whose modules have other names.
MODULE = {"pyyaml": "yaml", "lm-eval": "lm_eval", "eai-sparsify": "sparsify"}
# Comes with torch's CUDA builds, and is asked for in one function that needs a GPU.
OPTIONAL = {"triton"}
COMES_ALONG = {"tokenizers", "sympy"}  # with transformers and with torch

# Runs the code after it with none of the extras' modules, as if they were not installed.
WITHOUT = """
import sys

class Without:
    def __init__(self, finder): self.finder = finder
    def find_spec(self, name, *rest):
        return None if name.partition(".")[0] in BLOCKED else self.finder.find_spec(name, *rest)
    def __getattr__(self, name): return getattr(self.finder, name)

BLOCKED = set(sys.argv.pop(1).split(","))
sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
"""
CORE = """
import json, os, torch, steer
from steer.cli import main
from transformers import LlamaConfig, LlamaForCausalLM

place = sys.argv[1]
model = LlamaForCausalLM(LlamaConfig(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
                                     num_attention_heads=4, num_key_value_heads=2))
model.save_pretrained(f"{place}/model")
vectors = steer.attach(model, steer.SteeringConfig(layers="1,2", base_model_name_or_path=f"{place}/model"))
vectors.set_tensors({n: torch.randn_like(t) for n, t in vectors.tensors().items()})
vectors.save(f"{place}/v")
steer.detach(model)
steer.load(f"{place}/v", model)
done = [main([name, f"{place}/v"]) for name in ("info", "card")] + [main(["diff"] + [f"{place}/v"] * 2)]
for name in ("peft", "gguf", "lm-eval", "npz", "pt", "checkpoint"):
    done.append(main(["export", f"{place}/v", "--to", name]))
back = ["--model", f"{place}/model", "--out", f"{place}/w"]
done.append(main(["import", f"{place}/v.gguf", *back]))
import steer.export.gguf_model, steer.transfer, steer.engine, steer.cli.generate
assert steer.read(f"{place}/w").by_layer()[2].equal(steer.read(f"{place}/v").by_layer()[2])
print(done, BLOCKED & set(sys.modules))
"""


def without(code: str, *arguments: str, modules: str = "") -> subprocess.CompletedProcess[str]:
    blocked = modules or ",".join({name for names in MODULES.values() for name in names} - COMES_ALONG)
    command = [sys.executable, "-c", WITHOUT + code, blocked, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_the_core_needs_no_extra(tmp_path: Path) -> None:
    done = without(CORE, str(tmp_path))
    assert done.stdout.splitlines()[-1] == f"{[0] * 10} set()", done.stderr[-2000:]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("train --config demo", 'training needs trl: pip install "steer-rl[train]"'),
        ("sweep --config demo", 'training needs trl: pip install "steer-rl[train]"'),
        ("eval --model m --benchmarks b --out o", 'evaluation needs trl: pip install "steer-rl[train]"'),
        ("sae info nothing", 'steer.sae needs trl: pip install "steer-rl[sae]"'),
        ("lens directions a b", 'steer.lens needs trl: pip install "steer-rl[lens]"'),
    ],
)
def test_a_missing_extra_is_one_line(words: str, line: str) -> None:
    done = without(
        "from steer.cli import main\nsys.exit(main(sys.argv[1:]))", *words.split(), modules="trl,scipy"
    )
    assert (done.returncode, done.stderr) == (1, f"error: {line}\n")


def test_serving_needs_vllm(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(extras, "find_spec", lambda name: None if name == "vllm" else True)
    assert main(["serve", "model"]) == 1
    assert 'serving needs vllm: pip install "steer-rl[vllm]", or `make vllm`' in capsys.readouterr().err
    require("training", "train")
    with pytest.raises(SteerError) as error:
        require("x", "vllm")
    assert message(error).startswith("x needs vllm")


def modules(requirements: list[str]) -> set[str]:
    """The top-level modules of requirements, extras of steer itself included."""
    found = set()
    for text in requirements:
        name = re.match(r"[\w.-]+", text)[0].lower()
        if name == "steer-rl":
            for extra in re.search(r"\[(.*)\]", text)[1].split(","):
                found |= modules(PROJECT["optional-dependencies"][extra])
        else:
            found.add(MODULE.get(name, name.replace("-", "_")))
    return found


def imported(folder: Path) -> set[str]:
    found = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found.add(node.module.partition(".")[0])
    return found - set(sys.stdlib_module_names) - {"steer", "evals"}


@pytest.mark.parametrize("folder", ["steer", "recipes", "evals"])
def test_every_import_is_declared(folder: str) -> None:
    extra = PROJECT["optional-dependencies"].values()
    declared = modules([*PROJECT["dependencies"], *(text for texts in extra for text in texts)])
    assert imported(ROOT / folder) - declared - OPTIONAL == set()


@pytest.mark.parametrize("extra", MODULES)
def test_the_check_asks_for_what_the_extra_installs(extra: str) -> None:
    assert modules(PROJECT["optional-dependencies"][extra]) == set(MODULES[extra])


@pytest.mark.parametrize("name", ["transformers", "trl", "peft", "accelerate", "vllm"])
def test_libraries_with_private_interfaces_have_an_upper_bound(name: str) -> None:
    extra = PROJECT["optional-dependencies"].values()
    texts = [*PROJECT["dependencies"], *(text for texts in extra for text in texts)]
    (found,) = {text for text in texts if re.match(rf"{name}\b(?!-)", text)}
    assert re.search(r"<\d", found)
