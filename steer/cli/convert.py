"""`steer export`, `steer import` and `steer transfer`: carry vectors to other tools and other models."""

from __future__ import annotations

import argparse
import json
import os
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steer.arguments import Help, add_base_options, add_trust, count, finite
from steer.errors import SteerError, one_line, shown
from steer.outputs import add_force, check_output, output

if TYPE_CHECKING:
    from steer.artifact import Artifact
    from steer.config import SteeringConfig

TARGETS = {
    "peft": ("a PEFT adapter (BEFT; adaptive vectors as a LoRA of rank 1)", "-peft"),
    "gguf": ("a GGUF control vector for llama.cpp, EasySteer and repeng", ".gguf"),
    "gguf-model": ("a whole GGUF model with the vectors as biases, block 0 too", "-model.gguf"),
    "lm-eval": ("a file for `lm_eval --model steered`", "-lm-eval.pt"),
    "checkpoint": (
        "a whole Hugging Face model with the vectors as biases: loads anywhere, no plugin",
        "-model",
    ),
    "npz": ("a numpy archive of (layers, hidden_size)", ".npz"),
    "npy": ("a numpy array of (layers, hidden_size)", ".npy"),
    "pt": ("a torch tensor of (layers, hidden_size)", ".pt"),
}
SOURCES = {
    "peft": "a PEFT adapter (BEFT, or a LoRA of rank 1 on the down-projections)",
    "gguf": "a GGUF control vector of llama.cpp, EasySteer or repeng",
    "lm-eval": "a `steer_path` file of lm-eval",
    "arrays": "a .pt, .npz, .npy, .safetensors or .svec file of one vector a layer",
}


MODELS = ("checkpoint", "gguf-model")  # formats that hold the whole model
FOLDERS = ("peft", "checkpoint")
ARRAYS = ("npz", "npy", "pt")  # formats that a file's suffix tells


def add_commands(commands: argparse._SubParsersAction) -> None:
    export = commands.add_parser(
        "export",
        help="write an artifact in another tool's format",
        formatter_class=Help,
        description="Formats:\n" + "\n".join(f"  {k:11} {text}" for k, (text, _) in TARGETS.items()),
    )
    export.add_argument("artifact", help="folder, .safetensors file or hub id")
    export.add_argument("--to", required=True, choices=TARGETS, help="the format")
    export.add_argument("--out", help="file or folder to write; default: beside the artifact")
    export.add_argument(
        "--model",
        help="base model: its weights for --to checkpoint, its .gguf file for --to gguf-model, its name for "
        "--to peft; default: the artifact's",
    )
    add_base_options(export)
    export.add_argument("--layers", metavar="A-B", help="export these layers only, e.g. 1-29")
    export.add_argument("--scale", type=finite, help="factor on the vectors; default: as saved")
    export.add_argument(
        "--block-0",
        choices=("refuse", "drop", "fold", "keep"),
        help="llama.cpp's control vectors cannot steer block 0: refuse (the default), drop that vector, fold "
        "it into block 1 (not exact), or keep it, for EasySteer and repeng",
    )
    add_force(export)
    export.add_argument("--json", action="store_true", help="print JSON")
    export.set_defaults(run=_export)

    load = commands.add_parser(
        "import",
        help="make an artifact of another tool's file",
        formatter_class=Help,
        description="Formats:\n" + "\n".join(f"  {k:11} {text}" for k, text in SOURCES.items()),
    )
    load.add_argument("source", help="file or folder")
    load.add_argument(
        "--model", required=True, help="the model that the vectors are for: hub id, folder, ..."
    )
    load.add_argument("--revision", help="revision of a hub model")
    add_trust(load)
    load.add_argument("--format", choices=SOURCES, help="default: told by the file's name")
    load.add_argument("--layers", help="the layers that the rows of an array belong to; default: all")
    load.add_argument(
        "--embeddings-row",
        action="store_true",
        help="row 0 of an array is the embeddings', as in hidden_states of transformers: leave it out",
    )
    load.add_argument(
        "--block-0",
        choices=("refuse", "drop", "keep"),
        help="direction.0 of a GGUF file that does not tell what it is: keep it as the vector of block 0, or "
        "drop it; default: refuse the file",
    )
    load.add_argument("--out", required=True, help="folder to write the artifact to")
    load.add_argument(
        "--confirm-model",
        action="store_true",
        help="the vectors are for --model: needed where the file names no model, or another one",
    )
    add_force(load)
    load.add_argument("--json", action="store_true", help="print JSON")
    load.set_defaults(run=_import)

    transfer = commands.add_parser("transfer", help="bring vectors into another model", formatter_class=Help)
    transfer.add_argument("artifact", help="folder, .safetensors file or hub id")
    transfer.add_argument("--to", required=True, metavar="MODEL", help="the recipient: hub id, folder, ...")
    transfer.add_argument(
        "--from", dest="donor", metavar="MODEL", help="the donor; default: the artifact's base"
    )
    transfer.add_argument("--revision", help="revision of a recipient from the hub")
    transfer.add_argument(
        "--from-revision", help="revision of a donor from the hub; default: the artifact's, with its base"
    )
    add_trust(transfer)
    transfer.add_argument("--out", required=True, help="folder to write the new artifact to")
    transfer.add_argument(
        "--method",
        default="auto",
        choices=("auto", "direct", "procrustes", "ridge"),
        help="direct copies; procrustes and ridge map one residual stream to the other (default: auto)",
    )
    transfer.add_argument(
        "--layers-by", default="auto", choices=("auto", "depth", "cka"), help="how layers are matched"
    )
    transfer.add_argument("--no-rescale", action="store_true", help="keep the lengths as the map gives them")
    transfer.add_argument("--texts", help=".txt (one text a line) or .jsonl to compare the models on")
    transfer.add_argument(
        "--accept-poor-map",
        dest="force",
        action="store_true",
        help="write the result even if the map explains little of the recipient's stream",
    )
    add_force(transfer)
    transfer.add_argument(
        "--check", metavar="DATA", help="measure accuracy with and without: arithmetic, gsm8k, FILE"
    )
    transfer.add_argument("--check-limit", type=count, default=64, help="problems of --check (default: 64)")
    transfer.add_argument(
        "--max-new-tokens", type=count, default=256, help="length of the answers of --check"
    )
    transfer.add_argument("--dtype", default="auto", help="precision of both models (default: auto)")
    transfer.add_argument("--json", action="store_true", help="print JSON")
    transfer.set_defaults(run=_transfer)


