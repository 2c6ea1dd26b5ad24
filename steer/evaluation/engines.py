"""
Two ways to get completions of one base model and its variants: `hf` (transformers, runs anywhere) and `vllm`.

Every row draws from random numbers of its own, keyed by the run's seed, the problem and the sample, and
never by the variant: variants meet the same luck. With `hf` a completion depends on the batch it was in
only as far as the rounding of matrix products does; vLLM's kernels and batches may round differently from
run to run.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from steer.engine.eager import enforce_eager
from steer.errors import SteerError
from steer.evaluation.variants import Variant, adapter_rank
from steer.generation.completion import Completion
from steer.weights import BUNDLED, model_path

if TYPE_CHECKING:
    from transformers import GenerationConfig

ENGINES = ("hf", "vllm")


@dataclass(frozen=True)
class Decoding:
    """How tokens are drawn: temperature 0 is greedy."""

    max_new_tokens: int
    stop: tuple[int, ...]
    temperature: float
    top_p: float = 1.0


class Engine(Protocol):
    def variant(self, variant: Variant) -> AbstractContextManager[None]:
        """Inside, `complete` samples from this variant."""

    def complete(
        self, prompts: Sequence[list[int]], seeds: Sequence[int], decoding: Decoding
    ) -> list[Completion]:
        """One completion for each prompt (token ids), from the random numbers of its seed."""


def row_seed(seed: int, problem: str, sample: int) -> int:
    """The seed of one completion's random numbers: 48 bits, the same for every variant and engine."""
    return int.from_bytes(hashlib.sha256(f"{seed} {problem} {sample}".encode()).digest()[:6], "big")


def source_of(name: str) -> str:
    """What transformers and vLLM load for a model name of `steer.models`: a local folder or a hub id."""
    return str(model_path(name)) if name in BUNDLED or Path(name).expanduser().exists() else name


def generation_config(name: str, revision: str | None) -> GenerationConfig | None:
    """
    The generation config that the model `name` has once it is loaded: the saved one, or what its config.json
    says of generation where none can be read. None where neither can be.
    """
    from transformers import GenerationConfig, PreTrainedConfig

    source, revision = source_of(name), revision or "main"
    try:
        return GenerationConfig.from_pretrained(source, revision=revision)
    except OSError:
        pass
    try:
        fields, _ = PreTrainedConfig.get_config_dict(source, revision=revision)
    except OSError:
        return None
    return GenerationConfig.from_model_config(fields)


# ---- transformers


class HfEngine:
    """Samples with `steer.generation.sampler`, which reads a prompt once for all of its samples."""

    def __init__(self, name: str, revision: str | None, dtype: str, trust_remote_code: bool = False):
        import torch

        from steer.generation import allocator
        from steer.models import load_model

        device = str(torch.accelerator.current_accelerator()) if torch.accelerator.is_available() else None
        if device is None:
            allocator.keep_freed_memory()
        self.model = load_model(
            name,
            revision=revision,
            dtype=dtype,
            device_map=device,
            trust_remote_code=trust_remote_code,
        )

    @contextmanager
    def variant(self, variant: Variant) -> Iterator[None]:
        if variant.kind == "vectors":
            import steer

            vectors = steer.load(variant.path, self.model)
            vectors.scale = vectors.scale * variant.scale
            try:
                yield
            finally:
                steer.detach(self.model)
        elif variant.kind == "adapter":
            from peft import PeftModel

            try:
                adapted = PeftModel.from_pretrained(self.model, variant.path)
            except (ValueError, RuntimeError, KeyError, TypeError) as error:  # another base, unknown method
                raise SteerError(f"{variant.path} does not fit this model ({_line(error)})") from error
            try:
                yield
            finally:
                self.model = adapted.unload()
        else:
            yield

    def complete(
        self, prompts: Sequence[list[int]], seeds: Sequence[int], decoding: Decoding
    ) -> list[Completion]:
        import torch

        from steer.generation import allocator
        from steer.generation.sampler import Sampling, rollout, uniforms

        allocator.limit_kept_memory(self.model.device)
        sampling = Sampling(
            decoding.max_new_tokens, decoding.stop, temperature=decoding.temperature, top_p=decoding.top_p
        )
        noise = None
        if decoding.temperature:
            noise = torch.cat([uniforms([0], decoding.max_new_tokens, seed, 0) for seed in seeds])
        try:
            return rollout(self.model, prompts, sampling, noise, share_beginning=True)
        except torch.OutOfMemoryError as error:
            raise SteerError(
                f"out of memory with {len(prompts)} answers of up to {decoding.max_new_tokens} tokens at "
                "once; run the same command with a smaller --batch-size to go on"
            ) from error


