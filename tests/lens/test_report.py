"""The report: its findings' rules, its page as HTML, and the page in headless Chromium."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.lens import PROBLEMS, Even, subject_of
from matplotlib.figure import Figure

from steer import SteerError
from steer.lens.findings import NOT_SEEN, NOT_SPECIFIC, RULES, SEEN, UNTESTABLE, judge
from steer.lens.page import _provenance, render
from steer.lens.prose import abstract
from steer.lens.random_sets import Null
from steer.lens.report import save_figures, study
from steer.lens.sections import SECTIONS
from steer.lens.study import Report, Study
from steer.lens.subject import Subject
from steer.lens.words import percent
from steer.prompt import PromptSpec
from steer.stats import wilson

HOSTILE = '<script>alert("1")</script> & <b>'
VOID = {"meta", "img", "br", "hr", "link", "input"}


MADE: dict[str, Any] = {}  # once for all tests: it takes seconds


@pytest.fixture
def report(build_tiny, tiny_tokenizer, monkeypatch) -> Report:
    """The study of a tiny model, with a problem that is hostile to a page."""
    if "report" not in MADE:
        few = ("entropy.TWO_SIDED_DRAWS", "spectrum.DRAWS", "downstream.DRAWS", "conventions.DRAWS")
        for name in few:  # no verdict depends on these
            monkeypatch.setattr(f"steer.lens.sections.{name}", 2)
        subject = subject_of(
            build_tiny("llama", num_hidden_layers=4), tiny_tokenizer, std=1.0, batch_size=1024
        )
        subject.vectors.config.provenance = {"run": {"model": HOSTILE}, "training": {"lr": 0.1}}
        numbers = [{"problem": f"{n} * {n + 3}?", "answer": "7"} for n in range(23)]
        MADE["report"] = study(subject, [{"problem": HOSTILE, "answer": "7"}, *numbers], Even(), seed=1)
    return MADE["report"]


@pytest.fixture
def page(report, monkeypatch) -> str:
    """Its figures are small, and drawn once each: those of full size are drawn twice, for their margins."""
    if "page" not in MADE:
        own = Figure.savefig
        small = lambda figure, file, **options: own(figure, file, format=options["format"], dpi=30)  # noqa: E731
        monkeypatch.setattr(Figure, "savefig", small)
        MADE["page"] = render(report)
    return MADE["page"]


class Checked(HTMLParser):
    """Every element closed in order; what the page refers to."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.seen: list[str] = []
        self.links: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.seen.append(tag)
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), (tag, names)
        self.links += [value for name, value in attrs if name in ("src", "href", "data", "action", "srcset")]
        assert not [name for name in names if name.startswith("on")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"style"} & set(self.open):
            self.text += data


def test_the_page_is_whole_escaped_and_refers_to_nothing_outside(report, page) -> None:
    checked = Checked()
    checked.feed(page)
    checked.close()
    assert checked.open == []
    assert page.startswith("<!DOCTYPE html>")
    assert checked.seen.count("html") == checked.seen.count("body") == checked.seen.count("title") == 1
    assert "script" not in checked.seen
    assert HOSTILE in checked.text  # the problem, shown as it is
    assert all(link.startswith("data:image/png;base64,") for link in checked.links)
    assert checked.seen.count("img") == len(report.results) == len(checked.links)
    assert "@import" not in page and "url(" not in page
    for finding in report.findings:
        assert finding.claim in checked.text
    assert "NaN" not in checked.text and " nan " not in checked.text


def test_every_part_of_the_provenance_has_a_row() -> None:
    made = {"run": {"model": "m", "seed": None}, "method": "dpo", "updates": 200, "results": {"before": 0}}
    made["derived"] = [{"times": 2}, {"minus": {"base_model_name_or_path": "org/other"}}]
    config = SimpleNamespace(provenance=made)
    told: Any = SimpleNamespace(subject=SimpleNamespace(vectors=SimpleNamespace(config=config)))
    assert dict(_provenance(told)) == {
        "run": "model m",
        "method": "dpo",
        "updates": "200",
        "derived": "{'times': 2}, {'minus': {'base_model_name_or_path': 'org/other'}}",
    }


def test_every_finding_has_its_numbers_and_its_draws(report) -> None:
    assert [finding.claim for finding in report.findings] == [rule.claim for rule in RULES]
    judged = [f for f in report.findings if f.verdict != UNTESTABLE]
    assert len(judged) >= 8
    assert all(finding.numbers for finding in judged)
    there = [finding for finding in judged if finding.verdict != NOT_SEEN]
    assert all(null["draws"] == 20 for finding in there for null in finding.null.values())
    assert sum(bool(finding.null) for finding in judged) >= 8
    assert {
        "base",
        "steered",
        "random vectors of equal length (20 draws)",
        "layers shuffled",
        "mean-difference vectors",
    } <= set(report.accuracy)
    found = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert found["accuracy"]["base"]["low"] <= found["accuracy"]["base"]["accuracy"]


