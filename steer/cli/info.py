"""`steer info`, `steer diff` and `steer card`: what is in an artifact. The first two start without torch."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from steer import artifact
from steer.arguments import Help
from steer.artifact import Artifact
from steer.artifact_scores import MEASURED
from steer.card import is_score, relevant
from steer.errors import SteerError, shown
from steer.files import read_json

ARTIFACT = "folder, .safetensors file or hub id"
BAR = 40


def add_commands(commands: argparse._SubParsersAction) -> None:
    info = commands.add_parser("info", help="what an artifact holds: model, layers, norms, how it was made")
    info.add_argument("artifact", help=ARTIFACT)
    info.add_argument("--json", action="store_true", help="print JSON")
    info.set_defaults(run=_info)

    diff = commands.add_parser("diff", help="compare two artifacts layer by layer: cosine and norm")
    diff.add_argument("a", help=ARTIFACT)
    diff.add_argument("b", help=ARTIFACT)
    diff.add_argument("--json", action="store_true", help="print JSON")
    diff.set_defaults(run=_diff)

    card = commands.add_parser(
        "card", help="write an artifact's model card again, with the scores of controls", formatter_class=Help
    )
    card.add_argument("artifact", help="folder")
    card.add_argument(
        "--control",
        action="append",
        default=[],
        metavar="NAME=RUN",
        help="a control run's name and its folder or results.json, e.g. 'random reward=runs/control-random'",
    )
    card.set_defaults(run=_card)


def _info(args: argparse.Namespace) -> None:
    read = artifact.read_numpy(args.artifact)
    config = read.config
    norms = _norms(read)
    numbers = sum(tensor.size for tensor in read.tensors.values())
    if args.json:
        print(json.dumps({"config": config.to_dict(), "numbers": numbers, "norms": norms}, indent=2))
        return
    shape = f"{config.num_hidden_layers} layers, hidden size {config.hidden_size}"
    print(f"base model  {config.base_model_name_or_path} ({config.model_type}, {shape})")
    kind = f"{config.kind}, rank {config.rank}" if config.kind == "shared" else config.kind
    site = "the MLP's output" if config.kind == "adaptive" else config.site
    where = f"{site}, positions {config.positions}, scale {config.scale:g}"
    print(f"vectors     {kind}, {len(norms)} layers, {numbers:,} numbers in {config.dtype}, {where}")
    if config.condition is not None:
        told = f"cosine above {config.condition.threshold:.4g} after layer {config.condition.layer}"
        print(f"condition   {told}, at the prompt's last token")
    print(f"prompt      {_printable(str(config.prompt or 'not recorded'))}")
    for part, values in (config.provenance or {}).items():
        told = _text(relevant(part, values) if isinstance(values, dict) else values)
        if told and part != MEASURED:
            print(_printable(f"{part:11} {told}"))
    print("\nlayer      norm")
    for layer, norm in norms.items():
        print(f"{layer:5}  {norm:8.4f}  {_bar(norm, max(norms.values()))}")


def _diff(args: argparse.Namespace) -> None:
    a, b = artifact.read_numpy(args.a), artifact.read_numpy(args.b)
    if a.config.hidden_size != b.config.hidden_size:
        raise SteerError(
            f"{args.a} has hidden_size={a.config.hidden_size}, {args.b} {b.config.hidden_size}: their "
            "vectors have no cosine; bring one over with steer transfer"
        )
    left, right = a.effective(), b.effective()
    rows: list[dict[str, Any]] = []
    for layer in sorted({*left, *right}):
        norms = [math.sqrt(v @ v) if (v := side.get(layer)) is not None else None for side in (left, right)]
        cosine = float(left[layer] @ right[layer]) / (norms[0] * norms[1]) if norms[0] and norms[1] else None
        rows.append({"layer": layer, "norm_a": norms[0], "norm_b": norms[1], "cosine": cosine})
    model = ("base_model_name_or_path", "base_checksum", "model_type", "num_hidden_layers")
    names = (*model, "kind", "site", "positions", "scale", "condition", "prompt")
    changed = {n: [getattr(a.config, n), getattr(b.config, n)] for n in names}
    changed = {n: pair for n, pair in changed.items() if pair[0] != pair[1]}
    other_model = None
    if changed.keys() & {"model_type", "num_hidden_layers"}:
        other_model = (
            "the two are for models of different families or depths, whose residual streams share no axes: "
            "the cosines say nothing; steer transfer brings one over"
        )
    if args.json:
        told = {"differ": changed, "note": other_model, "layers": rows}
        print(json.dumps(told, indent=2, default=str))
        return
    for name, pair in changed.items():
        print(f"{name}: {pair[0]} | {pair[1]}")
    if other_model:
        print(f"note: {other_model}")
    print("layer    norm a    norm b    cosine")
    for row in rows:
        cells = [
            f"{row[k]:10.4f}" if row[k] is not None else f"{'-':>10}" for k in ("norm_a", "norm_b", "cosine")
        ]
        print(f"{row['layer']:5}{''.join(cells)}  {_bar(abs(row['cosine'] or 0.0), 1.0)}")


def _card(args: argparse.Namespace) -> None:
    read = artifact.read(args.artifact)
    if not Path(args.artifact).is_dir():
        raise SteerError(
            f"{shown(args.artifact)} is not a folder, and a card is written beside the vectors; give the "
            "folder of an artifact (steer pack pull downloads one)"
        )
    controls = dict(_control(text) for text in args.control)
    known = {**(read.config.provenance or {})}
    if controls:
        known["controls"] = {**known.get("controls", {}), **controls}
    read.config.provenance = known or None
    folder = artifact.write(args.artifact, read)
    print(folder / artifact.CARD_FILE)


def _control(text: str) -> tuple[str, dict[str, Any]]:
    name, _, place = text.partition("=")
    path = Path(place)
    path = path / "results.json" if path.is_dir() else path
    try:
        score = read_json(path)["after"]
        names = ("accuracy", "low", "high", "problems", "lenient", "lenient_low", "lenient_high")
        return name, {key: score[key] for key in names if key in score or key in names[:4]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SteerError(
            f"--control {text!r}: {path} holds no finished results ({type(error).__name__}: {error}); give "
            "NAME=FOLDER of a finished run"
        ) from error


def _norms(vectors: Artifact) -> dict[int, float]:
    return {layer: math.sqrt(vector @ vector) for layer, vector in vectors.effective().items()}


def _bar(value: float, longest: float) -> str:
    return "#" * round(BAR * value / longest) if longest else ""


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text)


def _text(values: Any) -> str:
    if not isinstance(values, dict):
        return str(values)
    return ", ".join(
        f"{k} {v['accuracy']:.3f} [{v['low']:.3f}, {v['high']:.3f}]{_leniently(v)}"
        if is_score(v)
        else f"{k}={v}"
        for k, v in values.items()
    )


def _leniently(score: dict[str, Any]) -> str:
    """The accuracy read leniently, where the run has it."""
    lenient = score.get("lenient")
    return f", leniently {lenient:.3f}" if isinstance(lenient, (int, float)) else ""
