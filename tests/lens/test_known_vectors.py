"""
Every rule on vectors whose effect is known, in models whose weights are set so that it is.

Attention writes nothing in them, and the MLPs nothing but where a test sets them, so the stream is the
token's embedding. The first dimension tells the end of a prompt, the second a generated token: there the
model chooses evenly among eight tokens each time, `FIRST` and `LATER`.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.lens import Even
from torch import nn

import steer
from steer.config import SteeringConfig
from steer.lens.controls import random_vectors
from steer.lens.findings import NOT_SEEN, NOT_SPECIFIC, RULES, SEEN, UNTESTABLE, Finding, judge
from steer.lens.sampling import complete
from steer.lens.sections.composition import compare_pairs
from steer.lens.sections.last_layers import compare_penultimate
from steer.lens.sections.layers import single_layers
from steer.lens.sections.persistence import random_diff_diff
from steer.lens.sections.prefix import Prefix
from steer.lens.sections.token_shift import compare_last
from steer.lens.study import Study
from steer.lens.subject import Row, Subject
from steer.prompt import PromptSpec

END, FIRST, LATER = 10, range(20, 28), range(30, 38)  # token ids
AXES = {token: 2 + n for n, token in enumerate((*FIRST, *LATER))}  # each one's own dimension
PROBLEMS = [{"problem": f"{n}?", "answer": "1"} for n in range(24)]
LAST_TOKEN, LENS, FORCED, PENULTIMATE, SINGLE, PAIRS, PERSISTS, DIFFERENT = 4, 5, 6, 7, 1, 9, 2, 3


@pytest.fixture
def model(build_tiny) -> Any:
    """Two tokens in turn: after `END` one of `FIRST`, after those and each other one of `LATER`."""
    built = build_tiny("llama", num_hidden_layers=4)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in built.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        embedding = built.model.embed_tokens.weight
        embedding.zero_()
        embedding[:, 1] = 1
        embedding[END] = torch.eye(len(embedding[0]))[0]
        # All other tokens are large in dimensions of their own, so that a random vector moves them too.
        head = torch.randn(embedding.shape, generator=generator) * 2
        head[:, :18] = 0
        for token, axis in AXES.items():
            head[token] = 0
            head[token, 0 if token in FIRST else 1] = 8
            head[token, axis] = 1
        built.lm_head = nn.Linear(*reversed(head.shape), bias=False)
        built.lm_head.weight.copy_(head)
    return built


def study_of(model: Any, tokenizer: Any, values: dict[int, torch.Tensor], seed: int = 0) -> Study:
    """The study of these vectors, on texts that nobody wrote: prompts that end in `END`, and three tokens."""
    vectors = steer.attach(model, SteeringConfig(layers=",".join(map(str, values))))
    with torch.no_grad():
        for parameter, value in zip(vectors.parameters(), values.values(), strict=True):
            parameter.copy_(value)
    study = Study(
        Subject(vectors, tokenizer, PromptSpec("plain"), max_new_tokens=4, batch_size=4096),
        PROBLEMS,
        Even(),  # type: ignore[arg-type]
        seed=seed,
    )
    generator = torch.Generator().manual_seed(seed)
    for _ in range(24):
        picked = torch.randint(0, 8, (3,), generator=generator).tolist()
        completion = (FIRST[picked[0]], LATER[picked[1]], LATER[picked[2]])
        study.rows.append(Row((5, 6, END, *completion), 3))
    study.right = study.rows
    return study


def finding(study: Study, number: int) -> Finding:
    found = judge(study.report.numbers, study.report.nulls, study.report.missing)[number]
    assert found.claim == RULES[number].claim
    return found


def unit(axis: int, length: float = 1.0) -> torch.Tensor:
    return torch.eye(32)[axis] * length


def random(length: float, seed: int) -> torch.Tensor:
    drawn = torch.randn(32, generator=torch.Generator().manual_seed(1000 + seed))
    return drawn / drawn.norm() * length


def test_a_vector_that_only_shifts_the_first_token(model, tiny_tokenizer) -> None:
    """Along one token's dimension: it is unlikely later, so it does not become likely enough to matter."""
    study = study_of(model, tiny_tokenizer, {3: unit(AXES[FIRST[0]])})
    compare_last(study, study.rows)
    for number in (LAST_TOKEN, LENS):
        found = finding(study, number)
        assert found.verdict == SEEN, found.why
        assert all(null["rank"] == 1 and null["draws"] == 20 for null in found.null.values())
    assert study.report.numbers["last_first_share"] > 0.9
    assert study.report.numbers["last_lens_rank"] == 0


