"""`steer sae`: train sparse autoencoders, look into them, and write them in another tool's format."""

from __future__ import annotations

import argparse

from steer.arguments import Help
from steer.cli.programs import PROGRAMS
from steer.outputs import add_force, output


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Add `sae` and its actions."""
    parser = commands.add_parser(
        "sae", help="train sparse autoencoders, look into one, or write it in another format"
    )
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    actions.add_parser("train", help=PROGRAMS["sae train"][1])  # listed here; `programs.find` runs it
    info = actions.add_parser("info", help="what a folder holds: format, shape, cost, source")
    info.add_argument("folder", help="folder of an SAE: steer, saelens, sparsify or dictionary_learning")
    info.set_defaults(run=_info)
    convert = actions.add_parser("convert", help="write an SAE in another format", formatter_class=Help)
    convert.add_argument("folder", help="folder of an SAE, in any of the formats")
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

    sae = load_sae(args.folder)
    cfg = sae.cfg
    print(f"format      {detect(args.folder)}")
    print(f"features    {cfg.d_sae} for activations of width {cfg.d_in}, {cfg.activation} with k={cfg.k}")
    shape = f"kron: {cfg.heads} heads of {cfg.m} x {cfg.n}" if cfg.encoder == "kron" else "dense"
    print(
        f"encoder     {shape}; {encoder_parameters(cfg):,} weights, {encoder_flops(cfg):,} multiply-adds a "
        f"token"
    )
    print(f"loss        {cfg.loss}{'' if cfg.prefixes is None else f', prefixes {cfg.prefixes}'}")
    for name, value in (cfg.source or {}).items():
        print(f"{name:11} {value}")


def _convert(args: argparse.Namespace) -> None:
    from steer.sae.files import load_sae, save_sae

    sae = load_sae(args.folder)
    with output(args.target, args.replace, args.folder, option="target", folder=True):
        print(save_sae(sae, args.target, args.format))
