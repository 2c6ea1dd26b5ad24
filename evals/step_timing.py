"""
Time, memory and FLOPs of a GRPO step of steer and of trl, in this process. `evals.speed`, `evals.growth`,
`evals.memory`, `evals.update_profile` and `evals.gpu_check` measure with it.
"""

from __future__ import annotations

import resource
import statistics
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Batch:
    """What a GRPO step samples, and the rows of one of its forward and backward passes (0: all)."""

    prompts: int
    samples: int
    tokens: int
    rows: int = 0


def measured(
    method: str,
    model: Any,
    tokenizer: Any,
    texts: list[str],
    steps: int,
    batch: Batch,
    rollout: bool = True,
    profiler: Any = None,
    **options: Any,
) -> dict[str, float]:
    """
    Seconds of a GRPO step, of its rollout and of its update alone, and the memory that training took beyond
    the base: medians, without the first of several steps. Without `rollout` the completions are random
    tokens, so that the update alone is measured; `cpu s` is the processor time of the step. A `profiler` is
    started before the last update and stopped after it. `options` are settings of the trainer.

    Nobody stops early: the end token of `tokenizer` must be one that the model has no logit for, so that all
    methods compute the same tokens.
    """
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from transformers.utils import logging
    from trl import GRPOConfig, GRPOTrainer

    from steer.training.config import SteeringGRPOConfig
    from steer.training.steering_trainer import SteeringGRPOTrainer

    logging.set_verbosity_error()
    on_gpu = model.device.type == "cuda"
    model.generation_config.eos_token_id = None
    noise = torch.Generator().manual_seed(0)

    def reward(completions: list[str], **kwargs: Any) -> list[float]:
        return torch.rand(len(completions), generator=noise).tolist()  # no ties: every row has a gradient

    names = ("step", "rollout", "update", "tokens", "cpu")
    spent: dict[str, list[float]] = {name: [] for name in names}
    now = dict.fromkeys(("rollout", "training"), 0.0)  # of the step that runs
    ours = method == "steer"
    base: type = SteeringGRPOTrainer if ours else GRPOTrainer

    class Timed(base):
        def _generate_and_score_completions(self, inputs: Any) -> Any:
            start = clock()
            if rollout:
                output = super()._generate_and_score_completions(inputs)
            else:
                output = random_completions(tokenizer, [row["prompt"] for row in inputs], batch.tokens)
            now["rollout"] += clock() - start
            spent["tokens"].append(float(output["completion_mask"].sum()))
            if profiler and len(spent["tokens"]) == steps:
                profiler.start()
            return output

        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            start = clock()
            loss = super().training_step(*args, **kwargs)
            now["training"] += clock() - start
            return loss

    class Whole(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.start = {"step": clock(), "cpu": time.process_time()}
            now.update(rollout=0.0, training=0.0)

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            end = {"step": clock(), "cpu": time.process_time()}
            for name, value in end.items():
                spent[name].append(value - self.start[name])
            spent["rollout"].append(now["rollout"])
            spent["update"].append(now["training"] - now["rollout"])

    size = batch.prompts * batch.samples
    rows = batch.rows or size
    with tempfile.TemporaryDirectory() as folder:
        settings: dict[str, Any] = dict(
            output_dir=folder,
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=size // rows,
            num_generations=batch.samples,
            max_completion_length=batch.tokens,
            max_steps=steps,
            bf16=on_gpu and model.dtype == torch.float32,
            use_cpu=not on_gpu,
            gradient_checkpointing=False,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            **options,
        )
        args: Any = (SteeringGRPOConfig if ours else GRPOConfig)(**settings)
        extra: dict[str, Any] = {}
        if method == "trl-lora":
            extra["peft_config"] = LoraConfig(r=4, target_modules=["down_proj"], task_type="CAUSAL_LM")
        before = reset_memory_peak()
        trainer = Timed(
            model=model,
            reward_funcs=[reward],
            args=args,
            train_dataset=Dataset.from_list([{"prompt": text} for text in texts]),
            processing_class=tokenizer,
            callbacks=[Whole()],
            **extra,
        )
        trainer.train()
        memory = memory_peak() - before
    if profiler:
        profiler.stop()
    assert set(spent["tokens"]) == {size * batch.tokens}, f"rows ended early: {spent['tokens']}"
    middle = {name: statistics.median(values[1:] or values) for name, values in spent.items()}
    result = {f"{name} s": middle[name] for name in ("step", "rollout", "update")}
    result["cpu s"] = middle["cpu"]
    result["rollout tokens/s"] = size * batch.tokens / middle["rollout"]
    result["cores at work"] = middle["cpu"] / middle["step"]
    result["memory MB"] = memory / 1e6
    if method == "steer" and rollout:
        ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts[: batch.prompts]]
        flops = update_flops(model, prompt_tokens(ids), size * batch.tokens)
        result["update GFLOP/s"] = flops / middle["update"] / 1e9
        result["peak GFLOP/s"] = matmul_peak(model.dtype, model.device) / 1e9
    return result


