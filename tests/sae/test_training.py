"""Training SAEs: the schedule, what is learned, resuming, several at once, and streams that go wrong."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers.steering import message

from steer.errors import SteerError
from steer.sae import SAE, SAEConfig
from steer.sae.trainer import SAETrainer, TrainConfig

WIDTH, FEATURES = 16, 24


class Made:
    """Activations that are sparse sums of known unit directions, around a mean that is not zero."""

    def __init__(self, count: int = 10**9, scale: float = 3.0, bad: int | None = None):
        self.width, self.count, self.scale, self.bad = WIDTH, count, scale, bad
        generator = torch.Generator().manual_seed(0)
        self.directions = torch.nn.functional.normalize(
            torch.randn(FEATURES, WIDTH, generator=generator), dim=1
        )
        self.mean = torch.randn(WIDTH, generator=generator)

    def describe(self) -> dict[str, Any]:
        return {"model": "made", "layer": 0}

    def batches(self, size: int, start: int = 0) -> Iterator[torch.Tensor]:
        for step in range(start, self.count):
            generator = torch.Generator().manual_seed(step)
            keep = torch.rand(size, FEATURES, generator=generator) < 2 / FEATURES
            strengths = keep * (0.5 + torch.rand(size, FEATURES, generator=generator))
            x = self.scale * (strengths @ self.directions + self.mean)
            if step == self.bad:
                x[3, 4] = float("inf")
            yield x


def sae(**changes: Any) -> SAEConfig:
    return SAEConfig(**{"d_in": WIDTH, "d_sae": 32, "k": 3, **changes})


def training(**changes: Any) -> TrainConfig:
    return TrainConfig(
        **{"tokens": 256 * 60, "batch_size": 256, "lr": 1e-2, "log_every": 20, "dead_after": 2000, **changes}
    )


def explained(model: SAE, x: torch.Tensor) -> float:
    with torch.no_grad():
        return (1 - (x - model(x)).square().sum() / (x - x.mean(0)).square().sum()).item()


VARIANTS = {
    "topk": {},
    "free": {"bias": "free"},
    "batchtopk": {"activation": "batchtopk"},
    "jumprelu": {"activation": "jumprelu"},
    "kron": {"encoder": "kron", "m": 2, "n": 2},
    "hierarchical": {"loss": "hierarchical"},
    "hierarchical_kron": {"loss": "hierarchical", "encoder": "kron", "m": 2, "n": 2},
    "prefixes": {"loss": "hierarchical", "prefixes": [1, 3]},
}


def test_every_variant_learns_on_one_stream():
    """One stream, eight SAEs; each explains most of what an untrained one does not."""
    stream = Made()
    lines: list[dict[str, Any]] = []
    configs = {name: sae(**changes) for name, changes in VARIANTS.items()}
    trained = SAETrainer(configs, stream, training(tokens=256 * 100), on_log=lines.append).train()
    x = next(stream.batches(2000, start=10**6))
    for name, model in trained.items():
        assert explained(model, x) > 0.7, (name, explained(model, x))
        torch.testing.assert_close(model.W_dec.norm(dim=1), torch.ones(32))
        l0 = (model.encode(x) > 0).sum(1).float().mean().item()
        assert 1.5 < l0 < 4.5, (name, l0)
    assert [line["step"] for line in lines] == [20, 40, 60, 80, 100]
    for name in VARIANTS:
        assert lines[-1][name]["loss"] < 0.8 * lines[0][name]["loss"]
        last = max(lines[-1][name]["explained_variance"].items(), key=lambda item: int(item[0]))
        # the running value is of training batches and before the last step
        assert last[1] == pytest.approx(explained(trained[name], x), abs=0.1)


def test_hierarchical_is_better_at_short_prefixes():
    stream = Made()
    configs = {"plain": sae(), "hierarchical": sae(loss="hierarchical")}
    trained = SAETrainer(configs, stream, training(tokens=256 * 100)).train()
    x = next(stream.batches(2000, start=10**6))
    short = {}
    for name, model in trained.items():
        with torch.no_grad():
            x_hat = model.decode_active(model.strongest(x, 1))
        short[name] = (x - x_hat).square().sum().item()
    assert short["hierarchical"] < short["plain"]


def test_schedule_is_a_rise_and_a_cosine():
    config = TrainConfig(tokens=1000, batch_size=10, lr=1.0, final_lr=0.1, warmup=0.1)
    assert config.steps == 100
    assert [config.lr_at(s) for s in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    assert config.lr_at(55) == pytest.approx(0.55)
    assert config.lr_at(99) == pytest.approx(0.1, abs=1e-3)


def test_the_scale_of_the_activations_is_folded_away():
    """Activations a thousand times as large give the same SAE, for activations that large."""
    small, large = Made(scale=1.0), Made(scale=1000.0)
    one = SAETrainer({"a": sae()}, small, training()).train()["a"]
    other = SAETrainer({"a": sae()}, large, training()).train()["a"]
    x = next(small.batches(500, start=10**6))
    torch.testing.assert_close(other(1000 * x), 1000 * one(x), rtol=1e-2, atol=1)


def test_a_stopped_run_goes_on_as_if_it_had_not(tmp_path):
    names = ("topk", "batchtopk", "jumprelu", "hierarchical_kron")
    configs = {name: VARIANTS[name] for name in names}
    whole = SAETrainer({n: sae(**c) for n, c in configs.items()}, Made(), training()).train()
    with pytest.raises(SteerError) as error:
        SAETrainer({n: sae(**c) for n, c in configs.items()}, Made(31), training(), tmp_path).train()
    assert "the stream ended after 7936 of 15360 activations" in message(error)
    assert "31 steps done are saved" in message(error)
    again = SAETrainer({n: sae(**c) for n, c in configs.items()}, Made(), training(), tmp_path)
    assert again.step == 31
    finished = again.train()
    for name in names:
        for key, value in whole[name].state_dict().items():
            assert torch.equal(finished[name].state_dict()[key], value), (name, key)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [20, 40, 60]
    assert {"tokens_per_second", "eta_seconds", "lr"} <= set(lines[0])


def test_numbers_that_are_not_finite_stop_the_run_and_lose_nothing(tmp_path):
    with pytest.raises(SteerError) as error:
        SAETrainer({"a": sae()}, Made(bad=12), training(), tmp_path).train()
    assert "batch 12" in message(error)
    again = SAETrainer({"a": sae()}, Made(), training(), tmp_path)
    assert again.step == 12
    assert torch.isfinite(again.train()["a"].W_dec).all()


def test_another_run_in_the_folder_is_refused(tmp_path):
    SAETrainer({"a": sae()}, Made(), training(tokens=512), tmp_path).train()
    with pytest.raises(SteerError) as error:
        SAETrainer({"a": sae(d_sae=64)}, Made(), training(tokens=512), tmp_path)
    assert "saes.a.d_sae was 32, now 64" in message(error)
    with pytest.raises(SteerError) as error:
        SAETrainer({"a": sae()}, Made(), training(tokens=512, lr=1e-3), tmp_path)
    assert "training.lr was 0.01, now 0.001" in message(error)
    (tmp_path / "checkpoint.pt").write_bytes(b"nonsense")
    with pytest.raises(SteerError) as error:
        SAETrainer({"a": sae()}, Made(), training(tokens=512), tmp_path)
    assert "is not a checkpoint" in message(error)


def test_another_width_is_refused():
    with pytest.raises(SteerError) as error:
        SAETrainer({"a": sae(d_in=17)}, Made(), training())
    assert "give d_in=16" in message(error)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"tokens": 100}, "less than one batch"),
        ({"lr": float("nan")}, "lr=nan"),
        ({"precision": "float8"}, "float32, bfloat16 or fast"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"warmup": 2.0}, "warmup=2.0"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes, part):
    with pytest.raises(SteerError) as error:
        training(**changes)
    assert part in message(error)


def test_dead_features_come_back_with_the_auxiliary_loss():
    """Half of the features start too weak to be among the k; the auxiliary loss brings some back."""
    alive = {}
    for auxiliary in (0.0, 1 / 32):
        trainer = SAETrainer(
            {"a": sae(d_sae=48, k=2)}, Made(), training(tokens=256 * 100, auxiliary=auxiliary)
        )
        start = trainer.runs["a"].sae.start_from

        def bury(sample: torch.Tensor, start: Any = start, trainer: SAETrainer = trainer) -> None:
            start(sample)
            with torch.no_grad():
                trainer.runs["a"].sae.encoder.bias[24:] = -1

        trainer.runs["a"].sae.start_from = bury
        model = trainer.train()["a"]
        x = next(Made().batches(5000, start=10**6))
        alive[auxiliary] = int((model.encode(x)[:, 24:] > 0).any(0).sum())
    assert alive[1 / 32] >= alive[0.0] + 2, alive


def test_bfloat16_products_learn_as_well():
    stream = Made()
    trained = SAETrainer({"a": sae()}, stream, training(tokens=256 * 100, precision="bfloat16")).train()
    assert explained(trained["a"], next(stream.batches(2000, start=10**6))) > 0.7
