"""The trainer's checkpoints: small and whole, and a resumed run is the unbroken one."""

from __future__ import annotations

import errno
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from helpers.hub import fake_hub
from helpers.training import SPREAD, last_checkpoint, logged, same
from transformers import TrainerCallback

import steer
from steer import SteerError, artifact
from steer.tasks.rewards import RandomReward
from steer.training.steering_trainer import SteeringGRPOTrainer


def vectors(trainer: SteeringGRPOTrainer) -> dict[str, torch.Tensor]:
    return trainer.vectors.tensors()


def test_a_checkpoint_holds_the_artifact_and_no_base_weights(run, tmp_path: Path, build_tiny) -> None:
    trainer = run(save_strategy="steps", save_steps=2)
    folder = tmp_path / "run" / "checkpoint-2"
    names = {path.name for path in folder.iterdir()}
    assert {artifact.TENSOR_FILE, artifact.CONFIG_FILE, "optimizer.pt", "trainer_state.json"} <= names
    assert not any(name.startswith(("model", "pytorch_model", "adapter")) for name in names)
    # three vectors of 32 numbers, twice more in Adam's moments; the base has 40 times as many
    assert sum(path.stat().st_size for path in folder.iterdir()) < 100_000
    assert same(artifact.read(folder).tensors, vectors(trainer))
    loaded = steer.load(folder, build_tiny("llama", initializer_range=SPREAD))
    assert same(loaded.tensors(), vectors(trainer))


RESUMED = {
    "plain": {},
    "random reward": {"reward": RandomReward()},
    "sampler of transformers": {"fast_sampler": False},
    "several micro-batches": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
    # a generation feeds four updates: steps 3 and 5 lie in the middle of one
    "in a cycle": {"num_iterations": 2, "steps_per_generation": 2, "per_device_train_batch_size": 4},
    "reference": {"beta": 0.5, "num_iterations": 2},
    # eight prompts, two a step: the checkpoints at 3 and 5 are in the first and the second pass over the data
    "second epoch": {"max_steps": 7, "save_steps": 5},
    "dynamic sampling": {
        "dynamic_sampling_rounds": 2,
        "pass_rate_floor": 0.2,
        "max_steps": 7,
        "save_steps": 5,
    },
    "dynamic sampling in a cycle": {
        "dynamic_sampling_rounds": 2,
        "pass_rate_floor": 0.2,
        "num_iterations": 2,
        "steps_per_generation": 2,
        "per_device_train_batch_size": 4,
    },
    "at the end of an epoch": {"max_steps": 6, "save_steps": 4},
}


@pytest.mark.parametrize("case", list(RESUMED))
def test_a_resumed_run_is_the_unbroken_one_bit_for_bit(run, tmp_path: Path, case: str) -> None:
    settings = {"max_steps": 5, "save_steps": 3, "save_strategy": "steps", "lr_scheduler_type": "linear"}
    settings |= RESUMED[case]
    whole = run(folder="whole", **settings)
    checkpoint = tmp_path / "whole" / f"checkpoint-{settings['save_steps']}"
    random.seed(99)  # what the first run left in the generators must not help
    torch.manual_seed(99)
    resumed = run(folder="resumed", resume=checkpoint, **settings)
    assert resumed.state.global_step == settings["max_steps"]
    assert not same(artifact.read(checkpoint).tensors, vectors(whole))
    assert same(vectors(resumed), vectors(whole))
    assert logged(resumed, "reward") == logged(whole, "reward")


def test_several_processes_on_cpus_read_their_checkpoint(run, tmp_path: Path, monkeypatch: Any) -> None:
    """accelerate calls their device cpu:0, which `torch.load` does not know."""
    monkeypatch.setattr(Accelerator, "device", property(lambda self: torch.device("cpu", 0)))
    settings = {"max_steps": 4, "save_steps": 3, "save_strategy": "steps", **RESUMED["in a cycle"]}
    whole = run(folder="whole", **settings)
    resumed = run(folder="resumed", resume=tmp_path / "whole" / "checkpoint-3", **settings)
    assert same(vectors(resumed), vectors(whole))


def test_a_resumed_run_saves_and_logs_as_it_is_told_now(run, tmp_path: Path) -> None:
    run(folder="first", max_steps=2, save_strategy="steps", save_steps=2)
    changed = {"save_strategy": "steps", "save_steps": 3, "logging_steps": 2, "save_total_limit": 10}
    resumed = run(folder="then", resume=tmp_path / "first" / "checkpoint-2", max_steps=5, **changed)
    assert (resumed.state.save_steps, resumed.state.logging_steps) == (3, 2)
    assert {path.name for path in (tmp_path / "then").glob("checkpoint-*")} == {
        "checkpoint-3",
        "checkpoint-5",
    }


def test_the_bonus_of_entropy_goes_on_where_a_checkpoint_lacks_its_last_file(run, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"max_steps": 4, "save_steps": 2, "save_strategy": "steps"}
    settings |= {"use_adaptive_entropy": True, "entropy_target": 9.0, "entropy_coef_delta": 0.1}
    whole = run(folder="whole", **settings)
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    (checkpoint / "entropy_ctrl_state.json").unlink()  # a stop between trainer_state.json and this file
    resumed = run(folder="resumed", resume=checkpoint, **settings)
    assert resumed.entropy_coef == whole.entropy_coef == pytest.approx(0.4)
    assert same(vectors(resumed), vectors(whole))


