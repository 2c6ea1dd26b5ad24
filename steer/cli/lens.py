"""
The command line of `steer lens`: one analysis a command, and a report of all. What they do is in
`steer.lens.runs`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from steer.arguments import (
    Help,
    add_base_options,
    add_prompt_arguments,
    add_trust,
    at_least,
    count,
    finite,
    text,
    whole,
)
from steer.cli.lens_help import ABOUT, CLOSING, HELP
from steer.cli.sae import SAE_HELP
from steer.config import SITES
from steer.outputs import add_force, check_output, output

CONTROLS = ("random", "shuffled", "mean-difference")


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Add `lens` and its commands to the `steer` parser. Nothing heavy is imported before one runs."""
    lens = commands.add_parser(
        "lens",
        help="what vectors do: logit lens, token shift, path patching, ... report",
        description=ABOUT,
        epilog=CLOSING,
        formatter_class=Help,
    )
    kinds = lens.add_subparsers(required=True, metavar="ANALYSIS")

    report = _command(kinds, "report", plot=False, control=False, problems=48)
    report.add_argument("--out", default="lens.html", help="the page to write (default: lens.html)")
    report.add_argument("--figures", metavar="FOLDER", help="also write the figures, findings.json and .md")
    report.add_argument(
        "--checkpoints",
        metavar="FOLDER",
        help="a run's folder with its checkpoint-N; default: the artifact's",
    )

    logit = _command(kinds, "logit", data=False)
    logit.add_argument("--reading", default="dot", help="dot or cosine (default: dot)")
    logit.add_argument("--no-final-norm", action="store_true", help="leave the final norm's scale out")
    logit.add_argument(
        "--jacobian",
        metavar="LENS",
        help="read through the layers above, with a file of `steer lens jacobian`",
    )
    logit.add_argument("--top", type=count, help="tokens on either side (default: 10, with --scripts 50)")
    logit.add_argument(
        "--scripts",
        action="store_true",
        help="instead: writing systems of the top and bottom tokens, against the vocabulary",
    )

    _add_jacobian(kinds)

    shift = _command(kinds, "shift")
    shift.add_argument("--layers", help="vectors of these layers alone, e.g. 29 or 4-20; default: all")
    shift.add_argument(
        "--temperature", type=at_least(0), default=0.0, help="of the answers looked at (default: 0, greedy)"
    )
    shift.add_argument(
        "--opening",
        action="append",
        type=text,
        default=[],
        metavar="TEXT",
        help="force this opening upon the base model and grade what it makes of it; may be repeated",
    )

    patch = _command(kinds, "patch")
    patch.add_argument("--layers", help="vectors of these layers alone; default: all together")
    patch.add_argument("--others", action="store_true", help="keep the other layers' vectors on in all runs")
    patch.add_argument(
        "--direction", default="add", help="add to the base run or remove from the steered (default: add)"
    )
    which = patch.add_mutually_exclusive_group()
    which.add_argument(
        "--heads", type=int, metavar="LAYER", help="through single heads and key-value groups of this layer"
    )
    patch.add_argument(
        "--qkv",
        metavar="PARTS",
        help="with --heads: through the queries (q), keys (k) or values (v) of single heads or groups, or "
        "several of them, e.g. kv; all others are computed from the input without the change",
    )
    which.add_argument(
        "--frozen", action="store_true", help="through the layers up to each one, all later ones frozen"
    )
    patch.add_argument("--solve", action="store_true", help="also solve the problems along each route")

    attention = _command(kinds, "attention", problems=12)
    attention.add_argument(
        "--draws", type=whole, default=20, help="random sets of vectors beside the trained (default: 20)"
    )

    persistence = _command(kinds, "persistence")
    persistence.add_argument("--layers", help="single vectors of these layers; default: all vectors together")

    baselines = _command(kinds, "baselines", control=False, problems=64)
    baselines.add_argument("--layers", help="layers to try; default: 8 of those with a vector, evenly")
    baselines.add_argument(
        "--lengths",
        nargs="+",
        type=finite,
        metavar="FACTOR",
        help="lengths to choose from, in units of the trained vector's at the layer (default: 0.25 to 32)",
    )
    baselines.add_argument(
        "--draws", type=whole, default=3, help="random directions beside them (default: 3)"
    )

    compose = _command(kinds, "compose")
    compose.add_argument("--layers", help="layers to pair, or to leave out in turn; default: all")
    compose.add_argument("--leave-one-out", action="store_true", help="instead: all vectors but one")
    compose.add_argument(
        "--joint",
        metavar="DIR",
        help="vectors of all layers that were trained together, for the score of vectors that were not "
        "(default: the artifact itself, unless it is the outcome of arithmetic)",
    )
    compose.add_argument(
        "--likelihood",
        action="store_true",
        help="measure pairs by the log-probability of the steered model's right answers: quick, and finer",
    )

    sweep = _command(kinds, "sweep")
    sweep.add_argument("--scales", nargs="+", type=finite, metavar="FACTOR", help="default: -1 to 2")

    _command(kinds, "scales", controls=("random", "random-readout", *CONTROLS[1:]))

    both = _command(kinds, "conventions", problems=8)
    both.add_argument("--layers", help="vectors of these layers for Diff-Diff; default: six, evenly")
    _draws(both, 3)

    last = _command(kinds, "downstream", problems=8)
    last.add_argument("--layers", help="vectors of these layers, one at a time; default: all")
    last.add_argument("--top", type=count, default=50, help="promoted tokens to compare (default: 50)")
    _draws(last, 5)

    uncertain = _command(kinds, "entropy", problems=8)
    uncertain.add_argument("--layers", help="vectors of these layers alone, e.g. 29 or 4-20; default: all")
    uncertain.add_argument(
        "--temperature", type=at_least(0), default=0.0, help="of the answers (default: 0, greedy)"
    )
    _draws(uncertain, 40)

    _draws(_command(kinds, "spectrum", problems=8), 100)

    _add_features(kinds)

    walk = _parser(kinds, "directions")
    walk.add_argument("artifacts", nargs="+", metavar="ARTIFACT", help="the earliest checkpoint first")
    _output(walk)

    transfer = _parser(kinds, "transfer")
    transfer.add_argument("artifacts", nargs="+", metavar="ARTIFACT", help="one a model; each names its own")
    transfer.add_argument(
        "--accept-poor-map", dest="force", action="store_true", help="also with a map that explains little"
    )
    add_trust(transfer)
    _input(transfer)
    _output(transfer)


