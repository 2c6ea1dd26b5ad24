"""`steer calibrate`: the scale at which vectors disturb neutral text as much as you allow."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict, replace

from steer.arguments import Help, add_base_options, finite
from steer.outputs import add_force, check_output, output

ABOUT = """\
Find the scale of vectors at which their side effects have a given size: the mean KL of the steered from the
base model's next-token distributions, or the perplexity, on a small neutral text that comes with steer.
"""


def add_commands(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "calibrate",
        help="find the scale at which vectors disturb neutral text as much as you allow",
        description=ABOUT,
        epilog="    steer calibrate cheerful --target-kl 0.05 --out cheerful-0.05",
        formatter_class=Help,
    )
    parser.add_argument("artifact", help="folder, .safetensors file or hub id")
    aim = parser.add_mutually_exclusive_group(required=True)
    aim.add_argument("--target-kl", type=finite, help="mean KL from the base, in nats a token, e.g. 0.05")
    aim.add_argument("--max-perplexity", type=finite, help="perplexity, above the base's")
    parser.add_argument("--model", help="base model; default: the one that the vectors were made for")
    add_base_options(parser)
    parser.add_argument("--dtype", default="auto", help="precision of the base model (default: auto)")
    parser.add_argument("--out", help="folder for the artifact with that scale; default: print it alone")
    add_force(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=_calibrate)


def _calibrate(args: argparse.Namespace) -> None:
    import steer
    from steer.base_adapter import artifact_base
    from steer.evaluation.side_effects import NeutralText, calibrate, curve
    from steer.models import load_model, load_tokenizer

    saved = steer.read(args.artifact)
    base = args.model or saved.config.base_model_name_or_path
    reads = (args.artifact, base, args.base_adapter or saved.config.base_adapter)
    if args.out:
        check_output(args.out, args.replace, *reads, folder=True)
    trust = args.trust_remote_code
    source, revision = artifact_base(saved.config, args.model, args.revision, args.base_adapter, trust)
    tokenizer = load_tokenizer(source, revision=revision, trust_remote_code=trust)
    model = load_model(source, dtype=args.dtype, revision=revision, trust_remote_code=trust)
    text = NeutralText(steer.load(saved, model, tokenizer=tokenizer), tokenizer)
    before = text.measure()
    factor, effects = calibrate(text, args.target_kl, args.max_perplexity)
    made = factor * saved
    by_scale = curve(text, factor)
    told = {**asdict(effects), "base perplexity": text.base_perplexity, "tokens": text.tokens}
    told["curve"] = [
        {name: value if math.isfinite(value) else None for name, value in row.items()} for row in by_scale
    ]
    if args.out:
        known = {**(made.config.provenance or {}), "calibration": told}
        with output(args.out, args.replace, *reads, folder=True):
            replace(made, config=replace(made.config, provenance=known)).save_pretrained(args.out)
    if args.json:
        print(json.dumps({"scale": made.config.scale, "factor": factor, **told, "out": args.out}, indent=2))
        return
    print(f"scale       {made.config.scale:.4g} ({factor:.4g} times the saved one)")
    print(f"KL          {effects.kl:.4g} nats a token (at the saved scale {before.kl:.4g})")
    print(
        f"perplexity  {effects.perplexity:.4g} (at the saved scale {before.perplexity:.4g}, base "
        f"{text.base_perplexity:.4g}, {text.tokens} tokens)"
    )
    print("\n     scale        KL  perplexity")
    for row in by_scale:
        print(f"{row['scale']:10.4g}{row['kl']:10.4g}{row['perplexity']:12.4g}")
    if args.out:
        print(f"\nvectors     {args.out}")
