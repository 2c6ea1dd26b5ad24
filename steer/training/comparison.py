"""A comparison of methods (`steer compare`): the processes that train and score them, and what is done."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from steer.errors import SteerError
from steer.evaluation.pack import pack, read_packed
from steer.evaluation.plan import ANSWER_RECIPES, EVALUATION, POPULATION_RECIPE, Plan
from steer.files import replace_file
from steer.models import MIXED
from steer.recipe_files import launcher_file, recipes_folder
from steer.tasks.columns import columns_text, parse_columns
from steer.tasks.data import save_problems
from steer.tasks.prompts import DEFAULT_PROMPT
from steer.threads import machine, usable_cpus
from steer.training import comparison_records as records
from steer.training.comparison_report import curve, write_report
from steer.training.config import SteeringGRPOConfig
from steer.training.run import RunConfig

if TYPE_CHECKING:
    from datasets import Dataset

ARTIFACTS = {"vectors": "--vectors", "adapter": "--adapter", "model": "--model"}
# Settings of a run that are about the choice of its rate alone.
OF_SWEEPS = ("sweep_steps", "sweep_only", "validation_samples")
# Those that say which problems are trained on; held-out ones are left out of them.
OF_DATA = (
    *("eval_data", "eval_split", "eval_limit", "eval_columns"),
    *("train_data", "train_split", "train_limit", "levels", "max_problem_chars", "exclude", "columns"),
    *("operators", "digits", "terms", "generated_problems", "heldout"),
)


class Failed(Exception):
    """A process of a run ended with an error."""


class Comparison:
    """The plan, and what of it is done."""

    def __init__(self, plan: Plan):
        self.plan = plan
        self.shared = {**yaml.safe_load(Path(plan.config).read_text()), **plan.settings}
        if any(one.get("tools") for one in (self.shared, *plan.methods.values())):
            raise SteerError(
                f"{plan.config} with tools: a comparison scores with `steer eval`, which calls none; leave "
                "them out"
            )
        self.model = self.shared.get("model", RunConfig.model)
        self.work = Path(plan.output_dir)
        self.sweep = {name: value for name, value in plan.sweep.items() if name != "seed"}
        self.runs, self.sweeps = Path(plan.out, "runs"), Path(plan.out, "sweeps")
        # methods whose seeds this process has trained together, with what went wrong
        self.populations: dict[str, Failed | None] = {}

    def jobs(self) -> Iterator[tuple[str, Any]]:
        """What there is to do, in order: the name of its file and a call that makes it."""
        yield "base", self.untrained
        if self.plan.longer:
            yield "base-longer", self.longer
        if self.plan.examples:
            yield "elicited", self.elicited
        if self.shared.get("base_adapter"):
            yield "no-adapter", self.without_adapter
        if self.plan.systems:
            yield "system-prompt", self.system_prompt
        for seed in self.plan.seeds:
            for name in self.plan.methods:
                yield f"{name}-{seed}", lambda name=name, seed=seed: self.trained(name, seed)

    def base(self) -> list[str]:
        """The base model as options of `steer eval`."""
        words = ["--model", self.model]
        for name, option in (("model_revision", "--revision"), ("base_adapter", "--base-adapter")):
            words += [option, str(self.shared[name])] if self.shared.get(name) else []
        return words

    def base_settings(self) -> dict[str, Any]:
        """The settings that name the base model."""
        others = {name: self.shared.get(name) for name in ("model_revision", "base_adapter")}
        return {"model": self.model, **{name: value for name, value in others.items() if value}}

    def data_settings(self) -> dict[str, Any]:
        """The settings that say which problems are trained on: the source, and what is no default."""
        default = RunConfig()
        said = {name: self.shared.get(name, getattr(default, name)) for name in OF_DATA}
        return {k: v for k, v in said.items() if k == "train_data" or v != getattr(default, k)}

    # ---- controls that train nothing

    def untrained(self) -> None:
        """The base, greedily and at temperature 1, and with forced openings."""
        asked = {"evaluation": self.asked(), "base": self.base_settings(), "prefixes": self.plan.prefixes}
        if not self.done("base", asked):
            prefixes = ["--prefixes", *self.plan.prefixes] if self.plan.prefixes else []
            self.evaluate("base", [*self.base(), "--examples", "0", *prefixes], asked)

    def longer(self) -> None:
        """The base with more room for its answers."""
        asked = {"evaluation": self.asked(), "base": self.base_settings(), "longer": self.plan.longer}
        if not self.done("base-longer", asked):
            name = ["--name", f"base, {self.plan.longer} tokens", "--max-new-tokens", str(self.plan.longer)]
            name += ["--examples", "0"]
            self.evaluate("base-longer", [*self.base(), *name], asked)

    def elicited(self) -> None:
        """The base with worked examples in its prompts, out of the training problems, and a longer limit."""
        asked = {"evaluation": self.asked(), "base": self.base_settings(), "examples": self.plan.examples}
        asked["data"] = self.data_settings()
        if not self.done("elicited", asked):
            self.evaluate("elicited", [*self.base(), "--no-base", *self.worked_examples()], asked)

    def without_adapter(self) -> None:
        """
        The model without the adapter that the base has merged, with all the room and examples that the base
        is given: what an adapter costs, as one that shortens answers may, is no gain to win back.
        """
        model = {name: value for name, value in self.base_settings().items() if name != "base_adapter"}
        given = {"longer": self.plan.longer, "examples": self.plan.examples}
        asked = {"evaluation": self.asked(), "model": model, **given}
        if self.plan.examples:
            asked["data"] = self.data_settings()
        if self.done("no-adapter", asked):
            return
        words = ["--model", self.model, "--name", "without adapter"]
        if revision := self.shared.get("model_revision"):
            words += ["--revision", revision]
        if self.plan.longer:
            words += ["--max-new-tokens", str(self.plan.longer)]
        examples = self.worked_examples() if self.plan.examples else ["--examples", "0"]
        self.evaluate("no-adapter", [*words, *examples], asked)

    def worked_examples(self) -> list[str]:
        """The plan's number of worked examples, out of the training problems, as options of `steer eval`."""
        file = self.work / "training.jsonl"
        save_problems(file, self.training_problems())
        return ["--examples", str(self.plan.examples), "--examples-from", str(file)]

    def system_prompt(self) -> None:
        """The candidate that is best on problems split off the training set, on the held-out ones."""
        asked = {
            "evaluation": self.asked(),
            "base": self.base_settings(),
            "systems": self.plan.systems,
            "sweep": self.sweep,
            "data": self.data_settings(),
        }
        if self.done("system-prompt", asked):
            return
        from steer.training.rate_search import SHARE
        from steer.training.validation import split

        share = self.sweep.get("validation", SHARE)
        _, validation = split(self.training_problems(), share)
        file = self.work / "validation.jsonl"
        save_problems(file, validation)
        named = {f"system {n}": text for n, text in enumerate(self.plan.systems, 1)}
        out = self.work / "eval-systems"
        systems = [f"{name}={text}" for name, text in named.items()]
        what = ["--benchmarks", str(file), "--samples", "0", "--no-base", "--systems", *systems]
        self.call([*self.evals(out, ("columns", "limit")), *self.base(), *what])
        rows = json.loads((out / "scores.json").read_text())["rows"]
        tried = {named[row["method"]]: row["accuracy"]["value"] for row in rows}
        best = max(tried, key=lambda text: tried[text])
        chosen = {"validation_problems": len(validation), "tried": tried, "chosen": best}
        model = [*self.base(), "--no-base", "--systems", f"system prompt={best}"]
        self.evaluate("system-prompt", model, asked, chosen)

    def training_problems(self) -> Dataset:
        """The training problems that the runs share, as a data set."""
        from steer.training.problems import problems

        known = {f.name for f in fields(RunConfig)}
        return problems(RunConfig(**{k: v for k, v in self.shared.items() if k in known}))[0]

    # ---- training

    def trained(self, name: str, seed: int) -> None:
        """One method with one seed: trained, scored, packed."""
        settings, launcher = self.settings(name)
        settings |= {"seed": seed, "learning_rate": self.rate(name)}
        job = f"{name}-{seed}"
        asked: dict[str, Any] = {"evaluation": self.asked(), "training": settings}
        if source := settings.pop("answers_of", None):
            settings["train_data"] = str(self.work / f"{source}-{seed}")
            asked["samples_of"] = self.finished(f"{source}-{seed}")
        elif any(method.get("answers_of") == name for method in self.plan.methods.values()):
            settings["log_completions"] = True
        if self.done(job, asked):
            return
        folder = self.work / job
        if source and not (Path(settings["train_data"]) / "completions").is_dir():
            raise Failed(
                f"{settings['train_data']} holds no samples to train on; move "
                f"{self.runs / f'{source}-{seed}.json'} away to have them drawn again"
            )
        if self.whole(name).get("together"):
            folder = self.trained_together(name, settings, launcher)
        else:
            self.launch(job, settings | {"output_dir": str(folder)}, launcher)
        results = json.loads((folder / "results.json").read_text())
        if (results.get("stopped") or "").startswith("diverged"):  # as a member of a population
            raise Failed(results["stopped"])
        kind = next(kind for kind in ARTIFACTS if (folder / kind).is_dir())
        if kind == "model":
            model = ["--model", str(folder / kind), "--name", f"{name}#{seed}", "--fine-tuned"]
        else:
            source = f"{name}#{seed}={folder / kind}"
            model = [*self.base(), "--no-base", ARTIFACTS[kind], source]
        about = {
            "method": name,
            "seed": seed,
            "learning_rate": settings["learning_rate"],
            "results": results,
            "curve": curve(folder),
        }
        dtype = about["dtype"] = self.plan.evaluation.get("dtype") or precision(settings)
        self.evaluate(job, [*model, "--dtype", dtype], asked, about)
        for checkpoint in folder.glob("checkpoint-*"):  # the run is finished, and these are its bulk
            shutil.rmtree(checkpoint, ignore_errors=True)

    def trained_together(self, name: str, settings: dict[str, Any], launcher: str) -> Path:
        """The seeds of a method that are not finished, as one population; the folder of this seed's run."""
        folder = self.work / name
        if (processes := _processes(launcher)) > 1:
            raise Failed(
                f"together: true needs a launcher of one process, and {launcher} has {processes}: a "
                "population would divide the seeds among them, with smaller batches than a run alone has; "
                f"write launcher: cpu or gpu, or together: false, under {name}"
            )
        if name not in self.populations:
            one = {key: value for key, value in settings.items() if key != "seed"}
            seeds = [seed for seed in self.plan.seeds if not (self.runs / f"{name}-{seed}.json").exists()]
            asked = {"recipe": POPULATION_RECIPE, "seeds": seeds, "winners": 0}
            self.populations[name] = None
            try:
                self.launch(name, one | asked | {"output_dir": str(folder)}, launcher)
            except Failed as failed:
                self.populations[name] = failed
        if (reason := self.populations[name]) is not None:
            raise reason
        return folder / "members" / f"seed-{settings['seed']}"

    def finished(self, job: str) -> str:
        """The hash of a finished run's settings. Samples of an unfinished one are not all there."""
        file = self.runs / f"{job}.json"
        if not file.exists():
            raise Failed(f"{job} comes first: it is not finished")
        return read_packed(file)["about"]["hash"]

    def settings(self, name: str) -> tuple[dict[str, Any], str]:
        """All settings of a method's runs but seed, rate and folder, and its launcher."""
        own = {k: v for k, v in self.whole(name).items() if k != "together"}
        whole = {**(self.shared if own["recipe"] not in ANSWER_RECIPES else self.of_answers(own)), **own}
        launcher = whole.pop("launcher", None) or self.plan.launcher or _launcher()
        left = ("like", "lr_sweep", "output_dir", *OF_SWEEPS)
        return {k: v for k, v in whole.items() if k not in left}, launcher

    def whole(self, name: str) -> dict[str, Any]:
        """What the plan says of a method, with what the method that it is like says."""
        method = self.plan.methods[name]
        return {**self.plan.methods.get(method.get("like", name), {}), **method}

    def of_answers(self, own: dict[str, Any]) -> dict[str, Any]:
        """What a method that is trained on given answers shares: not what is about samples and rewards."""
        from steer.tasks.data import has_own_columns, heldout_source
        from steer.training.answers import OF_PROBLEMS, OF_SAMPLES
        from steer.training.run_settings import setting_names

        # of a loss, which is another one
        other = {*OF_SAMPLES, "beta", "loss_type", *(OF_PROBLEMS if "answers_of" in own else ())}
        known = setting_names(own["recipe"].partition("_")[0]) - other
        shared = {key: value for key, value in self.shared.items() if key in known}
        if "answers_of" in own:  # the problems to train on no longer say which ones stay unseen
            held_out = heldout_source(self.shared.get("train_data", "arithmetic"), shared.get("eval_data"))
            shared["eval_data"] = held_out or "none"
            columns = self.shared.get("columns")
            if columns and held_out and has_own_columns(held_out):
                shared.setdefault("eval_columns", columns)
        return shared

    def rate(self, name: str) -> float:
        """The learning rate of a method: given, that of the method it is like, or chosen by its sweep."""
        method = self.plan.methods[name]
        if "learning_rate" in method:
            return float(method["learning_rate"])
        if "lr_sweep" not in method:
            return self.rate(method["like"])
        settings, launcher = self.settings(name)
        said = {**self.shared, **self.sweep, **self.whole(name)}
        sweep = {**self.sweep, **{k: said[k] for k in OF_SWEEPS if k in said}, "lr_sweep": method["lr_sweep"]}
        if "validation" in sweep:  # a method's own wins here too
            sweep["validation"] = said["validation"]
        settings = {**settings, "seed": self.plan.sweep_seed}
        asked = {"training": settings, **sweep}
        file = self.sweeps / f"{name}.json"
        if file.exists():
            known = json.loads(file.read_text())
            records.check(file, known, asked)
            return known["chosen"]
        folder = self.work / name
        training = {**settings, **sweep, "sweep_only": True, "output_dir": str(folder)}
        self.launch(f"{name}-sweep", training, launcher)
        known = json.loads(Path(f"{folder}-sweep", "sweep.json").read_text())
        self.sweeps.mkdir(parents=True, exist_ok=True)
        kept = {**known, "hash": records.digest(asked), "asked": asked}
        replace_file(file, (json.dumps(kept, indent=1) + "\n").encode())
        return known["chosen"]

    def launch(self, job: str, settings: dict[str, Any], launcher: str) -> None:
        """Train as a user would, from a config file that says all."""
        config, folder = self.work / "configs" / f"{job}.yaml", settings["output_dir"]
        records.check_begun(Path(f"{folder}-sweep" if "lr_sweep" in settings else folder), config, settings)
        config.parent.mkdir(parents=True, exist_ok=True)
        script = str(recipes_folder() / f"{settings['recipe']}.py")
        text = yaml.safe_dump({k: v for k, v in settings.items() if k != "recipe"}, sort_keys=False)
        replace_file(config, text.encode())
        start = [sys.executable, "-m", "accelerate.commands.launch", "--quiet"]
        start += ["--config_file", str(launcher_file(launcher))]
        threads = os.environ.get("OMP_NUM_THREADS") or str(usable_cpus())
        self.call([*start, "--num_cpu_threads_per_process", threads, script, "--config", str(config)])

    # ---- scoring

    def asked(self) -> dict[str, Any]:
        """What every model is asked, with the template and length of training where the plan has no other."""
        shared = self.shared
        from_training = {
            "template": shared.get("template", DEFAULT_PROMPT.template),
            "max_new_tokens": shared.get("max_completion_length", SteeringGRPOConfig.max_completion_length),
            "dtype": shared.get("model_dtype", "auto"),
            "samples": 8,
        }
        if shared.get("prefix"):
            from_training["prefix"] = shared["prefix"]
        if shared.get("chat_template_kwargs"):
            from_training["chat_template_kwargs"] = json.dumps(shared["chat_template_kwargs"])
        said = {name: value for name, value in self.plan.evaluation.items() if value is not None}
        return {**from_training, **said}

    def evals(self, out: Path, without: Sequence[str] = ()) -> list[str]:
        """The start of a `steer eval` command, `without` some of what the plan says of an evaluation."""
        asked = {name: value for name, value in self.asked().items() if name not in without}
        asked["columns"] = columns_text(parse_columns(asked.get("columns")))
        words = [sys.executable, "-m", "steer.cli", "eval", "--out", str(out)]
        for name in EVALUATION:
            value = json.dumps(asked[name]) if isinstance(asked.get(name), dict) else asked.get(name)
            words += [f"--{name.replace('_', '-')}", str(value)] if value is not None else []
        return [*words, "--trust-remote-code"] if self.shared.get("trust_remote_code") else words

    def evaluate(
        self, job: str, model: list[str], asked: dict[str, Any], about: dict[str, Any] | None = None
    ) -> None:
        out = self.work / f"eval-{job}"
        what = ["--benchmarks", *self.asked()["benchmarks"], "--samples", str(self.asked()["samples"])]
        self.call([*self.evals(out), *what, *model])
        self.runs.mkdir(parents=True, exist_ok=True)
        known = {"hash": records.digest(asked), "asked": asked, **(about or {}), "machine": machine()}
        pack(out, self.runs / f"{job}.json", known)

    # ---- what is done

    def done(self, job: str, asked: dict[str, Any]) -> bool:
        return records.is_made(self.runs / f"{job}.json", asked)

    def call(self, words: list[str]) -> None:
        """Run a process to its end; it writes to this terminal, and dies with this process, children too."""
        process = subprocess.Popen(words, start_new_session=True)
        try:
            if process.wait():
                raise Failed(f"exit code {process.returncode}: {' '.join(words)}")
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)  # a launcher leaves what it launched to itself
                process.wait()

    def report(self) -> None:
        """Tables, plots and page of the runs that are there."""
        files = [file for job, _ in self.jobs() if (file := self.runs / f"{job}.json").exists()]
        if not files:
            raise SteerError(f"{self.runs} holds no finished runs yet; start without --report")
        write_report(files, self.plan)


def precision(settings: dict[str, Any]) -> str:
    """
    The precision that a run computes in, in which its model is measured.

    Args:
        settings: Those of a run, by name.

    Returns:
        The name of a dtype, or "auto" or "fast".
    """
    mixed = [dtype for flag, dtype in MIXED.items() if settings.get(flag)]
    return mixed[0] if mixed else settings.get("model_dtype", "auto")


def _processes(launcher: str) -> int:
    """How many processes a launcher starts."""
    return int(yaml.safe_load(launcher_file(launcher).read_text()).get("num_processes", 1))


def _launcher() -> str:
    import torch

    return "gpu" if torch.cuda.is_available() else "cpu"
