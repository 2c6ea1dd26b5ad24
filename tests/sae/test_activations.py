"""Reading activations: the right site, without special tokens, shuffled once each, and on from anywhere."""

from __future__ import annotations

import json

import pytest
import torch
from helpers.chat_templates import tokenizer as characters
from helpers.steering import fill, layers_of, message
from transformers import GraniteConfig, GraniteForCausalLM

import steer
from steer.errors import SteerError
from steer.hooks import hooked
from steer.identity import MERGED, base_checksum
from steer.sae.activations import ActivationStream, Reader, Window, read_all, windows
from steer.sae.cache import CachedActivations, write_cache
from steer.sae.intervene import changed, shifted
from steer.sae.texts import Texts

TEXTS = [f"{a} plus {b} is {a + b}, and {a} times {b} is {a * b}." for a in range(4) for b in range(6)]


@pytest.fixture
def stream(tiny_llama, tiny_tokenizer):
    def make(**changes):
        settings = {"length": 16, "block": 200, **changes}
        return ActivationStream(Reader(tiny_llama, 1), TEXTS, tiny_tokenizer, **settings)

    return make


def plain_windows(tokenizer, length=16):
    return [
        Window(ids, [place > 0 and token not in tokenizer.all_special_ids for place, token in enumerate(ids)])
        for text in TEXTS
        for all_ids in [tokenizer(text)["input_ids"]]
        for start in range(0, len(all_ids), length)
        for ids in [all_ids[start : start + length]]
    ]


def one_by_one(model, tokenizer, layer=1):
    """Hidden states as transformers returns them, a window at a time, without batches or padding."""
    found = []
    for window in plain_windows(tokenizer):
        ids = torch.tensor([window.ids])
        with torch.no_grad():
            hidden = model(ids, output_hidden_states=True).hidden_states[layer + 1][0]
        found.append(hidden[torch.tensor(window.keep)])
    return torch.cat(found)


def test_windows_keep_neither_special_nor_first_tokens(tiny_tokenizer):
    text = "<s>12 and</s> 3"
    (window,) = windows([text], tiny_tokenizer)
    kept = tiny_tokenizer.convert_ids_to_tokens([t for t, k in zip(*window, strict=True) if k])
    assert "".join(kept) == "12 and 3"
    (first,) = windows(["abcdef"], tiny_tokenizer, length=4, skip=2)  # of "ef" nothing would be kept
    assert first.keep == [False, False, True, True]


def test_every_piece_begins_with_the_bos_token_that_texts_begin_with(tiny_llama, tmp_path):
    def stream(adds_bos):
        tokenizer = characters(None, adds_bos)
        return ActivationStream(Reader(tiny_llama, 1), ["abcdefg"], tokenizer, length=4)

    plain, with_bos = stream(False), stream(True)
    ids = plain.tokenizer("abcdefg")["input_ids"]
    assert [window.ids for window in plain.windows()] == [ids[:4], ids[4:]]
    bos = with_bos.tokenizer.bos_token_id
    assert list(with_bos.windows()) == [
        Window([bos, *part], [False, *[True] * len(part)]) for part in (ids[:3], ids[3:6], ids[6:])
    ]
    assert "bos" not in plain.describe()
    write_cache(with_bos, tmp_path)
    old = json.loads((tmp_path / "cache.json").read_text())  # as 0.1.0 wrote it
    del old["source"]["bos"]
    (tmp_path / "cache.json").write_text(json.dumps(old))
    with pytest.raises(SteerError, match=r"source\.bos was None, now 'before every piece'"):
        write_cache(with_bos, tmp_path)


def test_a_window_that_keeps_nothing_is_left_out(tiny_tokenizer):
    assert [len(w.ids) for w in windows(["abcdef"], tiny_tokenizer, length=5)] == [5]


