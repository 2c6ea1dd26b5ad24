"""
Vectors in vLLM's OpenAI-compatible server: each set is a model of its own name, as LoRA modules are.

`steer serve` starts `vllm serve` with this endpoint plugin. The `model` of a request is an expression
(`steer.expression`): `math` gets the vectors of that set, `math@0.7+brief@-0.3` a sum, `base` or the base
model's own name none. With `steering` in the body each set has layers and positions too. On
/v1/chat/completions a chat of one question is put to a set as in its training (`steer.engine.chat`). Sets
come and go while the server runs:

    GET    /v1/steering                  the sets, with their artifacts and scales
    POST   /v1/steering                  {"name": "math", "artifact": "runs/math/vectors", "scale": 1.0}
    DELETE /v1/steering/math
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from http import HTTPStatus
from itertools import count
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from steer.artifact import Artifact, read
from steer.config import SteeringConfig
from steer.engine.bank import DEFAULT, pack
from steer.engine.chat import AS_SENT, agreed_prompt, is_question, put, served_prompt
from steer.engine.client import NO_PLUGIN, checked, forgotten, steered_layers
from steer.engine.mixes import Mixes
from steer.engine.plugin import SLOTS
from steer.engine.receipt import confirmed
from steer.errors import SteerError, shown
from steer.expression import BASE, Term, check_name, from_json, parse
from steer.identity import check_shape, names_another_base, tokenizer_checksum
from steer.mixture import chosen
from steer.models import load_tokenizer
from steer.prompt import PromptSpec

logger = logging.getLogger("vllm.steer")  # shown with vLLM's own

# How `steer serve` tells the server what to start with: JSON, `vectors` with [name, artifact, scale] of each
# set, and `template`, `model` and `base_adapter` as its options.
VARIABLE = "STEER_SERVE"
CHAT = "/v1/chat/completions"
PATHS = ("/v1/completions", CHAT, "/v1/responses", "/v1/messages")
# Where vectors change nothing.
TOKENS = ("/tokenize", "/detokenize", "/v1/messages/count_tokens")
_NUMBERS = count()


@dataclass(frozen=True)
class Served:
    """A set of vectors: where it came from, the factor it was pushed with, and what was pushed."""

    artifact: str
    scale: float
    vectors: Artifact
    prompt: PromptSpec | None = None  # how chats of one question are put; None for as they come
    number: int = field(default_factory=lambda: next(_NUMBERS))  # no two sets have the same


@dataclass(frozen=True)
class Asked:
    """What a request asks for: the terms of its sum, and the set whose prompt is used, where it is told."""

    terms: tuple[Term, ...]
    prompt: str | None = None


class Vectors:
    """vLLM's endpoint plugin (entry point `vllm.endpoint_plugins`)."""

    name = "steer"
    required_tasks = ("generate",)

    def __init__(self) -> None:
        self.sets: dict[str, Served] = {}
        self.engine: Any = None
        self.models: Any = None
        self.tokenizer: Any = None
        self.template: str | None = None
        self.slots = SLOTS
        self.processes = 1  # that answer requests
        self.shape: tuple[int, int, str] = (0, 0, "")  # of the model: hidden size, layers, architecture
        self.base: tuple[str | None, str | None] = (None, None)  # the model and the adapter that is merged in
        self.mixes = Mixes(self._push, self._forget, lambda: self.slots - 2 - len(self.sets))

    def attach_router(self, app: FastAPI) -> None:
        app.add_middleware(_Choose, vectors=self)
        app.add_api_route("/v1/models", self._list_models, methods=["GET"])
        app.add_api_route("/v1/steering", self._list, methods=["GET"])
        app.add_api_route("/v1/steering", self._add, methods=["POST"])
        app.add_api_route("/v1/steering/{name:path}", self._remove, methods=["DELETE"])

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        self.engine, self.models = engine_client, state.openai_serving_models
        extra = engine_client.vllm_config.additional_config
        self.slots = extra.get("steering_slots", SLOTS) if isinstance(extra, dict) else SLOTS
        self.processes = args.api_server_count or 1
        model = engine_client.vllm_config.model_config
        depth = model.get_total_num_hidden_layers()
        self.shape = (model.get_hidden_size(), depth, model.hf_text_config.model_type)
        self.tokenizer = await asyncio.to_thread(
            load_tokenizer,
            args.tokenizer or args.model,
            revision=args.tokenizer_revision or (None if args.tokenizer else args.revision),
            trust_remote_code=args.trust_remote_code,
        )
        start = json.loads(os.environ.get(VARIABLE, "{}"))
        self.template = start.get("template")
        self.base = start.get("model", args.model), start.get("base_adapter")
        for name, artifact, scale in start.get("vectors", []):
            await self.add(name, artifact, scale)

    # ---- the sets

    async def add(self, name: str, artifact: str, scale: float = 1.0) -> None:
        """Push the artifact under `name`, in place of what has it; SteerError when that cannot be."""
        if self.processes > 1:
            raise SteerError(
                f"{self.processes} processes answer requests, and each would have sets of its own: start the "
                "server with --api-server-count 1, as steer serve does"
            )
        check_name(name)
        if self.models.is_base_model(name) or name == DEFAULT:
            raise SteerError(f"{name!r} cannot name vectors: it is the base model's, or reserved")
        pushed = await asyncio.to_thread(read, artifact)
        # vLLM may call a model type otherwise
        check_shape(pushed.config, *self.shape[:2], pushed.config.model_type, str(artifact))
        pushed = replace(pushed, config=replace(pushed.config, scale=scale * pushed.config.scale))
        vectors, positions = steered_layers(pushed)
        prompt, _ = served_prompt(pushed.config.prompt, self.template)
        async with self.mixes.changed:
            if name not in self.sets:
                await self.mixes.free(1)
            try:
                await self._push(name, vectors, positions)
            except SteerError:
                if name not in self.sets:  # one engine of several may have taken it
                    with suppress(SteerError):
                        await self._forget(name)
                raise
            self.sets[name] = Served(str(artifact), scale, pushed, prompt)
        await asyncio.to_thread(self._tell_of_differences, pushed.config, name)

    def _tell_of_differences(self, config: SteeringConfig, name: str) -> None:
        """Warn of vectors that were made for another model of the same shape, as far as that is known."""
        if warning := names_another_base(config, *self.base, name):
            logger.warning(warning)
        vocabulary, made_for = config.tokenizer_checksum, config.base_model_name_or_path
        if config.model_type != self.shape[2]:
            logger.warning("%s: made for a %s, and vLLM serves a %s", name, config.model_type, self.shape[2])
        if vocabulary and vocabulary != tokenizer_checksum(self.tokenizer):
            logger.warning("%s: made for %s, which has another vocabulary than this model", name, made_for)

    async def remove(self, name: str) -> None:
        async with self.mixes.changed:
            await self._forget(name)
            self.sets.pop(name, None)
            self.mixes.changed.notify_all()

    async def _push(self, name: str, vectors: dict[int, Any], positions: str) -> None:
        answers = checked(await self._call("steer_push", name, pack(vectors), positions))
        confirmed(answers, name, vectors, positions)

    async def _forget(self, name: str) -> None:
        checked(await self._call("steer_unused", name))  # before one engine forgets what another uses
        forgotten(await self._call("steer_remove", name), name)

    async def _call(self, method: str, *args: str) -> list[dict[str, Any]]:
        """What all workers answer, refusals too."""
        try:
            return await self.engine.collective_rpc(method, args=args)
        except Exception as error:  # the kind depends on the executor
            raise SteerError(f"{error}: {NO_PLUGIN}" if method in str(error) else str(error)) from error

    # ---- requests

    def choose(self, body: dict[str, Any]) -> Asked | None:
        """
        What the body of a request asks for; None for the base model under its own name and for what else
        vLLM serves. SteerError for what cannot be, KeyError for a name that nobody has.
        """
        model, steering = body.get("model"), body.get("steering")
        if not isinstance(model, str | None):  # vLLM says that it is none
            return None
        others = model is not None and (
            self.models.is_base_model(model) or model in self.models.lora_requests
        )
        if steering is not None:
            if model not in (None, BASE) and not self.models.is_base_model(model):
                raise SteerError(
                    f"model={shown(model)} and steering both choose vectors: name the sets in steering, and "
                    "the base model in model"
                )
            asked = Asked(*from_json(steering))
        elif model is None or (others and model not in self.sets):
            return None
        else:
            bare = model
            for path in self.models.base_model_paths:
                bare = bare.removeprefix(f"{path.name}:")
            asked = Asked(parse(bare))
        for term in asked.terms:
            if term.name not in self.sets:
                raise KeyError(term.name)
        return asked

    def prompt(self, asked: Asked) -> PromptSpec | None:
        """The prompt of a chat of one question; None for as sent. SteerError where the sets disagree."""
        if asked.prompt == AS_SENT and AS_SENT not in self.sets:
            return None
        if asked.prompt is not None:
            return self.sets[asked.prompt].prompt
        return agreed_prompt({term.name: self.sets[term.name].prompt for term in asked.terms})

    @asynccontextmanager
    async def held(self, asked: Asked) -> AsyncIterator[dict[str, Any]]:
        """Inside, the engine holds what is asked for; the extra arguments of a request that gets it."""
        sets = {term.name: self.sets[term.name] for term in asked.terms}
        parts = await asyncio.to_thread(
            chosen, asked.terms, {name: served.vectors for name, served in sets.items()}
        )
        terms = sorted((term for term in asked.terms if term.scale), key=lambda term: term.name)
        if not parts:
            yield {"steering": [], "steering_scale": 1.0}
        elif len(terms) == 1 and terms[0] == Term(terms[0].name, terms[0].scale):
            yield {"steering": terms[0].name, "steering_scale": terms[0].scale}
        else:
            key = tuple((term, sets[term.name].number) for term in terms)
            async with self.mixes.use(key, parts) as names:
                yield {"steering": names, "steering_scale": 1.0}

    def known(self) -> list[str]:
        names = [path.name for path in self.models.base_model_paths]
        return [*names, *self.models.lora_requests, *self.sets]

    # ---- routes

    async def _list(self) -> JSONResponse:
        listed = {
            name: {"artifact": s.artifact, "scale": s.scale, "prompt": s.prompt and s.prompt.to_dict()}
            for name, s in self.sets.items()
        }
        return JSONResponse({"vectors": listed})

    async def _add(self, request: Request) -> JSONResponse:
        try:
            body = await request.json()
            given = {key: body.pop(key) for key in ("name", "artifact", "scale") if key in body}
            if body or not isinstance(given["name"], str) or not isinstance(given["artifact"], str):
                raise TypeError
            scale = float(given.get("scale", 1.0))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError):
            return _error(
                HTTPStatus.BAD_REQUEST,
                'expected {"name": "math", "artifact": "a folder or hub id", "scale": 1.0}, no scale is 1',
            )
        try:
            await self.add(given["name"], given["artifact"], scale)
        except SteerError as error:
            return _error(HTTPStatus.BAD_REQUEST, str(error))
        return JSONResponse({"name": given["name"], "artifact": given["artifact"], "scale": scale})

    async def _remove(self, name: str) -> JSONResponse:
        if name not in self.sets:
            return _error(HTTPStatus.NOT_FOUND, self.missing(name))
        try:
            await self.remove(name)
        except SteerError as error:
            return _error(HTTPStatus.CONFLICT, str(error))
        return JSONResponse({"removed": name})

    async def _list_models(self) -> JSONResponse:
        listed = (await self.models.show_available_models()).model_dump()
        parent = listed["data"][0]
        for name, served in self.sets.items():
            listed["data"].append({**parent, "id": name, "root": served.artifact, "parent": parent["id"]})
        return JSONResponse(listed)

    def missing(self, name: str) -> str:
        return f"The model `{name}` does not exist; there are {', '.join(self.known())}."


