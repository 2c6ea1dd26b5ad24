"""An engine is sent vectors that changed without an update. No vLLM is needed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.fake_engine import Engine
from helpers.steering import message
from helpers.training import config, make_trainer
from transformers import PreTrainedModel

from steer import SteerError
from steer.engine.client import verify
from steer.engine.receipt import checksum
from steer.engine.rollout import VectorGeneration
from steer.training.steering_trainer import SteeringGRPOTrainer


class Generation(VectorGeneration):
    """Answers each prompt with one token, and keeps which vectors the engine held."""

    def _init_vllm(self) -> None:
        self.engine = Engine(width=32)
        self.held: list[dict[int, str]] = []
        self.sync_weights()

    def generate(self, prompts: list[list[int]], **kwargs: Any) -> tuple:
        assert self.receipt is not None
        verify(self.engine, self.receipt)
        self.held.append(self.receipt.layers)
        return prompts, [[5]] * len(prompts), [[[0.0]]] * len(prompts), None


@pytest.fixture
def trainer(
    build_tiny: Callable[..., PreTrainedModel], tiny_tokenizer: Any, tmp_path: Path
) -> SteeringGRPOTrainer:
    """In evaluation mode, with an engine that is given to it."""
    trainer = make_trainer(build_tiny("llama"), tiny_tokenizer, config(tmp_path))
    trainer.vllm_generation = Generation(
        trainer.vectors, model=trainer.model, accelerator=trainer.accelerator, processing_class=tiny_tokenizer
    )
    trainer.use_vllm, trainer._last_loaded_step = True, -1  # as trl sets them
    trainer.model.eval()
    return trainer


def samples_with_its_vectors(trainer: SteeringGRPOTrainer) -> bool:
    """Whether an engine that samples now holds the vectors as they are now."""
    trainer._generate(["1+1=", "7"])
    now = {layer: checksum(vector) for layer, vector in trainer.vectors.added().items()}
    return trainer.vllm_generation.held[-1] == now


def change(trainer: SteeringGRPOTrainer) -> None:
    trainer.vectors.set_tensors({name: value + 1 for name, value in trainer.vectors.tensors().items()})


def test_vectors_that_changed_without_an_update_are_pushed(
    trainer: SteeringGRPOTrainer, tmp_path: Path
) -> None:
    assert samples_with_its_vectors(trainer)
    change(trainer)
    assert samples_with_its_vectors(trainer)
    trainer.vectors.scale = 0.5
    assert samples_with_its_vectors(trainer)
    trainer.save_model(str(tmp_path / "best"))
    change(trainer)
    assert samples_with_its_vectors(trainer)
    trainer.state.best_model_checkpoint = str(tmp_path / "best")
    trainer._load_best_model()
    assert samples_with_its_vectors(trainer)
    before = trainer.vllm_generation.receipt
    assert samples_with_its_vectors(trainer)
    assert trainer.vllm_generation.receipt is before  # nothing changed, and nothing was sent


def test_an_engine_does_not_sample_for_vectors_that_are_off(trainer: SteeringGRPOTrainer) -> None:
    with (
        trainer.vectors.disabled(),
        pytest.raises(SteerError, match=r"off here \(vectors\.disabled\(\)\)") as error,
    ):
        trainer._generate(["7"])
    assert "vectors.scale = 0" in message(error)
    change(trainer)
    trainer.vectors.scale = 0.0
    assert samples_with_its_vectors(trainer)
