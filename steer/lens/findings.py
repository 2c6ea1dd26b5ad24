"""
The paper's findings (arXiv 2509.06608, section by section) put to one artifact: seen, not seen, or not
testable, by rules that are stated and printed with the numbers they were applied to, the control's among
them.

Every rule asks for more than the effect: it must also exceed what the control of equal size does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

SEEN, NOT_SEEN, NOT_TESTABLE = "seen", "not seen", "not testable"


@dataclass(frozen=True)
class Finding:
    """
    One claim and its verdict. `numbers` are what the rule looked at, `control` the same for the control;
    `why` is the rule with these numbers, or what is missing to test the claim.
    """

    claim: str
    verdict: str
    rule: str
    why: str
    numbers: dict[str, float] = field(default_factory=dict)
    control: dict[str, float] = field(default_factory=dict)


def judge(measured: Mapping[str, float | None]) -> list[Finding]:
    """
    The findings of section 1.3 in the paper's order, from the report's numbers by name (see `RULES`). A
    number that is missing or None makes its claims not testable.
    """
    return [_one(rule, measured) for rule in RULES]


@dataclass(frozen=True)
class _Rule:
    claim: str
    rule: str
    needs: tuple[str, ...]
    controls: tuple[str, ...]
    test: Callable[[dict[str, float]], bool]
    missing: str


def _one(rule: _Rule, measured: Mapping[str, float | None]) -> Finding:
    lacking = [name for name in (*rule.needs, *rule.controls) if measured.get(name) is None]
    if lacking:
        return Finding(rule.claim, NOT_TESTABLE, rule.rule, rule.missing)
    values: dict[str, float] = {name: float(measured[name]) for name in (*rule.needs, *rule.controls)}  # type: ignore[arg-type]
    told = "; ".join(
        prefix + ", ".join(f"{words(name)} {values[name]:.4g}" for name in names)
        for prefix, names in (("", rule.needs), ("control: ", rule.controls))
        if names
    )
    verdict = SEEN if rule.test(values) else NOT_SEEN
    numbers, control = ({name: values[name] for name in names} for names in (rule.needs, rule.controls))
    return Finding(rule.claim, verdict, rule.rule, told, numbers, control)


def words(name: str) -> str:
    """The name of a number as a reader should see it; that of a control says what the control is."""
    own = name.removeprefix("random_").removeprefix("shuffled_").removeprefix("control_")
    control = {"random": "random: ", "shuffled": "layers shuffled: ", "control": "usual opening: "}
    return control.get(name.removesuffix(own).rstrip("_"), "") + WORDS.get(own, own.replace("_", " "))


WORDS = {
    "base_interval_top": "upper end for the base model",
    "steered_interval_bottom": "lower end with the vectors",
    "vectors_accuracy": "accuracy",
    "layers_that_help": "share of layers that help alone",
    "diff_diff": "Diff-Diff cosine",
    "diff_vector": "Diff-Vector cosine",
    "last_first_share": "share of the change on the first token",
    "last_concentration": "share of that which one token gains",
    "last_lens_rank": "tokens that the lens ranks higher",
    "forced_share": "share of the gain",
    "penultimate_without_attention": "kept without the last attention",
    "penultimate_without_mlp": "kept without the last MLP",
    "middle_foreign": "non-English among suppressed tokens",
    "vocabulary_foreign": "in the vocabulary",
    "pair_gain": "mean pair score",
    "transfer_score": "donor score",
    "adaptive_spread": "spread of the coefficients over their mean",
}


RULES = (
    _Rule(
        "The vectors raise accuracy.",
        "The steered model's 95 % interval lies above the base model's, and random vectors of equal length "
        "stay below the steered interval.",
        ("base_interval_top", "steered_interval_bottom"),
        ("random_vectors_accuracy",),
        lambda v: (
            v["steered_interval_bottom"] > v["base_interval_top"]
            and v["random_vectors_accuracy"] < v["steered_interval_bottom"]
        ),
        "Needs problems that can be graded.",
    ),
    _Rule(
        "Nearly every single layer's vector improves the model by itself.",
        "At least 80 % of the layers tried raise the likelihood of right answers by more than 0.05 nats a "
        "token, and more of them than random vectors do.",
        ("layers_that_help",),
        ("random_layers_that_help",),
        lambda v: v["layers_that_help"] >= 0.8 and v["layers_that_help"] > v["random_layers_that_help"],
        "Needs vectors in two layers or more, and completions that are right.",
    ),
    _Rule(
        "A vector's effect persists: each token's change keeps the direction of the mean change (Diff-Diff "
        "cosine above 0.3).",
        "Mean Diff-Diff cosine of single vectors over the layers above them is more than 0.3, and more than "
        "0.1 above random vectors of equal length.",
        ("diff_diff",),
        ("random_diff_diff",),
        lambda v: v["diff_diff"] > 0.3 and v["diff_diff"] > v["random_diff_diff"] + 0.1,
        "Needs a steered layer below the last.",
    ),
    _Rule(
        "Layers find different solutions: the change is not the vector that was trained further up "
        "(Diff-Vector cosine near zero).",
        "Mean Diff-Vector cosine of single vectors with the vectors of the layers above them is between "
        "-0.15 and 0.15, and no further than that from the same cosine for shuffled layers.",
        ("diff_vector",),
        ("shuffled_diff_vector",),
        lambda v: abs(v["diff_vector"]) < 0.15 and abs(v["diff_vector"] - v["shuffled_diff_vector"]) < 0.15,
        "Needs vectors in two layers or more. Here they were trained together, in the paper one by one.",
    ),
    _Rule(
        "The last layer's vector acts on one token: its change of probability sits almost wholly on the "
        "first generated token.",
        "With the last layer's vector alone, more than half of the total variation along the completion is "
        "on the first token and more than half of the probability gained there goes to one token, both more "
        "than for a random vector of equal length.",
        ("last_first_share", "last_concentration"),
        ("random_last_first_share", "random_last_concentration"),
        lambda v: (
            min(v["last_first_share"], v["last_concentration"]) > 0.5
            and v["last_first_share"] > v["random_last_first_share"]
            and v["last_concentration"] > v["random_last_concentration"]
        ),
        "Needs a vector in the last layer.",
    ),
    _Rule(
        "The logit lens of the last layer's vector names that token.",
        "The token that gains most at the first position is among the last vector's ten top tokens, and not "
        "among those of a random vector.",
        ("last_lens_rank",),
        ("random_last_lens_rank",),
        lambda v: v["last_lens_rank"] < 10 <= v["random_last_lens_rank"],
        "Needs a vector in the last layer.",
    ),
    _Rule(
        "Forcing that token upon the base model gives most of the gain (about 75 % of the last vector's "
        "gain in the paper).",
        "The top promoted token, forced as the answer's first, gives at least half of the vectors' gain, "
        "and more than the base model's own usual first token does.",
        ("forced_share",),
        ("control_forced_share",),
        lambda v: v["forced_share"] >= 0.5 and v["forced_share"] > v["control_forced_share"],
        "Needs vectors that gain accuracy.",
    ),
    _Rule(
        "The penultimate layer's vector works through the last MLP and the unembedding; skipping attention "
        "hardly changes it.",
        "All but the last attention recovers at least 90 % of the logit difference, and holding the "
        "attention costs less than holding the MLP, which costs at least 0.05 more than for a random vector "
        "of equal length.",
        ("penultimate_without_attention", "penultimate_without_mlp"),
        ("random_penultimate_without_attention", "random_penultimate_without_mlp"),
        lambda v: (
            v["penultimate_without_attention"] >= 0.9
            and abs(1 - v["penultimate_without_attention"]) < abs(1 - v["penultimate_without_mlp"])
            and v["penultimate_without_mlp"] < v["random_penultimate_without_mlp"] - 0.05
        ),
        "Needs a vector in the last layer but one.",
    ),
    _Rule(
        "Middle layers push down non-English tokens.",
        "Non-English scripts are at least 1.5 times as frequent among the 50 bottom tokens of the middle "
        "third of the layers as in the vocabulary, and more frequent than for random vectors.",
        ("middle_foreign", "vocabulary_foreign"),
        ("random_middle_foreign",),
        lambda v: (
            v["middle_foreign"] >= 1.5 * v["vocabulary_foreign"]
            and v["middle_foreign"] > v["random_middle_foreign"]
        ),
        "Needs vectors in the middle third, and a vocabulary of which 1 % or more is in non-English scripts.",
    ),
    _Rule(
        "Vectors of single layers compose: two do more than the better one.",
        "Mean pair score over the pairs tried, of the likelihood of right answers, is above 0.02 and above "
        "that of the same pairs with random vectors. Here the layers were trained together, in the paper "
        "one by one.",
        ("pair_gain",),
        ("random_pair_gain",),
        lambda v: v["pair_gain"] > 0.02 and v["pair_gain"] > v["random_pair_gain"],
        "Needs vectors in several layers, completions that are right, and a jointly trained set that is "
        "better than single layers.",
    ),
    _Rule(
        "Vectors transfer to other models of the family.",
        "Donor score above 0.25 in another model; `steer lens transfer` measures it.",
        ("transfer_score",),
        ("random_transfer_score",),
        lambda v: v["transfer_score"] > 0.25 and v["transfer_score"] > v["random_transfer_score"],
        "Needs a second model of the family with vectors of its own.",
    ),
    _Rule(
        "Adaptive vectors put their weight on meaningful parts of the prompt.",
        "Spread of the coefficients over tokens is at least their mean; `steer lens scales` draws them.",
        ("adaptive_spread",),
        ("random_adaptive_spread",),
        lambda v: v["adaptive_spread"] >= 1 and v["adaptive_spread"] > v["random_adaptive_spread"],
        "Needs vectors of kind adaptive; constant ones give every token the same.",
    ),
    _Rule(
        "Features of a sparse autoencoder on the differences separate right from wrong generations.",
        "Not part of this report.",
        ("sae",),
        (),
        lambda v: False,
        "Needs an autoencoder trained on a large sample of generations.",
    ),
)


def to_dict(findings: list[Finding]) -> list[dict[str, Any]]:
    """Plain JSON types."""
    return [dict(vars(finding)) for finding in findings]
