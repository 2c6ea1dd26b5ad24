"""The README as PyPI shows it: pyproject.toml turns its relative links and images into addresses."""

from __future__ import annotations

import re
import tomllib

from helpers.paths import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LINK = re.compile(r"(!?)\[[^\]]*\]\(([^)\s]+)\)|<img[^>]*?src=\"([^\"]+)\"")


def described(text: str) -> str:
    """What hatch-fancy-pypi-readme makes of a text."""
    for one in PROJECT["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]["substitutions"]:
        text = re.sub(one["pattern"], one["replacement"], text)
    return text


def test_every_link_is_an_address_of_a_file_here() -> None:
    repository = PROJECT["project"]["urls"]["Homepage"]
    pages, images = f"{repository}/blob/main/", repository.replace("github.com", "raw.githubusercontent.com")
    text = described((ROOT / "README.md").read_text())
    own = 0
    for image, target, source in LINK.findall(text):
        assert re.match(r"https://|#", target or source), target or source
        start = f"{images}/main/" if image or source else pages
        if (target or source).startswith(start):
            own += 1
            assert (ROOT / (target or source).removeprefix(start).partition("#")[0]).exists()
    assert own > 10 and f'src="{images}/main/' in text and f"]({pages}docs/install.md)" in text


def test_addresses_and_anchors_stay() -> None:
    text = "[a](https://x.y) [b](#c) ![d](e.png) [f](g.md#h) [i](mailto:j@k)\n`x[1](2)`"
    blob = "https://github.com/steer-rl/steer/blob/main/"
    raw = "https://raw.githubusercontent.com/steer-rl/steer/main/"
    assert described(text).startswith(
        f"[a](https://x.y) [b](#c) ![d]({raw}e.png) [f]({blob}g.md#h) [i](mailto:j@k)\n"
    )
