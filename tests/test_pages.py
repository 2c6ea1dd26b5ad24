"""Pages from templates: what a model wrote stays text, and a value that is missing is an error."""

from __future__ import annotations

import json

import jinja2
import pytest
from markupsafe import Markup

from steer.pages import json_data, render_page

NASTY = "</script><script>alert(1)</script><!-- \u2028 é & \" '"


def test_text_is_escaped_and_markup_is_not() -> None:
    values = {
        "title": NASTY,
        "style": Markup("p > a {}"),
        "script": Markup("1 < 2"),
        "data": json_data(NASTY),
    }
    page = render_page("features", **values)
    assert page.count("<script") == 2 and "alert(1)</script>" not in page
    assert "p > a {}" in page and "1 < 2" in page
    assert page.count("&lt;/script&gt;&lt;script&gt;alert(1)") == 2


def test_a_value_that_is_missing_is_an_error() -> None:
    with pytest.raises(jinja2.UndefinedError, match="'style' is undefined"):
        render_page("features", title="x")


def test_data_comes_back_as_it_was_and_ends_no_script() -> None:
    text = json_data({"text": NASTY})
    assert json.loads(text) == {"text": NASTY}
    assert "<" not in text and "\u2028" not in text
