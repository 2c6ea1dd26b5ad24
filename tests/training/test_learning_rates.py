"""Learning rates by layer: the text they are given in, and the optimizer that has them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.training import config

from steer import SteerError


def rates(**settings: Any) -> list[float]:
    table = config(Path("unused"), learning_rate=0.5, **settings).layer_rates(
        [0, 1, 2, 5], num_hidden_layers=6
    )
    return list(table.values())


def test_lr_by_layer() -> None:
    assert rates() == [0.5] * 4
    assert rates(lr_by_layer="1:0.1") == [0.5, 0.1, 0.5, 0.5]
    # one table serves runs of single layers: layers of the model without a vector may be named
    assert rates(lr_by_layer="1-4:0.1") == [0.5, 0.1, 0.1, 0.5]
    assert rates(lr_by_layer=" 0:3e-3, 1-2:7E-2 ") == [3e-3, 7e-2, 7e-2, 0.5]
    assert rates(lr_by_layer="geometric:1e-3:8e-3") == pytest.approx([1e-3, 2e-3, 4e-3, 8e-3])
    assert config(Path("unused"), lr_by_layer="geometric:0.1:0.9").layer_rates([4], num_hidden_layers=6) == {
        4: 0.1
    }


@pytest.mark.parametrize(
    "text", ["", "1", "0.1", "1:", "a:0.1", "1:0.1;2:0.2", "2-:0.1", "geometric:1", "1:nan", "1:."]
)
def test_lr_by_layer_that_cannot_be_read_is_refused(text: str) -> None:
    with pytest.raises(SteerError, match="lr_by_layer"):
        rates(lr_by_layer=text)


@pytest.mark.parametrize("text", ["6:0.1", "0-9:0.1", "60-70:0.2"])
def test_lr_by_layer_of_a_layer_the_model_lacks_is_refused(text: str) -> None:
    with pytest.raises(SteerError, match="layers 0 to 5"):
        rates(lr_by_layer=text)


@pytest.mark.parametrize("text", ["5-0:0.1", "geometric:0:0.1", "geometric:0.1:0"])
def test_lr_by_layer_without_meaning_is_refused(text: str) -> None:
    with pytest.raises(SteerError, match="lr_by_layer"):
        rates(lr_by_layer=text)


@pytest.mark.parametrize(
    ("schedule", "floor"),
    [("cosine_with_min_lr", "min_lr"), ("cosine_warmup_with_min_lr", "min_lr"), ("polynomial", "lr_end")],
)
def test_a_floor_of_one_rate_beside_rates_by_layer_is_refused(schedule: str, floor: str) -> None:
    given: dict[str, Any] = {"lr_scheduler_type": schedule, "lr_scheduler_kwargs": {floor: 1e-4}}
    with pytest.raises(SteerError, match=f"lr_scheduler_kwargs has {floor}.*give min_lr_rate"):
        config(Path("unused"), lr_by_layer="1:0.1", **given)
    config(Path("unused"), **given)
    share = {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}}
    config(Path("unused"), lr_by_layer="1:0.1", **share)


def test_the_optimizer_has_those_rates(run) -> None:
    trainer = run(
        lr_by_layer="0:0,2:0.3", learning_rate=0.1, lr_scheduler_type="constant", optim="adamw_torch"
    )
    groups = trainer.optimizer.param_groups
    assert [group["lr"] for group in groups] == [0.0, 0.1, 0.3]
    assert [group["params"][0] for group in groups] == trainer.vectors.parameters()
    assert all(group["weight_decay"] == trainer.args.weight_decay for group in groups)
    norms = trainer.vectors.norms()
    assert norms[0] == 0 and norms[1] > 0
    # Adam's first two steps are about as long as their rates
    assert norms[2] == pytest.approx(3 * norms[1], rel=0.5)
