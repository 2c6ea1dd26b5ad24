"""`RunSettings`: all settings of one run, from the command line to `run.json` and the artifact."""

from __future__ import annotations

import json
import math
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from difflib import get_close_matches
from enum import Enum
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, cast

import yaml
from transformers.trainer_pt_utils import AcceleratorConfig
from trl import TrlParser

from steer.arguments import Help
from steer.base_adapter import adapter_checksum
from steer.config import SteeringArguments, SteeringConfig
from steer.errors import SteerError, shown
from steer.models import fast_dtype
from steer.prompt import PromptSpec
from steer.recipe_files import config_file
from steer.tasks.own_code import source_checksums
from steer.tasks.reward_loading import reward_names
from steer.training import init
from steer.training.answer_configs import SteeringDPOConfig, SteeringSFTConfig
from steer.training.arguments import AnswerArguments
from steer.training.config import SteeringGRPOConfig
from steer.training.run import RUN_FILE, RunConfig
from steer.training.same_result import WATCHING
from steer.versions import versions

if TYPE_CHECKING:
    from steer.training.arguments import FinderArguments, PopulationArguments, SweepArguments
    from steer.training.baselines import Baseline

TrainingConfig = SteeringGRPOConfig | SteeringSFTConfig | SteeringDPOConfig
# How vectors are trained: the settings of the trainer, and what `--help` says of it.
METHODS: dict[str, tuple[type[TrainingConfig], str]] = {
    "grpo": (SteeringGRPOConfig, "reinforcement learning from the model's own samples"),
    "sft": (SteeringSFTConfig, "supervised learning from given answers"),
    "dpo": (SteeringDPOConfig, "preferences between two answers"),
}
_OTHERS = {"grpo_baseline": "train-baseline", "layer_sweep": "sweep"}
_COMMANDS = {
    **{f"{method}_steer": "train" for method in METHODS},
    **_OTHERS,
}
# Settings of training that provenance names even at their defaults.
_ESSENTIAL = (
    *("learning_rate", "lr_by_layer", "advantage", "loss_type", "beta", "num_generations"),
    *("generation_batch_size", "max_completion_length", "temperature", "max_steps", "seed"),
)


