"""Shared by all tests: tiny random models of every architecture, a tiny tokenizer, real weights and data."""

from __future__ import annotations

import os
import string
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from steer.threads import PASSIVE

# Test processes run beside each other. Set here, before torch is loaded, unless the user has set either.
if not PASSIVE.keys() & os.environ.keys():
    os.environ.update(PASSIVE)
# Nothing is looked up on the hub: without a network every name would wait for its time limit.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import hypothesis
import pytest
import torch
from helpers.paths import ROOT, SHARED
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

# An example that takes long beside other processes is not a fault.
hypothesis.settings.register_profile("steer", deadline=None)
hypothesis.settings.load_profile("steer")

# Beside other test processes one thread each: two that wait for each other's core are slower than one.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, torch.get_num_threads()))

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
# By model_type. A window of 8 makes the sliding layers forget within a test's few tokens.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": SHAPE,
    "qwen2": SHAPE,
    "qwen3": {**SHAPE, "head_dim": 8},
    "mistral": {**SHAPE, "sliding_window": 8},
    "gemma2": {**SHAPE, "head_dim": 8, "sliding_window": 8},
    "gemma3_text": {**SHAPE, "head_dim": 8, "sliding_window": 8},
    "phi3": SHAPE,
    "olmo2": SHAPE,
    "gpt2": {
        "vocab_size": 97,
        "n_embd": 32,
        "n_layer": 3,
        "n_head": 4,
        "n_positions": 128,
        # no dropout, so that training mode computes the same as eval mode
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
    },
    "gpt_neox": {k: v for k, v in SHAPE.items() if k != "num_key_value_heads"},
    "mixtral": {**SHAPE, "num_local_experts": 4},
    "qwen3_moe": {
        **SHAPE,
        "head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "decoder_sparse_step": 1,
    },
}

SPECIALS = ["<pad>", "<s>", "</s>", "<unk>", "<|system|>", "<|user|>", "<|assistant|>"]
# Rare characters are left out so that every id fits a tiny model's 97 rows; they become <unk>.
CHARACTERS = [
    c for c in "\n " + string.digits + string.ascii_letters + string.punctuation if c not in "`~@#;|"
]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}"
    "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


# What takes longest, first. A process gets whole files (--dist loadfile): the last one would run alone.
HEAVY = (
    "cli/test_every_command.py",
    "training/test_compare_methods.py",
    "generation/test_verify.py",
    "training/sweep/test_trainer.py",
    "training/test_steering_trainer.py",
    "training/test_recipe.py",
    "training/sweep/test_layer_sweep.py",
    "docs/test_notebooks.py",
    "training/test_sharded.py",
)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files of HEAVY in this order, then those with few tests, which take longer than those with many."""
    sizes = Counter(item.path for item in items)
    first = {ROOT / "tests" / name: place for place, name in enumerate(HEAVY)}
    items.sort(key=lambda item: (first.get(item.path, len(first)), sizes[item.path]))


@pytest.fixture(scope="session")
def build_tiny() -> Callable[..., PreTrainedModel]:
    """`build_tiny("llama", seed=0, num_hidden_layers=4, ...)`: a new random float32 model in eval mode."""

    def build(model_type: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
        torch.manual_seed(seed)
        config = CONFIG_MAPPING[model_type](**{**ARCHITECTURES[model_type], **TOKENS, **changes})
        return AutoModelForCausalLM.from_config(config).eval()

    return build


@pytest.fixture(params=list(ARCHITECTURES))
def tiny_model(request: pytest.FixtureRequest, build_tiny: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    """Every architecture in turn: 3 layers, hidden size 32, vocabulary 97."""
    return build_tiny(request.param)


@pytest.fixture
def tiny_llama(build_tiny: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    return build_tiny("llama")


@pytest.fixture
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character, left padding, a chat template; all ids are below 97 and fit the tiny models."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers
    from tokenizers import models as tokenizer_models

    vocabulary = {token: index for index, token in enumerate(SPECIALS + CHARACTERS)}
    characters = Tokenizer(tokenizer_models.WordLevel(vocabulary, unk_token="<unk>"))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    characters.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=characters,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=[AddedToken(token, special=True) for token in SPECIALS[4:]],
        padding_side="left",
        model_max_length=128,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of benchmark files that lies beside a developer's checkout."""
    folder = SHARED / "data"
    if not folder.is_dir():
        pytest.skip("the benchmark files (../shared/data) are not on this machine")
    return folder


@pytest.fixture(scope="session")
def smollm2() -> PreTrainedModel:
    """
    SmolLM2-135M-Instruct in float32, for tests marked `real`. One for the session: who steers it must detach.
    """
    from steer.models import load_model

    return load_model("smollm2-135m-instruct", dtype="float32")


@pytest.fixture
def recipe(capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> Callable[..., str]:
    """`recipe(script, *words)`: what a recipe says that is run by `run_here`."""
    from helpers.launching import run_here

    def run(script: Path, *words: str, plots: bool = False) -> str:
        caplog.clear()
        capsys.readouterr()
        with caplog.at_level("INFO"):
            run_here(script, *words, plots=plots)
        printed = capsys.readouterr()
        return printed.out + printed.err + caplog.text

    return run


@pytest.fixture
def run(build_tiny: Callable, tiny_tokenizer: Any, tmp_path: Path) -> Callable[..., Any]:
    """`run(reward=..., steering=..., resume=..., **settings)`: the trainer of a tiny Llama, at its end."""
    from helpers.training import SPREAD, config, make_trainer, parity

    from steer.generation import verify

    def start(
        reward: Any = parity,
        steering: Any = None,
        data: Any = None,
        resume: Path | None = None,
        folder: str = "run",
        dtype: torch.dtype = torch.float32,
        callbacks: list[Any] | None = None,
        train: bool = True,
        model: PreTrainedModel | None = None,
        **settings: Any,
    ) -> Any:
        if model is None:
            model = build_tiny("llama", initializer_range=SPREAD).to(dtype)
            if dtype == torch.float32:  # known to be fast: saves the trial of each new model
                verify._found[model] = dict.fromkeys((True, False), verify.FastPaths())
        args = config(tmp_path / folder, **settings)
        trainer = make_trainer(model, tiny_tokenizer, args, reward, steering, data, callbacks=callbacks)
        if train:
            trainer.train(resume_from_checkpoint=str(resume) if resume else None)
        return trainer

    return start
