"""
Train sparse autoencoders on the activations of any causal language model, steered or not.

    steer sae train --config sae-demo
    steer sae train --config sae-demo layer=20 saes.topk.k=64 output_dir=runs/layer-20
    accelerate launch --config_file recipes/accelerate/ddp.yaml recipes/train_sae.py --config FILE

The config is a YAML file or the name of one of steer's. It is one run; `name=value` overrides one of its
settings, with dots for nested ones. All SAEs of a run are trained on one stream. A run that was stopped goes
on where it was when it is started again. With schedule=wsd and an early_stopping_threshold it ends when the
explained variance of the texts in heldout is flat; `tokens` is then the most. The output folder ends up with
a folder per SAE (`steer.sae.load_sae` reads it), `metrics.jsonl` and the last checkpoint.
"""

from __future__ import annotations

import argparse
import logging
import sys
from contextlib import nullcontext, suppress
from dataclasses import MISSING, asdict, dataclass, field, fields
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from tqdm.auto import tqdm
from transformers.utils import logging as transformers_logging

import steer
from steer.arguments import Help, with_default
from steer.base_adapter import base_source
from steer.errors import SteerError, one_line
from steer.files import held
from steer.generation.allocator import keep_freed_memory
from steer.models import load_model, load_tokenizer
from steer.outputs import check_output
from steer.recipe_files import config_file
from steer.sae import SAE, SAEConfig, save_sae
from steer.sae.activations import ActivationStream, Reader
from steer.sae.cache import CachedActivations, HeldActivations, first_activations, write_cache
from steer.sae.config import check_count
from steer.sae.schedule import TrainConfig
from steer.sae.texts import Texts
from steer.sae.trainer import CHECKPOINT, SAETrainer


@dataclass
class RunConfig:
    """Where the activations come from, and where the SAEs go."""

    saes: dict[str, dict[str, Any]] = field(
        metadata={"help": "The SAEs, by name: fields of SAEConfig (d_in is filled in)."}
    )
    texts: list[str] = field(
        metadata={"help": ".txt or .jsonl files, or data sets on the hub (owner/name[:config]:split)."}
    )
    output_dir: str = field(metadata={"help": "Folder of the run."})
    model: str = field(
        default="smollm2-135m-instruct",
        metadata={"help": "Hub id, local folder, .gguf file or the name of bundled weights."},
    )
    model_revision: str | None = field(default=None, metadata={"help": "Revision of a hub model."})
    base_adapter: str | None = field(
        default=None, metadata={"help": "Folder of a LoRA of peft that is merged into the model first."}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run the Python code that comes with the model."}
    )
    model_dtype: str = field(default="auto", metadata={"help": "Precision of the language model."})
    vectors: str | None = field(
        default=None, metadata={"help": "Steering vectors that are attached to the model."}
    )
    what: str = field(
        default="as_is", metadata={"help": "as_is, base (vectors off) or difference (steered minus base)."}
    )
    layer: int = field(default=-1, metadata={"help": "Layer whose activations are read."})
    site: str = field(default="resid_post", metadata={"help": "Site in the layer, as in steer.sites."})
    window: int = field(default=256, metadata={"help": "Longest piece of a text, in tokens."})
    skip: int = field(default=1, metadata={"help": "First tokens of a piece that are left out."})
    block: int = field(default=1 << 18, metadata={"help": "Activations that are shuffled together."})
    epochs: int = field(default=1, metadata={"help": "How often the texts are read."})
    heldout: list[str] | None = field(
        default=None,
        metadata={"help": "Texts, as in texts, whose explained variance is measured every eval_every steps."},
    )
    heldout_tokens: int = field(default=8192, metadata={"help": "Activations of heldout that are measured."})
    cache: str | None = field(default=None, metadata={"help": "Folder for activations on disk."})
    cache_tokens: int | None = field(default=None, metadata={"help": "Most activations to store there."})


def main(arguments: list[str]) -> dict[str, SAE]:
    """Run with these command-line arguments; the trained SAEs."""
    run, training = parse(arguments)
    # while one process writes the cache, the others wait
    patient = InitProcessGroupKwargs(timeout=timedelta(days=1))
    # without a GPU, processes find one another only if told that they are on CPUs
    accelerator = Accelerator(cpu=not torch.accelerator.is_available(), kwargs_handlers=[patient])
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    transformers_logging.set_verbosity_error()
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    folder = Path(run.output_dir)
    with held(folder, "output_dir") if accelerator.is_main_process else nullcontext():
        return train(folder, run, training, accelerator)


