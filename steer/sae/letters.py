"""
Absorption, after "A is for Absorption" (arXiv 2409.14507): does a feature for "starts with L" stay silent on
some words with L because a more special feature speaks for it?

A linear probe finds each first letter's direction in the activations. A letter's own features are those that
tell it best. A word is absorbed when the probe sees the letter, none of the letter's own features fires, and
some other feature, aligned with the probe, carries most of what the probe sees.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerBase

from steer.errors import SteerError
from steer.sae.activations import Reader, Window, read_all
from steer.sae.model import SAE

# A letter needs this many training and test words to count.
LEAST = 20
# Another of a letter's features is taken as its own while it raises F1 by this much.
GAIN = 0.03
# Least cosine with the probe, and share of what the probe sees, of a feature that absorbs.
ALIGNED, SHARE = 0.025, 0.4


@dataclass(frozen=True)
class Words:
    """Activations (count, width) at tokens that begin a word, and the word's first letter, 0 to 25."""

    rows: Tensor
    letters: Tensor
    tokens: Tensor


def first_letters(reader: Reader, tokenizer: PreTrainedTokenizerBase, windows: Sequence[Window]) -> Words:
    """The words of `windows`: kept tokens that are a space and letters."""
    letter_of: dict[int, int] = {}
    for window in windows:
        for token in window.ids:
            if token not in letter_of:
                text = str(tokenizer.decode([token]))
                word = text[1:].lower() if text[:1] == " " else ""
                plain = len(word) > 1 and word.isascii() and word.isalpha()
                letter_of[token] = string.ascii_lowercase.index(word[0]) if plain else -1
    kept = torch.tensor([t for w in windows for t, k in zip(w.ids, w.keep, strict=True) if k])
    letters = torch.tensor([letter_of[int(token)] for token in kept])
    chosen = letters >= 0
    return Words(read_all(reader, windows).cpu()[chosen], letters[chosen], kept[chosen])


@dataclass(frozen=True)
class Absorption:
    """
    `rate`: absorbed words per word that the probe sees, the mean over `letters`. `f1` of the letters' own
    features and `probe_f1` of the probe, means over the letters, on words that chose and trained neither.
    """

    rate: float
    probe_accuracy: float
    f1: float
    probe_f1: float
    letters: int
    words: int


def absorption(sae: SAE, words: Words, seed: int = 0) -> Absorption:
    """
    The absorption of an SAE. Half of the distinct tokens train the probe and choose the features, the other
    half is counted. SteerError when no letter has enough words.
    """
    generator = torch.Generator().manual_seed(seed)
    distinct = words.tokens.unique()
    training = distinct[torch.randperm(len(distinct), generator=generator)[: len(distinct) // 2]]
    train = torch.isin(words.tokens, training)
    counts = [torch.bincount(words.letters[part], minlength=26) for part in (train, ~train)]
    letters = ((counts[0] >= LEAST) & (counts[1] >= LEAST)).nonzero().squeeze(1).tolist()
    if not letters:
        raise SteerError(f"no first letter has {LEAST} words in both halves; read more text")
    mean = words.rows[train].mean(0)
    rows = (words.rows - mean) / words.rows[train].std()
    probe, bias = _probe(rows[train], words.letters[train])
    guess = (rows @ probe.T + bias).argmax(1)
    with torch.no_grad():
        features = torch.cat([sae.encode(part) for part in words.rows.to(sae.dtype).split(1024)])
    rates, scores, probe_scores, counted = [], [], [], 0
    test = ~train
    for letter in letters:
        own = _own_features(features[train], words.letters[train] == letter)
        right = words.letters[test] == letter
        scores.append(_f1((features[test][:, own] > 0).any(1), right))
        probe_scores.append(_f1(guess[test] == letter, right))
        direction = torch.nn.functional.normalize(probe[letter], dim=0).to(sae.dtype)
        seen = test & (words.letters == letter) & (guess == letter)
        if not seen.any():
            continue
        effect = features[seen] * (sae.W_dec @ direction)
        silent = (features[seen][:, own] == 0).all(1)
        effect[:, own] = 0
        effect[:, (sae.W_dec @ direction) < ALIGNED] = 0
        toward = (words.rows[seen].to(sae.dtype) - mean.to(sae.dtype)) @ direction
        absorbed = silent & (effect.amax(1) >= SHARE * toward.clamp(min=1e-6))
        rates.append(absorbed.float().mean().item())
        counted += int(seen.sum())
    return Absorption(
        sum(rates) / max(1, len(rates)),
        (guess[test] == words.letters[test]).float().mean().item(),
        sum(scores) / len(scores),
        sum(probe_scores) / len(probe_scores),
        len(letters),
        counted,
    )


def _probe(rows: Tensor, letters: Tensor, decay: float = 1e-3) -> tuple[Tensor, Tensor]:
    """Multinomial logistic regression: weights (26, width) and biases (26,)."""
    weight = torch.zeros(26, rows.shape[1], requires_grad=True)
    bias = torch.zeros(26, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=60, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = cross_entropy(rows @ weight.T + bias, letters) + decay * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return weight.detach(), bias.detach()


def _f1(told: Tensor, right: Tensor) -> float:
    """F1 of the words told, (words,) bool, against those that are right."""
    return (2 * (told & right).sum() / (told.sum() + right.sum())).item()


def _own_features(features: Tensor, positive: Tensor, most: int = 5) -> list[int]:
    """The features that tell the positive words: the best by F1, then more while F1 rises by `GAIN`."""
    fires = features > 0
    hits = fires[positive].sum(0).double()
    f1 = 2 * hits / (fires.sum(0) + positive.sum()).clamp(min=1)
    candidates = f1.topk(min(50, len(f1))).indices.tolist()
    own, best = [candidates[0]], f1[candidates[0]].item()
    union = fires[:, candidates[0]]
    while len(own) < most:
        gains = {}
        for candidate in candidates:
            joint = union | fires[:, candidate]
            hit = (joint & positive).sum().item()
            gains[candidate] = 2 * hit / max(1, joint.sum().item() + positive.sum().item())
        choice = max(gains, key=gains.__getitem__)
        if gains[choice] < best + GAIN:
            break
        own.append(choice)
        best, union = gains[choice], union | fires[:, choice]
    return own
