"""`steer sae`: train sparse autoencoders, inspect them, and write them in another tool's format."""

from __future__ import annotations

import argparse
from pathlib import Path

from steer.arguments import Help
from steer.cli.programs import PROGRAMS
from steer.outputs import add_force, output

SAE_HELP = (
    "folder of an SAE (steer, saelens, sparsify or dictionary_learning), hub id, or RELEASE:ID of SAELens, "
    "where sae-lens is installed"
)
EXAMPLE = """\
    steer sae info runs/sae-demo/topk
    steer sae info gemma-scope-2-270m-pt-res:layer_12_width_16k_l0_medium
"""


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Add `sae` and its actions."""
    parser = commands.add_parser(
        "sae", help="train sparse autoencoders, look into one, or write it in another format"
    )
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    actions.add_parser("train", help=PROGRAMS["sae train"][1])  # listed here; `programs.find` runs it
    info = actions.add_parser(
        "info", help="what an SAE is: format, shape, cost, source", epilog=EXAMPLE, formatter_class=Help
    )
    info.add_argument("sae", metavar="SAE", help=SAE_HELP)
    info.set_defaults(run=_info)
    convert = actions.add_parser("convert", help="write an SAE in another format", formatter_class=Help)
    convert.add_argument("sae", metavar="SAE", help=SAE_HELP)
    convert.add_argument("target", help="folder to write")
    convert.add_argument(
        "--format",
        default="saelens",
        help="steer, saelens, sparsify or dictionary_learning",
    )
    add_force(convert)
    convert.set_defaults(run=_convert)


def _info(args: argparse.Namespace) -> None:
    from steer.sae.config import encoder_flops, encoder_parameters
    from steer.sae.files import detect, load_sae

    sae = load_sae(args.sae)
    cfg = sae.cfg
    there = (cfg.source or {}).get("tool", "steer")  # of the hub
    print(f"format      {detect(args.sae) if Path(args.sae).exists() else there}")
    print(f"features    {cfg.d_sae} for activations of width {cfg.d_in}, {cfg.variant}")
    kron = f"kron: {cfg.heads} heads of {cfg.m} x {cfg.n}, {cfg.interaction}"
    shape = kron if cfg.encoder == "kron" else "dense"
    print(
        f"encoder     {shape}; {encoder_parameters(cfg):,} weights, {encoder_flops(cfg):,} multiply-adds a "
        f"token"
    )
    print(f"loss        {cfg.loss}{'' if cfg.prefixes is None else f', prefixes {cfg.prefixes}'}")
    for name, value in (cfg.source or {}).items():
        if name != "k":  # which is not known
            print(f"{name:11} {value}")


def _convert(args: argparse.Namespace) -> None:
    from steer.sae.files import load_sae, save_sae

    sae = load_sae(args.sae)
    with output(args.target, args.replace, args.sae, option="target", folder=True):
        print(save_sae(sae, args.target, args.format))
