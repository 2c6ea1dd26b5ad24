"""Which log-probabilities of an engine compare with the trainer's; no engine is needed here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.training import config

from steer import SteerError
from steer.engine.logprobs import PROCESSED, RAW, logprobs_mode
from steer.training.sweep.member import check_supported

UNWEIGHED = {"vllm_importance_sampling_correction": False}
TRUNCATED: list[dict[str, Any]] = [
    {"top_p": 0.8},
    {"top_k": 10},
    {"min_p": 0.05},
    {"repetition_penalty": 1.1},
    {"generation_kwargs": {"presence_penalty": 1.0}},
]
GUIDED: list[dict[str, Any]] = [
    {"vllm_structured_outputs_regex": "[0-9]+"},
    {"generation_kwargs": {"structured_outputs": {"regex": "[0-9]+"}}},
]
PLAIN: list[dict[str, Any]] = [
    {},
    {"temperature": 0.7},
    {"top_p": 1.0, "top_k": 0, "min_p": 0.0},
    {"generation_kwargs": {"stop": ["\n"], "ignore_eos": True}},
]


def settings(folder: Path, **changes: Any) -> Any:
    return config(folder, use_vllm=True, **changes)


@pytest.mark.parametrize("changes", PLAIN, ids=str)
def test_plain_sampling_compares_after_temperature(tmp_path: Path, changes: dict[str, Any]) -> None:
    assert logprobs_mode(settings(tmp_path, **changes)) == PROCESSED


@pytest.mark.parametrize("changes", TRUNCATED, ids=str)
def test_truncated_sampling_compares_before_truncation(tmp_path: Path, changes: dict[str, Any]) -> None:
    assert logprobs_mode(settings(tmp_path, **changes)) == RAW
    with pytest.raises(SteerError, match=rf"with {next(iter(changes))} at temperature 0\.7 .*temperature=1"):
        settings(tmp_path, **changes, temperature=0.7)
    assert logprobs_mode(settings(tmp_path, **changes, temperature=0.7, **UNWEIGHED)) is None
    with pytest.raises(SteerError, match="off_policy_mask_threshold"):
        settings(tmp_path, **changes, temperature=0.7, **UNWEIGHED, off_policy_mask_threshold=0.5)
    config(tmp_path, **changes, temperature=0.7)  # without an engine nothing is compared


@pytest.mark.parametrize("changes", GUIDED, ids=str)
def test_guided_sampling_never_compares(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(SteerError, match=r"structured outputs .*, or leave"):
        settings(tmp_path, **changes)
    assert logprobs_mode(settings(tmp_path, **changes, **UNWEIGHED)) is None


def test_a_regex_without_an_engine_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SteerError, match="no effect without vLLM"):
        config(tmp_path, vllm_structured_outputs_regex="[0-9]+")


@pytest.mark.parametrize(
    ("key", "setting"),
    [("temperature", "temperature"), ("top_p", "top_p"), ("max_tokens", "max_completion_length")],
)
def test_settings_are_given_once(tmp_path: Path, key: str, setting: str) -> None:
    with pytest.raises(SteerError, match=rf"generation_kwargs has {key}, .*set {setting} instead"):
        config(tmp_path, generation_kwargs={key: 1})


def test_a_seed_for_each_request_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SteerError, match=r"generation_kwargs has seed=3, .* are the same.*leave it out"):
        settings(tmp_path, generation_kwargs={"seed": 3})


def test_a_population_knows_the_sampling_that_it_can_weigh(tmp_path: Path) -> None:
    for changes in TRUNCATED[:3]:
        check_supported(settings(tmp_path, **changes))
    for changes in TRUNCATED[3:]:
        with pytest.raises(SteerError, match=next(iter(changes))):
            check_supported(settings(tmp_path, **changes))
