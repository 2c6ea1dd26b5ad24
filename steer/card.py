"""
The model card: a `README.md` beside the vectors, written from what their config knows of how they were made.
"""

from __future__ import annotations

import json
import shlex
from typing import Any

from steer.artifact_scores import SCORES
from steer.config import SteeringConfig
from steer.hub import is_hub_id
from steer.tasks.data import heldout_source
from steer.tasks.elicited import STAGES, stages
from steer.weights import public_name

# Marks a card as ours: only such a card is written over.
MARK = "<!-- written by steer; delete this line to keep your own text -->"
# Every card has it: `steer pack list` finds artifacts by it.
TAG = "steering-vectors"
# What the code calls an artifact that is not on the hub.
PLACE = "THIS_FOLDER"
URL = "https://github.com/steer-rl/steer"

# Settings of a run that are read for generated problems, and for held-out ones.
_GENERATED = {"operators", "digits", "terms", "generated_problems", "heldout"}
_HELD_OUT = {"eval_columns", "eval_split", "eval_limit", "examples"}


def card(config: SteeringConfig, decoder: str, numbers: int, size: int, name: str = PLACE) -> str:
    """
    The model card of an artifact.

    Args:
        config: of the artifact.
        decoder: the name of the list of decoder layers in the base model.
        numbers: count of trainable parameters.
        size: of the tensor file, in bytes.
        name: what the code calls the artifact: its id on the hub, or a place for the reader to fill in.

    Returns:
        Markdown with YAML front matter.
    """
    made = config.provenance or {}
    parts = [
        front_matter(
            public_name(config.base_model_name_or_path),
            TAG,
            "activation-steering",
            *(() if "extract" in made else ("reinforcement-learning",)),
        ),
        MARK,
        f"# Steering vectors for {_line(config.base_model_name_or_path or 'a language model')}",
        _summary(config, numbers, size),
        _use(config, name),
        _origin(config, made),
        _training(made),
        _scores(made),
        _side_effects(made),
        _limits(config, made),
        _tools(config, decoder, name),
        _settings(made),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def front_matter(base: str | None, *tags: str) -> str:
    """
    The metadata that the hub reads from a card.

    Args:
        base: the base model; it is named where it is a hub id, which the hub demands.
        tags: of the repository.

    Returns:
        YAML between lines of three dashes.
    """
    lines = ["library_name: steer", f"tags: [{', '.join(tags)}]"]
    if base and is_hub_id(base):
        lines = [f"base_model: {base}", "base_model_relation: adapter", *lines]
    return "\n".join(["---", *lines, "---"])


def _summary(config: SteeringConfig, numbers: int, size: int) -> str:
    kinds = {
        "constant": "One vector per layer, the same at every token",
        "adaptive": "One vector per layer, at every token as strong as a learned read-out of the MLP says",
        "shared": f"One vector per layer, each a mix of {config.rank} shared directions",
    }
    shape = f"{_line(config.model_type)}, {config.num_hidden_layers} layers, hidden size {config.hidden_size}"
    revision = f" at {_line(config.base_revision)}" if config.base_revision else ""
    site = "" if config.kind == "adaptive" else f" at `{config.site}`"
    return (
        f"{kinds[config.kind]}, added to the residual stream{site} of a frozen model "
        f"([arXiv 2509.06608](https://arxiv.org/abs/2509.06608)).\n\n"
        f"| | |\n|---|---|\n"
        f"| base model | `{_line(config.base_model_name_or_path)}`{revision}, {shape} |\n"
        f"{_adapter(config)}"
        f"| layers | {config.layers} |\n"
        f"| positions | {config.positions} |\n"
        f"| scale | {config.scale:g} |\n"
        f"{_condition(config)}"
        f"| prompt | {_line(config.prompt or 'not recorded')} |\n"
        f"| size | {numbers:,} numbers in {config.dtype}, {size / 1000:,.0f} KB |"
    )


def _adapter(config: SteeringConfig) -> str:
    """The row of the table that names what was merged into the base model."""
    if not config.base_adapter:
        return ""
    return f"| merged into it first | the LoRA `{_line(config.base_adapter)}` (`--base-adapter`) |\n"


def _condition(config: SteeringConfig) -> str:
    """The row of the table that says when the vectors act."""
    if config.condition is None:
        return ""
    where = f"a cosine above {config.condition.threshold:.4g} with the probe, after layer"
    return f"| condition | {where} {config.condition.layer}, at the prompt's last token |\n"


def _origin(config: SteeringConfig, made: dict[str, Any]) -> str:
    """For vectors that were imported: that nobody but the importer says which model they are for."""
    origin = _part(made, "import")
    if not origin:
        return ""
    named = origin.get("base_model")
    told = f"which names `{named}` as its base model" if named else "which does not say for which model"
    model = config.base_model_name_or_path
    return _line(
        f"Imported from `{origin.get('file')}` ({origin.get('format')}), {told}. That the vectors are for "
        f"`{model}` was said at the import."
    )


# How training on given answers is called.
_METHODS = {"sft": "by supervised training (SFT)", "dpo": "by direct preference optimization (DPO)"}


def _training(made: dict[str, Any]) -> str:
    """In a few words what the vectors were made from; `_settings` has the rest."""
    if extracted := _part(made, "extract"):
        told = [f"{_line(extracted['method'])} of" if extracted.get("method") else ""]
        told.append(_line(extracted.get("from") or "a direction"))
        return f"## Made from\n\nWithout training: {' '.join(filter(None, told))}."
    run, training = _part(made, "run"), _part(made, "training")
    if not run.get("train_data"):
        return ""
    used = relevant("run", run)
    generated = [f"{name} {_line(used[name])}" for name in ("operators", "digits", "terms") if name in used]
    parts = [f"`{_line(run['train_data'])}`" + (f" ({', '.join(generated)})" if generated else "")]
    rewards = run.get("rewards")
    method, examples = str(made.get("method")), _part(made, "data").get("examples")
    if method in _METHODS:
        count = f"{examples:,} examples, " if isinstance(examples, int) else ""
        parts.append(f"{count}{_METHODS[method]}")
    elif isinstance(rewards, list) and rewards:
        parts.append(f"rewarded by {', '.join(f'`{_line(reward)}`' for reward in rewards)}")
    updates = made.get("updates", training.get("max_steps"))  # older artifacts say what was asked for alone
    for number, words in ((updates, "updates"), (training.get("num_generations"), "answers to each prompt")):
        if isinstance(number, int) and number > 0:
            parts.append(f"{number} {words}")
    return f"## Trained on\n\n{', '.join(parts)}."


def _limits(config: SteeringConfig, made: dict[str, Any]) -> str:
    """What the vectors are not for."""
    base = (
        f"`{_line(config.base_model_name_or_path)}`" if config.base_model_name_or_path else "their base model"
    )
    limits = [f"They fit {base} alone. `steer transfer` moves vectors to another model; measure there again."]
    if config.prompt is not None:
        limits.append(f"They were made with one way of asking ({_line(config.prompt)}). Others may do worse.")
    if any(is_score(score) for score in _part(made, "results").values()):
        limits.append("The scores are for the held-out problems of the run. No other task was measured.")
    if isinstance(scored := _part(made, "data").get("scored_on"), list) and scored:
        names = ", ".join(f"`{_line(name)}`" for name in scored)
        limits.append(
            f"They were trained on answers to problems of {names}, so scores on those do not show what "
            "they do on new problems."
        )
    if isinstance(tools := _part(made, "run").get("tools"), list) and tools:
        names = ", ".join(f"`{_line(name)}`" for name in tools)
        limits.append(f"They were trained to answer with tools ({names}). Without them they may do worse.")
    if config.condition is None:
        limits.append("They change every answer, wanted or not. Compare with the base: `steer play`.")
    return "## Limits\n\n" + "\n".join(f"- {limit}" for limit in limits)


def _scores(made: dict[str, Any]) -> str:
    """Accuracy with intervals of the base, of the vectors, and of every control that was run."""
    results = {name: score for name, score in _part(made, "results").items() if is_score(score)}
    named = [*stages(results, "with the vectors", "base model")]
    named += [(name, score) for name, score in results.items() if name not in STAGES]
    controls = _part(made, "controls")
    named += [(f"control: {name}", score) for name, score in controls.items() if is_score(score)]
    if not named:
        return "## Scores\n\nNone were recorded with these vectors: measure before you rely on them."
    lenient = any("lenient" in score for _, score in named)
    head = [
        "",
        "accuracy",
        "95 % interval",
        *(["read leniently", "95 % interval"] if lenient else []),
        "problems",
    ]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, score in named:
        cells = [_line(name), *_figure(score, "accuracy", "low", "high")]
        if lenient:
            cells += _figure(score, "lenient", "lenient_low", "lenient_high")
        lines.append(f"| {' | '.join([*cells, str(score['problems'])])} |")
    text = "Greedy accuracy on held-out problems"
    text += ": the boxed answer, and the answer in whatever form it is given." if lenient else "."
    if not {"longer", "elicited"} & {*results}:
        text += (
            "\n\nThe base was not elicited (examples in the prompt, a longer limit): part of a gain may be "
            "form alone."
        )
    rewarded = str(made.get("method")) not in _METHODS
    notes = (
        "" if controls or not rewarded else "\n\nNo control run (random reward, format only) was recorded."
    )
    return f"## Scores\n\n{text}\n\n" + "\n".join(lines) + notes


def _side_effects(made: dict[str, Any]) -> str:
    """
    The calibration curve that `steer calibrate` records: scale against KL and perplexity; without one, how to
    measure it.
    """
    found = _part(made, "calibration")
    curve, names = found.get("curve"), ("scale", "kl", "perplexity")
    rows = [row for row in curve if isinstance(row, dict)] if isinstance(curve, list) else []
    rows = [row for row in rows if all(isinstance(row.get(name), (int, float)) for name in names)]
    base = found.get("base perplexity")
    if not rows or not isinstance(base, (int, float)):
        how = "`steer calibrate` and `steer eval --side-effects` measure them"
        return f"## Side effects\n\nNone were recorded: {how}."
    lines = [f"| {row['scale']:.4g} | {row['kl']:.4g} | {row['perplexity']:.4g} |" for row in rows]
    return (
        f"## Side effects\n\nOn neutral text ({_line(found.get('tokens'))} tokens), where the base has a "
        f"perplexity of {base:.4g}:\n\n"
        "| scale | KL from the base, nats a token | perplexity |\n|---|---|---|\n" + "\n".join(lines)
    )


def _part(made: dict[str, Any], name: str) -> dict[str, Any]:
    part = made.get(name)
    return part if isinstance(part, dict) else {}


def _figure(score: dict[str, Any], value: str, low: str, high: str) -> list[str]:
    """A value and its interval as cells of a table; empty where they are not numbers."""
    if not all(isinstance(score.get(name), (int, float)) for name in (value, low, high)):
        return ["", ""]
    return [f"{score[value]:.3f}", f"{score[low]:.3f} to {score[high]:.3f}"]


def is_score(value: object) -> bool:
    """Whether a recorded value is an accuracy with its interval."""
    names = ("accuracy", "low", "high", "problems")
    return isinstance(value, dict) and all(isinstance(value.get(name), (int, float)) for name in names)


def _settings(made: dict[str, Any]) -> str:
    """Every recorded setting, as lists; what has no value is left out."""
    blocks = []
    for part, values in made.items():
        if part in SCORES:
            continue
        if isinstance(values, dict):
            text = "\n".join(f"- {_line(k)}: {_line(v)}" for k, v in relevant(part, values).items())
        else:
            text = f"- {_line(values)}"
        blocks.append(f"### {_line(part)}\n\n{text}")
    if not blocks:
        return ""
    listed = "\n\n".join(blocks)
    return f"<details><summary>Every setting</summary>\n\n{listed}\n\n</details>"


def relevant(part: str, values: dict[str, Any]) -> dict[str, Any]:
    """
    The settings of a part of the provenance that had a part in the run: without those that were not set, and
    of "run" without those that are off, and those of generated problems and of held-out ones where there were
    none. The other parts record what differs from its default, which may be False.
    """
    idle: set[str] = set()
    if part == "run":
        train = values.get("train_data")
        held_out = heldout_source(train, values.get("eval_data"))
        idle |= set() if "arithmetic" in (train, held_out) else _GENERATED
        idle |= _HELD_OUT if held_out is None else set()
        for name, source in (("train_split", train), ("eval_split", held_out)):
            if source == "arithmetic" or str(source).endswith((".jsonl", ".parquet")):
                idle.add(name)
    unset: tuple[Any, ...] = (None, [], "")
    off = {k for k, v in values.items() if part == "run" and v is False}
    return {k: v for k, v in values.items() if v not in unset and k not in idle | off}


def _use(config: SteeringConfig, name: str) -> str:
    """The vectors in a model, in four lines."""
    base = config.base_model_name_or_path or "BASE"
    if is_hub_id(base):
        source, load = "transformers import AutoModelForCausalLM", "AutoModelForCausalLM.from_pretrained"
    else:
        source, load = "steer.models import load_model", "load_model"
    revision = f", revision={_quoted(config.base_revision)}" if config.base_revision else ""
    loaded = f"{load}({_quoted(base)}{revision})"
    if config.base_adapter:  # with it merged
        source = f"steer.base_adapter import merged_base\nfrom {source}"
        loaded = f"{load}(merged_base({_quoted(base)}, {_quoted(config.base_adapter)}{revision}))"
    return f"""```bash
pip install steer-rl
```

```python
import steer
from {source}

model = {loaded}
vectors = steer.load({_quoted(name)}, model)  # vectors.scale = 0.5, vectors.disabled(), steer.detach(model)
```"""


def _tools(config: SteeringConfig, decoder: str, name: str) -> str:
    """The command line, and what else can use the vectors."""
    base = _line(config.base_model_name_or_path or "BASE")
    adapter = f"--base-adapter {shlex.quote(_line(config.base_adapter))} " if config.base_adapter else ""
    tools = [
        f"The command line of [steer]({URL}): `steer generate {shlex.quote(base)} {adapter}--vectors {name} "
        "--prompt '...'`",
    ]
    base, of = ("MERGED", "--model MERGED ") if adapter else (base, "")
    everywhere = config.positions == "all" and config.condition is None  # no format can say otherwise
    if everywhere and config.kind == "adaptive":
        tools.append(f"PEFT and vLLM's LoRA: `steer export {name} --to peft {of}--out adapter`")
    elif everywhere and config.site != "resid_pre":  # which is the output of no module
        tools += [
            f"PEFT, without steer: `steer export {name} --to peft {of}--out adapter`, then "
            '`PeftModel.from_pretrained(base, "adapter")`',
            f"vLLM: `steer export {name} --to checkpoint --out model`, then `vllm serve model`",
        ]
        layers = config.resolve_layers(config.num_hidden_layers) if config.num_hidden_layers else []
        if config.site == "resid_post" and layers != [0]:
            drop = "--block-0 drop " if 0 in layers else ""
            tools.append(
                f"llama.cpp: `steer export {name} --to gguf {drop}--out vectors.gguf`, then "
                "`llama-cli -m base.gguf --control-vector vectors.gguf`"
                + (" (which cannot steer block 0: its vector is left out)" if drop else "")
            )
        tools.append(
            f"lm-eval: `steer export {name} --to lm-eval --out vectors.pt`, then "
            f"`lm_eval --model steered --model_args pretrained={base},steer_path=vectors.pt`"
        )
    listed = "\n".join(f"{i}. {tool}" for i, tool in enumerate(tools, 1))
    named = f"The tensors are named as in the model: `{decoder}.12.steering.vector` for layer 12."
    if adapter and len(tools) > 1:
        listed += "\n\nFrom 2 on, the base is the model in the folder MERGED that `merged_base` returns."
    return f"## Other tools\n\n{listed}\n\n{named}"


def _quoted(text: str) -> str:
    """A string in Python."""
    return json.dumps(text, ensure_ascii=False)


def _line(value: Any) -> str:
    """One line of Markdown-safe text."""
    return " ".join(str(value).split()).replace("|", "\\|").replace("<", "&lt;")
