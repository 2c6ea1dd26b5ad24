"""
How SAEs are trained: `TrainConfig`, its learning rate, and when a run is flat.

A cosine must know its end. A run that ends where nothing is gained any more does not know it, so its learning
rate is constant after the warm-up ("wsd": warm-up, stable, decay; arXiv 2404.06395) and decays only when the
end is decided.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from steer.errors import SteerError
from steer.models import fast_dtype
from steer.sae.config import check_count, check_number

SCHEDULES = {
    "cosine": "a cosine that ends with the tokens",
    "wsd": "constant, then a linear decay (warm-up, stable, decay)",
}


@dataclass
class TrainConfig:
    """How SAEs are trained; the defaults are the settings published for KronSAE."""

    tokens: int = field(default=125_000_000, metadata={"help": "Activations to train on."})
    batch_size: int = field(default=8192, metadata={"help": "Activations of a step, all processes together."})
    lr: float = field(default=8e-4, metadata={"help": "Highest learning rate."})
    final_lr: float = field(default=1e-6, metadata={"help": "Learning rate at the end."})
    warmup: float = field(
        default=0.1, metadata={"help": "Share of the steps of all tokens in which it rises from 0."}
    )
    schedule: str = field(
        default="cosine", metadata={"help": "; ".join(f"{k} = {v}" for k, v in SCHEDULES.items()) + "."}
    )
    decay: float = field(
        default=0.2, metadata={"help": "wsd: length of the decay, as a share of the steps before it."}
    )
    early_stopping_threshold: float = field(
        default=0.0,
        metadata={
            "help": "wsd: begin the decay, and so end, where the held-out explained variance of every SAE "
            "has risen by less than this over the last early_stopping_window of the steps; 0 trains on all "
            "tokens."
        },
    )
    early_stopping_window: float = field(
        default=0.2, metadata={"help": "Share of the steps so far over which the rise is measured."}
    )
    eval_every: int = field(
        default=100, metadata={"help": "Steps between two measurements on held-out activations."}
    )
    weight_decay: float = field(default=0.0, metadata={"help": "AdamW's weight decay."})
    auxiliary: float = field(
        default=1 / 32, metadata={"help": "Weight of the loss of dead features; 0 is off."}
    )
    dead_after: int = field(
        default=1_000_000, metadata={"help": "Activations without firing after which a feature is dead."}
    )
    precision: str = field(
        default="float32",
        metadata={
            "help": "Of the encoder's product: float32, bfloat16, or fast: the faster one here. For JumpReLU "
            "only in the loss of dead features."
        },
    )
    seed: int = field(default=0, metadata={"help": "Of the SAEs' first weights."})
    log_every: int = field(default=20, metadata={"help": "Steps between two lines of metrics."})
    save_every: int = field(default=500, metadata={"help": "Steps between two checkpoints."})

    def __post_init__(self) -> None:
        for name in ("tokens", "batch_size", "dead_after", "eval_every", "log_every", "save_every"):
            check_count(name, getattr(self, name))
        for name, high in (("lr", 10.0), ("final_lr", 10.0), ("warmup", 1.0), ("weight_decay", 1.0)):
            check_number(name, getattr(self, name), 0.0, high)
        check_number("auxiliary", self.auxiliary, 0.0)
        check_number("early_stopping_threshold", self.early_stopping_threshold, 0.0, 1.0)
        for name in ("decay", "early_stopping_window"):
            check_number(name, getattr(self, name), 0.01, 0.99)
        if self.schedule not in SCHEDULES:
            raise SteerError(f"schedule={self.schedule!r} is unknown; choose one of {', '.join(SCHEDULES)}")
        if self.schedule == "wsd" and self.warmup > (most := 1 / (1 + self.decay)):
            raise SteerError(f"warmup={self.warmup} reaches into the decay; give at most {most:.3f}")
        if self.early_stopping_threshold and self.schedule != "wsd":
            raise SteerError(
                f"early_stopping_threshold={self.early_stopping_threshold} with "
                f"schedule={self.schedule!r}, which "
                "must know its end before it starts; choose schedule='wsd' or early_stopping_threshold=0"
            )
        if self.precision == "fast":
            self.precision = fast_dtype()
        if self.precision not in ("float32", "bfloat16"):
            raise SteerError(f"precision={self.precision!r} is unknown; choose float32, bfloat16 or fast")
        if self.tokens < self.batch_size:
            raise SteerError(f"tokens={self.tokens} is less than one batch of batch_size={self.batch_size}")

    @property
    def steps(self) -> int:
        """The most steps: all tokens."""
        return self.tokens // self.batch_size

    @property
    def warmup_steps(self) -> float:
        return self.warmup * self.steps

    @property
    def latest_decay_start(self) -> int:
        """wsd: the latest step at which the decay can start and end within the tokens."""
        start = int(self.steps / (1 + self.decay))
        while self.end_of(start) > self.steps:
            start -= 1
        return start

    def end_of(self, decay_start: int) -> int:
        """wsd: the number of steps of a run whose decay starts after `decay_start` steps."""
        return decay_start + math.ceil(self.decay * decay_start)

    def lr_at(self, step: int, decay_start: int | None = None) -> float:
        """
        Learning rate of step 0, 1, ...: a linear rise, then a cosine to `final_lr`, or for wsd a constant and
        from step `decay_start` on a linear decay to `final_lr`.
        """
        rise = self.warmup_steps
        if step < rise and (decay_start is None or step < decay_start):
            return self.lr * (step + 1) / max(rise, 1.0)
        if self.schedule == "wsd":
            if decay_start is None or step < decay_start:
                return self.lr
            left = 1 - (step - decay_start + 1) / max(1, self.end_of(decay_start) - decay_start)
            return self.final_lr + (self.lr - self.final_lr) * left
        done = (step - rise) / max(1.0, self.steps - rise)
        return self.final_lr + (self.lr - self.final_lr) * (1 + math.cos(math.pi * done)) / 2


class EarlyStopping:
    """
    When a run ends: `decay_start` is the step from which the learning rate decays, None while that is open.

    `record` is told the held-out explained variance of every SAE; a run is flat at a measurement where each
    has risen by less than the threshold since the last measurement before the window. The window must begin
    after the warm-up. A run that is never flat is capped: its decay starts at the last step that lets it end
    with the tokens.
    """

    def __init__(self, training: TrainConfig):
        self.training = training
        self.history: list[tuple[int, dict[str, float]]] = []
        self.decay_start: int | None = None
        self.flat = False
        if training.schedule == "wsd" and not training.early_stopping_threshold:
            self.decay_start = training.latest_decay_start

    @property
    def end(self) -> int:
        """The number of steps of the run, or the most while that is open."""
        if self.training.schedule == "cosine" or self.decay_start is None:
            return self.training.steps
        return self.training.end_of(self.decay_start)

    def advance(self, step: int) -> None:
        """Start the decay after `step` steps where the tokens allow no later start."""
        latest = self.training.latest_decay_start
        if self.training.schedule == "wsd" and self.decay_start is None and step >= latest:
            self.decay_start = latest

    def record(self, step: int, explained: dict[str, float]) -> None:
        """
        Note the held-out explained variance by SAE after `step` steps, and start the decay where all are
        flat.
        """
        self.history.append((step, explained))
        if self.training.schedule != "wsd" or (self.decay_start is not None and step > self.decay_start):
            return
        rises = self.rises(step)
        limit = self.training.early_stopping_threshold
        if rises and limit and max(rises.values()) < limit:
            self.decay_start, self.flat = step, True

    def rises(self, step: int) -> dict[str, float] | None:
        """
        What each SAE has gained over the window that ends at the last measurement up to `step`, if known.
        """
        past = [one for one in self.history if one[0] <= step]
        if not past:
            return None
        last, now = past[-1]
        begin = last * (1 - self.training.early_stopping_window)
        before = [values for at, values in past if self.training.warmup_steps <= at <= begin]
        return {name: now[name] - before[-1][name] for name in now} if before else None

    def outcome(self) -> dict[str, Any] | None:
        """
        How the constant part of a wsd run ended: flat, capped or, without a threshold, with its tokens; what
        each SAE gained over its last window, and what the decay added. None for a cosine, whose small last
        steps look flat at any budget, and before the decay.
        """
        if self.training.schedule != "wsd" or self.decay_start is None:
            return None
        rises = self.rises(self.decay_start)
        stable = [values for at, values in self.history if at <= self.decay_start]
        after = [values for at, values in self.history if at == self.end]
        gained = {name: after[0][name] - stable[-1][name] for name in after[0]} if after and stable else None
        capped = "capped" if self.training.early_stopping_threshold else "tokens"
        return {
            "stopped": "flat" if self.flat else capped,
            "decay_start": self.decay_start,
            "steps": self.end,
            "rise": rises,
            "decay_gained": gained,
        }

    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history, "decay_start": self.decay_start, "flat": self.flat}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.history = list(state["history"])
        self.decay_start, self.flat = state["decay_start"], state["flat"]