def _add_features(kinds: Any) -> None:
    parser = _command(kinds, "features", control=False)
    parser.add_argument("--sae", metavar="SAE", required=True, help=SAE_HELP)
    parser.add_argument(
        "--sae-layer", type=whole, help="of an SAE that does not say its layer; default: the SAE's"
    )
    parser.add_argument(
        "--sae-site",
        choices=SITES,
        help="of an SAE that does not say its site; default: the SAE's, or resid_post",
    )
    parser.add_argument("--layers", help="vectors of these layers alone; default: all together")
    parser.add_argument(
        "--texts",
        nargs="+",
        metavar="SOURCE",
        help=".txt (a text a line) or .jsonl files, or data sets on the hub, in the place of problems; as "
        "many texts as --problems says; default: none",
    )
    parser.add_argument("--top", type=count, default=10, help="features in each table (default: 10)")
    _draws(parser, 20)


def _add_jacobian(kinds: Any) -> None:
    parser = _parser(kinds, "jacobian")
    parser.set_defaults(run=_fit_jacobian)
    parser.add_argument("model", help="hub id, folder, .gguf file or short name of a model")
    parser.add_argument(
        "--texts",
        nargs="+",
        required=True,
        metavar="SOURCE",
        help=".txt (a text a line) or .jsonl files, or data sets on the hub (owner/name:split)",
    )
    parser.add_argument("--out", required=True, metavar="LENS", help="the .safetensors file to write")
    parser.add_argument("--layers", default="all", help="e.g. 4-20 or 8,16 (default: all)")
    parser.add_argument("--site", default="resid_post", help="where the vectors are (default: resid_post)")
    parser.add_argument("--limit", type=count, default=32, help="texts to read (default: 32)")
    parser.add_argument("--length", type=count, default=32, help="tokens of each to read (default: 32)")
    parser.add_argument(
        "--skip", type=whole, default=1, help="tokens at the start of each that are left out (default: 1)"
    )
    parser.add_argument("--batch-size", type=count, default=8, help="texts in a pass (default: 8)")
    add_base_options(parser)
    parser.add_argument("--dtype", default="float32", help="precision of the model (default: float32)")
    add_force(parser)


