"""To the hub and back, with a hub that is a folder: no network."""

from __future__ import annotations

import ast
import dataclasses
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from helpers.hub import fake_hub
from helpers.steering import fill, message
from helpers.training import same
from huggingface_hub import HfApi, ModelCardData
from huggingface_hub.hf_api import RepoFile

import steer
from steer import Artifact, SteerError, SteeringConfig, hub
from steer.artifact import CARD_FILE, CONFIG_FILE, TENSOR_FILE
from steer.card import card
from steer.config import Condition
from steer.models import load_model
from steer.sae import SAE, SAEConfig, load_sae, own


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    return fake_hub(tmp_path, monkeypatch)


def test_the_fake_takes_what_the_library_takes() -> None:
    """The arguments that `steer.hub` gives are parameters of the real methods."""
    import inspect

    assert {"private", "exist_ok"} <= set(inspect.signature(HfApi.create_repo).parameters)
    assert {"repo_id", "folder_path", "commit_message", "revision"} <= set(
        inspect.signature(HfApi.upload_folder).parameters
    )
    assert {"filter", "author", "sort", "limit"} <= set(inspect.signature(HfApi.list_models).parameters)
    assert list(inspect.signature(HfApi.get_paths_info).parameters)[1:3] == ["repo_id", "paths"]
    assert "size" in {field.name for field in dataclasses.fields(RepoFile)}


def test_vectors_go_to_the_hub_and_come_back(build_tiny: Any, remote: Any) -> None:
    model = build_tiny("llama")
    model.config._name_or_path = "org/tiny"
    vectors = fill(steer.attach(model, SteeringConfig(scale=0.5, provenance={"recipe": "test"})))
    address = vectors.push_to_hub("me/vectors", private=True, token="secret", commit_message="First")
    assert address == "https://huggingface.co/me/vectors/commit/1"
    assert remote.calls == [
        ("token", "secret"),
        ("create_repo", "me/vectors", {"private": True, "exist_ok": True}),
        ("upload_folder", "me/vectors", {"commit_message": "First", "revision": None}),
    ]
    assert remote.files("me/vectors") == sorted([CARD_FILE, CONFIG_FILE, TENSOR_FILE])
    found = Artifact.from_pretrained("me/vectors", revision="v1", token="secret")
    assert remote.calls[-1] == ("download", "me/vectors", TENSOR_FILE, "v1", "secret")
    assert found.config == vectors.config and same(found.tensors, vectors.tensors())
    loaded = steer.load("me/vectors", build_tiny("llama"))
    assert same(loaded.tensors(), vectors.tensors())
    card = (remote.home / "me/vectors" / CARD_FILE).read_text()
    assert 'steer.load("me/vectors", model)' in card and "--vectors me/vectors" in card
    assert "THIS_FOLDER" not in card and "pypi.org" not in card


def test_a_revision_is_for_ids_of_the_hub(tiny_llama: Any, tmp_path: Path) -> None:
    folder = steer.attach(tiny_llama).save(tmp_path / "vectors")
    sae = make().save_pretrained(tmp_path / "sae")
    cases: list[tuple[Any, Path]] = [(steer.read, folder), (steer.read, folder / TENSOR_FILE)]
    for read, source in [*cases, (SAE.from_pretrained, sae)]:
        with pytest.raises(SteerError, match=r"revision 'v1' was given with .*: only hub ids have") as error:
            read(source, revision="v1")
        message(error)