def _export(args: argparse.Namespace) -> None:
    from steer import artifact
    from steer.export import arrays, checkpoint, gguf, gguf_model, lm_eval, peft
    from steer.weights import gguf_path

    _check_options(args)
    source = artifact.read(args.artifact)
    if args.scale is not None:  # first: a part of shared vectors may have the scale folded in
        source = replace(source, config=replace(source.config, scale=args.scale))
    if args.layers:
        ends = re.fullmatch(r"([0-9]{1,9})(?:-([0-9]{1,9}))?", args.layers)
        if not ends:
            raise SteerError(f"--layers {shown(args.layers)} is not a range; write 4-20 or 12")
        source = source.layers(int(ends[1]), int(ends[2] or ends[1]))
    out = args.out or str(args.artifact).rstrip("/").removesuffix(".safetensors") + TARGETS[args.to][1]
    base = args.model or source.config.base_model_name_or_path or ""
    if args.to in MODELS and not base:
        raise SteerError("the artifact does not name its base model; give --model")
    if args.to == "gguf-model" and not args.model and (adapter := source.config.base_adapter):
        raise SteerError(
            f"the vectors are for {base} with adapter {adapter} merged into it, which {base} lacks; give "
            "--model the .gguf file of the merged model"
        )
    reads = (args.artifact, base, args.base_adapter or source.config.base_adapter)
    with output(out, args.replace, *reads, folder=args.to in FOLDERS):
        if args.to == "peft":
            peft.write(source, out, args.model)
        elif args.to == "gguf":
            gguf.write(source, out, block_0=args.block_0 or "refuse")
        elif args.to == "lm-eval":
            lm_eval.write(source, out)
        elif args.to == "checkpoint":
            of = (args.revision, args.trust_remote_code, args.base_adapter)
            checkpoint.write(source, args.model, out, *of)
        elif args.to == "gguf-model":
            gguf_model.write(source, gguf_path(base), out)
        else:
            arrays.write(source, out)
    size = _size(Path(out))
    # other tools ask with prompts of their own: what the vectors are used to is told here
    prompt = source.config.prompt
    told = {"out": out, "format": args.to, "bytes": size, "prompt": prompt and prompt.to_dict()}
    if args.json:
        print(json.dumps(told))
    else:
        print(f"{out}  ({size:,} bytes)" + (f"\ntrained with the prompt: {prompt}" if prompt else ""))


