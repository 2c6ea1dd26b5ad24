"""`steer play`: a page to chat with a model and its steered self side by side."""

from __future__ import annotations

import argparse
import warnings
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING

from steer.arguments import Help, add_base_options, named_vectors, text, whole
from steer.errors import SteerError
from steer.extras import require

if TYPE_CHECKING:
    from steer.play.compare import Comparison

ABOUT = """\
A page in the browser: chat with the base model and with its steered self side by side. A slider for the
strength of each set of vectors, switches for layers, the probabilities of the next token, and answers
coloured by how much the vectors changed each token's probability. It runs on this machine; nothing is sent
anywhere.
"""
EXAMPLES = """\
    pip install "steer-rl[play]"
    steer play --demo            # SmolLM2-135M on the CPU, with vectors that come with steer
    steer play runs/demo/vectors
    steer play math=runs/math/vectors brief=user/brief-vectors --model Qwen/Qwen2.5-0.5B-Instruct
"""


def add_commands(commands: argparse._SubParsersAction) -> None:
    play = commands.add_parser(
        "play",
        help="chat with a model and its steered self side by side, in the browser",
        description=ABOUT,
        epilog=EXAMPLES,
        formatter_class=Help,
    )
    play.add_argument(
        "artifacts",
        nargs="*",
        type=text,
        metavar="[NAME=]ARTIFACT[@SCALE]",
        help="folders, .safetensors files or hub ids, all for one base; a name is by default the folder's",
    )
    play.add_argument("--demo", action="store_true", help="a small model, with vectors that come with steer")
    play.add_argument("--model", help="base model; default: the one that the first artifact was made for")
    add_base_options(play)
    play.add_argument("--dtype", default="auto", help="precision of the base model (default: auto)")
    play.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen at; 0.0.0.0 lets other machines in, without a password (default: 127.0.0.1)",
    )
    play.add_argument("--port", type=_port, help="port (default: the first free one from 7860)")
    play.set_defaults(run=_play)


def _play(args: argparse.Namespace) -> None:
    require("steer play", "play")
    import steer
    from steer.base_adapter import artifact_base
    from steer.expression import check_names
    from steer.models import load_model, load_tokenizer
    from steer.play.compare import Comparison
    from steer.play.demo import demo_artifacts

    if args.demo == bool(args.artifacts):
        given = "both were given" if args.demo else "neither was given"
        raise SteerError(f"steer play takes artifacts or --demo, and {given}")
    if args.demo:
        artifacts, about = demo_artifacts()
    else:
        sets = [_named(given) for given in args.artifacts]
        check_names([name for name, _, _ in sets])
        artifacts = {}
        for name, source, scale in sets:
            saved = steer.read(source)
            artifacts[name] = saved if scale == 1 else scale * saved
        about = ""
    first = next(iter(artifacts.values()))
    trust = args.trust_remote_code
    source, revision = artifact_base(first.config, args.model, args.revision, args.base_adapter, trust)
    tokenizer = load_tokenizer(source, revision=revision, trust_remote_code=trust)
    model = load_model(source, dtype=args.dtype, revision=revision, trust_remote_code=trust)
    comparison = Comparison(model, tokenizer, artifacts)
    _serve(comparison, about or ", ".join(artifacts), args)


def _serve(comparison: Comparison, about: str, args: argparse.Namespace) -> None:
    from steer.play.demo import MESSAGES, STRENGTHS
    from steer.play.page import build_page, launch

    if not _is_local(args.host):
        warnings.warn(
            f"--host {args.host}: everyone who reaches this machine can use the page, without a password",
            stacklevel=2,
        )
    title = str(comparison.model.config.name_or_path)
    messages, strengths = (MESSAGES, STRENGTHS) if args.demo else ((), {})
    launch(build_page(comparison, title, about, messages, strengths), args.host, args.port)


def _named(given: str) -> tuple[str, str, float]:
    """As `named_vectors`; vectors in a run's folder are named after the run."""
    name, source, scale = named_vectors(given)
    of_run = name == "vectors" == Path(source).name and Path(source).resolve().parent.name
    return of_run or name, source, scale


def _is_local(host: str) -> bool:
    """Whether an address is reached from this machine alone."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _port(given: str) -> int:
    number = whole(given, 1)
    if number > 65535:
        raise argparse.ArgumentTypeError(f"{given!r} is not a port from 1 to 65535")
    return number
