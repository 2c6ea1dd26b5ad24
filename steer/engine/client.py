"""
Vectors in a running vLLM engine, from the outside: push, remove, list, and name them in a request.

    from vllm import LLM, SamplingParams
    from steer import engine

    llm = LLM(model)                                    # vLLM loads the plugin itself
    engine.push(llm, "my-vectors")                      # for every request that does not say otherwise
    engine.push(llm, "other-vectors", name="other")
    llm.generate(prompts, SamplingParams(extra_args=engine.request("other", scale=0.5)))
    llm.generate(prompts, SamplingParams(extra_args=engine.request(None)))      # the base model
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from steer.errors import SteerError

if TYPE_CHECKING:
    import torch

    from steer.artifact import Artifact
    from steer.engine.receipt import Receipt

# The set that requests get which name none.
DEFAULT = "default"
NO_PLUGIN = (
    "the engine runs without steer's vLLM plugin: install steer in the engine's environment, and name it in "
    "VLLM_PLUGINS if that is set (VLLM_PLUGINS=steer)"
)


class HasRpc(Protocol):
    """An engine: vLLM's `LLM`, a `Server`, or what else reaches the workers of one."""

    def collective_rpc(self, method: str, *, args: tuple[str, ...] = ...) -> list[Any]: ...


def push(
    llm: HasRpc,
    vectors: str | os.PathLike[str] | Artifact | dict[int, torch.Tensor],
    name: str = DEFAULT,
    positions: str = "all",
) -> Receipt:
    """
    Put `vectors` into the engine under `name`, in place of what it held; other layers get none. Requests in
    flight go on with the new ones.

    Args:
        llm: a vLLM `LLM`, a `Server`, or what else has `collective_rpc(method, args=...)`.
        vectors: an artifact or where one lies (its scale and positions count), or (hidden_size,) tensors by
            layer with `positions`.
        name: of the set.
        positions: the tokens to steer.

    Returns:
        The receipt: `bytes` sent, the engine's `version`, and the checksums that all its workers
        hold now, those of `vectors`. `verify` compares them again later.

    Raises:
        SteerError: for a layer, hidden size or number the model cannot take, for adaptive vectors, for a site
            that is not the residual stream between layers, when there is no room, for an engine without the
            plugin, and where a worker does not hold what was pushed.
    """
    from steer.engine.bank import pack
    from steer.engine.receipt import confirmed

    if not isinstance(vectors, dict):
        vectors, positions = steered_layers(vectors)
    answers = _call(llm.collective_rpc, "steer_push", name, pack(vectors), positions)
    return confirmed(answers, name, vectors, positions)


def verify(llm: HasRpc, receipt: Receipt) -> None:
    """SteerError, with both values, unless all workers of the engine still hold what `receipt` is for."""
    receipt.check(_call(llm.collective_rpc, "steer_held", receipt.name))


def remove(llm: HasRpc, name: str = DEFAULT) -> None:
    """
    Forget the set `name`; SteerError while a request uses it, and for an unknown name. Where one of several
    engines refuses, others may have forgotten it: call again.
    """
    answers = _answers(llm.collective_rpc, "steer_remove", name)
    if not forgotten(answers, name):
        raise SteerError(answers[0]["error"])


def checked(answers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The answers of all workers; SteerError with what one refused."""
    for answer in answers:
        if answer["error"]:
            raise SteerError(answer["error"])
    return answers


def forgotten(answers: Sequence[Mapping[str, Any]], name: str) -> bool:
    """
    Whether an engine held the set `name` until it was removed; SteerError where one holds it still.

    Args:
        answers: what each worker of all engines answered.
        name: of the set. One of several engines may have forgotten it before, when another refused to.
    """
    for answer in answers:
        if answer["error"] and name in answer.get("versions", [name]):
            raise SteerError(answer["error"])
    return not all(answer["error"] for answer in answers)


def names(llm: HasRpc) -> list[str]:
    """The sets that the engine holds, the default one first (zeros unless one was pushed)."""
    return list(_call(llm.collective_rpc, "steer_names")[0]["versions"])


def returned_logprobs(llm: HasRpc) -> str:
    """Which log-probabilities the engine returns: vLLM's `logprobs_mode`."""
    return str(_call(llm.collective_rpc, "steer_names")[0]["logprobs_mode"])


def request(name: str | None = DEFAULT, scale: float = 1.0) -> dict[str, Any]:
    """`SamplingParams(extra_args=request("name"))`: this request gets that set; with None, the base model."""
    return {"steering": {"name": name, "scale": scale}}


class Server:
    """
    A vLLM server at `url`, as `push`, `remove` and `names` take it. It must have been started with
    VLLM_SERVER_DEV_MODE=1, which opens the route that they use, so keep it off public networks.
    """

    def __init__(self, url: str, timeout: float = 60.0):
        self.url = url.rstrip("/")
        self.timeout = timeout

    def collective_rpc(self, method: str, args: tuple[str, ...] = ()) -> list[Any]:
        """Run `method` in every worker of the server; SteerError when it cannot be reached."""
        body = json.dumps({"method": method, "args": args}).encode()
        call = Request(f"{self.url}/collective_rpc", body, {"Content-Type": "application/json"})
        try:
            with urlopen(call, timeout=self.timeout) as answer:
                return json.load(answer)["results"]
        except HTTPError as error:
            if error.code == 404:
                raise SteerError(
                    f"the vLLM server at {self.url} takes no vectors: start it with VLLM_SERVER_DEV_MODE=1"
                ) from error
            raise SteerError(f"the server at {self.url} refused {method} ({error}): {NO_PLUGIN}") from error
        except OSError as error:
            raise SteerError(f"no vLLM server answers at {self.url} ({error}); is it running?") from error


def steered_layers(source: str | os.PathLike[str] | Artifact) -> tuple[dict[int, torch.Tensor], str]:
    """
    What the engine gets of an artifact (or of where one lies): the vectors by layer, and their positions.
    SteerError for adaptive vectors and for sites inside a layer.
    """
    from steer.artifact import Artifact, read

    artifact = source if isinstance(source, Artifact) else read(source)
    config = artifact.config
    if config.kind == "adaptive":
        raise SteerError(
            "adaptive vectors add another amount at every token, which the engine cannot hold: export them "
            "as a PEFT LoRA (`steer export`) and serve that with vLLM's --enable-lora"
        )
    vectors = artifact.by_layer()
    if config.site == "resid_pre" and 0 not in vectors:  # before a layer is after the one below it
        return {layer - 1: vector for layer, vector in vectors.items()}, config.positions
    if config.site != "resid_post":
        layer = " of layer 0" if config.site == "resid_pre" else ""
        raise SteerError(
            f"the engine steers the residual stream after a layer, not site={config.site!r}{layer}; use "
            "resid_post, or transformers"
        )
    return vectors, config.positions


def _call(rpc: Callable[..., list[Any]], method: str, *args: str) -> list[dict[str, Any]]:
    """Run `method` in every worker; what each answers with, or SteerError."""
    return checked(_answers(rpc, method, *args))


def _answers(rpc: Callable[..., list[Any]], method: str, *args: str) -> list[dict[str, Any]]:
    """The same, with what a worker refuses left in its answer."""
    try:
        return rpc(method, args=args)
    except SteerError:
        raise
    except Exception as error:  # the kind depends on the executor
        if method in str(error):
            raise SteerError(NO_PLUGIN) from error
        raise
