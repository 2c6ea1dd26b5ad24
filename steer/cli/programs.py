"""
The commands with a command line of their own, such as `steer train`: their words go on to it as they are. The
files of `recipes/` call the same programs, for `accelerate launch`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from importlib import import_module

from steer.errors import SteerError, one_line
from steer.recipe_files import LAUNCHER, launcher_file

Program = Callable[[list[str]], "int | None"]


def find(words: list[str]) -> tuple[Program, list[str]] | None:
    """The program that a command line names, and the words for it."""
    for count in (2, 1):
        name = " ".join(words[:count])
        if name in PROGRAMS:
            return PROGRAMS[name][0], words[count:]
    return None


def _trainer(command: str, module: str) -> Program:
    def run(words: list[str]) -> None:
        words = _launch(command, words)
        from steer.training.recipe import start

        start(lambda: import_module(module).main(words))

    return run


def _program(module: str) -> Program:
    def run(words: list[str]) -> int:
        try:
            return import_module(module).main(words)
        except BrokenPipeError:  # the reader of our output has seen enough: `main` ends quietly
            raise
        except OSError as error:  # what the operating system refuses: too long a name, a full disk
            raise SteerError(one_line(error)) from error

    return run


def _compare(words: list[str]) -> int | None:
    config = any(word == "--config" or word.startswith("--config=") for word in words)
    return _program("steer.cli.compare" if config else "steer.evaluation.compare")(words)


PROGRAMS: dict[str, tuple[Program, str]] = {
    "train": (_trainer("train", "steer.cli.train"), "train vectors by reinforcement learning"),
    "train-baseline": (
        _trainer("train-baseline", "steer.cli.train_baseline"),
        "train what vectors are compared with: a full fine-tune, LoRA, ...",
    ),
    "sweep": (
        _trainer("sweep", "steer.cli.layer_sweep"),
        "train many sets of vectors at once: every layer, learning rates, seeds",
    ),
    "eval": (_program("steer.evaluation.run"), "score a model and its variants on benchmarks"),
    "compare": (_compare, "tables and a page from runs of `steer eval`, or a whole comparison of methods"),
    "browse": (_program("steer.evaluation.browse"), "read the graded answers of `steer eval` side by side"),
    "grading-check": (
        _program("steer.evaluation.grading_check"),
        "grade answers again by other graders, and list the differences",
    ),
    "sae train": (
        _trainer("sae train", "steer.cli.train_sae"),
        "train sparse autoencoders on a model's activations",
    ),
}


def _launch(command: str, words: list[str]) -> list[str]:
    """
    The words without `--launcher`, which replaces this process by `accelerate launch` of the same program.
    Its processes find the launcher in the environment.

    A process that no launcher started keeps to one GPU, the first it sees: transformers' trainer would copy
    the model to all of them and bypass the sampler.
    """
    for at, word in enumerate(words):
        if word == "--launcher" or word.startswith("--launcher="):
            used = 1 if "=" in word else 2
            if len(words) < at + used:
                raise SteerError("--launcher needs a file of accelerate, or a name such as ddp")
            given = word.partition("=")[2] if used == 1 else words[at + 1]
            file = launcher_file(given)
            os.environ[LAUNCHER] = given
            start = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file)]
            rest = words[:at] + words[at + used :]
            os.execv(sys.executable, [*start, "-m", "steer.cli", *command.split(), *rest])
    if "WORLD_SIZE" not in os.environ:
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    return words
