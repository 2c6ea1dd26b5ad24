"""One training run on disk: what was asked of it, what it has done so far, and whether it may go on."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steer.base_adapter import base_source
from steer.errors import SteerError
from steer.files import HOLDER_FILE, LOCK_FILE, read_json, replace_file
from steer.models import load_model, load_tokenizer
from steer.tasks.arithmetic import Arithmetic
from steer.tasks.columns import columns_text, parse_columns
from steer.tasks.elicited import EXAMPLES
from steer.tasks.grading import check_prefix
from steer.tasks.prompts import DEFAULT_PROMPT, TEMPLATES
from steer.tasks.reward_loading import reward_entries
from steer.tasks.rewards import REWARDS
from steer.tasks.tools import TOOLS, tool_names
from steer.training.same_result import CONTINUED, SCHEDULE, Settings, differences

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

RUN_FILE = "run.json"
RESULTS_FILE = "results.json"


@dataclass
class RunConfig:
    """The base model, the problems and the reward of one training run."""

    _argument_group_name = "model, data and reward"

    model: str = field(
        default="smollm2-135m-instruct",
        metadata={"help": "Base model: hub id, local folder, .gguf file or the name of bundled weights."},
    )
    model_revision: str | None = field(default=None, metadata={"help": "Revision of a hub model."})
    model_dtype: str = field(
        default="auto",
        metadata={
            "help": "Precision of the frozen base: float32, bfloat16, float16, auto (as it was saved) or "
            "fast (bfloat16 where this machine has instructions for it, else float32)."
        },
    )
    base_adapter: str | None = field(
        default=None,
        metadata={
            "help": "Folder of a LoRA of peft that is merged into the base model before anything is attached."
        },
    )
    init: str | None = field(
        default=None,
        metadata={
            "help": "Vectors to start from: folder, .safetensors file or hub id of an artifact of the same "
            "model, kind, site and positions that has vectors in all layers that are trained. The reference "
            "policy is still the base."
        },
    )
    load_in_4bit: bool = field(
        default=False, metadata={"help": "Quantise the base to 4 bits with bitsandbytes as it is loaded."}
    )
    load_in_8bit: bool = field(default=False, metadata={"help": "The same with 8 bits."})
    attn_implementation: str | None = field(
        default=None, metadata={"help": "Attention of transformers, e.g. sdpa or flash_attention_2."}
    )
    train_data: str = field(
        default="arithmetic",
        metadata={
            "help": "Problems to train on: arithmetic (generated), gsm8k, math, deepscaler, a hub id, "
            "or a .jsonl or .parquet file with columns problem and answer. With method sft or dpo also the "
            "folder of a run whose answers were kept, with dpo a .jsonl file of pairs."
        },
    )
    columns: str | None = field(
        default=None,
        metadata={
            "help": "Columns of train_data, a file or hub id, that have other names: "
            "problem=question,answer=solution (in a config also a mapping). A row may have several right "
            "answers as a list, and a chat instead of a problem: a list of messages in column prompt, which "
            "is used as it is, without the template's instruction. Other columns are passed to the rewards."
        },
    )
    eval_columns: str | None = field(
        default=None,
        metadata={"help": "The same of eval_data; default: columns, where eval_data is a file or hub id."},
    )
    train_split: str = field(default="train", metadata={"help": "Split of a hub data set."})
    train_limit: int | None = field(default=None, metadata={"help": "Use at most this many problems."})
    levels: list[int] | None = field(default=None, metadata={"help": "Keep problems of these levels only."})
    max_problem_chars: int | None = field(default=None, metadata={"help": "Drop problems longer than this."})
    exclude: list[str] = field(
        default_factory=list,
        metadata={"help": "Benchmarks whose problems must not be trained on, e.g. math500."},
    )
    eval_data: str | None = field(
        default=None,
        metadata={
            "help": "Held-out problems for the greedy score before and after, named as in train_data; "
            "generated "
            "arithmetic holds its own out, 'none' skips the evaluation."
        },
    )
    eval_split: str = field(default="test", metadata={"help": "Split of the held-out data set on the hub."})
    eval_limit: int = field(default=200, metadata={"help": "Number of held-out problems."})
    examples: int = field(
        default=EXAMPLES,
        metadata={
            "help": "Worked examples, out of the training problems, in the prompts of the elicited base: the "
            "untrained model is also scored with these and a longer limit. 0 leaves that out."
        },
    )
    template: str = field(
        default=DEFAULT_PROMPT.template,
        metadata={"help": "Prompt: " + "; ".join(f"{k} = {t.description}" for k, t in TEMPLATES.items())},
    )
    prefix: str = field(
        default=DEFAULT_PROMPT.prefix,
        metadata={"help": "Forced opening of every answer, e.g. To or Step (a control)."},
    )
    validate_every: int | None = field(
        default=None,
        metadata={
            "help": "Measure greedy accuracy on problems split off the training set every this many updates, "
            "and after the last one; default: never."
        },
    )
    validation: float | None = field(
        default=None,
        metadata={
            "help": "The problems split off: a share of the training problems below 1, or their number; "
            "default: 0.1 for validate_every, 0.3 for lr_sweep."
        },
    )
    keep_best: bool = field(
        default=False,
        metadata={"help": "Keep what had the best validation accuracy, instead of the last update's."},
    )
    patience: int | None = field(
        default=None, metadata={"help": "Stop after this many validations without a better one."}
    )
    rewards: list[str] = field(
        default_factory=lambda: ["correct"],
        metadata={
            "help": "Reward functions, added up with reward_weights: "
            + "; ".join(f"{k} = {v}" for k, v in REWARDS.items())
            + "; or a function of your own, as file.py:function or package.module:function, which is called "
            "as trl calls it. With arguments: '{name: my_rewards.py:brevity, target: 50}'."
        },
    )
    tools: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Functions that the model may call while it answers, in training and in the greedy "
            f"scores: {', '.join(TOOLS)}, or one of your own, as file.py:function or "
            "package.module:function. The chat template must know tools."
        },
    )
    operators: str = field(default="+-", metadata={"help": "Operators of generated arithmetic."})
    digits: int = field(default=2, metadata={"help": "Largest number of digits in generated arithmetic."})
    terms: int = field(default=2, metadata={"help": "Operands of a generated problem."})
    generated_problems: int = field(
        default=4000, metadata={"help": "Number of generated problems to train on."}
    )
    heldout: float = field(
        default=0.2, metadata={"help": "Share of all possible generated problems that is never trained on."}
    )
    dry_run: bool = field(
        default=False,
        metadata={
            "help": "Print what would be trained, with memory and time estimated from two small updates, "
            "and exit."
        },
    )
    samples_shown: int = field(default=3, metadata={"help": "Answers printed before and after."})

    def __post_init__(self) -> None:
        self.rewards = reward_entries(self.rewards)  # type: ignore[assignment]
        self.tools = tool_names(self.tools)
        self.columns = columns_text(parse_columns(self.columns))
        check_prefix(str(self.prefix))  # a config file may hold anything
        for name, least in (("validate_every", 1), ("patience", 1), ("validation", 1e-9)):
            value = getattr(self, name)
            if value is not None and not least <= value < math.inf:
                raise SteerError(f"{name}={value!r} is out of range; give a value above 0, or leave it out")
        if self.validation is not None and self.validation > 1 and self.validation % 1:
            raise SteerError(f"validation={self.validation} is neither a share below 1 nor a whole number")
        if self.validate_every is None and (self.keep_best or self.patience is not None):
            raise SteerError("keep_best and patience need validations; set validate_every, or leave them out")
        self.eval_columns = columns_text(parse_columns(self.eval_columns))

    def load(
        self, dtype: str, trust_remote_code: bool = False
    ) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The base model, its adapter merged into it, and its tokenizer."""
        name, revision = base_source(self.model, self.base_adapter, self.model_revision, trust_remote_code)
        tokenizer = load_tokenizer(name, revision=revision, trust_remote_code=trust_remote_code)
        model = load_model(
            name,
            revision=revision,
            dtype=dtype,
            attn_implementation=self.attn_implementation,
            trust_remote_code=trust_remote_code,
            load_in_4bit=self.load_in_4bit,
            load_in_8bit=self.load_in_8bit,
        )
        return model, tokenizer

    def arithmetic(self, problems: int) -> Arithmetic:
        return Arithmetic(self.operators, self.digits, self.terms, problems, heldout=self.heldout)


