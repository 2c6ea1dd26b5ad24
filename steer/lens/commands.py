"""
The command line of `steer lens`: one analysis a command, and a report of all. What they do is in
`steer.lens.runs`.
"""

from __future__ import annotations

import argparse
from typing import Any


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Add `lens` and its commands to the `steer` parser. Nothing heavy is imported before one runs."""
    lens = commands.add_parser(
        "lens", help="what vectors do: logit lens, token shift, path patching, ... report"
    )
    kinds = lens.add_subparsers(required=True, metavar="ANALYSIS")

    logit = _command(kinds, "logit", "tokens that each vector promotes and suppresses by itself", data=False)
    logit.add_argument("--reading", default="dot", help="dot or cosine (default: dot)")
    logit.add_argument("--no-final-norm", action="store_true", help="leave the final norm's scale out")
    logit.add_argument("--top", type=int, default=10, help="tokens on either side (default: 10)")

    shift = _command(kinds, "shift", "whose probability the vectors change, and where in the answer")
    shift.add_argument("--layers", help="vectors of these layers alone, e.g. 29 or 4-20; default: all")
    shift.add_argument(
        "--temperature", type=float, default=0.0, help="of the answers looked at (default: 0, greedy)"
    )
    shift.add_argument(
        "--force",
        action="append",
        default=[],
        metavar="TEXT",
        help="also force this opening upon the base model and grade it",
    )

    patch = _command(kinds, "patch", "which components the effect passes on its way to the output")
    patch.add_argument("--layers", help="vectors of these layers alone; default: all together")
    patch.add_argument("--others", action="store_true", help="keep the other layers' vectors on in all runs")
    patch.add_argument(
        "--direction", default="add", help="add to the base run or remove from the steered (default: add)"
    )
    patch.add_argument(
        "--heads", type=int, metavar="LAYER", help="through single heads and key-value groups of this layer"
    )
    patch.add_argument("--solve", action="store_true", help="also solve the problems along each route")

    persistence = _command(kinds, "persistence", "whether the change survives the layers above")
    persistence.add_argument("--layers", help="single vectors of these layers; default: all vectors together")

    compose = _command(kinds, "compose", "single layers alone and in pairs; what leaving one out costs")
    compose.add_argument("--layers", help="layers to pair; default: all")
    compose.add_argument("--leave-one-out", action="store_true", help="instead: all vectors but one")

    sweep = _command(kinds, "sweep", "accuracy over the scale of the vectors")
    sweep.add_argument("--scales", default="-1,0,0.25,0.5,0.75,1,1.25,1.5,2", help="comma-separated factors")

    _command(kinds, "scales", "how much of an adaptive vector each token of a text gets")

    walk = kinds.add_parser("directions", help="norms and cosines of the vectors, along checkpoints")
    walk.add_argument("artifacts", nargs="+", metavar="ARTIFACT", help="the earliest checkpoint first")
    _output(walk)
    walk.set_defaults(run=_run, analysis="directions")

    transfer = kinds.add_parser("transfer", help="the vectors of several models in each of the others")
    transfer.add_argument("artifacts", nargs="+", metavar="ARTIFACT", help="one a model; each names its own")
    transfer.add_argument("--force", action="store_true", help="also with a map that explains little")
    _input(transfer)
    _output(transfer)
    transfer.set_defaults(run=_run, analysis="transfer")

    report = _command(kinds, "report", "everything, as one self-contained HTML page", plot=False)
    report.add_argument("--out", default="lens.html", help="the page to write (default: lens.html)")
    report.add_argument("--figures", metavar="FOLDER", help="also write the figures and findings.json here")
    report.add_argument(
        "--checkpoints",
        metavar="FOLDER",
        help="a run's folder with its checkpoint-N; default: the artifact's",
    )


def _command(
    kinds: Any, name: str, about: str, data: bool = True, plot: bool = True
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = kinds.add_parser(name, help=about, description=about)
    parser.add_argument("artifact", help="folder, .safetensors file or hub id")
    parser.add_argument("--model", help="the model to look at; default: the one the artifact names")
    if data:
        _input(parser)
    parser.add_argument("--dtype", default="float32", help="precision of the model (default: float32)")
    _output(parser, plot)
    parser.set_defaults(run=_run, analysis=name)
    return parser


def _input(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data",
        help="arithmetic, gsm8k, FILE.jsonl, ...; default: what the vectors were trained on, held out",
    )
    parser.add_argument("--split", default="test", help="split of the data (default: test)")
    parser.add_argument("--problems", type=int, default=32, help="problems to use (default: 32)")
    parser.add_argument("--template", help="prompt template; default: the one the vectors were trained with")
    parser.add_argument(
        "--prefix", help="opening of the answer; default: the one the vectors were trained with"
    )
    parser.add_argument(
        "--max-new-tokens", type=int, help="length of an answer; default: as in training, else 256"
    )
    parser.add_argument("--batch-size", type=int, default=128, help="sequences a forward pass (default: 128)")
    parser.add_argument("--seed", type=int, default=0, help="of sampling and of random controls (default: 0)")


def _output(parser: argparse.ArgumentParser, plot: bool = True) -> None:
    if plot:
        parser.add_argument("--plot", metavar="FILE", help="write the figure (.png, .svg, .pdf)")
    parser.add_argument("--json", action="store_true", help="print all data as JSON")


def _run(args: argparse.Namespace) -> None:
    from steer.lens import runs  # torch comes with it

    getattr(runs, args.analysis)(args)
