"""Which activations of a model an SAE is for: the layer and the site, checked against the model."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedModel

from steer.errors import SteerError
from steer.identity import describe
from steer.places import adds_as_is
from steer.sae.activations import check_base
from steer.sae.model import SAE
from steer.sites import find_decoder
from steer.weights import public_name


def sae_place(
    sae: SAE, model: PreTrainedModel, name: str, layer: int | None = None, site: str | None = None
) -> tuple[int, str]:
    """
    The layer and the site whose activations an SAE reads in a model.

    Args:
        sae: any SAE.
        model: the base model.
        name: what messages call the SAE.
        layer: for an SAE that does not say its layer; default: the SAE's.
        site: for an SAE that does not say its site; default: the SAE's, else resid_post.

    Raises:
        SteerError: an SAE of another model, layer, site or width; no layer; a layer that the model does not
            have; a site that is another place in this architecture than in the SAE's tool.
    """
    source: Mapping[str, Any] = sae.cfg.source or {}
    decoder = find_decoder(model)
    foreign = source.get("tool")
    here, there = describe(model)["base_model_name_or_path"], source.get("model")
    if here and there and public_name(here) != public_name(there):
        if not foreign:
            raise SteerError(
                f"{name} is an SAE of {there}, the model is {here}; give the model it was trained on"
            )
        if there.rpartition("/")[2].lower() != here.rstrip("/").rpartition("/")[2].lower():
            warnings.warn(
                f"{name}: an SAE of {there}, as {foreign} calls it; the model is {here}: if it is another "
                "one, evaluate the SAE on it first",
                stacklevel=3,
            )
    if sae.cfg.d_in != decoder.hidden_size:
        raise SteerError(
            f"{name} is an SAE of width {sae.cfg.d_in}, the model's hidden size is {decoder.hidden_size}"
        )
    check_base(source, model, name)
    known = source.get("layer")
    if "hook" in source and "site" not in source and (layer is None or site is None):
        raise SteerError(
            f"{name} reads {source['hook']}, which is not known here; say with a layer and a site which "
            "place that is"
        )
    if layer is None and known is None:
        raise SteerError(f"{name} does not say which layer it was trained on; give the layer")
    if known is not None and layer not in (None, known):
        raise SteerError(f"{name} is an SAE of layer {known}, not of layer {layer}; leave the layer out")
    if site is not None and source.get("site", site) != site:
        raise SteerError(f"{name} is an SAE of site {source['site']}, not of {site}; leave the site out")
    chosen = int(known if layer is None else layer)  # type: ignore[arg-type]
    place = site or source.get("site", "resid_post")
    if not 0 <= chosen < decoder.num_hidden_layers:
        raise SteerError(
            f"{name} is an SAE of layer {chosen}, and the model has layers 0 to "
            f"{decoder.num_hidden_layers - 1}"
        )
    if foreign and place in ("attn_out", "mlp_out"):
        _check_added(model, chosen, place, name, str(foreign))
    return chosen, place


def _check_added(model: PreTrainedModel, layer: int, site: str, name: str, tool: str) -> None:
    """
    SteerError unless the layer adds what its modules return to the stream as it is. TransformerLens reads
    what is added, after a norm or a factor that some architectures have there; the site is before it.
    """
    if not adds_as_is(model, layer):
        raise SteerError(
            f"{name} is an SAE of what {tool} calls {site}, which is what the layer adds to the stream; this "
            f"model normalises or scales the module's output first, and {site} is before that: use an SAE "
            "of the residual stream"
        )