def test_activations_are_those_that_transformers_gives(tiny_model, tiny_tokenizer):
    """Every architecture; batches and padding change the last bits: 1e-5."""
    found = read_all(Reader(tiny_model, 1), plain_windows(tiny_tokenizer))
    torch.testing.assert_close(found, one_by_one(tiny_model, tiny_tokenizer), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("site", ["resid_pre", "resid_mid", "attn_out", "mlp_out"])
def test_every_site_is_read_where_vectors_stand(site, tiny_llama, tiny_tokenizer):
    """What steering at the site changes there is exactly the vector."""
    some = plain_windows(tiny_tokenizer)[:8]
    before = read_all(Reader(tiny_llama, 1, site), some)
    vectors = fill(steer.attach(tiny_llama, steer.SteeringConfig(layers=1, site=site)))
    after = read_all(Reader(tiny_llama, 1, site), some)
    expected = next(iter(vectors.effective().values())).expand_as(before)
    torch.testing.assert_close(after - before, expected, rtol=1e-4, atol=1e-5)


def test_between_attention_and_mlp_the_stream_is_read_and_changed(tiny_llama, tiny_tokenizer):
    """What the norm before the MLP is given: not the output of the attention, which is added to it."""
    one = plain_windows(tiny_tokenizer)[:1]
    streams: list[torch.Tensor] = []

    def read() -> None:
        norm = tiny_llama.model.layers[1].post_attention_layernorm
        with hooked(norm.register_forward_pre_hook(lambda module, args: streams.append(args[0][0]))):
            tiny_llama(torch.tensor([one[0].ids]))

    with torch.no_grad():
        read()
        found = read_all(Reader(tiny_llama, 1, "resid_mid"), one)
        torch.testing.assert_close(found, streams[0][torch.tensor(one[0].keep)], rtol=1e-4, atol=1e-5)
        direction = torch.linspace(-2, 2, 32)
        streams.clear()
        read()
        with shifted(tiny_llama, 1, direction, "resid_mid"):
            read()
        with changed(tiny_llama, 1, "resid_mid", lambda stream: 0.5 * stream):
            read()
    base, moved, halved = streams
    torch.testing.assert_close(moved - base, direction.expand_as(base), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(halved, 0.5 * base, rtol=1e-4, atol=1e-5)


def test_an_output_that_is_scaled_before_it_is_added_is_refused():
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = GraniteConfig(
        vocab_size=99, intermediate_size=48, residual_multiplier=0.22, pad_token_id=0, **shape
    )
    granite = GraniteForCausalLM(config).eval()
    with pytest.raises(SteerError, match=r"site='resid_mid' does not work on this model.*0\.22"):
        Reader(granite, 1, "resid_mid")
    with pytest.raises(SteerError, match="resid_mid"), shifted(granite, 1, torch.ones(32), "resid_mid"):
        pass


def test_base_and_difference_of_a_steered_model(tiny_llama, tiny_tokenizer):
    some = plain_windows(tiny_tokenizer)[:8]
    base = read_all(Reader(tiny_llama, 2), some)
    fill(steer.attach(tiny_llama))
    steered = read_all(Reader(tiny_llama, 2), some)
    assert torch.equal(read_all(Reader(tiny_llama, 2, what="base"), some), base)
    assert torch.equal(read_all(Reader(tiny_llama, 2, what="difference"), some), steered - base)
    assert (steered - base).norm() > 1


def test_the_source_names_the_base_model_and_the_vectors(tiny_llama, build_tiny):
    tiny_llama.config.name_or_path = "mine"
    plain = Reader(tiny_llama, 2).describe()
    assert plain["model"] == "mine" and plain["base_checksum"] == base_checksum(tiny_llama)
    assert Reader(build_tiny("llama", seed=1), 2).describe()["base_checksum"] != plain["base_checksum"]
    vectors = fill(steer.attach(tiny_llama))
    first = Reader(tiny_llama, 2).describe()
    assert first == {**plain, "vectors": first["vectors"]}
    assert Reader(tiny_llama, 2, what="base").describe() == {**plain, "what": "base"}
    vectors.set_tensors({name: 2 * tensor for name, tensor in vectors.tensors().items()})
    assert Reader(tiny_llama, 2).describe()["vectors"] != first["vectors"]
    merged = {"base": "hub/base", "revision": "v2", "adapter": "lora", "checksum": "0"}
    setattr(tiny_llama.config, MERGED, merged)
    found = Reader(tiny_llama, 2).describe()
    assert [found[name] for name in ("model", "base_revision", "base_adapter")] == ["hub/base", "v2", "lora"]
    assert found["base_checksum"] != plain["base_checksum"]


def test_the_model_is_left_as_it_was(tiny_llama, tiny_tokenizer):
    tiny_llama.train()
    read_all(Reader(tiny_llama, 1), plain_windows(tiny_tokenizer)[:2])
    assert tiny_llama.training
    assert not any(module._forward_hooks for module in tiny_llama.modules())


def test_a_stream_gives_every_activation_once(stream, tiny_llama, tiny_tokenizer):
    size = 10
    batches = list(stream(block=10**6).batches(size))
    assert all(batch.shape == (size, 32) for batch in batches)
    found, expected = torch.cat(batches), one_by_one(tiny_llama, tiny_tokenizer)
    assert len(found) == len(expected) // size * size
    nearest = torch.cdist(found.double(), expected.double()).min(1)
    assert nearest.values.max() < 1e-4
    # equal prefixes of two texts give equal activations, so indices may repeat, but the sums tell
    in_order = nearest.indices[1:] > nearest.indices[:-1]
    assert 0.3 < in_order.double().mean() < 0.7  # shuffled


def test_a_stream_goes_on_anywhere(stream):
    whole = list(stream(epochs=2).batches(32))
    assert len(whole) > 8
    for start in (1, 5, len(whole) - 1):
        rest = list(stream(epochs=2).batches(32, start))
        assert len(rest) == len(whole) - start
        assert all(torch.equal(a, b) for a, b in zip(rest, whole[start:], strict=True))
    assert not list(stream().batches(32, 10**6))


def test_seeds_shuffle_and_epochs_repeat(stream):
    first, other = next(stream().batches(32)), next(stream(seed=1).batches(32))
    assert not torch.equal(first, other)
    once, twice = (sum(len(b) for b in stream(epochs=n, block=10**6).batches(1)) for n in (1, 2))
    assert twice == 2 * once


def test_more_epochs_leave_the_first_as_it_was(stream):
    once, twice = list(stream().batches(32)), list(stream(epochs=2).batches(32))
    assert len(twice) == 2 * len(once)
    assert all(torch.equal(a, b) for a, b in zip(once, twice[: len(once)], strict=True))


def test_two_processes_share_the_windows(stream):
    whole = {tuple(w.ids) for w in stream().windows()}
    halves = [{tuple(w.ids) for w in stream(rank=rank, world=2).windows()} for rank in (0, 1)]
    assert halves[0] | halves[1] == whole
    counts = [sum(1 for _ in stream(rank=rank, world=2).windows()) for rank in (0, 1)]
    assert abs(counts[0] - counts[1]) <= 1


def test_numbers_that_are_not_finite_are_named(tiny_llama, tiny_tokenizer):
    with torch.no_grad():
        next(layers_of(tiny_llama)[0].parameters()).fill_(float("inf"))
    with pytest.raises(SteerError) as error:
        read_all(Reader(tiny_llama, 1), plain_windows(tiny_tokenizer)[:2])
    assert "resid_post of layer 1 are not finite" in message(error)


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"layer": 3}, "layers 0 to 2"),
        ({"layer": 0, "site": "stream"}, "resid_post"),
        ({"layer": 0, "what": "steered"}, "as_is, base, difference"),
        ({"layer": 0, "what": "difference"}, "no steering vectors"),
    ],
)
def test_readers_that_cannot_be_are_refused(settings, part, tiny_llama):
    with pytest.raises(SteerError) as error:
        Reader(tiny_llama, **settings)
    assert part in message(error)


