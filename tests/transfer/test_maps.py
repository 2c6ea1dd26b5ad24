"""The parts of a transfer against second implementations: maps, CKA, layer matches, token pairs, texts."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.steering import fill, layers_of, message
from hypothesis import given, settings
from hypothesis import strategies as st

from steer import SteerError
from steer.transfer import maps
from steer.transfer.activations import PIECE, Side, builtin_texts, pair, paired, pieces, read_texts
from steer.transfer.layers import by_depth, by_likeness
from steer.transfer.maps import Moments, Similarity


def streams(
    tokens: int = 400, width: int = 6, other: int = 9, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Correlated streams with unequal scales, a large mean and noise."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    x = draw(tokens, width) * torch.logspace(-1, 2, width, dtype=torch.float64) + 30
    return x, x @ draw(width, other) + 5 * draw(tokens, other) - 7


def moments(x: torch.Tensor, y: torch.Tensor, *cuts: int) -> Moments:
    found = Moments(x.shape[1], y.shape[1])
    for start, stop in itertools.pairwise([0, *cuts, len(x)]):
        found.add(x[start:stop], y[start:stop])
    return found


def test_moments_do_not_depend_on_the_batches() -> None:
    x, y = streams()
    found, whole = moments(x, y, 1, 17, 17, 300), moments(x, y)
    xc, yc = x - x.mean(0), y - y.mean(0)
    for one in (found, whole):
        torch.testing.assert_close(one.xx, xc.T @ xc)
        torch.testing.assert_close(one.xy, xc.T @ yc)
        torch.testing.assert_close(one.yy, yc.square().sum(0))
        torch.testing.assert_close(one.x_mean, x.mean(0))
        assert one.count == len(x)
        assert one.y_norm == pytest.approx(y.norm(dim=1).mean().item())


def test_ridge_agrees_with_the_normal_equations_in_standardised_coordinates() -> None:
    x, y = streams()
    xc, yc = (x - x.mean(0)).numpy(), (y - y.mean(0)).numpy()
    scale = xc.std(0)
    for penalty, found in zip((0.0, 0.1, 3.0), maps.ridge(moments(x, y), (0.0, 0.1, 3.0)), strict=True):
        # least squares on rows appended for the penalty: another way to the same solution
        rows = np.vstack([xc / scale, np.sqrt(penalty * len(xc)) * np.eye(len(scale))])
        solution = np.linalg.lstsq(rows, np.vstack([yc, np.zeros((len(scale), yc.shape[1]))]), rcond=None)[0]
        np.testing.assert_allclose(found.numpy(), solution / scale[:, None], rtol=1e-8, atol=1e-10)


def test_procrustes_is_the_nearest_orthogonal_map() -> None:
    """Against the polar factor by Newton's iteration (Higham 1986), another way to the same Q."""
    x, y = streams(width=9, other=9)
    xc, yc = x - x.mean(0), y - y.mean(0)
    q = xc.T @ yc / (xc.T @ yc).norm()
    for _ in range(60):
        q = (q + torch.linalg.inv(q).T) / 2
    factor = (xc @ q * yc).sum() / (xc @ q).square().sum()
    torch.testing.assert_close(q @ q.T, torch.eye(9, dtype=torch.float64))
    torch.testing.assert_close(maps.procrustes(moments(x, y)), factor * q, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize(("width", "other"), [(6, 9), (9, 6)])
def test_procrustes_between_widths_finds_an_isometry_or_its_inverse(width: int, other: int) -> None:
    q = torch.linalg.qr(torch.randn(9, 9, dtype=torch.float64)).Q[:width, :other]
    narrow, _ = streams(width=6)
    x = narrow if width == 6 else narrow @ q.T
    torch.testing.assert_close(maps.procrustes(moments(x, 2.5 * (x @ q))), 2.5 * q, rtol=1e-6, atol=1e-6)


def test_r2_agrees_with_predictions_on_the_held_out_tokens() -> None:
    x, y = streams()
    y[:, 0] = 3.0  # a dimension that does not vary counts nothing
    fitted, held = moments(x[:300], y[:300]), moments(x[300:], y[300:])
    matrix = maps.ridge(fitted, [0.01])[0]
    predicted = y[:300].mean(0) + (x[300:] - x[:300].mean(0)) @ matrix
    error = (y[300:] - predicted).square().sum(0)[1:]
    total = (y[300:] - y[300:].mean(0)).square().sum(0)[1:]
    assert maps.r2(matrix, fitted, held) == pytest.approx((1 - error / total).mean().item(), abs=1e-9)
    assert maps.r2(1e3 * matrix, fitted, held) == -1  # worse than the mean counts -1 at most


def test_one_massive_dimension_does_not_decide_r2() -> None:
    """What the pooled figure would call a nearly perfect map, since one dimension holds all the variance."""
    x = torch.randn(500, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y = torch.randn(500, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    x[:, 0] *= 1e4
    y[:, 0] = x[:, 0]
    fitted, held = moments(x[:300], y[:300]), moments(x[300:], y[300:])
    found = maps.r2(maps.ridge(fitted, [1e-3])[0], fitted, held)
    assert found == pytest.approx(1 / 8, abs=0.05)


def test_cka_is_one_for_a_rotation_zero_for_noise_and_agrees_with_the_formula() -> None:
    x = streams(width=6)[0]
    q = torch.linalg.qr(torch.randn(9, 9, dtype=torch.float64)).Q[:6]
    noise = torch.randn(400, 50, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    found = Similarity()
    for start in range(0, 400, 100):
        rows = slice(start, start + 100)
        found.add({0: x[rows]}, {0: 3 * x[rows] @ q, 1: noise[rows]}, [(0, 0), (0, 1)])
    assert found.cka(0, 0) == pytest.approx(1, abs=1e-9)
    # The usual, biased estimator gives about 0.1 here: 50 noise dimensions on 100 tokens.
    assert abs(found.cka(0, 1)) < 0.05
    # In the limit of many tokens both estimators are Kornblith's formula.
    a, b = streams(tokens=512)
    once = Similarity()
    once.add({0: a}, {0: b}, [(0, 0)])
    a, b = a - a.mean(0), b - b.mean(0)
    formula = (a.T @ b).norm() ** 2 / ((a.T @ a).norm() * (b.T @ b).norm())
    assert once.cka(0, 0) == pytest.approx(formula.item(), abs=0.01)


def test_hsic_agrees_with_its_definition() -> None:
    """Unbiased HSIC as a sum over distinct indices (Song et al. 2012, equation 4), by brute force."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(6, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    a, b = ((m + m.T).fill_diagonal_(0) for m in (a, b))
    total = 0.0
    for i, j, q, r in itertools.permutations(range(6), 4):
        total += (a[i, j] * (b[i, j] + b[q, r] - 2 * b[i, q])).item()
    assert maps._hsic(a, b) == pytest.approx(total / (6 * 5 * 4 * 3), abs=1e-12)


@given(depth=st.integers(1, 40), other=st.integers(1, 40), data=st.data())
@settings(max_examples=200, deadline=None)
def test_by_depth_keeps_the_sum_and_the_order(depth: int, other: int, data: st.DataObject) -> None:
    layers = sorted(data.draw(st.sets(st.integers(0, depth - 1), min_size=1)))
    matches = by_depth(layers, depth, other)
    for layer in layers:
        assert sum(m.share for m in matches if m.donor == layer) == pytest.approx(1)
    assert [m.donor for m in matches] == sorted(m.donor for m in matches)
    assert [m.recipient for m in matches] == sorted(m.recipient for m in matches)
    if min(depth, other) > 1:
        for m in matches:  # never more than half a step of the coarser model away
            apart = abs(m.donor / (depth - 1) - m.recipient / (other - 1))
            assert apart <= 0.5 / (min(depth, other) - 1) + 1e-9
    if depth == other:
        assert matches == [(i, i, 1.0) for i in layers]
    if other > depth and len(layers) == depth:
        assert [m.recipient for m in matches] == list(range(other))  # every layer is steered, as in the donor


def test_by_depth_examples() -> None:
    assert by_depth([0, 1, 2, 3, 4], 5, 3) == [(0, 0, 1), (1, 1, 1), (2, 1, 1), (3, 2, 1), (4, 2, 1)]
    assert by_depth([1], 3, 6) == [(1, 2, 0.5), (1, 3, 0.5)]


@given(rows=st.integers(1, 4), columns=st.integers(1, 4), data=st.data())
@settings(max_examples=100, deadline=None)
def test_by_likeness_is_the_best_of_all_ordered_matches(rows: int, columns: int, data: st.DataObject) -> None:
    cells = st.integers(-8, 8).map(lambda n: n / 8)
    table = {(i, j): data.draw(cells) for i in range(rows) for j in range(columns)}
    matches = by_likeness(range(rows), columns, table)
    chosen = [m.recipient for m in matches]
    assert [m.donor for m in matches] == list(range(rows))
    assert chosen == sorted(chosen)
    every = itertools.combinations_with_replacement(range(columns), rows)
    best = max(sum(table[i, j] for i, j in enumerate(option)) for option in every)
    assert sum(table[i, j] for i, j in enumerate(chosen)) == best


def test_pairs_end_at_the_same_character() -> None:
    # "<s>", "He", "llo", " wo", "rld" against "Hel", "lo", " world" and a special token at the end
    assert pair([None, 2, 5, 8, 11], [3, 5, 11, None]) == [(2, 1), (4, 2)]
    # the bytes of one character end together: the last one has read it all
    assert pair([None, 1, 2, 2, 2, 3], [None, 1, 2, 3]) == [(1, 1), (4, 2), (5, 3)]
    assert pair([3, 5], [3, 5]) == [(1, 1)]  # the first token is an attention sink, BOS or not


def test_pieces_lose_no_words() -> None:
    text = "\n\n".join(f"{n} " * n for n in range(80))
    found = pieces(text)
    assert max(map(len, found)) <= PIECE
    assert " ".join(found).split() == text.split()
    assert pieces("x" * 2000) == ["x" * 800, "x" * 800, "x" * 400]
    assert pieces("  \n") == []


def test_the_builtin_sample_is_as_long_as_asked_for_and_mixed() -> None:
    texts = builtin_texts(20_000)
    assert texts == builtin_texts(20_000)
    assert 20_000 <= sum(map(len, texts)) <= 20_000 + 3 * PIECE
    sums = [text for text in texts if text.startswith("What is")]
    assert 0.2 < sum(map(len, sums)) / 20_000 < 0.3
    first = sums[0].splitlines()[0]
    question, _, answer = first.removeprefix("What is ").partition("? ")
    assert eval(question) == int(answer.partition(" = ")[2])


def test_texts_from_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo\none\n")
    assert read_texts(tmp_path / "a.txt", 8) == ["one", "two"]
    rows = [{"problem": "p", "solution": "s", "answer": 3}, {"problem": "p", "answer": 3}, {"text": "t"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    assert read_texts(str(tmp_path / "a.jsonl"), 8) == ["p\ns", "p\n3", "t"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", "x", ".txt"),
        ("a.jsonl", "{", "line 1 is not JSON"),
        ("a.jsonl", '{"text": "x"}\n[1]', "line 2"),
        ("a.jsonl", '{"answer": "x"}', "'text' or 'problem'"),
        ("a.txt", "\n \n", "empty"),
        ("missing.txt", None, "cannot read"),
    ],
)
def test_bad_texts_are_named(tmp_path: Path, name: str, content: str | None, words: str) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(SteerError) as error:
        read_texts(tmp_path / name, 8)
    assert words in message(error)


TEXTS = ["The quick brown fox. " * n for n in range(1, 6)] * 3 + ["x = 17 + 25 * 3"]


def side(model: Any, tokenizer: Any) -> Side:
    from steer.sites import find_decoder

    return Side(model, find_decoder(model), tokenizer)


@pytest.mark.parametrize("site", ["resid_post", "resid_pre"])
def test_streams_are_those_of_the_base_model(tiny_model: Any, tiny_tokenizer: Any, site: str) -> None:
    """Against one unpadded forward pass a text: padding, batching and attached vectors change nothing."""
    import steer

    found = list(
        paired(side(tiny_model, tiny_tokenizer), side(tiny_model, tiny_tokenizer), TEXTS, [0, 1], [1], site)
    )
    fill(steer.attach(tiny_model))  # seen by neither
    again = list(
        paired(side(tiny_model, tiny_tokenizer), side(tiny_model, tiny_tokenizer), TEXTS, [0, 1], [1], site)
    )
    steer.detach(tiny_model)
    seen: list[torch.Tensor] = []
    block = layers_of(tiny_model)[1]
    if site == "resid_post":
        handle = block.register_forward_hook(
            lambda m, a, out: seen.append(out[0] if isinstance(out, tuple) else out)
        )
    else:
        keep = lambda m, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"])  # noqa: E731
        handle = block.register_forward_pre_hook(keep, with_kwargs=True)
    with torch.no_grad():
        for text in TEXTS:
            tiny_model(tiny_tokenizer(text, return_tensors="pt")["input_ids"])
    handle.remove()
    expected = torch.cat([stream[0, 1:] for stream in seen])  # all but each text's first token
    assert len(expected) == sum(map(len, found)) == sum(len(text) - 1 for text in TEXTS)
    for batches in (found, again):
        torch.testing.assert_close(torch.cat([b.donor[1] for b in batches]), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            torch.cat([b.recipient[1] for b in batches]), expected, rtol=1e-4, atol=1e-5
        )
        assert all(set(b.donor) == {0, 1} and set(b.recipient) == {1} for b in batches)


def test_between_attention_and_mlp_the_stream_there_is_read(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    whole = side(tiny_llama, tiny_tokenizer)
    (found,) = paired(whole, whole, TEXTS[-1:], [1], [1], "resid_mid")
    seen: list[torch.Tensor] = []
    norm = layers_of(tiny_llama)[1].post_attention_layernorm
    norm.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        tiny_llama(tiny_tokenizer(TEXTS[-1], return_tensors="pt")["input_ids"])
    for streams in (found.donor, found.recipient):
        torch.testing.assert_close(streams[1], seen[0][0, 1:], rtol=1e-4, atol=1e-5)


def test_tokens_of_massive_norm_are_left_out(build_tiny: Any, tiny_tokenizer: Any) -> None:
    model = build_tiny("llama")
    loud = tiny_tokenizer("q")["input_ids"][0]
    with torch.no_grad():
        model.get_input_embeddings().weight[loud] *= 100
    whole = side(model, tiny_tokenizer)
    kept = sum(map(len, paired(whole, whole, ["abcqdefqg"], [0], [0])))
    assert kept == 6  # not the first token, neither q


def test_a_tokenizer_without_offsets_is_refused(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    class Slow:
        is_fast = False

    with pytest.raises(SteerError) as error:
        side(tiny_llama, Slow())
    assert "fast tokenizer" in message(error)
