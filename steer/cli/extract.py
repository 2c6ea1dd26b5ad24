"""`steer extract`: vectors that need no training."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from steer.arguments import (
    Help,
    add_base_options,
    add_prompt_arguments,
    count,
    finite,
    json_object,
    text,
    whole,
)
from steer.cli.sae import SAE_HELP
from steer.config import POSITIONS, SITES
from steer.outputs import add_force, check_output, output

if TYPE_CHECKING:
    from steer.artifact import Artifact

ABOUT = """\
Make vectors without training: from a contrast of texts, from the right and wrong answers of a run, from a
feature of a sparse autoencoder, or from a token. The result is an ordinary artifact: it can be measured,
exported, added to others, and trained further (steer train --init).
"""

HELP = {
    "pairs": (
        "from a file of positive and negative texts or chats",
        "JSON lines with 'positive' and 'negative': texts, or chats as lists of messages. With a 'prompt' "
        "they are texts that follow it. A line may have one side alone.",
        "steer extract pairs pairs.jsonl --model smollm2-135m-instruct --layers 12 --share 0.3 --out brief",
    ),
    "answers": (
        "from the right and wrong answers of a run",
        "Reads the answers that `steer train` or `steer eval` left, and the base model's activations on "
        "them.",
        "steer extract answers runs/demo --tokens completion --out right",
    ),
    "sae": (
        "from a feature of a sparse autoencoder",
        "The feature's row of the decoder, at the layer and site that the SAE was trained on. The row gives "
        "the direction, and --share the length, in units of the model's residual stream.",
        "steer extract sae runs/sae-demo/topk --feature 17 --share 0.3 --out feature\n"
        "    steer extract sae gemma-scope-2-270m-pt-res:layer_12_width_16k_l0_medium --feature 17 "
        "--model google/gemma-3-270m --out feature",
    ),
    "token": (
        "from a token: the direction that raises its logit",
        "The token's row of the unembedding, through the final norm.",
        "steer extract token ' yes' --model smollm2-135m-instruct --layers last --out yes",
    ),
    "condition": (
        "a condition for vectors: after which prompts they act",
        "JSON lines with 'positive' (a prompt after which the vectors act), 'negative' (one after which they "
        "do not) or both. The condition is a probe at a layer below the vectors, and a threshold of the "
        "cosine with it, decided at each prompt's last token. Some prompts are held out: the rate of "
        "wrong activations is that of these.",
        "steer extract condition prompts.jsonl --vectors refuse --out refuse-if",
    ),
}


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Add `extract` and its sources. Nothing heavy is imported before one runs."""
    parser = commands.add_parser(
        "extract", help="make vectors without training: from texts, answers, an SAE, a token",
        description=ABOUT, formatter_class=Help,
    )  # fmt: skip
    sources = parser.add_subparsers(required=True, metavar="SOURCE")

    def source(name: str, given: str, about: str, layers: str | None, run: Any) -> argparse.ArgumentParser:
        short, long, example = HELP[name]
        one = sources.add_parser(
            name, help=short, description=long, epilog=f"    {example}", formatter_class=Help
        )
        one.add_argument(given, type=text, help=about)
        told = {"pairs": True, "token": True}.get(name, False)
        one.add_argument(
            "--model",
            required=told,
            help="base model: hub id, local folder, .gguf file or the name of bundled weights"
            + ("" if told else "; default: the one that it is of"),
        )
        add_base_options(one)
        one.add_argument("--dtype", default="auto", help="precision of the base model")
        one.add_argument(
            "--layers",
            default=layers,
            help="layers that get a vector: all, last, an index, a range 4-20, a comma list "
            + ("" if layers else "(default: the SAE's)"),
        )
        one.add_argument(
            "--site",
            choices=SITES,
            default=None if name == "sae" else "resid_post",
            help="where in the layer" + (" (default: the SAE's)" if name == "sae" else ""),
        )
        one.add_argument("--positions", choices=POSITIONS, default="all", help="which tokens are steered")
        one.add_argument(
            "--share",
            type=finite,
            default=0.1,
            help="length of all vectors together, as a share of the residual stream's mean length; each of n "
            "layers gets share / n",
        )
        one.add_argument("--batch-size", type=count, default=16, help="texts in a forward pass")
        one.add_argument("--out", required=True, help="folder of the artifact")
        add_force(one)
        one.set_defaults(run=run)
        return one

    pairs = source("pairs", "file", "JSON lines", "all", _pairs)
    pairs.add_argument(
        "--chat-template-kwargs",
        type=json_object,
        metavar="JSON",
        help="variables of the chat template, e.g. '{\"enable_thinking\": false}'",
    )
    answers = source("answers", "run_folder", "folder of a run", "all", _answers)
    answers.add_argument(
        "--stage",
        choices=("before", "longer", "elicited", "after", "training"),
        help="of a run of `steer train`: whose answers; training = those of the updates (default: after)",
    )
    answers.add_argument("--variant", help="of a run of `steer eval`: whose answers (default: base)")
    for one in (pairs, answers):
        one.add_argument(
            "--method", choices=("mean", "pca", "svm"), default="mean", help="mean difference, first "
            "principal component of the differences of paired texts, or normal of a linear SVM",
        )  # fmt: skip
        one.add_argument(
            "--tokens", choices=("last", "all", "completion"), default="last",
            help="tokens whose activations are read: the last of each text, all but the first, or those "
            "after the prompt",
        )  # fmt: skip
    sae = source("sae", "sae", SAE_HELP, None, _sae)
    sae.add_argument("--feature", type=whole, required=True, help="index of the feature")
    source("token", "token", "text of one token, leading space included", "last", _token)
    short, long, example = HELP["condition"]
    condition = sources.add_parser(
        "condition", help=short, description=long, epilog=f"    {example}", formatter_class=Help
    )
    condition.add_argument("file", type=text, help="JSON lines")
    condition.add_argument(
        "--vectors", required=True, help="the vectors: folder, .safetensors file or hub id"
    )
    condition.add_argument("--model", help="base model; default: the one that the vectors are for")
    add_base_options(condition)
    condition.add_argument("--dtype", default="auto", help="precision of the base model")
    condition.add_argument(
        "--layers", default="all", help="layers to choose from; those below the vectors count"
    )
    condition.add_argument(
        "--held-out", type=finite, default=0.3, help="share of the prompts that is held out"
    )
    condition.add_argument("--seed", type=whole, default=0, help="of the choice which prompts are held out")
    add_prompt_arguments(condition)
    condition.add_argument("--batch-size", type=count, default=16, help="prompts in a forward pass")
    condition.add_argument("--out", required=True, help="folder of the artifact")
    add_force(condition)
    condition.set_defaults(run=_condition)


