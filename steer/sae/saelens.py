"""
SAEs of SAELens: what the settings and weights of its files mean here, and SAEs that it knows by release and
id, such as those of Gemma Scope 2 and Qwen-Scope.

Every setting is honoured, or in a list of those that do not change features and reconstructions, with the
reason, or refused by name and value. The lists hold the settings of SAELens up to 6.54.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor

from steer.errors import SteerError, one_line, shown
from steer.extras import require
from steer.sae.foreign import (
    FILE,
    SOURCE,
    Read,
    boolean,
    check_settings,
    check_tensors,
    log_thresholds,
    sae_config,
)

# By setting, why it is not looked at.
IRRELEVANT = {
    **dict.fromkeys(("dtype", "device", "sae_lens_version", "sae_lens_training_version"), FILE),
    **dict.fromkeys(("model_class_name", "neuronpedia_id", "hf_hook_name"), SOURCE),
    **dict.fromkeys(("context_size", "prepend_bos", "seqpos_slice", "exclude_special_tokens"), SOURCE),
    **dict.fromkeys(("dataset_path", "dataset_trust_remote_code"), SOURCE),
    "jump_relu_threshold": "the thresholds are among the weights",
}
# What says which activations these are: in the file itself before version 6, in its "metadata" since.
HOOKS = ("hook_name", "hook_point")
LAYERS = ("hook_layer", "hook_point_layer")
MODEL = ("model_name", "model_from_pretrained_kwargs")
# Other activations than those of one place: of a single head, or of two places (transcoders).
OTHER = (
    *("hook_head_index", "hook_point_head_index"),
    *("hook_name_out", "hook_head_index_out", "hf_hook_name_out"),
)
PLACE = (*HOOKS, *LAYERS, *MODEL, *OTHER)
# The values under which an SAE is a plain one; any other changes what goes in or what comes out.
PLAIN = {
    "normalize_activations": ("none", None, False),
    "reshape_activations": ("none",),
    "finetuning_scaling_factor": (False, None),
}
HONOURED = ("architecture", "d_in", "d_sae", "k", "apply_b_dec_to_input", "rescale_acts_by_decoder_norm")
ACTIVATION = ("activation_fn_str", "activation_fn", "activation_fn_kwargs")
ARCHITECTURES = ("topk", "jumprelu", "standard", "gated")
# TransformerLens changes these without changing the activations that an SAE reads.
UNCHANGED = (
    *("fold_ln", "fold_value_biases", "center_unembed", "refactor_factored_attn_matrices"),
    *("device", "n_devices", "device_map", "dtype", "torch_dtype", "cache_dir", "move_to_device"),
)


def from_saelens(config: dict[str, Any], tensors: dict[str, Tensor], factor: float | None = None) -> Read:
    """
    What a file of SAELens holds.

    Args:
        config: its settings.
        tensors: W_enc (d_in, d_sae), W_dec (d_sae, d_in), b_dec (d_in,), and b_enc and for jumprelu threshold
            (d_sae,), or for gated b_gate, b_mag and r_mag.
        factor: of the inputs, for an SAE that was trained on activations scaled to an average norm
            (normalize_activations "expected_average_only_in"). It is folded into the weights.

    Raises:
        SteerError: a setting, a value or a weight that is not known here.
    """
    if factor is not None and config.get("normalize_activations") == "expected_average_only_in":
        config = {**config, "normalize_activations": "none"}
        tensors = {**tensors, "W_enc": tensors["W_enc"] * factor}
        tensors |= {name: tensors[name] / factor for name in ("W_dec", "b_dec")}
    known = (*HONOURED, *ACTIVATION, *PLACE, "metadata")
    check_settings("SAELens", config, known, IRRELEVANT, PLAIN)
    kind = config.get("architecture", "standard")
    if kind not in ARCHITECTURES:
        raise SteerError(f"SAELens architecture={kind!r} is not known here; {', '.join(ARCHITECTURES)} are")
    kind, k = _activation(config, kind)
    source = _source(config)
    rescaled = boolean(config, "rescale_acts_by_decoder_norm", False)
    if rescaled and kind != "topk":
        raise SteerError(
            f"rescale_acts_by_decoder_norm=True is not known for architecture {kind!r}, only topk"
        )
    biases = {"jumprelu": {"b_enc", "threshold"}, "gated": {"b_gate", "b_mag", "r_mag"}}.get(kind, {"b_enc"})
    scale = tensors.get("scaling_factor")
    if scale is not None and torch.equal(scale, torch.ones_like(scale)):  # some versions wrote ones
        tensors = {name: value for name, value in tensors.items() if name != "scaling_factor"}
    check_tensors("SAELens", tensors, {"W_enc", "W_dec", "b_dec"} | biases)
    table, weight = tensors["W_dec"], tensors["W_enc"].T.contiguous()
    if kind == "gated":
        # The gate and the magnitude read the same direction, so "gate > 0" is a threshold of the magnitude.
        ratio = tensors["r_mag"].exp()
        weight, bias = weight * ratio[:, None], tensors["b_mag"]
        thresholds = bias - ratio * tensors["b_gate"]
    else:
        bias = tensors["b_enc"]
        # ReLU is JumpReLU with thresholds of zero.
        thresholds = tensors["threshold"] if kind == "jumprelu" else torch.zeros_like(bias)
    if rescaled:
        # activations are in units of the decoder's rows, which then count as unit rows
        norms = table.norm(dim=1)
        weight, bias, table = weight * norms[:, None], bias * norms, table / norms[:, None]
    state = {"encoder.weight": weight, "encoder.bias": bias, "W_dec": table, "b_dec": tensors["b_dec"]}
    if kind != "topk":
        state["log_threshold"] = log_thresholds(thresholds)
    tied = boolean(config, "apply_b_dec_to_input", True)
    activation = "topk" if kind == "topk" else "jumprelu"
    return sae_config(config["d_in"], config["d_sae"], k, activation, tied, source), state


def _activation(config: dict[str, Any], kind: str) -> tuple[str, int | None]:
    """
    The architecture and k. Before version 6 a TopK SAE was a standard one with the activation "topk" and k
    among its arguments.
    """
    given = [config[name] for name in ("activation_fn_str", "activation_fn") if name in config]
    arguments = config.get("activation_fn_kwargs") or {}
    activation = given[0] if given else "relu"
    top = activation == "topk" and kind in ("standard", "topk")
    allowed = {"k"} if top else set()
    fine = isinstance(arguments, dict) and set(arguments) <= allowed and given[1:] in ([], given[:1])
    if not fine or not (top or activation == "relu"):
        raise SteerError(
            f"SAELens activation_fn_str={activation!r} with activation_fn_kwargs={arguments!r} is not known "
            f"for architecture {kind!r}; relu without arguments, and topk with k, are"
        )
    if not top and kind != "topk":
        if "k" in config:
            raise SteerError(f"SAELens setting k={config['k']!r} is not known for architecture {kind!r}")
        return kind, None
    counts = [value for value in (config.get("k"), arguments.get("k")) if value is not None]
    if not counts or counts[1:] not in ([], counts[:1]):
        what = f"two values of k, {counts[0]!r} and {counts[1]!r}" if counts else "no k"
        raise SteerError(f"a SAELens topk SAE must say how many features are active; this one has {what}")
    return "topk", counts[0]


def _source(config: Mapping[str, Any]) -> dict[str, Any]:
    """Which activations these are: the model, and the layer and site of the hook, where the file says so."""
    metadata = config.get("metadata")
    if metadata is not None and not isinstance(metadata, Mapping):
        raise SteerError(f"SAELens setting metadata={metadata!r} is not a mapping of settings")
    told = {**(metadata or {}), **{name: config[name] for name in PLACE if name in config}}
    for name in OTHER:
        if told.get(name) is not None:
            raise SteerError(
                f"SAELens setting {name}={told[name]!r} is not known here: it is an SAE of one head, or a "
                "transcoder"
            )
    source: dict[str, Any] = {"tool": "SAELens"}
    if told.get("model_name") is not None:
        source["model"] = str(told["model_name"])
    source |= _how_loaded(told.get("model_from_pretrained_kwargs"))
    names = [told[name] for name in HOOKS if told.get(name) is not None]
    if not names:
        return source
    layer, site = hook_place(names[0])
    for name in LAYERS:
        if told.get(name) is not None and told[name] != layer:
            raise SteerError(
                f"SAELens setting {name}={told[name]!r} does not fit hook_name={names[0]!r}; one of the two "
                "is wrong"
            )
    return {**source, "hook": names[0], "layer": layer, "site": site}


def _how_loaded(options: Any) -> dict[str, Any]:
    """What the options say with which the model was loaded; SteerError where they change activations."""
    if options is None:
        return {}
    if not isinstance(options, Mapping):
        raise SteerError(f"SAELens setting model_from_pretrained_kwargs={options!r} is not a mapping")
    for name, value in options.items():
        plain = name in UNCHANGED or name == "revision" or (name == "center_writing_weights" and not value)
        if not plain:
            raise SteerError(
                f"SAELens setting model_from_pretrained_kwargs {name}={value!r} is not known here: the SAE "
                "reads other activations than those of the model in transformers"
            )
    return {"base_revision": options["revision"]} if options.get("revision") is not None else {}


def hook_place(name: object) -> tuple[int, str]:
    """
    Layer and site of a hook, by its name in TransformerLens or of a layer in transformers.

    Raises:
        SteerError: a hook at another place, such as the heads of an attention.
    """
    text = str(name)
    if found := re.fullmatch(r"blocks\.(\d+)\.hook_(resid_pre|resid_mid|resid_post|attn_out|mlp_out)", text):
        return int(found[1]), found[2]
    # A decoder layer: what it returns is the stream after it.
    if found := re.fullmatch(r"(?:[a-z_]+\.)*(?:layers|h|blocks)\.(\d+)(?:\.output)?", text):
        return int(found[1]), "resid_post"
    raise SteerError(
        f"SAELens setting hook_name={name!r} is not known here, only blocks.N.hook_resid_pre, "
        "hook_resid_mid, hook_resid_post, hook_attn_out, hook_mlp_out and model.layers.N"
    )


# --- by release and id


def from_release(release: str, sae_id: str) -> Read:
    """
    An SAE that SAELens knows: files come from the hub, and SAELens's own loader reads them.

    Args:
        release: of SAELens's directory, such as "gemma-scope-2-270m-pt-res", or a repository on the hub in
            SAELens's format.
        sae_id: of the release, such as "layer_12_width_16k_l0_medium", or a folder of the repository.

    Returns:
        Config and tensors, in float32.

    Raises:
        SteerError: SAELens is not installed, does not know the release or the id, or cannot load it; and what
            `from_saelens` refuses.
    """
    require("SAEs by release and id", "sae-lens")
    from sae_lens.loading.pretrained_sae_loaders import (
        NAMED_PRETRAINED_SAE_LOADERS,
        get_conversion_loader_name,
    )
    from sae_lens.loading.pretrained_saes_directory import (
        get_config_overrides,
        get_norm_scaling_factor,
        get_pretrained_saes_directory,
        get_repo_id_and_folder_name,
    )

    releases = get_pretrained_saes_directory()
    known = releases.get(release)
    if known is None and "/" not in release:
        raise SteerError(
            f"SAELens knows no release {release!r}{_near(release, releases)}; give one of its releases, or "
            "user/name of the hub"
        )
    if known is not None and sae_id not in known.saes_map:
        raise SteerError(
            f"release {release!r} has no SAE {sae_id!r} among its {len(known.saes_map)}"
            f"{_near(sae_id, known.saes_map)}"
        )
    repo_id, folder = get_repo_id_and_folder_name(release, sae_id)
    overrides = {**get_config_overrides(release, sae_id), "device": "cpu", "dtype": "float32"}
    try:
        config, tensors, _ = NAMED_PRETRAINED_SAE_LOADERS[get_conversion_loader_name(release)](
            repo_id=repo_id,
            folder_name=folder,
            device="cpu",
            force_download=False,
            cfg_overrides=overrides,
        )
    except Exception as error:  # of the network, of the hub, and of what the files hold
        raise SteerError(
            f"SAELens cannot load {sae_id!r} of {release!r} from {repo_id} ({one_line(error)})"
        ) from error
    tensors = {name: value.float() for name, value in tensors.items()}
    read, state = from_saelens(config, tensors, get_norm_scaling_factor(release, sae_id))
    listed = {"model": known.model} if known is not None else {}
    read.source = {**listed, **(read.source or {}), "release": release, "id": sae_id}
    return read, state


def _near(name: str, names: Mapping[str, object]) -> str:
    near = get_close_matches(name, names, 3, 0.4)
    return f"; near it are {shown(', '.join(near))}" if near else ""
