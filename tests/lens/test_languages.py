"""Languages of tokens by a classifier: counts against a plain loop, and py3langid where it is installed."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import torch

from steer import SteerError, extras
from steer.lens.languages import BYTES, CONFIDENCE, agreement, classifier, languages
from steer.lens.logit_lens import LogitLens

WORDS = [" word", "Haus", "été", "数学", "слово", "ab", "42", "{}", " other", "Stadt", "<|end|>", "mot"]
KNOWN = {"word": "en", "other": "en", "Haus": "de", "Stadt": "de", "数学": "zh", "слово": "ru", "été": "fr"}


class Words:
    """A tokenizer of `WORDS`."""

    def __len__(self) -> int:
        return len(WORDS)

    def decode(self, ids: list[int], **_: object) -> str:
        return WORDS[ids[0]]


def known(text: str) -> tuple[str, float]:
    return (KNOWN[text], 0.5) if text != "Stadt" else ("en", CONFIDENCE / 2)


def lens(*rows: list[int]) -> LogitLens:
    ids = torch.tensor(rows)
    scores = torch.zeros(len(rows), len(WORDS) + 3)
    return LogitLens(list(range(len(rows))), "dot", True, scores, ids.flip(1), ids, [], [])


def test_counts_are_those_by_hand() -> None:
    found = languages(lens([0, 1, 2, 3], [9, 5, 6, 8]), Words(), known, sample=99)  # type: ignore[arg-type]
    # English, other, undecided: word | Haus été 数学; other | - | Stadt, and "ab" and "42" are too short
    assert found.suppressed.tolist() == [[1, 3, 0], [1, 0, 1]]
    assert found.vocabulary.tolist() == [2, 4, 1]  # "mot" has three bytes
    assert found.foreign_base == pytest.approx(4 / 6)
    assert found.foreign().tolist() == pytest.approx([3 / 4, 0])
    # scripts: word, other, Haus plain Latin; été, 数学, слово another
    assert found.tables["vocabulary"].tolist() == [[2, 1], [0, 3]]
    assert found.tables["suppressed"].tolist() == [[2, 1], [0, 2]]
    name, decided, share, kappa, other = found.rows()[0]
    assert (name, decided, share) == ("vocabulary", 6, pytest.approx(5 / 6))
    chance = (2 / 6) * (3 / 6) + (4 / 6) * (3 / 6)
    assert kappa == pytest.approx((5 / 6 - chance) / (1 - chance))
    assert other == pytest.approx(4 / 6)
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["agreement"][1]["decided"] == 5


def test_nothing_decided_is_undefined() -> None:
    found = languages(lens([5, 6]), Words(), known, sample=1)  # type: ignore[arg-type]
    assert found.foreign().isnan().all()
    assert all(math.isnan(x) for x in agreement(torch.zeros(2, 2)))
    assert math.isnan(agreement(torch.tensor([[3.0, 0.0], [0.0, 0.0]]))[1])
    assert found.to_dict()["agreement"][1]["agreement"] is None


def test_a_classifier_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = lambda name: None if name == "py3langid" else SimpleNamespace()  # noqa: E731
    monkeypatch.setattr(extras, "find_spec", missing)
    with pytest.raises(SteerError, match=r'needs py3langid: pip install "steer-rl\[langid\]"'):
        classifier()


def test_py3langid_knows_whole_words() -> None:
    pytest.importorskip("py3langid")
    classify = classifier()
    for text, language in (("Wahrscheinlichkeit", "de"), ("слово", "ru"), ("αβγδ", "el")):
        found, confidence = classify(text)
        assert (found, confidence > CONFIDENCE, len(text.encode()) >= BYTES) == (language, True, True)
    assert classify("to")[1] < CONFIDENCE
