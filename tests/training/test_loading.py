"""A model that the trainers are given by name."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.steering import message
from helpers.training import SPREAD, config, model_folder, parity, problems, same

import steer
from steer import SteerError, SteeringConfig
from steer.identity import describe
from steer.models import load_model
from steer.training.baselines import Baseline, BaselineGRPOTrainer
from steer.training.steering_trainer import SteeringGRPOTrainer


@pytest.fixture
def folder(build_tiny: Any, tiny_tokenizer: Any, tmp_path: Path) -> str:
    model = build_tiny("llama", initializer_range=SPREAD).to(torch.bfloat16)
    return str(model_folder(tmp_path / "base", model, tiny_tokenizer))


def trainer(model: Any, tmp_path: Path, kwargs: dict[str, Any] | None = None, **settings: Any) -> Any:
    args = config(tmp_path / "run", **settings)
    return SteeringGRPOTrainer(
        model, parity, args, SteeringConfig(layers="1"), train_dataset=problems(), **(kwargs or {})
    )


def test_a_name_trains_the_vectors_that_a_model_does(
    folder: str, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    named = trainer(folder, tmp_path)
    assert named.model.dtype == torch.bfloat16, "as it was saved"
    assert named.processing_class.padding_side == "left"
    given = trainer(load_model(folder), tmp_path, {"processing_class": tiny_tokenizer})
    for one in (named, given):
        one.train()
    found = named.vectors.tensors()
    assert all(tensor.norm() > 0 for tensor in found.values())
    assert same(found, given.vectors.tensors())
    assert named.vectors.config.base_model_name_or_path == folder
    assert named.vectors.config.tokenizer_checksum == given.vectors.config.tokenizer_checksum


def test_loaded_vectors_are_for_the_model_that_is_trained(
    folder: str, build_tiny: Any, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    other = build_tiny("llama", seed=1)
    named = {"base_model_name_or_path": "other", "base_checksum": describe(other)["base_checksum"]}
    saved = steer.attach(other, SteeringConfig(**named)).save(tmp_path / "other")
    model = load_model(folder)
    with pytest.warns(UserWarning, match="other weights"):
        loaded = steer.load(saved, model)
    expected = describe(model)
    assert loaded.config.base_model_name_or_path == "other"
    args = config(tmp_path / "run")
    made = SteeringGRPOTrainer(model, parity, args, train_dataset=problems(), processing_class=tiny_tokenizer)
    assert {name: getattr(made.vectors.config, name) for name in expected} == expected
    assert expected["base_model_name_or_path"] == folder and expected["base_checksum"]


def test_model_init_kwargs_are_those_of_load_model(folder: str, tmp_path: Path, caplog: Any) -> None:
    options = {"dtype": "float32", "attn_implementation": "eager"}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        made = trainer(folder, tmp_path, model_init_kwargs=options)
    assert made.model.dtype == torch.float32
    assert made.model.config._attn_implementation == "eager"
    assert made.args.model_init_kwargs == options
    assert "will be ignored" not in caplog.text


@pytest.mark.parametrize(
    ("options", "kwargs", "named"),
    [
        ({"torch_dtype": "float32"}, {}, "model_init_kwargs has torch_dtype"),
        ({"dtype": "float31"}, {}, "float31"),
        ({"quantization_config": 1}, {"quantization_config": 2}, "drop one"),
    ],
)
def test_options_that_cannot_work_are_refused(
    folder: str, tmp_path: Path, options: dict[str, Any], kwargs: dict[str, Any], named: str
) -> None:
    with pytest.raises(SteerError, match=named) as error:
        trainer(folder, tmp_path, kwargs, model_init_kwargs=options)
    message(error)


def test_a_model_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SteerError, match="no-such-folder") as error:
        trainer("no-such-folder/x/y", tmp_path)
    message(error)


def test_options_beside_a_loaded_model_are_refused(
    build_tiny: Any, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    options = {"model_init_kwargs": {"dtype": "float32"}}
    with pytest.raises(SteerError, match="has no effect: the model is loaded before") as error:
        trainer(build_tiny("llama"), tmp_path, {"processing_class": tiny_tokenizer}, **options)
    message(error)


@pytest.mark.parametrize(
    ("method", "dtype"), [("full", torch.float32), ("lora", torch.bfloat16), ("beft", torch.bfloat16)]
)
def test_baselines_take_a_name_too(folder: str, tmp_path: Path, method: str, dtype: torch.dtype) -> None:
    baseline = Baseline(method=method, target_modules=["down_proj"])
    args = config(tmp_path / "run", max_steps=1)
    made = BaselineGRPOTrainer(folder, parity, args, baseline, train_dataset=problems())
    assert made.model.get_input_embeddings().weight.dtype == dtype
    made.train()
    assert made.state.global_step == 1
