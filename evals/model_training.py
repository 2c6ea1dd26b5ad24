"""One update of `SteeringGRPOTrainer` on a tiny model, and the scores that it gives completions."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as tokenizer_models
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from evals.architectures import VOCABULARY
from steer.training.config import SteeringGRPOConfig
from steer.training.steering_trainer import SteeringGRPOTrainer

GROUP = 4
PROMPTS = ["t5 t17 t40 t9 t33", "t8 t70", "t61 t22 t8 t70 t12 t45 t3 t9", "t30 t31 t32"]


@dataclass(frozen=True)
class Row:
    """A sampled row of an update: token ids, and the advantage that it should have been given."""

    prompt: list[int]
    completion: list[int]
    advantage: float


def tokenizer() -> PreTrainedTokenizerFast:
    """Token number n is written `tn`."""
    names = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"t{i}": i for i in range(3, VOCABULARY)}}
    words = Tokenizer(tokenizer_models.WordLevel(names, unk_token="t3"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )


def _trainer(model: PreTrainedModel, folder: str, reward: Any, **settings: Any) -> SteeringGRPOTrainer:
    args = SteeringGRPOConfig(
        output_dir=folder,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        logging_strategy="no",
        max_steps=1,
        per_device_train_batch_size=2 * GROUP,
        num_generations=GROUP,
        max_completion_length=5,
        # plain gradient descent: what a vector moves by is its gradient
        optim="sgd",
        learning_rate=1.0,
        warmup_steps=0,
        max_grad_norm=0.0,
        **settings,
    )
    data = Dataset.from_dict({"prompt": PROMPTS})
    return SteeringGRPOTrainer(model, reward, args, train_dataset=data, processing_class=tokenizer())


def scored(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]
) -> torch.Tensor:
    """Log-probabilities (rows, longest completion) that the trainer gives a batch, padded as trl pads it."""
    width, longest = max(map(len, prompts)), max(map(len, completions))
    ids = torch.zeros(len(prompts), width + longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        part = slice(width - len(prompt), width + len(completion))
        ids[row, part], mask[row, part] = torch.tensor([*prompt, *completion]), 1
    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(model, folder, lambda completions, **_: [0.0] * len(completions))
        return trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, longest)[0].detach()


def updated(model: PreTrainedModel, plainly: bool) -> list[Row]:
    """
    Train the vectors in `model` for one update by gradient descent with a rate of 1, and return its rows.
    `plainly`: prompts are not shared in the update.
    """
    rows: list[tuple[list[int], list[int], float]] = []

    def reward(prompts: list[str], completion_ids: list[list[int]], **columns: Any) -> list[float]:
        values = [float(sum(ids) % 7) for ids in completion_ids]
        for prompt, ids, value in zip(prompts, completion_ids, values, strict=True):
            rows.append(([int(word[1:]) for word in prompt.split()], ids, value))
        return values

    with tempfile.TemporaryDirectory() as folder:
        _trainer(model, folder, reward, share_prompts=not plainly).train()
    model.eval()
    found = []
    for prompt, ids, value in rows:
        others = [other for p, _, other in rows if p == prompt]
        baseline = (sum(others) - value) / (len(others) - 1)  # leave-one-out
        found.append(Row(prompt, ids, value - baseline))
    return found
