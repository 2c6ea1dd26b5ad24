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
from steer.cli.sae import SAE_HELP
from steer.config import SITES
from steer.outputs import add_force, check_output, output

CONTROLS = ("random", "shuffled", "mean-difference")

ABOUT = """\
What trained vectors do to their model. Begin with the report: it runs every analysis on one artifact and
writes a page that reads like a short paper.

    steer lens report my-vectors --out lens.html --figures lens/

The commands below are its parts, for a closer look. All of them take the model, the prompts and the template
from the artifact itself (what it was trained on, held out) unless told otherwise, print a short table, and
give everything as --json or as a figure with --plot FILE.
"""

CLOSING = """\
Whatever a command shows of the trained vectors, see what it shows of vectors of equal length that were not
trained for it: --control random, shuffled (each layer gets another layer's direction) or mean-difference.
"""

HELP = {
    "logit": (
        "tokens that each vector promotes and suppresses by itself",
        "Unembedding times vector: the tokens whose logits a vector raises (+) and lowers (-) when nothing "
        "is between it and the output. That is the whole story for the last layer; for early layers it "
        "says little.",
        "steer lens logit my-vectors --reading cosine --scripts --plot lens.png\n"
        "    steer lens logit my-vectors --jacobian smollm2.lens.safetensors",
    ),
    "jacobian": (
        "fit a Jacobian lens of a model, to read vectors of early layers with",
        "The mean derivative of the last layer's stream with respect to each layer's, over the positions of "
        "texts: `steer lens logit ARTIFACT --jacobian LENS` then shows the tokens that a vector promotes "
        "through the layers above it. Written after each batch of texts; the same command goes on where it "
        "was stopped. A backward pass for each number of the hidden size and each batch, to the earliest "
        "layer: later layers alone take less time.",
        "steer lens jacobian smollm2-135m-instruct --texts texts.txt --out smollm2.lens.safetensors",
    ),
    "shift": (
        "whose probability the vectors change, and where in the answer",
        "How far the next-token distributions of the steered and the base model lie apart, along answers "
        "that the steered model writes. With --opening, how much of the gain an opening gives that is forced "
        "upon the base model, without any vector.",
        "steer lens shift my-vectors --layers last\n"
        "    steer lens shift my-vectors --opening To --opening Step",
    ),
    "patch": (
        "which components the effect passes on its way to the output",
        "Path patching: the vectors' change may pass some components; all others give exactly what they give "
        "without it. 1 is the whole effect, 0 none of it; shares of routes need not add up to 1.",
        "steer lens patch my-vectors --layers 28 --solve\n"
        "    steer lens patch my-vectors --layers 28 --heads 29\n"
        "    steer lens patch my-vectors --layers 28 --heads 29 --qkv v\n"
        "    steer lens patch my-vectors --frozen --direction remove",
    ),
    "attention": (
        "how far attention maps move, beside random vectors",
        "Jensen-Shannon distance (0 equal, 1 disjoint) of the steered and the base model's attention maps, "
        "for each layer and head, along answers that the steered model writes; with random vectors of equal "
        "length beside it. Layers without attention maps are left out and named.",
        "steer lens attention my-vectors --problems 12 --plot attention.png",
    ),
    "persistence": (
        "whether the change survives the layers above",
        "Diff-Diff: cosine of each token's change of the stream with the mean change at that layer (near 1: "
        "one direction for all tokens). Diff-Vector: its cosine with the vector trained at that layer.",
        "steer lens persistence my-vectors --layers 0,10,20",
    ),
    "baselines": (
        "directions from activations alone, their length tuned, beside the vectors",
        "What a mean difference and the normal of a linear support vector machine add to the "
        "log-probability of right answers, layer by layer and all together, beside the trained vectors and "
        "random directions. They lead from the base model's answers to the steered ones. Of every four "
        "problems two make the directions, one chooses each one's length, and one measures.",
        "steer lens baselines my-vectors --problems 64 --layers 4,12,20,28",
    ),
    "compose": (
        "single layers alone and in pairs; what leaving one out costs",
        "Greedy accuracy with one layer's vector, with two, and with all. The score of a pair is (pair - "
        "best of the two) / (all trained together - best of the two), undefined where the jointly trained "
        "set is not better than the best of the two. All pairs of n layers are n(n+1)/2 runs: choose with "
        "--layers. Of four pairs or more, Spearman's correlation of scores and gains with the cosine of the "
        "vectors and the distance of the layers.",
        "steer lens compose my-vectors --layers 0,8,16,24\n    steer lens compose my-vectors --leave-one-out",
    ),
    "sweep": (
        "accuracy over the scale of the vectors",
        "Greedy accuracy with all vectors multiplied: weaker, stronger, reversed.",
        "steer lens sweep my-vectors --scales -1 0 0.5 1 2",
    ),
    "scales": (
        "how much of an adaptive vector each token of a text gets",
        "The coefficient that each layer of an adaptive artifact gives to each token; the figure is a heat "
        "strip over the first text. The table has its spread over tokens, and how much of that is between "
        "types of tokens (digits, punctuation, ... of prompts and of answers). Any read-out varies over "
        "tokens: --control random-readout shows how much, on the same texts.",
        "steer lens scales my-adaptive-vectors --plot strip.png\n"
        "    steer lens scales my-adaptive-vectors --control random-readout --plot random.png",
    ),
    "directions": (
        "norms and cosines of the vectors, along checkpoints",
        "Of artifacts of one model, the earliest first: each layer's norm, and its cosine with the last "
        "artifact's vector.",
        "steer lens directions runs/demo/checkpoint-10 runs/demo/checkpoint-20 runs/demo/vectors",
    ),
    "transfer": (
        "the vectors of several models in each of the others",
        "Accuracy of every artifact's vectors in every other one's model, and the published score, (donor's "
        "- base) / (own - base), with random vectors of the own ones' length beside it.",
        "steer lens transfer vectors-of-one vectors-of-another",
    ),
    "conventions": (
        "logit lens and Diff-Diff as the published code has them, beside ours",
        "Two analyses, each by the conventions of steer and by those of the paper's code. Logit lens: with "
        "the final norm's gain, or without it by dot product and by cosine. Diff-Diff: one mean change over "
        "all texts, the first token left out; or each text's own mean, the first token included, along what "
        "each vector writes alone. Random vectors are beside both.",
        "steer lens conventions my-vectors --layers 0,10,20 --problems 8 --draws 3",
    ),
    "downstream": (
        "tokens that each single vector promotes by way of all later layers",
        "The mean change of the last layer's state, one vector on at a time, through the final norm's gain "
        "and the unembedding. agreement: 1 where all tokens' states change alike; peak: the top token's "
        "score in standard deviations; overlap: the top tokens that `steer lens logit` has too. In "
        "brackets the mean of random vectors.",
        "steer lens downstream my-vectors --layers 0,10,20 --problems 8",
    ),
    "entropy": (
        "whether the vectors act at uncertain or at certain tokens",
        "The entropy of the base model's next-token distribution against how far the vectors move it, token "
        "by token along the steered model's answers: Spearman's correlation, beside that of random sets of "
        "vectors, which also move uncertain tokens more.",
        "steer lens entropy my-vectors --layers last --problems 8",
    ),
    "spectrum": (
        "singular values and stable rank of the set of vectors",
        "Whether the layers' vectors are one direction (stable rank 1) or many, as trained and divided by "
        "the length of the residual stream at their layer, beside random sets of equal length.",
        "steer lens spectrum my-vectors",
    ),
    "features": (
        "features of a sparse autoencoder that the vectors write and read",
        "Cosine and projection of a vector on the rows of the SAE's decoder (what it writes), its cosine "
        "with the rows of the encoder (what it reads), and how the mean activation of each feature changes "
        "on texts while the vectors are on. Random vectors of equal length are beside each number; p is how "
        "often the strongest feature of random vectors is as strong. A vector at the SAE's own layer and "
        "site is read as it is. Vectors in earlier places are read by the mean change that arrives at the "
        "SAE; those after it are refused. Texts: --texts; else the steered model's answers to --data or "
        "what the vectors were trained on; else a neutral text.",
        "steer lens features my-vectors --sae runs/sae-demo/topk --plot features.png\n"
        "    steer lens features my-vectors --sae gemma-scope-2-270m-pt-res:layer_12_width_16k_l0_medium",
    ),
    "report": (
        "everything, as one self-contained HTML page",
        "Runs every analysis beside 20 sets of random vectors, judges the paper's findings by stated rules "
        "(seen, seen but not specific, not seen, untestable), and writes one page. Needs 24 problems; "
        "what is said of gains, 24 that are solved. A quarter of an hour for a model of 135M parameters "
        "on two CPU cores; it shows where it is.",
        "steer lens report runs/demo/vectors --out lens.html --figures lens/",
    ),
}


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
    logit.add_argument("--top", type=count, default=10, help="tokens on either side (default: 10)")
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
    compose.add_argument("--layers", help="layers to pair; default: all")
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
        help="arithmetic, gsm8k, FILE.jsonl, ...; default: what the vectors were trained on, held out",
    )
    parser.add_argument("--split", default="test", help="split of the data (default: test)")
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
    sources = [args.artifact] if "artifact" in args else args.artifacts
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
