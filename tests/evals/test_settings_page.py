"""docs/settings.md holds what the code says."""

from __future__ import annotations

import argparse

from helpers.paths import ROOT

from evals.settings_page import of_parser, render, table
from steer.training.config import SteeringGRPOConfig
from steer.training.run import RunConfig


def test_the_page_is_current() -> None:
    shown = (ROOT / "docs" / "settings.md").read_text()
    assert shown == render(), "the page is stale: python -m evals.settings_page --out docs/settings.md"


def test_a_row_has_type_default_and_meaning() -> None:
    found = table(RunConfig)
    assert "| `eval_limit` | int | `200` | Number of held-out problems. |\n" in found
    assert "| `levels` | list[int] or None | not set | Keep problems" in found
    assert "&lt;think>" in found and "`\\boxed{}`" in found
    text = render()
    assert f"| `num_generations` | `{SteeringGRPOConfig.num_generations}` | `8` | Samples of each" in text
    assert "| `temperature` |" not in text, "its default is trl's"


def test_options_of_a_parser() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--one", required=True, help="the first")
    parser.add_argument("--two-words", "--two_words", type=int, default=3, help="a number")
    parser.add_argument("--three", help="a path (default: here)")
    parser.add_argument("--flag", action="store_true", help="yes | no")
    lines = of_parser(parser).splitlines()[2:]
    assert lines == [
        "| `--one` | required | the first |",
        "| `--two-words` | 3 | a number |",
        "| `--three` | here | a path |",
        "| `--flag` |  | yes \\| no |",
    ]
