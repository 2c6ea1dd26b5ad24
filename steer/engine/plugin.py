"""
The vLLM plugin. vLLM calls `register` in every process (`vllm.general_plugins`), tensor-parallel workers too.

One mechanism for all architectures, at few places in vLLM:

- `Worker.load_model`: once the model is there, its decoder layers are found by structure and each gets a
  `steering` child and a forward hook, before anything is compiled or captured.
- the model runner: before each forward pass the tokens of the batch learn which vectors they get.
- `EngineCore` and `LLMEngine`: a request with an unknown name fails alone, and cached prefixes are kept
  apart by set, version and scale, and by the prompt's length where a set steers some tokens only.
- the worker's `steer_*` methods, which `collective_rpc` reaches from outside: see `steer.engine.client`.

A model whose layers cannot be found runs as ever; pushing vectors to it then says why it cannot be steered.
"""

from __future__ import annotations

import hashlib
import inspect
import logging
import re
from collections.abc import Iterator
from functools import wraps
from typing import Any

import torch
from torch import nn

from steer import hooks
from steer.engine import bank, compat
from steer.engine.alike import check_alike
from steer.engine.bank import DEFAULT, Bank, Choice
from steer.errors import SteerError

logger = logging.getLogger("vllm.steer")  # shown with vLLM's own

# Places for sets of vectors, the base model and the default set among them; --additional-config
# '{"steering_slots": 32}' for another number.
SLOTS = 16
_VECTOR = re.compile(r"(?:^|\.)(\d+)\.steering\.vector$")


def register() -> None:
    """Install the wrappers; once a process, however often it is called."""
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.engine.llm_engine import LLMEngine
    from vllm.v1.worker.gpu_worker import Worker
    from vllm.v1.worker.worker_base import WorkerBase

    if getattr(Worker, "steer_push", None) is not None:
        return
    compat.reload_compiled_graphs()
    compat.rotate_heads_on_cpus()
    Worker.load_model = _load_model(Worker.load_model)
    LLMEngine.add_request = _submit(LLMEngine.add_request)
    EngineCore.preprocess_add_request = _preprocess_add_request(EngineCore.preprocess_add_request)
    EngineCore.add_request = _add_request(EngineCore.add_request)
    EngineCore.collective_rpc = _collective_rpc(EngineCore.collective_rpc)
    WorkerBase.steer_push = steer_push
    WorkerBase.steer_remove = steer_remove
    WorkerBase.steer_unused = steer_unused
    WorkerBase.steer_names = steer_names
    WorkerBase.steer_held = steer_held
    compat.hear_all_engines()


# ---- the model


def _load_model(original: Any) -> Any:
    @wraps(original)
    def load_model(self: Any, *args: Any, **kwargs: Any) -> None:
        config, extra = self.vllm_config, self.vllm_config.additional_config
        self.steering, self.steering_error = None, None
        if not isinstance(extra, dict):  # some platforms put a class of their own there
            self.steering_error = f"cannot steer here: additional_config is a {type(extra).__name__}"
            return original(self, *args, **kwargs)
        slots = extra.get("steering_slots", SLOTS)
        # Part of what vLLM's compile cache is keyed by: a graph cached without the plugin would not steer.
        compiled = inspect.getsource(bank) + inspect.getsource(hooks)
        code = hashlib.sha256(compiled.encode()).hexdigest()[:16]
        config.additional_config = {**extra, "steering": {"slots": slots, "code": code}}
        original(self, *args, **kwargs)
        try:
            self.steering = attach(self.model_runner, config, slots)
        except SteerError as error:
            self.steering_error = str(error)

    return load_model


def attach(runner: Any, config: Any, slots: int) -> Bank:
    """Give every decoder layer of the runner's model its vectors; SteerError when they cannot be found."""
    parallel = config.parallel_config
    if parallel.use_ubatching or getattr(parallel, "prefill_context_parallel_size", 1) > 1:
        raise SteerError("the engine cannot steer split batches: switch off DBO and prefill context parallel")
    model = runner.get_model()
    num_hidden_layers = config.model_config.get_total_num_hidden_layers()
    layers = find_layers(model, num_hidden_layers)
    check_stream(model, layers, config.model_config)
    check_alike(model, config.model_config.hf_text_config, cpu=runner.device.type == "cpu")
    hidden_size = config.model_config.get_hidden_size()
    tokens = config.scheduler_config.max_num_batched_tokens
    sizes = [tokens, *(config.compilation_config.cudagraph_capture_sizes or [])]
    steering = Bank(layers, num_hidden_layers, hidden_size, slots, max(sizes), runner.device)
    _follow_batches(runner, steering)
    _take_pushed_weights(model, steering)
    return steering


