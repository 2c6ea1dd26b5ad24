"""
SAE files: both ways in four formats, equal features, the foreign packages where they are, and bad files.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.steering import message
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from steer.errors import SteerError
from steer.sae import SAE, SAEConfig, foreign, load_sae, saelens, save_sae
from steer.sae.files import FILES, as_dense, detect
from steer.sae.place import sae_place

SOURCE = {"model": "made", "layer": 4, "site": "resid_post"}


def make(**settings: object) -> SAE:
    sae = SAE(SAEConfig(**{"d_in": 12, "d_sae": 48, "k": 5, "source": SOURCE, **settings}))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        sae.b_dec.normal_(generator=generator)
        sae.encoder.bias.normal_(std=0.3, generator=generator)
        sae.encoder.weight.add_(0.1 * torch.randn(sae.encoder.weight.shape, generator=generator))
        if sae.cfg.activation == "jumprelu":
            sae.log_threshold.normal_(generator=generator)
        if sae.cfg.activation == "batchtopk":
            sae.threshold.fill_(0.7)
    return sae.eval()


def rows(count: int = 60) -> torch.Tensor:
    return torch.randn(count, 12, generator=torch.Generator().manual_seed(3))


CASES = [
    *[("steer", {"encoder": e, "activation": a}) for e in ("dense", "kron") for a in ("topk", "jumprelu")],
    ("steer", {"loss": "hierarchical", "prefixes": [1, 5]}),
    *[("steer", {"encoder": "kron", "interaction": i}) for i in ("relu_product", "product")],
    ("steer", {"encoder": "kron", "loss": "matryoshka", "activation": "batchtopk"}),
    *[
        (format, {"loss": "matryoshka", "activation": "batchtopk", "prefixes": [4, 48]})
        for format in ("steer", "saelens", "dictionary_learning")
    ],
    *[
        ("saelens", {"activation": a, "bias": b})
        for a in ("topk", "jumprelu", "batchtopk")
        for b in ("tied", "free")
    ],
    *[("sparsify", {"bias": b}) for b in ("tied", "free")],
    *[
        ("dictionary_learning", {"activation": a, "bias": b})
        for a in ("topk", "batchtopk", "jumprelu")
        for b in ("tied", "free")
    ],
]


@pytest.mark.parametrize(("format", "settings"), CASES)
def test_what_is_saved_loads_with_equal_features(format, settings, tmp_path):
    """float32; a bias moved from free to tied is rounded once: 1e-5."""
    sae, x = make(**settings), rows()
    save_sae(sae, tmp_path, format)
    assert detect(tmp_path) == format
    found = load_sae(tmp_path)
    expected = sae.encode(x)
    assert (expected > 0).any()
    torch.testing.assert_close(found.encode(x), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found(x), sae(x), rtol=1e-5, atol=1e-5)
    if format == "steer":
        assert found.cfg == sae.cfg
        assert not found.training


@pytest.mark.parametrize("format", ["saelens", "sparsify", "dictionary_learning"])
def test_a_kron_sae_has_no_dense_equal(format, tmp_path):
    with pytest.raises(SteerError) as error:
        save_sae(make(encoder="kron"), tmp_path / "sae", format)
    assert "no equal dense encoder" in message(error)
    assert "6 of 6 heads" in message(error)
    assert not (tmp_path / "sae").exists()


def test_a_kron_sae_whose_factors_are_parallel_is_exactly_dense(tmp_path):
    sae, x = make(encoder="kron"), rows()
    with torch.no_grad():
        for head in range(6):
            part = slice(head, None, 6)  # P_1, P_2, Q_1, ..., Q_4 of one head
            scales = torch.tensor([1.0, 2.0, 3.0, 5.0, 7.0, 11.0]) / 5  # no two products alike
            sae.encoder.weight[part] = scales[:, None] * sae.encoder.weight[head].clone()
            sae.encoder.bias[part] = scales * sae.encoder.bias[head].clone()
    dense = as_dense(sae)
    assert dense.cfg.encoder == "dense"
    torch.testing.assert_close(dense.encode(x), sae.encode(x), rtol=1e-4, atol=1e-5)
    save_sae(sae, tmp_path, "saelens")
    torch.testing.assert_close(load_sae(tmp_path)(x), sae(x), rtol=1e-4, atol=1e-5)


def test_saelens_files_have_the_names_and_shapes_it_reads(tmp_path):
    save_sae(make(), tmp_path, "saelens")
    config = json.loads((tmp_path / "cfg.json").read_text())
    assert config["architecture"] == "topk"
    assert (config["d_in"], config["d_sae"], config["k"]) == (12, 48, 5)
    assert config["apply_b_dec_to_input"] is True
    assert config["metadata"]["hook_name"] == "blocks.4.hook_resid_post"
    shapes = {n: tuple(t.shape) for n, t in load_file(tmp_path / "sae_weights.safetensors").items()}
    assert shapes == {"W_enc": (12, 48), "b_enc": (48,), "W_dec": (48, 12), "b_dec": (12,)}


def test_saelens_activations_in_units_of_the_decoder(tmp_path):
    """A decoder that is not of unit norm, compared as SAELens compares: z times the row's norm."""
    sae, x = make(), rows()
    save_sae(sae, tmp_path, "saelens")
    config = json.loads((tmp_path / "cfg.json").read_text())
    (tmp_path / "cfg.json").write_text(json.dumps({**config, "rescale_acts_by_decoder_norm": True}))
    tensors = load_file(tmp_path / "sae_weights.safetensors")
    norms = torch.linspace(0.5, 2, 48)
    tensors["W_dec"] = tensors["W_dec"] * norms[:, None]
    save_file(tensors, tmp_path / "sae_weights.safetensors")
    z = ((x - sae.b_dec) @ tensors["W_enc"] + tensors["b_enc"]) * norms
    z = z.relu() * torch.zeros_like(z).scatter(1, z.topk(5).indices, 1.0)
    found = load_sae(tmp_path)
    torch.testing.assert_close(found.encode(x), z, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found(x), (z / norms) @ tensors["W_dec"] + sae.b_dec, rtol=1e-5, atol=1e-5)


