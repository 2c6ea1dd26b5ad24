"""An evaluation with vLLM against the same with transformers. Needs vllm or vllm-cpu."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.evaluating import everything, make_base, rows

from steer.evaluation import run
from steer.evaluation.store import GREEDY

os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
pytest.importorskip("vllm", reason="vLLM is not installed")


def test_both_engines_give_the_same_answers(
    tmp_path: Path, build_tiny: Callable, tiny_tokenizer: Any
) -> None:
    make_base(tmp_path, build_tiny, tiny_tokenizer, hidden_size=128, head_dim=32, initializer_range=0.1)
    assert run.main(everything(tmp_path, tmp_path / "hf")) == 0
    # so few tokens a pass that prompts could be read in pieces, if the engine were allowed to
    small = {"enforce_eager": True, "kv_cache_memory_bytes": 8 << 20, "block_size": 32}
    settings = json.dumps({**small, "max_num_batched_tokens": 40})
    vllm = ["--engine", "vllm", "--dtype", "float32", "--engine-args", settings]
    assert run.main(everything(tmp_path, tmp_path / "vllm", *vllm)) == 0
    ours, theirs = rows(tmp_path / "hf"), rows(tmp_path / "vllm")
    assert ours.keys() == theirs.keys()
    for key, row in ours.items():
        assert row["seed"] == theirs[key]["seed"]
    # both compute in float32, and greedy answers of peaked random models are far from ties
    greedy = {key: row for key, row in ours.items() if key[2] == GREEDY}
    assert {key: theirs[key] for key in greedy} == greedy
    by_variant = {
        v: [r["text"] for k, r in greedy.items() if k[0] == v] for v in ("base", "s", "s x-0.5", "lora")
    }
    assert len({tuple(texts) for texts in by_variant.values()}) == 4, "every variant was another"
    sampled = [key for key in ours if key[2] != GREEDY]
    assert any(theirs[v, p, 0]["text"] != theirs[v, p, 1]["text"] for v, p, _ in sampled)