@dataclass(frozen=True)
class RunSettings:
    """
    All settings of one run.

    Args:
        recipe: name of the recipe, such as `grpo_steer`.
        run: model, data and reward.
        steering: which vectors are trained, and where.
        training: the trainer's settings, those of `method`.
        baseline: what is trained instead of vectors; None where vectors are.
        rates: the choice of the learning rate before the run.
        finder: the recommendation of a learning rate instead of the run.
        population: the members of a population.
        answers: which answers of a run are trained on, by the methods that train on given answers.
        member: name of the member that these settings are of; empty for a run that is none.
    """

    recipe: str
    run: RunConfig
    steering: SteeringArguments
    training: Any  # a TrainingConfig
    baseline: Baseline | None = None
    rates: SweepArguments | None = None
    finder: FinderArguments | None = None
    population: PopulationArguments | None = None
    answers: AnswerArguments | None = None
    member: str = ""

    def __post_init__(self) -> None:
        _default_training(cast(Any, type(self.training)), self.training.use_cpu)

    @classmethod
    def parse(
        cls,
        recipe: str,
        description: str | None = None,
        arguments: Sequence[str] = (),
        **more: type,
    ) -> RunSettings:
        """
        The settings that a config file and a command line give.

        Args:
            recipe: name of the recipe. Of `grpo_steer` they may choose another method, whose recipe it then
                is.
            description: the text above the settings in `--help`.
            arguments: the words of the command line. `--config` is a file, or the name of a config that
                comes with the package.
            more: dataclasses of further parts, by the name of their field here.

        Raises:
            SteerError: a setting that does not exist or cannot work, a config file that cannot be read.
        """
        words = _with_config_file(arguments)
        method = chosen_method(words) if recipe == "grpo_steer" else "grpo"
        kinds = _kinds(method, more)
        if method != "grpo":
            recipe = f"{method}_steer"
        parts = dict(zip(kinds, _read(kinds, description, recipe, words, more), strict=True))
        for part in parts.values():
            _check_finite(part)
        parts["run"].init = init.remembered(parts["run"].init, parts["training"].output_dir, RUN_FILE)
        if parts["run"].model_dtype == "fast":
            # what "fast" means here is what the run is continued with, wherever that is
            parts["run"].model_dtype = fast_dtype()
        return cls(recipe, **parts)

    def steering_config(self) -> SteeringConfig:
        """The config of the vectors that the run attaches."""
        return SteeringConfig(**asdict(self.steering), prompt=self.prompt)

    @property
    def prompt(self) -> PromptSpec:
        """How the run puts its problems to the model."""
        run = self.run
        return PromptSpec(run.template, run.prefix, chat_template_kwargs=self.training.chat_template_kwargs)

    def identity(self) -> dict[str, dict[str, Any]]:
        """
        What identifies the run on disk: every setting that changes its results, by part, as JSON types. How
        long it is trained is not among them, since a run can go on.
        """
        trained = {"baseline": self.baseline} if self.baseline else {"steering": self.steering}
        parts = {"run": asdict(self.run), **{name: asdict(part) for name, part in trained.items()}}
        parts["training"] = {k: v for k, v in self.training.to_dict().items() if k != "max_steps"}
        usual, given = AcceleratorConfig().to_dict(), parts["training"]["accelerator_config"]
        # what is set alone: another version of transformers has other names in it
        parts["training"]["accelerator_config"] = {k: v for k, v in given.items() if v != usual.get(k)}
        if self.answers is not None:
            # with another number of processes it differs, as GRPO's generation_batch_size does
            update = {"examples_per_update": self._examples_per_update()}
            parts["answers"] = {"method": self.training.method, **asdict(self.answers), **update}
        kept = {part: {k: v for k, v in s.items() if k not in WATCHING} for part, s in parts.items()}
        sources = source_checksums("reward", reward_names(self.run.rewards))
        sources |= source_checksums("tool", self.run.tools)
        if self.run.base_adapter:
            sources["base_adapter"] = adapter_checksum(Path(self.run.base_adapter).expanduser())
        if self.run.init:
            sources["init"] = init.checksum(init.read(self.run.init, self.training.output_dir))
        if sources:
            kept["source"] = {f"source of {name}": checksum for name, checksum in sources.items()}
        return json.loads(json.dumps(kept, default=str))

    def defaults(self) -> dict[str, dict[str, Any]]:
        """
        `identity` of the same run with nothing set. A run whose `run.json` does not say how many examples an
        update has is taken to have as many as this one.
        """
        default = self.unset().identity()
        if "answers" in default:
            default["answers"]["examples_per_update"] = self._examples_per_update()
        return default

    def _examples_per_update(self) -> int:
        """How many given answers, or pairs of them, all processes together see in an update."""
        training = self.training
        return training.train_batch_size * training.gradient_accumulation_steps * training.world_size

    def provenance(self) -> dict[str, Any]:
        """What an artifact says of its making: the run, and what of training is essential or no default."""
        default = self.unset().training.to_dict()
        training = {
            name: value
            for name, value in self.training.to_dict().items()
            if name in _ESSENTIAL or (value != default[name] and name not in WATCHING)
        }
        idle = WATCHING if self.training.method == "grpo" else {*WATCHING, "rewards"}
        run = {name: value for name, value in asdict(self.run).items() if name not in idle}
        plain = json.loads(json.dumps({"run": run, "training": training}, default=str))
        member = {"member": self.member} if self.member else {}
        started = {}
        if self.run.init:
            started["init"] = init.describe(init.read(self.run.init, self.training.output_dir))
        return {
            "recipe": self.recipe,
            "method": self.training.method,
            **member,
            **plain,
            **started,
            "versions": versions("steer", "torch", "transformers", "trl"),
        }

    def unset(self) -> RunSettings:
        """The settings of a run of the same kind in which nothing was set."""
        return replace(
            self,
            run=RunConfig(),
            steering=SteeringArguments(),
            training=_default_training(cast(Any, type(self.training)), self.training.use_cpu),
            baseline=self.baseline and type(self.baseline)(),
            answers=self.answers and AnswerArguments(),
        )


@cache
def _default_training(kind: Any, use_cpu: bool) -> Any:
    """Made once, when settings are read: transformers resets the state of accelerate each time."""
    return kind(output_dir="unused", use_cpu=use_cpu)


def chosen_method(words: Sequence[str]) -> str:
    """The `method` of a command line, or of its config file, whose path is among the words."""
    method: Any = "grpo"
    if "--config" in words[:-1]:
        try:
            given = yaml.safe_load(Path(words[words.index("--config") + 1]).read_text())
            method = given.get("method", method) if isinstance(given, dict) else method
        except (OSError, yaml.YAMLError, UnicodeDecodeError, RecursionError):
            pass  # told when the settings are read
    for at, word in enumerate(words):
        if word == "--method":
            method = words[at + 1] if at + 1 < len(words) else ""
        elif word.startswith("--method="):
            method = word.partition("=")[2]
    if method not in METHODS:
        raise SteerError(f"method={shown(method)} is unknown; choose one of {', '.join(METHODS)}")
    return method


def setting_names(method: str) -> set[str]:
    """The settings that a run of this method has, without those of searches and populations."""
    return {f.name for part in _kinds(method, {}).values() for f in fields(part) if f.init}


def _kinds(method: str, more: dict[str, type]) -> dict[str, type]:
    """The dataclasses of a run's settings; `more` are parts that GRPO alone has."""
    own = more if method == "grpo" else {"answers": AnswerArguments}
    return {"run": RunConfig, "steering": SteeringArguments, "training": METHODS[method][0], **own}


