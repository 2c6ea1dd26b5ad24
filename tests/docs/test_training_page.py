"""The table of docs/training.md has the defaults of the code."""

from __future__ import annotations

import re
from dataclasses import MISSING, fields
from typing import Any

from helpers.paths import ROOT

from steer.config import SteeringArguments
from steer.training.arguments import FinderArguments, SweepArguments
from steer.training.config import SteeringGRPOConfig
from steer.training.run import RunConfig

CONFIGS: tuple[Any, ...] = (
    RunConfig,
    SteeringArguments,
    SteeringGRPOConfig,
    SweepArguments,
    FinderArguments,
)


def test_the_settings_that_matter_have_their_defaults() -> None:
    page = (ROOT / "docs" / "training.md").read_text()
    table = page.partition("## Settings that matter\n")[2].partition("\n## ")[0]
    defaults = {f.name: f.default for config in CONFIGS for f in fields(config) if f.default is not MISSING}
    seen = []
    for names, told in re.findall(r"^\| (`--.*?) \| (.*?) ?\|", table, re.MULTILINE):
        settings = re.findall(r"`--(\w+)`", names)
        values = [value.strip() for value in told.split(",")]
        assert len(values) == len(settings), names
        for name, value in zip(settings, values, strict=True):
            default = defaults[name]
            if default is None or default is False:
                assert value == "", f"{name} is off"
            elif isinstance(default, int | float):
                assert float(value) == default, name
            else:
                assert value == default, name
        seen += settings
    assert len(seen) == len(set(seen)) > 10 and "template" in seen
