import json
import os
import signal
import subprocess
import sys
import threading

import pytest
from helpers.paths import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from steer.errors import SteerError
from steer.tasks.grading import MathGrader, Verdict, extract_boxed

REAL = ROOT.parent / "shared" / "data"


@pytest.fixture(scope="module")
def grader():
    with MathGrader(timeout=2.0) as shared:
        yield shared


def box(answer):
    return f"So the answer is $\\boxed{{{answer}}}$."


def judge(grader, gold, answer):
    return grader.check([box(answer)], [gold])[0]


# --- extraction


def slow_extract(text):
    """The last opening, then every possible end in turn: quadratic and obvious."""
    starts = [i + len(o) for o in ("\\boxed{", "\\fbox{") for i in range(len(text)) if text.startswith(o, i)]
    if not starts:
        return None
    start = max(starts)
    for end in range(start, len(text)):
        plain, i = "", start
        while i <= end:  # escaped characters never count
            plain, i = (plain, i + 2) if text[i] == "\\" and i < end else (plain + text[i], i + 1)
        if plain.count("}") == plain.count("{") + 1 and i == end + 1:
            return text[start:end]
    return None


pieces = st.sampled_from(["\\boxed{", "\\fbox{", "{", "}", "\\{", "\\}", "\\\\", "x", "\n", "}}"])


@given(st.lists(pieces, max_size=14).map("".join))
@settings(max_examples=500, deadline=None)
def test_extraction_agrees_with_a_slow_parser(text):
    assert extract_boxed(text) == slow_extract(text)


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{1} then \fbox{2}", "2"),
        (r"\boxed {\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\left\{1\right.}", r"\left\{1\right."),
        (r"\boxed{\boxed{3}}", "3"),
        (r"\boxed{1} then \boxed{2", None),
        (r"put it in \boxed or boxed{5}", None),
        (r"\boxed{}", ""),
        ("", None),
    ],
)
def test_extraction_examples(text, content):
    assert extract_boxed(text) == content


