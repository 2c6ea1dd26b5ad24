"""What a comparison of methods consists of, as the YAML files `recipes/configs/compare-*.yaml` say it."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

from steer.errors import SteerError
from steer.recipe_files import config_file

RECIPES = ("grpo_steer", "grpo_baseline", "sft_steer", "dpo_steer")
# These train on answers that are given, such as the samples of a method before them (`answers_of`).
ANSWER_RECIPES = ("sft_steer", "dpo_steer")
# Trains several seeds of a method in one process, on one copy of the frozen model (`together: true`).
POPULATION_RECIPE = "layer_sweep"
# What `evaluation` may say beside `benchmarks` and `samples`: options of `steer eval`.
EVALUATION = (
    *("template", "prefix", "max_new_tokens", "dtype", "engine", "chat_template_kwargs"),
    *("temperature", "top_p", "limit", "columns"),
)


@dataclass(frozen=True)
class Plan:
    """A comparison as its YAML file describes it."""

    config: str  # the training config that all runs share
    methods: dict[str, dict[str, Any]]
    evaluation: dict[str, Any]
    output_dir: str
    out: str
    settings: dict[str, Any] = field(default_factory=dict)  # changes to the config, for all runs
    launcher: str | None = None  # of accelerate; default: one GPU where there is one, else the CPU
    seeds: tuple[int, ...] = (0, 1, 2)
    sweep: dict[str, Any] = field(default_factory=dict)  # settings of the runs that choose a rate
    reference: str | None = None  # the method whose gain is the whole
    prefixes: tuple[str, ...] = ()
    systems: tuple[str, ...] = ()  # candidates for the best constant system prompt
    examples: int = 0  # worked examples in the prompts of the elicited base
    longer: int | None = None  # tokens the base gets once more, to tell a gain from brevity

    @property
    def sweep_seed(self) -> int:
        """The seed that rates are chosen with: the sweep's own, or the first that is not reported."""
        return int(self.sweep.get("seed", next(i for i in range(len(self.seeds) + 1) if i not in self.seeds)))


def read_plan(path: str) -> Plan:
    """
    The comparison in a file, or in one of the package's configs by its name. SteerError for a file that is
    none, and for names in it that mean nothing.
    """
    path = str(config_file(path))
    try:
        settings = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise SteerError(f"cannot read {path} ({error.strerror})") from error
    except yaml.YAMLError as error:
        raise SteerError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    known = {f.name for f in fields(Plan)}
    needed = {"config", "methods", "evaluation", "output_dir", "out"}
    given = set(settings) if isinstance(settings, dict) else set()
    if given - known or needed - given:
        raise SteerError(
            f"{path} is not a comparison: unknown {sorted(given - known)}, missing {sorted(needed - given)}"
        )
    asked = settings["evaluation"] if isinstance(settings["evaluation"], dict) else {}
    unknown = sorted(set(asked) - {"benchmarks", "samples", *EVALUATION})
    if unknown or not isinstance(asked.get("benchmarks"), list) or not asked["benchmarks"]:
        raise SteerError(
            f"{path}: evaluation needs benchmarks, a list, and takes samples, {', '.join(EVALUATION)}"
            + (f"; it has {', '.join(unknown)}" if unknown else "")
        )
    lists = {k: tuple(settings[k]) for k in ("seeds", "prefixes", "systems") if k in settings}
    plan = Plan(**{**settings, **lists})
    if "together" in plan.settings:
        raise SteerError(f"{path}: together is said of a method, not in settings; write it under a method")
    for name, method in plan.methods.items():
        like = plan.methods.get(method.get("like", name))
        if like is None or (like | method).get("recipe") not in RECIPES:
            raise SteerError(
                f"{path}: method {name!r} has no recipe; write recipe: with one of {', '.join(RECIPES)}, or "
                "like: METHOD"
            )
        if "learning_rate" not in like | method and not like.get("lr_sweep"):
            raise SteerError(f"{path}: method {name!r} has neither learning_rate nor lr_sweep")
        _check_answers(path, plan.methods, name, like | method)
        _check_together(path, plan.methods, name, like | method)
    return replace(plan, config=str(config_file(plan.config)))


def _check_answers(path: str, methods: dict[str, dict[str, Any]], name: str, whole: dict[str, Any]) -> None:
    """SteerError where a method cannot be trained on given answers as the plan says."""
    if whole["recipe"] not in ANSWER_RECIPES:
        if "answers_of" in whole:
            raise SteerError(
                f"{path}: method {name!r} samples its answers, and answers_of has no effect; leave it out, "
                f"or write recipe: {' or '.join(ANSWER_RECIPES)}"
            )
        return
    if "lr_sweep" in whole:
        raise SteerError(
            f"{path}: method {name!r} is trained on answers, and lr_sweep is for methods that sample them; "
            "give learning_rate"
        )
    if "answers_of" not in whole:
        return
    before = [*methods][: [*methods].index(name)]
    sampling = [
        n for n in before if (methods[methods[n].get("like", n)] | methods[n])["recipe"] == RECIPES[0]
    ]
    if whole["answers_of"] not in sampling:
        raise SteerError(
            f"{path}: method {name!r} has answers_of: {whole['answers_of']}; give a method before it with "
            f"recipe: {RECIPES[0]}" + (f", such as {sampling[0]}" if sampling else "")
        )


def _check_together(path: str, methods: dict[str, dict[str, Any]], name: str, whole: dict[str, Any]) -> None:
    """SteerError where the seeds of a method cannot be trained in one process."""
    if (together := whole.get("together", False)) not in (True, False):
        raise SteerError(f"{path}: method {name!r} has together: {together!r}; write true or false")
    if not together:
        return
    if whole["recipe"] != RECIPES[0]:
        raise SteerError(
            f"{path}: method {name!r} has recipe: {whole['recipe']}, and together is for seeds of steering "
            f"vectors, which share one frozen model; write together: false, or recipe: {RECIPES[0]}"
        )
    if any(method.get("answers_of") == name for method in methods.values()):
        raise SteerError(
            f"{path}: another method has answers_of: {name}, and runs that are trained together keep no "
            "samples; write together: false"
        )