# --- on disk


def test_a_cache_holds_what_the_stream_gives(stream, tiny_llama, tiny_tokenizer, tmp_path):
    """float16 keeps 11 bits: 1e-3 of the largest numbers."""
    cached = write_cache(stream(), tmp_path)
    expected = one_by_one(tiny_llama, tiny_tokenizer)
    assert len(cached) == len(expected)
    torch.testing.assert_close(cached.take(torch.arange(len(cached))), expected, rtol=1e-3, atol=2e-3)
    order = torch.cat(list(cached.batches(16)))
    assert len(order) == len(expected) // 16 * 16
    assert not torch.allclose(order[:100], expected[:100], atol=0.1)
    again = list(CachedActivations(tmp_path, epochs=2).batches(16))
    part = list(CachedActivations(tmp_path, epochs=2).batches(16, len(again) - 3))
    assert all(torch.equal(a, b) for a, b in zip(part, again[-3:], strict=True))
    halves = [next(CachedActivations(tmp_path, rank=rank, world=2).batches(8)) for rank in (0, 1)]
    both = torch.stack(halves, 1).flatten(0, 1)
    assert torch.equal(both, next(CachedActivations(tmp_path).batches(16)))


def test_a_cache_that_was_stopped_goes_on(stream, tmp_path):
    whole = write_cache(stream(), tmp_path / "whole")

    def stop(done: int) -> None:
        if done > 300:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_cache(stream(), tmp_path / "parts", progress=stop)
    with (tmp_path / "parts" / "activations.f16").open("ab") as file:
        file.write(b"part of a block")
    before = json.loads((tmp_path / "parts" / "cache.json").read_text())
    assert not before["done"]
    with pytest.raises(SteerError, match="block was 200, now 300"):  # whose blocks begin elsewhere
        write_cache(stream(block=300), tmp_path / "parts")
    parts = write_cache(stream(), tmp_path / "parts")
    everything = torch.arange(len(whole))
    assert torch.equal(parts.take(everything), whole.take(everything))
    assert len(write_cache(stream(block=300), tmp_path / "parts")) == len(whole)  # finished


