"""The best elicited base: which examples, how many fit, the constant answer, and the tables that show it."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steer.card import card
from steer.config import SteeringConfig
from steer.evaluation.heldout import Answered, constant, score, ways
from steer.lens.study import _elicited
from steer.prompt import PromptSpec
from steer.tasks.arithmetic import Arithmetic
from steer.tasks.elicited import best_base, choose, constant_answer, fitting, longer, stages
from steer.tasks.grading import MathGrader, extract_boxed
from steer.tasks.prompts import format_prompt
from steer.training.summary import score_table

TRAIN = Arithmetic("+*", 1, 2, 87, heldout=0.4).generate("train")
HELD_OUT = Arithmetic("+*", 1, 2, 75, heldout=0.4).generate("heldout")


# ---- examples


def test_examples_do_not_depend_on_the_order_of_the_problems():
    shuffled = [*TRAIN, *TRAIN[:5]]
    random.Random(0).shuffle(shuffled)
    examples = choose(TRAIN, 8)
    assert choose(shuffled, 8) == examples
    assert len({problem for problem, _ in examples}) == 8
    assert choose(TRAIN, 4) == examples[:4]


def test_examples_are_training_problems_and_never_held_out_ones():
    examples = choose([*TRAIN, *HELD_OUT], 200, [row["problem"].replace(" ", "  ") for row in HELD_OUT])
    assert {problem for problem, _ in examples} == {row["problem"] for row in TRAIN}


def test_an_example_is_worked_and_ends_in_its_box():
    answers = {row["problem"]: row["answer"] for row in TRAIN}
    for problem, worked in choose(TRAIN):
        assert extract_boxed(worked) == answers[problem]
        assert problem.removeprefix("What is ").removesuffix("?") in worked


@pytest.mark.parametrize(
    ("solution", "worked"),
    [
        (None, r"$\boxed{72}$"),
        ("", r"$\boxed{72}$"),
        ("48+24 = <<48+24=72>>72 clips.", "48+24 = 72 clips.\nThe answer is $\\boxed{72}$."),
        (r"It is $\boxed{72}$.", r"It is $\boxed{72}$."),
    ],
)
def test_how_an_example_is_written(solution, worked):
    assert choose([{"problem": "How many?", "answer": "72", "solution": solution}]) == (
        ("How many?", worked),
    )


@given(st.integers(0, 12), st.integers(1, 100), st.integers(0, 300))
def test_as_many_examples_as_the_context_holds(count, limit, context):
    examples = tuple((f"{n}", f"{n}") for n in range(count))
    kept = fitting(examples, lambda some: 20 + 10 * len(some), limit, context)
    assert kept == examples[: len(kept)]
    assert not kept or 20 + 10 * len(kept) + limit <= context
    assert len(kept) == count or 20 + 10 * (len(kept) + 1) + limit > context
    assert fitting(examples, lambda some: 10**9, limit, None) == examples


@given(st.integers(1, 10_000))
def test_the_longer_limit_is_no_shorter(limit):
    assert longer(limit) >= limit
    assert longer(16) == 64 and longer(512) == 1024 and longer(3072) == 3072


# ---- the constant answer


def test_no_constant_answer_scores_more():
    assert constant_answer(["3", "12", "12", "3", "4"]) == "12"
    with MathGrader() as grader:
        found = constant(HELD_OUT, grader)
    golds = [row["answer"] for row in HELD_OUT]
    assert found["accuracy"] == found["lenient"] == max(map(golds.count, golds)) / 75 == 0.12
    assert found["low"] <= found["accuracy"] <= found["high"] and found["problems"] == 75


# ---- how each stage asks


def test_the_stages_of_a_run(tiny_tokenizer):
    prompts, examples = PromptSpec("plain"), choose(TRAIN, 3)
    found = ways(prompts, 4, examples, HELD_OUT, tiny_tokenizer, None)
    assert found == {
        "before": (prompts, 4),
        "after": (prompts, 4),
        "longer": (prompts, 16),
        "elicited": (PromptSpec("plain", examples=examples), 16),
    }
    assert set(ways(prompts, 4, (), HELD_OUT, tiny_tokenizer, None)) == {"before", "after"}


def test_a_short_context_gets_fewer_examples_and_room_for_the_run_s_own_answers(tiny_tokenizer, caplog):
    caplog.set_level("INFO", "steer")
    prompts, examples = PromptSpec("plain"), choose(TRAIN, 3)
    one = len(tiny_tokenizer(format_prompt(HELD_OUT[0]["problem"], tiny_tokenizer, prompts))["input_ids"])
    found = ways(prompts, 4, examples, HELD_OUT, tiny_tokenizer, one + 80)
    assert found["longer"] == (prompts, 16)
    assert 0 < len(found["elicited"][0].examples) < 3
    assert "worked examples fit the model's context" in caplog.text
    assert set(ways(prompts, 4, examples, HELD_OUT, tiny_tokenizer, one)) == {"before", "after"}


# ---- what is shown


def answered(correct, lenient):
    return [Answered("p", "1", "", None, c, 3, True, f) for c, f in zip(correct, lenient, strict=True)]


def results(**lenient):
    found = {}
    for stage, right in lenient.items():
        verdicts = [n < right for n in range(10)]
        own = [n < right // 2 for n in range(10)]
        found[stage] = {**vars(score(answered(own, verdicts))), "max_new_tokens": 64, "examples": 8}
    return found


def test_a_score_has_both_readings():
    both = score(answered([True, False, False, False], [True, True, True, False]))
    assert (both.accuracy, both.lenient) == (0.25, 0.75)
    assert both.lenient_low < 0.75 < both.lenient_high
    old = score(answered([True, False], [None, None]))
    assert old.accuracy == 0.5 and old.lenient is None


def test_the_table_shows_every_base_and_the_gain_over_the_best():
    found = results(before=1, longer=6, elicited=4, after=9)
    found["constant"] = {**found["before"], "answer": "12"}
    lines = score_table(found, "steered").splitlines()
    names = ["untrained", "untrained, 64 tokens", "untrained, 8 examples, 64 tokens", "always 12", "steered"]
    assert [line[:36].split("  ")[0] for line in lines[1:6]] == names
    assert "0.400" in lines[5] and "0.900" in lines[5]
    assert lines[-1] == (
        "best elicited base: untrained, 64 tokens, 0.600; steered gains +0.300 over it, both read leniently"
    )
    assert best_base(found) == ("untrained, 64 tokens", found["longer"])


def test_results_of_older_runs_are_shown_as_what_they_are():
    old = {"accuracy": 0.5, "low": 0.2, "high": 0.8, "problems": 10, "answered": 1.0}
    found = {"before": {**old, "accuracy": 0.0}, "after": old}
    assert best_base(found) is None
    assert [name for name, _ in stages(found, "steered")] == ["untrained", "steered"]
    assert "The base was not elicited in this run" in score_table(found)


def test_the_card_shows_the_elicited_base():
    def written(scores):
        config = SteeringConfig(
            base_model_name_or_path="a/b",
            num_hidden_layers=2,
            hidden_size=4,
            layers="0-1",
            provenance={"results": scores},
        )
        return card(config, "model.layers", 8, 100)

    text = written(results(before=0, longer=3, elicited=6, after=9))
    assert "| base model, 8 examples, 64 tokens | 0.300 |" in text and "| 0.600 |" in text
    assert text.index("| base model |") < text.index("| base model, 64 tokens |")
    assert "not elicited" not in text
    old = {"accuracy": 0.5, "low": 0.2, "high": 0.8, "problems": 10}
    text = written({"before": old, "after": old})
    assert "| base model | 0.500 | 0.200 to 0.800 | 10 |" in text and "not elicited" in text


def test_the_lens_report_tells_of_the_elicited_base():
    found = _elicited({"results": results(before=0, longer=3, elicited=6, after=9)})
    assert "untrained, 8 examples, 64 tokens: 0.600 of 10 problems" in found
    odd = {"accuracy": 0.5, "low": 0.2, "high": 0.8, "problems": 10, "lenient": "all"}
    for provenance in (None, {}, {"results": {"before": odd}}, {"results": [1]}):
        assert "was not elicited" in _elicited(provenance)
