"""
The change of the last residual stream as a sum: the vectors themselves, and what each layer's attention and
MLP write differently because of them. The sum is exact for any residual network; it is checked, not assumed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from tqdm.auto import tqdm

from steer.errors import SteerError
from steer.hooks import hidden_in, hidden_out, hooked
from steer.lens.conditions import BASE, Condition
from steer.lens.passes import run
from steer.lens.results import Result, plain
from steer.lens.subject import Row, Subject, chunks
from steer.sites import find_sites

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass
class Decomposition(Result):
    """
    Shares of the change of the last stream, averaged over tokens: each part's projection on the whole change,
    divided by its length squared, so that all parts sum to 1. `vectors`, `attention`, `mlp`
    (num_hidden_layers,). `norms` are the parts' mean lengths in units of the whole change's. `error`: largest
    distance of a token's sum of parts from its change, in units of the change.
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
        return {**super().to_dict(), "totals": plain(self.totals)}

    def figure(self) -> Figure:
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
def decompose(subject: Subject, rows: Sequence[Row], *, label: str | None = None) -> Decomposition:
    """
    Split the change that all vectors together make after the last layer, at the tokens that predict the
    completion (of a prompt alone: its last token). For constant and shared vectors at `resid_post`.
    SteerError where the parts do not sum to the change in float32, to 1 % at every token.
    """
    config = subject.vectors.config
    if config.kind == "adaptive" or config.site != "resid_post":
        what = config.kind if config.kind == "adaptive" else config.site
        raise SteerError(f"the decomposition takes vectors at site resid_post, these are {what}")
    conditions = [BASE, Condition(frozenset(subject.layers))]
    num_hidden_layers, last = subject.decoder.num_hidden_layers, subject.decoder.num_hidden_layers - 1
    writers = residual_writers(subject)
    shares, norms = (
        {kind: torch.zeros(num_hidden_layers, dtype=torch.float64) for kind in writers} for _ in range(2)
    )
    whole = total = at = torch.empty(
        0
    )  # this batch's change, (tokens, hidden_size), the sum of its parts, and where
    error, tokens = 0.0, 0

    def change(made: torch.Tensor) -> torch.Tensor:
        rows_, columns = at.to(made.device)
        blocks = made.unflatten(0, (2, -1))
        return (blocks[1] - blocks[0])[rows_, columns].cpu().double()

    def finish(layer: int, stream: torch.Tensor) -> None:
        nonlocal whole
        whole = change(stream)

    def note(kind: str, layer: int, module: nn.Module, args: tuple, output: Any) -> None:
        nonlocal total
        made = hidden_out(output)
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
        run(subject, padded, batch, conditions, end, finish, [last])
        total = torch.zeros_like(whole)
        handles = [
            module.register_forward_hook(partial(note, kind, layer))
            for kind, modules in writers.items()
            for layer, module in modules.items()
        ]
        with hooked(*handles):
            run(subject, padded, batch, conditions, end)
        off = (total - whole).norm(dim=-1) / whole.norm(dim=-1).clamp(min=1e-15)
        error, tokens = max(error, off.max().item()), tokens + len(whole)
    if error > 0.01 and subject.model.dtype == torch.float32:  # half precision rounds small changes away
        raise SteerError(
            f"the change of the last stream in {type(subject.model).__name__} is not the sum of its vectors, "
            f"attention and MLP: they miss it by {error:.2g} of its length, expected 0"
        )
    return Decomposition(
        sorted(conditions[1].layers),
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
    block, layers = decoder.layers[0], range(decoder.num_hidden_layers)
    made: dict[str, torch.Tensor] = {}
    ends: dict[str, torch.Tensor] = {}

    def enter(module: nn.Module, args: tuple, kwargs: dict) -> None:
        ends["in"] = hidden_in(args, kwargs)

    def leave(module: nn.Module, args: tuple, output: Any) -> None:
        ends["out"] = hidden_out(output)

    def watched(name: str, module: nn.Module, args: tuple, output: Any) -> None:
        made[name] = hidden_out(output)

    handles = [block.register_forward_pre_hook(enter, with_kwargs=True), block.register_forward_hook(leave)]
    named = [(name, child) for name, child in block.named_children() if name != "steering"]
    handles += [child.register_forward_hook(partial(watched, name)) for name, child in named]
    with hooked(*handles), subject.vectors.disabled():
        ids = torch.tensor([[1, 2, 3]], device=subject.device)  # 0 is often padding
        decoder.backbone(ids, use_cache=False)
    with subject.vectors.disabled():
        try:
            attention = find_sites(decoder, list(layers), "resid_mid")
        except SteerError:  # attention and MLP in parallel
            attention = find_sites(decoder, list(layers), "attn_out")
    names = {module: name for name, module in named}
    written = made.get(names.get(attention[0].module, ""))
    if written is None:
        raise SteerError(
            f"{type(block).__name__} does not call its attention as one module: no split is defined"
        )
    rest = ends["out"] - ends["in"] - written
    others = {name: value for name, value in made.items() if getattr(value, "shape", None) == rest.shape}
    mlp = min(others, key=lambda name: (others[name] - rest).norm().item())
    if (others[mlp] - rest).norm() > 0.05 * rest.norm():
        raise SteerError(
            f"{type(block).__name__} adds more to the stream than its attention and its MLP: its change "
            "cannot be split in these two"
        )
    return {
        "vectors": {layer: decoder.layers[layer].get_submodule("steering") for layer in subject.layers},
        "attention": {i: site.module for i, site in zip(layers, attention, strict=True)},
        "mlp": {i: decoder.layers[i].get_submodule(mlp) for i in layers},
    }
