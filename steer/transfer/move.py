"""
Bring vectors into another model.

A vector is a displacement of the residual stream. Into a model that has the donor's own coordinates (a
fine-tune, a pruned copy) it is copied; into any other it goes through a linear map between the two streams,
fitted on the activations of both models over a text sample. Either way the report says how much of the
recipient's stream the map explains on texts it was not fitted on, and a map that explains little is refused.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from steer import artifact as artifacts
from steer.artifact import Artifact, from_vectors
from steer.artifact_scores import without_scores
from steer.artifact_tensors import expected_names
from steer.base_adapter import artifact_base
from steer.config import SteeringConfig
from steer.errors import SteerError
from steer.identity import describe, has_other_weights, tokenizer_checksum
from steer.sites import find_decoder, find_down_projections, find_sites
from steer.transfer.activations import Side, read_texts
from steer.transfer.fit import Fitted, fit, match_by_cka
from steer.transfer.layers import Match, by_depth
from steer.transfer.quality import LayerReport, TransferReport

METHODS = {
    "auto": "direct where the widths agree and the streams do too (R2), ridge otherwise",
    "direct": "the vectors as they are: the recipient has the donor's hidden size and coordinates",
    "procrustes": "an orthogonal map and one factor",
    "ridge": "a linear map by ridge regression",
}
LAYERS_BY = {
    "auto": "depth",
    "depth": "by relative depth",
    "cka": "by the best match, in order, of the streams' linear CKA",
}
# Below this share of explained variance a map is refused: most of what it makes of a vector is chance.
MIN_R2 = 0.2


class Transferred(NamedTuple):
    artifact: Artifact
    report: TransferReport


def transfer(
    artifact: Artifact | str | os.PathLike[str],
    donor: PreTrainedModel | str | None,
    recipient: PreTrainedModel | str,
    *,
    method: str = "auto",
    layers_by: str = "auto",
    rescale: bool = True,
    texts: Sequence[str] | str | os.PathLike[str] | None = None,
    ridge: float | None = None,
    min_r2: float = MIN_R2,
    force: bool = False,
    donor_tokenizer: PreTrainedTokenizerBase | None = None,
    recipient_tokenizer: PreTrainedTokenizerBase | None = None,
    trust_remote_code: bool = False,
) -> Transferred:
    """
    `artifact`, trained in `donor`, as an artifact for `recipient`, with a report of how well it should work.

    donor, recipient: models, or their names. A donor of None is the one that the artifact names.
    method: a key of `METHODS`; layers_by: a key of `LAYERS_BY`.
    rescale: give each vector the length, in units of the mean norm of the stream it is added to, that it had
        in the donor; otherwise a copy keeps its length and a mapped vector has the one the map gives it.
    texts: the sample both models read, see `activations.read_texts`.
    ridge: the penalty, in units of each dimension's variance; None tries several on texts kept for that.
    trust_remote_code: run the code that comes with a model or tokenizer which is loaded by its name.
    min_r2, force: a map whose held-out R2, mean over the layers, is below min_r2 is refused unless force.

    Constant and shared vectors go anywhere (shared ones as constant ones where the shapes differ); adaptive
    ones read the inner space of their own MLP and go only into a model of the same shape. Positions and site
    carry over. `method="direct", rescale=False` between models of the same shape reads no text and runs
    neither model. The moments take 24 * layers * hidden_size * (hidden_size + other hidden_size)
    bytes.

    Raises SteerError when the artifact is not the donor's, for a method the shapes do not allow, for a text
    sample that pairs too few tokens, and for a map that explains too little.
    """
    for name, value, known in (("method", method, METHODS), ("layers_by", layers_by, LAYERS_BY)):
        if value not in known:
            raise SteerError(f"{name}={value!r} is unknown; choose one of {', '.join(known)}")
    if ridge is not None and not 0 <= ridge < float("inf"):
        raise SteerError(f"ridge={ridge!r} is not a penalty; give a number from 0, such as 0.01")
    source = artifact if isinstance(artifact, Artifact) else artifacts.read(artifact)
    source.config.refuse_condition("transfer")
    layers_by = "depth" if layers_by == "auto" else layers_by
    target = _loaded(recipient, trust_remote_code)
    decoder = find_decoder(target)
    blind = not needs_donor(source.config, target, method=method, layers_by=layers_by, rescale=rescale)
    method = _possible(source, target, method, layers_by)
    layers = source.config.resolve_layers(source.num_hidden_layers)
    matches = by_depth(layers, source.num_hidden_layers, decoder.num_hidden_layers)
    notes: list[str] = []
    if blind:
        fitted = Fitted("direct", dict.fromkeys(matches))
    else:
        giver = _named(source, trust_remote_code) if donor is None else _loaded(donor, trust_remote_code)
        if not _same_shape(source.config, giver):
            config, its_name = source.config, giver.config.name_or_path or "the donor given"
            raise SteerError(
                f"the artifact is not the donor's: it was made for {config.base_model_name_or_path} "
                f"({config.model_type}, {config.num_hidden_layers} layers, hidden size "
                f"{config.hidden_size}), not for {its_name}; give the model it was trained in"
            )
        if has_other_weights(giver, source.config.base_checksum):
            notes.append("the donor given has other weights than the model that the vectors were made for")
        sides = (
            Side(giver, find_decoder(giver), donor_tokenizer or _tokenizer(giver, trust_remote_code)),
            Side(target, decoder, recipient_tokenizer or _tokenizer(target, trust_remote_code)),
        )
        recipient_tokenizer = sides[1].tokenizer
        sample = read_texts(texts, max(sides[0].decoder.hidden_size, decoder.hidden_size))
        site = source.config.site
        if layers_by == "cka":
            matches = match_by_cka(*sides, sample, layers, site)
        options: dict[str, Any] = {"penalty": ridge, "rescale": rescale, "min_r2": min_r2}
        fitted = fit(*sides, sample, matches, site=site, method=method, **options)
    mean_r2 = fitted.mean_r2
    if mean_r2 is not None and mean_r2 < min_r2 and not force:
        fix = "use method='ridge'" if fitted.method == "direct" else "give other texts, train new vectors"
        raise SteerError(
            f"the {fitted.method} map explains {mean_r2:.3f} of the recipient's stream on held-out texts, "
            f"less than min_r2={min_r2}: {fix}, or accept the result with force=True"
        )
    given = _given(source)
    moved = {match: _move(given[match.donor], match, fitted) for match in matches}
    made, more = _build(source, target, fitted, moved)
    report = TransferReport(
        donor=str(source.config.base_model_name_or_path),
        recipient=str(made.config.base_model_name_or_path),
        method=fitted.method,
        layers_by=layers_by,
        rescale=rescale,
        mean_r2=mean_r2,
        pairs=fitted.pairs,
        held_out=fitted.held_out,
        layers=[_row(match, given[match.donor], vector, fitted) for match, vector in moved.items()],
        notes=notes + more,
    )
    config = replace(made.config, provenance=_provenance(source, report), prompt=source.config.prompt)
    if recipient_tokenizer is not None:
        config = replace(config, tokenizer_checksum=tokenizer_checksum(recipient_tokenizer))
    return Transferred(Artifact(config, made.tensors), report)


def needs_donor(
    config: SteeringConfig, recipient: PreTrainedModel, *, method: str, layers_by: str, rescale: bool
) -> bool:
    """Whether `transfer` runs both models: not for a plain copy into a model of the same shape."""
    copied = method == "direct" and not rescale and layers_by in ("auto", "depth")
    return not (copied and _same_shape(config, recipient))


def _loaded(model: PreTrainedModel | str, trust: bool) -> PreTrainedModel:
    if not isinstance(model, str):
        return model
    from steer.models import load_model

    return load_model(model, trust_remote_code=trust)


def _tokenizer(model: PreTrainedModel, trust: bool) -> PreTrainedTokenizerBase:
    from steer.models import load_tokenizer, loaded_revision

    if not model.config.name_or_path:
        raise SteerError(
            f"this {type(model).__name__} has no name to find its tokenizer by; pass the tokenizer too"
        )
    revision = loaded_revision(model)
    return load_tokenizer(model.config.name_or_path, revision=revision, trust_remote_code=trust)


def _named(source: Artifact, trust: bool) -> PreTrainedModel:
    from steer.models import load_model

    name, revision = artifact_base(source.config, trust_remote_code=trust, fix="give the donor")
    return load_model(name, revision=revision, trust_remote_code=trust)


def _same_shape(config: SteeringConfig, model: PreTrainedModel) -> bool:
    model_shape = describe(model)
    return all(
        getattr(config, name) == model_shape[name]
        for name in ("model_type", "hidden_size", "num_hidden_layers")
    )


def _possible(source: Artifact, target: PreTrainedModel, method: str, layers_by: str) -> str:
    """The method as far as the kind and the site decide it; SteerError for what no text sample can change."""
    config, decoder = source.config, find_decoder(target)
    alike = decoder.hidden_size == config.hidden_size
    if method == "direct" and not alike:
        raise SteerError(
            f"method='direct' needs models of one hidden size, these have {config.hidden_size} and "
            f"{decoder.hidden_size}; use ridge or procrustes"
        )
    if config.kind == "adaptive":
        inner = {len(readout) for _, readout in source.rank_one().values()}
        same = _same_shape(config, target)
        if same:
            same = inner == {size for _, size in find_down_projections(decoder, list(source.rank_one()))}
        if method not in ("auto", "direct") or layers_by != "depth" or not same:
            raise SteerError(
                "adaptive vectors read the inner space of their own MLP, which no map of the residual stream "
                "brings over: they only go layer for layer, by method='direct', into a model of the same "
                "architecture and shape"
            )
        return "direct"
    vectors = target.__dict__.get("steering_vectors")  # off, they need not know where a prompt ends
    with vectors.disabled() if vectors is not None else nullcontext():
        find_sites(decoder, list(range(decoder.num_hidden_layers)), config.site)
    if config.site in ("attn_out", "mlp_out"):
        if method not in ("auto", "direct") or not alike:
            raise SteerError(
                f"site={config.site!r} is a module's output, which a norm may follow: maps are fitted on the "
                "residual stream and bring over resid_pre, resid_mid and resid_post; this one only goes by "
                "method='direct'"
            )
        return "direct"
    return method


def _given(source: Artifact) -> dict[int, torch.Tensor]:
    """The donor's vectors by layer, (hidden_size,) in float64, without the read-outs of adaptive ones."""
    if source.config.kind == "adaptive":
        return {layer: vector.double() for layer, (vector, _) in source.rank_one().items()}
    return {layer: vector.double() for layer, vector in source.by_layer().items()}


