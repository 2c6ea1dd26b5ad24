"""A feature browser: one HTML page that holds everything, with a search and no server."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from steer.files import replace_file
from steer.pages import asset, json_data, render_page
from steer.sae.features import Feature


def write_browser(path: str | Path, features: Sequence[Feature], title: str, about: str) -> Path:
    """Write the page; `about` says in a sentence what the features are of. Returns its path."""
    page = render_page(
        "features",
        title=title,
        style=asset("features.css"),
        script=asset("features.js"),
        data=json_data({"about": about, "features": [asdict(feature) for feature in features]}),
    )
    replace_file(Path(path), page.encode())
    return Path(path)
