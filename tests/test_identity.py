"""Which model is this: checksums, and what loading says about the model that vectors were made for."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from helpers.steering import fill, logits, message, tokens
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

import steer
from steer import SteerError, SteeringConfig, artifact
from steer.identity import ROWS, base_checksum, describe, names_another_base, tokenizer_checksum

Build = Callable[..., PreTrainedModel]


@contextmanager
def silent() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def warned(caught: pytest.WarningsRecorder) -> list[str]:
    texts = [str(warning.message) for warning in caught]
    assert all(text.isprintable() for text in texts)  # one line each
    return texts


# --- checksums


def test_a_checksum_is_sixteen_hex_digits_and_tells_models_apart(tiny_model, build_tiny):
    found = base_checksum(tiny_model)
    assert len(found) == 16 and int(found, 16) >= 0
    assert base_checksum(copy.deepcopy(tiny_model)) == found
    assert base_checksum(build_tiny(tiny_model.config.model_type)) == found
    assert base_checksum(build_tiny(tiny_model.config.model_type, seed=1)) != found


@pytest.mark.parametrize("saved", [torch.bfloat16, torch.float32])
def test_the_precision_of_loading_changes_nothing(tiny_model, tmp_path, saved):
    tiny_model.to(saved).save_pretrained(tmp_path)
    half, full = (AutoModelForCausalLM.from_pretrained(tmp_path, dtype=d) for d in ("bfloat16", "float32"))
    assert {p.dtype for p in full.parameters()} == {torch.float32}
    assert base_checksum(half) == base_checksum(full) == base_checksum(tiny_model)


def test_a_fine_tuned_model_has_another(tiny_model):
    before, ids = base_checksum(tiny_model), tokens(4, 16)
    optimizer = torch.optim.AdamW(tiny_model.parameters(), lr=1e-3)
    tiny_model(ids, labels=ids).loss.backward()
    optimizer.step()
    assert base_checksum(tiny_model) != before


@pytest.mark.parametrize("where", ["first row", "last row", "last layer's norm"])
def test_a_change_of_one_sampled_number_is_seen(tiny_llama, where):
    before = base_checksum(tiny_llama)
    place = {
        "first row": tiny_llama.model.embed_tokens.weight[0],
        "last row": tiny_llama.model.embed_tokens.weight[-1],
        "last layer's norm": tiny_llama.model.layers[-1].input_layernorm.weight,
    }[where]
    with torch.no_grad():
        place[3] += 0.25
    assert base_checksum(tiny_llama) != before


def test_large_vocabularies_are_sampled_evenly(build_tiny):
    model = build_tiny("llama", vocab_size=10_007)
    before, seen = base_checksum(model), []
    embeddings = model.get_input_embeddings().weight
    for row in range(0, 10_007, 13):
        with torch.no_grad():
            old = embeddings[row].clone()
            embeddings[row] += 1
            seen += [row] * (base_checksum(model) != before)
            embeddings[row] = old
    assert ROWS / 13 / 2 < len(seen) < ROWS / 13 * 2


def test_vectors_do_not_change_it(tiny_model):
    before = base_checksum(tiny_model)
    vectors = fill(steer.attach(tiny_model))
    assert base_checksum(tiny_model) == before == vectors.config.base_checksum


def test_models_without_weights_have_none(tiny_model):
    config = tiny_model.config
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)
    assert base_checksum(skeleton) is None
    told, real = describe(skeleton), describe(tiny_model)
    assert told | {"base_checksum": None} == real | {"base_checksum": None}
    assert real["base_checksum"] is not None


def test_quantised_layers_leave_it_as_it_is(tiny_llama):
    # a quantised copy keeps embeddings and norms, and packs the matrices in between
    before = base_checksum(tiny_llama)
    for layer in tiny_llama.model.layers:
        layer.mlp.down_proj.weight = nn.Parameter(layer.mlp.down_proj.weight.to(torch.float8_e4m3fn), False)
    assert base_checksum(tiny_llama) == before


def test_a_vocabulary_has_a_checksum(tiny_tokenizer):
    found = tokenizer_checksum(tiny_tokenizer)
    assert len(found) == 16 and int(found, 16) >= 0
    assert tokenizer_checksum(copy.deepcopy(tiny_tokenizer)) == found
    assert tokenizer_checksum(swapped(tiny_tokenizer)) != found
    longer = copy.deepcopy(tiny_tokenizer)
    longer.add_tokens(["~~"])
    assert tokenizer_checksum(longer) != found


def swapped(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The same tokens, two of them with each other's ids."""
    saved = json.loads(tokenizer.backend_tokenizer.to_str())
    words = saved["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]
    from tokenizers import Tokenizer

    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(saved)))


# --- loading


@pytest.fixture(params=["constant", "adaptive", "shared"])
def folder(request: pytest.FixtureRequest, build_tiny: Build, tiny_tokenizer, tmp_path: Path) -> Path:
    """Vectors of each kind for `build_tiny("llama")` and `tiny_tokenizer`."""
    model = build_tiny("llama")
    model.config._name_or_path = "org/tiny"
    checksum = tokenizer_checksum(tiny_tokenizer)
    config = SteeringConfig(kind=request.param, rank=2, tokenizer_checksum=checksum)
    return fill(steer.attach(model, config)).save(tmp_path / "vectors")


def test_an_exact_match_is_silent(folder, build_tiny, tiny_tokenizer):
    with silent():
        vectors = steer.load(folder, build_tiny("llama"), tokenizer=tiny_tokenizer)
        steer.load(folder, build_tiny("llama"))
        steer.load(artifact.read(folder), build_tiny("llama"))
    assert vectors.config == artifact.read(folder).config