def random_completions(tokenizer: Any, prompts: list[str], tokens: int) -> dict[str, torch.Tensor]:
    """What trl's trainer makes of a rollout: random tokens after `prompts`, with random advantages."""
    noise = torch.Generator().manual_seed(0)
    read = tokenizer(
        prompts, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt"
    )
    shape = len(prompts), tokens
    ids = torch.randint(1, len(tokenizer) - 1, shape, generator=noise)
    batch = {"prompt_ids": read["input_ids"], "prompt_mask": read["attention_mask"], "completion_ids": ids}
    batch |= {
        "completion_mask": torch.ones_like(ids),
        "advantages": torch.randn(len(prompts), generator=noise),
    }
    batch["num_items_in_batch"] = torch.tensor(float(ids.numel()))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return {name: tensor.to(device) for name, tensor in batch.items()}


def shares(profiler: Any) -> dict[str, float]:
    """The part of the processor's time that each kind of operation took, largest first, from 0.2 % on."""
    events = profiler.key_averages()
    total = sum(event.self_cpu_time_total for event in events)
    found = {event.key: event.self_cpu_time_total / total for event in events}
    ordered = sorted(found.items(), key=lambda item: -item[1])
    return {name: round(share, 4) for name, share in ordered if share >= 0.002}


def prompt_tokens(prompts: list[list[int]]) -> int:
    """Tokens of all prompts, with what all of them begin with counted once."""
    common, shortest = 0, min(map(len, prompts))
    while common < shortest and len({tuple(ids[: common + 1]) for ids in prompts}) == 1:
        common += 1
    return common + sum(len(ids) - common for ids in prompts)


def update_flops(model: Any, prompt_tokens: int, completion_tokens: int) -> float:
    """
    Floating-point operations that the update cannot do without: forward, and backward to the activations
    alone (the weights are frozen), through every layer's matrices for each prompt token once and each
    completion token, and the LM head for the completions. The first layer needs no backward pass; attention
    is not counted.
    """
    layers = model.model.layers
    matrices = [sum(p.numel() for p in layer.parameters() if p.dim() == 2) for layer in layers]
    head = model.get_output_embeddings().weight.numel()
    tokens = prompt_tokens + completion_tokens
    return 2.0 * tokens * (2 * sum(matrices) - matrices[0]) + 2.0 * completion_tokens * 2 * head


def matmul_peak(dtype: torch.dtype, device: Any = "cpu") -> float:
    """FLOP/s of a large square matrix product, best of ten."""
    size = 2048 if torch.device(device).type == "cpu" else 8192
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    times = []
    for _ in range(11):
        start = clock()
        a @ b
        times.append(clock() - start)
    return 2 * size**3 / min(times)


def clock() -> float:
    """Seconds on a clock, with the GPU's work done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def reset_memory_peak() -> int:
    """Bytes in use now (resident, or on the GPU); the high-water mark is set back to them where possible."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def memory_peak() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024
