"""Prompts and answers longer than the model's context: left out with a count, or refused in one line."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from helpers.launching import ROOT, run_here
from helpers.training import SPREAD, model_folder
from transformers import Gemma3TextConfig, LlamaConfig

import steer
from steer import SteerError
from steer.cli import main
from steer.models import check_context, context_length

CONTEXT = 40
SHORT, LONG = "1+1?", "What is 1+1, " + "and again, " * 4


@pytest.fixture(params=["gpt2", "llama"])
def base(request: pytest.FixtureRequest, tmp_path: Path, build_tiny: Any, tiny_tokenizer: Any) -> Path:
    limit = {"n_positions" if request.param == "gpt2" else "max_position_embeddings": CONTEXT}
    model = build_tiny(request.param, initializer_range=SPREAD, **limit)
    model_folder(tmp_path / "model", model, tiny_tokenizer)
    steer.attach(model).save(tmp_path / "vectors")
    rows = [{"problem": f"{n}+1?" if n % 3 else f"{n} {LONG}", "answer": str(n + 1)} for n in range(9)]
    (tmp_path / "mixed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[::3]))
    return tmp_path


def train(base: Path, *more: str) -> None:
    settings = (
        f"--model {base / 'model'} --train_data {base / 'mixed.jsonl'} --eval_data none --template plain"
    )
    settings += " --max_steps 2 --use_cpu true --num_generations 2 --rewards format --report_to none"
    settings += f" --per_device_train_batch_size 4 --max_completion_length 8 --output_dir {base / 'run'}"
    recipe = ROOT / "recipes" / "grpo_steer.py"
    run_here(recipe, *settings.split(), *more)


def test_training_problems_that_do_not_fit_are_left_out_with_a_count(base, caplog, capsys) -> None:
    folder = base / "a run"
    with caplog.at_level("WARNING", logger="steer"):
        train(base, "--output_dir", str(folder))
    assert "3 of 9 training problems are left out" in caplog.text and "context of 40 tokens" in caplog.text
    assert json.loads((folder / "results.json").read_text())["steps"] == 2
    lines = capsys.readouterr().out.splitlines()
    words = shlex.split(lines[lines.index("Use them:") + 1])  # a path with a space is one word
    assert words[words.index("--vectors") + 1] == str(folder / "vectors")


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (("--train_data", "long.jsonl"), "training problems: .* do not fit the context"),
        (("--eval_data", "long.jsonl"), "held-out problems: .* do not fit the context"),
        (("--max_completion_length", "40"), "use --max_completion_length 28"),
    ],
)
def test_a_run_in_which_nothing_fits_is_one_line(base, more, named) -> None:
    changes = [str(base / text) if text.endswith("jsonl") else text for text in more]
    with pytest.raises(SystemExit, match=f"^error: .*{named}[^\n]*$"):
        train(base, *changes)


def test_problems_to_validate_on_must_fit_too(base: Path) -> None:
    words = f"--model {base / 'model'} --train_data {base / 'long.jsonl'} --eval_data none --template plain"
    words += f" --max_steps 2 --use_cpu true --report_to none --output_dir {base / 'run'}"
    words += " --max_completion_length 8 --validate_every 1 --validation 1"
    with pytest.raises(SystemExit, match=r"^error: validation problems: .* do not fit the context[^\n]*$"):
        run_here(ROOT / "recipes" / "sft_steer.py", *words.split())


@pytest.mark.parametrize(("prompt", "length"), [(LONG, "8"), (SHORT, "29"), (SHORT, "100")])
def test_generate_refuses_what_does_not_fit(base, capsys, prompt, length) -> None:
    asked = ["generate", str(base / "model"), "--vectors", str(base / "vectors"), "--prompt", prompt]
    asked += ["--template", "plain", "--max-new-tokens"]
    assert main([*asked, length]) == 1
    err = capsys.readouterr().err.splitlines()[-1]
    assert err.startswith("error: a prompt of ") and "(40 tokens); use " in err
    assert main([*asked[:-3], "--template", "plain", "--prompt", SHORT, "--max-new-tokens", "28"]) == 0


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 1e4}
LLAMA_3 = {**YARN, "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONGROPE = {**YARN, "rope_type": "longrope", "short_factor": [1.0] * 64, "long_factor": [2.0] * 64}


def test_scaled_positions_reach_farther() -> None:
    assert context_length(LlamaConfig(max_position_embeddings=32, rope_parameters={**YARN})) == 128
    assert context_length(LlamaConfig(max_position_embeddings=128, rope_parameters={**YARN})) == 128
    assert context_length(LlamaConfig(max_position_embeddings=32)) == 32
    # Llama 3.2: its factor scales frequencies, and its context is the one that it names
    assert context_length(LlamaConfig(max_position_embeddings=64, rope_parameters={**LLAMA_3})) == 64


def test_longrope_ends_where_its_factors_change() -> None:
    config = LlamaConfig(max_position_embeddings=128, rope_parameters={**LONGROPE})
    assert context_length(config) == 32
    check_context(config, 20, 12, "--max-new-tokens")
    with pytest.raises(SteerError, match=r"\(32 tokens, after which longrope .*\); use --max-new-tokens 12$"):
        check_context(config, 20, 13, "--max-new-tokens")
    dynamic = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    assert context_length(LlamaConfig(max_position_embeddings=32, rope_parameters=dynamic)) == 32


@pytest.mark.parametrize(("rope", "expected"), [(YARN, 128), (LLAMA_3, 64), (LONGROPE, 32)])
def test_positions_of_each_type_of_layer(rope: dict[str, Any], expected: int) -> None:
    each = {"sliding_attention": {"rope_type": "default", "rope_theta": 1e4}, "full_attention": {**rope}}
    config = Gemma3TextConfig(head_dim=128, max_position_embeddings=64, rope_parameters=each)
    assert context_length(config) == expected
