"""
The Jacobian lens: what a vector in layer l does, on average and to first order, to the last layer's residual
stream, and through the unembedding to the logits.

    J_l = 1/N * sum over texts, and over kept positions t <= t', of  d h_L[t'] / d h_l[t]
    reading of v:  W_U (g * J_l v)

h_l is the stream at a site of layer l, h_L the stream after the last layer, g the gain of the final norm, N
the number of kept positions. It is the estimator of Gurnee et al., "Verbalizable Representations Form a
Global Workspace in Language Models" (2026, github.com/anthropics/jacobian-lens): for each position t the sum
over the positions t' that it reaches, averaged over t. For a steering vector this is also the first-order
mean change of h_L, since it is added at every position: J_l is the derivative of the mean of h_L with respect
to a vector that is added to h_l at all kept positions, and is computed as that. With J_l = I it is the logit
lens.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from steer.config import SITES, SteeringConfig
from steer.errors import SteerError, one_line
from steer.files import json_object, replace_file, safetensors_header, with_metadata
from steer.hooks import Site, hook, hooked, one_stream, watch
from steer.identity import describe, has_other_weights
from steer.models import context_length
from steer.sae.activations import Window, windows
from steer.sites import find_decoder, find_sites, input_device

FORMAT = "steer jacobian lens 1"


@dataclass(frozen=True)
class JacobianLens:
    """
    A fitted lens.

    Args:
        jacobians: by layer, (hidden_size, hidden_size): row i, column j is the mean of d h_L[i] / d h_l[j].
        base: the model it was fitted on, as `steer.identity.describe` gives it.
        site: a key of `steer.config.SITES`: where h_l is.
        sample: 16 hex digits of the token ids and the kept positions of all texts.
        texts: texts that are in the mean so far.
        of: texts of the sample.
        tokens: kept positions that are in the mean so far.
        dtype: of the model that it was fitted on, such as "float32"; None in files that do not say.
    """

    jacobians: dict[int, Tensor]
    base: dict[str, Any]
    site: str
    sample: str
    texts: int
    of: int
    tokens: int
    dtype: str | None = None

    @property
    def layers(self) -> list[int]:
        """The fitted layers, ascending."""
        return sorted(self.jacobians)

    def transport(self, vectors: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """J_l v for `vectors` v, (hidden_size,) by layer; SteerError for a layer that is not fitted."""
        if missing := sorted(vectors.keys() - self.jacobians.keys()):
            raise SteerError(
                f"the Jacobian lens is fitted for layers {_listed(self.layers)}, the vectors are in layers "
                f"{_listed(missing)} too; fit those with `steer lens jacobian --layers`"
            )
        found = {}
        for layer, vector in vectors.items():
            jacobian = self.jacobians[layer]
            found[layer] = jacobian @ vector.detach().to(jacobian.device, jacobian.dtype)
        return found

    def check(self, model: PreTrainedModel, config: SteeringConfig) -> None:
        """
        Raise SteerError unless vectors of `config` in `model` can be read with this lens: it must be fitted
        on this model, at their site; adaptive vectors have no amount that all positions share.
        """
        own = describe(model)
        sizes = "hidden_size", "num_hidden_layers"
        if any(own[name] != self.base[name] for name in sizes) or has_other_weights(
            model, self.base["base_checksum"]
        ):
            raise SteerError(
                f"the Jacobian lens was fitted on {self.base['base_model_name_or_path']!r}, and the model is "
                f"{own['base_model_name_or_path']!r}, with other weights; fit one on this model"
            )
        if config.kind == "adaptive":
            raise SteerError(
                "the Jacobian lens reads vectors that every token gets the same amount of; adaptive vectors "
                "give each token another: read them without it"
            )
        if config.site != self.site:
            raise SteerError(
                f"the Jacobian lens was fitted at {self.site}, the vectors are at {config.site}; fit one "
                f"with `steer lens jacobian --site {config.site}`"
            )

    def told(self) -> str:
        """In one line, what it was fitted on."""
        of = "" if self.texts == self.of else f" of {self.of}"
        name = self.base["base_model_name_or_path"]
        return (
            f"Jacobian lens of {name}, {self.site}, fitted on {self.tokens} tokens of {self.texts}{of} texts"
        )

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write one .safetensors file, whole or not at all; SteerError when it cannot be written."""
        described = {
            **{"format": FORMAT, "base": self.base, "site": self.site, "sample": self.sample},
            **{"texts": self.texts, "of": self.of, "tokens": self.tokens, "dtype": self.dtype},
        }
        tensors = {f"layer.{layer}": value.cpu().contiguous() for layer, value in self.jacobians.items()}
        target = Path(path)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            replace_file(target, with_metadata(save(tensors), {"jacobian_lens": json.dumps(described)}))
        except OSError as error:
            raise SteerError(f"cannot save the Jacobian lens to {target}: {error.strerror}") from error
        return target

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> JacobianLens:
        """The lens in a file of `save`; SteerError for any other file, and for a damaged one."""
        try:
            content = Path(path).read_bytes()
            tensors = load(content)
            found = safetensors_header(content, path).get("__metadata__", {}).get("jacobian_lens")
        except Exception as error:  # safetensors raises kinds of its own
            raise SteerError(
                f"cannot read a Jacobian lens from {str(path)!r}: {one_line(error)}; give a file that "
                "`steer lens jacobian` wrote"
            ) from error
        described = json_object(found, path) if found else {}
        if described.pop("format", None) != FORMAT:
            raise SteerError(f"{path} holds no Jacobian lens; give a file that `steer lens jacobian` wrote")
        try:
            jacobians = {int(name.removeprefix("layer.")): value for name, value in tensors.items()}
            lens = cls(jacobians, **described)
            shape = (lens.base["hidden_size"],) * 2
        except (KeyError, TypeError, ValueError) as error:
            raise SteerError(f"{path} is damaged ({one_line(error)}); fit the lens again") from error
        bad = [n for n, value in jacobians.items() if value.shape != shape or not value.isfinite().all()]
        if bad:
            raise SteerError(
                f"{path}: layers {_listed(bad)} have no finite matrix of shape {shape}; fit the lens again"
            )
        return lens