def test_a_negated_vector_is_read_as_it_acts(model, tiny_tokenizer) -> None:
    study = study_of(model, tiny_tokenizer, {3: -unit(AXES[FIRST[0]])})
    study.subject.vectors.scale = -1.0
    compare_last(study, study.rows)
    assert study.report.numbers["last_lens_rank"] == 0


def test_a_vector_that_shifts_every_token_is_not_seen_on_the_first(model, tiny_tokenizer) -> None:
    study = study_of(model, tiny_tokenizer, {3: unit(AXES[LATER[0]])})
    compare_last(study, study.rows)
    assert finding(study, LAST_TOKEN).verdict == NOT_SEEN


def test_an_effect_that_the_position_gives_to_any_vector_is_not_specific(model, tiny_tokenizer) -> None:
    """Vectors at the prompt's last token alone all act on the first generated one, random ones too."""
    study = study_of(model, tiny_tokenizer, {3: unit(AXES[FIRST[0]])})
    steer.detach(model)
    vectors = steer.attach(model, SteeringConfig(layers="3", positions="last_prompt"))
    vectors.set_tensors(dict.fromkeys(vectors.tensors(), unit(AXES[FIRST[0]])))
    study.subject.vectors = vectors
    compare_last(study, study.rows)
    assert study.report.numbers["last_first_share"] == 1
    assert finding(study, LAST_TOKEN).verdict == NOT_SPECIFIC


def reading_mlp(model: Any, layer: int, axis: int, token: int) -> None:
    """Let the MLP of `layer` read one dimension and write another, which raises `token`."""
    mlp = model.model.layers[layer].mlp
    with torch.no_grad():
        for weight in (mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight):
            weight.zero_()
        mlp.gate_proj.weight[0, axis] = mlp.up_proj.weight[0, axis] = 1
        mlp.down_proj.weight[AXES[token], 0] = 4
        model.lm_head.weight[:, axis] = 0  # the unembedding does not see it


def test_a_vector_that_acts_through_the_last_mlp_alone(model, tiny_tokenizer) -> None:
    reading_mlp(model, 3, 20, FIRST[0])
    study = study_of(model, tiny_tokenizer, {2: unit(20, 0.5)})
    study.note(penultimate_without_attention=1.0)
    compare_penultimate(study, study.rows)
    found = finding(study, PENULTIMATE)
    assert found.verdict == SEEN, found.why
    assert study.report.numbers["penultimate_without_mlp"] == pytest.approx(0, abs=0.1)


def test_a_vector_that_goes_past_the_last_mlp(model, tiny_tokenizer) -> None:
    reading_mlp(model, 3, 20, FIRST[0])
    study = study_of(model, tiny_tokenizer, {2: unit(AXES[FIRST[1]], 0.5)})
    study.note(penultimate_without_attention=1.0)
    compare_penultimate(study, study.rows)
    assert study.report.numbers["penultimate_without_mlp"] == pytest.approx(1, abs=0.1)
    assert finding(study, PENULTIMATE).verdict == NOT_SEEN


def right_study(model: Any, tokenizer: Any, values: dict[int, torch.Tensor], seed: int = 0) -> Study:
    """Right answers all begin with the first of `FIRST`."""
    study = study_of(model, tokenizer, values, seed)
    study.right = [Row((5, 6, END, FIRST[0], *row.completion[1:]), 3) for row in study.rows]
    return study


def gains(study: Study) -> None:
    """What the sections on single layers and pairs measure; every accuracy as if it had risen."""
    assert single_layers(study, [0, 1, 2, 3]).random.shape == (20, 4)
    joint = max(scores[0].item() for scores in study.alone.values()) + 1
    compare_pairs(study, [0, 1, 3], joint)
    study.note(layers_that_solve=1.0, pair_accuracy=0.1)
    study.note(diff_vector=0.0)


def test_layers_that_help_alone_and_in_pairs(model, tiny_tokenizer) -> None:
    study = right_study(model, tiny_tokenizer, {layer: unit(AXES[FIRST[0]], 0.5) for layer in range(4)})
    gains(study)
    for number in (SINGLE, DIFFERENT, PAIRS):
        found = finding(study, number)
        assert found.verdict == SEEN, found.why