def _pairs(args: argparse.Namespace) -> None:
    from steer.extract import read_contrast

    model, tokenizer = _load(args, args.model, args.file)
    contrast = read_contrast(args.file, tokenizer, args.chat_template_kwargs)
    _contrast(args, model, tokenizer, contrast, args.file)


def _answers(args: argparse.Namespace) -> None:
    from pathlib import Path

    from steer.errors import SteerError, shown
    from steer.evaluation.answers import run_model, run_settings
    from steer.extract.completions import read_completions

    settings = run_settings(Path(args.run_folder))
    kind, without, other = (
        ("eval", "stage", "variant") if "variants" in settings else ("train", "variant", "stage")
    )
    if (given := getattr(args, without)) is not None:
        raise SteerError(
            f"--{without} {shown(given)} has no effect: {args.run_folder} is a run of `steer {kind}`; choose "
            f"its answers by --{other}"
        )
    if args.model:
        model, tokenizer = _load(args, args.model, args.run_folder)
    else:
        of = run_model(settings)
        args.revision = args.revision or of["revision"]
        args.base_adapter = args.base_adapter or of["base_adapter"]
        model, tokenizer = _load(args, of["model"], args.run_folder)
    stage, variant = args.stage or "after", "base" if args.variant is None else args.variant
    contrast = read_completions(args.run_folder, tokenizer, stage, variant)
    _contrast(args, model, tokenizer, contrast, args.run_folder)


def _contrast(args: argparse.Namespace, model: Any, tokenizer: Any, contrast: Any, source: str) -> None:
    from steer.extract import from_contrast

    made = from_contrast(
        model,
        tokenizer,
        contrast,
        method=args.method,
        layers=args.layers,
        site=args.site,
        tokens=args.tokens,
        share=args.share,
        positions=args.positions,
        batch_size=args.batch_size,
        label="reading texts",
    )
    texts = f"{len(contrast.positive)} positive and {len(contrast.negative)} negative texts"
    _write(args, made, source, texts)


