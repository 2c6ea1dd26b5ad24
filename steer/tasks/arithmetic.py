"""Generated arithmetic problems, with a split into training and held-out ones."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import ceil
from typing import Any, Literal

from steer.errors import SteerError


@dataclass
class Arithmetic:
    """Generated problems such as "What is 17 + 25?"; the same fields give the same ones on every machine."""

    operators: str = field(default="+-", metadata={"help": "operators to draw from, e.g. + or +- or +-*"})
    digits: int = field(
        default=2, metadata={"help": "most digits of an operand, 1 to 4; operands start at 1"}
    )
    terms: int = field(default=2, metadata={"help": "operands per problem, 2 to 5"})
    problems: int = field(default=1000, metadata={"help": "how many distinct problems to generate"})
    seed: int = field(default=0, metadata={"help": "seed of the draw (never of the train/held-out split)"})
    heldout: float = field(
        default=0.2, metadata={"help": "share of all possible problems kept out of training"}
    )

    def __post_init__(self) -> None:
        ops = self.operators
        if not ops or set(ops) - set("+-*") or len(set(ops)) < len(ops):
            raise SteerError(f"arithmetic operators are {ops!r}; expected distinct characters out of '+-*'")
        for name, low, high in (("digits", 1, 4), ("terms", 2, 5), ("problems", 1, 10**7)):
            value = getattr(self, name)
            if not isinstance(value, int) or not low <= value <= high:
                raise SteerError(f"arithmetic {name} is {value!r}; expected an integer from {low} to {high}")
        if not 0 < self.heldout < 1:
            raise SteerError(
                f"arithmetic heldout is {self.heldout!r}; expected a share between 0 and 1, such as 0.2"
            )

    def generate(self, split: Literal["train", "heldout"] = "train") -> list[dict[str, Any]]:
        """`self.problems` distinct records of one split, in a seeded order.

        The split hashes the problem itself, so train and held-out share nothing at any seeds as long as
        `heldout` is the same; reordered sums and products (3 + 4, 4 + 3) are one problem to the split.
        Raises SteerError when the split holds fewer distinct problems than asked for.
        """
        if split not in ("train", "heldout"):
            raise SteerError(f"arithmetic split is {split!r}; expected 'train' or 'heldout'")
        rng = random.Random(self.seed)
        answers: dict[str, int] = {}
        space = self._space()
        if space <= 200_000:  # small enough to list: the draw is exact and so is the error
            everything = [e for e in map(self._nth, range(space)) if self._split_of(e) == split]
            rng.shuffle(everything)
            candidates: Iterator[list[str | int]] = iter(everything)
        else:
            share = self.heldout if split == "heldout" else 1 - self.heldout
            # The first term is enough for shares above 3%; a longer draw begins as a shorter one.
            draws = max(100 * self.problems, ceil(3 * self.problems / share)) + 1000
            candidates = (self._nth(rng.randrange(space)) for _ in range(draws))
            candidates = (e for e in candidates if self._split_of(e) == split)
        for expression in candidates:
            if len(answers) == self.problems:
                break
            answers[" ".join(map(str, expression))] = _value(expression)
        if len(answers) < self.problems:
            raise SteerError(
                f"only {len(answers)} distinct {split} problems found for operators {self.operators!r}, "
                f"digits {self.digits}, terms {self.terms}, heldout {self.heldout}; {self.problems} were "
                "asked for: ask for fewer or allow more digits, terms or operators"
            )
        return [
            {
                "problem": f"What is {text}?",
                "answer": str(value),
                "solution": f"{text} = {value}",
                "level": self.digits,
                "source": "arithmetic",
            }
            for text, value in answers.items()
        ]

    def _space(self) -> int:
        return int((10**self.digits - 1) ** self.terms * len(self.operators) ** (self.terms - 1))

    def _nth(self, number: int) -> list[str | int]:
        """The `number`-th expression, as operands with operators between them."""
        expression: list[str | int] = []
        for position in range(self.terms):
            if position:
                number, operator = divmod(number, len(self.operators))
                expression.append(self.operators[operator])
            number, operand = divmod(number, 10**self.digits - 1)
            expression.append(operand + 1)
        return expression

    def _split_of(self, expression: list[str | int]) -> str:
        canonical = "".join(
            sorted(f"{sign:+d}:{sorted(factors)};" for sign, factors in _summands(expression))
        )
        share = int.from_bytes(hashlib.sha256(canonical.encode()).digest()[:8], "big") / 2**64
        return "heldout" if share < self.heldout else "train"


def _summands(expression: list[str | int]) -> list[tuple[int, list[int]]]:
    """Signed products of the expression: 2 - 3 * 4 is [(1, [2]), (-1, [3, 4])]."""
    summands = [(1, [int(expression[0])])]
    for operator, operand in zip(expression[1::2], expression[2::2], strict=True):
        if operator == "*":
            summands[-1][1].append(int(operand))
        else:
            summands.append((1 if operator == "+" else -1, [int(operand)]))
    return summands


def _value(expression: list[str | int]) -> int:
    total = 0
    for sign, factors in _summands(expression):
        product = sign
        for factor in factors:
            product *= factor
        total += product
    return total
