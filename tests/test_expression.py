"""Expressions that name sets of vectors: what they mean, and that wrong ones are one clear line."""

from __future__ import annotations

import json
import math
import re
from dataclasses import fields
from typing import Any

import pytest
from helpers.paths import ROOT
from helpers.steering import message
from hypothesis import given
from hypothesis import strategies as st

from steer import SteerError
from steer.arguments import named_vectors
from steer.config import POSITIONS
from steer.expression import Term, check_name, from_json, parse, show

NAMES = st.text(st.characters(codec="utf-8", exclude_characters="@+"), min_size=1).filter(
    lambda name: name == name.strip() and name != "base"
)
SCALES = st.floats(allow_nan=False, allow_infinity=False)


@given(st.dictionaries(NAMES, SCALES, max_size=5))
def test_what_is_printed_is_parsed_back(scales: dict[str, float]) -> None:
    terms = tuple(Term(name, scale) for name, scale in scales.items())
    found = parse(show(terms))
    assert found == terms
    assert [math.copysign(1, a.scale) for a in found] == [math.copysign(1, b.scale) for b in terms]


@given(st.text(st.sampled_from("ab@+-.0123456789e \n")) | st.text())
def test_any_text_is_an_expression_or_one_line(text: str) -> None:
    try:
        terms = parse(text)
    except SteerError as error:
        assert "\n" not in str(error)
    else:
        assert parse(show(terms)) == terms
        assert all(math.isfinite(term.scale) and term.name for term in terms)
        for term in terms:
            check_name(term.name)


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("base", ()),
        ("math", (Term("math"),)),
        ("math@0.7+brief@-0.3", (Term("math", 0.7), Term("brief", -0.3))),
        (" math @ 1e-3 + org/a-b:c ", (Term("math", 1e-3), Term("org/a-b:c"))),
        ("a@.5+b@-2.", (Term("a", 0.5), Term("b", -2.0))),
    ],
)
def test_expressions(text: str, terms: tuple[Term, ...]) -> None:
    assert parse(text) == terms


@pytest.mark.parametrize("scale", ["2", "-0.3", ".5", "1.", "-2.", "1e-3", "-.5E2"])
def test_a_scale_is_written_the_same_behind_an_artifact(scale: str) -> None:
    assert named_vectors(f"math=runs/math@{scale}") == ("math", "runs/math", float(scale))
    assert parse(f"math@{scale}") == (Term("math", float(scale)),)


@pytest.mark.parametrize(
    "source", ["runs/math@", "runs/math@v1", "runs/math@1e", "runs/math@.", "runs/math@1_0"]
)
def test_what_is_no_scale_is_part_of_the_path(source: str) -> None:
    assert named_vectors(f"math={source}") == ("math", source, 1.0)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "names no sets"),
        ("  ", "names no sets"),
        ("+", "a set without a name"),
        ("math+", "a set without a name"),
        ("@0.5", "a set without a name"),
        ("math@", "the scale '' of 'math' is not a finite number"),
        ("math@x", "the scale 'x' of 'math'"),
        ("math@1e999", "the scale '1e999'"),
        ("math@inf", "the scale 'inf'"),
        ("math@nan", "the scale 'nan'"),
        ("math@1_0", "the scale '1_0'"),
        ("math@0.5@2", "the scale '0.5@2'"),
        ("math@1e+3", "the scale '1e'"),
        ("math+brief@2+math@3", "names 'math' twice"),
        ("base+math", "'base' stands alone"),
        ("base@0.5", "'base' stands alone"),
    ],
)
def test_wrong_expressions(text: str, words: str) -> None:
    with pytest.raises(SteerError, match=words) as error:
        parse(text)
    message(error)


@pytest.mark.parametrize("name", ["", "a@b", "a+b", "base", " a"])
def test_names_that_no_expression_could_name(name: str) -> None:
    with pytest.raises(SteerError, match="cannot name vectors") as error:
        check_name(name)
    message(error)


@given(
    st.dictionaries(
        NAMES,
        st.tuples(
            SCALES, st.sampled_from([None, "all", "1-2", "0,last"]), st.sampled_from([None, *POSITIONS])
        ),
        min_size=1,
        max_size=3,
    )
)
def test_terms_as_json(given_terms: dict[str, Any]) -> None:
    terms = tuple(Term(name, *rest) for name, rest in given_terms.items())
    body = {"sets": [term.to_dict() for term in terms]}
    assert from_json(body) == (terms, None)
    assert from_json({**body, "prompt": terms[0].name}) == (terms, terms[0].name)
    assert from_json({**body, "prompt": "none"}) == (terms, "none")


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ([], r"^steering=\[\] is not an object with the fields sets, prompt"),
        ({"set": []}, r"^steering\.set is not a field; steering has sets, prompt"),
        ({}, r"^steering\.sets=None is not a list"),
        ({"sets": []}, r"^steering\.sets=\[\] is not a list of sets: expected at least one"),
        ({"sets": ["math"]}, r"^steering\.sets\[0\]='math' is not an object"),
        ({"sets": [{"scale": 1}]}, r"^steering\.sets\[0\]\.name=None"),
        ({"sets": [{"name": "a"}, {"name": "b", "layer": 3}]}, r"^steering\.sets\[1\]\.layer is not a field"),
        ({"sets": [{"name": "a", "scale": "2"}]}, r"^steering\.sets\[0\]\.scale='2' is not a finite number"),
        ({"sets": [{"name": "a", "scale": True}]}, r"^steering\.sets\[0\]\.scale=True"),
        ({"sets": [{"name": "a", "scale": float("inf")}]}, r"^steering\.sets\[0\]\.scale=inf"),
        ({"sets": [{"name": "a", "scale": 10**400}]}, r"^steering\.sets\[0\]\.scale="),
        ({"sets": [{"name": "a", "layers": 3}]}, r"^steering\.sets\[0\]\.layers=3 is not text"),
        ({"sets": [{"name": "a", "layers": "x"}]}, r"^steering\.sets\[0\]\.layers='x' is not a layer set"),
        ({"sets": [{"name": "a", "positions": "end"}]}, r"^steering\.sets\[0\]\.positions='end' is unknown"),
        ({"sets": [{"name": "a"}, {"name": "a", "layers": "1"}]}, "names 'a' twice"),
        (
            {"sets": [{"name": "a"}], "prompt": "b"},
            r"^steering\.prompt='b' is none of the sets: give one of a",
        ),
        ({"sets": [{"name": "a"}], "prompt": ["a"]}, r"^steering\.prompt="),
    ],
)
def test_wrong_json_names_the_field(body: Any, words: str) -> None:
    with pytest.raises(SteerError, match=words) as error:
        from_json(body)
    message(error)


def test_the_schema_in_the_documentation() -> None:
    blocks = re.split(r"\n(?=\S)", (ROOT / "docs" / "serving.md").read_text())
    (text,) = (block for block in blocks if '"additionalProperties"' in block)
    schema = json.loads(text.partition("\n")[2])
    sets = schema["properties"]["sets"]["items"]
    assert set(sets["properties"]) == {field.name for field in fields(Term)}
    assert sets["properties"]["positions"]["enum"] == [*POSITIONS, None]
    assert schema["additionalProperties"] is sets["additionalProperties"] is False
    full = {"name": "a", "scale": 2, "layers": "1", "positions": "all"}
    assert from_json(dict.fromkeys(schema["properties"], None) | {"sets": [full]})[0] == (Term(**full),)
