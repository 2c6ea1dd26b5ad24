"""`steer serve`: an OpenAI-compatible server of one model with many vectors."""

from __future__ import annotations

import argparse
import json
import os
import sys
from importlib.metadata import PackageNotFoundError, entry_points, version

from steer.arguments import Help, add_base_options, named_vectors
from steer.extras import require


def add_commands(commands: argparse._SubParsersAction) -> None:
    serve = commands.add_parser(
        "serve",
        formatter_class=Help,
        help="serve a model with vectors, chosen by each request, over OpenAI's HTTP API (vLLM)",
        description="Starts `vllm serve MODEL`; options that are not listed here go to it (--port, --dtype, "
        "--tensor-parallel-size, ...). A request names its vectors in `model`: `math`, `math@0.5` for half, "
        "`math@0.7+brief@-0.3` for a sum, `base` for none; or in `steering`, with layers and positions: "
        '{"sets": [{"name": "math", "scale": 0.7, "layers": "4-12", "positions": "completion"}]}. '
        "A chat of one question is put to a set as in its training, on /v1/chat/completions alone: other "
        "routes answer what they are sent. GET, POST and DELETE /v1/steering list, add and remove sets while "
        "the server runs. The engine holds 14 sets and sums at once; "
        "--additional-config '{\"steering_slots\": 32}' makes it 30.",
    )
    serve.add_argument("model", help="hub id, local folder or the name of bundled weights")
    serve.add_argument(
        "--vectors",
        type=named_vectors,
        nargs="+",
        default=[],
        metavar="[NAME=]ARTIFACT[@SCALE]",
        help="artifacts to serve; a name is by default that of the artifact's folder",
    )
    serve.add_argument(
        "--template",
        help="how /v1/chat/completions puts a chat of one question to the vectors: a prompt template that is "
        "a chat, or none to leave requests as they are sent; default: as in the training of each set",
    )
    add_base_options(serve)
    serve.set_defaults(run=_serve, more=[])


def _serve(args: argparse.Namespace) -> None:
    from steer.artifact import read_numpy
    from steer.base_adapter import base_source
    from steer.engine.chat import served_prompt
    from steer.expression import check_names
    from steer.weights import BUNDLED, model_path

    require("serving", "vllm")
    sets = args.vectors
    check_names([name for name, _, _ in sets])
    for name, source, _ in sets:
        vectors = read_numpy(source)  # a damaged artifact is told now, not after the model has loaded
        vectors.config.refuse_condition(f"{name} cannot be served")
        _, line = served_prompt(vectors.config.prompt, args.template)
        print(f"{name}: {line}", file=sys.stderr)
    start = {"template": args.template, "model": args.model, "base_adapter": args.base_adapter}
    os.environ["STEER_SERVE"] = json.dumps({"vectors": sets, **start})
    groups = [name for name in entry_points().groups if name.startswith("vllm.") and "endpoint" not in name]
    plugins = {point.name for group in groups for point in entry_points(group=group)}
    before = os.environ.get("VLLM_PLUGINS")
    os.environ["VLLM_PLUGINS"] = ",".join(sorted({"steer", *(before.split(",") if before else plugins)}))
    trust = args.trust_remote_code
    source, revision = base_source(args.model, args.base_adapter, args.revision, trust)
    folder = str(model_path(source)) if source in BUNDLED else source
    own = [*(["--revision", revision] if revision else []), *(["--trust-remote-code"] if trust else [])]
    if folder != args.model and not any(w.partition("=")[0] == "--served-model-name" for w in args.more):
        own += ["--served-model-name", args.model]
    if "--headless" not in args.more:
        own += ["--api-server-count", "1"]  # with several engines too: one process knows the sets
    try:
        version("vllm")
        command = ["vllm.entrypoints.cli.main", "serve", folder]
    except PackageNotFoundError:  # the CPU build has another name, which vLLM's own command stumbles over
        command = ["vllm.entrypoints.openai.api_server", "--model", folder]
    os.execv(sys.executable, [sys.executable, "-m", *command, *own, *args.more])
