"""SAEs of SAELens: by its own classes, by release and id from a directory made here, and in which place."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.steering import message
from safetensors.torch import save_file

from evals.architectures import tiny
from steer.cli import main
from steer.errors import SteerError
from steer.sae import SAE, SAEConfig, load_sae, save_sae
from steer.sae.activations import Reader
from steer.sae.place import sae_place
from steer.sae.saelens import (
    ACTIVATION,
    ARCHITECTURES,
    HONOURED,
    IRRELEVANT,
    PLACE,
    PLAIN,
    from_release,
    from_saelens,
    hook_place,
)

D_IN, D_SAE = 12, 48


def rows(count: int = 60) -> torch.Tensor:
    return 3 * torch.randn(count, D_IN, generator=torch.Generator().manual_seed(3))


def weights(kind: str) -> dict[str, torch.Tensor]:
    """Random weights, with decoder rows of many lengths and thresholds on either side of zero."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    made = {"W_enc": draw(D_IN, D_SAE), "b_dec": draw(D_IN)}
    made["W_dec"] = draw(D_SAE, D_IN) * torch.linspace(0.2, 3, D_SAE)[:, None]
    names = ("b_gate", "b_mag", "r_mag") if kind == "gated" else ("b_enc",)
    made |= {name: draw(D_SAE) for name in names}
    return made | ({"threshold": draw(D_SAE)} if kind == "jumprelu" else {})


def settings(kind: str, **changes: Any) -> dict[str, Any]:
    metadata = {"model_name": "gpt2-small", "hook_name": "blocks.1.hook_resid_post"}
    made = {"architecture": kind, "d_in": D_IN, "d_sae": D_SAE, "dtype": "float32", "device": "cpu"}
    made |= {"k": 5} if kind == "topk" else {}
    return {**made, "apply_b_dec_to_input": True, "metadata": metadata, **changes}


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """1e-5 of each number, and of the largest where terms cancel."""
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


# ---- without SAELens


@pytest.mark.parametrize("tied", [True, False])
def test_gated(tied: bool) -> None:
    """Against the formulas of the gated SAE (arXiv 2404.16014)."""
    w, x = weights("gated"), rows()
    config, state = from_saelens(settings("gated", apply_b_dec_to_input=tied), w)
    sae = SAE.from_state(config, state, Path("gated"))
    read = (x - w["b_dec"] if tied else x) @ w["W_enc"]
    expected = (read + w["b_gate"] > 0) * (read * w["r_mag"].exp() + w["b_mag"]).relu()
    assert 0.1 < (expected > 0).float().mean() < 0.9
    torch.testing.assert_close(sae.encode(x), expected, rtol=1e-5, atol=1e-5)
    close(sae(x), expected @ w["W_dec"] + w["b_dec"])


@pytest.mark.parametrize("kind", ["standard", "topk", "gated"])
def test_a_scale_of_the_inputs_is_folded_into_the_weights(kind: str) -> None:
    """As SAELens does: features of x * factor, and reconstructions of x in its own units."""
    w, x, factor = weights(kind), rows(), 0.05
    plain = SAE.from_state(*from_saelens(settings(kind, apply_b_dec_to_input=False), w), Path("plain"))
    scaled = settings(kind, apply_b_dec_to_input=False, normalize_activations="expected_average_only_in")
    folded = SAE.from_state(*from_saelens(scaled, w, factor), Path("folded"))
    close(folded.encode(x), plain.encode(x * factor))
    close(folded(x), plain(x * factor) / factor)
    with pytest.raises(SteerError, match="normalize_activations='expected_average_only_in' is not known"):
        from_saelens(scaled, w)


@pytest.mark.parametrize(
    ("hook", "expected"),
    [
        ("blocks.12.hook_resid_pre", (12, "resid_pre")),
        ("blocks.3.hook_resid_post", (3, "resid_post")),
        ("blocks.3.hook_resid_mid", (3, "resid_mid")),
        ("blocks.0.hook_mlp_out", (0, "mlp_out")),
        ("blocks.7.hook_attn_out", (7, "attn_out")),
        ("model.layers.5", (5, "resid_post")),
        ("transformer.h.5", (5, "resid_post")),
        ("model.layers.5.output", (5, "resid_post")),
        ("hook_embed", None),
        ("blocks.3.attn.hook_z", None),
        ("blocks.3.ln1.hook_normalized", None),
        ("model.layers.5.mlp.down_proj", None),
        ("blocks.3.hook_mlp_in", None),
        (7, None),
    ],
)
def test_hooks(hook: Any, expected: tuple[int, str] | None) -> None:
    if expected is not None:
        assert hook_place(hook) == expected
        return
    with pytest.raises(SteerError, match=r"hook_name=.* is not known here, only"):
        hook_place(hook)


