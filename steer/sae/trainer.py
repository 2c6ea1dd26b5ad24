"""
Train SAEs on a stream of activations: AdamW with the schedule of KronSAE (arXiv 2505.22255, section 3) or
until the held-out explained variance is flat, several SAEs on one stream, and a run that goes on where it was
stopped.
"""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor

from steer.errors import SteerError
from steer.files import replace_file
from steer.sae.cache import HeldActivations, difference
from steer.sae.config import SAEConfig
from steer.sae.evaluate import explained_by_prefix, quality
from steer.sae.jumprelu import count_active, jump
from steer.sae.losses import auxiliary_loss, hierarchical_loss, matryoshka_loss, reconstruction_loss
from steer.sae.model import SAE, Active
from steer.sae.schedule import EarlyStopping, TrainConfig
from steer.sae.sparse import Selection

CHECKPOINT, METRICS = "checkpoint.pt", "metrics.jsonl"
# l0 at which the metrics of a training step are taken, where the SAE has as many active features.
L0 = (8, 16, 32, 64, 128)
# Weight of (l0 / k - 1)^2 for JumpReLU, in units of the activations' mean square norm.
SPARSITY = 0.1


class Batches(Protocol):
    """A stream of activations: `ActivationStream`, `CachedActivations` or a stand-in."""

    width: int

    def batches(self, size: int, start: int = 0) -> Iterator[Tensor]: ...

    def describe(self) -> dict[str, Any]: ...

    def order(self) -> dict[str, Any]: ...


@dataclass
class _Run:
    """One SAE in training, its optimizer, and how long ago each feature fired, in activations."""

    sae: SAE
    optimizer: torch.optim.AdamW
    silent: Tensor


