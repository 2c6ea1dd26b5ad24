"""Vectors in the features of an SAE: constructed vectors, a second implementation, places, the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.lens import subject_of, texts
from helpers.steering import message
from helpers.training import model_folder

import steer
from steer.cli import main
from steer.errors import SteerError
from steer.lens.features import Features, check_upstream, read_features
from steer.lens.subject import Subject
from steer.sae import SAE, SAEConfig, save_sae

ROWS = texts(((4, 5), (6, 3), (3, 7)))


def make_sae(**settings: Any) -> SAE:
    """Encoder and decoder rows that differ."""
    sae = SAE(SAEConfig(**{"d_in": 32, "d_sae": 64, "k": 8, **settings}))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        shape = sae.encoder.weight.shape
        sae.encoder.weight.add_(0.3 * torch.randn(shape, generator=generator))
    return sae.eval()


def put(subject: Subject, vector: torch.Tensor) -> None:
    names = subject.vectors.tensors()
    subject.vectors.set_tensors(dict.fromkeys(names, vector.detach()))


def read(subject: Subject, sae: SAE, layer: int, site: str = "resid_post", **options: Any) -> Features:
    return read_features(subject, sae, "it", layer, site, ROWS, **options)


@torch.no_grad()
def test_a_vector_that_is_a_row_is_found(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    sae = make_sae()
    subject = subject_of(tiny_llama, tiny_tokenizer, layers="1")
    put(subject, 3 * sae.W_dec[7])
    found = read(subject, sae, 1)
    assert found.direct
    assert found.length == pytest.approx(3, rel=1e-5)
    assert found.writes.features[0] == 7
    assert found.writes.value[0].item() == pytest.approx(1, abs=1e-6)
    assert found.writes.extra["projection"][0].item() == pytest.approx(3, rel=1e-5)
    assert found.writes.p[0].item() == pytest.approx(1 / (1 + found.draws))
    assert found.writes.strongest[0] > found.writes.strongest[3]
    put(subject, sae.encoder.weight[9])
    found = read(subject, sae, 1)
    assert found.reads is not None
    assert (found.reads.features[0], found.reads.value[0].item()) == (9, pytest.approx(1, abs=1e-6))
    change = found.reads.extra["change"][0].item()
    assert change == pytest.approx(sae.encoder.weight[9].square().sum().item(), rel=1e-5)
    subject.vectors.scale = 2.0
    doubled = read(subject, sae, 1)
    assert doubled.length == pytest.approx(2 * found.length, rel=1e-5)


@torch.no_grad()
def test_a_random_vector_is_like_the_random_ones(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    found = read(subject_of(tiny_llama, tiny_tokenizer, layers="1"), make_sae(), 1)
    for reading in (found.writes, found.reads, found.activation):
        assert reading is not None
        assert reading.p[0].item() > 0.05
        assert reading.random_ranked.shape == (found.draws, 50)
        assert (reading.low <= reading.high).all()


@torch.no_grad()
def states(subject: Subject, layer: int, on: bool) -> list[torch.Tensor]:
    """By row alone: the stream after the layer at the tokens that predict the completion."""
    made = []
    for row in ROWS:
        ids = torch.tensor([row.ids])
        if on:
            hidden = subject.model(ids, output_hidden_states=True).hidden_states
        else:
            with subject.vectors.disabled():
                hidden = subject.model(ids, output_hidden_states=True).hidden_states
        made.append(hidden[layer + 1][0, row.prompt - 1 : len(row.ids) - 1])
    return made


@pytest.mark.parametrize("settings", [{}, {"encoder": "kron"}, {"activation": "jumprelu"}], ids=str)
@torch.no_grad()
def test_activations_and_the_change_downstream(
    tiny_llama: Any, tiny_tokenizer: Any, settings: dict[str, str]
) -> None:
    sae = make_sae(**settings)
    subject = subject_of(tiny_llama, tiny_tokenizer, layers="0", batch_size=2)
    found = read(subject, sae, 1, top=64, draws=2)
    off, on = (torch.cat(states(subject, 1, state)) for state in (False, True))
    assert found.tokens == len(off) == 15
    change = (on - off).double().mean(0)
    assert not found.direct
    assert found.length == pytest.approx(change.norm().item(), rel=1e-4)
    order = found.activation.features
    for name, expected in (
        ("off", sae.encode(off).mean(0)),
        ("on", sae.encode(on).mean(0)),
        ("fires_off", (sae.encode(off) > 0).float().mean(0)),
        ("fires_on", (sae.encode(on) > 0).float().mean(0)),
    ):
        measured = found.activation.extra[name].float()
        torch.testing.assert_close(measured, expected[order], rtol=1e-4, atol=1e-5)
    cosines = torch.nn.functional.cosine_similarity(sae.W_dec.double(), change[None], dim=1)
    torch.testing.assert_close(found.writes.value, cosines[found.writes.features], rtol=1e-4, atol=1e-5)
    assert (found.reads is None) == (settings.get("encoder") == "kron")


@torch.no_grad()
def test_an_adaptive_vector_is_read_by_what_it_adds(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    """It adds another multiple at every token, so its own length and sign are not those of the change."""
    subject = subject_of(tiny_llama, tiny_tokenizer, layers="1", kind="adaptive")
    off, on = (torch.cat(states(subject, 1, state)) for state in (False, True))  # with nothing after it
    change = (on - off).double().mean(0).norm().item()
    for site in ("mlp_out", "resid_post"):
        found = read(subject, make_sae(), 1, site, top=64, draws=2)
        assert not found.direct
        assert found.length == pytest.approx(change, rel=1e-4)


@torch.no_grad()
def test_vectors_before_a_layer_are_in_the_stream_after_the_one_below(
    tiny_llama: Any, tiny_tokenizer: Any
) -> None:
    """The layer below returns the stream without that vector, which is added by hand here."""
    sae = make_sae()
    subject = subject_of(tiny_llama, tiny_tokenizer, layers="0-1", site="resid_pre")
    own = subject.vectors.tensors()
    before, vector = own  # names, of layers 0 and 1
    off = torch.cat(states(subject, 0, False))
    subject.vectors.set_tensors({before: own[before], vector: torch.zeros(32)})
    below = torch.cat(states(subject, 0, True))
    subject.vectors.set_tensors(own)
    for layers, stream in (([1], off), ([0, 1], below)):
        found = read(subject, sae, 0, layers=layers, top=64, draws=2)
        assert found.direct
        assert found.length == pytest.approx(own[vector].norm().item(), rel=1e-5)
        for name, expected in (("off", off), ("on", stream + own[vector])):
            measured = found.activation.extra[name].float()
            mean = sae.encode(expected).mean(0)[found.activation.features]
            torch.testing.assert_close(measured, mean, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_an_sae_of_differences_reads_differences(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    sae = make_sae(source={"what": "difference"})
    subject = subject_of(tiny_llama, tiny_tokenizer, layers="0")
    found = read(subject, sae, 1, top=64, draws=2)
    off, on = (torch.cat(states(subject, 1, state)) for state in (False, True))
    expected = sae.encode(on - off).mean(0) - sae.encode(torch.zeros(1, 32))[0]
    measured = found.activation.value.float()
    torch.testing.assert_close(measured, expected[found.activation.features], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("vectors", "sae", "expected"),
    [
        (("1", "resid_post"), (1, "resid_post"), True),
        (("1", "resid_post"), (2, "resid_pre"), True),
        (("1", "resid_pre"), (0, "resid_post"), True),
        (("1", "attn_out"), (1, "resid_mid"), False),
        (("1", "mlp_out"), (1, "resid_post"), False),
        (("0-2", "resid_post"), (1, "resid_post"), True),
        (("1", "resid_post"), (1, "mlp_out"), None),
        (("1", "resid_post"), (0, "resid_post"), None),
        (("2", "resid_mid"), (2, "resid_pre"), None),
        (("1-2", "resid_post"), (0, "resid_post"), None),
    ],
)
def test_places(
    tiny_llama: Any, tiny_tokenizer: Any, vectors: tuple[str, str], sae: tuple[int, str], expected: Any
) -> None:
    subject = subject_of(tiny_llama, tiny_tokenizer, layers=vectors[0], site=vectors[1])
    if expected is not None:
        assert check_upstream(subject, subject.layers, *sae, "it") is expected
        return
    with pytest.raises(SteerError) as error:
        read(subject, make_sae(), *sae)
    assert "the vectors act after that" in message(error)


def test_vectors_that_change_nothing_are_refused(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    subject = subject_of(tiny_llama, tiny_tokenizer, layers="0")
    put(subject, torch.zeros(32))
    with pytest.raises(SteerError, match="do not change resid_post of layer 1 on these texts"):
        read(subject, make_sae(), 1)
    put(subject, torch.ones(32))
    with pytest.raises(SteerError, match="0 random sets are no control"):
        read(subject, make_sae(), 1, draws=0)


# ---- the command


@pytest.fixture
def here(tmp_path: Path, tiny_llama: Any, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    model_folder(tmp_path / "model", tiny_llama, tiny_tokenizer)
    for name, positions in (("v", "all"), ("first", "last_prompt")):
        config = steer.SteeringConfig(layers="1", base_model_name_or_path="model", positions=positions)
        vectors = steer.attach(tiny_llama, config)
        vectors.set_tensors({key: torch.linspace(-1, 1, 32) for key in vectors.tensors()})
        vectors.save(name)
        steer.detach(tiny_llama)
    save_sae(make_sae(source={"model": "model", "layer": 1, "site": "resid_post"}), "sae")
    save_sae(make_sae(encoder="kron", source={"model": "model", "layer": 2}), "kron")
    save_sae(make_sae(), "plain", "saelens")
    (tmp_path / "texts.txt").write_text("".join(f"{n} + {n} = {2 * n}\n" for n in range(9)))
    return tmp_path


def test_the_command(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["lens", "features", "v", "--draws", "3", "--top", "4"]
    assert main([*asked, "--sae", "sae"]) == 0
    told = capsys.readouterr().out
    assert "the vector at resid_post of layer 1 itself" in told
    assert "paragraphs of neutral text" in told
    assert "3 sets of vectors of equal length" in told
    assert main([*asked, "--sae", "kron", "--texts", "texts.txt", "--problems", "5"]) == 0
    told = capsys.readouterr().out
    assert "the mean change at resid_post of layer 2 that the vectors (resid_post of layers 1) make" in told
    assert "a KronSAE's feature has no encoder row" in told
    assert "texts     5 texts" in told
    options = ["--sae", "plain", "--sae-layer", "1", "--json", "--plot", "f.svg"]
    assert main([*asked, *options]) == 0
    content = json.loads(capsys.readouterr().out)
    assert len(content["writes"]["features"]) == len(content["reads"]["promotes"]) == 4
    assert len(content["activation"]["random_ranked"]) == content["draws"] == 3
    assert Path("f.svg").read_text().startswith("<?xml")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("v --sae plain", "plain does not say which layer it was trained on"),
        ("v --sae sae --sae-layer 2", "is an SAE of layer 1, not of layer 2"),
        ("v --sae sae --sae-site mlp_out", "is an SAE of site resid_post, not of mlp_out"),
        ("v --sae plain --sae-layer 0", "the vectors act after that"),
        ("v --sae plain --sae-layer 9", "the model has layers 0 to 2"),
        ("v --sae sae --layers 2", "layers [2] have no vector"),
        ("v --sae sae --texts texts.txt --data arithmetic", "give --texts or --data, not both"),
        ("first --sae sae --texts texts.txt", "positions='last_prompt', which a text without a prompt"),
        ("v --sae nothing", "holds no SAE"),
    ],
)
def test_mistakes(here: Path, capsys: pytest.CaptureFixture[str], words: str, expected: str) -> None:
    assert main(["lens", "features", *words.split()]) == 1
    assert expected in capsys.readouterr().err