def _read(
    kinds: dict[str, type],
    description: str | None,
    recipe: str,
    words: Sequence[str],
    more: dict[str, type],
) -> tuple[Any, ...]:
    """One object for each dataclass of `kinds`. `more`: what GRPO has beside."""
    parts = tuple(kinds.values())
    usage = f"steer {_COMMANDS[recipe]} --config NAME [--setting VALUE ...]"
    method = recipe.partition("_")[0]
    parser = _Parser(cast(list[Any], parts), description=description, usage=usage, formatter_class=Help)
    parser.add_argument(
        "--config", metavar="NAME", help="YAML file of settings, or the name of one of steer's, such as demo"
    )
    parser.add_argument(
        "--print_config",
        "--print-config",
        action="store_true",
        help="print all settings as YAML, which --config reads, and exit",
    )
    if _COMMANDS[recipe] == "train":
        told = "; ".join(f"{name} = {about}" for name, (_, about) in METHODS.items())
        parser.add_argument(
            "--method", metavar="NAME", default=method, help=f"how vectors are trained: {told} (--help shows "
            "the settings of the one that is given)",
        )  # fmt: skip
    try:
        parsed = parser.parse_args_and_config(words)
        given = parser.given.get("method", method)
        if _COMMANDS[recipe] == "train" and given != method:  # abbreviated: --metho dpo
            raise SteerError(f"method={shown(given)} was not written as --method; write --method {given}")
        if parser.given["print_config"]:
            if os.environ.get("RANK", "0") == "0":
                told = "" if recipe in ("grpo_steer", *_OTHERS) else f"method: {method}\n\n"
                print(_environment(words) + told + _as_yaml(parts, parser.given), end="")
            sys.exit(0)
        return parsed[: len(parts)]
    except OSError as error:
        raise SteerError(f"cannot read {error.filename} ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise SteerError(f"the config file is not YAML: {' '.join(str(error).split())}") from error
    except (ValueError, ImportError) as error:  # trl and transformers on settings that cannot work
        message = " ".join(str(error).split())
        unknown = re.findall(r"'--([^'=]+)", message)
        if unknown and ("not used by" in message or message.startswith("Unknown arguments")):
            known = [field.name for part in parts for field in fields(part) if field.init]
            if _COMMANDS[recipe] == "train" and (others := _methods_with(unknown[0], more)):
                raise SteerError(
                    f"{unknown[0]} is a setting of method={' and method='.join(others)}, and has no effect "
                    f"with method={method}; leave it out"
                ) from error
            near = get_close_matches(unknown[0].replace("-", "_"), known, 1)
            hint = f"; did you mean {near[0]}?" if near else "; --help lists the settings"
            message = f"unknown setting {unknown[0]}{hint}"
        raise SteerError(message) from error


def _methods_with(setting: str, more: dict[str, type]) -> list[str]:
    """The methods that have a setting of this name."""
    name = setting.replace("-", "_")
    kinds = {method: _kinds(method, more).values() for method in METHODS}
    return [m for m, parts in kinds.items() if any(f.name == name for part in parts for f in fields(part))]


def _check_finite(part: Any) -> None:
    for field in fields(part):
        value = getattr(part, field.name, None)
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, float) and not math.isfinite(number):
                raise SteerError(
                    f"{field.name}={value!r} is not a finite number; give a finite number, or leave it out"
                )


def _with_config_file(arguments: Sequence[str]) -> list[str]:
    """The words of a command line with the path of the config file in place of its name."""
    words: list[str] = []
    for word in arguments:
        # trl reads the file only where it is a word of its own
        words += ["--config", word.removeprefix("--config=")] if word.startswith("--config=") else [word]
    if "--config" in words[:-1]:
        at = words.index("--config") + 1
        words[at] = str(config_file(words[at]))
    return words


class _Parser(TrlParser):
    """
    trl's parser of settings, which raises SteerError where a command line cannot be read. It keeps what was
    given to the dataclasses: they fill in and derive settings when they are made.
    """

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        parsed, rest = super().parse_known_args(args, namespace)
        self.given: dict[str, Any] = dict(vars(parsed))
        return parsed, rest

    def error(self, message: str) -> NoReturn:
        raise SteerError(f"{message}; --help lists the settings")


def _environment(words: Sequence[str]) -> str:
    """The environment variables that a config file sets, as it does."""
    file = Path(words[words.index("--config") + 1]) if "--config" in words else None
    variables = yaml.safe_load(file.read_text()).get("env") if file else None
    return f"{yaml.safe_dump({'env': variables})}\n" if variables else ""


def _as_yaml(parts: Sequence[type], given: dict[str, Any]) -> str:
    """A config file of all settings, part by part; a token of the hub is left out."""
    text = ""
    for part in parts:
        names = [f.name for f in fields(part) if f.init and f.name != "hub_token"]
        values = {name: v.value if isinstance(v := given[name], Enum) else v for name in names}
        title = getattr(part, "_argument_group_name", part.__name__)
        text += f"# {title}\n{yaml.safe_dump(values, sort_keys=False, allow_unicode=True)}\n"
    return text
