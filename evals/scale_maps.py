"""Where on a text adaptive vectors act, beside vectors whose read-outs are random too.

    steer train --config demo-sft --kind adaptive --max_steps 30 --per_device_train_batch_size 8 \\
        --learning_rate 1e-2 --output_dir runs/adaptive
    python -m evals.scale_maps runs/adaptive/vectors

Heat strips (layers by tokens) of the trained vectors and of one random draw on the same text, and numbers for
each: the spread of the coefficient over tokens, its size on prompts against answers, and the share of its
variance between types of tokens. All on the answers that the trained vectors write to held-out problems.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import steer
from steer import artifact
from steer.artifact_scores import vectors_checksum
from steer.base_adapter import artifact_base
from steer.files import replace_file
from steer.lens.controls import random_readouts, random_vectors, values
from steer.lens.inputs import read_problems, write_answers
from steer.lens.results import plain
from steer.lens.sampling import graded
from steer.lens.scale_maps import ScaleMaps, scale_maps
from steer.lens.subject import Subject
from steer.models import load_model, load_tokenizer
from steer.tasks.grading import MathGrader
from steer.tasks.prompts import DEFAULT_PROMPT


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("artifact", help="adaptive vectors: folder, .safetensors file or hub id")
    parser.add_argument("--data", help="problems; default: the held-out problems of their run")
    parser.add_argument("--problems", type=int, default=16, help="default: %(default)s")
    parser.add_argument("--max-new-tokens", type=int, default=24, help="default: %(default)s")
    parser.add_argument("--draws", type=int, default=5, help="of each control (default: %(default)s)")
    parser.add_argument("--out", default="evals/results/lens/adaptive", help="default: %(default)s")
    args = parser.parse_args(argv)
    args.split = args.columns = None

    source = artifact.read(args.artifact)
    name, revision = artifact_base(source.config)
    tokenizer = load_tokenizer(name, revision=revision)
    vectors = steer.load(source, load_model(name, dtype="float32", revision=revision), tokenizer=tokenizer)
    prompt = source.config.prompt or DEFAULT_PROMPT
    subject = Subject(vectors, tokenizer, prompt, args.max_new_tokens)
    problems = read_problems(args, source.config.provenance)
    rows = write_answers(subject, problems)
    with MathGrader() as grader:
        solved = int(graded(subject, rows, problems, grader).sum())
    found: dict[str, list[ScaleMaps]] = {"trained": [scale_maps(subject, rows)]}
    for kind, draw in (("random direction", random_vectors), ("random read-out too", random_readouts)):
        found[kind] = []
        for seed in range(args.draws):
            with values(vectors, draw(vectors, seed)):
                found[kind].append(scale_maps(subject, rows))
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    for kind, suffix in (("trained", ""), ("random read-out too", "-random")):
        found[kind][0].plot(out.with_name(f"{out.name}{suffix}.png"))
    result = {
        "model": source.config.base_model_name_or_path,
        "base_adapter": source.config.base_adapter,
        "vectors": vectors_checksum(vectors.config, vectors.tensors()),
        "texts": len(rows),
        "solved": solved,
        "tokens": sum(len(row.ids) for row in rows),
        "layers": vectors.layers,
        "draws": {kind: [numbers(one) for one in maps] for kind, maps in found.items()},
    }
    result = plain(result)  # None for what is not a number
    replace_file(out.with_name(f"{out.name}.json"), (json.dumps(result, indent=1) + "\n").encode())
    print(f"{solved} of {len(rows)} problems are solved by the trained vectors")
    print("\n".join(table(result)))


def numbers(maps: ScaleMaps) -> dict[str, Any]:
    """By layer, and by type of token the distance from the mean in standard deviations, over layers."""
    return {
        "mean": maps.mean,
        "std": maps.std,
        "spread": maps.spread,
        "on_prompt": maps.on_prompt,
        "explained": maps.explained,
        "types": dict(zip(maps.types, maps.apart.tolist(), strict=True)),
    }


def table(result: dict[str, Any]) -> list[str]:
    """Medians over layers as Markdown; of draws the lowest and the highest."""
    measures = {
        "size of the mean coefficient": "mean",
        "standard deviation over tokens": "std",
        "standard deviation / mean": "spread",
        "size on prompts / on answers": "on_prompt",
        "variance between types of tokens": "explained",
    }
    kinds = result["draws"]
    lines = [f"| median over layers | {' | '.join(kinds)} |", "|---" * (len(kinds) + 1) + "|"]
    for label, name in measures.items():
        told = [
            shown([median(abs(x) for x in draw[name] if x is not None) for draw in draws])
            for draws in kinds.values()
        ]
        lines.append(f"| {label} | {' | '.join(told)} |")
    for name in kinds["trained"][0]["types"]:
        if kinds["trained"][0]["types"][name] is not None:
            told = [shown([draw["types"][name] for draw in draws]) for draws in kinds.values()]
            lines.append(f"| {name}: distance from the mean, in deviations | {' | '.join(told)} |")
    return lines


def shown(numbers: Sequence[float]) -> str:
    low, high = min(numbers), max(numbers)
    return f"{low:.2f}" if len(numbers) == 1 else f"{low:.2f} to {high:.2f}"


if __name__ == "__main__":
    main()
