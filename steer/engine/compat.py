"""
What the plugin uses of vLLM beyond its documented interface, all of it checked with vLLM 0.32: the methods
that it wraps and the private names that it calls. tests/engine/test_compat.py names the entry of `APIS` that
another version changed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import wraps
from typing import Any
from unittest.mock import patch

import torch

from steer.compat import MORE, Api

CHECKED = "0.32"
_VLLM = f"vLLM {CHECKED}.0"
_WORKER, _CORE, _ENGINE = (
    "vllm.v1.worker",
    "vllm.v1.engine.core.EngineCore",
    "vllm.v1.engine.llm_engine.LLMEngine",
)
_RUNNERS = (f"{_WORKER}.gpu_model_runner.GPUModelRunner", f"{_WORKER}.gpu.model_runner.GPUModelRunner")
_ROTARY = "vllm.model_executor.layers.rotary_embedding.base.RotaryEmbedding"
_SELF = ("self",)

APIS: tuple[Api, ...] = (
    Api(f"{_WORKER}.gpu_worker.Worker.load_model", _VLLM, "wraps it", (*_SELF, MORE)),
    Api(f"{_WORKER}.worker_base.WorkerBase", _VLLM, "adds methods to it"),
    *(
        Api(f"{runner}.execute_model", _VLLM, "wraps it", (*_SELF, "scheduler_output", MORE))
        for runner in _RUNNERS
    ),
    Api(f"{_RUNNERS[0]}._prepare_inputs", _VLLM, "wraps it", (*_SELF, "scheduler_output", MORE)),
    Api(f"{_RUNNERS[1]}.prepare_inputs", _VLLM, "wraps it", (*_SELF, MORE)),
    Api(f"{_ENGINE}.add_request", _VLLM, "wraps it", (*_SELF, "request_id", "prompt", "params", MORE)),
    Api(f"{_CORE}.preprocess_add_request", _VLLM, "wraps it", (*_SELF, "request")),
    Api(f"{_CORE}.add_request", _VLLM, "wraps it", (*_SELF, "request", MORE)),
    Api(f"{_CORE}.collective_rpc", _VLLM, "wraps it", (*_SELF, "method", "timeout", "args", "kwargs")),
    Api(
        "vllm.v1.engine.core.EngineCoreProc._send_error_outputs_to_client",
        _VLLM,
        "calls it for a request with an unknown name",
        (*_SELF, "req_ids", "client_index"),
    ),
    Api(
        "vllm.v1.engine.core_client.DPLBAsyncMPClient.call_utility_async",
        _VLLM,
        "wraps it",
        (*_SELF, "method", "args"),
    ),
    Api(
        "vllm.v1.engine.core_client.AsyncMPClient.call_utility_all_async",
        _VLLM,
        "calls it",
        (*_SELF, "method", "args"),
    ),
    Api(
        f"{_ROTARY}.forward_cpu",
        _VLLM,
        "wraps it",
        (*_SELF, "positions", "query", "key"),
    ),
    Api("vllm.model_executor.models.utils.PPMissingLayer", _VLLM, "leaves out such layers"),
    Api("vllm.v1.engine.exceptions.EngineDeadError", _VLLM, "catches it"),
    Api(
        "vllm.compilation.decorators._try_load_aot_compiled_fn",
        _VLLM,
        "wraps it",
        ("model", "aot_compilation_path"),
    ),
    Api(
        "vllm.compilation.caching.VllmSerializableFunction.finalize_loading",
        _VLLM,
        "adds its like to graphs of other backends",
        (*_SELF, "vllm_config"),
    ),
    Api(
        "torch._dynamo.aot_compile_types.BundledAOTAutogradSerializableCallable.deserialize_compile_artifacts",
        "torch 2.13.0",
        "wraps it while vLLM loads a graph",
        ("data",),
    ),
)


def reload_compiled_graphs() -> None:
    """
    Let vLLM load the compiled graphs that it saved on a CPU.

    vLLM calls `finalize_loading` of each graph that it loads. The graphs of its own backend have that method,
    those of torch's inductor, which it uses on a CPU, do not: it compiled them again at every start.
    """
    from torch._dynamo.aot_compile_types import BundledAOTAutogradSerializableCallable
    from vllm.compilation import decorators

    load = decorators._try_load_aot_compiled_fn
    deserialize = BundledAOTAutogradSerializableCallable.deserialize_compile_artifacts

    def deserialize_compile_artifacts(data: bytes) -> Any:
        graph = deserialize(data)
        if not hasattr(graph, "finalize_loading"):
            graph.finalize_loading = lambda vllm_config: None
        return graph

    @wraps(load)
    def _try_load_aot_compiled_fn(model: Any, aot_compilation_path: str) -> Any:
        with patch.object(
            BundledAOTAutogradSerializableCallable,
            "deserialize_compile_artifacts",
            deserialize_compile_artifacts,
        ):
            return load(model, aot_compilation_path)

    decorators._try_load_aot_compiled_fn = _try_load_aot_compiled_fn


def rotate_heads_on_cpus() -> None:
    """
    Let vLLM's CPU build rotate queries and keys of shape (tokens, heads, head_dim), as those of LFM2 and
    DeepSeek are. Its kernel takes the stride between heads for the one between tokens; rows of shape (tokens,
    heads * head_dim) are right.
    """
    from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

    forward = RotaryEmbedding.forward_cpu

    def rows(heads: torch.Tensor | None) -> torch.Tensor | None:
        return heads if heads is None or heads.dim() != 3 else heads.flatten(1)

    @wraps(forward)
    def forward_cpu(self: Any, positions: Any, query: torch.Tensor, key: torch.Tensor | None = None) -> Any:
        turned, other = forward(self, positions, rows(query), rows(key))
        return turned.view(query.shape), other if key is None else other.view(key.shape)

    RotaryEmbedding.forward_cpu = forward_cpu


def whole_prompts(longest: int | None) -> dict[str, Any]:
    """
    Settings of an engine whose requests have seeds: on a CPU it reads no prompt in pieces. That makes vLLM
    take back a draw, which a CPU's seeded generators cannot.

    Args:
        longest: the most tokens of a prompt and its answer; None for the model's own limit.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return {}
    # without a `longest`, vLLM makes room for the model's
    room = {} if longest is None else {"max_num_batched_tokens": max(4096, longest)}
    return {"enable_chunked_prefill": False, **room}


