"""
One measurement a process: `python -m evals.speed_workers NAME MODEL STEPS` prints a line of JSON. See
`evals.speed`.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

PROMPTS, SAMPLES, TOKENS = 16, 8, 24  # of a GRPO step
BATCH, LENGTH = 64, 128  # of a rollout
ROLLOUTS = ["generate-float32", "generate-bfloat16", "vllm-plain", "vllm-steered"]
STEPS = ["steer-bfloat16", "trl-lora-bfloat16", "trl-lora-float32", "trl-full-float32"]


def problems(count: int) -> list[str]:
    from steer.data import Arithmetic, load_problems

    found = load_problems("arithmetic", "train", arithmetic=Arithmetic(problems=count))["problem"]
    return list(found)[:count]


# ---- a GRPO step


def step(method: str, dtype: str, model_name: str, steps: int) -> dict[str, Any]:
    """Seconds of a GRPO step and of its update alone, and the memory that training took beyond the base."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers.utils import logging
    from trl import GRPOTrainer

    from steer.models import load_model, load_tokenizer
    from steer.prompts import render
    from steer.train.config import SteeringGRPOConfig
    from steer.train.trainer import SteeringGRPOTrainer

    logging.set_verbosity_error()
    tokenizer = load_tokenizer(model_name)
    model = load_model(model_name, dtype=dtype)
    model.generation_config.eos_token_id = None  # nobody stops early: all variants compute the same tokens
    tokenizer.eos_token = tokenizer.unk_token or tokenizer.eos_token
    rows = [{"prompt": render(p, tokenizer, "boxed")} for p in problems(PROMPTS * (steps + 1))]
    noise = torch.Generator().manual_seed(0)

    def reward(completions: list[str], **kwargs: Any) -> list[float]:
        return torch.rand(len(completions), generator=noise).tolist()  # no ties: every row has a gradient

    spent: dict[str, list[float]] = {"step": [], "rollout": []}
    base: type = SteeringGRPOTrainer if method == "steer" else GRPOTrainer

    class Timed(base):
        def _generate_and_score_completions(self, inputs: Any) -> Any:
            start = time.perf_counter()
            output = super()._generate_and_score_completions(inputs)
            spent["rollout"].append(time.perf_counter() - start)
            spent["tokens"] = [float(output["completion_mask"].sum())]
            return output

        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            loss = super().training_step(*args, **kwargs)
            spent["step"].append(time.perf_counter() - start)
            return loss

    size = PROMPTS * SAMPLES
    with tempfile.TemporaryDirectory() as folder:
        settings: dict[str, Any] = dict(
            output_dir=folder,
            per_device_train_batch_size=size,
            num_generations=SAMPLES,
            max_completion_length=TOKENS,
            max_steps=steps + 1,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        from trl import GRPOConfig

        args: Any = (SteeringGRPOConfig if method == "steer" else GRPOConfig)(**settings)
        extra: dict[str, Any] = {}
        if method == "lora":
            extra["peft_config"] = LoraConfig(r=4, target_modules=["down_proj"], task_type="CAUSAL_LM")
        before = _reset_peak()
        trainer = Timed(
            model=model,
            reward_funcs=[reward],
            args=args,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            **extra,
        )
        trainer.train()
        peak = _peak()
    assert spent["tokens"] == [float(size * TOKENS)], f"rows ended early: {spent['tokens']}"
    whole, rollouts = spent["step"][1:], spent["rollout"][1:]
    updates = [a - b for a, b in zip(whole, rollouts, strict=True)]
    result = {
        "step_seconds": statistics.median(whole),
        "rollout_seconds": statistics.median(rollouts),
        "update_seconds": statistics.median(updates),
        "memory_bytes": peak - before,
    }
    if method == "steer":
        prompts = [
            len(tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]) for row in rows[:PROMPTS]
        ]
        flops = update_flops(model, sum(prompts), size * TOKENS)
        result["update_flops_per_second"] = flops / result["update_seconds"]
        result["peak_flops_per_second"] = matmul_peak(getattr(torch, dtype))
    return result


def update_flops(model: Any, prompt_tokens: int, completion_tokens: int) -> float:
    """
    Floating-point operations that the update cannot do without: forward, and backward to the activations
    alone (the weights are frozen), through every layer's matrices for each prompt once and each completion,
    and the LM head for the completions. The first layer needs no backward pass; attention is not counted.
    """
    layers = model.model.layers
    matrices = [sum(p.numel() for p in layer.parameters() if p.dim() == 2) for layer in layers]
    head = model.get_output_embeddings().weight.numel()
    tokens = prompt_tokens + completion_tokens
    return 2.0 * tokens * (2 * sum(matrices) - matrices[0]) + 2.0 * completion_tokens * 2 * head


