"""The rules by which `findings` judges, in the paper's order, and the names of the numbers they read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

Test = Callable[[dict[str, float]], bool]


@dataclass(frozen=True)
class Rule:
    """
    One claim and how it is tested.

    Args:
        claim: what the paper says.
        rule: the rule in words.
        needs: the numbers that `effect` reads.
        effect: whether the effect is there; None for a claim that the report cannot test.
        missing: what is needed to test the claim, for when a number is missing.
        nulls: numbers that must be beyond what random draws give.
        margin: how far beyond the quantile of the draws they must be.
        controls: further numbers that `specific` reads.
        specific: what else makes the effect more than that of a control.
    """

    claim: str
    rule: str
    needs: tuple[str, ...]
    effect: Test | None
    missing: str
    nulls: tuple[str, ...] = ()
    margin: float = 0.0
    controls: tuple[str, ...] = ()
    specific: Test | None = None


WORDS = {
    "base_interval_top": "upper end for the base model",
    "steered_interval_bottom": "lower end with the vectors",
    "likelihood_gain": "gain in likelihood of right answers, nats a token",
    "vectors_accuracy": "accuracy",
    "layers_that_help": "share of layers that raise the likelihood alone",
    "layers_that_solve": "share of layers that raise accuracy alone",
    "diff_diff": "Diff-Diff cosine",
    "diff_vector": "Diff-Vector cosine",
    "last_first_share": "share of the change on the first token",
    "last_concentration": "share of that which one token gains",
    "last_lens_rank": "tokens that the lens ranks higher",
    "forced_share": "share of the gain in accuracy",
    "usual_opening_share": "that of the usual opening",
    "forced_likelihood": "log-probability of right answers after it, nats a token",
    "penultimate_without_attention": "kept without the last attention",
    "penultimate_without_mlp": "kept without the last MLP",
    "middle_foreign": "non-English among suppressed tokens",
    "vocabulary_foreign": "in the vocabulary",
    "pair_gain": "mean pair score by likelihood",
    "pair_accuracy": "mean gain in accuracy over the better one",
    "adaptive_spread": "spread of the coefficients over their mean",
}


RULES = (
    Rule(
        "The vectors raise accuracy.",
        "The steered model's 95 % interval lies above the base model's. Specific: accuracy is higher than "
        "with random vectors, and the vectors raise the likelihood of right answers, by more than random "
        "vectors do.",
        ("base_interval_top", "steered_interval_bottom"),
        lambda v: v["steered_interval_bottom"] > v["base_interval_top"],
        "Needs problems that can be graded, and 24 problems solved.",
        nulls=("vectors_accuracy", "likelihood_gain"),
        specific=lambda v: v["likelihood_gain"] > 0,
    ),
    Rule(
        "Nearly every single layer's vector improves the model by itself.",
        "At least 80 % of the layers tried raise the likelihood of right answers by more than 0.05 nats a "
        "token, and at least 80 % raise accuracy. Specific: more of them raise the likelihood than with "
        "random vectors.",
        ("layers_that_help", "layers_that_solve"),
        lambda v: min(v["layers_that_help"], v["layers_that_solve"]) >= 0.8,
        "Needs vectors in two layers or more, and 24 problems solved.",
        nulls=("layers_that_help",),
    ),
    Rule(
        "A vector's effect persists: each token's change keeps the direction of the mean change (Diff-Diff "
        "cosine above 0.3).",
        "Mean Diff-Diff cosine of single vectors over the layers above them is more than 0.3. Specific: more "
        "than with random vectors, by 0.1.",
        ("diff_diff",),
        lambda v: v["diff_diff"] > 0.3,
        "Needs a steered layer below the last.",
        nulls=("diff_diff",),
        margin=0.1,
    ),
    Rule(
        "Layers find different solutions: the change is not the vector that was trained further up "
        "(Diff-Vector cosine near zero).",
        "Mean Diff-Vector cosine of single vectors with the vectors of the layers above them is between "
        "-0.15 and 0.15. Specific: the layers do find solutions, more of them raise the likelihood of right "
        "answers by themselves than with random vectors. Here they were trained together, in the paper one "
        "by one.",
        ("diff_vector",),
        lambda v: abs(v["diff_vector"]) < 0.15,
        "Needs vectors in two layers or more, and 24 problems solved.",
        nulls=("layers_that_help",),
    ),
    Rule(
        "The last layer's vector acts on one token: its change of probability sits almost wholly on the "
        "first generated token.",
        "With the last layer's vector alone, more than half of the total variation along the completion is "
        "on the first token and more than half of the probability gained there goes to one token. Specific: "
        "both more than with random vectors.",
        ("last_first_share", "last_concentration"),
        lambda v: min(v["last_first_share"], v["last_concentration"]) > 0.5,
        "Needs a vector in the last layer.",
        nulls=("last_first_share", "last_concentration"),
    ),
    Rule(
        "The logit lens of the last layer's vector names that token.",
        "The token that gains most at the first position is among the last vector's ten top tokens. "
        "Specific: random vectors rank the token that they make gain most lower.",
        ("last_lens_rank",),
        lambda v: v["last_lens_rank"] < 10,
        "Needs a vector in the last layer.",
        nulls=("last_lens_rank",),
    ),
    Rule(
        "Forcing that token upon the base model gives most of the gain (about 75 % of the last vector's "
        "gain in the paper).",
        "The top promoted token, forced as the answer's first, gives at least half of the vectors' gain in "
        "accuracy. Specific: more than the base model's own usual first token gives, and the base model "
        "finds the rest of right answers likelier after it than after each of the other first tokens that "
        "it likes best, which take the place of random vectors here.",
        ("forced_share",),
        lambda v: v["forced_share"] >= 0.5,
        "Needs vectors that gain accuracy, and 24 problems solved.",
        nulls=("forced_likelihood",),
        controls=("usual_opening_share",),
        specific=lambda v: v["forced_share"] > v["usual_opening_share"],
    ),
    Rule(
        "The penultimate layer's vector works through the last MLP and the unembedding; skipping attention "
        "hardly changes it.",
        "All but the last attention recovers at least 90 % of the logit difference, and holding the "
        "attention costs less than holding the MLP. Specific: less is left without the MLP than with random "
        "vectors, by 0.05.",
        ("penultimate_without_attention", "penultimate_without_mlp"),
        lambda v: (
            v["penultimate_without_attention"] >= 0.9
            and abs(1 - v["penultimate_without_attention"]) < abs(1 - v["penultimate_without_mlp"])
        ),
        "Needs a vector in the last layer but one.",
        nulls=("penultimate_without_mlp",),
        margin=0.05,
    ),
    Rule(
        "Middle layers push down non-English tokens.",
        "Non-English scripts are at least 1.5 times as frequent among the 50 bottom tokens of the middle "
        "third of the layers as in the vocabulary. Specific: more frequent than for random vectors.",
        ("middle_foreign", "vocabulary_foreign"),
        lambda v: v["middle_foreign"] >= 1.5 * v["vocabulary_foreign"],
        "Needs vectors in the middle third, and a vocabulary of which 1 % or more is in non-English scripts.",
        nulls=("middle_foreign",),
    ),
    Rule(
        "Vectors of single layers compose: two do more than the better one.",
        "Mean pair score over the pairs tried is above 0.02 by the likelihood of right answers, and pairs "
        "solve more problems than the better one on average. Specific: a score above that of random "
        "vectors. Here the layers were trained together, in the paper one by one.",
        ("pair_gain", "pair_accuracy"),
        lambda v: v["pair_gain"] > 0.02 and v["pair_accuracy"] > 0,
        "Needs vectors in several layers, 24 problems solved, and a jointly trained set that is better than "
        "single layers.",
        nulls=("pair_gain",),
    ),
    Rule(
        "Vectors transfer to other models of the family.",
        "Not part of this report; `steer lens transfer` measures it.",
        (),
        None,
        "Needs a second model of the family with vectors of its own.",
    ),
    Rule(
        "Adaptive vectors put their weight on meaningful parts of the prompt.",
        "Spread of the coefficients over tokens is at least their mean. Specific: more than with random "
        "read-outs. `steer lens scales` draws the coefficients.",
        ("adaptive_spread",),
        lambda v: v["adaptive_spread"] >= 1,
        "Needs vectors of kind adaptive; constant ones give every token the same.",
        nulls=("adaptive_spread",),
    ),
    Rule(
        "Features of a sparse autoencoder on the differences separate right from wrong generations.",
        "Not part of this report.",
        (),
        None,
        "Needs an autoencoder trained on a large sample of generations.",
    ),
)
