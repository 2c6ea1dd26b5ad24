"""
Samples for a population from one vLLM engine: every member's vectors are a set of its own in the engine's
bank, and every request names its member's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from steer.artifact import Artifact
from steer.engine.client import push, request, verify
from steer.engine.compat import warn_version, whole_prompts
from steer.engine.eager import enforce_eager, say_whether_it_pays
from steer.engine.logprobs import PROCESSED, logprobs_mode
from steer.engine.receipt import Receipt
from steer.errors import SteerError
from steer.extras import require
from steer.generation.completion import Completion
from steer.vectors import SteeringVectors
from steer.weights import BUNDLED, model_path

if TYPE_CHECKING:
    from steer.training.config import SteeringGRPOConfig


class EngineSampler:
    """
    An engine in this process for the model called `name`, with room for the vectors of `members` sets, set up
    by the `vllm_...` fields of `args`. `dtype` is the model's precision in the trainer.
    """

    def __init__(
        self,
        name: str,
        args: SteeringGRPOConfig,
        dtype: torch.dtype,
        members: int,
        stop: Sequence[int],
        **more: Any,
    ):
        if args.vllm_mode != "colocate":
            raise SteerError(
                f"vllm_mode={args.vllm_mode!r} is not for a population, whose processes each sample for "
                "their own members: use colocate"
            )
        require("use_vllm", "vllm")
        from vllm import LLM

        warn_version()
        tokens = args.sampled_tokens()
        tokens = tokens and members * tokens
        eager = enforce_eager(tokens, args.vllm_enforce_eager)
        say_whether_it_pays(tokens, args.max_completion_length, eager)
        local = name in BUNDLED or Path(name).expanduser().exists()
        self.args, self.stop = args, list(stop)
        self.logprobs_mode = logprobs_mode(args)
        self.receipts: dict[str, Receipt] = {}
        settings = {
            "model": str(model_path(name)) if local else name,
            "dtype": str(dtype).removeprefix("torch."),
            "max_model_len": args.vllm_max_model_length,
            "gpu_memory_utilization": args.vllm_gpu_memory_utilization,
            "tensor_parallel_size": args.vllm_tensor_parallel_size,
            "logprobs_mode": self.logprobs_mode or PROCESSED,
            "enforce_eager": eager,
            "additional_config": {"steering_slots": members + 2},  # base model and default set have one
            **whole_prompts(args.vllm_max_model_length),
        }
        self.llm = LLM(**{**settings, **more})

    def sync(self, sets: Mapping[str, SteeringVectors]) -> int:
        """Push the vectors of each of `sets` as they are now; the bytes sent."""
        for name, vectors in sets.items():
            self.receipts[name] = push(self.llm, Artifact(vectors.config, vectors.tensors()), name=name)
        return sum(self.receipts[name].bytes for name in sets)

    def sample(
        self, names: Sequence[str], prompts: Sequence[list[int]], seeds: Sequence[int]
    ) -> list[Completion]:
        """
        A completion of each of `prompts` (token ids) by the set of the same place in `names`. A row with the
        same seed and vectors is the same row. SteerError where the engine held other vectors than pushed.
        """
        from vllm import SamplingParams

        args = self.args
        asked = [
            SamplingParams(
                temperature=args.temperature,
                top_p=args.top_p,
                top_k=args.top_k,
                min_p=args.min_p or 0.0,
                max_tokens=args.max_completion_length,
                stop_token_ids=self.stop,
                seed=seed,
                logprobs=0,
                detokenize=False,
                extra_args=request(name),
            )
            for name, seed in zip(names, seeds, strict=True)
        ]
        answers = self.llm.generate([{"prompt_token_ids": list(p)} for p in prompts], asked, use_tqdm=False)
        for name in dict.fromkeys(names):
            verify(self.llm, self.receipts[name])
        outputs = [answer.outputs[0] for answer in answers]
        return [
            Completion(list(output.token_ids), output.finish_reason != "length", self._logps(output))
            for output in outputs
        ]

    def _logps(self, output: Any) -> list[float] | None:
        if self.logprobs_mode is None:
            return None
        return [at[token].logprob for token, at in zip(output.token_ids, output.logprobs or [], strict=True)]