def _check_options(args: argparse.Namespace) -> None:
    """SteerError for an option that the format does not use."""
    if args.model and args.to not in (*MODELS, "peft"):
        named = f"{', '.join(MODELS)} and peft"
        raise SteerError(f"--model is for --to {named}; --to {args.to} names no model")
    for option in ("--revision", "--trust-remote-code", "--base-adapter"):
        if args.to != "checkpoint" and getattr(args, option[2:].replace("-", "_")):
            raise SteerError(f"{option} is for --to checkpoint; --to {args.to} loads no model's weights")
    suffix = TARGETS[args.to][1]
    if args.to in ARRAYS and args.out and Path(args.out).suffix != suffix:
        raise SteerError(
            f"--to {args.to} writes a {suffix} file, and --out is {shown(args.out)}; give a name that ends "
            f"in {suffix}, or another --to"
        )
    if args.block_0 and args.to != "gguf":
        raise SteerError(f"--block-0 is for --to gguf; --to {args.to} holds the vector of block 0")


def _import(args: argparse.Namespace) -> None:
    from steer import artifact
    from steer.export import arrays, gguf, lm_eval, peft
    from steer.identity import describe
    from steer.models import skeleton

    source = Path(args.source)
    try:
        there = source.exists()
    except (OSError, ValueError) as error:
        raise SteerError(f"cannot read {shown(args.source)}: {one_line(error)}") from error
    if not args.source or not there:
        raise SteerError(f"there is no file or folder {shown(args.source)}; give one of another tool's")
    kind = args.format or _format(source)
    check_output(args.out, args.replace, args.source, args.model, folder=True)
    _check_format_options(args, kind)
    model = skeleton(args.model, args.revision, args.trust_remote_code)
    if kind == "arrays":
        imported = arrays.read(args.source, model, layers=args.layers, embeddings_row=args.embeddings_row)
    elif kind == "gguf":
        imported = gguf.read(args.source, model, block_0=args.block_0 or "refuse")
    else:
        imported = {"peft": peft, "lm-eval": lm_eval}[kind].read(args.source, model)
    own = (kind == "peft" and peft.has_config(source)) or (kind == "gguf" and gguf.has_config(source))
    if problem := _other_model(args.model, imported.config, own):
        if not args.confirm_model:
            raise SteerError(
                f"{args.source} {problem}; if they were made for {args.model}, add --confirm-model"
            )
        config = replace(imported.config, **describe(model), tokenizer_checksum=None)
        imported = replace(imported, config=config)
    with output(args.out, args.replace, args.source, args.model, folder=True):
        artifact.write(args.out, imported)
    told = {"out": args.out, "kind": imported.config.kind, "layers": imported.config.layers}
    what = f"{told['kind']} vectors of layers {told['layers']}"
    print(json.dumps(told) if args.json else f"{args.out}  ({what})")


def _check_format_options(args: argparse.Namespace, kind: str) -> None:
    """SteerError for an option that files of this format have no use for."""
    for option in ("--layers", "--embeddings-row"):
        if kind != "arrays" and getattr(args, option[2:].replace("-", "_")):
            raise SteerError(f"{option} is for arrays; a {kind} file names its layers itself")
    if kind != "gguf" and args.block_0:
        raise SteerError(f"--block-0 is for GGUF control vectors; {shown(args.source)} is read as {kind}")


def _other_model(given: str, config: SteeringConfig, own: bool) -> str | None:
    """
    Why a file that was read may not be for the base model `given`; None where it names that model.

    Args:
        given: a model, as in `steer.models.load_model`.
        config: what was read.
        own: whether the file held the config; its provenance may tell of an earlier file.
    """
    from steer.export.origin import PART
    from steer.identity import same_name
    from steer.prompt import recorded
    from steer.weights import public_name

    named = config.base_model_name_or_path if own else recorded(config.provenance, PART).get("base_model")
    if named is None:
        return "does not say which model its vectors are for"
    if same_name(public_name(named), public_name(given)):
        return None
    return f"says that its vectors are for {shown(named)}"