# ---- vLLM


class VllmEngine:
    """
    One `LLM` for all variants: vectors are pushed into it by name, adapters are LoRA requests. `tokens` are
    the most that it will sample.
    """

    def __init__(
        self,
        name: str,
        revision: str | None,
        dtype: str,
        max_len: int,
        variants: Sequence[Variant],
        engine_args: dict[str, Any] | None = None,
        tokens: int | None = None,
    ):
        try:
            from vllm import LLM
        except ImportError as error:
            raise SteerError(
                f"--engine vllm needs vLLM, which does not import here ({_line(error)}); install it, or use "
                "--engine hf"
            ) from error
        from steer.engine.compat import whole_prompts

        adapters = [variant for variant in variants if variant.kind == "adapter"]
        asked: dict[str, Any] = {
            "model": source_of(name),
            "revision": revision,
            "dtype": dtype,
            "max_model_len": max_len,
            "enforce_eager": enforce_eager(tokens, (engine_args or {}).get("enforce_eager")),
        }
        if adapters:
            ranks = {variant.name: adapter_rank(variant.path) for variant in adapters}
            unknown = [name for name, rank in ranks.items() if not rank]
            if unknown:
                raise SteerError(
                    f"vLLM serves LoRA adapters alone and {unknown[0]!r} is none; use --engine hf"
                )
            asked |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": _served_rank(max(ranks.values()))}
        asked |= whole_prompts(max_len)
        try:
            self.llm = LLM(**{**asked, **(engine_args or {})})
        except (ValueError, RuntimeError, TypeError) as error:
            raise SteerError(f"vLLM does not start with {name!r}: {_line(error)}") from error
        self._extra: dict[str, Any] = {}
        self._lora: Any = None
        self._loras = 0

    @contextmanager
    def variant(self, variant: Variant) -> Iterator[None]:
        from steer import engine

        if variant.kind == "vectors":
            engine.push(self.llm, variant.path, name="evaluated")
            self._extra = engine.request("evaluated", variant.scale)
        elif variant.kind == "adapter":
            from vllm.lora.request import LoRARequest

            self._loras += 1  # ids are never used twice: vLLM caches adapters by them
            self._lora = LoRARequest(variant.name, self._loras, variant.path)
        try:
            yield
        finally:
            if variant.kind == "vectors":
                engine.remove(self.llm, "evaluated")
            self._extra, self._lora = {}, None

    def complete(
        self, prompts: Sequence[list[int]], seeds: Sequence[int], decoding: Decoding
    ) -> list[Completion]:
        from vllm import SamplingParams

        params = [
            SamplingParams(
                temperature=decoding.temperature,
                top_p=decoding.top_p,
                max_tokens=decoding.max_new_tokens,
                seed=seed if decoding.temperature else None,
                stop_token_ids=list(decoding.stop),
                detokenize=False,
                extra_args=self._extra or None,
            )
            for seed in seeds
        ]
        asked: Any = [{"prompt_token_ids": ids} for ids in prompts]
        outputs = self.llm.generate(asked, params, use_tqdm=False, lora_request=self._lora)
        ends = [output.outputs[0] for output in outputs]
        return [Completion(list(end.token_ids), end.finish_reason != "length") for end in ends]


def _served_rank(rank: int) -> int:
    """vLLM makes room for these ranks only."""
    return next((r for r in (8, 16, 32, 64, 128, 256, 320, 512) if r >= rank), rank)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
