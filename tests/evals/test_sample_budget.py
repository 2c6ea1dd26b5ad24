"""`evals.sample_budget`: what it reads from a run's logs, and how runs are compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from evals.sample_budget import curves, plot, reached, table

LOG = [
    {"seconds/wall": 30.0, "frac_reward_zero_std": 0.5, "dynamic_sampling/samples": 24},
    {"seconds/wall": 60.0, "frac_reward_zero_std": 0.0, "dynamic_sampling/samples": 16},
    {"seconds/wall": 30.0, "frac_reward_zero_std": 0.25, "dynamic_sampling/samples": 32},
]
VALIDATIONS = [{"step": 0, "accuracy": 0.0}, {"step": 2, "accuracy": 0.9}, {"step": 3, "accuracy": 0.7}]


def run(variant: str, seed: int, **changes: Any) -> dict[str, Any]:
    return {"variant": variant, "seed": seed, **curves(LOG, VALIDATIONS, 16), **changes}


def test_curves_count_what_was_drawn_before_each_validation() -> None:
    assert curves(LOG, VALIDATIONS, 16) == {
        "accuracy": [0.0, 0.9, 0.7],
        "updates": [0, 2, 3],
        "samples": [0, 40, 72],
        "minutes": [0, 1.5, 2.0],
        "flat": [0.5, 0.0, 0.25],
    }
    plain = [{k: v for k, v in row.items() if k[0] != "d"} for row in LOG]
    assert curves(plain, VALIDATIONS, 16)["samples"] == [0, 32, 48]
    shared = [LOG[0], plain[1], LOG[2]]  # the second update has the samples of the first one's generation
    assert curves(shared, VALIDATIONS, 16)["samples"] == [0, 24, 56]


def test_the_goal_is_reached_at_the_first_validation_above_it() -> None:
    assert reached(run("plain", 0), "samples", 0.8) == 40
    assert reached(run("plain", 0), "updates", 0.95) is None


def test_the_table_has_medians_and_says_what_was_not_reached(tmp_path: Path) -> None:
    never = {"accuracy": [0.0, 0.1, 0.2]}
    runs = [run("plain", 0), run("plain", 1, **never), run("plain", 2, **never), run("dynamic", 0)]
    lines = table(runs, 0.8).splitlines()
    assert "| plain | 3 | 1 of 3 | over 3 | over 72 | over 2 | 25% | 0.70, 0.20, 0.20 |" in lines
    assert "| dynamic | 1 | 1 of 1 | 2 | 40 | 1.5 | 25% | 0.70 |" in lines
    plot(runs, 0.8, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 5000


def test_untrained_models_that_reach_the_goal_count_from_zero() -> None:
    assert reached(run("plain", 0, accuracy=[0.9, 0.9, 0.9]), "minutes", 0.8) == pytest.approx(0.0)
