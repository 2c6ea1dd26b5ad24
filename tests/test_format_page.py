"""docs/format.md names the fields that a config has, with their defaults."""

from __future__ import annotations

import json
import re
from dataclasses import fields

from helpers.paths import ROOT

from steer import SteeringConfig
from steer.config import FORMAT_VERSION

PAGE = (ROOT / "docs" / "format.md").read_text()


def test_the_table_has_every_field_and_its_default() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (?:string|integer|number|object)[^|]* \| ([^|]+) \|", PAGE, re.M)
    told = {name: json.loads(default.strip("`")) for name, default in rows}
    assert told == {f.name: f.default for f in fields(SteeringConfig)}


def test_the_page_is_of_the_present_version() -> None:
    assert f"describes version {FORMAT_VERSION} " in PAGE