def test_the_place_is_read_from_before_and_after_version_6(tmp_path: Path) -> None:
    save_sae(
        SAE(SAEConfig(D_IN, D_SAE, 5, source={"model": "m", "layer": 4, "site": "mlp_out", "added": True})),
        tmp_path,
        "saelens",
    )
    found = load_sae(tmp_path).cfg.source
    assert found == {
        "tool": "SAELens", "model": "m", "hook": "blocks.4.hook_mlp_out", "layer": 4, "site": "mlp_out",
    }  # fmt: skip
    old = {"hook_point": "blocks.2.hook_resid_pre", "hook_point_layer": 2, "model_name": "gpt2-small"}
    old |= {"model_from_pretrained_kwargs": {"center_writing_weights": False, "revision": "step3000"}}
    config, _ = from_saelens({**settings("standard"), **old, "metadata": None}, weights("standard"))
    assert (config.source["layer"], config.source["site"]) == (2, "resid_pre")
    assert (config.source["model"], config.source["base_revision"]) == ("gpt2-small", "step3000")


def test_sites_that_other_tools_read_after_a_norm_are_refused() -> None:
    """Gemma normalises what the MLP returns; TransformerLens's hook_mlp_out is after that norm."""
    for kind, refused in (("llama", False), ("gpt_neox", False), ("gemma3_text", True), ("olmo2", True)):
        model = tiny(kind)
        width = model.config.hidden_size
        sae = SAE(SAEConfig(width, 64, 4, source={"tool": "SAELens", "layer": 1, "site": "mlp_out"}))
        if refused:
            with pytest.raises(SteerError) as error:
                sae_place(sae, model, "it")
            assert "normalises or scales the module's output first" in message(error)
        else:
            assert sae_place(sae, model, "it") == (1, "mlp_out")
        assert Reader(model, 1, "mlp_out").describe()["added"] is not refused
        assert "added" not in Reader(model, 1).describe()
        sae.cfg.source["site"] = "resid_post"
        assert sae_place(sae, model, "it") == (1, "resid_post")


def test_a_k_that_is_not_known_is_not_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sae = SAE.from_state(*from_saelens(settings("jumprelu"), weights("jumprelu")), tmp_path)
    save_sae(sae, tmp_path / "own")
    assert main(["sae", "info", str(tmp_path / "own")]) == 0
    shown = capsys.readouterr().out
    assert "48 for activations of width 12, jumprelu\n" in shown
    assert "k=" not in shown and "k=" not in (tmp_path / "own" / "README.md").read_text()
    save_sae(sae, tmp_path / "theirs", "dictionary_learning")
    assert "k" not in json.loads((tmp_path / "theirs" / "config.json").read_text())["trainer"]
    assert load_sae(tmp_path / "theirs").cfg.stated_k is None


def test_a_foreign_sae_of_another_name_is_told(tiny_llama: Any, recwarn: Any) -> None:
    sae = SAE(SAEConfig(32, 64, 4, source={"tool": "SAELens", "model": "gpt2-small", "layer": 1}))
    tiny_llama.config.name_or_path = "me/gpt2-small"
    assert sae_place(sae, tiny_llama, "it") == (1, "resid_post")
    assert not recwarn.list
    tiny_llama.config.name_or_path = "openai-community/gpt2"
    with pytest.warns(
        UserWarning, match="an SAE of gpt2-small, as SAELens calls it; the model is openai-comm"
    ):
        sae_place(sae, tiny_llama, "it")
    sae.cfg.source["layer"] = 3
    with pytest.raises(SteerError, match="an SAE of layer 3, and the model has layers 0 to 2"):
        sae_place(sae, tiny_llama, "it")


