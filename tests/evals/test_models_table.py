"""docs/models.md: the checks find what is wrong, hold on models of each family, and the page is current."""

from __future__ import annotations

import os

import pytest
from helpers.paths import ROOT

from evals import model_checks, models_table
from evals.architectures import causal_lm_types
from evals.model_checks import CHECKS, check
from evals.model_outcomes import Outcome
from steer import SteerError
from steer.kinds import SteeringState, SteeringVector

PAGE = ROOT / "docs" / "models.md"
# Rotary and learned positions; windows; experts; states. `make models` has every architecture.
REPRESENTATIVES = ["llama", "gpt2", "rwkv", "falcon_h1", "gpt_oss"]


def bad(found: dict[str, Outcome]) -> dict[str, Outcome]:
    return {name: outcome for name, outcome in found.items() if outcome.state in ("wrong", "crash")}


def check_llama(monkeypatch: pytest.MonkeyPatch, *names: str) -> dict[str, Outcome]:
    """These checks alone."""
    monkeypatch.setattr(model_checks, "CHECKS", {name: CHECKS[name] for name in names})
    return check("llama")


@pytest.mark.parametrize("model_type", REPRESENTATIVES)
def test_every_capability_works_or_is_refused_with_a_reason(model_type):
    found = check(model_type)
    assert list(found) == list(CHECKS)
    assert not bad(found)
    assert all(outcome.why for outcome in found.values() if outcome.state != "works")
    refused = {name for name, outcome in found.items() if outcome.state == "refused"}
    if model_type in ("llama", "gpt2"):
        assert refused == {"llama": set(), "gpt2": {"peft"}}[model_type]  # PEFT's BEFT takes no Conv1D
        assert {o.state for name, o in found.items() if name not in refused} == {"works"}
    if model_type == "gpt_oss":
        assert {"peft", "checkpoint"} <= refused and found["gguf"].state == "works"
    if model_type == "rwkv":
        assert found["sampling"].state == found["update"].state == "plain path"


def test_a_site_that_steers_by_something_else_is_wrong(monkeypatch):
    def weaker(self, hidden):
        return hidden + 0.9 * self.vector

    monkeypatch.setattr(SteeringVector, "forward", weaker)
    found = check_llama(monkeypatch, "resid_post", "resid_mid", "attn_out")
    assert {outcome.state for outcome in found.values()} == {"wrong"}


def test_a_position_off_by_one_is_wrong(monkeypatch):
    place = SteeringState.place

    def later(self, tokens, *args):
        place(self, tokens, *args)
        self.mask = self.mask.roll(1, dims=-2)

    monkeypatch.setattr(SteeringState, "place", later)
    found = check_llama(monkeypatch, "positions", "generate", "resid_post")
    assert found["positions"].state == found["generate"].state == "wrong"
    assert found["resid_post"].state == "works"


def test_crashes_and_refusals_are_told_apart(monkeypatch):
    def fails(error):
        def place(*args):
            raise error

        return place

    monkeypatch.setattr(SteeringState, "place", fails(SteerError("no positions here")))
    assert check_llama(monkeypatch, "positions")["positions"] == Outcome("refused", "no positions here")
    monkeypatch.setattr(SteeringState, "place", fails(KeyError("mask")))
    outcome = check_llama(monkeypatch, "positions")["positions"]
    assert outcome.state == "crash"
    assert "KeyError: 'mask'" in outcome.why


def test_a_model_that_cannot_be_built_is_not_built():
    assert {outcome.state for outcome in check("gemma3n").values()} == {"not built"}


@pytest.mark.models
def test_the_page_is_current_and_nothing_on_it_is_wrong():
    names = causal_lm_types()
    table = dict(models_table.check_all(names, os.cpu_count() or 1))
    assert {name: bad(found) for name, found in table.items() if bad(found)} == {}
    unbuilt = [name for name, found in table.items() if found["attach"].state == "not built"]
    assert len(unbuilt) < 0.05 * len(names)
    assert models_table.page(table) == PAGE.read_text(), "write it again: python -m evals.models_table --out"