# --- the packages themselves, where they are installed


@pytest.mark.parametrize("activation", ["topk", "jumprelu", "batchtopk"])
@pytest.mark.parametrize("bias", ["tied", "free"])
def test_sae_lens_loads_ours(activation, bias, tmp_path):
    """The same features from SAELens's own classes; 1e-5 for another order of the products."""
    sae_lens = pytest.importorskip("sae_lens", reason="sae_lens is not installed", exc_type=ImportError)
    sae, x = make(activation=activation, bias=bias), rows()
    theirs = sae_lens.SAE.load_from_disk(save_sae(sae, tmp_path, "saelens"))
    torch.testing.assert_close(theirs.encode(x), sae.encode(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(theirs(x), sae(x), rtol=1e-5, atol=1e-5)
    theirs.save_model(tmp_path / "theirs")
    torch.testing.assert_close(load_sae(tmp_path / "theirs")(x), sae(x), rtol=1e-5, atol=1e-5)


def test_sparsify_loads_ours(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSIFY_DISABLE_TRITON", "1")  # it takes Triton where that is installed, GPU or not
    sparsify = pytest.importorskip("sparsify", reason="sparsify is not installed", exc_type=ImportError)
    sae, x = make(bias="free"), rows()
    theirs = sparsify.SparseCoder.load_from_disk(save_sae(sae, tmp_path, "sparsify"))
    found = theirs(x)
    torch.testing.assert_close(found.sae_out, sae(x), rtol=1e-5, atol=1e-5)
    dense = torch.zeros(60, 48).scatter(1, found.latent_indices, found.latent_acts)
    torch.testing.assert_close(dense, sae.encode(x), rtol=1e-5, atol=1e-5)
    theirs.save_to_disk(tmp_path / "theirs")
    torch.testing.assert_close(load_sae(tmp_path / "theirs")(x), sae(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activation", ["topk", "batchtopk", "jumprelu"])
def test_dictionary_learning_loads_ours(activation, tmp_path):
    pytest.importorskip("dictionary_learning", reason="not installed", exc_type=ImportError)
    from dictionary_learning.dictionary import JumpReluAutoEncoder
    from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
    from dictionary_learning.trainers.top_k import AutoEncoderTopK

    classes = {"topk": AutoEncoderTopK, "batchtopk": BatchTopKSAE, "jumprelu": JumpReluAutoEncoder}
    sae, x = make(activation=activation), rows()
    save_sae(sae, tmp_path, "dictionary_learning")
    theirs = classes[activation].from_pretrained(str(tmp_path / "ae.pt"))
    torch.testing.assert_close(theirs.encode(x), sae.encode(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(theirs(x), sae(x), rtol=1e-5, atol=1e-5)


# --- what a format cannot express, and damaged files


def test_what_a_format_cannot_express_is_refused(tmp_path):
    for sae, format, part in (
        (make(activation="jumprelu"), "sparsify", "no jumprelu SAEs"),
        (SAE(SAEConfig(12, 48, 5, activation="batchtopk")), "saelens", "no threshold"),
        (make(encoder="kron", interaction="product"), "saelens", "quadratic in the input"),
        (make(), "onnx", "steer, saelens, sparsify, dictionary_learning"),
    ):
        with pytest.raises(SteerError) as error:
            save_sae(sae, tmp_path, format)
        assert part in message(error)
    assert not list(tmp_path.iterdir())


def test_another_place_is_not_given_the_name_of_one_of_transformer_lens(tmp_path):
    place = {**SOURCE, "site": "mlp_out"}
    with pytest.raises(SteerError, match="normalises or scales it before it is added to the stream"):
        save_sae(make(source={**place, "added": False}), tmp_path / "lens", "saelens")
    for format in ("saelens", "sparsify", "dictionary_learning"):
        with pytest.raises(SteerError, match="reads differences that vectors make"):
            save_sae(make(source={**SOURCE, "what": "difference"}), tmp_path / "lens", format)
    assert not (tmp_path / "lens").exists()
    with pytest.warns(UserWarning, match="does not say whether its model adds mlp_out"):
        save_sae(make(source=place), tmp_path / "lens", "saelens")
    save_sae(make(source={**place, "added": True}), tmp_path / "lens", "saelens")
    settings_ = json.loads((tmp_path / "lens" / "cfg.json").read_text())
    assert settings_["metadata"]["hook_name"] == "blocks.4.hook_mlp_out"


@pytest.mark.parametrize("format", FILES)
def test_damaged_files_are_refused(format, tmp_path):
    settings, weights = FILES[format]
    save_sae(make(), tmp_path, format)
    whole = (tmp_path / weights).read_bytes()
    (tmp_path / weights).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SteerError) as error:
        load_sae(tmp_path)
    assert "damaged" in message(error)
    (tmp_path / weights).write_bytes(whole)
    (tmp_path / settings).write_text("{")
    with pytest.raises(SteerError) as error:
        load_sae(tmp_path)
    assert "damaged" in message(error)
    (tmp_path / settings).write_text("{}")
    with pytest.raises(SteerError) as error:
        load_sae(tmp_path)
    assert str(tmp_path) in message(error)
    (tmp_path / settings).unlink()
    with pytest.raises(SteerError) as error:
        load_sae(tmp_path)
    assert "holds no SAE" in message(error)


def test_weights_that_do_not_fit_the_settings_are_refused(tmp_path):
    save_sae(make(), tmp_path)
    config = json.loads((tmp_path / "sae_config.json").read_text())
    (tmp_path / "sae_config.json").write_text(json.dumps({**config, "d_in": 13}))
    with pytest.raises(SteerError) as error:
        load_sae(tmp_path)
    assert "W_dec is (48, 12), its settings ask for (48, 13)" in message(error) or "b_dec" in message(error)
    save_sae(make(), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["W_dec"][3, 4] = float("nan")
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(SteerError) as error:
        load_sae(tmp_path)
    assert "W_dec is not a tensor of finite numbers" in message(error)


def test_pickles_that_run_code_are_refused(tmp_path):
    import pickle

    class Bomb:
        def __reduce__(self):
            return (exec, ("raise SystemExit('ran')",))

    save_sae(make(), tmp_path, "dictionary_learning")
    (tmp_path / "ae.pt").write_bytes(pickle.dumps({"encoder.weight": Bomb()}))
    with pytest.raises(SteerError):
        load_sae(tmp_path)


def change_settings(folder: Path, format: str, **changes: object) -> None:
    """Settings of the SAE in `folder`; for dictionary_learning those of the trainer. None removes one."""
    path = folder / FILES[format][0]
    whole = json.loads(path.read_text())
    settings = whole["trainer"] if format == "dictionary_learning" else whole
    settings.update(changes)
    for name, value in changes.items():
        if value is None:
            del settings[name]
    path.write_text(json.dumps(whole))


def test_saelens_topk_as_it_was_saved_before_version_6(tmp_path):
    """A standard SAE with the activation "topk", and k among its arguments: not a ReLU."""
    sae, x = make(), rows()
    save_sae(sae, tmp_path, "saelens")
    old = {"architecture": "standard", "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 5}}
    # as SAELens 5 wrote them
    old |= {"hook_layer": 4, "hook_head_index": None, "dataset_path": "x", "normalize_activations": "none"}
    old |= {"finetuning_scaling_factor": False, "context_size": 128, "sae_lens_training_version": "5.0.0"}
    change_settings(tmp_path, "saelens", **old, k=None, rescale_acts_by_decoder_norm=None)
    found = load_sae(tmp_path)
    assert (found.cfg.activation, found.cfg.k) == ("topk", 5)
    torch.testing.assert_close(found.encode(x), sae.encode(x), rtol=1e-5, atol=1e-5)
    change_settings(tmp_path, "saelens", activation_fn_kwargs={})
    with pytest.raises(SteerError, match="must say how many features are active; this one has no k"):
        load_sae(tmp_path)


def test_saelens_relu(tmp_path):
    sae, x = make(activation="jumprelu"), rows()
    save_sae(sae, tmp_path, "saelens")
    path = tmp_path / "sae_weights.safetensors"
    tensors = load_file(path)
    del tensors["threshold"]
    save_file({**tensors, "scaling_factor": torch.ones(48)}, path)
    change_settings(tmp_path, "saelens", architecture="standard", activation_fn_str="relu")
    expected = ((x - sae.b_dec) @ tensors["W_enc"] + tensors["b_enc"]).relu()
    torch.testing.assert_close(load_sae(tmp_path).encode(x), expected, rtol=1e-5, atol=1e-5)
    save_file({**tensors, "scaling_factor": torch.full((48,), 2.0)}, path)
    with pytest.raises(SteerError, match="SAELens weights scaling_factor are not known here"):
        load_sae(tmp_path)


def test_saelens_counts_activations_in_units_of_the_decoder_only_where_it_says_so(tmp_path):
    """Absent, `rescale_acts_by_decoder_norm` is false, as in SAELens."""
    sae, x = make(), rows()
    save_sae(sae, tmp_path, "saelens")
    tensors = load_file(tmp_path / "sae_weights.safetensors")
    tensors["W_dec"] = tensors["W_dec"] * torch.linspace(0.5, 2, 48)[:, None]
    save_file(tensors, tmp_path / "sae_weights.safetensors")
    change_settings(tmp_path, "saelens", rescale_acts_by_decoder_norm=None)
    torch.testing.assert_close(load_sae(tmp_path).encode(x), sae.encode(x), rtol=1e-5, atol=1e-5)


FOREIGN = ["saelens", "sparsify", "dictionary_learning"]
KNOWN = {*saelens.HONOURED, *saelens.ACTIVATION, *saelens.PLACE, *saelens.IRRELEVANT, *saelens.PLAIN}
KNOWN |= {"d_in", "k", "num_latents", "expansion_factor", "dict_class", "activation_dim", "dict_size"}
KNOWN |= {*foreign.SPARSIFY_IRRELEVANT, *foreign.SPARSIFY_PLAIN, *foreign.DICTIONARY_IRRELEVANT, "metadata"}
VALUES = st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.lists(st.integers(), max_size=2)


@pytest.fixture(scope="module", params=FOREIGN)
def foreign_sae(request, tmp_path_factory):
    """A folder with an SAE in the format of another tool, its settings and its weights."""
    folder = tmp_path_factory.mktemp(request.param)
    save_sae(make(), folder, request.param)
    return folder, request.param, (folder / FILES[request.param][0]).read_text()


@given(name=st.text(min_size=1, max_size=12).filter(lambda name: name not in KNOWN), value=VALUES)
@settings(max_examples=40, deadline=None)
def test_unknown_settings_are_refused_by_name_and_value(foreign_sae, name, value):
    folder, format, whole = foreign_sae
    config = json.loads(whole)
    (config["trainer"] if format == "dictionary_learning" else config)[name] = value
    (folder / FILES[format][0]).write_text(json.dumps(config))
    with pytest.raises(SteerError) as error:
        load_sae(folder)
    assert f"setting {name}={value!r} is not known here" in str(error.value)


@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_any_value_of_a_known_setting_changes_nothing_or_is_refused(foreign_sae, data):
    """Features stay those that were saved, or a SteerError says why (k and the bias may be set)."""
    folder, format, whole = foreign_sae
    config, x = json.loads(whole), rows()
    inner = config["trainer"] if format == "dictionary_learning" else config
    free = {"k", "apply_b_dec_to_input", "rescale_acts_by_decoder_norm"}
    name = data.draw(st.sampled_from(sorted(KNOWN - free)))
    inner[name] = data.draw(VALUES)
    (folder / FILES[format][0]).write_text(json.dumps(config))
    try:
        found = load_sae(folder)
    except SteerError:
        return
    torch.testing.assert_close(found.encode(x), make().encode(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("format", "changes", "part"),
    [
        ("saelens", {"k": None}, "must say how many features are active; this one has no k"),
        ("saelens", {"activation_fn_kwargs": {"k": 7}}, "activation_fn_str='relu' with"),
        (
            "saelens",
            {"activation_fn": "topk", "activation_fn_kwargs": {"k": 7}},
            "two values of k, 5 and 7",
        ),
        ("saelens", {"activation_fn_str": "tanh-relu"}, "activation_fn_str='tanh-relu'"),
        ("saelens", {"architecture": "standard"}, "k=5 is not known for architecture 'standard'"),
        ("saelens", {"apply_b_dec_to_input": "false"}, "apply_b_dec_to_input='false' is neither"),
        ("saelens", {"finetuning_scaling_factor": True}, "finetuning_scaling_factor=True"),
        ("saelens", {"hook_name": "blocks.1.attn.hook_z"}, "hook_name='blocks.1.attn.hook_z' is not known"),
        ("saelens", {"hook_name": "blocks.4.hook_resid_post", "hook_layer": 5}, "hook_layer=5 does not fit"),
        ("saelens", {"hook_head_index": 3}, "hook_head_index=3 is not known here: it is an SAE of one head"),
        (
            "saelens",
            {"model_from_pretrained_kwargs": {"center_writing_weights": True}},
            "model_from_pretrained_kwargs center_writing_weights=True is not known here",
        ),
        ("saelens", {"metadata": ["x"]}, "metadata=['x'] is not a mapping"),
        ("saelens", {"normalize_activations": "expected_average_only_in"}, "'expected_average_only_in' is"),
        ("saelens", {"normalize_activations": "constant_norm_rescale"}, "'constant_norm_rescale' is not"),
        ("saelens", {"use_error_term": True}, "use_error_term=True is not known here"),
        ("sparsify", {"k": None}, "must have 'k'"),
        ("sparsify", {"signed": True}, "signed=True"),
        ("sparsify", {"num_latents": 40}, "num_latents=40, the weights have 48"),
        ("sparsify", {"num_latents": 0, "expansion_factor": 3}, "expansion_factor * d_in=36"),
        ("dictionary_learning", {"k": 6}, "k=6, the weights have 5"),
        ("dictionary_learning", {"dict_size": 40}, "dict_size=40, the weights have 48"),
        ("dictionary_learning", {"target_l0": 6}, "target_l0=6 is not known here"),
    ],
)
def test_settings_that_would_change_the_features_are_refused(format, changes, part, tmp_path):
    save_sae(make(), tmp_path, format)
    change_settings(tmp_path, format, **changes)
    with pytest.raises(SteerError) as error:
        load_sae(tmp_path)
    assert part in message(error)


@pytest.mark.parametrize("format", FOREIGN)
def test_unknown_weights_are_refused(format, tmp_path):
    save_sae(make(), tmp_path, format)
    path = tmp_path / FILES[format][1]
    extra = {"W_skip": torch.zeros(12, 12)}
    if format == "dictionary_learning":
        torch.save({**torch.load(path), **extra}, path)
    else:
        save_file({**load_file(path), **extra}, path)
    with pytest.raises(SteerError, match="weights W_skip are not known here"):
        load_sae(tmp_path)


@pytest.mark.parametrize(
    ("format", "change", "part"),
    [
        ("saelens", {"architecture": "transcoder"}, "transcoder"),
        ("saelens", {"normalize_activations": "layer_norm"}, "layer_norm"),
        ("sparsify", {"activation": "groupmax"}, "groupmax"),
        ("sparsify", {"transcode": True}, "transcoder"),
        ("dictionary_learning", {"trainer": {"dict_class": "GatedAutoEncoder"}}, "GatedAutoEncoder"),
    ],
)
def test_variants_that_are_not_known_are_named(format, change, part, tmp_path):
    save_sae(make(), tmp_path, format)
    path = tmp_path / FILES[format][0]
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(SteerError) as error:
        load_sae(tmp_path)
    assert part in message(error)


def test_where_an_sae_of_sparsify_reads(tmp_path, tiny_llama):
    """It is told by the folder, and by the run's settings beside it."""
    save_sae(make(), tmp_path / "layers.12", "sparsify")
    assert load_sae(tmp_path / "layers.12").cfg.source == {
        "tool": "sparsify", "layer": 12, "site": "resid_post",
    }  # fmt: skip
    (tmp_path / "config.json").write_text('{"model": "me/model", "lr": 1}')
    assert load_sae(tmp_path / "layers.12").cfg.source["model"] == "me/model"
    save_sae(make(d_in=32), tmp_path / "layers.12.mlp", "sparsify")
    inside = load_sae(tmp_path / "layers.12.mlp")
    assert inside.cfg.source == {"tool": "sparsify", "hook": "layers.12.mlp"}
    tiny_llama.config.name_or_path = "me/model"
    with pytest.raises(SteerError, match=r"it reads layers\.12\.mlp, which is not known here"):
        sae_place(inside, tiny_llama, "it", 1)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(SteerError):
        load_sae(tmp_path / "layers.12")


def test_where_an_sae_of_dictionary_learning_reads(tmp_path, tiny_llama):
    save_sae(make(d_in=32), tmp_path, "dictionary_learning")
    place = {"model": "made", "layer": 4, "site": "resid_post"}
    assert load_sae(tmp_path).cfg.source == {"tool": "dictionary_learning", **place}
    change_settings(tmp_path, "dictionary_learning", submodule_name="resid_post_layer_4")
    assert load_sae(tmp_path).cfg.source == {"tool": "dictionary_learning", **place}
    change_settings(tmp_path, "dictionary_learning", submodule_name="attention_out")
    tiny_llama.config.name_or_path = "me/made"
    with pytest.raises(SteerError, match="it reads attention_out, which is not known here"):
        sae_place(load_sae(tmp_path), tiny_llama, "it", 1)
    assert sae_place(load_sae(tmp_path), tiny_llama, "it", 1, "attn_out") == (1, "attn_out")


def test_an_sae_on_the_hub(tmp_path, monkeypatch):
    asked = []

    def fetch(name, file, revision, token):
        asked.append((name, file))
        return tmp_path / file

    save_sae(make(), tmp_path)
    monkeypatch.setattr("steer.hub.fetch", fetch)
    assert load_sae("me/sae").cfg == make().cfg
    assert asked == [("me/sae", "sae_config.json"), ("me/sae", "model.safetensors")]
    with pytest.raises(SteerError, match="nothing holds no SAE"):
        load_sae("nothing")