def sample_windows(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, count: int = 32, length: int = 32, skip: int = 1
) -> list[Window]:
    """
    The beginnings of the first `count` texts, at most `length` tokens each, of which the first `skip` and the
    special tokens are not kept. SteerError when there are fewer texts.
    """
    found: list[Window] = []
    for text in texts:
        if len(found) == count:
            break
        first = next(windows([text], tokenizer, length, skip), None)
        if first is not None:
            found.append(first)
    if len(found) < count:
        raise SteerError(
            f"{len(found)} texts have a token to read, {count} were asked for; give more texts, or a lower "
            "number"
        )
    return found


def fit(
    model: PreTrainedModel,
    sample: Sequence[Window],
    layers: Sequence[int],
    *,
    site: str = "resid_post",
    batch_size: int = 8,
    start: JacobianLens | None = None,
    label: str | None = None,
) -> Iterator[JacobianLens]:
    """
    Fit a lens on `sample`, the vectors that are attached to `model` off; the lens so far is given after each
    batch of texts, the last one is the whole. One backward pass for each number of the hidden size and each
    batch goes down to the earliest layer: more layers above that one cost nothing.

    Args:
        layers: indices of the layers, from 0.
        site: a key of `steer.config.SITES`.
        batch_size: texts in a pass. It changes no result beyond rounding.
        start: a lens that was fitted on the first texts of the same sample, to go on with.
        label: of the progress bar; None for none.

    Raises:
        SteerError: an unknown site, no text, one longer than the model's context, a `start` of something
            else, a model with several residual streams, and derivatives that are not finite.
    """
    if site not in SITES:
        raise SteerError(f"site={site!r} is unknown; choose one of {', '.join(SITES)}")
    longest, context = max((len(window.ids) for window in sample), default=0), context_length(model.config)
    if not longest or (context and longest > context):
        raise SteerError(
            f"the longest text has {longest} tokens, the model reads 1 to {context}; give other texts or "
            "another --length"
        )
    layers = sorted(layers)
    dtype = str(model.dtype).removeprefix("torch.")
    empty = JacobianLens({}, describe(model), site, checksum(sample), 0, len(sample), 0, dtype)
    lens = empty
    if start is not None:
        fixed = "base", "site", "sample", "dtype"
        unlike = [name for name in fixed if getattr(start, name) != getattr(empty, name)]
        if unlike or start.layers != layers:
            raise SteerError(
                f"the lens to go on with has another {unlike[0] if unlike else 'set of layers'}; give the "
                "settings that it was fitted with, another --out, or --force to fit it anew"
            )
        lens = start
    size = find_decoder(model).hidden_size
    with tqdm(
        total=(len(sample) - lens.texts) * size, desc=label, unit="row", leave=False, disable=label is None
    ) as bar:
        while lens.texts < len(sample):
            batch = sample[lens.texts : lens.texts + batch_size]
            sums, tokens = _sums(model, batch, layers, site, bar)
            total = lens.tokens + tokens
            if lens.tokens:
                sums += torch.stack([lens.jacobians[layer].to(sums) * lens.tokens for layer in layers])
            means = dict(zip(layers, sums / total, strict=True))
            lens = replace(lens, jacobians=means, texts=lens.texts + len(batch), tokens=total)
            yield lens


