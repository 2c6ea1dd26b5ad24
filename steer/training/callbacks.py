"""What a person watches in training: a progress bar, times, and per layer the numbers that tell health."""

from __future__ import annotations

import time
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from steer.sharded import whole
from steer.training.config import SteeringGRPOConfig
from steer.vectors import SteeringVectors


def watch(trainer: Trainer) -> None:
    """Give a trainer of trl one progress line in place of transformers' output, and times in its log."""
    for former in (PrinterCallback, ProgressCallback, ProgressBar, Seconds):
        trainer.remove_callback(former)
    if (metrics := getattr(trainer, "_metrics", None)) is not None:
        trainer.add_callback(Seconds(trainer, metrics["train"]))
    if not trainer.args.disable_tqdm:
        trainer.add_callback(ProgressBar())


class VectorLog(TrainerCallback):
    """
    Adds to every log, for each layer l: `layer/l/norm`, `layer/l/grad_norm` (after clipping),
    `layer/l/update_ratio` (norm of the update over norm of the vector) and, once there is a checkpoint,
    `layer/l/cosine` to the vector in it.
    """

    def __init__(self, vectors: SteeringVectors, metrics: dict[str, list[float]]):
        self.vectors = vectors
        self.metrics = metrics
        self.before: dict[int, torch.Tensor] = {}
        self.saved: dict[int, torch.Tensor] = {}

    def on_train_begin(self, *args: object, **kwargs: object) -> None:
        self.saved = self.vectors.effective()

    def on_save(self, *args: object, **kwargs: object) -> None:
        self.saved = self.vectors.effective()

    def on_step_begin(self, *args: object, **kwargs: object) -> None:
        self.before = self.vectors.effective()

    def on_pre_optimizer_step(self, *args: object, **kwargs: object) -> None:
        # DeepSpeed has stepped by now, and keeps gradients to itself: none is logged
        squares: dict[int | None, float] = {}
        for layer, p in zip(self.vectors.parameter_layers(), self.vectors.parameters(), strict=True):
            if p.grad is not None:
                squares[layer] = squares.get(layer, 0.0) + whole(p.grad).norm().item() ** 2
        for layer, square in squares.items():
            name = "shared" if layer is None else f"layer/{layer}"
            self.metrics[f"{name}/grad_norm"].append(square**0.5)

    def on_optimizer_step(self, *args: object, **kwargs: object) -> None:
        for layer, vector in self.vectors.effective().items():
            norm = vector.norm().item()
            self.metrics[f"layer/{layer}/norm"].append(norm)
            if norm:
                self.metrics[f"layer/{layer}/update_ratio"].append(
                    (vector - self.before[layer]).norm().item() / norm
                )
            if norm and self.saved[layer].norm():
                cosine = torch.cosine_similarity(vector, self.saved[layer], dim=0).item()
                self.metrics[f"layer/{layer}/cosine"].append(cosine)


class Seconds(TrainerCallback):
    """
    Adds to every log the time of an update: `seconds/wall`, the part of it in which completions were drawn
    (`seconds/rollout`), and `seconds/cpu` of all threads together.
    """

    def __init__(self, trainer: Trainer, metrics: dict[str, list[float]]):
        self.trainer, self.metrics = trainer, metrics
        self.began: dict[str, float] = {}

    def on_step_begin(self, *args: object, **kwargs: object) -> None:
        self.began = self._now()

    def on_step_end(self, *args: object, **kwargs: object) -> None:
        for name, now in self._now().items():
            self.metrics[f"seconds/{name}"].append(now - self.began[name])

    def _now(self) -> dict[str, float]:
        drawn = getattr(self.trainer, "rollout_seconds", None)  # supervised training draws nothing
        times = {"wall": time.perf_counter(), "cpu": time.process_time()}
        return times if drawn is None else {**times, "rollout": drawn}


class ProgressBar(TrainerCallback):
    """
    One line: updates done and to go, reward, accuracy and generated tokens per second; of supervised training
    the loss and the accuracy on its tokens.
    """

    def __init__(self) -> None:
        self.bar: tqdm | None = None
        self.last = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if state.is_world_process_zero:
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", desc="training")
        self.last = time.perf_counter()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: object,
    ) -> None:
        now = time.perf_counter()
        if self.bar is None or not logs:
            return
        steps = state.global_step - self.bar.n
        if logs.get("reward") is None:
            if logs.get("loss") is not None:
                found = {"loss": logs["loss"], "token accuracy": logs.get("mean_token_accuracy")}
                texts = {name: f"{value:.3f}" for name, value in found.items() if value is not None}
                self.bar.set_postfix(texts, refresh=False)
                self.bar.update(steps)
            return
        shown = {"reward": f"{logs['reward']:.2f}"}
        if logs.get("accuracy") is not None:
            shown["accuracy"] = f"{logs['accuracy']:.2f}"
        assert isinstance(args, SteeringGRPOConfig)
        length = logs.get("completions/mean_length")
        if length and steps > 0:
            samples = (
                args.generation_batch_size
                * steps
                * args.gradient_accumulation_steps
                / args.steps_per_generation
            )
            shown["tok/s"] = f"{length * samples / (now - self.last):.0f}"
        self.last = now
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update(steps)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None
