"""
The change of the last residual stream as a sum: the vectors themselves, and what each layer's attention and
MLP write differently because of them. The sum is exact for any residual network; it is checked, not assumed.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from steer.errors import SteerError
from steer.lens.lanes import BASE, Lane
from steer.lens.passes import run
from steer.lens.results import Result
from steer.lens.subject import Row, Subject, chunks
from steer.sites import find_sites


@dataclass
class Decomposition(Result):
    """
    Shares of the change of the last stream, averaged over tokens: each part's projection on the whole change,
    divided by its length squared, so that all parts sum to 1. `vectors`, `attention`, `mlp` (depth,). `norms`
    are the parts' mean lengths in units of the whole change's. `error`: largest distance of a token's sum of
    parts from its change, in units of the change.
    """

    layers: list[int]
    vectors: torch.Tensor
    attention: torch.Tensor
    mlp: torch.Tensor
    norms: dict[str, torch.Tensor]
    error: float
    tokens: int

    @property
    def totals(self) -> dict[str, float]:
        return {name: getattr(self, name).sum().item() for name in ("vectors", "attention", "mlp")}

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "totals": self.totals}

    def figure(self) -> Any:
        """Stacked bars over the layers."""
        from steer.lens import plots

        parts = {"the vector": self.vectors, "attention": self.attention, "MLP": self.mlp}
        return plots.stacked_bars(
            parts,
            xlabel="layer",
            ylabel="share of the last stream's change",
            title="Who writes the change of the last residual stream",
        )


@torch.no_grad()
def decompose(
    subject: Subject, rows: Sequence[Row], *, layers: Collection[int] | None = None, label: str | None = None
) -> Decomposition:
    """
    Split the change that the vectors of `layers` (all by default) make after the last layer, at the tokens
    that predict the completion (of a prompt alone: its last token). For constant and shared vectors at
    `resid_post`.
    """
    config = subject.vectors.config
    if config.kind == "adaptive" or config.site != "resid_post":
        what = config.kind if config.kind == "adaptive" else config.site
        raise SteerError(f"the decomposition takes vectors at site resid_post, these are {what}")
    lanes = [BASE, Lane(frozenset(subject.layers if layers is None else layers))]
    depth, last = subject.decoder.depth, subject.decoder.depth - 1
    writers = residual_writers(subject)
    shares, norms = ({kind: torch.zeros(depth, dtype=torch.float64) for kind in writers} for _ in range(2))
    whole = total = at = torch.empty(
        0
    )  # this batch's change, (tokens, width), the sum of its parts, and where
    error, tokens = 0.0, 0

    def change(made: torch.Tensor) -> torch.Tensor:
        rows_, columns = at.to(made.device)
        blocks = made.unflatten(0, (2, -1))
        return (blocks[1] - blocks[0])[rows_, columns].double().cpu()

    def finish(layer: int, stream: torch.Tensor) -> None:
        nonlocal whole
        whole = change(stream)

    def note(kind: str, layer: int, module: nn.Module, args: tuple, output: Any) -> None:
        nonlocal total
        made = output[0] if isinstance(output, tuple) else output
        part = change(made - args[0] if kind == "vectors" else made)
        total = total + part
        square = whole.square().sum(-1).clamp(min=1e-30)
        shares[kind][layer] += ((part * whole).sum(-1) / square).sum()
        norms[kind][layer] += (part.norm(dim=-1) / square.sqrt()).sum()

    for _, batch in tqdm(list(chunks(rows, subject.batch_size // 2)), desc=label, disable=label is None):
        padded = subject.padded(batch)
        starts = padded.start.tolist()
        at = torch.tensor([(i, starts[i] + n) for i, row in enumerate(batch) for n in row.predicting]).T
        end = torch.tensor([padded.ids.shape[1] - 1], device=subject.device)
        # Twice: first the whole change, then its parts, of which only sums are kept.
        run(subject, padded, batch, lanes, end, finish, [last])
        total = torch.zeros_like(whole)
        handles = [
            module.register_forward_hook(partial(note, kind, layer))
            for kind, modules in writers.items()
            for layer, module in modules.items()
        ]
        try:
            run(subject, padded, batch, lanes, end)
        finally:
            for handle in handles:
                handle.remove()
        off = (total - whole).norm(dim=-1) / whole.norm(dim=-1).clamp(min=1e-15)
        error, tokens = max(error, off.max().item()), tokens + len(whole)
    return Decomposition(
        sorted(lanes[1].layers),
        shares["vectors"] / tokens,
        shares["attention"] / tokens,
        shares["mlp"] / tokens,
        {kind: value / tokens for kind, value in norms.items()},
        error,
        tokens,
    )


def residual_writers(subject: Subject) -> dict[str, dict[int, nn.Module]]:
    """
    By kind (vectors, attention, mlp) and layer: the modules whose outputs, added to the embeddings, make the
    last stream. Found by watching three tokens pass the first block, so norms after a sub-layer (Gemma,
    OLMo2) are counted in; SteerError for a block that adds anything else.
    """
    decoder = subject.decoder
    block, layers = decoder.layers[0], range(decoder.depth)
    made: dict[str, torch.Tensor] = {}
    ends: dict[str, torch.Tensor] = {}

    def first(output: Any) -> torch.Tensor:
        return output[0] if isinstance(output, tuple) else output

    def enter(module: nn.Module, args: tuple, kwargs: dict) -> None:
        ends["in"] = args[0] if args else kwargs["hidden_states"]

    def leave(module: nn.Module, args: tuple, output: Any) -> None:
        ends["out"] = first(output)

    def watched(name: str, module: nn.Module, args: tuple, output: Any) -> None:
        made[name] = first(output)

    handles = [block.register_forward_pre_hook(enter, with_kwargs=True), block.register_forward_hook(leave)]
    named = [(name, child) for name, child in block.named_children() if name != "steering"]
    handles += [child.register_forward_hook(partial(watched, name)) for name, child in named]
    try:
        with subject.vectors.disabled():
            decoder.trunk(
                torch.tensor([[1, 2, 3]], device=subject.device), use_cache=False
            )  # 0 is often padding
    finally:
        for handle in handles:
            handle.remove()
    try:
        (attention,) = find_sites(decoder, [0], "resid_mid")
    except SteerError:  # attention and MLP in parallel
        (attention,) = find_sites(decoder, [0], "attn_out")
    names = {module: name for name, module in named}
    rest = ends["out"] - ends["in"] - made[names[attention.module]]
    others = {name: value for name, value in made.items() if value.shape == rest.shape}
    mlp = min(others, key=lambda name: (others[name] - rest).norm().item())
    if (others[mlp] - rest).norm() > 0.05 * rest.norm():
        raise SteerError(
            f"{type(block).__name__} adds more to the stream than its attention and its MLP: its change "
            "cannot be split in these two"
        )
    return {
        "vectors": {layer: decoder.layers[layer].get_submodule("steering") for layer in subject.layers},
        "attention": {i: decoder.layers[i].get_submodule(names[attention.module]) for i in layers},
        "mlp": {i: decoder.layers[i].get_submodule(mlp) for i in layers},
    }