def test_layers_that_do_not_help(model, tiny_tokenizer) -> None:
    study = right_study(model, tiny_tokenizer, {layer: unit(AXES[FIRST[1]], 0.5) for layer in range(4)})
    gains(study)
    assert [finding(study, n).verdict for n in (SINGLE, DIFFERENT, PAIRS)] == [
        NOT_SEEN,
        NOT_SPECIFIC,
        NOT_SEEN,
    ]


def test_persistence_of_any_vector_is_not_specific_where_nothing_turns_it(model, tiny_tokenizer) -> None:
    study = study_of(model, tiny_tokenizer, {layer: random(0.5, layer) for layer in range(4)})
    above = torch.arange(4)[None, :] > torch.tensor([0, 2])[:, None]
    drawn = random_diff_diff(study, study.rows, [0, 2], above)
    assert drawn == pytest.approx([1.0] * 20, abs=1e-4)
    study.compare("diff_diff", 1.0, [1.0] * 20)
    assert finding(study, PERSISTS).verdict == NOT_SPECIFIC


def test_what_is_forced_is_the_token_itself(model, tiny_tokenizer, monkeypatch) -> None:
    """A part of a character has a name that the tokenizer reads as other tokens."""
    study = right_study(model, tiny_tokenizer, {3: unit(AXES[FIRST[0]])})
    study.base = study.rows
    study.report.accuracy = {"base": (0.1, 0.0, 1.0), "steered": (0.9, 0.0, 1.0)}
    study.report.results["token shift"] = SimpleNamespace(top=[("<0xE2>", 60, 0.5)])  # type: ignore[assignment]
    asked: list[Row] = []

    def record(subject: Subject, rows: list[Row], *more: Any, **options: Any) -> list[list[Row]]:
        asked.extend(rows)
        return complete(subject, rows, *more, **options)

    monkeypatch.setattr("steer.lens.token_shift.complete", record)
    Prefix().measure(study)
    assert {row.completion for row in asked[:24]} == {(60,)}


def test_a_forced_token_that_is_the_usual_one_is_not_specific(model, tiny_tokenizer) -> None:
    study = right_study(model, tiny_tokenizer, {3: unit(AXES[FIRST[0]])})
    study.base = study.rows = study.right
    study.report.accuracy = {"base": (0.1, 0.0, 1.0), "steered": (0.15, 0.0, 1.0)}
    study.report.results["token shift"] = SimpleNamespace(top=[("", FIRST[0], 0.5)])  # type: ignore[assignment]
    Prefix().measure(study)
    numbers = study.report.numbers
    assert numbers["forced_share"] == numbers["usual_opening_share"] is not None
    assert finding(study, FORCED).verdict in (NOT_SEEN, NOT_SPECIFIC)


@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, 6))])
def test_a_random_vector_is_never_seen(model, tiny_tokenizer, seed) -> None:
    reading_mlp(model, 3, 20, FIRST[0])
    values = {layer: random(0.5, 10 * seed + layer) for layer in range(4)}
    study = right_study(model, tiny_tokenizer, values, seed)
    compare_last(study, study.rows)
    study.note(penultimate_without_attention=1.0)
    compare_penultimate(study, study.rows)
    gains(study)
    verdicts = [finding(study, n).verdict for n in (LAST_TOKEN, LENS, PENULTIMATE, SINGLE, DIFFERENT, PAIRS)]
    assert SEEN not in verdicts and UNTESTABLE not in verdicts


def test_texts_are_no_likelier_with_the_vectors_than_with_any_that_might_have_written_them(
    model, tiny_tokenizer
) -> None:
    """Right answers of the vectors alone would make random vectors look as if they helped."""
    values = {layer: random(0.5, layer) for layer in range(4)}
    study = study_of(model, tiny_tokenizer, values)
    study.problems = [{"problem": f"{n}?", "answer": "1"} for n in range(40)]
    study.answer()
    assert len(study.right) == 24
    draws = [random_vectors(study.subject.vectors, seed) for seed in range(20)]
    assert all(torch.equal(a[n], b[n]) for a, b in zip(study.draws, draws, strict=True) for n in a)
    assert finding(study, 0).verdict != SEEN
    assert study.report.nulls["vectors_accuracy"].enough and study.report.nulls["likelihood_gain"].enough