def test_last_checkpoint_skips_what_was_cut_short(run, tmp_path: Path) -> None:
    run(max_steps=4, save_strategy="steps", save_steps=1, save_total_limit=10)
    folder = tmp_path / "run"
    assert last_checkpoint(folder) == folder / "checkpoint-4"
    state = folder / "checkpoint-4" / "trainer_state.json"
    state.write_text(state.read_text()[:-20])
    assert last_checkpoint(folder) == folder / "checkpoint-3"
    (folder / "checkpoint-3" / artifact.TENSOR_FILE).unlink()
    assert last_checkpoint(folder) == folder / "checkpoint-2"
    tensors = folder / "checkpoint-2" / artifact.TENSOR_FILE
    tensors.write_bytes(tensors.read_bytes()[:-8])
    assert last_checkpoint(folder) == folder / "checkpoint-1"
    (folder / "checkpoint-1" / "trainer_state.json").unlink()
    assert last_checkpoint(folder) is None
    assert last_checkpoint(tmp_path / "nothing") is None


def test_last_checkpoint_ignores_folders_that_only_look_like_one(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-old").mkdir()
    assert last_checkpoint(tmp_path) is None


@pytest.mark.parametrize("full_at", ["artifact", "optimizer.pt", "rollouts.pt", "trainer_state.json"])
def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays(
    run, tmp_path: Path, monkeypatch, full_at: str
) -> None:
    error = OSError(errno.ENOSPC, "No space left on device")

    class Fill(TrainerCallback):
        """The disk fills up after the first update."""

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step < 2:
                return
            if full_at == "artifact":
                monkeypatch.setattr(artifact.os, "fsync", fail)
            elif full_at == "trainer_state.json":
                monkeypatch.setattr(type(state), "save_to_json", fail)
            else:
                monkeypatch.setattr(torch, "save", full_archive)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    write = torch.save

    def full_archive(value: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        if full_at in str(path):  # what torch's archive writer really raises
            raise RuntimeError(
                "[enforce fail at inline_container.cc:672] . PytorchStreamWriter failed writing file"
            )
        write(value, path, *args, **kwargs)

    with pytest.raises(SteerError, match="checkpoint-2") as caught:
        run(save_strategy="steps", save_steps=1, callbacks=[Fill()])
    assert "\n" not in str(caught.value)
    monkeypatch.undo()
    found = last_checkpoint(tmp_path / "run")
    assert found == tmp_path / "run" / "checkpoint-1"
    resumed = run(resume=found, folder="after")
    assert resumed.state.global_step == 2


def test_save_model_writes_the_artifact(run, tmp_path: Path) -> None:
    trainer = run()
    trainer.save_model(str(tmp_path / "out"))
    files = {artifact.TENSOR_FILE, artifact.CONFIG_FILE, artifact.CARD_FILE}
    assert {p.name for p in (tmp_path / "out").iterdir()} == files
    assert same(artifact.read(tmp_path / "out").tensors, vectors(trainer))


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A hub that is a folder; runs upload to `someone/vectors` there."""

    def repo(self: SteeringGRPOTrainer, token: str | None = None) -> None:
        self.hub_model_id = "someone/vectors"

    monkeypatch.setattr(SteeringGRPOTrainer, "init_hf_repo", repo)
    return fake_hub(tmp_path, monkeypatch)


def test_push_to_hub_sends_the_artifact_alone(run, tmp_path: Path, remote: Any) -> None:
    settings = {"push_to_hub": True, "save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    trainer = run(hub_revision="v1", **settings)
    told = {"commit_message": "Steering vectors", "revision": "v1"}

    def sent() -> list[Any]:
        return [call for call in remote.calls if call[0] == "upload_folder"]

    assert sent() == [("upload_folder", "someone/vectors", told)] * 2
    files = [artifact.CONFIG_FILE, artifact.TENSOR_FILE, artifact.CARD_FILE]
    assert remote.files("someone/vectors") == sorted(files)
    place = remote.home / "someone" / "vectors"
    assert 'steer.load("someone/vectors", model)' in (place / artifact.CARD_FILE).read_text()
    trainer.save_model(str(tmp_path / "vectors"))
    assert len(sent()) == 3
    assert same(artifact.read(place).tensors, vectors(trainer))
    run(folder="end", hub_strategy="end", **settings)
    assert len(sent()) == 3


def test_a_checkpoint_that_cannot_be_uploaded_is_a_warning(
    run, tmp_path: Path, remote: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(self: Any, **arguments: Any) -> None:
        raise OSError("503 Server Error\n\nService Unavailable")  # HfHubHTTPError is one

    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", refuse)
    trainer = run(push_to_hub=True, save_strategy="steps", save_steps=1, max_steps=2)
    assert trainer.state.global_step == 2
    assert last_checkpoint(tmp_path / "run") == tmp_path / "run" / "checkpoint-2"
    told = [text for record in caplog.records if "not uploaded" in (text := record.getMessage())]
    assert len(told) == 2 and all("503" in text and "\n" not in text for text in told)
    with pytest.raises(SteerError, match="cannot push to someone/vectors"):
        trainer.save_model(str(tmp_path / "out"))
    assert same(artifact.read(tmp_path / "out").tensors, vectors(trainer))
