"""
Vectors in vLLM's OpenAI-compatible server: each set is a model of its own name, as LoRA modules are.

`steer serve` starts `vllm serve` with this endpoint plugin. A request whose `model` is the name of a set gets
those vectors, `name@0.5` half of them, and the base model's own name the base model. A chat of one question
is put to a set as in its training (`steer.engine.chat`). Sets come and go while the server runs:

    GET    /v1/steering                  the sets, with their artifacts and scales
    POST   /v1/steering                  {"name": "math", "artifact": "runs/math/vectors", "scale": 1.0}
    DELETE /v1/steering/math
"""

from __future__ import annotations

import asyncio
import json
import os
import re
from dataclasses import dataclass, replace
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from steer.artifact import read
from steer.engine.bank import DEFAULT, pack
from steer.engine.chat import put, served_prompt
from steer.engine.client import NO_PLUGIN, steered_layers
from steer.engine.receipt import confirmed
from steer.errors import SteerError
from steer.models import load_tokenizer
from steer.prompt import PromptSpec

# How `steer serve` tells the server what to start with: JSON, `vectors` with [name, artifact, scale] of each
# set, and `template` as its option.
VARIABLE = "STEER_SERVE"
PATHS = ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages")
_SCALED = re.compile(r"(?P<name>.+)@(?P<scale>-?\d+(\.\d+)?)")


@dataclass(frozen=True)
class Served:
    """A set of vectors: where it came from, and the factor it was pushed with."""

    artifact: str
    scale: float
    prompt: PromptSpec | None = None  # how chats of one question are put; None for as they come


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
        self.lock = asyncio.Lock()

    def attach_router(self, app: FastAPI) -> None:
        app.add_middleware(_Choose, vectors=self)
        app.add_api_route("/v1/models", self._list_models, methods=["GET"])
        app.add_api_route("/v1/steering", self._list, methods=["GET"])
        app.add_api_route("/v1/steering", self._add, methods=["POST"])
        app.add_api_route("/v1/steering/{name:path}", self._remove, methods=["DELETE"])

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        self.engine, self.models = engine_client, state.openai_serving_models
        self.tokenizer = await asyncio.to_thread(
            load_tokenizer,
            args.tokenizer or args.model,
            revision=args.tokenizer_revision or (None if args.tokenizer else args.revision),
            trust_remote_code=args.trust_remote_code,
        )
        start = json.loads(os.environ.get(VARIABLE, "{}"))
        self.template = start.get("template")
        for name, artifact, scale in start.get("vectors", []):
            await self.add(name, artifact, scale)

    # ---- the sets

    async def add(self, name: str, artifact: str, scale: float = 1.0) -> None:
        """Push the artifact under `name`, in place of what has it; SteerError when that cannot be."""
        if self.models.is_base_model(name) or name == DEFAULT or "@" in name:
            raise SteerError(f"{name!r} cannot name vectors: it is the base model's, reserved, or has an @")
        pushed = await asyncio.to_thread(read, artifact)
        pushed = replace(pushed, config=replace(pushed.config, scale=scale * pushed.config.scale))
        vectors, positions = steered_layers(pushed)
        prompt, _ = served_prompt(pushed.config.prompt, self.template)
        async with self.lock:
            answers = await self._call("steer_push", name, pack(vectors), positions)
            confirmed(answers, name, vectors, positions)
            self.sets[name] = Served(str(artifact), scale, prompt)

    async def remove(self, name: str) -> None:
        async with self.lock:
            await self._call("steer_remove", name)
            self.sets.pop(name, None)

    async def _call(self, method: str, *args: str) -> list[dict[str, Any]]:
        try:
            answers = await self.engine.collective_rpc(method, args=args)
        except Exception as error:  # the kind depends on the executor
            raise SteerError(f"{error}: {NO_PLUGIN}" if method in str(error) else str(error)) from error
        for answer in answers:
            if answer["error"]:
                raise SteerError(answer["error"])
        return answers

    def choose(self, model: str) -> tuple[str, float] | None:
        """
        The set that `model` names and the factor on it; None for the base model and for what else vLLM
        serves. KeyError for a name that nobody has.
        """
        bare = model
        for path in self.models.base_model_paths:
            bare = bare.removeprefix(f"{path.name}:")
        match = _SCALED.fullmatch(bare)
        for name, scale in ((bare, 1.0), *([(match["name"], float(match["scale"]))] if match else [])):
            if name in self.sets:
                return name, scale
        if self.models.is_base_model(model) or model in self.models.lora_requests:
            return None
        raise KeyError(model)

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
        except (ValueError, KeyError, TypeError, AttributeError):
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
    """Turns the name of a set in a request's `model` into the base model's and the choice of the set."""

    def __init__(self, app: Any, vectors: Vectors):
        self.app = app
        self.vectors = vectors

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or not scope["path"].endswith(PATHS):
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
        try:
            asked = json.loads(body)
            chosen = self.vectors.choose(asked["model"])
        except KeyError as error:
            name = error.args[0]
            if name != "model":  # without one, vLLM takes the base model
                await _error(HTTPStatus.NOT_FOUND, self.vectors.missing(name))(scope, receive, send)
                return
            chosen = None
        except (ValueError, TypeError, AttributeError):  # vLLM says what is wrong with it
            chosen = None
        if chosen is not None:
            prompt = self.vectors.sets[chosen[0]].prompt
            if prompt is not None and scope["path"].endswith("/v1/chat/completions"):
                try:
                    asked = await asyncio.to_thread(put, asked, prompt, self.vectors.tokenizer)
                except SteerError as error:
                    await _error(HTTPStatus.BAD_REQUEST, str(error))(scope, receive, send)
                    return
            extra = {"steering": chosen[0], "steering_scale": chosen[1]}
            asked["model"] = self.vectors.models.base_model_paths[0].name
            asked["vllm_xargs"] = {**(asked.get("vllm_xargs") or {}), **extra}
            body = json.dumps(asked).encode()
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


def _error(status: HTTPStatus, message: str) -> JSONResponse:
    """In the form of OpenAI's API."""
    kind = {404: "NotFoundError", 409: "ConflictError"}.get(status, "BadRequestError")
    error = {"message": message, "type": kind, "param": None, "code": int(status)}
    return JSONResponse({"error": error}, status_code=status)
