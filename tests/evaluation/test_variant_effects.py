"""`steer eval --side-effects`: neutral text and broken answers beside the scores."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.evaluating import arguments, everything, make_base, make_run
from helpers.steering import fill
from transformers import AutoModelForCausalLM, AutoTokenizer

import steer
from steer import SteeringConfig
from steer.evaluation import compare, run, tables, variant_effects
from steer.evaluation.broken import loops
from steer.evaluation.collect import collect
from steer.evaluation.neutral_text import prose
from steer.evaluation.pack import pack
from steer.evaluation.store import read_settings


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("effects")


@pytest.fixture
def base(place: Path, build_tiny: Callable, tiny_tokenizer: Any) -> Path:
    if not (place / "sums.jsonl").exists():
        make_base(place, build_tiny, tiny_tokenizer)
    return place


@torch.no_grad()
def by_hand(base: Path) -> dict[str, tuple[float, float]]:
    """KL and perplexity of the base and its variants in float64, text by text."""
    from peft import PeftModel

    tokenizer = AutoTokenizer.from_pretrained(base / "model")
    model: Any = AutoModelForCausalLM.from_pretrained(base / "model").eval()
    context = model.config.max_position_embeddings
    texts = [torch.tensor([tokenizer(text)["input_ids"][:context]]) for text in prose()]

    def read(model: Any) -> list[torch.Tensor]:
        return [model(ids).logits[0, :-1].double().log_softmax(-1) for ids in texts]

    def told(found: list[torch.Tensor]) -> tuple[float, float]:
        kl = torch.cat([(f.exp() * (f - b)).sum(1) for f, b in zip(found, plain, strict=True)])
        loss = torch.cat([-f[range(len(f)), ids[0, 1:]] for f, ids in zip(found, texts, strict=True)])
        return kl.mean().item(), loss.mean().exp().item()

    plain = read(model)
    known = {"base": told(plain)}
    vectors = steer.load(base / "vectors", model)
    known["s"] = told(read(model))
    vectors.scale = -0.5
    known["s x-0.5"] = told(read(model))
    steer.detach(model)
    known["lora"] = told(read(PeftModel.from_pretrained(model, base / "lora").eval()))
    return known


def test_a_run_has_the_side_effects_of_each_variant(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    asked = everything(base, out, "--samples", "1")
    assert run.main(asked) == 0, "without them first: they can be added to a run"
    assert "side_effects" not in read_settings(out)
    assert run.main([*asked, "--side-effects"]) == 0
    found = read_settings(out)["side_effects"]
    known = by_hand(base)
    assert set(found) == set(known), "a forced opening leaves neutral text as it is"
    for name, (kl, perplexity) in known.items():
        assert found[name]["kl"] == pytest.approx(kl, rel=1e-4, abs=1e-7)
        assert found[name]["perplexity"] == pytest.approx(perplexity, rel=1e-4)
        assert found[name]["base_perplexity"] == pytest.approx(known["base"][1], rel=1e-4)
    assert found["s"]["kl"] > 1e-4 and found["lora"]["kl"] > 1e-4

    monkeypatch.setattr(variant_effects, "measure", lambda *args: pytest.fail("measured twice"))
    capsys.readouterr()
    assert run.main([*asked, "--side-effects"]) == 0
    header, _, *lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert "KL to the base" in header and "perplexity" in header and "broken" in header
    assert any(f"{found['s']['kl']:.4g}" in line for line in lines)
    assert run.main(asked) == 0 and read_settings(out)["side_effects"] == found, "they stay"

    pack(out, tmp_path / "packed.json")
    assert compare.main([str(tmp_path / "packed.json"), "--out", str(tmp_path / "page")]) == 0
    rows = json.loads((tmp_path / "page" / "scores.json").read_text())["rows"]
    shown = {row["method"]: row.get("side_effects") for row in rows}
    assert shown["s"]["kl"] == found["s"]["kl"] and shown["base + To"] is None
    assert "KL to the base" in (tmp_path / "page" / "index.html").read_text()


def test_vectors_of_completions_are_measured(base: Path, tmp_path: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(base / "model")
    fill(steer.attach(model, SteeringConfig(positions="completion"))).save(tmp_path / "v")
    out = tmp_path / "run"
    more = ("--vectors", f"c={tmp_path / 'v'}", "--limit", "1", "--samples", "0", "--examples", "0")
    assert run.main(arguments(base, out, *more, "--side-effects")) == 0
    assert read_settings(out)["side_effects"]["c"]["kl"] > 1e-4


@pytest.mark.parametrize(
    ("positions", "more", "expected"),
    [
        (None, [], "give --vectors or --adapter"),
        ("last_prompt", [], "positions=last_prompt"),
        ("all", ["--fine-tuned"], "a run of a fine-tune"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_the_model_is_loaded(
    base: Path,
    tmp_path: Path,
    positions: str | None,
    more: list[str],
    expected: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if positions:
        model: Any = AutoModelForCausalLM.from_pretrained(base / "model")
        fill(steer.attach(model, SteeringConfig(positions=positions))).save(tmp_path / "v")
        more = ["--vectors", str(tmp_path / "v"), *more]
    capsys.readouterr()
    assert run.main(arguments(base, tmp_path / "run", *more, "--side-effects")) == 1
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and error[0].startswith("error: ") and expected in error[0]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", False),
        (r"2 + 3 = 5, so the answer is \boxed{5}.", False),
        ("1" * 60, True),
        ("1" * 59, False),
        ("So we get 4. " + "Then we add one. " * 4, True),
        ("So we get 4. " + "Then we add one. " * 4 + "Then we", True),
        ("So we get 4. " + "Then we add one. " * 3, False),
        ("Then we add one. " * 4 + "That is all that there is to say.", False),
        ("a passage of its own, long enough to be a sentence, and then some more of it\n" * 4, True),
    ],
)
def test_a_loop_is_a_passage_that_an_answer_ends_in(text: str, expected: bool) -> None:
    assert loops(text) is expected


def test_an_answer_is_broken_for_any_of_three_reasons(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", {"base": [[True]] * 4, "v": [[True]] * 4})
    collection = collect([folder])
    assert "broken" not in compare.score(collection, "base")[0], "older runs have no record of loops"
    answers = [p[-1] for m in collection.methods for seed in m.rows.values() for p in seed["sums"].values()]
    for i, row in enumerate(answers):
        row |= {"loop": i == 0, "how": "no_answer" if i in (0, 1) else "exact", "truncated": i == 2}
    row = compare.score(collection, "base")[0]
    assert (row["loops"], row["broken"]) == (0.25, 0.75)
    assert tables.cells({"greedy": row})["broken"] == "75.0%"
