"""What the SAE tables measure: stored activations, and one SAE's quality on held-out texts."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from steer.errors import SteerError
from steer.sae import SAE
from steer.sae.activations import ActivationStream, Reader, Window, windows
from steer.sae.cache import CachedActivations, HeldActivations, write_cache
from steer.sae.config import encoder_parameters, forward_flops
from steer.sae.evaluate import LossRecovered, loss_recovered, nearest_cosines, quality
from steer.sae.heads import head_correlation
from steer.sae.letters import absorption, first_letters
from steer.sae.texts import Texts

# Windows of the training texts whose words train and test the letter probe.
LETTER_WINDOWS = 120
# Batches of held-out activations for the correlation of features.
CORRELATED = 16


def stored(
    reader: Reader, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], folder: Path, limit: int
) -> CachedActivations:
    """At most `limit` activations of `texts`, from the folder or written there now."""
    stream = ActivationStream(reader, Texts(texts), tokenizer, block=1 << 15)
    with tqdm(total=limit, unit=" activations", desc=f"storing {folder.name}") as bar:
        return write_cache(stream, folder, limit, lambda done: bar.update(done - bar.n))


class Measure:
    """
    Measures SAEs of one layer: `heldout` activations for the explained variance, `count` windows of the
    `unseen` texts for the loss recovered, words of `texts` for the absorption.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        reader: Reader,
        texts: Sequence[str],
        unseen: Sequence[str],
        heldout: HeldActivations,
        count: int,
        batch: int,
    ):
        self.model, self.reader, self.heldout, self.batch = model, reader, heldout, batch
        known = [window for window in windows(Texts(unseen), tokenizer) if len(window.ids) > 32]
        self.spliced: list[Window] = known[:: max(1, len(known) // count)][:count]
        self.words = first_letters(
            reader, tokenizer, list(islice(windows(Texts(texts), tokenizer), LETTER_WINDOWS))
        )
        self.unchanged: LossRecovered | None = None

    def __call__(self, sae: SAE, l0: Sequence[int]) -> dict[str, Any]:
        """
        All measurements of `sae`, at each of `l0` active features where it is a TopK, else at its own.

        Absorption is None where the texts have too few words.
        """
        counts = list(l0) if sae.cfg.activation == "topk" else []
        measured = quality(sae, self.heldout.in_order(self.batch), counts)
        recovered: dict[int, LossRecovered] = {}
        for n in counts or [sae.cfg.k]:
            k = n if counts else None
            found = loss_recovered(
                sae, self.model, self.spliced, self.reader.layer, self.reader.site, k, self.unchanged
            )
            recovered[n] = self.unchanged = found
        row: dict[str, Any] = {
            "config": {**sae.cfg.to_dict(), "source": None},
            "encoder_parameters": encoder_parameters(sae.cfg),
            "forward_flops": forward_flops(sae.cfg),
            **measured.to_dict(),
            "loss_recovered": {n: found.recovered for n, found in recovered.items()},
            "cross_entropy": {n: found.spliced for n, found in recovered.items()},
            "clean_cross_entropy": next(iter(recovered.values())).clean,
            "nearest_cosine": nearest_cosines(sae.W_dec).mean().item(),
        }
        return {**row, **self._absorption(sae), **self._heads(sae)}

    def _heads(self, sae: SAE) -> dict[str, Any]:
        """Of a KronSAE the correlation of features within heads and between them, on held-out activations."""
        if sae.cfg.encoder != "kron":
            return {}
        try:
            found = head_correlation(sae, lambda: islice(self.heldout.batches(self.batch), CORRELATED))
        except SteerError:  # too few features fire
            return {"head_correlation": None}
        return {"head_correlation": found.to_dict()}

    def _absorption(self, sae: SAE) -> dict[str, float | None]:
        try:
            found = absorption(sae, self.words)
        except SteerError:  # no letter has enough words
            return dict.fromkeys(("absorption", "letter_f1", "letter_probe_accuracy", "letter_probe_f1"))
        return {
            "absorption": found.rate,
            "letter_f1": found.f1,
            "letter_probe_accuracy": found.probe_accuracy,
            "letter_probe_f1": found.probe_f1,
        }
