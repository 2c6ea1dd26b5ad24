"""The second graders: lm-eval's own code where it is installed, and an explanation for every difference."""

from __future__ import annotations

import json

import pytest
from helpers.evaluating import make_run
from hypothesis import given, settings
from hypothesis import strategies as st

from steer.evaluation import grading_check
from steer.evaluation.grading_check import Graded, explain, lm_eval_extract, lm_eval_match
from steer.tasks.grading import MathGrader

TEXTS = [
    ("She makes $18 a day.\n#### 18", "18"),
    (r"So \boxed{18}.", "18"),
    ("The answer is 1,234.", "1234"),
    ("-5 or .5 or $,. 7.", "7"),
    ("nothing", "3"),
    ("#### 12 and #### 13", "12"),
    ("", "1"),
    ("3.0", "3"),
    ("12$", "12"),
]


def test_extraction_of_known_texts():
    assert lm_eval_extract("a 5, b 1,234.", strict=False) == "1,234."
    assert lm_eval_match("1,234.", "1234")
    assert lm_eval_match("$18", "18")
    assert not lm_eval_match("3.0", "3")
    assert lm_eval_extract("#### 12 and #### 13", strict=True) == "12"
    assert lm_eval_extract("nothing", strict=False) == lm_eval_extract("18", strict=True) == "[invalid]"


def check_against_lm_eval(text: str, reference: str) -> None:
    """The task's own filters and metric (lm_eval/tasks/gsm8k/gsm8k.yaml), by lm-eval's own code."""
    from lm_eval.api.metrics import exact_match_hf_evaluate
    from lm_eval.filters.extraction import RegexFilter

    filters = {
        True: RegexFilter(r"#### (\-?[0-9\.\,]+)"),
        False: RegexFilter(r"(-?[$0-9.,]{2,})|(-?[0-9]+)", group_select=-1),
    }
    ignored = [",", r"\$", r"(?s).*#### ", r"\.$"]
    for strict, regex in filters.items():
        theirs = next(iter(regex.apply([[text]], [{}])))[0]
        assert lm_eval_extract(text, strict) == theirs
        for target in (reference, f"Some work.\n#### {reference}"):
            score = exact_match_hf_evaluate([theirs], [target], regexes_to_ignore=ignored, ignore_case=True)
            assert lm_eval_match(theirs, target) == bool(score["exact_match"])


@pytest.mark.parametrize(("text", "reference"), TEXTS)
def test_equal_to_lm_eval(text, reference):
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    check_against_lm_eval(text, reference)


@given(st.text(alphabet="0123456789$.,- #ax\n\\{}boxed", max_size=40), st.integers(-999, 9999).map(str))
@settings(max_examples=300, deadline=None)
def test_equal_to_lm_eval_on_any_text(text, reference):
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    check_against_lm_eval(text, reference)


@pytest.mark.parametrize(
    ("grader", "text", "reference", "reason"),
    [
        ("lm-eval flexible", "The answer is 18", "18", "no box"),
        ("lm-eval flexible", r"that is \boxed{18", "18", "never closed"),
        ("lm-eval flexible", r"\boxed{9 + 9} = 18", "18", "a sum still to do"),
        ("lm-eval flexible", r"\boxed{17} no, 18", "18", "from outside the box"),
        ("lm-eval flexible", r"\boxed{x 18}", "18", "one number out of a longer boxed answer"),
        (
            "lm-eval flexible",
            r"\boxed{18} after 3 steps",
            "18",
            "last number of the text is not the boxed one",
        ),
        ("lm-eval flexible", r"\boxed{18.0}", "18", "written in a way"),
        ("lm-eval strict", r"\boxed{18}", "18", "no '#### answer' line"),
        ("math-verify", r"\boxed{18} or rather \boxed{19}", "18", "several boxes"),
    ],
)
def test_every_difference_has_a_reason(grader, text, reference, reason):
    with MathGrader() as own:
        (ours,) = own.check([text], [reference])
    extracted = None
    if grader == "math-verify":
        theirs = not ours.correct
    else:
        extracted = lm_eval_extract(text, grader.endswith("strict"))
        theirs = lm_eval_match(extracted, reference)
    assert theirs != ours.correct
    assert reason in explain(Graded(grader, text, reference, ours, theirs, extracted))


def test_a_wrong_verdict_is_unexplained(tmp_path, capsys):
    """A run whose stored verdicts are turned around cannot pass the check."""
    folder = make_run(tmp_path / "right", {"base": [[True], [True], [False]]})
    assert grading_check.main([str(folder)]) == 0
    printed = capsys.readouterr().out
    assert "math-verify: 3 completions, the same verdict on 3 (100.0%)" in printed
    assert "lm-eval flexible: 3 completions, the same verdict on 3" in printed
    assert "lm-eval strict: 3 completions, the same verdict on 1" in printed
    assert "every difference is explained" in printed
    folder = make_run(tmp_path / "turned", {"base": [[True]]}, {"base": r"\boxed{7}"})
    assert grading_check.main([str(folder)]) == 1
    assert "unexplained" in capsys.readouterr().out


def test_lm_evals_own_samples(tmp_path, capsys):
    rows = [
        {
            "resps": [[r"So \boxed{18}"]],
            "filtered_resps": ["18"],
            "filter": "flexible-extract",
            "exact_match": 1.0,
        },
        {"resps": [["It is 18"]], "filtered_resps": ["18"], "filter": "flexible-extract", "exact_match": 1.0},
    ]
    path = tmp_path / "samples_gsm8k.jsonl"
    path.write_text("".join(json.dumps({**row, "target": "Work.\n#### 18"}) + "\n" for row in rows))
    assert grading_check.main([str(path)]) == 0
    printed = capsys.readouterr().out
    assert (
        "lm-eval flexible: 2 completions, the same verdict on 1 (50.0%); right by us 1, by lm-eval flexible 2"
        in printed
    )
    assert "no box: the other grader" in printed
    path.write_text(path.read_text() + '{"resps": []}\n')
    assert grading_check.main([str(path)]) == 1
    assert "line 3: not what lm-eval writes" in capsys.readouterr().err


def test_labelled_pairs(tmp_path, capsys):
    path = tmp_path / "labelled.jsonl"
    rows = [
        {"gold": "12", "answer": r"12\text{ cm}^2", "correct": True},
        {"gold": "12", "answer": "13", "correct": False},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert grading_check.main([str(path)]) == 0
    assert "the same verdict on 2 of 2 labelled answers (100.0%)" in capsys.readouterr().out
    path.write_text(path.read_text() + '{"gold": "5", "answer": "6", "correct": true}\n')
    assert grading_check.main([str(path)]) == 1
    assert "wrong here (exact), not by the label: answer '6' for '5'" in capsys.readouterr().out
    path.write_text(path.read_text() + '{"gold": "5", "answer": "6", "correct": "yes"}\n')
    assert grading_check.main([str(path)]) == 1
    assert "line 4: expected" in capsys.readouterr().err
