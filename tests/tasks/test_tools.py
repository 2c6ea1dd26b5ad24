"""The calculator computes what Python computes, and refuses the rest; tools are found by name."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steer.errors import SteerError
from steer.tasks.majority import text_of
from steer.tasks.tools import calculator, load_tools, tool_names

NUMBERS = st.integers(0, 999).map(str) | st.floats(0, 99).map(lambda x: f"{x:.2f}")
EXPRESSIONS = st.recursive(
    NUMBERS,
    lambda inner: (
        st.builds("({} {} {})".format, inner, st.sampled_from("+-*"), inner) | inner.map("-{}".format)
    ),
    max_leaves=6,
)


@given(EXPRESSIONS)
def test_a_value_is_pythons(expression: str) -> None:
    assert float(calculator(expression)) == pytest.approx(eval(expression), rel=1e-11, abs=1e-12)


@given(st.text(max_size=30))
def test_any_text_gives_a_number_or_one_line(text: str) -> None:
    try:
        float(calculator(text))
    except ValueError as error:
        assert str(error) and "\n" not in str(error)


@pytest.mark.parametrize(
    ("expression", "value"),
    [("6/3", "2"), ("1/4", "0.25"), ("2**10", "1024"), ("7//2", "3"), ("7%4", "3"), (" +5 ", "5")],
)
def test_values(expression: str, value: str) -> None:
    assert calculator(expression) == value


@pytest.mark.parametrize(
    "expression",
    [
        *("", "2 +", "1/0", "9**99", "9**9**9", "(-8)**0.5", "x", "abs(2)", "().__class__", "True", "1,2"),
        *("10**31", "1" * 201, "(" * 150, "1e999", "'a'*3", "1j", "0**-1"),
    ],
)
def test_what_is_no_arithmetic_is_refused(expression: str) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        calculator(expression)


def test_tools_by_name() -> None:
    assert load_tools(tool_names("calculator")) == [calculator]
    assert load_tools([]) == []
    with pytest.raises(SteerError, match="tool 3 is not a name"):
        tool_names([3])
    with pytest.raises(SteerError, match=r"tool 'math:pi' is a float, which cannot be called"):
        load_tools(["math:pi"])
    with pytest.raises(SteerError, match=r"tool 'fractions:Fraction' is a .*, expected a function"):
        load_tools(["fractions:Fraction"])


def test_the_result_of_a_tool_is_no_answer() -> None:
    asked = {"role": "assistant", "content": "", "tool_calls": []}
    result = {"role": "tool", "name": "calculator", "content": r"\boxed{4}"}
    answer = {"role": "assistant", "content": r"\boxed{5}"}
    assert text_of([asked, result]) == ""
    assert text_of([asked, result, answer]) == r"\boxed{5}"
    assert text_of([{"content": "7"}]) == "7"