def warn_version() -> None:
    """trl's warning of a vLLM version that it does not support, unless steer was checked with that one."""
    import vllm
    from trl.import_utils import is_vllm_available

    if not vllm.__version__.startswith(f"{CHECKED}."):
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            is_vllm_available()


def hear_all_engines() -> None:
    """
    Let `collective_rpc` of a `steer_` method return the answers of all data-parallel engines. vLLM asks all
    and returns those of the first.
    """
    from vllm.v1.engine.core_client import DPLBAsyncMPClient

    call_first = DPLBAsyncMPClient.call_utility_async

    @wraps(call_first)
    async def call_utility_async(self: Any, method: str, *args: Any) -> Any:
        if method != "collective_rpc" or not str(args[0]).startswith("steer_"):
            return await call_first(self, method, *args)
        engines = await self.call_utility_all_async(method, *args)
        return [answer for answers in engines for answer in answers]

    DPLBAsyncMPClient.call_utility_async = call_utility_async


def before_batches(runner: Any, see: Callable[[Any], None]) -> None:
    """Call `see(scheduler_output)` before the model runner executes it."""
    execute = runner.execute_model

    @wraps(execute)
    def execute_model(scheduled: Any, *args: Any, **kwargs: Any) -> Any:
        see(scheduled)
        return execute(scheduled, *args, **kwargs)

    runner.execute_model = execute_model


def when_prepared(runner: Any, place: Callable[[list[str], torch.Tensor, torch.Tensor], None]) -> None:
    """
    Call `place(requests, starts, positions)` before each forward pass, for both of vLLM's model runners.

    `requests`: their ids in the order of the batch. `starts`: (requests + 1,), where the tokens of each
    begin. `positions`: (tokens,), the position of each token in its sequence.
    """
    if hasattr(runner, "_prepare_inputs"):  # vLLM's first model runner, which CPUs use
        prepare = runner._prepare_inputs

        @wraps(prepare)
        def _prepare_inputs(scheduled: Any, *args: Any, **kwargs: Any) -> Any:
            prepared = prepare(scheduled, *args, **kwargs)
            tokens = scheduled.total_num_scheduled_tokens
            requests = runner.input_batch.req_ids
            place(requests, runner.query_start_loc.gpu[: len(requests) + 1], runner.positions[:tokens])
            return prepared

        runner._prepare_inputs = _prepare_inputs
        return
    prepare_v2 = runner.prepare_inputs

    @wraps(prepare_v2)
    def prepare_inputs(*args: Any, **kwargs: Any) -> Any:
        batch = prepare_v2(*args, **kwargs)
        starts = batch.query_start_loc[: len(batch.req_ids) + 1]
        place(batch.req_ids, starts, batch.positions[: batch.num_tokens])
        return batch

    runner.prepare_inputs = prepare_inputs


def fail_request(core: Any, request: Any) -> bool:
    """End one request of an engine process with an error; False for an engine in the caller's process."""
    if not hasattr(core, "_send_error_outputs_to_client"):
        return False
    core._send_error_outputs_to_client([request.request_id], request.client_index)
    return True
