"""
The paper's findings (arXiv 2509.06608, section by section) put to one artifact, by the rules in `rules`.

A rule first asks for the effect, then whether it is specific: beyond what random vectors of equal length do
in at least `random_sets.LEAST` draws. So a verdict is one of "seen", "seen but not specific", "not seen", and
"untestable" with the reason.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from steer.lens.random_sets import LEAST, Null
from steer.lens.rules import RULES, WORDS, Rule

SEEN, NOT_SPECIFIC, NOT_SEEN = "seen", "seen but not specific", "not seen"
UNTESTABLE = "untestable"
VERDICTS = (SEEN, NOT_SPECIFIC, NOT_SEEN, UNTESTABLE)


@dataclass(frozen=True)
class Finding:
    """
    One claim and its verdict. `numbers` are what the rule looked at, `null` what random draws gave for them
    (`Null.to_dict`); `why` is both in words, or what is missing to test the claim.
    """

    claim: str
    verdict: str
    rule: str
    why: str
    numbers: dict[str, float] = field(default_factory=dict)
    null: dict[str, dict[str, float]] = field(default_factory=dict)


def judge(
    measured: Mapping[str, float | None],
    nulls: Mapping[str, Null] | None = None,
    missing: Mapping[str, str] | None = None,
) -> list[Finding]:
    """
    The findings of section 1.3 in the paper's order.

    Args:
        measured: the report's numbers by name (see `RULES`). Claims whose numbers are missing, None or NaN
            are untestable.
        nulls: what random draws gave for them, by the same names.
        missing: why a number is missing, by name, where that is known.
    """
    return [_one(rule, measured, nulls or {}, missing or {}) for rule in RULES]


def _one(
    rule: Rule, measured: Mapping[str, float | None], nulls: Mapping[str, Null], missing: Mapping[str, str]
) -> Finding:
    names = dict.fromkeys((*rule.needs, *rule.controls, *rule.nulls))
    numbers = {
        name: float(value)
        for name in names
        if (value := measured.get(name)) is not None and not math.isnan(value)
    }
    null = {
        name: nulls[name].to_dict(numbers[name])
        for name in rule.nulls
        if name in numbers and name in nulls and nulls[name].values
    }

    def made(verdict: str, why: str) -> Finding:
        return Finding(rule.claim, verdict, rule.rule, why, numbers, null)

    def lacking(some: tuple[str, ...]) -> str | None:
        absent = next((name for name in some if name not in numbers), None)
        return None if absent is None else missing.get(absent, rule.missing)

    if rule.effect is None or (reason := lacking(rule.needs)) is not None:
        return Finding(
            rule.claim, UNTESTABLE, rule.rule, rule.missing if rule.effect is None else reason or ""
        )
    told = "; ".join(told_number(name, value, null.get(name)) for name, value in numbers.items())
    if not rule.effect(numbers):
        return made(NOT_SEEN, told)
    if (reason := lacking((*rule.controls, *rule.nulls))) is not None:
        return made(UNTESTABLE, f"The effect is there, but not compared with random vectors. {reason}")
    for name in rule.nulls:
        if name not in nulls or not nulls[name].enough:
            count = len(nulls[name].values) if name in nulls else 0
            return made(
                UNTESTABLE,
                f"The effect is there, but only {count} random draws gave a number for it ({words(name)}); "
                f"{LEAST} are needed.",
            )
    beyond = all(nulls[name].exceeded(numbers[name], rule.margin) for name in rule.nulls)
    specific = beyond and (rule.specific is None or rule.specific(numbers))
    return made(SEEN if specific else NOT_SPECIFIC, told)


def words(name: str) -> str:
    """The name of a number as a reader should see it."""
    return WORDS.get(name, name.replace("_", " "))


def told_number(name: str, value: float, null: Mapping[str, float] | None = None) -> str:
    """A number in words, with what random draws gave for it."""
    text = f"{words(name)} {value:.3g}"
    return text if null is None else f"{text} (random: {told_null(null)})"


def told_null(null: Mapping[str, float]) -> str:
    """A null distribution in words."""
    return (
        f"{null['mean']:.3g} on average, {null['low']:.3g} to {null['high']:.3g}, "
        f"rank {null['rank']:.0f} of {null['draws'] + 1:.0f}, p = {null['p']:.2g}"
    )


def to_dict(findings: list[Finding]) -> list[dict[str, Any]]:
    """Plain JSON types."""
    return [dict(vars(finding)) for finding in findings]