def test_a_name_without_an_owner_is_the_whole_id_in_the_card(
    tiny_llama: Any, remote: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def create(self: Any, repo_id: str, **arguments: Any) -> Any:
        return SimpleNamespace(repo_id=f"me/{repo_id}")

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", create)
    vectors = fill(steer.attach(tiny_llama))
    Artifact(vectors.config, vectors.tensors()).push_to_hub("vectors", revision="v1")
    assert remote.calls[-1][:2] == ("upload_folder", "me/vectors")
    assert remote.calls[-1][2]["revision"] == "v1"
    assert 'steer.load("me/vectors", model)' in (remote.home / "me/vectors" / CARD_FILE).read_text()


def test_the_name_of_a_repository_may_have_dots(tiny_llama: Any, remote: Any) -> None:
    vectors = fill(steer.attach(tiny_llama))
    vectors.push_to_hub("me/Qwen2.5-7B-math")
    assert same(steer.read("me/Qwen2.5-7B-math").tensors, vectors.tensors())
    asked = len(remote.calls)
    with pytest.raises(SteerError, match="no such file or folder"):
        steer.read("me/vectors.safetensors")
    assert len(remote.calls) == asked, "the hub is not asked for a file"


def test_the_long_names_do_what_the_short_ones_do(tiny_llama: Any, tmp_path: Path, remote: Any) -> None:
    vectors = fill(steer.attach(tiny_llama))
    assert vectors.save_pretrained(tmp_path / "a") == tmp_path / "a"
    vectors.save(tmp_path / "b")
    assert (tmp_path / "a" / TENSOR_FILE).read_bytes() == (tmp_path / "b" / TENSOR_FILE).read_bytes()
    saved = Artifact.from_pretrained(tmp_path / "a")
    assert saved.save_pretrained(tmp_path / "c") == tmp_path / "c"
    assert (tmp_path / "c" / TENSOR_FILE).read_bytes() == (tmp_path / "b" / TENSOR_FILE).read_bytes()
    saved.push_to_hub("me/again")
    assert ("create_repo", "me/again", {"private": None, "exist_ok": True}) in remote.calls
    assert same(steer.read("me/again").tensors, saved.tensors)


def test_vectors_that_cannot_be_saved_create_no_repository(tiny_llama: Any, remote: Any) -> None:
    vectors = fill(steer.attach(tiny_llama))
    with torch.no_grad():
        vectors.parameters()[0][0] = float("nan")
    with pytest.raises(SteerError, match="NaN"):
        vectors.push_to_hub("me/vectors")
    assert remote.calls == []


def test_a_refusal_of_the_hub_is_one_line(tiny_llama: Any, remote: Any, monkeypatch: Any) -> None:
    def refuse(*arguments: Any, **keywords: Any) -> None:
        raise OSError("401 Client Error.\n\nInvalid user token.")  # HfHubHTTPError is one

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", refuse)
    with pytest.raises(SteerError, match=r"me/vectors .*401.*token=") as error:
        fill(steer.attach(tiny_llama)).push_to_hub("me/vectors")
    message(error)


def test_a_name_that_is_no_id_is_refused(tiny_llama: Any, monkeypatch: Any) -> None:
    """By the library itself, before it asks the hub."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(SteerError, match="cannot push to a b") as error:
        fill(steer.attach(tiny_llama)).push_to_hub("a b//c")
    message(error)


# --- SAEs


def make() -> SAE:
    config = SAEConfig(
        d_in=12,
        d_sae=48,
        k=5,
        activation="batchtopk",
        source={"model": "org/tiny", "layer": 1, "site": "resid_post"},
    )
    sae = SAE(config)
    sae.threshold.fill_(0.5)
    return sae.eval()


def test_an_sae_goes_to_the_hub_and_comes_back(remote: Any, tmp_path: Path) -> None:
    sae = make()
    address = sae.push_to_hub("me/sae", private=False, commit_message="An SAE")
    assert address.endswith("me/sae/commit/1")
    assert ("upload_folder", "me/sae", {"commit_message": "An SAE", "revision": None}) in remote.calls
    assert remote.files("me/sae") == sorted([own.CONFIG_FILE, own.WEIGHTS_FILE, own.CARD_FILE])
    found = SAE.from_pretrained("me/sae", revision="v2")
    assert [call[2:] for call in remote.calls[-2:]] == [
        (own.CONFIG_FILE, "v2", None),
        (own.WEIGHTS_FILE, "v2", None),
    ]
    assert found.cfg == sae.cfg and same(found.state_dict(), sae.state_dict()) and not found.training
    text = (remote.home / "me/sae" / own.CARD_FILE).read_text()
    metadata = yaml.safe_load(text.split("---")[1])
    assert metadata["base_model"] == "org/tiny" and metadata["library_name"] == "steer"
    assert 'SAE.from_pretrained("me/sae")' in text and "48 features" in text
    sae.bfloat16().save_pretrained(tmp_path / "half")
    assert SAE.from_pretrained(tmp_path / "half").dtype == torch.bfloat16
    assert same(load_sae(tmp_path / "half").state_dict(), sae.state_dict())


@pytest.mark.parametrize("source", ["me/nothing", "nowhere/at/all", ""])
def test_an_sae_that_is_not_there_is_refused(remote: Any, source: str) -> None:
    with pytest.raises(SteerError) as error:
        SAE.from_pretrained(source)
    assert source in message(error)


def test_files_of_other_tools_are_named(tmp_path: Path) -> None:
    sae = SAE(SAEConfig(d_in=12, d_sae=48, k=5))
    steer.sae.save_sae(sae, tmp_path, format="sparsify")
    with pytest.raises(SteerError, match="load_sae") as error:
        SAE.from_pretrained(tmp_path)
    message(error)


def test_an_sae_keeps_a_card_of_the_users_own(tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    (tmp_path / own.CARD_FILE).write_text("mine")
    make().save_pretrained(tmp_path)
    assert (tmp_path / own.CARD_FILE).read_text() == "mine"


# --- what a card says


def front_matter(folder: Path) -> dict[str, Any]:
    return yaml.safe_load((folder / CARD_FILE).read_text().split("---")[1])


@pytest.mark.parametrize(
    ("base", "named"),
    [
        ("org/tiny", "org/tiny"),
        ("Qwen/Qwen2.5-Math-7B", "Qwen/Qwen2.5-Math-7B"),
        ("smollm2-135m-instruct", "HuggingFaceTB/SmolLM2-135M-Instruct"),
        ("runs/model", None),  # a folder, below
        ("/home/me/model", None),
        ("./model", None),
        ("a/b/c", None),
        ("org/two words", None),
        ("org/name: [x", None),
        (None, None),
    ],
)
def test_the_card_names_bases_that_are_on_the_hub(
    build_tiny: Any, tmp_path: Path, monkeypatch: Any, base: str | None, named: str | None
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "model").mkdir(parents=True)
    model = build_tiny("llama")
    model.config._name_or_path = base
    folder = fill(steer.attach(model)).save(tmp_path / "vectors")
    found = front_matter(folder)
    assert found["library_name"] == "steer" and "steering-vectors" in found["tags"]
    assert "license" not in found
    assert (found.get("base_model"), found.get("base_model_relation")) == (
        (named, "adapter") if named else (None, None)
    )
    assert ModelCardData(**found).to_dict() == found
    text = (folder / CARD_FILE).read_text()
    assert "pip install steer-rl" in text and "https://github.com/steer-rl/steer" in text
    assert ("AutoModelForCausalLM" in text) == (named is not None and named == base)


def test_the_code_of_a_card_runs(build_tiny: Any, tiny_tokenizer: Any, tmp_path: Path) -> None:
    base = tmp_path / "base"
    build_tiny("llama").save_pretrained(base)
    tiny_tokenizer.save_pretrained(base)
    model = load_model(str(base))
    folder = fill(steer.attach(model)).save(tmp_path / "vectors")
    card = (folder / CARD_FILE).read_text()
    code = card.split("```python\n")[1].split("```")[0].replace("THIS_FOLDER", str(folder))
    names: dict[str, Any] = {}
    exec(code, names)
    assert len(names["vectors"].layers) == 3


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, ["peft", "checkpoint", "gguf --block-0 drop", "lm-eval"]),
        ({"layers": "1-2"}, ["peft", "checkpoint", "gguf", "lm-eval"]),
        ({"layers": "0"}, ["peft", "checkpoint", "lm-eval"]),
        ({"site": "mlp_out"}, ["peft", "checkpoint", "lm-eval"]),
        ({"site": "resid_pre"}, []),
        ({"positions": "completion"}, []),
        ({"layers": "1-2", "condition": Condition(0, 0.1)}, []),
        ({"kind": "adaptive"}, ["peft"]),
        ({"kind": "adaptive", "positions": "completion"}, []),
    ],
)
def test_a_card_names_the_exports_that_are_possible(fields: dict[str, Any], expected: list[str]) -> None:
    config = SteeringConfig(
        base_model_name_or_path="org/tiny", model_type="llama", hidden_size=4, num_hidden_layers=3, **fields
    )
    text = card(config, "model.layers", 12, 48)
    assert re.findall(r"`steer export THIS_FOLDER --to (.*?) --out ", text) == expected


@pytest.mark.parametrize(("made", "said"), [({}, "100 updates"), ({"updates": 24}, "24 updates")])
def test_a_card_names_the_updates_that_made_the_vectors(made: dict[str, Any], said: str) -> None:
    told = {"run": {"train_data": "gsm8k"}, "training": {"max_steps": 100}, **made}
    config = SteeringConfig(
        base_model_name_or_path="org/tiny", hidden_size=4, num_hidden_layers=1, provenance=told
    )
    text = card(config, "model.layers", 4, 16)
    assert f"## Trained on\n\n`gsm8k`, {said}." in text


@pytest.mark.parametrize(
    ("name", "expected"), [("org/name", True), ("name", False), ("", False), ("org/a b", False)]
)
def test_what_is_a_hub_id(name: str, expected: bool) -> None:
    assert hub.is_hub_id(name) == expected


def test_what_a_config_says_is_text_in_the_card() -> None:
    evil = '<img src=x onerror=alert(1)> | "); import os; os.abort()  # '
    shape: dict[str, Any] = {"hidden_size": 4, "num_hidden_layers": 1}
    config = SteeringConfig(base_model_name_or_path=evil, base_revision=evil, model_type=evil, **shape)
    text = card(config, "model.layers", 4, 16)
    code = text.partition("```python\n")[2]
    code, _, other = code.partition("```")
    (call,) = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call) and node.keywords]
    assert [ast.literal_eval(value) for value in (call.args[0], call.keywords[0].value)] == [evil, evil]
    assert "<img" not in text.partition("```")[0] + other
    (row,) = [line for line in text.splitlines() if line.startswith("| base model |")]
    assert row.replace("\\|", "").count("|") == 3