def test_a_release_needs_saelens(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("steer.extras.find_spec", lambda name: None if name == "sae_lens" else True)
    assert main(["sae", "info", "gemma-scope-2-270m-pt-res:layer_12_width_16k_l0_small"]) == 1
    assert 'needs sae_lens: pip install "steer-rl[sae-lens]"' in capsys.readouterr().err


# ---- with SAELens


@pytest.fixture
def sae_lens() -> Any:
    return pytest.importorskip("sae_lens", reason="sae_lens is not installed", exc_type=ImportError)


def theirs(sae_lens: Any, folder: Path, kind: str, **changes: Any) -> Any:
    """An SAE of SAELens's own class, which it also saves."""
    made = sae_lens.SAE.from_dict(settings(kind, **changes))
    made.load_state_dict(weights(kind))
    made.save_model(folder)
    return made


TIED = [{}, {"apply_b_dec_to_input": False}]
CASES = [(kind, changes) for kind in ARCHITECTURES for changes in TIED]
CASES += [("topk", {**changes, "rescale_acts_by_decoder_norm": True}) for changes in TIED]


@pytest.mark.parametrize(("kind", "changes"), CASES)
def test_features_equal_those_of_saelens(
    sae_lens: Any, tmp_path: Path, kind: str, changes: dict[str, Any]
) -> None:
    other, x = theirs(sae_lens, tmp_path, kind, **changes), rows()
    sae = load_sae(tmp_path)
    compare(sae, other, x)
    assert (sae.cfg.source["layer"], sae.cfg.source["site"]) == (1, "resid_post")


def test_every_setting_and_architecture_of_saelens_has_an_answer(sae_lens: Any) -> None:
    """What a newer SAELens adds is refused by name until it is put in a list."""
    from sae_lens import registry

    ours = {*HONOURED, *ACTIVATION, *PLACE, *IRRELEVANT, *PLAIN, "metadata"}
    for kind in registry.SAE_CLASS_REGISTRY:
        own = {field.name for field in fields(registry.get_sae_class(kind)[1])}
        if kind in ARCHITECTURES:
            assert own <= ours, kind
        else:
            with pytest.raises(SteerError, match=f"architecture='{kind}' is not known here"):
                from_saelens(settings(kind), {})


@pytest.mark.parametrize("kind", ["standard", "jumprelu"])
@pytest.mark.parametrize("name", ["constant_norm_rescale", "layer_norm", "covariance_whitening"])
def test_normalisations_of_saelens_are_refused(sae_lens: Any, tmp_path: Path, name: str, kind: str) -> None:
    theirs(sae_lens, tmp_path, kind, normalize_activations=name)
    with pytest.raises(SteerError, match=f"normalize_activations='{name}' is not known here"):
        load_sae(tmp_path)


@pytest.fixture
def hub(sae_lens: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in the place of the hub, and three releases that SAELens's directory has besides its own."""
    from sae_lens.loading import pretrained_sae_loaders as loaders
    from sae_lens.loading.pretrained_saes_directory import PretrainedSAELookup, get_pretrained_saes_directory
    from safetensors import safe_open

    def fetched(repo_id: str, filename: str, subfolder: str = "", **options: Any) -> str:
        path = tmp_path / repo_id / subfolder / filename
        if not path.exists():
            raise loaders.EntryNotFoundError(f"no {path}")
        return str(path)

    def shapes(repo_id: str, filename: str) -> dict[str, list[int]]:
        with safe_open(fetched(repo_id, filename), "pt") as file:
            return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118

    monkeypatch.setattr(loaders, "hf_hub_download", fetched)
    monkeypatch.setattr(loaders, "get_safetensors_tensor_shapes", shapes)
    for release, repo_id, function, ids, factors in (
        ("made-res", "me/made", None, {"one": "one", "scaled": "scaled", "lost": "lost"}, {"scaled": 0.05}),
        (
            "made-scope-2",
            "google/gemma-scope-2-270m-pt",
            "gemma_3",
            {"l3": "resid_post/layer_3_width_16k"},
            {},
        ),
        (
            "made-qwen",
            "Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_50",
            "qwen_scope",
            {"layer5": "layer5.sae.pt"},
            {},
        ),
    ):
        lookup = PretrainedSAELookup(release, repo_id, "me/model", function, ids, {}, {}, {}, factors, None)
        monkeypatch.setitem(get_pretrained_saes_directory(), release, lookup)
    return tmp_path


def by_saelens(sae_lens: Any, release: str, sae_id: str) -> Any:
    return sae_lens.SAE.from_pretrained(release, sae_id)


def compare(sae: SAE, other: Any, x: torch.Tensor) -> None:
    assert (other.encode(x) > 0).any()
    close(sae.encode(x), other.encode(x))
    close(sae(x), other(x))


def test_a_release(sae_lens: Any, hub: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theirs(sae_lens, hub / "me/made/one", "jumprelu")
    sae = load_sae("made-res:one")
    compare(sae, by_saelens(sae_lens, "made-res", "one"), rows())
    assert sae.cfg.source == {
        "tool": "SAELens", "model": "gpt2-small", "hook": "blocks.1.hook_resid_post", "layer": 1,
        "site": "resid_post", "k": None, "release": "made-res", "id": "one",
    }  # fmt: skip
    compare(load_sae("me/made:one"), by_saelens(sae_lens, "made-res", "one"), rows())  # straight from the hub
    assert main(["sae", "info", "made-res:one"]) == 0
    assert "release     made-res" in capsys.readouterr().out


def test_a_release_whose_inputs_are_scaled(sae_lens: Any, hub: Path) -> None:
    theirs(sae_lens, hub / "me/made/scaled", "standard", normalize_activations="expected_average_only_in")
    sae, other = load_sae("made-res:scaled"), by_saelens(sae_lens, "made-res", "scaled")
    compare(sae, other, rows())
    # rows of the decoder are in units of the model's own activations
    torch.testing.assert_close(sae.W_dec, weights("standard")["W_dec"] / 0.05)


def test_gemma_scope_2(sae_lens: Any, hub: Path) -> None:
    folder = hub / "google/gemma-scope-2-270m-pt/resid_post/layer_3_width_16k"
    folder.mkdir(parents=True)
    w = weights("jumprelu")
    names = {"w_enc": "W_enc", "w_dec": "W_dec", "b_enc": "b_enc", "b_dec": "b_dec", "threshold": "threshold"}
    save_file({name: w[one] for name, one in names.items()}, folder / "params.safetensors")
    config = {"architecture": "jump_relu", "model_name": "gemma-v3-270m-pt"}
    (folder / "config.json").write_text(json.dumps({**config, "hf_hook_point_in": "model.layers.3.output"}))
    sae = load_sae("made-scope-2:l3")
    compare(sae, by_saelens(sae_lens, "made-scope-2", "l3"), rows())
    source = sae.cfg.source
    assert (source["model"], source["layer"], source["site"]) == ("google/gemma-3-270m", 3, "resid_post")


def test_qwen_scope(sae_lens: Any, hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sae_lens.loading import pretrained_sae_loaders as loaders

    monkeypatch.setitem(loaders.QWEN_SCOPE_MODEL_INFO, "Qwen3-1.7B-Base", ("Qwen/Qwen3-1.7B-Base", D_IN))
    monkeypatch.setattr(loaders, "_parse_qwen_scope_repo_id", lambda name: ("Qwen3-1.7B-Base", D_SAE, 5))
    folder = hub / "Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_50"
    folder.mkdir(parents=True)
    w = weights("topk")
    saved = {"W_enc": w["W_enc"].T, "W_dec": w["W_dec"].T, "b_enc": w["b_enc"], "b_dec": w["b_dec"]}
    torch.save({name: value.contiguous() for name, value in saved.items()}, folder / "layer5.sae.pt")
    sae = load_sae("made-qwen:layer5")
    compare(sae, by_saelens(sae_lens, "made-qwen", "layer5"), rows())
    assert (sae.cfg.k, sae.cfg.source["model"], sae.cfg.source["layer"]) == (5, "Qwen/Qwen3-1.7B-Base", 5)


@pytest.mark.parametrize(
    ("release", "sae_id", "expected"),
    [
        ("made-ress", "one", "knows no release 'made-ress'; near it are"),
        ("made-res", "ones", "has no SAE 'ones' among its 3; near it are 'one"),
        ("made-res", "lost", "cannot load 'lost' of 'made-res' from me/made"),
    ],
)
def test_releases_that_are_not_there(hub: Path, release: str, sae_id: str, expected: str) -> None:
    with pytest.raises(SteerError) as error:
        from_release(release, sae_id)
    assert expected in message(error)
    with pytest.raises(SteerError) as error:
        load_sae(f"{release}:{sae_id}")
    assert message(error).startswith(f"{release}:{sae_id}: ")


def test_the_releases_that_saelens_lists(hub: Path) -> None:
    """The names in the documentation are in its directory."""
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    assert (
        "layer_12_width_16k_l0_medium"
        in get_pretrained_saes_directory()["gemma-scope-2-270m-pt-res"].saes_map
    )
    assert "layer0" in get_pretrained_saes_directory()["qwen-scope-3-1.7b-base-w32k-l50"].saes_map
