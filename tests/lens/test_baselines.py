"""Directions from activations with a tuned length, against plain runs of the model."""

from __future__ import annotations

import json

import pytest
import torch
from helpers.lens import Even, subject_of, texts
from helpers.paths import ROOT
from helpers.steering import fill, message
from torch.nn.functional import normalize

from steer import SteerError
from steer.lens.baselines import Baselines, tuned_baselines
from steer.lens.composition import likelihoods
from steer.lens.conditions import BASE, steered
from steer.lens.controls import values
from steer.lens.sampling import graded
from steer.lens.sections.baselines import TunedBaselines
from steer.lens.study import Study
from steer.lens.subject import Row, Subject

LENGTHS = (0.5, 1.0, 2.0, 4.0)
SHAPES = [(4 + n % 3, 3) for n in range(12)]
RIGHT = [n % 6 != 0 for n in range(12)]


def measured(subject: Subject, **options: object) -> tuple[Baselines, list[Row], list[Row]]:
    base, answers = texts(SHAPES, seed=1), texts(SHAPES, seed=2)
    settings = {"lengths": LENGTHS, "draws": 2, **options}
    return tuned_baselines(subject, base, answers, RIGHT, **settings), base, answers  # type: ignore[arg-type]


@torch.no_grad()
def plain_gain(subject: Subject, rows: list[Row], vectors: dict[int, torch.Tensor]) -> float:
    """Log-probability with vectors in some layers less that of the base model: a row at a time."""
    before = subject.vectors.effective()
    tensors = {n: vectors.get(n, torch.zeros_like(one)) for n, one in before.items()}
    named = dict(zip(subject.vectors.tensors(), tensors.values(), strict=True))

    def score() -> float:
        total = 0.0
        for row in rows:
            logits = subject.model(torch.tensor([row.ids]), use_cache=False).logits[0].double()
            logs = logits.log_softmax(-1)[row.prompt - 1 : len(row.ids) - 1]
            total += logs.gather(-1, torch.tensor(row.completion)[:, None]).sum().item()
        return total / sum(len(row.completion) for row in rows)

    with values(subject.vectors, named):
        on = score()
    with subject.vectors.disabled():
        return on - score()


def test_gains_and_lengths_are_those_of_plain_runs(tiny_llama, tiny_tokenizer) -> None:
    subject = subject_of(tiny_llama, tiny_tokenizer, layers="0-2")
    found, base, answers = measured(subject, layers=[0, 1], seed=3)
    assert found.names == ["layer 0", "layer 1", "these together"]
    choose, rest = ([answers[n] for n in range(12) if n % 4 == part and RIGHT[n]] for part in (1, 3))
    fit = range(0, 12, 2)
    assert found.texts == {"fit": 6, "choose": 3, "measure": len(rest)}
    own = subject.vectors.effective()
    states: dict[int, list[torch.Tensor]] = {}
    with subject.vectors.disabled(), torch.no_grad():
        for layer in (0, 1):
            means = []
            for rows in (answers, base):
                hidden = [
                    tiny_llama(torch.tensor([rows[n].ids]), output_hidden_states=True).hidden_states
                    for n in fit
                ]
                parts = [h[layer + 1][0, rows[n].prompt :] for h, n in zip(hidden, fit, strict=True)]
                means.append(torch.cat(parts).double().mean(0))
            states[layer] = means
    mean = {layer: normalize(one - other, dim=0).float() for layer, (one, other) in states.items()}
    for index, layers in enumerate(([0], [1], [0, 1])):

        def vectors(length: float, layers: list[int] = layers) -> dict[int, torch.Tensor]:
            return {n: mean[n] * own[n].norm() * length for n in layers}

        gains = [plain_gain(subject, choose, vectors(length)) for length in LENGTHS]
        best = max(gains)
        length = LENGTHS[gains.index(best)] if best > 0 else 0.0
        assert found.length["mean difference"][index] == length
        expected = plain_gain(subject, rest, vectors(length)) if length else 0.0
        assert found.gain["mean difference"][index].item() == pytest.approx(expected, abs=1e-4)
        plain = plain_gain(subject, rest, vectors(1.0))
        assert found.untuned["mean difference"][index].item() == pytest.approx(plain, abs=1e-4)
        trained = plain_gain(subject, rest, {n: own[n] for n in layers})
        assert found.trained[index].item() == pytest.approx(trained, abs=1e-4)
    assert found.random.shape == (2, 3)
    assert (found.random[0] != found.random[1]).any()