def _move(vector: torch.Tensor, match: Match, fitted: Fitted) -> torch.Tensor:
    """What the recipient's layer gets of one donor layer's vector."""
    matrix = fitted.matrices[match]
    moved = vector if matrix is None else vector @ matrix
    if fitted.rescale and moved.norm() > 0:
        moved = moved * (fitted.factor(match) * vector.norm() / moved.norm())
    return match.share * moved


def _build(
    source: Artifact, target: PreTrainedModel, fitted: Fitted, moved: dict[Match, torch.Tensor]
) -> tuple[Artifact, list[str]]:
    """The artifact for the recipient, and what its user should know."""
    config = source.config
    notes: list[str] = []
    in_place = fitted.method == "direct" and all(m.donor == m.recipient and m.share == 1 for m in moved)
    if config.kind != "constant" and in_place and _same_shape(config, target):
        return _same_kind(source, target, fitted), notes
    if config.kind != "constant":
        notes.append(f"the {config.kind} vectors became constant ones")
    total: dict[int, torch.Tensor] = {}
    for match, vector in moved.items():
        total[match.recipient] = total.get(match.recipient, 0) + vector
    if len(total) < len({m.donor for m in moved}):
        notes.append(f"{len({m.donor for m in moved})} layers' vectors were added up in {len(total)}")
    fields = {"site": config.site, "positions": config.positions, "dtype": config.dtype}
    return from_vectors(total, target, **fields), notes


