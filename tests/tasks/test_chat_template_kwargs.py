"""`chat_template_kwargs` reach every prompt: training, evaluation, `generate`, benchmarks and the lens."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.launching import ROOT, run_here
from helpers.training import SPREAD, model_folder, write_problems

from steer import artifact
from steer.cli import main
from steer.evaluation import run as evals_run
from steer.evaluation.store import read_settings
from steer.prompt import PromptSpec

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% if quiet is defined and quiet %}[quiet]{% endif %}"
    "{% endif %}"
)
QUIET = json.dumps({"quiet": True})


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("quiet")


@pytest.fixture
def base(place: Path, build_tiny: Callable, tiny_tokenizer: Any) -> Path:
    tiny_tokenizer.chat_template = TEMPLATE
    model_folder(place / "model", build_tiny("llama", initializer_range=SPREAD), tiny_tokenizer)
    write_problems(place / "sums.jsonl", range(10, 18), modulus=10)
    write_problems(place / "heldout.jsonl", range(20, 23), modulus=10)
    return place


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch, tiny_tokenizer: Any) -> Iterator[list[str]]:
    """The texts that models embed during the test."""
    texts: list[str] = []
    forward = torch.nn.Embedding.forward

    def record(self: torch.nn.Embedding, ids: torch.Tensor) -> torch.Tensor:
        if ids.device.type != "meta":
            texts.extend(tiny_tokenizer.batch_decode(ids))
        return forward(self, ids)

    monkeypatch.setattr(torch.nn.Embedding, "forward", record)
    return texts


def train(base: Path, out: Path, *more: str, script: str = "grpo_steer") -> None:
    settings = (
        f"--model {base / 'model'} --train_data {base / 'sums.jsonl'} --eval_data {base / 'heldout.jsonl'}"
    )
    settings += " --template boxed_short --max_steps 1 --use_cpu true --num_generations 2 --rewards format"
    settings += " --per_device_train_batch_size 4 --max_completion_length 2 --report_to none --winners 0"
    if script == "grpo_steer":
        settings = settings.removesuffix(" --winners 0")
    recipe = ROOT / "recipes" / f"{script}.py"
    run_here(recipe, *settings.split(), "--output_dir", str(out), *more)


def quiet(texts: list[str]) -> tuple[int, int]:
    """How many texts open the answer with [quiet], and how many do not."""
    # the last token of a prompt that a group shares is read with the completions
    prompts = [text for text in texts if "$.<|assistant|>" in text]
    told = sum("$.<|assistant|>[quie" in text for text in prompts)
    return told, len(prompts) - told


def test_from_training_to_generate_and_evals(base, tmp_path, monkeypatch, read, capsys, caplog) -> None:
    out = tmp_path / "run"
    train(base, out, "--chat_template_kwargs", QUIET)
    told, others = quiet(read)
    assert told and not others
    vectors = out / "vectors"
    trained = artifact.read(vectors).config.prompt
    assert trained == PromptSpec("boxed_short", chat_template_kwargs={"quiet": True})

    def shown(*more: str) -> str:
        capsys.readouterr()
        asked = ["generate", str(base / "model"), "--vectors", str(vectors), "--prompt", "1+1=", "--json"]
        assert main([*asked, "--max-new-tokens", "2", *more]) == 0
        return json.loads(capsys.readouterr().out)["prompt"]

    assert shown().endswith("<|assistant|>[quiet]")
    assert shown("--chat-template-kwargs", "{}").endswith("<|assistant|>")
    assert shown("--template", "plain") == "1+1=\nAnswer:"

    def evaluated(name: str, *more: str) -> tuple[int, int]:
        read.clear()
        asked = [
            "--model",
            str(base / "model"),
            "--benchmarks",
            str(base / "heldout.jsonl"),
            "--samples",
            "0",
        ]
        asked += ["--max-new-tokens", "2", "--template", "boxed_short", "--out", str(tmp_path / name)]
        assert evals_run.main([*asked, *more]) == 0
        return quiet(read)

    given = ["--vectors", f"v={vectors}"]
    assert evaluated("same", *given)[1] == 0  # the base is asked as the vectors are
    benchmark = read_settings(tmp_path / "same")["benchmarks"]["heldout"]
    assert benchmark["chat_template_kwargs"] == {"quiet": True}
    assert evaluated("none", *given, "--chat-template-kwargs", "{}")[0] == 0
    assert evaluated("base")[0] == 0
    assert evaluated("given", "--chat-template-kwargs", QUIET)[1] == 0

    # one set has another prompt: the benchmark's own, and a line that names what differs
    other = artifact.read(vectors)
    other.config.prompt = PromptSpec("boxed_short")
    artifact.write(tmp_path / "other", other)
    assert evaluated("both", *given, f"o={tmp_path / 'other'}")[0] == 0
    warned = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"][-1]
    assert warned.startswith("warning: prompt of heldout differs from what vectors were trained with: ")
    assert f"{vectors} (template boxed_short, chat_template_kwargs {{'quiet': True}})" in warned
    assert str(tmp_path / "other") not in warned


def test_the_lens_reads_the_prompts_of_training(base, tmp_path, monkeypatch, read, capsys) -> None:
    out = tmp_path / "run"
    train(base, out, "--chat_template_kwargs", QUIET)
    read.clear()
    lens = ["lens", "shift", str(out / "vectors"), "--problems", "2", "--max-new-tokens", "2"]
    assert main(lens) == 0
    told, others = quiet(read)
    assert told and not others


def test_a_population_has_them_too(base, tmp_path, monkeypatch, read) -> None:
    out = tmp_path / "sweep"
    train(base, out, "--chat_template_kwargs", QUIET, "--each_layer", "0", script="layer_sweep")
    told, others = quiet(read)
    assert told and not others
    (vectors,) = out.glob("members/*/vectors")
    trained = artifact.read(vectors).config.prompt
    assert trained.chat_template_kwargs == {"quiet": True}


@pytest.mark.parametrize(
    ("kwargs", "more", "named"),
    [
        ('{"qiet": true}', (), "'qiet'.*reads quiet"),
        ("[1]", (), "chat_template_kwargs='\\[1\\]' is not a mapping"),
        (QUIET, ("--template", "plain"), "'plain' is not a chat"),
    ],
)
def test_what_cannot_work_is_one_line(base, tmp_path, monkeypatch, kwargs, more, named) -> None:
    with pytest.raises(SystemExit, match=f"^error: .*{named}[^\n]*$"):
        train(base, tmp_path / "run", "--chat_template_kwargs", kwargs, *more)
