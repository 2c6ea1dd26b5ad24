"""A LoRA merged into the base: what peft computes, known from the plain base wherever it is used."""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.hub import cached_model
from helpers.steering import fill, logits, tokens
from helpers.training import model_folder
from peft import LoraConfig, PeftModel, get_peft_model

import steer
from steer import SteerError, SteeringConfig, artifact
from steer.base_adapter import adapter_checksum, artifact_base, merged_base, public_base
from steer.cli import main
from steer.identity import base_checksum, describe
from steer.lens.inputs import read_subject
from steer.models import load_model, load_tokenizer
from steer.training.run import RunConfig
from steer.transfer.move import transfer


@pytest.fixture
def places(tmp_path: Path, build_tiny, tiny_tokenizer, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    """The folders of a base model and of a LoRA that changes what it says."""
    monkeypatch.setenv("STEER_CACHE", str(tmp_path / "cache"))
    base = model_folder(tmp_path / "base", build_tiny("llama", initializer_range=0.3), tiny_tokenizer)
    adapted = get_peft_model(load_model(str(base)), LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    torch.manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    adapted.save_pretrained(tmp_path / "lora")
    return str(base), str(tmp_path / "lora")


def test_the_merged_model_is_what_peft_computes(places: tuple[str, str]) -> None:
    base, adapter = places
    folder = merged_base(base, adapter)
    with_adapter = PeftModel.from_pretrained(load_model(base), adapter)
    merged = load_model(folder)
    ids = tokens()
    with torch.no_grad():
        expected = with_adapter(ids).logits
    assert torch.allclose(logits(merged, ids), expected, atol=1e-4)
    assert not torch.allclose(logits(load_model(base), ids), expected, atol=1e-2)
    assert load_tokenizer(folder).get_vocab() == load_tokenizer(base).get_vocab()


def test_it_is_made_once_for_each_base_and_adapter(places: tuple[str, str]) -> None:
    base, adapter = places
    folder = Path(merged_base(base, adapter))
    made = folder.stat().st_mtime_ns
    assert merged_base(base, adapter) == str(folder) and folder.stat().st_mtime_ns == made
    assert public_base(str(folder)) == f"{base} with adapter {adapter_checksum(Path(adapter))}"
    assert public_base(base) == base and public_base("some/hub-id") == "some/hub-id"
    config = Path(adapter, "adapter_config.json")
    config.write_text(config.read_text().replace('"lora_alpha": 8', '"lora_alpha": 16'))
    assert merged_base(base, adapter) != str(folder), "another adapter"


def test_a_hub_base_is_told_by_its_commit(
    places: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = places
    commits = {"main": "a" * 40, "v1": "b" * 40}
    home = cached_model(Path(base), "org/base", commits, tmp_path / "hub", monkeypatch)

    def make(target: Path, *rest: Any) -> None:
        target.mkdir()
        (target / "config.json").write_text("{}")

    monkeypatch.setattr("steer.base_adapter._merge", make)
    made, tagged = merged_base("org/base", adapter), merged_base("org/base", adapter, "v1")
    assert made != tagged and merged_base("org/base", adapter, commits["main"]) == made
    (home / "refs" / "main").write_text(commits["v1"])
    assert merged_base("org/base", adapter) == tagged, "what is on main now"


def test_it_goes_by_the_names_that_were_given_last(
    places: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = places
    folder = merged_base(base, adapter)
    Path(adapter).rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    assert merged_base("base", "moved") == folder
    model = load_model(folder)
    told = describe(model)
    assert (told["base_model_name_or_path"], told["base_adapter"]) == ("base", "moved")
    assert base_checksum(model) == base_checksum(load_model(merged_base(base, str(tmp_path / "moved"))))


def test_another_chat_template_is_another_base(places: tuple[str, str]) -> None:
    base, adapter = places
    folder = merged_base(base, adapter)
    template = "{% for turn in messages %}{{ turn['content'] }}{% endfor %}"
    Path(base, "chat_template.jinja").write_text(template)
    other = merged_base(base, adapter)
    assert other != folder and load_tokenizer(other).chat_template == template


def test_the_card_loads_the_base_with_its_adapter(places: tuple[str, str], tmp_path: Path) -> None:
    base, adapter = places
    vectors = steer.attach(load_model(merged_base(base, adapter)), SteeringConfig(layers="1"))
    fill(vectors)
    text = Path(vectors.save(tmp_path / "vectors"), "README.md").read_text()
    assert f"--base-adapter {adapter} --vectors" in text and "pretrained=MERGED" in text
    found: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of other weights
        code = text.split("```python\n")[1].split("```")[0]
        exec(code.replace("THIS_FOLDER", str(tmp_path / "vectors")), found)
    assert found["vectors"].config.base_checksum == vectors.config.base_checksum
    assert base_checksum(found["model"]) != base_checksum(load_model(base))


def test_vectors_know_whether_an_adapter_was_merged(places: tuple[str, str], tmp_path: Path) -> None:
    base, adapter = places
    merged, plain = load_model(merged_base(base, adapter)), load_model(base)
    assert base_checksum(merged) != base_checksum(plain)
    vectors = steer.attach(merged, SteeringConfig(layers="1"))
    fill(vectors)
    assert vectors.config.base_adapter == adapter and vectors.config.base_model_name_or_path == base
    artifact.write(tmp_path / "merged", artifact.Artifact(vectors.config, vectors.tensors()))
    with pytest.warns(UserWarning, match=r"with adapter .* merged into it .*other weights"):
        steer.load(tmp_path / "merged", plain)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = steer.load(tmp_path / "merged", load_model(merged_base(base, adapter)))
    assert again.config.base_adapter == adapter
    steer.detach(plain)
    config = steer.attach(plain, SteeringConfig(layers="1")).config
    assert config.base_adapter is None
    artifact.write(tmp_path / "plain", artifact.Artifact(config, vectors.tensors()))
    with pytest.warns(UserWarning, match="other weights"):
        steer.load(tmp_path / "plain", load_model(merged_base(base, adapter)))


def test_a_run_loads_the_merged_model(places: tuple[str, str]) -> None:
    base, adapter = places
    model, tokenizer = RunConfig(model=base, base_adapter=adapter).load("float32")
    assert base_checksum(model) == base_checksum(load_model(merged_base(base, adapter)))
    assert len(tokenizer) == len(load_tokenizer(base))


def test_what_cannot_be_merged_is_one_line(places: tuple[str, str], tmp_path: Path, build_tiny) -> None:
    base, adapter = places
    with pytest.raises(SteerError, match="holds no adapter of peft"):
        merged_base(base, str(tmp_path / "nothing"))
    other = build_tiny("llama", hidden_size=64)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(SteerError, match=r"cannot be merged into .*give a LoRA of this model") as error:
        merged_base(str(tmp_path / "other"), adapter)
    assert "\n" not in str(error.value)
    assert not [p for p in (tmp_path / "cache" / "merged").iterdir() if p.is_dir()], "nothing half made"


def test_a_quantised_base_is_refused_before_its_weights_are_loaded(
    places: tuple[str, str], tmp_path: Path, build_tiny
) -> None:
    config = build_tiny("llama").config
    config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    config.save_pretrained(tmp_path / "config alone")
    with pytest.raises(SteerError, match=r"is quantised \(bitsandbytes\)"):
        merged_base(str(tmp_path / "config alone"), places[1])


def test_quantization_needs_its_library(places: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for option in ("load_in_4bit", "load_in_8bit"):
        with pytest.raises(SteerError, match=f"{option} needs bitsandbytes, which is not installed"):
            load_model(places[0], **{option: True})
    with pytest.raises(SteerError, match="give one of them"):
        load_model(places[0], load_in_4bit=True, load_in_8bit=True)


def steered_artifact(base: str, adapter: str, folder: Path) -> torch.Tensor:
    """Vectors for the base with its adapter, saved to `folder`; returns the logits with them."""
    model = load_model(merged_base(base, adapter))
    vectors = fill(steer.attach(model, SteeringConfig(kind="adaptive", layers="1")))
    vectors.save(folder)
    return logits(model, tokens())


def test_a_checkpoint_has_the_adapter_that_the_artifact_records(
    places: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, adapter = places
    expected = steered_artifact(base, adapter, tmp_path / "vectors")
    words = ["export", str(tmp_path / "vectors"), "--to"]
    assert main([*words, "checkpoint", "--out", str(tmp_path / "whole")]) == 0
    assert "warning:" not in capsys.readouterr().err
    whole = load_model(str(tmp_path / "whole"))
    assert torch.allclose(logits(whole, tokens()), expected, atol=1e-4)
    assert describe(whole)["base_adapter"] is None, "it is the base no more"
    # another model has no adapter unless told
    assert main([*words, "checkpoint", "--out", str(tmp_path / "plain"), "--model", base]) == 0
    assert "other weights" in capsys.readouterr().err
    assert not torch.allclose(logits(load_model(str(tmp_path / "plain")), tokens()), expected, atol=1e-2)
    both = ["--model", base, "--base-adapter", adapter]
    assert main([*words, "checkpoint", "--out", str(tmp_path / "both"), *both]) == 0
    assert torch.allclose(logits(load_model(str(tmp_path / "both")), tokens()), expected, atol=1e-4)
    assert main([*words, "peft", "--out", str(tmp_path / "peft")]) == 0
    assert "merged into it, and the exported adapter names the model alone" in capsys.readouterr().err
    assert main([*words, "gguf-model", "--out", str(tmp_path / "gguf")]) == 1
    assert f"which {base} lacks; give --model" in capsys.readouterr().err


def test_lens_and_transfer_read_the_base_with_the_adapter(
    places: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, adapter = places
    expected = steered_artifact(base, adapter, tmp_path / "vectors")
    options = {"model": None, "revision": None, "base_adapter": None, "trust_remote_code": False}
    args = argparse.Namespace(artifact=tmp_path / "vectors", dtype="auto", **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        subject = read_subject(args)
    assert torch.allclose(logits(subject.vectors.model, tokens()), expected, atol=1e-4)
    moved, out = ["transfer", str(tmp_path / "vectors"), "--to", base], str(tmp_path / "moved")
    assert main([*moved, "--method", "direct", "--accept-poor-map", "--out", out]) == 0
    made = transfer(tmp_path / "vectors", None, load_model(base), method="direct", force=True)
    assert not [note for note in made.report.notes if "other weights" in note]
    printed = capsys.readouterr()
    assert "other weights" not in printed.out + printed.err


def test_what_is_given_wins_over_what_the_artifact_records(places: tuple[str, str], tmp_path: Path) -> None:
    base, adapter = places
    config = SteeringConfig(base_model_name_or_path="org/model", base_revision="v1")
    assert artifact_base(config) == ("org/model", "v1")
    assert artifact_base(config, None, "v2") == ("org/model", "v2")
    assert artifact_base(config, "org/other") == ("org/other", None)
    config = SteeringConfig(base_model_name_or_path=base, base_adapter=str(tmp_path / "moved"))
    assert artifact_base(config, adapter=adapter) == (merged_base(base, adapter), None)
    with pytest.raises(SteerError, match="holds no adapter"):
        artifact_base(config)
    with pytest.raises(SteerError, match="does not name its base model; give the donor"):
        artifact_base(SteeringConfig(), fix="give the donor")
