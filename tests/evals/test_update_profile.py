"""`evals.update_profile`: operations by kind, and a profile of a tiny model's update."""

from __future__ import annotations

import pytest

from evals import update_profile
from evals.update_profile import ATTENTION, COPIES, ELEMENTWISE, HEAD, LAYERS, OTHER, kind


@pytest.mark.parametrize(
    ("name", "shapes", "expected"),
    [
        ("mm", [[64, 32], [32, 128]], LAYERS),
        ("mm", [[64, 32], [32, 97]], HEAD),
        ("exp", [[64, 97]], HEAD),
        ("bmm", [[8, 16, 4], [8, 4, 16]], ATTENTION),
        ("_softmax", [[8, 16, 16]], ATTENTION),
        ("_scaled_dot_product_flash_attention_for_cpu_backward", [[1, 2, 3, 4]], ATTENTION),
        ("_to_copy", [[64, 32], [64, 32]], COPIES),
        ("copy_", [[64, 32], [64, 32]], COPIES),
        ("add_", [[64, 32], [64, 32]], ELEMENTWISE),
        ("silu_backward", [[64, 32]], ELEMENTWISE),
        ("view", [[64, 32]], OTHER),
        ("embedding", [[97, 32], [4, 16], [4, 16, 32]], OTHER),
    ],
)
def test_kinds(name: str, shapes: list, expected: str) -> None:
    assert kind(name, shapes, vocabulary=97) == expected


def test_the_parts_of_an_update_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    from evals.gpu_check.speed import SHAPES, prompts, random_model, words

    vocabulary = SHAPES["tiny"][-1]
    monkeypatch.setattr(update_profile, "load_tokenizer", lambda name: words(vocabulary))
    monkeypatch.setattr(
        update_profile, "load_model", lambda name, dtype: random_model("tiny", "steer", dtype)
    )
    monkeypatch.setattr(update_profile, "_prompts", lambda tokenizer, count: prompts(count, vocabulary))
    monkeypatch.setattr(update_profile, "peak", lambda dtype: 1e12)
    found = update_profile.profile("tiny", "float32", update_profile.Batch(2, 4, 5), 2)
    assert sum(found["kinds"].values()) == pytest.approx(1)
    assert all(found["kinds"][name] > 0 for name in (LAYERS, HEAD, ATTENTION, ELEMENTWISE))
    # the first half of each prompt is common to both
    assert (found["prompt tokens"], found["completion tokens"]) == (32 + 2 * 32, 2 * 4 * 5)
    assert found["share of peak"] == pytest.approx(sum(found["ideal share"].values()))
    assert found["GFLOP"] * 1e9 / found["cpu seconds"] / 1e12 == pytest.approx(found["share of peak"])
    assert "| LM head and loss |" in update_profile.markdown(found)