def claim_output_dir(
    folder: str | os.PathLike[str],
    wanted: Settings,
    defaults: Settings | None = None,
    length: Sequence[float] | None = None,
) -> None:
    """
    Make `folder` the home of a run.

    Args:
        folder: made where it is missing.
        wanted: the settings that identify the run (`RunSettings.identity`).
        defaults: what a setting is that a run begun by an older version does not name.
        length: the updates and epochs that are asked for; a run of that length takes no other schedule.

    Raises:
        SteerError: the folder holds another run, with the settings that differ, or other files.
    """
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
        held = {file.name for file in path.iterdir()} - {LOCK_FILE, HOLDER_FILE}
        if RUN_FILE in held and len(held) > 1:
            have = read_json(path / RUN_FILE)
            trained = length is not None and is_trained(read_results(path), length)
            _same(path, have, wanted, defaults or {}, may_differ(trained))
            if have != wanted:
                replace_file(path / RUN_FILE, json.dumps(wanted, indent=2).encode())
        elif held - {RUN_FILE}:
            raise SteerError(f"{path} holds files that are not a run of steer; give another --output_dir")
        else:  # a run that stopped at a mistake in its settings has computed nothing yet
            replace_file(path / RUN_FILE, json.dumps(wanted, indent=2).encode())
    except OSError as error:
        raise SteerError(
            f"cannot use {path} for this run: {error.strerror}; give another --output_dir"
        ) from error


def is_trained(results: Mapping[str, Any], length: Sequence[float]) -> bool:
    """Whether a run with these results has done all updates of `length`, its updates and epochs."""
    return results.get("asked") == [*length] or 0 < length[0] <= results.get("steps", 0)


def may_differ(trained: bool) -> frozenset[str]:
    """What may change when a run goes on; where no update is left, another schedule would have no effect."""
    return CONTINUED - SCHEDULE if trained else CONTINUED


def _same(path: Path, have: Settings, wanted: Settings, defaults: Settings, also: frozenset[str]) -> None:
    changed = differences(have, wanted, defaults, also)
    if changed:
        more = f" (and {len(changed) - 3} more)" if len(changed) > 3 else ""
        raise SteerError(
            f"{path} holds another run: {'; '.join(changed[:3])}{more}; give another --output_dir or "
            "remove the folder"
        )


def read_results(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The results so far; empty when there are none."""
    path = Path(folder) / RESULTS_FILE
    return read_json(path) if path.exists() else {}


def write_results(folder: str | os.PathLike[str], results: dict[str, Any]) -> None:
    replace_file(Path(folder) / RESULTS_FILE, (json.dumps(results, indent=2) + "\n").encode())
