"""Validation in training: what it measures, what is kept, and that a stop at any moment changes nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from helpers.launching import ROOT, run_folder, run_here
from helpers.training import SPREAD, config, last_checkpoint, logged, make_trainer, problems, same
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel, PreTrainedTokenizerFast, TrainerCallback

from steer import artifact
from steer.cli import train
from steer.errors import SteerError
from steer.evaluation.heldout import Answered, answer
from steer.tasks.grading import Verdict
from steer.training import rate_search, validation
from steer.training.run import RunConfig
from steer.training.steering_trainer import SteeringGRPOTrainer
from steer.training.sweep.study import Study
from steer.training.sweep.trainer import PopulationTrainer
from steer.training.validation import Validation, best, split, stalled

ROWS = [{"problem": f"{n}+{n}=", "answer": str(2 * n)} for n in range(12)]


class ByText:
    """Judges a text by its letters: as good as chance, and another verdict when the text changes."""

    def check(self, texts: list[str], golds: list[str], *more: Any) -> list[Verdict]:
        return [Verdict(sum(map(ord, text)) % 3 == 0, text, "exact") for text in texts]


class Never:
    def check(self, texts: list[str], golds: list[str], *more: Any) -> list[Verdict]:
        return [Verdict(False, text, "exact") for text in texts]


class Killed(BaseException):
    """Ends a run where it stands."""


class Stop(TrainerCallback):
    def __init__(self, at: int):
        self.at = at

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.at:
            raise KeyboardInterrupt


@pytest.fixture
def run(build_tiny: Callable[..., PreTrainedModel], tiny_tokenizer: PreTrainedTokenizerFast):
    """A run with validation in a folder, which goes on where it was."""

    def train(folder: Path, grader: Any, stop: int | None = None, **changes: Any):
        validated = {k: changes.pop(k) for k in ("every", "keep_best", "patience") if k in changes}
        defaults = {"save_strategy": "steps", "save_steps": 2, "max_steps": 7, "learning_rate": 0.4}
        args = config(folder, **{**defaults, **changes})
        model = build_tiny("llama", initializer_range=SPREAD)
        trainer = make_trainer(model, tiny_tokenizer, args, data=problems(40))
        validation = Validation(trainer, ROWS, lambda text: text, grader, **{"every": 2, **validated})
        trainer.add_callback(validation)
        if stop is not None:
            trainer.add_callback(Stop(stop))
        checkpoint = last_checkpoint(folder)
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        except KeyboardInterrupt:
            return trainer, validation, None
        return trainer, validation, validation.finish()

    return train


def vectors(trainer: SteeringGRPOTrainer) -> dict[str, Any]:
    return {name: tensor.clone() for name, tensor in trainer.vectors.tensors().items()}


def test_the_best_state_is_kept(run, tmp_path: Path) -> None:
    trainer, validation, found = run(tmp_path, ByText(), keep_best=True)
    assert [row["step"] for row in validation.history] == [0, 2, 4, 6, 7]
    accuracies = [row["accuracy"] for row in validation.history]
    assert len(set(accuracies[1:])) > 1, "all states are equally good: nothing was tested"
    assert logged(trainer, "validation/accuracy") == accuracies[1:]
    top = max(validation.history[1:], key=lambda row: row["accuracy"])
    assert found["best"] == top and found["kept"] == "best" and found["problems"] == len(ROWS)
    in_turn = max(validation.history[1:-1], key=lambda row: row["accuracy"])  # a longer run needs it
    assert {p.name for p in tmp_path.glob("best-*")} == {f"best-{row['step']}" for row in (top, in_turn)}
    assert same(vectors(trainer), artifact.read(tmp_path / f"best-{top['step']}").tensors)
    assert json.loads((tmp_path / "validation.json").read_text()) == validation.history


def test_a_stopped_run_validates_at_the_same_updates(run, tmp_path: Path) -> None:
    whole, validation, found = run(tmp_path / "whole", ByText(), keep_best=True)
    for stop in (1, 3, 6):  # before the first checkpoint, between two, right behind one
        folder = tmp_path / f"stopped-{stop}"
        run(folder, ByText(), stop=stop, keep_best=True)
        resumed, again, found_again = run(folder, ByText(), keep_best=True)
        assert again.history == validation.history and found_again == found
        assert same(vectors(resumed), vectors(whole))
        assert logged(resumed, "validation/accuracy") == logged(whole, "validation/accuracy")


def test_without_keep_best_the_last_state_stays_and_validation_changes_nothing(
    run, tmp_path: Path, build_tiny, tiny_tokenizer
) -> None:
    trainer, _, found = run(tmp_path / "validated", ByText(), max_steps=4)
    assert found["kept"] == "last" and not list((tmp_path / "validated").glob("best-*"))
    args = config(tmp_path / "plain", max_steps=4, learning_rate=0.4)
    model = build_tiny("llama", initializer_range=SPREAD)
    plain = make_trainer(model, tiny_tokenizer, args, data=problems(40))
    plain.train()
    assert same(vectors(plain), vectors(trainer))


def test_patience_ends_the_run_for_good(run, tmp_path: Path) -> None:
    trainer, _, found = run(tmp_path, Never(), every=1, patience=2)
    assert trainer.state.global_step == 3, "the first validation is the best, two more are no better"
    assert found["stopped"] == "no better validation in 2 after update 1"
    again, _, found_again = run(tmp_path, Never(), every=1, patience=2)
    assert again.state.global_step == 3 and found_again == found
    assert same(vectors(again), vectors(trainer))


def test_a_longer_run_forgets_the_validation_after_the_last_update(run, tmp_path: Path) -> None:
    _, validation, _ = run(tmp_path, ByText(), max_steps=3)
    assert [row["step"] for row in validation.history] == [0, 2, 3]
    _, longer, _ = run(tmp_path, ByText(), max_steps=5)
    assert [row["step"] for row in longer.history] == [0, 2, 4, 5]


# By update: the one after the last update of three is the best, and a longer run forgets it.
SCRIPT = {0: 0.0, 2: 0.5, 3: 1.0, 4: 0.25, 5: 0.25}


def scripted(problems: Any, label: str) -> list[Answered]:
    """Answers as good as `SCRIPT` says of the update that the label ends with."""
    step = label.rpartition(" ")[2]
    right = SCRIPT[int(step) if step.isdecimal() else 0] * len(problems)
    rows = [(row["problem"], row["answer"], i < right) for i, row in enumerate(problems)]
    return [Answered(asked, gold, "", None, correct, 1, True, correct) for asked, gold, correct in rows]


def test_a_longer_run_keeps_the_best_state_of_those_that_it_remembers(
    run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        validation, "answer_together", lambda *given, **options: scripted(given[1], str(given[5]))
    )
    whole, _, expected = run(tmp_path / "whole", None, keep_best=True, max_steps=5)
    _, _, found = run(tmp_path / "longer", None, keep_best=True, max_steps=3)
    assert found["best"]["step"] == 3
    longer, _, found = run(tmp_path / "longer", None, keep_best=True, max_steps=5)
    assert found == expected and found["best"]["step"] == 2 and found["kept"] == "best"
    assert same(vectors(longer), vectors(whole))


accuracies = st.lists(st.sampled_from([0.0, 0.25, 0.5]), min_size=1, max_size=8)


@given(accuracies, st.integers(1, 4))
def test_best_and_stalled(values: list[float], patience: int) -> None:
    history = [{"step": i + 1, "accuracy": value} for i, value in enumerate(values)]
    top = best([{"step": 0, "accuracy": 1.0}, *history])
    assert top == history[values.index(max(values))]
    assert stalled(history, patience) == (len(values) - top["step"] >= patience)
    assert not stalled(history, None)


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 30))
def test_a_number_of_problems_is_split_off(count: int) -> None:
    texts = [f"{a} + {b}" for a in range(9) for b in range(9)]
    train, validation = split(Dataset.from_dict({"problem": texts}), count)
    # a sum and its mirror image stay together
    assert count <= len(validation) <= count + 1
    pairs = [{tuple(sorted(row["problem"].split())) for row in part} for part in (train, validation)]
    assert not pairs[0] & pairs[1] and len(train) + len(validation) == len(texts)


@pytest.mark.parametrize(
    ("given_settings", "message"),
    [
        ({"validate_every": 0}, "validate_every=0 is out of range"),
        ({"validate_every": 1, "validation": 0.0}, "validation=0.0 is out of range"),
        ({"validate_every": 1, "validation": 2.5}, "neither a share below 1 nor a whole number"),
        ({"keep_best": True}, "need validations; set validate_every"),
        ({"patience": 2}, "need validations; set validate_every"),
        ({"validate_every": 1, "patience": 0}, "patience=0 is out of range"),
        ({"prefix": r"It is $\boxed{"}, "opens a box, and only what the model writes after it is graded"),
    ],
)
def test_settings_that_cannot_work(given_settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SteerError, match=message):
        RunConfig(**given_settings)


# ---- in the recipes


@pytest.fixture
def base(
    tmp_path: Path, build_tiny: Callable[..., PreTrainedModel], tiny_tokenizer: PreTrainedTokenizerFast
) -> Path:
    given_settings = {"max_steps": 3, "use_cpu": True, "eval_limit": 2, "examples": 0, "learning_rate": 0.05}
    return run_folder(tmp_path, build_tiny, tiny_tokenizer, 4, **given_settings)


@pytest.fixture
def launched(base: Path, recipe: Callable[..., str]) -> Callable[..., str]:
    words = ["--config", str(base / "config.yaml"), "--validate_every", "2", "--validation", "8"]
    words += ["--keep_best", "true"]
    return lambda name, *changes, **how: recipe(ROOT / "recipes" / name, *words, *changes, **how)


def test_a_recipe_validates_and_says_so(base: Path, launched: Callable[..., str]) -> None:
    text = launched("grpo_steer.py", plots=True)
    results = json.loads((base / "whole" / "results.json").read_text())
    found = results["validation"]
    assert [row["step"] for row in found["history"]] == [0, 2, 3] and found["problems"] >= 8
    assert f"best accuracy {found['best']['accuracy']:.3f} at update {found['best']['step']}" in text
    kept = artifact.read(base / "whole" / f"best-{found['best']['step']}").tensors
    saved = artifact.read(base / "whole" / "vectors")
    assert same(saved.tensors, kept)
    step = found["best"]["step"]
    assert saved.config.provenance["updates"] == step
    assert f", {step} updates, " in (base / "whole" / "vectors" / artifact.CARD_FILE).read_text()
    last = artifact.read(base / "whole" / "checkpoint-3").config.provenance
    assert last["updates"] == 3
    assert (base / "whole" / "training.png").exists()


@pytest.mark.parametrize(
    ("name", "words"), [("grpo_baseline.py", ["--method", "full"]), ("grpo_steer.py", [])]
)
def test_problems_are_answered_in_the_precision_of_training(
    launched: Callable[..., str], monkeypatch: pytest.MonkeyPatch, name: str, words: list[str]
) -> None:
    """Before, in and after training: what learned under bfloat16's rounding may fail without it."""
    mixed: dict[str, bool] = {}

    def spied(*given: Any, **options: Any) -> Any:
        mixed[options["label"]] = torch.is_autocast_enabled("cpu")
        return answer(*given, **options)

    monkeypatch.setattr(validation, "answer", spied)
    launched(name, "--bf16", "true", "--model_dtype", "float32", *words, plots=True)  # without layers, too
    assert len(mixed) > 3 and all(mixed.values()), mixed


