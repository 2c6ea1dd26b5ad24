"""
Tools: functions that a model may call while it answers. One comes with steer, others are the user's own, as
`file.py:function` or `package.module:function`.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import operator
from collections.abc import Callable, Sequence
from typing import Any

from steer.errors import SteerError, one_line, shown
from steer.tasks.own_code import FORM, own_function

Tool = Callable[..., Any]

_OPERATORS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
_LONGEST, _LARGEST, _LARGEST_EXPONENT = 200, 10**30, 64


def calculator(expression: str) -> str:
    """
    Compute an arithmetic expression.

    Args:
        expression: The expression, of numbers, + - * / // % ** and parentheses, such as "(17 + 4) * 3".

    Returns:
        The value as a decimal number.
    """
    if len(expression) > _LONGEST:
        raise ValueError(f"the expression is longer than {_LONGEST} characters")
    try:
        value = _value(ast.parse(expression.strip(), mode="eval").body)
    except (SyntaxError, RecursionError, MemoryError):
        raise ValueError("this is not an arithmetic expression") from None
    except (ZeroDivisionError, OverflowError) as error:
        raise ValueError(str(error)) from None
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        value = int(value)
    return str(value) if isinstance(value, int) else f"{value:.12g}"


def _value(node: ast.AST) -> int | float:
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            value = number
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            value = -_value(operand)
        case ast.UnaryOp(op=ast.UAdd(), operand=operand):
            value = _value(operand)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            first, second = _value(left), _value(right)
            if isinstance(op, ast.Pow) and abs(second) > _LARGEST_EXPONENT:
                raise ValueError(f"exponents go up to {_LARGEST_EXPONENT}")
            value = _OPERATORS[type(op)](first, second)
        case _:
            raise ValueError("only numbers, + - * / // % ** and parentheses can be computed")
    if isinstance(value, complex):
        raise ValueError("the value is not a real number")
    if abs(value) > _LARGEST:
        raise ValueError(f"numbers go up to {_LARGEST:.0e}")
    return value


TOOLS: dict[str, Tool] = {"calculator": calculator}


def tool_names(given: object) -> list[str]:
    """
    Tools as a config file or a command line names them, as a list of names.

    Raises:
        SteerError: an entry that is no name, or a name that is there twice.
    """
    names: list[str] = []
    for name in given if isinstance(given, list | tuple) else [given]:
        if not isinstance(name, str) or not name.strip():
            raise SteerError(f"tool {shown(name)} is not a name; give one of {', '.join(TOOLS)}, or {FORM}")
        if name in names:
            raise SteerError(f"tools name {name!r} twice; leave one out")
        names.append(name)
    return names


def load_tools(names: Sequence[str]) -> list[Tool]:
    """
    The tools that `names` name, each with a name, type hints and a docstring of its arguments, out of which
    the model is told how to call it.

    Raises:
        SteerError: a name, file, module or function that does not exist; a function that cannot be described
            to a model; two of one name.
    """
    tools = [_tool(name) for name in names]
    called = [tool.__name__ for tool in tools]
    for name in called:
        if called.count(name) > 1:
            raise SteerError(f"two tools are called {name!r}, by which a model calls them; rename one")
    return tools


def _tool(name: str) -> Tool:
    if ":" not in name:
        if name not in TOOLS:
            near = difflib.get_close_matches(name, TOOLS, 1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise SteerError(f"unknown tool {name!r}{hint}; expected one of {', '.join(TOOLS)}, or {FORM}")
        return TOOLS[name]
    made = own_function("tool", name)
    if not inspect.isfunction(made):
        raise SteerError(f"tool {name!r} is a {type(made).__name__}, expected a function")
    from transformers.utils import get_json_schema  # loads torch

    try:
        get_json_schema(made)
    except Exception as error:  # each fault of hints and docstring has its own
        raise SteerError(
            f"tool {name!r} cannot be described to a model ({one_line(error)}); give each argument a type "
            "hint and a line under Args in the docstring"
        ) from error
    return made