def test_the_same_weights_in_bfloat16_are_silent(build_tiny, tmp_path):
    build_tiny("llama").bfloat16().save_pretrained(tmp_path)
    half, full = (AutoModelForCausalLM.from_pretrained(tmp_path, dtype=d) for d in ("bfloat16", "float32"))
    saved = fill(steer.attach(half)).save(tmp_path / "vectors")
    with silent():
        steer.load(saved, full)


def test_other_weights_of_the_shape_are_reported_and_steered(folder, build_tiny):
    model = build_tiny("llama", seed=1)
    model.config._name_or_path = "org/tuned"
    base = logits(model, tokens())
    with pytest.warns(UserWarning, match="other weights") as caught:
        vectors = steer.load(folder, model)
    (text,) = warned(caught)
    assert "org/tiny" in text and "org/tuned" in text and str(folder) in text
    assert (logits(model, tokens()) - base).abs().max() > 1e-3
    assert all(torch.equal(t, artifact.read(folder).tensors[n]) for n, t in vectors.tensors().items())


def test_another_vocabulary_is_reported(folder, build_tiny, tiny_tokenizer):
    with pytest.warns(UserWarning, match="vocabulary") as caught:
        steer.load(folder, build_tiny("llama"), tokenizer=swapped(tiny_tokenizer))
    (text,) = warned(caught)
    assert "org/tiny" in text
    with pytest.warns(UserWarning) as caught:
        steer.load(folder, build_tiny("llama", seed=1), tokenizer=swapped(tiny_tokenizer))
    assert len(warned(caught)) == 2


@pytest.mark.parametrize("field", ["base_checksum", "tokenizer_checksum"])
def test_what_an_artifact_does_not_know_is_not_reported(build_tiny, tiny_tokenizer, tmp_path, field):
    model = build_tiny("llama")
    vectors = fill(steer.attach(model, SteeringConfig(tokenizer_checksum=tokenizer_checksum(tiny_tokenizer))))
    setattr(vectors.config, field, None)
    vectors.save(tmp_path)
    other = build_tiny("llama", seed=int(field == "base_checksum"))
    tokenizer = swapped(tiny_tokenizer) if field == "tokenizer_checksum" else tiny_tokenizer
    with silent():
        steer.load(tmp_path, other, tokenizer=tokenizer)


def test_loading_joins_no_two_bases(build_tiny, tmp_path):
    """A base without revision and checksum gets neither from the model that its vectors are loaded into."""
    named = SteeringConfig(base_model_name_or_path="bundled")
    vectors = fill(steer.attach(build_tiny("llama"), named))
    assert vectors.config.base_checksum is None
    vectors.save(tmp_path / "vectors")
    model = build_tiny("llama", seed=1)
    model.config._name_or_path, model.steer_revision = "org/tiny", "v1"
    again = steer.load(tmp_path / "vectors", model).save(tmp_path / "again")
    told = artifact.read(again).config
    assert (told.base_model_name_or_path, told.base_revision, told.base_checksum) == ("bundled", None, None)
    assert told.hidden_size == 32 and told.model_type == "llama"
    steer.detach(model)
    told = steer.attach(model).config
    assert (told.base_model_name_or_path, told.base_revision) == ("org/tiny", "v1")
    assert told.base_checksum == base_checksum(model)


@pytest.mark.parametrize(
    ("model_type", "shape", "named"),
    [
        ("llama", {"hidden_size": 64}, "hidden_size=32"),
        ("llama", {"num_hidden_layers": 4}, "num_hidden_layers=3"),
        ("qwen2", {}, "model_type=llama"),
    ],
)
def test_anything_else_is_refused_and_told_of_transfer(folder, build_tiny, model_type, shape, named):
    model = build_tiny(model_type, **shape)
    base = logits(model, tokens())
    with pytest.raises(SteerError, match="steer transfer") as error:
        steer.load(folder, model)
    assert named in message(error) and "org/tiny" in message(error)
    assert all(p.requires_grad for p in model.parameters())
    assert torch.equal(logits(model, tokens()), base)
    steer.attach(model)


def test_names_tell_of_another_base(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = SteeringConfig(base_model_name_or_path="org/tiny", base_adapter="runs/lora")
    for adapter in ("runs/lora", "./runs/lora", str(tmp_path / "runs" / "lora")):
        assert names_another_base(config, "org/tiny", adapter, "v") is None
    plain = names_another_base(config, "org/tiny", None, "v")
    assert plain.startswith("v: made for org/tiny with adapter runs/lora merged into it")
    assert "this model is org/tiny, and the engine does not compare weights" in plain and plain.isprintable()
    other = names_another_base(SteeringConfig(base_model_name_or_path="org/tiny"), "org/other", None, "v")
    assert other.startswith("v: made for org/tiny; this model is org/other, and")
    assert names_another_base(SteeringConfig(), "org/tiny", None, "v") is None


def test_training_writes_down_both(build_tiny, tiny_tokenizer, tmp_path):
    from helpers.training import SPREAD, config, make_trainer

    model = build_tiny("llama", initializer_range=SPREAD)
    trainer = make_trainer(model, tiny_tokenizer, config(tmp_path / "run", max_steps=1))
    trainer.train()
    trainer.save_model(str(tmp_path / "out"))
    told = artifact.read(tmp_path / "out").config
    assert told.base_checksum == base_checksum(build_tiny("llama", initializer_range=SPREAD))
    assert told.tokenizer_checksum == tokenizer_checksum(tiny_tokenizer)
    with silent():
        steer.load(tmp_path / "out", build_tiny("llama", initializer_range=SPREAD), tokenizer=tiny_tokenizer)