class SAETrainer:
    """
    Trains the SAEs of `configs` (by name) on `stream`; `train()` returns them, in units of the activations.

    folder: where metrics and checkpoints go, and where a stopped run is found again (None: nothing is
    written). Inputs are multiplied by one constant that gives the first batch a mean norm of sqrt(width);
    `folded` takes it out of the weights again. Raises SteerError for an SAE of another width than the stream,
    for activations that are not finite, and when the stream ends early; what was learned is saved before.

    heldout: activations that are measured every `eval_every` steps; a run with an early_stopping_threshold
    needs them. All SAEs of a run have the same steps: it ends when all of them are flat. An SAE learns the
    same beside others as alone, bit for bit.
    """

    def __init__(
        self,
        configs: Mapping[str, SAEConfig],
        stream: Batches,
        training: TrainConfig,
        folder: str | Path | None = None,
        accelerator: Accelerator | None = None,
        on_log: Callable[[dict[str, Any]], None] | None = None,
        heldout: HeldActivations | None = None,
    ):
        if not configs:
            raise SteerError("no SAE to train; give at least one")
        for name, config in configs.items():
            if config.d_in != stream.width:
                raise SteerError(
                    f"SAE {name!r} has d_in={config.d_in}, the activations a width of {stream.width}; "
                    f"give d_in={stream.width}"
                )
        if training.early_stopping_threshold and heldout is None:
            raise SteerError(
                f"early_stopping_threshold={training.early_stopping_threshold} needs held-out activations to "
                "measure; give heldout, or early_stopping_threshold=0"
            )
        if heldout is not None and heldout.width != stream.width:
            raise SteerError(
                f"the held-out activations have a width of {heldout.width}, those of training "
                f"{stream.width}; read both at the same site of one model"
            )
        self.stream, self.training, self.on_log, self.heldout = stream, training, on_log, heldout
        self.stopping = EarlyStopping(training)
        self.folder = Path(folder) if folder is not None else None
        self.accelerator = accelerator or Accelerator(cpu=True)
        world = self.accelerator.num_processes
        if training.batch_size % world:
            raise SteerError(f"batch_size={training.batch_size} cannot be shared by {world} processes")
        self.local_batch = training.batch_size // world
        self.step = 0
        self.scale: float | None = None
        self.runs: dict[str, _Run] = {}
        for name, config in configs.items():
            config.source = stream.describe()
            sae = SAE(config, self.accelerator.device, training.seed).train()
            optimizer = torch.optim.AdamW(
                sae.parameters(), lr=training.lr, weight_decay=training.weight_decay, fused=True
            )
            silent = torch.zeros(config.d_sae, dtype=torch.long, device=self.accelerator.device)
            self.runs[name] = _Run(sae, optimizer, silent)
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._resume()

    # --- the run

    def train(self) -> dict[str, SAE]:
        """All steps that are left; then the SAEs with the normalisation folded away."""
        self._check_batch()
        batches = self.stream.batches(self.local_batch, self.step)
        began, first = time.perf_counter(), self.step
        while self.step < self.stopping.end:
            batch = next(batches, None)
            if not self._all(batch is not None):
                self._stop_early()
            assert batch is not None
            x = batch.to(self.accelerator.device, torch.float32)
            if not self._all(bool(torch.isfinite(x).all())):
                self.save()
                raise SteerError(
                    f"batch {self.step} of the stream holds numbers that are not finite; what was learned "
                    "before is saved: read the activations in float32 or bfloat16"
                )
            if self.scale is None:
                self.scale = self._start(x)
            scaled = x * self.scale
            metrics = {name: self._update(run, scaled) for name, run in self.runs.items()}
            self.step += 1
            if self.heldout is not None:
                self._measure(self.heldout)
            self.stopping.advance(self.step)
            if self.step % self.training.log_every == 0 or self.step == self.stopping.end:
                self._log(metrics, (time.perf_counter() - began) / (self.step - first))
            if self.step % self.training.save_every == 0:
                self.save()
        self.save()
        return self.folded()

    def _measure(self, heldout: HeldActivations) -> None:
        """
        Explained variance of the held-out activations, by the rule used after training; every `eval_every`
        steps and where the decay starts and ends. The same in all processes.
        """
        known = (
            {self.training.latest_decay_start, self.stopping.end}
            if self.training.schedule == "wsd"
            else set()
        )
        if self.step % self.training.eval_every and self.step not in known:
            return
        explained, scale = {}, self.scale or 1.0
        for name, run in self.runs.items():
            batches = (rows * scale for rows in heldout.in_order(1024))
            run.sae.eval()
            found = torch.tensor(quality(run.sae, batches).explained[run.sae.cfg.k], dtype=torch.float64)
            run.sae.train()
            explained[name] = broadcast(found.to(self.accelerator.device)).item()
        self.stopping.record(self.step, explained)

    def _start(self, x: Tensor) -> float:
        """
        Fit the input's scale and the SAEs' starting biases on the first batch; the same in all processes.
        """
        mean = self.accelerator.reduce(x.norm(dim=1).mean(), "mean")
        if mean == 0:
            raise SteerError(
                "the first batch of activations is all zeros; check the layer, the site and the vectors"
            )
        scale = (self.stream.width**0.5 / mean).item()
        sample = broadcast(x[:8192] * scale)
        for run in self.runs.values():
            run.sae.start_from(sample)
        return scale

    def _update(self, run: _Run, x: Tensor) -> dict[str, Tensor]:
        """One step of one SAE; its loss and the active features, for the metrics."""
        sae, cfg, low = run.sae, run.sae.cfg, self.training.precision == "bfloat16"
        if cfg.activation == "jumprelu":
            active, loss, x_hat = self._jumprelu_loss(sae, x)
        else:
            active = sae.active(x, low_precision=low)
            if cfg.loss == "hierarchical":
                loss, x_hat = hierarchical_loss(sae, x, active, cfg.prefixes), None
            elif cfg.loss == "matryoshka":
                loss, x_hat = matryoshka_loss(sae, x, active, cfg.prefixes or [cfg.d_sae])
            else:
                x_hat = sae.decode_active(active)
                loss = reconstruction_loss(x, x_hat)
        dead = (run.silent >= self.training.dead_after).nonzero().squeeze(1)
        if self.training.auxiliary and len(dead):
            with torch.no_grad():
                residual = x - (sae.decode_active(active) if x_hat is None else x_hat)
            loss = loss + self.training.auxiliary * auxiliary_loss(sae, x, residual, dead, low_precision=low)
        if not self._all(bool(torch.isfinite(loss))):
            self.save()
            raise SteerError(f"the loss of step {self.step} is not finite; lower lr (now {self.training.lr})")
        loss.backward()
        self._share_gradients(sae)
        for group in run.optimizer.param_groups:
            group["lr"] = self.training.lr_at(self.step, self.stopping.decay_start)
        run.optimizer.step()
        run.optimizer.zero_grad()
        sae.normalise_decoder()
        fired = torch.zeros_like(run.silent)
        fired[active.indices[active.values.detach() > 0]] = 1
        fired = self.accelerator.reduce(fired, "sum")
        run.silent.add_(self.training.batch_size).masked_fill_(fired > 0, 0)
        return {"loss": loss.detach(), "x": x, "values": active.values.detach(), "indices": active.indices}

    @staticmethod
    def _jumprelu_loss(sae: SAE, x: Tensor) -> tuple[Active, Tensor, Tensor]:
        """Squared error and the distance of l0 from its target k, which moves the thresholds alone."""
        z, threshold = sae.latents(x), sae.log_threshold.exp()
        features = jump(z, threshold)
        x_hat = sae.decode(features)
        off = count_active(z.detach(), threshold).mean() / sae.cfg.k - 1
        loss = reconstruction_loss(x, x_hat) + SPARSITY * x.square().sum(1).mean() * off.square()
        with torch.no_grad():
            most = max(1, int((features > 0).sum(1).max()))
            values, indices = features.topk(most)
        return Active(values, Selection(indices, sae.cfg.d_sae)), loss, x_hat.detach()

    def _share_gradients(self, sae: SAE) -> None:
        if self.accelerator.num_processes > 1:
            for parameter in sae.parameters():
                if parameter.grad is not None:
                    parameter.grad = self.accelerator.reduce(parameter.grad, "mean")

    def _all(self, fine: bool) -> bool:
        """Whether `fine` holds in every process, so that all of them stop together."""
        if self.accelerator.num_processes == 1:
            return fine
        flag = torch.tensor(float(fine), device=self.accelerator.device)
        return self.accelerator.reduce(flag, "sum").item() == self.accelerator.num_processes

    def _check_batch(self) -> None:
        """SteerError for a stream that never fills a batch, however long it is."""
        order, size = self.stream.order(), self.training.batch_size
        if (stored := order.get("stored", size)) < size:
            raise SteerError(
                f"{stored} stored activations are less than one batch of batch_size={size}; store more "
                "(cache_tokens, or more texts) or lower batch_size"
            )
        if (block := order.get("block", size)) < self.local_batch:
            raise SteerError(
                f"block={block} is less than one batch of batch_size={size}, of which a process takes "
                f"{self.local_batch} activations; raise block or lower batch_size"
            )

    def _stop_early(self) -> None:
        self.save()
        remedy = ": give more texts or epochs, or lower tokens"
        if not self.step:
            size = self.training.batch_size
            remedy = f": the texts fill no batch of batch_size={size}; give more texts or lower batch_size"
        elif self.folder:
            remedy = (
                f"; the {self.step} steps done are saved in {self.folder} and continue with more epochs; "
                "give another folder for more texts or fewer tokens"
            )
        raise SteerError(
            f"the stream ended after {self.step * self.training.batch_size} of {self.training.tokens} "
            f"activations{remedy}"
        )

    def _log(self, metrics: dict[str, dict[str, Tensor]], seconds: float) -> None:
        line: dict[str, Any] = {
            "step": self.step,
            "tokens": self.step * self.training.batch_size,
            "lr": self.training.lr_at(self.step - 1, self.stopping.decay_start),
            "tokens_per_second": round(self.training.batch_size / seconds),
            "eta_seconds": round((self.stopping.end - self.step) * seconds),
        }
        for name, values in metrics.items():
            run = self.runs[name]
            l0 = [n for n in L0 if n < values["values"].shape[1]] + [values["values"].shape[1]]
            active = Active(values["values"], Selection(values["indices"], run.sae.cfg.d_sae))
            explained = explained_by_prefix(run.sae, values["x"], active, l0)
            line[name] = {
                "loss": values["loss"].item() / self.stream.width,
                "explained_variance": {str(n): round(v, 5) for n, v in explained.items()},
                "l0": (values["values"] > 0).sum(1).float().mean().item(),
                "dead": (run.silent >= self.training.dead_after).float().mean().item(),
            }
        if self.stopping.history:
            at, heldout = self.stopping.history[-1]
            line["heldout"] = {"step": at, "explained_variance": heldout, "rise": self.stopping.rises(at)}
        if self.step == self.stopping.end and (outcome := self.stopping.outcome()):
            line["outcome"] = outcome
        if self.accelerator.is_main_process:
            if self.folder is not None:
                with (self.folder / METRICS).open("a") as file:
                    file.write(json.dumps(line) + "\n")
            if self.on_log:
                self.on_log(line)

    def folded(self) -> dict[str, SAE]:
        """Copies of the SAEs for activations as the model has them."""
        saes = {}
        for name, run in self.runs.items():
            sae = SAE(run.sae.cfg, self.accelerator.device)
            sae.load_state_dict(run.sae.state_dict())
            sae.rescale(1 / (self.scale or 1.0))
            saes[name] = sae.eval()
        return saes

    # --- on disk

    def save(self) -> None:
        """Write the checkpoint, whole or not at all; nothing without a folder or before the first step."""
        if self.folder is None or self.scale is None or not self.accelerator.is_main_process:
            return
        content = io.BytesIO()
        state = {
            "asked": self._asked(),
            "step": self.step,
            "scale": self.scale,
            "stopping": self.stopping.state_dict(),
            "saes": {
                name: {"sae": run.sae.state_dict(), "adam": run.optimizer.state_dict(), "silent": run.silent}
                for name, run in self.runs.items()
            },
        }
        torch.save(state, content)
        replace_file(self.folder / CHECKPOINT, content.getvalue())

    def _asked(self) -> dict[str, Any]:
        """What must be the same for a run to go on."""
        free = ("log_every", "save_every")
        training = {k: v for k, v in asdict(self.training).items() if k not in free}
        saes = {}
        for name, run in self.runs.items():
            saes[name] = {k: v for k, v in run.sae.cfg.to_dict().items() if k != "source"}
        heldout = self.heldout and {"tokens": len(self.heldout), "source": self.heldout.describe()}
        stream = {**self.stream.describe(), **self.stream.order()}
        return {"training": training, "saes": saes, "heldout": heldout, "stream": stream}

    def _resume(self) -> None:
        assert self.folder is not None
        path = self.folder / CHECKPOINT
        if not path.exists():
            self._forget_metrics()
            return
        try:
            # by type: torch.load does not know the cpu:0 of several processes
            state = torch.load(path, map_location=self.accelerator.device.type, weights_only=True)
            asked, saes, stopping = state["asked"], state["saes"], state["stopping"]
        except Exception as error:  # torch raises many kinds on a damaged file
            raise SteerError(
                f"{path} is not a checkpoint of this recipe ({type(error).__name__}); remove it or give "
                f"another folder"
            ) from error
        changed = difference(asked, self._asked())
        if changed:
            raise SteerError(f"{self.folder} holds another run: {changed}; give another folder or remove it")
        for name, run in self.runs.items():
            run.sae.load_state_dict(saes[name]["sae"])
            run.optimizer.load_state_dict(saes[name]["adam"])
            run.silent.copy_(saes[name]["silent"])
        self.step, self.scale = state["step"], state["scale"]
        self.stopping.load_state_dict(stopping)
        self._forget_metrics()

    def _forget_metrics(self) -> None:
        """Drop the metrics of steps after the checkpoint, which are taken again."""
        assert self.folder is not None
        path = self.folder / METRICS
        if path.exists() and self.accelerator.is_main_process:
            lines = path.read_text().splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= self.step]
            replace_file(path, "".join(kept).encode())