def test_several_draws_are_no_more_problems(report) -> None:
    """The interval of random vectors is over problems, however many draws there are."""
    accuracy, *interval = report.accuracy["random vectors of equal length (20 draws)"]
    draws = report.nulls["vectors_accuracy"].values
    assert accuracy == pytest.approx(sum(draws) / len(draws))
    assert interval == pytest.approx(wilson(accuracy * report.problems, report.problems))
    best = max(*draws, *(report.accuracy[k][0] for k in ("layers shuffled", "mean-difference vectors")))
    assert f"reach {percent(best)} at best" in abstract(report)


def test_random_vectors_show_nothing_specific(report) -> None:
    """The vectors of this report are random themselves."""
    assert SEEN not in [finding.verdict for finding in report.findings]


def test_figures_and_numbers_are_written(report, tmp_path) -> None:
    few = {name: report.results[name] for name in ("directions", "later layers frozen")}
    folder = save_figures(replace(report, results=few), tmp_path)
    images = {path.name for path in folder.glob("*.png")}
    assert images == {"directions.png", "later-layers-frozen.png"}
    assert all((folder / name).read_bytes().startswith(b"\x89PNG") for name in images)
    assert json.loads((folder / "findings.json").read_text())["findings"]


def test_every_result_turns_into_json(report) -> None:
    for name, result in report.results.items():
        assert json.loads(json.dumps(result.to_dict(), allow_nan=False)), name


def test_every_result_belongs_to_one_section(report) -> None:
    names = [name for section in SECTIONS for name in section.captions]
    assert len(names) == len(set(names))
    assert list(report.results) == [name for name in names if name in report.results]
    for section in SECTIONS:
        for name in report.results.keys() & section.captions.keys():
            assert all(sentence.endswith(".") for sentence in section.sentences(name, report)), name
            assert section.caption(name, report).startswith(section.captions[name])
    keys = ["vectors", "problems", "accuracy", "numbers", "null", "findings", "notes"]
    assert list(report.to_dict()) == keys


def test_headings_stand_once_in_order(report, page) -> None:
    wanted = [section.heading for section in SECTIONS if section.heading]
    found = re.findall(r"<h2>(.*?)</h2>", page)
    assert [heading for heading in found if heading in wanted] == [
        section.heading
        for section in SECTIONS
        if section.heading and report.results.keys() & section.captions.keys()
    ]


def test_rules_by_their_numbers() -> None:
    good = {
        "base_interval_top": 0.1,
        "steered_interval_bottom": 0.8,
        "likelihood_gain": 2.0,
        "vectors_accuracy": 0.9,
        "last_first_share": 0.9,
        "last_concentration": 0.8,
        "forced_share": 0.75,
        "usual_opening_share": 0.1,
        "forced_likelihood": -1.0,
    }
    nulls = {
        "likelihood_gain": Null.of([-0.1] * 20),
        "vectors_accuracy": Null.of([0.1] * 20),
        "last_first_share": Null.of([n / 100 for n in range(20)]),
        "last_concentration": Null.of([n / 100 for n in range(20)]),
        "forced_likelihood": Null.of([-2.0] * 20),
    }

    def verdicts(numbers, nulls) -> list[str]:
        found = {finding.claim: finding.verdict for finding in judge(numbers, nulls)}
        return [found[RULES[place].claim] for place in (0, 4, 6)]

    assert verdicts(good, nulls) == [SEEN] * 3
    assert sum(f.verdict == UNTESTABLE for f in judge(good, nulls)) == len(RULES) - 3
    # one draw that does as much is enough for "not specific", and so is a control that does
    for place, name, value in (
        (0, "likelihood_gain", 2.0),
        (0, "vectors_accuracy", 0.9),
        (1, "last_concentration", 0.8),
    ):
        found = verdicts(good, {**nulls, name: Null.of([*nulls[name].values[1:], value])})
        assert found == [NOT_SPECIFIC if n == place else SEEN for n in range(3)]
    for place, name, value in (
        (0, "likelihood_gain", 0.0),
        (2, "usual_opening_share", 0.8),
    ):
        found = verdicts({**good, name: value}, nulls)
        assert found == [NOT_SPECIFIC if n == place else SEEN for n in range(3)]
    # no effect, however far from the draws
    found = verdicts(
        {**good, "steered_interval_bottom": 0.05, "last_first_share": 0.4, "forced_share": 0.2}, nulls
    )
    assert found == [NOT_SEEN] * 3
    assert all(finding.verdict == UNTESTABLE for finding in judge({}))


