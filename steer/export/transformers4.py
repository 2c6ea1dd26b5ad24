"""
Names that transformers 4 needs in a checkpoint saved by transformers 5. Version 4 ignores settings that were
renamed in version 5 and silently uses its defaults, so a saved folder gets both names.

config.json             `rope_theta`, `rope_scaling`, `partial_rotary_factor` beside `rope_parameters`, and
                        those of single model types: `rotary_emb_base` and `rotary_pct` (GPT-NeoX),
                        `rope_local_base_freq` (Gemma 3), `original_max_position_embeddings` (Phi 3)
tokenizer_config.json   `PreTrainedTokenizerFast` instead of `TokenizersBackend`, `additional_special_tokens`
                        instead of a list as `extra_special_tokens`

Checked with transformers 4.57.3 (`tests/export/test_transformers4.py`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

# Where version 4 has a base for each kind of layer: the setting of the layers that attend to a window.
_LOCAL_BASE = {"gemma3_text": "rope_local_base_freq", "gemma3n_text": "rope_local_base_freq"}
_LAYER_KINDS = {"full_attention", "sliding_attention"}


def add_names(folder: Path) -> str | None:
    """
    Add the names of transformers 4 to `config.json` and `tokenizer_config.json` in `folder`.

    Args:
        folder: A checkpoint that transformers 5 saved.

    Returns:
        Why transformers 4 would compute something else; None when it computes the same.
    """
    path = folder / "config.json"
    config = json.loads(path.read_text())
    names, reason = _config_names(config)
    path.write_text(json.dumps(config | names, indent=2, sort_keys=True) + "\n")
    path = folder / "tokenizer_config.json"
    if path.is_file():
        tokenizer = json.loads(path.read_text())
        if tokenizer.get("tokenizer_class") == "TokenizersBackend":
            tokenizer["tokenizer_class"] = "PreTrainedTokenizerFast"
        if isinstance(tokenizer.get("extra_special_tokens"), list):
            tokenizer["additional_special_tokens"] = tokenizer.pop("extra_special_tokens")
        path.write_text(json.dumps(tokenizer, indent=2, ensure_ascii=False) + "\n")
    return reason


def _config_names(config: dict[str, Any]) -> tuple[dict[str, Any], str | None]:
    """The settings under their names in version 4, and what of them it has no name for."""
    names: dict[str, Any] = {}
    if "dtype" in config:
        names["torch_dtype"] = config["dtype"]
    rope: dict[str, Any] | None = config.get("rope_parameters")
    if not rope:
        return names, None
    kind = config["model_type"]
    if rope.keys() <= _LAYER_KINDS:
        local, rope = rope.get("sliding_attention") or {}, rope.get("full_attention") or {}
        if kind in _LOCAL_BASE:
            names[_LOCAL_BASE[kind]] = local.get("rope_theta")
        elif local != rope:
            return (
                names,
                f"version 4 has one rotary embedding for all layers of a {kind}, not one for each kind",
            )
    names["rope_theta"] = rope.get("rope_theta")
    if (share := rope.get("partial_rotary_factor")) is not None:
        names["partial_rotary_factor"] = share
    if kind == "gpt_neox":
        names |= {
            "rotary_emb_base": rope.get("rope_theta"),
            "rotary_pct": rope.get("partial_rotary_factor", 1.0),
        }
    if rope.get("rope_type", "default") != "default":
        scaling = {name: rope[name] for name in rope if name not in ("rope_theta", "partial_rotary_factor")}
        if scaling["rope_type"] == "longrope":  # version 4 refuses any further name in the dictionary
            if "original_max_position_embeddings" in scaling:
                original = scaling.pop("original_max_position_embeddings")
                names["original_max_position_embeddings"] = original
            scaling["type"] = scaling["rope_type"]
            if kind == "phi3":
                scaling = {name: scaling[name] for name in ("type", "short_factor", "long_factor")}
        names["rope_scaling"] = scaling
    return names, None
