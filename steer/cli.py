"""The `steer` command: look into an artifact, and try it on a prompt."""

from __future__ import annotations

import argparse
import os
import sys

from steer.errors import SteerError


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns its exit code. A user's mistake is one line on standard error and code 1."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    args = _parser().parse_args(argv)
    try:
        args.run(args)
    except SteerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="steer", description="Train, move, serve and understand steering vectors."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    info = commands.add_parser("info", help="what an artifact holds: model, layers, norms, how it was made")
    info.add_argument("artifact", help="folder, .safetensors file or hub id")
    info.set_defaults(run=_info)

    generate = commands.add_parser(
        "generate", help="answer a prompt with and without the vectors, side by side"
    )
    generate.add_argument("model", help="hub id, local folder, .gguf file or the name of bundled weights")
    generate.add_argument("--vectors", required=True, help="folder, .safetensors file or hub id")
    generate.add_argument("--prompt", required=True, help="the problem or question")
    generate.add_argument(
        "--template", help="prompt template; default: the one the vectors were trained with"
    )
    generate.add_argument("--scale", type=float, help="factor on the vectors; default: as saved")
    generate.add_argument("--max-new-tokens", type=int, default=64, help="length of the answer (default: 64)")
    generate.add_argument("--dtype", default="auto", help="precision of the base model (default: auto)")
    generate.set_defaults(run=_generate)
    return parser


def _info(args: argparse.Namespace) -> None:
    from steer import artifact

    found = artifact.read(args.artifact)
    config = found.config
    norms = [tensor.float().norm().item() for tensor in found.tensors.values()]
    shape = f"{config.depth} layers of width {config.width}"
    print(f"base model  {config.base_model} ({config.model_type}, {shape})")
    where = f"{config.site}, positions {config.positions}, scale {config.scale}"
    print(f"vectors     {len(norms)} x {config.width}, {where}")
    for part, values in (config.provenance or {}).items():
        kept = (
            {k: v for k, v in values.items() if v not in (None, [], "")}
            if isinstance(values, dict)
            else values
        )
        text = ", ".join(f"{k}={v}" for k, v in kept.items()) if isinstance(kept, dict) else kept
        print(f"{part:11} {text}")
    assert config.depth is not None
    longest = max(norms) or 1.0
    for layer, norm in zip(config.resolve_layers(config.depth), norms, strict=True):
        print(f"layer {layer:3}  {norm:8.4f}  {'#' * round(40 * norm / longest)}")


def _generate(args: argparse.Namespace) -> None:
    import steer
    from steer.models import load_model, load_tokenizer
    from steer.prompts import render

    tokenizer = load_tokenizer(args.model)
    model = load_model(args.model, dtype=args.dtype)
    vectors = steer.load(args.vectors, model)
    if args.scale is not None:
        vectors.scale = args.scale
    trained = (vectors.config.provenance or {}).get("run", {})
    text = render(
        args.prompt, tokenizer, args.template or trained.get("template", "boxed"), trained.get("prefix", "")
    )
    inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt").to(model.device)

    def answer() -> str:
        out = model.generate(**inputs, max_new_tokens=args.max_new_tokens, do_sample=False)
        return tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    with vectors.disabled():
        print(f"base     {answer()}")
    print(f"steered  {answer()}")


if __name__ == "__main__":
    sys.exit(main())