def test_a_negative_scale_turns_no_direction_round(tiny_llama, tiny_tokenizer) -> None:
    """Negated vectors at scale -1 are the same vectors, and so are the lengths and gains beside them."""
    subject = subject_of(tiny_llama, tiny_tokenizer, layers="0-1")
    found, *_ = measured(subject)
    subject.vectors.set_tensors({name: -one for name, one in subject.vectors.tensors().items()})
    subject.vectors.scale = -1.0
    again, *_ = measured(subject)
    for name in ("trained", "random"):
        torch.testing.assert_close(getattr(again, name), getattr(found, name))
    for name in ("gain", "untuned", "length"):
        for method, values_ in getattr(found, name).items():
            torch.testing.assert_close(getattr(again, name)[method], values_)


def test_a_mean_difference_with_a_useful_length_gains(build_tiny, tiny_tokenizer) -> None:
    """Answers of one token against those of another: what raises that token is found, and its length."""
    model = build_tiny("llama", tie_word_embeddings=True)
    subject = subject_of(model, tiny_tokenizer, layers=2, std=0.001)
    questions = [row.question.ids for row in texts(SHAPES, seed=1)]
    base, answers = ([Row((*ids, *[token] * 4), len(ids)) for ids in questions] for token in (5, 6))
    found = tuned_baselines(subject, base, answers, [True] * 12, lengths=(1.0, 10.0), draws=3)
    for method in found.gain:
        assert found.length[method][0] == 10
        assert found.gain[method][0] > 3 * found.untuned[method][0].abs()
        assert found.gain[method][0] > found.random.max()
    assert [*found.lines()][-1].endswith("10x, is chosen at layer 2, these together")
    assert found.to_dict()["length"]["linear SVM"][0] == 10


def test_the_report_reads_every_right_answer_of_the_steered_model(tiny_llama, tiny_tokenizer) -> None:
    """Also where too few problems are solved for the report's own likelihoods."""
    subject = subject_of(tiny_llama, tiny_tokenizer, layers="0-1", std=1.0)
    problems = [{"problem": f"{n} * {n + 3}?", "answer": "7"} for n in range(12)]
    study = Study(subject, problems, Even())  # type: ignore[arg-type]
    study.answer()
    assert not study.right
    TunedBaselines().measure(study)
    right = graded(subject, study.rows, problems, Even()).tolist()  # type: ignore[arg-type]
    found = study.report.results["tuned baselines"]
    assert isinstance(found, Baselines)
    assert found.texts == {"fit": 6, "choose": sum(right[1::4]), "measure": sum(right[3::4])}


def test_the_subject_is_as_it_was(tiny_llama, tiny_tokenizer) -> None:
    subject = subject_of(tiny_llama, tiny_tokenizer, layers="0-1")
    before = likelihoods(subject, texts(), [BASE, steered(subject)])
    measured(subject)
    torch.testing.assert_close(likelihoods(subject, texts(), [BASE, steered(subject)]), before)


def test_mistakes(tiny_llama, tiny_tokenizer) -> None:
    subject = subject_of(tiny_llama, tiny_tokenizer, layers="0-1")
    rows = texts(SHAPES)
    for arguments, options, expected in (
        ((rows, rows, RIGHT), {}, "are the same"),
        ((rows, texts(SHAPES, seed=2), [False] * 12), {}, "0 of 12 steered answers are right"),
        ((rows, texts(SHAPES, seed=2), RIGHT), {"lengths": (0.0,)}, "numbers above 0"),
        ((rows, texts(SHAPES, seed=2), RIGHT), {"layers": [2]}, "[2] have no vector"),
    ):
        with pytest.raises(SteerError) as error:
            tuned_baselines(subject, *arguments, **options)  # type: ignore[arg-type]
        assert expected in message(error)
    fill(subject.vectors, std=0)
    with pytest.raises(SteerError, match="are zero"):
        measured(subject)


def test_other_kinds_are_refused(tiny_llama, tiny_tokenizer) -> None:
    subject = subject_of(tiny_llama, tiny_tokenizer, kind="shared", rank=2, layers="0-1")
    with pytest.raises(SteerError, match="need constant vectors, these are shared"):
        measured(subject)


def test_the_page_quotes_the_committed_result() -> None:
    found = json.loads((ROOT / "evals/results/lens/baselines.json").read_text())
    page = (ROOT / "docs/lens.md").read_text().splitlines()
    names = [*(f"layer {layer}" for layer in found["layers"]), "these two together"]
    for n, name in enumerate(names):
        values = [f"{found['trained'][n]:.3f}"]
        for method in found["gain"]:
            assert found["length"][method][n] == found["gain"][method][n] == 0
            values += ["0", f"{found['untuned'][method][n]:.3f}"]
        assert f"| {name} | {' | '.join(values)} |" in page
    assert f"{found['texts']['measure']} answers measure" in " ".join(page)
