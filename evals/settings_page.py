"""
Write docs/settings.md: every setting of steer's own, with its type, default and meaning.

    python -m evals.settings_page --out docs/settings.md
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable
from dataclasses import MISSING, Field, fields
from pathlib import Path

from trl import DPOConfig, GRPOConfig, SFTConfig

from steer.arguments import shown_default, with_default
from steer.cli import train_sae
from steer.config import SteeringArguments
from steer.evaluation import options
from steer.files import replace_file
from steer.sae import SAEConfig
from steer.sae.schedule import TrainConfig
from steer.training.answer_configs import SteeringDPOConfig, SteeringSFTConfig
from steer.training.arguments import AnswerArguments, FinderArguments, PopulationArguments, SweepArguments
from steer.training.baselines import Baseline
from steer.training.config import SteeringGRPOConfig
from steer.training.run import RunConfig

TRL = "https://huggingface.co/docs/trl"
# What the text of a table cell may not hold as it is.
ESCAPED = {"&": "&amp;", "<": "&lt;", "|": "\\|"}
INTRODUCTION = """\
# Settings

Written by `python -m evals.settings_page --out docs/settings.md` from the code.

A setting of a training program is a line of a config file, `name: value`, or an option, `--name value`,
which overrides the file. `--help` shows all of them with their defaults; after `--config NAME` the defaults
are those of the config. `--print_config` prints all settings of a run as YAML, for `--config`, and exits:

    steer train --config demo --learning_rate 1e-2 --print_config > FILE
    steer train --config FILE

Beside the settings below, `steer train`, `steer train-baseline` and `steer sweep` take `--config NAME`, a
YAML file or the name of one of steer's, and `--launcher NAME` (see [Several machines](distributed.md)).
`steer train` takes `--method NAME` too, which chooses how vectors are trained: `grpo` (the default), `sft` or
`dpo`. A setting of another method is refused.
"""


def render() -> str:
    """The whole page, as Markdown."""
    parts = [
        INTRODUCTION,
        "## Training: model, data and reward\n",
        table(RunConfig),
        "## Training: vectors\n\nOf `steer train` and `steer sweep`.\n",
        table(SteeringArguments),
        "## Training: the trainer\n\nOf `--method grpo`, which is the default, and of `steer sweep` and"
        " `steer train-baseline`.\n",
        *trainer(SteeringGRPOConfig, GRPOConfig, "grpo_trainer"),
        "## Training on given answers\n\nOf `--method sft` and `--method dpo`: see"
        " [Supervised and preference training](training.md#supervised-and-preference-training).\n",
        table(AnswerArguments),
        "The trainer of `--method sft`:\n",
        *trainer(SteeringSFTConfig, SFTConfig, "sft_trainer"),
        "The trainer of `--method dpo`:\n",
        *trainer(SteeringDPOConfig, DPOConfig, "dpo_trainer"),
        "## Choice of a learning rate\n\nOf `steer train` and `steer train-baseline`.\n",
        table(SweepArguments),
        "Of `steer train`: see [Find a learning rate](training.md#find-a-learning-rate).\n",
        table(FinderArguments),
        "## Many sets of vectors at once\n\nOf `steer train` and `steer sweep`: see"
        " [Many runs at once](sweep.md).\n",
        table(PopulationArguments),
        "## Baselines\n\nOf `steer train-baseline`.\n",
        table(Baseline),
        "## Sparse autoencoders\n\nOf `steer sae train`: lines of its config, or `name=value`.\n",
        table(train_sae.RunConfig),
        "Their training:\n",
        table(TrainConfig),
        "Each SAE, as `saes.NAME.setting`:\n",
        table(SAEConfig),
        "## Evaluation\n\nOptions of `steer eval`.\n",
        of_parser(options.parser("")),
    ]
    return "\n".join(parts).rstrip() + "\n"


def trainer(kind: type, of_trl: type, page: str) -> list[str]:
    """The settings of a trainer that are steer's own, and those of trl with another default."""
    inherited = {f.name: f for f in fields(of_trl)}
    names = {name for base in kind.__mro__ if base.__module__.startswith("steer") for name in vars(base).get(
        "__annotations__", {})}  # fmt: skip
    named = [f for f in fields(kind) if f.name in names]
    own = [f for f in named if f.name not in inherited]
    changed = [f for f in named if f.name in inherited and default(f) != default(inherited[f.name])]
    link = f"{TRL}/{page}#trl.{of_trl.__name__}"
    return [
        table(kind, own),
        f"All settings of trl's [`{of_trl.__name__}`]({link}) are settings too. These have another default "
        "here:\n",
        rows(
            ["setting", "default", "in trl", "meaning"],
            (
                [
                    code(f.name),
                    code(default(f)),
                    code(default(inherited[f.name])),
                    escaped(f.metadata["help"]),
                ]
                for f in changed
            ),
        ),
    ]


def table(owner: type, chosen: Iterable[Field] | None = None) -> str:
    """The fields of a dataclass."""
    kinds = {
        name: kind
        for base in reversed(owner.__mro__)
        for name, kind in vars(base).get("__annotations__", {}).items()
    }
    return rows(
        ["setting", "type", "default", "meaning"],
        (
            [
                code(f.name),
                str(kinds[f.name]).replace(" | ", " or "),
                code(default(f)),
                escaped(f.metadata["help"]),
            ]
            for f in (fields(owner) if chosen is None else chosen)
            if f.init
        ),
    )


def of_parser(parser: argparse.ArgumentParser) -> str:
    """The options of a command, whose help texts name the defaults that the program works out."""
    lines = []
    for action in parser._actions:
        if action.dest == "help":
            continue
        told = action.help or ""
        told = told if action.required or action.nargs == 0 else with_default(told, action.default)
        meaning, _, value = told.removesuffix(")").partition(" (default: ")
        names = [word for word in action.option_strings if "_" not in word]
        value = "required" if action.required else value
        lines.append([", ".join(map(code, names)), escaped(value), escaped(meaning if value else told)])
    return rows(["option", "default", "meaning"], lines)


def default(field: Field) -> str:
    if field.default_factory is not MISSING:
        return shown_default(field.default_factory())
    return "required" if field.default is MISSING else shown_default(field.default)


def code(text: str) -> str:
    return text if text in ("required", "not set") else f"`{text}`"


def escaped(text: str) -> str:
    for one, other in ESCAPED.items():
        text = text.replace(one, other)
    return re.sub(r"\\boxed(\{\w*\})?", r"`\g<0>`", text)


def rows(header: list[str], body: Iterable[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *body]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", required=True, help="file to write")
    replace_file(Path(parser.parse_args().out), render().encode())


if __name__ == "__main__":
    main()
