from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steer.tasks.grading import MathGrader, extract_boxed
from steer.tasks.lenient import extract_lenient


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"3 + 4 = 8. So $\boxed{7}$, not 8.", "7"),
        (r"First \boxed{1}, then \boxed{5 + 2}. It is 7.", "5 + 2"),
        (r"\boxed{} The answer is 14.", "14"),
        (r"So it is \boxed{45", "45"),
        ("The answer is 14. To check: 20 - 6 = 14, and 7 * 2 = 15", "14"),
        ("The answer is:\n\n45", "45"),
        ("**Answer:** 45", "45"),
        ("Final answer: $1,234.50.", "1,234.50"),
        ("the answer is 12 dollars.", "12"),
        ("The answer is 5 * 9 = 45.", "5 * 9 = 45"),
        (r"the answer is \frac{3}{4}.", r"\frac{3}{4}"),
        (r"The answer is $x + \pi$", r"$x + \pi$"),
        ("The answer is (B)", "(B)"),
        ("The answer is 2 million.", r"2\text{ million}"),
        ("The answer is: he has $2 million", r"2\text{ million}"),
        ("The answer is 50%.", "50%"),
        ("The answer is **50** %.", "50%"),
        ("The answer is negative 5 degrees.", "-5"),
        ("The answer is 4 minus 5.", "4 minus 5"),
        ("The answer is 3.5 to the nearest tenth.", "3.5"),
        ("The answer is easy. 3 + 4 = 7.", "7"),
        ("2 + 7 = 9\n\nSo 2 + 7 is 9", "9"),
        ("it falls to -5 degrees", "-5"),
        ("8-5", "5"),
        ("a fraction of 3/4", "3/4"),
        ("1,2,3", "3"),
        ("it costs 1{,}234 in all", "1{,}234"),
        ("It is 1234.", "1234"),
        ("half is .5", ".5"),
        ("x3 and v1.2", None),
        ("no number at all", None),
        ("", None),
    ],
)
def test_what_is_taken_for_the_answer(text, answer):
    assert extract_lenient(text) == answer


@pytest.fixture(scope="module")
def grader():
    with MathGrader() as found:
        yield found


@pytest.mark.parametrize(
    ("text", "gold", "correct"),
    [
        (r"The answer is \[ 42 \].", "42", True),
        ("The answer is\n\\[\nx^2 + 1\n\\]", "x^2+1", True),
        (r"So \boxed{\[ 42 \]}", "42", True),
        ("The answer is 2 million.", "2000000", True),
        ("The answer is 2 million.", "2", False),
        ("The answer is 2 million dollars.", "2000000", True),
        ("The answer is 5 and a quarter.", "5", False),
        ("The answer is negative 5.", "5", False),
        ("The answer is negative 5.", "-5", True),
        ("The answer is not 5.", "5", False),
        ("The answer is 50%.", "0.5", True),
        ("The answer is 50%.", "50", True),
        ("The answer is 50 percent of them.", "0.5", True),
        ("The answer is 0.5%.", "0.5", False),
    ],
)
def test_words_that_change_a_number_count(grader, text, gold, correct):
    assert grader.check([text], [gold], extract_lenient)[0].correct is correct


WORDS = st.text(st.sampled_from("abc xyz\n,;:!?'\"-"), max_size=30)


@given(st.text(max_size=200))
def test_any_text_is_read_and_a_box_wins(text):
    found = extract_lenient(text)
    boxed = extract_boxed(text)
    if boxed is not None and boxed.strip():
        assert found == boxed
    assert found is None or found


@given(WORDS, st.integers(-(10**9), 10**9), WORDS)
@settings(deadline=None)
def test_a_single_number_among_words_is_the_answer(grader, before, number, after):
    spaced = f"{before} {number} {after}"
    grouped = f"{before} {number:,} {after}"
    verdicts = grader.check([spaced, grouped], [str(number)] * 2, extract_lenient)
    assert [verdict.correct for verdict in verdicts] == [True, True]


@given(
    st.lists(st.sampled_from([r"\boxed{", "}", "7", " ", "{", "answer is ", "12", ".", "+"]), max_size=12),
    st.sampled_from(["7", "12", "712"]),
)
@settings(deadline=None, max_examples=50)  # some need a worker process
def test_what_is_right_in_a_box_is_right_leniently(grader, parts, gold):
    text = "".join(parts)
    strict = grader.check([text], [gold])[0]
    lenient = grader.check([text], [gold], extract_lenient)[0]
    if strict.correct:
        assert lenient.correct
    if strict.how != "no_answer":
        assert strict == lenient


def test_long_texts_take_linear_time():
    for part in ("1,234", "answer is ", "-", "1/", r"\frac{1}", "0", "."):
        text = part * 40_000
        extract_lenient(text)