def _same_kind(source: Artifact, target: PreTrainedModel, fitted: Fitted) -> Artifact:
    """Adaptive and shared vectors in a model of the same shape; a length is that of the vector or the mix."""
    config = source.config
    names = expected_names(config, source.decoder), expected_names(config, find_decoder(target).name)
    tensors = {new: source.tensors[old] for old, new in zip(*names, strict=True)}
    for match in fitted.matrices:
        part = "mix" if config.kind == "shared" else "vector"
        name = f"{find_decoder(target).name}.{match.recipient}.steering.{part}"
        tensors[name] = (fitted.factor(match) * tensors[name].double()).to(tensors[name].dtype)
    return Artifact(replace(config, **describe(target)), tensors)


def _row(match: Match, before: torch.Tensor, after: torch.Tensor, fitted: Fitted) -> LayerReport:
    before = match.share * before
    donor_norm, recipient_norm = fitted.norms.get(match, (0.0, 0.0))
    lengths = before.norm().item(), after.norm().item()
    return LayerReport(
        donor=match.donor,
        recipient=match.recipient,
        share=match.share,
        r2=fitted.r2.get(match),
        cka=fitted.cka.get(match),
        norm_before=lengths[0],
        norm_after=lengths[1],
        relative_before=lengths[0] / donor_norm if donor_norm else None,
        relative_after=lengths[1] / recipient_norm if recipient_norm else None,
        cosine=(before @ after).item() / (lengths[0] * lengths[1])
        if len(before) == len(after) and min(lengths) > 0
        else None,
        penalty=fitted.penalties.get(match),
    )


def _provenance(source: Artifact, report: TransferReport) -> dict[str, Any]:
    """How the vectors were made, and how they came here. Scores were the donor's, so they stay behind."""
    kept = without_scores(source.config.provenance or {})
    names = ("donor", "method", "layers_by", "rescale", "mean_r2", "pairs", "held_out")
    kept["transfer"] = {name: getattr(report, name) for name in names}
    kept["transfer"]["donor_checksum"] = source.config.base_checksum
    return kept