def find_layers(model: nn.Module, num_hidden_layers: int) -> dict[int, nn.Module]:
    """
    This process's decoder layers by index: the one list of `num_hidden_layers` modules that is not inside of
    another list, apart from placeholders for the layers of other pipeline stages.
    """
    from vllm.model_executor.models.utils import PPMissingLayer

    if callable(inner := getattr(model, "get_language_model", None)):  # beside a vision tower
        model = inner()
    lists = {name: m for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)}
    outer = {
        name: modules
        for name, modules in lists.items()
        if not any(name.startswith(f"{other}.") for other in lists)
    }
    # Gemma 4 has its layers in two lists.
    stacks = {tuple(modules) for modules in outer.values() if len(modules) == num_hidden_layers}
    if len(stacks) != 1:
        seen = ", ".join(f"{name} ({len(modules)})" for name, modules in outer.items()) or "none"
        raise SteerError(
            f"the engine cannot steer {type(model).__name__}: it has no single list of "
            f"{num_hidden_layers} decoder layers (lists of modules seen: {seen})"
        )
    (layers,) = stacks
    return {i: layer for i, layer in enumerate(layers) if not isinstance(layer, PPMissingLayer)}


def check_stream(model: nn.Module, layers: dict[int, nn.Module], model_config: Any) -> None:
    """SteerError where adding a vector to what a layer returns is not adding it to the residual stream."""
    what = f"the engine cannot steer {type(model).__name__}"
    streams = getattr(model_config.hf_text_config, "altup_num_inputs", 1)
    if streams > 1:
        raise SteerError(f"{what}: its layers return {streams} streams (altup_num_inputs) and not one")
    scaled = any(getattr(layer, "routed_scaling_factor", 1.0) != 1.0 for layer in layers.values())
    if scaled and model_config.dtype == torch.float16:  # DeepSeek, against overflow
        raise SteerError(
            f"{what} in float16, where vLLM divides the residual stream by routed_scaling_factor; start it "
            "with --dtype bfloat16"
        )


def _follow_batches(runner: Any, steering: Bank) -> None:
    """Tell `steering` of the runner's requests, and of each batch just before its forward pass."""

    def see(scheduled: Any) -> None:
        for request in scheduled.finished_req_ids:
            steering.finish_request(request)
        for new in scheduled.scheduled_new_reqs:
            if new.sampling_params is not None:
                steering.add_request(new.req_id, Choice.of(new.sampling_params), new.prompt_len)

    compat.before_batches(runner, see)
    compat.when_prepared(runner, steering.place)


def _take_pushed_weights(model: Any, steering: Bank) -> None:
    """`model.load_weights` takes `model.layers.3.steering.vector` too: trainers push weights that way."""
    original = model.load_weights

    @wraps(original)
    def load_weights(weights: Any, *args: Any, **kwargs: Any) -> Any:
        taken = set()

        def others() -> Iterator[tuple[str, torch.Tensor]]:
            for name, tensor in weights:
                if ".steering." not in name:
                    yield name, tensor
                    continue
                match = _VECTOR.search(name)
                if match is None:
                    raise SteerError(
                        f"{name} is not the vector of a layer: expected a name like "
                        "model.layers.3.steering.vector"
                    )
                steering.set_default(int(match[1]), tensor)
                taken.add(name)

        return taken | (original(others(), *args, **kwargs) or set())

    model.load_weights = load_weights


# ---- requests


def _preprocess_add_request(original: Any) -> Any:
    @wraps(original)
    def preprocess_add_request(self: Any, request: Any) -> Any:
        choice = Choice.of(request.sampling_params)
        if choice.names and choice.scale:
            stamp = _stamp(self, choice, request)
            request.cache_salt = f"{request.cache_salt}|{stamp}" if request.cache_salt else stamp
        return original(self, request)

    return preprocess_add_request