def test_a_cache_stops_at_the_tokens_asked_for(stream, tmp_path):
    assert len(write_cache(stream(), tmp_path, tokens=233)) == 233
    assert len(write_cache(stream(), tmp_path, tokens=233)) == 233  # finished: nothing is computed
    with pytest.raises(SteerError) as error:
        write_cache(stream(), tmp_path, tokens=444)
    assert "asked was 233, now 444" in message(error)
    with pytest.raises(SteerError) as error:
        write_cache(stream(skip=2), tmp_path, tokens=233)
    assert "skip was 1, now 2" in message(error)


def test_a_cache_of_other_weights_or_vectors_is_not_reused(tiny_llama, build_tiny, tiny_tokenizer, tmp_path):
    def store(model):
        return write_cache(ActivationStream(Reader(model, 1), TEXTS, tiny_tokenizer, 16), tmp_path, tokens=8)

    store(tiny_llama)
    steered = build_tiny("llama")
    fill(steer.attach(steered))
    low = build_tiny("llama").to(torch.bfloat16)
    others = {"base_checksum": build_tiny("llama", seed=1), "vectors": steered, "model_dtype": low}
    for name, other in others.items():
        with pytest.raises(SteerError, match=f"holds other activations: source.{name} was"):
            store(other)
    old = json.loads((tmp_path / "cache.json").read_text())  # as 0.1.0 wrote it
    assert old["source"].pop("model_dtype") == "float32"
    (tmp_path / "cache.json").write_text(json.dumps(old))
    assert len(store(low)) == 8


def test_a_cache_of_texts_with_another_content_is_not_reused(tiny_llama, tiny_tokenizer, tmp_path):
    file, folder = tmp_path / "some.txt", tmp_path / "cache"

    def store():
        texts = Texts([str(file)])
        return write_cache(ActivationStream(Reader(tiny_llama, 1), texts, tiny_tokenizer, 16), folder)

    file.write_text("1+2=3\n4+5=9\n")
    assert len(store()) == 8
    file.write_text("1+2=3\n4+5=8\n")
    with pytest.raises(SteerError, match=r"source\.texts_sha256\..*some\.txt was"):
        store()
    old = json.loads((folder / "cache.json").read_text())  # as 0.1.0 wrote it
    del old["source"]["texts_sha256"]
    (folder / "cache.json").write_text(json.dumps(old))
    assert len(store()) == 8


def test_bad_caches_are_refused(stream, tmp_path):
    with pytest.raises(SteerError) as error:
        CachedActivations(tmp_path)
    assert "no stored activations" in message(error)
    write_cache(stream(), tmp_path)
    (tmp_path / "activations.f16").write_bytes(b"short")
    with pytest.raises(SteerError) as error:
        CachedActivations(tmp_path)
    assert "cut short" in message(error)


# --- texts


def test_texts_come_from_lines_and_records_of_each_source_in_turn(tmp_path):
    plain, records = tmp_path / "a.txt", tmp_path / "b.jsonl"
    plain.write_text("one\n\ntwo\n")
    rows = [
        {"text": "three"},
        {"problem": "2+2", "solution": "sum", "answer": "4"},
        {"problem": "3+3", "answer": "6"},
        {"question": "5?", "answer": "five"},
    ]
    records.write_text("\n".join(map(json.dumps, rows)))
    texts = Texts([str(plain), str(records)])
    assert list(texts) == ["one", "three", "two", "2+2\n\nsum", "3+3\n\n6", "5?\n\nfive"]
    assert list(texts) == list(texts)


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("a.jsonl", '{"text": "a"}\n{', "line 2 is not JSON"),
        ("a.jsonl", '{"prompt": "a"}', "no text in prompt"),
        ("a.jsonl", "[1]", "line 1: no text in list"),
        ("a.txt", None, "no file"),
        ("gsm8k", None, "expected a .txt or .jsonl file or a hub data set"),
    ],
)
def test_texts_that_cannot_be_read_are_named(name, content, part, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(SteerError) as error:
        list(Texts([name]))
    assert part in message(error)
    with pytest.raises(SteerError):
        Texts([])