def _parser(kinds: Any, name: str) -> argparse.ArgumentParser:
    about, description, example = HELP[name]
    parser: argparse.ArgumentParser = kinds.add_parser(
        name,
        help=about,
        description=description,
        epilog=f"example:\n    {example}",
        formatter_class=Help,
    )
    parser.set_defaults(run=_run, analysis=name)
    return parser


def _command(
    kinds: Any,
    name: str,
    data: bool = True,
    plot: bool = True,
    control: bool = True,
    problems: int = 32,
    controls: tuple[str, ...] = CONTROLS,
) -> argparse.ArgumentParser:
    parser = _parser(kinds, name)
    parser.add_argument("artifact", help="folder, .safetensors file or hub id")
    parser.add_argument("--model", help="the model to look at; default: the one the artifact names")
    if data:
        _input(parser, problems)
    if control:
        parser.add_argument(
            "--control",
            choices=controls if data else controls[:2],
            help="look at untrained vectors of equal length instead",
        )
    if not data:
        parser.add_argument("--seed", type=int, default=0, help="of the controls (default: 0)")
    add_base_options(parser)
    parser.add_argument("--dtype", default="float32", help="precision of the model (default: float32)")
    _output(parser, plot)
    return parser


def _input(parser: argparse.ArgumentParser, problems: int = 32) -> None:
    parser.add_argument(
        "--data",
        help="arithmetic, gsm8k, FILE.jsonl, ...; default: the held-out problems of the vectors' run",
    )
    parser.add_argument("--split", help="split of the data; default: test, or as the run's held-out problems")
    parser.add_argument(
        "--columns",
        metavar="FIELD=COLUMN,...",
        help="columns of the data that have other names, such as problem=question; default: as in the run, "
        "where no --data is given",
    )
    parser.add_argument(
        "--problems", type=count, default=problems, help=f"problems to use (default: {problems})"
    )
    add_prompt_arguments(parser)
    parser.add_argument(
        "--max-new-tokens", type=count, help="length of an answer; default: as in training, else 256"
    )
    parser.add_argument(
        "--batch-size", type=count, default=128, help="sequences a forward pass (default: 128)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of sampling and of controls (default: 0)")


def _draws(parser: argparse.ArgumentParser, number: int) -> None:
    parser.add_argument(
        "--draws", type=count, default=number, help=f"random sets to compare with (default: {number})"
    )


def _output(parser: argparse.ArgumentParser, plot: bool = True) -> None:
    if plot:
        parser.add_argument("--plot", metavar="FILE", help="write the figure (.png, .svg, .pdf)")
    add_force(parser)
    parser.add_argument("--json", action="store_true", help="print all data as JSON")


def _fit_jacobian(args: argparse.Namespace) -> None:
    going_on = not args.replace and Path(args.out).is_file()
    with output(args.out, args.replace or going_on, args.model, *args.texts):
        from steer.lens import runs  # torch comes with it

        runs.jacobian(args, going_on)


def _run(args: argparse.Namespace) -> None:
    given = [args.artifact] if "artifact" in args else args.artifacts
    sources = [*given, *(getattr(args, name, None) for name in ("model", "base_adapter", "data"))]
    if args.analysis == "report":
        check_output(args.out, args.replace, *sources)
        if args.figures is not None:
            check_output(args.figures, args.replace, *sources, option="--figures", folder=True)
    elif args.plot is not None:
        check_output(args.plot, args.replace, *sources, option="--plot")
    from steer.lens import plots, runs  # torch comes with it

    if args.analysis != "report" and args.plot is not None:
        plots.check_format(args.plot)
    getattr(runs, args.analysis)(args)