def matmul_peak(dtype: torch.dtype) -> float:
    """FLOP/s of a large square matrix product, best of ten."""
    a, b = torch.randn(2, 2048, 2048).to(dtype)
    times = []
    for _ in range(11):
        start = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - start)
    return 2 * 2048**3 / min(times)


def _reset_peak() -> int:
    """Resident bytes now, with the process's high-water mark set back to them where the kernel allows."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _peak() -> int:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024


# ---- rollouts


def generate(dtype: str, model_name: str) -> dict[str, Any]:
    from steer.models import load_model, load_tokenizer
    from steer.prompts import render

    tokenizer, model = load_tokenizer(model_name), load_model(model_name, dtype=dtype)
    texts = [render(p, tokenizer, "boxed") for p in problems(BATCH)]
    inputs = tokenizer(texts, add_special_tokens=False, return_tensors="pt", padding=True)
    options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "min_new_tokens": LENGTH}

    def run(tokens: int) -> None:
        model.generate(**inputs, **{**options, "min_new_tokens": tokens}, max_new_tokens=tokens)

    run(4)
    start = time.perf_counter()
    run(LENGTH)
    return {"tokens_per_second": BATCH * LENGTH / (time.perf_counter() - start)}


def vllm(steered: bool, model_name: str) -> dict[str, Any]:
    """Tokens a second of a compiled engine in bfloat16, and what a sync of the vectors takes."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{(os.cpu_count() or 1) - 1}")
    if not steered:
        os.environ["VLLM_PLUGINS"] = "none"
    from vllm import LLM, SamplingParams

    from steer.models import load_tokenizer, model_path
    from steer.prompts import render

    tokenizer = load_tokenizer(model_name)
    texts = [render(p, tokenizer, "boxed") for p in problems(BATCH)]
    prompts: Any = [{"prompt_token_ids": tokenizer(t, add_special_tokens=False)["input_ids"]} for t in texts]
    llm = LLM(str(model_path(model_name)), dtype="bfloat16", max_model_len=1024, seed=0)
    result: dict[str, Any] = {}
    if steered:
        result |= _sync(llm, model_name)
    params = SamplingParams(temperature=1.0, max_tokens=LENGTH, ignore_eos=True)
    times = []
    for _ in range(4):  # the first warms up
        start = time.perf_counter()
        llm.generate(prompts, params, use_tqdm=False)
        times.append(time.perf_counter() - start)
    return result | {"tokens_per_second": BATCH * LENGTH / statistics.median(times[1:])}


def _sync(llm: Any, model_name: str) -> dict[str, Any]:
    """
    Push vectors in every layer into the running engine, which ends up steered. Beside it, what a full push
    cannot do without: copying every weight once. (The CPU build of vLLM cannot take weights again at all.)
    """
    from steer import artifact, engine
    from steer.models import load_model

    base = load_model(model_name, dtype="bfloat16")
    layers, width = base.config.num_hidden_layers, base.config.hidden_size
    small = {i: torch.full((width,), 1e-3) for i in range(layers)}
    vectors = artifact.from_vectors(small, base)
    weights = list(base.named_parameters())
    places = [torch.empty_like(weight) for _, weight in weights]
    engine.push(llm, vectors)
    times: dict[str, list[float]] = {"vector": [], "full": []}
    for _ in range(5):
        start = time.perf_counter()
        for place, (_, weight) in zip(places, weights, strict=True):
            place.copy_(weight.detach())
        times["full"].append(time.perf_counter() - start)
        start = time.perf_counter()
        engine.push(llm, vectors)
        times["vector"].append(time.perf_counter() - start)
    return {
        "vector_seconds": statistics.median(times["vector"]),
        "full_seconds": statistics.median(times["full"]),
        "vector_bytes": sum(t.numel() * t.element_size() for t in vectors.tensors.values()),
        "full_bytes": sum(p.numel() * p.element_size() for _, p in weights),
    }


def main() -> None:
    name, model, steps = sys.argv[1], sys.argv[2], int(sys.argv[3])
    if name.startswith("generate"):
        result = generate(name.split("-")[1], model)
    elif name.startswith("vllm"):
        result = vllm(name == "vllm-steered", model)
    else:
        method, dtype = name.removeprefix("trl-").split("-")
        result = step(method, dtype, model, steps)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