def train(folder: Path, run: RunConfig, training: TrainConfig, accelerator: Accelerator) -> dict[str, SAE]:
    """Train the SAEs in `folder`, or what is missing of them."""
    stream, heldout = open_stream(run, accelerator)
    configs = {name: SAEConfig(**{"d_in": stream.width, **values}) for name, values in run.saes.items()}
    if accelerator.is_main_process and not (folder / CHECKPOINT).exists():  # no run that goes on
        for name in configs:
            check_output(folder / name, None, option="output_dir", folder=True)
    with tqdm(total=training.tokens, unit=" tokens", disable=not accelerator.is_main_process) as bar:

        def show(line: dict[str, Any]) -> None:
            bar.update(line["tokens"] - bar.n)
            bar.set_postfix_str(summary(line, list(configs)))

        trainer = SAETrainer(configs, stream, training, folder, accelerator, show, heldout)
        trained = trainer.train()
    if accelerator.is_main_process:
        for name, sae in trained.items():
            save_sae(sae, folder / name)
            print(f"{name:16} {folder / name}")
        if outcome := trainer.stopping.outcome():
            print(ending(outcome, training))
    return trained


def open_stream(
    run: RunConfig, accelerator: Accelerator
) -> tuple[ActivationStream | CachedActivations, HeldActivations | None]:
    """
    The activations: straight from the model, or from the cache, which is written first; and those held out.
    """
    trust = run.trust_remote_code
    source, revision = base_source(run.model, run.base_adapter, run.model_revision, trust)
    tokenizer = load_tokenizer(source, revision=revision, trust_remote_code=trust)
    model = load_model(source, dtype=run.model_dtype, revision=revision, trust_remote_code=trust)
    model.to(accelerator.device)
    if run.vectors:
        steer.load(run.vectors, model, tokenizer=tokenizer)
    reader = Reader(model, run.layer, run.site, run.what)
    mine = {"rank": accelerator.process_index, "world": accelerator.num_processes}
    texts = Texts(run.texts)
    heldout = None
    if run.heldout is not None:
        unseen = ActivationStream(reader, Texts(run.heldout), tokenizer, run.window, skip=run.skip)
        heldout = first_activations(unseen, run.heldout_tokens)
    if run.cache is None:
        return ActivationStream(
            reader, texts, tokenizer, run.window, run.block, run.epochs, skip=run.skip, **mine
        ), heldout
    if accelerator.is_main_process:
        whole = ActivationStream(reader, texts, tokenizer, run.window, run.block, skip=run.skip)
        with tqdm(total=run.cache_tokens, unit=" activations", desc="storing") as bar:
            write_cache(whole, run.cache, run.cache_tokens, lambda done: bar.update(done - bar.n))
    accelerator.wait_for_everyone()
    return CachedActivations(run.cache, run.epochs, **mine), heldout


def summary(line: dict[str, Any], names: list[str]) -> str:
    """The live metrics of a step on one line: explained variance by l0, the real l0, dead features' share."""
    parts = []
    for name in names:
        explained = " ".join(f"{n}:{v:.3f}" for n, v in line[name]["explained_variance"].items())
        parts.append(f"{name} {explained} l0 {line[name]['l0']:.0f} dead {line[name]['dead']:.2f}")
    return "; ".join(parts)


def ending(outcome: dict[str, Any], training: TrainConfig) -> str:
    """How a wsd run ended, on one line: flat or not, and what the explained variance still gained."""
    tokens = f"{outcome['steps'] * training.batch_size:,} activations"
    found = {"flat": f"flat after {tokens}", "capped": f"not flat: stopped by the cap of {tokens}"}
    line = found.get(outcome["stopped"], f"all {tokens}")
    window = f"over the last {training.early_stopping_window:.0%} of the steps before the decay"
    for name, text in (("rise", window), ("decay_gained", "by the decay")):
        if outcome[name] is not None:
            gains = ", ".join(f"{sae} {value:+.4f}" for sae, value in outcome[name].items())
            line += f"; held-out explained variance {text}: {gains}"
    return line