def test_a_claim_without_numbers_or_draws_is_untestable_and_says_why() -> None:
    numbers = {"base_interval_top": 0.1, "steered_interval_bottom": 0.8, "vectors_accuracy": 0.9}
    reason = {"likelihood_gain": "Only 9 answers are right."}
    found = judge(numbers, {}, reason)[0]
    assert found.verdict == UNTESTABLE and "Only 9 answers are right." in found.why
    numbers["likelihood_gain"] = 1.0
    few, enough = (
        {n: Null.of([0.0] * draws) for n in ("likelihood_gain", "vectors_accuracy")} for draws in (18, 19)
    )
    found = judge(numbers, few)[0]
    assert found.verdict == UNTESTABLE
    assert "only 18 random draws" in found.why and "19 are needed" in found.why
    found = judge(numbers, enough)[0]  # p can be 1 / 20
    assert found.verdict == SEEN and found.null["likelihood_gain"]["p"] == 0.05
    assert judge({**numbers, "steered_interval_bottom": 0.05})[0].verdict == NOT_SEEN
    # a layer that has no vector
    assert judge({"last_lens_rank": None})[5].why == "Needs a vector in the last layer."


def test_the_rank_of_a_number_among_random_draws() -> None:
    draws = Null.of([0.1 * n for n in range(20)] + [float("nan"), float("inf")])
    assert draws.enough and len(draws.values) == 20
    assert draws.rank(2.0) == 1 and draws.p(2.0) == pytest.approx(1 / 21) and draws.exceeded(2.0)
    assert draws.rank(1.9) == 2 and not draws.exceeded(1.9)  # a tie counts against it
    assert draws.exceeded(2.0, margin=0.19) and not draws.exceeded(2.0, margin=0.2)
    told = draws.to_dict(2.0)
    assert told["draws"] == 20 and told["low"] == 0 and told["high"] == pytest.approx(1.9)
    assert told["mean"] == pytest.approx(0.95) and told["quantile"] == pytest.approx(1.805)
    fewer = Null(draws.values, larger=False)
    assert fewer.exceeded(-0.1) and not fewer.exceeded(0.0)
    assert fewer.quantile == pytest.approx(0.095)


def test_too_few_problems(report) -> None:
    with pytest.raises(SteerError, match="at least 24 problems, got 23; raise --problems"):
        study(report.subject, PROBLEMS * 7 + PROBLEMS[:2], Even())


def test_another_template_keeps_the_rest_of_the_prompt(build_tiny, tiny_tokenizer, monkeypatch) -> None:
    """But for the system text, which a template that is no chat cannot have."""
    trained = PromptSpec("boxed_short", "To", "Add.", examples=(("1 + 1?", "2"),))
    model = build_tiny("llama", max_position_embeddings=512)
    subject = replace(subject_of(model, tiny_tokenizer, std=1.0), prompt=trained)
    rows, asked = Subject.rows, []

    def noted(self: Subject, *given: Any, **options: Any) -> Any:
        asked.append(self.prompt)
        return rows(self, *given, **options)

    monkeypatch.setattr(Subject, "rows", noted)
    Study(subject, PROBLEMS, Even()).answer()  # type: ignore[arg-type]
    assert asked == [trained, PromptSpec("plain", "To", examples=trained.examples)]


def test_the_page_opens_in_chromium(report, page, tmp_path) -> None:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("chromium is not installed (Debian: apt-get install chromium)")
    file, picture = tmp_path / "page.html", tmp_path / "page.png"
    file.write_text(page)
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--no-first-run",
        "--disable-background-networking",
    ]
    flags += [
        "--disable-component-update",
        "--disable-sync",
        "--disable-quic",
        f"--user-data-dir={tmp_path / 'profile'}",
    ]
    size = "--window-size=900,1400"
    done = subprocess.run(
        [chromium, *flags, size, f"--screenshot={picture}", "--dump-dom", file.as_uri()],
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    )
    from matplotlib.image import imread

    pixels = imread(picture)[..., :3]
    assert pixels.shape[:2] == (1400, 900)
    dark = (pixels.mean(-1) < 0.5).mean()
    assert 0.01 < dark < 0.5  # text on white, not an empty or an error page
    assert len(re.findall(r"<img ", done.stdout)) == len(report.results)
    assert "The paper’s findings" in done.stdout
