"""Does the Jacobian lens name the token that a vector promotes, where the logit lens does not?

    steer lens jacobian smollm2-135m-instruct --texts gsm8k_train.jsonl --limit 12 --length 16 \\
        --out smollm2.lens.safetensors
    python -m evals.jacobian_lens runs/demo/vectors --lens smollm2.lens.safetensors --texts gsm8k_test.jsonl

For each layer's vector alone: the token whose next-token log-probability it raises most, in the mean over the
tokens of texts that the lens was not fitted on, and the rank of that token in either reading (1 is the top),
with the correlation of the readings with the measured changes over the vocabulary. The same for random
vectors of equal length, and for the vector at a twentieth of its length: a linear reading is about small
vectors.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

import steer
from steer import artifact
from steer.artifact_scores import vectors_checksum
from steer.base_adapter import artifact_base
from steer.errors import SteerError
from steer.files import replace_file
from steer.lens.conditions import BASE, Condition
from steer.lens.controls import random_vectors, values
from steer.lens.jacobian import JacobianLens, checksum, sample_windows
from steer.lens.logit_lens import logit_lens
from steer.lens.passes import passes
from steer.lens.subject import Row, Subject
from steer.models import load_model, load_tokenizer
from steer.sae.activations import Window
from steer.sae.texts import Texts

SMALL = 0.05
TOGETHER = 6  # layers measured in one pass, beside the base model


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("artifact", help="folder, .safetensors file or hub id of vectors")
    parser.add_argument("--lens", required=True, help="a file of `steer lens jacobian`, of the same model")
    parser.add_argument(
        "--texts",
        nargs="+",
        required=True,
        help="texts to measure on, .txt or .jsonl files; give others than the lens was fitted on (only "
        "the very same sample is noticed)",
    )
    parser.add_argument("--limit", type=int, default=8, help="texts (default: %(default)s)")
    parser.add_argument("--length", type=int, default=16, help="tokens of each (default: %(default)s)")
    parser.add_argument("--draws", type=int, default=2, help="random sets of vectors (default: %(default)s)")
    parser.add_argument("--out", default="evals/results/lens/jacobian.json", help="default: %(default)s")
    args = parser.parse_args(argv)

    source = artifact.read(args.artifact)
    name, revision = artifact_base(source.config)
    tokenizer = load_tokenizer(name, revision=revision)
    vectors = steer.load(source, load_model(name, dtype="float32", revision=revision), tokenizer=tokenizer)
    subject = Subject(vectors, tokenizer)
    lens = JacobianLens.load(args.lens)
    lens.check(subject.model, vectors.config)
    sample = sample_windows(Texts(args.texts), tokenizer, args.limit, args.length)
    if checksum(sample) == lens.sample:
        raise SteerError("the lens was fitted on these very texts; give others with --texts")
    result = {
        "model": source.config.base_model_name_or_path,
        "base_adapter": source.config.base_adapter,
        "vectors": vectors_checksum(vectors.config, vectors.tensors()),
        "lens": {"site": lens.site, "texts": lens.texts, "tokens": lens.tokens, "sample": lens.sample},
        "measured": {"texts": args.limit, "tokens": sum(sum(w.keep) for w in sample)},
        "draws": args.draws,
        **study(subject, lens, sample, args.draws),
    }
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    replace_file(Path(args.out), (json.dumps(result, indent=1, ensure_ascii=False) + "\n").encode())
    print("\n".join(table(result)))


def study(subject: Subject, lens: JacobianLens, sample: Sequence[Window], draws: int) -> dict[str, Any]:
    """Rows of each layer, of the trained vectors and of random ones, and their summary."""
    base_scale = subject.vectors.scale
    trained = changes(subject, sample, "trained vectors")
    subject.vectors.scale = SMALL * base_scale
    small = changes(subject, sample, "small vectors")
    subject.vectors.scale = base_scale
    rows = {"trained": compared(subject, lens, trained, small), "random": []}
    for seed in range(draws):
        with values(subject.vectors, random_vectors(subject.vectors, seed)):
            found = changes(subject, sample, f"random vectors {seed + 1}")
            rows["random"] += compared(subject, lens, found)
    return {"rows": rows, "summary": {kind: summary(found) for kind, found in rows.items()}}


def changes(subject: Subject, sample: Sequence[Window], label: str) -> Tensor:
    """
    What each layer's vector alone adds to the next-token log-probabilities, in the mean over the kept tokens:
    (layers, vocabulary).
    """
    texts = [Row(tuple(window.ids), len(window.ids)) for window in sample]
    found = []
    for start in range(0, len(subject.layers), TOGETHER):
        layers = subject.layers[start : start + TOGETHER]
        conditions = [BASE, *(Condition(frozenset([layer])) for layer in layers)]
        total, count = torch.zeros(()), 0
        for part in passes(subject, texts, conditions, whole=True, label=f"{label}, layers {start}-"):
            for index in range(len(part.rows)):
                keep = torch.tensor(sample[part.first + index].keep)
                logp = part.next_token(index, whole=True)[:, keep].log_softmax(-1)
                total, count = total + logp.sum(1), count + int(keep.sum())
        mean = total / count
        found.append(mean[1:] - mean[:1])
    return torch.cat(found)[:, : len(subject.tokenizer)].cpu()


def compared(
    subject: Subject, lens: JacobianLens, measured: Tensor, small: Tensor | None = None
) -> list[dict[str, Any]]:
    """One row a layer: the most promoted token, its rank in each reading, and each reading's correlation."""
    own = subject.vectors.added()
    readings = {
        "logit": logit_lens(subject.model, subject.tokenizer, own).scores,
        "jacobian": logit_lens(subject.model, subject.tokenizer, lens.transport(own)).scores,
    }
    if small is not None:
        readings["small"] = small
    rows = []
    for n, layer in enumerate(subject.layers):
        top = int(measured[n].argmax())
        row = {"layer": layer, "token": subject.token(top), "change": measured[n, top].item()}
        for name, scores in readings.items():
            known = scores[n, : measured.shape[1]]
            row[f"rank_{name}"] = int((known > known[top]).sum()) + 1
            row[f"r_{name}"] = torch.corrcoef(torch.stack([known, measured[n]]))[0, 1].item()
        rows.append(row)
    return rows


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of each reading the median rank, the layers with a rank up to 10, and the median correlation."""
    readings = [name.removeprefix("rank_") for name in rows[0] if name.startswith("rank_")]
    return {
        name: {
            "median_rank": median(row[f"rank_{name}"] for row in rows),
            "in_top_10": sum(row[f"rank_{name}"] <= 10 for row in rows),
            "median_r": median(row[f"r_{name}"] for row in rows),
            "rows": len(rows),
        }
        for name in readings
    }


def table(result: dict[str, Any]) -> list[str]:
    """The rows as Markdown; of random vectors the medians over the draws."""
    lines = [
        "| layer | token | nats | logit lens: rank (r) | Jacobian lens | a twentieth of the vector | random: "
        "logit lens | random: Jacobian lens |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]["trained"]:
        drawn = [other for other in result["rows"]["random"] if other["layer"] == row["layer"]]
        told = [
            f"{row[f'rank_{name}']:,} ({row[f'r_{name}']:+.2f})" for name in ("logit", "jacobian", "small")
        ]
        for name in ("logit", "jacobian"):
            rank, r = (median(other[f"{key}_{name}"] for other in drawn) for key in ("rank", "r"))
            told.append(f"{rank:,.0f} ({r:+.2f})")
        token = repr(row["token"]).replace("|", "\\|")
        lines.append(f"| {row['layer']} | `{token}` | {row['change']:+.3f} | {' | '.join(told)} |")
    for kind, readings in result["summary"].items():
        for name, found in readings.items():
            lines.append(
                f"{kind}, {name}: median rank {found['median_rank']:,.0f}, in the top 10 in "
                f"{found['in_top_10']} of {found['rows']}, median correlation {found['median_r']:+.2f}"
            )
    return lines


if __name__ == "__main__":
    main()