class _Choose:
    """Turns what a request asks for into the name of the base model and what the engine knows the sets by."""

    def __init__(self, app: Any, vectors: Vectors):
        self.app = app
        self.vectors = vectors

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if not _may_steer(scope):
            await self.app(scope, receive, send)
            return
        body, gone = b"", False
        while True:
            message = await receive()
            gone = message["type"] == "http.disconnect"
            body += message.get("body", b"")
            if gone or not message.get("more_body"):
                break
        if gone:
            return
        async with AsyncExitStack() as held:
            try:
                changed = await self._changed(scope["path"], body, held)
            except KeyError as error:
                await _error(HTTPStatus.NOT_FOUND, self.vectors.missing(error.args[0]))(scope, receive, send)
                return
            except SteerError as error:
                await _error(HTTPStatus.BAD_REQUEST, str(error))(scope, receive, send)
                return
            if changed is not None:
                body = changed
                headers = [(key, value) for key, value in scope["headers"] if key != b"content-length"]
                scope = {**scope, "headers": [*headers, (b"content-length", str(len(body)).encode())]}
            sent = False

            async def replay() -> Any:
                nonlocal sent
                if sent:
                    return await receive()
                sent = True
                return {"type": "http.request", "body": body, "more_body": False}

            await self.app(scope, replay, send)

    async def _changed(self, path: str, body: bytes, held: AsyncExitStack) -> bytes | None:
        """The body that vLLM gets, while `held` is open; None for the one that was sent."""
        try:
            given = json.loads(body)
        except (ValueError, RecursionError):  # vLLM says what is wrong with it
            return None
        if not isinstance(given, dict):
            return None
        if not path.endswith(PATHS):
            return self._without_vectors(path, given)
        vectors = self.vectors
        asked = vectors.choose(given)
        if asked is None:
            return None
        if asked.prompt not in (None, AS_SENT) and not path.endswith(CHAT):
            raise SteerError(
                f"steering.prompt={shown(asked.prompt)}: {path} takes what it is sent as it is, and only "
                f"{CHAT} puts a question as in training; leave prompt out"
            )
        given.pop("steering", None)
        for name in ("vllm_xargs", "chat_template_kwargs"):
            if not isinstance(given.get(name), dict | None):
                raise SteerError(f"{name}={shown(given[name])} is not an object")
        if given.get("use_beam_search") and any(term.scale for term in asked.terms):
            raise SteerError(
                "use_beam_search=true: vLLM's beam search takes no vectors; sample, or ask the base model"
            )
        if path.endswith(CHAT) and is_question(given):
            prompt = vectors.prompt(asked)
            if prompt is not None:
                given = await asyncio.to_thread(put, given, prompt, vectors.tokenizer)
        extra = await held.enter_async_context(vectors.held(asked))
        given["model"] = vectors.models.base_model_paths[0].name
        given["vllm_xargs"] = {**(given.get("vllm_xargs") or {}), **extra}
        return json.dumps(given).encode()

    def _without_vectors(self, path: str, given: dict[str, Any]) -> bytes | None:
        """The same for a route that passes no vectors on."""
        only = f"only {', '.join(PATHS)} do"
        if given.get("steering") is not None:
            raise SteerError(f"{path} takes no steering, {only}")
        try:
            asked = self.vectors.choose(given)
        except (KeyError, SteerError):  # vLLM says that there is no such model, where it asks for one
            return None
        if asked is None:
            return None
        if any(term.scale for term in asked.terms) and not path.endswith(TOKENS):
            raise SteerError(f"{path} takes no vectors, {only}: name the base model")
        return json.dumps({**given, "model": self.vectors.models.base_model_paths[0].name}).encode()


def _may_steer(scope: Any) -> bool:
    """Whether it is a request that steering is for, or could be meant for."""
    if scope["type"] != "http" or scope["method"] != "POST" or "/v1/steering" in scope["path"]:
        return False
    kind = next((value for key, value in scope["headers"] if key == b"content-type"), b"")
    return scope["path"].endswith(PATHS) or b"json" in kind


def _error(status: HTTPStatus, message: str) -> JSONResponse:
    """In the form of OpenAI's API."""
    kind = {404: "NotFoundError", 409: "ConflictError"}.get(status, "BadRequestError")
    error = {"message": message, "type": kind, "param": None, "code": int(status)}
    return JSONResponse({"error": error}, status_code=status)
