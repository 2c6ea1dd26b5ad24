"""Training SAEs: the schedule, what is learned, resuming, several at once, and streams that go wrong."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from helpers.steering import message

from steer.errors import SteerError
from steer.sae import SAE, SAEConfig
from steer.sae.cache import HeldActivations
from steer.sae.schedule import TrainConfig
from steer.sae.trainer import SAETrainer

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

    def order(self) -> dict[str, Any]:
        return {"window": 8}

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
    "matryoshka": {"loss": "matryoshka", "activation": "batchtopk"},
    "matryoshka_kron": {"loss": "matryoshka", "encoder": "kron", "m": 2, "n": 2},
    "relu_product": {"encoder": "kron", "m": 2, "n": 2, "interaction": "relu_product"},
    "product": {"encoder": "kron", "m": 2, "n": 2, "interaction": "product"},
}


def test_every_variant_learns_on_one_stream():
    """One stream, every kind of SAE; each explains most of what an untrained one does not."""
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
        # a Matryoshka loss has the errors of small dictionaries in it, which stay
        share = 0.85 if "matryoshka" in name else 0.8
        assert lines[-1][name]["loss"] < share * lines[0][name]["loss"]
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


@pytest.mark.parametrize("variant", ["topk", "matryoshka", "product", "relu_product"])
def test_the_scale_of_the_activations_is_folded_away(variant):
    """Activations a thousand times as large give the same SAE, for activations that large."""
    small, large = Made(scale=1.0), Made(scale=1000.0)
    one = SAETrainer({"a": sae(**VARIANTS[variant])}, small, training()).train()["a"]
    other = SAETrainer({"a": sae(**VARIANTS[variant])}, large, training()).train()["a"]
    x = next(small.batches(500, start=10**6))
    torch.testing.assert_close(other(1000 * x), 1000 * one(x), rtol=1e-2, atol=1)


def test_a_stopped_run_goes_on_as_if_it_had_not(tmp_path):
    names = ("topk", "batchtopk", "jumprelu", "hierarchical_kron", "matryoshka", "product")
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


def test_several_processes_on_cpus_read_their_checkpoint(tmp_path, monkeypatch):
    """accelerate calls their device cpu:0, which `torch.load` does not know."""
    monkeypatch.setattr(Accelerator, "device", property(lambda self: torch.device("cpu", 0)))
    with pytest.raises(SteerError, match="31 steps done are saved"):
        SAETrainer({"a": sae()}, Made(31), training(), tmp_path).train()
    assert SAETrainer({"a": sae()}, Made(), training(), tmp_path).step == 31


def test_metrics_of_steps_after_the_last_checkpoint_are_not_told_twice(tmp_path):
    def stop(line: dict[str, Any]) -> None:
        if line["step"] == 40:
            raise KeyboardInterrupt

    for settings in (training(save_every=500), training(save_every=30)):
        with pytest.raises(KeyboardInterrupt):
            SAETrainer({"a": sae()}, Made(), settings, tmp_path, on_log=stop).train()
    again = SAETrainer({"a": sae()}, Made(), settings, tmp_path)
    assert again.step == 30
    again.train()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [20, 40, 60]


def test_several_saes_on_one_stream_learn_what_each_learns_alone():
    """Bit for bit: every batch is read once, and no SAE sees another."""

    class Counted(Made):
        read = 0

        def batches(self, size: int, start: int = 0) -> Iterator[torch.Tensor]:
            for batch in super().batches(size, start):
                self.read += 1
                yield batch

    names = ("topk", "kron", "hierarchical", "matryoshka")
    stream = Counted()
    together = SAETrainer({n: sae(**VARIANTS[n]) for n in names}, stream, training(tokens=256 * 25)).train()
    assert stream.read == 25
    for name in names:
        alone = SAETrainer({"one": sae(**VARIANTS[name])}, Made(), training(tokens=256 * 25)).train()["one"]
        for key, value in alone.state_dict().items():
            assert torch.equal(together[name].state_dict()[key], value), (name, key)


def heldout(count: int = 500) -> HeldActivations:
    return HeldActivations(next(Made().batches(count, start=10**6)), {"texts": ["unseen"]})


def until_flat(**changes: Any) -> TrainConfig:
    settings = {"schedule": "wsd", "early_stopping_threshold": 0.02, "eval_every": 10, "tokens": 256 * 400}
    return training(**{**settings, "warmup": 0.05, "lr": 3e-3, **changes})


def test_a_run_ends_where_the_heldout_variance_is_flat():
    lines: list[dict[str, Any]] = []
    trainer = SAETrainer(
        {"a": sae(), "b": sae(encoder="kron")}, Made(), until_flat(), None, None, lines.append, heldout()
    )
    trained = trainer.train()
    outcome, history = trainer.stopping.outcome(), dict(trainer.stopping.history)
    start = outcome["decay_start"]
    assert outcome["stopped"] == "flat" and start < 333 and trainer.step == outcome["steps"] == start * 6 // 5
    for step in range(
        30, start + 1, 10
    ):  # the rule, written again: the first measurement that is flat ends it
        before = max(at for at in history if at <= 0.8 * step)
        flat = before >= 20 and all(history[step][n] - history[before][n] < 0.02 for n in "ab")
        assert flat == (step == start), step
    assert lines[-1]["outcome"] == outcome and lines[-1]["step"] == trainer.step
    x = heldout().rows
    assert history[trainer.step]["a"] == pytest.approx(explained(trained["a"], x), abs=1e-5)
    rates = [trainer.training.lr_at(step, start) for step in range(trainer.step)]
    assert rates[19] == rates[start - 1] == 3e-3 > rates[start] > rates[-2] > rates[-1]
    assert rates[-1] == pytest.approx(1e-6)


def test_a_run_that_is_never_flat_is_capped():
    settings = until_flat(early_stopping_threshold=1e-9, tokens=256 * 60)
    trainer = SAETrainer({"a": sae()}, Made(), settings, heldout=heldout())
    trainer.train()
    outcome = trainer.stopping.outcome()
    assert (outcome["stopped"], outcome["decay_start"], outcome["steps"]) == ("capped", 50, 60)
    assert trainer.step == 60 and outcome["rise"]["a"] > 1e-9
    fixed = SAETrainer({"a": sae()}, Made(), until_flat(early_stopping_threshold=0.0, tokens=256 * 60))
    fixed.train()
    assert fixed.stopping.outcome()["stopped"] == "tokens"
    assert torch.equal(fixed.folded()["a"].W_dec, trainer.folded()["a"].W_dec)


@pytest.mark.parametrize("after_decay_start", [-13, 2])
def test_a_run_until_flat_goes_on_where_it_was(tmp_path, after_decay_start):
    """Stopped before and within the decay."""
    settings = until_flat(tokens=256 * 80, early_stopping_threshold=0.05)
    whole = SAETrainer({"a": sae()}, Made(), settings, heldout=heldout())
    expected = whole.train()["a"]
    stop = whole.stopping.outcome()["decay_start"] + after_decay_start
    with pytest.raises(SteerError, match="the stream ended"):
        SAETrainer({"a": sae()}, Made(stop), settings, tmp_path, heldout=heldout()).train()
    again = SAETrainer({"a": sae()}, Made(), settings, tmp_path, heldout=heldout())
    assert again.step == stop
    assert torch.equal(again.train()["a"].W_dec, expected.W_dec)
    assert again.stopping.outcome() == whole.stopping.outcome()
    with pytest.raises(SteerError, match=r"heldout\.tokens was 500, now 400"):
        SAETrainer({"a": sae()}, Made(), settings, tmp_path, heldout=heldout(400))


def test_flat_needs_heldout_activations_of_that_width():
    with pytest.raises(SteerError, match="needs held-out activations"):
        SAETrainer({"a": sae()}, Made(), until_flat())
    with pytest.raises(SteerError, match="have a width of 17"):
        SAETrainer({"a": sae()}, Made(), until_flat(), heldout=HeldActivations(torch.ones(5, 17), {}))


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
    other = Made()
    other.describe = lambda: {"model": "made", "layer": 1}
    with pytest.raises(SteerError) as error:
        SAETrainer({"a": sae()}, other, training(tokens=512), tmp_path)
    assert "stream.layer was 0, now 1" in message(error)
    other = Made()
    other.order = lambda: {"window": 16}
    with pytest.raises(SteerError) as error:
        SAETrainer({"a": sae()}, other, training(tokens=512), tmp_path)
    assert "stream.window was 8, now 16" in message(error)
    (tmp_path / "checkpoint.pt").write_bytes(b"nonsense")
    with pytest.raises(SteerError) as error:
        SAETrainer({"a": sae()}, Made(), training(tokens=512), tmp_path)
    assert "is not a checkpoint" in message(error)


@pytest.mark.parametrize(
    ("name", "one", "two"),
    [("model_dtype", "float32", "bfloat16"), ("texts_sha256", "12ab", "34cd"), ("added", True, False)],
)
def test_a_run_goes_on_with_the_same_source(name, one, two, tmp_path):
    def run(**more):
        stream = Made()
        stream.describe = lambda: {"model": "made", "layer": 0, **more}
        return SAETrainer({"a": sae()}, stream, training(tokens=512), tmp_path)

    run().train()  # checkpoints of 0.1.0 do not say which it was
    assert run(**{name: one}).step == 2
    (tmp_path / "checkpoint.pt").unlink()
    run(**{name: one}).train()
    with pytest.raises(SteerError, match=rf"stream\.{name} was {one!r}, now {two!r}"):
        run(**{name: two})


@pytest.mark.parametrize(
    ("order", "part"),
    [
        ({"stored": 255}, "255 stored activations are less than one batch of batch_size=256; store more"),
        ({"block": 255}, "block=255 is less than one batch of batch_size=256"),
    ],
)
def test_a_stream_that_never_fills_a_batch_is_refused_at_the_start(order, part):
    stream = Made()
    stream.order = lambda: order
    with pytest.raises(SteerError) as error:
        SAETrainer({"a": sae()}, stream, training()).train()
    assert part in message(error)


def test_texts_that_fill_no_batch_are_told():
    with pytest.raises(SteerError, match="the texts fill no batch of batch_size=256; give more texts or"):
        SAETrainer({"a": sae()}, Made(count=0), training()).train()


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
        ({"early_stopping_threshold": 0.002}, "choose schedule='wsd'"),
        ({"schedule": "linear"}, "cosine, wsd"),
        ({"schedule": "wsd", "warmup": 0.9}, "warmup=0.9 reaches into the decay"),
        ({"decay": 1.0}, "decay=1.0"),
        ({"early_stopping_window": 0}, "early_stopping_window=0"),
        ({"eval_every": 0}, "eval_every=0"),
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