def _sae(args: argparse.Namespace) -> None:
    from steer.config import SteeringConfig
    from steer.errors import SteerError
    from steer.extract import from_direction, sae_direction
    from steer.sae import load_sae
    from steer.sites import find_decoder

    check_output(args.out, args.replace, args.sae, folder=True)
    sae = load_sae(args.sae)
    source: dict[str, Any] = sae.cfg.source or {}
    name = args.model or source.get("model")
    if not args.model:
        args.revision = args.revision or source.get("base_revision")
        args.base_adapter = args.base_adapter or source.get("base_adapter")
    if not name:
        raise SteerError(f"{args.sae} does not say which model it is of; give --model")
    if not args.model and source.get("tool") and "/" not in name:  # a name of TransformerLens
        raise SteerError(f"{args.sae} is an SAE of {name!r}, which is no hub id; give --model")
    model, tokenizer = _load(args, name, args.sae)
    layers = None
    if args.layers is not None:
        layers = SteeringConfig(layers=args.layers).resolve_layers(find_decoder(model).num_hidden_layers)
    direction, layer, site, told = sae_direction(args.sae, args.feature, model, layers, args.site, sae)
    made = from_direction(
        model, tokenizer, direction, told,
        layers=str(layer), site=site, share=args.share, positions=args.positions, batch_size=args.batch_size,
    )  # fmt: skip
    _write(args, made, args.sae, f"feature {args.feature} of {args.sae}")


def _token(args: argparse.Namespace) -> None:
    from steer.extract import from_direction, token_direction

    model, tokenizer = _load(args, args.model)
    direction = token_direction(model, tokenizer, args.token)
    made = from_direction(
        model, tokenizer, direction, {"from": f"the unembedding of token {args.token!r}"},
        layers=args.layers, site=args.site, share=args.share, positions=args.positions,
        batch_size=args.batch_size,
    )  # fmt: skip
    _write(args, made, "", f"token {args.token!r}")


def _condition(args: argparse.Namespace) -> None:
    from steer.artifact import read
    from steer.base_adapter import artifact_base
    from steer.extract.condition import fit_condition, read_prompts
    from steer.identity import check_fits
    from steer.tasks.prompts import DEFAULT_PROMPT, choose_prompt, formatter

    saved = read(args.vectors)
    prompts = read_prompts(args.file)
    base = (
        args.model or saved.config.base_model_name_or_path,
        args.base_adapter or saved.config.base_adapter,
    )
    name, args.revision = artifact_base(
        saved.config, args.model, args.revision, args.base_adapter, args.trust_remote_code
    )
    args.base_adapter = None  # merged into what `name` is
    model, tokenizer = _load(args, name, args.file, args.vectors, *base)
    check_fits(saved.config, model, args.vectors, tokenizer)
    asked = (args.template, args.prefix, args.chat_template_kwargs)
    spec = choose_prompt({args.vectors: saved.config.prompt}, DEFAULT_PROMPT, *asked)
    fit = fit_condition(
        model,
        tokenizer,
        saved,
        prompts,
        formatter(spec, tokenizer),
        layers=args.layers,
        held_out=args.held_out,
        seed=args.seed,
        batch_size=args.batch_size,
        label="reading prompts",
    )
    made = saved.with_condition(fit.condition, fit.probe, fit.told())
    with output(args.out, args.replace, args.file, args.vectors, folder=True):
        made.save_pretrained(args.out)
    print(f"condition          cosine above {fit.condition.threshold:.4g} after layer {fit.condition.layer}")
    print(f"F1                 {fit.f1:.3f} on the prompts it was fitted on")
    print(f"wrong activations  {fit.wrong} of the negative prompts held out")
    print(f"missed             {fit.missed} of the positive prompts held out")
    print(f"vectors            {args.out}")


def _load(args: argparse.Namespace, name: str, *sources: str | None) -> tuple[Any, Any]:
    from steer.base_adapter import base_source
    from steer.models import load_model, load_tokenizer

    check_output(args.out, args.replace, name, args.base_adapter, *sources, folder=True)
    trust = args.trust_remote_code
    source, revision = base_source(name, args.base_adapter, args.revision, trust)
    tokenizer = load_tokenizer(source, revision=revision, trust_remote_code=trust)
    return load_model(source, dtype=args.dtype, revision=revision, trust_remote_code=trust), tokenizer


def _write(args: argparse.Namespace, made: Artifact, source: str, what: str) -> None:
    with output(args.out, args.replace, *([source] if source else []), folder=True):
        made.save_pretrained(args.out)
    norms = [vector.norm().item() for vector in made.by_layer().values()]
    print(f"made of   {what}")
    print(
        f"layers    {made.config.layers} ({made.config.site}), lengths {min(norms):.3g} to {max(norms):.3g}"
    )
    print(f"vectors   {args.out}")
