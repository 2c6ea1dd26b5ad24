"""HTML pages from the templates in `steer/templates`: one file each, which loads nothing from anywhere."""

from __future__ import annotations

import json
from functools import cache
from importlib import resources

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("steer", "templates"),
        autoescape=True,  # what a model wrote is text
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def render_page(template: str, **values: object) -> str:
    """
    One page.

    Args:
        template: the name of a template, without `.html.jinja`.
        values: what it reads. Text is escaped; `Markup` is put in as it is.

    Returns:
        The page's HTML.
    """
    return _environment().get_template(f"{template}.html.jinja").render(values)


def asset(name: str) -> Markup:
    """A style or script of a page: the text of a file in `steer/templates`."""
    return Markup(resources.files("steer").joinpath("templates", name).read_text(encoding="utf-8"))


def json_data(data: object) -> Markup:
    """JSON that cannot end the script element it is in, or open a comment there."""
    text = json.dumps(data, ensure_ascii=False)
    return Markup(text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029"))