def checksum(sample: Sequence[Window]) -> str:
    """16 hex digits of the token ids and kept positions of a sample."""
    return hashlib.sha256(json.dumps([list(window) for window in sample]).encode()).hexdigest()[:16]


def _sums(
    model: PreTrainedModel, batch: Sequence[Window], layers: Sequence[int], site: str, bar: tqdm
) -> tuple[Tensor, int]:
    """The sums of derivatives over kept positions, (layers, hidden_size, hidden_size), and their number."""
    decoder, device = find_decoder(model), input_device(model)
    width = max(len(window.ids) for window in batch)
    ids = torch.zeros(len(batch), width, dtype=torch.long)  # padded on the right, where no token sees it
    mask, keep = torch.zeros_like(ids), torch.zeros(len(batch), width, dtype=torch.bool)
    for row, window in enumerate(batch):
        ids[row, : len(window.ids)], mask[row, : len(window.ids)] = torch.tensor(window.ids), 1
        keep[row, : len(window.ids)] = torch.tensor(window.keep)
    wide = torch.promote_types(model.dtype, torch.float32)
    # A zero that is added at every kept position of a layer: its gradient is the sum over positions.
    zeros = torch.zeros(decoder.hidden_size, dtype=wide, device=device)
    added = [zeros.clone().requires_grad_() for _ in layers]
    last: list[Tensor] = []
    vectors = model.__dict__.get("steering_vectors")
    was_training = model.training
    model.eval()
    try:
        with hooked() as handles, torch.enable_grad(), vectors.disabled() if vectors else nullcontext():
            for vector, place in zip(added, find_sites(decoder, list(layers), site), strict=True):
                handles.append(hook(partial(_add, vector, keep, place.module), place, first=False))
            handles.append(watch(last.append, Site(decoder.layers[-1]), decoder.hidden_size))
            decoder.backbone(ids.to(device), attention_mask=mask.to(device), use_cache=False)
            total = last[0][keep.to(last[0].device)].sum(0)  # (hidden_size,)
            sums = torch.zeros(len(layers), decoder.hidden_size, decoder.hidden_size, dtype=wide)
            for index in range(decoder.hidden_size):
                rows = torch.autograd.grad(total[index], added, retain_graph=True)
                sums[:, index] = torch.stack(rows).cpu()
                bar.update(len(batch))
    finally:
        model.train(was_training)
    if not sums.isfinite().all():
        raise SteerError("the model's derivatives are not finite; load it in float32 or bfloat16")
    return sums, int(keep.sum())


def _add(vector: Tensor, keep: Tensor, module: torch.nn.Module, hidden: Tensor) -> Tensor:
    one_stream(hidden, module, len(vector))
    kept = keep.to(hidden.device, hidden.dtype)[..., None]
    return hidden + kept * vector.to(hidden.device, hidden.dtype)


def _listed(layers: Sequence[int]) -> str:
    return ", ".join(map(str, layers))
