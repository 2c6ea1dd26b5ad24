"""
Does a decoder show which features go together? A small synthetic study after the toy of KronSAE (arXiv
2505.22255).

    python -m evals.sae_covariance

Activations x = L e have a known covariance S = L L^T of blocks, 1 on the diagonal. An autoencoder with one
feature for each coordinate is trained on them. Its features are matched to the coordinates (the assignment
with the largest sum of |W_dec|), and the matrix of the products of its decoder's rows, C = W_dec W_dec^T in
that order, is compared with S by the RV coefficient tr(S C) / sqrt(tr(S S) tr(C C)). It is 1 where C is a
multiple of S and positive for any two covariances, so three controls stand beside it: rows drawn at random,
every autoencoder before its training, and the identity matrix.

This is the question of the paper on data of our own: its covariances, sizes and training are not published in
full. Takes about half a minute.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from evals.sae_study_tables import cell
from steer.errors import SteerError
from steer.files import replace_file
from steer.sae import SAE, SAEConfig
from steer.sae.cache import HeldActivations
from steer.sae.schedule import TrainConfig
from steer.sae.trainer import SAETrainer

WIDTH, K = 128, 8
# By name: what differs from a TopK SAE of WIDTH features. All features active is an autoencoder with ReLU.
SAES: dict[str, dict[str, Any]] = {
    "dense autoencoder": {"k": WIDTH},
    "TopK": {},
    "KronSAE h=2 m=4 n=16": {"encoder": "kron", "m": 4, "n": 16},
    "KronSAE h=8 m=4 n=4": {"encoder": "kron", "m": 4, "n": 4},
    "KronSAE h=16 m=2 n=4": {"encoder": "kron", "m": 2, "n": 4},
}
BLOCKS = (2, 4, 8, 16)


def covariance(blocks: int, seed: int, width: int = WIDTH) -> Tensor:
    """(width, width): `blocks` blocks of random sizes, each with one correlation between 0.3 and 0.9."""
    generator = torch.Generator().manual_seed(seed)
    cuts = (torch.randperm(width - 1, generator=generator)[: blocks - 1] + 1).sort().values.tolist()
    found = torch.eye(width, dtype=torch.float64)
    for start, end in zip([0, *cuts], [*cuts, width], strict=True):
        correlation = 0.3 + 0.6 * torch.rand((), generator=generator).item()
        found[start:end, start:end] = correlation
    return found.fill_diagonal_(1.0)


def sample(s: Tensor, count: int, seed: int) -> Tensor:
    """(count, width) in float32, normal with covariance `s`."""
    normal = torch.randn(count, len(s), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (normal @ torch.linalg.cholesky(s).T).float()


def matched(table: Tensor) -> Tensor:
    """Rows (features, width) in the order of the coordinates that they are matched to, the match positive."""
    rows, columns = linear_sum_assignment(table.abs().numpy(), maximize=True)
    order = torch.empty(len(columns), dtype=torch.long)
    order[torch.from_numpy(columns)] = torch.from_numpy(rows)
    ordered = table[order]
    return ordered * ordered.diagonal().sign()[:, None]


def rv(a: Tensor, b: Tensor) -> float:
    """The RV coefficient of two symmetric matrices (Robert and Escoufier 1976)."""
    return ((a * b).sum() / (a.norm() * b.norm())).item()


def recovered(s: Tensor, table: Tensor) -> float:
    """The RV coefficient of the covariance `s` and the products of the matched rows of a decoder."""
    rows = matched(table.double())
    return rv(s, rows @ rows.T)


def one(s: Tensor, seed: int, steps: int, batch: int) -> dict[str, Any]:
    """
    The RV coefficients of all autoencoders on one covariance, before and after training, and the controls.
    """
    x = sample(s, steps * batch, seed)
    configs = {name: SAEConfig(WIDTH, WIDTH, **{"k": K, **changes}) for name, changes in SAES.items()}
    training = TrainConfig(tokens=steps * batch, batch_size=batch, lr=3e-3, seed=seed, dead_after=20 * batch)
    trained = SAETrainer(configs, HeldActivations(x, {}, seed=seed), training).train()
    drawn = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(seed + 1))
    unseen = sample(s, 2000, seed + 2)
    found: dict[str, Any] = {"controls": {"identity": rv(s, torch.eye(len(s), dtype=s.dtype))}}
    found["controls"]["random rows"] = recovered(s, drawn / drawn.norm(dim=1, keepdim=True))
    for name, sae in trained.items():
        before = SAE(configs[name], seed=seed)
        with torch.no_grad():
            left = (unseen - sae(unseen)).square().sum() / (unseen - unseen.mean(0)).square().sum()
        found[name] = {
            "untrained": recovered(s, before.W_dec.detach()),
            "trained": recovered(s, sae.W_dec.detach()),
            "explained": 1 - left.item(),
        }
    return found


def markdown(found: dict[str, Any]) -> str:
    """Means and 95 % intervals over the covariances."""
    parts = found["covariances"]
    controls = {name: cell([part["controls"][name] for part in parts], 3) for name in parts[0]["controls"]}
    lines = [
        f"{len(parts)} covariances of {WIDTH} coordinates in {', '.join(map(str, BLOCKS))} blocks; {WIDTH} "
        f"features, {K} active, {found['steps']} steps of {found['batch']}. Mean and 95 % interval of the RV "
        "coefficient (Student's t). "
        f"Controls: identity {controls['identity']}, random rows {controls['random rows']}.",
        "",
        "| decoder | before training | after training | gained | more than TopK | more than the identity | "
        "explained variance |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in SAES:
        rows = [part[name] for part in parts]
        gained: list[float | None] = [row["trained"] - row["untrained"] for row in rows]
        ahead: list[float | None] = [part[name]["trained"] - part["TopK"]["trained"] for part in parts]
        shown: list[float | None] = [part[name]["trained"] - part["controls"]["identity"] for part in parts]
        cells = [cell([row[key] for row in rows], 3) for key in ("untrained", "trained")]
        lines.append(
            f"| {name} | {cells[0]} | {cells[1]} | {cell(gained, 3, '+')} | "
            f"{'' if name == 'TopK' else cell(ahead, 3, '+')} | {cell(shown, 3, '+')} | "
            f"{cell([row['explained'] for row in rows], 3)} |"
        )
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run with these command-line arguments."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument(
        "--seeds", type=int, default=2, help="covariances of each number of blocks (default: 2)"
    )
    made.add_argument("--steps", type=int, default=300, help="of training (default: %(default)s)")
    made.add_argument("--batch", type=int, default=512, help="activations of a step (default: %(default)s)")
    made.add_argument("--out", default="evals/results/sae", help="folder (default: %(default)s)")
    args = made.parse_args(arguments)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    parts = []
    for blocks in BLOCKS:
        for seed in range(args.seeds):
            parts.append(one(covariance(blocks, seed), seed, args.steps, args.batch) | {"blocks": blocks})
    found = {"steps": args.steps, "batch": args.batch, "covariances": parts}
    replace_file(out / "covariance.json", (json.dumps(found, indent=1) + "\n").encode())
    replace_file(out / "covariance.md", markdown(found).encode())
    print(markdown(found))


if __name__ == "__main__":
    try:
        main()
    except SteerError as error:
        sys.exit(f"error: {error}")
