"""A condition is fitted on prompts of two kinds, and measured on others."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.steering import message
from helpers.training import model_folder
from hypothesis import given
from hypothesis import strategies as st

import steer
from steer import SteerError
from steer.artifact import Artifact, from_vectors, read
from steer.cli import main
from steer.extract.condition import best_threshold, fit_condition, read_prompts
from steer.models import load_tokenizer
from steer.prompt import PromptSpec
from steer.tasks.prompts import formatter, prompt_ids

COSINES = st.lists(st.integers(-20, 20).map(lambda n: n / 20), min_size=1, max_size=8)


@given(COSINES, COSINES)
def test_the_best_threshold(positive: list[float], negative: list[float]) -> None:
    def score(threshold: float) -> float:
        hits = sum(value > threshold for value in positive)
        false = sum(value > threshold for value in negative)
        return 2 * hits / (len(positive) + hits + false)

    threshold, f1, gap = best_threshold(positive, negative)
    assert -1 <= threshold <= 1 and gap >= 0
    if min(*positive, *negative) > -1:
        assert score(threshold) == pytest.approx(f1)
    assert f1 == pytest.approx(max(score(n / 40) for n in range(-41, 41)))


def test_kinds_that_are_apart_have_the_threshold_between_them() -> None:
    assert best_threshold([0.5, 0.9], [0.1, 0.2]) == pytest.approx((0.35, 1.0, 0.3))


def prompts(count: int = 20) -> dict[str, list[str]]:
    """Sums of small numbers, and of large ones: another last token."""
    return {
        "positive": [f"{i}+{i % 7}=" for i in range(count)],
        "negative": [f"{i}+{i % 7}?" for i in range(count)],
    }


@pytest.fixture
def late(tiny_llama: Any) -> Artifact:
    return from_vectors({2: torch.ones(tiny_llama.config.hidden_size)}, tiny_llama)


def test_the_fit_is_what_the_vectors_do(tiny_llama: Any, tiny_tokenizer: Any, late: Artifact) -> None:
    given = prompts()
    fit = fit_condition(tiny_llama, tiny_tokenizer, late, given, str, held_out=0.25)
    assert fit.condition.layer in (0, 1) and fit.f1 == 1.0
    assert (fit.wrong.hits, fit.missed.hits, fit.wrong.count) == (0, 0, 5)
    again = fit_condition(tiny_llama, tiny_tokenizer, late, given, str, held_out=0.25, layers="1")
    assert again.condition.layer == 1
    made = late.with_condition(fit.condition, fit.probe, fit.told())
    vectors = steer.load(made, tiny_llama)
    for side, acts in (("positive", True), ("negative", False)):
        for ids in prompt_ids(tiny_tokenizer, given[side]):
            with torch.no_grad(), vectors.prompt_length(len(ids)):
                steered = tiny_llama(input_ids=torch.tensor([ids])).logits
                with vectors.disabled():
                    base = tiny_llama(input_ids=torch.tensor([ids])).logits
            assert torch.equal(steered, base) != acts
    told = made.config.provenance["derived"][-1]["condition"]
    assert told["held out"]["wrong activations"] == {"hits": 0, "count": 5}


def test_held_out_prompts_take_no_part(tiny_llama: Any, tiny_tokenizer: Any, late: Artifact) -> None:
    # Labels without a pattern: what is held out is wrong about half of the time, what is fitted is not.
    texts = [f"{a}{b}{c}=" for a in range(4) for b in range(5) for c in range(4)]
    order = torch.randperm(80, generator=torch.Generator().manual_seed(3)).tolist()
    given = {"positive": [texts[i] for i in order[:40]], "negative": [texts[i] for i in order[40:]]}
    fit = fit_condition(tiny_llama, tiny_tokenizer, late, given, str, held_out=0.5)
    assert fit.wrong.count == fit.missed.count == 20
    assert 0.2 < (fit.wrong.hits + fit.missed.hits) / 40 < 0.8


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layers": "2"}, "the first of which is 2, and layers=2 has none there"),
        ({"layers": "9"}, "layer 9 does not exist"),
        ({"held_out": 0.0}, "held_out=0.0 is not a share"),
        ({"held_out": float("nan")}, "held_out=nan is not a share"),
        ({"prompts": prompts(2)}, "there are 2 positive prompts, of which 1 are held out"),
        ({"prompts": {"positive": ["1+1="] * 4, "negative": ["1+1="] * 4}}, "have the same states"),
    ],
)
def test_what_cannot_be_fitted(
    tiny_llama: Any, tiny_tokenizer: Any, late: Artifact, changes: dict[str, Any], words: str
) -> None:
    given = changes.pop("prompts", prompts(6))
    with pytest.raises(SteerError, match=words) as error:
        fit_condition(tiny_llama, tiny_tokenizer, late, given, str, **changes)
    message(error)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ({"postive": "x"}, "unknown postive"),
        ({}, "no prompt"),
        ({"positive": ""}, "is not the text of a prompt"),
        ({"positive": 3}, "positive=3 is not the text"),
        ([1], r"unknown \[1\]"),
        ({"positive": "a"}, "positive='a' is in the file twice"),
    ],
)
def test_files_that_hold_something_else(tmp_path: Path, line: Any, words: str) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"positive": "a"}\n\n' + json.dumps(line))
    with pytest.raises(SteerError, match=f"line 3: .*{words}") as error:
        read_prompts(tmp_path / "prompts.jsonl")
    message(error)


def test_the_command(
    tiny_llama: Any, tiny_tokenizer: Any, late: Artifact, tmp_path: Path, capsys: Any
) -> None:
    folder = model_folder(tmp_path / "model", tiny_llama, tiny_tokenizer)
    late.save_pretrained(tmp_path / "late")
    lines = [json.dumps({"positive": a, "negative": b}) for a, b in zip(*prompts().values(), strict=True)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    asked = ["extract", "condition", str(tmp_path / "prompts.jsonl"), "--vectors", str(tmp_path / "late")]
    made = str(tmp_path / "made")
    assert main([*asked, "--model", str(folder), "--template", "plain", "--out", made]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^F1 +[01]\.\d{3} on the prompts", out, re.M)
    assert re.search(
        r"^wrong activations  \d/6 = [01]\.\d{3} \[.*\] of the negative prompts held out", out, re.M
    )
    assert read(made).config.condition is not None
    assert main(["info", made]) == 0
    assert "condition   cosine above" in capsys.readouterr().out
    words = ["generate", str(folder), "--vectors", made, "--prompt", "1", "--max-new-tokens", "2"]
    assert main([*words, "--template", "plain"]) == 0
    for command in (["lens", "logit", made, "--model", str(folder)], ["export", made, "--to", "npz"]):
        out_of = ["--out", str(tmp_path / "x.npz")] if command[0] == "export" else []
        assert main([*command, *out_of]) == 1
        assert "have a condition" in capsys.readouterr().err


MEDICAL = (
    "headaches, a sore throat, high blood pressure, a skin rash, chest pain, a broken toe, insomnia, asthma, "
    "a fever, back pain, an ear infection, diabetes, a migraine, anemia, a burn, heartburn, the flu, "
    "a sprained ankle, arthritis, food poisoning, bronchitis, a kidney stone, gout, eczema, vertigo, "
    "a stomach ulcer, tonsillitis, a swollen knee, hives, anxiety attacks, a low heart rate, constipation, "
    "a concussion, shingles, a urinary infection, thyroid problems, sciatica, a bee sting allergy, "
    "pneumonia, high cholesterol"
)
EVERYDAY = (
    "old bicycles, a vegetable garden, a rainy weekend, a birthday cake, wooden furniture, a leaking tap, "
    "chess openings, a camping trip, a slow computer, houseplants, a school play, watercolours, "
    "a long train ride, a book club, home-made bread, a noisy printer, a football match, an old piano, "
    "knitting, a small kitchen, a flat tyre, a garage sale, a picnic, crossword puzzles, a wedding speech, "
    "a messy desk, a fish tank, guitar practice, a road trip, a stamp collection, a broken zip, board games, "
    "a treehouse, a photo album, a cooking contest, old coins, a lost key, a paper boat, a snowy path, "
    "a squeaky door"
)
ASKED = (
    "What should I do about {}?",
    "Give me advice on {}.",
    "How do I deal with {}?",
    "Tell me something useful about {}.",
)


@pytest.mark.slow
@pytest.mark.real
def test_a_trained_model_tells_medical_questions_from_others_in_part(smollm2: Any) -> None:
    tokenizer = load_tokenizer("smollm2-135m-instruct")
    put = formatter(PromptSpec("boxed_short"), tokenizer)
    kinds = {"positive": MEDICAL.split(", "), "negative": EVERYDAY.split(", ")}
    # One question on each topic: those held out are on topics of their own.
    texts = {
        side: [ASKED[i % 4].format(name) for i, name in enumerate(names)] for side, names in kinds.items()
    }
    given = from_vectors({12: torch.ones(smollm2.config.hidden_size)}, smollm2)
    fits = [fit_condition(smollm2, tokenizer, given, texts, put, seed=seed) for seed in range(3)]
    found = [(fit.condition.layer, round(fit.f1, 2), fit.wrong.hits, fit.missed.hits) for fit in fits]
    assert found == [(7, 0.95, 2, 2), (4, 0.98, 4, 0), (8, 0.84, 7, 6)]  # docs/extract.md
    assert {count for fit in fits for count in (fit.wrong.count, fit.missed.count)} == {12}

    fit = fits[0]
    vectors = steer.load(given.with_condition(fit.condition, fit.probe, fit.told()), smollm2)
    acted = {}
    for side, names in (
        ("positive", ("a toothache", "a cough", "hay fever", "a nosebleed")),
        ("negative", ("a wet dog", "a broken umbrella", "old photographs", "a crossword")),
    ):
        rows = prompt_ids(tokenizer, [put(f"How do I deal with {name}?") for name in names])
        acted[side] = 0
        for ids in rows:
            with torch.no_grad(), vectors.prompt_length(len(ids)):
                steered = smollm2(input_ids=torch.tensor([ids])).logits
                with vectors.disabled():
                    base = smollm2(input_ids=torch.tensor([ids])).logits
            acted[side] += not torch.equal(steered, base)
    steer.detach(smollm2)
    assert acted == {"positive": 4, "negative": 2}
