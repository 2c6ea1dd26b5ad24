"""
Vectors brought into another model. The truth is known where the recipient is the donor in other coordinates:
a Llama whose stream is turned by an isometry Q computes the same logits, and the exact answer is Q v.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.steering import fill, logits, message, relative, tokens
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import steer
from steer import SteerError, artifact
from steer.artifact import Artifact
from steer.transfer import transfer

# Steered logits of the two models agree to this, relative to the logits: float32 activations, some hundred
# tokens a dimension.
EXACT = 1e-3


def sample(count: int = 60, length: int = 90, seed: int = 0) -> list[str]:
    """Random letters: each is met in many contexts, so that the streams span all their dimensions."""
    rng = random.Random(seed)
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789+-*/=?.,  "
    return ["".join(rng.choices(letters, k=length)) for _ in range(count)]


TEXTS = sample()


@pytest.fixture
def word_tokenizer(tiny_tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Two characters a token: cuts every text differently than the tokenizer of one character a token."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3}
    two = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    two.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]{1,2}"), behavior="isolated")
    two.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=two, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def loud(model: PreTrainedModel) -> PreTrainedModel:
    """Norm weights that are not 1, and layers that change the stream as much as the embeddings do."""
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.copy_(0.5 + torch.rand(parameter.shape, generator=generator))
            elif "embed" not in name:
                parameter.mul_(6)
    return model


def turned(donor: PreTrainedModel, q: torch.Tensor, build: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    """
    The Llama that computes the same with the stream h Q, q (width, other width) with orthonormal rows: norm
    weights are folded into the matrices that read them, readers get Q on their inputs, writers on their
    outputs.
    """
    width, other = q.shape
    grown = build(
        "llama", hidden_size=other, head_dim=donor.config.hidden_size // donor.config.num_attention_heads
    )
    # A norm divides by the root of a mean over the dimensions: both are made up for where there are more.
    grown.config.rms_norm_eps = donor.config.rms_norm_eps * width / other
    state, new = donor.state_dict(), grown.state_dict()
    for name in new:
        old = state[name].double()
        if "norm" in name:
            new[name] = torch.full((other,), (width / other) ** 0.5)
            continue
        if any(part in name for part in ("q_proj", "k_proj", "v_proj")):
            old = old * state[name.split("self_attn")[0] + "input_layernorm.weight"].double()
        if any(part in name for part in ("gate_proj", "up_proj")):
            old = old * state[name.split("mlp")[0] + "post_attention_layernorm.weight"].double()
        if name == "lm_head.weight":
            old = old * state["model.norm.weight"].double()
        new[name] = (q.T @ old if any(part in name for part in ("o_proj", "down_proj")) else old @ q).float()
    grown.load_state_dict(new)
    for module in grown.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = grown.config.rms_norm_eps
    return grown


def isometry(width: int, other: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(other, other, generator=generator, dtype=torch.float64)).Q[:width]


def trained(model: PreTrainedModel, **config: Any) -> Artifact:
    """Random vectors for `model`, which is left as it was."""
    vectors = fill(steer.attach(model, steer.SteeringConfig(**config)), std=0.05)
    found = Artifact(vectors.config, vectors.tensors())
    steer.detach(model)
    return found


def steered(model: PreTrainedModel, vectors: Artifact, ids: torch.Tensor) -> torch.Tensor:
    steer.load(vectors, model)
    found = logits(model, ids)
    steer.detach(model)
    return found


@pytest.fixture
def give(tiny_tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    return {"donor_tokenizer": tiny_tokenizer, "recipient_tokenizer": tiny_tokenizer}


@pytest.mark.parametrize("method", ["procrustes", "ridge"])
@pytest.mark.parametrize("other", [32, 48])
@pytest.mark.parametrize("site", ["resid_post", "resid_pre"])
def test_a_turned_model_gets_the_turned_vectors(build_tiny, give, method: str, other: int, site: str) -> None:
    donor = loud(build_tiny("llama"))
    q = isometry(32, other)
    recipient = turned(donor, q, build_tiny)
    ids = tokens()
    assert relative(logits(recipient, ids), logits(donor, ids)) < 1e-5  # the truth is the truth
    source = trained(donor, site=site)
    options = {"ridge": 1e-9} if method == "ridge" else {}
    found = transfer(source, donor, recipient, method=method, texts=TEXTS, rescale=False, **options, **give)
    for layer, vector in found.artifact.by_layer().items():
        assert relative(vector, (source.by_layer()[layer].double() @ q).float()) < EXACT
    assert relative(steered(donor, source, ids), logits(donor, ids)) > 0.1  # not vectors that do nothing
    assert relative(steered(recipient, found.artifact, ids), steered(donor, source, ids)) < EXACT
    assert found.report.mean_r2 > 0.999
    assert "measure accuracy" in found.report.verdict()  # the best of maps promises nothing
    assert all(row.cka > 0.999 for row in found.report.layers)
    assert all(
        row.relative_after == pytest.approx(row.relative_before, rel=1e-3) for row in found.report.layers
    )


def test_rescaled_vectors_keep_their_length_in_units_of_the_stream(build_tiny, give) -> None:
    """A stream ten times as large is the same after a norm: the exact answer is ten times the vector."""
    donor = loud(build_tiny("llama"))
    recipient = build_tiny("llama")
    recipient.load_state_dict(donor.state_dict())
    with torch.no_grad():
        for name, parameter in recipient.named_parameters():
            if any(part in name for part in ("embed_tokens", "o_proj", "down_proj")):
                parameter.mul_(10)
    for module in recipient.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon *= 100
    source, ids = trained(donor), tokens()
    found = transfer(source, donor, recipient, texts=TEXTS, **give)
    assert found.report.method == "direct"
    assert found.report.mean_r2 == pytest.approx(1, abs=1e-6)
    assert relative(steered(recipient, found.artifact, ids), steered(donor, source, ids)) < 1e-4
    for row in found.report.layers:
        assert row.norm_after == pytest.approx(10 * row.norm_before, rel=1e-4)
        assert row.cosine == pytest.approx(1)
    # Left at its length the copy is no longer the model's own map, and the report knows.
    assert (
        transfer(source, donor, recipient, texts=TEXTS, rescale=False, method="ridge", **give).report.mean_r2
        > 0.99
    )
    with pytest.raises(SteerError) as error:
        transfer(
            source, donor, recipient, texts=TEXTS, method="direct", rescale=False, layers_by="cka", **give
        )
    assert "method='ridge'" in message(error)


def test_the_same_model_gets_the_same_vectors(build_tiny, tiny_model, give) -> None:
    source, ids = trained(tiny_model), tokens()
    found = transfer(source, tiny_model, tiny_model, texts=TEXTS, **give)
    assert (found.report.method, found.report.mean_r2) == ("direct", pytest.approx(1))
    assert "expect the effect" in found.report.verdict()
    assert found.artifact.config.layers == "0-2"
    assert relative(steered(tiny_model, found.artifact, ids), steered(tiny_model, source, ids)) < 1e-6


def test_an_unrelated_model_of_the_same_shape_is_no_direct_recipient(build_tiny, give) -> None:
    donor, recipient = loud(build_tiny("llama")), loud(build_tiny("llama", seed=1))
    source = trained(donor)
    with pytest.raises(SteerError) as error:
        transfer(source, donor, recipient, method="direct", texts=TEXTS, **give)
    assert "explains" in message(error)
    assert "force=True" in message(error)
    forced = transfer(source, donor, recipient, method="direct", texts=TEXTS, force=True, **give)
    assert forced.report.mean_r2 < 0.2
    assert all(row.cosine == pytest.approx(1) for row in forced.report.layers)
    turn = turned(donor, isometry(32, 32), build_tiny)
    found = transfer(source, donor, turn, texts=TEXTS, **give)  # auto sees that, and maps
    assert found.report.method == "ridge"
    assert found.report.mean_r2 > 0.99
    assert all(row.penalty is not None and abs(row.cosine) < 0.9 for row in found.report.layers)


def test_a_donor_with_other_weights_is_noted(build_tiny, give) -> None:
    donor, other = loud(build_tiny("llama")), loud(build_tiny("llama", seed=1))
    found = transfer(trained(donor), other, other, texts=TEXTS, **give)
    assert "other weights" in found.report.text()
    assert not transfer(trained(donor), donor, donor, texts=TEXTS, **give).report.notes


def test_unrelated_streams_are_refused(build_tiny, give, word_tokenizer) -> None:
    """The recipient sees one <unk> after the other: nothing of the text is in its stream."""
    donor, recipient = loud(build_tiny("llama")), loud(build_tiny("gpt2", seed=1, n_embd=16))
    source = trained(donor)
    give["recipient_tokenizer"] = word_tokenizer
    with pytest.raises(SteerError) as error:
        transfer(source, donor, recipient, texts=sample(120), method="procrustes", **give)
    assert "less than min_r2=0.2" in message(error)


@pytest.mark.parametrize("kind", ["qwen2", "gemma3_text", "gpt2", "gpt_neox"])
def test_another_architecture_width_depth_and_tokenizer(build_tiny, give, word_tokenizer, kind: str) -> None:
    size = {"n_embd": 24, "n_layer": 5} if kind == "gpt2" else {"hidden_size": 24, "num_hidden_layers": 5}
    donor, recipient = build_tiny("llama"), build_tiny(kind, seed=3, **size)
    source = trained(donor, layers="0,2", positions="completion", scale=-2.0, dtype="float64")
    give["recipient_tokenizer"] = word_tokenizer
    found = transfer(source, donor, recipient, texts=TEXTS, force=True, **give)
    config = found.artifact.config
    assert (config.hidden_size, config.num_hidden_layers, config.model_type) == (
        24,
        5,
        recipient.config.model_type,
    )
    assert (config.site, config.positions, config.scale, config.dtype) == (
        "resid_post",
        "completion",
        1.0,
        "float64",
    )
    assert config.layers == "0,3-4"  # the last two share the donor's last
    assert config.provenance["transfer"]["method"] == "ridge"
    vectors = steer.load(found.artifact, recipient)  # names and shapes are the recipient's own
    assert vectors.layers == [0, 3, 4]
    steer.detach(recipient)
    # half of all characters end a token of two
    assert found.report.pairs + found.report.held_out < sum(map(len, TEXTS)) / 2


def longer(
    donor: PreTrainedModel, order: list[int], build: Callable[..., PreTrainedModel]
) -> PreTrainedModel:
    """The donor with idle layers (None: -1) between its own: the same stream, the same logits."""
    found = build("llama", num_hidden_layers=len(order))
    state = {n: v for n, v in donor.state_dict().items() if ".layers." not in n}
    for new, old in enumerate(order):
        for name, value in donor.model.layers[max(old, 0)].state_dict().items():
            idle = old < 0 and ("o_proj" in name or "down_proj" in name)
            state[f"model.layers.{new}.{name}"] = torch.zeros_like(value) if idle else value
    found.load_state_dict(state)
    return found


@pytest.mark.parametrize("order", [[0, -1, 1, -1, 2], [-1, 0, 1, 2], [0, 1, 2, -1, -1, -1]])
def test_layers_are_matched_by_likeness(build_tiny, give, order: list[int]) -> None:
    donor = loud(build_tiny("llama"))
    recipient = longer(donor, order, build_tiny)
    source, ids = trained(donor), tokens()
    found = transfer(source, donor, recipient, layers_by="cka", texts=TEXTS, **give)
    assert found.report.method == "direct"
    assert relative(steered(recipient, found.artifact, ids), steered(donor, source, ids)) < 1e-5
    by_depth = transfer(
        source, donor, recipient, method="direct", texts=TEXTS, force=True, rescale=False, **give
    )
    total = sum(source.by_layer().values())
    assert relative(sum(by_depth.artifact.by_layer().values()), total) < 1e-6  # spread, yet the same in sum
    assert by_depth.artifact.config.resolve_layers(len(order)) == list(range(len(order)))


def test_layers_that_meet_are_added_up(build_tiny, give) -> None:
    donor = loud(build_tiny("llama", num_hidden_layers=5))
    recipient = loud(build_tiny("llama", num_hidden_layers=3))
    source = trained(donor)
    found = transfer(
        source, donor, recipient, method="direct", rescale=False, texts=TEXTS, force=True, **give
    )
    given = source.by_layer()
    expected = {0: given[0], 1: given[1] + given[2], 2: given[3] + given[4]}
    torch.testing.assert_close(found.artifact.by_layer(), expected)
    assert "5 layers' vectors were added up in 3" in found.report.text()


def test_a_plain_copy_runs_no_model_and_asks_for_no_donor(build_tiny) -> None:
    donor, recipient = build_tiny("llama"), build_tiny("llama", seed=1)
    source = trained(donor)
    recipient.forward = recipient.model.forward = None
    found = transfer(source, None, recipient, method="direct", rescale=False)
    torch.testing.assert_close(found.artifact.by_layer(), source.by_layer())
    assert found.artifact.config.base_checksum != source.config.base_checksum
    assert found.report.mean_r2 is None
    assert "nothing was measured" in found.report.text()


@pytest.mark.parametrize("kind", ["adaptive", "shared"])
def test_other_kinds_keep_their_kind_in_a_model_of_the_same_shape(build_tiny, give, kind: str) -> None:
    donor = loud(build_tiny("llama"))
    recipient = build_tiny("llama")
    recipient.load_state_dict(donor.state_dict())
    with torch.no_grad():
        for parameter in recipient.model.layers[1].mlp.parameters():
            parameter.mul_(1.05)
    source, ids = trained(donor, kind=kind, rank=2, scale=1.5), tokens()
    copied = transfer(source, donor, recipient, method="direct", rescale=False, texts=TEXTS, **give)
    assert copied.artifact.config.kind == kind
    assert torch.equal(steered(recipient, copied.artifact, ids), steered(recipient, source, ids))
    judged = transfer(source, donor, recipient, rescale=False, texts=TEXTS, **give)  # a copy, yet measured
    assert 0.2 < judged.report.mean_r2 < 1
    assert torch.equal(steered(recipient, judged.artifact, ids), steered(recipient, source, ids))
    scaled = transfer(source, donor, recipient, texts=TEXTS, **give)
    assert scaled.artifact.config.kind == kind
    for row in scaled.report.layers:
        part = "mix" if kind == "shared" else "vector"
        name = f"model.layers.{row.donor}.steering.{part}"
        torch.testing.assert_close(
            scaled.artifact.tensors[name], source.tensors[name] * (row.norm_after / row.norm_before)
        )
    assert scaled.report.layers[2].norm_after != pytest.approx(scaled.report.layers[2].norm_before, rel=1e-3)


def test_shared_vectors_go_elsewhere_as_constant_ones(build_tiny, give) -> None:
    donor = loud(build_tiny("llama"))
    q = isometry(32, 48)
    recipient = turned(donor, q, build_tiny)
    source, ids = trained(donor, kind="shared", rank=2), tokens()
    found = transfer(source, donor, recipient, method="procrustes", texts=TEXTS, **give)
    assert found.artifact.config.kind == "constant"
    assert "the shared vectors became constant ones" in found.report.text()
    assert relative(steered(recipient, found.artifact, ids), steered(donor, source, ids)) < EXACT


@pytest.mark.parametrize("change", [{"intermediate_size": 64}, {"num_hidden_layers": 4}, {"hidden_size": 64}])
def test_adaptive_vectors_stay_where_they_can_be_read(build_tiny, give, change: dict[str, int]) -> None:
    donor = build_tiny("llama")
    source = trained(donor, kind="adaptive")
    with pytest.raises(SteerError) as error:
        transfer(source, donor, build_tiny("llama", **change), texts=TEXTS, **give)
    assert "inner space" in message(error)
    for wrong in ({"method": "ridge"}, {"layers_by": "cka"}):
        with pytest.raises(SteerError):
            transfer(source, donor, build_tiny("llama"), texts=TEXTS, **wrong, **give)


def test_module_outputs_are_copied_but_never_mapped(build_tiny, give) -> None:
    donor = build_tiny("llama")
    source = trained(donor, site="attn_out")
    assert transfer(source, donor, donor, texts=TEXTS, **give).artifact.config.site == "attn_out"
    for other, options in ((donor, {"method": "ridge"}), (build_tiny("llama", hidden_size=64), {})):
        with pytest.raises(SteerError) as error:
            transfer(source, donor, other, texts=TEXTS, **options, **give)
        assert "attn_out" in message(error)


def test_resid_mid_is_mapped_and_needs_the_site(build_tiny, give) -> None:
    donor = loud(build_tiny("llama"))
    source = trained(donor, site="resid_mid")
    recipient = turned(donor, isometry(32, 48), build_tiny)
    found = transfer(source, donor, recipient, method="procrustes", texts=TEXTS, **give)
    ids = tokens()
    assert relative(steered(recipient, found.artifact, ids), steered(donor, source, ids)) < EXACT
    with pytest.raises(SteerError) as error:
        transfer(source, donor, build_tiny("gpt_neox"), texts=TEXTS, **give)
    assert "resid_mid" in message(error)


def test_the_recipient_may_have_vectors_that_ask_where_a_prompt_ends(build_tiny) -> None:
    source, recipient = trained(build_tiny("llama"), site="resid_mid"), build_tiny("llama", seed=1)
    steer.attach(recipient, steer.SteeringConfig(positions="completion"))
    found = transfer(source, None, recipient, method="direct", rescale=False)
    torch.testing.assert_close(found.artifact.by_layer(), source.by_layer())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "cca"}, "procrustes"),
        ({"layers_by": "name"}, "cka"),
        ({"ridge": -1.0}, "penalty"),
        ({"ridge": float("nan")}, "penalty"),
        ({"texts": []}, "empty"),
        ({"texts": ["abc"]}, "0 paired tokens to fit on and 2 to judge on"),
        ({"texts": TEXTS[:2]}, "needs at least 33 and 50"),
    ],
)
def test_mistakes_are_named(build_tiny, give, options: dict[str, Any], words: str) -> None:
    donor, recipient = build_tiny("llama"), build_tiny("llama", hidden_size=48)
    with pytest.raises(SteerError) as error:
        transfer(trained(donor), donor, recipient, **{"texts": TEXTS, **options}, **give)
    assert words in message(error)


def test_other_mistakes_are_named(build_tiny, give, tmp_path) -> None:
    donor, other = build_tiny("llama"), build_tiny("llama", hidden_size=48)
    source = trained(donor)
    for wrong, words in (
        ((source, other, donor, {}), "not the donor's"),
        ((source, donor, other, {"method": "direct"}), "32 and 48"),
        ((tmp_path / "nothing", donor, other, {}), "no steering vectors"),
        ((source, None, other, {}), "does not name its base model"),
    ):
        with pytest.raises(SteerError) as error:
            transfer(*wrong[:3], texts=TEXTS, **wrong[3], **give)
        assert words in message(error)
    with pytest.raises(SteerError) as error:
        transfer(source, donor, other, texts=TEXTS)
    assert "pass the tokenizer too" in message(error)


def test_the_report_is_json_and_the_artifact_is_saved_with_its_history(build_tiny, give, tmp_path) -> None:
    donor, recipient = loud(build_tiny("llama")), loud(build_tiny("llama", seed=1, hidden_size=48))
    source = trained(donor, provenance={"recipe": "x", "results": {"accuracy": 0.9}})
    artifact.write(tmp_path / "a", source)
    found = transfer(tmp_path / "a", donor, recipient, texts=TEXTS, force=True, **give)
    values = json.loads(json.dumps(found.report.to_dict()))
    assert values["method"] == "ridge"
    assert len(values["layers"]) == 3
    assert values["verdict"] == found.report.verdict()
    assert values["layers"][0]["cosine"] is None
    table = found.report.text().splitlines()
    assert len(table) >= 3 + len(values["layers"])
    assert table[-1] == values["verdict"]
    artifact.write(tmp_path / "b", found.artifact)
    again = artifact.read(tmp_path / "b")
    assert again.config.provenance["recipe"] == "x"
    assert "results" not in again.config.provenance  # the scores were the donor's
    assert again.config.provenance["transfer"]["mean_r2"] == values["mean_r2"]
    assert again.config.tokenizer_checksum is not None
    torch.testing.assert_close(again.by_layer(), found.artifact.by_layer())


@pytest.mark.real
def test_attention_sinks_of_real_weights_decide_nothing(smollm2) -> None:
    """SmolLM2's first token has a hundred times the norm of the others from layer 11 on."""
    from steer.models import load_tokenizer
    from steer.transfer.activations import builtin_texts

    tokenizer = load_tokenizer("smollm2-135m-instruct")
    source = trained(smollm2, layers="0,15,29")
    found = transfer(
        source,
        smollm2,
        smollm2,
        texts=builtin_texts(4000),
        donor_tokenizer=tokenizer,
        recipient_tokenizer=tokenizer,
    )
    assert found.report.mean_r2 == pytest.approx(1)
    assert all(row.cka == pytest.approx(1) for row in found.report.layers)
    norms = [row.norm_before / row.relative_before for row in found.report.layers]
    assert 20 < norms[0] < norms[1] < norms[2] < 2000


def test_a_tokenizer_is_of_the_revision_of_its_model(
    tiny_llama: Any, build_tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def load(name: str, *, revision: str | None, trust_remote_code: bool) -> None:
        asked.append((name, revision))
        raise SteerError("that is all")

    monkeypatch.setattr("steer.models.load_tokenizer", load)
    source = trained(tiny_llama)
    tiny_llama.config.name_or_path, tiny_llama.steer_revision = "org/tiny", "v1"
    with pytest.raises(SteerError, match="that is all"):
        transfer(source, tiny_llama, build_tiny("llama", seed=1), method="ridge")
    assert asked == [("org/tiny", "v1")]