def _format(path: Path) -> str:
    from steer.export import lm_eval

    if path.is_dir():
        return "peft"
    if path.suffix.lower() == ".gguf":
        return "gguf"
    return "lm-eval" if lm_eval.is_one(path) else "arrays"


def _transfer(args: argparse.Namespace) -> None:
    from steer import artifact
    from steer.base_adapter import artifact_base
    from steer.models import load_model, load_tokenizer
    from steer.transfer.move import needs_donor, transfer

    source = artifact.read(args.artifact)
    donor = (args.donor or source.config.base_model_name_or_path, source.config.base_adapter)
    reads = (args.artifact, args.to, *donor, args.texts, args.check)
    check_output(args.out, args.replace, *reads, folder=True)
    trust = args.trust_remote_code
    recipient = load_model(args.to, dtype=args.dtype, revision=args.revision, trust_remote_code=trust)
    tokenizer = load_tokenizer(args.to, revision=args.revision, trust_remote_code=trust)
    how: dict[str, Any] = {"method": args.method, "layers_by": args.layers_by, "rescale": not args.no_rescale}
    giver: Any = None
    if donor[0] and needs_donor(source.config, recipient, **how):
        name, given = artifact_base(source.config, args.donor, args.from_revision, trust_remote_code=trust)
        giver = load_model(name, dtype=args.dtype, revision=given, trust_remote_code=trust)
    made, report = transfer(
        source,
        giver,
        recipient,
        **how,
        texts=args.texts,
        force=args.force,
        trust_remote_code=trust,
        recipient_tokenizer=tokenizer,
    )
    with output(args.out, args.replace, *reads, folder=True):
        artifact.write(args.out, made)
    scores = _check(args, made, recipient, tokenizer) if args.check else {}
    if args.json:
        print(json.dumps({"report": report.to_dict(), "check": scores, "out": os.fspath(args.out)}, indent=2))
        return
    print(report.text())
    for name, score in scores.items():
        interval = f"[{score['low']:.3f}, {score['high']:.3f}]"
        print(
            f"{name:15} {score['accuracy']:.3f} {interval}, read leniently {score['lenient']:.3f}, on "
            f"{score['problems']} problems of {args.check}"
        )
    print(f"\n{args.out}")


def _check(args: argparse.Namespace, made: Artifact, model: Any, tokenizer: Any) -> dict[str, dict[str, Any]]:
    """Greedy accuracy of the recipient without and with the vectors."""
    import steer
    from steer.evaluation.heldout import answer, score
    from steer.prompt import recorded
    from steer.stop_tokens import stop_token_ids
    from steer.tasks.arithmetic import Arithmetic
    from steer.tasks.data import load_problems
    from steer.tasks.grading import MathGrader
    from steer.tasks.prompts import choose_prompt, formatter

    run = recorded(made.config.provenance, "run")
    names = ("operators", "digits", "terms", "heldout")
    settings = {name: run[name] for name in names if args.check == "arithmetic" and name in run}
    problems = load_problems(
        args.check,
        "heldout" if args.check == "arithmetic" else "test",
        limit=args.check_limit,
        arithmetic=Arithmetic(problems=args.check_limit, **settings),
    ).to_list()
    vectors = steer.load(made, model, tokenizer=tokenizer)
    stops = stop_token_ids(tokenizer, model.generation_config)
    format_problem = formatter(choose_prompt({args.artifact: made.config.prompt}), tokenizer)

    def measure(label: str) -> dict[str, Any]:
        with MathGrader() as grader:
            answers = answer(
                model, tokenizer, problems, format_problem, grader, args.max_new_tokens, stops, label=label
            )
        return asdict(score(answers))

    with vectors.disabled():
        base = measure("without vectors")
    return {"without vectors": base, "with vectors": measure("with vectors")}


def _size(path: Path) -> int:
    return (
        sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
        if path.is_dir()
        else path.stat().st_size
    )