@pytest.mark.parametrize("unit", ["\\boxed{", "{", "\\boxed", "\\boxed ", "}", "\\", "\\boxed{1}"])
def test_extraction_of_megabytes_is_linear(unit):
    text = "\\boxed{" + unit * (2_000_000 // len(unit))  # quadratic time would be hours
    assert extract_boxed(text) in (None, "", "1")


# --- the grader


def test_plain_numbers_start_no_process():
    with MathGrader() as grader:
        verdicts = grader.check(
            [box("4"), box("5"), box("1,000"), "no box", box(" ")], ["4", "4", "1000", "4", "4"]
        )
        assert grader._pool is None
    assert verdicts == [
        Verdict(True, "4", "exact"),
        Verdict(False, "5", "exact"),
        Verdict(True, "1,000", "exact"),
        Verdict(False, None, "no_answer"),
        Verdict(False, None, "no_answer"),  # a blank box is none
    ]


@pytest.mark.parametrize(
    ("gold", "answer", "correct"),
    [
        ("124", "97 + 27", False),  # the question handed back: a symbolic grader would do the sum itself
        ("124", "97 + 27 = 124", True),
        ("7", "10-3", False),
        ("12", "4(3)", False),
        ("12", r"3 \times 4", False),
        ("12", r"\sqrt{144}", False),
        ("12", r"\frac{24}{2}", False),
        ("1024", "2^{10}", False),
        ("6", "3!", False),
        ("-5", "-5", True),
        ("5", "x = 5", True),
        ("300000", r"3 \times 10^5", True),
        ("30", r"30^\circ", True),
        ("12.5", r"12\frac{1}{2}", True),
        ("x^2-1", "(x-1)(x+1)", True),
    ],
)
def test_a_number_must_be_worked_out(grader, gold, answer, correct):
    assert grader.check([box(answer)], [gold])[0].correct == correct


def test_sympy_decides_the_rest(grader):
    cases = [
        ("x^2+2x+1", "(x+1)^2", True),
        (r"\frac{\sqrt{2}}{2}", r"\frac{1}{\sqrt 2}", True),
        (r"\{x+1,2\}", r"\{2, 1+x\}", True),
        ("x+1", "x+2", False),
        ("5", "4+1=5", True),
        ("5", "4+2=5", False),
        (r"\frac{x}{2}", r"\oops \frac{x}{2}", False),
    ]
    verdicts = grader.check([box(answer) for _, answer, _ in cases], [gold for gold, _, _ in cases])
    assert [v.correct for v in verdicts] == [correct for _, _, correct in cases]
    assert {v.how for v in verdicts} == {"symbolic"}


HOSTILE = {
    "megabyte": "x^{" * 200_000 + "2" + "}" * 200_000,
    "tower": "10^{10^{10}}",
    "factorials": "9!!!!!!",
    "deep parentheses": "(" * 10_000 + "7" + ")" * 10_000,
    "deep braces": "{" * 10_000 + "7" + "}" * 10_000,
    "NUL": "7\x00",
    "Arabic-Indic": "٧",
    "fullwidth": "７",
    "unbalanced": "{7",
    "empty": "",
    "huge integer": "7" * 100_000,
    "surrogate": "\ud800",
    "backslash": "7\\",
    "integral": r"\int_0^{1} x^{x^{x^x}} dx",
    "matrix": r"\begin{pmatrix}" + "1&" * 500,
}


@pytest.fixture(scope="module")
def hostile_verdicts(grader):
    return dict(
        zip(HOSTILE, grader.check([box(a) for a in HOSTILE.values()], ["7"] * len(HOSTILE)), strict=True)
    )


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_answers_are_wrong(hostile_verdicts, name):
    assert not hostile_verdicts[name].correct


@pytest.mark.parametrize("answer", ["10^{10^{10}}", "7" * 100_000, "٧", "(" * 10_000, r"\frac{7}{0}"])
def test_hostile_answers_equal_to_the_reference_are_right(grader, answer):
    assert judge(grader, answer, answer) == Verdict(True, answer, "exact")


def test_long_answers_reach_no_parser(hostile_verdicts):
    assert hostile_verdicts["megabyte"].how == hostile_verdicts["deep braces"].how == "too_long"


@pytest.mark.parametrize("answer", ["(" * 10_000 + "7" + ")" * 10_000, "x^{" * 5000 + "2" + "}" * 5000])
def test_nesting_that_does_reach_the_parser_is_stopped(answer):
    with MathGrader(timeout=0.5, max_chars=10**6) as grader:
        assert not judge(grader, "7", answer).correct
        assert judge(grader, "x+1", "1+x").correct


def test_repeated_timeouts_cost_one(caplog):
    with MathGrader(timeout=0.5) as grader:
        verdicts = grader.check([box("x+9!!!!!!")] * 64, ["x+7!"] * 64)
        assert {v.how for v in verdicts} == {"timeout"}
        assert [r.getMessage() for r in caplog.records] == [
            "1 of 1 answers count as wrong unchecked (1 timeouts, 0 crashes; first: timeout)"
        ]
        calls = []
        grader._attempt = lambda *a: calls.append(a)  # a cached pair asks no worker
        assert judge(grader, "x+7!", "x+9!!!!!!").how == "timeout"
        assert not calls


def test_many_different_timeouts_are_hurried(monkeypatch):
    limits = []

    def attempt(pairs, limit):
        limits.append((len(pairs), limit))
        return [TimeoutError()] * len(pairs)

    grader = MathGrader(timeout=5.0)
    monkeypatch.setattr(grader, "_attempt", attempt)
    grader.check([box(f"x+{i}") for i in range(128)], ["y"] * 128)
    assert sum(count * limit for count, limit in limits) < 0.25 * 128 * 5
    monkeypatch.setattr(grader, "_attempt", lambda pairs, limit: [True] * len(pairs))
    assert judge(grader, "y", "x+0").how == "timeout"  # had its full time
    assert judge(grader, "y", "x+127").correct  # had not, so it is tried again


def test_works_off_the_main_thread(grader):
    verdicts = []
    thread = threading.Thread(target=lambda: verdicts.append(judge(grader, "y+1", "1+y")))
    thread.start()
    thread.join(120)
    assert verdicts == [Verdict(True, "1+y", "symbolic")]


def test_survives_a_killed_worker():
    with MathGrader() as grader:
        assert judge(grader, "x+1", "1+x").correct
        for worker in list(grader._pool._pool_manager.worker_manager.workers):
            os.kill(worker, signal.SIGKILL)
        assert judge(grader, "x+2", "2+x") == Verdict(True, "2+x", "symbolic")


def die(gold, answer):
    os._exit(3)


def test_a_worker_that_dies_on_an_answer_is_a_crash(monkeypatch, caplog):
    with MathGrader() as grader:
        assert judge(grader, "x+1", "1+x").correct
        with monkeypatch.context() as patch:
            patch.setattr("steer.tasks.grading._symbolic", die)
            assert judge(grader, "x", "y+1") == Verdict(False, "y+1", "crash")
        assert "0 timeouts, 1 crashes; first: ProcessExpired" in caplog.text
        assert judge(grader, "x+2", "2+x").correct


def test_an_error_in_a_worker_is_a_crash(monkeypatch, caplog):
    monkeypatch.setattr("steer.tasks.grading._symbolic", os.fspath)  # raises TypeError for two arguments
    with MathGrader() as grader:
        verdicts = grader.check([box("y+1"), box("y+2"), box("3")], ["x", "x", "3"])
    assert [v.how for v in verdicts] == ["crash", "crash", "exact"]
    assert [r.getMessage()[:72] for r in caplog.records] == [
        "2 of 2 answers count as wrong unchecked (0 timeouts, 2 crashes; first: T"
    ]


def test_reopens_after_close():
    grader = MathGrader()
    for n in range(2):
        assert judge(grader, f"x+{n + 1}", f"{n + 1}+x").correct
        grader.close()
        assert grader._pool is None


def test_the_cache_is_bounded(monkeypatch):
    monkeypatch.setattr("steer.tasks.grading._CACHE_SIZE", 10)
    grader = MathGrader()
    monkeypatch.setattr(grader, "_attempt", lambda pairs, limit: [True] * len(pairs))
    assert all(v.correct for v in grader.check([box(f"x+{i}") for i in range(50)], ["y"] * 50))
    assert list(grader._cache) == [("y", f"x+{i}") for i in range(40, 50)]


def test_checker_mistakes():
    with pytest.raises(SteerError, match="2 completions and 1 reference answers"):
        MathGrader().check(["a", "b"], ["1"])
    with pytest.raises(SteerError, match="timeout=0"):
        MathGrader(timeout=0)


def test_an_unguarded_script_gets_told(tmp_path):
    script = tmp_path / "unguarded.py"
    script.write_text(
        "from steer.tasks.grading import MathGrader\nprint(MathGrader().check([r'\\boxed{x+1}'], ['1+x']))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    out = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
        check=False,
    )
    assert out.returncode != 0 and "__main__" in out.stderr


# --- real data


def real(name):
    path = REAL / f"{name}.jsonl"
    if not path.exists():
        pytest.skip("needs ../shared/data")
    return [str(json.loads(line)["answer"]) for line in path.open(encoding="utf-8")]


def test_every_gsm8k_answer_is_itself_without_a_worker():
    golds = real("gsm8k_train") + real("gsm8k_test")
    with MathGrader() as grader:
        assert all(
            v == Verdict(True, v.answer, "exact") for v in grader.check([box(g) for g in golds], golds)
        )
        assert not any(v.correct for v in grader.check([box(f"{g}1") for g in golds], golds))
        assert grader._pool is None


def test_math_answers_boxed_are_right(grader):
    golds = real("math_train")[:1000]
    wrong = [
        g for g, v in zip(golds, grader.check([box(g) for g in golds], golds), strict=True) if not v.correct
    ]
    assert not wrong


def test_math_answers_reworded_are_right(grader):
    golds = [g for g in real("math_train") if "\\frac" in g][:60]
    spaced = [g.replace("\\frac", "\\dfrac ").replace("+", " + ") + r"\quad" for g in golds]
    verdicts = grader.check([box(a) for a in spaced], golds)
    assert sum(v.correct for v in verdicts) >= 58
