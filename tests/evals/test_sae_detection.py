"""The detection score: judges for which the answer is known, and the command on a tiny model."""

from __future__ import annotations

import json
import re

import pytest
import torch
from helpers.steering import message

from evals import sae_detection
from evals.sae_detection import Snippets
from steer.errors import SteerError
from steer.sae import SAE, SAEConfig, save_sae


def made(count: int = 60) -> Snippets:
    """Feature 0 fires on the word "cat", in every second text; feature 1 nowhere."""
    texts = [[" a", " cat" if row % 2 else " dog", f" {row}"] for row in range(count)]
    peaks = torch.zeros(count, 2)
    peaks[1::2, 0] = torch.linspace(1, 2, count // 2)
    return Snippets(texts, peaks, torch.ones(count, 2, dtype=torch.int16))


def reader_of_examples(prompts: list[str]) -> list[float]:
    """Answers what most examples with the same animal as the question say."""
    scores = []
    for prompt in prompts:
        *examples, question = re.findall(r"Text: a (?:<<)?(\w+)(?:>>)? \d+\nHas it:( yes| no)?", prompt)
        said = [1 if answer == " yes" else -1 for animal, answer in examples if animal == question[0]]
        assert len(said) == 4 and question[1] == ""
        scores.append(float(sum(said)))
    return scores


def test_a_judge_that_uses_the_examples_is_right_and_learns_nothing_from_shuffled_ones():
    found = sae_detection.detect(made(), 0, reader_of_examples, shown=4, asked=6, seed=0)
    assert (found.accuracy, found.auc) == (1.0, 1.0)
    assert (found.shuffled_accuracy, found.shuffled_auc) == (0.5, 0.5)
    assert found.asked == 12


def test_which_labels_are_exchanged_is_drawn_at_random():
    """The strongest example keeps its label for some seeds alone, and half of each kind are exchanged."""
    kept = set()
    for seed in range(8):
        asked: list[str] = []
        sae_detection.detect(made(), 0, lambda p, asked=asked: asked.extend(p) or [0.0] * len(p), 4, 6, seed)
        told = re.findall(r"Text: a (.*) (\d+)\nHas it: (yes|no)", asked[-1])
        for fires in (True, False):
            assert (
                sorted(answer for word, _, answer in told if ("<<" in word) == fires)
                == ["no"] * 2 + ["yes"] * 2
            )
        kept |= {answer for _, number, answer in told if number == "59"}
    assert kept == {"yes", "no"}


def test_a_judge_that_always_says_yes_is_at_chance():
    found = sae_detection.detect(made(), 0, lambda prompts: [3.0] * len(prompts), shown=4, asked=6, seed=0)
    assert (found.accuracy, found.auc, found.shuffled_accuracy) == (0.5, 0.5, 0.5)


def test_questions_are_no_examples_and_are_not_marked():
    asked: list[str] = []
    sae_detection.detect(made(), 0, lambda prompts: asked.extend(prompts) or [0.0] * len(prompts), 4, 6, 0)
    for prompt in asked:
        *examples, question = prompt.split("Text: ")[1:]
        text = question.removesuffix("\nHas it:")
        assert "<<" not in text and not any(text in example for example in examples)
        assert sum("<<" in example for example in examples) == 4


def test_auc_is_the_share_of_pairs_in_order():
    assert sae_detection.auc([3.0, 1.0, 2.0, 1.0], [True, True, False, False]) == (1 + 1 + 0 + 0.5) / 4


def test_only_features_with_enough_texts_are_drawn():
    assert sae_detection.choose(made(), 1, 4, 6, 0) == [0]
    with pytest.raises(SteerError) as error:
        sae_detection.choose(made(), 2, 4, 6, 0)
    assert "1 features fire on 10 texts" in message(error)


def test_the_command_measures_each_sae_once(build_tiny, tiny_tokenizer, tmp_path, capsys, monkeypatch):
    model = tmp_path / "model"
    build_tiny("llama").save_pretrained(model)
    tiny_tokenizer.save_pretrained(model)
    rows = [{"text": f"What is {a} + {b}? It is {a + b}."} for a in range(8) for b in range(6)]
    (tmp_path / "texts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name, k in (("one", 2), ("two", 4)):
        config = SAEConfig(32, 64, k, source={"model": str(model), "layer": 1, "site": "resid_post"})
        save_sae(SAE(config), tmp_path / name)
    words = [str(tmp_path / "one"), "--texts", str(tmp_path / "texts.jsonl"), "--judge", str(model)]
    words += ["--features", "2", "--shown", "2", "--asked", "2", "--snippets", "30", "--out", str(tmp_path)]
    words += ["--dtype", "float32"]
    with pytest.raises(SteerError) as error:  # the tiny tokenizer's tokens are letters
        sae_detection.main(words)
    assert "with the same token" in message(error)
    monkeypatch.setattr(sae_detection, "ANSWERS", ("y", "n"))
    sae_detection.main(words)
    sae_detection.main([str(tmp_path / "two"), *words])
    found = json.loads((tmp_path / "detection.json").read_text())["saes"]
    assert [len(part["features"]) for part in found.values()] == [2, 2]
    assert all(
        0 <= row["auc"] <= 1 and row["asked"] == 4 for part in found.values() for row in part["features"]
    )
    assert "| 4 | 2 | " in capsys.readouterr().out
    for name, place in (("layer", {"layer": 2}), ("site", {"site": "mlp_out"}), ("model", {"model": "it"})):
        source = {"model": str(model), "layer": 1, "site": "resid_post", **place}
        save_sae(SAE(SAEConfig(32, 64, 2, source=source)), tmp_path / f"other-{name}")
        with pytest.raises(SteerError, match=f"is of {name} .*, the other SAEs of .*another --out"):
            sae_detection.main([str(tmp_path / f"other-{name}"), *words])
    monkeypatch.setattr(sae_detection, "load_model", None)  # nothing is left to do
    found = json.loads((tmp_path / "detection.json").read_text())
    del found["place"]  # as older versions wrote it
    (tmp_path / "detection.json").write_text(json.dumps(found))
    with pytest.raises(SteerError, match=r"does not say of which model and layer .* another --out for"):
        sae_detection.main([str(tmp_path / "other-layer"), *words])
    sae_detection.main(words)
    with pytest.raises(SteerError) as error:
        sae_detection.main([*words, "--shown", "3"])
    assert "--shown 3 is not an even number" in message(error)
    with pytest.raises(SteerError) as error:
        sae_detection.main([*words, "--seed", "3"])
    assert "results of other settings" in message(error)