def test_the_choice_of_a_rate_comes_before_validation(base: Path, launched: Callable[..., str]) -> None:
    launched("grpo_steer.py", "--lr_sweep", "0.01", "0.05", "--max_steps", "2", "--eval_data", "none")
    tried = json.loads((base / "whole-sweep" / "sweep.json").read_text())["tried"]
    assert [row["learning_rate"] for row in tried] == [0.01, 0.05]
    results = json.loads((base / "whole" / "results.json").read_text())
    assert [row["step"] for row in results["validation"]["history"]] == [0, 2]


def test_all_rates_are_scored_on_the_same_problems(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def scored(
        trial: Any, recipe: Any, train: Any, problems: Any, stages: Any, samples: int
    ) -> dict[str, Any]:
        one = trial.training
        assert (one.push_to_hub, one.log_completions, one.report_to) == (False, False, [])
        folder = Path(trial.training.output_dir)
        folder.mkdir(exist_ok=True)
        after = {"accuracy": 0.5, "problems": len(problems) * samples}
        (folder / "results.json").write_text(json.dumps({"after": after}))
        return {"after": after, "steps": 1, "training_seconds": 1.0, "training_cpu_seconds": 1.0}

    monkeypatch.setattr(rate_search, "train_run", scored)
    sums = Dataset.from_dict({"problem": [f"{a}+{b}" for a in range(9) for b in range(9)]})

    def choose(*more: str) -> float:
        published = ["--push_to_hub", "true", "--log_completions", "true", "--report_to", "tensorboard"]
        words = ["--config", str(base / "config.yaml"), *published]
        chosen = train.parse([*words, "--lr_sweep", "0.1", "0.2", *more])
        assert chosen.rates is not None
        return rate_search.choose(chosen, chosen.rates, train.vectors(chosen), sums)

    def refused() -> None:
        with pytest.raises(SteerError, match=r"scored on other problems: .*, now "):
            choose("--validation_samples", "4")
        with pytest.raises(SteerError, match=r"scored on other problems: .*, now "):
            choose("--validation", "0.5")

    assert choose() == choose() == 0.1
    refused()
    assert choose("--lr_sweep", "0.01", "0.1") == 0.01
    (base / "whole-sweep" / "scored_on.json").unlink()  # as an older version left it
    refused()
    assert choose() == 0.1


def test_a_population_validates_each_member(base: Path, launched: Callable[..., str]) -> None:
    launched("layer_sweep.py", "--seeds", "1", "2", "--winners", "0")
    for name in ("seed-1", "seed-2"):
        folder = base / "whole" / "members" / name
        found = json.loads((folder / "results.json").read_text())["validation"]
        assert [row["step"] for row in found["history"]] == [0, 2, 3] and found["kept"] == "best"
        made = artifact.read(folder / "vectors").config.provenance
        assert made["updates"] == found["best"]["step"]
        rows = json.loads((folder / "log.json").read_text())
        assert "validation/accuracy" not in rows[0]
        assert rows[1]["validation/accuracy"] == found["history"][1]["accuracy"]
    alone = launched("grpo_steer.py", "--seed", "2", "--output_dir", str(base / "alone"))
    assert "validated" in alone
    assert json.loads((base / "alone" / "results.json").read_text())["validation"] == found


def test_a_population_that_is_stopped_validates_at_the_same_updates(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trained(folder: Path, stop: int | None = None) -> None:
        """Until the end, or until the state was written `stop` times."""
        original, written = PopulationTrainer.save, 0

        def save(self: PopulationTrainer) -> None:
            nonlocal written
            original(self)
            written += 1
            if written == stop:
                raise Killed

        words = ["--config", str(base / "config.yaml"), "--output_dir", str(folder), "--seeds", "1", "2"]
        words += ["--validate_every", "2", "--validation", "8", "--keep_best", "true", "--max_steps", "5"]
        words += ["--winners", "0", "--save_steps", "1", "--patience", "2"]
        with monkeypatch.context() as patched:
            patched.setattr(PopulationTrainer, "save", save)
            run_here(ROOT / "recipes" / "layer_sweep.py", *words)

    trained(base / "whole")
    for stop in (1, 2):  # after update 1, then after update 3
        with pytest.raises(Killed):
            trained(base / "stopped", stop)
    trained(base / "stopped")
    for name in ("seed-1", "seed-2"):
        one, other = (base / folder / "members" / name for folder in ("whole", "stopped"))
        expected, found = (json.loads((folder / "results.json").read_text()) for folder in (one, other))
        assert len(expected["validation"]["history"]) >= 3
        times = dict.fromkeys(("training_seconds", "training_cpu_seconds"), 0)
        assert found | times == expected | times
        assert same(artifact.read(other / "vectors").tensors, artifact.read(one / "vectors").tensors)


def test_a_longer_population_keeps_the_best_state_of_those_that_it_remembers(
    base: Path, launched: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Study, "answer", lambda *given: scripted(given[2], given[3]))
    words = ["layer_sweep.py", "--seeds", "1", "--winners", "0", "--warmup_steps", "0", "--output_dir"]
    launched(*words, str(base / "unbroken"), "--max_steps", "5")
    for steps, best_step in (("3", 3), ("5", 2)):
        launched(*words, str(base / "longer"), "--max_steps", steps)
        folder = base / "longer" / "members" / "seed-1"
        found = json.loads((folder / "results.json").read_text())["validation"]
        assert found["best"]["step"] == best_step and found["kept"] == "best"
    expected = artifact.read(base / "unbroken" / "members" / "seed-1" / "vectors").tensors
    assert same(artifact.read(folder / "vectors").tensors, expected)
