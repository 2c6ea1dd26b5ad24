"""
The logit lens of vectors: unembedding times vector, the tokens that a vector promotes or suppresses by itself
when nothing is between it and the output ("Small Vectors, Big Effects", arXiv 2509.06608, the last
layer).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from steer.errors import SteerError
from steer.final_norm import through_final_norm
from steer.lens.results import Result
from steer.lens.subject import token_text
from steer.sites import find_decoder

if TYPE_CHECKING:
    from matplotlib.figure import Figure

READINGS = {"dot": "unembedding times vector", "cosine": "its cosine with each row of the unembedding"}
ROWS = 1 << 14  # vocabulary rows that are held in float32 at once


@dataclass
class LogitLens(Result):
    """
    `scores` (layers, vocabulary): what each vector adds to each token's logit, or its cosine with the token's
    row. `top` and `bottom` (layers, k) are the ids with the largest and the smallest scores, first the
    extreme. `jacobian` says which Jacobian lens the vectors were read through, None for the plain logit lens.
    """

    layers: list[int]
    reading: str
    final_norm: bool
    scores: torch.Tensor
    top: torch.Tensor
    bottom: torch.Tensor
    top_tokens: list[list[str]]
    bottom_tokens: list[list[str]]
    jacobian: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Without the scores of the whole vocabulary: those of the top and bottom tokens."""
        rows = [
            {
                "layer": layer,
                "top": _named(self.top_tokens[i], self.top[i], self.scores[i]),
                "bottom": _named(self.bottom_tokens[i], self.bottom[i], self.scores[i]),
                "mean": self.scores[i].mean().item(),
                "std": self.scores[i].std().item(),
            }
            for i, layer in enumerate(self.layers)
        ]
        return {
            **{"reading": self.reading, "final_norm": self.final_norm, "jacobian": self.jacobian},
            "layers": rows,
        }

    def figure(self) -> Figure:
        """
        Heatmap: the four most promoted and the four most suppressed tokens of each layer, coloured by their
        score in standard deviations.
        """
        from steer.lens import plots

        shown = min(4, self.top.shape[1])
        ids = torch.cat([self.top[:, :shown], self.bottom[:, :shown].flip(1)], 1)
        deviation = self.scores.std(1, keepdim=True).clamp(min=1e-12)
        values = (self.scores.gather(1, ids) - self.scores.mean(1, keepdim=True)) / deviation
        sides = zip(self.top_tokens, self.bottom_tokens, strict=True)
        lens = "Jacobian" if self.jacobian else "Logit"
        return plots.token_heatmap(
            values,
            [[*top[:shown], *bottom[:shown][::-1]] for top, bottom in sides],
            rows=[str(layer) for layer in self.layers],
            ylabel="layer",
            xlabel="most promoted, first to fourth    |    fourth to first, most suppressed",
            title=f"{lens} lens ({self.reading}{', final norm' if self.final_norm else ''})",
            colour="standard deviations from the mean",
        )


@torch.no_grad()
def logit_lens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    vectors: Mapping[int, torch.Tensor],
    *,
    reading: str = "dot",
    final_norm: bool = True,
    top: int = 50,
) -> LogitLens:
    """
    Read `vectors`, (hidden_size,) by layer, through the model's unembedding.

    reading: "dot" or "cosine". final_norm: multiply by the final norm's weights first (and centre, for a
    LayerNorm), as the model does; its division by the stream's length is left out, as a vector alone has
    none. Ids that the tokenizer does not know are never among the top tokens. Raises SteerError for an
    unknown reading, an empty or badly shaped `vectors`, and a model without an unembedding.
    """
    layers = sorted(vectors)
    scores = lens_scores(model, vectors, reading=reading, final_norm=final_norm)
    known = min(len(tokenizer), scores.shape[1])
    k = min(top, known)
    best, worst = scores[:, :known].topk(k).indices, (-scores[:, :known]).topk(k).indices
    up, down = ([[token_text(tokenizer, i) for i in row] for row in ids.tolist()] for ids in (best, worst))
    return LogitLens(layers, reading, final_norm, scores, best, worst, up, down)


@torch.no_grad()
def lens_scores(
    model: PreTrainedModel,
    vectors: Mapping[int, torch.Tensor],
    *,
    reading: str = "dot",
    final_norm: bool = True,
) -> torch.Tensor:
    """
    The scores of a `logit_lens`, without the tokens.

    Args:
        vectors: (hidden_size,) by layer.

    Returns:
        (layers, vocabulary) in float32 on the CPU, the layers in ascending order.

    Raises:
        SteerError: An unknown reading, an empty or badly shaped `vectors`, a model without an unembedding.
    """
    if reading not in READINGS:
        raise SteerError(f"reading={reading!r} is unknown; choose one of {', '.join(READINGS)}")
    head = model.get_output_embeddings()
    if head is None or not hasattr(head, "weight"):
        raise SteerError(f"{type(model).__name__} has no unembedding matrix to read vectors with")
    hidden_size = find_decoder(model).hidden_size
    if not vectors or any(vector.shape != (hidden_size,) for vector in vectors.values()):
        seen = ", ".join(sorted({str(tuple(vector.shape)) for vector in vectors.values()})) or "none"
        raise SteerError(f"the logit lens takes vectors of shape ({hidden_size},) by layer, got {seen}")
    stack = torch.stack([vectors[layer] for layer in sorted(vectors)]).to(head.weight.device, torch.float32)
    if final_norm:
        stack = through_final_norm(model, stack)
    parts = []
    for rows in head.weight.split(ROWS):
        rows = rows.float()
        if reading == "cosine":
            rows = nn.functional.normalize(rows, dim=1)
        parts.append(stack @ rows.T)
    scores = torch.cat(parts, 1).cpu()
    if reading == "cosine":
        scores = scores / stack.norm(dim=1, keepdim=True).clamp(min=1e-30).cpu()
    return scores


def _named(tokens: list[str], ids: torch.Tensor, scores: torch.Tensor) -> list[dict[str, Any]]:
    return [
        {"token": token, "id": index, "score": scores[index].item()}
        for token, index in zip(tokens, ids.tolist(), strict=True)
    ]
