"""
Completions of prompts in conditions, and whether they are right.

Sampling adds Gumbel noise drawn from (seed, row, step) to the logits and takes the largest (Gumbel-max), so
what a row says depends neither on the batch nor on its neighbours, and all conditions draw with the same
luck.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from unittest.mock import patch

import torch
from tqdm.auto import tqdm
from transformers import LogitsProcessor, LogitsProcessorList

from steer.errors import SteerError
from steer.generation import cpu
from steer.lens.conditions import Condition, open_lanes
from steer.lens.passes import prompt_columns
from steer.lens.subject import Row, Subject, chunks
from steer.stop_tokens import greedy_config
from steer.tasks.grading import MathGrader


@torch.no_grad()
def complete(
    subject: Subject,
    rows: Sequence[Row],
    conditions: Sequence[Condition],
    *,
    temperature: float = 0.0,
    seed: int = 0,
    label: str | None = None,
) -> list[list[Row]]:
    """
    What the model writes after each row, up to `subject.max_new_tokens` tokens with the end token included,
    for each condition: greedily, or at `temperature`. What a row already has after its prompt counts as
    written.

    A condition with a path drags its reference condition along, which then writes the same; it needs
    one for itself, and gives rows of its own.
    """
    followers = {
        condition.reference: i for i, condition in enumerate(conditions) if condition.effect_path is not None
    }
    if len(followers) < sum(condition.effect_path is not None for condition in conditions):
        raise SteerError("two conditions with a path share a reference; in generation each needs its own")
    written: list[list[Row]] = [[] for _ in conditions]
    with tqdm(total=len(rows), desc=label, unit="text", leave=False, disable=label is None) as bar:
        for first, batch in chunks(rows, subject.batch_size // len(conditions)):
            # generate() appends at the right edge, so prompts of unequal length must end there
            padded = subject.padded(batch, side="left")
            columns = padded.ids.shape[1]
            forced = min(len(row.completion) for row in batch)
            length = max(1, subject.max_new_tokens - forced)
            model = subject.model
            config = greedy_config(subject.tokenizer, model.generation_config, length, subject.pad_token)
            noise: list[Any] = [_Lockstep(len(conditions), followers)] if followers else []
            if temperature > 0:
                noise.insert(
                    0, _Gumbel(temperature, seed, first, len(batch), [len(r.completion) for r in batch])
                )
            prompt = prompt_columns(padded, batch).repeat(len(conditions)).to(subject.device)
            whole = padded.repeat(len(conditions))
            with (
                patch.object(subject.model, "generation_config", config),  # generate() fills in from there
                open_lanes(subject, conditions),
                subject.vectors.prompt_length(prompt),
                cpu.head_inputs_copied(model),
            ):
                ids = model.generate(  # type: ignore[operator]  # a mixin of the model's class
                    input_ids=whole.ids,
                    attention_mask=whole.mask,
                    generation_config=config,
                    logits_processor=LogitsProcessorList(noise),
                )
            ends = config.eos_token_id or []
            for i, line in enumerate(ids[:, columns:].tolist()):
                row = batch[i % len(batch)]
                stop = next((n + 1 for n, token in enumerate(line) if token in ends), len(line))
                stop = min(stop, max(0, subject.max_new_tokens - len(row.completion)))
                written[i // len(batch)].append(Row((*row.ids, *line[:stop]), row.prompt))
            bar.update(len(batch))
    return written


def graded(
    subject: Subject, rows: Sequence[Row], problems: Sequence[dict[str, Any]], grader: MathGrader
) -> torch.Tensor:
    """Which completions hold the right \\boxed answer, or one of them: bool (rows,)."""
    golds = [problem.get("golds") or str(problem["answer"]) for problem in problems]
    verdicts = grader.check(subject.answers(rows), golds)
    return torch.tensor([verdict.correct for verdict in verdicts])


def accuracies(
    subject: Subject,
    problems: Sequence[dict[str, Any]],
    conditions: Sequence[Condition],
    grader: MathGrader,
    label: str | None = None,
) -> torch.Tensor:
    """Share of problems that each condition's greedy completion gets right: (conditions,). No paths."""
    shares = []
    for first, some in chunks(conditions, subject.batch_size):
        text = label and f"{label} ({first + len(some)} of {len(conditions)} conditions)"
        for rows in complete(subject, subject.rows(problems), some, label=text):
            shares.append(graded(subject, rows, problems, grader).double().mean())
    return torch.stack(shares)


class _Gumbel(LogitsProcessor):
    """logits / temperature + Gumbel noise by (seed, row, step), the same in every condition."""

    def __init__(self, temperature: float, seed: int, first: int, rows: int, written: list[int]):
        self.temperature, self.seed, self.first, self.rows, self.written = (
            temperature,
            seed,
            first,
            rows,
            written,
        )
        self.step = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        noise = torch.stack([self._noise(row, scores.shape[1]) for row in range(self.rows)])
        self.step += 1
        return scores.float() / self.temperature + noise.repeat(len(scores) // self.rows, 1).to(scores.device)

    def _noise(self, row: int, size: int) -> torch.Tensor:
        step = self.written[row] + self.step
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.first + row) * 100_003 + step)
        return -torch.empty(size).exponential_(generator=generator).log()


class _Lockstep(LogitsProcessor):
    """Makes a reference condition write what the condition that is compared with it writes."""

    def __init__(self, conditions: int, followers: dict[int, int]):
        self.conditions, self.followers = conditions, followers

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        blocks = scores.unflatten(0, (self.conditions, -1)).clone()
        for reference, condition in self.followers.items():
            blocks[reference] = blocks[condition]
        return blocks.flatten(0, 1)