def _stamp(core: Any, choice: Choice, request: Any) -> str:
    """
    What a request's cached prefixes are kept apart by. Which tokens a set for some positions steers depends
    on where the prompt ends: the answer of one turn is part of the next one's prompt.
    """
    sets = "+".join(f"{name}:{_versions(core).get(name, 0)}" for name in choice.names)
    stamp = f"steering:{sets}:{choice.scale!r}"
    if not core.__dict__.get("steering_partial", set()).isdisjoint(choice.names):
        tokens = request.prompt_token_ids
        stamp += f":{len(request.prompt_embeds if tokens is None else tokens)}"
    return stamp


def _submit(original: Any) -> Any:
    @wraps(original)
    def add_request(self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        choice = Choice.of(params)
        core = getattr(self.engine_core, "engine_core", None)  # when it is in this process
        if core is not None:
            _check_name(core, choice)
        return original(self, request_id, prompt, params, *args, **kwargs)

    return add_request


def _add_request(original: Any) -> Any:
    @wraps(original)
    def add_request(self: Any, request: Any, *args: Any, **kwargs: Any) -> None:
        try:
            _check_name(self, Choice.of(request.sampling_params))
        except SteerError as error:
            if not compat.fail_request(self, request):
                raise
            logger.error("request %s: %s", request.request_id, error)
            return
        original(self, request, *args, **kwargs)

    return add_request


def _check_name(core: Any, choice: Choice) -> None:
    known = _versions(core)
    for name in choice.names:
        if name != DEFAULT and name not in known:
            raise SteerError(f"no vectors named {name!r}; the engine has {', '.join(known) or 'none'}")


def _versions(core: Any) -> dict[str, int]:
    return core.__dict__.get("steering_versions", {})


def _collective_rpc(original: Any) -> Any:
    @wraps(original)
    def collective_rpc(
        self: Any, method: Any, timeout: float | None = None, args: tuple = (), kwargs: Any = None
    ) -> list[Any]:
        if method in ("steer_remove", "steer_unused"):
            running = self.scheduler.requests.values()
            using = sum(args[0] in Choice.of(request.sampling_params).names for request in running)
            if using and args[0] != DEFAULT:  # in whose place there are zeros then
                return [{"error": f"{args[0]!r} is used by {using} unfinished requests: wait or abort them"}]
        answers = original(self, method, timeout, args, kwargs)
        if isinstance(method, str) and method.startswith("steer_"):
            self.steering_versions = answers[0].get("versions", {})
            self.steering_partial = set(answers[0].get("partial", []))
        return answers

    return collective_rpc


# ---- what collective_rpc calls in every worker; errors are told, not raised: any transport keeps their text


def steer_push(self: Any, name: str, packed: str, positions: str = "all") -> dict[str, Any]:
    return _answer(self, lambda steering: steering.push(name, bank.unpack(packed), positions), name)


def steer_remove(self: Any, name: str) -> dict[str, Any]:
    return _answer(self, lambda steering: steering.remove(name))


def steer_unused(self: Any, name: str) -> dict[str, Any]:
    """An error while a request uses the set, from `_collective_rpc`: workers do not know."""
    return _answer(self)


def steer_names(self: Any) -> dict[str, Any]:
    mode = self.vllm_config.model_config.logprobs_mode
    return {**_answer(self), "logprobs_mode": mode}


def steer_held(self: Any, name: str) -> dict[str, Any]:
    return _answer(self, name=name)


def _answer(worker: Any, do: Any = None, name: str | None = None) -> dict[str, Any]:
    """What a worker answers when it has done `do`, with what it holds under `name`."""
    if worker.steering is None:
        return {"error": worker.steering_error}
    error = None
    with torch.inference_mode():
        try:
            if do is not None:
                do(worker.steering)
        except SteerError as refused:
            error = str(refused)
        held = {} if name is None else {"held": worker.steering.held(name)}
    told = {"versions": worker.steering.versions(), "partial": worker.steering.partial()}
    return {"error": error, **told, **held}