def parse(arguments: list[str]) -> tuple[RunConfig, TrainConfig]:
    """The settings from --config and the overrides; SteerError names what is wrong with them."""
    parser = argparse.ArgumentParser(
        prog="steer sae train",
        description=__doc__,
        formatter_class=Help,
        epilog=_help(),
    )
    parser.add_argument(
        "--config", required=True, metavar="NAME", help="YAML file, or the name of one of steer's"
    )
    parser.add_argument(
        "--print_config",
        "--print-config",
        action="store_true",
        help="print all settings as YAML, which --config reads, and exit",
    )
    parser.add_argument("overrides", nargs="*", metavar="name=value", help="settings in place of the file's")
    parsed = parser.parse_args(arguments)
    file = config_file(parsed.config)
    try:
        values = yaml.safe_load(file.read_text())
    except OSError as error:
        raise SteerError(f"cannot read {file}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise SteerError(f"{file} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise SteerError(f"{file} holds no settings; recipes/configs/sae-*.yaml show some")
    for override in parsed.overrides:
        _override(values, override)
    known: dict[str, dict[str, Any]] = {"run": {}, "training": {}}
    for name, value in values.items():
        if name in {f.name for f in fields(TrainConfig)}:
            known["training"][name] = value
        elif name in {f.name for f in fields(RunConfig)}:
            known["run"][name] = value
        else:
            raise SteerError(f"unknown setting {name!r}; --help lists them")
    missing = [name for name in ("saes", "texts", "output_dir") if name not in known["run"]]
    if missing:
        raise SteerError(f"the settings lack {', '.join(missing)}; give them in the file or as name=value")
    run = RunConfig(**known["run"])
    if isinstance(run.texts, str):
        run.texts = [run.texts]
    if isinstance(run.heldout, str):
        run.heldout = [run.heldout]
    if both := sorted(set(run.heldout or []) & set(run.texts)):
        raise SteerError(f"heldout={both[0]} is among the texts of training; give texts that are not")
    check_count("heldout_tokens", run.heldout_tokens)
    if run.cache is None and run.cache_tokens is not None:
        raise SteerError(
            f"cache_tokens={run.cache_tokens} without a cache; give cache=FOLDER, or leave it out"
        )
    if not isinstance(run.saes, dict) or not all(isinstance(v, dict) for v in run.saes.values()):
        raise SteerError("saes must be a mapping from names to settings, such as topk: {d_sae: 4096, k: 32}")
    for name, settings in run.saes.items():
        unknown = sorted(set(settings) - {f.name for f in fields(SAEConfig)})
        if unknown:
            raise SteerError(f"SAE {name!r} has unknown settings {', '.join(unknown)}; --help lists them")
    training = TrainConfig(**known["training"])
    if training.early_stopping_threshold and run.heldout is None:
        raise SteerError(
            f"early_stopping_threshold={training.early_stopping_threshold} needs texts to measure on; give "
            "heldout=FILE, or early_stopping_threshold=0"
        )
    _check_effect(run, training)
    if parsed.print_config:
        print(_as_yaml(run, training), end="")
        sys.exit(0)
    return run, training


def _check_effect(run: RunConfig, training: TrainConfig) -> None:
    """SteerError for a value that is not the default and has no effect, since another setting is missing."""
    measured, stops = run.heldout is not None, training.early_stopping_threshold > 0
    selects = any(one.get("activation") != "jumprelu" for one in run.saes.values()) or training.auxiliary > 0
    for settings, name, has_effect, needed in (
        (run, "heldout_tokens", measured, "heldout=FILE"),
        (training, "eval_every", measured, "heldout=FILE"),
        (training, "decay", training.schedule == "wsd", "schedule=wsd"),
        (training, "precision", selects, "an SAE of topk or batchtopk"),
        (training, "early_stopping_window", stops, "early_stopping_threshold"),
    ):
        value = getattr(settings, name)
        default = next(f.default for f in fields(settings) if f.name == name)
        if not has_effect and value != default:
            raise SteerError(f"{name}={value} has no effect without {needed}; give that, or leave {name} out")


def _as_yaml(run: RunConfig, training: TrainConfig) -> str:
    """A config file of all settings."""
    own = [f for f in fields(SAEConfig) if f.default is not MISSING and f.name != "source"]
    default = {f.name: f.default for f in own}
    saes = {name: {**default, **values} for name, values in run.saes.items()}
    parts = {"run": {**asdict(run), "saes": saes}, "training": asdict(training)}
    return "\n".join(
        f"# {title}\n{yaml.safe_dump(part, sort_keys=False, allow_unicode=True)}"
        for title, part in parts.items()
    )


def _override(values: dict[str, Any], override: str) -> None:
    path, sign, text = override.partition("=")
    if not sign:
        raise SteerError(f"override {override!r} has no '='; write name=value, such as saes.topk.k=64")
    *parents, last = path.split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise SteerError(f"override {override!r}: {parent!r} has no settings of its own")
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise SteerError(f"override {override!r} is not YAML: {one_line(error)}") from error
    # YAML 1.1 takes 1e-3 for a text; nobody who writes it means one
    if isinstance(value, str):
        with suppress(ValueError):
            value = float(value)
    values[last] = value


def _help() -> str:
    lines = []
    for title, config in (("run", RunConfig), ("training", TrainConfig), ("each SAE (saes.NAME)", SAEConfig)):
        lines.append(f"settings of {title}:")
        for f in fields(config):
            about = f.metadata["help"]
            lines.append(f"  {f.name:17} {about if f.default is MISSING else with_default(about, f.default)}")
    return "\n".join(lines)
