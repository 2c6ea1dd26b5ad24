"""
A LoRA adapter that makes a model answer word problems in few tokens, with the result in a box.

    python -m evals.word_problems.warm_start --model qwen2.5-coder-0.5b-instruct \\
        --problems runs/short-problems/train.jsonl --examples 320 --most_tokens 72 --learning_rate 5e-4 \\
        --bf16 true --use_cpu true --output_dir evals/results/word-problems/warm-start-0.5b

The answers trained on are the solutions of the problems, the short ones alone (`--most_tokens`), each ending
in the box, by trl's `SFTTrainer` with peft. `--base_adapter DIR` merges the adapter before anything of a run
attaches, so that all arms of a comparison start from the same model. Writes the adapter and warm-start.json.
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import LoraConfig
from transformers import HfArgumentParser, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from steer.arguments import Help
from steer.errors import SteerError
from steer.files import json_lines, replace_file
from steer.generation import cpu
from steer.models import load_model, load_tokenizer
from steer.prompt import PromptSpec
from steer.tasks.elicited import worked_answer
from steer.tasks.prompts import formatter
from steer.training.answer_tokens import Example, tokens
from steer.versions import versions

LARGEST = 6 * 10**6  # bytes of an adapter that is committed beside the results of a study


@dataclass
class WarmStart:
    """What is trained, and on which solutions."""

    model: str = field(metadata={"help": "hub id, local folder, .gguf file or the name of bundled weights"})
    problems: str = field(metadata={"help": "a .jsonl file of problems with answers and solutions"})
    template: str = field(default="boxed", metadata={"help": "prompt template"})
    examples: int = field(default=0, metadata={"help": "solutions drawn by --seed; 0: all that are short"})
    most_tokens: int = field(default=85, metadata={"help": "longest answer, in tokens with its end"})
    lora_rank: int = field(default=2, metadata={"help": "rank, on every linear layer; alpha is twice that"})


def main() -> None:
    start, training = parse(sys.argv[1:])
    training.remove_unused_columns = False
    if training.device.type == "cpu":
        cpu.prepare()
    tokenizer = load_tokenizer(start.model)
    rows = examples(start, tokenizer, training.seed)
    content = json.dumps(rows).encode()
    model = load_model(start.model, dtype="float32")
    model.config.use_cache = False
    lora = LoraConfig(
        r=start.lora_rank,
        lora_alpha=2 * start.lora_rank,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    trainer = SFTTrainer(
        model,
        args=training,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=lora,
    )
    trainer.train()
    folder = Path(str(training.output_dir))
    save(trainer.model, folder, start.model)
    record = {
        **asdict(start),
        "trained_on": len(rows),
        "sha256": hashlib.sha256(content).hexdigest()[:16],
        "learning_rate": training.learning_rate,
        "epochs": training.num_train_epochs,
        "batch": training.per_device_train_batch_size * training.gradient_accumulation_steps,
        "seed": training.seed,
        "losses": [round(row["loss"], 4) for row in trainer.state.log_history if "loss" in row],
        "versions": versions("torch", "transformers", "trl", "peft"),
    }
    replace_file(folder / "warm-start.json", (json.dumps(record, indent=1) + "\n").encode())
    print(f"{folder}: {len(rows)} solutions, last loss {record['losses'][-1]}")


def parse(arguments: list[str]) -> tuple[WarmStart, SFTConfig]:
    """The settings; those of trl's `SFTConfig` have its names, and defaults that fit an adapter on a CPU."""
    kinds: Any = (WarmStart, SFTConfig)
    parser = HfArgumentParser(kinds, description=__doc__, formatter_class=Help)
    parser.set_defaults(
        learning_rate=2e-4,
        per_device_train_batch_size=16,
        num_train_epochs=1,
        bf16=False,
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        max_length=None,
    )
    start, training = parser.parse_args_into_dataclasses(arguments)
    return start, training


def examples(start: WarmStart, tokenizer: PreTrainedTokenizerBase, seed: int) -> list[dict[str, Any]]:
    """
    The solutions as token ids with labels: the loss is on the answer alone.

    Raises:
        SteerError: no problem has a solution that is short enough, or fewer than asked for.
    """
    put = formatter(PromptSpec(start.template), tokenizer)
    made = [
        Example(put(row["problem"]), worked_answer(row), chat=True)
        for row in json_lines(Path(start.problems))
        if row.get("solution")
    ]
    rows = tokens(made, tokenizer, "sft")
    short = [row for row in rows if sum(label != -100 for label in row["labels"]) <= start.most_tokens]
    if not short or len(short) < start.examples:
        raise SteerError(
            f"{start.problems} has {len(short)} solutions of at most {start.most_tokens} tokens, of "
            f"{len(rows)}; expected at least {max(1, start.examples)}: raise most_tokens or lower examples"
        )
    random.Random(seed).shuffle(short)
    return short[: start.examples or None]


def save(model: Any, folder: Path, name: str) -> None:
    """
    The adapter in peft's format, under the name of its base that `--base_adapter` checks.

    Raises:
        SteerError: it is larger than a file that is committed should be.
    """
    for config in model.peft_config.values():
        config.base_model_name_or_path = name
    model.save_pretrained(folder)
    (folder / "README.md").unlink()  # a form of a model card that names a folder of this machine
    size = (folder / "adapter_model.safetensors").stat().st_size
    if size > LARGEST:
        raise SteerError(
            f"{folder} has {size / 1e6:.1f} MB; expected at most {LARGEST / 1e6:.0f} MB: lower lora_rank"
        )


if __name__ == "__main__":
    try:
        main()
    except SteerError as error:
        sys.exit(f"error: {error}")
