"""`steer play`: a page to chat with a model and its steered self side by side."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from steer.arguments import Help, add_base_options, whole
from steer.errors import SteerError
from steer.extras import require

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
_NAMED = re.compile(r"((?P<name>[A-Za-z0-9][\w.-]*)=)?(?P<artifact>.+)", re.DOTALL)


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
        metavar="[NAME=]ARTIFACT",
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
    from steer.models import load_model, load_tokenizer
    from steer.play.compare import Comparison
    from steer.play.demo import MESSAGES, demo_artifacts

    if args.demo == bool(args.artifacts):
        given = "both were given" if args.demo else "neither was given"
        raise SteerError(f"steer play takes artifacts or --demo, and {given}")
    if args.demo:
        artifacts, about = demo_artifacts()
    else:
        artifacts, about = {}, ""
        for name, source in map(_named, args.artifacts):
            if name in artifacts:
                raise SteerError(f"two artifacts have one name, {name!r}; write NAME=ARTIFACT")
            artifacts[name] = steer.read(source)
    first = next(iter(artifacts.values()))
    trust = args.trust_remote_code
    source, revision = artifact_base(first.config, args.model, args.revision, args.base_adapter, trust)
    tokenizer = load_tokenizer(source, revision=revision, trust_remote_code=trust)
    model = load_model(source, dtype=args.dtype, revision=revision, trust_remote_code=trust)
    comparison = Comparison(model, tokenizer, artifacts)
    from steer.play.page import build_page, launch

    page = build_page(
        comparison,
        str(model.config.name_or_path),
        about or ", ".join(artifacts),
        MESSAGES if args.demo else (),
        {"cheerful": 0.0} if args.demo else None,
    )
    launch(page, args.host, args.port)


def _named(text: str) -> tuple[str, str]:
    """The name and the source of `NAME=ARTIFACT`; the name is else that of the folder, or of its run."""
    match = _NAMED.fullmatch(text)
    if not match:
        raise SteerError(f"{text!r} is not [NAME=]ARTIFACT")
    path = Path(match["artifact"])
    stem = path.stem if path.suffix == ".safetensors" else path.name
    of_run = stem in ("vectors", "steering") and path.resolve().parent.name
    return match["name"] or of_run or stem or text, match["artifact"]


def _port(text: str) -> int:
    number = whole(text, 1)
    if number > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port from 1 to 65535")
    return number
